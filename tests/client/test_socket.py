"""The socket over real rings, with the real agent, and with one that tests can stop and cut."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import gc
import math
import os
import select
import socket
import struct
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from afbus.client.socket import Socket
from afbus.proto import control, errors
from afbus.proto.address import AF_BUS, BusAddress
from afbus.proto.control import BUS_SOCKET
from afbus.proto.frames import Op
from afbus.proto.match import Overflow
from afbus.proto.notice import Event, Gap, GapReason, Notice
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.client.conftest import Porter

PATH = "/tmp/test"
MASTER = BusAddress(PATH, "org.example.bus")
ROOM = 4096


# Tests that stop and start the agent.
by_porter = pytest.mark.parametrize("place", ["porter"], indirect=True)


@pytest.fixture(params=["porter", pytest.param("agent", marks=pytest.mark.cluster)])
def place(request: pytest.FixtureRequest) -> Path:
    """The door of either agent."""
    found: Path = request.getfixturevalue(request.param).place
    return found


@pytest.fixture
def make(place: Path) -> Iterator[Callable[..., Socket]]:
    """A maker of sockets, which closes them at the end."""
    with contextlib.ExitStack() as stack:

        def make_one(**options: Any) -> Socket:
            made = stack.enter_context(Socket(node=place, **options))
            made.settimeout(20)
            return made

        yield make_one


@pytest.fixture
def master(make: Callable[..., Socket]) -> Socket:
    """The master of the bus."""
    made = make()
    made.bind(MASTER)
    return made


def read_notices(one: Socket, count: int) -> list[Notice]:
    """The next notices."""
    notices = []
    for _ in range(count):
        body, source = one.recvfrom(4096)
        assert source.is_kernel
        notices.append(Notice.decode(body))
    return notices


def join(master: Socket, member: Socket, *addresses: str, items: tuple[Any, ...] = ()) -> None:
    """Let a socket join, with addresses and grants."""
    member.sendto(b"AUTH", MASTER)
    body, source = master.recvfrom(100)
    assert body == b"AUTH"
    owned = [control.encode(control.OwnedAddr(BusAddress(PATH, one))) for one in addresses]
    master.sendmsg([b"welcome"], [*owned, *map(control.encode, items)], 0, source)
    assert member.recv(100) == b"welcome"
    assert [notice.event for notice in read_notices(master, 1)] == [Event.JOINED]


def let_send_all(master: Socket) -> None:
    """Let the master send every multicast: he needs a grant too, and gives it to himself."""
    grant = control.MulticastSend(PATH.encode(), bytes(64))
    master.sendmsg([b"granted"], [control.encode(grant)], 0, MASTER)
    assert master.recv(100) == b"granted"


def subscription(what: Terms | bytes, overflow: Overflow = Overflow.GAP) -> control.MulticastMatch:
    """The command that lets a socket hear something."""
    return control.MulticastMatch(control.Match(PATH.encode(), what, overflow))


# the steps of the mail


def test_r6_r10_r11_r12_mail(master: Socket, make: Callable[..., Socket]) -> None:
    """Bind, AUTH with credentials, reply with an address, which the endpoint then has."""
    master.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, struct.pack("=i", 1))
    member = make()
    mine = struct.pack("=iII", os.getpid(), os.getuid(), os.getgid())
    credentials = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, mine)]
    assert member.sendmsg([b"AU", b"TH"], credentials, socket.MSG_NOSIGNAL, MASTER) == 4
    assert member.getsockname().is_provisional

    body, items, flags, source = master.recvmsg(100, ROOM, socket.MSG_NOSIGNAL)
    assert (body, flags, source) == (b"AUTH", 0, member.getsockname())
    found = {(level, kind): data for level, kind, data in items}
    assert found[socket.SOL_SOCKET, socket.SCM_CREDENTIALS] == mine
    identity = control.Identity.decode(found[BUS_SOCKET, control.SCM_IDENTITY])
    assert identity.pid == os.getpid()

    address = BusAddress(PATH, "1.1")
    master.sendmsg([b"OK"], [control.encode(control.OwnedAddr(address))], 0, source)
    body, items, flags, source = member.recvmsg(100, ROOM)
    assert (body, flags, source) == (b"OK", 0, MASTER)
    assert items == [(BUS_SOCKET, control.SCM_OWNED_ADDR, address.pack())]
    assert member.getsockname() == address
    assert member.addresses() == [address]
    assert member.master() == MASTER
    assert member.path == PATH.encode()


def test_r13_d6_source_is_chosen_and_stamped(master: Socket, make: Callable[..., Socket]) -> None:
    """A sender with two addresses is known by the first, or by the one that it names."""
    member = make()
    join(master, member, "1.1", "com.example.service1")
    chosen = BusAddress(PATH, "com.example.service1")
    item = (BUS_SOCKET, control.SCM_SRC_ADDR, chosen.pack())
    member.sendto(b"a", MASTER)
    member.sendmsg([b"b"], [item], 0, MASTER)
    assert master.recvfrom(9) == (b"a", BusAddress(PATH, "1.1"))
    assert master.recvfrom(9) == (b"b", chosen)


@pytest.mark.parametrize(
    "source",
    [BusAddress(PATH, "9.9"), BusAddress("/tmp/other", "1.1"), MASTER, BusAddress.kernel(PATH)],
    ids=str,
)
def test_d6_forged_source_is_not_owned(
    master: Socket, make: Callable[..., Socket], source: BusAddress
) -> None:
    """A source that the sender does not own is refused, and nothing arrives."""
    member = make()
    join(master, member, "1.1")
    item = (BUS_SOCKET, control.SCM_SRC_ADDR, source.pack())
    with pytest.raises(errors.NotOwned) as caught:
        member.sendmsg([b"forged"], [item], 0, MASTER)
    assert caught.value.errno == errno.EADDRNOTAVAIL
    with pytest.raises(BlockingIOError):
        master.recv(9, socket.MSG_DONTWAIT)


def test_r14_r15_r16_multicast_by_bits(master: Socket, make: Callable[..., Socket]) -> None:
    """A receiver hears what has all of its bits."""
    hears, sends = make(), make()
    mask, most = b"\x03" + bytes(63), b"\x07" + bytes(63)
    join(master, hears, "1.1", items=(subscription(mask),))
    allowed = control.MulticastSend(PATH.encode(), bytes(64))
    join(master, sends, "1.2", items=(allowed,))
    sends.sendto(b"one bit", BusAddress.multicast(PATH, b"\x01" + bytes(63)))
    sends.sendto(b"three bits", BusAddress.multicast(PATH, most))
    hears.setsockopt(BUS_SOCKET, control.SO_BUS_DETAILS, 1)
    assert hears.getsockopt(BUS_SOCKET, control.SO_BUS_DETAILS) == 1
    body, items, _, source = hears.recvmsg(100, ROOM)
    assert (body, source) == (b"three bits", BusAddress(PATH, "1.2"))
    found = {kind: data for _, kind, data in items}
    assert BusAddress.unpack(found[control.SCM_DST_ADDR]) == BusAddress.multicast(PATH, most)
    assert found[control.SCM_SEQ] == (3).to_bytes(8, "little")


def test_d9_multicast_by_terms(master: Socket, make: Callable[..., Socket]) -> None:
    """Terms stand beside an address without components, and are told to the receiver."""
    hears, sends = make(), make()
    join(master, hears, "1.1", items=(subscription(Terms("sensors.cpu")),))
    join(master, sends, "1.2", items=(control.MulticastSend(PATH.encode(), Terms("sensors")),))
    terms = control.encode(control.MessageTerms(Terms.of("sensors.cpu.core0", host="a")))
    everybody = BusAddress.multicast(PATH)
    sends.sendmsg([b"42"], [terms], 0, everybody)
    assert sends.sendmmsg([b"43", b"44"], everybody, 0, [terms]) == 2
    assert hears.recvmsg(9, ROOM)[:2] == (b"42", [terms])
    assert [message[0] for message in hears.recvmmsg(9, 9)] == [b"43", b"44"]
    with pytest.raises(errors.BadDestination, match="needs bits"):
        sends.sendto(b"x", everybody)
    with pytest.raises(errors.InvalidArgument, match="no components"):
        sends.sendmsg([b"x"], [terms], 0, MASTER)
    with pytest.raises(errors.Denied, match="not granted"):
        hears.sendmsg([b"x"], [terms], 0, everybody)


def test_d10_malformed_filter_is_refused(make: Callable[..., Socket]) -> None:
    """What is no program is refused with a reason; None detaches."""
    one = make()
    with pytest.raises(errors.InvalidArgument):
        one.setsockopt(BUS_SOCKET, control.SO_BUS_FILTER, b"not a program")
    one.setsockopt(BUS_SOCKET, control.SO_BUS_FILTER, None)


# refusals


def test_r3_d6_kernel_is_no_destination(master: Socket) -> None:
    """Nobody can send to the kernel's address, or to nobody."""
    for address in (BusAddress.kernel(PATH), f"{PATH}:", None):
        with pytest.raises(errors.BadDestination) as caught:
            master.sendmsg([b"x"], (), 0, address)
        assert caught.value.errno == errno.EDESTADDRREQ


