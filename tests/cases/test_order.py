"""Order under load: several processes send to several others, in all the ways that there are."""

from __future__ import annotations

import hashlib
import random
import struct
from typing import TYPE_CHECKING

import pytest
from tests.cases.actors import MULTICAST, PATH, Stage, about, join
from tests.cases.bodies import HEADER, pack_body, read_body
from tests.cases.conftest import check_lanes
from tests.figures import note

from afbus.proto.address import BusAddress

if TYPE_CHECKING:
    from tests.cases.actors import Fleet
    from tests.cases.conftest import Node

SENDERS = 4
READERS = 4
MESSAGES = 100_000
#: By turns so many of all kinds, and so many without multicasts, which end lanes.
PHASE = 2000
#: Who hears only one of the two topics.
HALF_DEAF = READERS - 1
# The size of the noise tells what a message is: the last one, or about which topic, or a unicast.
LAST_BYTES, A, B, UNICAST = 0, 1, 2, 0
_NUMBER = struct.Struct("<I")


class Tally:
    """Numbers in their order, as a count and a hash."""

    def __init__(self) -> None:
        self.count = 0
        self._hash = hashlib.sha256()

    def add(self, *numbers: int) -> None:
        """Note what is next."""
        self.count += 1
        for number in numbers:
            self._hash.update(_NUMBER.pack(number))

    def result(self) -> tuple[int, str]:
        """What two who saw the same have in common."""
        return self.count, self._hash.hexdigest()


def send_mixed(stage: Stage, sender: int) -> None:
    """Send by unicast, in batches, by multicast, in the ring and beside it; tell what to whom."""
    rng = random.Random(sender)
    one = stage.join()
    readers = [BusAddress(PATH, f"r{index}") for index in range(READERS)]
    tallies = [Tally() for _ in readers]
    stage.tell("ready")
    stage.hear()
    number = 0
    while number < MESSAGES:
        size = 3 * rng.choice((1, 10, 100, 25_000 if rng.randrange(50) == 0 else 1))
        to = rng.randrange(READERS)
        match rng.randrange(number // PHASE % 2, 4):
            case 0:
                topic = rng.choice((A, B))
                item = about("news.a" if topic == A else "news.b")
                one.sendmsg([pack_body(sender, number, size + topic)], [item], 0, MULTICAST)
                for index, tally in enumerate(tallies):
                    if topic == A or index != HALF_DEAF:
                        tally.add(number)
                number += 1
            case 1:
                count = rng.randrange(2, 30)
                bodies = [pack_body(sender, number + each, 30) for each in range(count)]
                for _ in range(one.sendmmsg(bodies, readers[to])):
                    tallies[to].add(number)
                    number += 1
            case _:
                one.sendto(pack_body(sender, number, size), readers[to])
                tallies[to].add(number)
                number += 1
    for reader in readers:
        one.sendto(pack_body(sender, number, LAST_BYTES), reader)
    stage.tell([tally.result() for tally in tallies])
    stage.hear()


def read_mixed(stage: Stage, index: int) -> None:
    """Read to the end; tell what came from whom, and the order of multicasts among them all."""
    topics = ["news.a"] if index == HALF_DEAF else ["news.a", "news.b"]
    one = stage.join(name=f"r{index}", listen=[(topic, "BLOCK") for topic in topics])
    by_sender = [Tally() for _ in range(SENDERS)]
    about_a, about_any = Tally(), Tally()
    last = [-1] * SENDERS
    left = SENDERS
    stage.tell("ready")
    while left:
        for data, _, _, _ in one.recvmmsg(64, 1 << 18, 4096):
            sender, number = read_body(data)
            assert number > last[sender], "out of the order of its sender"
            last[sender] = number
            size = len(data) - HEADER.size
            if size == LAST_BYTES:
                left -= 1
                continue
            by_sender[sender].add(number)
            if size % 3 != UNICAST:
                about_any.add(sender, number)
            if size % 3 == A:
                about_a.add(sender, number)
    tallies = [tally.result() for tally in by_sender]
    stage.tell([tallies, about_a.result(), about_any.result()])


@pytest.mark.cluster
@pytest.mark.slow
def test_d11_order_under_load(node: Node, fleet: Fleet, order: str) -> None:
    """Each gets all that is for it, in the order of each sender.

    Multicasts come in one order for all, where the bus is of that order. Nothing is missing: a full
    ring makes senders wait.
    """
    node.start()
    fleet.start_master(order=order)
    readers = [fleet.start(read_mixed, index=index) for index in range(READERS)]
    senders = [fleet.start(send_mixed, sender=number) for number in range(SENDERS)]
    for actor in (*readers, *senders):
        assert actor.hear() == "ready"
    for sender in senders:
        sender.tell("go")
    with join(node.place) as witness:
        check_lanes(witness, order)
    sent = [sender.hear() for sender in senders]
    got = [reader.hear() for reader in readers]
    for index, (by_sender, about_a, about_any) in enumerate(got):
        assert by_sender == [each[index] for each in sent]
        assert about_a[0] == got[0][1][0]
        assert about_any[0] == (about_a if index == HALF_DEAF else got[0][2])[0]
        if order == "total":
            assert about_a == got[0][1]
            assert about_any == (about_a if index == HALF_DEAF else got[0][2])
    received = sum(count for by_sender, _, _ in got for count, _ in by_sender)
    note(
        f"{SENDERS * MESSAGES} messages of {SENDERS} senders, {received} received, "
        f"{got[0][2][0]} multicasts"
    )
