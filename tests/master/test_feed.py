"""The feed: tables reach all readers, results wait for the live ones, none holds up the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from afbus.master.effect import Effect, LinkId, Send
from afbus.master.feed import Feed, FeedLimits
from afbus.proto import cluster
from afbus.proto.cluster import Ack, ClusterFrame, Nack, Part, Resync, TableDelta
from afbus.proto.errors import RemoteProtocolError
from afbus.proto.frames import Result
from afbus.proto.mirror import Mirror
from afbus.proto.record import FactRecord, encode_record
from afbus.proto.table import Delta, Table

EPOCH = 3
LIMITS = FeedLimits(
    ack_s=5, load_s=30, window_bytes=300, loads=2, log_bytes=2000, log_deltas=6, backoff_s=1
)
A, B, C = LinkId(1), LinkId(2), LinkId(3)


class Desk:
    """A feed, its table, and what it sent to whom."""

    def __init__(self, limits: FeedLimits = LIMITS, records: int = 1) -> None:
        self.table: Table[bytes, bytes] = Table()
        self.effects: list[Effect] = []
        self.now = 0.0
        for number in range(records):
            self.table.put(*encode_record(FactRecord(f"n{number}", number)))
        self.feed = Feed(self.table, EPOCH, self.effects, limits)

    def change(self, name: str) -> None:
        """Change the table and tell all."""
        record = FactRecord(name, self.table.version)
        self.feed.publish([self.table.put(*encode_record(record))], self.now)

    def wait(self, link: LinkId, serial: int) -> None:
        """A call of this link has its result."""
        self.feed.wait(link, [cluster.encode(Result(serial))])

    def sent(self) -> list[tuple[LinkId, ClusterFrame]]:
        """Take what was sent."""
        made = [
            (one.link, cluster.decode(one.data)) for one in self.effects if isinstance(one, Send)
        ]
        self.effects.clear()
        return made

    def to(self, link: LinkId) -> list[ClusterFrame]:
        """Take what was sent, of which all but this link's is forgotten."""
        return [frame for one, frame in self.sent() if one == link]

    def join_live(self, *links: LinkId) -> None:
        """Let readers join, load, and be live."""
        for link in links:
            self.feed.join(link, 0, False, self.now)
            self.feed.receive_ack(link, self.table.version, self.now)
            self.feed.set_live(link)
        self.effects.clear()


def test_a_reader_gets_a_snapshot_and_then_deltas() -> None:
    """Nothing of what was before it."""
    desk = Desk(records=3)
    desk.feed.join(A, 0, False, 0.0)
    [part] = desk.to(A)
    assert isinstance(part, Part)
    assert (part.epoch, part.version, len(part.entries)) == (EPOCH, 3, 3)
    desk.change("x")
    assert desk.to(A) == []
    desk.feed.receive_ack(A, 3, 0.0)
    [delta] = desk.to(A)
    assert isinstance(delta, TableDelta)
    assert (delta.delta.from_version, delta.delta.to_version) == (3, 4)
    assert desk.feed.get_lag(A) == 1


def test_case23_a_reader_that_returns_gets_what_it_missed() -> None:
    """From the log; and nothing at all, if it missed nothing."""
    desk = Desk()
    for _ in range(3):
        desk.change("x")
    desk.feed.join(A, 2, False, 0.0)
    versions = [frame.delta.to_version for frame in desk.to(A) if isinstance(frame, TableDelta)]
    assert versions == [3, 4]
    desk.feed.join(B, 4, False, 0.0)
    assert desk.sent() == []


def test_case23_a_reader_that_was_away_too_long_gets_a_snapshot() -> None:
    """The log has its length."""
    desk = Desk()
    for _ in range(10):
        desk.change("x")
    desk.feed.join(A, 2, False, 0.0)
    [part] = desk.to(A)
    assert isinstance(part, Part)
    assert part.version == 11


