"""Who belongs to the cluster: enrolment, renewal, revocation; what the operator asks; policies."""

from __future__ import annotations

import errno
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.master.world import NOW_UTC, PATH, Hand, World, cut_code, make_csr, make_issuer

from afbus.link.certificate import Refused, Side, judge
from afbus.link.identity import Identity, Role
from afbus.link.stranger import ENTRIES, WINDOW_S
from afbus.master.core import Limits
from afbus.master.issuer import (
    LEAF_LIFE_S,
    LEAF_LIFE_S_MAX,
    make_key,
    make_request,
    read_leaf,
    sign_claim,
)
from afbus.master.office import CERTIFICATES
from afbus.master.policy import parse_policy
from afbus.master.token import TOKEN_LIFE_S, TOKEN_LIFE_S_MAX
from afbus.proto import cluster
from afbus.proto.cluster import Ack
from afbus.proto.errors import CloseCode
from afbus.proto.operation import ClusterOp
from afbus.proto.record import NodeRecord, NodeState
from afbus.proto.terms import Terms
from afbus.proto.token import JoinToken

OWN: dict[str, Any] = {"endpoint": 1, "path": PATH, "name": b"org.a"}
BIND: dict[str, Any] = {"endpoint": 1, "path": PATH, "address": b"master"}
WANT: dict[str, Any] = {"endpoint": 1, "path": PATH, "terms": Terms("a").pack()}


def enrol(world: World, token: str, name: str = "a", csr: bytes | None = None) -> Any:
    """Enrol; return the value of the result, None if it was refused."""
    csr = csr or make_csr()
    result = world.visit("10.1.1.1 port 5", ClusterOp.ENROL, token=token, name=name, csr=csr)
    if not result.is_ok:
        assert (result.errno, "token" in result.value) == (errno.EPERM, True)
        # Whoever guesses learns nothing.
        assert result.value.endswith("(the master's audit says why)")
    return result.value if result.is_ok else None


def enrolled(world: World, name: str) -> Hand:
    """Return a node with a certificate of its own."""
    token = world.order(ClusterOp.TOKEN)["token"]
    hand = world.node(name)
    hand.leaf = read_leaf(enrol(world, token, name)["chain"][0])
    return hand


# --- enrolment ---


def test_case38_a_node_enrols_by_a_token(world: World) -> None:
    """It gets a certificate that links accept, and knows the root by the token."""
    made = world.order(ClusterOp.TOKEN)
    assert made["until"] == NOW_UTC + TOKEN_LIFE_S
    value = enrol(world, made["token"], "node-1")
    issuer = make_issuer()
    assert JoinToken.parse(made["token"]).root == issuer.root_digest
    assert value["root"] == issuer.root
    assert value["until"] == NOW_UTC + LEAF_LIFE_S
    verdict = judge(
        value["chain"],
        authority=issuer.trust(),
        side=Side.CLIENT,
        at_utc=at(NOW_UTC),
        claim=Identity("test", Role.NODE, "node-1"),
    )
    assert not isinstance(verdict, Refused)
    other = world.node("b").join()
    assert NodeRecord("node-1", 1, NodeState.LOST, bytes(16)) in other.records()
    [entry] = world.audited("enrol")
    assert (entry.actor, entry.subject) == ("10.1.1.1 port 5", "node/node-1")


def at(utc: float) -> datetime:
    """Return a time as certificates have it."""
    return datetime.fromtimestamp(utc, UTC)


def test_case38_of_100_with_one_token_one_wins(world: World) -> None:
    """All at once: nobody is told before all is written; the others are told no more than no."""
    token = world.order(ClusterOp.TOKEN)["token"]
    requests = [make_csr() for _ in range(100)]
    links = [
        world.start_visit("x", ClusterOp.ENROL, {"token": token, "name": f"n{turn}", "csr": csr})
        for turn, csr in enumerate(requests)
    ]
    world.settle()
    results = [world.visitors[link] for link in links]
    assert sum(1 for one in results if getattr(one, "is_ok", False)) == 1
    assert len(world.audited("enrol", is_done=False)) == 99
    # The winner, whose answer may have been lost, gets the same name again; also after a restart.
    [winner] = [turn for turn, one in enumerate(results) if getattr(one, "is_ok", False)]
    world.restart()
    assert enrol(world, token, f"n{winner}", requests[winner]) is not None
    assert enrol(world, token, f"n{winner}") is None
    assert enrol(world, token, "other", requests[winner]) is None


