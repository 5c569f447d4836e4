"""One run: heats of rows, each system in turns."""

from __future__ import annotations

import signal
import sys
from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING, NoReturn

from .figure import Figure
from .rows import ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from .rows import Entry, Heat
    from .stage import Stage


class Run:
    """What of the heats is wanted, and what came of it."""

    def __init__(
        self,
        heats: Sequence[Heat],
        *,
        rows: Collection[str] = (),
        systems: Sequence[str] = (),
        runs: int = 5,
    ) -> None:
        """Choose.

        Args:
            heats: All that could be measured.
            rows: Names of rows; empty: all.
            systems: How the names of systems begin; empty: all.
            runs: Turns of each system.
        """
        self._heats, self._rows, self._runs = heats, frozenset(rows), runs
        self._systems = tuple(systems)
        self._is_stopped = False
        #: Systems, or rows of systems, that were not measured, and why.
        self.absent: dict[str, str] = {}

    def stop(self) -> NoReturn:
        """End at once, or, if a library keeps that from happening, before the next turn."""
        self._is_stopped = True
        sys.exit(128 + signal.SIGTERM)

    def systems(self) -> dict[str, str]:
        """Return the names of all systems, and what each lacks here."""
        return {
            entry.system.name: entry.system.missing()
            for heat in self._heats
            for entry in heat.entries
        }

    def measure(self, tell: Callable[[str], None]) -> list[Figure]:
        """Measure; `tell` is given a line of progress now and then."""
        values: dict[tuple[str, str], list[float]] = defaultdict(list)
        with ExitStack() as end:
            stages: dict[type[Stage], Stage] = {}
            for heat in self._heats:
                entries = [*self._wanted(heat)]
                if not entries:
                    continue
                if heat.stage not in stages:
                    stages[heat.stage] = end.enter_context(heat.stage())
                names = dict.fromkeys(row for entry in entries for row in entry.rows)
                tell(f"{', '.join(names)}: {', '.join(entry.system.name for entry in entries)}")
                self._take_turns(stages[heat.stage], entries, values, tell)
        figures = []
        for (name, system), taken in values.items():
            row = ROWS[name]
            figures.append(Figure.of(name, system, row.unit, row.better, taken))
        return figures

    def _wanted(self, heat: Heat) -> Iterator[Entry]:
        """Return the entries of a heat that are wanted and can be; note those that cannot."""
        for entry in heat.entries:
            if self._rows and not self._rows & {*entry.rows}:
                continue
            if self._systems and not entry.system.name.startswith(self._systems):
                continue
            if why := entry.system.missing():
                self.absent[entry.system.name] = why
            elif why := heat.stage.obstacle():
                for row in entry.rows:
                    self.absent[row] = why
            else:
                yield entry

    def _take_turns(
        self,
        stage: Stage,
        entries: list[Entry],
        values: dict[tuple[str, str], list[float]],
        tell: Callable[[str], None],
    ) -> None:
        """Measure each entry once, then each again, until there were enough turns.

        One that fails is named, and left out of what follows; the others go on.
        """
        failed: set[int] = set()
        for _ in range(self._runs):
            for number, entry in enumerate(entries):
                if self._is_stopped:
                    self.stop()
                if number in failed:
                    continue
                try:
                    found = entry.measure(stage)
                except (OSError, RuntimeError) as error:
                    failed.add(number)
                    for row in entry.rows:
                        self.absent[f"{entry.system.name}, {row}"] = f"failed: {error}"
                    tell(f"  {entry.system.name} failed: {error}")
                    continue
                for row, value in found.items():
                    if not self._rows or row in self._rows:
                        values[row, entry.system.name].append(value)
