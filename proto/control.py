"""Control items: what stands beside a message, as cmsg of level BUS_SOCKET.

Numbers below 16 are commands of a bus's master, which the agent carries out before the message
can be read (D5); the others describe a message.

    1 SCM_OWNED_ADDR        4 SCM_REVOKE_ADDR    sockaddr_bus
    2 SCM_MULTICAST_MATCH   5 SCM_REVOKE_MATCH   sockaddr_bus, extension
    3 SCM_MULTICAST_SEND    6 SCM_REVOKE_SEND    sockaddr_bus, extension
    7 SCM_GRANT             u64 flags, which replace those before
    16 SCM_SRC_ADDR         17 SCM_DST_ADDR      sockaddr_bus
    18 SCM_IDENTITY         msgpack [principal, node, pid, uid, gid]
    19 SCM_TERMS            packed terms
    20 SCM_SERIAL  21 SCM_REPLY_TO  24 SCM_SEQ   u64
    22 SCM_GAP              28 bytes of a gap record, then the address of the source
    23 SCM_DEADLINE         u32 milliseconds; a reply is expected

Options of the same level, with their values:

    1 SO_BUS_FILTER       the program of a filter, nothing to detach it     set
    2 SO_BUS_ADDRESSES    sockaddr_bus of each owned address, oldest first  get
    3 SO_BUS_STATE        state of agent, master and links                  get
    4 SO_BUS_MASTER       sockaddr_bus, nothing if there is no master       get
    5 SO_BUS_STATS        counters                                          get
    6 SO_BUS_DETAILS      int: 1 = items 24 and 17 stand beside each message that is received

SCM_OWNED_ADDR of a structure without components stands for a unique address that the agent of the
joiner chooses; the endpoint reads the item with that address, and the master has it as the result.

Integers are little endian. The extension is msgpack `[packed terms or nil, overflow, deadline_ms]`.
An item stated in terms has a structure without components, and the extension; a raw one, as in the
mail, has its bits in the structure, and needs the extension only for another overflow than GAP.

Invariants:

1. `decode(*encode(item)) == item`.
2. `decode` raises `RemoteProtocolError` and nothing else; it judges form, never permission.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import STRICT, IntFlag
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, assert_never

from . import codec
from .address import SOCKADDR_BYTES, BusAddress
from .codec import U32_MAX, U64_MAX, Fields, judging
from .errors import InvalidArgument, RemoteProtocolError
from .limits import (
    ADDRESS_BYTES,
    CONTROL_ITEM_BYTES,
    DEADLINE_MS_MAX,
    IDENTITY_BYTES,
    PACKED_TERMS_BYTES,
)
from .match import (
    Overflow,
    What,
    check_overflow,
    check_what,
    form_of,
    take_overflow,
    what_of,
)
from .notice import GAP_BYTES, Gap
from .terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable

#: The level of all items and options of the bus; above those of the kernel, as AF_BUS is.
BUS_SOCKET: Final = 0xAFB

SCM_OWNED_ADDR: Final = 1
SCM_MULTICAST_MATCH: Final = 2
SCM_MULTICAST_SEND: Final = 3
SCM_REVOKE_ADDR: Final = 4
SCM_REVOKE_MATCH: Final = 5
SCM_REVOKE_SEND: Final = 6
SCM_GRANT: Final = 7
SCM_SRC_ADDR: Final = 16
SCM_DST_ADDR: Final = 17
SCM_IDENTITY: Final = 18
SCM_TERMS: Final = 19
SCM_SERIAL: Final = 20
SCM_REPLY_TO: Final = 21
SCM_GAP: Final = 22
SCM_DEADLINE: Final = 23
SCM_SEQ: Final = 24

#: Items from here on describe a message; those below are commands of the master.
SCM_FIRST_DESCRIPTION: Final = 16

#: Attach or remove a filter (R17).
SO_BUS_FILTER: Final = 1
#: The addresses that the endpoint owns.
SO_BUS_ADDRESSES: Final = 2
#: The state of agent, master and links (D16).
SO_BUS_STATE: Final = 3
#: The address of the bus's master.
SO_BUS_MASTER: Final = 4
#: Counters.
SO_BUS_STATS: Final = 5
#: Whether each received message carries SCM_SEQ and SCM_DST_ADDR: an int, 0 or 1.
SO_BUS_DETAILS: Final = 6

_U64: Final = struct.Struct("<Q")
_U32: Final = struct.Struct("<I")


class GrantFlags(IntFlag, boundary=STRICT):
    """What an endpoint may beyond its addresses and matches."""

    #: Read notices about others (D15).
    NOTICES = 1
    #: Read copies of everything (D19).
    MONITOR = 2


@dataclass(frozen=True, slots=True)
class OwnedAddr:
    """The endpoint owns this address from now on (R11); the kernel's: its agent chooses one."""

    address: BusAddress