def test_case38_tokens_that_are_not_good(world: World) -> None:
    """Expired, for another name, with a wrong secret, none at all; the audit knows which."""
    token = world.order(ClusterOp.TOKEN, node="a")["token"]
    short = world.order(ClusterOp.TOKEN, life_s=60)["token"]
    assert enrol(world, token, "b") is None
    head, number, secret, root = token.split(":")
    assert enrol(world, ":".join((head, number, secret[::-1], root)), "a") is None
    assert enrol(world, "none", "a") is None
    world.run_for(60)
    assert enrol(world, short, "a") is None
    assert enrol(world, token, "a/b") is None
    assert enrol(world, token, "a", b"garbage") is None
    reasons = [entry.detail for entry in world.audited("enrol", is_done=False)]
    parts = ["is for node a", "wrong secret", "no join token", "long over", "a/b", "request"]
    assert [part in reason for part, reason in zip(parts, reasons, strict=True)] == [True] * 6
    assert enrol(world, token, "a") is not None


def test_case38_a_name_belongs_to_one_key(world: World) -> None:
    """Another one needs a token for that very name, or that the name is freed."""
    csr = make_csr()
    tokens = [world.order(ClusterOp.TOKEN)["token"] for _ in range(3)]
    assert enrol(world, tokens[0], "a", csr) is not None
    assert enrol(world, tokens[1], "a") is None
    assert "there already" in world.audited("enrol", is_done=False)[0].detail
    assert enrol(world, tokens[2], "a", csr) is not None
    named = world.order(ClusterOp.TOKEN, node="a")["token"]
    assert enrol(world, named, "a") is not None
    world.order(ClusterOp.REVOKE, subject="node/a")
    assert enrol(world, tokens[1], "a") is not None


def test_case38_a_node_that_came_by_its_certificate_has_its_name_too(world: World) -> None:
    """A master that had forgotten it learns its key with its link."""
    token = world.order(ClusterOp.TOKEN)["token"]
    world.node("a").join()
    assert enrol(world, token, "a") is None


def test_visitors_may_enrol_and_nothing_else(world: World) -> None:
    """And the operator may not enrol; each says one thing."""
    for actor, op, args in (
        ("x", ClusterOp.TOKEN, {}),
        ("x", ClusterOp.LEASE, {}),
        ("operator", ClusterOp.ENROL, {"token": "t", "name": "a", "csr": b"c"}),
        ("operator", ClusterOp.LEASE, {}),
    ):
        assert world.visit(actor, op, **args).errno == errno.EPERM
    link = world.new_link()
    world.visitors[link] = None
    world.core.receive_visitor(link, "x", world.now)
    world.core.receive_frame(link, cluster.encode(Ack(1, 1)), world.now)
    world.settle()
    assert getattr(world.visitors[link], "code", None) is CloseCode.ORDER


def test_enrolment_has_the_limit_of_nodes() -> None:
    """A token is not used up by that."""
    world = World(limits=Limits(nodes=1))
    tokens = [world.order(ClusterOp.TOKEN)["token"] for _ in range(2)]
    assert enrol(world, tokens[0], "a") is not None
    args = {"token": tokens[1], "name": "b", "csr": make_csr()}
    assert world.visit("x", ClusterOp.ENROL, **args).errno == errno.EDQUOT


