"""`afbus list` and `afbus monitor`: what there is, and what goes by."""

from __future__ import annotations

import click

from .argument import bus_path, json_option, path_argument
from .output import epilog, print_rows


@click.command(
    "list",
    epilog=epilog(
        "Examples:",
        "afbus list buses",
        "afbus list addresses /demo",
        "afbus list queues /demo --json",
    ),
)
@click.argument(
    "what",
    type=click.Choice(["buses", "endpoints", "addresses", "matches", "queues", "lanes"]),
    metavar="WHAT",
)
@click.argument("path", required=False, callback=bus_path)
@json_option
def list_rows(what: str, path: str | None, as_json: bool) -> None:
    """Show WHAT there is, of one bus or of all.

    WHAT is one of buses, endpoints, addresses, matches, queues and lanes.

    A bus's details are for its members, its master's user, the agent's user and root. The endpoint
    that asks is shown too.

    On a node of a cluster NODE says where each is, of buses where their master is. Of other nodes
    are shown those who own a name, and what a node wants to hear; the rest is known there alone,
    and so are queues and lanes: from whom to whom messages go past the agent, in how many bytes,
    and how many have gone so far.
    """
    from ..client.socket import Socket

    with Socket() as sock:
        print_rows(sock.listing(what, path), as_json)


@click.command(epilog=epilog("Examples:", "afbus monitor /demo", "afbus monitor /demo --json"))
@path_argument
@json_option
def monitor(path: str, as_json: bool) -> None:
    """Print copies of all messages on the bus PATH, until ended.

    The master has to allow it: `afbus bus create --allow-monitors`. What members ask a master of
    afbus, and what it answers, is shown in words.
    """
    from ..client.member import join
    from .run import Printing, run_until_ended

    async def work() -> None:
        async with join(path) as member:
            copies = await member.monitor().start()
            click.echo(f"monitoring as {member.address}", err=True)
            printing = Printing(as_json, master=member.master)
            await printing.run(copies, member.notices(others=False))

    run_until_ended(work())
