"""A client that is plain aioquic: it does what ours never would."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Any

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from aioquic.quic.events import QuicEvent
    from aioquic.tls import SessionTicket

    from afbus.link.credentials import Credentials


class Stranger:
    """One connection, from a socket of its own, in the loop of the world."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        address: Any,
        *,
        protocols: tuple[str, ...] = ("afbus/1",),
        credentials: Credentials | None = None,
        ticket: SessionTicket | None = None,
        on_ticket: Callable[[SessionTicket], None] | None = None,
        early: bytes = b"",
    ) -> None:
        configuration = QuicConfiguration(
            is_client=True,
            alpn_protocols=list(protocols),
            verify_mode=ssl.CERT_NONE,
            session_ticket=ticket,
        )
        if credentials is not None:
            certificates: Any = credentials.certificates
            configuration.certificate = certificates[0]
            configuration.certificate_chain = list(certificates[1:])
            configuration.private_key = credentials.key
        self.quic = QuicConnection(configuration=configuration, session_ticket_handler=on_ticket)
        self.events: list[QuicEvent] = []
        self._loop = loop
        self._port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._port.setblocking(False)
        self._port.bind(("127.0.0.1", 0))
        self._timer: asyncio.TimerHandle | None = None
        loop.add_reader(self._port, self._receive)
        self.quic.connect(address, loop.time())
        if early:
            self.quic.send_stream_data(2, early)
        self.transmit()

    def send(self, stream: int, data: bytes, end: bool = False) -> None:
        """Send on a stream."""
        self.quic.send_stream_data(stream, data, end)
        self.transmit()

    def has(self, kind: type[QuicEvent]) -> Callable[[], bool]:
        """Something to wait for."""
        return lambda: any(isinstance(event, kind) for event in self.events)

    @property
    def is_through(self) -> bool:
        """Whether its handshake was complete, as far as it knows."""
        return self.has(HandshakeCompleted)()

    @property
    def code(self) -> int:
        """With which code the other side has ended."""
        ending = next(event for event in self.events if isinstance(event, ConnectionTerminated))
        return ending.error_code

    def close(self) -> None:
        """Be gone without a word."""
        if self._port.fileno() >= 0:
            self._loop.remove_reader(self._port)
        self._port.close()
        if self._timer is not None:
            self._timer.cancel()

    def _receive(self) -> None:
        while True:
            try:
                data, address = self._port.recvfrom(65_536)
            except BlockingIOError:
                break
            self.quic.receive_datagram(data, address, self._loop.time())
        self.transmit()

    def transmit(self) -> None:
        """Send what there is, and note what has happened."""
        for data, address in self.quic.datagrams_to_send(self._loop.time()):
            self._port.sendto(data, address)
        while (event := self.quic.next_event()) is not None:
            self.events.append(event)
        if self._timer is not None:
            self._timer.cancel()
        when = self.quic.get_timer()
        self._timer = None if when is None else self._loop.call_at(when, self._expire)

    def _expire(self) -> None:
        self.quic.handle_timer(self._loop.time())
        self.transmit()
