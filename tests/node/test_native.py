"""Lanes over real links: moved by the datapath, or by hand over aioquic to one that does."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from tests.link.world import WORLDS, QuicWorld
from tests.node.trunks import KIB, Client, Got, Node, Pair

from afbus.link.effect import Down, Message, Room
from afbus.link.frame import Channel
from afbus.link.link import Link
from afbus.link.reason import Reason
from afbus.node.peers import BATCHES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.link.world import End, World

    from afbus.link.effect import Event

BLOCK = 4


@dataclass(eq=False)
class Mover:
    """What a node does with its end of a link: the carrier moves batches, or it does so itself."""

    end: End
    node: Node
    trunk: int
    broken: list[str] = field(default_factory=list)
    is_carried: bool = False
    held: bytes = b""

    def begin(self) -> None:
        """Move batches from now on."""
        self.end.on_event = self._take
        self.is_carried = self.end.link.carry(self.node.switch, self.trunk, self.broken.append)

    def _take(self, event: Event) -> None:
        match event:
            case Message(Channel.DATA, 0, data):
                self.node.switch.inject(self.trunk, data)
            case Room(Channel.DATA, 0):
                self.pump()

    def pump(self) -> None:
        """Send what there is, if that is not done already."""
        self.node.note()
        while not self.is_carried:
            batch = self.held or self.node.switch.take_batch(self.trunk, 64 * KIB)
            self.held = b""
            if not batch:
                return
            if not self.end.link.send(Channel.DATA, BATCHES, batch):
                self.held = batch
                return


@dataclass(eq=False)
class Road:
    """Two nodes with a link."""

    world: World
    pair: Pair
    alpha: Mover
    beta: Mover

    def begin(self) -> None:
        """Let both move."""
        self.alpha.begin()
        self.beta.begin()

    def read(self, client: Client, count: int) -> list[Got]:
        """Wait for so many messages."""
        got: list[Got] = []

        def has_all() -> bool:
            for mover in (self.alpha, self.beta):
                mover.pump()
            got.extend(client.read())
            return len(got) >= count

        if not has_all():
            self.world.wait(has_all, 60)
        return got


@pytest.fixture(params=["native", "native-quic", "quic-native"])
def road(request: pytest.FixtureRequest) -> Iterator[Road]:
    """Two nodes whose link is up; the first is native by the first half of the name."""
    world = WORLDS[request.param]()
    with contextlib.closing(world), contextlib.closing(Pair()) as pair:
        here, there = world.link(world.add("a"), world.add("b"))
        yield Road(
            world,
            pair,
            Mover(here, pair.alpha, pair.beta.number),
            Mover(there, pair.beta, pair.alpha.number),
        )


def natives(road: Road) -> list[Mover]:
    """Those of which the carrier moves batches."""
    return [mover for mover in (road.alpha, road.beta) if mover.is_carried]


def test_d11_messages_cross_in_order_both_ways(road: Road) -> None:
    """Unicast and multicast together, small and large, while the other direction is busy too."""
    there, here = road.pair.beta.join(), road.pair.alpha.join()
    road.pair.hear(there, b"a", BLOCK)
    road.begin()
    assert natives(road)
    want: list[bytes] = []
    got: list[Got] = []
    for number in range(400):
        body = b"%06d" % number + bytes(number % 7 * 600)
        assert here.send(there.address, body, timeout=0) == 0
        assert here.cast(b"a", body, timeout=0) == 0
        assert there.send(here.address, body, timeout=0) == 0
        want.append(body)
        if number % 10 == 9:
            got += road.read(there, 20)
            assert [one.data for one in road.read(here, 10)] == want[-10:]
    assert [one.data for one in got] == [body for body in want for _ in range(2)]
    assert [one.seq for one in got] == list(range(1, 801))


def test_windows_of_the_link_and_the_lane_go_on(road: Road) -> None:
    """Several times all of them, through a ring of one MiB."""
    there, here = road.pair.beta.join(), road.pair.alpha.join()
    road.begin()
    body = bytes(60 * KIB)
    sent = got = 0

    def has_all() -> bool:
        nonlocal sent, got
        while sent < 400 and here.send(there.address, body, timeout=0) == 0:
            sent += 1
        got += len(road.read(there, 0))
        return got == 400

    road.world.wait(has_all, 60)
    assert road.pair.alpha.switch.trunk_stats(2)["sent"] >= 400


def test_d12_who_reads_nothing_stops_its_senders_and_loses_nothing(road: Road) -> None:
    """Back-pressure reaches the ring of the sender, and all goes on behind it."""
    there, here = road.pair.beta.join(rx_bytes=256 * KIB), road.pair.alpha.join()
    other = road.pair.beta.join()
    road.begin()
    body = bytes(60 * KIB)
    sent = 0

    def is_full() -> bool:
        nonlocal sent
        road.alpha.pump()
        road.beta.pump()
        if here.send(there.address, body, timeout=0) == 0:
            sent += 1
            return False
        return road.pair.alpha.switch.trunk_stats(2)["unconfirmed_bytes"] == 0

    road.world.wait(is_full, 60)
    assert sent < 64
    # The other receiver is as free as ever.
    assert here.send(other.address, b"still here", timeout=0) == 0
    assert [one.data for one in road.read(other, 1)] == [b"still here"]
    assert len(road.read(there, sent)) == sent


def test_what_is_uncarried_is_taken_by_nobody(road: Road) -> None:
    """Behind `uncarry` the switch keeps what it has, until it is carried again."""
    there, here = road.pair.beta.join(), road.pair.alpha.join()
    road.begin()
    assert here.send(there.address, b"first") == 0
    road.read(there, 1)
    has_sent = [mover.end.link.uncarry() for mover in natives(road)]
    assert has_sent[0] == road.alpha.is_carried or len(has_sent) == 1
    if road.alpha.is_carried:
        assert here.send(there.address, b"second") == 0
        road.world.let(0.05)
        assert road.pair.alpha.switch.trunk_stats(2)["sent"] == 4
        batch = road.pair.alpha.switch.take_batch(2, 64 * KIB)
        assert b"second" in batch
        road.pair.alpha.switch.trunk_rewind(2, road.pair.beta.switch.trunk_received(1))
    else:
        assert here.send(there.address, b"second") == 0
    road.begin()
    assert [one.data for one in road.read(there, 1)] == [b"second"]


def test_d20_what_was_taken_is_delivered_before_the_end(road: Road) -> None:
    """An orderly end of the link flushes what the carrier has sent by itself."""
    there, here = road.pair.beta.join(rx_bytes=4096 * KIB), road.pair.alpha.join()
    road.begin()
    bodies = [b"%03d" % number + bytes(3000) for number in range(30)]
    for body in bodies:
        assert here.send(there.address, body) == 0
    got = road.read(there, 1)
    road.alpha.end.link.close(Reason.GOING_DOWN, "restart")
    road.world.wait(lambda: road.alpha.end.has(Down) and road.beta.end.has(Down), 60)
    assert road.beta.end.down == Down(Reason.GOING_DOWN, "restart", is_remote=True)
    got += there.read()
    arrived = road.pair.beta.switch.trunk_received(1)
    assert [one.data for one in got] == bodies[: len(got)]
    # All that has left the switch has arrived, and the rest goes with the next link.
    road.pair.alpha.switch.trunk_rewind(2, arrived)
    road.pair.carry()
    assert [one.data for one in [*got, *there.read()]] == bodies


@pytest.mark.parametrize("road", ["native", "quic-native"], indirect=True)
@pytest.mark.parametrize("junk", [b"", b"junk", bytes(64)])
def test_records_that_break_a_rule_are_told(road: Road, junk: bytes) -> None:
    """By who moves them, with the rule; the link is the owner's to end."""
    road.beta.begin()
    # As if from a switch that has lost its mind.
    assert road.alpha.end.link.send(Channel.DATA, BATCHES, junk)
    road.world.wait(lambda: bool(road.beta.broken))
    assert len(road.beta.broken) == 1
    assert not road.beta.end.has(Down)


def test_what_came_before_it_is_carried_goes_to_the_owner(road: Road) -> None:
    """Frames before `carry` are the owner's, those behind it the switch's, in one order."""
    there, here = road.pair.beta.join(), road.pair.alpha.join()
    early: list[bytes] = []

    def greet(event: Event) -> None:
        if isinstance(event, Message):
            early.append(event.data)
            if event.destination == 1:
                road.beta.begin()

    road.beta.end.on_event = greet
    road.alpha.end.link.send(Channel.DATA, 1, b"hello")
    road.alpha.begin()
    for number in range(50):
        assert here.send(there.address, b"%d" % number) == 0
    got = road.read(there, 50)
    assert early == [b"hello"]
    assert [one.data for one in got] == [b"%d" % number for number in range(50)]


def test_only_native_links_carry() -> None:
    """Over aioquic the owner moves the batches itself."""
    with contextlib.closing(QuicWorld()) as world, contextlib.closing(Pair()) as pair:
        here, _ = world.pair()
        assert not here.link.carry(pair.alpha.switch, 2, lambda _: None)
        assert not here.link.uncarry()
        assert here.link.carried_bytes == 0
        assert type(here.link) is Link
