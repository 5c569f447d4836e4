"""A cluster without IO: a master whose disk is a map, and nodes that have a mirror and a voice."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from afbus.link.identity import Identity, Role
from afbus.master.core import Core, Limits
from afbus.master.effect import Audit, Cut, Effect, LinkId, Send, Trust, Write
from afbus.master.issuer import (
    Issuer,
    Leaf,
    make_issuing,
    make_key,
    make_request,
    make_root,
)
from afbus.master.policy import Policy, parse_policy
from afbus.proto import cluster
from afbus.proto.cluster import (
    ClusterCall,
    ClusterFrame,
    ClusterHello,
    ClusterWelcome,
    Part,
    TableDelta,
    Withdrawn,
)
from afbus.proto.frames import Result
from afbus.proto.mirror import Mirror
from afbus.proto.operation import ClusterOp
from afbus.proto.record import NodeState, Record, decode_record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from afbus.proto.errors import CloseCode

#: 2026-11-24, noon.
NOW_UTC = 1_795_521_600
EVERYTHING = """
[[rule]]
name = "all"
who = ["principal/*", "uid/*@*"]
bus = ["**"]
own = ["**"]
send = ["**", "topic:**", "raw", "everything"]
receive = ["topic:**", "raw", "everything"]
bind = true
monitor = true
"""
PATH = b"/demo"

_ISSUERS: dict[str, Issuer] = {}


def make_issuer(cluster_name: str = "test") -> Issuer:
    """Return an issuer; they never change, and keys take time."""
    if cluster_name not in _ISSUERS:
        root_key, key = make_key(), make_key()
        root = make_root(cluster_name, root_key, 1, NOW_UTC)
        issuing = make_issuing(root, root_key, key, 2, NOW_UTC)
        _ISSUERS[cluster_name] = Issuer(root, issuing, key)
    return _ISSUERS[cluster_name]


class Hand:
    """A node as the master sees it: says what the test wants, and keeps a mirror."""

    def __init__(self, world: World, name: str, number: int) -> None:
        self.world, self.name = world, name
        self.boot = bytes([number]) * 16
        self.leaf = Leaf(1000 + number, NOW_UTC + 86_400, bytes([number]) * 32)
        self.mirror = Mirror()
        self.link: LinkId | None = None
        #: Whether it reads, and acknowledges, what comes.
        self.reads = True
        self.inbox: list[bytes] = []
        self.results: dict[int, Result] = {}
        self.withdrawn: list[Withdrawn] = []
        self.welcome: ClusterWelcome | None = None
        self.received_bytes = 0
        self.cut: Cut | None = None
        self.places: tuple[str, ...] = ()

    def connect(self) -> None:
        """Have a new link; what comes over an older one is not read any more."""
        if self.link is not None:
            del self.world.hands[self.link]
        self.link = self.world.new_link()
        self.cut, self.inbox = None, []
        self.world.hands[self.link] = self
        identity = Identity("test", Role.NODE, self.name)
        self.world.core.receive_link(self.link, identity, self.leaf, self.boot, self.world.now)

    def disconnect(self) -> None:
        """Lose the link."""
        assert self.link is not None
        link, self.link = self.link, None
        del self.world.hands[link]
        self.inbox.clear()
        self.world.core.receive_end(link, self.world.now)
        self.world.settle()

    def say(self, frame: ClusterFrame) -> None:
        """Send a frame."""
        assert self.link is not None, f"{self.name} has no link"
        self.world.core.receive_frame(self.link, cluster.encode(frame), self.world.now)

    def hello(self) -> None:
        """Say HELLO, with what the mirror has."""
        hello = ClusterHello(self.name, self.mirror.epoch, self.mirror.version, self.places)
        self.say(hello)
        self.world.settle()

    def call(self, op: ClusterOp, /, **args: Any) -> int:
        """Ask for something, and nothing happens yet; return the number of the call."""
        self.world.serial += 1
        serial = self.world.serial
        self.say(ClusterCall(serial, op, args))
        return serial

    def start(self, op: ClusterOp, /, **args: Any) -> int:
        """Ask for something, and let happen what happens at once; return the number."""
        serial = self.call(op, **args)
        self.world.settle()
        return serial

    def ask(self, op: ClusterOp, /, **args: Any) -> Result:
        """Ask for something and let everything happen; return the result."""
        serial = self.start(op, **args)
        assert serial in self.results, f"{op.name} has no result; cut: {self.cut}"
        return self.results.pop(serial)

    def do(self, op: ClusterOp, /, **args: Any) -> Any:
        """Ask for something that is granted; return the value."""
        result = self.ask(op, **args)
        assert result.is_ok, result
        return result.value

    def refused(self, op: ClusterOp, /, **args: Any) -> int:
        """Ask for something that is refused; return the errno."""
        result = self.ask(op, **args)
        assert not result.is_ok, result
        return result.errno

    def come(self, *endpoints: int) -> Hand:
        """Have a link, and begin to state: these endpoints, of user 1000."""
        self.connect()
        self.hello()
        self.do(ClusterOp.RESTATE)
        for number in endpoints:
            self.do(ClusterOp.ENTER, endpoint=number, uid=1000)
        return self

    def join(self, *endpoints: int) -> Hand:
        """Come, state nothing but endpoints, and be live."""
        self.come(*endpoints)
        self.do(ClusterOp.RESTATED)
        return self

    def receive(self) -> None:
        """Read all that has come."""
        while self.inbox and self.link is not None:
            self.receive_one()

    def receive_one(self) -> None:
        """Read one frame."""
        frame = cluster.decode(self.inbox.pop(0))
        match frame:
            case ClusterWelcome():
                self.welcome = frame
                self.mirror.receive_welcome(frame.epoch, frame.is_same)
            case Part() | TableDelta():
                reply = self.mirror.receive_table(frame, self.world.now)
                if reply is not None:
                    self.say(reply)
            case Result():
                self.results[frame.serial] = frame
            case Withdrawn():
                self.withdrawn.append(frame)
            case _:
                raise AssertionError(f"the master says {frame}")

    def records(self) -> list[Record]:
        """Return what the mirror has."""
        return [decode_record(key, value) for key, value in self.mirror.snapshot().entries]

    def sees(self, other: Hand) -> NodeState | None:
        """Return the state of another node, as this one knows it."""
        number = other.welcome.number if other.welcome else 0
        record = self.mirror.get_node(number)
        return None if record is None else record.state


class World:
    """A master, its disk, a clock, and nodes."""

    def __init__(self, policy: str = EVERYTHING, limits: Limits | None = None) -> None:
        self.disk: dict[bytes, bytes] = {}
        self.audit: list[Audit] = []
        self.now, self.utc_offset = 100.0, float(NOW_UTC) - 100.0
        self.rng = random.Random(7)
        self.limits = limits
        self.policy: Policy = parse_policy(policy)
        self.hands: dict[LinkId, Hand] = {}
        self.nodes: dict[str, Hand] = {}
        self.visitors: dict[LinkId, Result | Cut | None] = {}
        self.trust: frozenset[int] = frozenset()
        self.links = self.serial = 0
        self.core = self.make_core()
        self.settle()

    @property
    def utc(self) -> float:
        """The wall clock."""
        return self.now + self.utc_offset

    def make_core(self) -> Core:
        """Return a master with what is on the disk."""
        return Core(
            make_issuer(),
            self.policy,
            self.rng.randbytes,
            lambda: self.utc,
            self.disk.items(),
            self.now,
            self.limits,
        )

    def new_link(self) -> LinkId:
        """Return a number that no link ever had."""
        self.links += 1
        return LinkId(self.links)

    def node(self, name: str) -> Hand:
        """Return a node, a new one if need be."""
        if name not in self.nodes:
            self.nodes[name] = Hand(self, name, len(self.nodes) + 1)
        return self.nodes[name]

    def restart(self, after_s: float = 1.0) -> None:
        """Kill the master, and bring it back with what was written."""
        self.kill()
        self.now += after_s
        self.core = self.make_core()
        self.settle()

    def kill(self) -> None:
        """Kill the master: what it had not told is not told, what was under way is lost."""
        for hand in self.hands.values():
            hand.link = None
            hand.inbox.clear()
        self.hands.clear()
        self.visitors.clear()

    def settle(self) -> None:
        """Apply effects, and let all who read read, until nothing happens any more."""
        while True:
            self.apply(self.core.take_effects())
            readers = [hand for hand in self.hands.values() if hand.reads and hand.inbox]
            if not readers:
                return
            for hand in readers:
                hand.receive()

    def apply(self, effects: list[Effect]) -> None:
        """Do what the master wants, and check that it is in its order."""
        ranks = [_rank(effect) for effect in effects]
        assert ranks == sorted(ranks), effects
        for effect in effects:
            match effect:
                case Write(rows):
                    self.write(rows)
                case Audit():
                    self.audit.append(effect)
                case Trust(denied):
                    self.trust = denied
                case Send(link, data):
                    self.deliver(link, data)
                case Cut(link):
                    self.end(link, effect)

    def write(self, rows: tuple[tuple[bytes, bytes | None], ...]) -> None:
        """Put rows on the disk."""
        for key, value in rows:
            if value is None:
                self.disk.pop(key, None)
            else:
                self.disk[key] = value

    def deliver(self, link: LinkId, data: bytes) -> None:
        """Put a frame on its way; nobody may be there any more."""
        if link in self.hands:
            self.hands[link].inbox.append(data)
            self.hands[link].received_bytes += len(data)
        elif link in self.visitors:
            frame = cluster.decode(data)
            assert isinstance(frame, Result)
            self.visitors[link] = frame

    def end(self, link: LinkId, cut: Cut) -> None:
        """Close a link."""
        if link in self.hands:
            hand = self.hands.pop(link)
            if hand.link == link:
                # What was sent before is read.
                if hand.reads:
                    hand.receive()
                hand.link, hand.cut = None, cut
        elif link in self.visitors:
            self.visitors[link] = cut

    def visit(self, actor: str, op: ClusterOp, /, **args: Any) -> Result:
        """Ask without a certificate, and let everything happen."""
        link = self.start_visit(actor, op, args)
        self.settle()
        outcome = self.visitors.pop(link)
        assert isinstance(outcome, Result), outcome
        return outcome

    def start_visit(self, actor: str, op: ClusterOp, args: Mapping[str, Any]) -> LinkId:
        """Ask without a certificate."""
        link = self.new_link()
        self.visitors[link] = None
        self.core.receive_visitor(link, actor, self.now)
        self.core.receive_frame(link, cluster.encode(ClusterCall(1, op, args)), self.now)
        return link

    def order(self, op: ClusterOp, /, **args: Any) -> Any:
        """Do something as the operator, which must be granted; return the value."""
        result = self.visit("operator", op, **args)
        assert result.is_ok, result
        return result.value

    def run_until(self, when: float) -> None:
        """Let time pass."""
        while (due := self.core.get_timer()) is not None and due <= when:
            self.now = max(self.now, due)
            self.core.handle_timer(self.now)
            self.settle()
        self.now = when

    def run_for(self, duration_s: float) -> None:
        """Let so much time pass."""
        self.run_until(self.now + duration_s)

    def audited(self, action: str, is_done: bool = True) -> list[Audit]:
        """Return what the audit says of an action."""
        return [one for one in self.audit if (one.action, one.is_done) == (action, is_done)]


def make_csr() -> bytes:
    """Return a certificate request for a new key."""
    return make_request(make_key())


def cut_code(hand: Hand) -> CloseCode | None:
    """Return why the link of a node was cut, None if it was not."""
    return None if hand.cut is None else hand.cut.code


def _rank(effect: Effect) -> int:
    match effect:
        case Write():
            return 0
        case Audit():
            return 1
        case Trust():
            return 3
        case _:
            return 2
