"""Loaned buffers: a body that is written where it is sent from.

Invariants:

1. A loan that was given is good until it is sent or released: an agent that dies, a socket that
   closes, and every refusal leave what was written in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from .._datapath import Draft
from ..proto.errors import InvalidArgument

if TYPE_CHECKING:
    from .ancillary import Beside
    from .sending import Address, Sending


class SendLoan(Draft):
    """A buffer for the body of one message; `memoryview(loan)` is where to write it.

    It holds zeros, or what another body left there, at first. `len(loan)` is the size asked for.
    """

    __slots__ = ("_address", "_beside", "_flags", "_route", "_sender", "_source")

    def __init__(  # noqa: PLR0913 (the parts of one message)
        self,
        nbytes: int,
        sender: Sending,
        route: tuple[int, bytes],
        source: bytes,
        beside: Beside,
        flags: int,
        address: Address,
    ) -> None:
        """Keep what the message will need; `Socket.loan` makes it."""
        self._sender = sender
        self._route = route
        self._source = source
        self._beside = beside
        self._flags = flags
        self._address = address

    def send(self, length: int | None = None) -> int:
        """Send what was written, without copying it, and give the buffer away; return its size.

        After an error nothing was sent, and the loan is as it was: it can be sent again.

        Args:
            length: How many bytes from the start; by default all.

        Raises:
            BufferError: A view of the loan is still in use.
            ValueError: The loan was sent or released before.
            InvalidArgument: More bytes than there are. EINVAL.
            BusError: As `Socket.sendmsg`.
        """
        size = len(self) if length is None else length
        if not 0 <= size <= len(self):
            raise InvalidArgument(f"{size} bytes cannot be sent of a loan of {len(self)}")
        self._sender._send_loan(
            self, size, self._route, self._source, self._beside, self._flags, self._address
        )
        return size

    def __enter__(self) -> Self:
        """Return the loan; it is released at the end, unless it was sent."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Release."""
        self.release()
