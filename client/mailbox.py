"""One endpoint in an event loop: sends, asks, answers, and sorts what arrives.

`Member` and `Bus` stand on it. A socket call that waits for the agent and for nobody else is made
where it is due; those that connect, join or close go through a thread. Nothing here ever waits for
a peer but by `await`.

What arrives is sorted into backlogs that are read by `async for`. A backlog of somebody who reads
is never cut: when it is full the ring is not read any more, so that senders are held up as D12
says. Replies get through all the same: while a request is open the ring is read on, to at most
`_OVERDRAFT` times the limit. What nobody reads at all holds up nobody: it is kept up to the limit,
and whoever begins to read is told by MessagesLost how much is missing.

When the agent dies, requests that are open end in OutcomeUnknown; sends wait for the next agent,
within their deadline, because nothing of them was accepted.

Invariants:

1. Every wait ends with a result, a `BusError`, or at its deadline.
2. Cancelling a call at any `await` leaves everything as if it had not waited: nothing that has
   arrived is lost, and no request number is left behind.
3. All calls are made in the thread of one event loop.
"""

from __future__ import annotations

import array
import asyncio
import inspect
import logging
import secrets
import socket as _socket
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from ..proto import control
from ..proto.address import BusAddress
from ..proto.control import (
    BUS_SOCKET,
    SO_BUS_DETAILS,
    Deadline,
    Item,
    OwnedAddr,
    ReplyTo,
    RevokeAddr,
    Serial,
    SourceAddr,
)
from ..proto.errors import (
    AfbusError,
    BusError,
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    LocalProtocolError,
    MessagesLost,
    NoAgent,
    NoSuchEndpoint,
    NotConnected,
    OutcomeUnknown,
    RemoteProtocolError,
    RingFull,
    ShareExceeded,
)
from ..proto.limits import (
    CONTROL_ITEM_BYTES,
    CONTROL_ITEMS,
    DEADLINE_MS_MAX,
    MESSAGE_BYTES,
    REASON_BYTES,
)
from ..proto.notice import Gap, Notice
from ..proto.text import clip
from .backlog import Backlog
from .message import Arrival, Message, NoReply, read
from .socket import Socket
from .stream import BACKLOG_LIMIT, Stream, UnreadNotices, within

if TYPE_CHECKING:
    import os
    from collections.abc import (
        Awaitable,
        Callable,
        Coroutine,
        Iterable,
        Iterator,
        Sequence,
    )
    from types import TracebackType

    from typing_extensions import Buffer

    from .socket import AncillaryItem

_log = logging.getLogger(__name__)

#: How long a call waits if nothing else is said, in seconds.
DEADLINE_S: Final = 5.0
#: Requests that `serve` works on at a time.
CONCURRENCY: Final = 64

# How far a backlog may grow beyond its limit while a reply is waited for, as a factor.
_OVERDRAFT: Final = 8
# Messages read in one turn of the loop, and sent without giving the loop a turn.
_BATCH: Final = 64
_ALL_ITEMS: Final = CONTROL_ITEMS * (CONTROL_ITEM_BYTES + 32)
# Pauses between attempts where nothing tells when to try again, in seconds: first, and longest.
_FIRST_PAUSE_S: Final = 0.002
_LONGEST_PAUSE_S: Final = 0.25

#: Whom a message is sent to: a name, an address within the bus, or a whole address.
To = str | bytes | BusAddress


class _OpenRequest:
    """A request of ours, until it is answered."""

    def __init__(self, serial: int, milliseconds: int) -> None:
        self.ancdata: list[AncillaryItem] = [
            control.encode(Serial(serial)),
            control.encode(Deadline(milliseconds)),
        ]
        self._reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        #: Whether it was accepted: from then on it may have been carried out.
        self.is_accepted = False

    async def wait(self) -> Message:
        """Return the reply, now that the request was accepted."""
        self.is_accepted = True
        return await self._reply

    def answer(self, message: Message) -> bool:
        """Take the reply; tell whether it was waited for."""
        if self._reply.done():
            return False
        self._reply.set_result(message)
        return True

    def fail(self, error: BusError) -> None:
        """Take the news that there will be no reply."""
        if not self._reply.done():
            self._reply.set_exception(error)

    def drop(self) -> None:
        """Be done with it: an error that nobody waits for any more is no mistake."""
        if self._reply.done() and not self._reply.cancelled():
            self._reply.exception()