def test_a_node_that_never_came_is_forgotten(world: World) -> None:
    """With the end of the certificate that it got."""
    token = world.order(ClusterOp.TOKEN)["token"]
    enrol(world, token, "a")
    other = enrolled(world, "b").join()
    other.do(ClusterOp.RENEW, csr=make_csr())
    world.utc_offset += LEAF_LIFE_S - 100
    renewed = other.do(ClusterOp.RENEW, csr=make_csr())
    other.leaf = read_leaf(renewed["chain"][0])
    other.join()
    world.utc_offset += 200
    world.run_for(31)
    assert {record.name for record in other.records() if isinstance(record, NodeRecord)} == {"b"}


# --- renewal ---


def test_case39_a_node_renews_without_a_break(world: World) -> None:
    """On the link that it has; for its own name, whatever the request says."""
    node = enrolled(world, "a").join()
    value = node.do(ClusterOp.RENEW, csr=make_csr())
    verdict = judge(
        value["chain"],
        authority=make_issuer().trust(),
        side=Side.SERVER,
        at_utc=at(NOW_UTC),
        claim=Identity("test", Role.NODE, "a"),
    )
    assert not isinstance(verdict, Refused)
    assert node.link is not None
    assert node.refused(ClusterOp.RENEW, csr=b"garbage") == errno.EPERM


def test_renewals_have_a_limit(world: World) -> None:
    """What a node can have at a time; it ends with the certificates."""
    node = enrolled(world, "a").join()
    csr = make_csr()
    for _ in range(255):
        node.do(ClusterOp.RENEW, csr=csr)
    assert node.refused(ClusterOp.RENEW, csr=csr) == errno.EDQUOT
    world.utc_offset += LEAF_LIFE_S + 1
    world.run_for(31)
    node.do(ClusterOp.RENEW, csr=csr)


# --- revocation ---


