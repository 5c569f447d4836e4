"""Unread messages: senders are told of what a client took from its ring and nobody will read (D20).

What still lies in the ring when an endpoint goes is told by the registry. Senders on other nodes
are told by way of the lane, which puts together what it can, as it does for rings.

Invariants:

1. Senders are not told more often than the endpoint was sent messages, whatever a client makes up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..proto.errors import InvalidArgument, NoBus, NoSuchEndpoint
from .control import find_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .endpoint import Endpoint
    from .port import SwitchPort
    from .registry import Registry


def tell_unread(
    registry: Registry,
    switch: SwitchPort,
    endpoint: Endpoint,
    rows: Sequence[tuple[bytes, int, int, int]],
    reason: str,
) -> None:
    """Tell senders which of their messages an endpoint will not read.

    Args:
        registry: Knows the senders.
        switch: Knows how many messages the endpoint was sent.
        endpoint: The receiver.
        rows: Of each sender its address, the first and the last number, and how many.
        reason: Why, for people.

    Raises:
        NoBus: It was sent nothing. ENOENT.
        InvalidArgument: There are more than it was sent. EINVAL.
    """
    bus = endpoint.bus
    if bus is None:
        raise NoBus(f"endpoint {endpoint.id} is on no bus, and was sent nothing")
    count = endpoint.unread_count + sum(row[3] for row in rows)
    if count > (received := switch.stats(endpoint.id)["received"]):
        raise InvalidArgument(f"{count} unread messages of {received} that were received")
    endpoint.unread_count = count
    for source, first, last, told in rows:
        try:
            sender = find_target(bus, source)
        except NoSuchEndpoint:
            node = registry.cluster and registry.cluster.find_node(bus, source)
            if node:
                switch.give_back(node.number, endpoint.id, source, (first, last), told)
            # Else nobody is there any more whom it could concern.
        else:
            registry.tell_unread(endpoint, sender, (first, last, told), reason)
