"""Records of the cluster's table: what the master tells every node, one key and one value each.

All of it is one versioned table (`table.py`) of bytes to bytes. The first byte of a key is the
kind, numbers in keys are big endian, so that what belongs together lies together:

    n NAME                  node    [number, state, boot, [place, ...]]
    l block u64             lease   [node]
    b PATH                  bus     [number, node, address or nil, width, order, key, generation]
    o bus u32, ADDRESS      owner   [node, endpoint]
    m bus, node, digest     match   [packed terms or nil, bits or nil]
    d SERIAL                denied  [bearer, until_utc, reason]
    f NAME                  fact    [number]

Unique addresses of a cluster are `BLOCK.NUMBER`: whoever holds the lease of a block owns all of
it, so a join needs no word with the master (D3, D6). Names stand among the owners one by one.

Invariants:

1. `decode_record(*encode_record(record)) == record`; equal records have equal bytes.
2. `decode_record` raises `RemoteProtocolError` and nothing else.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, TypeAlias, assert_never

from . import codec
from .codec import U32_MAX, Fields, judging
from .errors import RemoteProtocolError
from .limits import (
    ADDRESS_BYTES,
    BLOOM_BITS,
    BLOOM_KEY_BYTES,
    IDENTITY_BYTES,
    PATH_BYTES,
)
from .match import What, check_what, encode_what, take_what

if TYPE_CHECKING:
    from collections.abc import Callable

#: Size of a boot number: drawn by a node when it starts, so a restart is seen as one.
BOOT_BYTES: Final = 16
#: Size of the digest of a match in its key.
DIGEST_BYTES: Final = 16
#: Places (`host:port`) at which one node may be reached: interfaces of a host, two families each.
PLACES: Final = 16
#: One place: the longest name of a host, and a port.
PLACE_BYTES: Final = 261
#: Size of the serial number of a certificate in a key (RFC 5280, 4.1.2.2).
SERIAL_BYTES: Final = 20
#: Orders that a bus may have (D11).
ORDERS: Final = ("fifo", "total")

_U64: Final = struct.Struct(">Q")
_U32: Final = struct.Struct(">I")
_PAIR: Final = struct.Struct(">II")
_UNIQUE: Final = re.compile(rb"([1-9][0-9]{0,18})\.([1-9][0-9]{0,18})")


class NodeState(IntEnum):
    """Whether the master hears a node."""

    LIVE = 1
    LOST = 2


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node: `places` are where peers reach it, the best one first."""

    name: str
    number: int
    state: NodeState
    boot: bytes
    places: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """All unique addresses `block.N` are the node's."""

    block: int
    node: int


@dataclass(frozen=True, slots=True)
class BusRecord:
    """A bus of the cluster; `node` 0 while it has no master.

    `generation` grows with each master, so that a former one is told from the present one.
    """

    path: bytes
    number: int
    node: int
    address: bytes | None
    width: int
    order: str
    key: bytes
    generation: int


@dataclass(frozen=True, slots=True)
class OwnerRecord:
    """A name of a bus has an owner: an endpoint, by its number on its node."""

    bus: int
    address: bytes
    node: int
    endpoint: int


@dataclass(frozen=True, slots=True)
class MatchRecord:
    """Somebody on the node wants this."""

    bus: int
    node: int
    what: What


@dataclass(frozen=True, slots=True)
class DeniedRecord:
    """A certificate that is no longer good, whatever its date says, or the one of an issuing key.

    `bearer` is the URI of whom it names, "" if that is not known. Nobody needs the record after
    `until_utc`, whole seconds of UTC since 1970.
    """

    serial: int
    bearer: str
    until_utc: int
    reason: str


@dataclass(frozen=True, slots=True)
class FactRecord:
    """A number that concerns all: `policy` counts the policies."""

    name: str
    number: int


Record: TypeAlias = (
    NodeRecord | LeaseRecord | BusRecord | OwnerRecord | MatchRecord | DeniedRecord | FactRecord
)


def digest_what(what: What) -> bytes:
    """Return the 16 bytes that stand for a match in a key."""
    return blake2b(codec.encode(encode_what(what)), digest_size=DIGEST_BYTES).digest()


def node_key(name: str) -> bytes:
    """Return the key of a node."""
    return b"n" + name.encode()


def lease_key(block: int) -> bytes:
    """Return the key of a lease."""
    return b"l" + _U64.pack(block)


def bus_key(path: bytes) -> bytes:
    """Return the key of a bus."""
    return b"b" + path


def owner_key(bus: int, address: bytes) -> bytes:
    """Return the key of an owner."""
    return b"o" + _U32.pack(bus) + address


def match_key(bus: int, node: int, digest: bytes) -> bytes:
    """Return the key of a match; `digest` is that of `digest_what`."""
    return b"m" + _PAIR.pack(bus, node) + digest


def denied_key(serial: int) -> bytes:
    """Return the key of a certificate that is denied, by its serial number."""
    return b"d" + serial.to_bytes(SERIAL_BYTES, "big")