def test_case35_a_revoked_node_is_out_at_once(world: World) -> None:
    """Its link is cut, links trust it no longer, and all nodes know; what it had is gone."""
    other = enrolled(world, "b").join(1)
    node = enrolled(world, "a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    node.do(ClusterOp.LEASE)
    renewed = read_leaf(node.do(ClusterOp.RENEW, csr=make_csr())["chain"][0])
    serials = {node.leaf.serial, renewed.serial}
    value = world.order(ClusterOp.REVOKE, subject="node/a", reason="stolen")
    assert {int(one, 16) for one in value["serials"]} == serials
    assert (cut_code(node), node.cut and node.cut.text) == (CloseCode.DENIED, "revoked: stolen")
    assert world.trust == other.mirror.get_denied() == serials
    assert other.mirror.find_node(1, b"org.a") is None
    assert other.mirror.find_node(1, b"1.1") is None
    assert other.sees(node) is None
    world.restart()
    assert world.core.denied == serials
    with pytest.raises(AssertionError, match="has no link"):
        node.join()
    assert cut_code(node) is CloseCode.DENIED
    # It may come back, by a new token.
    assert enrolled(world, "a").come().link is not None


def test_case38_a_revoked_node_does_not_come_back_by_its_old_token(world: World) -> None:
    """The token is good for its key until it expires, but not beyond a revocation."""
    csr = make_csr()
    tokens = [world.order(ClusterOp.TOKEN, life_s=TOKEN_LIFE_S_MAX)["token"] for _ in "ab"]
    assert enrol(world, tokens[0], "a", csr) is not None
    assert enrol(world, tokens[1], "b", csr) is not None
    world.order(ClusterOp.REVOKE, subject="node/a")
    assert enrol(world, tokens[0], "a", csr) is None
    assert "was revoked" in world.audited("enrol", is_done=False)[0].detail
    world.restart()
    assert enrol(world, tokens[0], "a", csr) is None
    # Others keep theirs, and a new one lets it in.
    assert enrol(world, tokens[1], "b", csr) is not None
    assert enrol(world, world.order(ClusterOp.TOKEN)["token"], "a", csr) is not None


def test_case35_the_operator_is_answered_when_all_nodes_know(world: World) -> None:
    """So what is answered holds everywhere."""
    node = enrolled(world, "a").join()
    other = enrolled(world, "b").join()
    other.reads = False
    link = world.start_visit("operator", ClusterOp.REVOKE, {"subject": "node/a"})
    world.settle()
    assert world.visitors[link] is None
    assert cut_code(node) is CloseCode.DENIED
    other.reads = True
    world.settle()
    assert getattr(world.visitors[link], "is_ok", False)


def test_case35_a_revoked_principal_leaves_its_endpoints(world: World) -> None:
    """On all nodes, which are told; other endpoints stay."""
    key = make_key()
    issued = world.order(ClusterOp.ISSUE, principal="alice", csr=make_request(key))
    nodes = [enrolled(world, name).join(2) for name in "ab"]
    for node in nodes:
        claim = node.do(ClusterOp.CHALLENGE, endpoint=1)["claim"]
        node.do(
            ClusterOp.ENTER,
            endpoint=1,
            uid=0,
            chain=issued["chain"],
            signature=sign_claim(key, claim),
        )
    nodes[0].do(ClusterOp.BIND, **BIND | {"endpoint": 2})
    nodes[0].do(ClusterOp.OWN, **OWN)
    world.order(ClusterOp.REVOKE, subject="principal/alice")
    for node in nodes:
        [withdrawn] = node.withdrawn
        assert (withdrawn.op, withdrawn.endpoint) == (ClusterOp.ENTER, 1)
        assert node.mirror.find_node(1, b"org.a") is None
        assert node.link is not None
    assert nodes[1].mirror.get_bus(PATH) is not None
    claim = nodes[0].do(ClusterOp.CHALLENGE, endpoint=1)["claim"]
    signature = sign_claim(key, claim)
    args = {"endpoint": 1, "uid": 0, "chain": issued["chain"], "signature": signature}
    assert nodes[0].refused(ClusterOp.ENTER, **args) == errno.EPERM
    again = {"endpoint": 1, "uid": 0, "principal": "principal/alice"}
    assert nodes[0].refused(ClusterOp.ENTER, **again) == errno.EPERM


def test_case35_one_certificate_by_its_number(world: World) -> None:
    """The node may come back with another one; strangers' numbers can be denied too."""
    node = enrolled(world, "a").join()
    other = read_leaf(node.do(ClusterOp.RENEW, csr=make_csr())["chain"][0])
    args = {"subject": f"serial/{node.leaf.serial:x}"}
    link = world.start_visit("operator", ClusterOp.REVOKE, args)
    world.settle()
    assert cut_code(node) is CloseCode.DENIED
    # The node itself may still be there; so it is waited for.
    assert world.visitors[link] is None
    node.leaf = other
    node.join()
    assert getattr(world.visitors[link], "is_ok", False)
    world.order(ClusterOp.REVOKE, subject="serial/abcdef")
    assert 0xABCDEF in node.mirror.get_denied()


@pytest.mark.parametrize(
    "subject",
    ["", "a", "node/", "node/unknown", "uid/0@a", "serial/", "serial/xyz", "serial/0", "serial/-1"],
)
def test_nothing_to_revoke(world: World, subject: str) -> None:
    """A typing error must not look like a success."""
    if subject:
        result = world.visit("operator", ClusterOp.REVOKE, subject=subject)
        assert result.errno == errno.EINVAL
    assert world.core.denied == frozenset()


def test_case35_denied_certificates_are_forgotten_when_they_are_over(world: World) -> None:
    """Not before; all nodes are told."""
    other = enrolled(world, "b")
    other.leaf = type(other.leaf)(5, NOW_UTC + 10 * LEAF_LIFE_S, other.leaf.key)
    other.join()
    enrolled(world, "a")
    world.order(ClusterOp.REVOKE, subject="node/a")
    world.utc_offset += LEAF_LIFE_S - 100
    world.run_for(31)
    assert len(world.trust) == 1
    world.utc_offset += 200
    world.run_for(31)
    assert world.trust == other.mirror.get_denied() == frozenset()


# --- what the operator asks ---


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (ClusterOp.TOKEN, {"node": "a/b"}),
        (ClusterOp.TOKEN, {"life_s": 1}),
        (ClusterOp.TOKEN, {"life_s": TOKEN_LIFE_S_MAX + 1}),
        (ClusterOp.ISSUE, {"principal": "a b", "csr": b"x"}),
        (ClusterOp.ISSUE, {"principal": "a", "csr": b"x"}),
        (ClusterOp.ISSUE, {"principal": "a", "csr": b"x", "life_s": LEAF_LIFE_S_MAX + 1}),
    ],
)
def test_wishes_of_an_operator_that_make_no_sense(
    world: World, op: ClusterOp, args: dict[str, Any]
) -> None:
    """They are refused with a reason."""
    result = world.visit("operator", op, **args)
    assert (result.errno, bool(result.value)) == (errno.EINVAL, True)


