"""The control link of a node to the master of its cluster, without IO.

    away --receive_link--> greeting --WELCOME--> here --receive_end--> away
    away for `lost_s` --> lost --WELCOME--> here

While the master is *here*, calls go to it at once. While it is *away* they wait for it; when it is
*lost* they are refused (EHOSTDOWN), until it is back. What this node's endpoints have is kept in
`Claims` and stated after each WELCOME, with the calls that have no answer yet; so a call whose
answer was lost is simply made again, and what nobody wants any more is not stated, and gone.

Without the master goes what it has decided before, and nobody else needs to hear of (D16): an
endpoint enters by its user, what its principal was allowed is allowed, and it may hear what this
node hears already, as all nodes know of that. All this is stated when the master is back, and asked
again; what it refuses then is `Taken` or `Refuted`.

The shell keeps a link up (`link/dialer.py`) and tells what happens on it (`receive_*`), with the
time; the owner calls; both take what is to be done from `take_effects`, in its order. `get_timer`
says when `handle_timer` is wanted next.

Invariants:

1. Each ticket is answered once, within its deadline: by the master's result, DeadlineExceeded,
   MasterLost, or NoSuchEndpoint if its endpoint exits.
2. What the master gives to a call that was answered otherwise meanwhile is given back.
3. A version of the table is acknowledged after its changes were handed out.
4. What a master sends that it may not ends the link, and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..proto import cluster
from ..proto.cluster import (
    CLUSTER_VERSION,
    ClusterHello,
    ClusterWelcome,
    Part,
    TableDelta,
    Withdrawn,
)
from ..proto.codec import Fields
from ..proto.errors import (
    CloseCode,
    DeadlineExceeded,
    InvalidArgument,
    MasterLost,
    NoSuchEndpoint,
    RemoteProtocolError,
)
from ..proto.frames import Closed, Result
from ..proto.limits import STALE_S
from ..proto.mirror import Mirror
from ..proto.names import NameFlags, NameOutcome
from ..proto.operation import ClusterOp, check_arguments
from ..proto.record import FactRecord, MatchRecord, OwnerRecord
from . import answer
from .answer import Verdict
from .call import Call, Calls
from .claim import UNDO, Claim, Claims
from .lease import Leases
from .uplink_effect import (
    Changed,
    Hang,
    Refuted,
    Renewed,
    Say,
    Stated,
    Taken,
    Turned,
    UplinkEffect,
)
from .verdict import Question, Verdicts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ..proto.match import What
    from ..proto.mirror import Change

_GIVING_UP: Final = frozenset(UNDO.values())


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take, in seconds.

    Attributes:
        welcome_s: From a link to the WELCOME on it.
        lost_s: Without the master before it is lost.
        call_s: A call: longer than the master waits for a node that does not acknowledge, and
            then for one that has lost its link.
        retry_s: Before what the node did not get for itself is asked for again: a block, or the
            next certificate.
        stale_s: For so long without the master its answers are believed; 0: only while it is
            here.
    """

    welcome_s: float = 5.0
    lost_s: float = 2.0
    call_s: float = 15.0
    retry_s: float = 60.0
    stale_s: float = STALE_S


