"""Credits: how much one flow may have unread, counted the same way at both ends.

A flow is a destination, or a body. All numbers only grow: what was sent, what was received, what
was released by the reader, and the limit up to which the sender may send. The receiver says the
limit, and never takes it back.

    limit = released + window                    the sender may send up to it: sent <= limit

Invariants:

1. `received - released <= window`: what a flow holds has that bound, whatever its peer does.
2. A flow that is not read uses up its own credit and nobody else's.
3. Both ends forget a flow only after all of it was released, so they begin anew alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from .frame import Broken
from .reason import Reason
from .settings import RETURN_PART


@dataclass(slots=True)
class Outflow:
    """What the sender knows of one flow."""

    limit: int
    sent: int = 0
    #: FORGET was sent, or the end of a body; nothing more may be sent.
    is_leaving: bool = False

    @property
    def room(self) -> int:
        """Cost that may be sent now."""
        return 0 if self.is_leaving else self.limit - self.sent

    def raise_limit(self, limit: int, window: int) -> None:
        """Take a limit that the receiver said."""
        if not self.limit <= limit <= self.sent + window:
            text = f"limit {limit} after {self.limit}, {self.sent} sent, window {window}"
            raise Broken(Reason.CREDIT, text)
        self.limit = limit


@dataclass(slots=True)
class Inflow:
    """What the receiver knows of one flow."""

    window: int
    limit: int
    received: int = 0
    released: int = 0
    is_leaving: bool = False

    @property
    def unread(self) -> int:
        """Cost that has arrived and was not released."""
        return self.received - self.released

    def charge(self, cost: int, what: str) -> None:
        """Count what has arrived."""
        if self.received + cost > self.limit:
            over = self.received + cost - self.limit
            raise Broken(Reason.CREDIT, f"{what} of {cost} is {over} above the credit")
        self.received += cost

    def release(self, cost: int) -> bool:
        """Count what was read; returns whether the sender should hear of it."""
        assert 0 <= cost <= self.unread, "released more than was received"
        self.released += cost
        return self.released + self.window - self.limit >= self.window // RETURN_PART

    def next_limit(self) -> int:
        """Raise the limit as far as it goes, and return it."""
        self.limit = self.released + self.window
        return self.limit

    @property
    def is_done(self) -> bool:
        """Whether the sender wants it forgotten, and everything was read."""
        return self.is_leaving and self.released == self.received
