"""Passes on what two nodes say to each other that cannot reach each other.

The master looks at nothing but the first byte, for whom it is and from whom. Credit goes back to
a sender only when its message has gone on, so what lies here is bounded by the credit of each pair,
and a node that does not read holds up nobody but those who send to it.

Invariants:

1. Messages of a pair go on in their order, once.
2. When one of a pair has no link any more, the other is told.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ..link.frame import Channel
from ..proto import relay
from ..proto.relay import RelayKind

if TYPE_CHECKING:
    from ..link.link import Link


class Relay:
    """The pairs of nodes that speak by way of this master."""

    def __init__(self) -> None:
        """Begin without nodes."""
        self._links: dict[int, Link] = {}
        # What waits for room on the second link: message and the credit of the first, by pair.
        self._waiting: dict[tuple[int, int], deque[tuple[bytes, int]]] = {}
        self._pairs: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        """How many pairs there are, in each direction."""
        return len(self._pairs)

    def add(self, node: int, link: Link) -> None:
        """A node has a link; a former one is forgotten."""
        self.drop(node)
        self._links[node] = link

    def drop(self, node: int, link: Link | None = None) -> None:
        """A node has this link no more; harmless if it has another, or none."""
        if node not in self._links or (link is not None and self._links[node] is not link):
            return
        del self._links[node]
        for pair in [pair for pair in self._pairs if node in pair]:
            self._pairs.discard(pair)
            self._forget(pair)
            other = pair[0] if pair[1] == node else pair[1]
            self._close(other, node, f"node {node} has no link to the master any more")

    def receive(self, source: int, target: int, data: bytes, cost: int) -> None:
        """Pass a message on.

        Raises:
            RemoteProtocolError: It is none.
        """
        kind, _ = relay.decode(data)
        here, there = self._links[source], self._links.get(target)
        pair = (source, target)
        if there is None or source == target:
            here.release(Channel.DATA, target, cost)
            if kind is not RelayKind.CLOSED:
                self._close(source, target, f"node {target} has no link to the master")
            return
        if kind is RelayKind.CLOSED:
            self._pairs -= {pair, pair[::-1]}
        else:
            self._pairs |= {pair, pair[::-1]}
        waiting = self._waiting.get(pair)
        if waiting or not there.send(Channel.DATA, source, data):
            self._waiting.setdefault(pair, deque()).append((data, cost))
        else:
            here.release(Channel.DATA, target, cost)

    def handle_room(self, target: int, source: int) -> None:
        """A node has room again for messages of another."""
        waiting = self._waiting.get((source, target))
        here, there = self._links.get(source), self._links.get(target)
        while waiting and there is not None and there.send(Channel.DATA, source, waiting[0][0]):
            _, cost = waiting.popleft()
            if here is not None:
                here.release(Channel.DATA, target, cost)
        if not waiting:
            self._waiting.pop((source, target), None)

    def _forget(self, pair: tuple[int, int]) -> None:
        """Give the credit back of what will not go on."""
        source, target = pair
        here = self._links.get(source)
        for _, cost in self._waiting.pop(pair, ()):
            if here is not None and not here.is_down:
                here.release(Channel.DATA, target, cost)

    def _close(self, node: int, other: int, text: str) -> None:
        link = self._links.get(node)
        if link is not None and link.is_up:
            # Without room it is not told, and finds out by silence.
            link.send(Channel.DATA, other, relay.encode_closed(text))
