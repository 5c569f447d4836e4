"""What has arrived and is not read yet, bounded, with an exact account of what found no room.

A backlog that `holds` loses nothing: when it `is_full` its owner stops reading the ring, so that
the switch does what it does with a full receiver. The others hold up nobody: what does not fit
becomes a `Gap` for each source, with the numbers of the messages and how many they were. `Newest`
keeps of each stream only the newest message, as a subscription with `Overflow.CONFLATE` wants it.

Invariants:

1. What is taken out comes in the order of its arrival, and a gap before every later item.
2. Items taken out and the counts of gaps together are what was put in, exactly; in `Newest` also
   what newer ones replaced.
3. There are at most `limit` items, but for gaps (one a source), and for what the owner of one
   that holds puts in regardless.
"""

from __future__ import annotations

from collections import OrderedDict, deque
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
        self._append(item)
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
        for gap in self._missing.values():
            self._append(gap)
        self._missing.clear()

    def _append(self, item: Message | Gap) -> None:
        self._items.append(item)

    def _account(self, gap: Gap) -> None:
        key = gap.source, gap.reason
        old = self._missing.get(key)
        if old is not None:
            first, last = min(old.first, gap.first), max(old.last, gap.last)
            gap = Gap(gap.source, first, last, old.count + gap.count, gap.reason)
        self._missing[key] = gap


class Newest(Backlog):
    """A backlog that keeps the newest message of each stream: of one sender about one thing.

    `limit` counts streams; a message of one too many becomes a gap. All calls cost O(1).
    """

    def __init__(self, limit: int) -> None:
        """Begin empty; it holds up nobody."""
        super().__init__(limit)
        self._newest: OrderedDict[object, Message | Gap] = OrderedDict()
        self._gap_count = 0

    def __len__(self) -> int:
        return len(self._newest) + len(self._missing)

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another stream."""
        return len(self._newest) - self._gap_count >= self.limit

    def put(self, item: Message | Gap) -> Message | None:
        """Put an item in, in place of the older one of its stream."""
        if isinstance(item, Message):
            self._newest.pop(_stream(item), None)
        return super().put(item)

    def take(self) -> Message | Gap | None:
        """Take out what is next, None if there is nothing."""
        if not self._newest:
            self._settle()
        if not self._newest:
            return None
        _, item = self._newest.popitem(last=False)
        self._gap_count -= isinstance(item, Gap)
        return item

    def clear(self) -> list[Message]:
        """Empty it; return the messages that nobody has read."""
        messages = [item for item in self._newest.values() if isinstance(item, Message)]
        self._newest.clear()
        self._gap_count = 0
        self._missing.clear()
        return messages

    def _append(self, item: Message | Gap) -> None:
        if isinstance(item, Message):
            self._newest[_stream(item)] = item
        else:
            # A gap stands for itself: nothing replaces it.
            self._newest[object()] = item
            self._gap_count += 1


def _stream(message: Message) -> object:
    return message.source.address, message.destination, message.terms
