"""How many of those who were refused are told of, one by one.

Whoever reaches the port of a member can be refused as often as he likes. The audit of the master
keeps a number of entries, so somebody could fill it with refusals until what matters has gone; and
a node's log, until nobody reads it.

Invariants:

1. In a window of `WINDOW_S` there are at most `ENTRIES` of them; the others are counted.
"""

from __future__ import annotations

from typing import Final

#: Entries of a window: in a day a third of what the audit keeps.
ENTRIES: Final = 240
WINDOW_S: Final = 60.0


class Strangers:
    """The refusals of this window."""

    def __init__(self) -> None:
        """Begin with none."""
        self._until: float | None = None
        self._told = 0
        self._missed = 0

    def admit(self, now: float) -> bool:
        """Tell whether one more is told of; it is counted if not. Any clock will do."""
        if self.is_over(now):
            self._until, self._told = now + WINDOW_S, 0
        if self._told < ENTRIES:
            self._told += 1
            return True
        self._missed += 1
        return False

    def is_over(self, now: float) -> bool:
        """Tell whether the window is over, so that the next one begins with none."""
        return self._until is None or now >= self._until

    def take_missed(self) -> int:
        """Return how many were not told of since this was asked for the last time."""
        missed, self._missed = self._missed, 0
        return missed
