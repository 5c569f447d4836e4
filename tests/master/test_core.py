"""Links to the master: how they begin and end, who is live, and what a restart keeps."""

from __future__ import annotations

import errno

import pytest
from tests.master.world import NOW_UTC, PATH, World, cut_code, make_csr

from afbus.link.identity import Identity, Role
from afbus.master.core import LEASE_S, LOST_S, START_S, Limits
from afbus.master.effect import Cut
from afbus.master.feed import FeedLimits
from afbus.master.issuer import digest_key
from afbus.proto import cluster
from afbus.proto.cluster import (
    Ack,
    ClusterCall,
    ClusterFrame,
    ClusterHello,
    ClusterWelcome,
    Nack,
    Resync,
)
from afbus.proto.errors import CloseCode, RemoteProtocolError
from afbus.proto.operation import ClusterOp
from afbus.proto.record import BusRecord, LeaseRecord, NodeRecord, NodeState, OwnerRecord
from afbus.proto.terms import Terms

OWN = {"endpoint": 1, "path": PATH, "name": b"org.a"}
BIND = {"endpoint": 1, "path": PATH, "address": b"master"}
WANT = {"endpoint": 1, "path": PATH, "terms": Terms("a").pack()}


def test_a_node_joins_and_is_live(world: World) -> None:
    """It has the table, it has stated what it has, and others are told."""
    first = world.node("a").join()
    second = world.node("b")
    second.places = ("10.0.0.2:7400",)
    second.connect()
    second.hello()
    assert second.welcome == ClusterWelcome("test", world.core.epoch, 2)
    assert first.sees(second) is NodeState.LOST
    assert second.sees(first) is NodeState.LIVE
    second.do(ClusterOp.RESTATE)
    second.do(ClusterOp.RESTATED)
    assert first.sees(second) is NodeState.LIVE
    assert NodeRecord("b", 2, NodeState.LIVE, second.boot, second.places) in first.records()
    assert first.mirror.snapshot() == second.mirror.snapshot()


def test_restated_waits_until_the_node_has_the_table(world: World) -> None:
    """So a live node never acts on a table without what others rely on."""
    node = world.node("a")
    node.connect()
    node.hello()
    node.reads = False
    serial = node.start(ClusterOp.RESTATE)
    last = node.start(ClusterOp.RESTATED)
    frames = [cluster.decode(data) for data in node.inbox]
    assert [getattr(frame, "serial", None) for frame in frames].count(last) == 0
    node.reads = True
    world.settle()
    assert node.results[serial].is_ok
    assert node.results[last].is_ok


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (Ack(1, 1), CloseCode.ORDER),
        (ClusterCall(1, ClusterOp.RESTATE), CloseCode.ORDER),
        (ClusterHello("a", version=99), CloseCode.VERSION),
        (ClusterHello("b"), CloseCode.DENIED),
        (ClusterWelcome("test", 1, 1), CloseCode.ORDER),
    ],
)
def test_first_frames_that_are_wrong(world: World, frame: ClusterFrame, code: CloseCode) -> None:
    """They end the link, and leave nothing behind."""
    node, disk = world.node("a"), dict(world.disk)
    node.connect()
    node.say(frame)
    world.settle()
    assert cut_code(node) is code
    assert world.disk == disk


def test_case33_a_node_that_claims_another_name_is_noted(world: World) -> None:
    """Its certificate says who it is."""
    node = world.node("a")
    node.connect()
    node.say(ClusterHello("b"))
    world.settle()
    [entry] = world.audited("hello", is_done=False)
    assert entry.actor == "afbus://test/node/a"
    assert entry.subject == "node/b"


