"""Uplinks and the real master on one fake clock, at random: what is had is what was given."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING, Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from afbus.link.identity import Identity, Role
from afbus.master.core import Core
from afbus.master.effect import Cut, LinkId, Send, Write
from afbus.master.issuer import Issuer, Leaf, make_issuing, make_key, make_root
from afbus.master.policy import parse_policy
from afbus.node.claim import Claim
from afbus.node.uplink import Uplink
from afbus.node.uplink_effect import (
    Answered,
    BlockLost,
    Hang,
    Say,
    Spare,
    Taken,
    Turned,
)
from afbus.proto.errors import MasterLost
from afbus.proto.names import NameFlags, NameOutcome
from afbus.proto.operation import ClusterOp
from afbus.proto.record import NodeState
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable

    from afbus.proto.frames import Result

NOW_UTC = 1_795_521_600
POLICY = """
[[rule]]
name = "all"
who = ["uid/*@*"]
bus = ["**"]
own = ["**"]
receive = ["topic:**"]
bind = true
"""
PATHS = st.sampled_from([b"/a", b"/a", b"/b"])
NAMES = st.sampled_from([b"x", b"y"])
WHATS = st.sampled_from([Terms.of("t"), Terms.of("u")])
FLAGS = st.integers(0, 7).map(NameFlags)
SECONDS = st.sampled_from([0.05, 0.5, 3.0, 12.0, 130.0])


def make_issuer() -> Issuer:
    """Return the issuer of the cluster."""
    root_key, key = make_key(), make_key()
    root = make_root("c", root_key, 1, NOW_UTC)
    return Issuer(root, make_issuing(root, root_key, key, 2, NOW_UTC), key)


class Member:
    """One node: an uplink, the frames on its link, and what it should have."""

    def __init__(self, world: World, name: str, number: int) -> None:
        self.world, self.name, self.number = world, name, number
        self.leaf = Leaf(1000 + number, NOW_UTC + (1 << 30), bytes([number]) * 32)
        self.life = 0
        self.spare: int | None = None
        self.has_network = True
        self.begin()

    def begin(self) -> None:
        """Begin a life without endpoints."""
        self.life += 1
        self.link: LinkId | None = None
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        #: Tickets without an answer, with what they are about.
        self.open: dict[int, tuple[ClusterOp, Claim, float]] = {}
        self.have: set[Claim] = set()
        #: Tickets whose outcome was given up before it came.
        self.void: set[int] = set()
        self.is_here = True
        self.uplink = Uplink(self.name, (), lambda: b"csr", self.world.now, spare=self.spare)
        self.settle()

    # --- commands, and what the model makes of them ---

    def ask(self, op: ClusterOp, claim: Claim, command: Callable[..., int], *args: Any) -> None:
        """Command something."""
        if op is not claim.op:
            self.drop(claim)
            self.void |= {key for key, (_, one, _) in self.open.items() if is_of(one, claim)}
        ticket = command(*args, self.world.now)
        self.open[ticket] = (op, claim, self.world.now)

    def drop(self, claim: Claim) -> None:
        """It is had no longer, with an endpoint all that it had."""
        self.have -= {one for one in self.have if is_of(one, claim)}

    def hear(self, result: Result) -> None:
        """A ticket was answered, in time."""
        op, claim, since = self.open.pop(result.serial)
        assert self.world.now <= since + 15.0
        if op is not claim.op or not result.is_ok or result.serial in self.void:
            return
        if op is ClusterOp.OWN and result.value["outcome"] == NameOutcome.EXISTS:
            self.have.discard(claim)
        else:
            self.have.add(claim)

    # --- the shell ---

    def settle(self) -> None:
        """Apply the effects of the uplink."""
        for effect in self.uplink.take_effects():
            match effect:
                case Say(data):
                    self.up.append(data)
                case Hang(text):
                    raise AssertionError(text)
                case Answered(result):
                    self.hear(result)
                case Taken(claim, _):
                    self.drop(claim)
                case Spare(block):
                    self.spare = block
                case Turned(is_here, _):
                    assert is_here is not self.is_here, "told twice"
                    self.is_here = is_here
                case BlockLost():
                    raise AssertionError("no node is forgotten here")

    def move(self, count: int) -> bool:
        """Let so many frames arrive, each way; tell whether there was any."""
        moved = bool(self.up or self.down)
        for _ in range(count):
            if self.up and self.link is not None:
                self.world.core.receive_frame(self.link, self.up.popleft(), self.world.now)
                self.world.settle()
            if self.down and self.link is not None:
                self.uplink.receive_frame(self.down.popleft(), self.world.now)
                self.settle()
        return moved

    def end(self, *, tells_master: bool) -> None:
        """The link has ended, for the node; the master may not notice."""
        link, self.link = self.link, None
        self.up.clear()
        self.down.clear()
        if link is not None:
            self.world.members.pop(link, None)
            if tells_master:
                self.world.core.receive_end(link, self.world.now)
            self.uplink.receive_end(self.world.now)
            self.settle()
            self.world.settle()


def is_of(claim: Claim, other: Claim) -> bool:
    """Whether a claim is lost with another."""
    is_all = other.op is ClusterOp.ENTER and claim.endpoint == other.endpoint
    return is_all or claim == other


class World:
    """A master with its disk, a clock, and nodes."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self.now = 100.0
        self.rng = random.Random(5)
        self.disk: dict[bytes, bytes] = {}
        self.members: dict[LinkId, Member] = {}
        self.links = 0
        self.is_up = True
        self.start()

    def start(self) -> None:
        """Begin a life of the master."""
        self.core = Core(
            self.issuer,
            parse_policy(POLICY),
            self.rng.randbytes,
            lambda: NOW_UTC + self.now,
            self.disk.items(),
            self.now,
        )
        self.settle()

    def dial(self, member: Member) -> None:
        """Give a node a link, if it has none and there is a way."""
        if not (self.is_up and member.has_network and member.link is None):
            return
        self.links += 1
        member.link = LinkId(self.links)
        self.members[member.link] = member
        member.up.clear()
        member.down.clear()
        boot = bytes([member.number, member.life % 256]) * 8
        identity = Identity("c", Role.NODE, member.name)
        self.core.receive_link(member.link, identity, member.leaf, boot, self.now)
        member.uplink.receive_link(self.now)
        member.settle()
        self.settle()

    def settle(self) -> None:
        """Apply the effects of the master."""
        for effect in self.core.take_effects():
            match effect:
                case Write(rows):
                    for key, value in rows:
                        if value is None:
                            self.disk.pop(key, None)
                        else:
                            self.disk[key] = value
                case Send(link, data):
                    if link in self.members:
                        self.members[link].down.append(data)
                case Cut(link):
                    if link in self.members:
                        self.members[link].end(tells_master=False)


