"""What a receiver makes of an agent that lies or dies, and of records that fail half way."""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.datapath.puppet import BODY_IN_MEMFD, GAP, HEAD, MESSAGE, NOTICE, TAIL, Puppet
from tests.datapath.world import KIB, is_readable, open_descriptors, send, take

from afbus._datapath import Loan

if TYPE_CHECKING:
    from tests.datapath.world import World

Items: TypeAlias = "list[tuple[int, int, bytes]]"

#: Of sections: mostly such as fit into the record.
LENGTHS = st.sampled_from([0, 0, 3, 8, 16, 24, 1000])


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<IBBBx", 72, GAP, BODY_IN_MEMFD, 1),  # a gap is never in a memfd
        struct.pack("<IBBBx", 72, MESSAGE, BODY_IN_MEMFD, 0),  # a memfd without a descriptor
        struct.pack("<IBBBx", 72, 77, 0, 0),
        struct.pack("<IBBBx", 72, MESSAGE, 0, 200),
        struct.pack("<IBBBx", 1 << 31, MESSAGE, 0, 0),
        struct.pack("<IBBBx", 3, MESSAGE, 0, 0),
    ],
)
def test_case5_records_that_break_a_rule(puppet: Puppet, raw: bytes) -> None:
    """Each is told, nothing is read that is not there."""
    puppet.deliver(MESSAGE, b"1.2", b"", raw=raw)
    for _ in range(2):
        assert puppet.rings.recv(1, 1 << 24, 4096, False, 0) == -errno.EBADMSG
    assert puppet.rings.recv_loan(0) == -errno.EBADMSG


def borrow(puppet: Puppet) -> Items:
    """Return the items of a loan, which comes back at once."""
    loan = puppet.rings.recv_loan(0)
    return loan.ancdata if isinstance(loan, Loan) else []


def take_items(puppet: Puppet) -> Items:
    """Return the items of a message."""
    got = puppet.rings.recv(1, 1 << 24, 1 << 16, False, 0)
    return got[0][1] if isinstance(got, list) else []


def close_descriptors(items: Items) -> None:
    """Close the descriptors that came with a message."""
    for level, kind, data in items:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            for fd in array.array("i", data):
                os.close(fd)


@given(
    kind=st.integers(0, 5),
    flags=st.integers(0, 31),
    fds=st.integers(0, 3),
    sections=st.tuples(LENGTHS, LENGTHS, LENGTHS, LENGTHS, LENGTHS),
    lends=st.booleans(),
)
def test_case5_records_of_noise(
    kind: int, flags: int, fds: int, sections: tuple[int, int, int, int, int], lends: bool
) -> None:
    """Whatever the agent writes: an answer or an errno, and no descriptor leaks."""
    before = open_descriptors()
    src, dst, ident, ctl, body = sections
    raw = struct.pack("<IBBBx", 88, kind, flags, fds) + bytes(36)
    raw += struct.pack("<HHHHIII", src, dst, ident, 0, ctl, body, 0)
    with contextlib.closing(Puppet()) as puppet, open(os.devnull, "rb") as file:
        for _ in range(3):
            socket.send_fds(puppet.line, [b"f"], [file.fileno()] * fds)
        puppet.deliver(MESSAGE, b"1.2", bytes(16), raw=raw)
        puppet.rings.recv(1, 1 << 24, 1 << 16, True, 0)
        with contextlib.suppress(OSError):
            close_descriptors(borrow(puppet) if lends else take_items(puppet))
    assert open_descriptors() == before


def test_d16_descriptors_outlive_the_agent(puppet: Puppet) -> None:
    """What was delivered can be read, even when packets that nobody read spoil the line's end."""
    read, write = os.pipe()
    socket.send_fds(puppet.line, [b"f"], [write])
    os.close(write)
    puppet.deliver(MESSAGE, b"1.2", b"body", fds=1)
    puppet.rings.set_pollable()  # sends a packet
    puppet.line.close()
    ((data, items, flags, _),) = take(puppet.rings)
    assert (data, flags) == (b"body", 0)
    os.close(*array.array("i", items[0][2]))
    assert os.read(read, 1) == b""
    os.close(read)
    assert puppet.rings.recv(1, 1, 0, False, None) == -errno.ENOTCONN


