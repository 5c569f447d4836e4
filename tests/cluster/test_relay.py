"""Links by way of the master: two nodes that cannot reach each other, over real links in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
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
from afbus.proto import relay
from afbus.proto.errors import RemoteProtocolError
from afbus.proto.record import NodeRecord, NodeState

if TYPE_CHECKING:
    from afbus.link.effect import Event
    from afbus.link.link import Link, Sink
    from afbus.proto.peer import PeerFrame

NAMES = ("alpha", "beta")
NUMBERS = {"alpha": 1, "beta": 2}
ROOT = Signer.root()
MASTER = Identity("test", Role.MASTER, "master")
CREDENTIALS = {name: ROOT.issue(node(name)) for name in NAMES} | {"master": ROOT.issue(MASTER)}


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
        number = NUMBERS[link.peer.name]
        self.relay.add(number, link)

        def handle(event: Event) -> None:
            match event:
                case Message(_, destination, data, cost):
                    self.relay.receive(number, destination, data, cost)
                case Room(_, destination):
                    self.relay.handle_room(number, destination)
                case Down():
                    self.relay.drop(number, link)
                case _:
                    pass

        return handle


@dataclass
class Node:
    """One node: lanes, peers, and a link to the master."""

    network: MemoryNetwork
    name: str
    lanes: Lanes = field(default_factory=Lanes)
    told: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = Random(self.name)
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

    def identify(self, number: int) -> Identity | None:
        """Return who a node is."""
        return node(self.other) if number == NUMBERS[self.other] else None

    def accept(self, link: Link) -> Sink:
        """Take a link of the other node, or that to the master."""
        if link.peer != MASTER:
            return self.peers.accept(link)
        self.relay.set_master(link)

        def handle(event: Event) -> None:
            match event:
                case Message(_, destination, data, cost):
                    self.relay.receive(destination, data, cost)
                case Room(Channel.DATA, destination):
                    self.relay.handle_room(destination)
                case Down():
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
