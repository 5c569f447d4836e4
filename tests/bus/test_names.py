"""Names by the rules of D-Bus, between members and a master of our own (D4)."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import NameFlags
from afbus.proto.names import NameOutcome, ReleaseOutcome

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.bus.conftest import NodeProcess, Scene

    from afbus import Bus, Member

pytestmark = pytest.mark.cluster

NONE = NameFlags(0)
ALLOW, REPLACE, DO_NOT_QUEUE = NameFlags
_NUMBERS = itertools.count(1)


class Town:
    """A bus with a master of afbus's own, and members on it."""

    def __init__(self, bus: Bus, node: NodeProcess, stack: AsyncExitStack) -> None:
        self.bus = bus
        self._node = node
        self._stack = stack

    async def join(self, **options: object) -> Member:
        """A new member, until the end of the test."""
        made = afbus.join(self.bus.path, node=self._node.place, **options)  # type: ignore[arg-type]  # as given
        return await self._stack.enter_async_context(made)

    async def hears(self, who: Member, name: str) -> bool:
        """Whether what is sent to the name arrives at this member now.

        The master carries out what it decides in its order: when it has answered this member, an
        heir of something that was given up before has got it.
        """
        await who.release("nothing")
        mark = b"%d" % next(_NUMBERS)
        await self.bus.send(who.address, b"before " + mark)
        stream = who.messages()
        with suppress(afbus.NoSuchEndpoint):
            await self.bus.send(name, mark)
        await self.bus.send(who.address, b"after " + mark)
        bodies = []
        async for message in stream:
            bodies.append(message.body)
            if message.body == b"after " + mark:
                break
        return mark in bodies


@pytest.fixture
async def town(node: NodeProcess) -> AsyncIterator[Town]:
    """A bus where everybody of the same user may own every name."""
    async with AsyncExitStack() as stack:
        bus = afbus.create(f"/names{next(_NUMBERS)}", "names.master", node=node.place)
        yield Town(await stack.enter_async_context(bus), node, stack)


# Flags of the owner, flags of the other who asks, what it is told, and whether it owns then.
TABLE = [
    (NONE, NONE, NameOutcome.IN_QUEUE, False),
    (NONE, REPLACE, NameOutcome.IN_QUEUE, False),
    (ALLOW, NONE, NameOutcome.IN_QUEUE, False),
    (ALLOW, REPLACE, NameOutcome.PRIMARY_OWNER, True),
    (NONE, DO_NOT_QUEUE, NameOutcome.EXISTS, False),
    (NONE, REPLACE | DO_NOT_QUEUE, NameOutcome.EXISTS, False),
    (ALLOW, DO_NOT_QUEUE, NameOutcome.EXISTS, False),
    (ALLOW, REPLACE | DO_NOT_QUEUE, NameOutcome.PRIMARY_OWNER, True),
]


@pytest.mark.parametrize(("mine", "others", "outcome", "is_taken"), TABLE)
async def test_d4_request_for_a_name_that_is_owned(
    town: Town, mine: NameFlags, others: NameFlags, outcome: NameOutcome, is_taken: bool
) -> None:
    """The table of D-Bus; messages to the name go to whoever owns it when the answer is there."""
    one, two = await town.join(), await town.join()
    assert await one.own("name", mine) is NameOutcome.PRIMARY_OWNER
    assert await two.own("name", others) is outcome
    assert await town.hears(two if is_taken else one, "name")
    assert (two.address_of("name") in two.addresses) is is_taken
    assert (one.address_of("name") in one.addresses) is not is_taken


async def test_d4_asking_again_changes_the_flags(town: Town) -> None:
    """The owner is told that it is that, and may allow replacement later."""
    one, two = await town.join(), await town.join()
    assert await one.own("name") is NameOutcome.PRIMARY_OWNER
    assert await one.own("name", ALLOW) is NameOutcome.ALREADY_OWNER
    assert await two.own("name", REPLACE) is NameOutcome.PRIMARY_OWNER


@pytest.mark.parametrize("how", ["release", "leave"])
async def test_d4_who_waits_inherits_in_order(town: Town, how: str) -> None:
    """When the owner gives the name up or leaves, the one that waits longest has it."""
    one, two, three = [await town.join() for _ in range(3)]
    for member in (one, two, three):
        await member.own("name")
    for owner, heir in ((one, two), (two, three)):
        assert await town.hears(owner, "name")
        if how == "release":
            assert await owner.release("name") is ReleaseOutcome.RELEASED
        else:
            await owner.__aexit__(None, None, None)
        assert await town.hears(heir, "name")
        assert heir.address_of("name") in heir.addresses


