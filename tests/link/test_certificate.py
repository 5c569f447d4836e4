"""The one function that judges certificates: each rule bites, and names itself (case 33)."""

from __future__ import annotations

import random
from datetime import timedelta
from hashlib import sha256

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.link.authority import BOTH, DAY, NOW, Signer, Wish, deep, node, self_signed

from afbus.link.certificate import (
    Authority,
    Pinned,
    Refusal,
    Refused,
    Side,
    judge,
    judge_pinned,
    to_der,
)
from afbus.link.identity import Identity, Role
from afbus.proto.errors import InvalidArgument

ROOT = Signer.root()
ISSUING = ROOT.issuing()
AUTHORITY = ROOT.authority()
A = node("a")
GOOD = ISSUING.issue(A)


def verdict(
    chain: tuple[bytes, ...],
    authority: Authority = AUTHORITY,
    side: Side = Side.CLIENT,
    claim: Identity | None = None,
) -> Identity | Refusal:
    """What is said of a chain: an identity, or the rule alone."""
    got = judge(chain, authority=authority, side=side, at_utc=NOW, claim=claim)
    return got.reason if isinstance(got, Refused) else got


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("signer", [ROOT, ISSUING], ids=["root", "issuing"])
def test_a_good_certificate_names_its_bearer(signer: Signer, side: Side) -> None:
    """From the root or through an issuing CA, as client and as server."""
    assert verdict(signer.issue(A).chain, side=side) == A
    assert verdict(signer.issue(A).chain, side=side, claim=A) == A


@pytest.mark.parametrize("role", Role)
def test_each_role_has_its_name(role: Role) -> None:
    """Nodes, masters and principals are told apart by their name."""
    identity = Identity("test", role, "x")
    assert verdict(ROOT.issue(identity).chain) == identity


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ((), Refusal.NONE),
        (self_signed(A).chain, Refusal.UNTRUSTED),
        (Signer.root().issue(A).chain, Refusal.UNTRUSTED),
        (GOOD.chain[:1], Refusal.UNTRUSTED),
        (ISSUING.issue(A, Wish(end=NOW - timedelta(seconds=1))).chain, Refusal.EXPIRED),
        (ISSUING.issue(A, Wish(start=NOW + timedelta(seconds=1))).chain, Refusal.NOT_YET),
        (ISSUING.issue(A, Wish(usages=BOTH[1:])).chain, Refusal.USAGE),
        (ISSUING.issue(A, Wish(usages=())).chain, Refusal.USAGE),
        (ISSUING.issue(A, Wish(has_key_usage=False)).chain, Refusal.USAGE),
        (
            ISSUING.issue(A, Wish(usages=(ExtendedKeyUsageOID.CODE_SIGNING,))).chain,
            Refusal.USAGE,
        ),
        (ISSUING.issue(None).chain, Refusal.NO_NAME),
        (ISSUING.issue(A, Wish(uris=("afbus://test/node/b",))).chain, Refusal.NO_NAME),
        (ISSUING.issue(None, Wish(uris=("https://test/node/a",))).chain, Refusal.NO_NAME),
        (ISSUING.issue(None, Wish(uris=("afbus://test/node/a/b",))).chain, Refusal.NO_NAME),
        (ISSUING.issue(None, Wish(uris=("afbus://test/king/a",))).chain, Refusal.NO_NAME),
        (ISSUING.issue(node("a", "other")).chain, Refusal.CLUSTER),
        (ISSUING.issue(A, Wish(padding_bytes=65536)).chain, Refusal.TOO_LARGE),
        (deep(A, 20)[1].chain, Refusal.TOO_DEEP),
        ((GOOD.chain[0][:-20], *GOOD.chain[1:]), Refusal.MALFORMED),
        ((b"",), Refusal.MALFORMED),
    ],
)
def test_case33_each_rule_refuses_with_its_reason(
    chain: tuple[bytes, ...], reason: Refusal
) -> None:
    """What is wrong is what is said to be wrong."""
    assert verdict(chain) is reason


def test_case33_depth_is_limited_in_the_right_chain_too() -> None:
    """A chain of 20 up to the own root is refused by its depth alone."""
    root, credentials = deep(A, 20)
    assert verdict(credentials.chain, root.authority()) is Refusal.TOO_DEEP
    root, credentials = deep(A, 4)
    assert verdict(credentials.chain, root.authority()) == A


def test_case33_usage_is_judged_in_both_directions() -> None:
    """A certificate for clients is no server's, and the other way round."""
    client = ISSUING.issue(A, Wish(usages=(ExtendedKeyUsageOID.CLIENT_AUTH,)))
    server = ISSUING.issue(A, Wish(usages=(ExtendedKeyUsageOID.SERVER_AUTH,)))
    assert verdict(client.chain, side=Side.CLIENT) == A
    assert verdict(client.chain, side=Side.SERVER) is Refusal.USAGE
    assert verdict(server.chain, side=Side.SERVER) == A
    assert verdict(server.chain, side=Side.CLIENT) is Refusal.USAGE


