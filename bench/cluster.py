"""A stage over two hosts: a master and two nodes of a cluster, each in a network namespace.

What a player does is the same as on one host; the name of its endpoint says where it is.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from typing import TYPE_CHECKING, ClassVar, Final

from network import Network, can_isolate

from afbus.node.membership import Membership, load

from .stage import BUS, CLI, Stage

if TYPE_CHECKING:
    from pathlib import Path

NODES: Final = ("alpha", "beta")
#: Endpoints on beta; all others are on alpha.
_FAR: Final = frozenset({"echo", "sink"})
_CLONE_NEWNET: Final = 0x4000_0000
_POLICY: Final = f"""\
[[rule]]
name = "bench"
who = ["uid/*@alpha", "uid/*@beta"]
bus = ["{BUS}"]
own = ["**"]
send = ["**", "topic:**"]
receive = ["topic:**"]
bind = true
"""


class ClusterStage(Stage):
    """A master and two nodes, on a bridge with an mtu of 1500."""

    is_lasting: ClassVar[bool] = True
    scope: ClassVar[str] = "cluster"

    @classmethod
    def obstacle(cls) -> str:
        """Say why there is no such stage here."""
        return "" if can_isolate() else "network namespaces need root and the command `ip`"

    def _build(self) -> None:
        self._network = self._end.enter_context(Network(("master", *NODES), namespaces=True))
        state = ("--state", str(self.folder / "master"))
        policy = self.folder / "policy.toml"
        policy.write_text(_POLICY)
        place = f"{self._network.address('master')}:4450"
        self._do("master", "master", "init", *state, "bench")
        run = ("master", "run", *state, "--listen", place, "--policy", str(policy))
        self.serve(self._network.command("master", [*CLI, *run]))
        for node in NODES:
            token = self._do("master", "token", *state, "--name", node)
            folder = ("--state", str(self.folder / node))
            self._do(
                node,
                "node",
                "join",
                "--token-file",
                "-",
                "--name",
                node,
                *folder,
                place,
                text=token,
            )
            agent = ("node", "--door", str(self._door(node)), "--cluster", str(self.folder / node))
            listen = f"{self._network.address(node)}:4451"
            self.serve(self._network.command(node, [*CLI, *agent, "--listen", listen]))

    def _do(self, host: str, *argv: str, text: str = "") -> str:
        """Run an afbus command on a host; return what it prints."""
        command = self._network.command(host, [*CLI, *argv])
        done = subprocess.run(  # noqa: S603 (our own program)
            command, input=text, capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr}")
        return done.stdout

    def _door(self, node: str) -> Path:
        return self.folder / node / "node.sock"

    def door(self, name: str) -> Path:
        """Return the door on the endpoint's host."""
        return self._door(host_of(name))

    def enter_host(self, name: str) -> None:
        """Move the calling process into the namespace of the endpoint's host."""
        with self._network.namespace(host_of(name)).open() as space:
            # Python has setns from 3.12 on.
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def address(self, name: str) -> str:
        """Return the IPv4 address of the endpoint's host."""
        return self._network.address(host_of(name))

    def membership(self, name: str) -> Membership:
        """Return the certificates of the endpoint's host."""
        return load(self.folder / host_of(name))


def host_of(name: str) -> str:
    """Return the host of an endpoint."""
    return "beta" if name in _FAR else "alpha"
