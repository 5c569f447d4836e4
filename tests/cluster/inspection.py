"""No ghosts: at a quiet point every table has what people have, and nothing else.

What people should have is the model's; endpoints and buses of an agent, its claims, the tables of
the master and their mirrors, what the switches are told, all must say the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.cluster.town import PATH

from afbus.node.endpoint import EndpointId
from afbus.node.federation import WATCH
from afbus.proto.control import GrantFlags
from afbus.proto.match import what_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.cluster.town import House, Town
    from tests.cluster.witness import Person

    from afbus.master.core import Core as MasterCore
    from afbus.node.endpoint import Endpoint


def endpoint_of(person: Person) -> Endpoint:
    """Return what the agent knows of somebody."""
    assert person.client.welcome is not None, "it has said HELLO"
    number = EndpointId(person.client.welcome.endpoint)
    return person.house.core._registry.endpoints[number]


def inspect(town: Town, persons: Sequence[Person], hall: Person | None) -> None:
    """Compare all tables; nobody is cut off, and nothing moves."""
    master = town.master
    assert master is not None, "it is calm"
    truth = master._ledger.table.snapshot()
    for house in town.houses.values():
        people = {endpoint_of(one).id: one for one in persons if one.house is house}
        assert house.uplink.mirror.snapshot() == truth, f"{house.name} has another table"
        _check_agent(house, people)
        _check_bus(house, hall)
        _check_claims(house, people, master)
        _check_lanes(town, house)


def _check_agent(house: House, people: dict[EndpointId, Person]) -> None:
    """An agent knows who is there, and what each was granted."""
    registry = house.core._registry
    assert set(registry.endpoints) == set(people), f"{house.name} knows others"
    for number, person in people.items():
        endpoint = registry.endpoints[number]
        expected = [person.address] if person.address else []
        assert endpoint.addresses[:1] == expected, f"{person} has {endpoint.addresses}"
        assert set(endpoint.addresses[1:]) == person.names, f"{person}: {endpoint.addresses}"
        assert set(map(what_of, endpoint.matches)) == person.subs, (
            f"{person} hears {endpoint.matches}"
        )
    core = house.core
    assert len(core._connections) == len(people), f"{house.name} has other connections"
    assert not len(core._tickets), f"{house.name} waits for answers"


def _check_bus(house: House, hall: Person | None) -> None:
    """A bus is known where somebody is on it, and leads to what other nodes want."""
    federation, mirror, own = house.federation, house.uplink.mirror, house.uplink.number
    endpoints = house.core._registry.endpoints.values()
    bus = house.core._registry.buses.get(PATH)
    assert (bus is not None) == any(one.bus is not None for one in endpoints)
    if bus is None:
        assert not federation._buses
        assert not federation._wants
        assert not federation._watchers
        return
    record = mirror.get_bus(PATH)
    assert record is not None, "a bus with endpoints is in the table"
    assert record.node == (0 if hall is None else hall.house.uplink.number)
    matches = [one for one in mirror.get_matches(bus.cluster) if one.node != own]
    wants = {(bus.cluster, one.node, one.what) for one in matches if one.what != WATCH}
    assert set(federation._wants) == wants, f"{house.name} leads to what nobody wants"
    watchers = {one.node for one in matches if one.what == WATCH}
    assert federation._watchers.get(bus.cluster, set()) == watchers


def _check_claims(house: House, people: dict[EndpointId, Person], master: MasterCore) -> None:
    """The master has of a node what its endpoints have."""
    node = master._registry.nodes[house.name]
    assert node.unstated is None, f"{house.name} has not stated all"
    members = {number for number, one in people.items() if one.address}
    # Who was refused after it was entered is known, and has nothing.
    entered = house.federation._entered
    assert members <= entered <= set(people), f"{house.name} has entered {entered}"
    assert set(node.endpoints) == entered, f"{house.name}: the master knows {set(node.endpoints)}"
    wanted = set()
    for number, known in node.endpoints.items():
        person, endpoint = people[EndpointId(number)], endpoint_of(people[EndpointId(number)])
        wishes = person.subs | ({WATCH} if GrantFlags.NOTICES in endpoint.flags else set())
        wanted |= wishes
        assert {name for _, name in known.claims} == person.names, f"the master of {person}"
        assert len(known.wishes) == len(wishes), f"the master of {person}"
        assert bool(known.buses) == person.is_hall, f"the master of {person}"
    if (bus := house.uplink.mirror.get_bus(PATH)) is not None:
        matches = house.uplink.mirror.get_matches(bus.number)
        assert {one.what for one in matches if one.node == house.uplink.number} == wanted
    owned = sum(len(one.names) + bool(one.is_hall and one.address) for one in people.values())
    claims = len(house.uplink._claims)
    assert claims == len(entered) + owned + sum(len(one.wishes) for one in node.endpoints.values())


def _check_lanes(town: Town, house: House) -> None:
    """Nothing waits on a lane to a node that is there, and nobody waits for its answer."""
    for peer in house.peers.describe():
        if peer["node"] in town.houses:
            left = [peer[key] for key in ("unconfirmed_bytes", "held_bytes", "waiting", "parked")]
            assert not any(left), f"{house.name} to {peer}"
            senders = [one for one in house.core._registry.endpoints.values() if one.bus]
            assert peer["senders"] <= len(senders), f"{house.name} to {peer}"
            number = town.houses[peer["node"]].peers._peers[house.name].record.number
            far = town.houses[peer["node"]].switch.trunk_stats(number)
            # Without a link, nobody may have heard yet that the other has begun anew.
            assert peer["link"] != "open" or peer["sent"] == far["received"], (
                f"{house.name} to {peer}, which has {far}"
            )
    for name, asked in house.federation._asked.items():
        assert not asked, f"{house.name} has asked {name}"
    for name, commands in house.federation._commands.items():
        assert not commands.running, f"{house.name} carries out for {name}"