class Uplink:
    """The node's side of the control link."""

    def __init__(  # noqa: PLR0913 (what a member of a cluster is)
        self,
        name: str,
        places: tuple[str, ...],
        make_request: Callable[[], bytes],
        now: float,
        spare: int | None = None,
        blocks: Iterable[int] = (),
        patience: Patience | None = None,
    ) -> None:
        """Begin without a link.

        Args:
            name: The node's, as its certificate has it.
            places: Where peers reach it.
            make_request: Returns a certificate request, DER, for the next certificate.
            now: The time, monotonic seconds.
            spare: The block that the effect `Spare` said last.
            blocks: Those of which endpoints of a former life still have addresses.
            patience: By default as above.
        """
        self._name = name
        self._places = places
        self._make_request = make_request
        self._patience = patience or Patience()
        self._effects: list[UplinkEffect] = []
        self._calls = Calls(self._effects)
        self._claims = Claims()
        self._verdicts = Verdicts()
        # What was allowed while the master was not here, until it has said so again.
        self._doubts: dict[Question, None] = {}
        # What all nodes know that this one wants, by bus.
        self._settled: set[tuple[int, What]] = set()
        self._leases = Leases(spare, blocks, self._effects)
        self._is_linked = False
        self._is_here = False
        self._is_lost = False
        # Whether all was stated on this link.
        self._is_stated = False
        self._away_since = now
        self._welcome_until: float | None = None
        self._renew_at: float | None = None
        self._lease_at: float | None = None
        self._farewell = ""
        # Whether this node is out, as far as it knows.
        self._is_denied = False
        #: The table of the cluster; for looking things up.
        self.mirror = Mirror()
        #: The cluster and the number of the node in it, from the first WELCOME on.
        self.cluster = ""
        self.number = 0

    # --- what the shell calls ---

    def take_effects(self) -> list[UplinkEffect]:
        """Return what is to be done, in this order, and forget it."""
        taken = self._effects[:]
        # Others append to the same list.
        self._effects.clear()
        return taken

    def receive_link(self, now: float) -> None:
        """A link to the master is up."""
        self._is_linked, self._farewell = True, ""
        self._welcome_until = now + self._patience.welcome_s
        known = self.mirror.epoch, self.mirror.version
        self._say(ClusterHello(self._name, *known, self._places))

    def receive_end(self, now: float) -> None:
        """The link has ended; harmless when repeated, and after `Hang`."""
        if self._is_linked:
            self._leave(now)

    def receive_refusal(self, why: str) -> None:
        """The master does not let this node in, or is not the one that it was: trust no answer."""
        if not self._is_linked:
            self._farewell, self._is_denied = why, True

    def receive_frame(self, data: bytes, now: float) -> None:
        """A frame of the master has come."""
        if not self._is_linked:
            return
        try:
            self._receive(cluster.decode(data), now)
        except RemoteProtocolError as error:
            self._effects.append(Hang(f"the master broke a rule: {error}"))
            self._leave(now)

    def get_timer(self) -> float | None:
        """Return when `handle_timer` is to be called, None for never."""
        times = [self._welcome_until, self._calls.get_deadline()]
        if self._is_here:
            times += [self.mirror.get_timer(), self._renew_at, self._lease_at]
        elif not self._is_lost:
            times.append(self._away_since + self._patience.lost_s)
        return min((time for time in times if time is not None), default=None)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        if _is_due(self._welcome_until, now):
            self._effects.append(Hang("the master does not welcome this node", is_violation=False))
            self._leave(now)
        if self._is_here:
            self._handle_timer_here(now)
        elif not self._is_lost and self._away_since + self._patience.lost_s <= now:
            self._lose(now)
        for call in self._calls:
            if not _is_due(call.deadline, now):
                break
            text = f"the cluster's master has not answered {call.op.name}"
            self._calls.refuse(call, DeadlineExceeded(text))

    def _handle_timer_here(self, now: float) -> None:
        if (reply := self.mirror.handle_timer(now)) is not None:
            self._say(reply)
        if _is_due(self._renew_at, now):
            self._renew_at = now + self._patience.retry_s
            self._send(self._calls.make(ClusterOp.RENEW, {"csr": self._make_request()}))
        if _is_due(self._lease_at, now):
            self._lease(now)

    def refuse_spare(self, spare: int | None, now: float) -> None:
        """What `Spare` says cannot be written down: the block is given up, and asked for later."""
        block = self._leases.give_up(spare)
        if self._is_here:
            self._lease_at = now + self._patience.retry_s
            if block is not None:
                self._send(self._calls.make(ClusterOp.RETURN, {"block": block}))

    def set_renewal(self, when: float | None) -> None:
        """Renew the certificate at this time, monotonic: at half of its life; None for never."""
        self._renew_at = when

    # --- what is known ---

    @property
    def is_here(self) -> bool:
        """Whether the master answers."""
        return self._is_here

    def has(self, claim: Claim) -> bool:
        """Tell whether an endpoint has something by the master's word, as far as is known here."""
        return claim in self._claims

    def describe(self, now: float) -> dict[str, Any]:
        """Return what people want to know of it, JSON-able (D16)."""
        return {
            "cluster": self.cluster or None,
            "number": self.number or None,
            "master": "here" if self._is_here else "lost" if self._is_lost else "away",
            "away_s": None if self._is_here else round(now - self._away_since, 3),
            "farewell": self._farewell or None,
            "epoch": self.mirror.epoch,
            "table_version": self.mirror.version,
            "claims": len(self._claims),
            "calls": len(self._calls),
        }

    @property
    def block(self) -> int:
        """The block that addresses are chosen from; MasterLost if there is none yet."""
        return self._leases.block.number

    def choose_address(self) -> bytes:
        """Return a unique address that nobody in the cluster ever had; MasterLost as `block`."""
        return self._leases.block.take()

    def find_verdict(self, question: Question, now: float) -> Verdict | None:
        """Return an answer of the master that still holds, None if it must be asked.

        Who wants to read what is meant for others is noted each time, so that is always asked.
        """
        verdict = None if question.action == "monitor" else self._recall(question, now)
        if verdict is not None and verdict.is_allowed and not self._is_here:
            self._doubts[question] = None
        return verdict

    def _recall(self, question: Question, now: float) -> Verdict | None:
        """Return what the master has said, unless that may be over.

        It is, when the master is away for too long, or went with the word that this node is out.
        """
        who = self._principal(question.endpoint)
        if who is None or self._is_denied or self._is_stale(now):
            return None
        return self._verdicts.get(who, question)

    def _is_stale(self, now: float) -> bool:
        """Tell whether the master is away for so long that nothing it has said is believed."""
        return not self._is_here and now - self._away_since >= self._patience.stale_s

    def _principal(self, endpoint: int) -> str | None:
        """Return who an endpoint is to the master, None if it has not entered."""
        more = self._claims.get_more(Claim(endpoint, ClusterOp.ENTER))
        if not more:
            return None
        proven: str | None = more.get("principal")
        return proven or f"uid/{more['uid']}@{self._name}"

    # --- calls of the owner: each returns a ticket, which `Answered` names ---

    def enter(
        self,
        endpoint: int,
        uid: int,
        now: float,
        *,
        chain: list[bytes] | None = None,
        signature: bytes | None = None,
    ) -> int:
        """Let the master know an endpoint: by its user, or by a certificate and a signature."""
        proof = {"uid": uid, "chain": chain, "signature": signature}
        return self._ask_for(Claim(endpoint, ClusterOp.ENTER), now, **proof)

    def exit(self, endpoint: int, now: float) -> int:
        """An endpoint is gone, with all that it had."""
        for call in self._calls:
            if call.args["endpoint"] == endpoint:
                self._calls.refuse(call, NoSuchEndpoint(f"endpoint {endpoint} is gone"))
        self._forget_doubts(endpoint)
        return self._give_up(Claim(endpoint, ClusterOp.ENTER), now)

    def bind(  # noqa: PLR0913 (what a bus is)
        self,
        endpoint: int,
        path: bytes,
        address: bytes,
        now: float,
        *,
        width: int | None = None,
        order: str | None = None,
    ) -> int:
        """Make an endpoint the master of a bus of the cluster."""
        claim = Claim(endpoint, ClusterOp.BIND, path)
        return self._ask_for(claim, now, address=address, width=width, order=order)

    def unbind(self, endpoint: int, path: bytes, now: float) -> int:
        """Be the master of a bus no longer."""
        return self._give_up(Claim(endpoint, ClusterOp.BIND, path), now)

    def own(self, endpoint: int, path: bytes, name: bytes, flags: NameFlags, now: float) -> int:
        """Ask for a name; who has it in the end says the table, and who has lost it `Taken`."""
        claim = Claim(endpoint, ClusterOp.OWN, path, name)
        return self._ask_for(claim, now, flags=int(flags))

    def release(self, endpoint: int, path: bytes, name: bytes, now: float) -> int:
        """Give up a name, or the wait for it."""
        return self._give_up(Claim(endpoint, ClusterOp.OWN, path, name), now)

    def subscribe(self, endpoint: int, path: bytes, what: What, now: float) -> int:
        """Want something; the answer comes when every live node knows of it."""
        return self._ask_for(Claim(endpoint, ClusterOp.SUBSCRIBE, path, what=what), now)

    def unsubscribe(self, endpoint: int, path: bytes, what: What, now: float) -> int:
        """Want it no longer."""
        return self._give_up(Claim(endpoint, ClusterOp.SUBSCRIBE, path, what=what), now)

    def adopt(self, claim: Claim, **more: object) -> None:
        """Have what an endpoint of a former life had; `more` as the call that gave it.

        It is stated with all else, so nobody else gets it in between; what is not given again is
        `Taken`.
        """
        self._claims.put(claim, more)
        if self._is_here:
            self._send(self._calls.make(claim.op, self._claims.get_args(claim), claim))

    def challenge(self, endpoint: int, now: float) -> int:
        """Ask for what an endpoint signs to prove its certificate."""
        return self._call(ClusterOp.CHALLENGE, {"endpoint": endpoint}, None, now)

    def ask(self, question: Question, now: float) -> int:
        """Ask whether an endpoint may do something; the answer is remembered (`find_verdict`)."""
        return self._call(ClusterOp.ASK, question.args, question, now)

    def _ask_for(self, claim: Claim, now: float, **more: object) -> int:
        return self._call(claim.op, {**claim.args, **more}, claim, now)

    def _give_up(self, claim: Claim, now: float) -> int:
        """Give something up: done at once for us, and for the master when it hears of it."""
        self._claims.drop(claim)
        for call in self._calls.find_asking(claim):
            call.is_void = True
        return self._call(UNDO[claim.op], claim.args, claim, now)

    def _call(
        self,
        op: ClusterOp,
        args: Mapping[str, Any],
        subject: Claim | Question | None,
        now: float,
    ) -> int:
        """Make a call for the owner; InvalidArgument if the master would end the link for it."""
        try:
            check_arguments(Fields("call", []), op, args)
        except RemoteProtocolError as error:
            raise InvalidArgument(error.message) from error
        call = self._calls.make(op, args, subject, now + self._patience.call_s)
        if self._is_here:
            self._send(call)
        elif op in _GIVING_UP:
            # It is not stated when the master is back, and gone then.
            self._calls.answer(call, Result(call.serial))
        elif self._is_lost:
            self._settle_alone(call, now)
        return call.serial

    # --- without the master ---

    def _settle_alone(self, call: Call, now: float) -> None:
        """Answer a call by what the master has said before, or refuse it."""
        claim = call.subject
        if not isinstance(claim, Claim) or not self._may_stand(call, claim, now):
            self._calls.refuse(call, self._lost_error())
            return
        if not call.is_void:
            self._note(call, claim)
        value = {"principal": self._principal(claim.endpoint), "until": None}
        is_entry = claim.op is ClusterOp.ENTER
        self._calls.answer(call, Result(call.serial, value=value if is_entry else None))

    def _may_stand(self, call: Call, claim: Claim, now: float) -> bool:
        """Tell whether a claim needs nobody's word for now; it is stated when the master is back.

        A table of this life is needed: without one nobody here knows what the master has said.
        """
        if not self.number or self._is_denied or self._is_stale(now) or call.op is not claim.op:
            return False
        if claim.op is ClusterOp.ENTER:
            return call.args["chain"] is None
        bus = self.mirror.get_bus(claim.path)
        if claim.op is not ClusterOp.SUBSCRIBE or bus is None:
            return False
        question = Question(claim.endpoint, "receive", claim.path, what=claim.what)
        is_known = (bus.number, claim.what) in self._settled
        return is_known and self._recall(question, now) is not None

    def _forget_doubts(self, endpoint: int) -> None:
        for question in [one for one in self._doubts if one.endpoint == endpoint]:
            del self._doubts[question]

    # --- the link ---

    def _say(self, frame: cluster.ClusterFrame) -> None:
        self._effects.append(Say(cluster.encode(frame)))

    def _send(self, call: Call) -> None:
        self._calls.queue([call])
        self._pump()

    def _pump(self) -> None:
        self._calls.pump(self._state)

    def _state(self, claim: Claim) -> Call | None:
        """Return the call that states a claim, None if it was given up meanwhile."""
        if claim not in self._claims:
            return None
        return self._calls.make(claim.op, self._claims.get_args(claim), claim)

    def _leave(self, now: float) -> None:
        """There is no link any more: what was under way on it is nowhere."""
        if self._is_here:
            self._away_since = now
        self._is_linked = self._is_here = self._is_stated = False
        self._welcome_until = self._lease_at = None
        self._calls.clear()
        for call in self._calls:
            if call.op in _GIVING_UP:
                self._calls.answer(call, Result(call.serial))

    def _lose(self, now: float) -> None:
        """The master is lost: whoever waits for it is told."""
        self._is_lost = True
        self._effects.append(Turned(False, self._lost_error().message))
        for call in self._calls:
            self._settle_alone(call, now)

    def _lost_error(self) -> MasterLost:
        why = f" ({self._farewell})" if self._farewell else ""
        return MasterLost(f"the cluster's master is away{why}")

    def _lease(self, now: float) -> None:
        """Ask for the block that is missing, one at a time; again later if that does not help."""
        self._lease_at = None
        if not self._leases.is_complete:
            self._lease_at = now + self._patience.retry_s
            self._send(self._calls.make(ClusterOp.LEASE, {"block": None}))

    # --- what the master says ---

    def _receive(self, frame: cluster.ClusterFrame, now: float) -> None:
        match frame:
            case ClusterWelcome() if not self._is_here:
                self._receive_welcome(frame, now)
            case Closed(code, text):
                self._farewell = f"{code.name}: {text}"
                self._is_denied = code is CloseCode.DENIED
            case Part() | TableDelta() if self._is_here:
                self._receive_table(frame, now)
            case Result() if self._is_here:
                self._receive_result(frame, now)
            case Withdrawn() if self._is_here and frame.op in UNDO:
                self._take_away(Claim.of(frame), frame.reason)
            case _:
                raise RemoteProtocolError(f"{type(frame).__name__} that may not come now")

    def _receive_welcome(self, welcome: ClusterWelcome, now: float) -> None:
        if welcome.version != CLUSTER_VERSION:
            raise RemoteProtocolError(f"version {welcome.version} of the language of clusters")
        if self.cluster not in ("", welcome.cluster):
            raise RemoteProtocolError(f"cluster {welcome.cluster}, and not {self.cluster}")
        self.cluster, self.number = welcome.cluster, welcome.number
        self.mirror.receive_welcome(welcome.epoch, welcome.is_same)
        if self._is_lost:
            self._effects.append(Turned(True, "the cluster's master is back"))
        self._is_here, self._is_lost, self._welcome_until = True, False, None
        self._is_denied = False
        calls, make = self._calls, self._calls.make
        calls.queue([make(ClusterOp.RESTATE, {})])
        calls.queue(make(ClusterOp.LEASE, {"block": block}) for block in self._leases)
        calls.queue(self._claims)
        # Before the end of the statement: what was given already must not be taken in between.
        calls.queue(calls)
        calls.queue([make(ClusterOp.ASK, one.args, one) for one in self._doubts])
        calls.queue([make(ClusterOp.RESTATED, {})])
        self._lease(now)
        self._pump()

    def _receive_table(self, frame: Part | TableDelta, now: float) -> None:
        reply = self.mirror.receive_table(frame, now)
        if changes := tuple(self.mirror.take_changes()):
            for change in changes:
                self._follow(change)
            self._effects.append(Changed(changes))
        if reply is not None:
            self._say(reply)

    def _follow(self, change: Change) -> None:
        match change.old, change.new:
            case (_, FactRecord()) | (FactRecord(), _):
                self._verdicts.clear()
            case MatchRecord(where, node, what), None if node == self.number:
                self._settled.discard((where, what))
            case OwnerRecord(number, name, node, endpoint), _ if node == self.number:
                bus = self.mirror.find_bus(number)
                if bus is not None:
                    self._check_name(Claim(endpoint, ClusterOp.OWN, bus.path, name))

    def _take_away(self, claim: Claim, reason: str) -> None:
        self._claims.drop(claim)
        if claim.op is ClusterOp.ENTER:
            self._forget_doubts(claim.endpoint)
        self._effects.append(Taken(claim, reason))

    def _receive_result(self, result: Result, now: float) -> None:
        call = self._calls.land(result.serial)
        if call is None:
            raise RemoteProtocolError(f"result {result.serial} of no call")
        match call.op, call.subject:
            case ClusterOp.RESTATED, _:
                self._is_stated = True
                self._effects.append(Stated())
                for claim in [one for one in self._claims if one.op is ClusterOp.OWN]:
                    self._check_name(claim)
            case ClusterOp.LEASE, _:
                self._receive_lease(call.args["block"], result, now)
            case ClusterOp.RENEW, _ if result.is_ok:
                made = answer.take_certified(result.value)
                self._renew_at = None
                self._effects.append(Renewed(made.chain, made.until_utc))
            case _, Claim() as claim if call.op is claim.op:
                self._receive_claim(call, claim, result)
            case _, Question() as question if result.is_ok:
                self._receive_verdict(question, answer.take_verdict(result.value))
        self._calls.answer(call, result)
        if isinstance(call.subject, Claim) and call.op is ClusterOp.OWN:
            self._check_name(call.subject)
        self._pump()

    def _check_name(self, claim: Claim) -> None:
        """Take a name from who does not wait for it, once it is not the owner any more (D4).

        It may have been replaced before it heard that it had the name. The table tells; but only
        when it is as new as the results are, which is so from the end of the statement on.
        """
        is_kept = not self._claims.get_more(claim).get("flags", 0) & NameFlags.DO_NOT_QUEUE
        if is_kept or not self._is_stated or self._calls.find_asking(claim):
            return
        bus = self.mirror.get_bus(claim.path)
        owner = None if bus is None else self.mirror.get_owner(bus.number, claim.name)
        if owner is None or (owner.node, owner.endpoint) != (self.number, claim.endpoint):
            self._take_away(claim, "another has taken it")
            # Should it have come back to us meanwhile, nobody knows here.
            self._send(self._calls.make(ClusterOp.RELEASE, claim.args, claim))

    def _receive_lease(self, block: int | None, result: Result, now: float) -> None:
        if block is None and result.is_ok:
            self._leases.add(answer.take_block(result.value))
            self._lease(now)
        elif block is not None and not result.is_ok:
            self._leases.lose(block)
            self._lease(now)

    def _receive_verdict(self, question: Question, verdict: Verdict) -> None:
        who = self._principal(question.endpoint)
        if who is not None:
            self._verdicts.put(who, question, verdict)
        if question in self._doubts:
            del self._doubts[question]
            if not verdict.is_allowed:
                self._effects.append(Refuted(question, verdict.reason))

    def _note(self, call: Call, claim: Claim) -> None:
        """An endpoint has something from now on."""
        self._claims.put(claim, {k: v for k, v in call.args.items() if k not in claim.args})

    def _note_settled(self, claim: Claim) -> None:
        """All nodes know what an endpoint of this one wants, and that it may."""
        bus, who = self.mirror.get_bus(claim.path), self._principal(claim.endpoint)
        if bus is not None and who is not None and claim in self._claims:
            self._settled.add((bus.number, claim.what))
            question = Question(claim.endpoint, "receive", claim.path, what=claim.what)
            self._verdicts.put(who, question, Verdict(True, "", ""))

    def _receive_claim(self, call: Call, claim: Claim, result: Result) -> None:
        """Note what was given, or what was not given again."""
        is_given = result.is_ok
        if is_given and claim.op is ClusterOp.OWN:
            is_given = answer.take_outcome(result.value) is not NameOutcome.EXISTS
        if call.is_void or not self._calls.is_awaited(call):
            # A statement, or what nobody waits for any more.
            is_wanted = claim in self._claims
            if is_wanted and not is_given and (result.is_ok or call.deadline is None):
                # Who asks for a name without waiting for it does not wait any more, either.
                self._take_away(claim, "another has it" if result.is_ok else str(result.value))
            elif is_given and not is_wanted and not self._calls.find_asking(claim):
                self._send(self._calls.make(UNDO[claim.op], claim.args, claim))
        elif is_given and claim.op is ClusterOp.ENTER and call.args["chain"] is not None:
            # A signature is good for once; after that the master remembers.
            principal = answer.take_principal(result.value)
            self._claims.put(claim, {"uid": call.args["uid"], "principal": principal})
        elif is_given:
            self._note(call, claim)
        elif result.is_ok:
            # A name that it had is another's now, and it does not wait for it.
            self._claims.drop(claim)
        if is_given and claim.op is ClusterOp.SUBSCRIBE:
            self._note_settled(claim)


def _is_due(when: float | None, now: float) -> bool:
    return when is not None and when <= now
