"""A socket that is connected to an address, and the native `send` and `recv`."""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

import afbus
from afbus import BusAddress

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import NodeProcess, Scene

pytestmark = pytest.mark.cluster


def test_connected_socket_sends_to_its_peer(scene: Scene) -> None:
    """`connect`, `send` and `getpeername` are those of a datagram socket."""
    one, two = scene.join("1.1"), scene.join("1.2")
    with pytest.raises(afbus.BadDestination) as caught:
        one.send(b"x")
    assert caught.value.errno == errno.EDESTADDRREQ
    with pytest.raises(OSError, match="not connected") as unnamed:
        one.getpeername()
    assert unnamed.value.errno == errno.ENOTCONN
    one.connect(f"{scene.path}:1.2")
    assert one.getpeername() == scene.address("1.2")
    for body in (b"bytes", bytearray(b"array"), memoryview(array.array("i", (1, 2)))):
        assert one.send(body) == memoryview(body).nbytes
        assert two.recvfrom(99) == (bytes(body), scene.address("1.1"))
    # An address beside the message goes before, as of any datagram socket.
    one.connect(scene.master_address)
    one.sendto(b"named", scene.address("1.2"))
    one.sendmsg([b"named"], (), 0, scene.address("1.2"))
    assert [two.recv(9), two.recv(9)] == [b"named"] * 2
    one.connect(None)
    with pytest.raises(afbus.BadDestination):
        one.send(b"x")
    with pytest.raises(OSError, match="not connected"):
        one.getpeername()


def test_all_calls_of_a_connected_socket(scene: Scene) -> None:
    """Whatever bears no address goes to the peer, in one order."""
    one, two = scene.join("1.1", "name"), scene.join("1.2")
    one.connect(scene.address("1.2"))
    sent = 0
    for _ in range(50):
        assert one.send(b"%d" % sent) == len(b"%d" % sent)
        assert one.sendmsg([b"%d" % (sent + 1)]) > 0
        assert one.sendmmsg([b"%d" % (sent + 2), b"%d" % (sent + 3)]) == 2
        one.sendmsg([b"%d" % (sent + 4)], [scene.source("name")])
        sent += 5
    assert [two.recv(9) for _ in range(sent)] == [b"%d" % n for n in range(sent)]
    one.connect(None)
    calls: list[Callable[[], Any]] = [lambda: one.sendmsg([b"x"]), lambda: one.sendmmsg([b"x"])]
    for call in calls:
        with pytest.raises(afbus.BadDestination):
            call()


def test_where_nobody_can_be_connected_to(scene: Scene) -> None:
    """Refused at `connect`: what can never be sent to. Everything else at `send` (D7)."""
    one = scene.join("1.1")
    for address, kind in (
        (scene.kernel, afbus.BadDestination),
        (scene.multicast(), afbus.BadDestination),
        (BusAddress(scene.path + "x", "1.1"), afbus.NoSuchEndpoint),
        (7, afbus.InvalidArgument),
    ):
        with pytest.raises(kind):
            one.connect(address)  # type: ignore[arg-type]  # what is tested
    fresh = scene.socket()
    with pytest.raises(afbus.NoBus):
        fresh.connect((scene.path + "x", "1.1"))
    one.connect(scene.address("@4000000"))
    with pytest.raises(afbus.NoSuchEndpoint):
        one.send(b"x")
    # Whoever owns it when it is sent gets it.
    one.connect(scene.address("late"))
    late = scene.join("late")
    one.send(b"x")
    assert late.recv(9) == b"x"


def test_d8_connected_to_a_multicast_address(scene: Scene) -> None:
    """With bits in it, it is a destination as any other."""
    one = scene.join("1.1", items=(scene.may_send(bytes(64)),))
    two = scene.join("1.2", items=(scene.hears(bytes(64)),))
    one.connect(scene.multicast(bytes(64)))
    for n in range(3):
        one.send(b"%d" % n)
    assert [two.recv(9) for _ in range(3)] == [b"0", b"1", b"2"]


def test_d7_verdicts_of_send(scene: Scene) -> None:
    """Room, time, size, half-close: as of every other call that sends."""
    one, two = scene.join("1.1"), scene.join("1.2", rx_bytes=4096)
    one.connect(scene.address("1.2"))
    sent = scene.fill(one, scene.address("1.2"))
    with pytest.raises(BlockingIOError):
        one.send(bytes(500), socket.MSG_DONTWAIT)
    one.settimeout(0.01)
    with pytest.raises(TimeoutError):
        one.send(bytes(500))
    one.setblocking(False)
    with pytest.raises(BlockingIOError):
        one.send(bytes(500))
    assert [int(two.recv(500)) for _ in range(sent)] == list(range(sent))
    with pytest.raises(afbus.TooBig):
        one.send(bytes(5000))
    with pytest.raises(afbus.InvalidArgument):
        one.send(b"x", socket.MSG_OOB)
    with pytest.raises(TypeError):
        one.send("text")  # type: ignore[arg-type]  # what is tested
    one.shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenPipeError):
        one.send(b"x")


