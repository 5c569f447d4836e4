"""What a bus's master believes, and what the cluster's master has taken meanwhile (D3, D4, D16)."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
from tests.cluster.hall import Hall, Person, until
from tests.cluster.test_federation import NEWS
from tests.cluster.town import PATH, Town
from tests.master.world import EVERYTHING

from afbus.master.policy import parse_policy
from afbus.node.endpoint import EndpointId
from afbus.proto.address import BusAddress
from afbus.proto.control import RevokeAddr, RevokeMatch, RevokeSend
from afbus.proto.errors import MasterLost
from afbus.proto.names import NO_FLAGS, NameFlags, NameOutcome
from afbus.proto.notice import Event
from afbus.proto.operation import ClusterOp
from afbus.proto.request import Own, Publish, Release, Subscribe, Unsubscribe
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from afbus.proto.errors import BusError


@pytest.fixture
def town() -> Iterator[Town]:
    """Return three nodes and a master that know each other."""
    made = Town()
    yield made
    made.close()


@pytest.fixture
def hall(town: Town) -> Hall:
    """Return the master of the bus, on alpha."""
    made = Hall(town.houses["alpha"])
    town.until(lambda: all(one.federation.is_taken(PATH) for one in town.houses.values()))
    return made


def wait(hall: Hall, *people: Person, holds: Callable[[], object]) -> None:
    """Let time pass until something holds."""
    until(hall.client.house.town, [hall], list(people), holds)


def follow(town: Town, policy: str) -> None:
    """Have another policy."""
    assert town.master is not None
    town.policy = policy
    town.master.set_policy(parse_policy(policy), town.network.time)
    town.settle()


def test_d4_names_pass_from_node_to_node(town: Town, hall: Hall) -> None:
    """As on one host: by releasing it, by death, and to who waits for it, in their order."""
    one, two, three = (Person(hall, town.houses[name]) for name in ("beta", "gamma", "beta"))
    assert one.own(b"shop") is NameOutcome.PRIMARY_OWNER
    assert two.own(b"shop") is NameOutcome.IN_QUEUE
    assert three.own(b"shop") is NameOutcome.IN_QUEUE
    assert one.ask(Release(b"shop")).is_ok
    wait(hall, two, holds=lambda: b"shop" in two.owned)
    two.client.end()
    wait(hall, three, holds=lambda: b"shop" in three.owned)
    wait(hall, three, holds=lambda: hall.is_idle)
    assert hall.names == {b"shop": three.address}
    assert one.own(b"shop") is NameOutcome.IN_QUEUE
    assert one.client.send(b"shop", b"hello") == 0
    wait(hall, three, holds=lambda: three.texts == [b"hello"])


def test_d16_names_of_a_revoked_node_pass_on(town: Town, hall: Hall) -> None:
    """Who waits for them gets them, and of its members nothing is left."""
    gone, heir = Person(hall, town.houses["beta"]), Person(hall, town.houses["gamma"])
    assert gone.own(b"shop") is NameOutcome.PRIMARY_OWNER
    assert heir.own(b"shop") is NameOutcome.IN_QUEUE
    town.order(ClusterOp.REVOKE, subject="node/beta", reason="a drill")
    wait(hall, heir, holds=lambda: b"shop" in heir.owned)
    assert [one.address.address for one in hall.authority.members()] == [heir.address]
    (lost,) = [one for one in hall.notices if one.event is Event.NODE_LOST]
    assert dict(lost.detail) == {"node": "beta", "gone": 1}


def test_d16_names_of_a_node_that_is_lost_for_long_pass_on(town: Town, hall: Hall) -> None:
    """After two minutes; who had them hears of it when its node is back, and may wait for them."""
    gone, heir = Person(hall, town.houses["beta"]), Person(hall, town.houses["gamma"])
    assert gone.own(b"shop") is NameOutcome.PRIMARY_OWNER
    assert heir.own(b"shop") is NameOutcome.IN_QUEUE
    beta = town.houses["beta"]
    beta.is_cut_off = True
    beta.lose_line()
    wait(hall, heir, holds=lambda: town.network.time > 100)
    assert b"shop" not in heir.owned
    wait(hall, heir, holds=lambda: b"shop" in heir.owned)
    beta.is_cut_off = False
    wait(hall, gone, holds=lambda: [one for one in gone.notices if one.event is Event.REVOKED])
    assert gone.own(b"shop") is NameOutcome.IN_QUEUE
    assert heir.ask(Release(b"shop")).is_ok
    wait(hall, gone, holds=lambda: b"shop" in gone.owned)


def test_d4_d16_a_name_passes_on_when_the_cluster_master_is_back(town: Town, hall: Hall) -> None:
    """Its owner dies while the cluster's master is away: it is owed to who waits, and comes."""
    gone, heir = Person(hall, town.houses["beta"]), Person(hall, town.houses["gamma"])
    assert gone.own(b"shop") is NameOutcome.PRIMARY_OWNER
    assert heir.own(b"shop") is NameOutcome.IN_QUEUE
    town.kill_master()
    town.run_for(3)
    gone.client.end()
    wait(hall, heir, holds=lambda: hall.authority.is_owing)
    assert isinstance(heir.own(b"till"), MasterLost)
    town.start_master()
    events = [Event.CLUSTER_LOST, Event.CLUSTER_BACK]
    wait(
        hall,
        heir,
        holds=lambda: [one.event for one in hall.notices if one.event in events] == events,
    )
    hall.authority.tell_again()
    wait(hall, heir, holds=lambda: b"shop" in heir.owned)
    assert heir.own(b"till") is NameOutcome.PRIMARY_OWNER


