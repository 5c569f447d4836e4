"""What the operator asks at the master's own door: tokens, certificates, and how things are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ..proto.operation import ClusterOp
from ..proto.record import NodeState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .entity import Node
    from .issuer import Issuer
    from .ledger import Ledger
    from .office import Office
    from .registry import Registry

#: Nodes in one answer: their places may be long, and an answer is one frame.
ROWS: Final = 16


class Desk:
    """Answers the operator."""

    def __init__(self, ledger: Ledger, registry: Registry, office: Office, issuer: Issuer) -> None:
        """Take what there is to tell of."""
        self._ledger, self._registry = ledger, registry
        self._office, self._issuer = office, issuer

    def carry_out(self, op: ClusterOp, args: Mapping[str, Any], now_utc: float) -> object:
        """Do what the office does for the operator; BusError if it refuses."""
        match op:
            case ClusterOp.TOKEN:
                ephemeral = bool(args.get("is_ephemeral"))
                return self._office.make_token(
                    args.get("node"), args.get("life_s"), ephemeral, now_utc
                )
            case ClusterOp.ISSUE:
                return self._office.issue(
                    args["principal"], args["csr"], args.get("life_s"), now_utc
                )
        raise AssertionError(f"{op.name} is not carried out here")

    def get_status(self, epoch: int, policy_number: int, link_count: int) -> object:
        """Return how things are."""
        registry, nodes = self._registry, self._registry.nodes.values()
        return {
            "cluster": self._issuer.cluster,
            "epoch": epoch,
            "version": self._ledger.table.version,
            "policy": policy_number,
            "nodes": len(nodes),
            "live": sum(1 for node in nodes if node.state is NodeState.LIVE),
            "links": link_count,
            "endpoints": sum(len(node.endpoints) for node in nodes),
            "buses": len(registry.buses),
            "names": sum(len(bus.names) for bus in registry.buses.values()),
            "matches": sum(len(node.wishes) for node in nodes),
            "blocks": len(registry.leases),
            "tokens": self._office.token_count,
            "denied": len(self._office.denied),
            "issuing_until": int(self._issuer.issuing_until_utc),
        }

    def list_nodes(self, after: str, get_lag: Callable[[Node], int | None]) -> object:
        """Return nodes, from behind a name on, and the name from which to go on."""
        names = sorted(name for name in self._registry.nodes if name > after)
        shown = names[:ROWS]
        rows = []
        for name in shown:
            node = self._registry.nodes[name]
            rows.append(
                {
                    "node": name,
                    "number": node.number,
                    "state": node.state.name.lower(),
                    # Versions of the table that it has not acknowledged; None: it has no link.
                    "lag": get_lag(node),
                    "endpoints": len(node.endpoints),
                    "matches": len(node.wishes),
                    "blocks": len(self._registry.leases.get_blocks(node.number)),
                    "until": node.until_utc,
                    "places": list(node.places),
                }
            )
        return {"rows": rows, "next": shown[-1] if len(names) > len(shown) else None}
