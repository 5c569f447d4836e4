"""Links by way of the master: two nodes that cannot reach each other, over real links in memory."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from tests.cluster.post import take_in
from tests.link.authority import NOW, Signer, node
from tests.node.lanes import CONFIRM_S, Lanes

from afbus.link.carrier import Member
from afbus.link.effect import Down, Message, Room
from afbus.link.frame import Channel
from afbus.link.identity import Identity, Role
from afbus.link.memory import MemoryNetwork
from afbus.master.relay import Relay as MasterRelay
from afbus.node.peers import Peers
from afbus.node.relay import Relay
from afbus.node.relayed_bodies import RelayedBodies
from afbus.proto import relay
from afbus.proto.errors import RemoteProtocolError
from afbus.proto.limits import KIB, MIB
from afbus.proto.peer import BodyTaken
from afbus.proto.record import NodeRecord, NodeState
from afbus.proto.relay import BODIES, BODY_WINDOW_BYTES, RelayKind

if TYPE_CHECKING:
    from afbus.link.effect import Event
    from afbus.link.link import Link, Sink
    from afbus.proto.peer import PeerFrame

NAMES = ("alpha", "beta")
NUMBERS = {"alpha": 1, "beta": 2}
ROOT = Signer.root()
MASTER = Identity("test", Role.MASTER, "master")
CREDENTIALS = {name: ROOT.issue(node(name)) for name in NAMES} | {"master": ROOT.issue(MASTER)}


class Store(Lanes):
    """Lanes of a switch that has bodies too, by their tickets."""

    def __init__(self) -> None:
        super().__init__()
        self.outgoing: dict[int, bytes] = {}
        self.taken: list[int] = []
        self.not_taken: list[tuple[int, int]] = []
        self.came: dict[int, bytes] = {}

    def trunk_is_idle(self, trunk: int) -> bool:
        """Tell whether there is nothing to say, and no body to carry."""
        settled = {*self.taken, *(ticket for ticket, _ in self.not_taken)}
        return super().trunk_is_idle(trunk) and self.outgoing.keys() <= settled

    def body_fd(self, trunk: int, ticket: int) -> int:
        """Return a descriptor of a body."""
        fd = os.memfd_create("body", os.MFD_CLOEXEC)
        os.write(fd, self.outgoing[ticket])
        return fd

    def body_taken(self, trunk: int, ticket: int) -> None:
        """Note it."""
        self.taken.append(ticket)

    def body_refused(self, trunk: int, ticket: int, errno: int) -> None:
        """Note it."""
        self.not_taken.append((ticket, errno))

    def body_put(self, trunk: int, ticket: int, fd: int) -> None:
        """Keep a body; that it cannot be written to is checked by writing."""
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        assert ticket not in self.came
        self.came[ticket] = os.pread(fd, 1 << 30, 0)


class Master:
    """A master that does nothing but relay."""

    def __init__(self, network: MemoryNetwork) -> None:
        self.relay = MasterRelay()
        member = Member(
            CREDENTIALS["master"], ROOT.authority(), b"m" * 16, self.accept, lambda: NOW
        )
        self.carrier = network.add("master", member)

    def accept(self, link: Link) -> Sink:
        """Take the link of a node."""
        return take_in(self.relay, NUMBERS[link.peer.name], link)


@dataclass
class Node:
    """One node: lanes, peers, and a link to the master."""

    network: MemoryNetwork
    name: str
    lanes: Store = field(default_factory=Store)
    told: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = Random(self.name)
        self.master: Link | None = None
        boot = self.random.randbytes(16)
        member = Member(CREDENTIALS[self.name], ROOT.authority(), boot, self.accept, lambda: NOW)
        self.carrier = self.network.add(self.name, member)
        self.peers = Peers(
            self.carrier,
            node(self.name),
            self.lanes,
            self,
            self.random,
            self.random.randbytes,
            lambda place: place,
        )
        self.lanes.ready = lambda number: self.carrier.call_at(
            self.carrier.now() + CONFIRM_S, lambda: self.peers.handle_ready(number)
        )
        self.relay = Relay(self.peers.accept, self.identify)
        self.peers.go_round = self.relay.open
        self.other = "beta" if self.name == "alpha" else "alpha"
        record = NodeRecord(
            self.other, NUMBERS[self.other], NodeState.LIVE, bytes(16), (self.other,)
        )
        self.peers.set_node(record)

    def find_master(self) -> None:
        """Have a link to the master."""
        self.carrier.dial("master", MASTER, lambda _: None)
        self.network.run_for(0.5)
        self.relay.admit()

    def identify(self, number: int) -> Identity | None:
        """Return who a node is."""
        return node(self.other) if number == NUMBERS[self.other] else None

    def accept(self, link: Link) -> Sink:
        """Take a link of the other node, or that to the master."""
        if link.peer != MASTER:
            return self.peers.accept(link)
        self.relay.set_master(link)
        self.master = link

        def handle(event: Event) -> None:
            match event:
                case Message(_, destination, data, cost):
                    self.relay.receive(destination, data, cost)
                case Room(Channel.DATA, destination):
                    self.relay.handle_room(destination)
                case Down() if self.master is link:
                    self.relay.set_master(None)
                case _:
                    pass

        return handle

    def awaits(self, name: str) -> bool:
        """Tell whether an answer is owed: never."""
        return False

    def peer_opened(self, name: str) -> None:
        """Note it."""
        self.told.append(("opened", name))

    def peer_received(self, name: str, frame: PeerFrame) -> None:
        """Note it."""
        self.told.append(("frame", name, frame))

    def peer_lost(self, name: str, text: str) -> None:
        """Note it."""
        self.told.append(("lost", name))

    def peer_found(self, name: str) -> None:
        """Note it."""
        self.told.append(("found", name))

    def put(self, text: str) -> None:
        """Send a record to the other node."""
        self.lanes.put(NUMBERS[self.other], text)
        self.peers.handle_ready(NUMBERS[self.other])

    def put_body(self, ticket: int, data: bytes) -> None:
        """Have a large body carried to the other node."""
        self.lanes.outgoing[ticket] = data
        self.peers.handle_body(NUMBERS[self.other], ticket, len(data))

    @property
    def arrived(self) -> list[str]:
        """What has come from the other node."""
        return [text for _, text in self.lanes.arrived]

    @property
    def way(self) -> str:
        """How the other node is reached."""
        return str(self.peers.describe()[0]["link"])


class World:
    """A master, and two nodes between which nothing passes."""

    def relayed(self) -> tuple[Node, Node]:
        """Return both nodes, once they speak by way of the master."""
        alpha, beta = self.nodes["alpha"], self.nodes["beta"]
        alpha.put("first")
        self.network.run_for(5)
        assert alpha.way == beta.way == "relayed"
        return alpha, beta

    @property
    def kept_bytes(self) -> int:
        """What the master holds of messages that it has not passed on, and what is on its way."""
        links = [link for link in self.master.carrier.links if not link.is_down]
        return sum(link.unread_bytes + link.in_flight_bytes for link in links)

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.master = Master(self.network)
        self.nodes = {name: Node(self.network, name) for name in NAMES}
        for one in self.nodes.values():
            one.find_master()
        self.network.cut("alpha", "beta")
        self.network.cut("beta", "alpha")


@pytest.fixture
def world() -> World:
    """Return that."""
    return World()


def test_nodes_that_cannot_reach_each_other_speak_by_way_of_the_master(world: World) -> None:
    """Lanes go both ways, in order, and both sides say that they are relayed."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    for number in range(20):
        alpha.put(f"to beta {number}")
        beta.put(f"to alpha {number}")
    world.network.run_for(5)
    assert beta.arrived == [f"to beta {number}" for number in range(20)]
    assert alpha.arrived == [f"to alpha {number}" for number in range(20)]
    assert alpha.way == beta.way == "relayed"


