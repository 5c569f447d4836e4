"""Senders that are killed in the middle of sending."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest
from tests.cases.actors import ITEMS, MULTICAST, PATH, PATIENCE_S, Stage, about, join
from tests.cases.bodies import pack_body, read_body
from tests.cases.conftest import check_times, count_lanes
from tests.figures import note

from afbus.proto.address import BusAddress
from afbus.proto.errors import DeadlineExceeded
from afbus.proto.notice import Event, Notice

if TYPE_CHECKING:
    from tests.cases.actors import Fleet
    from tests.cases.conftest import Node

    from afbus.client.socket import Socket

KILLS = 1000
READER = BusAddress(PATH, "reader")


def send_for_ever(stage: Stage, sender: int) -> None:
    """Send numbered messages in all the ways that there are."""
    rng = random.Random(sender)
    one = stage.join()
    stage.tell(one.getsockname().address.decode())
    stage.hear()
    number = 0
    while True:
        size = rng.choice((0, 8, 100, 1000, 3000))
        match rng.randrange(8):
            case 0:
                one.sendmsg([pack_body(sender, number, size)], [about("news")], 0, MULTICAST)
            case 1:
                # Beyond what travels in the ring.
                one.sendto(pack_body(sender, number, 70_000), READER)
            case 2:
                count = rng.randrange(2, 20)
                bodies = [pack_body(sender, number + each, size) for each in range(count)]
                number += one.sendmmsg(bodies, READER) - 1
            case _:
                one.sendto(pack_body(sender, number, size), READER)
        number += 1


class Reader:
    """Reads what senders send, and checks each of them to its end."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket
        self.next: dict[int, int] = {}
        self.ended: set[str] = set()

    def read(self, timeout_s: float) -> bool:
        """Read what is there; tell whether something was."""
        self.socket.settimeout(timeout_s)
        try:
            found = self.socket.recvmmsg(64, 1 << 18, ITEMS)
        except DeadlineExceeded:
            return False
        for data, _, _, source in found:
            if source.is_kernel:
                notice = Notice.decode(data)
                if notice.event is Event.KILLED:
                    self.ended.add(notice.subject[0].decode())
                continue
            assert source.address.decode() not in self.ended, "a message after the end"
            sender, number = read_body(data)
            assert number == self.next.get(sender, 0), "lost, repeated, or out of order"
            self.next[sender] = number + 1
        return True


@pytest.mark.cluster
@pytest.mark.slow
def test_case1_d13_d15_senders_are_killed(node: Node, fleet: Fleet, order: str) -> None:
    """Nothing is torn, lost before the end or repeated, and the next sender works at once.

    1,000 senders by unicast, multicast, batches and large bodies; each is killed after a random
    time, every fourth while it waits because nobody reads.
    """
    node.start()
    fleet.start_master(order=order)
    rng = random.Random(1)
    lanes = 0
    delays: list[float] = []
    with join(node.place, name="reader", listen=[("news", "BLOCK")], watch=True) as socket:
        reader = Reader(socket)
        before = node.descriptors, node.threads, node.rings
        following = fleet.start(send_for_ever, sender=0)
        address = following.hear()
        killed_at = time.monotonic()
        for number in range(KILLS):
            sender, name = following, address
            sender.tell("go")
            while number not in reader.next:
                assert reader.read(PATIENCE_S)
            delays.append(time.monotonic() - killed_at)
            following = fleet.start(send_for_ever, sender=number + 1)
            address = following.hear()
            until = time.monotonic() + rng.uniform(0, 0.005)
            while (left := until - time.monotonic()) > 0:
                if number % 4:
                    reader.read(left)
            if number % 10 == 0:
                lanes += count_lanes(socket)
            killed_at = time.monotonic()
            sender.kill()
            while name not in reader.ended:
                assert reader.read(PATIENCE_S), "no notice"
        following.kill()
        while address not in reader.ended:
            assert reader.read(PATIENCE_S), "no notice"
        rows = socket.listing("endpoints", PATH)
        assert {row["address"] for row in rows} == {"org.example.bus", "reader"}
        assert socket.stats()["rx_used"] == 0
        assert (lanes > 0) == (order == "fifo")
        assert (node.descriptors, node.threads, node.rings) == before
    note(f"{KILLS} senders, {sum(reader.next.values())} messages")
    check_times("from the kill to the next sender's message", delays, 0.1)
