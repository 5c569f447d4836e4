"""Nodes, endpoints and buses, as the master knows them; `registry.py` changes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from ..proto.names import Names
from ..proto.record import BOOT_BYTES, BusRecord, NodeState

if TYPE_CHECKING:
    from ..proto.match import What

#: Number of a node, and of an endpoint on it.
Who: TypeAlias = tuple[int, int]
#: Number of a bus, and a name on it.
Claim: TypeAlias = tuple[int, bytes]
#: Number of a bus, and the digest of what is wanted.
Wish: TypeAlias = tuple[int, bytes]


@dataclass(slots=True, eq=False)
class Node:
    """A node; `endpoints` are by their number, `wishes` by who wants them, perhaps nobody yet."""

    name: str
    number: int
    state: NodeState = NodeState.LOST
    boot: bytes = bytes(BOOT_BYTES)
    places: tuple[str, ...] = ()
    #: Whether it is forgotten soon after it is lost.
    is_ephemeral: bool = False
    #: When its certificate ends.
    until_utc: int = 0
    #: Digest of the key by which it has enrolled.
    key: bytes | None = None
    endpoints: dict[int, Endpoint] = field(default_factory=dict)
    wishes: dict[Wish, Wished] = field(default_factory=dict)
    #: While it states what it has: what it has not stated yet.
    unstated: Unstated | None = None


@dataclass(slots=True, eq=False)
class Endpoint:
    """An endpoint of a node; `serial` and `until_utc` are of the certificate that it has proven."""

    node: Node
    number: int
    principal: str = ""
    serial: int = 0
    until_utc: int = 0
    #: What it owns or waits for.
    claims: set[Claim] = field(default_factory=set)
    wishes: set[Wish] = field(default_factory=set)
    #: The buses whose master it is.
    buses: set[int] = field(default_factory=set)

    @property
    def who(self) -> Who:
        """How names know it."""
        return self.node.number, self.number

    @property
    def accounts(self) -> tuple[str, str]:
        """On whose accounts it has what it has (D18): a bad node can make up users."""
        return self.principal, f"node/{self.node.name}"


@dataclass(slots=True, eq=False)
class Bus:
    """A bus of the cluster."""

    record: BusRecord
    master: Endpoint | None = None
    names: Names[Who] = field(default_factory=Names)
    #: Matches that stand in the table.
    match_count: int = 0
    unused_since_utc: int = 0

    @property
    def number(self) -> int:
        """Its number."""
        return self.record.number

    @property
    def is_used(self) -> bool:
        """Whether there is anything on it that the master knows of."""
        return self.master is not None or len(self.names) > 0 or self.match_count > 0


@dataclass(slots=True)
class Wished:
    """What somebody on a node wants, and which of its endpoints do."""

    what: What
    wanted_by: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Unstated:
    """What a node had when it began to state what it has; each with the number of its endpoint."""

    endpoints: set[int]
    claims: set[tuple[int, Claim]]
    wishes: set[tuple[int, Wish]]
    buses: set[tuple[int, int]]
    blocks: set[int]
