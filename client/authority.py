"""What our bus's master decides: who is let in, who owns a name, who may hear and say what.

Requests go in, effects come out in order. What a request asks for is first a *question* for the
policy of the application (`Ask`), and comes back as its verdict; what is granted leaves as control
items of the answer (`Tell`), which the agent carries out before the asker can read it (D5). The
core knows no socket and no clock; `bus.py` is the shell around it.

    receive_request ── Ask ──> policy ── receive_verdict ──┬── Tell ──> agent ──┬── receive_done
                  └─ giving up, and what is refused ───────┘                    └── receive_failure

Invariants:

1. Every request with a serial is answered exactly once, unless its asker is gone.
2. Requests of one endpoint are judged in the order sent; endpoints do not wait for each other.
3. Unique addresses are chosen by the agent, which gives none twice (D3).
4. A name is taken from its old owner before its new owner is told (D4).
5. Nothing is granted without a verdict that is exactly True; giving something up needs none.
6. Rights are noted when the agent has carried them out, and not before.
7. A name that somebody waited for comes to it also if the agent cannot give it now: it is *owed*,
   and told again. So is what a node that is lost was told.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from ..proto.address import BusAddress, format_within, is_provisional, is_unique
from ..proto.control import (
    Grant,
    GrantFlags,
    Identity,
    Item,
    Match,
    MulticastMatch,
    MulticastSend,
    OwnedAddr,
    RevokeAddr,
    RevokeMatch,
    RevokeSend,
)
from ..proto.errors import (
    BusError,
    DeadlineExceeded,
    Denied,
    InvalidArgument,
    MasterLost,
    NodeLost,
    NoSuchEndpoint,
    NotJoined,
    ShareExceeded,
)
from ..proto.limits import ADDRESSES_PER_ENDPOINT, CONTROL_ITEMS
from ..proto.names import NameChange, NameOutcome, Names
from ..proto.notice import Event, Notice
from ..proto.request import (
    Answer,
    Join,
    Leave,
    MonitorRequest,
    NoticesRequest,
    Own,
    Publish,
    Release,
    Request,
    Subscribe,
    Unsubscribe,
)
from .docket import REQUESTS_PER_ENDPOINT, Docket, Entry
from .effect import Ask, Effect, Probe, Tell
from .question import Question
from .record import NO_GRANTS, MemberView, Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..proto.match import What
    from .question import Verdict

#: An address that nobody can own.
_NOBODY: Final = b"@0"
#: Refusals that are about now, and not about what was asked for (D16).
_PASSING: Final = (MasterLost, NodeLost, DeadlineExceeded)


class Authority:
    """The decisions of one bus.

    Inputs are `receive_*` and the commands `revoke_*`, `evict`, `adopt`; after each of them the
    shell takes the effects and carries them out in their order.
    """

    def __init__(self, address: BusAddress, *, spans_nodes: bool = False) -> None:
        """Begin with a new bus.

        Args:
            address: What the master was bound to.
            spans_nodes: Whether members may be on other nodes, of which no agent here has a list.
        """
        self.address = address
        self._spans_nodes = spans_nodes
        self._records: dict[bytes, Record] = {}
        self._joined_from: dict[bytes, bytes] = {}
        self._names: Names[bytes] = Names()
        # Requests by unique address; by provisional address only those to join.
        self._docket = Docket()
        self._effects: list[Effect] = []
        self._owed: list[Tell] = []
        # So many grants of each name are not carried out yet, owed ones too.
        self._granting: Counter[bytes] = Counter()
        # While the agent chooses an address, its new owner may already ask by it, or be gone.
        self._joining = 0
        self._early: list[tuple[bytes, Identity | None, Request, int]] = []
        self._gone_early: set[bytes] = set()
        # The master owns its name by the same rules; it does not allow replacement.
        self._names.request(address.address, address.address)

    # what is known

    def members(self) -> tuple[MemberView, ...]:
        """Return all members, in the order of their joining."""
        return tuple(
            MemberView(
                self._address(key),
                tuple(self._address(name) for name in self._owned(key)),
                record.identity,
            )
            for key, record in self._records.items()
        )

    def take_effects(self) -> list[Effect]:
        """Return what is to be done, in this order, and forget it."""
        effects, self._effects = self._effects, []
        return effects

    # what comes in

    def receive_request(
        self, source: bytes, identity: Identity | None, request: Request, serial: int
    ) -> None:
        """Take a request of an endpoint.

        Args:
            source: The address it was sent from, stamped by the agent (D6).
            identity: Who sent it, None if the agent did not say.
            request: What it asks for.
            serial: The number of the request; 0 expects no answer.
        """
        asker = self._asker(source)
        record = self._records.get(asker)
        if record is None and not is_provisional(source) and self._joining:
            self._early.append((source, identity, request, serial))
            return
        if record is None and identity is not None and self._spans_nodes and is_unique(source):
            # Only a master of this bus can have let it in: one before us, or before a loss.
            record = self._records[source] = Record(source, None, identity)
        if identity is None:
            error: BusError = Denied("a request without an identity")
        elif record is None and not is_provisional(source):
            error = NotJoined(f"{format_within(source)} is unknown to this master: join again")
        elif record is None and not isinstance(request, Join):
            error = NotJoined("join the bus first")
        elif self._docket.is_full(asker):
            error = ShareExceeded(
                f"{REQUESTS_PER_ENDPOINT} requests wait for a verdict already; await answers first"
            )
        else:
            if record is not None:
                record.identity = identity
            # Answers go to whoever asked, not to a name by which it asked: that may move.
            if self._docket.add(asker, identity, request, serial):
                self._judge(asker)
            return
        self._refuse(asker, serial, error)

    def receive_verdict(self, ticket: int, verdict: Verdict) -> None:
        """Take the policy's verdict on a question; one that came too late changes nothing."""
        entry = self._docket.find(ticket)
        if entry is None:
            return
        if verdict is True:
            self._carry_out(entry.asker, entry)
        else:
            why = verdict if isinstance(verdict, str) and verdict else "the master refuses"
            self._reply(entry, Answer.refused(Denied(why)))

    def receive_notice(self, notice: Notice) -> None:
        """Take a notice of the agent: members that are gone lose everything."""
        if notice.event in (Event.LEFT, Event.KILLED):
            for address in notice.subject:
                # Its names, which stand there too, are others' as soon as it is forgotten.
                if address in self._records:
                    self._forget(address)
                elif self._joining:
                    self._gone_early.add(address)
        elif notice.event is Event.NODE_LOST and "gone" in notice.detail:
            self._forget_node(str(notice.detail.get("node")))
        elif notice.event is Event.FREED:
            for name in notice.subject:
                owner = self._names.get_owner(name)
                if owner is not None and owner != self.address.address:
                    # It may be at our own command, and another's already.
                    item = OwnedAddr(self._address(_NOBODY))
                    self._effects.append(Probe(name, owner, item))

    def _forget_node(self, node: str) -> None:
        """A node is no longer in the cluster, nor is anybody on it."""
        members = [
            key
            for key, record in self._records.items()
            if record.identity is not None and record.identity.node == node
        ]
        for key in members:
            self._forget(key)

    def receive_probed(self, probe: Probe, error: BusError) -> None:
        """Take what came of a `Probe`, which fails in any case."""
        # What is given, or was given to another since, stands behind the probe.
        is_same = self._names.get_owner(probe.name) == probe.owner
        is_news = is_same and not self._granting[probe.name]
        if is_news and isinstance(error, NoSuchEndpoint):
            self._pass_on(self._names.release(probe.name, probe.owner)[1])

    def receive_done(self, tell: Tell, chosen: Sequence[bytes] = ()) -> None:
        """Take the news that the agent has carried out a `Tell`.

        Args:
            tell: What was to be told.
            chosen: The unique address that the agent chose, if the `Tell` lets somebody in.
        """
        self._end_granting(_names_in(tell))
        if tell.lets_in:
            self._let_in(tell, *chosen)
        elif (record := self._records.get(self._asker(tell.to))) is not None:
            for item in tell.items:
                record.note(item)
        self._finish(tell.ticket)
        self._settle_joining(tell)

    def receive_failure(self, tell: Tell, error: BusError) -> None:
        """Take the news that the agent has refused a `Tell`: nothing of it was carried out."""
        asker = self._asker(tell.to)
        entry = self._docket.find(tell.ticket)
        names = _names_in(tell)
        is_passing = entry is None and isinstance(error, _PASSING)
        # A node that was lost over a command may have carried it out: the same again, later, makes
        # both sides know, which a refusal would not. What is taken must be gone in the end.
        is_doubtful = isinstance(error, NodeLost) and _changes_rights(tell)
        if (names and is_passing) or is_doubtful:
            self._owed.append(tell)
            return
        self._end_granting(names)
        for name in names:
            # Names were given away before; rights are noted only when they are done.
            self._pass_on(self._names.release(name, asker)[1])
        if isinstance(error, NoSuchEndpoint):
            self._forget(asker)
        elif entry is None:
            pass
        elif tell.answer is None or tell.answer.is_ok:
            self._reply(entry, Answer.refused(error))
        else:
            self._finish(tell.ticket)
        self._settle_joining(tell)

    @property
    def is_owing(self) -> bool:
        """Whether `tell_again` is to be called after a while."""
        return bool(self._owed)

    def tell_again(self) -> None:
        """Try again to give what could not be given, to whom it still belongs."""
        owed, self._owed = self._owed, []
        for tell in owed:
            names = _names_in(tell)
            is_open = not tell.ticket or self._docket.find(tell.ticket) is not None
            if is_open and all(self._names.get_owner(n) == self._asker(tell.to) for n in names):
                self._effects.append(tell)
            else:
                self._end_granting(names)

    # what the application commands

    def revoke_name(self, name: bytes) -> None:
        """Take a name from its owner; who waits for it gets it (D4).

        Raises:
            NoSuchEndpoint: Nobody owns it. EHOSTUNREACH.
            InvalidArgument: It is the master's own. EINVAL.
        """
        owner = self._names.get_owner(name)
        if owner is None:
            raise NoSuchEndpoint(f"nobody owns {format_within(name)}")
        if owner == self.address.address:
            raise InvalidArgument(f"{format_within(name)} is the master's own")
        self._tell(owner, RevokeAddr(self._address(name)))
        self._pass_on(self._names.release(name, owner)[1])

    def revoke_match(self, member: bytes, what: What) -> None:
        """Take the right to hear something from a member, by any of its addresses.

        Raises:
            NoSuchEndpoint: There is no such member, or it has no such right. EHOSTUNREACH.
        """
        record = self._record(member)
        if what not in record.matches:
            raise NoSuchEndpoint(f"{format_within(member)} has no such match")
        self._tell(record.address, RevokeMatch(self.address.path, what))

    def revoke_send(self, member: bytes, what: What) -> None:
        """Take the right to send something from a member; as `revoke_match`."""
        record = self._record(member)
        if what not in record.sends:
            raise NoSuchEndpoint(f"{format_within(member)} may not send that anyway")
        self._tell(record.address, RevokeSend(self.address.path, what))

    def evict(self, member: bytes) -> None:
        """Take everything from a member; it may ask to join again.

        Raises:
            NoSuchEndpoint: There is no such member. EHOSTUNREACH.
        """
        record = self._record(member)
        self._strip(record, None)

    def adopt(self, owned: Mapping[int, tuple[bytes, ...]], node: str = "") -> None:
        """Begin, or go on, with the members that the bus has: after a master before us, or a loss.

        Members of other nodes stay as they are: those that are not known make themselves known by
        asking for something, and of others it is told when they go.

        Args:
            owned: The addresses of each endpoint of this node but the master's, oldest first.
            node: This node; only with `spans_nodes`.
        """
        present = {}
        for addresses in owned.values():
            unique = next((address for address in addresses if is_unique(address)), None)
            if unique is not None:
                present[unique] = addresses
        for gone in [address for address in self._records if address not in present]:
            identity = self._records[gone].identity
            if not self._spans_nodes or identity is None or identity.node == node:
                self._forget(gone)
        for unique, addresses in present.items():
            if unique not in self._records:
                self._records[unique] = Record(unique, None, None)
            for name in addresses:
                if not is_unique(name):
                    self._names.request(name, unique)

    # how it is decided

    def _judge(self, asker: bytes) -> None:
        """Begin with the first request of an asker."""
        entry = self._docket.first(asker)
        error = self._objection(asker, entry.request)
        if error is not None:
            self._reply(entry, Answer.refused(error))
        elif self._needs_verdict(asker, entry.request):
            question = Question(entry.request, entry.identity, self._address(asker))
            self._effects.append(Ask(entry.ticket, question))
        else:
            self._carry_out(asker, entry)

    def _finish(self, ticket: int) -> None:
        """Go on to the next request, if this one is still known."""
        if (asker := self._docket.finish(ticket)) is not None:
            self._judge(asker)

    def _needs_verdict(self, asker: bytes, request: Request) -> bool:
        match request:
            case Join():
                return self._asker(asker) not in self._records
            case NoticesRequest(on) | MonitorRequest(on):
                return on
            case Own() | Subscribe() | Publish():
                return True
        return False

    def _objection(self, asker: bytes, request: Request) -> BusError | None:
        """Why a request makes no sense, whatever the policy says."""
        if not isinstance(request, Own):
            return None
        name = format_within(request.name)
        if is_unique(request.name) or is_provisional(request.name):
            return InvalidArgument(
                f"{name} is no name: those begin neither with a digit nor with @"
            )
        wanted = self._names.get_names(asker)
        if request.name not in wanted and len(wanted) >= ADDRESSES_PER_ENDPOINT - 1:
            return ShareExceeded(f"{name} is one more than the {len(wanted)} names of an endpoint")
        return None

    def _carry_out(self, asker: bytes, entry: Entry) -> None:
        request, path = entry.request, self.address.path
        if isinstance(request, Join):
            self._join(asker, entry)
            return
        record = self._records[asker]
        match request:
            case Own():
                self._own(asker, entry, request)
            case Release(name):
                self._release(asker, entry, name)
            case Subscribe(what, overflow, deadline_ms):
                # Also what was granted before: the cluster's policy may have taken it (D9).
                match_ = Match(path, what, overflow, deadline_ms)
                self._reply(entry, Answer(), MulticastMatch(match_))
            case Unsubscribe(what):
                # On another node it may be there without our knowing.
                is_there = what in record.matches or self._spans_nodes
                self._reply(entry, Answer(), *[RevokeMatch(path, what)] * is_there)
            case Publish(what):
                self._reply(entry, Answer(), MulticastSend(path, what))
            case NoticesRequest(on):
                self._reply(entry, Answer(), _with(record.grants, GrantFlags.NOTICES, on))
            case MonitorRequest(on):
                self._reply(entry, Answer(), _with(record.grants, GrantFlags.MONITOR, on))
            case Leave():
                self._strip(record, entry)

    def _join(self, asker: bytes, entry: Entry) -> None:
        unique = self._asker(asker)
        if unique in self._records:
            self._reply(entry, Answer(detail={"address": unique}))
        else:
            # The item that the asker reads has the address that the agent chose.
            self._joining += 1
            self._reply(entry, Answer(), OwnedAddr(BusAddress.kernel(self.address.path)))

    def _let_in(self, tell: Tell, unique: bytes) -> None:
        """Know a new member, unless it is gone already."""
        entry = self._docket.find(tell.ticket)
        if unique not in self._gone_early:
            identity = None if entry is None else entry.identity
            self._records[unique] = Record(unique, tell.to, identity)
            self._joined_from[tell.to] = unique

    def _settle_joining(self, tell: Tell) -> None:
        """Go on with what came by an address that nobody here knew yet."""
        if not tell.lets_in:
            return
        self._joining -= 1
        if not self._joining:
            self._gone_early.clear()
        early, self._early = self._early, []
        for request in early:
            self.receive_request(*request)

    def _own(self, asker: bytes, entry: Entry, request: Own) -> None:
        outcome, changes = self._names.request(request.name, asker, request.flags)
        for change in changes:
            if change.old is not None:
                self._tell(change.old, RevokeAddr(self._address(change.name)))
        names = [change.name for change in changes]
        if outcome is NameOutcome.ALREADY_OWNER:
            # Unless the cluster's policy has taken it meanwhile.
            names.append(request.name)
        items = [OwnedAddr(self._address(name)) for name in names]
        self._reply(entry, Answer(detail={"outcome": int(outcome)}), *items)

    def _release(self, asker: bytes, entry: Entry, name: bytes) -> None:
        outcome, changes = self._names.release(name, asker)
        items = [RevokeAddr(self._address(change.name)) for change in changes]
        is_name = not (is_unique(name) or is_provisional(name))
        if self._spans_nodes and is_name and not items:
            # It may have come to it without our knowing, such as from a master before us.
            items = [RevokeAddr(self._address(name))]
        self._reply(entry, Answer(detail={"outcome": int(outcome)}), *items)
        self._pass_on(changes)

    def _strip(self, record: Record, leave: Entry | None) -> None:
        """Take everything from a member, its unique address last; answer it if it is leaving."""
        key, path = record.address, self.address.path
        for entry in self._docket.drop(key):
            if entry is not leave:
                error = NotJoined("you are no member any more")
                self._refuse(entry.asker, entry.serial, error)
        items: list[Item] = [RevokeMatch(path, what) for what in record.matches]
        items += [RevokeSend(path, what) for what in record.sends]
        items.append(Grant(NO_GRANTS))
        items += [RevokeAddr(self._address(address)) for address in (*self._owned(key), key)]
        while len(items) > CONTROL_ITEMS:
            self._tell(key, *items[:CONTROL_ITEMS])
            del items[:CONTROL_ITEMS]
        serial = 0 if leave is None else leave.serial
        self._effects.append(Tell(key, tuple(items), Answer() if serial else None, serial))
        self._forget(key)

    def _forget(self, address: bytes) -> None:
        """Forget whoever has this address, and pass on the names that it had."""
        asker = self._asker(address)
        self._docket.drop(asker)
        record = self._records.pop(asker, None)
        if record is not None:
            if record.provisional is not None:
                self._docket.drop(record.provisional)
                self._joined_from.pop(record.provisional, None)
            self._pass_on(self._names.drop_owner(asker))

    def _pass_on(self, changes: list[NameChange[bytes]]) -> None:
        """Tell those who waited for a name that it is theirs now."""
        for change in changes:
            if change.new is not None:
                self._tell(change.new, OwnedAddr(self._address(change.name)))

    # small words

    def _tell(self, to: bytes, *items: Item) -> None:
        self._emit(Tell(to, items))

    def _emit(self, tell: Tell) -> None:
        self._granting.update(_names_in(tell))
        self._effects.append(tell)

    def _end_granting(self, names: Iterable[bytes]) -> None:
        for name in names:
            self._granting[name] -= 1
            if not self._granting[name]:
                del self._granting[name]

    def _reply(self, entry: Entry, answer: Answer, *items: Item) -> None:
        """Answer the request that is being worked on; it is finished when that is done."""
        serial = entry.serial
        answer_if_wanted = answer if serial else None
        items = items or (self._grants(entry.asker),)
        self._emit(Tell(entry.asker, items, answer_if_wanted, serial, entry.ticket))

    def _refuse(self, asker: bytes, serial: int, error: BusError) -> None:
        """Refuse a request that is not worked on."""
        if serial:
            answer = Answer.refused(error)
            self._effects.append(Tell(asker, (self._grants(asker),), answer, serial))

    def _grants(self, asker: bytes) -> Grant:
        """Return the grants that it has: a command that changes nothing."""
        record = self._records.get(self._asker(asker))
        return Grant(NO_GRANTS if record is None else record.grants)

    def _owned(self, member: bytes) -> list[bytes]:
        names = self._names
        return [name for name in names.get_names(member) if names.get_owner(name) == member]

    def _asker(self, source: bytes) -> bytes:
        """The unique address of whoever has this address; itself for those who have not joined."""
        if source in self._records:
            return source
        return self._joined_from.get(source) or self._names.get_owner(source) or source

    def _record(self, member: bytes) -> Record:
        record = self._records.get(self._asker(member))
        if record is None:
            raise NoSuchEndpoint(f"{format_within(member)} is no member")
        return record

    def _address(self, address: bytes) -> BusAddress:
        return BusAddress(self.address.path, address)


def _with(flags: GrantFlags, flag: GrantFlags, on: bool) -> Grant:
    return Grant(flags | flag if on else flags & ~flag)


def _names_in(tell: Tell) -> list[bytes]:
    """Return the names that this gives to a member."""
    if tell.lets_in:
        return []
    return [one.address.address for one in tell.items if isinstance(one, OwnedAddr)]


def _changes_rights(tell: Tell) -> bool:
    """Whether a member has something afterwards that it had not, or the other way round."""
    kinds = OwnedAddr | RevokeAddr | RevokeMatch | RevokeSend
    return not tell.lets_in and any(isinstance(item, kinds) for item in tell.items)
