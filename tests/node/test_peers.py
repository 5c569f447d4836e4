"""Links between nodes: when they are opened and closed, and that a lane survives all of that."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.link.authority import NOW, Signer, node
from tests.node.lanes import CONFIRM_S, Lanes

from afbus.link.carrier import Member
from afbus.link.memory import MemoryCarrier, MemoryNetwork
from afbus.link.reason import Reason
from afbus.node.peers import Patience, Peers
from afbus.proto.errors import LinkError
from afbus.proto.frames import Result
from afbus.proto.record import NodeRecord, NodeState

if TYPE_CHECKING:
    from afbus.link.link import Link, Sink
    from afbus.proto.peer import PeerFrame

NAMES = ("alpha", "beta", "gamma")
NUMBERS = {name: number for number, name in enumerate(NAMES, 1)}
ROOT = Signer.root()
CREDENTIALS = {name: ROOT.issue(node(name)) for name in NAMES}
PATIENCE = Patience()


@dataclass
class Node:
    """One life of one node: its carrier, its lanes, its peers, and what its owner was told."""

    world: World
    name: str
    life: int
    lanes: Lanes = field(default_factory=Lanes)
    told: list[tuple[Any, ...]] = field(default_factory=list)
    #: Who owes an answer.
    awaited: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        seed = f"{self.name} {self.life}"
        self.random = Random(seed)
        member = Member(
            CREDENTIALS[self.name],
            ROOT.authority(),
            self.random.randbytes(16),
            self.accept,
            lambda: NOW,
        )
        self.carrier: MemoryCarrier = self.world.network.add(self.name, member)
        self.peers = Peers(
            self.carrier,
            node(self.name),
            self.lanes,
            self,
            self.random,
            self.random.randbytes,
            self.find,
            PATIENCE,
        )
        self.lanes.ready = lambda number: self.carrier.call_at(
            self.carrier.now() + CONFIRM_S, lambda: self.peers.handle_ready(number)
        )
        for other in NAMES:
            if other != self.name:
                self.peers.set_node(record(other))

    def accept(self, link: Link) -> Sink:
        """Hand links to the peers."""
        return self.peers.accept(link)

    def find(self, place: str) -> str:
        """Return the address of a place."""
        if place == "nowhere":
            raise LinkError("nowhere has no address")
        return place

    def awaits(self, name: str) -> bool:
        """Tell whether an answer is owed."""
        return name in self.awaited

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

    def put(self, name: str, text: str) -> None:
        """Send a record over the lane, as an endpoint would."""
        self.lanes.put(NUMBERS[name], text)
        self.peers.handle_ready(NUMBERS[name])


class World:
    """Three nodes that know of each other."""

    def __init__(self, seed: int = 0) -> None:
        self.network = MemoryNetwork(seed)
        self.lives = 0
        self.nodes = {name: self.start(name) for name in NAMES}

    def start(self, name: str) -> Node:
        """Begin another life of a node."""
        self.lives += 1
        return Node(self, name, self.lives)

    def cut(self, one: str, other: str) -> None:
        """Let nothing pass between two nodes."""
        self.network.cut(one, other)
        self.network.cut(other, one)

    def heal(self, one: str, other: str) -> None:
        """Let everything pass again."""
        self.network.heal(one, other)
        self.network.heal(other, one)


def record(name: str, *places: str, boot: bytes = bytes(16)) -> NodeRecord:
    """The record of a node in the cluster's table."""
    return NodeRecord(name, NUMBERS[name], NodeState.LIVE, boot, places or (name,))


@pytest.fixture
def world() -> World:
    """Return three nodes without links."""
    return World()


def texts(lanes: Lanes, name: str) -> list[str]:
    """Return what arrived from a node."""
    return [text for number, text in lanes.arrived if number == NUMBERS[name]]


def test_a_link_is_opened_when_it_is_needed_and_closed_when_idle(world: World) -> None:
    """A first record opens the link, and a minute of silence ends it at both ends."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    assert not alpha.carrier.links
    alpha.put("beta", "hello")
    world.network.run_for(1)
    assert texts(beta.lanes, "alpha") == ["hello"]
    assert ("opened", "beta") in alpha.told
    assert ("opened", "alpha") in beta.told
    alpha.peers.close_idle()
    world.network.run_for(1)
    assert alpha.peers.is_open("beta")
    world.network.run_for(PATIENCE.idle_s)
    alpha.peers.close_idle()
    world.network.run_for(1)
    assert not alpha.carrier.links
    assert not beta.carrier.links
    beta.put("alpha", "again")
    world.network.run_for(1)
    assert texts(alpha.lanes, "beta") == ["again"]


def test_two_that_dial_at_once_have_one_link(world: World) -> None:
    """Both lanes go over the link of the node with the smaller name."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.put("beta", "to beta")
    beta.put("alpha", "to alpha")
    world.network.run_for(5)
    assert texts(beta.lanes, "alpha") == ["to beta"]
    assert texts(alpha.lanes, "beta") == ["to alpha"]
    assert len(alpha.carrier.links) == len(beta.carrier.links) == 1


