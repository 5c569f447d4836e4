"""Two hosts, and a third one for the master of a cluster: network namespaces on a bridge.

What a player does is the same as on one host; the name of its role says where it is.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Final

from network import Network, can_isolate

from .stage import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

NODES: Final = ("alpha", "beta")
_CLONE_NEWNET: Final = 0x4000_0000


class ClusterStage(Stage):
    """Namespaces on a bridge with an mtu of 1500."""

    @classmethod
    def obstacle(cls) -> str:
        """Say why there is no such stage here."""
        return "" if can_isolate() else "network namespaces need root and the command `ip`"

    def _build(self) -> None:
        self._network = self._end.enter_context(Network(("master", *NODES), namespaces=True))

    def address(self, role: str) -> str:
        """Return the IPv4 address of the host of a role, or of a host."""
        return self._network.address(host_of(role))

    def command(self, role: str, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` on the host of a role."""
        return self._network.command(host_of(role), argv)

    def enter_host(self, role: str) -> None:
        """Move the calling process into the namespace of the role's host."""
        with self._network.namespace(host_of(role)).open() as space:
            # Python has setns from 3.12 on.
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def host_of(role: str) -> str:
    """Return the host of a role: those that wait for others are on beta; a host is its own."""
    if role in ("master", *NODES):
        return role
    return "beta" if role == "echo" or role.startswith("sink") else "alpha"
