"""What a sender is told, of odd arguments and by agents that give no verdict or a wrong one."""

from __future__ import annotations

import array
import errno
import os
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest
from tests.datapath.puppet import HEAD, SLEEPS
from tests.datapath.world import KIB, send, take

from afbus._datapath import TERMS, UNICAST

if TYPE_CHECKING:
    from tests.datapath.puppet import Puppet
    from tests.datapath.world import World


def test_d7_what_no_record_can_say_is_refused_before_it_is_written(world: World) -> None:
    """A caller's mistake is an errno of its call, and no reason to cut the endpoint off."""
    one, two = world.join(tx_bytes=64 * KIB), world.join()
    assert one.send(UNICAST, b"x" * 70_000, b"", [b"y"], [], 0, 0, 0, 0, 1) == -errno.ENAMETOOLONG
    assert one.send(UNICAST, b"1.2", b"x" * 257, [b"y"], [], 0, 0, 0, 0, 1) == -errno.ENAMETOOLONG
    assert one.send(9, b"1.2", b"", [b"y"], [], 0, 0, 0, 0, 1) == -errno.EINVAL
    assert one.send_many(UNICAST, b"x" * 70_000, b"", [b"y"], 0, 1) == (0, -errno.ENAMETOOLONG)
    assert one.send_many(UNICAST, b"1.2", b"x" * 257, [b"y"], 0, 1) == (0, -errno.ENAMETOOLONG)
    assert one.send_many(0, b"1.2", b"", [b"y"], 0, 1) == (0, -errno.EINVAL)
    several = [b"1.2", b"1.2", b"x" * 70_000, b"1.2"]
    result = one.send_many(UNICAST, several, b"", [b"a", b"b", b"c", b"d"], 0, 1)
    assert result == (2, -errno.ENAMETOOLONG)
    assert [data for data, *_ in take(two, 9)] == [b"a", b"b"]
    assert world.switch.take_events() == []
    assert one.send(TERMS, b"x" * 65_500, b"", [b"y"], [], 0, 0, 0, 0, 1) == -errno.EMSGSIZE
    assert send(one, b"1.2", b"still there") == 0


def test_d14_buffers_of_all_kinds(world: World) -> None:
    """Items of any size, parts of any number; what is not contiguous is a BufferError."""
    one, two = world.join(), world.join()
    numbers = array.array("q", range(1000))
    assert one.send(UNICAST, b"1.2", b"", [numbers, b"", bytearray(b"end")], [], 0, 0, 0, 0, 1) == 0
    assert take(two)[0][0] == numbers.tobytes() + b"end"
    gaps = memoryview(bytes(100))[::2]
    with pytest.raises(BufferError):
        one.send(UNICAST, b"1.2", b"", [gaps], [], 0, 0, 0, 0, 1)
    with pytest.raises(BufferError):
        one.send_many(UNICAST, b"1.2", b"", [b"a", gaps], 0, 1)
    growing = bytearray(5)
    assert one.send_many(UNICAST, b"1.2", b"", [growing, memoryview(growing)[1:3]], 0, 1) == (2, 0)
    growing.append(0)
    assert [len(data) for data, *_ in take(two, 9)] == [5, 2]
    assert send(one, b"1.2") == 0
    assert two.recv(9, 0, 0, False, 1) == [(b"", [], 0, b"1.1")]


def test_d12_a_batch_with_something_that_is_no_buffer_sends_nothing(world: World) -> None:
    """Not now, and not together with the next message either."""
    one, two = world.join(), world.join()
    with pytest.raises(TypeError):
        one.send_many(UNICAST, b"1.2", b"", cast("Any", [b"a", b"b", 1]), 0, 10)
    assert send(one, b"1.2", b"next") == 0
    assert [data for data, *_ in take(two, 9)] == [b"next"]


def test_d21_what_has_no_verdict_in_time_is_unknown(puppet: Puppet) -> None:
    """And those that come after it get verdicts of their own."""
    assert puppet.send(b"first") == -errno.ECONNABORTED
    results: list[int] = []
    second = threading.Thread(target=lambda: results.append(puppet.send(b"second", timeout=30)))
    second.start()
    puppet.await_records(2)
    puppet.settle(1, -errno.EPERM)
    second.join()
    assert results == [-errno.EPERM]


