"""Endpoints and buses as the agent knows them: plain records, changed by `registry.py` alone.

Invariants:

1. Addresses of an endpoint stand in the order in which it got them; the first is its default
   source (R13).
2. An endpoint that owns an address is a member of its bus; without one it talks to the master
   only.
3. A bus lives while it has endpoints. Its master may be gone; the bus goes on (D16).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NewType

from ..proto.control import GrantFlags
from .unique import Block, SpentAddresses

if TYPE_CHECKING:
    from ..proto.match import What
    from .effect import ConnectionId

EndpointId = NewType("EndpointId", int)
BusId = NewType("BusId", int)

#: The orders that a bus may promise (D11). On one host the switch gives the total one to all.
ORDERS: Final = ("fifo", "total")

NO_FLAGS: Final = GrantFlags(0)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who is at the other end of a connection, as the kernel says.

    `start_ticks` is when the process began, in clock ticks since the machine did, so that a pid
    that is used again is not taken for the old one; 0 if that is not known.
    """

    pid: int
    uid: int
    gid: int
    start_ticks: int
    #: Whether numbers of this host mean others where the process is: it has namespaces of its own.
    has_other_pids: bool = False
    has_other_users: bool = False

    def is_same_process(self, other: Credentials) -> bool:
        """Tell whether these are surely of one process, and of the same user."""
        return self.start_ticks > 0 and (self.pid, self.uid, self.start_ticks) == (
            other.pid,
            other.uid,
            other.start_ticks,
        )


@dataclass(slots=True, eq=False)
class Endpoint:
    """One socket of a client. `connection` is None while its client is away."""

    id: EndpointId
    token: bytes
    credentials: Credentials
    #: Who it has proven to be, by a certificate; "": whom its credentials name.
    principal: str = ""
    connection: ConnectionId | None = None
    rx_bytes: int = 0
    bus: Bus | None = None
    addresses: list[bytes] = field(default_factory=list)
    #: What it receives, by its form (`proto/match.py`): the number that the switch knows the match
    #: by, overflow and deadline in ms. Plain values, as there may be a million.
    matches: dict[bytes, tuple[int, int, int]] = field(default_factory=dict)
    #: The multicasts that it may send, with the number of the grant.
    sends: dict[What, int] = field(default_factory=dict)
    #: On a bus of the cluster: the addresses that it may send to as a member, as patterns.
    reach: tuple[str, ...] = ()
    flags: GrantFlags = NO_FLAGS
    wants_identity: bool = False
    is_silent: bool = False
    filter: bytes | None = None
    #: Messages of which it has said that nobody will read them.
    unread_count: int = 0
    #: The address by which the master answers it before it has joined; `@NUMBER`, and on a bus of
    #: the cluster `@BLOCK.NUMBER`.
    provisional: bytes = b""

    def __post_init__(self) -> None:
        """Give it the provisional address that it has on this host."""
        self.provisional = b"@%d" % self.id

    @property
    def is_master(self) -> bool:
        """Whether it is the master of its bus."""
        return self.bus is not None and self.bus.master is self


@dataclass(slots=True, eq=False)
class Bus:
    """One bus of this host. `key` is the secret of its hashes, 16 bytes."""

    id: BusId
    path: bytes
    width: int
    order: str
    key: bytes
    #: The user who created it, and who alone may be its master again.
    master_uid: int
    #: The address that the master bound.
    master_address: bytes
    master: Endpoint | None = None
    endpoints: dict[EndpointId, Endpoint] = field(default_factory=dict)
    owners: dict[bytes, Endpoint] = field(default_factory=dict)
    spent: SpentAddresses = field(default_factory=SpentAddresses)
    #: Its number in the cluster, 0 for a bus of this host alone; and whether its master is on
    #: another node.
    cluster: int = 0
    is_served: bool = False
    #: Where the addresses come from that the agent chooses, from the first one on.
    block: Block | None = None

    @property
    def has_master(self) -> bool:
        """Whether there is a master, here or on another node."""
        return self.master is not None or self.is_served

    @property
    def members(self) -> list[Endpoint]:
        """The endpoints that own an address; costs a look at each endpoint."""
        return [endpoint for endpoint in self.endpoints.values() if endpoint.addresses]
