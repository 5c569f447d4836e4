"""What readers catch up by: recent deltas, and a snapshot; each encoded once, for all who need it.

Invariants:

1. The log holds all deltas from the one behind version `start` to the newest.
2. A snapshot that is handed out leads to a version from which the log goes on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..proto import cluster
from ..proto.cluster import Part, TableDelta
from .ledger import chunks

if TYPE_CHECKING:
    from ..proto.table import Delta, Table


@dataclass(frozen=True, slots=True)
class Logged:
    """A delta: its frame, where that ends in the stream of all deltas, and when it came."""

    data: bytes
    end: int
    at: float


class History:
    """The recent past of one table."""

    def __init__(
        self, table: Table[bytes, bytes], epoch: int, max_bytes: int, max_deltas: int
    ) -> None:
        """Begin with what the table is now.

        Args:
            table: Read here, changed elsewhere; each delta comes to `append`.
            epoch: Stands in each frame.
            max_bytes: Size of the log.
            max_deltas: Length of the log.
        """
        self._table = table
        self._epoch = epoch
        self._max_bytes, self._max_deltas = max_bytes, max_deltas
        self._log: deque[Logged] = deque()
        self._start = table.version
        self._end = 0
        self._snapshot: tuple[int, list[bytes]] | None = None

    @property
    def start(self) -> int:
        """The oldest version from which the log leads on."""
        return self._start

    def append(self, delta: Delta[bytes, bytes], now: float) -> None:
        """Note what has changed, and forget what is too old."""
        data = cluster.encode(TableDelta(self._epoch, delta))
        self._end += len(data)
        self._log.append(Logged(data, self._end, now))
        while self._log and (
            len(self._log) > self._max_deltas
            or self._end - self._log[0].end + len(self._log[0].data) > self._max_bytes
        ):
            self._log.popleft()
            self._start += 1

    def get_next(self, version: int) -> Logged | None:
        """Return the delta that leads on from a version, None if it is not here (any more)."""
        place = version - self._start
        return self._log[place] if 0 <= place < len(self._log) else None

    def get_end(self, version: int) -> int:
        """Return where the delta to a version ends; not for versions before `start`."""
        place = version - self._start
        assert place >= 0, f"version {version} lies before the log"
        if place > 0:
            return self._log[place - 1].end
        return self._log[0].end - len(self._log[0].data) if self._log else self._end

    def get_snapshot(self, least: int) -> tuple[int, list[bytes]]:
        """Return a version and the frames that make it; not below `least`, if there is that yet."""
        version = self._table.version
        least = min(max(self._start, least), version)
        if self._snapshot is None or self._snapshot[0] < least:
            self._snapshot = (version, self._encode_parts(version))
        return self._snapshot

    def _encode_parts(self, version: int) -> list[bytes]:
        parts = list(chunks(self._table.items())) or [[]]
        count = len(parts)
        return [
            cluster.encode(
                Part(
                    self._epoch,
                    version,
                    index,
                    count,
                    tuple((key, value or b"") for key, value in part),
                )
            )
            for index, part in enumerate(parts)
        ]
