"""aioquic with client certificates, judged within the handshake.

aioquic asks clients for no certificate, and checks none that a server presents for its usage (its
issues 541, 548, 586). All places that reach into it are here and in `transport.py`; the canary
tests of tests/link/test_handshake.py tell when a new version has moved them, and pyproject.toml
fixes its minor version.

Invariants:

1. The handshake of a link ends with an alert unless the peer proved to hold the key of a
   certificate that `judge` accepts. `LinkConnection.verdict` is an `Identity` only after that:
   whoever uses the connection asks it, so a seam that is gone fails closed.
2. The alert says of what kind the refusal is, and nothing of its text.
3. No ticket is sent or accepted: every connection is judged (case 40).
4. A client without a certificate gets through under the protocol `ENROL_ALPN` alone, and only to
   a server that offers it; there the server is judged as always.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from aioquic import tls
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.packet import QuicErrorCode, QuicProtocolVersion

from ..proto.limits import KIB
from .certificate import CHAIN_BYTES, Refusal, Refused, Side, judge_size
from .transport import MAX_DATA_BYTES, MAX_STREAM_BYTES, TransportConnection

if TYPE_CHECKING:
    from aioquic._buffer import Buffer

    from .certificate import Pinned
    from .credentials import Credentials
    from .identity import Identity

#: The protocols of links, and of those who want a certificate.
ALPN: Final = "afbus/1"
ENROL_ALPN: Final = "afbus-enrol/1"
#: One message of the handshake: all certificates that may be presented, and what is around them.
MESSAGE_BYTES: Final = CHAIN_BYTES + 4 * KIB

_ALERTS: Final = {
    Refusal.NONE: tls.AlertDescription.certificate_required,
    Refusal.EXPIRED: tls.AlertDescription.certificate_expired,
    Refusal.NOT_YET: tls.AlertDescription.certificate_expired,
    Refusal.REVOKED: tls.AlertDescription.certificate_revoked,
    Refusal.UNTRUSTED: tls.AlertDescription.unknown_ca,
    Refusal.USAGE: tls.AlertDescription.unsupported_certificate,
    Refusal.NO_NAME: tls.AlertDescription.certificate_unknown,
    Refusal.CLUSTER: tls.AlertDescription.access_denied,
    Refusal.KEY: tls.AlertDescription.decrypt_error,
    Refusal.CLAIM: tls.AlertDescription.access_denied,
    Refusal.NOT_ADMITTED: tls.AlertDescription.access_denied,
}
#: Alerts by which a peer says that our certificate is no good: code of QUIC, and name.
IDENTITY_ALERTS: Final = {
    QuicErrorCode.CRYPTO_ERROR + alert: alert.name
    for alert in (*_ALERTS.values(), tls.AlertDescription.bad_certificate)
}

#: How QUIC says that the peer has presented nothing.
NO_CERTIFICATE: Final = int(QuicErrorCode.CRYPTO_ERROR + tls.AlertDescription.certificate_required)


def alert_of(reason: Refusal) -> int:
    """Return the alert of TLS by which a refusal is told."""
    return int(_ALERTS.get(reason, tls.AlertDescription.bad_certificate))


class RefusedAlert(tls.Alert):
    """The alert of a refusal; its text, which goes to the peer, is always the same."""

    def __init__(self, reason: Refusal) -> None:
        """Make the alert of a reason."""
        super().__init__("certificate refused")
        self.description = tls.AlertDescription(alert_of(reason))


class Judge(Protocol):
    """Who decides about the peer of one connection."""

    def judge(self, presented: tuple[bytes, ...]) -> Identity | Pinned | Refused:
        """Judge what it has presented; tells log and audit of a refusal."""

    def report(self, refused: Refused) -> None:
        """Tell log and audit of what was refused unread."""


class JudgedContext(tls.Context):
    """aioquic's TLS engine; it requires a certificate of both sides and has it judged."""

    judge: Judge
    presented: tuple[bytes, ...]
    verdict: Identity | Pinned | Refused | None

    @classmethod
    def take_over(cls, context: tls.Context, judge: Judge) -> JudgedContext:
        """Make an engine that has not begun one that judges."""
        context.__class__ = cls
        assert isinstance(context, cls)
        context._request_client_certificate = True
        context.judge = judge
        context.presented = ()
        context.verdict = None
        return context

    def admit_stranger(self) -> None:
        """Ask the client for no certificate; only for `ENROL_ALPN`."""
        self._request_client_certificate = False

    def handle_message(self, input_data: bytes, output_buf: dict[tls.Epoch, Buffer]) -> None:
        """Bound what an unknown peer makes us hold; else as aioquic."""
        self._check_size(len(self._receive_buffer) + len(input_data), 2 * MESSAGE_BYTES)
        super().handle_message(input_data, output_buf)
        # The length of a message is announced before it comes.
        announced = int.from_bytes(self._receive_buffer[1:4], "big")
        if len(self._receive_buffer) >= 4:
            self._check_size(announced, MESSAGE_BYTES)

    def _check_size(self, size: int, limit: int) -> None:
        if size > limit:
            refused = Refused(Refusal.TOO_LARGE, f"handshake of {size} bytes, limit {limit}")
            self._report(refused)

    def _report(self, refused: Refused) -> None:
        self.judge.report(refused)
        self._refuse(refused)

    def _refuse(self, refused: Refused) -> None:
        self.verdict = refused
        raise RefusedAlert(refused.reason)

    def _judge(self) -> None:
        verdict = self.judge.judge(self.presented)
        if isinstance(verdict, Refused):
            self._refuse(verdict)
        self.verdict = verdict

    def _set_peer_certificate(self, certificate: tls.Certificate) -> None:
        self.presented = tuple(der for der, _ in certificate.certificates)
        if judge_size(self.presented) is not None:
            # Refused before aioquic parses it.
            self._judge()
        super()._set_peer_certificate(certificate)

    def _server_handle_certificate(self, input_buf: Buffer) -> None:
        super()._server_handle_certificate(input_buf)
        if not self.presented:
            self._judge()

    def _server_handle_certificate_verify(self, input_buf: Buffer) -> None:
        super()._server_handle_certificate_verify(input_buf)
        self._judge()

    def _client_handle_certificate_verify(self, input_buf: Buffer) -> None:
        super()._client_handle_certificate_verify(input_buf)
        self._judge()

    def _check_certificate_verify_signature(self, verify: tls.CertificateVerify) -> None:
        try:
            super()._check_certificate_verify_signature(verify)
        except tls.AlertDecryptError:
            self._report(Refused(Refusal.KEY, "the peer does not hold the key"))


