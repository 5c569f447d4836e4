"""The agent with real sockets, the real switch and a real journal, in this process or another."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import pathlib
import random
import resource
import signal
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from afbus._datapath import UNICAST, Rings
from afbus.node import door as door_module
from afbus.node import process as processes
from afbus.node.agent import notify_service, run
from afbus.node.config import Config
from afbus.node.core import Core, Limits
from afbus.node.endpoint import Credentials
from afbus.node.journal import Journal, JournalError
from afbus.proto import control, frames
from afbus.proto.address import BusAddress
from afbus.proto.control import BUS_SOCKET, SO_BUS_ADDRESSES
from afbus.proto.errors import AddressInUse, CloseCode, ConfigError
from afbus.proto.frames import Call, Closed, Hello, Op, Result, Welcome
from afbus.proto.limits import FRAME_BYTES
from afbus.proto.notice import Event, Notice
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

PATH = b"/tmp/test"
MASTER = b"org.example.bus"
WAIT_S = 20.0


class Client:
    """A client of the door, in the loop of the test."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.serial = 0
        self.rings: Rings | None = None
        self.line = -1

    @classmethod
    async def come(cls, door: Path) -> Client:
        """Connect, and say nothing."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        await asyncio.get_running_loop().sock_connect(connection, os.fspath(door))
        return cls(connection)

    @classmethod
    async def connect(cls, door: Path, **hello: Any) -> Client:
        """Connect and be welcomed."""
        client = await cls.come(door)
        await client.say(frames.encode(Hello(**hello)))
        frame = await client.hear()
        assert isinstance(frame, Welcome), frame
        client.welcome = frame
        return client

    welcome: Welcome

    async def say(self, data: bytes) -> None:
        """Send a packet."""
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def hear(self) -> frames.Frame | None:
        """Return the next frame, None at the end; descriptors become rings."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self.socket, readable.set)
        try:
            async with asyncio.timeout(WAIT_S):
                await readable.wait()
        finally:
            loop.remove_reader(self.socket)
        try:
            data, fds, _, _ = socket.recv_fds(self.socket, FRAME_BYTES, 3)
        except ConnectionResetError:
            return await self.hear()
        if fds:
            tx, rx, self.line = fds
            self.rings = Rings(tx, rx, self.line, lambda source, _: source, lambda dst, _: dst)
            os.close(tx)
            os.close(rx)
        return frames.decode(data) if data else None

    async def hear_rings(self) -> list[int]:
        """Return the descriptors of the welcome, whoever uses them: TX ring, RX ring, line."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self.socket, readable.set)
        await readable.wait()
        loop.remove_reader(self.socket)
        return socket.recv_fds(self.socket, FRAME_BYTES, 3)[1]

    async def ask(self, op: Op, **args: Any) -> Result:
        """Call, and return the result."""
        self.serial += 1
        await self.say(frames.encode(Call(self.serial, op, args)))
        result = await self.hear()
        assert isinstance(result, Result), result
        assert result.serial == self.serial
        return result

    async def call(self, op: Op, **args: Any) -> Any:
        """Call, and return the value; a refusal is raised."""
        result = await self.ask(op, **args)
        if not result.is_ok:
            raise result.to_error()
        return result.value

    async def settle(self, endpoints: int) -> Any:
        """Ask for the status until the agent has noticed who is gone, and return it."""
        async with asyncio.timeout(WAIT_S):
            status = await self.call(Op.STATUS)
            while status["endpoints"] > endpoints:
                status = await self.call(Op.STATUS)
        return status

    async def bind(self) -> None:
        """Bind the bus."""
        await self.call(Op.BIND, address=BusAddress(PATH, MASTER).pack())

    async def grant(self, client: Client, address: bytes) -> None:
        """Let another one in, as the master."""
        item = list(control.encode(control.OwnedAddr(BusAddress(PATH, address)))[1:])
        dst = client.welcome.provisional
        await self.call(Op.CONTROL, dst=dst, src=None, items=[item], body=b"welcome")

    async def receive(self) -> bytes:
        """Return the next body from the ring."""
        assert self.rings is not None
        found = await asyncio.to_thread(self.rings.recv, 1, 65536, 0, False, WAIT_S)
        assert not isinstance(found, int), found
        return found[0][0]

    def close(self) -> None:
        """Be gone."""
        self.socket.close()
        if self.rings is not None:
            self.rings.close()
            os.close(self.line)
            self.rings = None


class House:
    """A folder for agents, and their clients."""

    def __init__(self, folder: Path) -> None:
        self.door = folder / "node.sock"
        self.config = Config(door=self.door)
        self.clients: list[Client] = []

    @contextlib.asynccontextmanager
    async def agent(self, **changes: Any) -> AsyncIterator[None]:
        """Run an agent in this loop."""
        ready = asyncio.Event()
        config = replace(self.config, **changes)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(run(config, ready.set))
            waiting = group.create_task(ready.wait())
            await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
            yield
            waiting.cancel()
            task.cancel()

    async def connect(self, **hello: Any) -> Client:
        """Return a welcome client."""
        self.clients.append(await Client.connect(self.door, **hello))
        return self.clients[-1]

    async def come(self) -> Client:
        """Return a client that has said nothing."""
        self.clients.append(await Client.come(self.door))
        return self.clients[-1]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A folder without an agent."""
    house = House(tmp_path)
    yield house
    for client in house.clients:
        client.close()


