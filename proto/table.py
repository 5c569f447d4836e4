"""Versioned tables: how one side tells the other what it knows, by snapshot and by deltas.

The writer changes its table and sends each `Delta` that a change returns. A reader begins with a
`Snapshot`, applies deltas in their order, and asks for a new snapshot when one is missing. A delta
is explicit: `puts` and `drops` say what changes. `cluster.py` has both on the wire.

Invariants:

1. A change that changes nothing takes no version; every other takes one.
2. Everything that leaves is sorted by key, so equal tables give equal bytes.
3. A delta is applied as a whole or not at all; what does not follow is told by a `TableGap`.
4. A table that applies all deltas equals the snapshot of that version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

K = TypeVar("K", str, bytes, int)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Delta(Generic[K, V]):
    """What leads from one version to another. `puts` and `drops` ascend; no key is in both."""

    from_version: int
    to_version: int
    puts: tuple[tuple[K, V], ...] = ()
    drops: tuple[K, ...] = ()

    def __bool__(self) -> bool:
        """Tell whether it changes anything."""
        return self.from_version != self.to_version


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[K, V]):
    """All of a table at one version; entries ascend by key."""

    version: int
    entries: tuple[tuple[K, V], ...] = ()


@dataclass(frozen=True, slots=True)
class TableGap:
    """A delta did not follow: it starts from another version than the reader has. Resync."""

    have_version: int
    from_version: int


class Table(Generic[K, V]):
    """A map with a version. Values belong to the table once they are in it: do not change them."""

    def __init__(self, version: int = 0) -> None:
        self._entries: dict[K, V] = {}
        self._version = version

    @property
    def version(self) -> int:
        """The version; 0 for a table that never held anything."""
        return self._version

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __getitem__(self, key: K) -> V:
        return self._entries[key]

    def __iter__(self) -> Iterator[K]:
        """Iterate over the keys, sorted; O(n log n)."""
        return iter(sorted(self._entries))

    def get(self, key: K) -> V | None:
        """Return the value of a key, None if there is none."""
        return self._entries.get(key)

    def items(self) -> list[tuple[K, V]]:
        """Return all entries, sorted by key; O(n log n)."""
        return [(key, self._entries[key]) for key in self]

    def put(self, key: K, value: V) -> Delta[K, V]:
        """Set one entry."""
        return self.change({key: value})

    def drop(self, key: K) -> Delta[K, V]:
        """Remove one entry, if it is there."""
        return self.change({}, (key,))

    def change(self, puts: Mapping[K, V], drops: Iterable[K] = ()) -> Delta[K, V]:
        """Set and remove several entries at once; a key in both is set."""
        new = sorted(
            key
            for key, value in puts.items()
            if key not in self._entries or self._entries[key] != value
        )
        old = sorted(key for key in set(drops) if key in self._entries and key not in puts)
        version = self._version
        if new or old:
            self._version += 1
        for key in new:
            self._entries[key] = puts[key]
        for key in old:
            del self._entries[key]
        changed = tuple((key, puts[key]) for key in new)
        return Delta(version, self._version, changed, tuple(old))

    def snapshot(self) -> Snapshot[K, V]:
        """Return all of it; O(n log n)."""
        return Snapshot(self._version, tuple(self.items()))

    def load(self, snapshot: Snapshot[K, V]) -> None:
        """Become what a snapshot says, whatever was here before."""
        self._entries = dict(snapshot.entries)
        self._version = snapshot.version

    def apply(self, delta: Delta[K, V]) -> TableGap | None:
        """Follow a delta of the writer.

        Returns:
            None, or a `TableGap` if the delta starts from another version, or drops what is not
            here; then nothing has changed.
        """
        does_follow = delta.from_version == self._version
        if not does_follow or any(key not in self._entries for key in delta.drops):
            return TableGap(self._version, delta.from_version)
        self._entries.update(delta.puts)
        for key in delta.drops:
            del self._entries[key]
        self._version = delta.to_version
        return None
