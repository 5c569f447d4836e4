"""One connection of the datapath's carrier, and its link: what stands between events and the core.

What the carrier moves by itself, between a switch and the channel of messages, it counts; the core
of the link counts it too, as if it had gone through there, and says how far it may go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from ..proto.limits import KIB
from ..proto.text import clip
from .carrier import DIAL_S, log
from .certificate import Refusal, Refused, Side
from .core import LinkCore, State
from .frame import CHANNELS, Channel
from .handshake import IDENTITY_ALERTS, NO_CERTIFICATE
from .identity import Identity
from .link import Bearer, Link
from .reason import Reason, error_of, reason_of
from .udp import show_address

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from .carrier import Done
    from .effect import Down
    from .native import NativeCarrier
    from .udp import Address

    #: Cost and bytes of what was sent, and of what was received.
    Totals: TypeAlias = tuple[int, int, int, int]

#: The text of a farewell: it must fit into the smallest datagram.
_TEXT_BYTES: Final = 256
#: What the carrier moves: destination 0 on the channel of messages, the batches of a lane.
_FLOW: Final = (int(Channel.DATA), 0)
#: Of a handshake: QUIC holds no more (RFC 9000, 20.1), or a message is longer than rustls takes.
_BUFFER_EXCEEDED: Final = 0x0D
_TOO_LARGE: Final = "HandshakePayloadTooLarge"
#: A peer that takes less at a time gets its batches by the owner of the link.
_BATCH_BYTES_MAX: Final = 512 * KIB


class Port(Protocol):
    """The calls of `_datapath.Carrier`."""

    @property
    def address(self) -> Any:
        """Host and port."""

    def fileno(self) -> int:
        """Return a descriptor that is readable while there are events."""

    def take_events(self) -> list[Any]:
        """Return what has happened."""

    def next_number(self) -> int:
        """Return a number for a connection."""

    def dial(self, connection: int, host: str, port: int, scope: int) -> None:
        """Call whoever is there."""

    def write(self, connection: int, stream: int, data: bytes, end: bool) -> None:
        """Append bytes to an own stream."""

    def ping(self, connection: int, number: int, is_urgent: bool) -> None:
        """Try a connection."""

    def proceed(self, connection: int) -> None:
        """Say that what came on the channel of messages is dealt with."""

    def report_all(self, connection: int) -> None:
        """Ask to be told of everything that the lane receives."""

    def cut(self, connection: int, code: int, text: bytes) -> None:
        """End a connection."""

    def set_credentials(self, chain: list[bytes], key: bytes) -> None:
        """Present these from the next connection on."""

    def attach(self, connection: int, switch: Any, trunk: int, limit: int) -> bool:
        """Move batches of a trunk, as far as `limit`."""

    def detach(self, connection: int) -> Totals:
        """Move none any more; return what was moved in all."""

    def allow(self, connection: int, limit: int) -> None:
        """Raise the limit."""

    def close(self, *, kill: bool = False) -> None:
        """End all."""


class NativeLink(Link):
    """A link of which the carrier can move the records by itself."""

    _wire: NativeWire

    def __init__(
        self,
        core: LinkCore,
        wire: NativeWire,
        bearer: Bearer,
        accept: Callable[[Link], Any],
        fail: Callable[[Down], None],
    ) -> None:
        """As `Link`."""
        super().__init__(core, wire, bearer, accept, fail)
        self._moved: Totals = (0, 0, 0, 0)
        self._broken: Callable[[str], None] | None = None
        self._sent_before = 0
        self._limit = 0
        self._reports_all = False

    def carry(self, switch: Any, trunk: int, broken: Callable[[str], None]) -> bool:
        """As `Link.carry`."""
        if not self.is_up or self._core.peer_message_bytes < _BATCH_BYTES_MAX:
            return False
        self.uncarry()
        self._sent_before = self._moved[1]
        self._limit = self._core.limit(_FLOW)
        self._broken = broken
        if not self._wire.attach(switch, trunk, self._limit):
            self._broken = None
        return self._broken is not None

    def uncarry(self) -> bool:
        """As `Link.uncarry`."""
        if self._broken is None:
            return False
        self._broken = None
        totals = self._wire.detach()
        if totals is not None:
            self.note_moved(totals)
        return self._moved[1] > self._sent_before

    @property
    def carried_bytes(self) -> int:
        """As `Link.carried_bytes`."""
        return self._moved[1] + self._moved[3]

    def close(self, reason: Reason, text: str) -> None:
        """As `Link.close`; what the carrier has taken from the switch goes first."""
        if self._broken is not None:
            totals = self._wire.detach()
            if totals is not None:
                self.note_moved(totals)
        super().close(reason, text)

    def note_moved(self, totals: Totals) -> None:
        """Learn what the carrier has moved in all."""
        new = [now - before for now, before in zip(totals, self._moved, strict=True)]
        self._moved = totals
        if any(new):
            self._core.receive_moved(_FLOW, (new[0], new[1]), (new[2], new[3]))

    def receive_broken(self, rule: str) -> None:
        """Learn that the switch has refused records of the peer."""
        if self._broken is not None:
            self._broken(rule)

    def flush(self) -> None:
        """As `Link.flush`; and tell the carrier of new credit."""
        super().flush()
        if self._core.state is State.DOWN:
            return
        if self._broken is not None and self._core.limit(_FLOW) != self._limit:
            self._limit = self._core.limit(_FLOW)
            self._wire.allow(self._limit)
        if self._core.is_flush_awaited and not self._reports_all:
            self._reports_all = True
            self._wire.report_all()


class NativeWire:
    """One connection; a `Wire` for its link."""

    def __init__(
        self, carrier: NativeCarrier, number: int, address: Address, done: Done | None
    ) -> None:
        """Made by a carrier; without `done` the peer has called."""
        self.link: NativeLink | None = None
        self.number = number
        self._carrier = carrier
        self._address = address
        self._done = done
        self._side = Side.CLIENT if done is None else Side.SERVER
        self._is_over = False
        self._timer: asyncio.TimerHandle | None = None
        self._link_timer: float | None = None
        hello_s = carrier.member.settings.hello_s
        self._deadline: float | None = self.now() + (hello_s if done is None else DIAL_S)
        self._arm()

    # --- as a Wire ---

    def now(self) -> float:
        """Return the time of the event loop."""
        return self._carrier.loop.time()

    def write(self, stream: int, data: bytes, end: bool) -> None:
        """Append bytes to an own stream."""
        if not self._is_over:
            self._carrier.port.write(self.number, stream, data, end)

    def ping(self, number: int, is_urgent: bool) -> None:
        """Try the connection."""
        if not self._is_over:
            self._carrier.port.ping(self.number, number, is_urgent)

    def cut(self, reason: Reason, text: str) -> None:
        """End the connection."""
        if not self._is_over:
            self._carrier.port.cut(self.number, reason, clip(text, _TEXT_BYTES).encode())
            self._drop()

    def arm(self, timer: float | None) -> None:
        """Remember the timer of the link."""
        self._link_timer = timer
        if timer is None:
            self._drop()
        else:
            self._arm()

    # --- for the link ---

    def attach(self, switch: Any, trunk: int, limit: int) -> bool:
        """As `Port.attach`."""
        return not self._is_over and self._carrier.port.attach(self.number, switch, trunk, limit)

    def detach(self) -> Totals | None:
        """As `Port.detach`; None behind the end, which has told all."""
        return None if self._is_over else self._carrier.port.detach(self.number)

    def allow(self, limit: int) -> None:
        """As `Port.allow`."""
        if not self._is_over:
            self._carrier.port.allow(self.number, limit)

    def report_all(self) -> None:
        """As `Port.report_all`."""
        if not self._is_over:
            self._carrier.port.report_all(self.number)

    # --- events ---

    def receive(self, name: str, rest: list[Any]) -> None:
        """Take an event of the thread."""
        if self._is_over:
            return
        match name:
            case "data":
                self._receive_data(*rest)
            case "echo" if self.link is not None:
                self.link.receive_echo(*rest)
                self.link.flush()
            case "moved" if self.link is not None:
                self.link.note_moved(*rest)
                self.link.flush()
            case "heard":
                # There is somebody: worth waiting for, however busy it is.
                self._deadline = self.now() + self._carrier.member.settings.hello_s
                self._arm()
            case "opened":
                self._open()
            case "broken" if self.link is not None:
                self.link.receive_broken(*rest)
            case "given-up":
                self._break(Reason.ORDER, f"stream {rest[0]} was given up")
            case "ended":
                self._terminate(*rest)

    def _receive_data(self, stream: int, data: bytes, end: bool, totals: Totals) -> None:
        link = self.link
        if link is None:
            # Not reached: nothing is read before the handshake is complete.
            self._break(Reason.ORDER, f"data on stream {stream}")
            return
        link.note_moved(totals)
        link.receive_data(stream, data, end)
        link.flush()
        if stream == Channel.DATA and not self._is_over:
            self._carrier.port.proceed(self.number)

    def _open(self) -> None:
        """The handshake is complete."""
        verdict, presented = self._carrier.take_verdict(self.number)
        if not isinstance(verdict, Identity):
            # Not reached while the verifier asks; fails closed if it does not.
            self._break(Reason.IDENTITY, "not judged")
            return
        if self._done is None:
            # From here on the link has a deadline of its own.
            self._deadline = None
        for channel in CHANNELS:
            self.write(channel, b"", False)
        member = self._carrier.member
        core = LinkCore(member.settings, member.boot, self.now())
        bearer = Bearer(verdict, presented, self._side)
        self.link = NativeLink(core, self, bearer, self._accept, self._fail_down)
        self._carrier.keep(self.link)
        self.link.flush()

    def _accept(self, link: Link) -> Any:
        self._deadline = None
        sink = self._carrier.member.accept(link)
        done, self._done = self._done, None
        if done is not None:
            done(link)
        return sink

    # --- the end ---

    def _break(self, reason: Reason, text: str) -> None:
        self.cut(reason, text)
        self.end(reason, text, is_remote=False)

    def _terminate(self, ending: str, code: int, text: str, totals: Totals) -> None:
        """Learn that QUIC has ended: by the peer's link, by its QUIC, or by ours."""
        verdict = self._carrier.take_verdict(self.number)[0]
        if self.link is not None:
            self.link.note_moved(totals)
        if ending == "link":
            self.end(reason_of(code), text, is_remote=True)
        elif ending == "peer" and (alert := IDENTITY_ALERTS.get(code)) is not None:
            self._carrier.report_refused(self._address, Refused(Refusal.BY_PEER, alert))
            text = f"the peer refused our certificate ({alert})"
            self.end(Reason.IDENTITY, text, is_remote=True)
        elif ending == "here" and isinstance(verdict, Refused):
            self.end(Reason.IDENTITY, str(verdict), is_remote=False)
        elif ending == "here" and code == NO_CERTIFICATE:
            refused = self._carrier.judge_peer((), self._side, None, self._address)
            self.end(Reason.IDENTITY, str(refused), is_remote=False)
        elif (
            ending == "here"
            and self.link is None
            and (code == _BUFFER_EXCEEDED or _TOO_LARGE in text)
        ):
            refused = Refused(Refusal.TOO_LARGE, f"handshake: {text}")
            self._carrier.report_refused(self._address, refused)
            self.end(Reason.IDENTITY, str(refused), is_remote=False)
        else:
            text = f"QUIC {code:#x}: {text}"
            self.end(Reason.CARRIER, text, is_remote=ending == "peer")

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
        """Tell who has called."""
        line = f"{show_address(self._address)}: {reason.rule}: {text}"
        log.debug("nothing came of %s", line)
        done, self._done = self._done, None
        if done is not None:
            done(error_of(reason, line))

    def _drop(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._carrier.drop(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- time ---

    def _arm(self) -> None:
        if self._is_over:
            return
        times = [time for time in (self._link_timer, self._deadline) if time is not None]
        if self._timer is not None:
            if times and self._timer.when() <= min(times):
                return
            self._timer.cancel()
            self._timer = None
        if times:
            self._timer = self._carrier.loop.call_at(min(times), self._handle_timer)

    def _handle_timer(self) -> None:
        assert self._timer is not None
        now = max(self.now(), self._timer.when())
        self._timer = None
        if self._deadline is not None and now >= self._deadline:
            self._break(Reason.CARRIER, "no answer, or no end of the handshake, in time")
            return
        if self._link_timer is not None and now >= self._link_timer and self.link is not None:
            self.link.handle_timer()
        self._arm()
