"""All that the agent knows: each change is made in its own tables, in the switch and the journal.

There is no rule of the bus here; `core.py` and `grant.py` ask first whether something may be done.
What was checked cannot fail here, so a refusal of the switch is an assertion.

Invariants:

1. Tables, switch and journal say the same whenever a call returns: journal by the effects.
2. Numbers of endpoints, buses, blocks, matches and grants are never used twice, over restarts too
   where somebody outside may remember them (endpoints, blocks).
3. A notice is put into the rings after all that its subject had published (D15). Of what was
   granted or taken it tells when the journal knows (`announce`); of who is gone at once
   (`notify`): an agent killed in between tells that twice, and not never.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from ..proto import codec
from ..proto.codec import Fields
from ..proto.control import GrantFlags, Identity
from ..proto.errors import BusError, RemoteProtocolError
from ..proto.limits import (
    ADDRESS_BYTES,
    BLOOM_KEY_BYTES,
    FILTER_INSTRUCTION_BYTES,
    FILTER_INSTRUCTIONS,
    IDENTITY_BYTES,
    PATH_BYTES,
    REACH_BYTES,
    REACH_PATTERNS,
    TOKEN_BYTES,
)
from ..proto.match import encode_what, form_of, is_raw, take_overflow, take_what
from ..proto.notice import Event, Notice
from ..proto.terms import Terms
from .effect import Drop, Effect, Kind, Notify, Put
from .endpoint import ORDERS, Bus, BusId, Credentials, Endpoint, EndpointId
from .unique import Block

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ..proto.control import Wish
    from ..proto.match import What
    from .effect import ConnectionId
    from .federation import Federation
    from .port import SwitchPort

_FILTER_BYTES: Final = FILTER_INSTRUCTIONS * FILTER_INSTRUCTION_BYTES

#: Fixed part of an RX record, as docs/internals.md fixes it.
RX_HEADER_BYTES: Final = 64


def padded(size: int) -> int:
    """Return `size` rounded up to the 8 bytes at which everything in a ring begins."""
    return (size + 7) & ~7


def forms_of(what: What) -> tuple[bytes | None, bytes | None]:
    """Return packed terms and raw bits, one of them None."""
    return (what.pack(), None) if isinstance(what, Terms) else (None, what)


class Registry:
    """The endpoints and buses of one agent."""

    def __init__(
        self, switch: SwitchPort, node: str, effects: list[Effect], *, has_lanes: bool = True
    ) -> None:
        """Begin empty.

        Args:
            switch: Where messages go.
            node: The name of this node.
            effects: The list of the core, to which the journal's are added.
            has_lanes: Whether endpoints of a fifo bus may send to each other without the switch.
        """
        self._switch = switch
        self._has_lanes = has_lanes
        self._node = node
        self._effects = effects
        self._next_endpoint = 1
        self._next_bus = 1
        self._next_block = 1
        self._next_grant = 1
        self.endpoints: dict[EndpointId, Endpoint] = {}
        self.tokens: dict[bytes, Endpoint] = {}
        self.buses: dict[bytes, Bus] = {}
        #: Endpoints of each user, and their matches and grants to send together (D18).
        self.endpoints_of: Counter[int] = Counter()
        self.matches_of: Counter[int] = Counter()
        #: Set when this node is a member of a cluster.
        self.cluster: Federation | None = None

    # --- endpoints ---

    def find_endpoint(self, number: int) -> Endpoint | None:
        """Return the endpoint of a number."""
        return self.endpoints.get(EndpointId(number))

    def add_endpoint(self, token: bytes, credentials: Credentials) -> Endpoint:
        """Add an endpoint without rings, on no bus."""
        endpoint = Endpoint(EndpointId(self._next_endpoint), token, credentials)
        self._next_endpoint += 1
        self._enter(endpoint)
        self._save_agent()
        self._save(endpoint)
        return endpoint

    def identify(self, endpoint: Endpoint, principal: str) -> None:
        """Note who an endpoint has proven to be; it is on no bus yet."""
        assert endpoint.bus is None, "nobody has heard of it yet"
        endpoint.principal = principal
        self._switch.identify(endpoint.id, self._identity_of(endpoint))
        self._save(endpoint)

    def _identity_of(self, endpoint: Endpoint) -> bytes:
        who = endpoint.credentials
        name = endpoint.principal or f"uid:{who.uid}"
        return Identity(name, self._node, who.pid, who.uid, who.gid).encode()

    def _enter(self, endpoint: Endpoint) -> None:
        who = endpoint.credentials
        self._switch.add_endpoint(
            endpoint.id, who.uid, who.pid, who.uid, who.gid, self._identity_of(endpoint)
        )
        self.endpoints[endpoint.id] = endpoint
        self.tokens[endpoint.token] = endpoint
        self.endpoints_of[who.uid] += 1

    def remove_endpoint(self, endpoint: Endpoint, event: Event, reason: str, flush: bool) -> None:
        """Forget an endpoint, and tell who must know: senders, watchers, members (D15, D16, D20).

        Args:
            endpoint: The endpoint.
            event: LEFT or KILLED.
            reason: Why, for people.
            flush: Whether what it had published is sent first.
        """
        uid = endpoint.credentials.uid
        unread = self._switch.remove_endpoint(endpoint.id, flush)
        del self.endpoints[endpoint.id]
        del self.tokens[endpoint.token]
        self._count(self.endpoints_of, uid, -1)
        self._count(self.matches_of, uid, -len(endpoint.matches) - len(endpoint.sends))
        for kind in (Kind.ENDPOINT, Kind.ADDRESS, Kind.MATCH, Kind.SEND, Kind.REACH):
            self._effects.append(Drop(kind, endpoint.id))
        subject = tuple(endpoint.addresses)
        for sender, first, last, count in unread:
            if (receiver := self.endpoints.get(EndpointId(sender))) is not None:
                self.tell_unread(endpoint, receiver, (first, last, count), reason)
        bus = endpoint.bus
        if bus is None:
            return
        if self.cluster is not None and bus.cluster:
            self.cluster.receive_removed(endpoint)
        del bus.endpoints[endpoint.id]
        for address in endpoint.addresses:
            del bus.owners[address]
        was_master = bus.master is endpoint
        if subject:
            gone = self.describe(event, endpoint, reason)
            self.notify(self.find_watchers(bus), gone)
            self.tell(bus, gone)
        if was_master:
            bus.master = None
            self._switch.set_master(bus.id, None)
            self._save_bus(bus)
            self.notify(bus.endpoints.values(), Notice(Event.MASTER_LOST, subject, reason))
        if not bus.endpoints:
            self._switch.remove_bus(bus.id)
            del self.buses[bus.path]
            if self.cluster is not None and bus.cluster:
                self.cluster.receive_closed(bus)
            self._effects.append(Drop(Kind.BUS, bus.id))

    def tell_unread(
        self, endpoint: Endpoint, sender: Endpoint, numbers: tuple[int, int, int], reason: str
    ) -> None:
        """Tell a sender which messages the endpoint will not read: first, last, and how many."""
        first, last, count = numbers
        about = tuple(endpoint.addresses) or (endpoint.provisional,)
        detail = {"first": first, "last": last, "count": count}
        self.notify([sender], Notice(Event.UNREAD, about, reason, detail))

    def connect(
        self,
        endpoint: Endpoint,
        connection: ConnectionId,
        who: Credentials,
        tx_bytes: int,
        rx_bytes: int,
    ) -> tuple[int, int, int]:
        """Make rings and line of an endpoint; return the descriptors, which the caller closes.

        Raises:
            OSError: No memory or descriptors are left.
        """
        fds = self._switch.connect(endpoint.id, tx_bytes, rx_bytes)
        if who.has_other_pids or who.has_other_users:
            # What it would take for a number of its own, it does not get (D17).
            self._switch.set_namespaces(endpoint.id, who.has_other_pids, who.has_other_users)
        endpoint.connection = connection
        endpoint.rx_bytes = rx_bytes
        return fds

    def set_identity(self, endpoint: Endpoint, on: bool) -> None:
        """Give an endpoint the identities of senders, or no longer."""
        self._switch.set_ident(endpoint.id, on)
        endpoint.wants_identity = on
        self._save(endpoint)

    def set_filter(self, endpoint: Endpoint, program: bytes | None) -> None:
        """Attach a program or remove it.

        Raises:
            ValueError: What is wrong with the program; then nothing has changed.
        """
        self._switch.set_filter(endpoint.id, program)
        endpoint.filter = program
        self._save(endpoint)

    def silence(self, endpoint: Endpoint) -> None:
        """Send what an endpoint has published, and let it send no more (D20)."""
        self._switch.flush(endpoint.id)
        self._switch.set_silent(endpoint.id)
        endpoint.is_silent = True
        self._save(endpoint)

    def set_flags(self, endpoint: Endpoint, flags: GrantFlags) -> None:
        """Give an endpoint these rights and no others."""
        self._switch.set_monitor(endpoint.id, GrantFlags.MONITOR in flags)
        endpoint.flags = flags
        self._save(endpoint)

    # --- buses ---

    def add_bus(  # noqa: PLR0913 (what a bus consists of)
        self,
        path: bytes,
        width: int,
        order: str,
        key: bytes,
        uid: int,
        address: bytes,
        *,
        cluster: int = 0,
    ) -> Bus:
        """Add a bus that has no master yet; `cluster` is its number there, if it is one of it."""
        number = BusId(self._next_bus)
        bus = Bus(number, path, width, order, key, uid, address, cluster=cluster)
        self._next_bus += 1
        self._enter_bus(bus)
        self._save_bus(bus)
        return bus

    def _enter_bus(self, bus: Bus) -> None:
        self._switch.add_bus(bus.id, bus.width, bus.key, bus.cluster or None)
        if self._has_lanes and bus.order == ORDERS[0]:
            self._switch.allow_lanes(bus.id)
        self.buses[bus.path] = bus

    def attach(self, endpoint: Endpoint, bus: Bus) -> None:
        """Put an endpoint on a bus."""
        self._attach(endpoint, bus)
        self._save(endpoint)

    def readdress(self, endpoint: Endpoint) -> None:
        """Let the switch know the provisional address of an endpoint that is on a bus."""
        assert endpoint.bus is not None, "it is on a bus"
        provisional = _outside(endpoint.provisional)
        self._switch.attach(endpoint.id, endpoint.bus.id, provisional)

    def _attach(self, endpoint: Endpoint, bus: Bus) -> None:
        self._switch.attach(endpoint.id, bus.id, _outside(endpoint.provisional))
        endpoint.bus = bus
        bus.endpoints[endpoint.id] = endpoint
        if bus.cluster:
            # Nowhere, until the cluster's master has said where.
            self._set_reach(endpoint, ())

    def set_master(self, bus: Bus, endpoint: Endpoint, address: bytes) -> None:
        """Make an endpoint of the bus its master, at an address that it owns."""
        self._switch.set_master(bus.id, endpoint.id)
        bus.master = endpoint
        bus.master_address = address
        self._save_bus(bus)

    # --- grants ---

    def choose_address(self, bus: Bus) -> bytes:
        """Return a unique address that was never returned before, be the bus or the agent new.

        A bus has a block of its own in each life of the agent, so that only the number of the next
        block is to be written down, and its addresses follow each other.
        """
        if bus.cluster:
            assert self.cluster is not None, "a bus of the cluster is known to its members"
            return self.cluster.choose_address()
        if bus.block is None:
            bus.block = Block(self._next_block)
            self._next_block += 1
            self._save_agent()
        return bus.block.take()

    def own(self, endpoint: Endpoint, address: bytes) -> None:
        """Give a free address."""
        self._own(endpoint, address)
        # The value is the place among its addresses, the first of which is the default source.
        self._put(Kind.ADDRESS, endpoint.id, address, [self._next_grant])
        self._next_grant += 1

    def _own(self, endpoint: Endpoint, address: bytes) -> None:
        bus = endpoint.bus
        assert bus is not None, "an address is owned on a bus"
        is_given = self._switch.own(endpoint.id, address)
        assert is_given, "the address was free"
        bus.owners[address] = endpoint
        endpoint.addresses.append(address)
        if address[:1].isdigit():
            bus.spent.spend(address)

    def disown(self, endpoint: Endpoint, address: bytes) -> None:
        """Take an owned address away."""
        assert endpoint.bus is not None, "an address is owned on a bus"
        was_owned = self._switch.disown(endpoint.id, address)
        assert was_owned, "the address was the endpoint's"
        del endpoint.bus.owners[address]
        endpoint.addresses.remove(address)
        self._effects.append(Drop(Kind.ADDRESS, endpoint.id, address))

    def subscribe(self, endpoint: Endpoint, wishes: Iterable[Wish]) -> None:
        """Add matches; those for the same are replaced, the last wish counts."""
        wanted = {form: (overflow, deadline_ms) for _, form, overflow, deadline_ms in wishes}
        for form in [one for one in wanted if one in endpoint.matches]:
            self.unsubscribe(endpoint, form)
        first, self._next_grant = self._next_grant, self._next_grant + len(wanted)
        matches = [
            (number, form, overflow, deadline_ms)
            for number, (form, (overflow, deadline_ms)) in enumerate(wanted.items(), first)
        ]
        self._subscribe(endpoint, matches)
        for number, form, overflow, deadline_ms in matches:
            two = [None, form[1:]] if is_raw(form) else [form, None]
            key = number.to_bytes(8, "big")
            self._put(Kind.MATCH, endpoint.id, key, [*two, overflow, deadline_ms])

    def _subscribe(
        self, endpoint: Endpoint, matches: Sequence[tuple[int, bytes, int, int]]
    ) -> None:
        """Let the switch know matches: number, form, overflow, deadline in ms."""
        self._switch.subscribe_all(endpoint.id, matches)
        for number, form, overflow, deadline_ms in matches:
            endpoint.matches[form] = (number, overflow, deadline_ms)
        self.matches_of[endpoint.credentials.uid] += len(matches)

    def unsubscribe(self, endpoint: Endpoint, form: bytes) -> None:
        """Remove a match, if there is one."""
        number, *_ = endpoint.matches.pop(form, (0,))
        if number:
            self._switch.unsubscribe(endpoint.id, number)
            self._count(self.matches_of, endpoint.credentials.uid, -1)
            self._effects.append(Drop(Kind.MATCH, endpoint.id, number.to_bytes(8, "big")))

    def allow_send(self, endpoint: Endpoint, what: What) -> None:
        """Allow multicasts that are not yet allowed."""
        number = self._take_grant()
        self._allow_send(endpoint, number, what)
        self._put(Kind.SEND, endpoint.id, number.to_bytes(8, "big"), encode_what(what))

    def _allow_send(self, endpoint: Endpoint, number: int, what: What) -> None:
        self._switch.allow_send(endpoint.id, number, *forms_of(what))
        endpoint.sends[what] = number
        self.matches_of[endpoint.credentials.uid] += 1

    def forbid_send(self, endpoint: Endpoint, what: What) -> None:
        """Take such a grant back."""
        number = endpoint.sends.pop(what)
        self._switch.forbid_send(endpoint.id, number)
        self._count(self.matches_of, endpoint.credentials.uid, -1)
        self._effects.append(Drop(Kind.SEND, endpoint.id, number.to_bytes(8, "big")))

    def set_reach(self, endpoint: Endpoint, reach: tuple[str, ...]) -> None:
        """Let a member of a bus of the cluster send to what these patterns cover, and no further.

        A bus of this host has no policy: nobody's reach is set there.
        """
        self._set_reach(endpoint, reach)
        self._put(Kind.REACH, endpoint.id, b"", [list(reach)])

    def _set_reach(self, endpoint: Endpoint, reach: tuple[str, ...]) -> None:
        self._switch.set_reach(endpoint.id, reach)
        endpoint.reach = reach

    def _take_grant(self) -> int:
        self._next_grant += 1
        return self._next_grant - 1

    # --- notices ---

    def notify(
        self, receivers: Iterable[Endpoint], notice: Notice, trunk: int | None = None
    ) -> None:
        """Put a notice into rings, behind what they get from that node."""
        for endpoints, body in _address(receivers, notice):
            self._switch.notify(endpoints, body, trunk)

    def announce(self, receivers: Iterable[Endpoint], notice: Notice) -> None:
        """Put a notice into rings when the journal has what it tells of."""
        self._effects += [Notify(*one) for one in _address(receivers, notice)]

    def tell(self, bus: Bus, notice: Notice) -> None:
        """Tell watchers on other nodes, when the journal has what it tells of."""
        if self.cluster is not None and bus.cluster:
            self.cluster.tell(bus, notice)

    @staticmethod
    def find_watchers(bus: Bus, but: Endpoint | None = None) -> list[Endpoint]:
        """Return the master and all that have the grant to read notices, but not the subject."""
        return [
            endpoint
            for endpoint in bus.endpoints.values()
            if endpoint is not but
            and (endpoint is bus.master or GrantFlags.NOTICES in endpoint.flags)
        ]

    @staticmethod
    def describe(event: Event, endpoint: Endpoint, reason: str) -> Notice:
        """Return the notice of an event, with who the endpoint is."""
        who = endpoint.credentials
        detail = {"endpoint": endpoint.id, "pid": who.pid, "uid": who.uid, "gid": who.gid}
        return Notice(event, tuple(endpoint.addresses), reason, detail)

    # --- the journal ---

    def _put(self, kind: Kind, owner: int, key: bytes, value: list[Any]) -> None:
        self._effects.append(Put(kind, owner, key, codec.encode(value)))

    def _save_agent(self) -> None:
        self._put(Kind.AGENT, 0, b"", [self._next_endpoint, self._next_block])

    def _save(self, endpoint: Endpoint) -> None:
        who = endpoint.credentials
        value = [
            endpoint.token,
            who.pid,
            who.uid,
            who.gid,
            who.start_ticks,
            endpoint.principal,
            0 if endpoint.bus is None else endpoint.bus.id,
            int(endpoint.flags),
            endpoint.wants_identity,
            endpoint.is_silent,
            endpoint.filter,
        ]
        self._put(Kind.ENDPOINT, endpoint.id, b"", value)

    def _save_bus(self, bus: Bus) -> None:
        master = 0 if bus.master is None else bus.master.id
        value = [
            bus.path,
            bus.width,
            ORDERS.index(bus.order),
            bus.key,
            bus.master_uid,
            bus.master_address,
            master,
            bus.cluster,
        ]
        self._put(Kind.BUS, bus.id, b"", value)

    def load(self, entries: Iterable[Put]) -> None:
        """Build everything anew from the entries of a journal; to be called once, when empty.

        Endpoints have no connection afterwards. The order of entries does not matter.

        Raises:
            RemoteProtocolError: The entries are not what an agent wrote. The registry and its
                switch are of no use afterwards.
        """
        try:
            self._load(entries)
        except (KeyError, ValueError, BusError) as error:
            raise RemoteProtocolError(f"entries that contradict each other: {error!r}") from error

    def _load(self, entries: Iterable[Put]) -> None:
        masters: list[tuple[Bus, int]] = []
        buses: dict[int, Bus] = {}
        addresses: list[tuple[int, Put]] = []
        # Numbers of kinds ascend from what is referred to, to what refers.
        for entry in sorted(entries, key=lambda entry: (entry.kind, entry.owner, entry.key)):
            fields = Fields(f"journal, {entry.kind.name}", codec.decode(entry.value))
            if entry.kind is Kind.AGENT:
                self._next_endpoint, self._next_block = fields.take_int(1), fields.take_int(1)
            elif entry.kind is Kind.BUS:
                bus, master = _take_bus(entry.owner, fields)
                self._enter_bus(bus)
                buses[bus.id] = bus
                masters.append((bus, master))
                self._next_bus = max(self._next_bus, bus.id + 1)
            elif entry.kind is Kind.ENDPOINT:
                self._load_endpoint(EndpointId(entry.owner), fields, buses)
            elif entry.kind is Kind.REACH:
                self._load_reach(self.endpoints[EndpointId(entry.owner)], fields)
            elif entry.kind is Kind.ADDRESS:
                addresses.append((fields.take_int(), entry))
            else:
                self._load_grant(entry, fields)
            fields.end()
        for place, entry in sorted(addresses, key=lambda pair: pair[0]):
            endpoint = self.endpoints[EndpointId(entry.owner)]
            _demand(endpoint.bus is not None and entry.key not in endpoint.bus.owners)
            self._own(endpoint, entry.key)
            self._next_grant = max(self._next_grant, place + 1)
        for bus, number in masters:
            if number:
                bus.master = self.endpoints[EndpointId(number)]
                _demand(bus.owners.get(bus.master_address) is bus.master)
                self._switch.set_master(bus.id, number)
            _demand(bool(bus.endpoints))

    def _load_endpoint(self, number: EndpointId, fields: Fields, buses: Mapping[int, Bus]) -> None:
        token = fields.take_bytes(TOKEN_BYTES, TOKEN_BYTES)
        pid, uid, gid = (fields.take_int(0, codec.U32_MAX) for _ in range(3))
        credentials = Credentials(pid, uid, gid, fields.take_int())
        endpoint = Endpoint(number, token, credentials, fields.take_str(IDENTITY_BYTES))
        _demand(0 < number < self._next_endpoint and token not in self.tokens)
        self._enter(endpoint)
        if bus := fields.take_int():
            self._attach(endpoint, buses[bus])
        endpoint.flags = GrantFlags(fields.take_int())
        if endpoint.flags & GrantFlags.MONITOR:
            self._switch.set_monitor(number, True)
        if fields.take_bool():
            endpoint.wants_identity = True
            self._switch.set_ident(number, True)
        if fields.take_bool():
            endpoint.is_silent = True
            self._switch.set_silent(number)
        program = fields.take_maybe_bytes(0, _FILTER_BYTES)
        if program is not None:
            endpoint.filter = program
            self._switch.set_filter(number, program)

    def _load_grant(self, entry: Put, fields: Fields) -> None:
        endpoint = self.endpoints[EndpointId(entry.owner)]
        number = int.from_bytes(entry.key, "big")
        self._next_grant = max(self._next_grant, number + 1)
        what = take_what(fields)
        if endpoint.bus is None:
            fields.fail("grant of an endpoint on no bus")
        if entry.kind is Kind.SEND:
            self._allow_send(endpoint, number, what)
        else:
            overflow, deadline_ms = take_overflow(fields)
            self._subscribe(endpoint, [(number, form_of(what), int(overflow), deadline_ms)])

    def _load_reach(self, endpoint: Endpoint, fields: Fields) -> None:
        _demand(endpoint.bus is not None and endpoint.bus.cluster > 0)
        reach = fields.take_list(REACH_PATTERNS)
        each = Fields("reach", reach)
        self._set_reach(endpoint, tuple(each.take_str(REACH_BYTES) for _ in reach))

    @staticmethod
    def _count(counter: Counter[int], uid: int, change: int) -> None:
        """Count, and forget users of whom nothing is left."""
        counter[uid] += change
        assert counter[uid] >= 0, "nothing is taken away that was not there"
        if not counter[uid]:
            del counter[uid]


def _outside(provisional: bytes) -> bytes | None:
    """Return a provisional address by which other nodes can answer, if it is one."""
    return provisional if b"." in provisional else None


def _demand(holds: bool) -> None:
    if not holds:
        raise RemoteProtocolError("entries that contradict each other")


def _take_bus(number: int, fields: Fields) -> tuple[Bus, int]:
    path = fields.take_bytes(1, PATH_BYTES)
    width = fields.take_int()
    order = ORDERS[fields.take_int(0, len(ORDERS) - 1)]
    key = fields.take_bytes(BLOOM_KEY_BYTES, BLOOM_KEY_BYTES)
    uid = fields.take_int(0, codec.U32_MAX)
    address, master = fields.take_bytes(0, ADDRESS_BYTES), fields.take_int()
    cluster = fields.take_int(0, codec.U32_MAX)
    return Bus(BusId(number), path, width, order, key, uid, address, cluster=cluster), master


def _address(
    receivers: Iterable[Endpoint], notice: Notice
) -> Iterator[tuple[tuple[int, ...], bytes]]:
    """Return who is told what: those whose rings cannot hold the notice get a shorter one."""
    body = notice.encode()
    size = RX_HEADER_BYTES + padded(len(body))
    fitting = []
    for receiver in receivers:
        # A receiver that is away has no ring yet; it is taken to make one as large as usual.
        if receiver.rx_bytes and size > receiver.rx_bytes:
            yield (receiver.id,), _abridged(notice, receiver.rx_bytes).encode()
        else:
            fitting.append(receiver.id)
    if fitting:
        yield tuple(fitting), body


def _abridged(notice: Notice, rx_bytes: int) -> Notice:
    """Return the notice for a ring that cannot hold all of it: it says how much is left out."""
    subject = notice.subject
    detail: dict[str, int | str] = {
        key: value for key, value in notice.detail.items() if not isinstance(value, str)
    }
    while True:
        subject = subject[: len(subject) // 2]
        detail["omitted"] = len(notice.subject) - len(subject)
        made = Notice(notice.event, subject, notice.reason, detail)
        if not subject or RX_HEADER_BYTES + padded(len(made.encode())) <= rx_bytes:
            return made
