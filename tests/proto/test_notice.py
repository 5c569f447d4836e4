"""Notices and gap records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto import codec
from afbus.proto.errors import RemoteProtocolError, TooBig
from afbus.proto.notice import GAP_BYTES, Event, Gap, GapReason, Notice

NOTICES = st.builds(
    Notice,
    st.sampled_from(Event),
    st.lists(st.binary(min_size=1, max_size=256), max_size=4).map(tuple),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=4),
        st.integers(0, 1 << 63) | st.text(st.characters(codec="utf-8"), max_size=4),
        max_size=4,
    ),
)


def test_d15_events_never_change_their_number() -> None:
    """They are on the wire, in this order from 1."""
    names = (
        "JOINED LEFT KILLED NODE_LOST NODE_BACK REVOKED EVICTED MASTER_LOST MASTER_BACK GAP "
        "UNREAD OUTCOME_UNKNOWN CLUSTER_LOST CLUSTER_BACK FREED"
    ).split()
    assert {event.name: event.value for event in Event} == {
        name: number for number, name in enumerate(names, 1)
    }


@given(NOTICES)
def test_d15_notices_come_back(notice: Notice) -> None:
    """Through the body of their message."""
    assert Notice.decode(notice.encode()) == notice


@pytest.mark.parametrize(
    "value",
    [
        1,
        [],
        [99, [], "", {}],
        [1, [b""], "", {}],
        [1, [b"x" * 257], "", {}],
        [1, [b"x"] * 129, "", {}],
        [1, [], "x" * 1025, {}],
        [1, [], "", {"a": None}],
        [1, [], "", {"a": True}],
        [1, [], "", {str(n): n for n in range(17)}],
        [1, [], "", {}, 0],
    ],
)
def test_d15_bodies_that_are_refused(value: object) -> None:
    """The peer's fault."""
    with pytest.raises(RemoteProtocolError):
        Notice.decode(codec.encode(value))


def test_d14_a_notice_is_inline() -> None:
    """Or cannot be sent."""
    with pytest.raises(TooBig):
        Notice(Event.LEFT, (b"x" * 256,) * 300).encode()


@given(st.binary(max_size=40))
def test_decoders_raise_one_type(data: bytes) -> None:
    """Whatever the bytes are."""
    for decode in (Notice.decode, lambda data: Gap.unpack(b"1.1", data)):
        try:
            decode(data)
        except RemoteProtocolError:
            continue


def test_d12_the_layout_of_a_gap() -> None:
    """First, last and count of 64 bits, the reason of 32, little endian."""
    gap = Gap(b"1.7", 3, 9, 4, GapReason.CONFLATED)
    assert gap.pack().hex() == "03000000000000000900000000000000040000000000000004000000"
    assert Gap.unpack(b"1.7", gap.pack()) == gap
    assert GAP_BYTES == 28


def test_d12_a_gap_says_whether_anybody_counted() -> None:
    """What is known is exact, and what nobody knows is never told as a number."""
    gap = Gap(b"1.7", 3, 9, 4, GapReason.FULL)
    assert gap.is_counted
    assert str(gap) == "4 messages of 1.7 are missing, numbers 3 to 9 (full)"
    for reason, why in ((GapReason.AGENT_RESTART, "agent restart"), (GapReason.EVICTED, "evicted")):
        gap = Gap(b"", 0, 0, 0, reason)
        assert Gap.unpack(b"", gap.pack()) == gap
        assert not gap.is_counted
        assert str(gap) == f"an unknown number of messages is missing ({why})"
    gap = Gap(b"1.7", 3, 9, 0, GapReason.AGENT_RESTART)
    assert not gap.is_counted
    unknown = "an unknown number of messages of 1.7 is missing, of numbers 3 to 9 (agent restart)"
    assert str(gap) == unknown
