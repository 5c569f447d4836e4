"""Notices, which come from the kernel's address (R19, D15), and gap records (D12).

A notice is the body of a message: msgpack `[event, [addresses], reason, {detail}]`. A gap is a
record of its own, little endian:

    0 u64 first   8 u64 last   16 u64 count   24 u32 reason

`first` to `last` are sequence numbers of the source, `count` of them were for this receiver;
0 stands for a number that nobody knows any more.

Invariants:

1. A notice comes after the last message of its subject, a gap before every later message.
2. Decoders raise `RemoteProtocolError` and nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from . import codec
from .address import format_within
from .codec import U64_MAX, Fields, judging
from .errors import InvalidArgument, RemoteProtocolError
from .limits import ADDRESS_BYTES, ADDRESSES_PER_ENDPOINT, INLINE_BYTES, REASON_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Entries of a notice's detail, and size of each text in it.
DETAIL_ENTRIES: Final = 16

_GAP: Final = struct.Struct("<QQQI")
#: Size of the body of a gap record.
GAP_BYTES: Final = _GAP.size


class Event(IntEnum):
    """What a notice tells (D15, D16, D20, D21)."""

    #: An endpoint got its first address.
    JOINED = 1
    #: It closed in good order.
    LEFT = 2
    #: Its process died, or its agent cut it off.
    KILLED = 3
    #: Its node cannot be reached.
    NODE_LOST = 4
    #: Its node can be reached again.
    NODE_BACK = 5
    #: A grant or an address was taken from the reader.
    REVOKED = 6
    #: The reader itself was put off the bus.
    EVICTED = 7
    #: The bus has no master now.
    MASTER_LOST = 8
    #: The bus has a master again.
    MASTER_BACK = 9
    #: Messages are missing, as a gap record tells in full.
    GAP = 10
    #: A receiver left without having read all that was accepted for it.
    UNREAD = 11
    #: Nobody knows whether a message arrived.
    OUTCOME_UNKNOWN = 12
    #: The master of the cluster cannot be reached from this node: what needs it fails.
    CLUSTER_LOST = 13
    #: It can again.
    CLUSTER_BACK = 14
    #: To the master of a bus of the cluster: a name has no owner any more, says the table.
    FREED = 15


class GapReason(IntEnum):
    """Why messages are missing."""

    #: The receiver had no room.
    FULL = 1
    #: A blocking subscription let its deadline pass.
    DEADLINE = 2
    #: The agent began anew and lost what it held.
    AGENT_RESTART = 3
    #: A newer message took their place.
    CONFLATED = 4
    #: The agent cut the reader off, and what it held for it is lost; nobody counted.
    EVICTED = 5


@dataclass(frozen=True, slots=True)
class Notice:
    """One notice: what happened to the endpoint that owned the addresses `subject`, and why."""

    event: Event
    subject: tuple[bytes, ...] = ()
    reason: str = ""
    detail: Mapping[str, int | str] = field(default_factory=dict, hash=False)

    def encode(self) -> bytes:
        """Return the body of the notice.

        Raises:
            TooBig: It does not fit into an inline message. EMSGSIZE.
        """
        value = [int(self.event), list(self.subject), self.reason, dict(self.detail)]
        return codec.encode(value, INLINE_BYTES)

    @classmethod
    def decode(cls, data: bytes) -> Notice:
        """Return the notice of a body."""
        fields = Fields("notice", codec.decode(data, INLINE_BYTES))
        event = fields.take_enum(Event)
        addresses = Fields("subject of a notice", fields.take_list(ADDRESSES_PER_ENDPOINT))
        subject = []
        while addresses.is_left:
            subject.append(addresses.take_bytes(1, ADDRESS_BYTES))
        reason = fields.take_str(REASON_BYTES)
        detail = fields.take_map(DETAIL_ENTRIES)
        fields.end()
        for value in detail.values():
            if type(value) is not int and type(value) is not str:
                raise RemoteProtocolError("detail of a notice that is neither number nor text")
        return cls(event, tuple(subject), reason, detail)


@dataclass(frozen=True, slots=True)
class Gap:
    """Messages that are missing: of `first` to `last` of a source, `count` were for the reader.

    After a loss of all (AGENT_RESTART, EVICTED) nobody knows how many: see `is_counted`.
    """

    source: bytes
    first: int
    last: int
    count: int
    reason: GapReason

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            InvalidArgument: It runs backwards, or counts more than it holds. EINVAL.
        """
        if not 0 <= self.first <= self.last <= U64_MAX:
            raise InvalidArgument(f"gap from {self.first} to {self.last}")
        if not 0 <= self.count <= self.last - self.first + 1:
            raise InvalidArgument(f"gap of {self.count} in {self.first} to {self.last}")

    @property
    def is_counted(self) -> bool:
        """Whether it is known how many; if not, `count` is 0, and `last` if nothing is known."""
        return self.count > 0

    def __str__(self) -> str:
        """Return what is missing, for people."""
        why = self.reason.name.lower().replace("_", " ")
        if not self.last:
            return f"an unknown number of messages is missing ({why})"
        numbers = f"numbers {self.first} to {self.last}"
        whose = f"messages of {format_within(self.source)}"
        if not self.is_counted:
            return f"an unknown number of {whose} is missing, of {numbers} ({why})"
        return f"{self.count} {whose} are missing, {numbers} ({why})"

    def pack(self) -> bytes:
        """Return the 28 bytes of the record's body."""
        return _GAP.pack(self.first, self.last, self.count, self.reason)

    @classmethod
    def unpack(cls, source: bytes, data: bytes) -> Gap:
        """Return the gap of a record's body.

        Raises:
            RemoteProtocolError: The body is malformed.
        """
        if len(data) != GAP_BYTES:
            raise RemoteProtocolError(f"gap of {len(data)} bytes, not {GAP_BYTES}")
        first, last, count, number = _GAP.unpack(data)
        try:
            reason = GapReason(number)
        except ValueError as error:
            raise RemoteProtocolError(f"gap for reason {number}") from error
        with judging("gap"):
            return cls(source, first, last, count, reason)