def test_d14_bodies_of_all_sizes_by_send(scene: Scene) -> None:
    """What does not fit into a lane or a ring finds its way, and the order is kept (D11)."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.connect(scene.address("1.2"))
    sizes = [0, 1, 64, 4096, 65536, 65537, 1 << 20] * 2
    for size in sizes:
        assert one.send(bytes([size % 251]) * size, socket.MSG_DONTWAIT) == size
    for size in sizes:
        assert two.recv(1 << 24) == bytes([size % 251]) * size


def test_recv_of_what_is_not_plain(scene: Scene) -> None:
    """Cut bodies, descriptors, notices, gaps, flags: as `recvmsg` has them."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.connect(scene.address("1.2"))
    one.send(b"first")
    read, write = os.pipe()
    one.sendmsg([b"second"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))])
    os.close(write)
    one.send(b"third")
    one.send(b"fourth")
    assert two.recv(9, socket.MSG_PEEK) == b"first"
    assert two.recv(2) == b"fi"
    assert two.recv(9) == b"second"
    assert os.read(read, 1) == b"", "the descriptor that nobody took is closed"
    os.close(read)
    assert two.recv(2, socket.MSG_TRUNC) == b"third"
    assert two.recv(0) == b""
    with pytest.raises(BlockingIOError):
        two.recv(9, socket.MSG_DONTWAIT)
    two.settimeout(0.01)
    with pytest.raises(TimeoutError):
        two.recv(9)
    with pytest.raises(afbus.InvalidArgument):
        two.recv(-1)
    with pytest.raises(afbus.InvalidArgument):
        two.recv(9, socket.MSG_OOB)
    one.send(b"last")
    two.shutdown(socket.SHUT_RD)
    assert [two.recv(9), two.recv(9)] == [b"last", b""]


def test_d20_send_and_recv_on_a_closed_socket(scene: Scene) -> None:
    """EBADF, also for a call that waits in another thread."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.connect(scene.address("1.2"))
    one.send(b"x")
    met: list[int | None] = []

    def wait() -> None:
        try:
            while two.recv(9) == b"x":
                pass
        except OSError as error:
            met.append(error.errno)

    waiting = threading.Thread(target=wait)
    waiting.start()
    one.send(b"x")
    two.close()
    waiting.join(30)
    assert met == [errno.EBADF]
    one.close()
    calls: list[Callable[[], Any]] = [
        lambda: one.send(b"x"),
        lambda: one.recv(9),
        lambda: one.connect(scene.address("1.2")),
        lambda: one.connect(None),
        one.getpeername,
    ]
    for call in calls:
        with pytest.raises(OSError, match="closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_signal_ends_a_recv_that_waits(scene: Scene) -> None:
    """What the code of a signal raises comes out of the call, and nothing is lost by it."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.connect(scene.address("1.2"))

    class RangError(Exception):
        pass

    def ring(*_: object) -> None:
        raise RangError

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(RangError):
            two.recv(9)
    finally:
        signal.signal(signal.SIGALRM, before)
    one.send(b"x")
    assert two.recv(9) == b"x"


def test_two_threads_send_and_two_receive(scene: Scene) -> None:
    """Nothing is lost or doubled when threads share connected sockets."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.connect(scene.address("1.2"))
    each, got = 3000, []

    def send(first: int) -> None:
        for n in range(first, first + each):
            one.send(b"%d" % n)

    def receive() -> None:
        while (body := two.recv(9)) != b"end":
            got.append(int(body))

    senders = [threading.Thread(target=send, args=(n * each,)) for n in range(2)]
    readers = [threading.Thread(target=receive) for _ in range(2)]
    for thread in (*senders, *readers):
        thread.start()
    for thread in senders:
        thread.join(60)
    for _ in readers:
        one.send(b"end")
    for thread in readers:
        thread.join(60)
    assert sorted(got) == list(range(2 * each))


def test_d16_connected_socket_outlives_its_agent(
    make_node: Callable[..., NodeProcess], make_scene: Callable[..., Scene]
) -> None:
    """The end of the agent is told once; then `send` and `recv` use the rings of the next one."""
    node = make_node()
    scene = make_scene(node, order="fifo")
    one = scene.join("1.1")
    one.connect(scene.master_address)
    for _ in range(3):
        one.send(b"old")
    node.kill()
    assert [scene.master.recv(9) for _ in range(3)] == [b"old"] * 3
    with pytest.raises(afbus.NotConnected):
        scene.master.recv(9)
    # Whether a message arrived that met the end is not known (D21); the next one is told of it.
    met: list[int | None] = []
    while errno.ENOTCONN not in met:
        with pytest.raises((afbus.OutcomeUnknown, afbus.NotConnected)) as caught:
            one.send(b"lost")
        met.append(caught.value.errno)
    assert met in ([errno.ENOTCONN], [errno.ECONNABORTED, errno.ENOTCONN])
    node.start()
    # The master first: it is he who brings the bus back.
    notices = [scene.read_notice(scene.master)]
    assert one.getpeername() == scene.master_address
    for body in (b"new", b"newer"):
        assert one.send(body) == len(body)
    bodies = []
    while b"newer" not in bodies:
        body, source = scene.master.recvfrom(8192)
        if source.is_kernel:
            notices.append(afbus.Notice.decode(body))
        else:
            bodies.append(body)
    assert bodies == [b"new", b"newer"]
    assert notices[0].event is afbus.Event.GAP
    one.send(b"newest")
    assert scene.master.recv(9) == b"newest"
