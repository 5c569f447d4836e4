"""Frames of the door: what client and agent say to each other, one msgpack list a packet.

    1 HELLO    version, resume, tx_bytes, rx_bytes                          client, first
    2 WELCOME  version, endpoint, provisional, token, epoch, tx_bytes,      agent, first; with the
               rx_bytes, resumed, node                                      TX ring, RX ring, line
    3 CALL     serial, op, {args}                                           client
    4 RESULT   serial, errno, value or message, code                        agent, in their order
    5 CLOSED   code, text                                                   agent, last

Invariants:

1. `decode(encode(frame)) == frame`.
2. `decode` raises `RemoteProtocolError` and nothing else. Arguments of a call are checked against
   `ARGUMENTS`: a missing one, an unknown one and one of another type are errors.
3. A frame is never larger than `FRAME_BYTES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, TypeAlias, assert_never

from . import codec
from .codec import ERRNO_MAX, U32_MAX, Fields
from .errors import BusError, CloseCode, RemoteProtocolError, error_for, from_wire, to_wire
from .limits import (
    ADDRESS_BYTES,
    CONTROL_ITEM_BYTES,
    CONTROL_ITEMS,
    IDENTITY_BYTES,
    REASON_BYTES,
    RING_BYTES_MAX,
    RING_BYTES_MIN,
    RX_RING_BYTES,
    TOKEN_BYTES,
    TX_RING_BYTES,
    UNREAD_SENDERS,
)
from .text import clip
from .version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class FrameKind(IntEnum):
    """The numbers of the frames."""

    HELLO = 1
    WELCOME = 2
    CALL = 3
    RESULT = 4
    CLOSED = 5


class Op(IntEnum):
    """What a client may ask of its agent."""

    #: Be an endpoint of a bus.
    ATTACH = 1
    #: Create a bus and be its master (R6).
    BIND = 2
    #: Send a message that carries control items (D5). The result is `{"owned": [address, ...]}`:
    #: the unique address chosen for each SCM_OWNED_ADDR without one, in their order.
    CONTROL = 3
    OPTION_SET = 4
    OPTION_GET = 5
    #: Close one direction (D20).
    SHUTDOWN = 6
    #: List buses, endpoints, names and more. All rows may be larger than one frame, so the result
    #: is `{"rows": [...], "next": number or None}`: as many rows as fit, from `after` on (the
    #: index of the first row wanted, 0 if absent), and the `after` of the next call, None at the
    #: end. Rows that come or go meanwhile shift the others; each answer is true by itself.
    LIST = 7
    STATUS = 8
    #: Leave in good order: flush, then end.
    CLOSE = 9
    #: Ask the cluster's master for what to sign: `{"nonce", "cluster", "node", "endpoint"}`.
    CHALLENGE = 10
    #: Be the principal of a certificate, by a signature over `operation.endpoint_claim`; before
    #: ATTACH and BIND. The result is `{"principal": name}`.
    PROVE = 11
    #: Tell senders that nobody will read what the client has taken from its ring (D20).
    UNREAD = 12


_OPTIONAL: Final = type(None)

#: Arguments of each operation with the types that each may have; who may be None may be absent.
ARGUMENTS: Final[Mapping[Op, Mapping[str, tuple[type, ...]]]] = {
    # The path of the bus.
    Op.ATTACH: {"path": (bytes,)},
    # A packed sockaddr_bus, and the options of the bus.
    Op.BIND: {"address": (bytes,), "options": (dict, _OPTIONAL)},
    # `dst` and `src` are addresses within the bus; `items` are [type, data] of level BUS_SOCKET.
    Op.CONTROL: {
        "dst": (bytes,),
        "src": (bytes, _OPTIONAL),
        "items": (list,),
        "body": (bytes,),
        "serial": (int, _OPTIONAL),
        "reply_to": (int, _OPTIONAL),
        "deadline_ms": (int, _OPTIONAL),
    },
    Op.OPTION_SET: {"level": (int,), "name": (int,), "value": (int, bytes, _OPTIONAL)},
    Op.OPTION_GET: {"level": (int,), "name": (int,)},
    # The numbers of SHUT_RD, SHUT_WR, SHUT_RDWR.
    Op.SHUTDOWN: {"how": (int,)},
    Op.LIST: {"what": (str,), "path": (bytes, _OPTIONAL), "after": (int, _OPTIONAL)},
    Op.STATUS: {},
    Op.CLOSE: {},
    Op.CHALLENGE: {},
    # DER, the own certificate first; ECDSA with SHA-256, or Ed25519.
    Op.PROVE: {"chain": (list,), "signature": (bytes,)},
    # Of each sender [source within the bus, first and last sequence number, count]; and why.
    Op.UNREAD: {"messages": (list,), "reason": (str,)},
}


@dataclass(frozen=True, slots=True)
class Hello:
    """A client begins, or resumes what it was before its agent was lost."""

    version: int = VERSION
    resume: bytes | None = None
    tx_bytes: int = TX_RING_BYTES
    rx_bytes: int = RX_RING_BYTES


@dataclass(frozen=True, slots=True)
class Welcome:
    """The agent accepts; descriptors come with it: TX ring, RX ring, line."""

    version: int
    endpoint: int
    provisional: bytes
    token: bytes
    epoch: int
    tx_bytes: int
    rx_bytes: int
    resumed: bool
    node: str


@dataclass(frozen=True, slots=True)
class Call:
    """The client asks for something; the result bears the same number."""

    serial: int
    op: Op
    args: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a call: `errno` 0 and a value, or an errno with a message as value.

    `code` is the wire code of the refusal, which tells apart classes that share an errno.
    """

    serial: int
    errno: int = 0
    value: Any = field(default=None, hash=False)
    code: int = 0

    @classmethod
    def refused(cls, serial: int, error: BusError) -> Result:
        """Return the result that tells a refusal."""
        return cls(serial, error.errno or 0, clip(error.message, REASON_BYTES), to_wire(error))

    @property
    def is_ok(self) -> bool:
        """Whether the call was carried out."""
        return self.errno == 0

    def to_error(self) -> BusError:
        """Return the error of a refusal, of its own class if both sides know that."""
        error = from_wire(self.code, self.value)
        return error if error.errno == self.errno else error_for(self.errno, self.value)


