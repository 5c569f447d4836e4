"""A bus and its master, in an event loop.

    async with afbus.create("/demo", "demo.master") as bus:
        await bus.wait_closed()

The shell around `authority.py`: it reads requests, asks the application's policy, and gives the
agent the master's commands, in their order. Calls to the agent run in a thread; the policy runs in
the loop, one question of an endpoint at a time.

Messages that are no request, and those to names that nobody owns (D7), are the application's, by
`messages()` or `serve`. While it takes neither, they are answered here if they expect a reply:
EHOSTUNREACH for such a name, EINVAL for what the master does not understand.

Invariants:

1. Nothing that a member sends, and nothing that a policy does, ends the bus.
2. Effects of the authority are carried out one after the other; each is reported back before the
   next one begins.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from ..proto import control
from ..proto import request as requests
from ..proto.address import BusAddress
from ..proto.control import ReplyTo
from ..proto.errors import (
    AddressInUse,
    BusError,
    InvalidArgument,
    NoAgent,
    NoSuchEndpoint,
    NotConnected,
    OutcomeUnknown,
    RemoteProtocolError,
)
from ..proto.limits import BLOOM_BITS_DEFAULT
from ..proto.notice import Event
from .authority import Authority
from .effect import Ask, Probe, Tell
from .mailbox import Mailbox, To, check_path
from .member import About, what_of
from .question import Question, Verdict, cluster_decides, same_user

if TYPE_CHECKING:
    import os
    from collections.abc import Awaitable, Callable, Mapping

    from ..proto.notice import Notice
    from .message import Message
    from .proof import Proof
    from .record import MemberView
    from .stream import Stream

_log = logging.getLogger(__name__)

#: How long a policy may think about one question, in seconds; then it is refused.
VERDICT_S: Final = 30.0
#: Pauses before what could not be given is tried again, in seconds: first, and longest.
_FIRST_RETRY_S: Final = 0.25
_LONGEST_RETRY_S: Final = 5.0


def create(  # noqa: PLR0913 (keywords, each with a default)
    path: str | bytes,
    name: str | bytes,
    *,
    authorize: Callable[[Question], Verdict | Awaitable[Verdict]] | None = None,
    node: str | os.PathLike[str] | None = None,
    width: int = BLOOM_BITS_DEFAULT,
    order: str | None = None,
    scope: str = "host",
    proof: Proof | None = None,
) -> Bus:
    """Return a bus to be, with this process as its master, to be entered with `async with`.

    Args:
        path: The bus.
        name: The address of its master.
        authorize: Decides each question: True grants; False, or a text that says why, refuses. By
            default processes of the same user may do everything but monitor, and hear everything;
            on a bus of the cluster all may that its policy allows.
        node: The agent's door; by default as for `afbus.socket`.
        width: Bits of its multicast addresses: 512, 1024 or 2048 (D8).
        order: "fifo" or "total"; by default fifo (D11).
        scope: "host", or "cluster": a bus that endpoints of all nodes can be on (D2).
        proof: A certificate of the cluster: who the master is, instead of its user.

    Entering raises:
        NoAgent: Nobody answers at the door. ECONNREFUSED.
        AddressInUse: The bus has a master. EADDRINUSE.
        InvalidArgument: Such a bus cannot be. EINVAL.
    """
    options = {"width": width, "order": order, "scope": scope}
    return Bus(BusAddress(check_path(path), name), authorize, node, options, proof)


class Bus(Mailbox):
    """The master's side of a bus: see `create`."""

    def __init__(
        self,
        address: BusAddress,
        authorize: Callable[[Question], Verdict | Awaitable[Verdict]] | None,
        node: str | os.PathLike[str] | None,
        options: Mapping[str, Any],
        proof: Proof | None,
    ) -> None:
        """Begin without a bus; made by `create`."""
        super().__init__(address.path, node, proof)
        self.address = address
        self._authorize = authorize
        self._options = options
        self._spans_nodes = options["scope"] == "cluster"
        self._authority = Authority(address, spans_nodes=self._spans_nodes)
        self._is_retrying = False
        self._stirred = asyncio.Event()
        self._settled: list[asyncio.Future[None]] = []
        self._closing = asyncio.Event()

    # what the application wants to know and commands

    def members(self) -> tuple[MemberView, ...]:
        """Return the members: unique address, names, and who it is as attested by the agent."""
        return self._authority.members()

    async def revoke(self, name: To) -> None:
        """Take a name from its owner; who waits for it gets it (D4).

        Raises:
            NoSuchEndpoint: Nobody owns it. EHOSTUNREACH.
            InvalidArgument: It is the master's own. EINVAL.
        """
        await self._settle()
        self._authority.revoke_name(self._within(name))
        await self._settle()

    async def revoke_match(self, member: To, about: About) -> None:
        """Take the right to hear something from a member, by any of its addresses.

        Raises:
            NoSuchEndpoint: There is no such member, or it has no such right. EHOSTUNREACH.
        """
        await self._settle()
        self._authority.revoke_match(self._within(member), what_of(about))
        await self._settle()

    async def revoke_send(self, member: To, about: About) -> None:
        """Take the right to send something from a member; as `revoke_match`."""
        await self._settle()
        self._authority.revoke_send(self._within(member), what_of(about))
        await self._settle()

    async def evict(self, member: To) -> None:
        """Take everything from a member; whether it may join again is for the policy.

        Raises:
            NoSuchEndpoint: There is no such member. EHOSTUNREACH.
        """
        await self._settle()
        self._authority.evict(self._within(member))
        await self._settle()

    def messages(self) -> Stream[Message]:
        """Return what comes to the master and is no request of the library's own.

        That is what was sent to names that nobody owns (`destination` says which; D7), so that the
        master can start who should own one, and what was sent to the master in a protocol of the
        application. From the first call on this must be read, or the whole bus waits; a message
        that `expects_reply` needs `reply` or `refuse`.

        While nobody reads it, and `serve` does not take them, requests are refused (EHOSTUNREACH
        for a name that nobody owns), and senders of other messages are told by a notice of UNREAD.
        """
        return super().messages()

    async def wait_closed(self) -> None:
        """Wait until the bus is left, or lost for good.

        Raises:
            AddressInUse: Another process became its master while the agent was away. EADDRINUSE.
        """
        await self._closing.wait()
        if self._why_closed is not None:
            raise self._why_closed

    # life

    async def _enter(self) -> None:
        await self._bind()
        if self._authorize is None and self._spans_nodes:
            self._authorize = cluster_decides
        elif self._authorize is None:
            about = await asyncio.to_thread(self._socket.status)
            # As the agent names this user: in a container that is another number than os.getuid().
            self._authorize = same_user(about["client"]["uid"], about["node"])
        await self._adopt()
        self._pace()
        self._spawn(self._carry_out())

    async def _bind(self) -> None:
        await asyncio.to_thread(self._socket.bind, self.address, **self._options)
        self._addresses = [self.address]

    async def _restore(self) -> None:
        if self._socket.path is None:
            try:
                await self._bind()
            except AddressInUse as error:
                self._end(error)
                return
        await self._adopt()

    async def _adopt(self) -> None:
        """Learn which members the bus has already."""
        node = ""
        if self._spans_nodes:
            node = (await asyncio.to_thread(self._socket.status))["node"]
        rows = await asyncio.to_thread(self._socket.listing, "addresses", self.path)
        owned: dict[int, list[bytes]] = defaultdict(list)
        for row in rows:
            # Of other nodes it has names, and not the unique address of who owns them.
            if not self._spans_nodes or row["node"] == node:
                owned[row["endpoint"]].append(_parse_within(row["address"]))
        others = {
            number: tuple(addresses)
            for number, addresses in owned.items()
            if self.address.address not in addresses
        }
        self._authority.adopt(others, node)
        self._stirred.set()

    def _end(self, reason: BusError | None) -> None:
        super()._end(reason)
        self._closing.set()
        self._release_settled()

    # what arrives

    def _receive_unicast(self, message: Message) -> None:
        if message.destination is None or message.destination in self._addresses:
            try:
                request = requests.decode(message.body)
            except RemoteProtocolError as error:
                refusal: BusError = InvalidArgument(f"the master does not understand: {error}")
            else:
                message.close()
                self._authority.receive_request(
                    message.source.address, message.identity, request, message.serial
                )
                self._stirred.set()
                return
        else:
            refusal = NoSuchEndpoint(f"nobody owns {message.destination}")
        if self._service is None and not self._inbox.holds:
            self._give_back(message, refusal)
        else:
            super()._receive_unicast(message)

    def _receive_notice(self, notice: Notice) -> None:
        self._authority.receive_notice(notice)
        if notice.event is Event.CLUSTER_BACK:
            self._authority.tell_again()
        self._stirred.set()
        if notice.event is not Event.FREED:
            super()._receive_notice(notice)

    # effects

    async def _carry_out(self) -> None:
        """Carry out what the authority decides, for as long as there is a bus."""
        while not self._is_closed:
            self._stirred.clear()
            while effects := self._authority.take_effects():
                for effect in effects:
                    match effect:
                        case Ask():
                            self._spawn(self._put_question(effect))
                        case Probe():
                            await self._probe(effect)
                        case Tell():
                            await self._tell(effect)
            if self._authority.is_owing and not self._is_retrying:
                self._is_retrying = True
                self._spawn(self._tell_again())
            self._release_settled()
            await self._stirred.wait()

    async def _tell(self, tell: Tell) -> None:
        ancdata = [control.encode(item) for item in tell.items]
        body = b""
        if tell.answer is not None:
            body = tell.answer.encode()
            ancdata.append(control.encode(ReplyTo(tell.reply_to)))
        address = self.address_of(tell.to)
        try:
            chosen = await asyncio.to_thread(self._socket.command, [body], ancdata, address)
        except (NotConnected, NoAgent, OutcomeUnknown) as error:
            # Whoever asked is told by the loss of its own agent, which is the same.
            self._lose_agent(error)
            self._authority.receive_failure(tell, error)
        except BusError as error:
            _log.info("%s was not told what was decided: %s", address, error)
            self._authority.receive_failure(tell, error)
        else:
            self._authority.receive_done(tell, [one.address for one in chosen])

    async def _probe(self, probe: Probe) -> None:
        items = [control.encode(probe.item)]
        address = self.address_of(probe.name)
        try:
            await asyncio.to_thread(self._socket.command, [b""], items, address)
        except (NotConnected, NoAgent, OutcomeUnknown) as error:
            self._lose_agent(error)
        except BusError as error:
            self._authority.receive_probed(probe, error)

    async def _tell_again(self) -> None:
        """Try again, after pauses that grow, until nothing is owed to anybody."""
        pause = _FIRST_RETRY_S
        while self._authority.is_owing:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_RETRY_S)
            if self._is_closed:
                break
            self._authority.tell_again()
            await self._settle()
        self._is_retrying = False

    async def _put_question(self, ask: Ask) -> None:
        try:
            async with asyncio.timeout(VERDICT_S):
                assert self._authorize is not None, "a bus has a policy"
                verdict = self._authorize(ask.question)
                if inspect.isawaitable(verdict):
                    verdict = await verdict
        except TimeoutError:
            verdict = f"authorize failed: no verdict within {VERDICT_S:g} s"
        except Exception as error:
            _log.exception("authorize failed on %s", ask.question)
            verdict = f"authorize failed: {type(error).__name__}: {error}"
        if verdict is not True:
            _log.info("refused: %s: %s", ask.question, verdict)
        self._authority.receive_verdict(ask.ticket, verdict)
        self._stirred.set()

    async def _settle(self) -> None:
        """Wait until all that was decided up to now is carried out."""
        self._outbox.check_open()
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settled.append(settled)
        self._stirred.set()
        await settled

    def _release_settled(self) -> None:
        settled, self._settled = self._settled, []
        for one in settled:
            if not one.done():
                one.set_result(None)


def _parse_within(text: str) -> bytes:
    """Return the address that stands in a row of a list."""
    return BusAddress.parse(f"bus:{text}").address
