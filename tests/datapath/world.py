"""A real switch with clients on it, all in this process."""

from __future__ import annotations

import errno
import os
import select
from typing import TYPE_CHECKING, Any

import pytest

from afbus._datapath import UNICAST, Rings, Switch

if TYPE_CHECKING:
    from collections.abc import Callable

    from afbus._datapath import Received

KIB = 1024
KEY = bytes(range(16))


#: For tests that count what fits into the ring itself.
ON_THE_SWITCH = pytest.mark.parametrize("world", ["switch"], indirect=True)


def name_source(source: bytes, is_kernel: bool) -> Any:
    """Stand for an address by what is known of it."""
    return "kernel" if is_kernel else source


def name_destination(dst: bytes, _kind: int) -> bytes:
    """Stand for a destination by its bytes."""
    return dst


class World:
    """A switch with one bus, and the clients that a test wants."""

    def __init__(self, has_lanes: bool = False) -> None:
        self.switch = Switch()
        self.switch.add_bus(1, 512, KEY)
        if has_lanes:
            self.switch.allow_lanes(1)
        self.count = 0
        self.rings: list[Rings] = []
        self.lines: dict[Rings, int] = {}

    def join(
        self,
        tx_bytes: int = 256 * KIB,
        rx_bytes: int = 1024 * KIB,
        address: Callable[[bytes, bool], Any] = name_source,
    ) -> Rings:
        """Return the client of a new endpoint that owns `1.N`, N counting from 1."""
        self.count += 1
        me = self.count
        self.switch.add_endpoint(me, 1000, os.getpid(), os.getuid(), os.getgid(), b"me")
        tx, rx, line = self.switch.connect(me, tx_bytes, rx_bytes)
        rings = Rings(tx, rx, line, address, name_destination)
        os.close(tx)
        os.close(rx)
        self.switch.attach(me, 1)
        assert self.switch.own(me, b"1.%d" % me)
        self.rings.append(rings)
        self.lines[rings] = line
        return rings

    def close(self) -> None:
        """End everything."""
        for rings in self.rings:
            rings.close()
            os.close(self.lines[rings])
        self.switch.close()


def send(
    rings: Rings,
    dst: bytes,
    *buffers: bytes,
    fds: tuple[int, ...] = (),
    timeout: float | None = 10,
) -> int:
    """Send to one address from the default source."""
    return rings.send(UNICAST, dst, b"", buffers, fds, 0, 0, 0, 0, timeout)


def fill(rings: Rings, dst: bytes) -> int:
    """Send messages of 1000 bytes until there is no room for one; return how many went in."""
    count = 0
    while (result := send(rings, dst, bytes(1000), timeout=0)) == 0:
        count += 1
    assert result == -errno.EAGAIN
    return count


def take(rings: Rings, count: int = 1, bufsize: int = 1 << 24) -> list[Received]:
    """Receive, with room for everything."""
    got = rings.recv(count, bufsize, 1 << 16, False, 10)
    assert isinstance(got, list), errno.errorcode[-got]
    return got


def is_readable(line: int, timeout_s: float = 0) -> bool:
    """Tell whether a line has something for its reader."""
    poll = select.poll()
    poll.register(line, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))
