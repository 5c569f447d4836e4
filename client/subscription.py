"""One subscription of a member: what it asks for, and its feed.

Invariants:

1. It is in force when entering it returns, and what follows reaches its feed (R15).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ..proto.match import Overflow
from ..proto.request import Subscribe
from ..proto.terms import Terms, matches, matches_bits
from .backlog import Backlog, Newest
from .stream import Stream

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Protocol

    from ..proto.match import What
    from ..proto.notice import Gap
    from .message import Message

    class Subscribing(Protocol):
        """What a subscription needs of whom it belongs to: see `Member`."""

        def take(self, backlog: Backlog) -> Message | Gap | None:
            """Take something out of a feed, and read on if there is room again."""

        async def start(self, feed: Subscription) -> None:
            """Subscribe."""

        async def stop(self, feed: Subscription) -> None:
            """Unsubscribe."""


class Subscription:
    """What one subscription hears: `async with` subscribes, `async for` reads it.

    Yields `Message`, and `Gap` where messages are missing.
    """

    def __init__(
        self, member: Subscribing, what: What, overflow: Overflow, deadline_ms: int, limit: int
    ) -> None:
        """Begin; made by `Member.subscribe`."""
        self.request = Subscribe(what, overflow, deadline_ms)
        if overflow is Overflow.CONFLATE:
            self.backlog: Backlog = Newest(limit)
        else:
            self.backlog = Backlog(limit, holds=overflow is not Overflow.GAP)
        self.stream: Stream[Message | Gap] = Stream(lambda: member.take(self.backlog))
        self._member = member

    def wants(self, message: Message) -> bool:
        """Tell whether it asked for this message, as far as a member can know."""
        what = self.request.what
        if isinstance(what, Terms):
            return message.terms is None or matches(what, message.terms)
        assert message.destination is not None, "a multicast has a destination"
        return message.terms is not None or matches_bits(what, message.destination.address)

    def put(self, item: Message | Gap) -> None:
        """Let it hear something."""
        self.backlog.put(item)
        self.stream.stir()

    async def __aenter__(self) -> Self:
        """Subscribe; Denied if the master refuses."""
        await self._member.start(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Unsubscribe."""
        await self._member.stop(self)

    def __aiter__(self) -> Self:
        """Return the subscription."""
        return self

    async def __anext__(self) -> Message | Gap:
        """Return what is heard next."""
        return await anext(self.stream)
