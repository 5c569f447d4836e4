"""Links to the other nodes of the cluster, and the lanes over them.

A link to a node is opened when there is something for it, kept while it is used, and closed when
nothing was said for a while. Two nodes have one link at a time: of two that were dialed at once,
that of the node with the smaller name stays. Where no place of a node answers, the link goes by way
of the master (`relay.py`), and places are tried again now and then.

    no link  --want-->  dialing  --Up-->  greeting  --HELLO of the peer-->  open  --> idle, no link
                          |  all places failed: again after a pause; too long: lost

The lane is the switch's (`trunk.rs`): here its batches of records are moved, and what HELLO says
of records that a former link brought or lost is told to the switch. Frames of `proto/peer.py` go
beside it, and are the owner's business; what is under way when a link ends is gone, so the owner
says it again when `peer_opened` tells of the next link.

Everything runs in the task of the carrier; nothing here waits.

Invariants:

1. A record of the peer's lane is given to the switch only after the HELLO that names this lane.
2. A batch that was taken from the switch is sent, or its records come again after `rewind`.
3. There is at most one open link a peer; a link that is replaced is closed with that reason.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeGuard

from ..link.dialer import Waits, is_kept, shorten
from ..link.effect import (
    BodyEnded,
    BodyOpened,
    BodyReceived,
    BodyRoom,
    Down,
    Heard,
    Message,
    Room,
    Silent,
)
from ..link.frame import Channel
from ..link.identity import Identity, Role
from ..link.link import Link
from ..link.reason import Reason
from ..proto import peer as language
from ..proto.errors import IdentityError, LinkError, RemoteProtocolError
from ..proto.peer import (
    LANE_BYTES,
    PEER_VERSION,
    BodyRefused,
    BodySent,
    BodyTaken,
    PeerHello,
)
from .bodies import Bodies, BodyLink, BodyPort

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from ..link.carrier import Carrier, Timer
    from ..link.effect import Event
    from ..link.link import Sink
    from ..proto.peer import PeerFrame
    from ..proto.record import NodeRecord

log = logging.getLogger("afbus.node")

#: Destinations of the link's data channel: HELLO stands before the first batch of its lane.
BATCHES: Final = 0
GREETING: Final = 1
#: Destination of all frames on the control channel.
FRAMES: Final = 0
#: The largest batch: enough records that the cost of a batch is small beside theirs, and few
#: enough that a urgent frame does not wait long behind it.
BATCH_BYTES: Final = 64 * 1024
#: Batches taken in one turn, so that one busy lane leaves time for the others.
BATCHES_PER_TURN: Final = 16


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take, in seconds.

    Attributes:
        idle_s: A link on which nothing was said for this time is closed.
        lost_s: A peer that cannot be reached for this time is lost: who waits for it is told. It
            counts from the first try, or from when its link fell silent.
        missed_s: For so long the cluster's master has missed a node before the table says so.
        waits: Between two rounds of tries. They are those of `Dialer`, which cannot stand here:
            it keeps links up that nobody needs, and calls nobody whose link is silent.
    """

    idle_s: float = 60.0
    lost_s: float = 10.0
    missed_s: float = 5.0
    waits: Waits = field(default_factory=Waits)
    #: Between two tries to reach a node whose link goes by way of the master.
    direct_s: float = 10.0


class Way(BodyLink, Protocol):
    """What this module needs of a link: `link.Link`, or `relay.RelayedLink`."""

    @property
    def peer(self) -> Identity:
        """Who is there."""

    @property
    def is_down(self) -> bool:
        """Whether it has ended."""

    @property
    def is_silent(self) -> bool:
        """Whether the peer does not confirm that it lives."""

    def send(self, channel: Channel, destination: int, data: bytes) -> bool:
        """Send, if there is room; if not, `Room` follows."""

    def release(self, channel: Channel, destination: int, cost: int) -> None:
        """Give credit back."""

    def close(self, reason: Reason, text: str) -> None:
        """End it."""


