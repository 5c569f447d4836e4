"""The data path as Python sees it: a switch on its thread, clients, real rings and lines."""

from __future__ import annotations

import array
import errno
import mmap
import os
import random
import select
import signal
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest
from tests.datapath.world import (
    KEY,
    KIB,
    ON_THE_SWITCH,
    name_destination,
    name_source,
    open_descriptors,
    send,
    take,
)

from afbus import _datapath
from afbus._datapath import RAW, TERMS, UNICAST, Loan, Rings, sealed_memfd

if TYPE_CHECKING:
    from tests.datapath.world import World

    from afbus._datapath import Received


def test_d14_bodies_of_all_sizes_arrive_whole(world: World) -> None:
    """Inside the ring, at its border, and in a memfd beyond it."""
    one, two = world.join(), world.join()
    for size in (0, 1, 7, 8, 9, 4096, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 1 << 20, 16 << 20):
        body = random.Random(size).randbytes(size)
        assert send(one, b"1.2", body[: size // 2], body[size // 2 :]) == 0
        assert take(two) == [(body, [], 0, b"1.1")]
    assert send(one, b"1.2", bytes((16 << 20) + 1)) == -errno.EMSGSIZE


def test_d14_a_short_buffer_cuts_and_says_so(world: World) -> None:
    """As recvmsg(2): the rest is gone, and MSG_TRUNC is set."""
    one, two = world.join(), world.join()
    for size in (100, 100 * KIB):
        send(one, b"1.2", bytes(size))
        assert two.recv(1, 10, 0, False, 10) == [(bytes(10), [], socket.MSG_TRUNC, b"1.1")]
    assert two.recv(1, 10, 0, False, 0) == -errno.EAGAIN


@pytest.mark.parametrize("size", [5, 100 * KIB])
def test_r20_peek_takes_nothing(world: World, size: int) -> None:
    """Data can be looked at twice; descriptors go to whoever takes the message."""
    one, two = world.join(), world.join()
    with open(os.devnull, "rb") as file:
        send(one, b"1.2", bytes(size), fds=(file.fileno(),))
        for _ in range(2):
            ((data, items, flags, _),) = cast("list[Received]", two.recv(1, size, 4096, True, 10))
            assert (len(data), items, flags) == (size, [], socket.MSG_CTRUNC)
        ((data, items, flags, _),) = take(two)
        assert (len(data), flags) == (size, 0)
        (fd,) = array.array("i", items[0][2])
        assert os.path.sameopenfile(fd, file.fileno())
        os.close(fd)


def test_case9_descriptors_without_room_are_closed(world: World) -> None:
    """MSG_CTRUNC, and nothing leaks."""
    one, two = world.join(), world.join()
    before = open_descriptors()
    with open(os.devnull, "rb") as file:
        for _ in range(100):
            assert send(one, b"1.2", b"x", fds=(file.fileno(),) * 16) == 0
            assert two.recv(1, 10, 20, False, 10) == [(b"x", [], socket.MSG_CTRUNC, b"1.1")]
        assert send(one, b"1.2", b"x", fds=(file.fileno(),) * 17) == -errno.EMSGSIZE
    assert open_descriptors() == before


def test_case9_quota_of_descriptors_ends_with_the_reader(world: World) -> None:
    """Descriptors that nobody reads are charged to their sender, and freed with the receiver."""
    one, _two = world.join(), world.join()
    before = open_descriptors()
    sent = 0
    with open(os.devnull, "rb") as file:
        while (result := send(one, b"1.2", b"x", fds=(file.fileno(),) * 16, timeout=0)) == 0:
            sent += 1
            assert sent < 100
    assert result == -errno.EDQUOT
    assert sent == 256 // 16
    world.switch.remove_endpoint(2, True)
    assert open_descriptors() <= before


def test_d14_a_memfd_needs_all_seals(world: World) -> None:
    """Whoever passes memory that can still change is told."""
    one, two = world.join(), world.join()
    bare = os.memfd_create("bare", os.MFD_ALLOW_SEALING)
    os.write(bare, b"hello")
    assert send(one, b"1.2", b"x", fds=(bare,)) == -errno.EOPNOTSUPP
    os.close(bare)
    good = sealed_memfd([b"hel", bytearray(b"lo")])
    assert send(one, b"1.2", b"x", fds=(good,)) == 0
    os.close(good)
    ((_, items, _, _),) = take(two)
    (fd,) = array.array("i", items[0][2])
    with mmap.mmap(fd, 5, prot=mmap.PROT_READ) as view:
        assert view[:] == b"hello"
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    os.close(fd)


@ON_THE_SWITCH
def test_r18_loans_hold_their_room_until_released(world: World) -> None:
    """Zero copy: a view into the ring, given back in any order."""
    one, two = world.join(), world.join(rx_bytes=128 * KIB)
    loans: list[Loan] = []
    for number in range(3):
        assert send(one, b"1.2", bytes([number]) * 10_000) == 0
        loan = two.recv_loan(10)
        assert isinstance(loan, Loan)
        loans.append(loan)
    views = [memoryview(cast("Any", loan)) for loan in loans]
    assert [(view[0], len(view), view.readonly) for view in views] == [
        (number, 10_000, True) for number in range(3)
    ]
    with pytest.raises(BufferError):
        loans[1].release()
    for view in views:
        view.release()
    loans[1].release()
    # The first loan still holds up everything behind it; one sender may fill half of a ring.
    filled = 0
    while send(one, b"1.2", bytes(10_000), timeout=0) == 0:
        filled += 1
    assert filled == 3
    loans[0].release()
    loans[0].release()
    loans[2].release()
    with pytest.raises(ValueError, match="released"):
        memoryview(cast("Any", loans[0]))
    assert len(take(two, 10)) == filled
    assert send(one, b"1.2", bytes(10_000), timeout=0) == 0


def test_r18_a_released_loan_lets_a_sender_go_on(world: World) -> None:
    """The reader waits in one thread while another gives the loan back."""
    one, two = world.join(), world.join(rx_bytes=4 * KIB)
    assert send(one, b"1.2", bytes(3000)) == 0
    loan = two.recv_loan(10)
    assert isinstance(loan, Loan)
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.append(two.recv(1, 4000, 0, False, 30)))
    reader.start()
    sender = threading.Thread(target=lambda: got.append(send(one, b"1.2", bytes(2500), timeout=30)))
    sender.start()
    while not world.switch.stats(2)["waiting"]:
        os.sched_yield()
    loan.release()
    reader.join()
    sender.join()
    assert [1 if isinstance(one, int) else len(one[0][0]) for one in got] in ([1, 2500], [2500, 1])


def test_r18_large_bodies_are_lent_as_mappings(world: World) -> None:
    """A body in a memfd is mapped, not copied."""
    one, two = world.join(), world.join()
    body = os.urandom(1 << 20)
    assert send(one, b"1.2", body) == 0
    loan = two.recv_loan(10)
    assert isinstance(loan, Loan)
    with loan, memoryview(cast("Any", loan)) as view:
        assert view == body


def test_r22_many_messages_in_one_call(world: World) -> None:
    """Batches keep their order, mixed sizes and small rings included."""
    one, two = world.join(tx_bytes=16 * KIB), world.join(rx_bytes=32 * KIB)
    rng = random.Random(22)
    bodies = [rng.randbytes(rng.choice([0, 10, 64, 3000, 7000, 9000, 40_000])) for _ in range(3000)]
    got: list[bytes] = []

    def read() -> None:
        while len(got) < len(bodies):
            got.extend(data for data, *_ in take(two, 100))

    reader = threading.Thread(target=read)
    reader.start()
    assert one.send_many(UNICAST, b"1.2", b"", bodies, 0, 60) == (len(bodies), 0)
    reader.join()
    assert got == bodies


def test_d12_a_batch_stops_where_it_was_refused(world: World) -> None:
    """The count says how many were accepted; nothing behind the refusal is sent."""
    one, two = world.join(), world.join()
    where = [b"1.2", b"1.2", b"1.9", b"1.2"]
    result = one.send_many(UNICAST, where, b"", [b"a", b"b", b"c", b"d"], 0, 10)
    assert result == (2, -errno.EHOSTUNREACH)
    assert [data for data, *_ in take(two, 10)] == [b"a", b"b"]
    assert one.send_many(UNICAST, b"1.2", b"", [], 0, 10) == (0, 0)
    with pytest.raises(ValueError, match="1 destinations for 2"):
        one.send_many(UNICAST, [b"1.2"], b"", [b"a", b"b"], 0, 10)
    with pytest.raises(TypeError):
        one.send_many(UNICAST, b"1.2", b"", cast("Any", [1]), 0, 10)


def test_d12_a_batch_into_a_full_ring_tells_how_far_it_came(world: World) -> None:
    """Without waiting: the count, and EAGAIN; later the rest goes where it should."""
    one, two = world.join(), world.join(rx_bytes=4 * KIB)
    bodies = [bytes([number]) * 100 for number in range(100)]
    count, result = one.send_many(UNICAST, b"1.2", b"", bodies, 0, 0)
    assert result == -errno.EAGAIN
    assert 10 < count < 40
    got = [data for data, *_ in take(two, 100)]
    while count < len(bodies):
        more, _ = one.send_many(UNICAST, b"1.2", b"", bodies[count:], 0, 0)
        count += more
        got += [data for data, *_ in take(two, 100)]
    assert got == bodies


def test_d12_a_blocked_sender_goes_on_when_there_is_room(world: World) -> None:
    """And gives up when its time is over, with nothing sent."""
    one, two = world.join(), world.join(rx_bytes=4 * KIB)
    while send(one, b"1.2", bytes(1000), timeout=0) == 0:
        pass
    assert send(one, b"1.2", bytes(1001), timeout=0.05) == -errno.ETIMEDOUT
    results: list[int] = []
    sender = threading.Thread(target=lambda: results.append(send(one, b"1.2", bytes(2000))))
    sender.start()
    while not world.switch.stats(2)["waiting"]:
        os.sched_yield()
    got: list[bytes] = []
    while not got or len(got[-1]) != 2000:
        got += [data for data, *_ in take(two, 10)]
    sender.join()
    assert results == [0]
    assert bytes(1001) not in got


def test_d16_poll_says_what_the_socket_would(world: World) -> None:
    """POLLIN: there is something to read. POLLOUT: not blocked. POLLHUP: the agent is gone."""
    one, two = world.join(), world.join(rx_bytes=4 * KIB)
    for rings in (one, two):
        rings.set_pollable()
    poll = select.poll()
    poll.register(world.lines[two], select.POLLIN)
    assert poll.poll(0) == []
    for _ in range(3):
        assert send(one, b"1.2", b"x") == 0
    for left in (2, 1, 0):
        assert poll.poll(10_000)
        assert len(take(two)) == 1
        assert two.recv(1, 1, 0, True, 0) == -errno.EAGAIN or left
    assert poll.poll(0) == []
    out = select.poll()
    out.register(world.lines[one], select.POLLOUT)
    assert out.poll(0)
    while (result := send(one, b"1.2", bytes(1000), timeout=0)) == 0:
        pass
    assert result == -errno.EAGAIN
    assert out.poll(0) == []
    take(two, 100)
    assert out.poll(10_000)
    assert send(one, b"1.2", bytes(1000), timeout=0) == 0
    world.switch.close()
    poll.register(world.lines[one], select.POLLIN)
    events = dict(poll.poll(10_000))
    assert events[world.lines[one]] & select.POLLHUP


@pytest.mark.parametrize("seed", range(5))
def test_d16_a_polled_reader_never_waits_for_what_is_there(world: World, seed: int) -> None:
    """Poll, read some, poll again, with descriptors between: no wake-up gets lost."""
    one, two = world.join(), world.join(rx_bytes=8 * KIB)
    two.set_pollable()
    rng = random.Random(seed)
    total = 20_000

    def write() -> None:
        with open(os.devnull, "rb") as file:
            for number in range(total):
                fds = (file.fileno(),) if number % 97 == 0 else ()
                assert send(one, b"1.2", number.to_bytes(4, "little"), fds=fds) == 0

    writer = threading.Thread(target=write)
    writer.start()
    poll = select.poll()
    poll.register(world.lines[two], select.POLLIN)
    seen = 0
    while seen < total:
        assert poll.poll(20_000), f"the line is silent after {seen} of {total}"
        got = two.recv(rng.choice([1, 2, 50, 1000]), 4, 0, False, 0)
        for data, *_ in got if isinstance(got, list) else []:
            assert int.from_bytes(data, "little") == seen
            seen += 1
    writer.join()


def test_d7_verdicts_are_errnos_of_the_call(world: World) -> None:
    """Each refusal comes from the call that caused it."""
    one, _ = world.join(), world.join()
    assert send(one, b"1.77", b"x") == -errno.EHOSTUNREACH
    assert send(one, b"some.name", b"x") == -errno.EHOSTDOWN
    assert send(one, b"", b"x") == -errno.EDESTADDRREQ
    source = one.send(UNICAST, b"1.2", b"1.2", [b"x"], [], 0, 0, 0, 0, 10)
    assert source == -errno.EADDRNOTAVAIL
    raw = one.send(RAW, bytes(128), b"", [b"x"], [], 0, 0, 0, 0, 10)
    assert raw == -errno.EDOM
    terms = one.send(TERMS, b"news", b"", [b"x"], [], 0, 0, 0, 0, 10)
    assert terms == -errno.EPERM
    world.switch.allow_send(1, 1, b"news", None)
    assert one.send(TERMS, b"news.today", b"", [b"x"], [], 0, 0, 0, 0, 10) == 0
    with open(os.devnull, "rb") as file:
        fds = [file.fileno()]
        assert one.send(TERMS, b"news", b"", [b"x"], fds, 0, 0, 0, 0, 10) == -errno.EOPNOTSUPP
    assert one.send(TERMS, b"a..b", b"", [b"x"], [], 0, 0, 0, 0, 10) == -errno.EINVAL


def test_r15_r16_terms_and_bits_select(world: World) -> None:
    """Exact terms after the bloom; raw bits by the rule of the mail."""
    one, two, three = world.join(), world.join(), world.join()
    world.switch.allow_send(1, 1, b"", None)
    world.switch.allow_send(1, 2, None, bytes(64))
    world.switch.subscribe(2, 1, b"cpu\0host=a", None, 1, 0)
    world.switch.subscribe(3, 2, None, b"\x03" + bytes(63), 1, 0)
    assert one.send(TERMS, b"cpu.core0\0host=a", b"", [b"x"], [], 0, 0, 0, 0, 10) == 0
    ((data, items, _, source),) = take(two)
    assert (data, source) == (b"x", b"1.1")
    assert (0xAFB, 19, b"cpu.core0\0host=a") in items
    assert one.send(TERMS, b"cpu.core0\0host=b", b"", [b"x"], [], 0, 0, 0, 0, 10) == 0
    assert one.send(RAW, b"\x07" + bytes(63), b"", [b"y"], [], 0, 0, 0, 0, 10) == 0
    assert one.send(RAW, b"\x01" + bytes(63), b"", [b"z"], [], 0, 0, 0, 0, 10) == 0
    ((data, items, _, _),) = take(three)
    assert (data, items) == (b"y", [(0xAFB, 17, b"\x07" + bytes(63))])
    for rings in (two, three):
        assert rings.recv(1, 1, 0, False, 0) == -errno.EAGAIN


def test_d12_gaps_are_exact(world: World) -> None:
    """What a slow subscriber missed is told, before any later message."""
    one, two = world.join(), world.join(rx_bytes=4 * KIB)
    world.switch.allow_send(1, 1, b"", None)
    world.switch.subscribe(2, 1, b"news", None, 1, 0)
    sent = 200
    for number in range(sent):
        body = number.to_bytes(4, "little") * 50
        assert one.send(TERMS, b"news", b"", [body], [], 0, 0, 0, 0, 0) == 0
    heard: list[int] = []
    missed: list[int] = []
    while len(heard) + len(missed) < sent:
        for data, items, _, source in take(two, 3):
            gaps = [item for level, kind, item in items if (level, kind) == (0xAFB, 22)]
            if gaps:
                first, last, count, reason = struct.unpack("<QQQI", gaps[0][:28])
                assert (gaps[0][28:], source, data, reason) == (b"1.1", b"1.1", b"", 1)
                assert count == last - first + 1
                missed += range(first - 1, last)
            else:
                heard.append(int.from_bytes(data[:4], "little"))
    assert heard[0] == 0
    assert missed
    assert sorted(heard + missed) == list(range(sent))
    assert max(missed) < sent


def test_d19_a_monitor_sees_control_messages_too(world: World) -> None:
    """A copy without the items, marked as one."""
    _one, two, three = world.join(), world.join(), world.join()
    world.switch.set_monitor(3, True)
    ctl = struct.pack("<HHI8s", 1, 0, 8, b"whatever")
    world.switch.deliver(1, 2, b"1.1", b"1.2", ctl, b"body", 0, 0, 0)
    assert take(two) == [(b"body", [(0xAFB, 1, b"whatever")], 0, b"1.1")]
    ((data, items, flags, source),) = take(three)
    assert (data, flags, source) == (b"body", _datapath.MSG_MONITOR, b"1.1")
    assert (0xAFB, 17, b"1.2") in items


def test_d20_closing_ends_waits(world: World) -> None:
    """A thread that waits gets EBADF when another closes."""
    (one,) = (world.join(),)
    results: list[Any] = []
    waits = threading.Thread(target=lambda: results.append(one.recv(1, 1, 0, False, None)))
    waits.start()
    one.close()
    waits.join()
    assert results == [-errno.EBADF]
    assert one.recv(1, 1, 0, False, None) == -errno.EBADF
    assert send(one, b"1.1", b"x") == -errno.EBADF


def test_d16_the_end_of_the_agent_is_told_after_the_last_message(world: World) -> None:
    """What was delivered can still be read; then ENOTCONN."""
    one, two = world.join(), world.join()
    assert send(one, b"1.2", b"last words") == 0
    world.switch.close()
    assert [data for data, *_ in take(two, 10)] == [b"last words"]
    assert two.recv(1, 1, 0, False, None) == -errno.ENOTCONN
    assert two.recv(1, 1, 0, False, 0) == -errno.ENOTCONN
    assert send(one, b"1.2", b"x") in (-errno.ENOTCONN, -errno.ECONNABORTED)


def test_r10_signals_reach_a_waiting_thread(world: World) -> None:
    """A wait without end can be interrupted."""
    one = world.join()
    seen: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        seen.append(number)
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        main = threading.get_ident()
        timer = threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGUSR1))
        timer.start()
        with pytest.raises(InterruptedError):
            one.recv(1, 1, 0, False, None)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_case5_segments_that_are_none_are_refused(world: World) -> None:
    """Descriptors of the wrong kind give an OSError, not a crash."""
    del world
    with open(os.devnull, "rb") as file:
        null = file.fileno()
        with pytest.raises(OSError, match="sealed"):
            Rings(null, null, null, name_source, name_destination)
    with pytest.raises(ValueError, match="negative"):
        Rings(-1, -1, -1, name_source, name_destination)


