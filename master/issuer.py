"""The certificates of a cluster: a root that may lie in a drawer, and a key that issues.

    root      10 years    signs issuing certificates only; its key is needed once a year
    issuing   1 year      signs everything else; lies with the master
    leaf      24 hours    a node, a principal or a master; see `link/identity.py`

A leaf is client and server at once, and its name stands in a URI SAN, nowhere else. Whoever has one
renews it at half of its life; a certificate that nobody renews is what takes a node that is gone
out of the cluster in the end.

Nothing here touches a file or knows the time (`directory.py` has the files).

Invariants:

1. A leaf says what the caller decided: nothing of the request but its public key gets into it.
2. A request is checked before anything is made of it: its signature, the kind of its key.
3. Foreign exceptions leave this module as `IdentityError`.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..link.certificate import Authority, Refused, Side, judge
from ..link.identity import Identity, Role
from ..proto.errors import IdentityError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT_LIFE_S: Final = 10 * 365 * 86_400.0
ISSUING_LIFE_S: Final = 365 * 86_400.0
#: Life of a leaf: after that time whoever was not reached by a revocation is out anyway.
LEAF_LIFE_S: Final = 86_400
#: Leaves of principals may live longer, where nobody is there to renew them.
LEAF_LIFE_S_MAX: Final = 7 * 86_400
#: Clocks of hosts differ: a leaf is good from a little before it was made.
BACKDATE_S: Final = 60

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey
_PublicKey: TypeAlias = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

_DER: Final = serialization.Encoding.DER
_CURVES: Final = ("secp256r1", "secp384r1")


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was made: `chain` is DER, leaf first, without the root."""

    identity: Identity
    serial: int
    not_before_utc: int
    not_after_utc: int
    chain: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Proven:
    """Whose certificate a chain and a signature have proven, and until when it is good."""

    identity: Identity
    serial: int
    until_utc: int


@contextmanager
def _border(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{what}: {error}") from error
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.InvalidVersion) as error:
        raise IdentityError(f"{what}: {error}") from error


def make_key() -> PrivateKey:
    """Return a new secret key on P-256, which every TLS speaks."""
    return ec.generate_private_key(ec.SECP256R1())


def make_request(key: PrivateKey) -> bytes:
    """Return a certificate request in DER; it names nobody, as the issuer decides that."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(_DER)


def digest_key(csr: bytes) -> bytes:
    """Return the SHA-256 of the public key of a request in DER.

    Raises:
        IdentityError: It is no request, or not signed by its own key.
    """
    return sha256(_spki(_read_request(csr))).digest()


def sign_claim(key: PrivateKey, claim: bytes) -> bytes:
    """Return the signature that `Issuer.prove` wants: what an endpoint does with its key."""
    return key.sign(claim, ec.ECDSA(hashes.SHA256()))


def _spki(key: _PublicKey) -> bytes:
    return key.public_bytes(_DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _checked_public(key: object) -> _PublicKey:
    """Return a public key of a kind that we issue for."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return key
    raise IdentityError("the key is none of P-256, P-384, Ed25519")


def _read_request(csr: bytes) -> _PublicKey:
    with _border("certificate request"):
        request = x509.load_der_x509_csr(csr)
        key = _checked_public(request.public_key())
        if not request.is_signature_valid:
            raise IdentityError("certificate request is not signed by its own key")
    return key


def _at(utc: float) -> datetime:
    return datetime.fromtimestamp(utc, UTC)


def _name(cluster: str, what: str) -> x509.Name:
    # For people who look at the file; whom it names stands in the SAN.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{cluster} {what}"[:64])])


def _usage(*, is_issuer: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_issuer,
        key_cert_sign=is_issuer,
        crl_sign=is_issuer,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _build(  # noqa: PLR0913 (the fields of a certificate)
    subject: x509.Name,
    issuer: x509.Name,
    key: _PublicKey,
    issuer_key: _PublicKey,
    serial: int,
    begin: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    own = x509.SubjectKeyIdentifier.from_public_key(key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(own, critical=False)
        .add_extension(above, critical=False)
    )


def make_root(cluster: str, key: PrivateKey, serial: int, now_utc: float) -> x509.Certificate:
    """Return the root certificate of a new cluster, which names it in its SAN.

    Raises:
        InvalidArgument: The name of the cluster may not be one. EINVAL.
    """
    Identity(cluster, Role.MASTER, "name")
    name, public, begin = _name(cluster, "root"), key.public_key(), _at(now_utc - BACKDATE_S)
    end = begin + timedelta(seconds=ROOT_LIFE_S)
    san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"afbus://{cluster}/")])
    return (
        _build(name, name, public, public, serial, begin, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_usage(is_issuer=True), critical=True)
        .add_extension(san, critical=False)
        .sign(key, hashes.SHA256())
    )


def make_issuing(
    root: x509.Certificate, root_key: PrivateKey, key: PrivateKey, serial: int, now_utc: float
) -> x509.Certificate:
    """Return a certificate for an issuing key, signed by the root; it does not outlive the root.

    Raises:
        IdentityError: The key is not the root's.
    """
    if root_key.public_key() != root.public_key():
        raise IdentityError("this is not the key of the root certificate")
    begin = _at(now_utc - BACKDATE_S)
    end = min(begin + timedelta(seconds=ISSUING_LIFE_S), root.not_valid_after_utc)
    if end <= begin:
        raise IdentityError("the root certificate is over")
    name = _name(read_cluster(root), "issuing")
    above = root_key.public_key()
    return (
        _build(name, root.subject, key.public_key(), above, serial, begin, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_issuer=True), critical=True)
        .sign(root_key, hashes.SHA256())
    )


