"""Certificates for tests: a cluster's CA, and bearers with one thing wrong at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from afbus.link.certificate import Authority, to_der
from afbus.link.credentials import Credentials
from afbus.link.identity import Identity, Role

if TYPE_CHECKING:
    from collections.abc import Sequence

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
DAY = timedelta(days=1)
BOTH = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)


def node(name: str, cluster: str = "test") -> Identity:
    """The identity of a node."""
    return Identity(cluster, Role.NODE, name)


@dataclass(frozen=True)
class Signer:
    """A CA: its certificate, its key, and the certificates above it that a bearer presents."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    above: tuple[x509.Certificate, ...] = ()

    @classmethod
    def root(cls, name: str = "test root") -> Signer:
        """A self-signed CA."""
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(_sign_ca(name, key, name, key), key)

    def issuing(self, name: str = "issuing") -> Signer:
        """A CA below this one; what it signs comes with its certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        certificate = _sign_ca(name, key, str(issuer), self.key)
        return Signer(certificate, key, (certificate, *self.above))

    def authority(self, cluster: str = "test", denied: Sequence[int] = ()) -> Authority:
        """What a member trusts that trusts this CA."""
        return Authority(cluster, (self.certificate,), frozenset(denied))

    def issue(self, identity: Identity | None, wish: Wish | None = None) -> Credentials:
        """Credentials for an identity; without one the certificate has a CN alone."""
        wish = wish or Wish()
        key = ec.generate_private_key(ec.SECP256R1())
        common = identity.name if identity else "a"
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(common))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(wish.serial or x509.random_serial_number())
            .not_valid_before(wish.start)
            .not_valid_after(wish.end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )
        if wish.usages:
            usage = x509.ExtendedKeyUsage(wish.usages)
            builder = builder.add_extension(usage, critical=False)
        if wish.has_key_usage:
            builder = builder.add_extension(_key_usage(is_ca=False), critical=True)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in wish.uris]
        if identity is not None:
            names.append(x509.UniformResourceIdentifier(identity.format()))
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if wish.padding_bytes:
            oid = x509.ObjectIdentifier("1.3.6.1.4.1.55555.1")
            filler = x509.UnrecognizedExtension(oid, bytes(wish.padding_bytes))
            builder = builder.add_extension(filler, critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        return Credentials(to_der((certificate, *self.above)), key)


@dataclass(frozen=True)
class Wish:
    """What differs from a good certificate."""

    start: datetime = NOW - DAY
    end: datetime = NOW + DAY
    usages: tuple[x509.ObjectIdentifier, ...] = BOTH
    has_key_usage: bool = True
    uris: tuple[str, ...] = ()
    serial: int | None = None
    padding_bytes: int = 0


def self_signed(identity: Identity) -> Credentials:
    """A certificate with a member's name that its bearer signed itself."""
    return replace(Signer.root(identity.name), above=()).issue(identity)


def deep(identity: Identity, depth: int) -> tuple[Signer, Credentials]:
    """A root, and credentials with `depth` certificates up to it."""
    root = signer = Signer.root()
    for level in range(depth - 1):
        signer = signer.issuing(f"level {level}")
    return root, signer.issue(identity)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _sign_ca(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - 100 * DAY)
        .not_valid_after(NOW + 100 * DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .sign(issuer_key, hashes.SHA256())
    )
