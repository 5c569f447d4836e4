"""What node and master say to each other: one msgpack list a frame, all in one order.

    1 HELLO      version, name, epoch, table_version, [place, ...]           node, first
    2 CALL       serial, op, {args}                                          node
    3 ACK        epoch, version                                              node
    4 NACK       epoch, version, reason                                      node
    5 RESYNC     epoch, version                                              node
    16 WELCOME   version, cluster, epoch, number, is_same                    master, first
    17 PART      epoch, version, index, count, [[key, value], ...]           master
    18 DELTA     epoch, from, to, [[key, value], ...], [key, ...]            master
    19 RESULT    serial, errno, value or message, code                       master
    20 WITHDRAWN endpoint, op, path, name, what, reason                      master
    31 CLOSED    code, text                                                  master, see below

A snapshot comes in parts, so that no frame is large; a delta is never cut: a large change takes
several versions. A node answers each version that it has applied by ACK, what it cannot read by
NACK (and keeps what it had), and a gap by RESYNC. The result of a call about the table comes when
every live node has acknowledged the table as the call left it.

After each WELCOME a node states all that it has: RESTATE, its calls again, RESTATED; what it did
not state by then is gone. So a lost answer, a restart and a partition need no rules of their own.

Over a link all this is on channel TABLES, destination 0; a link has reasons of its own for its end.
Two more may ask, without a link: each makes one CALL, and is answered by RESULT, or by CLOSED if it
broke a rule. Who wants to enrol says ENROL by `Carrier.enrol`. The master's operator, on its own
machine, uses a stream on which a frame stands behind its length (u32, big endian), for the
operations from TOKEN on.

Invariants:

1. `decode(encode(frame)) == frame`.
2. `decode` raises `RemoteProtocolError` and nothing else; arguments of calls are checked
   (`operation.py`).
3. A frame is never larger than `CLUSTER_FRAME_BYTES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, TypeAlias, assert_never

from . import codec
from .codec import U32_MAX, Fields
from .frames import Closed, Result, take_closed, take_result
from .limits import ADDRESS_BYTES, IDENTITY_BYTES, KIB, PATH_BYTES, REASON_BYTES
from .match import What, encode_what, take_what
from .operation import ClusterOp, check_arguments
from .record import take_places
from .table import Delta
from .text import clip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: The version of this language; a change of frames, calls or records is a new one.
#: 1   2026-11-24   first version
CLUSTER_VERSION: Final = 1

#: The largest frame: what a link takes as one message.
CLUSTER_FRAME_BYTES: Final = 128 * KIB
#: Keys and values of one part or delta together; the lists around them fit into the rest.
CHUNK_BYTES: Final = 96 * KIB
#: Records of one part or delta: small ones, in about `CHUNK_BYTES`.
CHUNK_RECORDS: Final = 2048
#: Parts of one snapshot: as many records as a table may have, and room for large ones.
PARTS: Final = 4096


class ClusterFrameKind(IntEnum):
    """The numbers of the frames."""

    HELLO = 1
    CALL = 2
    ACK = 3
    NACK = 4
    RESYNC = 5
    WELCOME = 16
    PART = 17
    DELTA = 18
    RESULT = 19
    WITHDRAWN = 20
    CLOSED = 31


@dataclass(frozen=True, slots=True)
class ClusterHello:
    """A node begins; `epoch` and `table_version` say what it has of the table, 0 for nothing."""

    name: str
    epoch: int = 0
    table_version: int = 0
    places: tuple[str, ...] = ()
    version: int = CLUSTER_VERSION


@dataclass(frozen=True, slots=True)
class ClusterCall:
    """The node asks for something; the result bears the same number."""

    serial: int
    op: ClusterOp
    args: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Ack:
    """The node has applied everything up to this version."""

    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Nack:
    """The node cannot read what leads to this version, and keeps what it had."""

    epoch: int
    version: int
    reason: str


@dataclass(frozen=True, slots=True)
class Resync:
    """Something is missing after this version."""

    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class ClusterWelcome:
    """The master accepts the node; the table or what is new in it follows.

    `is_same`: the table that HELLO named by epoch and version is one of this epoch too.
    """

    cluster: str
    epoch: int
    number: int
    is_same: bool = False
    version: int = CLUSTER_VERSION


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a snapshot: `index` from 0 of `count`; keys ascend over all parts."""

    epoch: int
    version: int
    index: int
    count: int
    entries: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class TableDelta:
    """What is new in the table; see `table.Delta`."""

    epoch: int
    delta: Delta[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The master took something from an endpoint: what `op` (ENTER, BIND, OWN, SUBSCRIBE) gave.

    ENTER is all that it had. `name` stands with OWN, `what` with SUBSCRIBE.
    """

    endpoint: int
    op: ClusterOp
    path: bytes = b""
    name: bytes = b""
    what: What = b""
    reason: str = ""


ClusterFrame: TypeAlias = (
    ClusterHello
    | ClusterCall
    | Ack
    | Nack
    | Resync
    | ClusterWelcome
    | Part
    | TableDelta
    | Result
    | Withdrawn
    | Closed
)


def encode(frame: ClusterFrame) -> bytes:
    """Return the bytes of a frame.

    Raises:
        TooBig: It is larger than `CLUSTER_FRAME_BYTES`. EMSGSIZE.
        InvalidArgument: It holds what cannot stand in a packet. EINVAL.
    """
    return codec.encode(_fields_of(frame), CLUSTER_FRAME_BYTES)


def _fields_of(frame: ClusterFrame) -> list[object]:  # noqa: PLR0911 (one case a frame)
    kind = ClusterFrameKind
    match frame:
        case ClusterHello():
            return [
                int(kind.HELLO),
                frame.version,
                frame.name,
                frame.epoch,
                frame.table_version,
                list(frame.places),
            ]
        case ClusterCall(serial, op, args):
            return [int(kind.CALL), serial, int(op), dict(args)]
        case Ack(epoch, version):
            return [int(kind.ACK), epoch, version]
        case Nack(epoch, version, reason):
            return [int(kind.NACK), epoch, version, clip(reason, REASON_BYTES)]
        case Resync(epoch, version):
            return [int(kind.RESYNC), epoch, version]
        case ClusterWelcome(cluster, epoch, number, is_same, version):
            return [int(kind.WELCOME), version, cluster, epoch, number, is_same]
        case Part(epoch, version, index, count, entries):
            return [int(kind.PART), epoch, version, index, count, entries]
        case TableDelta(epoch, delta):
            ends = [delta.from_version, delta.to_version]
            return [int(kind.DELTA), epoch, *ends, delta.puts, delta.drops]
        case Result(serial, errno, value, code):
            return [int(kind.RESULT), serial, errno, value, code]
        case Withdrawn(endpoint, op, path, name, what, reason):
            head = [int(kind.WITHDRAWN), endpoint, int(op), path, name]
            return [*head, *encode_what(what), clip(reason, REASON_BYTES)]
        case Closed(code, text):
            return [int(kind.CLOSED), int(code), clip(text, REASON_BYTES)]
        case _:
            assert_never(frame)


def _take_hello(fields: Fields) -> ClusterHello:
    version = fields.take_int(0, U32_MAX)
    return ClusterHello(
        name=fields.take_str(IDENTITY_BYTES),
        epoch=fields.take_int(),
        table_version=fields.take_int(),
        places=take_places(fields),
        version=version,
    )


def _take_call(fields: Fields) -> ClusterCall:
    serial, op = fields.take_int(), fields.take_enum(ClusterOp)
    args = fields.take_map()
    check_arguments(fields, op, args)
    return ClusterCall(serial, op, args)


def _take_entries(fields: Fields) -> tuple[tuple[bytes, bytes], ...]:
    made = []
    last = b""
    for element in fields.take_list(CHUNK_RECORDS):
        entry = Fields("entry", element)
        key, value = entry.take_bytes(1), entry.take_bytes()
        entry.end()
        if key <= last:
            fields.fail("keys that do not ascend")
        last = key
        made.append((key, value))
    return tuple(made)


def _take_part(fields: Fields) -> Part:
    epoch, version = fields.take_int(), fields.take_int()
    index, count = fields.take_int(0, PARTS - 1), fields.take_int(1, PARTS)
    if index >= count:
        fields.fail(f"part {index} of {count}")
    return Part(epoch, version, index, count, _take_entries(fields))


def _take_delta(fields: Fields) -> TableDelta:
    epoch, from_version, to_version = fields.take_int(), fields.take_int(), fields.take_int()
    puts = _take_entries(fields)
    keys = fields.take_list(CHUNK_RECORDS)
    each = Fields("drops", keys)
    drops = tuple(each.take_bytes(1) for _ in keys)
    if any(one >= other for one, other in pairwise(drops)):
        fields.fail("keys that do not ascend")
    if not {key for key, _ in puts}.isdisjoint(drops):
        fields.fail("delta that puts and drops one key")
    if to_version <= from_version:
        fields.fail(f"delta from version {from_version} to {to_version}")
    return TableDelta(epoch, Delta(from_version, to_version, puts, drops))


def _take_withdrawn(fields: Fields) -> Withdrawn:
    return Withdrawn(
        endpoint=fields.take_int(),
        op=fields.take_enum(ClusterOp),
        path=fields.take_bytes(0, PATH_BYTES),
        name=fields.take_bytes(0, ADDRESS_BYTES),
        what=take_what(fields),
        reason=fields.take_str(),
    )


_DECODERS: Final[dict[ClusterFrameKind, Callable[[Fields], ClusterFrame]]] = {
    ClusterFrameKind.HELLO: _take_hello,
    ClusterFrameKind.CALL: _take_call,
    ClusterFrameKind.ACK: lambda fields: Ack(fields.take_int(), fields.take_int()),
    ClusterFrameKind.NACK: lambda fields: Nack(
        fields.take_int(), fields.take_int(), fields.take_str()
    ),
    ClusterFrameKind.RESYNC: lambda fields: Resync(fields.take_int(), fields.take_int()),
    ClusterFrameKind.WELCOME: lambda fields: ClusterWelcome(
        version=fields.take_int(0, U32_MAX),
        cluster=fields.take_str(IDENTITY_BYTES),
        epoch=fields.take_int(),
        number=fields.take_int(1, U32_MAX),
        is_same=fields.take_bool(),
    ),
    ClusterFrameKind.PART: _take_part,
    ClusterFrameKind.DELTA: _take_delta,
    ClusterFrameKind.RESULT: take_result,
    ClusterFrameKind.WITHDRAWN: _take_withdrawn,
    ClusterFrameKind.CLOSED: take_closed,
}


def decode(data: bytes) -> ClusterFrame:
    """Return the frame of some bytes.

    Raises:
        RemoteProtocolError: They are no frame.
    """
    fields = Fields("frame", codec.decode(data, CLUSTER_FRAME_BYTES, CHUNK_RECORDS))
    frame = _DECODERS[fields.take_enum(ClusterFrameKind)](fields)
    fields.end()
    return frame
