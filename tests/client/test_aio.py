"""Buses and members in an event loop, on a real agent."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

import afbus
from afbus.proto.address import BusAddress
from afbus.proto.match import Overflow
from afbus.proto.names import NameFlags, NameOutcome, ReleaseOutcome
from afbus.proto.notice import Event, Gap, GapReason
from afbus.proto.request import RequestKind
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from afbus import Bus, Member, Message, Question
    from afbus.client.authority import Verdict

pytestmark = pytest.mark.cluster

PATH = "/demo"
MASTER = "demo.master"

AGENT = """
import asyncio, sys
from pathlib import Path
from afbus.node.agent import run
from afbus.node.config import Config

asyncio.run(run(Config(door=Path(sys.argv[1])), lambda: print("ready", flush=True)))
"""


class Agent:
    """An agent in a process of its own, at a door of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.door = folder / "node.sock"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it lets clients in."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", AGENT, str(self.door)], stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        """Let it die without a word."""
        self.process.kill()
        self.wait()

    def forget(self) -> None:
        """Remove what a new agent would know of the old one."""
        for path in self.folder.iterdir():
            path.unlink()

    def stop(self) -> None:
        """Stop it in good order."""
        self.process.terminate()
        self.wait()

    def wait(self) -> None:
        """Wait for its end."""
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    """An agent that stops with the test."""
    made = Agent(tmp_path)
    yield made
    made.stop()


class Host:
    """A bus on an agent, and as many members as a test wants."""

    def __init__(self, door: Path, stack: AsyncExitStack) -> None:
        self.door = door
        self.stack = stack

    async def create(
        self, authorize: Callable[[Question], Verdict | Awaitable[Verdict]] | None = None
    ) -> Bus:
        """Create the bus."""
        bus = afbus.create(PATH, MASTER, authorize=authorize, node=self.door)
        return await self.stack.enter_async_context(bus)

    async def join(self, name: str | None = None, **options: Any) -> Member:
        """Join it."""
        member = afbus.join(PATH, name=name, node=self.door, **options)
        return await self.stack.enter_async_context(member)


@asynccontextmanager
async def hosting(agent: Agent) -> AsyncIterator[Host]:
    """A host for one test, which leaves neither tasks nor descriptors behind."""
    descriptors = len(os.listdir("/proc/self/fd"))
    async with AsyncExitStack() as stack:
        yield Host(agent.door, stack)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def until(is_so: Callable[[], bool]) -> None:
    """Let the loop run until something is so."""
    while not is_so():  # noqa: ASYNC110 (what is waited for has no event of its own)
        await asyncio.sleep(0)


