"""How rates, times and CPU are taken in the window of a round."""

from __future__ import annotations

import asyncio
import mmap
import time
from dataclasses import dataclass
from itertools import pairwise, repeat
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from .stage import Cue

_clock = time.perf_counter
#: CPUCLOCK_SCHED of Linux: what all threads of a process have used.
_ALL_THREADS: Final = 2


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds that processes have used since they began, in all of their threads."""
    return sum(time.clock_gettime(~pid << 3 | _ALL_THREADS) for pid in pids)


@dataclass(frozen=True)
class Taken:
    """What one end has taken in the window."""

    #: Messages, and the seconds in which they came.
    count: int
    wall_s: float
    #: CPU seconds of all processes of the round in this time.
    cpu_s: float

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self.count / self.wall_s

    def as_list(self) -> list[float]:
        """What goes through the pipe: the arguments of this class."""
        return [self.count, self.wall_s, self.cpu_s]


class Meter:
    """Counts what an end takes in the window, and says so when that is over."""

    def __init__(self, cue: Cue) -> None:
        """Begin; the window is in the future."""
        self._cue = cue
        self._opened: tuple[float, float] | None = None
        self._count = 0
        self.is_open = True

    def add(self, count: int) -> None:
        """Count messages that came since the last call."""
        now = _clock()
        if self._opened is None:
            if now >= self._cue.begin:
                self._opened = now, cpu_s(self._cue.pids)
            return
        self._count += count
        # One message at least, however slow.
        if self.is_open and now >= self._cue.end and self._count:
            self.is_open = False
            began, cpu = self._opened
            taken = Taken(self._count, now - began, cpu_s(self._cue.pids) - cpu)
            self._cue.tell(taken.as_list())


def take_each(cue: Cue, take: Callable[[], object], chunk: int) -> None:
    """Take messages one by one; the clock is looked at after each `chunk`."""
    meter = Meter(cue)
    while True:
        for _ in repeat(None, chunk):
            take()
        meter.add(chunk)


def take_counted(cue: Cue, take: Callable[[], int]) -> None:
    """Take messages as many at a time as `take` says."""
    meter = Meter(cue)
    while True:
        meter.add(take())


def take_elsewhere(cue: Cue, count: Callable[[], int]) -> None:
    """Watch a count that another thread makes grow."""
    meter, before = Meter(cue), count()
    time.sleep(max(0.0, cue.begin - _clock()))
    while True:
        now = count()
        meter.add(now - before)
        before = now
        time.sleep(max(0.001, cue.end - _clock()))


def time_turns(cue: Cue, turn: Callable[[], object]) -> float:
    """Return the median time of a turn in the window, in microseconds."""
    while _clock() < cue.begin:
        turn()
    turns = Turns(cue)
    while turns.note():
        turn()
    return turns.median_us()


class Turns:
    """Times of turns, one after the other, until the window ends."""

    def __init__(self, cue: Cue) -> None:
        """Begin."""
        self._end = cue.end
        self._times: list[float] = []

    def note(self) -> bool:
        """Note that a turn begins now; return whether there is time for one."""
        now = _clock()
        self._times.append(now)
        # One turn at least, however slow.
        return now < self._end or len(self._times) < 2

    def median_us(self) -> float:
        """Return the median time from one turn to the next, in microseconds."""
        times = self._times
        return 1e6 * median(b - a for a, b in pairwise(times))


class Credit:
    """How far a sender may be ahead of its readers, in a page that all of them share.

    For peers that drop, or queue without end, where others wait.
    """

    #: A sender that is too far ahead looks again after this time.
    PAUSE_S: Final = 20e-6

    def __init__(self, readers: int, ahead: int) -> None:
        """Begin; made before the players are."""
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        # A cache line for each.
        self._counts = memoryview(self._page).cast("Q")
        self._lines = range(0, readers * 8, 8)
        self._ahead = ahead

    def took(self, reader: int, count: int) -> None:
        """A reader has taken so many, in all."""
        self._counts[reader * 8] = count

    def has_room(self, sent: int) -> bool:
        """Whether a sender that has sent so many may send more."""
        return sent - min(self._counts[line] for line in self._lines) < self._ahead

    async def room(self, sent: int) -> None:
        """Wait for it."""
        # The readers are other processes, which cannot set an event here.
        while not self.has_room(sent):  # noqa: ASYNC110 (see above)
            await asyncio.sleep(self.PAUSE_S)


async def watch(cue: Cue, count: Callable[[], int]) -> None:
    """Watch a count that callbacks of the event loop make grow."""
    meter, before = Meter(cue), count()
    await asyncio.sleep(max(0.0, cue.begin - _clock()))
    while True:
        now = count()
        meter.add(now - before)
        before = now
        await asyncio.sleep(max(0.001, cue.end - _clock()))


async def await_turns(cue: Cue, turn: Callable[[], Awaitable[object]]) -> float:
    """Return the median time of a turn in the window, in microseconds."""
    while _clock() < cue.begin:
        await turn()
    turns = Turns(cue)
    while turns.note():
        await turn()
    return turns.median_us()
