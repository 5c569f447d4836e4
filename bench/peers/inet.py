"""Plain sockets between hosts: TCP, TLS on it, UDP. No bus, and but for TLS no encryption.

What UDP loses is not counted.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final

from ..meter import take_counted, take_each
from ..wire import BATCH, KIB, MIB, BlockingWire, End, System

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..stage import Player, Stage
    from ..wire import Traffic

PORT: Final = 47_110
_BUFFER_BYTES: Final = 4 * MIB
#: The largest datagram in which longer messages are cut.
DATAGRAM_BYTES: Final = 32 * KIB


class TcpWire(BlockingWire):
    """A connection, on which a message is as many bytes as all others."""

    def __init__(self, stage: Stage, traffic: Traffic, is_secure: bool = False) -> None:
        """Make certificates where they are needed."""
        super().__init__(stage, traffic)
        self._made = None
        if is_secure:
            from ..certificate import certify

            self._made = certify(stage.folder, stage.address("sink"))

    @contextlib.contextmanager
    def _stream(self, role: str, player: Player) -> Iterator[Any]:
        """Return the stream; the far end says that it is ready when it listens."""
        place = (self.stage.address("sink"), PORT)
        is_far = role not in ("ping", "source")
        if is_far:
            with socket.create_server(place) as listener:
                player.tell_ready()
                made, _ = listener.accept()
        else:
            made = socket.create_connection(place)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with made:
            if self._made is None:
                yield made
            else:
                with self._secure(made, is_far) as secured:
                    yield secured

    def _secure(self, made: socket.socket, is_far: bool) -> ssl.SSLSocket:
        assert self._made is not None
        if is_far:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._made.certificate, self._made.key)
            return context.wrap_socket(made, server_side=True)
        context = ssl.create_default_context(cafile=self._made.authority)
        return context.wrap_socket(made, server_hostname=self.stage.address("sink"))

    @contextlib.contextmanager
    def end(self, role: str, player: Player) -> Iterator[End]:
        """Return an end."""
        with self._stream(role, player) as made:
            yield TcpEnd(made, self.traffic.size)

    def echo(self, player: Player) -> None:
        """Send back what comes."""
        with self.end("echo", player) as end:
            player.await_cue()
            while True:
                end.send(end.receive())

    def sink(self, player: Player, number: int) -> None:
        """Receive one message after the other."""
        with self.end(f"sink{number}", player) as end:
            take_each(player.await_cue(), end.receive, self.traffic.chunk)


class CutTcpWire(TcpWire):
    """A connection on which users write many messages at once; they cost the reader nothing."""

    def source(self, player: Player) -> None:
        """Write parts."""
        with self._stream("source", player) as made:
            part = bytes(max(64 * BATCH, self.traffic.size))
            player.ready()
            for _ in repeat(None):
                made.sendall(part)

    def sink(self, player: Player, number: int) -> None:
        """Read what is there."""
        size, rest = self.traffic.size, 0
        with self._stream(f"sink{number}", player) as made:

            def take() -> int:
                nonlocal rest
                count, rest = divmod(rest + len(made.recv(64 * KIB)), size)
                return count

            take_counted(player.await_cue(), take)


class TcpEnd(End):
    """An end of a connection."""

    def __init__(self, made: Any, size: int) -> None:
        """Send and receive messages of a size."""
        self._made, self._size = made, size
        self.send = made.sendall
        self.receive = partial(made.recv, size, socket.MSG_WAITALL)
        if isinstance(made, ssl.SSLSocket):
            self.receive = self._receive_parts

    def _receive_parts(self) -> bytes:
        data: bytes = self._made.recv(self._size)
        while len(data) < self._size:
            data += self._made.recv(self._size - len(data))
        return data


class UdpWire(BlockingWire):
    """Datagrams; a message larger than those is several."""

    @contextlib.contextmanager
    def end(self, role: str, player: Player) -> Iterator[End]:
        """Return an end."""
        here, there = self.stage.address("sink"), self.stage.address("source")
        ports = (PORT, PORT + 1)
        if role in ("ping", "source"):
            here, there, ports = there, here, (PORT + 1, PORT)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                made.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
            made.bind((here, ports[0]))
            made.connect((there, ports[1]))
            yield UdpEnd(made, self.traffic.size)


class UdpEnd(End):
    """An end of datagrams."""

    def __init__(self, made: socket.socket, size: int) -> None:
        """Send and receive."""
        self._made = made
        self._parts = max(1, size // DATAGRAM_BYTES)
        self._size = size // self._parts
        self.send, self.receive = made.send, partial(made.recv, size)
        if self._parts > 1:
            self.send, self.receive = self._send_parts, self._receive_parts

    def _send_parts(self, body: bytes) -> int:
        for at in range(0, len(body), self._size):
            self._made.send(body[at : at + self._size])
        return len(body)

    def _receive_parts(self) -> bytes:
        return b"".join(self._made.recv(self._size) for _ in range(self._parts))


TCP: Final = System("tcp", TcpWire, is_yardstick=True)
CUT_TCP: Final = System("tcp, cut by its users", CutTcpWire, is_yardstick=True)
TLS: Final = System("tls", partial(TcpWire, is_secure=True), ("cryptography",), is_yardstick=True)
UDP: Final = System("udp", UdpWire, is_yardstick=True)
