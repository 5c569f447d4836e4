"""What nodes ask for their endpoints: rights, owners, matches, proofs, quotas."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from tests.master.world import NOW_UTC, PATH, World

from afbus.link.stranger import ENTRIES, WINDOW_S
from afbus.master import call
from afbus.master.call import CHALLENGE_S, Quotas
from afbus.master.core import Limits
from afbus.master.issuer import LEAF_LIFE_S, make_key, make_request, sign_claim
from afbus.proto.operation import ClusterOp, endpoint_claim
from afbus.proto.record import BusRecord, OwnerRecord
from afbus.proto.terms import Terms

BIND: dict[str, Any] = {"endpoint": 1, "path": PATH, "address": b"master"}
OWN: dict[str, Any] = {"endpoint": 1, "path": PATH, "name": b"org.a"}
WANT: dict[str, Any] = {"endpoint": 1, "path": PATH, "terms": Terms("a.b").pack()}
OTHER = {"endpoint": 2}

ALLOW, REPLACE, NO_QUEUE = 1, 2, 4
PRIMARY, IN_QUEUE, EXISTS, ALREADY = 1, 2, 3, 4

POLICY = """
[[rule]]
name = "members"
who = ["uid/1000@a"]
bus = ["/demo"]
own = ["org.**"]
receive = ["topic:a.**"]
send = ["org.**", "topic:a.**"]
[[rule]]
name = "masters"
who = ["uid/1000@a"]
bus = ["/demo"]
own = ["master"]
bind = true
"""


# --- buses ---


def test_d2_a_bus_has_one_live_master(world: World) -> None:
    """A second bind is refused, whoever asks; the first may say it again."""
    first, second = world.node("a").join(1, 2), world.node("b").join(1)
    made = first.do(ClusterOp.BIND, **BIND, width=1024, order="total")
    assert (made["bus"], made["width"], made["order"], made["generation"]) == (1, 1024, "total", 1)
    bus = second.mirror.get_bus(PATH)
    assert bus == BusRecord(PATH, 1, 1, b"master", 1024, "total", made["key"], 1)
    assert first.do(ClusterOp.BIND, **BIND) == made
    assert first.refused(ClusterOp.BIND, **BIND | OTHER) == errno.EADDRINUSE
    assert first.refused(ClusterOp.BIND, **BIND | {"address": b"other"}) == errno.EADDRINUSE
    assert second.refused(ClusterOp.BIND, **BIND) == errno.EADDRINUSE


def test_d16_a_bus_without_a_master_gets_another(world: World) -> None:
    """With the same number, key, width and order, and a generation of its own."""
    first, second = world.node("a").join(1), world.node("b").join(1)
    made = first.do(ClusterOp.BIND, **BIND)
    assert second.refused(ClusterOp.UNBIND, endpoint=1, path=PATH) == errno.EADDRNOTAVAIL
    first.do(ClusterOp.UNBIND, endpoint=1, path=PATH)
    bus = second.mirror.get_bus(PATH)
    assert bus is not None
    assert (bus.node, bus.address) == (0, None)
    assert second.refused(ClusterOp.BIND, **BIND, width=2048) == errno.EINVAL
    assert second.refused(ClusterOp.BIND, **BIND, order="total") == errno.EINVAL
    assert second.do(ClusterOp.BIND, **BIND) == made | {"generation": 2}
    # An endpoint that ends takes its mastership along.
    second.do(ClusterOp.EXIT, endpoint=1)
    assert first.do(ClusterOp.BIND, **BIND)["generation"] == 3


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({"address": b"1.1"}, errno.EADDRNOTAVAIL),
        ({"address": b"@1.1"}, errno.EADDRNOTAVAIL),
        ({"address": b"\0"}, errno.EINVAL),
        ({"path": b"a\0b"}, errno.EINVAL),
        ({"width": 100}, errno.EINVAL),
        ({"order": "none"}, errno.EINVAL),
        ({"endpoint": 9}, errno.EHOSTUNREACH),
    ],
)
def test_binds_that_make_no_sense(world: World, change: dict[str, Any], number: int) -> None:
    """Nothing has changed then."""
    node = world.node("a").join(1)
    assert node.refused(ClusterOp.BIND, **BIND | change) == number
    assert node.mirror.get_bus(PATH) is None


def test_d2_the_address_of_a_master_is_a_name_that_it_may_own() -> None:
    """Who may create a bus may not take every name there: others may send to whoever has it."""
    world = World(POLICY)
    node = world.node("a").join(1)
    result = node.ask(ClusterOp.BIND, **BIND | {"address": b"com.a"})
    assert (result.errno, "may not own com.a" in result.value) == (errno.EPERM, True)
    assert node.mirror.get_bus(PATH) is None
    [entry] = world.audited("bind", is_done=False)
    assert "may not own com.a" in entry.detail
    node.do(ClusterOp.BIND, **BIND)


def test_the_master_of_a_bus_and_a_name_do_not_meet(world: World) -> None:
    """Whoever came first has the address."""
    node = world.node("a").join(1, 2)
    node.do(ClusterOp.BIND, **BIND)
    assert node.refused(ClusterOp.OWN, **OWN | OTHER | {"name": b"master"}) == errno.EADDRINUSE
    node.do(ClusterOp.UNBIND, endpoint=1, path=PATH)
    node.do(ClusterOp.OWN, **OWN | OTHER | {"name": b"master"})
    assert node.refused(ClusterOp.BIND, **BIND) == errno.EADDRINUSE
    node.do(ClusterOp.BIND, **BIND | OTHER)


# --- names ---


def test_d4_names_have_a_queue_over_nodes(world: World) -> None:
    """The next in the queue owns the name when its owner gives it up; all nodes know."""
    first, second, third = (world.node(name).join(1) for name in "abc")
    first.do(ClusterOp.BIND, **BIND)
    for node, flags, outcome in (
        (first, 0, PRIMARY),
        (second, NO_QUEUE, EXISTS),
        (third, REPLACE, IN_QUEUE),
        (second, 0, IN_QUEUE),
        (first, ALLOW, ALREADY),
    ):
        assert node.do(ClusterOp.OWN, **OWN, flags=flags) == {"outcome": outcome}
    assert second.do(ClusterOp.OWN, **OWN, flags=REPLACE) == {"outcome": PRIMARY}
    assert third.mirror.find_node(1, b"org.a") == 2
    assert OwnerRecord(1, b"org.a", 2, 1) in third.records()
    assert second.do(ClusterOp.RELEASE, **OWN) == {"outcome": 1}
    assert third.mirror.find_node(1, b"org.a") == 1
    assert first.do(ClusterOp.RELEASE, **OWN) == {"outcome": 1}
    assert first.mirror.find_node(1, b"org.a") == 3
    assert first.do(ClusterOp.RELEASE, **OWN) == {"outcome": 3}
    third.do(ClusterOp.EXIT, endpoint=1)
    assert first.mirror.find_node(1, b"org.a") is None
    assert first.do(ClusterOp.RELEASE, **OWN) == {"outcome": 2}


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({"name": b"1.1"}, errno.EADDRNOTAVAIL),
        ({"name": b"@1"}, errno.EADDRNOTAVAIL),
        ({"flags": 8}, errno.EINVAL),
        ({"path": b"/none"}, errno.ENOENT),
        ({"endpoint": 9}, errno.EHOSTUNREACH),
    ],
)
def test_d3_names_that_nobody_can_own(world: World, change: dict[str, Any], number: int) -> None:
    """Unique addresses come from leases, and provisional ones from agents."""
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    assert node.refused(ClusterOp.OWN, **OWN | change) == number


def test_d1_zeros_at_the_end_of_a_name_mean_nothing(world: World) -> None:
    """Two texts of one address are one name."""
    node = world.node("a").join(1, 2)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    padded = OWN | OTHER | {"name": b"org.a\0\0\0", "flags": NO_QUEUE}
    assert node.do(ClusterOp.OWN, **padded) == {"outcome": EXISTS}


# --- matches ---


def test_a_match_stands_once_for_each_node(world: World) -> None:
    """However many of its endpoints want it, until the last one does not."""
    node, other = world.node("a").join(1, 2), world.node("b").join(1)
    node.do(ClusterOp.BIND, **BIND)
    version = other.mirror.version
    node.do(ClusterOp.SUBSCRIBE, **WANT)
    node.do(ClusterOp.SUBSCRIBE, **WANT)
    node.do(ClusterOp.SUBSCRIBE, **WANT | OTHER)
    assert [one.node for one in other.mirror.get_matches(1)] == [1]
    assert other.mirror.version == version + 1
    other.do(ClusterOp.SUBSCRIBE, **WANT)
    assert sorted(one.node for one in node.mirror.get_matches(1)) == [1, 2]
    node.do(ClusterOp.UNSUBSCRIBE, **WANT)
    assert sorted(one.node for one in node.mirror.get_matches(1)) == [1, 2]
    node.do(ClusterOp.UNSUBSCRIBE, **WANT | OTHER)
    assert [one.node for one in node.mirror.get_matches(1)] == [2]
    node.do(ClusterOp.UNSUBSCRIBE, **WANT)


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ({"bits": bytes(128)}, errno.EDOM),
        ({"bits": bytes(9)}, errno.EINVAL),
        ({}, errno.EINVAL),
        ({"bits": bytes(64), "terms": b"a"}, errno.EINVAL),
    ],
)
def test_d8_matches_that_do_not_fit(world: World, what: dict[str, Any], number: int) -> None:
    """Another width than the bus's, no width at all, nothing, both."""
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    assert node.refused(ClusterOp.SUBSCRIBE, endpoint=1, path=PATH, **what) == number


