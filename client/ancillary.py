"""What stands beside a message that is sent: control items taken apart and checked.

Invariants:

1. An item that is unknown, malformed, given twice, or only ever received is InvalidArgument, and
   its level and type are named. None is passed over.
2. Nothing here decides who may do what; only the process's own credentials are compared, because
   nobody else can know that the caller meant them.
"""

from __future__ import annotations

import os
import socket
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..proto import control
from ..proto.address import SOCKADDR_BYTES, BusAddress
from ..proto.codec import U64_MAX
from ..proto.control import (
    BUS_SOCKET,
    SCM_DEADLINE,
    SCM_FIRST_DESCRIPTION,
    SCM_GAP,
    SCM_MULTICAST_MATCH,
    SCM_REPLY_TO,
    SCM_SERIAL,
    SCM_SRC_ADDR,
    SCM_TERMS,
)
from ..proto.errors import Denied, InvalidArgument, NotOwned, RemoteProtocolError, TooBig
from ..proto.limits import (
    ADDRESS_BYTES,
    CONTROL_ITEM_BYTES,
    CONTROL_ITEMS,
    DEADLINE_MS_MAX,
    FDS_PER_MESSAGE,
)
from ..proto.notice import GAP_BYTES, Gap
from ..proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import Buffer

#: One received item: level, type, data.
Item: TypeAlias = tuple[int, int, bytes]

#: `struct ucred`: pid, uid, gid.
UCRED: Final = struct.Struct("=iII")

#: What CMSG_SPACE adds to the data of an item, which it also rounds up to 8.
_CMSG_HEADER: Final = 16

#: Room for the item of any gap, which must never be overlooked.
GAP_SPACE: Final = _CMSG_HEADER + (GAP_BYTES + ADDRESS_BYTES + 7 & ~7)


class Beside:
    """The items of one message that is sent.

    `fds` are the caller's. `commands` are `[type, data]` in their order. `serial`, `reply_to` and
    `deadline_ms` are 0 where not given; `terms` is packed; `source` is on whatever bus it names.
    """

    __slots__ = ("_seen", "commands", "deadline_ms", "fds", "reply_to", "serial", "source", "terms")

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.commands: list[list[int | bytes]] = []
        self.serial = 0
        self.reply_to = 0
        self.deadline_ms = 0
        self.terms: bytes | None = None
        self.source: BusAddress | None = None
        self._seen: set[int] = set()

    def add(self, level: int, kind: int, data: bytes) -> None:
        """Take one item; errors as `take_apart`."""
        if level == BUS_SOCKET:
            if kind in _READERS:
                if kind in self._seen:
                    raise InvalidArgument(f"control item {level}, {kind} is given twice")
                self._seen.add(kind)
                name, read = _READERS[kind]
                setattr(self, name, read(data))
                return
            if 0 < kind < SCM_FIRST_DESCRIPTION:
                self._add_command(kind, data)
                return
        elif level == socket.SOL_SOCKET:
            if kind == socket.SCM_RIGHTS:
                self._add_descriptors(data)
                return
            if kind == socket.SCM_CREDENTIALS:
                _check_credentials(data)
                return
        text = f"control item of level {level} and type {kind} cannot be sent"
        raise InvalidArgument(text)

    def _add_command(self, kind: int, data: bytes) -> None:
        try:
            if kind == SCM_MULTICAST_MATCH:
                control.decode_wish(data)
            else:
                control.decode(BUS_SOCKET, kind, data)
        except RemoteProtocolError as error:
            raise InvalidArgument(error.message) from error
        if len(self.commands) == CONTROL_ITEMS:
            raise TooBig(f"more than {CONTROL_ITEMS} commands beside one message")
        self.commands.append([kind, data])

    def _add_descriptors(self, data: bytes) -> None:
        if len(data) % 4:
            raise InvalidArgument(f"SCM_RIGHTS of {len(data)} bytes is not an array of int")
        self.fds += struct.unpack(f"={len(data) // 4}i", data)
        if len(self.fds) > FDS_PER_MESSAGE:
            raise TooBig(f"{len(self.fds)} descriptors beside one message, limit {FDS_PER_MESSAGE}")


