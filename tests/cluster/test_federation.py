"""A bus over several nodes: joining, messages both ways, control, notices, and what fails."""

from __future__ import annotations

import errno
from dataclasses import replace
from socket import SO_PASSCRED, SOL_SOCKET
from typing import TYPE_CHECKING

import pytest
from tests.cluster.town import MASTER, PATH, Town
from tests.master.world import EVERYTHING, NOW_UTC, make_issuer

from afbus._datapath import UNICAST
from afbus.link.identity import Identity, Role
from afbus.master.issuer import make_key, make_request, sign_claim
from afbus.master.policy import parse_policy
from afbus.proto import cluster, codec, control
from afbus.proto.address import BusAddress
from afbus.proto.cluster import ClusterCall
from afbus.proto.control import (
    Grant,
    GrantFlags,
    Match,
    MulticastMatch,
    MulticastSend,
    OwnedAddr,
)
from afbus.proto.errors import AddressInUse, Denied, InvalidArgument, MasterLost, NoBus
from afbus.proto.frames import Op
from afbus.proto.match import Overflow
from afbus.proto.mirror import Change
from afbus.proto.notice import Event, Notice
from afbus.proto.operation import ClusterOp, endpoint_claim
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.client import Client

    from afbus.proto.control import Item

#: Whoever is on alpha may bind.
BIND = """
[[rule]]
name = "hall"
who = ["uid/*@alpha"]
bus = ["**"]
own = ["town.hall"]
bind = true
"""
NEWS = Terms.of("news")


@pytest.fixture
def town() -> Iterator[Town]:
    """Return three nodes and a master that know each other."""
    made = Town()
    yield made
    made.close()


def own(name: bytes = b"") -> OwnedAddr:
    """The grant of a name, or of an address that the agent chooses."""
    return OwnedAddr(BusAddress(PATH, name) if name else BusAddress.kernel(PATH))


def hear(what: Terms = NEWS) -> MulticastMatch:
    """The grant of a subscription."""
    return MulticastMatch(Match(PATH, what, Overflow.GAP, 0))


def begin(town: Town) -> Client:
    """Let a client of alpha bind the bus."""
    master = town.houses["alpha"].client()
    master.bind(MASTER, PATH)
    return master


def join(master: Client, house: str, *names: bytes, hears: bool = False) -> Client:
    """Let a client of a node come onto the bus, ask, and get what it asks for."""
    town = master.house.town
    member = town.houses[house].client()
    town.until(lambda: town.houses[house].federation.is_taken(PATH))
    assert member.attach(PATH)["master"] == MASTER
    assert member.send(MASTER, b"let me in") == 0
    ((body, source),) = master.letters()
    assert body == b"let me in"
    items: list[Item] = [own(), *(own(name) for name in names), MulticastSend(PATH, NEWS)]
    if hears:
        items.append(hear())
    (member.address,) = master.grant(source, *items)
    ((body, carried, _, source),) = member.wait()
    assert (body, source) == (b"yes", MASTER)
    assert len(carried) >= 2
    return member


def test_d2_one_master_in_the_cluster(town: Town) -> None:
    """A bus is known on all nodes once it is bound, and nobody else can bind it anywhere."""
    other = town.houses["beta"].client()
    assert isinstance(other.refused(Op.ATTACH, path=PATH), NoBus)
    begin(town)
    address = BusAddress(PATH, MASTER).pack()
    for options in ({}, {"scope": "cluster"}):
        refusal = other.refused(Op.BIND, address=address, options=options)
        assert isinstance(refusal, AddressInUse)
    assert other.attach(PATH)["master"] == MASTER


def test_d11_no_total_order_across_hosts(town: Town) -> None:
    """What cannot be kept is not promised."""
    address = BusAddress(PATH, MASTER).pack()
    options = {"scope": "cluster", "order": "total"}
    refusal = town.houses["alpha"].client().refused(Op.BIND, address=address, options=options)
    assert isinstance(refusal, InvalidArgument)


