"""The agent without IO: connections, endpoints, and what a client may ask for at the door.

The shell tells what happened (`receive_*`), with the time; the core answers by effects, which the
shell takes and applies in their order (`take_effects`), and by direct calls to the switch, which
cost microseconds. `get_timer` says when `handle_timer` is wanted next.

    connection  --HELLO-->  endpoint  --ATTACH, BIND-->  on a bus  --SCM_OWNED_ADDR-->  member

Invariants:

1. Results go out in the order of the calls, and a call has taken effect before its result.
2. Whatever one connection sends concerns that connection, or is what its endpoint may do.
3. A refused call has changed nothing.
4. A token resumes an endpoint only in the process, and for the user, that got it.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from socket import SHUT_RD, SHUT_RDWR, SHUT_WR, SO_PASSCRED, SOL_SOCKET
from typing import TYPE_CHECKING, Any, Final

from ..proto import control, frames
from ..proto.address import BusAddress, format_within, is_provisional
from ..proto.codec import U64_MAX
from ..proto.control import (
    BUS_SOCKET,
    SO_BUS_ADDRESSES,
    SO_BUS_FILTER,
    SO_BUS_MASTER,
    SO_BUS_STATE,
    SO_BUS_STATS,
    GrantFlags,
    OwnedAddr,
    RevokeAddr,
    RevokeMatch,
    RevokeSend,
)
from ..proto.errors import (
    AddressInUse,
    BadDestination,
    BusError,
    CloseCode,
    Denied,
    InvalidArgument,
    NoBus,
    NoSuchEndpoint,
    NotOwned,
    RemoteProtocolError,
    ShutDown,
    TooBig,
)
from ..proto.frames import Call, Closed, Hello, Op, Result, Welcome
from ..proto.limits import (
    BLOOM_BITS,
    BLOOM_BITS_DEFAULT,
    BLOOM_KEY_BYTES,
    DEADLINE_MS_MAX,
    FILTER_INSTRUCTION_BYTES,
    FILTER_INSTRUCTIONS,
    IDENTITY_BYTES,
    INLINE_BYTES,
    RING_BYTES_MAX,
    TOKEN_BYTES,
)
from ..proto.notice import Event, Notice
from ..proto.text import escape
from ..proto.version import VERSION, is_spoken
from .effect import Audit, Cut, Deliver, Effect, Send
from .endpoint import ORDERS, Bus, Credentials, Endpoint, EndpointId
from .grant import COMMANDS, Command, Draft, apply
from .listing import Listing
from .registry import RX_HEADER_BYTES, Registry, padded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from ..proto.frames import Frame
    from .effect import ConnectionId, Put
    from .port import SwitchPort

#: Endpoints of one user: what a busy session has, several times over.
ENDPOINTS_PER_USER: Final = 4096
#: Matches and grants to send of one user, over all buses: 100,000 on one bus, and some more.
MATCHES_PER_USER: Final = 131_072
#: How long an endpoint may be away after the agent began anew.
GRACE_S: Final = 5.0
#: How long a connection may be silent before its HELLO.
HELLO_S: Final = 5.0

#: What an identity takes in a record: the name of the node, and numbers.
_IDENTITY_ROOM: Final = IDENTITY_BYTES + 65

_ITEM: Final = struct.Struct("<HHI")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one user may have, and how long the agent waits."""

    endpoints_per_user: int = ENDPOINTS_PER_USER
    matches_per_user: int = MATCHES_PER_USER
    #: The largest ring; both rings of an endpoint are its user's, and count against nobody else.
    ring_bytes_max: int = RING_BYTES_MAX
    grace_s: float = GRACE_S
    hello_s: float = HELLO_S


@dataclass(frozen=True, slots=True)
class About:
    """What the agent is told of itself: for WELCOME, STATUS and the rights of its own user."""

    node: str
    version: str
    epoch: int
    pid: int
    uid: int
    #: When it began, as text, UTC.
    started_utc: str


