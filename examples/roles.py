"""The parts of counters.py, each run as a process of its own: `python examples/roles.py ROLE ...`.

What a part says goes to standard output, line by line. Two kinds of lines are for the director:
`ready`, after which the part waits for a line on standard input, and `= JSON`, its account.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import mmap
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import afbus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

BUS: Final = "/example/counters"
MASTER: Final = "example.master"
SERVICE: Final = "example.service"
SLOW: Final = "example.slow"

SAMPLES: Final = 60
PAUSE_S: Final = 0.05
BURST: Final = 10_000
REQUESTS: Final = 300

#: One reading: terms beside the topic, and the value as text.
Reading = tuple[str, str]


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def account(**values: object) -> None:
    """Tell the director what this part has done."""
    say(f"= {json.dumps(values)}")


async def told() -> str:
    """Wait for a line of the director; EOFError when the director is gone."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sys.stdin.fileno())
    return read_line()


def read_line() -> str:
    """Read a line of the director; EOFError when the director is gone."""
    if line := sys.stdin.readline():
        return line.strip()
    raise EOFError("the director is gone")


# --- the master ---


async def master() -> None:
    """Create the bus, decide who may what, and hear who dies, until the director says stop."""
    refused: list[str] = []
    killed: list[str] = []
    somebody_died = asyncio.Event()

    def authorize(question: afbus.Question) -> bool | str:
        """Let in processes of the own user; nobody may read what is meant for others."""
        if question.identity.uid != os.getuid():
            return "another user"
        if question.kind.name == "MONITOR":
            refused.append(f"{question.address.address.decode()} {question.kind.name}")
            say(f"may {question.address} read everything? (pid {question.identity.pid}) no")
            return "nobody may read what is meant for others"
        return True

    async def watch(bus: afbus.Bus) -> None:
        async for notice in bus.notices():
            names = " ".join(name.decode() for name in notice.subject)
            if notice.event is afbus.Event.KILLED:
                killed.append(names)
                somebody_died.set()
                say(f"notice of the kernel's address: KILLED {names} ({notice.reason})")

    async with afbus.create(BUS, MASTER, authorize=authorize) as bus, asyncio.TaskGroup() as group:
        watching = group.create_task(watch(bus))
        say(f"bus {BUS} is there, its master is {bus.address}")
        say("ready")
        await told()
        async with asyncio.timeout(5):
            await somebody_died.wait()
        account(killed=killed, refused=refused)
        watching.cancel()


# --- publishers ---


def read_cpu() -> Iterator[Reading]:
    """Read the ticks of each processor from /proc/stat."""
    columns = ("user", "nice", "system", "idle")
    for line in Path("/proc/stat").read_text().splitlines():
        name, *values = line.split()
        if name.startswith("cpu"):
            for column, value in zip(columns, values, strict=False):
                yield f"{column} core={name.removeprefix('cpu') or 'all'}", value


def read_memory() -> Iterator[Reading]:
    """Read the sizes that /proc/meminfo gives, in KiB."""
    wanted = ("MemFree:", "MemAvailable:", "Cached:", "Dirty:")
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value, *_ = line.split()
        if name in wanted:
            yield f"{name.removesuffix(':')} unit=KiB", value


def read_network() -> Iterator[Reading]:
    """Read the bytes received and sent by each device from /proc/net/dev."""
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        device, _, rest = line.partition(":")
        values = rest.split()
        yield f"received device={device.strip()}", values[0]
        yield f"sent device={device.strip()}", values[8]


READERS: Final = {"cpu": read_cpu, "memory": read_memory, "network": read_network}


async def publisher(what: str) -> None:
    """Send this machine's counters of one sort as multicasts: `counters.WHAT.NAME key=value`."""
    sent: dict[str, int] = {}
    loop = asyncio.get_running_loop()
    async with afbus.join(BUS) as member:
        await member.allow(f"counters.{what}")
        say("ready")
        await told()
        began = loop.time()
        for sample in range(SAMPLES):
            for terms, value in READERS[what]():
                about = f"counters.{what}.{terms}"
                await member.publish(about, value.encode())
                sent[about] = sent.get(about, 0) + 1
            if sample % 20 == 0:
                say(f"{sum(sent.values())} sent; the last was {about}: {value}")
            # The next sample is due at its own time, however long this one took.
            await asyncio.sleep(began + (sample + 1) * PAUSE_S - loop.time())
    account(sent=sent)


async def burst() -> None:
    """Send far more, far faster than a subscriber that does not read has room for."""
    async with afbus.join(BUS) as member:
        await member.allow("burst")
        say("ready")
        await told()
        began = time.monotonic()
        for number in range(BURST):
            await member.publish("burst", number.to_bytes(8, "little") * 25)
        took = time.monotonic() - began
        say(f"{BURST} multicasts of 200 bytes sent in {took:.2f} s; nobody has held me up")
        account(sent={"burst": BURST}, seconds=took)
        # A gap is told before what follows; this follows.
        await member.send(SLOW, b"that was all")


# --- subscribers ---


