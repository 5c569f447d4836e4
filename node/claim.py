"""What the endpoints of this node have by the cluster's master, so that it can be stated again.

Invariants:

1. Nobody has anything without being entered; who exits has nothing any more.
2. Statements come in the order in which each may stand on those before it: endpoints, buses,
   names, matches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..proto.match import encode_what
from ..proto.operation import ClusterOp

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..proto.cluster import Withdrawn
    from ..proto.match import What

#: What each operation that gives something is taken back by.
UNDO: Final[Mapping[ClusterOp, ClusterOp]] = {
    ClusterOp.ENTER: ClusterOp.EXIT,
    ClusterOp.BIND: ClusterOp.UNBIND,
    ClusterOp.OWN: ClusterOp.RELEASE,
    ClusterOp.SUBSCRIBE: ClusterOp.UNSUBSCRIBE,
}


class Claim(NamedTuple):
    """One thing that an endpoint has; `op` gave it. `name` stands with OWN, `what` with SUBSCRIBE.

    ENTER has nothing but the endpoint: that it is known at all.
    """

    endpoint: int
    op: ClusterOp
    path: bytes = b""
    name: bytes = b""
    what: What = b""

    @classmethod
    def of(cls, withdrawn: Withdrawn) -> Claim:
        """Return what the master has taken."""
        one = withdrawn
        return cls(one.endpoint, one.op, one.path, one.name, one.what)

    @property
    def args(self) -> dict[str, Any]:
        """The arguments that name it, which are all of those that take it back."""
        args: dict[str, Any] = {"endpoint": self.endpoint}
        if self.op is not ClusterOp.ENTER:
            args["path"] = self.path
        if self.op is ClusterOp.OWN:
            args["name"] = self.name
        if self.op is ClusterOp.SUBSCRIBE:
            args["terms"], args["bits"] = encode_what(self.what)
        return args


class Claims:
    """All claims of a node, each with what else was said when it was made."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._by_op: dict[ClusterOp, dict[Claim, Mapping[str, Any]]] = {op: {} for op in UNDO}
        self._of: dict[int, dict[Claim, None]] = {}

    def __contains__(self, claim: Claim) -> bool:
        return claim in self._by_op[claim.op]

    def __len__(self) -> int:
        return sum(map(len, self._by_op.values()))

    def __iter__(self) -> Iterator[Claim]:
        """Iterate in the order in which they are stated."""
        for claims in self._by_op.values():
            yield from claims

    def get_more(self, claim: Claim) -> Mapping[str, Any]:
        """Return what was said beside `claim.args`, nothing if it is not there."""
        return self._by_op[claim.op].get(claim, {})

    def get_args(self, claim: Claim) -> dict[str, Any]:
        """Return all arguments by which it is stated."""
        return {**claim.args, **self.get_more(claim)}

    def put(self, claim: Claim, more: Mapping[str, Any]) -> None:
        """Note a claim, or note it anew; `more` is what was said beside `claim.args`."""
        self._by_op[claim.op][claim] = more
        self._of.setdefault(claim.endpoint, {})[claim] = None

    def drop(self, claim: Claim) -> None:
        """Forget a claim, with an endpoint all that it has; harmless if it is not there."""
        if claim.op is ClusterOp.ENTER:
            for one in self._of.pop(claim.endpoint, ()):
                del self._by_op[one.op][one]
        elif self._by_op[claim.op].pop(claim, None) is not None:
            del self._of[claim.endpoint][claim]