@dataclass(frozen=True, slots=True)
class Origin:
    """The connection ids of a client's first datagram, and of the Retry that came between."""

    first_id: bytes
    retry_id: bytes | None = None


class LinkConnection(TransportConnection):
    """A connection whose peer is judged."""

    def __init__(
        self,
        configuration: QuicConfiguration,
        judge: Judge,
        origin: Origin | None = None,
    ) -> None:
        """Make a connection; a server's has an `origin`."""
        first, retry = (None, None) if origin is None else (origin.first_id, origin.retry_id)
        super().__init__(configuration, first, retry)
        self._judge = judge

    @property
    def verdict(self) -> Identity | Pinned | Refused | None:
        """What was said of the peer's certificate; None before, or if nobody asked."""
        context = getattr(self, "tls", None)
        return context.verdict if isinstance(context, JudgedContext) else None

    @property
    def presented(self) -> tuple[bytes, ...]:
        """What the peer presented, in DER."""
        return self.tls.presented if isinstance(self.tls, JudgedContext) else ()

    @property
    def is_enrolment(self) -> bool:
        """Whether the two have agreed on `ENROL_ALPN`."""
        return self.tls.alpn_negotiated == ENROL_ALPN

    @property
    def is_resumed(self) -> bool:
        """Whether a ticket stands in place of a certificate; always a reason to end."""
        return bool(self.tls.session_resumed)

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        JudgedContext.take_over(self.tls, self._judge)

    def _alpn_handler(self, alpn_protocol: str) -> None:
        super()._alpn_handler(alpn_protocol)
        if alpn_protocol == ENROL_ALPN and not self._is_client:
            assert isinstance(self.tls, JudgedContext)
            self.tls.admit_stranger()


def configure(
    side: Side,
    credentials: Credentials | None,
    protocols: list[str],
    *,
    idle_s: float,
    datagram_bytes: int,
) -> QuicConfiguration:
    """Return what a connection is made with; `side` is the own one."""
    configuration: Any = QuicConfiguration(
        alpn_protocols=protocols,
        is_client=side is Side.CLIENT,
        idle_timeout=idle_s,
        max_data=MAX_DATA_BYTES,
        max_stream_data=MAX_STREAM_BYTES,
        max_datagram_size=datagram_bytes,
        supported_versions=[QuicProtocolVersion.VERSION_1],
        # Only that aioquic's own check is left out: it knows host names, and no usage.
        verify_mode=ssl.CERT_NONE,
    )
    if credentials is not None:
        own, *above = credentials.certificates
        configuration.certificate = own
        configuration.certificate_chain = above
        configuration.private_key = credentials.key
    return configuration  # type: ignore[no-any-return]  # Any only for its untyped attributes
