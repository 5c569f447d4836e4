"""afbus itself: every way in which a row uses it is here.

On one host an agent and a bus of its own for each round; on several hosts a cluster that lasts as
long as they do. The master of the bus grants everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

import afbus
from afbus.node.membership import Membership, load
from afbus.proto import control
from afbus.proto.control import MessageTerms, MulticastMatch, MulticastSend, OwnedAddr, encode
from afbus.proto.match import Overflow
from afbus.proto.terms import Terms

from .cluster import NODES, ClusterStage, host_of
from .meter import take_counted, take_each, time_turns
from .stage import LIMIT_S
from .wire import KIB, MIB, System, Wire

if TYPE_CHECKING:
    from pathlib import Path

    from .stage import Player, Stage
    from .wire import Traffic

BUS: Final = "/bench"
PATH: Final = BUS.encode()
MASTER: Final = afbus.BusAddress(BUS, "bench.master")
MULTICAST: Final = afbus.BusAddress.multicast(BUS)
#: What all multicasts of the benches are about.
TOPIC: Final = Terms.of("bench")
#: The `afbus` command of the measured code.
CLI: Final = (sys.executable, "-m", "afbus.cli")

_POLICY: Final = f"""\
[[rule]]
name = "bench"
who = ["uid/*@alpha", "uid/*@beta"]
bus = ["{BUS}"]
own = ["**"]
send = ["**", "topic:**"]
receive = ["topic:**"]
bind = true
"""


class HostBus:
    """An agent, and a bus on it."""

    scope = "host"
    #: What leaves endpoints free to send to each other without the agent (D11).
    order: ClassVar[str] = "fifo"
    #: Settings of the agents, in TOML.
    settings: ClassVar[str] = "lanes = true\n"

    def __init__(self, stage: Stage) -> None:
        """Start them."""
        self._folder = stage.folder / type(self).__name__
        self._folder.mkdir()
        self._config = self._folder / "node.toml"
        self._config.write_text(self.settings)
        #: The agents' processes.
        self.agents = self._start_agents(stage)
        self._start_master(stage)

    def _start_agents(self, stage: Stage) -> list[int]:
        argv = [*CLI, "node", "--config", str(self._config), "--door", str(self.door(""))]
        return [stage.serve_ready(argv)]

    def _start_master(self, stage: Stage) -> None:
        # On the host of those that begin.
        stage.cast("ping", self._grant)

    def door(self, role: str) -> Path:
        """Return where the endpoint of a role finds its agent."""
        return self._folder / "node.sock"

    def socket(self, role: str, **sizes: int) -> afbus.Socket:
        """Return a socket at the agent of a role."""
        made = afbus.socket(node=self.door(role), **sizes)
        made.settimeout(LIMIT_S)
        return made

    def join(self, role: str, hears: bool = False, **sizes: int) -> afbus.Socket:
        """Return a socket that owns the name of its role, and may publish."""
        made = self.socket(role, **sizes)
        self.ask(made, [role, hears])
        return made

    def ask(self, one: afbus.Socket, wanted: list[Any]) -> None:
        """Ask the master for something, and wait until it is granted."""
        one.sendmsg([json.dumps(wanted).encode()], address=MASTER)
        one.recvmsg(100, 1_000_000)

    def _grant(self, player: Player) -> NoReturn:
        """Be the master of the bus."""
        with self.socket("ping") as master:
            master.bind(MASTER, order=self.order, scope=self.scope)
            master.settimeout(None)
            player.announce()
            while True:
                data, _, _, source = master.recvmsg(10_000, 10_000)
                # What was meant for somebody who has gone comes to the master too.
                if source.is_kernel or not data.startswith(b"["):
                    continue
                items = self.granted(json.loads(data))
                master.sendmsg([b"yes"], [encode(item) for item in items], 0, source)

    def granted(self, wanted: list[Any]) -> list[control.Item]:
        """Return what an endpoint is granted that asks for it: its name, and to hear others."""
        role, hears = wanted
        items: list[control.Item] = [
            OwnedAddr(afbus.BusAddress(BUS, role)),
            MulticastSend(PATH, TOPIC),
        ]
        return [*items, MulticastMatch(waiting(TOPIC))] if hears else items


class SwitchedBus(HostBus):
    """The same, but every message goes by way of the agent: all see one order."""

    order = "total"


def waiting(terms: Terms) -> control.Match:
    """Return a match for which senders wait, so that each message is delivered and counts."""
    return control.Match(PATH, terms, Overflow.BLOCK, LIMIT_S // 2 * 1000)


class ClusterBus(HostBus):
    """A master of a cluster, two nodes, and a bus that spans them."""

    scope = "cluster"
    #: Of the master; that of the nodes is the next.
    port: ClassVar[int] = 4450

    def _start_agents(self, stage: Stage) -> list[int]:
        state = ("--state", str(self._folder / "master"))
        policy = self._folder / "policy.toml"
        policy.write_text(_POLICY)
        place = f"{stage.address('master')}:{self.port}"
        _do(stage, "master", "master", "init", *state, "bench")
        run = ("master", "run", *state, "--listen", place, "--policy", str(policy))
        stage.serve_ready(stage.command("master", [*CLI, *run]))
        agents = []
        for node in NODES:
            token = _do(stage, "master", "token", *state, "--name", node)
            own = str(self._folder / node)
            join = ("node", "join", "--token-file", "-", "--name", node, "--state", own, place)
            _do(stage, node, *join, text=token)
            listen = f"{stage.address(node)}:{self.port + 1}"
            argv = [*CLI, "node", "--config", str(self._config), "--door", str(self.door(node))]
            argv += ["--cluster", own, "--listen", listen]
            agents.append(stage.serve_ready(stage.command(node, argv)))
        return agents

    def door(self, role: str) -> Path:
        """Return the door on the host of a role."""
        return self._folder / host_of(role) / "node.sock"

    def membership(self, role: str) -> Membership:
        """Return the certificates of the host of a role."""
        return load(self._folder / host_of(role))


def _do(stage: Stage, host: str, *argv: str, text: str = "") -> str:
    """Run an afbus command on a host; return what it prints."""
    command = stage.command(host, [*CLI, *argv])
    done = subprocess.run(  # noqa: S603 (our own program)
        command, input=text, capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr}")
    return done.stdout


class AioquicBus(ClusterBus):
    """The same, whose nodes have no native carrier."""

    settings = 'carrier = "aioquic"'
    port = 4460


class AfbusWire(Wire):
    """Sockets of a bus: messages to a name, multicasts to many."""

    def __init__(
        self,
        stage: Stage,
        traffic: Traffic,
        host: type[HostBus] = HostBus,
        cluster: type[ClusterBus] = ClusterBus,
    ) -> None:
        """Have a bus: one of its own on a host, or one of a cluster that lasts."""
        super().__init__(stage, traffic)
        self._bus = stage.keep(cluster) if isinstance(stage, ClusterStage) else host(stage)
        self.daemons = self._bus.agents
        self._ring = 4 * MIB if traffic.size > 4 * KIB else MIB
        # Large ones to many are written once, and read by all where they lie.
        is_large = traffic.readers > 1 and traffic.size >= 64 * KIB
        self._lends = traffic.mode == "loan" or is_large

    def _join(self, role: str) -> afbus.Socket:
        """Return a socket of a role that waits as it should."""
        if not self.traffic.spins:
            # Read once in a process, when its first socket is made.
            os.environ["AFBUS_SPIN"] = "0"
        return self._bus.join(role)

    def echo(self, player: Player) -> None:
        """Send back what comes."""
        with self._join("echo") as me:
            me.connect(afbus.BusAddress(BUS, "ping"))
            player.ready()
            size, send, receive = self.traffic.size, me.send, me.recv
            while True:
                send(receive(size))

    def ping(self, player: Player) -> float:
        """Time turns."""
        with self._join("ping") as me:
            me.connect(afbus.BusAddress(BUS, "echo"))
            body, send, receive = bytes(self.traffic.size), me.send, me.recv
            size = len(body)
            return time_turns(player.ready(), lambda: (send(body), receive(size)))

    def source(self, player: Player) -> None:
        """Send, with a call a message or a call for many."""
        traffic = self.traffic
        with self._bus.join("source", tx_bytes=self._ring) as me:
            body = bytes(traffic.size)
            items: list[tuple[int, int, bytes]] = []
            there = afbus.BusAddress(BUS, "sink0")
            me.connect(there)
            if traffic.readers > 1:
                there, items = MULTICAST, [encode(MessageTerms(TOPIC))]
            player.ready()
            if self._lends and items:
                for _ in repeat(None):
                    _fill(me.loan(len(body), there, items), body)
            elif self._lends:
                for _ in repeat(None):
                    _fill(me.loan(len(body)), body)
            elif traffic.mode == "batch" and traffic.chunk > 1:
                bodies = [body] * traffic.chunk
                for _ in repeat(None):
                    assert me.sendmmsg(bodies, there, 0, items) == len(bodies)
            elif items:
                for _ in repeat(None):
                    me.sendmsg([body], items, 0, there)
            else:
                send = me.send
                for _ in repeat(None):
                    send(body)

    def sink(self, player: Player, number: int) -> None:
        """Receive, with a call a message, a call for many, or in place."""
        traffic = self.traffic
        size, hears = traffic.size, traffic.readers > 1
        with self._bus.join(f"sink{number}", hears=hears, rx_bytes=self._ring) as me:
            cue = player.ready()
            if self._lends:
                take_each(cue, partial(_look, me), traffic.chunk)
            elif traffic.mode == "batch":
                take_counted(cue, lambda: len(me.recv_many(1024, size)[0]))
            else:
                take_each(cue, partial(me.recv, size), traffic.chunk)


def _fill(loan: afbus.SendLoan, body: bytes) -> None:
    """Write a message in place, and send it."""
    with memoryview(loan) as view:
        view[:] = body
    loan.send()


def _look(me: afbus.Socket) -> None:
    """Receive one message in place, and look at both ends of it."""
    with me.recv_loan() as loan, memoryview(loan) as view:
        bytes((view[0], view[-1]))


AFBUS: Final = System("afbus", AfbusWire)
#: By way of the agent; only on one host.
AFBUS_SWITCHED: Final = System("afbus, switched", partial(AfbusWire, host=SwitchedBus))
#: With the other carrier; only between hosts.
AFBUS_AIOQUIC: Final = System("afbus, aioquic", partial(AfbusWire, cluster=AioquicBus))

#: What a reader of the figures must know of how afbus was used in them.
NOTES: Final = (
    "Rates count what receivers got in a window, from calls of Python at both ends. Senders send "
    "the same bytes object again and again; receivers get bytes, in the rows of loans and from "
    "iceoryx2 at 64 KiB and above a view of which they read both ends.",
    "`local_rate_64_batch` and `local_cpu_64`: afbus sends 256 messages a call and receives what "
    "is there. Whose calls carry one message each is measured once and stands in both rows.",
    "In the loan rows, and with 64 KiB to many, senders of afbus write each message into a loaned "
    "buffer, and receivers read it where it lies.",
    "afbus in the rows without spinning has AFBUS_SPIN=0: a wait lets others run once at most, "
    "while that helps, and then sleeps.",
    "`afbus` on one host is a bus on which each sender's order holds; `afbus, switched` is one on "
    "which all receivers see the same order, so that every message goes by way of the agent.",
    "Between hosts `afbus` has the native carrier, and `afbus, aioquic` the other one.",
    "`match_1m` is CPU time of the agent for a message, over rings and switch, each message about "
    "something new; the masks are subscriptions stated in terms, granted through the agent.",
    "CPU time is that of all processes between and at the ends, agents and brokers included.",
    "Hosts are network namespaces on a bridge, mtu 1500, on the same CPUs: no wire and no loss, "
    "and TCP segments pass uncut. afbus and its peers encrypt; what is in brackets does not, or "
    "is no bus.",
)