def test_malformed_terms_end_the_link(world: World) -> None:
    """An agent checks what its applications say; this one does not, so it is no agent of ours."""
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    node.start(ClusterOp.SUBSCRIBE, endpoint=1, path=PATH, terms=b"\xff")
    assert node.cut is not None


# --- rights ---


def test_case37_what_policy_does_not_allow_is_refused_and_noted() -> None:
    """Bind, own, receive; with the reason, and nothing has changed."""
    world = World(POLICY)
    node, other = world.node("a").join(1), world.node("b").join(1)
    node.do(ClusterOp.BIND, **BIND)
    before = node.mirror.version
    for one, op, args in (
        (other, ClusterOp.BIND, BIND | {"path": b"/other"}),
        (other, ClusterOp.OWN, OWN),
        (other, ClusterOp.SUBSCRIBE, WANT),
        (node, ClusterOp.BIND, BIND | {"path": b"/other"}),
        (node, ClusterOp.OWN, OWN | {"name": b"com.a"}),
        (node, ClusterOp.SUBSCRIBE, WANT | {"terms": Terms("b").pack()}),
        (node, ClusterOp.SUBSCRIBE, WANT | {"terms": Terms("").pack()}),
        (node, ClusterOp.SUBSCRIBE, {"endpoint": 1, "path": PATH, "bits": bytes(64)}),
    ):
        world.audit.clear()
        assert one.refused(op, **args) == errno.EPERM
        [entry] = world.audit
        assert (entry.actor, entry.action) == (f"node/{one.name}", op.name.lower())
        assert not entry.is_done
        assert f"uid/1000@{one.name}" in entry.detail
    assert node.mirror.version == before
    node.do(ClusterOp.OWN, **OWN)
    node.do(ClusterOp.SUBSCRIBE, **WANT)


