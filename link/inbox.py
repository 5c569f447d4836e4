"""What a link receives: frames of the channels, bodies, and the credit that both hold.

Invariants:

1. `unread_bytes` never exceeds `Settings.receive_bytes`, whatever the peer sends.
2. Everything that comes is judged here or by the core: what is not understood raises `Broken`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import frame
from .credit import Inflow
from .effect import BodyEnded, BodyOpened, BodyReceived, Message
from .frame import (
    BODY,
    BODY_BYTES,
    CHANNELS,
    CREDITS,
    FIRST_BODY,
    Broken,
    Channel,
    Flow,
    FrameKind,
    FrameReader,
)
from .reason import Reason
from .settings import MESSAGE_COST

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .effect import Effect
    from .settings import Settings


@dataclass(slots=True)
class _InBody:
    """A body that is arriving, or not yet read."""

    flow: Inflow
    head: bytearray = field(default_factory=bytearray)
    #: What its sender means to send; None until its head is there.
    size: int | None = None


class Inbox:
    """The receiving half of one link."""

    def __init__(self, settings: Settings, effects: list[Effect]) -> None:
        """Begin; `effects` is the list of the core."""
        self._settings = settings
        self._effects = effects
        self._readers = [FrameReader(settings.message_bytes) for _ in CHANNELS]
        self._flows: dict[Flow, Inflow] = {}
        self._bodies: dict[int, _InBody] = {}
        self._is_open = False
        #: Flows whose sender should hear of new credit.
        self._returns: dict[Flow, Inflow] = {}
        #: Flows that are done: their sender asked for it, and hears of it.
        self._done: list[Flow] = []
        #: All that was ever received, in bytes.
        self.received = 0

    @property
    def unread_bytes(self) -> int:
        """What has arrived and was not released, in cost."""
        bodies = sum(body.flow.unread for body in self._bodies.values())
        return bodies + sum(flow.unread for flow in self._flows.values())

    def open(self) -> None:
        """Take messages and bodies from now on: the owner has been told of the link."""
        self._is_open = True

    def receive(self, stream: int, data: bytes, end: bool) -> Iterator[tuple[FrameKind, bytes]]:
        """Take the next bytes of a stream; yield what is not for the owner, but for the core.

        Yields:
            Kind and content of frames on CONTROL.
        """
        self.received += len(data)
        if stream >= FIRST_BODY:
            self._check_open()
            self._receive_body(stream, data, end)
            return
        channel = CHANNELS[stream]
        if end:
            raise Broken(Reason.ORDER, f"{channel.name} has ended")
        for kind, destination, content in self._readers[stream].feed(data):
            if kind is FrameKind.MESSAGE:
                self._receive_message(channel, destination, content)
            elif kind is FrameKind.FORGET:
                self._receive_forget((channel, destination))
            elif channel is Channel.CONTROL:
                yield kind, content
            else:
                raise Broken(Reason.ORDER, f"{kind.name} on {channel.name}")

    def note_read(self, key: Flow, cost: int, size: int) -> None:
        """Count what the carrier has received of a flow, and given on for good."""
        if not size:
            return
        self.received += size
        flow = self._flow(key)
        flow.charge(cost, "what the carrier has moved")
        self._release(key, flow, cost)

    def _check_open(self) -> None:
        if not self._is_open:
            raise Broken(Reason.ORDER, "it sends before it has said ACK")

    def _receive_message(self, channel: Channel, destination: int, content: bytes) -> None:
        self._check_open()
        cost = len(content) + MESSAGE_COST
        self._flow((channel, destination)).charge(cost, "message")
        self._effects.append(Message(channel, destination, content, cost))

    def _receive_forget(self, key: Flow) -> None:
        self._check_open()
        flow = self._flow(key)
        flow.is_leaving = True
        self._settle(key, flow)

    def _flow(self, key: Flow) -> Inflow:
        flow = self._flows.get(key)
        if flow is None:
            if len(self._flows) >= self._settings.destinations:
                text = f"more than {self._settings.destinations} destinations"
                raise Broken(Reason.LIMIT, text)
            flow = self._flows[key] = self._new_flow()
        elif flow.is_leaving:
            raise Broken(Reason.ORDER, f"destination {key[1]} is used after FORGET")
        return flow

    def _new_flow(self) -> Inflow:
        return Inflow(self._settings.window_bytes, self._settings.window_bytes)

    def _receive_body(self, number: int, data: bytes, end: bool) -> None:
        body = self._bodies.get(number)
        if body is None:
            if len(self._bodies) >= self._settings.bodies:
                raise Broken(Reason.LIMIT, f"more than {self._settings.bodies} bodies")
            body = self._bodies[number] = _InBody(self._new_flow())
        if body.flow.is_leaving:
            raise Broken(Reason.ORDER, f"body {number} goes on behind its end")
        if body.size is None:
            missing = BODY_BYTES - len(body.head)
            body.head += data[:missing]
            data = data[missing:]
            if len(body.head) == BODY_BYTES:
                label, body.size = frame.decode_body(body.head)
                self._effects.append(BodyOpened(number, label, body.size))
            elif end:
                raise Broken(Reason.MALFORMED, f"body {number} ends in its head")
        if data:
            assert body.size is not None
            body.flow.charge(len(data), "body")
            if body.flow.received > body.size:
                raise Broken(Reason.MALFORMED, f"body {number} longer than {body.size} bytes")
            self._effects.append(BodyReceived(number, data))
        if end:
            body.flow.is_leaving = True
            self._effects.append(BodyEnded(number, body.flow.received == body.size))
            self._settle((BODY, number), body.flow)

    # --- giving back ---

    def release(self, channel: Channel, destination: int, cost: int) -> None:
        """Give credit back: messages with this cost, in sum, were read for good."""
        key = (channel, destination)
        self._release(key, self._flows[key], cost)

    def release_body(self, number: int, cost: int) -> None:
        """The same for a body."""
        self._release((BODY, number), self._bodies[number].flow, cost)

    def _release(self, key: Flow, flow: Inflow, cost: int) -> None:
        if flow.release(cost) and not flow.is_leaving:
            self._returns[key] = flow
        self._settle(key, flow)

    def _settle(self, key: Flow, flow: Inflow) -> None:
        """Forget a flow whose sender wants it, once all of it was read."""
        if not flow.is_done:
            return
        self._returns.pop(key, None)
        self._done.append(key)
        if key[0] == BODY:
            del self._bodies[key[1]]
        else:
            del self._flows[key]

    def take_replies(self) -> Iterator[bytes]:
        """Yield frames for CONTROL: new limits, and what was forgotten."""
        while self._returns:
            keys = list(self._returns)[:CREDITS]
            yield frame.encode_credits((key, self._returns.pop(key).next_limit()) for key in keys)
        done, self._done[:] = list(self._done), []
        for key in done:
            yield frame.encode_forgotten(key)
