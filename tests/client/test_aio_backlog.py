"""What has arrived and is not read yet, and messages as values."""

from __future__ import annotations

import array
import errno
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus._datapath import MSG_MONITOR
from afbus.client.backlog import Backlog, Newest
from afbus.client.message import Message, NoReply, read
from afbus.proto import control
from afbus.proto.address import BusAddress
from afbus.proto.control import (
    DestinationAddr,
    Identity,
    Item,
    MessageTerms,
    OwnedAddr,
    ReplyTo,
    Sequence,
    Serial,
)
from afbus.proto.errors import Denied, RemoteProtocolError
from afbus.proto.notice import Event, Gap, GapReason, Notice
from afbus.proto.terms import Terms

PATH = b"/demo"


def message(source: str, sequence: int) -> Message:
    """A message with nothing but its origin."""
    return Message(b"", BusAddress(PATH, source), sequence=sequence)


STEPS = st.lists(
    st.one_of(st.sampled_from(["1.1", "1.2", "1.3"]), st.just("take"), st.just("gap")), max_size=80
)


@given(STEPS, st.integers(1, 5))
def test_d12_what_is_missing_is_told_exactly(steps: list[str], limit: int) -> None:
    """Of each source every message is either read, in order, or counted by a gap before it."""
    backlog = Backlog(limit)
    sent: dict[bytes, int] = {}
    read_: list[Message | Gap] = []
    for step in steps:
        if step == "take":
            item = backlog.take()
            if item is not None:
                read_.append(item)
        elif step == "gap":
            # The switch had no room for two messages of a source.
            first = sent.get(b"1.1", 0) + 1
            backlog.put(Gap(b"1.1", first, first + 1, 2, GapReason.FULL))
            sent[b"1.1"] = first + 1
        else:
            number = sent[step.encode()] = sent.get(step.encode(), 0) + 1
            backlog.put(message(step, number))
    while (item := backlog.take()) is not None:
        read_.append(item)
    for source, count in sent.items():
        known = 0
        for item in read_:
            if isinstance(item, Gap) and item.source == source:
                assert (item.first, item.last) == (known + 1, known + item.count)
                known = item.last
            elif isinstance(item, Message) and item.source.address == source:
                assert item.sequence == known + 1
                known = item.sequence
        assert known == count


def test_d12_backlog_that_holds_loses_nothing() -> None:
    """It only says that it is full."""
    backlog = Backlog(2, holds=True)
    for number in range(1, 6):
        assert backlog.put(message("1.1", number)) is None
        assert backlog.is_full is (number >= 2)
    assert [item.sequence for item in backlog.clear()] == [1, 2, 3, 4, 5]
    assert backlog.take() is None


def test_backlog_gives_out_what_is_picked() -> None:
    """What is picked is gone, the rest keeps its order."""
    backlog = Backlog(9)
    for number in range(1, 6):
        backlog.put(message("1.1", number))
    assert [item.sequence for item in backlog.pick(lambda item: item.sequence % 2 == 0)] == [2, 4]
    assert [item.sequence for item in backlog.clear()] == [1, 3, 5]


