"""A link as its owner sees it: the same class over every carrier.

A link exists from the moment that both ends have proved who they are and said HELLO. The carrier
calls `accept(link)` once for each, dialed or accepted; what that returns is called with every
event, in order, last with `Down`. Within `accept` the link can send already.

Ownership: a link belongs to the task (or the simulation) of its carrier; no call blocks, none is
made from another thread. Events come within calls of the carrier, and of the owner too: an event
handler may call the link, and what follows from that comes after the event at hand.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from .certificate import Side
from .core import LinkCore, State
from .effect import Cut, Down, Ping, Up, Write

if TYPE_CHECKING:
    from collections.abc import Callable

    from .effect import Effect, Event
    from .frame import Channel
    from .identity import Identity
    from .reason import Reason

    Sink: TypeAlias = Callable[[Event], None]
    Accept: TypeAlias = Callable[["Link"], Sink]

log = logging.getLogger("afbus.link")


@dataclass(frozen=True, slots=True)
class Bearer:
    """What a handshake has proved.

    Attributes:
        identity: Who the peer is.
        presented: The certificates that say so, in DER, the peer's own first.
        side: The part of the peer in the handshake: if it was the server, we dialed.
    """

    identity: Identity
    presented: tuple[bytes, ...]
    side: Side


class Wire(Protocol):
    """What a link needs of a connection of its carrier."""

    def now(self) -> float:
        """Return the time of the carrier's clock."""

    def write(self, stream: int, data: bytes, end: bool) -> None:
        """Append bytes to one of the own streams."""

    def ping(self, number: int, is_urgent: bool) -> None:
        """Try the connection; the answer goes to `Link.receive_echo`."""

    def cut(self, reason: Reason, text: str) -> None:
        """End the connection, and tell the peer why."""

    def arm(self, timer: float | None) -> None:
        """Call `Link.handle_timer` at this time, if no earlier one is armed."""


