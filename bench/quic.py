"""One bare aioquic stream between two hosts, in two ways, with the settings that a link has.

    stock     aioquic's own asyncio client and server, on plain sockets with large buffers
    offload   its `QuicConnection` on our UDP socket: segmentation offload, and nothing else

Both have the same size of datagrams, windows and congestion control. What is said on the stream
is the business of a `Voice`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any, Final

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import HandshakeCompleted, QuicEvent, StreamDataReceived

from afbus.link.settings import Settings
from afbus.link.transport import MAX_DATA_BYTES, MAX_STREAM_BYTES
from afbus.link.udp import BUFFER_BYTES, UdpSocket, path_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from .cluster import ClusterStage
    from .stage import Player

PORT: Final = 47_111
#: What may be under way: as much as on a link.
AHEAD_BYTES: Final = Settings().in_flight_bytes
#: The client's first stream, with two directions.
_STREAM: Final = 0


class Voice:
    """What one end says on its stream."""

    def __init__(self, quic: QuicConnection) -> None:
        """Begin; nothing can be sent yet."""
        self.quic = quic
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def say(self, data: bytes) -> None:
        """Append to the stream."""
        self.quic.send_stream_data(_STREAM, data)

    def begin(self) -> None:
        """The stream is there."""

    def receive(self, data: bytes) -> None:
        """Bytes have come."""

    def turn(self) -> None:
        """Everything of one turn has been received."""

    def take(self, event: QuicEvent) -> None:
        """Take an event of aioquic."""
        if isinstance(event, HandshakeCompleted):
            self.begin()
        elif isinstance(event, StreamDataReceived):
            self.receive(event.data)


class Echo(Voice):
    """Says what it hears."""

    def receive(self, data: bytes) -> None:
        """Say it."""
        self.say(data)


class Ping(Voice):
    """Says something whenever it has heard its echo; done with the microseconds that this takes."""

    def __init__(self, quic: QuicConnection, size: int, count: int) -> None:
        """Begin; `size` bytes each, `count` times."""
        super().__init__(quic)
        self._size, self._count = size, count
        self._times: list[float] = []
        self._missing = 0
        self._began = 0.0

    def begin(self) -> None:
        """Say it."""
        self._missing = self._size
        self._began = time.perf_counter()
        self.say(bytes(self._size))

    def receive(self, data: bytes) -> None:
        """Note how long it took."""
        self._missing -= len(data)
        if self._missing or self.done.done():
            return
        self._times.append((time.perf_counter() - self._began) * 1e6)
        if len(self._times) < self._count:
            self.begin()
        else:
            self.done.set_result(sorted(self._times)[self._count // 2])


class Source(Voice):
    """Says more whenever there is room."""

    def __init__(self, quic: QuicConnection, size: int) -> None:
        """Begin; `size` bytes at a time."""
        super().__init__(quic)
        self._part = bytes(size)

    def begin(self) -> None:
        """Open the stream."""
        self.say(b"")
        self.turn()

    def turn(self) -> None:
        """Say as much as may be under way."""
        stream = self.quic._streams.get(_STREAM)
        while stream is not None and len(stream.sender._buffer) < AHEAD_BYTES:
            self.say(self._part)


class Sink(Voice):
    """Listens; done with the bytes a second, from the first that came to the last."""

    def __init__(self, quic: QuicConnection, amount: int) -> None:
        """Begin; `amount` bytes in all."""
        super().__init__(quic)
        self._amount = amount
        self._got = self._first = 0
        self._began = 0.0

    def receive(self, data: bytes) -> None:
        """Count it."""
        self._got += len(data)
        if not self._first:
            self._first, self._began = self._got, time.perf_counter()
        elif self._got >= self._amount and not self.done.done():
            took = time.perf_counter() - self._began
            self.done.set_result((self._got - self._first) / took)


def configure(stage: ClusterStage, is_client: bool) -> QuicConfiguration:
    """The settings of a link."""
    made: Any = QuicConfiguration(
        is_client=is_client,
        alpn_protocols=["bench"],
        max_datagram_size=path_bytes((stage.address("alpha" if not is_client else "sink"), PORT)),
        max_data=MAX_DATA_BYTES,
        max_stream_data=MAX_STREAM_BYTES,
        verify_mode=ssl.CERT_NONE,
    )
    if not is_client:
        credentials = stage.membership("sink").credentials
        made.certificate, made.private_key = credentials.certificates[0], credentials.key
    return made  # type: ignore[no-any-return]  # Any only for its untyped attributes


# --- aioquic as it comes ---


class _Protocol(QuicConnectionProtocol):
    """A voice in aioquic's own protocol."""

    voice: Voice

    def quic_event_received(self, event: QuicEvent) -> None:
        self.voice.take(event)

    def datagram_received(self, data: Any, addr: Any) -> None:
        super().datagram_received(data, addr)
        self.voice.turn()


