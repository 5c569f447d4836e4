"""What one endpoint sends in an event loop: at once where there is room, else when there is.

A call that waits for the agent and for nobody else is made where it is due; what waits for a peer,
or for an agent to come back, is awaited.

Invariants:

1. Only what was refused is sent again.
2. A wait that is cancelled has sent nothing.
"""

from __future__ import annotations

import array
import asyncio
import socket as _socket
from functools import partial
from typing import TYPE_CHECKING, Final

from ..proto.errors import (
    BusError,
    Cancelled,
    DeadlineExceeded,
    LocalProtocolError,
    NoAgent,
    NotConnected,
    RingFull,
    ShareExceeded,
)
from .stream import within
from .words import show_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

    from ..proto.address import BusAddress
    from .sending import AncillaryItem
    from .socket import Socket

#: Pauses between attempts where nothing tells when to try again, in seconds: first, and longest.
FIRST_PAUSE_S: Final = 0.002
LONGEST_PAUSE_S: Final = 0.25
#: Messages that are sent, or read, in one turn of the loop.
BATCH: Final = 64


class Outbox:
    """Sends for one endpoint."""

    def __init__(self, lose_agent: Callable[[BusError], None]) -> None:
        """Begin without a socket; `lose_agent` is called when the agent is found gone."""
        #: Set while there is an agent, and the endpoint is what it should be there.
        self.ready = asyncio.Event()
        self._lose_agent = lose_agent
        self._socket: Socket
        self._is_open = False
        self._writers: set[asyncio.Future[None]] = set()
        self._sent = 0
        self._is_closed = False
        self._reason: BusError | None = None

    def open(self, socket: Socket) -> None:
        """Send by this socket, which does not wait; to be called once."""
        self._socket = socket
        self._is_open = True

    def check_open(self) -> None:
        """Check that something can be sent.

        Raises:
            LocalProtocolError: Nobody has entered the bus yet.
            BusError: Why it was left; Cancelled if that was in good order.
        """
        if self._is_closed:
            raise self._reason or Cancelled("the bus was left")
        if not self._is_open:
            raise LocalProtocolError("not on the bus yet: enter it with `async with`")

    def end(self, reason: BusError | None) -> None:
        """Send no more: what waits ends in the reason, or in Cancelled."""
        self._is_closed = True
        self._reason = reason
        self.wake()
        self.ready.set()

    async def send(
        self,
        address: BusAddress,
        body: Buffer | Sequence[Buffer],
        ancdata: Sequence[AncillaryItem],
        fds: Iterable[int],
        deadline: float | None,
    ) -> None:
        """Send one message, in one part or several; errors as `Mailbox.send`."""
        buffers = body if isinstance(body, list | tuple) else (body,)
        numbers = array.array("i", fds)
        if numbers:
            ancdata = [*ancdata, (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers.tobytes())]
        if self.ready.is_set() and not self._is_closed:
            self._sent += 1
            if self._sent % BATCH == 0:
                # A task that does nothing but send must not keep the others from running.
                await asyncio.sleep(0)
            try:
                self.send_now(buffers, ancdata, address)
            except (RingFull, ShareExceeded, NotConnected, NoAgent):
                pass
            else:
                return
        await self.patiently(partial(self.send_now, buffers, ancdata, address), deadline, address)

    async def send_many(
        self, address: BusAddress, bodies: Sequence[Buffer], deadline: float | None
    ) -> int:
        """Send messages in order; return how many were accepted, errors as `Mailbox.send_many`."""
        accepted = 0
        try:
            async with within(deadline, f"sending to {show_address(address)}"):
                while accepted < len(bodies):
                    batch = bodies[accepted : accepted + BATCH]
                    send = partial(self._send_batch_now, batch, address)
                    accepted += await self.patiently(send, None, address)
                    await asyncio.sleep(0)
        except BusError:
            if accepted == 0:
                raise
        return accepted

    def send_now(
        self,
        buffers: Sequence[Buffer],
        ancdata: Sequence[AncillaryItem],
        address: BusAddress,
    ) -> int:
        """Send without waiting for anybody but the agent, and notice when it is gone."""
        try:
            return self._socket.sendmsg(buffers, ancdata, 0, address)
        except (NotConnected, NoAgent) as error:
            self._lose_agent(error)
            raise

    def _send_batch_now(self, bodies: Sequence[Buffer], address: BusAddress) -> int:
        try:
            return self._socket.sendmmsg(bodies, address)
        except (NotConnected, NoAgent) as error:
            self._lose_agent(error)
            raise

    async def patiently(
        self,
        send: Callable[[], int],
        deadline: float | None,
        address: BusAddress,
        *,
        is_ready: bool = True,
    ) -> int:
        """Send as soon as there is an agent, and room, and a share of it that is not used up.

        `send` does not wait, and notices when the agent is gone; then, unless the endpoint is to
        be ready, this gives up.
        """
        self.check_open()
        excess: ShareExceeded | None = None
        pause = FIRST_PAUSE_S
        try:
            async with within(deadline, f"sending to {show_address(address)}"):
                while True:
                    if is_ready:
                        await self.ready.wait()
                    self.check_open()
                    try:
                        return send()
                    except RingFull:
                        excess = None
                        await self._wait_writable()
                    except ShareExceeded as error:
                        # Nothing tells when others have read enough of what is ours.
                        excess = error
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, LONGEST_PAUSE_S)
                    except (NotConnected, NoAgent):
                        # Nothing was accepted, so it may be sent again.
                        if not is_ready:
                            raise
        except DeadlineExceeded as error:
            if excess is None:
                raise
            raise excess from error

    async def _wait_writable(self) -> None:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        if not self._writers:
            loop.add_writer(self._socket.fileno(), self.wake)
        self._writers.add(waiter)
        try:
            await waiter
        finally:
            self._writers.discard(waiter)
            if not self._writers and not self._is_closed:
                loop.remove_writer(self._socket.fileno())

    def wake(self) -> None:
        """Let those that wait for room try again."""
        waiting, self._writers = self._writers, set()
        if waiting:
            asyncio.get_running_loop().remove_writer(self._socket.fileno())
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
