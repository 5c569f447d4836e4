"""One link beside a bare aioquic stream with the same settings: `python -m bench.link`.

64 KiB messages in one direction, in MiB/s from the first byte that arrives to the last; on loopback
and, as root, between two network namespaces with an mtu of 1500. The systems:

    afbus     a link over `QuicCarrier`, one destination, credits as usual
    aioquic   aioquic's own asyncio client and server, one stream, plain sockets with large buffers
    core+gso  aioquic's `QuicConnection` on our UDP socket: segmentation offload, and nothing else

All have the same size of datagrams, windows, and congestion control, and 8 MiB under way at most.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import ssl
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import HandshakeCompleted, QuicEvent, StreamDataReceived
from tests.link.authority import NOW, Signer, node

from afbus.link.carrier import Member
from afbus.link.credentials import Credentials
from afbus.link.effect import Message, Room
from afbus.link.frame import Channel
from afbus.link.quic import QuicCarrier
from afbus.link.transport import MAX_DATA_BYTES, MAX_STREAM_BYTES
from afbus.link.udp import BUFFER_BYTES, UdpSocket, path_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from afbus.link.effect import Event
    from afbus.link.link import Link

MIB: Final = 1 << 20
CHUNK: Final = bytes(65_536)
#: What may be under way, and how much is sent in all.
AHEAD: Final = 8 * MIB
AMOUNT: Final = 96 * MIB
PORT: Final = 47_111


class Meter:
    """Counts what arrives, and says how fast it did."""

    def __init__(self) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._count = 0
        self._start = 0.0

    def count(self, size: int) -> None:
        """Note what has arrived."""
        if not self._count:
            self._start = time.perf_counter()
        self._count += size
        if self._count >= AMOUNT and not self.done.done():
            self.done.set_result(AMOUNT / MIB / (time.perf_counter() - self._start))


# --- afbus ---


def member(name: str, accept: Callable[[Link], Callable[[Event], None]]) -> Member:
    """A member of a cluster whose root both processes read from the environment."""
    root, credentials = pickled()
    return Member(credentials[name], root.authority(), os.urandom(16), accept, lambda: NOW)


def pickled() -> tuple[Signer, dict[str, Credentials]]:
    """The same certificates in both processes: made from one seed would be best, so read a file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization as keys

    text = os.environ["AFBUS_BENCH_CERTIFICATES"]
    root_der, root_key, *rest = (bytes.fromhex(part) for part in text.split())

    def key(der: bytes) -> Any:
        return keys.load_der_private_key(der, None)

    root = Signer(x509.load_der_x509_certificate(root_der), key(root_key))
    made = {name: Credentials((rest[2 * n],), key(rest[2 * n + 1])) for n, name in enumerate("ab")}
    return root, made


def make_certificates() -> str:
    """What `pickled` reads."""
    from cryptography.hazmat.primitives import serialization as keys

    def text(key: Any) -> str:
        der: bytes = key.private_bytes(
            keys.Encoding.DER, keys.PrivateFormat.PKCS8, keys.NoEncryption()
        )
        return der.hex()

    root = Signer.root()
    parts = [root.certificate.public_bytes(keys.Encoding.DER).hex(), text(root.key)]
    for name in "ab":
        credentials = root.issue(node(name))
        parts += [credentials.chain[0].hex(), text(credentials.key)]
    return " ".join(parts)


async def afbus_receive(host: str, size: int | None) -> float:
    """The end that reads."""
    meter = Meter()

    def accept(link: Link) -> Callable[[Event], None]:
        def take(event: Event) -> None:
            if isinstance(event, Message):
                link.release(event.channel, event.destination, event.cost)
                meter.count(len(event.data))

        return take

    carrier = QuicCarrier(member("b", accept), host, PORT, datagram_bytes=size)
    print("ready", flush=True)
    try:
        rate: float = await meter.done
    finally:
        carrier.close()
    return rate


async def afbus_send(host: str, own: str, size: int | None) -> None:
    """The end that writes, until it is ended."""

    def accept(link: Link) -> Callable[[Event], None]:
        def go_on(event: Event | None = None) -> None:
            if event is None or isinstance(event, Room):
                while link.send(Channel.DATA, 0, CHUNK):
                    pass

        asyncio.get_running_loop().call_soon(go_on)
        return go_on

    carrier = QuicCarrier(member("a", accept), own, datagram_bytes=size)
    await carrier.connect((host, PORT), node("b"))
    await asyncio.get_running_loop().create_future()


