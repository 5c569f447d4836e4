"""Rows of LIST and the maps of STATUS and of options: what people see, with texts, JSON-able.

Invariants:

1. Rows come in the order of paths, within a bus in the order of arrival; a page is true by itself.
   It costs what its rows cost, and a look at each endpoint before them.
2. Details of a bus are for root, the agent's own user, the master's user and members. Without a
   path, rows of buses that the asker may not see are left out; that buses exist is no secret.
3. On a node of a cluster, rows say which node they are of. Behind those of this node stand those
   that the cluster's table has of others (`elsewhere.py`); rings are known here alone.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..proto import codec
from ..proto.address import format_within, is_unique
from ..proto.codec import U32_MAX
from ..proto.control import GrantFlags
from ..proto.errors import Denied, InvalidArgument, NoBus
from ..proto.limits import FRAME_BYTES, FRAME_ITEMS, KIB
from ..proto.match import Overflow, what_of
from ..proto.text import escape
from .elsewhere import show_what
from .endpoint import EndpointId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ..proto.record import BusRecord
    from .elsewhere import Elsewhere
    from .endpoint import Bus, Endpoint
    from .port import SwitchPort
    from .registry import Registry

Row = dict[str, Any]
#: Rows that belong together: how many, and a function that makes them from the n-th on.
_Rows: TypeAlias = "tuple[int, Callable[[int], Iterator[Row]]]"

#: What a page leaves free in its frame for everything but the rows.
_ENVELOPE_BYTES: Final = 1 * KIB


class Listing:
    """Answers LIST from the registry; `own_uid` is the user whom the agent runs as."""

    def __init__(self, registry: Registry, switch: SwitchPort, own_uid: int) -> None:
        """Look at these; nothing is kept."""
        self._registry = registry
        self._switch = switch
        self._own_uid = own_uid
        self._elsewhere: Elsewhere | None = None
        self._rows: Mapping[str, Callable[[Endpoint, bytes | None], Iterator[_Rows]]] = {
            "buses": self._buses,
            "endpoints": self._endpoints,
            "addresses": self._addresses,
            "matches": self._matches,
            "queues": self._queues,
            "lanes": self._lanes,
        }

    def join(self, elsewhere: Elsewhere) -> None:
        """Show what is elsewhere in the cluster, too."""
        self._elsewhere = elsewhere

    @property
    def _node(self) -> str | None:
        """What rows of this node say of where they are; None in no cluster."""
        return None if self._elsewhere is None else self._elsewhere.node

    def answer(self, asker: Endpoint, what: str, path: bytes | None, after: int) -> Row:
        """Return the page of rows that begins at row `after`.

        Raises:
            InvalidArgument: There are no such rows. EINVAL.
            NoBus: There is no such bus. ENOENT.
            Denied: Its details are not for the asker. EPERM.
        """
        rows = self._rows.get(what)
        if rows is None:
            raise InvalidArgument(f"no list of {what!a}; there are {', '.join(self._rows)}")
        if not 0 <= after <= U32_MAX:
            raise InvalidArgument(f"row {after}")
        return _page(rows(asker, path), after)

    def _may_see(self, asker: Endpoint, bus: Bus | None) -> bool:
        uid = asker.credentials.uid
        is_member = bus is not None and asker.bus is bus and bool(asker.addresses)
        return uid in (0, self._own_uid) or is_member or (bus is not None and uid == _user_of(bus))

    def _find_paths(self, path: bytes | None) -> list[bytes]:
        buses, elsewhere = self._registry.buses, self._elsewhere
        if path is None:
            others = () if elsewhere is None else (bus.path for bus in elsewhere.get_buses())
            return sorted({*buses, *others})
        if path not in buses and (elsewhere is None or elsewhere.get_bus(path) is None):
            raise NoBus(f"no bus {escape(path)}")
        return [path]

    def _find_seen(self, asker: Endpoint, path: bytes | None) -> Iterator[bytes]:
        """Yield the paths of buses of which the asker may see details."""
        for one in self._find_paths(path):
            bus = self._registry.buses.get(one)
            if self._may_see(asker, bus):
                yield one
            elif path is not None:
                users = {self._own_uid} if bus is None else {self._own_uid, _user_of(bus)}
                also = "".join(f"user {uid}, " for uid in sorted(filter(None, users)))
                text = f"details of {escape(path)} are for its members, {also}and root"
                raise Denied(text)

    def _find_endpoints(self, path: bytes) -> Iterable[Endpoint]:
        bus = self._registry.buses.get(path)
        return () if bus is None else bus.endpoints.values()

    def _find_elsewhere(self, path: bytes) -> tuple[Elsewhere, BusRecord] | None:
        """Return the bus of the cluster that a path is, with who knows of it."""
        bus = self._registry.buses.get(path)
        if self._elsewhere is None or (bus is not None and not bus.cluster):
            return None
        record = self._elsewhere.get_bus(path)
        return None if record is None else (self._elsewhere, record)

    def _find_free(self, asker: Endpoint, path: bytes | None) -> Iterator[Endpoint]:
        """Yield the endpoints on no bus that the asker may see; none where a bus was named."""
        for endpoint in self._registry.endpoints.values() if path is None else ():
            uid = asker.credentials.uid
            if endpoint.bus is None and uid in (0, self._own_uid, endpoint.credentials.uid):
                yield endpoint

    def _buses(self, _asker: Endpoint, path: bytes | None) -> Iterator[_Rows]:
        for one in self._find_paths(path):
            yield 1, partial(self._show_bus, one)

    def _endpoints(self, asker: Endpoint, path: bytes | None) -> Iterator[_Rows]:
        for one in self._find_seen(asker, path):
            for endpoint in self._find_endpoints(one):
                yield 1, partial(_show_endpoint, endpoint, self._node)
            if (found := self._find_elsewhere(one)) is not None:
                elsewhere, bus = found
                others = elsewhere.find_endpoints(bus)
                yield len(others), partial(elsewhere.show_endpoints, bus, others)
        for endpoint in self._find_free(asker, path):
            yield 1, partial(_show_endpoint, endpoint, self._node)

    def _addresses(self, asker: Endpoint, path: bytes | None) -> Iterator[_Rows]:
        for one in self._find_seen(asker, path):
            for endpoint in self._find_endpoints(one):
                yield len(endpoint.addresses), partial(_show_addresses, endpoint, self._node)
            if (found := self._find_elsewhere(one)) is not None:
                elsewhere, bus = found
                owners = elsewhere.find_owners(bus)
                yield len(owners), partial(elsewhere.show_addresses, bus, owners)

    def _matches(self, asker: Endpoint, path: bytes | None) -> Iterator[_Rows]:
        for one in self._find_seen(asker, path):
            for endpoint in self._find_endpoints(one):
                yield len(endpoint.matches), partial(_show_matches, endpoint, self._node)
                yield len(endpoint.sends), partial(_show_sends, endpoint, self._node)
            if (found := self._find_elsewhere(one)) is not None:
                elsewhere, bus = found
                matches = elsewhere.find_matches(bus)
                yield len(matches), partial(elsewhere.show_matches, bus, matches)

    def _queues(self, asker: Endpoint, path: bytes | None) -> Iterator[_Rows]:
        for one in self._find_seen(asker, path):
            for endpoint in self._find_endpoints(one):
                yield 1, partial(self._show_queue, endpoint)
        for endpoint in self._find_free(asker, path):
            yield 1, partial(self._show_queue, endpoint)

    def _lanes(self, asker: Endpoint, path: bytes | None) -> Iterator[_Rows]:
        for one in self._find_seen(asker, path):
            for endpoint in self._find_endpoints(one):
                lanes = self._switch.lanes(endpoint.id)
                yield len(lanes), partial(self._show_lanes, endpoint, lanes)

    def _show_lanes(
        self, endpoint: Endpoint, lanes: list[tuple[list[int], bool, int, int]], start: int
    ) -> Iterator[Row]:
        endpoints = self._registry.endpoints
        for readers, is_multicast, size, messages in lanes[start:]:
            yield {
                **_name(endpoint, None),
                "to": [_format_name(endpoints[EndpointId(reader)]) for reader in readers],
                "kind": "multicast" if is_multicast else "unicast",
                "bytes": size,
                "messages": messages,
            }

    def _show_queue(self, endpoint: Endpoint, _start: int) -> Iterator[Row]:
        yield {**_name(endpoint, None), **self._switch.stats(endpoint.id)}

    def _show_bus(self, path: bytes, _start: int) -> Iterator[Row]:
        bus, found = self._registry.buses.get(path), self._find_elsewhere(path)
        if bus is None:
            assert found is not None, "a path is of a bus here or elsewhere"
            elsewhere, record = found
            yield elsewhere.show_bus(record)
            return
        node, owners, matches = self._node, 0, 0
        if found is not None:
            elsewhere, record = found
            node = elsewhere.name_node(record.node)
            owners = len(elsewhere.find_owners(record))
            matches = len(elsewhere.find_matches(record))
        yield {
            **_place(bus.path, node, is_shown=self._elsewhere is not None),
            "master": format_within(bus.master_address) if bus.has_master else None,
            "uid": _user_of(bus),
            "width": bus.width,
            "order": bus.order,
            "endpoints": len(bus.endpoints),
            "members": len(bus.members),
            "addresses": len(bus.owners) + owners,
            "matches": matches + sum(len(one.matches) for one in bus.endpoints.values()),
        }


def _user_of(bus: Bus) -> int | None:
    """Return the user of a bus's master, None where only another node knows it."""
    if bus.cluster:
        return None if bus.master is None else bus.master.credentials.uid
    return bus.master_uid