class _Cluster(RuleBasedStateMachine):
    """Two nodes and a master; links break, master and nodes are killed, time passes."""

    issuer = make_issuer()

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.issuer)
        self.members = [Member(self.world, name, number) for number, name in enumerate("ab", 1)]
        self.addresses: set[bytes] = set()
        self.endpoints = 0
        self.quiet()
        for member in self.members:
            for _ in range(2):
                self.enter(member.number)
        self.quiet()
        self.bind(1, 0, b"/a", False)
        self.quiet()

    def member(self, pick: int) -> Member:
        return self.members[pick % len(self.members)]

    def endpoint(self, member: Member, pick: int) -> int | None:
        known = sorted({one.endpoint for one in member.have if one.op is ClusterOp.ENTER})
        return known[pick % len(known)] if known else None

    def pump(self, rounds: int = 10_000) -> None:
        for _ in range(rounds):
            moved = [one.move(1) for one in self.members]
            if not any(moved):
                return

    def run_for(self, seconds: float) -> None:
        until = self.world.now + seconds
        while True:
            times = [one.uplink.get_timer() for one in self.members]
            if self.world.is_up:
                times.append(self.world.core.get_timer())
            due = min((time for time in times if time is not None), default=float("inf"))
            if due > until:
                break
            self.world.now = max(self.world.now, due)
            if self.world.is_up:
                self.world.core.handle_timer(self.world.now)
                self.world.settle()
            for one in self.members:
                one.uplink.handle_timer(self.world.now)
                one.settle()
                self.world.dial(one)
            if self.is_moving:
                self.pump()
        self.world.now = until

    #: Whether frames arrive while time passes; else those on their way wait.
    is_moving = True

    # --- commands ---

    @rule(pick=st.integers(0, 9))
    def enter(self, pick: int) -> None:
        member = self.member(pick)
        self.endpoints += 1
        claim = Claim(self.endpoints, ClusterOp.ENTER)
        member.ask(ClusterOp.ENTER, claim, member.uplink.enter, self.endpoints, 1000)
        member.settle()

    @rule(pick=st.integers(0, 9), other=st.integers(0, 9), seldom=st.integers(0, 2))
    def exit(self, pick: int, other: int, seldom: int) -> None:
        member = self.member(pick)
        endpoint = self.endpoint(member, other)
        if endpoint is not None and not seldom:
            claim = Claim(endpoint, ClusterOp.ENTER)
            member.ask(ClusterOp.EXIT, claim, member.uplink.exit, endpoint)
            member.settle()

    @rule(pick=st.integers(0, 9), other=st.integers(0, 9), path=PATHS, gives_up=st.booleans())
    def bind(self, pick: int, other: int, path: bytes, gives_up: bool) -> None:
        member = self.member(pick)
        endpoint = self.endpoint(member, other)
        if endpoint is None:
            return
        claim = Claim(endpoint, ClusterOp.BIND, path)
        if gives_up:
            member.ask(ClusterOp.UNBIND, claim, member.uplink.unbind, endpoint, path)
        else:
            member.ask(ClusterOp.BIND, claim, member.uplink.bind, endpoint, path, b"master")
        member.settle()

    @rule(
        pick=st.integers(0, 9),
        other=st.integers(0, 9),
        path=PATHS,
        name=NAMES,
        flags=st.none() | FLAGS,
    )
    def own(self, pick: int, other: int, path: bytes, name: bytes, flags: NameFlags | None) -> None:
        member = self.member(pick)
        endpoint = self.endpoint(member, other)
        if endpoint is None:
            return
        claim = Claim(endpoint, ClusterOp.OWN, path, name)
        if flags is None:
            member.ask(ClusterOp.RELEASE, claim, member.uplink.release, endpoint, path, name)
        else:
            args = endpoint, path, name, flags
            member.ask(ClusterOp.OWN, claim, member.uplink.own, *args)
        member.settle()

    @rule(
        pick=st.integers(0, 9),
        other=st.integers(0, 9),
        path=PATHS,
        what=WHATS,
        gives_up=st.booleans(),
    )
    def subscribe(self, pick: int, other: int, path: bytes, what: Terms, gives_up: bool) -> None:
        member = self.member(pick)
        endpoint = self.endpoint(member, other)
        if endpoint is None:
            return
        claim, uplink = Claim(endpoint, ClusterOp.SUBSCRIBE, path, what=what), member.uplink
        if gives_up:
            member.ask(ClusterOp.UNSUBSCRIBE, claim, uplink.unsubscribe, endpoint, path, what)
        else:
            member.ask(ClusterOp.SUBSCRIBE, claim, uplink.subscribe, endpoint, path, what)
        member.settle()

    @rule(pick=st.integers(0, 9))
    def choose(self, pick: int) -> None:
        try:
            address = self.member(pick).uplink.choose_address()
        except MasterLost:
            return
        assert address not in self.addresses, "given twice"
        self.addresses.add(address)

    # --- what happens ---

    @rule(pick=st.integers(0, 9), count=st.integers(1, 5))
    def move(self, pick: int, count: int) -> None:
        self.member(pick).move(count)

    @rule(pick=st.integers(0, 9))
    def dial(self, pick: int) -> None:
        self.world.dial(self.member(pick))

    @rule(seconds=SECONDS, is_moving=st.booleans())
    def wait(self, seconds: float, is_moving: bool) -> None:
        self.is_moving = is_moving
        self.run_for(seconds)
        self.is_moving = True

    @rule(pick=st.integers(0, 9), tells_master=st.booleans(), comes_back=st.booleans())
    def cut(self, pick: int, tells_master: bool, comes_back: bool) -> None:
        member = self.member(pick)
        member.has_network = comes_back
        member.end(tells_master=tells_master)

    @precondition(lambda self: not all(one.has_network for one in self.members))
    @rule()
    def heal(self) -> None:
        for member in self.members:
            member.has_network = True

    @rule(seconds=SECONDS)
    def kill_master(self, seconds: float) -> None:
        self.world.is_up = False
        for member in self.members:
            member.end(tells_master=False)
        self.run_for(seconds)
        self.world.is_up = True
        self.world.start()

    @rule(pick=st.integers(0, 9), seldom=st.integers(0, 4))
    def kill_node(self, pick: int, seldom: int) -> None:
        if seldom:
            return
        member = self.member(pick)
        link, member.link = member.link, None
        if link is not None:
            self.world.members.pop(link, None)
            self.world.core.receive_end(link, self.world.now)
            self.world.settle()
        member.begin()

    # --- what must hold ---

    @rule()
    def quiet(self) -> None:
        """Once nothing happens any more, uplinks, master and model agree."""
        self.heal()
        for member in self.members:
            self.world.dial(member)
        self.pump()
        self.run_for(40)
        core, number = self.world.core, {}
        for member in self.members:
            assert member.uplink.is_here
            assert member.is_here
            assert not member.open, "a ticket without an answer"
            node = core._registry.nodes[member.name]
            number[member.name] = node.number
            assert node.state is NodeState.LIVE
            assert member.uplink.mirror.snapshot() == core._ledger.table.snapshot()
            assert set(member.uplink._claims) == member.have
            held = set(core._registry.leases.get_blocks(node.number))
            assert set(member.uplink._leases) == held
            assert {member.uplink.block, member.spare} <= held
            assert self.known_to_master(member) == member.have

    def known_to_master(self, member: Member) -> set[Claim]:
        registry = self.world.core._registry
        found = set()
        for end in registry.nodes[member.name].endpoints.values():
            found.add(Claim(end.number, ClusterOp.ENTER))
            paths = {number: bus.record.path for number, bus in registry.bus_numbers.items()}
            found |= {Claim(end.number, ClusterOp.BIND, paths[bus]) for bus in end.buses}
            found |= {
                Claim(end.number, ClusterOp.OWN, paths[bus], name) for bus, name in end.claims
            }
            for bus, what in registry.get_wishes(end):
                found.add(Claim(end.number, ClusterOp.SUBSCRIBE, bus.record.path, what=what))
        return found

    def teardown(self) -> None:
        self.quiet()

    @invariant()
    def is_bounded(self) -> None:
        for member in self.members:
            late = [since for _, _, since in member.open.values() if since + 15 < self.world.now]
            assert not late, "a ticket is answered in its time"


def test_case23_case25_d16_uplinks_and_master_agree() -> None:
    """Links cut, frames late, masters and nodes killed: afterwards all know the same."""
    run_state_machine_as_test(
        _Cluster,
        settings=settings(max_examples=150, stateful_step_count=40, deadline=None),
    )
