"""The journal: what was committed is there, whatever happened to the agent or to the file."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from afbus.node.effect import Drop, Kind, Put
from afbus.node.journal import Journal, JournalError, set_aside

if TYPE_CHECKING:
    from pathlib import Path

ENDPOINT = Put(Kind.ENDPOINT, 7, b"", b"who")
NAME = Put(Kind.ADDRESS, 7, b"name", b"1")
OTHER = Put(Kind.ADDRESS, 7, b"other", b"2")
ALIEN = Put(Kind.ADDRESS, 8, b"name", b"3")


def fill(path: Path, *effects: Put | Drop) -> int:
    """Write into a journal, and return its epoch."""
    journal = Journal(path, "boot")
    for effect in effects:
        journal.write([effect])
    journal.commit()
    journal.close()
    return journal.epoch


def read(path: Path, boot: str = "boot") -> set[Put]:
    """Return the entries of a journal."""
    journal = Journal(path, boot)
    entries = journal.read()
    journal.close()
    return set(entries)


def test_entries_and_epochs(tmp_path: Path) -> None:
    """Entries are written, replaced and dropped, one or all; each opening is an epoch."""
    path = tmp_path / "journal"
    assert fill(path, ENDPOINT, NAME, OTHER, ALIEN) == 1
    assert read(path) == {ENDPOINT, NAME, OTHER, ALIEN}
    assert fill(path, Drop(Kind.ADDRESS, 7, b"name")) == 3
    assert read(path) == {ENDPOINT, OTHER, ALIEN}
    again = Put(Kind.ENDPOINT, 7, b"", b"changed")
    fill(path, again, Drop(Kind.ADDRESS, 7))
    assert read(path) == {again, ALIEN}


def test_file_is_the_users_alone(tmp_path: Path) -> None:
    """Tokens stand in it, so nobody else can read it or what lies beside it."""
    before = os.umask(0)
    try:
        journal = Journal(tmp_path / "journal", "boot")
    finally:
        os.umask(before)
    journal.write([ENDPOINT])
    journal.commit()
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_case10_another_boot_voids_all(tmp_path: Path) -> None:
    """After the machine began anew its pids mean nothing; the epoch goes on."""
    path = tmp_path / "journal"
    fill(path, ENDPOINT)
    assert read(path, "next boot") == set()
    assert fill(path) == 3


@pytest.mark.cluster
def test_case3_committed_entries_survive_a_kill(tmp_path: Path) -> None:
    """`kill -9` right after the commit loses nothing, and what was not committed is not there."""
    path = tmp_path / "journal"
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from afbus.node.effect import Kind, Put\n"
        "from afbus.node.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), 'boot')\n"
        "journal.write([Put(Kind.ENDPOINT, 7, b'', b'who')])\n"
        "journal.commit()\n"
        "journal.write([Put(Kind.ENDPOINT, 8, b'', b'never')])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert read(path) == {ENDPOINT}


@pytest.mark.parametrize("kind", ["text", "cut", "foreign", "later"])
def test_broken_and_foreign_files_are_errors(tmp_path: Path, kind: str) -> None:
    """They are named, left as they are, and can be set aside whole."""
    path = tmp_path / "journal"
    if kind == "text":
        path.write_bytes(b"this is no database" * 100)
    elif kind == "cut":
        fill(path, *(Put(Kind.MATCH, 1, b"%8d" % number, bytes(99)) for number in range(500)))
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "foreign":
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE theirs (x)")
        file.close()
    else:
        fill(path)
        with sqlite3.connect(path) as file:
            file.execute("PRAGMA user_version = 99")
        file.close()
    content = path.read_bytes()
    with pytest.raises(JournalError, match=str(path)):
        Journal(path, "boot")
    aside = set_aside(path)
    assert aside.read_bytes() == content
    assert fill(path, ENDPOINT) == 1


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    """A journal in no folder is an error of this module."""
    with pytest.raises(JournalError, match="No such file"):
        Journal(tmp_path / "none" / "journal", "boot")