def test_d9_what_a_policy_has_taken_can_be_had_again(town: Town, hall: Hall) -> None:
    """The bus's master does not take what it granted once for what its member still has."""
    one, other = Person(hall, town.houses["beta"]), Person(hall, town.houses["gamma"])
    assert one.own(b"shop") is NameOutcome.PRIMARY_OWNER
    assert one.ask(Subscribe(NEWS)).is_ok
    assert other.ask(Publish(NEWS)).is_ok
    everything = town.policy
    follow(town, EVERYTHING.replace('own = ["**"]', 'own = ["town.**"]').replace("topic:**", "no"))
    wait(hall, one, other, holds=lambda: len(one.notices) == 2)
    wait(hall, one, holds=lambda: not hall.names)
    follow(town, everything)
    assert other.own(b"shop") is NameOutcome.PRIMARY_OWNER
    assert one.ask(Subscribe(NEWS)).is_ok
    assert other.ask(Publish(NEWS)).is_ok
    assert other.client.publish(NEWS, b"news") == 0
    wait(hall, one, holds=lambda: one.texts == [b"news"])


@pytest.mark.parametrize("is_evicted", [True, False])
def test_d5_what_is_taken_already_is_no_reason_to_keep_the_rest(
    town: Town, hall: Hall, is_evicted: bool
) -> None:
    """A member that has lost something to a new policy can be put off the bus all the same."""
    one = Person(hall, town.houses["beta"])
    assert one.own(b"shop") is NameOutcome.PRIMARY_OWNER
    assert one.ask(Subscribe(NEWS)).is_ok
    assert one.ask(Publish(Terms.of("other"))).is_ok
    follow(town, EVERYTHING.replace('own = ["**"]', 'own = ["town.**"]').replace("topic:**", "no"))
    wait(hall, one, holds=lambda: len(one.notices) >= 2)
    if is_evicted:
        hall.authority.evict(one.address)
        wait(hall, one, holds=lambda: one.address not in one.owned)
        assert hall.authority.members() == ()
        return
    assert one.ask(Unsubscribe(NEWS)).is_ok
    at = BusAddress(PATH, b"shop")
    items = RevokeAddr(at), RevokeMatch(PATH, NEWS), RevokeSend(PATH, Terms.of("third"))
    hall.client.grant(one.address, *items, body=b"")


def test_d16_members_outlive_the_master_of_their_bus(town: Town, hall: Hall) -> None:
    """Another one, on another node, does not know them, until they ask."""
    one, other = Person(hall, town.houses["beta"]), Person(hall, town.houses["gamma"])
    assert one.own(b"shop") is NameOutcome.PRIMARY_OWNER
    hall.client.end()
    wait(hall, one, other, holds=lambda: one.notices and other.notices)
    heir = Hall(town.houses["gamma"])
    for person in (one, other):
        person.hall = heir
    wait(heir, one, other, holds=lambda: len(one.notices) == len(other.notices) == 2)
    assert other.own(b"till") is NameOutcome.PRIMARY_OWNER
    refused: NameOutcome | BusError = other.own(b"shop")
    assert not isinstance(refused, NameOutcome), "it has an owner, whom the new master learns of"
    assert one.own(b"shop") is NameOutcome.PRIMARY_OWNER
    assert {view.address.address for view in heir.authority.members()} == {
        one.address,
        other.address,
    }