def test_d21_what_was_never_shown_is_not_unknown(puppet: Puppet) -> None:
    """While older messages without a verdict fill the ring, a message has not been sent."""
    assert puppet.send(bytes(1900)) == -errno.ECONNABORTED
    assert puppet.send(bytes(1900)) == -errno.ECONNABORTED
    head = puppet.tx.get(HEAD)
    assert puppet.send(bytes(1000)) == -errno.ETIMEDOUT
    assert puppet.rings.send_many(UNICAST, b"1.2", b"", [bytes(1000)], 0, 0.01) == (
        0,
        -errno.ETIMEDOUT,
    )
    assert puppet.tx.get(HEAD) == head


def test_d21_descriptors_never_go_ahead_of_a_message_that_does_not(puppet: Puppet) -> None:
    """Or the next message would be given the descriptors of this one."""
    assert puppet.send(bytes(1900)) == -errno.ECONNABORTED
    assert puppet.send(bytes(1900)) == -errno.ECONNABORTED
    with open(os.devnull, "rb") as file:
        assert puppet.send(bytes(1000), fds=(file.fileno(),)) == -errno.ETIMEDOUT
    with pytest.raises(BlockingIOError):
        puppet.line.recv(100)


def test_d21_a_batch_counts_the_verdicts_that_it_got(puppet: Puppet) -> None:
    """When the time is over, the count is of those accepted till then."""
    results: list[tuple[int, int]] = []

    def batch() -> None:
        bodies = [bytes([n]) * 500 for n in range(20)]
        results.append(puppet.rings.send_many(UNICAST, b"1.2", b"", bodies, 0, 0.2))

    sender = threading.Thread(target=batch)
    sender.start()
    puppet.await_records(5)
    puppet.settle(1)
    sender.join()
    assert results == [(1, -errno.ECONNABORTED)]


def test_d16_a_batch_into_a_dying_agent_is_unknown_and_not_unsent(puppet: Puppet) -> None:
    """What was shown to it before must not be sent again."""
    results: list[tuple[int, int]] = []

    def batch() -> None:
        bodies = [bytes([n]) * 500 for n in range(20)]
        results.append(puppet.rings.send_many(UNICAST, b"1.2", b"", bodies, 0, 30))

    sender = threading.Thread(target=batch)
    sender.start()
    puppet.await_records(5)
    puppet.tx.set(SLEEPS, 1)
    puppet.line.close()
    puppet.settle(1, 1)
    sender.join()
    assert results == [(2, -errno.ECONNABORTED)]


def test_d16_an_agent_that_died_in_its_sleep_has_seen_nothing(puppet: Puppet) -> None:
    """So the message was not sent, and nobody else will find it in the ring."""
    puppet.tx.set(SLEEPS, 1)
    puppet.line.close()
    assert puppet.send(b"x", timeout=None) == -errno.ENOTCONN
    assert puppet.rings.send_many(UNICAST, b"1.2", b"", [b"x"], 0, None) == (0, -errno.ENOTCONN)
    assert puppet.tx.get(HEAD) == 0


def test_d16_an_agent_that_died_at_work_may_have_sent_it(puppet: Puppet) -> None:
    """The outcome is unknown, without a timeout too; but not that of what comes later."""
    results: list[int] = []
    sender = threading.Thread(target=lambda: results.append(puppet.send(b"x", timeout=None)))
    sender.start()
    puppet.await_records(1)
    puppet.line.close()
    sender.join()
    assert results == [-errno.ECONNABORTED]
    assert puppet.send(b"x", timeout=None) == -errno.ENOTCONN


@pytest.mark.parametrize("verdict", [0, 2, -5000])
def test_case5_a_verdict_that_is_none_is_no_success(puppet: Puppet, verdict: int) -> None:
    """The agent broke a rule."""
    results: list[int] = []
    sender = threading.Thread(target=lambda: results.append(puppet.send(b"x", timeout=30)))
    sender.start()
    puppet.await_records(1)
    puppet.settle(verdict)
    sender.join()
    assert results == [-errno.EBADMSG]
