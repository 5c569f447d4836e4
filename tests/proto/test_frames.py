"""Frames of the door: round trips, strict arguments, and one type of error."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto import codec, frames
from afbus.proto.errors import (
    BusError,
    CloseCode,
    Denied,
    InvalidArgument,
    MasterLost,
    NotJoined,
    RemoteProtocolError,
    TooBig,
    error_for,
)
from afbus.proto.frames import ARGUMENTS, Call, Closed, Frame, Hello, Op, Result, Welcome
from afbus.proto.limits import RING_BYTES_MAX, RING_BYTES_MIN
from afbus.proto.version import VERSION, is_spoken

U64 = st.integers(0, (1 << 64) - 1)
RING = st.integers(RING_BYTES_MIN, RING_BYTES_MAX)
TEXT = st.text(st.characters(codec="utf-8"), max_size=10)
TOKEN = st.binary(min_size=16, max_size=16)
PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | U64 | TEXT | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
VALUES: dict[type, st.SearchStrategy[Any]] = {
    bytes: st.binary(max_size=20),
    int: U64,
    str: TEXT,
    dict: st.dictionaries(TEXT, PLAIN, max_size=2),
    list: st.lists(st.tuples(st.integers(0, 99), st.binary(max_size=9)).map(list[Any]), max_size=3),
    type(None): st.none(),
}


UNREAD = st.builds(
    lambda source, first, more, lack: [source, first, first + more, max(1, more + 1 - lack)],
    st.binary(min_size=1, max_size=256),
    st.integers(1, 1 << 60),
    st.integers(0, 99),
    st.integers(0, 99),
)


def args_of(op: Op) -> st.SearchStrategy[dict[str, Any]]:
    """Return arguments that fit."""
    if op is Op.UNREAD:
        rows = st.lists(UNREAD, max_size=3)
        return st.fixed_dictionaries({"messages": rows, "reason": TEXT})
    each = {
        name: st.one_of([VALUES[one] for one in types]) for name, types in ARGUMENTS[op].items()
    }
    return st.fixed_dictionaries(each)


CALLS = st.sampled_from(Op).flatmap(lambda op: st.builds(Call, U64, st.just(op), args_of(op)))
REFUSED = st.builds(
    lambda serial, number, text: Result.refused(serial, error_for(number, text)),
    U64,
    st.integers(1, 200),
    TEXT,
)
FRAMES: st.SearchStrategy[Frame] = st.one_of(
    st.builds(Hello, st.integers(0, 9), st.none() | TOKEN, RING, RING),
    st.builds(
        Welcome,
        st.integers(0, 9),
        U64,
        st.binary(min_size=1, max_size=20),
        TOKEN,
        U64,
        RING,
        RING,
        st.booleans(),
        TEXT,
    ),
    CALLS,
    st.builds(Result, U64, st.just(0), PLAIN),
    REFUSED,
    st.builds(Closed, st.sampled_from(CloseCode), TEXT),
)


@given(FRAMES)
def test_frames_come_back(frame: Frame) -> None:
    """Through one packet."""
    assert frames.decode(frames.encode(frame)) == frame


def test_operations_never_change_their_number() -> None:
    """They are on the wire, in this order from 1; each has its arguments."""
    names = "ATTACH BIND CONTROL OPTION_SET OPTION_GET SHUTDOWN LIST STATUS CLOSE CHALLENGE PROVE"
    expected = {name: n for n, name in enumerate([*names.split(), "UNREAD"], 1)}
    assert {op.name: op.value for op in Op} == expected
    assert set(ARGUMENTS) == set(Op)


CONTROL = {"dst": b"1.1", "items": [[1, b""]], "body": b""}


def test_arguments_that_may_be_absent() -> None:
    """Who may be None may be left out."""
    for call in (
        Call(1, Op.CONTROL, CONTROL),
        Call(2, Op.LIST, {"what": "buses"}),
        Call(3, Op.LIST, {"what": "endpoints", "path": b"/b", "after": 4096}),
    ):
        assert frames.decode(frames.encode(call)) == call


@pytest.mark.parametrize(
    "call",
    [
        Call(1, Op.ATTACH, {}),
        Call(1, Op.ATTACH, {"path": "text"}),
        Call(1, Op.ATTACH, {"path": b"", "more": 1}),
        Call(1, Op.SHUTDOWN, {"how": True}),
        Call(1, Op.LIST, {"what": "buses", "after": "1"}),
        Call(1, Op.LIST, {"what": "buses", "after": False}),
        Call(1, Op.CONTROL, CONTROL | {"items": [1]}),
        Call(1, Op.CONTROL, CONTROL | {"items": [[1]]}),
        Call(1, Op.CONTROL, CONTROL | {"items": [["1", b""]]}),
        Call(1, Op.CONTROL, CONTROL | {"items": [[1, b"", 2]]}),
        Call(1, Op.CONTROL, CONTROL | {"items": [[1, b""]] * 257}),
        Call(1, Op.CONTROL, CONTROL | {"items": [[1, bytes(20000)]]}),
        Call(1, Op.UNREAD, {"messages": [], "reason": "x" * 1025}),
        Call(1, Op.UNREAD, {"messages": [[b"1.1", 1, 1, 1]] * 257, "reason": ""}),
        Call(1, Op.UNREAD, {"messages": [1], "reason": ""}),
        Call(1, Op.UNREAD, {"messages": [[b"1.1", 1, 1]], "reason": ""}),
        Call(1, Op.UNREAD, {"messages": [[b"", 1, 1, 1]], "reason": ""}),
        Call(1, Op.UNREAD, {"messages": [[b"1.1", 0, 1, 1]], "reason": ""}),
        Call(1, Op.UNREAD, {"messages": [[b"1.1", 2, 1, 1]], "reason": ""}),
        Call(1, Op.UNREAD, {"messages": [[b"1.1", 1, 1, 2]], "reason": ""}),
        Call(1, Op.UNREAD, {"messages": [[b"1.1", 1, 1, 0]], "reason": ""}),
    ],
)
def test_arguments_that_are_refused(call: Call) -> None:
    """Missing, unknown, or of another type."""
    with pytest.raises(RemoteProtocolError):
        frames.decode(frames.encode(call))


@pytest.mark.parametrize(
    "value",
    [
        [],
        [99],
        [1, 1, b"short", 4096, 4096],
        [1, 1, None, 4095, 4096],
        [1, 1, None, 4096, 1 << 40],
        [1, 1, None, 4096, 4096, 0],
        [3, 1, 99, {}],
        [3, 1, 1, []],
        [4, 1, 1, 5, 0],
        [4, 1, 0, None, 5],
        [4, 1, -1, None, 0],
        [4, 1, 5000, "", 0],
        [5, 99, ""],
        {"a": 1},
    ],
)
def test_packets_that_are_no_frames(value: object) -> None:
    """The peer's fault."""
    with pytest.raises(RemoteProtocolError):
        frames.decode(codec.encode(value))


