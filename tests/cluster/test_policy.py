"""The policy of the cluster on traffic and on changes: who may send where, and who may no longer.

Real masters, agents and switches on a fake clock; links in memory.
"""

from __future__ import annotations

import errno
import re
import unicodedata
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cluster.town import MASTER, PATH, Town

from afbus._datapath import Switch
from afbus.master.policy import Action, parse_policy
from afbus.node.verdict import Question
from afbus.proto.address import BusAddress, format_within
from afbus.proto.control import (
    Grant,
    GrantFlags,
    Match,
    MulticastMatch,
    MulticastSend,
    OwnedAddr,
    Wish,
)
from afbus.proto.errors import Denied
from afbus.proto.frames import Op, Result
from afbus.proto.match import Overflow
from afbus.proto.notice import Event
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.client import Client

    from afbus.proto.control import Item

NODES = ("alpha", "beta", "gamma")
NEWS = Terms.of("news")
HALL = """
[[rule]]
name = "hall"
who = ["uid/*@*"]
bus = ["/city"]
bind = true
own = ["**"]
receive = ["topic:**"]
send = ["town.hall"]
"""


def rule(name: str, **more: object) -> str:
    """Return a rule about everybody in the city."""
    lines = [
        f"{key} = {str(value).lower() if value is True else value}" for key, value in more.items()
    ]
    head = f'[[rule]]\nname = "{name}"\nwho = ["uid/*@*"]\nbus = ["/city"]\n'
    return head + "\n".join(lines).replace("'", '"') + "\n"


SHOPS = rule("shops", send=["shop.**"])
PUBLISHING = rule("publishing", send=["topic:news"])


@pytest.fixture
def town() -> Iterator[Town]:
    """Return three nodes and a master whose policy lets all join and own, and nothing else."""
    made = Town(NODES, policy=HALL)
    yield made
    made.close()


def follow(town: Town, policy: str) -> None:
    """Let the master follow another policy, and everybody what comes of that."""
    assert town.master is not None
    town.policy = policy
    town.master.set_policy(parse_policy(policy), town.network.time)
    town.settle()


def begin(town: Town) -> Client:
    """Bind the bus on alpha."""
    master = town.houses["alpha"].client()
    master.bind(MASTER, PATH)
    return master


def own(name: bytes = b"") -> Item:
    """Return the grant of a name, or of a unique address that the agent chooses."""
    return OwnedAddr(BusAddress(PATH, name) if name else BusAddress.kernel(PATH))


def join(master: Client, house: str, *names: bytes) -> Client:
    """Let somebody on a node join, with these names."""
    member = master.house.town.houses[house].client()
    member.attach(PATH)
    assert member.send(MASTER, b"let me in") == 0
    ((_, source),) = master.letters()
    (member.address,) = master.grant(source, own(), *map(own, names))
    assert member.texts() == [b"yes"]
    return member


def noted(town: Town, action: str) -> list[tuple[str, str]]:
    """Return who was refused what, as the master has written it down."""
    return [
        (one.actor, one.detail) for one in town.audit if one.action == action and not one.is_done
    ]


# --- traffic ---


@pytest.mark.parametrize("house", ["beta", "gamma"])
def test_d7_members_need_a_rule_to_send_to_each_other(
    town: Town, house: str, caplog: pytest.LogCaptureFixture
) -> None:
    """On one node and between two: what no rule allows is EPERM, and written down once."""
    master = begin(town)
    follow(town, HALL + SHOPS)
    member, shop = join(master, "beta", b"me"), join(master, house, b"shop.one", b"bank")
    assert member.send(b"shop.one", b"good day") == 0
    assert shop.texts() == [b"good day"]
    for _ in range(3):
        assert member.send(b"bank", b"x") == -errno.EPERM
    assert member.send(shop.address, b"x") == -errno.EPERM
    # Names that nobody owns lead to the master, but not past the policy (D7).
    assert member.send(b"nobody", b"x") == -errno.EPERM
    assert member.send(b"shop.none", b"is there a shop?") == 0
    assert member.send(MASTER, b"hello") == 0
    assert master.texts(2) == [b"is there a shop?", b"hello"]
    town.until(lambda: len(noted(town, "send")) >= 3)
    targets = [b"bank", shop.address, b"nobody"]
    assert [detail.split(" may not send ")[1] for _, detail in noted(town, "send")] == [
        f"{format_within(one)} on /city" for one in targets
    ]
    assert {actor for actor, _ in noted(town, "send")} == {"uid/1000@beta"}
    audited = [one for one in caplog.messages if one.startswith("audit:")]
    assert len(audited) == 3


