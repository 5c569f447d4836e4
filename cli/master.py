"""The master of a cluster: `afbus master`, `afbus token`, `afbus revoke`, where its state is."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .argument import bearer, bearer_name, json_option
from .output import epilog, print_json, print_map, print_rows, put, show_time, utc_time

if TYPE_CHECKING:
    from ..master.directory import Directory

state_option = click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="AFBUS_MASTER",
    default="/var/lib/afbus-master",
    show_default=True,
    help="The folder with the state of the master; also AFBUS_MASTER.",
)


def _directory(state: Path) -> Directory:
    from ..master.directory import Directory

    return Directory(state.absolute())


def _ask(state: Path, op: str, **args: Any) -> Any:
    """Ask the master that runs with a state, as its operator."""
    from ..master.door import ask_master
    from ..proto.operation import ClusterOp

    directory = _directory(state)
    directory.check()
    return ask_master(directory.door, ClusterOp[op], **args)


@click.group(
    epilog=epilog(
        "Examples:",
        "afbus master init --state /var/lib/afbus-master --root-key /media/drawer/root.key demo",
        "afbus master run --state /var/lib/afbus-master",
        "afbus token --name worker-1 > token.txt       then, on that host, afbus node join",
    )
)
def master() -> None:
    """Make, run and look after the master of a cluster.

    A cluster is several hosts with one bus system. Its master says who belongs to it, who may do
    what, and which node has which addresses; messages do not pass through it.
    """


@master.command(
    epilog=epilog(
        "Examples:",
        "afbus master init --state ./demo demo",
        "afbus master init --root-key /media/drawer/root.key demo",
        "afbus master init --if-needed demo            at each start of a container",
    )
)
@state_option
@click.option(
    "--root-key",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where the key of the root is put: it is needed once a year, and belongs in a drawer.",
)
@click.option(
    "--if-needed", is_flag=True, help="Do nothing, and be done, where a cluster was made already."
)
@click.argument("cluster", callback=bearer_name)
@json_option
def init(state: Path, root_key: Path | None, if_needed: bool, cluster: str, as_json: bool) -> None:
    """Make the cluster CLUSTER: its keys, and a policy that allows nothing yet.

    The folder must be new or empty; nothing is ever overwritten.
    """
    directory = _directory(state)
    if if_needed and directory.root.exists():
        _check_made(directory, cluster)
        if as_json:
            print_json({"cluster": cluster, "state": str(directory.path), "root_key": None})
        else:
            put(f"cluster {cluster} was made before, in {directory.path}")
        return
    now_utc = datetime.now(UTC).timestamp()
    directory.make(cluster, now_utc, os.urandom, None if root_key is None else root_key.absolute())
    key = root_key or directory.root_key
    if as_json:
        print_json({"cluster": cluster, "state": str(directory.path), "root_key": str(key)})
        return
    put(f"cluster {cluster} is made, in {directory.path}")
    put(f"the key of its root is {key}: keep it elsewhere; `afbus master renew` needs it in a year")
    put(f"who may do what stands in {directory.policy}: nobody may do anything yet")


def _check_made(directory: Directory, cluster: str) -> None:
    """Check that what is there is the cluster that is wanted; ConfigError if not."""
    from ..proto.errors import ConfigError

    made = directory.load().cluster
    if made != cluster:
        raise ConfigError(f"is the state of the cluster {made}", file=str(directory.path))


def _listen_address(
    _context: click.Context, _parameter: click.Parameter, value: str
) -> tuple[str, int]:
    """Return host and port to listen at; as for nodes, both may be left out, but not both."""
    from ..node.place import MASTER_PORT, parse_listen
    from ..proto.errors import ConfigError

    try:
        return parse_listen(value, MASTER_PORT)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error


@master.command(
    epilog=epilog(
        "Examples:",
        "afbus master run --state ./demo --listen 127.0.0.1:4450",
        "afbus master run --policy /etc/afbus/policy.toml --verbose",
        "kill -HUP PID                                 read the policy again",
    )
)
@state_option
@click.option(
    "--listen",
    "address",
    default="[::]:4450",
    show_default=True,
    callback=_listen_address,
    help="Address and UDP port for nodes; `:PORT` is all addresses, port 0 a free one.",
    metavar="HOST:PORT",
)
@click.option(
    "--policy",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Who may do what; by default policy.toml of the state.",
)
@click.option("--verbose", "-v", is_flag=True, help="Log what happens, to standard error.")
@json_option
def run(
    state: Path, address: tuple[str, int], policy: Path | None, verbose: bool, as_json: bool
) -> None:
    """Be the master of the cluster of this state, until SIGTERM or Ctrl-C.

    Prints one line when nodes may come. SIGHUP makes it read its policy again; one that is wrong
    is not followed. When the master ends, nodes go on with what they have.
    """
    import asyncio
    import logging

    from ..master.service import Config
    from ..master.service import run as run_master
    from ..node.agent import notify_service

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    # What QUIC itself tells of each connection stands in our own lines already.
    logging.getLogger("quic").setLevel(logging.ERROR)
    directory = _directory(state)

    def tell(host: str, port: int) -> None:
        notify_service("READY=1")
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if as_json:
            print_json({"state": str(directory.path), "host": host, "port": port})
        else:
            put(f"afbus master (pid {os.getpid()}) at {shown}, state {directory.path}")

    host, port = address
    config = Config(directory.path, host, port, None if policy is None else policy.absolute())
    asyncio.run(run_master(config, tell))


@master.command(
    "status",
    epilog=epilog("Examples:", "afbus master status", "afbus master status --json | jq .live"),
)
@state_option
@json_option
def status_of(state: Path, as_json: bool) -> None:
    """Show how the cluster is, as its master sees it."""
    values = _ask(state, "STATUS")
    print_map({**values, "issuing_until": utc_time(values["issuing_until"])}, as_json)


@master.command(
    "nodes",
    epilog=epilog("Examples:", "afbus master nodes", "afbus master nodes --json | jq .node"),
)
@state_option
@json_option
def list_nodes(state: Path, as_json: bool) -> None:
    """List the nodes of the cluster: who is live, what it has, until when its certificate is good.

    LAG counts the versions of the table that a node has not acknowledged; none: it has no link.
    """
    rows: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        value = _ask(state, "NODES", after=after)
        rows += [{**row, "until": utc_time(row["until"])} for row in value["rows"]]
        after = value["next"]
        if after is None:
            break
    print_rows(rows, as_json)


@master.command(
    epilog=epilog(
        "Examples:",
        "afbus master audit",
        "afbus master audit --last 100 --json",
        "afbus master audit --after 4711               what came behind entry 4711",
    )
)
@state_option
@click.option(
    "--after", type=click.IntRange(0), default=0, help="Only what came behind this entry."
)
@click.option("--last", type=click.IntRange(1), default=50, show_default=True, help="How many.")
@json_option
def audit(state: Path, after: int, last: int, as_json: bool) -> None:
    """Show who did, or was refused, what: links, enrolment, certificates, buses, names, rights.

    The master need not run.
    """
    from ..master.journal import read_audit

    directory = _directory(state)
    directory.check()
    entries = read_audit(directory.journal, after, last)
    for number, one in entries:
        time = utc_time(one.utc)
        if as_json:
            print_json(
                {
                    "number": number,
                    "time": time,
                    "actor": one.actor,
                    "action": one.action,
                    "subject": one.subject or None,
                    "is_done": one.is_done,
                    "detail": one.detail,
                }
            )
        else:
            what = " ".join(
                filter(None, (one.action, one.subject, "" if one.is_done else "REFUSED"))
            )
            put(f"{number} {show_time(time)} {_shown(f'{one.actor}: {what}: {one.detail}')}")
    if not entries and not as_json:
        click.echo("none", err=True)


def _shown(text: str) -> str:
    """Return a line for people; strangers' words must not reach a terminal as control codes."""
    from .output import show_text

    return show_text(text).removesuffix(": ")


