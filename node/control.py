"""Messages that carry control items: from a bus's master to an endpoint, through the agent (D5).

Invariants:

1. The items are in effect before the message can be read, and it can be read only if they are.
2. What its target had sent while it still might is accepted before something is taken from it
   (D15).
3. After a refusal nothing has changed, but what `grant.py` says of chosen addresses.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..proto import control
from ..proto.address import format_within, is_provisional
from ..proto.codec import U64_MAX
from ..proto.control import (
    BUS_SOCKET,
    GrantFlags,
    OwnedAddr,
    RevokeAddr,
    RevokeMatch,
    RevokeSend,
)
from ..proto.errors import (
    BadDestination,
    Denied,
    InvalidArgument,
    NoSuchEndpoint,
    NotOwned,
    RemoteProtocolError,
    ShutDown,
    TooBig,
)
from ..proto.limits import DEADLINE_MS_MAX, IDENTITY_BYTES, INLINE_BYTES
from ..proto.text import escape
from .effect import Audit, Deliver
from .endpoint import EndpointId
from .grant import COMMANDS, Draft, apply
from .registry import RX_HEADER_BYTES, padded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .effect import Effect
    from .endpoint import Bus, Endpoint
    from .grant import Command
    from .port import SwitchPort
    from .registry import Registry

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

    def carry_out(self, sender: Endpoint, args: Mapping[str, Any]) -> object:
        """Carry out the items, then send the message; return the result of the call.

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
        target = _find_target(bus, dst)
        judged = self._judge(bus, target, args["items"])
        _check_size(target, body, (src, dst, judged.packed))
        if any(isinstance(one, RevokeAddr | RevokeMatch | RevokeSend) for one in judged.changes):
            self._switch.flush(target.id)
        had = target.flags
        apply(self._registry, target, judged.changes)
        if GrantFlags.MONITOR in target.flags ^ had:
            self._audit(bus, target)
        self._effects.append(Deliver(sender.id, target.id, src, dst, judged.packed, body, *numbers))
        return {"owned": judged.chosen}

    def _judge(self, bus: Bus, target: Endpoint, items: Sequence[tuple[int, bytes]]) -> _Judged:
        left = self._matches_per_user - self._registry.matches_of[target.credentials.uid]
        draft = Draft(bus, target, left, lambda: self._registry.choose_address(bus))
        packed, chosen, changes = [], [], []
        for (type_, data), asked in zip(items, _decoded(items), strict=True):
            command, value = draft.fill(asked), data
            if command is not asked and isinstance(command, OwnedAddr):
                value = command.address.pack()
                chosen.append(command.address.address)
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


def _find_target(bus: Bus, dst: bytes) -> Endpoint:
    target = bus.owners.get(dst)
    if is_provisional(dst) and dst[1:].isdigit():
        target = bus.endpoints.get(EndpointId(int(dst[1:21])))
    if target is None or dst not in (target.provisional, *target.addresses):
        raise NoSuchEndpoint(f"nobody on {escape(bus.path)} is {format_within(dst)}")
    return target


def _decoded(items: Iterable[tuple[int, bytes]]) -> list[Command]:
    commands = []
    for place, (type_, data) in enumerate(items, 1):
        try:
            item = control.decode(BUS_SOCKET, type_, data)
        except RemoteProtocolError as error:
            raise InvalidArgument(f"item {place}: {error.message}") from error
        if not isinstance(item, COMMANDS):
            raise InvalidArgument(f"item {place}: {type(item).__name__} is no command of a master")
        commands.append(item)
    return commands
