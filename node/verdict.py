"""What the master has said that an endpoint may do, for as long as that holds.

Invariants:

1. An answer is forgotten when the policy changes, and when its endpoint goes or is somebody else.
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
    """Answers that still hold."""

    def __init__(self, limit: int = VERDICTS) -> None:
        """Begin with none."""
        self._limit = limit
        self._known: dict[Question, Verdict] = {}
        self._of: dict[int, set[Question]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, question: Question) -> Verdict | None:
        """Return the answer, None if it is not known."""
        return self._known.get(question)

    def put(self, question: Question, verdict: Verdict) -> None:
        """Remember an answer."""
        self._known[question] = verdict
        self._of.setdefault(question.endpoint, set()).add(question)
        if len(self._known) > self._limit:
            self._drop(next(iter(self._known)))

    def clear(self) -> None:
        """The policy has changed: nothing holds any more."""
        self._known.clear()
        self._of.clear()

    def drop_endpoint(self, endpoint: int) -> None:
        """An endpoint is gone, or is somebody else."""
        for question in self._of.pop(endpoint, ()):
            del self._known[question]

    def _drop(self, question: Question) -> None:
        del self._known[question]
        self._of[question.endpoint].discard(question)
        if not self._of[question.endpoint]:
            del self._of[question.endpoint]
