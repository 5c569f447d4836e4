"""Which nodes have a link, and how long those that have none are waited for.

A node that is live has a reader of the feed, with or without a link; see `feed.py`. One that is
lost has neither, and only a time after which it loses what it has.

Invariants:

1. A time runs for each node without a link, and for each live one that is silent, and no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .effect import LinkId


@dataclass(slots=True)
class _Place:
    link: LinkId | None = None
    reader: LinkId | None = None
    lost_at: float | None = None
    free_at: float | None = None


class Presence:
    """Nodes by their name."""

    def __init__(self, lost_s: float, lease_s: float) -> None:
        """Begin without nodes.

        Args:
            lost_s: How long a live node may be silent, or without a link.
            lease_s: How long a lost node keeps what it has.
        """
        self._lost_s, self._lease_s = lost_s, lease_s
        self._places: dict[str, _Place] = {}

    def knows(self, name: str) -> bool:
        """Tell whether a node is here."""
        return name in self._places

    def get_link(self, name: str) -> LinkId | None:
        """Return the link of a node."""
        return self._places[name].link

    def get_reader(self, name: str) -> LinkId | None:
        """Return the reader of a node; None if it is lost and has no link."""
        return self._places[name].reader

    def expect(self, name: str, reader: LinkId, until: float) -> None:
        """A live node is without a link from the beginning."""
        self._places[name] = _Place(reader=reader, lost_at=until)

    def come(self, name: str, link: LinkId) -> LinkId | None:
        """A node has a link; return its former reader, which is to leave."""
        former = self._places.get(name, _Place()).reader
        self._places[name] = _Place(link=link, reader=link)
        return former

    def miss(self, name: str, now: float) -> None:
        """A live node with a link is silent."""
        place = self._places[name]
        if place.lost_at is None:
            place.lost_at = now + self._lost_s

    def hear(self, name: str) -> None:
        """It is heard again."""
        self._places[name].lost_at = None

    def end(self, name: str, now: float) -> None:
        """The link of a live node has ended; its reader stays."""
        self._places[name].link = None
        self.miss(name, now)

    def lose(self, name: str, now: float) -> None:
        """A node is lost, or its link has ended before it was live."""
        self._places[name] = _Place(free_at=now + self._lease_s)

    def forget(self, name: str) -> None:
        """A node is gone for good."""
        del self._places[name]

    def get_timer(self) -> float | None:
        """Return when somebody is to be taken."""
        places = self._places.values()
        times = [place.lost_at for place in places] + [place.free_at for place in places]
        return min((time for time in times if time is not None), default=None)

    def take_lost(self, now: float) -> list[str]:
        """Return the live nodes that were waited for long enough; the caller calls `lose`."""
        return [
            name
            for name, place in self._places.items()
            if place.lost_at is not None and place.lost_at <= now
        ]

    def take_free(self, now: float) -> list[str]:
        """Return the lost nodes that are to lose what they have; each once."""
        due = [
            name
            for name, place in self._places.items()
            if place.free_at is not None and place.free_at <= now
        ]
        for name in due:
            self._places[name].free_at = None
        return due
