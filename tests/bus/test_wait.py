"""Waiting for a socket: timeouts, signals, select, poll, epoll, event loops, threads."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import selectors
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import Overflow

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import NodeProcess, Scene

    from afbus import Socket

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)
WAIT_S = 20


def by_select(number: int, timeout: float) -> bool:
    """Whether a descriptor is readable, by select(2)."""
    return number in select.select([number], [], [], timeout)[0]


def by_poll(number: int, timeout: float) -> bool:
    """The same by poll(2)."""
    poller = select.poll()
    poller.register(number, select.POLLIN)
    return poller.poll(timeout * 1000) == [(number, select.POLLIN)]


def by_epoll(number: int, timeout: float) -> bool:
    """The same by epoll(7)."""
    with select.epoll() as poller:
        poller.register(number, select.EPOLLIN)
        return poller.poll(timeout) == [(number, select.EPOLLIN)]


def by_selector(number: int, timeout: float) -> bool:
    """The same by Python's own choice."""
    with selectors.DefaultSelector() as selector:
        selector.register(number, selectors.EVENT_READ)
        return len(selector.select(timeout)) == 1


@pytest.mark.parametrize("is_readable", [by_select, by_poll, by_epoll, by_selector])
def test_d16_readable_while_there_is_something(
    scene: Scene, is_readable: Callable[[int, float], bool]
) -> None:
    """Readable as long as anything is unread: a message, a notice, a gap; and not otherwise."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(EVERYTHING), scene.flags(1)), rx_bytes=4096)
    number = two.fileno()
    assert number == two.fileno() >= 0
    assert not is_readable(number, 0)
    for _ in range(3):
        one.sendto(b"a", scene.address("1.2"))
        one.sendto(b"b", scene.address("1.2"))
        for body in (b"a", b"b"):
            assert is_readable(number, WAIT_S)
            assert two.recv(9, socket.MSG_PEEK) == body
            assert is_readable(number, WAIT_S)
            assert two.recv(9) == body
        with pytest.raises(BlockingIOError):
            two.recv(9, socket.MSG_DONTWAIT)
        assert not is_readable(number, 0)
    scene.join("1.3")
    assert is_readable(number, WAIT_S)
    assert scene.read_notice(two).event is afbus.Event.JOINED
    for _ in range(10):
        one.sendto(bytes(1000), scene.multicast(EVERYTHING))
    found: dict[int, bytes] = {}
    while afbus.SCM_GAP not in found:
        assert is_readable(number, WAIT_S)
        _, found, _, _ = scene.read(two)
    # Whoever polls without trying first may be woken once for nothing.
    with pytest.raises(BlockingIOError):
        two.recv(9, socket.MSG_DONTWAIT)
    assert not is_readable(number, 0)


def test_d16_message_before_the_first_poll(scene: Scene) -> None:
    """A socket that is polled for the first time is readable if something came before."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.sendto(b"x", scene.address("1.2"))
    assert by_poll(two.fileno(), WAIT_S)
    assert two.recv(9) == b"x"


def test_r22_poll_wakes_a_sleeper(scene: Scene) -> None:
    """A process that sleeps in poll is woken by a message, each time anew."""
    process = scene.start(
        """
import select
one.sendto(b"AUTH", master)
one.recv(9)
poller = select.poll()
poller.register(one.fileno(), select.POLLIN)
one.setblocking(False)
total = 0
while total < 500:
    poller.poll()
    try:
        while True:
            body, source = one.recvfrom(99)
            total += 1
            one.sendto(body, source)
    except BlockingIOError:
        pass
"""
    )
    one = scene.join("1.1")
    scene.let_in("1.2")
    for number in range(500):
        one.sendto(b"%d" % number, scene.address("1.2"))
        assert one.recvfrom(99) == (b"%d" % number, scene.address("1.2"))
    assert process.wait() == 0


def test_d16_many_sockets_in_one_epoll(scene: Scene) -> None:
    """Each message makes exactly its receiver readable."""
    one = scene.join("1.0")
    members = [scene.join(f"1.{number}") for number in range(1, 21)]
    by_number = {member.fileno(): place for place, member in enumerate(members, 1)}
    with select.epoll() as poller:
        for number in by_number:
            poller.register(number, select.EPOLLIN)
        for place in (3, 17, 5, 20, 1):
            one.sendto(b"x", scene.address(f"1.{place}"))
            ((number, _),) = poller.poll(WAIT_S)
            assert by_number[number] == place
            assert members[place - 1].recv(9) == b"x"
            with pytest.raises(BlockingIOError):
                members[place - 1].recv(9, socket.MSG_DONTWAIT)
            assert poller.poll(0) == []


