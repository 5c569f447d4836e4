"""A cluster when something fails: what is kept, what is told, and what is nobody's any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.cluster.test_federation import begin, join, own
from tests.cluster.town import MASTER, PATH, Town

from afbus.link.reason import Reason
from afbus.node.endpoint import EndpointId
from afbus.proto import control
from afbus.proto.address import BusAddress
from afbus.proto.control import Grant, GrantFlags, Match, MulticastMatch
from afbus.proto.errors import AddressInUse, MasterLost, NodeLost, NoSuchEndpoint
from afbus.proto.frames import Op
from afbus.proto.notice import Event, Notice
from afbus.proto.operation import ClusterOp
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


def notice_of(client: Client, event: Event) -> Notice:
    """Return the next notice, which is of this event."""
    found = client.notice()
    assert found.event is event
    return found


def state_of(client: Client) -> dict[str, object]:
    """Return what an endpoint can read of the cluster."""
    found = client.call(Op.OPTION_GET, level=control.BUS_SOCKET, name=control.SO_BUS_STATE)
    return {key: found[key] for key in ("cluster", "lost_nodes")}


# --- nodes that begin anew ---


def test_d21_nothing_is_sent_to_a_life_that_is_over(town: Town) -> None:
    """That an agent has begun anew says the table: links to what it was are left at once."""
    master = begin(town)
    one, other = join(master, "beta"), join(master, "gamma", b"other")
    assert one.send(b"other", b"before") == 0
    assert other.texts() == [b"before"]
    town.run_for(1)
    house = town.houses["gamma"]
    house.restart()
    town.until(lambda: house.uplink.is_here)
    other.resume()
    assert one.send(b"other", b"behind") == 0
    assert other.texts() == [b"behind"]
    assert one.take() == [], "nothing is unknown"


def test_d5_a_command_outlives_its_link(town: Town) -> None:
    """A node that goes down in good order while a command is under way is asked again later."""
    master = begin(town)
    member = join(master, "beta", b"shop")
    beta = town.houses["beta"]
    beta.is_cut_off = True
    beta.lose_line()
    topic = Terms.of("late")
    serial = master.start_grant(member.address, MulticastMatch(Match(PATH, topic)))
    alpha, number = town.houses["alpha"].switch, beta.uplink.number
    town.until(lambda: alpha.trunk_is_idle(number))
    for link in beta.carrier.links:
        link.close(Reason.GOING_DOWN, "the node goes down")
    town.run_for(0.5)
    assert serial not in master.results
    beta.restart()
    member.resume()
    beta.is_cut_off = False
    town.until(lambda: serial in master.results)
    assert master.results[serial].is_ok


def test_d21_who_was_about_to_join_is_answered_by_the_next_life(town: Town) -> None:
    """Its agent began anew before it was a member: others know its node by its address, as before.

    Else its messages would be taken for forged ones on the other node, and nobody would hear them.
    """
    master = begin(town)
    join(master, "beta")
    early = town.houses["beta"].client()
    early.attach(PATH)
    town.run_for(1)
    house = town.houses["beta"]
    house.restart()
    early.resume()
    house.is_cut_off = True
    late = house.client()
    late.attach(PATH)
    house.is_cut_off = False
    town.until(lambda: house.uplink.is_here)
    for one in (early, late):
        assert one.send(MASTER, b"let me in") == 0
        ((body, source),) = master.letters()
        assert body == b"let me in"
        assert source.startswith(b"@%d." % house.uplink.block)
        (one.address,) = master.grant(source, own())
        assert one.send(MASTER, b"thanks") == 0
        assert master.letters() == [(b"thanks", one.address)]


# --- what one thing must not do to another ---


def test_matches_of_nodes_and_endpoints_bear_different_numbers(town: Town) -> None:
    """What endpoints of a node want, and what other nodes want, meet in one index of the switch."""
    master = begin(town)
    near = join(master, "alpha")
    topics = [Terms.of(f"t{number}") for number in range(5)]
    for house in ("beta", "gamma"):
        away = join(master, house)
        for topic in topics:
            master.grant(away.address, MulticastMatch(Match(PATH, topic)))
            master.grant(near.address, MulticastMatch(Match(PATH, topic)))


def test_a_failed_bind_leaves_nothing_behind(town: Town) -> None:
    """Who could not bind, and goes, is known to the cluster's master no more."""
    begin(town)
    late = town.houses["beta"].client()
    address = BusAddress(PATH, MASTER).pack()
    refusal = late.refused(Op.BIND, address=address, options={"scope": "cluster"})
    assert isinstance(refusal, AddressInUse)
    late.end()
    town.run_for(1)
    assert town.houses["beta"].uplink.describe(0)["claims"] == 0
    assert town.master is not None
    status = {row["node"]: row["endpoints"] for row in town.nodes()}
    assert status == {"alpha": 1, "beta": 0, "gamma": 0}


def test_d5_a_command_is_not_answered_by_what_came_of_a_former_one(town: Town) -> None:
    """After its node began anew a master's commands are carried out, though numbers came before."""
    former = begin(town)
    member = join(former, "beta", b"shop")
    town.houses["alpha"].kill()
    # It hears nothing of the new life from the cluster's master.
    beta = town.houses["beta"]
    beta.is_cut_off = True
    beta.lose_line()
    town.start("alpha")
    beta.is_cut_off = False
    master = begin(town)
    for count in range(3):
        topic = Terms.of(f"t{count}")
        master.grant(member.address, MulticastMatch(Match(PATH, topic)))
        number = member.welcome.endpoint if member.welcome else 0
        matches = beta.core._registry.endpoints[EndpointId(number)].matches
        assert topic.pack() in matches


