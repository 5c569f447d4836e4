"""Two worlds with one face: carriers over real QUIC on loopback, and in memory on a fake clock.

Invariants:

1. Every wait has a deadline, in the time of the world.
2. A `Place` notes all links that its carrier accepts, and an `End` all events of its link.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from tests.link.authority import NOW, Signer, node
from tests.link.relay import Relay

from afbus._datapath import Carrier as NativePort
from afbus.link.carrier import Member
from afbus.link.effect import (
    BodyEnded,
    BodyOpened,
    BodyReceived,
    BodyRoom,
    Down,
    Message,
    Room,
)
from afbus.link.memory import MemoryNetwork
from afbus.link.native import NativeCarrier
from afbus.link.quic import QuicCarrier
from afbus.link.settings import Settings
from afbus.proto.errors import LinkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from afbus.link.carrier import Carrier, Enrol, Enrolled
    from afbus.link.certificate import Authority, Refused
    from afbus.link.credentials import Credentials
    from afbus.link.effect import Event
    from afbus.link.frame import Channel
    from afbus.link.identity import Identity
    from afbus.link.link import Link

ROOT: Final = Signer.root()
ISSUING: Final = ROOT.issuing()
AUTHORITY: Final = ROOT.authority()


@dataclass(eq=False)
class End:
    """One end of a link, as its owner."""

    link: Link
    events: list[Event] = field(default_factory=list)
    #: Bodies by their number: label, and what has come of them.
    bodies: dict[int, tuple[int, bytearray]] = field(default_factory=dict)
    #: Nothing is released: the owner does not read.
    is_stalled: bool = False
    #: Of these alone nothing is released.
    stalled: set[tuple[int, int]] = field(default_factory=set)
    on_event: Callable[[Event], None] | None = None

    def take(self, event: Event) -> None:
        """Note an event, and read it for good."""
        self.events.append(event)
        match event:
            case Message(channel, destination, _, cost):
                if not self.is_stalled and (channel, destination) not in self.stalled:
                    self.link.release(channel, destination, cost)
            case BodyOpened(body, label):
                self.bodies[body] = (label, bytearray())
            case BodyReceived(body, data):
                self.bodies[body][1].extend(data)
                if not self.is_stalled:
                    self.link.release_body(body, len(data))
        if self.on_event is not None:
            self.on_event(event)

    def resume(self) -> None:
        """Read everything that has come, and go on reading."""
        self.is_stalled = False
        for event in list(self.events):
            match event:
                case Message(channel, destination, _, cost):
                    self.link.release(channel, destination, cost)
                case BodyReceived(body, data):
                    self.link.release_body(body, len(data))
        self.events = [e for e in self.events if not isinstance(e, Message | BodyReceived)]

    def messages(
        self, channel: Channel | None = None, destination: int | None = None
    ) -> list[bytes]:
        """What has arrived, in its order."""
        return [
            event.data
            for event in self.events
            if isinstance(event, Message)
            and channel in (None, event.channel)
            and destination in (None, event.destination)
        ]

    def has_got(
        self, amount: int, channel: Channel | None = None, destination: int | None = None
    ) -> Callable[[], bool]:
        """Something to wait for: so many messages."""
        return lambda: len(self.messages(channel, destination)) == amount

    def whole_bodies(self) -> dict[int, bytes]:
        """Bodies that have arrived whole, by their labels."""
        whole = [e.body for e in self.events if isinstance(e, BodyEnded) and e.is_whole]
        return {self.bodies[body][0]: bytes(self.bodies[body][1]) for body in whole}

    def has(self, kind: type[Event]) -> bool:
        """Whether such an event has come."""
        return any(isinstance(event, kind) for event in self.events)

    @property
    def down(self) -> Down:
        """How the link has ended."""
        event = self.events[-1]
        assert isinstance(event, Down)
        return event


@dataclass(eq=False)
class Place:
    """One member in the world."""

    name: str
    identity: Identity
    carrier: Carrier
    ends: list[End] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    @property
    def end(self) -> End:
        """Its newest link."""
        return self.ends[-1]

    def reasons(self) -> list[str]:
        """The rules by which it has refused somebody, or was refused."""
        return [refused.reason.value for refused in self.refused]


@dataclass
class Outcome:
    """What came of a call."""

    results: list[Link | Enrolled | LinkError] = field(default_factory=list)

    @property
    def error(self) -> LinkError:
        """The only result, a failure."""
        (result,) = self.results
        assert isinstance(result, LinkError)
        return result


class World(ABC):
    """Members, the ways between them, and time."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}

    def add(
        self,
        name: str,
        *,
        settings: Settings | None = None,
        credentials: Credentials | None = None,
        authority: Authority = AUTHORITY,
        on_accept: Callable[[End], None] | None = None,
        admits: Callable[[Identity], bool] | None = None,
        enrol: Enrol | None = None,
        identity: Identity | None = None,
    ) -> Place:
        """Put a member into the world; without credentials it gets good ones."""
        place: Place

        def accept(link: Link) -> Callable[[Event], None]:
            end = End(link)
            place.ends.append(end)
            if on_accept is not None:
                on_accept(end)
            return end.take

        identity = identity or node(name)
        member = Member(
            credentials=credentials or ISSUING.issue(identity),
            authority=authority,
            boot=os.urandom(16),
            accept=accept,
            utc_now=lambda: NOW,
            admits=admits,
            refused=lambda _, refused: place.refused.append(refused),
            enrol=enrol,
            settings=settings or Settings(),
        )
        place = self.places[name] = Place(name, identity, self._make(name, member))
        return place

    def dial(self, source: Place, target: Place, claim: Identity | None = None) -> Outcome:
        """Begin to call; the claim is the right one by default."""
        outcome = Outcome()
        has_returned = False

        def settle(result: Link | LinkError) -> None:
            assert has_returned, "called back within the call"
            outcome.results.append(result)

        address = self.address_of(source, target)
        source.carrier.dial(address, claim or target.identity, settle)
        has_returned = True
        return outcome

    def call(self, source: Place, target: Place, claim: Identity | None = None) -> Outcome:
        """Call, and wait for what comes of it."""
        outcome = self.dial(source, target, claim)
        self.wait(lambda: bool(outcome.results))
        return outcome

    def link(self, source: Place, target: Place) -> tuple[End, End]:
        """Make a link, and return both its ends."""
        before = len(target.ends)
        (result,) = self.call(source, target).results
        if isinstance(result, LinkError):
            raise result
        self.wait(lambda: len(target.ends) > before)
        return source.end, target.end

    def pair(self, settings: Settings | None = None) -> tuple[End, End]:
        """Two members `a` and `b`, and a link from the one to the other."""
        return self.link(self.add("a", settings=settings), self.add("b", settings=settings))

    def send(self, end: End, channel: Channel, destination: int, messages: Iterator[bytes]) -> None:
        """Send as fast as there is room; goes on by itself as room comes back."""
        held: list[bytes] = []

        def go_on() -> None:
            while True:
                data = held.pop() if held else next(messages, None)
                if data is None:
                    return
                if not end.link.send(channel, destination, data):
                    held.append(data)
                    return

        before = end.on_event

        def on_event(event: Event) -> None:
            if before is not None:
                before(event)
            if event == Room(channel, destination):
                go_on()

        end.on_event = on_event
        go_on()

    def send_body(self, end: End, label: int, data: bytes, piece: int = 20_000) -> None:
        """Send a body; goes on by itself as room comes back."""
        body: int | None = None
        sent = 0

        def go_on() -> None:
            nonlocal body, sent
            if body is None:
                body = end.link.open_body(label, len(data))
                if body is None:
                    return
            while sent < len(data) and end.link.send_body(body, data[sent : sent + piece]):
                sent += piece

        before = end.on_event

        def on_event(event: Event) -> None:
            if before is not None:
                before(event)
            if event == BodyRoom(body):
                go_on()

        end.on_event = on_event
        go_on()

    @abstractmethod
    def _make(self, name: str, member: Member) -> Carrier: ...

    @abstractmethod
    def address_of(self, source: Place, target: Place) -> Any:
        """Where one reaches the other."""

    @abstractmethod
    def wait(self, condition: Callable[[], bool], limit_s: float = 20.0) -> None:
        """Let time pass until something is so."""

    @abstractmethod
    def let(self, duration_s: float) -> None:
        """Let time pass."""

    @abstractmethod
    def now(self) -> float:
        """The time of the carriers."""

    @abstractmethod
    def spoil(self, source: Place, target: Place, *, delay_s: float, loss: float) -> None:
        """Make both directions between two members worse; before they call."""

    @abstractmethod
    def cut(self, source: Place, target: Place) -> None:
        """Let nothing pass from the one to the other, until `heal`; `spoil` comes first."""

    @abstractmethod
    def heal(self, source: Place, target: Place) -> None:
        """Let everything pass again."""

    @abstractmethod
    def kill(self, place: Place) -> None:
        """A member is gone without a word."""

    @abstractmethod
    def close(self) -> None:
        """End all."""


