"""What `afbus list` shows on a node: its own, and what the cluster's table has of other nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.cluster.test_federation import NEWS, begin, hear, join
from tests.cluster.town import Town

from afbus.proto.errors import Denied, NoBus
from afbus.proto.frames import Op
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.client import Client

PATH = b"/city"


@pytest.fixture
def town() -> Iterator[Town]:
    """Return three nodes and a master that know each other."""
    made = Town()
    yield made
    made.close()


def rows(client: Client, what: str, **more: Any) -> list[dict[str, Any]]:
    """Return the rows of a list, of all pages."""
    found: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = client.call(Op.LIST, what=what, after=after, **more)
        found += page["rows"]
        after = page["next"]
    return found


def looker(town: Town, house: str, uid: int = 0) -> Client:
    """Return a client that is on no bus, when its node knows of the bus."""
    made = town.houses[house].client(uid)
    town.until(lambda: town.houses[house].federation.is_taken(PATH))
    return made


def test_buses_of_the_cluster_are_listed_on_all_nodes(town: Town) -> None:
    """With the node of the master; what is counted is what the other lists show here."""
    begin(town).house.client().call(Op.BIND, address=_own_bus(), options={})
    for house in ("alpha", "beta"):
        look = looker(town, house)
        found = {row["path"]: row for row in rows(look, "buses")}
        assert (found["/city"]["node"], found["/city"]["master"]) == ("alpha", "town.hall")
        assert found["/city"]["addresses"] == 1
        assert found["/city"]["uid"] == (1000 if house == "alpha" else None)
        assert ("/own" in found) is (house == "alpha")
        assert rows(look, "buses", path=PATH) == [found["/city"]]
    with pytest.raises(NoBus):
        looker(town, "beta").call(Op.LIST, what="buses", path=b"/own")


def _own_bus() -> bytes:
    from afbus.proto.address import BusAddress

    return BusAddress(b"/own", b"own.hall").pack()


def test_names_and_matches_of_other_nodes_are_listed(town: Town) -> None:
    """Behind those of this node, each with its node; nothing twice."""
    master = begin(town)
    join(master, "beta", b"b.one", b"b.two")
    gamma = join(master, "gamma", b"c.one", hears=True)
    for house in ("alpha", "beta", "gamma"):
        look = looker(town, house)
        named = [
            (row["node"], row["address"], row["kind"])
            for row in rows(look, "addresses", path=PATH)
            if row["kind"] == "name"
        ]
        # Its own come first.
        assert named[0][0] == house
        assert sorted(named) == [
            ("alpha", "town.hall", "name"),
            ("beta", "b.one", "name"),
            ("beta", "b.two", "name"),
            ("gamma", "c.one", "name"),
        ]
        heard = [
            (row["node"], row["terms"])
            for row in rows(look, "matches", path=PATH)
            if row["may"] == "receive"
        ]
        assert heard == [("gamma", NEWS.format())]
        states = {
            (row["node"], tuple(row["addresses"])[-1]): row["state"]
            for row in rows(look, "endpoints", path=PATH)
        }
        assert states == {
            ("alpha", "town.hall"): "master",
            ("beta", "b.two"): "member",
            ("gamma", "c.one"): "member",
        }
        (bus,) = rows(look, "buses", path=PATH)
        assert bus["addresses"] == len(rows(look, "addresses", path=PATH))
        assert bus["matches"] == 1
        assert all("node" not in row for row in rows(look, "queues"))
    gamma.end()
    town.until(lambda: not any(row["node"] == "gamma" for row in rows(look, "matches", path=PATH)))


def test_d16_who_is_on_a_lost_node_is_shown_as_lost(town: Town) -> None:
    """Until the cluster's master gives the names away."""
    master = begin(town)
    join(master, "beta", b"b.one")
    look = looker(town, "gamma")
    town.houses["beta"].kill()

    def states() -> list[str]:
        found = rows(look, "endpoints", path=PATH)
        return [row["state"] for row in found if row["node"] == "beta"]

    town.until(lambda: states() == ["lost"])


def test_details_of_a_bus_elsewhere_are_for_few(town: Town) -> None:
    """That there is a bus is no secret; who is on it is for members, root and the agent's user."""
    master = begin(town)
    join(master, "beta", b"b.one")
    stranger = looker(town, "gamma", 4711)
    assert [row["path"] for row in rows(stranger, "buses")] == ["/city"]
    assert rows(stranger, "addresses") == []
    with pytest.raises(Denied, match="for its members, and root"):
        rows(stranger, "addresses", path=PATH)
    master_user = looker(town, "alpha", 1000)
    assert rows(master_user, "addresses", path=PATH)


@pytest.mark.parametrize("what", ["buses", "endpoints", "addresses", "matches"])
def test_lists_of_a_cluster_go_on_anywhere(town: Town, what: str) -> None:
    """From any row on the rows are those of the whole list, whichever node they are of."""
    master = begin(town)
    for number in range(3):
        member = join(master, "beta", b"b.n%d" % number, hears=True)
        master.grant(member.address, hear(Terms.of("t", number=str(number))))
        join(master, "gamma", b"c.n%d" % number)
    look = looker(town, "gamma")
    town.until(lambda: len(rows(look, "matches")) == 3 + 4)
    found = rows(look, what, path=PATH)
    assert len(found) == {"buses": 1, "endpoints": 7, "addresses": 10, "matches": 7}[what]
    for after in range(len(found) + 2):
        page = look.call(Op.LIST, what=what, path=PATH, after=after)
        assert page == {"rows": found[after:], "next": None}
