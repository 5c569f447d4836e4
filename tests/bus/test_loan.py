"""Loaned buffers: bodies that are written where they are sent from, and given away."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import resource
import signal
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
            with pytest.raises(BufferError, match=r"in use \(1\)"):
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


# on lanes, where both sides have the memory


def warm(scene: Scene, one: Socket, two: Socket, size: int) -> None:
    """Have a lane from one to the other that has room for bodies of this size."""
    for _ in range(8):
        with one.loan(size, scene.address("1.2")) as loan:
            loan.send()
        two.recv(size)
    (bus,) = (row for row in one.listing("buses") if row["path"] == scene.path)
    assert one.stats()["lanes_out"] == (bus["order"] == "fifo")


def lent(scene: Scene, one: Socket, body: bytes) -> SendLoan:
    """A loan with this body."""
    loan = one.loan(len(body), scene.address("1.2"))
    write(loan, body)
    return loan


@pytest.mark.parametrize("size", [5000, 65_536, 1 << 20])
def test_d11_d13_more_loans_than_a_lane_has_room_for(scene: Scene, size: int) -> None:
    """What does not find room beside the others is memory of its own, and in order all the same."""
    one, two = scene.join("1.1"), scene.join("1.2")
    warm(scene, one, two, size)
    bodies = [
        b"%d" % number * 100 + bytes(size - 100 * len(b"%d" % number)) for number in range(40)
    ]
    loans = [lent(scene, one, body) for body in bodies]
    for number in range(39, -1, -1):
        loans[number].send()
        assert two.recv(size) == bodies[number]
    warm(scene, one, two, size)


@pytest.mark.parametrize("size", [5000, 300_000])
def test_d11_a_loan_outlives_its_lane(scene: Scene, size: int) -> None:
    """A lane that is closed, by what needs the agent, takes no loan with it, on either side."""
    one, two = scene.join("1.1"), scene.join("1.2")
    warm(scene, one, two, size)
    first, second = (lent(scene, one, bytes([number]) * size) for number in (1, 2))
    first.send()
    with open(os.devnull, "rb") as file:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))
        one.sendmsg([b"closes it"], [rights], 0, scene.address("1.2"))
    held = two.recv_loan()
    second.send()
    assert two.recv(99) == b"closes it"
    assert two.recv(size) == b"\x02" * size
    warm(scene, one, two, size)
    assert bytes(memoryview(held)) == b"\x01" * size
    held.release()
    assert scene.is_empty(two)


@pytest.mark.parametrize("size", [5000, 300_000])
def test_d7_d20_the_receiver_of_a_loan_goes(scene: Scene, size: int) -> None:
    """Loans to somebody who has gone are refused, and stay; what was not read is told."""
    one, two = scene.join("1.1"), scene.join("1.2")
    warm(scene, one, two, size)
    sent, unsent = lent(scene, one, b"1" * size), lent(scene, one, b"2" * size)
    sent.send()
    two.close()
    notice = scene.read_notice(one)
    assert (notice.event, notice.detail["count"]) == (afbus.Event.UNREAD, 1)
    for _ in range(2):
        with pytest.raises(afbus.NoSuchEndpoint):
            unsent.send()
    with memoryview(unsent) as view:
        assert bytes(view[:3]) == b"222"
    unsent.release()


SENDER = """
one.sendto(b"AUTH", master)
one.recv(9)
size = int(args[0])
there = (path, "1.2")
for number in range(30):
    loan = one.loan(size, there)
    with memoryview(loan) as view:
        view[:] = bytes([number]) * size
    loan.send()
unsent = one.loan(size, there)
memoryview(unsent)[:3] = b"abc"
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("size", [5000, 300_000])
def test_case2_d15_a_sender_of_loans_is_killed(scene: Scene, size: int) -> None:
    """All that it had sent is read; what it had only written is not."""
    two = scene.join("1.2")
    sender = scene.start(SENDER, size)
    scene.let_in("1.1")
    for number in range(30):
        with two.recv_loan() as loan, memoryview(loan) as view:
            assert view == bytes([number]) * size
    assert sender.wait(60) == -signal.SIGKILL
    scene.await_notice(afbus.Event.KILLED)
    assert scene.is_empty(two)


def test_d14_large_bodies_need_no_new_memory_each(scene: Scene) -> None:
    """Bodies that come and go are put where others were: the system is not asked each time."""
    one, two = scene.join("1.1"), scene.join("1.2")
    for _ in range(20):
        one.sendto(bytes(60_000), scene.address("1.2"))
        two.recv(60_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        assert one.sendmmsg([bytes(60_000)] * 3, scene.address("1.2")) == 3
        assert len(two.recvmmsg(3, 60_000)) == 3
    # A body has 15 pages.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 150 * 15 // 4


@pytest.mark.parametrize("size", [5000, 200_000])
def test_d13_many_readers_of_one_payload_keep_it_as_it_was(scene: Scene, size: int) -> None:
    """Each reader gives back for itself; what one of them holds is written over by nobody."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    # Who holds what came first gives back nothing of what came later: then senders wait so long.
    hears = scene.hears(Terms("a"), Overflow.BLOCK, 50)
    readers = [scene.join(f"2.{n}", items=(hears,)) for n in range(3)]
    held = []
    for turn in range(30):
        with one.loan(size, scene.multicast(), [scene.terms("a.b")]) as loan:
            write(loan, bytes([turn]) * size)
            loan.send()
        for number, reader in enumerate(readers):
            got = reader.recv_loan()
            assert bytes(memoryview(got)) == bytes([turn]) * size
            assert [kind for _, kind, _ in got.ancdata] == [afbus.SCM_TERMS]
            if turn % 10 == 3 * number:
                held.append((turn, got))
            else:
                got.release()
    for turn, got in held:
        assert bytes(memoryview(got)) == bytes([turn]) * size
        got.release()
    assert all(scene.is_empty(reader) for reader in readers)