def test_privileged_operations_are_noted_with_their_rule(world: World) -> None:
    """Bind, own, hearing everything, raw bits; what is only said again is not noted again."""
    node = world.node("a").join(1)
    for _ in range(2):
        node.do(ClusterOp.BIND, **BIND)
        node.do(ClusterOp.OWN, **OWN)
        node.do(ClusterOp.SUBSCRIBE, **WANT)
        node.do(ClusterOp.SUBSCRIBE, **WANT | {"terms": b""})
        node.do(ClusterOp.SUBSCRIBE, endpoint=1, path=PATH, bits=b"\1" * 64)
    noted = [(one.action, one.subject) for one in world.audit if one.actor == "uid/1000@a"]
    assert noted == [
        ("bind", "/demo"),
        ("own", "/demo:org.a"),
        ("receive", "/demo"),
        ("receive", "/demo"),
    ]
    assert "rule all" in world.audited("own")[0].detail


def test_d19_questions_about_rights() -> None:
    """The answer names the rule; it holds until the number of the policy changes."""
    world = World(POLICY)
    node = world.node("a").join(1)
    ask = {"endpoint": 1, "path": PATH}
    number = node.mirror.get_fact("policy")
    assert node.do(ClusterOp.ASK, **ask, action="send", address=b"org.b") == {
        "is_allowed": True,
        "rule": "members",
        "reason": "",
        "reach": ["org.**"],
        "policy": number,
    }
    terms = Terms("a.b").pack()
    assert node.do(ClusterOp.ASK, **ask, action="send", terms=terms)["is_allowed"]
    assert node.do(ClusterOp.ASK, **ask, action="bind")["rule"] == "masters"
    refused = node.do(ClusterOp.ASK, **ask, action="send", address=b"com.b")
    assert not refused["is_allowed"]
    assert "com.b" in refused["reason"]
    assert not node.do(ClusterOp.ASK, **ask, action="send", bits=bytes(64))["is_allowed"]
    assert not node.do(ClusterOp.ASK, **ask, action="monitor")["is_allowed"]
    assert [one.actor for one in world.audited("monitor", is_done=False)] == ["uid/1000@a"]
    assert node.refused(ClusterOp.ASK, **ask, action="fly") == errno.EINVAL
    assert node.refused(ClusterOp.ASK, **ask, action="send") == errno.EINVAL