def count_fds() -> int:
    """Return how many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


async def test_r10_r12_join_over_real_rings(house: House) -> None:
    """The mail's first two points: bind, ask the master, be granted an address, talk."""
    async with house.agent():
        master, client = await house.connect(), await house.connect()
        await master.bind()
        await client.call(Op.ATTACH, path=PATH)
        assert client.rings is not None
        verdict = await asyncio.to_thread(
            client.rings.send, UNICAST, MASTER, b"", [b"auth"], [], 0, 0, 0, 0, WAIT_S
        )
        assert verdict == 0
        assert await master.receive() == b"auth"
        await master.grant(client, b"1.1")
        assert await client.receive() == b"welcome"
        assert Notice.decode(await master.receive()).event is Event.JOINED
        client.close()
        killed = Notice.decode(await master.receive())
        assert (killed.event, killed.subject) == (Event.KILLED, (b"1.1",))
        assert killed.detail["pid"] == os.getpid()


async def test_d16_restart_keeps_who_resumes(house: House) -> None:
    """An agent that ends tells its clients; the next one gives them back what they had."""
    async with house.agent():
        master = await house.connect()
        await master.bind()
    last = await master.hear()
    assert isinstance(last, Closed)
    assert last.code is CloseCode.GOING_DOWN
    assert not house.door.exists()
    async with house.agent():
        again = await house.connect(resume=master.welcome.token)
        assert again.welcome.resumed
        assert again.welcome.epoch == master.welcome.epoch + 1
        packed = await again.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_ADDRESSES)
        assert packed == [BusAddress(PATH, MASTER).pack()]
        await again.call(Op.CLOSE)
        assert await again.hear() is None


async def test_case4_nothing_is_left_behind(house: House) -> None:
    """After many endpoints, and the end of the agent, no descriptor and no file is left."""
    counts = []
    for _ in range(2):
        async with house.agent():
            for _ in range(100):
                client = await house.connect()
                client.close()
            last = await house.connect()
            await last.settle(endpoints=1)
            await last.call(Op.CLOSE)
            last.close()
        counts.append(count_fds())
        assert list(house.door.parent.iterdir()) == []
    assert counts[0] == counts[1]


async def test_case5_spoilt_ring_ends_its_endpoint_alone(house: House) -> None:
    """Who writes garbage over the header of a ring is told why and killed; others go on."""
    async with house.agent():
        master, other = await house.connect(), await house.connect()
        await master.bind()
        hostile = await house.come()
        await hostile.say(frames.encode(Hello()))
        tx, rx, line = await hostile.hear_rings()
        await hostile.say(frames.encode(Call(1, Op.ATTACH, {"path": PATH})))
        assert isinstance(await hostile.hear(), Result)
        await master.call(
            Op.CONTROL,
            dst=b"@3",
            src=None,
            items=[list(control.encode(control.OwnedAddr(BusAddress(PATH, b"1.1")))[1:])],
            body=b"",
        )
        assert Notice.decode(await master.receive()).event is Event.JOINED
        with mmap.mmap(tx, mmap.PAGESIZE) as header:
            header[:] = b"\xa5" * mmap.PAGESIZE
        os.write(line, b"k")
        closed = await hostile.hear()
        assert isinstance(closed, Closed)
        assert closed.code is CloseCode.RING
        # The message with the grant was never read, and its sender is told so.
        assert Notice.decode(await master.receive()).event is Event.UNREAD
        killed = Notice.decode(await master.receive())
        assert (killed.event, killed.subject) == (Event.KILLED, (b"1.1",))
        assert killed.reason.startswith("cut off: ")
        assert (await other.call(Op.STATUS))["endpoints"] == 2
        for fd in (tx, rx, line):
            os.close(fd)


