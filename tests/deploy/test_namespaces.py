"""Containers: an application that has the folder of the node's socket and nothing else.

The namespaces are those that an engine makes (container.py). What a number means depends on the
namespace of who reads it, so credentials are where this can go wrong (D17).
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 (there is no file to import it from in a container)
import errno
import os
import signal
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from tests.cases.actors import ITEMS, MASTER, MULTICAST, PATIENCE_S, Fleet, Stage, about, join
from tests.cases.actors import PATH as BUS
from tests.cases.bodies import pack_body, read_body
from tests.deploy.container import CLONE_NEWUSER, DOOR, OUTER_ROOT, UIDS
from tests.deploy.kernel import unshare

import afbus
from afbus import Event, Identity, Socket, create
from afbus import join as join_bus
from afbus.node import agent, config
from afbus.proto.address import BusAddress
from afbus.proto.errors import AddressInUse, Denied, NotConnected
from afbus.proto.limits import INLINE_BYTES
from afbus.proto.notice import Notice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cases.conftest import Node
    from tests.deploy.container import Yard

pytestmark = pytest.mark.cluster

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")

#: The kernel's overflow uid: whoever has no number here.
OVERFLOW = int(Path("/proc/sys/kernel/overflowuid").read_text())
INSIDE, OUTSIDE = BusAddress(BUS, "inside"), BusAddress(BUS, "outside")
LARGE = 3 * INLINE_BYTES
_UCRED = struct.Struct("=iII")


class Got(NamedTuple):
    """One message, taken apart."""

    body: bytes
    source: BusAddress
    #: pid, uid, gid
    credentials: tuple[int, int, int]
    identity: Identity
    descriptors: list[int]


def receive(one: Socket) -> Got:
    """Wait for a message that has credentials; notices are passed over."""
    while True:
        body, items, _, source = one.recvmsg(LARGE + 100, ITEMS)
        if not source.is_kernel:
            break
    found = {kind: data for _, kind, data in items}
    rights = found.get(socket.SCM_RIGHTS, b"")
    return Got(
        body,
        source,
        _UCRED.unpack(found[socket.SCM_CREDENTIALS]),
        Identity.decode(found[afbus.SCM_IDENTITY]),
        list(struct.unpack(f"={len(rights) // 4}i", rights)),
    )


def wait_notice(one: Socket, event: Event) -> Notice:
    """Wait for a notice; messages and other notices are passed over."""
    while True:
        body, source = one.recvfrom(4096)
        if source.is_kernel and (notice := Notice.decode(body)).event is event:
            return notice


def open_member(place: str | os.PathLike[str], name: str, **wish: Any) -> Socket:
    """Be a member of the bus who is told who sends."""
    one = join(place, name=name, **wish)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return one


def rights(*descriptors: int) -> tuple[int, int, bytes]:
    """The item that carries descriptors."""
    packed = struct.pack(f"={len(descriptors)}i", *descriptors)
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, packed


def read_whole(descriptor: int) -> bytes:
    """Read a memfd from its beginning, and close it."""
    with open(descriptor, "rb") as file:
        file.seek(0)
        return file.read()


# --- what works ---


def exchange(stage: Stage) -> None:
    """Tell what there is in the container; then do what a member can do."""
    nothing = socket.socket()
    stage.tell(
        {
            "root": sorted(os.listdir("/")),
            "socket": sorted(os.listdir(os.path.dirname(DOOR))),
            "pid": os.getpid(),
            "interfaces": [name for _, name in socket.if_nameindex()],
            "network": nothing.connect_ex(("127.0.0.1", 9)),
        }
    )
    nothing.close()
    with open_member(stage.place, "inside", listen=[("news", "GAP")]) as one:
        stage.tell("joined")
        for number in range(3):
            got = receive(one)
            assert read_body(got.body) == (0, number)
            # Back by the same way: small and large alone, the second to all.
            if number == 1:
                one.sendmsg([pack_body(1, number, 100)], [about("answers")], 0, MULTICAST)
            else:
                one.sendto(pack_body(1, number, len(got.body)), got.source)
        got = receive(one)
        assert got.body == b"take these"
        memfd, pipe = got.descriptors
        assert read_body(read_whole(memfd)) == (0, 3)
        os.write(pipe, b"through the pipe")
        os.close(pipe)
        mine = afbus.sealed_memfd([pack_body(1, 3, LARGE)])
        one.sendmsg([b"and this"], [rights(mine)], 0, got.source)
        os.close(mine)


@pytest.mark.parametrize("has_proc", [False, True], ids=["without /proc", "with its own /proc"])
def test_d14_d7_container_with_nothing_but_the_socket(
    node: Node, fleet: Fleet, yard: Yard, has_proc: bool
) -> None:
    """It joins, and unicasts, multicasts, large bodies, memfds and pipes pass both ways."""
    node.start()
    fleet.start_master()
    with open_member(node.place, "outside", listen=[("answers", "GAP")]) as one:
        container = yard.start(exchange, has_proc=has_proc)
        there = container.hear()
        assert there["root"] == (["proc", "run"] if has_proc else ["run"])
        assert "node.sock" in there["socket"]
        assert there["pid"] == 1
        assert there["interfaces"] == ["lo"]
        assert there["network"] == errno.ENETUNREACH
        assert container.hear() == "joined"
        one.sendto(pack_body(0, 0, 10), INSIDE)
        assert read_body(receive(one).body) == (1, 0)
        one.sendmsg([pack_body(0, 1, 10)], [about("news.today")], 0, MULTICAST)
        assert read_body(receive(one).body) == (1, 1)
        one.sendto(pack_body(0, 2, LARGE), INSIDE)
        assert read_body(receive(one).body) == (1, 2)
        memfd = afbus.sealed_memfd([pack_body(0, 3, LARGE)])
        reading, writing = os.pipe()
        one.sendmsg([b"take these"], [rights(memfd, writing)], 0, INSIDE)
        os.close(memfd)
        os.close(writing)
        with open(reading, "rb") as pipe:
            assert pipe.read() == b"through the pipe"
        (sent,) = receive(one).descriptors
        assert read_body(read_whole(sent)) == (1, 3)
        container.finish()


def stay(stage: Stage, name: str = "inside") -> None:
    """Be a member who echoes, and comes back when the agent does."""
    with open_member(stage.place, name) as one:
        stage.tell("joined")
        while True:
            try:
                body, _, _, source = one.recvmsg(100, ITEMS)
            except NotConnected:
                stage.tell("lost")
                continue
            if not source.is_kernel:
                one.sendto(body, source)


def test_case3_d16_container_comes_back_to_a_new_agent(
    node: Node, fleet: Fleet, yard: Yard
) -> None:
    """It has the folder, not the socket in it: a killed agent's successor is found there."""
    node.start(limits={"grace_s": PATIENCE_S})
    fleet.start_master()
    container = yard.start(stay)
    assert container.hear() == "joined"
    node.end(signal.SIGKILL)
    assert container.hear() == "lost"
    node.start()
    with open_member(node.place, "outside") as one:
        one.sendto(b"still there?", INSIDE)
        got = receive(one)
        assert (got.body, got.source) == (b"still there?", INSIDE)
        assert got.credentials[0] == container.pid


