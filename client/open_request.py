"""Requests of ours that are open: sent, or about to be, and not answered yet.

Invariants:

1. Each ends once: by a reply, by an error, or by being given up; its number is free afterwards.
2. Numbers are drawn by chance, so that nobody can answer who was not asked.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..proto import control
from ..proto.control import Deadline, Serial
from ..proto.errors import InvalidArgument, NoSuchEndpoint, OutcomeUnknown
from ..proto.limits import DEADLINE_MS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..proto.errors import BusError
    from .message import Message
    from .sending import AncillaryItem


class OpenRequest:
    """One request, until it is answered."""

    def __init__(self, serial: int, milliseconds: int) -> None:
        """Begin; not sent yet."""
        #: What stands beside the message that asks.
        self.ancdata: list[AncillaryItem] = [
            control.encode(Serial(serial)),
            control.encode(Deadline(milliseconds)),
        ]
        self._reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        #: Whether it was accepted: from then on it may have been carried out.
        self.is_accepted = False

    async def wait(self) -> Message:
        """Return the reply, now that the request was accepted."""
        self.is_accepted = True
        return await self._reply

    def answer(self, message: Message) -> bool:
        """Take the reply; tell whether it was waited for."""
        if self._reply.done():
            return False
        self._reply.set_result(message)
        return True

    def fail(self, error: BusError) -> None:
        """Take the news that there will be no reply."""
        if not self._reply.done():
            self._reply.set_exception(error)

    def drop(self) -> None:
        """Be done with it: an error that nobody waits for any more is no mistake."""
        if self._reply.done() and not self._reply.cancelled():
            self._reply.exception()


class OpenRequests:
    """All open requests of one endpoint."""

    def __init__(self) -> None:
        self._open: dict[int, OpenRequest] = {}

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def open(self, deadline: float) -> Iterator[OpenRequest]:
        """Return a request that can be answered within the block; `deadline` is in seconds."""
        # Written so that NaN is refused too.
        if deadline is None or not 1 <= deadline * 1000 <= DEADLINE_MS_MAX:
            limits = f"0.001 to {DEADLINE_MS_MAX // 1000}"
            raise InvalidArgument(f"deadline of {deadline} s, not {limits}")
        milliseconds = int(deadline * 1000)
        # The highest bit keeps it from being an errno.
        serial = secrets.randbits(63) | 1 << 63
        request = self._open[serial] = OpenRequest(serial, milliseconds)
        try:
            yield request
        finally:
            del self._open[serial]
            request.drop()

    def answer(self, message: Message) -> bool:
        """Take a reply; tell whether it was waited for."""
        request = self._open.get(message.reply_to)
        return request is not None and request.answer(message)

    def fail_unanswered(self, serial: int) -> None:
        """Take the news that whoever was asked is gone."""
        request = self._open.get(serial)
        if request is not None:
            request.fail(NoSuchEndpoint("whoever was asked is gone, and has not answered"))

    def fail_all(self, error: BusError) -> None:
        """Take the news that no reply will come any more."""
        for request in self._open.values():
            request.fail(error)

    def doubt(self, why: str) -> None:
        """Take the news that the agent is gone: what it had accepted may have arrived, or not."""
        for request in self._open.values():
            if request.is_accepted:
                request.fail(OutcomeUnknown(f"{why}; whether the request arrived is not known"))
