"""The files of deploy/ as the tests read them, and the command lines in them."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from tests.deploy.unit import Unit

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent.parent
DEPLOY: Final = ROOT / "deploy"
CONTAINERFILE: Final = DEPLOY / "Containerfile"
COMPOSE: Final = DEPLOY / "compose" / "compose.yaml"
KUBERNETES: Final = DEPLOY / "kubernetes"

#: What may stand before the word `afbus` without its being a command there.
_NOT_BEFORE: Final = {"-t", "-n", "-u", "--namespace", "namespace"}


def run_tool(*command: object) -> str:
    """Run a tool, which must not fail; return what it says."""
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def find_port() -> int:
    """A port of UDP that was free a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def load_all(path: Path) -> list[Any]:
    """All documents of a YAML file, in which no key may stand twice."""
    text = path.read_text()
    for document in yaml.compose_all(text, yaml.SafeLoader):
        _check_keys(document)
    return list(yaml.safe_load_all(text))


def _check_keys(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"a key stands twice: {node.start_mark}"
        for _, value in node.value:
            _check_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _check_keys(one)


@dataclass(frozen=True)
class Line:
    """A command line, and the file that it stands in."""

    where: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """One instruction of the container file; continued lines are joined."""

    name: str
    text: str


def read_instructions() -> list[Instruction]:
    """The instructions of the container file."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        Instruction(*line.split(" ", 1)) for line in joined.splitlines() if line and line[0] != " "
    ]


def read_objects() -> list[dict[str, Any]]:
    """All objects of Kubernetes, the Secret too, but for the list of files."""
    files = sorted(KUBERNETES.glob("*.yaml"))
    return [one for file in files if file.stem != "kustomization" for one in load_all(file)]


def find_pod(workload: dict[str, Any]) -> dict[str, Any] | None:
    """The pod of a workload, None if it is none."""
    found: dict[str, Any] | None = workload.get("spec", {}).get("template")
    return found


def find_containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """All containers of a pod."""
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


def _find_within(where: str, words: list[str]) -> Iterator[Line]:
    """The commands of a command line, which may be a shell's."""
    if words[:1] == ["sh"]:
        for part in re.split(r"\|\||&&|;", words[-1]):
            yield from _find_within(where, shlex.split(part))
        return
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        if word == "afbus" and before not in _NOT_BEFORE:
            rest = words[place:]
            # What follows is the shell's.
            end = rest.index(">") if ">" in rest else len(rest)
            yield Line(where, tuple(rest[:end]))
            return


def find_commands() -> list[Line]:
    """Each command line of afbus in deploy/."""
    found = [
        Line(str(path.relative_to(DEPLOY)), tuple(Unit(path).command))
        for path in sorted(DEPLOY.rglob("*.service"))
    ]
    last = {one.name: one.text for one in read_instructions()}
    entry, default = yaml.safe_load(last["ENTRYPOINT"]), yaml.safe_load(last["CMD"])
    found.append(Line("Containerfile", (*entry, *default)))
    for name, service in load_all(COMPOSE)[0]["services"].items():
        where = f"compose.yaml, {name}"
        words = service.get("entrypoint", entry) + service.get("command", [])
        found += _find_within(where, words)
        if probe := service.get("healthcheck"):
            found += _find_within(f"{where}, healthcheck", probe["test"][1:])
    for workload in read_objects():
        pod = find_pod(workload)
        for container in find_containers(pod) if pod else ():
            where = f"{workload['metadata']['name']}, {container['name']}"
            words = container.get("command", entry) + container.get("args", [])
            found += _find_within(where, words)
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                if kind in container:
                    command = container[kind]["exec"]["command"]
                    found += _find_within(f"{where}, {kind}", command)
    readme = (DEPLOY / "README.md").read_text()
    for line in re.findall(r"^    (\S.*)$", readme, re.MULTILINE):
        found += _find_within("README.md", shlex.split(line, comments=True))
    return found
