"""Coming to a bus, names, and losing masters and agents, in an event loop, on a real agent."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from tests.client.host import MASTER, PATH, fails, hosting, read, until

import afbus
from afbus.proto.address import BusAddress
from afbus.proto.names import NameFlags, NameOutcome, ReleaseOutcome
from afbus.proto.notice import Event, Gap, GapReason
from afbus.proto.request import RequestKind
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.client.conftest import NodeProcess

    from afbus import Bus, Member, Question
    from afbus.client.question import Verdict


pytestmark = pytest.mark.cluster


async def test_ten_lines_of_the_readme(agent: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example works as it stands there, all in one event loop."""
    monkeypatch.setenv("AFBUS_NODE", str(agent.place))
    async with (
        afbus.create("/demo", "demo.master"),
        afbus.join("/demo", name="demo.clock") as clock,
        afbus.join("/demo") as me,
        me.subscribe("clock zone=utc") as ticks,
    ):
        await clock.publish("clock.second zone=utc", b"tick")
        tick = await anext(ticks)
        assert isinstance(tick, afbus.Message)
        assert tick.body == b"tick"
        assert tick.terms == Terms.parse("clock.second zone=utc")
        assert tick.source == clock.address
        assert tick.identity is not None
        assert tick.identity.pid == os.getpid()


async def test_r10_r11_members_have_addresses(agent: NodeProcess) -> None:
    """Unique ones in the order of joining, then names; the master knows them all."""
    async with hosting(agent) as host:
        bus = await host.create()
        one, two = await host.join("demo.one"), await host.join()
        assert [str(address) for address in one.addresses] == ["/demo:1.1", "/demo:demo.one"]
        assert str(two.address) == "/demo:1.2"
        assert bus.address == BusAddress(PATH, MASTER)
        view = bus.members()[0]
        assert (view.address, view.names) == (one.address, (BusAddress(PATH, "demo.one"),))
        assert view.identity is not None
        assert view.identity.uid == os.getuid()


async def verdict_later(verdict: Verdict) -> Verdict:
    """A verdict that takes a turn of the loop."""
    await asyncio.sleep(0)
    if verdict == "fail":
        raise RuntimeError("broken")
    return verdict


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "false": (lambda: False, "the master refuses"),
    "text": (lambda: "not you", "not you"),
    "none": (lambda: None, "the master refuses"),
    "async": (lambda: verdict_later("not you"), "not you"),
    "raises": (lambda: 1 // 0, "authorize failed: ZeroDivisionError: "),
    "raises later": (lambda: verdict_later("fail"), "authorize failed: RuntimeError: broken"),
}


@pytest.mark.parametrize("how", REFUSALS)
async def test_r11_d7_who_is_refused_is_told_why(agent: NodeProcess, how: str) -> None:
    """Whatever an authorize callback does, the asker gets EPERM with a reason, the bus goes on."""
    verdict, reason = REFUSALS[how]

    def authorize(question: Question) -> Any:
        return verdict() if question.kind is RequestKind.OWN else True

    async with hosting(agent) as host:
        await host.create(authorize)
        member = await host.join()
        with pytest.raises(afbus.Denied, match=reason):
            await member.own("demo.one")
        with pytest.raises(afbus.Denied):
            await host.join("demo.two")
        assert member.addresses == (member.address,)
        await member.publish("t", b"")


async def test_d7_joining_what_is_not_there(agent: NodeProcess, tmp_path: Path) -> None:
    """No agent is ECONNREFUSED, no bus ENOENT, a taken one EADDRINUSE, no master EHOSTDOWN."""
    async with hosting(agent) as host:
        with pytest.raises(afbus.NoAgent):
            await afbus.join(PATH, node=tmp_path / "nobody").__aenter__()
        with pytest.raises(afbus.NoBus):
            await host.join()
        async with afbus.create(PATH, MASTER, node=agent.place):
            await host.join("n")
            with pytest.raises(afbus.AddressInUse):
                await host.create()
            with pytest.raises(afbus.AddressInUse):
                await host.join("n")
        with pytest.raises(afbus.MasterLost):
            await host.join()


async def test_error_of_the_body_is_raised_as_it_is(agent: NodeProcess) -> None:
    """Not within a group of exceptions, and everything is closed."""
    async with hosting(agent):
        bus = afbus.create(PATH, MASTER, node=agent.place)
        member = afbus.join(PATH, node=agent.place)

        async def fail() -> None:
            async with bus, member:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        assert bus.closed
        assert member.closed
        with pytest.raises(afbus.Cancelled):
            await member.send(MASTER, b"")