def test_r10_d7_unjoined_reaches_only_the_master(
    master: Socket, make: Callable[..., Socket]
) -> None:
    """An endpoint without an address is told so; one with an address, that nobody is there."""
    one, two = make(), make()
    join(master, one, "1.1")
    assert two.attach(PATH) == MASTER
    with pytest.raises(errors.NotJoined) as caught:
        two.sendto(b"x", (PATH, "1.1"))
    assert caught.value.errno == errno.EHOSTUNREACH
    with pytest.raises(errors.NoSuchEndpoint) as other:
        one.sendto(b"x", f"{PATH}:9.9")
    assert "9.9" in str(other.value)


def test_d2_one_bus_a_socket(master: Socket, make: Callable[..., Socket]) -> None:
    """There is one master a bus, and one bus a socket."""
    one = make()
    with pytest.raises(errors.AddressInUse):
        one.bind(MASTER)
    assert one.path is None
    with pytest.raises(errors.NotJoined, match="no bus"):
        one.getsockname()
    with pytest.raises(FileNotFoundError):
        one.sendto(b"x", "/tmp/other:a")
    one.sendto(b"x", MASTER)
    with pytest.raises(errors.NoSuchEndpoint, match="/tmp/other"):
        one.sendto(b"x", "/tmp/other:a")
    with pytest.raises(errors.InvalidArgument, match="normal address"):
        one.bind(BusAddress.multicast(PATH, bytes(64)))


