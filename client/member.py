"""A member of a bus, in an event loop.

    async with afbus.join("/demo", name="demo.clock") as clock:
        async with clock.subscribe("clock zone=utc") as ticks:
            await clock.publish("clock.second zone=utc", b"tick")
            print((await anext(ticks)).body)

Each subscription has a feed. A message goes to every feed whose terms it has; the member cannot
judge terms against raw bits, so a message stated in one way goes to all feeds stated in the other.
A gap goes to all feeds. A feed with `Overflow.GAP` that is full makes gaps of its own, one with
`Overflow.CONFLATE` replaces what is older; both hold up nobody. One with another overflow stops the
reading of the ring, so that the switch does what the subscription asked for, and thereby holds up
the other feeds of this member.

When the agent has forgotten the member, because it began anew (AGENT_RESTART) or has cut the member
off (EVICTED), it joins again, as a new member with another unique address. It asks for its names,
subscriptions and rights, and tells by REVOKED notices what it did not get back; feeds read a gap
with the reason, of which nobody knows the count. If it is not let in, all that it does ends in that
error.

Invariants:

1. A subscription is in force when entering it returns, and what follows reaches its feed (R15).
2. Names and rights are asked for again exactly if the application still wants them.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..proto import control
from ..proto import request as requests
from ..proto.address import BusAddress
from ..proto.control import Item, MessageTerms, RevokeAddr, RevokeSend
from ..proto.errors import (
    AddressInUse,
    BusError,
    DeadlineExceeded,
    Denied,
    InvalidArgument,
    MasterLost,
    NoAgent,
    NodeLost,
    NoSuchEndpoint,
    NotConnected,
    NotJoined,
    OutcomeUnknown,
    RemoteProtocolError,
)
from ..proto.limits import REASON_BYTES
from ..proto.match import Overflow, What
from ..proto.names import NO_FLAGS, NameFlags, NameOutcome, ReleaseOutcome
from ..proto.notice import Event, Gap, GapReason, Notice
from ..proto.request import (
    Answer,
    Join,
    MonitorRequest,
    NoticesRequest,
    Own,
    Publish,
    Release,
    Request,
    Subscribe,
    Unsubscribe,
)
from ..proto.terms import Terms, matches, matches_bits
from ..proto.text import clip
from .backlog import Backlog
from .mailbox import DEADLINE_S, Mailbox
from .stream import BACKLOG_LIMIT, Stream, within
from .subscription import Subscription
from .words import show_request, show_what

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

    from .message import Message
    from .proof import Proof
    from .sending import AncillaryItem

_log = logging.getLogger(__name__)

#: Pauses before what could not be had is asked for again, in seconds: first, and longest.
_FIRST_RETRY_S: Final = 0.25
_LONGEST_RETRY_S: Final = 5.0
#: Failures that are about now, and not about what was asked for (D16).
_PASSING: Final = (
    NotConnected,
    NoAgent,
    OutcomeUnknown,
    DeadlineExceeded,
    MasterLost,
    NodeLost,
)

#: What a multicast is about: text `"topic key=value"`, terms, or raw bits.
About: TypeAlias = str | Terms | bytes


def what_of(about: About) -> What:
    """Return the terms or the bits; InvalidArgument if it is neither."""
    if isinstance(about, str):
        return _parse(about)
    if not isinstance(about, Terms | bytes):
        raise InvalidArgument(f"{about!r} is neither text nor terms nor bits")
    return about


# Who publishes says the same again and again.
_parse = lru_cache(1024)(Terms.parse)


@lru_cache(1024)
def _terms_item(terms: Terms) -> AncillaryItem:
    return control.encode(MessageTerms(terms))


def join(  # noqa: PLR0913 (keywords, each with a default)
    path: str | bytes,
    *,
    name: str | bytes | None = None,
    flags: NameFlags = NameFlags.DO_NOT_QUEUE,
    node: str | os.PathLike[str] | None = None,
    deadline: float = DEADLINE_S,
    claims: bytes = b"",
    proof: Proof | None = None,
) -> Member:
    """Return a member of the bus, to be entered with `async with`.

    Args:
        path: The bus.
        name: A name to own; by default entering fails where another one has it.
        flags: As `Member.own`.
        node: The agent's door; by default as for `afbus.socket`.
        deadline: Seconds that entering may take.
        claims: What the bus's master wants as a proof, beside the credentials.
        proof: A certificate: who the member is, instead of its user (`Socket.prove`).

    Entering raises:
        NoAgent: Nobody answers at the door. ECONNREFUSED.
        NoBus: There is no such bus. ENOENT.
        MasterLost: It has no master now, or the cluster's master is away, and nobody of this user
            has joined from here before. EHOSTDOWN.
        NodeLost: The node of its master cannot be reached. EHOSTDOWN.
        Denied: The master refuses. EPERM.
        AddressInUse: Another one owns the name. EADDRINUSE.
        DeadlineExceeded: The master did not answer in time. ETIMEDOUT.
    """
    return Member(path, name, flags, node, deadline, claims, proof)


@dataclass(frozen=True, slots=True)
class _Owed:
    """What a member had, and asks for again; `give_up` forgets it."""

    request: Request
    subject: tuple[bytes, ...]
    give_up: Callable[[], object]


class Member(Mailbox):
    """A member of a bus: see `join`."""

    def __init__(  # noqa: PLR0913 (as `join`)
        self,
        path: str | bytes,
        name: str | bytes | None,
        flags: NameFlags,
        node: str | os.PathLike[str] | None,
        deadline: float,
        claims: bytes,
        proof: Proof | None,
    ) -> None:
        """Begin outside; made by `join`."""
        super().__init__(path, node, proof)
        self._first_name = name
        self._first_flags = flags
        self._deadline = deadline
        self._claims = claims
        self._address: BusAddress | None = None
        self._master = BusAddress.kernel(self.path)
        self._multicast = BusAddress.multicast(self.path)
        # What is asked for again when the agent has forgotten this member.
        self._wanted: dict[bytes, NameFlags] = {}
        self._sends: set[What] = set()
        self._feeds: list[Subscription] = []
        self._hears_notices = False
        self._monitors = False
        # What it had and has asked for in vain since, as nobody could give it.
        self._owed: list[_Owed] = []
        self._is_regaining = False
        self._is_stirred = asyncio.Event()
        # What is asked for or given up just now, and so is no news when the agent tells it.
        self._giving_up: set[str | bytes] = set()
        # Why the agent was lost, and what was told of it.
        self._why_lost = ""
        self._is_gap_told = False
        self._is_eviction_told = False
        self._copies = Backlog(BACKLOG_LIMIT)
        self._copy_stream: Stream[Message | Gap] = Stream(self._copies.take)

    @property
    def address(self) -> BusAddress:
        """The unique address.

        Raises:
            NotJoined: It has none (any more). EHOSTUNREACH.
        """
        if self._address is None:
            raise NotJoined("not a member of the bus")
        return self._address

    @property
    def master(self) -> BusAddress:
        """The address of the bus's master, or of the one that it had last."""
        self._outbox.check_open()
        return self._master

    # names

    async def own(self, name: str | bytes, flags: NameFlags = NO_FLAGS) -> NameOutcome:
        """Ask for a name; the table in `proto/names.py` says what comes out (D4).

        With IN_QUEUE the name may come later: it is in `addresses` then.

        Raises:
            Denied: The master refuses. EPERM.
            BusError: As `send`, to the master.
        """
        address = self._within(name)
        answer = await self._ask(Own(address, flags))
        outcome = NameOutcome(_number(answer, "outcome"))
        if outcome is NameOutcome.EXISTS:
            self._wanted.pop(address, None)
        else:
            self._wanted[address] = flags
        return outcome

    async def release(self, name: str | bytes) -> ReleaseOutcome:
        """Give up a name, or the wait for it; errors as `own`."""
        address = self._within(name)
        self._wanted.pop(address, None)
        with self._giving_up_of(address):
            answer = await self._ask(Release(address))
        return ReleaseOutcome(_number(answer, "outcome"))

    # multicasts

    def subscribe(
        self,
        about: About,
        *,
        overflow: Overflow = Overflow.GAP,
        deadline_ms: int = 0,
        limit: int = BACKLOG_LIMIT,
    ) -> Subscription:
        """Return a subscription, to be entered with `async with`.

        Args:
            about: What it requires: text or terms, or raw bits.
            overflow: What happens when there is no room for a message (D12). Where several
                subscriptions of one member want the same message, the strongest counts for all:
                block, then disconnect, conflate, gap. So one that conflates is best a member's own.
                With `Overflow.DISCONNECT` the whole member is cut off, and comes back as a new one:
                its feeds read a gap of `GapReason.EVICTED`, its notices tell `Event.EVICTED`.
            deadline_ms: With `Overflow.BLOCK`: how long senders wait, 1 to 60000.
            limit: Messages that wait to be read. With `Overflow.CONFLATE` only the newest one of
                each sender about each thing waits, and this counts senders and things.

        Raises:
            InvalidArgument: The text is not terms, or the numbers make no sense. EINVAL.
        """
        if not isinstance(overflow, Overflow):
            raise InvalidArgument(f"{overflow!r} is no Overflow")
        if limit < 1:
            raise InvalidArgument(f"a subscription of {limit} messages would hear nothing")
        return Subscription(self, what_of(about), overflow, deadline_ms, limit)

    async def publish(
        self,
        about: About,
        body: Buffer | Sequence[Buffer],
        *,
        deadline: float | None = DEADLINE_S,
    ) -> None:
        """Send to whom it may concern.

        The first time, the master is asked for the right to send exactly this. Who sends with many
        different terms asks once for what they have in common: `allow`.

        Raises:
            Denied: The master refuses, or has taken the right back. EPERM.
            BusError: As `send`.
        """
        what = what_of(about)
        if not self._may_send(what):
            await self.allow(what)
        if isinstance(what, Terms):
            address, ancdata = self._multicast, [_terms_item(what)]
        else:
            address, ancdata = BusAddress.multicast(self.path, what), []
        try:
            await self._outbox.send(address, body, ancdata, (), deadline)
        except Denied:
            # Some right was revoked; the master is asked again the next time.
            self._sends.clear()
            raise

    async def allow(self, about: About) -> None:
        """Ask for the right to send everything that has at least these terms or bits (D9).

        Raises:
            Denied: The master refuses. EPERM.
        """
        what = what_of(about)
        await self._ask(Publish(what))
        self._sends.add(what)

    def _may_send(self, what: What) -> bool:
        if isinstance(what, Terms):
            return any(isinstance(one, Terms) and matches(one, what) for one in self._sends)
        return any(isinstance(one, bytes) and matches_bits(one, what) for one in self._sends)

    # what others do

    def notices(self, *, others: bool = True) -> Stream[Notice]:
        """Return the notices: those about this member, and about others if the master agrees (D15).

        The first `anext`, or `start`, asks the master.

        Raises:
            Denied: From that: the master refuses. EPERM.
        """
        if others and not self._hears_notices:
            self._notice_stream.begin_with(self._ask_for_notices)
        return self._notice_stream

    async def _ask_for_notices(self) -> None:
        await self._ask(NoticesRequest())
        self._hears_notices = True

    def monitor(self) -> Stream[Message | Gap]:
        """Return copies of all messages of the bus (D19); what is not read in time is a gap.

        The first `anext`, or `start`, asks the master.

        Raises:
            Denied: From that: the master refuses. EPERM.
        """
        if not self._monitors:
            self._copy_stream.begin_with(self._ask_for_copies)
        return self._copy_stream

    async def _ask_for_copies(self) -> None:
        await self._ask(MonitorRequest())
        self._monitors = True

    # subscriptions, below

    def take(self, backlog: Backlog) -> Message | Gap | None:
        """Take something out of a feed, and read on if there is room again."""
        item = backlog.take()
        self._pace()
        return item

    async def start(self, feed: Subscription) -> None:
        """Subscribe; what is granted before the answer is read reaches the feed already."""
        self._outbox.check_open()
        request = feed.request
        same = [one.request for one in self._feeds if one.request.what == request.what]
        if same and same[0] != request:
            raise InvalidArgument("subscribed to the same already, with another overflow")
        self._feeds.append(feed)
        try:
            await self._ask(request)
        except BaseException as error:
            self._feeds.remove(feed)
            # Without its answer, the master may have granted it all the same.
            is_refused = isinstance(error, Denied) or self._is_closed
            if not is_refused and not self._has_feed(request.what):
                self._tell_master(Unsubscribe(request.what))
            raise

    async def stop(self, feed: Subscription) -> None:
        """Unsubscribe, if no other feed wants the same."""
        if feed in self._feeds:
            self._feeds.remove(feed)
        feed.stream.end()
        for message in feed.backlog.clear():
            message.close()
        self._pace()
        what = feed.request.what
        if self._is_closed or self._is_lost or self._address is None or self._has_feed(what):
            return
        try:
            with self._giving_up_of(show_what(what)):
                await self._ask(Unsubscribe(what))
        except BusError as error:
            # Nobody is there who could take it back; what still comes is dropped.
            _log.info("still subscribed to %s: %s", show_what(what), error)

    @contextmanager
    def _giving_up_of(self, what: str | bytes) -> Iterator[None]:
        """Let the notice that tells the loss of a match, or of a name, be no news."""
        self._giving_up.add(what)
        try:
            yield
        finally:
            self._giving_up.discard(what)

    def _has_feed(self, what: What) -> bool:
        return any(feed.request.what == what for feed in self._feeds)

    def _receive_multicast(self, message: Message) -> None:
        for feed in self._feeds:
            if feed.wants(message):
                feed.put(message)

    def _receive_gap(self, gap: Gap) -> None:
        for feed in self._feeds:
            feed.put(gap)
        if self._monitors:
            self._copies.put(gap)
            self._copy_stream.stir()

    def _receive_copy(self, message: Message) -> None:
        self._copies.put(message)
        self._copy_stream.stir()
        # A copy has no descriptors of its own to keep.
        message.close()

    def _receive_notice(self, notice: Notice) -> None:
        match notice:
            # It comes behind all that the old agent had delivered.
            case Notice(Event.GAP, detail={"reason": GapReason.AGENT_RESTART}):
                self._tell_gap(GapReason.AGENT_RESTART)
            case Notice(Event.MASTER_BACK, (address, *_)):
                self._master = self.address_of(address)
                self._is_stirred.set()
            case Notice(Event.CLUSTER_BACK | Event.NODE_BACK):
                self._is_stirred.set()
            case Notice(Event.EVICTED):
                self._is_eviction_told = True
            case Notice(Event.REVOKED, detail={"everything": _}):
                # This joins again, and then tells what it does not get back.
                return
            case Notice(Event.REVOKED, subject) if self._is_own(subject):
                # On another node than the master's nothing comes after it by this address.
                super()._receive_notice(notice)
                self._address = None
                self._end(NotJoined("the master has put this member off the bus"))
                return
            case Notice(Event.REVOKED, (name,)) if name in self._giving_up:
                return
            case Notice(Event.REVOKED, detail={"match": what}) if what in self._giving_up:
                return
        super()._receive_notice(notice)

    def _is_own(self, subject: tuple[bytes, ...]) -> bool:
        return self._address is not None and self._address.address in subject

    def _tell_gap(self, reason: GapReason) -> None:
        """Tell all feeds, once, that nobody knows what they have missed."""
        if not self._is_gap_told:
            self._receive_gap(Gap(b"", 0, 0, 0, reason))
            self._is_gap_told = True

    def _lose_agent(self, error: BusError) -> None:
        if self._outbox.ready.is_set():
            self._is_gap_told = False
            self._why_lost = error.message
        super()._lose_agent(error)

    def _backlogs(self) -> list[Backlog]:
        return [*super()._backlogs(), self._copies, *(feed.backlog for feed in self._feeds)]

    def _streams(self) -> list[Stream[Any]]:
        return [*super()._streams(), self._copy_stream, *(feed.stream for feed in self._feeds)]

    # the master

    async def _ask(self, request: Request, *, is_member: bool = True) -> Answer:
        """Ask the master for something.

        Raises:
            Denied: It refuses. EPERM.
            MasterLost: There is none now, or it needs the cluster's master. EHOSTDOWN.
            NodeLost: The node that it is on cannot be reached. EHOSTDOWN.
            DeadlineExceeded: It does not answer in time. ETIMEDOUT.
        """
        body = [requests.encode(request)]
        with self._open_request(DEADLINE_S) as open_request:
            what = f"an answer of the master to {show_request(request)}"
            async with within(DEADLINE_S, what):
                send = partial(self._outbox.send_now, body, open_request.ancdata, self._master)
                await self._outbox.patiently(send, None, self._master, is_ready=is_member)
                try:
                    message = await open_request.wait()
                except NoSuchEndpoint as error:
                    # Its node may know before the table of the cluster tells all.
                    raise MasterLost(f"the master of {self._bus} is gone: no answer") from error
        if message.error is not None:
            raise message.error
        answer = Answer.decode(message.body)
        if not answer.is_ok:
            raise answer.to_error()
        return answer

    def _tell_master(self, request: Request) -> None:
        """Tell the master something without waiting for anything."""
        try:
            self._outbox.send_now([requests.encode(request)], (), self._master)
        except BusError as error:
            _log.warning("the master was not told %s: %s", show_request(request), error)

    # life

    async def _enter(self) -> None:
        async with within(self._deadline, f"joining {self._bus}"):
            await self._join()
            if self._first_name is not None:
                await self._own_at_once(self._first_name, self._first_flags)

    async def _own_at_once(self, name: str | bytes, flags: NameFlags) -> None:
        address = self._within(name)
        answer = await self._ask(Own(address, flags), is_member=False)
        if _number(answer, "outcome") == NameOutcome.EXISTS:
            raise AddressInUse(f"{self.address_of(address)} has an owner already")
        self._wanted[address] = flags

    async def _join(self) -> None:
        master = await asyncio.to_thread(self._socket.attach, self.path)
        if master is None:
            raise MasterLost(f"the bus {self._bus} has no master now")
        self._master = master
        self._pace()
        answer = await self._ask(Join(self._claims), is_member=False)
        # Who is new has read its address beside the answer; who is not is told which one it has.
        address = answer.detail.get("address")
        if type(address) is bytes and address:
            self._address = self.address_of(address)
        elif own := [address for address in self._addresses if address.is_unique]:
            self._address = own[-1]
        else:
            raise RemoteProtocolError("the master's answer to JOIN has no address")
        if self._address not in self._addresses:
            self._addresses = await asyncio.to_thread(self._socket.addresses)
            if self._address not in self._addresses:
                raise NotJoined(
                    f"the master takes {self._address} to be this member's, but it is not"
                )

    async def _restore(self) -> None:
        owned = await asyncio.to_thread(self._socket.addresses)
        if self._address in owned:
            self._addresses = owned
            self._pace()
            await self._regain_owed()
            return
        if self._socket.was_cut_off:
            self._tell_gap(GapReason.EVICTED)
            if not self._is_eviction_told:
                subject = tuple(address.address for address in self._addresses)
                reason = clip(self._why_lost, REASON_BYTES)
                self._receive_notice(Notice(Event.EVICTED, subject, reason))
        else:
            self._tell_gap(GapReason.AGENT_RESTART)
        self._addresses = []
        try:
            await self._join()
        except Denied as error:
            self._end(error)
            return
        self._is_eviction_told = False
        self._owed = [
            *(
                _Owed(Own(name, flags), (name,), partial(self._wanted.pop, name, None))
                for name, flags in self._wanted.items()
            ),
            *(_Owed(Publish(w), (), partial(self._sends.discard, w)) for w in self._sends),
            *(_Owed(feed.request, (), partial(self._drop_feed, feed)) for feed in self._feeds),
        ]
        if self._hears_notices:
            self._owed.append(_Owed(NoticesRequest(), (), lambda: None))
        if self._monitors:
            self._owed.append(_Owed(MonitorRequest(), (), self._copy_stream.end))
        await self._regain_owed()

    async def _regain_owed(self) -> None:
        """Ask again for what is owed; what cannot be had for now, later and in the background."""
        await self._regain_all(is_member=False)
        if self._owed and not self._is_regaining:
            self._is_regaining = True
            self._spawn(self._regain_later())

    async def _regain_all(self, *, is_member: bool) -> None:
        """Ask again for what this member had; what cannot be had for now stays owed."""
        owed, self._owed = self._owed, []
        for place, one in enumerate(owed):
            try:
                if self._is_wanted(one.request):
                    await self._regain(one, is_member=is_member)
            except (MasterLost, NodeLost) as error:
                _log.info("%s: not yet: %s", show_request(one.request), error.message)
                self._owed.append(one)
            except DeadlineExceeded:
                # The others would wait as long.
                self._owed += owed[place:]
                return
            except BaseException:
                self._owed += owed[place:]
                raise

    async def _regain_later(self) -> None:
        """Try again, after pauses that grow, until nothing is owed to this member any more."""
        pause = _FIRST_RETRY_S
        while self._owed:
            self._is_stirred.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._is_stirred.wait()
            pause = min(2 * pause, _LONGEST_RETRY_S)
            if self._is_closed:
                return
            with suppress(NotConnected, NoAgent, OutcomeUnknown):
                await self._regain_all(is_member=True)
        self._is_regaining = False

    def _is_wanted(self, request: Request) -> bool:
        """Whether the application still wants what it had."""
        match request:
            case Own(name):
                return name in self._wanted
            case Publish(what):
                return what in self._sends
            case Subscribe(what):
                return self._has_feed(what)
        return True

    async def _regain(self, owed: _Owed, *, is_member: bool) -> None:
        """Ask again for one thing; tell if it is refused."""
        request, subject = owed.request, owed.subject
        try:
            answer = await self._ask(request, is_member=is_member)
        except _PASSING:
            raise
        except BusError as error:
            owed.give_up()
            what = show_request(request)
            reason = f"not given back after the agent was lost: {what}: {error.message}"
            self._receive_notice(Notice(Event.REVOKED, subject, clip(reason, REASON_BYTES)))
            return
        if isinstance(request, Own) and _number(answer, "outcome") != NameOutcome.PRIMARY_OWNER:
            reason = "another endpoint owned the name when the agent was back"
            self._receive_notice(Notice(Event.REVOKED, subject, reason))

    def _drop_feed(self, feed: Subscription) -> None:
        if feed in self._feeds:
            self._feeds.remove(feed)
        feed.stream.end(Denied("the subscription was not given back after the agent was lost"))

    def _obey(self, item: Item) -> None:
        super()._obey(item)
        match item:
            case RevokeAddr(address) if address == self._address:
                # Evicted, unless this is about to leave anyway.
                self._address = None
                self._end(NotJoined("the master has put this member off the bus"))
            case RevokeSend(what=what):
                self._sends.discard(what)


def _number(answer: Answer, key: str) -> int:
    value = answer.detail.get(key)
    if type(value) is not int:
        raise RemoteProtocolError(f"the master's answer has no {key}")
    return value
