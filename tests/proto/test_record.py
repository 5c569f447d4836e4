"""Records of the cluster's table: round trips, one reading, and one type of error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto import codec
from afbus.proto.errors import InvalidArgument, RemoteProtocolError
from afbus.proto.limits import ADDRESS_BYTES, IDENTITY_BYTES, PATH_BYTES
from afbus.proto.record import (
    BusRecord,
    DeniedRecord,
    FactRecord,
    LeaseRecord,
    MatchRecord,
    NodeRecord,
    NodeState,
    OwnerRecord,
    Record,
    bus_key,
    decode_record,
    denied_key,
    digest_what,
    encode_record,
    lease_key,
    match_key,
    node_key,
    owner_key,
    split_unique,
)
from afbus.proto.terms import Terms

U32 = st.integers(1, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
WHATS = st.one_of(
    st.builds(
        Terms,
        st.sampled_from(["", "a", "a.b", "sensors.cpu"]),
        st.lists(st.sampled_from(["k=v", "host=a"]), max_size=2, unique=True).map(tuple),
    ),
    st.binary(min_size=8, max_size=8),
    st.binary(min_size=64, max_size=64),
)
RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(
        NodeRecord,
        NAMES,
        U32,
        st.sampled_from(NodeState),
        st.binary(min_size=16, max_size=16),
        st.lists(TEXTS, max_size=3).map(tuple),
    ),
    st.builds(LeaseRecord, U64, U32),
    st.builds(
        BusRecord,
        st.binary(min_size=1, max_size=PATH_BYTES),
        U32,
        st.integers(0, 9),
        st.none() | st.binary(min_size=1, max_size=ADDRESS_BYTES),
        st.sampled_from([512, 1024, 2048]),
        st.sampled_from(["fifo", "total"]),
        st.binary(min_size=16, max_size=16),
        st.integers(0, 9),
    ),
    st.builds(OwnerRecord, U32, st.binary(min_size=1, max_size=ADDRESS_BYTES), U32, U64),
    st.builds(MatchRecord, U32, U32, WHATS),
    st.builds(DeniedRecord, st.integers(1, (1 << 160) - 1), TEXTS, U64, TEXTS),
    st.builds(FactRecord, NAMES, U64),
)


@given(RECORDS)
def test_records_come_back(record: Record) -> None:
    """Through one key and one value."""
    key, value = encode_record(record)
    assert decode_record(key, value) == record
    assert encode_record(decode_record(key, value)) == (key, value)


@given(RECORDS, RECORDS)
def test_one_key_is_one_thing(one: Record, other: Record) -> None:
    """Records of different things never share a key."""
    keys = encode_record(one)[0], encode_record(other)[0]
    if type(one) is not type(other):
        assert keys[0] != keys[1]
    elif keys[0] == keys[1]:
        # Apart from what a record says of its thing, they are about the same.
        assert decode_record(keys[0], encode_record(other)[1]) == other


def test_keys_are_as_written() -> None:
    """They are on the wire and on disk; what belongs together lies together."""
    assert node_key("a") == b"na"
    assert lease_key(258) == b"l\0\0\0\0\0\0\1\2"
    assert bus_key(b"/x") == b"b/x"
    assert owner_key(3, b"org.x") == b"o\0\0\0\3org.x"
    assert match_key(1, 2, bytes(16)) == b"m\0\0\0\1\0\0\0\2" + bytes(16)
    assert denied_key(255) == b"d" + bytes(19) + b"\xff"
    assert digest_what(Terms("a")).hex() == "d871bd13424c018d39b3ad3bbf2fb95c"
    assert digest_what(Terms("a")) != digest_what(Terms("", ("a=",)))


BOOT = bytes(16)
KEY = bytes(16)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"", []),
        (b"x", []),
        (b"N1", [1]),
        # nodes
        (b"n", [1, 1, BOOT, []]),
        (b"na", []),
        (b"na", [0, 1, BOOT, []]),
        (b"na", [1, 3, BOOT, []]),
        (b"na", [1, 1, b"short", []]),
        (b"na", [1, 1, BOOT, [1]]),
        (b"na", [1, 1, BOOT, ["a"] * 17]),
        (b"na", [1, 1, BOOT, ["a" * 262]]),
        (b"na", [1, 1, BOOT, [], 0]),
        (b"n\xff", [1, 1, BOOT, []]),
        (b"n" + b"a" * (IDENTITY_BYTES + 1), [1, 1, BOOT, []]),
        # leases
        (b"l", [1]),
        (b"l" + bytes(7), [1]),
        (b"l" + bytes(9), [1]),
        (b"l" + bytes(8), [0]),
        (b"l" + bytes(8), [True]),
        # buses
        (b"b", [1, 0, None, 512, "fifo", KEY, 0]),
        (b"b" + b"p" * (PATH_BYTES + 1), [1, 0, None, 512, "fifo", KEY, 0]),
        (b"b/x", [1, 0, None, 513, "fifo", KEY, 0]),
        (b"b/x", [1, 0, None, 512, "none", KEY, 0]),
        (b"b/x", [1, 0, None, 512, "fifo", b"short", 0]),
        (b"b/x", [1, 0, b"", 512, "fifo", KEY, 0]),
        (b"b/x", [0, 0, None, 512, "fifo", KEY, 0]),
        # owners
        (b"o\0\0\0", [1, 1]),
        (b"o\0\0\0\1", [1, 1]),
        (b"o\0\0\0\1" + b"a" * (ADDRESS_BYTES + 1), [1, 1]),
        (b"o\0\0\0\1a", [0, 1]),
        (b"o\0\0\0\1a", [1, -1]),
        # matches
        (b"m\0\0\0\1", [b"a", None]),
        (b"m\0\0\0\1\0\0\0\1" + bytes(16), [b"a", None]),
        (match_key(1, 1, digest_what(Terms("a"))), [b"b", None]),
        (match_key(1, 1, digest_what(Terms("a"))), [b"a", b"a"]),
        (match_key(1, 1, digest_what(Terms("a"))), [None, None]),
        (match_key(1, 1, digest_what(bytes(9))), [None, bytes(9)]),
        # denied
        (b"d" + bytes(19), ["", 0, ""]),
        (b"d" + bytes(20), ["", 0, ""]),
        (b"d" + bytes(19) + b"\1", ["", -1, ""]),
        (b"d" + bytes(19) + b"\1", ["a" * 1025, 0, ""]),
        # facts
        (b"f", [1]),
        (b"fa", ["1"]),
    ],
)
def test_what_is_no_record(key: bytes, value: object) -> None:
    """The peer's fault."""
    with pytest.raises(RemoteProtocolError):
        decode_record(key, codec.encode(value))


