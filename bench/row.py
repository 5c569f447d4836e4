"""A row of the table, and how rates and times are taken."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .stage import HostStage

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .stage import Stage

KIB: Final = 1024
MIB: Final = 1024 * KIB
BATCH: Final = 256


@dataclass(frozen=True)
class Row:
    """One row of the table: name, unit, what is better, and a measurement for each system."""

    name: str
    unit: str
    better: str
    #: Each is given a stage of the kind that the row has.
    systems: dict[str, Callable[[Any], float]]
    stage: type[Stage] = HostStage


def median_us(count: int, turn: Callable[[], object]) -> float:
    """Time of one turn in microseconds, the median of `count`."""
    clock = time.perf_counter
    times = []
    for _ in range(count):
        begin = clock()
        turn()
        times.append(clock() - begin)
    return sorted(times)[count // 2] * 1e6


def rate(count: int, take: Callable[[], int]) -> float:
    """Things a second: `take` returns how many it took, until there were `count`."""
    got = take()
    begin, first = time.perf_counter(), got
    while got < count:
        got += take()
    return (got - first) / (time.perf_counter() - begin)
