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

from collections import Counter, deque
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..proto import frames
from ..proto.errors import BusError, CloseCode, InvalidArgument, RemoteProtocolError
from ..proto.frames import Call, Closed, Hello, Op, Result, Welcome
from ..proto.limits import RING_BYTES_MAX, TOKEN_BYTES
from ..proto.notice import Event, Notice
from ..proto.record import split_unique
from ..proto.version import VERSION, is_spoken
from .attachment import Attachment
from .control import Control
from .effect import Cut, Effect, Send
from .elsewhere import Elsewhere
from .endpoint import Credentials, Endpoint, EndpointId
from .federation import Federation
from .listing import Listing
from .option import Options
from .registry import Registry
from .steps import Tickets
from .unread import tell_unread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ..proto.frames import Frame
    from .effect import ConnectionId, Put
    from .port import ClusterPort, SwitchPort
    from .uplink import Uplink

#: Endpoints of one user: what a busy session has, several times over.
ENDPOINTS_PER_USER: Final = 4096
#: Matches and grants to send of one user, over all buses: 100,000 on one bus, and some more.
MATCHES_PER_USER: Final = 131_072
#: Calls of one connection that may wait behind one that others must be asked about.
CALLS_WAITING: Final = 64
#: How long an endpoint may be away after the agent began anew.
GRACE_S: Final = 5.0
#: How long a connection may be silent before its HELLO.
HELLO_S: Final = 5.0


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
    #: Whether a call of it is under way that takes several steps; then later ones wait.
    is_busy: bool = False
    waiting: deque[Call] = field(default_factory=deque)


