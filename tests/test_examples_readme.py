"""What the README and the reference say is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus.node.config import Config, parse_config
from afbus.proto.errors import TABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs/reference.md").read_text()

PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
#: What each of them prints.
OUTPUTS = [
    "b'tick'\n",
    "demo.clock PRIMARY_OWNER\nmy.clock names here begin with demo.\n",
    "(b'hello', <BusAddress /tmp/test:1.1>)\n",
    "[b'one', b'two', b'three']\n",
]


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Path]:
    """The door of an agent."""
    command = [sys.executable, "-m", "afbus.cli", "node", "--door", str(tmp_path / "door")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline()
        yield tmp_path / "door"
        agent.terminate()


@pytest.mark.cluster
@pytest.mark.parametrize(("program", "output"), list(zip(PROGRAMS, OUTPUTS, strict=True)))
def test_program_of_the_readme_runs(door: Path, program: str, output: str) -> None:
    """As it stands there, without a warning."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "AFBUS_NODE": str(door)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, output, "")


def find_words(title: str) -> set[str]:
    """The words in a section of the reference."""
    _, _, rest = REFERENCE.partition(f"\n## {title}\n")
    assert rest, title
    return set(re.findall(r"\w+", rest.partition("\n## ")[0]))


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Notices", [event.name for event in afbus.Event]),
        ("Gaps", [reason.name for reason in afbus.GapReason]),
        ("Subscriptions that are too slow", [overflow.name for overflow in afbus.Overflow]),
        ("Names", [str(flag.name) for flag in afbus.NameFlags]),
        ("Names", [outcome.name for outcome in afbus.NameOutcome]),
        ("Names", [outcome.name for outcome in afbus.ReleaseOutcome]),
        ("What an authorize callback is asked", [kind.name for kind in afbus.RequestKind]),
        ("Errors", [kind.__name__ for kind, _, _ in TABLE]),
        ("Control items", [name for name in afbus.__all__ if name.startswith(("SCM_", "SO_"))]),
        ("Control items", [str(flag.name) for flag in afbus.GrantFlags]),
    ],
)
def test_reference_names_all(title: str, names: list[str]) -> None:
    """Each member of each table is there."""
    assert set(names) - find_words(title) == set()


def test_reference_names_all_settings() -> None:
    """Those that there are, and no others."""
    with pytest.raises(afbus.AfbusError, match="unknown key") as caught:
        parse_config({"": 0}, "file")
    known = set(re.findall(r"\w+", str(caught.value).rpartition("there are")[2]))
    assert known >= {"door", "quota_bytes"}
    assert known - find_words("Settings of an agent") == set()
    assert Config().connections == 16_384
