"""The journal: whole batches, for its user alone, read while it is written."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from afbus.master.effect import Audit
from afbus.master.journal import Journal, JournalError, read_audit

if TYPE_CHECKING:
    from pathlib import Path


def entry(number: int) -> Audit:
    """Return an entry of the audit."""
    return Audit(float(number), "operator", "token", f"node/{number}", True, "detail")


def test_rows_and_audit_come_back(tmp_path: Path) -> None:
    """After they were closed, in their order."""
    file = tmp_path / "journal.db"
    journal = Journal(file)
    journal.commit([(b"b", b"2"), (b"a", b"1"), (b"c", b"3")], [entry(1)])
    journal.commit([(b"c", None), (b"a", b"\0"), (b"x", None)], [entry(2)])
    journal.close()
    journal.close()
    journal = Journal(file)
    assert journal.read() == [(b"a", b"\0"), (b"b", b"2")]
    assert read_audit(file) == [(1, entry(1)), (2, entry(2))]
    journal.close()


def test_the_audit_is_read_while_it_is_written(tmp_path: Path) -> None:
    """From behind a number, or the last ones."""
    file = tmp_path / "journal.db"
    journal = Journal(file)
    for number in range(1, 6):
        journal.commit([], [entry(number)])
        assert read_audit(file)[-1] == (number, entry(number))
    assert [number for number, _ in read_audit(file, after=3)] == [4, 5]
    assert [number for number, _ in read_audit(file, count=2)] == [4, 5]
    journal.close()


def test_the_file_is_its_users_alone(tmp_path: Path) -> None:
    """Also what SQLite puts beside it, whatever the umask is."""
    previous = os.umask(0)
    try:
        journal = Journal(tmp_path / "journal.db")
        journal.commit([(b"a", b"1")])
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        journal.close()
    finally:
        os.umask(previous)
    assert set(modes) >= {"journal.db", "journal.db-wal"}
    assert set(modes.values()) == {0o600}


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """What cannot be written leaves nothing behind, and the next batch is good."""
    journal = Journal(tmp_path / "journal.db")
    journal.commit([(b"a", b"1")])

    def broken() -> object:
        yield (b"a", b"2")
        yield (b"b", b"2")
        raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(JournalError, match="disk I/O"):
        journal.commit(broken())  # type: ignore[arg-type]  # what breaks in the middle
    assert journal.read() == [(b"a", b"1")]
    journal.commit([(b"b", b"3")])
    assert journal.read() == [(b"a", b"1"), (b"b", b"3")]
    journal.close()


def test_files_that_are_none(tmp_path: Path) -> None:
    """Another program's, garbage, a folder: refused, and left as they are."""
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as file:
        file.execute("CREATE TABLE t (a)")
    file.close()
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"garbage" * 1000)
    for path in (other, garbage, tmp_path):
        with pytest.raises(JournalError, match=path.name):
            Journal(path)
    assert garbage.read_bytes() == b"garbage" * 1000
    with pytest.raises(JournalError):
        read_audit(tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()


def test_the_audit_has_a_limit(tmp_path: Path) -> None:
    """The oldest entries go, in portions."""
    file = tmp_path / "journal.db"
    journal = Journal(file, audit_entries=100)
    journal.commit([], [entry(number) for number in range(1, 10_101)])
    assert len(read_audit(file)) == 10_100
    journal.commit([], [entry(10_101)])
    numbers = [number for number, _ in read_audit(file)]
    assert (numbers[0], numbers[-1], len(numbers)) == (10_002, 10_101, 100)
    journal.close()
    journal = Journal(file, audit_entries=100)
    journal.commit([], [entry(1)])
    assert len(read_audit(file)) == 101
    journal.close()


WRITER = """
import sys
from pathlib import Path
from afbus.master.journal import Journal
journal = Journal(Path(sys.argv[1]))
first = len(journal.read()) // 2
for number in range(first, 1_000_000):
    key = b"%08d" % number
    journal.commit([(b"a" + key, key), (b"b" + key, key)])
    print(number, flush=True)
"""


def test_case28_what_was_committed_survives_kill_9(tmp_path: Path) -> None:
    """20 kills at random places: each batch whole, and none missing that was told."""
    file = tmp_path / "journal.db"
    for turn in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, file], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            last = -1
            for _ in range(turn % 7 + 1):
                last = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            for line in writer.stdout:
                # It may have told more before it was killed; a line that is cut was not told.
                if line.endswith("\n"):
                    last = int(line)
        journal = Journal(file)
        rows = dict(journal.read())
        journal.close()
        numbers = {key[1:] for key in rows}
        assert set(rows) == {head + key for head in (b"a", b"b") for key in numbers}
        assert {b"%08d" % number for number in range(last + 1)} <= numbers
