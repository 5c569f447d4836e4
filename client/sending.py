"""The sending half of a socket: messages, batches, commands of a master.

What it sends is *accepted* when the call returns: it lies in the ring of whoever gets it, or the
call says why not (D7, D21).

Invariants:

1. A message is sent again only if the agent that was given it is known not to have accepted it.
"""

from __future__ import annotations

import errno
import os
import socket as _socket
from typing import TYPE_CHECKING, Any, Final, TypeAlias, overload

from .._datapath import EXPECT_REPLY, UNICAST, SendLoan
from ..proto.address import BusAddress
from ..proto.errors import (
    BadDestination,
    CannotCarry,
    InvalidArgument,
    MasterLost,
    NotConnected,
    NotJoined,
    NotOwned,
    TooBig,
)
from ..proto.frames import Op
from ..proto.limits import INLINE_BYTES, MESSAGE_BYTES, REASON_BYTES, UNREAD_SENDERS
from ..proto.text import clip
from .ancillary import Beside, take_apart
from .direct import Direct
from .endpoint import to_address
from .refusal import refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

    from .._datapath import Rings
    from .unread import UnreadRow

#: What is taken where an address is asked for.
Address: TypeAlias = "BusAddress | tuple[str | bytes, str | bytes] | str"

#: One control item as Python has it: level, type, data.
AncillaryItem: TypeAlias = "tuple[int, int, Buffer]"

SEND_FLAGS: Final = _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL
# The rings cannot be used any more: the agent is gone, broke a rule, or they were replaced.
GONE: Final = frozenset({errno.ENOTCONN, errno.EBADMSG, errno.EBADF})
_NOTHING: Final = Beside()


