"""One agent for all tests of the bus, and for each test a bus of its own on it."""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import afbus
from afbus import BusAddress, Event, Notice, Overflow, Socket, Terms
from afbus.proto import control

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    #: Level, type and data of a control item.
    Item = tuple[int, int, bytes]

ROOM = 8192

# The agent, as the command line runs it; it says when clients may come.
RUN_NODE = """
import asyncio, pathlib, sys
from afbus.node import agent, config
from afbus.node.core import Limits
quotas, limits = eval(sys.argv[2])
settings = config.Config(
    door=pathlib.Path(sys.argv[1]), quotas=quotas, limits=Limits(**limits)
)
asyncio.run(agent.run(settings, lambda: print("ready", flush=True)))
"""

# What programs of tests begin with: a socket, who the master is, and a way to say something.
PRELUDE = """
import os, signal, socket, struct, sys
import afbus
door, path, *args = sys.argv[1:]
master = (path, "master")
one = afbus.socket(node=door)
one.settimeout(60)
def say(*words):
    print(*words, flush=True)
def become_nobody():
    # Only the last folder of the door is open to everybody.
    os.chdir(os.path.dirname(door))
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    made = afbus.socket(node=os.path.basename(door))
    made.settimeout(60)
    return made
"""


class NodeProcess:
    """A real agent in a process of its own."""

    def __init__(
        self, place: Path, quotas: dict[str, int], limits: dict[str, Any], log: Path | None
    ) -> None:
        self.place = place
        self._log = log
        self._settings = repr((quotas, limits))
        self.was_killed = False
        self.start()

    def start(self) -> None:
        """Start it, and wait until clients may come."""
        command = [sys.executable, "-c", RUN_NODE, str(self.place), self._settings]
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self._log.open("ab")) if self._log else None
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        """End it as the kernel does that is out of memory."""
        self.was_killed = True
        assert self.end(signal.SIGKILL) == -signal.SIGKILL

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal, by default one to leave in good order; return its exit status."""
        self._process.send_signal(number)
        with self._process:
            return self._process.wait()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None


class Scene:
    """A bus with a master that lets everybody in, and those who have joined it."""

    def __init__(self, node: NodeProcess, path: str, stack: contextlib.ExitStack) -> None:
        self.node = node
        self.path = path
        self._stack = stack
        self.master_address = BusAddress(path, "master")
        self.master = self.socket()
        # What the master got while something else was waited for.
        self._told: list[Notice] = []
        self._requests: list[BusAddress] = []

    # sockets

    def socket(self, **options: Any) -> Socket:
        """A new socket, on no bus yet; it waits for 20 s at most."""
        made = self._stack.enter_context(afbus.socket(node=self.node.place, **options))
        made.settimeout(20)
        return made

    def bind(self, **options: Any) -> None:
        """Create the bus."""
        self.master.bind(self.master_address, **options)

    def join(self, *addresses: str | bytes, items: tuple[Item, ...] = (), **options: Any) -> Socket:
        """A new member with these addresses and grants."""
        member = self.socket(**options)
        member.sendto(b"AUTH", self.master_address)
        self.let_in(*addresses, items=items)
        assert member.recv(9) == b"welcome"
        return member

    def let_in(self, *addresses: str | bytes, items: tuple[Item, ...] = ()) -> BusAddress:
        """Let the next endpoint in that asks; return the address from which it asked."""
        source = self.next_request()
        owned = [self.owned(address) for address in addresses]
        self.master.sendmsg([b"welcome"], [*owned, *items], 0, source)
        if addresses:
            self.await_notice(Event.JOINED)
        return source

    def next_request(self) -> BusAddress:
        """Where the next request to join comes from."""
        while not self._requests:
            self._read_master()
        return self._requests.pop(0)

    def _read_master(self) -> None:
        """Read one message to the master: a notice, or a request to join."""
        body, source = self.master.recvfrom(ROOM)
        if source.is_kernel:
            self._told.append(Notice.decode(body))
        else:
            assert body == b"AUTH"
            self._requests.append(source)

    def await_notice(self, event: Event) -> Notice:
        """The next notice of this kind that the master gets; others are kept for later."""
        while True:
            for place, notice in enumerate(self._told):
                if notice.event is event:
                    return self._told.pop(place)
            self._read_master()

    def grant(self, to: Socket, *items: Item) -> None:
        """Let the master send commands to a member, which reads the message that brings them."""
        self.command(to.getsockname(), *items)
        body, source = to.recvfrom(9)
        assert (body, source) == (b"granted", self.master_address)

    def revoke(self, of: Socket, *items: Item) -> list[Notice]:
        """Let the master take things from a member; return what the member is told of it."""
        self.command(of.getsockname(), *items)
        notices: list[Notice] = []
        while True:
            body, _, flags, source = of.recvmsg(ROOM, ROOM)
            if source.is_kernel:
                notices.append(Notice.decode(body))
            elif not flags & afbus.MSG_MONITOR:
                assert body == b"granted"
                return notices

    def command(self, to: BusAddress, *items: Item) -> None:
        """Let the master send commands to an address."""
        self.master.sendmsg([b"granted"], items, 0, to)

    def start(self, program: str, *args: object, **options: Any) -> subprocess.Popen[str]:
        """A process of its own that runs a program, after the prelude; killed at the end."""
        command = [sys.executable, "-c", PRELUDE + program, str(self.node.place), self.path]
        process = subprocess.Popen(
            [*command, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        self._stack.callback(_reap, process)
        return process

    # addresses and control items

    def address(self, within: str | bytes) -> BusAddress:
        """A normal address on the bus."""
        return BusAddress(self.path, within)

    def multicast(self, bits: bytes = b"") -> BusAddress:
        """A multicast address on the bus."""
        return BusAddress.multicast(self.path, bits)

    @property
    def kernel(self) -> BusAddress:
        """Where notices come from."""
        return BusAddress.kernel(self.path)

    def owned(self, within: str | bytes) -> Item:
        """The command that gives an address."""
        return (afbus.BUS_SOCKET, afbus.SCM_OWNED_ADDR, self.address(within).pack())

    def disowned(self, within: str | bytes) -> Item:
        """The command that takes an address away."""
        return (afbus.BUS_SOCKET, afbus.SCM_REVOKE_ADDR, self.address(within).pack())

    def source(self, within: str | bytes) -> Item:
        """The item that chooses the source of a message."""
        return (afbus.BUS_SOCKET, afbus.SCM_SRC_ADDR, self.address(within).pack())

    def hears(
        self, what: Terms | bytes, overflow: Overflow = Overflow.GAP, deadline_ms: int = 0
    ) -> Item:
        """The command that lets a member hear something."""
        match = afbus.Match(self.path.encode(), what, overflow, deadline_ms)
        return control.encode(control.MulticastMatch(match))

    def deaf_to(self, what: Terms | bytes) -> Item:
        """The command that takes that back."""
        return control.encode(control.RevokeMatch(self.path.encode(), what))

    def may_send(self, what: Terms | bytes) -> Item:
        """The command that lets a member send something; all zeros is everything."""
        return control.encode(control.MulticastSend(self.path.encode(), what))

    def may_not_send(self, what: Terms | bytes) -> Item:
        """The command that takes that back."""
        return control.encode(control.RevokeSend(self.path.encode(), what))

    @staticmethod
    def flags(flags: int) -> Item:
        """The command that gives these rights and no others."""
        return (afbus.BUS_SOCKET, afbus.SCM_GRANT, flags.to_bytes(8, "little"))

    @staticmethod
    def terms(text: str) -> Item:
        """The item that says what a message is about."""
        return (afbus.BUS_SOCKET, afbus.SCM_TERMS, Terms.parse(text).pack())

    @staticmethod
    def number(kind: int, value: int) -> Item:
        """SCM_SERIAL, SCM_REPLY_TO or SCM_DEADLINE."""
        size = 4 if kind == afbus.SCM_DEADLINE else 8
        return (afbus.BUS_SOCKET, kind, value.to_bytes(size, "little"))

    # reading

    @staticmethod
    def read_notice(who: Socket) -> Notice:
        """The next message, which is a notice."""
        body, source = who.recvfrom(ROOM)
        assert source.is_kernel, (body, source)
        return Notice.decode(body)

    @staticmethod
    def read(who: Socket, flags: int = 0) -> tuple[bytes, dict[int, bytes], int, BusAddress]:
        """The next message: body, data of items by type, flags, source."""
        body, items, got, source = who.recvmsg(1 << 24, ROOM, flags)
        found = {kind: data for _, kind, data in items}
        assert len(found) == len(items), items
        return body, found, got, source

    @staticmethod
    def read_all(who: Socket) -> list[bytes]:
        """The bodies of all that is there."""
        bodies = []
        with contextlib.suppress(afbus.RingFull):
            while True:
                bodies.append(who.recv(1 << 24, socket.MSG_DONTWAIT))
        return bodies

    @staticmethod
    def fill(who: Socket, to: BusAddress, size: int = 500) -> int:
        """Send numbers until the receiver has no room, and no wait; return how many it took."""
        count = 0
        with contextlib.suppress(afbus.RingFull, afbus.ShareExceeded):
            while True:
                who.sendto(b"%*d" % (size, count), socket.MSG_DONTWAIT, to)
                count += 1
        return count

    @staticmethod
    def is_empty(who: Socket) -> bool:
        """Whether there is nothing to read."""
        try:
            who.recvmsg(0, ROOM, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except afbus.RingFull:
            return True
        return False


def _reap(process: subprocess.Popen[str]) -> None:
    """End a process, if it has not ended."""
    process.kill()
    process.communicate()


@pytest.fixture(scope="session")
def make_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., NodeProcess]]:
    """A maker of agents, with quotas and limits; they leave nothing behind."""
    made: list[NodeProcess] = []

    def make(
        limits: dict[str, Any] | None = None, log: Path | None = None, **quotas: int
    ) -> NodeProcess:
        folder = tmp_path_factory.mktemp("node", numbered=True)
        made.append(NodeProcess(folder / "in" / "node.sock", quotas, limits or {}, log))
        return made[-1]

    yield make
    for node in made:
        if node.is_running:
            assert node.end() == 0
        # What clients of a killed agent could resume is kept for the next one.
        left = {path.name for path in node.place.parent.iterdir()}
        assert left <= ({"node.sock.journal"} if node.was_killed else set())


@pytest.fixture(scope="session")
def node(make_node: Callable[..., NodeProcess]) -> NodeProcess:
    """The agent that all tests share which do nothing to it."""
    return make_node()


_NUMBERS = itertools.count(1)


@pytest.fixture
def make_scene() -> Iterator[Callable[..., Scene]]:
    """A maker of buses on an agent; sockets and processes end with the test."""
    with contextlib.ExitStack() as stack:

        def make(node: NodeProcess, **options: Any) -> Scene:
            made = Scene(node, f"/tmp/test{next(_NUMBERS)}", stack)
            made.bind(**options)
            return made

        yield make


@pytest.fixture(params=["fifo", "total"])
def scene(
    request: pytest.FixtureRequest, node: NodeProcess, make_scene: Callable[..., Scene]
) -> Scene:
    """A bus of 512 bits on the shared agent: with lanes (fifo), and with the switch alone."""
    return make_scene(node, order=request.param)
