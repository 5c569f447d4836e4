"""What was read from the ring and nobody will read: what the senders are to be told (D20).

Invariants:

1. Each message that was added is counted once in what is taken out, in a row of its sender.
2. Numbers of a row ascend: when a sender's agent has begun anew, it counts anew, in another row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from ..proto.address import BusAddress
    from .message import Message

    #: Of the messages of one sender with these numbers, first and last, so many.
    UnreadRow: TypeAlias = tuple[BusAddress, int, int, int]


class Unread:
    """Messages that nobody will read, by the reason and by the sender. All calls are cheap."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[BusAddress, list[UnreadRow]]] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, message: Message, reason: str) -> None:
        """Note a message; `reason` is for people."""
        rows = self._rows.setdefault(reason, {}).setdefault(message.source, [])
        first = last = message.sequence
        count = 1
        if rows and rows[-1][2] < last:
            _, first, _, before = rows.pop()
            count += before
        rows.append((message.source, first, last, count))

    def take(self) -> tuple[str, list[UnreadRow]]:
        """Return one of the reasons with its rows, and forget them; only if there is one."""
        reason, rows = self._rows.popitem()
        return reason, [row for some in rows.values() for row in some]