def test_d5_commands_only_from_the_master(master: Socket, make: Callable[..., Socket]) -> None:
    """A control item from another endpoint is EPERM, never silence."""
    member = make()
    join(master, member, "1.1")
    command = control.encode(control.OwnedAddr(BusAddress(PATH, "evil")))
    with pytest.raises(errors.Denied):
        member.sendmsg([b"x"], [command], 0, (PATH, "1.1"))
    with pytest.raises(errors.TooBig, match="message of their own"):
        master.sendmsg([bytes(65537)], [command], 0, (PATH, "1.1"))
    with pytest.raises(errors.CannotCarry):
        master.sendmsg([b"x"], [command], 0, BusAddress.multicast(PATH, bytes(64)))
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))
    with pytest.raises(errors.CannotCarry):
        master.sendmsg([b"x"], [command, rights], 0, (PATH, "1.1"))


def test_d8_other_width_is_edom(master: Socket) -> None:
    """Bits of another width than the bus's are EDOM."""
    with pytest.raises(errors.WidthMismatch, match="1024 bits"):
        master.sendto(b"x", BusAddress.multicast(PATH, bytes(128)))


def test_d7_d12_full_receiver(master: Socket, make: Callable[..., Socket]) -> None:
    """A full receiver is EAGAIN, a timeout, or a wait; and POLLOUT tells when there is room."""
    full = make(rx_bytes=4096)
    join(master, full, "1.1")
    address = BusAddress(PATH, "1.1")
    master.setblocking(False)
    number = master.fileno()
    poller = select.poll()
    poller.register(number, select.POLLOUT)
    assert poller.poll(0)
    assert master.sendto(bytes(3000), address) == 3000
    with pytest.raises(errors.RingFull, match=r"1\.1 has no room"):
        master.sendto(bytes(3000), address)
    assert not poller.poll(0)
    master.settimeout(0.01)
    with pytest.raises(TimeoutError):
        master.sendto(bytes(3000), address)
    assert full.recv(1) == b"\0"
    assert poller.poll()
    master.setblocking(False)
    assert master.sendto(bytes(3000), address) == 3000


def test_d18_share_of_a_receiver(master: Socket, make: Callable[..., Socket]) -> None:
    """For a sender that has its share of the receiver's room, the receiver is full."""
    full = make(rx_bytes=4096)
    join(master, full, "1.1")
    address = BusAddress(PATH, "1.1")
    assert 0 < master.sendmmsg([bytes(500)] * 9, address, socket.MSG_DONTWAIT) < 9
    with pytest.raises(errors.RingFull) as caught:
        master.sendto(bytes(500), socket.MSG_DONTWAIT, address)
    assert caught.value.errno == errno.EAGAIN


def test_d14_sizes(master: Socket, make: Callable[..., Socket]) -> None:
    """All sizes to 16 MiB travel; more is refused with a hint."""
    member = make()
    join(master, member, "1.1")
    for size in (0, 1, 65535, 65536, 65537, 1 << 20, 16 << 20):
        body = bytes([size % 251]) * size
        assert member.sendmsg([body[:5], memoryview(body)[5:]], (), 0, MASTER) == size
        assert master.recv(16 << 20) == body
    with pytest.raises(errors.TooBig, match="memfd"):
        member.sendto(bytes((16 << 20) + 1), MASTER)