@pytest.mark.parametrize(
    "frame",
    [
        ClusterHello("a"),
        ClusterWelcome("test", 1, 1),
        ClusterCall(1, ClusterOp.RESTATED),
        Ack(NOW_UTC, 99),
        Nack(NOW_UTC, 99, ""),
        Resync(NOW_UTC, 99),
    ],
)
def test_later_frames_that_are_wrong(world: World, frame: ClusterFrame) -> None:
    """Out of order, or about versions that were never sent: they end that link alone."""
    assert world.core.epoch == NOW_UTC
    other = world.node("b").join()
    node = world.node("a").join()
    node.say(frame)
    world.settle()
    assert cut_code(node) is CloseCode.ORDER
    assert other.link is not None


def test_calls_before_restate_end_the_link(world: World) -> None:
    """But for RENEW, which may be urgent."""
    node = world.node("a")
    node.connect()
    node.hello()
    assert node.refused(ClusterOp.RENEW, csr=b"x") == errno.EPERM
    node.say(ClusterCall(1, ClusterOp.LEASE))
    world.settle()
    assert cut_code(node) is CloseCode.ORDER


def test_case42_garbage_ends_the_link_and_nothing_else(world: World) -> None:
    """Seeded: bytes, and good frames with a byte changed."""
    other = world.node("b").join()
    good = [
        cluster.encode(ClusterCall(1, ClusterOp.OWN, OWN)),
        cluster.encode(ClusterCall(1, ClusterOp.SUBSCRIBE, WANT)),
        cluster.encode(ClusterCall(1, ClusterOp.ENTER, {"endpoint": 1, "uid": 1})),
        cluster.encode(ClusterHello("a")),
    ]
    for turn in range(1500):
        node = world.node("a")
        if node.link is None:
            node.connect()
            if turn % 2:
                node.hello()
                node.start(ClusterOp.RESTATE)
        data = bytearray(world.rng.choice(good))
        data[world.rng.randrange(len(data))] = world.rng.randrange(256)
        assert node.link is not None
        world.core.receive_frame(node.link, bytes(data), world.now)
        world.settle()
    assert other.link is not None
    assert not [record for record in other.records() if isinstance(record, OwnerRecord | BusRecord)]


def test_a_link_that_says_nothing_is_cut(world: World) -> None:
    """After the time for a HELLO."""
    node = world.node("a")
    node.connect()
    world.run_for(4.9)
    assert node.cut is None
    world.run_for(0.2)
    assert cut_code(node) is CloseCode.ORDER


def test_case39_a_newer_link_takes_the_place_of_the_older(world: World) -> None:
    """As with a new certificate: nobody is told that anything happened."""
    other = world.node("b").join()
    node = world.node("a").join(1)
    old = node.link
    version = other.mirror.version
    node.connect()
    node.say(ClusterHello("a", node.mirror.epoch, node.mirror.version))
    cuts = [one for one in world.core.take_effects() if isinstance(one, Cut)]
    assert [(cut.link, cut.code) for cut in cuts] == [(old, CloseCode.TAKEN_OVER)]
    node.do(ClusterOp.RESTATE)
    node.do(ClusterOp.ENTER, endpoint=1, uid=1000)
    node.do(ClusterOp.RESTATED)
    assert other.mirror.version == version
    assert other.sees(node) is NodeState.LIVE
    assert not world.audited("lost")


# --- who is live ---


def test_a_silent_node_is_lost_and_back(world: World) -> None:
    """Lost after a time, with its names; back when it has stated what it has."""
    other = world.node("b").join()
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    assert node.link is not None
    world.core.receive_silence(node.link, world.now)
    world.run_for(LOST_S - 0.1)
    world.core.receive_sound(node.link, world.now)
    world.run_for(LOST_S)
    assert other.sees(node) is NodeState.LIVE
    world.core.receive_silence(node.link, world.now)
    world.run_for(LOST_S)
    assert other.sees(node) is NodeState.LOST
    assert cut_code(node) is CloseCode.EVICTED
    assert other.mirror.find_node(1, b"org.a") == 2
    node.connect()
    node.hello()
    assert other.sees(node) is NodeState.LOST
    node.do(ClusterOp.RESTATE)
    node.do(ClusterOp.ENTER, endpoint=1, uid=1000)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    node.do(ClusterOp.RESTATED)
    assert other.sees(node) is NodeState.LIVE
    assert other.mirror.find_node(1, b"org.a") == 2