@master.command(
    epilog=epilog(
        "Examples:",
        "afbus master issue alice --out ./alice",
        "afbus master issue backup --out /etc/backup --life 604800",
    )
)
@state_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The folder for PRINCIPAL.key, PRINCIPAL.pem and root.pem.",
)
@click.option(
    "--life",
    "life_s",
    type=click.IntRange(1),
    help="Seconds that it is good; by default a day, at most a week.",
)
@click.argument("principal", callback=bearer_name)
@json_option
def issue(state: Path, out: Path, life_s: int | None, principal: str, as_json: bool) -> None:
    """Issue a certificate for PRINCIPAL: an application or a person, on whatever node."""
    from ..master.directory import check_no_credentials, write_credentials
    from ..master.issuer import make_key, make_request

    # Before it is issued, and good for whoever gets hold of it.
    check_no_credentials(out, principal)
    key = make_key()
    value = _ask(state, "ISSUE", principal=principal, csr=make_request(key), life_s=life_s)
    write_credentials(out, principal, key, value["chain"], value["root"])
    until = utc_time(value["until"])
    if as_json:
        print_json({"principal": principal, "out": str(out), "until": until})
    else:
        put(f"principal/{principal} has a certificate until {show_time(until)}, in {out}")


@master.command(
    epilog=epilog(
        "Examples:",
        "afbus master renew --root-key /media/drawer/root.key",
        "then start the master again: it reads the certificate at its start",
    )
)
@state_option
@click.option(
    "--root-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The key of the root; by default that of the state.",
)
@json_option
def renew(state: Path, root_key: Path | None, as_json: bool) -> None:
    """Make a new issuing certificate, for another year, with the key of the root."""
    until = utc_time(_directory(state).renew(root_key, datetime.now(UTC).timestamp(), os.urandom))
    if as_json:
        print_json({"issuing_until": until})
    else:
        put(f"the issuing certificate is good until {show_time(until)}; start the master again")


