"""Why a link ended: the code goes over the wire, the rule into log and audit.

Invariants:

1. A number that was ever on the wire keeps its meaning.
"""

from __future__ import annotations

from enum import IntEnum

from ..proto.errors import IdentityError, LinkError


class Reason(IntEnum):
    """Why a link ended."""

    #: In good order: everything sent was read by the peer's end of the link.
    CLOSED = 0
    #: Bytes that are no frame.
    MALFORMED = 1
    #: More than a limit allows: size, number of destinations, of bodies.
    LIMIT = 2
    #: No version that both speak.
    VERSION = 3
    #: A frame that may not come now or not on this channel.
    ORDER = 4
    #: More was sent to a destination than its credit.
    CREDIT = 5
    #: The member goes down; it may come back.
    GOING_DOWN = 6
    #: A newer link to the same peer takes its place.
    REPLACED = 7
    #: The certificate was revoked, or is valid no longer.
    REVOKED = 8
    #: The identity is good, but policy does not admit it.
    NOT_ADMITTED = 9
    #: No sign of the peer for the idle time.
    SILENT = 10
    #: The carrier failed below the link: an address, a handshake, a protocol of its own.
    CARRIER = 11
    #: The certificate of one side was refused in the handshake.
    IDENTITY = 12
    #: A message with a source that is not the peer's (D6).
    SOURCE = 13

    @property
    def rule(self) -> str:
        """The name of the rule, as it stands in log and audit."""
        return self.name.lower().replace("_", "-")

    @property
    def is_retryable(self) -> bool:
        """Whether the same attempt may succeed later without anybody's help."""
        return self not in _FINAL


_FINAL = frozenset({Reason.VERSION, Reason.REVOKED, Reason.NOT_ADMITTED, Reason.IDENTITY})


def reason_of(code: int) -> Reason:
    """Return the reason of a code; one that a newer peer knows and we do not is CARRIER."""
    try:
        return Reason(code)
    except ValueError:
        return Reason.CARRIER


def error_of(reason: Reason, text: str) -> LinkError:
    """Return what a caller gets of whose call nothing came."""
    if reason is Reason.IDENTITY:
        return IdentityError(text)
    return LinkError(text, retryable=reason.is_retryable)
