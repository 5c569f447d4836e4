"""Control items: numbers, data, and that decoders raise one type."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto import codec, control
from afbus.proto.address import BusAddress
from afbus.proto.control import (
    BUS_SOCKET,
    Deadline,
    DestinationAddr,
    Grant,
    GrantFlags,
    Identity,
    Item,
    Match,
    MessageTerms,
    MulticastMatch,
    MulticastSend,
    OwnedAddr,
    ReplyTo,
    RevokeAddr,
    RevokeMatch,
    RevokeSend,
    Sequence,
    Serial,
    SourceAddr,
    Wish,
)
from afbus.proto.errors import InvalidArgument, RemoteProtocolError
from afbus.proto.limits import BLOCK_MS_MAX, DEADLINE_MS_MAX
from afbus.proto.match import Overflow, form_of, is_raw, what_of
from afbus.proto.notice import Gap, GapReason
from afbus.proto.terms import Terms

PATH = b"/tmp/test"
U64 = st.integers(1, (1 << 64) - 1)
U32 = st.integers(0, (1 << 32) - 1)
TERMS = st.sampled_from([Terms(), Terms.of("a.b"), Terms.of("a", host="x"), Terms.of(k=1)])
BITS = st.integers(1, 32).flatmap(lambda n: st.binary(min_size=n * 8, max_size=n * 8))
WHAT = TERMS | BITS
OVERFLOW = st.tuples(
    st.sampled_from([Overflow.GAP, Overflow.CONFLATE, Overflow.DISCONNECT]), st.just(0)
) | st.tuples(st.just(Overflow.BLOCK), st.integers(1, BLOCK_MS_MAX))
ADDRESSES = st.sampled_from(
    [
        BusAddress(PATH, "1.1"),
        BusAddress(PATH, "org.example"),
        BusAddress.kernel(PATH),
        BusAddress.multicast(PATH, bytes(64)),
    ]
)
GAPS = st.tuples(U64, U64, st.integers(0, 9), st.sampled_from(GapReason)).map(
    lambda t: Gap(b"1.2", min(t[:2]), max(t[:2]), min(t[2], abs(t[1] - t[0]) + 1), t[3])
)
NAMES = st.text(st.characters(codec="utf-8"), max_size=20)
ITEMS: st.SearchStrategy[Item] = st.one_of(
    st.builds(OwnedAddr, ADDRESSES),
    st.builds(RevokeAddr, ADDRESSES),
    st.builds(SourceAddr, ADDRESSES),
    st.builds(DestinationAddr, ADDRESSES),
    st.tuples(WHAT, OVERFLOW).map(lambda t: MulticastMatch(Match(PATH, t[0], *t[1]))),
    st.builds(RevokeMatch, st.just(PATH), WHAT),
    st.builds(MulticastSend, st.just(PATH), WHAT),
    st.builds(RevokeSend, st.just(PATH), WHAT),
    st.builds(Grant, st.sampled_from([GrantFlags(n) for n in range(4)])),
    st.builds(Identity, NAMES, NAMES, U32, U32, U32),
    st.builds(MessageTerms, TERMS),
    st.builds(Serial, U64),
    st.builds(ReplyTo, U64),
    st.builds(Deadline, st.integers(1, DEADLINE_MS_MAX)),
    st.builds(Sequence, U64),
    GAPS,
)

#: Types as they were first published; a line may be added, none may ever change.
PUBLISHED = {
    "SCM_OWNED_ADDR": 1,
    "SCM_MULTICAST_MATCH": 2,
    "SCM_MULTICAST_SEND": 3,
    "SCM_REVOKE_ADDR": 4,
    "SCM_REVOKE_MATCH": 5,
    "SCM_REVOKE_SEND": 6,
    "SCM_GRANT": 7,
    "SCM_SRC_ADDR": 16,
    "SCM_DST_ADDR": 17,
    "SCM_IDENTITY": 18,
    "SCM_TERMS": 19,
    "SCM_SERIAL": 20,
    "SCM_REPLY_TO": 21,
    "SCM_GAP": 22,
    "SCM_DEADLINE": 23,
    "SCM_SEQ": 24,
    "SO_BUS_FILTER": 1,
    "SO_BUS_ADDRESSES": 2,
    "SO_BUS_STATE": 3,
    "SO_BUS_MASTER": 4,
    "SO_BUS_STATS": 5,
    "SO_BUS_DETAILS": 6,
}


def test_numbers_never_change() -> None:
    """They are the interface of every application."""
    assert {name: getattr(control, name) for name in PUBLISHED} == PUBLISHED
    assert BUS_SOCKET == 0xAFB


@given(ITEMS)
def test_d5_items_come_back(item: Item) -> None:
    """Through level, type and data."""
    level, type_, data = control.encode(item)
    assert level == BUS_SOCKET
    assert control.decode(level, type_, data) == item


def test_r11_an_owned_address_is_one_sockaddr() -> None:
    """Exactly the data of the mail."""
    address = BusAddress(PATH, "1.1")
    assert control.encode(OwnedAddr(address)) == (BUS_SOCKET, 1, address.pack())


def test_r15_a_raw_match_is_the_requested_sockaddr() -> None:
    """As in the mail; terms need the extension."""
    item = MulticastMatch(Match(PATH, bytes(range(64))))
    address = BusAddress.multicast(PATH, bytes(range(64)))
    assert item.match.address == address
    assert control.encode(item)[2] == address.pack()
    _, _, data = control.encode(MulticastMatch(Match(PATH, Terms.of("a"))))
    assert data[:368] == BusAddress.multicast(PATH).pack()
    assert codec.decode(data[368:]) == [b"a", 1, 0]


def test_r15_a_raw_match_may_have_the_extension() -> None:
    """With nil in place of the terms."""
    data = BusAddress.multicast(PATH, bytes(64)).pack() + codec.encode([None, 4, 100])
    item = control.decode(BUS_SOCKET, control.SCM_MULTICAST_MATCH, data)
    assert item == MulticastMatch(Match(PATH, bytes(64), Overflow.BLOCK, 100))


@pytest.mark.parametrize(
    ("overflow", "deadline_ms"),
    [(Overflow.BLOCK, 0), (Overflow.BLOCK, BLOCK_MS_MAX + 1), (Overflow.GAP, 5)],
)
def test_d12_a_deadline_exactly_where_there_must_be_one(
    overflow: Overflow, deadline_ms: int
) -> None:
    """Who blocks, blocks for a bounded time."""
    with pytest.raises(InvalidArgument):
        Match(PATH, Terms(), overflow, deadline_ms)


def test_values_that_are_refused() -> None:
    """Bits that are no components, numbers out of range."""
    for bits in (b"", b"abc", bytes(264)):
        with pytest.raises(InvalidArgument):
            MulticastSend(PATH, bits)
    for make in (Serial, ReplyTo, Sequence, Deadline):
        with pytest.raises(InvalidArgument):
            make(0)
    for first, last, count in ((2, 1, 0), (1, 2, 3), (-1, 1, 0)):
        with pytest.raises(InvalidArgument):
            Gap(b"", first, last, count, GapReason.FULL)


def struct_and(*extension: object, bits: bytes = b"") -> bytes:
    """Return a structure with an extension."""
    return BusAddress.multicast(PATH, bits).pack() + codec.encode(list(extension))


@pytest.mark.parametrize(
    ("type_", "data"),
    [
        (99, b""),
        (control.SCM_OWNED_ADDR, b"short"),
        (control.SCM_MULTICAST_MATCH, BusAddress(PATH, "a").pack()),
        (control.SCM_MULTICAST_MATCH, BusAddress.multicast(PATH).pack()),
        (control.SCM_MULTICAST_MATCH, struct_and(None, 1, 0)),
        (control.SCM_MULTICAST_MATCH, struct_and(b"a", 1, 0, bits=bytes(8))),
        (control.SCM_MULTICAST_MATCH, struct_and(b"a", 9, 0)),
        (control.SCM_MULTICAST_MATCH, struct_and(b"a", 4, 0)),
        (control.SCM_MULTICAST_MATCH, struct_and(b"a..b", 1, 0)),
        (control.SCM_MULTICAST_MATCH, struct_and(b"a", 1, 0, 0)),
        (control.SCM_MULTICAST_SEND, struct_and(b"a", 2, 0)),
        (control.SCM_GRANT, bytes(7)),
        (control.SCM_GRANT, b"\x04" + bytes(7)),
        (control.SCM_IDENTITY, codec.encode(["p", "n", 1, 2])),
        (control.SCM_SERIAL, bytes(8)),
        (control.SCM_DEADLINE, bytes(8)),
        (control.SCM_DEADLINE, b"\xff" * 4),
        (control.SCM_GAP, bytes(27)),
        (control.SCM_GAP, bytes(28)),
        (control.SCM_GAP, bytes(24) + b"\1\0\0\0" + bytes(257)),
        (control.SCM_GAP, b"\2" + bytes(23) + b"\1\0\0\0"),
        (control.SCM_TERMS, bytes(20000)),
    ],
)
def test_d5_data_that_is_refused(type_: int, data: bytes) -> None:
    """The peer's fault."""
    with pytest.raises(RemoteProtocolError):
        control.decode(BUS_SOCKET, type_, data)


