"""Figures: what a run has measured, as statistics and as JSON.

`results.json` is a list of objects {"row", "system", "value", "unit", "better", "runs"}: `value` is
the median of `runs`, `better` is "lower" or "higher".
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

#: The system that is ours.
OURS: Final = "afbus"


@dataclass(frozen=True)
class Figure:
    """One system in one row."""

    row: str
    system: str
    value: float
    unit: str
    better: str
    runs: tuple[float, ...]

    @classmethod
    def of(cls, row: str, system: str, unit: str, better: str, runs: Iterable[float]) -> Figure:
        """Return the figure of what was taken in several turns."""
        taken = tuple(runs)
        return cls(row, system, median(taken), unit, better, taken)

    @property
    def spread(self) -> float:
        """How far the turns are apart, as a part of the median."""
        return (max(self.runs) - min(self.runs)) / self.value if self.value else 0.0


def best(figures: Iterable[Figure]) -> Figure | None:
    """Return the best of one row, or None if there is none."""
    found = [*figures]
    if not found:
        return None
    choose = min if found[0].better == "lower" else max
    return choose(found, key=lambda figure: figure.value)


def encode(figures: Iterable[Figure]) -> str:
    """Return figures as text of JSON."""
    rows = ",\n".join(json.dumps(asdict(figure)) for figure in figures)
    return f"[\n{rows}\n]\n"


def decode(text: str) -> list[Figure]:
    """Return the figures of a text.

    Raises:
        ValueError: It is no list of figures.
    """
    found: Any = json.loads(text)
    try:
        return [Figure(**{**each, "runs": tuple(each["runs"])}) for each in found]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no list of figures: {error}") from error
