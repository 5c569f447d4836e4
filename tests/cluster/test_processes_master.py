"""The cluster's master as a process: killed at every point of its writing, and a crowd (28, 30).

It is forked from a process that has imported everything, so that five hundred are cheap. Nodes are
stations: a real link and a mirror, and no agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from cryptography import x509
from tests.cases.actors import Actor, Fleet, Stage
from tests.cluster.region import cpu_s
from tests.figures import IS_FULL, note
from tests.master.station import Station
from tests.master.test_service import MASTER
from tests.master.world import EVERYTHING

from afbus.link.credentials import Credentials
from afbus.link.dialer import Dialer
from afbus.link.effect import Down, Silent
from afbus.link.identity import Identity, Role
from afbus.link.quic import QuicCarrier
from afbus.link.reason import Reason
from afbus.master.directory import Directory
from afbus.master.door import ask_master
from afbus.master.issuer import make_key, make_request
from afbus.master.journal import Journal
from afbus.master.service import Config, run
from afbus.proto.cluster import ClusterWelcome
from afbus.proto.frames import Result
from afbus.proto.operation import ClusterOp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from afbus.link.link import Link
    from afbus.master.effect import Audit
    from afbus.proto.errors import LinkError

pytestmark = [pytest.mark.cluster, pytest.mark.slow(limit_s=1200 if IS_FULL else 300)]

#: How often the master is killed.
KILLS: Final = 500 if IS_FULL else 15
#: The last of all blocks and names that were told are stated again: the rest is given up.
KEPT: Final = 10
#: Of blocks and of names, in one life of the master; fewer if it dies before.
CALLS: Final = 15
PATH: Final = b"/demo"
#: Nodes that find the master at the same time, and how long they may take, in seconds.
CROWD: Final = 1000 if IS_FULL else 30
CROWD_S: Final = 240.0 if IS_FULL else 60.0
#: How long the master is away, and is looked at when all are back.
AWAY_S: Final = 10.0 if IS_FULL else 1.0
REST_S: Final = 5.0 if IS_FULL else 1.0


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    """The state of a new cluster whose policy allows everything."""
    made = Directory(tmp_path / "state")
    made.make("demo", datetime.now(UTC).timestamp(), os.urandom, None)
    made.policy.write_text(EVERYTHING)
    return made


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """Where masters are forked."""
    with Fleet(tmp_path) as made:
        yield made


def be_master(stage: Stage, folder: str, port: int, commits: int, is_written: bool) -> None:
    """Be the master, tell the port, and die within a commit, before or behind its writing."""
    commit, left = Journal.commit, commits

    def commit_or_die(
        self: Journal, rows: Iterable[tuple[bytes, bytes | None]], audits: Sequence[Audit] = ()
    ) -> None:
        nonlocal left
        left -= 1
        if left == 0 and not is_written:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(self, rows, audits)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.commit = commit_or_die  # type: ignore[method-assign]  # what dies is not ours to return
    asyncio.run(run(Config(Path(folder), "127.0.0.1", port), lambda _, port: stage.tell(port)))


@asynccontextmanager
async def death_of(actor: Actor) -> AsyncIterator[asyncio.Event]:
    """Have an event that is set when a process is gone."""
    loop, is_dead = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        loop.remove_reader(actor.pidfd)
        is_dead.set()

    loop.add_reader(actor.pidfd, tell)
    try:
        yield is_dead
    finally:
        loop.remove_reader(actor.pidfd)


class Told:
    """What the master has said that a node has."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.names: list[bytes] = []
        self.ever: set[int] = set()

    def lease(self, block: int) -> None:
        """A block was told."""
        assert block not in self.ever, "a block was leased twice"
        self.ever.add(block)
        self.blocks.append(block)

    async def check(self, node: Station, directory: Directory) -> None:
        """Assert that the table of the master that came back has it all; state the last of it."""
        status = await asyncio.to_thread(ask_master, directory.door, ClusterOp.STATUS)
        await node.until(lambda: node.mirror.version == status["version"])
        bus = node.mirror.get_bus(PATH)
        for block in self.blocks:
            assert bus is not None
            assert node.mirror.find_node(bus.number, b"%d.1" % block), f"{block} is not leased"
        for name in self.names:
            assert bus is not None
            assert node.mirror.get_owner(bus.number, name), f"{name!r} was told and is nobody's"
        del self.blocks[:-KEPT], self.names[:-KEPT]
        await node.do(ClusterOp.RESTATE)
        await node.do(ClusterOp.ENTER, endpoint=1, uid=1000)
        await node.do(ClusterOp.BIND, endpoint=1, path=PATH, address=b"master")
        for block in self.blocks:
            await node.do(ClusterOp.LEASE, block=block)
        for name in self.names:
            await node.do(ClusterOp.OWN, endpoint=1, path=PATH, name=name)
        await node.do(ClusterOp.RESTATED)