@given(st.binary(max_size=64))
def test_decode_raises_one_type(data: bytes) -> None:
    """Whatever the bytes are; lists of five elements reach deeper."""
    for packet in (data, b"\x95" + data, b"\x94\x03" + data):
        try:
            frame = frames.decode(packet)
        except RemoteProtocolError:
            continue
        assert frames.decode(frames.encode(frame)) == frame


@given(FRAMES, st.integers(0, 1 << 16), st.integers(0, 255), st.booleans())
def test_mutated_frames_raise_one_type(frame: Frame, place: int, byte: int, cut: bool) -> None:
    """One byte is another, or the end is missing."""
    bad = bytearray(frames.encode(frame))
    place %= len(bad)
    bad[place] = byte
    try:
        again = frames.decode(bytes(bad[:place] if cut else bad))
    except RemoteProtocolError:
        return
    assert frames.decode(frames.encode(again)) == again


@pytest.mark.parametrize("error", [NotJoined("a"), Denied("b"), MasterLost("c")])
def test_d7_a_refusal_keeps_its_class(error: BusError) -> None:
    """Even where classes share an errno."""
    result = Result.refused(7, error)
    again = frames.decode(frames.encode(result))
    assert isinstance(again, Result)
    assert not again.is_ok
    made = again.to_error()
    assert (type(made), made.errno, made.message) == (type(error), error.errno, error.message)
    assert Result(1).is_ok


def test_d7_a_refusal_of_a_newer_peer_keeps_its_errno() -> None:
    """By an unknown code, or by none."""
    for code in (0, 9999):
        assert Result(1, errno.EPERM, "x", code).to_error().errno == errno.EPERM
    assert Result(1, errno.EXDEV, "x", 9999).to_error().errno == errno.EXDEV


def test_long_texts_are_clipped_and_long_values_refused() -> None:
    """A reason is for people, a value is not."""
    assert len(frames.encode(Closed(CloseCode.RING, "é" * 5000))) < 1100
    assert len(Result.refused(1, Denied("\udcff" * 5000)).value) == 1024
    with pytest.raises(TooBig):
        frames.encode(Result(1, 0, bytes(1 << 20)))
    with pytest.raises(InvalidArgument):
        frames.encode(Result(1, 0, 1.5))


def test_versions() -> None:
    """We speak ours and nothing newer."""
    assert is_spoken(VERSION)
    assert not is_spoken(VERSION + 1)
    assert not is_spoken(0)
    assert Hello().version == VERSION
