"""The services of the compose file as processes: their commands, settings, policy and volumes.

What an engine does is done here: a volume is a folder, a host name an address, an image the
interpreter of the test. Nothing else is changed in what the file says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.deploy.manifest import COMPOSE, find_port, load_all

from afbus.node.place import MASTER_PORT, NODE_PORT

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Who the applications are: in their containers this user, here whoever runs the test.
APPLICATION_UID = "10002"


class Engine:
    """Runs services of the compose file."""

    def __init__(self, folder: Path) -> None:
        self._compose = load_all(COMPOSE)[0]
        self._folder = folder
        self._where = {
            f"master:{MASTER_PORT}": f"127.0.0.1:{find_port()}",
            f"node-a:{NODE_PORT}": f"127.0.0.1:{find_port()}",
            f"node-b:{NODE_PORT}": f"127.0.0.1:{find_port()}",
        }
        self._running: list[subprocess.Popen[str]] = []
        for name in self._compose["volumes"]:
            (folder / name).mkdir()

    def write_token(self, name: str, token: str) -> None:
        """Put a token where a secret is."""
        (self._folder / name).write_text(token)

    def run(self, name: str, *words: str) -> str:
        """Run a service to its end, or another command in it; return what it prints."""
        command, environment = self._prepare(name, list(words))
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def start(self, name: str) -> subprocess.Popen[str]:
        """Start a service that runs on."""
        command, environment = self._prepare(name, [])
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        self._running.append(process)
        return process

    def await_health(self, name: str) -> None:
        """Wait until a service is healthy, as its health check says."""
        check = self._compose["services"][name]["healthcheck"]["test"]
        assert check[0] == "CMD"
        command, environment = self._prepare(name, check[1:])
        # Each try takes the time that a command takes; the deadline of the test ends this.
        while subprocess.run(command, env=environment, capture_output=True, check=False).returncode:
            assert self._running[-1].poll() is None, f"{name} has ended"

    def close(self) -> None:
        """End all, the last first."""
        for process in reversed(self._running):
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def _prepare(self, name: str, words: list[str]) -> tuple[list[str], dict[str, str]]:
        service = self._compose["services"][name]
        places = self._find_places(service)
        command = words or service.get("entrypoint", ["afbus"]) + service.get("command", [])
        made = [self._place(word, places) for word in command]
        if made[:3] == ["afbus", "node", "join"]:
            # The name of a node is that of its host, and here there is but one host.
            made += ["--name", service["hostname"]]
        elif made[:3] == ["afbus", "master", "run"]:
            made += ["--listen", self._where[f"master:{MASTER_PORT}"]]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        for key, value in service.get("environment", {}).items():
            environment[key] = self._place(value, places)
        if folder := places.get("/run/afbus"):
            environment["AFBUS_NODE"] = f"{folder}/node.sock"
        return made, environment

    def _find_places(self, service: dict[str, Any]) -> dict[str, str]:
        """What each path of a container is here; longer ones first."""
        places = {}
        for volume in service.get("volumes", ()):
            source, target = volume.split(":")[:2]
            places[target] = str(self._folder / source)
        for secret in service.get("secrets", ()):
            places[f"/run/secrets/{secret['target']}"] = str(self._folder / secret["source"])
        for config in service.get("configs", ()):
            source = COMPOSE.parent / self._compose["configs"][config["source"]]["file"]
            text = self._place(source.read_text(), places).replace(
                f"uid/{APPLICATION_UID}@", f"uid/{os.geteuid()}@"
            )
            if where := self._where.get(f"{service.get('hostname')}:{NODE_PORT}"):
                text = text.replace(f"[::]:{NODE_PORT}", where)
            made = self._folder / f"{service.get('hostname', '')}-{source.name}"
            made.write_text(text)
            places[config["target"]] = str(made)
        return dict(sorted(places.items(), reverse=True))

    def _place(self, text: str, places: dict[str, str]) -> str:
        for old, new in (*places.items(), *self._where.items()):
            text = text.replace(old, new)
        return text


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """What runs the services; the path of a socket must not be long."""
    made = Engine(tmp_path)
    yield made
    made.close()


@pytest.mark.cluster
def test_case38_cluster_of_the_compose_file(engine: Engine) -> None:
    """By the commands of README.md the reader at one node hears the clock at the other one."""
    for _ in range(2):
        # As with each `docker compose up`: the second time there is nothing to do.
        engine.run("master-init")
    engine.start("master")
    engine.await_health("master")
    for name in ("node-a", "node-b"):
        token = engine.run("master", "afbus", "token", "--name", name)
        engine.write_token(f"{name}-token", token)
        for _ in range(2):
            engine.run(f"{name}-join")
        # It was good once, and is not needed any more.
        engine.write_token(f"{name}-token", "")
        engine.run(f"{name}-join")
        engine.start(name)
        engine.await_health(name)
    engine.start("clock")
    heard = ""
    while not heard:
        # Until there is the bus it ends, and an engine starts it again.
        reader = engine.start("reader")
        assert reader.stdout is not None
        heard = reader.stdout.readline()
    assert "clock.second zone=utc" in heard
    assert "uid/" in engine.run("master", "afbus", "master", "audit")
