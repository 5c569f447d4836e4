"""A seeded UDP proxy: what it does to datagrams on their way, a real network does too."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


@dataclass
class Way:
    """One direction; may be changed at any time.

    Attributes:
        delay_s: How long a datagram takes.
        jitter_s: More of it, at random: so they overtake each other.
        loss: Probability that one is lost.
        twice: Probability that one comes twice.
        corrupt: Probability that one comes with a byte changed.
        is_cut: Nothing passes.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    twice: float = 0.0
    corrupt: float = 0.0
    is_cut: bool = False
    #: Datagrams that have come here.
    count: int = 0


class Relay:
    """Stands between those who call `address` and one server; each caller has a port of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: Any, seed: int = 0) -> None:
        self.to_server = Way()
        self.to_client = Way()
        self._loop = loop
        self._target = target
        self._random = Random(seed)
        self._backs: dict[Any, socket.socket] = {}
        self._front = self._bind(self._receive_front)

    @property
    def address(self) -> Any:
        """Where clients call."""
        return self._front.getsockname()

    def move(self) -> None:
        """Give each client another port towards the server, as a router does that was restarted."""
        for client in list(self._backs):
            self._unbind(self._backs.pop(client))
            self._open_back(client)

    def close(self) -> None:
        """Close all ports."""
        for port in (self._front, *self._backs.values()):
            self._unbind(port)

    def _bind(self, receive: Callable[[bytes, Any], None]) -> socket.socket:
        port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        port.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            port.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        port.bind(("127.0.0.1", 0))

        def drain() -> None:
            for _ in range(64):
                try:
                    data, address = port.recvfrom(65_536)
                except BlockingIOError:
                    return
                except ConnectionError:
                    continue
                receive(data, address)

        self._loop.add_reader(port, drain)
        return port

    def _unbind(self, port: socket.socket) -> None:
        self._loop.remove_reader(port)
        port.close()

    def _open_back(self, client: Any) -> socket.socket:
        def receive(data: bytes, _: Any) -> None:
            self._pass(self.to_client, data, lambda data: self._send(self._front, data, client))

        back = self._backs[client] = self._bind(receive)
        return back

    def _receive_front(self, data: bytes, client: Any) -> None:
        if client not in self._backs:
            self._open_back(client)
        back = self._backs

        def send(data: bytes) -> None:
            if client in back:
                self._send(back[client], data, self._target)

        self._pass(self.to_server, data, send)

    def _send(self, port: socket.socket, data: bytes, address: Any) -> None:
        # A full buffer is one more way to lose a datagram.
        with contextlib.suppress(OSError):
            port.sendto(data, address)

    def _pass(self, way: Way, data: bytes, send: Callable[[bytes], None]) -> None:
        way.count += 1
        chance = self._random.random
        copies = 0 if way.is_cut or chance() < way.loss else 1 + (chance() < way.twice)
        for _ in range(copies):
            if chance() < way.corrupt:
                place = self._random.randrange(len(data))
                data = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
            delay_s = way.delay_s + way.jitter_s * chance()
            if delay_s:
                self._loop.call_later(delay_s, send, data)
            else:
                send(data)
