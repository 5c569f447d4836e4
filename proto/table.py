"""Versioned tables: how one side tells the other what it knows, by snapshot and by deltas.

The writer changes its table and sends each `Delta` that a change returns. A reader begins with a
`Snapshot`, applies deltas in their order, and asks for a new snapshot when one is missing. A delta
is explicit: `puts` and `drops` change what is there, `reset` replaces all of it by `puts`.

On the wire: a delta is msgpack `[from, to, reset, [[key, value], ...], [key, ...]]`, a snapshot
`[version, [[key, value], ...]]`.

Invariants:

1. A change that changes nothing takes no version; every other takes one.
2. Everything that leaves is sorted by key, so equal tables give equal bytes.
3. A delta is applied as a whole or not at all; what does not follow is told by a `TableGap`.
4. A table that applies all deltas equals the snapshot of that version.
5. Decoders raise `RemoteProtocolError` and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from . import codec
from .codec import Fields
from .errors import RemoteProtocolError
from .limits import TABLE_BYTES, TABLE_ENTRIES

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
    reset: bool = False

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

    def reset(self, entries: Mapping[K, V]) -> Delta[K, V]:
        """Replace everything; always a version of its own."""
        version = self._version
        self._entries = dict(entries)
        self._version += 1
        return Delta(version, self._version, tuple(self.items()), (), reset=True)

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
            here; then nothing has changed. A reset follows from every version.
        """
        if delta.reset:
            self._entries = dict(delta.puts)
        elif delta.from_version != self._version or any(
            key not in self._entries for key in delta.drops
        ):
            return TableGap(self._version, delta.from_version)
        else:
            self._entries.update(delta.puts)
            for key in delta.drops:
                del self._entries[key]
        self._version = delta.to_version
        return None


def encode_delta(delta: Delta[K, V]) -> bytes:
    """Return the bytes of a delta; its values must be what a packet may hold.

    Raises:
        TooBig: It has more than 16 MiB. EMSGSIZE.
        InvalidArgument: A value cannot stand in a packet. EINVAL.
    """
    value = [delta.from_version, delta.to_version, delta.reset, delta.puts, delta.drops]
    return codec.encode(value, TABLE_BYTES)


def encode_snapshot(snapshot: Snapshot[K, V]) -> bytes:
    """Return the bytes of a snapshot; errors as `encode_delta`."""
    return codec.encode([snapshot.version, snapshot.entries], TABLE_BYTES)


def _check_keys(fields: Fields, keys: list[K], key_type: type[K]) -> None:
    if any(type(key) is not key_type for key in keys):
        fields.fail(f"key that is not {key_type.__name__}")
    if any(one >= next_one for one, next_one in pairwise(keys)):
        fields.fail("keys that do not ascend")


def _take_entries(fields: Fields, key_type: type[K]) -> tuple[tuple[K, Any], ...]:
    entries = fields.take_list(TABLE_ENTRIES)
    if any(type(entry) is not list or len(entry) != 2 for entry in entries):
        fields.fail("entry that is not key and value")
    _check_keys(fields, [entry[0] for entry in entries], key_type)
    return tuple((key, value) for key, value in entries)


def decode_delta(data: bytes, key_type: type[K]) -> Delta[K, Any]:
    """Return the delta of some bytes; values are as msgpack made them (lists, not tuples).

    Raises:
        RemoteProtocolError: Malformed, too large, out of order, or running backwards.
    """
    fields = Fields("delta", codec.decode(data, TABLE_BYTES, TABLE_ENTRIES))
    from_version, to_version = fields.take_int(), fields.take_int()
    reset = fields.take_bool()
    puts = _take_entries(fields, key_type)
    drops = fields.take_list(TABLE_ENTRIES)
    _check_keys(fields, drops, key_type)
    fields.end()
    if not {key for key, _ in puts}.isdisjoint(drops):
        raise RemoteProtocolError("delta that puts and drops one key")
    if reset and drops:
        raise RemoteProtocolError("delta that resets and drops")
    if to_version < from_version or (to_version == from_version and (puts or drops or reset)):
        raise RemoteProtocolError(f"delta from version {from_version} to {to_version}")
    return Delta(from_version, to_version, puts, tuple(drops), reset)


def decode_snapshot(data: bytes, key_type: type[K]) -> Snapshot[K, Any]:
    """Return the snapshot of some bytes; as `decode_delta`."""
    fields = Fields("snapshot", codec.decode(data, TABLE_BYTES, TABLE_ENTRIES))
    version = fields.take_int()
    entries = _take_entries(fields, key_type)
    fields.end()
    return Snapshot(version, entries)
