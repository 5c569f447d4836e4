"""The door between a restart of the node and the return of its clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from afbus.node.door import listening


@pytest.mark.parametrize("mode", [0o666, 0o600])
def test_case3_case10_door_never_has_another_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """A client of another user that looks for the agent is not refused, nor let in too early."""
    found = []

    def look(door: Path, _mode: int) -> None:
        found.append(door.stat().st_mode & 0o777)

    monkeypatch.setattr(Path, "chmod", look)
    with listening(tmp_path / "node.sock", mode):
        look(tmp_path / "node.sock", mode)
    assert found == [mode, mode]
