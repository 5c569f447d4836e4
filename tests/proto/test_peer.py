"""Frames between two nodes: round trips, limits, and one type of error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto import codec, peer
from afbus.proto.errors import CloseCode, Denied, RemoteProtocolError
from afbus.proto.frames import Closed, Result
from afbus.proto.peer import (
    BodyRefused,
    BodySent,
    BodyTaken,
    Command,
    PeerFrame,
    PeerHello,
)

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=10)
ADDRESS = st.binary(min_size=1, max_size=20)
LANE = st.binary(min_size=16, max_size=16)
ITEMS = st.lists(st.tuples(st.integers(0, 99), st.binary(max_size=9)), max_size=3).map(tuple)
FRAMES: st.SearchStrategy[PeerFrame] = st.one_of(
    st.builds(PeerHello, LANE, st.none(), st.just(0), U32),
    st.builds(PeerHello, LANE, LANE, U64, U32),
    st.builds(
        Command,
        U64,
        ADDRESS,
        U32,
        ADDRESS,
        ITEMS,
    ),
    st.builds(Result, U64, st.just(0), U64 | TEXT | st.none()),
    st.builds(BodySent, U32, st.integers(1, 1 << 24), st.binary(min_size=32, max_size=32)),
    st.builds(BodyTaken, U32),
    st.builds(BodyRefused, U32, st.integers(1, 200), TEXT),
    st.builds(Closed, st.sampled_from(CloseCode), TEXT),
)


@given(frame=FRAMES)
def test_peer_frames_round_trip(frame: PeerFrame) -> None:
    """What is decoded is what was encoded."""
    assert peer.decode(peer.encode(frame)) == frame


@given(data=st.binary(max_size=80))
def test_garbage_is_one_type_of_error(data: bytes) -> None:
    """Bytes that are no frame are refused."""
    with pytest.raises(RemoteProtocolError):
        peer.decode(data)


@given(frame=FRAMES, cut=st.integers(1, 20))
def test_a_cut_frame_is_one_type_of_error(frame: PeerFrame, cut: int) -> None:
    """A frame that lacks its end is refused."""
    with pytest.raises(RemoteProtocolError):
        peer.decode(peer.encode(frame)[:-cut])


def test_d5_a_refusal_keeps_its_class_over_two_nodes() -> None:
    """The master sees the error that the peer's agent raised."""
    told = peer.decode(peer.encode(Result.refused(7, Denied("not yours"))))
    assert isinstance(told, Result)
    assert isinstance(told.to_error(), Denied)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param([1, 1, b"l" * 16, None, 5], id="a record of no lane"),
        pytest.param([1, 1, b"short", None, 0], id="a lane of another size"),
        pytest.param([2, 1, b"", 0, b"a", []], id="no path"),
        pytest.param([2, 1, b"/p", 0, b"", []], id="no target"),
        pytest.param([2, 1, b"/p", 0, b"a", [[1]]], id="half an item"),
        pytest.param([4, 1, 0, b"d" * 32], id="an empty body"),
        pytest.param([4, 1, (1 << 24) + 1, b"d" * 32], id="a body beyond the limit"),
        pytest.param([6, 1, 0, ""], id="a refusal without errno"),
        pytest.param([5, 1, 2], id="one field too many"),
        pytest.param([99], id="a kind that is none"),
    ],
)
def test_what_breaks_a_rule_is_refused(fields: list[object]) -> None:
    """Each rule of a frame is checked."""
    with pytest.raises(RemoteProtocolError):
        peer.decode(codec.encode(fields))
