"""`afbus send`, `publish`, `listen`, `request`, `serve`: messages, one command each."""

from __future__ import annotations

import asyncio
import shlex
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import click

from .argument import (
    address_within,
    body_argument,
    deadline_option,
    json_option,
    name_option,
    path_argument,
    seconds,
    terms,
    to_argument,
)
from .output import epilog, print_message, put

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..client.message import Message
    from ..proto.address import BusAddress
    from ..proto.notice import Gap, Notice
    from ..proto.terms import Terms


@click.command(
    epilog=epilog(
        "Examples:",
        "afbus send /demo demo.clock 'what time is it'",
        "date | afbus send /demo 1.2 -",
    )
)
@path_argument
@to_argument
@body_argument
@deadline_option
def send(path: str, to: BusAddress, body: bytes, deadline: float) -> None:
    """Send BODY to the address TO on the bus PATH.

    BODY is - or missing: standard input. The message is accepted when this ends with 0.
    """
    from ..client.member import join

    async def work() -> None:
        async with join(path, deadline=deadline) as member:
            await member.send(to, body, deadline=deadline)

    asyncio.run(work())


@click.command(
    epilog=epilog(
        "Examples:",
        "afbus publish /demo 'sensors.cpu host=a' 42",
        "free -m | afbus publish /demo memory",
    )
)
@path_argument
@click.argument("terms", callback=terms)
@body_argument
@deadline_option
def publish(path: str, terms: Terms, body: bytes, deadline: float) -> None:
    """Send BODY to all on the bus PATH who want to hear of TERMS.

    TERMS is a dotted topic and key=value, in one argument. BODY is - or missing: standard input.
    """
    from ..client.member import join

    async def work() -> None:
        async with join(path, deadline=deadline) as member:
            await member.publish(terms, body, deadline=deadline)

    asyncio.run(work())


@click.command(
    epilog=epilog(
        "Examples:",
        "afbus listen /demo sensors.cpu host=a",
        "afbus listen /demo sensors --count 1 --timeout 10 --json",
        "afbus listen /demo --name demo.log",
    )
)
@path_argument
@click.argument("terms", nargs=-1, callback=terms)
@name_option
@click.option("--all", "hears_all", is_flag=True, help="Hear all multicasts; the master decides.")
@click.option("--count", type=click.IntRange(1), help="End after so many messages.")
@click.option("--timeout", type=float, callback=seconds, help="End after so many seconds.")
@click.option(
    "--overflow",
    type=click.Choice(["gap", "conflate", "disconnect"]),
    default="gap",
    show_default=True,
    help="When this is too slow: print how much is missing, print only the newest of each sender "
    "about each thing, or be cut off and come back as a new member.",
)
@json_option
def listen(  # noqa: PLR0913 (one for each option)
    path: str,
    terms: Terms,
    name: BusAddress | None,
    hears_all: bool,
    count: int | None,
    timeout: float | None,
    overflow: str,
    as_json: bool,
) -> None:
    """Print the multicasts on the bus PATH that have all of TERMS, and what is sent to this member.

    A topic also stands for all that begins with it: `sensors` hears of `sensors.cpu`. Without
    TERMS nothing but what is sent to this member itself is printed.

    Gaps are printed where messages are missing. With --count it is a passed deadline (exit code 4)
    when --timeout comes first.
    """
    from ..client.member import join
    from ..client.stream import within
    from ..proto.errors import DeadlineExceeded
    from ..proto.match import Overflow
    from .run import Printing, run_until_ended

    if terms and hears_all:
        raise click.UsageError("either TERMS or --all")

    async def work() -> None:
        own = None if name is None else name.address
        async with join(path, name=own) as member, AsyncExitStack() as stack:
            streams: list[AsyncIterator[Message | Gap | Notice]] = [
                member.messages(),
                member.notices(others=False),
            ]
            if terms or hears_all:
                subscription = member.subscribe(terms, overflow=Overflow[overflow.upper()])
                streams.append(await stack.enter_async_context(subscription))
            click.echo(f"listening as {' and '.join(map(str, member.addresses))}", err=True)
            try:
                async with within(timeout, f"{count} messages"):
                    await Printing(as_json, count).run(*streams)
            except DeadlineExceeded:
                if count is not None:
                    raise

    run_until_ended(work())


@click.command(
    epilog=epilog(
        "Examples:",
        "afbus request /demo demo.clock 'what time is it'",
        "afbus request /demo demo.clock --deadline 0.5 --json < question",
    )
)
@path_argument
@to_argument
@body_argument
@deadline_option
@json_option
def request(path: str, to: BusAddress, body: bytes, deadline: float, as_json: bool) -> None:
    """Ask the address TO on the bus PATH, and print the reply.

    BODY is - or missing: standard input. Without --json the reply is printed as it is, byte for
    byte, with a newline behind it. A service that refuses is exit code 1, no reply in time is exit
    code 4.
    """
    from ..client.member import join

    async def work() -> None:
        async with join(path, deadline=deadline) as member:
            with await member.request(to, body, deadline=deadline) as reply:
                if as_json:
                    print_message(reply, as_json)
                else:
                    put(reply.body)

    asyncio.run(work())


@click.command(
    epilog=epilog(
        "Examples:",
        "afbus serve /demo demo.echo --echo",
        "afbus serve /demo demo.clock --exec 'date --iso=seconds'",
        "afbus serve /demo demo.sort --exec sort",
    )
)
@path_argument
@click.argument("name", callback=address_within)
@click.option("--echo", is_flag=True, help="Answer what was asked.")
@click.option("--exec", "command", metavar="CMD", help="Answer what this program prints.")
def serve(path: str, name: BusAddress, echo: bool, command: str | None) -> None:
    """Own NAME on the bus PATH and answer requests until ended.

    With --exec each request runs CMD, without a shell, with the request on its standard input. The
    reply is its standard output; a program that fails is a refusal with its standard error.
    """
    from ..client.member import join
    from .run import run_until_ended

    if echo is (command is not None):
        raise click.UsageError("either --echo or --exec")
    try:
        words = shlex.split(command or "")
    except ValueError as error:
        raise click.UsageError(f"--exec: {error}") from error
    if command is not None and not words:
        raise click.UsageError("--exec: no program")

    async def answer(message: Message) -> bytes:
        return await run_program(words, message.body) if words else message.body

    async def work() -> None:
        async with join(path, name=name.address) as member:
            click.echo(f"serving as {' and '.join(map(str, member.addresses))}", err=True)
            await member.serve(answer)

    run_until_ended(work())


async def run_program(words: list[str], question: bytes) -> bytes:
    """Return what a program prints when it reads the question; its end is waited for.

    Raises:
        BusError: It cannot be started, or fails. EIO.
    """
    from asyncio.subprocess import PIPE

    from ..proto.errors import BusError

    try:
        program = await asyncio.create_subprocess_exec(*words, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    except OSError as error:
        raise BusError(f"{words[0]}: {error.strerror}") from error
    try:
        reply, complaint = await program.communicate(question)
    except asyncio.CancelledError:
        program.kill()
        await program.wait()
        raise
    if program.returncode != 0:
        text = complaint.decode(errors="replace").strip()
        raise BusError(f"{words[0]} ended with {program.returncode}: {text}")
    return reply