def take_apart(ancdata: Iterable[tuple[int, int, Buffer]]) -> Beside:
    """Return the items of a message that is to be sent.

    Raises:
        InvalidArgument: An item is unknown, malformed or given twice. EINVAL.
        TooBig: There are too many descriptors or commands. EMSGSIZE.
        Denied: The credentials are not those of this process. EPERM.
        NotOwned: The source is not a normal address. EADDRNOTAVAIL.
    """
    beside = Beside()
    for level, kind, data in ancdata:
        beside.add(level, kind, data if type(data) is bytes else bytes(data))
    if beside.deadline_ms and not beside.serial:
        raise InvalidArgument("SCM_DEADLINE without SCM_SERIAL: what would a reply answer?")
    return beside


def fit(items: list[Item], ancbufsize: int) -> tuple[list[Item], list[Item]]:
    """Return the received items that a caller has room for, and the others.

    The descriptors of the others are closed.
    """
    kept: list[Item] = []
    cut: list[Item] = []
    for item in items:
        space = _CMSG_HEADER + (len(item[2]) + 7 & ~7)
        if space <= ancbufsize:
            kept.append(item)
            ancbufsize -= space
        else:
            cut.append(item)
    close_descriptors(cut)
    return kept, cut


def close_descriptors(items: Iterable[Item]) -> None:
    """Close the descriptors in received items that nobody will get."""
    for level, kind, data in items:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            for (descriptor,) in struct.iter_unpack("=i", data):
                os.close(descriptor)


def without_descriptors(items: Iterable[Item]) -> list[Item]:
    """Return received items as a peek shows them: descriptors go to who takes the message."""
    rights = socket.SOL_SOCKET, socket.SCM_RIGHTS
    return [item for item in items if item[:2] != rights]


def find_gap(items: Iterable[Item]) -> Gap | None:
    """Return the gap that one of the items tells of (D12)."""
    for level, kind, data in items:
        if level == BUS_SOCKET and kind == SCM_GAP:
            return Gap.unpack(data[GAP_BYTES:], data[:GAP_BYTES])
    return None


def _check_credentials(data: bytes) -> None:
    if len(data) != UCRED.size:
        raise InvalidArgument(f"SCM_CREDENTIALS of {len(data)} bytes, not {UCRED.size}")
    pid, uid, gid = UCRED.unpack(data)
    if pid != os.getpid() or uid not in os.getresuid() or gid not in os.getresgid():
        raise Denied(f"pid {pid}, uid {uid}, gid {gid} are not those of this process")


def _read_number(data: bytes, size: int, high: int, name: str) -> int:
    value = int.from_bytes(data, "little")
    if len(data) != size or not 0 < value <= high:
        raise InvalidArgument(f"{name} is not {size} bytes with a number from 1 to {high}")
    return value


@lru_cache(1024)
def _read_terms(data: bytes) -> bytes:
    if len(data) > CONTROL_ITEM_BYTES:
        raise InvalidArgument(f"SCM_TERMS of {len(data)} bytes")
    try:
        Terms.unpack(data)
    except RemoteProtocolError as error:
        raise InvalidArgument(f"SCM_TERMS: {error.message}") from error
    return data


@lru_cache(1024)
def _read_source(data: bytes) -> BusAddress:
    try:
        address = BusAddress.unpack(data[: SOCKADDR_BYTES + 1])
    except RemoteProtocolError as error:
        raise InvalidArgument(f"SCM_SRC_ADDR: {error.message}") from error
    if address.is_kernel or address.is_multicast:
        raise NotOwned(f"nobody can be known by {address}")
    return address


# Attribute of `Beside`, and what reads it.
_READERS: Final[dict[int, tuple[str, Callable[[bytes], Any]]]] = {
    SCM_SRC_ADDR: ("source", _read_source),
    SCM_TERMS: ("terms", _read_terms),
    SCM_SERIAL: ("serial", lambda data: _read_number(data, 8, U64_MAX, "SCM_SERIAL")),
    SCM_REPLY_TO: ("reply_to", lambda data: _read_number(data, 8, U64_MAX, "SCM_REPLY_TO")),
    SCM_DEADLINE: (
        "deadline_ms",
        lambda data: _read_number(data, 4, DEADLINE_MS_MAX, "SCM_DEADLINE"),
    ),
}
