"""What a bus's master asks the policy of the application, and what a policy is without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from ..proto.request import (
    Join,
    Leave,
    MonitorRequest,
    NoticesRequest,
    Own,
    Publish,
    Release,
    Request,
    RequestKind,
    Subscribe,
    Unsubscribe,
)
from .words import show_request

if TYPE_CHECKING:
    from ..proto.address import BusAddress
    from ..proto.control import Identity
    from ..proto.match import What

_KINDS: Final[Mapping[type[Request], RequestKind]] = {
    Join: RequestKind.JOIN,
    Own: RequestKind.OWN,
    Release: RequestKind.RELEASE,
    Subscribe: RequestKind.SUBSCRIBE,
    Unsubscribe: RequestKind.UNSUBSCRIBE,
    Publish: RequestKind.PUBLISH,
    NoticesRequest: RequestKind.NOTICES,
    MonitorRequest: RequestKind.MONITOR,
    Leave: RequestKind.LEAVE,
}

#: What a policy answers: True grants; False, or a text that says why, refuses.
Verdict: TypeAlias = bool | str


@dataclass(frozen=True, slots=True)
class Question:
    """What a policy is asked: may this endpoint have what it asks for?

    `address` is the unique address of the asker, or the provisional one while it has not joined;
    `identity` is attested by its agent (D17).
    """

    request: Request
    identity: Identity
    address: BusAddress

    @property
    def kind(self) -> RequestKind:
        """What sort of request it is."""
        return _KINDS[type(self.request)]

    def __str__(self) -> str:
        """Return who asks for what, for people."""
        return f"{show_request(self.request)} by {self.address} ({self.identity.principal})"


Policy: TypeAlias = Callable[[Question], Verdict]


def same_user(uid: int, node: str) -> Policy:
    """Return the policy of a bus without an `authorize`: the master's own user may do everything.

    Everything but reading what is meant for others: no monitor (D19), and no subscription without
    terms or bits (D9). Other users, and the same number on another node (D17), may do nothing.
    """

    def judge(question: Question) -> Verdict:
        identity = question.identity
        if (identity.uid, identity.node) != (uid, node):
            return f"uid {identity.uid} of node {identity.node!r} is not the master's user"
        return cluster_decides(question)

    return judge


def cluster_decides(question: Question) -> Verdict:
    """Allow what the policy of the cluster has let pass; the policy of a bus of the cluster.

    But no reading of what is meant for others, as in `same_user`.
    """
    if isinstance(question.request, MonitorRequest):
        return "a monitor needs a master whose authorize callback allows it"
    if isinstance(question.request, Subscribe) and _is_everything(question.request.what):
        return "hearing everything needs a master whose authorize callback allows it"
    return True


def _is_everything(what: What) -> bool:
    return not (any(what) if isinstance(what, bytes) else what)
