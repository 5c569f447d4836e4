"""`afbus node` runs the agent of this host, `node join` makes it one of a cluster; `status`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from .argument import json_option
from .output import epilog, print_json, print_map, print_rows, put

if TYPE_CHECKING:
    from ..link.carrier import Enrolled
    from ..node.config import Config

#: Where root's node keeps who it is in its cluster.
STATE = Path("/var/lib/afbus-node")


@click.group(
    invoke_without_command=True,
    epilog=epilog(
        "Examples:",
        "afbus node",
        "afbus node --door /tmp/bus/node.sock",
        "afbus node --config /etc/afbus/node.toml --verbose",
        "afbus node --cluster /var/lib/afbus-node      after `afbus node join`",
        "afbus node --cluster ./desk --listen 192.0.2.7:4451 --place desk.example.org:4451",
    ),
)
@click.option("--door", type=click.Path(path_type=Path), help="Where clients come to the agent.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A TOML file of settings; the agent needs none.",
)
@click.option(
    "--cluster",
    type=click.Path(file_okay=False, path_type=Path),
    help="Be a node of a cluster: the folder that `afbus node join` has made.",
)
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="Address and UDP port for the other nodes of the cluster; by default [::]:4451.",
)
@click.option(
    "--place",
    "places",
    metavar="HOST:PORT",
    multiple=True,
    help="Where they are told to reach this node; by default at the address of --listen, or if "
    "that is all addresses, at the one towards the master. May be repeated.",
)
@click.option("--verbose", "-v", is_flag=True, help="Log what happens, to standard error.")
@click.pass_context
def node(  # noqa: PLR0913 (one for each option)
    context: click.Context,
    door: Path | None,
    config_file: Path | None,
    cluster: Path | None,
    listen: str | None,
    places: tuple[str, ...],
    verbose: bool,
) -> None:
    """Run the agent of this host, until SIGTERM or Ctrl-C; both are its ordinary end, exit code 0.

    Prints one line when clients may come. Without --door, and without a door in the file, that is
    AFBUS_NODE, else $XDG_RUNTIME_DIR/afbus/node.sock, or /run/afbus/node.sock for root.

    Without --cluster, and without a cluster in the file, it uses no network.
    """
    if context.invoked_subcommand is not None:
        return
    import asyncio
    import logging

    from ..node.agent import run
    from ..node.config import default_door

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    _silence_quic()
    config = _configure(config_file, cluster, listen, places)
    usual = default_door(os.environ, os.geteuid())
    place = config.door or usual if door is None else door.absolute()

    def tell() -> None:
        how = "by itself" if place == usual else f"with AFBUS_NODE={place}"
        put(f"afbus agent (pid {os.getpid()}) at {place}; a client finds it {how}")

    asyncio.run(run(replace(config, door=place), tell))


def _silence_quic() -> None:
    """Keep what QUIC itself says of each connection off standard error: our own lines tell why."""
    import logging

    logging.getLogger("quic").setLevel(logging.CRITICAL)


def _configure(
    config_file: Path | None, cluster: Path | None, listen: str | None, places: tuple[str, ...]
) -> Config:
    """Return the settings of the file, changed by the options."""
    from ..node.config import Config, load_config
    from ..node.place import parse_place

    config = Config() if config_file is None else load_config(config_file)
    for place in (*places, *filter(None, [listen])):
        parse_place(place)
    return replace(
        config,
        cluster=cluster or config.cluster,
        listen=listen or config.listen,
        places=places or config.places,
    )


@node.command(
    epilog=epilog(
        "Examples:",
        "afbus node join --token-file token.txt --name desk master.example.org:4450",
        "afbus token | ssh desk afbus node join --token-file - --name desk master.example.org",
    )
)
@click.argument("masters", metavar="MASTER...", nargs=-1, required=True)
@click.option(
    "--token-file",
    type=click.File(),
    required=True,
    help="What `afbus token` printed: a secret, so it is no argument. - is standard input.",
)
@click.option("--name", help="The name of the node; by default that of the host.")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default=STATE,
    show_default=True,
    help="The folder to make.",
)
@click.option("--again", is_flag=True, help="Replace what is in the folder.")
@json_option
def join(  # noqa: PLR0913 (one for each option)
    masters: tuple[str, ...],
    token_file: TextIO,
    name: str | None,
    state: Path,
    again: bool,
    as_json: bool,
) -> None:
    """Make this host a node of the cluster whose master is at MASTER: HOST:PORT, or HOST.

    The port is 4450 if none is given; of several places the first that answers is taken. The token
    proves the master to this host, and this host to the master, once. A key is made here, and a
    certificate for it comes from the master. The agent renews it by itself; a host that was off
    for more than half a day may need another token.

    Then run `afbus node --cluster FOLDER`, or write `cluster = "FOLDER"` in its file of settings.
    """
    import asyncio
    import socket

    from ..link.quic import enrol
    from ..node.membership import MEMBER, Enrolment, utc_now
    from ..node.place import MASTER_PORT, format_place, parse_place
    from ..proto.errors import ConfigError, LinkError
    from ..proto.token import JoinToken

    token = JoinToken.parse(token_file.read())
    if not again and (state / MEMBER).exists():
        raise ConfigError("this host is a node already; --again replaces it", file=str(state))
    places = [parse_place(master, MASTER_PORT) for master in masters]
    enrolment = Enrolment(token, name or socket.gethostname(), state)

    async def ask() -> Enrolled:
        for place in places:
            try:
                return await enrol(place, token.root, enrolment.request, utc_now)
            except LinkError as error:
                failure = error
        raise failure

    _silence_quic()
    enrolled = asyncio.run(ask())
    shown = tuple(format_place(*place) for place in places)
    made = enrolment.settle(enrolled, shown, utc_now())
    until = made.certificate.not_valid_after_utc
    if as_json:
        about = {"cluster": made.identity.cluster, "node": made.identity.name}
        print_json({**about, "until": until.isoformat(), "state": str(state)})
    else:
        put(f"node {made.identity.name} of cluster {made.identity.cluster}, in {state}")
        put(
            f"its certificate is good until {until:%Y-%m-%d %H:%M:%S} UTC, and renewed by its "
            f"agent: afbus node --cluster {state}"
        )


@click.command(epilog=epilog("Examples:", "afbus status", "afbus status --json | jq .endpoints"))
@json_option
def status(as_json: bool) -> None:
    """Show what the agent says of itself, and of the cluster if it is a node of one.

    MASTER is here, away (for less than 2 s), or lost. LINK to another node is none (nothing was to
    be said), opening, open, silent, relayed (by way of the master) or lost.
    """
    from ..client.socket import Socket

    with Socket() as sock:
        values = sock.status()
    cluster = values.get("cluster")
    if as_json or cluster is None:
        print_map(values, as_json)
        return
    print_map({key: value for key, value in values.items() if key != "cluster"}, as_json)
    put("")
    print_map({key: value for key, value in cluster.items() if key != "peers"}, as_json)
    put("")
    print_rows(cluster["peers"], as_json)