async def test_d16_descriptor_in_an_event_loop(scene: Scene) -> None:
    """`add_reader` and `add_writer` work as with any socket."""
    one, two = scene.join("1.1"), scene.join("1.2", rx_bytes=4096)
    for member in (one, two):
        member.setblocking(False)
    loop = asyncio.get_running_loop()
    count = 300
    heard: list[int] = []
    unsent = list(range(count))
    done = loop.create_future()

    def read() -> None:
        try:
            while True:
                heard.append(int(two.recv(999)))
        except BlockingIOError:
            if len(heard) == count:
                done.set_result(None)

    def write() -> None:
        try:
            while unsent:
                one.sendto(b"%200d" % unsent[0], scene.address("1.2"))
                del unsent[0]
            loop.remove_writer(one.fileno())
        except BlockingIOError:
            pass

    loop.add_reader(two.fileno(), read)
    loop.add_writer(one.fileno(), write)
    await asyncio.wait_for(done, WAIT_S)
    loop.remove_reader(two.fileno())
    assert heard == list(range(count))


def test_d16_writable_again_for_multicasts(scene: Scene) -> None:
    """POLLOUT goes and comes for a subscriber that keeps senders waiting, too."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    blocks = scene.hears(EVERYTHING, Overflow.BLOCK, 60_000)
    two = scene.join("1.2", items=(blocks,), rx_bytes=4096)
    poller = select.poll()
    poller.register(one.fileno(), select.POLLOUT)
    scene.fill(one, scene.multicast(EVERYTHING), 1000)
    with pytest.raises(BlockingIOError):
        one.sendto(bytes(1000), socket.MSG_DONTWAIT, scene.multicast(EVERYTHING))
    assert poller.poll(0) == []
    scene.read_all(two)
    assert poller.poll(WAIT_S * 1000) == [(one.fileno(), select.POLLOUT)]
    one.sendto(bytes(1000), socket.MSG_DONTWAIT, scene.multicast(EVERYTHING))


# timeouts


def test_d7_timeouts_of_a_receiver(scene: Scene) -> None:
    """None waits without end, a number so long, 0 not at all; MSG_DONTWAIT never waits."""
    one = scene.join("1.1")
    one.settimeout(None)
    assert (one.gettimeout(), one.getblocking()) == (None, True)
    for flags in (socket.MSG_DONTWAIT, socket.MSG_DONTWAIT | socket.MSG_PEEK):
        with pytest.raises(BlockingIOError) as full:
            one.recv(9, flags)
        assert full.value.errno == errno.EAGAIN
    one.settimeout(0.01)
    assert (one.gettimeout(), one.getblocking()) == (0.01, True)
    calls: list[Callable[[], object]] = [
        lambda: one.recv(9),
        lambda: one.recvmmsg(5, 9),
        one.recv_loan,
        lambda: one.recv(9, socket.MSG_PEEK),
    ]
    for call in calls:
        with pytest.raises(TimeoutError) as late:
            call()
        assert late.value.errno == errno.ETIMEDOUT
    for is_by_flag in (False, True):
        if is_by_flag:
            one.setblocking(False)
        else:
            one.settimeout(0)
        assert (one.gettimeout(), one.getblocking()) == (0, False)
        with pytest.raises(BlockingIOError):
            one.recv(9)
        with pytest.raises(BlockingIOError):
            one.recv_loan()
    one.setblocking(True)
    assert one.gettimeout() is None
    for wrong in (-1, float("nan")):
        with pytest.raises(afbus.InvalidArgument):
            one.settimeout(wrong)


def test_d7_signals_interrupt_a_wait(scene: Scene) -> None:
    """A waiting call lets Python handle a signal: goes on, or ends with what that raises."""
    process = scene.start(
        """
one.sendto(b"AUTH", master)
one.recv(9)
signal.signal(signal.SIGUSR1, lambda *_: say("signal"))
say("ready")
say(one.recv(9).decode())
try:
    say("ready")
    one.recv(9)
except KeyboardInterrupt:
    say("interrupted")
"""
    )
    one = scene.join("1.1")
    scene.let_in("1.2")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    await_sleep(process.pid)
    os.kill(process.pid, signal.SIGUSR1)
    assert process.stdout.readline() == "signal\n"
    await_sleep(process.pid)
    one.sendto(b"x", scene.address("1.2"))
    assert process.stdout.readline() == "x\n"
    assert process.stdout.readline() == "ready\n"
    await_sleep(process.pid)
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate()[0] == "interrupted\n"


@pytest.mark.parametrize(
    "call",
    [
        "one.send(bytes(1000))",
        "one.sendmmsg([bytes(1000)] * 9)",
        "one.loan(60_000).send()",
        "one.recv_many(9, 9)",
        "one.recv_loan()",
    ],
)
def test_d7_control_c_ends_what_waits(scene: Scene, call: str) -> None:
    """KeyboardInterrupt comes out of sending to a full receiver, and of receiving nothing."""
    process = scene.start(
        f"""