def test_d5_items_of_another_level_are_not_ours() -> None:
    """Type 1 of SOL_SOCKET is SCM_RIGHTS."""
    with pytest.raises(RemoteProtocolError):
        control.decode(1, control.SCM_OWNED_ADDR, BusAddress(PATH, "1.1").pack())


def wish_of(data: bytes) -> Wish | None:
    """Return what `decode_wish` makes of data, None for a refusal."""
    try:
        return control.decode_wish(data)
    except RemoteProtocolError:
        return None


@given(
    st.tuples(WHAT, OVERFLOW).map(lambda t: Match(PATH, t[0], *t[1])),
    st.none() | st.tuples(st.integers(0, 900), st.integers(0, 255)),
)
def test_r15_a_wish_is_the_match_in_plain_values(
    match: Match, change: tuple[int, int] | None
) -> None:
    """Both decoders take the same data, with one byte changed too, and read the same from it."""
    data = bytearray(control.encode(MulticastMatch(match))[2])
    if change is not None:
        data[change[0] % len(data)] = change[1]
    wish = wish_of(bytes(data))
    try:
        item = control.decode(BUS_SOCKET, control.SCM_MULTICAST_MATCH, bytes(data))
    except RemoteProtocolError:
        assert wish is None
        return
    assert isinstance(item, MulticastMatch)
    known = item.match
    assert wish is not None
    assert tuple(wish) == (known.path, form_of(known.what), known.overflow, known.deadline_ms)
    assert wish.what == known.what


