"""Who is refused before it can send a byte, each with its reason, on both carriers (case 33)."""

from __future__ import annotations

import logging
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.link.authority import DAY, NOW, Signer, Wish, deep, node, self_signed
from tests.link.world import AUTHORITY, ISSUING, ROOT, WORLDS, End, Place, World

from afbus.link.carrier import ENROL_BYTES, Enrolled
from afbus.link.certificate import Authority, to_der
from afbus.link.credentials import Credentials
from afbus.link.effect import Down
from afbus.link.frame import Channel
from afbus.link.identity import Identity, Role
from afbus.link.reason import Reason
from afbus.proto.errors import IdentityError, InvalidArgument, LinkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

A, B = node("a"), node("b")
MASTER = Identity("test", Role.MASTER, "m")

#: What a bearer may have, and by which rule everybody refuses it.
BAD: dict[str, tuple[Callable[[Identity], Credentials], str]] = {
    "self-signed": (self_signed, "certificate-untrusted"),
    "other-ca": (lambda who: Signer.root().issue(who), "certificate-untrusted"),
    "same-ca-name": (lambda who: Signer.root("issuing").issue(who), "certificate-untrusted"),
    "expired": (lambda who: ISSUING.issue(who, Wish(end=NOW - DAY / 2)), "certificate-expired"),
    "not-yet": (
        lambda who: ISSUING.issue(who, Wish(start=NOW + DAY / 2)),
        "certificate-not-yet-valid",
    ),
    "other-cluster": (
        lambda who: ISSUING.issue(node(who.name, "elsewhere")),
        "certificate-of-other-cluster",
    ),
    "no-name": (lambda _: ISSUING.issue(None), "certificate-without-name"),
    "two-names": (
        lambda who: ISSUING.issue(who, Wish(uris=("afbus://test/node/z",))),
        "certificate-without-name",
    ),
    "no-usage": (lambda who: ISSUING.issue(who, Wish(usages=())), "certificate-wrong-usage"),
    "other-usage": (
        lambda who: ISSUING.issue(who, Wish(usages=(ExtendedKeyUsageOID.CODE_SIGNING,))),
        "certificate-wrong-usage",
    ),
    "without-issuer": (lambda who: above(ISSUING.issue(who), ()), "certificate-untrusted"),
    "too-deep": (lambda who: deep(who, 8)[1], "chain-too-deep"),
    "the-ca-itself": (
        lambda _: Credentials(to_der(ISSUING.above), ISSUING.key),
        "certificate-wrong-usage",
    ),
}


def above(credentials: Credentials, certificates: tuple[bytes, ...]) -> Credentials:
    """Credentials with other certificates above the own one."""
    return replace(credentials, chain=(credentials.chain[0], *certificates))


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """One world, closed behind the test."""
    made: World = WORLDS[request.param]()
    yield made
    made.close()


def greet(end: End) -> None:
    """Send at once, as early as a peer can."""
    end.link.send(Channel.CONTROL, 0, b"let me in")


def await_refusal(world: World, source: Place, target: Place) -> IdentityError:
    """Call, be refused, and make sure that no byte came through to any owner."""
    outcome = world.call(source, target)
    error = outcome.error
    assert isinstance(error, IdentityError)
    world.wait(lambda: (bool(source.refused) and bool(target.refused)) or not source.ends)
    world.let(0.05)
    assert source.carrier.links == target.carrier.links == ()
    assert not source.ends
    assert not target.ends
    assert len(outcome.results) == 1
    return error


