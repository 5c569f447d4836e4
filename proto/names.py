"""Names of a bus: who owns one, who waits for it (D4, with the rules of D-Bus).

Each name has a queue; its first is the owner. A request carries flags, of which ALLOW_REPLACEMENT
and DO_NOT_QUEUE are remembered until the next request of the same endpoint; REPLACE is not: it
counts for this request only.

    owner        asker's flags          owner's flags        outcome
    nobody       any                                         PRIMARY_OWNER
    the asker    any                                         ALREADY_OWNER, flags are updated
    another      REPLACE                ALLOW_REPLACEMENT    PRIMARY_OWNER; the old owner is next
                                                             in the queue, or gone if it does not
                                                             queue
    another      DO_NOT_QUEUE                                EXISTS; the asker waits no longer
    another      none of these                               IN_QUEUE, at the end or where it was

Invariants:

1. A name that is here has an owner; a name that nobody wants is not here.
2. No endpoint stands twice in a queue, and none that waits has DO_NOT_QUEUE.
3. Every change of an owner is returned, once, by the call that made it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from enum import STRICT, IntEnum, IntFlag
from typing import Final, Generic, NamedTuple, TypeVar

Who = TypeVar("Who", bound=Hashable)


class NameFlags(IntFlag, boundary=STRICT):
    """The flags of a request for a name."""

    #: Another may take the name by REPLACE.
    ALLOW_REPLACEMENT = 1
    #: Take the name if its owner allows that.
    REPLACE = 2
    #: Own the name or do not; never wait for it.
    DO_NOT_QUEUE = 4


#: Wait for the name, keep it when it comes.
NO_FLAGS: Final = NameFlags(0)


class NameOutcome(IntEnum):
    """What became of a request, with the numbers of D-Bus."""

    #: The asker owns the name now.
    PRIMARY_OWNER = 1
    #: It waits for the name.
    IN_QUEUE = 2
    #: Another one owns the name, and the asker does not wait.
    EXISTS = 3
    #: It owned the name before; its flags are these now.
    ALREADY_OWNER = 4


class ReleaseOutcome(IntEnum):
    """What became of a release, with the numbers of D-Bus."""

    #: The asker owns the name no longer, or no longer waits for it.
    RELEASED = 1
    #: Nobody has the name.
    NON_EXISTENT = 2
    #: Another one has it, and the asker does not wait for it.
    NOT_OWNER = 3


class NameChange(NamedTuple, Generic[Who]):
    """A name went from `old` to `new`; None is nobody."""

    name: bytes
    old: Who | None
    new: Who | None


class NameQueue(Generic[Who]):
    """The endpoints that want one name; the first of them owns it. All calls cost O(1)."""

    def __init__(self) -> None:
        self._flags: OrderedDict[Who, NameFlags] = OrderedDict()

    @property
    def owner(self) -> Who | None:
        """The owner, None if nobody wants the name."""
        return next(iter(self._flags), None)

    @property
    def order(self) -> tuple[Who, ...]:
        """The owner, then those who wait, the next one first."""
        return tuple(self._flags)

    @property
    def entries(self) -> tuple[tuple[Who, NameFlags], ...]:
        """As `order`, each with the flags that are remembered."""
        return tuple(self._flags.items())

    def __contains__(self, who: object) -> bool:
        return who in self._flags

    def request(self, who: Who, flags: NameFlags) -> NameOutcome:
        """Ask for the name; the table above says what comes out."""
        owner = self.owner
        kept = flags & ~NameFlags.REPLACE
        if owner is None or owner == who:
            self._flags[who] = kept
            return NameOutcome.PRIMARY_OWNER if owner is None else NameOutcome.ALREADY_OWNER
        allowed = self._flags[owner]
        if flags & NameFlags.REPLACE and allowed & NameFlags.ALLOW_REPLACEMENT:
            self._flags[who] = kept
            self._flags.move_to_end(who, last=False)
            if allowed & NameFlags.DO_NOT_QUEUE:
                del self._flags[owner]
            return NameOutcome.PRIMARY_OWNER
        if flags & NameFlags.DO_NOT_QUEUE:
            self._flags.pop(who, None)
            return NameOutcome.EXISTS
        self._flags[who] = kept
        return NameOutcome.IN_QUEUE

    def remove(self, who: Who) -> bool:
        """Take an endpoint out, wherever it stands; tell whether it was there."""
        return self._flags.pop(who, None) is not None


class Names(Generic[Who]):
    """All names of one bus. The caller checks that an endpoint may have the name."""

    def __init__(self) -> None:
        self._queues: dict[bytes, NameQueue[Who]] = {}
        self._wanted: dict[Who, set[bytes]] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def __contains__(self, name: object) -> bool:
        return name in self._queues

    def get_owner(self, name: bytes) -> Who | None:
        """Return the owner of a name, None if it has none."""
        queue = self._queues.get(name)
        return None if queue is None else queue.owner

    def get_queue(self, name: bytes) -> tuple[Who, ...]:
        """Return the owner of a name and those who wait for it, in their order."""
        queue = self._queues.get(name)
        return () if queue is None else queue.order

    def get_entries(self, name: bytes) -> tuple[tuple[Who, NameFlags], ...]:
        """As `get_queue`, with flags; `request` for each in this order makes the same queue."""
        queue = self._queues.get(name)
        return () if queue is None else queue.entries

    def get_names(self, who: Who) -> tuple[bytes, ...]:
        """Return the names that an endpoint owns or waits for, sorted."""
        return tuple(sorted(self._wanted.get(who, ())))

    def request(
        self, name: bytes, who: Who, flags: NameFlags = NO_FLAGS
    ) -> tuple[NameOutcome, list[NameChange[Who]]]:
        """Ask for a name; return the outcome and the change of the owner, if there is one."""
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = NameQueue()
        old = queue.owner
        outcome = queue.request(who, flags)
        # The asker may be in the queue now or not, and so may the owner whom it replaced.
        for one in (who, old):
            if one is not None:
                self._note(name, one, one in queue)
        return outcome, self._changes(name, old, queue.owner)

    def release(self, name: bytes, who: Who) -> tuple[ReleaseOutcome, list[NameChange[Who]]]:
        """Give up a name, or the wait for it; return the change of the owner, if there is one."""
        queue = self._queues.get(name)
        if queue is None:
            return ReleaseOutcome.NON_EXISTENT, []
        old = queue.owner
        if not queue.remove(who):
            return ReleaseOutcome.NOT_OWNER, []
        self._note(name, who, False)
        new = queue.owner
        if new is None:
            del self._queues[name]
        return ReleaseOutcome.RELEASED, self._changes(name, old, new)

    def drop_owner(self, who: Who) -> list[NameChange[Who]]:
        """Take an endpoint out of all queues, because it is gone; changes are sorted by name."""
        changes = []
        for name in self.get_names(who):
            changes += self.release(name, who)[1]
        return changes

    def _note(self, name: bytes, who: Who, is_wanted: bool) -> None:
        if is_wanted:
            self._wanted.setdefault(who, set()).add(name)
        elif who in self._wanted:
            self._wanted[who].discard(name)
            if not self._wanted[who]:
                del self._wanted[who]

    @staticmethod
    def _changes(name: bytes, old: Who | None, new: Who | None) -> list[NameChange[Who]]:
        return [] if old == new else [NameChange(name, old, new)]
