"""Calls to the master: which wait to be sent, which are on the link, which somebody waits for.

Invariants:

1. Calls go out in the order in which they were queued.
2. A call that somebody waits for is answered once; an answer that nobody waits for is none.
3. On the link are at most `WINDOW_BYTES` without an answer, and one call.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..proto import cluster
from ..proto.cluster import ClusterCall
from ..proto.frames import Result
from .claim import Claim
from .uplink_effect import Answered, Say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ..proto.errors import BusError
    from ..proto.operation import ClusterOp
    from .uplink_effect import UplinkEffect
    from .verdict import Question

#: What is beyond waits here, and not in the link.
WINDOW_BYTES: Final = 256 * 1024


@dataclass(slots=True, eq=False)
class Call:
    """One call. `subject` is what it gives, takes back, or asks."""

    serial: int
    op: ClusterOp
    args: Mapping[str, Any]
    subject: Claim | Question | None = None
    #: None: it is the uplink's own, and nobody waits for the answer.
    deadline: float | None = None
    #: What it gives was given up before it came.
    is_void: bool = False
    #: Size of its frame, while it is on the link.
    size: int = 0


class Calls:
    """All calls of one uplink."""

    def __init__(self, effects: list[UplinkEffect]) -> None:
        """Begin without any; frames and answers are appended to `effects`."""
        self._effects = effects
        self._serial = 0
        self._awaited: dict[int, Call] = {}
        # A claim stands for the call that states it.
        self._queue: deque[Call | Claim] = deque()
        self._flight: dict[int, Call] = {}
        self._flight_bytes = 0

    def __iter__(self) -> Iterator[Call]:
        """Iterate over those that somebody waits for, in their order."""
        return iter(list(self._awaited.values()))

    def __len__(self) -> int:
        return len(self._awaited)

    def make(
        self,
        op: ClusterOp,
        args: Mapping[str, Any],
        subject: Claim | Question | None = None,
        deadline: float | None = None,
    ) -> Call:
        """Return a new call; with a deadline somebody waits for its answer from now on."""
        self._serial += 1
        call = Call(self._serial, op, args, subject, deadline)
        if deadline is not None:
            self._awaited[call.serial] = call
        return call

    def is_awaited(self, call: Call) -> bool:
        """Whether somebody still waits for the answer."""
        return call.serial in self._awaited

    def find_asking(self, claim: Claim) -> list[Call]:
        """Return those that somebody waits for, and that give this."""
        return [
            one
            for one in self._awaited.values()
            if one.subject == claim and one.op is claim.op and not one.is_void
        ]

    def get_deadline(self) -> float | None:
        """Return when the first of those ends that somebody waits for."""
        # All have the same time, so the oldest is the first.
        return next((one.deadline for one in self._awaited.values()), None)

    def answer(self, call: Call, result: Result) -> None:
        """Answer whoever waits for it, if anybody does."""
        if self._awaited.pop(call.serial, None) is not None:
            self._effects.append(Answered(result))

    def refuse(self, call: Call, error: BusError) -> None:
        """Answer in the master's place; what comes of the call later is nobody's."""
        self.answer(call, Result.refused(call.serial, error))

    # --- the link ---

    def queue(self, calls: Iterable[Call | Claim]) -> None:
        """Send these after all others."""
        self._queue.extend(calls)

    def pump(self, state: Callable[[Claim], Call | None]) -> None:
        """Send what may be on the link now; `state` makes a call of a claim, if it still is one."""
        while self._queue and self._flight_bytes < WINDOW_BYTES:
            one = self._queue.popleft()
            call = state(one) if isinstance(one, Claim) else one
            if call is not None:
                data = cluster.encode(ClusterCall(call.serial, call.op, call.args))
                self._effects.append(Say(data))
                call.size = len(data)
                self._flight[call.serial] = call
                self._flight_bytes += call.size

    def land(self, serial: int) -> Call | None:
        """A result has come: return the call, None if there is none such on the link."""
        call = self._flight.pop(serial, None)
        if call is not None:
            self._flight_bytes -= call.size
        return call

    def clear(self) -> None:
        """The link has ended: nothing is on it, and nothing waits for it."""
        self._queue.clear()
        self._flight.clear()
        self._flight_bytes = 0
