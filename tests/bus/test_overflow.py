"""Full receivers of multicasts: gaps that account for everything, and the other ways (D12)."""

from __future__ import annotations

import errno
import random
import socket
import threading
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import Event, Gap, GapReason, Overflow, Terms
from afbus.proto import control

if TYPE_CHECKING:
    from tests.bus.conftest import Scene

    from afbus import BusAddress, Socket

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)


def read_next(who: Socket, flags: int = 0) -> tuple[bytes, int, Gap | None, BusAddress]:
    """The next message: body, sequence number, gap, source."""
    body, items, _, source = who.recvmsg(1 << 20, 1024, flags)
    gap, number = None, 0
    for item in items:
        match control.decode(*item):
            case Gap() as found:
                assert body == b""
                gap = found
            case control.Sequence(value):
                number = value
    return body, number, gap, source


class Account:
    """What one receiver got and was told that it missed, checked against what was sent."""

    def __init__(self) -> None:
        #: Numbers of each source that are accounted for.
        self.upto: dict[bytes, int] = {}
        self.heard = 0
        self.missed = 0

    def take(self, number: int, gap: Gap | None, source: bytes) -> None:
        """Take the next thing; what it leaves out must have been told before."""
        before = self.upto.get(source, 0)
        if gap is None:
            assert number == before + 1, "nothing is missing without a gap before it"
            self.heard += 1
            self.upto[source] = number
        else:
            assert gap.source == source
            assert gap.first == before + 1
            assert gap.count == gap.last - gap.first + 1
            assert gap.reason is GapReason.FULL
            self.missed += gap.count
            self.upto[source] = gap.last


def test_d12_case7_gaps_account_for_every_message(scene: Scene) -> None:
    """A slow reader of three senders: heard and missed add up, and each gap is in its place."""
    slow = scene.join("1.9", items=(scene.hears(EVERYTHING),), rx_bytes=8192)
    slow.setsockopt(afbus.BUS_SOCKET, afbus.SO_BUS_DETAILS, 1)
    senders = [
        scene.join(f"1.{number}", items=(scene.may_send(EVERYTHING),)) for number in (1, 2, 3)
    ]
    draw = random.Random(12)
    account = Account()
    # They have sent AUTH before they came to be heard.
    account.upto = {b"1.%d" % number: 1 for number in (1, 2, 3)}
    sent = 0
    for _ in range(300):
        for _ in range(draw.randint(1, 30)):
            draw.choice(senders).sendto(
                bytes(draw.choice([10, 500, 2000])), scene.multicast(EVERYTHING)
            )
            sent += 1
        for _ in range(draw.randint(0, 10)):
            if scene.is_empty(slow):
                break
            _, number, gap, source = read_next(slow)
            account.take(number, gap, source.address)
    while account.heard + account.missed < sent:
        _, number, gap, source = read_next(slow)
        account.take(number, gap, source.address)
    assert account.heard + account.missed == sent
    assert scene.is_empty(slow)
    assert account.missed > 0
    assert slow.stats()["missed"] == account.missed
    for sender, number in zip(senders, (1, 2, 3), strict=True):
        assert account.upto[b"1.%d" % number] == sender.stats()["sent"]


def test_d12_gap_counts_only_what_was_for_the_reader(scene: Scene) -> None:
    """Of a range of the sender's numbers, the count says how many the reader would have had."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    slow = scene.join("1.2", items=(scene.hears(Terms("mine")),), rx_bytes=4096)
    slow.setsockopt(afbus.BUS_SOCKET, afbus.SO_BUS_DETAILS, 1)
    for number in range(100):
        topic = "mine" if number % 4 == 0 else "others"
        one.sendmsg([bytes(1000)], [scene.terms(topic)], 0, scene.multicast())
    heard = []
    while True:
        _, number, gap, _ = read_next(slow)
        if gap is not None:
            break
        heard.append(number)
    assert heard == list(range(2, 2 + 4 * len(heard), 4))
    assert (gap.first, gap.count) == (heard[-1] + 4, 25 - len(heard))
    assert gap.last == 98
    assert scene.is_empty(slow)


def test_d12_gap_comes_without_a_later_message(scene: Scene) -> None:
    """A reader learns what it missed even if nobody ever says anything again."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    slow = scene.join("1.2", items=(scene.hears(EVERYTHING),), rx_bytes=4096)
    for number in range(10):
        one.sendto(b"%1000d" % number, scene.multicast(EVERYTHING))
    heard = 0
    while (found := read_next(slow))[2] is None:
        assert int(found[0]) == heard
        heard += 1
    assert found[2].count == 10 - heard


