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

from tests.cluster.client import Client
from tests.cluster.post import Post, PostBox
from tests.link.authority import Signer, node
from tests.master.world import EVERYTHING, NOW_UTC, make_issuer

from afbus._datapath import Switch
from afbus.link.carrier import Member
from afbus.link.identity import Identity, Role
from afbus.link.memory import MemoryNetwork
from afbus.master import effect as said
from afbus.master.core import Core as MasterCore
from afbus.master.issuer import Leaf
from afbus.master.policy import parse_policy
from afbus.node.core import About, Core
from afbus.node.effect import (
    Audit,
    ConnectionId,
    Cut,
    Deliver,
    Drop,
    Kind,
    Notify,
    Put,
    Send,
    Signal,
)
from afbus.node.peers import Peers
from afbus.node.uplink import Uplink
from afbus.node.uplink_effect import Changed, Hang, Say, Spare
from afbus.proto import cluster
from afbus.proto.cluster import ClusterCall
from afbus.proto.frames import Result
from afbus.proto.operation import ClusterOp
from afbus.proto.record import DeniedRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from afbus.link.credentials import Credentials as LinkCredentials
    from afbus.link.link import Link, Sink
    from afbus.node.endpoint import Credentials
#: The longest that a test waits for what must happen at once, in real seconds.
LIMIT_S: Final = 20.0
PATH: Final = b"/city"
MASTER: Final = b"town.hall"

_ROOT = Signer.root()
_CREDENTIALS: dict[str, LinkCredentials] = {}


def credentials_of(name: str) -> LinkCredentials:
    """Return the certificate of a node, the same in all towns: keys take time."""
    if name not in _CREDENTIALS:
        _CREDENTIALS[name] = _ROOT.issue(node(name))
    return _CREDENTIALS[name]