async def test_second_agent_is_refused(house: House) -> None:
    """One door, one agent: the error names the other one's pid."""
    async with house.agent():
        with pytest.raises(AddressInUse, match=f"pid {os.getpid()}"):
            await run(house.config)
        assert (await house.connect()).welcome.node


async def test_stale_socket_is_replaced(house: House) -> None:
    """The socket of an agent that was killed is no hindrance; one in use, or another file, is."""
    left = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left.bind(os.fspath(house.door))
    left.listen()
    with pytest.raises(AddressInUse, match="somebody listens"):
        await run(house.config)
    left.close()
    async with house.agent():
        await house.connect()
    house.door.write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        await run(house.config)
    assert house.door.read_text() == "precious"


@pytest.mark.parametrize("mode", [None, 0o666, 0o620])
async def test_door_has_the_mode_of_the_settings(house: House, mode: int | None) -> None:
    """Who may come is a setting; by default a user's door is the user's alone."""
    usual = 0o666 if os.geteuid() == 0 else 0o600
    async with house.agent(mode=mode):
        assert stat.S_IMODE(house.door.stat().st_mode) == (mode or usual)


async def test_door_that_cannot_be_made(house: House) -> None:
    """The error names the setting."""
    house.door.parent.joinpath("file").write_text("")
    with pytest.raises(ConfigError, match="door"):
        await run(Config(door=house.door.parent / "file" / "node.sock"))