def test_snapshots_come_in_parts_and_take_turns() -> None:
    """As many at a time as there may be."""
    desk = Desk(FeedLimits(loads=1), records=5000)
    for link in (A, B):
        desk.feed.join(link, 0, False, 0.0)
    sent = desk.sent()
    assert {link for link, _ in sent} == {A}
    parts = [frame for _, frame in sent if isinstance(frame, Part)]
    assert [part.index for part in parts] == list(range(len(parts)))
    assert {part.count for part in parts} == {len(parts)}
    assert len(parts) > 1
    assert sum(len(part.entries) for part in parts) == 5000
    desk.feed.receive_ack(A, 5000, 0.0)
    assert {link for link, _ in desk.sent()} == {B}
    desk.feed.join(C, 0, False, 0.0)
    assert desk.sent() == []
    desk.feed.leave(B, 0.0)
    assert {link for link, _ in desk.sent()} == {C}


def test_the_barrier_waits_for_all_live_readers() -> None:
    """A result leaves when the last one has the version."""
    desk = Desk()
    desk.join_live(A, B)
    desk.feed.join(C, 1, False, 0.0)
    desk.change("x")
    desk.wait(A, 7)
    desk.feed.receive_ack(A, 2, 0.0)
    assert not any(isinstance(frame, Result) for _, frame in desk.sent())
    desk.feed.receive_ack(B, 2, 0.0)
    assert desk.sent() == [(A, Result(7))]


def test_a_result_about_what_is_there_already_waits_too() -> None:
    """Somebody else's change, that not all have: nothing new, and not there everywhere yet."""
    desk = Desk()
    desk.join_live(A, B)
    desk.change("x")
    desk.feed.receive_ack(A, 2, 0.0)
    desk.sent()
    desk.wait(A, 7)
    assert desk.sent() == []
    desk.feed.receive_ack(B, 2, 0.0)
    assert desk.sent() == [(A, Result(7))]
    desk.wait(A, 8)
    assert desk.sent() == [(A, Result(8))]


def test_results_leave_in_the_order_of_versions() -> None:
    """An earlier one that waits holds up a later one, which has to wait longer anyway."""
    desk = Desk()
    desk.join_live(A, B)
    for serial in (1, 2, 3):
        desk.change("x")
        desk.wait(A, serial)
    desk.feed.receive_ack(A, 4, 0.0)
    desk.sent()
    desk.feed.receive_ack(B, 3, 0.0)
    assert desk.sent() == [(A, Result(1)), (A, Result(2))]
    desk.feed.leave(B, 0.0)
    assert desk.sent() == [(A, Result(3))]


def test_a_reader_whose_link_is_gone_is_waited_for() -> None:
    """Until it is back, or given up: others send to it and hear from it meanwhile."""
    desk = Desk()
    desk.join_live(A, B)
    desk.feed.suspend(B, 0.0)
    desk.change("x")
    desk.wait(A, 7)
    desk.feed.receive_ack(A, 2, 0.0)
    assert all(link == A for link, _ in desk.sent())
    desk.feed.join(C, 1, True, 1.0)
    desk.feed.leave(B, 1.0)
    assert [type(frame) for frame in desk.to(C)] == [TableDelta]
    desk.feed.receive_ack(C, 2, 1.0)
    assert desk.sent() == [(A, Result(7))]
    desk.feed.expect(B, 2.0)
    desk.wait(A, 8)
    assert desk.sent() == []
    desk.feed.leave(B, 3.0)
    assert desk.sent() == [(A, Result(8))]


def test_a_live_reader_that_loads_is_waited_for() -> None:
    """It may act on what it had before."""
    desk = Desk()
    desk.join_live(A)
    desk.feed.join(B, 0, True, 0.0)
    desk.wait(A, 7)
    assert all(link == B for link, _ in desk.sent())
    desk.feed.receive_ack(B, 1, 0.0)
    assert desk.sent() == [(A, Result(7))]


