"""Messages that carry control items: from a bus's master to an endpoint, through the agent (D5).

Invariants:

1. The items are in effect before the message can be read, and it can be read only if they are.
2. What its target had sent while it still might is accepted before something is taken from it
   (D15).
3. After a refusal nothing has changed, but what `grant.py` says of chosen addresses.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ..proto import control
from ..proto.address import format_within, is_provisional
from ..proto.codec import U64_MAX, Fields
from ..proto.control import (
    BUS_SOCKET,
    SCM_MULTICAST_MATCH,
    GrantFlags,
    OwnedAddr,
    RevokeAddr,
    RevokeMatch,
    RevokeSend,
)
from ..proto.errors import (
    BadDestination,
    BusError,
    Denied,
    InvalidArgument,
    NoSuchEndpoint,
    NotOwned,
    OutcomeUnknown,
    RemoteProtocolError,
    ShutDown,
    TooBig,
)
from ..proto.limits import (
    ADDRESS_BYTES,
    CONTROL_ITEMS,
    DEADLINE_MS_MAX,
    IDENTITY_BYTES,
    INLINE_BYTES,
)
from ..proto.text import escape
from .effect import Audit, Deliver
from .endpoint import EndpointId
from .grant import COMMANDS, Draft, apply
from .registry import RX_HEADER_BYTES, padded

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence

    from ..proto.frames import Result
    from .effect import Effect
    from .endpoint import Bus, Endpoint
    from .federation import Federation
    from .grant import Command
    from .port import SwitchPort
    from .registry import Registry
    from .steps import Steps, Ticket

#: What an identity takes in a record: the name of the node, and numbers.
_IDENTITY_ROOM: Final = IDENTITY_BYTES + 65

_ITEM: Final = struct.Struct("<HHI")


@dataclass(frozen=True, slots=True)
class _Judged:
    """Items that may be carried out.

    `packed` is as they stand in an RX record, with the addresses that were `chosen`; `changes` is
    what they change.
    """

    packed: bytes
    chosen: list[bytes]
    changes: list[Command]


@dataclass(frozen=True, slots=True)
class Letter:
    """The message that brings the items; `numbers` are serial, reply_to and deadline in ms."""

    src: bytes
    dst: bytes
    body: bytes
    numbers: tuple[int, int, int]


class Control:
    """Carries out CONTROL."""

    def __init__(
        self,
        registry: Registry,
        switch: SwitchPort,
        effects: list[Effect],
        matches_per_user: int,
    ) -> None:
        """Change this registry; messages are appended to `effects`, the core's."""
        self._registry = registry
        self._switch = switch
        self._effects = effects
        self._matches_per_user = matches_per_user
        #: Set when this node is a member of a cluster.
        self.cluster: Federation | None = None

    def carry_out(self, sender: Endpoint, args: Mapping[str, Any]) -> object:
        """Carry out the items, then send the message.

        Returns:
            The result of the call, or on a bus of the cluster the steps that lead to it.

        Raises:
            Denied: The sender is not its bus's master, or an item is for another bus. EPERM.
            ShutDown: It has closed its sending side. EPIPE.
            NotOwned: The source is not its own. EADDRNOTAVAIL.
            BadDestination, NoSuchEndpoint: Nobody is there. EDESTADDRREQ, EHOSTUNREACH.
            TooBig: The message does not fit. EMSGSIZE.
            InvalidArgument: Something makes no sense. EINVAL.
            BusError: As `Draft.check`.
        """
        bus = sender.bus
        if bus is None or bus.master is not sender:
            raise Denied("control items are the master's, and this endpoint is not its bus's")
        if sender.is_silent:
            raise ShutDown("the socket was shut down for sending")
        src = args.get("src") or bus.master_address
        if src not in sender.addresses:
            raise NotOwned(f"the source {format_within(src)} is not the sender's")
        numbers = _numbers(args)
        dst, body = args["dst"].rstrip(b"\0"), args["body"]
        if not dst:
            raise BadDestination("nobody can send to the kernel's address")
        letter = Letter(src, dst, body, numbers)
        if bus.cluster:
            return self._carry_out_there(sender, bus, letter, args["items"])
        target = find_target(bus, dst)
        judged = self._judge(bus, target, args["items"])
        _check_size(target, body, (src, dst, judged.packed))
        self._apply(bus, target, judged)
        self._deliver(sender, target, letter, judged.packed)
        return {"owned": judged.chosen}

    def _carry_out_there(
        self, sender: Endpoint, bus: Bus, letter: Letter, items: Sequence[tuple[int, bytes]]
    ) -> Steps:
        """Do the same on a bus of the cluster: where the target is, and with the master's word."""
        assert self.cluster is not None, "a bus of the cluster is known to its members"
        node = self.cluster.find_node(bus, letter.dst)
        if node is None:
            judged, target = yield from self._grant(bus, letter.dst, items, letter)
            self._check_master(sender, bus)
            self._deliver(sender, target, letter, judged.packed)
            return {"owned": judged.chosen}
        _check_items(items, letter.body)
        owned, packed = _take_granted(
            (yield from self.cluster.command(bus, node, letter.dst, items))
        )
        self._check_master(sender, bus)
        self.cluster.deliver(sender, node, letter, packed)
        return {"owned": owned}

    def carry_out_for(self, bus: Bus, dst: bytes, items: Sequence[tuple[int, bytes]]) -> Steps:
        """Carry out the items of a master on another node, which then sends the message.

        Returns:
            The addresses that were chosen, and the items as they stand in the message.
        """
        judged, _ = yield from self._grant(bus, dst, items, None)
        return {"owned": judged.chosen, "packed": judged.packed}

    def _grant(
        self,
        bus: Bus,
        dst: bytes,
        items: Sequence[tuple[int, bytes]],
        letter: Letter | None,
    ) -> Generator[Ticket, Result, tuple[_Judged, Endpoint]]:
        """Claim what the items give, and carry them out when the cluster's master agrees."""
        assert self.cluster is not None, "a bus of the cluster is known to its members"
        target = find_target(bus, dst)
        judged = self._judge(bus, target, items)
        if letter is not None:
            _check_size(target, letter.body, (letter.src, dst, judged.packed))
        yield from self.cluster.register(target, judged.changes)
        try:
            # Meanwhile anything may have happened.
            if self._registry.endpoints.get(target.id) is not target or target.bus is not bus:
                raise NoSuchEndpoint(f"endpoint {target.id} is gone")
            draft = self._draft(bus, target)
            left = [change for change in judged.changes if draft.check(change)]
        except BusError:
            self.cluster.give_back(target, judged.changes)
            raise
        self._apply(bus, target, replace(judged, changes=left))
        self.cluster.receive_applied(target, judged.changes)
        return judged, target

    def _check_master(self, sender: Endpoint, bus: Bus) -> None:
        if bus.master is not sender:
            raise Denied(f"endpoint {sender.id} is the master of {escape(bus.path)} no longer")

    def _apply(self, bus: Bus, target: Endpoint, judged: _Judged) -> None:
        if any(isinstance(one, RevokeAddr | RevokeMatch | RevokeSend) for one in judged.changes):
            self._switch.flush(target.id)
        had = target.flags
        apply(self._registry, target, judged.changes)
        if GrantFlags.MONITOR in target.flags ^ had:
            self._audit(bus, target)

    def _deliver(self, sender: Endpoint, target: Endpoint, letter: Letter, packed: bytes) -> None:
        self._effects.append(
            Deliver(
                sender.id, target.id, letter.src, letter.dst, packed, letter.body, *letter.numbers
            )
        )

    def _draft(self, bus: Bus, target: Endpoint) -> Draft:
        left = self._matches_per_user - self._registry.matches_of[target.credentials.uid]
        return Draft(bus, target, left, lambda: self._registry.choose_address(bus))

    def _judge(self, bus: Bus, target: Endpoint, items: Sequence[tuple[int, bytes]]) -> _Judged:
        draft = self._draft(bus, target)
        packed, chosen, changes = [], [], []
        for (type_, data), asked in zip(items, _decoded(items), strict=True):
            command, value = asked, data
            if isinstance(asked, OwnedAddr) and (filled := draft.fill(asked)) is not asked:
                command, value = filled, filled.address.pack()
                chosen.append(filled.address.address)
            packed.append(_ITEM.pack(type_, 0, len(value)) + value.ljust(padded(len(value)), b"\0"))
            if draft.check(command):
                changes.append(command)
        return _Judged(b"".join(packed), chosen, changes)

    def _audit(self, bus: Bus, target: Endpoint) -> None:
        """Write down who reads all messages from now on, or no longer (D19)."""
        verb = "sees" if GrantFlags.MONITOR in target.flags else "no longer sees"
        who = target.credentials
        text = f"endpoint {target.id} (pid {who.pid}, uid {who.uid}) {verb}"
        self._effects.append(Audit(f"{text} all messages of {escape(bus.path)}"))


