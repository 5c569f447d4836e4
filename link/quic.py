"""Links over QUIC: aioquic, on one UDP socket for all links of a member.

The socket accepts and dials. Datagrams are told apart by their connection ids, so a peer that
comes from another address, after its router or its interface has changed, keeps its link.

Everything runs in calls of the event loop that was current when the carrier was made; there are
no tasks. The carrier owns the socket, until `close`, and its connections their timers.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from os import urandom
from typing import TYPE_CHECKING, Any, Final

from aioquic._buffer import Buffer
from aioquic.quic.packet import (
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.retry import QuicRetryTokenHandler

from ..proto.errors import LinkError
from .carrier import Carrier, Member, check_enrolment
from .certificate import Authority, Side
from .handshake import ALPN, ENROL_ALPN, LinkConnection, Origin, configure
from .link import Link
from .reason import Reason
from .udp import DATAGRAM_BYTES_MIN, UdpSocket, is_numeric, path_bytes
from .wire import EnrolWish, LinkWish, QuicWire

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from .carrier import Done, EnrolDone, Enrolled, Timer
    from .identity import Identity
    from .udp import Address
    from .wire import Wish

#: Length of our connection ids (the default of aioquic).
_ID_BYTES: Final = 8
#: Handshakes of clients that may be under way. Beyond the first number an address must be proved
#: first (Retry), beyond the second nobody is heard. The third is the share of one host, so that
#: none keeps all others out.
PENDING_PROVEN: Final = 32
PENDING: Final = 256
PENDING_OF_HOST: Final = 64
#: QUIC's own idle time-out is a net under the link's.
_IDLE_SPARE_S: Final = 2.0
#: Names of ended connections of which the farewell is still known: it may have been lost, and who
#: sends to one of them hears it again, this often.
_FAREWELLS: Final = 4096
_FAREWELL_TIMES: Final = 4


class QuicCarrier(Carrier):
    """One member's UDP socket, and all its links."""

    def __init__(
        self, member: Member, host: str, port: int = 0, *, datagram_bytes: int | None = None
    ) -> None:
        """Bind, and accept from now on. Needs a running event loop.

        Args:
            member: Who the own member is.
            host: A numeric address of this host; `::` hears all of IPv6 and IPv4.
            port: 0 takes a free one.
            datagram_bytes: Size of what is sent, at least 1200; None looks at the way to each
                peer. It must fit through everything on that way.

        Raises:
            LinkError: The address cannot be bound.
        """
        super().__init__(member)
        self.loop = asyncio.get_running_loop()
        self._socket = UdpSocket(host, port)
        self._datagram_bytes = datagram_bytes
        self._wires: dict[bytes, QuicWire] = {}
        self._farewells: OrderedDict[bytes, tuple[list[tuple[bytes, Address]], int]] = OrderedDict()
        #: Handshakes of clients under way, by their host.
        self._pending: Counter[str] = Counter()
        self._retry = QuicRetryTokenHandler()
        self.loop.add_reader(self._socket.fileno(), self._handle_readable)

    @property
    def address(self) -> Address:
        """Host and port."""
        return self._socket.address

    @property
    def unsent(self) -> int:
        """Datagrams that the kernel did not take."""
        return self._socket.unsent

    @property
    def is_closed(self) -> bool:
        """Whether the carrier was closed."""
        return self._socket.fileno() < 0

    def now(self) -> float:
        """Return the time of the event loop."""
        return self.loop.time()

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call back at a time of the event loop."""
        return self.loop.call_at(when, callback)

    def close(self) -> None:
        """End all links at once, and close the socket."""
        if self.is_closed:
            return
        for wire in dict.fromkeys(self._wires.values()):
            wire.cut(Reason.CARRIER, "the carrier was closed")
            wire.end(Reason.CARRIER, "the carrier was closed", is_remote=False)
        self.loop.remove_reader(self._socket.fileno())
        self._socket.close()

    # --- calling others ---

    def dial(self, address: Address, claim: Identity, done: Done) -> None:
        """As `Carrier.dial`; `address` is a host, by number or name, and a port."""
        self._find_way(address, LinkWish(claim, done))

    def enrol(self, address: Address, root_digest: bytes, request: bytes, done: EnrolDone) -> None:
        """As `Carrier.enrol`; `address` as for `dial`."""
        check_enrolment(request)
        self._find_way(address, EnrolWish(root_digest, request, done))

    def _find_way(self, address: Address, wish: Wish) -> None:
        """Call once the address is a number; names are looked up in a thread of the loop."""
        host, port = address[0], address[1]
        if self.is_closed:
            self.loop.call_soon(wish.done, LinkError("the carrier was closed"))
            return
        if is_numeric(host):
            try:
                peer = self._socket.to_peer(host, port)
            except LinkError as error:
                self.loop.call_soon(wish.done, error)
            else:
                self._call(peer, wish)
            return
        found = self.loop.run_in_executor(None, self._socket.find, host, port)
        found.add_done_callback(lambda found: self._call_found(found, wish))

    def _call_found(self, found: asyncio.Future[Address], wish: Wish) -> None:
        if self.is_closed or found.cancelled():
            wish.done(LinkError("the carrier was closed"))
            return
        try:
            peer = found.result()
        except LinkError as error:
            wish.done(error)
        else:
            self._call(peer, wish)

    def _call(self, peer: Address, wish: Wish) -> None:
        wire = QuicWire(self, peer, wish)
        protocol = ALPN if isinstance(wish, LinkWish) else ENROL_ALPN
        connection = LinkConnection(self._configure(Side.CLIENT, [protocol], peer), wire)
        self.add_id(connection.host_cid, wire)
        wire.start(connection)
        connection.connect(peer, now=self.now())
        wire.transmit_soon()

    async def connect(self, address: Address, claim: Identity) -> Link:
        """As `dial`, to be waited for.

        Raises:
            LinkError: It has failed; an IdentityError if trying again cannot help.
        """
        future: asyncio.Future[Link] = self.loop.create_future()

        def settle(outcome: Link | LinkError) -> None:
            if future.cancelled():
                if isinstance(outcome, Link):
                    outcome.close(Reason.CLOSED, "nobody waits for it any more")
            elif isinstance(outcome, LinkError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self.dial(address, claim, settle)
        return await future

    # --- for connections ---

    def send(self, datagrams: list[tuple[bytes, Address]]) -> None:
        """Send what a connection wants sent."""
        if datagrams and not self.is_closed:
            self._socket.send(datagrams)

    def add_id(self, connection_id: bytes, wire: QuicWire) -> None:
        """Learn another name of a connection."""
        self._wires[connection_id] = wire
        wire.ids.add(connection_id)

    def drop_id(self, connection_id: bytes, wire: QuicWire) -> None:
        """Forget a name of a connection."""
        self._wires.pop(connection_id, None)
        wire.ids.discard(connection_id)

    def drop(self, wire: QuicWire, farewell: list[tuple[bytes, Address]]) -> None:
        """Forget a connection; whoever still sends to it gets the farewell again."""
        for connection_id in wire.ids:
            self._wires.pop(connection_id, None)
            if farewell:
                self._farewells[connection_id] = farewell, _FAREWELL_TIMES
        while len(self._farewells) > _FAREWELLS:
            self._farewells.popitem(last=False)
        if wire.link is not None:
            self.drop_link(wire.link)

    def settle_pending(self, host: str) -> None:
        """A client has ended its handshake, well or not; `host` is where it began."""
        self._pending[host] -= 1
        if not self._pending[host]:
            del self._pending[host]

    def _configure(self, own: Side, protocols: list[str], peer: Address) -> Any:
        return configure(
            own,
            self.credentials,
            protocols,
            idle_s=self.member.settings.idle_s + _IDLE_SPARE_S,
            datagram_bytes=self._datagram_bytes or path_bytes(peer),
        )

    # --- what arrives ---

    def _handle_readable(self) -> None:
        now = self.now()
        touched: dict[QuicWire, None] = {}
        for data, address in self._socket.receive():
            # A short header has no more than our own connection id behind its first byte.
            is_short = bool(data) and not data[0] & 0x80
            name = data[1 : 1 + _ID_BYTES] if is_short else b""
            wire = self._wires.get(name) if is_short else self._find(data, address)
            if wire is not None:
                wire.receive(data, address, now)
                touched[wire] = None
            elif name in self._farewells:
                self._repeat_farewell(name)
        for wire in touched:
            wire.settle()

    def _repeat_farewell(self, name: bytes) -> None:
        farewell, times = self._farewells.pop(name)
        self.send(farewell)
        if times > 1:
            self._farewells[name] = farewell, times - 1

    def _find(self, data: bytes, address: Address) -> QuicWire | None:
        """Return whose a datagram with a long header is; a new client's makes a connection."""
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=_ID_BYTES)
        except ValueError:
            return None
        wire = self._wires.get(header.destination_cid)
        is_stranger = wire is None and len(data) >= DATAGRAM_BYTES_MIN
        if not is_stranger or header.packet_type is QuicPacketType.VERSION_NEGOTIATION:
            return wire
        if header.version != QuicProtocolVersion.VERSION_1:
            self._offer_version(header, address)
        elif header.packet_type is QuicPacketType.INITIAL and self._has_place(address[0]):
            origin = self._origin_of(header, address)
            if origin is not None and self.credentials is not None:
                return self._accept(header.destination_cid, address, origin)
        return None

    def _has_place(self, host: str) -> bool:
        """Whether one more handshake of this host may begin."""
        return self._pending.total() < PENDING and self._pending[host] < PENDING_OF_HOST

    def _offer_version(self, header: Any, address: Address) -> None:
        answer = encode_quic_version_negotiation(
            source_cid=header.destination_cid,
            destination_cid=header.source_cid,
            supported_versions=[QuicProtocolVersion.VERSION_1],
        )
        self.send([(answer, address)])

    def _origin_of(self, header: Any, address: Address) -> Origin | None:
        """Return how a client's connection begins; None: not now, or not before a proof."""
        if not header.token:
            if self._pending.total() >= PENDING_PROVEN:
                self._ask_for_proof(header, address)
                return None
            return Origin(header.destination_cid)
        try:
            first_id = self._retry.validate_token(
                address=address,
                destination_cid=header.destination_cid,
                token=header.token,
                now=self.now(),
            )
        except ValueError:
            return None
        return Origin(first_id, header.destination_cid)

    def _ask_for_proof(self, header: Any, address: Address) -> None:
        source = urandom(_ID_BYTES)
        token = self._retry.create_token(
            address=address,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=source,
            now=self.now(),
        )
        answer = encode_quic_retry(
            version=header.version,
            source_cid=source,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=token,
        )
        self.send([(answer, address)])

    def _accept(self, first_id: bytes, address: Address, origin: Origin) -> QuicWire:
        wire = QuicWire(self, address, None)
        protocols = [ALPN] if self.member.enrol is None else [ALPN, ENROL_ALPN]
        connection = LinkConnection(self._configure(Side.SERVER, protocols, address), wire, origin)
        self._pending[address[0]] += 1
        self.add_id(first_id, wire)
        self.add_id(connection.host_cid, wire)
        wire.start(connection)
        return wire


async def enrol(
    address: Address, root_digest: bytes, request: bytes, utc_now: Callable[[], datetime]
) -> Enrolled:
    """Ask a master for a certificate, from a socket of its own; at most `ENROL_S` seconds.

    Raises:
        LinkError: It has failed; an IdentityError if there is another cluster's master.
    """

    def refuse_link(_link: Link) -> Any:
        raise AssertionError("who has no certificate has no link")

    member = Member(None, Authority("", ()), urandom(16), refuse_link, utc_now)
    try:
        carrier = QuicCarrier(member, "::")
    except LinkError:
        # No IPv6 here.
        carrier = QuicCarrier(member, "0.0.0.0")  # noqa: S104 (it accepts nobody)
    try:
        future: asyncio.Future[Enrolled] = carrier.loop.create_future()

        def settle(outcome: Enrolled | LinkError) -> None:
            if future.done():
                return
            if isinstance(outcome, LinkError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        carrier.enrol(address, root_digest, request, settle)
        return await future
    finally:
        carrier.close()
