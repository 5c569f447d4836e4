"""Unique addresses: those that the agent chooses, and those that a bus has granted (D3).

A block is a number that no other bus and no former agent has; the agent chooses `BLOCK.1`,
`BLOCK.2` and so on. Masters that choose themselves count too: `1.1`, `1.2`, `1.3`. So an address is
split into a prefix and the number at its end, and the numbers of a prefix are kept as spans: a
counter costs one span, however far it runs.

Invariants:

1. `spend` is true at most once for an address.
2. There are never more than `SPANS_MAX` spans; who scatters addresses beyond that gets no more.
3. Spans of one prefix ascend and never touch.
4. A block gives each of its addresses once.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Final

#: Spans of one bus: scattered addresses of a hostile master cost it about 8 MiB at most.
SPANS_MAX: Final = 65_536

# The shortest prefix whose rest is a number without leading zeros, so that each address is split
# in one way and each pair stands for one address.
_SPLIT: Final = re.compile(rb"(.*?)(0|[1-9][0-9]{0,17})?", re.DOTALL)


def _split(address: bytes) -> tuple[bytes, int]:
    """Return prefix and number; -1 for an address that ends in no number."""
    found = _SPLIT.fullmatch(address)
    assert found is not None, "the prefix may be the whole address"
    return found[1], -1 if found[2] is None else int(found[2])


class Block:
    """The unique addresses of one block, in their order; there is always a next one."""

    __slots__ = ("_last", "number")

    def __init__(self, number: int) -> None:
        """Begin a block, from which nothing was given."""
        self.number = number
        self._last = 0

    def take(self) -> bytes:
        """Return the next address."""
        self._last += 1
        return b"%d.%d" % (self.number, self._last)


class SpentAddresses:
    """The unique addresses that were granted on one bus in this epoch."""

    __slots__ = ("_count", "_spans")

    def __init__(self) -> None:
        # First and last number of each span, flat and ascending, by prefix.
        self._spans: dict[bytes, list[int]] = {}
        self._count = 0

    def __contains__(self, address: bytes) -> bool:
        prefix, number = _split(address)
        spans = self._spans.get(prefix, [])
        place = bisect_right(spans, number)
        # Behind an odd count of ends lies the inside of a span; or the number is its last.
        return place % 2 == 1 or (place > 0 and spans[place - 1] == number)

    @property
    def is_full(self) -> bool:
        """Whether an address might not find room."""
        return self._count >= SPANS_MAX

    def spend(self, address: bytes) -> bool:
        """Note that an address is granted; tell whether that is the first time."""
        if address in self:
            return False
        prefix, number = _split(address)
        spans = self._spans.setdefault(prefix, [])
        place = bisect_right(spans, number)
        joins_before = place > 0 and spans[place - 1] == number - 1
        joins_behind = place < len(spans) and spans[place] == number + 1
        if joins_before and joins_behind:
            del spans[place - 1 : place + 1]
            self._count -= 1
        elif joins_before:
            spans[place - 1] = number
        elif joins_behind:
            spans[place] = number
        else:
            spans[place:place] = [number, number]
            self._count += 1
        return True
