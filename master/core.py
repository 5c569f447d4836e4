"""The master without IO: links and what comes over them, who is live, time.

The shell tells what happened (`receive_*`), with the time; the core answers by effects, which the
shell takes and applies in their order (`take_effects`). `get_timer` says when `handle_timer` is
wanted next. Times are seconds of a monotonic clock; the wall clock is asked for by `utc`.

    link  --HELLO-->  table, deltas  --RESTATE, calls, RESTATED-->  live  --calls-->

A node is live when it has the table and has stated what it has. It stays so for `lost_s` after its
link fell silent or ended; then it is lost, and keeps its leases. `lease_s` later it has no names,
matches and buses any more, if it does not come back.

Each start of the master is an epoch: versions of the table go on, but what links of another epoch
say of them does not count. A node that has exactly what the master came back with needs nothing.

Invariants:

1. What is told was written before (case 28): effects begin with rows and audit.
2. The result of a call about the table leaves when all live nodes have that table.
3. Whatever one link sends concerns that link, or is what its node may do.
4. Whoever is revoked has no link from then on, and nothing of its endpoints is left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..link.stranger import Strangers
from ..proto import cluster, codec
from ..proto.cluster import (
    CLUSTER_VERSION,
    Ack,
    ClusterCall,
    ClusterHello,
    ClusterWelcome,
    Nack,
    Resync,
    Withdrawn,
)
from ..proto.errors import BusError, CloseCode, Denied, RemoteProtocolError, ShareExceeded
from ..proto.frames import Result
from ..proto.operation import ClusterOp
from ..proto.record import FactRecord, NodeState
from .call import Calls, Quotas
from .desk import Desk
from .effect import Audit, Cut, Effect, LinkId, Send, Trust, Write
from .feed import Feed, FeedLimits
from .ledger import Ledger
from .office import Office
from .presence import Presence
from .registry import Registry
from .review import review
from .share import Shares

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ..link.identity import Identity
    from ..proto.cluster import ClusterFrame
    from .entity import Endpoint, Node
    from .issuer import Issued, Issuer, Leaf
    from .policy import Policy

#: How long a node may be silent, or without a link, before it is lost: a black hole of 4 s is not
#: told to everybody (case 13).
LOST_S: Final = 5.0
#: How long a lost node keeps its names: it may have restarted, or a switch may have.
LEASE_S: Final = 120.0
#: How long nodes may take to come back to a master that has restarted.
START_S: Final = 10.0
#: How long a link may take for its HELLO.
HELLO_S: Final = 5.0
#: How often what is over is cleared away.
SWEEP_S: Final = 30.0
#: How long a bus without master, names and matches is kept, with its number and key.
BUS_KEEP_S: Final = 86_400
#: Nodes of a cluster.
NODES: Final = 10_000

#: Operations whose result waits for nobody: they change nothing that others could rely on.
_PROMPT: Final = frozenset(
    {
        ClusterOp.RENEW,
        ClusterOp.RESTATE,
        ClusterOp.RETURN,
        ClusterOp.CHALLENGE,
        ClusterOp.ENTER,
        ClusterOp.EXIT,
        ClusterOp.ASK,
    }
)
#: What somebody may ask who has proven nothing.
_BY_STRANGERS: Final = ("link", "enrol")
_FIRST_OF_OPERATOR: Final = ClusterOp.TOKEN


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the master waits, and what it allows."""

    lost_s: float = LOST_S
    lease_s: float = LEASE_S
    start_s: float = START_S
    hello_s: float = HELLO_S
    sweep_s: float = SWEEP_S
    bus_keep_s: int = BUS_KEEP_S
    nodes: int = NODES
    feed: FeedLimits = field(default_factory=FeedLimits)
    quotas: Quotas = field(default_factory=Quotas)


@dataclass(slots=True, eq=False)
class _Link:
    """One link to a node; `node` is None until its HELLO."""

    id: LinkId
    identity: Identity
    leaf: Leaf
    boot: bytes
    hello_until: float
    node: Node | None = None
    has_restated: bool = False


