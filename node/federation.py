"""What a node does as a member of a cluster: buses that other nodes are on, too.

A bus of the cluster is known here while an endpoint of this node is on it. Its tables come from
the mirror: who owns which name, what each node wants, where its master is; they are put into the
switch as routes and as subscriptions of trunks. What the endpoints of this node get on such a bus
is claimed from the cluster's master first, and in effect here only when that has agreed (D5).

    mirror  --changes-->  routes, trunks, subscriptions of other nodes, notices
    BIND, CONTROL  --steps-->  claims, commands to other nodes  --results-->  registry

Invariants:

1. The switch leads to another node exactly what the mirror says is there.
2. An endpoint has nothing on a bus of the cluster that the cluster's master has not granted.
3. A command is carried out once, however often its node asks.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from ..proto import codec
from ..proto.address import BusAddress, format_within
from ..proto.codec import U32_MAX, Fields
from ..proto.control import (
    Grant,
    GrantFlags,
    MulticastSend,
    OwnedAddr,
    RevokeAddr,
    RevokeMatch,
    Wish,
)
from ..proto.errors import (
    AddressInUse,
    BusError,
    Denied,
    InvalidArgument,
    MasterLost,
    NodeLost,
    NoSuchEndpoint,
    RemoteProtocolError,
    error_for,
)
from ..proto.frames import Result
from ..proto.limits import INLINE_BYTES
from ..proto.match import form_of, what_of
from ..proto.names import NameFlags, NameOutcome
from ..proto.notice import Event, Notice
from ..proto.operation import ClusterOp
from ..proto.peer import Command as PeerCommand
from ..proto.record import (
    BusRecord,
    FactRecord,
    LeaseRecord,
    MatchRecord,
    NodeRecord,
    NodeState,
    OwnerRecord,
    split_unique,
)
from ..proto.terms import Terms
from ..proto.text import escape
from . import answer
from .claim import Claim
from .effect import Signal
from .grant import format_what
from .registry import forms_of
from .standing import Standing
from .steps import demand
from .uplink_effect import Answered, BlockLost, Changed, Refuted, Stated, Taken, Turned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .._datapath import LaneEvent
    from ..proto.match import What
    from ..proto.mirror import Change
    from ..proto.peer import PeerFrame
    from .control import Control, Letter
    from .effect import Effect
    from .endpoint import Bus, Endpoint
    from .grant import Command
    from .peers import Peers
    from .port import ClusterPort
    from .registry import Registry
    from .steps import Steps, Tickets
    from .uplink import Uplink
    from .uplink_effect import UplinkEffect

log = logging.getLogger("afbus.node")

#: Results of commands that are remembered for each node, in case that it asks again.
RESULTS: Final = 256
#: What a node wants whose endpoints may read notices: the notices of other nodes (D15).
WATCH: Final = Terms.of("afbus.notices")
#: Matches of nodes are numbered from here: those of endpoints, by the registry, never come so far,
#: and no two matches of a bus bear the same number.
FIRST_WANT: Final = 1 << 63
#: What the master says to whoever asks for a name and is not its owner now.
_NOT_OWNED: Final = (NameOutcome.EXISTS, NameOutcome.IN_QUEUE)
#: What nodes tell each other of their endpoints; all else an agent knows itself, or by the table.
_TOLD: Final = (Event.JOINED, Event.LEFT, Event.KILLED)
#: Commands that need the word of the cluster's master.
_GIVING: Final = (OwnedAddr, Wish, MulticastSend, Grant)


@dataclass(slots=True)
class _Commands:
    """Commands of one other node: those under way, and what came of the last ones."""

    running: set[int] = field(default_factory=set)
    results: OrderedDict[int, Result] = field(default_factory=OrderedDict)


class Federation:
    """The buses of the cluster, as one node sees them."""

    def __init__(  # noqa: PLR0913 (what a node consists of)
        self,
        registry: Registry,
        control: Control,
        tickets: Tickets,
        effects: list[Effect],
        port: ClusterPort,
        uplink: Uplink,
        node: str,
        clock: Callable[[], float],
    ) -> None:
        """Begin without buses; `peers` and `evict` are set before anything else is called."""
        self._registry = registry
        self._control = control
        self._tickets = tickets
        self._effects = effects
        self._port = port
        self._uplink = uplink
        self._node = node
        self._mirror = uplink.mirror
        self._clock = clock
        self.peers: Peers
        #: Cuts an endpoint off, with the reason.
        self.evict: Callable[[Endpoint, str], None]
        #: What the policy lets endpoints do.
        self.standing = Standing(registry, port, uplink, tickets, effects, clock)
        self.standing.evict = lambda endpoint, reason: self.evict(endpoint, reason)
        # Buses by their number in the cluster.
        self._buses: dict[int, Bus] = {}
        # Numbers of what other nodes want, by bus, node and what.
        self._wants: dict[tuple[int, int, What], int] = {}
        self._next_want = FIRST_WANT
        # Nodes that want to hear who comes and goes, by bus.
        self._watchers: dict[int, set[int]] = {}
        self._entered: set[int] = set()
        # Whether the buses that a former life knew were looked for in the table.
        self._is_checked = False
        # Commands that have no answer yet, by the node that they are for.
        self._asked: dict[str, dict[int, PeerCommand]] = {}
        self._serial = 0
        self._commands: dict[str, _Commands] = {}

    def restore(self) -> None:
        """Know again the buses that a former life of the agent was on, and claim what it had."""
        for bus in self._registry.buses.values():
            if bus.cluster:
                self._buses[bus.cluster] = bus
                for endpoint in bus.endpoints.values():
                    if endpoint.addresses:
                        self._adopt(endpoint, bus)
                    else:
                        self._readdress(endpoint)

    def _readdress(self, endpoint: Endpoint) -> None:
        """Who was about to join in a former life can still be answered, also from other nodes."""
        with suppress(MasterLost):
            self.receive_attached(endpoint)
            self._registry.readdress(endpoint)

    # --- what the core asks ---

    def find_bus(self, path: bytes) -> Bus | None:
        """Return a bus of the cluster, which is known here from now on; None if there is none."""
        record = self._mirror.get_bus(path)
        return None if record is None else self._open(record)

    def is_taken(self, path: bytes) -> bool:
        """Tell whether a path is a bus of the cluster, so that none of this host may have it."""
        return self._mirror.get_bus(path) is not None

    def receive_attached(self, endpoint: Endpoint) -> None:
        """An endpoint is coming onto a bus of the cluster: others must be able to answer it.

        Raises:
            MasterLost: This node has no block of addresses yet. EHOSTDOWN.
        """
        endpoint.provisional = b"@%d.%d" % (self._uplink.block, endpoint.id)

    def choose_address(self) -> bytes:
        """Return a unique address of this node; MasterLost if it has none."""
        return self._uplink.choose_address()

    def challenge(self, endpoint: Endpoint) -> Steps:
        """Return what an endpoint signs to prove its certificate (`operation.endpoint_claim`)."""
        value = demand((yield self._uplink.challenge(endpoint.id, self._clock())))
        return {
            "nonce": answer.take_nonce(value),
            "cluster": self._uplink.cluster,
            "node": self._node,
            "endpoint": endpoint.id,
        }

    def prove(self, endpoint: Endpoint, chain: list[Any], signature: bytes) -> Steps:
        """Let an endpoint be the principal of its certificate, on all buses of the cluster.

        Raises:
            Denied: The certificate or the signature is not good. EPERM.
            InvalidArgument: It is on a bus already, where others know it as somebody else. EINVAL.
        """
        self._check_fresh(endpoint)
        number, now = endpoint.id, self._clock()
        uid = endpoint.credentials.uid
        ticket = self._uplink.enter(number, uid, now, chain=chain, signature=signature)
        principal = answer.take_principal(demand((yield ticket)))
        self._entered.add(number)
        if not self._is_here(endpoint):
            self.receive_removed(endpoint)
            raise NoSuchEndpoint(f"endpoint {number} is gone")
        self._check_fresh(endpoint)
        self._registry.identify(endpoint, principal)
        return {"principal": principal}

    @staticmethod
    def _check_fresh(endpoint: Endpoint) -> None:
        if endpoint.bus is not None:
            text = f"endpoint {endpoint.id} is on a bus; who it is must be proven before"
            raise InvalidArgument(text)

    def bind(
        self, endpoint: Endpoint, address: BusAddress, width: int | None, order: str | None
    ) -> Steps:
        """Make an endpoint the master of a bus of the cluster (R6, D2)."""
        path, name = address.path, address.address
        known = self._registry.buses.get(path)
        if known is not None and not known.cluster:
            raise AddressInUse(f"{escape(path)} is a bus of this host alone")
        if order == "total":
            text = "there is no total order across hosts yet (D11); a bus of the cluster is fifo"
            raise InvalidArgument(text)
        yield from self._enter(endpoint)
        now = self._clock()
        try:
            ticket = self._uplink.bind(endpoint.id, path, name, now, width=width, order=order)
            demand((yield ticket))
            bus = self._take_bus(endpoint, path)
        except BusError:
            if endpoint.bus is None:
                # When it goes, nobody would let it exit: it never was on a bus.
                self.receive_removed(endpoint)
            raise
        if name not in endpoint.addresses:
            self._registry.own(endpoint, name)
        self._registry.set_master(bus, endpoint, name)
        return {"width": bus.width, "order": bus.order, "members": len(bus.members) - 1}

    def _take_bus(self, endpoint: Endpoint, path: bytes) -> Bus:
        """Put an endpoint onto the bus that it has bound; what cannot be used is given back."""
        record = self._mirror.get_bus(path)
        try:
            if not self._is_here(endpoint) or record is None or record.node != self._uplink.number:
                # It is gone, or the bus is somebody else's again already.
                raise MasterLost(f"{escape(path)} was lost as soon as it was bound")
            if endpoint.bus is None:
                self.receive_attached(endpoint)
        except BusError:
            self._uplink.unbind(endpoint.id, path, self._clock())
            raise
        bus = self._open(record)
        if endpoint.bus is None:
            self._registry.attach(endpoint, bus)
        return bus

    def find_node(self, bus: Bus, address: bytes) -> NodeRecord | None:
        """Return the other node that an address is on, None if it is here or nowhere."""
        number = self._mirror.find_node(bus.cluster, address.removeprefix(b"@"))
        if number is None or number == self._uplink.number:
            return None
        return self._mirror.get_node(number)

    def command(
        self, bus: Bus, node: NodeRecord, dst: bytes, items: Sequence[tuple[int, bytes]]
    ) -> Steps:
        """Let another node carry out control items of a master here (D5); its answer.

        Raises:
            NodeLost: It cannot be reached. EHOSTDOWN.
        """
        if self.peers.is_lost(node.name):
            # It is looked for on, but nobody knows for how long.
            self.peers.want(node.name)
            raise NodeLost(f"node {node.name} is lost")
        record = self._mirror.get_bus(bus.path)
        assert record is not None, "a bus of the cluster is in its table"
        # The node remembers results by serials, so those of no two lives of the agent are alike: a
        # block is of one life.
        self._serial = (self._serial or self._uplink.block << 32) + 1
        frame = PeerCommand(self._serial, bus.path, record.generation, dst, tuple(items))
        self._asked.setdefault(node.name, {})[frame.serial] = frame
        self.peers.send(node.name, frame)
        return demand((yield (node.name, frame.serial)))

    def deliver(self, sender: Endpoint, node: NodeRecord, letter: Letter, packed: bytes) -> None:
        """Send the message of a command that was carried out on another node.

        Raises:
            BusError: It cannot go there now: the node is lost, or the target.
        """
        src, dst, body = letter.src, letter.dst, letter.body
        errno = self._port.deliver_away(
            sender.id, node.number, src, dst, packed, body, *letter.numbers
        )
        if errno:
            raise error_for(errno, f"{format_within(dst)} on node {node.name}")

    def register(self, target: Endpoint, changes: Sequence[Command]) -> Steps:
        """Claim from the cluster's master what commands give an endpoint; nothing if one fails."""
        if not any(isinstance(change, _GIVING) for change in changes):
            # Whoever is refused must hear of it also while the cluster's master is away.
            return None
        yield from self._enter(target)
        self._check_blocks(changes)
        policy = self.standing.policy
        reach = yield from self.standing.judge(target, changes)
        claimed: list[Command] = []
        try:
            for change in changes:
                claimed.append(change)
                ticket = self._claim(target, change)
                if ticket is not None:
                    _check_outcome(change, demand((yield ticket)))
                if isinstance(change, Grant) and GrantFlags.NOTICES in change.flags:
                    demand((yield self._watch(target)))
            while policy != self.standing.policy:
                # What was allowed before is no word of this policy; a review sees it only later.
                policy = self.standing.policy
                reach = yield from self.standing.judge(target, changes)
            if not all(self._is_held(target, change) for change in claimed):
                raise Denied("the cluster's master has taken back what it had just given")
        except BusError:
            self.give_back(target, claimed)
            raise
        if reach is not None:
            self.standing.set_reach(target, reach)
        return None

    def _is_held(self, target: Endpoint, change: Command) -> bool:
        """Tell whether what was claimed was not taken again meanwhile."""
        match change:
            case OwnedAddr(address) if not _is_unique(address):
                claim = Claim(target.id, ClusterOp.OWN, address.path, address.address)
            case Wish(path):
                claim = Claim(target.id, ClusterOp.SUBSCRIBE, path, what=change.what)
            case _:
                return True
        return self._uplink.has(claim)

    def _check_blocks(self, changes: Iterable[Command]) -> None:
        """Check that unique addresses are of a block of this node (D3)."""
        for change in changes:
            if isinstance(change, OwnedAddr) and _is_unique(change.address):
                if not self._uplink.number:
                    text = "this agent has not heard of its cluster's master since it began"
                    raise MasterLost(text)
                if self._mirror.find_node(0, change.address.address) != self._uplink.number:
                    text = f"{change.address} is not of that node's block; let it choose"
                    raise Denied(text)

    def give_back(self, target: Endpoint, changes: Iterable[Command]) -> None:
        """Give up what was claimed, and was not put into effect."""
        now, uplink = self._clock(), self._uplink
        if target.id not in self._entered:
            return
        for change in changes:
            match change:
                case OwnedAddr(address) if not _is_unique(address):
                    uplink.release(target.id, address.path, address.address, now)
                case Wish(path, form) if form not in target.matches:
                    uplink.unsubscribe(target.id, path, change.what, now)
                case Grant() if GrantFlags.NOTICES not in target.flags:
                    self._watch_no_more(target)
                case _:
                    pass

    def receive_applied(self, target: Endpoint, changes: Iterable[Command]) -> None:
        """What commands took from an endpoint is in effect: the cluster's master may know."""
        now, uplink = self._clock(), self._uplink
        for change in changes:
            match change:
                case RevokeAddr(address) if not _is_unique(address):
                    uplink.release(target.id, address.path, address.address, now)
                case RevokeMatch(path, what):
                    uplink.unsubscribe(target.id, path, what, now)
                case Grant(flags) if GrantFlags.NOTICES not in flags:
                    self._watch_no_more(target)
                case _:
                    pass

    def receive_removed(self, endpoint: Endpoint) -> None:
        """An endpoint is gone, with all that it had."""
        if endpoint.id in self._entered:
            self._entered.discard(endpoint.id)
            self._uplink.exit(endpoint.id, self._clock())

    def receive_closed(self, bus: Bus) -> None:
        """No endpoint of this node is on the bus any more; the switch has forgotten it."""
        del self._buses[bus.cluster]
        for key in [key for key in self._wants if key[0] == bus.cluster]:
            del self._wants[key]
        self._watchers.pop(bus.cluster, None)

    def tell(self, bus: Bus, notice: Notice) -> None:
        """Tell the watchers of a bus on other nodes, behind what its subject has sent (D15)."""
        record = self._mirror.get_bus(bus.path)
        nodes = self._watchers.get(bus.cluster, set()) | {0 if record is None else record.node}
        data = codec.encode([bus.cluster, notice.encode()])
        for trunk in sorted(filter(None, map(self._away, nodes))):
            self._effects.append(Signal(trunk, data))

    # --- what happens ---

    def receive_uplink(self, effect: UplinkEffect) -> None:
        """Take what the uplink says; what is the shell's is not given here."""
        match effect:
            case Answered(result):
                self._tickets.answer(result.serial, result)
            case Changed(changes):
                self._receive_changes(changes)
            case Taken():
                self._receive_taken(effect)
            case Refuted(question, reason):
                self.standing.receive_refuted(question, reason)
            case BlockLost(block):
                self._lose_block(block)
            case Stated():
                if not self._is_checked:
                    self._check_buses()
                self.standing.receive_stated(self._buses.values())
            case Turned(is_here, text):
                log.log(logging.INFO if is_here else logging.WARNING, "%s", text)
                self._receive_turned(is_here, text)
            case _:
                pass

    def receive_lane(self, event: LaneEvent) -> None:
        """Take what has happened on a lane."""
        match event:
            case ("ready", trunk):
                self.peers.handle_ready(trunk)
            case ("choked", trunk):
                self.peers.handle_choked(trunk)
            case ("signal", trunk, data):
                self._receive_signal(trunk, data)
            case ("denied", number, address):
                self.standing.receive_denied(number, address)
            case ("source", trunk, address):
                text = "audit: node %d sent from %s, which is nobody's that the table knows of"
                log.warning(text, trunk, format_within(address))
            case ("unread", number, first, last, count, errno, address):
                subject = (address,) if address else ()
                about: dict[str, int | str]
                about = {"first": first, "last": last, "count": count, "errno": errno}
                reason = "nobody read it there"
                self._report(number, Notice(Event.UNREAD, subject, reason, about))
            case ("unknown", number, first, last, count, trunk):
                node = self._mirror.get_node(trunk)
                name = f"node {trunk}" if node is None else node.name
                detail: dict[str, int | str]
                detail = {"first": first, "last": last, "count": count, "node": name}
                reason = f"the link to {name} was lost, and what it had brought"
                self._report(number, Notice(Event.OUTCOME_UNKNOWN, (), reason, detail))

    def _receive_turned(self, is_here: bool, text: str) -> None:
        """The cluster's master is lost, or back: all that are on its buses may know (D16)."""
        event = Event.CLUSTER_BACK if is_here else Event.CLUSTER_LOST
        notice = Notice(event, (), text, {"cluster": self._uplink.cluster})
        for bus in self._buses.values():
            self._registry.announce(list(bus.endpoints.values()), notice)

    def describe(self) -> dict[str, object]:
        """Return what an endpoint may know of the cluster's state (D16)."""
        master = self._uplink.describe(self._clock())["master"]
        return {"cluster": master, "lost_nodes": self.peers.get_lost()}

    def _report(self, number: int, notice: Notice) -> None:
        """Tell a sender what became of its messages (D20, D21)."""
        if (sender := self._registry.find_endpoint(number)) is not None:
            self._registry.notify([sender], notice)

    def _receive_signal(self, trunk: int, data: bytes) -> None:
        """The other agent has told something behind its messages: a notice (D15)."""
        try:
            fields = Fields("signal", codec.decode(data))
            number, body = fields.take_int(1, U32_MAX), fields.take_bytes(1, INLINE_BYTES)
            fields.end()
            notice = Notice.decode(body)
        except RemoteProtocolError as error:
            self.peers.refuse(trunk, str(error))
            return
        bus = self._buses.get(number)
        if bus is None:
            return
        subject = self._find_told(bus, trunk, notice.subject)
        if subject and notice.event in _TOLD:
            told = replace(notice, subject=subject)
            self._registry.notify(self._registry.find_watchers(bus), told, trunk)
        else:
            text = "audit: node %d told %s of %s, which is not for it to tell"
            shown = ", ".join(map(format_within, notice.subject)) or "nobody"
            log.warning(text, trunk, notice.event.name, shown)

    def _find_told(self, bus: Bus, trunk: int, subject: Iterable[bytes]) -> tuple[bytes, ...]:
        """Return the addresses of which a node may tell: those that no other node has (D6).

        Unique addresses are its own or not. A name that its endpoint had may have an owner on
        another node already, of whom it tells nothing.
        """
        told = []
        for address in subject:
            node = self._mirror.find_node(bus.cluster, address)
            if node == trunk or (node is None and split_unique(address) is None):
                told.append(address)
            elif split_unique(address) is not None:
                return ()
        return tuple(told)

    def awaits(self, name: str) -> bool:
        """Tell whether a node owes the answer to a command."""
        return bool(self._asked.get(name))

    def peer_opened(self, name: str) -> None:
        """Ask again what has no answer yet."""
        for frame in list(self._asked.get(name, {}).values()):
            self.peers.send(name, frame)

    def peer_lost(self, name: str, text: str) -> None:
        """A node cannot be reached: whoever waits for it is told (D16)."""
        self._refuse_asked(name, NodeLost(f"node {name} is lost: {text}"))
        self._tell_all(Notice(Event.NODE_LOST, (), text, {"node": name}))

    def _refuse_asked(self, name: str, error: BusError) -> None:
        for serial in list(self._asked.pop(name, {})):
            self._tickets.answer((name, serial), Result.refused(serial, error))

    def peer_found(self, name: str) -> None:
        """A node that was lost is back."""
        self._tell_all(Notice(Event.NODE_BACK, (), "it can be reached again", {"node": name}))

    def peer_received(self, name: str, frame: PeerFrame) -> None:
        """A frame of another node has come."""
        match frame:
            case PeerCommand():
                self._receive_command(name, frame)
            case Result(serial):
                if self._asked.get(name, {}).pop(serial, None) is not None:
                    self._tickets.answer((name, serial), frame)
            case _:
                log.warning("node %s: %s is not for this node", name, type(frame).__name__)

    # --- inside ---

    def _is_here(self, endpoint: Endpoint) -> bool:
        return self._registry.endpoints.get(endpoint.id) is endpoint

    def _enter(self, endpoint: Endpoint) -> Steps:
        """Let the cluster's master know an endpoint, once."""
        if endpoint.id not in self._entered:
            uid = endpoint.credentials.uid
            demand((yield self._uplink.enter(endpoint.id, uid, self._clock())))
            self._entered.add(endpoint.id)
            if not self._is_here(endpoint):
                self.receive_removed(endpoint)
                raise NoSuchEndpoint(f"endpoint {endpoint.id} is gone")
        return None

    def _claim(self, target: Endpoint, change: Command) -> int | None:
        """Ask for what a command gives; None if nobody must be asked."""
        now, uplink = self._clock(), self._uplink
        match change:
            case OwnedAddr(address) if not _is_unique(address):
                flags = NameFlags.DO_NOT_QUEUE
                return uplink.own(target.id, address.path, address.address, flags, now)
            case Wish(path):
                return uplink.subscribe(target.id, path, change.what, now)
        return None

    def _watch(self, target: Endpoint) -> int:
        """Let all nodes tell this one who comes and goes; it counts as receiving that topic."""
        assert target.bus is not None
        return self._uplink.subscribe(target.id, target.bus.path, WATCH, self._clock())

    def _watch_no_more(self, target: Endpoint) -> None:
        if target.id in self._entered and target.bus is not None:
            self._uplink.unsubscribe(target.id, target.bus.path, WATCH, self._clock())

    def _adopt(self, endpoint: Endpoint, bus: Bus) -> None:
        """Claim what an endpoint had in a former life of the agent; `Taken` tells what it lost."""
        number, adopt = endpoint.id, self._uplink.adopt
        self._entered.add(number)
        proven = {"principal": endpoint.principal} if endpoint.principal else {}
        adopt(Claim(number, ClusterOp.ENTER), uid=endpoint.credentials.uid, **proven)
        if endpoint.is_master:
            claim = Claim(number, ClusterOp.BIND, bus.path)
            adopt(claim, address=bus.master_address, width=bus.width, order=bus.order)
        for name in endpoint.addresses:
            is_bound = endpoint.is_master and name == bus.master_address
            if split_unique(name) is None and not is_bound:
                claim = Claim(number, ClusterOp.OWN, bus.path, name)
                adopt(claim, flags=int(NameFlags.DO_NOT_QUEUE))
        for form in endpoint.matches:
            adopt(Claim(number, ClusterOp.SUBSCRIBE, bus.path, what=what_of(form)))
        if GrantFlags.NOTICES in endpoint.flags:
            adopt(Claim(number, ClusterOp.SUBSCRIBE, bus.path, what=WATCH))

    def _receive_command(self, name: str, frame: PeerCommand) -> None:
        known = self._commands.setdefault(name, _Commands())
        if (result := known.results.get(frame.serial)) is not None:
            self.peers.send(name, result)
        elif frame.serial not in known.running:
            known.running.add(frame.serial)
            self._tickets.run(
                self._carry_out(name, frame), lambda outcome: self._reply(name, frame, outcome)
            )

    def _carry_out(self, name: str, frame: PeerCommand) -> Steps:
        record = self._mirror.get_bus(frame.path)
        node = None if record is None else self._mirror.get_node(record.node)
        if record is None or node is None or node.name != name:
            raise Denied(f"the master of {escape(frame.path)} is not on node {name}")
        if record.generation != frame.generation:
            raise Denied(f"a command of generation {frame.generation}, not {record.generation}")
        bus = self._buses.get(record.number)
        if bus is None:
            raise NoSuchEndpoint(f"nobody here is on {escape(frame.path)}")
        return (yield from self._control.carry_out_for(bus, frame.dst, frame.items))

    def _reply(self, name: str, frame: PeerCommand, outcome: object) -> None:
        if isinstance(outcome, BusError):
            result = Result.refused(frame.serial, outcome)
        else:
            result = Result(frame.serial, value=outcome)
        known = self._commands.get(name)
        if known is None:
            # The node is no longer in the cluster: there is nobody to be answered.
            return
        known.running.discard(frame.serial)
        known.results[frame.serial] = result
        if len(known.results) > RESULTS:
            known.results.popitem(last=False)
        self.peers.send(name, result)

    def _receive_taken(self, taken: Taken) -> None:
        """The cluster's master has taken something back (D15)."""
        claim, registry = taken.claim, self._registry
        endpoint = registry.find_endpoint(claim.endpoint)
        log.warning("%s of endpoint %d was taken: %s", claim.op.name, claim.endpoint, taken.reason)
        if endpoint is None or endpoint.bus is None:
            return
        if claim.op in (ClusterOp.ENTER, ClusterOp.BIND):
            self._entered.discard(endpoint.id)
            self.evict(endpoint, taken.reason)
        elif claim.op is ClusterOp.OWN and claim.name in endpoint.addresses:
            registry.disown(endpoint, claim.name)
            registry.announce([endpoint], Notice(Event.REVOKED, (claim.name,), taken.reason))
        elif claim.op is ClusterOp.SUBSCRIBE and form_of(claim.what) in endpoint.matches:
            registry.unsubscribe(endpoint, form_of(claim.what))
            detail: dict[str, int | str] = {"match": format_what(claim.what)}
            registry.announce([endpoint], Notice(Event.REVOKED, (), taken.reason, detail))
        is_watch = claim.op is ClusterOp.SUBSCRIBE and claim.what == WATCH
        if is_watch and GrantFlags.NOTICES in endpoint.flags:
            # Whoever may not hear of that topic hears no notices of others either.
            self.standing.take_flag(endpoint, GrantFlags.NOTICES, taken.reason)

    def _lose_block(self, block: int) -> None:
        """Addresses of a block that is not leased to this node any more lead nowhere (D3)."""
        for bus in list(self._buses.values()):
            for endpoint in list(bus.endpoints.values()):
                owned = [split_unique(address) for address in endpoint.addresses]
                if any(unique is not None and unique[0] == block for unique in owned):
                    text = f"block {block} of addresses is not this node's any more"
                    self.evict(endpoint, text)

    # --- the table ---

    def _receive_changes(self, changes: Sequence[Change]) -> None:
        """Follow the mirror: first nodes that are new, then the rest, then nodes that are gone."""
        self._follow_nodes(changes)
        for old, new in changes:
            match new or old:
                case LeaseRecord():
                    self._follow_lease(old, new)
                case BusRecord():
                    self._follow_bus(old, new)
                case OwnerRecord():
                    self._follow_owner(old, new)
                case MatchRecord():
                    self._follow_match(old, new)
                case _:
                    pass
        if any(isinstance(new, FactRecord) for _, new in changes):
            self.standing.review(list(self._buses.values()))
        self._part_from_nodes(changes)

    def _part_from_nodes(self, changes: Sequence[Change]) -> None:
        """Forget nodes that are gone, or are others now."""
        for old, new in changes:
            if not isinstance(old, NodeRecord):
                continue
            if old.name == self._node:
                if old.number != self._uplink.number:
                    # What this node was before it joined anew: it was known as another one.
                    self.peers.drop_node(old.name)
            elif new is None:
                self.peers.drop_node(old.name)
                self._forget_node(old.name, f"node {old.name} is no longer in the cluster")
            elif isinstance(new, NodeRecord) and new.number != old.number:
                self._forget_node(old.name, f"node {old.name} has joined the cluster anew")

    def _forget_node(self, name: str, text: str) -> None:
        """Nobody is on a node any more who was: all its addresses were of its number."""
        self._commands.pop(name, None)
        self._refuse_asked(name, NoSuchEndpoint(text))
        gone: dict[str, int | str] = {"node": name, "gone": 1}
        self._tell_all(Notice(Event.NODE_LOST, (), text, gone))

    def _follow_nodes(self, changes: Sequence[Change]) -> None:
        own = self._uplink.number
        passed: set[int] = set()
        taken = {own, *(new.number for _, new in changes if isinstance(new, NodeRecord))}
        for old, new in changes:
            if not isinstance(old, NodeRecord) or old.number == own:
                continue
            # One that goes by the name of this node is what it was before it joined anew.
            is_other = isinstance(new, NodeRecord) and new.number != old.number
            if is_other or (new is None and old.number in taken):
                # Another may have its number now: the master was put back from a copy.
                self.peers.drop_node(old.name)
                passed.add(old.number)
        for key in [key for key in self._wants if key[1] in passed]:
            # The switch has forgotten all that led there.
            del self._wants[key]
        for change in changes:
            if isinstance(change.new, NodeRecord) and change.new.number != own:
                self.peers.set_node(change.new)
                if _is_missed(change) and self._has_watchers():
                    self.peers.look_for(change.new.name)
        if passed & taken:
            self._lead_to(passed & taken)

    def _lead_to(self, nodes: set[int]) -> None:
        """Lead to nodes with the numbers of others: what both have in the table is no change."""
        for lease in self._mirror.get_leases():
            if lease.node in nodes:
                self._port.route_block(lease.block, self._away(lease.node))
        for bus in self._buses.values():
            record = self._mirror.find_bus(bus.cluster)
            if record is not None and record.node in nodes:
                self._set_master(bus, record)
            for owner in self._mirror.get_owners(bus.cluster):
                if owner.node in nodes:
                    self._port.route(bus.id, owner.address, self._away(owner.node))
            for match in self._mirror.get_matches(bus.cluster):
                if match.node in nodes:
                    self._want(bus, match, is_wanted=True)

    def _has_watchers(self) -> bool:
        """Tell whether anybody here reads of nodes that are lost."""
        return any(self._registry.find_watchers(bus) for bus in self._buses.values())

    def _check_buses(self) -> None:
        """Once, when the first table is as new as it is: a bus that is not in it is no bus."""
        self._is_checked = True
        for bus in list(self._buses.values()):
            record = self._mirror.get_bus(bus.path)
            if record is None or record.number != bus.cluster:
                for endpoint in list(bus.endpoints.values()):
                    self.evict(endpoint, f"{escape(bus.path)} is no bus of the cluster any more")

    def _away(self, node: int) -> int | None:
        """Return the trunk of a node, None for this one and for none."""
        return None if node in (0, self._uplink.number) else node

    def _follow_lease(self, old: object, new: object) -> None:
        if isinstance(new, LeaseRecord):
            self._port.route_block(new.block, self._away(new.node))
        elif isinstance(old, LeaseRecord):
            self._port.unroute_block(old.block)

    def _follow_owner(self, old: object, new: object) -> None:
        one = new or old
        assert isinstance(one, OwnerRecord)
        if (bus := self._buses.get(one.bus)) is not None:
            node = new.node if isinstance(new, OwnerRecord) else 0
            self._port.route(bus.id, one.address, self._away(node))
            if not node and bus.master is not None:
                # Maybe at its own command, maybe not: it can find out.
                freed = Notice(Event.FREED, (one.address,), "nobody owns it in the cluster")
                self._registry.announce([bus.master], freed)

    def _follow_match(self, old: object, new: object) -> None:
        for one in (old, new):
            if isinstance(one, MatchRecord) and (bus := self._buses.get(one.bus)) is not None:
                self._want(bus, one, is_wanted=one is new)

    def _want(self, bus: Bus, record: MatchRecord, *, is_wanted: bool) -> None:
        trunk = self._away(record.node)
        if trunk is None:
            return
        if record.what == WATCH:
            nodes = self._watchers.setdefault(record.bus, set())
            (nodes.add if is_wanted else nodes.discard)(record.node)
            return
        key = (record.bus, record.node, record.what)
        if not is_wanted:
            if (number := self._wants.pop(key, None)) is not None:
                self._port.trunk_unsubscribe(trunk, bus.id, number)
        elif key not in self._wants:
            self._wants[key] = self._next_want
            self._port.trunk_subscribe(trunk, bus.id, self._next_want, *forms_of(record.what))
            self._next_want += 1

    def _follow_bus(self, old: object, new: object) -> None:
        one = new or old
        assert isinstance(one, BusRecord)
        bus = self._buses.get(one.number)
        if bus is None:
            return
        now_on = new.node if isinstance(new, BusRecord) else 0
        was_on = old.node if isinstance(old, BusRecord) else 0
        self._set_master(bus, new if isinstance(new, BusRecord) else None)
        if was_on == now_on or not self._is_checked:
            # What a former life of the agent has seen is no news.
            return
        others = [endpoint for endpoint in bus.endpoints.values() if not endpoint.is_master]
        subject = (bus.master_address,)
        if now_on:
            self._registry.announce(others, Notice(Event.MASTER_BACK, subject, "it was bound"))
        elif was_on != self._uplink.number:
            self._registry.announce(others, Notice(Event.MASTER_LOST, subject, "it is gone"))

    def _set_master(self, bus: Bus, record: BusRecord | None) -> None:
        trunk = None if record is None else self._away(record.node)
        address = b"" if record is None or record.address is None else record.address
        bus.is_served = trunk is not None
        if address:
            bus.master_address = address
        self._port.set_master_away(bus.id, trunk, address)

    def _open(self, record: BusRecord) -> Bus:
        """Know a bus of the cluster here, and lead to all that is elsewhere."""
        if (bus := self._buses.get(record.number)) is not None:
            return bus
        bus = self._registry.add_bus(
            record.path,
            record.width,
            record.order,
            record.key,
            0,
            record.address or b"",
            cluster=record.number,
        )
        self._buses[record.number] = bus
        self._set_master(bus, record)
        for owner in self._mirror.get_owners(record.number):
            if (trunk := self._away(owner.node)) is not None:
                self._port.route(bus.id, owner.address, trunk)
        for match in self._mirror.get_matches(record.number):
            self._want(bus, match, is_wanted=True)
        return bus

    def _tell_all(self, notice: Notice) -> None:
        for bus in self._buses.values():
            self._registry.announce(self._registry.find_watchers(bus), notice)


def _is_missed(change: Change) -> bool:
    """Tell whether the cluster's master has lost a node that it had before."""
    old, new = change
    states = [one.state for one in (old, new) if isinstance(one, NodeRecord)]
    return states == [NodeState.LIVE, NodeState.LOST]


def _is_unique(address: BusAddress) -> bool:
    return split_unique(address.address) is not None


def _check_outcome(change: Command, value: object) -> None:
    """Look at what the master says of a claim that it has heard."""
    if isinstance(change, OwnedAddr) and answer.take_outcome(value) in _NOT_OWNED:
        name = format_within(change.address.address)
        raise AddressInUse(f"{name} has an owner on another node")
