"""Rows of LIST and the maps of STATUS and of options: what people see, with texts, JSON-able.

Invariants:

1. Rows come in the order of paths, within a bus in the order of arrival; a page is true by itself.
   It costs what its rows cost, and a look at each endpoint before them.
2. Details of a bus are for root, the agent's own user, the master's user and members. Without a
   path, rows of buses that the asker may not see are left out; that buses exist is no secret.
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
from ..proto.match import Overflow
from ..proto.terms import Terms
from ..proto.text import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ..proto.match import What
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
        self._rows: Mapping[str, Callable[[Endpoint, bytes | None], Iterator[_Rows]]] = {
            "buses": self._buses,
            "endpoints": self._endpoints,
            "addresses": self._addresses,
            "matches": self._matches,
            "queues": self._queues,
        }

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

    def _may_see(self, asker: Endpoint, bus: Bus) -> bool:
        uid = asker.credentials.uid
        is_member = asker.bus is bus and bool(asker.addresses)
        return uid in (0, self._own_uid, bus.master_uid) or is_member

    def _find_buses(self, path: bytes | None) -> list[Bus]:
        if path is None:
            return sorted(self._registry.buses.values(), key=lambda bus: bus.path)
        bus = self._registry.buses.get(path)
        if bus is None:
            raise NoBus(f"no bus {escape(path)}")
        return [bus]

    def _find_endpoints(self, asker: Endpoint, path: bytes | None) -> Iterator[Endpoint]:
        for bus in self._find_buses(path):
            if self._may_see(asker, bus):
                yield from bus.endpoints.values()
            elif path is not None:
                raise Denied(
                    f"details of {escape(path)} are for its members, for users "
                    f"{bus.master_uid} and {self._own_uid}, and for root"
                )
        if path is None:
            for endpoint in self._registry.endpoints.values():
                uid = asker.credentials.uid
                if endpoint.bus is None and uid in (0, self._own_uid, endpoint.credentials.uid):
                    yield endpoint

    def _buses(self, _asker: Endpoint, path: bytes | None) -> Iterator[_Rows]:
        for bus in self._find_buses(path):
            yield 1, partial(_show_bus, bus)

    def _endpoints(self, asker: Endpoint, path: bytes | None) -> Iterator[_Rows]:
        for endpoint in self._find_endpoints(asker, path):
            yield 1, partial(_show_endpoint, endpoint)

    def _addresses(self, asker: Endpoint, path: bytes | None) -> Iterator[_Rows]:
        for endpoint in self._find_endpoints(asker, path):
            yield len(endpoint.addresses), partial(_show_addresses, endpoint)

    def _matches(self, asker: Endpoint, path: bytes | None) -> Iterator[_Rows]:
        for endpoint in self._find_endpoints(asker, path):
            yield len(endpoint.matches), partial(_show_matches, endpoint)
            yield len(endpoint.sends), partial(_show_sends, endpoint)

    def _queues(self, asker: Endpoint, path: bytes | None) -> Iterator[_Rows]:
        for endpoint in self._find_endpoints(asker, path):
            yield 1, partial(self._show_queue, endpoint)

    def _show_queue(self, endpoint: Endpoint, _start: int) -> Iterator[Row]:
        yield {**_name(endpoint), **self._switch.stats(endpoint.id)}


def _show_bus(bus: Bus, _start: int) -> Iterator[Row]:
    yield {
        "path": escape(bus.path),
        "master": format_within(bus.master_address) if bus.has_master else None,
        "uid": bus.master_uid,
        "width": bus.width,
        "order": bus.order,
        "endpoints": len(bus.endpoints),
        "members": len(bus.members),
        "addresses": len(bus.owners),
        "matches": sum(len(member.matches) for member in bus.endpoints.values()),
    }


def _show_endpoint(endpoint: Endpoint, _start: int) -> Iterator[Row]:
    who = endpoint.credentials
    yield {
        **_name(endpoint),
        "addresses": [format_within(address) for address in endpoint.addresses],
        "pid": who.pid,
        "uid": who.uid,
        "gid": who.gid,
        "state": _state(endpoint),
        "matches": len(endpoint.matches),
        "sends": len(endpoint.sends),
        "grants": [str(flag.name) for flag in GrantFlags if flag in endpoint.flags],
    }


def _show_addresses(endpoint: Endpoint, start: int) -> Iterator[Row]:
    for address in endpoint.addresses[start:]:
        yield {
            **_name(endpoint),
            "address": format_within(address),
            "kind": "unique" if is_unique(address) else "name",
            "pid": endpoint.credentials.pid,
            "uid": endpoint.credentials.uid,
        }


def _show_matches(endpoint: Endpoint, start: int) -> Iterator[Row]:
    name = _name(endpoint)
    for _, match in islice(endpoint.matches.values(), start, None):
        yield {
            **name,
            "may": "receive",
            **_show(match.what),
            "overflow": match.overflow.name.lower(),
            "deadline_ms": match.deadline_ms if match.overflow is Overflow.BLOCK else None,
        }


def _show_sends(endpoint: Endpoint, start: int) -> Iterator[Row]:
    name = _name(endpoint)
    for what in islice(endpoint.sends, start, None):
        yield {**name, "may": "send", **_show(what), "overflow": None, "deadline_ms": None}


def _name(endpoint: Endpoint) -> Row:
    """Return what each row of an endpoint begins with."""
    address = endpoint.addresses[0] if endpoint.addresses else endpoint.provisional
    return {
        "path": None if endpoint.bus is None else escape(endpoint.bus.path),
        "endpoint": endpoint.id,
        "address": format_within(address),
    }


def _state(endpoint: Endpoint) -> str:
    if endpoint.connection is None:
        return "away"
    if endpoint.is_master:
        return "master"
    if endpoint.addresses:
        return "member"
    return "idle" if endpoint.bus is None else "attached"


def _show(what: What) -> Row:
    if isinstance(what, Terms):
        return {"terms": what.format(), "bits": None}
    return {"terms": None, "bits": what.hex()}


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
