"""Sockets of several processes, and agents that are killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from afbus.client.socket import Socket
from afbus.proto import control, errors
from afbus.proto.address import BusAddress
from afbus.proto.notice import Event, Notice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.client.conftest import NodeProcess

pytestmark = pytest.mark.cluster

PATH = "/tmp/test"
MASTER = BusAddress(PATH, "org.example.bus")

# Joins, and sends numbers until it is killed or has sent enough.
SENDER = """
import sys
import afbus
one = afbus.socket(node=sys.argv[1])
one.sendto(b"AUTH", "/tmp/test:org.example.bus")
one.recv(100)
for number in range(int(sys.argv[2])):
    one.sendto(b"%d" % number, "/tmp/test:org.example.bus")
one.close()
"""


@pytest.fixture(params=["fifo", "total"])
def master(request: pytest.FixtureRequest, agent: NodeProcess) -> Iterator[Socket]:
    """The master of the bus: one with lanes (fifo), and one with the switch alone."""
    with Socket(node=agent.place) as made:
        made.settimeout(60)
        made.bind(MASTER, order=request.param)
        yield made


def let_in(master: Socket, address: str) -> None:
    """Give an address to whoever asks."""
    body, source = master.recvfrom(100)
    assert body == b"AUTH"
    owned = control.encode(control.OwnedAddr(BusAddress(PATH, address)))
    master.sendmsg([b"welcome"], [owned], 0, source)
    assert read_notice(master).event is Event.JOINED


def read_notice(one: Socket) -> Notice:
    """The notice that is next."""
    body, source = one.recvfrom(4096)
    assert source.is_kernel
    return Notice.decode(body)


def read_numbers(master: Socket) -> tuple[list[int], Notice]:
    """All numbers before the next notice, and that."""
    numbers: list[int] = []
    while True:
        body, source = master.recvfrom(4096)
        if source.is_kernel:
            return numbers, Notice.decode(body)
        numbers.append(int(body))


def start_sender(agent: NodeProcess, count: int) -> subprocess.Popen[bytes]:
    """A process that joins and sends."""
    return subprocess.Popen([sys.executable, "-c", SENDER, str(agent.place), str(count)])


def test_d15_d20_last_message_comes_before_the_notice(agent: NodeProcess, master: Socket) -> None:
    """Who closes has said all before its LEFT is read, however fast it was."""
    with start_sender(agent, 5000) as sender:
        let_in(master, "1.1")
        numbers, notice = read_numbers(master)
        assert numbers == list(range(5000))
        assert (notice.event, notice.subject) == (Event.LEFT, (b"1.1",))
        assert sender.wait() == 0


def test_d15_case32_killed_sender_is_told_once(agent: NodeProcess, master: Socket) -> None:
    """What a killed sender had sent arrives whole and in order, and then its notice."""
    with start_sender(agent, 1 << 30) as sender:
        let_in(master, "1.1")
        first = int(master.recv(100))
        sender.kill()
        numbers, notice = read_numbers(master)
        assert [first, *numbers] == list(range(len(numbers) + 1))
        assert (notice.event, notice.subject) == (Event.KILLED, (b"1.1",))
        with pytest.raises(BlockingIOError):
            master.recv(100, socket.MSG_DONTWAIT)


class Sender:
    """A member that sends numbers on a thread, whatever becomes of the agent, and then `end`."""

    def __init__(self, place: Path, master: Socket) -> None:
        self._socket = Socket(node=place)
        self._socket.settimeout(60)
        self._socket.sendto(b"AUTH", MASTER)
        let_in(master, "1.1")
        assert self._socket.recv(100) == b"welcome"
        self.enough = threading.Event()
        self.told = self.back = 0
        self.unknown: set[int] = set()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        number = 0
        with self._socket:
            while not self.enough.is_set():
                try:
                    self._socket.sendto(b"%d" % number, MASTER)
                except errors.NotConnected:
                    self.told += 1
                    continue  # this one was not sent
                except errors.OutcomeUnknown:
                    self.unknown.add(number)
                else:
                    self.back = self.told
                number += 1
            self._socket.sendto(b"end", MASTER)


def test_case3_d16_d21_agent_is_killed_under_load(agent: NodeProcess, master: Socket) -> None:
    """Endpoints come back by themselves, with their addresses; nothing is delivered twice.

    The next agent is killed when both are back after the end of the last one: else they may notice
    two ends as one, and what lies in a lane is read without any agent.
    """
    sender = Sender(agent.place, master)
    got: list[int] = []
    notices: list[Event] = []
    restarts = told = 0
    following = 1000
    body = b""
    while body != b"end":
        if len(got) > following and sender.back == told == len(notices) == restarts:
            if restarts == 3:
                sender.enough.set()
            else:
                restarts += 1
                assert agent.end(signal.SIGKILL) == -signal.SIGKILL
                agent.start()
                following = len(got) + 1000
        try:
            body, source = master.recvfrom(4096)
        except errors.NotConnected:
            told += 1
            continue
        if source.is_kernel:
            notices.append(Notice.decode(body).event)
        elif body != b"end":
            got.append(int(body))
    sender.thread.join()
    assert got == sorted(set(got)), "in order, and none twice"
    # What an old agent had accepted lay in the ring of its receiver, and was read from there.
    assert set(range(got[-1] + 1)) - set(got) <= sender.unknown
    assert (sender.told, told, notices) == (3, 3, [Event.GAP] * 3)
    assert master.getsockname() == MASTER


def test_d16_agent_says_why_it_goes(agent: NodeProcess, master: Socket) -> None:
    """An agent that is stopped in good order leaves a reason."""
    assert agent.end() == 0
    with pytest.raises(errors.NotConnected, match="ended the connection"):
        master.recv(100)
    with pytest.raises(errors.NoAgent, match="`afbus node` starts"):
        master.recv(100, socket.MSG_DONTWAIT)


def test_case4_agent_keeps_nothing_of_those_that_are_gone(agent: NodeProcess) -> None:
    """After many sockets, some closed and some not, the agent has as many descriptors as before."""
    descriptors = Path(f"/proc/{agent.pid}/fd")
    before = len(os.listdir(descriptors))
    threads = len(os.listdir(f"/proc/{agent.pid}/task"))
    for _ in range(200):
        Socket(node=agent.place).close()
        forgotten = Socket(node=agent.place)
        forgotten._endpoint.abort()
    with Socket(node=agent.place) as last:
        # Its answer comes after the agent has seen the ends of all others.
        assert last.status()["endpoints"] == 1
        assert len(os.listdir(descriptors)) == before + 2
    assert len(os.listdir(f"/proc/{agent.pid}/task")) == threads


def test_r18_ring_sizes_can_be_set_until_there_is_a_bus(agent: NodeProcess) -> None:
    """Rounded up; options, descriptor and the count of endpoints stay as they were."""
    descriptors = len(os.listdir("/proc/self/fd"))
    with Socket(node=agent.place) as one:
        number = one.fileno()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 5000)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, struct.pack("=i", 1))
        sizes = [one.getsockopt(socket.SOL_SOCKET, n) for n in (socket.SO_RCVBUF, socket.SO_SNDBUF)]
        assert sizes == [8192, 4096]
        for size in (0, -1, 1 << 27):
            with pytest.raises(errors.InvalidArgument):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        assert one.status()["endpoints"] == 1
        assert one.fileno() == number
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1
        one.bind(MASTER)
        one.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 8192:
                sent += one.sendto(bytes(1000), MASTER)
        assert 0 < sent < 8192
        assert select.select([number], [], [], 20)[0] == [number]
        _, items, _, _ = one.recvmsg(1000, 4096)
        assert items, "SO_PASSCRED is set"
        with pytest.raises(errors.InvalidArgument, match="once a socket is on"):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(OSError, match="closed"):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)


def test_r18_ring_sizes_without_an_agent(agent: NodeProcess) -> None:
    """The refusal says that nobody is there, and what was asked for comes with the next agent."""
    with Socket(node=agent.place) as one:
        agent.end()
        with pytest.raises(errors.NoAgent):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        agent.start()
        assert one.status()["endpoints"] == 1
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 1 << 14


@pytest.mark.parametrize("size", [10, 100_000])
def test_d16_a_loan_outlives_its_agent(agent: NodeProcess, size: int) -> None:
    """A loan that an agent refused by its death is sent to the next, as it was written."""
    with Socket(node=agent.place) as master:
        master.settimeout(60)
        master.bind(MASTER)
        loan = master.loan(size, MASTER)
        with memoryview(loan) as view:
            view[:5] = b"kept!"
        assert agent.end(signal.SIGKILL) == -signal.SIGKILL
        agent.start()
        told: list[type] = []
        while not told or told[-1] is not int:
            try:
                told.append(type(loan.send()))
            except (errors.NotConnected, errors.OutcomeUnknown) as error:
                told.append(type(error))
        # An agent that dies while it looks at the ring leaves the outcome unknown.
        assert told in (
            [errors.NotConnected, int],
            [errors.OutcomeUnknown, errors.NotConnected, int],
        )
        while (got := master.recvfrom(1 << 20))[1].is_kernel:
            pass
        assert got == (b"kept!" + bytes(size - 5), MASTER)
