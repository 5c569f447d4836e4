"""What the control link to the master wants done, and what it tells its owner, in one order.

Invariants:

1. What a change of the table demands is done before the effect that follows it: the master counts
   on that from the acknowledgement on, as the subscribe barrier does.
2. Each ticket is answered once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from ..proto.frames import Result
    from ..proto.mirror import Change
    from .claim import Claim
    from .verdict import Question


@dataclass(frozen=True, slots=True)
class Say:
    """Send a frame on the link to the master: channel TABLES, destination 0."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Hang:
    """Close the link, and say why; the uplink has forgotten it."""

    text: str
    #: Whether the master has broken a rule.
    is_violation: bool = True


@dataclass(frozen=True, slots=True)
class Answered:
    """The outcome of a call; its serial is the ticket."""

    result: Result


@dataclass(frozen=True, slots=True)
class Changed:
    """Records of the mirror have changed: routes, lanes, revocations follow from them."""

    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """The master has taken something from an endpoint; with ENTER, all that it had (D15)."""

    claim: Claim
    reason: str


@dataclass(frozen=True, slots=True)
class Refuted:
    """What was allowed by an old answer, while the master was away, is not allowed now (D16)."""

    question: Question
    reason: str


@dataclass(frozen=True, slots=True)
class BlockLost:
    """The addresses of a block are no longer this node's."""

    block: int


@dataclass(frozen=True, slots=True)
class Spare:
    """Write down which block is leased and was never used, None for none.

    What was written down last is what the next life of the agent may begin with.
    """

    block: int | None


@dataclass(frozen=True, slots=True)
class Renewed:
    """A new certificate for the key of the last request: DER, leaf first; until when it is good."""

    chain: tuple[bytes, ...]
    until_utc: int


@dataclass(frozen=True, slots=True)
class Stated:
    """All was stated on this link, and the table is as new as that: what is not in it is nowhere.

    A table that is caught up with from an old snapshot was true once, and is not before this.
    """


@dataclass(frozen=True, slots=True)
class Turned:
    """The master is here, or is lost, and why (D16)."""

    is_here: bool
    text: str


UplinkEffect: TypeAlias = (
    Say
    | Hang
    | Answered
    | Changed
    | Taken
    | Refuted
    | BlockLost
    | Spare
    | Renewed
    | Stated
    | Turned
)