def test_case32_d15_killed_container_is_told(node: Node, fleet: Fleet, yard: Yard) -> None:
    """Its death is told, and nothing of it is left."""
    node.start()
    fleet.start_master()
    with open_member(node.place, "outside", watch=True) as one:
        container = yard.start(stay)
        assert container.hear() == "joined"
        container.kill()
        assert INSIDE.address in wait_notice(one, Event.KILLED).subject
        assert [row for row in one.listing("endpoints", BUS) if row["pid"] == container.pid] == []


def meddle(stage: Stage) -> None:
    """Try to change what lies beside the socket, and to read it; tell the errnos."""
    folder = os.path.dirname(DOOR)
    found = {}
    attempts: dict[str, Callable[[], object]] = {
        "delete the socket": lambda: os.unlink(DOOR),
        "put another there": lambda: os.rename(DOOR, f"{folder}/away"),
        "make a file": lambda: os.open(f"{folder}/file", os.O_CREAT | os.O_WRONLY),
        "change its mode": lambda: os.chmod(DOOR, 0o600),
        "read the journal": lambda: os.open(f"{DOOR}.journal", os.O_RDONLY),
        "write the journal": lambda: os.open(f"{DOOR}.journal", os.O_WRONLY),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = 0
        except OSError as error:
            found[name] = error.errno or -1
    stage.join().close()
    stage.tell(found)


@needs_root
@pytest.mark.parametrize("is_writable", [False, True], ids=["read-only", "writable"])
def test_case10_container_cannot_change_the_door(
    node: Node, fleet: Fleet, yard: Yard, is_writable: bool
) -> None:
    """A read-only mount is enough to connect; the agent's files are closed to other users."""
    node.start()
    fleet.start_master()
    container = yard.start(meddle, is_writable=is_writable)
    found = container.hear()
    assert set(found.values()) <= {errno.EACCES, errno.EPERM, errno.EROFS}, found
    container.finish()


# --- who is who ---


def say_hello(stage: Stage, name: str = "inside") -> None:
    """Say hello as what one is inside, and tell who that is."""
    with stage.join(name=name) as one:
        mine = os.getpid(), os.getuid(), os.getgid()
        stage.tell(mine)
        item = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, _UCRED.pack(*mine))
        one.sendmsg([b"hello"], [item], 0, OUTSIDE)
        stage.hear()