async def test_d4_names_wait_and_move(agent: NodeProcess) -> None:
    """A name that is waited for comes when its owner releases it, is replaced, or leaves."""
    async with hosting(agent) as host:
        bus = await host.create()
        one, two = await host.join(), await host.join()
        name = BusAddress(PATH, "n")
        first = await one.own("n", NameFlags.ALLOW_REPLACEMENT)
        assert first is NameOutcome.PRIMARY_OWNER
        assert await one.own("n", NameFlags.ALLOW_REPLACEMENT) is NameOutcome.ALREADY_OWNER
        assert await two.own("n", NameFlags.DO_NOT_QUEUE) is NameOutcome.EXISTS
        assert await two.own("n") is NameOutcome.IN_QUEUE
        assert await two.own("n", NameFlags.REPLACE) is NameOutcome.PRIMARY_OWNER
        assert name in two.addresses
        notice = await anext(one.notices(others=False))
        assert (notice.event, notice.subject) == (Event.REVOKED, (b"n",))
        assert name not in one.addresses
        assert await two.release("n") is ReleaseOutcome.RELEASED
        assert await two.release("n") is ReleaseOutcome.NOT_OWNER
        await one.send("n", b"to myself")
        assert (await anext(one.messages())).body == b"to myself"
        assert name in one.addresses
        assert bus.members()[0].names == (name,)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"hello", b"\x91\x63", b"\x93\x02\xc4\x00\x00"])
async def test_r1_garbage_to_the_master_is_einval(agent: NodeProcess, body: bytes) -> None:
    """What is no request is refused with a reason, and the bus goes on."""
    async with hosting(agent) as host:
        await host.create()
        me = await host.join()
        with pytest.raises(afbus.InvalidArgument, match="the master does not understand"):
            await me.request(MASTER, body)
        await me.send(MASTER, body)
        assert await me.own("n") is NameOutcome.PRIMARY_OWNER


async def test_d5_master_revokes_and_evicts(agent: NodeProcess) -> None:
    """A match is gone at once; who is put off the bus is told, and nothing of it is left."""
    async with hosting(agent) as host:
        bus = await host.create()
        one, two = await host.join("n"), await host.join()
        gone = one.address
        await two.own("n")
        async with one.subscribe("t") as feed, one.subscribe("u") as other:
            await bus.revoke_match("n", "t")
            await two.publish("t", b"")
            await two.publish("u", b"u")
            assert [item.body for item in await read(1, other)] == [b"u"]
            await bus.revoke("n")
            await until(lambda: BusAddress(PATH, "n") in two.addresses)
            await bus.evict(gone)
            with pytest.raises(afbus.NotJoined):
                await anext(feed)
            with pytest.raises(afbus.NotJoined):
                await one.send("n", b"")
        assert one.closed
        assert [view.address for view in bus.members()] == [two.address]
        with pytest.raises(afbus.NoSuchEndpoint):
            await bus.evict(gone)
        with pytest.raises(afbus.NoSuchEndpoint):
            await bus.revoke("nobody")


async def test_d16_new_master_goes_on_with_the_bus(agent: NodeProcess) -> None:
    """Members stay, the traffic among them goes on, and addresses are not given again."""
    async with hosting(agent) as host:
        async with afbus.create(PATH, MASTER, node=agent.place):
            for _ in range(9):
                async with afbus.join(PATH, node=agent.place):
                    pass
            one, two = await host.join("n"), await host.join()
        with pytest.raises(afbus.MasterLost):
            await one.own("m")
        await two.send("n", b"still here")
        assert (await anext(one.messages())).body == b"still here"
        other = afbus.create(PATH, "demo.other", node=agent.place)
        bus = await host.stack.enter_async_context(other)
        assert {view.address for view in bus.members()} == {one.address, two.address}
        events = [(await anext(one.notices(others=False))).event for _ in range(2)]
        assert events == [Event.MASTER_LOST, Event.MASTER_BACK]
        assert await two.own("n") is NameOutcome.IN_QUEUE
        assert await one.own("m") is NameOutcome.PRIMARY_OWNER
        three = await host.join()
        assert int(three.address.address[2:]) > int(two.address.address[2:])


@pytest.mark.parametrize("remembers", [True, False])
async def test_d16_d21_members_survive_their_agent(agent: NodeProcess, remembers: bool) -> None:
    """With its journal they are what they were; without it they join again, and hear of it."""
    async with hosting(agent) as host:
        bus = await host.create()
        me, service = await host.join("m"), await host.join("s")
        before = me.address
        inbox = service.messages()
        async with me.subscribe("t") as feed, asyncio.TaskGroup() as group:
            await me.publish("t", b"before")
            asking = group.create_task(
                fails(me.request("s", b"", deadline=60), afbus.OutcomeUnknown)
            )
            await anext(inbox)
            agent.end(signal.SIGKILL)
            if not remembers:
                agent.forget()
            assert "not known" in await asking
            agent.start()
            assert await service.own("s") is NameOutcome.ALREADY_OWNER
            await me.send("s", b"after", deadline=60)
            if remembers:
                assert me.address == before
            while (await anext(inbox)).body != b"after":
                pass
            await me.publish("t", b"after", deadline=60)
            items = [await anext(feed) for _ in range(3)]
            assert isinstance(items[1], Gap)
            assert items[1].reason is GapReason.AGENT_RESTART
            assert isinstance(items[2], afbus.Message)
            assert items[2].body == b"after"
        assert BusAddress(PATH, "m") in me.addresses
        assert len(bus.members()) == 2
        assert await me.own("x") is NameOutcome.PRIMARY_OWNER


