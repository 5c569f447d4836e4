"""The parts of cluster.py, each a process on one of its hosts: `cluster_roles.py ROLE ...`.

As in roles.py what a part says goes to standard output, `ready` and `= JSON` are for the director.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from typing import TYPE_CHECKING, Final

from roles import account, publisher, say, subscriber, told

import afbus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

#: The same bus as in roles.py, but one of the cluster.
BUS: Final = "/example/counters"
MASTER: Final = "example.master"
TELLER: Final = "example.teller"
REQUESTS: Final = 200
TICK_S: Final = 0.005


async def hall() -> None:
    """Create the bus for the whole cluster, and tell who is lost, until the director says stop."""
    lost: list[str] = []

    async def watch(bus: afbus.Bus) -> None:
        async for notice in bus.notices():
            if notice.event is afbus.Event.NODE_LOST:
                lost.append(str(notice.detail["node"]))
                say(f"notice: NODE_LOST {notice.detail['node']} ({notice.reason})")

    async with (
        afbus.create(BUS, MASTER, scope="cluster") as bus,
        asyncio.TaskGroup() as group,
    ):
        watching = group.create_task(watch(bus))
        say(f"bus {BUS} is there for the cluster, its master is {bus.address}")
        say("ready")
        await told()
        account(lost=lost)
        watching.cancel()


async def clock() -> None:
    """Send numbered ticks, 200 a second, from the director's word until its next."""
    async with afbus.join(BUS) as member:
        await member.allow("clock")
        say("ready")
        await told()
        number = 0
        async with asyncio.TaskGroup() as group:
            stop = group.create_task(told())
            while not stop.done():
                await member.publish("clock", number.to_bytes(8, "little"))
                number += 1
                await asyncio.sleep(TICK_S)
    account(sent=number)


async def ear() -> None:
    """Listen to the clock: every tick once, in order; until as many as the director says."""
    async with afbus.join(BUS) as member, member.subscribe("clock") as heard:
        say("ready")
        ticks = wrong = 0
        longest_s = 0.0
        expected: int | None = None

        async def listen() -> None:
            nonlocal ticks, wrong, longest_s
            last = None
            async for item in heard:
                now = time.monotonic()
                if isinstance(item, afbus.Gap):
                    wrong += 1
                    continue
                wrong += int.from_bytes(item.body, "little") != ticks
                ticks += 1
                if last is not None:
                    longest_s = max(longest_s, now - last)
                last = now
                if ticks == expected:
                    return

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            listening = group.create_task(listen())
            expected = int(await told())
            if ticks == expected:
                listening.cancel()
    account(ticks=ticks, wrong=wrong, longest_s=longest_s)


async def teller(host: str) -> None:
    """Answer who asks, with the name of this host, until the director says stop."""
    async with afbus.join(BUS, name=TELLER) as member:
        say("ready")

        async def answer_all() -> None:
            async for question in member.messages():
                await member.reply(question, f"{host} is well".encode())

        async with asyncio.TaskGroup() as group:
            answering = group.create_task(answer_all())
            await told()
            answering.cancel()
    account()


async def asker() -> None:
    """Ask the teller many times; and once more when the director says that it is out."""
    async with afbus.join(BUS) as member:
        say("ready")
        await told()
        waits = []
        for _ in range(REQUESTS):
            began = time.perf_counter()
            reply = await member.request(TELLER, b"how are you?", deadline=5.0)
            waits.append(time.perf_counter() - began)
        who = reply.identity
        assert who is not None, "a member asks for identities"
        said = reply.body.decode()
        say(f"{REQUESTS} replies: '{said}', says {who.principal} of node {who.node}")
        say(f"half of them came within {statistics.median(waits) * 1e3:.1f} ms")
        account(replies=len(waits), node=who.node, median_ms=statistics.median(waits) * 1e3)
        await told()
        try:
            await member.request(TELLER, b"are you there?", deadline=3.0)
            refusal = ""
        except afbus.BusError as error:
            refusal = type(error).__name__
            say(f"the teller's node is out: {refusal}: {error}")
    account(refusal=refusal)


ROLES: Final[dict[str, Callable[..., Awaitable[None]]]] = {
    "hall": hall,
    "clock": clock,
    "ear": ear,
    "teller": teller,
    "asker": asker,
    "publisher": publisher,
    "subscriber": subscriber,
}


async def main() -> None:
    """Play the role that the arguments name."""
    role, *arguments = sys.argv[1:]
    await ROLES[role](*arguments)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except* EOFError:
        sys.exit(1)