@pytest.mark.parametrize("uid", [0, pytest.param(7, marks=needs_root)])
def test_d17_container_is_who_it_is_outside(node: Node, fleet: Fleet, yard: Yard, uid: int) -> None:
    """Receivers read pid, uid and gid as the agent sees them, whatever they are inside."""
    node.start()
    fleet.start_master()
    with open_member(node.place, "outside") as one:
        container = yard.start(say_hello, uid=uid)
        assert container.hear() == [1, uid, uid]
        got = receive(one)
        outer = container.outer + uid
        gid = outer if os.geteuid() == 0 else os.getegid()
        assert got.credentials == (container.pid, outer, gid)
        assert got.identity == Identity(
            f"uid:{outer}", one.status()["node"], container.pid, outer, gid
        )
        rows = [row for row in one.listing("endpoints", BUS) if row["pid"] == container.pid]
        assert [row["uid"] for row in rows] == [outer]
        container.tell("done")
        container.finish()


@needs_root
def test_d17_d2_same_uid_of_two_containers_is_two_users(
    node: Node, fleet: Fleet, yard: Yard
) -> None:
    """Root of one container is not root of the other one, nor of the host."""
    node.start()
    master = fleet.start_master()
    with open_member(node.place, "outside") as one:
        principals = set()
        for number in range(2):
            name = f"root-{number}"
            container = yard.start(say_hello, outer=OUTER_ROOT + number * UIDS, name=name)
            assert container.hear() == [1, 0, 0]
            principals.add(receive(one).identity.principal)
            container.tell("done")
            container.finish()
        assert principals == {f"uid:{OUTER_ROOT}", f"uid:{OUTER_ROOT + UIDS}"}
        master.kill()
        wait_notice(one, Event.MASTER_LOST)
        heir = yard.start(inherit)
        assert heir.hear() == "in use"
        heir.finish()


def inherit(stage: Stage) -> None:
    """Try to become the master of the bus, whose master is gone."""
    with Socket(node=stage.place) as one:
        try:
            one.bind(MASTER)
            stage.tell("bound")
        except AddressInUse:
            stage.tell("in use")


def say_hello_unmapped(stage: Stage) -> None:
    """Say hello from a user namespace in which nobody has a number."""
    unshare(CLONE_NEWUSER)
    assert os.getuid() == OVERFLOW
    with stage.join(name="inside") as one:
        one.sendto(b"hello", OUTSIDE)
        stage.hear()


@pytest.mark.usefixtures("yard")
def test_d17_who_has_no_number_inside_has_one_outside(node: Node, fleet: Fleet) -> None:
    """A process cannot get rid of who it is by a namespace without a map."""
    node.start()
    fleet.start_master()
    with open_member(node.place, "outside") as one:
        somebody = fleet.start(say_hello_unmapped)
        got = receive(one)
        assert got.credentials == (somebody.pid, os.geteuid(), os.getegid())
        somebody.tell("done")
        somebody.finish()


