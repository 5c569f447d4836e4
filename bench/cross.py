"""What is measured between two hosts, of afbus and of what else carries bytes between them.

    afbus        two agents, their link, and an application on either side
    tcp, udp     a plain socket: no encryption, no agent, blocking calls
    aioquic      a bare stream of aioquic, as it comes (quic.py: stock)
    aioquic+gso  the same on our socket, with segmentation offload (quic.py: offload)

Each end of each system is one process, but afbus has its two agents besides. Bytes on streams are
taken as they come, so their messages cost nothing; what UDP loses is not counted.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from afbus.link.carrier import Member
from afbus.link.effect import Down, Message, Room
from afbus.link.frame import Channel
from afbus.link.quic import QuicCarrier
from afbus.link.udp import BUFFER_BYTES
from afbus.node.membership import utc_now

from .cluster import ClusterStage
from .quic import CLIENTS, PORT, SERVERS, Echo, Ping, Sink, Source
from .row import BATCH, KIB, Row, median_us, rate
from .rows import afbus_rate, afbus_rtt

if TYPE_CHECKING:
    from collections.abc import Callable

    from aioquic.quic.connection import QuicConnection

    from afbus.link.effect import Event
    from afbus.link.link import Link

    from .quic import Voice
    from .stage import Player

#: Round trips of one run.
TURNS: Final = 3_000
#: Bytes of a batch of 64 B messages.
BATCH_BYTES: Final = 64 * BATCH
#: The largest datagram in which messages of 64 KiB are cut for a plain UDP socket.
DATAGRAM_BYTES: Final = 32 * KIB
#: Nothing more comes on a UDP socket after this time, in seconds.
SILENCE_S: Final = 0.5


# --- plain sockets ---


def tcp_pair(stage: ClusterStage, player: Player, is_server: bool) -> socket.socket:
    """Return an end of a TCP connection."""
    place = (stage.address("sink"), PORT)
    if not is_server:
        player.ready()
        made = socket.create_connection(place)
    else:
        with socket.create_server(place) as listener:
            player.ready()
            made, _ = listener.accept()
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def udp_pair(stage: ClusterStage, player: Player, is_server: bool) -> socket.socket:
    """Return a UDP socket that hears from the other and sends to it."""
    here, there = stage.address("sink"), stage.address("source")
    if not is_server:
        here, there = there, here
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        made.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    made.bind((here, PORT))
    made.connect((there, PORT))
    player.ready()
    return made


def socket_rtt(
    pair: Callable[[ClusterStage, Player, bool], socket.socket],
    stage: ClusterStage,
    count: int = TURNS,
) -> float:
    """Microseconds of 64 bytes and their echo, the median."""

    def echo(player: Player) -> None:
        with pair(stage, player, True) as me:
            for _ in range(count):
                me.send(me.recv(64))

    def ping(player: Player) -> float:
        with pair(stage, player, False) as me:
            body = bytes(64)
            return median_us(count, lambda: (me.send(body), me.recv(64)))

    return float(stage.play({"echo": echo, "ping": ping})["ping"])


def tcp_rate(part: int, amount: int, stage: ClusterStage) -> float:
    """Bytes a second, written `part` at a time."""

    def source(player: Player) -> None:
        with tcp_pair(stage, player, False) as me:
            body = bytes(part)
            for _ in range(amount // part):
                me.sendall(body)

    def sink(player: Player) -> float:
        with tcp_pair(stage, player, True) as me:
            return rate(amount // part * part, lambda: len(me.recv(64 * KIB)))

    return float(stage.play({"sink": sink, "source": source})["sink"])


def udp_rate(size: int, amount: int, stage: ClusterStage) -> float:
    """Bytes a second that arrive, in datagrams of `size`."""

    def source(player: Player) -> None:
        with udp_pair(stage, player, False) as me:
            body = bytes(size)
            for _ in range(amount // size):
                me.send(body)

    def sink(player: Player) -> float:
        with udp_pair(stage, player, True) as me:
            got = len(me.recv(size))
            began = ended = time.perf_counter()
            first = got
            me.settimeout(SILENCE_S)
            try:
                while got < amount:
                    got += len(me.recv(size))
                    ended = time.perf_counter()
            except TimeoutError:
                pass
            return (got - first) / (ended - began)

    return float(stage.play({"sink": sink, "source": source})["sink"])


# --- a bare aioquic stream ---


def quic_play(
    stage: ClusterStage,
    how: str,
    far: tuple[str, Callable[[QuicConnection], Voice]],
    near: tuple[str, Callable[[QuicConnection], Voice]],
    until: str,
) -> float:
    """Run both ends; return what one of them says."""

    def role(end: Any, make: Callable[[QuicConnection], Voice], player: Player) -> Any:
        return asyncio.run(end(stage, player, make))

    roles = {
        far[0]: partial(role, SERVERS[how], far[1]),
        near[0]: partial(role, CLIENTS[how], near[1]),
    }
    return float(stage.play(roles, until=(until,))[until])


def quic_rtt(how: str, stage: ClusterStage) -> float:
    """Microseconds of 64 bytes and their echo, the median."""
    ping = partial(Ping, size=64, count=TURNS)
    return quic_play(stage, how, ("echo", Echo), ("ping", ping), "ping")


def quic_rate(how: str, part: int, amount: int, stage: ClusterStage) -> float:
    """Bytes a second, written `part` at a time."""
    sink, source = partial(Sink, amount=amount), partial(Source, size=part)
    return quic_play(stage, how, ("sink", sink), ("source", source), "sink")


# --- a link by itself ---


def member(stage: ClusterStage, name: str, accept: Callable[[Link], Any]) -> Member:
    """The node of this endpoint as a member of the cluster."""
    own = stage.membership(name)
    return Member(own.credentials, own.authority, os.urandom(16), accept, utc_now)


def link_rate(part: int, amount: int, stage: ClusterStage) -> float:
    """Bytes a second over one link with one destination, without agents."""

    async def sink(player: Player) -> float:
        got, times = 0, [0.0, 0.0]
        done = asyncio.Event()

        def accept(link: Link) -> Callable[[Event], None]:
            def take(event: Event) -> None:
                nonlocal got
                if isinstance(event, Message):
                    link.release(event.channel, event.destination, event.cost)
                    times[got > 0] = time.perf_counter()
                    got += len(event.data)
                    if got >= amount:
                        done.set()

            return take

        carrier = QuicCarrier(member(stage, "sink", accept), stage.address("sink"), PORT)
        player.ready()
        await done.wait()
        carrier.close()
        return (got - part) / (times[1] - times[0])

    async def source(player: Player) -> None:
        ended = asyncio.Event()
        body = bytes(part)

        def accept(link: Link) -> Callable[[Event], None]:
            def take(event: Event | None = None) -> None:
                if isinstance(event, Down):
                    ended.set()
                elif event is None or isinstance(event, Room):
                    while link.send(Channel.DATA, 0, body):
                        pass

            asyncio.get_running_loop().call_soon(take)
            return take

        carrier = QuicCarrier(member(stage, "source", accept), stage.address("source"))
        player.ready()
        place = (stage.address("sink"), PORT)
        await carrier.connect(place, stage.membership("sink").identity)
        await ended.wait()

    def play(role: Any, player: Player) -> Any:
        return asyncio.run(role(player))

    roles = {"sink": partial(play, sink), "source": partial(play, source)}
    return float(stage.play(roles, until=("sink",))["sink"])


# --- rows ---


MB: Final = 1_000_000
#: What each moves in one run: some seconds of it.
TCP_BYTES: Final = 2_000 * MB
UDP_BYTES: Final = 500 * MB
UDP_SMALL: Final = 500_000
STOCK_BYTES: Final = 60 * MB
LINK_BYTES: Final = 100 * MB


def beside_links(part: int) -> dict[str, Callable[[ClusterStage], float]]:
    """Bare streams of aioquic, in bytes a second."""
    return {
        "aioquic": partial(quic_rate, "stock", part, STOCK_BYTES),
        "aioquic+gso": partial(quic_rate, "offload", part, LINK_BYTES),
    }


def in_units(
    functions: dict[str, Callable[[ClusterStage], float]], factor: float
) -> dict[str, Callable[[Any], float]]:
    """The same in another unit."""

    def scale(function: Callable[[ClusterStage], float], stage: ClusterStage) -> float:
        return function(stage) * factor

    return {system: partial(scale, function) for system, function in functions.items()}


CROSS_ROWS: Final = [
    Row(
        "cross_rtt_64",
        "us",
        "lower",
        {
            "afbus": partial(afbus_rtt, count=TURNS),
            "tcp": partial(socket_rtt, tcp_pair),
            "udp": partial(socket_rtt, udp_pair),
            "aioquic": partial(quic_rtt, "stock"),
            "aioquic+gso": partial(quic_rtt, "offload"),
        },
        ClusterStage,
    ),
    Row(
        "cross_rate_64",
        "messages/s",
        "higher",
        {
            "afbus": afbus_rate(64, BATCH, 600_000),
            **in_units(
                {
                    "tcp": partial(tcp_rate, BATCH_BYTES, TCP_BYTES),
                    "udp": partial(udp_rate, 64, 64 * UDP_SMALL),
                    **beside_links(BATCH_BYTES),
                },
                1 / 64,
            ),
        },
        ClusterStage,
    ),
    Row(
        "cross_bw_64k",
        "MB/s",
        "higher",
        {
            **in_units({"afbus": afbus_rate(64 * KIB, 1, 1_500)}, 64 * KIB / MB),
            **in_units(
                {
                    "tcp": partial(tcp_rate, 64 * KIB, TCP_BYTES),
                    "udp": partial(udp_rate, DATAGRAM_BYTES, UDP_BYTES),
                    **beside_links(64 * KIB),
                },
                1 / MB,
            ),
        },
        ClusterStage,
    ),
    Row(
        "link_64k",
        "MB/s",
        "higher",
        in_units(
            {"afbus": partial(link_rate, 64 * KIB, LINK_BYTES), **beside_links(64 * KIB)}, 1 / MB
        ),
        ClusterStage,
    ),
]