@pytest.mark.parametrize("house", ["beta", "gamma"])
def test_d7_an_open_request_may_be_answered(town: Town, house: str) -> None:
    """A service needs no rule to answer who asks it; once for each request."""
    master = begin(town)
    follow(town, HALL + SHOPS)
    asker, shop = join(master, "beta"), join(master, house, b"shop.one")
    assert asker.send(b"shop.one", b"how much?", serial=7) == 0
    assert shop.letters() == [(b"how much?", asker.address)]
    assert shop.send(asker.address, b"buy!") == -errno.EPERM
    assert shop.send(asker.address, b"5", reply_to=7) == 0
    assert shop.send(asker.address, b"6", reply_to=7) == -errno.EPERM
    assert asker.texts() == [b"5"]


def test_d5_the_master_of_a_bus_sends_to_all(town: Town) -> None:
    """Whoever rules a bus needs no rule to speak with its members, and no one to let them in."""
    master = begin(town)
    members = [join(master, house) for house in NODES]
    for member in members:
        assert master.send(member.address, b"hello") == 0
        assert member.texts() == [b"hello"]
        assert member.send(MASTER, b"yes?") == 0
        assert member.send(members[0].address, b"x") == -errno.EPERM


def test_r11_a_name_alone_makes_no_member_whom_the_policy_keeps_out(town: Town) -> None:
    """Joining by a name needs the right to send to the master as well."""
    master = begin(town)
    follow(town, HALL.replace('send = ["town.hall"]\n', ""))
    member = town.houses["beta"].client()
    member.attach(PATH)
    assert member.send(MASTER, b"let me in") == 0
    ((_, source),) = master.letters()
    with pytest.raises(Denied, match="may not send"):
        master.grant(source, own(b"me"))
    assert [actor for actor, _ in noted(town, "send")] == ["uid/1000@beta"]
    # The claim of the name was given back.
    other = town.houses["gamma"].client()
    other.attach(PATH)
    follow(town, HALL)
    assert other.send(MASTER, b"let me in") == 0
    ((_, source),) = master.letters()
    master.grant(source, own(b"me"))


def test_d2_a_bus_of_one_host_knows_no_policy(town: Town) -> None:
    """On a node, too."""
    house = town.houses["beta"]
    master, member = house.client(), house.client()
    path = b"/home"
    master.call(Op.BIND, address=BusAddress(path, b"me").pack(), options={})
    member.attach(path)
    assert member.send(b"me", b"let me in") == 0
    ((_, source),) = master.letters()
    (address,) = master.grant(source, OwnedAddr(BusAddress.kernel(path)))
    master.grant(address, OwnedAddr(BusAddress(path, b"you")))
    assert member.send(address, b"to myself") == 0
    assert member.send(b"nobody", b"to the master") == 0


# --- changes ---


def test_d15_a_change_takes_and_gives_addresses(town: Town) -> None:
    """On every node members hear what they have lost; what is allowed again is so at once."""
    master = begin(town)
    follow(town, HALL + SHOPS)
    shop = join(master, "alpha", b"shop.one")
    members = [join(master, house) for house in NODES]
    for member in members:
        assert member.send(b"shop.one", b"good day") == 0
    assert len(shop.texts(3)) == 3
    before = town.network.time
    follow(town, HALL)
    for member in members:
        notice = member.notice()
        assert (notice.event, notice.detail) == (Event.REVOKED, {"reach": "shop.**"})
        assert member.send(b"shop.one", b"good day") == -errno.EPERM
        assert member.send(MASTER, b"what now?") == 0
    assert town.network.time - before < 1
    follow(town, HALL + SHOPS)
    for member in members:
        assert member.send(b"shop.one", b"good day") == 0
    assert len(shop.texts(3)) == 3


def test_d15_what_was_sent_before_a_change_goes(town: Town) -> None:
    """The change comes after what its subject had published while it still might."""
    master = begin(town)
    follow(town, HALL + SHOPS)
    shop, member = join(master, "alpha", b"shop.one"), join(master, "beta")
    sent = 0
    for number in range(200):
        if number == 100:
            follow(town, HALL)
        sent += member.send(b"shop.one", b"%d" % number) == 0
    assert shop.texts(sent) == [b"%d" % number for number in range(100)]