class LanePort(BodyPort, Protocol):
    """The calls of `_datapath.Switch` for lanes; a trunk bears the number of its node."""

    def trunk_add(self, trunk: int, node: str) -> None:
        """Know a node; nothing was sent to it or came from it."""

    def trunk_carries_bodies(self, trunk: int) -> None:
        """Ask for large bodies to be carried, by "body" events."""

    def trunk_remove(self, trunk: int) -> None:
        """Forget a node, and tell senders what is unknown."""

    def trunk_restart(self, trunk: int) -> None:
        """Begin to count anew: what was sent and not confirmed is told as unknown (D21)."""

    def trunk_hear(self, trunk: int, is_anew: bool) -> None:
        """The peer begins to count anew; if it `is_anew` itself, nobody there is to be told."""

    def trunk_rewind(self, trunk: int, received: int) -> None:
        """Send again what is behind record `received`. ValueError: it was never sent."""

    def trunk_received(self, trunk: int) -> int:
        """Return the last record that came, 0 for none."""

    def trunk_set_down(self, trunk: int, is_down: bool) -> None:
        """Whether senders are told EHOSTDOWN instead of waiting."""

    def trunk_is_idle(self, trunk: int) -> bool:
        """Whether nothing is to be sent or confirmed, and nobody waits for credit."""

    def trunk_stats(self, trunk: int) -> dict[str, int]:
        """Return counters of a trunk."""

    def take_batch(self, trunk: int, max_bytes: int) -> bytes:
        """Return the next records to send, nothing if there are none now."""

    def inject(self, trunk: int, batch: bytes) -> None:
        """Take records of the peer. ValueError names the rule that they break."""


class Owner(Protocol):
    """Who is told of peers."""

    def awaits(self, name: str) -> bool:
        """Whether the peer owes an answer: then a link to it is wanted."""

    def peer_opened(self, name: str) -> None:
        """Frames can be sent; what was sent by an earlier link and not answered may be lost."""

    def peer_received(self, name: str, frame: PeerFrame) -> None:
        """A frame has come."""

    def peer_lost(self, name: str, text: str) -> None:
        """The peer could not be reached for too long; it is tried on."""

    def peer_found(self, name: str) -> None:
        """The peer was lost, and is reached again."""


@dataclass(slots=True, eq=False)
class _Peer:
    """One other node."""

    record: NodeRecord
    #: What this node sends to it bears this name.
    lane: bytes
    #: The lane of what it sends, None before its first HELLO.
    heard: bytes | None = None
    #: The life that it began that lane in, None if nobody knows: by way of the master none is told.
    boot: bytes | None = None
    #: Whether anything was ever sent on `lane`.
    has_sent: bool = False
    link: Way | None = None
    is_open: bool = False
    #: A batch that the link had no room for.
    held: bytes = b""
    #: The carrier of the link moves batches by itself; how many bytes when that was looked at.
    is_carried: bool = False
    carried_bytes: int = 0
    #: Whether the owner asked for a link since the last one was open.
    is_wanted: bool = False
    is_dialing: bool = False
    #: Attempts that failed in a row: places that did not answer, links that ended at once.
    tries: int = 0
    opened_at: float = 0.0
    timer: Timer | None = None
    failing_since: float | None = None
    #: Why it was not reached the last time, and when it is lost if that goes on.
    failure: str = "no answer"
    loss: Timer | None = None
    is_lost: bool = False
    used_at: float = 0.0


