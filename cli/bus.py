"""`afbus bus create` is the master of a bus; `afbus join` is a member of one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from .argument import address_within, json_option, name_option, path_argument
from .output import epilog, print_json, put

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ..client.bus import Bus
    from ..client.message import Message
    from ..client.question import Question, Verdict
    from ..proto.address import BusAddress


@click.group()
def bus() -> None:
    """Create buses."""


@bus.command(
    epilog=epilog(
        "Examples:",
        "afbus bus create /demo",
        "afbus bus create /demo --name demo.master --allow-uid 1000 --allow-uid 1001",
        "afbus bus create /demo --allow-monitors --json",
        "afbus bus create /demo --name demo.master --cluster",
    )
)
@path_argument
@click.option(
    "--name",
    default="master",
    show_default=True,
    callback=address_within,
    help="The address of the master.",
)
@click.option(
    "--allow-uid",
    "uids",
    type=click.IntRange(0, 2**32 - 2),
    multiple=True,
    help="A user who may join, beside the own one; may be repeated.",
)
@click.option(
    "--allow-monitors",
    is_flag=True,
    help="Members may also read what is meant for others: monitor, and listen --all; in a cluster "
    "those whom its policy allows it.",
)
@click.option(
    "--width",
    type=click.Choice(["512", "1024", "2048"]),
    default="512",
    show_default=True,
    help="Bits of its multicast addresses.",
)
@click.option(
    "--order",
    type=click.Choice(["total", "fifo"]),
    default=None,
    help="Whether all receivers see the same order (total, on a host) or each sender's (fifo).",
)
@click.option(
    "--cluster",
    "is_cluster",
    is_flag=True,
    help="Let endpoints of all nodes be on it; the policy of the cluster says who may what.",
)
@json_option
def create(  # noqa: PLR0913 (one for each option)
    path: str,
    name: BusAddress,
    uids: tuple[int, ...],
    allow_monitors: bool,
    width: str,
    order: str | None,
    is_cluster: bool,
    as_json: bool,
) -> None:
    """Create the bus PATH and be its master until ended; print who joins and leaves.

    Processes of the own user may join, own names, send and subscribe; with --cluster whoever the
    policy of the cluster allows it. What is sent to a name that nobody owns comes to the master: it
    is printed, and refused if it expects a reply.
    """
    from ..client.bus import create as create_bus
    from ..client.socket import Socket
    from ..proto.text import escape
    from .run import Printing, run_until_ended

    if is_cluster and uids:
        raise click.UsageError("--allow-uid: in a cluster its policy says which users may join")
    shown = escape(os.fsencode(path))

    async def work() -> None:
        with Socket() as sock:
            about = sock.status()
        users = {about["client"]["uid"], *uids}
        policy: Callable[[Question], Verdict] | None
        policy = make_policy(users, about["node"], allow_monitors)
        if is_cluster:
            # None agrees to all that the policy of the cluster allows, but to no monitors.
            policy = (lambda _: True) if allow_monitors else None
        async with create_bus(
            path,
            name.address,
            authorize=policy,
            width=int(width),
            order=order,
            scope="cluster" if is_cluster else "host",
        ) as made:
            if as_json:
                print_json(
                    {
                        "kind": "bus",
                        "path": shown,
                        "master": made.address.format(),
                        "width": int(width),
                        "scope": "cluster" if is_cluster else "host",
                    }
                )
            else:
                put(f"bus {shown} is there; its master is {made.address}")
            await Printing(as_json).run(made.notices(), strays(made))
            await made.wait_closed()

    run_until_ended(work())


async def strays(bus: Bus) -> AsyncIterator[Message]:
    """Yield what comes to the master and is not for it; who waits for a reply is told that."""
    from ..proto.errors import InvalidArgument, NoSuchEndpoint

    async for message in bus.messages():
        if message.expects_reply and message.destination == bus.address:
            bus.refuse_now(message, InvalidArgument("the master does not understand this"))
        elif message.expects_reply:
            bus.refuse_now(message, NoSuchEndpoint(f"nobody owns {message.destination}"))
        yield message


def make_policy(
    uids: set[int], own_node: str, allow_monitors: bool
) -> Callable[[Question], Verdict]:
    """Return a policy: users of one node who may do everything, but perhaps not monitor.

    The number of a user of another node means nothing here (D17).
    """
    from ..proto.request import MonitorRequest, Subscribe

    def judge(question: Question) -> Verdict:
        identity, request = question.identity, question.request
        if identity.node != own_node or identity.uid not in uids:
            return f"user {identity.uid} of node {identity.node} may not join (see --allow-uid)"
        if allow_monitors:
            return True
        if isinstance(request, MonitorRequest):
            return "the master does not allow monitors (see --allow-monitors)"
        if isinstance(request, Subscribe):
            what = request.what
            if not (any(what) if isinstance(what, bytes) else what):
                return "the master does not allow to hear everything (see --allow-monitors)"
        return True

    return judge


@click.command(
    epilog=epilog("Examples:", "afbus join /demo", "afbus join /demo --name demo.idle --json")
)
@path_argument
@name_option
@json_option
def join(path: str, name: BusAddress | None, as_json: bool) -> None:
    """Be a member of the bus PATH until ended; print what it is sent, and who comes and goes."""
    from ..client.member import join as join_bus
    from .run import Printing, run_until_ended

    async def work() -> None:
        async with join_bus(path, name=None if name is None else name.address) as member:
            if as_json:
                addresses = [address.format() for address in member.addresses]
                print_json({"kind": "joined", "addresses": addresses})
            else:
                put(f"joined as {' and '.join(map(str, member.addresses))}")
            await Printing(as_json).run(member.messages(), member.notices())

    run_until_ended(work())
