"""Versioned tables: deltas lead to the snapshot, gaps are told, bytes are the same everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto import codec
from afbus.proto.errors import RemoteProtocolError
from afbus.proto.table import (
    Delta,
    Snapshot,
    Table,
    TableGap,
    decode_delta,
    decode_snapshot,
    encode_delta,
    encode_snapshot,
)

if TYPE_CHECKING:
    import random

KEYS = st.sampled_from([b"a", b"b", b"c", b"d"])
MAPS = st.dictionaries(KEYS, st.integers(0, 3), max_size=4)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["change", "change", "reset"]), MAPS, st.lists(KEYS, max_size=3)),
    max_size=12,
)


@given(CHANGES, st.integers(0, 12))
def test_deltas_lead_to_the_snapshot(
    changes: list[tuple[str, dict[bytes, int], list[bytes]]], start: int
) -> None:
    """From any snapshot on, through bytes, whatever the changes are."""
    writer: Table[bytes, int] = Table()
    reader: Table[bytes, int] = Table()
    for number, (kind, puts, drops) in enumerate(changes):
        if number == start:
            data = encode_snapshot(writer.snapshot())
            reader.load(decode_snapshot(data, bytes))
        delta = writer.reset(puts) if kind == "reset" else writer.change(puts, drops)
        again = decode_delta(encode_delta(delta), bytes)
        assert again == delta
        assert reader.apply(again) is None or number < start
        assert bool(delta) is (delta.to_version > delta.from_version)
    if start < len(changes):
        assert reader.snapshot() == writer.snapshot()


@given(MAPS, st.randoms(use_true_random=False))
def test_equal_tables_give_equal_bytes(entries: dict[bytes, int], rng: random.Random) -> None:
    """In whatever order they were filled."""
    shuffled = list(entries.items())
    rng.shuffle(shuffled)
    one, other = Table[bytes, int](), Table[bytes, int]()
    one.reset(entries)
    other.reset(dict(shuffled))
    assert encode_snapshot(one.snapshot()) == encode_snapshot(other.snapshot())
    assert list(one) == sorted(entries)


def test_changes_and_versions() -> None:
    """Nothing changed, no version; a key in both is set."""
    table: Table[str, int] = Table()
    assert table.put("a", 1) == Delta(0, 1, (("a", 1),))
    assert not table.put("a", 1)
    assert not table.drop("b")
    assert table.change({"a": 2, "c": 3}, ["a", "c"]) == Delta(1, 2, (("a", 2), ("c", 3)))
    assert table.drop("a") == Delta(2, 3, (), ("a",))
    assert table.reset({"z": 1}) == Delta(3, 4, (("z", 1),), (), reset=True)
    assert (table.version, len(table), "z" in table, table["z"]) == (4, 1, True, 1)
    assert table.get("a") is None
    assert table.items() == [("z", 1)]


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
    assert reader.apply(Delta(7, 9, ((5, "x"),), (), reset=True)) is None
    assert reader.snapshot() == Snapshot(9, ((5, "x"),))


@pytest.mark.parametrize(
    "value",
    [
        [],
        [1, 0, False, [], []],
        [1, 1, True, [], []],
        [1, 1, False, [[b"a", 1]], []],
        [1, 2, False, [[b"b", 1], [b"a", 1]], []],
        [1, 2, False, [[b"a", 1], [b"a", 1]], []],
        [1, 2, False, [["a", 1]], []],
        [1, 2, False, [[b"a"]], []],
        [1, 2, False, [b"a"], []],
        [1, 2, False, [], [b"b", b"a"]],
        [1, 2, False, [], [True]],
        [1, 2, False, [[b"a", 1]], [b"a"]],
        [1, 2, True, [], [b"a"]],
        [1, 2, 0, [], []],
        [1, 2, False, [], [], 0],
    ],
)
def test_deltas_that_are_refused(value: list[Any]) -> None:
    """The peer's fault."""
    with pytest.raises(RemoteProtocolError):
        decode_delta(codec.encode(value), bytes)


def test_keys_are_of_one_type() -> None:
    """True is no 1."""
    with pytest.raises(RemoteProtocolError):
        decode_snapshot(codec.encode([1, [[True, 0]]]), int)
    assert decode_snapshot(codec.encode([1, [[1, [2]]]]), int) == Snapshot(1, ((1, [2]),))
    with pytest.raises(RemoteProtocolError):
        decode_snapshot(codec.encode([1, [], 0]), int)


@given(st.binary(max_size=40))
def test_decoders_raise_one_type(data: bytes) -> None:
    """Whatever the bytes are."""
    for packet in (data, b"\x92" + data, b"\x95" + data):
        for decode in (decode_delta, decode_snapshot):
            try:
                decode(packet, bytes)
            except RemoteProtocolError:
                continue
