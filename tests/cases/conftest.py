"""What the cases share: an agent and actors in processes of their own, and figures that are shown.

The figure of a case is met by the median of what is measured, far from it by a factor of ten or
more; single values depend on who else uses the machine, and are shown and not judged.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.cases.actors import PATH, PATIENCE_S, Fleet
from tests.figures import note

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from afbus.client.socket import Socket

# The agent, as the command line runs it; it says when clients may come.
RUN_NODE = """
import asyncio, json, pathlib, sys
from afbus.node import agent, config, core
given = json.loads(sys.argv[2])
settings = config.Config(
    door=pathlib.Path(sys.argv[1]),
    mode=given.get("mode"),
    quotas=given.get("quotas", {}),
    limits=core.Limits(**given.get("limits", {})),
)
asyncio.run(agent.run(settings, lambda: print("ready", flush=True)))
"""

# What a command of root begins with that is to have a /dev/shm of its own.
ALONE = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh")


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which this part of all lies."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def check_times(what: str, seconds: Sequence[float], bar_s: float) -> None:
    """Show how long something took each time; the median must be below the bar."""
    values = [1000 * statistics.median(seconds), 1000 * quantile(seconds, 0.99)]
    note(
        f"{what}: median {values[0]:.1f} ms, p99 {values[1]:.1f} ms, "
        f"longest {1000 * max(seconds):.1f} ms of {len(seconds)}; bar {1000 * bar_s:.0f} ms"
    )
    assert statistics.median(seconds) < bar_s


def count_lanes(one: Socket) -> int:
    """How many lanes there are on the bus, of which this is a member."""
    return sum(row["lanes_out"] for row in one.listing("queues", PATH))


def check_lanes(one: Socket, order: str) -> None:
    """While others send: a bus of fifo order has lanes, another one has none."""
    deadline = time.monotonic() + PATIENCE_S
    while (order == "fifo") != (count_lanes(one) > 0):
        assert time.monotonic() < deadline, f"{count_lanes(one)} lanes on a bus of {order} order"


class Node:
    """A real agent in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = folder / "node.sock"
        self._errors = folder.with_suffix(".stderr")
        self._settings: dict[str, Any] = {}
        #: What the command begins with.
        self.prefix: tuple[str, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, **settings: Any) -> None:
        """Start it, and wait until clients may come; settings are those of the first start."""
        self._settings = settings or self._settings
        place, given = str(self.place), json.dumps(self._settings)
        command = [*self.prefix, sys.executable, "-c", RUN_NODE, place, given]
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", self.errors

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal, by default one to leave in good order; return its exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        with self._process:
            return self._process.wait()

    @property
    def errors(self) -> str:
        """All that it has written to its standard error."""
        return self._errors.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process is not None
        return self._process.pid

    @property
    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def threads(self) -> int:
        """How many it has."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    @property
    def rings(self) -> int:
        """How many mappings of memfds it has."""
        return Path(f"/proc/{self.pid}/maps").read_text().count("/memfd:")

    def memory_kib(self, kind: str = "VmRSS") -> int:
        """Its memory: VmRSS is all, RssAnon its own, RssShmem that of the rings.

        The rest of it is programs, of which the kernel keeps as much in memory as it likes.
        """
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1])
        raise AssertionError(f"no {kind}")


@pytest.fixture
def node() -> Iterator[Node]:
    """A real agent, which the test starts; at the end it leaves in good order and without a word.

    Its door is where other users come too.
    """
    folder = Path(tempfile.mkdtemp(prefix="afbus-case-"))
    folder.chmod(0o755)
    made = Node(folder / "node")
    try:
        yield made
        assert made.is_running
        assert made.end() == 0
        assert made.errors == ""
    finally:
        if made.is_running:
            made.end(signal.SIGKILL)
        shutil.rmtree(folder)


@pytest.fixture(params=["fifo", "total"])
def order(request: pytest.FixtureRequest) -> str:
    """The order of the bus: with lanes (fifo), and with the switch alone."""
    made: str = request.param
    return made


@pytest.fixture
def fleet(node: Node) -> Iterator[Fleet]:
    """Actors, all of whom are dead before the agent ends."""
    with Fleet(node.place) as made:
        yield made