def test_d7_whoever_is_refused_is_written_down() -> None:
    """A question that is answered with no stands in the audit, with who, where and why."""
    world = World(POLICY)
    node = world.node("a").join(1)
    ask = {"endpoint": 1, "path": PATH, "action": "send"}
    assert node.do(ClusterOp.ASK, **ask, address=b"org.b")["is_allowed"]
    refused = node.do(ClusterOp.ASK, **ask, address=b"com.b")
    assert (refused["is_allowed"], refused["reach"]) == (False, ["org.**"])
    (noted,) = world.audited("send", is_done=False)
    assert (noted.actor, noted.subject, noted.detail) == ("uid/1000@a", "/demo", refused["reason"])


@pytest.mark.parametrize("loop", ["bind", "own", "churn"])
def test_d7_no_node_rolls_over_the_audit(loop: str) -> None:
    """However often it is refused, or gives up what it got: the entries of others stay."""
    world = World(POLICY)
    node, other = world.node("a").join(1), world.node("b").join(1)
    node.do(ClusterOp.BIND, **BIND)
    is_done = loop == "churn"

    def caused() -> int:
        actors = ("node/a", "uid/1000@a")
        return sum(one.is_done is is_done and one.actor in actors for one in world.audit)

    total = caused() + 1000
    for number in range(1000):
        if loop == "bind":
            node.refused(ClusterOp.BIND, **BIND | {"path": b"/no-%d" % number})
        elif loop == "own":
            node.refused(ClusterOp.OWN, **OWN | {"name": b"com.a"})
        else:
            node.do(ClusterOp.OWN, **OWN)
            node.do(ClusterOp.RELEASE, **OWN)
    assert caused() == ENTRIES
    # Those of others, and of the master, are written as ever.
    other.refused(ClusterOp.BIND, **BIND | {"path": b"/other"})
    assert world.audited("bind", is_done=False)[-1].actor == "node/b"
    world.run_for(WINDOW_S)
    [entry] = world.audited("missed")
    assert (entry.actor, entry.subject) == ("master", "node/a")
    assert entry.detail.startswith(f"{total - ENTRIES} more")
    # And in the next window it has its share again.
    before = len(world.audit)
    node.refused(ClusterOp.BIND, **BIND | {"path": b"/again"})
    assert len(world.audit) == before + 1


