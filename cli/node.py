"""`afbus node` runs the agent of this host; `afbus status` asks one how it is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import click

from .argument import json_option
from .output import epilog, print_map, put


@click.command(
    epilog=epilog(
        "Examples:",
        "afbus node",
        "afbus node --door /tmp/bus/node.sock",
        "afbus node --config /etc/afbus/node.toml --verbose",
    )
)
@click.option("--door", type=click.Path(path_type=Path), help="Where clients come to the agent.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A TOML file of settings; the agent needs none.",
)
@click.option("--verbose", "-v", is_flag=True, help="Log what happens, to standard error.")
def node(door: Path | None, config_file: Path | None, verbose: bool) -> None:
    """Run the agent of this host, until SIGTERM or Ctrl-C; both are its ordinary end, exit code 0.

    Prints one line when clients may come. Without --door, and without a door in the file, that is
    AFBUS_NODE, else $XDG_RUNTIME_DIR/afbus/node.sock, or /run/afbus/node.sock for root.
    """
    import asyncio
    import logging

    from ..node.agent import run
    from ..node.config import Config, default_door, load_config

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    config = Config() if config_file is None else load_config(config_file)
    usual = default_door(os.environ, os.geteuid())
    place = config.door or usual if door is None else door.absolute()

    def tell() -> None:
        how = "by itself" if place == usual else f"with AFBUS_NODE={place}"
        put(f"afbus agent (pid {os.getpid()}) at {place}; a client finds it {how}")

    asyncio.run(run(replace(config, door=place), tell))


@click.command(epilog=epilog("Examples:", "afbus status", "afbus status --json | jq .endpoints"))
@json_option
def status(as_json: bool) -> None:
    """Show what the agent says of itself."""
    from ..client.socket import Socket

    with Socket() as sock:
        print_map(sock.status(), as_json)
