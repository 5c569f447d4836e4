"""Receivers that are killed with messages that they have not read."""

from __future__ import annotations

import errno
import socket
import time
from typing import TYPE_CHECKING

import pytest
from tests.cases.actors import ITEMS, MULTICAST, PATH, Stage, about, join
from tests.cases.bodies import pack_body, read_body
from tests.cases.conftest import check_times, count_lanes
from tests.figures import note

from afbus.client.ancillary import find_gap
from afbus.proto.address import BusAddress
from afbus.proto.errors import BusError, RingFull, ShareExceeded
from afbus.proto.notice import Event, Notice

if TYPE_CHECKING:
    from tests.cases.actors import Fleet
    from tests.cases.conftest import Node

    from afbus.client.socket import Socket

KILLS = 1000
#: With lanes so many that there is one to each receiver: each takes of the quota what it can hold.
QUOTA_MESSAGES = {"fifo": 20_000, "total": 400}


def hold(stage: Stage, reads: int, loans: int) -> None:
    """Join, read some messages, hold others as loans, and then do nothing."""
    one = stage.join(listen=[("news", "GAP")], rx_bytes=1 << 17)
    stage.tell(one.getsockname().address.decode())
    stage.hear()
    for _ in range(reads):
        one.recv(1 << 16)
    held = [one.recv_loan() for _ in range(loans)]
    stage.tell("holding")
    stage.hear()
    del held


def push(stage: Stage) -> None:
    """Send to whom the test names, waiting for room there; tell what ended it, and what is said."""
    one = stage.join()
    while True:
        to = BusAddress(PATH, stage.hear())
        count, error = 0, 0
        while not error:
            try:
                one.sendto(pack_body(2, 0, 2000), to)
            except BusError as refusal:
                error = refusal.errno or -1
            else:
                count += 1
        stage.tell([error, count, take_unread(one)[1] if count else 0])


def take_unread(sender: Socket) -> tuple[bytes, int]:
    """Wait for the notice about what nobody will read; whose messages, and how many."""
    data, source = sender.recvfrom(4096)
    assert source.is_kernel
    notice = Notice.decode(data)
    assert notice.event is Event.UNREAD
    count = notice.detail["count"]
    assert isinstance(count, int)
    return notice.subject[0], count


def read_all(receiver: Socket) -> list[int]:
    """The numbers of all messages that are there; nothing else is there, and no gap."""
    numbers: list[int] = []
    while True:
        try:
            found = receiver.recvmmsg(1000, 1 << 16, ITEMS, socket.MSG_DONTWAIT)
        except RingFull:
            return numbers
        for data, items, _, source in found:
            assert not source.is_kernel
            assert find_gap(items) is None
            numbers.append(read_body(data)[1])


class Sender:
    """Sends to the one that will be killed, and to others."""

    def __init__(self, one: Socket, others: dict[bytes, Socket]) -> None:
        self.socket = one
        self._others = others
        self._number = 0

    def send_to_all(self) -> dict[bytes, list[int]]:
        """Send unicasts and multicasts; return the numbers that each of the others must get."""
        sent: dict[bytes, list[int]] = {name: [] for name in self._others}
        for _ in range(5):
            for name, numbers in sent.items():
                self.socket.sendto(pack_body(1, self._number, 100), BusAddress(PATH, name))
                numbers.append(self._number)
                self._number += 1
            body = pack_body(1, self._number, 100)
            self.socket.sendmsg([body], [about("news")], 0, MULTICAST)
            for numbers in sent.values():
                numbers.append(self._number)
            self._number += 1
        return sent

    def fill(self, to: BusAddress, size: int, refusal: type[BusError]) -> int:
        """Send until it is refused with this error; return how often it was not."""
        for count in range(1 << 20):
            try:
                self.socket.sendto(pack_body(1, 0, size), socket.MSG_DONTWAIT, to)
            except refusal:
                return count
        raise AssertionError(f"never refused with {refusal.__name__}")

    def wait_for_waiting(self, name: str, count: int) -> None:
        """Wait until so many senders wait for room at an endpoint."""
        waiting = 0
        while waiting < count:
            rows = self.socket.listing("queues", PATH)
            waiting = next(row["waiting"] for row in rows if row["address"] == name)


@pytest.mark.cluster
@pytest.mark.slow
def test_case2_d18_d20_receivers_are_killed(node: Node, fleet: Fleet, order: str) -> None:
    """1,000 receivers are killed, while they hold all that their ring or a quota allows.

    Others lose nothing. The sender is told how many of its unicasts nobody will read, a sender
    that waits for room is told that nobody is there, and the quota is whole again.
    """
    quota = QUOTA_MESSAGES[order]
    node.start(quotas={"quota_messages": quota})
    fleet.start_master(order=order)
    pusher = fleet.start(push)
    told: list[float] = []
    freed: list[float] = []
    unread = lanes = 0
    with (
        join(node.place, tx_bytes=1 << 15) as one,
        join(node.place, name="a", listen=[("news", "BLOCK")]) as first,
        join(node.place, name="b", listen=[("news", "BLOCK")]) as second,
    ):
        others = {b"a": first, b"b": second}
        sender = Sender(one, others)
        before = node.descriptors, node.threads, node.rings
        for turn in range(KILLS):
            reads, loans = (turn // 2) % 4, (turn // 8) % 3
            holder = fleet.start(hold, reads=reads, loans=loans)
            name = holder.hear()
            to = BusAddress(PATH, name)
            for _ in range(reads + loans):
                one.sendto(pack_body(1, 0, 10), to)
            holder.tell("read")
            assert holder.hear() == "holding"
            lanes += count_lanes(one)
            sent = sender.send_to_all()
            # By turns the ring is full first, or the quota of the user.
            is_ring = order == "fifo" or turn % 2 == 0
            refusal: type[BusError] = RingFull if is_ring else ShareExceeded
            count = loans + sender.fill(to, 2000 if is_ring else 10, refusal)
            for each, receiver in others.items():
                assert read_all(receiver) == sent[each]
            if is_ring:
                pusher.tell(name)
                # The sender waits too, in a way: it was refused.
                sender.wait_for_waiting(name, 2)
            killed_at = time.monotonic()
            holder.kill()
            subject, lost = take_unread(one)
            told.append(time.monotonic() - killed_at)
            assert subject == name.encode()
            # What was read lately may not have been given back yet.
            assert count <= lost <= count + reads
            unread += lost
            if is_ring:
                error, accepted, lost = pusher.hear()
                assert (error, accepted) == (errno.EHOSTUNREACH, lost)
            # All of the quota is there again, at the first attempt, but for what lanes may hold.
            left = quota - 1 if order == "total" else 1000
            for _ in range(left if turn % 50 == 1 else 1):
                one.sendto(pack_body(1, 0, 10), BusAddress(PATH, "a"))
                if len(freed) == turn:
                    freed.append(time.monotonic() - killed_at)
            read_all(first)
        assert (lanes > 0) == (order == "fifo")
        assert len(one.listing("endpoints", PATH)) == 5
        assert (node.descriptors, node.threads, node.rings) == before
    note(f"{KILLS} receivers, {unread} messages that nobody read")
    check_times("from the kill to the notice", told, 0.2)
    check_times("from the kill to the next message within the quota", freed, 0.2)