async def test_broken_journal_is_set_aside(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """The agent says so and begins empty."""
    journal = house.door.with_name("node.sock.journal")
    journal.write_bytes(b"garbage" * 1000)
    async with house.agent():
        assert (await house.connect()).welcome.epoch == 1
    assert journal.with_name("node.sock.journal.broken").read_bytes() == b"garbage" * 1000
    assert "set aside" in caplog.text


async def test_agent_goes_on_without_its_journal(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A journal that cannot be written is given up, loudly, and clients are served."""

    def fail(_journal: object, _effect: object) -> None:
        raise JournalError("journal: database or disk is full")

    async with house.agent():
        monkeypatch.setattr(Journal, "write", fail)
        await (await house.connect()).bind()
        assert "cannot resume after a restart" in caplog.text
        assert not house.door.with_name("node.sock.journal").exists()
        assert (await house.connect()).welcome.endpoint == 2


async def test_unexpected_exception_ends_the_agent(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug is not swallowed by the loop: the agent ends with it, and cleans up."""

    def fail(*_args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Core, "receive_packet", fail)

    async def provoke() -> None:
        async with house.agent():
            client = await house.come()
            await client.say(b"anything")
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        await provoke()
    assert caught.group_contains(ZeroDivisionError)
    assert list(house.door.parent.iterdir()) == []


async def test_silent_client_is_cut(house: House) -> None:
    """Without HELLO the connection ends, with the reason."""
    async with house.agent(limits=Limits(hello_s=0.01)):
        client = await house.come()
        closed = await client.hear()
        assert isinstance(closed, Closed)
        assert closed.code is CloseCode.ORDER
        assert await client.hear() is None


async def test_connections_are_bounded(house: House) -> None:
    """Who comes when the house is full is told so; there is room again when somebody leaves."""
    async with house.agent(connections=2):
        first, _ = await house.connect(), await house.connect()
        closed = await (await house.come()).hear()
        assert isinstance(closed, Closed)
        assert closed.code is CloseCode.LIMIT
        await first.call(Op.CLOSE)
        await house.connect()


async def test_client_that_does_not_read_hinders_nobody(house: House) -> None:
    """Its answers wait, at most one beyond what the kernel holds, and it gets all of them."""
    async with house.agent():
        deaf, other = await house.connect(), await house.connect()
        call = frames.encode(Call(1, Op.LIST, {"what": "endpoints"}))
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 100_000:
                deaf.socket.send(call, socket.MSG_DONTWAIT)
                sent += 1
                if sent % 10 == 0:
                    await asyncio.sleep(0)
        assert sent < 100_000, "the agent stops to read from who does not read"
        assert (await other.call(Op.STATUS))["endpoints"] == 2
        for _ in range(sent):
            assert isinstance(await deaf.hear(), Result)
        assert (await deaf.ask(Op.STATUS)).is_ok


async def test_case9_descriptors_of_clients_are_not_taken(house: House) -> None:
    """Descriptors sent to the door are closed by the kernel, not kept by the agent."""
    async with house.agent():
        client = await house.connect()
        read, write = os.pipe()
        before = count_fds()
        for number in range(100):
            call = frames.encode(Call(number, Op.STATUS))
            socket.send_fds(client.socket, [call], [write] * 16)
            assert isinstance(await client.hear(), Result)
        assert count_fds() == before
        os.close(write)
        # With the last writer gone the pipe is at its end.
        assert os.read(read, 1) == b""
        os.close(read)


async def test_door_survives_the_end_of_descriptors(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes when none is left is told so, the others go on, and later all is well."""
    async with house.agent():
        client = await house.connect()
        waiting = [
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            for _ in range(3)
        ]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
            taken = []
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            for one in waiting:
                one.connect(os.fspath(house.door))
                closed = await Client(one).hear()
                assert isinstance(closed, Closed)
                assert (closed.code, "descriptors" in closed.text) == (CloseCode.LIMIT, True)
            assert (await client.call(Op.STATUS))["endpoints"] == 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
            for one in waiting:
                one.close()
        await house.connect()


@pytest.mark.slow
async def test_case42_ten_thousand_hostile_packets(house: House) -> None:
    """Garbage ends its own connection with a reason; all others go on, and nothing leaks."""
    draw = random.Random(42)
    good = [
        frames.encode(Hello()),
        frames.encode(Call(1, Op.BIND, {"address": BusAddress(PATH, MASTER).pack()})),
        frames.encode(Call(2, Op.ATTACH, {"path": PATH})),
        frames.encode(Call(3, Op.LIST, {"what": "endpoints"})),
        frames.encode(Call(4, Op.CONTROL, {"dst": b"@1", "items": [[1, bytes(368)]], "body": b""})),
        frames.encode(Call(5, Op.OPTION_SET, {"level": 1, "name": 16, "value": 1})),
    ]

    def make_packet() -> bytes:
        if draw.random() < 0.3:
            return draw.randbytes(draw.randrange(1, 300))
        data = bytearray(draw.choice(good))
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data[: draw.randrange(1, len(data) + 1)])

    async with house.agent():
        master, member = await house.connect(), await house.connect()
        await master.bind()
        await member.call(Op.ATTACH, path=PATH)
        await master.grant(member, b"1.1")
        before = count_fds()
        packets, connections = 0, 0
        while packets < 10_000:
            hostile = await Client.come(house.door)
            connections += 1
            closed: frames.Frame | None = None
            if draw.random() < 0.5:
                await hostile.say(good[0])
            while not isinstance(closed, Closed):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    await hostile.say(make_packet())
                packets += 1
                await asyncio.sleep(0)
                with contextlib.suppress(BlockingIOError, ConnectionResetError):
                    data, fds, _, _ = socket.recv_fds(
                        hostile.socket, FRAME_BYTES, 3, socket.MSG_DONTWAIT
                    )
                    for fd in fds:
                        os.close(fd)
                    assert data, "no connection ends without a reason"
                    closed = frames.decode(data)
            assert closed.code in (
                CloseCode.MALFORMED,
                CloseCode.LIMIT,
                CloseCode.ORDER,
                CloseCode.VERSION,
            )
            hostile.close()
        assert connections > 1000
        status = await master.settle(endpoints=2)
        assert (status["buses"], status["connections"]) == (1, 2)
        assert member.rings is not None
        sent = member.rings.send(UNICAST, MASTER, b"", [b"still"], [], 0, 0, 0, 0, WAIT_S)
        assert sent == 0
        assert count_fds() == before


# --- processes ---

_AGENT = """
import asyncio, sys
from pathlib import Path
from afbus.node.agent import run
from afbus.node.config import Config
asyncio.run(run(Config(door=Path(sys.argv[1])), lambda: print("ready", flush=True)))
"""


@contextlib.contextmanager
def agent_process(door: Path, program: str = _AGENT) -> Iterator[subprocess.Popen[str]]:
    """Run an agent in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-c", program, door], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.cluster
async def test_case3_d16_killed_agent_is_resumed(house: House) -> None:
    """After `kill -9` the next agent takes over door and journal; addresses are kept."""
    with agent_process(house.door) as process:
        master, member = await house.connect(), await house.connect()
        await master.bind()
        await member.call(Op.ATTACH, path=PATH)
        await master.grant(member, b"1.1")
        process.kill()
        process.wait()
        assert await master.hear() is None
    with agent_process(house.door) as process:
        again = await house.connect(resume=member.welcome.token)
        assert again.welcome.resumed
        back = await house.connect(resume=master.welcome.token)
        assert back.welcome.resumed
        rows = (await back.call(Op.LIST, what="addresses", path=PATH))["rows"]
        assert [row["address"] for row in rows] == [MASTER.decode(), "1.1"]
        assert again.rings is not None
        assert again.rings.send(UNICAST, MASTER, b"", [b"hi"], [], 0, 0, 0, 0, WAIT_S) == 0
        assert await back.receive() == b"hi"
        for client in (again, back):
            await client.call(Op.CLOSE)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert list(house.door.parent.iterdir()) == []


@pytest.mark.cluster
@pytest.mark.slow
async def test_d5_d16_what_was_read_survives_a_kill(house: House) -> None:
    """An agent that is killed as soon as a member has read of a match has written it down.

    40 agents, one after the other; the member has all 40 matches in the end.
    """
    tokens: list[bytes | None] = [None, None]
    for count in range(1, 41):
        with agent_process(house.door) as process:
            master, member = [await house.connect(resume=token) for token in tokens]
            if count == 1:
                await master.bind()
                await member.call(Op.ATTACH, path=PATH)
                tokens = [master.welcome.token, member.welcome.token]
            rows = (await master.call(Op.LIST, what="matches", path=PATH))["rows"]
            assert len(rows) == count - 1
            match = control.Match(PATH, Terms.of("topic", number=str(count)))
            item = list(control.encode(control.MulticastMatch(match))[1:])
            args = {"dst": member.welcome.provisional, "src": None, "items": [item], "body": b""}
            reading = asyncio.to_thread(read_and_kill, member, process)
            call = frames.encode(Call(1, Op.CONTROL, args))
            await asyncio.gather(reading, master.say(call))
            process.wait()
        for client in (master, member):
            client.close()


def read_and_kill(member: Client, process: subprocess.Popen[str]) -> None:
    """Kill the agent as soon as the member has read something."""
    assert member.rings is not None
    found = member.rings.recv(1, 65536, 65536, False, WAIT_S)
    process.kill()
    assert not isinstance(found, int), found


@pytest.mark.cluster
async def test_agent_of_one_host_needs_no_network(house: House) -> None:
    """Where QUIC and certificates are not installed, an agent serves its host all the same."""
    absent = "import sys; sys.modules['aioquic'] = sys.modules['cryptography'] = None"
    with agent_process(house.door, absent + _AGENT):
        await (await house.connect()).bind()


_FAILING_AGENT = """
import sys
from afbus.node import agent
class Failing:
    def __init__(self, switch): self._switch = switch
    def __getattr__(self, name): return getattr(self._switch, name)
    def take_events(self): raise RuntimeError("the thread of the switch panicked: no seat")
make = agent.Switch
agent.Switch = lambda **quotas: Failing(make(**quotas))
from afbus.cli.main import main
main()
"""


@pytest.mark.cluster
async def test_d16_agent_ends_with_its_switch(house: House) -> None:
    """A switch that has failed ends the agent with one line; its clients resume with the next."""
    command = [sys.executable, "-c", _FAILING_AGENT, "node", "--door", str(house.door)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        assert process.stdout is not None
        assert b"afbus agent" in await process.stdout.readline()
        master = await house.connect()
        await master.bind()
        # What the switch has to say of this is what cannot be taken.
        await spoil(await house.come())
        closed = await master.hear()
        assert isinstance(closed, Closed)
        assert closed.code is CloseCode.GOING_DOWN
        async with asyncio.timeout(WAIT_S):
            _, complaint = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 1
    text = "the thread of the switch panicked: no seat; the agent ends, and its clients can resume"
    assert complaint.decode() == f"afbus: {text}\n"
    async with house.agent():
        assert (await house.connect(resume=master.welcome.token)).welcome.resumed


async def spoil(client: Client) -> None:
    """Be an endpoint that writes garbage over the header of a ring."""
    await client.say(frames.encode(Hello()))
    tx, rx, line = await client.hear_rings()
    with mmap.mmap(tx, mmap.PAGESIZE) as header:
        header[:] = b"\xa5" * mmap.PAGESIZE
    os.write(line, b"k")
    for fd in (tx, rx, line):
        os.close(fd)


@pytest.mark.cluster
async def test_agent_is_small(house: House) -> None:
    """An idle agent has less than 60 MiB, and an idle endpoint less than 20 KiB of it."""

    def read_kib(name: str) -> int:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return int(fields[name].split()[0])

    def count_agent_fds() -> int:
        return len(os.listdir(f"/proc/{process.pid}/fd"))

    with agent_process(house.door) as process:
        assert read_kib("VmRSS") < 60 * 1024
        client = await house.connect(tx_bytes=4096, rx_bytes=4096)
        await client.call(Op.STATUS)
        before, fds = read_kib("RssAnon"), count_agent_fds()
        for _ in range(300):
            client = await house.connect(tx_bytes=4096, rx_bytes=4096)
        await client.call(Op.STATUS)
        # The rings are shared memory, and do not count as anonymous.
        assert (read_kib("RssAnon") - before) / 300 < 20
        assert count_agent_fds() == fds + 2 * 300


# --- what the kernel says ---


def test_case10_process_is_known_by_its_start() -> None:
    """A pid alone is nobody: another start is another process."""
    ticks = processes.read_start_ticks(os.getpid())
    me = Credentials(os.getpid(), os.getuid(), os.getgid(), ticks)
    assert processes.is_alive(me)
    assert not processes.is_alive(replace(me, start_ticks=ticks + 1))
    assert not processes.is_alive(replace(me, start_ticks=0))
    assert me.is_same_process(me)
    nobody = replace(me, start_ticks=0)
    assert not nobody.is_same_process(nobody)


@pytest.mark.cluster
def test_case10_ended_process_is_nobody() -> None:
    """A process that has ended but was not waited for is not alive."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert processes.read_start_ticks(process.pid) == 0
    assert processes.read_start_ticks(process.pid) == 0


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_r10_credentials_come_from_the_kernel(
    monkeypatch: pytest.MonkeyPatch, has_pidfd: bool
) -> None:
    """Pid, user and start are those of the process that connected, on older kernels too."""
    if not has_pidfd:
        monkeypatch.setattr(processes, "SO_PEERPIDFD", 9999)
    before = count_fds()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        found = processes.read_credentials(here)
    ticks = processes.read_start_ticks(os.getpid())
    assert found == Credentials(os.getpid(), os.getuid(), os.getgid(), ticks)
    assert count_fds() == before


def test_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """READY=1 goes to NOTIFY_SOCKET; without it, or with nobody there, nothing happens."""
    notify_service("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.bind(os.fspath(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(tmp_path / "notify"))
        notify_service("READY=1")
        assert service.recv(100) == b"READY=1"
    notify_service("READY=1")


def test_lock_survives_being_deleted(tmp_path: Path) -> None:
    """Two never hold it at a time, although its holder deletes it."""
    door = tmp_path / "node.sock"
    with door_module.lock(door), pytest.raises(AddressInUse), door_module.lock(door):
        pass
    with door_module.lock(door):
        pass
    assert list(tmp_path.iterdir()) == []