class MemoryWorld(World):
    """In memory, on a clock of its own."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.network = MemoryNetwork(seed)

    def _make(self, name: str, member: Member) -> Carrier:
        return self.network.add(name, member)

    def address_of(self, source: Place, target: Place) -> Any:
        """As `World.address_of`."""
        return target.name

    def wait(self, condition: Callable[[], bool], limit_s: float = 20.0) -> None:
        """As `World.wait`."""
        end = self.network.time + limit_s
        while not condition():
            at = self.network.next_time
            assert at is not None, "waits for ever"
            assert at <= end, f"not so within {limit_s} s"
            self.network.step()

    def let(self, duration_s: float) -> None:
        """As `World.let`."""
        self.network.run_for(duration_s)

    def now(self) -> float:
        """As `World.now`."""
        return self.network.time

    def spoil(self, source: Place, target: Place, *, delay_s: float, loss: float) -> None:
        """As `World.spoil`."""
        for one, other in ((source, target), (target, source)):
            path = self.network.path(one.name, other.name)
            path.delay_s, path.jitter_s, path.loss = delay_s, delay_s / 10, loss

    def cut(self, source: Place, target: Place) -> None:
        """As `World.cut`."""
        self.network.cut(source.name, target.name)

    def heal(self, source: Place, target: Place) -> None:
        """As `World.heal`."""
        self.network.heal(source.name, target.name)

    def kill(self, place: Place) -> None:
        """As `World.kill`."""
        assert isinstance(place.carrier, type(self.network.find(place.name)))
        place.carrier.kill()

    def close(self) -> None:
        """As `World.close`."""
        for place in self.places.values():
            place.carrier.close()


class QuicWorld(World):
    """Over UDP on loopback; the time is the real one."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.seed = seed
        self.host = "127.0.0.1"
        self._addresses: dict[str, Any] = {}
        self._relays: dict[tuple[str, str], Relay] = {}

    def _make(self, name: str, member: Member) -> Carrier:
        async def make() -> Carrier:
            return self.start(name, member)

        carrier = self.loop.run_until_complete(make())
        self._addresses[name] = carrier.address
        return carrier

    def start(self, name: str, member: Member) -> Carrier:
        """Make a carrier; in the loop."""
        return QuicCarrier(member, self.host)

    def relay(self, source: Place, target: Place) -> Relay:
        """The proxy between two members, made when first asked for."""
        key = (source.name, target.name)
        if key not in self._relays:
            self._relays[key] = Relay(self.loop, self._addresses[target.name], self.seed)
        return self._relays[key]

    def address_of(self, source: Place, target: Place) -> Any:
        """As `World.address_of`."""
        relay = self._relays.get((source.name, target.name))
        return self._addresses[target.name] if relay is None else relay.address

    def wait(self, condition: Callable[[], bool], limit_s: float = 20.0) -> None:
        """As `World.wait`."""
        end = self.loop.time() + limit_s
        while not condition():
            assert self.loop.time() < end, f"not so within {limit_s} s"
            self.let(0.002)

    def let(self, duration_s: float) -> None:
        """As `World.let`."""
        self.loop.call_later(duration_s, self.loop.stop)
        self.loop.run_forever()

    def now(self) -> float:
        """As `World.now`."""
        return self.loop.time()

    def spoil(self, source: Place, target: Place, *, delay_s: float, loss: float) -> None:
        """As `World.spoil`."""
        relay = self.relay(source, target)
        for way in (relay.to_server, relay.to_client):
            way.delay_s, way.loss = delay_s, loss

    def cut(self, source: Place, target: Place) -> None:
        """As `World.cut`."""
        self._way(source, target).is_cut = True

    def heal(self, source: Place, target: Place) -> None:
        """As `World.heal`."""
        self._way(source, target).is_cut = False

    def _way(self, source: Place, target: Place) -> Any:
        relay = self._relays.get((source.name, target.name))
        if relay is not None:
            return relay.to_server
        return self._relays[target.name, source.name].to_client

    def kill(self, place: Place) -> None:
        """As `World.kill`."""
        if isinstance(place.carrier, NativeCarrier):
            place.carrier.close(kill=True)
            return
        assert isinstance(place.carrier, QuicCarrier)
        # Its socket takes nothing and sends nothing any more: as after kill -9.
        place.carrier.loop.remove_reader(place.carrier._socket.fileno())
        place.carrier._socket.close()

    def close(self) -> None:
        """As `World.close`."""
        for place in self.places.values():
            place.carrier.close()
        for relay in self._relays.values():
            relay.close()
        # What was closed leaves the loop in its next turns.
        self.let(0.01)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class NativeWorld(QuicWorld):
    """The same by the carrier of the datapath."""

    def start(self, name: str, member: Member) -> Carrier:
        """As `QuicWorld.start`."""
        return NativeCarrier(member, NativePort, self.host)


class MixedWorld(QuicWorld):
    """Both on one network: the first member is native, and then they take turns."""

    def start(self, name: str, member: Member) -> Carrier:
        """As `QuicWorld.start`."""
        if len(self.places) % 2 == 0:
            return NativeCarrier(member, NativePort, self.host)
        return super().start(name, member)


class MixedOtherWayWorld(QuicWorld):
    """The same, but the first member has aioquic."""

    def start(self, name: str, member: Member) -> Carrier:
        """As `QuicWorld.start`."""
        if len(self.places) % 2 == 1:
            return NativeCarrier(member, NativePort, self.host)
        return super().start(name, member)


#: All worlds, by the names that tests show.
WORLDS: Final[dict[str, type[World]]] = {
    "memory": MemoryWorld,
    "quic": QuicWorld,
    "native": NativeWorld,
    "native-quic": MixedWorld,
    "quic-native": MixedOtherWayWorld,
}


def small(**other: Any) -> Settings:
    """Settings with small windows, so that tests need few bytes."""
    sizes = Settings(window_bytes=65_536, message_bytes=32_768, in_flight_bytes=1 << 20)
    return replace(sizes, **other)
