"""Blocks of unique addresses: none is ever leased twice in an epoch (D3).

A block is a number; its holder grants `BLOCK.1`, `BLOCK.2` and so on without a word with the
master. A block that comes back is spent.

Invariants:

1. `take` returns each number once, whatever becomes of its holder.
2. A block has one holder or none.
"""

from __future__ import annotations

from typing import Final

#: How far a master that was put back from a copy may be behind: more blocks than nodes lease in
#: years, and no node can use the numbers up by claiming what nobody has leased.
SKIP_MAX: Final = 65_536


class Leases:
    """Who holds which block; holders are numbers of nodes."""

    def __init__(self, last: int = 0) -> None:
        """Begin after the last block that was ever leased."""
        self._last = last
        self._holders: dict[int, int] = {}
        self._blocks: dict[int, set[int]] = {}

    @property
    def last(self) -> int:
        """The last block that was ever leased, 0 for none; it must survive the master."""
        return self._last

    def __len__(self) -> int:
        return len(self._holders)

    def take(self, node: int) -> int:
        """Lease a block that nobody ever had."""
        self._last += 1
        self.restore(self._last, node)
        return self._last

    def skip(self, block: int) -> bool:
        """A node has this block of a master that was ahead of this one: lease it to nobody again.

        Returns whether that changes anything.
        """
        is_ahead = 0 < block - self._last <= SKIP_MAX
        if is_ahead:
            self._last = block
        return is_ahead

    def restore(self, block: int, node: int) -> None:
        """Note a lease that exists already."""
        assert block not in self._holders, f"block {block} is leased"
        assert 0 < block <= self._last, f"block {block} was never leased"
        self._holders[block] = node
        self._blocks.setdefault(node, set()).add(block)

    def give_back(self, block: int) -> None:
        """End a lease; the block is spent."""
        node = self._holders.pop(block)
        self._blocks[node].discard(block)
        if not self._blocks[node]:
            del self._blocks[node]

    def get_holder(self, block: int) -> int | None:
        """Return the node that holds a block, None if nobody does."""
        return self._holders.get(block)

    def get_blocks(self, node: int) -> tuple[int, ...]:
        """Return the blocks of a node, ascending."""
        return tuple(sorted(self._blocks.get(node, ())))

    def drop_holder(self, node: int) -> tuple[int, ...]:
        """End all leases of a node, and return them."""
        blocks = self.get_blocks(node)
        for block in blocks:
            del self._holders[block]
        self._blocks.pop(node, None)
        return blocks
