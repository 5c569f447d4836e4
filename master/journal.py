"""What survives the master, a loss of power too: all rows and the audit, in one SQLite file.

One transaction for each batch of the core; it is on disk (WAL, synchronous FULL: one fsync) before
anybody is told of what stands in it.

Invariants:

1. The file is its user's alone: it has digests of tokens, and who may be where.
2. A batch is written whole or not at all, and survives once `commit` has returned.
3. Audit entries are only ever appended; the oldest are cleared away beyond `AUDIT_ENTRIES`.
4. Errors of SQLite leave this module as `JournalError`.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final

from ..proto.errors import AfbusError
from .effect import Audit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

#: Marks the file as ours.
APPLICATION_ID: Final = 0xAFBC
#: The shape of the tables; another one is not read.
SHAPE: Final = 1
#: Entries of the audit that are kept: some hundred MB of them.
AUDIT_ENTRIES: Final = 1_000_000
#: How many entries come between two looks at their number.
_AUDIT_SPARE: Final = 10_000


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
    """An open journal; used by one thread at a time, and by the master that has the lock."""

    def __init__(self, path: Path, audit_entries: int = AUDIT_ENTRIES) -> None:
        """Open the file, or make it.

        Raises:
            JournalError: It is broken, another program's, or cannot be opened.
        """
        self.path = path
        self._audit_entries = audit_entries
        with _border(path):
            # SQLite would make it readable for all whom the umask allows.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._file.close()
                raise

    def _prepare(self) -> None:
        run = self._file.execute
        is_new = run("PRAGMA schema_version").fetchone() == (0,)
        marks = [run(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if not is_new and marks != [APPLICATION_ID, SHAPE]:
            raise ValueError("not a journal of this version of afbus")
        if run("PRAGMA quick_check").fetchone() != ("ok",):
            raise ValueError("broken")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        if is_new:
            run("BEGIN")
            run(f"PRAGMA application_id = {APPLICATION_ID}")
            run(f"PRAGMA user_version = {SHAPE}")
            run("CREATE TABLE row (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
            run(
                "CREATE TABLE audit (id INTEGER PRIMARY KEY, utc REAL NOT NULL, "
                "actor TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL, "
                "is_done INTEGER NOT NULL, detail TEXT NOT NULL)"
            )
            run("COMMIT")
        self._oldest: int = run("SELECT coalesce(min(id), 1) FROM audit").fetchone()[0]

    def read(self) -> list[tuple[bytes, bytes]]:
        """Return all rows.

        Raises:
            JournalError: They cannot be read.
        """
        with _border(self.path), closing(self._file.cursor()) as cursor:
            rows = cursor.execute("SELECT key, value FROM row ORDER BY key")
            return [(bytes(key), bytes(value)) for key, value in rows]

    def commit(
        self, rows: Iterable[tuple[bytes, bytes | None]], audits: Sequence[Audit] = ()
    ) -> None:
        """Write rows, delete those without a value, append to the audit; all or nothing, for good.

        Raises:
            JournalError: It cannot be written; nothing of it was.
        """
        with _border(self.path):
            run = self._file.execute
            run("BEGIN IMMEDIATE")
            try:
                for key, value in rows:
                    if value is None:
                        run("DELETE FROM row WHERE key = ?", (key,))
                    else:
                        run("INSERT OR REPLACE INTO row VALUES (?, ?)", (key, value))
                for one in audits:
                    entry = (one.utc, one.actor, one.action, one.subject, one.is_done, one.detail)
                    run("INSERT INTO audit VALUES (NULL, ?, ?, ?, ?, ?, ?)", entry)
                if audits:
                    self._clear_away()
                run("COMMIT")
            except BaseException:
                if self._file.in_transaction:
                    run("ROLLBACK")
                raise

    def _clear_away(self) -> None:
        newest: int = self._file.execute("SELECT max(id) FROM audit").fetchone()[0]
        if newest - self._oldest >= self._audit_entries + _AUDIT_SPARE:
            self._oldest = newest - self._audit_entries + 1
            self._file.execute("DELETE FROM audit WHERE id < ?", (self._oldest,))

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._file.close()


def read_audit(path: Path, after: int = 0, count: int = -1) -> list[tuple[int, Audit]]:
    """Return numbered entries of the audit, from behind a number on, or the last `count` of them.

    Works while a master has the journal.

    Raises:
        JournalError: There is none, or it cannot be read.
    """
    with _border(path):
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        with closing(sqlite3.connect(path, isolation_level=None)) as file:
            file.execute("PRAGMA query_only = 1")
            rows = file.execute(
                "SELECT id, utc, actor, action, subject, is_done, detail FROM audit "
                "WHERE id > ? ORDER BY id DESC LIMIT ?",
                (after, count),
            ).fetchall()
    rows.reverse()
    return [
        (number, Audit(utc, actor, action, subject, bool(is_done), detail))
        for number, utc, actor, action, subject, is_done, detail in rows
    ]
