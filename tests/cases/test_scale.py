"""Many endpoints on one agent, many matches on one bus."""

from __future__ import annotations

import random
import resource
import socket
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from tests.cases.actors import ITEMS, MASTER, MULTICAST, PATH, Stage, about, join
from tests.figures import note

from afbus.client.socket import Socket
from afbus.proto import control
from afbus.proto.address import BusAddress
from afbus.proto.control import Match, MulticastMatch, MulticastSend, OwnedAddr
from afbus.proto.errors import RingFull
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from tests.cases.actors import Fleet
    from tests.cases.conftest import Node

ENDPOINTS = 1000
PROCESSES = 10
PART = ENDPOINTS // PROCESSES

MEMBERS = 100
MATCHES = 100_000
#: Of each member's thousand: exact topics, topics with a pair, raw bits.
KINDS = (700, 200, 100)
AREAS, SENSORS, HOSTS, MASKS = 100, 500, 100, 5000
#: Items in one command: their structures fill a frame.
ITEMS_AT_ONCE = 200
MESSAGES = 3000
RAW_MESSAGES = 300
BITS = 512


def be_many(stage: Stage, first: int) -> None:
    """Be a hundred endpoints, that send and read when they are told."""
    numbers = range(first, first + PART)
    sockets = [
        stage.join(name=f"e{number}", listen=[("all", "GAP")], tx_bytes=4096, rx_bytes=4096)
        for number in numbers
    ]
    stage.tell("joined")
    stage.hear()
    for number, one in zip(numbers, sockets, strict=True):
        one.sendto(b"from %d" % number, BusAddress(PATH, f"e{(number + 1) % ENDPOINTS}"))
    stage.tell("sent")
    stage.hear()
    for number, one in zip(numbers, sockets, strict=True):
        before = (number - 1) % ENDPOINTS
        assert one.recvfrom(100) == (b"from %d" % before, BusAddress(PATH, f"e{before}"))
        assert one.recv(100) == b"to all"
        with pytest.raises(RingFull):
            one.recv(100, socket.MSG_DONTWAIT)
    stage.tell("read")


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * ENDPOINTS + 100,
    reason="the agent may not have two descriptors for each of a thousand endpoints",
)
def test_d13_thousand_endpoints(node: Node, fleet: Fleet) -> None:
    """1,000 endpoints of ten processes: each sends to the next, and hears what is sent to all."""
    node.start()
    fleet.start_master()
    with join(node.place) as witness:
        descriptors, own = node.descriptors, node.memory_kib("RssAnon")
        began = time.monotonic()
        actors = [fleet.start(be_many, first=part * PART) for part in range(PROCESSES)]
        for actor in actors:
            assert actor.hear() == "joined"
        took = time.monotonic() - began
        more = node.memory_kib("RssAnon") - own
        note(
            f"{ENDPOINTS} endpoints joined in {took:.1f} s, "
            f"{more / ENDPOINTS:.1f} KiB of the agent's own memory each"
        )
        assert node.descriptors == descriptors + 2 * ENDPOINTS
        for actor in actors:
            actor.tell("send")
        for actor in actors:
            assert actor.hear() == "sent"
        began = time.monotonic()
        witness.sendmsg([b"to all"], [about("all")], 0, MULTICAST)
        note(f"one multicast to {ENDPOINTS}: {1000 * (time.monotonic() - began):.2f} ms")
        for actor in actors:
            actor.tell("read")
        for actor in actors:
            assert actor.hear() == "read"
            actor.finish()
        assert witness.status()["endpoints"] == 2
        assert node.descriptors == descriptors


