"""Receiving: flags, room for items, batches, loans; and the options of a socket."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

import afbus
from afbus import BUS_SOCKET, BusAddress, Terms
from afbus.proto import codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import Scene

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)


# flags


@pytest.mark.parametrize("size", [10, 100_000])
def test_d14_short_buffer_cuts_and_says_so(scene: Scene, size: int) -> None:
    """As recvmsg(2): MSG_TRUNC is set and the rest is gone; asked for, nothing is cut."""
    one, two = scene.join("1.1"), scene.join("1.2")
    body = b"x" * size
    for _ in range(3):
        one.sendto(body, scene.address("1.2"))
    one.sendto(b"next", scene.address("1.2"))
    assert two.recvmsg(4) == (b"xxxx", [], socket.MSG_TRUNC, scene.address("1.1"))
    data, _, flags, _ = two.recvmsg(4, 0, socket.MSG_TRUNC)
    assert (data, flags) == (body, socket.MSG_TRUNC)
    assert two.recv(0) == b""
    assert two.recvmsg(4) == (b"next", [], 0, scene.address("1.1"))


def test_d14_peek_takes_nothing(scene: Scene) -> None:
    """MSG_PEEK shows the next message, as often as it is asked, with its items."""
    one, two = scene.join("1.1"), scene.join("1.2")
    serial = scene.number(afbus.SCM_SERIAL, 5)
    one.sendmsg([b"first"], [serial], 0, scene.address("1.2"))
    one.sendto(b"second", scene.address("1.2"))
    for flags in (socket.MSG_PEEK, socket.MSG_PEEK | socket.MSG_DONTWAIT, 0):
        assert two.recvmsg(99, 99, flags) == (b"first", [serial], 0, scene.address("1.1"))
    assert two.recv(3, socket.MSG_PEEK) == b"sec"
    assert two.recv(99) == b"second"


def test_d14_peek_keeps_descriptors_for_the_reader(scene: Scene) -> None:
    """Looking at a message duplicates nothing: its descriptors come with the message."""
    one, two = scene.join("1.1"), scene.join("1.2")
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull, "rb") as file:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))
        one.sendmsg([b"x"], [rights], 0, scene.address("1.2"))
    for _ in range(3):
        _, found, flags, _ = scene.read(two, socket.MSG_PEEK)
        assert (found, flags) == ({}, socket.MSG_CTRUNC)
    _, found, flags, _ = scene.read(two)
    assert flags == 0
    os.close(array.array("i", found[socket.SCM_RIGHTS])[0])
    assert len(os.listdir("/proc/self/fd")) == before


def test_d14_case9_items_without_room_are_left_out_and_told(scene: Scene) -> None:
    """MSG_CTRUNC is set, and descriptors that nobody gets are closed."""
    one, two = scene.join("1.1"), scene.join("1.2")
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull, "rb") as file:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()] * 8))
        items: list[Any] = [rights, scene.number(afbus.SCM_SERIAL, 5)]
        for room in (0, socket.CMSG_SPACE(8), socket.CMSG_SPACE(8) + socket.CMSG_SPACE(4)):
            one.sendmsg([b"x"], items, 0, scene.address("1.2"))
            _, got, flags, _ = two.recvmsg(9, room)
            assert flags == socket.MSG_CTRUNC
            assert got == ([scene.number(afbus.SCM_SERIAL, 5)] if room else [])
        one.sendmsg([b"x"], items, 0, scene.address("1.2"))
        _, got, flags, _ = two.recvmsg(9, socket.CMSG_SPACE(8) + socket.CMSG_SPACE(32))
        assert (len(got), flags) == (2, 0)
    found = {kind: data for _, kind, data in got}
    for descriptor in array.array("i", found[socket.SCM_RIGHTS]):
        os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) == before


def test_d14_receive_into_buffers(scene: Scene) -> None:
    """`recv_into` and `recvfrom_into` fill what is given, and say how much."""
    one, two = scene.join("1.1"), scene.join("1.2")
    buffer = bytearray(b"........")
    for _ in range(4):
        one.sendto(b"12345", scene.address("1.2"))
    assert two.recv_into(buffer) == 5
    assert buffer == b"12345..."
    assert two.recvfrom_into(memoryview(buffer)[4:], 2) == (2, scene.address("1.1"))
    assert buffer == b"123412.."
    assert two.recv_into(bytearray(2), 0, socket.MSG_TRUNC) == 5
    for wrong in (-1, 9):
        with pytest.raises(afbus.InvalidArgument):
            two.recv_into(buffer, wrong)
    assert two.recv(9) == b"12345"
    for wrong in (-1,):
        with pytest.raises(afbus.InvalidArgument):
            two.recv(wrong)


# batches


def test_r22_batches(scene: Scene) -> None:
    """One call takes as many messages as are there, at most as many as asked for."""
    one, two = scene.join("1.1", "name"), scene.join("1.2")
    bodies = [b"%d" % number for number in range(10)]
    assert one.sendmmsg(bodies, scene.address("1.2")) == 10
    got = two.recvmmsg(4, 99)
    assert got == [(body, [], 0, scene.address("1.1")) for body in bodies[:4]]
    assert [message[0] for message in two.recvmmsg(99, 99)] == bodies[4:]
    with pytest.raises(BlockingIOError):
        two.recvmmsg(99, 99, 0, socket.MSG_DONTWAIT)
    with pytest.raises(afbus.InvalidArgument):
        two.recvmmsg(0, 99)
    # Each message has its own flags, items and source.
    one.sendmsg([b"long"], [scene.source("name")], 0, scene.address("1.2"))
    one.sendmsg([b"s"], [scene.number(afbus.SCM_SERIAL, 1)], 0, scene.address("1.2"))
    first, second = two.recvmmsg(9, 2, 99)
    assert first == (b"lo", [], socket.MSG_TRUNC, scene.address("name"))
    assert second == (b"s", [scene.number(afbus.SCM_SERIAL, 1)], 0, scene.address("1.1"))


def test_r22_batch_to_many_addresses(scene: Scene) -> None:
    """One address for all, or one each; of one kind, and as many as there are messages."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two, three = scene.join("1.2"), scene.join("1.3", items=(scene.hears(Terms("a")),))
    addresses: list[Any] = [scene.address(name) for name in ("1.2", "1.3", "1.2")]
    assert one.sendmmsg([b"a", b"b", b"c"], addresses) == 3
    assert scene.read_all(two) == [b"a", b"c"]
    assert scene.read_all(three) == [b"b"]
    assert one.sendmmsg([b"t1", b"t2"], scene.multicast(), 0, [scene.terms("a.b")]) == 2
    assert scene.read_all(three) == [b"t1", b"t2"]
    mixed: list[Any] = [scene.address("1.2"), scene.multicast(EVERYTHING)]
    for wrong in (addresses, mixed):
        with pytest.raises(afbus.InvalidArgument):
            one.sendmmsg([b"a", b"b"], wrong)
    for item in (scene.number(afbus.SCM_SERIAL, 1), scene.owned("x")):
        with pytest.raises(afbus.InvalidArgument):
            one.sendmmsg([b"a"], scene.address("1.2"), 0, [item])
    assert scene.is_empty(two)


