"""How many of those who were refused stand in the audit, one by one.

Whoever reaches the port of the master can be refused as often as he likes. The audit keeps a number
of entries, so somebody could fill it with refusals until what matters has gone.

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
        self._until = 0.0
        self._noted = 0
        self._missed = 0

    def admit(self, now: float) -> bool:
        """Tell whether one more gets an entry; it is counted if not."""
        if now >= self._until:
            self._until, self._noted = now + WINDOW_S, 0
        if self._noted < ENTRIES:
            self._noted += 1
            return True
        self._missed += 1
        return False

    def take_missed(self) -> int:
        """Return how many got none since this was asked for the last time."""
        missed, self._missed = self._missed, 0
        return missed
