"""A large cluster without IO: what a change costs, and what a table costs."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tests.figures import IS_FULL, note
from tests.master.world import PATH, World

from afbus.link.identity import Identity, Role
from afbus.master.effect import Cut, LinkId, Send, Write
from afbus.master.issuer import Leaf
from afbus.proto import cluster
from afbus.proto.cluster import Ack, ClusterCall, ClusterHello, Part, TableDelta
from afbus.proto.frames import Result
from afbus.proto.limits import ADDRESSES_PER_ENDPOINT
from afbus.proto.operation import ClusterOp
from afbus.proto.terms import Terms

#: With AFBUS_TEST_FULL=1 the cluster has the size that it is to be good for; that takes minutes.
NODES = 1_000 if IS_FULL else 400
NAMES = MATCHES = 100_000 if IS_FULL else 10_000


class Crowd:
    """Nodes that acknowledge what they are sent, and keep nothing of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.links: set[LinkId] = set()
        self.sent_bytes = 0
        self.sent_frames = 0
        self.results = 0
        # One frame is sent to many: what it is has to be found out once.
        self.seen: dict[int, tuple[bytes, int]] = {}

    def say(self, link: LinkId, frame: cluster.ClusterFrame) -> None:
        """Let one of them say something."""
        self.world.core.receive_frame(link, cluster.encode(frame), self.world.now)

    def come(self, number: int) -> LinkId:
        """Another one joins."""
        link = self.world.new_link()
        self.links.add(link)
        name = f"crowd-{number:04}"
        leaf = Leaf(10_000 + number, int(self.world.utc) + 86_400, bytes(32))
        identity = Identity("test", Role.NODE, name)
        self.world.core.receive_link(link, identity, leaf, bytes(16), self.world.now)
        self.say(link, ClusterHello(name))
        self.say(link, ClusterCall(1, ClusterOp.RESTATE))
        self.say(link, ClusterCall(2, ClusterOp.RESTATED))
        return link

    def settle(self) -> None:
        """Let everything happen; who gets a whole snapshot or a delta acknowledges it."""
        while effects := self.world.core.take_effects():
            versions: dict[LinkId, int] = {}
            for effect in effects:
                if isinstance(effect, Write):
                    self.world.write(effect.rows)
                elif isinstance(effect, Send):
                    self.sent_bytes += len(effect.data)
                    self.sent_frames += 1
                    if id(effect.data) not in self.seen:
                        self.seen[id(effect.data)] = (effect.data, self.read(effect.data))
                    if version := self.seen[id(effect.data)][1]:
                        versions[effect.link] = version
                assert not isinstance(effect, Cut), effect
            for link, version in versions.items():
                self.say(link, Ack(self.world.core.epoch, version))

    def ask_status(self) -> Any:
        """Return what the operator is told."""
        link = self.world.start_visit("operator", ClusterOp.STATUS, {})
        for effect in self.world.core.take_effects():
            if isinstance(effect, Send) and effect.link == link:
                frame = cluster.decode(effect.data)
                assert isinstance(frame, Result)
                return frame.value
        raise AssertionError("the operator was not answered")

    def read(self, data: bytes) -> int:
        """Return the version that a frame completes, 0 for none."""
        frame = cluster.decode(data)
        match frame:
            case TableDelta():
                return frame.delta.to_version
            case Part() if frame.index == frame.count - 1:
                return frame.version
            case Part():
                return 0
        self.results += 1
        return 0


@pytest.mark.slow(limit_s=3600 if IS_FULL else 300)
def test_many_nodes_and_a_large_table() -> None:
    """A change costs its own size for each node, whatever the table holds."""
    world = World()
    node = world.node("big")
    node.join(0)
    node.do(ClusterOp.BIND, endpoint=0, path=PATH, address=b"master")
    begin = time.perf_counter()
    for number in range(NAMES):
        end = number // ADDRESSES_PER_ENDPOINT
        if number % ADDRESSES_PER_ENDPOINT == 0:
            node.call(ClusterOp.ENTER, endpoint=end, uid=1000)
        node.call(ClusterOp.OWN, endpoint=end, path=PATH, name=b"org.example.name%d" % number)
    world.settle()
    names_s = time.perf_counter() - begin
    begin = time.perf_counter()
    for number in range(MATCHES):
        terms = Terms(f"topic.number{number}").pack()
        node.call(
            ClusterOp.SUBSCRIBE,
            endpoint=number % (NAMES // ADDRESSES_PER_ENDPOINT),
            path=PATH,
            terms=terms,
        )
    world.settle()
    matches_s = time.perf_counter() - begin
    assert len(node.results) >= NAMES + MATCHES
    node.results.clear()

    rows = sum(len(key) + len(value) for key, value in world.disk.items())
    begin = time.perf_counter()
    world.core = world.make_core()
    restart_s = time.perf_counter() - begin
    crowd = Crowd(world)
    begin = time.perf_counter()
    crowd.come(0)
    # What the master expects to come back is given up, so that nobody waits for it.
    world.now += 20
    world.core.handle_timer(world.now)
    crowd.settle()
    first_s, snapshot_bytes = time.perf_counter() - begin, crowd.sent_bytes
    begin = time.perf_counter()
    for number in range(1, NODES):
        crowd.come(number)
        crowd.settle()
    crowd_s = time.perf_counter() - begin
    status = crowd.ask_status()
    assert (status["live"], status["names"], status["matches"]) == (NODES, NAMES, MATCHES)

    crowd.sent_bytes = crowd.sent_frames = 0
    caller = min(crowd.links)
    begin = time.perf_counter()
    crowd.say(caller, ClusterCall(3, ClusterOp.ENTER, {"endpoint": 1, "uid": 0}))
    terms = Terms("one.more").pack()
    args = {"endpoint": 1, "path": PATH, "terms": terms}
    results = crowd.results
    crowd.say(caller, ClusterCall(4, ClusterOp.SUBSCRIBE, args))
    crowd.settle()
    change_s = time.perf_counter() - begin
    assert crowd.results == results + 2
    # A delta of one match to each node, and two results; the table has megabytes.
    assert crowd.sent_frames == NODES + 2
    assert crowd.sent_bytes < 100 * NODES
    note(
        f"{NAMES} names in {names_s:.1f} s, {MATCHES} matches in {matches_s:.1f} s, "
        f"{rows / 1e6:.1f} MB of rows, read again in {restart_s:.1f} s; "
        f"snapshot of {snapshot_bytes / 1e6:.1f} MB in {first_s:.1f} s, "
        f"{NODES - 1} more nodes in {crowd_s:.1f} s; "
        f"one change to {NODES} nodes and back: {crowd.sent_bytes} bytes, {change_s * 1e3:.0f} ms"
    )