async def open_socket(node: str | os.PathLike[str] | None) -> Socket:
    """Return a new socket that never waits; what is cancelled meanwhile is closed."""
    opening = asyncio.get_running_loop().run_in_executor(None, lambda: Socket(node=node))
    try:
        opened = await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_late)
        raise
    opened.setblocking(False)
    return opened


def _close_late(opening: asyncio.Future[Socket]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class Mailbox:
    """What members and masters have in common; not made by itself."""

    def __init__(self, path: str | bytes, node: str | os.PathLike[str] | None) -> None:
        """Begin with nothing but the path of the bus."""
        self.path = BusAddress.kernel(path).path
        self._node = node
        self._addresses: list[BusAddress] = []
        self._is_closed = False
        self._why_closed: BusError | None = None
        self._is_reading = False
        self._ready = asyncio.Event()
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_lost = False
        self._open_requests: dict[int, _OpenRequest] = {}
        self._writers: set[asyncio.Future[None]] = set()
        self._sent = 0
        self._inbox = Backlog(BACKLOG_LIMIT)
        self._messages: Stream[Message] = Stream(lambda: self._take_message(self._inbox))
        self._requests = Backlog(BACKLOG_LIMIT, holds=True)
        self._serving: Stream[Message] | None = None
        self._notices = UnreadNotices()
        self._notice_stream: Stream[Notice] = Stream(self._notices.take)

    # what it is

    @property
    def addresses(self) -> tuple[BusAddress, ...]:
        """The owned addresses, oldest first."""
        return tuple(self._addresses)

    @property
    def closed(self) -> bool:
        """Whether it has left the bus."""
        return self._is_closed

    def fileno(self) -> int:
        """Return the descriptor of the socket below, which is not to be read from."""
        return self._socket.fileno()

    # sending

    async def send(
        self,
        to: To,
        body: Buffer | Sequence[Buffer],
        *,
        fds: Iterable[int] = (),
        source: To | None = None,
        deadline: float | None = DEADLINE_S,
    ) -> None:
        """Send a message; it is accepted when this returns (D21).

        Args:
            to: A name or an address.
            body: Bytes, or a sequence of parts; together at most 16 MiB.
            fds: At most 16 descriptors, which stay the caller's.
            source: The owned address to be known by; by default the first (R13).
            deadline: Seconds to wait for room at the receiver; None waits without end.

        Raises:
            DeadlineExceeded: The receiver had no room, or there was no agent, for so long.
                ETIMEDOUT.
            ShareExceeded: Too much of this sender lay unread for so long. EDQUOT.
            BusError: As `Socket.sendmsg`.
        """
        ancdata: list[AncillaryItem] = []
        if source is not None:
            ancdata.append(control.encode(SourceAddr(self.address_of(source))))
        await self._send(self.address_of(to), body, ancdata, fds, deadline)

    async def send_many(
        self, to: To, bodies: Sequence[Buffer], *, deadline: float | None = DEADLINE_S
    ) -> int:
        """Send messages in order; return how many were accepted.

        After a refusal nothing more is sent; it is raised if nothing was accepted.
        """
        address = self.address_of(to)
        accepted = 0
        try:
            async with within(deadline, f"sending to {address}"):
                while accepted < len(bodies):
                    batch = bodies[accepted : accepted + _BATCH]
                    send = partial(self._send_batch_now, batch, address)
                    accepted += await self._patiently(send, None, address)
                    await asyncio.sleep(0)
        except BusError:
            if accepted == 0:
                raise
        return accepted

    def _send_batch_now(self, bodies: Sequence[Buffer], address: BusAddress) -> int:
        try:
            return self._socket.sendmmsg(bodies, address)
        except (NotConnected, NoAgent) as error:
            self._lose_agent(error)
            raise

    async def request(
        self,
        to: To,
        body: Buffer | Sequence[Buffer],
        *,
        deadline: float = DEADLINE_S,
        fds: Iterable[int] = (),
    ) -> Message:
        """Send a message, and return the reply to it.

        Raises:
            NoSuchEndpoint: Nobody is there, or whoever was is gone without a reply. EHOSTUNREACH.
            DeadlineExceeded: No reply came in time. ETIMEDOUT.
            OutcomeUnknown: The agent died meanwhile. ECONNABORTED.
            BusError: As `send`; or what the other side answered as an error.
        """
        address = self.address_of(to)
        with self._open_request(deadline) as request:
            async with within(deadline, f"a reply from {address}"):
                await self._send(address, body, request.ancdata, fds, None)
                message = await request.wait()
        if message.error is not None:
            message.close()
            raise message.error
        return message

    @contextmanager
    def _open_request(self, deadline: float) -> Iterator[_OpenRequest]:
        """Return a request that can be answered within the block."""
        milliseconds = int(deadline * 1000)
        if not 1 <= milliseconds <= DEADLINE_MS_MAX:
            limits = f"0.001 to {DEADLINE_MS_MAX // 1000}"
            raise InvalidArgument(f"deadline of {deadline} s, not {limits}")
        # By chance, so that nobody else can answer; and never an errno.
        serial = secrets.randbits(63) | 1 << 63
        request = self._open_requests[serial] = _OpenRequest(serial, milliseconds)
        try:
            yield request
        finally:
            del self._open_requests[serial]
            self._pace()
            request.drop()

    async def reply(
        self,
        message: Message,
        body: Buffer | Sequence[Buffer],
        *,
        fds: Iterable[int] = (),
        deadline: float | None = DEADLINE_S,
    ) -> None:
        """Answer a request, from the address that it was sent to.

        Raises:
            LocalProtocolError: The message expects no reply.
            NoSuchEndpoint: Whoever asked is gone. EHOSTUNREACH.
            BusError: As `send`.
        """
        await self._send(message.source, body, self._reply_items(message), fds, deadline)

    async def refuse(
        self, message: Message, error: BusError, *, deadline: float | None = DEADLINE_S
    ) -> None:
        """Answer a request with an error, which its `request` raises; errors as `reply`."""
        ancdata: list[AncillaryItem] = [*self._reply_items(message), _errno_item(error)]
        await self._send(message.source, _text_of(error), ancdata, (), deadline)

    # receiving

    def messages(self) -> Stream[Message]:
        """Return what is sent to this endpoint and is neither a reply nor taken by `serve`.

        From the first call on it must be read: when it is full, senders are held up.
        """
        self._inbox.holds = True
        return self._messages

    def notices(self) -> Stream[Notice]:
        """Return the notices of the bus that this endpoint is given (D15)."""
        return self._notice_stream

    async def serve(
        self,
        answer: Callable[[Message], Buffer | Awaitable[Buffer | None] | None],
        *,
        concurrency: int = CONCURRENCY,
    ) -> None:
        """Answer requests until this is cancelled or the bus is left.

        Args:
            answer: Takes a request and returns the body of the reply (None: an empty one), or an
                awaitable of it. A `BusError` that it raises is what the asker's `request` raises;
                any other exception is logged, and the asker gets EIO. Descriptors of the request
                are closed afterwards.
            concurrency: Requests that are worked on at a time.

        Raises:
            LocalProtocolError: It is being served already.
        """
        if self._serving is not None:
            raise LocalProtocolError("one serve at a time")
        self._serving = stream = Stream(lambda: self._take_message(self._requests))
        for message in self._inbox.pick(lambda message: message.expects_reply):
            self._requests.put(message)
        try:
            await self._serve(stream, answer, asyncio.Semaphore(concurrency))
        finally:
            self._serving = None
            for message in self._requests.clear():
                self._give_up(message)
            self._pace()

    async def _serve(
        self,
        stream: Stream[Message],
        answer: Callable[[Message], Buffer | Awaitable[Buffer | None] | None],
        slots: asyncio.Semaphore,
    ) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                # A request that was taken out must have its task at once, or it would be lost.
                await slots.acquire()
                try:
                    message = await anext(stream)
                except StopAsyncIteration:
                    return
                task = group.create_task(self._answer(message, answer))
                task.add_done_callback(partial(self._finish, message, slots))

    def _finish(self, message: Message, slots: asyncio.Semaphore, task: asyncio.Task[None]) -> None:
        slots.release()
        if task.cancelled():
            self._give_up(message)
        else:
            message.close()

    def _give_up(self, message: Message) -> None:
        """Be done with a request that nobody will answer."""
        self._refuse_now(message, Cancelled("the service has ended"))
        message.close()

    async def _answer(
        self,
        message: Message,
        answer: Callable[[Message], Buffer | Awaitable[Buffer | None] | None],
    ) -> None:
        try:
            body = answer(message)
            if inspect.isawaitable(body):
                body = await body
            await self.reply(message, b"" if body is None else body)
        except Exception as error:
            await self._answer_error(message, error)

    async def _answer_error(self, message: Message, error: Exception) -> None:
        if not isinstance(error, BusError):
            _log.exception("a request from %s failed", message.source)
            error = BusError(f"the service failed ({type(error).__name__})")
        try:
            await self.refuse(message, error)
        except BusError as failure:
            _log.info("no reply to %s: %s", message.source, failure)

    # life

    async def __aenter__(self) -> Self:
        """Come onto the bus."""
        self._socket = await open_socket(self._node)
        await self._group.__aenter__()
        try:
            await asyncio.to_thread(self._set_options)
            await self._enter()
            self._ready.set()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave: what was sent is delivered, open requests end in Cancelled (D20)."""
        await self._leave()

    def _set_options(self) -> None:
        self._socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
        self._socket.setsockopt(BUS_SOCKET, SO_BUS_DETAILS, 1)

    async def _enter(self) -> None:
        """Become what this is: of the subclass."""
        raise NotImplementedError

    async def _restore(self) -> None:
        """Become that again, with a new agent: of the subclass, which may begin to read."""
        raise NotImplementedError

    async def _leave(self) -> None:
        self._end(None)
        for backlog in self._backlogs():
            for message in backlog.clear():
                message.close()
        for task in self._tasks:
            task.cancel()
        # The error of the body is no error of the group: it is raised as it is.
        await self._group.__aexit__(None, None, None)
        try:
            await asyncio.to_thread(self._socket.close)
        except BusError as error:
            _log.warning("leaving %s: %s", self.path, error)

    def _end(self, reason: BusError | None) -> None:
        """Stop reading and end all that waits."""
        if self._is_closed:
            return
        self._is_closed = True
        self._why_closed = reason
        self._pace()
        self._wake_writers()
        self._ready.set()
        for request in self._open_requests.values():
            request.fail(reason or Cancelled("the bus was left"))
        for stream in self._streams():
            stream.end(reason)

    def _streams(self) -> list[Stream[Any]]:
        """All streams, to be ended with the mailbox; a subclass has more."""
        streams: list[Stream[Any]] = [self._messages, self._notice_stream]
        return streams if self._serving is None else [*streams, self._serving]

    def _backlogs(self) -> list[Backlog]:
        """All backlogs; a subclass has more."""
        return [self._inbox, self._requests]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the background, until it ends or the bus is left."""
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # sending, below

    def address_of(self, to: To) -> BusAddress:
        """Return the address on this bus that a name stands for.

        Raises:
            InvalidArgument, NameTooLong: It is no address.
        """
        return to if isinstance(to, BusAddress) else BusAddress(self.path, to)

    async def _send(
        self,
        address: BusAddress,
        body: Buffer | Sequence[Buffer],
        ancdata: Sequence[AncillaryItem],
        fds: Iterable[int],
        deadline: float | None,
    ) -> None:
        buffers = body if isinstance(body, list | tuple) else (body,)
        numbers = array.array("i", fds)
        if numbers:
            ancdata = [*ancdata, (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers.tobytes())]
        if self._ready.is_set() and not self._is_closed:
            self._sent += 1
            if self._sent % _BATCH == 0:
                # A task that does nothing but send must not keep the others from running.
                await asyncio.sleep(0)
            try:
                self._send_now(buffers, ancdata, address)
            except (RingFull, ShareExceeded, NotConnected, NoAgent):
                pass
            else:
                return
        await self._patiently(partial(self._send_now, buffers, ancdata, address), deadline, address)

    def _send_now(
        self,
        buffers: Sequence[Buffer],
        ancdata: Sequence[AncillaryItem],
        address: BusAddress,
    ) -> int:
        """Send without waiting for anybody but the agent, and notice when it is gone."""
        try:
            return self._socket.sendmsg(buffers, ancdata, 0, address)
        except (NotConnected, NoAgent) as error:
            self._lose_agent(error)
            raise

    async def _patiently(
        self,
        send: Callable[[], int],
        deadline: float | None,
        address: BusAddress,
        *,
        is_ready: bool = True,
    ) -> int:
        """Send as soon as there is an agent, and room, and a share of it that is not used up.

        `send` does not wait, and notices when the agent is gone; then, unless the endpoint is to
        be ready, this gives up.
        """
        excess: ShareExceeded | None = None
        pause = _FIRST_PAUSE_S
        try:
            async with within(deadline, f"sending to {address}"):
                while True:
                    if is_ready:
                        await self._ready.wait()
                    self._check_open()
                    try:
                        return send()
                    except RingFull:
                        excess = None
                        await self._wait_writable()
                    except ShareExceeded as error:
                        # Nothing tells when others have read enough of what is ours.
                        excess = error
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, _LONGEST_PAUSE_S)
                    except (NotConnected, NoAgent):
                        # Nothing was accepted, so it may be sent again.
                        if not is_ready:
                            raise
        except DeadlineExceeded as error:
            if excess is None:
                raise
            raise excess from error

    def _check_open(self) -> None:
        if self._is_closed:
            raise self._why_closed or Cancelled("the bus was left")

    async def _wait_writable(self) -> None:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        if not self._writers:
            loop.add_writer(self._socket.fileno(), self._wake_writers)
        self._writers.add(waiter)
        try:
            await waiter
        finally:
            self._writers.discard(waiter)
            if not self._writers and not self._is_closed:
                loop.remove_writer(self._socket.fileno())

    def _wake_writers(self) -> None:
        waiting, self._writers = self._writers, set()
        if waiting:
            asyncio.get_running_loop().remove_writer(self._socket.fileno())
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    def _reply_items(self, message: Message) -> list[AncillaryItem]:
        if not message.expects_reply:
            raise LocalProtocolError("this message expects no reply")
        ancdata: list[AncillaryItem] = [control.encode(ReplyTo(message.serial))]
        if message.destination in self._addresses:
            ancdata.append(control.encode(SourceAddr(message.destination)))
        return ancdata

    def _refuse_now(self, message: Message, error: BusError) -> None:
        """Tell an asker that there will be no reply, if that is possible without waiting."""
        ancdata = [*self._reply_items(message), _errno_item(error)]
        try:
            self._send_now([_text_of(error)], ancdata, message.source)
        except OSError as failure:
            _log.info("no reply to %s: %s", message.source, failure)

    # receiving, below

    def _read(self) -> None:
        """Read what is there; called by the loop."""
        try:
            received = self._socket.recvmmsg(_BATCH, MESSAGE_BYTES, _ALL_ITEMS)
        except RingFull:
            return
        except BusError as error:
            self._lose_agent(error)
            return
        for one in received:
            try:
                arrival = read(one)
            except RemoteProtocolError as error:
                _log.error("the agent sent what no agent sends: %s", error)
                continue
            self._sort(arrival)
        self._pace()

    def _sort(self, arrival: Arrival) -> None:
        match arrival:
            case Message():
                for item in arrival.commands:
                    self._obey(item)
                self._sort_message(arrival)
            case Gap():
                self._receive_gap(arrival)
            case Notice():
                self._receive_notice(arrival)
            case NoReply(serial):
                request = self._open_requests.get(serial)
                if request is not None:
                    text = "whoever was asked is gone, and has not answered"
                    request.fail(NoSuchEndpoint(text))

    def _sort_message(self, message: Message) -> None:
        if message.is_copy:
            self._receive_copy(message)
        elif message.reply_to:
            request = self._open_requests.get(message.reply_to)
            if request is None or not request.answer(message):
                _log.debug("a reply from %s that nobody waits for any more", message.source)
                message.close()
        elif message.is_multicast:
            self._receive_multicast(message)
        elif message.commands and not message.body:
            message.close()
        else:
            self._receive_unicast(message)

    def _obey(self, item: Item) -> None:
        """Note what the agent has carried out."""
        match item:
            case OwnedAddr(address):
                if address not in self._addresses:
                    self._addresses.append(address)
            case RevokeAddr(address):
                if address in self._addresses:
                    self._addresses.remove(address)

    def _receive_unicast(self, message: Message) -> None:
        if self._serving is not None and message.expects_reply:
            self._requests.put(message)
            self._serving.stir()
            return
        lost = self._inbox.put(message)
        if lost is None:
            self._messages.stir()
            return
        _log.warning("nobody reads messages(): one from %s is lost", message.source)
        if message.expects_reply:
            self._refuse_now(message, MessagesLost("nobody there reads messages"))
        message.close()

    def _receive_notice(self, notice: Notice) -> None:
        self._notices.put(notice)
        self._notice_stream.stir()

    def _receive_gap(self, gap: Gap) -> None:
        """Take a gap in what was multicast: of the subclass that hears multicasts."""
        _log.debug("nobody hears of %s", gap)

    def _receive_multicast(self, message: Message) -> None:
        """Take a multicast: of the subclass that subscribes."""
        message.close()

    def _receive_copy(self, message: Message) -> None:
        """Take a monitor's copy: of the subclass that monitors."""
        message.close()

    def _take_message(self, backlog: Backlog) -> Message | None:
        item = backlog.take()
        self._pace()
        if isinstance(item, Gap):
            raise MessagesLost(f"{item.count} messages of one sender, before anybody read them")
        return item

    def _pace(self) -> None:
        """Read the ring or do not, as the backlogs have room."""
        factor = _OVERDRAFT if self._open_requests else 1
        is_full = any(
            backlog.holds and len(backlog) >= factor * backlog.limit for backlog in self._backlogs()
        )
        wanted = not (is_full or self._is_closed or self._is_lost)
        if wanted == self._is_reading:
            return
        self._is_reading = wanted
        loop = asyncio.get_running_loop()
        if wanted:
            loop.add_reader(self._socket.fileno(), self._read)
        else:
            loop.remove_reader(self._socket.fileno())

    # when the agent is gone

    def _lose_agent(self, error: BusError) -> None:
        """Fail what cannot go on, and begin to come back; called as often as it is noticed."""
        if self._is_closed:
            return
        self._is_lost = True
        self._pace()
        self._wake_writers()
        for request in self._open_requests.values():
            if request.is_accepted:
                text = f"{error.message}; whether the request arrived is not known"
                request.fail(OutcomeUnknown(text))
        if self._ready.is_set():
            self._ready.clear()
            _log.warning("%s: %s", self.path, error)
            self._spawn(self._come_back())

    async def _come_back(self) -> None:
        pause = _FIRST_PAUSE_S
        while not self._is_closed:
            try:
                await asyncio.to_thread(self._socket.status)  # any call connects again
                self._is_lost = False
                await self._restore()
                self._pace()
            except AfbusError as error:
                self._is_lost = True
                self._pace()
                _log.info("%s: not back yet: %s", self.path, error)
            # The new agent may be gone already, too.
            if not self._is_lost:
                self._ready.set()
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _errno_item(error: BusError) -> AncillaryItem:
    """The serial of an error reply."""
    return control.encode(Serial(error.errno or BusError.ERRNO))


def _text_of(error: BusError) -> bytes:
    return clip(error.message, REASON_BYTES).encode()
