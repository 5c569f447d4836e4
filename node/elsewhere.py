"""Rows of LIST that tell of other nodes: what the table of the cluster says, and no more.

It knows buses, who owns a name, and what each node wants of a bus. Endpoints without a name, their
users, and what lies in their rings are known on their own node alone.

Invariants:

1. What is on this node is never told here: its own rows know more of it.
2. Rows of a bus come in the order in which the table got them. The first page costs a look at all
   that the table has of that bus; those behind it what their rows cost, until the table changes.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from ..proto.address import format_within
from ..proto.record import NodeState, OwnerRecord
from ..proto.terms import Terms
from ..proto.text import escape
from .federation import WATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ..proto.match import What
    from ..proto.mirror import Mirror
    from ..proto.record import BusRecord, MatchRecord
    from .uplink import Uplink

Row = dict[str, Any]
_T = TypeVar("_T")


def show_what(what: What) -> Row:
    """Return the part of a row that says what is heard or sent."""
    if isinstance(what, Terms):
        return {"terms": what.format(), "bits": None}
    return {"terms": None, "bits": what.hex()}


class Elsewhere:
    """The cluster as the table tells it, without what is on this node."""

    def __init__(self, uplink: Uplink, node: str) -> None:
        """Look at the table of the uplink; `node` is the name of this node."""
        self._uplink = uplink
        self.node = node
        #: What was looked for last, by what it is: the table and the bus, and what was found there.
        self._found: dict[str, tuple[object, list[Any]]] = {}

    @property
    def _mirror(self) -> Mirror:
        return self._uplink.mirror

    def get_buses(self) -> Iterable[BusRecord]:
        """Return all buses of the cluster."""
        return self._mirror.get_buses()

    def get_bus(self, path: bytes) -> BusRecord | None:
        """Return the bus of a path."""
        return self._mirror.get_bus(path)

    def name_node(self, number: int) -> str | None:
        """Return the name of a node, None if nobody has this number."""
        if number == self._uplink.number:
            return self.node
        record = self._mirror.get_node(number)
        return None if record is None else record.name

    def find_owners(self, bus: BusRecord) -> list[OwnerRecord]:
        """Return who has the names of a bus that are on other nodes; its master first.

        The table does not say which endpoint the master is: 0.
        """
        return self._find("owners", bus, self._look_for_owners)

    def _look_for_owners(self, bus: BusRecord) -> list[OwnerRecord]:
        own = self._uplink.number
        found = [one for one in self._mirror.get_owners(bus.number) if one.node != own]
        if bus.node in (0, own) or bus.address is None:
            return found
        return [OwnerRecord(bus.number, bus.address, bus.node, 0), *found]

    def find_matches(self, bus: BusRecord) -> list[MatchRecord]:
        """Return what other nodes want of a bus; but for notices, which no match is asked for."""
        return self._find("matches", bus, self._look_for_matches)

    def _look_for_matches(self, bus: BusRecord) -> list[MatchRecord]:
        own, all_of_it = self._uplink.number, self._mirror.get_matches(bus.number)
        return [one for one in all_of_it if one.node != own and one.what != WATCH]

    def find_endpoints(self, bus: BusRecord) -> list[tuple[OwnerRecord, ...]]:
        """Return the endpoints of other nodes that own names of a bus: the names of each."""
        return self._find("endpoints", bus, self._look_for_endpoints)

    def _look_for_endpoints(self, bus: BusRecord) -> list[tuple[OwnerRecord, ...]]:
        found: dict[tuple[int, int], list[OwnerRecord]] = {}
        for one in self.find_owners(bus):
            found.setdefault((one.node, one.endpoint), []).append(one)
        return [tuple(owned) for owned in found.values()]

    def _find(self, what: str, bus: BusRecord, look: Callable[[BusRecord], list[_T]]) -> list[_T]:
        """Return what was found last, if it was here and nothing has changed since."""
        mirror = self._mirror
        where = (mirror.epoch, mirror.version, self._uplink.number, bus.number)
        known = self._found.get(what)
        if known is None or known[0] != where:
            known = self._found[what] = (where, look(bus))
        return known[1]

    def show_bus(self, bus: BusRecord) -> Row:
        """Return the row of a bus of which nobody on this node is."""
        return {
            "path": escape(bus.path),
            "node": self.name_node(bus.node),
            "master": format_within(bus.address) if bus.node and bus.address else None,
            "uid": None,
            "width": bus.width,
            "order": bus.order,
            "endpoints": 0,
            "members": 0,
            "addresses": len(self.find_owners(bus)),
            "matches": len(self.find_matches(bus)),
        }

    def show_endpoints(
        self, bus: BusRecord, endpoints: list[tuple[OwnerRecord, ...]], start: int
    ) -> Iterator[Row]:
        """Yield a row for each endpoint that owns names."""
        for owned in islice(endpoints, start, None):
            first = owned[0]
            yield {
                **self._name(bus, first),
                "addresses": [format_within(one.address) for one in owned],
                "pid": None,
                "uid": None,
                "gid": None,
                "state": self._state(bus, owned),
                "matches": None,
                "sends": None,
                "grants": None,
            }

    def show_addresses(
        self, bus: BusRecord, owners: list[OwnerRecord], start: int
    ) -> Iterator[Row]:
        """Yield a row for each name."""
        for one in islice(owners, start, None):
            yield {**self._name(bus, one), "kind": "name", "pid": None, "uid": None}

    def show_matches(self, bus: BusRecord, matches: list[MatchRecord], start: int) -> Iterator[Row]:
        """Yield a row for each thing that a node wants; of how many endpoints, it knows alone."""
        for one in islice(matches, start, None):
            yield {
                "path": escape(bus.path),
                "node": self.name_node(one.node),
                "endpoint": None,
                "address": None,
                "may": "receive",
                **show_what(one.what),
                "overflow": None,
                "deadline_ms": None,
            }

    def _name(self, bus: BusRecord, owner: OwnerRecord) -> Row:
        return {
            "path": escape(bus.path),
            "node": self.name_node(owner.node),
            "endpoint": owner.endpoint or None,
            "address": format_within(owner.address),
        }

    def _state(self, bus: BusRecord, owned: tuple[OwnerRecord, ...]) -> str:
        node = self._mirror.get_node(owned[0].node)
        if node is None or node.state is NodeState.LOST:
            return "lost"
        is_master = any((one.node, one.address) == (bus.node, bus.address) for one in owned)
        return "master" if is_master else "member"
