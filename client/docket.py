"""The docket of a bus's master: requests that are not answered yet, in the order of each asker.

Invariants:

1. Of each asker only the first request is being worked on; the others wait behind it.
2. A ticket stands for one request, from `add` until `finish` or `drop`, and never again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..proto.control import Identity
    from ..proto.request import Request

#: Requests of one asker that wait. An honest member has a few; this many answers still fit into
#: its ring.
REQUESTS_PER_ENDPOINT: Final = 256


@dataclass(slots=True)
class Entry:
    """One request that is not answered yet."""

    ticket: int
    #: The address that the answer goes to.
    asker: bytes
    identity: Identity
    request: Request
    #: The number that the answer names; 0: nobody waits for one.
    serial: int


class Docket:
    """Requests by their askers; all calls cost O(1), but for `drop`."""

    def __init__(self) -> None:
        self._entries: dict[bytes, deque[Entry]] = {}
        self._askers: dict[int, bytes] = {}
        self._last_ticket = 0

    def is_full(self, asker: bytes) -> bool:
        """Whether one asker has as many requests waiting as it may have."""
        return len(self._entries.get(asker, ())) >= REQUESTS_PER_ENDPOINT

    def add(self, asker: bytes, identity: Identity, request: Request, serial: int) -> bool:
        """Put a request behind the others of its asker; tell whether it is the first."""
        entries = self._entries.setdefault(asker, deque())
        self._last_ticket += 1
        entries.append(Entry(self._last_ticket, asker, identity, request, serial))
        self._askers[self._last_ticket] = asker
        return len(entries) == 1

    def first(self, asker: bytes) -> Entry:
        """Return the request of an asker that is being worked on; only if there is one."""
        return self._entries[asker][0]

    def find(self, ticket: int) -> Entry | None:
        """Return the request of a ticket, None if it is answered or dropped."""
        asker = self._askers.get(ticket)
        return None if asker is None else self._entries[asker][0]

    def finish(self, ticket: int) -> bytes | None:
        """Be done with a request; return its asker if that has another one, to be worked on now."""
        asker = self._askers.pop(ticket, None)
        if asker is None:
            return None
        entries = self._entries[asker]
        entries.popleft()
        if entries:
            return asker
        del self._entries[asker]
        return None

    def drop(self, asker: bytes) -> deque[Entry]:
        """Be done with all requests of an asker; return them."""
        entries = self._entries.pop(asker, deque())
        for entry in entries:
            self._askers.pop(entry.ticket)
        return entries
