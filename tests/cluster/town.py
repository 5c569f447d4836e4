"""A cluster in one process: the real master and agents without IO, real switches, memory between.

    Town -- master core
         -- House (node): agent core, switch, uplink, peers  -- Client: door calls and real rings

Links between nodes are those of `link/memory.py`, on its clock; what nodes and master say to each
other arrives at once, unless the line is cut. Switches have threads of their own, so a test waits
for what it expects (`until`), with a deadline on the real clock.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from datetime import UTC, datetime
from random import Random
from typing import TYPE_CHECKING, Any, Final

from tests.link.authority import Signer, node

from afbus._datapath import EXPECT_REPLY, TERMS, UNICAST, Rings, Switch
from afbus.link.carrier import Member
from afbus.link.identity import Identity, Role
from afbus.link.memory import MemoryNetwork
from afbus.master import effect as said
from afbus.master.core import Core as MasterCore
from afbus.master.issuer import Leaf
from afbus.master.policy import parse_policy
from afbus.node.core import About, Core
from afbus.node.effect import Audit, ConnectionId, Cut, Deliver, Drop, Notify, Put, Send, Signal
from afbus.node.endpoint import Credentials
from afbus.node.peers import Peers
from afbus.node.uplink import Uplink
from afbus.node.uplink_effect import Hang, Say
from afbus.proto import control, frames
from afbus.proto.address import BusAddress
from afbus.proto.frames import Call, Closed, Hello, Op, Result, Welcome
from afbus.proto.notice import Notice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from afbus.link.link import Link, Sink
    from afbus.proto.control import Item
    from afbus.proto.errors import BusError
    from afbus.proto.terms import Terms

from tests.master.world import EVERYTHING, NOW_UTC, make_issuer

#: The longest that a test waits for what must happen at once, in real seconds.
LIMIT_S: Final = 20.0
PATH: Final = b"/city"
MASTER: Final = b"town.hall"

_ROOT = Signer.root()
_CREDENTIALS: dict[str, Any] = {}


def _credentials(name: str) -> Any:
    if name not in _CREDENTIALS:
        _CREDENTIALS[name] = _ROOT.issue(node(name))
    return _CREDENTIALS[name]


class Town:
    """The cluster."""

    def __init__(self, names: Sequence[str] = ("alpha", "beta", "gamma"), seed: int = 0) -> None:
        self.network = MemoryNetwork(seed)
        self.random = Random(seed)
        self.disk: dict[bytes, bytes] = {}
        self.policy = EVERYTHING
        self._links = 0
        self.lines: dict[said.LinkId, House] = {}
        self.master: MasterCore | None = None
        self.start_master()
        self.houses: dict[str, House] = {}
        for name in names:
            self.start(name)
        self.until(lambda: all(house.uplink.is_here for house in self.houses.values()))
        self.settle()

    def start(self, name: str) -> House:
        """Begin another life of a node."""
        made = self.houses[name] = House(self, name)
        self.settle()
        return made

    def start_master(self) -> None:
        """Begin another life of the master."""
        self.master = MasterCore(
            make_issuer(),
            parse_policy(self.policy),
            self.random.randbytes,
            lambda: NOW_UTC + self.network.time,
            self.disk.items(),
            self.network.time,
        )

    def kill_master(self) -> None:
        """End the master without a word; its disk stays."""
        self.master = None
        for house in list(self.lines.values()):
            house.lose_line()

    def close(self) -> None:
        """Stop all switches."""
        for house in self.houses.values():
            house.close()

    # --- time ---

    def settle(self) -> bool:
        """Let everybody do what is to be done now; return whether anybody did anything."""
        is_busy = False
        for _ in range(1000):
            moved = [house.settle() for house in self.houses.values()]
            if self._settle_master() or any(moved):
                is_busy = True
            else:
                break
        return is_busy

    def _settle_master(self) -> bool:
        if self.master is None:
            return False
        effects = self.master.take_effects()
        for effect in effects:
            match effect:
                case said.Write(rows):
                    for key, value in rows:
                        if value is None:
                            self.disk.pop(key, None)
                        else:
                            self.disk[key] = value
                case said.Send(link, data) if link in self.lines:
                    self.lines[link].heard.append(data)
                case said.Cut(link) if link in self.lines:
                    self.lines[link].lose_line()
                case _:
                    pass
        return bool(effects)

    def run_for(self, seconds: float) -> None:
        """Let time pass for links, agents and master."""
        until = self.network.time + seconds
        while self.network.time < until:
            self.network.run_until(min(until, self.network.time + 0.05))
            now = self.network.time
            if self.master is not None:
                self.master.handle_timer(now)
            for house in self.houses.values():
                house.core.handle_timer(now)
                house.uplink.handle_timer(now)
            self.settle()

    def until(self, is_so: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
        """Let time pass until something is so."""
        end = time.monotonic() + limit_s
        while not is_so():
            assert time.monotonic() < end, "it does not come about"
            self.run_for(0.05)
            # The switches have threads of their own.
            select.select([house.switch for house in self.houses.values()], [], [], 0.001)

    # --- what nodes ask of the master ---

    def new_line(self, house: House) -> said.LinkId | None:
        """Give a node a link to the master, if it is there."""
        if self.master is None or house.is_cut_off:
            return None
        self._links += 1
        link = said.LinkId(self._links)
        self.lines[link] = house
        identity = Identity("test", Role.NODE, house.name)
        number = list(self.houses).index(house.name) if house.name in self.houses else 99
        leaf = Leaf(1000 + number, NOW_UTC + 86_400, house.name.encode().ljust(32))
        self.master.receive_link(link, identity, leaf, house.boot, self.network.time)
        return link

    def cut(self, one: str, other: str) -> None:
        """Let nothing pass between two nodes."""
        self.network.cut(one, other)
        self.network.cut(other, one)

    def heal(self, one: str, other: str) -> None:
        """Let everything pass again."""
        self.network.heal(one, other)
        self.network.heal(other, one)


class House:
    """One life of one node."""

    def __init__(self, town: Town, name: str) -> None:
        self.town, self.name = town, name
        self.boot = town.random.randbytes(16)
        self.is_cut_off = False
        self.heard: deque[bytes] = deque()
        self.line: said.LinkId | None = None
        self.clients: dict[ConnectionId, Client] = {}
        self.switch = Switch()
        about = About(name, "0", 1, os.getpid(), 0, "now")
        self.core = Core(self.switch, about, town.random.randbytes)
        self.uplink = Uplink(name, (name,), lambda: b"csr", town.network.time)
        self.federation = self.core.join_cluster(
            self.switch, self.uplink, lambda: town.network.time
        )
        utc = datetime.fromtimestamp(NOW_UTC, UTC)
        member = Member(_credentials(name), _ROOT.authority(), self.boot, self._accept, lambda: utc)
        self.carrier = town.network.add(name, member)
        self.peers = self.federation.peers = Peers(
            self.carrier,
            node(name),
            self.switch,
            self.federation,
            town.random,
            town.random.randbytes,
            lambda place: place,
        )

    def _accept(self, link: Link) -> Sink:
        return self.peers.accept(link)

    def close(self) -> None:
        """Stop the switch."""
        self.switch.close()

    def kill(self) -> None:
        """End without a word."""
        self.lose_line()
        self.carrier.kill()
        self.switch.close()
        del self.town.houses[self.name]

    def lose_line(self) -> None:
        """The link to the master has ended, for both."""
        if self.line is None:
            return
        link, self.line = self.line, None
        self.town.lines.pop(link, None)
        self.heard.clear()
        if self.town.master is not None:
            self.town.master.receive_end(link, self.town.network.time)
        self.uplink.receive_end(self.town.network.time)

    def settle(self) -> bool:
        """Do what is to be done now; return whether there was anything."""
        now = self.town.network.time
        is_busy = False
        if self.line is None:
            self.line = self.town.new_line(self)
            if self.line is not None:
                self.uplink.receive_link(now)
        while self.heard:
            is_busy = True
            self.uplink.receive_frame(self.heard.popleft(), now)
            self._settle_uplink(now)
        for event in self.switch.take_lane_events():
            is_busy = True
            self.federation.receive_lane(event)
        for number, what, rule in self.switch.take_events():
            is_busy = True
            self.core.receive_event(number, what, rule)
        is_busy |= self._settle_uplink(now)
        return self._settle_core() or is_busy

    def _settle_uplink(self, now: float) -> bool:
        effects = self.uplink.take_effects()
        for effect in effects:
            match effect:
                case Say(data):
                    if self.line is not None and self.town.master is not None:
                        self.town.master.receive_frame(self.line, data, now)
                case Hang():
                    self.lose_line()
                case _:
                    self.federation.receive_uplink(effect)
        return bool(effects)

    def _settle_core(self) -> bool:
        effects = self.core.take_effects()
        for effect in effects:
            match effect:
                case Send(connection, frame, fds):
                    self.clients[connection].hear(frame, fds)
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
                case Notify():
                    self.switch.notify(effect.endpoints, effect.body)
                case Signal(trunk, data):
                    self.switch.signal(trunk, data)
                case Cut() | Put() | Drop() | Audit():
                    pass
        return bool(effects)

    def client(self, uid: int = 1000) -> Client:
        """Return a client that has said HELLO."""
        made = Client(self, ConnectionId(len(self.clients) + 1), uid)
        self.town.until(lambda: made.welcome is not None)
        return made


class Client:
    """An endpoint: calls at the door of its agent, and rings."""

    def __init__(self, house: House, connection: ConnectionId, uid: int) -> None:
        self.house, self.connection = house, connection
        house.clients[connection] = self
        self.welcome: Welcome | None = None
        self.rings: Rings
        self.results: dict[int, Result] = {}
        self.closed: Closed | None = None
        self.serial = 0
        #: The unique address that it was given, by whoever lets it join.
        self.address = b""
        credentials = Credentials(os.getpid(), uid, uid, 1)
        now = house.town.network.time
        house.core.receive_connection(connection, credentials, now)
        self._say(Hello())

    def _say(self, frame: frames.Frame) -> None:
        self.house.core.receive_packet(
            self.connection, frames.encode(frame), self.house.town.network.time
        )

    def hear(self, frame: frames.Frame, fds: Sequence[int]) -> None:
        """Take a frame of the agent."""
        match frame:
            case Welcome():
                self.welcome = frame
                # The rings take the first two, and the line for themselves.
                tx, rx, line = fds
                self.rings = Rings(tx, rx, line, lambda source, _: source, lambda dst, _: dst)
                for fd in fds[:2]:
                    os.close(fd)
            case Result():
                self.results[frame.serial] = frame
            case Closed():
                self.closed = frame
            case _:
                raise AssertionError(frame)

    def start(self, op: Op, **args: Any) -> int:
        """Call, and do not wait; return the serial."""
        self.serial += 1
        self._say(Call(self.serial, op, args))
        self.house.town.settle()
        return self.serial

    def call(self, op: Op, **args: Any) -> Any:
        """Call, and return the value; raise the refusal."""
        serial = self.start(op, **args)
        self.house.town.until(lambda: serial in self.results)
        result = self.results.pop(serial)
        if not result.is_ok:
            raise result.to_error()
        return result.value

    def refused(self, op: Op, **args: Any) -> BusError:
        """Call, and return the refusal."""
        serial = self.start(op, **args)
        self.house.town.until(lambda: serial in self.results)
        result = self.results.pop(serial)
        assert not result.is_ok, result
        return result.to_error()

    def end(self) -> None:
        """The process is gone."""
        self.house.core.receive_end(self.connection)
        self.house.town.settle()

    # --- the bus ---

    def bind(self, name: bytes = MASTER, path: bytes = PATH) -> None:
        """Be the master of a bus of the cluster."""
        address = BusAddress(path, name).pack()
        self.call(Op.BIND, address=address, options={"scope": "cluster"})

    def attach(self, path: bytes = PATH) -> Any:
        """Come onto a bus."""
        return self.call(Op.ATTACH, path=path)

    def grant(self, dst: bytes, *items: Item, body: bytes = b"yes") -> Any:
        """Send control items, as the master; return what was chosen."""
        packed = [list(control.encode(item)[1:]) for item in items]
        return self.call(Op.CONTROL, dst=dst, items=packed, body=body)["owned"]

    def send(self, dst: bytes, body: bytes, **more: Any) -> int:
        """Send a unicast; return 0 or a negative errno."""
        return self._send(UNICAST, dst, body, **more)

    def publish(self, terms: Terms, body: bytes, **more: Any) -> int:
        """Send a multicast; return 0 or a negative errno."""
        return self._send(TERMS, terms.pack(), body, **more)

    def _send(self, kind: int, dst: bytes, body: bytes, serial: int = 0, reply_to: int = 0) -> int:
        flags = EXPECT_REPLY if serial else 0
        deadline_ms = 10_000 if serial else 0
        return self.rings.send(
            kind, dst, b"", [body], [], flags, serial, reply_to, deadline_ms, 0.0
        )

    def take(self) -> list[Any]:
        """Return the messages that are there: body, items, flags, source."""
        got = self.rings.recv(100, 1 << 20, 1 << 16, False, 0.0)
        return [] if isinstance(got, int) else got

    def wait(self, count: int = 1) -> list[Any]:
        """Return so many messages."""
        got: list[Any] = []

        def is_enough() -> bool:
            got.extend(self.take())
            return len(got) >= count

        self.house.town.until(is_enough)
        return got

    def letters(self, count: int = 1) -> list[tuple[bytes, bytes]]:
        """Return body and source of so many messages, notices left out."""
        got: list[tuple[bytes, bytes]] = []

        def is_enough() -> bool:
            got.extend((body, source) for body, _, _, source in self.take() if source)
            return len(got) >= count

        self.house.town.until(is_enough)
        return got

    def texts(self, count: int = 1) -> list[bytes]:
        """Return the bodies of so many messages, notices left out."""
        return [body for body, _ in self.letters(count)]

    def notice(self) -> Notice:
        """Return the next notice, whatever comes before it."""
        got: list[Notice] = []

        def is_there() -> bool:
            got.extend(Notice.decode(one[0]) for one in self.take() if one[3] == b"" and one[0])
            return bool(got)

        self.house.town.until(is_there)
        return got[0]