def test_r20_descriptors_travel(master: Socket, make: Callable[..., Socket]) -> None:
    """Descriptors go to one endpoint, and are closed where there is no room."""
    member = make()
    join(master, member, "1.1")
    read, write = os.pipe()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [read, write]))
    member.sendmsg([b"x"], [rights], 0, MASTER)
    body, items, flags, _ = master.recvmsg(9, ROOM)
    assert (body, flags) == (b"x", 0)
    [(level, kind, data)] = items
    assert (level, kind) == rights[:2]
    got = array.array("i", data)
    os.write(got[1], b"through")
    assert os.read(read, 9) == b"through"
    for descriptor in (*got, write):
        os.close(descriptor)
    for room in (0, 8):
        member.sendmsg([b"x"], [(*rights[:2], array.array("i", [read]))], 0, MASTER)
        before = len(os.listdir("/proc/self/fd"))
        assert master.recvmsg(9, room)[1:3] == ([], socket.MSG_CTRUNC)
        assert len(os.listdir("/proc/self/fd")) <= before
    os.close(read)
    with pytest.raises(OSError, match=f"descriptor {read}") as caught:
        member.sendmsg([b"x"], [(*rights[:2], array.array("i", [read]))], 0, MASTER)
    assert caught.value.errno == errno.EBADF
    zero = (*rights[:2], array.array("i", [0]))
    with pytest.raises(errors.CannotCarry):
        member.sendmsg([b"x"], [zero], 0, BusAddress.multicast(PATH, bytes(64)))


ITEMS = {
    "unknown level": (99, 1, b"", errors.InvalidArgument),
    "unknown type": (BUS_SOCKET, 99, b"", errors.InvalidArgument),
    "only received": (BUS_SOCKET, control.SCM_IDENTITY, b"", errors.InvalidArgument),
    "short serial": (BUS_SOCKET, control.SCM_SERIAL, bytes(7), errors.InvalidArgument),
    "serial 0": (BUS_SOCKET, control.SCM_SERIAL, bytes(8), errors.InvalidArgument),
    "no terms": (BUS_SOCKET, control.SCM_TERMS, b"=", errors.InvalidArgument),
    "no address": (BUS_SOCKET, control.SCM_SRC_ADDR, b"x", errors.InvalidArgument),
    "no command": (BUS_SOCKET, control.SCM_OWNED_ADDR, b"x", errors.InvalidArgument),
    "deadline alone": (BUS_SOCKET, control.SCM_DEADLINE, b"\1\0\0\0", errors.InvalidArgument),
    "half a descriptor": (socket.SOL_SOCKET, socket.SCM_RIGHTS, b"xx", errors.InvalidArgument),
    "17 descriptors": (socket.SOL_SOCKET, socket.SCM_RIGHTS, bytes(17 * 4), errors.TooBig),
    "short ucred": (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, b"x", errors.InvalidArgument),
    "other ucred": (
        socket.SOL_SOCKET,
        socket.SCM_CREDENTIALS,
        struct.pack("=iII", 1, os.getuid(), os.getgid()),
        errors.Denied,
    ),
}


@pytest.mark.parametrize(("level", "kind", "data", "error"), ITEMS.values(), ids=ITEMS)
def test_d5_bad_item_is_refused(
    master: Socket, level: int, kind: int, data: bytes, error: type[Exception]
) -> None:
    """No item that makes no sense is passed over."""
    with pytest.raises(error):
        master.sendmsg([b"x"], [(level, kind, data)], 0, MASTER)
    with pytest.raises(BlockingIOError):
        master.recv(9, socket.MSG_DONTWAIT)


def test_d5_item_twice_is_refused(master: Socket) -> None:
    """Of two serials none would be right."""
    serial = control.encode(control.Serial(1))
    with pytest.raises(errors.InvalidArgument, match="twice"):
        master.sendmsg([b"x"], [serial, serial], 0, MASTER)


BAD_CALLS: dict[str, Callable[[Socket], object]] = {
    "send flag": lambda one: one.sendto(b"x", socket.MSG_OOB, MASTER),
    "receive flag": lambda one: one.recv(1, socket.MSG_OOB),
    "loan flag": lambda one: one.recv_loan(socket.MSG_PEEK),
    "negative size": lambda one: one.recv(-1),
    "negative room": lambda one: one.recvmsg(1, -1),
    "no messages": lambda one: one.recvmmsg(0, 1),
    "too small a buffer": lambda one: one.recv_into(bytearray(1), 2),
    "no buffer": lambda one: one.recv_into(bytearray()),
    "address of another type": lambda one: one.sendto(b"x", 42),  # type: ignore[call-overload]  # what is tested
    "address without a path": lambda one: one.sendto(b"x", "nobody"),
    "addresses of two kinds": lambda one: one.sendmmsg(
        [b"x", b"y"], [MASTER, BusAddress.multicast(PATH, bytes(64))]
    ),
    "too few addresses": lambda one: one.sendmmsg([b"x", b"y"], [MASTER]),
    "serial for many": lambda one: one.sendmmsg(
        [b"x"], MASTER, 0, [control.encode(control.Serial(1))]
    ),
    "timeout": lambda one: one.settimeout(-1),
    "no number": lambda one: one.settimeout(math.nan),
    "ring size": lambda one: one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096),
    "unknown option": lambda one: one.setsockopt(BUS_SOCKET, 99, 1),
    "value": lambda one: one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 2),
    "blob": lambda one: one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, b"12345"),
    "read unknown option": lambda one: one.getsockopt(BUS_SOCKET, 99),
    "read too short": lambda one: one.getsockopt(BUS_SOCKET, control.SO_BUS_ADDRESSES, 367),
    "shutdown": lambda one: one.shutdown(3),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_argument_is_einval(master: Socket, call: Callable[[Socket], object]) -> None:
    """What makes no sense in itself is InvalidArgument, which is also a ValueError."""
    with pytest.raises(errors.InvalidArgument):
        call(master)


