"""Quiet points of a storm: all moves until nothing does, and then the model and the bus agree."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Final

from tests.cluster.inspection import endpoint_of, inspect
from tests.cluster.society import NAMES, NODES, TOPICS

from afbus.proto.record import NodeState
from afbus.proto.terms import matches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cluster.society import Society
    from tests.cluster.town import House
    from tests.cluster.witness import Letter, Person

    from afbus.master.core import Core as MasterCore

#: How long everything may take to come to rest: seconds of the town, and real ones.
REST_S: Final = 60.0
REST_REAL_S: Final = 30.0
#: Switches wait up to 25 real milliseconds before they confirm.
CONFIRM_S: Final = 0.03
#: A letter by which a node learns that its link was to a former life of the other is told as lost.
TRIES: Final = 3


def rest(society: Society) -> None:
    """Wait until nothing moves any more, and judge."""
    town = society.town
    until, end = town.network.time + REST_S, time.monotonic() + REST_REAL_S
    while (why := next(find_unrest(society), "")) != "":
        assert town.network.time < until or time.monotonic() < end, why
        is_busy = town.settle() | society.pump()
        if not is_busy and not town.await_switches(CONFIRM_S if why.startswith("lane") else 0.0):
            town.run_for(0.25)
    society.settle_doubts()
    society.witness.judge()
    for person in society.persons:
        _check_requests(society, person)


def _check_requests(society: Society, person: Person) -> None:
    """Who waits for an answer is one of whom the switch knows that, and who will be told."""
    switch, number = person.house.switch, endpoint_of(person).id
    for _ in range(TRIES):
        waiting = switch.stats(number)["requests"]
        # Its time may be over just now.
        society.pump()
        if waiting == len(person.requests):
            return
    raise AssertionError(f"{person} waits for {person.requests}, the switch for {waiting}")


def find_unrest(society: Society) -> Iterator[str]:
    """Tell what is not at rest yet, of what the master or a node has to do."""
    town = society.town
    if town.settle() | society.pump():
        yield "something has just happened"
    if society.calls:
        yield f"{len(society.calls)} calls have no answer"
    assert town.master is not None, "it is calm"
    for node in town.master._registry.nodes.values():
        if node.state is not NodeState.LIVE and node.name in town.houses:
            yield f"the master does not hear {node.name}"
    for house in town.houses.values():
        yield from _find_unrest_of(house, town.master)
        yield from _find_unrest_of_lanes(house)


def _find_unrest_of(house: House, master: MasterCore) -> Iterator[str]:
    uplink = house.uplink
    if not uplink.is_here:
        yield f"{house.name} does not hear the master"
    truth = master.epoch, master._ledger.table.version
    if (uplink.mirror.epoch, uplink.mirror.version) != truth:
        yield f"{house.name} has not the table of the master"
    if len(uplink._calls):
        yield f"{house.name} has calls under way"
    if len(house.core._tickets):
        yield f"{house.name} waits for an answer"


def _find_unrest_of_lanes(house: House) -> Iterator[str]:
    for peer in house.peers.describe():
        if peer["node"] not in house.town.houses:
            continue
        if peer["link"] == "lost":
            yield f"{peer['node']} is lost for {house.name}"
        number = house.peers._peers[peer["node"]].record.number
        if peer["held_bytes"] or not house.switch.trunk_is_idle(number):
            yield f"lane from {house.name} to {peer['node']}: {peer}"
    for endpoint in house.core._registry.endpoints:
        if house.switch.stats(endpoint)["backlog"]:
            yield f"lane to endpoint {endpoint} of {house.name}"


def check_all(society: Society) -> None:
    """Compare everything: what was read and told, all tables, and where letters get to."""
    rest(society)
    inspect(society.town, society.persons, society.hall)
    _probe(society)
    inspect(society.town, society.persons, society.hall)


def _probe(society: Society) -> None:
    """Write to every name from every node, and shout about everything: routes and matches."""
    ways = list(_find_ways(society))
    for tries in range(TRIES):
        sent = [(way, way[0]()) for way in ways]
        rest(society)
        ways = []
        for (send, owners), letter in sent:
            found = [] if letter is None else letter.read_by
            assert set(found) <= set(owners), f"{letter} was read by {found}"
            if set(found) != set(owners):
                assert tries + 1 < TRIES, f"{letter} was read by {found}, not by {owners}"
                ways.append((send, owners))


def _find_ways(
    society: Society,
) -> Iterator[tuple[Callable[[], Letter | None], list[Person]]]:
    """Return what may be sent by a member of each node, and who must get it."""
    members, hall = society.members, society.hall
    for node in NODES:
        sender = next((one for one in members if one.house.name == node), None)
        if sender is None:
            continue
        for name in NAMES:
            owners = [one for one in members if name in one.names]
            owners = owners or ([] if hall is None else [hall])
            yield functools.partial(society.tell, sender, name, b"?"), owners
        for topic in TOPICS:
            found = [one for one in members if any(matches(sub, topic) for sub in one.subs)]
            yield functools.partial(society.shout, sender, topic, b"!"), found
