"""Buses and members in an event loop, on a real agent: what their tests share."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

import afbus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.client.conftest import NodeProcess

    from afbus import Bus, Gap, Member, Message, Question
    from afbus.client.question import Verdict

PATH = "/demo"
MASTER = "demo.master"


class Host:
    """A bus on an agent, and as many members as a test wants."""

    def __init__(self, door: Path, stack: AsyncExitStack) -> None:
        self.door = door
        self.stack = stack

    async def create(
        self,
        authorize: Callable[[Question], Verdict | Awaitable[Verdict]] | None = None,
        order: str = "fifo",
    ) -> Bus:
        """Create the bus."""
        bus = afbus.create(PATH, MASTER, authorize=authorize, node=self.door, order=order)
        return await self.stack.enter_async_context(bus)

    async def join(self, name: str | None = None, **options: Any) -> Member:
        """Join it."""
        member = afbus.join(PATH, name=name, node=self.door, **options)
        return await self.stack.enter_async_context(member)


@asynccontextmanager
async def hosting(agent: NodeProcess) -> AsyncIterator[Host]:
    """A host for one test, which leaves neither tasks nor descriptors behind."""
    descriptors = len(os.listdir("/proc/self/fd"))
    async with AsyncExitStack() as stack:
        yield Host(agent.place, stack)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def until(is_so: Callable[[], bool]) -> None:
    """Let the loop run until something is so."""
    while not is_so():  # noqa: ASYNC110 (what is waited for has no event of its own)
        await asyncio.sleep(0)


async def fails(call: Awaitable[object], kind: type[afbus.BusError]) -> str:
    """The text of the error by which a call must fail."""
    with pytest.raises(kind) as failure:
        await call
    return failure.value.message


async def read(count: int, stream: AsyncIterator[Message | Gap]) -> list[Message]:
    """So many messages, without a gap."""
    items = [await anext(stream) for _ in range(count)]
    return [item for item in items if isinstance(item, afbus.Message)]


async def cancelled(call: Awaitable[object], turns: int = 1) -> None:
    """Begin a call, and cancel it after so many turns of the loop if it is not done."""

    async def wait() -> None:
        await call

    async with asyncio.TaskGroup() as group:
        task = group.create_task(wait())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
