"""Versioned tables: deltas lead to the snapshot, and gaps are told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from afbus.proto.table import Delta, Snapshot, Table, TableGap

KEYS = st.sampled_from([b"a", b"b", b"c", b"d"])
MAPS = st.dictionaries(KEYS, st.integers(0, 3), max_size=4)
CHANGES = st.lists(st.tuples(MAPS, st.lists(KEYS, max_size=3)), max_size=12)


@given(CHANGES, st.integers(0, 12))
def test_deltas_lead_to_the_snapshot(
    changes: list[tuple[dict[bytes, int], list[bytes]]], start: int
) -> None:
    """From any snapshot on, whatever the changes are."""
    writer: Table[bytes, int] = Table()
    reader: Table[bytes, int] = Table()
    for number, (puts, drops) in enumerate(changes):
        if number == start:
            reader.load(writer.snapshot())
        delta = writer.change(puts, drops)
        assert reader.apply(delta) is None or number < start
        assert bool(delta) is (delta.to_version > delta.from_version)
        assert list(writer) == sorted(key for key, _ in writer.items())
    if start < len(changes):
        assert reader.snapshot() == writer.snapshot()


def test_changes_and_versions() -> None:
    """Nothing changed, no version; a key in both is set."""
    table: Table[str, int] = Table()
    assert table.put("a", 1) == Delta(0, 1, (("a", 1),))
    assert not table.put("a", 1)
    assert not table.drop("b")
    assert table.change({"a": 2, "c": 3}, ["a", "c"]) == Delta(1, 2, (("a", 2), ("c", 3)))
    assert table.drop("a") == Delta(2, 3, (), ("a",))
    assert (table.version, len(table), "c" in table, table["c"]) == (3, 1, True, 3)
    assert table.get("a") is None
    assert table.items() == [("c", 3)]


def test_a_gap_is_told_and_changes_nothing() -> None:
    """A missing delta, or one that drops what is not here; a snapshot heals both."""
    writer: Table[int, str] = Table()
    reader: Table[int, str] = Table()
    first, second = writer.put(1, "a"), writer.put(2, "b")
    assert reader.apply(second) == TableGap(0, 1)
    assert reader.apply(first) is None
    assert reader.apply(Delta(1, 2, (), (9,))) == TableGap(1, 1)
    assert reader.snapshot() == Snapshot(1, ((1, "a"),))
    reader.load(writer.snapshot())
    assert reader.items() == [(1, "a"), (2, "b")]
