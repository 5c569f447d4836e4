"""What the core wants done, in its order: the shell applies each effect and takes no decision.

Invariants:

1. What a journal must know stands before all that tells a client of it, be it a frame or a message.
2. Descriptors of a `Send` belong to the shell from then on: it passes them on and closes them,
   also if the connection is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, NewType, TypeAlias

if TYPE_CHECKING:
    from ..proto.frames import Frame

#: The number of a connection, chosen by the door and never used twice.
ConnectionId = NewType("ConnectionId", int)


class Kind(IntEnum):
    """What an entry of the journal is about; `owner` and `key` name one among its kind."""

    #: The agent itself: owner 0, no key.
    AGENT = 0
    #: A bus: its number, no key.
    BUS = 1
    #: An endpoint: its number, no key.
    ENDPOINT = 2
    #: An address: number of the endpoint, the address.
    ADDRESS = 3
    #: A match: number of the endpoint, number of the match as 8 bytes, big endian.
    MATCH = 4
    #: A grant to send: number of the endpoint, number of the grant as 8 bytes, big endian.
    SEND = 5
    #: Where it may send on a bus of the cluster: number of the endpoint, no key.
    REACH = 6


@dataclass(frozen=True, slots=True)
class Send:
    """Send a frame, with descriptors."""

    connection: ConnectionId
    frame: Frame
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Cut:
    """Close a connection after what was sent; the core has forgotten it."""

    connection: ConnectionId


@dataclass(frozen=True, slots=True)
class Deliver:
    """Deliver a message with control items, which are in effect; see `SwitchPort.deliver`."""

    source: int
    target: int
    src: bytes
    dst: bytes
    ctl: bytes
    body: bytes
    serial: int
    reply_to: int
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class Notify:
    """Put a notice of what is in effect into rings; see `SwitchPort.notify`."""

    endpoints: tuple[int, ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Signal:
    """Tell the agent of another node, behind everything that goes there (D15)."""

    trunk: int
    data: bytes


class Put(NamedTuple):
    """Write an entry of the journal, or write it anew; `value` is msgpack."""

    kind: Kind
    owner: int
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Drop:
    """Delete an entry of the journal; without a key all of that kind and owner."""

    kind: Kind
    owner: int
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Audit:
    """Write into the log who was given what a monitor sees (D19)."""

    text: str


Effect: TypeAlias = Send | Cut | Deliver | Notify | Signal | Put | Drop | Audit