def test_a_link_that_ends_is_waited_for(world: World) -> None:
    """As long as one that is silent; coming back in time changes nothing for others."""
    other = world.node("b").join()
    node = world.node("a").join()
    version = other.mirror.version
    node.disconnect()
    world.run_for(LOST_S - 0.1)
    node.join()
    assert other.sees(node) is NodeState.LIVE
    assert other.mirror.version == version
    node.disconnect()
    world.run_for(LOST_S)
    assert other.sees(node) is NodeState.LOST
    assert [entry.subject for entry in world.audited("lost")] == ["node/a"]


def test_d3_d16_a_lost_node_keeps_its_leases_and_loses_its_names(world: World) -> None:
    """After the lease time others may have what it had; its blocks are its own for ever."""
    other = world.node("b").join(1)
    node = world.node("a").join(1)
    block = node.do(ClusterOp.LEASE)["block"]
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    node.do(ClusterOp.SUBSCRIBE, **WANT)
    other.do(ClusterOp.OWN, **OWN)
    node.disconnect()
    world.run_for(LOST_S + LEASE_S - 0.1)
    assert other.mirror.find_node(1, b"org.a") == 2
    assert other.refused(ClusterOp.BIND, **BIND) == errno.EADDRINUSE
    world.run_for(0.2)
    assert other.mirror.find_node(1, b"org.a") == 1
    assert list(other.mirror.get_matches(1)) == []
    assert other.do(ClusterOp.BIND, **BIND)["generation"] == 2
    assert LeaseRecord(block, 2) in other.records()
    node.connect()
    node.hello()
    node.do(ClusterOp.RESTATE)
    assert node.do(ClusterOp.LEASE, block=block) == {"block": block}
    node.do(ClusterOp.ENTER, endpoint=1, uid=1000)
    assert node.do(ClusterOp.OWN, **OWN) == {"outcome": 2}
    assert node.refused(ClusterOp.BIND, **BIND) == errno.EADDRINUSE
    node.do(ClusterOp.RESTATED)


def test_case38_an_ephemeral_node_is_forgotten(world: World) -> None:
    """With its leases, soon after it is lost: containers come and go."""
    token = world.order(ClusterOp.TOKEN, is_ephemeral=True)["token"]
    csr = make_csr()
    world.visit("1.2.3.4", ClusterOp.ENROL, token=token, name="a", csr=csr)
    other = world.node("b").join()
    node = world.node("a")
    node.leaf = type(node.leaf)(77, NOW_UTC + 86_400, digest_key(csr))
    node.join(1)
    node.do(ClusterOp.LEASE)
    node.disconnect()
    world.run_for(LOST_S + LEASE_S + 1)
    assert {record.name for record in other.records() if isinstance(record, NodeRecord)} == {"b"}
    assert not [record for record in other.records() if isinstance(record, LeaseRecord)]


def test_case38_a_hundred_containers_leave_no_ghost(world: World) -> None:
    """One after the other, each with a token of its own: none of them is left, nor what it had."""
    other = world.node("b").join()
    for number in range(100):
        token = world.order(ClusterOp.TOKEN, is_ephemeral=True)["token"]
        csr, name = make_csr(), f"container-{number}"
        world.visit("1.2.3.4", ClusterOp.ENROL, token=token, name=name, csr=csr)
        node = world.node(name)
        node.leaf = type(node.leaf)(1000 + number, NOW_UTC + 86_400, digest_key(csr))
        node.join(1)
        node.do(ClusterOp.LEASE)
        node.disconnect()
        world.run_for(LOST_S + 1)
    world.run_for(LOST_S + LEASE_S + 1)
    assert {record.name for record in other.records() if isinstance(record, NodeRecord)} == {"b"}
    assert not [record for record in other.records() if isinstance(record, LeaseRecord)]


