"""One link without IO: how it begins, lives and ends. `outbox.py` and `inbox.py` are its halves.

It stands on a carrier that has proved who the peer is and carries ordered byte streams. The
carrier tells what happened (`receive_*`) and the time, the owner gives commands, and both take
what is to be done from `take_effects`, in its order. `get_timer` says when `handle_timer` is
wanted next. Times are seconds of a monotonic clock.

    OPENING --HELLO of the peer, and a sign that it has ours--> UP --close()--> CLOSING
    CLOSING --all was read, or time is over--> DOWN
    any state --broken rule, silence, end of the carrier--> DOWN

Theory of operation. Streams have no order among each other, so an end sends messages only when it
knows that its HELLO was read: each answers the other's with an ACK. The link is tried by pings of
the carrier, which the peer confirms: so a link that is cut in one direction is silent at both ends.

Invariants:

1. Whatever a peer sends, `receive_*` raise nothing: the link ends with a reason.
2. After `Cut` or `Down` there is no effect and no timer.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from . import frame
from .effect import Cut, Down, Effect, Heard, Ping, Silent, Up
from .frame import VERSION, VERSION_OLDEST, Broken, Channel, Flow, FrameKind, Hello
from .inbox import Inbox
from .outbox import Outbox
from .reason import Reason
from .settings import ACK_BYTES, Settings


class State(Enum):
    """How far a link is."""

    OPENING = 1
    UP = 2
    CLOSING = 3
    DOWN = 4


class LinkCore:
    """The state of one link; belongs to one task."""

    def __init__(self, settings: Settings, boot: bytes, now: float) -> None:
        """Begin on a carrier that is ready.

        Args:
            settings: The own sizes and times.
            boot: 16 bytes that are new in each life of the own process.
            now: The time.
        """
        self._settings = settings
        self._state = State.OPENING
        self._effects: list[Effect] = []
        self._outbox = Outbox(settings.in_flight_bytes, self._effects)
        self._inbox = Inbox(settings, self._effects)
        self._peer: Hello | None = None
        #: How much of what was received the peer knows to be read.
        self._told = 0
        #: The peer waits for this much to be read, and then for an ACK.
        self._flush_asked: int | None = None
        self._flush_mark = 0
        self._farewell: tuple[Reason, str] | None = None
        self._deadline: float | None = now + settings.hello_s
        self._next_beat = now
        #: Pings that were not confirmed, with the time of each.
        self._beats: deque[tuple[int, float]] = deque()
        self._beat_number = 0
        #: When the last ping was sent of those that were confirmed.
        self._confirmed_at = now
        self._is_silent = False
        hello = Hello(
            oldest=VERSION_OLDEST,
            newest=VERSION,
            boot=boot,
            window_bytes=settings.window_bytes,
            destinations=settings.destinations,
            bodies=settings.bodies,
            message_bytes=settings.message_bytes,
        )
        self._say(frame.encode(FrameKind.HELLO, 0, hello.encode()))

    # --- what the owner asks ---

    @property
    def state(self) -> State:
        """How far the link is."""
        return self._state

    @property
    def is_silent(self) -> bool:
        """Whether the peer does not confirm that it lives."""
        return self._is_silent

    @property
    def in_flight_bytes(self) -> int:
        """What was written and not yet read by the peer's end: the bound of the own memory."""
        return self._outbox.in_flight_bytes

    @property
    def unread_bytes(self) -> int:
        """Credit that the own side holds: what has arrived and was not released."""
        return self._inbox.unread_bytes

    @property
    def is_flush_awaited(self) -> bool:
        """Whether the peer waits for word that everything it has sent has come."""
        return self._flush_asked is not None

    def limit(self, flow: Flow) -> int:
        """Return how much of a flow, in cost, may be sent in all."""
        return self._outbox.limit(flow)

    @property
    def peer_message_bytes(self) -> int:
        """The largest message that the peer takes; 0 before its HELLO."""
        return 0 if self._peer is None else self._peer.message_bytes

    def room(self, channel: Channel, destination: int) -> int:
        """Return how large a message `send` would take now, in bytes; -1 if not even an empty one.

        Asking costs nothing and opens nothing; a new destination has the peer's whole window.
        """
        return self._outbox.room(channel, destination)

    def send(self, channel: Channel, destination: int, data: bytes | memoryview) -> bool:
        """Send a message, if its destination and the link have room for it.

        Args:
            channel: Where it keeps its order.
            destination: Whose credit it takes, u64; what it means is agreed above the link.
            data: Copied before the call returns.

        Returns:
            Whether it was accepted. If not, nothing was sent, and `Room` follows once; but after
            `close` and after the end nothing does.

        Raises:
            TooBig: The peer takes no message of this size, ever. EMSGSIZE (case 18).
        """
        return self._outbox.send(channel, destination, data)

    def forget(self, channel: Channel, destination: int) -> None:
        """Free what both ends remember of a destination that gets no more for now.

        Using it again is no error; until the peer has read everything there is no room.
        """
        self._outbox.forget(channel, destination)

    def open_body(self, label: int, size: int) -> int | None:
        """Begin a body: bytes on a stream of its own, with credit of its own.

        Args:
            label: What it is to the peer, u64; agreed above the link.
            size: How many bytes follow, by `send_body`.

        Returns:
            The number that names the body, or None if there is no room now: then `BodyRoom` with
            None follows.
        """
        return self._outbox.open_body(label, size)

    def body_room(self, body: int) -> int:
        """Return how large a piece `send_body` would take now, in bytes."""
        return self._outbox.body_room(body)

    def send_body(self, body: int, data: bytes | memoryview) -> bool:
        """Send the next piece of a body; the last one ends it. Returns and raises as `send`."""
        return self._outbox.send_body(body, data)

    def cut_body(self, body: int) -> None:
        """Give a body up; its receiver is told that it is not whole."""
        self._outbox.cut_body(body)

    def release(self, channel: Channel, destination: int, cost: int) -> None:
        """Give credit back: messages with this cost, in sum, were read for good."""
        if self._state is not State.DOWN:
            self._inbox.release(channel, destination, cost)

    def release_body(self, body: int, cost: int) -> None:
        """Give credit back: this many bytes of a body were read for good."""
        if self._state is not State.DOWN:
            self._inbox.release_body(body, cost)

    def close(self, reason: Reason, text: str, now: float) -> None:
        """End the link; in good order, and so after a flush, if the reason is one of those.

        Messages that arrive meanwhile are delivered, new ones are refused. Who is revoked is not
        waited for, also if an end in good order has begun.
        """
        is_out = reason in (Reason.REVOKED, Reason.NOT_ADMITTED)
        if self._state is State.DOWN or (self._farewell is not None and not is_out):
            return
        is_orderly = reason in (Reason.CLOSED, Reason.GOING_DOWN)
        if not is_orderly or self._state is not State.UP or self._is_silent:
            self._end(reason, text)
            return
        self._outbox.close()
        self._state = State.CLOSING
        self._farewell = (reason, text)
        self._deadline = now + self._settings.flush_s
        size = len(frame.encode_number(FrameKind.FLUSH, 0))
        self._flush_mark = self._outbox.written + size
        self._say(frame.encode_number(FrameKind.FLUSH, self._flush_mark))

    # --- what the carrier tells ---

    def receive_data(self, stream: int, data: bytes, end: bool, now: float) -> None:
        """Take the next bytes of a stream of the peer, in their order."""
        if self._state is State.DOWN:
            return
        try:
            if stream != Channel.CONTROL and self._state is State.OPENING:
                # It sends only when it has our ACK, and that stands behind our HELLO.
                self._rise(now)
            for kind, content in self._inbox.receive(stream, data, end):
                self._take(kind, content, now)
                if self._is_down():
                    return
        except Broken as error:
            self._end(error.reason, error.text)
            return
        self._acknowledge()

    def _acknowledge(self) -> None:
        received = self._inbox.received
        is_flushed = self._flush_asked is not None and received >= self._flush_asked
        if is_flushed or received - self._told >= ACK_BYTES:
            self._flush_asked = None if is_flushed else self._flush_asked
            self._tell()

    def receive_moved(self, flow: Flow, sent: tuple[int, int], read: tuple[int, int]) -> None:
        """Learn what the carrier has moved of a flow by itself: cost and bytes, since it last told.

        It sends as far as `limit` allows, and what it reads has been dealt with. All of it counts
        as if it had gone through here.
        """
        if self._state is State.DOWN:
            return
        self._outbox.note_sent(flow, *sent)
        try:
            self._inbox.note_read(flow, *read)
        except Broken as error:
            self._end(error.reason, error.text)
            return
        self._acknowledge()

    def receive_echo(self, number: int, now: float) -> None:
        """Take the carrier's answer to a `Ping`."""
        if self._state is State.DOWN or number > self._beat_number:
            return
        while self._beats and self._beats[0][0] <= number:
            self._confirmed_at = self._beats.popleft()[1]
        if self._is_silent and now - self._confirmed_at < self._settings.silent_s:
            self._is_silent = False
            self._effects.append(Heard())

    def receive_down(self, reason: Reason, text: str, is_remote: bool) -> None:
        """Learn that the carrier has ended."""
        if self._state is State.DOWN:
            return
        if self._farewell is not None and not is_remote:
            reason, text = self._farewell
        self._state = State.DOWN
        self._outbox.drop()
        self._effects.append(Down(reason, text, is_remote))

    # --- time and effects ---

    def get_timer(self) -> float | None:
        """Return when `handle_timer` is wanted; None after the end."""
        if self._state is State.DOWN:
            return None
        times = [self._confirmed_at + self._settings.idle_s]
        if self._deadline is not None:
            times.append(self._deadline)
        if self._state is not State.OPENING:
            times.append(self._next_beat)
            if not self._is_silent:
                times.append(self._confirmed_at + self._settings.silent_s)
        return min(times)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        timer = self.get_timer()
        if timer is None or now < timer:
            return
        if now - timer > self._settings.beat_s:
            # This process itself did not run; the answers may be waiting to be read.
            self._confirmed_at += now - timer
        if self._deadline is not None and now >= self._deadline:
            if self._farewell is None:
                self._end(Reason.ORDER, f"no HELLO within {self._settings.hello_s} s")
            else:
                self._end(*self._farewell)
            return
        # Sums as in `get_timer`: a difference may round to less, and then it would be due for ever.
        if now >= self._confirmed_at + self._settings.idle_s:
            silence = now - self._confirmed_at
            self._end(Reason.SILENT, f"no sign of the peer for {silence:.1f} s")
            return
        if self._state is State.OPENING:
            return
        if now >= self._confirmed_at + self._settings.silent_s and not self._is_silent:
            self._is_silent = True
            self._effects.append(Silent())
        if now >= self._next_beat:
            self._beat(now)

    def take_effects(self) -> list[Effect]:
        """Take what is to be done and what has happened, in its order."""
        if self._state is not State.DOWN:
            for reply in self._inbox.take_replies():
                self._say(reply)
            limit = self._settings.in_flight_bytes + ACK_BYTES
            if self._outbox.in_flight_bytes > limit:
                # Only answers go beyond the bound: it asks and asks, and does not read.
                self._end(Reason.LIMIT, f"more than {limit} bytes sent that were not read")
            else:
                self._outbox.offer_room()
        effects = self._effects.copy()
        self._effects.clear()
        return effects

    def _say(self, data: bytes) -> None:
        self._outbox.write(Channel.CONTROL, data)

    def _tell(self) -> None:
        self._told = self._inbox.received
        self._say(frame.encode_number(FrameKind.ACK, self._told))

    def _beat(self, now: float) -> None:
        self._beat_number += 1
        self._beats.append((self._beat_number, now))
        self._next_beat = now + self._settings.beat_s
        self._effects.append(Ping(self._beat_number, self._is_silent))

    def _is_down(self) -> bool:
        # A call: the checker of types does not see that the state has changed meanwhile.
        return self._state is State.DOWN

    def _end(self, reason: Reason, text: str) -> None:
        self._state = State.DOWN
        self._outbox.drop()
        self._effects += (Cut(reason, text), Down(reason, text, is_remote=False))

    # --- frames on CONTROL ---

    def _take(self, kind: FrameKind, content: bytes, now: float) -> None:
        if kind is FrameKind.HELLO:
            self._take_hello(content, now)
            return
        if self._peer is None:
            raise Broken(Reason.ORDER, f"{kind.name} before HELLO")
        match kind:
            case FrameKind.CREDIT:
                for flow, limit in frame.decode_credits(content):
                    self._outbox.take_credit(flow, limit, self._peer.window_bytes)
            case FrameKind.FORGOTTEN:
                self._outbox.take_forgotten(frame.decode_forgotten(content))
            case FrameKind.ACK:
                self._take_ack(frame.decode_number(content), now)
            case FrameKind.FLUSH:
                self._flush_asked = frame.decode_number(content)

    def _take_hello(self, content: bytes, now: float) -> None:
        if self._peer is not None:
            raise Broken(Reason.ORDER, "a second HELLO")
        hello = Hello.decode(content)
        if min(VERSION, hello.newest) < max(VERSION_OLDEST, hello.oldest):
            text = (
                f"the peer speaks versions {hello.oldest} to {hello.newest}, "
                f"we speak {VERSION_OLDEST} to {VERSION}"
            )
            raise Broken(Reason.VERSION, text)
        self._peer = hello
        self._confirmed_at = now
        self._tell()

    def _take_ack(self, received: int, now: float) -> None:
        self._outbox.take_ack(received)
        if self._state is State.OPENING:
            self._rise(now)
        if self._farewell is not None and received >= self._flush_mark:
            self._end(*self._farewell)

    def _rise(self, now: float) -> None:
        """The peer understands us, and we it."""
        if self._peer is None:
            raise Broken(Reason.ORDER, "it sends before it has said HELLO")
        self._state = State.UP
        self._deadline = None
        self._outbox.open(self._peer)
        self._inbox.open()
        self._effects.append(Up(self._peer.boot, min(VERSION, self._peer.newest)))
        self._beat(now)
