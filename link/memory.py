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
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any

from ..proto.errors import LinkError
from .carrier import Carrier, check_enrolment
from .core import LinkCore
from .link import Bearer, Link
from .memory_wire import Dial, Enrolment, MemoryWire
from .reason import Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from .carrier import Done, EnrolDone, Member, Timer
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
        Dial(self, address, claim, done).start()

    def enrol(self, address: Any, root_digest: bytes, request: bytes, done: EnrolDone) -> None:
        """As `Carrier.enrol`."""
        check_enrolment(request)
        Enrolment(self, address, root_digest, request, done).start()

    def presented(self) -> tuple[bytes, ...]:
        """What is shown to a peer."""
        return self.credentials.chain if self.credentials is not None else ()

    def add(self, wire: MemoryWire, bearer: Bearer, done: Done | None) -> None:
        """Make the link of a proven connection."""

        def accept(link: Link) -> Any:
            sink = self.member.accept(link)
            if done is not None:
                done(link)
            return sink

        def fail(down: Down) -> None:
            if done is not None:
                done(LinkError(str(down), retryable=down.reason.is_retryable))

        core = LinkCore(self.member.settings, self.member.boot, self.now())
        wire.link = Link(core, wire, bearer, accept, fail)
        self.keep(wire.link)
        wire.link.flush()
        wire.deliver_early()