def test_who_does_not_acknowledge_in_time_is_told() -> None:
    """The time begins with what it has not acknowledged, and is longer for a snapshot."""
    desk = Desk()
    desk.join_live(A)
    assert desk.feed.get_timer() is None
    desk.now = 10.0
    desk.change("x")
    desk.now = 12.0
    desk.change("x")
    assert desk.feed.get_timer() == 15.0
    desk.feed.receive_ack(A, 2, 13.0)
    assert desk.feed.get_timer() == 17.0
    assert desk.feed.handle_timer(16.9) == []
    [(link, text)] = desk.feed.handle_timer(17.0)
    assert link == A
    assert "version 2" in text
    desk.feed.leave(A, 17.0)
    desk.feed.join(B, 0, False, 17.0)
    assert desk.feed.get_timer() == 47.0
    assert [link for link, _ in desk.feed.handle_timer(47.0)] == [B]


def test_a_reader_may_take_its_time_to_catch_up() -> None:
    """By a snapshot and by what came meanwhile; then it has as long as everybody."""
    desk = Desk(FeedLimits(ack_s=5, load_s=30, backoff_s=1))
    desk.feed.join(A, 0, True, 0.0)
    for turn in range(1, 11):
        desk.now = float(turn)
        desk.change("x")
    desk.feed.receive_ack(A, 1, 12.0)
    assert desk.feed.get_timer() == 17.0
    desk.feed.receive_ack(A, 11, 14.0)
    assert desk.feed.get_timer() is None
    # By the log, after it was away.
    desk.feed.leave(A, 15.0)
    desk.feed.join(B, 2, True, 20.0)
    assert desk.feed.get_timer() == 50.0
    desk.feed.receive_ack(B, 10, 40.0)
    assert desk.feed.get_timer() == 50.0
    desk.now = 41.0
    desk.change("x")
    desk.feed.receive_ack(B, 11, 43.0)
    assert desk.feed.get_timer() == 48.0
    # The oldest that it has not acknowledged counts, however much follows.
    desk.now = 45.0
    desk.change("x")
    assert desk.feed.get_timer() == 48.0
    desk.feed.receive_ack(B, 12, 47.0)
    assert desk.feed.get_timer() == 50.0


def test_the_window_bounds_what_lies_unacknowledged() -> None:
    """And one delta; the rest is sent as it is acknowledged."""
    desk = Desk()
    desk.join_live(A)
    for _ in range(5):
        desk.change("x" * 100)
    frames = desk.to(A)
    assert 2 <= len(frames) < 5
    sizes = [len(cluster.encode(frame)) for frame in frames]
    assert sum(sizes[:-1]) < LIMITS.window_bytes <= sum(sizes)
    desk.feed.receive_ack(A, 2, 0.0)
    assert len(desk.to(A)) == 1
    # The log is cut while the window is shut.
    for _ in range(10):
        desk.change("y")
    [part] = [frame for frame in desk.to(A) if isinstance(frame, Part)]
    desk.feed.receive_ack(A, part.version, 0.0)
    left = [frame for frame in desk.to(A) if isinstance(frame, TableDelta)]
    assert left[0].delta.from_version == part.version


def test_case26_who_refuses_costs_one_snapshot_for_each_pause() -> None:
    """Pauses grow, up to their limit; results do not wait meanwhile, and it recovers."""
    desk = Desk()
    desk.join_live(A, B)
    desk.change("bad")
    desk.wait(A, 7)
    desk.feed.receive_ack(A, 2, 0.0)
    desk.sent()
    assert desk.feed.receive_nack(B, 2, 0.0)
    assert desk.sent() == [(A, Result(7))]
    assert not desk.feed.receive_nack(B, 2, 0.0)
    now, pauses = 0.0, []
    for _ in range(8):
        due = desk.feed.get_timer()
        assert due is not None
        pauses.append(due - now)
        now = due
        assert desk.feed.handle_timer(now) == []
        [part] = desk.to(B)
        assert isinstance(part, Part)
        assert part.version >= 2
        desk.feed.receive_nack(B, part.version, now)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    desk.change("bad")
    desk.feed.receive_ack(A, 3, now)
    desk.sent()
    due = desk.feed.get_timer()
    assert due is not None
    desk.feed.handle_timer(due)
    # Not the cached one, which it has refused.
    [part] = desk.to(B)
    assert isinstance(part, Part)
    assert part.version == 3
    desk.feed.receive_ack(B, 3, due)
    desk.wait(A, 8)
    assert desk.sent() == [(A, Result(8))]
    desk.change("x")
    desk.wait(A, 9)
    desk.feed.receive_ack(A, 4, due)
    assert (A, Result(9)) not in desk.sent()
    desk.feed.receive_ack(B, 4, due)
    assert desk.sent() == [(A, Result(9))]


