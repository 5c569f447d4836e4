"""Terms: what a message is about, and what a subscription asks for.

A person writes a dotted topic and `key=value` pairs. A message *has* one term for each prefix of
its topic and one for each pair; a subscription *requires* its topic and its pairs; it matches if
all that it requires is there. Several subscriptions are alternatives.

    message       sensors.cpu.core0 host=a    has       t:sensors  t:sensors.cpu
                                                        t:sensors.cpu.core0  k:host=a
    subscription  sensors.cpu host=a          requires  t:sensors.cpu  k:host=a

Hashes (D8), with the bus's key of 16 bytes, `s` being the UTF-8 of a term such as `t:sensors`:

    h = SipHash-2-4(key, s), h1 = h & 0xffffffff, h2 = (h >> 32) | 1
    bloom bits  ((h1 + i*h2) mod 2^32) mod width, for i = 0..7; bit b is byte b//8, bit b%8
    exact hash  SipHash-2-4(key, s + b"\\0exact")

Packed, as in TX records: topic and pairs in UTF-8 with a NUL between each two, the topic first,
empty if there is none; the pairs ascend.

Invariants:

1. A value has one packed form: `unpack(pack(t)) == t`, and `pack(unpack(b)) == b`.
2. If a subscription matches a message then its bloom bits and its exact hashes are subsets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .codec import judging
from .errors import InvalidArgument, RemoteProtocolError
from .limits import (
    BLOOM_BITS,
    BLOOM_HASHES,
    PACKED_TERMS_BYTES,
    TERM_BYTES,
    TERMS_PER_MESSAGE,
)
from .siphash import siphash24
from .text import escape, to_bytes, unescape

if TYPE_CHECKING:
    from collections.abc import Iterable


#: A packed form: dotted components without `=`, then pairs whose keys are not empty.
_PACKED: Final = re.compile(rb"(?:[^\0.=]+(?:\.[^\0.=]+)*)?(?:\0[^\0=]+=[^\0]*)*")


def _check_text(what: str, text: str) -> None:
    if "\0" in text:
        raise InvalidArgument(f"NUL in {what} {text!r}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{what} {text!a} is not a text") from error
    if size > TERM_BYTES:
        raise InvalidArgument(f"{what} of {size} bytes, limit {TERM_BYTES}")


def _check_topic(topic: str) -> None:
    _check_text("topic", topic)
    if "=" in topic:
        raise InvalidArgument(f"'=' in topic {topic!r}")
    if topic and "" in topic.split("."):
        raise InvalidArgument(f"empty component in topic {topic!r}")


@dataclass(frozen=True, slots=True)
class Terms:
    """A topic (dotted, empty if none) and pairs (`key=value`, ascending, each once).

    Raises:
        InvalidArgument: An empty component or key, a NUL, `=` in the topic, a term of more than
            255 bytes, or more than 64 terms. EINVAL.
    """

    topic: str = ""
    pairs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check everything, and bring the pairs into their order."""
        _check_topic(self.topic)
        for pair in self.pairs:
            _check_text("pair", pair)
            key, equals, _ = pair.partition("=")
            if not key or not equals:
                raise InvalidArgument(f"{pair!r} is not key=value")
        object.__setattr__(self, "pairs", tuple(sorted(set(self.pairs))))
        count = len(self.pairs) + (self.topic.count(".") + 1 if self.topic else 0)
        if count > TERMS_PER_MESSAGE:
            raise InvalidArgument(f"{count} terms, limit {TERMS_PER_MESSAGE}")

    @classmethod
    def of(cls, topic: str = "", /, **pairs: str | int) -> Terms:
        """Return the terms of a topic and of keywords: `Terms.of("sensors.cpu", host="a")`."""
        for key in pairs:
            if "=" in key:
                raise InvalidArgument(f"'=' in key {key!r}")
        return cls(topic, tuple(f"{key}={value}" for key, value in pairs.items()))

    @classmethod
    def parse(cls, text: str, /, **pairs: str | int) -> Terms:
        """Return the terms that a person wrote: `"sensors.cpu host=a"`, and keywords beside it.

        Words stand apart by blanks; the first is the topic if it has no `=`; `%XX` is a byte.
        """
        words = [_unescaped(word) for word in text.split()]
        topic = words.pop(0) if words and "=" not in words[0] else ""
        more = cls.of("", **pairs)
        return cls(topic, (*words, *more.pairs))

    def format(self) -> str:
        """Return the text that `parse` reads back."""
        words = [self.topic] if self.topic else []
        return " ".join(escape(word.encode()) for word in (*words, *self.pairs))

    def __str__(self) -> str:
        """Return the text form."""
        return self.format()

    def __bool__(self) -> bool:
        """Tell whether there is a term; a subscription without any hears everything (D9)."""
        return bool(self.topic or self.pairs)

    def pack(self) -> bytes:
        """Return the packed form, at most 16384 bytes."""
        return "\0".join((self.topic, *self.pairs)).encode()

    @classmethod
    def check(cls, data: bytes) -> None:
        """Check a packed form without making a value of it; errors as `unpack`.

        What is short and plain, as nearly all is, is told by its form alone.
        """
        if (
            len(data) > TERM_BYTES
            or not data.isascii()
            or data.count(b".") + data.count(b"\0") >= TERMS_PER_MESSAGE
            or _PACKED.fullmatch(data) is None
            or (pairs := data.split(b"\0")[1:]) != sorted(set(pairs))
        ):
            cls.unpack(data)

    @classmethod
    def unpack(cls, data: bytes) -> Terms:
        """Return the terms of a packed form.

        Raises:
            RemoteProtocolError: It is malformed, over a limit, or not in its order.
        """
        if len(data) > PACKED_TERMS_BYTES:
            raise RemoteProtocolError(f"{len(data)} bytes of terms, limit {PACKED_TERMS_BYTES}")
        try:
            topic, *pairs = data.decode().split("\0")
        except UnicodeDecodeError as error:
            raise RemoteProtocolError("terms are not UTF-8") from error
        with judging("terms"):
            made = cls(topic, tuple(pairs))
        if list(made.pairs) != pairs:
            raise RemoteProtocolError("terms are not in their order")
        return made

    def message_terms(self) -> tuple[str, ...]:
        """Return what a message with these terms has: each prefix of the topic, then the pairs."""
        parts = self.topic.split(".") if self.topic else []
        prefixes = (".".join(parts[: count + 1]) for count in range(len(parts)))
        return (*(f"t:{prefix}" for prefix in prefixes), *(f"k:{pair}" for pair in self.pairs))

    def required_terms(self) -> tuple[str, ...]:
        """Return what a subscription with these terms requires: the topic, then the pairs."""
        topic = (f"t:{self.topic}",) if self.topic else ()
        return (*topic, *(f"k:{pair}" for pair in self.pairs))


