"""What nodes ask for their endpoints: judged by the policy, then done in the registry.

Invariants:

1. A refused call has changed nothing.
2. A call that states what is there already changes nothing, and has the same result.
3. Whatever a node asks concerns that node's own endpoints and leases.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..link.identity import Role
from ..proto.address import BusAddress
from ..proto.errors import (
    AddressInUse,
    Denied,
    IdentityError,
    InvalidArgument,
    NoBus,
    NoSuchEndpoint,
    NotOwned,
    ShareExceeded,
    Stale,
    WidthMismatch,
)
from ..proto.limits import (
    ADDRESSES_PER_ENDPOINT,
    BLOOM_BITS,
    BLOOM_BITS_DEFAULT,
    BLOOM_KEY_BYTES,
    REACH_BYTES,
    REACH_PATTERNS,
    TABLE_ENTRIES,
)
from ..proto.match import check_what
from ..proto.names import NameFlags, NameOutcome
from ..proto.operation import NONCE_BYTES, ClusterOp, endpoint_claim
from ..proto.record import ORDERS
from ..proto.terms import Terms
from ..proto.text import escape
from .policy import Action, Decision, Policy
from .row import QUEUE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..proto.match import What
    from .effect import Note
    from .entity import Bus, Endpoint, Node
    from .issuer import Issuer
    from .registry import Registry

#: Endpoints of one node: all users of a large host.
ENDPOINTS_PER_NODE: Final = 65_536
#: Blocks of one node; each is good for as many endpoints as it likes.
LEASES_PER_NODE: Final = 1024
#: Matches of one principal over all nodes: 100,000 on one bus, and some more.
MATCHES_PER_PRINCIPAL: Final = 131_072
#: Names that one principal owns or waits for, over all nodes.
NAMES_PER_PRINCIPAL: Final = 131_072
#: The same of all principals of one node together: a quarter of the table.
SHARE_PER_NODE: Final = TABLE_ENTRIES // 4
#: Buses of the cluster.
BUSES: Final = 65_536
#: Challenges of one node that may be open; the oldest are forgotten.
CHALLENGES: Final = 4096
#: How long a challenge is good: an application signs at once.
CHALLENGE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Quotas:
    """What one node and one principal may have (D18)."""

    endpoints_per_node: int = ENDPOINTS_PER_NODE
    leases_per_node: int = LEASES_PER_NODE
    matches_per_principal: int = MATCHES_PER_PRINCIPAL
    names_per_principal: int = NAMES_PER_PRINCIPAL
    matches_per_node: int = SHARE_PER_NODE
    names_per_node: int = SHARE_PER_NODE
    #: Records of the table: each node holds all of them.
    records: int = TABLE_ENTRIES
    buses: int = BUSES


class Calls:
    """Carries calls out. `policy`, `policy_number` and `denied` are set by the core."""

    def __init__(
        self,
        registry: Registry,
        issuer: Issuer,
        draw: Callable[[int], bytes],
        note: Note,
        quotas: Quotas,
    ) -> None:
        """Begin with a policy that allows nothing; arguments as of `core.py`."""
        self._registry, self._issuer = registry, issuer
        self._draw, self._note, self._quotas = draw, note, quotas
        self._challenges: dict[int, OrderedDict[int, tuple[bytes, float]]] = {}
        self.policy = Policy()
        self.policy_number = 0
        self.denied: frozenset[int] = frozenset()

    def carry_out(
        self, node: Node, op: ClusterOp, args: Mapping[str, Any], now: float, now_utc: float
    ) -> object:
        """Do what a node asks; return the value of the result.

        Raises:
            BusError: It is refused.
            RemoteProtocolError: An argument is malformed.
        """
        match op:
            case ClusterOp.LEASE:
                return self._lease(node, args.get("block"))
            case ClusterOp.RETURN:
                self._registry.give_back(node, args["block"])
                return None
            case ClusterOp.CHALLENGE:
                return self._challenge(node, args["endpoint"], now)
            case ClusterOp.ENTER:
                return self._enter(node, args, now, now_utc)
            case ClusterOp.EXIT:
                if args["endpoint"] in node.endpoints:
                    self._registry.remove(node.endpoints[args["endpoint"]])
                return None
        endpoint = node.endpoints.get(args["endpoint"])
        if endpoint is None or not endpoint.principal:
            raise NoSuchEndpoint(f"endpoint {args['endpoint']} of {node.name} has not entered")
        return self._carry_out_for(endpoint, op, args)

    def _carry_out_for(self, endpoint: Endpoint, op: ClusterOp, args: Mapping[str, Any]) -> object:
        if op is ClusterOp.BIND:
            return self._bind(endpoint, args)
        if op is ClusterOp.ASK:
            return self._ask(endpoint, args)
        path: bytes = args["path"]
        bus = self._registry.buses.get(path)
        if bus is None:
            raise NoBus(f"no bus {escape(path)} in the cluster: nobody has bound it")
        result: object = None
        match op:
            case ClusterOp.UNBIND:
                self._unbind(endpoint, bus)
            case ClusterOp.OWN:
                result = self._own(endpoint, bus, args["name"], args.get("flags") or 0)
            case ClusterOp.RELEASE:
                outcome = self._registry.release(endpoint, bus, _name(path, args["name"]))
                result = {"outcome": int(outcome)}
            case ClusterOp.SUBSCRIBE:
                self._subscribe(endpoint, bus, _what(args, bus))
            case ClusterOp.UNSUBSCRIBE:
                self._registry.unsubscribe(endpoint, bus, _what(args, bus))
            case _:
                raise AssertionError(f"{op.name} is not carried out here")
        return result

    # --- nodes and endpoints ---

    def _lease(self, node: Node, block: int | None) -> object:
        if block is not None:
            if not self._registry.state_lease(node, block):
                raise Stale(f"block {block} is not leased to {node.name} any more")
            return {"block": block}
        if len(self._registry.leases.get_blocks(node.number)) >= self._quotas.leases_per_node:
            limit = self._quotas.leases_per_node
            raise ShareExceeded(f"{node.name} has {limit} blocks, which is the limit")
        return {"block": self._registry.lease(node)}

    def forget(self, node: Node) -> None:
        """Forget the challenges of a node whose link is gone."""
        self._challenges.pop(node.number, None)

    def _challenge(self, node: Node, number: int, now: float) -> object:
        nonce = self._draw(NONCE_BYTES)
        open_ones = self._challenges.setdefault(node.number, OrderedDict())
        open_ones.pop(number, None)
        open_ones[number] = (nonce, now + CHALLENGE_S)
        if len(open_ones) > CHALLENGES:
            open_ones.popitem(last=False)
        return {"nonce": nonce, "claim": self._claim(node, number, nonce)}

    def _claim(self, node: Node, number: int, nonce: bytes) -> bytes:
        return endpoint_claim(nonce, self._issuer.cluster, node.name, number)

    def _enter(self, node: Node, args: Mapping[str, Any], now: float, now_utc: float) -> object:
        number: int = args["endpoint"]
        if number not in node.endpoints and (
            len(node.endpoints) >= self._quotas.endpoints_per_node
        ):
            limit = self._quotas.endpoints_per_node
            raise ShareExceeded(f"{node.name} has {limit} endpoints, which is the limit")
        if args.get("chain") is not None:
            signature = args.get("signature") or b""
            return self._prove(node, number, args["chain"], signature, now, now_utc)
        if args.get("principal") is not None:
            return self._enter_again(node, number, args["principal"], now_utc)
        principal = f"uid/{args['uid']}@{node.name}"
        self._registry.enter(node, number, principal)
        return {"principal": principal, "until": None}

    def _prove(  # noqa: PLR0913 (what is to be proven)
        self,
        node: Node,
        number: int,
        chain: list[bytes],
        signature: bytes,
        now: float,
        now_utc: float,
    ) -> object:
        nonce, until = self._challenges.get(node.number, OrderedDict()).pop(number, (b"", now))
        if until <= now:
            raise Denied(f"endpoint {number} of {node.name} has no open challenge")
        claim = self._claim(node, number, nonce)
        try:
            proven = self._issuer.prove(chain, signature, claim, now_utc, self.denied)
        except IdentityError as error:
            raise Denied(f"endpoint {number} of {node.name}: {error}") from error
        if proven.identity.role is not Role.PRINCIPAL:
            raise Denied(f"{proven.identity} is no principal, so no endpoint can be it")
        principal = f"principal/{proven.identity.name}"
        self._registry.enter(node, number, principal, proven.serial, proven.until_utc)
        subject = f"endpoint {number} of {node.name}"
        self._note(principal, "enter", subject, True, f"serial {proven.serial:x}")
        return {"principal": principal, "until": proven.until_utc}

    def _enter_again(self, node: Node, number: int, principal: str, now_utc: float) -> object:
        had = node.endpoints.get(number)
        if had is None or not had.serial or had.principal != principal:
            text = f"endpoint {number} of {node.name} has not proven that it is {principal}"
            raise Denied(text)
        if had.serial in self.denied or had.until_utc <= now_utc:
            raise Denied(f"the certificate of endpoint {number} of {node.name} is not good now")
        self._registry.enter(node, number, principal, had.serial, had.until_utc)
        return {"principal": principal, "until": had.until_utc}

    # --- buses ---

    def _bind(self, endpoint: Endpoint, args: Mapping[str, Any]) -> object:
        path: bytes = args["path"]
        name = _name(path, args["address"])
        self._judge(endpoint, Action.BIND, path)
        # Others may send to whoever has this name, so it is not everybody's who may bind.
        self._judge(endpoint, Action.OWN, path, name)
        width, order = args.get("width"), args.get("order")
        if width is not None and width not in BLOOM_BITS:
            raise InvalidArgument(f"width {width}, not one of {BLOOM_BITS}")
        if order is not None and order not in ORDERS:
            raise InvalidArgument(f"order {order!a}, not one of {ORDERS}")
        bus = self._registry.buses.get(path)
        if bus is None:
            bus = self._add_bus(path, width or BLOOM_BITS_DEFAULT, order or ORDERS[0])
        elif bus.master is endpoint and bus.record.address == name:
            self._registry.state_master(endpoint, bus)
            return _describe(bus)
        else:
            self._check_free(endpoint, bus, name, width, order)
        self._registry.bind(endpoint, bus, name)
        self._note(endpoint.principal, "bind", escape(path), True, f"on {endpoint.node.name}")
        return _describe(bus)

    def _add_bus(self, path: bytes, width: int, order: str) -> Bus:
        if len(self._registry.buses) >= self._quotas.buses:
            raise ShareExceeded(f"{self._quotas.buses} buses, which is the limit")
        self._check_records()
        return self._registry.add_bus(path, width, order, self._draw(BLOOM_KEY_BYTES))

    def _check_free(
        self, endpoint: Endpoint, bus: Bus, name: bytes, width: int | None, order: str | None
    ) -> None:
        """Check that an endpoint may become the master of a bus that is there (D2, D16)."""
        path, record = escape(bus.record.path), bus.record
        if bus.master is not None:
            on = self._registry.numbers[record.node].name
            raise AddressInUse(f"{path} is bound: its master is on {on}")
        if (width or record.width, order or record.order) != (record.width, record.order):
            raise InvalidArgument(f"{path} has {record.width} bits and order {record.order}")
        owner = bus.names.get_owner(name)
        if owner not in (None, endpoint.who):
            raise AddressInUse(f"the address for the master of {path} has another owner")

    def _unbind(self, endpoint: Endpoint, bus: Bus) -> None:
        if bus.master is not endpoint:
            raise NotOwned(f"endpoint {endpoint.number} is not the master of this bus")
        self._registry.unbind(bus)
        path = escape(bus.record.path)
        self._note(endpoint.principal, "unbind", path, True, f"on {endpoint.node.name}")

    # --- names and matches ---

    def _own(self, endpoint: Endpoint, bus: Bus, given: bytes, number: int) -> object:
        name = _name(bus.record.path, given)
        try:
            flags = NameFlags(number)
        except ValueError as error:
            raise InvalidArgument(f"flags {number} of a name") from error
        rule = self._judge(endpoint, Action.OWN, bus.record.path, name)
        if name == bus.record.address:
            raise AddressInUse("this is the address of the bus's master")
        if (bus.number, name) not in endpoint.claims:
            if len(endpoint.claims) >= ADDRESSES_PER_ENDPOINT:
                limit = f"{ADDRESSES_PER_ENDPOINT} names of endpoint {endpoint.number}"
                raise ShareExceeded(f"{limit}, which is the limit")
            limits = self._quotas.names_per_principal, self._quotas.names_per_node
            self._check_share(endpoint, "names", self._registry.names_of, limits)
            if bus.names.get_owner(name) is None:
                self._check_records()
            if len(bus.names.get_queue(name)) >= QUEUE:
                raise ShareExceeded(f"{QUEUE} wait for this name, which is the limit")
        outcome = self._registry.own(endpoint, bus, name, flags)
        if outcome is NameOutcome.PRIMARY_OWNER:
            subject = str(BusAddress(bus.record.path, name))
            detail = f"endpoint {endpoint.number} on {endpoint.node.name}, rule {rule}"
            self._note(endpoint.principal, "own", subject, True, detail)
        return {"outcome": int(outcome)}

    def _subscribe(self, endpoint: Endpoint, bus: Bus, what: What) -> None:
        path = bus.record.path
        rule = self._judge(endpoint, Action.RECEIVE, path, what, is_multicast=True)
        principal = endpoint.principal
        if self._registry.wants(endpoint, bus, what):
            # Said again; it may be at its limit.
            self._registry.subscribe(endpoint, bus, what)
            return
        limits = self._quotas.matches_per_principal, self._quotas.matches_per_node
        self._check_share(endpoint, "matches", self._registry.wishes_of, limits)
        if not self._registry.is_told(endpoint.node, bus, what):
            self._check_records()
        self._registry.subscribe(endpoint, bus, what)
        if isinstance(what, bytes) or not what:
            # Nobody can tell what raw bits are about, and everything is everything (D9).
            shown = f"raw bits {what.hex()[:32]}" if isinstance(what, bytes) else "everything"
            detail = f"{shown}; endpoint {endpoint.number} on {endpoint.node.name}, rule {rule}"
            self._note(principal, "receive", escape(path), True, detail)

    def _check_share(
        self, endpoint: Endpoint, what: str, counter: Mapping[str, int], limits: tuple[int, int]
    ) -> None:
        """Check that principal and node may have one more."""
        for who, limit in zip(endpoint.accounts, limits, strict=True):
            if counter[who] >= limit:
                raise ShareExceeded(f"{limit} {what} of {who}, which is the limit")

    def _check_records(self) -> None:
        """Check that the table may have one more."""
        if self._registry.record_count >= self._quotas.records:
            raise ShareExceeded(f"{self._quotas.records} records in the table, which is the limit")

    def _judge(
        self,
        endpoint: Endpoint,
        action: Action,
        path: bytes,
        target: bytes | What | None = None,
        *,
        is_multicast: bool = False,
    ) -> str:
        """Return the rule that allows it; Denied if none does."""
        decision = self.policy.decide(
            action, endpoint.principal, path, target, is_multicast=is_multicast
        )
        if not decision.is_allowed:
            raise Denied(decision.reason)
        return decision.rule

    def _ask(self, endpoint: Endpoint, args: Mapping[str, Any]) -> object:
        path: bytes = args["path"]
        try:
            action = Action(args["action"])
        except ValueError as error:
            raise InvalidArgument(f"no policy is about {args['action'][:100]!a}") from error
        target: bytes | What | None = None
        is_multicast = args.get("address") is None
        if action in (Action.OWN, Action.SEND, Action.RECEIVE):
            target = _what(args, None) if is_multicast else _normal(path, args["address"])
        decision = self.policy.decide(
            action, endpoint.principal, path, target, is_multicast=is_multicast
        )
        reach: tuple[str, ...] = ()
        if action is Action.SEND and not is_multicast:
            reach = self.policy.get_reach(endpoint.principal, path)
            size = sum(len(one.encode()) for one in reach)
            if len(reach) > REACH_PATTERNS or size > REACH_BYTES:
                limit = f"the limit is {REACH_PATTERNS} of {REACH_BYTES} bytes"
                text = f"{len(reach)} addresses of {size} bytes in `send` for {endpoint.principal}"
                decision, reach = Decision(False, reason=f"{text}; {limit}"), ()
        if action is Action.MONITOR or not decision.is_allowed:
            # Whoever sees what is meant for others is noted (D19), and whoever is refused.
            detail = decision.rule or decision.reason
            self._note(endpoint.principal, action.value, escape(path), decision.is_allowed, detail)
        return {
            "is_allowed": decision.is_allowed,
            "rule": decision.rule,
            "reason": decision.reason,
            "reach": reach,
            "policy": self.policy_number,
        }


def _describe(bus: Bus) -> dict[str, object]:
    record = bus.record
    return {
        "bus": record.number,
        "width": record.width,
        "order": record.order,
        "key": record.key,
        "generation": record.generation,
    }


def _normal(path: bytes, given: bytes) -> bytes:
    """Return an address as it is compared: without zeros at its end."""
    return BusAddress(path, given).address


def _name(path: bytes, given: bytes) -> bytes:
    """Return a name that can be owned; others are given by agents, or nobody's."""
    address = BusAddress(path, given)
    if address.is_unique or address.is_provisional:
        raise NotOwned(f"nobody can own {address}: agents give such addresses")
    return address.address


def _what(args: Mapping[str, Any], bus: Bus | None) -> What:
    """Return what a multicast or a subscription is about."""
    terms, bits = args.get("terms"), args.get("bits")
    if (terms is None) is (bits is None):
        raise InvalidArgument("neither terms nor bits, or both")
    what: What = args["bits"] if terms is None else Terms.unpack(terms)
    check_what(what)
    if bus is not None and isinstance(what, bytes) and len(what) * 8 != bus.record.width:
        path = escape(bus.record.path)
        raise WidthMismatch(f"{len(what) * 8} bits, but {path} has {bus.record.width}")
    return what
