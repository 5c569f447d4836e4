"""Large bodies between nodes (D14): by content, each on a stream of its own, with a hash.

A message whose body is a memfd waits in the switch until that body is at the other node; only its
sender waits with it. The bytes go as a body of the link, labelled with the ticket of the switch;
then comes a frame with the hash. The other node writes what comes into a memfd of its own, checks
it, seals it, gives it to its switch and answers; the message follows on the lane.

    here   "body" event -> pieces -> BodySent  ...............  BodyTaken -> body_taken
    there  BodyOpened -> memfd -> BodyEnded, BodySent -> sealed -> body_put -> BodyTaken

What was under way when a link ends begins anew on the next one.

Invariants:

1. A body that the switch gets is whole, sealed and what its sender's node has hashed.
2. Every descriptor that was opened here is closed here.
3. What lies here of a peer's bodies is bounded: as many as a link may have open, each of a size
   that a message may have.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from ..link.effect import BodyEnded, BodyOpened, BodyReceived, BodyRoom
from ..proto.errors import RemoteProtocolError
from ..proto.limits import MESSAGE_BYTES
from ..proto.peer import BodyRefused, BodySent, BodyTaken

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..proto.peer import PeerFrame

_Event: TypeAlias = BodyOpened | BodyReceived | BodyEnded | BodyRoom
_Frame: TypeAlias = BodySent | BodyTaken | BodyRefused

log = logging.getLogger("afbus.node")

#: One piece: large enough to be cheap, small enough that a lane is not held up by it.
PIECE_BYTES: Final = 64 * 1024
#: Pieces sent in one turn.
PIECES_PER_TURN: Final = 16
#: Tickets that are remembered of each node: more than a link may have under way.
TAKEN: Final = 256
#: Frames that may come before the HELLO of the lane: as many as a link may have bodies under way.
EARLY: Final = 128
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class BodyPort(Protocol):
    """The calls of `_datapath.Switch` for bodies; `_datapath.pyi` describes each."""

    def body_fd(self, trunk: int, ticket: int) -> int:
        """Return a descriptor to close. FileNotFoundError: nobody waits for it any more."""

    def body_taken(self, trunk: int, ticket: int) -> None:
        """The body is there."""

    def body_refused(self, trunk: int, ticket: int, errno: int) -> None:
        """The body will not be there."""

    def body_put(self, trunk: int, ticket: int, fd: int) -> None:
        """Keep a body that has come. ValueError: it cannot."""


class BodyLink(Protocol):
    """What this module needs of a link; `link.Link` describes each."""

    @property
    def is_up(self) -> bool:
        """Whether bodies can be sent, as far as credit goes."""

    def open_body(self, label: int, size: int) -> int | None:
        """Begin a body, if there is room; if not, `BodyRoom` follows."""

    def send_body(self, body: int, data: bytes) -> bool:
        """Send the next piece, if there is room; if not, `BodyRoom` follows."""

    def cut_body(self, body: int) -> None:
        """Give a body up."""

    def release_body(self, body: int, cost: int) -> None:
        """Give credit back."""


@dataclass(slots=True, eq=False)
class _Out:
    """A body on its way to a node."""

    ticket: int
    size: int
    #: Its name on the link, None before the link has a place for it.
    body: int | None = None
    fd: int = -1
    sent: int = 0
    digest: Any = field(default_factory=sha256)
    #: All was sent, and the answer has not come.
    is_sent: bool = False


@dataclass(slots=True, eq=False)
class _In:
    """A body on its way from a node."""

    ticket: int
    size: int
    fd: int
    received: int = 0
    digest: Any = field(default_factory=sha256)
    has_ended: bool = False
    #: What its sender says of it.
    promised: bytes | None = None


@dataclass(slots=True, eq=False)
class _Peer:
    """The bodies to and from one node."""

    link: BodyLink | None = None
    #: What has come before the HELLO of the lane, which is on another stream.
    early: list[_Event] = field(default_factory=list)
    early_frames: list[_Frame] = field(default_factory=list)
    out: dict[int, _Out] = field(default_factory=dict)
    #: By the name on the link, and by ticket.
    into: dict[int, _In] = field(default_factory=dict)
    #: Hashes that came before their bodies had ended, by ticket.
    promised: dict[int, bytes] = field(default_factory=dict)
    #: The last tickets whose bodies are here: their senders may not have heard of it.
    taken: OrderedDict[int, None] = field(default_factory=OrderedDict)


class Bodies:
    """All bodies of one node."""

    def __init__(self, port: BodyPort, send: Callable[[int, PeerFrame], None]) -> None:
        """Begin without bodies; `send` sends a frame to the node of a number, if it has a link."""
        self._port = port
        self._send = send
        self._peers: dict[int, _Peer] = {}

    # --- links ---

    def begin(self, number: int, link: BodyLink) -> None:
        """A link to a node is open: what waits for it goes now, and what has come early counts."""
        peer = self._peers.setdefault(number, _Peer())
        events, frames = peer.early, peer.early_frames
        self._drop_link(peer)
        peer.link = link
        for event in events:
            self.receive_event(number, event)
        for frame in frames:
            self.receive_frame(number, frame)
        for one in list(peer.out.values()):
            self._pump(number, peer, one)

    def end(self, number: int) -> None:
        """There is no link; what was under way begins anew on the next one."""
        if (peer := self._peers.get(number)) is not None:
            self._drop_link(peer)

    def forget(self, number: int) -> None:
        """The node is no longer in the cluster, and its trunk is gone."""
        self.end(number)
        self._peers.pop(number, None)

    def hear(self, number: int) -> None:
        """The node begins to count anew, and its tickets too."""
        if (peer := self._peers.get(number)) is not None:
            peer.taken.clear()

    def _drop_link(self, peer: _Peer) -> None:
        peer.link, peer.early, peer.early_frames = None, [], []
        for out in peer.out.values():
            _close(out)
            out.body, out.sent, out.digest, out.is_sent = None, 0, sha256(), False
        for one in peer.into.values():
            os.close(one.fd)
        peer.into.clear()
        peer.promised.clear()

    # --- to other nodes ---

    def want(self, number: int, ticket: int, size: int) -> None:
        """The switch wants a body carried to a node."""
        peer = self._peers.setdefault(number, _Peer())
        one = peer.out[ticket] = _Out(ticket, size)
        self._pump(number, peer, one)

    def _pump(self, number: int, peer: _Peer, one: _Out) -> None:
        """Send pieces while the link takes them."""
        link = peer.link
        if link is None or not link.is_up or one.is_sent:
            return
        if one.fd < 0:
            try:
                one.fd = self._port.body_fd(number, one.ticket)
            except FileNotFoundError:
                del peer.out[one.ticket]
                return
        if one.body is None:
            one.body = link.open_body(one.ticket, one.size)
            if one.body is None:
                return
        while one.sent < one.size:
            piece = os.pread(one.fd, min(PIECE_BYTES, one.size - one.sent), one.sent)
            if not piece:
                # Sealed against that; but the size is what the sender said of it.
                link.cut_body(one.body)
                self._give_up(number, one.ticket, errno.EINVAL)
                return
            if not link.send_body(one.body, piece):
                return
            one.sent += len(piece)
            one.digest.update(piece)
        one.is_sent = True
        _close(one)
        self._send(number, BodySent(one.ticket, one.size, one.digest.digest()))

    def _give_up(self, number: int, ticket: int, why: int) -> None:
        one = self._peers[number].out.pop(ticket, None)
        if one is not None:
            _close(one)
            self._port.body_refused(number, ticket, why)

    # --- from other nodes, and their answers ---

    def receive_event(self, number: int, event: _Event) -> None:
        """Take what a link says of bodies, before `begin` as well."""
        peer = self._peers.setdefault(number, _Peer())
        if peer.link is None:
            peer.early.append(event)
            return
        match event:
            case BodyOpened(body, ticket, size):
                self._open(number, peer, body, ticket, size)
            case BodyReceived(body, data):
                self._write(peer, body, data)
                peer.link.release_body(body, len(data))
            case BodyEnded(body, is_whole):
                one = peer.into.get(body)
                if one is not None:
                    one.has_ended = True
                    one.promised = peer.promised.pop(one.ticket, one.promised)
                    self._settle(number, peer, body, one, is_whole=is_whole)
            case BodyRoom():
                for out in list(peer.out.values()):
                    self._pump(number, peer, out)

    def receive_frame(self, number: int, frame: _Frame) -> None:
        """Take a frame about a body, before `begin` as well.

        Raises:
            RemoteProtocolError: Too much has come before it; of bytes, their credit bounds that.
        """
        peer = self._peers.setdefault(number, _Peer())
        if peer.link is None:
            if len(peer.early_frames) >= EARLY:
                raise RemoteProtocolError("more frames of bodies before HELLO than bodies can be")
            peer.early_frames.append(frame)
            return
        match frame:
            case BodySent(ticket, _, digest):
                for body, one in list(peer.into.items()):
                    if one.ticket == ticket:
                        one.promised = digest
                        self._settle(number, peer, body, one, is_whole=True)
                        return
                if len(peer.promised) < len(peer.into) + PIECES_PER_TURN:
                    peer.promised[ticket] = digest
            case BodyTaken(ticket):
                if (out := peer.out.pop(ticket, None)) is not None:
                    _close(out)
                    self._port.body_taken(number, ticket)
            case BodyRefused(ticket, why, text):
                log.warning("node %d refuses a body: %s", number, text)
                self._give_up(number, ticket, why)

    def _open(self, number: int, peer: _Peer, body: int, ticket: int, size: int) -> None:
        if not 0 < size <= MESSAGE_BYTES:
            text = f"{size} bytes, the limit is {MESSAGE_BYTES}"
            self._send(number, BodyRefused(ticket, errno.EMSGSIZE, text))
            return
        try:
            fd = os.memfd_create("afbus-body", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            text = f"no memory for a body: {error.strerror}"
            self._send(number, BodyRefused(ticket, error.errno or errno.ENOMEM, text))
            return
        peer.into[body] = _In(ticket, size, fd)

    @staticmethod
    def _write(peer: _Peer, body: int, data: bytes) -> None:
        one = peer.into.get(body)
        if one is None:
            return
        # The link has checked that it is not more than was announced.
        os.pwrite(one.fd, data, one.received)
        one.received += len(data)
        one.digest.update(data)

    def _settle(self, number: int, peer: _Peer, body: int, one: _In, *, is_whole: bool) -> None:
        """Give a body to the switch when all of it is there, and what it should be."""
        if is_whole and not (one.has_ended and one.promised is not None):
            return
        del peer.into[body]
        try:
            if not is_whole:
                return
            if one.received != one.size or one.digest.digest() != one.promised:
                text = "the body is not what was sent"
                self._send(number, BodyRefused(one.ticket, errno.EBADMSG, text))
                return
            if one.ticket not in peer.taken:
                fcntl.fcntl(one.fd, fcntl.F_ADD_SEALS, _SEALS)
                try:
                    self._port.body_put(number, one.ticket, one.fd)
                except ValueError as error:
                    self._send(number, BodyRefused(one.ticket, errno.ENOBUFS, str(error)))
                    return
                peer.taken[one.ticket] = None
                if len(peer.taken) > TAKEN:
                    peer.taken.popitem(last=False)
            self._send(number, BodyTaken(one.ticket))
        finally:
            os.close(one.fd)


def _close(one: _Out) -> None:
    if one.fd >= 0:
        os.close(one.fd)
        one.fd = -1