@dataclass(frozen=True, slots=True)
class RevokeAddr:
    """The endpoint owns this address no longer."""

    address: BusAddress


@dataclass(frozen=True, slots=True)
class SourceAddr:
    """The address by which the sender wants to be known, or is (R13)."""

    address: BusAddress


@dataclass(frozen=True, slots=True)
class DestinationAddr:
    """The address to which the message was sent."""

    address: BusAddress


@dataclass(frozen=True, slots=True)
class Match:
    """One subscription on one bus: what it selects, and what happens when there is no room."""

    path: bytes
    what: What
    overflow: Overflow = Overflow.GAP
    deadline_ms: int = 0

    def __post_init__(self) -> None:
        """Check bits and deadline; InvalidArgument."""
        check_what(self.what)
        check_overflow(self.overflow, self.deadline_ms)

    @property
    def address(self) -> BusAddress:
        """The multicast address; without components if stated in terms."""
        return _address_of(self.path, self.what)


class Wish(NamedTuple):
    """A match as one keeps many of them: plain values, which were checked already."""

    path: bytes
    #: See `proto/match.py`.
    form: bytes
    #: The number of an `Overflow`.
    overflow: int
    deadline_ms: int

    @property
    def what(self) -> What:
        """What it selects."""
        return what_of(self.form)


@dataclass(frozen=True, slots=True)
class MulticastMatch:
    """The endpoint receives what the match selects (R15)."""

    match: Match


@dataclass(frozen=True, slots=True)
class RevokeMatch:
    """The endpoint no longer receives this; the overflow of the match does not count."""

    path: bytes
    what: What

    def __post_init__(self) -> None:
        """Check bits; InvalidArgument."""
        check_what(self.what)


@dataclass(frozen=True, slots=True)
class MulticastSend:
    """The endpoint may send this: messages that have at least these terms or bits (R21, D9)."""

    path: bytes
    what: What

    def __post_init__(self) -> None:
        """Check bits; InvalidArgument."""
        check_what(self.what)


@dataclass(frozen=True, slots=True)
class RevokeSend:
    """The endpoint may no longer send this."""

    path: bytes
    what: What

    def __post_init__(self) -> None:
        """Check bits; InvalidArgument."""
        check_what(self.what)


@dataclass(frozen=True, slots=True)
class Grant:
    """The endpoint has these rights and no others."""

    flags: GrantFlags


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sent a message: names from certificates, numbers as attested by that node (D17)."""

    principal: str
    node: str
    pid: int
    uid: int
    gid: int

    def encode(self) -> bytes:
        """Return the data of the item, which is also the `ident` of an RX record."""
        return codec.encode([self.principal, self.node, self.pid, self.uid, self.gid])

    @classmethod
    def decode(cls, data: bytes) -> Identity:
        """Return the identity of the item's data."""
        fields = Fields("identity", codec.decode(data, CONTROL_ITEM_BYTES))
        principal, node = fields.take_str(IDENTITY_BYTES), fields.take_str(IDENTITY_BYTES)
        pid, uid, gid = (fields.take_int(0, U32_MAX) for _ in range(3))
        fields.end()
        return cls(principal, node, pid, uid, gid)


@dataclass(frozen=True, slots=True)
class MessageTerms:
    """The terms of a message."""

    terms: Terms


@dataclass(frozen=True, slots=True)
class Serial:
    """The number of a request, chosen by its sender."""

    value: int

    def __post_init__(self) -> None:
        """Check the range; InvalidArgument."""
        _check_range("serial", self.value, U64_MAX)


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """The number of the request that this message answers."""

    value: int

    def __post_init__(self) -> None:
        """Check the range; InvalidArgument."""
        _check_range("serial", self.value, U64_MAX)


@dataclass(frozen=True, slots=True)
class Deadline:
    """How long the sender waits for a reply, which this item says that it expects."""

    deadline_ms: int

    def __post_init__(self) -> None:
        """Check the range; InvalidArgument."""
        _check_range("deadline", self.deadline_ms, DEADLINE_MS_MAX)


@dataclass(frozen=True, slots=True)
class Sequence:
    """The number of the message among all that its sender had accepted, from 1."""

    value: int

    def __post_init__(self) -> None:
        """Check the range; InvalidArgument."""
        _check_range("sequence number", self.value, U64_MAX)