async def subscriber(about: str) -> None:
    """Count what has these terms, until there was as much as the director says."""
    async with afbus.join(BUS) as member, member.subscribe(about) as heard:
        say(f"subscribed to '{about}' as {member.address.address.decode()}")
        say("ready")
        await count_all(heard, told)


async def slow() -> None:
    """Subscribe, and do something else while the burst comes."""

    async def stand_still() -> str:
        # On purpose not `await`: this process does not get to reading.
        return read_line()

    async with afbus.join(BUS, name=SLOW) as member, member.subscribe("burst") as heard:
        say("subscribed to 'burst'; and now I do not read for a while")
        say("ready")
        # The line that follows `ready` is the number to expect, when all of them were sent.
        await count_all(heard, stand_still)
        async for message in member.messages():
            say(f"then, in order: {message.body.decode()!r} from {message.source}")
            break


async def count_all(
    heard: AsyncIterator[afbus.Message | afbus.Gap], told: Callable[[], Awaitable[str]]
) -> None:
    """Count messages and what gaps account for, until both are what was told to be expected."""
    messages = missed = gaps = 0
    expected: int | None = None

    async def count() -> None:
        nonlocal messages, missed, gaps
        async for item in heard:
            if isinstance(item, afbus.Gap):
                gaps += 1
                missed += item.count
                say(
                    f"gap: of {item.source.decode()} numbers {item.first} to {item.last}, "
                    f"{item.count} were for me"
                )
            else:
                messages += 1
            if messages + missed == expected:
                return

    try:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            counting = group.create_task(count())
            expected = int(await told())
            if messages + missed == expected:
                counting.cancel()
    except TimeoutError:
        say(f"not all has come: {messages} heard, {missed} missed, {expected} expected")
    account(messages=messages, missed=missed, gaps=gaps, expected=expected)


async def count(heard: AsyncIterator[object]) -> int:
    """Return how many there were, at the end of all."""
    return len([None async for _ in heard])


async def doomed() -> None:
    """Subscribe to everything about counters, until kill -9."""
    async with (
        afbus.join(BUS, name="example.doomed") as member,
        member.subscribe("counters") as heard,
    ):
        say("ready")
        async with asyncio.TaskGroup() as group:
            counting = group.create_task(count(heard))
            # Nothing will be told; but when the director is gone, this ends too.
            await told()
            counting.cancel()


# --- a service, and who asks it ---


async def service() -> None:
    """Answer what is asked: the load of this machine, or a file in a sealed memfd."""
    answered = 0
    async with afbus.join(BUS, name=SERVICE) as member:
        say(f"I am {SERVICE}")
        say("ready")
        async with asyncio.TaskGroup() as group:

            async def answer_all() -> None:
                nonlocal answered
                async for question in member.messages():
                    if question.body == b"load":
                        await member.reply(question, read_load())
                    else:
                        await pass_file(member, question)
                    answered += 1

            answering = group.create_task(answer_all())
            await told()
            answering.cancel()
    account(answered=answered)


def read_load() -> bytes:
    """Return the load of this machine, as the kernel shows it."""
    return Path("/proc/loadavg").read_bytes()


def seal_file(path: Path) -> tuple[int, bytes]:
    """Return a sealed memfd with the content of a file, which is the caller's, and its SHA-256."""
    content = path.read_bytes()
    return afbus.sealed_memfd([content]), hashlib.sha256(content).digest()


async def pass_file(member: afbus.Member, question: afbus.Message) -> None:
    """Answer with a file's content in a sealed memfd, which is not copied on its way."""
    path = Path(question.body.decode())
    memfd, digest = seal_file(path)
    try:
        await member.reply(question, digest, fds=[memfd])
    finally:
        os.close(memfd)
    say(f"{path.name} passed to {question.source} in a sealed memfd")


async def client(path: str) -> None:
    """Ask the service many times, get a file from it, and try what is not allowed."""
    async with afbus.join(BUS) as member:
        say("ready")
        await told()
        waits = []
        for _ in range(REQUESTS):
            began = time.perf_counter()
            reply = await member.request(SERVICE, b"load", deadline=2.0)
            waits.append(time.perf_counter() - began)
        median_us = statistics.median(waits) * 1e6
        load = reply.body.decode().split()[0]
        say(f"{REQUESTS} replies, the load is {load}; half of them came within {median_us:.0f} us")
        with (
            await member.request(SERVICE, path.encode(), deadline=5.0) as reply,
            mmap.mmap(reply.fds[0], 0, prot=mmap.PROT_READ) as content,
        ):
            size, is_whole = len(content), hashlib.sha256(content).digest() == reply.body
        say(f"{path}: {size} bytes read in the service's own pages, {'whole' * is_whole}")
        try:
            await anext(member.monitor())
            refusal = ""
        except afbus.Denied as error:
            refusal = error.message
            say(f"reading everything is refused: {refusal}")
    account(replies=len(waits), file_bytes=size if is_whole else 0, refusal=refusal)


ROLES: Final[dict[str, Callable[..., Awaitable[None]]]] = {
    "master": master,
    "publisher": publisher,
    "burst": burst,
    "subscriber": subscriber,
    "slow": slow,
    "doomed": doomed,
    "service": service,
    "client": client,
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