class Town:
    """The cluster."""

    def __init__(
        self,
        names: Sequence[str] = ("alpha", "beta", "gamma"),
        seed: int = 0,
        policy: str = EVERYTHING,
        *,
        has_post: bool = False,
    ) -> None:
        """Begin; with a post, nodes that cannot reach each other speak by way of the master."""
        self.network = MemoryNetwork(seed)
        self.post: Post | None = None
        if has_post:
            utc = datetime.fromtimestamp(NOW_UTC, UTC)
            self.post = Post(self.network, _ROOT, utc, lambda name: self.houses[name].uplink.number)
        self.random = Random(seed)
        self.disk: dict[bytes, bytes] = {}
        #: The block that each node has written down as its spare.
        self.spares: dict[str, int | None] = {}
        self.policy = policy
        self._links = 0
        self.lines: dict[said.LinkId, House] = {}
        #: What came of the operator's calls.
        self._orders: dict[said.LinkId, Result] = {}
        self.audit: list[said.Audit] = []
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

    def order(self, op: ClusterOp, /, **args: Any) -> Any:
        """Do something as the operator, which must be granted; return the value."""
        assert self.master is not None, "the operator is at the master's door"
        link = self._next_link()
        self.master.receive_visitor(link, "operator", self.network.time)
        self.master.receive_frame(link, cluster.encode(ClusterCall(1, op, args)), self.network.time)
        self.until(lambda: link in self._orders)
        result = self._orders.pop(link)
        assert result.is_ok, result
        return result.value

    def nodes(self) -> list[dict[str, Any]]:
        """Return what the master tells the operator of all nodes."""
        rows: list[dict[str, Any]] = self.order(ClusterOp.NODES, after=None)["rows"]
        return rows

    def close(self) -> None:
        """Stop all switches."""
        for house in self.houses.values():
            house.close()

    # --- time ---

    def settle(self) -> bool:
        """Let everybody do what is to be done now; return whether anybody did anything."""
        is_busy = False
        for _ in range(1000):
            moved = [house.settle() for house in list(self.houses.values())]
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
                case said.Send(link, data):
                    frame = cluster.decode(data)
                    if isinstance(frame, Result):
                        self._orders[link] = frame
                case said.Cut(link) if link in self.lines:
                    self.lines[link].lose_line()
                case said.Audit():
                    self.audit.append(effect)
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
            for house in list(self.houses.values()):
                house.core.handle_timer(now)
                house.uplink.handle_timer(now)
            self.settle()

    def until(
        self, is_so: Callable[[], Any], limit_s: float = LIMIT_S, step_s: float = 0.05
    ) -> None:
        """Let time pass until something is so; each look lets `step_s` of the town's time pass."""
        end = time.monotonic() + limit_s
        while not is_so():
            assert time.monotonic() < end, "it does not come about"
            self.run_for(step_s)
            self.await_switches(0.001)

    def await_switches(self, limit_s: float) -> bool:
        """Wait until a switch, which has a thread of its own, has something to say."""
        poll = select.poll()
        for house in self.houses.values():
            poll.register(house.switch, select.POLLIN)
        return bool(poll.poll(1000 * limit_s))

    # --- what nodes ask of the master ---

    def _next_link(self) -> said.LinkId:
        self._links += 1
        return said.LinkId(self._links)

    def new_line(self, house: House) -> said.LinkId | None:
        """Give a node a link to the master, if it is there."""
        if self.master is None or house.is_cut_off:
            return None
        leaf = credentials_of(house.name).certificates[0]
        if leaf.serial_number in self.master.denied:
            # As by the carrier, in the handshake.
            house.uplink.receive_refusal("the certificate was revoked")
            return None
        link = self._next_link()
        self.lines[link] = house
        identity = Identity("test", Role.NODE, house.name)
        shown = Leaf(leaf.serial_number, NOW_UTC + 86_400, house.name.encode().ljust(32))
        self.master.receive_link(link, identity, shown, house.boot, self.network.time)
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
    """One node: lives of its agent, one after the other, and the files that stay."""

    def __init__(self, town: Town, name: str) -> None:
        self.town, self.name = town, name
        #: Whether it has no way to the master.
        self.is_cut_off = False
        self.line: said.LinkId | None = None
        self.clients: dict[ConnectionId, Client] = {}
        self._connections = 0
        self._epoch = 0
        self.journal: dict[tuple[Kind, int, bytes], bytes] = {}
        #: Audit lines of the agent.
        self.audit: list[str] = []
        self._begin()

    def _begin(self) -> None:
        """Begin a life of the agent, from what stands in its journal."""
        town, name = self.town, self.name
        self.boot = town.random.randbytes(16)
        self.heard: deque[bytes] = deque()
        self._epoch += 1
        self.switch = Switch()
        about = About(name, "0", self._epoch, os.getpid(), 0, "now")
        self.core = Core(self.switch, about, town.random.randbytes)
        if self.journal:
            entries = [Put(*key, value) for key, value in self.journal.items()]
            self.core.restore(entries, lambda _: True, town.network.time)
        self.uplink = Uplink(
            name,
            (name,),
            lambda: b"csr",
            town.network.time,
            spare=town.spares.get(name),
            blocks=self.core.blocks,
        )
        self.federation = self.core.join_cluster(
            self.switch, self.uplink, lambda: town.network.time
        )
        utc = datetime.fromtimestamp(NOW_UTC, UTC)
        member = Member(
            credentials_of(name), _ROOT.authority(), self.boot, self._accept, lambda: utc
        )
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
        self.federation.restore()
        self.box = None if town.post is None else PostBox(self)

    def _accept(self, link: Link) -> Sink:
        if self.box is not None and link.peer.role is Role.MASTER:
            return self.box.accept(link)
        return self.peers.accept(link)

    def close(self) -> None:
        """Stop the switch."""
        for client in self.clients.values():
            if client.welcome is not None:
                client.rings.close()
        self.switch.close()

    def kill(self) -> None:
        """The host is gone, without a word and with all processes on it."""
        self._end()
        del self.town.houses[self.name]

    def restart(self) -> None:
        """Kill the agent, and begin another from its journal; clients come back by `resume`."""
        self._end()
        self.clients.clear()
        self._begin()

    def _end(self) -> None:
        self.lose_line()
        if self.box is not None:
            self.box.close()
        self.carrier.kill()
        self.switch.close()

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
            match event:
                case ("body", trunk, ticket, size):
                    self.peers.handle_body(trunk, ticket, size)
                case _:
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
                case Spare(block):
                    self.town.spares[self.name] = block
                case Changed(changes):
                    self.federation.receive_uplink(effect)
                    if any(isinstance(one.new or one.old, DeniedRecord) for one in changes):
                        # As node/links.py does it.
                        denied = tuple(self.uplink.mirror.get_denied())
                        self.carrier.set_authority(_ROOT.authority(denied=denied))
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
                case Cut(connection):
                    self.clients[connection].is_cut = True
                case Put(kind, owner, key, value):
                    self.journal[kind, owner, key] = value
                case Drop(kind, owner, None):
                    for place in [one for one in self.journal if one[:2] == (kind, owner)]:
                        del self.journal[place]
                case Drop(kind, owner, key):
                    assert key is not None
                    del self.journal[kind, owner, key]
                case Audit(text):
                    self.audit.append(text)
        return bool(effects)

    def connect(self, client: Client, credentials: Credentials) -> ConnectionId:
        """Let somebody come to the door."""
        self._connections += 1
        number = ConnectionId(self._connections)
        self.clients[number] = client
        self.core.receive_connection(number, credentials, self.town.network.time)
        return number

    def client(self, uid: int = 1000, **hello: int) -> Client:
        """Return a client that has said HELLO."""
        made = Client(self, uid, hello)
        self.town.until(lambda: made.welcome is not None)
        return made
