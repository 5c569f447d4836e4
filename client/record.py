"""What a bus's master knows of its members, and what of that others may know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from ..proto.control import (
    Grant,
    GrantFlags,
    Item,
    MulticastMatch,
    MulticastSend,
    RevokeMatch,
    RevokeSend,
)

if TYPE_CHECKING:
    from ..proto.address import BusAddress
    from ..proto.control import Identity, Match
    from ..proto.match import What

NO_GRANTS: Final = GrantFlags(0)


class MemberView(NamedTuple):
    """One member as the master knows it: its unique address, its names, who it is."""

    address: BusAddress
    names: tuple[BusAddress, ...]
    identity: Identity | None


@dataclass(slots=True)
class Record:
    """What the master knows of one member; `identity` is None while an adopted one is silent."""

    address: bytes
    provisional: bytes | None
    identity: Identity | None
    matches: dict[What, Match] = field(default_factory=dict)
    sends: set[What] = field(default_factory=set)
    grants: GrantFlags = NO_GRANTS

    def note(self, item: Item) -> None:
        """Note what the agent has carried out."""
        match item:
            case MulticastMatch(match):
                self.matches[match.what] = match
            case RevokeMatch(_, what):
                self.matches.pop(what, None)
            case MulticastSend(_, what):
                self.sends.add(what)
            case RevokeSend(_, what):
                self.sends.discard(what)
            case Grant(flags):
                self.grants = flags