# --- aioquic as it comes ---


def configuration(size: int, *, is_client: bool) -> QuicConfiguration:
    """The same settings as a link has."""
    made: Any = QuicConfiguration(
        is_client=is_client,
        alpn_protocols=["bench"],
        max_datagram_size=size,
        max_data=MAX_DATA_BYTES,
        max_stream_data=MAX_STREAM_BYTES,
        verify_mode=ssl.CERT_NONE,
    )
    if not is_client:
        credentials = pickled()[1]["b"]
        made.certificate, made.private_key = credentials.certificates[0], credentials.key
    return made  # type: ignore[no-any-return]  # Any only for its untyped attributes


def enlarge(transport: Any) -> None:
    """Give a socket of asyncio the buffers that ours has."""
    sock = transport.get_extra_info("socket")
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


async def aioquic_receive(host: str, size: int | None) -> float:
    """The end that reads."""
    meter = Meter()

    class Reader(QuicConnectionProtocol):
        def quic_event_received(self, event: QuicEvent) -> None:
            if isinstance(event, StreamDataReceived):
                meter.count(len(event.data))

    size = size or path_bytes((host, PORT))
    server = await serve(
        host, PORT, configuration=configuration(size, is_client=False), create_protocol=Reader
    )
    enlarge(server._transport)
    print("ready", flush=True)
    rate: float = await meter.done
    server.close()
    return rate


async def aioquic_send(host: str, _own: str, size: int | None) -> None:
    """The end that writes, until it is ended."""
    size = size or path_bytes((host, PORT))
    wanted = configuration(size, is_client=True)
    # Its client binds an IPv6 socket, which reaches IPv4 too.
    async with connect(host, PORT, configuration=wanted, wait_connected=True) as client:
        enlarge(client._transport)
        quic = client._quic
        number = quic.get_next_available_stream_id(is_unidirectional=True)
        quic.send_stream_data(number, b"")
        sender = quic._streams[number].sender
        while True:
            while len(sender._buffer) < AHEAD:
                quic.send_stream_data(number, CHUNK)
            client.transmit()
            await asyncio.sleep(0.001)


# --- aioquic's core on our socket ---


class Pump:
    """One `QuicConnection` on one `UdpSocket`: the least that moves bytes."""

    def __init__(self, quic: QuicConnection, sock: UdpSocket) -> None:
        self.quic = quic
        self.sock = sock
        self.loop = asyncio.get_running_loop()
        self.timer: asyncio.TimerHandle | None = None
        self.events: list[Callable[[QuicEvent], None]] = []

    def receive(self, datagrams: list[tuple[bytes, Any]]) -> None:
        """Take datagrams, and send what follows."""
        now = self.loop.time()
        for data, address in datagrams:
            self.quic.receive_datagram(data, address, now)
        self.turn()

    def turn(self) -> None:
        """Send, tell, and arm the timer."""
        while (event := self.quic.next_event()) is not None:
            for take in self.events:
                take(event)
        self.sock.send(self.quic.datagrams_to_send(self.loop.time()))
        if self.timer is not None:
            self.timer.cancel()
        when = self.quic.get_timer()
        self.timer = None if when is None else self.loop.call_at(when, self.expire)

    def expire(self) -> None:
        """Let time pass."""
        self.quic.handle_timer(self.loop.time())
        self.turn()