class Link:
    """One link to one peer."""

    def __init__(
        self,
        core: LinkCore,
        wire: Wire,
        bearer: Bearer,
        accept: Accept,
        fail: Callable[[Down], None],
    ) -> None:
        """Made by a carrier, for a connection whose peer has proved who it is.

        `fail` is called in place of `accept` and all events, if the link ends before it is up.
        """
        self._core = core
        self._wire = wire
        self._accept = accept
        self._fail = fail
        self._sink: Sink | None = None
        self._pending: deque[Effect] = deque()
        self._is_flushing = False
        self._boot = b""
        self._watchers: list[Callable[[Down], None]] = []
        #: What is known of the peer from the handshake.
        self.bearer = bearer

    @property
    def peer(self) -> Identity:
        """Who the peer is: what its certificate says."""
        return self.bearer.identity

    @property
    def is_dialed(self) -> bool:
        """Whether the own side has dialed."""
        return self.bearer.side is Side.SERVER

    @property
    def boot(self) -> bytes:
        """16 bytes that are new in each life of the peer's process (D21)."""
        return self._boot

    @property
    def has_begun(self) -> bool:
        """Whether its owner has accepted it; it may have ended since."""
        return self._sink is not None

    @property
    def is_up(self) -> bool:
        """Whether messages can be sent, as far as credit goes."""
        return self._core.state is State.UP

    @property
    def is_down(self) -> bool:
        """Whether the link has ended."""
        return self._core.state is State.DOWN

    @property
    def is_silent(self) -> bool:
        """Whether the peer does not confirm that it lives; see `Silent`."""
        return self._core.is_silent

    @property
    def in_flight_bytes(self) -> int:
        """What was sent and not yet read by the peer's end of the link."""
        return self._core.in_flight_bytes

    @property
    def unread_bytes(self) -> int:
        """What has arrived and was not released, in cost."""
        return self._core.unread_bytes

    def room(self, channel: Channel, destination: int) -> int:
        """As `LinkCore.room`."""
        return self._core.room(channel, destination)

    def send(self, channel: Channel, destination: int, data: bytes | memoryview) -> bool:
        """As `LinkCore.send`."""
        is_accepted = self._core.send(channel, destination, data)
        self.flush()
        return is_accepted

    def forget(self, channel: Channel, destination: int) -> None:
        """As `LinkCore.forget`."""
        self._core.forget(channel, destination)
        self.flush()

    def open_body(self, label: int, size: int) -> int | None:
        """As `LinkCore.open_body`."""
        body = self._core.open_body(label, size)
        self.flush()
        return body

    def body_room(self, body: int) -> int:
        """As `LinkCore.body_room`."""
        return self._core.body_room(body)

    def send_body(self, body: int, data: bytes | memoryview) -> bool:
        """As `LinkCore.send_body`."""
        is_accepted = self._core.send_body(body, data)
        self.flush()
        return is_accepted

    def cut_body(self, body: int) -> None:
        """As `LinkCore.cut_body`."""
        self._core.cut_body(body)
        self.flush()

    def release(self, channel: Channel, destination: int, cost: int) -> None:
        """As `LinkCore.release`."""
        self._core.release(channel, destination, cost)
        self.flush()

    def release_body(self, body: int, cost: int) -> None:
        """As `LinkCore.release_body`."""
        self._core.release_body(body, cost)
        self.flush()

    def close(self, reason: Reason, text: str) -> None:
        """As `LinkCore.close`; `Down` says when it has ended."""
        self._core.close(reason, text, self._wire.now())
        self.flush()

    def carry(self, switch: Any, trunk: int, broken: Callable[[str], None]) -> bool:
        """Let the carrier move the records of a trunk by itself, until `uncarry` or the end.

        Args:
            switch: The switch that has them.
            trunk: Their number there.
            broken: Called with the rule that the peer's records have broken.

        Returns:
            Whether it does; else the owner moves them.
        """
        return False

    def uncarry(self) -> bool:
        """Move the records no more; nothing is taken from the switch or given to it afterwards.

        Returns:
            Whether any were sent since `carry`.
        """
        return False

    @property
    def carried_bytes(self) -> int:
        """What the carrier has moved by itself, as far as it has told."""
        return 0

    def watch_end(self, callback: Callable[[Down], None]) -> None:
        """Call back once with `Down`, after the owner; for who keeps links up (`Dialer`)."""
        self._watchers.append(callback)

    # --- for the carrier ---

    def receive_data(self, stream: int, data: bytes, end: bool) -> None:
        """As `LinkCore.receive_data`; call `flush` behind the last of a turn."""
        self._core.receive_data(stream, data, end, self._wire.now())

    def receive_echo(self, number: int) -> None:
        """As `LinkCore.receive_echo`; call `flush` behind the last of a turn."""
        self._core.receive_echo(number, self._wire.now())

    def receive_down(self, reason: Reason, text: str, *, is_remote: bool) -> None:
        """As `LinkCore.receive_down`."""
        self._core.receive_down(reason, text, is_remote)
        self.flush()

    def handle_timer(self) -> None:
        """As `LinkCore.handle_timer`."""
        self._core.handle_timer(self._wire.now())
        self.flush()

    def flush(self) -> None:
        """Apply all effects; does nothing within an event, whose end does it."""
        if self._is_flushing:
            return
        self._is_flushing = True
        try:
            while True:
                if not self._pending:
                    self._pending.extend(self._core.take_effects())
                    if not self._pending:
                        break
                # What an exception of the owner leaves behind is applied the next time.
                self._apply(self._pending.popleft())
        finally:
            self._is_flushing = False
        self._wire.arm(self._core.get_timer())

    def _apply(self, effect: Effect) -> None:
        match effect:
            case Write(stream, data, end):
                self._wire.write(stream, data, end)
            case Ping(number, is_urgent):
                self._wire.ping(number, is_urgent)
            case Cut(reason, text):
                self._wire.cut(reason, text)
            case Up(boot, _):
                log.debug("link to %s is up", self.peer)
                self._boot = boot
                self._sink = self._accept(self)
            case _:
                if isinstance(effect, Down):
                    log.info("link to %s has ended: %s", self.peer, effect)
                if self._sink is not None:
                    self._sink(effect)
                elif isinstance(effect, Down):
                    self._fail(effect)
                if isinstance(effect, Down):
                    watchers, self._watchers = self._watchers, []
                    for watcher in watchers:
                        watcher(effect)
