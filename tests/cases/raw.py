"""A client that keeps no rules: the door and the line as sockets, the rings as bare memory.

The layout is that of docs/internals.md: a page with the indices, then the data.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import select
import socket
import struct
from typing import TYPE_CHECKING, Any, Self

from afbus.proto import frames
from afbus.proto.frames import Call, Closed, Hello, Op, Result, Welcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afbus.proto.frames import Frame

PAGE = 4096
HEAD, TAIL, READER_SLEEPS, WRITER_WAITS, SIGNAL, ROOM = 0, 128, 256, 384, 392, 396
TX_HEADER = struct.Struct("<IBBBBiIQQHHI")
UNICAST, MULTICAST_RAW, MULTICAST_TERMS = 1, 2, 3
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")
ANSWER_S = 30.0


def padded(size: int) -> int:
    """The size up to where the next record begins."""
    return (size + 7) & ~7


def tx_record(
    kind: int,
    dst: bytes,
    body: bytes,
    *,
    src: bytes = b"",
    flags: int = 0,
    fds: int = 0,
    serial: int = 0,
    reply_to: int = 0,
    deadline_ms: int = 0,
) -> bytes:
    """A record as a client writes it, padded."""
    parts = [src.ljust(padded(len(src)), b"\0"), dst.ljust(padded(len(dst)), b"\0"), body]
    size = TX_HEADER.size + sum(map(len, parts))
    header = TX_HEADER.pack(
        size, kind, flags, fds, 0, 0, deadline_ms, serial, reply_to, len(src), len(dst), len(body)
    )
    return (header + b"".join(parts)).ljust(padded(size), b"\0")


class Ring:
    """One ring, mapped for reading and writing by who should do only one of them."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self.descriptor = descriptor
        self.memory = mmap.mmap(descriptor, PAGE + size)

    def word(self, offset: int) -> int:
        """A u64 of the header page."""
        value: int = _U64.unpack_from(self.memory, offset)[0]
        return value

    def set_word(self, offset: int, value: int) -> None:
        """Write a u64 of the header page."""
        _U64.pack_into(self.memory, offset, value)

    def set_flag(self, offset: int, value: int) -> None:
        """Write a u32 of the header page."""
        _U32.pack_into(self.memory, offset, value)

    def write(self, position: int, data: bytes) -> None:
        """Write data at a position, round the end."""
        at = position & (self.size - 1)
        first = data[: self.size - at]
        self.memory[PAGE + at : PAGE + at + len(first)] = first
        self.memory[PAGE : PAGE + len(data) - len(first)] = data[len(first) :]

    def read(self, position: int, size: int) -> bytes:
        """Read data from a position, round the end."""
        at = position & (self.size - 1)
        data = self.memory[PAGE + at : PAGE + min(at + size, self.size)]
        return data + self.memory[PAGE : PAGE + size - len(data)]

    def close(self) -> None:
        """Unmap."""
        self.memory.close()
        os.close(self.descriptor)


class RawClient:
    """One connection, at whatever stage: connected, welcome, on a bus, a member."""

    def __init__(self, place: str) -> None:
        self.door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.door.settimeout(ANSWER_S)
        self.door.connect(place)
        self.welcome: Welcome | None = None
        self._serial = 0

    def hello(self, ring_bytes: int = PAGE, resume: bytes | None = None) -> Welcome:
        """Begin as an endpoint, and map its rings."""
        hello = Hello(tx_bytes=ring_bytes, rx_bytes=ring_bytes, resume=resume)
        self.door.send(frames.encode(hello))
        data, descriptors, _, _ = socket.recv_fds(self.door, 1 << 17, 3)
        welcome = frames.decode(data)
        assert isinstance(welcome, Welcome), welcome
        tx, rx, line = descriptors
        self.tx, self.rx = Ring(tx, ring_bytes), Ring(rx, ring_bytes)
        self.line = socket.socket(fileno=line)
        self.line.setblocking(False)
        self.welcome = welcome
        return welcome

    def next_frame(self) -> Frame | None:
        """What the agent says next, None at the end."""
        try:
            data = self.door.recv(1 << 18)
        except ConnectionError:
            return None
        return frames.decode(data) if data else None

    def call(self, op: Op, **args: Any) -> Any:
        """Ask for something that is not refused."""
        self._serial += 1
        self.door.send(frames.encode(Call(self._serial, op, args)))
        result = self.next_frame()
        assert isinstance(result, Result), result
        assert result.is_ok, result
        return result.value

    def kick(self) -> None:
        """Tell the switch to look; a line that is full or gone does not matter."""
        with contextlib.suppress(OSError):
            self.line.send(b"k")

    def send_on_line(self, data: bytes, descriptors: Sequence[int] = ()) -> bool:
        """Send a packet with descriptors; tell whether the line took it."""
        rights = array.array("i", descriptors).tobytes()
        items = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
        try:
            self.line.sendmsg([data], items, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def publish(self, record: bytes) -> int:
        """Send a record as a client should; return its position."""
        head = self.tx.word(HEAD)
        self.tx.write(head, record)
        self.tx.set_word(HEAD, head + len(record))
        self.kick()
        return head

    def verdict(self, position: int) -> int:
        """Wait for the status of a record: 1 or a negative errno."""
        while self.tx.word(TAIL) <= position and not self.is_cut(0.001):
            self.kick()
        status: int = struct.unpack("<i", self.tx.read(position + 8, 4))[0]
        return status

    def receive(self) -> bytes:
        """Wait for the next record, and take it."""
        tail = self.rx.word(TAIL)
        while self.rx.word(HEAD) == tail:
            self.rx.set_flag(READER_SLEEPS, 1)
            if self.rx.word(HEAD) == tail:
                assert select.select([self.line], [], [], ANSWER_S)[0], "nothing comes"
                if not self.line.recv(16):
                    raise ConnectionError("cut off")
        size: int = _U32.unpack(self.rx.read(tail, 4))[0]
        record = self.rx.read(tail, size)
        self.rx.set_word(TAIL, tail + padded(size))
        return record

    def is_cut(self, timeout_s: float) -> bool:
        """Tell whether the agent has ended the line, waiting for that."""
        poll = select.poll()
        poll.register(self.line, select.POLLRDHUP)
        return bool(poll.poll(timeout_s * 1000))

    def read_farewell(self) -> Closed:
        """Wait for the reason why the agent ends the connection; other answers are passed over."""
        while (frame := self.next_frame()) is not None:
            if isinstance(frame, Closed):
                return frame
        raise ConnectionError("no farewell")

    def close(self) -> None:
        """Let everything go without a word."""
        self.door.close()
        if self.welcome is not None:
            self.line.close()
            self.tx.close()
            self.rx.close()

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Let everything go."""
        self.close()
