"""The examples run, end with 0, and leave nothing behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def start(name: str, folder: Path) -> subprocess.Popen[str]:
    """Start an example, with a folder of its own for what is temporary."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    environment.pop("AFBUS_NODE", None)
    return subprocess.Popen(
        [sys.executable, EXAMPLES / name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def find_processes(session: int) -> list[int]:
    """The processes of an example's session that live."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended just now
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def check_nothing_is_left(session: int, folder: Path) -> None:
    """Check that no process of the example's session lives, and that no file of it is there."""
    assert find_processes(session) == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "last"), [("mail.py", "all as in the mail ("), ("counters.py", "the counts add up (")]
)
def test_example_runs_and_leaves_nothing(name: str, last: str, tmp_path: Path) -> None:
    """Each example checks what it shows, ends with 0, and complains of nothing."""
    example = start(name, tmp_path)
    out, complaint = example.communicate()
    assert (example.returncode, complaint) == (0, ""), out
    assert out.splitlines()[-1].startswith(last)
    check_nothing_is_left(example.pid, tmp_path)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let examples have Ctrl-C, also where a shell runs the tests in its background without it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c")
def test_counters_ended_by_ctrl_c_leave_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle ends all that was started."""
    example = start("counters.py", tmp_path)
    assert example.stdout is not None
    for line in example.stdout:
        if "pub-cpu" in line:
            break
    # As the terminal does it: to the whole group of the director.
    os.killpg(example.pid, signal.SIGINT)
    example.communicate()
    assert example.returncode == 130
    check_nothing_is_left(example.pid, tmp_path)


@pytest.mark.parametrize(
    ("name", "begins"), [("mail.py", "   master | "), ("counters.py", "   pub-cpu | ")]
)
def test_example_killed_leaves_no_process(name: str, begins: str, tmp_path: Path) -> None:
    """Kill -9 of the one that started all the others ends them too."""
    example = start(name, tmp_path)
    assert example.stdout is not None
    for line in example.stdout:
        if line.startswith(begins):
            break
    others = [os.pidfd_open(pid) for pid in find_processes(example.pid) if pid != example.pid]
    assert others
    example.kill()
    for pidfd in others:
        # Ends when the process does; the deadline of the test ends a wait in vain.
        select.select([pidfd], [], [])
        os.close(pidfd)
    example.communicate()
    assert find_processes(example.pid) == []
