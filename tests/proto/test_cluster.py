"""Frames between node and master: round trips, strict arguments, and one type of error."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto import cluster, codec
from afbus.proto.cluster import (
    CHUNK_BYTES,
    CHUNK_RECORDS,
    CLUSTER_FRAME_BYTES,
    PARTS,
    Ack,
    ClusterCall,
    ClusterFrame,
    ClusterFrameKind,
    ClusterHello,
    ClusterWelcome,
    Nack,
    Part,
    Resync,
    TableDelta,
    Withdrawn,
)
from afbus.proto.errors import CloseCode, Denied, RemoteProtocolError, TooBig
from afbus.proto.frames import Closed, Result
from afbus.proto.operation import CLUSTER_ARGUMENTS, ClusterOp, endpoint_claim
from afbus.proto.record import PLACE_BYTES, PLACES
from afbus.proto.table import Delta
from afbus.proto.terms import Terms

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=10)
NAME = st.text(st.characters(codec="utf-8"), min_size=1, max_size=10)
CERTIFICATE = st.binary(min_size=1, max_size=9)
VALUES: dict[type, st.SearchStrategy[Any]] = {
    bytes: st.binary(min_size=1, max_size=9),
    int: U32,
    str: NAME,
    bool: st.booleans(),
    list: st.lists(CERTIFICATE, min_size=1, max_size=4),
    type(None): st.none(),
}
KEYS = st.binary(min_size=1, max_size=6)
ENTRIES = st.dictionaries(KEYS, st.binary(max_size=6), max_size=5)
WHATS = st.sampled_from([b"", b"12345678", Terms(), Terms("a.b", ("k=v",))])


def args_of(op: ClusterOp) -> st.SearchStrategy[dict[str, Any]]:
    """Return arguments that fit."""
    each = {
        name: st.one_of([VALUES[one] for one in types])
        for name, types in CLUSTER_ARGUMENTS[op].items()
    }
    return st.fixed_dictionaries(each)


def make_delta(
    epoch: int, from_version: int, more: int, puts: dict[bytes, bytes], drops: set[bytes]
) -> TableDelta:
    """Return a delta in its order."""
    gone = tuple(sorted(drops - puts.keys()))
    delta = Delta(from_version, from_version + more, tuple(sorted(puts.items())), gone)
    return TableDelta(epoch, delta)


FRAMES: st.SearchStrategy[ClusterFrame] = st.one_of(
    st.builds(
        ClusterHello, TEXT, U64, U64, st.lists(TEXT, max_size=3).map(tuple), st.integers(0, 9)
    ),
    st.sampled_from(ClusterOp).flatmap(
        lambda op: st.builds(ClusterCall, U64, st.just(op), args_of(op))
    ),
    st.builds(Ack, U64, U64),
    st.builds(Nack, U64, U64, TEXT),
    st.builds(Resync, U64, U64),
    st.builds(ClusterWelcome, TEXT, U64, st.integers(1, 99), st.booleans(), st.integers(0, 9)),
    st.builds(
        lambda epoch, version, index, more, entries: Part(
            epoch, version, index, index + more, tuple(sorted(entries.items()))
        ),
        U64,
        U64,
        st.integers(0, PARTS - 9),
        st.integers(1, 9),
        ENTRIES,
    ),
    st.builds(make_delta, U64, U32, st.integers(1, 9), ENTRIES, st.sets(KEYS, max_size=4)),
    st.builds(Result, U64, st.just(0), st.none() | U64 | TEXT | st.lists(U64, max_size=3)),
    st.builds(lambda serial, text: Result.refused(serial, Denied(text)), U64, NAME),
    st.builds(
        Withdrawn,
        U64,
        st.sampled_from(ClusterOp),
        st.binary(max_size=9),
        st.binary(max_size=9),
        WHATS,
        TEXT,
    ),
    st.builds(Closed, st.sampled_from(CloseCode), TEXT),
)


@given(FRAMES)
def test_frames_come_back(frame: ClusterFrame) -> None:
    """Through bytes."""
    assert cluster.decode(cluster.encode(frame)) == frame


def test_numbers_never_change() -> None:
    """They are on the wire; each operation has its arguments."""
    numbers = (
        "ENROL 1 RENEW 2 RESTATE 3 RESTATED 4 LEASE 5 RETURN 6 CHALLENGE 7 ENTER 8 EXIT 9 BIND 10 "
        "UNBIND 11 OWN 12 RELEASE 13 SUBSCRIBE 14 UNSUBSCRIBE 15 ASK 16 "
        "TOKEN 32 REVOKE 33 STATUS 34 NODES 35 ISSUE 36"
    ).split()
    pairs = zip(numbers[::2], map(int, numbers[1::2]), strict=True)
    assert {op.name: op.value for op in ClusterOp} == dict(pairs)
    assert set(CLUSTER_ARGUMENTS) == set(ClusterOp)
    kinds = (
        "HELLO 1 CALL 2 ACK 3 NACK 4 RESYNC 5 WELCOME 16 PART 17 DELTA 18 RESULT 19 "
        "WITHDRAWN 20 CLOSED 31"
    ).split()
    pairs = zip(kinds[::2], map(int, kinds[1::2]), strict=True)
    assert {kind.name: kind.value for kind in ClusterFrameKind} == dict(pairs)


def test_arguments_that_may_be_absent() -> None:
    """Who may be None may be left out."""
    for call in (
        ClusterCall(1, ClusterOp.LEASE),
        ClusterCall(2, ClusterOp.ENTER, {"endpoint": 1, "uid": 0}),
        ClusterCall(3, ClusterOp.BIND, {"endpoint": 1, "path": b"/a", "address": b"m"}),
        ClusterCall(4, ClusterOp.TOKEN, {}),
    ):
        assert cluster.decode(cluster.encode(call)) == call


OWN: dict[str, Any] = {"endpoint": 1, "path": b"/a", "name": b"n"}
ENTER: dict[str, Any] = {"endpoint": 1, "uid": 1}


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (ClusterOp.OWN, {}),
        (ClusterOp.OWN, OWN | {"more": 1}),
        (ClusterOp.OWN, OWN | {"endpoint": True}),
        (ClusterOp.OWN, OWN | {"endpoint": -1}),
        (ClusterOp.OWN, OWN | {"flags": -1}),
        (ClusterOp.OWN, OWN | {"name": "text"}),
        (ClusterOp.OWN, OWN | {"name": b""}),
        (ClusterOp.OWN, OWN | {"name": bytes(257)}),
        (ClusterOp.OWN, OWN | {"path": b""}),
        (ClusterOp.OWN, OWN | {"path": bytes(107)}),
        (ClusterOp.ENTER, ENTER | {"uid": 1 << 32}),
        (ClusterOp.ENTER, ENTER | {"uid": -1}),
        (ClusterOp.ENTER, ENTER | {"chain": []}),
        (ClusterOp.ENTER, ENTER | {"chain": [b"a"] * 5}),
        (ClusterOp.ENTER, ENTER | {"chain": ["a"]}),
        (ClusterOp.ENTER, ENTER | {"chain": [bytes(16385)]}),
        (ClusterOp.ENTER, ENTER | {"signature": bytes(513)}),
        (ClusterOp.ENTER, ENTER | {"principal": ""}),
        (ClusterOp.ENROL, {"token": "t" * 257, "name": "a", "csr": b"c"}),
        (ClusterOp.ENROL, {"token": "t", "name": "a" * 256, "csr": b"c"}),
        (ClusterOp.ENROL, {"token": "t", "name": "a", "csr": bytes(16385)}),
        (ClusterOp.LEASE, {"block": -1}),
        (ClusterOp.TOKEN, {"life_s": -1}),
        (ClusterOp.TOKEN, {"is_ephemeral": 1}),
    ],
)
def test_arguments_that_are_refused(op: ClusterOp, args: dict[str, Any]) -> None:
    """Missing, unknown, of another type, too large."""
    with pytest.raises(RemoteProtocolError):
        cluster.decode(cluster.encode(ClusterCall(1, op, args)))


@pytest.mark.parametrize(
    "value",
    [
        [],
        [99],
        {"a": 1},
        [1, 1, "a", 0, 0],
        [1, 1, "a" * 256, 0, 0, []],
        [1, 1, "a", 0, 0, ["p"] * (PLACES + 1)],
        [1, 1, "a", 0, 0, ["p" * (PLACE_BYTES + 1)]],
        [2, 1, 99, {}],
        [2, 1, 3, []],
        [3, 1],
        [3, 1, 2, 3],
        [16, 1, "c", 1, 0, False],
        [16, 1, "c", 1, 1, 0],
        [17, 1, 1, 1, 1, []],
        [17, 1, 1, 0, 0, []],
        [17, 1, 1, 0, PARTS + 1, []],
        [17, 1, 1, 0, 1, [[b"b", b""], [b"a", b""]]],
        [17, 1, 1, 0, 1, [[b"a", b""], [b"a", b""]]],
        [17, 1, 1, 0, 1, [[b"", b""]]],
        [17, 1, 1, 0, 1, [[b"a"]]],
        [17, 1, 1, 0, 1, [[b"a", b"", b""]]],
        [18, 1, 1, 1, [], []],
        [18, 1, 2, 1, [], []],
        [18, 1, 1, 2, [[b"a", b""]], [b"a"]],
        [18, 1, 1, 2, [], [b"b", b"a"]],
        [18, 1, 1, 2, [], [b"a", b"a"]],
        [18, 1, 1, 2, [], [b""]],
        [19, 1, 1, 5, 0],
        [19, 1, 0, None, 5],
        [19, 1, 5000, "", 0],
        [20, 1, 99, b"", b"", b"", None, ""],
        [20, 1, 8, b"", b"", None, None, ""],
        [21, []],
        [31, 99, ""],
    ],
)
def test_frames_that_are_none(value: object) -> None:
    """The peer's fault."""
    with pytest.raises(RemoteProtocolError):
        cluster.decode(codec.encode(value))


