"""The ledger: rows and versions, that change together and are written before they are told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.master.ledger import Ledger, chunks, is_public
from afbus.proto.cluster import CHUNK_BYTES, CHUNK_RECORDS
from afbus.proto.errors import RemoteProtocolError
from afbus.proto.record import (
    FactRecord,
    LeaseRecord,
    NodeRecord,
    NodeState,
    encode_record,
    lease_key,
    node_key,
)
from afbus.proto.table import Snapshot, Table

if TYPE_CHECKING:
    from afbus.master.effect import Write

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "drop", "write", "count", "flush", "crash"]),
        st.integers(1, 5),
        st.integers(1, 3),
    ),
    max_size=50,
)


def store(disk: dict[bytes, bytes], write: Write | None) -> None:
    """Do what a journal does."""
    for row, data in () if write is None else write.rows:
        if data is None:
            disk.pop(row, None)
        else:
            disk[row] = data


@given(STEPS)
def test_case28_what_was_flushed_is_in_the_rows(steps: list[tuple[str, int, int]]) -> None:
    """A ledger made of the rows is the one of the last flush; deltas lead there too."""
    ledger = Ledger()
    disk: dict[bytes, bytes] = {}
    reader: Table[bytes, bytes] = Table()
    public: dict[bytes, bytes] = {}
    private: dict[bytes, bytes] = {}
    counter = flushed_counter = 0
    flushed = (dict(public), dict(private))
    for step, key, value in steps:
        if step == "put":
            ledger.put(LeaseRecord(key, value))
            public[lease_key(key)] = encode_record(LeaseRecord(key, value))[1]
        elif step == "drop":
            ledger.drop(lease_key(key))
            public.pop(lease_key(key), None)
        elif step == "write":
            row = b"N%d" % key
            made: list[object] | None = [value] if value < 3 else None
            ledger.write(row, made)
            if made is None:
                private.pop(row, None)
            else:
                private[row] = b"\x91" + bytes([value])
        elif step == "count":
            counter += 1
            ledger.set_count("blocks", counter)
        elif step == "flush":
            write, deltas = ledger.flush()
            store(disk, write)
            for delta in deltas:
                assert reader.apply(delta) is None
            flushed, flushed_counter = (dict(public), dict(private)), counter
            assert dict(reader.items()) == public
        else:
            ledger = Ledger()
            rest = ledger.load(disk.items())
            public, private, counter = dict(flushed[0]), dict(flushed[1]), flushed_counter
            assert dict(rest) == private
            assert dict(ledger.table.items()) == public
            assert ledger.table.version == reader.version
            assert ledger.count("blocks") == counter


def test_what_was_put_and_taken_back_leaves_no_trace() -> None:
    """No version, no row."""
    ledger = Ledger()
    ledger.put(LeaseRecord(1, 1))
    ledger.flush()
    ledger.put(LeaseRecord(1, 2))
    ledger.put(LeaseRecord(1, 1))
    ledger.put(LeaseRecord(2, 1))
    ledger.drop(lease_key(2))
    ledger.drop(lease_key(3))
    assert ledger.flush() == (None, [])
    assert ledger.table.version == 1


def test_a_large_change_takes_several_versions() -> None:
    """Each of which fits into a frame; all are in one write."""
    ledger = Ledger()
    for block in range(1, 2 * CHUNK_RECORDS + 2):
        ledger.put(LeaseRecord(block, 1))
    write, deltas = ledger.flush()
    assert [len(delta.puts) for delta in deltas] == [CHUNK_RECORDS, CHUNK_RECORDS, 1]
    assert ledger.table.version == 3
    assert write is not None
    assert len(write.rows) == 2 * CHUNK_RECORDS + 2
    assert ledger.count("version") == 3


def test_nodes_come_before_what_they_have() -> None:
    """Also if that takes several versions, and they go last: no reader is told of a stranger."""
    ledger = Ledger()
    ledger.put(NodeRecord("old", 1, NodeState.LIVE, bytes(16)))
    ledger.flush()
    for block in range(1, CHUNK_RECORDS + 2):
        ledger.put(LeaseRecord(block, 2))
    ledger.put(NodeRecord("new", 2, NodeState.LIVE, bytes(16)))
    ledger.drop(node_key("old"))
    _, deltas = ledger.flush()
    assert [key for key, _ in deltas[0].puts] == [node_key("new")]
    assert deltas[-1].drops == (node_key("old"),)
    reader: Table[bytes, bytes] = Table(1)
    reader.load(Snapshot(1, ((node_key("old"), b""),)))
    assert [reader.apply(delta) for delta in deltas] == [None] * 4
    assert dict(reader.items()) == dict(ledger.table.items())


@given(st.lists(st.integers(0, CHUNK_BYTES), max_size=8))
def test_chunks_keep_order_and_size(sizes: list[int]) -> None:
    """No chunk is larger than one, but for a single entry."""
    entries = [(b"%d" % place, bytes(size)) for place, size in enumerate(sizes)]
    made = list(chunks(entries))
    assert [entry for part in made for entry in part] == entries
    for part in made:
        assert part
        assert len(part) == 1 or sum(len(value or b"") for _, value in part) <= CHUNK_BYTES


def test_a_counter_that_is_none() -> None:
    """The file was changed by somebody else."""
    for value in (b"", b"\xc0", b"\x91\xc0", b"\x92\x01\x01"):
        with pytest.raises(RemoteProtocolError):
            Ledger().load([(b"Cversion", value)])


def test_public_rows_are_those_with_small_letters() -> None:
    """The rest never leaves the master."""
    assert is_public(encode_record(FactRecord("policy", 1))[0])
    assert not is_public(b"Tsecret")
    assert not is_public(b"")
