"""How two carriers in memory find each other: calls, and the connections that come of them.

Certificates are judged as over the wire, by each side of a handshake; only that nobody proves to
hold a key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from ..proto.errors import IdentityError, LinkError
from .carrier import DIAL_S, ENROL_S, Enrolled
from .certificate import Refusal, Refused, Side
from .link import Bearer, Link
from .reason import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from .carrier import Done, EnrolDone, Timer
    from .certificate import Pinned
    from .identity import Identity
    from .memory import MemoryCarrier


class Call(ABC):
    """One attempt to reach a member: something goes there, an answer comes back, in its time."""

    def __init__(self, caller: MemoryCarrier, target: str, limit_s: float) -> None:
        self._caller = caller
        self._target = target
        self._limit_s = limit_s
        self._is_over = False

    def start(self) -> None:
        """Call."""
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


class Dial(Call):
    """The caller's certificates go there, the verdict and the other's certificates come back."""

    def __init__(self, caller: MemoryCarrier, target: str, claim: Identity, done: Done) -> None:
        super().__init__(caller, target, DIAL_S)
        self._claim = claim
        self._done = done
        self._presented = caller.presented()
        self._wire: MemoryWire | None = None

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
        here, there = MemoryWire(self._caller, called), MemoryWire(called, self._caller)
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


class Enrolment(Call):
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


class MemoryWire:
    """One end of a connection."""

    other: MemoryWire

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
        """Return the time of the network."""
        return self.carrier.now()

    def write(self, stream: int, data: bytes, end: bool) -> None:
        """Send along the path, behind what the stream has sent before."""
        if self.carrier.is_open and not self._is_cut:
            self._last[stream] = self._carry(
                self._last.get(stream, 0.0), lambda: self.other.receive(stream, data, end)
            )
            if end:
                del self._last[stream]

    def ping(self, number: int, is_urgent: bool) -> None:
        """Go there and back."""
        if not self._is_cut:
            self._carry(0.0, lambda: self.other.receive_ping(number))

    def cut(self, reason: Reason, text: str) -> None:
        """End both ends, this one at once."""
        if not self._is_cut:
            self._is_cut = True
            self._carry(0.0, lambda: self.other.receive_cut(reason, text))
            self._drop()

    def arm(self, timer: float | None) -> None:
        """Arm the timer of the link."""
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
        """Take what the other end wrote; before there is a link it waits."""
        if not self.carrier.is_open or self._is_cut:
            return
        if self.link is None:
            self._early.append((stream, data, end))
            return
        self.link.receive_data(stream, data, end)
        self.link.flush()

    def receive_ping(self, number: int) -> None:
        """Send it back."""
        if self.carrier.is_open and not self._is_cut:
            self._carry(0.0, lambda: self.other.receive_echo(number))

    def receive_echo(self, number: int) -> None:
        """Take a ping that has come back."""
        if self.carrier.is_open and not self._is_cut and self.link is not None:
            self.link.receive_echo(number)
            self.link.flush()

    def receive_cut(self, reason: Reason, text: str) -> None:
        """Learn that the other end has ended it."""
        if self.link is None:
            self._early_cut = (reason, text)
        elif self.carrier.is_open:
            self._is_cut = True
            self.link.receive_down(reason, text, is_remote=True)
            self._drop()

    def deliver_early(self) -> None:
        """Give the link what came before it."""
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
