"""How the table reaches all nodes: deltas, snapshots, acknowledgements, and the barrier.

A *reader* is a node with a link. It is sent every delta, is windowed (what is not acknowledged is
bounded), and catches up from the log of recent deltas, or from a snapshot where the log does not
go back far enough. Deltas and parts are encoded once for all.

    in step --NACK--> behind --after back-off--> snapshot --ACK--> in step
    in step --RESYNC--> log or snapshot, at most one for each back-off

The barrier: a result waits until all live readers have acknowledged its version, but for those
that could not follow. Live is who was called so, and that does not end with its link (`suspend`,
`expect`), but when the core gives its node up. Who does not acknowledge in time is cut off, so a
result waits no longer than `ack_s` after its change, or `load_s` for one that has just come and
catches up.

Invariants:

1. A result leaves after its version was acknowledged by all live readers that are not behind, and
   in the order of versions.
2. A reader that refuses a record costs one snapshot for each back-off, and holds up nobody.
3. What lies unacknowledged for one reader is at most `window_bytes` and one delta, or one snapshot;
   at most `loads` readers load a snapshot at a time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

from ..proto.errors import CloseCode, RemoteProtocolError
from ..proto.limits import MIB
from .effect import Effect, LinkId, Send
from .history import History

if TYPE_CHECKING:
    from ..proto.table import Delta, Table

#: How long a reader may take to acknowledge a delta; longer, and it is as good as lost. A node has
#: to be able to read as much as changes at once: 100,000 records are some seconds.
ACK_S: Final = 10.0
#: How long it may take to catch up, by a snapshot or by the log.
LOAD_S: Final = 30.0
#: Bytes of deltas that one reader may have on the way.
WINDOW_BYTES: Final = 4 * MIB
#: Readers that load a snapshot at a time: with large tables, what the links hold for them.
LOADS: Final = 32
#: Recent deltas that are kept for readers that return: minutes of busy work.
LOG_BYTES: Final = 16 * MIB
LOG_DELTAS: Final = 65_536
#: First and longest pause after a reader could not follow.
BACKOFF_S: Final = 1.0
BACKOFF_S_MAX: Final = 60.0


@dataclass(frozen=True, slots=True)
class FeedLimits:
    """How patient the master is with its readers."""

    ack_s: float = ACK_S
    load_s: float = LOAD_S
    window_bytes: int = WINDOW_BYTES
    loads: int = LOADS
    log_bytes: int = LOG_BYTES
    log_deltas: int = LOG_DELTAS
    backoff_s: float = BACKOFF_S
    backoff_s_max: float = BACKOFF_S_MAX


class _State(Enum):
    #: Deltas are sent as they come, as far as the window allows.
    STEP = "in step"
    #: It waits for its turn to load a snapshot.
    QUEUED = "queued"
    #: It has been sent a snapshot.
    LOADING = "loading"
    #: It could not follow, and is helped when its pause is over.
    BEHIND = "behind"
    #: It has no link.
    AWAY = "away"


@dataclass(slots=True, eq=False)
class _Reader:
    link: LinkId
    state: _State
    is_live: bool
    acked: int
    sent: int
    #: When this state began, or when it had caught up.
    since: float
    #: What the table was when it began to catch up.
    goal: int = 0
    #: Where versions `acked` (or an earlier one) and `sent` end in the stream of all deltas.
    acked_end: int = 0
    sent_end: int = 0
    #: Whether barriers wait for it: it is live, and not behind.
    is_counted: bool = False
    #: The first version that is not worse than what it refused.
    least: int = 0
    delay_s: float = 0.0
    retry_at: float = 0.0
    #: When the last snapshot or answer to a RESYNC went out.
    answered_at: float = float("-inf")
    nacked_at: float = float("-inf")


@dataclass(slots=True)
class _Barrier:
    version: int
    left: int
    results: list[tuple[LinkId, bytes]] = field(default_factory=list)


class Feed:
    """The readers of one table."""

    def __init__(
        self,
        table: Table[bytes, bytes],
        epoch: int,
        effects: list[Effect],
        limits: FeedLimits | None = None,
    ) -> None:
        """Begin without readers.

        Args:
            table: Read here, changed elsewhere; each delta is told by `publish`.
            epoch: Stands in each frame.
            effects: Where frames are appended.
            limits: By default those above.
        """
        self._table = table
        self._effects = effects
        self._limits = limits or FeedLimits()
        self._readers: dict[LinkId, _Reader] = {}
        self._queue: deque[_Reader] = deque()
        self._loading = 0
        self._history = History(table, epoch, self._limits.log_bytes, self._limits.log_deltas)
        self._barriers: deque[_Barrier] = deque()

    # --- readers come and go ---

    def join(self, link: LinkId, version: int, is_live: bool, now: float) -> None:
        """Begin with a reader that has this version, 0 for nothing.

        Args:
            link: Its link.
            version: What it has in this epoch.
            is_live: Whether results wait for it; if not yet, see `set_live`.
            now: The time.
        """
        assert self._table.version > 0, "nobody can acknowledge version 0"
        assert version <= self._table.version, f"version {version} was never told"
        reader = _Reader(link, _State.STEP, is_live, version, version, now)
        self._readers[link] = reader
        self._set_counted(reader, is_live)
        self._catch_up(reader, now)

    def set_live(self, link: LinkId) -> None:
        """Let results wait for a reader from now on: others may take its node for live."""
        reader = self._readers[link]
        reader.is_live = True
        if reader.state is not _State.BEHIND:
            self._set_counted(reader, True)

    def expect(self, link: LinkId, now: float) -> None:
        """Begin with a live reader that has no link yet."""
        reader = self._readers[link] = _Reader(link, _State.AWAY, True, 0, 0, now)
        self._set_counted(reader, True)

    def suspend(self, link: LinkId, now: float) -> None:
        """The link of a reader is gone, but others still take it for live until it leaves."""
        reader = self._readers[link]
        self._stop(reader, now)
        reader.state = _State.AWAY

    def leave(self, link: LinkId, now: float) -> None:
        """A reader is gone."""
        reader = self._readers.pop(link)
        self._set_counted(reader, False)
        self._stop(reader, now)
        self._release()

    def get_lag(self, link: LinkId) -> int:
        """Return how many versions a reader has not acknowledged."""
        return self._table.version - self._readers[link].acked

    def _stop(self, reader: _Reader, now: float) -> None:
        """End what a reader is doing; the caller gives it another state."""
        was, reader.state = reader.state, _State.AWAY
        if was is _State.QUEUED:
            self._queue.remove(reader)
        elif was is _State.LOADING:
            self._end_load(now)

    # --- what they say ---

    def receive_ack(self, link: LinkId, version: int, now: float) -> None:
        """A reader has applied all up to a version.

        Raises:
            RemoteProtocolError: It was not sent that.
        """
        reader = self._readers[link]
        self._check_version(reader, version)
        if version < reader.acked:
            return
        old, reader.acked = reader.acked, version
        if version == reader.sent:
            reader.acked_end = reader.sent_end
        elif version >= self._history.start:
            reader.acked_end = self._history.get_end(version)
        if reader.is_counted:
            for barrier in self._barriers:
                if old < barrier.version <= version:
                    barrier.left -= 1
                elif barrier.version > version:
                    break
        if reader.state is _State.LOADING and version >= reader.sent:
            reader.state = _State.STEP
            self._end_load(now)
        if old < reader.goal <= version:
            reader.since = now
        if reader.state is _State.STEP:
            self._set_counted(reader, reader.is_live)
        self._release()
        self._pump(reader, now)

    def receive_nack(self, link: LinkId, version: int, now: float) -> bool:
        """A reader cannot read what leads to a version; tell whether that is news.

        Raises:
            RemoteProtocolError: It was not sent that.
        """
        reader = self._readers[link]
        self._check_version(reader, version)
        if reader.state is _State.BEHIND:
            return False
        limits = self._limits
        is_again = now - reader.nacked_at <= 2 * limits.backoff_s_max
        longer = min(2 * reader.delay_s, limits.backoff_s_max)
        reader.delay_s = max(limits.backoff_s, longer if is_again else 0.0)
        reader.nacked_at = now
        # A snapshot that it has refused does not help; a later one may.
        reader.least = version + (reader.state is _State.LOADING)
        self._put_behind(reader, now + reader.delay_s, now)
        return True

    def receive_resync(self, link: LinkId, version: int, now: float) -> None:
        """A reader misses what comes after a version.

        Raises:
            RemoteProtocolError: It was not sent that.
        """
        reader = self._readers[link]
        self._check_version(reader, version)
        if reader.state is not _State.STEP:
            # What it asks for is on its way, or comes after its pause.
            return
        self._go_back(reader, version)
        retry_at = reader.answered_at + max(reader.delay_s, self._limits.backoff_s)
        if now < retry_at:
            self._put_behind(reader, retry_at, now)
        else:
            self._catch_up(reader, now)

    def _check_version(self, reader: _Reader, version: int) -> None:
        if version > reader.sent:
            text = f"version {version} of the table, which it was not sent"
            raise RemoteProtocolError(text, CloseCode.ORDER)

    # --- what they are told ---

    def publish(self, deltas: list[Delta[bytes, bytes]], now: float) -> None:
        """Tell all readers what has changed."""
        for delta in deltas:
            self._history.append(delta, now)
        if deltas:
            for reader in self._readers.values():
                self._pump(reader, now)

    def wait(self, link: LinkId, results: list[bytes]) -> None:
        """Send results when all counted readers have what the table is now."""
        version = self._table.version
        if not self._barriers or self._barriers[-1].version != version:
            left = sum(
                1 for one in self._readers.values() if one.is_counted and one.acked < version
            )
            if not left and not self._barriers:
                self._effects += [Send(link, data) for data in results]
                return
            self._barriers.append(_Barrier(version, left))
        self._barriers[-1].results += [(link, data) for data in results]

    def get_timer(self) -> float | None:
        """Return when `handle_timer` is to be called, None for never."""
        times = (self._get_due(reader) for reader in self._readers.values())
        return min((time for time in times if time is not None), default=None)

    def handle_timer(self, now: float) -> list[tuple[LinkId, str]]:
        """Go on with those whose pause is over; return who is to be cut off, and why."""
        late = []
        for reader in list(self._readers.values()):
            due = self._get_due(reader)
            if due is None or due > now:
                continue
            if reader.state is _State.BEHIND:
                self._catch_up(reader, now)
            else:
                waited = now - reader.since
                text = f"no acknowledgement after version {reader.acked} of the table"
                late.append((reader.link, f"{text}, waited {waited:.0f} s"))
        return late

    def _get_due(self, reader: _Reader) -> float | None:
        """Return when a reader is to be looked at."""
        if reader.state is _State.BEHIND:
            return reader.retry_at
        if reader.state is _State.LOADING:
            return reader.since + self._limits.load_s
        if reader.state is not _State.STEP or reader.acked == reader.sent:
            return None
        oldest = self._history.get_next(reader.acked)
        if oldest is None or reader.acked < reader.goal:
            return reader.since + self._limits.load_s
        return max(oldest.at, reader.since) + self._limits.ack_s

    # --- inside ---

    def _set_counted(self, reader: _Reader, is_counted: bool) -> None:
        if reader.is_counted == is_counted:
            return
        reader.is_counted = is_counted
        step = 1 if is_counted else -1
        for barrier in self._barriers:
            if barrier.version > reader.acked:
                barrier.left += step

    def _go_back(self, reader: _Reader, version: int) -> None:
        """Take a reader for one that has only this version."""
        was_counted = reader.is_counted
        self._set_counted(reader, False)
        reader.acked = reader.sent = version
        self._set_counted(reader, was_counted)
        self._release()

    def _release(self) -> None:
        while self._barriers and self._barriers[0].left <= 0:
            barrier = self._barriers.popleft()
            assert barrier.left == 0, "a reader was counted twice"
            self._effects += [Send(link, data) for link, data in barrier.results]

    def _put_behind(self, reader: _Reader, retry_at: float, now: float) -> None:
        self._stop(reader, now)
        reader.state, reader.since, reader.retry_at = _State.BEHIND, now, retry_at
        self._set_counted(reader, False)
        self._release()

    def _catch_up(self, reader: _Reader, now: float) -> None:
        """Bring a reader up to date, by the log if that goes back far enough."""
        reader.since = reader.answered_at = now
        reader.goal = self._table.version
        if reader.acked >= max(self._history.start, reader.least, 1):
            reader.sent = reader.acked
            reader.sent_end = reader.acked_end = self._history.get_end(reader.acked)
            reader.state = _State.STEP
            # Not only with its next acknowledgement: it may have everything.
            self._set_counted(reader, reader.is_live)
            self._pump(reader, now)
        else:
            self._queue_load(reader, now)

    def _queue_load(self, reader: _Reader, now: float) -> None:
        reader.state = _State.QUEUED
        self._queue.append(reader)
        self._load(now)

    def _end_load(self, now: float) -> None:
        self._loading -= 1
        self._load(now)

    def _load(self, now: float) -> None:
        """Send a snapshot to those whose turn it is."""
        while self._queue and self._loading < self._limits.loads:
            reader = self._queue.popleft()
            self._loading += 1
            version, parts = self._history.get_snapshot(max(reader.acked, reader.least))
            reader.state, reader.since, reader.sent = _State.LOADING, now, version
            reader.goal = self._table.version
            reader.sent_end = self._history.get_end(version)
            self._effects += [Send(reader.link, part) for part in parts]

    def _pump(self, reader: _Reader, now: float) -> None:
        """Send deltas, as many as the window allows."""
        if reader.state is not _State.STEP:
            return
        if reader.sent < self._history.start:
            # The log was cut while the window was shut.
            self._queue_load(reader, now)
            return
        while reader.sent < self._table.version:
            logged = self._history.get_next(reader.sent)
            assert logged is not None, "what comes next is in the log"
            if reader.sent_end - reader.acked_end >= self._limits.window_bytes:
                break
            self._effects.append(Send(reader.link, logged.data))
            reader.sent_end = logged.end
            reader.sent += 1