def read_cluster(root: x509.Certificate) -> str:
    """Return the name of the cluster of a root certificate.

    Raises:
        IdentityError: It is no root of ours.
    """
    with _border("root certificate"):
        san = root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = san.get_values_for_type(x509.UniformResourceIdentifier)
    found = re.fullmatch("afbus://([^/]+)/", uris[0]) if len(uris) == 1 else None
    if found is None:
        raise IdentityError("root certificate names no cluster")
    return found[1]


class Issuer:
    """Issues leaves, and judges certificates that come in frames (links judge their own)."""

    def __init__(self, root: x509.Certificate, issuing: x509.Certificate, key: PrivateKey) -> None:
        """Take what `directory.py` read.

        Raises:
            IdentityError: The three do not belong together.
        """
        self.cluster = read_cluster(root)
        self.root = root.public_bytes(_DER)
        self._issuing, self._key, self._root = issuing, key, root
        with _border("issuing certificate"):
            try:
                issuing.verify_directly_issued_by(root)
            except InvalidSignature as error:
                raise IdentityError("issuing certificate was not signed by this root") from error
        if issuing.public_key() != key.public_key():
            raise IdentityError("issuing key is not that of the issuing certificate")

    @property
    def root_digest(self) -> bytes:
        """SHA-256 of the root certificate, for join tokens."""
        return sha256(self.root).digest()

    @property
    def issuing_until_utc(self) -> float:
        """When the issuing certificate ends; no leaf outlives it."""
        return self._issuing.not_valid_after_utc.timestamp()

    def trust(self, denied: frozenset[int] = frozenset()) -> Authority:
        """Return what links of this cluster trust, while these serial numbers are denied."""
        return Authority(self.cluster, (self._root,), denied)

    def issue(
        self,
        csr: bytes,
        identity: Identity,
        serial: int,
        now_utc: float,
        life_s: float = LEAF_LIFE_S,
    ) -> Issued:
        """Return a leaf for the key of a request.

        Args:
            csr: The request, DER; only its key counts.
            identity: Whom it names, of this cluster.
            serial: A positive number of at most 20 bytes; two certificates never share one.
            now_utc: The time.
            life_s: Up to `LEAF_LIFE_S_MAX`.

        Raises:
            IdentityError: The request is wrong, or the issuing certificate is over.
        """
        assert 0 < life_s <= LEAF_LIFE_S_MAX
        assert identity.cluster == self.cluster
        public = _read_request(csr)
        begin = int(now_utc) - BACKDATE_S
        end = min(int(now_utc + life_s), int(self.issuing_until_utc))
        if end <= now_utc:
            text = "the issuing certificate is over; renew it with the root key"
            raise IdentityError(text)
        subject = _name(self.cluster, f"{identity.role.value} {identity.name}")
        above = self._key.public_key()
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.format())])
        both = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        issuer = self._issuing.subject
        leaf = (
            _build(subject, issuer, public, above, serial, _at(begin), _at(end))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(is_issuer=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(both), critical=False)
            .add_extension(san, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        chain = (leaf.public_bytes(_DER), self._issuing.public_bytes(_DER))
        return Issued(identity, serial, begin, end, chain)

    def prove(
        self,
        chain: Sequence[bytes],
        signature: bytes,
        claim: bytes,
        now_utc: float,
        denied: frozenset[int] = frozenset(),
    ) -> Proven:
        """Return whose certificate this is, after `claim` was signed with its key.

        Args:
            chain: DER, leaf first, then those between it and the root.
            signature: Over `claim`: ECDSA with SHA-256, or Ed25519.
            claim: What was to be signed; it must contain a number drawn by us.
            now_utc: The time.
            denied: Serial numbers that were revoked.

        Raises:
            IdentityError: Anything is wrong. The text names what.
        """
        verdict = judge(chain, authority=self.trust(denied), side=Side.CLIENT, at_utc=_at(now_utc))
        if isinstance(verdict, Refused):
            raise IdentityError(str(verdict))
        with _border("certificate"):
            leaf = x509.load_der_x509_certificate(chain[0])
            key = _checked_public(leaf.public_key())
            try:
                if isinstance(key, ed25519.Ed25519PublicKey):
                    key.verify(signature, claim)
                else:
                    key.verify(signature, claim, ec.ECDSA(hashes.SHA256()))
            except InvalidSignature as error:
                raise IdentityError("signature is not by the key of the certificate") from error
        return Proven(verdict, leaf.serial_number, int(leaf.not_valid_after_utc.timestamp()))


@dataclass(frozen=True, slots=True)
class Leaf:
    """What the master keeps of the certificate with which somebody came: `key` is a SHA-256."""

    serial: int
    until_utc: int
    key: bytes


def read_leaf(der: bytes) -> Leaf:
    """Return what to keep of a certificate that was judged good."""
    leaf = x509.load_der_x509_certificate(der)
    key = sha256(_spki(_checked_public(leaf.public_key()))).digest()
    return Leaf(leaf.serial_number, int(leaf.not_valid_after_utc.timestamp()), key)