# loans


@pytest.mark.parametrize("size", [0, 5, 60_000, 200_000])
def test_r18_d13_loan_is_a_view(scene: Scene, size: int) -> None:
    """A loan shows the body where it lies, read-only, with everything else beside it."""
    one, two = scene.join("1.1"), scene.join("1.2")
    serial = scene.number(afbus.SCM_SERIAL, 5)
    body = os.urandom(size)
    one.sendmsg([body], [serial], 0, scene.address("1.2"))
    with two.recv_loan() as loan:
        assert (loan.address, loan.ancdata, loan.flags) == (scene.address("1.1"), [serial], 0)
        assert len(loan) == size
        with memoryview(loan) as view:
            assert view.readonly
            assert view == body
            with pytest.raises(BufferError):
                loan.release()
    loan.release()
    assert scene.is_empty(two)


@pytest.mark.parametrize("scene", ["total"], indirect=True)  # what fits into the one ring
def test_r18_d12_loan_holds_its_room(scene: Scene) -> None:
    """Until it is given back its room is taken; what comes behind it can be read meanwhile."""
    one, two = scene.join("1.1"), scene.join("1.2", rx_bytes=4096)
    one.sendto(b"1" * 900, scene.address("1.2"))
    one.sendto(b"2" * 900, scene.address("1.2"))
    first = two.recv_loan()
    second = two.recv_loan()
    assert bytes(memoryview(second)) == b"2" * 900
    second.release()
    with pytest.raises(BlockingIOError):
        scene.master.sendto(bytes(2500), socket.MSG_DONTWAIT, scene.address("1.2"))
    assert bytes(memoryview(first)) == b"1" * 900
    first.release()
    one.sendto(bytes(2500), scene.address("1.2"))
    assert len(two.recv(9999)) == 2500


