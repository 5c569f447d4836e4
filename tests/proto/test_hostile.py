"""Hostile packets by the hundred thousand, in a process that must not grow (case 42)."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.mutation import PIECES, mutate

from afbus.proto import control, frames, request
from afbus.proto.address import BusAddress
from afbus.proto.control import BUS_SOCKET, Match, MulticastMatch, OwnedAddr
from afbus.proto.errors import CloseCode, RemoteProtocolError
from afbus.proto.frames import Call, Closed, Hello, Op, Result, Welcome
from afbus.proto.match import Overflow
from afbus.proto.notice import Event, Gap, GapReason, Notice
from afbus.proto.request import Join, Own, Subscribe
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable

PACKETS = 1_000_000 if os.environ.get("AFBUS_TEST_FULL") else 100_000
GROWTH_BYTES = 20_000_000
STATUS = Path("/proc/self/status")

PATH = b"/tmp/test"
TERMS = Terms.of("sensors.cpu", host="a")
OWNED = OwnedAddr(BusAddress(PATH, "1.1"))
MATCH = MulticastMatch(Match(PATH, TERMS, Overflow.BLOCK, 100))
CONTROL_ARGS = {"dst": b"1.1", "items": [[1, OWNED.address.pack()]], "body": b"hello", "serial": 7}
IDENTITY = control.Identity("svc", "node", 1, 2, 3)

#: A decoder, and packets that it accepts.
TARGETS: list[tuple[Callable[[bytes], object], list[bytes]]] = [
    (
        frames.decode,
        [
            frames.encode(frame)
            for frame in (
                Hello(resume=bytes(16)),
                Welcome(1, 2, b"@2", bytes(16), 3, 4096, 4096, False, "node"),
                Call(1, Op.ATTACH, {"path": PATH}),
                Call(2, Op.CONTROL, CONTROL_ARGS),
                Call(3, Op.LIST, {"what": "buses", "after": 5}),
                Result(4, 0, {"rows": [{"path": PATH, "members": [1, 2, 3]}], "next": None}),
                Closed(CloseCode.RING, "broken"),
            )
        ],
    ),
    (
        request.decode,
        [
            request.encode(asked)
            for asked in (Join(b"claims"), Own(b"org.example"), Subscribe(TERMS))
        ],
    ),
    (request.Answer.decode, [request.Answer(1, "no", {"why": ["a", 1]}).encode()]),
    (Notice.decode, [Notice(Event.LEFT, (b"1.1", b"org.example"), "bye", {"unread": 3}).encode()]),
    *(
        (lambda data, type_=type_: control.decode(BUS_SOCKET, type_, data), [packet])
        for _, type_, packet in (
            control.encode(item)
            for item in (
                OWNED,
                MATCH,
                IDENTITY,
                control.MessageTerms(TERMS),
                control.Grant(control.GrantFlags.MONITOR),
                control.Deadline(100),
                Gap(b"1.7", 3, 9, 4, GapReason.FULL),
            )
        )
    ),
]


def test_hostile_packets_begin_as_good_ones() -> None:
    """Or nothing behind the first check would be reached."""
    for decode, packets in TARGETS:
        for packet in packets:
            decode(packet)


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece[:6].hex())
def test_case42_each_piece_is_judged_by_each_decoder(piece: bytes) -> None:
    """Alone, and where a frame, an answer, a notice or a request has room for a value."""
    for head in (b"", b"\x95\x04\x01\x00", b"\x93\x00\xa0", b"\x94\x01\x90\xa0", b"\x92\x01"):
        for tail in (b"", b"\x00"):
            for decode, _ in TARGETS:
                is_accepted(decode, head + piece + tail)


def is_accepted(decode: Callable[[bytes], object], packet: bytes) -> bool:
    """Tell whether a decoder accepts a packet; only a refusal of the one type is an answer."""
    try:
        decode(packet)
    except RemoteProtocolError:
        return False
    return True


def get_peak_bytes() -> int:
    """Return the most memory that was resident since the last reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Forget the peak, or what other tests once needed would hide what this one needs."""
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.slow
def test_case42_hostile_packets_raise_one_type_and_leave_nothing() -> None:
    """Neither another exception nor memory: 100,000 packets, a million with AFBUS_TEST_FULL."""
    rng = random.Random(42)
    reset_peak()
    before = get_peak_bytes()
    accepted = 0
    for _ in range(PACKETS):
        decode, packets = rng.choice(TARGETS)
        packet = mutate(rng, rng.choice(packets))
        accepted += is_accepted(decode, packet)
        is_accepted(rng.choice(TARGETS)[0], packet)
    assert get_peak_bytes() - before < GROWTH_BYTES
    # Both outcomes occur, or the packets are too wild or too tame.
    assert PACKETS // 100 < accepted < PACKETS // 2
