"""Bodies that show whether they are whole, whose they are, and which of them: a header and noise.

0 u32 sender   4 u32 number   8 u32 size of the noise   12 u32 crc of all the rest   16 noise
"""

from __future__ import annotations

import random
import struct
import zlib

HEADER = struct.Struct("<IIII")
_NOISE = random.Random(1).randbytes(1 << 18)


def pack_body(sender: int, number: int, size: int) -> bytes:
    """The body of one message, with `size` bytes of noise."""
    at = number * 7 % (len(_NOISE) - size)
    noise = _NOISE[at : at + size]
    crc = zlib.crc32(noise, zlib.crc32(HEADER.pack(sender, number, size, 0)))
    return HEADER.pack(sender, number, size, crc) + noise


def read_body(body: bytes) -> tuple[int, int]:
    """Sender and number of a message, after a look at every byte of it."""
    sender, number, size, crc = HEADER.unpack_from(body)
    noise = body[HEADER.size :]
    assert len(noise) == size, f"a message of {size} bytes is cut to {len(noise)}"
    whole = zlib.crc32(noise, zlib.crc32(HEADER.pack(sender, number, size, 0)))
    assert crc == whole, f"message {number} of sender {sender} is torn"
    return sender, number
