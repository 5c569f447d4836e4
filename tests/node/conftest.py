"""What the tests of the agent share: a switch of a few lines, and clients without a door."""

from __future__ import annotations

import struct
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from afbus.node.core import About, Core, Limits
from afbus.node.effect import (
    Audit,
    ConnectionId,
    Cut,
    Deliver,
    Drop,
    Effect,
    Kind,
    Notify,
    Put,
    Send,
)
from afbus.node.endpoint import Credentials
from afbus.node.registry import forms_of
from afbus.proto import control, frames
from afbus.proto.address import BusAddress
from afbus.proto.frames import Call, Closed, Hello, Op, Result, Welcome
from afbus.proto.match import what_of
from afbus.proto.notice import Notice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from afbus.proto.control import Item
    from afbus.proto.errors import CloseCode
    from afbus.proto.frames import Frame

PATH = b"/tmp/test"
MASTER = b"org.example.bus"


class _FakeSwitch:
    """Notes what it is told, in order, and keeps who owns what."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.buses: dict[int, dict[bytes, int]] = {}
        self.bus_of: dict[int, int] = {}
        self.inbox: dict[int, list[Any]] = defaultdict(list)
        #: The control items that were delivered.
        self.items: dict[int, list[Item]] = defaultdict(list)
        self.unread: list[tuple[int, int, int, int]] = []
        self.received: dict[int, int] = defaultdict(int)
        self.matches: dict[int, tuple[Any, ...]] = {}
        self.connect_error: OSError | None = None

    def add_bus(self, bus: int, width: int, key: bytes, number: int | None = None) -> None:
        assert bus not in self.buses
        assert number is None, "this host is in no cluster"
        assert len(key) == 16
        self.buses[bus] = {}
        self.calls.append(("add_bus", bus, width))

    def allow_lanes(self, bus: int) -> None:
        assert bus in self.buses

    def remove_bus(self, bus: int) -> None:
        assert bus not in self.bus_of.values()
        del self.buses[bus]
        self.calls.append(("remove_bus", bus))

    def set_master(self, bus: int, endpoint: int | None) -> None:
        assert endpoint is None or self.bus_of[endpoint] == bus
        self.calls.append(("set_master", bus, endpoint))

    def add_endpoint(
        self, endpoint: int, principal: int, pid: int, uid: int, gid: int, ident: bytes
    ) -> None:
        assert endpoint not in self.bus_of
        assert control.Identity.decode(ident).pid == pid
        self.bus_of[endpoint] = 0

    def set_namespaces(self, endpoint: int, has_other_pids: bool, has_other_users: bool) -> None:
        self.calls.append(("set_namespaces", endpoint, has_other_pids, has_other_users))

    def identify(self, endpoint: int, ident: bytes) -> None:
        raise AssertionError("this host is in no cluster")

    def connect(self, endpoint: int, tx_bytes: int, rx_bytes: int) -> tuple[int, int, int]:
        if self.connect_error is not None:
            raise self.connect_error
        self.calls.append(("connect", endpoint, tx_bytes, rx_bytes))
        return (1001, 1002, 1003)

    def remove_endpoint(self, endpoint: int, flush: bool) -> list[tuple[int, int, int, int]]:
        bus = self.buses.get(self.bus_of.pop(endpoint), {})
        for address in [key for key, owner in bus.items() if owner == endpoint]:
            del bus[address]
        self.matches = {key: one for key, one in self.matches.items() if one[0] != endpoint}
        self.calls.append(("remove_endpoint", endpoint, flush))
        unread, self.unread = self.unread, []
        return unread

    def flush(self, endpoint: int) -> None:
        assert endpoint in self.bus_of
        self.calls.append(("flush", endpoint))

    def attach(self, endpoint: int, bus: int, provisional: bytes | None = None) -> None:
        assert provisional is None, "this host is in no cluster"
        assert bus in self.buses
        self.bus_of[endpoint] = bus

    def own(self, endpoint: int, address: bytes) -> bool:
        self.calls.append(("own", endpoint, address))
        return self.buses[self.bus_of[endpoint]].setdefault(address, endpoint) == endpoint

    def disown(self, endpoint: int, address: bytes) -> bool:
        self.calls.append(("disown", endpoint, address))
        bus = self.buses[self.bus_of[endpoint]]
        return bus.pop(address, None) == endpoint

    def subscribe(
        self,
        endpoint: int,
        match: int,
        terms: bytes | None,
        bits: bytes | None,
        overflow: int,
        deadline_ms: int,
    ) -> None:
        assert match not in self.matches
        self.matches[match] = (endpoint, "receive", terms, bits, overflow, deadline_ms)

    def subscribe_all(self, endpoint: int, matches: Sequence[tuple[int, bytes, int, int]]) -> None:
        for number, form, overflow, deadline_ms in matches:
            self.subscribe(endpoint, number, *forms_of(what_of(form)), overflow, deadline_ms)

    def unsubscribe(self, endpoint: int, match: int) -> bool:
        return bool(self.matches.pop(match)[0] == endpoint)

    def allow_send(
        self, endpoint: int, grant: int, terms: bytes | None, bits: bytes | None
    ) -> None:
        assert grant not in self.matches
        self.matches[grant] = (endpoint, "send", terms, bits)

    def forbid_send(self, endpoint: int, grant: int) -> bool:
        return bool(self.matches.pop(grant)[0] == endpoint)

    def set_reach(self, endpoint: int, patterns: Sequence[str]) -> None:
        raise AssertionError("this host is in no cluster")

    def set_monitor(self, endpoint: int, on: bool) -> None:
        self.calls.append(("set_monitor", endpoint, on))

    def set_filter(self, endpoint: int, program: bytes | None) -> None:
        if program == b"wrong":
            raise ValueError("instruction 0: no such opcode")
        self.calls.append(("set_filter", endpoint, program))

    def set_ident(self, endpoint: int, on: bool) -> None:
        self.calls.append(("set_ident", endpoint, on))

    def set_silent(self, endpoint: int) -> None:
        self.calls.append(("set_silent", endpoint))

    def notify(self, endpoints: Sequence[int], body: bytes, trunk: int | None = None) -> None:
        assert trunk is None, "this host is in no cluster"
        notice = Notice.decode(body)
        for endpoint in endpoints:
            assert endpoint in self.bus_of
            self.inbox[endpoint].append(notice)
            self.calls.append(("notify", endpoint, notice.event))

    def deliver(
        self,
        source: int,
        target: int,
        src: bytes,
        dst: bytes,
        ctl: bytes,
        body: bytes,
        serial: int,
        reply_to: int,
        deadline_ms: int,
    ) -> None:
        self.items[target] += _unpacked(ctl)
        self.inbox[target].append((src, dst, body, serial, reply_to, deadline_ms))
        self.calls.append(("deliver", source, target, body))

    def give_back(
        self, trunk: int, endpoint: int, source: bytes, range: tuple[int, int], count: int
    ) -> bool:
        raise AssertionError("there is no other node")

    def stats(self, endpoint: int) -> dict[str, int]:
        return {"sent": endpoint, "received": self.received[endpoint], "backlog": 0}

    def lanes(self, endpoint: int) -> list[tuple[list[int], bool, int, int]]:
        return [([1], False, 4096, 3)] * (endpoint - 1)


def _unpacked(ctl: bytes) -> list[Item]:
    """Return the control items of an RX record."""
    items, place = [], 0
    while place < len(ctl):
        kind, zero, size = struct.unpack_from("<HHI", ctl, place)
        assert not zero
        items.append(control.decode(control.BUS_SOCKET, kind, ctl[place + 8 : place + 8 + size]))
        place += 8 + (size + 7) // 8 * 8
    assert place == len(ctl)
    return items


@dataclass
class Client:
    """One connection, and what the agent has said on it."""

    world: World
    connection: ConnectionId
    credentials: Credentials
    frames: list[Frame] = field(default_factory=list)
    is_cut: bool = False
    serial: int = 0

    @property
    def welcome(self) -> Welcome:
        """The answer to HELLO."""
        welcome = next(frame for frame in self.frames if isinstance(frame, Welcome))
        assert isinstance(welcome, Welcome)
        return welcome

    @property
    def number(self) -> int:
        """The number of the endpoint."""
        return self.welcome.endpoint

    @property
    def closed(self) -> CloseCode:
        """Why the agent has ended the connection."""
        assert self.is_cut
        last = self.frames[-1]
        assert isinstance(last, Closed)
        return last.code

    def say(self, frame: Frame) -> None:
        """Send a frame."""
        self.say_bytes(frames.encode(frame))

    def say_bytes(self, data: bytes) -> None:
        """Send a packet."""
        self.world.core.receive_packet(self.connection, data, self.world.now)
        self.world.settle()

    def ask(self, op: Op, **args: Any) -> Result:
        """Call, and return the result."""
        self.serial += 1
        self.say(Call(self.serial, op, args))
        result = self.frames[-1]
        assert isinstance(result, Result)
        assert result.serial == self.serial
        return result

    def call(self, op: Op, **args: Any) -> Any:
        """Call, and return the value; the error of a refusal is raised."""
        result = self.ask(op, **args)
        if not result.is_ok:
            raise result.to_error()
        return result.value

    def bind(
        self, name: bytes = MASTER, path: bytes = PATH, options: dict[str, Any] | None = None
    ) -> Any:
        """Bind a bus."""
        return self.call(Op.BIND, address=BusAddress(path, name).pack(), options=options)

    def control(self, dst: bytes, *items: Item, **args: Any) -> Any:
        """Send items with a message, and return the result."""
        packed = [list(control.encode(item)[1:]) for item in items]
        args = {"src": None, "body": b"", **args}
        return self.call(Op.CONTROL, dst=dst, items=packed, **args)

    def take(self) -> list[Any]:
        """Return what the switch has put into the ring, and forget it."""
        return self.world.switch.inbox.pop(self.number, [])

    def end(self) -> None:
        """The process is gone."""
        self.world.core.receive_end(self.connection)
        self.world.settle()


class World:
    """A core on a fake clock, with a fake switch and a journal in memory."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits
        self.now = 1000.0
        self.epoch = 0
        self.journal: dict[tuple[Kind, int, bytes], bytes] = {}
        self.audits: list[str] = []
        self._ids = count(1)
        self._random = count(1)
        self.start([])

    def limit(self, **limits: int) -> None:
        """Begin anew, with other limits."""
        self.limits = Limits(**limits)
        self.start([])

    def start(
        self, entries: Iterable[Put], is_alive: Callable[[Credentials], bool] = lambda _: True
    ) -> None:
        """Begin an agent, as if the one before had been killed."""
        self.epoch += 1
        self.switch = _FakeSwitch()
        self.clients: dict[ConnectionId, Client] = {}
        about = About("desk", "1.2.3", self.epoch, 42, 1000, "2026-01-01T00:00:00+00:00")
        self.core = Core(self.switch, about, self._draw, self.limits)
        self.core.restore(entries, is_alive, self.now)
        self.settle()

    def restart(self, is_alive: Callable[[Credentials], bool] = lambda _: True) -> None:
        """Begin anew from the journal."""
        self.start([Put(*key, value) for key, value in self.journal.items()], is_alive)

    def _draw(self, size: int) -> bytes:
        return next(self._random).to_bytes(size, "big")

    def settle(self) -> None:
        """Apply effects."""
        for effect in self.core.take_effects():
            self._apply(effect)

    def _apply(self, effect: Effect) -> None:
        match effect:
            case Send(connection, frame):
                frames.encode(frame)
                self.clients[connection].frames.append(frame)
            case Cut(connection):
                self.clients.pop(connection).is_cut = True
            case Put(kind, owner, key, value):
                self.journal[kind, owner, key] = value
            case Drop(kind, owner, None):
                for place in [key for key in self.journal if key[:2] == (kind, owner)]:
                    del self.journal[place]
            case Drop(kind, owner, key):
                assert key is not None
                del self.journal[kind, owner, key]
            case Deliver():
                self.switch.deliver(
                    effect.source,
                    effect.target,
                    effect.src,
                    effect.dst,
                    effect.ctl,
                    effect.body,
                    effect.serial,
                    effect.reply_to,
                    effect.deadline_ms,
                )
            case Notify(endpoints, body):
                self.switch.notify(endpoints, body)
            case Audit(text):
                self.audits.append(text)

    def come(self, uid: int = 1001, pid: int = 7, start_ticks: int = 99) -> Client:
        """Come to the door, and say nothing yet."""
        connection = ConnectionId(next(self._ids))
        client = Client(self, connection, Credentials(pid, uid, uid, start_ticks))
        self.clients[connection] = client
        self.core.receive_connection(connection, client.credentials, self.now)
        self.settle()
        return client

    def connect(self, uid: int = 1001, *, resume: bytes | None = None, **hello: int) -> Client:
        """Come to the door and say HELLO."""
        client = self.come(uid)
        client.say(Hello(resume=resume, **hello))
        return client

    def bound(self, uid: int = 1001) -> Client:
        """Return the master of a new bus."""
        client = self.connect(uid)
        client.bind()
        return client

    def attached(self, uid: int = 1002, path: bytes = PATH) -> Client:
        """Return an endpoint on the bus that has not joined."""
        client = self.connect(uid)
        client.call(Op.ATTACH, path=path)
        return client

    def joined(self, master: Client, address: bytes, uid: int = 1002) -> Client:
        """Return a member."""
        client = self.attached(uid)
        master.control(client.welcome.provisional, self.owned(address))
        client.take()
        master.take()
        return client

    @staticmethod
    def owned(address: bytes, path: bytes = PATH) -> control.OwnedAddr:
        """Return the item that gives an address."""
        return control.OwnedAddr(BusAddress(path, address))

    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        due = self.core.get_timer()
        if due is not None and due <= self.now:
            self.core.handle_timer(self.now)
        self.settle()


@pytest.fixture
def world() -> World:
    """A fresh agent."""
    return World()
