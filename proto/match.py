"""What a multicast is about, as both sides state it, and what happens when a receiver is full.

A multicast is stated in terms, or in raw bits as in the mail (R14, D9). `What` is either: a value
of `Terms`, or bytes that are the bits (bit b is byte b//8, bit b%8).

Who keeps many keeps them as *forms*: packed terms, or the byte 0xff and the bits. No text in UTF-8
has that byte, so a form stands for one value of `What`, and is the value of bytes that costs least.

Invariants:

1. Only a subscription that blocks has a deadline, and it always has one (D12).
2. `what_of(form_of(what)) == what`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from .codec import U32_MAX, judging
from .errors import InvalidArgument
from .limits import ADDRESS_BYTES, BLOCK_MS_MAX, PACKED_TERMS_BYTES
from .terms import Terms

if TYPE_CHECKING:
    from .codec import Fields

What: TypeAlias = Terms | bytes

_RAW: Final = b"\xff"


class Overflow(IntEnum):
    """What a subscription wants to happen when its receiver is full (D12)."""

    #: The receiver reads an in-band record that names sender and range.
    GAP = 1
    #: The newest message of each sender and address is kept.
    CONFLATE = 2
    #: The receiver is cut off.
    DISCONNECT = 3
    #: The sender waits, until a deadline.
    BLOCK = 4


def check_what(what: What) -> None:
    """Check that raw bits are whole components.

    Raises:
        InvalidArgument: They are not 1 to 32 components of 8 bytes. EINVAL.
    """
    if isinstance(what, bytes) and (not 8 <= len(what) <= ADDRESS_BYTES or len(what) % 8):
        raise InvalidArgument(f"{len(what) * 8} bits are not 1 to 32 components of 64")


def form_of(what: What) -> bytes:
    """Return the form of terms or bits."""
    return what.pack() if isinstance(what, Terms) else _RAW + what


def what_of(form: bytes) -> What:
    """Return the terms or bits of a form."""
    return form[1:] if is_raw(form) else Terms.unpack(form)


def is_raw(form: bytes) -> bool:
    """Tell whether a form is of bits."""
    return form[:1] == _RAW


def check_overflow(overflow: Overflow, deadline_ms: int) -> None:
    """Check that there is a deadline exactly where there must be one.

    Raises:
        InvalidArgument: A deadline is missing, too long, or means nothing. EINVAL.
    """
    if overflow is Overflow.BLOCK:
        if not 0 < deadline_ms <= BLOCK_MS_MAX:
            raise InvalidArgument(f"deadline of {deadline_ms} ms, not 1 to {BLOCK_MS_MAX}")
    elif deadline_ms != 0:
        raise InvalidArgument(f"a deadline means nothing with {overflow.name}")


def encode_what(what: What) -> list[object]:
    """Return the two elements that stand for `what` in a packet: packed terms, raw bits."""
    return [what.pack(), None] if isinstance(what, Terms) else [None, what]


def take_what(fields: Fields) -> What:
    """Take the two elements of `encode_what`; the caller's constructor checks the bits."""
    packed = fields.take_maybe_bytes(0, PACKED_TERMS_BYTES)
    bits = fields.take_maybe_bytes(0, ADDRESS_BYTES)
    if packed is not None and bits is None:
        return Terms.unpack(packed)
    if packed is None and bits is not None:
        return bits
    fields.fail("neither terms nor bits, or both")


def take_overflow(fields: Fields) -> tuple[Overflow, int]:
    """Take an overflow and its deadline, and check that they fit."""
    overflow, deadline_ms = fields.take_enum(Overflow), fields.take_int(0, U32_MAX)
    with judging("overflow"):
        check_overflow(overflow, deadline_ms)
    return overflow, deadline_ms
