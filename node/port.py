"""What the core needs of the switch: `afbus._datapath.Switch`, or a fake of a few lines in tests.

Invariants:

1. Each call takes effect before it returns, and costs microseconds.
2. Endpoints, buses, matches and grants bear numbers that the core chooses and never uses twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._datapath import LaneEvent


class SwitchPort(Protocol):
    """The calls of `_datapath.Switch` that the core makes; `_datapath.pyi` describes each."""

    def add_bus(self, bus: int, width: int, key: bytes, number: int | None = None) -> None:
        """Add a bus, which has a number if it is one of the cluster."""

    def allow_lanes(self, bus: int) -> None:
        """Let its endpoints send to each other without the switch."""

    def remove_bus(self, bus: int) -> None:
        """Forget a bus that has no endpoints."""

    def set_master(self, bus: int, endpoint: int | None) -> None:
        """Name the master of a bus."""

    def add_endpoint(  # noqa: PLR0913 (the call of the switch)
        self, endpoint: int, principal: int, pid: int, uid: int, gid: int, ident: bytes
    ) -> None:
        """Add an endpoint without rings."""

    def connect(self, endpoint: int, tx_bytes: int, rx_bytes: int) -> tuple[int, int, int]:
        """Make rings and line; the caller closes the three descriptors. OSError."""

    def remove_endpoint(self, endpoint: int, flush: bool) -> list[tuple[int, int, int, int]]:
        """Forget an endpoint; return sender, first, last, count of what it has not read."""

    def flush(self, endpoint: int) -> None:
        """Send all that the endpoint has published."""

    def attach(self, endpoint: int, bus: int, provisional: bytes | None = None) -> None:
        """Put an endpoint on a bus; its provisional address is of a block if the bus is."""

    def own(self, endpoint: int, address: bytes) -> bool:
        """Give an address."""

    def disown(self, endpoint: int, address: bytes) -> bool:
        """Take an address away."""

    def subscribe(  # noqa: PLR0913 (the call of the switch)
        self,
        endpoint: int,
        match: int,
        terms: bytes | None,
        bits: bytes | None,
        overflow: int,
        deadline_ms: int,
    ) -> None:
        """Add a match."""

    def subscribe_all(self, endpoint: int, matches: Sequence[tuple[int, bytes, int, int]]) -> None:
        """Add matches: number, form, overflow, deadline in ms."""

    def unsubscribe(self, endpoint: int, match: int) -> bool:
        """Remove a match."""

    def allow_send(
        self, endpoint: int, grant: int, terms: bytes | None, bits: bytes | None
    ) -> None:
        """Allow multicasts."""

    def forbid_send(self, endpoint: int, grant: int) -> bool:
        """Take such a grant back."""

    def set_reach(self, endpoint: int, patterns: Sequence[str]) -> None:
        """Let an endpoint send to what these patterns cover, and to nobody else."""

    def set_monitor(self, endpoint: int, on: bool) -> None:
        """Show copies of all messages, or no longer."""

    def set_filter(self, endpoint: int, program: bytes | None) -> None:
        """Attach or remove a program. ValueError says what is wrong with it."""

    def identify(self, endpoint: int, ident: bytes) -> None:
        """Say anew who an endpoint is, before it is on a bus."""

    def set_ident(self, endpoint: int, on: bool) -> None:
        """Whether the endpoint is given identities."""

    def set_namespaces(self, endpoint: int, has_other_pids: bool, has_other_users: bool) -> None:
        """Say whether pids, and uids and gids, of this host mean others where it is."""

    def set_silent(self, endpoint: int) -> None:
        """Refuse what the endpoint sends from now on."""

    def notify(self, endpoints: Sequence[int], body: bytes, trunk: int | None = None) -> None:
        """Put a notice into rings, behind the messages of that node."""

    def deliver(  # noqa: PLR0913 (the call of the switch)
        self,
        source: int,
        target: int,
        src: bytes,
        dst: bytes,
        ctl: bytes,
        body: bytes,
        serial: int,
        reply_to: int,
        deadline_ms: int,
    ) -> None:
        """Deliver a message with control items."""

    def give_back(
        self, trunk: int, endpoint: int, source: bytes, range: tuple[int, int], count: int
    ) -> bool:
        """Tell a sender of that node which messages nobody will read; whether it is known."""

    def stats(self, endpoint: int) -> dict[str, int]:
        """Return counters of an endpoint."""

    def lanes(self, endpoint: int) -> list[tuple[list[int], bool, int, int]]:
        """Return the lanes on which it sends: who reads, if by multicast, bytes, messages."""


class ClusterPort(SwitchPort, Protocol):
    """The calls that concern other nodes; the links use those of `peers.LanePort` beside them."""

    def take_lane_events(self) -> list[LaneEvent]:
        """Return what happened on trunks."""

    def trunk_subscribe(
        self, trunk: int, bus: int, match: int, terms: bytes | None, bits: bytes | None
    ) -> None:
        """Add a match of a node."""

    def trunk_unsubscribe(self, trunk: int, bus: int, match: int) -> bool:
        """Remove such a match."""

    def route(self, bus: int, address: bytes, trunk: int | None) -> None:
        """Know on which node the owner of a name is."""

    def route_block(self, block: int, trunk: int | None) -> None:
        """Know which node has a block of unique addresses; None is this one."""

    def unroute_block(self, block: int) -> bool:
        """Know that a block is nobody's any more."""

    def set_master_away(self, bus: int, trunk: int | None, address: bytes) -> None:
        """Name the node where the master of a bus is."""

    def signal(self, trunk: int, data: bytes) -> None:
        """Send bytes to the other agent, in order with the messages."""

    def deliver_away(  # noqa: PLR0913 (the call of the switch)
        self,
        source: int,
        trunk: int,
        src: bytes,
        dst: bytes,
        ctl: bytes,
        body: bytes,
        serial: int,
        reply_to: int,
        deadline_ms: int,
    ) -> int:
        """Send a message with control items to an endpoint of a node; return 0 or an errno."""

    def trunk_stats(self, trunk: int) -> dict[str, int]:
        """Return counters of a trunk."""
