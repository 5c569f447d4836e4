"""Join tokens as text: what an operator carries from the master to a new node.

    afbus-join:ID:SECRET:ROOT

ID and SECRET are 16 random bytes in hexadecimal, ROOT is the SHA-256 of the cluster's root
certificate in DER, by which the node knows the master before it has any certificate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from .errors import ConfigError

#: Size of ID and of SECRET.
RANDOM_BYTES: Final = 16

_TEXT: Final = re.compile("afbus-join:([0-9a-f]{32}):([0-9a-f]{32}):([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A token; whoever has it may enrol one node, once."""

    id: bytes
    secret: bytes = field(repr=False)
    root: bytes

    def format(self) -> str:
        """Return the text."""
        return f"afbus-join:{self.id.hex()}:{self.secret.hex()}:{self.root.hex()}"

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Return the token of a text; blanks around it do not count.

        Raises:
            ConfigError: The text is no token. It is not repeated, as it may be a secret.
        """
        found = _TEXT.fullmatch(text.strip())
        if found is None:
            raise ConfigError("this is no join token: afbus-join:ID:SECRET:ROOT, in hexadecimal")
        return cls(*(bytes.fromhex(one) for one in found.groups()))
