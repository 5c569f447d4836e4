"""The mirror of the cluster's table that a node keeps.

It takes the frames that concern the table, in whatever order and number they come, and says what
to answer. What it has is always one version of the master's table, whole.

    delta that follows          applied            ACK
    delta that is known         nothing            ACK again
    delta with a gap            nothing            RESYNC, once, and again each `retry_s`
    last part of a snapshot     the table is that  ACK
    a record it cannot read     nothing            NACK; deltas are left alone until a snapshot

Invariants:

1. The table changes by whole versions only, never backwards within an epoch.
2. Every change of a record is in `take_changes` once; deletions too, also those that a snapshot
   only implies.
3. What is malformed never changes anything, and is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, TypeVar

from .cluster import Ack, Nack, Part, Resync, TableDelta
from .errors import RemoteProtocolError
from .record import (
    BusRecord,
    DeniedRecord,
    FactRecord,
    LeaseRecord,
    MatchRecord,
    NodeRecord,
    OwnerRecord,
    Record,
    bus_key,
    decode_record,
    lease_key,
    owner_key,
    split_unique,
)
from .table import Snapshot, Table, TableGap

if TYPE_CHECKING:
    from collections.abc import Iterator

#: How long a mirror waits for what it has asked for before it asks again.
RETRY_S: Final = 5.0

Reply: TypeAlias = Ack | Nack | Resync
_T = TypeVar("_T")


class Change(NamedTuple):
    """A record has changed; None stands for its absence. Never are both None."""

    old: Record | None
    new: Record | None


class Mirror:
    """What one node knows of the cluster."""

    def __init__(self, retry_s: float = RETRY_S) -> None:
        """Begin with nothing; the first snapshot or delta tells the epoch."""
        self._retry_s = retry_s
        self._epoch = 0
        self._table: Table[bytes, bytes] = Table()
        self._records: dict[bytes, Record] = {}
        self._changes: list[Change] = []
        # Parts of the newest snapshot that is not whole yet, by index.
        self._parts: dict[int, Part] = {}
        # The newest version that anybody spoke of: what is missing, if it is above ours.
        self._seen = 0
        self._retry_at: float | None = None
        self._nodes: dict[int, NodeRecord] = {}
        self._buses: dict[int, BusRecord] = {}
        self._matches: dict[int, dict[bytes, MatchRecord]] = {}
        self._owners: dict[int, dict[bytes, OwnerRecord]] = {}
        self._denied: set[int] = set()

    # --- frames ---

    @property
    def epoch(self) -> int:
        """The epoch of the table, 0 for none; for HELLO."""
        return self._epoch

    @property
    def version(self) -> int:
        """The version of the table, 0 for none; for HELLO."""
        return self._table.version

    @property
    def is_waiting(self) -> bool:
        """Whether something is missing that was asked for."""
        return self._retry_at is not None

    def receive_welcome(self, epoch: int, is_same: bool) -> None:
        """A new link to the master begins: what was under way on the old one will not come.

        Args:
            epoch: That of the master.
            is_same: Whether the table that HELLO named is one of this epoch too.
        """
        self._parts.clear()
        self._retry_at = None
        self._seen = self.version
        if is_same:
            self._epoch = epoch

    def receive_table(self, frame: Part | TableDelta, now: float) -> Reply | None:
        """Take a frame; return what to answer, None for nothing (yet)."""
        if frame.epoch < self._epoch:
            # A late frame of an epoch that is over.
            return None
        reply = self._receive_part(frame) if isinstance(frame, Part) else self._receive_delta(frame)
        if isinstance(reply, Ack):
            self._retry_at = None
            if self._seen > self.version:
                return self._ask(now)
        elif isinstance(reply, Nack):
            self._retry_at = now + self._retry_s
        elif isinstance(reply, Resync):
            return self._ask(now)
        return reply

    def get_timer(self) -> float | None:
        """Return when `handle_timer` is to be called, None for never."""
        return self._retry_at

    def handle_timer(self, now: float) -> Reply | None:
        """Ask again for what did not come."""
        if self._retry_at is None or self._retry_at > now:
            return None
        self._retry_at = None
        return self._ask(now)

    def _ask(self, now: float) -> Resync | None:
        """Ask for what is missing, unless that has been done."""
        if self._retry_at is not None:
            return None
        self._retry_at = now + self._retry_s
        return Resync(self._epoch, self.version)

    def _receive_delta(self, frame: TableDelta) -> Reply | None:
        delta = frame.delta
        if frame.epoch != self._epoch:
            return Resync(self._epoch, self.version)
        self._seen = max(self._seen, delta.to_version)
        if delta.to_version <= self.version:
            return Ack(self._epoch, self.version)
        if delta.from_version != self.version:
            return Resync(self._epoch, self.version)
        try:
            records = {key: decode_record(key, value) for key, value in delta.puts}
        except RemoteProtocolError as error:
            return Nack(frame.epoch, delta.to_version, error.message)
        if isinstance(self._table.apply(delta), TableGap):
            return Nack(frame.epoch, delta.to_version, "drops a record that is not there")
        self._note(records, delta.drops)
        return Ack(self._epoch, self.version)

    def _receive_part(self, part: Part) -> Reply | None:
        if part.epoch == self._epoch:
            self._seen = max(self._seen, part.version)
            if part.version <= self.version:
                return Ack(self._epoch, self.version)
        first = next(iter(self._parts.values()), None)
        if first is not None and _series(first) != _series(part):
            if _series(first) > _series(part):
                return None
            self._parts.clear()
        self._parts[part.index] = part
        if len(self._parts) < part.count:
            return None
        parts = [self._parts[index] for index in range(part.count)]
        self._parts.clear()
        entries = tuple(entry for one in parts for entry in one.entries)
        try:
            records = {key: decode_record(key, value) for key, value in entries}
        except RemoteProtocolError as error:
            return Nack(part.epoch, part.version, error.message)
        if len(records) != len(entries):
            return Nack(part.epoch, part.version, "a record that comes twice")
        if part.epoch != self._epoch:
            self._epoch, self._seen = part.epoch, part.version
        self._table.load(Snapshot(part.version, entries))
        gone = [key for key in self._records if key not in records]
        changed = {key: one for key, one in records.items() if self._records.get(key) != one}
        self._note(changed, gone)
        return Ack(self._epoch, self.version)

    def _note(self, puts: dict[bytes, Record], drops: tuple[bytes, ...] | list[bytes]) -> None:
        """Follow with everything that is derived from the table."""
        for key in drops:
            old = self._records.pop(key)
            self._forget(key, old)
            self._changes.append(Change(old, None))
        for key, new in puts.items():
            before = self._records.get(key)
            if before is not None:
                self._forget(key, before)
            self._records[key] = new
            self._index(key, new)
            self._changes.append(Change(before, new))

    def _index(self, key: bytes, record: Record) -> None:
        if isinstance(record, NodeRecord):
            self._nodes[record.number] = record
        elif isinstance(record, BusRecord):
            self._buses[record.number] = record
        elif isinstance(record, MatchRecord):
            self._matches.setdefault(record.bus, {})[key] = record
        elif isinstance(record, OwnerRecord):
            self._owners.setdefault(record.bus, {})[key] = record
        elif isinstance(record, DeniedRecord):
            self._denied.add(record.serial)

    def _forget(self, key: bytes, record: Record) -> None:
        if isinstance(record, NodeRecord):
            # Two names may have exchanged a number within one version.
            if self._nodes.get(record.number) == record:
                del self._nodes[record.number]
        elif isinstance(record, BusRecord):
            if self._buses.get(record.number) == record:
                del self._buses[record.number]
        elif isinstance(record, MatchRecord):
            _drop(self._matches, record.bus, key)
        elif isinstance(record, OwnerRecord):
            _drop(self._owners, record.bus, key)
        elif isinstance(record, DeniedRecord):
            self._denied.discard(record.serial)

    # --- what the node looks up ---

    def take_changes(self) -> list[Change]:
        """Return what has changed since the last call, in its order, and forget it."""
        taken, self._changes = self._changes, []
        return taken

    def snapshot(self) -> Snapshot[bytes, bytes]:
        """Return the table as it is; O(n log n)."""
        return self._table.snapshot()

    def get_node(self, number: int) -> NodeRecord | None:
        """Return the node of a number."""
        return self._nodes.get(number)

    def get_bus(self, path: bytes) -> BusRecord | None:
        """Return the bus of a path."""
        record = self._records.get(bus_key(path))
        return record if isinstance(record, BusRecord) else None

    def get_buses(self) -> Iterator[BusRecord]:
        """Return all buses, in no order."""
        return iter(self._buses.values())

    def find_bus(self, number: int) -> BusRecord | None:
        """Return the bus of a number."""
        return self._buses.get(number)

    def get_owner(self, bus: int, name: bytes) -> OwnerRecord | None:
        """Return who has a name of a bus."""
        record = self._records.get(owner_key(bus, name))
        return record if isinstance(record, OwnerRecord) else None

    def find_node(self, bus: int, address: bytes) -> int | None:
        """Return the number of the node that an address of a bus is on, None if it has no owner.

        Unique addresses follow from the leases, names from their owners. So this is also the
        check of a source: what a node sends must come from an address that is on it (D6).
        """
        unique = split_unique(address)
        if unique is not None:
            lease = self._records.get(lease_key(unique[0]))
            return lease.node if isinstance(lease, LeaseRecord) else None
        owner = self.get_owner(bus, address)
        return None if owner is None else owner.node

    def get_matches(self, bus: int) -> Iterator[MatchRecord]:
        """Return what the nodes want of a bus, in no order; each node and match once."""
        return iter(self._matches.get(bus, {}).values())

    def get_owners(self, bus: int) -> Iterator[OwnerRecord]:
        """Return who has the names of a bus, in no order."""
        return iter(self._owners.get(bus, {}).values())

    def get_leases(self) -> Iterator[LeaseRecord]:
        """Return all blocks of addresses, in no order; O(n) of the whole table."""
        return (one for one in self._records.values() if isinstance(one, LeaseRecord))

    def get_fact(self, name: str) -> int:
        """Return a number that concerns all, 0 if it is not known."""
        record = self._records.get(b"f" + name.encode())
        return record.number if isinstance(record, FactRecord) else 0

    def get_denied(self) -> frozenset[int]:
        """Return the serial numbers of all certificates that are denied."""
        return frozenset(self._denied)


def _drop(index: dict[int, dict[bytes, _T]], bus: int, key: bytes) -> None:
    of_bus = index[bus]
    del of_bus[key]
    if not of_bus:
        del index[bus]


def _series(part: Part) -> tuple[int, int, int]:
    """Return which snapshot a part belongs to; later ones compare higher."""
    return part.epoch, part.version, part.count