def test_r18_d15_loans_of_notices_and_gaps(scene: Scene) -> None:
    """What is no message of anybody comes as a loan like everything."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(EVERYTHING), scene.flags(1)), rx_bytes=4096)
    for _ in range(10):
        one.sendto(bytes(1000), scene.multicast(EVERYTHING))
    one.close()
    kinds = []
    while "notice" not in kinds:
        with two.recv_loan() as loan:
            if loan.address.is_kernel:
                assert afbus.Notice.decode(bytes(memoryview(loan))).event is afbus.Event.LEFT
                kinds.append("notice")
            else:
                is_gap = any(kind == afbus.SCM_GAP for _, kind, _ in loan.ancdata)
                kinds.append("gap" if is_gap else "message")
    assert kinds == [*["message"] * (len(kinds) - 2), "gap", "notice"]
    with pytest.raises(BlockingIOError):
        two.recv_loan(socket.MSG_DONTWAIT)


def test_r18_loan_outlives_its_socket(scene: Scene) -> None:
    """Closing the socket takes nothing away from who still reads."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.sendto(b"still here", scene.address("1.2"))
    loan = two.recv_loan()
    two.close()
    assert bytes(memoryview(loan)) == b"still here"
    loan.release()


# options


def test_d1_options_that_say_what_the_socket_is(scene: Scene) -> None:
    """Type, family and protocol, as an int or as the bytes of one."""
    one = scene.socket(tx_bytes=8192, rx_bytes=16384)
    assert (one.family, one.type, one.proto) == (afbus.AF_BUS, socket.SOCK_DGRAM, 0)
    for name, value in (
        (socket.SO_TYPE, socket.SOCK_DGRAM),
        (socket.SO_DOMAIN, afbus.AF_BUS),
        (socket.SO_PROTOCOL, 0),
        (socket.SO_ERROR, 0),
        (socket.SO_SNDBUF, 8192),
        (socket.SO_RCVBUF, 16384),
        (socket.SO_PASSCRED, 0),
    ):
        assert one.getsockopt(socket.SOL_SOCKET, name) == value
        assert one.getsockopt(socket.SOL_SOCKET, name, 4) == struct.pack("=i", value)


@pytest.mark.parametrize("form", [lambda n: n, lambda n: struct.pack("=i", n), bool], ids=repr)
def test_d17_options_that_can_be_set(scene: Scene, form: Callable[[int], Any]) -> None:
    """SO_PASSCRED and SO_BUS_DETAILS, as an int or as bytes in C."""
    one = scene.join("1.1")
    for level, name in (
        (socket.SOL_SOCKET, socket.SO_PASSCRED),
        (BUS_SOCKET, afbus.SO_BUS_DETAILS),
    ):
        for value in (1, 0, 1):
            one.setsockopt(level, name, form(value))
            assert one.getsockopt(level, name) == value


