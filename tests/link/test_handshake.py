"""What reaches into aioquic, seen by clients that are plain aioquic: each seam must still be there.

If one of these fails with a new aioquic, `link/handshake.py` is what to read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import aioquic
import pytest
from aioquic import tls
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, StreamDataReceived
from aioquic.quic.packet import QuicErrorCode
from aioquic.quic.recovery import QuicPacketPacer, QuicPacketRecovery
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.link.authority import DAY, NOW, Signer, Wish, node
from tests.link.stranger import Stranger
from tests.link.world import ISSUING, NativeWorld, Place, QuicWorld, small

from afbus.link import quic, transport
from afbus.link.carrier import ENROL_BYTES
from afbus.link.effect import Down
from afbus.link.frame import Channel
from afbus.link.handshake import JudgedContext, LinkConnection
from afbus.link.reason import Reason
from afbus.proto.errors import IdentityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from afbus.link.credentials import Credentials

ALERT = 0x100
A, B = node("a"), node("b")


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[QuicWorld]:
    """A world that is closed behind the test; of aioquic if nothing else is said."""
    made: QuicWorld = getattr(request, "param", QuicWorld)()
    yield made
    made.close()


#: What strangers meet at the port of a node, and at that of a master.
BOTH = pytest.mark.parametrize(
    "world", [QuicWorld, NativeWorld], indirect=True, ids=["aioquic", "native"]
)


@pytest.fixture
def stranger(world: QuicWorld) -> Iterator[Callable[..., Stranger]]:
    """Makes strangers who call a place, and are gone behind the test."""
    made = []

    def call(target: Place, **how: Any) -> Stranger:
        made.append(Stranger(world.loop, target.carrier.address, **how))
        return made[-1]

    yield call
    for one in made:
        one.close()


def test_the_version_of_aioquic_is_the_one_that_was_read() -> None:
    """The seams below were read in this minor version; pyproject.toml fixes it."""
    assert aioquic.__version__.startswith("1.7.")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (tls.Context, "_server_handle_certificate"),
        (tls.Context, "_server_handle_certificate_verify"),
        (tls.Context, "_client_handle_certificate_verify"),
        (tls.Context, "_check_certificate_verify_signature"),
        (tls.Context, "_set_peer_certificate"),
        (tls.Context, "handle_message"),
        (QuicConnection, "_initialize"),
        (QuicConnection, "_alpn_handler"),
        (QuicConnection, "_write_connection_limits"),
        (QuicConnection, "_write_stream_limits"),
        (QuicPacketRecovery, "on_ack_received"),
        (QuicPacketRecovery, "_detect_loss"),
        (QuicPacketRecovery, "_on_packets_lost"),
        (QuicPacketPacer, "update_rate"),
    ],
)
def test_each_method_that_we_replace_is_there(owner: type, name: str) -> None:
    """What is not called any more would judge nobody."""
    ours = {
        tls.Context: JudgedContext,
        QuicConnection: LinkConnection,
        QuicPacketRecovery: transport._Recovery,
        QuicPacketPacer: transport._Pacer,
    }[owner]
    assert getattr(owner, name) is not getattr(ours, name)


@BOTH
@pytest.mark.parametrize(
    ("credentials", "alert"),
    [
        (None, 116),
        (Signer.root().issue(A), 48),
        (ISSUING.issue(A, Wish(end=NOW - DAY / 2)), 45),
        (ISSUING.issue(A, Wish(start=NOW + DAY / 2)), 45),
        (ISSUING.issue(A, Wish(usages=(ExtendedKeyUsageOID.SERVER_AUTH,))), 43),
        (ISSUING.issue(None), 46),
        (ISSUING.issue(node("a", "other")), 49),
        (replace(ISSUING.issue(A), key=Signer.root().key), 51),
        (ISSUING.issue(A, Wish(padding_bytes=13_000)), 42),
    ],
    ids="none other-ca expired not-yet usage no-name cluster stolen too-large".split(),
)
def test_case33_a_plain_client_is_refused_with_the_right_alert(
    world: QuicWorld,
    stranger: Callable[..., Stranger],
    credentials: Credentials | None,
    alert: int,
) -> None:
    """Its data, sent as soon as it can, is read by nobody; the alert says of what kind it was."""
    b = world.add("b")
    made = stranger(b, credentials=credentials)
    world.wait(made.has(HandshakeCompleted))
    made.send(2, bytes([1, 0, 0, 0]) + bytes(20_000))
    world.wait(made.has(ConnectionTerminated))
    assert made.code == ALERT + alert
    assert not made.has(StreamDataReceived)()
    assert len(b.refused) == 1
    assert not b.ends
    assert b.carrier.links == ()


@BOTH
def test_case33_a_good_plain_client_gets_our_hello(
    world: QuicWorld, stranger: Callable[..., Stranger]
) -> None:
    """The other rows would mean nothing if this one were refused too."""
    b = world.add("b")
    made = stranger(b, credentials=ISSUING.issue(A))
    world.wait(made.has(StreamDataReceived))
    assert b.refused == []
    assert made.is_through


@BOTH
def test_case33_a_stolen_certificate_is_no_use_for_a_server(world: QuicWorld) -> None:
    """Who does not hold the key is not the bearer."""
    stolen = replace(ISSUING.issue(B), key=Signer.root().key)
    a, b = world.add("a"), world.add("b", credentials=stolen)
    assert isinstance(world.call(a, b).error, IdentityError)
    assert a.reasons() == ["certificate-without-key"]


@BOTH
def test_case40_no_ticket_is_ever_given(
    world: QuicWorld, stranger: Callable[..., Stranger]
) -> None:
    """A client that collects tickets has none after a whole life of a link."""
    b = world.add("b")
    tickets: list[tls.SessionTicket] = []
    made = stranger(b, credentials=ISSUING.issue(A), on_ticket=tickets.append)
    world.wait(made.has(StreamDataReceived))
    world.let(0.1)
    assert tickets == []


#: Transport parameters: a MiB of data and 100 streams, so that 0-RTT data can be sent.
_PARAMETERS = "04048010000007048010000009024064"


def forged_ticket() -> tls.SessionTicket:
    """A ticket with which a client may send 0-RTT, if the server knew it."""
    return tls.SessionTicket(
        age_add=0,
        cipher_suite=tls.CipherSuite.AES_256_GCM_SHA384,
        not_valid_after=tls.utcnow() + 10 * DAY,
        not_valid_before=tls.utcnow() - DAY,
        resumption_secret=bytes(48),
        server_name=None,  # type: ignore[arg-type]  # as aioquic itself makes it
        ticket=bytes(64),
        max_early_data_size=0xFFFFFFFF,
        other_extensions=[
            (tls.ExtensionType.QUIC_TRANSPORT_PARAMETERS, bytes.fromhex(_PARAMETERS))
        ],
    )  # fmt: skip


@BOTH
def test_case40_0_rtt_gains_nothing(world: QuicWorld, stranger: Callable[..., Stranger]) -> None:
    """Early data is dropped unread, and the client is judged as everybody."""
    b = world.add("b")
    made = stranger(b, ticket=forged_ticket(), early=b"\xff" * 500)
    world.wait(made.has(ConnectionTerminated))
    assert made.code == ALERT + 116
    assert b.reasons() == ["no-certificate"]
    again = stranger(b, ticket=forged_ticket(), early=b"\xff" * 500, credentials=ISSUING.issue(A))
    world.wait(again.has(HandshakeCompleted))
    assert not again.quic.tls.session_resumed
    assert not again.quic.tls.early_data_accepted


@pytest.mark.parametrize("early", [b"", bytes(100)], ids=["", "early"])
def test_case40_a_resumed_session_is_refused_where_tickets_are_known(
    world: QuicWorld,
    stranger: Callable[..., Stranger],
    monkeypatch: pytest.MonkeyPatch,
    early: bytes,
) -> None:
    """Even if somebody turned tickets on: no certificate was shown, so there is no link."""
    ticket = forged_ticket()
    initialize = LinkConnection._initialize

    def with_tickets(self: LinkConnection, peer_cid: bytes) -> None:
        initialize(self, peer_cid)
        self.tls.get_session_ticket_cb = lambda _: ticket
        assert isinstance(self.tls, JudgedContext)
        # Else aioquic ends it by itself, waiting for a certificate.
        self.tls.admit_stranger()

    monkeypatch.setattr(LinkConnection, "_initialize", with_tickets)
    b = world.add("b")
    made = stranger(b, ticket=ticket, early=early)
    world.wait(made.has(ConnectionTerminated))
    # 12: before the end of a handshake QUIC has but this one code for an application's.
    assert made.code == (12 if early else Reason.IDENTITY)
    assert b.reasons() == ["session-resumed"]
    assert not b.ends


def test_a_seam_that_is_gone_fails_closed(
    world: QuicWorld, stranger: Callable[..., Stranger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a new aioquic called our methods no more: nobody is judged, and nobody gets in."""

    def leave(context: tls.Context, _judge: object) -> tls.Context:
        return context

    monkeypatch.setattr(JudgedContext, "take_over", leave)
    b = world.add("b")
    made = stranger(b, credentials=ISSUING.issue(A))
    world.wait(made.has(ConnectionTerminated))
    assert made.code == Reason.IDENTITY
    assert not b.ends


