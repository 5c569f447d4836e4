"""The operator's door, with somebody behind it who says what a master would not."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from afbus.master import door as module
from afbus.master.door import Door, ask_master
from afbus.proto import cluster
from afbus.proto.cluster import CLUSTER_FRAME_BYTES, Ack
from afbus.proto.errors import (
    CloseCode,
    ConfigError,
    DeadlineExceeded,
    Denied,
    NotConnected,
    RemoteProtocolError,
)
from afbus.proto.frames import Closed, Result
from afbus.proto.operation import ClusterOp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


@asynccontextmanager
async def answering(path: Path, data: bytes | None) -> AsyncIterator[Door]:
    """A door behind which everybody is told the same, or nothing."""

    def ask(_frame: bytes, answer: Callable[[bytes], None]) -> None:
        if data is not None:
            answer(data)
            # A second answer is nothing.
            answer(b"")

    door = Door(path, ask)
    await door.open()
    try:
        yield door
    finally:
        door.close()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (cluster.encode(Result.refused(1, Denied("no"))), Denied),
        (cluster.encode(Closed(CloseCode.ORDER, "no")), RemoteProtocolError),
        (cluster.encode(Ack(1, 1)), RemoteProtocolError),
        (b"garbage", RemoteProtocolError),
        (bytes(CLUSTER_FRAME_BYTES + 1), RemoteProtocolError),
        (b"", RemoteProtocolError),
    ],
)
async def test_answers_that_are_none(tmp_path: Path, data: bytes, error: type[Exception]) -> None:
    """Each is told as what it is."""
    async with answering(tmp_path / "door", data):
        with pytest.raises(error):
            await asyncio.to_thread(ask_master, tmp_path / "door", ClusterOp.STATUS)


async def test_no_answer(tmp_path: Path) -> None:
    """After a time it is given up; and at once when the door is closed."""
    path = tmp_path / "door"
    async with answering(path, None) as door:
        with pytest.raises(DeadlineExceeded):
            await asyncio.to_thread(ask_master, path, ClusterOp.STATUS, timeout_s=0.05)
        waiting = asyncio.to_thread(ask_master, path, ClusterOp.STATUS)
        async with asyncio.TaskGroup() as group:

            async def wait() -> None:
                with pytest.raises(NotConnected):
                    await waiting

            group.create_task(wait())
            async with asyncio.timeout(10):
                while len(door._serving) < 2:
                    await asyncio.to_thread(lambda: None)
            door.close()
        assert not path.exists()


async def test_who_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection ends by itself."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    async with answering(tmp_path / "door", b"x"):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "door")
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()


async def test_a_door_that_cannot_be_made(tmp_path: Path) -> None:
    """The error names the file; one that was never opened is closed all the same."""
    with pytest.raises(ConfigError, match="none"):
        Door(tmp_path / "none" / "door", lambda *_: None)
    door = Door(tmp_path / "door", lambda *_: None)
    door.close()
    assert not (tmp_path / "door").exists()
