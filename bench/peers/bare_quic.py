"""One bare aioquic stream between two hosts, in two ways, with the settings that a link has.

    aioquic      its own asyncio client and server, on plain sockets with large buffers
    aioquic+gso  its `QuicConnection` on our UDP socket: segmentation offload, and nothing else

Both have the same size of datagrams, windows and congestion control. What is said on the stream
is the business of a `Voice`. Small messages are said many at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..certificate import certify
from ..meter import Turns, watch
from ..wire import BATCH, System, Wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.connection import QuicConnection
    from aioquic.quic.events import QuicEvent

    from ..stage import Cue, Player, Stage
    from ..wire import Traffic

PORT: Final = 47_111
#: The client's first stream, with two directions.
_STREAM: Final = 0


class Voice:
    """What one end says on its stream, and hears."""

    def __init__(self, quic: QuicConnection) -> None:
        """Begin; nothing can be sent yet."""
        self.quic = quic
        self.connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: Bytes that came.
        self.got = 0
        #: Sends what has been said; set by whoever owns the socket.
        self.flush: Callable[[], None] = lambda: None

    def say(self, data: bytes) -> None:
        """Append to the stream."""
        self.quic.send_stream_data(_STREAM, data)

    def receive(self, data: bytes) -> None:
        """Bytes have come."""
        self.got += len(data)

    def turn(self) -> None:
        """Everything of one turn has been received."""

    def take(self, event: QuicEvent) -> None:
        """Take an event of aioquic."""
        from aioquic.quic.events import HandshakeCompleted, StreamDataReceived

        if isinstance(event, StreamDataReceived):
            self.receive(event.data)
        elif isinstance(event, HandshakeCompleted):
            self.connected.set_result(None)


class Echo(Voice):
    """Says what it hears."""

    def receive(self, data: bytes) -> None:
        """Say it."""
        self.say(data)


class Ping(Voice):
    """Says something whenever it has heard its echo."""

    def start(self, size: int, cue: Cue) -> asyncio.Future[float]:
        """Begin; return the median of the window, in microseconds."""
        self._size, self._cue, self._turns, self._missing = size, cue, Turns(cue), size
        self._done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._turns.note()
        self.say(bytes(size))
        self.flush()
        return self._done

    def receive(self, data: bytes) -> None:
        """Note how long it took."""
        self._missing -= len(data)
        if self._missing or self._done.done():
            return
        self._missing = self._size
        if self._turns.note():
            self.say(bytes(self._size))
        else:
            self._done.set_result(self._turns.median_us())


class Source(Voice):
    """Says more whenever there is room."""

    part = b""

    def start(self, size: int) -> None:
        """Begin; `size` bytes at a time."""
        self.part = bytes(size)
        self.say(self.part)
        self.turn()
        self.flush()

    def turn(self) -> None:
        """Say as much as may be under way."""
        from afbus.link.settings import Settings

        stream = self.quic._streams.get(_STREAM)
        ahead = Settings().in_flight_bytes
        while self.part and stream is not None and len(stream.sender._buffer) < ahead:
            self.say(self.part)


class BareQuicWire(Wire):
    """A client on the near host, a server on the far one."""

    warm_s = 0.4

    def __init__(self, stage: Stage, traffic: Traffic, has_offload: bool) -> None:
        """Make a certificate."""
        super().__init__(stage, traffic)
        self._made = certify(stage.folder, stage.address("sink"))
        self._serve = self._offload_server if has_offload else self._stock_server
        self._connect = self._offload_client if has_offload else self._stock_client

    def echo(self, player: Player) -> None:
        """Say what is heard."""

        async def run() -> None:
            async with self._serve(player, Echo):
                player.await_cue()
                await asyncio.Event().wait()

        asyncio.run(run())

    def ping(self, player: Player) -> float:
        """Time turns."""

        async def run() -> float:
            async with self._connect(Ping) as voice:
                return float(await voice.start(self.traffic.size, player.ready()))

        return asyncio.run(run())

    def source(self, player: Player) -> None:
        """Say without end."""

        async def run() -> None:
            async with self._connect(Source) as voice:
                player.ready()
                voice.start(max(64 * BATCH, self.traffic.size))
                await asyncio.Event().wait()

        asyncio.run(run())

    def sink(self, player: Player, number: int) -> None:
        """Listen."""

        async def run() -> None:
            async with self._serve(player, Voice) as voice:
                await watch(player.await_cue(), lambda: voice.got // self.traffic.size)

        asyncio.run(run())

    def _configure(self, is_client: bool) -> QuicConfiguration:
        """The settings of a link."""
        from aioquic.quic.configuration import QuicConfiguration

        from afbus.link.transport import MAX_DATA_BYTES, MAX_STREAM_BYTES
        from afbus.link.udp import path_bytes

        place = self.stage.address("source" if not is_client else "sink"), PORT
        made: Any = QuicConfiguration(
            is_client=is_client,
            alpn_protocols=["bench"],
            max_datagram_size=path_bytes(place),
            max_data=MAX_DATA_BYTES,
            max_stream_data=MAX_STREAM_BYTES,
            verify_mode=ssl.CERT_NONE,
        )
        if not is_client:
            made.load_cert_chain(self._made.certificate, self._made.key)
        return made  # type: ignore[no-any-return]  # Any only for its untyped attributes

    # aioquic as it comes

    @contextlib.asynccontextmanager
    async def _stock_server(self, player: Player, make: type[Voice]) -> AsyncIterator[Any]:
        from aioquic.asyncio.server import serve

        made: asyncio.Future[Voice] = asyncio.get_running_loop().create_future()
        server = await serve(
            self.stage.address("sink"),
            PORT,
            configuration=self._configure(is_client=False),
            create_protocol=_protocol(lambda quic: _note(made, make(quic))),
        )
        _enlarge(server._transport)
        player.tell_ready()
        voice = await made
        await voice.connected
        yield voice
        server.close()

    @contextlib.asynccontextmanager
    async def _stock_client(self, make: type[Voice]) -> AsyncIterator[Any]:
        from aioquic.asyncio.client import connect

        # Its client binds an IPv6 socket, which reaches IPv4 too.
        place = (self.stage.address("sink"), PORT)
        async with connect(
            *place,
            configuration=self._configure(is_client=True),
            create_protocol=_protocol(make),
        ) as client:
            _enlarge(client._transport)
            voice = client.voice  # type: ignore[attr-defined]  # `_protocol` made it
            voice.flush = client.transmit
            yield voice

    # aioquic's core on our socket

    @contextlib.asynccontextmanager
    async def _offload_server(self, player: Player, make: type[Voice]) -> AsyncIterator[Any]:
        from aioquic.quic.connection import QuicConnection

        from afbus.link.udp import UdpSocket

        loop = asyncio.get_running_loop()
        configuration = self._configure(is_client=False)
        sock = UdpSocket(self.stage.address("sink"), PORT)
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
        player.tell_ready()
        voice = (await made).voice
        await voice.connected
        yield voice

    @contextlib.asynccontextmanager
    async def _offload_client(self, make: type[Voice]) -> AsyncIterator[Any]:
        from aioquic.quic.connection import QuicConnection

        from afbus.link.udp import UdpSocket

        loop = asyncio.get_running_loop()
        sock = UdpSocket(self.stage.address("source"), 0)
        quic = QuicConnection(configuration=self._configure(is_client=True))
        pump = _Pump(quic, sock, make(quic))
        loop.add_reader(sock.fileno(), lambda: pump.receive(sock.receive()))
        quic.connect((self.stage.address("sink"), PORT), loop.time())
        pump.turn()
        await pump.voice.connected
        yield pump.voice


def _note(made: asyncio.Future[Voice], voice: Voice) -> Voice:
    made.set_result(voice)
    return voice


def _protocol(make: Callable[[QuicConnection], Voice]) -> Any:
    """Return a maker of aioquic's own protocol with a voice in it."""
    from aioquic.asyncio.protocol import QuicConnectionProtocol

    class Protocol(QuicConnectionProtocol):
        def __init__(self, quic: QuicConnection, **options: Any) -> None:
            super().__init__(quic, **options)
            self.voice = make(quic)

        def quic_event_received(self, event: QuicEvent) -> None:
            self.voice.take(event)

        def datagram_received(self, data: Any, addr: Any) -> None:
            super().datagram_received(data, addr)
            self.voice.turn()

    return Protocol


def _enlarge(transport: Any) -> None:
    """Give a socket of asyncio the buffers that ours has."""
    from afbus.link.udp import BUFFER_BYTES

    sock = transport.get_extra_info("socket")
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


class _Pump:
    """One `QuicConnection` on one `UdpSocket`: the least that moves bytes."""

    def __init__(self, quic: QuicConnection, sock: Any, voice: Voice) -> None:
        self.quic = quic
        self.voice = voice
        voice.flush = self.turn
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


STOCK: Final = System(
    "aioquic", partial(BareQuicWire, has_offload=False), ("aioquic",), is_yardstick=True
)
OFFLOAD: Final = System(
    "aioquic+gso", partial(BareQuicWire, has_offload=True), ("aioquic",), is_yardstick=True
)
