"""An agent of a cluster begins anew: what its endpoints have stays theirs, for all to see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.cluster.town import MASTER, PATH, Town

from afbus.node.uplink_effect import Changed
from afbus.proto.address import BusAddress
from afbus.proto.control import Match, MulticastMatch, MulticastSend, OwnedAddr
from afbus.proto.match import Overflow
from afbus.proto.names import NO_FLAGS
from afbus.proto.record import BusRecord, MatchRecord, OwnerRecord, lease_key
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.client import Client

    from afbus.node.uplink_effect import UplinkEffect
    from afbus.proto.mirror import Change

NEWS = Terms.of("news")


@pytest.fixture
def town() -> Iterator[Town]:
    """Three nodes and a master that know each other."""
    made = Town()
    yield made
    made.close()


def join(master: Client, house: str, name: bytes) -> Client:
    """Let a client of a node join, own a name, and hear and say the news."""
    town = master.house.town
    member = town.houses[house].client()
    town.until(lambda: town.houses[house].federation.is_taken(PATH))
    member.attach(PATH)
    assert member.send(MASTER, b"let me in") == 0
    ((_, source),) = master.letters()
    owned = [OwnedAddr(BusAddress.kernel(PATH)), OwnedAddr(BusAddress(PATH, name))]
    heard = MulticastMatch(Match(PATH, NEWS, Overflow.GAP, 0))
    (member.address,) = master.grant(source, *owned, heard, MulticastSend(PATH, NEWS))
    member.wait()
    return member


def watch(town: Town, house: str) -> list[Change]:
    """Return what changes in the table from now on, of what endpoints have."""
    seen: list[Change] = []
    federation = town.houses[house].federation
    follow = federation.receive_uplink

    def receive(effect: UplinkEffect) -> None:
        if isinstance(effect, Changed):
            kinds = (BusRecord, MatchRecord, OwnerRecord)
            seen.extend(one for one in effect.changes if isinstance(one.new or one.old, kinds))
        follow(effect)

    federation.receive_uplink = receive  # type: ignore[method-assign]  # listens on the way
    return seen


def want_name(town: Town, house: str, name: bytes) -> None:
    """Let somebody on a node wait for a name."""
    uplink, now = town.houses[house].uplink, town.network.time
    uplink.enter(77, 1000, now)
    uplink.own(77, PATH, name, NO_FLAGS, now)
    town.settle()


@pytest.mark.parametrize("is_master_away", [False, True])
def test_d16_d4_agent_that_begins_anew_keeps_what_it_had(town: Town, is_master_away: bool) -> None:
    """Its names, matches and addresses are nobody else's for a moment, though others wait."""
    master = town.houses["alpha"].client()
    master.bind(MASTER, PATH)
    member, other = join(master, "beta", b"one"), join(master, "gamma", b"two")
    want_name(town, "gamma", b"one")
    changes = watch(town, "gamma")
    if is_master_away:
        town.kill_master()
    beta = town.houses["beta"]
    beta.restart()
    member.resume()
    if is_master_away:
        # Longer than anybody waits for it.
        town.run_for(20)
        town.start_master()
    town.until(lambda: all(house.uplink.is_here for house in town.houses.values()))
    town.run_for(1)
    assert changes == []
    assert other.send(b"one", b"hello") == 0
    assert b"hello" in member.texts(1)
    assert member.publish(NEWS, b"news") == 0
    assert b"news" in other.texts(1)
    assert other.publish(NEWS, b"more") == 0
    assert member.texts(2) == [b"news", b"more"]


def test_d16_masters_agent_begins_anew_and_its_bus_stays(town: Town) -> None:
    """The bus has its master all the time: nobody else can have it, and nobody hears of it."""
    master = town.houses["alpha"].client()
    master.bind(MASTER, PATH)
    other = join(master, "gamma", b"two")
    changes = watch(town, "gamma")
    town.houses["alpha"].restart()
    master.resume()
    town.until(lambda: all(house.uplink.is_here for house in town.houses.values()))
    # Until others have noticed that the links to it are dead.
    town.run_for(15)
    assert changes == []
    assert other.send(MASTER, b"hello") == 0
    assert b"hello" in master.texts(1)
    master.grant(other.address, OwnedAddr(BusAddress(PATH, b"three")))


def test_d3_addresses_of_a_lost_block_are_nobodys(town: Town) -> None:
    """A master that has lost its memory of a lease: whoever has such an address is cut off."""
    master = town.houses["alpha"].client()
    master.bind(MASTER, PATH)
    member, other = join(master, "beta", b"one"), join(master, "gamma", b"two")
    town.kill_master()
    block = int(member.address.split(b".")[0])
    del town.disk[lease_key(block)]
    town.start_master()
    town.until(lambda: member.is_cut)
    assert member.closed is not None
    assert "not this node's any more" in member.closed.text
    assert not other.is_cut
    again = join(master, "beta", b"one")
    assert not again.address.startswith(b"%d." % block)
    assert other.send(again.address, b"hello") == 0
    assert b"hello" in again.texts(1)