def test_case25_a_gap_is_filled_from_the_log_but_not_in_a_loop() -> None:
    """The first question is answered at once, the next after a pause."""
    desk = Desk()
    desk.join_live(A)
    desk.now = 50.0
    for _ in range(3):
        desk.change("x")
    desk.sent()
    desk.feed.receive_resync(A, 2, 50.0)
    assert len(desk.to(A)) == 2
    desk.feed.receive_resync(A, 2, 50.1)
    assert desk.sent() == []
    due = desk.feed.get_timer()
    assert due == 51.0
    assert desk.feed.handle_timer(due) == []
    assert len(desk.to(A)) == 2
    desk.now = 60.0
    desk.feed.receive_resync(A, 0, 60.0)
    assert [type(frame) for frame in desk.to(A)] == [Part]
    desk.feed.receive_resync(A, 0, 70.0)
    assert desk.sent() == []


@pytest.mark.parametrize("what", ["ack", "nack", "resync"])
def test_versions_that_were_never_sent_end_the_link(what: str) -> None:
    """The peer's fault."""
    desk = Desk()
    desk.join_live(A)
    with pytest.raises(RemoteProtocolError):
        getattr(desk.feed, f"receive_{what}")(A, 2, 0.0)


@dataclass
class Node:
    """A node of the model: its mirror, and what is under way in both directions."""

    mirror: Mirror
    link: LinkId
    is_live: bool = False
    is_up: bool = True
    inbox: list[bytes] = field(default_factory=list)
    outbox: list[Ack | Nack | Resync] = field(default_factory=list)