def test_wrong_number_of_arguments_is_a_type_error(master: Socket) -> None:
    """As in Python's own socket."""
    with pytest.raises(TypeError):
        master.sendto(b"x")  # type: ignore[call-overload]  # what is tested


@pytest.mark.parametrize("size", [0, 4095, 5000, 128 << 20])
def test_d13_ring_sizes_are_powers_of_two(make: Callable[..., Socket], size: int) -> None:
    """Another size is refused before anything is done."""
    with pytest.raises(errors.InvalidArgument, match="tx_bytes"):
        make(tx_bytes=size)


# receiving


def test_truncation_and_peek(master: Socket) -> None:
    """MSG_PEEK, MSG_TRUNC and MSG_CTRUNC mean what they mean in Linux."""
    items = [control.encode(control.Serial(7)), control.encode(control.ReplyTo(8))]
    for _ in range(4):
        master.sendmsg([b"0123456789"], items, 0, MASTER)
    assert master.recv(4, socket.MSG_PEEK) == b"0123"
    assert len(master.recv(0, socket.MSG_PEEK | socket.MSG_TRUNC)) == 10
    flags = socket.MSG_TRUNC | socket.MSG_CTRUNC
    assert master.recvmsg(4) == (b"0123", [], flags, MASTER)
    assert master.recvmsg(4, 24, socket.MSG_CMSG_CLOEXEC) == (b"0123", items[:1], flags, MASTER)
    whole = (b"0123456789", items, socket.MSG_TRUNC, MASTER)
    assert master.recvmsg(4, ROOM, socket.MSG_TRUNC) == whole
    buffer = bytearray(4)
    assert master.recvfrom_into(buffer, 3, socket.MSG_TRUNC) == (10, MASTER)
    assert buffer == b"012\0"


def test_batches(master: Socket, make: Callable[..., Socket]) -> None:
    """Batches keep their order; what stops one is met again by the next call."""
    one, two = make(), make()
    join(master, one, "1.1")
    join(master, two, "1.2")
    bodies = [b"%d" % number for number in range(500)]
    assert master.sendmmsg(bodies, f"{PATH}:1.1") == 500
    got: list[bytes] = []
    while len(got) < 500:
        got += [message[0] for message in one.recvmmsg(100, 100)]
    assert got == bodies
    first, second, nobody = ((PATH, name) for name in ("1.1", "1.2", "9.9"))
    assert master.sendmmsg([b"a", b"b", b"c", b"d"], [first, second, nobody, first]) == 2
    with pytest.raises(errors.NoSuchEndpoint):
        master.sendmmsg([b"c", b"d"], [nobody, first])
    assert (one.recv(9), two.recv(9)) == (b"a", b"b")
    assert master.sendmmsg([], first) == 0


def test_r18_loan_is_the_ring_itself(master: Socket) -> None:
    """A loan shows the message without a copy until it is released."""
    serial = control.encode(control.Serial(7))
    master.sendmsg([b"in the ring"], [serial], 0, MASTER)
    with master.recv_loan() as loan:
        assert bytes(memoryview(loan)) == b"in the ring"
        assert (loan.address, loan.ancdata, loan.flags) == (MASTER, [serial], 0)
    with pytest.raises(BlockingIOError):
        master.recv_loan(socket.MSG_DONTWAIT)


def gap_of(error: errors.MessagesLost) -> Gap:
    """The gap that an error tells of."""
    gap = error.gap
    assert isinstance(gap, Gap)
    assert (error.errno, gap.reason) == (errno.ENOBUFS, GapReason.FULL)
    return gap


def receive_by_recv(one: Socket) -> list[bytes | Gap]:
    """One body."""
    return [one.recv(3, socket.MSG_DONTWAIT)]


def receive_by_recvmmsg(one: Socket) -> list[bytes | Gap]:
    """Many bodies."""
    return [message[0] for message in one.recvmmsg(100, 3, 0, socket.MSG_DONTWAIT)]


def receive_by_recvmsg(one: Socket) -> list[bytes | Gap]:
    """One body, or the item of one gap."""
    body, items, _, source = one.recvmsg(3, ROOM, socket.MSG_DONTWAIT)
    assert source == MASTER
    item = control.decode(*items[0])
    return [item if isinstance(item, Gap) else body]


