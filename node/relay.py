"""Links to nodes that cannot be reached, by way of the master: the same face as `link/link.py`.

The link to the master carries them, one destination a node (`proto/relay.py`). When it ends they
all end. There is one between two nodes, whoever began it; a greeting on it begins it anew. Large
bodies go between the records of the lane (`relayed_bodies.py`).

Everything runs in the task of the carrier; an event handler may call the link.

Invariants:

1. `Down` is the last event of each link, and comes once.
2. Credit of a message goes back to the master only by `release`; of a body when it was taken.
3. Nothing of a link is heard before the greeting that begins it: what a former one said is gone.
4. Frames keep their order among each other, and are not lost for want of room; what waits of them
   is bounded by `FRAMES_WAITING_BYTES`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from ..link.effect import Down, Message, Room
from ..link.frame import Channel
from ..link.reason import Reason
from ..proto import relay
from ..proto.errors import RemoteProtocolError
from ..proto.limits import MIB
from ..proto.peer import LANE_BYTES
from ..proto.relay import RelayKind
from .peers import BATCHES, FRAMES, GREETING
from .relayed_bodies import RelayedBodies

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..link.effect import Event
    from ..link.identity import Identity
    from ..link.link import Link, Sink

_KINDS: Final = {
    (Channel.DATA, GREETING): RelayKind.GREETING,
    (Channel.DATA, BATCHES): RelayKind.BATCH,
    (Channel.CONTROL, FRAMES): RelayKind.FRAME,
}
_PLACES: Final = {kind: place for place, kind in _KINDS.items()}
#: Nobody is told apart by it here: HELLO says what a former life has heard.
_NO_BOOT: Final = bytes(LANE_BYTES)
#: Frames that wait for room; a peer that lets more gather does not read.
FRAMES_WAITING_BYTES: Final = 1 * MIB
#: What belongs to a link that has ended, and needs no answer: others of it get one.
_UNANSWERED: Final = (RelayKind.CLOSED, RelayKind.PIECE, RelayKind.READ)


class RelayedLink:
    """One link to one node by way of the master."""

    is_relayed: Final = True
    is_silent: Final = False
    boot: Final = _NO_BOOT

    def __init__(self, relay: Relay, number: int, peer: Identity, *, is_dialed: bool) -> None:
        """Made by `Relay`."""
        self._relay = relay
        self.number = number
        self.peer = peer
        self.is_dialed = is_dialed
        self.is_down = False
        self.sink: Sink | None = None
        self._is_greeted = False
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._bodies = RelayedBodies(self._say, self._send, self.tell)

    @property
    def is_up(self) -> bool:
        """Whether messages can be sent, as far as credit goes."""
        return not self.is_down

    def send(self, channel: Channel, destination: int, data: bytes | memoryview) -> bool:
        """As `Link.send`; but frames without room wait here, and do not fail for that."""
        kind = _KINDS[channel, destination]
        message = relay.encode(kind, data)
        return self._send(message) if kind is RelayKind.BATCH else self._say(message)

    def _send(self, message: bytes) -> bool:
        """Send behind the frames that wait, if there is room."""
        return not self.is_down and not self._waiting and self._relay.send(self.number, message)

    def _say(self, message: bytes) -> bool:
        """Send now or later; False if too much waits already, or the link has ended."""
        if self._send(message):
            return True
        if self.is_down or self._waiting_bytes + len(message) > FRAMES_WAITING_BYTES:
            return False
        self._waiting.append(message)
        self._waiting_bytes += len(message)
        return True

    def handle_room(self) -> None:
        """The master takes messages for the peer again."""
        while self._waiting and self._relay.send(self.number, self._waiting[0]):
            self._waiting_bytes -= len(self._waiting.popleft())
        if not self._waiting:
            # Their window bounds them, so they go first: a busy lane would leave them no room.
            self._bodies.offer_room()
            self.tell(Room(Channel.DATA, BATCHES))

    def receive(self, kind: RelayKind, content: bytes, cost: int) -> None:
        """Take what the peer says."""
        self._is_greeted = self._is_greeted or kind is RelayKind.GREETING
        if self._is_greeted and kind in _PLACES:
            self.tell(Message(*_PLACES[kind], content, cost))
            return
        if self._is_greeted:
            try:
                self._bodies.receive(kind, content)
            except RemoteProtocolError as error:
                self.close(Reason.MALFORMED, error.message)
        self._relay.release(self.number, cost)

    def release(self, channel: Channel, destination: int, cost: int) -> None:
        """As `Link.release`."""
        self._relay.release(self.number, cost)

    def open_body(self, label: int, size: int) -> int | None:
        """As `Link.open_body`."""
        return self._bodies.open(label, size)

    def send_body(self, body: int, data: bytes | memoryview) -> bool:
        """As `Link.send_body`."""
        return self._bodies.send(body, data)

    def cut_body(self, body: int) -> None:
        """As `Link.cut_body`."""
        self._bodies.cut(body)

    def release_body(self, body: int, cost: int) -> None:
        """As `Link.release_body`."""
        self._bodies.release(cost)

    def close(self, reason: Reason, text: str) -> None:
        """End the link at once, and tell the peer."""
        if not self.is_down:
            self._relay.send(self.number, relay.encode_closed(f"{reason.rule}: {text}"))
            self.end(Down(reason, text, is_remote=False))

    def end(self, down: Down) -> None:
        """There is no link any more."""
        if not self.is_down:
            self.is_down = True
            self._relay.drop(self)
            self.tell(down)

    def tell(self, event: Event) -> None:
        """Hand an event to the owner; behind the end there is none."""
        if self.sink is not None and (not self.is_down or isinstance(event, Down)):
            self.sink(event)


class Relay:
    """All links by way of one master."""

    def __init__(
        self,
        accept: Callable[[RelayedLink], Sink],
        identify: Callable[[int], Identity | None],
    ) -> None:
        """Begin without a master.

        Args:
            accept: Called with each link, whoever began it; returns what gets its events.
            identify: Returns who the node of a number is, None if there is none.
        """
        self._accept = accept
        self._identify = identify
        self._master: Link | None = None
        self._is_admitted = False
        self._links: dict[int, RelayedLink] = {}

    def set_master(self, link: Link | None) -> None:
        """The link to the master is this one from now on; those by way of another have ended."""
        for one in list(self._links.values()):
            one.end(Down(Reason.CARRIER, "the link to the master has ended", is_remote=False))
        self._master, self._is_admitted = link, False

    def admit(self) -> None:
        """The master has read this node's HELLO, so it passes messages on; what it says shows that.

        Streams have no order among each other: a message for a node could come before that HELLO.
        """
        self._is_admitted = True

    def open(self, number: int) -> bool:
        """Begin a link to a node; tell whether there is a way. Harmless if there is one already."""
        if self._master is None or not self._master.is_up or not self._is_admitted:
            return False
        return number in self._links or self._add(number, is_dialed=True) is not None

    def receive(self, number: int, data: bytes, cost: int) -> None:
        """Take a message that has come by way of the master.

        Raises:
            RemoteProtocolError: It is none.
        """
        kind, content = relay.decode(data)
        self.admit()
        link = self._links.get(number)
        if kind is RelayKind.CLOSED:
            self.release(number, cost)
            if link is not None:
                text = content.decode(errors="replace")
                link.end(Down(Reason.CLOSED, text, is_remote=True))
            return
        if link is None and kind is RelayKind.GREETING:
            link = self._add(number, is_dialed=False)
        if link is None:
            # Behind the end of a link, or from somebody that the table does not know yet.
            self.release(number, cost)
            if kind not in _UNANSWERED:
                self.send(number, relay.encode_closed("there is no such link"))
            return
        link.receive(kind, content, cost)

    def handle_room(self, number: int) -> None:
        """The master takes messages for a node again."""
        if (link := self._links.get(number)) is not None:
            link.handle_room()

    # --- for the links ---

    def send(self, number: int, data: bytes) -> bool:
        """Send a message to a node, if there is room."""
        master = self._master
        return master is not None and master.is_up and master.send(Channel.DATA, number, data)

    def release(self, number: int, cost: int) -> None:
        """Give credit back."""
        if self._master is not None and not self._master.is_down:
            self._master.release(Channel.DATA, number, cost)

    def drop(self, link: RelayedLink) -> None:
        """Forget a link that has ended."""
        if self._links.get(link.number) is link:
            del self._links[link.number]
            if self._master is not None and self._master.is_up:
                # It leaves its place among the destinations to another node.
                self._master.forget(Channel.DATA, link.number)

    def _add(self, number: int, *, is_dialed: bool) -> RelayedLink | None:
        peer = self._identify(number)
        if peer is None:
            return None
        link = self._links[number] = RelayedLink(self, number, peer, is_dialed=is_dialed)
        link.sink = self._accept(link)
        return None if link.is_down else link
