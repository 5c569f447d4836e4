"""The registry: names, matches, buses and leases as an obvious model has them, over restarts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.proto.test_names import SlowNames

from afbus.master.ledger import Ledger
from afbus.master.registry import Registry
from afbus.proto.errors import RemoteProtocolError
from afbus.proto.names import NameFlags, NameOutcome
from afbus.proto.record import (
    BusRecord,
    LeaseRecord,
    MatchRecord,
    NodeRecord,
    OwnerRecord,
    Record,
    decode_record,
)
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from afbus.master.entity import Endpoint, Node
    from afbus.proto.match import What

KEY = bytes(16)
PATHS = (b"/x", b"/y")
NAMES = (b"org.a", b"org.b")
WHATS: tuple[What, ...] = (Terms("a"), Terms("a.b"), bytes(64))
WHICH = st.integers(0, 5)
PATH = st.sampled_from(PATHS)
NAME = st.sampled_from(NAMES)
FLAGS = st.integers(0, 7).map(NameFlags)


class Desk:
    """A registry and its disk."""

    def __init__(self) -> None:
        self.disk: dict[bytes, bytes] = {}
        self.restart()

    def flush(self) -> None:
        """Write what has changed."""
        write, _ = self.ledger.flush()
        for key, value in () if write is None else write.rows:
            if value is None:
                self.disk.pop(key, None)
            else:
                self.disk[key] = value

    def restart(self) -> None:
        """Begin anew with what was written."""
        self.ledger = Ledger()
        self.registry = Registry(self.ledger)
        self.registry.load(self.ledger.load(self.disk.items()))

    def records(self) -> list[Record]:
        """Return what all nodes are told."""
        self.flush()
        return [decode_record(key, value) for key, value in self.ledger.table.items()]

    def node(self, name: str) -> Node:
        """Return a node, a new one if need be."""
        if name not in self.registry.nodes:
            self.registry.put_node(self.registry.add_node(name))
        return self.registry.nodes[name]


class Holdings(RuleBasedStateMachine):
    """Three nodes with two endpoints each, on two buses; whatever they do, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.nodes = [self.desk.node(name) for name in "abc"]
        founder = self.registry.enter(self.nodes[0], 0, "p")
        for path in PATHS:
            self.registry.bind(founder, self.registry.add_bus(path, 512, "fifo", KEY), b"m")
        self.registry.remove(founder)
        # The model: endpoints, names in lists, what each wants, masters, leases.
        self.ends: dict[tuple[int, int], str] = {}
        self.names = {path: SlowNames() for path in PATHS}
        self.wanted: set[tuple[bytes, tuple[int, int], What]] = set()
        self.masters: dict[bytes, tuple[int, int]] = {}
        self.leases: dict[int, int] = {}

    @property
    def registry(self) -> Registry:
        """The one of now."""
        return self.desk.registry

    def end(self, which: int) -> Endpoint | None:
        """Return an endpoint, if it has entered."""
        who = (which % 3 + 1, which // 3)
        return self.registry.numbers[who[0]].endpoints[who[1]] if who in self.ends else None

    def forget(self, who: tuple[int, int]) -> None:
        """An endpoint is gone from the model."""
        del self.ends[who]
        for names in self.names.values():
            names.remove(None, str(who))
        self.wanted = {one for one in self.wanted if one[1] != who}
        self.masters = {path: one for path, one in self.masters.items() if one != who}

    @rule(which=WHICH, principal=st.sampled_from(["p", "p", "q"]), serial=st.sampled_from([0, 9]))
    def enter(self, which: int, principal: str, serial: int) -> None:
        """An endpoint is there, or is somebody else's now."""
        who = (which % 3 + 1, which // 3)
        if self.ends.get(who, principal) != principal:
            self.forget(who)
        self.registry.enter(self.registry.numbers[who[0]], who[1], principal, serial, 5)
        self.ends[who] = principal

    @rule(which=WHICH)
    def leave(self, which: int) -> None:
        """An endpoint is gone."""
        end = self.end(which)
        if end is not None:
            self.registry.remove(end)
            self.forget(end.who)

    @rule(which=WHICH, path=PATH, name=NAME, flags=FLAGS)
    def own(self, which: int, path: bytes, name: bytes, flags: NameFlags) -> None:
        """An endpoint asks for a name."""
        end = self.end(which)
        if end is not None:
            outcome = self.registry.own(end, self.registry.buses[path], name, flags)
            assert outcome is self.names[path].request(name, str(end.who), flags)

    @rule(which=WHICH, path=PATH, name=NAME)
    def release(self, which: int, path: bytes, name: bytes) -> None:
        """An endpoint gives a name up."""
        end = self.end(which)
        if end is not None:
            self.registry.release(end, self.registry.buses[path], name)
            self.names[path].remove(name, str(end.who))

    @rule(which=WHICH, path=PATH, what=st.sampled_from(WHATS), wants=st.booleans())
    def subscribe(self, which: int, path: bytes, what: What, wants: bool) -> None:
        """An endpoint wants something, or no longer."""
        end = self.end(which)
        if end is None:
            return
        bus, wish = self.registry.buses[path], (path, end.who, what)
        if wants:
            assert self.registry.subscribe(end, bus, what) is (wish not in self.wanted)
            self.wanted.add(wish)
        else:
            assert self.registry.unsubscribe(end, bus, what) is (wish in self.wanted)
            self.wanted.discard(wish)

    @rule(which=WHICH, path=PATH)
    def bind(self, which: int, path: bytes) -> None:
        """An endpoint becomes master, or the master gives up."""
        end, bus = self.end(which), self.registry.buses[path]
        if path in self.masters:
            self.registry.unbind(bus)
            del self.masters[path]
        elif end is not None:
            self.registry.bind(end, bus, b"master")
            self.masters[path] = end.who

    @rule(which=st.integers(0, 2), gives_back=st.booleans())
    def lease(self, which: int, gives_back: bool) -> None:
        """A node gets a block, or returns one."""
        node = self.registry.numbers[which + 1]
        mine = [block for block, number in self.leases.items() if number == node.number]
        if gives_back and mine:
            assert self.registry.give_back(node, mine[0])
            assert not self.registry.give_back(node, mine[0])
            del self.leases[mine[0]]
        elif not gives_back:
            self.leases[self.registry.lease(node)] = node.number

    @rule(which=st.integers(0, 2))
    def free(self, which: int) -> None:
        """A node was lost for too long."""
        self.registry.free(self.registry.numbers[which + 1])
        for who in [who for who in self.ends if who[0] == which + 1]:
            self.forget(who)

    @rule()
    def restart(self) -> None:
        """The master is killed and comes back; nobody has stated anything yet."""
        self.desk.flush()
        before = self.desk.records()
        self.desk.restart()
        assert self.desk.records() == before
        for which in range(3):
            self.state(which, {who: True for who in self.ends if who[0] == which + 1})

    @rule(which=st.integers(0, 2), kept=st.dictionaries(st.integers(0, 1), st.booleans()))
    def come_back(self, which: int, kept: dict[int, bool]) -> None:
        """A node returns; of its endpoints some are still there, some have forgotten all."""
        self.state(which, {(which + 1, end): flag for end, flag in kept.items()})

    def state(self, which: int, kept: dict[tuple[int, int], bool]) -> None:
        """A node states endpoints, those with True also with what they have."""
        node = self.registry.numbers[which + 1]
        self.registry.begin_stating(node)
        for who in [who for who in self.ends if who[0] == node.number]:
            if who not in kept:
                self.forget(who)
                continue
            end = self.registry.enter(node, who[1], self.ends[who])
            for path in PATHS:
                self.state_one(end, path, keeps=kept[who])
        for block in [block for block, number in self.leases.items() if number == node.number]:
            if block % 2:
                assert self.registry.state_lease(node, block)
            else:
                del self.leases[block]
        self.registry.end_stating(node)

    def state_one(self, end: Endpoint, path: bytes, keeps: bool) -> None:
        """Let an endpoint state what it has on a bus, or forget all of it."""
        bus = self.registry.buses[path]
        if not keeps:
            self.names[path].remove(None, str(end.who))
            self.wanted = {one for one in self.wanted if one[:2] != (path, end.who)}
            if self.masters.get(path) == end.who:
                del self.masters[path]
            return
        if self.masters.get(path) == end.who:
            self.registry.state_master(end, bus)
        for name in NAMES:
            for row in self.names[path].queue(name):
                if row[1] == str(end.who):
                    flags = NameFlags(row[2] | (0 if row[3] else NameFlags.DO_NOT_QUEUE))
                    outcome = self.registry.own(end, bus, name, flags)
                    assert outcome in (NameOutcome.ALREADY_OWNER, NameOutcome.IN_QUEUE)
        for what in WHATS:
            if (path, end.who, what) in self.wanted:
                self.registry.subscribe(end, bus, what)

    @precondition(lambda self: self.desk.records())
    @invariant()
    def is_as_the_model(self) -> None:
        """The table says what the model says, and nothing else."""
        records = self.desk.records()
        number_of = {path: self.registry.buses[path].number for path in PATHS}
        owners = {
            (one.bus, one.address, str((one.node, one.endpoint)))
            for one in records
            if isinstance(one, OwnerRecord)
        }
        assert owners == {
            (number_of[path], name, names.owner(name))
            for path, names in self.names.items()
            for name in NAMES
            if names.owner(name) is not None
        }
        matches = {one for one in records if isinstance(one, MatchRecord)}
        assert matches == {
            MatchRecord(number_of[path], who[0], what) for path, who, what in self.wanted
        }
        masters = {one.path: one.node for one in records if isinstance(one, BusRecord) and one.node}
        assert masters == {path: who[0] for path, who in self.masters.items()}
        leases = {one.block: one.node for one in records if isinstance(one, LeaseRecord)}
        assert leases == self.leases
        assert {one.name for one in records if isinstance(one, NodeRecord)} == set("abc")
        self.counts_are_right()

    def counts_are_right(self) -> None:
        """What principals have is what their endpoints have (D18)."""
        for principal in ("p", "q"):
            mine = {who for who, one in self.ends.items() if one == principal}
            rows = [row for names in self.names.values() for row in names.rows]
            count = sum(1 for row in rows if row[1] in {str(who) for who in mine})
            assert self.registry.names_of[principal] == count
            count = sum(1 for one in self.wanted if one[1] in mine)
            assert self.registry.wishes_of[principal] == count


TestHoldings = Holdings.TestCase
TestHoldings.settings = settings(max_examples=100, stateful_step_count=30)


def test_case38_a_node_that_is_dropped_leaves_nothing() -> None:
    """No lease, no owner, no match, no row: no ghosts."""
    desk = Desk()
    desk.node("stays")
    bus = desk.registry.add_bus(b"/x", 512, "fifo", KEY)
    desk.registry.bind(desk.registry.enter(desk.node("stays"), 1, "p"), bus, b"m")
    desk.flush()
    before = dict(desk.disk)
    for turn in range(3):
        node = desk.node(f"n{turn}")
        end = desk.registry.enter(node, 1, "p", serial=7, until_utc=5)
        desk.registry.own(end, bus, b"org.a")
        desk.registry.subscribe(end, bus, Terms("a"))
        desk.registry.lease(node)
        desk.flush()
        desk.registry.begin_stating(node)
        desk.registry.drop_node(node)
        desk.flush()
    changed = {
        key for key in before.keys() | desk.disk.keys() if before.get(key) != desk.disk.get(key)
    }
    # Numbers are never given twice, so the counters go on.
    assert changed == {b"Cversion", b"Cblock", b"Cnode"}


def test_d3_numbers_are_never_given_twice_over_restarts() -> None:
    """Of nodes, blocks and buses."""
    desk = Desk()
    seen: set[tuple[int, int, int]] = set()
    for turn in range(5):
        node = desk.node(f"n{turn}")
        end = desk.registry.enter(node, 1, "p")
        bus = desk.registry.add_bus(b"/x%d" % turn, 512, "fifo", KEY)
        desk.registry.bind(end, bus, b"m")
        seen.add((node.number, bus.number, desk.registry.lease(node)))
        if turn % 2:
            desk.registry.drop_node(node)
        desk.flush()
        desk.restart()
    assert seen == {(number, number, number) for number in range(1, 6)}


def test_d17_what_an_endpoint_has_proven_survives() -> None:
    """A shadow keeps it until its node states the endpoint, or no longer does."""
    desk = Desk()
    node = desk.node("a")
    desk.registry.enter(node, 1, "principal/alice", serial=1 << 100, until_utc=99)
    desk.registry.enter(node, 2, "uid/0@a")
    desk.flush()
    desk.restart()
    [shadow] = desk.node("a").endpoints.values()
    assert (shadow.principal, shadow.serial, shadow.until_utc) == ("principal/alice", 1 << 100, 99)
    desk.registry.begin_stating(desk.node("a"))
    desk.registry.end_stating(desk.node("a"))
    desk.flush()
    desk.restart()
    assert desk.node("a").endpoints == {}


def test_buses_of_no_use_are_forgotten_after_a_time() -> None:
    """Not while they have a master, a name or a match; the time survives a restart."""
    desk = Desk()
    node = desk.node("a")
    bus = desk.registry.add_bus(b"/x", 512, "fifo", KEY)
    end = desk.registry.enter(node, 1, "p")
    desk.registry.bind(end, bus, b"m")
    assert desk.registry.sweep_buses(100, 10) == []
    desk.registry.subscribe(end, bus, Terms("a"))
    desk.registry.unbind(bus)
    assert desk.registry.sweep_buses(200, 10) == []
    desk.registry.unsubscribe(end, bus, Terms("a"))
    assert desk.registry.sweep_buses(300, 10) == []
    desk.flush()
    desk.restart()
    assert desk.registry.sweep_buses(309, 10) == []
    [gone] = desk.registry.sweep_buses(310, 10)
    assert gone.record.path == b"/x"
    desk.flush()
    desk.restart()
    assert desk.registry.buses == {}
    # In use again in between: the time begins anew.
    bus = desk.registry.add_bus(b"/y", 512, "fifo", KEY)
    end = desk.registry.enter(desk.node("a"), 1, "p")
    desk.registry.sweep_buses(400, 10)
    desk.registry.bind(end, bus, b"m")
    desk.registry.sweep_buses(405, 10)
    desk.registry.unbind(bus)
    assert desk.registry.sweep_buses(411, 10) == []
    assert len(desk.registry.sweep_buses(421, 10)) == 1


GOOD = {b"Cblock": b"\x91\x01", b"na": b"\x94\x01\x01\xc4\x10" + bytes(16) + b"\x90"}


@pytest.mark.parametrize(
    "rows",
    [
        {b"l" + bytes(7) + b"\x02": b"\x91\x01"},
        {b"l" + bytes(7) + b"\x01": b"\x91\x02"},
        {b"Nb": b"\x93\xc2\x00\xc0"},
        {b"Na": b"\x93\x00\x00\xc0"},
        {b"N\xff": b""},
        {b"E": b"\x90"},
        {b"E\0\0\0\2" + bytes(8): b"\x90"},
        {b"E\0\0\0\1" + bytes(8): b"\x90"},
        {b"Q\0\0": b"\x90"},
        {b"Q\0\0\0\1n": b"\x90"},
        {b"B\0\0\0\1": b"\x92\x01\x00"},
        {b"m\0\0\0\1\0\0\0\1" + bytes(16): b"\x92\xc4\x01a\xc0"},
    ],
)
def test_rows_that_do_not_fit_together(rows: dict[bytes, bytes]) -> None:
    """One type of error, so that the journal is not taken for good."""
    ledger = Ledger()
    private = ledger.load({**GOOD, **rows}.items())
    with pytest.raises(RemoteProtocolError):
        Registry(ledger).load(private)
