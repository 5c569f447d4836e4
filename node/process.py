"""What the kernel says of the process at the other end of a connection.

Invariants:

1. Nothing here is a claim of the client: SO_PEERCRED and SO_PEERPIDFD are the kernel's words.
2. The start time is that of the very process that connected: it is read while a pidfd shows that
   the process lives. Where the kernel has no SO_PEERPIDFD (Linux before 6.5), a pid that is used
   again between connect and accept could be taken for the old one.
3. No descriptor is kept.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from pathlib import Path
from typing import Final

from .endpoint import Credentials

_UCRED: Final = struct.Struct("=iII")
#: The number of SO_PEERPIDFD, which Python does not name.
SO_PEERPIDFD: Final = 77
# Places behind the name in /proc/PID/stat.
_STATE, _START_TIME = 0, 19


def read_start_ticks(pid: int) -> int:
    """Return when a process began, in clock ticks since the machine did; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        # Gone, or hidden from this user: either way there is nothing to compare with.
        return 0
    # The name stands in brackets and may hold anything, brackets too.
    fields = text[text.rindex(b")") + 2 :].split()
    return 0 if fields[_STATE] in (b"Z", b"X") else int(fields[_START_TIME])


def is_alive(credentials: Credentials) -> bool:
    """Tell whether the very process of these credentials lives."""
    start_ticks = credentials.start_ticks
    return start_ticks > 0 and read_start_ticks(credentials.pid) == start_ticks


def read_credentials(connection: socket.socket) -> Credentials:
    """Return who connected.

    Raises:
        OSError: The connection is broken.
    """
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(data)
    start_ticks = _read_peer_start(connection, pid)
    has_other_pids = len(_read_pids(pid)) > 1
    # A process that cannot be seen is taken to be where the agent is.
    users = _read_users(pid)
    has_other_users = bool(users) and users != _read_users(os.getpid())
    return Credentials(pid, uid, gid, start_ticks, has_other_pids, has_other_users)


def _read_pids(pid: int) -> list[bytes]:
    """Return the pids of a process in all namespaces from this one down to its own."""
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return []
    lines = [line for line in status.splitlines() if line.startswith(b"NSpid:")]
    return lines[0].split()[1:] if lines else []


def _read_users(pid: int) -> list[bytes]:
    """Return which users of this host are which where a process is, nothing if it is not known."""
    try:
        return Path(f"/proc/{pid}/uid_map").read_bytes().split()
    except OSError:
        return []


def _read_peer_start(connection: socket.socket, pid: int) -> int:
    try:
        pidfd = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        # Any other error says that the process has gone already.
        return read_start_ticks(pid) if error.errno == errno.ENOPROTOOPT else 0
    try:
        start_ticks = read_start_ticks(pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        has_ended = bool(poll.poll(0))
    finally:
        os.close(pidfd)
    return 0 if has_ended else start_ticks
