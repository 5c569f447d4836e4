"""Many messages in one call: `recv_many`, and `sendmmsg` to where the socket is connected."""

from __future__ import annotations

import array
import os
import random
import select
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import Gap, Overflow

if TYPE_CHECKING:
    from tests.bus.conftest import Scene

    from afbus import BusAddress, Socket

pytestmark = pytest.mark.cluster


def test_recv_many_is_recvfrom_again_and_again(scene: Scene) -> None:
    """It returns what is there of one source, at most `count`, and waits for the first alone."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.connect(scene.address("1.2"))
    bodies = [b"%d" % n for n in range(300)]
    for place in range(0, 300, 100):
        assert one.sendmmsg(bodies[place : place + 100]) == 100
    got: list[bytes] = []
    while len(got) < 300:
        some, source = two.recv_many(70, 9)
        assert 1 <= len(some) <= 70
        assert source == scene.address("1.1")
        got += some
    assert got == bodies
    with pytest.raises(BlockingIOError):
        two.recv_many(70, 9, socket.MSG_DONTWAIT)
    two.settimeout(0.01)
    with pytest.raises(TimeoutError):
        two.recv_many(70, 9)
    two.settimeout(20)
    one.sendmmsg([b"first", b"second"])
    assert two.recv_many(1, 9) == ([b"first"], source)
    assert two.recv_many(9, 3) == ([b"sec"], source)
    waiting = threading.Timer(0.01, one.send, (b"late",))
    waiting.start()
    assert two.recv_many(9, 9) == ([b"late"], source)
    waiting.join(30)


def test_recv_many_ends_where_the_source_changes(scene: Scene) -> None:
    """Each call has one source, and the messages of each come in their order."""
    reader = scene.join("reader")
    senders = [scene.join(f"1.{n}") for n in range(3)]
    draw = random.Random(3)
    want: dict[BusAddress, deque[bytes]] = {}
    for n in range(400):
        sender = draw.randrange(3)
        senders[sender].sendto(b"%d" % n, scene.address("reader"))
        want.setdefault(scene.address(f"1.{sender}"), deque()).append(b"%d" % n)
    left = 400
    while left:
        some, source = reader.recv_many(draw.randint(1, 64), 9)
        for body in some:
            assert want[source].popleft() == body
        left -= len(some)
    assert scene.is_empty(reader)


def test_d11_recv_many_between_two_sources_of_one_sender(scene: Scene) -> None:
    """What one endpoint sends from two addresses is in its order, however many calls it takes."""
    one, two = scene.join("1.1", "name"), scene.join("1.2")
    for n in range(120):
        chosen = [scene.source("name")] if n % 5 == 4 else []
        one.sendmsg([b"%d" % n], chosen, 0, scene.address("1.2"))
    got: list[tuple[BusAddress, bytes]] = []
    while len(got) < 120:
        some, source = two.recv_many(64, 9)
        got += [(source, body) for body in some]
    names = scene.address("1.1"), scene.address("name")
    assert got == [(names[n % 5 == 4], b"%d" % n) for n in range(120)]


def test_d11_recv_many_of_unicasts_and_multicasts(scene: Scene) -> None:
    """Of one source, by any way: one order."""
    one = scene.join("1.1", items=(scene.may_send(bytes(64)),))
    two = scene.join("1.2", items=(scene.hears(bytes(64)),))
    for n in range(60):
        to = scene.multicast(bytes(64)) if n % 7 == 3 else scene.address("1.2")
        one.sendto(b"%d" % n, to)
    got: list[bytes] = []
    while len(got) < 60:
        some, source = two.recv_many(64, 9)
        assert source == scene.address("1.1")
        got += some
    assert got == [b"%d" % n for n in range(60)]


def test_recv_many_ends_before_what_is_not_plain(scene: Scene) -> None:
    """Descriptors, large bodies and notices take a call of their own, and lose nothing."""
    one, two = scene.join("1.1"), scene.join("1.2")
    there = scene.address("1.2")
    read, write = os.pipe()
    one.sendmmsg([b"1", b"2"], there)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))
    one.sendmsg([b"3"], [rights], 0, there)
    os.close(write)
    one.sendto(bytes(100_000), there)
    one.sendmmsg([b"5", b"6"], there)
    got: list[list[bytes]] = []
    while sum(map(len, got)) < 6:
        got.append(two.recv_many(64, 1 << 20)[0])
    assert [body for some in got for body in some] == [
        b"1", b"2", b"3", bytes(100_000), b"5", b"6",
    ]  # fmt: skip
    assert [b"3"] in got
    assert os.read(read, 1) == b"", "the descriptor that nobody took is closed"
    os.close(read)
    # A notice has the kernel as its source.
    two.sendmmsg([b"a", b"b"], scene.master_address)
    two.close()
    bodies: list[bytes] = []
    notices = 0
    while len(bodies) < 2 or not notices:
        some, source = scene.master.recv_many(64, 8192)
        if source.is_kernel:
            notices += len(some)
        else:
            bodies += some
    assert bodies == [b"a", b"b"]


def test_d12_recv_many_never_passes_over_a_gap(scene: Scene) -> None:
    """What was lost is told by the call that would be next, as `recv` tells it."""
    one = scene.join("1.1", items=(scene.may_send(bytes(64)),))
    small = scene.join(
        "1.2", items=(scene.hears(bytes(64), Overflow.GAP),), rx_bytes=4096
    )  # fmt: skip
    for n in range(100):
        one.sendto(b"%500d" % n, scene.multicast(bytes(64)))
    got: list[int] = []

    def read_to_the_gap() -> None:
        while True:
            got.extend(map(int, small.recv_many(64, 500)[0]))

    with pytest.raises(afbus.MessagesLost) as caught:
        read_to_the_gap()
    assert got == list(range(len(got)))
    assert isinstance(caught.value.gap, Gap)
    assert caught.value.gap.count > 0


def test_recv_many_refuses_what_recv_refuses(scene: Scene) -> None:
    """Counts, sizes and flags; after SHUT_RD there is nothing, at once."""
    one, two = scene.join("1.1"), scene.join("1.2")
    for count, size, flags in ((0, 9, 0), (1, -1, 0), (1, 9, socket.MSG_OOB)):
        with pytest.raises(afbus.InvalidArgument):
            two.recv_many(count, size, flags)
    one.sendmmsg([b"1", b"2"], scene.address("1.2"))
    assert two.recv_many(9, 9, socket.MSG_PEEK)[0] == [b"1"]
    assert two.recv_many(9, 1, socket.MSG_TRUNC)[0] == [b"1"]
    two.shutdown(socket.SHUT_RD)
    assert two.recv_many(9, 9)[0] == [b"2"]
    assert two.recv_many(9, 9)[0] == [b""]
    two.close()
    with pytest.raises(OSError, match="closed"):
        two.recv_many(9, 9)


def test_recv_many_of_a_polled_socket(scene: Scene) -> None:
    """The descriptor is readable as long as something is left."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.connect(scene.address("1.2"))

    poller = select.poll()
    poller.register(two, select.POLLIN)
    sent = got = 0
    for n in range(1, 30):
        assert one.sendmmsg([b"x"] * n) == n
        sent += n
        while got < sent:
            assert poller.poll(20_000)
            got += len(two.recv_many(7, 9)[0])
    with pytest.raises(BlockingIOError):
        two.recv_many(9, 9, socket.MSG_DONTWAIT)
    assert not poller.poll(0)


@pytest.mark.parametrize("kind", [list, tuple, deque])
def test_sendmmsg_takes_any_row_of_buffers(scene: Scene, kind: type) -> None:
    """Bytes alone, and among other buffers; what is none is refused before any is sent."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.connect(scene.address("1.2"))

    def exchange(*bodies: bytes | bytearray | memoryview) -> None:
        assert one.sendmmsg(kind(bodies)) == len(bodies)
        assert read_all(two, len(bodies)) == [bytes(body) for body in bodies]

    exchange(*(b"%d" % n for n in range(100)))
    exchange(b"bytes", bytearray(b"array"), memoryview(b"a view")[2:], b"")
    exchange(b"", bytes(70_000), b"small", bytes(1 << 20))
    with pytest.raises(TypeError):
        one.sendmmsg(kind([b"fine", "text"]))
    with pytest.raises(TypeError):
        one.sendmmsg(None)  # type: ignore[arg-type]  # what is tested
    assert scene.is_empty(two)


def read_all(who: Socket, count: int) -> list[bytes]:
    """The next bodies, so many."""
    bodies: list[bytes] = []
    while len(bodies) < count:
        bodies += who.recv_many(count, 1 << 24)[0]
    return bodies
