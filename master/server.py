"""What stands between the core and its links: applies effects, tells the core what happens.

It works with every carrier, on the carrier's clock. Inputs go to the core at once; its effects are
taken once for all that happens in a turn, written first, and then applied in their order. While a
batch is being written, what happens gathers for the next one; so the slower the disk, the larger
the batches.

Invariants:

1. No frame of a batch leaves before `commit` has said that the batch is written.
2. What lies here for a link that does not read is bounded: more than `QUEUED_BYTES`, and nothing
   is read from it any more. Snapshots and deltas are shared among links, and bounded by the feed.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..link.credentials import Credentials
from ..link.effect import (
    BodyEnded,
    BodyOpened,
    BodyReceived,
    Down,
    Heard,
    Message,
    Room,
    Silent,
)
from ..link.frame import Channel
from ..link.identity import Role
from ..link.reason import Reason
from ..link.udp import show_address
from ..proto import cluster
from ..proto.errors import CloseCode, IdentityError, RemoteProtocolError
from ..proto.frames import Closed
from .effect import Audit, Cut, LinkId, Send, Trust, Write
from .issuer import make_key, make_request, read_leaf
from .relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..link.carrier import Carrier, Timer
    from ..link.certificate import Authority, Refused
    from ..link.effect import Event
    from ..link.identity import Identity
    from ..link.link import Link, Sink
    from .core import Core
    from .effect import Effect
    from .issuer import Issuer

_log = logging.getLogger("afbus.master")

#: The name of the master in its certificate; clusters of several masters will have more.
MASTER_NAME: Final = "master"
#: Where a link carries what nodes and masters say to each other.
CHANNEL: Final = Channel.TABLES
DESTINATION: Final = 0
#: What may wait for a link before nothing is read from it.
QUEUED_BYTES: Final = 1 << 20
#: How often certificates are looked at: those of links, and the own one.
CHECK_S: Final = 60.0

_REASONS: Final = {
    CloseCode.MALFORMED: Reason.MALFORMED,
    CloseCode.LIMIT: Reason.LIMIT,
    CloseCode.VERSION: Reason.VERSION,
    CloseCode.ORDER: Reason.ORDER,
    CloseCode.EVICTED: Reason.SILENT,
    CloseCode.GOING_DOWN: Reason.GOING_DOWN,
    CloseCode.TAKEN_OVER: Reason.REPLACED,
    CloseCode.SHARE: Reason.LIMIT,
    CloseCode.DENIED: Reason.REVOKED,
}


class Commit(Protocol):
    """Writes a batch, and calls `done` once it is on disk; never two at a time."""

    def __call__(
        self,
        rows: Sequence[tuple[bytes, bytes | None]],
        audits: Sequence[Audit],
        done: Callable[[], None],
        /,
    ) -> None:
        """Write it."""


@dataclass(slots=True, eq=False)
class _Port:
    """A link, and what waits for room on it."""

    id: LinkId
    link: Link
    waiting: deque[bytes] = field(default_factory=deque)
    waiting_bytes: int = 0
    #: The number of its node.
    number: int | None = None
    #: Credit of what was read and is not given back yet.
    kept_back: int = 0


class Server:
    """One master on one carrier."""

    def __init__(self, core: Core, issuer: Issuer, commit: Commit) -> None:
        """Begin without a carrier; `attach` gives it one."""
        self._core, self._issuer, self._commit = core, issuer, commit
        self._ports: dict[LinkId, _Port] = {}
        self._visitors: dict[LinkId, Callable[[bytes], None]] = {}
        self._relay = Relay()
        self._links = 0
        self._is_writing = self._is_applying = self._has_more = False
        self._soon: Timer | None = None
        self._timer: Timer | None = None
        self._check: Timer | None = None
        self._carrier: Carrier
        self._renew_at_utc = 0.0
        # The number of the own certificate.
        self._serial = 0
        self._done: Callable[[], None] | None = None

    def attach(self, carrier: Carrier) -> None:
        """Serve on a carrier whose member's callbacks are those of this server."""
        self._carrier = carrier
        self._look_at_certificates()
        self._wake()

    def detach(self) -> None:
        """Take back all timers; nothing happens any more."""
        for timer in (self._soon, self._timer, self._check):
            if timer is not None:
                timer.cancel()

    def stop(self, done: Callable[[], None]) -> None:
        """Let all links end in good order; `done` is called when they have, and all is written."""
        self._done = done
        self._core.stop()
        self._wake()

    # --- callbacks of the carrier's member ---

    def make_credentials(self, utc: float) -> Credentials:
        """Return a new certificate of the master, and its key.

        Raises:
            IdentityError: The issuing certificate is over.
        """
        key = make_key()
        issued = self._core.issue_own(MASTER_NAME, make_request(key))
        # At half of its life, like everybody.
        self._renew_at_utc = (utc + issued.not_after_utc) / 2
        self._serial = issued.serial
        # The root stands in the chain so that nodes that know only its digest can judge it.
        return Credentials((*issued.chain, self._issuer.root), key)

    def get_authority(self) -> Authority:
        """Return what links trust."""
        return self._issuer.trust(self._core.denied)

    @staticmethod
    def admits(identity: Identity) -> bool:
        """Tell whether a member may have a link: nodes may, principals speak through theirs."""
        return identity.role is Role.NODE

    def accept(self, link: Link) -> Sink:
        """Take a link that is up."""
        port = _Port(self._new_id(), link)
        self._ports[port.id] = port
        _log.info("link %d: %s", port.id, link.peer)
        leaf = read_leaf(link.bearer.presented[0])
        self._core.receive_link(port.id, link.peer, leaf, link.boot, self._carrier.now())
        self._wake()
        return lambda event: self._handle_event(port, event)

    def report_refused(self, address: Any, refused: Refused) -> None:
        """Somebody was refused within the handshake, or a link that lives was judged again."""
        self._core.receive_refusal(_show(address), refused.reason.value, refused.text)
        self._wake()

    def enrol(self, address: Any, request: bytes, answer: Callable[[bytes], None]) -> None:
        """Somebody without a certificate asks for one."""
        self.receive_visit(_show(address), request, answer)

    def receive_visit(self, actor: str, data: bytes, answer: Callable[[bytes], None]) -> None:
        """Take a frame of somebody without a link; `answer` is called once, or never."""
        number = self._new_id()
        self._visitors[number] = answer
        now = self._carrier.now()
        self._core.receive_visitor(number, actor, now)
        self._core.receive_frame(number, data, now)
        self._wake()

    # --- what the process tells ---

    @property
    def core(self) -> Core:
        """The core, to be told of policies; call `wake` afterwards."""
        return self._core

    def wake(self) -> None:
        """Something has happened to the core."""
        self._wake()

    def _new_id(self) -> LinkId:
        self._links += 1
        return LinkId(self._links)

    # --- what happens on links ---

    def _handle_event(self, port: _Port, event: Event) -> None:
        now = self._carrier.now()
        match event:
            case Message(channel, destination, data, cost):
                if channel is Channel.DATA:
                    self._relay_on(port, destination, data, cost)
                    return
                if (channel, destination) != (CHANNEL, DESTINATION):
                    port.link.close(Reason.ORDER, f"{channel.name} {destination} at a master")
                    return
                self._core.receive_frame(port.id, data, now)
                self._learn_number(port)
                port.kept_back += cost
                self._give_back(port)
            case Room(channel, destination):
                if channel is CHANNEL:
                    self._pump(port)
                elif port.number is not None:
                    self._relay.handle_room(port.number, destination)
            case Silent():
                _log.info("link %d: silent", port.id)
                self._core.receive_silence(port.id, now)
            case Heard():
                self._core.receive_sound(port.id, now)
            case Down():
                _log.info("link %d: %s: %s", port.id, port.link.peer, event)
                self._ports.pop(port.id, None)
                port.waiting.clear()
                if port.number is not None:
                    self._relay.drop(port.number, port.link)
                self._core.receive_end(port.id, now)
            case BodyOpened() | BodyReceived() | BodyEnded():
                port.link.close(Reason.ORDER, "a body at a master")
                return
        self._wake()

    def _learn_number(self, port: _Port) -> None:
        """Once a node has said HELLO, others may speak to it by way of this master."""
        if port.number is None and not port.link.is_down:
            port.number = self._core.get_number(port.link.peer.name)
            if port.number is not None:
                self._relay.add(port.number, port.link)

    def _relay_on(self, port: _Port, target: int, data: bytes, cost: int) -> None:
        """Pass on what one node says to another that it cannot reach."""
        if port.number is None:
            port.link.close(Reason.ORDER, "a message for another node before HELLO")
            return
        try:
            self._relay.receive(port.number, target, data, cost)
        except RemoteProtocolError as error:
            port.link.close(Reason.MALFORMED, str(error))

    def _give_back(self, port: _Port) -> None:
        if port.kept_back and port.waiting_bytes < QUEUED_BYTES:
            cost, port.kept_back = port.kept_back, 0
            port.link.release(CHANNEL, DESTINATION, cost)

    def _pump(self, port: _Port) -> None:
        """Send what waits, as far as there is room."""
        while port.waiting and port.link.send(CHANNEL, DESTINATION, port.waiting[0]):
            port.waiting_bytes -= len(port.waiting.popleft())
        self._give_back(port)

    # --- effects ---

    def _wake(self) -> None:
        """Take effects behind all that happens in this turn, or behind the batch of now."""
        if self._is_writing or self._is_applying:
            self._has_more = True
        elif self._soon is None:
            self._soon = self._carrier.call_at(self._carrier.now(), self._settle)

    def _settle(self) -> None:
        self._soon, self._has_more = None, False
        rows: list[tuple[bytes, bytes | None]] = []
        audits: list[Audit] = []
        told: list[Effect] = []
        for effect in self._core.take_effects():
            match effect:
                case Write():
                    rows += effect.rows
                case Audit():
                    audits.append(effect)
                case _:
                    told.append(effect)
        for one in audits:
            verdict = "done" if one.is_done else "refused"
            _log.info("%s: %s %s: %s: %s", one.actor, one.action, one.subject, verdict, one.detail)
        if rows or audits:
            self._is_writing = True
            self._commit(rows, audits, lambda: self._tell(told))
        else:
            self._tell(told)

    def _tell(self, effects: Sequence[Effect]) -> None:
        """Apply what may be told now, and see what has happened meanwhile."""
        self._is_writing, self._is_applying = False, True
        for effect in effects:
            self._apply(effect)
        self._is_applying = False
        if self._has_more:
            self._wake()
        elif self._done is not None and not self._ports:
            self._done()
        self._rearm()

    def _apply(self, effect: Effect) -> None:
        match effect:
            case Send(link, data):
                port, answer = self._ports.get(link), self._visitors.pop(link, None)
                if port is not None:
                    self._send(port, data)
                elif answer is not None:
                    answer(data)
            case Cut(link, code, text):
                port, answer = self._ports.get(link), self._visitors.pop(link, None)
                _log.info("link %d: cut: %s: %s", link, code.name, text)
                if port is not None:
                    port.link.close(_REASONS.get(code, Reason.ORDER), text)
                elif answer is not None:
                    answer(cluster.encode(Closed(code, text)))
            case Trust():
                if self._serial in self._core.denied:
                    # Nodes refuse this one from now on, and would find no master.
                    self._renew()
                self._carrier.set_authority(self.get_authority())

    def _send(self, port: _Port, data: bytes) -> None:
        if port.waiting or not port.link.send(CHANNEL, DESTINATION, data):
            port.waiting.append(data)
            port.waiting_bytes += len(data)

    # --- time ---

    def _rearm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self._core.get_timer()
        self._timer = None if due is None else self._carrier.call_at(due, self._handle_timer)

    def _handle_timer(self) -> None:
        self._timer = None
        self._core.handle_timer(self._carrier.now())
        self._wake()

    def _look_at_certificates(self) -> None:
        """Renew the own one in time, and end links whose certificates have expired."""
        if self._carrier.member.utc_now().timestamp() >= self._renew_at_utc:
            self._renew()
        self._carrier.judge_links()
        self._wake()
        when = self._carrier.now() + CHECK_S
        self._check = self._carrier.call_at(when, self._look_at_certificates)

    def _renew(self) -> None:
        """Present another certificate from the next link on."""
        try:
            utc = self._carrier.member.utc_now().timestamp()
            self._carrier.set_credentials(self.make_credentials(utc))
        except IdentityError as error:
            _log.error("no certificate for the master: %s", error)
        self._wake()


def _show(address: Any) -> str:
    """Return where somebody comes from, for people."""
    return show_address(address) if isinstance(address, tuple) else str(address)
