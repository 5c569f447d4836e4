"""What all carriers share: who is trusted, who is admitted, and which links there are.

Invariants:

1. No byte of a peer reaches a link before `judge_peer` has named the peer.
2. A change of the authority is applied to the links that live, before the call returns.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from ..proto.errors import InvalidArgument
from ..proto.limits import KIB
from .certificate import CHAIN_BYTES, Authority, Refusal, Refused, Side, judge, judge_pinned
from .reason import Reason
from .settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from cryptography import x509

    from ..proto.errors import LinkError
    from .certificate import Pinned
    from .credentials import Credentials
    from .identity import Identity
    from .link import Accept, Link

    #: Called once with the link when it is up, or with what has failed.
    Done: TypeAlias = Callable[[Link | LinkError], None]
    #: Called once with what the master says, or with what has failed.
    EnrolDone: TypeAlias = Callable[["Enrolled | LinkError"], None]
    #: Called with where a stranger comes from, its request, and what takes the answer, once; at
    #: once or within `HELLO_S`.
    Enrol: TypeAlias = Callable[[Any, bytes, Callable[[bytes], None]], None]

log = logging.getLogger("afbus.link")

#: How long a dial waits for a first sign, before `hello_s` counts, and how long an enrolment takes.
DIAL_S: Final = 2.0
ENROL_S: Final = 10.0
#: The request or the answer of an enrolment: a certificate request, or a chain.
ENROL_BYTES: Final = 64 * KIB


class Timer(Protocol):
    """Something armed that can be taken back."""

    def cancel(self) -> None:
        """Do not fire."""


@dataclass(frozen=True)
class Member:
    """Who the own member is, whom it trusts, and who decides about its links.

    Attributes:
        credentials: What is presented; `Carrier.set_credentials` replaces them. None: the carrier
            accepts nobody, and can do nothing but enrol.
        authority: Who is trusted; `Carrier.set_authority` replaces it.
        boot: 16 bytes, new in each life of the process.
        accept: Called with each link that is up; returns what gets its events.
        utc_now: The wall clock, for certificates alone.
        admits: Policy on who may link, asked within the handshake; None admits every member.
        refused: For the audit: from where, and the rule.
        enrol: Answers those who have no certificate yet; None hears none of them.
        settings: Sizes and times.
    """

    credentials: Credentials | None
    authority: Authority
    boot: bytes
    accept: Accept
    utc_now: Callable[[], datetime]
    admits: Callable[[Identity], bool] | None = None
    refused: Callable[[Any, Refused], None] | None = None
    enrol: Enrol | None = None
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, slots=True)
class Enrolled:
    """An enrolment has been answered; whether the master agrees is in the answer."""

    answer: bytes
    master: Identity
    root: x509.Certificate


class Carrier(ABC):
    """One member's place on a network: accepts links, and dials others."""

    def __init__(self, member: Member) -> None:
        """Begin without links.

        Raises:
            InvalidArgument: No peer would take credentials of this size. EINVAL.
        """
        self.member = member
        self.authority = member.authority
        self.credentials: Credentials | None = None
        self.set_credentials(member.credentials)
        self._links: dict[Link, None] = {}

    @property
    def links(self) -> tuple[Link, ...]:
        """The links that were accepted and have not ended, oldest first."""
        return tuple(link for link in self._links if link.has_begun)

    @property
    @abstractmethod
    def address(self) -> Any:
        """Where others reach this member."""

    @abstractmethod
    def dial(self, address: Any, claim: Identity, done: Done) -> None:
        """Open a link to whoever is at `address`, if it proves to be `claim`.

        `done` is called once, never before this returns: with the link after its `accept`, or
        with a `LinkError`; an `IdentityError` if trying again cannot help.
        """

    @abstractmethod
    def enrol(self, address: Any, root_digest: bytes, request: bytes, done: EnrolDone) -> None:
        """Ask the master at `address` for a certificate, without having one.

        Args:
            address: As for `dial`.
            root_digest: SHA-256 of the root certificate of its cluster, from the join token.
            request: What the master's `Member.enrol` gets; at most `ENROL_BYTES`.
            done: As for `dial`.
        """

    @abstractmethod
    def now(self) -> float:
        """Return the time of the clock that timers are in."""

    @abstractmethod
    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call back at a time."""

    @abstractmethod
    def close(self) -> None:
        """End at once: links get no farewell but their end. For a good order close them first."""

    def judge_peer(
        self, presented: tuple[bytes, ...], side: Side, claim: Identity | None, address: Any
    ) -> Identity | Refused:
        """Judge who a peer is; a refusal goes to log and audit."""
        verdict = self.weigh_peer(presented, side, claim)
        if isinstance(verdict, Refused):
            self.report_refused(address, verdict)
        return verdict

    def weigh_peer(
        self, presented: tuple[bytes, ...], side: Side, claim: Identity | None
    ) -> Identity | Refused:
        """Judge who a peer is, and tell nobody; changes nothing, so any thread may ask."""
        verdict = judge(
            presented,
            authority=self.authority,
            side=side,
            at_utc=self.member.utc_now(),
            claim=claim,
        )
        admits = self.member.admits
        if not isinstance(verdict, Refused) and admits is not None and not admits(verdict):
            verdict = Refused(Refusal.NOT_ADMITTED, f"policy does not admit {verdict}")
        return verdict

    def judge_master(
        self, presented: tuple[bytes, ...], root_digest: bytes, address: Any
    ) -> Pinned | Refused:
        """Judge a master by the digest of its root; a refusal goes to log and audit."""
        verdict = judge_pinned(presented, root_digest, at_utc=self.member.utc_now())
        if isinstance(verdict, Refused):
            self.report_refused(address, verdict)
        return verdict

    def report_refused(self, address: Any, refused: Refused) -> None:
        """Tell log and audit of a refusal."""
        log.info("refused %s: %s", address, refused)
        if self.member.refused is not None:
            self.member.refused(address, refused)

    def set_credentials(self, credentials: Credentials | None) -> None:
        """Present these from the next link on; links that live stay as they are."""
        size = sum(map(len, credentials.chain)) if credentials else 0
        if size > CHAIN_BYTES:
            raise InvalidArgument(f"{size} bytes of certificates, limit {CHAIN_BYTES}")
        self.credentials = credentials

    def set_authority(self, authority: Authority) -> None:
        """Trust this from now on, and judge every live link again: who is out is cut (case 35)."""
        self.authority = authority
        self.judge_links()

    def judge_links(self) -> None:
        """Judge every live link again: for certificates that have expired, or a new policy."""
        for link in list(self._links):
            verdict = self.judge_peer(link.bearer.presented, link.bearer.side, link.peer, link.peer)
            if isinstance(verdict, Refused):
                admitted = verdict.reason is not Refusal.NOT_ADMITTED
                reason = Reason.REVOKED if admitted else Reason.NOT_ADMITTED
                link.close(reason, verdict.reason.value)

    def keep(self, link: Link) -> None:
        """Count a link among those that live, from the moment that it is made."""
        self._links[link] = None

    def drop_link(self, link: Link) -> None:
        """Forget a link that has ended."""
        self._links.pop(link, None)


def check_enrolment(request: bytes) -> None:
    """Check what the own side wants to say.

    Raises:
        InvalidArgument: It is empty or too large. EINVAL.
    """
    if not 0 < len(request) <= ENROL_BYTES:
        raise InvalidArgument(f"enrolment of {len(request)} bytes, limit {ENROL_BYTES}")