def test_the_enrolment_protocol_opens_no_link(
    world: QuicWorld, stranger: Callable[..., Stranger]
) -> None:
    """Who comes by it can use the one stream, and is cut on any other; a member too."""
    b = world.add("b", enrol=lambda _address, _request, _answer: None)
    for credentials in (None, ISSUING.issue(A)):
        made = stranger(b, protocols=("afbus-enrol/1",), credentials=credentials)
        world.wait(made.has(HandshakeCompleted))
        made.send(2, b"\x01" + bytes(300))
        world.wait(made.has(ConnectionTerminated))
        assert made.code == Reason.ORDER
    assert not b.ends
    assert b.carrier.links == ()


def test_who_offers_both_protocols_is_judged(
    world: QuicWorld, stranger: Callable[..., Stranger]
) -> None:
    """The stricter one is agreed on."""
    b = world.add("b", enrol=lambda _address, _request, _answer: None)
    made = stranger(b, protocols=("afbus-enrol/1", "afbus/1"))
    world.wait(made.has(ConnectionTerminated))
    assert made.code == ALERT + 116


def test_an_enrolment_has_bounds(
    world: QuicWorld, stranger: Callable[..., Stranger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too much is cut; and so is who says nothing, or never ends, in its time."""
    asked: list[bytes] = []

    def take(_address: Any, request: bytes, _answer: Callable[[bytes], None]) -> None:
        asked.append(request)

    b = world.add("b", enrol=take, settings=small(hello_s=0.3))
    much = stranger(b, protocols=("afbus-enrol/1",))
    world.wait(much.has(HandshakeCompleted))
    much.send(0, bytes(ENROL_BYTES + 1))
    world.wait(much.has(ConnectionTerminated))
    assert much.code == Reason.LIMIT
    quiet = stranger(b, protocols=("afbus-enrol/1",))
    world.wait(quiet.has(ConnectionTerminated))
    slow = stranger(b, protocols=("afbus-enrol/1",))
    world.wait(slow.has(HandshakeCompleted))
    slow.send(0, b"part")
    world.wait(slow.has(ConnectionTerminated))
    assert asked == []


@BOTH
def test_a_member_that_says_nothing_is_ended_in_time(
    world: QuicWorld, stranger: Callable[..., Stranger]
) -> None:
    """A handshake alone holds nothing for long."""
    b = world.add("b", settings=small(hello_s=0.3))
    made = stranger(b, credentials=ISSUING.issue(A))
    world.wait(made.has(ConnectionTerminated))
    assert made.code == Reason.ORDER
    assert not b.ends
    assert b.carrier._links == {}


@BOTH
@pytest.mark.parametrize("what", ["bidirectional", "reset", "end"])
def test_streams_that_no_link_uses_end_it(
    world: QuicWorld, stranger: Callable[..., Stranger], what: str
) -> None:
    """A reason, and no exception."""
    b = world.add("b")
    made = stranger(b, credentials=ISSUING.issue(A))
    world.wait(made.has(StreamDataReceived))
    if what == "bidirectional":
        made.send(0, b"x")
    elif what == "reset":
        made.send(2, b"")
        made.quic.reset_stream(2, 1)
        made.transmit()
    else:
        made.send(2, b"", end=True)
    world.wait(made.has(ConnectionTerminated))
    assert made.code == Reason.ORDER


def test_under_load_strangers_must_prove_their_address(
    world: QuicWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retry beyond the first bound, nothing beyond the second or a share; then as before."""
    a, b = world.add("a"), world.add("b")
    monkeypatch.setattr(quic, "PENDING_PROVEN", 0)
    here, there = world.link(a, b)
    here.link.send(Channel.DATA, 0, b"through")
    world.wait(there.has_got(1))
    monkeypatch.setattr(quic, "PENDING", 0)
    outcome = world.call(a, b)
    assert outcome.error.retryable
    monkeypatch.setattr(quic, "PENDING", 10)
    # One host has a share of it.
    monkeypatch.setattr(quic, "PENDING_OF_HOST", 0)
    assert world.call(a, b).error.retryable
    monkeypatch.setattr(quic, "PENDING_OF_HOST", 1)
    assert world.link(a, b)[0].link.is_up
    assert isinstance(b.carrier, quic.QuicCarrier)
    assert not b.carrier._pending


def test_strangers_that_never_go_on_hold_nothing_for_long(
    world: QuicWorld, stranger: Callable[..., Stranger]
) -> None:
    """First datagrams without a second: each is forgotten in its time."""
    b = world.add("b", settings=small(hello_s=0.3))
    carrier = b.carrier
    assert isinstance(carrier, quic.QuicCarrier)
    for _ in range(20):
        stranger(b).close()
    world.wait(lambda: len(carrier._wires) > 0)
    world.wait(lambda: not carrier._wires)
    assert not carrier._pending


@BOTH
def test_memory_of_a_stranger_is_bounded(
    world: QuicWorld, stranger: Callable[..., Stranger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handshake message that announces too much is refused before it comes."""
    b = world.add("b")
    made = stranger(b, credentials=ISSUING.issue(A))
    crypto = made.quic._crypto_streams[tls.Epoch.HANDSHAKE].sender
    push = QuicConnection._push_crypto_data

    def push_more(self: QuicConnection) -> None:
        if self is made.quic and self.tls.state is tls.State.CLIENT_POST_HANDSHAKE:
            self._crypto_buffers[tls.Epoch.HANDSHAKE].seek(0)
            crypto.write(bytes([11, 0xFF, 0xFF, 0xFF]) + bytes(500))
        push(self)

    monkeypatch.setattr(QuicConnection, "_push_crypto_data", push_more)
    world.wait(made.has(ConnectionTerminated))
    assert not b.ends
    # QUIC and TLS of the datapath have bounds of their own, and ask nobody.
    is_native = isinstance(world, NativeWorld)
    assert made.code == (QuicErrorCode.PROTOCOL_VIOLATION if is_native else ALERT + 42)
    world.wait(lambda: bool(b.reasons()))
    assert b.reasons() == ["certificate-too-large"]


def test_windows_follow_what_was_read_and_not_what_was_sent(world: QuicWorld) -> None:
    """aioquic would double them with every round of a sender."""
    a, b = world.add("a"), world.add("b")
    here, there = world.link(a, b)
    world.send(here, Channel.DATA, 0, (bytes(60_000) for _ in range(1000)))
    world.wait(there.has_got(1000), 60)
    connection = there.link._wire.quic  # type: ignore[attr-defined]  # the QUIC one
    read, data = connection.read_bytes, connection._local_max_data.value
    assert read > 60_000_000
    assert data <= read + transport.MAX_DATA_BYTES
    stream = next(s for s in connection._streams.values() if s.stream_id == Channel.DATA << 2 | 2)
    most = stream.receiver.starting_offset() + transport.MAX_STREAM_BYTES
    assert stream.max_stream_data_local <= most
    assert not here.has(Down)
