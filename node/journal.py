"""What must survive the agent: epoch, buses, endpoints and their grants, in one SQLite file.

It survives `kill -9` of the agent, not a loss of power: after that no process is left to return.
So nothing is ever synced, and what was committed lies in the pages of the kernel.

Invariants:

1. The file is the user's alone: it holds the tokens of the clients.
2. Each agent that opens it has an epoch of its own, one above the last.
3. A file that is no journal of ours, or a broken one, is set aside and never overwritten.
4. Errors of SQLite leave this module as `JournalError`.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Final, cast

from ..proto.errors import AfbusError
from .effect import Drop, Kind, Put

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

#: Marks the file as ours.
APPLICATION_ID: Final = 0xAFB
#: The shape of tables and entries; another one is not read.
SHAPE: Final = 2

# Written out so that the file is small: pages beyond this are read again from the kernel.
_CACHE_KIB: Final = 256


class JournalError(AfbusError):
    """The journal cannot be read or written."""


@contextmanager
def _border(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError) as error:
        raise JournalError(f"journal {path}: {error}") from error
    except OSError as error:
        raise JournalError(f"journal {path}: {error.strerror}") from error


class Journal:
    """An open journal. One agent has it, who holds the lock of the door."""

    def __init__(self, path: Path, boot: str) -> None:
        """Open the file, or make it, and begin a new epoch.

        Args:
            path: The file.
            boot: What the machine's running time is called: entries of another one are void, as
                no process of then can be alive.

        Raises:
            JournalError: The file is broken or another's, or cannot be opened.
        """
        self.path = path
        with _border(path):
            # SQLite would make it readable for all whom the umask allows.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._file = sqlite3.connect(path, isolation_level=None)
            try:
                self._prepare(boot)
            except BaseException:
                self._file.close()
                raise

    def _prepare(self, boot: str) -> None:
        run = self._file.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        is_new = run("PRAGMA schema_version").fetchone() == (0,)
        marks = [run(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if not is_new and marks != [APPLICATION_ID, SHAPE]:
            raise ValueError("not a journal of this version of afbus")
        if run("PRAGMA quick_check").fetchone() != ("ok",):
            raise ValueError("broken")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = OFF")
        run(f"PRAGMA cache_size = -{_CACHE_KIB}")
        run("BEGIN")
        if is_new:
            run(f"PRAGMA application_id = {APPLICATION_ID}")
            run(f"PRAGMA user_version = {SHAPE}")
            run("CREATE TABLE life (boot TEXT NOT NULL, epoch INTEGER NOT NULL)")
            run("INSERT INTO life VALUES (?, 0)", (boot,))
            run(
                "CREATE TABLE entry (kind INTEGER, owner INTEGER, key BLOB, value BLOB NOT NULL, "
                "PRIMARY KEY (kind, owner, key)) WITHOUT ROWID"
            )
        if run("SELECT boot FROM life").fetchone() != (boot,):
            run("DELETE FROM entry")
        run("UPDATE life SET boot = ?, epoch = epoch + 1", (boot,))
        self.epoch: int = run("SELECT epoch FROM life").fetchone()[0]
        run("COMMIT")

    def read(self) -> list[Put]:
        """Return all entries.

        Raises:
            JournalError: They cannot be read.
        """
        with _border(self.path), closing(self._file.cursor()) as cursor:
            rows = cursor.execute("SELECT kind, owner, key, value FROM entry")
            return [
                Put(Kind(kind), int(owner), bytes(key), bytes(value))
                for kind, owner, key, value in rows
            ]

    def write(self, effects: Iterable[Put | Drop]) -> None:
        """Write or delete entries; others see it after `commit`.

        Raises:
            JournalError: They cannot be written.
        """
        with _border(self.path):
            if not self._file.in_transaction:
                self._file.execute("BEGIN")
            for kind, some in groupby(effects, key=type):
                if kind is Put:
                    # One statement for all: there may be hundreds beside one message.
                    insert = "INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?)"
                    self._file.executemany(insert, cast("Iterator[Put]", some))
                else:
                    for drop in some:
                        self._delete(drop.kind, drop.owner, drop.key)

    def _delete(self, kind: Kind, owner: int, key: bytes | None) -> None:
        if key is None:
            self._file.execute("DELETE FROM entry WHERE kind = ? AND owner = ?", (kind, owner))
        else:
            self._file.execute(
                "DELETE FROM entry WHERE kind = ? AND owner = ? AND key = ?", (kind, owner, key)
            )

    def commit(self) -> None:
        """Make what was written survive this process.

        Raises:
            JournalError: It cannot be written.
        """
        if self._file.in_transaction:
            with _border(self.path):
                self._file.execute("COMMIT")

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._file.close()

    def remove(self) -> None:
        """Close and delete the file: nothing is to be resumed."""
        self.close()
        for name in _files(self.path):
            name.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    """Return the file and what SQLite keeps beside it."""
    return [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))]


def set_aside(path: Path) -> Path:
    """Move a journal away, with what SQLite keeps beside it; return where it lies now.

    Raises:
        JournalError: It cannot be moved.
    """
    aside = path.with_name(path.name + ".broken")
    with _border(path):
        for old, new in zip(_files(path), _files(aside), strict=True):
            new.unlink(missing_ok=True)
            if old.exists():
                old.rename(new)
    return aside
