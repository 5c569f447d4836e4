"""Each command line and each setting in deploy/ is one that afbus knows."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner
from tests.cases.actors import PATIENCE_S
from tests.deploy.manifest import COMPOSE, DEPLOY, KUBERNETES, Line, find_commands, load_all

import afbus
from afbus.cli.main import afbus as command
from afbus.client.door import find_door
from afbus.master.policy import Action, Policy, parse_policy
from afbus.node.config import parse_config
from afbus.node.place import NODE_PORT, parse_listen
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cases.conftest import Node


def find_leaves(group: click.Group) -> Iterator[click.Command]:
    """All commands below a group, and those groups that are commands too."""
    for one in group.commands.values():
        if isinstance(one, click.Group):
            yield from find_leaves(one)
        if not isinstance(one, click.Group) or one.invoke_without_command:
            yield one


COMMANDS = {f"{line.where}: {' '.join(line.words)}": line for line in find_commands()}


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_command_line_is_understood(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command exists, and takes these options and arguments."""
    for leaf in find_leaves(command):
        monkeypatch.setattr(leaf, "callback", lambda **_: None)
    # The files are on another machine.
    for kind in (click.Path, click.File):
        monkeypatch.setattr(kind, "convert", lambda _self, value, _param, _context: value)
    # Here Kubernetes and the shell put something.
    given = [re.sub(r"\$\(?\w+\)?", "10.0.0.1", word) for word in line.words[1:]]
    done = CliRunner().invoke(command, given, standalone_mode=True)
    assert done.exit_code == 0, done.output


def read_texts(name: str) -> dict[str, str]:
    """All files of this name in deploy/, also those within a ConfigMap."""
    found = {str(path.relative_to(DEPLOY)): path.read_text() for path in DEPLOY.rglob(name)}
    for path in KUBERNETES.glob("*.yaml"):
        for one in load_all(path):
            if name in one.get("data", {}):
                found[path.name] = one["data"][name]
    return found


SETTINGS = read_texts("node.toml")
#: Where a node keeps who it is, by the folder of its settings; `` is that of Kubernetes.
STATES = {"systemd": "/var/lib/afbus-node", "compose": "/var/lib/afbus", "": "/var/lib/afbus"}


@pytest.mark.parametrize("where", SETTINGS)
def test_each_setting_of_the_node_exists(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is accepted, and its door is where applications look without being told."""
    monkeypatch.delenv("AFBUS_NODE", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    # What is there for a cluster, too, may be taken in as it stands.
    text = re.sub("^#(?=[a-z])", "", SETTINGS[where], flags=re.MULTILINE)
    settings = parse_config(tomllib.loads(text), where)
    assert settings.door == find_door()
    assert settings.mode == 0o666
    assert settings.cluster == Path(STATES[Path(where).parent.name])
    assert parse_listen(settings.listen) == ("::", NODE_PORT)


def test_what_is_made_once_is_looked_for_where_it_is() -> None:
    """What makes a cluster or a node ends well where that was made before."""
    lines = [line for line in find_commands() if line.where != "README.md"]
    for action, count in ((("master", "init"), 2), (("node", "join"), 3)):
        made = [line.words for line in lines if line.words[1:3] == action]
        assert len(made) == count
        assert all("--if-needed" in words for words in made)


POLICIES = {where: parse_policy(text, where) for where, text in read_texts("policy.toml").items()}


def test_there_are_settings_and_policies() -> None:
    """Nothing was passed over because it is called otherwise."""
    assert set(SETTINGS) == {"compose/node.toml", "systemd/node.toml", "node.yaml"}
    assert set(POLICIES) == {"compose/policy.toml", "policy.yaml"}
    assert len(set(read_texts("clock.py").values())) == 1


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_d9_applications_may_do_what_they_do(policy: Policy) -> None:
    """The clock may make its bus, own its names and tell the time; others may listen."""
    clock, reader = "uid/10002@node-a", "uid/10002@node-b"
    for principal, action, target in (
        (clock, Action.BIND, None),
        (clock, Action.OWN, b"demo.master"),
        (clock, Action.OWN, b"demo.clock"),
        (reader, Action.OWN, b"demo.reader"),
        (reader, Action.SEND, b"demo.master"),
    ):
        assert policy.decide(action, principal, b"/demo", target).is_allowed
    for principal, action, topic in (
        (clock, Action.SEND, "clock.second zone=utc"),
        (reader, Action.RECEIVE, "clock"),
    ):
        terms = Terms.parse(topic)
        assert policy.decide(action, principal, b"/demo", terms, is_multicast=True).is_allowed
    for principal, path in (("uid/0@node-a", b"/demo"), (clock, b"/other")):
        assert not policy.decide(Action.BIND, principal, path).is_allowed
    assert not policy.decide(
        Action.RECEIVE, reader, b"/demo", Terms(), is_multicast=True
    ).is_allowed


@pytest.mark.cluster
def test_application_of_the_examples_runs(node: Node) -> None:
    """Who listens hears what time it is."""
    node.start()
    environment = {**os.environ, "AFBUS_NODE": str(node.place)}
    program = [sys.executable, str(COMPOSE.parent / "clock.py"), "host"]
    clock = subprocess.Popen(program, env=environment)
    try:
        listen = [
            "listen",
            "/demo",
            "clock",
            "--count",
            "1",
            "--timeout",
            str(PATIENCE_S),
            "--json",
        ]
        # The bus is there a moment after the program has started.
        with afbus.socket(node=node.place) as one:
            while not one.listing("buses"):
                os.sched_yield()
        done = subprocess.run(
            [sys.executable, "-m", "afbus.cli", *listen],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert datetime.now(UTC).isoformat()[:10] in done.stdout
    finally:
        clock.send_signal(signal.SIGINT)
        clock.wait()