@pytest.mark.parametrize(
    "claim", [node("b"), Identity("test", Role.MASTER, "a"), Identity("test", Role.PRINCIPAL, "a")]
)
def test_case33_the_name_must_be_the_claimed_one(claim: Identity) -> None:
    """Another name and another role of the same cluster are somebody else."""
    assert verdict(GOOD.chain, claim=claim) is Refusal.CLAIM


def test_case33_a_revoked_serial_is_out() -> None:
    """Of the bearer, of the issuing CA, and of a CA that was not presented."""
    leaf, issuing = GOOD.certificates
    assert verdict(GOOD.chain, ROOT.authority(denied=[leaf.serial_number])) is Refusal.REVOKED
    assert verdict(GOOD.chain, ROOT.authority(denied=[issuing.serial_number])) is Refusal.REVOKED
    root = ROOT.authority(denied=[ROOT.certificate.serial_number])
    assert verdict(GOOD.chain, root) is Refusal.REVOKED


def test_case33_a_ca_is_no_member() -> None:
    """The certificate of the CA itself opens nothing, and neither does no trust at all."""
    assert verdict(to_der(ISSUING.above)) is Refusal.USAGE
    assert verdict(GOOD.chain, Authority("test", ())) is Refusal.UNTRUSTED


def test_case33_an_expired_issuing_ca_is_no_path() -> None:
    """Every certificate of the path must be valid at the time, not the first alone."""
    late = NOW + 101 * DAY
    credentials = ISSUING.issue(A, Wish(end=NOW + 200 * DAY))
    got = judge(credentials.chain, authority=AUTHORITY, side=Side.CLIENT, at_utc=late)
    assert isinstance(got, Refused)
    assert got.reason is Refusal.UNTRUSTED


def test_hostile_certificates_are_values_and_not_exceptions() -> None:
    """Any bytes are refused with a reason (seeded)."""
    rng = random.Random(33)
    for _ in range(5000):
        der = bytearray(GOOD.chain[0])
        for _ in range(rng.randint(1, 4)):
            der[rng.randrange(len(der))] = rng.randrange(256)
        got = verdict((bytes(der), *GOOD.chain[1:]))
        assert isinstance(got, Refusal) or bytes(der) == GOOD.chain[0]


MASTER = Identity("test", Role.MASTER, "m")


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ((), Refusal.NONE),
        (GOOD.chain, Refusal.UNTRUSTED),
        ((*ISSUING.issue(MASTER).chain, *to_der([ROOT.certificate])), None),
        ((*GOOD.chain, *to_der([ROOT.certificate])), Refusal.CLAIM),
        ((b"x", *to_der([ROOT.certificate])), Refusal.MALFORMED),
        ((*ROOT.issue(None).chain, *to_der([ROOT.certificate])), Refusal.NO_NAME),
        ((*self_signed(MASTER).chain, *to_der([ROOT.certificate])), Refusal.UNTRUSTED),
        (to_der([ROOT.certificate]), Refusal.NO_NAME),
    ],
)
def test_case38_a_master_is_known_by_the_digest_of_its_root(
    chain: tuple[bytes, ...], reason: Refusal | None
) -> None:
    """By a chain up to it, as a master, and of whatever cluster it says; else by nothing."""
    digest = sha256(to_der([ROOT.certificate])[0]).digest()
    got = judge_pinned(chain, digest, at_utc=NOW)
    if reason is None:
        assert got == Pinned(MASTER, ROOT.certificate)
    else:
        assert isinstance(got, Refused)
        assert got.reason is reason


@pytest.mark.parametrize(
    "text",
    ["", "afbus://a/node", "afbus://a/node/", "afbus:///node/b", "afbus://a/node/..", "a/node/b",
     "afbus://a/NODE/b", "afbus://a/node/b c", "afbus://a/node/b\n", "afbus://a/node/%61",
     "afbus://a/node/" + "x" * 256, "afbus://ä/node/b"],
)  # fmt: skip
def test_identity_has_one_reading(text: str) -> None:
    """What is not written exactly so is no identity."""
    with pytest.raises(InvalidArgument):
        Identity.parse(text)


def test_identity_comes_back_from_its_text() -> None:
    """parse(format(i)) == i."""
    for role in Role:
        identity = Identity("c-1", role, "web.01_x")
        assert Identity.parse(identity.format()) == identity == Identity.parse(str(identity))