@dataclass(slots=True, eq=False)
class _Connection:
    """One connection of the door; `endpoint` is None until its HELLO."""

    id: ConnectionId
    credentials: Credentials
    hello_until: float
    endpoint: Endpoint | None = None


class Core:
    """The agent's decisions."""

    def __init__(
        self,
        switch: SwitchPort,
        about: About,
        draw: Callable[[int], bytes],
        limits: Limits | None = None,
    ) -> None:
        """Begin without endpoints.

        Args:
            switch: An empty switch; nobody else may change it.
            about: Who the agent is.
            draw: Returns so many secret random bytes.
            limits: By default those above.
        """
        self._switch = switch
        self._about = about
        self._draw = draw
        self._limits = limits or Limits()
        self._effects: list[Effect] = []
        self._registry = Registry(switch, about.node, self._effects)
        self._listing = Listing(self._registry, switch, about.uid)
        self._connections: dict[ConnectionId, _Connection] = {}
        self._connections_of: Counter[int] = Counter()
        # Those without HELLO, in the order in which their time runs out.
        self._silent: dict[ConnectionId, _Connection] = {}
        # Endpoints that were restored and have not come back; one time for them all.
        self._away: dict[int, Endpoint] = {}
        self._away_until = 0.0

    # --- what the shell calls ---

    def take_effects(self) -> list[Effect]:
        """Return what is to be done, in this order, and forget it."""
        taken = self._effects[:]
        # The registry appends to the same list.
        self._effects.clear()
        return taken

    def get_timer(self) -> float | None:
        """Return when `handle_timer` is to be called, None for never."""
        times = [connection.hello_until for connection in _first(self._silent)]
        if self._away:
            times.append(self._away_until)
        return min(times, default=None)

    def handle_timer(self, now: float) -> None:
        """End what has waited too long."""
        while late := [one for one in _first(self._silent) if one.hello_until <= now]:
            text = f"no HELLO within {self._limits.hello_s:g} s"
            self._close(late[0], CloseCode.ORDER, text)
        if self._away and self._away_until <= now:
            for endpoint in list(self._away.values()):
                self._remove(endpoint, Event.KILLED, "it did not return to its agent", flush=False)

    def restore(
        self, entries: Iterable[Put], is_alive: Callable[[Credentials], bool], now: float
    ) -> None:
        """Bring back what a journal holds; to be called once, before everything else.

        Endpoints of living processes are away for the time of grace, and those of others are told
        as killed.

        Raises:
            RemoteProtocolError: The entries are not what an agent wrote; this core and its switch
                are of no use afterwards.
        """
        self._registry.load(entries)
        self._away_until = now + self._limits.grace_s
        for endpoint in list(self._registry.endpoints.values()):
            self._away[endpoint.id] = endpoint
            if not is_alive(endpoint.credentials):
                reason = "its process ended while the agent was down"
                self._remove(endpoint, Event.KILLED, reason, flush=False)

    def receive_connection(
        self, connection: ConnectionId, credentials: Credentials, now: float
    ) -> None:
        """Somebody has come to the door."""
        made = _Connection(connection, credentials, now + self._limits.hello_s)
        self._connections[connection] = made
        self._silent[connection] = made
        self._connections_of[credentials.uid] += 1
        # Counted here already, so that one user cannot fill the door for all by saying nothing.
        if self._connections_of[credentials.uid] > self._limits.endpoints_per_user:
            text = f"user {credentials.uid} has {self._limits.endpoints_per_user} connections"
            self._close(made, CloseCode.SHARE, f"{text}, which is the limit")

    def receive_packet(self, connection: ConnectionId, data: bytes, now: float) -> None:
        """A packet has come; one that breaks a rule ends its connection, and no other."""
        one = self._connections.get(connection)
        if one is None:
            return
        try:
            self._receive_frame(one, frames.decode(data), now)
        except RemoteProtocolError as error:
            self._close(one, error.code, error.message)

    def receive_end(self, connection: ConnectionId, reason: str = "its process ended") -> None:
        """A connection has ended without CLOSE; harmless if the core has cut it itself."""
        one = self._connections.get(connection)
        if one is not None:
            self._forget(one)
            if one.endpoint is not None:
                self._remove(one.endpoint, Event.KILLED, reason)

    def receive_event(self, number: int, event: str, rule: str) -> None:
        """The switch says that an endpoint must be cut off: "violated" or "too-slow", the rule."""
        endpoint = self._registry.endpoints.get(EndpointId(number))
        if endpoint is None:
            return
        is_violation = event == "violated"
        code = CloseCode.RING if is_violation else CloseCode.EVICTED
        if not is_violation:
            # The ring may have room for this, though not for the message that was too much.
            subject = tuple(endpoint.addresses)
            self._registry.notify([endpoint], Notice(Event.EVICTED, subject, rule))
        connection = self._connections.get(endpoint.connection) if endpoint.connection else None
        if connection is None:
            self._remove(endpoint, Event.KILLED, f"cut off: {rule}", flush=not is_violation)
        else:
            self._close(connection, code, rule)

    def stop(self) -> None:
        """The agent goes down: tell everybody, who may resume when it is back."""
        for connection in list(self._connections.values()):
            self._forget(connection)
            text = "the agent goes down; what it knows is kept for the one that follows"
            self._send(connection.id, Closed(CloseCode.GOING_DOWN, text))
            self._effects.append(Cut(connection.id))

    @property
    def is_empty(self) -> bool:
        """Whether there is no endpoint, so that nobody could resume."""
        return not self._registry.endpoints

    # --- connections ---

    def _send(self, connection: ConnectionId, frame: Frame, fds: tuple[int, ...] = ()) -> None:
        self._effects.append(Send(connection, frame, fds))

    def _forget(self, connection: _Connection) -> None:
        del self._connections[connection.id]
        self._silent.pop(connection.id, None)
        uid = connection.credentials.uid
        self._connections_of[uid] -= 1
        if not self._connections_of[uid]:
            del self._connections_of[uid]

    def _close(self, connection: _Connection, code: CloseCode, text: str) -> None:
        """End a connection with a reason, and its endpoint with it."""
        self._forget(connection)
        self._send(connection.id, Closed(code, text))
        self._effects.append(Cut(connection.id))
        if connection.endpoint is not None:
            # What somebody published who then spoilt its rings is nobody's message.
            flush = code is not CloseCode.RING
            self._remove(connection.endpoint, Event.KILLED, f"cut off: {text}", flush=flush)

    def _remove(self, endpoint: Endpoint, event: Event, reason: str, *, flush: bool = True) -> None:
        self._away.pop(endpoint.id, None)
        self._registry.remove_endpoint(endpoint, event, reason, flush)

    def _receive_frame(self, connection: _Connection, frame: Frame, now: float) -> None:
        if connection.endpoint is None:
            if not isinstance(frame, Hello):
                raise RemoteProtocolError("the first frame is not HELLO", CloseCode.ORDER)
            self._receive_hello(connection, frame)
        elif not isinstance(frame, Call):
            kind = type(frame).__name__.upper()
            raise RemoteProtocolError(f"{kind} from a client that is known", CloseCode.ORDER)
        else:
            self._receive_call(connection, connection.endpoint, frame)

    def _receive_hello(self, connection: _Connection, hello: Hello) -> None:
        limits, uid = self._limits, connection.credentials.uid
        if not is_spoken(hello.version):
            text = f"version {hello.version}; the agent speaks {VERSION}"
            raise RemoteProtocolError(text, CloseCode.VERSION)
        sizes = [1 << (size - 1).bit_length() for size in (hello.tx_bytes, hello.rx_bytes)]
        if max(sizes) > limits.ring_bytes_max:
            text = f"ring of {max(sizes)} bytes, the limit is {limits.ring_bytes_max}"
            raise RemoteProtocolError(text, CloseCode.LIMIT)
        endpoint = self._find_resumed(hello.resume, connection.credentials)
        is_resumed = endpoint is not None
        if endpoint is None:
            if self._registry.endpoints_of[uid] >= limits.endpoints_per_user:
                text = f"user {uid} has {limits.endpoints_per_user} endpoints, which is the limit"
                raise RemoteProtocolError(text, CloseCode.SHARE)
            token = self._draw(TOKEN_BYTES)
            endpoint = self._registry.add_endpoint(token, connection.credentials)
        connection.endpoint = endpoint
        try:
            fds = self._registry.connect(endpoint, connection.id, sizes[0], sizes[1])
        except OSError as error:
            # The endpoint goes with the connection: the agent cannot serve it.
            text = f"no rings: {error.strerror or error}"
            raise RemoteProtocolError(text, CloseCode.LIMIT) from error
        del self._silent[connection.id]
        self._away.pop(endpoint.id, None)
        welcome = Welcome(
            version=min(hello.version, VERSION),
            endpoint=endpoint.id,
            provisional=endpoint.provisional,
            token=endpoint.token,
            epoch=self._about.epoch,
            tx_bytes=sizes[0],
            rx_bytes=sizes[1],
            resumed=is_resumed,
            node=self._about.node,
        )
        self._send(connection.id, welcome, fds)

    def _find_resumed(self, token: bytes | None, credentials: Credentials) -> Endpoint | None:
        """Return the endpoint of a token, if it is away and was this process's."""
        endpoint = None if token is None else self._registry.tokens.get(token)
        if endpoint is None or endpoint.id not in self._away:
            return None
        return endpoint if endpoint.credentials.is_same_process(credentials) else None

    # --- calls ---

    def _receive_call(self, connection: _Connection, endpoint: Endpoint, call: Call) -> None:
        if call.op is Op.CLOSE:
            self._forget(connection)
            self._remove(endpoint, Event.LEFT, "it closed")
            self._send(connection.id, Result(call.serial))
            self._effects.append(Cut(connection.id))
            return
        try:
            result = Result(call.serial, value=self._carry_out(endpoint, call.op, call.args))
        except BusError as error:
            result = Result.refused(call.serial, error)
        self._send(connection.id, result)

    def _carry_out(self, endpoint: Endpoint, op: Op, args: Mapping[str, Any]) -> object:
        match op:
            case Op.ATTACH:
                result = self._attach(endpoint, args["path"])
            case Op.BIND:
                result = self._bind(endpoint, args["address"], args.get("options") or {})
            case Op.CONTROL:
                result = self._control(endpoint, args)
            case Op.OPTION_SET:
                result = self._set_option(endpoint, args["level"], args["name"], args.get("value"))
            case Op.OPTION_GET:
                result = self._get_option(endpoint, args["level"], args["name"])
            case Op.SHUTDOWN:
                result = self._shut_down(endpoint, args["how"])
            case Op.LIST:
                after = args.get("after") or 0
                result = self._listing.answer(endpoint, args["what"], args.get("path"), after)
            case Op.STATUS:
                result = self._get_status()
            case Op.CLOSE:
                raise AssertionError("CLOSE ends the connection, and is not answered here")
        return result

    def _attach(self, endpoint: Endpoint, path: bytes) -> object:
        address = BusAddress.kernel(path)
        if endpoint.bus is not None and endpoint.bus.path != address.path:
            raise NoSuchEndpoint(
                f"endpoint {endpoint.id} is on {escape(endpoint.bus.path)}, and nobody on "
                f"{escape(path)} can be reached from there; open another socket for it"
            )
        bus = endpoint.bus or self._registry.buses.get(address.path)
        if bus is None:
            raise NoBus(f"no bus {escape(path)}: nobody has bound it")
        if endpoint.bus is None:
            self._registry.attach(endpoint, bus)
        master = None if bus.master is None else bus.master_address
        return {"master": master, "width": bus.width, "order": bus.order}

    def _bind(self, endpoint: Endpoint, packed: bytes, options: Mapping[str, Any]) -> object:
        address = _unpacked(packed)
        name = _bindable(address)
        width, order = _bus_options(options)
        if endpoint.bus is not None and endpoint.bus.path != address.path:
            raise InvalidArgument(f"endpoint {endpoint.id} is on {escape(endpoint.bus.path)}")
        if endpoint.is_master:
            raise InvalidArgument(f"endpoint {endpoint.id} has bound {escape(address.path)}")
        bus = self._registry.buses.get(address.path)
        uid = endpoint.credentials.uid
        if bus is None:
            width, order = width or BLOOM_BITS_DEFAULT, order or ORDERS[0]
            key = self._draw(BLOOM_KEY_BYTES)
            bus = self._registry.add_bus(address.path, width, order, key, uid, name)
            self._registry.attach(endpoint, bus)
            self._registry.own(endpoint, name)
            self._registry.set_master(bus, endpoint, name)
        else:
            self._take_over(bus, endpoint, address, width, order)
        return {"width": bus.width, "order": bus.order, "members": len(bus.members) - 1}

    def _take_over(
        self,
        bus: Bus,
        endpoint: Endpoint,
        address: BusAddress,
        width: int | None,
        order: str | None,
    ) -> None:
        """Make an endpoint the master of a bus whose master is gone (D16)."""
        path, uid = escape(bus.path), endpoint.credentials.uid
        if bus.master is not None:
            raise AddressInUse(f"{path} is bound: endpoint {bus.master.id} is its master")
        if uid != bus.master_uid:
            raise AddressInUse(
                f"{path} is another user's, {bus.master_uid}: it has no master now, but "
                f"{len(bus.endpoints)} endpoints wait for one of that user"
            )
        if (width or bus.width, order or bus.order) != (bus.width, bus.order):
            raise InvalidArgument(
                f"{path} has {bus.width} bits and order {bus.order} while it has endpoints"
            )
        name = address.address
        draft = Draft(bus, endpoint, 0, lambda: self._registry.choose_address(bus))
        if name not in endpoint.addresses:
            draft.check(OwnedAddr(address))
        if endpoint.bus is None:
            self._registry.attach(endpoint, bus)
        if name not in endpoint.addresses:
            self._registry.own(endpoint, name)
        self._registry.set_master(bus, endpoint, name)
        others = [one for one in bus.endpoints.values() if one is not endpoint]
        self._registry.announce(others, Notice(Event.MASTER_BACK, (name,), "a master has bound it"))

    def _control(self, endpoint: Endpoint, args: Mapping[str, Any]) -> object:
        bus = endpoint.bus
        if bus is None or bus.master is not endpoint:
            raise Denied("control items are the master's, and this endpoint is not its bus's")
        if endpoint.is_silent:
            raise ShutDown("the socket was shut down for sending")
        src = args.get("src") or bus.master_address
        if src not in endpoint.addresses:
            raise NotOwned(f"the source {format_within(src)} is not the sender's")
        serial, reply_to, deadline_ms = _numbers(args)
        dst = args["dst"].rstrip(b"\0")
        if not dst:
            raise BadDestination("nobody can send to the kernel's address")
        target = _find_target(bus, dst)
        uid = target.credentials.uid
        left = self._limits.matches_per_user - self._registry.matches_of[uid]
        draft = Draft(bus, target, left, lambda: self._registry.choose_address(bus))
        asked = _decoded(args["items"])
        commands, changes = [], []
        for command in map(draft.fill, asked):
            commands.append(command)
            if draft.check(command):
                changes.append(command)
        chosen = [
            command.address.address
            for was, command in zip(asked, commands, strict=True)
            if was is not command and isinstance(command, OwnedAddr)
        ]
        ctl, body = _packed(_filled(args["items"], asked, commands)), args["body"]
        if len(body) > INLINE_BYTES:
            raise TooBig(f"{len(body)} bytes beside control items, the limit is {INLINE_BYTES}")
        size = RX_HEADER_BYTES + _IDENTITY_ROOM
        size += sum(padded(len(part)) for part in (src, dst, ctl, body))
        if target.rx_bytes and size > target.rx_bytes:
            raise TooBig(f"{size} bytes with control items, for a ring of {target.rx_bytes}")
        if any(isinstance(one, RevokeAddr | RevokeMatch | RevokeSend) for one in changes):
            # What it sent while it still might is accepted (D15).
            self._switch.flush(target.id)
        had = target.flags
        apply(self._registry, target, changes)
        if GrantFlags.MONITOR in target.flags ^ had:
            verb = "sees" if GrantFlags.MONITOR in target.flags else "no longer sees"
            who = target.credentials
            self._effects.append(
                Audit(
                    f"endpoint {target.id} (pid {who.pid}, uid {who.uid}) {verb} "
                    f"all messages of {escape(bus.path)}"
                )
            )
        self._effects.append(
            Deliver(endpoint.id, target.id, src, dst, ctl, body, serial, reply_to, deadline_ms)
        )
        return {"owned": chosen}

    # --- options, status ---

    def _set_option(self, endpoint: Endpoint, level: int, name: int, value: object) -> object:
        match level, name, value:
            case (int(), int(), 0 | 1) if (level, name) == (SOL_SOCKET, SO_PASSCRED):
                self._registry.set_identity(endpoint, value == 1)
            case (int(), int(), None | bytes()) if (level, name) == (BUS_SOCKET, SO_BUS_FILTER):
                self._set_filter(endpoint, value)
            case _:
                raise InvalidArgument(f"option {name} of level {level:#x} with value {value!a:.99}")
        return None

    def _set_filter(self, endpoint: Endpoint, program: bytes | None) -> None:
        if program is not None and len(program) > FILTER_INSTRUCTIONS * FILTER_INSTRUCTION_BYTES:
            raise InvalidArgument(
                f"filter of {len(program)} bytes, the limit is {FILTER_INSTRUCTIONS} instructions "
                f"of {FILTER_INSTRUCTION_BYTES} bytes"
            )
        try:
            self._registry.set_filter(endpoint, program)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    def _get_option(self, endpoint: Endpoint, level: int, name: int) -> object:
        if (level, name) == (SOL_SOCKET, SO_PASSCRED):
            return int(endpoint.wants_identity)
        bus = endpoint.bus
        if level == BUS_SOCKET:
            if name == SO_BUS_ADDRESSES:
                return [
                    BusAddress(bus.path, address).pack()
                    for address in endpoint.addresses
                    if bus is not None
                ]
            if name == SO_BUS_STATE:
                return self._get_state(endpoint)
            if name == SO_BUS_MASTER:
                if bus is None or bus.master is None:
                    return None
                return BusAddress(bus.path, bus.master_address).pack()
            if name == SO_BUS_STATS:
                return self._switch.stats(endpoint.id)
        raise InvalidArgument(f"option {name} of level {level:#x} cannot be read")

    def _get_state(self, endpoint: Endpoint) -> object:
        """Return the state that an endpoint can read (D16)."""
        bus = endpoint.bus
        master = "none" if bus is None else "lost" if bus.master is None else "here"
        return {
            "agent": "here",
            "epoch": self._about.epoch,
            "node": self._about.node,
            "endpoint": endpoint.id,
            "path": None if bus is None else escape(bus.path),
            "master": master,
            "is_master": endpoint.is_master,
            "is_member": bool(endpoint.addresses),
            "is_silent": endpoint.is_silent,
            "grants": [str(flag.name) for flag in GrantFlags if flag in endpoint.flags],
        }

    def _shut_down(self, endpoint: Endpoint, how: int) -> object:
        if how not in (SHUT_RD, SHUT_WR, SHUT_RDWR):
            raise InvalidArgument(f"shutdown {how}")
        if how != SHUT_RD:
            self._registry.silence(endpoint)
        return None

    def _get_status(self) -> object:
        about, registry = self._about, self._registry
        return {
            "version": about.version,
            "protocol": VERSION,
            "epoch": about.epoch,
            "node": about.node,
            "pid": about.pid,
            "uid": about.uid,
            "started": about.started_utc,
            "buses": len(registry.buses),
            "endpoints": len(registry.endpoints),
            "away": len(self._away),
            "connections": len(self._connections),
            "matches": registry.matches_of.total(),
        }