def hear_hello(stage: Stage) -> None:
    """Be greeted; tell what credentials the greeting had."""
    with open_member(stage.place, "inside") as one:
        stage.tell("joined")
        got = receive(one)
        stage.tell([got.credentials, [got.identity.pid, got.identity.uid, got.identity.gid]])


def greet(node: Node, yard: Yard) -> tuple[Any, Any]:
    """Greet a member in a container; return SCM_CREDENTIALS and SCM_IDENTITY as it reads them."""
    with open_member(node.place, "outside") as one:
        container = yard.start(hear_hello)
        assert container.hear() == "joined"
        one.sendto(b"hello", INSIDE)
        credentials, identity = container.hear()
        container.finish()
    return credentials, identity


def test_d17_container_reads_who_somebody_is_for_the_node(
    node: Node, fleet: Fleet, yard: Yard
) -> None:
    """SCM_IDENTITY is the word of the node, the same for all who read it."""
    node.start()
    fleet.start_master()
    assert greet(node, yard)[1] == [os.getpid(), os.geteuid(), os.getegid()]


@needs_root
def test_d17_container_never_reads_a_uid_of_its_own_for_somebody_else(
    node: Node, fleet: Fleet, yard: Yard
) -> None:
    """The host's root has no number in the container: there it is the overflow uid, and no pid."""
    node.start()
    fleet.start_master()
    assert greet(node, yard)[0] == [0, OVERFLOW, OVERFLOW]


def be_master(stage: Stage) -> None:
    """Create a bus by the means of most programs, with the policy of who says nothing."""

    async def run() -> None:
        async with create("/tmp/mine", "master", node=stage.place):
            try:
                async with join_bus("/tmp/mine", node=stage.place):
                    stage.tell("joined")
            except Denied as error:
                stage.tell(f"denied: {error}")

    asyncio.run(run())


def test_d17_container_may_join_its_own_bus(node: Node, fleet: Fleet, yard: Yard) -> None:
    """Whoever has the user of the master may join, also where that has another number inside."""
    node.start()
    container = yard.start(be_master, has_proc=True)
    assert container.hear() == "joined"
    container.finish()


# --- the agent itself in a container ---


def be_agent(stage: Stage) -> None:
    """Be an agent that everybody may come to."""
    settings = config.Config(door=Path(stage.place), mode=0o666)
    asyncio.run(agent.run(settings, lambda: stage.tell("ready")))


class OuterFleet(Fleet):
    """Actors outside of the container that their agent is in."""

    def __init__(self, door: Path) -> None:
        super().__init__(door)
        self.place = door


@pytest.fixture
def contained_agent(node: Node, yard: Yard) -> Iterator[OuterFleet]:
    """An agent in a container, and actors outside."""
    node.start()
    door = node.folder.parent / "inner" / "node.sock"
    door.parent.mkdir()
    os.chown(door.parent, OUTER_ROOT, OUTER_ROOT)
    assert yard.start(be_agent, door=door, is_writable=True, has_proc=True).hear() == "ready"
    with OuterFleet(door) as made:
        yield made


@needs_root
def test_d17_agent_in_a_container_takes_nobody_for_somebody_else(
    contained_agent: OuterFleet,
) -> None:
    """Who has no number in the agent's namespaces is the overflow uid, and without a pid."""
    contained_agent.start_master()
    with open_member(contained_agent.place, "outside") as one:
        for outer, seen in ((OUTER_ROOT + 7, 7), (OUTER_ROOT + UIDS, OVERFLOW), (0, OVERFLOW)):
            actor = contained_agent.start(say_hello, uid=outer)
            assert actor.hear()[1] == outer
            got = receive(one)
            assert got.credentials == (0, seen, seen)
            assert got.identity.principal == f"uid:{seen}"
            actor.tell("done")
            actor.finish()


@needs_root
def test_d2_d17_strangers_to_an_agent_in_a_container_are_not_one_user(
    contained_agent: OuterFleet,
) -> None:
    """One of them cannot be the heir of another one's bus."""
    master = contained_agent.start_master()
    with open_member(contained_agent.place, "outside") as one:
        master.kill()
        wait_notice(one, Event.MASTER_LOST)
        heir = contained_agent.start(inherit, uid=OUTER_ROOT + UIDS)
        assert heir.hear() == "in use"
