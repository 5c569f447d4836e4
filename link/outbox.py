"""What a link sends: the credit of each flow, who waits for room, and what is on the way.

Beside the windows of the flows stands one bound for the link: what was written and not yet read by
the core at the other end. It is read at once, whoever it is for, so a flow that stalls does not
use it up.

Invariants:

1. Nothing waits inside: what does not fit is refused, and told once when it would fit.
2. Of several that wait the first gets its room first, if its flow has any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..proto.errors import InvalidArgument, LocalProtocolError, TooBig
from . import frame
from .credit import Outflow
from .effect import BodyRoom, Room, Write
from .frame import BODY, BODY_BYTES, FIRST_BODY, HEADER_BYTES, Broken, Channel, Flow, FrameKind
from .reason import Reason
from .settings import MESSAGE_COST

if TYPE_CHECKING:
    from .effect import Effect
    from .frame import Hello

#: Who waits for a new body; no stream of a body has this number.
_NEW_BODY: Final[Flow] = (BODY, 0)


@dataclass(slots=True)
class _OutBody:
    """A body that is being sent, or not yet read by the peer."""

    flow: Outflow
    left: int


class Outbox:
    """The sending half of one link; made when the link is, and useless before `open`."""

    def __init__(self, in_flight_bytes: int, effects: list[Effect]) -> None:
        """Begin; `effects` is the list of the core."""
        self._in_flight_bytes = in_flight_bytes
        self._effects = effects
        self._peer: Hello | None = None
        self._flows: dict[Flow, Outflow] = {}
        self._bodies: dict[int, _OutBody] = {}
        self._next_body = FIRST_BODY
        #: Who was refused, first come first, with what it would cost.
        self._waiting: dict[Flow, int] = {}
        self._acked = 0
        #: All that was ever written, in bytes.
        self.written = 0

    @property
    def in_flight_bytes(self) -> int:
        """What was written and not yet read by the peer's end: the bound of the own memory."""
        return self.written - self._acked

    def open(self, peer: Hello) -> None:
        """Learn what the peer takes; from now on there is room."""
        self._peer = peer

    def close(self) -> None:
        """Send no more of the owner's: bodies that have not ended are cut."""
        for number, body in list(self._bodies.items()):
            if not body.flow.is_leaving:
                self.cut_body(number)
        self.drop()

    def drop(self) -> None:
        """Take nothing more, without a word to the peer."""
        self._waiting.clear()
        self._peer = None

    def write(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Append bytes to a stream, room or not."""
        self.written += len(data)
        self._effects.append(Write(stream, data, end))

    # --- messages ---

    def room(self, channel: Channel, destination: int) -> int:
        """Return how large a message `send` would take now; -1 if not even an empty one."""
        if self._peer is None:
            return -1
        flow = self._flows.get((channel, destination))
        if flow is not None:
            credit = flow.room
        else:
            credit = self._peer.window_bytes if self._has_place else 0
        room = min(credit - MESSAGE_COST, self._link_room - HEADER_BYTES)
        return max(-1, min(room, self._peer.message_bytes))

    def send(self, channel: Channel, destination: int, data: bytes | memoryview) -> bool:
        """Send a message; returns whether there was room. Raises TooBig if there never is."""
        self._check_size(data)
        key = (channel, destination)
        cost = len(data) + MESSAGE_COST
        if self.room(channel, destination) < len(data):
            self._refuse(key, cost)
            return False
        assert self._peer is not None
        flow = self._flows.pop(key, None) or Outflow(self._peer.window_bytes)
        # The dictionary is in the order of the last use.
        self._flows[key] = flow
        flow.sent += cost
        self.write(channel, frame.encode(FrameKind.MESSAGE, destination, data))
        return True

    def forget(self, channel: Channel, destination: int) -> None:
        """Let both ends forget a destination; its next use begins anew."""
        flow = self._flows.get((channel, destination))
        if flow is None or flow.is_leaving or self._peer is None:
            return
        flow.is_leaving = True
        self.write(channel, frame.encode(FrameKind.FORGET, destination))

    # --- what the carrier moves by itself ---

    def limit(self, key: Flow) -> int:
        """Return how much of a flow, in cost since its beginning, the peer has given credit for."""
        flow = self._flows.get(key)
        if flow is not None:
            return flow.limit
        return 0 if self._peer is None else self._peer.window_bytes

    def note_sent(self, key: Flow, cost: int, size: int) -> None:
        """Count what the carrier has sent of a flow by itself."""
        if self._peer is None or not size:
            return
        flow = self._flows.pop(key, None) or Outflow(self._peer.window_bytes)
        self._flows[key] = flow
        flow.sent += cost
        self.written += size

    # --- bodies ---

    def open_body(self, label: int, size: int) -> int | None:
        """Begin a body; returns its stream, or None if there is no room for it now."""
        if size < 0:
            raise InvalidArgument(f"body of {size} bytes")
        if self._peer is None or not self._has_body_place or self._link_room < BODY_BYTES:
            self._refuse(_NEW_BODY, 0)
            return None
        number, self._next_body = self._next_body, self._next_body + 1
        body = self._bodies[number] = _OutBody(Outflow(self._peer.window_bytes), size)
        body.flow.is_leaving = not size
        self.write(number, frame.encode_body(label, size), end=not size)
        return number

    def body_room(self, number: int) -> int:
        """Return how large a piece `send_body` would take now."""
        if self._peer is None:
            return 0
        body = self._open_body(number)
        return max(0, min(body.flow.room, self._link_room, body.left))

    def send_body(self, number: int, data: bytes | memoryview) -> bool:
        """Send the next piece of a body; returns whether there was room."""
        if self._peer is None:
            return False
        body = self._open_body(number)
        self._check_size(data)
        if len(data) > body.left:
            raise InvalidArgument(f"{len(data)} bytes for a body of which {body.left} are left")
        if self.body_room(number) < len(data):
            self._refuse((BODY, number), len(data))
            return False
        body.flow.sent += len(data)
        body.left -= len(data)
        body.flow.is_leaving = not body.left
        self.write(number, bytes(data), end=not body.left)
        return True

    def cut_body(self, number: int) -> None:
        """Give a body up."""
        if self._peer is None:
            return
        self._open_body(number).flow.is_leaving = True
        self._waiting.pop((BODY, number), None)
        self.write(number, b"", end=True)

    def _open_body(self, number: int) -> _OutBody:
        body = self._bodies.get(number)
        if body is None or body.flow.is_leaving:
            raise LocalProtocolError(f"body {number} is not being sent")
        return body

    # --- what the peer says ---

    def take_ack(self, received: int) -> None:
        """Learn how much the peer's end has read."""
        if not self._acked <= received <= self.written:
            text = f"ACK of {received} bytes after {self._acked}, {self.written} written"
            raise Broken(Reason.ORDER, text)
        self._acked = received

    def take_credit(self, key: Flow, limit: int, window: int) -> None:
        """Learn the new limit of a flow."""
        flow = self._flow_of(key)
        if flow is None:
            raise Broken(Reason.CREDIT, f"credit for {key}, to which nothing was sent")
        flow.raise_limit(limit, window)

    def take_forgotten(self, key: Flow) -> None:
        """Learn that all of a flow was read, and that the peer has forgotten it."""
        flow = self._flow_of(key)
        if flow is None or not flow.is_leaving:
            raise Broken(Reason.ORDER, f"FORGOTTEN of {key}, which is in use")
        if key[0] == BODY:
            del self._bodies[key[1]]
        else:
            del self._flows[key]

    def _flow_of(self, key: Flow) -> Outflow | None:
        if key[0] != BODY:
            return self._flows.get(key)
        body = self._bodies.get(key[1])
        return None if body is None else body.flow

    # --- room ---

    @property
    def _link_room(self) -> int:
        return self._in_flight_bytes - self.in_flight_bytes

    @property
    def _has_place(self) -> bool:
        return self._peer is not None and len(self._flows) < self._peer.destinations

    @property
    def _has_body_place(self) -> bool:
        return self._peer is not None and len(self._bodies) < self._peer.bodies

    def _check_size(self, data: bytes | memoryview) -> None:
        if self._peer is not None and len(data) > self._peer.message_bytes:
            raise TooBig(f"message of {len(data)} bytes, limit {self._peer.message_bytes}")

    def _refuse(self, key: Flow, cost: int) -> None:
        if self._peer is None:
            return
        self._waiting[key] = cost

    def _make_place(self, destinations: int) -> None:
        """Ask the peer to forget those that were idle for longest: one for each that is new."""
        new = sum(key[0] != BODY and key not in self._flows for key in self._waiting)
        leaving = sum(flow.is_leaving for flow in self._flows.values())
        wanted = len(self._flows) + new - destinations - leaving
        for key, flow in list(self._flows.items()):
            if wanted <= 0:
                break
            if not flow.is_leaving and key not in self._waiting:
                self.forget(Channel(key[0]), key[1])
                wanted -= 1

    def offer_room(self) -> None:
        """Tell those who wait, in their turn, as many as there is room for.

        Who is told may try at once, and is refused again only if others were quicker. If it does
        not come, what it would have had is offered to the next in the next turn.
        """
        if self._peer is None or not self._waiting:
            return
        link_room = self._link_room
        places = self._peer.destinations - len(self._flows)
        body_places = self._peer.bodies - len(self._bodies)
        for key, cost in list(self._waiting.items()):
            # More than enough for what stands before the bytes.
            needed = cost + HEADER_BYTES + BODY_BYTES
            if link_room < needed:
                break
            flow = self._flow_of(key)
            if flow is not None:
                if flow.room < cost:
                    continue
            elif key == _NEW_BODY:
                if body_places <= 0:
                    continue
                body_places -= 1
            else:
                places -= 1
                if places < 0:
                    continue
            link_room -= needed
            del self._waiting[key]
            self._effects.append(self._room_event(key))
        if places < 0:
            self._make_place(self._peer.destinations)

    def _room_event(self, key: Flow) -> Room | BodyRoom:
        if key == _NEW_BODY:
            return BodyRoom(None)
        if key[0] == BODY:
            return BodyRoom(key[1])
        return Room(Channel(key[0]), key[1])