def _check_items(items: Sequence[tuple[int, bytes]], body: bytes) -> None:
    """Check what the other node would find out, so that it is told here."""
    _decoded(items)
    if len(body) > INLINE_BYTES:
        raise TooBig(f"{len(body)} bytes beside control items, the limit is {INLINE_BYTES}")


def _take_granted(value: object) -> tuple[list[bytes], bytes]:
    """Return what `carry_out_for` has returned on another node."""
    if not isinstance(value, dict) or value.keys() != {"owned", "packed"}:
        raise OutcomeUnknown("the node of the target answers what it should not")
    fields = Fields("grant", [value["packed"], value["owned"]])
    try:
        packed, owned = fields.take_bytes(), fields.take_list(CONTROL_ITEMS)
        each = Fields("grant", owned)
        chosen = [each.take_bytes(1, ADDRESS_BYTES) for _ in owned]
    except RemoteProtocolError as error:
        raise OutcomeUnknown(f"the node of the target: {error.message}") from error
    return chosen, packed


def _check_size(target: Endpoint, body: bytes, others: Iterable[bytes]) -> None:
    if len(body) > INLINE_BYTES:
        raise TooBig(f"{len(body)} bytes beside control items, the limit is {INLINE_BYTES}")
    size = RX_HEADER_BYTES + _IDENTITY_ROOM + sum(padded(len(part)) for part in (body, *others))
    if target.rx_bytes and size > target.rx_bytes:
        raise TooBig(f"{size} bytes with control items, for a ring of {target.rx_bytes}")


