"""Large bodies between nodes (D14): by content, whole, in the order of their sender."""

from __future__ import annotations

import errno
import threading
from random import Random
from typing import TYPE_CHECKING

import pytest
from tests.cluster.test_federation import NEWS, begin, join
from tests.cluster.test_relay import World
from tests.cluster.town import Town

from afbus._datapath import TERMS, UNICAST
from afbus.link.reason import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.client import Client

MIB = 1 << 20


@pytest.fixture
def town() -> Iterator[Town]:
    """Return three nodes and a master that know each other."""
    made = Town()
    yield made
    made.close()


class Sending:
    """A send that waits, in a thread of its own; the town goes on meanwhile."""

    def __init__(self, client: Client, kind: int, dst: bytes, *bodies: bytes) -> None:
        self.results: list[int] = []
        self.town = client.house.town

        def send() -> None:
            for body in bodies:
                self.results.append(client.rings.send(kind, dst, b"", [body], [], 0, 0, 0, 0, 20.0))

        self.count = len(bodies)
        self.thread = threading.Thread(target=send, daemon=True)
        self.thread.start()

    def wait(self) -> list[int]:
        """Return what became of each."""
        self.town.until(lambda: len(self.results) == self.count)
        self.thread.join(10)
        return self.results


def test_d14_a_large_body_crosses_whole(town: Town) -> None:
    """A megabyte arrives as it was, and what follows it comes behind it."""
    master = begin(town)
    one, other = join(master, "beta"), join(master, "gamma", b"other")
    large = bytes(range(256)) * (4 * 1024)
    sending = Sending(one, UNICAST, b"other", b"before", large, b"behind")
    assert sending.wait() == [0, 0, 0]
    assert other.texts(3) == [b"before", large, b"behind"]


def test_d14_a_large_multicast_reaches_each_node(town: Town) -> None:
    """Each node that wants it gets one copy, and its sender's own node too."""
    master = begin(town)
    hearers = [join(master, house, hears=True) for house in ("alpha", "beta", "gamma", "gamma")]
    speaker = join(master, "alpha")
    large = b"news" * (MIB // 4)
    sending = Sending(speaker, TERMS, NEWS.pack(), large, b"short")
    assert sending.wait() == [0, 0]
    for hearer in hearers:
        assert hearer.texts(2) == [large, b"short"]


def test_d14_others_do_not_wait_for_a_large_body(town: Town) -> None:
    """While one sender's body is on its way, another's small messages pass."""
    master = begin(town)
    slow, quick = join(master, "beta"), join(master, "beta")
    other = join(master, "gamma", b"other")
    for one, to in (("beta", "gamma"), ("gamma", "beta")):
        town.network.path(one, to).delay_s = 0.2
    sending = Sending(slow, UNICAST, b"other", bytes(8 * MIB))
    town.run_for(0.1)
    assert quick.send(b"other", b"quick") == 0
    got = other.texts(2)
    assert got[0] == b"quick"
    assert len(got[1]) == 8 * MIB
    assert sending.wait() == [0]


def test_d14_a_body_that_is_quicker_than_hello_counts() -> None:
    """Streams have no order among each other: what comes first waits for what must come first."""
    for seed in range(20):
        world = World()
        world.network.random = Random(seed)
        for way in (("alpha", "beta"), ("beta", "alpha")):
            world.network.heal(*way)
            world.network.path(*way).loss = 0.4
        alpha, beta = (world.nodes[name] for name in ("alpha", "beta"))
        alpha.put_body(1, bytes(100_000))
        world.network.run_for(5)
        assert (alpha.way, alpha.lanes.taken) == ("open", [1])
        assert beta.lanes.came == {1: bytes(100_000)}


def test_case13_a_body_that_was_cut_begins_anew(town: Town) -> None:
    """A link that ends in the middle of a body: it is carried again, and arrives once."""
    master = begin(town)
    one, other = join(master, "beta"), join(master, "gamma", b"other")
    for here, there in (("beta", "gamma"), ("gamma", "beta")):
        town.network.path(here, there).delay_s = 0.1
    sending = Sending(one, UNICAST, b"other", bytes(6 * MIB), b"behind")
    town.run_for(0.2)
    for link in town.houses["beta"].carrier.links:
        if link.peer.name == "gamma":
            link.close(Reason.CARRIER, "cut by the test")
    assert sending.wait() == [0, 0]
    got = other.texts(2)
    assert [len(body) for body in got] == [6 * MIB, len(b"behind")]


def test_d7_descriptors_do_not_cross(town: Town) -> None:
    """A descriptor is something of this host: EOPNOTSUPP."""
    master = begin(town)
    one = join(master, "beta")
    join(master, "gamma", b"other")
    with open("/dev/null", "rb") as file:
        result = one.rings.send(UNICAST, b"other", b"", [b"x"], [file.fileno()], 0, 0, 0, 0, 0.0)
    assert result == -errno.EOPNOTSUPP