async def live(node: Station, told: Told, directory: Directory, port: int, turn: int) -> None:
    """Find the master, see that it has all, and ask it for more until it dies."""
    node.welcome = None
    Dialer(node.carrier, MASTER, [("127.0.0.1", port)], random.Random(turn))
    await node.until(lambda: node.welcome)
    await told.check(node, directory)
    for count in range(CALLS):
        block = (await node.do(ClusterOp.LEASE))["block"]
        told.lease(block)
        name = b"n%d.%d" % (turn, count)
        assert (await node.do(ClusterOp.OWN, endpoint=1, path=PATH, name=name))["outcome"] == 1
        told.names.append(name)


async def test_case28_killed_at_every_point_of_writing(directory: Directory, fleet: Fleet) -> None:
    """Before a commit, behind it, or at any moment: what was told is there, no number comes twice.

    The list of cases asks for 500 kills, which AFBUS_TEST_FULL has.
    """
    chance, deaths = random.Random(28), dict.fromkeys(("before", "behind", "any"), 0)
    told, node, port = Told(), Station("a"), 0
    began = time.monotonic()
    for turn in range(KILLS + 2):
        # The first one makes a node, the last one shows that nothing is lost: both live long.
        is_killed = 0 < turn <= KILLS
        how = chance.choice(list(deaths)) if is_killed else "any"
        commits = chance.randint(1, 40) if how != "any" else 0
        master = fleet.start(
            be_master,
            folder=os.fspath(directory.path),
            port=port,
            commits=commits,
            is_written=how == "behind",
        )
        async with death_of(master) as is_dead:
            try:
                port = await asyncio.to_thread(master.hear)
            except EOFError:
                deaths[how] += 1
                continue
            if not turn:
                token = await asyncio.to_thread(ask_master, directory.door, ClusterOp.TOKEN)
                assert (await node.enrol(("127.0.0.1", port), token["token"])).is_ok
            node.carrier = QuicCarrier(node.make_member(os.urandom(16)), "127.0.0.1")
            async with asyncio.TaskGroup() as group:
                life = group.create_task(live(node, told, directory, port, turn))
                dying = group.create_task(is_dead.wait())
                limit_s = chance.uniform(0.0, 0.4) if is_killed and how == "any" else None
                await asyncio.wait((life, dying), timeout=limit_s, return_when="FIRST_COMPLETED")
                if not is_killed:
                    await life
                deaths[how] += is_killed
                life.cancel()
                dying.cancel()
            node.carrier.close()
        master.kill()
    rate = KILLS / (time.monotonic() - began)
    assert len(told.ever) > KILLS
    assert sum(deaths.values()) == KILLS
    note(f"{deaths} kills, {rate:.1f}/s; {len(told.ever)} blocks told, 0 lost, 0 leased twice")