def test_a_master_that_may_not_have_read_hello_is_no_way(world: World) -> None:
    """It would end the link: whoever sends to other nodes first says who it is."""
    alpha = world.nodes["alpha"]
    alpha.relay.set_master(alpha.master)
    assert not alpha.relay.open(NUMBERS["beta"])
    alpha.relay.admit()
    assert alpha.relay.open(NUMBERS["beta"])


def test_what_another_node_says_shows_that_the_master_has_read_hello(world: World) -> None:
    """Greetings on the data channel may come before what the master says on its own."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.relay.set_master(alpha.master)
    beta.put("hello")
    world.network.run_for(5)
    assert alpha.arrived == ["hello"]


def test_a_direct_way_is_found_again(world: World) -> None:
    """When the nodes can reach each other again, the link goes directly, and nothing is lost."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.put("round")
    world.network.run_for(5)
    for one, other in (("alpha", "beta"), ("beta", "alpha")):
        world.network.heal(one, other)
    world.network.run_for(25)
    assert alpha.way == beta.way == "open"
    alpha.put("straight")
    world.network.run_for(1)
    assert beta.arrived == ["round", "straight"]


def test_case13_a_link_that_fell_silent_is_not_waited_for(world: World) -> None:
    """Within 6 s messages go by way of the master, long before the link ends and a node is lost."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    ways = (("alpha", "beta"), ("beta", "alpha"))
    for way in ways:
        world.network.heal(*way)
    alpha.put("straight")
    world.network.run_for(5)
    assert alpha.way == beta.way == "open"
    for way in ways:
        world.network.cut(*way)
    alpha.put("round")
    world.network.run_for(6)
    assert beta.arrived == ["straight", "round"]
    assert alpha.way == beta.way == "relayed"


def test_d16_a_lost_relay_loses_nothing(world: World) -> None:
    """The master goes and comes: what was accepted meanwhile arrives once, in order."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.put("0")
    world.network.run_for(5)
    assert alpha.way == "relayed"
    world.master.carrier.kill()
    alpha.put("1")
    world.network.run_for(3)
    world.master = Master(world.network)
    for one in world.nodes.values():
        one.find_master()
    alpha.put("2")
    world.network.run_for(30)
    assert beta.arrived == ["0", "1", "2"]


