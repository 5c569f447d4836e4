"""Options of an endpoint, and the state that it can read (D16)."""

from __future__ import annotations

from socket import SHUT_RD, SHUT_RDWR, SHUT_WR, SO_PASSCRED, SOL_SOCKET
from typing import TYPE_CHECKING

from ..proto.address import BusAddress
from ..proto.control import (
    BUS_SOCKET,
    SO_BUS_ADDRESSES,
    SO_BUS_FILTER,
    SO_BUS_MASTER,
    SO_BUS_STATE,
    SO_BUS_STATS,
    GrantFlags,
)
from ..proto.errors import InvalidArgument
from ..proto.limits import FILTER_INSTRUCTION_BYTES, FILTER_INSTRUCTIONS
from ..proto.text import escape

if TYPE_CHECKING:
    from .endpoint import Endpoint
    from .port import SwitchPort
    from .registry import Registry


class Options:
    """Carries out OPTION_SET, OPTION_GET and SHUTDOWN."""

    def __init__(self, registry: Registry, switch: SwitchPort, node: str, epoch: int) -> None:
        """Change this registry; `node` and `epoch` are the agent's."""
        self._registry = registry
        self._switch = switch
        self._node = node
        self._epoch = epoch

    def set(self, endpoint: Endpoint, level: int, name: int, value: object) -> None:
        """Set an option.

        Raises:
            InvalidArgument: There is none, or it cannot have this value. EINVAL.
        """
        match level, name, value:
            case (int(), int(), 0 | 1) if (level, name) == (SOL_SOCKET, SO_PASSCRED):
                self._registry.set_identity(endpoint, value == 1)
            case (int(), int(), None | bytes()) if (level, name) == (BUS_SOCKET, SO_BUS_FILTER):
                self._set_filter(endpoint, value)
            case _:
                raise InvalidArgument(f"option {name} of level {level:#x} with value {value!a:.99}")

    def _set_filter(self, endpoint: Endpoint, program: bytes | None) -> None:
        if program is not None and len(program) > FILTER_INSTRUCTIONS * FILTER_INSTRUCTION_BYTES:
            raise InvalidArgument(
                f"filter of {len(program)} bytes, the limit is {FILTER_INSTRUCTIONS} instructions "
                f"of {FILTER_INSTRUCTION_BYTES} bytes"
            )
        try:
            self._registry.set_filter(endpoint, program)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    def get(self, endpoint: Endpoint, level: int, name: int) -> object:
        """Return the value of an option.

        Raises:
            InvalidArgument: There is none that can be read. EINVAL.
        """
        if (level, name) == (SOL_SOCKET, SO_PASSCRED):
            return int(endpoint.wants_identity)
        bus = endpoint.bus
        if level == BUS_SOCKET:
            if name == SO_BUS_ADDRESSES:
                return [
                    BusAddress(bus.path, address).pack()
                    for address in endpoint.addresses
                    if bus is not None
                ]
            if name == SO_BUS_STATE:
                return self._get_state(endpoint)
            if name == SO_BUS_MASTER:
                if bus is None or not bus.has_master:
                    return None
                return BusAddress(bus.path, bus.master_address).pack()
            if name == SO_BUS_STATS:
                return self._switch.stats(endpoint.id)
        raise InvalidArgument(f"option {name} of level {level:#x} cannot be read")

    def _get_state(self, endpoint: Endpoint) -> object:
        bus = endpoint.bus
        master = "none" if bus is None else "here" if bus.has_master else "lost"
        cluster = self._registry.cluster if bus is not None and bus.cluster else None
        return {
            **({"cluster": None, "lost_nodes": []} if cluster is None else cluster.describe()),
            "agent": "here",
            "epoch": self._epoch,
            "node": self._node,
            "endpoint": endpoint.id,
            "path": None if bus is None else escape(bus.path),
            "master": master,
            "is_master": endpoint.is_master,
            "is_member": bool(endpoint.addresses),
            "is_silent": endpoint.is_silent,
            "grants": [str(flag.name) for flag in GrantFlags if flag in endpoint.flags],
        }

    def shut_down(self, endpoint: Endpoint, how: int) -> None:
        """Close a direction; receiving is the client's own (D20).

        Raises:
            InvalidArgument: There is no such direction. EINVAL.
        """
        if how not in (SHUT_RD, SHUT_WR, SHUT_RDWR):
            raise InvalidArgument(f"shutdown {how}")
        if how != SHUT_RD:
            self._registry.silence(endpoint)
