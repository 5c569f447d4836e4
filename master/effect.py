"""What the core wants done, in its order: the shell applies each effect and decides nothing.

Invariants:

1. Within one `take_effects` all rows and audit entries stand before all frames, and belong to one
   transaction: what is told is written (case 28).
2. Bytes of a `Send` are shared among links: nobody changes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, TypeAlias

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


@dataclass(frozen=True, slots=True)
class Send:
    """Send a frame on the control stream of a link."""

    link: LinkId
    data: bytes


@dataclass(frozen=True, slots=True)
class Cut:
    """Say farewell and close a link; the core has forgotten it."""

    link: LinkId
    code: CloseCode
    text: str


Effect: TypeAlias = Write | Audit | Send | Cut