def test_a_node_without_a_link_to_the_master_is_told_to_the_other(world: World) -> None:
    """The other end does not wait for what cannot come."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.put("hello")
    world.network.run_for(5)
    assert alpha.way == "relayed"
    beta.carrier.kill()
    for link in list(world.master.carrier.links):
        if link.peer.name == "beta":
            world.master.relay.drop(2, link)
    world.network.run_for(1)
    assert alpha.way != "relayed"


def test_nobody_speaks_to_who_does_not_read(world: World) -> None:
    """What lies at the master for one node is bounded by the sender's credit."""
    alpha = world.nodes["alpha"]
    (link,) = [link for link in alpha.carrier.links if link.peer == MASTER]
    (there,) = [link for link in world.master.carrier.links if link.peer.name == "beta"]
    world.network.cut("master", "beta")
    message = relay.encode(relay.RelayKind.BATCH, bytes(100_000))
    sent = 0
    while link.send(Channel.DATA, 2, message):
        sent += 1
        world.network.run_for(0.001)
        assert sent < 1000
    window = alpha.carrier.member.settings.window_bytes
    assert sent * len(message) <= 2 * window + there.in_flight_bytes


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x09hello"])
def test_what_is_no_relayed_message_is_refused(data: bytes) -> None:
    """One type of error, whatever comes."""
    with pytest.raises(RemoteProtocolError):
        relay.decode(data)


# --- large bodies ---


def test_d14_large_bodies_go_by_way_of_the_master(world: World) -> None:
    """More than may be open at a time, both ways: each arrives whole and sealed, and is taken."""
    alpha, beta = world.relayed()
    count = 2 * BODIES + 3
    bodies = {ticket: Random(ticket).randbytes(100_000 + ticket) for ticket in range(count)}
    for ticket, data in bodies.items():
        alpha.put_body(ticket, data)
        beta.put_body(ticket, data[::-1])
    world.network.run_for(5)
    assert beta.lanes.came == bodies
    assert sorted(alpha.lanes.taken) == sorted(bodies) == sorted(beta.lanes.taken)
    assert alpha.lanes.came == {ticket: data[::-1] for ticket, data in bodies.items()}


def test_d14_what_the_master_keeps_of_bodies_is_bounded(world: World) -> None:
    """A node that does not read: of 40 MiB for it one window lies at the master, and goes on."""
    alpha, beta = world.relayed()
    world.network.run_for(1)
    world.network.cut("master", "beta")
    bodies = {ticket: bytes([ticket]) * (8 * MIB) for ticket in range(5)}
    for ticket, data in bodies.items():
        alpha.put_body(ticket, data)
    most = 0
    for _ in range(20):
        world.network.run_for(0.05)
        most = max(most, world.kept_bytes)
    # The window, and for each of its pieces and for each body a few bytes.
    assert BODY_WINDOW_BYTES <= most <= BODY_WINDOW_BYTES + 16 * KIB
    world.network.heal("master", "beta")
    world.network.run_for(10)
    assert beta.lanes.came == bodies


def test_d14_records_do_not_wait_for_bodies_on_a_relayed_link(world: World) -> None:
    """What is sent while a body is on its way overtakes all of it but one window."""
    alpha, beta = world.relayed()
    for way in (("alpha", "master"), ("master", "beta"), ("beta", "master"), ("master", "alpha")):
        world.network.path(*way).delay_s = 0.05
    alpha.put_body(1, bytes(16 * MIB))
    world.network.run_for(0.3)
    alpha.put("quick")
    world.network.run_for(0.3)
    assert beta.arrived == ["first", "quick"]
    assert not beta.lanes.came
    world.network.run_for(30)
    assert len(beta.lanes.came[1]) == 16 * MIB


