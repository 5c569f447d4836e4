"""The socket at which clients arrive, and their connections: packets in, packets out.

Whoever holds the lock file beside the door is the one agent there. There is no decision here: what
happens is told to `Visitors`, who answers by `send` and `cut`.

Invariants:

1. No client is waited for. While one does not read, nothing is read from it either, so that at
   most one answer waits for each.
2. Descriptors that clients send are never taken: without room for them the kernel closes them.
3. Nobody is told twice that a connection has ended, and nobody of one that was cut.
4. When descriptors run out, who comes is told and turned away; nothing spins.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import stat
from array import array
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol

from ..proto import frames
from ..proto.errors import AddressInUse, CloseCode, ConfigError
from ..proto.frames import Closed
from ..proto.limits import FRAME_BYTES
from .effect import ConnectionId
from .process import read_credentials

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ..proto.frames import Frame
    from .endpoint import Credentials

#: Clients that may wait to be accepted.
BACKLOG: Final = 1024
#: Clients that are accepted before others have their turn.
_ACCEPTS: Final = 64
#: How long to wait before trying again to accept, when nothing else helps.
_PAUSE_S: Final = 1.0
#: Room for two of the largest packets in the kernel.
_SEND_BYTES: Final = 2 * FRAME_BYTES

_OUT_OF_ROOM: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


@contextmanager
def lock(place: Path, key: str = "door", does: str = "serves") -> Iterator[None]:
    """Be the one agent of a door, or of a journal, until the end of the block or of the process.

    Args:
        place: The door. Its folder is made if it is missing, and gets the lock.
        key: The setting that names it, for errors.
        does: What an agent does there, for errors.

    Raises:
        AddressInUse: Another agent is. EADDRINUSE.
        ConfigError: The lock file cannot be made.
    """
    path = place.with_name(place.name + ".lock")
    try:
        place.parent.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        fd = _take_lock(path)
    except BlockingIOError as error:
        pid = path.read_text(errors="replace").strip() or "?"
        raise AddressInUse(f"another agent (pid {pid}) {does} {place}") from error
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror}", key=key) from error
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        yield
    finally:
        # While it is locked: who opened it meanwhile sees that it has no name any more.
        path.unlink(missing_ok=True)
        os.close(fd)


def _take_lock(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        # Its holder deleted it between our two calls.
        os.close(fd)


@contextmanager
def listening(door: Path, mode: int) -> Iterator[socket.socket]:
    """Listen at a door, whose lock the caller holds; the file goes with the end of the block.

    Raises:
        AddressInUse: Somebody who does not know of the lock listens there. EADDRINUSE.
        ConfigError: The socket cannot be made, or something else lies there.
    """
    try:
        _clear(door)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            # The mode is right from the beginning: nobody may come too early, and a client that
            # comes again may not be told that it may not.
            before = os.umask(0o777 & ~mode)
            try:
                listener.bind(os.fspath(door))
            finally:
                os.umask(before)
            door.chmod(mode)  # where the folder has a default ACL, which takes the umask's place
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (AddressInUse, ConfigError):
        raise
    except OSError as error:
        raise ConfigError(f"{door}: {error.strerror}", key="door") from error
    try:
        yield listener
    finally:
        door.unlink(missing_ok=True)
        listener.close()


def _clear(door: Path) -> None:
    """Delete the socket of an agent that was killed."""
    try:
        if not stat.S_ISSOCK(door.lstat().st_mode):
            raise ConfigError(f"{door} is there and is no socket", key="door")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(door))
        except ConnectionRefusedError:
            door.unlink()
        except OSError as error:
            # EAGAIN: its backlog is full; EPROTOTYPE: it is of another type. Somebody is there.
            raise AddressInUse(f"somebody listens at {door}: {error.strerror}") from error
        else:
            raise AddressInUse(f"somebody listens at {door} who holds no lock")


class Visitors(Protocol):
    """Who is told what happens at the door."""

    def receive_connection(self, connection: ConnectionId, credentials: Credentials) -> None:
        """Somebody has come."""

    def receive_packet(self, connection: ConnectionId, data: bytes) -> None:
        """A packet has come; one above the limit has a byte more than that."""

    def receive_end(self, connection: ConnectionId) -> None:
        """A connection has ended that was not cut."""


class _Line:
    """One connection, and what waits to be sent on it."""

    __slots__ = ("id", "socket", "waiting")

    def __init__(self, id: ConnectionId, connection: socket.socket) -> None:
        self.id = id
        self.socket = connection
        self.waiting: list[tuple[bytes, Sequence[int]]] = []


class Door:
    """The connections of a listening socket, in the loop of the caller."""

    def __init__(self, listener: socket.socket, visitors: Visitors, connections_max: int) -> None:
        """Accept from now on; `listener` stays the caller's."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._visitors = visitors
        self._connections_max = connections_max
        self._lines: dict[ConnectionId, _Line] = {}
        self._next = 1
        self._buffer = bytearray(FRAME_BYTES + 1)
        # Given up for a moment when no descriptor is left, to tell who comes.
        self._spare: int | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._take_spare()
        self._resume()

    def close(self) -> None:
        """Cut all connections and accept no more."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)
        for connection in list(self._lines):
            self.cut(connection)
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def send(self, connection: ConnectionId, frame: Frame, fds: Sequence[int] = ()) -> None:
        """Send a frame, as soon as the client reads; the descriptors are closed afterwards."""
        line = self._lines.get(connection)
        if line is None:
            _close_all(fds)
            return
        line.waiting.append((frames.encode(frame), fds))
        if len(line.waiting) == 1:
            self._flush(line)
            if line.waiting:
                self._loop.remove_reader(line.socket)
                self._loop.add_writer(line.socket, self._on_writable, line)

    def cut(self, connection: ConnectionId) -> None:
        """Close a connection; what the client does not take at once is not sent."""
        line = self._lines.pop(connection, None)
        if line is None:
            return
        self._loop.remove_reader(line.socket)
        self._loop.remove_writer(line.socket)
        if line.waiting:
            self._flush(line)
            for _, fds in line.waiting:
                _close_all(fds)
        with suppress(OSError):
            _stop_hearing(line.socket)
        line.socket.close()

    # --- accepting ---

    def _take_spare(self) -> None:
        with suppress(OSError):
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._on_acceptable)

    def _on_acceptable(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _OUT_OF_ROOM:
                    # A client that went before it was accepted.
                    continue
                # One at a time: without a descriptor an empty queue cannot be told from a full one.
                if not self._turn_away():
                    self._loop.remove_reader(self._listener)
                    self._pause = self._loop.call_later(_PAUSE_S, self._resume)
                return
            self._enter(connection)

    def _turn_away(self) -> bool:
        """Accept one client for whom there is no descriptor; tell whether that was possible."""
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        try:
            connection, _ = self._listener.accept()
            _refuse(connection, "the agent has no descriptors left")
        except BlockingIOError:
            pass  # nobody was there
        except OSError:
            return False
        finally:
            self._take_spare()
        return True

    def _enter(self, connection: socket.socket) -> None:
        if len(self._lines) >= self._connections_max:
            _refuse(connection, f"the agent has {self._connections_max} connections, its limit")
            return
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
            credentials = read_credentials(connection)
        except OSError:
            connection.close()
            return
        line = _Line(ConnectionId(self._next), connection)
        self._next += 1
        self._lines[line.id] = line
        self._loop.add_reader(connection, self._on_readable, line)
        self._visitors.receive_connection(line.id, credentials)

    # --- packets ---

    def _on_readable(self, line: _Line) -> None:
        try:
            count = line.socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        # A packet without a byte cannot be told from the end, and is no frame either.
        if count == 0:
            self._end(line)
        else:
            self._visitors.receive_packet(line.id, bytes(self._buffer[:count]))

    def _end(self, line: _Line) -> None:
        if self._lines.get(line.id) is line:
            self.cut(line.id)
            self._visitors.receive_end(line.id)

    def _on_writable(self, line: _Line) -> None:
        self._flush(line)
        if not line.waiting and line.id in self._lines:
            self._loop.remove_writer(line.socket)
            self._loop.add_reader(line.socket, self._on_readable, line)

    def _flush(self, line: _Line) -> None:
        while line.waiting:
            data, fds = line.waiting[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _packed(fds))] if fds else []
            try:
                line.socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                # The client is gone, or the kernel has no room for it: either way this is its
                # end. Told later, because who calls is in the middle of something.
                for _, unsent in line.waiting:
                    _close_all(unsent)
                line.waiting.clear()
                self._loop.call_soon(self._end, line)
                return
            _close_all(fds)
            del line.waiting[0]


def _packed(fds: Sequence[int]) -> bytes:
    return array("i", fds).tobytes()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _refuse(connection: socket.socket, text: str) -> None:
    """Tell a client that it cannot be served, and close."""
    with connection, suppress(OSError):
        connection.setblocking(False)
        connection.send(frames.encode(Closed(CloseCode.LIMIT, text)), socket.MSG_NOSIGNAL)
        _stop_hearing(connection)


def _stop_hearing(connection: socket.socket) -> None:
    """Take what lies there unread: it would reset the connection before the client has read why."""
    connection.shutdown(socket.SHUT_RD)
    while connection.recv(1):
        pass
