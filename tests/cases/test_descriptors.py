"""Messages with descriptors, where there is no room for them."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from tests.cases.actors import ITEMS, MASTER, PATH, Stage, join
from tests.cases.raw import UNICAST, RawClient, tx_record
from tests.figures import note

from afbus.client.socket import Socket
from afbus.proto.address import BusAddress
from afbus.proto.errors import BusError, CloseCode, NoAgent, TooBig
from afbus.proto.frames import Op
from afbus.proto.limits import FDS_PER_MESSAGE

if TYPE_CHECKING:
    from tests.cases.actors import Fleet
    from tests.cases.conftest import Node

MESSAGES = 10_000
#: The kernel's own limit for one packet (SCM_MAX_FD).
KERNEL_MAX = 253
RIGHTS = socket.SOL_SOCKET, socket.SCM_RIGHTS


def pack_rights(*descriptors: int) -> tuple[int, int, bytes]:
    """The item that carries descriptors."""
    return (*RIGHTS, struct.pack(f"={len(descriptors)}i", *descriptors))


def count_descriptors() -> int:
    """How many this process has open, but for the one that counts."""
    return len(os.listdir("/proc/self/fd")) - 1


def send_too_many(stage: Stage, count: int) -> None:
    """Announce and send numbers of descriptors that are not allowed, or not the same."""
    rng = random.Random(9)
    before = count_descriptors()
    for number in range(count):
        with RawClient(stage.place) as client:
            client.hello()
            client.call(Op.ATTACH, path=PATH.encode())
            null = client.door.fileno()
            if number % 2:
                sent = announced = rng.choice((18, 19, 28, 29, KERNEL_MAX))
            else:
                sent = rng.choice((0, 1, 2, 15, 16, 17, 29, KERNEL_MAX))
                announced = rng.choice([one for one in (1, 2, 15, 16, 255) if one != sent])
            if sent:
                assert client.send_on_line(b"f", [null] * sent)
            client.publish(tx_record(UNICAST, MASTER.address, b"take these", fds=announced))
            assert client.is_cut(30.0), f"{sent} sent, {announced} announced"
            assert client.read_farewell().code is CloseCode.RING
    assert count_descriptors() == before
    stage.tell("done")


def receive_starving(stage: Stage, count: int, room: int) -> None:
    """Receive messages with descriptors, of which only some have room in this process."""
    one = stage.join(name="starving")
    before = count_descriptors()
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 1
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # Numbers that are free below the highest are taken, so that exactly `room` are left.
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit + room, hard))
    stage.tell("ready")
    whole = cut = 0
    for number in range(count):
        data, items, flags, _ = one.recvmsg(100, ITEMS)
        assert data == b"%d" % number
        got = [each for item in items if item[:2] == RIGHTS for each in read_rights(item[2])]
        for descriptor in got:
            os.close(descriptor)
        if flags & socket.MSG_CTRUNC:
            cut += 1
        else:
            assert len(got) == 1 + number % 3, "lost without a word"
            whole += 1
    for descriptor in taken:
        os.close(descriptor)
    stage.tell([whole, cut, count_descriptors() - before])
    one.close()


def read_rights(data: bytes) -> list[int]:
    """The descriptors of an item."""
    return list(struct.unpack(f"={len(data) // 4}i", data))


@pytest.mark.cluster
@pytest.mark.slow
def test_case9_more_descriptors_than_allowed(node: Node, fleet: Fleet) -> None:
    """10,000 clients that send too many, or not as many as they say, leave none behind."""
    node.start()
    fleet.start_master()
    with join(node.place) as witness:
        status = witness.status()
        before = node.descriptors
        too_many = [witness._endpoint.line] * (FDS_PER_MESSAGE + 1)
        with pytest.raises(TooBig):
            witness.sendmsg([b"x"], [pack_rights(*too_many)], 0, MASTER)
        hostile = fleet.start(send_too_many, count=MESSAGES)
        assert hostile.hear() == "done"
        hostile.finish()
        assert witness.status() == status
        assert node.descriptors == before
    note(f"{MESSAGES} clients were cut off; {before} descriptors of the agent before and after")


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 1, 2])
def test_case9_receiver_without_descriptors(node: Node, fleet: Fleet, room: int) -> None:
    """A receiver that has no room for descriptors gets each message, and is told; none leaks."""
    node.start(quotas={"quota_fds": 100_000})
    fleet.start_master()
    reader, writer = os.pipe()
    with join(node.place) as sender:
        starving = fleet.start(receive_starving, count=MESSAGES, room=room)
        assert starving.hear() == "ready"
        before = node.descriptors
        for number in range(MESSAGES):
            items = [pack_rights(*[reader] * (1 + number % 3))]
            sender.sendmsg([b"%d" % number], items, 0, BusAddress(PATH, "starving"))
        whole, cut, leaked = starving.hear()
        starving.finish()
        sender.status()
        # Without the two of the one that has left.
        assert node.descriptors == before - 2
    assert leaked == 0
    # Those of the next message may have come, and taken the room, before this one was received.
    assert whole <= sum(1 + number % 3 <= room for number in range(MESSAGES))
    assert (whole > 0) == (room > 0)
    assert whole + cut == MESSAGES
    note(f"room for {room}: {whole} messages whole, {cut} cut, no descriptor left")
    os.close(reader)
    # Nobody has a copy of the reading end any more.
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"x")
    os.close(writer)


@pytest.mark.cluster
def test_case9_agent_without_descriptors(node: Node, fleet: Fleet) -> None:
    """An agent that has none left says so, serves those that are there, and recovers."""
    node.start()
    fleet.start_master()
    to = BusAddress(PATH, "other")
    with (
        join(node.place) as one,
        join(node.place, name="other") as other,
        contextlib.ExitStack() as idlers,
    ):
        limits = resource.prlimit(node.pid, resource.RLIMIT_NOFILE)
        highest = max(map(int, os.listdir(f"/proc/{node.pid}/fd")))
        resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        is_full = False
        while not is_full:
            idler = idlers.enter_context(RawClient(str(node.place)))
            one.status()  # answered after the other was let in, or was not
            idler.door.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                assert "no descriptors left" in idler.read_farewell().text
                is_full = True
        for _ in range(20):
            with pytest.raises(NoAgent, match="no descriptors left"):
                Socket(node=node.place)
            one.status()  # answered after the other was turned away and closed
            with pytest.raises(BusError) as refused:
                one.sendmsg([b"x"], [pack_rights(0)], 0, to)
            assert refused.value.errno == errno.EMFILE
            one.sendto(b"without", to)
            assert other.recv(100) == b"without"
        resource.prlimit(node.pid, resource.RLIMIT_NOFILE, limits)
        one.sendmsg([b"x"], [pack_rights(0)], 0, to)
        data, items, _, _ = other.recvmsg(100, ITEMS)
        assert data == b"x"
        os.close(read_rights(items[0][2])[0])
        Socket(node=node.place).close()