class Walk:
    """Members come, go, own and release, while nodes, agents and the cluster's master fail.

    Not for so long that names of a node are free, and may be its own again when it is back.
    """

    def __init__(self, town: Town, hall: Hall, seed: int) -> None:
        self.town, self.hall = town, hall
        self.random = Random(seed)
        self.people: list[Person] = []
        self.steps: list[str] = []
        #: Who has what, as each believes, at the last look.
        self.view = ""

    def look(self) -> None:
        """Let everybody read; what is owed is tried again at once."""
        self.hall.look()
        for person in self.people:
            person.look()
        if self.hall.authority.is_owing and self.hall.is_idle:
            self.hall.authority.tell_again()

    def run_for(self, seconds: float) -> None:
        """Let time pass."""
        until = self.town.network.time + seconds
        while self.town.network.time < until:
            self.town.run_for(min(0.5, seconds))
            self.town.await_switches(0.001)
            self.look()

    def join(self) -> None:
        """Let somebody join, if it can be now."""
        house = self.random.choice(list(self.town.houses.values()))
        if house.uplink.is_here and self.town.houses["alpha"].uplink.is_here:
            self.people.append(Person(self.hall, house))

    def step(self) -> None:  # noqa: PLR0912 (one for each thing that happens)
        """Let something happen."""
        choice = self.random.choice
        what = choice(
            ["own"] * 5
            + ["release"] * 2
            + ["join", "die", "restart", "cut", "heal", "kill", "start", "wait", "wait", "long"]
        )
        person, house = choice(self.people), self.town.houses[choice(["beta", "gamma"])]
        name = choice([b"shop", b"till", b"office"])
        self.steps.append(f"{what} {person.address!r} {house.name} {name!r}")
        match what:
            case "own":
                flags = choice([NO_FLAGS, NameFlags.DO_NOT_QUEUE])
                person.start(Own(name, flags))
            case "release":
                person.start(Release(name))
            case "join" if len(self.people) < 6:
                self.join()
            case "die" if len(self.people) > 1:
                person.client.end()
                self.people.remove(person)
            case "restart":
                house.restart()
                for one in self.people:
                    if one.client.house is house:
                        one.resume()
            case "cut":
                house.is_cut_off = True
                house.lose_line()
            case "heal":
                self.heal()
            case "kill":
                self.town.kill_master()
            case "start" if self.town.master is None:
                self.town.start_master()
            case "wait":
                self.run_for(choice([0.1, 1, 3]))
            case "long":
                self.run_for(8)
            case _:
                pass
        self.look()

    def heal(self) -> None:
        """Let all reach the master, when it is there."""
        for house in self.town.houses.values():
            house.is_cut_off = False

    def end(self) -> None:
        """Have everything in order, and wait until nothing is left to do."""
        self.heal()
        if self.town.master is None:
            self.town.start_master()
        self.run_for(20)

        def is_settled() -> bool:
            self.look()
            return self.hall.is_idle and not self.hall.authority.is_owing and self.agrees()

        self.town.until(is_settled)

    def agrees(self) -> bool:
        """Whether all believe the same: the table, both masters, agents, and members."""
        mirror = self.town.houses["alpha"].uplink.mirror
        bus = mirror.get_bus(PATH)
        assert bus is not None
        table = {one.address: (one.node, one.endpoint) for one in mirror.get_owners(bus.number)}
        believed: dict[bytes, tuple[int, int]] = {}
        real: dict[bytes, tuple[int, int]] = {}
        told: dict[bytes, tuple[int, int]] = {}
        for person in self.people:
            welcome, house = person.client.welcome, person.client.house
            assert welcome is not None
            place = (house.uplink.number, welcome.endpoint)
            believed |= {n: place for n, who in self.hall.names.items() if who == person.address}
            endpoint = house.core._registry.endpoints[EndpointId(welcome.endpoint)]
            real |= {n: place for n in endpoint.addresses if not n[:1].isdigit()}
            told |= {n: place for n in person.owned if not n[:1].isdigit()}
        self.view = (
            f"table {table}, master {believed} {self.hall.names}, agents {real}, members {told}"
        )
        return table == believed == real == told and len(believed) == len(self.hall.names)


@pytest.mark.parametrize("seed", range(6))
def test_d4_d16_all_agree_on_names_after_any_outages(town: Town, hall: Hall, seed: int) -> None:
    """Whatever fails: in the end a name has one owner, and all that keep books on it say who."""
    walk = Walk(town, hall, seed)
    for _ in range(2):
        walk.join()
    for _ in range(40):
        walk.step()
    try:
        walk.end()
    except AssertionError:
        pytest.fail("\n".join([*walk.steps, walk.view]))
