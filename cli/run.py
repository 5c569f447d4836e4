"""One command in an event loop: how it begins and ends, and what it prints meanwhile.

Invariants:

1. SIGTERM is the ordinary end of a command that runs until it is ended: the bus is left in good
   order, and the exit code is 0. Ctrl-C leaves in good order too, and is told by the exit code.
2. Messages, gaps and notices are printed as they come, and none is kept back.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from ..client.message import Message
from ..proto.errors import MessagesLost
from ..proto.notice import Gap, Notice
from .output import print_gap, print_lost, print_message, print_notice

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from ..proto.address import BusAddress


def run_until_ended(work: Coroutine[None, None, None]) -> None:
    """Run something that ends by SIGTERM, if not by itself."""

    async def watched() -> None:
        task = asyncio.current_task()
        assert task is not None
        is_ended = asyncio.Event()

        def end() -> None:
            is_ended.set()
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
        try:
            await work
        except asyncio.CancelledError:
            if not is_ended.is_set():
                raise

    asyncio.run(watched())


class Printing:
    """Prints what streams give, each in a task of its own, until it was enough."""

    def __init__(
        self, as_json: bool, count: int | None = None, master: BusAddress | None = None
    ) -> None:
        """Begin.

        Args:
            as_json: Print JSON objects.
            count: So many messages are enough; None: there are never enough.
            master: Whose talk with members is shown in words.
        """
        self._as_json = as_json
        self._master = master
        self._left = count
        self._is_enough = asyncio.Event()

    async def run(self, *streams: AsyncIterator[Message | Gap | Notice]) -> None:
        """Print until there were enough messages, or all streams have ended.

        Raises:
            BusError: A stream ended in it.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._print_all(stream)) for stream in streams]
                watch = group.create_task(self._stop(tasks))
                await asyncio.wait(tasks)
                watch.cancel()
        except BaseExceptionGroup as error:
            # One reason is enough to tell: the other streams end for the same.
            raise error.exceptions[0] from None

    async def _stop(self, tasks: list[asyncio.Task[None]]) -> None:
        await self._is_enough.wait()
        for task in tasks:
            task.cancel()

    async def _print_all(self, stream: AsyncIterator[Message | Gap | Notice]) -> None:
        while not self._is_enough.is_set():
            try:
                item = await anext(stream)
            except StopAsyncIteration:
                return
            except MessagesLost as error:
                print_lost(error, self._as_json)
            else:
                self._print(item)

    def _print(self, item: Message | Gap | Notice) -> None:
        match item:
            case Message():
                with item:
                    print_message(item, self._as_json, self._master)
                if self._left is not None:
                    self._left -= 1
                    if self._left <= 0:
                        self._is_enough.set()
            case Gap():
                print_gap(item, self._as_json)
            case Notice():
                print_notice(item, self._as_json)