def test_d9_a_change_takes_rights_to_publish(town: Town) -> None:
    """On every node; given again, they are asked for again."""
    master = begin(town)
    follow(town, HALL + PUBLISHING)
    members = [join(master, house) for house in NODES]
    for member in members:
        master.grant(member.address, MulticastSend(PATH, NEWS))
        assert member.texts() == [b"yes"]
        assert member.publish(NEWS, b"x") == 0
    follow(town, HALL)
    for member in members:
        notice = member.notice()
        assert (notice.event, notice.detail) == (Event.REVOKED, {"send": "news"})
        assert "may not send multicasts about news" in notice.reason
        assert member.publish(NEWS, b"x") == -errno.EPERM
        with pytest.raises(Denied, match="policy"):
            master.grant(member.address, MulticastSend(PATH, NEWS))
    assert sorted({actor for actor, _ in noted(town, "send")}) == [
        f"uid/1000@{house}" for house in NODES
    ]
    follow(town, HALL + PUBLISHING)
    for member in members:
        assert member.publish(NEWS, b"x") == -errno.EPERM
        master.grant(member.address, MulticastSend(PATH, NEWS))
        assert member.publish(NEWS, b"x") == 0


def test_r11_a_change_ends_memberships(town: Town) -> None:
    """Who may not send to the master any more is put off on every node; the master stays."""
    master = begin(town)
    members = [join(master, house, b"m." + house.encode()) for house in NODES]
    follow(town, HALL.replace('"town.hall"', '"town.halls"'))
    for member in members:
        notice = member.notice()
        assert notice.event is Event.EVICTED
        assert "may not send town.hall on /city" in notice.reason
        assert member.is_cut
    assert not master.is_cut
    follow(town, HALL)
    again = join(master, "gamma", b"m.beta")
    assert again.send(MASTER, b"hello") == 0


def test_d19_a_change_takes_monitors_and_notices(town: Town) -> None:
    """With REVOKED, which names the grant; whoever else has it keeps it."""
    master = begin(town)
    follow(town, HALL + rule("watch", monitor=True))
    member = join(master, "beta")
    master.grant(member.address, Grant(GrantFlags.MONITOR | GrantFlags.NOTICES))
    follow(town, HALL)
    notice = member.notice()
    assert (notice.event, notice.detail) == (Event.REVOKED, {"grant": "MONITOR"})
    join(master, "gamma")
    assert member.notice().event is Event.JOINED
    follow(town, HALL.replace('receive = ["topic:**"]\n', ""))
    notice = member.notice()
    assert (notice.event, notice.detail) == (Event.REVOKED, {"grant": "NOTICES"})
    join(master, "gamma")
    assert not [one for one in member.take() if not one[3]]


def test_d9_a_change_takes_subscriptions(town: Town) -> None:
    """The notice names the match."""
    master = begin(town)
    member = join(master, "beta")
    match = Match(PATH, NEWS, Overflow.GAP, 0)
    master.grant(member.address, MulticastMatch(match))
    follow(town, HALL.replace('receive = ["topic:**"]\n', ""))
    notice = member.notice()
    assert (notice.event, notice.detail) == (Event.REVOKED, {"match": "news"})


def test_d5_an_answer_of_a_former_policy_grants_nothing(town: Town) -> None:
    """Asked before a change and granted behind it: it is asked again."""
    master = begin(town)
    follow(town, HALL + PUBLISHING)
    member = join(master, "beta")
    federation = town.houses["beta"].federation
    endpoint = federation._registry.find_endpoint(1)
    assert endpoint is not None
    wish = Wish(PATH, NEWS.pack(), int(Overflow.GAP), 0)
    steps = federation.register(endpoint, [MulticastSend(PATH, NEWS), wish])
    next(steps)
    allowed = {"is_allowed": True, "rule": "publishing", "reason": "", "reach": [], "policy": 1}
    steps.send(Result(1, value=allowed))
    # The subscription is on its way when the policy changes.
    follow(town, HALL)
    steps.send(Result(2))
    refused = {**allowed, "is_allowed": False, "reason": "no rule"}
    with pytest.raises(Denied, match="no rule"):
        steps.send(Result(3, value=refused))
    assert member.publish(NEWS, b"x") == -errno.EPERM


