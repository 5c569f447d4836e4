"""Keeps a link to one member up: which place to call next, and when.

    WAITING --time--> CALLING --link--> UP --end of the link--> WAITING
                      CALLING --failure--> CALLING at the next place, or WAITING after the last

A member may have several places. They are called in turn, each round begins where the last one
succeeded, and only a round in which all failed is followed by a wait. Waits grow twofold up to a
longest one and are shortened at random by up to a half, so that a thousand nodes that lost their
master at once do not come back at once. A link must live for a while before waits begin small
again: who is accepted and thrown out in a circle is no success.

Where trying again does not help (`LinkError.retryable`), it is tried rarely all the same: the other
side may get new certificates, or another policy. The owner hears of each failure.

Invariants:

1. There is never more than one call under way, and none while a link is up.
2. After `stop` there is no effect and no timer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from ..proto.errors import LinkError
from .reason import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .carrier import Carrier, Timer
    from .effect import Down
    from .identity import Identity
    from .link import Link


class Chance(Protocol):
    """A source of random numbers; `random.Random` is one."""

    def random(self) -> float:
        """Return a number from 0 up to, not with, 1."""


@dataclass(frozen=True, slots=True)
class Waits:
    """How long to wait before calling again, in seconds.

    Attributes:
        first_s: After the first round that failed, and at most after a link has ended.
        longest_s: Where doubling ends: members find each other within 3 s after a heal (case 13).
        refused_s: Where trying again does not help.
        steady_s: A link that lives this long was a success.
    """

    first_s: float = 0.2
    longest_s: float = 2.5
    refused_s: float = 30.0
    steady_s: float = 5.0

    def grow_s(self, rounds: int) -> float:
        """Return the longest wait after so many rounds that failed, 1 or more."""
        grown_s: float = self.first_s * 2 ** min(rounds - 1, 30)
        return min(grown_s, self.longest_s)


def shorten(wait_s: float, chance: Chance) -> float:
    """Return a wait that is shorter by up to a half: many who wait do not come all at once."""
    return wait_s * (0.5 + 0.5 * chance.random())


class _State(Enum):
    WAITING = 1
    CALLING = 2
    UP = 3
    STOPPED = 4


@dataclass(frozen=True, slots=True)
class Call:
    """Call the member at this place."""

    place: Any


class DialerCore:
    """When and where to call; no IO."""

    def __init__(
        self, places: Sequence[Any], chance: Chance, now: float, waits: Waits | None = None
    ) -> None:
        """Begin: the first call is due at once, if there is a place."""
        self._places = tuple(places)
        self._chance = chance
        self._waits = waits or Waits()
        self._state = _State.WAITING
        self._due: float = now
        self._effects: list[Call] = []
        self._is_under_way = False
        #: Where the round goes on, and how many places of it have failed.
        self._next = 0
        self._failed = 0
        self._rounds = 0
        self._up_at = now
        self._is_refused = False
        self._after_s = 0.0

    @property
    def is_up(self) -> bool:
        """Whether a link is up."""
        return self._state is _State.UP

    def set_places(self, places: Sequence[Any], now: float) -> None:
        """Learn other places; if it waits, they are tried at once."""
        if tuple(places) == self._places:
            return
        self._places = tuple(places)
        self._next = 0
        self.hurry(now)

    def hurry(self, now: float) -> None:
        """Do not wait any longer: something has changed for the better."""
        self._failed = self._rounds = 0
        if self._state is _State.WAITING:
            self._due = now

    def stop(self) -> None:
        """Keep nothing up any more."""
        self._state = _State.STOPPED
        self._effects.clear()

    def receive_up(self, now: float, *, is_called: bool) -> None:
        """Learn of a link; `is_called`: it is what came of the call."""
        self._is_under_way &= not is_called
        if self._state in (_State.STOPPED, _State.UP):
            return
        if self._effects:
            # Nobody has taken the call, so it will not be made.
            self._effects.clear()
            self._is_under_way = False
        self._state = _State.UP
        self._up_at = now

    def receive_down(self, now: float, *, retryable: bool = True) -> None:
        """Learn that the link has ended."""
        if self._state is not _State.UP:
            return
        if now - self._up_at >= self._waits.steady_s:
            self._rounds = 0
        self._failed = 0
        if not retryable:
            self._wait(now, self._waits.refused_s)
        elif self._rounds:
            self._wait_a_round(now)
        else:
            # Many have lost their links at the same moment.
            self._rounds = 1
            self._state = _State.WAITING
            self._due = now + self._waits.first_s * self._chance.random()

    def receive_failure(self, now: float, *, retryable: bool, after_s: float | None = None) -> None:
        """Learn that the call has failed."""
        self._is_under_way = False
        if self._state is not _State.CALLING:
            return
        self._is_refused |= not retryable
        self._after_s = max(self._after_s, after_s or 0.0)
        self._next += 1
        self._failed += 1
        if self._failed < len(self._places):
            self._call()
            return
        if self._is_refused:
            self._wait(now, max(self._waits.refused_s, self._after_s))
        else:
            self._wait_a_round(now)

    def get_timer(self) -> float | None:
        """Return when `handle_timer` is wanted."""
        return self._due if self._state is _State.WAITING and self._places else None

    def handle_timer(self, now: float) -> None:
        """Begin a round if it is due."""
        timer = self.get_timer()
        if timer is not None and now >= timer:
            self._failed = 0
            self._is_refused = False
            self._after_s = 0.0
            self._call()

    def take_effects(self) -> list[Call]:
        """Take what is to be done."""
        effects, self._effects = self._effects, []
        return effects

    def _call(self) -> None:
        self._state = _State.CALLING
        if not self._is_under_way:
            self._is_under_way = True
            self._effects.append(Call(self._places[self._next % len(self._places)]))

    def _wait_a_round(self, now: float) -> None:
        self._rounds += 1
        self._wait(now, max(self._waits.grow_s(self._rounds), self._after_s))

    def _wait(self, now: float, longest_s: float) -> None:
        self._state = _State.WAITING
        self._due = now + max(self._after_s, shorten(longest_s, self._chance))


class Dialer:
    """Calls by a carrier, for its owner."""

    def __init__(
        self,
        carrier: Carrier,
        claim: Identity,
        places: Sequence[Any],
        chance: Chance,
        failed: Callable[[LinkError], None] | None = None,
    ) -> None:
        """Begin to call; never within this call.

        Args:
            carrier: By what; its `Member.accept` gets the links, as always.
            claim: Who must answer.
            places: Where the member may be, as `Carrier.dial` takes it, the best first.
            chance: For the waits.
            failed: Called with each failure; for log and status.
        """
        self._carrier = carrier
        self._claim = claim
        self._failed = failed
        self._core = DialerCore(places, chance, carrier.now())
        self._link: Link | None = None
        self._is_stopped = False
        self._timer: Timer | None = None
        self._settle()

    @property
    def link(self) -> Link | None:
        """The link that is up."""
        return self._link

    def set_places(self, places: Sequence[Any]) -> None:
        """As `DialerCore.set_places`."""
        self._core.set_places(places, self._carrier.now())
        self._settle()

    def hurry(self) -> None:
        """As `DialerCore.hurry`."""
        self._core.hurry(self._carrier.now())
        self._settle()

    def adopt(self, link: Link) -> None:
        """Learn that the member itself has called: nobody is called until that link ends.

        Of two links adopt the one that is kept, before the other is closed (`is_kept`).
        """
        assert link.peer == self._claim, f"{link.peer} is not {self._claim}"
        if not self._is_stopped and not link.is_down:
            self._take(link, is_called=False)

    def _take(self, link: Link, *, is_called: bool) -> None:
        self._link = link
        self._core.receive_up(self._carrier.now(), is_called=is_called)
        link.watch_end(lambda down: self._lose(link, down))
        self._settle()

    def stop(self) -> None:
        """Keep nothing up any more; a link that is up is the owner's to close."""
        self._is_stopped = True
        self._core.stop()
        self._settle()

    def _lose(self, link: Link, down: Down) -> None:
        if link is self._link:
            self._link = None
            retryable = down.reason.is_retryable
            self._core.receive_down(self._carrier.now(), retryable=retryable)
            self._settle()

    def _settle(self) -> None:
        for call in self._core.take_effects():
            self._carrier.dial(call.place, self._claim, self._done)
        if self._timer is not None:
            self._timer.cancel()
        when = self._core.get_timer()
        self._timer = None if when is None else self._carrier.call_at(when, self._handle_timer)

    def _handle_timer(self) -> None:
        self._timer = None
        self._core.handle_timer(self._carrier.now())
        self._settle()

    def _done(self, outcome: Link | LinkError) -> None:
        now = self._carrier.now()
        if isinstance(outcome, LinkError):
            if self._failed is not None and not self._is_stopped:
                self._failed(outcome)
            self._core.receive_failure(now, retryable=outcome.retryable, after_s=outcome.after_s)
        elif self._is_stopped:
            outcome.close(Reason.CLOSED, "not wanted any more")
        elif self._link is not None:
            # One that was adopted meanwhile; the owner knows of both.
            self._core.receive_up(now, is_called=True)
        elif outcome.is_down:
            # Its owner did not want it.
            self._core.receive_failure(now, retryable=True)
        else:
            self._take(outcome, is_called=True)
        self._settle()


def is_kept(own: Identity, link: Link, other: Link) -> bool:
    """Tell which of two links to one peer is kept when both sides have dialed: the same at both.

    It is the one that the member with the smaller name has dialed; but never one that is silent,
    has ended, or is of an earlier life of the peer's process than the other.

    Args:
        own: The own name.
        link: The newer one.
        other: The older one.

    Returns:
        Whether the newer one is kept, and the other closed with `Reason.REPLACED`.
    """
    assert link.peer == other.peer
    if other.is_down or other.is_silent or other.boot != link.boot:
        return True
    if link.is_dialed == other.is_dialed:
        # The same side has dialed again: it has lost the older one.
        return True
    return link.is_dialed == (own.format() < link.peer.format())
