"""The machine that figures were taken on, and the versions of what was measured."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import afbus

from .peers.nats import find_server

#: Names of packages, as `pip` knows them.
PACKAGES: Final = (
    "pyzmq",
    "eclipse-zenoh",
    "iceoryx2",
    "nats-py",
    "dbus-fast",
    "aioquic",
    "cryptography",
)


@dataclass(frozen=True)
class Machine:
    """What a table of figures says of where it comes from."""

    #: Lines that a person reads.
    host: str
    versions: str

    @classmethod
    def here(cls) -> Machine:
        """Describe this machine."""
        model = next(
            (
                line.partition(":")[2].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.machine(),
        )
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        host = (
            f"{len(os.sched_getaffinity(0))} CPUs ({model}), {pages >> 30} GiB, "
            f"Linux {platform.release()}, Python {platform.python_version()}"
        )
        found = [f"afbus {afbus.__version__}"]
        for name in PACKAGES:
            try:
                found.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                continue
        commands = {
            name: where
            for name, where in (
                ("nats-server", find_server()),
                ("dbus-daemon", shutil.which("dbus-daemon")),
                ("dbus-broker", shutil.which("dbus-broker")),
            )
            if where
        }
        found += [f"{name} {_ask(where)}" for name, where in commands.items()]
        return cls(host, ", ".join(found))


def _ask(command: str) -> str:
    """Return the version that a command prints."""
    done = subprocess.run(  # noqa: S603 (our own words)
        [command, "--version"], capture_output=True, text=True, check=False, timeout=10
    )
    return done.stdout.split("\n")[0].rpartition(" ")[2].removeprefix("v")


class Load:
    """What other processes did with the machine's CPUs while figures were taken."""

    def __init__(self) -> None:
        """Begin to watch."""
        self._before = _cpu_s()

    def foreign_percent(self) -> float:
        """Return the CPU time of others since the beginning, in percent of all CPUs.

        What players and daemons of the bench have used counts as ours: they are our children.
        """
        wall, busy, own = (
            after - before for before, after in zip(self._before, _cpu_s(), strict=True)
        )
        return max(0.0, 100 * (busy - own) / (wall * (os.cpu_count() or 1)))


def _cpu_s() -> tuple[float, float, float]:
    """Return seconds: of the clock, of all CPUs at work, of this process and its children."""
    ticks = os.sysconf("SC_CLK_TCK")
    words = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, words[:8])
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return time.monotonic(), (user + nice + system + irq + softirq + steal) / ticks, own
