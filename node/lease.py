"""The blocks of unique addresses that this node has leased (D3).

One block is enough for a life of the agent. One more is leased ahead, and written down as the
*spare*, so that an agent that begins while the master is away can choose addresses too.

Invariants:

1. Of a block that was the spare of a former life no address was chosen before.
2. A block is written down as no spare before its first address can be told.
3. What cannot be written down is given up: a spare that no later life would know of, and a block
   that a later life would take for its spare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..proto.errors import MasterLost
from .unique import Block
from .uplink_effect import BlockLost, Spare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .uplink_effect import UplinkEffect


class Leases:
    """The blocks of a node."""

    def __init__(
        self, spare: int | None, blocks: Iterable[int], effects: list[UplinkEffect]
    ) -> None:
        """Begin with what is left of a former life.

        Args:
            spare: The one that was leased ahead.
            blocks: Those of which endpoints still have addresses.
            effects: Where effects are appended.
        """
        self._effects = effects
        self._held = dict.fromkeys(blocks)
        self._block: Block | None = None
        self._former: int | None = None
        self._spare: int | None = None
        if spare is not None:
            self._held[spare] = None
            self._spare = spare
            self._use_spare()

    def __iter__(self) -> Iterator[int]:
        """Iterate over all that are held."""
        return iter(self._held)

    @property
    def is_complete(self) -> bool:
        """Whether there is a block to choose from, and a spare."""
        return self._block is not None and self._spare is not None

    @property
    def block(self) -> Block:
        """Where addresses are chosen from; MasterLost if there is no block yet."""
        if self._block is None:
            raise MasterLost("this node has leased no unique addresses of its cluster's master yet")
        return self._block

    def add(self, block: int) -> None:
        """Hold a block that was leased now."""
        self._held[block] = None
        if self._block is None:
            self._block = Block(block)
        else:
            self._set_spare(block)

    def lose(self, block: int) -> None:
        """A block is not this node's any more; harmless if it never was."""
        if block not in self._held:
            return
        del self._held[block]
        if block == self._spare:
            self._set_spare(None)
            return
        if self._block is not None and self._block.number == block:
            self._use_spare()
        self._effects.append(BlockLost(block))

    def give_up(self, spare: int | None) -> int | None:
        """What the effect `Spare` said last cannot be written down; return the block to give back.

        None: nobody has to be told of anything.
        """
        if spare is not None and spare == self._spare:
            self._spare = None
            del self._held[spare]
            return spare
        if spare is None and self._block is not None and self._block.number == self._former:
            block = self._block.number
            self.lose(block)
            return block
        return None

    def _use_spare(self) -> None:
        """Choose from the spare from now on, if there is one."""
        self._block = None if self._spare is None else Block(self._spare)
        # What stands in the file until it is written anew.
        self._former = self._spare
        self._set_spare(None)

    def _set_spare(self, block: int | None) -> None:
        self._spare = block
        self._effects.append(Spare(block))
