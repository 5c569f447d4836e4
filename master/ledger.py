"""What the master knows, as rows: the table that all nodes have, and what is only its own.

Keys that begin with a small letter are records of the table (`proto/record.py`), those with a
capital are private:

    N NAME                           [is_ephemeral, until_utc, digest of its key or nil]  a node
    E node u32, endpoint u64         [principal, serial, until_utc]   proven by a certificate
    I serial                         [URI, until_utc]   a certificate that was issued
    Q bus u32, NAME                  [[node, endpoint, flags], ...]   owner first
    B bus u32                        [endpoint of its master, principal, unused_since_utc]
    T ID                             a join token
    C NAME                           [number]   counters, and the epoch
    P                                [digest of the policy]

What endpoints there are, and which of them wants what, stands nowhere: nodes state it after each
return of the master.

Changes are collected and become deltas of bounded size in `flush`, so that much that happens at
once is one version, and is written once.

Invariants:

1. The version grows with each delta and is in the rows that are written with it.
2. What was put and taken back before a flush leaves no trace.
3. In no version is there a lease, a match or a name of a node that is not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..proto import codec
from ..proto.cluster import CHUNK_BYTES, CHUNK_RECORDS
from ..proto.codec import Fields
from ..proto.record import Record, encode_record
from ..proto.table import Snapshot, Table
from .effect import Write

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..proto.table import Delta

# What lists and lengths around a key and a value take, at most.
_FRAME_BYTES = 16


def is_public(key: bytes) -> bool:
    """Tell whether a row is a record of the table."""
    return key[:1].islower()


def chunks(
    entries: Iterable[tuple[bytes, bytes | None]],
) -> Iterator[list[tuple[bytes, bytes | None]]]:
    """Part entries, in their order, so that each part fits into one frame."""
    part: list[tuple[bytes, bytes | None]] = []
    size = 0
    for key, value in entries:
        takes = len(key) + len(value or b"") + _FRAME_BYTES
        if part and (size + takes > CHUNK_BYTES or len(part) == CHUNK_RECORDS):
            yield part
            part, size = [], 0
        part.append((key, value))
        size += takes
    if part:
        yield part


def _in_order(
    changed: list[tuple[bytes, bytes | None]],
) -> list[list[tuple[bytes, bytes | None]]]:
    """Part changes; if they take several versions, nodes come first, and go last."""
    parts = list(chunks(changed))
    if len(parts) > 1:
        come = [one for one in changed if one[0][:1] == b"n" and one[1] is not None]
        rest = [one for one in changed if one[0][:1] != b"n"]
        gone = [one for one in changed if one[0][:1] == b"n" and one[1] is None]
        parts = [*chunks(come), *chunks(rest), *chunks(gone)]
    return parts


class Ledger:
    """All rows that change together with the table."""

    def __init__(self) -> None:
        self.table: Table[bytes, bytes] = Table()
        self._dirty: dict[bytes, bytes | None] = {}
        self._rows: dict[bytes, bytes | None] = {}
        self._counters: dict[str, int] = {}

    def load(self, rows: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Begin with what a journal holds; return the private rows but for counters.

        Raises:
            RemoteProtocolError: A counter is none.
        """
        public, private = [], []
        for key, value in rows:
            if is_public(key):
                public.append((key, value))
            elif key[:1] == b"C":
                self._counters[key[1:].decode()] = _number(value)
            else:
                private.append((key, value))
        self.table.load(Snapshot(self.count("version"), tuple(sorted(public))))
        return private

    def put(self, record: Record) -> None:
        """Set a record of the table."""
        key, value = encode_record(record)
        self._dirty[key] = value

    def drop(self, key: bytes) -> None:
        """Remove a record of the table, if it is there."""
        self._dirty[key] = None

    def write(self, key: bytes, value: list[object] | bytes | None) -> None:
        """Set or remove a private row."""
        self._rows[key] = codec.encode(value) if isinstance(value, list) else value

    def count(self, name: str) -> int:
        """Return a counter, 0 at first."""
        return self._counters.get(name, 0)

    def set_count(self, name: str, number: int) -> None:
        """Set a counter."""
        self._counters[name] = number
        self.write(b"C" + name.encode(), [number])

    def flush(self) -> tuple[Write | None, list[Delta[bytes, bytes]]]:
        """Make versions of what has changed; return the rows to write, and the deltas."""
        table = self.table
        changed = sorted(
            (key, value) for key, value in self._dirty.items() if table.get(key) != value
        )
        self._dirty.clear()
        deltas = []
        for part in _in_order(changed):
            puts = {key: value for key, value in part if value is not None}
            deltas.append(table.change(puts, [key for key, value in part if value is None]))
        if deltas:
            self.set_count("version", table.version)
        rows = (*self._rows.items(), *changed)
        self._rows.clear()
        return (Write(rows) if rows else None), deltas


def _number(value: bytes) -> int:
    fields = Fields("counter", codec.decode(value))
    number = fields.take_int()
    fields.end()
    return number
