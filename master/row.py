"""Rows of the journal that are the master's own; `ledger.py` lists them.

Invariants:

1. Decoders raise `RemoteProtocolError` for what is no such row, and nothing else.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from ..proto import codec
from ..proto.codec import U32_MAX, Fields
from ..proto.errors import RemoteProtocolError
from ..proto.names import NameFlags
from ..proto.record import SERIAL_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

_BUS: Final = struct.Struct(">cI")
_ENDPOINT: Final = struct.Struct(">cIQ")
#: Those who may wait for one name.
QUEUE: Final = 1024


class NodeRow(NamedTuple):
    """What is known of a node beside its record."""

    is_ephemeral: bool
    until_utc: int
    key: bytes | None


class ProofRow(NamedTuple):
    """What an endpoint has proven by a certificate."""

    principal: str
    serial: int
    until_utc: int


class IssuedRow(NamedTuple):
    """A certificate that was issued."""

    bearer: str
    until_utc: int


class BusRow(NamedTuple):
    """What is known of a bus beside its record: its master's endpoint, since when it is unused."""

    master: int | None
    unused_since_utc: int


QueueRow = tuple[tuple[int, int, NameFlags], ...]


def node_row_key(name: str) -> bytes:
    """Return the key of a node."""
    return b"N" + name.encode()


def proof_key(node: int, endpoint: int) -> bytes:
    """Return the key of a proof."""
    return _ENDPOINT.pack(b"E", node, endpoint)


def issued_key(serial: int) -> bytes:
    """Return the key of a certificate that was issued."""
    return b"I" + serial.to_bytes(SERIAL_BYTES, "big")


def queue_key(bus: int, name: bytes) -> bytes:
    """Return the key of the queue for a name."""
    return _BUS.pack(b"Q", bus) + name


def bus_row_key(bus: int) -> bytes:
    """Return the key of a bus."""
    return _BUS.pack(b"B", bus)


def split_proof_key(key: bytes) -> tuple[int, int]:
    """Return node and endpoint of `proof_key`."""
    if len(key) != _ENDPOINT.size:
        raise RemoteProtocolError("row whose key is no endpoint")
    _, node, endpoint = _ENDPOINT.unpack(key)
    return node, endpoint


def split_bus_key(key: bytes) -> tuple[int, bytes]:
    """Return bus and name of `queue_key` or `bus_row_key`."""
    if len(key) < _BUS.size:
        raise RemoteProtocolError("row whose key is no bus")
    return _BUS.unpack_from(key)[1], key[_BUS.size :]


def encode_queue(entries: Sequence[tuple[tuple[int, int], NameFlags]]) -> list[object] | None:
    """Return the row of a queue, None for an empty one."""
    return [[*who, int(flags)] for who, flags in entries] or None


def decode_node(data: bytes) -> NodeRow:
    """Return the row of a node."""
    fields = Fields("node row", codec.decode(data))
    row = NodeRow(fields.take_bool(), fields.take_int(), fields.take_maybe_bytes(32, 32))
    fields.end()
    return row


def decode_proof(data: bytes) -> ProofRow:
    """Return the row of a proof."""
    fields = Fields("proof row", codec.decode(data))
    principal = fields.take_str()
    serial = int.from_bytes(fields.take_bytes(SERIAL_BYTES, SERIAL_BYTES), "big")
    row = ProofRow(principal, serial, fields.take_int())
    fields.end()
    return row


def encode_proof(row: ProofRow) -> list[object]:
    """Return the row of a proof."""
    return [row.principal, row.serial.to_bytes(SERIAL_BYTES, "big"), row.until_utc]


def decode_issued(data: bytes) -> IssuedRow:
    """Return the row of a certificate."""
    fields = Fields("certificate row", codec.decode(data))
    row = IssuedRow(fields.take_str(), fields.take_int())
    fields.end()
    return row


def decode_bus(data: bytes) -> BusRow:
    """Return the row of a bus."""
    fields = Fields("bus row", codec.decode(data))
    master = fields.take_any()
    if type(master) not in (int, type(None)):
        fields.fail("master that is no endpoint")
    row = BusRow(master, fields.take_int())
    fields.end()
    return row


def decode_queue(data: bytes) -> QueueRow:
    """Return the row of a queue."""
    made = []
    for element in Fields("queue row", [codec.decode(data)]).take_list(QUEUE):
        fields = Fields("queue row", element)
        node, endpoint, flags = fields.take_int(1, U32_MAX), fields.take_int(), fields.take_int()
        fields.end()
        if flags > sum(NameFlags):
            fields.fail(f"flags {flags}")
        made.append((node, endpoint, NameFlags(flags)))
    return tuple(made)
