"""This machine's own counters on a bus: what `make run` shows.

An agent, a master, and ten processes more, none of which shares an interpreter with another one:
publishers, subscribers with different matches, a service and its client, a file in a sealed memfd,
one subscriber that is too slow, and one that is killed. At the end the counts must add up.

    python examples/counters.py

This is the director: it starts the parts (roles.py), prints what they say, and ends them.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import sysconfig
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent import running_agent
from roles import BURST, REQUESTS

from afbus import Terms
from afbus.proto.terms import matches

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ALL_S: Final = 18.0
END_S: Final = 3.0
ROLES: Final = Path(__file__).with_name("roles.py")
#: A real file of some megabytes that every machine has.
FILE: Final = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data/topics.py"
SUBSCRIPTIONS: Final = (
    "counters",
    "counters.cpu core=all",
    "counters.memory.MemFree",
    "counters.network device=lo",
)


class NotAsPromisedError(Exception):
    """The bus did something else than what it promises."""


class Part:
    """One process of the example."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.pid = process.pid
        self.account: dict[str, Any] = {}
        self._process = process
        self._is_over = False
        self._is_ready = asyncio.Event()
        self._is_accounted = asyncio.Event()

    async def listen(self) -> None:
        """Print what the process says, and keep what is for the director."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            text = line.decode(errors="replace").rstrip()
            if text == "ready":
                self._is_ready.set()
            elif text.startswith("= "):
                self.account = json.loads(text[2:])
                self._is_accounted.set()
            else:
                show(self.name, text)
        # Nobody is to wait for a process that is gone.
        self._is_over = True
        self._is_ready.set()
        self._is_accounted.set()

    async def ready(self) -> None:
        """Wait until it is ready."""
        await self._is_ready.wait()
        if self._is_over:
            raise NotAsPromisedError(f"{self.name} ended before it was ready")

    def tell(self, text: str) -> None:
        """Say something to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())

    async def done(self) -> dict[str, Any]:
        """Wait for its account."""
        await self._is_accounted.wait()
        if not self.account:
            raise NotAsPromisedError(f"{self.name} ended without an account")
        return self.account

    def forget(self) -> None:
        """Wait for its next account from now on."""
        self._is_accounted.clear()

    def kill(self) -> None:
        """Kill it: no farewell, no chance to clean up."""
        self._process.send_signal(signal.SIGKILL)

    async def end(self) -> None:
        """Wait until it has ended, which parts do by themselves."""
        try:
            async with asyncio.timeout(END_S):
                await self._process.wait()
        except TimeoutError as error:
            raise NotAsPromisedError(f"{self.name} did not end") from error

    async def leave(self, kind: object, _error: object, _traceback: object) -> None:
        """Make sure that it has ended, by itself if all is well."""
        try:
            if kind is None:
                await self.end()
        finally:
            if self._process.returncode is None:
                self.kill()
                await self._process.wait()


def show(name: str, text: str) -> None:
    """Print a line of a part."""
    print(f"{name:>10} | {text}", flush=True)


def headline(text: str) -> None:
    """Print what comes next."""
    print(f"\n== {text}", flush=True)


