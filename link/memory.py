"""A network in memory: carriers with the same face as over QUIC, on a clock of its own.

Nothing runs by itself: `run_for`, `run_until` and `step` let time pass. What a link writes takes
the delay of its path. Streams are ordered, so loss and reordering, which are below them, show as
more delay: a lost piece comes again after the path's `resend_s`. What is written while a path is
cut waits, and comes when it is healed; a carrier that is killed is gone without a word.

Certificates are judged as everywhere, by each side of a handshake, at the time of this clock.

Invariants:

1. One seed and one order of calls give one run.
2. A stream delivers its bytes once and in their order, whatever the path does.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any

from ..proto.errors import IdentityError, LinkError
from .carrier import DIAL_S, ENROL_S, Carrier, Enrolled, check_enrolment, log
from .certificate import Refusal, Refused, Side
from .core import LinkCore
from .link import Bearer, Link
from .reason import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from .carrier import Done, EnrolDone, Member, Timer
    from .certificate import Pinned
    from .effect import Down
    from .identity import Identity


@dataclass
class Path:
    """One direction between two addresses; may be changed at any time.

    Attributes:
        delay_s: How long a piece takes.
        jitter_s: More of it, at random, up to this.
        loss: Probability that a piece is lost, and comes again after `resend_s`.
        resend_s: See above.
        is_cut: Nothing passes.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    resend_s: float = 0.05
    is_cut: bool = False
    #: What waits for the path to be healed.
    _held: deque[Callable[[], None]] = field(default_factory=deque, repr=False)


class _Alarm:
    """A timer of the network."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def fire(self) -> None:
        if self.callback is not None:
            callback, self.callback = self.callback, None
            callback()


class MemoryNetwork:
    """Carriers, the paths between them, and the clock."""

    def __init__(self, seed: int = 0) -> None:
        """Begin at time 0."""
        self.random = Random(seed)  # noqa: S311 (a simulation must be reproducible)
        self.time = 0.0
        self._queue: list[tuple[float, int, _Alarm]] = []
        self._order = count()
        self._carriers: dict[str, MemoryCarrier] = {}
        self._paths: dict[tuple[str, str], Path] = {}

    def add(self, address: str, member: Member) -> MemoryCarrier:
        """Put a member at an address; one that was killed or closed there is replaced."""
        assert address not in self._carriers, f"{address} is taken"
        carrier = self._carriers[address] = MemoryCarrier(self, address, member)
        return carrier

    def path(self, source: str, target: str) -> Path:
        """Return the path from one address to another, to change it."""
        return self._paths.setdefault((source, target), Path())

    def cut(self, source: str, target: str) -> None:
        """Let nothing pass in this direction."""
        self.path(source, target).is_cut = True

    def heal(self, source: str, target: str) -> None:
        """Let everything pass again, and what has waited first."""
        path = self.path(source, target)
        path.is_cut = False
        while path._held and not path.is_cut:
            path._held.popleft()()

    def call_at(self, when: float, callback: Callable[[], None]) -> _Alarm:
        """Call back at a time; those of one time in the order of their calls."""
        alarm = _Alarm(callback)
        heapq.heappush(self._queue, (max(when, self.time), next(self._order), alarm))
        return alarm

    @property
    def next_time(self) -> float | None:
        """When something happens next; None: never."""
        while self._queue and self._queue[0][2].callback is None:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else None

    def step(self) -> bool:
        """Let the next thing happen; returns whether there was one."""
        if self.next_time is None:
            return False
        self.time, _, alarm = heapq.heappop(self._queue)
        alarm.fire()
        return True

    def run_until(self, when: float) -> None:
        """Let everything happen up to a time."""
        while (next_time := self.next_time) is not None and next_time <= when:
            self.step()
        self.time = max(self.time, when)

    def run_for(self, duration_s: float) -> None:
        """Let this much time pass."""
        self.run_until(self.time + duration_s)

    # --- for carriers ---

    def find(self, address: str) -> MemoryCarrier | None:
        """Return who lives at an address."""
        return self._carriers.get(address)

    def remove(self, address: str) -> None:
        """Nobody lives there any more."""
        self._carriers.pop(address, None)

    def carry(
        self, source: str, target: str, not_before: float, deliver: Callable[[], None]
    ) -> float:
        """Deliver something that must arrive, after what its path takes; returns when at best."""
        path = self.path(source, target)
        when = self.time + path.delay_s + path.jitter_s * self.random.random()
        while path.loss and self.random.random() < path.loss:
            when += path.resend_s
        when = max(when, not_before)

        def arrive() -> None:
            # A second look: it may have been cut while this was on its way. Behind what waits.
            if path.is_cut or (path._held and not is_waiting[0]):
                is_waiting[0] = True
                path._held.append(arrive)
            else:
                deliver()

        is_waiting = [False]
        self.call_at(when, arrive)
        return when


class MemoryCarrier(Carrier):
    """One member on the network."""

    def __init__(self, network: MemoryNetwork, address: str, member: Member) -> None:
        """Made by `MemoryNetwork.add`."""
        super().__init__(member)
        self.network = network
        self._address = address
        self.is_open = True

    @property
    def address(self) -> str:
        """The name of the place on the network."""
        return self._address

    def now(self) -> float:
        """Return the time of the network."""
        return self.network.time

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call back at a time, if this carrier lives then."""
        return self.network.call_at(when, lambda: callback() if self.is_open else None)

    def kill(self) -> None:
        """Be gone without a word, as by kill -9; the address is free."""
        self.is_open = False
        self._links.clear()
        if self.network.find(self._address) is self:
            self.network.remove(self._address)

    def close(self) -> None:
        """End all links at once, and leave the network."""
        for link in self.links:
            link.close(Reason.CARRIER, "the carrier was closed")
        self.kill()

    def dial(self, address: Any, claim: Identity, done: Done) -> None:
        """As `Carrier.dial`."""
        _Dial(self, address, claim, done).start()

    def enrol(self, address: Any, root_digest: bytes, request: bytes, done: EnrolDone) -> None:
        """As `Carrier.enrol`."""
        check_enrolment(request)
        _Enrolment(self, address, root_digest, request, done).start()

    def presented(self) -> tuple[bytes, ...]:
        """What is shown to a peer."""
        return self.credentials.chain if self.credentials is not None else ()

    def add(self, wire: _MemoryWire, bearer: Bearer, done: Done | None) -> None:
        """Make the link of a proven connection."""

        def accept(link: Link) -> Any:
            sink = self.member.accept(link)
            if done is not None:
                done(link)
            return sink

        def fail(down: Down) -> None:
            log.info("no link to %s: %s", bearer.identity, down)
            if done is not None:
                done(LinkError(str(down), retryable=down.reason.is_retryable))

        core = LinkCore(self.member.settings, self.member.boot, self.now())
        wire.link = Link(core, wire, bearer, accept, fail)
        self.keep(wire.link)
        wire.link.flush()
        wire.deliver_early()