# --- without the master ---


def test_d16_the_same_decisions_without_the_master(town: Town) -> None:
    """While it is away members send where they might, and who joins by an old answer does, too."""
    master = begin(town)
    follow(town, HALL + SHOPS)
    shop, member = join(master, "alpha", b"shop.one", b"bank"), join(master, "beta")
    town.kill_master()
    town.run_for(10)
    late = join(master, "beta")
    for one in (member, late):
        assert one.send(b"shop.one", b"good day") == 0
        assert one.send(b"bank", b"x") == -errno.EPERM
    assert shop.texts(2) == [b"good day"] * 2
    # It comes back with another policy.
    town.policy = HALL
    town.start_master()
    town.until(lambda: all(house.uplink.is_here for house in town.houses.values()))
    town.until(lambda: member.send(b"shop.one", b"good day") == -errno.EPERM)
    assert late.send(b"shop.one", b"good day") == -errno.EPERM
    assert member.send(MASTER, b"hello") == late.send(MASTER, b"hello") == 0


def test_d16_the_same_decisions_in_the_next_life_of_an_agent(town: Town) -> None:
    """Where a member may send stands in the journal: nobody need be asked for that."""
    master = begin(town)
    follow(town, HALL + SHOPS)
    member, shop = join(master, "beta"), join(master, "beta", b"shop.one", b"bank")
    house = town.houses["beta"]
    town.kill_master()
    house.restart()
    for one in (member, shop):
        one.resume()
    assert member.send(b"shop.one", b"good day") == 0
    assert shop.texts() == [b"good day"]
    assert member.send(b"bank", b"x") == -errno.EPERM
    # The policy has changed meanwhile.
    town.policy = HALL
    town.start_master()
    town.until(lambda: member.send(b"shop.one", b"x") == -errno.EPERM)


def test_d16_a_review_that_nobody_answers_is_made_later(town: Town) -> None:
    """The master dies between the change and its answers: nobody loses anything meanwhile."""
    master = begin(town)
    follow(town, HALL + SHOPS)
    member = join(master, "beta")
    join(master, "alpha", b"shop.one")
    house = town.houses["beta"]
    standing = house.federation.standing
    town.kill_master()
    town.run_for(10)
    house.uplink._verdicts.clear()
    standing.review(list(house.federation._buses.values()))
    town.run_for(1)
    assert member.send(b"shop.one", b"x") == 0
    assert standing._is_due
    town.start_master()
    town.until(lambda: not standing._is_due)
    assert house.uplink.find_verdict(Question(1, "send", PATH, MASTER), town.network.time)
    assert member.send(b"shop.one", b"x") == 0


# --- the same patterns on both sides ---

_WORDS = st.text(
    st.characters(exclude_categories=("Cs", "Cn", "Co")) | st.sampled_from("ab.*%: 0x"), min_size=1
)


@given(
    st.lists(st.text(st.sampled_from("ab.*0x%é"), min_size=1, max_size=12), min_size=1, max_size=4),
    st.lists(_WORDS.map(str.encode) | st.binary(min_size=1, max_size=12), min_size=1, max_size=8),
)
def test_d10_the_switch_reads_patterns_as_the_policy_does(
    patterns: list[str], addresses: list[bytes]
) -> None:
    """What the master would say of each address is what the switch does with it."""
    patterns = [
        ".".join(one if one == "**" else re.sub(r"\*+", "*", one) for one in pattern.split("."))
        for pattern in patterns
    ]
    listed = ", ".join(f'"{one}"' for one in patterns)
    policy = parse_policy(
        f'[[rule]]\nname = "r"\nwho = ["principal/a"]\nbus = ["/b"]\nsend = [{listed}]'
    )
    reach = policy.get_reach("principal/a", b"/b")
    switch = Switch()
    try:
        switch.add_endpoint(1, 0, 0, 0, 0, b"")
        switch.set_reach(1, reach)
        for address in (one[:256] for one in addresses):
            if _is_of_all_versions(address):
                decided = policy.decide(Action.SEND, "principal/a", b"/b", address)
                assert switch.may_send_to(1, address) is decided.is_allowed, address
    finally:
        switch.close()


def _is_of_all_versions(address: bytes) -> bool:
    """Tell whether all characters are such as Unicode has had for long."""
    text = address.decode(errors="surrogateescape")
    return all(unicodedata.category(one) != "Cn" for one in text)
