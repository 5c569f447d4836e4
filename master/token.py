"""Join tokens as the master keeps them: one node enrols by each, once, before a time.

What is stored is a digest of the secret: who reads the store cannot enrol.

Invariants:

1. At most one key ever enrols by a token. The same key may do it again until the token expires, so
   that a node whose answer was lost, or that starts again, keeps its identity.
2. A refusal changes nothing, and says why to the log; the peer learns only that the token is not
   good, whatever the reason (see `core.py`).
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Final

from ..proto import codec
from ..proto.codec import Fields
from ..proto.errors import ConfigError, ShareExceeded
from ..proto.limits import IDENTITY_BYTES
from ..proto.token import RANDOM_BYTES, JoinToken

#: How long a token is good if nothing else is said: long enough to carry it to another machine.
TOKEN_LIFE_S: Final = 3600
#: The longest life: longer ones lie around.
TOKEN_LIFE_S_MAX: Final = 30 * 86_400
#: Tokens that may lie there at a time; each dies by its time.
TOKENS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Token:
    """What is stored of a token.

    `name` is the only node that may use it, None for any that is new. An `ephemeral` node is
    forgotten soon after it is lost. `key` is the digest of the key that enrolled by it.
    """

    id: bytes
    digest: bytes
    until_utc: int
    name: str | None = None
    ephemeral: bool = False
    key: bytes | None = None

    def encode(self) -> bytes:
        """Return the row of the journal."""
        return codec.encode(
            [self.digest, self.until_utc, self.name or "", self.ephemeral, self.key]
        )

    @classmethod
    def decode(cls, number: bytes, data: bytes) -> Token:
        """Return the token of a row.

        Raises:
            RemoteProtocolError: It is no such row.
        """
        fields = Fields("token", codec.decode(data))
        made = cls(
            number,
            fields.take_bytes(32, 32),
            fields.take_int(),
            fields.take_str(IDENTITY_BYTES) or None,
            fields.take_bool(),
            fields.take_maybe_bytes(32, 32),
        )
        fields.end()
        return made


@dataclass(frozen=True, slots=True)
class Redeemed:
    """The token is good; `is_again` if this key has used it before."""

    token: Token
    is_again: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """The token is not good, and why."""

    reason: str


def make_token(
    random: bytes, root: bytes, until_utc: float, name: str | None = None, ephemeral: bool = False
) -> tuple[JoinToken, Token]:
    """Return a token for the node, and what is to be stored of it.

    Args:
        random: 32 secret random bytes.
        root: SHA-256 of the root certificate in DER.
        until_utc: When it expires.
        name: The node that may use it, None for any that is new.
        ephemeral: Whether the node is to be forgotten soon after it is lost.
    """
    assert len(random) == 2 * RANDOM_BYTES
    made = JoinToken(random[:RANDOM_BYTES], random[RANDOM_BYTES:], root)
    digest = sha256(made.secret).digest()
    return made, Token(made.id, digest, int(until_utc), name, ephemeral)


class Tokens:
    """The tokens that the master knows."""

    def __init__(self) -> None:
        self._tokens: dict[bytes, Token] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, token: Token) -> None:
        """Know a new token.

        Raises:
            ShareExceeded: There are too many. EDQUOT.
        """
        assert token.id not in self._tokens, "random numbers that repeat themselves"
        if len(self._tokens) >= TOKENS:
            raise ShareExceeded(f"{TOKENS} tokens wait to be used; they die by their time")
        self._tokens[token.id] = token

    def judge(self, text: str, name: str, key: bytes, now_utc: float) -> Redeemed | Refused:
        """Tell whether a node may enrol with the digest (32 bytes) of its public key."""
        try:
            given = JoinToken.parse(text)
        except ConfigError as error:
            return Refused(str(error))
        token = self._tokens.get(given.id)
        if token is None:
            text = f"token {given.id.hex()} is not known: long over, or its node was revoked"
            return Refused(text)
        # Whether the secret is right must not show in the time that the answer takes.
        if not hmac.compare_digest(token.digest, sha256(given.secret).digest()):
            return Refused(f"token {given.id.hex()} with a wrong secret")
        why = ""
        if now_utc >= token.until_utc:
            why = f"expired {int(now_utc) - token.until_utc} s ago"
        elif token.name is not None and token.name != name:
            why = f"is for node {token.name}, not {name}"
        elif token.key is not None and token.key != key:
            why = "was used before, with another key"
        if why:
            return Refused(f"token {given.id.hex()} {why}")
        return Redeemed(token, token.key is not None)

    def use(self, token: Token, name: str, key: bytes) -> Token:
        """Note who has enrolled by a token that was judged good; return what is to be stored."""
        used = self._tokens[token.id] = replace(token, key=key, name=name)
        return used

    def take_used(self, name: str) -> list[bytes]:
        """Forget those by which a node has enrolled, and return the IDs."""
        used = [
            number for number, token in self._tokens.items() if token.key and token.name == name
        ]
        for number in used:
            del self._tokens[number]
        return used

    def take_expired(self, now_utc: float) -> list[bytes]:
        """Forget what is over, and return the IDs."""
        over = [number for number, token in self._tokens.items() if now_utc >= token.until_utc]
        for number in over:
            del self._tokens[number]
        return over
