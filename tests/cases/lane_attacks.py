"""What a hostile sender does to lanes: with its own data, with the pages of others, with its line.

The words are those of docs/internals-lanes.md.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING

from tests.cases.raw import HEAD, MULTICAST_TERMS, PAGE, UNICAST, RawClient, padded, tx_record

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

LANE = 4
RING = PAGE
COUNT = 8
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | 0x10  # FUTURE_WRITE
_QUESTION = struct.Struct("<QB7x")
_CALL = struct.Struct("<cQ")
#: Whom it sends to, and who goes on all the same.
VICTIM = b"answer"


class RawLane:
    """The sending end of a lane, or of one that was refused."""

    def __init__(self, client: RawClient, dst: bytes, kind: int = UNICAST) -> None:
        descriptor = os.memfd_create("data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, PAGE + RING)
        self.data = mmap.mmap(descriptor, PAGE + RING)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        self.verdict, self.number, self.descriptors = ask(client, dst, [descriptor], kind)
        os.close(descriptor)

    @property
    def pages(self) -> list[mmap.mmap]:
        """What was given of the lane and can be written, mapped anew."""
        found = []
        for descriptor in self.descriptors:
            try:
                found.append(mmap.mmap(descriptor, PAGE))
            except (OSError, ValueError):
                continue  # for reading only, or no memory
        return found

    def say(self, text: bytes) -> bytes:
        """A record as it lies in a lane."""
        return struct.pack("<IIQQ", 24 + len(text), 0, 1, 0) + text.ljust(padded(len(text)), b"\0")

    def show(self, head: int) -> None:
        """Publish up to a position, and wake everybody."""
        struct.pack_into("<Q", self.data, HEAD, head & ((1 << 64) - 1))
        for descriptor in self.descriptors:
            try:
                os.write(descriptor, (1).to_bytes(8, "little"))
            except OSError:
                continue  # no bell

    def close(self) -> None:
        """Let everything go."""
        self.data.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


def ask(
    client: RawClient, dst: bytes, given: list[int], kind: int = UNICAST, size: int = RING
) -> tuple[int, int, list[int]]:
    """Ask for a lane; the verdict, its number, and the descriptors that came."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        client.send_on_line(b"f", [theirs.fileno(), *given])
        record = tx_record(LANE, dst, _QUESTION.pack(size, kind), fds=1 + len(given))
        verdict = client.verdict(client.publish(record))
        number, descriptors = 0, []
        while verdict == 1:
            try:
                data, more, _, _ = socket.recv_fds(ours, 64, 28)
            except BlockingIOError:
                break
            number = int.from_bytes(data[1:9], "little")
            descriptors += more
    return verdict, number, descriptors


def call(client: RawClient, what: bytes, number: int) -> None:
    """Say something of a lane by the line."""
    client.send_on_line(_CALL.pack(what, number))


def spoil_lane(client: RawClient, rng: random.Random) -> None:
    """Write anything anywhere in a lane and its pages, and show it."""
    lane = RawLane(client, VICTIM)
    pages = lane.pages
    places = [lane.data, *pages]
    for _ in range(rng.randrange(1, 20)):
        place = rng.choice(places)
        size = rng.choice((1, 4, 8, 64, 1000))
        at = rng.choice((0, 8, 128, 132, 136, 192, 256, 260, 264, rng.randrange(len(place) - size)))
        place[at : at + size] = rng.randbytes(size)
        lane.show(rng.choice((8, 24, RING, RING + 8, 1 << 32, rng.getrandbits(64), -8)))
        call(client, rng.choice((b"l", b"x")), rng.choice((lane.number, rng.getrandbits(64))))
    for page in pages:
        page.close()
    lane.close()


def spoil_records(client: RawClient, rng: random.Random) -> None:
    """Records that are right but for some bits, which change while they are read."""
    lane = RawLane(client, VICTIM)
    head = 0
    for number in range(rng.randrange(1, 30)):
        record = bytearray(lane.say(rng.randbytes(8 * rng.randrange(10))))
        for _ in range(rng.randrange(3)):
            record[rng.randrange(len(record))] ^= 1 << rng.randrange(8)
        at = PAGE + head % (RING - 256)
        lane.data[at : at + len(record)] = bytes(record)
        head += len(record)
        struct.pack_into("<Q", lane.data, COUNT, rng.choice((number, rng.getrandbits(64))))
        lane.show(head)
        lane.data[at : at + 4] = rng.randbytes(4)
    lane.close()


def write_after_the_end(client: RawClient, rng: random.Random) -> None:
    """Let the agent close the lane, and go on as if it had not."""
    lane = RawLane(client, VICTIM)
    way = rng.choice((UNICAST, MULTICAST_TERMS))
    client.verdict(client.publish(tx_record(way, VICTIM, b"by the switch", fds=0)))
    record = lane.say(b"behind the end")
    for number in range(rng.randrange(1, 10)):
        at = PAGE + number * len(record)
        lane.data[at : at + len(record)] = record
        lane.show((number + 1) * len(record))
        call(client, b"l", lane.number)
    lane.close()


def ask_for_nonsense(client: RawClient, rng: random.Random) -> None:
    """Memory that is not sealed, of another size, or none; to nobody; again and again."""
    for _ in range(rng.randrange(1, 8)):
        descriptor = os.memfd_create("data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, rng.choice((0, PAGE, PAGE + RING, PAGE + RING + 1, 1 << 26)))
        seals = _SEALS & ~rng.choice((0, 1, 2, 4, 8, 16, 31))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        given = rng.choice(
            ([descriptor], [client.line.fileno()], [client.tx.descriptor], [client.rx.descriptor])
        )
        dst = rng.choice((VICTIM, b"nobody", b"1.1", rng.randbytes(20)))
        kind = rng.choice((UNICAST, 0, 2, 3, 4, 255))
        size = rng.choice((RING, RING, 0, 1, 4097, 1 << 20, 1 << 40, (1 << 64) - 1))
        _, _, descriptors = ask(client, dst, given, kind, size)
        for each in (descriptor, *descriptors):
            os.close(each)


#: What none of these attacks must do is end anything but the attacker.
LANE_ATTACKS: tuple[Callable[[RawClient, random.Random], None], ...] = (
    spoil_lane,
    spoil_records,
    write_after_the_end,
    ask_for_nonsense,
)
