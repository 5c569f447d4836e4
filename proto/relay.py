"""What two nodes say to each other by way of the master, when they cannot reach each other.

The link to the master has a destination for each other node, by its number, on the channel of
data. A message there is one byte that says what it is, and then what would have been a message on
a link of the two:

    1 GREETING   HELLO of the lane (`peer.py`)
    2 BATCH      records of the lane, opaque here and to the master
    3 FRAME      another frame of `peer.py`
    4 CLOSED     UTF-8 text: there is no such link any more; from the master if nobody is there
    5 OPENED     u64 body, u64 label, u64 size: a large body begins; `body` names it on the link
    6 PIECE      u64 body, bytes: the next of it; where its size is reached, it ends
    7 CUT        u64 body: it ends early
    8 READ       u64 bytes: read of all bodies on this link, since it began

Numbers are little endian. Who sends bodies has at most `BODIES` open at a time, and of all of them
together `BODY_WINDOW_BYTES` that the other has not read: so bodies never fill what the master
keeps for two nodes, and records of the lane do not wait long behind them.

Invariants:

1. `decode`, and the decoders of contents, raise `RemoteProtocolError` and nothing else.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from .errors import RemoteProtocolError
from .limits import KIB, REASON_BYTES
from .text import clip

#: Bodies that one node may have under way to another.
BODIES: Final = 16
#: What one node may have sent of them that the other has not read: eight pieces.
BODY_WINDOW_BYTES: Final = 512 * KIB

_OPENED: Final = struct.Struct("<QQQ")
_NUMBER: Final = struct.Struct("<Q")


class RelayKind(IntEnum):
    """What a message is."""

    GREETING = 1
    BATCH = 2
    FRAME = 3
    CLOSED = 4
    OPENED = 5
    PIECE = 6
    CUT = 7
    READ = 8


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


def encode_opened(body: int, label: int, size: int) -> bytes:
    """Return the message that begins a body."""
    return encode(RelayKind.OPENED, _OPENED.pack(body, label, size))


def encode_piece(body: int, data: bytes | memoryview) -> bytes:
    """Return the message with the next bytes of a body."""
    return encode(RelayKind.PIECE, _NUMBER.pack(body) + data)


def encode_number(kind: RelayKind, number: int) -> bytes:
    """Return a CUT of a body, or a READ of so many bytes."""
    return encode(kind, _NUMBER.pack(number))


def decode_opened(content: bytes) -> tuple[int, int, int]:
    """Return body, label and size of an OPENED.

    Raises:
        RemoteProtocolError: It is none.
    """
    if len(content) != _OPENED.size:
        raise RemoteProtocolError(f"relayed OPENED of {len(content)} bytes")
    body, label, size = _OPENED.unpack(content)
    return body, label, size


def decode_piece(content: bytes) -> tuple[int, bytes]:
    """Return body and bytes of a PIECE.

    Raises:
        RemoteProtocolError: It is none; an empty one is none either.
    """
    if len(content) <= _NUMBER.size:
        raise RemoteProtocolError(f"relayed PIECE of {len(content)} bytes")
    (body,) = _NUMBER.unpack_from(content)
    return body, content[_NUMBER.size :]


def decode_number(content: bytes) -> int:
    """Return what a CUT or a READ holds.

    Raises:
        RemoteProtocolError: It holds no number.
    """
    if len(content) != _NUMBER.size:
        raise RemoteProtocolError(f"relayed number of {len(content)} bytes")
    number: int = _NUMBER.unpack(content)[0]
    return number