def test_d19_who_reads_what_is_meant_for_others_cannot_be_hidden() -> None:
    """Behind names that somebody owns and releases: monitors have a share of their own."""
    world = World()
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    for _ in range(ENTRIES + 1):
        node.do(ClusterOp.OWN, **OWN)
        node.do(ClusterOp.RELEASE, **OWN)
        node.refused(ClusterOp.ENTER, endpoint=2, uid=1, principal="principal/x")
    assert node.do(ClusterOp.ASK, endpoint=1, path=PATH, action="monitor")["is_allowed"]
    assert world.audited("monitor")


@pytest.mark.parametrize("count", [1024, 1025])
def test_d18_more_patterns_than_fit_into_an_answer_allow_nothing(count: int) -> None:
    """Whom a policy gives more than a node can be told of is refused, with the limit."""
    names = [f"n{number}" for number in range(count - 1)]
    listed = ", ".join(f'"{name}"' for name in ("org.**", *names))
    world = World(POLICY.replace('send = ["org.**"', f"send = [{listed}"))
    node = world.node("a").join(1)
    value = node.do(ClusterOp.ASK, endpoint=1, path=PATH, action="send", address=b"org.b")
    assert value["is_allowed"] is (count == 1024)
    assert len(value["reach"]) == (count if value["is_allowed"] else 0)
    assert ("the limit is 1024" in value["reason"]) is not value["is_allowed"]


def test_operations_that_are_not_for_nodes(world: World) -> None:
    """Neither what operators do nor enrolment."""
    node = world.node("a").join()
    assert node.refused(ClusterOp.TOKEN) == errno.EPERM
    assert node.refused(ClusterOp.REVOKE, subject="node/b") == errno.EPERM
    assert node.refused(ClusterOp.ENROL, token="t", name="n", csr=b"c") == errno.EPERM
    assert node.link is not None


# --- endpoints ---


def prove(world: World, name: str = "alice", endpoint: int = 1, node: str = "a") -> dict[str, Any]:
    """Let an endpoint prove a certificate; return the arguments of ENTER."""
    key = make_key()
    issued = world.order(ClusterOp.ISSUE, principal=name, csr=make_request(key))
    claim = world.node(node).do(ClusterOp.CHALLENGE, endpoint=endpoint)["claim"]
    return {
        "endpoint": endpoint,
        "uid": 1000,
        "chain": issued["chain"],
        "signature": sign_claim(key, claim),
    }


def test_d17_an_endpoint_enters_by_what_its_node_attests(world: World) -> None:
    """A user of one node is nobody on another."""
    node = world.node("a").join()
    result = node.do(ClusterOp.ENTER, endpoint=1, uid=0)
    assert result == {"principal": "uid/0@a", "until": None}


def test_d17_an_endpoint_enters_by_a_certificate(world: World) -> None:
    """Once for each challenge; with what it signed."""
    node = world.node("a").join()
    proof = prove(world)
    result = node.do(ClusterOp.ENTER, **proof)
    assert result == {"principal": "principal/alice", "until": NOW_UTC + LEAF_LIFE_S}
    assert node.refused(ClusterOp.ENTER, **proof) == errno.EPERM
    [entry] = world.audited("enter")
    assert entry.actor == "principal/alice"


