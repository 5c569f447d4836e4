"""The master as a process, with QUIC, a journal on disk and the operator's door."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from tests.master.station import WAIT_S, Station
from tests.master.world import EVERYTHING

from afbus.link.credentials import Credentials
from afbus.link.identity import Identity, Role
from afbus.link.quic import QuicCarrier
from afbus.link.reason import Reason
from afbus.master.directory import Directory
from afbus.master.door import ask_master
from afbus.master.issuer import Issuer, make_issuing, make_key, make_request, make_root
from afbus.master.journal import Journal, JournalError, read_audit
from afbus.master.service import Config, run
from afbus.proto import cluster
from afbus.proto.cluster import ClusterCall
from afbus.proto.errors import AddressInUse, LinkError, NoAgent, NotConnected
from afbus.proto.operation import ClusterOp
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.cluster

PATH = b"/demo"
BIND: dict[str, Any] = {"endpoint": 1, "path": PATH, "address": b"master"}
OWN: dict[str, Any] = {"endpoint": 1, "path": PATH, "name": b"org.a"}
WANT: dict[str, Any] = {"endpoint": 1, "path": PATH, "terms": Terms("a").pack()}
MASTER = Identity("demo", Role.MASTER, "master")


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    """The state of a new cluster whose policy allows everything."""
    made = Directory(tmp_path / "state")
    made.make("demo", datetime.now(UTC).timestamp(), os.urandom, None)
    made.policy.write_text(EVERYTHING)
    return made


class Process:
    """A master as the command line runs it."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, where it was before; it is ready then."""
        command = [sys.executable, "-m", "afbus.cli", "master", "run", "--json"]
        command += ["--state", str(self.directory.path), "--listen", f"127.0.0.1:{self.port}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = json.loads(self._process.stdout.readline())["port"]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """End it; return its exit code."""
        assert self._process is not None
        process, self._process = self._process, None
        process.send_signal(number)
        assert process.stdout is not None
        process.stdout.close()
        return process.wait(WAIT_S)

    def end(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            self.kill()

    @property
    def address(self) -> tuple[str, int]:
        """Where nodes find it."""
        return ("127.0.0.1", self.port)

    def ask(self, op: ClusterOp, /, **args: Any) -> Any:
        """Ask as its operator."""
        return ask_master(self.directory.door, op, timeout_s=WAIT_S, **args)


@pytest.fixture
def master(directory: Directory) -> Iterator[Process]:
    """A master that runs."""
    process = Process(directory)
    process.start()
    yield process
    process.end()


async def connect(station: Station, address: tuple[str, int]) -> None:
    """Have a link to the master, and its WELCOME; dial until it is there."""
    station.welcome = None
    async with asyncio.timeout(WAIT_S):
        while True:
            outcome: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            station.carrier.dial(address, MASTER, outcome.set_result)
            if not isinstance(await outcome, LinkError):
                break
    await station.until(lambda: station.welcome)


@asynccontextmanager
async def joined(name: str, master: Process) -> AsyncIterator[Station]:
    """A node that has enrolled and is live, with endpoint 1."""
    station = Station(name)
    token = (await asyncio.to_thread(master.ask, ClusterOp.TOKEN, node=name))["token"]
    assert (await station.enrol(master.address, token)).is_ok
    station.carrier = QuicCarrier(station.make_member(os.urandom(16)), "127.0.0.1")
    try:
        await connect(station, master.address)
        await station.join(1)
        yield station
    finally:
        station.carrier.close()


async def test_case22_case28_a_killed_master_comes_back_with_the_same_state(
    master: Process,
) -> None:
    """`kill -9`: the same table under a new epoch, versions go on, no number is given twice."""
    async with joined("a", master) as node, joined("b", master) as other:
        bus = await node.do(ClusterOp.BIND, **BIND)
        assert (await node.do(ClusterOp.OWN, **OWN))["outcome"] == 1
        assert (await other.do(ClusterOp.OWN, **OWN))["outcome"] == 2
        await other.do(ClusterOp.SUBSCRIBE, **WANT)
        block = (await other.do(ClusterOp.LEASE))["block"]
        await node.until(lambda: node.mirror.version == other.mirror.version)
        before, epoch = node.mirror.snapshot(), node.mirror.epoch
        await asyncio.to_thread(master.kill)
        await asyncio.to_thread(master.start)
        status = await asyncio.to_thread(master.ask, ClusterOp.STATUS)
        assert (status["version"], status["names"], status["matches"]) == (before.version, 1, 1)
        for station in (other, node):
            await connect(station, master.address)
            assert station.welcome is not None
            assert station.welcome.is_same
            await station.do(ClusterOp.RESTATE)
            await station.do(ClusterOp.ENTER, endpoint=1, uid=1000)
        assert node.mirror.epoch > epoch
        assert (await other.do(ClusterOp.OWN, **OWN))["outcome"] == 2
        await other.do(ClusterOp.SUBSCRIBE, **WANT)
        await other.do(ClusterOp.LEASE, block=block)
        assert await node.do(ClusterOp.BIND, **BIND) == bus
        assert (await node.do(ClusterOp.OWN, **OWN))["outcome"] == 4
        for station in (other, node):
            await station.do(ClusterOp.RESTATED)
        assert node.mirror.snapshot() == before
        assert (await node.do(ClusterOp.LEASE))["block"] == block + 1
        assert node.mirror.version == before.version + 1


def _has_come(node: Station, serial: int) -> Callable[[], bool]:
    return lambda: serial in node.results


async def test_case28_a_crash_loop_loses_no_allocation(master: Process) -> None:
    """Killed at random in the middle of leases: what was told is there, and nothing comes twice."""
    async with joined("a", master) as node:
        told: set[int] = set()
        for turn in range(6):
            calls = [node.call(ClusterOp.LEASE) for _ in range(40)]
            await node.until(_has_come(node, calls[turn * 5]))
            await asyncio.to_thread(master.kill)
            await asyncio.to_thread(master.start)
            fresh = {node.results.pop(one).value["block"] for one in calls if one in node.results}
            assert fresh.isdisjoint(told)
            told |= fresh
            await connect(node, master.address)
            await node.do(ClusterOp.RESTATE)
            for block in sorted(told):
                await node.do(ClusterOp.LEASE, block=block)
            await node.do(ClusterOp.RESTATED)
            status = await asyncio.to_thread(master.ask, ClusterOp.STATUS)
            assert status["blocks"] == len(told)
        assert len(told) > 50


async def test_case38_of_many_with_one_token_one_wins(master: Process) -> None:
    """Over QUIC, all at once."""
    token = master.ask(ClusterOp.TOKEN)["token"]
    stations = [Station(f"n{number}") for number in range(50)]
    results = await asyncio.gather(*(one.enrol(master.address, token) for one in stations))
    assert sum(result.is_ok for result in results) == 1
    assert len(read_audit(master.directory.journal)) == 51


async def test_case35_a_revoked_node_is_out(master: Process) -> None:
    """Its link is cut with the reason, it gets no other one, and others know."""
    async with joined("a", master) as node, joined("b", master) as other:
        value = await asyncio.to_thread(
            master.ask, ClusterOp.REVOKE, subject="node/a", reason="stolen"
        )
        await node.until(lambda: node.down)
        assert node.down is not None
        assert (node.down.reason, node.down.text) == (Reason.REVOKED, "revoked: stolen")
        assert other.mirror.get_denied() == {int(one, 16) for one in value["serials"]}
        outcome: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        node.carrier.dial(master.address, MASTER, outcome.set_result)
        assert isinstance(await outcome, LinkError)
        # A master that has restarted knows it too.
        await asyncio.to_thread(master.kill)
        await asyncio.to_thread(master.start)
        outcome = asyncio.get_running_loop().create_future()
        node.carrier.dial(master.address, MASTER, outcome.set_result)
        assert isinstance(await outcome, LinkError)
    assert master.kill(signal.SIGTERM) == 0
    refused = [one for _, one in read_audit(master.directory.journal) if one.action == "link"]
    assert {one.detail.partition(":")[0] for one in refused} == {"certificate-revoked"}


async def test_case33_a_strangers_certificate_is_refused_and_noted(master: Process) -> None:
    """A member's name, signed by another root: no byte of it is read."""
    station, key, root_key, issuing_key = Station("a"), make_key(), make_key(), make_key()
    utc = datetime.now(UTC).timestamp()
    root = make_root("demo", root_key, 1, utc)
    stranger = Issuer(root, make_issuing(root, root_key, issuing_key, 2, utc), issuing_key)
    issued = stranger.issue(make_request(key), Identity("demo", Role.NODE, "a"), 3, utc)
    station.credentials = Credentials(issued.chain, key)
    station.root = master.directory.load()._root
    station.carrier = QuicCarrier(station.make_member(os.urandom(16)), "127.0.0.1")
    outcome: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    station.carrier.dial(master.address, MASTER, outcome.set_result)
    assert isinstance(await outcome, LinkError)
    station.carrier.close()
    # Whatever the master does is written by the time that it has ended.
    assert await asyncio.to_thread(master.kill, signal.SIGTERM) == 0
    [(_, entry)] = read_audit(master.directory.journal)
    assert (entry.action, entry.is_done) == ("link", False)
    assert entry.detail.startswith("certificate-untrusted")


async def test_d16_a_master_that_ends_says_so(master: Process) -> None:
    """Nodes can tell that from a master that was lost."""
    async with joined("a", master) as node:
        assert await asyncio.to_thread(master.kill, signal.SIGTERM) == 0
        await node.until(lambda: node.down)
        assert node.down is not None
        assert (node.down.reason, node.down.is_remote) == (Reason.GOING_DOWN, True)


def test_the_door_takes_no_garbage(master: Process) -> None:
    """Too long, cut short, no frame: that connection ends, others are served."""
    door = os.fspath(master.directory.door)
    for data in (
        struct.pack(">I", 1 << 30),
        struct.pack(">I", 10) + b"short",
        struct.pack(">I", 4) + b"\xc1\xc1\xc1\xc1",
        b"",
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(WAIT_S)
            sock.connect(door)
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while more := sock.recv(4096):
                answer += more
            assert len(answer) < 200
    assert master.ask(ClusterOp.STATUS)["cluster"] == "demo"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_the_door_is_its_owners_alone(master: Process) -> None:
    """Also if somebody opens folder and socket for all: the kernel says who is there."""
    master.directory.path.chmod(0o755)
    master.directory.door.chmod(0o666)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            # From the folder itself, as those above it are closed to strangers.
            os.chdir(master.directory.path)
            os.setresuid(12345, 12345, 12345)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(WAIT_S)
                sock.connect(master.directory.door.name)
                data = cluster.encode(ClusterCall(1, ClusterOp.STATUS))
                sock.sendall(struct.pack(">I", len(data)) + data)
                os.write(writing, b"heard" if sock.recv(1) else b"refused")
        except ConnectionError:
            os.write(writing, b"refused")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"refused"
    os.waitpid(child, 0)
    master.directory.path.chmod(0o700)
    assert master.ask(ClusterOp.STATUS)["cluster"] == "demo"


def test_nobody_is_at_the_door(directory: Directory) -> None:
    """Before the first start, and after a kill that left the socket."""
    with pytest.raises(NoAgent):
        ask_master(directory.door, ClusterOp.STATUS)
    process = Process(directory)
    process.start()
    process.kill()
    assert directory.door.exists()
    with pytest.raises(NoAgent):
        ask_master(directory.door, ClusterOp.STATUS)
    process.start()
    assert process.ask(ClusterOp.STATUS)["links"] == 0
    process.end()


async def test_a_disk_that_fails_ends_the_master(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is told what would not survive; the next start has what was written."""
    is_ready = asyncio.Event()
    async with asyncio.TaskGroup() as group:

        async def serve() -> None:
            with pytest.raises(JournalError, match="disk is full"):
                await run(Config(directory.path, "127.0.0.1", 0), lambda *_: is_ready.set())

        serving = group.create_task(serve())
        await is_ready.wait()
        value = await asyncio.to_thread(ask_master, directory.door, ClusterOp.TOKEN)
        assert value["token"]

        def fail(*_: object) -> None:
            raise JournalError("disk is full")

        monkeypatch.setattr(Journal, "commit", fail)
        with pytest.raises(NotConnected):
            await asyncio.to_thread(ask_master, directory.door, ClusterOp.TOKEN)
        await serving
    monkeypatch.undo()
    journal = Journal(directory.journal)
    assert sum(1 for key, _ in journal.read() if key[:1] == b"T") == 1
    journal.close()


async def test_two_masters_of_one_port(directory: Directory, master: Process) -> None:
    """The second one says what is taken."""
    other = Directory(directory.path.with_name("other"))
    other.make("demo", datetime.now(UTC).timestamp(), os.urandom, None)
    with pytest.raises(AddressInUse, match=f"port {master.port}"):
        await run(Config(other.path, "127.0.0.1", master.port))
