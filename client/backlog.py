"""What has arrived and is not read yet, bounded, with an exact account of what found no room.

A backlog that `holds` loses nothing: when it `is_full` its owner stops reading the ring, so that
the switch does what it does with a full receiver. The others hold up nobody: what does not fit
becomes a `Gap` for each source, with the numbers of the messages and how many they were.

Invariants:

1. What is taken out comes in the order of its arrival, and a gap before every later item.
2. Items taken out and the counts of gaps together are what was put in, exactly.
3. There are at most `limit` items, but for gaps (one a source), and for what the owner of one
   that holds puts in regardless.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ..proto.notice import Gap, GapReason
from .message import Message

if TYPE_CHECKING:
    from collections.abc import Callable


class Backlog:
    """A queue of messages and gaps; all calls cost O(1), but for a gap in each source."""

    def __init__(self, limit: int, *, holds: bool = False) -> None:
        """Begin empty; `limit` counts items."""
        self.limit = limit
        self.holds = holds
        self._items: deque[Message | Gap] = deque()
        self._missing: dict[tuple[bytes, GapReason], Gap] = {}

    def __len__(self) -> int:
        return len(self._items) + len(self._missing)

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another item."""
        return len(self._items) >= self.limit

    def put(self, item: Message | Gap) -> Message | None:
        """Put an item in, or account for it; return a message for which there was no room."""
        if isinstance(item, Gap):
            gap, message = item, None
        else:
            number = item.sequence
            gap = Gap(item.source.address, number, number, 1, GapReason.FULL)
            message = item
        if self.is_full and not (self.holds and message is not None):
            self._account(gap)
            return message
        self._settle()
        self._items.append(item)
        return None

    def take(self) -> Message | Gap | None:
        """Take out what is next, None if there is nothing."""
        if not self._items:
            self._settle()
        return self._items.popleft() if self._items else None

    def pick(self, wanted: Callable[[Message], bool]) -> list[Message]:
        """Take out the messages that are wanted, in their order; costs O(n)."""
        picked: list[Message] = []
        kept: deque[Message | Gap] = deque()
        for item in self._items:
            if isinstance(item, Message) and wanted(item):
                picked.append(item)
            else:
                kept.append(item)
        self._items = kept
        return picked

    def clear(self) -> list[Message]:
        """Empty it; return the messages that nobody has read."""
        messages = [item for item in self._items if isinstance(item, Message)]
        self._items.clear()
        self._missing.clear()
        return messages

    def _settle(self) -> None:
        """Put the gaps behind what was there before them."""
        self._items.extend(self._missing.values())
        self._missing.clear()

    def _account(self, gap: Gap) -> None:
        key = gap.source, gap.reason
        old = self._missing.get(key)
        if old is not None:
            first, last = min(old.first, gap.first), max(old.last, gap.last)
            gap = Gap(gap.source, first, last, old.count + gap.count, gap.reason)
        self._missing[key] = gap
