"""The operator's door: an AF_UNIX socket in the state of the master, for its owner alone.

A stream on which each frame of `proto/cluster.py` stands behind its length (u32, big endian). One
connection is one CALL and its answer.

Invariants:

1. Only the owner of the master, or root, is heard: the kernel says who is there.
2. A connection that says nothing, or does not read, ends by itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..proto import cluster
from ..proto.cluster import CLUSTER_FRAME_BYTES, ClusterCall
from ..proto.errors import (
    ConfigError,
    DeadlineExceeded,
    NoAgent,
    NotConnected,
    RemoteProtocolError,
)
from ..proto.frames import Closed, Result

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ..proto.operation import ClusterOp

_log = logging.getLogger("afbus.master")

#: How long the operator may take for its CALL, and for reading the answer.
PATIENCE_S: Final = 10.0
#: Connections that wait to be heard.
BACKLOG: Final = 16
#: How long the master may take: it waits for nodes that do not answer until they are lost.
ANSWER_S: Final = 60.0

_LENGTH: Final = struct.Struct(">I")
_CREDENTIALS: Final = struct.Struct("3i")


class Ask(Protocol):
    """Takes a frame of the operator, and what takes the one answer."""

    def __call__(self, data: bytes, answer: Callable[[bytes], None], /) -> None:
        """Ask."""


class Door:
    """The open door."""

    def __init__(self, path: Path, ask: Ask) -> None:
        """Make the socket; whoever had the lock of the state before left only a name behind.

        Raises:
            ConfigError: It cannot be made.
        """
        self._path, self._ask = path, ask
        self._sock = _listen(path)
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Hear whoever comes, from now on."""
        self._server = await asyncio.start_unix_server(
            self._welcome, sock=self._sock, limit=CLUSTER_FRAME_BYTES
        )

    def close(self) -> None:
        """End it, with all who wait for an answer."""
        if self._server is None:
            self._sock.close()
        else:
            self._server.close()
        for task in self._serving:
            task.cancel()
        self._path.unlink(missing_ok=True)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await _serve(reader, writer, self._ask)
        except (
            OSError,
            TimeoutError,
            asyncio.IncompleteReadError,
            asyncio.CancelledError,
        ) as error:
            # Nothing is left to do but to close; a stream's task must not end cancelled, or
            # asyncio takes that for a mistake.
            _log.debug("operator: %r", error)
        finally:
            self._serving.discard(task)
            writer.close()


def _listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        previous = os.umask(0o177)
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(previous)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(str(error.strerror), file=str(path)) from error
    return sock


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ask: Ask) -> None:
    peer = writer.get_extra_info("socket")
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid = _CREDENTIALS.unpack(data)[1]
    if uid not in (0, os.geteuid()):
        _log.warning("user %d at the door of the operator", uid)
        return
    async with asyncio.timeout(PATIENCE_S):
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > CLUSTER_FRAME_BYTES:
            _log.info("operator: a frame of %d bytes, limit %d", length, CLUSTER_FRAME_BYTES)
            return
        frame = await reader.readexactly(length)
    answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def answer(data: bytes) -> None:
        if not answered.done():
            answered.set_result(data)

    ask(frame, answer)
    async with asyncio.timeout(ANSWER_S):
        made = await answered
    writer.write(_LENGTH.pack(len(made)) + made)
    async with asyncio.timeout(PATIENCE_S):
        await writer.drain()


def ask_master(path: Path, op: ClusterOp, /, timeout_s: float = ANSWER_S, **args: Any) -> Any:
    """Ask the master behind a door, as its operator; return the value of the result.

    Raises:
        NoAgent: No master is there. ECONNREFUSED.
        BusError: It refuses.
        DeadlineExceeded: It does not answer. ETIMEDOUT.
        NotConnected: It is gone. ENOTCONN.
        RemoteProtocolError: What it says is no answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(os.fspath(path))
        except OSError as error:
            text = f"no master runs with the state in {path.parent}: {error.strerror}"
            raise NoAgent(text) from error
        data = cluster.encode(ClusterCall(1, op, args))
        try:
            sock.sendall(_LENGTH.pack(len(data)) + data)
            frame = cluster.decode(_receive(sock))
        except NotConnected:
            raise
        except TimeoutError as error:
            raise DeadlineExceeded(f"the master has not answered for {timeout_s:g} s") from error
        except OSError as error:
            raise NotConnected(f"the master is gone: {error.strerror}") from error
    match frame:
        case Result(errno=0):
            return frame.value
        case Result():
            raise frame.to_error()
        case Closed(code, text):
            raise RemoteProtocolError(f"the master says {code.name}: {text}", code)
    raise RemoteProtocolError(f"the master says {type(frame).__name__}")


def _receive(sock: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_receive_exactly(sock, _LENGTH.size))
    if length > CLUSTER_FRAME_BYTES:
        raise RemoteProtocolError(f"the master says {length} bytes")
    return _receive_exactly(sock, length)


def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise NotConnected("the master ended without an answer")
        data += more
    return data