@pytest.mark.parametrize("receive", [receive_by_recv, receive_by_recvmmsg, receive_by_recvmsg])
def test_d12_gap_is_never_skipped(
    master: Socket, make: Callable[..., Socket], receive: Callable[[Socket], list[bytes | Gap]]
) -> None:
    """However one receives: gaps stand in their places, and account for all that is missing."""
    slow = make(rx_bytes=4096)
    join(master, slow, "1.1", items=(subscription(bytes(64)),))
    let_send_all(master)
    target = BusAddress.multicast(PATH, bytes(64))
    got: list[bytes | Gap] = []
    sent = iter(range(42))
    # The first round fills the ring; the second follows when it is empty again.
    for count in (40, 2):
        for number in [next(sent) for _ in range(count)]:
            master.sendto(b"%02d\0" % number + bytes(500), target)
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    got += receive(slow)
                except errors.MessagesLost as error:
                    got.append(gap_of(error))
    expected = 0
    for one in got:
        if isinstance(one, Gap):
            expected += one.count
        else:
            assert int(one.rstrip(b"\0")) == expected
            expected += 1
    assert expected == 42
    assert any(isinstance(one, Gap) for one in got)


# waiting


def test_timeouts(master: Socket) -> None:
    """None waits, 0 never does, and everything else raises TimeoutError."""
    master.setblocking(False)
    assert (master.gettimeout(), master.getblocking()) == (0.0, False)
    with pytest.raises(BlockingIOError):
        master.recv(1)
    master.settimeout(0.001)
    with pytest.raises(TimeoutError):
        master.recvmsg(1)
    with pytest.raises(TimeoutError):
        master.recv_loan()
    master.setblocking(True)
    assert (master.gettimeout(), master.getblocking()) == (None, True)
    with pytest.raises(BlockingIOError):
        master.recv(1, socket.MSG_DONTWAIT)


@by_porter
def test_d16_descriptor_can_be_polled(master: Socket, porter: Porter) -> None:
    """POLLIN says that something is there, however it is asked, and POLLHUP the agent's end."""
    number = master.fileno()
    assert number == master.fileno()
    assert not os.get_inheritable(number)
    poller = select.poll()
    poller.register(number, select.POLLIN)
    with select.epoll() as epoll:
        epoll.register(number, select.EPOLLIN)
        assert not poller.poll(0)
        for body in (b"1", b"2"):
            master.sendto(body, MASTER)
        for body in (b"1", b"2"):
            assert select.select([master], [], [], 20)[0]
            assert poller.poll() == [(number, select.POLLIN)]
            assert epoll.poll() == [(number, select.EPOLLIN)]
            assert master.recv(9) == body
        with pytest.raises(BlockingIOError):
            master.recv(9, socket.MSG_DONTWAIT)
        assert not poller.poll(0)
        assert not epoll.poll(0)
        porter.die()
        assert poller.poll()[0][1] & select.POLLHUP


async def test_asyncio_watches_the_descriptor(master: Socket) -> None:
    """`add_reader` calls when something is there."""
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    loop.add_reader(master, arrived.set)
    master.sendto(b"x", MASTER)
    async with asyncio.timeout(20):
        await arrived.wait()
    loop.remove_reader(master)
    assert master.recv(9) == b"x"


def test_one_thread_sends_while_one_receives(master: Socket, make: Callable[..., Socket]) -> None:
    """Two threads share a socket; every message comes back in its order."""
    echo = make()
    join(master, echo, "1.1")
    numbers = range(2000)

    def answer() -> None:
        for _ in numbers:
            body, source = echo.recvfrom(9)
            echo.sendto(body, source)

    def ask() -> None:
        for number in numbers:
            master.sendto(b"%d" % number, (PATH, "1.1"))

    threads = [threading.Thread(target=answer), threading.Thread(target=ask)]
    for thread in threads:
        thread.start()
    assert [int(master.recv(9)) for _ in numbers] == list(numbers)
    for thread in threads:
        thread.join()


# options


def test_options(master: Socket) -> None:
    """Options are ints, or bytes where a length is given."""
    ints = {
        socket.SO_TYPE: socket.SOCK_DGRAM,
        socket.SO_DOMAIN: AF_BUS,
        socket.SO_PROTOCOL: 0,
        socket.SO_ERROR: 0,
        socket.SO_RCVBUF: 1 << 20,
        socket.SO_SNDBUF: 256 << 10,
        socket.SO_PASSCRED: 0,
    }
    for name, value in ints.items():
        assert master.getsockopt(socket.SOL_SOCKET, name) == value
    assert master.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE, 4) == struct.pack("=i", 2)
    assert (master.family, master.type, master.proto) == (AF_BUS, socket.SOCK_DGRAM, 0)
    packed = MASTER.pack()
    assert master.getsockopt(BUS_SOCKET, control.SO_BUS_ADDRESSES, 4096) == packed
    assert master.getsockopt(BUS_SOCKET, control.SO_BUS_MASTER, 368) == packed
    assert master.getsockopt(BUS_SOCKET, control.SO_BUS_STATE, 4096)
    assert master.getsockopt(BUS_SOCKET, control.SO_BUS_STATS, 4096)
    assert master.state()["agent"] == "here"
    assert master.stats()["sent"] == 0
    assert master.status()["epoch"] == 1


