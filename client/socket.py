"""The socket of the bus, shaped like Python's own `socket.socket` of type SOCK_DGRAM.

One socket is one endpoint. What it sends is *accepted* when the call returns: it lies in the ring
of whoever gets it, or the call says why not (D7, D21).

Invariants:

1. An address may be given as `BusAddress`, as `(path, address)` or as text `PATH:ADDRESS`; what is
   returned is always `BusAddress`.
2. Every refusal is a `BusError` with the errno of D7, and also what Python makes of that errno: a
   full receiver is a `BlockingIOError`, a timeout a `TimeoutError`. There is never a SIGPIPE.
3. A gap (D12) is never skipped: who takes no control items gets it as `MessagesLost`.
4. A socket belongs to the process that made it. After a fork the child can do nothing with it.
"""

from __future__ import annotations

import errno
import os
import socket as _socket
import struct
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, overload

from .._datapath import EXPECT_REPLY, UNICAST
from ..proto import codec, control
from ..proto.address import AF_BUS, BusAddress
from ..proto.errors import (
    BadDestination,
    CannotCarry,
    DeadlineExceeded,
    InvalidArgument,
    MasterLost,
    NotJoined,
    NotOwned,
    RingFull,
    TooBig,
    error_for,
)
from ..proto.frames import Op
from ..proto.limits import (
    BLOOM_BITS_DEFAULT,
    FILTER_INSTRUCTION_BYTES,
    FILTER_INSTRUCTIONS,
    INLINE_BYTES,
    MESSAGE_BYTES,
    RX_RING_BYTES,
    TX_RING_BYTES,
)
from ..proto.text import to_bytes
from .ancillary import GAP_SPACE, Beside, take_apart, without_descriptors
from .endpoint import Endpoint, to_address
from .reception import KeptLoan, fitted, nothing
from .refusal import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

    from .._datapath import Loan, Received, Rings

#: What is taken where an address is asked for.
Address: TypeAlias = "BusAddress | tuple[str | bytes, str | bytes] | str"

#: One control item as Python has it: level, type, data.
AncillaryItem: TypeAlias = "tuple[int, int, Buffer]"

_SEND_FLAGS: Final = _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL
_RECEIVE_FLAGS: Final = (
    _SEND_FLAGS | _socket.MSG_PEEK | _socket.MSG_TRUNC | _socket.MSG_CMSG_CLOEXEC
)
# The rings cannot be used any more: the agent is gone, broke a rule, or they were replaced.
_GONE: Final = frozenset({errno.ENOTCONN, errno.EBADMSG, errno.EBADF})
_NOTHING: Final = Beside()
# More would not even fit through the door.
_FILTER_BYTES: Final = FILTER_INSTRUCTIONS * FILTER_INSTRUCTION_BYTES

_INT: Final = struct.Struct("=i")
_SOCKET_OPTIONS: Final[dict[int, Callable[[Endpoint], int]]] = {
    _socket.SO_PASSCRED: lambda end: int(end.option(_socket.SOL_SOCKET, _socket.SO_PASSCRED) == 1),
    _socket.SO_RCVBUF: lambda end: end.welcome.rx_bytes,
    _socket.SO_SNDBUF: lambda end: end.welcome.tx_bytes,
    _socket.SO_TYPE: lambda _: _socket.SOCK_DGRAM,
    _socket.SO_DOMAIN: lambda _: AF_BUS,
    _socket.SO_PROTOCOL: lambda _: 0,
    _socket.SO_ERROR: lambda _: 0,
}


