"""Calls that take several steps, because somebody else must be asked in between.

Such a call is a generator: it yields the ticket of what it waits for, is resumed with the result,
and returns what its caller is told. It raises `BusError` for a refusal, and undoes before that
what its former steps have done.

    def bind(...) -> Steps:
        result = yield uplink.bind(...)      # a ticket
        if not result.is_ok:
            raise result.to_error()
        return {...}

Invariants:

1. A call ends once, by a value or an error.
2. Between two steps anything may have changed; what was looked at before is looked at again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from typing import TypeAlias

from ..proto.errors import BusError
from ..proto.frames import Result

#: What a call waits for: made by whoever answers it, and never used twice.
Ticket: TypeAlias = Hashable
Steps: TypeAlias = Generator[Ticket, Result, object]
#: Called once with the value or the error.
Done: TypeAlias = Callable[[object], None]


class Tickets:
    """Who waits for which answer."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self._waiting: dict[Ticket, tuple[Steps, Done]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def run(self, steps: Steps, done: Done) -> None:
        """Go up to the first ticket, or to the end; `done` may be called before this returns."""
        self._go(steps, done, None)

    def answer(self, ticket: Ticket, result: Result) -> None:
        """Resume who waits for this; harmless if nobody does."""
        waiting = self._waiting.pop(ticket, None)
        if waiting is not None:
            self._go(*waiting, result)

    def _go(self, steps: Steps, done: Done, result: Result | None) -> None:
        try:
            ticket = next(steps) if result is None else steps.send(result)
        except StopIteration as end:
            done(end.value)
        except BusError as error:
            done(error)
        else:
            assert ticket not in self._waiting, "two wait for one answer"
            self._waiting[ticket] = (steps, done)


def demand(result: Result) -> object:
    """Return the value of a result; raise the error of a refusal."""
    if not result.is_ok:
        raise result.to_error()
    return result.value
