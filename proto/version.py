"""The version of what client and agent say to each other at the door, and its history.

Invariants:

1. A number that was ever on the wire keeps its meaning; a new meaning is a new number.
2. Every change of frames, operations, control items or wire codes adds a line below.

History:

    1   2026-11-24   first version
        2026-11-26   CHALLENGE, PROVE, UNREAD; BIND with `scope`; still 1, as nothing was released
"""

from __future__ import annotations

from typing import Final

#: The newest version that this code speaks.
VERSION: Final = 1

#: The oldest version that this code still understands.
VERSION_OLDEST: Final = 1


def is_spoken(version: int) -> bool:
    """Tell whether this code understands `version`."""
    return VERSION_OLDEST <= version <= VERSION
