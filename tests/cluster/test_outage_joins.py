"""What comes while the cluster's master is away: who may join, and hear and say what (D16)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.cluster.test_federation import NEWS, begin, hear, join, own
from tests.cluster.town import MASTER, PATH, Town
from tests.master.world import EVERYTHING

from afbus.proto.address import BusAddress
from afbus.proto.control import Grant, GrantFlags, MulticastSend, OwnedAddr
from afbus.proto.errors import AddressInUse, CloseCode, Denied, MasterLost
from afbus.proto.frames import Op
from afbus.proto.notice import Event
from afbus.proto.operation import ClusterOp
from afbus.proto.record import split_unique
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.client import Client


@pytest.fixture
def town() -> Iterator[Town]:
    """Return three nodes and a master that know each other."""
    made = Town()
    yield made
    made.close()


def lose_master(town: Town) -> None:
    """Kill the cluster's master, and let all nodes know that."""
    town.kill_master()
    town.run_for(3)
    assert all(one.uplink.describe(0)["master"] == "lost" for one in town.houses.values())


def find_master(town: Town) -> None:
    """Begin another life of the master, and wait until all nodes have stated what they have."""
    town.start_master()
    town.until(lambda: all(house.uplink.is_here for house in town.houses.values()))
    town.until(lambda: all(row["state"] == "live" for row in town.nodes()))
    town.run_for(1)


def ask(master: Client, house: str, uid: int = 1000) -> tuple[Client, bytes]:
    """Let a client of a node ask to join; return it, and where it is answered."""
    made = master.house.town.houses[house].client(uid)
    made.attach(PATH)
    assert made.send(MASTER, b"let me in") == 0
    ((body, source),) = master.letters()
    assert body == b"let me in"
    return made, source


def counts(town: Town) -> dict[str, int]:
    """Return how many endpoints the master knows of each node."""
    return {row["node"]: row["endpoints"] for row in town.nodes()}


def test_case22_joins_go_on_without_the_cluster_master(town: Town) -> None:
    """Who may join, as the master has said before, joins with an address of the node's block."""
    master = begin(town)
    old = join(master, "beta", hears=True)
    other = join(master, "gamma", hears=True)
    lose_master(town)
    new, near = join(master, "beta"), join(master, "gamma")
    assert split_unique(new.address) is not None
    assert new.address.split(b".")[0] == old.address.split(b".")[0]
    assert len({old.address, new.address, other.address, near.address}) == 4
    assert new.send(near.address, b"hello") == 0
    assert near.letters() == [(b"hello", new.address)]
    assert new.publish(NEWS, b"news") == 0
    assert old.texts() == other.texts() == [b"news"]
    assert other.send(new.address, b"and you") == 0
    assert new.texts() == [b"and you"]
    find_master(town)
    assert counts(town) == {"alpha": 1, "beta": 2, "gamma": 2}
    assert new.closed is near.closed is None
    master.grant(new.address, own(b"shop"), hear())
    assert near.send(b"shop", b"open?") == 0
    assert b"open?" in [body for body, _ in new.letters(2)]


def test_d16_who_is_gone_again_leaves_nothing_with_the_master(town: Town) -> None:
    """A member that came and went while the master was away is not told to it."""
    master = begin(town)
    join(master, "beta")
    lose_master(town)
    join(master, "beta").end()
    find_master(town)
    assert counts(town) == {"alpha": 1, "beta": 1, "gamma": 0}


def test_d16_what_a_node_hears_others_on_it_may_hear(town: Town) -> None:
    """All nodes know what this one wants: nobody must be told that one more wants it there."""
    master = begin(town)
    old, speaker = join(master, "beta", hears=True), join(master, "gamma")
    lose_master(town)
    new = join(master, "beta", hears=True)
    assert speaker.publish(NEWS, b"one") == 0
    assert new.texts() == old.texts() == [b"one"]
    old.end()
    assert speaker.publish(NEWS, b"two") == 0
    assert new.texts() == [b"two"]
    find_master(town)
    assert speaker.publish(NEWS, b"three") == 0
    assert new.texts() == [b"three"]


def test_d16_a_program_that_is_restarted_hears_again(town: Town) -> None:
    """What the only one wanted who is gone now, the table still has."""
    master = begin(town)
    old, speaker = join(master, "beta", hears=True), join(master, "gamma")
    lose_master(town)
    old.end()
    new = join(master, "beta", hears=True)
    assert speaker.publish(NEWS, b"news") == 0
    assert new.texts() == [b"news"]
    find_master(town)
    assert speaker.publish(NEWS, b"more") == 0
    assert new.texts() == [b"more"]


def test_d16_what_others_must_hear_of_needs_the_master(town: Town) -> None:
    """Names and new subscriptions fail, and so do rights that nobody has asked for before."""
    master = begin(town)
    join(master, "beta", b"shop")
    lose_master(town)
    new = join(master, "beta")
    for item in (
        own(b"till"),
        own(b"shop"),
        hear(),
        hear(Terms.of("weather")),
        MulticastSend(PATH, Terms.of("weather")),
        Grant(GrantFlags.NOTICES),
        Grant(GrantFlags.MONITOR),
    ):
        with pytest.raises((MasterLost, AddressInUse)):
            master.grant(new.address, item)
    late = town.houses["gamma"].client()
    refusal = late.refused(Op.CHALLENGE)
    assert isinstance(refusal, MasterLost)
    _, source = ask(master, "gamma")
    with pytest.raises(MasterLost, match="the cluster's master is away"):
        master.grant(source, own())
    _, source = ask(master, "beta", uid=1001)
    with pytest.raises(MasterLost, match="the cluster's master is away"):
        master.grant(source, own())
    find_master(town)
    master.grant(new.address, own(b"till"), hear(), Grant(GrantFlags.NOTICES))


