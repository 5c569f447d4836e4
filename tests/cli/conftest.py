"""What the tests of the command share: an agent of their own, and commands as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMAND = (sys.executable, "-m", "afbus.cli")


class Done(NamedTuple):
    """What came of a command: exit code, standard output, standard error."""

    code: int
    out: str
    complaint: str

    def objects(self) -> list[dict[str, Any]]:
        """The JSON objects that it printed, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]


class Running:
    """A command that runs on."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def line(self) -> str:
        """The next line that it prints; the deadline of the test ends the wait."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def notice(self, event: str) -> str:
        """The next notice of an event; others may come before it, such as of unread answers."""
        while not (line := self.line()).startswith(f"notice: {event} "):
            assert line.startswith("notice: "), line
        return line

    def message(self) -> str:
        """The next line that it prints and that is no notice."""
        while (line := self.line()).startswith("notice: "):
            pass
        return line

    def object(self) -> dict[str, Any]:
        """The next line that it prints, a JSON object."""
        made: dict[str, Any] = json.loads(self.line())
        return made

    def complaint(self) -> str:
        """The next line that it prints on standard error."""
        assert self._process.stderr is not None
        return self._process.stderr.readline().rstrip("\n")

    def end(self, number: signal.Signals = signal.SIGTERM) -> Done:
        """Send it a signal and return what came of it, and what it had not printed yet."""
        self._process.send_signal(number)
        return self.rest()

    def rest(self) -> Done:
        """Wait for its end; return what came of it, and what was not read yet."""
        out, complaint = self._process.communicate()
        return Done(self._process.returncode, out, complaint)

    def close_output(self) -> None:
        """Stop reading what it prints."""
        assert self._process.stdout is not None
        self._process.stdout.close()


class Desk:
    """Where one works by hand: `do` runs a command to its end, `start` lets one run on."""

    def __init__(self, door: Path) -> None:
        self.door = door
        self.environment = {**os.environ, "AFBUS_NODE": str(door), "COLUMNS": "100"}
        self._started: list[subprocess.Popen[str]] = []

    def do(self, *arguments: str, stdin: bytes = b"") -> Done:
        """Run a command to its end."""
        done = subprocess.run(
            [*COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            env=self.environment,
            timeout=60,
            check=False,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *arguments: str) -> Running:
        """Start a command that runs on; it is ended with the test."""
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        self._started.append(process)
        return Running(process)

    def end_all(self) -> None:
        """End what was started, the last first."""
        for process in reversed(self._started):
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Let commands have Ctrl-C, also where a shell runs the tests in its background without it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def bare_desk(tmp_path: Path) -> Iterator[Desk]:
    """A desk without an agent."""
    desk = Desk(tmp_path / "node.sock")
    yield desk
    desk.end_all()


@pytest.fixture
def agent(bare_desk: Desk) -> Running:
    """The agent of the desk."""
    agent = bare_desk.start("node")
    assert str(bare_desk.door) in agent.line()
    return agent


@pytest.fixture
def desk(bare_desk: Desk, agent: Running) -> Desk:
    """A desk with an agent."""
    assert agent.pid
    return bare_desk


@pytest.fixture
def bus(desk: Desk) -> Running:
    """The master of the bus /demo."""
    master = desk.start("bus", "create", "/demo", "--json")
    assert master.object()["kind"] == "bus"
    return master
