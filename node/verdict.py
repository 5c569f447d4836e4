"""What the master has said that a principal may do, for as long as that holds.

Policies are about principals, so an answer that one endpoint of a user got holds for all of that
user on this node: also for one that comes while the master is away (D16).

Invariants:

1. An answer is forgotten when the policy changes.
2. An answer is about who the endpoint was that asked, and nobody else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..proto.match import encode_what

if TYPE_CHECKING:
    from ..proto.match import What
    from .answer import Verdict

#: Answers that are remembered; the oldest are forgotten first.
VERDICTS: Final = 65_536


class Question(NamedTuple):
    """May an endpoint do this on a bus? At most one of `address` and `what` says to whom.

    `action` is as in the policy: `own`, `send`, `receive`, `bind`, `monitor`.
    """

    endpoint: int
    action: str
    path: bytes
    address: bytes | None = None
    what: What | None = None

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of ASK."""
        terms, bits = (None, None) if self.what is None else encode_what(self.what)
        return {
            "endpoint": self.endpoint,
            "action": self.action,
            "path": self.path,
            "address": self.address,
            "terms": terms,
            "bits": bits,
        }


class Verdicts:
    """Answers that still hold, by principal."""

    def __init__(self, limit: int = VERDICTS) -> None:
        """Begin with none."""
        self._limit = limit
        self._known: dict[tuple[str, Question], Verdict] = {}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, who: str, question: Question) -> Verdict | None:
        """Return the answer, whichever endpoint of this principal asked; None if nobody did."""
        return self._known.get(_key(who, question))

    def put(self, who: str, question: Question, verdict: Verdict) -> None:
        """Remember an answer."""
        self._known[_key(who, question)] = verdict
        if len(self._known) > self._limit:
            del self._known[next(iter(self._known))]

    def clear(self) -> None:
        """The policy has changed: nothing holds any more."""
        self._known.clear()


def _key(who: str, question: Question) -> tuple[str, Question]:
    return who, question._replace(endpoint=0)