@by_porter
def test_listing_takes_all_pages(master: Socket) -> None:
    """The rows of all answers are one list."""
    assert master.listing("buses") == [{"number": 0}, {"number": 1}, {"number": 2}]


# the end of a socket


def test_d20_shutdown(master: Socket, make: Callable[..., Socket]) -> None:
    """A half-close lets the other half live; nothing blocks after SHUT_RD."""
    one = make()
    one.sendto(b"last", MASTER)
    one.shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenPipeError, match="shut down") as caught:
        one.sendto(b"x", MASTER)
    assert caught.value.errno == errno.EPIPE
    assert master.recv(9) == b"last"
    master.sendto(b"mine", MASTER)
    master.shutdown(socket.SHUT_RD)
    assert master.recv(9) == b"mine"
    assert master.recvmsg(9) == (b"", [], 0, None)
    with master.recv_loan() as loan:
        assert len(loan) == 0


def test_d20_closed_socket_is_ebadf(master: Socket) -> None:
    """As in Python's own: `fileno` is -1, everything else EBADF, a second close harmless."""
    assert "/tmp/test" in repr(master)
    number = master.fileno()
    master.close()
    master.close()
    assert master.fileno() == -1
    assert "closed" in repr(master)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)
    calls: list[Callable[[], object]] = [
        lambda: master.recv(1),
        lambda: master.sendto(b"x", MASTER),
        lambda: master.sendmmsg([b"x"], MASTER),
        master.recv_loan,
        master.getsockname,
        lambda: master.bind(MASTER),
    ]
    for call in calls:
        with pytest.raises(OSError, match="closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_close_ends_a_wait_in_another_thread(master: Socket) -> None:
    """Who waits is told that the socket is closed."""
    caught: list[int | None] = []
    begun = threading.Event()

    def wait() -> None:
        begun.set()
        try:
            master.recv(1)
        except OSError as error:
            caught.append(error.errno)

    thread = threading.Thread(target=wait)
    thread.start()
    begun.wait()
    master.close()
    thread.join()
    assert caught == [errno.EBADF]


def test_unclosed_socket_is_a_resource_warning(porter: Porter) -> None:
    """Who forgets to close is told, and nothing leaks."""
    forgotten = Socket(node=porter.place)
    number = forgotten.fileno()
    with pytest.warns(ResourceWarning, match="unclosed"):  # noqa: PT031 (forgetting takes two)
        del forgotten
        gc.collect()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)


def test_case4_nothing_is_left_of_closed_sockets(porter: Porter) -> None:
    """A hundred sockets later there are as many descriptors as before."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        with Socket(node=porter.place) as one:
            one.fileno()
    assert not porter.guests
    # The porter's ends of the last door and line are closed after his answer: one more visit later.
    while len(os.listdir("/proc/self/fd")) > before + 1:
        Socket(node=porter.place).close()


def test_socket_is_not_inherited_over_fork(master: Socket) -> None:
    """A child can do nothing with it; the parent's goes on."""
    master.sendto(b"before", MASTER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            master.close()
            for call in (
                lambda: master.recv(9),
                lambda: master.sendto(b"x", MASTER),
                lambda: master.connect(MASTER),
                lambda: master.send(b"x"),
                master.getpeername,
                master.stats,
            ):
                with pytest.raises(errors.NotConnected, match="not inherited"):
                    call()
            assert "inherited" in repr(master)
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    master.sendto(b"after", MASTER)
    assert (master.recv(9), master.recv(9)) == (b"before", b"after")
    assert master.stats()["sent"] == 2


# the end of the agent


@by_porter
def test_d16_agent_that_forgot(master: Socket, porter: Porter) -> None:
    """What the old agent delivered is read, its end told once, and then what is lost."""
    master.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    number = master.fileno()
    for body in (b"1", b"2"):
        master.sendto(body, MASTER)
    porter.die()
    assert master.recv(9) == b"1"
    assert master.recv(9) == b"2"
    with pytest.raises(errors.NotConnected, match="gone"):
        master.recv(9)
    with pytest.raises(errors.NoAgent):
        master.recv(9, socket.MSG_DONTWAIT)
    master.settimeout(0.01)
    with pytest.raises(TimeoutError, match="no agent"):
        master.recv(9)
    master.settimeout(20)
    porter.start()
    gap, revoked = read_notices(master, 2)
    assert (gap.event, gap.detail) == (Event.GAP, {"reason": GapReason.AGENT_RESTART})
    assert (revoked.event, revoked.subject) == (Event.REVOKED, (b"org.example.bus",))
    assert "master of its bus again" in revoked.reason
    assert master.fileno() == number
    assert master.getsockname() == MASTER
    with pytest.raises(BlockingIOError):
        master.recv(9, socket.MSG_DONTWAIT)
    assert not select.select([number], [], [], 0)[0]
    master.sendto(b"3", MASTER)
    assert select.select([number], [], [], 20)[0]
    body, items, _, _ = master.recvmsg(9, ROOM)
    assert body == b"3"
    assert items, "SO_PASSCRED is set again"


@by_porter
def test_d16_sender_meets_the_end_first(master: Socket, porter: Porter) -> None:
    """What lies in the old ring outlives it, and makes the descriptor readable."""
    number = master.fileno()
    read, write = os.pipe()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))
    master.sendmsg([b"old"], [rights], 0, MASTER)
    porter.keeps = True
    porter.die()
    porter.start()
    with pytest.raises(errors.NotConnected):
        master.stats()
    assert master.sendto(b"new", MASTER) == 3
    assert select.select([number], [], [], 20)[0]
    assert master.recvmsg(9, ROOM, socket.MSG_PEEK)[:2] == (b"old", [])
    body, items, _, _ = master.recvmsg(9, ROOM)
    assert (body, len(items)) == (b"old", 1)
    os.close(array.array("i", items[0][2])[0])
    [gap] = read_notices(master, 1)
    assert gap.event is Event.GAP
    assert select.select([number], [], [], 20)[0]
    assert master.recv(9) == b"new"
    os.close(read)
    os.close(write)