class Walker(Station):
    """A station that is live as soon as it can be."""

    def __init__(self, name: str, crowd: Crowd) -> None:
        super().__init__(name)
        self._crowd = crowd
        self._last = 0

    def accept(self, link: Link) -> Any:
        """Begin with a link."""
        self._crowd.live.discard(self.name)
        self._crowd.links += 1
        return super().accept(link)

    def handle_event(self, link: Link, event: Any) -> None:
        """Follow what happens, and leave a master that is silent, as nodes do."""
        super().handle_event(link, event)
        if isinstance(event, Silent):
            link.close(Reason.SILENT, "the master is silent")
        elif isinstance(event, Down):
            self._crowd.live.discard(self.name)

    def receive(self, frame: Any) -> None:
        """Follow a frame: state nothing after WELCOME, and note the answer."""
        super().receive(frame)
        match frame:
            case ClusterWelcome():
                self.call(ClusterOp.RESTATE)
                self._last = self.call(ClusterOp.RESTATED)
            case Result(serial) if serial == self._last:
                self._crowd.live.add(self.name)
                self._crowd.news.set()


class Crowd:
    """Many stations, and who of them is live."""

    def __init__(self, directory: Directory, address: tuple[str, int]) -> None:
        root = x509.load_pem_x509_certificate(directory.root.read_bytes())
        issuer, key, utc = directory.load(), make_key(), datetime.now(UTC).timestamp()
        request = make_request(key)
        self.live: set[str] = set()
        self.links = self.failures = 0
        self.news = asyncio.Event()
        self.walkers = [Walker(f"w{number}", self) for number in range(CROWD)]
        for number, one in enumerate(self.walkers):
            identity = Identity("demo", Role.NODE, one.name)
            issued = issuer.issue(request, identity, 1 << 100 | number, utc)
            one.credentials, one.root = Credentials(issued.chain, key), root
            one.carrier = QuicCarrier(one.make_member(os.urandom(16)), "127.0.0.1")
            Dialer(one.carrier, MASTER, [address], random.Random(number), self._note)

    def _note(self, _: LinkError) -> None:
        self.failures += 1

    async def until(self, count: int) -> float:
        """Wait until so many are live; return how many seconds that took."""
        began = time.monotonic()
        async with asyncio.timeout(CROWD_S):
            while len(self.live) != count:
                self.news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await self.news.wait()
        return time.monotonic() - began

    def close(self) -> None:
        """End all."""
        for one in self.walkers:
            one.carrier.close()


async def test_case30_a_crowd_comes_back_at_once(directory: Directory, fleet: Fleet) -> None:
    """All nodes are live soon after the master is, and then it is at rest.

    The list of cases asks for 1,000 within 30 s, which AFBUS_TEST_FULL has.
    """
    folder = os.fspath(directory.path)
    master = fleet.start(be_master, folder=folder, port=0, commits=0, is_written=False)
    port = await asyncio.to_thread(master.hear)
    crowd = Crowd(directory, ("127.0.0.1", port))
    try:
        first_s = await crowd.until(CROWD)
        master.kill()
        await crowd.until(0)
        await asyncio.sleep(AWAY_S)  # lasts: the outage
        failures, links = crowd.failures, crowd.links
        master = fleet.start(be_master, folder=folder, port=port, commits=0, is_written=False)
        await asyncio.to_thread(master.hear)
        back_s = await crowd.until(CROWD)
        busy_s = cpu_s(master.pid)
        links, failures = crowd.links - links, crowd.failures - failures
        await asyncio.sleep(REST_S)  # lasts: the time measured
        rest = (cpu_s(master.pid) - busy_s) / REST_S
        assert len(crowd.live) == CROWD
    finally:
        crowd.close()
    note(
        f"{CROWD} nodes are live {first_s:.1f} s after the first start of the master, and "
        f"{back_s:.1f} s after it came back (bar 30 s), by {links} links and {failures} failed "
        f"calls; it took {busy_s:.1f} s of a CPU, and then {100 * rest:.0f} % of one (bar 100 %)"
    )
