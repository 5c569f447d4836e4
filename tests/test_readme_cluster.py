"""Two hosts in five commands, as they stand in the README: each host a folder, and an address.

As root each host is a network namespace too; else all are on loopback, where only one can have the
usual ports on all addresses, so that each is told to listen on its own.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import pytest
from network import Network

from afbus.master.policy import Action, parse_policy
from afbus.node.place import MASTER_PORT, NODE_PORT
from afbus.proto.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).resolve().parent.parent
README: Final = (ROOT / "README.md").read_text()
SECTION: Final = README.partition("\n## Two hosts in five commands\n")[2].partition("\n## ")[0]
BLOCKS: Final = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
HOSTS: Final = ("hub", "desk")
#: The longest that a command may take, or be waited for.
LIMIT_S: Final = 30.0


class Command:
    """One command of the README: where it runs, its text, and whether it goes on."""

    def __init__(self, host: str, text: str) -> None:
        first, newline, rest = text.partition("\n")
        # What stands behind many blanks and a # is for people.
        first = re.sub(r"\s{2,}#.*", "", first)
        self.host = host
        self.goes_on = first.endswith(" &")
        self.text = first.removesuffix(" &") + newline + rest

    def __repr__(self) -> str:
        return f"{self.host}: {self.text}"


def find_commands(block: str) -> Iterator[Command]:
    """Return the commands of a block, in their order; `# on HOST` says where they run."""
    host, lines = "", iter(block.splitlines())
    for line in lines:
        if line.startswith("# on "):
            host = line.removeprefix("# on ").strip()
            continue
        text = line
        if (end := re.search("<<'(.+)'", line)) is not None:
            for more in lines:
                text += f"\n{more}"
                if more == end[1]:
                    break
        yield Command(host, text)


class Desk:
    """What runs on the hosts."""

    def __init__(self, network: Network, folder: Path, stack: ExitStack) -> None:
        self.network = network
        self.folder = folder
        self._stack = stack
        for host in HOSTS:
            (folder / host).mkdir()

    def _argv(self, command: Command) -> list[str]:
        text = command.text.replace("hub.example.org", self.network.address("hub"))
        if not self.network.has_namespaces:
            for begin, port in (("master run --", MASTER_PORT), ("node --", NODE_PORT)):
                listen = f"listen {self.network.address(command.host)}:{port} --"
                text = text.replace(f"afbus {begin}", f"afbus {begin}{listen}")
        # What goes on is the very process that is ended later.
        text = f"exec {text}" if command.goes_on else text
        return self.network.command(command.host, ["sh", "-ec", text])

    def _environment(self, host: str) -> dict[str, str]:
        programs = Path(sys.executable).parent
        door = str(self.folder / host / "node.sock")
        return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "AFBUS_NODE": door}

    def do(self, command: Command) -> str:
        """Run a command to its end, and return what it prints."""
        done = subprocess.run(
            self._argv(command),
            cwd=self.folder / command.host,
            env=self._environment(command.host),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command!r}: {done.stderr}"
        return done.stdout

    def start(self, command: Command) -> IO[bytes]:
        """Start a command that goes on, and wait for its first line."""
        process = subprocess.Popen(
            self._argv(command),
            cwd=self.folder / command.host,
            env=self._environment(command.host),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        self._stack.callback(end, process)
        assert process.stdout is not None
        line = read_line(process.stdout)
        assert process.poll() is None, f"{command!r}: {line}"
        return process.stdout

    def await_nodes(self, state: Path, names: Sequence[str]) -> None:
        """Wait until the master says that these nodes are live."""
        ask = Command("hub", f"afbus master nodes --json --state {shlex.quote(str(state))}")
        until = time.monotonic() + LIMIT_S
        while True:
            rows = [json.loads(line) for line in self.do(ask).splitlines()]
            if {row["node"] for row in rows if row["state"] == "live"} >= set(names):
                return
            assert time.monotonic() < until, rows


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process in good order, and at last at all costs."""
    process.terminate()
    try:
        process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
    finally:
        assert process.stdout is not None
        process.stdout.close()


def read_line(stream: IO[bytes]) -> str:
    """Return the next line, within the deadline."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        line = b""
        until = time.monotonic() + LIMIT_S
        while not line.endswith(b"\n"):
            assert selector.select(max(0.0, until - time.monotonic())), f"nothing behind {line!r}"
            byte = stream.read(1)
            if not byte:
                break
            line += byte
    return line.decode().rstrip()


def test_policy_of_the_readme_says_what_its_notes_say() -> None:
    """It loads, and what it does not name is denied."""
    text = BLOCKS[0].partition("<<'END'\n")[2].partition("END\n")[0]
    policy = parse_policy(text, "README.md")
    user = "uid/1000@desk"
    assert policy.decide(Action.BIND, user, b"/demo").is_allowed
    assert policy.decide(Action.OWN, user, b"/demo", b"demo.clock").is_allowed
    assert policy.decide(Action.SEND, user, b"/demo", b"demo.master").is_allowed
    assert not policy.decide(Action.OWN, user, b"/demo", b"other.clock").is_allowed
    assert not policy.decide(Action.BIND, user, b"/other").is_allowed
    assert not policy.decide(Action.MONITOR, user, b"/demo").is_allowed


def test_policies_of_the_docs_load() -> None:
    """All of them are what `afbus policy check` likes, and all keys are explained."""
    text = (ROOT / "docs/cluster.md").read_text()
    policies = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert policies
    for policy in policies:
        assert parse_policy(policy, "docs/cluster.md").rules
    with pytest.raises(ConfigError) as caught:
        parse_policy('[[rule]]\nno_key = ""')
    known = re.findall(r"\w+", str(caught.value).rpartition("there are")[2])
    assert len(known) > 7
    assert [key for key in known if f"\n| `{key}` |" not in text] == []


@pytest.mark.cluster
@pytest.mark.slow
def test_two_hosts_in_five_commands(tmp_path: Path) -> None:
    """A bus on both, by the commands of the README and nothing else; what is published arrives."""
    commands = [command for block in BLOCKS for command in find_commands(block)]
    assert sum(text.count("# on ") for text in BLOCKS) == 5
    with ExitStack() as stack:
        desk = Desk(stack.enter_context(Network(HOSTS)), tmp_path, stack)
        heard = None
        for command in commands:
            if not command.goes_on:
                said = desk.do(command)
            elif "afbus listen" in command.text:
                desk.await_nodes(tmp_path / "hub/master", HOSTS)
                heard = desk.start(command)
            else:
                desk.start(command)
            # "Carry it to desk."
            for token in (tmp_path / "hub").glob("desk.token"):
                shutil.copy(token, tmp_path / "desk")
        assert heard is not None
        assert read_line(heard).endswith("[clock.second zone=utc]: tick")
        assert [line.split()[0] for line in said.splitlines()[1:]] == sorted(HOSTS)
        for host in HOSTS:
            shown = desk.do(Command(host, "afbus status"))
            assert re.search("^master +here$", shown, re.MULTILINE), shown
            assert re.search("^(hub|desk) +open ", shown, re.MULTILINE), shown