def test_d17_proofs_that_are_refused(world: World) -> None:
    """Too late, without a signature, for another endpoint or node, by a node's certificate."""
    node, other = world.node("a").join(), world.node("b").join()
    late = prove(world)
    world.run_for(CHALLENGE_S)
    assert node.refused(ClusterOp.ENTER, **late) == errno.EPERM
    unsigned = {key: value for key, value in prove(world).items() if key != "signature"}
    assert node.refused(ClusterOp.ENTER, **unsigned) == errno.EPERM
    assert node.refused(ClusterOp.ENTER, **prove(world) | {"endpoint": 2}) == errno.EPERM
    stolen = prove(world)
    other.do(ClusterOp.CHALLENGE, endpoint=1)
    assert other.refused(ClusterOp.ENTER, **stolen) == errno.EPERM
    token = world.order(ClusterOp.TOKEN)["token"]
    key = make_key()
    result = world.visit("x", ClusterOp.ENROL, token=token, name="n", csr=make_request(key))
    claim = node.do(ClusterOp.CHALLENGE, endpoint=3)["claim"]
    signature = sign_claim(key, claim)
    assert (
        node.refused(
            ClusterOp.ENTER, endpoint=3, uid=0, chain=result.value["chain"], signature=signature
        )
        == errno.EPERM
    )
    assert len(world.audited("enter", is_done=False)) == 5


def test_the_claim_is_what_endpoints_sign(world: World) -> None:
    """So that applications need no master to know what they sign."""
    node = world.node("a").join()
    value = node.do(ClusterOp.CHALLENGE, endpoint=7)
    assert value["claim"] == endpoint_claim(value["nonce"], "test", "a", 7)


def test_d17_what_was_proven_is_stated_again(world: World) -> None:
    """After a new link, after a restart of the master; but only by whom it was proven for."""
    node, other = world.node("a").join(), world.node("b").join()
    node.do(ClusterOp.ENTER, **prove(world))
    again = {"endpoint": 1, "uid": 1000, "principal": "principal/alice"}
    for _ in range(2):
        assert node.do(ClusterOp.ENTER, **again)["principal"] == "principal/alice"
        assert other.refused(ClusterOp.ENTER, **again) == errno.EPERM
        for change in ({"principal": "principal/bob"}, {"endpoint": 2}):
            assert node.refused(ClusterOp.ENTER, **again | change) == errno.EPERM
        world.restart()
        node.come()
        other.come()
    node.do(ClusterOp.ENTER, endpoint=1, uid=1000)
    assert node.refused(ClusterOp.ENTER, **again) == errno.EPERM


def test_d17_an_endpoint_that_becomes_somebody_else_has_nothing(world: World) -> None:
    """What its former principal had is gone."""
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    node.do(ClusterOp.ENTER, **prove(world))
    world.settle()
    assert node.mirror.find_node(1, b"org.a") is None


def test_an_expired_certificate_takes_the_endpoint_along(world: World) -> None:
    """Within a sweep; its node is told."""
    node = world.node("a").join()
    node.leaf = type(node.leaf)(9, NOW_UTC + 10 * LEAF_LIFE_S, bytes(32))
    node.disconnect()
    node.join()
    node.do(ClusterOp.ENTER, **prove(world))
    node.do(ClusterOp.BIND, **BIND)
    world.utc_offset += LEAF_LIFE_S
    world.run_for(31)
    [withdrawn] = node.withdrawn
    assert (withdrawn.op, withdrawn.endpoint) == (ClusterOp.ENTER, 1)
    bus = node.mirror.get_bus(PATH)
    assert bus is not None
    assert bus.node == 0


# --- leases ---


