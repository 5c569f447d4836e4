"""What arrives one by one, and waits with a deadline.

Invariants:

1. A wait that is cancelled has taken nothing out.
2. What is missing is told at its place, as an error of one read; reading may go on behind it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Generic, Self, TypeVar

from ..proto.errors import BusError, DeadlineExceeded, MessagesLost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from ..proto.notice import Notice

T = TypeVar("T")

#: Messages, or notices, that wait to be read.
BACKLOG_LIMIT: Final = 1024


class Stream(Generic[T]):
    """Things that arrive one by one: `async for` reads them until the member is closed.

    A cancelled wait loses nothing. Several tasks may read one stream; each thing goes to one.
    """

    def __init__(self, take: Callable[[], T | None]) -> None:
        """Begin; `take` returns what is next, None if there is nothing yet."""
        self._take = take
        self._begin: Callable[[], Awaitable[None]] | None = None
        self._stirred = asyncio.Event()
        self._is_ended = False
        self._reason: BusError | None = None

    def begin_with(self, begin: Callable[[], Awaitable[None]]) -> None:
        """Let something be done before the first thing can arrive."""
        self._begin = begin

    async def start(self) -> Self:
        """Ask for what is needed before anything can arrive; reading does this by itself.

        Raises:
            Denied: The master refuses. EPERM.
        """
        if self._begin is not None:
            await self._begin()
            self._begin = None
        return self

    def stir(self) -> None:
        """Let readers look again."""
        self._stirred.set()

    def end(self, reason: BusError | None = None) -> None:
        """End it, with an error or without, behind all that has arrived."""
        self._is_ended = True
        self._reason = reason
        self._stirred.set()

    def __aiter__(self) -> Self:
        """Return the stream."""
        return self

    async def __anext__(self) -> T:
        """Return what is next.

        Raises:
            MessagesLost: Something is missing at this place; reading may go on. ENOBUFS.
        """
        if self._begin is not None:
            await self.start()
        while (item := self._take()) is None:
            if self._reason is not None:
                raise self._reason
            if self._is_ended:
                raise StopAsyncIteration
            self._stirred.clear()
            await self._stirred.wait()
        return item


class UnreadNotices:
    """Notices that wait to be read; the oldest are kept, and the number of the others."""

    def __init__(self) -> None:
        self._items: deque[Notice | MessagesLost] = deque()
        self._missing = 0

    def put(self, notice: Notice) -> None:
        """Put one in, or count it."""
        if len(self._items) >= BACKLOG_LIMIT:
            self._missing += 1
            return
        self._settle()
        self._items.append(notice)

    def take(self) -> Notice | None:
        """Take the next one out; MessagesLost where some are missing."""
        if not self._items:
            self._settle()
        if not self._items:
            return None
        item = self._items.popleft()
        if isinstance(item, MessagesLost):
            raise item
        return item

    def _settle(self) -> None:
        if self._missing:
            self._items.append(MessagesLost(f"{self._missing} notices that nobody read in time"))
            self._missing = 0


@asynccontextmanager
async def within(deadline: float | None, what: str) -> AsyncIterator[None]:
    """Let the block end in DeadlineExceeded after so many seconds; None waits without end."""
    try:
        async with asyncio.timeout(deadline) as limit:
            yield
    except TimeoutError as error:
        # A deadline of something inside is not ours.
        if not limit.expired():
            raise
        raise DeadlineExceeded(f"{what}: not within {deadline:g} s") from error