@dataclass(frozen=True, slots=True)
class Closed:
    """The last that an agent says, and why."""

    code: CloseCode
    text: str = ""


Frame: TypeAlias = Hello | Welcome | Call | Result | Closed


def encode(frame: Frame) -> bytes:
    """Return the packet of a frame.

    Raises:
        TooBig: It is larger than a packet may be. EMSGSIZE.
        InvalidArgument: It holds what cannot stand in a packet. EINVAL.
    """
    return codec.encode(_fields_of(frame))


def _fields_of(frame: Frame) -> list[object]:
    match frame:
        case Hello(version, resume, tx_bytes, rx_bytes):
            return [int(FrameKind.HELLO), version, resume, tx_bytes, rx_bytes]
        case Welcome():
            return [
                int(FrameKind.WELCOME),
                frame.version,
                frame.endpoint,
                frame.provisional,
                frame.token,
                frame.epoch,
                frame.tx_bytes,
                frame.rx_bytes,
                frame.resumed,
                frame.node,
            ]
        case Call(serial, op, args):
            return [int(FrameKind.CALL), serial, int(op), dict(args)]
        case Result(serial, errno, value, code):
            return [int(FrameKind.RESULT), serial, errno, value, code]
        case Closed(code, text):
            return [int(FrameKind.CLOSED), int(code), clip(text, REASON_BYTES)]
        case _:
            assert_never(frame)


def _take_hello(fields: Fields) -> Hello:
    return Hello(
        fields.take_int(0, U32_MAX),
        fields.take_maybe_bytes(TOKEN_BYTES, TOKEN_BYTES),
        fields.take_int(RING_BYTES_MIN, RING_BYTES_MAX),
        fields.take_int(RING_BYTES_MIN, RING_BYTES_MAX),
    )


