"""Subscriptions, notices and monitors in an event loop, on a real agent."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tests.client.host import MASTER, PATH, hosting, read

import afbus
from afbus.proto.address import BusAddress
from afbus.proto.match import Overflow
from afbus.proto.notice import Event, Gap, GapReason
from afbus.proto.request import RequestKind
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from tests.client.conftest import NodeProcess

    from afbus import Question
    from afbus.client.question import Verdict


pytestmark = pytest.mark.cluster


async def test_r15_subscription_is_in_force_when_it_is_entered(agent: NodeProcess) -> None:
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


async def test_r14_r16_raw_bits(agent: NodeProcess) -> None:
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


async def test_d9_sending_is_asked_for_once(agent: NodeProcess) -> None:
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


async def test_d12_slow_feed_accounts_for_every_message(agent: NodeProcess) -> None:
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


async def test_d15_notices_of_others_need_a_grant(agent: NodeProcess) -> None:
    """Who watches reads who came and went; the master reads it anyway."""
    async with hosting(agent) as host:
        bus = await host.create()
        watcher = await host.join()
        notices = watcher.notices()
        async with asyncio.TaskGroup() as group:
            await notices.start()
            first = group.create_task(anext(notices))
            async with afbus.join(PATH, node=agent.place) as visitor:
                pass
        second = await anext(notices)
        assert (first.result().event, second.event) == (Event.JOINED, Event.LEFT)
        assert first.result().subject == second.subject == (visitor.address.address,)
        events = [(await anext(bus.notices())).event for _ in range(3)]
        assert events == [Event.JOINED, Event.JOINED, Event.LEFT]
        assert len(bus.members()) == 1


async def test_d19_monitor_needs_a_grant(agent: NodeProcess) -> None:
    """By default nobody gets it; who has it reads copies of everything."""
    async with hosting(agent) as host:
        await host.create(lambda _: True)
        spy, one, two = await host.join(), await host.join(), await host.join("t")
        copies = spy.monitor()
        async with asyncio.TaskGroup() as group:
            await copies.start()
            first = group.create_task(anext(copies))
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


async def test_d12_conflating_feed_has_the_newest_and_holds_up_nobody(agent: NodeProcess) -> None:
    """Whoever reads late reads the newest of each sender about each thing, and nothing older."""
    async with hosting(agent) as host:
        await host.create()
        one, two, me = await host.join(), await host.join(), await host.join()
        async with (
            me.subscribe("t", overflow=Overflow.CONFLATE) as newest,
            me.subscribe("u") as all_,
        ):
            for number in range(900):
                await one.publish("t k=1", b"%d" % number)
                await one.publish("u", b"%d" % number)
            await one.publish("t k=2", b"other")
            await two.publish("t k=1", b"another")
            await two.publish("u", b"end")
            assert len(await read(901, all_)) == 901
            items = await read(3, newest)
            assert [item.body for item in items] == [b"899", b"other", b"another"]
            await one.publish("t k=1", b"next")
            assert [item.body for item in await read(1, newest)] == [b"next"]


async def test_d12_who_is_cut_off_is_told_and_comes_back(agent: NodeProcess) -> None:
    """A gap of its own reason, a notice that says why, and then it is a new member by its names."""
    async with hosting(agent) as host:
        bus = await host.create()
        source, slow = await host.join(), await host.join("slow")
        before = slow.address
        notices = slow.notices(others=False)
        async with slow.subscribe("t", overflow=Overflow.DISCONNECT, limit=10) as feed:
            while len(bus.members()) == 2:
                await source.publish("t", bytes(10_000))
            numbers = []
            while isinstance(item := await anext(feed), afbus.Message):
                numbers.append(item.sequence)
            assert len(numbers) >= 10
            assert numbers == [*range(numbers[0], numbers[0] + len(numbers))]
            assert isinstance(item, Gap)
            assert (item.reason, item.is_counted) == (GapReason.EVICTED, False)
            notice = await anext(notices)
            assert (notice.event, notice.subject) == (Event.EVICTED, (before.address, b"slow"))
            assert "its ring was full" in notice.reason
            await slow.send("slow", b"back")
            assert slow.address != before
            assert slow.addresses == (slow.address, BusAddress(PATH, "slow"))
            await source.publish("t", b"again")
            item = await anext(feed)
            assert isinstance(item, afbus.Message)
            assert item.body == b"again"


async def test_d12_who_is_cut_off_and_not_let_in_again_has_left(agent: NodeProcess) -> None:
    """Everything that it does ends in the refusal of the master."""
    is_full = asyncio.Event()

    def authorize(question: Question) -> Verdict:
        return question.kind is not RequestKind.JOIN or not is_full.is_set() or "not again"

    async def drain(feed: afbus.Subscription) -> None:
        async for _ in feed:
            pass

    async with hosting(agent) as host:
        bus = await host.create(authorize)
        source, slow = await host.join(), await host.join()
        is_full.set()
        async with slow.subscribe("t", overflow=Overflow.DISCONNECT, limit=10) as feed:
            while len(bus.members()) == 2:
                await source.publish("t", bytes(10_000))
            with pytest.raises(afbus.Denied, match="not again"):
                await drain(feed)
            with pytest.raises(afbus.Denied, match="not again"):
                await slow.send(MASTER, b"")
        assert slow.closed


async def test_d15_what_a_member_gives_up_itself_is_no_news(agent: NodeProcess) -> None:
    """Neither a name that it releases nor a subscription that it leaves; what others take is."""
    async with hosting(agent) as host:
        bus = await host.create()
        me = await host.join("n")
        notices = me.notices(others=False)
        async with me.subscribe("t"), me.subscribe(bytes([1, *bytes(63)])), me.subscribe("u"):
            await bus.revoke_match("n", "u")
        await me.release("n")
        await me.own("m")
        await bus.revoke("m")
        revoked = [await anext(notices) for _ in range(2)]
        assert [(one.subject, dict(one.detail)) for one in revoked] == [
            ((), {"match": "u"}),
            ((b"m",), {}),
        ]


async def test_d16_leaving_without_a_master_is_quiet(
    agent: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """A subscription that nobody can take back is no reason to worry anybody."""
    async with hosting(agent) as host:
        bus = await host.create()
        me = await host.join()
        async with me.subscribe("t"):
            await bus.__aexit__(None, None, None)
    assert caplog.messages == []