Item: TypeAlias = (
    OwnedAddr
    | RevokeAddr
    | MulticastMatch
    | RevokeMatch
    | MulticastSend
    | RevokeSend
    | Grant
    | SourceAddr
    | DestinationAddr
    | Identity
    | MessageTerms
    | Serial
    | ReplyTo
    | Gap
    | Deadline
    | Sequence
)


def _check_range(what: str, value: int, high: int) -> None:
    if not 1 <= value <= high:
        raise InvalidArgument(f"{what} {value}, not 1 to {high}")


def _address_of(path: bytes, what: What) -> BusAddress:
    return BusAddress.multicast(path, b"" if isinstance(what, Terms) else what)


def _encode_match(
    path: bytes, what: What, overflow: Overflow = Overflow.GAP, deadline_ms: int = 0
) -> bytes:
    if isinstance(what, Terms):
        return _write_place(path) + codec.encode([what.pack(), int(overflow), deadline_ms])
    data = _address_of(path, what).pack()
    if overflow is Overflow.GAP:
        return data
    return data + codec.encode([None, int(overflow), deadline_ms])


@lru_cache(64)
def _write_place(path: bytes) -> bytes:
    return BusAddress.multicast(path).pack()


def encode(item: Item) -> tuple[int, int, bytes]:  # noqa: PLR0911, PLR0912 (one line an item)
    """Return level, type and data of an item.

    Raises:
        InvalidArgument, NameTooLong: The path of a match is none.
    """
    match item:
        case OwnedAddr(address):
            return BUS_SOCKET, SCM_OWNED_ADDR, address.pack()
        case RevokeAddr(address):
            return BUS_SOCKET, SCM_REVOKE_ADDR, address.pack()
        case SourceAddr(address):
            return BUS_SOCKET, SCM_SRC_ADDR, address.pack()
        case DestinationAddr(address):
            return BUS_SOCKET, SCM_DST_ADDR, address.pack()
        case MulticastMatch(Match(path, what, overflow, deadline_ms)):
            data = _encode_match(path, what, overflow, deadline_ms)
            return BUS_SOCKET, SCM_MULTICAST_MATCH, data
        case RevokeMatch(path, what):
            return BUS_SOCKET, SCM_REVOKE_MATCH, _encode_match(path, what)
        case MulticastSend(path, what):
            return BUS_SOCKET, SCM_MULTICAST_SEND, _encode_match(path, what)
        case RevokeSend(path, what):
            return BUS_SOCKET, SCM_REVOKE_SEND, _encode_match(path, what)
        case Grant(flags):
            return BUS_SOCKET, SCM_GRANT, _U64.pack(flags)
        case Identity():
            return BUS_SOCKET, SCM_IDENTITY, item.encode()
        case MessageTerms(terms):
            return BUS_SOCKET, SCM_TERMS, terms.pack()
        case Serial(value):
            return BUS_SOCKET, SCM_SERIAL, _U64.pack(value)
        case ReplyTo(value):
            return BUS_SOCKET, SCM_REPLY_TO, _U64.pack(value)
        case Gap():
            return BUS_SOCKET, SCM_GAP, item.pack() + item.source
        case Deadline(deadline_ms):
            return BUS_SOCKET, SCM_DEADLINE, _U32.pack(deadline_ms)
        case Sequence(value):
            return BUS_SOCKET, SCM_SEQ, _U64.pack(value)
        case _:
            assert_never(item)


@lru_cache(64)
def _read_place(data: bytes) -> BusAddress:
    """Return the multicast address of a structure; what is stated in terms has few of them."""
    address = BusAddress.unpack(data)
    if not address.is_multicast:
        raise RemoteProtocolError("match for an address that is no multicast")
    return address


@lru_cache(64)
def _read_room(data: bytes) -> tuple[int, int]:
    """Return overflow and deadline; there are few different ones."""
    overflow, deadline_ms = take_overflow(Fields("match", codec.decode(data)))
    return int(overflow), deadline_ms


def _read_extension(data: bytes) -> tuple[bytes | None, int, int]:
    """Return packed terms, which are not checked, overflow and deadline."""
    # Three elements, the first of them up to 255 bytes: so are nearly all.
    if data[:2] == b"\x93\xc4" and len(data) > (size := 3 + data[2]):
        packed: bytes | None = data[3:size]
        room = b"\x92" + data[size:]
    else:
        fields = Fields("match", codec.decode(data))
        packed = fields.take_maybe_bytes(0, PACKED_TERMS_BYTES)
        room = codec.encode([fields.take_any(), fields.take_any()])
        fields.end()
    return packed, *_read_room(room)