def test_d16_what_was_refused_before_stays_refused(town: Town) -> None:
    """Old answers hold as they are: a no is a no."""
    master = begin(town)
    assert town.master is not None
    town.policy = EVERYTHING.replace('"uid/*@*"', '"uid/0@*", "uid/1000@*"')
    from afbus.master.policy import parse_policy

    town.master.set_policy(parse_policy(town.policy), town.network.time)
    town.settle()
    _, source = ask(master, "beta", uid=1001)
    with pytest.raises(Denied):
        master.grant(source, own())
    lose_master(town)
    _, source = ask(master, "beta", uid=1001)
    with pytest.raises(Denied):
        master.grant(source, own())


def test_d16_answers_are_too_old_after_a_day(town: Town) -> None:
    """A master that is away for longer than answers hold is asked again before anybody joins."""
    master = begin(town)
    join(master, "beta")
    lose_master(town)
    _, source = ask(master, "beta")
    town.houses["beta"].uplink._away_since -= 86_400
    with pytest.raises(MasterLost):
        master.grant(source, own())


def test_d16_a_node_that_is_out_lets_nobody_in(town: Town) -> None:
    """A node that was revoked has heard that; what it was told before holds no more."""
    begin(town)
    local = town.houses["beta"].client()
    local.bind(b"beta.hall", b"/beta")
    first = town.houses["beta"].client()
    first.attach(b"/beta")
    grant = OwnedAddr(BusAddress.kernel(b"/beta"))
    for is_out in (False, True):
        if is_out:
            town.order(ClusterOp.REVOKE, subject="node/beta", reason="a drill")
            town.run_for(3)
        one = town.houses["beta"].client()
        one.attach(b"/beta")
        assert one.send(b"beta.hall", b"let me in") == 0
        ((_, source),) = local.letters()
        if is_out:
            with pytest.raises((MasterLost, Denied), match="revoked"):
                local.grant(source, grant)
        else:
            local.grant(source, grant)


# --- when the master is back ---


def test_d16_who_may_not_be_there_any_more_is_put_off(town: Town) -> None:
    """The master is back with another policy: what it does not allow, and was done, is undone."""
    master = begin(town)
    join(master, "beta")
    former = join(master, "gamma")
    lose_master(town)
    new, speaker = join(master, "beta"), join(master, "gamma")
    town.policy = EVERYTHING.replace('send = ["**", "topic:**"', 'send = ["**", "topic:other"')
    town.policy += EVERYTHING.replace('"all"', '"beta"').replace(
        'who = ["principal/*", "uid/*@*"]', 'who = ["uid/*@beta"]'
    )
    find_master(town)
    assert new.closed is None
    for one in (speaker, former):
        notice = one.notice(Event.REVOKED)
        assert dict(notice.detail) == {"send": NEWS.format()}
        assert one.closed is None
    lose_master(town)
    late = join(master, "beta")
    town.policy = EVERYTHING.replace('send = ["**"', 'send = ["other"')
    find_master(town)
    put_off = (late, new, speaker, former)
    town.until(lambda: all(one.closed is not None for one in put_off))
    for one in put_off:
        assert one.closed is not None
        assert one.closed.code is CloseCode.EVICTED
        assert "policy" in one.closed.text


def test_d16_nobody_keeps_an_address_of_a_block_that_is_lost(town: Town) -> None:
    """A master from an old copy does not know the node's block: its members are put off."""
    master = begin(town)
    copy = dict(town.disk)
    town.start("delta")
    town.until(lambda: town.houses["delta"].uplink.is_here)
    town.until(lambda: town.spares.get("delta") is not None)
    join(master, "delta")
    lose_master(town)
    new = join(master, "delta")
    town.disk = copy
    find_master(town)
    town.until(lambda: new.closed is not None)
    again = join(master, "delta")
    assert again.address.split(b".")[0] != new.address.split(b".")[0]


def test_d16_a_node_that_was_away_too_long_loses_names_and_keeps_members(town: Town) -> None:
    """The master gave its names to others meanwhile; its addresses are its own for ever (D3)."""
    master = begin(town)
    old = join(master, "beta", b"shop", hears=True)
    speaker = join(master, "gamma")
    beta = town.houses["beta"]
    beta.is_cut_off = True
    beta.lose_line()
    town.run_for(130)
    new = join(master, "beta", hears=True)
    master.grant(speaker.address, own(b"shop"))
    beta.is_cut_off = False
    town.until(lambda: beta.uplink.is_here)
    assert old.notice(Event.REVOKED).subject == (b"shop",)
    town.run_for(1)
    assert new.closed is old.closed is None
    assert speaker.publish(NEWS, b"news") == 0
    assert new.texts() == [b"news"]
    assert old.send(b"shop", b"who are you") == 0
    assert (b"who are you", old.address) in speaker.letters(2)


# --- agents that begin anew meanwhile ---


def test_d16_an_agent_that_began_anew_lets_nobody_in(town: Town) -> None:
    """Without a table it knows neither answers nor addresses; the error says so."""
    master = begin(town)
    member = join(master, "alpha")
    lose_master(town)
    alpha = town.houses["alpha"]
    for _ in range(2):
        alpha.restart()
        master.resume()
        member.resume()
        town.run_for(3)
        assert member.send(MASTER, b"still here") == 0
        assert master.texts() == [b"still here"]
        new = alpha.client()
        new.attach(PATH)
        assert new.send(MASTER, b"let me in") == 0
        ((_, source),) = master.letters()
        with pytest.raises(MasterLost):
            master.grant(source, own())
        new.end()
    find_master(town)
    join(master, "alpha")