async def test_ten_lines_of_the_readme(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example works as it stands there, all in one event loop."""
    monkeypatch.setenv("AFBUS_NODE", str(agent.door))
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


async def test_r10_r11_members_have_addresses(agent: Agent) -> None:
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
async def test_r11_d7_who_is_refused_is_told_why(agent: Agent, how: str) -> None:
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


async def test_d7_joining_what_is_not_there(agent: Agent, tmp_path: Path) -> None:
    """No agent is ECONNREFUSED, no bus ENOENT, a taken one EADDRINUSE, no master EHOSTDOWN."""
    async with hosting(agent) as host:
        with pytest.raises(afbus.NoAgent):
            await afbus.join(PATH, node=tmp_path / "nobody").__aenter__()
        with pytest.raises(afbus.NoBus):
            await host.join()
        async with afbus.create(PATH, MASTER, node=agent.door):
            await host.join("n")
            with pytest.raises(afbus.AddressInUse):
                await host.create()
            with pytest.raises(afbus.AddressInUse):
                await host.join("n")
        with pytest.raises(afbus.MasterLost):
            await host.join()


async def test_error_of_the_body_is_raised_as_it_is(agent: Agent) -> None:
    """Not within a group of exceptions, and everything is closed."""
    async with hosting(agent):
        bus = afbus.create(PATH, MASTER, node=agent.door)
        member = afbus.join(PATH, node=agent.door)

        async def fail() -> None:
            async with bus, member:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        assert bus.closed
        assert member.closed
        with pytest.raises(afbus.Cancelled):
            await member.send(MASTER, b"")


async def test_d4_names_wait_and_move(agent: Agent) -> None:
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


async def test_d21_request_gets_its_reply(agent: Agent) -> None:
    """From the address that was asked, whether the answer is a value, awaited, or by hand."""

    def answer(message: Message) -> bytes | Awaitable[bytes | None] | None:
        if message.body == b"nothing":
            return None
        return echo(message) if message.body.startswith(b"later") else message.body

    async def echo(message: Message) -> bytes:
        await asyncio.sleep(0)
        return message.body

    async with hosting(agent) as host:
        await host.create()
        service, me = await host.join("s"), await host.join()
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(service.serve(answer, concurrency=3))
            bodies = [b"now"] + [b"later %d" % number for number in range(200)]
            replies = await asyncio.gather(*(me.request("s", body) for body in bodies))
            assert [reply.body for reply in replies] == bodies
            assert {str(reply.source) for reply in replies} == {"/demo:s"}
            assert (await me.request("s", b"nothing")).body == b""
            await me.send("s", b"no question")
            assert (await anext(service.messages())).body == b"no question"
            with pytest.raises(afbus.AfbusError):
                await service.serve(answer)
            serving.cancel()
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(me.request("s", b"by hand"))
            message = await anext(service.messages())
            assert message.expects_reply
            await service.reply(message, [b"with ", b"care"])
            assert (await asking).body == b"with care"
        with pytest.raises(afbus.AfbusError):
            await me.reply(asking.result(), b"a reply to a reply")


async def test_d21_failure_of_a_service_is_a_typed_error(agent: Agent) -> None:
    """Its own errors arrive as they are, others as EIO; the service goes on."""

    def answer(message: Message) -> bytes:
        match message.body:
            case b"denied":
                raise afbus.Denied("not for you")
            case b"broken":
                raise ValueError(message.body)
        return b"fine"

    async with hosting(agent) as host:
        await host.create()
        service, me = await host.join("s"), await host.join()
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(service.serve(answer))
            with pytest.raises(afbus.Denied, match="not for you"):
                await me.request("s", b"denied")
            with pytest.raises(afbus.BusError, match="ValueError") as failure:
                await me.request("s", b"broken")
            assert failure.value.errno == errno.EIO
            assert (await me.request("s", b"")).body == b"fine"
            serving.cancel()


async def test_d21_request_without_a_reply_ends(agent: Agent) -> None:
    """By the deadline; by the end of the service; by the end of whoever was asked."""
    async with hosting(agent) as host:
        await host.create()
        me = await host.join()
        async with afbus.join(PATH, name="s", node=agent.door) as service:
            with pytest.raises(afbus.DeadlineExceeded):
                await me.request("s", b"", deadline=0.01)
            (await anext(service.messages())).close()
            async with asyncio.TaskGroup() as group:
                started = asyncio.Event()

                async def answer(_: Message) -> bytes:
                    started.set()
                    await asyncio.Event().wait()
                    return b""

                serving = group.create_task(service.serve(answer, concurrency=1))
                one = group.create_task(fails(me.request("s", b"1"), afbus.Cancelled))
                two = group.create_task(fails(me.request("s", b"2"), afbus.Cancelled))
                await started.wait()
                serving.cancel()
            assert one.result() == two.result() == "the service has ended"
            async with asyncio.TaskGroup() as group:
                group.create_task(fails(me.request("s", b"3"), afbus.NoSuchEndpoint))
                await anext(service.messages())
                await service.__aexit__(None, None, None)
        with pytest.raises(afbus.NoSuchEndpoint):
            await me.request(service.address, b"")
        for deadline in (0, -1, 1e9):
            with pytest.raises(afbus.InvalidArgument):
                await me.request("s", b"", deadline=deadline)


async def fails(call: Awaitable[object], kind: type[afbus.BusError]) -> str:
    """The text of the error by which a call must fail."""
    with pytest.raises(kind) as failure:
        await call
    return failure.value.message


async def test_d7_names_that_nobody_owns_are_the_masters(agent: Agent) -> None:
    """It refuses requests to them, unless the application reads what the master gets."""
    async with hosting(agent) as host:
        bus = await host.create()
        me = await host.join()
        with pytest.raises(afbus.NoSuchEndpoint, match="nobody owns /demo:nobody"):
            await me.request("nobody", b"")
        inbox = bus.messages()
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(me.request("nobody", b"are you there?"))
            message = await anext(inbox)
            assert message.destination == BusAddress(PATH, "nobody")
            await bus.reply(message, b"in its place")
        assert asking.result().body == b"in its place"
        assert asking.result().source == bus.address


@pytest.mark.parametrize("body", [b"", b"\xc1", b"hello", b"\x91\x63", b"\x93\x02\xc4\x00\x00"])
async def test_r1_garbage_to_the_master_is_einval(agent: Agent, body: bytes) -> None:
    """What is no request is refused with a reason, and the bus goes on."""
    async with hosting(agent) as host:
        await host.create()
        me = await host.join()
        with pytest.raises(afbus.InvalidArgument, match="the master does not understand"):
            await me.request(MASTER, body)
        await me.send(MASTER, body)
        assert await me.own("n") is NameOutcome.PRIMARY_OWNER


async def test_r15_subscription_is_in_force_when_it_is_entered(agent: Agent) -> None:
    """Each feed hears what it asked for, from then on until it is left."""
    async with hosting(agent) as host:
        await host.create()
        source, me = await host.join(), await host.join()
        await source.publish("a.b k=1", b"before")
        async with (
            me.subscribe("a") as wide,
            me.subscribe("a.b k=1") as narrow,
            me.subscribe("a.b k=1") as same,
            me.subscribe(Terms.of("c")) as other,
        ):
            await source.publish("a.b k=1", b"both")
            await source.publish("a", [b"wi", b"de"])
            await source.publish(Terms.of("c"), b"other")
            assert [(await anext(wide)).body for _ in range(2)] == [b"both", b"wide"]  # type: ignore[union-attr]  # no gaps here
            assert [item.body for item in await read(1, narrow)] == [b"both"]
            assert [item.body for item in await read(1, same)] == [b"both"]
            assert [item.body for item in await read(1, other)] == [b"other"]
            with pytest.raises(afbus.InvalidArgument):
                await me.subscribe("a", overflow=Overflow.CONFLATE).__aenter__()
        with pytest.raises(StopAsyncIteration):
            await anext(wide)
        async with me.subscribe("a") as again:
            await source.publish("a.b k=1", b"again")
            assert [item.body for item in await read(1, again)] == [b"again"]


async def read(count: int, stream: AsyncIterator[Message | Gap]) -> list[Message]:
    """So many messages, without a gap."""
    items = [await anext(stream) for _ in range(count)]
    return [item for item in items if isinstance(item, afbus.Message)]


async def test_r14_r16_raw_bits(agent: Agent) -> None:
    """`(sent & granted) == granted`; other widths are EDOM, and no bits at all are refused."""
    async with hosting(agent) as host:
        await host.create()
        me = await host.join()
        one, two = bytes([1, *bytes(63)]), bytes([2, *bytes(63)])
        both = bytes([3, *bytes(63)])
        async with me.subscribe(one) as ones, me.subscribe(both) as boths:
            await me.publish(both, b"both")
            await me.publish(two, b"two")
            await me.publish(one, b"one")
            assert [item.body for item in await read(2, ones)] == [b"both", b"one"]
            assert [item.body for item in await read(1, boths)] == [b"both"]
        with pytest.raises(afbus.WidthMismatch):
            await me.subscribe(bytes([1, *bytes(127)])).__aenter__()
        with pytest.raises(afbus.Denied):
            await me.subscribe(bytes(64)).__aenter__()
        with pytest.raises(afbus.Denied):
            await me.subscribe("").__aenter__()
        with pytest.raises(afbus.InvalidArgument):
            me.subscribe(b"text")


async def test_d9_sending_is_asked_for_once(agent: Agent) -> None:
    """A right covers all that has its terms; when it is revoked the next one is refused."""
    asked: list[Question] = []

    def authorize(question: Question) -> Verdict:
        asked.append(question)
        return question.kind is not RequestKind.PUBLISH or len(asked) < 4

    async with hosting(agent) as host:
        bus = await host.create(authorize)
        me = await host.join()
        await me.allow("a")
        await me.publish("a.b", b"")
        await me.publish("a.c k=1", b"")
        assert [question.kind for question in asked] == [RequestKind.JOIN, RequestKind.PUBLISH]
        await bus.revoke_send(me.address, "a")
        await me.own("n")
        with pytest.raises(afbus.Denied):
            await me.publish("a.b", b"")
        with pytest.raises(afbus.Denied):
            await me.publish("b", b"")


async def test_d12_slow_feed_accounts_for_every_message(agent: Agent) -> None:
    """Its gaps and its messages are all that was sent; the other feed has missed nothing."""
    count = 500
    async with hosting(agent) as host:
        await host.create()
        source, me = await host.join(), await host.join()
        async with me.subscribe("t", limit=10) as slow, me.subscribe("t k=1", limit=count) as quick:
            for number in range(count):
                await source.publish("t k=1", b"%d" % number)
            messages = await read(count, quick)
            assert [item.body for item in messages] == [b"%d" % number for number in range(count)]
            await source.publish("t", b"end")
            known = messages[0].sequence - 1
            seen = 0
            async for item in slow:
                if isinstance(item, Gap):
                    assert (item.reason, item.source) == (GapReason.FULL, source.address.address)
                    assert item.first > known
                    seen += item.count
                    known = item.last
                else:
                    assert item.sequence > known
                    seen += 1
                    known = item.sequence
                    if item.body == b"end":
                        break
            assert seen == count + 1


async def test_d12_full_receiver_holds_its_senders_up(agent: Agent) -> None:
    """A send waits for room until its deadline; nothing is lost, and the order holds."""
    body = bytes(8000)
    async with hosting(agent) as host:
        await host.create()
        sender, receiver = await host.join(), await host.join("r")
        inbox = receiver.messages()
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                await sender.send("r", body, deadline=0.05)
                sent += 1

        await fails(flood(), afbus.DeadlineExceeded)
        assert sent > 0
        numbers = [(await anext(inbox)).sequence for _ in range(sent)]
        assert numbers == list(range(2, sent + 2))
        await sender.send("r", b"room again")
        assert (await anext(inbox)).body == b"room again"


async def test_d12_unread_inbox_holds_nobody_up(agent: Agent) -> None:
    """Who has never read messages still hears; whoever begins to is told what is missing."""
    async with hosting(agent) as host:
        await host.create()
        sender, me = await host.join(), await host.join("m")
        async with me.subscribe("t") as feed:
            for _ in range(1500):
                await sender.send("m", b"unread")
            await sender.publish("t", b"heard")
            assert [item.body for item in await read(1, feed)] == [b"heard"]
        with pytest.raises(afbus.MessagesLost):
            await sender.request("m", b"")
        inbox = me.messages()
        seen = 0

        async def drain() -> None:
            nonlocal seen
            async for _ in inbox:
                seen += 1

        assert "477 messages" in await fails(drain(), afbus.MessagesLost)
        assert seen == 1024
        await sender.send("m", b"read")
        assert (await anext(inbox)).body == b"read"


async def test_replies_get_through_to_a_full_inbox(agent: Agent) -> None:
    """A member with messages to read can ask all the same: no deadlock."""
    async with hosting(agent) as host:
        await host.create()
        flood, me, service = await host.join(), await host.join("m"), await host.join("s")
        inbox = me.messages()
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(service.serve(lambda message: message.body))
            for number in range(1100):
                await flood.send("m", b"%d" % number)
            for number in range(1100):
                message = await anext(inbox)
                assert message.body == b"%d" % number
                if number % 100 == 0:
                    assert (await me.request("s", b"?")).body == b"?"
            serving.cancel()


async def test_d14_r20_descriptors_and_large_bodies_travel(agent: Agent) -> None:
    """A file arrives as a file; megabytes arrive whole."""
    async with hosting(agent) as host:
        await host.create()
        sender, receiver = await host.join(), await host.join("r")
        inbox = receiver.messages()
        file = afbus.sealed_memfd([b"in a file"])
        try:
            await sender.send("r", b"", fds=[file])
        finally:
            os.close(file)
        with await anext(inbox) as message:
            assert os.pread(message.fds[0], 100, 0) == b"in a file"
        body = os.urandom(3 << 20)
        await sender.send("r", body)
        assert (await anext(inbox)).body == body


async def test_r13_source_is_chosen(agent: Agent) -> None:
    """By name or by address; one that is not owned is EADDRNOTAVAIL."""
    async with hosting(agent) as host:
        await host.create()
        me = await host.join("m")
        await me.send("m", b"", source="m")
        assert (await anext(me.messages())).source == BusAddress(PATH, "m")
        with pytest.raises(afbus.NotOwned):
            await me.send("m", b"", source=MASTER)


async def test_send_many_keeps_order(agent: Agent) -> None:
    """All are accepted, more than a ring holds."""
    count = 5000
    async with hosting(agent) as host:
        await host.create()
        sender, receiver = await host.join(), await host.join("r")
        inbox = receiver.messages()
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(
                sender.send_many("r", [b"%d" % number for number in range(count)])
            )
            for number in range(count):
                assert (await anext(inbox)).body == b"%d" % number
        assert sending.result() == count
        with pytest.raises(afbus.NoSuchEndpoint):
            await sender.send_many("1.99", [b"", b""])


async def test_d15_notices_of_others_need_a_grant(agent: Agent) -> None:
    """Who watches reads who came and went; the master reads it anyway."""
    async with hosting(agent) as host:
        bus = await host.create()
        watcher = await host.join()
        notices = watcher.notices()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(anext(notices))
            await until(lambda: watcher.notices().begin is None)
            async with afbus.join(PATH, node=agent.door) as visitor:
                pass
        second = await anext(notices)
        assert (first.result().event, second.event) == (Event.JOINED, Event.LEFT)
        assert first.result().subject == second.subject == (visitor.address.address,)
        events = [(await anext(bus.notices())).event for _ in range(3)]
        assert events == [Event.JOINED, Event.JOINED, Event.LEFT]
        assert len(bus.members()) == 1


async def test_d19_monitor_needs_a_grant(agent: Agent) -> None:
    """By default nobody gets it; who has it reads copies of everything."""
    async with hosting(agent) as host:
        await host.create(lambda _: True)
        spy, one, two = await host.join(), await host.join(), await host.join("t")
        copies = spy.monitor()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(anext(copies))
            await until(lambda: spy.monitor().begin is None)
            await one.send("t", b"secret")
        copy = first.result()
        while isinstance(copy, afbus.Message) and copy.body != b"secret":
            # What the master said before is copied too.
            copy = await anext(copies)
        assert isinstance(copy, afbus.Message)
        assert copy.is_copy
        assert copy.destination == BusAddress(PATH, "t")
        assert (await anext(two.messages())).body == b"secret"
    async with hosting(agent) as host:
        await host.create()
        spy = await host.join()
        with pytest.raises(afbus.Denied):
            await anext(spy.monitor())


async def test_d5_master_revokes_and_evicts(agent: Agent) -> None:
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


async def test_cancelled_waits_lose_nothing(agent: Agent) -> None:
    """Reading, asking and subscribing may be cancelled anywhere, and done again."""
    async with hosting(agent) as host:
        await host.create()
        me, service = await host.join(), await host.join("s")
        inbox = service.messages()
        async with me.subscribe("t") as feed:
            for _ in range(20):
                await cancelled(anext(feed))
                await cancelled(anext(inbox))
            await me.publish("t", b"heard")
            assert [item.body for item in await read(1, feed)] == [b"heard"]
        for turns in range(1, 12):
            await cancelled(me.request("s", b"q"), turns)
            await cancelled(me.subscribe("t").__aenter__(), turns)
            await cancelled(me.own("n"), turns)
        async with me.subscribe("t") as feed:
            await me.publish("t", b"again")
            assert [item.body for item in await read(1, feed)] == [b"again"]
        assert await me.own("n") in (NameOutcome.ALREADY_OWNER, NameOutcome.PRIMARY_OWNER)


async def cancelled(call: Awaitable[object], turns: int = 1) -> None:
    """Begin a call, and cancel it after so many turns of the loop if it is not done."""

    async def wait() -> None:
        await call

    async with asyncio.TaskGroup() as group:
        task = group.create_task(wait())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()


async def test_d16_new_master_goes_on_with_the_bus(agent: Agent) -> None:
    """Members stay, the traffic among them goes on, and addresses are not given again."""
    async with hosting(agent) as host:
        async with afbus.create(PATH, MASTER, node=agent.door):
            for _ in range(9):
                async with afbus.join(PATH, node=agent.door):
                    pass
            one, two = await host.join("n"), await host.join()
        with pytest.raises(afbus.MasterLost):
            await one.own("m")
        await two.send("n", b"still here")
        assert (await anext(one.messages())).body == b"still here"
        other = afbus.create(PATH, "demo.other", node=agent.door)
        bus = await host.stack.enter_async_context(other)
        assert {view.address for view in bus.members()} == {one.address, two.address}
        events = [(await anext(one.notices(others=False))).event for _ in range(2)]
        assert events == [Event.MASTER_LOST, Event.MASTER_BACK]
        assert await two.own("n") is NameOutcome.IN_QUEUE
        assert await one.own("m") is NameOutcome.PRIMARY_OWNER
        three = await host.join()
        assert int(three.address.address[2:]) > int(two.address.address[2:])


@pytest.mark.parametrize("remembers", [True, False])
async def test_d16_d21_members_survive_their_agent(agent: Agent, remembers: bool) -> None:
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
            agent.kill()
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


async def test_d20_leaving_delivers_what_was_sent(agent: Agent) -> None:
    """What a member sent before it left is read afterwards."""
    async with hosting(agent) as host:
        await host.create()
        receiver = await host.join("r")
        async with afbus.join(PATH, node=agent.door) as sender:
            for number in range(100):
                await sender.send("r", b"%d" % number)
        inbox = receiver.messages()
        assert [(await anext(inbox)).body for _ in range(100)] == [b"%d" % n for n in range(100)]