def _enlarge(transport: Any) -> None:
    """Give a socket of asyncio the buffers that ours has."""
    sock = transport.get_extra_info("socket")
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


async def _stock_server(
    stage: ClusterStage, player: Player, make: Callable[[QuicConnection], Voice]
) -> Any:
    made: asyncio.Future[Voice] = asyncio.get_running_loop().create_future()

    def protocol(quic: QuicConnection, **options: Any) -> _Protocol:
        one = _Protocol(quic, **options)
        one.voice = make(quic)
        made.set_result(one.voice)
        return one

    configuration = configure(stage, is_client=False)
    host = stage.address("sink")
    server = await serve(host, PORT, configuration=configuration, create_protocol=protocol)
    _enlarge(server._transport)
    player.ready()
    result = await (await made).done
    server.close()
    return result


async def _stock_client(
    stage: ClusterStage, player: Player, make: Callable[[QuicConnection], Voice]
) -> Any:
    def protocol(quic: QuicConnection, **options: Any) -> _Protocol:
        one = _Protocol(quic, **options)
        one.voice = make(quic)
        return one

    configuration = configure(stage, is_client=True)
    player.ready()
    # Its client binds an IPv6 socket, which reaches IPv4 too.
    place = (stage.address("sink"), PORT)
    async with connect(*place, configuration=configuration, create_protocol=protocol) as client:
        assert isinstance(client, _Protocol)
        _enlarge(client._transport)
        return await client.voice.done


# --- aioquic's core on our socket ---


class _Pump:
    """One `QuicConnection` on one `UdpSocket`: the least that moves bytes."""

    def __init__(self, quic: QuicConnection, sock: UdpSocket, voice: Voice) -> None:
        self.quic = quic
        self.voice = voice
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def receive(self, datagrams: list[tuple[bytes, Any]]) -> None:
        """Take datagrams, and send what follows."""
        now = self._loop.time()
        for data, address in datagrams:
            self.quic.receive_datagram(data, address, now)
        self.turn()

    def turn(self) -> None:
        """Tell, send, and arm the timer."""
        while (event := self.quic.next_event()) is not None:
            self.voice.take(event)
        self.voice.turn()
        self._sock.send(self.quic.datagrams_to_send(self._loop.time()))
        if self._timer is not None:
            self._timer.cancel()
        when = self.quic.get_timer()
        self._timer = None if when is None else self._loop.call_at(when, self._expire)

    def _expire(self) -> None:
        self.quic.handle_timer(self._loop.time())
        self.turn()


async def _offload_server(
    stage: ClusterStage, player: Player, make: Callable[[QuicConnection], Voice]
) -> Any:
    loop = asyncio.get_running_loop()
    configuration = configure(stage, is_client=False)
    sock = UdpSocket(stage.address("sink"), PORT)
    made: asyncio.Future[_Pump] = loop.create_future()

    def readable() -> None:
        datagrams = sock.receive()
        if datagrams and not made.done():
            # A long header: the client's name for us stands behind its length.
            first = datagrams[0][0]
            name = first[6 : 6 + first[5]]
            quic = QuicConnection(
                configuration=configuration, original_destination_connection_id=name
            )
            made.set_result(_Pump(quic, sock, make(quic)))
        made.result().receive(datagrams)

    loop.add_reader(sock.fileno(), readable)
    player.ready()
    return await (await made).voice.done


async def _offload_client(
    stage: ClusterStage, player: Player, make: Callable[[QuicConnection], Voice]
) -> Any:
    loop = asyncio.get_running_loop()
    sock = UdpSocket(stage.address("source"), 0)
    quic = QuicConnection(configuration=configure(stage, is_client=True))
    pump = _Pump(quic, sock, make(quic))
    player.ready()
    loop.add_reader(sock.fileno(), lambda: pump.receive(sock.receive()))
    quic.connect((stage.address("sink"), PORT), loop.time())
    pump.turn()
    return await pump.voice.done


SERVERS: Final = {"stock": _stock_server, "offload": _offload_server}
CLIENTS: Final = {"stock": _stock_client, "offload": _offload_client}