async def test_d3_no_unique_address_comes_again(agent: NodeProcess) -> None:
    """Neither for who joins again, nor on a new bus, nor after the agent was killed."""
    given: list[str] = []
    async with hosting(agent) as host:
        for round_ in range(3):
            async with afbus.create(PATH, MASTER, node=agent.place):
                for _ in range(2):
                    async with afbus.join(PATH, node=agent.place) as member:
                        given.append(str(member.address))
                members = await asyncio.gather(*(host.join() for _ in range(20)))
                given += [str(member.address) for member in members]
                for member in members:
                    await member.__aexit__(None, None, None)
            if round_ == 1:
                agent.end(signal.SIGKILL)
                agent.start()
    assert len(given) == 3 * 22
    assert len(set(given)) == len(given)


ELSEWHERE = BusAddress("/elsewhere", "n")
WRONG: dict[str, Callable[[Bus, Member], object]] = {
    "own: elsewhere": lambda _, me: me.own(ELSEWHERE),  # type: ignore[arg-type]  # what is tested
    "own: empty": lambda _, me: me.own(""),
    "own: unique": lambda _, me: me.own("1.9"),
    "own: no text": lambda _, me: me.own(5),  # type: ignore[arg-type]  # what is tested
    "release: multicast": lambda _, me: me.release(BusAddress.multicast(PATH)),  # type: ignore[arg-type]  # what is tested
    "evict: elsewhere": lambda bus, _: bus.evict(ELSEWHERE),
    "revoke: elsewhere": lambda bus, _: bus.revoke(ELSEWHERE),
    "send: empty": lambda _, me: me.send("", b""),
    "request: no deadline": lambda _, me: me.request("n", b"", deadline=None),  # type: ignore[arg-type]  # what is tested
    "request: not a number": lambda _, me: me.request("n", b"", deadline=math.nan),
    "subscribe: topic": lambda _, me: me.subscribe("a..b"),
    "subscribe: no terms": lambda _, me: me.subscribe(5),  # type: ignore[arg-type]  # what is tested
    "subscribe: overflow": lambda _, me: me.subscribe("t", overflow="gap"),  # type: ignore[arg-type]  # what is tested
    "subscribe: block": lambda _, me: me.subscribe("t", overflow=afbus.Overflow.BLOCK),
    "subscribe: nothing": lambda _, me: me.subscribe("t", limit=0),
    "publish: no terms": lambda _, me: me.publish(5, b""),  # type: ignore[arg-type]  # what is tested
    "serve: nothing": lambda _, me: me.serve(lambda _: b"", concurrency=0),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
async def test_d7_what_makes_no_sense_is_einval(
    agent: NodeProcess, call: Callable[[Bus, Member], object]
) -> None:
    """At the call that caused it, before anybody is asked, and nothing is changed by it."""
    async with hosting(agent) as host:
        bus, me = await host.create(), await host.join("n")
        before = me.addresses

        async def make_call() -> None:
            made = call(bus, me)
            if inspect.isawaitable(made):
                await made

        with pytest.raises(afbus.InvalidArgument):
            await make_call()
        assert me.addresses == before
        assert (await me.own("n")) is NameOutcome.ALREADY_OWNER


@pytest.mark.parametrize("path", [5, "", None])
def test_d7_paths_that_are_none(path: Any) -> None:
    """Are refused when the member or the bus is made."""
    with pytest.raises(afbus.InvalidArgument):
        afbus.join(path)
    with pytest.raises(afbus.InvalidArgument):
        afbus.create(path, "m")


OUTSIDE: dict[str, Callable[[Member], Awaitable[object]]] = {
    "send": lambda one: one.send("n", b""),
    "send_many": lambda one: one.send_many("n", [b""]),
    "request": lambda one: one.request("n", b""),
    "own": lambda one: one.own("n"),
    "allow": lambda one: one.allow("t"),
    "subscribe": lambda one: one.subscribe("t").__aenter__(),
    "serve": lambda one: one.serve(lambda _: b""),
    "monitor": lambda one: one.monitor().start(),
}


@pytest.mark.parametrize("call", OUTSIDE.values(), ids=OUTSIDE)
async def test_d20_outside_of_the_bus_nothing_waits(
    agent: NodeProcess, call: Callable[[Member], Awaitable[object]]
) -> None:
    """Before a bus is entered a call says that, after it was left it is Cancelled."""
    async with hosting(agent) as host:
        bus = await host.create()
        member = afbus.join(PATH, node=agent.place)
        with pytest.raises(afbus.AfbusError, match="not on the bus yet"):
            await call(member)
        async with member:
            with pytest.raises(afbus.AfbusError, match="entered once"):
                await member.__aenter__()
        with pytest.raises(afbus.Cancelled):
            await call(member)
        await bus.__aexit__(None, None, None)
        with pytest.raises(afbus.Cancelled):
            await bus.evict("n")