def decode_wish(data: bytes) -> Wish:
    """Return what SCM_MULTICAST_MATCH asks for; as `decode`, at a fraction of the cost."""
    if len(data) > CONTROL_ITEM_BYTES:
        raise RemoteProtocolError(f"control item of {len(data)} bytes, limit {CONTROL_ITEM_BYTES}")
    place = _read_place(data[:SOCKADDR_BYTES])
    packed, overflow, deadline_ms = None, int(Overflow.GAP), 0
    if len(data) > SOCKADDR_BYTES:
        packed, overflow, deadline_ms = _read_extension(data[SOCKADDR_BYTES:])
    if packed is None:
        with judging("match"):
            check_what(place.address)
        return Wish(place.path, form_of(place.address), overflow, deadline_ms)
    if place.address:
        raise RemoteProtocolError("match: both terms and bits")
    Terms.check(packed)
    return Wish(place.path, packed, overflow, deadline_ms)


def _decode_match(data: bytes) -> Match:
    path, form, overflow, deadline_ms = decode_wish(data)
    return Match(path, what_of(form), Overflow(overflow), deadline_ms)


def _decode_plain_match(data: bytes) -> tuple[bytes, What]:
    match = _decode_match(data)
    if match.overflow is not Overflow.GAP:
        raise RemoteProtocolError("overflow where nothing is received")
    return match.path, match.what


def _decode_u64(data: bytes) -> int:
    if len(data) != _U64.size:
        raise RemoteProtocolError(f"u64 of {len(data)} bytes")
    value: int = _U64.unpack(data)[0]
    return value


def _decode_u32(data: bytes) -> int:
    if len(data) != _U32.size:
        raise RemoteProtocolError(f"u32 of {len(data)} bytes")
    value: int = _U32.unpack(data)[0]
    return value


def _decode_grant(data: bytes) -> Grant:
    value = _decode_u64(data)
    try:
        return Grant(GrantFlags(value))
    except ValueError as error:
        raise RemoteProtocolError(f"grant of unknown flags {value:#x}") from error


def _decode_gap(data: bytes) -> Gap:
    source = data[GAP_BYTES:]
    if len(source) > ADDRESS_BYTES:
        raise RemoteProtocolError(f"gap with an address of {len(source)} bytes")
    return Gap.unpack(source, data[:GAP_BYTES])


_DECODERS: Final[dict[int, Callable[[bytes], Item]]] = {
    SCM_OWNED_ADDR: lambda data: OwnedAddr(BusAddress.unpack(data)),
    SCM_REVOKE_ADDR: lambda data: RevokeAddr(BusAddress.unpack(data)),
    SCM_SRC_ADDR: lambda data: SourceAddr(BusAddress.unpack(data)),
    SCM_DST_ADDR: lambda data: DestinationAddr(BusAddress.unpack(data)),
    SCM_MULTICAST_MATCH: lambda data: MulticastMatch(_decode_match(data)),
    SCM_REVOKE_MATCH: lambda data: RevokeMatch(*_decode_plain_match(data)),
    SCM_MULTICAST_SEND: lambda data: MulticastSend(*_decode_plain_match(data)),
    SCM_REVOKE_SEND: lambda data: RevokeSend(*_decode_plain_match(data)),
    SCM_GRANT: _decode_grant,
    SCM_IDENTITY: Identity.decode,
    SCM_TERMS: lambda data: MessageTerms(Terms.unpack(data)),
    SCM_SERIAL: lambda data: Serial(_decode_u64(data)),
    SCM_REPLY_TO: lambda data: ReplyTo(_decode_u64(data)),
    SCM_GAP: _decode_gap,
    SCM_DEADLINE: lambda data: Deadline(_decode_u32(data)),
    SCM_SEQ: lambda data: Sequence(_decode_u64(data)),
}


def decode(level: int, type_: int, data: bytes) -> Item:
    """Return the item of a level, a type and data.

    Raises:
        RemoteProtocolError: The number is unknown or the data malformed.
    """
    decoder = _DECODERS.get(type_) if level == BUS_SOCKET else None
    if decoder is None:
        raise RemoteProtocolError(f"control item of level {level} and type {type_}")
    if len(data) > CONTROL_ITEM_BYTES:
        raise RemoteProtocolError(f"control item of {len(data)} bytes, limit {CONTROL_ITEM_BYTES}")
    with judging(f"control item of type {type_}"):
        return decoder(data)
