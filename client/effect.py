"""What a bus's master wants done: to ask the policy, or to tell an endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..proto.address import is_provisional
from ..proto.control import Item, OwnedAddr

if TYPE_CHECKING:
    from ..proto.request import Answer
    from .question import Question


@dataclass(frozen=True, slots=True)
class Ask:
    """Effect: put a question to the policy, and call `receive_verdict` with the same ticket."""

    ticket: int
    question: Question


@dataclass(frozen=True, slots=True)
class Tell:
    """Effect: send commands, and an answer if somebody waits for one, to an endpoint.

    There is always a command: such a message goes through the agent, which queues it where a
    receiver is full, so that no endpoint can hold up the master. Afterwards the shell calls
    `receive_done` or `receive_failure`.
    """

    to: bytes
    items: tuple[Item, ...]
    answer: Answer | None = None
    reply_to: int = 0
    #: The request that this finishes, 0 if none.
    ticket: int = 0

    @property
    def lets_in(self) -> bool:
        """Whether this makes a member of who has no address yet."""
        return is_provisional(self.to) and any(isinstance(item, OwnedAddr) for item in self.items)


@dataclass(frozen=True, slots=True)
class Probe:
    """Effect: find out whether anybody owns a name, and call `receive_probed`.

    A command that nobody can carry out, sent to the name, does: its refusal says whether it found
    somebody, and no message is delivered. `owner` is who should own it.
    """

    name: bytes
    owner: bytes
    item: Item


Effect: TypeAlias = Ask | Tell | Probe
