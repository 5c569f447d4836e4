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

from tests.datapath.world import KIB, fill, is_readable, send, take

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.datapath.puppet import Puppet
    from tests.datapath.world import World


@contextlib.contextmanager
def on_signal(action: Callable[[], object]) -> Iterator[None]:
    """Let an action run in the main thread soon, as the handler of a signal."""
    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, lambda *_: action())
    timer = threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGUSR1))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_d20_a_signal_may_close_what_it_interrupts(world: World, puppet: Puppet) -> None:
    """Every wait ends, although it is the waiting thread that closes."""
    one, two = world.join(), world.join(rx_bytes=4 * KIB)
    with on_signal(two.close):
        assert two.recv(1, 1, 0, False, None) == -errno.EBADF
    world.join(rx_bytes=4 * KIB)
    fill(one, b"1.3")
    with on_signal(one.close):
        assert send(one, b"1.3", bytes(1000), timeout=None) == -errno.EBADF
    with on_signal(puppet.rings.close):
        assert puppet.send(b"x", timeout=None) == -errno.ECONNABORTED
    assert puppet.send(b"x", timeout=None) == -errno.EBADF


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