class Sending(Direct):
    """What of a `Socket` sends."""

    #: Where messages go that bear no address.
    _peer: BusAddress | None

    def connect(self, address: Address | None) -> None:
        """Name the address to which messages go that bear none; None: none any more.

        As of any datagram socket nobody is asked and nothing is sent: whoever owns the address when
        a message is sent gets it. The socket is on the bus of this path from then on. It receives
        from everybody as before.

        Raises:
            BadDestination: The kernel's address, or a multicast address without bits. EDESTADDRREQ.
            NoBus: There is no bus of this path. ENOENT.
            NoSuchEndpoint: The endpoint is on another bus. EHOSTUNREACH.
            InvalidArgument: It is no address. EINVAL.
        """
        self._endpoint.check_usable()
        if address is None:
            self._peer = None
            self._aim(UNICAST, None)
            return
        where = to_address(address)
        kind, dst, _ = self._endpoint.find_route(where, self._timeout)
        if not dst:
            _need_terms(where, _NOTHING)
        self._peer = where
        self._aim(kind, dst)

    def getpeername(self) -> BusAddress:
        """Return the address that `connect` named.

        Raises:
            NotConnected: It named none. ENOTCONN.
        """
        self._endpoint.check_usable()
        if self._peer is None:
            raise NotConnected("the socket was not connected to an address: `connect` names one")
        return self._peer

    def _send_otherwise(self, data: Buffer, flags: int, number: int) -> int:
        """Do what `send` leaves to us: what is not plain, and errors.

        Args:
            data: As of `send`.
            flags: As of `send`.
            number: Why it was refused; 0: it was not tried.
        """
        timeout = self._send_timeout(flags) if flags else self._timeout
        end, peer = self._endpoint, self._peer
        if number:
            timeout = self._send_failed(number, end.rings, timeout, peer, (data,), b"", ())
        if peer is None:
            end.check_usable()
            text = "the socket was not connected to an address"
            raise BadDestination(f"{text}: connect it, or name one with sendto or sendmsg")
        try:
            return self._send_body(data, peer, timeout)
        finally:
            self._use_rings()

    def sendmsg(
        self,
        buffers: Iterable[Buffer],
        ancdata: Iterable[AncillaryItem] = (),
        flags: int = 0,
        address: Address | None = None,
    ) -> int:
        """Send one message; return its size in bytes.

        Args:
            buffers: The parts of the body, together at most 16 MiB.
            ancdata: Of SOL_SOCKET: SCM_RIGHTS (at most 16 descriptors, which stay the caller's) and
                SCM_CREDENTIALS (must be true). Of BUS_SOCKET: SCM_SRC_ADDR (R13), SCM_SERIAL,
                SCM_REPLY_TO, SCM_DEADLINE, SCM_TERMS, and the commands of a master (D5).
            flags: MSG_DONTWAIT; MSG_NOSIGNAL changes nothing.
            address: A normal address, a multicast address with bits, or one without components
                beside SCM_TERMS; by default that of `connect`.

        Raises:
            BadDestination: No address, or the kernel's. EDESTADDRREQ.
            NoBus: There is no bus of this path. ENOENT.
            NoSuchEndpoint: Nobody is there, or it is another bus than the endpoint's. EHOSTUNREACH.
            NotJoined: The endpoint has no address yet, and this is not the master. EHOSTUNREACH.
            MasterLost: Nobody owns this name, and the bus has no master now. EHOSTDOWN.
            Denied: A grant is missing, or the credentials are not true. EPERM.
            NotOwned: The endpoint does not own the source. EADDRNOTAVAIL.
            RingFull: The receiver has no room, and the socket does not wait. EAGAIN.
            DeadlineExceeded: The receiver had no room for as long as the timeout. ETIMEDOUT.
            TooBig: The message, or the number of its descriptors. EMSGSIZE.
            ShareExceeded: Too much lies unread in the rings of others. EDQUOT.
            WidthMismatch: The bits have another width than the bus. EDOM.
            CannotCarry: Descriptors in a multicast or beside commands. EOPNOTSUPP.
            OutcomeUnknown: The agent died before it answered. ECONNABORTED.
            NotConnected: The agent is gone; the next call connects again. ENOTCONN.
            InvalidArgument: A flag or an item that is unknown or malformed. EINVAL.
        """
        parts = buffers if type(buffers) is list else tuple(buffers)
        timeout = self._send_timeout(flags) if flags else self._timeout
        if not ancdata and len(parts) == 1:
            return self._send_body(parts[0], self._peer if address is None else address, timeout)
        beside = take_apart(ancdata) if ancdata else _NOTHING
        kind, dst, address = self._find_way(address, beside, timeout)
        src = self._source(beside)
        if beside.commands:
            self._command((kind, dst), src, parts, beside, timeout)
        else:
            self._transmit((kind, dst), src, parts, beside, timeout, address)
        return sum(map(_size, parts))

    def _loan_otherwise(
        self,
        nbytes: int,
        address: Address | None,
        ancdata: Iterable[AncillaryItem] | None,
        flags: int,
    ) -> SendLoan:
        """Do what `loan` leaves to us: all but a buffer on the lane to where we are connected."""
        if nbytes < 0:
            raise InvalidArgument(f"a loan cannot have {nbytes} bytes")
        if nbytes > MESSAGE_BYTES:
            raise TooBig(f"a loan of {nbytes} bytes: a message has {MESSAGE_BYTES} at most")
        timeout = self._send_timeout(flags) if flags else self._timeout
        beside = take_apart(ancdata) if ancdata else _NOTHING
        if beside.commands:
            raise InvalidArgument("commands of a master go beside a message that is no loan")
        kind, dst, address = self._find_way(address, beside, timeout)
        source = self._source(beside)
        plan = beside, flags, address
        loan = SendLoan(nbytes, self, kind, dst, source, beside.serial, plan)
        while True:
            rings = self._endpoint.rings
            verdict = rings.lend_buffer(
                loan,
                kind,
                dst,
                source,
                len(beside.fds),
                EXPECT_REPLY if beside.deadline_ms else 0,
                beside.reply_to,
                timeout,
            )
            if not verdict:
                return loan
            timeout = self._send_failed(-verdict, rings, timeout, address, (), source, (), nbytes)

    def _send_loan(self, loan: SendLoan, length: int) -> int:
        """Do what `SendLoan.send` leaves to us: all but a body on a lane that has room for it."""
        if not 0 <= length <= len(loan):
            raise InvalidArgument(f"{length} bytes cannot be sent of a loan of {len(loan)}")
        plan = loan.plan
        beside, flags, address = plan if type(plan) is tuple else (_NOTHING, 0, plan)
        timeout = self._send_timeout(flags) if flags else self._timeout
        source = self._source(beside)
        while True:
            rings = self._endpoint.rings
            verdict = rings.send_loan(
                loan,
                length,
                beside.fds,
                EXPECT_REPLY if beside.deadline_ms else 0,
                beside.reply_to,
                beside.deadline_ms,
                timeout,
            )
            if not verdict:
                return length
            timeout = self._send_failed(
                -verdict, rings, timeout, address, (), source, beside.fds, length
            )

    def command(
        self,
        buffers: Iterable[Buffer],
        ancdata: Iterable[AncillaryItem],
        address: Address,
    ) -> list[BusAddress]:
        """Send one message with commands of the master (D5), as `sendmsg`.

        Returns:
            For each SCM_OWNED_ADDR without components, in their order, the unique address that the
            agent of the receiver has chosen.

        Raises:
            InvalidArgument: There is no command beside the message. EINVAL.
            BusError: As `sendmsg`.
        """
        beside = take_apart(ancdata)
        if not beside.commands:
            raise InvalidArgument("no command of a master beside the message")
        kind, dst, _ = self._endpoint.find_route(address, self._timeout)
        return self._command(
            (kind, dst), self._source(beside), tuple(buffers), beside, self._timeout
        )

    def tell_unread(self, rows: Iterable[UnreadRow], reason: str) -> None:
        """Tell senders of messages that were received and that nobody will read (D20).

        They read a notice of UNREAD, as when this endpoint closes and has not received them.

        Args:
            rows: Of each sender its address, the first and the last SCM_SEQ, and how many.
            reason: Why, for people.

        Raises:
            InvalidArgument: There are more than were received. EINVAL.
        """
        told = [[source.address, *numbers] for source, *numbers in rows]
        for place in range(0, len(told), UNREAD_SENDERS):
            some = told[place : place + UNREAD_SENDERS]
            self._endpoint.call(
                Op.UNREAD, self._timeout, messages=some, reason=clip(reason, REASON_BYTES)
            )

    @overload
    def sendto(self, data: Buffer, address: Address, /) -> int: ...
    @overload
    def sendto(self, data: Buffer, flags: int, address: Address, /) -> int: ...
    def sendto(self, data: Buffer, *args: Any) -> int:
        """Send one message: `sendto(data, [flags,] address)`. As `sendmsg` with one buffer."""
        if not 1 <= len(args) <= 2:
            raise TypeError(f"sendto(data, [flags,] address), not {1 + len(args)} arguments")
        address = args[-1]
        timeout = self._send_timeout(args[0]) if len(args) == 2 and args[0] else self._timeout
        return self._send_body(data, address, timeout)

    def _send_body(self, data: Buffer, address: Address | None, timeout: float | None) -> int:
        """Send one message with nothing beside it."""
        end = self._endpoint
        kind, dst, _ = end.routes.get(id(address)) or end.find_route(address, timeout)
        if not dst:
            _need_terms(address, _NOTHING)
        rings = end.rings
        while verdict := rings.send_body(kind, dst, data, timeout):
            timeout = self._send_failed(-verdict, rings, timeout, address, (data,), b"", ())
            rings = end.rings
        return len(data) if type(data) is bytes else _size(data)

    def sendmmsg(
        self,
        messages: Sequence[Buffer],
        address: Address | list[Address] | None = None,
        flags: int = 0,
        ancdata: Iterable[AncillaryItem] = (),
    ) -> int:
        """Send messages in order; return how many were accepted.

        As sendmmsg(2): after a refusal nothing more is sent; it is raised if nothing was accepted,
        otherwise the next call meets it again. So what was not accepted is `messages[count:]`.

        Args:
            messages: The bodies, a sequence. If one of them is no buffer, none is sent.
            address: One for all, or a list with one each; all of one kind; by default that of
                `connect` for all.
            flags: As `sendmsg`.
            ancdata: For all of them: SCM_SRC_ADDR, SCM_TERMS.

        Raises:
            BusError: As `sendmsg`, if the first message does.
            InvalidArgument: Other items, or another number of addresses than of messages. EINVAL.
        """
        end = self._endpoint
        timeout = self._send_timeout(flags) if flags else self._timeout
        beside = take_apart(ancdata) if ancdata else _NOTHING
        if beside.fds or beside.commands or beside.serial or beside.reply_to:
            raise InvalidArgument("only SCM_SRC_ADDR and SCM_TERMS can stand beside many messages")
        if address is None:
            address = self._peer
        several: list[Any] = address if isinstance(address, list) else [address]
        routes = [end.routes.get(id(one)) or end.find_route(one, timeout) for one in several]
        kinds = {kind for kind, _, _ in routes}
        if len(kinds) > 1 or (several is address and len(several) != len(messages)):
            text = "one address for all messages, or one of the same kind for each"
            raise InvalidArgument(f"{len(messages)} messages, {len(several)} addresses: {text}")
        if len(messages) == 0:
            return 0
        src = self._source(beside)
        kind, first, _ = routes[0]
        dst: bytes | list[bytes] = first
        if not first:
            dst = _need_terms(several[0], beside)
        elif beside.terms is not None:
            raise _too_many_terms(several[0])
        elif several is address:
            dst = [within for _, within, _ in routes]
        while True:
            rings = end.rings
            count, verdict = rings.send_many(kind, dst, src, messages, 0, timeout)
            if count or not verdict:
                return count
            timeout = self._send_failed(
                -verdict, rings, timeout, several[0], (messages[0],), src, ()
            )

    def _send_timeout(self, flags: int) -> float | None:
        if flags & ~SEND_FLAGS:
            raise InvalidArgument(f"flags {flags & ~SEND_FLAGS:#x} mean nothing when sending")
        return 0.0 if flags & _socket.MSG_DONTWAIT else self._timeout

    def _find_way(
        self, address: Address | None, beside: Beside, timeout: float | None
    ) -> tuple[int, bytes, Any]:
        """Return kind, destination and address of a message, by default that of `connect`."""
        if address is None:
            address = self._peer
        end = self._endpoint
        kind, dst, _ = end.routes.get(id(address)) or end.find_route(address, timeout)
        if not dst:
            dst = _need_terms(address, beside)
        elif beside.terms is not None:
            raise _too_many_terms(address)
        return kind, dst, address

    def _source(self, beside: Beside) -> bytes:
        """Return the source that was chosen, empty for the default (R13)."""
        source = beside.source
        if source is None:
            return b""
        if source.path != self._endpoint.path:
            raise NotOwned(f"the source {source} is on another bus")
        return source.address

    def _transmit(  # noqa: PLR0913 (the parts of one message)
        self,
        route: tuple[int, bytes],
        src: bytes,
        parts: Sequence[Buffer],
        beside: Beside,
        timeout: float | None,
        address: Address | None,
    ) -> None:
        """Send one message by the rings."""
        while True:
            rings = self._endpoint.rings
            verdict = rings.send(
                *route,
                src,
                parts,
                beside.fds,
                EXPECT_REPLY if beside.deadline_ms else 0,
                beside.serial,
                beside.reply_to,
                beside.deadline_ms,
                timeout,
            )
            if not verdict:
                return
            timeout = self._send_failed(-verdict, rings, timeout, address, parts, src, beside.fds)

    def _send_failed(  # noqa: PLR0913 (the parts of one message)
        self,
        number: int,
        rings: Rings,
        timeout: float | None,
        address: Address | None,
        parts: Sequence[Buffer],
        src: bytes,
        descriptors: Sequence[int],
        size: int = 0,
    ) -> float | None:
        """Raise why a message was refused; return what is left of the timeout to try it again."""
        end = self._endpoint
        if number == errno.EBADF:
            for descriptor in descriptors:
                _check_open(descriptor)
        if number in GONE:
            return end.recover(rings, timeout)
        if number == errno.ECONNABORTED:
            end.look_after(rings)
        where = to_address(address)
        if number == errno.EHOSTDOWN and not end.has_master(timeout):
            raise MasterLost(f"nobody owns {where}, and the bus has no master now")
        if number == errno.EHOSTUNREACH and not end.has_joined(timeout):
            text = f"this endpoint has no address on its bus yet: {where} is not its master"
            raise NotJoined(text)
        size += sum(map(_size, parts))
        raise refusal(number, where, size=size, source=src, descriptors=descriptors)

    def _command(
        self,
        route: tuple[int, bytes],
        src: bytes,
        parts: Sequence[Buffer],
        beside: Beside,
        timeout: float | None,
    ) -> list[BusAddress]:
        """Send a message with commands of the master, which the agent carries out first (D5)."""
        kind, dst = route
        if kind != UNICAST or beside.fds:
            text = "commands of the master go to one endpoint at a time, without descriptors"
            raise CannotCarry(text)
        body = b"".join(parts)
        if len(body) > INLINE_BYTES:
            text = f"{len(body)} bytes beside commands of the master, limit {INLINE_BYTES}"
            raise TooBig(f"{text}: send them in a message of their own")
        found = self._endpoint.call(
            Op.CONTROL,
            timeout,
            dst=dst,
            src=src or None,
            items=beside.commands,
            body=body,
            serial=beside.serial or None,
            reply_to=beside.reply_to or None,
            deadline_ms=beside.deadline_ms or None,
        )
        path = self._endpoint.path
        assert path is not None, "whoever commands is on a bus"
        return [BusAddress(path, chosen) for chosen in found["owned"]]


def _size(data: Buffer) -> int:
    return len(data) if type(data) is bytes else memoryview(data).nbytes


def _check_open(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError as error:
        raise OSError(errno.EBADF, f"descriptor {descriptor} of SCM_RIGHTS is not open") from error


def _need_terms(address: Any, beside: Beside) -> bytes:
    if beside.terms is None:
        where = to_address(address)
        text = "a multicast needs bits in its address, or SCM_TERMS beside it"
        raise BadDestination(f"{where} says nothing: {text}")
    return beside.terms


def _too_many_terms(address: Any) -> InvalidArgument:
    text = "SCM_TERMS go with a multicast address that has no components, not with"
    return InvalidArgument(f"{text} {to_address(address)}")
