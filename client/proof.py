"""Who a process is in its cluster: a certificate, and the key that proves it.

`afbus master issue PRINCIPAL --out FOLDER` makes both. Without a proof an endpoint is the user whom
its node attests, `uid/UID@NODE`; with one it is `principal/NAME` on whatever node.

Needs the package `cryptography`, which `pip install 'afbus[cluster]'` brings along.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..proto.errors import ConfigError
from ..proto.operation import CERTIFICATE_BYTES, CHAIN

if TYPE_CHECKING:
    import os


@dataclass(frozen=True)
class Proof:
    """A certificate and its key; made by `load`.

    Attributes:
        chain: DER, the own certificate first.
    """

    chain: tuple[bytes, ...]
    _key: Any = field(repr=False)

    @classmethod
    def load(cls, certificate: str | os.PathLike[str], key: str | os.PathLike[str]) -> Proof:
        """Read two files in PEM: the certificate with those above it, and the private key.

        Raises:
            ConfigError: A file cannot be read, or is something else; or `cryptography` is missing.
        """
        try:
            from cryptography import x509
            from cryptography.hazmat.primitives.asymmetric import ec, ed25519
            from cryptography.hazmat.primitives.serialization import (
                Encoding,
                load_pem_private_key,
            )
        except ImportError as error:
            text = f"a proof needs {error.name}: pip install 'afbus[cluster]'"
            raise ConfigError(text) from error
        try:
            found = x509.load_pem_x509_certificates(_read(certificate))
        except ValueError as error:
            raise ConfigError(f"no certificates: {error}", file=str(certificate)) from error
        chain = tuple(one.public_bytes(Encoding.DER) for one in found)
        if len(chain) > CHAIN or max(map(len, chain)) > CERTIFICATE_BYTES:
            raise ConfigError(
                f"more than {CHAIN} certificates, or large ones", file=str(certificate)
            )
        try:
            secret = load_pem_private_key(_read(key), None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"no private key: {error}", file=str(key)) from error
        if not isinstance(secret, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
            raise ConfigError("a key on an elliptic curve is wanted", file=str(key))
        if secret.public_key() != found[0].public_key():
            raise ConfigError(f"not the key of {certificate}", file=str(key))
        return cls(chain, secret)

    def sign(self, claim: bytes) -> bytes:
        """Return the signature over what the cluster's master wants to be signed."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            return self._key.sign(claim, ec.ECDSA(hashes.SHA256()))
        signature: bytes = self._key.sign(claim)
        return signature


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
