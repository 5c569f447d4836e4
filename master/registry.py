"""Who has what: nodes, their endpoints and leases, buses, names, matches. No rights, no links.

What is in the table of all nodes, or must survive the master, goes to the ledger with each change.
After the master began anew it knows what nodes had, but not what they still have: endpoints are
*shadows* then, without a principal, until their node states them.

Invariants:

1. Names have the queues of D4; an owner record stands for each name, and for no other.
2. A match stands in the table as long as an endpoint of the node wants it.
3. A bus has at most one master.
4. What `begin_stating` found and nobody stated until `end_stating` is gone then.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from ..proto.errors import RemoteProtocolError
from ..proto.names import NO_FLAGS, NameFlags, NameOutcome, ReleaseOutcome
from ..proto.record import (
    DIGEST_BYTES,
    BusRecord,
    LeaseRecord,
    MatchRecord,
    NodeRecord,
    OwnerRecord,
    bus_key,
    decode_record,
    digest_what,
    lease_key,
    match_key,
    node_key,
    owner_key,
)
from . import row
from .entity import Bus, Endpoint, Node, Unstated, Wished
from .lease import Leases

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..proto.match import What
    from .entity import Who, Wish
    from .ledger import Ledger


class Registry:
    """All of it; each call changes this and the ledger together."""

    def __init__(self, ledger: Ledger) -> None:
        """Begin empty."""
        self._ledger = ledger
        self.nodes: dict[str, Node] = {}
        self.numbers: dict[int, Node] = {}
        self.buses: dict[bytes, Bus] = {}
        self.bus_numbers: dict[int, Bus] = {}
        self.leases = Leases()
        #: What each principal has, over all nodes, and each node (`node/NAME`) of whomever (D18).
        self.names_of: Counter[str] = Counter()
        self.wishes_of: Counter[str] = Counter()

    # --- after a restart ---

    def load(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Begin with the table of the ledger, and the private rows of nodes, buses and names.

        Raises:
            RemoteProtocolError: They do not fit together.
        """
        self.leases = Leases(self._ledger.count("block"))
        # Owners follow from the queues; what is denied is the office's, facts are the core's.
        loaded = [
            (key, decode_record(key, value))
            for key, value in self._ledger.table.items()
            if key[:1] not in (b"o", b"d", b"f")
        ]
        for _, one in loaded:
            if isinstance(one, NodeRecord):
                self._add_node(Node(one.name, one.number, one.state, one.boot, one.places))
            elif isinstance(one, BusRecord):
                self._add_bus(Bus(one))
        for key, one in loaded:
            if isinstance(one, LeaseRecord):
                if one.block > self.leases.last or self.leases.get_holder(one.block):
                    raise RemoteProtocolError(f"block {one.block} that was never leased, or twice")
                self.leases.restore(one.block, self._node(one.node).number)
            elif isinstance(one, MatchRecord):
                self._node(one.node).wishes[one.bus, key[-DIGEST_BYTES:]] = Wished(one.what)
                self._bus(one.bus).match_count += 1
        # Sorted: proofs, which name a principal, before the names that count for it.
        for key, value in sorted(rows):
            self._load_row(key, value)

    def _load_row(self, key: bytes, value: bytes) -> None:
        kind = key[:1]
        if kind == b"N":
            node = self.nodes.get(key[1:].decode(errors="replace"))
            if node is None:
                raise RemoteProtocolError("row of a node that is not there")
            node.is_ephemeral, node.until_utc, node.key = row.decode_node(value)
        elif kind == b"E":
            number, endpoint = row.split_proof_key(key)
            shadow = self._shadow((number, endpoint))
            shadow.principal, shadow.serial, shadow.until_utc = row.decode_proof(value)
        elif kind == b"B":
            bus = self._bus(row.split_bus_key(key)[0])
            master, bus.unused_since_utc = row.decode_bus(value)
            if master is not None:
                bus.master = self._shadow((bus.record.node, master))
                bus.master.buses.add(bus.number)
        elif kind == b"Q":
            number, name = row.split_bus_key(key)
            bus = self._bus(number)
            for one, endpoint, flags in row.decode_queue(value):
                bus.names.request(name, (one, endpoint), flags)
                shadow = self._shadow((one, endpoint))
                shadow.claims.add((number, name))
                self._count(self.names_of, shadow, 1)

    def _node(self, number: int) -> Node:
        node = self.numbers.get(number)
        if node is None:
            raise RemoteProtocolError(f"node {number} that is not there")
        return node

    def _bus(self, number: int) -> Bus:
        bus = self.bus_numbers.get(number)
        if bus is None:
            raise RemoteProtocolError(f"bus {number} that is not there")
        return bus

    def _shadow(self, who: Who) -> Endpoint:
        node = self._node(who[0])
        return node.endpoints.setdefault(who[1], Endpoint(node, who[1]))

    # --- nodes ---

    def _add_node(self, node: Node) -> Node:
        self.nodes[node.name] = self.numbers[node.number] = node
        return node

    def add_node(self, name: str) -> Node:
        """Know a new node; `put_node` makes it known to others."""
        number = self._ledger.count("node") + 1
        self._ledger.set_count("node", number)
        return self._add_node(Node(name, number))

    def put_node(self, node: Node) -> None:
        """Tell of what has changed in a node."""
        record = NodeRecord(node.name, node.number, node.state, node.boot, node.places)
        self._ledger.put(record)
        key = row.node_row_key(node.name)
        self._ledger.write(key, [node.is_ephemeral, node.until_utc, node.key])

    def drop_node(self, node: Node) -> None:
        """Forget a node, with all that it has."""
        self.free(node)
        for block in self.leases.drop_holder(node.number):
            self._ledger.drop(lease_key(block))
        self._ledger.drop(node_key(node.name))
        self._ledger.write(row.node_row_key(node.name), None)
        del self.nodes[node.name], self.numbers[node.number]

    def free(self, node: Node) -> None:
        """Take from a node all but its leases."""
        for endpoint in list(node.endpoints.values()):
            self.remove(endpoint)
        for wish in list(node.wishes):
            self._drop_wish(node, wish)
        node.unstated = None

    def lease(self, node: Node) -> int:
        """Lease a block that nobody ever had."""
        block = self.leases.take(node.number)
        self._ledger.set_count("block", self.leases.last)
        self._ledger.put(LeaseRecord(block, node.number))
        return block

    def state_lease(self, node: Node, block: int) -> bool:
        """The node says that it has a block; return whether that is so."""
        if node.unstated is not None:
            node.unstated.blocks.discard(block)
        if self.leases.skip(block):
            self._ledger.set_count("block", self.leases.last)
        return self.leases.get_holder(block) == node.number

    def give_back(self, node: Node, block: int) -> bool:
        """End a lease; return whether it was there."""
        if self.leases.get_holder(block) != node.number:
            return False
        self.leases.give_back(block)
        self._ledger.drop(lease_key(block))
        return True

    # --- what a node states ---

    def begin_stating(self, node: Node) -> None:
        """The node states all that it has, from now on."""
        ends = node.endpoints.values()
        wishes = {(end.number, wish) for end in ends for wish in end.wishes}
        node.unstated = Unstated(
            endpoints=set(node.endpoints),
            claims={(end.number, claim) for end in ends for claim in end.claims},
            wishes=wishes,
            buses={(end.number, bus) for end in ends for bus in end.buses},
            blocks=set(self.leases.get_blocks(node.number)),
        )

    def end_stating(self, node: Node) -> None:
        """The node has stated all that it has; the rest is gone."""
        left, node.unstated = node.unstated, None
        assert left is not None, "nothing was stated"
        for number in sorted(left.endpoints):
            if number in node.endpoints:
                self.remove(node.endpoints[number])
        for number, (bus, name) in sorted(left.claims):
            if number in node.endpoints:
                self.release(node.endpoints[number], self.bus_numbers[bus], name)
        for number, wish in sorted(left.wishes):
            if number in node.endpoints:
                self._unwish(node.endpoints[number], wish)
        for number, bus in sorted(left.buses):
            if number in node.endpoints and bus in node.endpoints[number].buses:
                self.unbind(self.bus_numbers[bus])
        for wish in [wish for wish, one in node.wishes.items() if not one.wanted_by]:
            self._drop_wish(node, wish)
        for block in sorted(left.blocks):
            self.give_back(node, block)

    # --- endpoints ---

    def enter(
        self, node: Node, number: int, principal: str, serial: int = 0, until_utc: int = 0
    ) -> Endpoint:
        """Know an endpoint; one of this number that was somebody else's is gone."""
        endpoint = node.endpoints.get(number)
        if endpoint is not None and endpoint.principal not in ("", principal):
            self.remove(endpoint)
            endpoint = None
        if endpoint is None:
            endpoint = node.endpoints[number] = Endpoint(node, number)
        if not endpoint.principal:
            endpoint.principal = principal
            self._count(self.names_of, endpoint, len(endpoint.claims))
        had = endpoint.serial
        endpoint.serial, endpoint.until_utc = serial, until_utc
        if serial:
            proof = row.ProofRow(principal, serial, until_utc)
            key = row.proof_key(node.number, number)
            self._ledger.write(key, row.encode_proof(proof))
        elif had:
            self._ledger.write(row.proof_key(node.number, number), None)
        if node.unstated is not None:
            node.unstated.endpoints.discard(number)
        return endpoint

    def remove(self, endpoint: Endpoint) -> None:
        """Forget an endpoint, with all that it has."""
        for number in sorted(endpoint.buses):
            self.unbind(self.bus_numbers[number])
        for number, name in sorted(endpoint.claims):
            self.release(endpoint, self.bus_numbers[number], name)
        for wish in sorted(endpoint.wishes):
            self._unwish(endpoint, wish)
        if endpoint.serial:
            key = row.proof_key(endpoint.node.number, endpoint.number)
            self._ledger.write(key, None)
        del endpoint.node.endpoints[endpoint.number]

    @staticmethod
    def _count(counter: Counter[str], endpoint: Endpoint, change: int) -> None:
        # A shadow is nobody's yet.
        if endpoint.principal and change:
            for who in endpoint.accounts:
                counter[who] += change
                if not counter[who]:
                    del counter[who]

    @property
    def record_count(self) -> int:
        """Records of the table that all nodes have."""
        return len(self._ledger.table)

    # --- buses ---

    def _add_bus(self, bus: Bus) -> Bus:
        self.buses[bus.record.path] = self.bus_numbers[bus.number] = bus
        return bus

    def add_bus(self, path: bytes, width: int, order: str, key: bytes) -> Bus:
        """Know a new bus, without a master; `bind` makes it known to others."""
        number = self._ledger.count("bus") + 1
        self._ledger.set_count("bus", number)
        return self._add_bus(Bus(BusRecord(path, number, 0, None, width, order, key, 0)))

    def bind(self, endpoint: Endpoint, bus: Bus, address: bytes) -> None:
        """Make an endpoint the master of a bus that has none."""
        assert bus.master is None, f"bus {bus.number} has a master"
        generation = bus.record.generation + 1
        node = endpoint.node.number
        self._set_master(
            bus,
            endpoint,
            replace(bus.record, node=node, address=address, generation=generation),
        )

    def state_master(self, endpoint: Endpoint, bus: Bus) -> None:
        """The node says again that an endpoint is the master of a bus, which it is."""
        if endpoint.node.unstated is not None:
            endpoint.node.unstated.buses.discard((endpoint.number, bus.number))

    def unbind(self, bus: Bus) -> None:
        """Take a bus from its master."""
        self._set_master(bus, None, replace(bus.record, node=0, address=None))

    def _set_master(self, bus: Bus, master: Endpoint | None, record: BusRecord) -> None:
        if bus.master is not None:
            bus.master.buses.discard(bus.number)
        if master is not None:
            master.buses.add(bus.number)
        bus.master, bus.record = master, record
        self._ledger.put(record)
        self._write_bus(bus)

    def _write_bus(self, bus: Bus) -> None:
        master = None if bus.master is None else bus.master.number
        self._ledger.write(row.bus_row_key(bus.number), [master, bus.unused_since_utc])

    def sweep_buses(self, now_utc: int, keep_s: int) -> list[Bus]:
        """Forget, and return, the buses that were of no use for this time."""
        gone = []
        for bus in list(self.buses.values()):
            if bus.is_used:
                if bus.unused_since_utc:
                    bus.unused_since_utc = 0
                    self._write_bus(bus)
            elif not bus.unused_since_utc:
                bus.unused_since_utc = now_utc
                self._write_bus(bus)
            elif bus.unused_since_utc + keep_s <= now_utc:
                self._ledger.drop(bus_key(bus.record.path))
                self._ledger.write(row.bus_row_key(bus.number), None)
                del self.buses[bus.record.path], self.bus_numbers[bus.number]
                gone.append(bus)
        return gone

    # --- names ---

    def own(
        self, endpoint: Endpoint, bus: Bus, name: bytes, flags: NameFlags = NO_FLAGS
    ) -> NameOutcome:
        """Ask for a name (D4)."""
        before = bus.names.get_owner(name)
        outcome, _ = bus.names.request(name, endpoint.who, flags)
        self._follow(bus, name, before, endpoint.who)
        if endpoint.node.unstated is not None:
            endpoint.node.unstated.claims.discard((endpoint.number, (bus.number, name)))
        return outcome

    def release(self, endpoint: Endpoint, bus: Bus, name: bytes) -> ReleaseOutcome:
        """Give up a name, or the wait for it."""
        before = bus.names.get_owner(name)
        outcome, _ = bus.names.release(name, endpoint.who)
        self._follow(bus, name, before, endpoint.who)
        return outcome

    def _follow(self, bus: Bus, name: bytes, before: Who | None, asker: Who) -> None:
        """Follow what has become of a name, for its former owner and for who asked."""
        entries = bus.names.get_entries(name)
        waiting, claim = dict(entries), (bus.number, name)
        for who in {asker, before or asker}:
            endpoint = self.numbers[who[0]].endpoints[who[1]]
            if (who in waiting) is not (claim in endpoint.claims):
                endpoint.claims ^= {claim}
                self._count(self.names_of, endpoint, 1 if who in waiting else -1)
        self._ledger.write(row.queue_key(bus.number, name), row.encode_queue(entries))
        owner = bus.names.get_owner(name)
        if owner is None:
            self._ledger.drop(owner_key(bus.number, name))
        elif owner != before:
            self._ledger.put(OwnerRecord(bus.number, name, *owner))

    # --- matches ---

    def subscribe(self, endpoint: Endpoint, bus: Bus, what: What) -> bool:
        """Note what an endpoint wants; return whether that is new."""
        node, wish = endpoint.node, (bus.number, digest_what(what))
        if node.unstated is not None:
            node.unstated.wishes.discard((endpoint.number, wish))
        if wish in endpoint.wishes:
            return False
        wished = node.wishes.get(wish)
        if wished is None:
            wished = node.wishes[wish] = Wished(what)
            bus.match_count += 1
            self._ledger.put(MatchRecord(bus.number, node.number, what))
        wished.wanted_by.add(endpoint.number)
        endpoint.wishes.add(wish)
        self._count(self.wishes_of, endpoint, 1)
        return True

    def unsubscribe(self, endpoint: Endpoint, bus: Bus, what: What) -> bool:
        """Take back what an endpoint wanted; return whether it did."""
        wish = bus.number, digest_what(what)
        if wish not in endpoint.wishes:
            return False
        self._unwish(endpoint, wish)
        return True

    def wants(self, endpoint: Endpoint, bus: Bus, what: What) -> bool:
        """Tell whether an endpoint wants this already."""
        return (bus.number, digest_what(what)) in endpoint.wishes

    @staticmethod
    def is_told(node: Node, bus: Bus, what: What) -> bool:
        """Tell whether all nodes know that somebody on a node wants this, or did."""
        return (bus.number, digest_what(what)) in node.wishes

    def get_wishes(self, endpoint: Endpoint) -> list[tuple[Bus, What]]:
        """Return what an endpoint wants, of which bus."""
        wished = endpoint.node.wishes
        return [(self.bus_numbers[wish[0]], wished[wish].what) for wish in sorted(endpoint.wishes)]

    def _unwish(self, endpoint: Endpoint, wish: Wish) -> None:
        if wish not in endpoint.wishes:
            return
        endpoint.wishes.discard(wish)
        self._count(self.wishes_of, endpoint, -1)
        wished = endpoint.node.wishes[wish]
        wished.wanted_by.discard(endpoint.number)
        # While the node still states what it has, somebody else on it may want the same.
        if not wished.wanted_by and endpoint.node.unstated is None:
            self._drop_wish(endpoint.node, wish)

    def _drop_wish(self, node: Node, wish: Wish) -> None:
        del node.wishes[wish]
        self.bus_numbers[wish[0]].match_count -= 1
        self._ledger.drop(match_key(wish[0], node.number, wish[1]))