def _numbers(args: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return serial, reply_to and deadline of a message; 0 for none."""
    serial, reply_to = args.get("serial") or 0, args.get("reply_to") or 0
    deadline_ms = args.get("deadline_ms") or 0
    for number in (serial, reply_to):
        if not 0 <= number <= U64_MAX:
            raise InvalidArgument(f"serial {number}")
    if not 0 <= deadline_ms <= DEADLINE_MS_MAX:
        raise InvalidArgument(f"deadline of {deadline_ms} ms, the limit is {DEADLINE_MS_MAX}")
    if deadline_ms and not serial:
        raise InvalidArgument("a deadline needs a serial that the reply can name")
    return serial, reply_to, deadline_ms


def find_target(bus: Bus, dst: bytes) -> Endpoint:
    """Return the endpoint that owns an address, or has it provisionally; NoSuchEndpoint."""
    target = bus.owners.get(dst)
    number = dst.rpartition(b".")[2].removeprefix(b"@")
    if is_provisional(dst) and number.isdigit():
        target = bus.endpoints.get(EndpointId(int(number[:20])))
    if target is None or dst not in (target.provisional, *target.addresses):
        raise NoSuchEndpoint(f"nobody on {escape(bus.path)} is {format_within(dst)}")
    return target


def _decoded(items: Iterable[tuple[int, bytes]]) -> list[Command]:
    commands: list[Command] = []
    for place, (type_, data) in enumerate(items, 1):
        try:
            if type_ == SCM_MULTICAST_MATCH:
                commands.append(control.decode_wish(data))
                continue
            item = control.decode(BUS_SOCKET, type_, data)
        except RemoteProtocolError as error:
            raise InvalidArgument(f"item {place}: {error.message}") from error
        if not isinstance(item, COMMANDS):
            raise InvalidArgument(f"item {place}: {type(item).__name__} is no command of a master")
        commands.append(item)
    return commands
