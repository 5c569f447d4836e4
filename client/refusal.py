"""What a caller is told when the bus refuses a message: which address, which limit, what to do.

Invariants:

1. The class follows from the errno alone (`proto.errors.error_for`); this only finds the words.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from ..proto.address import format_within
from ..proto.errors import BusError, error_for
from ..proto.limits import MESSAGE_BYTES
from .words import show_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..proto.address import BusAddress

_WORDS: Final = {
    errno.EHOSTUNREACH: "nobody owns {where}",
    errno.EHOSTDOWN: "{where} is out of reach for now",
    errno.EPERM: "the policy of the cluster does not allow sending to {where}",
    errno.EADDRNOTAVAIL: "this endpoint does not own the source {source}",
    errno.EDESTADDRREQ: "nobody can send to {where}",
    errno.EAGAIN: "{where} has no room now; the descriptor is writable when it has",
    errno.ETIMEDOUT: "{where} had no room for as long as the timeout",
    errno.EDQUOT: "too much of this principal's lies unread (sending to {where}); wait for readers",
    errno.EDOM: "the bus has another width than {bits} bits",
    errno.EOPNOTSUPP: "{count} descriptors cannot go to {where}: it is on another node, or a memfd "
    "among them lacks seals and could still change; add F_SEAL_WRITE, F_SEAL_SHRINK, F_SEAL_GROW "
    "and F_SEAL_SEAL, or make it with afbus.sealed_memfd",
    errno.EMSGSIZE: "{size} bytes to {where} are too many: at most {limit}, and addresses and "
    "terms must fit into the ring; pass more as a sealed memfd by SCM_RIGHTS",
    errno.EPIPE: "the socket was shut down for sending",
    errno.ECONNABORTED: "nobody knows whether the message to {where} arrived: the agent died, or "
    "gave no verdict in time",
    errno.EINVAL: "the agent finds the message to {where} malformed",
}

#: The same errno from a multicast has another reason (D7).
_MULTICAST_WORDS: Final = {
    errno.EPERM: "sending to {where} is not granted; the master of the bus can grant it",
    errno.EOPNOTSUPP: "{count} descriptors cannot go to {where}: they go to one endpoint at a time",
}


def refusal(
    number: int,
    where: BusAddress,
    *,
    size: int = 0,
    source: bytes = b"",
    descriptors: Sequence[int] = (),
) -> BusError:
    """Return the error for a message that was refused.

    Args:
        number: The errno, positive.
        where: The destination.
        size: Bytes of the body.
        source: The source that the sender had chosen.
        descriptors: What went with it.
    """
    words = _WORDS.get(number, f"{os.strerror(number)} (sending to {{where}})")
    if where.is_multicast:
        words = _MULTICAST_WORDS.get(number, words)
    text = words.format(
        where=show_address(where),
        source=format_within(source),
        bits=8 * len(where.address),
        count=len(descriptors),
        size=size,
        limit=MESSAGE_BYTES,
    )
    return error_for(number, text)