def test_what_is_too_large() -> None:
    """Refused by both sides, by its size alone or by the number of its elements."""
    with pytest.raises(TooBig):
        cluster.encode(Result(1, value=bytes(CLUSTER_FRAME_BYTES)))
    with pytest.raises(RemoteProtocolError) as caught:
        cluster.decode(bytes(CLUSTER_FRAME_BYTES + 1))
    assert caught.value.code is CloseCode.LIMIT
    many = tuple((b"%05d" % number, b"") for number in range(CHUNK_RECORDS + 1))
    with pytest.raises(RemoteProtocolError):
        cluster.decode(cluster.encode(Part(1, 1, 0, 1, many)))


def test_a_full_chunk_fits_into_a_frame() -> None:
    """One large record, or as many as there may be."""
    large = Part(1, 1, 0, 1, ((b"k", bytes(CHUNK_BYTES)),))
    assert cluster.decode(cluster.encode(large)) == large
    size = CHUNK_BYTES // CHUNK_RECORDS
    many = tuple((b"%08d" % number, bytes(size - 8)) for number in range(CHUNK_RECORDS))
    full = TableDelta(1, Delta(1, 2, many))
    assert cluster.decode(cluster.encode(full)) == full


@given(FRAMES, st.integers(0, 1 << 16), st.integers(0, 255), st.booleans())
def test_mutated_frames_raise_one_type(
    frame: ClusterFrame, place: int, byte: int, cut: bool
) -> None:
    """One byte is another, or the end is missing."""
    bad = bytearray(cluster.encode(frame))
    place %= len(bad)
    bad[place] = byte
    try:
        again = cluster.decode(bytes(bad[:place] if cut else bad))
    except RemoteProtocolError:
        return
    assert cluster.decode(cluster.encode(again)) == again


def test_case42_seeded_garbage_raises_one_type() -> None:
    """10,000 frames of random bytes behind the head of each kind, always the same."""
    rng = random.Random(42)
    kinds = [bytes([kind]) for kind in ClusterFrameKind]
    for _ in range(10_000):
        head = bytes([0x90 + rng.randrange(9)]) + rng.choice(kinds)
        data = head + rng.randbytes(rng.randrange(30))
        try:
            cluster.decode(data)
        except RemoteProtocolError:
            continue


def test_d17_a_claim_is_about_one_endpoint_of_one_node() -> None:
    """Nobody else can use the signature."""
    claim = endpoint_claim(b"n" * 32, "c", "node", 1)
    others = [
        endpoint_claim(b"m" * 32, "c", "node", 1),
        endpoint_claim(b"n" * 32, "d", "node", 1),
        endpoint_claim(b"n" * 32, "c", "other", 1),
        endpoint_claim(b"n" * 32, "c", "node", 2),
    ]
    assert len({claim, *others}) == 5
