"""A cluster of real processes: a master, nodes, and the weather on all ways between them.

As root each host is a network namespace, else an address of the loopback. Nobody is told where
another one really is: in front of each stands a proxy of `weather.py`, on a host of its own.

    alpha ---> sky, port of beta ---> beta          whoever dials; the weather of a way counts
    beta  ---> sky, port of alpha ---> alpha        for the links that either has begun

Invariants:

1. Every wait has a deadline.
2. `mend` leaves clear weather, and a master and nodes that know each other.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.cluster.weather import BLACK, CLEAR, Proxy, Weather
from tests.master.world import EVERYTHING

import afbus
from afbus.master.directory import Directory
from afbus.master.door import ask_master
from afbus.node.place import MASTER_PORT, NODE_PORT
from afbus.proto.operation import ClusterOp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from network import Network

NODES: Final = ("alpha", "beta", "gamma")
MASTER: Final = "master"
#: What may move messages between nodes: the default, and the other.
CARRIERS: Final = ("native", "aioquic")
#: How long anything may take that must happen: far more than it does.
PATIENCE_S: Final = 60.0
_CLI: Final = (sys.executable, "-m", "afbus.cli")
#: What no daemon ever writes.
_FAULTS: Final = ("Traceback", "never retrieved", "never awaited")


class Daemon:
    """A process that says one line when it serves, and writes the rest into a log."""

    def __init__(self, argv: Sequence[str], log: Path) -> None:
        """Take note of the command; `start` runs it."""
        self._argv = argv
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run it, and wait until it serves."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._argv, stdout=subprocess.PIPE, stderr=log)
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), self.log

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal, and wait for its end; return its exit status."""
        assert self._process is not None
        process, self._process = self._process, None
        with process:
            process.send_signal(number)
            return process.wait(PATIENCE_S)

    @property
    def is_running(self) -> bool:
        """Whether it was started, and was not ended."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """All that it has written."""
        return self._log.read_text(errors="replace")


def memory_kib(pid: int) -> int:
    """Return the memory of a process, without what it shares."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no RssAnon")


