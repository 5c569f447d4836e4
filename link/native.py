"""Links over QUIC by the carrier of the datapath: one UDP socket, on a thread of its own.

The thread (`datapath/src/carrier/`) has the socket, QUIC and TLS. It asks `judge` here within each
handshake, from that thread; everything else comes as events to the event loop, and goes to the same
core of links as over aioquic. What goes over the wire is the same too.

Everything but `judge` runs in calls of the event loop that was current when the carrier was made.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import TYPE_CHECKING, Any, Final, Protocol

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ..proto.errors import AddressInUse, InvalidArgument, LinkError
from .carrier import Carrier, Member
from .certificate import Refusal, Refused, Side
from .handshake import alert_of
from .native_link import NativeWire
from .reason import Reason
from .settings import RETURN_PART
from .udp import family_of, is_numeric, look_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from .carrier import Done, EnrolDone, Timer
    from .credentials import Credentials
    from .identity import Identity
    from .native_link import Port
    from .udp import Address

#: QUIC's own idle time-out is a net under the link's.
_IDLE_SPARE_S: Final = 2.0
#: Verdicts on connections that have not opened; more are not under way.
_VERDICTS: Final = 1024


class MakePort(Protocol):
    """`_datapath.Carrier` itself."""

    def __call__(  # noqa: PLR0913 (what a carrier begins with)
        self,
        host: str,
        port: int,
        *,
        chain: list[bytes],
        key: bytes,
        idle_s: float,
        report_cost: int,
        judge: Callable[[int, Any, bool, bool, list[bytes]], int | None],
    ) -> Port:
        """Bind, and accept from now on. OSError: the address cannot be bound."""


def _key_bytes(credentials: Credentials) -> bytes:
    return credentials.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


class NativeCarrier(Carrier):
    """One node's UDP socket for links to other nodes."""

    def __init__(
        self,
        member: Member,
        make: MakePort,
        host: str,
        port: int = 0,
        failed: Callable[[LinkError], None] | None = None,
    ) -> None:
        """Bind, and accept from now on. Needs a running event loop.

        Args:
            member: Who the own member is; it has credentials, and enrols nobody.
            make: `_datapath.Carrier`.
            host: A numeric address of this host; `::` hears all of IPv6 and IPv4.
            port: 0 takes a free one.
            failed: Called once if the thread of the carrier has failed, and nothing moves.

        Raises:
            AddressInUse: Another process has this port. EADDRINUSE.
            LinkError: The address cannot be bound.
        """
        assert member.credentials is not None
        assert member.enrol is None
        self._port: Port | None = None
        self._failed = failed
        super().__init__(member)
        self.loop = asyncio.get_running_loop()
        self._wires: dict[int, NativeWire] = {}
        self._claims: dict[int, Identity] = {}
        self._verdicts: dict[int, tuple[Identity | Refused, tuple[bytes, ...]]] = {}
        try:
            made = make(
                host,
                port,
                chain=list(member.credentials.chain),
                key=_key_bytes(member.credentials),
                idle_s=member.settings.idle_s + _IDLE_SPARE_S,
                # So much is given back at a time.
                report_cost=member.settings.window_bytes // RETURN_PART,
                judge=self.judge,
            )
        except OSError as error:
            text = f"cannot bind {host} port {port}: {error.strerror}"
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(text) from error
            raise LinkError(text) from error
        self._port = made
        self._address = made.address
        self._fd = made.fileno()
        self.loop.add_reader(self._fd, self._handle_readable)

    @property
    def address(self) -> Address:
        """Host and port."""
        return self._address

    @property
    def is_closed(self) -> bool:
        """Whether the carrier was closed."""
        return self._port is None

    @property
    def port(self) -> Port:
        """The thread; only while it is not closed."""
        assert self._port is not None
        return self._port

    def now(self) -> float:
        """Return the time of the event loop."""
        return self.loop.time()

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call back at a time of the event loop."""
        return self.loop.call_at(when, callback)

    def set_credentials(self, credentials: Credentials | None) -> None:
        """As `Carrier.set_credentials`."""
        super().set_credentials(credentials)
        if self._port is not None and credentials is None:
            self._port.set_credentials([], b"")
        elif self._port is not None and credentials is not None:
            self._port.set_credentials(list(credentials.chain), _key_bytes(credentials))

    def close(self, *, kill: bool = False) -> None:
        """End all links at once, and the thread. With `kill` no peer is told."""
        if self._port is None:
            return
        port = self._port
        for wire in list(self._wires.values()):
            if not kill:
                wire.cut(Reason.CARRIER, "the carrier was closed")
            wire.end(Reason.CARRIER, "the carrier was closed", is_remote=False)
        self._port = None
        self.loop.remove_reader(self._fd)
        port.close(kill=kill)

    # --- calling others ---

    def dial(self, address: Address, claim: Identity, done: Done) -> None:
        """As `Carrier.dial`; `address` is a host, by number or name, and a port."""
        host, port = address[0], address[1]
        if self._port is None:
            self.loop.call_soon(done, LinkError("the carrier was closed"))
        elif not 0 < port < 65_536:
            self.loop.call_soon(done, LinkError(f"{host} has no port {port}"))
        elif is_numeric(host) and "%" not in host:
            self._call((host, port), claim, done)
        else:
            family = family_of(self._address[0])
            family = family if family is socket.AF_INET else socket.AF_UNSPEC
            found = self.loop.run_in_executor(None, look_up, host, port, family)
            found.add_done_callback(lambda found: self._call_found(found, claim, done))

    def _call_found(self, found: asyncio.Future[Address], claim: Identity, done: Done) -> None:
        if self._port is None or found.cancelled():
            done(LinkError("the carrier was closed"))
            return
        try:
            place = found.result()
        except LinkError as error:
            done(error)
        else:
            self._call(place, claim, done)

    def _call(self, place: Address, claim: Identity, done: Done) -> None:
        number = self.port.next_number()
        # Before it calls: the judge asks for it.
        self._claims[number] = claim
        self._wires[number] = NativeWire(self, number, place, done)
        scope = place[3] if len(place) == 4 else 0
        self.port.dial(number, place[0].partition("%")[0], place[1], scope)

    def enrol(self, address: Any, root_digest: bytes, request: bytes, done: EnrolDone) -> None:
        """Never asked for: who has no certificate yet calls by aioquic."""
        raise InvalidArgument("nodes enrol by aioquic")

    # --- for connections ---

    def judge(
        self, number: int, address: Address, is_dialed: bool, holds_key: bool, chain: list[bytes]
    ) -> int | None:
        """Judge a peer within its handshake; called by the thread of the carrier.

        Returns:
            None, or the alert by which it is refused.
        """
        presented = tuple(chain)
        side = Side.SERVER if is_dialed else Side.CLIENT
        claim = self._claims.get(number)
        verdict: Identity | Refused
        if not holds_key:
            verdict = Refused(Refusal.KEY, "the peer does not hold the key")
        elif is_dialed and claim is None:
            verdict = Refused(Refusal.CLAIM, "nobody waits for it any more")
        else:
            verdict = self.weigh_peer(presented, side, claim)
        while len(self._verdicts) >= _VERDICTS:
            self._verdicts.pop(next(iter(self._verdicts)), None)
        self._verdicts[number] = (verdict, presented)
        if not isinstance(verdict, Refused):
            return None
        self.loop.call_soon_threadsafe(self.report_refused, address, verdict)
        return alert_of(verdict.reason)

    def take_verdict(self, number: int) -> tuple[Identity | Refused | None, tuple[bytes, ...]]:
        """Return what was said of a peer, and what it presented."""
        return self._verdicts.pop(number, (None, ()))

    def drop(self, wire: NativeWire) -> None:
        """Forget a connection."""
        self._wires.pop(wire.number, None)
        self._claims.pop(wire.number, None)
        self._verdicts.pop(wire.number, None)
        if wire.link is not None:
            self.drop_link(wire.link)

    def _handle_readable(self) -> None:
        if self._port is None:
            return
        try:
            events = self._port.take_events()
        except RuntimeError as error:
            # It says so at each call, and would be asked for ever.
            self.loop.remove_reader(self._fd)
            failure = LinkError(f"{error}; the agent ends, and its clients can resume")
            if self._failed is None:
                raise failure from error
            self._failed(failure)
            return
        for name, number, *rest in events:
            if name == "called":
                self._wires[number] = NativeWire(self, number, rest[0], None)
                continue
            wire = self._wires.get(number)
            if wire is not None:
                wire.receive(name, rest)