class Socket:
    """One endpoint of a bus.

    Not bound and not attached to a bus at first: `bind` makes a bus, the first send joins one.
    One thread may send while another one receives. The descriptors of received SCM_RIGHTS items
    are the caller's, to close.

    When the agent dies everything that it had delivered is still read; then one call raises
    NotConnected; the next one connects again, and gets back what the agent remembers (D16). What
    it does not is told by a notice of the kernel's address that is received next.
    """

    family: Final = AF_BUS
    type: Final = _socket.SOCK_DGRAM
    proto: Final = 0

    def __init__(
        self,
        *,
        node: str | os.PathLike[str] | None = None,
        tx_bytes: int = TX_RING_BYTES,
        rx_bytes: int = RX_RING_BYTES,
    ) -> None:
        """Connect to the agent.

        Args:
            node: The agent's door; by default AFBUS_NODE, else the user's, else the system's.
            tx_bytes: Size of the ring that is sent from, a power of two from 4 KiB to 64 MiB.
            rx_bytes: Size of the ring that is received into, likewise.

        Raises:
            NoAgent: Nobody answers at the door. ECONNREFUSED.
            InvalidArgument: Such a ring cannot be. EINVAL.
            ShareExceeded: The principal has too many endpoints. EDQUOT.
        """
        self._timeout: float | None = None
        self._is_deaf = False
        self._endpoint = Endpoint(node, tx_bytes, rx_bytes)

    # the life of a socket

    def bind(
        self, address: Address, *, width: int = BLOOM_BITS_DEFAULT, order: str = "total"
    ) -> None:
        """Create the bus of this path, own the address on it, and be its master (R6).

        Args:
            address: A normal address.
            width: Bits of its multicast addresses: 512, 1024 or 2048 (D8).
            order: "total" (every receiver sees the same order) or "fifo" (D11).

        Raises:
            AddressInUse: The bus has a master. EADDRINUSE.
            InvalidArgument: Not a normal address, or such a bus cannot be. EINVAL.
        """
        where = to_address(address)
        if where.is_kernel or where.is_multicast:
            raise InvalidArgument(f"a bus is bound to a normal address, not to {where}")
        self._endpoint.bind(where, width, order, self._timeout)

    def attach(self, path: str | bytes) -> BusAddress | None:
        """Be on the bus of this path; until its master gives an address only he can be reached.

        The first send to a path does this by itself.

        Returns:
            The master's address, None while the bus has no master.

        Raises:
            NoBus: There is no such bus. ENOENT.
            NoSuchEndpoint: This endpoint is on another bus. EHOSTUNREACH.
        """
        name = to_bytes(path)
        master = self._endpoint.attach(name, self._timeout)["master"]
        return None if master is None else BusAddress(name, master)

    def shutdown(self, how: int) -> None:
        """Close one direction: SHUT_RD, SHUT_WR or SHUT_RDWR (D20).

        What was sent is delivered; later sends are EPIPE. After SHUT_RD nothing is received any
        more: `recv` returns `b""`.
        """
        if how not in (_socket.SHUT_RD, _socket.SHUT_WR, _socket.SHUT_RDWR):
            raise InvalidArgument(f"{how} is not one of SHUT_RD, SHUT_WR, SHUT_RDWR")
        if how != _socket.SHUT_RD:
            self._endpoint.call(Op.SHUTDOWN, self._timeout, how=_socket.SHUT_WR)
        if how != _socket.SHUT_WR:
            self._is_deaf = True

    def close(self) -> None:
        """Leave in good order: what was sent is delivered first (D20). Harmless when repeated."""
        self._endpoint.close()

    def __enter__(self) -> Self:
        """Return the socket; it is closed at the end."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    # sending

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
                beside SCM_TERMS.

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
        parts = buffers if isinstance(buffers, list | tuple) else tuple(buffers)
        timeout = self._send_timeout(flags) if flags else self._timeout
        beside = take_apart(ancdata) if ancdata else _NOTHING
        end = self._endpoint
        kind, dst, _ = end.routes.get(id(address)) or end.find_route(address, timeout)
        if not dst:
            dst = _need_terms(address, beside)
        elif beside.terms is not None:
            raise _too_many_terms(address)
        src = self._source(beside)
        if beside.commands:
            self._command((kind, dst), src, parts, beside, timeout)
        else:
            self._transmit((kind, dst), src, parts, beside, timeout, address)
        return sum(map(_size, parts))

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
        end = self._endpoint
        kind, dst, _ = end.routes.get(id(address)) or end.find_route(address, timeout)
        if not dst:
            _need_terms(address, _NOTHING)
        self._transmit((kind, dst), b"", (data,), _NOTHING, timeout, address)
        return len(data) if type(data) is bytes else _size(data)

    def sendmmsg(
        self,
        messages: Sequence[Buffer],
        address: Address | list[Address],
        flags: int = 0,
        ancdata: Iterable[AncillaryItem] = (),
    ) -> int:
        """Send messages in order; return how many were accepted.

        As sendmmsg(2): after a refusal nothing more is sent; it is raised if nothing was accepted,
        otherwise the next call meets it again.

        Args:
            messages: The bodies.
            address: One for all, or a list with one each; all of one kind.
            flags: As `sendmsg`.
            ancdata: For all of them: SCM_SRC_ADDR, SCM_TERMS.
        """
        end = self._endpoint
        timeout = self._send_timeout(flags) if flags else self._timeout
        beside = take_apart(ancdata) if ancdata else _NOTHING
        if beside.fds or beside.commands or beside.serial or beside.reply_to:
            raise InvalidArgument("only SCM_SRC_ADDR and SCM_TERMS can stand beside many messages")
        several: list[Any] = address if isinstance(address, list) else [address]
        routes = [end.routes.get(id(one)) or end.find_route(one, timeout) for one in several]
        kinds = {kind for kind, _, _ in routes}
        if len(kinds) > 1 or (several is address and len(several) != len(messages)):
            text = "one address for all messages, or one of the same kind for each"
            raise InvalidArgument(f"{len(messages)} messages, {len(several)} addresses: {text}")
        if not messages:
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
        if flags & ~_SEND_FLAGS:
            raise InvalidArgument(f"flags {flags & ~_SEND_FLAGS:#x} mean nothing when sending")
        return 0.0 if flags & _socket.MSG_DONTWAIT else self._timeout

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
    ) -> float | None:
        """Raise why a message was refused; return what is left of the timeout to try it again."""
        end = self._endpoint
        if number == errno.EBADF:
            for descriptor in descriptors:
                _check_open(descriptor)
        if number in _GONE:
            return end.recover(rings, timeout)
        if number == errno.ECONNABORTED:
            end.look_after(rings)
        where = to_address(address)
        if number == errno.EHOSTDOWN and not end.has_master(timeout):
            raise MasterLost(f"nobody owns {where}, and the bus has no master now")
        if number == errno.EHOSTUNREACH and not end.has_joined(timeout):
            text = f"this endpoint has no address on its bus yet: {where} is not its master"
            raise NotJoined(text)
        size = sum(map(_size, parts))
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

    # receiving

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0) -> Received:
        """Receive one message: `(data, ancdata, msg_flags, address)`.

        Args:
            bufsize: What is longer is cut to this, and `msg_flags` has MSG_TRUNC.
            ancbufsize: Room for control items, as CMSG_SPACE counts it; those that do not fit are
                left out, descriptors closed, and `msg_flags` has MSG_CTRUNC.
            flags: MSG_DONTWAIT; MSG_PEEK (the message is received again); MSG_TRUNC (nothing is
                cut, `msg_flags` still tells); MSG_CMSG_CLOEXEC changes nothing, it is always so.

        Returns:
            `ancdata` has, each only where there is one: SCM_RIGHTS; SCM_CREDENTIALS and
            SCM_IDENTITY (with SO_PASSCRED); SCM_TERMS or SCM_DST_ADDR of a multicast; SCM_SERIAL,
            SCM_REPLY_TO, SCM_GAP; the master's commands; SCM_SEQ and SCM_DST_ADDR of all (with
            SO_BUS_DETAILS). `msg_flags` may also have MSG_MONITOR: a monitor's copy (D19).
            `address` is the source.

        Raises:
            RingFull: Nothing is there, and the socket does not wait. EAGAIN.
            DeadlineExceeded: Nothing came for as long as the timeout. ETIMEDOUT.
            MessagesLost: A gap is next, and there is no room for its item. ENOBUFS.
            NotConnected: The agent is gone; the next call connects again. ENOTCONN.
        """
        return self._receive(1, bufsize, ancbufsize, flags)[0]

    def recvmmsg(
        self, count: int, bufsize: int, ancbufsize: int = 0, flags: int = 0
    ) -> list[Received]:
        """Receive 1 to `count` messages: as many as are there. Each as `recvmsg` returns it."""
        if count < 1:
            raise InvalidArgument(f"{count} messages cannot be received")
        return self._receive(count, bufsize, ancbufsize, flags)

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, BusAddress]:
        """Receive one message without its control items: `(data, address)`. As `recvmsg`."""
        message = self._receive(1, bufsize, 0, flags)[0]
        return message[0], message[3]

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """Receive the body of one message. As `recvmsg`."""
        return self._receive(1, bufsize, 0, flags)[0][0]

    def recvfrom_into(
        self, buffer: Buffer, nbytes: int = 0, flags: int = 0
    ) -> tuple[int, BusAddress]:
        """Receive one message into a buffer: `(size, address)`.

        `nbytes` 0 is all of the buffer. With MSG_TRUNC the size is that of the whole message, as
        in recv(2).
        """
        view = memoryview(buffer).cast("B")
        nbytes = nbytes or len(view)
        if not 0 < nbytes <= len(view):
            raise InvalidArgument(f"{nbytes} bytes do not fit into a buffer of {len(view)}")
        data, address = self.recvfrom(nbytes, flags)
        size = min(len(data), nbytes)
        view[:size] = data[:size]
        return len(data), address

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive the body of one message into a buffer; return its size. As `recvfrom_into`."""
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    def recv_loan(self, flags: int = 0) -> Loan | KeptLoan:
        """Receive one message without copying it (R18).

        The loan is the room of the message in the ring: `memoryview(loan)` is the body, read-only;
        `loan.address`, `loan.ancdata` and `loan.flags` are as in `recvmsg`. Give it back soon, by
        `with` or `loan.release()`: what comes behind it waits for its room.

        Args:
            flags: MSG_DONTWAIT.
        """
        if flags & ~_socket.MSG_DONTWAIT:
            raise InvalidArgument(f"flags {flags:#x}: only MSG_DONTWAIT means something for a loan")
        timeout = self._receive_timeout(flags)
        end = self._endpoint
        while True:
            rings = end.rings
            if end.local:
                with suppress(IndexError):  # another thread was faster
                    return KeptLoan(end.local.popleft())
            found = rings.recv_loan(timeout)
            if not isinstance(found, int):
                return found
            if found == -errno.EAGAIN and self._is_deaf:
                return KeptLoan(nothing())
            timeout = self._receive_failed(-found, rings, timeout)

    def _receive_timeout(self, flags: int) -> float | None:
        return 0.0 if flags & _socket.MSG_DONTWAIT or self._is_deaf else self._timeout

    def _receive(self, count: int, bufsize: int, ancbufsize: int, flags: int) -> list[Received]:
        """Receive 1 to `count` messages; a gap is only returned where its item has room."""
        timeout, size, is_peek = self._timeout, bufsize, False
        if flags or self._is_deaf:
            if flags & ~_RECEIVE_FLAGS:
                text = f"flags {flags & ~_RECEIVE_FLAGS:#x} mean nothing when receiving"
                raise InvalidArgument(text)
            timeout = self._receive_timeout(flags)
            is_peek = bool(flags & _socket.MSG_PEEK)
            size = MESSAGE_BYTES if flags & _socket.MSG_TRUNC else bufsize
        if bufsize < 0 or ancbufsize < 0:
            raise InvalidArgument("a buffer cannot have a negative size")
        end = self._endpoint
        while True:
            rings = end.rings
            if end.local and (kept := self._take_local(is_peek)):
                return [fitted(kept, bufsize, size, ancbufsize)]
            found = rings.recv(count, size, ancbufsize, is_peek, timeout)
            if type(found) is list:
                break
            assert isinstance(found, int)
            if found == -errno.EAGAIN and self._is_deaf:
                return [nothing()]
            timeout = self._receive_failed(-found, rings, timeout)
        if size != bufsize:
            return [fitted(message, bufsize, size, ancbufsize) for message in found]
        # A gap for which there is no room comes alone, with its item.
        if ancbufsize < GAP_SPACE and found[0][1]:
            return [fitted(found[0], bufsize, size, ancbufsize), *found[1:]]
        return found

    def _take_local(self, is_peek: bool) -> Received | None:
        """Return the first message that is not in the ring; its descriptors go with it."""
        try:
            if not is_peek:
                return self._endpoint.local.popleft()
            data, items, flags, address = self._endpoint.local[0]
        except IndexError:  # another thread was faster
            return None
        return data, without_descriptors(items), flags, address

    def _receive_failed(self, number: int, rings: Rings, timeout: float | None) -> float | None:
        """Raise why nothing was received; return what is left of the timeout to try it again."""
        if number in _GONE:
            return self._endpoint.recover(rings, timeout)
        if number == errno.EAGAIN:
            raise RingFull("nothing is there to be received")
        if number == errno.ETIMEDOUT:
            raise DeadlineExceeded(f"nothing was received within {timeout:g} s")
        raise error_for(number)

    # options

    def setsockopt(self, level: int, name: int, value: int | Buffer | None) -> None:
        """Set an option: an int, or bytes with a native int in them as in C.

        SOL_SOCKET: SO_PASSCRED. BUS_SOCKET: SO_BUS_DETAILS; SO_BUS_FILTER, an eBPF program (D10),
        None or empty to detach it.

        Raises:
            InvalidArgument: Unknown, read-only, or the value does not fit; SO_RCVBUF and SO_SNDBUF
                are chosen at creation. EINVAL.
        """
        if isinstance(value, int):
            number = int(value)
        elif value is not None and len(memoryview(value)) == _INT.size:
            (number,) = _INT.unpack(value)
        else:
            number = -1
        end = self._endpoint
        match level, name:
            case (control.BUS_SOCKET, control.SO_BUS_FILTER) if not isinstance(value, int):
                program = b"" if value is None else bytes(value)
                if len(program) > _FILTER_BYTES:
                    text = f"filter: more than {FILTER_INSTRUCTIONS} instructions"
                    raise InvalidArgument(text)
                end.set_option(level, name, program or None, self._timeout)
            case (_socket.SOL_SOCKET, _socket.SO_RCVBUF | _socket.SO_SNDBUF):
                text = "the sizes of rings are chosen at creation"
                raise InvalidArgument(f"{text}: afbus.socket(tx_bytes=..., rx_bytes=...)")
            case (_socket.SOL_SOCKET, _socket.SO_PASSCRED) if number in (0, 1):
                end.set_option(level, name, number, self._timeout)
            case (control.BUS_SOCKET, control.SO_BUS_DETAILS) if number in (0, 1):
                end.set_details(bool(number))
            case _:
                text = f"option {name} of level {level} cannot be set to {value!r}"
                raise InvalidArgument(text)

    def getsockopt(self, level: int, name: int, buflen: int = 0) -> int | bytes:
        """Return an option: an int, or with `buflen` bytes of at most that size.

        SOL_SOCKET: SO_PASSCRED, SO_RCVBUF, SO_SNDBUF (sizes of the rings), SO_TYPE, SO_DOMAIN,
        SO_PROTOCOL, SO_ERROR. BUS_SOCKET: SO_BUS_DETAILS; as bytes only SO_BUS_ADDRESSES and
        SO_BUS_MASTER (`struct sockaddr_bus`, one behind the other), SO_BUS_STATE and SO_BUS_STATS
        (msgpack). `addresses`, `master`, `state` and `stats` return the same as values.

        Raises:
            InvalidArgument: Unknown, or longer than `buflen`. EINVAL.
        """
        end = self._endpoint
        data = number = None
        match level, name:
            case (control.BUS_SOCKET, control.SO_BUS_ADDRESSES):
                data = b"".join(address.pack() for address in self.addresses())
            case (control.BUS_SOCKET, control.SO_BUS_MASTER):
                master = self.master()
                data = b"" if master is None else master.pack()
            case (control.BUS_SOCKET, control.SO_BUS_STATE):
                data = codec.encode(self.state())
            case (control.BUS_SOCKET, control.SO_BUS_STATS):
                data = codec.encode(self.stats())
            case (control.BUS_SOCKET, control.SO_BUS_DETAILS):
                number = int(end.has_details)
            case (_socket.SOL_SOCKET, _) if name in _SOCKET_OPTIONS:
                number = _SOCKET_OPTIONS[name](end)
            case _:
                raise InvalidArgument(f"option {name} of level {level} cannot be read")
        if number is not None:
            if buflen == 0:
                return number
            data = _INT.pack(number)
        assert data is not None
        if len(data) > buflen:
            text = f"option {name} has {len(data)} bytes, buflen is {buflen}"
            raise InvalidArgument(f"{text}; see also addresses(), master(), state(), stats()")
        return data

    def addresses(self) -> list[BusAddress]:
        """Return the owned addresses, oldest first."""
        return self._endpoint.ask_addresses(self._timeout)

    def master(self) -> BusAddress | None:
        """Return the address of the bus's master, None while there is none."""
        packed = self._ask(control.SO_BUS_MASTER)
        return None if packed is None else BusAddress.unpack(packed)

    def state(self) -> dict[str, Any]:
        """Return the state of agent, master and links (D16)."""
        found: dict[str, Any] = self._ask(control.SO_BUS_STATE)
        return found

    def stats(self) -> dict[str, int]:
        """Return the counters of the endpoint."""
        found: dict[str, int] = self._ask(control.SO_BUS_STATS)
        return found

    def _ask(self, name: int) -> Any:
        return self._endpoint.call(
            Op.OPTION_GET, self._timeout, level=control.BUS_SOCKET, name=name
        )

    def getsockname(self) -> BusAddress:
        """Return the first owned address, or the provisional one while there is none.

        Raises:
            NotJoined: The endpoint is on no bus yet. EHOSTUNREACH.
        """
        end = self._endpoint
        if owned := self.addresses():
            return owned[0]
        if end.path is None:
            raise NotJoined("the socket is on no bus yet: bind it, or send to a bus's master")
        return BusAddress(end.path, end.welcome.provisional)

    @property
    def was_cut_off(self) -> bool:
        """Whether the agent had put this endpoint off when it was lost the last time.

        False when the agent itself was gone.
        """
        return self._endpoint.was_cut_off

    @property
    def path(self) -> bytes | None:
        """The bus that the endpoint is on, None before the first send or `bind`."""
        return self._endpoint.path

    # the agent, for tools

    def listing(self, what: str, path: str | bytes | None = None) -> list[dict[str, Any]]:
        """Return all rows of `buses`, `endpoints`, `addresses`, `matches` or `queues`."""
        rows: list[dict[str, Any]] = []
        args: dict[str, Any] = {"what": what, "path": None if path is None else to_bytes(path)}
        after: int | None = 0
        while after is not None:
            page = self._endpoint.call(Op.LIST, self._timeout, after=after, **args)
            rows += page["rows"]
            after = page["next"]
        return rows

    def status(self) -> dict[str, Any]:
        """Return what the agent says of itself."""
        found: dict[str, Any] = self._endpoint.call(Op.STATUS, self._timeout)
        return found

    # waiting

    def settimeout(self, timeout: float | None) -> None:
        """Set how long calls wait, in seconds: None without end, 0 not at all."""
        if timeout is not None and not timeout >= 0:
            raise InvalidArgument(f"a timeout of {timeout} s cannot be")
        self._timeout = None if timeout is None else float(timeout)

    def gettimeout(self) -> float | None:
        """Return how long calls wait, in seconds."""
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        """Wait without end, or not at all."""
        self.settimeout(None if flag else 0.0)

    def getblocking(self) -> bool:
        """Return whether calls wait."""
        return self.gettimeout() != 0.0

    def fileno(self) -> int:
        """Return the descriptor for select, poll, epoll and asyncio; -1 when closed.

        POLLIN: there is something to read. POLLOUT: the last send was not refused for want of room,
        or there is room again. POLLHUP: the agent is gone. The number never changes; but after
        NotConnected epoll (and so asyncio) must be given it anew, because the line behind it is
        another one.
        """
        return self._endpoint.make_pollable()

    def __repr__(self) -> str:
        """Return number, provisional address and bus."""
        return f"<afbus.Socket {self._endpoint!r}>"

    def __del__(self) -> None:
        """Warn of a socket that nobody closed, as Python's own does."""
        # Absent when the agent could not be reached.
        endpoint = self.__dict__.get("_endpoint")
        if endpoint is not None and not endpoint.is_closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            endpoint.abort()


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


def socket(
    *,
    node: str | os.PathLike[str] | None = None,
    tx_bytes: int = TX_RING_BYTES,
    rx_bytes: int = RX_RING_BYTES,
) -> Socket:
    """Return a new socket of the bus; arguments and errors as of `Socket`."""
    return Socket(node=node, tx_bytes=tx_bytes, rx_bytes=rx_bytes)