def test_r15_an_extension_may_be_written_otherwise() -> None:
    """Longer heads than needed, terms of more than 255 bytes: what msgpack allows is read."""
    place = BusAddress.multicast(PATH).pack()
    wide = b"\x93\xc5\x00\x03a.b\xcd\x00\x04\xcd\x01\xf4"
    assert control.decode_wish(place + wide) == (PATH, b"a.b", Overflow.BLOCK, 500)
    long = Terms("a", tuple(f"k{number}={'v' * 99}" for number in range(9)))
    data = control.encode(MulticastMatch(Match(PATH, long)))[2]
    assert control.decode_wish(data) == (PATH, long.pack(), Overflow.GAP, 0)
    for bad in (b"\x93\xc4\x03a.b", b"\x93\xc4\x03a.b\x01\x00\x00", b"\x93\xc4\xffa.b\x01\x00"):
        assert wish_of(place + bad) is None


def test_r14_forms_tell_bits_from_terms() -> None:
    """Bits that read as terms are bits."""
    for what in (Terms(), Terms.of("abcdefgh"), b"abcdefgh", b"\xff" * 8):
        form = form_of(what)
        assert what_of(form) == what
        assert is_raw(form) is isinstance(what, bytes)


@given(
    st.integers(0, 26),
    st.binary(max_size=60)
    | st.binary(max_size=20).map(lambda data: BusAddress.multicast(PATH).pack() + data),
)
def test_decode_raises_one_type(type_: int, data: bytes) -> None:
    """Whatever the bytes are."""
    try:
        item = control.decode(BUS_SOCKET, type_, data)
    except RemoteProtocolError:
        return
    assert control.decode(*control.encode(item)) == item


@given(ITEMS, st.integers(0, 500), st.integers(0, 255))
def test_mutated_items_raise_one_type(item: Item, place: int, byte: int) -> None:
    """One byte is another."""
    level, type_, data = control.encode(item)
    bad = bytearray(data)
    if bad:
        bad[place % len(bad)] = byte
    try:
        again = control.decode(level, type_, bytes(bad))
    except RemoteProtocolError:
        return
    assert control.decode(*control.encode(again)) == again
