"""The cluster's certificates: what they say, and that links and frames are judged alike."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from afbus.link.certificate import Refused, Side, judge
from afbus.link.identity import Identity, Role
from afbus.master.issuer import (
    BACKDATE_S,
    ISSUING_LIFE_S,
    LEAF_LIFE_S,
    LEAF_LIFE_S_MAX,
    ROOT_LIFE_S,
    Issuer,
    Leaf,
    digest_key,
    make_issuing,
    make_key,
    make_request,
    make_root,
    read_cluster,
    read_leaf,
    sign_claim,
)
from afbus.proto.errors import IdentityError, InvalidArgument

NOW_UTC = 1_795_521_600
NODE = Identity("test", Role.NODE, "node-a")
PRINCIPAL = Identity("test", Role.PRINCIPAL, "alice")


def at(utc: float) -> datetime:
    """Return a time as certificates have it."""
    return datetime.fromtimestamp(utc, UTC)


@pytest.mark.parametrize("role", list(Role))
def test_case33_a_leaf_is_good_for_links_of_its_cluster(issuer: Issuer, role: Role) -> None:
    """On both sides of a handshake, in its time."""
    identity = Identity("test", role, "a.b-c_d")
    csr = make_request(make_key())
    issued = issuer.issue(csr, identity, 77, NOW_UTC)
    assert issued.not_after_utc == NOW_UTC + LEAF_LIFE_S
    assert read_leaf(issued.chain[0]) == Leaf(77, issued.not_after_utc, digest_key(csr))
    for side in Side:
        verdict = judge(
            issued.chain, authority=issuer.trust(), side=side, at_utc=at(NOW_UTC), claim=identity
        )
        assert verdict == identity
    for utc in (NOW_UTC - BACKDATE_S - 1, issued.not_after_utc + 1):
        verdict = judge(issued.chain, authority=issuer.trust(), side=Side.CLIENT, at_utc=at(utc))
        assert isinstance(verdict, Refused)


def test_case35_denied_serials_are_out(issuer: Issuer) -> None:
    """That of a leaf, and that of the issuing certificate with all that it signed."""
    issued = issuer.issue(make_request(make_key()), NODE, 77, NOW_UTC)
    for serial in (77, 2):
        trust = issuer.trust(frozenset({serial}))
        verdict = judge(issued.chain, authority=trust, side=Side.CLIENT, at_utc=at(NOW_UTC))
        assert isinstance(verdict, Refused)


def test_nothing_of_a_request_but_its_key_gets_into_a_leaf(issuer: Issuer) -> None:
    """Not the names that it asks for, not that it wants to be a CA."""
    key = make_key()
    wish = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=9), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier("afbus://test/master/evil")]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    csr = wish.public_bytes(serialization.Encoding.DER)
    leaf = x509.load_der_x509_certificate(issuer.issue(csr, NODE, 5, NOW_UTC).chain[0])
    assert leaf.public_key() == key.public_key()
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in san] == ["afbus://test/node/node-a"]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert "root" not in leaf.subject.rfc4514_string()


def test_keys_of_other_kinds_are_refused(issuer: Issuer) -> None:
    """RSA is slow, P-521 not everywhere; Ed25519 and P-384 are good."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    der = serialization.Encoding.DER
    good = [
        builder.sign(ed25519.Ed25519PrivateKey.generate(), None).public_bytes(der),
        builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()).public_bytes(der),
    ]
    bad = [
        builder.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256()).public_bytes(der),
        builder.sign(ec.generate_private_key(ec.SECP521R1()), hashes.SHA256()).public_bytes(der),
    ]
    assert len({digest_key(csr) for csr in good}) == 2
    for csr in bad:
        with pytest.raises(IdentityError, match="P-256"):
            issuer.issue(csr, NODE, 5, NOW_UTC)


def test_requests_that_are_none(issuer: Issuer) -> None:
    """Bytes, cut short, or signed by another key: one type of error."""
    csr = bytearray(make_request(make_key()))
    changed = bytes([*csr[:-1], csr[-1] ^ 1])
    for one in (b"", b"garbage", bytes(csr[:-9]), changed):
        with pytest.raises(IdentityError):
            issuer.issue(one, NODE, 5, NOW_UTC)
        with pytest.raises(IdentityError):
            digest_key(one)