def _place(path: bytes | None, node: str | None, *, is_shown: bool) -> Row:
    where = {"node": node} if is_shown else {}
    return {"path": None if path is None else escape(path), **where}


def _show_endpoint(endpoint: Endpoint, node: str | None, _start: int) -> Iterator[Row]:
    who = endpoint.credentials
    yield {
        **_name(endpoint, node),
        "addresses": [format_within(address) for address in endpoint.addresses],
        "pid": who.pid,
        "uid": who.uid,
        "gid": who.gid,
        "state": _state(endpoint),
        "matches": len(endpoint.matches),
        "sends": len(endpoint.sends),
        "grants": [str(flag.name) for flag in GrantFlags if flag in endpoint.flags],
    }


def _show_addresses(endpoint: Endpoint, node: str | None, start: int) -> Iterator[Row]:
    for address in endpoint.addresses[start:]:
        yield {
            **_name(endpoint, node),
            "address": format_within(address),
            "kind": "unique" if is_unique(address) else "name",
            "pid": endpoint.credentials.pid,
            "uid": endpoint.credentials.uid,
        }


def _show_matches(endpoint: Endpoint, node: str | None, start: int) -> Iterator[Row]:
    name = _name(endpoint, node)
    for form, (_, overflow, deadline_ms) in islice(endpoint.matches.items(), start, None):
        yield {
            **name,
            "may": "receive",
            **show_what(what_of(form)),
            "overflow": Overflow(overflow).name.lower(),
            "deadline_ms": deadline_ms if overflow == Overflow.BLOCK else None,
        }


