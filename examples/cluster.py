"""One bus over three hosts: what `make run` shows of a cluster.

A master and three nodes, each in a network namespace of its own on a bridge (as root; else on
loopback addresses), with certificates that are made on the way. One host's counters are matched
on another, requests are answered across, the master is killed and comes back while traffic flows,
and at the end a node is revoked.

    python examples/cluster.py

This is the director: it starts the hosts, their agents and the parts (cluster_roles.py), prints
what they say, and ends them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cluster_roles import REQUESTS
from counters import (
    NotAsPromisedError,
    Part,
    Row,
    count_matching,
    headline,
    heard_row,
    print_summary,
    sent_row,
    show,
)
from network import Network

import afbus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: A bound for a machine that is busy with something else; alone it takes about 20 s.
ALL_S: Final = 90.0
NODES: Final = ("alpha", "beta", "gamma")
ROLES: Final = Path(__file__).with_name("cluster_roles.py")
CLI: Final = (sys.executable, "-m", "afbus.cli")
#: How long the master stays away while ticks flow.
AWAY_S: Final = 3.0
#: How long a revocation may take to reach every node.
REVOKED_S: Final = 1.0
POLICY: Final = """\
# Who may do what on this cluster; what no rule allows is denied.
[[rule]]
name = "counters"
who = ["uid/*@alpha", "uid/*@beta", "uid/*@gamma"]
bus = ["/example/counters"]
own = ["example.**"]
# Its master, to join; the teller, to ask it. Answers need no rule.
send = ["example.master", "example.teller", "topic:counters.**", "topic:clock"]
receive = ["topic:counters.**", "topic:clock"]
bind = true
"""


class Service:
    """A daemon of the cluster: the master, or the agent of a node."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process

    async def ready(self) -> None:
        """Wait for its one line."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise NotAsPromisedError(f"{self.name} did not start")
        show(self.name, line.decode().split(";")[0].strip())

    async def kill(self) -> None:
        """Kill -9."""
        self.process.kill()
        await self.process.wait()

    async def end(self, *_: object) -> None:
        """End it in good order."""
        if self.process.returncode is None:
            self.process.terminate()
            try:
                async with asyncio.timeout(8):
                    await self.process.wait()
            except TimeoutError:
                await self.kill()


class Town:
    """The hosts, and what runs on them."""

    def __init__(
        self, network: Network, folder: Path, stack: AsyncExitStack, group: asyncio.TaskGroup
    ) -> None:
        self.network = network
        self.folder = folder
        self._stack = stack
        self._group = group

    async def do(self, host: str, *argv: str, text: str | None = None) -> str:
        """Run an afbus command on a host; return what it prints."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self.network.command(host, [*CLI, *argv]), stdin=pipe, stdout=pipe, stderr=pipe
        )
        out, err = await process.communicate(None if text is None else text.encode())
        if process.returncode != 0:
            raise NotAsPromisedError(f"afbus {' '.join(argv)}: {err.decode().strip()}")
        return out.decode()

    async def serve(self, name: str, host: str, *argv: str) -> Service:
        """Start a daemon."""
        process = await asyncio.create_subprocess_exec(
            *self.network.command(host, [*CLI, *argv]),
            stdout=asyncio.subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        service = Service(name, process)
        self._stack.push_async_exit(service.end)
        await service.ready()
        return service

    async def start(self, name: str, host: str, *arguments: str) -> Part:
        """Start a part on a host, and wait until it is ready."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self.network.command(host, [sys.executable, str(ROLES), *arguments]),
            stdin=pipe,
            stdout=pipe,
            process_group=0,
            env={**os.environ, "AFBUS_NODE": str(self.folder / host / "node.sock")},
        )
        part = Part(name, process)
        self._stack.push_async_exit(part.leave)
        self._group.create_task(part.listen())
        await part.ready()
        return part

    # --- what is done to the cluster ---

    async def all_here(self) -> None:
        """Wait until all nodes have found the master again."""
        await asyncio.to_thread(self._await_all)

    def _await_all(self) -> None:
        while not all(map(self._is_here, NODES)):
            time.sleep(0.1)

    def _is_here(self, host: str) -> bool:
        with afbus.socket(node=self.folder / host / "node.sock") as sock:
            return bool(sock.status()["cluster"]["master"] == "here")

    async def run_master(self) -> Service:
        """Start the master, or start it again."""
        address = f"{self.network.address('master')}:4450"
        state, policy = str(self.folder / "master"), str(self.folder / "policy.toml")
        options = ("--state", state, "--listen", address, "--policy", policy)
        return await self.serve("master", "master", "master", "run", *options)

    async def join(self, host: str) -> None:
        """Make a host a node by a token, and run its agent."""
        state = str(self.folder / "master")
        token = await self.do("master", "token", "--state", state, "--name", host)
        folder = str(self.folder / host)
        place = f"{self.network.address('master')}:4450"
        options = ("--token-file", "-", "--name", host, "--state", folder, place)
        said = await self.do(host, "node", "join", *options, text=token)
        show(host, said.splitlines()[0])
        listen = f"{self.network.address(host)}:4451"
        door = f"{folder}/node.sock"
        own = ("--door", door, "--cluster", folder, "--listen", listen)
        await self.serve(host, host, "node", *own)


@asynccontextmanager
async def town(network: Network) -> AsyncIterator[Town]:
    """Have hosts, which are gone at the end."""
    with tempfile.TemporaryDirectory(prefix="afbus-cluster-") as folder:
        async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
            yield Town(network, Path(folder), stack, group)


async def play(town: Town) -> list[Row]:
    """Run everything; return the summary."""
    headline("a cluster is made: a root, a key that issues, a policy; and its master runs")
    state = str(town.folder / "master")
    made = await town.do("master", "master", "init", "--state", state, "demo")
    show("master", made.splitlines()[0])
    (town.folder / "policy.toml").write_text(POLICY)
    master = await town.run_master()

    headline("three hosts become nodes, each by a token that works once")
    async with asyncio.TaskGroup() as group:
        for host in NODES:
            group.create_task(town.join(host))

    headline("a process on alpha binds a bus for the cluster; others join it on every node")
    hall = await town.start("hall", "alpha", "hall")
    about = "counters.cpu core=all"
    heard, teller, publisher, asker, clock, ear = await _start_all(
        town,
        ("sub@beta", "beta", "subscriber", about),
        ("teller", "gamma", "teller", "gamma"),
        ("pub@alpha", "alpha", "publisher", "cpu"),
        ("asker", "beta", "asker"),
        ("clock", "alpha", "clock"),
        ("ear", "beta", "ear"),
    )

    headline("alpha's counters are matched on beta; gamma answers beta's requests")
    publisher.tell("go")
    asker.tell("go")
    answered = await asker.done()
    sent = (await publisher.done())["sent"]
    expected = count_matching(about, sent)
    heard.tell(str(expected))
    await heard.done()
    await heard.end()

    headline(f"the master is killed (kill -9) for {AWAY_S:g} s, while ticks flow")
    clock.tell("go")
    await asyncio.sleep(0.5)
    await master.kill()
    show("master", "killed")
    await asyncio.sleep(AWAY_S)
    await town.run_master()
    began = time.monotonic()
    await town.all_here()
    show("master", f"all nodes were back {time.monotonic() - began:.1f} s after it was")
    late = await town.start("late", "gamma", "subscriber", "clock")
    clock.tell("stop")
    ticks = (await clock.done())["sent"]
    ear.tell(str(ticks))
    await ear.done()

    headline("gamma is revoked: its links are cut, and what it had is gone")
    asker.forget()
    began = time.monotonic()
    await town.do("master", "revoke", "--state", state, "--reason", "a drill", "node/gamma")
    took_s = time.monotonic() - began
    show("master", f"every node has heard of it; the command took {took_s:.2f} s")
    asker.tell("go")
    refused = await asker.done()
    for part in (late, teller):
        part.kill()
    hall.tell("stop")
    await hall.done()
    return [
        sent_row(publisher),
        heard_row(heard, about, expected),
        Row("asker", "replies from gamma", answered["replies"], REQUESTS),
        Row("clock", "ticks sent", ticks, ticks),
        Row("ear", "ticks heard, each once and in order", ear.account["ticks"], ticks),
        Row("ear", "ticks missed or out of order", ear.account["wrong"], 0),
        Row("asker", "refused after the revocation", int(refused["refusal"] != ""), 1),
    ]


async def _start_all(town: Town, *parts: tuple[str, ...]) -> list[Part]:
    """Start several parts at a time."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(town.start(*part)) for part in parts]
    return [task.result() for task in tasks]


async def direct(network: Network) -> list[Row]:
    """Run everything within its time, and end whatever was started."""
    try:
        async with asyncio.timeout(ALL_S), town(network) as empty:
            return await play(empty)
    except* NotAsPromisedError as group:
        failure: BaseException = group
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    raise failure


def main() -> int:
    """Return 0 if everything was as promised."""
    began = time.monotonic()
    try:
        with Network(("master", *NODES)) as network:
            what = "network namespaces on a bridge" if network.has_namespaces else "loopback"
            print(f"four hosts in {what}; the director is pid {os.getpid()}", flush=True)
            is_good = print_summary(asyncio.run(direct(network)))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (NotAsPromisedError, TimeoutError) as error:
        text = str(error) or f"not done within {ALL_S:g} s"
        print(f"NOT as promised: {text}", flush=True)
        return 1
    took = time.monotonic() - began
    print(f"\n{'the counts add up' if is_good else 'NOT as promised'} ({took:.1f} s)", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
