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
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, overload

from ..proto.address import AF_BUS, BusAddress
from ..proto.limits import BLOOM_BITS_DEFAULT, RX_RING_BYTES, TX_RING_BYTES

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

    from .._datapath import Loan, Received

#: What is taken where an address is asked for.
Address: TypeAlias = "BusAddress | tuple[str | bytes, str | bytes] | str"

#: One control item as Python has it: level, type, data.
AncillaryItem: TypeAlias = "tuple[int, int, Buffer]"


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
        raise NotImplementedError

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
        raise NotImplementedError

    def attach(self, path: str | bytes) -> BusAddress | None:
        """Be on the bus of this path; until its master gives an address only he can be reached.

        The first send to a path does this by itself.

        Returns:
            The master's address, None while the bus has no master.

        Raises:
            NoBus: There is no such bus. ENOENT.
            NoSuchEndpoint: This endpoint is on another bus. EHOSTUNREACH.
        """
        raise NotImplementedError

    def shutdown(self, how: int) -> None:
        """Close one direction: SHUT_RD, SHUT_WR or SHUT_RDWR (D20).

        What was sent is delivered; later sends are EPIPE. After SHUT_RD nothing is received any
        more: `recv` returns `b""`.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Leave in good order: what was sent is delivered first (D20). Harmless when repeated."""
        raise NotImplementedError

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
        raise NotImplementedError

    @overload
    def sendto(self, data: Buffer, address: Address, /) -> int: ...
    @overload
    def sendto(self, data: Buffer, flags: int, address: Address, /) -> int: ...
    def sendto(self, data: Buffer, *args: Any) -> int:
        """Send one message: `sendto(data, [flags,] address)`. As `sendmsg` without control items."""
        raise NotImplementedError

    def sendmmsg(
        self,
        messages: Sequence[Buffer],
        address: Address | Sequence[Address],
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
        raise NotImplementedError

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
            SCM_IDENTITY (with SO_PASSCRED); SCM_TERMS, SCM_SERIAL, SCM_REPLY_TO, SCM_GAP; the
            master's commands; SCM_SEQ and SCM_DST_ADDR (with SO_BUS_DETAILS). `msg_flags` may also
            have MSG_MONITOR: a monitor's copy (D19). `address` is the source.

        Raises:
            RingFull: Nothing is there, and the socket does not wait. EAGAIN.
            DeadlineExceeded: Nothing came for as long as the timeout. ETIMEDOUT.
            MessagesLost: A gap is next, and there is no room for its item. ENOBUFS.
            NotConnected: The agent is gone; the next call connects again. ENOTCONN.
        """
        raise NotImplementedError

    def recvmmsg(
        self, count: int, bufsize: int, ancbufsize: int = 0, flags: int = 0
    ) -> list[Received]:
        """Receive 1 to `count` messages: as many as are there. Each as `recvmsg` returns it."""
        raise NotImplementedError

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, BusAddress]:
        """Receive one message without its control items: `(data, address)`. As `recvmsg`."""
        raise NotImplementedError

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """Receive the body of one message. As `recvmsg`."""
        raise NotImplementedError

    def recvfrom_into(
        self, buffer: Buffer, nbytes: int = 0, flags: int = 0
    ) -> tuple[int, BusAddress]:
        """Receive one message into a buffer: `(size, address)`.

        `nbytes` 0 is all of the buffer. With MSG_TRUNC the size is that of the whole message, as
        in recv(2).
        """
        raise NotImplementedError

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive the body of one message into a buffer; return its size. As `recvfrom_into`."""
        raise NotImplementedError

    def recv_loan(self, flags: int = 0) -> Loan:
        """Receive one message without copying it (R18).

        The loan is the room of the message in the ring: `memoryview(loan)` is the body, read-only;
        `loan.address`, `loan.ancdata` and `loan.flags` are as in `recvmsg`. Give it back soon, by
        `with` or `loan.release()`: what comes behind it waits for its room.

        Args:
            flags: MSG_DONTWAIT.
        """
        raise NotImplementedError

    # options

    def setsockopt(self, level: int, name: int, value: int | Buffer | None) -> None:
        """Set an option: an int, or bytes with a native int in them as in C.

        SOL_SOCKET: SO_PASSCRED. BUS_SOCKET: SO_BUS_DETAILS; SO_BUS_FILTER, an eBPF program (D10),
        None or empty to detach it.

        Raises:
            InvalidArgument: Unknown, read-only, or the value does not fit; SO_RCVBUF and SO_SNDBUF
                are chosen at creation. EINVAL.
        """
        raise NotImplementedError

    def getsockopt(self, level: int, name: int, buflen: int = 0) -> int | bytes:
        """Return an option: an int, or with `buflen` bytes of at most that size.

        SOL_SOCKET: SO_PASSCRED, SO_RCVBUF, SO_SNDBUF (sizes of the rings), SO_TYPE, SO_DOMAIN,
        SO_PROTOCOL, SO_ERROR. BUS_SOCKET: SO_BUS_DETAILS; as bytes only SO_BUS_ADDRESSES and
        SO_BUS_MASTER (`struct sockaddr_bus`, one behind the other), SO_BUS_STATE and SO_BUS_STATS
        (msgpack). `addresses`, `master`, `state` and `stats` return the same as values.

        Raises:
            InvalidArgument: Unknown, or longer than `buflen`. EINVAL.
        """
        raise NotImplementedError

    def addresses(self) -> list[BusAddress]:
        """Return the owned addresses, oldest first."""
        raise NotImplementedError

    def master(self) -> BusAddress | None:
        """Return the address of the bus's master, None while there is none."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return the state of agent, master and links (D16)."""
        raise NotImplementedError

    def stats(self) -> dict[str, int]:
        """Return the counters of the endpoint."""
        raise NotImplementedError

    def getsockname(self) -> BusAddress:
        """Return the first owned address, or the provisional one while there is none.

        Raises:
            NotJoined: The endpoint is on no bus yet. EHOSTUNREACH.
        """
        raise NotImplementedError

    @property
    def path(self) -> bytes | None:
        """The bus that the endpoint is on, None before the first send or `bind`."""
        raise NotImplementedError

    # the agent, for tools

    def listing(self, what: str, path: str | bytes | None = None) -> list[dict[str, Any]]:
        """Return all rows of `buses`, `endpoints`, `addresses`, `matches` or `queues`."""
        raise NotImplementedError

    def status(self) -> dict[str, Any]:
        """Return what the agent says of itself."""
        raise NotImplementedError

    # waiting

    def settimeout(self, timeout: float | None) -> None:
        """Set how long calls wait, in seconds: None without end, 0 not at all."""
        raise NotImplementedError

    def gettimeout(self) -> float | None:
        """Return how long calls wait, in seconds."""
        raise NotImplementedError

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
        raise NotImplementedError


def socket(
    *,
    node: str | os.PathLike[str] | None = None,
    tx_bytes: int = TX_RING_BYTES,
    rx_bytes: int = RX_RING_BYTES,
) -> Socket:
    """Return a new socket of the bus; arguments and errors as of `Socket`."""
    return Socket(node=node, tx_bytes=tx_bytes, rx_bytes=rx_bytes)
