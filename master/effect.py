"""What the core wants done, in its order: the shell applies each effect and decides nothing.

Invariants:

1. Within one `take_effects` all rows and audit entries come first, and belong to one transaction:
   what is told is written (case 28). Then come frames and cuts in their order, and a `Trust`.
2. Bytes of a `Send` are shared among links: nobody changes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol, TypeAlias

if TYPE_CHECKING:
    from ..proto.errors import CloseCode

#: The number of a link, chosen by the shell and never used twice.
LinkId = NewType("LinkId", int)


@dataclass(frozen=True, slots=True)
class Write:
    """Write rows of the journal; those without a value are deleted."""

    rows: tuple[tuple[bytes, bytes | None], ...]


@dataclass(frozen=True, slots=True)
class Audit:
    """Something privileged was done or refused.

    `actor` is who wanted it (`node/NAME`, a principal, `operator`, `master`), `subject` what it was
    about, `detail` the rule of the policy that allowed it, or why it was refused.
    """

    utc: float
    actor: str
    action: str
    subject: str
    is_done: bool
    detail: str = ""


class Note(Protocol):
    """Takes what is to stand in the audit; see `Audit`."""

    def __call__(
        self, actor: str, action: str, subject: str, is_done: bool, detail: str = "", /
    ) -> None:
        """Note it."""


@dataclass(frozen=True, slots=True)
class Trust:
    """Links with these serial numbers are refused, and cut if they live (case 35)."""

    denied: frozenset[int]


@dataclass(frozen=True, slots=True)
class Send:
    """Send a frame of `proto/cluster.py` to whoever is on a link."""

    link: LinkId
    data: bytes


@dataclass(frozen=True, slots=True)
class Cut:
    """Close a link, and tell the peer why; the core has forgotten it."""

    link: LinkId
    code: CloseCode
    text: str


Effect: TypeAlias = Write | Audit | Trust | Send | Cut