class _Call(ABC):
    """One attempt to reach a member: something goes there, an answer comes back, in its time."""

    def __init__(self, caller: MemoryCarrier, target: str, limit_s: float) -> None:
        self._caller = caller
        self._target = target
        self._limit_s = limit_s
        self._is_over = False

    def start(self) -> None:
        self._caller.call_at(self._caller.now() + self._limit_s, self._expire)
        self._carry_there(self._arrive)

    def _carry_there(self, deliver: Callable[[], None]) -> None:
        self._caller.network.carry(self._caller.address, self._target, 0, deliver)

    def _carry_back(self, deliver: Callable[[], None]) -> None:
        def arrive() -> None:
            if not self._is_over and self._caller.is_open:
                deliver()

        self._caller.network.carry(self._target, self._caller.address, 0, arrive)

    def _arrive(self) -> None:
        called = self._caller.network.find(self._target)
        if called is not None and called.credentials is not None:
            self._reach(called)

    def _expire(self) -> None:
        self._fail(LinkError(f"no answer from {self._target} within {self._limit_s} s"))

    def _fail(self, error: LinkError) -> None:
        if not self._is_over:
            self._is_over = True
            self._tell(error)

    @abstractmethod
    def _reach(self, called: MemoryCarrier) -> None:
        """It has arrived there."""

    @abstractmethod
    def _tell(self, error: LinkError) -> None:
        """It has failed; told once."""


class _Dial(_Call):
    """The caller's certificates go there, the verdict and the other's certificates come back."""

    def __init__(self, caller: MemoryCarrier, target: str, claim: Identity, done: Done) -> None:
        super().__init__(caller, target, DIAL_S)
        self._claim = claim
        self._done = done
        self._presented = caller.presented()
        self._wire: _MemoryWire | None = None

    def _reach(self, called: MemoryCarrier) -> None:
        verdict = called.judge_peer(self._presented, Side.CLIENT, None, self._caller.address)
        self._carry_back(lambda: self._answer(called, verdict))

    def _answer(self, called: MemoryCarrier, verdict: Identity | Refused) -> None:
        if isinstance(verdict, Refused):
            # As over the wire: the peer learns that it was refused, and hardly why.
            self._caller.report_refused(self._target, Refused(Refusal.BY_PEER, "certificate"))
            self._fail(IdentityError(f"{self._target} refused our certificate"))
            return
        chain = called.presented()
        own = self._caller.judge_peer(chain, Side.SERVER, self._claim, self._target)
        if isinstance(own, Refused):
            self._fail(IdentityError(f"{self._target}: {own}"))
            return
        here, there = _MemoryWire(self._caller, called), _MemoryWire(called, self._caller)
        here.other, there.other = there, here
        bearer = Bearer(verdict, self._presented, Side.CLIENT)
        self._carry_there(lambda: called.add(there, bearer, None) if called.is_open else None)
        self._wire = here
        self._caller.add(here, Bearer(own, chain, Side.SERVER), self._succeed)

    def _succeed(self, outcome: Link | LinkError) -> None:
        if not self._is_over:
            self._is_over = True
            self._done(outcome)

    def _tell(self, error: LinkError) -> None:
        self._done(error)
        if self._wire is not None and self._wire.link is not None:
            self._wire.link.close(Reason.CARRIER, "no HELLO in time")


