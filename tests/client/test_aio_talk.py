"""Messages and requests in an event loop, on a real agent."""

from __future__ import annotations

import asyncio
import errno
import os
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from tests.client.host import MASTER, PATH, cancelled, fails, hosting, read

import afbus
from afbus.proto.address import BusAddress
from afbus.proto.names import NameOutcome
from afbus.proto.notice import Event

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from tests.client.conftest import NodeProcess

    from afbus import Member, Message, Notice


pytestmark = pytest.mark.cluster


async def test_d21_request_gets_its_reply(agent: NodeProcess) -> None:
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


async def test_d21_failure_of_a_service_is_a_typed_error(agent: NodeProcess) -> None:
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


async def test_d21_request_without_a_reply_ends(agent: NodeProcess) -> None:
    """By the deadline; by the end of the service; by the end of whoever was asked."""
    async with hosting(agent) as host:
        await host.create()
        me = await host.join()
        async with afbus.join(PATH, name="s", node=agent.place) as service:
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


async def test_d7_names_that_nobody_owns_are_the_masters(agent: NodeProcess) -> None:
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


async def test_d12_full_receiver_holds_its_senders_up(agent: NodeProcess) -> None:
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


async def test_d12_d20_unread_inbox_holds_nobody_up(
    agent: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Who has never read messages still hears; senders learn what is given back to them."""
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
        told = await count_unread(sender, 476)
        assert {(notice.subject, notice.reason) for notice in told} == {
            ((me.address.address, b"m"), "nobody there reads messages")
        }
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
    (line,) = caplog.messages
    assert line.startswith("nobody there reads messages: given back to /demo:1.1")


async def count_unread(sender: Member, count: int) -> list[Notice]:
    """The notices that tell a sender of so many unread messages, none of them twice."""
    notices: list[Notice] = []
    while sum(int(notice.detail["count"]) for notice in notices) < count:
        notices.append(await anext(sender.notices(others=False)))
        assert notices[-1].event is Event.UNREAD
    assert sum(int(notice.detail["count"]) for notice in notices) == count
    ranges = sorted((int(one.detail["first"]), int(one.detail["last"])) for one in notices)
    assert all(last < first for (_, last), (first, _) in pairwise(ranges))
    return notices


@pytest.mark.parametrize("reads", [True, False])
async def test_d20_leaving_tells_of_all_that_was_not_read(agent: NodeProcess, reads: bool) -> None:
    """Whether it lies in the ring or was taken from it; each sender of its own."""
    async with hosting(agent) as host:
        await host.create(order="total")  # so that as many of one are read as of the other
        one, two = await host.join(), await host.join()
        async with afbus.join(PATH, name="r", node=agent.place) as receiver:
            inbox = receiver.messages() if reads else None
            for number in range(900):
                await one.send("r", b"%d" % number)
                await two.send("r", b"%d" % number)
            for _ in range(100 * reads):
                assert inbox is not None
                await anext(inbox)
        for sender in (one, two):
            await count_unread(sender, 900 - 50 * reads)


async def test_replies_get_through_to_a_full_inbox(agent: NodeProcess) -> None:
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


async def test_d14_r20_descriptors_and_large_bodies_travel(agent: NodeProcess) -> None:
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


async def test_r13_source_is_chosen(agent: NodeProcess) -> None:
    """By name or by address; one that is not owned is EADDRNOTAVAIL."""
    async with hosting(agent) as host:
        await host.create()
        me = await host.join("m")
        await me.send("m", b"", source="m")
        assert (await anext(me.messages())).source == BusAddress(PATH, "m")
        with pytest.raises(afbus.NotOwned):
            await me.send("m", b"", source=MASTER)


async def test_send_many_keeps_order(agent: NodeProcess) -> None:
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


async def test_cancelled_waits_lose_nothing(agent: NodeProcess) -> None:
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


async def test_d20_leaving_delivers_what_was_sent(agent: NodeProcess) -> None:
    """What a member sent before it left is read afterwards."""
    async with hosting(agent) as host:
        await host.create()
        receiver = await host.join("r")
        async with afbus.join(PATH, node=agent.place) as sender:
            for number in range(100):
                await sender.send("r", b"%d" % number)
        inbox = receiver.messages()
        assert [(await anext(inbox)).body for _ in range(100)] == [b"%d" % n for n in range(100)]


async def test_d7_d20_master_gives_back_what_is_for_nobody(
    agent: NodeProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Senders are told of every message, who asks of every request; the log has one line."""
    async with hosting(agent) as host:
        await host.create()
        me = await host.join()
        for number in range(1500):
            await me.send("nobody", b"%d" % number)
        with pytest.raises(afbus.NoSuchEndpoint, match="nobody owns /demo:nobody"):
            await me.request("nobody", b"")
        told = await count_unread(me, 1500)
        assert {(notice.subject, notice.reason) for notice in told} == {
            ((MASTER.encode(),), "nobody owns /demo:nobody")
        }
        assert await me.own("n") is NameOutcome.PRIMARY_OWNER
    (line,) = caplog.messages
    assert line.startswith(f"nobody owns /demo:nobody: given back to {me.addresses[0]}")


async def test_r15_subscription_that_was_given_up_early_is_taken_back(agent: NodeProcess) -> None:
    """The master hears of it although nobody waits for its answer any more."""
    async with hosting(agent) as host:
        await host.create()
        me = await host.join()

        async def visit() -> None:
            async with me.subscribe("t"):
                pass

        for turns in range(1, 12):
            await cancelled(visit(), turns)
        await me.own("n")
        with afbus.socket(node=agent.place) as sock:
            assert sock.listing("matches", PATH) == []
