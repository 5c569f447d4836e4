"""What an attacker makes of good packets; seeded, so that a failure can be had again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgpack  # type: ignore[import-untyped]

if TYPE_CHECKING:
    import random

#: Pieces that hurt careless readers, to stand anywhere in a packet.
PIECES: list[bytes] = [
    # Lists and maps that promise more than there is.
    b"\xdc\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xde\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdc\x10\x00" * 1000,
    b"\xde\x10\x00\xa1a" * 500,
    # So do texts, bytes and extensions.
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x05",
    # Depth.
    b"\x91" * 2000,
    b"\x81\xa1a" * 1000,
    b"\x81" * 100,
    # NaN and infinity, of 32 and 64 bits.
    msgpack.packb(float("nan")),
    msgpack.packb(float("-inf")),
    b"\xca\x7f\xc0\x00\x00",
    # Extensions, time among them.
    msgpack.packb(msgpack.ExtType(5, b"abc")),
    b"\xd6\xff\x00\x00\x00\x01",
    # Keys that come twice, or are no texts; a text that is none; a head that means nothing.
    b"\x82\xa1a\x01\xa1a\x02",
    b"\x81\x01\x02",
    b"\x81\x90\x02",
    b"\xa2\xff\xfe",
    b"\xa3\xed\xa0\x80",
    b"\xc1",
    # Numbers at their ends, and bytes beyond every limit.
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xc5\xff\xff" + bytes(65535),
    b"\xc6\x00\x02\x00\x01" + bytes(131073),
]


def mutate(rng: random.Random, packet: bytes) -> bytes:
    """Return what an attacker makes of a packet."""
    bad = bytearray(packet)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(bad) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            bad[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del bad[place:]
        elif kind == 2:
            del bad[place : place + rng.randint(1, 8)]
        elif kind == 3:
            bad[place:place] = bad[place : place + rng.randint(1, 40)]
        elif kind == 4:
            bad[place:place] = rng.randbytes(rng.randint(1, 12))
        else:
            # The large pieces come too, but seldom.
            piece = PIECES[min(rng.randrange(len(PIECES)), rng.randrange(2 * len(PIECES)))]
            bad[place : place + rng.randrange(2) * len(piece)] = piece
    return bytes(bad)
