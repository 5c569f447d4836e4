"""Msgpack with limits: what is refused, by either side."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto import codec
from afbus.proto.codec import Fields, judging
from afbus.proto.errors import (
    CloseCode,
    Denied,
    InvalidArgument,
    RemoteProtocolError,
    TooBig,
)
from afbus.proto.limits import FRAME_BYTES, FRAME_DEPTH, FRAME_ITEMS
from afbus.proto.match import Overflow

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def nested(depth: int) -> list[Any]:
    """Return lists within lists."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@given(PLAIN)
def test_plain_values_come_back(value: object) -> None:
    """All that a packet may hold."""
    assert codec.decode(codec.encode(value)) == value


@pytest.mark.parametrize(
    "value", [1.5, {1: 2}, object(), 1 << 64, nested(FRAME_DEPTH + 1), "\ud800", {b"a": 1}]
)
def test_values_that_cannot_stand_in_a_packet(value: object) -> None:
    """The caller's fault: EINVAL."""
    with pytest.raises(InvalidArgument):
        codec.encode(value)


def test_limits_of_size_and_depth() -> None:
    """At the limit it goes, beyond it does not."""
    assert codec.decode(codec.encode(nested(FRAME_DEPTH))) == nested(FRAME_DEPTH)
    with pytest.raises(TooBig):
        codec.encode(bytes(FRAME_BYTES))
    with pytest.raises(RemoteProtocolError) as caught:
        codec.decode(bytes(FRAME_BYTES + 1))
    assert caught.value.code is CloseCode.LIMIT


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x01\x01",
        b"\x92\x01",
        b"\xa2\xff\xff",
        msgpack.packb(1.5),
        msgpack.packb(msgpack.ExtType(5, b"abc")),
        msgpack.packb(msgpack.Timestamp(1)),
        msgpack.packb({1: 2}),
        msgpack.packb({b"a": 2}),
        b"\x82\xa1a\x01\xa1a\x02",
        msgpack.packb(nested(FRAME_DEPTH + 1)),
        b"\x91" * 5000 + b"\x01",
        msgpack.packb([0] * (FRAME_ITEMS + 1)),
        b"\xdd\xff\xff\xff\xff",
        b"\x81\x91\x01\x01",
    ],
)
def test_packets_that_are_refused(data: bytes) -> None:
    """The peer's fault, and always of one type."""
    with pytest.raises(RemoteProtocolError):
        codec.decode(data)


@pytest.mark.parametrize("head", [b"\xdc\x10\x00", b"\xdd\x00\x00\x10\x00", b"\xde\x10\x00\xa1a"])
def test_case42_promised_lengths_take_no_memory(head: bytes) -> None:
    """Lists within lists, each of which promises thousands of elements that never come."""
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="deeply"):
            codec.decode(head * 1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


@given(st.binary(max_size=64))
def test_decode_raises_one_type(data: bytes) -> None:
    """Whatever the bytes are."""
    try:
        value = codec.decode(data)
    except RemoteProtocolError:
        return
    assert codec.decode(codec.encode(value)) == value


TAKES: list[tuple[Callable[[Fields], object], object]] = [
    (lambda fields: fields.take_int(1, 2), 3),
    (lambda fields: fields.take_int(), True),
    (lambda fields: fields.take_int(), -1),
    (lambda fields: fields.take_bool(), 1),
    (lambda fields: fields.take_str(2), "abc"),
    (lambda fields: fields.take_str(2), b"a"),
    (lambda fields: fields.take_bytes(1, 2), b""),
    (lambda fields: fields.take_bytes(1, 2), "a"),
    (lambda fields: fields.take_maybe_bytes(1, 2), b""),
    (lambda fields: fields.take_list(1), [1, 2]),
    (lambda fields: fields.take_list(1), {}),
    (lambda fields: fields.take_map(1), []),
    (lambda fields: fields.take_enum(Overflow), 9),
    (lambda fields: fields.end(), None),
]


@pytest.mark.parametrize(("take", "value"), TAKES)
def test_fields_check_what_they_take(take: Callable[[Fields], object], value: object) -> None:
    """Each kind of element, and nothing left."""
    with pytest.raises(RemoteProtocolError, match="thing"):
        take(Fields("thing", [value]))


def test_fields_end_where_they_end() -> None:
    """No list, or nothing left."""
    with pytest.raises(RemoteProtocolError):
        Fields("thing", {})
    with pytest.raises(RemoteProtocolError, match="missing"):
        Fields("thing", []).take_any()
    with pytest.raises(RemoteProtocolError):
        Fields("thing", []).take_maybe_bytes()
    fields = Fields("thing", [None, b"x"])
    assert fields.take_maybe_bytes() is None
    assert fields.take_maybe_bytes() == b"x"
    fields.end()


def test_judging_blames_the_peer() -> None:
    """A refusal of our constructors, while the peer's packet is read."""
    with pytest.raises(RemoteProtocolError, match="thing: no"), judging("thing"):
        raise Denied("no")
