"""One endpoint in an event loop: sends, asks, answers, and sorts what arrives.

`Member` and `Bus` stand on it. A socket call that waits for the agent and for nobody else is made
where it is due; those that connect, join or close go through a thread. Nothing here ever waits for
a peer but by `await`.

What arrives is sorted into backlogs that are read by `async for`. A backlog of somebody who reads
is never cut: when it is full the ring is not read any more, so that senders are held up as D12
says. Replies get through all the same: while a request is open the ring is read on, to at most
`_OVERDRAFT` times the limit. What nobody reads at all holds up nobody: it is kept up to the limit,
what is beyond is given back: its senders read a notice of UNREAD, as for what is unread when this
leaves (D20). Whoever begins to read is told by MessagesLost how much is missing.

When the agent dies, requests that are open end in OutcomeUnknown; sends wait for the next agent,
within their deadline, because nothing of them was accepted.

Invariants:

1. Every wait ends with a result, a `BusError`, or at its deadline.
2. Cancelling a call at any `await` leaves everything as if it had not waited: nothing that has
   arrived is lost, and no request number is left behind.
3. All calls are made in the thread of one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import socket as _socket
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Self

from ..proto import control
from ..proto.address import BusAddress
from ..proto.control import (
    BUS_SOCKET,
    SO_BUS_DETAILS,
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
    InvalidArgument,
    LocalProtocolError,
    MessagesLost,
    RemoteProtocolError,
    RingFull,
)
from ..proto.limits import CONTROL_ITEM_BYTES, CONTROL_ITEMS, MESSAGE_BYTES, REASON_BYTES
from ..proto.notice import Event, Gap, Notice
from ..proto.text import clip, escape
from .backlog import Backlog
from .message import Arrival, Message, NoReply, read
from .open_request import OpenRequests
from .outbox import BATCH, FIRST_PAUSE_S, LONGEST_PAUSE_S, Outbox
from .service import Service
from .socket import Socket
from .stream import BACKLOG_LIMIT, Stream, UnreadNotices, within
from .unread import Unread

if TYPE_CHECKING:
    import os
    from collections.abc import Coroutine, Iterable, Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Buffer

    from .open_request import OpenRequest
    from .proof import Proof
    from .sending import AncillaryItem
    from .service import Answering

_log = logging.getLogger(__name__)

#: How long a call waits if nothing else is said, in seconds.
DEADLINE_S: Final = 5.0
#: Requests that `serve` works on at a time.
CONCURRENCY: Final = 64

# How far a backlog may grow beyond its limit while a reply is waited for, as a factor.
_OVERDRAFT: Final = 8
_ALL_ITEMS: Final = CONTROL_ITEMS * (CONTROL_ITEM_BYTES + 32)

#: Whom a message is sent to: a name, an address within the bus, or a whole address.
To = str | bytes | BusAddress


async def open_socket(node: str | os.PathLike[str] | None, proof: Proof | None = None) -> Socket:
    """Return a new socket that never waits; what is cancelled meanwhile is closed."""

    def open_now() -> Socket:
        made = Socket(node=node)
        if proof is not None:
            try:
                made.prove(proof)
            except BaseException:
                made.close()
                raise
        return made

    opening = asyncio.get_running_loop().run_in_executor(None, open_now)
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


def check_path(path: str | bytes) -> bytes:
    """Return the path of a bus.

    Raises:
        InvalidArgument, NameTooLong: There cannot be such a bus.
    """
    if not isinstance(path, str | bytes):
        raise InvalidArgument(f"{path!r} is no path of a bus")
    return BusAddress.kernel(path).path


class Mailbox:
    """What members and masters have in common; not made by itself."""

    def __init__(
        self,
        path: str | bytes,
        node: str | os.PathLike[str] | None,
        proof: Proof | None = None,
    ) -> None:
        """Begin with nothing but the path of the bus."""
        self.path = check_path(path)
        self._node = node
        self._proof = proof
        self._addresses: list[BusAddress] = []
        self._is_entered = False
        self._is_closed = False
        self._why_closed: BusError | None = None
        self._is_reading = False
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_lost = False
        self._open_requests = OpenRequests()
        self._outbox = Outbox(self._lose_agent)
        self._inbox = Backlog(BACKLOG_LIMIT)
        self._messages: Stream[Message] = Stream(lambda: self._take_message(self._inbox))
        self._is_loss_logged = False
        self._unread = Unread()
        self._is_telling = False
        self._service: Service | None = None
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
        self._outbox.check_open()
        return self._socket.fileno()

    def address_of(self, to: To) -> BusAddress:
        """Return the address on this bus that a name stands for.

        Raises:
            InvalidArgument, NameTooLong: It is no address.
        """
        if isinstance(to, BusAddress):
            return to
        if not isinstance(to, str | bytes):
            raise InvalidArgument(f"{to!r} is no address")
        return BusAddress(self.path, to)

    def _within(self, name: To) -> bytes:
        """Return an address of this bus, without its path; errors as `address_of`."""
        address = self.address_of(name)
        if address.path != self.path or address.is_multicast or address.is_kernel:
            raise InvalidArgument(f"{address} is no address of one endpoint on {self._bus}")
        return address.address

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
            ancdata.append(_source_item(self.address_of(source)))
        await self._outbox.send(self.address_of(to), body, ancdata, fds, deadline)

    async def send_many(
        self, to: To, bodies: Sequence[Buffer], *, deadline: float | None = DEADLINE_S
    ) -> int:
        """Send messages in order; return how many were accepted.

        After a refusal nothing more is sent; it is raised if nothing was accepted.
        """
        return await self._outbox.send_many(self.address_of(to), bodies, deadline)

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
                await self._outbox.send(address, body, request.ancdata, fds, None)
                message = await request.wait()
        if message.error is not None:
            message.close()
            raise message.error
        return message

    @contextmanager
    def _open_request(self, deadline: float) -> Iterator[OpenRequest]:
        """Return a request that can be answered within the block."""
        self._outbox.check_open()
        try:
            with self._open_requests.open(deadline) as request:
                yield request
        finally:
            self._pace()

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
        await self._outbox.send(message.source, body, self._reply_items(message), fds, deadline)

    async def refuse(
        self, message: Message, error: BusError, *, deadline: float | None = DEADLINE_S
    ) -> None:
        """Answer a request with an error, which its `request` raises; errors as `reply`."""
        ancdata: list[AncillaryItem] = [*self._reply_items(message), _errno_item(error)]
        await self._outbox.send(message.source, _text_of(error), ancdata, (), deadline)

    def refuse_now(self, message: Message, error: BusError) -> None:
        """Answer a request with an error, if that is possible without waiting."""
        ancdata = [*self._reply_items(message), _errno_item(error)]
        try:
            self._outbox.send_now([_text_of(error)], ancdata, message.source)
        except OSError as failure:
            _log.info("no reply to %s: %s", message.source, failure)

    def _reply_items(self, message: Message) -> list[AncillaryItem]:
        if not message.expects_reply:
            raise LocalProtocolError("this message expects no reply")
        ancdata: list[AncillaryItem] = [control.encode(ReplyTo(message.serial))]
        if message.destination in self._addresses:
            ancdata.append(_source_item(message.destination))
        return ancdata

    # receiving

    def messages(self) -> Stream[Message]:
        """Return what is sent to this endpoint and is neither a reply nor taken by `serve`.

        From the first call on it must be read: while 1,024 messages wait, nothing at all is read
        from the ring, so that senders are held up, and with them feeds and notices; replies to an
        open request get through as long as no more than 8,192 wait.
        """
        self._inbox.holds = True
        return self._messages

    def notices(self) -> Stream[Notice]:
        """Return the notices of the bus that this endpoint is given (D15)."""
        return self._notice_stream

    async def serve(self, answer: Answering, *, concurrency: int = CONCURRENCY) -> None:
        """Answer requests until this is cancelled or the bus is left.

        Args:
            answer: Takes a request and returns the body of the reply (None: an empty one), or an
                awaitable of it. A `BusError` that it raises is what the asker's `request` raises;
                any other exception is logged, and the asker gets EIO. Descriptors of the request
                are closed afterwards.
            concurrency: Requests that are worked on at a time.

        Raises:
            LocalProtocolError: It is being served already, or the bus was not entered yet.
            Cancelled: The bus was left before. ECANCELED.
            InvalidArgument: No request could be worked on. EINVAL.
        """
        self._outbox.check_open()
        if concurrency < 1:
            raise InvalidArgument(f"{concurrency} requests at a time are none")
        if self._service is not None:
            raise LocalProtocolError("one serve at a time")
        self._service = service = Service(self, self._take_message)
        for message in self._inbox.pick(lambda message: message.expects_reply):
            service.put(message)
        try:
            await service.run(answer, concurrency)
        finally:
            self._service = None
            service.end()
            self._pace()

    # life

    async def __aenter__(self) -> Self:
        """Come onto the bus; to be done once."""
        if self._is_entered:
            raise LocalProtocolError("a bus is entered once: make another one of these")
        self._is_entered = True
        self._socket = await open_socket(self._node, self._proof)
        self._outbox.open(self._socket)
        await self._group.__aenter__()
        try:
            await asyncio.to_thread(self._set_options)
            await self._enter()
            self._outbox.ready.set()
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
        """Leave: what was sent is delivered, open requests end in Cancelled (D20).

        Senders of what was not read are told.
        """
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
                if not message.is_multicast and not message.is_copy:
                    self._unread.add(message, "it has left without reading")
                message.close()
        for task in self._tasks:
            task.cancel()
        # The error of the body is no error of the group: it is raised as it is.
        await self._group.__aexit__(None, None, None)
        try:
            await self._tell_unread()
            await asyncio.to_thread(self._socket.close)
        except BusError as error:
            _log.warning("leaving %s: %s", self._bus, error)

    def _end(self, reason: BusError | None) -> None:
        """Stop reading and end all that waits."""
        if self._is_closed:
            return
        self._is_closed = True
        self._why_closed = reason
        self._pace()
        self._outbox.end(reason)
        self._open_requests.fail_all(reason or Cancelled("the bus was left"))
        for stream in self._streams():
            stream.end(reason)

    @property
    def _bus(self) -> str:
        """The path of the bus, for people."""
        return escape(self.path)

    def _streams(self) -> list[Stream[Any]]:
        """All streams, to be ended with the mailbox; a subclass has more."""
        streams: list[Stream[Any]] = [self._messages, self._notice_stream]
        return streams if self._service is None else [*streams, self._service.stream]

    def _backlogs(self) -> list[Backlog]:
        """All backlogs; a subclass has more."""
        return [self._inbox] if self._service is None else [self._inbox, self._service.backlog]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the background, until it ends or the bus is left."""
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # what arrives

    def _read(self) -> None:
        """Read what is there; called by the loop."""
        try:
            received = self._socket.recvmmsg(BATCH, MESSAGE_BYTES, _ALL_ITEMS)
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
                self._open_requests.fail_unanswered(serial)

    def _sort_message(self, message: Message) -> None:
        if message.is_copy:
            self._receive_copy(message)
        elif message.reply_to:
            if not self._open_requests.answer(message):
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
        if self._service is not None and message.expects_reply:
            self._service.put(message)
            return
        lost = self._inbox.put(message)
        if lost is None:
            self._messages.stir()
            return
        self._give_back(message, MessagesLost("nobody there reads messages"))

    def _give_back(self, message: Message, error: BusError) -> None:
        """Be done with a message that nobody takes: its sender is told."""
        if message.expects_reply:
            self.refuse_now(message, error)
        else:
            self._unread.add(message, error.message)
            if not self._is_telling:
                self._is_telling = True
                self._spawn(self._tell_all_unread())
            if not self._is_loss_logged:
                self._is_loss_logged = True
                text = "%s: given back to %s; further ones are given back without a word here"
                _log.warning(text, error.message, message.source)
        message.close()

    async def _tell_all_unread(self) -> None:
        try:
            await self._tell_unread()
        except BusError as error:
            _log.warning("%s: senders were not told of unread messages: %s", self._bus, error)
        finally:
            self._is_telling = False

    async def _tell_unread(self) -> None:
        # An agent that came anew knows of no message that the former one had delivered.
        while self._unread and not self._is_lost:
            reason, rows = self._unread.take()
            await asyncio.to_thread(self._socket.tell_unread, rows, reason)

    def _receive_notice(self, notice: Notice) -> None:
        if notice.event is Event.REVOKED and "everything" not in notice.detail:
            # Not only the bus's master takes addresses, the cluster's does too. Who lost everything
            # comes back, and knows then what it has.
            kept = [one for one in self._addresses if one.address not in notice.subject]
            self._addresses = kept
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
        self._outbox.wake()
        self._open_requests.doubt(error.message)
        if self._outbox.ready.is_set():
            self._outbox.ready.clear()
            _log.warning("%s: %s", self._bus, error)
            self._spawn(self._come_back())

    async def _come_back(self) -> None:
        pause = FIRST_PAUSE_S
        while not self._is_closed:
            try:
                await asyncio.to_thread(self._socket.status)  # any call connects again
                self._is_lost = False
                await self._restore()
                self._pace()
            except AfbusError as error:
                self._is_lost = True
                self._pace()
                _log.info("%s: not back yet: %s", self._bus, error)
            # The new agent may be gone already, too.
            if not self._is_lost:
                self._outbox.ready.set()
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


@lru_cache(256)
def _source_item(address: BusAddress) -> AncillaryItem:
    """The address to be known by; few are used again and again."""
    return control.encode(SourceAddr(address))


def _errno_item(error: BusError) -> AncillaryItem:
    """The serial of an error reply."""
    return control.encode(Serial(error.errno or BusError.ERRNO))


def _text_of(error: BusError) -> bytes:
    return clip(error.message, REASON_BYTES).encode()
