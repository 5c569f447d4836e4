"""Numbered messages from a member on one node to one on another, and what became of each.

The speaker sends unicasts and multicasts in turn until it is told to stop; each kind is numbered
from 0, and must be heard once and in order (D11, D21). What was refused is never heard; what
nobody will read, or nobody knows of, is told by notices (D15), and in feeds by gaps (D12).
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import afbus
from afbus import Event, Gap, Message
from afbus.proto.errors import BusError, OutcomeUnknown

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.cluster.region import Region

    from afbus import Member

PATH: Final = "/region/square"
HALL: Final = "square.hall"
#: Between two messages of a speaker that does not hurry.
PAUSE_S: Final = 0.005
#: The last message may be behind much that a bad network holds up.
PATIENCE_S: Final = 90.0
_NUMBER_BYTES: Final = 8
#: Who makes no pauses is at most so many messages of each kind ahead of who hears them: what finds
#: no room at a listener that this machine keeps waiting is not what is asked here.
_AHEAD: Final = 50
#: The same for who makes pauses: all that may come at once behind an outage.
_BACKLOG: Final = 100_000


@dataclass
class Sequence:
    """What became of the messages of one kind."""

    #: So many were tried to be sent, of which these were refused.
    tried: int = 0
    refused: dict[int, BusError] = field(default_factory=dict)
    #: So many nobody will read; of so many nobody knows whether they were heard.
    unread: int = 0
    unknown: int = 0
    #: Whether some are missing of which nobody knows how many.
    has_hole: bool = False
    #: What was heard, in its order, and when.
    heard: list[int] = field(default_factory=list)
    heard_at: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.tried} tried", f"{len(self.heard)} heard", f"{len(self.refused)} refused"]
        missing = sorted(set(range(self.tried)).difference(self.heard, self.refused))
        parts += [f"{self.unread} unread", f"{self.unknown} unknown", f"not heard {missing[:20]}"]
        return ", ".join(parts)

    def hear(self, body: bytes) -> None:
        """Note a message."""
        self.heard.append(int.from_bytes(body[:_NUMBER_BYTES], "little"))
        self.heard_at.append(time.monotonic())

    @property
    def missing(self) -> int:
        """How many were accepted, and have not been heard, nor was anything told of them."""
        return 0 if self.has_hole else self.untold

    @property
    def untold(self) -> int:
        """As `missing`, also where nobody knows how many they are."""
        told = len(self.refused) + self.unread + self.unknown
        return max(0, self.tried - len(self.heard) - told)

    def check_sane(self) -> None:
        """Assert that nothing was heard twice, too early, or after it was refused."""
        assert sorted(set(self.heard)) == self.heard
        assert set(self.heard).isdisjoint(self.refused)

    def check_whole(self) -> None:
        """Assert that everything was accepted, and heard once, in order."""
        assert self.refused == {}
        assert self.heard == list(range(self.tried))

    def silence_s(self, since: float = 0.0) -> float:
        """Return the longest time between two that were heard, the later one after `since`."""
        pairs = zip(self.heard_at, self.heard_at[1:], strict=False)
        return max((later - one for one, later in pairs if later > since), default=0.0)


class Talk:
    """What one member tells another."""

    def __init__(self, pause_s: float, body_bytes: int) -> None:
        """Begin with nothing said."""
        self.unicasts, self.multicasts = Sequence(), Sequence()
        self._pause_s = pause_s
        self._padding = bytes(max(0, body_bytes - _NUMBER_BYTES))
        self._is_enough = asyncio.Event()
        self._is_said = asyncio.Event()
        #: Set whenever something is heard or told.
        self._news = asyncio.Event()

    def __str__(self) -> str:
        return f"{self.unicasts.tried} unicasts and {self.multicasts.tried} multicasts"

    async def speak(self, member: Member, to: str, about: str, count: int | None) -> None:
        """Send until it is enough, or so many of each kind."""
        number = 0
        while number != count and not self._is_enough.is_set():
            body = number.to_bytes(_NUMBER_BYTES, "little") + self._padding
            for one in (self.unicasts, self.multicasts):
                one.tried += 1
                try:
                    if one is self.unicasts:
                        await member.send(to, body, deadline=PATIENCE_S)
                    else:
                        await member.publish(about, body, deadline=PATIENCE_S)
                except OutcomeUnknown:
                    one.unknown += 1
                except BusError as error:
                    one.refused[number] = error
            number += 1
            while not self._pause_s and self._is_far_ahead:
                self._news.clear()
                await self._news.wait()
            # The loop serves the listener too, so each turn gives way.
            await asyncio.sleep(self._pause_s)  # lasts: the pace of the sender
        self._is_said.set()

    @property
    def _is_far_ahead(self) -> bool:
        return max(self.unicasts.missing, self.multicasts.missing) > _AHEAD

    async def be_told(self, member: Member) -> None:
        """Follow what the speaker is told of what it sent."""
        async for notice in member.notices(others=False):
            if notice.event is Event.UNREAD:
                self.unicasts.unread += int(notice.detail["count"])
            elif notice.event is Event.OUTCOME_UNKNOWN:
                self.unicasts.unknown += int(notice.detail["count"])
            elif notice.event is Event.GAP:
                # Its agent began anew: what that had taken for other nodes may be gone.
                self.unicasts.has_hole = self.multicasts.has_hole = True
            self._news.set()

    async def listen(self, member: Member) -> None:
        """Hear the unicasts."""
        async for message in member.messages():
            self.unicasts.hear(message.body)
            self._news.set()

    async def follow(self, feed: AsyncIterator[Message | Gap]) -> None:
        """Hear the multicasts, and what is missing of them."""
        async for item in feed:
            if isinstance(item, Gap):
                self.multicasts.unread += item.count
                self.multicasts.has_hole |= not item.is_counted
            else:
                self.multicasts.hear(item.body)
            self._news.set()

    async def until(self, heard: int, limit_s: float = PATIENCE_S) -> None:
        """Wait until so many of each kind more were heard."""
        wanted = [(one, len(one.heard) + heard) for one in (self.unicasts, self.multicasts)]
        async with asyncio.timeout(limit_s):
            while any(len(one.heard) < count for one, count in wanted):
                self._news.clear()
                await self._news.wait()

    async def finish(self, limit_s: float = PATIENCE_S) -> None:
        """Say no more, and wait as `account`."""
        self._is_enough.set()
        await self.account(limit_s)

    async def account(self, limit_s: float = PATIENCE_S) -> None:
        """Wait until all is said, and it is known of everything what became of it."""
        try:
            async with asyncio.timeout(limit_s):
                await self._is_said.wait()
                while self.unicasts.missing > 0 or self.multicasts.missing > 0:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            words = "is said" if self._is_said.is_set() else "was never said"
            raise AssertionError(f"all {words}; {self.unicasts}; {self.multicasts}") from None

    def check_whole(self) -> None:
        """Assert that everything was heard once, in order."""
        self.unicasts.check_whole()
        self.multicasts.check_whole()

    def check_sane(self) -> None:
        """Assert that nothing was heard twice or in another order."""
        self.unicasts.check_sane()
        self.multicasts.check_sane()

    @property
    def silence_s(self) -> float:
        """The longest time in which nothing was heard of either kind."""
        return max(self.unicasts.silence_s(), self.multicasts.silence_s())


@asynccontextmanager
async def square(door: Path) -> AsyncIterator[afbus.Bus]:
    """Have the bus, whose master is behind this door."""
    async with afbus.create(PATH, HALL, node=door, scope="cluster") as bus:
        yield bus


@asynccontextmanager
async def talk(
    region: Region,
    source: str,
    target: str,
    *,
    label: str = "talk",
    count: int | None = None,
    pause_s: float = PAUSE_S,
    body_bytes: int = 64,
) -> AsyncIterator[Talk]:
    """Let a member on one node speak to one on another, until the block ends.

    Args:
        region: The nodes.
        source: The node of the speaker.
        target: The node of the listener.
        label: What tells it from others between these nodes.
        count: So many of each kind are sent; by default as many as there is time for.
        pause_s: Between two messages of each kind.
        body_bytes: The size of each.
    """
    made = Talk(pause_s, body_bytes)
    about = f"{source}.{target}.{label}"
    async with (
        afbus.join(PATH, name=about, node=region.door(target)) as listener,
        listener.subscribe(about, limit=_BACKLOG) as feed,
        afbus.join(PATH, node=region.door(source)) as speaker,
    ):
        await speaker.allow(about)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(made.listen(listener)),
                group.create_task(made.follow(feed)),
                group.create_task(made.be_told(speaker)),
                group.create_task(made.speak(speaker, about, about, count)),
            ]
            yield made
            for task in tasks:
                task.cancel()