def test_r6_join_over_two_nodes(town: Town) -> None:
    """The request goes to the other node, the grant comes back, and is in effect before it."""
    master = begin(town)
    member = join(master, "beta", b"shop")
    assert member.send(MASTER, b"thanks") == 0
    assert master.letters() == [(b"thanks", member.address)]
    assert master.send(b"shop", b"welcome") == 0
    assert member.letters() == [(b"welcome", MASTER)]


def test_d3_addresses_of_two_nodes_are_of_their_blocks(town: Town) -> None:
    """Each node gives addresses of its own, and no two are alike."""
    master = begin(town)
    members = [join(master, house) for house in ("alpha", "beta", "gamma", "beta")]
    addresses = [one.address for one in members]
    assert len(set(addresses)) == 4
    blocks = [address.split(b".")[0] for address in addresses]
    assert blocks[1] == blocks[3]
    assert len(set(blocks)) == 3


def test_d3_a_name_has_one_owner_in_the_cluster(town: Town) -> None:
    """What one node's endpoint owns, the other's cannot get, and the refusal says who it is."""
    master = begin(town)
    join(master, "beta", b"shop")
    other = join(master, "gamma")
    with pytest.raises(AddressInUse):
        master.grant(other.address, own(b"shop"))


def test_r14_multicasts_reach_each_node_once(town: Town) -> None:
    """A subscriber on each node, the sender's too, gets each message once, in its order."""
    master = begin(town)
    hearers = [join(master, house, hears=True) for house in ("alpha", "beta", "gamma", "beta")]
    speaker = join(master, "alpha")
    for number in range(50):
        assert speaker.publish(NEWS, b"%d" % number) == 0
    for hearer in hearers:
        assert hearer.texts(50) == [b"%d" % number for number in range(50)]
    deaf = join(master, "gamma")
    assert speaker.publish(NEWS, b"more") == 0
    assert hearers[1].texts() == [b"more"]
    assert deaf.take() == []