def test_no_leaf_outlives_the_issuing_certificate(issuer: Issuer) -> None:
    """At its end nothing is issued any more, and the reason says what to do."""
    until = issuer.issuing_until_utc
    assert until == NOW_UTC - BACKDATE_S + ISSUING_LIFE_S
    csr = make_request(make_key())
    assert issuer.issue(csr, NODE, 5, until - 10).not_after_utc == until
    with pytest.raises(IdentityError, match="root key"):
        issuer.issue(csr, NODE, 5, until)
    assert issuer.issue(csr, NODE, 5, NOW_UTC, LEAF_LIFE_S_MAX).not_after_utc == (
        NOW_UTC + LEAF_LIFE_S_MAX
    )


def test_a_root_names_its_cluster() -> None:
    """And signs issuing certificates with its own key alone, none that outlives it."""
    key = make_key()
    root = make_root("prod.eu-1", key, 1, NOW_UTC)
    assert read_cluster(root) == "prod.eu-1"
    with pytest.raises(IdentityError, match="not the key"):
        make_issuing(root, make_key(), make_key(), 2, NOW_UTC)
    end = NOW_UTC - BACKDATE_S + ROOT_LIFE_S
    late = make_issuing(root, key, make_key(), 2, end - 100)
    assert late.not_valid_after_utc == root.not_valid_after_utc
    with pytest.raises(IdentityError, match="over"):
        make_issuing(root, key, make_key(), 2, end + 100)
    with pytest.raises(InvalidArgument):
        make_root("a/b", key, 1, NOW_UTC)


def test_parts_that_do_not_belong_together(issuer: Issuer) -> None:
    """Files of two clusters, or of two keys, are seen at the start."""
    key, issuing_key = make_key(), make_key()
    root = make_root("test", key, 1, NOW_UTC)
    other = make_root("test", make_key(), 1, NOW_UTC)
    issuing = make_issuing(root, key, issuing_key, 2, NOW_UTC)
    Issuer(root, issuing, issuing_key)
    with pytest.raises(IdentityError, match="not signed"):
        Issuer(other, issuing, issuing_key)
    with pytest.raises(IdentityError, match="issuing key"):
        Issuer(root, issuing, make_key())
    with pytest.raises(IdentityError, match="root certificate"):
        Issuer(issuing, issuing, issuing_key)
    assert issuer.root_digest != sha_of(root)


def sha_of(certificate: x509.Certificate) -> bytes:
    """Return what a token says of a root."""
    return certificate.fingerprint(hashes.SHA256())


def test_d17_an_endpoint_proves_its_certificate(issuer: Issuer) -> None:
    """By a signature over what the master drew, with either kind of key."""
    key = make_key()
    issued = issuer.issue(make_request(key), PRINCIPAL, 6, NOW_UTC)
    proven = issuer.prove(issued.chain, sign_claim(key, b"claim"), b"claim", NOW_UTC)
    assert (proven.identity, proven.serial) == (PRINCIPAL, 6)
    assert proven.until_utc == issued.not_after_utc
    edwards = ed25519.Ed25519PrivateKey.generate()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    csr = builder.sign(edwards, None).public_bytes(serialization.Encoding.DER)
    chain = issuer.issue(csr, PRINCIPAL, 7, NOW_UTC).chain
    assert issuer.prove(chain, edwards.sign(b"claim"), b"claim", NOW_UTC).serial == 7


def test_case33_proofs_that_are_none(issuer: Issuer) -> None:
    """Another claim, another key, another cluster, no chain, too late, denied, garbage."""
    key = make_key()
    chain = issuer.issue(make_request(key), PRINCIPAL, 6, NOW_UTC).chain
    signature = sign_claim(key, b"claim")
    root_key, issuing_key = make_key(), make_key()
    root = make_root("test", root_key, 1, NOW_UTC)
    stranger = Issuer(root, make_issuing(root, root_key, issuing_key, 2, NOW_UTC), issuing_key)
    foreign = stranger.issue(make_request(key), PRINCIPAL, 6, NOW_UTC).chain
    late = NOW_UTC + LEAF_LIFE_S + 1
    for presented, signed, utc, denied in (
        (chain, sign_claim(key, b"other"), NOW_UTC, ()),
        (chain, sign_claim(make_key(), b"claim"), NOW_UTC, ()),
        (chain, b"", NOW_UTC, ()),
        (foreign, signature, NOW_UTC, ()),
        (chain[:1], signature, NOW_UTC, ()),
        ((), signature, NOW_UTC, ()),
        ((b"garbage",), signature, NOW_UTC, ()),
        (chain[1:], signature, NOW_UTC, ()),
        (chain, signature, late, ()),
        (chain, signature, NOW_UTC, (6,)),
    ):
        with pytest.raises(IdentityError):
            issuer.prove(presented, signed, b"claim", utc, frozenset(denied))
