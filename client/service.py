"""A service: answers requests as they come, several at a time.

Invariants:

1. A request that was taken out is answered, refused, or, when the service ends, refused as such.
2. A failure of the application's answer ends that request and no other.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeAlias

from ..proto.errors import BusError, Cancelled
from .backlog import Backlog
from .stream import BACKLOG_LIMIT, Stream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import Buffer

    from .message import Message

    #: Takes a request and returns the body of the reply, or an awaitable of it.
    Answering: TypeAlias = Callable[[Message], Buffer | Awaitable[Buffer | None] | None]

_log = logging.getLogger(__name__)


class Replying(Protocol):
    """What a service needs of whom it serves for: see `Mailbox`."""

    async def reply(self, message: Message, body: Buffer) -> None:
        """Answer a request."""

    async def refuse(self, message: Message, error: BusError) -> None:
        """Answer a request with an error."""

    def refuse_now(self, message: Message, error: BusError) -> None:
        """Answer a request with an error, if that is possible without waiting."""


class Service:
    """One run of `Mailbox.serve`: the requests that wait, and those that are worked on."""

    def __init__(self, replying: Replying, take: Callable[[Backlog], Message | None]) -> None:
        """Begin without requests; `take` takes one out of a backlog, and makes room known."""
        #: Requests that wait to be worked on. Full, it holds up those who ask.
        self.backlog = Backlog(BACKLOG_LIMIT, holds=True)
        self.stream: Stream[Message] = Stream(lambda: take(self.backlog))
        self._replying = replying

    def put(self, message: Message) -> None:
        """Take a request that has arrived."""
        self.backlog.put(message)
        self.stream.stir()

    async def run(self, answer: Answering, concurrency: int) -> None:
        """Answer until the stream ends; cancelled, until what is worked on is given up."""
        slots = asyncio.Semaphore(concurrency)
        async with asyncio.TaskGroup() as group:
            while True:
                # A request that was taken out must have its task at once, or it would be lost.
                await slots.acquire()
                try:
                    message = await anext(self.stream)
                except StopAsyncIteration:
                    return
                task = group.create_task(self._answer(message, answer))
                task.add_done_callback(partial(self._finish, message, slots))

    def end(self) -> None:
        """Give up what waits."""
        for message in self.backlog.clear():
            self._give_up(message)

    def _finish(self, message: Message, slots: asyncio.Semaphore, task: asyncio.Task[None]) -> None:
        slots.release()
        if task.cancelled():
            self._give_up(message)
        else:
            message.close()

    def _give_up(self, message: Message) -> None:
        """Be done with a request that nobody will answer."""
        self._replying.refuse_now(message, Cancelled("the service has ended"))
        message.close()

    async def _answer(self, message: Message, answer: Answering) -> None:
        try:
            body = answer(message)
            if inspect.isawaitable(body):
                body = await body
            await self._replying.reply(message, b"" if body is None else body)
        except Exception as error:
            await self._answer_error(message, error)

    async def _answer_error(self, message: Message, error: Exception) -> None:
        if not isinstance(error, BusError):
            _log.exception("a request from %s failed", message.source)
            error = BusError(f"the service failed ({type(error).__name__})")
        try:
            await self._replying.refuse(message, error)
        except BusError as failure:
            _log.info("no reply to %s: %s", message.source, failure)
