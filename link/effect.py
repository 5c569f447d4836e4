"""What the core of a link wants done, and what it tells its owner, in one order.

Effects for the carrier: `Write`, `Ping`, `Cut`. The others are events for the owner of the link.

Invariants:

1. Messages of one channel come in the order in which they were sent. A body's pieces are in order
   too, between its `BodyOpened` and its `BodyEnded`, but in no order to anything else.
2. `Up` comes before every other event, `Down` after every other, each at most once.
3. Every `Message` and `BodyReceived` takes credit until the owner gives it back (`release`,
   `release_body`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .frame import Channel
    from .reason import Reason


@dataclass(frozen=True, slots=True)
class Write:
    """Append bytes to one of the own streams; `end`: it has no more.

    Streams are numbered from 0 in each direction: the channels first, then one for each body.
    """

    stream: int
    data: bytes
    end: bool = False


@dataclass(frozen=True, slots=True)
class Ping:
    """Try the carrier in both directions, and tell `receive_echo` of the answer.

    `is_urgent`: nothing has come back for too long, so it must not wait behind what was sent.
    """

    number: int
    is_urgent: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """End the carrier, and tell the peer why; the core has ended."""

    reason: Reason
    text: str


@dataclass(frozen=True, slots=True)
class Up:
    """The peer understands us, and we it; `boot` is new in each life of its process."""

    boot: bytes
    version: int


@dataclass(frozen=True, slots=True)
class Message:
    """A message; `data` is the owner's to keep."""

    channel: Channel
    destination: int
    data: bytes
    cost: int


@dataclass(frozen=True, slots=True)
class BodyOpened:
    """A body begins. `body` names it on this link, `label` was agreed above the link; `size` is
    what its sender means to send.
    """

    body: int
    label: int
    size: int


@dataclass(frozen=True, slots=True)
class BodyReceived:
    """The next piece of a body; it costs its length."""

    body: int
    data: bytes


@dataclass(frozen=True, slots=True)
class BodyEnded:
    """A body has ended; not `is_whole`: its sender gave up, and the pieces mean nothing."""

    body: int
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Room:
    """What was refused to this destination would be taken now."""

    channel: Channel
    destination: int


@dataclass(frozen=True, slots=True)
class BodyRoom:
    """What was refused would be taken now: the next piece of a body, or, with None, a new body."""

    body: int | None


@dataclass(frozen=True, slots=True)
class Silent:
    """Nothing confirms any more that the peer lives; the link stays for the idle time (D16)."""


@dataclass(frozen=True, slots=True)
class Heard:
    """The peer is there again, and nothing was lost."""


@dataclass(frozen=True, slots=True)
class Down:
    """The link has ended; what the peer had not read yet may be lost.

    Attributes:
        reason: The rule.
        text: For the operator; of the peer if `is_remote`, so it may be anything that is text.
        is_remote: Whether the peer ended it.
    """

    reason: Reason
    text: str
    is_remote: bool

    def __str__(self) -> str:
        """Return the line for the log."""
        return f"{self.reason.rule}: {self.text!a}{' (by the peer)' if self.is_remote else ''}"


Event: TypeAlias = (
    Message | BodyOpened | BodyReceived | BodyEnded | Room | BodyRoom | Silent | Heard | Down
)
Effect: TypeAlias = Write | Ping | Cut | Up | Event