def test_a_node_whose_certificate_is_over_is_forgotten(world: World) -> None:
    """It cannot come back without a new token anyway."""
    other = world.node("b").join()
    node = world.node("a")
    node.leaf = type(node.leaf)(77, NOW_UTC + 300, bytes(32))
    node.join()
    world.run_for(400)
    assert other.sees(node) is NodeState.LIVE
    node.disconnect()
    world.run_for(60)
    assert other.sees(node) is None


def test_what_was_not_stated_is_gone(world: World) -> None:
    """A node that has restarted has lost what it does not state; nobody else has to clean up."""
    other = world.node("b").join(1)
    node = world.node("a").join(1, 2)
    node.do(ClusterOp.BIND, **BIND)
    other.do(ClusterOp.SUBSCRIBE, **WANT)
    node.do(ClusterOp.SUBSCRIBE, **WANT)
    node.do(ClusterOp.OWN, **OWN)
    blocks = [node.do(ClusterOp.LEASE)["block"] for _ in range(2)]
    node.disconnect()
    node.boot = b"b" * 16
    node.connect()
    node.hello()
    node.do(ClusterOp.RESTATE)
    node.do(ClusterOp.LEASE, block=blocks[1])
    node.do(ClusterOp.ENTER, endpoint=1, uid=1000)
    node.do(ClusterOp.BIND, **BIND)
    assert other.mirror.find_node(1, b"org.a") == 2
    node.do(ClusterOp.RESTATED)
    assert other.mirror.find_node(1, b"org.a") is None
    assert [match.node for match in other.mirror.get_matches(1)] == [1]
    assert other.mirror.find_node(1, b"%d.1" % blocks[0]) is None
    assert other.mirror.find_node(1, b"%d.1" % blocks[1]) == 2
    bus = other.mirror.get_bus(PATH)
    assert bus is not None
    assert (bus.node, bus.generation) == (2, 1)
    assert node.refused(ClusterOp.OWN, **OWN | {"endpoint": 2}) == errno.EHOSTUNREACH


def test_a_link_that_ends_while_it_states_changes_nothing(world: World) -> None:
    """The next one begins again."""
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    node.disconnect()
    node.connect()
    node.hello()
    node.do(ClusterOp.RESTATE)
    node.disconnect()
    other = world.node("b").come()
    assert other.mirror.find_node(1, b"org.a") == 1


# --- the barrier ---


def test_the_barrier_includes_a_node_that_was_just_lost_sight_of(world: World) -> None:
    """It may still send to others: the result waits for it, or until it is lost."""
    first, second = world.node("a").join(1), world.node("b").join()
    first.do(ClusterOp.BIND, **BIND)
    second.disconnect()
    serial = first.start(ClusterOp.SUBSCRIBE, **WANT)
    assert serial not in first.results
    second.connect()
    second.hello()
    assert first.results[serial].is_ok
    second.disconnect()
    serial = first.start(ClusterOp.UNSUBSCRIBE, **WANT)
    world.run_for(LOST_S - 0.1)
    assert serial not in first.results
    world.run_for(0.2)
    assert first.results[serial].is_ok


def test_a_node_that_does_not_acknowledge_is_given_up(world: World) -> None:
    """It is cut and lost, and holds nobody up any longer."""
    limits = Limits(feed=FeedLimits(ack_s=3))
    world = World(limits=limits)
    first, second = world.node("a").join(1), world.node("b").join()
    first.do(ClusterOp.BIND, **BIND)
    second.reads = False
    serial = first.start(ClusterOp.SUBSCRIBE, **WANT)
    world.run_for(2.9)
    assert serial not in first.results
    world.run_for(0.2)
    assert first.results[serial].is_ok
    assert cut_code(second) is CloseCode.EVICTED
    assert first.sees(second) is NodeState.LOST