def test_frames_pass_and_are_refused_without_a_link(world: World) -> None:
    """A frame without a link is not kept; its owner sends it when told that one is open."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    assert not alpha.peers.send("beta", Result(1))
    world.network.run_for(1)
    assert alpha.told == [("opened", "beta")]
    assert alpha.peers.send("beta", Result(2))
    world.network.run_for(1)
    assert beta.told == [("opened", "alpha"), ("frame", "alpha", Result(2))]


def test_a_link_to_who_owes_an_answer_is_opened_again(world: World) -> None:
    """A peer that goes down in good order is called again as long as it owes something."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.peers.want("beta")
    world.network.run_for(1)
    assert alpha.peers.send("beta", Result(1))
    alpha.awaited.add("beta")
    for is_owed in (True, False):
        if not is_owed:
            alpha.awaited.clear()
        alpha.told.clear()
        beta.peers.close()
        world.network.run_for(1)
        beta.carrier.kill()
        beta = world.start("beta")
        world.network.run_for(2 * PATIENCE.waits.longest_s + 3)
        assert (("opened", "beta") in alpha.told) is is_owed


def test_what_comes_of_a_call_behind_the_end_is_nobody_s_business(world: World) -> None:
    """The node goes down while it calls: it calls no more, and asks nothing of its switch."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    beta.carrier.kill()
    alpha.peers.want("beta")
    alpha.peers.close()
    alpha.lanes.trunks.clear()
    world.network.run_for(10)
    assert not alpha.peers.is_open("beta")


def test_an_idle_link_to_who_owes_an_answer_is_kept(world: World) -> None:
    """The answer may take longer than links are kept that nobody uses."""
    alpha = world.nodes["alpha"]
    alpha.peers.want("beta")
    world.network.run_for(1)
    alpha.awaited.add("beta")
    world.network.run_for(2 * PATIENCE.idle_s)
    alpha.peers.close_idle()
    world.network.run_for(1)
    assert alpha.peers.is_open("beta")


def test_d21_a_life_that_is_over_is_left_at_once(world: World) -> None:
    """The table says that a node has begun anew: the link to what it was ends at once."""
    alpha = world.nodes["alpha"]
    alpha.peers.set_node(record("beta", boot=world.nodes["beta"].carrier.member.boot))
    alpha.put("beta", "before")
    world.network.run_for(1)
    world.nodes["beta"].carrier.kill()
    beta = world.start("beta")
    alpha.peers.set_node(record("beta", boot=beta.carrier.member.boot))
    alpha.put("beta", "behind")
    world.network.run_for(1)
    assert texts(beta.lanes, "alpha") == ["behind"]
    assert alpha.lanes.unknown == []


def test_a_table_that_is_behind_ends_no_link(world: World) -> None:
    """The link to a new life may be there before the table tells of it."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.put("beta", "hello")
    world.network.run_for(1)
    alpha.peers.set_node(record("beta", boot=b"1" * 16))
    alpha.peers.set_node(record("beta", boot=beta.carrier.member.boot))
    assert alpha.peers.is_open("beta")


def test_d16_a_peer_that_is_not_reached_is_lost_and_comes_back(world: World) -> None:
    """Senders are told after a while, and the lane goes on when the path is healed.

    Nothing waits for it then, so nobody but this node finds out.
    """
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    world.cut("alpha", "beta")
    alpha.put("beta", "first")
    world.network.run_for(PATIENCE.lost_s / 2)
    assert ("lost", "beta") not in alpha.told
    world.network.run_for(PATIENCE.lost_s)
    assert alpha.told.count(("lost", "beta")) == 1
    assert alpha.lanes.refused == [(NUMBERS["beta"], "first")]
    alpha.put("beta", "refused at once")
    assert alpha.lanes.refused[1:] == [(NUMBERS["beta"], "refused at once")]
    world.network.run_for(3 * PATIENCE.lost_s)
    world.heal("alpha", "beta")
    world.network.run_for(2 * PATIENCE.waits.longest_s + 3)
    assert ("found", "beta") in alpha.told
    alpha.put("beta", "second")
    world.network.run_for(1)
    assert texts(beta.lanes, "alpha") == ["second"]