@pytest.mark.parametrize("bad", BAD)
def test_case33_a_bad_client_is_refused(
    world: World, bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By the server, within the handshake; the client learns that it was refused."""
    make, rule = BAD[bad]
    a = world.add("a", credentials=make(A), on_accept=greet)
    b = world.add("b", on_accept=greet)
    with caplog.at_level(logging.INFO, "afbus.link"):
        await_refusal(world, a, b)
    assert b.reasons() == [rule]
    assert a.reasons() == ["refused-by-peer"]
    lines = [record.message for record in caplog.records]
    assert len([line for line in lines if line.startswith("refused") and rule in line]) == 1


@pytest.mark.parametrize("bad", BAD)
def test_case33_a_bad_server_is_refused(world: World, bad: str) -> None:
    """By the client, and it has said nothing but that."""
    make, rule = BAD[bad]
    a, b = world.add("a", on_accept=greet), world.add("b", credentials=make(B), on_accept=greet)
    assert rule in str(await_refusal(world, a, b))
    assert a.reasons() == [rule]


@pytest.mark.parametrize(
    ("usage", "is_client_bad"),
    [(ExtendedKeyUsageOID.CLIENT_AUTH, False), (ExtendedKeyUsageOID.SERVER_AUTH, True)],
    ids=["client-only", "server-only"],
)
def test_case33_usage_counts_in_each_part(world: World, usage: Any, is_client_bad: bool) -> None:
    """A certificate for servers opens no door as a client, nor the other way round."""
    name, who = ("a", A) if is_client_bad else ("b", B)
    world.add(name, credentials=ISSUING.issue(who, Wish(usages=(usage,))))
    world.add("b" if is_client_bad else "a")
    a, b = world.places["a"], world.places["b"]
    await_refusal(world, a, b)
    assert (b if is_client_bad else a).reasons() == ["certificate-wrong-usage"]
    # In its own part it is good.
    assert isinstance(world.link(b, a)[0], End)


def test_case33_no_certificate(world: World) -> None:
    """Who presents nothing is told what is missing."""
    a, b = world.add("a", on_accept=greet), world.add("b")
    a.carrier.set_credentials(None)
    await_refusal(world, a, b)
    assert b.reasons() == ["no-certificate"]


def test_case33_right_ca_but_another_name_than_was_dialed(world: World) -> None:
    """The name is the claim, not the address."""
    a, b, c = (world.add(name) for name in "abc")
    outcome = world.call(a, b, c.identity)
    assert "certificate-of-other-name" in str(outcome.error)
    assert a.reasons() == ["certificate-of-other-name"]
    world.let(0.05)
    assert not b.ends


def test_case35_who_was_revoked_before_is_refused(world: World) -> None:
    """As a client, as a server, by its own serial and by its issuing CA's."""
    credentials = ISSUING.issue(A)
    for n, certificate in enumerate(credentials.certificates):
        authority = ROOT.authority(denied=[certificate.serial_number])
        a = world.add(f"a{n}", credentials=credentials, identity=A)
        b = world.add(f"b{n}", authority=authority, credentials=ROOT.issue(node(f"b{n}")))
        await_refusal(world, a, b)
        assert b.reasons() == ["certificate-revoked"]
        outcome = world.call(b, a, A)
        assert isinstance(outcome.error, IdentityError)
        assert b.reasons() == ["certificate-revoked"] * 2


def test_case35_a_live_link_is_cut_within_a_second(world: World) -> None:
    """By set_authority, before it returns; nothing of the revoked is heard behind it."""
    a, b, c = (world.add(name) for name in "abc")
    here, there = world.link(a, b)
    good, _ = world.link(c, b)
    for _ in range(50):
        here.link.send(Channel.DATA, 0, b"before or never")
    assert a.carrier.credentials is not None
    serial = a.carrier.credentials.certificates[0].serial_number
    b.carrier.set_authority(ROOT.authority(denied=[serial]))
    assert there.link.is_down
    heard = len(there.messages())
    start = world.now()
    world.wait(lambda: here.has(Down))
    assert world.now() - start <= 1
    assert len(there.messages()) == heard
    assert (there.down.reason, there.down.is_remote) == (Reason.REVOKED, False)
    assert (here.down.reason, here.down.is_remote) == (Reason.REVOKED, True)
    assert b.reasons() == ["certificate-revoked"]
    assert good.link.is_up
    await_refusal_again(world, a, b)


def await_refusal_again(world: World, a: Place, b: Place) -> None:
    """Who was cut cannot come back."""
    before = len(b.ends)
    assert isinstance(world.call(a, b).error, IdentityError)
    assert len(b.ends) == before


def test_case35_the_other_side_may_revoke_whom_it_has_dialed(world: World) -> None:
    """The server's certificate is judged again too."""
    a, b = world.add("a"), world.add("b")
    here, there = world.link(a, b)
    assert b.carrier.credentials is not None
    serial = b.carrier.credentials.certificates[0].serial_number
    a.carrier.set_authority(ROOT.authority(denied=[serial]))
    world.wait(lambda: there.has(Down))
    assert here.down.reason is Reason.REVOKED


def test_a_certificate_that_expires_ends_its_links(world: World) -> None:
    """judge_links looks at the clock: for a timer of the owner."""
    a = world.add("a", credentials=ISSUING.issue(A, Wish(end=NOW + DAY / 24)))
    b = world.add("b")
    here, there = world.link(a, b)
    b.carrier.judge_links()
    assert here.link.is_up
    late = replace(b.carrier.member, utc_now=lambda: NOW + DAY / 12)
    b.carrier.member = late
    b.carrier.judge_links()
    assert there.down.reason is Reason.REVOKED
    assert there.down.text == "certificate-expired"


def test_case39_credentials_are_renewed_without_a_break(world: World) -> None:
    """The live link stays, the next one has the new certificate."""
    a, b = world.add("a"), world.add("b")
    here, there = world.link(a, b)
    old = there.link.bearer.presented
    a.carrier.set_credentials(ISSUING.issue(A))
    assert here.link.is_up
    _, again = world.link(a, b)
    assert there.link.is_up
    assert again.link.bearer.presented != old
    assert a.carrier.credentials is not None
    assert again.link.bearer.presented == a.carrier.credentials.chain


def test_a_new_ca_is_taken_over_without_a_break(world: World) -> None:
    """While both are trusted, members of either find each other."""
    other = Signer.root("next root")
    both = Authority("test", (ROOT.certificate, other.certificate))
    a, b = world.add("a", authority=both), world.add("b", authority=both)
    world.link(a, b)
    b.carrier.set_credentials(other.issue(B))
    here, _ = world.link(a, b)
    a.carrier.set_authority(other.authority())
    assert here.link.is_up
    assert [end.link.is_up for end in a.ends] == [False, True]


def test_policy_may_refuse_a_good_certificate(world: World) -> None:
    """Asked within the handshake, with a name that was proved."""
    asked: list[Identity] = []

    def admits(who: Identity) -> bool:
        asked.append(who)
        return False

    a, b = world.add("a"), world.add("b", admits=admits)
    await_refusal(world, a, b)
    assert asked == [A]
    assert b.reasons() == ["not-admitted"]


def test_too_large_credentials_are_refused_where_they_are_set(world: World) -> None:
    """No peer would take them, so the operator hears of it at once."""
    a = world.add("a")
    with pytest.raises(InvalidArgument):
        a.carrier.set_credentials(ISSUING.issue(A, Wish(padding_bytes=16_384)))


# --- enrolment: the one thing that a client without a certificate can do ---

#: Nodes enrol, and masters hear them, by aioquic alone.
ENROLLING = pytest.mark.parametrize("world", ["memory", "quic"], indirect=True)


def digest(signer: Signer = ROOT) -> bytes:
    """What a join token has of the root."""
    return sha256(to_der([signer.certificate])[0]).digest()


class Desk:
    """A master's answers to strangers."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.answers: list[Callable[[bytes], None]] = []
        self.is_slow = False

    def take(self, _: Any, request: bytes, answer: Callable[[bytes], None]) -> None:
        """Answer at once, or when the test says so."""
        self.asked.append(request)
        self.answers.append(answer)
        if not self.is_slow:
            answer(b"answer to " + request[:9])


def add_master(world: World, desk: Desk) -> Place:
    """A master that enrols; it presents its root too, so that a digest is enough."""
    credentials = above(ISSUING.issue(MASTER), to_der([ISSUING.certificate, ROOT.certificate]))
    return world.add("m", identity=MASTER, credentials=credentials, enrol=desk.take)


def enrol(world: World, a: Place, m: Place, root: bytes, request: bytes = b"request 1") -> Any:
    """Ask, and wait for what comes."""
    results: list[Enrolled | LinkError] = []
    a.carrier.enrol(world.address_of(a, m), root, request, results.append)
    assert not results
    world.wait(lambda: bool(results))
    (result,) = results
    return result


@ENROLLING
def test_case38_a_stranger_enrols_and_then_has_a_link(world: World) -> None:
    """By the digest of the root alone it knows the master; it learns the root on the way."""
    desk = Desk()
    m, a = add_master(world, desk), world.add("a", authority=Authority("test", ()))
    a.carrier.set_credentials(None)
    result = enrol(world, a, m, digest())
    assert isinstance(result, Enrolled)
    assert result.answer == b"answer to request 1"
    assert result.master == MASTER
    assert result.root == ROOT.certificate
    assert desk.asked == [b"request 1"]
    a.carrier.set_credentials(ISSUING.issue(A))
    a.carrier.set_authority(AUTHORITY)
    assert world.link(a, m)[0].link.is_up
    assert len(m.ends) == 1


@ENROLLING
def test_case38_large_requests_and_slow_answers(world: World) -> None:
    """Up to the limit each; the master may take its time."""
    desk = Desk()
    desk.is_slow = True
    m, a = add_master(world, desk), world.add("a")
    results: list[Enrolled | LinkError] = []
    a.carrier.enrol(world.address_of(a, m), digest(), bytes(ENROL_BYTES), results.append)
    world.wait(lambda: bool(desk.asked))
    assert desk.asked == [bytes(ENROL_BYTES)]
    world.let(0.1)
    desk.answers[0](bytes(ENROL_BYTES))
    world.wait(lambda: bool(results))
    assert isinstance(results[0], Enrolled)
    assert results[0].answer == bytes(ENROL_BYTES)
    with pytest.raises(InvalidArgument):
        a.carrier.enrol(world.address_of(a, m), digest(), bytes(ENROL_BYTES + 1), results.append)


@ENROLLING
def test_case38_a_stranger_tells_its_token_to_nobody_else(world: World) -> None:
    """Another cluster's master, and a node of the right one, get no request."""
    desk = Desk()
    m, a = add_master(world, desk), world.add("a")
    result = enrol(world, a, m, digest(Signer.root()))
    assert isinstance(result, IdentityError)
    assert "certificate-untrusted" in str(result)
    credentials = above(ISSUING.issue(B), to_der([ISSUING.certificate, ROOT.certificate]))
    b = world.add("b", credentials=credentials, enrol=desk.take)
    result = enrol(world, a, b, digest())
    assert isinstance(result, IdentityError)
    assert "no master" in str(result)
    assert desk.asked == []


@ENROLLING
def test_case38_who_enrols_nobody_hears_no_strangers(world: World) -> None:
    """A node has no such door."""
    b, a = world.add("b"), world.add("a")
    result = enrol(world, a, b, digest())
    assert isinstance(result, LinkError)
    assert not isinstance(result, IdentityError)


@ENROLLING
def test_case38_an_answer_after_the_end_is_no_error(world: World) -> None:
    """The stranger has gone meanwhile."""
    desk = Desk()
    desk.is_slow = True
    m, a = add_master(world, desk), world.add("a")
    a.carrier.enrol(world.address_of(a, m), digest(), b"x", lambda _: None)
    world.wait(lambda: bool(desk.asked))
    a.carrier.close()
    world.let(0.05)
    desk.answers[0](b"too late")
    world.let(0.05)
    assert m.carrier.links == ()