class Peers:
    """All other nodes, and the links to them."""

    def __init__(  # noqa: PLR0913 (what a node consists of)
        self,
        carrier: Carrier,
        own: Identity,
        port: LanePort,
        owner: Owner,
        random: Random,
        draw: Callable[[int], bytes],
        find: Callable[[str], Any],
        patience: Patience | None = None,
    ) -> None:
        """Begin without peers.

        Args:
            carrier: Dials and accepts; its `accept` hands links of nodes to `accept` here.
            own: Who this node is.
            port: The switch.
            owner: Who is told.
            random: For the spread of pauses.
            draw: Returns so many random bytes that nobody can guess.
            find: Returns the carrier's address of a place (`host:port`). LinkError: it has none.
            patience: By default as above.
        """
        self._carrier = carrier
        self._port = port
        self._owner = owner
        self._random = random
        self._draw = draw
        self._find = find
        self._patience = patience or Patience()
        self._own = own
        #: Begins a link to a node, by its number, by way of the master; tells whether there is one.
        self.go_round: Callable[[int], bool] = lambda _: False
        self._bodies = Bodies(port, self._send_to)
        self._is_closed = False
        self._peers: dict[str, _Peer] = {}
        self._numbers: dict[int, _Peer] = {}

    # --- what the owner asks ---

    def set_node(self, record: NodeRecord) -> None:
        """Know a node, or know it better: its places. Its number never changes."""
        peer = self._peers.get(record.name)
        if peer is not None and peer.record.number == record.number:
            former, peer.record = peer.record, record
            if former.places != record.places:
                peer.tries = 0
            if former.boot != record.boot and peer.link is not None:
                self._leave_former(peer, peer.link, former.boot)
            return
        if peer is not None:
            self.drop_node(record.name)
        peer = _Peer(record, self._draw(LANE_BYTES), used_at=self._carrier.now())
        self._peers[record.name] = peer
        self._numbers[record.number] = peer
        self._port.trunk_add(record.number, record.name)
        self._port.trunk_carries_bodies(record.number)

    def _carry(self, peer: _Peer) -> None:
        """Let batches be moved by the carrier, if it can do that by itself."""
        link = peer.link
        if isinstance(link, Link) and not peer.held:
            peer.is_carried = link.carry(
                self._port, peer.record.number, lambda rule: self._break(peer, link, rule)
            )
            peer.carried_bytes = link.carried_bytes
        self._pump(peer)

    def _uncarry(self, peer: _Peer) -> None:
        """Batches are moved here again; from now on the carrier takes none from the switch."""
        if peer.is_carried and isinstance(peer.link, Link):
            peer.has_sent |= peer.link.uncarry()
        peer.is_carried = False

    def _break(self, peer: _Peer, link: Way, rule: str) -> None:
        """Records or frames of a peer break a rule."""
        log.warning("link to %s: %s", peer.record.name, rule)
        link.close(Reason.MALFORMED, rule)

    def _leave_former(self, peer: _Peer, link: Way, boot: bytes) -> None:
        """A life of a node is over, says the table: wait for no sign of it on the link to it."""
        if not isinstance(link, Link) or link.boot != boot:
            return
        self._restart(peer)
        # What the link says from here on is nobody's business.
        peer.link, peer.is_open, peer.tries = None, False, 0
        self._bodies.end(peer.record.number)
        link.close(Reason.REPLACED, "the node has begun anew")
        self._retry(peer)

    def drop_node(self, name: str) -> None:
        """Forget a node that left the cluster, and close its link; harmless when repeated."""
        peer = self._peers.pop(name, None)
        if peer is None:
            return
        del self._numbers[peer.record.number]
        self._stop_timer(peer)
        self._end_failing(peer)
        if peer.link is not None:
            peer.link.close(Reason.NOT_ADMITTED, "the node is no longer in the cluster")
        self._bodies.forget(peer.record.number)
        self._port.trunk_remove(peer.record.number)

    def want(self, name: str) -> None:
        """Open a link to a node, if there is none."""
        peer = self._peers[name]
        peer.is_wanted = not peer.is_open
        if peer.link is None and not peer.is_dialing and peer.timer is None:
            self._begin_failing(peer, self._carrier.now())
            self._dial(peer)

    def look_for(self, name: str) -> None:
        """The cluster's master misses a node: find out whether it can be reached from here."""
        peer = self._peers[name]
        if peer.link is None and not peer.is_lost:
            self._begin_failing(peer, self._carrier.now() - self._patience.missed_s)
            self.want(name)

    def is_open(self, name: str) -> bool:
        """Tell whether frames can be sent to a node."""
        peer = self._peers.get(name)
        return peer is not None and peer.is_open

    def send(self, name: str, frame: PeerFrame) -> bool:
        """Send a frame; returns whether it went out.

        If not, there is no link, or it takes no more now: then one is opened or closed and opened,
        and `peer_opened` says when to send all again that has no answer.
        """
        peer = self._peers[name]
        if not peer.is_open or peer.link is None:
            self.want(name)
            return False
        peer.used_at = self._carrier.now()
        if peer.link.send(Channel.CONTROL, FRAMES, language.encode(frame)):
            return True
        peer.link.close(Reason.LIMIT, "the peer does not read its frames")
        return False

    def handle_ready(self, number: int) -> None:
        """The switch has records for a node, maybe."""
        peer = self._numbers.get(number)
        if peer is None:
            return
        if peer.is_open:
            self._pump(peer)
        elif not self._port.trunk_is_idle(number):
            self.want(peer.record.name)

    def handle_body(self, number: int, ticket: int, size: int) -> None:
        """The switch wants a large body carried to a node."""
        peer = self._numbers.get(number)
        if peer is None:
            return
        self._bodies.want(number, ticket, size)
        if not peer.is_open:
            self.want(peer.record.name)

    def refuse(self, number: int, rule: str) -> None:
        """What a node has said by its lane breaks a rule: the link to it ends."""
        peer = self._numbers.get(number)
        if peer is not None and peer.link is not None:
            log.warning("link to %s: %s", peer.record.name, rule)
            peer.link.close(Reason.MALFORMED, rule)

    def handle_choked(self, number: int) -> None:
        """The peer has not confirmed what it must be told: the lane has to begin anew."""
        peer = self._numbers.get(number)
        if peer is None:
            return
        self._restart(peer)
        if peer.link is not None:
            peer.link.close(Reason.LIMIT, "the peer confirms nothing")

    def _send_to(self, number: int, frame: PeerFrame) -> None:
        peer = self._numbers.get(number)
        if peer is not None:
            self.send(peer.record.name, frame)

    def describe(self) -> list[dict[str, Any]]:
        """Return what people want to know of each peer, JSON-able, by name."""
        return [
            {
                "node": name,
                "link": _state_of(peer),
                "places": list(peer.record.places),
                **self._port.trunk_stats(peer.record.number),
            }
            for name, peer in sorted(self._peers.items())
        ]

    def is_lost(self, name: str) -> bool:
        """Tell whether a node could not be reached for too long; it is tried on."""
        peer = self._peers.get(name)
        return peer is not None and peer.is_lost

    def get_lost(self) -> list[str]:
        """Return the names of the nodes that are lost."""
        return sorted(name for name, peer in self._peers.items() if peer.is_lost)

    def close_idle(self) -> None:
        """Close links that nobody has used for a while; to be called now and then."""
        limit = self._carrier.now() - self._patience.idle_s
        for peer in self._peers.values():
            self._look_at_carried(peer)
            is_idle = peer.used_at <= limit and not self._is_needed(peer)
            if peer.is_open and peer.link is not None and is_idle:
                peer.link.close(Reason.CLOSED, "idle")

    def _look_at_carried(self, peer: _Peer) -> None:
        """A link of which the carrier moves the batches is used by those as well."""
        if peer.is_carried and isinstance(peer.link, Link):
            moved = peer.link.carried_bytes
            if moved != peer.carried_bytes:
                peer.carried_bytes, peer.used_at = moved, self._carrier.now()

    def close(self) -> None:
        """Close all links in good order, and try none again; the nodes stay known."""
        self._is_closed = True
        for peer in self._peers.values():
            self._stop_timer(peer)
            self._end_failing(peer)
            peer.is_dialing = True
            if peer.link is not None:
                peer.link.close(Reason.GOING_DOWN, "the node goes down")

    # --- links come and go ---

    def accept(self, link: Way) -> Sink:
        """Take a link to a node, begun by either."""
        name = link.peer.name
        peer = self._peers.get(name)
        if peer is None:
            # It may know of us before we know of it; then it tries again.
            link.close(Reason.CLOSED, "this node does not know you yet")
            return _ignore
        old = peer.link
        if old is not None and not old.is_down:
            if not self._is_better(link, old):
                link.close(Reason.REPLACED, "there is a link already")
                return _ignore
            old.close(Reason.REPLACED, "a newer link takes its place")
        self._stop_timer(peer)
        self._uncarry(peer)
        self._bodies.end(peer.record.number)
        peer.link, peer.is_open, peer.held = link, False, b""
        peer.used_at = self._carrier.now()
        self._greet(peer)
        return lambda event: self._handle(peer, link, event)

    def _is_better(self, new: Way, old: Way) -> bool:
        """Tell whether a new link takes the place of an old one; both ends decide alike."""
        if isinstance(new, Link) and isinstance(old, Link):
            return is_kept(self._own, new, old)
        # A direct one is better, but for one that is silent.
        return isinstance(new, Link) or old.is_silent

    def _greet(self, peer: _Peer) -> None:
        received = 0
        if peer.heard is not None:
            received = self._port.trunk_received(peer.record.number)
        hello = PeerHello(peer.lane, peer.heard, received)
        assert peer.link is not None
        if not peer.link.send(Channel.DATA, GREETING, language.encode(hello)):
            peer.link.close(Reason.LIMIT, "the peer does not read")

    def _handle(self, peer: _Peer, link: Way, event: Event) -> None:
        """Take an event of a link; one that was replaced says nothing any more."""
        is_current = peer.link is link
        match event:
            case Message(channel, destination, data, cost):
                if is_current:
                    try:
                        self._receive(peer, channel, destination, data)
                    except (RemoteProtocolError, ValueError) as error:
                        self._break(peer, link, str(error))
                # Also behind its end: what a relayed link has taken is credit of the master's link.
                link.release(channel, destination, cost)
            case BodyOpened() | BodyReceived() | BodyEnded() | BodyRoom() if is_current:
                self._bodies.receive_event(peer.record.number, event)
            case Room() if is_current:
                self._pump(peer)
            case Silent() if is_current:
                # It may have begun anew, and does not know this link; if not, this link goes on.
                peer.is_wanted = True
                peer.failure = "silence"
                self._begin_failing(peer, self._carrier.now())
                self._retry(peer)
            case Heard() if is_current:
                self._end_failing(peer)
                if not peer.is_dialing:
                    peer.is_wanted = False
                    self._stop_timer(peer)
            case Down() if is_current:
                self._handle_down(peer, event)
            case _:
                pass

    def _receive(self, peer: _Peer, channel: Channel, destination: int, data: bytes) -> None:
        peer.used_at = self._carrier.now()
        number = peer.record.number
        if channel is Channel.DATA and destination == BATCHES:
            if not peer.is_open:
                raise RemoteProtocolError("records before HELLO")
            # What the peer must be told soon, the switch says; the rest can wait for a batch.
            self._port.inject(number, data)
            return
        frame = language.decode(data)
        if channel is Channel.DATA and destination == GREETING and isinstance(frame, PeerHello):
            self._receive_hello(peer, frame)
        elif channel is Channel.CONTROL and destination == FRAMES and _is_of_body(frame):
            self._bodies.receive_frame(peer.record.number, frame)
        elif channel is Channel.CONTROL and destination == FRAMES and not _is_hello(frame):
            # Control has a stream of its own, so a frame may come before the HELLO of the lane.
            self._owner.peer_received(peer.record.name, frame)
        else:
            raise RemoteProtocolError(f"{type(frame).__name__} on {channel.name} {destination}")

    def _receive_hello(self, peer: _Peer, hello: PeerHello) -> None:
        if hello.version != PEER_VERSION:
            raise RemoteProtocolError(f"version {hello.version}, this node speaks {PEER_VERSION}")
        number = peer.record.number
        self._uncarry(peer)
        if hello.lane != peer.heard:
            boot = peer.link.boot if isinstance(peer.link, Link) else None
            self._port.trunk_hear(number, is_anew=boot is None or boot != peer.boot)
            self._bodies.hear(number)
            peer.heard, peer.boot = hello.lane, boot
            if peer.is_open:
                # The peer has begun anew on this very link, and waits for our HELLO.
                self._greet(peer)
        if hello.heard == peer.lane:
            self._port.trunk_rewind(number, hello.received)
        elif peer.has_sent:
            # The peer has forgotten this lane, or has heard another since.
            self._restart(peer)
            self._greet(peer)
        else:
            # Nothing was sent on this lane; what was told of the other one may be lost.
            self._port.trunk_rewind(number, 0)
        is_news = not peer.is_open
        peer.is_open, peer.is_wanted = True, False
        self._end_failing(peer)
        if peer.is_lost:
            peer.is_lost = False
            self._port.trunk_set_down(number, False)
            self._owner.peer_found(peer.record.name)
        if is_news:
            peer.opened_at = self._carrier.now()
            log.info("link to %s is open", peer.record.name)
            assert peer.link is not None
            self._bodies.begin(number, peer.link)
            self._owner.peer_opened(peer.record.name)
        self._carry(peer)

    def _restart(self, peer: _Peer) -> None:
        self._uncarry(peer)
        self._port.trunk_restart(peer.record.number)
        peer.lane, peer.has_sent, peer.held = self._draw(LANE_BYTES), False, b""

    def _pump(self, peer: _Peer) -> None:
        """Send batches while the switch has some and the link takes them."""
        link, number = peer.link, peer.record.number
        if not peer.is_open or link is None or not link.is_up or peer.is_carried:
            return
        for _ in range(BATCHES_PER_TURN):
            batch = peer.held or self._port.take_batch(number, BATCH_BYTES)
            if not batch:
                return
            peer.has_sent, peer.used_at = True, self._carrier.now()
            peer.held = b"" if link.send(Channel.DATA, BATCHES, batch) else batch
            if peer.held:
                # `Room` says when it can go.
                return
        self._carrier.call_at(self._carrier.now(), lambda: self._pump(peer))

    def _handle_down(self, peer: _Peer, down: Down) -> None:
        log.info("link to %s has ended: %s", peer.record.name, down)
        has_lasted = self._carrier.now() - peer.opened_at >= self._patience.waits.longest_s
        # A link that ends as soon as it is there is no better than one that never was.
        peer.tries = 0 if peer.is_open and has_lasted else peer.tries + 1
        self._uncarry(peer)
        peer.link, peer.is_open, peer.held = None, False, b""
        self._bodies.end(peer.record.number)
        if peer.record.name not in self._peers:
            return
        self._retry(peer)

    # --- dialing ---

    def _dial(self, peer: _Peer) -> None:
        places = peer.record.places
        self._stop_timer(peer)
        if not places:
            self._fail(peer, LinkError(f"node {peer.record.name} has told no place"))
            return
        try:
            address = self._find(places[peer.tries % len(places)])
        except LinkError as error:
            self._fail(peer, error)
            return
        claim = Identity(self._own.cluster, Role.NODE, peer.record.name)
        peer.is_dialing = True
        self._carrier.dial(address, claim, lambda outcome: self._settle(peer, outcome))

    def _settle(self, peer: _Peer, outcome: Link | LinkError) -> None:
        if self._is_closed:
            # A call that was under way: nobody waits for it, and there may be no switch any more.
            return
        peer.is_dialing = False
        if isinstance(outcome, LinkError):
            if peer.link is None or peer.link.is_silent:
                self._fail(peer, outcome)
            elif not isinstance(peer.link, Link):
                self._try_directly(peer)

    def _fail(self, peer: _Peer, error: LinkError) -> None:
        """One place has failed: try the next one, after a pause if it was the last."""
        level = logging.WARNING if isinstance(error, IdentityError) else logging.INFO
        log.log(level, "no link to %s: %s", peer.record.name, error)
        if self._peers.get(peer.record.name) is not peer:
            return
        peer.tries += 1
        peer.failure = str(error)
        self._begin_failing(peer, self._carrier.now())
        is_round_over = peer.tries % max(1, len(peer.record.places)) == 0
        # A link that is silent is not waited for: its end may come after the peer is lost.
        has_none = peer.link is None or peer.link.is_silent
        if is_round_over and has_none and self.go_round(peer.record.number):
            self._try_directly(peer)
        else:
            self._retry(peer)

    def _begin_failing(self, peer: _Peer, since: float) -> None:
        """It is not reached since then, if it was until then: it is lost when that goes on."""
        if peer.failing_since is None:
            peer.failing_since = since
            if not peer.is_lost:
                when = max(self._carrier.now(), since + self._patience.lost_s)
                peer.loss = self._carrier.call_at(when, lambda: self._lose(peer))

    def _end_failing(self, peer: _Peer) -> None:
        """It is reached, or nobody wants to know."""
        peer.failing_since = None
        if peer.loss is not None:
            peer.loss.cancel()
            peer.loss = None

    def _lose(self, peer: _Peer) -> None:
        """It could not be reached for too long: who waits for it is told."""
        peer.loss, link = None, peer.link
        if link is not None:
            # What it says from here on is nobody's business.
            peer.link, peer.is_open = None, False
            self._bodies.end(peer.record.number)
            link.close(Reason.SILENT, "the node is lost")
        assert peer.failing_since is not None, "a time runs for who is not reached"
        peer.is_lost = True
        text = f"not reached for {self._carrier.now() - peer.failing_since:.0f} s: {peer.failure}"
        # In this order, so that nobody who waits slips into the lane that begins anew.
        self._port.trunk_set_down(peer.record.number, True)
        self._restart(peer)
        self._owner.peer_lost(peer.record.name, text)
        self._retry(peer)

    def _try_directly(self, peer: _Peer) -> None:
        """The link goes by way of the master: look now and then whether that is still needed."""
        if peer.timer is None and not peer.is_dialing:
            when = self._carrier.now() + shorten(self._patience.direct_s, self._random)
            peer.timer = self._carrier.call_at(when, lambda: self._dial(peer))

    def _retry(self, peer: _Peer) -> None:
        if peer.timer is not None or peer.is_dialing:
            return
        if not peer.is_wanted and not peer.is_lost and not self._is_needed(peer):
            # Nobody waits for it any more. If it is lost, nobody else would learn that it is back.
            self._end_failing(peer)
            return
        now, waits = self._carrier.now(), self._patience.waits
        self._begin_failing(peer, now)
        # All places are tried at once, and then again after a pause that grows.
        rounds = peer.tries // max(1, len(peer.record.places))
        when = now + (shorten(waits.grow_s(rounds), self._random) if rounds else 0.0)
        peer.timer = self._carrier.call_at(when, lambda: self._dial(peer))

    def _is_needed(self, peer: _Peer) -> bool:
        record = peer.record
        return not self._port.trunk_is_idle(record.number) or self._owner.awaits(record.name)

    def _stop_timer(self, peer: _Peer) -> None:
        if peer.timer is not None:
            peer.timer.cancel()
            peer.timer = None


def _state_of(peer: _Peer) -> str:
    if peer.is_open:
        if not isinstance(peer.link, Link):
            return "relayed"
        return "silent" if peer.link.is_silent else "open"
    if peer.is_lost:
        return "lost"
    return "opening" if peer.link is not None or peer.is_dialing or peer.timer else "none"


def is_batch(event: Event) -> bool:
    """Tell whether an event is a batch of records, or room for one: nothing for the owner."""
    match event:
        case Message(Channel.DATA, destination) | Room(Channel.DATA, destination):
            return destination == BATCHES
    return False


def _ignore(event: Event) -> None:
    """Hear what a link says that is being closed."""


def _is_of_body(frame: PeerFrame) -> TypeGuard[BodySent | BodyTaken | BodyRefused]:
    return isinstance(frame, BodySent | BodyTaken | BodyRefused)


def _is_hello(frame: PeerFrame) -> bool:
    return isinstance(frame, PeerHello)