class Core:
    """The master's decisions."""

    def __init__(  # noqa: PLR0913 (what the outside is)
        self,
        issuer: Issuer,
        policy: Policy,
        draw: Callable[[int], bytes],
        utc: Callable[[], float],
        rows: Iterable[tuple[bytes, bytes]],
        now: float,
        limits: Limits | None = None,
    ) -> None:
        """Begin a new epoch with what the journal holds.

        Args:
            issuer: The cluster's certificates.
            policy: Who may do what.
            draw: Returns so many secret random bytes.
            utc: Returns the wall clock.
            rows: All rows of the journal, none for a new cluster.
            now: The time.
            limits: By default those above.

        Raises:
            RemoteProtocolError: The rows are not what a master wrote.
        """
        self._issuer, self._utc = issuer, utc
        self._limits = limits or Limits()
        self._now = now
        self._writes: list[Write] = []
        self._audits: list[Audit] = []
        self._trust: Trust | None = None
        # Frames and cuts; the feed appends to the same list.
        self._told: list[Effect] = []
        self._results: list[tuple[LinkId, bytes]] = []
        self._links: dict[LinkId, _Link] = {}
        self._visitors: dict[LinkId, str] = {}
        self._sweep_at = now + self._limits.sweep_s
        self._strangers = Strangers()
        self._shares = Shares()
        # The node that is heard just now, to which entries are counted.
        self._speaker: str | None = None
        self._ledger = Ledger()
        self._registry = Registry(self._ledger)
        self._office = Office(self._ledger, self._registry, issuer, draw, self._note)
        self._calls = Calls(self._registry, issuer, draw, self._note, self._limits.quotas)
        private = self._ledger.load(rows)
        self._registry.load(pair for pair in private if pair[0][:1] in (b"N", b"E", b"Q", b"B"))
        self._office.load(private)
        self._calls.denied = self._office.denied
        self._begin_epoch()
        limits = self._limits
        self._feed = Feed(self._ledger.table, self.epoch, self._told, limits.feed)
        self._presence = Presence(limits.lost_s, limits.lease_s)
        self._desk = Desk(self._ledger, self._registry, self._office, issuer)
        self._expect_nodes(now)
        self._begin_policy(policy, dict(private).get(b"P"))
        # From here on there is a version that can be acknowledged.
        self._flush()

    def _begin_epoch(self) -> None:
        former = self._ledger.count("epoch")
        #: What nodes may have that need nothing now.
        self._known = (former, self._ledger.table.version)
        # The clock is in it so that a copy of the journal, put back, begins another epoch than
        # those that followed the copy.
        self.epoch = max(former + 1, int(self._utc()))
        self._ledger.set_count("epoch", self.epoch)

    def _expect_nodes(self, now: float) -> None:
        for node in self._registry.nodes.values():
            if node.state is NodeState.LIVE:
                # No shell gives such a number to a link.
                reader = LinkId(-node.number)
                self._feed.expect(reader, now)
                self._presence.expect(node.name, reader, now + self._limits.start_s)
            else:
                self._presence.lose(node.name, now)

    def _begin_policy(self, policy: Policy, row: bytes | None) -> None:
        self._calls.policy = policy
        self._calls.policy_number = self._ledger.count("policy")
        if row != codec.encode([policy.digest]):
            self._count_policy()

    def _count_policy(self) -> None:
        """Tell nodes that what they have asked may have another answer now."""
        number = self._calls.policy_number = self._ledger.count("policy") + 1
        self._ledger.set_count("policy", number)
        self._ledger.put(FactRecord("policy", number))
        self._ledger.write(b"P", codec.encode([self._calls.policy.digest]))

    # --- what the shell calls ---

    def take_effects(self) -> list[Effect]:
        """Return what is to be done, in this order, and forget it."""
        self._flush()
        effects: list[Effect] = [*self._writes, *self._audits, *self._told]
        if self._trust is not None:
            # Behind the cuts, which say why.
            effects.append(self._trust)
        self._writes.clear()
        self._audits.clear()
        self._told.clear()
        self._trust = None
        return effects

    def _flush(self) -> None:
        """Make versions of what has changed, and let the results wait for them."""
        write, deltas = self._ledger.flush()
        if write is not None:
            self._writes.append(write)
        self._feed.publish(deltas, self._now)
        for link, data in self._results:
            self._feed.wait(link, [data])
        self._results.clear()

    def get_timer(self) -> float | None:
        """Return when `handle_timer` is to be called, None for never."""
        times = [link.hello_until for link in self._links.values() if link.node is None]
        times.append(self._sweep_at)
        for time in (self._feed.get_timer(), self._presence.get_timer()):
            if time is not None:
                times.append(time)
        return min(times)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        self._now = now
        for link in list(self._links.values()):
            if link.node is None and link.hello_until <= now:
                self._cut(link, CloseCode.ORDER, f"no HELLO within {self._limits.hello_s:g} s")
        for reader, text in self._feed.handle_timer(now):
            self._give_up(self._links[reader], text)
        for name in self._presence.take_lost(now):
            self._lose(self._registry.nodes[name], "no sign of it")
        for name in self._presence.take_free(now):
            self._free(self._registry.nodes[name])
        if self._sweep_at <= now:
            self._sweep_at = now + self._limits.sweep_s
            self._sweep(int(self._utc()))

    def receive_link(
        self, link: LinkId, identity: Identity, leaf: Leaf, boot: bytes, now: float
    ) -> None:
        """A node has a link: what its certificate says, and which life of its process it is."""
        self._now = now
        one = _Link(link, identity, leaf, boot, now + self._limits.hello_s)
        self._links[link] = one
        if leaf.serial in self._office.denied:
            self._cut(one, CloseCode.DENIED, "the certificate was revoked")

    def receive_visitor(self, link: LinkId, actor: str, now: float) -> None:
        """Somebody without a certificate: `operator` at the own door, else who wants to enrol."""
        self._now = now
        self._visitors[link] = actor

    def receive_frame(self, link: LinkId, data: bytes, now: float) -> None:
        """A frame has come; one that breaks a rule ends its link, and no other."""
        self._now = now
        one = self._links.get(link)
        actor = self._visitors.get(link)
        try:
            if one is not None:
                self._speaker = one.identity.name
                self._receive_from_node(one, cluster.decode(data))
            elif actor is not None:
                self._receive_from_visitor(link, actor, cluster.decode(data))
        except RemoteProtocolError as error:
            if one is not None:
                self._cut(one, error.code, error.message)
            else:
                self._visitors.pop(link, None)
                self._told.append(Cut(link, error.code, error.message))
        finally:
            self._speaker = None

    def receive_silence(self, link: LinkId, now: float) -> None:
        """Nothing is heard on a link for some time."""
        self._now = now
        one = self._links.get(link)
        if one is not None and one.node is not None and one.node.state is NodeState.LIVE:
            self._presence.miss(one.node.name, now)

    def receive_sound(self, link: LinkId, now: float) -> None:
        """Something is heard again."""
        self._now = now
        one = self._links.get(link)
        if one is not None and one.node is not None:
            self._presence.hear(one.node.name)

    def receive_end(self, link: LinkId, now: float) -> None:
        """A link has ended; harmless if the core has cut it itself."""
        self._now = now
        self._visitors.pop(link, None)
        one = self._links.pop(link, None)
        if one is not None:
            self._leave(one)

    def receive_refusal(self, where: str, rule: str, text: str) -> None:
        """Somebody was refused in the handshake of a link."""
        self._note(where, "link", "", False, f"{rule}: {text}")

    def set_policy(self, policy: Policy, now: float) -> None:
        """Follow a new policy: what it does not allow is taken away, and answers are void."""
        self._now = now
        change = self._calls.policy.compare(policy)
        self._note("operator", "policy", str(change), True)
        if not change:
            return
        self._calls.policy = policy
        self._count_policy()
        for endpoint, withdrawn in review(self._registry, policy):
            self._withdraw(endpoint, withdrawn)

    def refuse_policy(self, why: str) -> None:
        """A policy that cannot be read is not followed; the one of before stays."""
        self._note("operator", "policy", "", False, why)

    def issue_own(self, name: str, csr: bytes) -> Issued:
        """Return a certificate for the master itself; IdentityError if none can be made."""
        return self._office.issue_own(name, csr, self._utc())

    @property
    def denied(self) -> frozenset[int]:
        """Serial numbers that no link may have."""
        return self._office.denied

    def get_number(self, name: str) -> int | None:
        """Return the number of a node that has said HELLO, None if it has not."""
        node = self._registry.nodes.get(name)
        return None if node is None or node.state is not NodeState.LIVE else node.number

    def stop(self) -> None:
        """The master goes down; nodes go on with what they have."""
        text = "the master goes down; the table stays as it is"
        self._told += [Cut(link, CloseCode.GOING_DOWN, text) for link in self._links]
        self._told += [Cut(link, CloseCode.GOING_DOWN, text) for link in self._visitors]
        self._links.clear()
        self._visitors.clear()

    # --- links ---

    def _note(
        self, actor: str, action: str, subject: str, is_done: bool, detail: str = "", /
    ) -> None:
        if self._speaker is not None:
            is_told = self._shares.admit(self._speaker, action, self._now, is_done=is_done)
        else:
            is_told = is_done or action not in _BY_STRANGERS or self._strangers.admit(self._now)
        if is_told:
            self._audits.append(Audit(self._utc(), actor, action, subject, is_done, detail))

    def _send(self, link: LinkId, frame: ClusterFrame) -> None:
        self._told.append(Send(link, cluster.encode(frame)))

    def _cut(self, link: _Link, code: CloseCode, text: str) -> None:
        self._told.append(Cut(link.id, code, text))
        del self._links[link.id]
        self._leave(link)

    def _leave(self, link: _Link) -> None:
        """A link is gone; its node may come back by another."""
        node = link.node
        if node is None:
            return
        node.unstated = None
        self._calls.forget(node)
        if node.state is NodeState.LIVE:
            self._feed.suspend(link.id, self._now)
            self._presence.end(node.name, self._now)
        else:
            self._feed.leave(link.id, self._now)
            self._presence.lose(node.name, self._now)

    def _receive_hello(self, link: _Link, hello: ClusterHello) -> None:
        if hello.version != CLUSTER_VERSION:
            text = f"version {hello.version}; the master speaks {CLUSTER_VERSION}"
            raise RemoteProtocolError(text, CloseCode.VERSION)
        if hello.name != link.identity.name:
            self._note(
                str(link.identity), "hello", f"node/{hello.name[:100]}", False, "not its name"
            )
            raise RemoteProtocolError("the name of another node", CloseCode.DENIED)
        version, is_same = self._judge_table(hello)
        node = self._registry.nodes.get(hello.name)
        if node is None:
            node = self._add_node(hello.name)
        self._office.learn(link.identity, link.leaf.serial, link.leaf.until_utc)
        self._send(link.id, ClusterWelcome(self._issuer.cluster, self.epoch, node.number, is_same))
        self._feed.join(link.id, version, node.state is NodeState.LIVE, self._now)
        former = self._presence.come(node.name, link.id)
        if former is not None:
            self._feed.leave(former, self._now)
            if (old := self._links.pop(former, None)) is not None:
                text = "a newer link of this node takes its place"
                self._told.append(Cut(old.id, CloseCode.TAKEN_OVER, text))
        link.node, node.unstated = node, None
        node.boot, node.places = link.boot, hello.places
        node.key, node.until_utc = link.leaf.key, link.leaf.until_utc
        self._registry.put_node(node)

    def _add_node(self, name: str) -> Node:
        if len(self._registry.nodes) >= self._limits.nodes:
            text = f"{self._limits.nodes} nodes, which is the limit"
            raise RemoteProtocolError(text, CloseCode.SHARE)
        self._note(f"node/{name}", "new", f"node/{name}", True)
        return self._registry.add_node(name)

    def _judge_table(self, hello: ClusterHello) -> tuple[int, bool]:
        """Return the version that a node has in this epoch, and whether it has one."""
        version = hello.table_version
        if hello.epoch != self.epoch and (not hello.epoch or (hello.epoch, version) != self._known):
            return 0, False
        if version > self._ledger.table.version:
            raise RemoteProtocolError(f"version {version}, which was never told", CloseCode.ORDER)
        return version, True

    def _receive_from_node(self, link: _Link, frame: ClusterFrame) -> None:
        if link.node is None:
            if not isinstance(frame, ClusterHello):
                raise RemoteProtocolError("the first frame is not HELLO", CloseCode.ORDER)
            self._receive_hello(link, frame)
            return
        match frame:
            case ClusterCall():
                self._receive_call(link, link.node, frame)
            case Ack() | Nack() | Resync():
                self._receive_about_table(link, frame)
            case _:
                kind = type(frame).__name__
                raise RemoteProtocolError(f"{kind} from a node that is known", CloseCode.ORDER)

    def _receive_about_table(self, link: _Link, frame: Ack | Nack | Resync) -> None:
        is_of_now = frame.epoch == self.epoch
        if isinstance(frame, Resync):
            version = frame.version if is_of_now else 0
            self._feed.receive_resync(link.id, version, self._now)
        elif not is_of_now:
            # Said before it had read WELCOME.
            return
        elif isinstance(frame, Ack):
            self._feed.receive_ack(link.id, frame.version, self._now)
        elif self._feed.receive_nack(link.id, frame.version, self._now):
            actor = f"node/{link.identity.name}"
            subject = f"version {frame.version} of the table"
            self._note(actor, "nack", subject, False, frame.reason)

    # --- calls ---

    def _receive_call(self, link: _Link, node: Node, call: ClusterCall) -> None:
        if not link.has_restated and call.op not in (ClusterOp.RESTATE, ClusterOp.RENEW):
            raise RemoteProtocolError(f"{call.op.name} before RESTATE", CloseCode.ORDER)
        try:
            result = Result(call.serial, value=self._carry_out(link, node, call.op, call.args))
        except BusError as error:
            result = Result.refused(call.serial, error)
            if isinstance(error, Denied):
                actor, action = f"node/{node.name}", call.op.name.lower()
                self._note(actor, action, _subject_of(call.args), False, error.message)
        if call.op in _PROMPT or not result.is_ok:
            self._send(link.id, result)
        else:
            self._results.append((link.id, cluster.encode(result)))

    def _carry_out(self, link: _Link, node: Node, op: ClusterOp, args: Mapping[str, Any]) -> object:
        if op is ClusterOp.RESTATE:
            link.has_restated = True
            self._registry.begin_stating(node)
            return None
        if op is ClusterOp.RESTATED:
            self._receive_restated(link, node)
            return None
        if op is ClusterOp.RENEW:
            return self._office.renew(node, args["csr"], self._utc())
        if op is ClusterOp.ENROL or op >= _FIRST_OF_OPERATOR:
            raise Denied(f"{op.name} is not for nodes")
        return self._calls.carry_out(node, op, args, self._now, self._utc())

    def _receive_restated(self, link: _Link, node: Node) -> None:
        if node.unstated is None:
            raise RemoteProtocolError("RESTATED without RESTATE", CloseCode.ORDER)
        self._registry.end_stating(node)
        if node.state is not NodeState.LIVE:
            node.state = NodeState.LIVE
            self._registry.put_node(node)
            self._note(f"node/{node.name}", "live", f"node/{node.name}", True)
        self._feed.set_live(link.id)

    def _receive_from_visitor(self, link: LinkId, actor: str, frame: ClusterFrame) -> None:
        if not isinstance(frame, ClusterCall):
            raise RemoteProtocolError("not a CALL", CloseCode.ORDER)
        op, args, is_operator = frame.op, frame.args, actor == "operator"
        del self._visitors[link]
        try:
            if is_operator is not (op >= _FIRST_OF_OPERATOR) or (
                not is_operator and op is not ClusterOp.ENROL
            ):
                raise Denied(f"{op.name} is not to be asked here")
            value = self._serve_operator(op, args) if is_operator else self._enrol(args, actor)
        except BusError as error:
            self._send(link, Result.refused(frame.serial, error))
            return
        result = Result(frame.serial, value=value)
        if op is ClusterOp.REVOKE:
            # Whoever has the answer may rely on it that all nodes know.
            self._results.append((link, cluster.encode(result)))
        else:
            self._send(link, result)

    def _enrol(self, args: Mapping[str, Any], actor: str) -> object:
        name: str = args["name"]
        if name not in self._registry.nodes and len(self._registry.nodes) >= self._limits.nodes:
            raise ShareExceeded(f"{self._limits.nodes} nodes, which is the limit")
        value = self._office.enrol(args["token"], name, args["csr"], actor, self._utc())
        node = self._registry.nodes[name]
        if not self._presence.knows(name):
            self._presence.lose(node.name, self._now)
        return value

    def _serve_operator(self, op: ClusterOp, args: Mapping[str, Any]) -> object:
        if op is ClusterOp.REVOKE:
            return self._revoke(args["subject"], args.get("reason") or "")
        if op is ClusterOp.NODES:
            return self._desk.list_nodes(args.get("after") or "", self._get_lag)
        if op is ClusterOp.STATUS:
            links = sum(1 for link in self._links.values() if link.node is not None)
            return self._desk.get_status(self.epoch, self._calls.policy_number, links)
        return self._desk.carry_out(op, args, self._utc())

    def _get_lag(self, node: Node) -> int | None:
        reader = self._presence.get_reader(node.name)
        return None if reader is None else self._feed.get_lag(reader)

    # --- who goes ---

    def _revoke(self, subject: str, reason: str) -> object:
        serials = self._office.revoke(subject, reason, self._utc())
        self._follow_denied()
        text = f"revoked: {reason}" if reason else "revoked"
        for link in list(self._links.values()):
            if link.leaf.serial in serials:
                self._cut(link, CloseCode.DENIED, text)
        for node in list(self._registry.nodes.values()):
            for endpoint in list(node.endpoints.values()):
                if endpoint.serial in serials:
                    self._expel(endpoint, text)
        kind, _, name = subject.partition("/")
        if kind == "node" and name in self._registry.nodes:
            self._drop(self._registry.nodes[name], text)
        return {"serials": [f"{serial:x}" for serial in sorted(serials)]}

    def _follow_denied(self) -> None:
        self._calls.denied = self._office.denied
        self._trust = Trust(self._office.denied)

    def _expel(self, endpoint: Endpoint, reason: str) -> None:
        self._withdraw(endpoint, Withdrawn(endpoint.number, ClusterOp.ENTER, reason=reason))
        self._registry.remove(endpoint)

    def _withdraw(self, endpoint: Endpoint, withdrawn: Withdrawn) -> None:
        link = self._presence.get_link(endpoint.node.name)
        if link is not None:
            self._send(link, withdrawn)
        subject = withdrawn.path.decode(errors="backslashreplace") or "all"
        action = f"withdraw {withdrawn.op.name.lower()}"
        self._note("master", action, f"{endpoint.principal} {subject}", True, withdrawn.reason)

    def _give_up(self, link: _Link, text: str) -> None:
        """A reader does not follow: its node is as good as lost."""
        node = link.node
        assert node is not None, "readers have said HELLO"
        self._cut(link, CloseCode.EVICTED, text)
        if node.state is NodeState.LIVE:
            self._lose(node, text)

    def _lose(self, node: Node, why: str) -> None:
        """A live node is lost: barriers wait for it no longer, and all are told."""
        node.state = NodeState.LOST
        self._registry.put_node(node)
        link = self._presence.get_link(node.name)
        if link is not None:
            # It has to state anew what it has, as others may have its names by then.
            self._cut(self._links[link], CloseCode.EVICTED, f"lost: {why}")
        else:
            reader = self._presence.get_reader(node.name)
            assert reader is not None, "a live node has a reader"
            self._feed.leave(reader, self._now)
            self._presence.lose(node.name, self._now)
        self._note("master", "lost", f"node/{node.name}", True, why)

    def _free(self, node: Node) -> None:
        if node.is_ephemeral:
            self._drop(node, "an ephemeral node that was lost")
        elif node.endpoints or node.wishes:
            self._registry.free(node)
            self._note("master", "free", f"node/{node.name}", True, "lost for too long")

    def _drop(self, node: Node, why: str) -> None:
        """Forget a node for good."""
        link = self._presence.get_link(node.name)
        if link is not None:
            self._cut(self._links[link], CloseCode.DENIED, why)
        reader = self._presence.get_reader(node.name)
        if reader is not None:
            self._feed.leave(reader, self._now)
        self._presence.forget(node.name)
        self._registry.drop_node(node)
        self._note("master", "forget", f"node/{node.name}", True, why)

    def _sweep(self, now_utc: int) -> None:
        """Clear away what is over."""
        if missed := self._strangers.take_missed():
            text = f"{missed} more were refused, of whom there is no entry each"
            self._note("master", "refusals", "", True, text)
        for name, count in self._shares.take_missed(self._now).items():
            text = f"{count} more that this node caused, of which there is no entry each"
            self._note("master", "missed", f"node/{name}", True, text)
        if self._office.sweep(now_utc):
            self._follow_denied()
        for bus in self._registry.sweep_buses(now_utc, self._limits.bus_keep_s):
            path = bus.record.path.decode(errors="backslashreplace")
            self._note("master", "forget", path, True, "nobody has used it for a long time")
        for node in list(self._registry.nodes.values()):
            for endpoint in list(node.endpoints.values()):
                if endpoint.serial and endpoint.until_utc <= now_utc:
                    self._expel(endpoint, "its certificate has expired")
            is_gone = self._presence.get_reader(node.name) is None
            if is_gone and node.until_utc <= now_utc:
                self._drop(node, "its certificate has expired")


def _subject_of(args: Mapping[str, Any]) -> str:
    """Return what a call was about, for people."""
    number, path = args.get("endpoint"), args.get("path")
    parts = [] if number is None else [f"endpoint {number}"]
    if isinstance(path, bytes):
        parts.append(path.decode(errors="backslashreplace"))
    return " ".join(parts)
