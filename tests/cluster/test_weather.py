"""The proxy of the test kit does what it says, or the tests behind it show nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from network import Network, can_isolate
from tests.cluster.weather import BLACK, CLEAR, Proxy, Sky, Weather

if TYPE_CHECKING:
    from collections.abc import Iterator

# Sends to one address what arrives at the other, and prints it.
ECHO = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mine:
    mine.bind((sys.argv[3], int(sys.argv[4])))
    mine.settimeout(10)
    mine.sendto(b"round the corner", (sys.argv[1], int(sys.argv[2])))
    print(mine.recv(100).decode(), end="")
"""

SHARE = st.floats(0, 1)
WEATHER = st.builds(Weather, SHARE, SHARE, SHARE, SHARE, SHARE, SHARE)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Return a UDP socket at the other end."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        made.settimeout(10)
        yield made


@pytest.fixture
def client() -> Iterator[socket.socket]:
    """Return a UDP socket at this end."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        made.settimeout(10)
        yield made


@given(seed=st.integers(), weather=WEATHER, sent=st.lists(st.binary(max_size=9), max_size=20))
def test_the_same_seed_gives_the_same_weather(
    seed: int, weather: Weather, sent: list[bytes]
) -> None:
    """A failure can be had again."""
    skies = [Sky(seed), Sky(seed)]
    for sky in skies:
        sky.weather = weather
    assert [skies[0].decide(one) for one in sent] == [skies[1].decide(one) for one in sent]


def test_shares_come_true() -> None:
    """Of 10,000 datagrams the right part is lost, doubled and spoilt, within three in a hundred."""
    sky = Sky(1)
    sky.weather = Weather(lost=0.3, doubled=0.1, spoilt=0.05)
    fates = [sky.decide(b"datagram") for _ in range(10_000)]
    arrived = [fate for fate in fates if fate]
    assert 2_700 < 10_000 - len(arrived) < 3_300
    assert 500 < sum(len(fate) == 2 for fate in arrived) < 900
    assert 250 < sum(fate[0][1] != b"datagram" for fate in arrived) < 450


def test_datagrams_pass_both_ways(server: socket.socket, client: socket.socket) -> None:
    """In clear weather the proxy is not noticed, nor is a new address of it."""
    with Proxy(server.getsockname()) as proxy:
        for number in range(3):
            client.sendto(b"there %d" % number, proxy.address)
            data, source = server.recvfrom(100)
            assert data == b"there %d" % number
            server.sendto(b"back %d" % number, source)
            assert client.recvfrom(100) == (b"back %d" % number, proxy.address)
            proxy.move()
        assert proxy.swallowed == 0


def test_black_in_one_direction(server: socket.socket, client: socket.socket) -> None:
    """What goes out arrives, what comes back does not, until the weather is clear."""
    with Proxy(server.getsockname()) as proxy:
        proxy.set(CLEAR, BLACK)
        client.sendto(b"there", proxy.address)
        data, source = server.recvfrom(100)
        assert data == b"there"
        server.sendto(b"lost", source)
        # One more round shows that the first answer has met its fate.
        client.sendto(b"again", proxy.address)
        assert server.recvfrom(100)[0] == b"again"
        proxy.set(CLEAR)
        server.sendto(b"heard", source)
        assert client.recvfrom(100)[0] == b"heard"
        assert proxy.swallowed == 1


def test_late_ones_are_overtaken(server: socket.socket, client: socket.socket) -> None:
    """A datagram that is reordered arrives behind one that was sent later."""
    with Proxy(server.getsockname()) as proxy:
        proxy.set(Weather(reordered=1.0, late_s=1.0))
        client.sendto(b"first", proxy.address)
        # It has been decided on once the proxy has taken it: only then may the weather change.
        proxy.await_taken(1)
        proxy.set(CLEAR)
        client.sendto(b"second", proxy.address)
        assert [server.recvfrom(100)[0] for _ in range(2)] == [b"second", b"first"]


def test_one_host_has_its_own_weather(server: socket.socket, client: socket.socket) -> None:
    """What is said of one client is true of no other, and `set` is said of all again."""
    with (
        Proxy(server.getsockname()) as proxy,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        other.bind(("127.0.0.2", 0))
        proxy.steer("127.0.0.2", out=BLACK)
        other.sendto(b"lost", proxy.address)
        client.sendto(b"there", proxy.address)
        assert server.recvfrom(100)[0] == b"there"
        proxy.await_taken(2)
        assert proxy.swallowed == 1
        proxy.set(CLEAR)
        other.sendto(b"again", proxy.address)
        assert server.recvfrom(100)[0] == b"again"


@pytest.mark.skipif(not can_isolate(), reason="network namespaces need root and iproute2")
def test_a_proxy_can_stand_in_another_network() -> None:
    """Its address there is none here, and what comes to the host there passes."""
    with Network(["sky", "alpha"], namespaces=True) as network:
        target = (network.address("alpha"), 4451)
        space, address = network.namespace("sky"), (network.address("sky"), 0)
        with Proxy(target, address=address, namespace=space) as proxy:
            assert proxy.address[0] == network.address("sky")
            argv = [sys.executable, "-c", ECHO, *map(str, (*proxy.address, *target))]
            said = subprocess.check_output(network.command("alpha", argv), timeout=30)
            assert said == b"round the corner"
            assert (proxy.taken, proxy.passed) == (1, 1)