def test_case26_a_node_that_refuses_a_record_is_noted_once(world: World) -> None:
    """With its reason, and others go on."""
    first, second = world.node("a").join(1), world.node("b").join()
    second.reads = False
    serial = first.start(ClusterOp.BIND, **BIND)
    for _ in range(3):
        second.say(Nack(world.core.epoch, first.mirror.version, "cannot read it"))
    world.settle()
    assert first.results[serial].is_ok
    [entry] = world.audited("nack", is_done=False)
    assert entry.detail == "cannot read it"
    second.inbox.clear()
    second.reads = True
    world.run_for(2)
    assert second.mirror.snapshot() == first.mirror.snapshot()


# --- restart ---


def test_case22_case28_a_restarted_master_has_the_same_state(world: World) -> None:
    """A new epoch, the same versions; nodes that have everything are sent nothing of it."""
    first, second = world.node("a").join(1), world.node("b").join(1)
    first.do(ClusterOp.BIND, **BIND)
    first.do(ClusterOp.OWN, **OWN | {"flags": 1})
    second.do(ClusterOp.OWN, **OWN)
    second.do(ClusterOp.SUBSCRIBE, **WANT)
    block = second.do(ClusterOp.LEASE)["block"]
    epoch, before = world.core.epoch, first.mirror.snapshot()
    world.restart()
    assert world.core.epoch > epoch
    received = first.received_bytes
    first.connect()
    first.hello()
    assert first.welcome == ClusterWelcome("test", world.core.epoch, 1, is_same=True)
    assert first.mirror.epoch == world.core.epoch
    assert first.received_bytes - received < 60
    assert first.mirror.snapshot() == before
    # Names first come, first served: the owner is the one of before, not who is back first.
    second.connect()
    second.hello()
    second.do(ClusterOp.RESTATE)
    second.do(ClusterOp.ENTER, endpoint=1, uid=1000)
    assert second.do(ClusterOp.OWN, **OWN) == {"outcome": 2}
    second.do(ClusterOp.SUBSCRIBE, **WANT)
    second.do(ClusterOp.LEASE, block=block)
    first.do(ClusterOp.RESTATE)
    first.do(ClusterOp.ENTER, endpoint=1, uid=1000)
    first.do(ClusterOp.BIND, **BIND)
    assert first.do(ClusterOp.OWN, **OWN | {"flags": 1}) == {"outcome": 4}
    second.do(ClusterOp.RESTATED)
    first.do(ClusterOp.RESTATED)
    assert first.mirror.version == before.version
    assert second.do(ClusterOp.LEASE)["block"] == block + 1
    assert first.mirror.version == before.version + 1


def test_case22_a_node_that_missed_something_gets_a_snapshot(world: World) -> None:
    """After a restart there is no log to catch up from."""
    first, second = world.node("a").join(1), world.node("b").join()
    second.disconnect()
    first.start(ClusterOp.LEASE)
    version = second.mirror.version
    world.restart()
    second.connect()
    second.hello()
    assert second.welcome is not None
    assert not second.welcome.is_same
    assert second.mirror.epoch == world.core.epoch
    assert second.mirror.version > version
    first.connect()
    first.hello()
    assert first.mirror.snapshot() == second.mirror.snapshot()


def test_case25_frames_of_an_older_epoch_count_for_nothing(world: World) -> None:
    """Neither do they end the link: they were on their way."""
    node = world.node("a").join()
    old = world.core.epoch
    world.restart()
    node.join()
    node.say(Ack(old, 10_000))
    node.say(Nack(old, 10_000, "?"))
    world.settle()
    assert node.link is not None
    received = node.received_bytes
    world.run_for(2.0)
    node.say(Resync(old, 10_000))
    world.settle()
    assert node.received_bytes > received
    assert node.link is not None


def test_a_copy_of_the_journal_that_is_put_back_begins_another_epoch(world: World) -> None:
    """No node that saw what came after the copy is believed."""
    node = world.node("a").join()
    copy = dict(world.disk)
    epochs = [world.core.epoch]
    for _ in range(3):
        node.do(ClusterOp.LEASE)
        world.restart()
        epochs.append(world.core.epoch)
        node.join()
    future = node.mirror.version
    world.disk = copy
    world.restart()
    assert world.core.epoch not in epochs
    assert world.core.epoch > epochs[-1]
    node.join()
    assert node.mirror.version < future
    other = world.node("b").join()
    assert node.mirror.snapshot() == other.mirror.snapshot()