@given(
    st.binary(max_size=40),
    st.binary(max_size=40),
    RECORDS,
    st.integers(0, 1 << 16),
    st.integers(0, 255),
    st.booleans(),
)
def test_decode_raises_one_type(  # what is mutated, where, and how
    key: bytes, value: bytes, record: Record, place: int, byte: int, is_key: bool
) -> None:
    """Whatever the bytes are; also where one byte of a good record is another."""
    pair = [bytearray(part) for part in encode_record(record)]
    changed = pair[0] if is_key else pair[1]
    changed[place % len(changed)] = byte
    kind = b"nlbomdf"[place % 7 : place % 7 + 1]
    for one, other in ((key, value), (kind + key, value), (bytes(pair[0]), bytes(pair[1]))):
        try:
            again = decode_record(one, other)
        except RemoteProtocolError:
            continue
        assert decode_record(*encode_record(again)) == again


def test_a_record_that_cannot_stand_in_a_packet() -> None:
    """Our own caller is told."""
    with pytest.raises(InvalidArgument):
        encode_record(FactRecord("a", 1 << 64))


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        (b"1.1", (1, 1)),
        (b"12.345", (12, 345)),
        (b"9999999999999999999.1", (9999999999999999999, 1)),
        (b"0.1", None),
        (b"1.0", None),
        (b"01.1", None),
        (b"1", None),
        (b"1.1.1", None),
        (b"1.1\n", None),
        (b"@1.1", None),
        (b"a.1", None),
        (b"1.-1", None),
        (b"12345678901234567890.1", None),
    ],
)
def test_d3_unique_addresses_have_a_block(address: bytes, parts: tuple[int, int] | None) -> None:
    """Each has one form, so no two texts are one address."""
    assert split_unique(address) == parts
    if parts is not None:
        assert b"%d.%d" % parts == address