def _first(connections: Mapping[ConnectionId, _Connection]) -> list[_Connection]:
    """Return the connection whose time runs out next, alone, or nothing."""
    return [connections[key] for key in list(connections)[:1]]


def _unpacked(packed: bytes) -> BusAddress:
    try:
        return BusAddress.unpack(packed)
    except RemoteProtocolError as error:
        raise InvalidArgument(error.message) from error


def _bindable(address: BusAddress) -> bytes:
    """Return the address within the bus at which its master will be."""
    if address.is_kernel:
        raise NotOwned("nobody can own the kernel's address; a master needs one of its own")
    if address.is_multicast:
        raise InvalidArgument(f"{address} is a multicast address; a master needs one of its own")
    if address.is_provisional:
        raise NotOwned(f"nobody can own {address}: the agent gives such addresses")
    return address.address


def _bus_options(options: Mapping[str, Any]) -> tuple[int | None, str | None]:
    for key in options.keys() - {"width", "order"}:
        raise InvalidArgument(f"a bus has no option {key!a}; there are width and order")
    width, order = options.get("width"), options.get("order")
    if width is not None and (type(width) is not int or width not in BLOOM_BITS):
        raise InvalidArgument(f"width {width!a}, not one of {BLOOM_BITS}")
    if order is not None and order not in ORDERS:
        raise InvalidArgument(f"order {order!a}, not one of {ORDERS}")
    return width, order


