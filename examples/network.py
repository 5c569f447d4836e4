"""Hosts for a show or a test on one machine: network namespaces on a bridge, or loopback.

As root each host is a network namespace of its own, with one interface on a common bridge (mtu
1500), and nothing else; without rights a host is one address of 127.0.0.0/8. Either way nothing
leaves the machine. What was made is taken down again by `close`.

    with Network(["master", "alpha"]) as network:
        Popen(network.command("alpha", ["afbus", "node", "run"]))
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

#: One subnet in namespaces that nobody else sees.
_SUBNET: Final = "10.213.47"


class Network:
    """Hosts that can reach each other."""

    def __init__(self, hosts: Sequence[str], *, namespaces: bool | None = None) -> None:
        """Make the hosts.

        Args:
            hosts: Their names: short, letters and digits.
            namespaces: Whether to make namespaces; by default if that is possible here.

        Raises:
            RuntimeError: Namespaces were asked for and cannot be had; the text says why.
        """
        self.has_namespaces = can_isolate() if namespaces is None else namespaces
        self._hosts = {host: number for number, host in enumerate(hosts, 1)}
        self._made: list[str] = []
        # Taken once: a child has another process id, and the same network.
        self._tag = f"afbus-{os.getpid()}-{id(self) & 0xFFFF:x}"
        if self.has_namespaces:
            try:
                self._build()
            except BaseException:
                self.close()
                raise

    def address(self, host: str) -> str:
        """Return the IPv4 address of a host."""
        number = self._hosts[host]
        return f"{_SUBNET}.{number}" if self.has_namespaces else f"127.47.0.{number}"

    def command(self, host: str, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` on a host; it keeps its process id."""
        prefix = ["ip", "netns", "exec", self._space(host)] if self.has_namespaces else []
        return [*prefix, *argv]

    def namespace(self, host: str) -> Path:
        """Return the file that stands for a host's namespace, as setns(2) wants it."""
        return Path("/run/netns", self._space(host))

    def cut(self, host: str) -> None:
        """Take a host off the network; only with namespaces."""
        _ip("-n", self._space("bridge"), "link", "set", f"p{self._hosts[host]}", "down")

    def heal(self, host: str) -> None:
        """Put it back."""
        _ip("-n", self._space("bridge"), "link", "set", f"p{self._hosts[host]}", "up")

    def close(self) -> None:
        """Take all down; processes in the namespaces must have ended. Harmless when repeated."""
        while self._made:
            # With a namespace go its interfaces, and with them their other ends.
            _try_ip("netns", "del", self._made.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _space(self, host: str) -> str:
        return f"{self._tag}-{host}"

    def _add(self, host: str) -> str:
        space = self._space(host)
        _ip("netns", "add", space)
        self._made.append(space)
        _ip("-n", space, "link", "set", "lo", "up")
        return space

    def _build(self) -> None:
        middle = self._add("bridge")
        _ip("-n", middle, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", middle, "link", "set", "bridge0", "up")
        for host, number in self._hosts.items():
            space, port = self._add(host), f"p{number}"
            link = ["link", "add", port, "netns", middle]
            _ip(*link, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", middle, "link", "set", port, "master", "bridge0")
            _ip("-n", middle, "link", "set", port, "up")
            _ip("-n", space, "addr", "add", f"{_SUBNET}.{number}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")


def can_isolate() -> bool:
    """Tell whether this process may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    space = f"afbus-{os.getpid()}-probe"
    return _try_ip("netns", "add", space) is None and _try_ip("netns", "del", space) is None


def _ip(*arguments: str) -> None:
    failure = _try_ip(*arguments)
    if failure is not None:
        raise RuntimeError(failure)


def _try_ip(*arguments: str) -> str | None:
    """Run `ip`; return None, or what it said if it failed."""
    done = subprocess.run(  # noqa: S603 (our own words)
        ["ip", *arguments],  # noqa: S607 (where the system keeps it)
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return None if done.returncode == 0 else f"ip {' '.join(arguments)}: {done.stderr.strip()}"
