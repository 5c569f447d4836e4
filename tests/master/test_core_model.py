"""The master under everything at once: links that end, nodes that are lost, kills at any step.

The model is what the agents believe: what was granted to them and not taken away since. At rest
the table is exactly that: nothing acknowledged is missing, and there are no ghosts.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.master.world import Hand, World

from afbus.master.core import LEASE_S, LOST_S, START_S
from afbus.master.effect import Audit, Write
from afbus.proto.names import NameFlags, NameOutcome
from afbus.proto.operation import ClusterOp
from afbus.proto.record import (
    BusRecord,
    LeaseRecord,
    MatchRecord,
    NodeRecord,
    NodeState,
    OwnerRecord,
    decode_record,
    node_key,
)
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from afbus.proto.frames import Result

PATHS = (b"/x", b"/y")
NAMES = (b"org.a", b"org.b")
TERMS = (Terms("a"), Terms("b"))
NODE = st.sampled_from("abc")
END = st.integers(1, 2)
PATH = st.sampled_from(PATHS)

Name = tuple[int, bytes, bytes]
Wish = tuple[int, bytes, Terms]


@dataclass
class Agent:
    """What a node does and believes."""

    hand: Hand
    names: dict[Name, NameFlags] = field(default_factory=dict)
    wishes: set[Wish] = field(default_factory=set)
    masters: dict[bytes, int] = field(default_factory=dict)
    blocks: set[int] = field(default_factory=set)
    #: Calls that have no result yet.
    calls: dict[int, tuple[ClusterOp, dict[str, Any]]] = field(default_factory=dict)
    is_stated: bool = False
    #: Whether it was live, and nobody was told since that it is lost.
    was_live: bool = False

    @property
    def is_up(self) -> bool:
        """Whether it has a link."""
        return self.hand.link is not None

    def start(self, op: ClusterOp, **args: Any) -> None:
        """Ask, if there is a link; the result comes some time."""
        if self.is_up:
            serial = self.hand.call(op, **args)
            self.calls[serial] = (op, args)

    def take_results(self) -> None:
        """Believe what was granted."""
        for serial, result in list(self.hand.results.items()):
            del self.hand.results[serial]
            op, args = self.calls.pop(serial)
            self.believe(op, args, result)
        if not self.is_up:
            # Whatever was under way has no result any more.
            self.calls.clear()
            self.is_stated = False

    def believe(  # noqa: PLR0912 (one case a result)
        self, op: ClusterOp, args: dict[str, Any], result: Result
    ) -> None:
        """Follow one result."""
        end, path = args.get("endpoint", 0), args.get("path", b"")
        match op:
            case ClusterOp.LEASE if result.is_ok:
                self.blocks.add(result.value["block"])
            case ClusterOp.LEASE:
                assert result.errno == errno.EREMCHG
                # Acknowledged blocks are never lost, whatever happens.
                assert args.get("block") not in self.blocks
            case ClusterOp.BIND if result.is_ok:
                self.masters[path] = end
            case ClusterOp.BIND:
                assert result.errno == errno.EADDRINUSE
                if self.masters.get(path) == end:
                    del self.masters[path]
            case ClusterOp.UNBIND if result.is_ok:
                self.masters.pop(path, None)
            case ClusterOp.OWN:
                name = (end, path, args["name"])
                outcome = NameOutcome(result.value["outcome"]) if result.is_ok else None
                if outcome in (None, NameOutcome.EXISTS):
                    self.names.pop(name, None)
                else:
                    self.names[name] = NameFlags(args["flags"]) & ~NameFlags.REPLACE
            case ClusterOp.RELEASE:
                self.names.pop((end, path, args["name"]), None)
            case ClusterOp.SUBSCRIBE if result.is_ok:
                self.wishes.add((end, path, Terms.unpack(args["terms"])))
            case ClusterOp.UNSUBSCRIBE:
                self.wishes.discard((end, path, Terms.unpack(args["terms"])))
            case ClusterOp.RESTATED:
                assert result.is_ok
                self.is_stated = True

    def come(self) -> None:
        """Have a link, and state all that it believes to have."""
        hand = self.hand
        hand.connect()
        hand.hello()
        self.start(ClusterOp.RESTATE)
        for end in (1, 2):
            self.start(ClusterOp.ENTER, endpoint=end, uid=1000)
        for block in sorted(self.blocks):
            self.start(ClusterOp.LEASE, block=block)
        for path, end in sorted(self.masters.items()):
            self.start(ClusterOp.BIND, endpoint=end, path=path, address=b"master")
        for (end, path, name), flags in sorted(self.names.items()):
            self.start(ClusterOp.OWN, endpoint=end, path=path, name=name, flags=int(flags))
        for end, path, what in sorted(self.wishes, key=str):
            self.start(ClusterOp.SUBSCRIBE, endpoint=end, path=path, terms=what.pack())
        self.start(ClusterOp.RESTATED)


class Storm(RuleBasedStateMachine):
    """Three agents, a master, and bad luck."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.agents = {name: Agent(self.world.node(name)) for name in "abc"}
        #: Every block that anybody was ever told of, and whose it is.
        self.blocks: dict[int, str] = {}
        for agent in self.agents.values():
            agent.come()
        self.settle()
        for path in PATHS:
            self.agents["a"].start(ClusterOp.BIND, endpoint=1, path=path, address=b"master")
        self.settle()

    def settle(self) -> None:
        """Let everything happen that happens by itself."""
        self.world.settle()
        for agent in self.agents.values():
            agent.take_results()

    # --- what agents want ---

    @rule(node=NODE, end=END, path=PATH, name=st.sampled_from(NAMES), flags=st.integers(0, 7))
    def own(self, node: str, end: int, path: bytes, name: bytes, flags: int) -> None:
        """Somebody asks for a name."""
        self.agents[node].start(ClusterOp.OWN, endpoint=end, path=path, name=name, flags=flags)

    @rule(node=NODE, end=END, path=PATH, name=st.sampled_from(NAMES))
    def release(self, node: str, end: int, path: bytes, name: bytes) -> None:
        """Somebody gives it up."""
        self.agents[node].start(ClusterOp.RELEASE, endpoint=end, path=path, name=name)

    @rule(node=NODE, end=END, path=PATH, what=st.sampled_from(TERMS), wants=st.booleans())
    def subscribe(self, node: str, end: int, path: bytes, what: Terms, wants: bool) -> None:
        """Somebody wants something, or no longer."""
        op = ClusterOp.SUBSCRIBE if wants else ClusterOp.UNSUBSCRIBE
        self.agents[node].start(op, endpoint=end, path=path, terms=what.pack())

    @rule(node=NODE, end=END, path=PATH, binds=st.booleans())
    def bind(self, node: str, end: int, path: bytes, binds: bool) -> None:
        """Somebody wants to be master, or no longer."""
        if binds:
            args = {"endpoint": end, "path": path, "address": b"master"}
            self.agents[node].start(ClusterOp.BIND, **args)
        else:
            self.agents[node].start(ClusterOp.UNBIND, endpoint=end, path=path)

    @rule(node=NODE)
    def lease(self, node: str) -> None:
        """An agent needs a block."""
        self.agents[node].start(ClusterOp.LEASE)

    # --- bad luck ---

    @rule(node=NODE)
    def cut(self, node: str) -> None:
        """A link ends."""
        if self.agents[node].is_up:
            self.agents[node].hand.disconnect()

    @rule(node=NODE)
    def come(self, node: str) -> None:
        """A node has a link again, or another one."""
        self.agents[node].take_results()
        self.agents[node].calls.clear()
        self.agents[node].is_stated = False
        self.agents[node].come()

    @rule(node=NODE)
    def stall(self, node: str) -> None:
        """A node does not read, for some time."""
        self.agents[node].hand.reads = False

    @rule(node=NODE)
    def go_on(self, node: str) -> None:
        """It reads again."""
        self.agents[node].hand.reads = True

    @rule(duration=st.sampled_from([0.5, LOST_S + 0.1, START_S + 0.1, LEASE_S + 0.1]))
    def wait(self, duration: float) -> None:
        """Time passes."""
        self.world.run_for(duration)

    @rule(count=st.integers(0, 6))
    def kill_master(self, count: int) -> None:
        """The master is killed after some of what it had to do; it writes all or nothing."""
        effects = self.world.core.take_effects()
        first = sum(1 for effect in effects if isinstance(effect, Write | Audit))
        if count:
            self.world.apply(effects[: first + count - 1])
            for agent in self.agents.values():
                if agent.hand.reads:
                    agent.hand.receive()
        for agent in self.agents.values():
            agent.take_results()
        self.world.restart()

    # --- what must hold ---

    @rule()
    def let_happen(self) -> None:
        """What was asked is carried out; without this a kill may come before."""
        self.settle()

    @invariant()
    def holds(self) -> None:
        """Nothing is given twice, and who was told so may rely on it."""
        for agent in self.agents.values():
            agent.take_results()
        for name, agent in self.agents.items():
            for block in agent.blocks:
                assert self.blocks.setdefault(block, name) == name, "a block was leased twice"
        self.follow_who_is_live()
        for agent in self.agents.values():
            if not agent.is_up or not agent.is_stated:
                continue
            for end, path, what in agent.wishes:
                args = {"endpoint": end, "path": path, "terms": what.pack()}
                if (ClusterOp.UNSUBSCRIBE, args) not in agent.calls.values():
                    self.all_live_know(agent, path, what)

    def follow_who_is_live(self) -> None:
        """Live is who was told so, with a link or without, until that is written otherwise."""
        for name, agent in self.agents.items():
            record = decode_record(node_key(name), self.world.disk[node_key(name)])
            assert isinstance(record, NodeRecord)
            agent.was_live = agent.is_stated or agent.was_live
            agent.was_live = agent.was_live and record.state is NodeState.LIVE

    def all_live_know(self, agent: Agent, path: bytes, what: Terms) -> None:
        """Every node that anybody takes for live has this match (the barrier)."""
        assert agent.hand.welcome is not None
        for other in self.agents.values():
            if other.was_live:
                bus = other.hand.mirror.get_bus(path)
                assert bus is not None
                wanted = {(one.node, one.what) for one in other.hand.mirror.get_matches(bus.number)}
                assert (agent.hand.welcome.number, what) in wanted

    @rule()
    def come_to_rest(self) -> None:
        """All is well again: the table is what the agents believe, and all have it."""
        for agent in self.agents.values():
            agent.hand.reads = True
        self.settle()
        for agent in self.agents.values():
            if not agent.is_up:
                agent.come()
        self.settle()
        self.world.run_for(START_S + 1)
        self.settle()
        for agent in self.agents.values():
            assert agent.is_up
            assert agent.is_stated
            assert not agent.calls
        first = self.agents["a"].hand
        for agent in self.agents.values():
            assert agent.hand.mirror.snapshot() == first.mirror.snapshot()
        self.forget_what_was_replaced()
        self.check_table(first)

    def forget_what_was_replaced(self) -> None:
        """An owner that does not wait has lost its name for good when another replaced it."""
        for agent in self.agents.values():
            for (end, path, name), flags in list(agent.names.items()):
                if flags & NameFlags.DO_NOT_QUEUE and self.owner(path, name) != (
                    agent.hand.name,
                    end,
                ):
                    del agent.names[end, path, name]

    def owner(self, path: bytes, name: bytes) -> tuple[str, int] | None:
        """Return the owner of a name, as all nodes know it."""
        records = self.agents["a"].hand.records()
        names = {one.number: one.name for one in records if isinstance(one, NodeRecord)}
        buses = {one.path: one.number for one in records if isinstance(one, BusRecord)}
        for one in records:
            if isinstance(one, OwnerRecord) and (one.bus, one.address) == (buses[path], name):
                return names[one.node], one.endpoint
        return None

    def check_table(self, hand: Hand) -> None:
        """Compare with what the agents believe."""
        records = hand.records()
        names = {one.number: one.name for one in records if isinstance(one, NodeRecord)}
        buses = {one.number: one.path for one in records if isinstance(one, BusRecord)}
        believed = list(self.agents.items())
        assert set(names.values()) == set("abc")
        assert {
            (one.block, names[one.node]) for one in records if isinstance(one, LeaseRecord)
        } == {(block, name) for name, agent in believed for block in agent.blocks}
        assert {
            (names[one.node], buses[one.bus], one.what)
            for one in records
            if isinstance(one, MatchRecord)
        } == {(name, path, what) for name, agent in believed for _, path, what in agent.wishes}
        assert {
            one.path: names[one.node] for one in records if isinstance(one, BusRecord) and one.node
        } == {path: name for name, agent in believed for path in agent.masters}
        for path in PATHS:
            for name in NAMES:
                wanted_by = {
                    (node, end)
                    for node, agent in believed
                    for end, one_path, one in agent.names
                    if (one_path, one) == (path, name)
                }
                owner = self.owner(path, name)
                assert owner in wanted_by or (owner is None and not wanted_by)


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=60, stateful_step_count=40)
