"""What nobody will read, in rows for the agent: each is one that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from afbus.client.message import Message
from afbus.client.unread import Unread
from afbus.proto import frames
from afbus.proto.address import BusAddress
from afbus.proto.frames import Call, Op

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCES = [BusAddress("/demo", name) for name in ("1.1", "1.2", "shop")]


def note(unread: Unread, source: BusAddress, numbers: Sequence[int]) -> None:
    """Let messages with these numbers go unread."""
    for number in numbers:
        unread.add(Message(b"", source, sequence=number), "it has left")


@given(st.lists(st.tuples(st.sampled_from(SOURCES), st.integers(1, 20)), min_size=1))
def test_d20_every_message_is_in_one_row_that_the_agent_takes(
    messages: list[tuple[BusAddress, int]],
) -> None:
    """Also when the numbers of a sender begin anew, as its agent does."""
    unread = Unread()
    for source, number in messages:
        note(unread, source, [number])
    reason, rows = unread.take()
    assert not unread
    for source in SOURCES:
        mine = [row for row in rows if row[0] == source]
        assert sum(count for _, _, _, count in mine) == [one for one, _ in messages].count(source)
    told = [[source.address, *numbers] for source, *numbers in rows]
    args = {"messages": told, "reason": reason}
    assert frames.decode(frames.encode(Call(1, Op.UNREAD, args))) == Call(1, Op.UNREAD, args)


def test_d20_a_sender_that_counts_anew_has_another_row() -> None:
    """Of one life each: a range over both would be of messages that it never sent."""
    unread = Unread()
    note(unread, SOURCES[0], [178, 180, 1, 2])
    assert unread.take() == (
        "it has left",
        [(SOURCES[0], 178, 180, 2), (SOURCES[0], 1, 2, 2)],
    )
