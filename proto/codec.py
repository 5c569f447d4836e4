"""Msgpack with limits: what may stand in a packet, and one kind of error for what may not.

A packet holds None, booleans, integers of 64 bits, text, bytes, lists, and maps with text keys.
Floats, extension types, other keys and keys that come twice are refused, so that no two readers
understand one packet differently.

Invariants:

1. `decode` and `Fields` raise `RemoteProtocolError` and nothing else.
2. Lengths and depth are checked before memory is taken for them: msgpack itself makes room for
   all that a list promises, in every list within a list, so it reads nothing but scalars here.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import msgpack  # type: ignore[import-untyped]

from . import limits
from .errors import BusError, CloseCode, InvalidArgument, RemoteProtocolError, TooBig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from enum import Enum

    E = TypeVar("E", bound=Enum)

#: The largest u64, u32 and errno.
U64_MAX: Final = (1 << 64) - 1
U32_MAX: Final = (1 << 32) - 1
ERRNO_MAX: Final = 4095

_I64_MIN: Final = -(1 << 63)

# The first bytes of what `_read` looks at itself: lists, maps, and floats with extensions.
_LIST_HEADS: Final = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
_MAP_HEADS: Final = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))
_REFUSED_HEADS: Final = frozenset((*range(0xC7, 0xCC), *range(0xD4, 0xD9)))

#: Types whose values may stand anywhere, whatever they are.
_PLAIN: Final = frozenset((type(None), bool, str, bytes))


class _Unfit(Exception):
    """A value that does not belong in a packet; becomes the error of the side that made it."""


def _check(value: object, depth: int) -> None:
    """Raise `_Unfit` unless `value` consists of what a packet may hold."""
    if type(value) in _PLAIN or isinstance(value, str | bytes):
        return
    if isinstance(value, int):
        if not _I64_MIN <= value <= U64_MAX:
            raise _Unfit("integer of more than 64 bits")
        return
    if not isinstance(value, list | tuple | dict):
        raise _Unfit(f"{type(value).__name__} in a packet")
    if depth == 0:
        raise _Unfit("nested too deeply")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise _Unfit("map key that is no text")
        value = value.values()
    for element in value:
        # Most are plain, and a call for each would cost more than all else here.
        kind = type(element)
        if kind not in _PLAIN and (kind is not int or not _I64_MIN <= element <= U64_MAX):
            _check(element, depth - 1)


def encode(value: object, max_bytes: int = limits.FRAME_BYTES) -> bytes:
    """Return `value` as msgpack.

    Raises:
        InvalidArgument: The value cannot stand in a packet. EINVAL.
        TooBig: It is larger than `max_bytes`. EMSGSIZE.
    """
    try:
        _check(value, limits.FRAME_DEPTH)
        data: bytes = msgpack.packb(value, use_bin_type=True)
    except (_Unfit, UnicodeEncodeError) as error:
        raise InvalidArgument(str(error)) from error
    if len(data) > max_bytes:
        raise TooBig(f"packet of {len(data)} bytes, limit {max_bytes}")
    return data


def _read(unpacker: Any, data: bytes, depth: int, max_items: int) -> object:
    """Read one value, and refuse a list or a map by its head alone, before it takes memory."""
    place = unpacker.tell()
    if place == len(data):
        raise _Unfit("packet that is cut short")
    head = data[place]
    if head in _REFUSED_HEADS:
        raise _Unfit(f"float or extension {head:#x} in a packet")
    is_list = head in _LIST_HEADS
    if not is_list and head not in _MAP_HEADS:
        value: object = unpacker.unpack()
        return value
    if depth == 0:
        raise _Unfit("nested too deeply")
    count = unpacker.read_array_header() if is_list else unpacker.read_map_header()
    if count > max_items:
        raise _Unfit(f"{count} elements, limit {max_items}")
    if is_list:
        return [_read(unpacker, data, depth - 1, max_items) for _ in range(count)]
    made: dict[str, object] = {}
    for _ in range(count):
        key = _read(unpacker, data, 0, 0)
        if not isinstance(key, str):
            raise _Unfit("map key that is no text")
        if key in made:
            raise _Unfit("map key that comes twice")
        made[key] = _read(unpacker, data, depth - 1, max_items)
    return made


def decode(
    data: bytes, max_bytes: int = limits.FRAME_BYTES, max_items: int = limits.FRAME_ITEMS
) -> object:
    """Return the value of one packet.

    Args:
        data: The whole packet, nothing behind it.
        max_bytes: Size of the packet.
        max_items: Elements of each list and map.

    Raises:
        RemoteProtocolError: It is too large, malformed, or holds what no packet may hold.
    """
    if len(data) > max_bytes:
        text = f"packet of {len(data)} bytes, limit {max_bytes}"
        raise RemoteProtocolError(text, CloseCode.LIMIT)
    size = max(len(data), 1)
    unpacker = msgpack.Unpacker(raw=False, read_size=size, max_buffer_size=size)
    unpacker.feed(data)
    try:
        value = _read(unpacker, data, limits.FRAME_DEPTH, max_items)
    except (_Unfit, ValueError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"not a packet: {error or type(error).__name__}") from error
    if unpacker.tell() != len(data):
        raise RemoteProtocolError("not a packet: bytes behind its end")
    return value


@contextmanager
def judging(what: str) -> Iterator[None]:
    """Turn a refusal of our own constructors into the peer's fault, while a packet is decoded."""
    try:
        yield
    except BusError as error:
        raise RemoteProtocolError(f"{what}: {error.message}") from error