def test_r19_only_the_agent_speaks_without_an_address(puppet: Puppet) -> None:
    """A gap whose sender is not known is the agent's word."""
    gap = struct.pack("<QQQI", 1, 1, 1, 1)
    puppet.deliver(GAP, b"", gap)
    puppet.deliver(NOTICE, b"", b"n")
    puppet.deliver(GAP, b"", gap)
    assert [message[3] for message in take(puppet.rings, 9)] == ["kernel"] * 3


def test_r19_a_message_has_a_source(puppet: Puppet) -> None:
    """One without would seem to be the agent's own word."""
    puppet.deliver(MESSAGE, b"", b"x")
    assert puppet.rings.recv(1, 9, 0, False, 0) == -errno.EBADMSG


class Namer:
    """Makes addresses, and fails for one of them."""

    def __init__(self) -> None:
        self.bad = b"1.2"

    def __call__(self, source: bytes, _is_kernel: bool) -> bytes:
        """Return the address."""
        if source == self.bad:
            raise ValueError("no such name")
        return source


def test_d12_messages_before_one_that_fails_are_not_lost(world: World) -> None:
    """Those taken already are returned; the failure comes with the next call, once."""
    namer = Namer()
    one, two, three = world.join(), world.join(), world.join(address=namer)
    with open(os.devnull, "rb") as file:
        fds = (file.fileno(),)
        for sender, body in ((one, b"a"), (two, b"b"), (one, b"c")):
            assert send(sender, b"1.3", body, fds=fds) == 0
        before = open_descriptors()
        ((data, items, _, _),) = take(three, 9)
        assert data == b"a"
        os.close(*array.array("i", items[0][2]))
        with pytest.raises(ValueError, match="no such name"):
            take(three, 9)
        ((data, items, _, _),) = take(three, 9)
        assert data == b"c"
        os.close(*array.array("i", items[0][2]))
        assert open_descriptors() <= before
        # A look that fails takes nothing.
        assert send(two, b"1.3", b"d", fds=fds) == 0
        assert send(one, b"1.3", b"e") == 0
        with pytest.raises(ValueError, match="no such name"):
            three.recv(1, 9, 99, True, 1)
        namer.bad = b""
        ((data, items, _, _), (last, *_)) = take(three, 9)
        assert (data, last) == (b"d", b"e")
        os.close(*array.array("i", items[0][2]))


def test_r18_a_loan_that_fails_leaks_neither_room_nor_descriptors(world: World) -> None:
    """The message is gone, its room and its descriptors are given back."""
    one, two, namer = world.join(), world.join(), Namer()
    namer.bad = b"1.1"
    three = world.join(rx_bytes=4 * KIB, address=namer)
    with open(os.devnull, "rb") as file:
        for size in (1000, 70_000) * 10:
            assert send(one, b"1.3", bytes(size), fds=(file.fileno(),)) == 0
            before = open_descriptors()
            with pytest.raises(ValueError, match="no such name"):
                three.recv_loan(10)
            assert open_descriptors() <= before
    assert send(two, b"1.3", b"x", timeout=0) == 0
    loan = three.recv_loan(10)
    assert isinstance(loan, Loan)
    # A view that cannot be had is not counted as one.
    with pytest.raises(TypeError):
        (ctypes.c_char * 1).from_buffer(cast("Any", loan))
    loan.release()


@pytest.mark.parametrize("how", ["release", "close"])
def test_r18_a_child_gives_nothing_back(puppet: Puppet, how: str) -> None:
    """Loan, ring and line are the parent's: a child that `fork` made changes nothing of them."""
    puppet.deliver(MESSAGE, b"1.2", b"body")
    loan = puppet.rings.recv_loan(0)
    assert isinstance(loan, Loan)
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            (loan.release if how == "release" else puppet.rings.close)()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert puppet.rx.get(TAIL) == 0
    assert not is_readable(puppet.line.fileno())
    loan.release()
    assert puppet.rx.get(TAIL) == puppet.rx.get(HEAD)
