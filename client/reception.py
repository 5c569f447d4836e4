"""What is made of received messages that do not come from the rings as the caller wants them.

Invariants:

1. A gap (D12) is never left out: where its item has no room it is MessagesLost.
2. What is cut is told by MSG_TRUNC and MSG_CTRUNC.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Self

from ..proto.errors import MessagesLost
from .ancillary import find_gap, fit

if TYPE_CHECKING:
    from .._datapath import Received
    from ..proto.address import BusAddress


def fitted(message: Received, bufsize: int, size: int, ancbufsize: int) -> Received:
    """Return the message as a caller with this room gets it.

    Args:
        message: What was received.
        bufsize: What the caller calls too long.
        size: Where it is cut; beyond `bufsize` with MSG_TRUNC.
        ancbufsize: Room for items.

    Raises:
        MessagesLost: It is a gap, and its item has no room. ENOBUFS.
    """
    data, items, flags, address = message
    kept, cut = fit(items, ancbufsize)
    if (gap := find_gap(cut)) is not None:
        text = f"{gap.count} messages from {address} are missing ({gap.reason.name.lower()})"
        raise MessagesLost(text, gap=gap)
    if cut:
        flags |= socket.MSG_CTRUNC
    if len(data) > bufsize:
        flags |= socket.MSG_TRUNC
    return data[:size], kept, flags, address


def nothing() -> Received:
    """Return what is received after SHUT_RD, as of any datagram socket."""
    return b"", [], 0, None


class KeptLoan(bytes):
    """A message that is received as a loan although it lies in no ring: a notice of the client."""

    address: BusAddress
    ancdata: list[tuple[int, int, bytes]]
    flags: int

    def __new__(cls, message: Received) -> Self:
        """Make it of a received message."""
        made = super().__new__(cls, message[0])
        _, made.ancdata, made.flags, made.address = message
        return made

    def release(self) -> None:
        """Do nothing: it takes no room."""

    def __enter__(self) -> Self:
        """Return the loan."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Do nothing."""
