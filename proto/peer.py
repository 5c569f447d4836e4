"""What two nodes say to each other beside the lane: one msgpack list a frame.

    1 HELLO    version, lane, heard or nil, received        each, first; on the stream of the lane
    2 COMMAND  serial, path, generation, dst, items         the node of a bus's master
    3 RESULT   serial, errno, value or message, code        the node of the target
    4 BODY     ticket, size, digest                         who has sent a large body, at its end
    5 TAKEN    ticket                                       the other: it is whole and sealed
    6 REFUSED  ticket, errno, text                          the other: it will not be
    31 CLOSED  code, text                                   either, last

HELLO settles what the two lanes have brought before this link: `lane` is drawn by its sender for
what it sends, anew whenever it begins to count anew (then HELLO comes again); `heard` is the peer's
lane as this node last heard it, and `received` the last record that came by it. So the peer knows
what to send again, and what it can never know (D21).

A COMMAND carries control items from a bus's master to an endpoint of the peer (D5): the peer
registers with the cluster's master what must be known elsewhere, applies the items, and only then
sends the result; the message that tells of them follows on the lane. `generation` is that of the
bus, so that a former master is refused.

Invariants:

1. `decode(encode(frame)) == frame`.
2. `decode` raises `RemoteProtocolError` and nothing else.
3. A frame is never larger than `FRAME_BYTES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, TypeAlias, assert_never

from . import codec
from .codec import ERRNO_MAX, U32_MAX, U64_MAX, Fields
from .frames import Closed, Result, check_items, take_closed, take_result
from .limits import (
    ADDRESS_BYTES,
    MESSAGE_BYTES,
    PATH_BYTES,
    REASON_BYTES,
)
from .text import clip

if TYPE_CHECKING:
    from collections.abc import Callable

#: The version of this language; a change of frames is a new one.
#: 1   2026-11-26   first version
PEER_VERSION: Final = 1

#: What names a lane: drawn, so that two never bear the same.
LANE_BYTES: Final = 16
#: SHA-256 of a body.
BODY_DIGEST_BYTES: Final = 32


class PeerFrameKind(IntEnum):
    """The numbers of the frames."""

    HELLO = 1
    COMMAND = 2
    RESULT = 3
    BODY = 4
    TAKEN = 5
    REFUSED = 6
    CLOSED = 31


@dataclass(frozen=True, slots=True)
class PeerHello:
    """A node begins; `heard` None: nothing has come from this peer, and `received` is 0."""

    lane: bytes
    heard: bytes | None = None
    received: int = 0
    version: int = PEER_VERSION


@dataclass(frozen=True, slots=True)
class Command:
    """Control items for an endpoint of the peer: [type, data] of level BUS_SOCKET.

    `dst` is an address of the target within the bus.
    """

    serial: int
    path: bytes
    generation: int
    dst: bytes
    items: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class BodySent:
    """A body of `size` bytes was sent on a stream of its own; this is its SHA-256.

    The stream may end before or behind this frame.
    """

    ticket: int
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class BodyTaken:
    """The body is here, whole and sealed: the record that names it may follow on the lane."""

    ticket: int


@dataclass(frozen=True, slots=True)
class BodyRefused:
    """The body will not be taken."""

    ticket: int
    errno: int
    text: str = ""


PeerFrame: TypeAlias = PeerHello | Command | Result | BodySent | BodyTaken | BodyRefused | Closed


def encode(frame: PeerFrame) -> bytes:
    """Return the bytes of a frame.

    Raises:
        TooBig: It is larger than `FRAME_BYTES`. EMSGSIZE.
        InvalidArgument: It holds what cannot stand in a packet. EINVAL.
    """
    return codec.encode(_fields_of(frame))


def _fields_of(frame: PeerFrame) -> list[object]:  # noqa: PLR0911 (one case a frame)
    kind = PeerFrameKind
    match frame:
        case PeerHello(lane, heard, received, version):
            return [int(kind.HELLO), version, lane, heard, received]
        case Command():
            return [
                int(kind.COMMAND),
                frame.serial,
                frame.path,
                frame.generation,
                frame.dst,
                frame.items,
            ]
        case Result(serial, errno, value, code):
            return [int(kind.RESULT), serial, errno, value, code]
        case BodySent(ticket, size, digest):
            return [int(kind.BODY), ticket, size, digest]
        case BodyTaken(ticket):
            return [int(kind.TAKEN), ticket]
        case BodyRefused(ticket, errno, text):
            return [int(kind.REFUSED), ticket, errno, clip(text, REASON_BYTES)]
        case Closed(code, text):
            return [int(kind.CLOSED), int(code), clip(text, REASON_BYTES)]
        case _:
            assert_never(frame)


def _take_hello(fields: Fields) -> PeerHello:
    version = fields.take_int(0, U32_MAX)
    lane = fields.take_bytes(LANE_BYTES, LANE_BYTES)
    heard = fields.take_maybe_bytes(LANE_BYTES, LANE_BYTES)
    received = fields.take_int(0, U64_MAX)
    if heard is None and received:
        fields.fail(f"record {received} of no lane")
    return PeerHello(lane, heard, received, version)


def _take_command(fields: Fields) -> Command:
    serial, path = fields.take_int(), fields.take_bytes(1, PATH_BYTES)
    generation = fields.take_int(0, U32_MAX)
    dst, items = fields.take_bytes(1, ADDRESS_BYTES), fields.take_list()
    check_items(items)
    return Command(
        serial=serial,
        path=path,
        generation=generation,
        dst=dst,
        items=tuple((type_, data) for type_, data in items),
    )


def _take_sent(fields: Fields) -> BodySent:
    return BodySent(
        fields.take_int(0, U32_MAX),
        fields.take_int(1, MESSAGE_BYTES),
        fields.take_bytes(BODY_DIGEST_BYTES, BODY_DIGEST_BYTES),
    )


def _take_refused(fields: Fields) -> BodyRefused:
    return BodyRefused(
        fields.take_int(0, U32_MAX), fields.take_int(1, ERRNO_MAX), fields.take_str(REASON_BYTES)
    )


_DECODERS: Final[dict[PeerFrameKind, Callable[[Fields], PeerFrame]]] = {
    PeerFrameKind.HELLO: _take_hello,
    PeerFrameKind.COMMAND: _take_command,
    PeerFrameKind.RESULT: take_result,
    PeerFrameKind.BODY: _take_sent,
    PeerFrameKind.TAKEN: lambda fields: BodyTaken(fields.take_int(0, U32_MAX)),
    PeerFrameKind.REFUSED: _take_refused,
    PeerFrameKind.CLOSED: take_closed,
}


def decode(data: bytes) -> PeerFrame:
    """Return the frame of some bytes.

    Raises:
        RemoteProtocolError: They are no frame.
    """
    fields = Fields("frame", codec.decode(data))
    frame = _DECODERS[fields.take_enum(PeerFrameKind)](fields)
    fields.end()
    return frame