class SlowNewest:
    """What `Newest` should be, in the plainest way: number, source and topic of what waits."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting: list[tuple[str, str, list[int]]] = []
        self.missing: dict[str, list[int]] = {}

    def put(self, source: str, topic: str, number: int) -> None:
        """Put in a message."""
        self.waiting = [one for one in self.waiting if one[:2] != (source, topic)]
        if sum(topic != "gap" for _, topic, _ in self.waiting) >= self.limit:
            self.missing.setdefault(source, []).append(number)
        else:
            self.settle()
            self.waiting.append((source, topic, [number]))

    def take(self) -> tuple[str, str, list[int]] | None:
        """Take out what is next."""
        if not self.waiting:
            self.settle()
        return self.waiting.pop(0) if self.waiting else None

    def settle(self) -> None:
        """Put the gaps behind what waits."""
        self.waiting += [(source, "gap", numbers) for source, numbers in self.missing.items()]
        self.missing = {}


@given(
    st.lists(
        st.none() | st.tuples(st.sampled_from(["1.1", "1.2"]), st.sampled_from(["a", "b", "c"])),
        max_size=80,
    ),
    st.integers(1, 4),
)
def test_d12_newest_of_each_stream_waits(steps: list[tuple[str, str] | None], limit: int) -> None:
    """Of each sender and topic only the newest; one topic too many is a gap, in its order."""
    backlog, model = Newest(limit), SlowNewest(limit)
    last: dict[str, int] = {}
    for step in [*steps, *[None] * 90]:
        if step is None:
            item, wanted = backlog.take(), model.take()
            if isinstance(item, Gap):
                assert wanted is not None
                source, topic, numbers = wanted
                assert (item.source.decode(), "gap") == (source, topic)
                first, last_ = numbers[0], numbers[-1]
                assert (item.first, item.last, item.count) == (first, last_, len(numbers))
            elif item is not None:
                assert item.terms is not None
                source, topic = item.source.address.decode(), item.terms.format()
                assert (source, topic, [item.sequence]) == wanted
            else:
                assert wanted is None
        else:
            source, topic = step
            number = last[source] = last.get(source, 0) + 1
            from_ = BusAddress(PATH, source)
            backlog.put(Message(b"", from_, terms=Terms.parse(topic), sequence=number))
            model.put(source, topic, number)
        assert len(backlog) == len(model.waiting) + len(model.missing)
    assert backlog.clear() == []


def received(
    *items: Item, body: bytes = b"", flags: int = 0, source: BusAddress | None = None
) -> tuple[bytes, list[tuple[int, int, bytes]], int, BusAddress]:
    """What `recvmsg` returns."""
    return body, [control.encode(item) for item in items], flags, source or BusAddress(PATH, "1.1")


def test_r13_message_has_all_that_stood_beside_it() -> None:
    """Every item becomes a field."""
    identity = Identity("uid:1", "here", 2, 1, 1)
    to = BusAddress(PATH, "1.2")
    made = read(
        received(
            identity,
            DestinationAddr(to),
            MessageTerms(Terms.parse("a")),
            Sequence(7),
            Serial(8),
            OwnedAddr(to),
            body=b"x",
            flags=MSG_MONITOR | socket.MSG_CTRUNC,
        )
    )
    assert made == Message(
        b"x",
        BusAddress(PATH, "1.1"),
        destination=to,
        terms=Terms.parse("a"),
        sequence=7,
        serial=8,
        identity=identity,
        fds_lost=True,
        is_copy=True,
        commands=(OwnedAddr(to),),
    )
    assert made.expects_reply
    assert not made.is_multicast


def test_d15_kernel_speaks_in_notices() -> None:
    """From the kernel's address come notices, and the news that a reply will not come."""
    kernel = BusAddress.kernel(PATH)
    notice = Notice(Event.LEFT, (b"1.1",))
    assert read(received(body=notice.encode(), source=kernel)) == notice
    assert read(received(ReplyTo(5), source=kernel)) == NoReply(5)
    gap = Gap(b"1.1", 1, 2, 2, GapReason.FULL)
    assert read(received(gap)) == gap


def test_error_reply_is_an_errno_and_a_text() -> None:
    """The serial of a reply is an errno; of anything else it is no error."""
    source = BusAddress(PATH, "1.1")
    error = Message(b"no", source, serial=errno.EPERM, reply_to=5).error
    assert isinstance(error, Denied)
    assert error.message == "no"
    assert Message(b"no", source, reply_to=5).error is None
    assert Message(b"no", source, serial=errno.EPERM).error is None
    assert Message(b"no", source, serial=1 << 63, reply_to=5).error is None


def test_descriptors_are_closed_once_by_their_reader() -> None:
    """A message in a `with` closes what came with it; so does an agent's breach."""
    pairs = [os.pipe() for _ in range(2)]
    rights = [
        (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", pair).tobytes()) for pair in pairs
    ]
    made = read((b"", [rights[0]], 0, BusAddress(PATH, "1.1")))
    assert isinstance(made, Message)
    with made:
        assert made.fds == pairs[0]
    with pytest.raises(RemoteProtocolError):
        read((b"", [rights[1], (control.BUS_SOCKET, 999, b"")], 0, BusAddress(PATH, "1.1")))
    for descriptor in (*pairs[0], *pairs[1]):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
