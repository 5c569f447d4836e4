"""A switch with lanes and nothing else: what `node/peers.py` needs, in the most obvious way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from afbus.proto import codec
from afbus.proto.codec import Fields

if TYPE_CHECKING:
    from collections.abc import Callable


#: How long a switch lets a confirmation wait for a batch that goes anyway.
CONFIRM_S: Final = 0.025


@dataclass
class _Trunk:
    #: Records to send or to be confirmed; the first has number `first`.
    records: list[str] = field(default_factory=list)
    first: int = 1
    sent: int = 0
    received: int = 0
    #: The last record that the peer was told of.
    told: int = 0
    is_down: bool = False


class Lanes:
    """Numbers records, keeps them until they are confirmed, and drops doubles."""

    def __init__(self) -> None:
        self.trunks: dict[int, _Trunk] = {}
        #: What arrived from each node, what may have arrived there, what was refused there.
        self.arrived: list[tuple[int, str]] = []
        self.unknown: list[tuple[int, str]] = []
        self.refused: list[tuple[int, str]] = []
        #: Who began to count anew, and whether it began anew itself.
        self.heard: list[tuple[int, bool]] = []
        #: Told of a lane, a little later than `inject`, that it has something to confirm.
        self.ready: Callable[[int], object] = lambda _: None

    def put(self, trunk: int, record: str) -> None:
        """Send a record, as an endpoint would."""
        one = self.trunks[trunk]
        if one.is_down:
            self.refused.append((trunk, record))
        else:
            one.records.append(record)

    def trunk_add(self, trunk: int, node: str) -> None:
        """Know a node."""
        assert trunk not in self.trunks, node
        self.trunks[trunk] = _Trunk()

    def trunk_carries_bodies(self, trunk: int) -> None:
        """There are no bodies here."""

    def body_fd(self, trunk: int, ticket: int) -> int:
        """There are no bodies here."""
        raise FileNotFoundError(ticket)

    def body_taken(self, trunk: int, ticket: int) -> None:
        """There are no bodies here."""

    def body_refused(self, trunk: int, ticket: int, errno: int) -> None:
        """There are no bodies here."""

    def body_put(self, trunk: int, ticket: int, fd: int) -> None:
        """There are no bodies here."""

    def trunk_remove(self, trunk: int) -> None:
        """Forget a node."""
        self.trunk_restart(trunk)
        del self.trunks[trunk]

    def trunk_restart(self, trunk: int) -> None:
        """Count anew what is sent."""
        one = self.trunks[trunk]
        count = one.sent + 1 - one.first
        self.unknown += [(trunk, record) for record in one.records[:count]]
        del one.records[:count]
        one.first, one.sent = 1, 0

    def trunk_hear(self, trunk: int, is_anew: bool) -> None:
        """Count anew what comes."""
        self.heard.append((trunk, is_anew))
        self.trunks[trunk].received = self.trunks[trunk].told = 0

    def trunk_rewind(self, trunk: int, received: int) -> None:
        """Send again what is behind a record."""
        one = self.trunks[trunk]
        self._confirm(one, received)
        one.sent = received

    def _confirm(self, one: _Trunk, received: int) -> None:
        if not one.first - 1 <= received <= one.sent:
            raise ValueError(f"record {received} of {one.sent}")
        del one.records[: received + 1 - one.first]
        one.first = received + 1

    def trunk_received(self, trunk: int) -> int:
        """Return the last record that came."""
        return self.trunks[trunk].received

    def trunk_set_down(self, trunk: int, is_down: bool) -> None:
        """Refuse records, or no longer."""
        one = self.trunks[trunk]
        one.is_down = is_down
        if is_down:
            self.refused += [(trunk, record) for record in one.records]
            one.records.clear()

    def trunk_is_idle(self, trunk: int) -> bool:
        """Tell whether there is nothing to say."""
        one = self.trunks[trunk]
        return not one.records and one.told == one.received

    def trunk_stats(self, trunk: int) -> dict[str, int]:
        """Return what is unconfirmed."""
        return {"unconfirmed": len(self.trunks[trunk].records)}

    def take_batch(self, trunk: int, max_bytes: int) -> bytes:
        """Return up to three records, and what has come."""
        one = self.trunks[trunk]
        place = one.sent + 1 - one.first
        records = one.records[place : place + 3]
        if not records and one.told == one.received:
            return b""
        first = one.sent + 1
        one.sent += len(records)
        one.told = one.received
        packed = codec.encode([first, records, one.received])
        assert len(packed) <= max_bytes
        return packed

    def inject(self, trunk: int, batch: bytes) -> None:
        """Take records of the peer."""
        one = self.trunks[trunk]
        fields = Fields("batch", codec.decode(batch))
        first, records, received = fields.take_int(), fields.take_list(), fields.take_int()
        if first > one.received + 1:
            raise ValueError(f"record {first} after {one.received}")
        for number, record in enumerate(records, first):
            if number == one.received + 1:
                one.received = number
                self.arrived.append((trunk, record))
        self._confirm(one, max(received, one.first - 1))
        if one.told != one.received:
            self.ready(trunk)
