"""Large bodies on one link by way of the master: the same face as the bodies of `link/link.py`.

Pieces go in the one order of that link, between the records of the lane; so what is under way of
all bodies together has a window, which the other end gives back as it reads.

Invariants:

1. What was sent and not read is never more than `BODY_WINDOW_BYTES`, whatever the peer does.
2. A peer that sends more, or more bodies than it may, breaks a rule: `RemoteProtocolError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..link.effect import BodyEnded, BodyOpened, BodyReceived, BodyRoom
from ..proto import relay
from ..proto.errors import InvalidArgument, RemoteProtocolError
from ..proto.relay import BODIES, BODY_WINDOW_BYTES, RelayKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..link.effect import Event

#: What was read is told in parts of this size: few messages, and never too late.
_RETURN_BYTES: Final = BODY_WINDOW_BYTES // 4


@dataclass(slots=True, eq=False)
class _In:
    """A body that is arriving."""

    size: int
    received: int = 0


class RelayedBodies:
    """Both halves of one link."""

    def __init__(
        self,
        say: Callable[[bytes], object],
        send: Callable[[bytes], bool],
        tell: Callable[[Event], None],
    ) -> None:
        """Begin without bodies.

        Args:
            say: Sends a message that must go in any case.
            send: Sends a message if there is room, and tells whether; `offer_room` follows if not.
            tell: Takes events for the owner of the link.
        """
        self._say, self._send, self._tell = say, send, tell
        #: What is left of each body that is being sent, by its number.
        self._out: dict[int, int] = {}
        self._opened = 0
        self._sent = self._acked = 0
        self._is_refused = False
        self._in: dict[int, _In] = {}
        self._received = self._read = self._told = 0

    @property
    def unread_bytes(self) -> int:
        """What was sent, and not read by the peer as far as is known."""
        return self._sent - self._acked

    # --- to the peer ---

    def open(self, label: int, size: int) -> int | None:
        """As `Link.open_body`."""
        if size <= 0:
            raise InvalidArgument(f"body of {size} bytes")
        if len(self._out) >= BODIES:
            self._is_refused = True
            return None
        self._opened += 1
        self._out[self._opened] = size
        self._say(relay.encode_opened(self._opened, label, size))
        return self._opened

    def send(self, body: int, data: bytes | memoryview) -> bool:
        """As `Link.send_body`."""
        left = self._out[body] - len(data)
        if left < 0:
            raise InvalidArgument(f"{-left} bytes more than body {body} has")
        has_room = self.unread_bytes + len(data) <= BODY_WINDOW_BYTES
        if not has_room or not self._send(relay.encode_piece(body, data)):
            self._is_refused = True
            return False
        self._sent += len(data)
        self._out[body] = left
        if not left:
            del self._out[body]
        return True

    def cut(self, body: int) -> None:
        """As `Link.cut_body`."""
        del self._out[body]
        self._say(relay.encode_number(RelayKind.CUT, body))

    def release(self, cost: int) -> None:
        """As `Link.release_body`, of whichever body."""
        self._read += cost
        if self._read - self._told >= _RETURN_BYTES:
            self._tell_read()

    def _tell_read(self) -> None:
        self._told = self._read
        self._say(relay.encode_number(RelayKind.READ, self._read))

    def offer_room(self) -> None:
        """There may be room again for what was refused."""
        if self._is_refused:
            self._is_refused = False
            self._tell(BodyRoom(None))

    # --- from the peer ---

    def receive(self, kind: RelayKind, content: bytes) -> None:
        """Take a message about bodies.

        Raises:
            RemoteProtocolError: It breaks a rule.
        """
        match kind:
            case RelayKind.OPENED:
                self._receive_opened(*relay.decode_opened(content))
            case RelayKind.PIECE:
                self._receive_piece(*relay.decode_piece(content))
            case RelayKind.CUT:
                body = relay.decode_number(content)
                if self._in.pop(body, None) is None:
                    raise RemoteProtocolError(f"the end of body {body}, which is not open")
                self._tell(BodyEnded(body, is_whole=False))
                self._tell_read()
            case _:
                self._receive_read(relay.decode_number(content))

    def _receive_opened(self, body: int, label: int, size: int) -> None:
        if body in self._in or len(self._in) >= BODIES or not size:
            raise RemoteProtocolError(f"body {body} of {size} bytes, {len(self._in)} are open")
        self._in[body] = _In(size)
        self._tell(BodyOpened(body, label, size))

    def _receive_piece(self, body: int, data: bytes) -> None:
        one = self._in.get(body)
        if one is None:
            raise RemoteProtocolError(f"a piece of body {body}, which is not open")
        one.received += len(data)
        self._received += len(data)
        if one.received > one.size:
            raise RemoteProtocolError(f"body {body} longer than {one.size} bytes")
        if self._received - self._told > BODY_WINDOW_BYTES:
            raise RemoteProtocolError(f"more than {BODY_WINDOW_BYTES} bytes of bodies unread")
        self._tell(BodyReceived(body, data))
        if one.received == one.size:
            # The owner may have ended the link, and with it all bodies.
            self._in.pop(body, None)
            self._tell(BodyEnded(body, is_whole=True))
            # Another body may begin: who waits for that is woken by it.
            self._tell_read()

    def _receive_read(self, read: int) -> None:
        if not self._acked <= read <= self._sent:
            raise RemoteProtocolError(f"READ {read} after {self._acked}, {self._sent} sent")
        self._acked = read
        self.offer_room()