def test_case13_a_relayed_body_begins_anew_with_the_master(world: World) -> None:
    """The master goes in the middle of a body and comes back: the body arrives once, whole."""
    alpha, beta = world.relayed()
    for way in (("alpha", "master"), ("master", "beta"), ("beta", "master"), ("master", "alpha")):
        world.network.path(*way).delay_s = 0.05
    data = Random(1).randbytes(8 * MIB)
    alpha.put_body(1, data)
    world.network.run_for(0.4)
    world.master.carrier.kill()
    world.network.run_for(3)
    assert not beta.lanes.came
    world.master = Master(world.network)
    for one in world.nodes.values():
        one.find_master()
    world.network.run_for(40)
    assert beta.lanes.came == {1: data}
    assert alpha.lanes.taken == [1]


def test_case13_a_relayed_body_goes_on_directly(world: World) -> None:
    """A direct way is found in the middle of a body: it arrives once, whole."""
    alpha, beta = world.relayed()
    for way in (("alpha", "master"), ("master", "beta"), ("beta", "master"), ("master", "alpha")):
        world.network.path(*way).delay_s = 0.5
    data = Random(1).randbytes(16 * MIB)
    alpha.put_body(1, data)
    for one, other in (("alpha", "beta"), ("beta", "alpha")):
        world.network.heal(one, other)
    world.network.run_for(25)
    assert alpha.way == beta.way == "open"
    assert beta.lanes.came == {1: data}


def test_d14_a_body_that_was_changed_on_its_way_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit its hash reaches no endpoint, and its sender is told (EBADMSG)."""
    alpha, beta = world.relayed()
    receive = world.master.relay.receive

    def tamper(source: int, target: int, data: bytes, cost: int) -> None:
        is_piece = data[0] == RelayKind.PIECE
        receive(source, target, data[:-1] + b"!" if is_piece else data, cost)

    monkeypatch.setattr(world.master.relay, "receive", tamper)
    alpha.put_body(1, bytes(100_000))
    world.network.run_for(2)
    assert not beta.lanes.came
    assert alpha.lanes.not_taken == [(1, errno.EBADMSG)]


_ENDLESS = relay.encode_opened(9, 1, 16 * MIB)


@pytest.mark.parametrize(
    "messages",
    [
        [relay.encode(RelayKind.OPENED, b"short")],
        [relay.encode(RelayKind.READ, b"")],
        [relay.encode(RelayKind.PIECE, bytes(8))],
        [relay.encode_opened(1, 1, 0)],
        [_ENDLESS, _ENDLESS],
        [relay.encode_opened(number, 1, 10) for number in range(BODIES + 1)],
        [relay.encode_piece(1, b"of none")],
        [relay.encode_opened(1, 1, 3), relay.encode_piece(1, b"long")],
        [relay.encode_number(RelayKind.CUT, 1)],
        [relay.encode_number(RelayKind.READ, 1)],
    ],
)
def test_a_peer_that_breaks_a_rule_of_bodies_loses_its_link_alone(
    world: World, messages: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """The relayed link ends with the rule; the link to the master, and other bodies, go on."""
    alpha, beta = world.relayed()
    (link,) = [link for link in alpha.carrier.links if link.peer == MASTER]
    with caplog.at_level("INFO", "afbus.node"):
        for message in messages:
            assert link.send(Channel.DATA, NUMBERS["beta"], message)
        world.network.run_for(1)
    assert "link to alpha has ended: malformed" in caplog.text
    assert not link.is_down
    alpha.put_body(1, bytes(100_000))
    alpha.put("again")
    world.network.run_for(15)
    assert beta.arrived == ["first", "again"]
    assert list(beta.lanes.came) == [1]


def test_d14_a_peer_cannot_send_more_of_bodies_than_its_window() -> None:
    """Who reads nothing holds one window at most, whatever the peer sends."""
    bodies = RelayedBodies(lambda _: True, lambda _: True, lambda _: None)
    bodies.receive(RelayKind.OPENED, relay.encode_opened(1, 1, 16 * MIB)[1:])
    piece = relay.encode_piece(1, bytes(64 * KIB))[1:]
    for _ in range(BODY_WINDOW_BYTES // (64 * KIB)):
        bodies.receive(RelayKind.PIECE, piece)
    with pytest.raises(RemoteProtocolError, match="unread"):
        bodies.receive(RelayKind.PIECE, piece)


def test_frames_wait_for_room_on_a_relayed_link(world: World) -> None:
    """A lane that has used all credit at the master does not end the link for a frame's sake."""
    alpha, beta = world.relayed()
    world.network.cut("master", "beta")
    world.network.cut("alpha", "master")
    link = alpha.relay._links[NUMBERS["beta"]]
    while link.send(Channel.DATA, 0, bytes(60_000)):
        pass
    assert alpha.peers.send("beta", BodyTaken(1))
    assert not link.is_down
    assert alpha.way == "relayed"
    assert beta.way == "relayed"
