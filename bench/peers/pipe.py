"""Pipes and AF_UNIX sockets: what the kernel has."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Final

from ..meter import take_counted
from ..wire import BATCH, KIB, MIB, BlockingWire, End, System

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..stage import Player, Stage
    from ..wire import Traffic

#: What an unprivileged process may ask for, as a rule (/proc/sys/fs/pipe-max-size).
_PIPE_BYTES: Final = MIB
_SOCKET_BYTES: Final = 4 * MIB


class PipeWire(BlockingWire):
    """A pipe to each reader, and one back."""

    def __init__(self, stage: Stage, traffic: Traffic) -> None:
        """Make the pipes."""
        super().__init__(stage, traffic)
        self._pipes = [os.pipe() for _ in range(traffic.readers + 1)]
        if traffic.size > KIB:
            for _, into in self._pipes:
                fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def close(self) -> None:
        """Close them."""
        for pipe in self._pipes:
            for fd in pipe:
                os.close(fd)

    @contextlib.contextmanager
    def end(self, role: str, player: Player) -> Iterator[End]:
        """Return an end; the last pipe is the one back."""
        *there, back = self._pipes
        number = int(role.removeprefix("sink") or 0) if role.startswith("sink") else 0
        out, intos = there[number][0], [into for _, into in there]
        if role == "echo":
            intos = [back[1]]
        elif role == "ping":
            out = back[0]
        yield PipeEnd(out, intos, self.traffic.size)


class PipeEnd(End):
    """An end of pipes."""

    def __init__(self, out: int, intos: list[int], size: int) -> None:
        """Read messages of a size from one, write to the others."""
        self._out, self._intos, self._size = out, intos, size
        self._into = intos[0]
        self.send = self._send_all if len(intos) > 1 else self._send_one
        self.receive = self._receive

    def _send_one(self, body: bytes) -> None:
        os.write(self._into, body)

    def _send_all(self, body: bytes) -> None:
        for into in self._intos:
            os.write(into, body)

    def _receive(self) -> bytes:
        # What was written at once may come in parts.
        data = os.read(self._out, self._size)
        if len(data) == self._size:
            return data
        parts, left = [data], self._size - len(data)
        while left:
            data = os.read(self._out, left)
            parts.append(data)
            left -= len(data)
        return b"".join(parts)


class CutPipeWire(PipeWire):
    """A pipe whose users write many messages at once and cut them apart again."""

    def source(self, player: Player) -> None:
        """Write batches."""
        (_, into), _ = self._pipes
        bodies = [bytes(self.traffic.size)] * BATCH
        player.ready()
        for _ in repeat(None):
            os.writev(into, bodies)

    def sink(self, player: Player, number: int) -> None:
        """Read what is there, and cut it."""
        (out, _), _ = self._pipes
        size, rest = self.traffic.size, b""

        def take() -> int:
            nonlocal rest
            data = rest + os.read(out, 64 * KIB)
            whole = len(data) // size * size
            rest = data[whole:]
            return len([data[at : at + size] for at in range(0, whole, size)])

        take_counted(player.ready(), take)


class UnixWire(BlockingWire):
    """A pair of AF_UNIX sockets to each reader."""

    def __init__(self, stage: Stage, traffic: Traffic, kind: socket.SocketKind) -> None:
        """Make the pairs."""
        super().__init__(stage, traffic)
        self._pairs = [socket.socketpair(socket.AF_UNIX, kind) for _ in range(traffic.readers)]
        if traffic.size > KIB:
            for one in (one for pair in self._pairs for one in pair):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)

    def close(self) -> None:
        """Close them."""
        for pair in self._pairs:
            for one in pair:
                one.close()

    @contextlib.contextmanager
    def end(self, role: str, player: Player) -> Iterator[End]:
        """Return an end; the first of each pair is the near one."""
        if role in ("ping", "source"):
            yield UnixEnd([near for near, _ in self._pairs], self.traffic.size)
        else:
            number = int(role.removeprefix("sink")) if role.startswith("sink") else 0
            yield UnixEnd([self._pairs[number][1]], self.traffic.size)


class UnixEnd(End):
    """An end of a pair, or of several."""

    def __init__(self, sockets: list[socket.socket], size: int) -> None:
        """Send to all, receive from the first."""
        self._sockets = sockets
        # On a stream a message comes in parts, unless the kernel is told to collect them.
        is_stream = sockets[0].type == socket.SOCK_STREAM
        flags = socket.MSG_WAITALL if is_stream else 0
        self.receive = partial(sockets[0].recv, size, flags)
        if len(sockets) > 1:
            self.send = self._send_all
        else:
            self.send = sockets[0].sendall if is_stream else sockets[0].send

    def _send_all(self, body: bytes) -> None:
        for one in self._sockets:
            one.sendall(body)


PIPE: Final = System("pipe", PipeWire)
CUT_PIPE: Final = System("pipe, cut by its users", CutPipeWire, is_yardstick=True)
UNIX: Final = [
    System(
        f"unix {kind.name.removeprefix('SOCK_').lower()}",
        partial(UnixWire, kind=kind),
    )
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_DGRAM, socket.SOCK_STREAM)
]