@click.command(
    epilog=epilog(
        "Examples:",
        "afbus token --name worker-1 > token.txt",
        "afbus token --ephemeral --life 600            for a container that comes and goes",
    )
)
@state_option
@click.option(
    "--name",
    "node",
    callback=bearer_name,
    help="The only node that may use it; by default any that is new.",
)
@click.option(
    "--life",
    "life_s",
    type=click.IntRange(1),
    help="Seconds that it is good; by default an hour, at most 30 days.",
)
@click.option("--ephemeral", is_flag=True, help="Forget the node soon after it is lost.")
@json_option
def token(
    state: Path, node: str | None, life_s: int | None, ephemeral: bool, as_json: bool
) -> None:
    """Print a token by which one node can join the cluster, once.

    It is a secret. The node uses it with `afbus node join`.
    """
    value = _ask(state, "TOKEN", node=node, life_s=life_s, is_ephemeral=ephemeral)
    until = utc_time(value["until"])
    if as_json:
        print_json({"token": value["token"], "until": until, "node": node})
    else:
        put(value["token"])
        click.echo(f"good until {show_time(until)}, for {node or 'any new node'}", err=True)


@click.command(
    epilog=epilog(
        "Examples:",
        "afbus revoke node/worker-1 --reason stolen",
        "afbus revoke principal/alice",
        "afbus revoke serial/a06d4c7085ac3f7f          one certificate, by its number",
    )
)
@state_option
@click.option("--reason", help="Stands in the audit, and is what the revoked one reads.")
@click.argument("subject", callback=bearer)
@json_option
def revoke(state: Path, reason: str | None, subject: str, as_json: bool) -> None:
    """Put SUBJECT out of the cluster: node/NAME, principal/NAME or serial/HEX.

    Its links are cut and its certificates are void at once. The command returns when all live nodes
    know. Who was revoked may come back with a new token, or a new certificate.
    """
    value = _ask(state, "REVOKE", subject=subject, reason=reason)
    if as_json:
        print_json({"subject": subject, "serials": value["serials"]})
    else:
        put(f"{subject} is revoked: serial {', '.join(value['serials'])}")
