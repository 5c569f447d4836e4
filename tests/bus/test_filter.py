"""Filters: eBPF programs on messages that match, verified when they are attached (R17, D10)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import BUS_SOCKET, SO_BUS_FILTER, Overflow, Terms

if TYPE_CHECKING:
    from tests.bus.conftest import Scene

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)
#: More than travels inside the ring.
LARGE = 70_000


def code(op: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    """One instruction, as in <linux/bpf.h>."""
    return struct.pack("<BBhi", op, dst | src << 4, off, imm)


LDXB, LDXDW, MOV, MOVX, ADD, ADDX = 0x71, 0x79, 0xB7, 0xBF, 0x07, 0x0F
JA, JNE, CALL, EXIT, STXDW = 0x05, 0x55, 0x85, 0x95, 0x7B
ALL = code(MOV, imm=1) + code(EXIT)
NONE = code(MOV, imm=0) + code(EXIT)


def begins_with(byte: bytes) -> bytes:
    """A program that lets pass what begins with this byte."""
    return (
        code(LDXB, 2, 1)
        + code(MOV, 0, imm=0)
        + code(JNE, 2, off=1, imm=byte[0])
        + code(MOV, 0, imm=1)
        + code(EXIT)
    )


def test_r17_d10_filter_chooses_among_matches(scene: Scene) -> None:
    """Of what matches, only what the program lets pass is received; None detaches it."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(Terms("topic")),))
    other = scene.join("1.3", items=(scene.hears(Terms("topic")),))
    topic, off_topic = [scene.terms("topic")], [scene.terms("other")]

    def publish() -> None:
        for body in (b"A1", b"B2", b"A3", b""):
            one.sendmsg([body], topic, 0, scene.multicast())
            one.sendmsg([body], off_topic, 0, scene.multicast())

    two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, begins_with(b"A"))
    publish()
    assert scene.read_all(two) == [b"A1", b"A3"]
    assert scene.read_all(other) == [b"A1", b"B2", b"A3", b""]
    two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, begins_with(b"B"))
    publish()
    assert scene.read_all(two) == [b"B2"]
    for detach in (None, b""):
        two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, NONE)
        publish()
        assert scene.is_empty(two)
        two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, detach)
        publish()
        assert len(scene.read_all(two)) == 4


def test_d10_policy_and_terms_come_before_the_filter(scene: Scene) -> None:
    """A filter that lets everything pass brings nothing that was not granted, or not wanted."""
    one = scene.join("1.1", items=(scene.may_send(Terms("said")),))
    two = scene.join("1.2", items=(scene.hears(Terms("heard")),))
    two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, ALL)
    with pytest.raises(afbus.Denied):
        one.sendmsg([b"x"], [scene.terms("heard")], 0, scene.multicast())
    one.sendmsg([b"x"], [scene.terms("said")], 0, scene.multicast())
    assert scene.is_empty(two)


def test_d10_messages_to_one_are_not_filtered(scene: Scene) -> None:
    """Who is meant gets the message: a sender was told that it was accepted."""
    one = scene.join("1.1")
    two = scene.join("1.2", items=(scene.flags(1),))
    two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, NONE)
    one.sendto(b"x", scene.address("1.2"))
    assert two.recv(9) == b"x"
    one.close()
    assert scene.read_notice(two).event is afbus.Event.LEFT


def test_d10_d12_filtered_messages_are_not_missed(scene: Scene) -> None:
    """What the filter leaves out takes no room, holds up nobody, and is in no gap."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    blocks = scene.hears(EVERYTHING, Overflow.BLOCK, 60_000)
    two = scene.join("1.2", items=(blocks,), rx_bytes=4096)
    two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, begins_with(b"A"))
    one.setblocking(False)
    for _ in range(100):
        one.sendto(b"B" * 1000, scene.multicast(EVERYTHING))
    one.sendto(b"A", scene.multicast(EVERYTHING))
    assert scene.read_all(two) == [b"A"]
    assert two.stats()["missed"] == 0


def test_r17_d10_d14_large_bodies_are_filtered_alike(scene: Scene) -> None:
    """How a body travels makes no difference to a filter."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(EVERYTHING),))
    two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, begins_with(b"A"))
    for byte in (b"A", b"B", b"A"):
        one.sendto(byte * LARGE, scene.multicast(EVERYTHING))
    assert scene.read_all(two) == [b"A" * LARGE] * 2