def test_d16_a_peer_that_is_lost_is_tried_on_by_who_waits_for_nothing(world: World) -> None:
    """What was under way when the link ended is told; then its return is noticed all the same."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.put("beta", "first")
    world.network.run_for(1)
    world.cut("alpha", "beta")
    alpha.put("beta", "second")
    world.network.run_for(0.5)
    beta.carrier.kill()
    for link in alpha.carrier.links:
        link.close(Reason.MALFORMED, "of its own accord")
    world.network.run_for(3 * PATIENCE.lost_s)
    assert ("lost", "beta") in alpha.told
    assert alpha.lanes.trunk_is_idle(NUMBERS["beta"])
    world.start("beta")
    world.heal("alpha", "beta")
    world.network.run_for(2 * PATIENCE.waits.longest_s + 3)
    assert ("found", "beta") in alpha.told


@pytest.mark.parametrize("phase", [0.0, 0.3, 0.6, 0.9])
def test_d16_a_dead_peer_is_lost_12_s_after_its_last_sign(world: World, phase: float) -> None:
    """Its link is silent within 2 s, and 10 s later the peer is lost, whatever tries go on."""
    alpha = world.nodes["alpha"]
    alpha.put("beta", "first")
    world.network.run_for(5 + phase)
    world.nodes["beta"].carrier.kill()
    begun_at = world.network.time
    while ("lost", "beta") not in alpha.told:
        world.network.run_for(0.05)
        assert world.network.time - begun_at < 12.7
    assert world.network.time - begun_at > 10


@pytest.mark.parametrize("is_dead", [True, False])
def test_d16_a_node_that_the_table_misses_is_looked_for(world: World, is_dead: bool) -> None:
    """Without a link nobody here would know; but it may be the master alone that misses it."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    if is_dead:
        beta.carrier.kill()
    alpha.peers.look_for("beta")
    world.network.run_for(PATIENCE.lost_s - PATIENCE.missed_s + 0.1)
    assert (("lost", "beta") in alpha.told) is is_dead
    assert alpha.peers.is_open("beta") is not is_dead
    world.network.run_for(30)
    assert alpha.told.count(("lost", "beta")) == is_dead


def test_d20_a_lane_that_begins_anew_and_a_node_that_does_are_told_apart(world: World) -> None:
    """Who was lost for a while still waits for what was to be told of its messages."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.put("beta", "first")
    world.network.run_for(1)
    world.cut("alpha", "beta")
    alpha.put("beta", "second")
    world.network.run_for(3 * PATIENCE.lost_s)
    assert ("lost", "beta") in alpha.told
    world.heal("alpha", "beta")
    world.network.run_for(2 * PATIENCE.waits.longest_s + 3)
    alpha.put("beta", "third")
    world.network.run_for(1)
    assert texts(beta.lanes, "alpha") == ["first", "third"]
    alpha.carrier.kill()
    world.network.run_for(1)
    world.start("alpha").put("beta", "fourth")
    world.network.run_for(PATIENCE.lost_s)
    assert texts(beta.lanes, "alpha") == ["first", "third", "fourth"]
    number = NUMBERS["alpha"]
    assert beta.lanes.heard == [(number, True), (number, False), (number, True)]


def test_case13_a_link_that_was_cut_for_long_brings_everything_once(world: World) -> None:
    """A black hole that outlasts the link: what was not confirmed comes again, without doubles."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.put("beta", "0")
    world.network.run_for(1)
    world.network.cut("beta", "alpha")
    for number in range(1, 6):
        alpha.put("beta", str(number))
        world.network.run_for(0.5)
    assert len(texts(beta.lanes, "alpha")) == 6
    world.cut("alpha", "beta")
    world.network.run_for(8.5)
    assert not alpha.peers.is_open("beta")
    assert ("lost", "beta") not in alpha.told
    world.heal("alpha", "beta")
    world.network.run_for(5)
    alpha.put("beta", "6")
    world.network.run_for(2)
    assert texts(beta.lanes, "alpha") == [str(number) for number in range(7)]


def test_d21_what_a_peer_may_have_read_before_it_died_is_unknown(world: World) -> None:
    """A restarted peer does not know what its former life got: it is reported, not repeated."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.put("beta", "0")
    world.network.run_for(1)
    world.network.path("alpha", "beta").delay_s = 0.5
    alpha.put("beta", "1")
    world.network.run_for(0.1)
    beta.carrier.kill()
    again = world.nodes["beta"] = world.start("beta")
    world.network.run_for(20)
    alpha.put("beta", "2")
    world.network.run_for(8)
    assert texts(again.lanes, "alpha") == ["2"]
    assert alpha.lanes.unknown == [(NUMBERS["beta"], "1")]


def test_the_next_place_is_tried(world: World) -> None:
    """A node with several places is reached at any of them, also where one has no address."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.peers.set_node(record("beta", "nowhere", "nobody", "beta"))
    alpha.put("beta", "hello")
    world.network.run_for(5)
    assert texts(beta.lanes, "alpha") == ["hello"]