def test_d3_blocks_are_leased_once(world: World) -> None:
    """Written before they are told; a block that comes back is spent."""
    first, second = world.node("a").join(), world.node("b").join()
    assert first.do(ClusterOp.LEASE) == {"block": 1}
    assert second.do(ClusterOp.LEASE) == {"block": 2}
    assert second.mirror.find_node(5, b"1.17") == 1
    assert second.refused(ClusterOp.LEASE, block=1) == errno.EREMCHG
    second.do(ClusterOp.RETURN, block=1)
    assert second.mirror.find_node(5, b"1.17") == 1
    first.do(ClusterOp.RETURN, block=1)
    assert second.mirror.find_node(5, b"1.17") is None
    assert first.refused(ClusterOp.LEASE, block=1) == errno.EREMCHG
    world.restart()
    first.come()
    second.come()
    assert first.do(ClusterOp.LEASE) == {"block": 3}


# --- quotas ---


def test_d18_case37_quotas_hold_over_all_nodes() -> None:
    """Who is at the limit is refused, others are not; nothing else has changed."""
    quotas = Quotas(
        endpoints_per_node=3,
        leases_per_node=1,
        matches_per_principal=2,
        names_per_principal=2,
        buses=1,
    )
    world = World(limits=Limits(quotas=quotas))
    node, other = world.node("a").join(1, 2, 3), world.node("b").join(1)
    assert node.refused(ClusterOp.ENTER, endpoint=4, uid=0) == errno.EDQUOT
    node.do(ClusterOp.LEASE)
    assert node.refused(ClusterOp.LEASE) == errno.EDQUOT
    node.do(ClusterOp.BIND, **BIND)
    assert node.refused(ClusterOp.BIND, **BIND | {"path": b"/x"}) == errno.EDQUOT
    for end, name in ((1, b"a"), (2, b"b")):
        node.do(ClusterOp.OWN, endpoint=end, path=PATH, name=name)
        node.do(ClusterOp.SUBSCRIBE, endpoint=end, path=PATH, terms=name)
    assert node.refused(ClusterOp.OWN, endpoint=3, path=PATH, name=b"c") == errno.EDQUOT
    assert node.refused(ClusterOp.SUBSCRIBE, endpoint=3, path=PATH, terms=b"c") == errno.EDQUOT
    # What they have they may say again.
    node.do(ClusterOp.OWN, endpoint=1, path=PATH, name=b"a")
    node.do(ClusterOp.SUBSCRIBE, endpoint=1, path=PATH, terms=b"a")
    other.do(ClusterOp.OWN, endpoint=1, path=PATH, name=b"c")
    other.do(ClusterOp.SUBSCRIBE, endpoint=1, path=PATH, terms=b"c")
    # One principal by certificates on two nodes has one account.
    node.do(ClusterOp.EXIT, endpoint=3)
    node.do(ClusterOp.ENTER, **prove(world, endpoint=3))
    other.do(ClusterOp.ENTER, **prove(world, endpoint=3, node="b"))
    node.do(ClusterOp.OWN, endpoint=3, path=PATH, name=b"d")
    other.do(ClusterOp.OWN, endpoint=3, path=PATH, name=b"e")
    assert node.refused(ClusterOp.OWN, endpoint=3, path=PATH, name=b"f") == errno.EDQUOT