@by_porter
def test_d16_notices_can_be_loans(master: Socket, porter: Porter) -> None:
    """A receiver of loans gets what lies in no ring too."""
    porter.die()
    porter.start()
    with pytest.raises(errors.NotConnected):
        master.recv_loan()
    with master.recv_loan() as loan:
        assert Notice.decode(bytes(memoryview(loan))).event is Event.GAP
        assert (loan.address, loan.ancdata, loan.flags) == (BusAddress.kernel(PATH), [], 0)
    assert Notice.decode(master.recv(4096)).event is Event.REVOKED


@by_porter
def test_d16_bus_that_is_gone(master: Socket, make: Callable[..., Socket], porter: Porter) -> None:
    """A member whose bus has not come back is on none, and joins with its next send."""
    member = make()
    join(master, member, "1.1")
    porter.die()
    porter.start()
    with pytest.raises(errors.NotConnected):
        member.getsockname()
    assert member.addresses() == []
    assert member.path is None
    _, revoked = read_notices(member, 2)
    assert "no bus" in revoked.reason
    with pytest.raises(errors.NoBus):
        member.sendto(b"x", MASTER)
    with pytest.raises(errors.NotConnected):
        master.stats()
    assert [notice.event for notice in read_notices(master, 2)] == [Event.GAP, Event.REVOKED]
    join(master, member, "1.2")


@by_porter
def test_d16_farewell_is_told(master: Socket, porter: Porter) -> None:
    """The reason that the agent gave is in the error."""
    porter.cut("you were too slow")
    with pytest.raises(errors.NotConnected, match="you were too slow"):
        master.recv(9)


@by_porter
def test_case3_receiver_waits_for_the_agent(master: Socket, porter: Porter) -> None:
    """A blocked receiver is told, tries again, and goes on when there is an agent."""
    got: list[object] = []
    told, back = threading.Event(), threading.Event()

    def receive() -> None:
        try:
            master.recv(9)
        except errors.NotConnected as error:
            got.append(error.errno)
        told.set()
        got.extend(notice.event for notice in read_notices(master, 2))
        back.set()
        got.append(master.recv(9))

    thread = threading.Thread(target=receive)
    thread.start()
    porter.die()
    told.wait()
    porter.start()
    back.wait()
    master.sendto(b"again", MASTER)
    thread.join()
    assert got == [errno.ENOTCONN, Event.GAP, Event.REVOKED, b"again"]


@by_porter
def test_d21_outcome_of_a_command_is_unknown(
    master: Socket, make: Callable[..., Socket], porter: Porter
) -> None:
    """A command whose verdict never came may have been carried out."""
    member = make()
    join(master, member, "1.1")
    porter.cut_after = Op.CONTROL
    command = control.encode(control.OwnedAddr(BusAddress(PATH, "1.2")))
    with pytest.raises(errors.OutcomeUnknown, match="before it answered"):
        master.sendmsg([b"x"], [command], 0, (PATH, "1.1"))
    with pytest.raises(errors.NotConnected):
        master.stats()