class Cluster(RuleBasedStateMachine):
    """Some nodes with links that are slow and end, and a master that changes its table."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.nodes: list[Node] = []
        self.links = self.serial = 0
        self.waiting: dict[int, int] = {}

    def new_link(self) -> LinkId:
        """Return a number that was never used."""
        self.links += 1
        return LinkId(self.links)

    @precondition(lambda self: len(self.nodes) < 4)
    @rule()
    def come(self) -> None:
        """A node that has nothing."""
        node = Node(Mirror(), self.new_link())
        self.nodes.append(node)
        self.desk.feed.join(node.link, 0, False, self.desk.now)

    @rule(which=st.integers(0, 3))
    def state(self, which: int) -> None:
        """A node has stated all that it has, and counts."""
        if which < len(self.nodes) and self.nodes[which].is_up:
            self.desk.feed.set_live(self.nodes[which].link)
            self.nodes[which].is_live = True

    @rule(which=st.integers(0, 3))
    def cut(self, which: int) -> None:
        """A link ends; what is under way is lost."""
        if which < len(self.nodes) and self.nodes[which].is_up:
            node = self.nodes[which]
            node.is_up = False
            node.inbox.clear()
            node.outbox.clear()
            if node.is_live:
                self.desk.feed.suspend(node.link, self.desk.now)
            else:
                self.desk.feed.leave(node.link, self.desk.now)

    @rule(which=st.integers(0, 3))
    def come_back(self, which: int) -> None:
        """A node without a link has a new one."""
        if which < len(self.nodes) and not self.nodes[which].is_up:
            node = self.nodes[which]
            old, node.link, node.is_up = node.link, self.new_link(), True
            is_same = node.mirror.epoch == EPOCH
            node.mirror.receive_welcome(EPOCH, is_same)
            version = node.mirror.version if is_same else 0
            self.desk.feed.join(node.link, version, node.is_live, self.desk.now)
            if node.is_live:
                self.desk.feed.leave(old, self.desk.now)

    @rule(which=st.integers(0, 3))
    def give_up(self, which: int) -> None:
        """A node that was away too long is lost for good."""
        if which < len(self.nodes) and not self.nodes[which].is_up:
            node = self.nodes.pop(which)
            if node.is_live:
                self.desk.feed.leave(node.link, self.desk.now)

    @rule(size=st.integers(1, 150), number=st.integers(0, 9))
    def change(self, size: int, number: int) -> None:
        """The table changes for somebody's call, whose result waits."""
        self.desk.change("x" * size)
        callers = [node for node in self.nodes if node.is_up]
        if callers:
            self.serial += 1
            self.waiting[self.serial] = self.desk.table.version
            self.desk.wait(callers[number % len(callers)].link, self.serial)

    @rule(which=st.integers(0, 3), count=st.integers(1, 4))
    def deliver(self, which: int, count: int) -> None:
        """Some frames reach a node, in their order."""
        if which < len(self.nodes):
            node = self.nodes[which]
            for data in node.inbox[:count]:
                frame = cluster.decode(data)
                if isinstance(frame, Part | TableDelta):
                    reply = node.mirror.receive_table(frame, self.desk.now)
                    assert not isinstance(reply, Resync), "streams keep their order"
                    if reply is not None:
                        node.outbox.append(reply)
            del node.inbox[:count]

    @rule(which=st.integers(0, 3), count=st.integers(1, 4))
    def answer(self, which: int, count: int) -> None:
        """Some of its answers reach the master."""
        if which < len(self.nodes):
            node = self.nodes[which]
            for reply in node.outbox[:count]:
                assert isinstance(reply, Ack)
                self.desk.feed.receive_ack(node.link, reply.version, self.desk.now)
            del node.outbox[:count]

    @rule()
    def come_to_rest(self) -> None:
        """All links work: all have the table, and nothing waits."""
        for which, node in enumerate(self.nodes):
            if not node.is_up:
                self.come_back(which)
        self.is_right()
        while any(node.inbox or node.outbox for node in self.nodes):
            for which in range(len(self.nodes)):
                self.deliver(which, 9)
                self.answer(which, 9)
            self.is_right()
        for node in self.nodes:
            assert node.mirror.snapshot() == self.desk.table.snapshot()
        self.desk.wait(LinkId(0), 0)
        self.waiting = {}
        assert self.desk.feed.get_timer() is None

    @invariant()
    def is_right(self) -> None:
        """Pass on what was sent: results only when all live nodes have their version."""
        for effect in self.desk.effects:
            assert isinstance(effect, Send)
            frame = cluster.decode(effect.data)
            if isinstance(frame, Result):
                version = self.waiting.pop(frame.serial, 0)
                for node in self.nodes:
                    assert not node.is_live or node.mirror.version >= version
            for node in self.nodes:
                if node.link == effect.link and node.is_up:
                    node.inbox.append(effect.data)
        self.desk.effects.clear()


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=100, stateful_step_count=50)


def test_1000_readers_bytes_grow_with_the_change() -> None:
    """Not with the table: each change is encoded once, and sent once to each."""
    desk = Desk(FeedLimits(loads=1000), records=1000)
    links = [LinkId(number) for number in range(1, 1001)]
    desk.join_live(*links)
    desk.change("x")
    sends = [one for one in desk.effects if isinstance(one, Send)]
    assert len(sends) == 1000
    assert len({id(one.data) for one in sends}) == 1
    assert len(sends[0].data) < 40
    expected = TableDelta(EPOCH, Delta(1000, 1001, (encode_record(FactRecord("x", 1000)),)))
    assert cluster.decode(sends[0].data) == expected