def test_another_node_at_the_place_is_refused(world: World) -> None:
    """Who answers must prove to be the node that was meant."""
    alpha = world.nodes["alpha"]
    alpha.peers.set_node(record("beta", "gamma"))
    alpha.put("beta", "secret")
    world.network.run_for(5)
    assert not world.nodes["gamma"].lanes.arrived
    assert not alpha.carrier.links


def test_who_is_not_in_the_table_is_turned_away(world: World) -> None:
    """A node that left the cluster loses its link, and gets none by dialing."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.put("beta", "hello")
    world.network.run_for(1)
    beta.peers.drop_node("alpha")
    beta.peers.drop_node("alpha")
    world.network.run_for(1)
    assert not alpha.peers.is_open("beta")
    alpha.put("beta", "again")
    world.network.run_for(3)
    assert texts(beta.lanes, "alpha") == ["hello"]
    assert not alpha.peers.is_open("beta")


def test_a_broken_batch_ends_the_link(world: World) -> None:
    """The rule stands in the farewell, and nothing else changes."""
    alpha, beta = world.nodes["alpha"], world.nodes["beta"]
    alpha.put("beta", "hello")
    world.network.run_for(1)
    (link,) = alpha.carrier.links
    # A record number that was never sent.
    alpha.lanes.trunks[NUMBERS["beta"]].sent += 5
    alpha.lanes.trunks[NUMBERS["beta"]].first += 5
    alpha.put("beta", "after a gap")
    world.network.run_for(0.1)
    assert link.is_down
    assert texts(beta.lanes, "alpha") == ["hello"]


PAIRS = [("alpha", "beta"), ("alpha", "gamma"), ("beta", "gamma")]
ENDS = st.sampled_from(PAIRS)
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), ENDS, st.booleans()),
        st.tuples(st.just("cut"), ENDS, st.booleans()),
        st.tuples(st.just("half"), ENDS, st.booleans()),
        st.tuples(st.just("heal"), ENDS, st.booleans()),
        st.tuples(st.just("kill"), ENDS, st.booleans()),
        st.tuples(st.just("wait"), st.sampled_from([0.01, 0.3, 2.0, 15.0]), st.booleans()),
    ),
    max_size=40,
)


@dataclass
class Story:
    """What is done to a world, and what was sent meanwhile."""

    world: World
    lives: list[Node] = field(default_factory=list)
    #: By the life of the sender and the name of the receiver.
    sent: dict[tuple[int, str], list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lives += self.world.nodes.values()

    def act(self, count: int, act: str, one: str, other: str) -> None:
        """Let one thing happen."""
        if act == "put":
            sender = self.world.nodes[one]
            self.sent.setdefault((sender.life, other), []).append(str(count))
            sender.put(other, str(count))
        elif act == "cut":
            self.world.cut(one, other)
        elif act == "half":
            self.world.network.cut(one, other)
        elif act == "heal":
            self.world.heal(one, other)
        else:
            self.world.nodes[one].carrier.kill()
            self.world.nodes[one] = self.world.start(one)
            self.lives.append(self.world.nodes[one])

    def arrived(self, sender: Node, name: str) -> list[str]:
        """Return what has come from this life of a node to all lives of another, in that order."""
        mine = set(self.sent.get((sender.life, name), []))
        receivers = [one.lanes for one in self.lives if one.name == name]
        return [text for one in receivers for text in texts(one, sender.name) if text in mine]

    def silent(self, sender: Node, name: str) -> set[str]:
        """Return what a node has sent and heard nothing of."""
        told = {text for _, text in [*sender.lanes.unknown, *sender.lanes.refused]}
        return set(self.sent.get((sender.life, name), [])) - set(self.arrived(sender, name)) - told


@settings(max_examples=60, deadline=None)
@given(acts=ACTS, seed=st.integers(0, 99))
def test_d21_each_record_arrives_once_in_order_or_is_told(
    acts: list[tuple[str, Any, bool]], seed: int
) -> None:
    """Whatever is cut, healed and killed: no doubles, the order sent, nothing lost in silence."""
    world = World(seed)
    for one, other in PAIRS:
        world.network.path(one, other).jitter_s = world.network.path(other, one).jitter_s = 0.02
    story = Story(world)
    for count, (act, what, flag) in enumerate(acts):
        if act == "wait":
            world.network.run_for(what)
        else:
            story.act(count, act, *(what if flag else what[::-1]))
    for one, other in PAIRS:
        world.heal(one, other)
        world.nodes[one].peers.want(other)
        world.nodes[other].peers.want(one)
    world.network.run_for(60)
    for sender in story.lives:
        for name in NAMES:
            arrived = story.arrived(sender, name)
            assert arrived == sorted(set(arrived), key=int), "doubled, or out of order"
            if sender is world.nodes[sender.name]:
                assert not story.silent(sender, name), "lost without a word"
