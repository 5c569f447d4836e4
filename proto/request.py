"""What afbus's own client asks a bus's master, and what afbus's own master answers.

Requests are ordinary messages to the master (R1); what they ask for is granted by control items of
the answer. A master may speak another protocol: this one is what ours speak. Bodies are msgpack
`[kind, fields...]` and `[errno, message, {detail}]`.

    1 JOIN         claims                           6 PUBLISH   terms, bits
    2 OWN          name, flags                      7 NOTICES   on
    3 RELEASE      name                             8 MONITOR   on
    4 SUBSCRIBE    terms, bits, overflow, deadline  9 LEAVE
    5 UNSUBSCRIBE  terms, bits

Invariants:

1. `decode(encode(request)) == request`, and as much for answers.
2. Decoders raise `RemoteProtocolError` and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, TypeAlias, assert_never

from . import codec
from .codec import ERRNO_MAX, U32_MAX, Fields, judging
from .errors import BusError, InvalidArgument, NameTooLong, error_for, from_wire, to_wire
from .limits import ADDRESS_BYTES, CLAIMS_BYTES, REASON_BYTES, REQUEST_BYTES
from .match import (
    Overflow,
    What,
    check_overflow,
    check_what,
    encode_what,
    take_overflow,
    take_what,
)
from .names import NO_FLAGS, NameFlags
from .text import clip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class RequestKind(IntEnum):
    """The numbers of the requests."""

    JOIN = 1
    OWN = 2
    RELEASE = 3
    SUBSCRIBE = 4
    UNSUBSCRIBE = 5
    PUBLISH = 6
    NOTICES = 7
    MONITOR = 8
    LEAVE = 9


def _check_name(name: bytes) -> None:
    if not name or name.endswith(b"\0"):
        raise InvalidArgument("a name is not empty and does not end in NUL")
    if len(name) > ADDRESS_BYTES:
        raise NameTooLong(f"name of {len(name)} bytes, limit {ADDRESS_BYTES}")


@dataclass(frozen=True, slots=True)
class Join:
    """Let me in (R10). `claims` proves who asks, where credentials do not: opaque bytes."""

    claims: bytes = b""


@dataclass(frozen=True, slots=True)
class Own:
    """Let me own a name, by the rules of `names.py` (D4)."""

    name: bytes
    flags: NameFlags = NO_FLAGS

    def __post_init__(self) -> None:
        """Check the name; InvalidArgument, NameTooLong."""
        _check_name(self.name)


@dataclass(frozen=True, slots=True)
class Release:
    """I give up a name, or the wait for it."""

    name: bytes

    def __post_init__(self) -> None:
        """Check the name; InvalidArgument, NameTooLong."""
        _check_name(self.name)


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Let me receive what has all of these terms or bits (R15, D9)."""

    what: What
    overflow: Overflow = Overflow.GAP
    deadline_ms: int = 0

    def __post_init__(self) -> None:
        """Check bits and deadline; InvalidArgument."""
        check_what(self.what)
        check_overflow(self.overflow, self.deadline_ms)


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """I no longer want this."""

    what: What

    def __post_init__(self) -> None:
        """Check bits; InvalidArgument."""
        check_what(self.what)


@dataclass(frozen=True, slots=True)
class Publish:
    """Let me send what has at least these terms or bits (R21, D9)."""

    what: What

    def __post_init__(self) -> None:
        """Check bits; InvalidArgument."""
        check_what(self.what)


@dataclass(frozen=True, slots=True)
class NoticesRequest:
    """Let me read notices, or no longer (D15)."""

    on: bool = True


@dataclass(frozen=True, slots=True)
class MonitorRequest:
    """Let me read copies of everything, or no longer (D19)."""

    on: bool = True


@dataclass(frozen=True, slots=True)
class Leave:
    """I leave the bus, in good order."""


Request: TypeAlias = (
    Join
    | Own
    | Release
    | Subscribe
    | Unsubscribe
    | Publish
    | NoticesRequest
    | MonitorRequest
    | Leave
)


