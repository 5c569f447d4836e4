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

import socket as _socket
import struct
import warnings
from typing import TYPE_CHECKING, Any, Final, Self

from ..proto import codec, control
from ..proto.address import AF_BUS, BusAddress
from ..proto.errors import InvalidArgument, NotJoined
from ..proto.frames import Op
from ..proto.limits import (
    BLOOM_BITS_DEFAULT,
    FILTER_INSTRUCTION_BYTES,
    FILTER_INSTRUCTIONS,
    RING_BYTES_MIN,
    RX_RING_BYTES,
    TX_RING_BYTES,
)
from ..proto.text import to_bytes
from .endpoint import Endpoint, to_address
from .receiving import Receiving
from .sending import Sending

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from typing_extensions import Buffer

    from .proof import Proof
    from .sending import Address

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


class Socket(Sending, Receiving):
    """One endpoint of a bus.

    Not bound and not attached to a bus at first: `bind` makes a bus, the first send joins one.
    One thread may send while another one receives. Several that send (or receive) take turns: one
    that does not wait is RingFull (EAGAIN) while another is in the midst of a call; a socket for
    each thread has no such refusals.

    The descriptors of received SCM_RIGHTS items are the caller's, to close.

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
        self._peer: BusAddress | None = None
        self._is_deaf = False
        self._endpoint = Endpoint(node, tx_bytes, rx_bytes)
        self._use_rings()

    # the life of a socket

    def bind(
        self,
        address: Address,
        *,
        width: int = BLOOM_BITS_DEFAULT,
        order: str | None = None,
        scope: str = "host",
    ) -> None:
        """Create the bus of this path, own the address on it, and be its master (R6).

        Args:
            address: A normal address.
            width: Bits of its multicast addresses: 512, 1024 or 2048 (D8).
            order: "fifo" (each sender's order, which lets messages go without the agent) or "total"
                (every receiver sees the same order; on one host only); by default fifo, or what the
                bus has already (D11).
            scope: "host", or "cluster": a bus that endpoints of all nodes can be on (D2).

        Raises:
            AddressInUse: The bus has a master. EADDRINUSE.
            Denied: The policy of the cluster does not allow it. EPERM.
            MasterLost: The cluster's master cannot be reached. EHOSTDOWN.
            InvalidArgument: Not a normal address, or such a bus cannot be. EINVAL.
        """
        where = to_address(address)
        if where.is_kernel or where.is_multicast:
            raise InvalidArgument(f"a bus is bound to a normal address, not to {where}")
        options: dict[str, str | int] = {"width": width, "scope": scope}
        if order is not None or scope == "cluster":
            options["order"] = order or "fifo"
        self._endpoint.bind(where, options, self._timeout)

    def prove(self, proof: Proof) -> str:
        """Be the principal of a certificate on the buses of the cluster, instead of a user.

        To be called before `attach`, `bind` and the first send. It is done again when the agent
        had to begin anew.

        Returns:
            The name of the principal, as others read it in SCM_IDENTITY.

        Raises:
            Denied: The certificate or its key is not good, or was revoked. EPERM.
            MasterLost: The cluster's master is away. EHOSTDOWN.
            InvalidArgument: The agent is in no cluster, or this socket is on a bus. EINVAL.
        """
        return self._endpoint.prove(proof, self._timeout)

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
        more: `recv` returns `b""`, and calls that return an address return None as that.
        """
        if how not in (_socket.SHUT_RD, _socket.SHUT_WR, _socket.SHUT_RDWR):
            raise InvalidArgument(f"{how} is not one of SHUT_RD, SHUT_WR, SHUT_RDWR")
        if how != _socket.SHUT_RD:
            self._endpoint.call(Op.SHUTDOWN, self._timeout, how=_socket.SHUT_WR)
        if how != _socket.SHUT_WR:
            self._is_deaf = True
            self._use_rings()

    def close(self) -> None:
        """Leave in good order: what was sent is delivered first (D20). Harmless when repeated."""
        self._endpoint.close()

    def __enter__(self) -> Self:
        """Return the socket; it is closed at the end."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    # options

    def setsockopt(self, level: int, name: int, value: int | Buffer | None) -> None:
        """Set an option: an int, or bytes with a native int in them as in C.

        SOL_SOCKET: SO_PASSCRED; SO_RCVBUF and SO_SNDBUF, the sizes of the rings, rounded up to a
        power of two, only while the socket is on no bus. BUS_SOCKET: SO_BUS_DETAILS; SO_BUS_FILTER,
        an eBPF program (D10), None or empty to detach it.

        Raises:
            InvalidArgument: Unknown, read-only, or the value does not fit. EINVAL.
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
            case (_socket.SOL_SOCKET, _socket.SO_SNDBUF) if number > 0:
                end.resize(_rounded(number), end.welcome.rx_bytes)
            case (_socket.SOL_SOCKET, _socket.SO_RCVBUF) if number > 0:
                end.resize(end.welcome.tx_bytes, _rounded(number))
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
        """Return the state of agent, master and links (D16).

        On a bus of the cluster `cluster` says whether its node reaches the cluster's master:
        "here", "away" (for less than 2 s) or "lost"; and `lost_nodes` which nodes it has lost.
        """
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
        """Return all rows of `buses`, `endpoints`, `addresses`, `matches`, `queues` or `lanes`."""
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
        self._wait_for(self._timeout)

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


def _rounded(size: int) -> int:
    """Return the size of the smallest ring that holds so much."""
    return max(RING_BYTES_MIN, 1 << (size - 1).bit_length())


def socket(
    *,
    node: str | os.PathLike[str] | None = None,
    tx_bytes: int = TX_RING_BYTES,
    rx_bytes: int = RX_RING_BYTES,
) -> Socket:
    """Return a new socket of the bus; arguments and errors as of `Socket`."""
    return Socket(node=node, tx_bytes=tx_bytes, rx_bytes=rx_bytes)
