"""Trunks: messages between the switches of two nodes, in order, with credit, cut and spoilt."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.node.trunks import BUS, KIB, LIMIT_S, Pair

from afbus._datapath import UNICAST, Forged, sealed_memfd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.node.trunks import Client, Got

    from afbus.node.peers import LanePort
    from afbus.node.port import ClusterPort

GAP, CONFLATE, DISCONNECT, BLOCK = 1, 2, 3, 4


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two nodes that are gone after the test."""
    with contextlib.closing(Pair()) as made:
        yield made


def numbers(got: list[Got]) -> list[int]:
    """Return the sequence numbers."""
    return [one.seq for one in got]


def read_all(client: Client, count: int) -> list[Got]:
    """Wait for so many messages."""
    got: list[Got] = []
    while len(got) < count:
        some = client.read(timeout=LIMIT_S)
        assert some, f"{len(got)} of {count} came in time"
        got += some
    return got


def test_d11_order_across_nodes(pair: Pair) -> None:
    """Two senders, unicast and multicast together: each receiver reads each sender's in order."""
    senders = [pair.alpha.join() for _ in range(2)]
    one, two = pair.beta.join(), pair.beta.join(rx_bytes=8 * KIB)
    pair.name(one, b"name")
    for client in (one, two):
        pair.hear(client, b"a", BLOCK)
    count = 2000

    def send(sender: Client) -> None:
        draw = random.Random(sender.number)
        for _ in range(count):
            kind = draw.randrange(4)
            if kind == 0:
                assert sender.cast(b"a", bytes(draw.randrange(200))) == 0
            else:
                dst = (one.address, b"name", two.address)[kind - 1]
                assert sender.send(dst, bytes(draw.randrange(200))) == 0

    got: dict[Client, list[Got]] = {one: [], two: []}

    def read(reader: Client) -> None:
        while some := reader.read(timeout=2):
            got[reader] += some

    with pair.carried():
        threads = [threading.Thread(target=send, args=[sender]) for sender in senders]
        threads += [threading.Thread(target=read, args=[reader]) for reader in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for sender in senders:
        seen = [[m for m in all_ if m.src == sender.address] for all_ in got.values()]
        for messages in seen:
            assert numbers(messages) == sorted(set(numbers(messages)))
        together = {n for messages in seen for m in messages for n in _range(m)}
        assert together == set(range(1, count + 1))


def _range(got: Got) -> range:
    return range(got.gap[0], got.gap[1] + 1) if got.gap else range(got.seq, got.seq + 1)


def test_d12_a_stalled_receiver_holds_up_nobody_else(pair: Pair) -> None:
    """Its senders wait, others go on, and what is held for it has a bound."""
    sender, other = pair.alpha.join(), pair.alpha.join()
    stalled, busy = pair.beta.join(rx_bytes=16 * KIB), pair.beta.join()
    with pair.carried():
        sent = 0
        while sender.send(stalled.address, bytes(1000), timeout=0.2) == 0:
            sent += 1
        assert sent < 500
        assert other.send(stalled.address, bytes(1000), timeout=0) == 0, "its own share is left"
        for n in range(2000):
            assert sender.send(busy.address, b"%d" % n) == 0
        assert [one.data for one in read_all(busy, 2000)] == [b"%d" % n for n in range(2000)]
        stats = pair.beta.switch.trunk_stats(pair.alpha.number)
        assert 0 < stats["held_bytes"] <= 256 * KIB
        assert len(read_all(stalled, sent + 1)) == sent + 1
        assert sender.send(stalled.address, b"again") == 0
        assert read_all(stalled, 1)[0].data == b"again"


def test_d12_a_waiting_sender_is_woken_by_credit(pair: Pair) -> None:
    """It sleeps in its call until the receiver on the other node has read."""
    sender, stalled = pair.alpha.join(), pair.beta.join(rx_bytes=16 * KIB)
    with pair.carried():
        sent = 0
        while sender.send(stalled.address, bytes(1000), timeout=0.2) == 0:
            sent += 1
        outcome: list[int] = []
        thread = threading.Thread(target=lambda: outcome.append(sender.send(stalled.address, b"x")))
        thread.start()
        got = read_all(stalled, sent + 1)
        thread.join()
    assert (outcome, got[-1].data) == ([0], b"x")


def test_d12_gaps_across_are_exact(pair: Pair) -> None:
    """While nothing is carried multicasts wait for nobody: what did not go out is counted."""
    sender = pair.alpha.join()
    one, two = pair.beta.join(rx_bytes=16 << 20), pair.beta.join(rx_bytes=16 << 20)
    pair.hear(one, b"a")
    pair.hear(two, b"b")
    pair.hear(two, b"a.x")
    draw = random.Random(7)
    want: dict[Client, list[int]] = {one: [], two: []}
    for n in range(1, 601):
        topic = draw.choice([b"a", b"b", b"c", b"a.x"])
        assert sender.cast(topic, bytes(20_000), timeout=0) == 0
        if topic.startswith(b"a"):
            want[one].append(n)
        if topic in (b"b", b"a.x"):
            want[two].append(n)
    assert pair.alpha.switch.trunk_stats(2)["unconfirmed_bytes"] <= 8 << 20
    pair.carry()
    for client, all_ in want.items():
        got = client.read()
        read = [m.seq for m in got if not m.gap]
        (gap,) = [m.gap for m in got if m.gap]
        missed = [n for n in all_ if n not in read]
        assert gap == (missed[0], missed[-1], len(missed))
        assert sorted(read + missed) == all_


@pytest.mark.parametrize("source", [b"2.1", b"2.9", b"3.1"])
def test_d6_a_forged_source_ends_the_link(pair: Pair, source: bytes) -> None:
    """A node that sends from an address of another one is refused before anybody reads it."""
    sender, reader = pair.alpha.join(), pair.beta.join()
    pair.beta.switch.trunk_add(3, "gamma")
    pair.beta.switch.route_block(3, 3)
    # The switch of alpha lies: it lets its endpoint own that address.
    assert pair.alpha.switch.own(sender.number, source)
    dst = b"2.2" if source == reader.address else reader.address
    assert sender.rings.send(UNICAST, dst, source, [b"x"], [], 0, 0, 0, 0, LIMIT_S) == 0
    with pytest.raises(Forged, match=rf"the source {source.decode()} of (another|this) node"):
        pair.carry()
    assert reader.read() == []


def test_d6_a_name_of_nobody_is_refused_and_told(pair: Pair) -> None:
    """A name may have been given up while a message was on its way: only that is refused."""
    sender, reader = pair.alpha.join(), pair.beta.join()
    assert pair.alpha.switch.own(sender.number, b"name")
    for _ in range(3):
        named = (UNICAST, reader.address, b"name", [b"x"], (), 0, 0, 0, 0, LIMIT_S)
        assert sender.rings.send(*named) == 0
    assert sender.send(reader.address, b"honest") == 0
    pair.carry()
    assert [m.data for m in reader.read()] == [b"honest"]
    assert pair.beta.told == [("source", 1, b"name"), ("source", 1, b"name")]
    assert pair.beta.switch.trunk_stats(1)["forged"] == 3
    refused = errno.EADDRNOTAVAIL
    assert pair.alpha.told == [("unread", 1, 1, 3, 3, refused, reader.address)]


def test_d7_errnos_across_nodes(pair: Pair) -> None:
    """EHOSTUNREACH, EHOSTDOWN, EOPNOTSUPP, EMSGSIZE, EAGAIN of D7, for another node."""
    sender, small = pair.alpha.join(), pair.beta.join(rx_bytes=4096)
    assert sender.send(b"3.1", b"x") == -errno.EHOSTUNREACH
    assert sender.send(b"name", b"x") == -errno.EHOSTDOWN, "there is no master"
    with open(os.devnull, "rb") as file:
        fds = [file.fileno()]
        with_file = (UNICAST, small.address, b"", [b"x"], fds, 0, 0, 0, 0, LIMIT_S)
        assert sender.rings.send(*with_file) == -errno.EOPNOTSUPP
    fd = sealed_memfd([b"sealed"])
    refused = (UNICAST, small.address, b"", [b"x"], [fd], 0, 0, 0, 0, LIMIT_S)
    assert sender.rings.send(*refused) == -errno.EOPNOTSUPP
    os.close(fd)
    # What only the other node can know is told afterwards.
    assert sender.send(small.address, bytes(5000)) == 0
    assert sender.send(b"2.9", b"x") == 0
    pair.carry()
    assert pair.alpha.told == [
        ("unread", 1, 1, 1, 1, errno.EMSGSIZE, small.address),
        ("unread", 1, 2, 2, 1, errno.EHOSTUNREACH, b"2.9"),
    ]
    assert sender.send(b"2.9", b"x") == -errno.EHOSTUNREACH
    while (result := sender.send(small.address, bytes(1000), timeout=0)) == 0:
        pair.carry()
    assert result == -errno.EAGAIN
    pair.alpha.switch.trunk_set_down(2, True)
    assert sender.send(small.address, b"x") == -errno.EHOSTDOWN
    pair.alpha.switch.trunk_set_down(2, False)
    assert sender.send(small.address, bytes(1000), timeout=0) == -errno.EAGAIN


def test_d7_a_waiting_sender_reads_that_the_node_is_lost(pair: Pair) -> None:
    """Whoever waits for credit of a node that is given up is told so."""
    sender, reader = pair.alpha.join(), pair.beta.join()
    while sender.send(reader.address, bytes(10_000), timeout=0) == 0:
        pass
    outcome: list[int] = []

    def wait() -> None:
        outcome.append(sender.send(reader.address, bytes(10_000)))

    refused = pair.alpha.switch.stats(sender.number)["refused"]
    thread = threading.Thread(target=wait)
    thread.start()
    while pair.alpha.switch.stats(sender.number)["refused"] == refused:
        pass
    pair.alpha.switch.trunk_set_down(2, True)
    pair.alpha.switch.trunk_restart(2)
    thread.join()
    assert outcome == [-errno.EHOSTDOWN]


def test_d21_a_message_that_waits_when_its_node_is_lost_is_told(pair: Pair) -> None:
    """What was sent is unknown, what never went out is lost: both are told with their numbers."""
    sender, reader = pair.alpha.join(), pair.beta.join()
    for _ in range(3):
        assert sender.send(reader.address, b"sent") == 0
    assert pair.alpha.switch.take_batch(2, 64 * KIB)
    for _ in range(2):
        assert sender.send(reader.address, b"waits") == 0
    pair.alpha.switch.trunk_restart(2)
    pair.alpha.note()
    assert pair.alpha.told == [
        ("unknown", 1, 1, 3, 3, 2),
        ("unread", 1, 4, 5, 2, errno.EHOSTDOWN, reader.address),
    ]


def test_d14_large_bodies_cross_on_a_way_of_their_own(pair: Pair) -> None:
    """Whole and sealed before the message; meanwhile its sender waits, and nobody else."""
    sender, other = pair.alpha.join(), pair.alpha.join()
    reader, wanting = pair.beta.join(), pair.beta.join()
    pair.hear(wanting, b"a")
    body = random.Random(1).randbytes(3 << 20)
    assert sender.send(reader.address, body) == 0
    assert sender.send(reader.address, b"behind", timeout=0) == -errno.EAGAIN
    assert other.send(reader.address, b"other") == 0
    pair.carry()
    pair.carry_bodies()
    assert sender.cast(b"a", body[::2]) == 0
    pair.carry()
    pair.carry_bodies()
    assert sender.send(reader.address, b"behind") == 0
    pair.carry()
    assert [m.data for m in reader.read()] == [b"other", body[: 1 << 20], b"behind"]
    assert [m.data for m in wanting.read()] == [body[: 2 << 20 : 2]]
    # One that the other node does not want.
    assert sender.send(reader.address, body) == 0
    pair.alpha.note()
    ((_, trunk, ticket, _),) = [event for event in pair.alpha.told if event[0] == "body"]
    pair.alpha.switch.body_refused(trunk, ticket, errno.ENOSPC)
    pair.alpha.note()
    assert pair.alpha.told[-1] == ("unread", 1, 4, 4, 1, errno.ENOSPC, reader.address)
    with pytest.raises(FileNotFoundError):
        pair.alpha.switch.body_fd(trunk, ticket)
    with pytest.raises(ValueError, match="not sealed"), open(os.devnull, "rb") as file:
        pair.beta.switch.body_put(1, 9, file.fileno())


def test_d20_unread_messages_are_told_across(pair: Pair) -> None:
    """Who leaves without reading: its senders on other nodes are told as those here."""
    here, there = pair.beta.join(), pair.alpha.join()
    reader = pair.beta.join()
    assert [client.send(reader.address, b"x") for client in (here, there, there)] == [0] * 3
    pair.carry()
    assert pair.beta.switch.remove_endpoint(reader.number, True) == [(here.number, 1, 1, 1)]
    pair.carry()
    assert pair.alpha.told == [("unread", 1, 1, 2, 2, errno.EHOSTUNREACH, reader.address)]
    assert there.send(reader.address, b"x") == -errno.EHOSTUNREACH


def test_d15_a_notice_waits_behind_messages_of_its_node(pair: Pair) -> None:
    """A signal is in order with messages, and so is the notice that follows from it."""
    sender, reader = pair.alpha.join(), pair.beta.join(rx_bytes=4096)
    for _ in range(10):
        assert sender.send(reader.address, bytes(1000)) == 0
    pair.alpha.switch.signal(2, b"gone")
    pair.carry()
    assert pair.beta.told == [("signal", 1, b"gone")]
    pair.beta.switch.notify([reader.number], b"notice", 1)
    got = read_all(reader, 11)
    assert [m.data for m in got] == [bytes(1000)] * 10 + [b"notice"]
    assert got[-1].src == "kernel"


def test_d20_what_a_client_took_and_nobody_read_is_told_to_its_node(pair: Pair) -> None:
    """By the source that it bore, with who did not read it; what lies together in one row."""
    sender, other, reader = pair.alpha.join(), pair.alpha.join(), pair.beta.join()
    for _ in range(3):
        assert sender.send(reader.address, b"x") == 0
    pair.carry()
    give_back = pair.beta.switch.give_back
    assert give_back(1, reader.number, sender.address, (1, 1), 1)
    assert give_back(1, reader.number, sender.address, (2, 3), 2)
    assert not give_back(1, reader.number, other.address, (1, 1), 1), "it has sent nothing"
    assert not give_back(1, reader.number, b"nobody", (1, 1), 1)
    assert not give_back(1, 99, sender.address, (1, 1), 1)
    pair.carry()
    assert pair.alpha.told == [
        ("unread", sender.number, 1, 3, 3, errno.EHOSTUNREACH, reader.address)
    ]


def test_d21_the_descriptor_tells_when_there_is_something_to_send(pair: Pair) -> None:
    """Readable once for each time that the lane had nothing, and not for each message."""
    sender, reader = pair.alpha.join(), pair.beta.join()
    switch = pair.alpha.switch

    def is_readable() -> bool:
        return bool(select.select([switch.fileno()], [], [], 0)[0])

    switch.take_lane_events()
    assert not is_readable()
    for _ in range(3):
        assert sender.send(reader.address, b"x") == 0
    assert is_readable()
    assert switch.take_events() == []
    assert switch.take_lane_events() == [("ready", 2)]
    assert sender.send(reader.address, b"x") == 0
    assert not is_readable(), "it is told already"
    assert switch.take_batch(2, 64 * KIB)
    assert switch.take_batch(2, 64 * KIB) == b""
    assert sender.send(reader.address, b"x") == 0
    assert is_readable()
    # The other node confirms by itself, after a while.
    pair.cut()
    pair.carry()
    assert sender.send(reader.address, b"x") == 0
    assert pair.carry_one(pair.alpha)
    assert switch.trunk_stats(2)["unconfirmed_bytes"] > 0
    assert select.select([pair.beta.switch.fileno()], [], [], LIMIT_S)[0]
    pair.carry()
    assert switch.trunk_stats(2)["unconfirmed_bytes"] == 0
    assert switch.trunk_is_idle(2)


def test_case5_calls_that_make_no_sense(pair: Pair) -> None:
    """KeyError for what is unknown, ValueError for what cannot be."""
    switch = pair.alpha.switch
    client = pair.alpha.join()
    for call in (switch.trunk_remove, switch.trunk_restart, switch.trunk_stats):
        with pytest.raises(KeyError, match="no trunk 9"):
            call(9)
    with pytest.raises(KeyError, match="no trunk 9"):
        switch.trunk_hear(9, is_anew=True)
    with pytest.raises(KeyError):
        switch.inject(9, b"")
    with pytest.raises(KeyError):
        switch.route(BUS, b"name", 9)
    with pytest.raises(KeyError):
        switch.set_master_away(9, 2, b"master")
    with pytest.raises(KeyError):
        switch.route_block(5, 9)
    with pytest.raises(KeyError, match="no trunk 9"):
        switch.give_back(9, client.number, b"2.1", (1, 1), 1)
    with pytest.raises(ValueError, match="is there already"):
        switch.trunk_add(2, "beta")
    with pytest.raises(ValueError, match="is there already"):
        switch.add_bus(9, 512, bytes(16), 77)
    with pytest.raises(ValueError, match="a signal of"):
        switch.signal(2, bytes(1 << 20))
    with pytest.raises(ValueError, match="never sent"):
        switch.trunk_rewind(2, 1)
    with pytest.raises(ValueError, match="version"):
        switch.inject(2, bytes(100))
    switch.trunk_subscribe(2, BUS, 5, b"a", None)
    with pytest.raises(ValueError, match="match 5 is there already"):
        switch.trunk_subscribe(2, BUS, 5, b"a", None)
    assert switch.trunk_unsubscribe(2, BUS, 5)
    assert not switch.trunk_unsubscribe(2, BUS, 5)
    assert switch.unroute_block(2)
    assert not switch.unroute_block(2)
    items = (client.number, 2, client.address, b"2.1", b"items   ", b"body", 0, 0, 0)
    assert switch.deliver_away(*items) == 0
    switch.trunk_set_down(2, True)
    assert switch.deliver_away(*items) == errno.EHOSTDOWN


def _ports_of(pair: Pair) -> tuple[ClusterPort, LanePort]:
    """Let the type checker say whether the switch has what the agent wants of it."""
    return pair.alpha.switch, pair.beta.switch


class Story:
    """One sender on alpha, two readers on beta; what was sent, and what became of it."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.sender = pair.alpha.join()
        self.readers = [pair.beta.join(rx_bytes=4096) for _ in range(2)]
        for reader in self.readers:
            pair.hear(reader, b"a")
        self.sent: tuple[list[int], list[int]] = ([], [])
        self.got: tuple[list[Got], list[Got]] = ([], [])
        self.casts: list[int] = []
        self.seq = 0
        self.restarts = 0

    def send(self, which: int, size: int) -> None:
        """Send to one reader."""
        if self.sender.send(self.readers[which].address, bytes(size), timeout=0) == 0:
            self.seq += 1
            self.sent[which].append(self.seq)

    def cast(self, _which: int, size: int) -> None:
        """Send to both."""
        assert self.sender.cast(b"a", bytes(size), timeout=0) == 0
        self.seq += 1
        self.casts.append(self.seq)

    def read(self, which: int, size: int) -> None:
        """Read some messages."""
        self.got[which].extend(self.readers[which].read(1 + size // 300))

    def carry(self, which: int, size: int) -> None:
        """Carry one batch from either node."""
        self.pair.carry_one((self.pair.alpha, self.pair.beta)[which], size)

    def lose(self, which: int, size: int) -> None:
        """Take a few batches, which get lost with the link."""
        node = (self.pair.alpha, self.pair.beta)[which]
        for _ in range(size // 600):
            node.switch.take_batch(2 - which, 1500)
        self.pair.cut()

    def restart(self, which: int, size: int) -> None:
        """The lane of alpha begins anew, now and then."""
        if (which, size) < (1, 200):
            self.restarts += 1
            self.pair.alpha.switch.trunk_restart(2)
            self.pair.beta.switch.trunk_hear(1, is_anew=False)

    def end(self) -> None:
        """Let everything come through."""
        self.pair.cut()
        is_quiet = False
        while not is_quiet:
            self.pair.carry()
            stats = [self.pair.beta.switch.stats(reader.number) for reader in self.readers]
            some = [reader.read() for reader in self.readers]
            for got, messages in zip(self.got, some, strict=True):
                got.extend(messages)
            is_quiet = not any(some) and not any(of["backlog"] for of in stats)

    def check(self, which: int) -> None:
        """Each unicast was read once and in order, or told; each multicast was, or is in a gap."""
        told = [event for event in self.pair.alpha.told if event[0] in ("unknown", "unread")]
        read = [m.seq for m in self.got[which] if not m.gap]
        gaps = [m.gap for m in self.got[which] if m.gap]
        assert read == sorted(set(read))
        assert set(read) <= {*self.sent[which], *self.casts}
        for n in set(self.casts) - set(read):
            assert any(first <= n <= last for first, last, _ in gaps)
        for n in set(self.sent[which]) - set(read):
            assert any(event[2] <= n <= event[3] for event in told)
        if not self.restarts:
            assert not told
            assert sum(count for _, _, count in gaps) == len(set(self.casts) - set(read))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["send", "send", "cast", "read", "carry", "carry", "lose", "restart"]),
        st.integers(0, 1),
        st.integers(0, 2000),
    ),
    max_size=150,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_d21_each_message_once_or_reported_whatever_is_cut(
    steps: list[tuple[str, int, int]],
) -> None:
    """Batches of all sizes get lost with the link at any moment, and lanes begin anew."""
    with contextlib.closing(Pair()) as pair:
        story = Story(pair)
        for step, which, size in steps:
            getattr(story, step)(which, size)
        story.end()
        story.check(0)
        story.check(1)
        assert pair.beta.switch.trunk_stats(1)["held_bytes"] == 0
