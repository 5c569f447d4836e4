"""What a receiver makes of an agent that lies or dies, and of records that fail half way."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.datapath.puppet import MESSAGE, Puppet
from tests.datapath.world import open_descriptors

from afbus._datapath import Loan

Items: TypeAlias = "list[tuple[int, int, bytes]]"

#: Of sections: mostly such as fit into the record.
LENGTHS = st.sampled_from([0, 0, 3, 8, 16, 24, 1000])


@pytest.mark.parametrize(
    "raw",
    [
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
