"""Percent escapes: bytes that a person can read, write and paste.

Invariants:

1. `unescape(escape(data, any special characters)) == data`, for all bytes.
2. Printable UTF-8 stays readable; a blank, a percent sign and the special characters never do.
"""

from __future__ import annotations

import re
from typing import Final

from .errors import InvalidArgument

_DIGITS: Final = re.compile("[0-9A-Fa-f]{2}")


def to_bytes(text: str | bytes) -> bytes:
    """Return `text` as UTF-8; undecodable bytes of file names come back as they were.

    Raises:
        InvalidArgument: The text holds a surrogate that stands for no byte. EINVAL.
    """
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"not a text: {text!a}") from error


def is_printable(data: bytes) -> bool:
    """Tell whether `data` is UTF-8 that can be shown as it is."""
    return data.decode("utf-8", "surrogateescape").isprintable()


def escape(data: bytes, special: str = "") -> str:
    """Return `data` as text, with `%XX` for each byte of what is special or cannot be shown."""
    return "".join(
        "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))
        if char in special or char in " %" or not char.isprintable()
        else char
        for char in data.decode("utf-8", "surrogateescape")
    )


def unescape(text: str) -> bytes:
    """Return the bytes of an escaped text.

    Raises:
        InvalidArgument: A percent sign is not followed by two hexadecimal digits. EINVAL.
    """
    parts = text.split("%")
    result = bytearray(to_bytes(parts[0]))
    for part in parts[1:]:
        digits = part[:2]
        if _DIGITS.fullmatch(digits) is None:
            raise InvalidArgument(f"'%{digits}' is not a percent escape")
        result.append(int(digits, 16))
        result += to_bytes(part[2:])
    return bytes(result)


def clip(text: str, max_bytes: int) -> str:
    """Return as much of `text` as fits into `max_bytes` of UTF-8, for reasons and messages."""
    return text.encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore")
