"""Join tokens: one key, once, before a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from afbus.master import token as module
from afbus.master.token import Redeemed, Refused, Token, Tokens, make_token
from afbus.proto import codec
from afbus.proto.errors import RemoteProtocolError, ShareExceeded

if TYPE_CHECKING:
    import random

ROOT = bytes(32)
KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def fresh(
    tokens: Tokens, rng: random.Random, until_utc: float = 100.0, name: str | None = None
) -> tuple[str, Token]:
    """Add a token; return its text and what is stored."""
    made, stored = make_token(rng.randbytes(32), ROOT, until_utc, name)
    tokens.add(stored)
    return made.format(), stored


def test_case38_a_token_is_good_for_one_key(rng: random.Random) -> None:
    """The first one; the same key may come again, under the same name."""
    tokens = Tokens()
    text, stored = fresh(tokens, rng)
    verdict = tokens.judge(text, "a", KEY, 0.0)
    assert verdict == Redeemed(stored, is_again=False)
    used = tokens.use(stored, "a", KEY)
    assert tokens.judge(text, "a", KEY, 0.0) == Redeemed(used, is_again=True)
    for name, key in (("a", OTHER_KEY), ("b", KEY), ("b", OTHER_KEY)):
        assert isinstance(tokens.judge(text, name, key, 0.0), Refused)


def test_case38_a_token_expires(rng: random.Random) -> None:
    """To the second; and is forgotten then."""
    tokens = Tokens()
    text, stored = fresh(tokens, rng, 100.0)
    assert isinstance(tokens.judge(text, "a", KEY, 99.9), Redeemed)
    late = tokens.judge(text, "a", KEY, 100.0)
    assert isinstance(late, Refused)
    assert "expired" in late.reason
    assert tokens.take_expired(99.0) == []
    assert tokens.take_expired(100.0) == [stored.id]
    assert len(tokens) == 0
    assert isinstance(tokens.judge(text, "a", KEY, 0.0), Refused)


def test_case38_a_token_for_one_name(rng: random.Random) -> None:
    """Nobody else uses it."""
    tokens = Tokens()
    text, _ = fresh(tokens, rng, name="a")
    assert isinstance(tokens.judge(text, "b", KEY, 0.0), Refused)
    assert isinstance(tokens.judge(text, "a", KEY, 0.0), Redeemed)


def test_case38_wrong_secrets_and_no_tokens(rng: random.Random) -> None:
    """The log says which; the secret stands nowhere."""
    tokens = Tokens()
    text, stored = fresh(tokens, rng)
    head, number, secret, root = text.split(":")
    guess = ":".join((head, number, secret[::-1], root))
    unknown = ":".join((head, number[::-1], secret, root))
    for wrong, reason in ((guess, "secret"), (unknown, "not known"), ("x", "no join token")):
        verdict = tokens.judge(wrong, "a", KEY, 0.0)
        assert isinstance(verdict, Refused)
        assert reason in verdict.reason
        assert secret not in verdict.reason
    assert bytes.fromhex(secret) not in stored.encode()


def test_rows_come_back(rng: random.Random) -> None:
    """New and used ones; what is none is refused."""
    _, stored = make_token(rng.randbytes(32), ROOT, 5.5, "a", ephemeral=True)
    for one in (stored, Token(b"i" * 16, b"d" * 32, 7), Tokens().use(stored, "a", KEY)):
        assert Token.decode(one.id, one.encode()) == one
    for value in ([], [b"short", 1, "", False, None], [bytes(32), 1, "", False, None, 0]):
        with pytest.raises(RemoteProtocolError):
            Token.decode(b"", codec.encode(value))


def test_there_is_a_limit(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's loop that went wrong fills no disk."""
    monkeypatch.setattr(module, "TOKENS", 2)
    tokens = Tokens()
    fresh(tokens, rng)
    fresh(tokens, rng)
    with pytest.raises(ShareExceeded):
        fresh(tokens, rng)