class Stage:
    """Starts parts, and ends them all when it is left."""

    def __init__(self, stack: AsyncExitStack, group: asyncio.TaskGroup) -> None:
        self._stack = stack
        self._group = group

    async def start(self, name: str, *arguments: str) -> Part:
        """Start a part and wait until it is ready."""
        pipe = asyncio.subprocess.PIPE
        # A group of its own: Ctrl-C is for the director, which ends the parts in their order.
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ROLES), *arguments, stdin=pipe, stdout=pipe, process_group=0
        )
        part = Part(name, process)
        self._stack.push_async_exit(part.leave)
        self._group.create_task(part.listen())
        await part.ready()
        return part

    async def start_all(self, *parts: tuple[str, ...]) -> list[Part]:
        """Start several parts at a time."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.start(*part)) for part in parts]
        return [task.result() for task in tasks]


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """Have a stage, which is empty again at the end."""
    async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
        yield Stage(stack, group)


@dataclass(frozen=True)
class Row:
    """One line of the summary: what was observed, and what had to be."""

    part: str
    what: str
    observed: int
    promised: int


async def play(stage: Stage) -> list[Row]:
    """Run everything; return the summary."""
    headline("a process creates the bus, others join it")
    master = await stage.start("master", "master")
    names = ("all", "cpu", "memory", "network")
    subscribers = await stage.start_all(
        *((f"sub-{n}", "subscriber", a) for n, a in zip(names, SUBSCRIPTIONS, strict=True))
    )
    publishers = await stage.start_all(*((f"pub-{name}", "publisher", name) for name in names[1:]))
    service, doomed = await stage.start_all(("service", "service"), ("doomed", "doomed"))
    client, slow, burst = await stage.start_all(
        ("client", "client", str(FILE)), ("slow", "slow"), ("burst", "burst")
    )

    headline("publishers send this machine's counters; a service answers; a file is passed")
    for part in (*publishers, client):
        part.tell("go")
    await client.done()

    headline("one subscriber does not read while a burst comes")
    burst.tell("go")
    await burst.done()
    slow.tell(str(BURST))
    await slow.done()

    headline(f"one subscriber is killed: kill -9 {doomed.pid}")
    doomed.kill()

    sent: dict[str, int] = {}
    for part in publishers:
        sent |= (await part.done())["sent"]
    for part, about in zip(subscribers, SUBSCRIPTIONS, strict=True):
        part.tell(str(count_matching(about, sent)))
        await part.done()
        # It unsubscribes in good order, for which there has to be a master.
        await part.end()
    for part in (service, master):
        part.tell("stop")
        await part.done()
    return [
        *(sent_row(part) for part in (*publishers, burst)),
        *(
            heard_row(part, about, count_matching(about, sent))
            for part, about in zip(subscribers, SUBSCRIPTIONS, strict=True)
        ),
        heard_row(slow, "burst", BURST),
        Row("slow", "was told by gap records", int(slow.account["gaps"] > 0), 1),
        Row("client", "replies to its requests", client.account["replies"], REQUESTS),
        Row("service", "requests answered", service.account["answered"], REQUESTS + 1),
        Row("client", "bytes of the file", client.account["file_bytes"], FILE.stat().st_size),
        Row("client", "refused to read everything", int(client.account["refusal"] != ""), 1),
        Row("master", "deaths told by the kernel", len(master.account["killed"]), 1),
    ]


def count_matching(about: str, sent: dict[str, int]) -> int:
    """Return how many of the multicasts sent a subscription asks for."""
    return sum(
        count for terms, count in sent.items() if matches(Terms.parse(about), Terms.parse(terms))
    )


def sent_row(part: Part) -> Row:
    """Return what a publisher has sent; how much that is depends on the machine."""
    count = sum(part.account["sent"].values())
    return Row(part.name, "multicasts sent", count, count)


def heard_row(part: Part, about: str, promised: int) -> Row:
    """Return what a subscriber has heard, with what it missed and was told of."""
    messages, missed = part.account["messages"], part.account["missed"]
    return Row(
        part.name, f"'{about}': {messages} heard, {missed} missed", messages + missed, promised
    )


def print_summary(rows: list[Row]) -> bool:
    """Print the table; return whether everything is as promised."""
    headline("summary")
    width = max(len(row.what) for row in rows)
    print(f"{'':>12} {'':<{width}} {'observed':>9} {'expected':>9}")
    for row in rows:
        verdict = "" if row.observed == row.promised else "  NOT AS PROMISED"
        print(f"{row.part:>12} {row.what:<{width}} {row.observed:>9} {row.promised:>9}{verdict}")
    return all(row.observed == row.promised for row in rows)


async def direct() -> list[Row]:
    """Run everything within its time, and end whatever was started."""
    try:
        async with asyncio.timeout(ALL_S), stage() as empty:
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
        with running_agent() as agent:
            print(f"{agent}; the director is pid {os.getpid()}", flush=True)
            is_good = print_summary(asyncio.run(direct()))
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
