"""One UDP socket, with what Linux has against one system call a datagram.

Sending: neighbours of one size and destination leave in one call (UDP_SEGMENT, GSO). Receiving:
the kernel may hand over several at once (UDP_GRO). Where either is missing it is not used.

Ownership: the socket belongs to the `UdpSocket`, until `close`.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..proto.errors import AddressInUse, InvalidArgument, LinkError
from ..proto.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Host and port; with flow and scope too for IPv6, as the socket module has it.
Address: TypeAlias = Any

#: Both buffers of the socket: the default of 208 KiB drops thousands of packets in a burst.
BUFFER_BYTES: Final = 4 * MIB
#: Datagrams that one call may carry, and their bytes (the limits of Linux).
SEGMENTS: Final = 64
SEGMENTED_BYTES: Final = 65_000
#: Headers that are not ours: IPv6 and UDP.
HEADER_BYTES: Final = 48
#: The smallest datagram that QUIC allows for, and the largest that is worth its buffers.
DATAGRAM_BYTES_MIN: Final = 1200
DATAGRAM_BYTES_MAX: Final = 16_000
#: What a path that is not this host is trusted with, when the link to the next hop has more.
PATH_BYTES_MAX: Final = 9_000
#: Datagrams of one turn; then others get their turn.
_TURN: Final = 64

_UDP_SEGMENT: Final = 103
_UDP_GRO: Final = 104
_IP_MTU: Final = 14
_IPV6_MTU: Final = 24
#: IPv4 as a socket of IPv6 sees it.
_MAPPED: Final = "::ffff:"
_U16: Final = struct.Struct("=H")
_CONTROL_BYTES: Final = socket.CMSG_SPACE(4)
#: Errors of one datagram: the carrier's loss recovery deals with them. EINVAL and EACCES are how
#: the kernel says that this address cannot be reached from the bound one.
_LOST: Final = frozenset(
    {
        errno.EINVAL,
        errno.EACCES,
        errno.EMSGSIZE,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.ECONNREFUSED,
        errno.EPERM,
        errno.ENOBUFS,
        errno.EADDRNOTAVAIL,
        errno.EHOSTDOWN,
        errno.ENETDOWN,
    }
)


def family_of(host: str) -> socket.AddressFamily:
    """Return the family of a numeric address.

    Raises:
        InvalidArgument: It is a name; resolve it first, this would block. EINVAL.
    """
    try:
        version = ipaddress.ip_address(host.partition("%")[0]).version
    except ValueError as error:
        raise InvalidArgument(f"{host!a} is not a numeric address") from error
    return socket.AF_INET if version == 4 else socket.AF_INET6


def is_numeric(host: str) -> bool:
    """Tell whether a host is an address, and no name."""
    try:
        family_of(host)
    except InvalidArgument:
        return False
    return True


def show_address(address: Address) -> str:
    """Return an address for people: one of IPv4 as such, also where IPv6 hears it."""
    return f"{address[0].removeprefix(_MAPPED)} port {address[1]}"


def path_bytes(address: Address) -> int:
    """Return the size of datagrams that the way to an address allows for; sends nothing.

    The kernel knows the mtu of its own link, and what routers have told it. Without an answer
    it is the smallest.
    """
    host, port = address[0].removeprefix(_MAPPED), address[1]
    family = family_of(host)
    level, option = (
        (socket.IPPROTO_IP, _IP_MTU)
        if family is socket.AF_INET
        else (socket.IPPROTO_IPV6, _IPV6_MTU)
    )
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            mtu = probe.getsockopt(level, option)
    except OSError:
        return DATAGRAM_BYTES_MIN
    is_here = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    most = DATAGRAM_BYTES_MAX if is_here else PATH_BYTES_MAX
    return max(DATAGRAM_BYTES_MIN, min(mtu - HEADER_BYTES, most))


def look_up(host: str, port: int, family: socket.AddressFamily) -> Address:
    """Look a name up, and return its first address; blocks.

    Raises:
        LinkError: It has none, or nobody knows now.
    """
    try:
        found = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise LinkError(f"{host!a} is not known: {why}") from error
    return found[0][4]


class UdpSocket:
    """A bound, non-blocking UDP socket."""

    def __init__(self, host: str, port: int) -> None:
        """Bind to a numeric address; port 0 takes a free one, `::` hears IPv4 too.

        Raises:
            AddressInUse: Another process has this port. EADDRINUSE.
            LinkError: The address cannot be bound: it is none of this host, or not for this user.
            InvalidArgument: The host is a name. EINVAL.
        """
        self._family = family_of(host)
        try:
            self._sock = socket.socket(self._family, socket.SOCK_DGRAM)
        except OSError as error:
            raise LinkError(f"cannot bind {host}: {error.strerror}") from error
        try:
            self._sock.setblocking(False)
            if self._family is socket.AF_INET6:
                self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                self._sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
            self._sock.bind((host, port))
        except OSError as error:
            self._sock.close()
            text = f"cannot bind {host} port {port}: {error.strerror}"
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(text) from error
            raise LinkError(text) from error
        self.has_gso = self._try_option(_UDP_SEGMENT, 0)
        self._has_gro = self._try_option(_UDP_GRO, 1)
        #: Datagrams that the kernel did not take: a path too small, a full buffer.
        self.unsent = 0

    def _try_option(self, option: int, value: int) -> bool:
        try:
            self._sock.setsockopt(socket.IPPROTO_UDP, option, value)
        except OSError:
            return False
        return True

    @property
    def address(self) -> Address:
        """The bound address."""
        return self._sock.getsockname()

    def fileno(self) -> int:
        """Return the descriptor, to wait on; it stays the socket's."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def find(self, host: str, port: int) -> Address:
        """Look a name up, and return its first address that can be reached; blocks.

        Raises:
            LinkError: It has none, or nobody knows now.
        """
        family = self._family if self._family is socket.AF_INET else socket.AF_UNSPEC
        return self.to_peer(str(look_up(host, port, family)[0]), port)

    def to_peer(self, host: str, port: int) -> Address:
        """Return a numeric address as this socket sees it in what it receives.

        Raises:
            LinkError: It cannot be reached from here.
        """
        if not 0 < port < 65_536:
            raise LinkError(f"{host} has no port {port}")
        if self._family is socket.AF_INET6:
            mapped = f"{_MAPPED}{host}" if family_of(host) is socket.AF_INET else host
            return (mapped, port, 0, 0)
        if family_of(host) is not socket.AF_INET:
            raise LinkError(f"{host} cannot be reached from an IPv4 address")
        return (host, port)

    def send(self, datagrams: Sequence[tuple[bytes, Address]]) -> None:
        """Send datagrams, as many as fit in one call each time.

        What the kernel does not take is counted in `unsent` and lost, as on any network.
        """
        start = 0
        while start < len(datagrams):
            first, address = datagrams[start]
            end = start + 1
            if self.has_gso:
                size, total = len(first), len(first)
                while end < len(datagrams) and end - start < SEGMENTS:
                    data, other = datagrams[end]
                    total += len(data)
                    if other != address or len(data) > size or total > SEGMENTED_BYTES:
                        break
                    end += 1
                    if len(data) < size:
                        # A short one can only be the last.
                        break
            batch = [data for data, _ in datagrams[start:end]]
            if len(batch) == 1 or not self._send_segmented(batch, address):
                for data in batch:
                    self._send_one(data, address)
            start = end

    def _send_segmented(self, batch: list[bytes], address: Address) -> bool:
        control = (socket.IPPROTO_UDP, _UDP_SEGMENT, _U16.pack(len(batch[0])))
        try:
            self._sock.sendmsg(batch, [control], 0, address)
        except BlockingIOError:
            self.unsent += len(batch)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EIO, errno.EMSGSIZE):
                # This path does not do it: larger than its mtu, or a device without checksums.
                return False
            if error.errno not in _LOST:
                raise
            self.unsent += len(batch)
        return True

    def _send_one(self, data: bytes, address: Address) -> None:
        try:
            self._sock.sendto(data, address)
        except BlockingIOError:
            self.unsent += 1
        except OSError as error:
            if error.errno not in _LOST:
                raise
            self.unsent += 1

    def receive(self) -> list[tuple[bytes, Address]]:
        """Return what has arrived, at most one turn of it; empty if there is nothing."""
        received: list[tuple[bytes, Address]] = []
        while len(received) < _TURN:
            try:
                data, control, _, address = self._sock.recvmsg(65_536, _CONTROL_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                # An ICMP answer to something sent earlier; it says nothing about who is next.
                if error.errno not in _LOST:
                    raise
                continue
            size = len(data)
            for level, kind, value in control:
                if level == socket.IPPROTO_UDP and kind == _UDP_GRO:
                    size = _U16.unpack_from(value)[0]
            if size >= len(data):
                received.append((data, address))
            else:
                received += [
                    (data[start : start + size], address) for start in range(0, len(data), size)
                ]
        return received