def test_d18_case37_a_node_that_makes_up_users_has_its_share() -> None:
    """Each new user would have an account of its own; other nodes are not affected."""
    quotas = Quotas(matches_per_node=3, names_per_node=2)
    world = World(limits=Limits(quotas=quotas))
    node, other = world.node("a").join(), world.node("b").join(1)
    for end in range(1, 6):
        node.do(ClusterOp.ENTER, endpoint=end, uid=1000 + end)
    node.do(ClusterOp.BIND, **BIND)
    own = [node.ask(ClusterOp.OWN, endpoint=end, path=PATH, name=b"n%d" % end) for end in (1, 2, 3)]
    hear = [
        node.ask(ClusterOp.SUBSCRIBE, endpoint=end, path=PATH, terms=b"t%d" % end)
        for end in (1, 2, 3, 4)
    ]
    for results, text in ((own, "2 names of node/a"), (hear, "3 matches of node/a")):
        assert [one.errno for one in results] == [0] * (len(results) - 1) + [errno.EDQUOT]
        assert results[-1].value == f"{text}, which is the limit"
    other.do(ClusterOp.OWN, endpoint=1, path=PATH, name=b"c")
    other.do(ClusterOp.SUBSCRIBE, endpoint=1, path=PATH, terms=b"c")
    # What is given up makes room, also behind a restart.
    node.do(ClusterOp.EXIT, endpoint=1)
    node.do(ClusterOp.OWN, endpoint=3, path=PATH, name=b"n3")
    node.do(ClusterOp.SUBSCRIBE, endpoint=4, path=PATH, terms=b"t4")
    world.restart()
    other.come()
    node.come()
    for end in (3, 4):
        node.do(ClusterOp.ENTER, endpoint=end, uid=1000 + end)
    node.do(ClusterOp.OWN, endpoint=3, path=PATH, name=b"n3")
    node.do(ClusterOp.RESTATED)
    node.do(ClusterOp.OWN, endpoint=4, path=PATH, name=b"n4")
    assert node.refused(ClusterOp.OWN, endpoint=4, path=PATH, name=b"n5") == errno.EDQUOT


def test_d18_the_table_has_an_end() -> None:
    """Who comes late is refused, whoever it is; what is there can be said again and given up."""
    world = World()
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    node.do(ClusterOp.SUBSCRIBE, **WANT | {"terms": b"a"})
    quotas = Quotas(records=len(node.records()))
    world.limits = Limits(quotas=quotas)
    world.restart()
    node.come(1)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    node.do(ClusterOp.SUBSCRIBE, **WANT | {"terms": b"a"})
    node.do(ClusterOp.RESTATED)
    for op, args in (
        (ClusterOp.OWN, OWN | {"name": b"org.b"}),
        (ClusterOp.SUBSCRIBE, WANT),
        (ClusterOp.BIND, BIND | {"path": b"/more"}),
    ):
        result = node.ask(op, **args)
        assert (result.errno, "records in the table" in result.value) == (errno.EDQUOT, True)
    node.do(ClusterOp.RELEASE, **OWN)
    node.do(ClusterOp.SUBSCRIBE, **WANT)


def test_an_endpoint_has_as_many_names_as_a_notice_can_name(world: World) -> None:
    """128, wherever it is."""
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    for number in range(128):
        node.do(ClusterOp.OWN, **OWN | {"name": b"n%d" % number})
    assert node.refused(ClusterOp.OWN, **OWN) == errno.EDQUOT


def test_the_oldest_of_too_many_challenges_is_forgotten(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a node keeps open costs the master a bounded amount."""
    monkeypatch.setattr(call, "CHALLENGES", 2)
    node = world.node("a").join()
    proofs = [prove(world, endpoint=number) for number in (1, 2, 3)]
    assert node.refused(ClusterOp.ENTER, **proofs[0]) == errno.EPERM
    for proof in proofs[1:]:
        node.do(ClusterOp.ENTER, **proof)


def test_queues_for_one_name_have_a_limit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that everybody waits for must still fit into its row."""
    monkeypatch.setattr(call, "QUEUE", 2)
    node = world.node("a").join(1, 2, 3)
    node.do(ClusterOp.BIND, **BIND)
    for number in (1, 2):
        node.do(ClusterOp.OWN, **OWN | {"endpoint": number})
    assert node.refused(ClusterOp.OWN, **OWN | {"endpoint": 3}) == errno.EDQUOT


def test_a_bus_that_nobody_uses_is_forgotten() -> None:
    """After a day, and all nodes are told."""
    world = World(limits=Limits(bus_keep_s=100))
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.UNBIND, endpoint=1, path=PATH)
    world.run_for(90)
    assert node.mirror.get_bus(PATH) is not None
    world.run_for(100)
    assert node.mirror.get_bus(PATH) is None
    assert [one.subject for one in world.audited("forget")] == ["/demo"]
    assert node.do(ClusterOp.BIND, **BIND)["bus"] == 2
