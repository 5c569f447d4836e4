"""One QUIC connection, from its first datagram to its end: what stands below a link.

A connection serves a link, or one enrolment: a question and an answer on one stream, for a client
that has no certificate yet. Which of them, the protocol says that the handshake agreed on.

Ownership: the carrier gives datagrams and events of the clock, and forgets the connection when it
says `drop`. One timer of the event loop serves QUIC, the link, and the deadline of the handshake.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from aioquic.quic import events

from ..proto.text import clip
from .carrier import DIAL_S, ENROL_BYTES, ENROL_S, Enrolled, log
from .certificate import Pinned, Refusal, Refused, Side
from .core import LinkCore
from .frame import CHANNELS
from .handshake import IDENTITY_ALERTS, LinkConnection
from .identity import Identity
from .link import Bearer, Link
from .reason import Reason, error_of, reason_of
from .udp import show_address

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    from .carrier import Done, EnrolDone
    from .effect import Down
    from .quic import QuicCarrier
    from .udp import Address

#: Datagrams between two changes of the keys; AES-GCM allows for 2**23 (RFC 9001, 6.6).
KEY_DATAGRAMS: Final = 1 << 20
#: And the longest that keys are used, in seconds, however little is said (case 17): a key that is
#: found out tells an hour. Beats make an idle link look at this, too.
KEY_S: Final = 3600.0
#: The text of a farewell: it must fit into the smallest datagram.
_TEXT_BYTES: Final = 256
#: The stream of an enrolment: the client's first that has two directions.
_ENROL_STREAM: Final = 0


@dataclass(frozen=True)
class LinkWish:
    """Why we have called: for a link to this member."""

    claim: Identity
    done: Done


@dataclass(frozen=True)
class EnrolWish:
    """Why we have called: for a certificate of the cluster with this root."""

    root_digest: bytes
    request: bytes
    done: EnrolDone


Wish: TypeAlias = LinkWish | EnrolWish


class QuicWire:
    """One connection; a `Wire` for its link, and the `Judge` of its handshake."""

    quic: LinkConnection

    def __init__(self, carrier: QuicCarrier, address: Address, wish: Wish | None) -> None:
        """Made by a carrier; without a `wish` the peer has called."""
        self.link: Link | None = None
        #: Names by which datagrams for this connection come; kept by the carrier.
        self.ids: set[bytes] = set()
        self._carrier = carrier
        self._loop = carrier.loop
        self._address = address
        self._wish = wish
        #: The part of the peer in the handshake.
        self._side = Side.CLIENT if wish is None else Side.SERVER
        self._is_over = False
        self._is_settling = False
        self._is_heard = False
        self._is_pending = wish is None
        self._enrolment: bytearray | None = None
        self._deadline: float | None = None
        self._link_timer: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._soon: asyncio.Handle | None = None
        self._datagrams = 0
        self._keys_since = self.now()
        self._farewell: list[tuple[bytes, Address]] = []

    def start(self, quic: LinkConnection) -> None:
        """Begin with a connection; it must come to something before its time is over."""
        self.quic = quic
        duration_s = self._carrier.member.settings.hello_s
        if isinstance(self._wish, LinkWish):
            duration_s = DIAL_S
        elif self._wish is not None:
            duration_s = ENROL_S
        self._deadline = self.now() + duration_s

    # --- as a Wire ---

    def now(self) -> float:
        """Return the time of the event loop."""
        return self._loop.time()

    def write(self, stream: int, data: bytes, end: bool) -> None:
        """Append bytes to an own stream."""
        if not self._is_over:
            # Unidirectional streams: two bits of the number say who opened it, and of which kind.
            own = stream << 2 | (2 if self._side is Side.SERVER else 3)
            self.quic.send_stream_data(own, data, end)
            self.transmit_soon()

    def ping(self, number: int, is_urgent: bool) -> None:
        """Try the connection."""
        if not self._is_over:
            self.quic.send_ping(number)
            if is_urgent:
                self.quic.send_probe()
            self.transmit_soon()

    def cut(self, reason: Reason, text: str) -> None:
        """End the connection."""
        if not self._is_over:
            self.quic.close(error_code=reason, reason_phrase=clip(text, _TEXT_BYTES))
            self._transmit()
            self._drop()

    def arm(self, timer: float | None) -> None:
        """Remember the timer of the link."""
        self._link_timer = timer
        if timer is None:
            self._drop()
        elif self._soon is None and not self._is_settling:
            # Else what sends at the end of this turn does it.
            self._arm()

    # --- as a Judge ---

    def judge(self, presented: tuple[bytes, ...]) -> Identity | Pinned | Refused:
        """Judge the peer, within its handshake."""
        if isinstance(self._wish, EnrolWish):
            digest = self._wish.root_digest
            return self._carrier.judge_master(presented, digest, self._address)
        claim = None if self._wish is None else self._wish.claim
        return self._carrier.judge_peer(presented, self._side, claim, self._address)

    def report(self, refused: Refused) -> None:
        """Tell log and audit."""
        self._carrier.report_refused(self._address, refused)

    # --- from the carrier ---

    def receive(self, data: bytes, address: Address, now: float) -> None:
        """Take a datagram; `settle` behind the last of a turn."""
        if isinstance(self._wish, LinkWish) and not self._is_heard:
            # There is somebody: worth waiting for, however busy it is.
            self._is_heard = True
            self._deadline = now + self._carrier.member.settings.hello_s
        if not self._is_over:
            self.quic.receive_datagram(data, address, now)

    def settle(self) -> None:
        """Do what follows from what was received."""
        if self._is_over:
            return
        self._is_settling = True
        try:
            for event in self._take_events():
                self._handle_event(event)
                if self._has_ended():
                    return
            if self.link is not None:
                self.link.flush()
        finally:
            self._is_settling = False
        if self._has_ended():
            return
        self._transmit()
        if (ending := self.quic.ending) is not None:
            self._terminate(ending)

    def _take_events(self) -> Iterator[events.QuicEvent]:
        """Yield all events of QUIC; what has come on one stream in a row as one of them."""
        held: list[events.StreamDataReceived] = []
        while (event := self.quic.next_event()) is not None:
            if isinstance(event, events.StreamDataReceived):
                if held and held[0].stream_id != event.stream_id:
                    yield _join(held)
                    held = []
                held.append(event)
                continue
            if held:
                yield _join(held)
                held = []
            yield event
        if held:
            yield _join(held)

    def _has_ended(self) -> bool:
        # A call: the checker of types does not see that the state has changed meanwhile.
        return self._is_over

    def _handle_event(self, event: events.QuicEvent) -> None:
        match event:
            case events.StreamDataReceived(data=data, end_stream=end, stream_id=number):
                self.quic.read_bytes += len(data)
                if self.link is not None and number & 2:
                    self.link.receive_data(number >> 2, data, end)
                elif self._enrolment is not None and number == _ENROL_STREAM:
                    self._receive_enrolment(data, end)
                elif self.quic.is_resumed:
                    self._refuse_resumed()
                else:
                    self._break(Reason.ORDER, f"data on stream {number}")
            case events.PingAcknowledged(uid=number):
                if self.link is not None:
                    self.link.receive_echo(number)
            case events.HandshakeCompleted():
                self._open()
            case events.ConnectionIdIssued(connection_id=connection_id):
                self._carrier.add_id(connection_id, self)
            case events.ConnectionIdRetired(connection_id=connection_id):
                self._carrier.drop_id(connection_id, self)
            case (
                events.StreamReset(stream_id=number) | events.StopSendingReceived(stream_id=number)
            ):
                self._break(Reason.ORDER, f"stream {number} was given up")

    def _open(self) -> None:
        """The handshake is complete: go on, if all that it must prove was proved."""
        if self.quic.is_resumed:
            self._refuse_resumed()
            return
        if self.quic.is_enrolment:
            self._open_enrolment()
            return
        verdict = self.quic.verdict
        if not isinstance(verdict, Identity):
            # Not reached while the seams of handshake.py hold; fails closed if they do not.
            self._break(Reason.IDENTITY, "not judged")
            return
        self._settle_pending()
        if self._wish is None:
            # From here on the link has a deadline of its own.
            self._deadline = None
        # aioquic wants the streams to be opened in the order of their numbers.
        for channel in CHANNELS:
            self.write(channel, b"", False)
        member = self._carrier.member
        core = LinkCore(member.settings, member.boot, self.now())
        bearer = Bearer(verdict, self.quic.presented, self._side)
        self.link = Link(core, self, bearer, self._accept, self._fail_down)
        self._carrier.keep(self.link)
        self.link.flush()

    def _refuse_resumed(self) -> None:
        """Not reached while nobody gives or takes tickets (case 40)."""
        self.report(Refused(Refusal.RESUMED, "a ticket in place of a certificate"))
        self._break(Reason.IDENTITY, "session resumed")

    def _accept(self, link: Link) -> Any:
        self._deadline = None
        sink = self._carrier.member.accept(link)
        if isinstance(self._wish, LinkWish):
            wish, self._wish = self._wish, None
            wish.done(link)
        return sink

    # --- enrolment ---

    def _open_enrolment(self) -> None:
        self._enrolment = bytearray()
        if isinstance(self._wish, EnrolWish):
            self.quic.send_stream_data(_ENROL_STREAM, self._wish.request, True)
            self.transmit_soon()

    def _receive_enrolment(self, data: bytes, end: bool) -> None:
        assert self._enrolment is not None
        self._enrolment += data
        if len(self._enrolment) > ENROL_BYTES:
            self._break(Reason.LIMIT, f"enrolment of more than {ENROL_BYTES} bytes")
        elif end and isinstance(self._wish, EnrolWish):
            verdict = self.quic.verdict
            assert isinstance(verdict, Pinned)
            wish, self._wish = self._wish, None
            self.cut(Reason.CLOSED, "")
            wish.done(Enrolled(bytes(self._enrolment), verdict.identity, verdict.root))
        elif end:
            enrol = self._carrier.member.enrol
            assert enrol is not None
            enrol(self._address, bytes(self._enrolment), self._answer)

    def _answer(self, data: bytes) -> None:
        """Send the answer of an enrolment; the client ends when it has it, or its time does."""
        if not self._is_over:
            self.quic.send_stream_data(_ENROL_STREAM, data, True)
            self.transmit_soon()

    # --- the end ---

    def _break(self, reason: Reason, text: str) -> None:
        self.cut(reason, text)
        self.end(reason, text, is_remote=False)

    def _terminate(self, ending: events.ConnectionTerminated) -> None:
        """Learn that QUIC has ended: by the peer's link, by its QUIC, or by ours."""
        text = ending.reason_phrase
        is_remote = self.quic.is_ended_by_peer
        verdict = self.quic.verdict
        if isinstance(verdict, Refused) and not is_remote:
            self.end(Reason.IDENTITY, str(verdict), is_remote=False)
        elif ending.frame_type is None:
            self.end(reason_of(ending.error_code), text, is_remote=is_remote)
        elif is_remote and (alert := IDENTITY_ALERTS.get(ending.error_code)) is not None:
            self.report(Refused(Refusal.BY_PEER, alert))
            text = f"the peer refused our certificate ({alert})"
            self.end(Reason.IDENTITY, text, is_remote=True)
        else:
            text = f"QUIC {ending.error_code:#x}: {text}"
            self.end(Reason.CARRIER, text, is_remote=is_remote)

    def end(self, reason: Reason, text: str, *, is_remote: bool) -> None:
        """The connection has ended: tell whoever waits for it."""
        self._drop()
        if self.link is not None:
            self.link.receive_down(reason, text, is_remote=is_remote)
        else:
            self._fail(reason, text)

    def _fail_down(self, down: Down) -> None:
        self._drop()
        self._fail(down.reason, down.text)

    def _fail(self, reason: Reason, text: str) -> None:
        """Tell who has called; never within the call, which has returned when QUIC begins."""
        line = f"{show_address(self._address)}: {reason.rule}: {text}"
        log.debug("nothing came of %s", line)
        if self._wish is not None:
            wish, self._wish = self._wish, None
            wish.done(error_of(reason, line))

    def _settle_pending(self) -> None:
        if self._is_pending:
            self._is_pending = False
            self._carrier.settle_pending(self._address[0])

    def _drop(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._settle_pending()
        self._carrier.drop(self, self._farewell)
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        self._timer = self._soon = None

    # --- sending and time ---

    def transmit_soon(self) -> None:
        """Send behind all that is written in this turn of the loop."""
        if self._soon is None and not self._is_over:
            self._soon = self._loop.call_soon(self._transmit)

    def _transmit(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        is_ending = self.quic.ending is not None
        now = self.now()
        datagrams = self.quic.datagrams_to_send(now=now)
        if is_ending:
            self._farewell = datagrams
        self._datagrams += len(datagrams)
        is_due = self._datagrams >= KEY_DATAGRAMS or now - self._keys_since >= KEY_S
        if datagrams and is_due:
            # A peer follows from key to key, so something must have gone by each.
            self._datagrams, self._keys_since = 0, now
            self.quic.request_key_update()
        self._carrier.send(datagrams)
        # New connection ids are events of sending.
        while not self._is_over and (event := self.quic.next_event()) is not None:
            self._handle_event(event)
        self._arm()

    def _arm(self) -> None:
        if self._is_over:
            return
        times = (self.quic.get_timer(), self._link_timer, self._deadline)
        when = min(time for time in times if time is not None)
        if self._timer is not None:
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when, self._handle_timer)

    def _handle_timer(self) -> None:
        self._timer = None
        now = max(self.now(), self._timer_at)
        if self._deadline is not None and now >= self._deadline:
            self._break(Reason.CARRIER, "no answer, or no end of the handshake, in time")
            return
        timer = self.quic.get_timer()
        is_due = timer is not None and now >= timer
        is_link_due = self._link_timer is not None and now >= self._link_timer
        if not is_due and not is_link_due:
            # What it was armed for has been done meanwhile.
            self._arm()
            return
        if is_due:
            self.quic.handle_timer(now=now)
        if is_link_due and self.link is not None:
            self.link.handle_timer()
        self.settle()


def _join(parts: list[events.StreamDataReceived]) -> events.StreamDataReceived:
    """Return what several events of one stream say as one."""
    if len(parts) == 1:
        return parts[0]
    last = parts[-1]
    return events.StreamDataReceived(
        data=b"".join([part.data for part in parts]),
        end_stream=last.end_stream,
        stream_id=last.stream_id,
    )
