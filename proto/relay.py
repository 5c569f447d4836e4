"""What two nodes say to each other by way of the master, when they cannot reach each other.

The link to the master has a destination for each other node, by its number, on the channel of
data. A message there is one byte that says what it is, and then what would have been a message on
a link of the two:

    1 GREETING   HELLO of the lane (`peer.py`)
    2 BATCH      records of the lane, opaque here and to the master
    3 FRAME      another frame of `peer.py`
    4 CLOSED     UTF-8 text: there is no such link any more; from the master if nobody is there

Invariants:

1. `decode` raises `RemoteProtocolError` and nothing else.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from .errors import RemoteProtocolError
from .limits import REASON_BYTES
from .text import clip


class RelayKind(IntEnum):
    """What a message is."""

    GREETING = 1
    BATCH = 2
    FRAME = 3
    CLOSED = 4


_KINDS: Final = {bytes([kind]): kind for kind in RelayKind}


def encode(kind: RelayKind, data: bytes | memoryview) -> bytes:
    """Return the message."""
    return bytes([kind]) + data


def encode_closed(text: str) -> bytes:
    """Return the message that ends a link; the text is cut to what a reason may have."""
    return encode(RelayKind.CLOSED, clip(text, REASON_BYTES).encode())


def decode(message: bytes) -> tuple[RelayKind, bytes]:
    """Return kind and content of a message.

    Raises:
        RemoteProtocolError: It is of no kind.
    """
    kind = _KINDS.get(message[:1])
    if kind is None:
        raise RemoteProtocolError(f"relayed message of an unknown kind {message[:1]!a}")
    return kind, message[1:]