def test_d1_d16_options_of_the_bus(scene: Scene) -> None:
    """Addresses and master as structures, state and counters as msgpack; and all as values."""
    one = scene.join("1.1", "name")

    def get(name: int) -> bytes:
        found = one.getsockopt(BUS_SOCKET, name, 4096)
        assert isinstance(found, bytes)
        return found

    packed = get(afbus.SO_BUS_ADDRESSES)
    owned = [BusAddress.unpack(packed[at : at + 368]) for at in range(0, len(packed), 368)]
    assert owned == one.addresses() == [scene.address("1.1"), scene.address("name")]
    assert BusAddress.unpack(get(afbus.SO_BUS_MASTER)) == one.master() == scene.master_address
    state = codec.decode(get(afbus.SO_BUS_STATE))
    assert state == one.state()
    assert isinstance(state, dict)
    assert (state["agent"], state["master"], state["is_member"]) == ("here", "here", True)
    assert codec.decode(get(afbus.SO_BUS_STATS)) == one.stats()
    assert set(one.stats()) >= {"sent", "refused", "received", "missed", "rx_used", "waiting"}


def test_d7_options_that_cannot_be(scene: Scene) -> None:
    """Unknown, read-only, or a value that does not fit: EINVAL, and nothing changes."""
    one = scene.join("1.1")
    wrong: list[tuple[int, int, Any]] = [
        (socket.SOL_SOCKET, socket.SO_PASSCRED, 2),
        (socket.SOL_SOCKET, socket.SO_PASSCRED, b"\x01"),
        (socket.SOL_SOCKET, socket.SO_PASSCRED, None),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 4096),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, 4096),
        (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
        (BUS_SOCKET, afbus.SO_BUS_DETAILS, -1),
        (BUS_SOCKET, afbus.SO_BUS_ADDRESSES, 1),
        (BUS_SOCKET, afbus.SO_BUS_STATE, 1),
        (BUS_SOCKET, 99, 1),
        (socket.IPPROTO_IP, 1, 1),
    ]
    for level, name, value in wrong:
        with pytest.raises(afbus.InvalidArgument) as caught:
            one.setsockopt(level, name, value)
        assert caught.value.errno == errno.EINVAL
    for level, name, size in (
        (BUS_SOCKET, 99, 0),
        (BUS_SOCKET, afbus.SO_BUS_FILTER, 99),
        (socket.SOL_SOCKET, socket.SO_REUSEADDR, 0),
        (BUS_SOCKET, afbus.SO_BUS_ADDRESSES, 10),
        (socket.SOL_SOCKET, socket.SO_TYPE, 2),
    ):
        with pytest.raises(afbus.InvalidArgument):
            one.getsockopt(level, name, size)
    assert one.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 0


def test_r18_d13_ring_sizes(scene: Scene) -> None:
    """Chosen at creation, powers of two from 4 KiB to 64 MiB; anything else is EINVAL."""
    for size in (4096, 1 << 26):
        with scene.socket(tx_bytes=4096, rx_bytes=size) as one:
            one.bind((f"{scene.path}{size}", "me"))
            one.sendto(bytes(2000), (f"{scene.path}{size}", "me"))
            assert len(one.recv(9999)) == 2000
    for size in (0, 4095, 2048, 5000, 1 << 27, -4096):
        for name in ("tx_bytes", "rx_bytes"):
            with pytest.raises(afbus.InvalidArgument, match=name):
                scene.socket(**{name: size})


def test_d14_largest_inline_body_in_a_small_sending_ring(scene: Scene) -> None:
    """What does not fit into the sender's ring travels in a memfd, or is told to be too big."""
    one = scene.socket(tx_bytes=4096)
    one.sendto(b"AUTH", scene.master_address)
    scene.let_in("1.1")
    assert one.recv(9) == b"welcome"
    for size in (3000, 5000, 60_000, 1 << 20):
        one.sendto(b"x" * size, scene.master_address)
        assert scene.master.recv(1 << 24) == b"x" * size


def test_d16_repr_and_name_of_a_socket(scene: Scene) -> None:
    """A person sees which endpoint it is, on which bus; unbound it has no name yet."""
    one = scene.socket()
    with pytest.raises(afbus.NotJoined):
        one.getsockname()
    one.attach(scene.path)
    assert one.path == scene.path.encode()
    assert one.getsockname().is_provisional
    assert scene.path in repr(one)
    one.close()
    assert "closed" in repr(one)
