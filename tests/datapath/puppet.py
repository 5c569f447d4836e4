"""An agent played by hand: what a test has not settled has no verdict, whatever the time."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from typing import cast

from tests.datapath.world import KIB, name_destination, name_source

from afbus._datapath import UNICAST, Rings

#: Offsets in the header page of a ring (docs/internals.md).
HEAD, TAIL, SLEEPS, SIGNAL = 0, 128, 256, 392
#: Kinds and flags of RX records.
MESSAGE, GAP, NOTICE = 1, 2, 3
BODY_IN_MEMFD = 4


class Memory:
    """One ring as the other side has it."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("ring", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, 4096 + size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        self.bytes = mmap.mmap(self.fd, 4096 + size)

    def get(self, offset: int) -> int:
        """Return one of the indices."""
        return cast("int", struct.unpack_from("<Q", self.bytes, offset)[0])

    def set(self, offset: int, value: int) -> None:
        """Set one of the indices."""
        struct.pack_into("<Q", self.bytes, offset, value)

    def close(self) -> None:
        """Unmap."""
        self.bytes.close()
        os.close(self.fd)


class Puppet:
    """An agent that does what the test says, and the client that believes in it."""

    def __init__(self, tx_bytes: int = 4 * KIB, rx_bytes: int = 64 * KIB) -> None:
        self.tx, self.rx = Memory(tx_bytes), Memory(rx_bytes)
        kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
        self.line, self.theirs = socket.socketpair(socket.AF_UNIX, kind)
        self.rings = Rings(
            self.tx.fd, self.rx.fd, self.theirs.fileno(), name_source, name_destination
        )

    def send(self, *bodies: bytes, fds: tuple[int, ...] = (), timeout: float | None = 0.01) -> int:
        """Let the client send one message."""
        return self.rings.send(UNICAST, b"1.2", b"", bodies, fds, 0, 0, 0, 0, timeout)

    def settle(self, *verdicts: int) -> None:
        """Give verdicts on the oldest records."""
        at = self.tx.get(TAIL)
        for verdict in verdicts:
            assert at < self.tx.get(HEAD), "there is no such record"
            place = 4096 + at % (len(self.tx.bytes) - 4096)
            (length,) = struct.unpack_from("<I", self.tx.bytes, place)
            struct.pack_into("<i", self.tx.bytes, place + 8, verdict)
            at += (length + 7) & ~7
        self.tx.set(TAIL, at)
        self.tx.set(SIGNAL, self.tx.get(SIGNAL) + 1 & 0xFFFFFFFF)

    def await_records(self, count: int) -> None:
        """Wait until the client has published so many records that are not settled."""
        size = len(self.tx.bytes) - 4096
        while True:
            at, seen = self.tx.get(TAIL), 0
            while at < self.tx.get(HEAD):
                (length,) = struct.unpack_from("<I", self.tx.bytes, 4096 + at % size)
                at += (length + 7) & ~7
                seen += 1
            if seen >= count:
                return
            os.sched_yield()

    def deliver(
        self, kind: int, src: bytes, body: bytes, flags: int = 0, fds: int = 0, raw: bytes = b""
    ) -> None:
        """Put a record into the RX ring; `raw` replaces the first bytes of its header."""

        def pad(data: bytes) -> bytes:
            return data + bytes(-len(data) % 8)

        length = 64 + len(pad(src)) + (0 if flags & BODY_IN_MEMFD else len(body))
        header = struct.pack("<IBBBx", length, kind, flags, fds) + bytes(36)
        header += struct.pack("<HHHHIII", len(src), 0, 0, 0, 0, len(body), 0)
        header = raw + header[len(raw) :]
        record = header + pad(src) + (b"" if flags & BODY_IN_MEMFD else pad(body))
        head = self.rx.get(HEAD)
        self.rx.bytes[4096 + head : 4096 + head + len(record)] = record
        self.rx.set(HEAD, head + len(record))

    def close(self) -> None:
        """End everything."""
        self.rings.close()
        self.line.close()
        self.theirs.close()
        self.tx.close()
        self.rx.close()