def test_d16_who_waits_for_a_node_that_is_revoked_is_told(town: Town) -> None:
    """A command under way to it is refused; the master of the bus does not wait for ever."""
    master = begin(town)
    member = join(master, "beta")
    town.cut("alpha", "beta")
    serial = master.start_grant(member.address, own(b"shop"))
    assert serial not in master.results
    town.order(ClusterOp.REVOKE, subject="node/beta", reason="a drill")
    town.until(lambda: serial in master.results)
    assert isinstance(master.results[serial].to_error(), NoSuchEndpoint)


def test_d16_all_on_a_bus_hear_that_the_cluster_master_is_lost_and_back(town: Town) -> None:
    """Joined or not, once each; who comes meanwhile can read how it is."""
    master = begin(town)
    member = join(master, "beta")
    stranger = town.houses["gamma"].client()
    stranger.attach(PATH)
    elsewhere = town.houses["gamma"].client()
    elsewhere.bind(b"other.hall", b"/other")
    assert state_of(member) == {"cluster": "here", "lost_nodes": []}
    town.kill_master()
    town.run_for(1)
    assert state_of(member)["cluster"] == "away"
    assert member.take() == [], "it may be back soon"
    assert notice_of(master, Event.JOINED).subject == (member.address,)
    town.run_for(2)
    for one in (master, member, stranger, elsewhere):
        notice = one.notice()
        assert (notice.event, dict(notice.detail)) == (Event.CLUSTER_LOST, {"cluster": "test"})
        assert state_of(one)["cluster"] == "lost"
    late = town.houses["gamma"].client()
    late.attach(PATH)
    assert state_of(late)["cluster"] == "lost"
    town.start_master()
    for one in (master, member, stranger, elsewhere, late):
        assert one.notice().event is Event.CLUSTER_BACK
        assert state_of(one)["cluster"] == "here"
    town.run_for(5)
    assert member.take() == late.take() == []


def test_d16_what_is_refused_comes_behind_the_notice(town: Town) -> None:
    """Who waits for the cluster's master when it is lost knows why it was refused."""
    master = begin(town)
    town.kill_master()
    serial = master.start(
        Op.CONTROL, dst=MASTER, items=[list(control.encode(own(b"x"))[1:])], body=b""
    )
    town.until(lambda: serial in master.results)
    assert isinstance(master.results[serial].to_error(), MasterLost)
    assert master.notice().event is Event.CLUSTER_LOST


def test_d16_who_cannot_join_without_the_cluster_master_is_told(town: Town) -> None:
    """A refusal gives nothing, so it needs nobody's word and comes at once."""
    master = begin(town)
    stranger = town.houses["beta"].client()
    stranger.attach(PATH)
    assert stranger.send(MASTER, b"let me in") == 0
    ((_, source),) = master.letters()
    town.kill_master()
    town.run_for(3)
    with pytest.raises(MasterLost):
        master.grant(source, own())
    assert master.grant(source, body=b"not now") == []
    assert stranger.letters() == [(b"not now", MASTER)]


def test_d16_watchers_hear_of_a_lost_node_within_13_s(town: Town) -> None:
    """With a link to it, and without: then the cluster's master says that it misses the node."""
    master = begin(town)
    join(master, "beta")
    watcher = join(master, "gamma")
    master.grant(watcher.address, Grant(GrantFlags.NOTICES))
    town.run_for(5)
    links = {row["node"]: row["link"] for row in town.houses["gamma"].peers.describe()}
    assert links == {"alpha": "open", "beta": "none"}
    master.take()
    watcher.take()
    town.houses["beta"].kill()
    town.run_for(9.5)
    for one in (master, watcher):
        assert one.house.peers.get_lost() == []
    town.run_for(3.5)
    for one in (master, watcher):
        assert one.house.peers.get_lost() == ["beta"]
        assert one.notice().detail["node"] == "beta"
        assert state_of(one)["lost_nodes"] == ["beta"]
    town.start("beta")
    for one in (master, watcher):
        assert one.notice().event is Event.NODE_BACK


def test_d16_commands_for_a_lost_node_are_refused_at_once(town: Town) -> None:
    """Nobody waits for a node that nobody can reach; when it is back commands reach it again."""
    master = begin(town)
    member, other = join(master, "beta"), join(master, "gamma")
    town.cut("alpha", "beta")
    waits = master.start_grant(member.address, own(b"shop"))
    town.until(lambda: waits in master.results)
    assert isinstance(master.results[waits].to_error(), NodeLost)
    assert state_of(master)["lost_nodes"] == ["beta"]
    begun_at = town.network.time
    refused = master.start_grant(member.address, own(b"till"))
    assert isinstance(master.results[refused].to_error(), NodeLost)
    assert town.network.time == begun_at
    master.grant(other.address, own(b"office"))
    town.heal("alpha", "beta")
    town.until(lambda: not state_of(master)["lost_nodes"])
    master.grant(member.address, own(b"till"))
    assert other.send(b"till", b"hello") == 0
    assert member.texts(2) == [b"yes", b"hello"]
