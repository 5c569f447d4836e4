"""`afbus node` runs the agent of this host, `node join` makes it one of a cluster; `status`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .argument import bearer_name, json_option
from .output import epilog, print_json, print_map, print_rows, put, show_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..link.carrier import Enrolled
    from ..node.config import Config
    from ..node.membership import Membership
    from ..proto.token import JoinToken

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
    from ..node.place import parse_listen, parse_place

    config = Config() if config_file is None else load_config(config_file)
    for place in places:
        _check("--place", parse_place, place)
    if listen is not None:
        _check("--listen", parse_listen, listen)
    if (listen or places) and not (cluster or config.cluster):
        raise click.UsageError("--listen and --place are for a node of a cluster: --cluster")
    return replace(
        config,
        cluster=cluster or config.cluster,
        listen=listen or config.listen,
        places=places or config.places,
    )


def _check(option: str, parse: Callable[[str], object], text: str) -> None:
    from ..proto.errors import ConfigError

    try:
        parse(text)
    except ConfigError as error:
        raise click.BadParameter(str(error), param_hint=repr(option)) from error


@node.command(
    epilog=epilog(
        "Examples:",
        "afbus node join --token-file token.txt --name desk master.example.org:4450",
        "afbus token | ssh desk afbus node join --token-file - --name desk master.example.org",
        "afbus node join --if-needed --token-file /run/secrets/token master.example.org",
    )
)
@click.argument("masters", metavar="MASTER...", nargs=-1, required=True)
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    required=True,
    help="What `afbus token` printed: a secret, so it is no argument. - is standard input.",
)
@click.option(
    "--name", callback=bearer_name, help="The name of the node; by default that of the host."
)
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default=STATE,
    show_default=True,
    help="The folder to make.",
)
@click.option("--again", is_flag=True, help="Replace what is in the folder.")
@click.option(
    "--if-needed",
    is_flag=True,
    help="Do nothing, and be done, where this host is that node already, with a certificate that "
    "is good; the token is not read then.",
)
@json_option
def join(  # noqa: PLR0913 (one for each option)
    masters: tuple[str, ...],
    token_file: Path,
    name: str | None,
    state: Path,
    again: bool,
    if_needed: bool,
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
    from ..proto.errors import ConfigError, LinkError, NoAgent

    for master in masters:
        _check("MASTER...", lambda text: parse_place(text, MASTER_PORT), master)
    places = [parse_place(master, MASTER_PORT) for master in masters]
    if (state / MEMBER).exists() and not again:
        if not if_needed:
            raise ConfigError("this host is a node already; --again replaces it", file=str(state))
        if (known := _find_membership(state, name)) is not None:
            _show_membership(known, as_json, is_new=False)
            return
    token = _read_token(token_file)
    enrolment = Enrolment(token, name or socket.gethostname(), state)

    async def ask() -> Enrolled:
        for place in places:
            try:
                return await enrol(place, token.root, enrolment.request, utc_now)
            except LinkError as error:
                failure = error
        if failure.retryable:
            raise NoAgent(f"no master answers: {failure}") from failure
        raise failure

    _silence_quic()
    enrolled = asyncio.run(ask())
    shown = tuple(format_place(*place) for place in places)
    _show_membership(enrolment.settle(enrolled, shown, utc_now()), as_json, is_new=True)


def _read_token(file: Path) -> JoinToken:
    from ..proto.errors import ConfigError
    from ..proto.token import JoinToken

    try:
        text = sys.stdin.read() if file == Path("-") else file.read_text()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(file)) from error
    except ValueError as error:
        raise ConfigError("is no text", file=str(file)) from error
    if not text.strip():
        raise ConfigError("is empty; `afbus token` prints what belongs there", file=str(file))
    try:
        return JoinToken.parse(text)
    except ConfigError as error:
        raise ConfigError(str(error), file=str(file)) from error


def _find_membership(state: Path, name: str | None) -> Membership | None:
    """Return what this host is already; None if its certificate is over.

    Raises:
        ConfigError: It is another node, or the folder is not what `join` has made.
    """
    from ..node.membership import load, utc_now
    from ..proto.errors import ConfigError

    made = load(state)
    if name is not None and made.identity.name != name:
        text = f"this host is node {made.identity.name} already, and not {name}"
        raise ConfigError(text, file=str(state))
    return made if made.certificate.not_valid_after_utc > utc_now() else None


def _show_membership(made: Membership, as_json: bool, *, is_new: bool) -> None:
    until, who, state = made.certificate.not_valid_after_utc, made.identity, str(made.folder)
    if as_json:
        about = {"cluster": who.cluster, "node": who.name, "until": until, "state": state}
        print_json({**about, "is_new": is_new})
        return
    since = "" if is_new else " since before"
    put(f"node {who.name} of cluster {who.cluster}{since}, in {state}")
    put(
        f"its certificate is good until {show_time(until)}, and renewed by its "
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
    if as_json:
        print_json(values)
        return
    if cluster is None:
        print_map(_with_time(values, "started"), as_json)
        return
    print_map(_with_time(values, "started", leave_out="cluster"), as_json)
    put("")
    print_map(_with_time(cluster, "certificate_until", leave_out="peers"), as_json)
    put("")
    if cluster["peers"]:
        print_rows(cluster["peers"], as_json)
    else:
        put("no other nodes")


def _with_time(values: dict[str, Any], key: str, *, leave_out: str = "") -> dict[str, Any]:
    """Return what people read in lines: with a time as such, and without what has its own table."""
    made = {one: value for one, value in values.items() if one != leave_out}
    return {**made, key: datetime.fromisoformat(made[key])}
