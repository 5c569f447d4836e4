"""Join tokens as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto.errors import ConfigError
from afbus.proto.token import JoinToken

RANDOM = st.binary(min_size=16, max_size=16)


@given(RANDOM, RANDOM, st.binary(min_size=32, max_size=32))
def test_tokens_come_back(number: bytes, secret: bytes, root: bytes) -> None:
    """Through text, with blanks around it, and without the secret in `repr`."""
    token = JoinToken(number, secret, root)
    assert JoinToken.parse(f" {token.format()}\n") == token
    assert repr(secret) not in repr(token) or secret in (number, root)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "afbus-join",
        f"afbus-join:{'0' * 32}:{'0' * 32}:{'0' * 63}",
        f"afbus-join:{'0' * 32}:{'0' * 31}g:{'0' * 64}",
        f"afbus-join:{'A' * 32}:{'0' * 32}:{'0' * 64}",
        f"x afbus-join:{'0' * 32}:{'0' * 32}:{'0' * 64}",
    ],
)
def test_texts_that_are_none(text: str) -> None:
    """The error does not repeat what may be a secret."""
    with pytest.raises(ConfigError) as caught:
        JoinToken.parse(text)
    assert "000" not in str(caught.value)