def _unescaped(word: str) -> str:
    try:
        return unescape(word).decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{word!r} is not UTF-8") from error


def matches(subscription: Terms, message: Terms) -> bool:
    """Tell whether the subscription wants the message: the reference for every fast index."""
    return set(subscription.required_terms()) <= set(message.message_terms())


def matches_bits(granted: bytes, sent: bytes) -> bool:
    """Tell whether `(sent & granted) == granted` (R16); other widths never match (D8)."""
    if len(granted) != len(sent):
        return False
    mask = int.from_bytes(granted, "little")
    return int.from_bytes(sent, "little") & mask == mask


def bloom_bits(terms: Iterable[str], key: bytes, width_bits: int) -> bytes:
    """Return the filter of some terms: the bits of each, OR-ed.

    Args:
        terms: As `message_terms` or `required_terms` return them.
        key: The bus's secret key, 16 bytes.
        width_bits: 512, 1024 or 2048.

    Raises:
        InvalidArgument: Another width or length of the key. EINVAL.
    """
    if width_bits not in BLOOM_BITS:
        raise InvalidArgument(f"filter of {width_bits} bits, not one of {BLOOM_BITS}")
    bits = bytearray(width_bits // 8)
    for term in terms:
        value = siphash24(key, to_bytes(term))
        h1, h2 = value & 0xFFFFFFFF, value >> 32 | 1
        for count in range(BLOOM_HASHES):
            bit = (h1 + count * h2 & 0xFFFFFFFF) % width_bits
            bits[bit // 8] |= 1 << bit % 8
    return bytes(bits)


def exact_hash(term: str, key: bytes) -> int:
    """Return the 64-bit hash by which the exact check compares a term (D10)."""
    return siphash24(key, to_bytes(term) + b"\0exact")


def exact_hashes(terms: Iterable[str], key: bytes) -> tuple[int, ...]:
    """Return the exact hashes of some terms, ascending, each once."""
    return tuple(sorted({exact_hash(term, key) for term in terms}))