def test_d12_gap_precedes_unicasts_and_notices_too(scene: Scene) -> None:
    """Whatever the sender says later, by whatever way, is read behind the gap."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    slow = scene.join("1.2", items=(scene.hears(EVERYTHING), scene.flags(1)), rx_bytes=4096)
    for number in range(10):
        one.sendto(b"%1000d" % number, scene.multicast(EVERYTHING))
    sender = threading.Thread(target=one.sendto, args=(b"unicast", scene.address("1.2")))
    sender.start()
    heard = []
    while True:
        body, _, gap, _ = read_next(slow)
        heard.append(gap.count if gap else body)
        if body == b"unicast":
            break
    sender.join()
    bodies = [int(body) for body in heard[:-2] if isinstance(body, bytes)]
    assert bodies == list(range(len(bodies)))
    assert heard[len(bodies) :] == [10 - len(bodies), b"unicast"]
    one.close()
    assert scene.read_notice(slow).event is Event.LEFT


def test_d12_reader_without_room_for_the_gap_is_told_by_an_error(scene: Scene) -> None:
    """`recv` has no control items: it raises, once, in the place where messages are missing."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    slow = scene.join("1.2", items=(scene.hears(EVERYTHING),), rx_bytes=4096)
    for number in range(10):
        one.sendto(b"%1000d" % number, scene.multicast(EVERYTHING))
    heard = 0
    while read_next(slow, socket.MSG_PEEK)[2] is None:
        assert int(slow.recv(1000)) == heard
        heard += 1
    for flags in (socket.MSG_PEEK, 0):
        with pytest.raises(afbus.MessagesLost) as caught:
            slow.recv(1000, flags)
    assert caught.value.errno == errno.ENOBUFS
    assert isinstance(caught.value.gap, Gap)
    assert caught.value.gap.count == 10 - heard
    one.sendto(b"%1000d" % 10, scene.multicast(EVERYTHING))
    assert int(slow.recv(1000)) == 10


def test_d12_case7_slow_reader_delays_nobody(scene: Scene) -> None:
    """While one never reads, another gets everything, and no send waits or is refused."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    scene.join("1.2", items=(scene.hears(EVERYTHING),), rx_bytes=4096)
    fast = scene.join("1.3", items=(scene.hears(EVERYTHING),))
    one.setblocking(False)
    for number in range(2000):
        one.sendto(b"%200d" % number, scene.multicast(EVERYTHING))
        if number % 100 == 99:
            assert [int(body) for body in scene.read_all(fast)] == list(
                range(number - 99, number + 1)
            )


def test_d12_conflate_keeps_the_newest_of_each_stream(scene: Scene) -> None:
    """Who wants only the newest reads the newest of each sender and address, and no gap."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.may_send(EVERYTHING),))
    lazy = scene.join(
        "1.3",
        items=(scene.hears(Terms("temperature"), Overflow.CONFLATE), scene.hears(Terms("event"))),
    )
    for number in range(100):
        for room in "ab":
            for sender in (one, two):
                item = scene.terms(f"temperature room={room}")
                sender.sendmsg([b"%s %d" % (room.encode(), number)], [item], 0, scene.multicast())
        if number % 50 == 0:
            one.sendmsg([b"event %d" % number], [scene.terms("event")], 0, scene.multicast())
    heard: dict[tuple[str, bytes], list[int]] = {}
    newest = 0
    while newest < 4:
        body, _, gap, source = read_next(lazy)
        assert gap is None
        name, text = body.split()
        heard.setdefault((source.address.decode(), name), []).append(int(text))
        newest += text == b"99"
    assert heard.pop(("1.1", b"event")) == [0, 50]
    assert set(heard) == {(source, room) for source in ("1.1", "1.2") for room in (b"a", b"b")}
    for numbers in heard.values():
        assert numbers == sorted(set(numbers))
        assert numbers[-1] == 99, "the newest is never lost"
        assert len(numbers) <= 4
    assert lazy.stats()["missed"] == 0
    assert lazy.stats()["conflated"] > 300


def test_d12_conflate_delivers_everything_to_a_fast_reader(scene: Scene) -> None:
    """Who keeps up misses nothing."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    fast = scene.join("1.2", items=(scene.hears(EVERYTHING, Overflow.CONFLATE),))
    for number in range(200):
        one.sendto(b"%d" % number, scene.multicast(EVERYTHING))
        assert int(fast.recv(99)) == number


def test_d12_block_holds_the_sender_up(scene: Scene) -> None:
    """A subscriber that asked for it loses nothing: who sends waits for it."""
    slow = scene.join(
        "1.2", items=(scene.hears(EVERYTHING, Overflow.BLOCK, 60_000),), rx_bytes=4096
    )
    program = """
one.sendto(b"AUTH", master)
one.recv(9)
everybody = afbus.BusAddress.multicast(path, bytes(64))
for number in range(300):
    one.sendto(b"%300d" % number, everybody)
