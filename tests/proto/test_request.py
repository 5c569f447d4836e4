"""Requests to a bus's master, and its answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto import codec, request
from afbus.proto.errors import (
    Denied,
    InvalidArgument,
    MasterLost,
    NameTooLong,
    NodeLost,
    NotJoined,
    RemoteProtocolError,
    TooBig,
)
from afbus.proto.limits import REQUEST_BYTES
from afbus.proto.match import Overflow
from afbus.proto.names import NameFlags
from afbus.proto.request import (
    Answer,
    Join,
    Leave,
    MonitorRequest,
    NoticesRequest,
    Own,
    Publish,
    Release,
    Request,
    RequestKind,
    Subscribe,
    Unsubscribe,
)
from afbus.proto.terms import Terms

NAMES = st.binary(min_size=1, max_size=256).filter(lambda name: name[-1] != 0)
WHAT = st.sampled_from([Terms(), Terms.of("a.b", k=1)]) | st.just(bytes(range(64)))
TEXT = st.text(st.characters(codec="utf-8"), max_size=9)
REQUESTS: st.SearchStrategy[Request] = st.one_of(
    st.builds(Join, st.binary(max_size=40)),
    st.builds(Own, NAMES, st.integers(0, 7).map(NameFlags)),
    st.builds(Release, NAMES),
    st.builds(Subscribe, WHAT, st.sampled_from([Overflow.GAP, Overflow.CONFLATE])),
    st.builds(Subscribe, WHAT, st.just(Overflow.BLOCK), st.integers(1, 60000)),
    st.builds(Unsubscribe, WHAT),
    st.builds(Publish, WHAT),
    st.builds(NoticesRequest, st.booleans()),
    st.builds(MonitorRequest, st.booleans()),
    st.just(Leave()),
)


@given(REQUESTS)
def test_r1_requests_come_back(asked: Request) -> None:
    """Through the body of a message."""
    assert request.decode(request.encode(asked)) == asked


@given(st.integers(0, 4095), TEXT, st.dictionaries(TEXT, st.integers(0, 9) | TEXT, max_size=3))
def test_r1_answers_come_back(number: int, text: str, detail: dict[str, int | str]) -> None:
    """Through the body of a message."""
    answer = Answer(number, text, detail)
    assert Answer.decode(answer.encode()) == answer
    assert answer.is_ok is (number == 0)


def test_d7_a_refusal_becomes_an_error() -> None:
    """With errno and reason."""
    answer = Answer.decode(Answer.refused(Denied("not for you")).encode())
    error = answer.to_error()
    assert type(error) is Denied
    assert error.message == "not for you"
    for kind in (MasterLost, NodeLost, NotJoined):
        error = Answer.decode(Answer.refused(kind("why")).encode()).to_error()
        assert type(error) is kind, "classes that share an errno are told apart"
    unknown = Answer(Denied.ERRNO, "of a newer master", code=9999)
    assert type(Answer.decode(unknown.encode()).to_error()) is Denied
    with pytest.raises(TooBig):
        Answer(detail={"x": bytes(REQUEST_BYTES)}).encode()


def test_kinds_never_change_their_number() -> None:
    """They are on the wire, in this order from 1."""
    names = "JOIN OWN RELEASE SUBSCRIBE UNSUBSCRIBE PUBLISH NOTICES MONITOR LEAVE".split()
    assert {kind.name: kind.value for kind in RequestKind} == {
        name: number for number, name in enumerate(names, 1)
    }


def test_d1_names_are_addresses() -> None:
    """Of 1 to 256 bytes, without zeros at the end."""
    for name in (b"", b"a\0"):
        with pytest.raises(InvalidArgument):
            Own(name)
    with pytest.raises(NameTooLong):
        Release(bytes([65]) * 257)


@pytest.mark.parametrize(
    "value",
    [
        0,
        [],
        [0],
        [99],
        [1],
        [1, "text"],
        [1, bytes(40000)],
        [2, b"", 0],
        [2, b"a\0", 0],
        [2, b"a", 8],
        [4, None, None, 1, 0],
        [4, b"a", bytes(8), 1, 0],
        [4, None, b"abc", 1, 0],
        [4, b"a..b", None, 1, 0],
        [4, b"a", None, 4, 0],
        [4, b"a", None, 5, 0],
        [7, 1],
        [9, 0],
    ],
)
def test_r1_bodies_that_are_refused(value: object) -> None:
    """The peer's fault."""
    with pytest.raises(RemoteProtocolError):
        request.decode(codec.encode(value))


@given(st.binary(max_size=40))
def test_decoders_raise_one_type(data: bytes) -> None:
    """Whatever the bytes are."""
    for packet in (data, b"\x93" + data, b"\x95\x04" + data):
        for decode in (request.decode, Answer.decode):
            try:
                decode(packet)
            except RemoteProtocolError:
                continue


@given(REQUESTS, st.integers(0, 400), st.integers(0, 255))
def test_mutated_requests_raise_one_type(asked: Request, place: int, byte: int) -> None:
    """One byte is another."""
    bad = bytearray(request.encode(asked))
    bad[place % len(bad)] = byte
    try:
        again = request.decode(bytes(bad))
    except RemoteProtocolError:
        return
    assert request.decode(request.encode(again)) == again