class Fields:
    """The elements of one decoded list, taken in order and checked one by one."""

    def __init__(self, what: str, value: object) -> None:
        """Begin with a decoded value; `what` names it in errors."""
        self._what = what
        self._place = 0
        if not isinstance(value, list):
            self.fail("not a list")
        self._elements: list[Any] = value

    def fail(self, why: str) -> NoReturn:
        """Raise `RemoteProtocolError`, with the place that was reached, from 1."""
        place = f", element {self._place}" if self._place else ""
        raise RemoteProtocolError(f"{self._what}{place}: {why}")

    @property
    def is_left(self) -> bool:
        """Whether there is another element."""
        return self._place < len(self._elements)

    def take_any(self) -> Any:
        """Take the next element as it is."""
        if not self.is_left:
            self.fail("missing")
        self._place += 1
        return self._elements[self._place - 1]

    def take_int(self, low: int = 0, high: int = U64_MAX) -> int:
        """Take an integer from `low` to `high`."""
        value = self.take_any()
        # bool is an int to Python but not to a peer.
        if type(value) is not int or not low <= value <= high:
            self.fail(f"not an integer from {low} to {high}")
        return value

    def take_enum(self, enum: type[E]) -> E:
        """Take the number of a member of `enum`."""
        number = self.take_int()
        try:
            return enum(number)
        except ValueError:
            self.fail(f"{number} is no {enum.__name__}")

    def take_bool(self) -> bool:
        """Take a truth value."""
        value = self.take_any()
        if type(value) is not bool:
            self.fail("not a truth value")
        return value

    def take_str(self, max_bytes: int = limits.REASON_BYTES) -> str:
        """Take a text of at most `max_bytes` in UTF-8."""
        value = self.take_any()
        if type(value) is not str or len(value.encode()) > max_bytes:
            self.fail(f"not a text of at most {max_bytes} bytes")
        return value

    def take_bytes(self, low: int = 0, high: int = limits.FRAME_BYTES) -> bytes:
        """Take bytes of a length from `low` to `high`."""
        value = self.take_any()
        if type(value) is not bytes or not low <= len(value) <= high:
            self.fail(f"not bytes, {low} to {high} of them")
        return value

    def take_maybe_bytes(self, low: int = 0, high: int = limits.FRAME_BYTES) -> bytes | None:
        """Take bytes or None."""
        if self.is_left and self._elements[self._place] is None:
            self._place += 1
            return None
        return self.take_bytes(low, high)

    def take_list(self, max_items: int = limits.FRAME_ITEMS) -> list[Any]:
        """Take a list of at most `max_items`, whose elements the caller checks."""
        value = self.take_any()
        if type(value) is not list or len(value) > max_items:
            self.fail(f"not a list of at most {max_items}")
        return value

    def take_map(self, max_items: int = limits.FRAME_ITEMS) -> dict[str, Any]:
        """Take a map of at most `max_items`, whose values the caller checks."""
        value = self.take_any()
        if type(value) is not dict or len(value) > max_items:
            self.fail(f"not a map of at most {max_items}")
        return value

    def end(self) -> None:
        """Check that nothing is left."""
        if self.is_left:
            self.fail(f"{len(self._elements) - self._place} elements too many")