class _Enrolment(_Call):
    """The master's certificates and its answer come back."""

    def __init__(
        self,
        caller: MemoryCarrier,
        target: str,
        root_digest: bytes,
        request: bytes,
        done: EnrolDone,
    ) -> None:
        super().__init__(caller, target, ENROL_S)
        self._root_digest = root_digest
        self._request = request
        self._done = done

    def _reach(self, called: MemoryCarrier) -> None:
        if called.member.enrol is None:
            self._carry_back(lambda: self._fail(LinkError(f"{self._target} enrols nobody")))
            return
        self._carry_back(lambda: self._judge(called, called.presented()))

    def _judge(self, called: MemoryCarrier, chain: tuple[bytes, ...]) -> None:
        verdict = self._caller.judge_master(chain, self._root_digest, self._target)
        if isinstance(verdict, Refused):
            self._fail(IdentityError(f"{self._target}: {verdict}"))
            return
        self._carry_there(lambda: self._ask(called, verdict))

    def _ask(self, called: MemoryCarrier, verdict: Pinned) -> None:
        enrol = called.member.enrol
        if enrol is None or not called.is_open:
            return

        def answer(data: bytes) -> None:
            self._carry_back(lambda: self._succeed(Enrolled(data, verdict.identity, verdict.root)))

        enrol(self._caller.address, self._request, answer)

    def _succeed(self, enrolled: Enrolled) -> None:
        self._is_over = True
        self._done(enrolled)

    def _tell(self, error: LinkError) -> None:
        self._done(error)


class _MemoryWire:
    """One end of a connection."""

    other: _MemoryWire

    def __init__(self, carrier: MemoryCarrier, peer: MemoryCarrier) -> None:
        self.carrier = carrier
        self.peer = peer
        self.link: Link | None = None
        self._is_cut = False
        self._early: list[tuple[int, bytes, bool]] = []
        self._early_cut: tuple[Reason, str] | None = None
        self._last: dict[int, float] = {}
        self._alarm: Timer | None = None
        self._alarm_at = 0.0

    def now(self) -> float:
        return self.carrier.now()

    def write(self, stream: int, data: bytes, end: bool) -> None:
        if self.carrier.is_open and not self._is_cut:
            self._last[stream] = self._carry(
                self._last.get(stream, 0.0), lambda: self.other.receive(stream, data, end)
            )
            if end:
                del self._last[stream]

    def ping(self, number: int, is_urgent: bool) -> None:
        if not self._is_cut:
            self._carry(0.0, lambda: self.other.receive_ping(number))

    def cut(self, reason: Reason, text: str) -> None:
        if not self._is_cut:
            self._is_cut = True
            self._carry(0.0, lambda: self.other.receive_cut(reason, text))
            self._drop()

    def arm(self, timer: float | None) -> None:
        if timer is None:
            if self._alarm is not None:
                self._alarm.cancel()
            self._drop()
        elif self._alarm is None or timer < self._alarm_at:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm_at = timer
            self._alarm = self.carrier.call_at(timer, self._handle_timer)

    def receive(self, stream: int, data: bytes, end: bool) -> None:
        if not self.carrier.is_open or self._is_cut:
            return
        if self.link is None:
            self._early.append((stream, data, end))
            return
        self.link.receive_data(stream, data, end)
        self.link.flush()

    def receive_ping(self, number: int) -> None:
        if self.carrier.is_open and not self._is_cut:
            self._carry(0.0, lambda: self.other.receive_echo(number))

    def receive_echo(self, number: int) -> None:
        if self.carrier.is_open and not self._is_cut and self.link is not None:
            self.link.receive_echo(number)
            self.link.flush()

    def receive_cut(self, reason: Reason, text: str) -> None:
        if self.link is None:
            self._early_cut = (reason, text)
        elif self.carrier.is_open:
            self._is_cut = True
            self.link.receive_down(reason, text, is_remote=True)
            self._drop()

    def deliver_early(self) -> None:
        early, self._early = self._early, []
        for stream, data, end in early:
            self.receive(stream, data, end)
        if self._early_cut is not None:
            self.receive_cut(*self._early_cut)

    def _carry(self, not_before: float, deliver: Callable[[], None]) -> float:
        addresses = self.carrier.address, self.peer.address
        return self.carrier.network.carry(*addresses, not_before, deliver)

    def _handle_timer(self) -> None:
        self._alarm = None
        if self.link is not None:
            self.link.handle_timer()

    def _drop(self) -> None:
        if self.link is not None:
            self.carrier.drop_link(self.link)