class Model:
    """What the matches of all members say, looked up without any filter of bits."""

    def __init__(self, rng: random.Random) -> None:
        self._by_terms: dict[frozenset[str], set[int]] = defaultdict(set)
        self._by_mask: dict[int, set[int]] = defaultdict(set)
        # So many bits that no message stated in terms has them all by chance, and parts of them.
        wide = [rng.sample(range(BITS), 16) for _ in range(MASKS // 2)]
        narrow = [rng.sample(bits, 12) for bits in wide]
        self._masks = [sum(1 << bit for bit in bits) for bits in (*wide, *narrow)]
        self._rng = rng

    def draw_matches(self, member: int) -> list[Match]:
        """Draw the matches of a member, and note them."""
        rng = self._rng
        whats: dict[Terms | bytes, None] = {}
        while len(whats) < KINDS[0]:
            whats[self._draw_topic()] = None
        while len(whats) < KINDS[0] + KINDS[1]:
            area = f"area{rng.randrange(AREAS)}"
            whats[Terms.of(area, host=rng.randrange(HOSTS))] = None
        for mask in rng.sample(self._masks, KINDS[2]):
            whats[mask.to_bytes(BITS // 8, "little")] = None
            self._by_mask[mask].add(member)
        for what in whats:
            if isinstance(what, Terms):
                self._by_terms[frozenset(what.required_terms())].add(member)
        return [Match(PATH.encode(), what) for what in whats]

    def _draw_topic(self) -> Terms:
        area, sensor = self._rng.randrange(AREAS), self._rng.randrange(SENSORS)
        return Terms(f"area{area}.sensor{sensor}")

    def draw_message(self) -> tuple[Terms, set[int]]:
        """Draw what a message is about, and say who must get it."""
        terms = Terms(self._draw_topic().topic, (f"host={self._rng.randrange(HOSTS)}", "x=y"))
        names = terms.message_terms()
        required = [frozenset(one) for name in names for one in ({name}, {name, names[2]})]
        return terms, set().union(*(self._by_terms[one] for one in required))

    def draw_bits(self) -> tuple[bytes, set[int]]:
        """Draw bits, and say who must get a message with them."""
        bits = self._rng.choice(self._masks)
        for bit in self._rng.sample(range(BITS), 2):
            bits |= 1 << bit
        wanted = (self._by_mask[mask] for mask in self._masks if bits & mask == mask)
        return bits.to_bytes(BITS // 8, "little"), set().union(*wanted)


def read_numbers(one: Socket) -> list[int]:
    """The numbers of all messages that are there."""
    numbers: list[int] = []
    while True:
        try:
            found = one.recvmmsg(1000, 100, ITEMS, socket.MSG_DONTWAIT)
        except RingFull:
            return numbers
        numbers += [int(data) for data, *_ in found]


def let_in(bus: Socket, place: str, number: int) -> Socket:
    """A new member of the bus of this process."""
    one = Socket(node=place)
    one.settimeout(60)
    one.sendto(b"AUTH", MASTER)
    body, source = bus.recvfrom(100)
    assert body == b"AUTH"
    owned = control.encode(OwnedAddr(BusAddress(PATH, f"1.{number + 1}")))
    may_send = control.encode(MulticastSend(PATH.encode(), Terms()))
    bus.sendmsg([b"welcome"], [owned, may_send], 0, source)
    assert bus.recvfrom(4096)[1].is_kernel
    assert one.recv(100) == b"welcome"
    return one


def grant(bus: Socket, one: Socket, to: BusAddress, matches: list[Match]) -> None:
    """Give a member its matches."""
    for at in range(0, len(matches), ITEMS_AT_ONCE):
        items = [control.encode(MulticastMatch(each)) for each in matches[at : at + ITEMS_AT_ONCE]]
        bus.sendmsg([b"more"], items, 0, to)
        assert one.recv(100) == b"more"


def send_all(sender: Socket, model: Model, wanted: dict[int, list[int]]) -> float:
    """Send all kinds of messages, note who must get which; return the seconds that it took."""
    messages = [model.draw_message() for _ in range(MESSAGES)]
    raw = [model.draw_bits() for _ in range(RAW_MESSAGES)]
    items = [control.encode(control.MessageTerms(terms)) for terms, _ in messages]
    addresses = [BusAddress.multicast(PATH, bits) for bits, _ in raw]
    for number, (_, members) in enumerate([*messages, *raw]):
        for member in members:
            wanted[member].append(number)
    began = time.monotonic()
    for number, item in enumerate(items):
        sender.sendmsg([b"%d" % number], [item], 0, MULTICAST)
    for number, address in enumerate(addresses, MESSAGES):
        sender.sendto(b"%d" % number, address)
    return time.monotonic() - began


@pytest.mark.cluster
@pytest.mark.slow
def test_d8_d10_hundred_thousand_matches(node: Node) -> None:
    """100,000 matches of a hundred members on one bus: each message reaches whom it is for.

    Exact topics, topics with pairs, raw bits. The same messages are sent when one member in a
    hundred has its matches, and when all have, for comparison.
    """
    node.start()
    model = Model(random.Random(8))
    with Socket(node=node.place) as bus:
        bus.settimeout(60)
        bus.bind(MASTER)
        members = [let_in(bus, str(node.place), number) for number in range(MEMBERS + 1)]
        sender = members.pop()
        began = time.monotonic()
        for number, one in enumerate(members):
            grant(bus, one, BusAddress(PATH, f"1.{number + 1}"), model.draw_matches(number))
            if number in (0, MEMBERS - 1):
                count = bus.status()["matches"] - MEMBERS - 1
                granted_s = time.monotonic() - began
                wanted: dict[int, list[int]] = defaultdict(list)
                took = send_all(sender, model, wanted)
                got = [read_numbers(each) for each in members]
                assert got == [wanted[each] for each in range(MEMBERS)]
                note(
                    f"{count} matches: {1e6 * took / (MESSAGES + RAW_MESSAGES):.1f} us a message, "
                    f"{sum(map(len, got))} deliveries of {MESSAGES + RAW_MESSAGES} messages"
                )
        assert count == MATCHES
        note(f"granted in {granted_s:.1f} s; {node.memory_kib() // 1024} MiB of the agent")
        for one in (*members, sender):
            one.close()