def test_status_and_nodes(world: World) -> None:
    """What there is, in numbers; nodes in portions, by name."""
    nodes = [world.node(f"n{number:02}").join(1) for number in range(20)]
    nodes[0].do(ClusterOp.BIND, **BIND)
    nodes[1].do(ClusterOp.OWN, **OWN)
    nodes[2].do(ClusterOp.SUBSCRIBE, **WANT)
    nodes[3].do(ClusterOp.LEASE)
    nodes[4].disconnect()
    world.run_for(6)
    world.order(ClusterOp.TOKEN)
    status = world.order(ClusterOp.STATUS)
    wanted: dict[str, object] = {
        "nodes": 20,
        "live": 19,
        "links": 19,
        "endpoints": 20,
        "buses": 1,
        "names": 1,
    }
    wanted |= {"matches": 1, "blocks": 1, "tokens": 1, "denied": 0, "cluster": "test"}
    assert {key: status[key] for key in wanted} == wanted
    assert status["version"] == nodes[0].mirror.version
    rows, after = [], ""
    while True:
        value = world.order(ClusterOp.NODES, after=after) if after else world.order(ClusterOp.NODES)
        rows += value["rows"]
        if value["next"] is None:
            break
        after = value["next"]
    assert [row["node"] for row in rows] == sorted(node.name for node in nodes)
    by_name = {row["node"]: row for row in rows}
    assert (by_name["n00"]["state"], by_name["n00"]["lag"]) == ("live", 0)
    assert (by_name["n04"]["state"], by_name["n04"]["lag"]) == ("lost", None)
    assert by_name["n02"]["matches"] == by_name["n03"]["blocks"] == 1


# --- a new policy ---

STRICT = """
[[rule]]
name = "few"
who = ["uid/1000@a"]
bus = ["/demo"]
own = ["org.b"]
receive = ["topic:b"]
"""


def test_a_new_policy_takes_away_what_it_does_not_allow(world: World) -> None:
    """Masters, names, matches; who had them is told why, and others inherit."""
    node, other = world.node("a").join(1), world.node("b").join(1)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    node.do(ClusterOp.OWN, **OWN | {"name": b"org.b"})
    node.do(ClusterOp.SUBSCRIBE, **WANT)
    node.do(ClusterOp.SUBSCRIBE, **WANT | {"terms": b"b"})
    other.do(ClusterOp.SUBSCRIBE, **WANT)
    number = other.mirror.get_fact("policy")
    world.core.set_policy(parse_policy(STRICT), world.now)
    world.settle()
    assert other.mirror.get_fact("policy") == number + 1
    bus = other.mirror.get_bus(PATH)
    assert bus is not None
    assert bus.node == 0
    assert other.mirror.find_node(1, b"org.a") is None
    assert other.mirror.find_node(1, b"org.b") == 1
    assert [one.what for one in other.mirror.get_matches(1)] == [Terms("b")]
    assert [(one.op, one.name, one.what) for one in node.withdrawn] == [
        (ClusterOp.BIND, b"", b""),
        (ClusterOp.OWN, b"org.a", b""),
        (ClusterOp.SUBSCRIBE, b"", Terms("a")),
    ]
    assert all("uid/1000@a" in one.reason for one in node.withdrawn)
    assert [one.op for one in other.withdrawn] == [ClusterOp.SUBSCRIBE]
    [entry] = world.audited("policy")
    assert entry.subject == "added few; removed all"
    assert node.refused(ClusterOp.BIND, **BIND) == errno.EPERM