def test_d18_unknown_numbers_are_key_errors(world: World) -> None:
    """The agent's own mistakes are loud."""
    world.join()
    with pytest.raises(KeyError):
        world.switch.stats(99)
    with pytest.raises(KeyError):
        world.switch.connect(99, 4096, 4096)
    with pytest.raises(KeyError):
        world.switch.attach(1, 99)
    with pytest.raises(ValueError, match="power of two"):
        world.switch.connect(1, 5000, 4096)
    with pytest.raises(ValueError, match="already"):
        world.switch.add_endpoint(1, 0, 0, 0, 0, b"")
    with pytest.raises(ValueError, match="bits"):
        world.switch.add_bus(2, 100, KEY)
    with pytest.raises(ValueError, match="128 bits on a bus of 512"):
        world.switch.subscribe(1, 1, None, bytes(16), 1, 0)


def test_d8_bits_of_terms_are_those_of_proto() -> None:
    """Rust and Python compute the same bits."""
    from afbus.proto.terms import Terms, bloom_bits

    terms = Terms.parse("sensors.cpu.core0 host=a zone=b")
    required = Terms.parse("sensors.cpu host=a")
    for width in (512, 1024, 2048):
        ours = _datapath.term_bits(KEY, width, required.pack())
        assert ours == bloom_bits(required.required_terms(), KEY, width)
        sent = bloom_bits(terms.message_terms(), KEY, width)
        assert all(a & b == a for a, b in zip(ours, sent, strict=True))
