"""When and where to try to reach somebody who has several places: in turns, with longer pauses.

Invariants:

1. All places are tried before the first pause, and each pause is longer than the last, up to a
   limit; success begins anew.
2. Pauses are spread at random, so that many who lost one peer do not come back at once (case 30).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from random import Random

#: First and longest pause, in seconds.
PAUSE_S: Final = 0.2
PAUSE_S_MAX: Final = 5.0
#: After a refusal that trying again does not help against; somebody may help.
REFUSED_S: Final = 30.0


class Redial:
    """The tries to reach one peer."""

    def __init__(self, places: tuple[str, ...], random: Random) -> None:
        """Begin with the first place; there must be one."""
        assert places, "somebody without a place cannot be reached"
        self._places = places
        self._random = random
        self._tries = 0
        self._pause_s = 0.0

    def set_places(self, places: tuple[str, ...]) -> None:
        """Try these from now on, without a pause if they are new."""
        assert places, "somebody without a place cannot be reached"
        if places != self._places:
            self._places = places
            self.succeed()

    @property
    def place(self) -> str:
        """Where to try next."""
        return self._places[self._tries % len(self._places)]

    def succeed(self) -> None:
        """It was reached."""
        self._pause_s = 0.0
        self._tries = 0

    def fail(self, *, is_refused: bool = False) -> float:
        """It was not reached; return how long to wait before the next try, in seconds.

        Args:
            is_refused: Whether the same try cannot succeed unless something is changed.
        """
        self._tries += 1
        if is_refused:
            self._pause_s = REFUSED_S
        elif self._tries % len(self._places) == 0:
            self._pause_s = min(max(PAUSE_S, 2 * self._pause_s), PAUSE_S_MAX)
        else:
            return 0.0
        return self._pause_s * self._random.uniform(0.5, 1.0)
