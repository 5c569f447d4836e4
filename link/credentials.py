"""What a member presents: its chain of certificates, and the key that proves that it is its own.

Invariants:

1. The key never leaves the process, and is in no `repr`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from cryptography import x509

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True)
class Credentials:
    """A chain and its key.

    Attributes:
        chain: DER, the own certificate first, then those between it and the CA. Empty: nothing to
            present, and every member refuses that.
        key: The private key of the first; ECDSA on P-256 or P-384 is what all carriers sign with.
    """

    chain: tuple[bytes, ...]
    key: EllipticCurvePrivateKey | Ed25519PrivateKey = field(repr=False)

    @cached_property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """The chain, parsed."""
        return tuple(x509.load_der_x509_certificate(der) for der in self.chain)