class Core:
    """The agent's decisions."""

    def __init__(
        self,
        switch: SwitchPort,
        about: About,
        draw: Callable[[int], bytes],
        limits: Limits | None = None,
        *,
        has_lanes: bool = True,
    ) -> None:
        """Begin without endpoints.

        Args:
            switch: An empty switch; nobody else may change it.
            about: Who the agent is.
            draw: Returns so many secret random bytes.
            limits: By default those above.
            has_lanes: Whether endpoints may send to each other without the switch (D11).
        """
        self._switch = switch
        self._about = about
        self._draw = draw
        self._limits = limits or Limits()
        self._effects: list[Effect] = []
        self._tickets = Tickets()
        self._registry = Registry(switch, about.node, self._effects, has_lanes=has_lanes)
        self._attachment = Attachment(self._registry, draw)
        self._control = Control(
            self._registry, switch, self._effects, self._limits.matches_per_user
        )
        self._options = Options(self._registry, switch, about.node, about.epoch)
        self._listing = Listing(self._registry, switch, about.uid)
        self._connections: dict[ConnectionId, _Connection] = {}
        self._connections_of: Counter[int] = Counter()
        # Those without HELLO, in the order in which their time runs out.
        self._silent: dict[ConnectionId, _Connection] = {}
        # Endpoints that were restored and have not come back; one time for them all.
        self._away: dict[int, Endpoint] = {}
        self._away_until = 0.0
        #: Returns what people want to know of the cluster, JSON-able; None in no cluster.
        self.describe_cluster: Callable[[], dict[str, Any]] | None = None

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

    def receive_unread(self, sender: int, receiver: int, numbers: tuple[int, int, int]) -> None:
        """The switch says that a lane could not be read: first, last, how many messages (D20)."""
        endpoints = self._registry.endpoints
        one, other = endpoints.get(EndpointId(sender)), endpoints.get(EndpointId(receiver))
        if one is not None and other is not None:
            reason = "it could not read what was sent to it without the agent"
            self._registry.tell_unread(other, one, numbers, reason)

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

    def join_cluster(
        self, port: ClusterPort, uplink: Uplink, clock: Callable[[], float]
    ) -> Federation:
        """Be a node of a cluster from now on; to be called once, behind `restore`.

        The caller sets `peers` of what is returned, and then calls its `restore`.
        """
        made = Federation(
            self._registry,
            self._control,
            self._tickets,
            self._effects,
            port,
            uplink,
            self._about.node,
            clock,
        )
        made.evict = self._evict
        self._listing.join(Elsewhere(uplink, self._about.node))
        self._registry.cluster = self._control.cluster = self._attachment.cluster = made
        return made

    @property
    def blocks(self) -> set[int]:
        """The blocks of which endpoints have addresses on buses of the cluster."""
        return {
            unique[0]
            for bus in self._registry.buses.values()
            if bus.cluster
            for address in bus.owners
            if (unique := split_unique(address)) is not None
        }

    # --- connections ---

    def _evict(self, endpoint: Endpoint, reason: str) -> None:
        """The cluster does not want an endpoint any more."""
        self._registry.notify([endpoint], Notice(Event.EVICTED, tuple(endpoint.addresses), reason))
        connection = self._connections.get(endpoint.connection) if endpoint.connection else None
        if connection is None:
            self._remove(endpoint, Event.KILLED, f"cut off: {reason}")
        else:
            self._close(connection, CloseCode.EVICTED, reason)

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
            who = connection.credentials
            fds = self._registry.connect(endpoint, connection.id, who, sizes[0], sizes[1])
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
        if connection.is_busy:
            if len(connection.waiting) >= CALLS_WAITING:
                text = f"{CALLS_WAITING} calls behind one that is not answered yet"
                raise RemoteProtocolError(text, CloseCode.LIMIT)
            connection.waiting.append(call)
            return
        try:
            outcome = self._carry_out(endpoint, call.op, call.args)
        except BusError as error:
            outcome = error
        if isinstance(outcome, Generator):
            connection.is_busy = True
            done = partial(self._finish, connection.id, call.serial)
            self._tickets.run(outcome, done)
        else:
            self._answer(connection, call.serial, outcome)

    def _answer(self, connection: _Connection, serial: int, outcome: object) -> None:
        if isinstance(outcome, BusError):
            self._send(connection.id, Result.refused(serial, outcome))
        else:
            self._send(connection.id, Result(serial, value=outcome))

    def _finish(self, number: ConnectionId, serial: int, outcome: object) -> None:
        """A call that took several steps is over: go on with those behind it."""
        connection = self._connections.get(number)
        if connection is None:
            return
        self._answer(connection, serial, outcome)
        connection.is_busy = False
        while connection.waiting and not connection.is_busy and connection.endpoint is not None:
            self._receive_call(connection, connection.endpoint, connection.waiting.popleft())

    def _carry_out(self, endpoint: Endpoint, op: Op, args: Mapping[str, Any]) -> object:
        """Return the value of a call, or the steps that lead to it."""
        result: object = None
        match op:
            case Op.ATTACH:
                result = self._attachment.attach(endpoint, args["path"])
            case Op.BIND:
                options = args.get("options") or {}
                result = self._attachment.bind(endpoint, args["address"], options)
            case Op.CONTROL:
                result = self._control.carry_out(endpoint, args)
            case Op.OPTION_SET:
                self._options.set(endpoint, args["level"], args["name"], args.get("value"))
            case Op.OPTION_GET:
                result = self._options.get(endpoint, args["level"], args["name"])
            case Op.SHUTDOWN:
                self._options.shut_down(endpoint, args["how"])
            case Op.LIST:
                after = args.get("after") or 0
                result = self._listing.answer(endpoint, args["what"], args.get("path"), after)
            case Op.STATUS:
                result = self._get_status(endpoint)
            case Op.CHALLENGE:
                result = self._get_federation().challenge(endpoint)
            case Op.PROVE:
                chain, signature = args["chain"], args["signature"]
                result = self._get_federation().prove(endpoint, chain, signature)
            case Op.UNREAD:
                rows, reason = args["messages"], args["reason"]
                tell_unread(self._registry, self._switch, endpoint, rows, reason)
            case Op.CLOSE:
                raise AssertionError("CLOSE ends the connection, and is not answered here")
        return result

    def _get_federation(self) -> Federation:
        if self._registry.cluster is None:
            raise InvalidArgument("this agent is in no cluster that could know certificates")
        return self._registry.cluster

    def _get_status(self, endpoint: Endpoint) -> object:
        who = endpoint.credentials
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
            # Whom the kernel names to the agent: in a container not what the client sees itself.
            "client": {"pid": who.pid, "uid": who.uid, "gid": who.gid},
            "cluster": None if self.describe_cluster is None else self.describe_cluster(),
        }


def _first(connections: Mapping[ConnectionId, _Connection]) -> list[_Connection]:
    """Return the connection whose time runs out next, alone, or nothing."""
    return [connections[key] for key in list(connections)[:1]]
