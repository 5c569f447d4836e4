"""When calls of a socket may go to its rings directly, past all that is written in Python.

`send` and `recv` are native (`_datapath.Port`). They ask the halves of the socket for what is not
plain, and those say afterwards whether the rings are to be used directly.

Invariants:

1. While something is to be received before what is in the rings, they are not used directly.
2. Rings that were replaced are closed, and then nothing is sent or received by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._datapath import Port, Rings

if TYPE_CHECKING:
    from .endpoint import Endpoint


class Direct(Port):
    """What both halves of a `Socket` stand on."""

    _endpoint: Endpoint
    #: How long calls wait, in seconds.
    _timeout: float | None
    #: Whether SHUT_RD was said.
    _is_deaf: bool

    def _use_rings(self) -> None:
        """Use the rings directly from now on, if nothing is against it."""
        end = self._endpoint
        rings = end.rings
        is_plain = not end.local and not self._is_deaf and isinstance(rings, Rings)
        self._use(rings if is_plain else None)
