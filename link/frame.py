"""Frames: what two ends of a link say to each other, on ordered byte streams.

    0   u8   kind
    1   u8 x 3  zero
    4   u32  length of what follows the header
    8   u64  destination; zero where the kind has none
    16  the bytes                                                      all little endian

    1 HELLO      [oldest, newest, boot, window, destinations, bodies,     CONTROL, first
                 message] in msgpack
    2 MESSAGE    bytes for a destination
    3 FORGET     the sender needs this destination no more
    4 CREDIT     (u8 place, 7 zeros, u64 number, u64 limit)...            CONTROL
    5 FORGOTTEN  u8 place, 7 zeros, u64 number                            CONTROL
    6 ACK        u64 received                                             CONTROL
    7 FLUSH      u64 written: say ACK as soon as all this was received    CONTROL

A body has a stream of its own, which begins with u64 label, u64 size, and ends with the body. One
that ends early was cut by its sender. CREDIT and FORGOTTEN name a destination by its channel and
its number, and a body by the place 255 and its stream.

Invariants:

1. `FrameReader` and the decoders raise `Broken` and nothing else.
2. A header is judged before its bytes are waited for: an announced length takes no memory.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from ..proto import codec
from ..proto.codec import U32_MAX, Fields
from ..proto.errors import ProtocolError, RemoteProtocolError
from ..proto.limits import MIB, TOKEN_BYTES
from .reason import Reason
from .settings import BODIES_MAX, MESSAGE_COST, RETURN_PART

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: The newest and the oldest version of the link that this code speaks. 1: 2026-11-24, first.
VERSION: Final = 1
VERSION_OLDEST: Final = 1

_HEADER: Final = struct.Struct("<B3sIQ")
HEADER_BYTES: Final = _HEADER.size
_CREDIT: Final = struct.Struct("<B7sQQ")
_FLOW: Final = struct.Struct("<B7sQ")
_BODY: Final = struct.Struct("<QQ")
#: Size of what begins the stream of a body.
BODY_BYTES: Final = _BODY.size
_NUMBER: Final = struct.Struct("<Q")
_ZEROS3: Final = bytes(3)
_ZEROS7: Final = bytes(7)
_HELLO_BYTES: Final = 256
#: Credits of one frame.
CREDITS: Final = 1024
#: The largest window that a peer may state: more is not credit but none at all.
_WINDOW_MAX: Final = 1024 * MIB


class Channel(IntEnum):
    """The long-lived streams of a link, one a direction; each keeps its order."""

    #: The link's own frames, and what nodes ask of each other.
    CONTROL = 0
    #: All that a node and the master say to each other, in one order: calls, results, the table.
    TABLES = 1
    #: Messages of the bus, unicast and multicast in one order (D11).
    DATA = 2


CHANNELS: Final = tuple(Channel)
#: The first stream that carries a body.
FIRST_BODY: Final = len(CHANNELS)
#: What stands in place of a channel where a body is meant.
BODY: Final = 255

#: What has credit of its own: channel and destination, or `BODY` and the stream of a body.
Flow: TypeAlias = tuple[int, int]


class FrameKind(IntEnum):
    """The numbers of the frames."""

    HELLO = 1
    MESSAGE = 2
    FORGET = 3
    CREDIT = 4
    FORGOTTEN = 5
    ACK = 6
    FLUSH = 7


#: The longest content of each kind but MESSAGE, whose limit is the receiver's.
_LENGTH_MAX: Final = {
    FrameKind.HELLO: _HELLO_BYTES,
    FrameKind.FORGET: 0,
    FrameKind.CREDIT: CREDITS * _CREDIT.size,
    FrameKind.FORGOTTEN: _FLOW.size,
    FrameKind.ACK: _NUMBER.size,
    FrameKind.FLUSH: _NUMBER.size,
}
_KINDS: Final = {int(kind): kind for kind in FrameKind}


class Broken(ProtocolError):
    """The peer broke a rule of the link: it ends, with this reason."""

    def __init__(self, reason: Reason, text: str) -> None:
        """Make the error."""
        super().__init__(text)
        self.reason = reason
        self.text = text


@dataclass(frozen=True, slots=True)
class Hello:
    """What each end says first: its versions, which life of the process it is, its windows."""

    oldest: int
    newest: int
    boot: bytes
    window_bytes: int
    destinations: int
    bodies: int
    message_bytes: int

    def encode(self) -> bytes:
        """Return the content of the frame."""
        return codec.encode(list(astuple(self)))

    @classmethod
    def decode(cls, data: bytes) -> Hello:
        """Return the HELLO of a frame; what a newer version adds behind it is not read."""
        try:
            fields = Fields("HELLO", codec.decode(data, _HELLO_BYTES))
            hello = cls(
                oldest=fields.take_int(1, U32_MAX),
                newest=fields.take_int(1, U32_MAX),
                boot=fields.take_bytes(TOKEN_BYTES, TOKEN_BYTES),
                window_bytes=fields.take_int(1, _WINDOW_MAX),
                destinations=fields.take_int(1, U32_MAX),
                bodies=fields.take_int(1, BODIES_MAX),
                message_bytes=fields.take_int(1, _WINDOW_MAX),
            )
        except RemoteProtocolError as error:
            raise Broken(Reason.MALFORMED, error.message) from error
        kept_back = hello.window_bytes // RETURN_PART
        if hello.message_bytes > hello.window_bytes - kept_back - MESSAGE_COST:
            raise Broken(Reason.MALFORMED, "HELLO: messages that do not fit into their window")
        return hello


def encode(kind: FrameKind, destination: int = 0, data: bytes | memoryview = b"") -> bytes:
    """Return a frame; one copy of the data."""
    return b"".join((_HEADER.pack(kind, _ZEROS3, len(data), destination), data))


def encode_number(kind: FrameKind, number: int) -> bytes:
    """Return an ACK or a FLUSH."""
    return encode(kind, 0, _NUMBER.pack(number))


def encode_forgotten(flow: Flow) -> bytes:
    """Return a FORGOTTEN."""
    return encode(FrameKind.FORGOTTEN, 0, _FLOW.pack(flow[0], _ZEROS7, flow[1]))


def encode_credits(credits: Iterable[tuple[Flow, int]]) -> bytes:
    """Return a CREDIT of flows and their limits, at most `CREDITS` of them."""
    content = b"".join(
        _CREDIT.pack(place, _ZEROS7, number, limit) for (place, number), limit in credits
    )
    return encode(FrameKind.CREDIT, 0, content)


def encode_body(label: int, size: int) -> bytes:
    """Return what begins the stream of a body."""
    return _BODY.pack(label, size)


def decode_number(data: bytes) -> int:
    """Return what an ACK or a FLUSH holds."""
    if len(data) != _NUMBER.size:
        raise Broken(Reason.MALFORMED, f"number of {len(data)} bytes")
    number: int = _NUMBER.unpack(data)[0]
    return number


def _flow(place: int, zeros: bytes, number: int) -> Flow:
    if (place >= len(CHANNELS) and place != BODY) or zeros != _ZEROS7:
        raise Broken(Reason.MALFORMED, f"no channel {place}")
    return place, number


def decode_forgotten(data: bytes) -> Flow:
    """Return the flow of a FORGOTTEN."""
    if len(data) != _FLOW.size:
        raise Broken(Reason.MALFORMED, f"FORGOTTEN of {len(data)} bytes")
    return _flow(*_FLOW.unpack(data))


def decode_credits(data: bytes) -> Iterator[tuple[Flow, int]]:
    """Yield flows and their limits."""
    if len(data) % _CREDIT.size:
        raise Broken(Reason.MALFORMED, f"credits of {len(data)} bytes")
    for place, zeros, number, limit in _CREDIT.iter_unpack(data):
        yield _flow(place, zeros, number), limit


def decode_body(data: bytes | bytearray) -> tuple[int, int]:
    """Return label and size of a body; `data` is `BODY_BYTES` long."""
    label, size = _BODY.unpack(data)
    return label, size


class FrameReader:
    """Cuts one stream into frames; holds less than one frame between two calls."""

    def __init__(self, message_bytes: int) -> None:
        """Begin a stream whose messages have at most `message_bytes`."""
        self._message_bytes = message_bytes
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[FrameKind, int, bytes]]:
        """Yield kind, destination and content of each frame that `data` completes.

        Raises:
            Broken: A header that is none, or announces too much.
        """
        self._held += data
        place = 0
        try:
            while len(self._held) - place >= HEADER_BYTES:
                number, zeros, length, destination = _HEADER.unpack_from(self._held, place)
                kind = _KINDS.get(number)
                if kind is None or zeros != _ZEROS3:
                    raise Broken(Reason.MALFORMED, f"no frame of kind {number}")
                limit = _LENGTH_MAX.get(kind, self._message_bytes)
                if length > limit:
                    raise Broken(Reason.LIMIT, f"{kind.name} of {length} bytes, limit {limit}")
                end = place + HEADER_BYTES + length
                if end > len(self._held):
                    break
                content = bytes(memoryview(self._held)[place + HEADER_BYTES : end])
                place = end
                yield kind, destination, content
        finally:
            del self._held[:place]