def test_d2_a_policy_that_takes_the_name_of_a_master_takes_its_bus(world: World) -> None:
    """It is no master without an address; the name may be another's now."""
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    world.core.set_policy(parse_policy(STRICT + "bind = true\n"), world.now)
    world.settle()
    [withdrawn] = node.withdrawn
    assert withdrawn.op is ClusterOp.BIND
    assert "may not own master" in withdrawn.reason
    bus = node.mirror.get_bus(PATH)
    assert bus is not None
    assert (bus.node, bus.address) == (0, None)


def test_the_same_policy_again_changes_nothing(world: World) -> None:
    """It is noted that it was read."""
    node = world.node("a").join()
    version = node.mirror.version
    world.core.set_policy(world.policy, world.now)
    world.settle()
    assert node.mirror.version == version
    assert world.audited("policy")[0].subject == "same"


def test_a_policy_that_changed_while_the_master_was_away(world: World) -> None:
    """Its number grows, and what nodes state is judged by it."""
    node = world.node("a").join(1)
    node.do(ClusterOp.BIND, **BIND)
    node.do(ClusterOp.OWN, **OWN)
    number = node.mirror.get_fact("policy")
    world.restart()
    node.come(1)
    assert node.mirror.get_fact("policy") == number
    world.policy = parse_policy(STRICT)
    world.restart()
    node.come(1)
    assert node.mirror.get_fact("policy") == number + 1
    assert node.refused(ClusterOp.OWN, **OWN) == errno.EPERM
    node.do(ClusterOp.RESTATED)
    assert node.mirror.find_node(1, b"org.a") is None


def test_case33_refused_handshakes_stand_in_the_audit(world: World) -> None:
    """With where, the rule, and the text."""
    world.core.receive_refusal("10.0.0.9 port 1", "certificate-expired", "valid until then")
    world.settle()
    [entry] = world.audited("link", is_done=False)
    assert entry.actor == "10.0.0.9 port 1"
    assert entry.detail == "certificate-expired: valid until then"


def test_case33_refusals_do_not_fill_the_audit(world: World) -> None:
    """However often a stranger knocks: some have an entry each, the others are counted."""
    for number in range(1000):
        world.core.receive_refusal(f"10.0.0.9 port {number}", "no-certificate", "nothing")
        enrol(world, "none", f"n{number}")
    refused = [*world.audited("link", is_done=False), *world.audited("enrol", is_done=False)]
    assert len(refused) == ENTRIES
    # What is no stranger's stands there as ever.
    world.order(ClusterOp.TOKEN)
    assert world.audited("token")
    world.run_for(WINDOW_S)
    [entry] = world.audited("refusals")
    assert entry.detail.startswith(f"{2000 - ENTRIES} more were refused")
    world.core.receive_refusal("10.0.0.9 port 1", "no-certificate", "nothing")
    world.settle()
    assert len(world.audited("link", is_done=False)) == ENTRIES // 2 + 1


def test_the_master_has_a_certificate_of_its_own(world: World) -> None:
    """It can be revoked like any other."""
    issued = world.core.issue_own("m1", make_csr())
    assert issued.identity == Identity("test", Role.MASTER, "m1")
    world.settle()
    value = world.order(ClusterOp.REVOKE, subject="master/m1")
    assert value["serials"] == [f"{issued.serial:x}"]


def test_case28_a_master_may_be_started_any_number_of_times(world: World) -> None:
    """Each start has a certificate: a crash loop ends by itself, and leaves no more than others."""
    serials = [world.core.issue_own("m1", make_csr()).serial for _ in range(CERTIFICATES + 20)]
    world.settle()
    assert len(set(serials)) == CERTIFICATES + 20
    rows = {int.from_bytes(key[1:], "big") for key in world.disk if key[:1] == b"I"}
    assert len(rows & set(serials)) == CERTIFICATES
    assert serials[-1] in rows