async def core_receive(host: str, size: int | None) -> float:
    """The end that reads."""
    meter = Meter()
    size = size or path_bytes((host, PORT))
    sock = UdpSocket(host, PORT)
    pump: Pump | None = None

    def take(event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            meter.count(len(event.data))

    def readable() -> None:
        nonlocal pump
        datagrams = sock.receive()
        if pump is None:
            first = datagrams[0][0]
            quic = QuicConnection(
                configuration=configuration(size, is_client=False),
                original_destination_connection_id=first[6 : 6 + first[5]],
            )
            pump = Pump(quic, sock)
            pump.events.append(take)
        pump.receive(datagrams)

    asyncio.get_running_loop().add_reader(sock.fileno(), readable)
    print("ready", flush=True)
    rate: float = await meter.done
    return rate


async def core_send(host: str, own: str, size: int | None) -> None:
    """The end that writes, until it is ended."""
    size = size or path_bytes((host, PORT))
    sock = UdpSocket(own, 0)
    quic = QuicConnection(configuration=configuration(size, is_client=True))
    pump = Pump(quic, sock)
    number: int | None = None

    def fill() -> None:
        nonlocal number
        if number is None:
            number = quic.get_next_available_stream_id(is_unidirectional=True)
            quic.send_stream_data(number, b"")
        while len(quic._streams[number].sender._buffer) < AHEAD:
            quic.send_stream_data(number, CHUNK)

    def take(event: QuicEvent) -> None:
        if isinstance(event, HandshakeCompleted):
            fill()

    def readable() -> None:
        pump.receive(sock.receive())
        if number is not None:
            fill()
            pump.turn()

    pump.events.append(take)
    loop = asyncio.get_running_loop()
    loop.add_reader(sock.fileno(), readable)
    quic.connect((host, PORT), loop.time())
    pump.turn()
    await loop.create_future()


SYSTEMS: Final[dict[str, tuple[Any, Any]]] = {
    "afbus": (afbus_receive, afbus_send),
    "aioquic": (aioquic_receive, aioquic_send),
    "core+gso": (core_receive, core_send),
}

# --- processes ---


def command(space: str, *arguments: str) -> list[str]:
    """How to run a role, in a network namespace if there is one."""
    inside = ["ip", "netns", "exec", space] if space else []
    return [*inside, sys.executable, "-m", "bench.link", *arguments]


def measure(system: str, hosts: tuple[str, str], spaces: tuple[str, str], size: int) -> float:
    """Run both roles, and return the rate that the reader says."""
    here, there = hosts
    reader = subprocess.Popen(  # noqa: S603 (our own program)
        command(spaces[1], "--role", "receive", system, there, here, str(size)),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None
    writer = None
    try:
        reader.stdout.readline()
        writer = subprocess.Popen(  # noqa: S603 (our own program)
            command(spaces[0], "--role", "send", system, there, here, str(size))
        )
        return float(reader.stdout.readline())
    finally:
        for process in (reader, writer):
            if process is not None:
                process.kill()
                process.wait()
        reader.stdout.close()


@contextlib.contextmanager
def two_namespaces() -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Two network namespaces with a cable between them; addresses and names."""

    def ip(line: str) -> None:
        subprocess.run(["ip", *line.split()], check=True)  # noqa: S603, S607 (a tool of the system)

    one, other = f"afbus-a{os.getpid()}", f"afbus-b{os.getpid()}"
    ip(f"netns add {one}")
    ip(f"netns add {other}")
    try:
        ip(f"-n {one} link add v0 mtu 1500 type veth peer name v1 mtu 1500 netns {other}")
        for space, device, address in ((one, "v0", "10.77.7.1"), (other, "v1", "10.77.7.2")):
            ip(f"-n {space} address add {address}/24 dev {device}")
            ip(f"-n {space} link set {device} up")
            ip(f"-n {space} link set lo up")
        yield ("10.77.7.1", "10.77.7.2"), (one, other)
    finally:
        ip(f"netns delete {one}")
        ip(f"netns delete {other}")


def compare(title: str, runs: int, hosts: tuple[str, str], spaces: tuple[str, str]) -> None:
    """Take all systems in turns, and print their medians."""
    values: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for _ in range(runs):
        for system in SYSTEMS:
            values[system].append(measure(system, hosts, spaces, 0))
    ours = statistics.median(values["afbus"])
    for system, taken in values.items():
        middle = statistics.median(taken)
        spread = f"({min(taken):.1f} to {max(taken):.1f})"
        ratio = "" if system == "afbus" else f"  afbus is {ours / middle:.2f} of it"
        print(f"{title:10} {system:9} {middle:7.1f} MiB/s {spread}{ratio}", flush=True)


def main() -> None:
    """Measure, or play a role of a measurement."""
    parser = argparse.ArgumentParser(prog="python -m bench.link", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="turns of each system (default: 3)")
    parser.add_argument("--role", nargs=5, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.role is not None:
        role, system, there, here, size = wanted.role
        receive, send = SYSTEMS[system]
        if role == "receive":
            print(asyncio.run(receive(there, int(size) or None)), flush=True)
        else:
            asyncio.run(send(there, here, int(size) or None))
        return
    os.environ["AFBUS_BENCH_CERTIFICATES"] = make_certificates()
    compare("loopback", wanted.runs, ("127.0.0.1", "127.0.0.1"), ("", ""))
    if os.geteuid() == 0:
        with two_namespaces() as (hosts, spaces):
            compare("mtu 1500", wanted.runs, hosts, spaces)


if __name__ == "__main__":
    main()
