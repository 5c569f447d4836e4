"""Large bodies on a relayed link, without links: both ends, and a way that is often full."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.link.effect import BodyEnded, BodyOpened, BodyReceived, BodyRoom
from afbus.node.relayed_bodies import RelayedBodies
from afbus.proto import relay
from afbus.proto.errors import InvalidArgument, RemoteProtocolError
from afbus.proto.limits import KIB
from afbus.proto.relay import BODIES, BODY_WINDOW_BYTES, RelayKind

if TYPE_CHECKING:
    from afbus.link.effect import Event

#: So few pieces fill the window that refusals are frequent.
PIECE = 128 * KIB


@dataclass
class End:
    """One end: it sends what it has as room allows, and reads what comes at once."""

    #: Messages on their way to the other end, and whether there is room for more.
    way: deque[bytes] = field(default_factory=deque)
    has_room: bool = True
    #: Sizes of bodies that wait for a place; what is left of those that are under way.
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    left: dict[int, int] = field(default_factory=dict)
    got: dict[int, int] = field(default_factory=dict)
    labels: dict[int, int] = field(default_factory=dict)
    ended: list[tuple[int, int, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bodies = RelayedBodies(self.way.append, self.send, self.hear)

    def send(self, message: bytes) -> bool:
        """Send, if there is room."""
        if self.has_room:
            self.way.append(message)
        return self.has_room

    def hear(self, event: Event) -> None:
        """Take an event."""
        match event:
            case BodyOpened(body, label, _):
                self.labels[body], self.got[body] = label, 0
            case BodyReceived(body, data):
                self.got[body] += len(data)
                self.bodies.release(len(data))
            case BodyEnded(body, is_whole):
                self.ended.append((self.labels.pop(body), self.got.pop(body), is_whole))
            case BodyRoom():
                self.pump()
            case _:
                raise AssertionError(event)

    def pump(self) -> None:
        """Send what goes."""
        while self.waiting and (body := self.bodies.open(*self.waiting[0])) is not None:
            self.left[body] = self.waiting.popleft()[1]
        for body, left in list(self.left.items()):
            rest = left
            while rest and self.bodies.send(body, bytes(min(PIECE, rest))):
                rest -= min(PIECE, rest)
            self.left[body] = rest
            if not rest:
                del self.left[body]

    def take(self, message: bytes) -> None:
        """Receive a message."""
        self.bodies.receive(*relay.decode(message))


STEPS = st.lists(
    st.tuples(st.sampled_from(["body", "carry", "back", "full", "room", "cut"]), st.integers(0, 9)),
    max_size=60,
)


@given(STEPS)
def test_d14_bodies_arrive_whole_in_any_weather(steps: list[tuple[str, int]]) -> None:
    """Each once, with its size or as cut; never more under way than the window."""
    here, there = End(), End()
    begun: list[tuple[int, int]] = []
    cut = 0
    for what, number in steps:
        if what == "body":
            begun.append((len(begun), 1 + number * 100_000))
            here.waiting.append(begun[-1])
            here.pump()
        elif what == "cut" and here.left:
            body = list(here.left)[number % len(here.left)]
            del here.left[body]
            here.bodies.cut(body)
            cut += 1
        elif what == "full":
            here.has_room = False
        elif what == "room":
            here.has_room = True
            here.bodies.offer_room()
        else:
            source, target = (here, there) if what == "carry" else (there, here)
            for _ in range(min(number, len(source.way))):
                target.take(source.way.popleft())
        on_the_way = sum(len(one) for one in here.way if one[0] == RelayKind.PIECE)
        assert on_the_way <= BODY_WINDOW_BYTES + 16 * len(here.way)
        assert here.bodies.unread_bytes <= BODY_WINDOW_BYTES
        assert len(there.got) <= BODIES
    here.has_room = True
    here.bodies.offer_room()
    while here.way or there.way:
        for source, target in ((here, there), (there, here)):
            while source.way:
                target.take(source.way.popleft())
    assert not here.left
    assert not here.waiting
    assert not there.got
    whole = [(label, size) for label, size, is_whole in there.ended if is_whole]
    assert len(there.ended) == len(begun)
    assert set(whole) <= set(begun)
    assert len(whole) == len(set(whole)) == len(begun) - cut


@given(st.sampled_from(list(RelayKind)[4:]), st.binary(max_size=40))
def test_whatever_comes_is_taken_or_is_a_broken_rule(kind: RelayKind, content: bytes) -> None:
    """One type of error, and nothing else changes."""
    end = End()
    try:
        end.bodies.receive(kind, content)
    except RemoteProtocolError:
        assert not end.ended
    assert not end.bodies.unread_bytes


def test_what_its_owner_may_not_ask() -> None:
    """No body without bytes, and no more of it than it has."""
    bodies = End().bodies
    with pytest.raises(InvalidArgument):
        bodies.open(1, 0)
    body = bodies.open(1, 3)
    assert body is not None
    with pytest.raises(InvalidArgument):
        bodies.send(body, b"four")
