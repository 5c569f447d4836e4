"""How an endpoint comes onto a bus: as one that wants to join, or as its master (R6, D2).

Invariants:

1. A bus has one master or none, and only the user who created it can be that again (D16).
2. After a refusal nothing has changed.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from ..proto.address import BusAddress
from ..proto.control import OwnedAddr
from ..proto.errors import (
    AddressInUse,
    InvalidArgument,
    MasterLost,
    NoBus,
    NoSuchEndpoint,
    NotOwned,
    RemoteProtocolError,
)
from ..proto.limits import BLOOM_BITS, BLOOM_BITS_DEFAULT, BLOOM_KEY_BYTES
from ..proto.notice import Event, Notice
from ..proto.text import escape
from .endpoint import ORDERS
from .grant import Draft

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .endpoint import Bus, Endpoint
    from .federation import Federation
    from .registry import Registry


#: Whom the kernel names for everybody that has no number here: not one user, but many.
OVERFLOW_UID: Final = 65_534
#: How far a bus reaches (D2).
SCOPES: Final = ("host", "cluster")


class Attachment:
    """Carries out ATTACH and BIND."""

    def __init__(self, registry: Registry, draw: Callable[[int], bytes]) -> None:
        """Change this registry; `draw` returns so many secret random bytes."""
        self._registry = registry
        self._draw = draw
        #: Set when this node is a member of a cluster.
        self.cluster: Federation | None = None

    def attach(self, endpoint: Endpoint, path: bytes) -> object:
        """Put an endpoint on a bus, where it may ask the master to let it join.

        Raises:
            NoBus: Nobody has bound it. ENOENT.
            NoSuchEndpoint: The endpoint is on another bus. EHOSTUNREACH.
            MasterLost: It is one of the cluster, and this node has no addresses there. EHOSTDOWN.
            InvalidArgument, NameTooLong: The path is none.
        """
        address = BusAddress.kernel(path)
        if endpoint.bus is not None and endpoint.bus.path != address.path:
            raise NoSuchEndpoint(
                f"endpoint {endpoint.id} is on {escape(endpoint.bus.path)}, and nobody on "
                f"{escape(path)} can be reached from there; open another socket for it"
            )
        bus = endpoint.bus or self._find_bus(endpoint, address.path)
        if bus is None:
            raise NoBus(f"no bus {escape(path)}: nobody has bound it")
        if endpoint.bus is None:
            self._registry.attach(endpoint, bus)
        master = bus.master_address if bus.has_master else None
        return {"master": master, "width": bus.width, "order": bus.order}

    def _find_bus(self, endpoint: Endpoint, path: bytes) -> Bus | None:
        """Return the bus of a path that an endpoint comes onto; those of this host go first."""
        bus = self._registry.buses.get(path)
        if self.cluster is None or (bus is not None and not bus.cluster):
            return bus
        if self.cluster.is_taken(path):
            self.cluster.receive_attached(endpoint)
        elif bus is not None:
            # Known from a former life, and the table is not here yet. Without a block of addresses
            # it can be answered on this node alone.
            with suppress(MasterLost):
                self.cluster.receive_attached(endpoint)
        return bus or self.cluster.find_bus(path)

    def bind(self, endpoint: Endpoint, packed: bytes, options: Mapping[str, Any]) -> object:
        """Make an endpoint the master of a bus: a new one, or one whose master is gone.

        Returns:
            What it has become, or for a bus of the cluster the steps that lead there.

        Raises:
            AddressInUse: It has a master, or is another user's. EADDRINUSE.
            NotOwned: The address is the kernel's, or provisional. EADDRNOTAVAIL.
            InvalidArgument: The address or an option makes no sense. EINVAL.
        """
        address = _unpacked(packed)
        name = _bindable(address)
        width, order, is_cluster = _bus_options(options)
        if endpoint.bus is not None and endpoint.bus.path != address.path:
            raise InvalidArgument(f"endpoint {endpoint.id} is on {escape(endpoint.bus.path)}")
        if endpoint.is_master:
            raise InvalidArgument(f"endpoint {endpoint.id} has bound {escape(address.path)}")
        bus = self._registry.buses.get(address.path)
        if is_cluster or (bus is not None and bus.cluster):
            if self.cluster is None:
                raise InvalidArgument("this agent is in no cluster: `afbus node join` makes it one")
            return self.cluster.bind(endpoint, address, width, order)
        if self.cluster is not None and self.cluster.is_taken(address.path):
            raise AddressInUse(f"{escape(address.path)} is a bus of the cluster")
        if bus is None:
            width, order = width or BLOOM_BITS_DEFAULT, order or ORDERS[0]
            key, uid = self._draw(BLOOM_KEY_BYTES), endpoint.credentials.uid
            bus = self._registry.add_bus(address.path, width, order, key, uid, name)
            self._registry.attach(endpoint, bus)
            self._registry.own(endpoint, name)
            self._registry.set_master(bus, endpoint, name)
        else:
            self._take_over(bus, endpoint, address, width, order)
        return {"width": bus.width, "order": bus.order, "members": len(bus.members) - 1}

    def _take_over(
        self,
        bus: Bus,
        endpoint: Endpoint,
        address: BusAddress,
        width: int | None,
        order: str | None,
    ) -> None:
        """Make an endpoint the master of a bus whose master is gone (D16)."""
        path, uid = escape(bus.path), endpoint.credentials.uid
        if bus.master is not None:
            raise AddressInUse(f"{path} is bound: endpoint {bus.master.id} is its master")
        if uid != bus.master_uid or uid == OVERFLOW_UID:
            raise AddressInUse(
                f"{path} is another user's, {bus.master_uid}: it has no master now, but "
                f"{len(bus.endpoints)} endpoints wait for one of that user"
            )
        if (width or bus.width, order or bus.order) != (bus.width, bus.order):
            raise InvalidArgument(
                f"{path} has {bus.width} bits and order {bus.order} while it has endpoints"
            )
        name = address.address
        draft = Draft(bus, endpoint, 0, lambda: self._registry.choose_address(bus))
        if name not in endpoint.addresses:
            draft.check(OwnedAddr(address))
        if endpoint.bus is None:
            self._registry.attach(endpoint, bus)
        if name not in endpoint.addresses:
            self._registry.own(endpoint, name)
        self._registry.set_master(bus, endpoint, name)
        others = [one for one in bus.endpoints.values() if one is not endpoint]
        self._registry.announce(others, Notice(Event.MASTER_BACK, (name,), "a master has bound it"))


def _unpacked(packed: bytes) -> BusAddress:
    try:
        return BusAddress.unpack(packed)
    except RemoteProtocolError as error:
        raise InvalidArgument(error.message) from error


def _bindable(address: BusAddress) -> bytes:
    """Return the address within the bus at which its master will be."""
    if address.is_kernel:
        raise NotOwned("nobody can own the kernel's address; a master needs one of its own")
    if address.is_multicast:
        raise InvalidArgument(f"{address} is a multicast address; a master needs one of its own")
    if address.is_provisional:
        raise NotOwned(f"nobody can own {address}: the agent gives such addresses")
    return address.address


def _bus_options(options: Mapping[str, Any]) -> tuple[int | None, str | None, bool]:
    """Return width and order, None if they are left open, and whether it is for the cluster."""
    for key in options.keys() - {"width", "order", "scope"}:
        raise InvalidArgument(f"a bus has no option {key!a}; there are width, order and scope")
    width, order, scope = options.get("width"), options.get("order"), options.get("scope")
    if width is not None and (type(width) is not int or width not in BLOOM_BITS):
        raise InvalidArgument(f"width {width!a}, not one of {BLOOM_BITS}")
    if order is not None and order not in ORDERS:
        raise InvalidArgument(f"order {order!a}, not one of {ORDERS}")
    if scope not in (None, *SCOPES):
        raise InvalidArgument(f"scope {scope!a}, not one of {SCOPES}")
    return width, order, scope == "cluster"
