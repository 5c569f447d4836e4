"""Loaned buffers: bodies that are written where they are sent from, and given away."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import Overflow, Terms

if TYPE_CHECKING:
    from tests.bus.conftest import Scene

    from afbus import SendLoan, Socket

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)


def write(loan: SendLoan, body: bytes) -> None:
    """Write the beginning of a loan."""
    with memoryview(loan) as view:
        view[: len(body)] = body


def descriptors() -> int:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))


def lend_to_full(scene: Scene, one: Socket, size: int) -> tuple[SendLoan, bytes]:
    """A loan to "1.2", which has no room for it, and its body."""
    body = os.urandom(size)
    loan = one.loan(size, scene.address("1.2"), (), socket.MSG_DONTWAIT)
    write(loan, body)
    for filling in (500, 9):
        scene.fill(one, scene.address("1.2"), filling)
    with pytest.raises(BlockingIOError):
        loan.send()
    return loan, body


# what is sent


@pytest.mark.parametrize("size", [0, 1, 900, 65_536, 65_537, 300_000, 16 << 20])
def test_d14_what_is_written_is_what_is_read(scene: Scene, size: int) -> None:
    """A loan of any size arrives as it was written, again and again, with what goes beside it."""
    before = descriptors()
    one, two = scene.join("1.1", "name"), scene.join("1.2")
    for turn in range(2 if size > 1 << 20 else 12):
        body = os.urandom(size)
        items = [scene.number(afbus.SCM_SERIAL, turn + 1), scene.source("name")]
        with one.loan(size, scene.address("1.2"), items) as loan:
            assert len(loan) == size
            write(loan, body)
            assert loan.send() == size
        data, found, flags, source = scene.read(two)
        assert data == body
        assert found == {afbus.SCM_SERIAL: (turn + 1).to_bytes(8, "little")}
        assert (flags, source) == (0, scene.address("name"))
    one.close()
    two.close()
    assert descriptors() <= before + 4


@pytest.mark.parametrize("size", [2000, 100_000])
def test_r18_what_is_written_in_place_is_read_in_place(scene: Scene, size: int) -> None:
    """A loan of the sender is read as a loan of the receiver, which keeps what it saw."""
    one, two = scene.join("1.1"), scene.join("1.2")
    held = []
    for turn in range(5):
        with one.loan(size, scene.address("1.2")) as loan:
            write(loan, bytes([turn]) * size)
            loan.send()
        held.append(two.recv_loan())
    for turn, got in enumerate(held):
        assert bytes(memoryview(got)) == bytes([turn]) * size
        got.release()


@pytest.mark.parametrize("size", [500, 200_000])
def test_d11_loans_are_sent_in_any_order(scene: Scene, size: int) -> None:
    """Any number may be out; they arrive in the order sent, between messages of other kinds."""
    one, two = scene.join("1.1"), scene.join("1.2")
    loans = [one.loan(size, scene.address("1.2")) for _ in range(6)]
    for number, loan in enumerate(loans):
        write(loan, b"%d" % number)
    sent = []
    for number in (3, 0, 5, 1, 4, 2):
        loans[number].send()
        one.sendto(b"after %d" % number, scene.address("1.2"))
        sent += [b"%d" % number, b"after %d" % number]
    assert [body.rstrip(b"\0") for body in scene.read_all(two)] == sent


@pytest.mark.parametrize("size", [100, 70_000, 200_000])
def test_d14_a_part_of_a_loan(scene: Scene, size: int) -> None:
    """As many bytes as were written are sent, whatever was asked for."""
    one, two = scene.join("1.1"), scene.join("1.2")
    for length in (0, 10, size // 2 + 1, size):
        with one.loan(size, scene.address("1.2")) as loan:
            write(loan, b"x" * length)
            for wrong in (-1, size + 1):
                with pytest.raises(afbus.InvalidArgument):
                    loan.send(wrong)
            assert loan.send(length) == length
        assert two.recv(1 << 20) == b"x" * length


@pytest.mark.parametrize("size", [500, 200_000])
def test_d13_one_payload_for_many_readers(scene: Scene, size: int) -> None:
    """A loan to a multicast address is written once and read by all who want to hear."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    readers = [scene.join(f"2.{n}", items=(scene.hears(Terms("a")),)) for n in range(3)]
    for turn in range(5):
        with one.loan(size, scene.multicast(), [scene.terms("a.b")]) as loan:
            write(loan, b"%d" % turn)
            loan.send()
    for reader in readers:
        assert [body.rstrip(b"\0") for body in scene.read_all(reader)] == [
            b"0",
            b"1",
            b"2",
            b"3",
            b"4",
        ]