async def test_d4_replaced_owner_waits_first_in_line(town: Town) -> None:
    """Who was replaced is next, before those who waited; unless it does not want to wait."""
    one, two, three = [await town.join() for _ in range(3)]
    await one.own("queues", ALLOW)
    await one.own("does not", ALLOW | DO_NOT_QUEUE)
    for name in ("queues", "does not"):
        assert await two.own(name) is NameOutcome.IN_QUEUE
        assert await three.own(name, REPLACE) is NameOutcome.PRIMARY_OWNER
        assert await three.release(name) is ReleaseOutcome.RELEASED
    assert await town.hears(one, "queues")
    assert await town.hears(two, "does not")


async def test_d4_release(town: Town) -> None:
    """Giving up says what there was to give up; also a place in the queue."""
    one, two = await town.join(), await town.join()
    assert await one.release("name") is ReleaseOutcome.NON_EXISTENT
    await one.own("name")
    assert await two.release("name") is ReleaseOutcome.NOT_OWNER
    assert await two.own("name") is NameOutcome.IN_QUEUE
    assert await two.release("name") is ReleaseOutcome.RELEASED
    assert await one.release("name") is ReleaseOutcome.RELEASED
    assert await one.release("name") is ReleaseOutcome.NON_EXISTENT


async def test_d4_d7_join_with_a_name_that_is_taken(town: Town) -> None:
    """By default who joins by a name wants it at once; it can also wait for it."""
    one = await town.join(name="name")
    with pytest.raises(afbus.AddressInUse):
        await town.join(name="name")
    two = await town.join(name="name", flags=NONE)
    assert await town.hears(one, "name")
    await one.release("name")
    assert await town.hears(two, "name")
    assert len(town.bus.members()) == 2


async def test_d3_d4_killed_owner(town: Town, scene: Scene) -> None:
    """The name of a process that is killed goes to who waits, its unique address to nobody."""
    process = scene.start(
        """
import asyncio
async def main():
    async with afbus.join(args[0], name="name", node=door) as me:
        say(me.address.address.decode())
        await asyncio.Event().wait()
asyncio.run(main())
""",
        town.bus.path.decode(),
    )
    assert process.stdout is not None
    address = (await asyncio.to_thread(process.stdout.readline)).strip()
    one = await town.join(name="name", flags=NONE)
    notices = one.notices()
    async with asyncio.TaskGroup() as group:
        # The first wait asks for the right to read them.
        first = group.create_task(anext(notices))
        later = await town.join()
    assert first.result().subject == (later.address.address,)
    process.kill()
    notice = await anext(notices)
    assert (notice.event, notice.subject) == (afbus.Event.KILLED, (address.encode(), b"name"))
    assert await town.hears(one, "name")
    with pytest.raises(afbus.NoSuchEndpoint):
        await one.send(address, b"x")
    assert (await town.join()).address.address.decode() != address


async def test_d4_d6_names_that_nobody_can_have(town: Town) -> None:
    """The master's own, unique ones and provisional ones."""
    one = await town.join()
    assert await one.own("names.master") is NameOutcome.IN_QUEUE
    assert await one.own("names.master", REPLACE | DO_NOT_QUEUE) is NameOutcome.EXISTS
    for name in ("1.99", "@1"):
        with pytest.raises(afbus.BusError):
            await one.own(name)
    for wrong in ("", "n" * 257):
        with pytest.raises((afbus.InvalidArgument, afbus.NameTooLong)):
            await one.own(wrong)


async def test_d4_d5_master_takes_a_name_back(town: Town) -> None:
    """A name that the master revokes goes to who waits for it; its old owner is told."""
    one, two = await town.join(name="name"), await town.join()
    await two.own("name")
    notices = one.notices(others=False)
    await town.bus.revoke("name")
    notice = await anext(notices)
    assert (notice.event, notice.subject) == (afbus.Event.REVOKED, (b"name",))
    assert await town.hears(two, "name")


async def test_r2_r21_d4_master_decides(node: NodeProcess) -> None:
    """What the callback refuses is EPERM with its words, and nothing of it is granted."""
    path = f"/names{next(_NUMBERS)}"

    def judge(question: afbus.Question) -> bool | str:
        name = getattr(question.request, "name", b"")
        return "not that one" if name.startswith(b"root.") else True

    async with (
        afbus.create(path, "names.master", node=node.place, authorize=judge),
        afbus.join(path, node=node.place) as one,
    ):
        with pytest.raises(afbus.Denied, match="not that one"):
            await one.own("root.service")
        assert await one.own("user.service") is NameOutcome.PRIMARY_OWNER
        assert one.addresses == (one.address, one.address_of("user.service"))
