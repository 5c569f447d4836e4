"""Subscribers that do not read, and what it costs the others: nothing."""

from __future__ import annotations

import contextlib
import select
import signal
import struct
import time
from typing import TYPE_CHECKING

import pytest
from tests.cases.actors import ITEMS, MULTICAST, PATH, Stage, about
from tests.cases.bodies import pack_body, read_body
from tests.cases.conftest import quantile
from tests.figures import IS_FULL, note

from afbus.client.ancillary import find_gap
from afbus.proto.address import BusAddress
from afbus.proto.errors import NotConnected
from afbus.proto.notice import GapReason

if TYPE_CHECKING:
    from tests.cases.actors import Actor, Fleet
    from tests.cases.conftest import Node

STOP_S = 30.0 if IS_FULL else 3.0
SLOT_S = 0.005
SLOT_MESSAGES = 10
BODY_BYTES = 1024
RING_BYTES = 1 << 17
#: Of the others: enough for four seconds without the processor.
OTHERS_RING_BYTES = 1 << 23
OTHERS = 9
#: What becomes of those who are stopped.
WAYS = {"fifo": ("GAP", "DISCONNECT"), "total": ("GAP", "CONFLATE", "DISCONNECT")}
#: How much more memory the agent may need while somebody stands still, beyond what is in its ring:
#: what its allocator takes at once, and a third of what one of them would need in 3 s (30 s: less).
SLACK_KIB = 2048
_STAMP = struct.Struct("<d")


def publish(stage: Stage) -> None:
    """Send by the clock, each message with its time; tell the next number whenever asked."""
    one = stage.join()
    number = 0
    stage.tell("ready")
    stage.hear()
    slot = time.monotonic()
    while True:
        for _ in range(SLOT_MESSAGES):
            body = pack_body(0, number, BODY_BYTES) + _STAMP.pack(time.monotonic())
            assert one.sendmsg([body], [about("news")], 0, MULTICAST)
            number += 1
        slot += SLOT_S
        with contextlib.suppress(ValueError):  # late already
            select.select([], [], [], slot - time.monotonic())
        if stage.has_news():
            match stage.hear():
                case "count":
                    stage.tell(number)
                case names:
                    for name in names:
                        one.sendto(b"end", BusAddress(PATH, name))
                    stage.tell(number)
                    return


def subscribe(stage: Stage, overflow: str, rx_bytes: int) -> None:
    """Read to the end; account for each message, and measure how long it took."""
    one = stage.join(listen=[("news", overflow)], rx_bytes=rx_bytes)
    stage.tell(one.getsockname().address.decode())
    took: list[float] = []
    got: list[int] = []
    gaps: list[tuple[int, int, int, int]] = []
    following = 0
    ended = ""
    while not ended:
        try:
            found = one.recvmmsg(64, 1 << 16, ITEMS)
        except NotConnected as error:
            ended = error.message
            break
        now = time.monotonic()
        for data, items, _, source in found:
            if source.is_kernel:
                continue
            if (gap := find_gap(items)) is not None:
                # Numbers of the gap count from 1, and the sender's first message was its wish.
                gaps.append((gap.first - 2, gap.last - 2, gap.count, gap.reason))
                following += gap.count
                continue
            if data == b"end":
                ended = "end"
                break
            _, number = read_body(data[: -_STAMP.size])
            if overflow == "CONFLATE":
                assert number >= following, "older than one before"
            else:
                assert number == following, "missing, and in no gap before it"
            following = number + 1
            got.append(number)
            took.append(now - _STAMP.unpack(data[-_STAMP.size :])[0])
    replaced = one.stats()["conflated"] if ended == "end" else 0
    stage.tell(
        {
            "ended": ended,
            "got": len(got),
            "following": following,
            "missed": sum(gap[2] for gap in gaps),
            "replaced": replaced,
            "gaps": gaps,
        }
    )
    while True:
        first, last = stage.hear()
        part = [each for number, each in zip(got, took, strict=True) if first <= number < last]
        stage.tell([quantile(part, 0.5), quantile(part, 0.99)])


def wait_until_sent(publisher: Actor, number: int) -> int:
    """Wait until the publisher has sent so many messages; return how many it has."""
    while True:
        publisher.tell("count")
        count = publisher.hear()
        if count >= number:
            return int(count)


@pytest.mark.cluster
@pytest.mark.slow
def test_case7_d12_stopped_subscriber_delays_nobody(node: Node, fleet: Fleet, order: str) -> None:
    """Of a dozen subscribers some are stopped: the others miss nothing, and are not slower.

    Each of those that stood still is treated as it asked to be: one reads gaps that account for
    every message, one the newest of them, one is cut off. The agent needs no memory for them.
    It takes 3 s of standing still, 30 s with AFBUS_TEST_FULL. What a match conflates goes by the
    switch: without such a one the others may have it on a lane.
    """
    node.start()
    fleet.start_master(order=order)
    publisher = fleet.start(publish)
    assert publisher.hear() == "ready"
    ways = WAYS[order]
    stopped = {way: fleet.start(subscribe, overflow=way, rx_bytes=RING_BYTES) for way in ways}
    others = [
        fleet.start(subscribe, overflow="GAP", rx_bytes=OTHERS_RING_BYTES) for _ in range(OTHERS)
    ]
    names = [actor.hear() for actor in (*stopped.values(), *others)]
    publisher.tell("go")
    rate = SLOT_MESSAGES / SLOT_S
    first = wait_until_sent(publisher, int(rate * STOP_S))
    memory = node.memory_kib("RssAnon")
    for actor in stopped.values():
        actor.send_signal(signal.SIGSTOP)
    second = wait_until_sent(publisher, first + int(rate * STOP_S))
    grown = node.memory_kib("RssAnon") - memory
    for actor in stopped.values():
        actor.send_signal(signal.SIGCONT)
    wait_until_sent(publisher, second + 1000)
    publisher.tell([name for name in names if name != names[-OTHERS - 1]])
    count = publisher.hear()
    publisher.finish()
    figures = []
    for actor in others:
        report = actor.hear()
        assert (report["ended"], report["got"], report["gaps"]) == ("end", count, [])
        parts = []
        for part in ((0, first), (first, second)):
            actor.tell(part)
            parts.append(actor.hear())
        figures.append([value for part in parts for value in part])
    for what, at in (("median", 0), ("p99", 1)):
        before, during = (max(one[at + place] for one in figures) for place in (0, 2))
        note(
            f"{what} of the slowest of {OTHERS} others, {1e6 * before:.0f} us before and "
            f"{1e6 * during:.0f} us while some stood still for {STOP_S:.0f} s"
        )
    ended = {way: actor.hear() for way, actor in stopped.items()}
    gap, disconnect = ended["GAP"], ended["DISCONNECT"]
    note(f"GAP: {gap['got']} read, {gap['missed']} missed in {len(gap['gaps'])} gaps")
    note(f"the agent's own memory grew by {grown} KiB")
    for report in (ended[way] for way in ways if way != "DISCONNECT"):
        assert (report["ended"], report["following"]) == ("end", count)
        assert report["got"] + report["missed"] + report["replaced"] == count
    for start, last, lost, reason in gap["gaps"]:
        assert (last - start + 1, GapReason.FULL) == (lost, reason)
    assert gap["gaps"]
    if (conflate := ended.get("CONFLATE")) is not None:
        note(f"CONFLATE: {conflate['got']} read, {conflate['replaced']} replaced by newer ones")
        assert conflate["replaced"]
    assert "its ring was full" in disconnect["ended"]
    assert grown <= SLACK_KIB
