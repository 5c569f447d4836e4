"""The master on a network in memory: batches, order, who does not read, the own certificate."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from tests.master.station import Station
from tests.master.world import EVERYTHING, NOW_UTC

from afbus.link.carrier import Carrier, Member
from afbus.link.certificate import Refusal
from afbus.link.credentials import Credentials
from afbus.link.frame import Channel
from afbus.link.identity import Identity, Role
from afbus.link.link import Link
from afbus.link.memory import MemoryNetwork
from afbus.link.reason import Reason
from afbus.master.core import Core
from afbus.master.feed import ACK_S
from afbus.master.issuer import (
    LEAF_LIFE_S,
    Issuer,
    make_issuing,
    make_key,
    make_request,
    make_root,
    read_leaf,
)
from afbus.master.policy import parse_policy
from afbus.master.row import issued_key
from afbus.master.server import QUEUED_BYTES, Server
from afbus.proto import cluster
from afbus.proto.cluster import ClusterCall, ClusterHello
from afbus.proto.errors import LinkError
from afbus.proto.frames import Closed, Result
from afbus.proto.operation import ClusterOp
from afbus.proto.record import NodeState
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from afbus.master.effect import Audit

PATH = b"/demo"
BIND: dict[str, Any] = {"endpoint": 1, "path": PATH, "address": b"master"}


class Place:
    """A network in memory with a master, whose disk is slow or fast."""

    def __init__(self) -> None:
        self.network, self.ahead_s = MemoryNetwork(seed=3), 0.0
        root_key, key = make_key(), make_key()
        root = make_root("demo", root_key, 1, NOW_UTC)
        self.issuer = Issuer(root, make_issuing(root, root_key, key, 2, NOW_UTC), key)
        self.root = root
        self.disk: dict[bytes, bytes] = {}
        self.audit: list[Audit] = []
        self.batches = 0
        #: How long the disk takes.
        self.commit_s = 0.0
        self.serial = 100
        self.core = Core(
            self.issuer,
            parse_policy(EVERYTHING),
            self.network.random.randbytes,
            lambda: self.utc_now().timestamp(),
            [],
            self.network.time,
        )
        self.server = Server(self.core, self.issuer, self.commit)
        member = Member(
            credentials=self.server.make_credentials(self.utc_now().timestamp()),
            authority=self.server.get_authority(),
            boot=bytes(16),
            accept=self.server.accept,
            utc_now=self.utc_now,
            admits=self.server.admits,
            refused=self.server.report_refused,
            enrol=self.server.enrol,
        )
        self.carrier = self.network.add("master", member)
        self.server.attach(self.carrier)

    def utc_now(self) -> datetime:
        """The wall clock, beside that of the network."""
        return datetime.fromtimestamp(NOW_UTC + self.ahead_s + self.network.time, UTC)

    def pass_utc(self, duration_s: float) -> None:
        """Let much time pass on the wall clock, and little on the other."""
        self.ahead_s += duration_s
        self.network.run_for(61.0)

    def commit(
        self,
        rows: Sequence[tuple[bytes, bytes | None]],
        audits: Sequence[Audit],
        done: Callable[[], None],
    ) -> None:
        """Write after the time that the disk takes."""

        def write() -> None:
            for key, value in rows:
                if value is None:
                    self.disk.pop(key, None)
                else:
                    self.disk[key] = value
            self.audit += audits
            self.batches += 1
            done()

        if self.commit_s:
            self.network.call_at(self.network.time + self.commit_s, write)
        else:
            write()

    def station(self, name: str, role: Role = Role.NODE) -> Station:
        """Put a node on the network, with a certificate."""
        station, key = Station(name), make_key()
        self.serial += 1
        identity = Identity("demo", role, name)
        utc = self.utc_now().timestamp()
        issued = self.issuer.issue(make_request(key), identity, self.serial, utc)
        station.credentials, station.root = Credentials(issued.chain, key), self.root
        member = station.make_member(name.encode().ljust(16, b"\0"))
        member = Member(**{**vars(member), "utc_now": self.utc_now})
        station.carrier = self.network.add(name, member)
        return station

    def dial(self, station: Station) -> list[object]:
        """Let a node dial the master; return what comes of it."""
        outcome: list[object] = []
        claim = Identity("demo", Role.MASTER, "master")
        station.carrier.dial("master", claim, outcome.append)
        self.network.run_for(1.0)
        return outcome

    def joined(self, name: str) -> Station:
        """Return a node that is live, with endpoint 1."""
        station = self.station(name)
        self.dial(station)
        self.do(station, ClusterOp.RESTATE)
        self.do(station, ClusterOp.ENTER, endpoint=1, uid=1000)
        self.do(station, ClusterOp.RESTATED)
        return station

    def do(self, station: Station, op: ClusterOp, **args: Any) -> Any:
        """Ask for something that is granted; return the value."""
        serial = station.call(op, **args)
        self.network.run_for(1.0)
        result = station.results.pop(serial)
        assert result.is_ok, result
        return result.value


@pytest.fixture
def place() -> Place:
    """A master in memory."""
    return Place()


def test_nodes_join_over_links(place: Place) -> None:
    """And have one table."""
    first, second = place.joined("a"), place.joined("b")
    place.do(first, ClusterOp.BIND, **BIND)
    assert second.mirror.get_bus(PATH) is not None
    assert first.mirror.snapshot() == second.mirror.snapshot()
    assert [one.action for one in place.audit if one.action == "live"] == ["live", "live"]


def test_case28_nothing_is_told_before_it_is_written(place: Place) -> None:
    """However long the disk takes; what happens meanwhile is the next batch."""
    node = place.joined("a")
    place.commit_s = 0.5
    batches = place.batches
    first = node.call(ClusterOp.LEASE)
    place.network.run_for(0.4)
    later = [node.call(ClusterOp.LEASE) for _ in range(10)]
    assert first not in node.results
    assert not [key for key in place.disk if key[:1] == b"l"]
    place.network.run_for(0.2)
    assert [key for key in place.disk if key[:1] == b"l"]
    assert node.mirror.find_node(1, b"1.1") == 1
    assert node.mirror.find_node(1, b"2.1") is None
    place.network.run_for(1.0)
    assert node.results[first].value == {"block": 1}
    assert [node.results[serial].value["block"] for serial in later] == list(range(2, 12))
    assert place.batches == batches + 2


def test_what_happens_while_a_batch_is_written_is_the_next_one(place: Place) -> None:
    """Also where the first has nothing to tell."""
    place.network.run_for(1.0)
    place.commit_s = 0.5
    for turn in range(3):
        place.core.refuse_policy(f"turn {turn}")
        place.server.wake()
        place.network.run_for(0.3)
    place.network.run_for(1.0)
    assert [one.detail for one in place.audit] == ["turn 0", "turn 1", "turn 2"]


def test_case35_a_revoked_node_is_cut_by_link_and_carrier(place: Place) -> None:
    """Its link ends with the reason, and the carrier takes no other one."""
    node, other = place.joined("a"), place.joined("b")
    answers: list[bytes] = []
    call = ClusterCall(1, ClusterOp.REVOKE, {"subject": "node/a", "reason": "stolen"})
    place.server.receive_visit("operator", cluster.encode(call), answers.append)
    place.network.run_for(0.9)
    assert node.down is not None
    assert (node.down.reason, node.down.text) == (Reason.REVOKED, "revoked: stolen")
    assert len(other.mirror.get_denied()) == 1
    [answer] = answers
    assert isinstance(cluster.decode(answer), Result)
    [outcome] = place.dial(node)
    assert isinstance(outcome, LinkError)
    [entry] = [one for one in place.audit if one.action == "link"]
    assert entry.detail.startswith(Refusal.REVOKED.value)


def test_case33_principals_have_no_link_of_their_own(place: Place) -> None:
    """They speak through their nodes."""
    [outcome] = place.dial(place.station("alice", Role.PRINCIPAL))
    assert isinstance(outcome, LinkError)
    [entry] = [one for one in place.audit if one.action == "link"]
    assert entry.detail.startswith(Refusal.NOT_ADMITTED.value)


def test_d16_a_cut_node_is_lost_and_back(place: Place) -> None:
    """The silence of a link reaches the core, and its end does too."""
    node, other = place.joined("a"), place.joined("b")
    for source, target in (("a", "master"), ("master", "a")):
        place.network.cut(source, target)
    place.network.run_for(3.0)
    record = other.mirror.get_node(1)
    assert record is not None
    assert record.state is NodeState.LIVE
    place.network.run_for(5.0)
    record = other.mirror.get_node(1)
    assert record is not None
    assert record.state is NodeState.LOST
    for source, target in (("a", "master"), ("master", "a")):
        place.network.heal(source, target)
    place.network.run_for(3.0)
    assert node.link is None
    place.dial(node)
    place.do(node, ClusterOp.RESTATE)
    place.do(node, ClusterOp.RESTATED)
    record = other.mirror.get_node(1)
    assert record is not None
    assert record.state is NodeState.LIVE


def test_garbage_on_a_link_ends_it_with_a_reason(place: Place) -> None:
    """And data on a channel that a master has nothing to do with; others go on."""
    other = place.joined("b")
    for number, (channel, data) in enumerate(
        [(Channel.TABLES, b"garbage"), (Channel.CONTROL, b"x"), (Channel.DATA, b"x")]
    ):
        node = place.joined(f"n{number}")
        assert node.link is not None
        node.link.send(channel, 0, data)
        place.network.run_for(1.0)
        assert node.down is not None
        assert node.down.reason in (Reason.MALFORMED, Reason.ORDER)
    node = place.joined("body")
    assert node.link is not None
    node.link.open_body(0, 10)
    place.network.run_for(1.0)
    assert node.down is not None
    assert node.down.reason is Reason.ORDER
    assert other.link is not None


def test_case37_a_node_that_does_not_read_is_bounded(place: Place) -> None:
    """What it asks is no longer read when its answers pile up; then it is given up."""
    other = place.joined("b")
    node = place.joined("a")
    node.reads = False
    for _ in range(50_000):
        node.call(ClusterOp.CHALLENGE, endpoint=1)
    place.network.run_for(1.0)
    [port] = [one for one in place.server._ports.values() if one.link.peer.name == "a"]
    # What it had asked within its credit is answered; no more than that is taken in.
    assert QUEUED_BYTES <= port.waiting_bytes < 4 * QUEUED_BYTES
    assert port.kept_back > 0
    serial = other.call(ClusterOp.LEASE)
    place.network.run_for(ACK_S + 1.0)
    assert other.results[serial].is_ok
    assert node.link is None
    assert port.waiting_bytes == 0 or not port.waiting


def test_enrolment_over_a_carrier(place: Place) -> None:
    """A token, a request, a certificate with which links are made; garbage is answered too."""
    answers: list[bytes] = []
    call = ClusterCall(1, ClusterOp.TOKEN, {})
    place.server.receive_visit("operator", cluster.encode(call), answers.append)
    place.network.run_for(0.1)
    result = cluster.decode(answers.pop())
    assert isinstance(result, Result)
    stranger, key = Station("new"), make_key()
    stranger.root = place.root
    member = stranger.make_member(bytes(16))
    carrier = place.network.add("new", Member(**{**vars(member), "utc_now": place.utc_now}))
    args = {"token": result.value["token"], "name": "new", "csr": make_request(key)}
    outcomes: list[Any] = []
    digest = place.issuer.root_digest
    data = cluster.encode(ClusterCall(1, ClusterOp.ENROL, args))
    carrier.enrol("master", digest, data, outcomes.append)
    carrier.enrol("master", digest, b"garbage", outcomes.append)
    carrier.enrol("master", digest, cluster.encode(ClusterHello("new")), outcomes.append)
    place.network.run_for(1.0)
    answers = [one.answer for one in outcomes]
    granted, *refused = [cluster.decode(one) for one in answers]
    assert isinstance(granted, Result)
    assert granted.is_ok
    assert all(isinstance(one, Closed) for one in refused)
    stranger.carrier = carrier
    carrier.set_credentials(Credentials(tuple(granted.value["chain"]), key))
    place.dial(stranger)
    assert stranger.welcome is not None


def test_case39_the_master_renews_its_own_certificate(place: Place) -> None:
    """At half of its life, and no link ends for that."""
    node = place.joined("a")
    first = read_leaf(_presented(place.carrier))
    place.pass_utc(LEAF_LIFE_S / 2 - 200)
    assert read_leaf(_presented(place.carrier)) == first
    place.pass_utc(400)
    second = read_leaf(_presented(place.carrier))
    assert second.serial != first.serial
    assert second.until_utc > first.until_utc
    assert node.link is not None
    assert place.joined("b").link is not None


def test_case35_a_master_whose_certificate_was_revoked_has_another(place: Place) -> None:
    """Or all nodes would refuse it for as long as it runs."""
    first = read_leaf(_presented(place.carrier))
    answers: list[bytes] = []
    call = ClusterCall(1, ClusterOp.REVOKE, {"subject": "master/master"})
    place.server.receive_visit("operator", cluster.encode(call), answers.append)
    place.network.run_for(1)
    assert [getattr(cluster.decode(one), "is_ok", False) for one in answers] == [True]
    assert first.serial in place.core.denied
    second = read_leaf(_presented(place.carrier))
    assert second.serial not in place.core.denied
    assert issued_key(second.serial) in place.disk
    node = place.station("a")
    node.carrier.set_authority(place.server.get_authority())
    assert isinstance(place.dial(node)[0], Link)


def _presented(carrier: Carrier) -> bytes:
    assert carrier.credentials is not None
    return carrier.credentials.chain[0]


def test_case33_links_end_with_their_certificates(place: Place) -> None:
    """A node that does not renew is out when its certificate is over."""
    node = place.joined("a")
    place.pass_utc(LEAF_LIFE_S - 200)
    assert node.link is not None
    place.pass_utc(200)
    assert node.down is not None
    assert node.down.reason is Reason.REVOKED


def test_an_issuing_certificate_that_is_over_is_told(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """The master goes on with what it has, for as long as that is good."""
    with caplog.at_level(logging.ERROR, "afbus.master"):
        place.pass_utc(366 * 86_400)
    assert "root key" in caplog.text


def test_d16_stop_says_farewell(place: Place) -> None:
    """All that was said before is read; nodes know that it will be back."""
    node = place.joined("a")
    done: list[bool] = []
    place.server.stop(lambda: done.append(True))
    place.network.run_for(1.0)
    assert node.down is not None
    assert node.down.reason is Reason.GOING_DOWN
    assert done
    place.server.detach()
    place.carrier.close()
    place.network.run_for(10.0)


def test_large_tables_flow_through_small_windows(place: Place) -> None:
    """A snapshot of many parts reaches a node with the usual settings."""
    first = place.joined("a")
    place.do(first, ClusterOp.BIND, **BIND)
    for number in range(6000):
        terms = Terms(f"topic.with.a.long.name.number{number}").pack()
        first.call(ClusterOp.SUBSCRIBE, endpoint=1, path=PATH, terms=terms)
    place.network.run_for(5.0)
    second = place.joined("b")
    assert len(list(second.mirror.get_matches(1))) == 6000
    assert second.mirror.snapshot() == first.mirror.snapshot()