@pytest.mark.parametrize("far", [3, 4, 1000, 30_000])
def test_d10_case45_load_outside_the_body_lets_nothing_pass(scene: Scene, far: int) -> None:
    """Bounds are checked when it happens: the program ends, the switch goes on."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(EVERYTHING),))
    program = code(LDXB, 0, 1, off=far) + code(MOV, 0, imm=1) + code(EXIT)
    two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, program)
    for size in (0, 3, far, far + 1):
        one.sendto(bytes(size), scene.multicast(EVERYTHING))
    passed = [len(body) for body in scene.read_all(two)]
    assert passed == [size for size in (0, 3, far, far + 1) if size > far]
    # Before the body, too.
    two.setsockopt(
        BUS_SOCKET, SO_BUS_FILTER, code(LDXB, 0, 1, off=-1) + code(MOV, 0, imm=1) + code(EXIT)
    )
    one.sendto(bytes(100), scene.multicast(EVERYTHING))
    assert scene.is_empty(two)


# Programs that must be refused, and where.
REFUSED = {
    "endless loop": (code(JA, off=-1) + code(EXIT), "instruction 0"),
    "loop": (code(MOV, 0, imm=1) + code(JNE, 0, off=-2, imm=5) + code(EXIT), "instruction 1"),
    "jump out": (code(JA, off=9) + code(EXIT), "instruction 0"),
    "no end": (code(MOV, 0, imm=1), "instruction 0"),
    "call": (code(CALL, imm=1) + code(EXIT), "instruction 0"),
    "no such register": (code(MOV, 11) + code(EXIT), "instruction 0"),
    "unknown": (code(0xFF) + code(EXIT), "instruction 0"),
    "load through a number": (
        code(MOV, 2, imm=9) + code(LDXDW, 0, 2) + code(EXIT),
        "instruction 1",
    ),
    "leak of a pointer": (code(MOVX, 0, 1) + code(EXIT), "instruction 1"),
    "store outside": (code(STXDW, 10, 0, off=-520) + code(EXIT), "instruction 0"),
    "store into the body": (code(STXDW, 1, 0) + code(EXIT), "instruction 0"),
    "4097 instructions": (code(MOV, 0, imm=1) * 4096 + code(EXIT), "4096"),
    "a megabyte": (code(MOV, 0, imm=1) * (1 << 17), "4096"),
    "not whole": (ALL[:-1], "8 bytes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_d10_case45_wrong_program_is_refused_with_the_reason(scene: Scene, what: str) -> None:
    """The instruction is named; the filter that was there stays, and so does the socket."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(EVERYTHING),))
    two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, begins_with(b"A"))
    program, named = REFUSED[what]
    with pytest.raises(afbus.InvalidArgument, match=named) as caught:
        two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, program)
    assert caught.value.errno == errno.EINVAL
    for body in (b"A", b"B"):
        one.sendto(body, scene.multicast(EVERYTHING))
    assert scene.read_all(two) == [b"A"]


def test_d10_case45_longest_program_runs(scene: Scene) -> None:
    """4096 instructions, all of them run for each message, and everybody else goes on."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(EVERYTHING),))
    program = code(MOV, 0) + code(ADD, 0, imm=1) * 4094 + code(EXIT)
    assert len(program) == 4096 * 8
    two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, program)
    for number in range(100):
        one.sendto(b"%d" % number, scene.multicast(EVERYTHING))
    assert len(scene.read_all(two)) == 100


def test_d10_filter_before_joining(scene: Scene) -> None:
    """A filter can be attached first, so that nothing is heard without it."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.socket()
    two.setsockopt(BUS_SOCKET, SO_BUS_FILTER, begins_with(b"A"))
    two.sendto(b"AUTH", scene.master_address)
    scene.let_in("1.2", items=(scene.hears(EVERYTHING),))
    for body in (b"B", b"A"):
        one.sendto(body, scene.multicast(EVERYTHING))
    assert scene.read_all(two) == [b"welcome", b"A"]
