"""What bad peers say, a hundred thousand times: the link ends with a reason, nothing else changes.

All that hosts say to each other is here, at the core that reads it: frames of links, of nodes to
the master, of the master to nodes (tables), of nodes to each other, and records of lanes. Packets
of the door are in tests/proto/test_hostile.py, datagrams in tests/link/test_quic.py.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from tests.figures import IS_FULL, note
from tests.master.world import PATH, World
from tests.mutation import mutate
from tests.node.test_uplink import Desk
from tests.node.trunks import Pair

from afbus.link import frame
from afbus.link.core import LinkCore, State
from afbus.link.effect import Cut, Down
from afbus.link.frame import FrameKind, Hello
from afbus.link.reason import Reason
from afbus.link.settings import Settings
from afbus.node.uplink_effect import Changed, Hang
from afbus.proto import cluster, peer, relay
from afbus.proto.cluster import (
    Ack,
    ClusterCall,
    ClusterHello,
    ClusterWelcome,
    Nack,
    Part,
    Resync,
    TableDelta,
    Withdrawn,
)
from afbus.proto.errors import RemoteProtocolError
from afbus.proto.frames import Result
from afbus.proto.operation import ClusterOp
from afbus.proto.peer import BodyRefused, BodySent, BodyTaken, Command, PeerHello
from afbus.proto.record import (
    BusRecord,
    DeniedRecord,
    LeaseRecord,
    MatchRecord,
    NodeRecord,
    NodeState,
    OwnerRecord,
    Record,
    encode_record,
)
from afbus.proto.relay import RelayKind
from afbus.proto.table import Delta
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from afbus.proto.cluster import ClusterFrame

pytestmark = pytest.mark.slow

#: How many times as many with AFBUS_TEST_FULL=1.
MORE = 10 if IS_FULL else 1
#: Together 100,000; where each takes longer they are fewer.
FRAMES, CALLS, TABLES, PEERS, BATCHES = (
    MORE * count for count in (40_000, 10_000, 10_000, 20_000, 20_000)
)
BOOT = bytes(range(16))


@pytest.fixture
def chance() -> random.Random:
    """Return the same chance each time."""
    return random.Random(100_000)


def test_case42_case43_bad_frames_end_their_link_with_a_reason(chance: random.Random) -> None:
    """On each stream of a link that is up; behind its end nothing happens any more."""
    settings = Settings()
    hello = frame.encode(FrameKind.HELLO, 0, Hello(1, 1, BOOT, 4096, 3, 2, 2048).encode())
    greeting = hello + frame.encode_number(FrameKind.ACK, 0)
    good = [
        frame.encode(FrameKind.MESSAGE, 0, b"hello"),
        frame.encode(FrameKind.MESSAGE, 1 << 40, bytes(300)),
        frame.encode(FrameKind.FORGET, 3),
        frame.encode_credits([((2, 0), 100), ((0, 7), 1 << 40)]),
        frame.encode_forgotten((2, 0)),
        frame.encode_number(FrameKind.ACK, 0),
        frame.encode_number(FrameKind.FLUSH, 0),
        frame.encode_body(7, 100) + bytes(100),
        hello,
    ]
    reasons: dict[Reason, int] = {}

    def begin() -> LinkCore:
        made = LinkCore(settings, BOOT, 0.0)
        made.receive_data(0, greeting, False, 0.0)
        made.take_effects()
        assert made.state is State.UP
        return made

    core = begin()
    for _ in range(FRAMES):
        data = mutate(chance, chance.choice(good))
        stream = chance.choice((0, 1, 2, 3, 4, 99))
        core.receive_data(stream, data, chance.random() < 0.1, 0.0)
        effects = core.take_effects()
        if core.state is State.UP:
            assert not [one for one in effects if isinstance(one, Down | Cut)]
            continue
        [down] = [one for one in effects if isinstance(one, Down)]
        [cut] = [one for one in effects if isinstance(one, Cut)]
        assert (core.state, cut.reason, bool(down.text)) == (State.DOWN, down.reason, True)
        reasons[down.reason] = reasons.get(down.reason, 0) + 1
        core.receive_data(0, greeting, False, 0.0)
        assert (core.take_effects(), core.get_timer()) == ([], None)
        core = begin()
    assert {Reason.MALFORMED, Reason.LIMIT, Reason.ORDER} <= reasons.keys()
    shown = ", ".join(f"{count} {reason.rule}" for reason, count in sorted(reasons.items()))
    note(f"{FRAMES:,} bad frames on links: {shown}")


def test_case42_bad_frames_of_a_node_change_nothing_at_the_master(chance: random.Random) -> None:
    """What is refused is no part of the table, and other nodes notice nothing."""
    world = World()
    other, node = world.node("other").join(1), world.node("bad")
    where = {"endpoint": 1, "path": PATH}
    good: list[ClusterFrame] = [
        ClusterCall(1, ClusterOp.BIND, where | {"address": b"master"}),
        ClusterCall(2, ClusterOp.OWN, where | {"name": b"org.a", "flags": 1}),
        ClusterCall(3, ClusterOp.SUBSCRIBE, where | {"terms": Terms("a.b").pack()}),
        ClusterCall(4, ClusterOp.ASK, where | {"action": "send", "address": b"org.a"}),
        ClusterCall(5, ClusterOp.ENTER, {"endpoint": 2, "uid": 0}),
        ClusterCall(6, ClusterOp.LEASE, {"block": 1}),
        ClusterCall(7, ClusterOp.RENEW, {"csr": bytes(200)}),
        ClusterHello("bad", 3, 4, ("bad:4451",)),
        Ack(world.core.epoch, 1),
        Nack(world.core.epoch, 1, "no"),
        Resync(world.core.epoch, 1),
    ]
    packets = [cluster.encode(one) for one in good]
    cuts = 0
    for _ in range(CALLS):
        if node.link is None:
            node.join(1)
        # Others get what a former frame has changed with good reason.
        version = other.mirror.version
        assert node.link is not None
        world.core.receive_frame(node.link, mutate(chance, chance.choice(packets)), world.now)
        world.settle()
        assert other.link is not None
        if node.cut is not None:
            cuts += 1
            assert node.cut.text
            assert other.mirror.version == version
        world.audit.clear()
    assert CALLS // 4 < cuts < CALLS
    note(f"{CALLS:,} bad frames of a node to the master: {cuts:,} links cut")


def test_case26_case42_bad_tables_change_nothing_at_a_node(chance: random.Random) -> None:
    """A table is followed as a whole or not at all; what is no table ends the link, with a text."""
    desk = Desk()
    desk.begin()
    mirror = desk.uplink.mirror
    records: list[Record] = [
        BusRecord(PATH, 1, 7, b"hall", 512, "fifo", bytes(16), 1),
        DeniedRecord(5, "afbus://c/node/x", 99, "stolen"),
        LeaseRecord(9, 7),
        MatchRecord(1, 7, Terms.of("a")),
        NodeRecord("b", 8, NodeState.LIVE, BOOT, ("b:4451",)),
        OwnerRecord(1, b"org.a", 8, 1),
    ]
    puts = tuple(sorted(encode_record(one) for one in records))
    outcomes = {"hung up": 0, "refused": 0, "followed": 0}
    for _ in range(TABLES):
        epoch, version = mirror.epoch, mirror.version
        good: list[ClusterFrame] = [
            TableDelta(epoch, Delta(version, version + 1, puts)),
            TableDelta(epoch, Delta(version, version + 1, puts[1:], (puts[0][0],))),
            Part(epoch, version + 1, 0, 1, puts),
            ClusterWelcome("c", epoch, 7),
            Result(3, value={"block": 4}),
            Withdrawn(1, ClusterOp.OWN, PATH, b"org.a", reason="policy"),
        ]
        data = mutate(chance, cluster.encode(chance.choice(good)))
        before = mirror.snapshot()
        desk.said.clear()
        desk.uplink.receive_frame(data, desk.now)
        desk.settle()
        told = desk.take()
        hangs = [one for one in told if isinstance(one, Hang)]
        if any(isinstance(one, Changed) for one in told):
            outcomes["followed"] += 1
        elif hangs or any(isinstance(one, Nack | Resync) for one in desk.said):
            outcomes["hung up" if hangs else "refused"] += 1
            assert mirror.snapshot() == before
        if hangs:
            assert hangs[0].text
            desk.end()
            desk.begin()
        elif mirror.epoch != epoch or desk.said:
            # It asks for the whole table, which ends the waiting for it.
            desk.hear(Part(mirror.epoch, mirror.version + 1, 0, 1, puts))
            desk.take()
    assert min(outcomes.values()) > TABLES // 100
    shown = ", ".join(f"{count:,} {what}" for what, count in outcomes.items())
    note(f"{TABLES:,} bad frames of the master to a node: {shown}")


def _languages() -> Iterator[tuple[Callable[[bytes], object], list[bytes]]]:
    items = ((1, bytes(40)),)
    frames = (
        PeerHello(BOOT, bytes(16), 7),
        Command(1, PATH, 2, b"26.3", items),
        Result(1, value={"owned": [b"26.3"]}),
        BodySent(1, 100, bytes(32)),
        BodyTaken(1),
        BodyRefused(1, 5, "no room"),
    )
    yield peer.decode, [peer.encode(one) for one in frames]
    messages = [relay.encode(kind, bytes(40)) for kind in RelayKind]
    yield relay.decode, messages


def test_case42_bad_frames_of_other_nodes_are_errors_of_one_type(chance: random.Random) -> None:
    """For which `peers.py` and `relay.py` end the link (test_a_broken_batch_ends_the_link)."""
    targets, refused = list(_languages()), 0
    for _ in range(PEERS):
        decode, packets = chance.choice(targets)
        try:
            decode(mutate(chance, chance.choice(packets)))
        except RemoteProtocolError as error:
            refused += bool(str(error))
    assert PEERS // 4 < refused < PEERS
    note(f"{PEERS:,} bad frames of other nodes: {refused:,} refused")


def test_case42_bad_records_change_nothing_in_the_switch(chance: random.Random) -> None:
    """A batch that breaks a rule is refused with its name; the next lane goes on, and others do."""
    pair = Pair()
    try:
        here, there, beside = pair.alpha.join(), pair.beta.join(), pair.beta.join()
        pair.hear(there, b"topic")
        for number in range(3):
            assert here.send(there.address, b"%d" % number) == 0
            assert here.cast(b"topic", bytes(100)) == 0
        batch = pair.alpha.switch.take_batch(pair.beta.number, 1 << 16)
        refused = 0
        for turn in range(BATCHES):
            # As with a peer that has begun anew, or the first number would be the only fault.
            pair.beta.switch.trunk_hear(pair.alpha.number, False)
            try:
                pair.beta.switch.inject(pair.alpha.number, mutate(chance, batch))
            except ValueError as error:
                refused += bool(str(error))
            if turn % 100 == 0:
                there.read()
                # What it owes the peer by now, nobody reads; and among those here all is as ever.
                pair.beta.switch.trunk_restart(pair.alpha.number)
                assert beside.send(there.address, b"here") == 0
                assert there.read()[-1].data == b"here"
        assert refused > BATCHES // 4
        there.read()
        for node, other in ((pair.alpha, pair.beta), (pair.beta, pair.alpha)):
            node.switch.trunk_restart(other.number)
            other.switch.trunk_hear(node.number, True)
        assert here.send(there.address, b"at last") == 0
        pair.carry()
        assert [got.data for got in there.read() if got.gap is None] == [b"at last"]
    finally:
        pair.close()
    note(f"{BATCHES:,} bad batches of records: {refused:,} refused")
