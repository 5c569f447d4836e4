"""What a member of a bus receives, as one value: a message, with all that stands beside it.

An error reply is a message that answers a request (`reply_to`) and has as its serial an errno, 1 to
4095, with a text as its body; an ordinary reply has no serial. So bodies stay opaque (R5), and a
reply never expects a reply.

Invariants:

1. Nothing that arrives is left out: descriptors have an owner, and those that were lost are told.
2. `read` raises `RemoteProtocolError` for what the agent cannot have meant, and nothing else.
"""

from __future__ import annotations

import array
import os
import socket
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from .._datapath import MSG_MONITOR
from ..proto import control
from ..proto.codec import ERRNO_MAX
from ..proto.control import (
    BUS_SOCKET,
    DestinationAddr,
    Identity,
    Item,
    MessageTerms,
    ReplyTo,
    Sequence,
    Serial,
)
from ..proto.errors import BusError, RemoteProtocolError, error_for
from ..proto.limits import REASON_BYTES
from ..proto.notice import Gap, Notice
from ..proto.text import clip

if TYPE_CHECKING:
    from .._datapath import Received
    from ..proto.address import BusAddress
    from ..proto.terms import Terms


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    `destination` is a name or a unique address, or for a multicast an address with bits, or
    without any beside `terms`. `sequence` counts what the source had accepted, from 1. `fds` are
    the reader's: `close` them, or use the message in a `with`.
    """

    body: bytes
    source: BusAddress
    destination: BusAddress | None = None
    terms: Terms | None = None
    sequence: int = 0
    serial: int = 0
    reply_to: int = 0
    #: Who sent it, as attested by the agent (D17).
    identity: Identity | None = None
    fds: tuple[int, ...] = ()
    #: Descriptors were sent along that this process had no room for.
    fds_lost: bool = False
    #: A copy of what was sent to others (D19).
    is_copy: bool = False
    #: What the bus's master commanded; the agent has carried it out (D5).
    commands: tuple[Item, ...] = field(default=(), repr=False)

    @property
    def expects_reply(self) -> bool:
        """Whether the sender waits for a reply."""
        return self.serial != 0 and self.reply_to == 0

    @property
    def is_multicast(self) -> bool:
        """Whether it was sent to whom it may concern."""
        return self.destination is not None and self.destination.is_multicast

    @property
    def error(self) -> BusError | None:
        """The error that this reply tells, None for every other message."""
        if self.reply_to == 0 or not 1 <= self.serial <= ERRNO_MAX:
            return None
        return error_for(self.serial, clip(self.body.decode("utf-8", "replace"), REASON_BYTES))

    def close(self) -> None:
        """Close the descriptors; to be called once, by whoever has not kept them."""
        for descriptor in self.fds:
            os.close(descriptor)

    def __enter__(self) -> Self:
        """Return the message; its descriptors are closed at the end."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the descriptors."""
        self.close()


@dataclass(frozen=True, slots=True)
class NoReply:
    """The endpoint that was asked is gone, and has not answered request number `serial`."""

    serial: int


Arrival: TypeAlias = Message | Gap | Notice | NoReply


def read(received: Received) -> Arrival:
    """Return what was received; descriptors in it are the caller's from now on.

    Args:
        received: As `Socket.recvmsg` returns it, with SO_BUS_DETAILS and SO_PASSCRED.

    Raises:
        RemoteProtocolError: The agent broke the rules; the descriptors are closed.
    """
    body, ancdata, flags, source = received
    fds: tuple[int, ...] = ()
    for level, kind, data in ancdata:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += tuple(array.array("i", data))
    try:
        items = [_decode(*item) for item in ancdata if item[0] == BUS_SOCKET]
        arrival = _assemble(body, source, items)
    except RemoteProtocolError:
        for descriptor in fds:
            os.close(descriptor)
        raise
    if isinstance(arrival, Message) and (fds or flags):
        is_lost, is_copy = bool(flags & socket.MSG_CTRUNC), bool(flags & MSG_MONITOR)
        return replace(arrival, fds=fds, fds_lost=is_lost, is_copy=is_copy)
    return arrival


# These three repeat from message to message.
_decode_often = lru_cache(1024)(control.decode)
_OFTEN: Final = frozenset((control.SCM_IDENTITY, control.SCM_DST_ADDR, control.SCM_TERMS))


def _decode(level: int, kind: int, data: bytes) -> Item:
    decode = _decode_often if kind in _OFTEN else control.decode
    return decode(level, kind, data)


def _assemble(body: bytes, source: BusAddress, items: list[Item]) -> Arrival:
    fields: dict[str, Any] = {}
    commands: list[Item] = []
    for item in items:
        match item:
            case Gap():
                return item
            case Identity():
                fields["identity"] = item
            case Sequence(value):
                fields["sequence"] = value
            case DestinationAddr(address):
                fields["destination"] = address
            case MessageTerms(terms):
                fields["terms"] = terms
            case Serial(value):
                fields["serial"] = value
            case ReplyTo(value):
                fields["reply_to"] = value
            case _:
                commands.append(item)
    if not source.is_kernel:
        return Message(body, source, commands=tuple(commands), **fields)
    reply_to = fields.get("reply_to", 0)
    return NoReply(reply_to) if reply_to else Notice.decode(body)
