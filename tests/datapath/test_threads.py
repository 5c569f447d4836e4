"""Several threads, signals and polling on one end."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import threading
from typing import TYPE_CHECKING

import pytest
from tests.datapath.world import KIB, fill, is_readable, send, take

from afbus._datapath import UNICAST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.datapath.puppet import Puppet
    from tests.datapath.world import World


@contextlib.contextmanager
def on_signal(action: Callable[[], object], when: Callable[[], object]) -> Iterator[None]:
    """Let an action run in the main thread, as the handler of a signal that comes after `when`."""
    main = threading.get_ident()

    def interrupt() -> None:
        when()
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: action())
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def refusal(world: World) -> Callable[[], None]:
    """Return a wait for the next message of 1.1 that is refused."""
    before = world.switch.stats(1)["refused"]

    def wait() -> None:
        while world.switch.stats(1)["refused"] == before:
            os.sched_yield()

    return wait


def test_d20_a_signal_may_close_what_it_interrupts(world: World, puppet: Puppet) -> None:
    """Every wait ends, although it is the waiting thread that closes."""
    one, two = world.join(), world.join(rx_bytes=4 * KIB)
    fill(one, b"1.2")
    with on_signal(one.close, refusal(world)):
        assert send(one, b"1.2", bytes(1000), timeout=None) == -errno.EBADF
    take(two, 99)
    with on_signal(two.close, lambda: None):
        assert two.recv(1, 1, 0, False, None) == -errno.EBADF
    with on_signal(puppet.rings.close, lambda: puppet.await_records(1)):
        assert puppet.send(b"x", timeout=None) == -errno.ECONNABORTED
    assert puppet.send(b"x", timeout=None) == -errno.EBADF


def test_r10_a_signal_may_send_while_a_send_waits_for_room(world: World) -> None:
    """And make that room."""
    one, two, three = world.join(), world.join(rx_bytes=4 * KIB), world.join()
    fill(one, b"1.2")
    results: list[int] = []

    def handle() -> None:
        results.append(send(one, b"1.3", b"from the handler"))
        take(two, 9)

    with on_signal(handle, refusal(world)):
        assert send(one, b"1.2", bytes(1000)) == 0
    assert results == [0]
    assert take(three)[0][0] == b"from the handler"


def test_r10_a_signal_cannot_wait_for_itself(puppet: Puppet) -> None:
    """What only the interrupted call could give is an error, not a wait without end."""
    with (
        on_signal(lambda: puppet.send(b"y", timeout=None), lambda: puppet.await_records(1)),
        pytest.raises(RuntimeError, match="reentrant"),
    ):
        puppet.send(b"x", timeout=None)


def test_r10_who_names_a_source_cannot_receive(world: World) -> None:
    """What is called in the midst of a call is told that it is."""
    one = world.join()

    def name(source: bytes, _is_kernel: bool) -> bytes:
        with pytest.raises(RuntimeError, match="reentrant"):
            two.recv(1, 9, 0, False, None)
        return source

    two = world.join(address=name)
    assert send(one, b"1.2", b"x") == 0
    assert take(two) == [(b"x", [], 0, b"1.1")]


def test_d12_one_thread_that_waits_for_room_does_not_keep_others(world: World) -> None:
    """They send to others meanwhile."""
    one, two, three = world.join(), world.join(rx_bytes=4 * KIB), world.join()
    unread = fill(one, b"1.2") + 3
    results: list[object] = []
    bodies = [bytes(1000), bytes(1000)]
    waits = [
        threading.Thread(target=lambda: results.append(send(one, b"1.2", bytes(1000)))),
        threading.Thread(
            target=lambda: results.append(one.send_many(UNICAST, b"1.2", b"", bodies, 0, 10))
        ),
    ]
    for thread in waits:
        is_waiting = refusal(world)
        thread.start()
        is_waiting()
    assert send(one, b"1.3", b"x", timeout=10) == 0
    assert take(three)[0][0] == b"x"
    while unread:
        unread -= len(take(two, 9))
    for thread in waits:
        thread.join()
    assert sorted(results, key=str) == [(2, 0), 0]


def test_d20_closing_ends_sends_that_wait(world: World, puppet: Puppet) -> None:
    """For room: nothing was sent. For a verdict: nobody knows."""
    one = world.join()
    world.join(rx_bytes=4 * KIB)
    fill(one, b"1.2")
    results: list[int] = []
    is_waiting = refusal(world)
    waits = threading.Thread(
        target=lambda: results.append(send(one, b"1.2", bytes(1000), timeout=None))
    )
    waits.start()
    is_waiting()
    # As the owner of the line closes it: whoever waits must not take up what gets its number next.
    one.close()
    line = world.lines[one]
    os.dup2(os.open(os.devnull, os.O_RDWR), line)
    waits.join()
    waits = threading.Thread(target=lambda: results.append(puppet.send(b"x", timeout=None)))
    waits.start()
    puppet.await_records(1)
    puppet.rings.close()
    waits.join()
    assert results == [-errno.EBADF, -errno.ECONNABORTED]


def test_d16_polling_may_begin_while_another_thread_receives(world: World) -> None:
    """What that thread leaves in the ring makes the line readable."""
    one, made = world.join(), threading.Event()

    def name(source: bytes, _is_kernel: bool) -> bytes:
        # Called in the midst of receiving.
        poller = threading.Thread(target=two.set_pollable)
        poller.start()
        poller.join()
        made.set()
        return source

    two = world.join(address=name)
    assert send(one, b"1.2", b"a") == 0
    assert send(one, b"1.2", b"b") == 0
    assert [data for data, *_ in take(two)] == [b"a"]
    assert made.is_set()
    assert is_readable(world.lines[two], 10)


def test_d16_a_polled_line_wakes_although_its_own_sender_is_blocked(world: World) -> None:
    """However much the reader says on the line, behind the padding of the sender."""
    one, two, three = world.join(), world.join(), world.join(rx_bytes=4 * KIB)
    two.set_pollable()
    fill(two, b"1.3")
    with open(os.devnull, "rb") as file:
        for _ in range(20):
            for _ in range(50):
                assert send(one, b"1.2", b"x", fds=(file.fileno(),), timeout=0) == 0
            for left in range(50):
                assert is_readable(world.lines[two], 10), f"silent with {50 - left} messages left"
                assert two.recv(1, 9, 0, False, 0) == [(b"x", [], socket.MSG_CTRUNC, b"1.1")]
    take(three, 9)
    out = select.poll()
    out.register(world.lines[two], select.POLLOUT)
    assert out.poll(10_000)
    assert send(two, b"1.3", bytes(1000), timeout=0) == 0