def test_case22_after_a_restart_live_nodes_are_waited_for(world: World) -> None:
    """Longer than otherwise, as all come at once; then they are lost."""
    first, second = world.node("a").join(1), world.node("b").join()
    third = world.node("c").join()
    first.do(ClusterOp.BIND, **BIND)
    world.restart()
    second.come()
    first.come(1)
    calls = [
        (first, first.start(ClusterOp.BIND, **BIND)),
        (first, first.start(ClusterOp.SUBSCRIBE, **WANT)),
        (first, first.start(ClusterOp.RESTATED)),
        (second, second.start(ClusterOp.RESTATED)),
    ]
    world.run_for(START_S - 0.1)
    assert not any(serial in node.results for node, serial in calls)
    assert first.sees(third) is NodeState.LIVE
    world.run_for(0.2)
    assert all(node.results[serial].is_ok for node, serial in calls)
    assert first.sees(third) is NodeState.LOST


def test_d3_what_lost_nodes_had_is_freed_after_a_restart_too(world: World) -> None:
    """The time begins anew, and ends."""
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    node.disconnect()
    world.run_for(LOST_S + 1)
    world.restart()
    other = world.node("b").join()
    world.run_for(LEASE_S - 1)
    assert other.mirror.find_node(1, b"org.a") == 1
    world.run_for(2)
    assert other.mirror.find_node(1, b"org.a") is None


def test_a_journal_that_is_none() -> None:
    """Whoever starts the master is told."""
    world = World()
    for row in ({b"Cepoch": b"\xc1"}, {b"x": b"\x90"}, {b"Tid": b"\x90"}, {b"d" + bytes(20): b""}):
        world.disk = row
        with pytest.raises(RemoteProtocolError):
            world.make_core()


def test_nodes_have_a_limit() -> None:
    """The next one is refused, with the reason."""
    world = World(limits=Limits(nodes=1))
    world.node("a").join()
    node = world.node("b")
    node.connect()
    node.hello()
    assert cut_code(node) is CloseCode.SHARE


def test_d16_stop_tells_all(world: World) -> None:
    """And whoever wants to enrol at that moment."""
    node = world.node("a").join()
    visitor = world.new_link()
    world.visitors[visitor] = None
    world.core.receive_visitor(visitor, "1.2.3.4", world.now)
    world.core.stop()
    world.settle()
    assert cut_code(node) is CloseCode.GOING_DOWN
    assert getattr(world.visitors[visitor], "code", None) is CloseCode.GOING_DOWN
    world.core.receive_end(visitor, world.now)
    assert world.core.get_timer() is not None


def test_frames_of_links_that_are_gone_are_nothing(world: World) -> None:
    """They were on their way when the master cut the link."""
    node = world.node("a").join()
    link = node.link
    assert link is not None
    node.disconnect()
    for data in (b"", cluster.encode(ClusterHello("a"))):
        world.core.receive_frame(link, data, world.now)
    world.core.receive_end(link, world.now)
    world.core.receive_silence(link, world.now)
    world.core.receive_sound(link, world.now)
    assert world.core.take_effects() == []


def test_case35_a_denied_certificate_gets_no_link(world: World) -> None:
    """Even if the carrier let it pass, as it was revoked in between."""
    node = world.node("a")
    world.order(ClusterOp.REVOKE, subject=f"serial/{node.leaf.serial:x}")
    link = world.new_link()
    world.hands[link] = node
    node.link = link
    world.core.receive_link(link, Identity("test", Role.NODE, "a"), node.leaf, node.boot, world.now)
    world.settle()
    assert cut_code(node) is CloseCode.DENIED
