"""Terms: their checks, their packed form, and that bits and hashes are subsets."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from afbus.proto.errors import InvalidArgument, RemoteProtocolError
from afbus.proto.limits import BLOOM_BITS
from afbus.proto.siphash import siphash24
from afbus.proto.terms import (
    Terms,
    bloom_bits,
    exact_hash,
    exact_hashes,
    matches,
    matches_bits,
)

KEY = bytes(range(16))
COMPONENT = st.text(st.characters(exclude_characters="\0=.", codec="utf-8"), min_size=1, max_size=8)
TOPICS = st.lists(COMPONENT, max_size=5).map(".".join)
PAIRS = st.lists(
    st.tuples(COMPONENT, st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8))
    .map("=".join)
    .filter(lambda pair: len(pair.encode()) < 255),
    max_size=4,
)
TERMS = st.builds(Terms, TOPICS, PAIRS.map(tuple))
FEW = st.builds(
    Terms,
    st.lists(st.sampled_from("ab"), max_size=3).map(".".join),
    st.lists(st.sampled_from(["h=1", "h=2", "u=x"]), max_size=2).map(tuple),
)


def test_d9_what_a_message_has_and_a_subscription_requires() -> None:
    """Each prefix of the topic is a term of a message."""
    terms = Terms.of("sensors.cpu.core0", host="a", unit=3)
    assert terms.message_terms() == (
        "t:sensors",
        "t:sensors.cpu",
        "t:sensors.cpu.core0",
        "k:host=a",
        "k:unit=3",
    )
    assert terms.required_terms() == ("t:sensors.cpu.core0", "k:host=a", "k:unit=3")
    assert Terms().message_terms() == Terms().required_terms() == ()
    assert not Terms()
    assert Terms.of(host="a")


@pytest.mark.parametrize(
    ("subscription", "message", "wanted"),
    [
        ("sensors", "sensors.cpu", True),
        ("sensors.cpu", "sensors", False),
        ("sensors.c", "sensors.cpu", False),
        ("sensors host=a", "sensors.cpu host=a unit=C", True),
        ("sensors host=b", "sensors.cpu host=a", False),
        ("host=a", "sensors host=a", True),
        ("", "anything", True),
        ("", "", True),
        ("a", "", False),
    ],
)
def test_d9_matches(subscription: str, message: str, wanted: bool) -> None:
    """A subscription wants what has all that it requires."""
    assert matches(Terms.parse(subscription), Terms.parse(message)) is wanted


@given(FEW, FEW, st.sampled_from(BLOOM_BITS))
def test_r16_a_match_is_a_subset_of_bits_and_of_hashes(
    subscription: Terms, message: Terms, width: int
) -> None:
    """The bloom filter never loses a message, and the exact check is exact."""
    granted = bloom_bits(subscription.required_terms(), KEY, width)
    sent = bloom_bits(message.message_terms(), KEY, width)
    wanted = matches(subscription, message)
    if wanted:
        assert matches_bits(granted, sent)
    required = set(exact_hashes(subscription.required_terms(), KEY))
    assert wanted is (required <= set(exact_hashes(message.message_terms(), KEY)))


def test_d8_other_widths_never_match() -> None:
    """Not even a mask without bits."""
    assert not matches_bits(bytes(64), bytes(128))
    assert matches_bits(bytes(64), bytes(64))
    assert not matches_bits(b"\3", b"\1")


def test_d8_siphash_gives_the_published_values() -> None:
    """The vectors of the paper and of its reference code."""
    assert siphash24(KEY, b"") == 0x726FDB47DD0E0E31
    assert siphash24(KEY, bytes(range(15))) == 0xA129CA6149BE45E5
    with pytest.raises(InvalidArgument):
        siphash24(b"short", b"")


def test_d8_bits_are_pinned() -> None:
    """The numbers that the datapath has to agree with."""
    bits = bloom_bits(["t:sensors"], KEY, 512)
    value = siphash24(KEY, b"t:sensors")
    h1, h2 = value & 0xFFFFFFFF, (value >> 32) | 1
    expected = {((h1 + i * h2) & 0xFFFFFFFF) % 512 for i in range(8)}
    assert {b for b in range(512) if bits[b // 8] >> b % 8 & 1} == expected
    assert exact_hash("t:sensors", KEY) == siphash24(KEY, b"t:sensors\0exact")
    with pytest.raises(InvalidArgument):
        bloom_bits([], KEY, 500)


def test_d8_the_key_changes_everything() -> None:
    """Whoever lacks the key cannot predict the bits."""
    other = bytes(16)
    assert bloom_bits(["t:a"], KEY, 512) != bloom_bits(["t:a"], other, 512)


@given(TERMS)
def test_pack_and_parse(terms: Terms) -> None:
    """Both forms stand for the value."""
    assert Terms.unpack(terms.pack()) == terms
    assert Terms.parse(terms.format()) == terms
    assert str(terms).isprintable()


def test_packed_forms() -> None:
    """Topic first, NUL between."""
    assert Terms().pack() == b""
    assert Terms.of("a.b").pack() == b"a.b"
    assert Terms.of(x=1).pack() == b"\0x=1"
    assert Terms.of("a", y="", x="=").pack() == b"a\0x==\0y="


def test_order_and_repetition_of_pairs_mean_nothing() -> None:
    """Terms are a set."""
    assert Terms("a", ("y=1", "x=1", "y=1")) == Terms.parse("a x=1", y=1)


@pytest.mark.parametrize(
    ("topic", "pairs"),
    [
        ("a..b", ()),
        (".a", ()),
        ("a.", ()),
        ("a\0", ()),
        ("a=b", ()),
        ("a" * 256, ()),
        ("\ud800", ()),
        ("", ("a",)),
        ("", ("=a",)),
        ("", ("a=\0",)),
        ("", ("a=" + "é" * 127,)),
        (".".join("a" * 65), ()),
        (".".join("a" * 60), tuple(f"k{i}=" for i in range(5))),
    ],
)
def test_terms_that_are_refused(topic: str, pairs: tuple[str, ...]) -> None:
    """Each with EINVAL."""
    with pytest.raises(InvalidArgument):
        Terms(topic, pairs)


def test_words_that_are_refused() -> None:
    """A second topic, bytes that are no text, a key with `=`."""
    for text in ("a b", "%FF", "a %=b", "a x=%G0"):
        with pytest.raises(InvalidArgument):
            Terms.parse(text)
    with pytest.raises(InvalidArgument):
        Terms.of("a", **{"x=y": "z"})


@given(
    st.binary(max_size=60)
    | st.lists(st.sampled_from([b"a", b"b=1", b"a=2", b"", b"\0", b"."])).map(b"\0".join)
)
def test_unpack_raises_one_type(data: bytes) -> None:
    """And whatever it accepts has one packed form."""
    try:
        terms = Terms.unpack(data)
    except RemoteProtocolError:
        assume(True)
        return
    assert terms.pack() == data


@given(
    st.binary(max_size=40)
    | TERMS.map(Terms.pack)
    | st.lists(st.sampled_from([b"a", b"a.b", b"b=1", b"a=", b"=2", b"a=2", b"", b"."])).map(
        b"\0".join
    )
    | st.tuples(st.sampled_from([b"a.", b"\0a=1", b"a"]), st.integers(1, 300)).map(
        lambda pair: pair[0] * pair[1]
    )
    | st.integers(60, 68).map(lambda count: b"".join(b"\0%03d=" % n for n in range(count)))
)
def test_check_judges_as_unpack_does(data: bytes) -> None:
    """What it lets pass by its form alone is right, and nothing else passes."""
    try:
        Terms.unpack(data)
    except RemoteProtocolError as error:
        with pytest.raises(RemoteProtocolError, match=re.escape(str(error))):
            Terms.check(data)
    else:
        Terms.check(data)


def test_unpack_refuses_another_order() -> None:
    """Descending pairs, repeated pairs, and too much."""
    for data in (b"\0b=1\0a=1", b"\0a=1\0a=1", bytes(20000)):
        with pytest.raises(RemoteProtocolError):
            Terms.unpack(data)