def test_d9_a_subscription_is_there_when_all_nodes_know_of_it(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that reads nothing keeps the call waiting; who has sent behind it is heard."""
    master = begin(town)
    hearer, speaker = join(master, "beta"), join(master, "gamma")
    with monkeypatch.context() as patch:
        patch.setattr(town.houses["gamma"], "settle", lambda: False)
        serial = master.start_grant(hearer.address, hear())
        # Less than the master waits for a node before it goes on without it.
        town.run_for(4)
        assert serial not in master.results
        assert hearer.take() == []
    town.until(lambda: serial in master.results)
    assert master.results.pop(serial).is_ok
    assert speaker.publish(NEWS, b"after") == 0
    assert hearer.texts(2) == [b"yes", b"after"]


def test_d11_unicasts_and_multicasts_keep_one_order(town: Town) -> None:
    """Each sender's messages reach each receiver in the order sent, whichever way."""
    master = begin(town)
    hearer = join(master, "beta", b"ear", hears=True)
    speaker = join(master, "gamma")
    sent = []
    for number in range(200):
        body = b"%d" % number
        sent.append(body)
        if number % 3:
            assert speaker.send(b"ear", body) == 0
        else:
            assert speaker.publish(NEWS, body) == 0
    assert hearer.texts(200) == sent


def test_d7_unknown_names_go_to_the_master_and_dead_addresses_are_told(town: Town) -> None:
    """As on one host, wherever the master is."""
    master = begin(town)
    member, other = join(master, "beta"), join(master, "gamma")
    assert member.send(b"nobody", b"hello") == 0
    assert master.texts() == [b"hello"]
    stranger = town.houses["gamma"].client()
    stranger.attach(PATH)
    assert stranger.send(other.address, b"x") == -errno.EHOSTUNREACH
    other.end()
    assert master.notice().event is Event.KILLED
    member.send(other.address, b"to the dead")
    town.until(lambda: member.send(other.address, b"again") == -errno.EHOSTUNREACH)


def test_d15_the_master_hears_who_comes_and_goes(town: Town) -> None:
    """A notice from another node comes after the last message of its subject."""
    master = begin(town)
    member = join(master, "beta", b"shop")
    for number in range(20):
        assert member.send(MASTER, b"%d" % number) == 0
    member.end()
    got = master.wait(21)
    bodies = [one[0] for one in got if one[3] != b""]
    assert bodies == [b"%d" % number for number in range(20)]
    assert got[-1][3] == b""


def test_d15_watchers_on_other_nodes_hear_it_too(town: Town) -> None:
    """Whoever has the grant reads notices of all nodes, and no longer when it is taken."""
    master = begin(town)
    watcher, other = join(master, "gamma"), join(master, "beta")
    master.grant(watcher.address, Grant(GrantFlags.NOTICES))
    other.end()
    notice = watcher.notice()
    assert (notice.event, notice.subject) == (Event.KILLED, (other.address,))
    master.grant(watcher.address, Grant(GrantFlags(0)))
    assert watcher.notice().event is Event.REVOKED
    join(master, "beta").end()
    town.run_for(1)
    assert not [one for one in watcher.take() if one[3] == b"" and one[0]]


@pytest.mark.parametrize("event", [Event.KILLED, Event.REVOKED, Event.EVICTED])
def test_d6_a_node_tells_of_its_own_endpoints_alone(
    town: Town, event: Event, caplog: pytest.LogCaptureFixture
) -> None:
    """That others are gone, or have lost something, is not for it to say; the log tells of it."""
    master = begin(town)
    victim, watcher = join(master, "beta", b"shop"), join(master, "gamma")
    master.grant(watcher.address, Grant(GrantFlags.NOTICES))
    bus = town.houses["alpha"].uplink.mirror.get_bus(PATH)
    assert bus is not None
    master.take()
    number = {name: house.uplink.number for name, house in town.houses.items()}
    for subject in ((victim.address,), (b"shop",), (watcher.address, victim.address), ()):
        data = codec.encode([bus.number, Notice(event, subject).encode()])
        town.houses["gamma"].switch.signal(number["alpha"], data)
        town.houses["alpha"].switch.signal(number["gamma"], data)
        town.run_for(1)
    assert not [one for one in (*master.take(), *watcher.take()) if one[3] == b"" and one[0]]
    told = f"audit: node {number['gamma']} told {event.name} of "
    assert sum(told in line for line in caplog.messages) == 4
    # What is true comes on, with all that is not another's.
    victim.end()
    assert set(watcher.notice(Event.KILLED).subject) == {victim.address, b"shop"}


def test_case42_a_notice_that_is_none_ends_the_link(
    town: Town, caplog: pytest.LogCaptureFixture
) -> None:
    """With the rule in the log; the next link brings what comes behind it."""
    master = begin(town)
    member = join(master, "beta", b"shop")
    (link,) = [one for one in town.houses["alpha"].carrier.links if one.peer.name == "beta"]
    number = town.houses["alpha"].uplink.number
    town.houses["beta"].switch.signal(number, codec.encode(["no", b"notice"]))
    town.until(lambda: link.is_down)
    assert any(line.startswith("link to beta: signal") for line in caplog.messages)
    assert member.send(MASTER, b"still here") == 0
    assert master.texts() == [b"still here"]


def test_d5_revocation_on_another_node(town: Town) -> None:
    """What the master takes is gone before its call returns."""
    master = begin(town)
    member = join(master, "beta", b"shop")
    from afbus.proto.control import RevokeAddr

    master.grant(b"shop", RevokeAddr(BusAddress(PATH, b"shop")), body=b"sorry")
    assert member.notice().event is Event.REVOKED
    speaker = join(master, "gamma")
    assert speaker.send(b"shop", b"anybody") == 0
    assert b"anybody" in master.texts()


def test_d16_a_bus_goes_on_without_its_master(town: Town) -> None:
    """Members hear that the master of their bus is gone, talk on, and hear of the next one."""
    master = begin(town)
    one, other = join(master, "beta", b"one"), join(master, "gamma", b"other")
    master.end()
    assert one.notice().event is Event.MASTER_LOST
    assert one.send(b"other", b"still here") == 0
    assert other.texts() == [b"still here"]
    assert one.send(b"nobody", b"x") == -errno.EHOSTDOWN
    again = town.houses["gamma"].client()
    again.bind(MASTER, PATH)
    assert one.notice().event is Event.MASTER_BACK
    assert one.send(MASTER, b"hello") == 0
    assert again.texts() == [b"hello"]


def test_d16_traffic_goes_on_without_the_cluster_master(town: Town) -> None:
    """With the cluster's master away 60 s nothing is lost, and only claims are refused."""
    master = begin(town)
    one, other = join(master, "beta", b"one"), join(master, "gamma", b"other", hears=True)
    town.kill_master()
    for number in range(60):
        assert one.send(b"other", b"%d" % number) == 0
        assert one.publish(NEWS, b"m%d" % number) == 0
        town.run_for(1)
    expected = [b"%b%d" % (kind, number) for number in range(60) for kind in (b"", b"m")]
    assert other.texts(120) == expected
    with pytest.raises(MasterLost):
        master.grant(b"one", own(b"two"))
    town.start_master()
    town.until(lambda: all(house.uplink.is_here for house in town.houses.values()))
    master.grant(b"one", own(b"two"))
    assert other.send(b"two", b"hello") == 0
    assert b"hello" in one.texts(2)


def test_r15_who_may_not_send_to_the_master_cannot_join(town: Town) -> None:
    """The policy of the cluster comes before what a bus's master grants."""
    master = begin(town)
    assert town.master is not None
    town.master.set_policy(parse_policy(EVERYTHING.replace('send = ["**"', 'send = ["other"')), 0)
    town.settle()
    member = town.houses["beta"].client()
    member.attach(PATH)
    assert member.send(MASTER, b"let me in") == 0
    ((_, source),) = master.letters()
    with pytest.raises(Denied, match="policy"):
        master.grant(source, own())


def test_d5_only_the_master_commands(town: Town) -> None:
    """A member's control items are refused where it is, and never reach the other node."""
    master = begin(town)
    member = join(master, "beta")
    other = join(master, "gamma")

    items = [list(control.encode(own(b"mine"))[1:])]
    refusal = member.refused(Op.CONTROL, dst=other.address, items=items, body=b"")
    assert isinstance(refusal, Denied)


def test_d17_an_endpoint_proves_who_it_is(town: Town) -> None:
    """With a certificate it is a principal on whatever node, for the policy and for others."""
    assert town.master is not None
    issuer, key = make_issuer(), make_key()
    identity = Identity("test", Role.PRINCIPAL, "shop")
    issued = issuer.issue(make_request(key), identity, 77, NOW_UTC)
    policy = EVERYTHING.replace('who = ["principal/*", "uid/*@*"]', 'who = ["principal/shop"]')
    town.master.set_policy(parse_policy(policy + BIND), 0)
    town.settle()
    master = begin(town)
    member = town.houses["beta"].client()
    asked = member.call(Op.CHALLENGE)
    claim = endpoint_claim(asked["nonce"], asked["cluster"], asked["node"], asked["endpoint"])
    wrong = member.refused(Op.PROVE, chain=list(issued.chain), signature=b"x" * 70)
    assert isinstance(wrong, Denied)
    # A challenge is good for one answer, right or wrong.
    signature = sign_claim(key, claim)
    assert isinstance(
        member.refused(Op.PROVE, chain=list(issued.chain), signature=signature), Denied
    )
    asked = member.call(Op.CHALLENGE)
    claim = endpoint_claim(asked["nonce"], asked["cluster"], asked["node"], asked["endpoint"])
    signature = sign_claim(key, claim)
    proven = member.call(Op.PROVE, chain=list(issued.chain), signature=signature)
    assert proven == {"principal": "principal/shop"}
    member.attach(PATH)
    again = member.refused(Op.PROVE, chain=list(issued.chain), signature=signature)
    assert isinstance(again, InvalidArgument)
    master.call(Op.OPTION_SET, level=SOL_SOCKET, name=SO_PASSCRED, value=1)
    assert member.send(MASTER, b"let me in") == 0
    ((_, items, _, source),) = master.wait()
    known = [control.decode(*item) for item in items if item[0] == control.BUS_SOCKET]
    (who,) = [one for one in known if isinstance(one, control.Identity)]
    assert (who.principal, who.node) == ("principal/shop", "beta")
    master.grant(source, own(), own(b"shop.window"))
    # Who is nobody but a user may not even join.
    stranger = town.houses["gamma"].client()
    stranger.attach(PATH)
    assert stranger.send(MASTER, b"me too") == 0
    ((_, source),) = master.letters()
    with pytest.raises(Denied, match="policy"):
        master.grant(source, own())


def test_requests_are_answered_across(town: Town) -> None:
    """A reply finds its request, and one that will never come is told."""
    master = begin(town)
    asker, server = join(master, "beta"), join(master, "gamma", b"server")
    assert asker.send(b"server", b"question", serial=7) == 0
    assert server.letters() == [(b"question", asker.address)]
    assert server.send(asker.address, b"answer", reply_to=7) == 0
    assert asker.texts() == [b"answer"]
    assert asker.send(b"server", b"another", serial=8) == 0
    server.wait()
    server.end()
    got = asker.wait()
    assert got


def test_d20_senders_on_other_nodes_are_told_what_nobody_read(town: Town) -> None:
    """What a client took and nobody will read: by unique address, by name, and before joining."""
    master = begin(town)
    sender, named = join(master, "beta"), join(master, "beta", b"writer")
    reader = join(master, "gamma", b"reader")
    for text in (b"one", b"two", b"three"):
        assert sender.send(b"reader", text) == 0
    assert named.rings.send(UNICAST, b"reader", b"writer", [b"x"], [], 0, 0, 0, 0, 0.0) == 0
    assert {source for _, source in reader.letters(4)} == {sender.address, b"writer"}
    rows = [[sender.address, 2, 3, 2], [b"writer", 2, 2, 1], [b"99.1", 1, 1, 1]]
    assert reader.call(Op.UNREAD, messages=rows, reason="asleep") is None
    for client, numbers in ((sender, (2, 3, 2)), (named, (2, 2, 1))):
        notice = client.notice()
        assert (notice.event, notice.subject) == (Event.UNREAD, (reader.address,))
        first, last, count = numbers
        assert notice.detail == {
            "first": first,
            "last": last,
            "count": count,
            "errno": errno.EHOSTUNREACH,
        }


def test_case13_a_cut_of_30_s_loses_and_repeats_nothing(town: Town) -> None:
    """What was accepted before and during a cut arrives once, in order, or is told."""
    master = begin(town)
    one, other = join(master, "beta", b"one"), join(master, "gamma", b"other")
    for number in range(10):
        assert one.send(b"other", b"%d" % number) == 0
    town.run_for(1)
    town.cut("beta", "gamma")
    accepted = [b"%d" % number for number in range(10)]
    refused = 0
    for number in range(10, 40):
        if one.send(b"other", b"%d" % number) == 0:
            accepted.append(b"%d" % number)
        else:
            refused += 1
        town.run_for(1)
    town.heal("beta", "gamma")
    town.run_for(20)
    got = [entry[0] for entry in other.take() if entry[3] != b""]
    assert got == [body for body in accepted if body in set(got)], "out of order, or repeated"
    assert refused
    told = [entry for entry in one.take() if entry[3] == b""]
    assert len(got) == len(accepted) or told


def test_d16_nodes_may_change_their_numbers_among_each_other(town: Town) -> None:
    """After the master was put back from a copy, to which they came in another order."""
    master = begin(town)
    member, other = join(master, "beta", b"shop", hears=True), join(master, "alpha")
    alpha = town.houses["alpha"]
    numbers = [town.houses[name].uplink.number for name in ("beta", "gamma")]
    beta, gamma = map(alpha.uplink.mirror.get_node, numbers)
    assert beta is not None
    assert gamma is not None
    changes = [
        Change(beta, replace(beta, number=gamma.number)),
        Change(gamma, replace(gamma, number=beta.number)),
    ]
    alpha.federation._receive_changes(changes)
    assert [row["node"] for row in alpha.peers.describe()] == ["beta", "gamma"]
    alpha.federation._receive_changes([Change(new, old) for old, new in changes])
    assert [row["node"] for row in alpha.peers.describe()] == ["beta", "gamma"]
    # What stood in the table before and after leads there again.
    town.run_for(5)
    assert master.send(b"shop", b"by name") == 0
    assert master.send(member.address, b"by address") == 0
    assert other.publish(NEWS, b"news") == 0
    assert member.texts(3) == [b"by name", b"by address", b"news"]


def test_d16_who_was_on_a_node_that_has_another_number_is_gone(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The master of a bus is told, and does not wait for what that node cannot answer any more."""
    master = begin(town)
    member = join(master, "beta")
    alpha = town.houses["alpha"]
    beta = alpha.uplink.mirror.get_node(town.houses["beta"].uplink.number)
    assert beta is not None
    # It says no more.
    monkeypatch.setattr(town.houses["beta"], "settle", lambda: False)
    master.start_grant(member.address, hear())
    assert alpha.federation.awaits("beta")
    alpha.federation._receive_changes([Change(beta, replace(beta, number=9))])
    assert not alpha.federation.awaits("beta")
    assert master.notice(Event.NODE_LOST).detail == {"node": "beta", "gone": 1}


def test_d16_a_node_may_have_the_number_of_one_that_is_gone(town: Town) -> None:
    """Both are news at once, for a node that was away when the master was put back from a copy."""
    alpha = town.houses["alpha"]
    beta = alpha.uplink.mirror.get_node(town.houses["beta"].uplink.number)
    assert beta is not None
    alpha.federation._receive_changes(
        [Change(None, replace(beta, name="delta")), Change(beta, None)]
    )
    assert [row["node"] for row in alpha.peers.describe()] == ["delta", "gamma"]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_d16_what_a_node_was_before_it_joined_anew_goes_with_its_record(
    town: Town, is_replaced: bool
) -> None:
    """A revoked node that joins again may find itself in the table, by the number it had."""
    alpha = town.houses["alpha"]
    own = alpha.uplink.mirror.get_node(alpha.uplink.number)
    assert own is not None
    former = replace(own, number=9)
    alpha.federation._receive_changes([Change(None, former)])
    # So that what leads there leads nowhere else.
    assert [row["node"] for row in alpha.peers.describe()] == ["alpha", "beta", "gamma"]
    alpha.federation._receive_changes([Change(former, own if is_replaced else None)])
    assert [row["node"] for row in alpha.peers.describe()] == ["beta", "gamma"]


def test_d16_a_node_that_is_revoked_while_its_command_runs(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nobody to be answered; the other node goes on, and remembers nothing of it."""
    master = begin(town)
    hearer, other = join(master, "beta"), join(master, "gamma", b"other")
    with monkeypatch.context() as patch:
        # The command waits for the word of all nodes.
        patch.setattr(town.houses["gamma"], "settle", lambda: False)
        master.start_grant(hearer.address, hear())
        town.run_for(1)
        beta = town.houses["beta"]
        assert beta.federation._commands["alpha"].running
        assert town.master is not None
        link, now = town._next_link(), town.network.time
        town.master.receive_visitor(link, "operator", now)
        call = ClusterCall(1, ClusterOp.REVOKE, {"subject": "node/alpha"})
        town.master.receive_frame(link, cluster.encode(call), now)
        town.run_for(1)
        assert beta.uplink.mirror.get_node(1) is None
    town.run_for(5)
    assert not beta.federation._commands
    assert hearer.send(b"other", b"still here") == 0
    assert other.texts() == [b"still here"]