one.close()
"""
    sender = scene.start(program)
    scene.let_in("1.1", items=(scene.may_send(EVERYTHING),))
    for number in range(300):
        body, _, gap, _ = read_next(slow)
        assert gap is None
        assert int(body) == number
    assert sender.wait() == 0


def test_d12_block_is_eagain_for_who_does_not_wait(scene: Scene) -> None:
    """And then nobody gets the message, neither the full subscriber nor the others."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    slow = scene.join(
        "1.2", items=(scene.hears(EVERYTHING, Overflow.BLOCK, 60_000),), rx_bytes=4096
    )
    other = scene.join("1.3", items=(scene.hears(EVERYTHING),))
    sent = scene.fill(one, scene.multicast(EVERYTHING))
    with pytest.raises(BlockingIOError):
        one.sendmsg([bytes(500)], [], socket.MSG_DONTWAIT, scene.multicast(EVERYTHING))
    assert [int(body) for body in scene.read_all(other)] == list(range(sent))
    assert [int(body) for body in scene.read_all(slow)] == list(range(sent))
    one.sendto(b"again", scene.multicast(EVERYTHING))
    assert slow.recv(9) == other.recv(9) == b"again"


def test_d12_block_ends_at_its_deadline(scene: Scene) -> None:
    """After that the message passes: others get it, the slow one a gap that says why."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    slow = scene.join("1.2", items=(scene.hears(EVERYTHING, Overflow.BLOCK, 20),), rx_bytes=4096)
    other = scene.join("1.3", items=(scene.hears(EVERYTHING),))
    for number in range(30):
        one.sendto(b"%500d" % number, scene.multicast(EVERYTHING))
    assert [int(body) for body in scene.read_all(other)] == list(range(30))
    heard = 0
    while (found := read_next(slow))[2] is None:
        assert int(found[0]) == heard
        heard += 1
    assert (found[2].count, found[2].reason) == (30 - heard, GapReason.DEADLINE)


def test_d12_strongest_wish_of_one_reader_counts(scene: Scene) -> None:
    """Of two matches that fit one message, the one that loses less says what happens."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    scene.join(
        "1.2",
        items=(
            scene.hears(Terms("a")),
            scene.hears(Terms("a.b"), Overflow.BLOCK, 60_000),
        ),
        rx_bytes=4096,
    )
    for _ in range(50):
        one.sendmsg([bytes(500)], [scene.terms("a")], socket.MSG_DONTWAIT, scene.multicast())
    with pytest.raises(BlockingIOError):
        one.sendmsg([bytes(500)], [scene.terms("a.b")], socket.MSG_DONTWAIT, scene.multicast())


@pytest.mark.parametrize("what", ["match revoked", "match replaced", "filter", "right revoked"])
def test_d12_d5_sender_waits_no_longer_than_there_is_reason(scene: Scene, what: str) -> None:
    """A sender that waits for a subscriber goes on when that one is no subscriber any more."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    slow = scene.join(
        "1.2", items=(scene.hears(EVERYTHING, Overflow.BLOCK, 60_000),), rx_bytes=4096
    )
    one.settimeout(30)
    scene.fill(one, scene.multicast(EVERYTHING), 1000)
    outcome: list[int | None] = []

    def wait() -> None:
        try:
            outcome.append(one.sendto(bytes(1000), scene.multicast(EVERYTHING)))
        except OSError as error:
            outcome.append(error.errno)

    thread = threading.Thread(target=wait)
    thread.start()
    while not any(row["waiting"] for row in scene.master.listing("queues", scene.path)):
        pass
    match what:
        case "match revoked":
            scene.command(scene.address("1.2"), scene.deaf_to(EVERYTHING))
        case "match replaced":
            scene.command(scene.address("1.2"), scene.hears(EVERYTHING, Overflow.GAP))
        case "filter":
            nothing = b"\xb7" + bytes(7) + b"\x95" + bytes(7)
            slow.setsockopt(afbus.BUS_SOCKET, afbus.SO_BUS_FILTER, nothing)
        case "right revoked":
            scene.command(scene.address("1.1"), scene.may_not_send(EVERYTHING))
    thread.join()
    assert outcome == [errno.EPERM if what == "right revoked" else 1000]


@pytest.mark.parametrize(
    ("overflow", "deadline_ms"),
    [(Overflow.BLOCK, 0), (Overflow.BLOCK, 60_001), (Overflow.GAP, 5), (Overflow.CONFLATE, 5)],
)
def test_d12_deadline_where_there_can_be_none(
    scene: Scene, overflow: Overflow, deadline_ms: int
) -> None:
    """Blocking has a deadline of at most a minute, and nothing else has one."""
    with pytest.raises(afbus.InvalidArgument):
        scene.hears(EVERYTHING, overflow, deadline_ms)


def test_d12_d14_large_bodies_count_too(scene: Scene) -> None:
    """A body in a memfd that finds no room is in the gap as any other."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    slow = scene.join("1.2", items=(scene.hears(EVERYTHING),), rx_bytes=4096)
    slow.setsockopt(afbus.BUS_SOCKET, afbus.SO_BUS_DETAILS, 1)
    account = Account()
    account.upto = {b"1.1": 1}
    for number in range(60):
        one.sendto(bytes(70_000 if number % 2 else 100), scene.multicast(EVERYTHING))
    while account.heard + account.missed < 60:
        _, number, gap, source = read_next(slow)
        account.take(number, gap, source.address)
    assert account.missed > 0
    assert scene.is_empty(slow)