def cpu_s(pid: int) -> float:
    """Return the seconds of a CPU that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Region:
    """The hosts of a cluster."""

    def __init__(self, folder: Path, network: Network, carrier: str, seed: int = 1) -> None:
        """Make a cluster, let its nodes join, and start everything."""
        self.folder = folder
        self.network = network
        self.carrier = carrier
        settings = folder / "node.toml"
        settings.write_text(f'carrier = "{carrier}"\n')
        self.directory = Directory(folder / MASTER)
        self.directory.make("region", datetime.now(UTC).timestamp(), os.urandom, None)
        self.directory.policy.write_text(EVERYTHING)
        self.proxies: dict[str, Proxy] = {}
        self.daemons: dict[str, Daemon] = {}
        #: When the last node was revoked.
        self.revoked_at = 0.0
        self._add(MASTER, MASTER_PORT, seed, "master", "run", "--state", str(folder / MASTER))
        for number, name in enumerate(NODES, 1):
            state = str(folder / name)
            serve = ["node", "--config", str(settings), "--door", str(self.door(name))]
            serve += ["--cluster", state]
            self._add(name, NODE_PORT, seed + 1000 * number, *serve)
        try:
            self.daemons[MASTER].start()
            with ThreadPoolExecutor() as pool:
                list(pool.map(self._found, NODES))
            self.mend()
        except BaseException:
            self.close()
            raise

    def _add(self, host: str, port: int, seed: int, *argv: str) -> None:
        network = self.network
        target = (network.address(host), port)
        space = network.namespace("sky") if network.has_namespaces else None
        self.proxies[host] = Proxy(target, seed, (network.address("sky"), 0), space)
        told = [] if host == MASTER else ["--place", self.place(host)]
        command = [*_CLI, *argv, "--listen", f"{target[0]}:{port}", *told]
        log = self.folder / f"{host}.log"
        self.daemons[host] = Daemon(network.command(host, command), log)

    def _found(self, host: str, *options: str) -> None:
        """Make a host a node, and start it."""
        state = str(self.folder / host)
        join = [*_CLI, "node", "join", "--token-file", "-", "--name", host, "--state", state]
        subprocess.run(
            self.network.command(host, [*join, *options, self.place(MASTER)]),
            input=self.token(node=host),
            text=True,
            timeout=PATIENCE_S,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self.daemons[host].start()

    # --- looking ---

    def place(self, host: str) -> str:
        """Where others reach a host, through its proxy."""
        address, port = self.proxies[host].address
        return f"{address}:{port}"

    def door(self, node: str) -> Path:
        """Where the clients of a node come."""
        return self.folder / f"{node}.sock"

    def ask(self, op: ClusterOp, **args: Any) -> Any:
        """Ask the master as its operator."""
        return ask_master(self.directory.door, op, timeout_s=PATIENCE_S, **args)

    def token(self, **args: Any) -> str:
        """Return a token by which one node can join."""
        return str(self.ask(ClusterOp.TOKEN, **args)["token"])

    def status(self, node: str) -> dict[str, Any]:
        """Return what a node says of the cluster."""
        with afbus.socket(node=self.door(node)) as sock:
            about: dict[str, Any] = sock.status()["cluster"]
        return about

    def link(self, node: str, peer: str) -> str:
        """Return the state of the link that one node has to another."""
        return next(str(one["link"]) for one in self.status(node)["peers"] if one["node"] == peer)

    @property
    def swallowed(self) -> int:
        """How many datagrams were lost so far."""
        return sum(proxy.swallowed for proxy in self.proxies.values())

    def is_whole(self) -> bool:
        """Whether all nodes have found the master, and have the same table."""
        if not all(self.status(node)["master"] == "here" for node in NODES):
            return False
        version = self.ask(ClusterOp.STATUS)["version"]
        return all(self.status(node)["table_version"] == version for node in NODES)

    def is_quiet(self) -> bool:
        """Whether nodes have confirmed all that others have sent."""
        peers = [peer for node in NODES for peer in self.status(node)["peers"]]
        return all(peer["sent"] == peer["confirmed"] for peer in peers)

    def until(
        self, holds: Callable[[], object], limit_s: float = PATIENCE_S, pause_s: float = 0.02
    ) -> float:
        """Wait until something holds; return how many seconds that took."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < limit_s, "it does not come true"
            time.sleep(pause_s)  # lasts: the pause between two looks
        return time.monotonic() - began

    # --- weather, deaths ---

    def steer(self, source: str, target: str, weather: Weather) -> None:
        """Change the weather on the way from one host to another, in this direction."""
        address = self.network.address
        self.proxies[target].steer(address(source), out=weather)
        self.proxies[source].steer(address(target), back=weather)

    def spoil(self, one: str, other: str, weather: Weather) -> None:
        """Change it in both directions."""
        self.steer(one, other, weather)
        self.steer(other, one, weather)

    def isolate(self, host: str, weather: Weather = BLACK) -> None:
        """Change it on all ways from and to a host."""
        for other in self.proxies:
            if other != host:
                self.spoil(host, other, weather)

    def clear(self) -> None:
        """Have good weather everywhere."""
        for proxy in self.proxies.values():
            proxy.set(CLEAR)

    def kill(self, host: str) -> None:
        """Kill -9 what serves on a host."""
        self.daemons[host].end()

    def start(self, host: str) -> None:
        """Start it again."""
        self.daemons[host].start()

    def revoke(self, node: str) -> float:
        """Put a node out of the cluster; return how many seconds that took."""
        self.revoked_at = time.monotonic()
        self.ask(ClusterOp.REVOKE, subject=f"node/{node}", reason="a drill")
        return time.monotonic() - self.revoked_at

    def join_again(self, node: str) -> None:
        """Let a node that was revoked be one again, and begin anew."""
        self.kill(node)
        self._found(node, "--again")
        self.until(self.is_whole)

    def mend(self) -> None:
        """Have everything in order again."""
        self.clear()
        for daemon in self.daemons.values():
            if not daemon.is_running:
                daemon.start()
        self.until(self.is_whole)

    def describe(self) -> str:
        """Return what nodes say of each other, and what has been logged."""
        said = [f"{n}: {self.status(n)}" for n in NODES if self.daemons[n].is_running]
        return "\n".join([*said, *(f"{h}: {d.log}" for h, d in self.daemons.items())])

    def faults(self) -> list[str]:
        """Return lines of the logs that must not be there."""
        return [
            f"{host}: {line}"
            for host, daemon in self.daemons.items()
            for line in daemon.log.splitlines()
            if any(fault in line for fault in _FAULTS)
        ]

    def close(self) -> None:
        """End everything."""
        for daemon in self.daemons.values():
            if daemon.is_running:
                daemon.end(signal.SIGTERM)
        for proxy in self.proxies.values():
            proxy.close()