def encode(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        TooBig: It does not fit into an inline message. EMSGSIZE.
    """
    return codec.encode(_fields_of(request), REQUEST_BYTES)


def _fields_of(request: Request) -> list[object]:  # noqa: PLR0911 (one line a request)
    match request:
        case Join(claims):
            return [int(RequestKind.JOIN), claims]
        case Own(name, flags):
            return [int(RequestKind.OWN), name, int(flags)]
        case Release(name):
            return [int(RequestKind.RELEASE), name]
        case Subscribe(what, overflow, deadline_ms):
            kind = int(RequestKind.SUBSCRIBE)
            return [kind, *encode_what(what), int(overflow), deadline_ms]
        case Unsubscribe(what):
            return [int(RequestKind.UNSUBSCRIBE), *encode_what(what)]
        case Publish(what):
            return [int(RequestKind.PUBLISH), *encode_what(what)]
        case NoticesRequest(on):
            return [int(RequestKind.NOTICES), on]
        case MonitorRequest(on):
            return [int(RequestKind.MONITOR), on]
        case Leave():
            return [int(RequestKind.LEAVE)]
        case _:
            assert_never(request)


_DECODERS: Final[dict[RequestKind, Callable[[Fields], Request]]] = {
    RequestKind.JOIN: lambda fields: Join(fields.take_bytes(0, CLAIMS_BYTES)),
    RequestKind.OWN: lambda fields: Own(
        fields.take_bytes(1, ADDRESS_BYTES), fields.take_enum(NameFlags)
    ),
    RequestKind.RELEASE: lambda fields: Release(fields.take_bytes(1, ADDRESS_BYTES)),
    RequestKind.SUBSCRIBE: lambda fields: Subscribe(take_what(fields), *take_overflow(fields)),
    RequestKind.UNSUBSCRIBE: lambda fields: Unsubscribe(take_what(fields)),
    RequestKind.PUBLISH: lambda fields: Publish(take_what(fields)),
    RequestKind.NOTICES: lambda fields: NoticesRequest(fields.take_bool()),
    RequestKind.MONITOR: lambda fields: MonitorRequest(fields.take_bool()),
    RequestKind.LEAVE: lambda _: Leave(),
}


def decode(data: bytes) -> Request:
    """Return the request of a body.

    Raises:
        RemoteProtocolError: The body is no request.
    """
    fields = Fields("request", codec.decode(data, REQUEST_BYTES))
    kind = fields.take_enum(RequestKind)
    with judging(f"request {kind.name}"):
        request = _DECODERS[kind](fields)
    fields.end()
    return request


@dataclass(frozen=True, slots=True)
class Answer:
    """What the master answers: `errno` 0 and some detail, or an errno and why.

    `code` is the error's own, as several share an errno; 0 for one that has none.
    """

    errno: int = 0
    message: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict, hash=False)
    code: int = 0

    @classmethod
    def refused(cls, error: BusError) -> Answer:
        """Return the answer that tells a refusal."""
        return cls(error.errno or 0, clip(error.message, REASON_BYTES), code=to_wire(error))

    @property
    def is_ok(self) -> bool:
        """Whether the request was granted."""
        return self.errno == 0

    def to_error(self) -> BusError:
        """Return the error of a refusal, of its own class if both sides know that."""
        error = from_wire(self.code, self.message)
        return error if error.errno == self.errno else error_for(self.errno, self.message)

    def encode(self) -> bytes:
        """Return the body of the answer.

        Raises:
            TooBig: It does not fit into an inline message. EMSGSIZE.
            InvalidArgument: The detail cannot stand in a packet. EINVAL.
        """
        value = [self.errno, self.message, dict(self.detail), self.code]
        return codec.encode(value, REQUEST_BYTES)

    @classmethod
    def decode(cls, data: bytes) -> Answer:
        """Return the answer of a body.

        Raises:
            RemoteProtocolError: The body is no answer.
        """
        fields = Fields("answer", codec.decode(data, REQUEST_BYTES))
        errno, message = fields.take_int(0, ERRNO_MAX), fields.take_str(REASON_BYTES)
        detail, code = fields.take_map(), fields.take_int(0, U32_MAX)
        fields.end()
        return cls(errno, message, detail, code)
