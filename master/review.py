"""What a new policy takes from those who have it.

Shadows, endpoints that their node has not stated yet, are judged when it states them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..proto.cluster import Withdrawn
from ..proto.operation import ClusterOp
from .policy import Action

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .entity import Endpoint
    from .policy import Policy
    from .registry import Registry


def review(registry: Registry, policy: Policy) -> Iterator[tuple[Endpoint, Withdrawn]]:
    """Take away what a policy does not allow; yield who is to be told what."""
    for node in list(registry.nodes.values()):
        for endpoint in list(node.endpoints.values()):
            if endpoint.principal:
                yield from _review_one(registry, policy, endpoint)


def _review_one(
    registry: Registry, policy: Policy, endpoint: Endpoint
) -> Iterator[tuple[Endpoint, Withdrawn]]:
    principal, number = endpoint.principal, endpoint.number
    for bus_number in sorted(endpoint.buses):
        bus = registry.bus_numbers[bus_number]
        path = bus.record.path
        address = bus.record.address
        assert address is not None, "a bus that is bound has the address of its master"
        decision = policy.decide(Action.BIND, principal, path)
        if decision.is_allowed:
            decision = policy.decide(Action.OWN, principal, path, address)
        if not decision.is_allowed:
            registry.unbind(bus)
            yield endpoint, Withdrawn(number, ClusterOp.BIND, path, reason=decision.reason)
    for bus_number, name in sorted(endpoint.claims):
        bus = registry.bus_numbers[bus_number]
        path = bus.record.path
        decision = policy.decide(Action.OWN, principal, path, name)
        if not decision.is_allowed:
            registry.release(endpoint, bus, name)
            yield endpoint, Withdrawn(number, ClusterOp.OWN, path, name, reason=decision.reason)
    for bus, what in registry.get_wishes(endpoint):
        path = bus.record.path
        decision = policy.decide(Action.RECEIVE, principal, path, what, is_multicast=True)
        if not decision.is_allowed:
            registry.unsubscribe(endpoint, bus, what)
            told = Withdrawn(number, ClusterOp.SUBSCRIBE, path, what=what, reason=decision.reason)
            yield endpoint, told
