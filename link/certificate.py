"""Whether a certificate is good: one function for both carriers, without a clock inside.

`judge` takes what a peer presented, who it should be, and the time; it returns an `Identity`, or a
`Refused` with a reason that the log, the audit and the tests name.

Invariants:

1. `judge` never raises for what a peer presented, however malformed.
2. The name comes from one URI of the subject alternative name, never from the subject (CN).
3. Size and number are judged before anything is parsed, and signatures last: what is cheap first.
4. Who holds the private key is not judged here: the handshake proves that.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from ..proto.errors import InvalidArgument
from ..proto.text import clip
from .identity import Identity, Role

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime

#: Certificates that a peer may present: its own, an issuing one, and a spare for a rollover.
CHAIN_CERTIFICATES: Final = 4
#: Size of all that a peer may present: four of a generous 3 KiB. aioquic sends no more than 16 KiB
#: of handshake at a time.
CHAIN_BYTES: Final = 12 * 1024
#: Names in one certificate; a member has one, and perhaps DNS names for other software.
NAMES: Final = 16
#: What the parser raises. It is lazy: extensions, times and keys are read when looked at.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
#: The longest text of a refusal; verifiers may be talkative.
_TEXT_BYTES: Final = 300


class Side(Enum):
    """Which part a bearer plays in a handshake; decides on the extended key usage."""

    CLIENT = "client"
    SERVER = "server"


class Refusal(Enum):
    """Why a certificate is no good; the value is the name of the rule in log and audit."""

    NONE = "no-certificate"
    TOO_LARGE = "certificate-too-large"
    TOO_DEEP = "chain-too-deep"
    MALFORMED = "certificate-malformed"
    EXPIRED = "certificate-expired"
    NOT_YET = "certificate-not-yet-valid"
    USAGE = "certificate-wrong-usage"
    NO_NAME = "certificate-without-name"
    CLUSTER = "certificate-of-other-cluster"
    CLAIM = "certificate-of-other-name"
    REVOKED = "certificate-revoked"
    UNTRUSTED = "certificate-untrusted"
    #: Somebody else's certificate: the peer does not hold its key. The handshake finds it.
    KEY = "certificate-without-key"
    RESUMED = "session-resumed"
    NOT_ADMITTED = "not-admitted"
    #: Not we have refused: the peer has, ours; the text is all that it says.
    BY_PEER = "refused-by-peer"


@dataclass(frozen=True, slots=True)
class Refused:
    """A certificate that is no good: the rule, and a text for the operator (not for the peer)."""

    reason: Refusal
    text: str

    def __str__(self) -> str:
        """Return rule and text."""
        return f"{self.reason.value}: {self.text}"


@dataclass(frozen=True, slots=True)
class Authority:
    """What a member trusts: its cluster's name, the certificates of its CAs, and who is out.

    Attributes:
        cluster: Name of the cluster; certificates of others are refused whoever signed them.
        anchors: The CAs. More than one while a CA is replaced.
        denied: Serial numbers that were revoked. Serials of the issuing CAs count too.
    """

    cluster: str
    anchors: tuple[x509.Certificate, ...]
    denied: frozenset[int] = frozenset()


def judge(
    presented: Sequence[bytes],
    *,
    authority: Authority,
    side: Side,
    at_utc: datetime,
    claim: Identity | None = None,
) -> Identity | Refused:
    """Judge what a peer presented.

    Args:
        presented: DER, the peer's own certificate first, in any order behind it.
        authority: Who may sign, and what was revoked.
        side: Which part the peer plays: a server needs serverAuth, a client clientAuth.
        at_utc: The time at which all certificates must be valid, with its time zone.
        claim: Who the peer must be; None accepts every member of the cluster.

    Returns:
        Who the peer is, or why it is refused. Cost: one signature for each certificate.
    """
    if not presented:
        return Refused(Refusal.NONE, "the peer presented nothing")
    if (too_much := judge_size(presented)) is not None:
        return too_much
    with warnings.catch_warnings():
        # What is odd but harmless in a stranger's certificate must not become a log of its own.
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        try:
            chain = [x509.load_der_x509_certificate(der) for der in presented]
            return _judge_chain(chain, authority, side, at_utc, claim)
        except _UNREADABLE as error:
            return _refused(Refusal.MALFORMED, f"cannot be parsed: {error}")


@dataclass(frozen=True, slots=True)
class Pinned:
    """A master that has proved to be of the cluster whose root was known by its digest alone."""

    identity: Identity
    root: x509.Certificate


def judge_pinned(
    presented: Sequence[bytes], root_digest: bytes, *, at_utc: datetime
) -> Pinned | Refused:
    """Judge a master whom one knows nothing of but the digest of its cluster's root certificate.

    Args:
        presented: As for `judge`; the root must be among them.
        root_digest: SHA-256 of the root in DER, as a join token has it.
        at_utc: As for `judge`.
    """
    roots = [der for der in presented if sha256(der).digest() == root_digest]
    if not roots:
        # Too much, too malformed or nothing is said so; else it is another cluster.
        nobody = Authority("", ())
        refused = judge(presented, authority=nobody, side=Side.SERVER, at_utc=at_utc)
        assert isinstance(refused, Refused)
        is_other = refused.reason is Refusal.UNTRUSTED
        why = "this is not the cluster of the token: another root"
        return Refused(Refusal.UNTRUSTED, why) if is_other else refused
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        try:
            root = x509.load_der_x509_certificate(roots[0])
            name = _read_name(x509.load_der_x509_certificate(presented[0]))
        except _UNREADABLE as error:
            return _refused(Refusal.MALFORMED, f"cannot be parsed: {error}")
    if isinstance(name, Refused):
        return name
    verdict = judge(
        presented, authority=Authority(name.cluster, (root,)), side=Side.SERVER, at_utc=at_utc
    )
    if isinstance(verdict, Refused):
        return verdict
    if verdict.role is not Role.MASTER:
        return _refused(Refusal.CLAIM, f"{verdict}, and no master")
    return Pinned(verdict, root)


def judge_size(presented: Collection[bytes]) -> Refused | None:
    """Judge the number and the size alone, before anything is parsed."""
    if len(presented) > CHAIN_CERTIFICATES:
        text = f"{len(presented)} certificates, limit {CHAIN_CERTIFICATES}"
        return Refused(Refusal.TOO_DEEP, text)
    size = sum(map(len, presented))
    if size > CHAIN_BYTES:
        return Refused(Refusal.TOO_LARGE, f"{size} bytes of certificates, limit {CHAIN_BYTES}")
    return None


def _refused(reason: Refusal, text: str) -> Refused:
    return Refused(reason, clip(text, _TEXT_BYTES))


def _judge_chain(
    chain: list[x509.Certificate],
    authority: Authority,
    side: Side,
    at_utc: datetime,
    claim: Identity | None,
) -> Identity | Refused:
    leaf = chain[0]
    identity = _read_name(leaf)
    refused = (
        _judge_dates(leaf, at_utc)
        or _judge_usage(leaf, side)
        or _judge_serials(chain, authority)
        or (identity if isinstance(identity, Refused) else None)
        or _judge_signatures(chain, authority, at_utc)
    )
    if refused is not None:
        return refused
    assert isinstance(identity, Identity)
    if identity.cluster != authority.cluster:
        return _refused(Refusal.CLUSTER, f"{identity}, and not of {authority.cluster}")
    if claim is not None and identity != claim:
        return _refused(Refusal.CLAIM, f"{identity}, and not {claim}")
    return identity


def _judge_dates(leaf: x509.Certificate, at_utc: datetime) -> Refused | None:
    if at_utc < leaf.not_valid_before_utc:
        return _refused(Refusal.NOT_YET, f"valid from {leaf.not_valid_before_utc}, now {at_utc}")
    if at_utc > leaf.not_valid_after_utc:
        return _refused(Refusal.EXPIRED, f"valid until {leaf.not_valid_after_utc}, now {at_utc}")
    return None


def _judge_usage(leaf: x509.Certificate, side: Side) -> Refused | None:
    wanted = {
        Side.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH,
        Side.SERVER: ExtendedKeyUsageOID.SERVER_AUTH,
    }[side]
    try:
        extended = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as error:
        return _refused(Refusal.USAGE, f"no {error.oid._name}")
    if wanted not in extended:
        return _refused(Refusal.USAGE, f"not for a {side.value}")
    if not usage.digital_signature:
        return _refused(Refusal.USAGE, "not for signatures")
    if usage.key_cert_sign:
        return _refused(Refusal.USAGE, "a CA is no member")
    return None


def _judge_serials(chain: list[x509.Certificate], authority: Authority) -> Refused | None:
    for certificate in chain:
        if certificate.serial_number in authority.denied:
            return _refused(Refusal.REVOKED, f"serial {certificate.serial_number:x}")
    return None


def _read_name(leaf: x509.Certificate) -> Identity | Refused:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return _refused(Refusal.NO_NAME, "no subject alternative name")
    if len(names) > NAMES:
        return _refused(Refusal.NO_NAME, f"{len(names)} names, limit {NAMES}")
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    # A second URI would let two readers see two bearers.
    if len(uris) != 1:
        return _refused(Refusal.NO_NAME, f"{len(uris)} URIs, and not one")
    try:
        return Identity.parse(uris[0])
    except InvalidArgument as error:
        return _refused(Refusal.NO_NAME, error.message)


def _judge_signatures(
    chain: list[x509.Certificate], authority: Authority, at_utc: datetime
) -> Refused | None:
    """Look for a path from the leaf to a CA, each link signed and valid (RFC 5280)."""
    if not authority.anchors:
        return _refused(Refusal.UNTRUSTED, "no CA is trusted")
    verifier = (
        PolicyBuilder()
        .store(Store(list(authority.anchors)))
        .time(at_utc)
        .max_chain_depth(CHAIN_CERTIFICATES - 1)
        .extension_policies(
            ca_policy=ExtensionPolicy.webpki_defaults_ca(),
            # Usage and name were judged above, each with a reason of its own.
            ee_policy=ExtensionPolicy.webpki_defaults_ee()
            .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, None)
            .may_be_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None),
        )
        .build_client_verifier()
    )
    try:
        path = verifier.verify(chain[0], chain[1:]).chain
    except VerificationError as error:
        return _refused(Refusal.UNTRUSTED, str(error))
    # The CA of the path may be one of ours that was not presented.
    return _judge_serials(path, authority)


def to_der(certificates: Collection[x509.Certificate]) -> tuple[bytes, ...]:
    """Return certificates as they are presented."""
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in certificates)