def _show_sends(endpoint: Endpoint, node: str | None, start: int) -> Iterator[Row]:
    name = _name(endpoint, node)
    for what in islice(endpoint.sends, start, None):
        yield {**name, "may": "send", **show_what(what), "overflow": None, "deadline_ms": None}


def _name(endpoint: Endpoint, node: str | None) -> Row:
    """Return what each row of an endpoint begins with."""
    path = None if endpoint.bus is None else endpoint.bus.path
    return {
        **_place(path, node, is_shown=node is not None),
        "endpoint": endpoint.id,
        "address": _format_name(endpoint),
    }


def _format_name(endpoint: Endpoint) -> str:
    return format_within(endpoint.addresses[0] if endpoint.addresses else endpoint.provisional)


def _state(endpoint: Endpoint) -> str:
    if endpoint.connection is None:
        return "away"
    if endpoint.is_master:
        return "master"
    if endpoint.addresses:
        return "member"
    return "idle" if endpoint.bus is None else "attached"


def _skip(groups: Iterable[_Rows], after: int) -> Iterator[Row]:
    """Return the rows from the n-th on; those before it are counted and not made."""
    for count, make in groups:
        if after < count:
            yield from make(after)
        after = max(after - count, 0)


def _page(groups: Iterable[_Rows], after: int) -> Row:
    """Return as many rows as one frame holds, and where the next page begins."""
    page: list[Row] = []
    room = FRAME_BYTES - _ENVELOPE_BYTES
    for row in _skip(groups, after):
        room -= len(codec.encode(row))
        if room < 0 or len(page) == FRAME_ITEMS:
            return {"rows": page, "next": after + len(page)}
        page.append(row)
    return {"rows": page, "next": None}
