"""The agent's place in a cluster, with IO: one socket for all other nodes, one for the master.

The shell around `uplink.py`, `peers.py` and `federation.py`: it owns the carriers, keeps a link to
the master up, applies what these want done, and keeps the membership's files. An agent that is in
no cluster does not import it.

Everything runs in the agent's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from .._datapath import Carrier as NativePort
from ..link.carrier import Member
from ..link.certificate import Refusal
from ..link.dialer import Dialer
from ..link.effect import Down, Message, Room, Silent
from ..link.frame import Channel
from ..link.identity import Identity, Role
from ..link.native import NativeCarrier
from ..link.quic import QuicCarrier
from ..link.reason import Reason
from ..link.settings import Settings
from ..link.stranger import Strangers
from ..link.udp import show_address
from ..proto.errors import ConfigError, IdentityError, LinkError, RemoteProtocolError
from ..proto.limits import MIB, STALE_S
from ..proto.record import BOOT_BYTES, DeniedRecord
from .config import NATIVE
from .membership import Membership, utc_now
from .peers import Peers, is_batch
from .place import find_place, format_place, own_places, parse_listen, parse_place
from .relay import Relay
from .uplink import Patience, Uplink
from .uplink_effect import Changed, Hang, Renewed, Say, Spare

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .._datapath import Switch
    from ..link.carrier import Carrier
    from ..link.certificate import Refused
    from ..link.effect import Event
    from ..link.link import Link, Sink
    from .core import Core
    from .uplink_effect import UplinkEffect

log = logging.getLogger("afbus.node")

#: The datapath reads at once, so a wide window costs nothing, and is told of credit less often.
_WIDE: Final = Settings(window_bytes=8 * MIB, in_flight_bytes=32 * MIB)
#: Destination on the channel of the tables.
_TABLE: Final = 0
#: How often links are looked at that nobody uses, and certificates that have expired.
_LOOK_S: Final = 5.0


class Links:
    """Carrier, uplink, peers and federation of one agent."""

    def __init__(  # noqa: PLR0913 (what a node consists of)
        self,
        loop: asyncio.AbstractEventLoop,
        core: Core,
        switch: Switch,
        membership: Membership,
        listen: str,
        places: tuple[str, ...],
        settle: Callable[[], None],
        carrier: str = NATIVE,
        failed: Callable[[LinkError], None] | None = None,
        stale_s: float = STALE_S,
    ) -> None:
        """Bind, and begin to look for the master.

        Args:
            loop: The agent's.
            core: The agent's, without endpoints yet.
            switch: Its switch.
            membership: Who this node is.
            listen: `host:port` to hear peers on.
            places: Where peers reach it; by default `listen`, if that is one address, else the
                address from which it reaches the master.
            settle: Applies the effects of the core; called after whatever happens here.
            carrier: What moves the links to other nodes, one of `CARRIERS`.
            failed: Called if that has failed, and nothing moves any more.
            stale_s: For how long without the master its answers are believed.

        Raises:
            ConfigError: A place is none, or this host cannot listen there.
            AddressInUse: Another process listens there. EADDRINUSE.
        """
        self._loop = loop
        self._switch = switch
        self._membership = membership
        self._settle_core = settle
        self._master: Link | None = None
        self._strangers = Strangers()
        self._timer: asyncio.TimerHandle | None = None
        host, port = parse_listen(listen)
        member = Member(
            membership.credentials,
            membership.authority,
            secrets.token_bytes(BOOT_BYTES),
            self._accept,
            utc_now,
            refused=self._note_refused,
        )
        #: That of links to other nodes, and that of the link to the master.
        self._carrier: Carrier
        self._upward: Carrier
        try:
            if carrier == NATIVE:
                wide = replace(member, settings=_WIDE)
                self._carrier = NativeCarrier(wide, NativePort, host, port, failed)
                self._upward = QuicCarrier(member, host)
            else:
                self._carrier = self._upward = QuicCarrier(member, host, port)
        except LinkError as error:
            raise ConfigError(str(error), key="listen") from error
        self._carriers = tuple(dict.fromkeys((self._carrier, self._upward)))
        masters = [parse_place(place) for place in membership.places]
        shown = places or own_places(host, self._carrier.address[1], masters)
        self.uplink = Uplink(
            membership.identity.name,
            shown,
            lambda: self._membership.make_request(),
            loop.time(),
            spare=membership.block,
            blocks=core.blocks,
            patience=Patience(stale_s=stale_s),
        )
        self.federation = core.join_cluster(switch, self.uplink, loop.time)
        self.peers = self.federation.peers = Peers(
            self._carrier,
            membership.identity,
            switch,
            self.federation,
            random.SystemRandom(),
            secrets.token_bytes,
            find_place,
        )
        self._relay = Relay(self.peers.accept, self._identify)
        self.peers.go_round = self._relay.open
        self._dialer = Dialer(
            self._upward,
            membership.master,
            masters,
            random.SystemRandom(),
            self._note_failure,
        )
        self.federation.restore()
        self._set_renewal()
        self._look = loop.call_later(_LOOK_S, self._handle_look)

    @property
    def place(self) -> str:
        """Where this node hears its peers."""
        return format_place(*self._carrier.address[:2])

    def describe(self) -> dict[str, Any]:
        """Return what people want to know, JSON-able."""
        about = self.uplink.describe(self._loop.time())
        away_s = about.pop("away_s")
        return {
            **about,
            # Packets of the door carry whole numbers only.
            "away_ms": None if away_s is None else round(1000 * away_s),
            "listen": self.place,
            "certificate_until": self._membership.certificate.not_valid_after_utc.isoformat(),
            "peers": self.peers.describe(),
        }

    def settle(self) -> bool:
        """Apply what the uplink wants done now; return whether there was anything."""
        effects = self.uplink.take_effects()
        for effect in effects:
            self._apply(effect)
        self._arm()
        return bool(effects)

    def receive_lanes(self) -> None:
        """The switch has something to say of its lanes."""
        for event in self._switch.take_lane_events():
            match event:
                case ("body", trunk, ticket, size):
                    self.peers.handle_body(trunk, ticket, size)
                case _:
                    self.federation.receive_lane(event)

    async def close(self) -> None:
        """Close all links in good order, within the time that a link takes to flush."""
        self._look.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._dialer.stop()
        self.peers.close()
        if self._master is not None:
            self._master.close(Reason.GOING_DOWN, "the node goes down")
        await _until_closed(self._carriers)
        for carrier in self._carriers:
            carrier.close()

    # --- links ---

    def _accept(self, link: Link) -> Sink:
        if link.peer.role is Role.NODE:
            sink = self.peers.accept(link)
            return lambda event: self._pass_on(sink, event)
        if link.peer == self._membership.master and link.is_dialed:
            self._master = link
            self._relay.set_master(link)
            self.uplink.receive_link(self._loop.time())
            self._loop.call_soon(self._settle_core)
            return lambda event: self._handle_master(link, event)
        link.close(Reason.NOT_ADMITTED, f"{link.peer} has nothing to ask of a node")
        return lambda _: None

    def _pass_on(self, sink: Sink, event: Event) -> None:
        sink(event)
        if not is_batch(event):
            # Batches concern the switch alone; what it has to say of them, it says by itself.
            self._settle_core()

    def _handle_master(self, link: Link, event: Event) -> None:
        now = self._loop.time()
        match event:
            case Message(channel, destination, data, cost):
                if channel is Channel.DATA and self._master is link:
                    self._receive_relayed(link, destination, data, cost)
                else:
                    if channel is Channel.TABLES and destination == _TABLE:
                        if self._master is link:
                            self._relay.admit()
                        self.uplink.receive_frame(data, now)
                    if not link.is_down:
                        link.release(channel, destination, cost)
            case Room(channel, destination) if channel is Channel.DATA:
                self._relay.handle_room(destination)
            case Silent():
                # It may have begun anew, and then it does not know this link. All is stated again
                # on the next one, so nothing is lost with it.
                link.close(Reason.SILENT, "the master is silent")
            case Down():
                is_own = event.reason is Reason.GOING_DOWN and not event.is_remote
                level = logging.INFO if is_own else logging.WARNING
                log.log(level, "the link to the cluster's master has ended: %s", event)
                if self._master is link:
                    self._master = None
                    self._relay.set_master(None)
                    self.uplink.receive_end(now)
            case _:
                pass
        self._settle_core()

    def _receive_relayed(self, link: Link, number: int, data: bytes, cost: int) -> None:
        try:
            self._relay.receive(number, data, cost)
        except RemoteProtocolError as error:
            link.close(Reason.MALFORMED, str(error))

    def _identify(self, number: int) -> Identity | None:
        """Return who the node of a number is; for links that the master carries."""
        record = self.uplink.mirror.get_node(number)
        if record is None or number == self.uplink.number:
            return None
        return Identity(self._membership.identity.cluster, Role.NODE, record.name)

    def _note_refused(self, address: Any, refused: Refused) -> None:
        """Somebody has presented a certificate that is no good; the master has its own audit."""
        if refused.reason is Refusal.BY_PEER:
            # It was ours; whoever has dialed is told.
            return
        if self._strangers.admit(self._loop.time()):
            where = show_address(address) if isinstance(address, tuple) else str(address)
            log.warning("audit: refused %s: %s", where, refused)

    def _note_failure(self, error: LinkError) -> None:
        level = logging.WARNING if isinstance(error, IdentityError) else logging.INFO
        log.log(level, "no link to the cluster's master: %s", error)
        if isinstance(error, IdentityError):
            self.uplink.receive_refusal(str(error))

    # --- what is to be done ---

    def _apply(self, effect: UplinkEffect) -> None:
        match effect:
            case Say(data):
                master = self._master
                if master is not None and not master.send(Channel.TABLES, _TABLE, data):
                    master.close(Reason.LIMIT, "the master does not read what this node says")
            case Hang(text):
                if self._master is not None:
                    self._relay.set_master(None)
                    self._master.close(Reason.ORDER, text)
                    self._master = None
            case Spare(block):
                if not self._try(lambda: self._membership.write_block(block)):
                    self.uplink.refuse_spare(block, self._loop.time())
            case Renewed(chain):
                self._try(lambda: self._renew(chain))
            case Changed(changes):
                self.federation.receive_uplink(effect)
                if any(isinstance(change.new or change.old, DeniedRecord) for change in changes):
                    self._follow_denied()
            case _:
                self.federation.receive_uplink(effect)

    def _try(self, action: Callable[[], None]) -> bool:
        """Do something that may fail; return whether it was done."""
        try:
            action()
        except (ConfigError, IdentityError) as error:
            log.error("%s", error)
            return False
        return True

    def _renew(self, chain: tuple[bytes, ...]) -> None:
        self._membership = self._membership.renew(chain, utc_now())
        for carrier in self._carriers:
            carrier.set_credentials(self._membership.credentials)
        self._set_renewal()

    def _set_renewal(self) -> None:
        left_s = (self._membership.renew_at_utc - utc_now()).total_seconds()
        self.uplink.set_renewal(self._loop.time() + max(0.0, left_s))

    def _follow_denied(self) -> None:
        """Trust nobody who is out, from now on: links that live are cut (case 35)."""
        trusted = self._membership.authority
        denied = self.uplink.mirror.get_denied()
        for carrier in self._carriers:
            carrier.set_authority(type(trusted)(trusted.cluster, trusted.anchors, denied))

    # --- time ---

    def _arm(self) -> None:
        due = self.uplink.get_timer()
        if self._timer is not None and self._timer.when() != due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and due is not None:
            self._timer = self._loop.call_at(due, self._handle_timer)

    def _handle_timer(self) -> None:
        self._timer = None
        self.uplink.handle_timer(self._loop.time())
        self._settle_core()

    def _handle_look(self) -> None:
        if missed := self._strangers.take_missed():
            log.warning("audit: refused %d more, of whom there is no line each", missed)
        self.peers.close_idle()
        for carrier in self._carriers:
            carrier.judge_links()
        self._look = self._loop.call_later(_LOOK_S, self._handle_look)


async def _until_closed(carriers: Sequence[Carrier]) -> None:
    """Wait until all links have ended; each ends by itself when its time to flush is over."""
    links = [link for carrier in carriers for link in carrier.links if not link.is_down]
    ended = asyncio.Semaphore(0)
    for link in links:
        link.watch_end(lambda _: ended.release())
    for _ in links:
        await ended.acquire()
