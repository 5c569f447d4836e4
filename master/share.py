"""How many entries of the audit each node may cause, so that none rolls over what others have.

Whoever is on a node may be refused, or own a name and release it, as often as he likes. So each
node has the share that all strangers have together (`link/stranger.py`): one of what it was
refused, one of what it was given. What endpoints read of others has its own, so that it cannot be
hidden behind names (D19).

Invariants:

1. In a window there are at most `ENTRIES` of each share; the others are counted.
2. What is kept is of nodes that caused entries in their last window.
"""

from __future__ import annotations

from typing import Final

from ..link.stranger import Strangers

#: Being let read what is meant for others, or everything.
_READING: Final = ("monitor", "receive")


class Shares:
    """The entries that nodes have caused lately."""

    def __init__(self) -> None:
        """Begin with none."""
        self._windows: dict[tuple[str, str], Strangers] = {}

    def admit(self, node: str, action: str, now: float, *, is_done: bool) -> bool:
        """Tell whether an entry that a node causes is written; it is counted if not."""
        share = "refused" if not is_done else "reading" if action in _READING else "done"
        return self._windows.setdefault((node, share), Strangers()).admit(now)

    def take_missed(self, now: float) -> dict[str, int]:
        """Return how many entries each node has missed since this was asked for the last time."""
        missed: dict[str, int] = {}
        for (node, share), window in list(self._windows.items()):
            if count := window.take_missed():
                missed[node] = missed.get(node, 0) + count
            if window.is_over(now):
                del self._windows[node, share]
        return missed
