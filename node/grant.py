"""What a bus's master may grant and revoke, and how it is carried out (D5, D9).

The items of one message are judged first, in their order and each as if those before it were in
effect already; only if all are right is any of them carried out. An item that changes nothing, as
a second grant of what is granted, is right and skipped; and on a bus of the cluster taking what is
not there, as the cluster's master may have taken it before. Whether a mask is too crowded, or hears
everything, is for the master to decide who grants it (D9). An address without components stands for
a unique one that the agent chooses, and is replaced by it.

Invariants:

1. After a refusal nothing has changed, but that an address that was chosen is not chosen again.
2. A unique address is granted once (D3), a name has one owner; nobody owns the kernel's address or
   a provisional one (D6).
3. Who lost something is told (D15), after all that it had sent before.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from ..proto.address import AddressKind, BusAddress, format_within, is_provisional, is_unique
from ..proto.control import (
    Grant,
    GrantFlags,
    MulticastSend,
    OwnedAddr,
    RevokeAddr,
    RevokeMatch,
    RevokeSend,
    Wish,
)
from ..proto.errors import (
    AddressInUse,
    Denied,
    InvalidArgument,
    NotOwned,
    ShareExceeded,
    WidthMismatch,
)
from ..proto.limits import ADDRESSES_PER_ENDPOINT
from ..proto.match import form_of, is_raw
from ..proto.notice import Event, Notice
from ..proto.terms import Terms
from ..proto.text import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ..proto.match import What
    from .endpoint import Bus, Endpoint
    from .registry import Registry

#: `Wish` is what SCM_MULTICAST_MATCH asks for.
Command: TypeAlias = (
    OwnedAddr | RevokeAddr | Wish | RevokeMatch | MulticastSend | RevokeSend | Grant
)
#: The same as a tuple, for isinstance.
COMMANDS: Final = (OwnedAddr, RevokeAddr, Wish, RevokeMatch, MulticastSend, RevokeSend, Grant)


def format_what(what: What) -> str:
    """Return terms or bits as a person reads them."""
    return what.format() if isinstance(what, Terms) else f"0x{what.hex()}"


class Draft:
    """The items of one message, judged against what is and what those before them would make."""

    def __init__(
        self, bus: Bus, target: Endpoint, share_left: int, choose: Callable[[], bytes]
    ) -> None:
        """Begin without items.

        Args:
            bus: The bus.
            target: Whom the items are for.
            share_left: How many matches its user may still have.
            choose: Returns a unique address, each time another one.
        """
        self._choose = choose
        self._bus = bus
        self._target = target
        self._share_left = share_left
        self._address_count = len(target.addresses)
        self._flags = target.flags
        # What the items before would change: an address or a grant that is there then, or not.
        self._owns: dict[bytes, bool] = {}
        self._matches: dict[bytes, tuple[int, int] | None] = {}
        self._sends: dict[What, bool] = {}

    def fill(self, item: OwnedAddr) -> OwnedAddr:
        """Return the item, with an address that is chosen now if it names none; Denied."""
        address = item.address
        if not address.is_kernel:
            return item
        self._check_path(address.path)
        while self._is_spent(chosen := self._choose()):
            pass  # its master has granted it, by a number of its own
        return OwnedAddr(BusAddress(address.path, chosen))

    def check(self, item: Command) -> bool:  # noqa: PLR0911 (one line or two an item)
        """Judge the next item, which `fill` returned.

        Returns:
            Whether it changes anything.

        Raises:
            Denied: It is for another bus. EPERM.
            AddressInUse: The address has an owner, or was granted before. EADDRINUSE.
            NotOwned: Nobody can own the address, or the target does not. EADDRNOTAVAIL.
            WidthMismatch: The bits have another width than the bus. EDOM.
            ShareExceeded: Too many addresses or matches. EDQUOT.
            InvalidArgument: It makes no sense. EINVAL.
        """
        match item:
            case Wish():
                return self._check_wish(item)
            case OwnedAddr(address):
                return self._check_owned(self._normal(address))
            case RevokeAddr(address):
                return self._check_revoked(self._normal(address))
            case RevokeMatch(path, what):
                self._check_what(path, what)
                form = form_of(what)
                if self._find_match(form) is None:
                    if self._bus.cluster:
                        return False
                    raise InvalidArgument(f"no match for {format_what(what)!r} was granted")
                self._matches[form] = None
                self._share_left += 1
                return True
            case MulticastSend(path, what):
                self._check_what(path, what)
                if self._may_send(what):
                    return False
                self._take_share()
                self._sends[what] = True
                return True
            case RevokeSend(path, what):
                self._check_what(path, what)
                if not self._may_send(what):
                    if self._bus.cluster:
                        return False
                    raise InvalidArgument(f"sending {format_what(what)!r} was not granted")
                self._sends[what] = False
                self._share_left += 1
                return True
            case Grant(flags):
                changes = flags != self._flags
                self._flags = flags
                return changes

    def _check_path(self, path: bytes) -> None:
        if path != self._bus.path:
            raise Denied(
                f"a grant for another bus: {escape(path)}, not {escape(self._bus.path)}; "
                "only its own master may grant there"
            )

    def _normal(self, address: BusAddress) -> bytes:
        self._check_path(address.path)
        if address.kind is AddressKind.KERNEL:
            raise NotOwned("nobody can own the kernel's address")
        if address.kind is AddressKind.MULTICAST:
            raise InvalidArgument(f"{address} is a multicast address, which nobody owns")
        if is_provisional(address.address):
            raise NotOwned(f"nobody can own {address}: the agent gives such addresses")
        return address.address

    def _has(self, address: bytes) -> bool:
        return self._owns.get(address, address in self._target.addresses)

    def _check_owned(self, address: bytes) -> bool:
        if self._has(address):
            return False
        owner = self._bus.owners.get(address)
        text = format_within(address)
        if owner is not None and owner is not self._target:
            raise AddressInUse(f"{text} is owned by endpoint {owner.id}")
        if is_unique(address):
            if self._is_spent(address):
                raise AddressInUse(f"{text} was granted before; no unique address comes again")
            if self._bus.spent.is_full:
                raise ShareExceeded(
                    f"{text}: too many unique addresses that do not follow each other; "
                    "grant them in ascending order"
                )
        if self._address_count >= ADDRESSES_PER_ENDPOINT:
            raise ShareExceeded(
                f"{text}: endpoint {self._target.id} owns {self._address_count} addresses, "
                f"the limit is {ADDRESSES_PER_ENDPOINT}"
            )
        self._owns[address] = True
        self._address_count += 1
        return True

    def _is_spent(self, address: bytes) -> bool:
        return address in self._owns or address in self._bus.spent

    def _check_revoked(self, address: bytes) -> bool:
        text = format_within(address)
        if not self._has(address):
            if self._bus.cluster:
                return False
            raise NotOwned(f"endpoint {self._target.id} does not own {text}")
        if self._target.is_master and address == self._bus.master_address:
            raise InvalidArgument(f"{text} is the address of the master, who closes to give it up")
        self._owns[address] = False
        self._address_count -= 1
        return True

    def _check_what(self, path: bytes, what: What) -> None:
        self._check_path(path)
        if isinstance(what, bytes) and len(what) * 8 != self._bus.width:
            raise WidthMismatch(
                f"{len(what) * 8} bits on {escape(path)}, which has {self._bus.width}"
            )

    def _find_match(self, form: bytes) -> tuple[int, int] | None:
        """Return overflow and deadline of a match that is there then."""
        if form in self._matches:
            return self._matches[form]
        known = self._target.matches.get(form)
        return None if known is None else known[1:]

    def _may_send(self, what: What) -> bool:
        return self._sends.get(what, what in self._target.sends)

    def _check_wish(self, wish: Wish) -> bool:
        path, form, overflow, deadline_ms = wish
        if path != self._bus.path or is_raw(form):
            self._check_what(path, wish.what)
        known, wanted = self._find_match(form), (overflow, deadline_ms)
        if known == wanted:
            return False
        if known is None:
            self._take_share()
        self._matches[form] = wanted
        return True

    def _take_share(self) -> None:
        if self._share_left <= 0:
            uid = self._target.credentials.uid
            raise ShareExceeded(f"user {uid} has as many matches and grants as one may have")
        self._share_left -= 1


def apply(registry: Registry, target: Endpoint, commands: Iterable[Command]) -> None:
    """Carry out what was judged, and announce it to whom it concerns."""
    bus = target.bus
    assert bus is not None, "items are judged for an endpoint of the bus"
    was_member = bool(target.addresses)
    subject = tuple(target.addresses)
    lost: list[Notice] = []
    for kind, some in groupby(commands, key=type):
        if kind is Wish:
            registry.subscribe(target, cast("Iterator[Wish]", some))
        else:
            for command in some:
                _apply(registry, target, command, lost)
    if target.addresses and not was_member:
        joined = registry.describe(Event.JOINED, target, "")
        registry.announce(registry.find_watchers(bus, target), joined)
        registry.tell(bus, joined)
    elif was_member and not target.addresses:
        gone = Notice(Event.LEFT, subject, "its last address was revoked")
        registry.announce(registry.find_watchers(bus, target), gone)
        registry.tell(bus, gone)
    for notice in lost:
        registry.announce([target], notice)


def _apply(registry: Registry, target: Endpoint, command: Command, lost: list[Notice]) -> None:
    """Carry out one command, and add what its target is to be told that it lost."""
    match command:
        case OwnedAddr(address):
            registry.own(target, address.address)
        case RevokeAddr(address):
            registry.disown(target, address.address)
            lost.append(Notice(Event.REVOKED, (address.address,), "address"))
        case RevokeMatch(_, what):
            registry.unsubscribe(target, form_of(what))
            lost.append(_revoked("match", {"match": format_what(what)}))
        case MulticastSend(_, what):
            registry.allow_send(target, what)
        case RevokeSend(_, what):
            registry.forbid_send(target, what)
            lost.append(_revoked("send", {"send": format_what(what)}))
        case Grant(flags):
            taken = target.flags & ~flags
            registry.set_flags(target, flags)
            if taken:
                names = [flag.name for flag in GrantFlags if flag in taken]
                lost.append(_revoked("grant", {"grant": " ".join(map(str, names))}))


def _revoked(reason: str, detail: Mapping[str, str]) -> Notice:
    return Notice(Event.REVOKED, (), reason, detail)