def test_d14_descriptors_go_beside_a_loan(scene: Scene) -> None:
    """They stay the sender's, and must be open when it is sent."""
    one, two = scene.join("1.1"), scene.join("1.2")
    reader, writer = os.pipe()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, writer.to_bytes(4, "little"))
    loan = one.loan(100_000, scene.address("1.2"), [rights])
    write(loan, b"here")
    loan.send()
    data, found, _, _ = scene.read(two)
    got = int.from_bytes(found[socket.SCM_RIGHTS], "little")
    assert data[:5] == b"here\0"
    os.write(got, b"through")
    assert os.read(reader, 9) == b"through"
    late = one.loan(100_000, scene.address("1.2"), [rights])
    for descriptor in (got, reader, writer):
        os.close(descriptor)
    with pytest.raises(OSError, match="not open") as failure:
        late.send()
    assert failure.value.errno == errno.EBADF
    late.release()


# views, and the end of a loan


@pytest.mark.parametrize("size", [100, 100_000])
def test_r18_nothing_is_sent_under_a_view(scene: Scene, size: int) -> None:
    """While a view is out a loan is neither sent nor released; afterwards there is no view."""
    one, two = scene.join("1.1"), scene.join("1.2")
    loan = one.loan(size, scene.address("1.2"))
    with memoryview(loan) as view:
        assert (view.readonly, view.nbytes, view[0]) == (False, size, 0)
        for call in (loan.send, loan.release):
            with pytest.raises(BufferError, match="1 views"):
                call()
        view[0] = 7
    loan.send()
    loan.release()
    with pytest.raises(ValueError, match="sent or released"):
        loan.send()
    with pytest.raises(ValueError, match="sent or released"):
        memoryview(loan)
    assert two.recv(1 << 20)[:2] == b"\x07\0"
    with one.loan(size, scene.address("1.2")) as unsent:
        pass
    with pytest.raises(ValueError, match="sent or released"):
        unsent.send()
    assert scene.is_empty(two)


def test_d14_memory_is_given_back(scene: Scene) -> None:
    """Loans that were released, or forgotten, keep nothing."""
    one = scene.join("1.1")
    before = descriptors()
    for _ in range(50):
        one.loan(1 << 20, scene.address("1.2")).release()
        one.loan(1 << 20, scene.address("1.2"))
    assert descriptors() == before


# refusals


@pytest.mark.parametrize("size", [400, 65_537, 1 << 20])
def test_d12_d14_a_refused_loan_can_be_sent_again(scene: Scene, size: int) -> None:
    """A full receiver is EAGAIN, a timeout ETIMEDOUT; what was written stays, and is sent later."""
    one, two = scene.join("1.1"), scene.join("1.2", rx_bytes=4096)
    loan, body = lend_to_full(scene, one, size)
    one.settimeout(0.05)
    waiting = one.loan(size, scene.address("1.2"))
    write(waiting, b"late")
    with pytest.raises(TimeoutError):
        waiting.send()
    scene.read_all(two)
    one.settimeout(20)
    loan.send()
    assert two.recv(1 << 20) == body
    waiting.send()
    assert two.recv(1 << 20).rstrip(b"\0") == b"late"
    with pytest.raises(ValueError, match="sent or released"):
        loan.send()