one.sendto(b"AUTH", master)
one.recv(9)
one.settimeout(None)
one.connect((path, "1.1"))
try:
    say("ready")
    while True:
        {call}
except KeyboardInterrupt:
    say("interrupted")
"""
    )
    _receiver = scene.join("1.1")
    scene.let_in("1.2")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    await_sleep(process.pid)
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate()[0] == "interrupted\n"


def test_r22_without_looking_before_a_sleep(scene: Scene) -> None:
    """A process with AFBUS_SPIN=0 sends and receives as others do."""
    process = scene.start(
        """
one.sendto(b"AUTH", master)
one.recv(9)
one.connect((path, "1.1"))
while (body := one.recv(9)) != b"end":
    one.send(body)
""",
        env={**os.environ, "AFBUS_SPIN": "0"},
    )
    other = scene.join("1.1")
    scene.let_in("1.2")
    other.connect(scene.address("1.2"))
    for number in range(200):
        other.send(b"%d" % number)
        assert other.recv(9) == b"%d" % number
    other.send(b"end")
    assert process.wait(WAIT_S) == 0


def await_sleep(pid: int) -> None:
    """Wait until a process sleeps in the kernel, and not only between two looks."""
    stat, switches = Path(f"/proc/{pid}/stat"), Path(f"/proc/{pid}/status")
    before = ""
    while (now := switches.read_text()) != before or stat.read_text().rsplit(")")[-1][1] != "S":
        before = now


def test_d7_signal_before_the_sleep(scene: Scene) -> None:
    """A signal that comes when the call has begun and does not sleep yet is handled as well."""
    process = scene.start(
        """
one.sendto(b"AUTH", master)
one.recv(9)
signal.signal(signal.SIGUSR1, lambda *_: say("signal"))
one.settimeout(1)
for _ in range(3):
    say("ready")
    try:
        one.recv(9)
    except TimeoutError:
        say("late")
        sys.exit()
"""
    )
    one = scene.join("1.1")
    scene.let_in("1.2")
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGUSR1)
        assert process.stdout.readline() == "signal\n"
        one.sendto(b"x", scene.address("1.2"))
    assert process.wait() == 0


# threads


def test_d21_one_thread_sends_while_another_receives(scene: Scene) -> None:
    """Both directions of one socket at the same time, many messages deep."""
    one, two = scene.join("1.1", rx_bytes=1 << 16), scene.join("1.2", rx_bytes=1 << 16)
    count = 3000
    heard: dict[str, list[int]] = {"1.1": [], "1.2": []}

    def send(member: Socket, to: str) -> None:
        for number in range(count):
            member.sendto(b"%d" % number, scene.address(to))

    def receive(member: Socket, name: str) -> None:
        heard[name] += [int(member.recv(9)) for _ in range(count)]

    threads = [
        threading.Thread(target=send, args=(one, "1.2")),
        threading.Thread(target=send, args=(two, "1.1")),
        threading.Thread(target=receive, args=(one, "1.1")),
        threading.Thread(target=receive, args=(two, "1.2")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == {"1.1": list(range(count)), "1.2": list(range(count))}


def test_d16_readable_at_once_when_the_agent_is_gone(
    make_node: Callable[..., NodeProcess], make_scene: Callable[..., Scene]
) -> None:
    """Who sleeps in epoll is woken by the death of its agent, and by nothing of others."""
    scene = make_scene(make_node())
    one = scene.join("1.1")
    with select.epoll() as poller:
        poller.register(one.fileno(), select.EPOLLIN)
        assert poller.poll(0) == []
        scene.node.kill()
        ((_, events),) = poller.poll(WAIT_S)
        assert events & select.EPOLLHUP
    scene.node.start()
    with pytest.raises(afbus.NotConnected):
        one.recv(9)
    # The descriptor has the same number, and another line behind it.
    assert scene.read_notice(one).event is afbus.Event.GAP
    with select.epoll() as poller:
        poller.register(one.fileno(), select.EPOLLIN)
        one.sendto(b"x", scene.address("1.1"))
        ((_, events),) = poller.poll(WAIT_S)
        assert events == select.EPOLLIN