def _take_welcome(fields: Fields) -> Welcome:
    return Welcome(
        version=fields.take_int(0, U32_MAX),
        endpoint=fields.take_int(),
        provisional=fields.take_bytes(1, ADDRESS_BYTES),
        token=fields.take_bytes(TOKEN_BYTES, TOKEN_BYTES),
        epoch=fields.take_int(),
        tx_bytes=fields.take_int(RING_BYTES_MIN, RING_BYTES_MAX),
        rx_bytes=fields.take_int(RING_BYTES_MIN, RING_BYTES_MAX),
        resumed=fields.take_bool(),
        node=fields.take_str(IDENTITY_BYTES),
    )


def _take_call(fields: Fields) -> Call:
    serial, op = fields.take_int(), fields.take_enum(Op)
    args = fields.take_map()
    known = ARGUMENTS[op]
    for name in args.keys() - known.keys():
        fields.fail(f"{op.name} has no argument {name[:40]!a}")
    for name, types in known.items():
        if type(args.get(name)) not in types:
            fields.fail(f"{op.name} without a fitting argument {name}")
    if op is Op.CONTROL:
        check_items(args["items"])
    elif op is Op.UNREAD:
        _check_unread(args["messages"])
        if len(args["reason"].encode()) > REASON_BYTES:
            fields.fail("a reason that is too long")
    return Call(serial, op, args)


def check_items(items: list[Any]) -> None:
    """Check that each is [type, data]; what they say is for `control.decode`."""
    if len(items) > CONTROL_ITEMS:
        raise RemoteProtocolError(f"{len(items)} control items", CloseCode.LIMIT)
    for item in items:
        if (
            type(item) is list
            and len(item) == 2
            and type(item[0]) is int
            and type(item[1]) is bytes
            and 0 <= item[0] <= U32_MAX
            and len(item[1]) <= CONTROL_ITEM_BYTES
        ):
            continue
        # It is malformed: say how.
        fields = Fields("control item", item)
        fields.take_int(0, U32_MAX)
        fields.take_bytes(0, CONTROL_ITEM_BYTES)
        fields.end()


def _check_unread(rows: list[Any]) -> None:
    """Check that each is what it says of one sender."""
    if len(rows) > UNREAD_SENDERS:
        raise RemoteProtocolError(f"{len(rows)} senders of unread messages", CloseCode.LIMIT)
    for row in rows:
        fields = Fields("unread", row)
        fields.take_bytes(1, ADDRESS_BYTES)
        first = fields.take_int(1)
        last = fields.take_int(first)
        fields.take_int(1, last - first + 1)
        fields.end()


def take_result(fields: Fields) -> Result:
    """Take what follows the kind of a RESULT, here and in the other languages."""
    serial, errno = fields.take_int(), fields.take_int(0, ERRNO_MAX)
    value = fields.take_any() if errno == 0 else fields.take_str(REASON_BYTES)
    code = fields.take_int(0, U32_MAX)
    if errno == 0 and code != 0:
        fields.fail("code of a refusal that is none")
    return Result(serial, errno, value, code)


def take_closed(fields: Fields) -> Closed:
    """Take what follows the kind of a CLOSED."""
    return Closed(fields.take_enum(CloseCode), fields.take_str(REASON_BYTES))


_DECODERS: Final[dict[FrameKind, Callable[[Fields], Frame]]] = {
    FrameKind.HELLO: _take_hello,
    FrameKind.WELCOME: _take_welcome,
    FrameKind.CALL: _take_call,
    FrameKind.RESULT: take_result,
    FrameKind.CLOSED: take_closed,
}


def decode(data: bytes) -> Frame:
    """Return the frame of a packet.

    Raises:
        RemoteProtocolError: The packet is no frame.
    """
    fields = Fields("frame", codec.decode(data))
    frame = _DECODERS[fields.take_enum(FrameKind)](fields)
    fields.end()
    return frame
