"""The mirror of the cluster's table: whole versions only, whatever comes in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from afbus.proto.cluster import Ack, Nack, Part, Resync, TableDelta
from afbus.proto.mirror import RETRY_S, Change, Mirror
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
    decode_record,
    encode_record,
)
from afbus.proto.table import Delta, Table
from afbus.proto.terms import Terms

BOOT = bytes(16)
KEY = bytes(16)
A = NodeRecord("a", 1, NodeState.LIVE, BOOT)
B = NodeRecord("b", 2, NodeState.LIVE, BOOT, ("host:1",))
BUS = BusRecord(b"/x", 7, 1, b"m", 512, "fifo", KEY, 1)
#: What may stand in the table; those of one line share a key.
POOL: tuple[tuple[Record, ...], ...] = (
    (A, NodeRecord("a", 1, NodeState.LOST, BOOT)),
    (B,),
    (LeaseRecord(5, 1), LeaseRecord(5, 2)),
    (BUS, BusRecord(b"/x", 7, 0, None, 512, "fifo", KEY, 1)),
    (BusRecord(b"/y", 8, 2, b"m", 512, "total", KEY, 1),),
    (OwnerRecord(7, b"org.n", 1, 3), OwnerRecord(7, b"org.n", 2, 3)),
    (MatchRecord(7, 1, Terms("a.b")),),
    (MatchRecord(7, 2, Terms("a.b")),),
    (MatchRecord(8, 2, bytes(64)),),
    (DeniedRecord(9, "", 100, "lost"), DeniedRecord(9, "", 200, "lost")),
    (FactRecord("policy", 1), FactRecord("policy", 2)),
)
RECORDS = [record for line in POOL for record in line]


def entries_of(*records: Record) -> tuple[tuple[bytes, bytes], ...]:
    """Return records as entries, sorted."""
    return tuple(sorted(encode_record(record) for record in records))


def whole(epoch: int, version: int, *records: Record) -> Part:
    """Return a snapshot in one part."""
    return Part(epoch, version, 0, 1, entries_of(*records))


def parts_of(version: int, *records: Record) -> list[Part]:
    """Return a snapshot of epoch 1 with one record in each part."""
    return [
        Part(1, version, index, len(records), entries_of(record))
        for index, record in enumerate(records)
    ]


def delta(epoch: int, version: int, *puts: Record, drops: tuple[bytes, ...] = ()) -> TableDelta:
    """Return a delta that leads to a version from the one before."""
    return TableDelta(epoch, Delta(version - 1, version, entries_of(*puts), drops))


def test_a_snapshot_and_deltas_that_follow() -> None:
    """The ordinary way: each version is acknowledged, each change is told once."""
    mirror = Mirror()
    assert (mirror.epoch, mirror.version) == (0, 0)
    assert mirror.receive_table(whole(3, 10, A, BUS), 0.0) == Ack(3, 10)
    assert mirror.take_changes() == [Change(None, BUS), Change(None, A)]
    assert mirror.receive_table(delta(3, 11, B, drops=(b"b/x",)), 0.0) == Ack(3, 11)
    assert mirror.take_changes() == [Change(BUS, None), Change(None, B)]
    assert mirror.take_changes() == []
    assert mirror.get_node(2) == B
    assert mirror.get_node(3) is None
    assert mirror.get_bus(b"/x") is None
    assert mirror.get_timer() is None


def test_case25_a_delta_that_is_known_is_acknowledged_again() -> None:
    """Whoever sent it twice may have lost the answer."""
    mirror = Mirror()
    mirror.receive_table(whole(1, 5, A), 0.0)
    assert mirror.receive_table(delta(1, 5, B), 0.0) == Ack(1, 5)
    assert mirror.receive_table(whole(1, 4, B), 0.0) == Ack(1, 5)
    assert mirror.get_node(2) is None


def test_case25_a_gap_is_told_once_and_again_after_a_time() -> None:
    """And what was missing may come late, by itself."""
    mirror = Mirror()
    mirror.receive_table(whole(1, 5, A), 0.0)
    assert mirror.receive_table(delta(1, 7, B), 1.0) == Resync(1, 5)
    assert mirror.receive_table(delta(1, 8, B), 1.0) is None
    assert mirror.is_waiting
    assert mirror.get_timer() == 1.0 + RETRY_S
    assert mirror.handle_timer(1.0) is None
    assert mirror.handle_timer(1.0 + RETRY_S) == Resync(1, 5)
    # Version 6 alone does not fill the gap.
    assert mirror.receive_table(delta(1, 6, B), 7.0) == Resync(1, 6)
    assert mirror.receive_table(whole(1, 9, A), 8.0) == Ack(1, 9)
    assert mirror.get_timer() is None
    assert mirror.handle_timer(99.0) is None


def test_case25_a_frame_of_an_old_epoch_is_nothing() -> None:
    """It was on its way when the master began anew."""
    mirror = Mirror()
    mirror.receive_table(whole(2, 5, A), 0.0)
    assert mirror.receive_table(whole(1, 9, B), 0.0) is None
    assert mirror.receive_table(delta(1, 6, B), 0.0) is None
    assert mirror.version == 5


def test_a_delta_of_a_new_epoch_asks_for_a_snapshot() -> None:
    """Versions of two epochs do not follow each other; a later one goes backwards, if need be."""
    mirror = Mirror()
    mirror.receive_table(whole(1, 5, A), 0.0)
    assert mirror.receive_table(delta(2, 6, B), 0.0) == Resync(1, 5)
    assert mirror.receive_table(whole(2, 3, B), 0.0) == Ack(2, 3)
    assert mirror.take_changes()[1:] == [Change(A, None), Change(None, B)]


def test_case22_a_table_that_goes_on_under_a_new_epoch() -> None:
    """The master came back with what the node has: nothing is sent again."""
    mirror = Mirror()
    mirror.receive_table(whole(1, 5, A), 0.0)
    mirror.take_changes()
    mirror.receive_welcome(2, is_same=True)
    assert (mirror.epoch, mirror.version) == (2, 5)
    assert mirror.receive_table(delta(2, 6, B), 0.0) == Ack(2, 6)
    assert mirror.take_changes() == [Change(None, B)]


def test_parts_come_in_any_order() -> None:
    """The table changes with the last one."""
    mirror = Mirror()
    parts = parts_of(4, A, BUS, B)
    assert mirror.receive_table(parts[2], 0.0) is None
    assert mirror.receive_table(parts[0], 0.0) is None
    assert mirror.receive_table(parts[2], 0.0) is None
    assert mirror.version == 0
    assert mirror.receive_table(parts[1], 0.0) == Ack(1, 4)
    assert mirror.get_node(2) == B


def test_parts_of_an_older_snapshot_are_left_alone() -> None:
    """And the older parts are forgotten when a newer snapshot begins, or a new link."""
    mirror = Mirror()
    old, new = parts_of(4, A, B), parts_of(5, A, BUS)
    assert mirror.receive_table(old[0], 0.0) is None
    assert mirror.receive_table(new[0], 0.0) is None
    assert mirror.receive_table(old[1], 0.0) is None
    mirror.receive_welcome(1, is_same=False)
    assert mirror.receive_table(new[1], 0.0) is None
    assert mirror.receive_table(new[0], 0.0) == Ack(1, 5)
    assert mirror.get_node(2) is None


@pytest.mark.parametrize(
    "bad",
    [
        TableDelta(1, Delta(5, 6, ((b"x", b""),))),
        TableDelta(1, Delta(5, 6, ((b"na", b"\xc1"),))),
        TableDelta(1, Delta(5, 6, (), (b"nb",))),
        Part(1, 6, 0, 1, ((b"x", b""),)),
    ],
)
def test_case26_what_it_cannot_read_is_refused_and_the_last_good_stays(
    bad: Part | TableDelta,
) -> None:
    """Told once, with a reason; deltas behind it change nothing until a snapshot comes."""
    mirror = Mirror()
    mirror.receive_table(whole(1, 5, A), 0.0)
    mirror.take_changes()
    reply = mirror.receive_table(bad, 1.0)
    assert isinstance(reply, Nack)
    assert (reply.epoch, reply.version) == (1, 6)
    assert reply.reason
    assert mirror.receive_table(delta(1, 7, B), 1.0) is None
    assert (mirror.version, mirror.take_changes(), mirror.get_node(1)) == (5, [], A)
    # Nobody has answered: it asks, and does not insist.
    assert mirror.get_timer() == 1.0 + RETRY_S
    assert mirror.handle_timer(1.0 + RETRY_S) == Resync(1, 5)
    assert mirror.receive_table(whole(1, 7, A, B), 9.0) == Ack(1, 7)
    assert mirror.get_timer() is None


def test_case26_two_parts_with_one_record_are_refused() -> None:
    """Each record comes once."""
    mirror = Mirror()
    mirror.receive_table(Part(1, 5, 0, 2, entries_of(A)), 0.0)
    assert isinstance(mirror.receive_table(Part(1, 5, 1, 2, entries_of(A)), 0.0), Nack)
    assert mirror.version == 0


def test_d6_the_node_of_an_address() -> None:
    """Names by their owner, unique addresses by the lease of their block."""
    mirror = Mirror()
    owner, lease = OwnerRecord(7, b"org.n", 1, 3), LeaseRecord(5, 2)
    mirror.receive_table(whole(1, 5, A, B, BUS, owner, lease), 0.0)
    assert mirror.find_node(7, b"org.n") == 1
    assert mirror.find_node(8, b"org.n") is None
    assert mirror.find_node(7, b"5.1") == 2
    assert mirror.find_node(8, b"5.99") == 2
    assert mirror.find_node(7, b"6.1") is None
    assert mirror.find_node(7, b"org.m") is None


def test_two_nodes_exchange_their_numbers_within_one_version() -> None:
    """Each number leads to who has it now."""
    mirror = Mirror()
    mirror.receive_table(whole(1, 5, A, B), 0.0)
    first = NodeRecord("b", 1, NodeState.LIVE, BOOT)
    second = NodeRecord("a", 2, NodeState.LIVE, BOOT)
    mirror.receive_table(delta(1, 6, first, second), 0.0)
    assert mirror.get_node(1) == first
    assert mirror.get_node(2) == second


class Readers(RuleBasedStateMachine):
    """A master that only changes, a road that loses, doubles and reorders, and a mirror."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch, self.now = 1, 0.0
        self.table: Table[bytes, bytes] = Table()
        # What the table was at each version of each epoch, as slow as that.
        self.history: dict[tuple[int, int], dict[bytes, bytes]] = {(0, 0): {}}
        self.road: list[Part | TableDelta] = []
        self.mirror = Mirror()
        self.told: dict[bytes, Record] = {}
        self.last = (0, 0)
        self.remember()

    def remember(self) -> None:
        """Note what the table is now."""
        self.history[self.epoch, self.table.version] = dict(self.table.items())

    @rule(
        puts=st.lists(st.sampled_from(RECORDS), max_size=3),
        drops=st.lists(st.sampled_from(RECORDS), max_size=2),
    )
    def change(self, puts: list[Record], drops: list[Record]) -> None:
        """The master changes its table and tells."""
        made = self.table.change(
            dict(map(encode_record, puts)), [encode_record(one)[0] for one in drops]
        )
        if made:
            self.remember()
            self.road.append(TableDelta(self.epoch, made))

    @rule(size=st.integers(1, 4))
    def send_snapshot(self, size: int) -> None:
        """The master sends all of it, in parts."""
        entries = self.table.items()
        cuts = [tuple(entries[at : at + size]) for at in range(0, len(entries), size)] or [()]
        self.road += [
            Part(self.epoch, self.table.version, index, len(cuts), cut)
            for index, cut in enumerate(cuts)
        ]

    @rule(version=st.integers(0, 3))
    def begin_anew(self, version: int) -> None:
        """The master comes back from an old copy of its state: versions mean other things now."""
        self.epoch += 1
        entries = self.history.get((self.epoch - 1, version), {})
        self.table = Table(version)
        self.table.change(entries)
        self.remember()

    @rule()
    def come_back(self) -> None:
        """The master comes back with all that it had; the node has a new link to it."""
        had = (self.mirror.epoch, self.mirror.version)
        is_same = had == (self.epoch, self.table.version)
        self.epoch += 1
        self.remember()
        self.mirror.receive_welcome(self.epoch, is_same)
        if is_same:
            self.last = (self.epoch, self.table.version)

    @precondition(lambda self: self.road)
    @rule(place=st.integers(0, 1 << 16), fate=st.sampled_from(["deliver", "again", "lose"]))
    def travel(self, place: int, fate: str) -> None:
        """One frame arrives, arrives but will come again, or is lost."""
        place %= len(self.road)
        frame = self.road[place] if fate == "again" else self.road.pop(place)
        if fate != "lose":
            self.receive(frame)

    def receive(self, frame: Part | TableDelta) -> None:
        """Deliver, and check what is answered."""
        self.now += 1.0
        reply = self.mirror.receive_table(frame, self.now)
        assert not isinstance(reply, Nack)
        if isinstance(reply, Ack | Resync):
            assert (reply.epoch, reply.version) == (self.mirror.epoch, self.mirror.version)

    @rule()
    def wait(self) -> None:
        """Time passes: it asks, if something is missing."""
        self.now += 2 * RETRY_S
        was_waiting = self.mirror.is_waiting
        assert isinstance(self.mirror.handle_timer(self.now), Resync) is was_waiting

    @rule()
    def come_to_rest(self) -> None:
        """A new link without faults: the mirror has what the master has."""
        self.road.clear()
        self.mirror.receive_welcome(self.epoch, is_same=False)
        self.send_snapshot(3)
        while self.road:
            self.receive(self.road.pop(0))
        assert self.mirror.version == self.table.version
        assert not self.mirror.is_waiting

    @invariant()
    def is_right(self) -> None:
        """All that must always hold."""
        self.holds_one_version()
        self.tells_each_change_once()
        self.finds_what_a_slow_search_finds()

    def holds_one_version(self) -> None:
        """It never goes backwards, and is what the master had, whole."""
        at = (self.mirror.epoch, self.mirror.version)
        assert at >= self.last
        self.last = at
        assert dict(self.mirror.snapshot().entries) == self.history[at]

    def tells_each_change_once(self) -> None:
        """Who follows the changes has the same records."""
        for old, new in self.mirror.take_changes():
            assert old != new
            key = encode_record(new or old or A)[0]
            assert self.told.get(key) == old
            if new is None:
                del self.told[key]
            else:
                self.told[key] = new
        entries = self.mirror.snapshot().entries
        assert self.told == {key: decode_record(key, value) for key, value in entries}

    def finds_what_a_slow_search_finds(self) -> None:
        """All that is derived from the table."""
        records = list(self.told.values())
        nodes = {one.number: one for one in records if isinstance(one, NodeRecord)}
        for number in (1, 2):
            assert self.mirror.get_node(number) == nodes.get(number)
        for path, bus in ((b"/x", 7), (b"/y", 8)):
            buses = [one for one in records if isinstance(one, BusRecord) and one.path == path]
            assert self.mirror.get_bus(path) == (buses[0] if buses else None)
            wanted = {one for one in records if isinstance(one, MatchRecord) and one.bus == bus}
            assert set(self.mirror.get_matches(bus)) == wanted
            owners = {one for one in records if isinstance(one, OwnerRecord) and one.bus == bus}
            assert set(self.mirror.get_owners(bus)) == owners
        denied = {one.serial for one in records if isinstance(one, DeniedRecord)}
        assert self.mirror.get_denied() == denied
        facts = [one.number for one in records if isinstance(one, FactRecord)]
        assert self.mirror.get_fact("policy") == (facts[0] if facts else 0)


TestReaders = Readers.TestCase
TestReaders.settings = settings(max_examples=100, stateful_step_count=40)


@given(st.binary(min_size=1, max_size=20), st.binary(max_size=20))
def test_case42_garbage_changes_nothing(key: bytes, value: bytes) -> None:
    """It is refused, or it was a record."""
    mirror = Mirror()
    mirror.receive_table(whole(1, 1, A), 0.0)
    before = mirror.snapshot()
    for frame in (
        TableDelta(1, Delta(1, 2, ((key, value),))),
        Part(1, 2, 0, 1, ((key, value),)),
    ):
        if isinstance(mirror.receive_table(frame, 0.0), Nack):
            assert mirror.snapshot() == before