def encode_record(record: Record) -> tuple[bytes, bytes]:
    """Return key and value of a record.

    Raises:
        InvalidArgument: A number or a text of it cannot stand in a packet. EINVAL.
    """
    match record:
        case NodeRecord(name, number, state, boot, places):
            key, value = node_key(name), [number, int(state), boot, list(places)]
        case LeaseRecord(block, node):
            key, value = lease_key(block), [node]
        case BusRecord(path, number, node, address, width, order, hash_key, generation):
            key = bus_key(path)
            value = [number, node, address, width, order, hash_key, generation]
        case OwnerRecord(bus, address, node, endpoint):
            key, value = owner_key(bus, address), [node, endpoint]
        case MatchRecord(bus, node, what):
            key, value = match_key(bus, node, digest_what(what)), encode_what(what)
        case DeniedRecord(serial, bearer, until_utc, reason):
            key, value = denied_key(serial), [bearer, until_utc, reason]
        case FactRecord(name, number):
            key, value = b"f" + name.encode(), [number]
        case _:
            assert_never(record)
    return key, codec.encode(value)


def _text(key: bytes, high: int) -> str:
    try:
        text = key.decode()
    except UnicodeDecodeError as error:
        raise RemoteProtocolError("key that is not UTF-8") from error
    if not 0 < len(key) <= high:
        raise RemoteProtocolError(f"key of {len(key)} bytes, limit {high}")
    return text


def _numbers(form: struct.Struct, key: bytes) -> tuple[int, ...]:
    if len(key) < form.size:
        raise RemoteProtocolError("key that is cut short")
    return form.unpack_from(key)


def _node(key: bytes, fields: Fields) -> NodeRecord:
    number, state = fields.take_int(1, U32_MAX), fields.take_enum(NodeState)
    boot = fields.take_bytes(BOOT_BYTES, BOOT_BYTES)
    places = take_places(fields)
    return NodeRecord(_text(key, IDENTITY_BYTES), number, state, boot, places)


def take_places(fields: Fields) -> tuple[str, ...]:
    """Take a list of places."""
    places = fields.take_list(PLACES)
    each = Fields("places", places)
    return tuple(each.take_str(PLACE_BYTES) for _ in places)


def _lease(key: bytes, fields: Fields) -> LeaseRecord:
    if len(key) != _U64.size:
        raise RemoteProtocolError("key that is no block")
    (block,) = _numbers(_U64, key)
    return LeaseRecord(block, fields.take_int(1, U32_MAX))


def _bus(key: bytes, fields: Fields) -> BusRecord:
    number, node = fields.take_int(1, U32_MAX), fields.take_int(0, U32_MAX)
    address = fields.take_maybe_bytes(1, ADDRESS_BYTES)
    width, order = fields.take_int(), fields.take_str()
    if width not in BLOOM_BITS or order not in ORDERS:
        fields.fail(f"width {width} or order {order!a} that no bus has")
    if not 0 < len(key) <= PATH_BYTES:
        fields.fail(f"path of {len(key)} bytes")
    hash_key = fields.take_bytes(BLOOM_KEY_BYTES, BLOOM_KEY_BYTES)
    generation = fields.take_int(0, U32_MAX)
    return BusRecord(key, number, node, address, width, order, hash_key, generation)


def _owner(key: bytes, fields: Fields) -> OwnerRecord:
    (bus,), address = _numbers(_U32, key), key[_U32.size :]
    if not 0 < len(address) <= ADDRESS_BYTES:
        fields.fail(f"address of {len(address)} bytes")
    return OwnerRecord(bus, address, fields.take_int(1, U32_MAX), fields.take_int())


def _match(key: bytes, fields: Fields) -> MatchRecord:
    bus, node = _numbers(_PAIR, key)
    what = take_what(fields)
    with judging("match"):
        check_what(what)
    if key[_PAIR.size :] != digest_what(what):
        fields.fail("digest of another match")
    return MatchRecord(bus, node, what)


def _denied(key: bytes, fields: Fields) -> DeniedRecord:
    serial = int.from_bytes(key, "big")
    if len(key) != SERIAL_BYTES or not serial:
        fields.fail("key that is no serial number")
    return DeniedRecord(serial, fields.take_str(), fields.take_int(), fields.take_str())


def _fact(key: bytes, fields: Fields) -> FactRecord:
    return FactRecord(_text(key, IDENTITY_BYTES), fields.take_int())


_DECODERS: Final[dict[bytes, tuple[str, Callable[[bytes, Fields], Record]]]] = {
    b"n": ("node", _node),
    b"l": ("lease", _lease),
    b"b": ("bus", _bus),
    b"o": ("owner", _owner),
    b"m": ("match", _match),
    b"d": ("denied", _denied),
    b"f": ("fact", _fact),
}


def decode_record(key: bytes, value: bytes) -> Record:
    """Return the record of a key and a value.

    Raises:
        RemoteProtocolError: They are no record.
    """
    what, decoder = _DECODERS.get(key[:1], (None, None))
    if what is None or decoder is None:
        raise RemoteProtocolError(f"record of an unknown kind {key[:1]!a}")
    fields = Fields(f"{what} record", codec.decode(value))
    record = decoder(key[1:], fields)
    fields.end()
    return record


def split_unique(address: bytes) -> tuple[int, int] | None:
    """Return block and number of a unique address of a cluster, None if it is not one."""
    found = _UNIQUE.fullmatch(address)
    return None if found is None else (int(found[1]), int(found[2]))