def _numbers(args: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return serial, reply_to and deadline of a message; 0 for none."""
    serial, reply_to = args.get("serial") or 0, args.get("reply_to") or 0
    deadline_ms = args.get("deadline_ms") or 0
    for number in (serial, reply_to):
        if not 0 <= number <= U64_MAX:
            raise InvalidArgument(f"serial {number}")
    if not 0 <= deadline_ms <= DEADLINE_MS_MAX:
        raise InvalidArgument(f"deadline of {deadline_ms} ms, the limit is {DEADLINE_MS_MAX}")
    if deadline_ms and not serial:
        raise InvalidArgument("a deadline needs a serial that the reply can name")
    return serial, reply_to, deadline_ms


def _find_target(bus: Bus, dst: bytes) -> Endpoint:
    target = bus.owners.get(dst)
    if is_provisional(dst) and dst[1:].isdigit():
        target = bus.endpoints.get(EndpointId(int(dst[1:21])))
    if target is None or dst not in (target.provisional, *target.addresses):
        raise NoSuchEndpoint(f"nobody on {escape(bus.path)} is {format_within(dst)}")
    return target


def _decoded(items: Iterable[tuple[int, bytes]]) -> list[Command]:
    commands = []
    for place, (type_, data) in enumerate(items, 1):
        try:
            item = control.decode(BUS_SOCKET, type_, data)
        except RemoteProtocolError as error:
            raise InvalidArgument(f"item {place}: {error.message}") from error
        if not isinstance(item, COMMANDS):
            raise InvalidArgument(f"item {place}: {type(item).__name__} is no command of a master")
        commands.append(item)
    return commands


def _filled(
    items: Sequence[tuple[int, bytes]], asked: Sequence[Command], commands: Sequence[Command]
) -> Iterator[tuple[int, bytes]]:
    """Return control items, those of which something was chosen anew."""
    for item, was, command in zip(items, asked, commands, strict=True):
        yield item if was is command else control.encode(command)[1:]


def _packed(items: Iterable[tuple[int, bytes]]) -> bytes:
    """Return control items as they stand in an RX record."""
    return b"".join(
        _ITEM.pack(type_, 0, len(data)) + data.ljust(padded(len(data)), b"\0")
        for type_, data in items
    )