@pytest.mark.parametrize("size", [400, 65_537, 1 << 20])
def test_d12_d14_a_refused_loan_can_be_written_again(scene: Scene, size: int) -> None:
    """It holds what it held, and whoever has it may change it."""
    one, two = scene.join("1.1"), scene.join("1.2", rx_bytes=4096)
    loan, body = lend_to_full(scene, one, size)
    scene.read_all(two)
    with memoryview(loan) as view:
        assert view == body
        view[:5] = b"again"
    loan.send()
    assert two.recv(1 << 20) == b"again" + body[5:]


@pytest.mark.parametrize("size", [10, 100_000])
def test_d7_refusals_bear_their_errno(scene: Scene, size: int) -> None:
    """Whatever is refused of a message is refused of a loan, by the same error."""
    one = scene.join("1.1")
    loan = one.loan(size, scene.address("nobody.here"))
    write(loan, b"x")
    # Nobody owns it, so it goes to the master.
    loan.send()
    assert scene.master.recv(1 << 20)[:2] == b"x\0"
    for address, kind, number in (
        (scene.multicast(EVERYTHING), afbus.Denied, errno.EPERM),
        (scene.address("@9999"), afbus.NoSuchEndpoint, errno.EHOSTUNREACH),
    ):
        refused = one.loan(size, address)
        for _ in range(2):
            with pytest.raises(kind) as failure:
                refused.send()
            assert failure.value.errno == number
        refused.release()
    foreign = one.loan(size, scene.address("1.1"), [scene.source("other")])
    with pytest.raises(afbus.NotOwned):
        foreign.send()


def test_d7_what_cannot_be_lent(scene: Scene) -> None:
    """What would never be sent is told before anything is written."""
    one = scene.join("1.1")
    there = scene.address("1.1")
    with pytest.raises(afbus.TooBig):
        one.loan((16 << 20) + 1, there)
    with pytest.raises(afbus.InvalidArgument):
        one.loan(-1, there)
    with pytest.raises(afbus.InvalidArgument):
        one.loan(1, there, (), socket.MSG_PEEK)
    for item in (scene.owned("x"), scene.terms("a")):
        with pytest.raises(afbus.InvalidArgument):
            one.loan(1, there, [item])
    for where in (scene.kernel, scene.multicast()):
        with pytest.raises(afbus.BadDestination):
            one.loan(1, where)
    one.close()
    with pytest.raises(OSError, match="closed") as failure:
        one.loan(1, there)
    assert failure.value.errno == errno.EBADF


@pytest.mark.parametrize("size", [10, 100_000])
def test_d16_a_loan_outlives_its_socket(scene: Scene, size: int) -> None:
    """What was lent is there after the socket was closed; only sent it cannot be."""
    one = scene.join("1.1")
    loan = one.loan(size, scene.address("1.1"))
    one.close()
    write(loan, b"still here")
    with pytest.raises(OSError, match="closed"):
        loan.send()
    with memoryview(loan) as view:
        assert bytes(view[:10]) == b"still here"[:size]
    loan.release()


@pytest.mark.parametrize("size", [10, 100_000])
def test_d14_a_child_of_fork_changes_nothing(scene: Scene, size: int) -> None:
    """A child that still has the loan in its memory does not keep it from being sent."""
    one, two = scene.join("1.1"), scene.join("1.2")
    loan = one.loan(size, scene.address("1.2"))
    write(loan, b"parent")
    asked, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(told)
            os.read(asked, 1)
        finally:
            os._exit(0)
    loan.send()
    os.close(told)
    os.waitpid(child, 0)
    os.close(asked)
    assert two.recv(1 << 20)[:7] == b"parent\0"


@pytest.mark.parametrize("size", [10, 100_000])
def test_d12_block_refuses_a_loan(scene: Scene, size: int) -> None:
    """A subscription for which senders wait refuses loans as it does messages."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    hears = scene.hears(Terms("a"), Overflow.BLOCK, 10_000)
    two = scene.join("1.2", items=(hears,), rx_bytes=4096)

    def send() -> int:
        with one.loan(size, scene.multicast(), [scene.terms("a")], socket.MSG_DONTWAIT) as loan:
            return loan.send()

    count = 0
    with contextlib.suppress(BlockingIOError):
        while send() == size:
            count += 1
    assert scene.read_all(two) == [bytes(size)] * count
    assert send() == size
