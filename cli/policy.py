"""Policies of clusters: `afbus policy` checks one, and tells what it means."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import click

from .argument import json_option
from .output import epilog, print_json, put

_ACTOR: Final = re.compile(r"principal/[^/*@]+|uid/[0-9]+@[^/*@]+")


@click.group(epilog=epilog("Examples:", "afbus policy check /etc/afbus/policy.toml"))
def policy() -> None:
    """Look at a policy: who may do what in a cluster."""


def _actor(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Return principal/NAME or uid/NUMBER@NODE: of whom a policy speaks."""
    if _ACTOR.fullmatch(value) is None:
        raise click.BadParameter(f"{value!r} is none of principal/NAME, uid/NUMBER@NODE")
    return value


_policy_argument = click.argument(
    "file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE"
)


@policy.command(
    epilog=epilog(
        "Examples:",
        "afbus policy check policy.toml && systemctl kill -s HUP afbus-master",
    )
)
@_policy_argument
@json_option
def check(file: Path, as_json: bool) -> None:
    """Check FILE; what is wrong is told with file, line and key, and exit code 2."""
    from ..master.policy import load_policy

    rules = load_policy(file).rules
    if as_json:
        print_json({"file": str(file), "rules": [rule.name for rule in rules]})
    else:
        names = ", ".join(rule.name for rule in rules)
        count = f"{len(rules)} {'rule' if len(rules) == 1 else 'rules'}"
        put(f"{file}: {count}{': ' + names if names else ', so nobody may do anything'}")


@policy.command(
    epilog=epilog(
        "Examples:",
        "afbus policy explain policy.toml uid/1000@node-a bind /counters",
        "afbus policy explain policy.toml principal/alice own /counters org.example.a",
        "afbus policy explain policy.toml principal/alice receive /counters topic:counters.cpu",
    )
)
@_policy_argument
@click.argument("who", callback=_actor)
@click.argument("action", type=click.Choice(["own", "send", "receive", "bind", "monitor"]))
@click.argument("bus")
@click.argument("target", required=False)
@json_option
def explain(  # noqa: PLR0913 (one for each argument)
    file: Path, who: str, action: str, bus: str, target: str | None, as_json: bool
) -> None:
    """Tell whether FILE lets WHO do ACTION on BUS, and by which rule; exit code 1 if not.

    WHO is principal/NAME or uid/NUMBER@NODE. TARGET is an address, or topic:TOPIC for multicasts;
    `topic:` alone is one about nothing, which to receive is to hear everything.
    """
    from ..master.policy import Action, load_policy
    from ..proto.errors import Denied
    from ..proto.terms import Terms

    wants = Action(action)
    takes_target = wants in (Action.OWN, Action.SEND, Action.RECEIVE)
    if takes_target is (target is None):
        raise click.UsageError(f"{action} {'needs a' if takes_target else 'has no'} TARGET")
    is_multicast = target is not None and target.startswith("topic:")
    what = None if target is None else os.fsencode(target)
    about = Terms.parse(target.removeprefix("topic:")) if target and is_multicast else what
    decision = load_policy(file).decide(
        wants, who, os.fsencode(bus), about, is_multicast=is_multicast
    )
    if as_json:
        fields = {"is_allowed": decision.is_allowed, "rule": decision.rule or None}
        print_json({**fields, "reason": decision.reason or None})
    elif decision.is_allowed:
        put(f"allowed by rule {decision.rule!r}")
    if not decision.is_allowed:
        raise Denied(decision.reason)
