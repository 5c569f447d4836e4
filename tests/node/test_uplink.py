"""The control link to the master on a fake clock, with the master's part played by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from afbus.node.answer import Verdict
from afbus.node.claim import Claim
from afbus.node.uplink import Patience, Uplink
from afbus.node.uplink_effect import (
    Answered,
    BlockLost,
    Changed,
    Hang,
    Refuted,
    Renewed,
    Say,
    Spare,
    Stated,
    Taken,
    Turned,
    UplinkEffect,
)
from afbus.node.verdict import Question, Verdicts
from afbus.proto import cluster
from afbus.proto.cluster import (
    Ack,
    ClusterCall,
    ClusterFrame,
    ClusterHello,
    ClusterWelcome,
    Part,
    TableDelta,
    Withdrawn,
)
from afbus.proto.errors import (
    BusError,
    CloseCode,
    DeadlineExceeded,
    Denied,
    InvalidArgument,
    MasterLost,
    NoSuchEndpoint,
    Stale,
)
from afbus.proto.frames import Closed, Result
from afbus.proto.limits import ADDRESS_BYTES
from afbus.proto.names import NO_FLAGS, NameFlags, NameOutcome
from afbus.proto.operation import ClusterOp
from afbus.proto.record import (
    BusRecord,
    FactRecord,
    MatchRecord,
    OwnerRecord,
    Record,
    encode_record,
)
from afbus.proto.table import Delta
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = b"/cluster"
CPU = Terms.of("sensors.cpu")
CERTIFIED = {"cluster": "c", "chain": [b"leaf", b"issuing"], "root": b"root", "until": 99}


class Desk:
    """An uplink, a clock, and what the master would see and say."""

    def __init__(self, **options: Any) -> None:
        self.now = 1000.0
        self.requests = 0
        self.uplink = Uplink("a", ("a:9",), self._make_request, self.now, **options)
        #: Effects but for frames, and frames.
        self.told: list[UplinkEffect] = []
        self.said: list[ClusterFrame] = []
        self.settle()

    def _make_request(self) -> bytes:
        self.requests += 1
        return b"request %d" % self.requests

    def settle(self) -> None:
        """Take effects."""
        for effect in self.uplink.take_effects():
            if isinstance(effect, Say):
                self.said.append(cluster.decode(effect.data))
            else:
                self.told.append(effect)

    def take(self) -> list[UplinkEffect]:
        """Return what was told, and forget it."""
        taken, self.told = self.told, []
        return taken

    def take_calls(self) -> list[ClusterCall]:
        """Return the calls that were said, and forget all that was."""
        taken, self.said = self.said, []
        return [frame for frame in taken if isinstance(frame, ClusterCall)]

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and do what is due in between."""
        until = self.now + seconds
        while (due := self.uplink.get_timer()) is not None and due <= until:
            self.now = max(self.now, due)
            self.uplink.handle_timer(self.now)
            self.settle()
        self.now = until

    def hear(self, frame: ClusterFrame) -> None:
        """The master says something."""
        self.uplink.receive_frame(cluster.encode(frame), self.now)
        self.settle()

    def link(self) -> None:
        """A link is up."""
        self.uplink.receive_link(self.now)
        self.settle()

    def welcome(self, number: int = 7) -> list[ClusterCall]:
        """A link is up, and the master has welcomed the node; return what it calls then."""
        self.link()
        self.said.clear()
        self.hear(ClusterWelcome("c", 5, number))
        return self.take_calls()

    def begin(self) -> None:
        """The master is here, and has done all that is asked for at first."""
        calls = self.welcome()
        block = 40
        while calls:
            for call in calls:
                block += 1
                self.answer(call, {"block": block} if call.op is ClusterOp.LEASE else None)
            calls = self.take_calls()
        self.take()

    def end(self) -> None:
        """The link has ended."""
        self.uplink.receive_end(self.now)
        self.settle()

    def answer(self, call: ClusterCall, value: object = None) -> None:
        """The master has carried out a call."""
        self.hear(Result(call.serial, value=value))

    def refuse(self, call: ClusterCall, error: BusError) -> None:
        """The master refuses a call."""
        self.hear(Result.refused(call.serial, error))

    def ask(self, command: Callable[..., int], *args: Any, **options: Any) -> int:
        """Command something; return the ticket."""
        ticket = command(*args, self.now, **options)
        self.settle()
        return ticket

    def outcome(self, ticket: int) -> Result:
        """The answer to a ticket, which is all that was told."""
        (told,) = self.take()
        assert isinstance(told, Answered)
        assert told.result.serial == ticket
        return told.result

    def have(self, command: Callable[..., int], *args: Any, value: object = None) -> None:
        """Command something that the master gives."""
        ticket = self.ask(command, *args)
        (call,) = self.take_calls()
        self.answer(call, value)
        assert self.outcome(ticket).is_ok

    def put(self, version: int, *records: Record) -> None:
        """The table has these records from this version on."""
        puts = tuple(sorted(encode_record(one) for one in records))
        self.hear(TableDelta(5, Delta(version - 1, version, puts)))


def names(calls: list[ClusterCall]) -> list[str]:
    """The operations of calls."""
    return [call.op.name for call in calls]


@pytest.fixture
def desk() -> Desk:
    """A node that has never seen its master."""
    return Desk()


@pytest.fixture
def here() -> Desk:
    """A node whose master is here."""
    made = Desk()
    made.begin()
    return made


# --- the link ---


def test_node_greets_and_states(desk: Desk) -> None:
    """First it says who it is, and after WELCOME what it has: nothing yet."""
    desk.link()
    assert desk.said == [ClusterHello("a", 0, 0, ("a:9",))]
    desk.said.clear()
    desk.hear(ClusterWelcome("c", 5, 7))
    calls = desk.take_calls()
    assert names(calls) == ["RESTATE", "RESTATED", "LEASE"]
    assert (desk.uplink.cluster, desk.uplink.number, desk.uplink.is_here) == ("c", 7, True)
    assert desk.take() == []


def test_master_that_does_not_welcome_is_left(desk: Desk) -> None:
    """A link on which nothing is said ends; another one is as good as any."""
    desk.link()
    desk.pass_time(Patience().welcome_s)
    assert Hang("the master does not welcome this node", is_violation=False) in desk.take()
    desk.end()
    desk.welcome()
    assert desk.uplink.is_here


def test_d16_lost_master_is_told_once_and_refuses(desk: Desk) -> None:
    """After a moment without the master calls are refused; when it is back, that is told."""
    ticket = desk.ask(desk.uplink.enter, 1, 1000)
    desk.pass_time(Patience().lost_s)
    lost = desk.take()
    assert isinstance(lost[0], Turned)
    assert not lost[0].is_here
    assert isinstance(lost[1], Answered)
    assert lost[1].result.serial == ticket
    assert isinstance(lost[1].result.to_error(), MasterLost)
    ticket = desk.ask(desk.uplink.enter, 1, 1000)
    assert isinstance(desk.outcome(ticket).to_error(), MasterLost)
    assert desk.uplink.describe(desk.now)["master"] == "lost"
    assert names(desk.welcome()) == ["RESTATE", "RESTATED", "LEASE"]
    assert desk.take() == [Turned(True, "the cluster's master is back")]
    assert desk.uplink.describe(desk.now)["master"] == "here"


def test_d16_short_absence_is_not_told(here: Desk) -> None:
    """A link that breaks and is mended soon is nobody's business; calls wait for it."""
    here.end()
    ticket = here.ask(here.uplink.enter, 1, 1000)
    here.pass_time(Patience().lost_s / 2)
    calls = here.welcome()
    assert names(calls) == ["RESTATE", "LEASE", "LEASE", "ENTER", "RESTATED"]
    assert here.take() == []
    here.answer(calls[3], {"principal": "uid/1000@a", "until": None})
    assert here.outcome(ticket).is_ok


def test_farewell_is_kept_for_people(here: Desk) -> None:
    """Why the master has ended the link stands in the state and in errors."""
    here.hear(Closed(CloseCode.DENIED, "revoked"))
    here.end()
    here.pass_time(Patience().lost_s)
    assert here.uplink.describe(here.now)["farewell"] == "DENIED: revoked"
    ticket = here.ask(here.uplink.enter, 1, 1000)
    here.told = [one for one in here.told if isinstance(one, Answered)]
    assert "DENIED: revoked" in here.outcome(ticket).to_error().message


@pytest.mark.parametrize(
    "frame",
    [
        Result(999),
        ClusterWelcome("c", 5, 7),
        ClusterHello("x"),
        Ack(5, 1),
        Withdrawn(1, ClusterOp.LEASE),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_master_that_breaks_a_rule_is_left(here: Desk, frame: ClusterFrame) -> None:
    """What may not come ends the link, and nothing else changes."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    here.hear(frame)
    (told,) = here.take()
    assert isinstance(told, Hang)
    assert told.is_violation
    assert not here.uplink.is_here
    assert "ENTER" in names(here.welcome())


@pytest.mark.parametrize("frame", [Result(1), Part(5, 1, 0, 1), Withdrawn(1, ClusterOp.OWN)])
def test_nothing_comes_before_welcome(desk: Desk, frame: ClusterFrame) -> None:
    """The first that a master says is WELCOME, of the cluster that the node knows."""
    desk.link()
    desk.hear(frame)
    assert isinstance(desk.take()[-1], Hang)
    desk.welcome()
    desk.end()
    desk.link()
    desk.hear(ClusterWelcome("another", 5, 7))
    assert isinstance(desk.take()[-1], Hang)


def test_garbage_ends_the_link(here: Desk) -> None:
    """Bytes that are no frame too; what comes behind them is not read."""
    here.uplink.receive_frame(b"\xc1", here.now)
    here.uplink.receive_frame(b"\xc1", here.now)
    here.settle()
    assert len(here.take()) == 1


def test_result_of_another_shape_ends_the_link(desk: Desk) -> None:
    """A result that is no result of its call is a broken rule."""
    calls = desk.welcome()
    desk.answer(calls[-1], {"block": "one"})
    assert isinstance(desk.take()[-1], Hang)


# --- claims ---


def have_everything(desk: Desk) -> None:
    """Let endpoint 1 have one of each kind."""
    uplink = desk.uplink
    bus = {"bus": 3, "width": 512, "order": "fifo", "key": bytes(16), "generation": 1}
    desk.have(uplink.enter, 1, 1000, value={"principal": "uid/1000@a", "until": None})
    desk.have(uplink.subscribe, 1, PATH, CPU)
    desk.have(uplink.own, 1, PATH, b"name", NO_FLAGS, value={"outcome": 1})
    desk.have(uplink.bind, 1, PATH, b"master", value=bus)


def test_everything_is_stated_again(here: Desk) -> None:
    """After a new link all is said anew, what others stand on first, with the same arguments."""
    have_everything(here)
    here.end()
    calls = here.welcome()
    stated = ["LEASE", "LEASE", "ENTER", "BIND", "OWN", "SUBSCRIBE"]
    assert names(calls) == ["RESTATE", *stated, "RESTATED"]
    assert calls[3].args == {"endpoint": 1, "uid": 1000, "chain": None, "signature": None}
    bound = {"endpoint": 1, "path": PATH, "address": b"master", "width": None, "order": None}
    assert calls[4].args == bound
    assert calls[5].args == {"endpoint": 1, "path": PATH, "name": b"name", "flags": 0}
    assert calls[6].args == {"endpoint": 1, "path": PATH, "terms": CPU.pack(), "bits": None}


def test_what_is_given_up_is_not_stated(here: Desk) -> None:
    """Each thing can be given up, with the endpoint all that it has."""
    have_everything(here)
    here.have(here.uplink.release, 1, PATH, b"name", value={"outcome": 1})
    here.have(here.uplink.unsubscribe, 1, PATH, CPU)
    here.have(here.uplink.unbind, 1, PATH)
    here.end()
    assert names(here.welcome())[3:] == ["ENTER", "RESTATED"]
    here.have(here.uplink.subscribe, 1, PATH, CPU)
    here.have(here.uplink.exit, 1)
    here.end()
    assert names(here.welcome())[3:] == ["RESTATED"]


@pytest.mark.parametrize("when", ["away", "lost", "on its way"])
def test_giving_up_needs_no_master(here: Desk, when: str) -> None:
    """It is done at once; the master learns it from what is not stated."""
    have_everything(here)
    if when != "on its way":
        here.end()
    if when == "lost":
        here.pass_time(Patience().lost_s)
    here.take()
    ticket = here.ask(here.uplink.release, 1, PATH, b"name")
    if when == "on its way":
        assert here.take() == []
        here.end()
    assert here.outcome(ticket).is_ok
    assert "OWN" not in names(here.welcome())


def test_lost_answer_is_asked_for_again(here: Desk) -> None:
    """A call whose answer was lost is made again, before the end of the statement."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    ticket = here.ask(here.uplink.own, 1, PATH, b"name", NO_FLAGS)
    assert names(here.take_calls()) == ["OWN"]
    here.end()
    calls = here.welcome()
    assert names(calls) == ["RESTATE", "LEASE", "LEASE", "ENTER", "OWN", "RESTATED"]
    here.answer(calls[4], {"outcome": 4})
    assert here.outcome(ticket).value == {"outcome": 4}


def test_what_comes_too_late_is_given_back(here: Desk) -> None:
    """A call that was answered by its deadline gives nothing that nobody knows of."""
    ticket = here.ask(here.uplink.enter, 1, 1000)
    (call,) = here.take_calls()
    here.pass_time(Patience().call_s)
    assert isinstance(here.outcome(ticket).to_error(), DeadlineExceeded)
    here.answer(call, {"principal": "uid/1000@a"})
    assert names(here.take_calls()) == ["EXIT"]
    assert here.take() == []


def test_what_comes_too_late_is_kept_if_it_is_wanted_again(here: Desk) -> None:
    """Not if the same was asked for meanwhile: then it is simply there."""
    here.ask(here.uplink.enter, 1, 1000)
    (call,) = here.take_calls()
    here.pass_time(Patience().call_s)
    here.take()
    ticket = here.ask(here.uplink.enter, 1, 1000)
    here.answer(call, {"principal": "uid/1000@a"})
    (again,) = here.take_calls()
    here.answer(again, {"principal": "uid/1000@a"})
    assert here.outcome(ticket).is_ok


def test_calls_end_with_their_endpoint(here: Desk) -> None:
    """Whoever waits for an endpoint that exits is told so."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    ticket = here.ask(here.uplink.own, 1, PATH, b"name", NO_FLAGS)
    here.ask(here.uplink.exit, 1)
    assert isinstance(here.outcome(ticket).to_error(), NoSuchEndpoint)
    own, exit_ = here.take_calls()
    here.answer(own, {"outcome": 1})
    here.answer(exit_)
    here.end()
    assert "OWN" not in names(here.welcome())


def test_refusal_leaves_what_was(here: Desk) -> None:
    """A refused call is answered with the error, and nothing is stated later."""
    ticket = here.ask(here.uplink.subscribe, 1, PATH, CPU)
    (call,) = here.take_calls()
    here.refuse(call, Denied("no rule allows it"))
    assert isinstance(here.outcome(ticket).to_error(), Denied)
    here.end()
    assert "SUBSCRIBE" not in names(here.welcome())


def test_what_is_not_given_again_is_taken(here: Desk) -> None:
    """A statement that is refused takes the thing from its endpoint, and tells that."""
    have_everything(here)
    here.end()
    calls = {call.op: call for call in here.welcome()}
    here.take()
    here.refuse(calls[ClusterOp.SUBSCRIBE], Denied("no rule allows it any more"))
    here.answer(calls[ClusterOp.OWN], {"outcome": int(NameOutcome.EXISTS)})
    assert here.take() == [
        Taken(Claim(1, ClusterOp.SUBSCRIBE, PATH, what=CPU), "no rule allows it any more"),
        Taken(Claim(1, ClusterOp.OWN, PATH, b"name"), "another has it"),
    ]
    here.refuse(calls[ClusterOp.ENTER], Denied("who is that"))
    assert here.take() == [Taken(Claim(1, ClusterOp.ENTER), "who is that")]
    here.end()
    assert names(here.welcome())[3:] == ["RESTATED"]


def test_withdrawn_is_told_and_not_stated(here: Desk) -> None:
    """What the master takes is gone, with an endpoint all that it had."""
    have_everything(here)
    here.hear(Withdrawn(1, ClusterOp.OWN, PATH, b"name", reason="policy"))
    assert here.take() == [Taken(Claim(1, ClusterOp.OWN, PATH, b"name"), "policy")]
    here.hear(Withdrawn(1, ClusterOp.ENTER, reason="revoked"))
    assert here.take() == [Taken(Claim(1, ClusterOp.ENTER), "revoked")]
    here.end()
    assert names(here.welcome())[3:] == ["RESTATED"]


def have_names(desk: Desk) -> None:
    """Let endpoint 1 own `a`, for which it would not wait, and `b`, for which it would."""
    desk.have(desk.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    desk.hear(Part(5, 1, 0, 1))
    owners = [OwnerRecord(3, name, 7, 1) for name in (b"a", b"b")]
    desk.put(2, BusRecord(PATH, 3, 7, b"m", 512, "fifo", bytes(16), 1), *owners)
    desk.take()
    for name, flags in ((b"a", NameFlags.DO_NOT_QUEUE), (b"b", NO_FLAGS)):
        desk.take_calls()
        desk.have(desk.uplink.own, 1, PATH, name, flags, value={"outcome": 1})


@pytest.mark.parametrize("others", [(), (b"a", b"b")])
def test_d4_name_that_was_replaced_is_not_stated(here: Desk, others: tuple[bytes, ...]) -> None:
    """Who does not queue has lost a name for good, whoever has it now; who queues waits for it."""
    have_names(here)
    kept = [encode_record(OwnerRecord(3, name, 8, 1)) for name in others]
    gone = [] if others else [encode_record(OwnerRecord(3, name, 7, 1))[0] for name in (b"a", b"b")]
    here.hear(TableDelta(5, Delta(2, 3, tuple(kept), tuple(gone))))
    taken = [effect for effect in here.take() if not isinstance(effect, Changed)]
    assert taken == [Taken(Claim(1, ClusterOp.OWN, PATH, b"a"), "another has taken it")]
    assert names(here.take_calls()) == ["RELEASE"]
    here.end()
    stated = [call.args["name"] for call in here.welcome() if call.op is ClusterOp.OWN]
    assert stated == [b"b"]


def test_d4_name_that_was_freed_meanwhile_is_stated(here: Desk) -> None:
    """What the table says while the node still states what it has is not the last word."""
    have_names(here)
    here.end()
    here.take()
    calls = here.welcome()
    gone = tuple(encode_record(OwnerRecord(3, name, 7, 1))[0] for name in (b"a", b"b"))
    here.hear(TableDelta(5, Delta(2, 3, (), gone)))
    assert [effect for effect in here.take() if not isinstance(effect, Changed)] == []
    for call in calls:
        if call.op is ClusterOp.OWN:
            here.answer(call, {"outcome": 1})
    here.put(4, OwnerRecord(3, b"a", 7, 1))
    here.answer(calls[-1])
    assert calls[-1].op is ClusterOp.RESTATED
    assert here.take()[-1] == Stated()
    assert here.take_calls() == []


def test_d4_name_that_was_replaced_before_the_answer(here: Desk) -> None:
    """Who owned a name only until another replaced it, in one version, hears of both."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    here.hear(Part(5, 1, 0, 1))
    bus = BusRecord(PATH, 3, 7, b"m", 512, "fifo", bytes(16), 1)
    here.put(2, bus, OwnerRecord(3, b"n", 7, 2))
    here.take()
    ticket = here.ask(here.uplink.own, 1, PATH, b"n", NameFlags.DO_NOT_QUEUE)
    (call,) = here.take_calls()
    here.answer(call, {"outcome": int(NameOutcome.PRIMARY_OWNER)})
    answered, taken = here.take()
    assert isinstance(answered, Answered)
    assert answered.result.serial == ticket
    assert taken == Taken(Claim(1, ClusterOp.OWN, PATH, b"n"), "another has taken it")


def test_d4_name_is_judged_by_the_last_request(here: Desk) -> None:
    """Who has asked again meanwhile, and waits now, keeps the claim."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    here.hear(Part(5, 1, 0, 1))
    bus = BusRecord(PATH, 3, 7, b"m", 512, "fifo", bytes(16), 1)
    here.put(2, bus, OwnerRecord(3, b"n", 7, 2))
    here.take_calls()
    here.ask(here.uplink.own, 1, PATH, b"n", NameFlags.DO_NOT_QUEUE)
    here.ask(here.uplink.own, 1, PATH, b"n", NO_FLAGS)
    for call in here.take_calls():
        here.answer(call, {"outcome": int(NameOutcome.ALREADY_OWNER)})
    assert here.take_calls() == []
    here.end()
    assert "OWN" in names(here.welcome())


def test_what_is_given_up_before_it_came_is_given_back(here: Desk) -> None:
    """A name that was released while it was asked for is nobody's, whatever is lost on the way."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    own = here.ask(here.uplink.own, 1, PATH, b"n", NO_FLAGS)
    here.ask(here.uplink.release, 1, PATH, b"n")
    here.end()
    here.take()
    (call,) = [call for call in here.welcome() if call.op is ClusterOp.OWN]
    assert call.serial == own
    here.answer(call, {"outcome": 1})
    assert names(here.take_calls()) == ["RELEASE"]
    here.end()
    assert "OWN" not in names(here.welcome())


def test_d4_who_waits_no_longer_is_told_so_even_late(here: Desk) -> None:
    """A request without waiting ends the wait of one before, though its caller has given up."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    here.have(here.uplink.own, 1, PATH, b"n", NO_FLAGS, value={"outcome": 2})
    here.ask(here.uplink.own, 1, PATH, b"n", NameFlags.DO_NOT_QUEUE)
    (call,) = here.take_calls()
    here.pass_time(Patience().call_s)
    here.take()
    here.answer(call, {"outcome": int(NameOutcome.EXISTS)})
    assert here.take() == [Taken(Claim(1, ClusterOp.OWN, PATH, b"n"), "another has it")]
    here.end()
    assert "OWN" not in names(here.welcome())


def test_d4_name_that_exists_is_no_claim(here: Desk) -> None:
    """Who asked without waiting, and did not get it, has nothing to state."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    here.have(here.uplink.own, 1, PATH, b"n", NameFlags.DO_NOT_QUEUE, value={"outcome": 3})
    here.end()
    assert "OWN" not in names(here.welcome())


@pytest.mark.parametrize("is_here", [False, True])
def test_d16_what_a_former_life_had_is_stated(desk: Desk, is_here: bool) -> None:
    """Nobody else gets it in between; what is not given again is told, and only that."""
    if is_here:
        desk.begin()
    desk.uplink.adopt(Claim(1, ClusterOp.ENTER), uid=1000)
    desk.uplink.adopt(Claim(1, ClusterOp.OWN, PATH, b"n"), flags=4)
    desk.uplink.adopt(Claim(1, ClusterOp.SUBSCRIBE, PATH, what=CPU))
    desk.settle()
    desk.pass_time(Patience().lost_s)
    calls = desk.take_calls() if is_here else desk.welcome()[1:4]
    assert names(calls) == ["ENTER", "OWN", "SUBSCRIBE"]
    assert calls[0].args == {"endpoint": 1, "uid": 1000}
    assert calls[1].args["flags"] == 4
    desk.take()
    desk.answer(calls[0], {"principal": "uid/1000@a"})
    desk.answer(calls[1], {"outcome": 1})
    desk.refuse(calls[2], Denied("no rule allows it any more"))
    lost = Claim(1, ClusterOp.SUBSCRIBE, PATH, what=CPU)
    assert lost in [one.claim for one in desk.take() if isinstance(one, Taken)]


def test_proof_is_given_once(here: Desk) -> None:
    """An endpoint that has proven its certificate is stated by its principal."""
    ticket = here.ask(here.uplink.challenge, 1)
    (call,) = here.take_calls()
    here.answer(call, {"nonce": b"n", "claim": b"c"})
    assert here.outcome(ticket).value == {"nonce": b"n", "claim": b"c"}
    here.ask(here.uplink.enter, 1, 1000, chain=[b"leaf"], signature=b"s")
    (call,) = here.take_calls()
    assert call.args == {"endpoint": 1, "uid": 1000, "chain": [b"leaf"], "signature": b"s"}
    here.answer(call, {"principal": "principal/ann", "until": 99})
    here.end()
    stated = here.welcome()[3]
    assert stated.args == {"endpoint": 1, "uid": 1000, "principal": "principal/ann"}


def test_impossible_arguments_never_reach_the_master(here: Desk) -> None:
    """What would end the link is refused to the caller, and nothing else happens."""
    with pytest.raises(InvalidArgument):
        here.uplink.own(1, PATH, bytes(ADDRESS_BYTES + 1), NO_FLAGS, here.now)
    here.settle()
    assert here.take_calls() == []
    assert here.take() == []


def test_calls_are_windowed(here: Desk) -> None:
    """Six thousand claims are not on the link at once, and all get there in the end."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    here.take()
    for number in range(6_000):
        here.uplink.subscribe(1, PATH, Terms.of(f"t{number}"), here.now)
    seen = 0
    here.settle()
    while calls := here.take_calls():
        assert sum(len(cluster.encode(call)) for call in calls) < 300_000
        seen += len(calls)
        for call in calls:
            here.answer(call)
    assert seen == 6_000
    here.end()
    calls, stated = here.welcome(), 0
    while calls:
        stated += sum(1 for call in calls if call.op is ClusterOp.SUBSCRIBE)
        last = calls[-1].op
        for call in calls:
            here.answer(call)
        calls = here.take_calls()
    assert stated == 6_000
    assert last is ClusterOp.RESTATED


# --- addresses ---


def test_d3_blocks_are_leased_ahead(desk: Desk) -> None:
    """One block to choose from and one in spare, which is written down."""
    with pytest.raises(MasterLost):
        desk.uplink.choose_address()
    calls = desk.welcome()
    desk.answer(calls[-1], {"block": 41})
    assert desk.uplink.block == 41
    assert [desk.uplink.choose_address() for _ in range(3)] == [b"41.1", b"41.2", b"41.3"]
    assert desk.take() == []
    (call,) = desk.take_calls()
    desk.answer(call, {"block": 42})
    assert desk.take() == [Spare(42)]
    assert desk.take_calls() == []
    desk.end()
    stated = [call.args for call in desk.welcome() if call.op is ClusterOp.LEASE]
    assert stated == [{"block": 41}, {"block": 42}]


def test_d3_d16_spare_serves_an_agent_without_its_master() -> None:
    """A new life begins with the spare of the one before, and writes down that it is used."""
    desk = Desk(spare=42, blocks=(40, 41))
    assert desk.take() == [Spare(None)]
    assert desk.uplink.choose_address() == b"42.1"
    calls = desk.welcome()
    stated = [call.args["block"] for call in calls if call.op is ClusterOp.LEASE]
    assert stated == [40, 41, 42, None]


def test_d3_block_that_is_lost(here: Desk) -> None:
    """Addresses of a block that the master gave away are told; the spare takes its place."""
    here.end()
    calls = [call for call in here.welcome() if call.op is ClusterOp.LEASE]
    blocks = [call.args["block"] for call in calls]
    here.take()
    here.refuse(calls[0], Stale("not leased any more"))
    assert here.take() == [Spare(None), BlockLost(blocks[0])]
    assert here.uplink.block == blocks[1]
    (call,) = here.take_calls()
    assert call.args == {"block": None}
    here.refuse(call, Denied("no more for now"))
    assert here.take_calls() == []
    here.pass_time(Patience().retry_s)
    assert names(here.take_calls()) == ["LEASE"]
    here.refuse(calls[1], Stale("not leased any more"))
    with pytest.raises(MasterLost):
        here.uplink.choose_address()


def test_d3_spare_that_is_lost(here: Desk) -> None:
    """A spare that is gone is no loss, but must not be begun with."""
    here.end()
    calls = [call for call in here.welcome() if call.op is ClusterOp.LEASE]
    here.take()
    here.refuse(calls[1], Stale("not leased any more"))
    assert here.take() == [Spare(None)]
    assert names(here.take_calls()) == ["LEASE"]


def test_d3_spare_that_cannot_be_written_down_is_given_up(desk: Desk) -> None:
    """No later life would know of it; another is asked for after a while."""
    calls = desk.welcome()
    desk.answer(calls[-1], {"block": 41})
    (call,) = desk.take_calls()
    desk.answer(call, {"block": 42})
    assert desk.take() == [Spare(42)]
    desk.uplink.refuse_spare(42, desk.now)
    desk.settle()
    (call,) = desk.take_calls()
    assert (call.op, call.args) == (ClusterOp.RETURN, {"block": 42})
    desk.answer(call)
    assert desk.uplink.choose_address() == b"41.1"
    desk.pass_time(Patience().retry_s - 1)
    assert desk.take_calls() == []
    desk.pass_time(1)
    (call,) = desk.take_calls()
    desk.answer(call, {"block": 43})
    assert desk.take() == [Spare(43)]
    desk.end()
    stated = [call.args["block"] for call in desk.welcome() if call.op is ClusterOp.LEASE]
    assert stated == [41, 43]


def test_d3_spare_that_stays_written_down_is_not_used() -> None:
    """The next life would begin with it too, and give its addresses again."""
    desk = Desk(spare=42, blocks=(41,))
    assert desk.take() == [Spare(None)]
    desk.uplink.refuse_spare(None, desk.now)
    desk.settle()
    assert desk.take() == [Spare(None), BlockLost(42)]
    desk.uplink.refuse_spare(None, desk.now)
    desk.settle()
    assert desk.take() == []
    with pytest.raises(MasterLost):
        desk.uplink.choose_address()
    calls = desk.welcome()
    assert [call.args["block"] for call in calls if call.op is ClusterOp.LEASE] == [41, None]
    desk.answer(calls[-1], {"block": 50})
    assert desk.uplink.choose_address() == b"50.1"


def test_d3_spare_that_takes_the_place_of_a_block_must_be_written_off(here: Desk) -> None:
    """As at the start: what is in use may not stand there as never used."""
    here.end()
    calls = [call for call in here.welcome() if call.op is ClusterOp.LEASE]
    blocks = [call.args["block"] for call in calls]
    here.take()
    here.refuse(calls[0], Stale("not leased any more"))
    assert here.take() == [Spare(None), BlockLost(blocks[0])]
    here.uplink.refuse_spare(None, here.now)
    here.settle()
    assert here.take() == [Spare(None), BlockLost(blocks[1])]
    assert "RETURN" in names(here.take_calls())
    with pytest.raises(MasterLost):
        here.uplink.choose_address()


# --- certificates ---


def test_case39_certificate_is_renewed_at_its_time(here: Desk) -> None:
    """At half of its life the next one is asked for, once, and again later if that fails."""
    here.uplink.set_renewal(here.now + 100)
    here.pass_time(99)
    assert here.take_calls() == []
    here.pass_time(1)
    (call,) = here.take_calls()
    assert call.args == {"csr": b"request 1"}
    here.refuse(call, Denied("not now"))
    here.pass_time(Patience().retry_s)
    (call,) = here.take_calls()
    assert call.args == {"csr": b"request 2"}
    here.answer(call, CERTIFIED)
    assert here.take() == [Renewed((b"leaf", b"issuing"), 99)]
    here.pass_time(10_000)
    assert here.take_calls() == []


def test_case39_renewal_waits_for_the_master(here: Desk) -> None:
    """What is due while the master is away is done when it is back."""
    here.uplink.set_renewal(here.now + 1)
    here.end()
    here.pass_time(10)
    assert "RENEW" not in names(here.welcome())
    here.pass_time(0)
    assert names(here.take_calls()) == ["RENEW"]


# --- what may be done ---


ALLOWED = {"is_allowed": True, "rule": "all", "reason": "", "reach": ["shop.**"], "policy": 1}
REFUSED = {"is_allowed": False, "rule": "", "reason": "no rule", "reach": [], "policy": 1}


def test_answers_hold_until_the_policy_changes(here: Desk) -> None:
    """The same question is asked once; a new number of the policy voids all answers."""
    question = Question(1, "send", PATH, b"name")
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    assert here.uplink.find_verdict(question, here.now) is None
    here.have(here.uplink.ask, question, value=ALLOWED)
    found = here.uplink.find_verdict(question, here.now)
    assert found == Verdict(True, "all", "", ("shop.**",))
    here.hear(Part(5, 1, 0, 1))
    here.put(2, OwnerRecord(1, b"x", 2, 3))
    assert here.uplink.find_verdict(question, here.now) == found
    here.put(3, FactRecord("policy", 2))
    assert here.uplink.find_verdict(question, here.now) is None


def test_d16_answers_hold_without_the_master_for_a_while(here: Desk) -> None:
    """Established traffic goes on while the master is away, but not for ever."""
    question = Question(1, "receive", PATH, what=CPU)
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    here.have(here.uplink.ask, question, value=REFUSED)
    here.end()
    here.pass_time(Patience().stale_s - 1)
    assert here.uplink.find_verdict(question, here.now) is not None
    here.pass_time(1)
    assert here.uplink.find_verdict(question, here.now) is None


@pytest.mark.parametrize("stale_s", [0.0, 1.0, 10.0])
def test_d16_a_node_may_be_set_to_believe_old_answers_for_less_long(stale_s: float) -> None:
    """What was allowed before holds for `stale_ok_s`, with 0 not for a moment: it fails closed."""
    here = Desk(patience=Patience(stale_s=stale_s))
    here.begin()
    here.hear(Part(5, 1, 0, 1))
    here.put(2, BusRecord(PATH, 1, 9, b"m", 512, "fifo", bytes(16), 1))
    here.take()
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    allowed, want = Question(1, "send", PATH, b"name"), Question(1, "receive", PATH, what=CPU)
    here.have(here.uplink.ask, allowed, value=ALLOWED)
    here.have(here.uplink.ask, want, value=ALLOWED)
    here.have(here.uplink.subscribe, 1, PATH, CPU)
    here.end()
    assert (here.uplink.find_verdict(allowed, here.now) is not None) is (stale_s > 0)
    lost_s = Patience().lost_s
    here.pass_time(lost_s)
    here.take()
    if stale_s > lost_s:
        assert here.outcome(here.ask(here.uplink.enter, 2, 1000)).is_ok
        assert here.outcome(here.ask(here.uplink.subscribe, 2, PATH, CPU)).is_ok
        assert here.uplink.find_verdict(allowed._replace(endpoint=2), here.now) is not None
        here.pass_time(stale_s - lost_s)
    for question in (allowed, want):
        assert here.uplink.find_verdict(question, here.now) is None
    for ticket in (
        here.ask(here.uplink.enter, 3, 1000),
        here.ask(here.uplink.subscribe, 1, PATH, CPU),
        here.ask(here.uplink.ask, allowed),
    ):
        told = next(
            one for one in here.told if isinstance(one, Answered) and one.result.serial == ticket
        )
        assert isinstance(told.result.to_error(), MasterLost)
    here.take()
    # When it is back, all is as it was.
    here.welcome()
    assert here.uplink.find_verdict(allowed, here.now) is not None


@pytest.mark.parametrize("how", ["exit", "withdrawn"])
def test_answers_are_about_principals(here: Desk, how: str) -> None:
    """What one endpoint of a user was told holds for the next one, and for nobody else."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    question = Question(1, "send", PATH, b"name")
    here.have(here.uplink.ask, question, value=ALLOWED)
    if how == "exit":
        here.ask(here.uplink.exit, 1)
    else:
        here.hear(Withdrawn(1, ClusterOp.ENTER))
    for call in here.take_calls():
        here.answer(call)
    here.take()
    assert here.uplink.find_verdict(question, here.now) is None
    here.have(here.uplink.enter, 2, 1000, value={"principal": "uid/1000@a"})
    here.have(here.uplink.enter, 3, 1001, value={"principal": "uid/1001@a"})
    proof = {"chain": [b"leaf"], "signature": b"s"}
    ticket = here.ask(here.uplink.enter, 4, 1000, **proof)
    (call,) = here.take_calls()
    here.answer(call, {"principal": "principal/ann"})
    assert here.outcome(ticket).is_ok
    found = [
        here.uplink.find_verdict(question._replace(endpoint=number), here.now)
        for number in (2, 3, 4)
    ]
    assert [one is not None for one in found] == [True, False, False]


def test_d19_monitors_are_asked_for_each_time(here: Desk) -> None:
    """Who reads what is meant for others is noted by the master, each time."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    question = Question(1, "monitor", PATH)
    here.have(here.uplink.ask, question, value=ALLOWED)
    assert here.uplink.find_verdict(question, here.now) is None


def test_answers_are_bounded() -> None:
    """The oldest are forgotten."""
    verdicts = Verdicts(limit=2)
    questions = [Question(1, "bind", b"/%d" % number) for number in range(3)]
    for question in questions:
        verdicts.put("uid/1000@a", question, Verdict(True, "", ""))
    found = [verdicts.get("uid/1000@a", one) is None for one in questions]
    assert found == [True, False, False]
    assert len(verdicts) == 2


# --- without the master ---


def be_lost(desk: Desk) -> None:
    """Lose the master."""
    desk.end()
    desk.pass_time(Patience().lost_s)
    desk.take()


def test_case22_who_is_allowed_already_enters_alone(here: Desk) -> None:
    """A user enters without the master, and is stated when it is back."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    here.have(here.uplink.ask, Question(1, "send", PATH, b"name"), value=ALLOWED)
    here.end()
    waits = here.ask(here.uplink.enter, 2, 1000)
    assert here.take() == [], "the master may be back soon"
    here.pass_time(Patience().lost_s)
    turned, answered = here.take()
    assert isinstance(turned, Turned)
    assert isinstance(answered, Answered)
    assert answered.result.serial == waits
    assert answered.result.value == {"principal": "uid/1000@a", "until": None}
    ticket = here.ask(here.uplink.enter, 3, 1000)
    assert here.outcome(ticket).is_ok
    question = Question(3, "send", PATH, b"name")
    assert here.uplink.find_verdict(question, here.now) is not None
    proof = {"chain": [b"leaf"], "signature": b"s"}
    ticket = here.ask(here.uplink.enter, 4, 1000, **proof)
    assert isinstance(here.outcome(ticket).to_error(), MasterLost), "nobody can check the proof"
    calls = here.welcome()
    assert names(calls)[3:] == ["ENTER", "ENTER", "ENTER", "ASK", "RESTATED"]
    assert calls[6].args == question.args


@pytest.mark.parametrize("breaks", [False, True])
def test_d16_what_is_not_allowed_any_more_is_told(here: Desk, breaks: bool) -> None:
    """What old answers allowed is asked again, until the master has answered; a no is told."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    for name in (b"one", b"two"):
        here.have(here.uplink.ask, Question(1, "send", PATH, name), value=ALLOWED)
    be_lost(here)
    here.ask(here.uplink.enter, 2, 1000)
    questions = [Question(2, "send", PATH, name) for name in (b"one", b"two")]
    for question in questions:
        here.uplink.find_verdict(question, here.now)
    calls = here.welcome()
    if breaks:
        here.end()
        calls = here.welcome()
    asked = [call for call in calls if call.op is ClusterOp.ASK]
    assert [call.args for call in asked] == [one.args for one in questions]
    here.take()
    here.answer(asked[0], ALLOWED)
    here.answer(asked[1], REFUSED)
    assert here.take() == [Refuted(questions[1], "no rule")]
    here.end()
    assert "ASK" not in names(here.welcome())


def test_d16_answers_of_who_is_gone_are_not_asked_again(here: Desk) -> None:
    """An endpoint that has exited is nobody the master could judge."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    here.have(here.uplink.ask, Question(1, "send", PATH, b"name"), value=ALLOWED)
    be_lost(here)
    here.ask(here.uplink.enter, 2, 1000)
    here.uplink.find_verdict(Question(2, "send", PATH, b"name"), here.now)
    here.ask(here.uplink.exit, 2)
    assert names(here.welcome())[3:] == ["ENTER", "RESTATED"]


def test_d16_a_node_that_is_out_trusts_no_answer(here: Desk) -> None:
    """Whom the master does not let in any more lets nobody in, until it is let in again."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    question = Question(1, "send", PATH, b"name")
    here.have(here.uplink.ask, question, value=ALLOWED)
    be_lost(here)
    here.uplink.receive_refusal("the certificate was revoked")
    assert here.uplink.find_verdict(question, here.now) is None
    ticket = here.ask(here.uplink.enter, 2, 1000)
    assert "was revoked" in here.outcome(ticket).to_error().message
    here.welcome()
    assert here.uplink.find_verdict(question, here.now) is not None


def want(desk: Desk, endpoint: int) -> int:
    """Let an endpoint ask to hear of CPUs."""
    return desk.ask(desk.uplink.subscribe, endpoint, PATH, CPU)


@pytest.mark.parametrize("why", ["", "who", "what", "unsettled", "gone", "void"])
def test_d16_what_all_know_may_be_heard_without_the_master(here: Desk, why: str) -> None:
    """If this node hears it, and the principal may: nothing must be told to anybody."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    here.hear(Part(5, 1, 0, 1))
    bus = BusRecord(PATH, 3, 7, b"m", 512, "fifo", bytes(16), 1)
    here.put(2, bus, MatchRecord(3, 7, CPU))
    here.take()
    here.take_calls()
    first = want(here, 1)
    (call,) = here.take_calls()
    if why != "unsettled":
        here.answer(call)
        assert here.outcome(first).is_ok
    if why == "gone":
        here.hear(TableDelta(5, Delta(2, 3, (), (encode_record(MatchRecord(3, 7, CPU))[0],))))
    be_lost(here)
    ticket = here.ask(here.uplink.enter, 2, 1001 if why == "who" else 1000)
    assert here.outcome(ticket).is_ok
    if why == "what":
        ticket = here.ask(here.uplink.subscribe, 2, PATH, Terms.of("sensors"))
    else:
        ticket = want(here, 2)
    outcome = here.outcome(ticket)
    if why == "void":
        here.ask(here.uplink.unsubscribe, 2, PATH, CPU)
    assert outcome.is_ok is (why in ("", "void"))
    stated = [call.args["endpoint"] for call in here.welcome() if call.op is ClusterOp.SUBSCRIBE]
    assert (2 in stated) is (why == "")


def test_d16_what_was_given_up_before_the_loss_is_not_stated(here: Desk) -> None:
    """A call that is void when the master is lost gives nothing."""
    here.have(here.uplink.enter, 1, 1000, value={"principal": "uid/1000@a"})
    here.hear(Part(5, 1, 0, 1))
    bus = BusRecord(PATH, 3, 7, b"m", 512, "fifo", bytes(16), 1)
    here.put(2, bus, MatchRecord(3, 7, CPU))
    here.take_calls()
    want(here, 1)
    for call in here.take_calls():
        here.answer(call)
    here.take()
    here.have(here.uplink.enter, 2, 1000, value={"principal": "uid/1000@a"})
    here.end()
    want(here, 2)
    here.ask(here.uplink.unsubscribe, 2, PATH, CPU)
    here.pass_time(Patience().lost_s)
    stated = [call.args["endpoint"] for call in here.welcome() if call.op is ClusterOp.SUBSCRIBE]
    assert stated == [1]


# --- the table ---


def test_changes_are_handed_out_before_the_acknowledgement(here: Desk) -> None:
    """The barrier counts on it: who acknowledges has followed."""
    here.uplink.receive_frame(cluster.encode(Part(5, 1, 0, 1)), here.now)
    here.settle()
    assert here.said == [Ack(5, 1)]
    record = OwnerRecord(1, b"x", 2, 3)
    delta = TableDelta(5, Delta(1, 2, (encode_record(record),)))
    here.uplink.receive_frame(cluster.encode(delta), here.now)
    changed, said = here.uplink.take_effects()
    assert isinstance(changed, Changed)
    assert [change.new for change in changed.changes] == [record]
    assert isinstance(said, Say)
    assert cluster.decode(said.data) == Ack(5, 2)


def test_case25_gap_is_asked_for_again(here: Desk) -> None:
    """What is missing is asked for now and then, but only while there is a link."""
    here.hear(Part(5, 1, 0, 1))
    here.said.clear()
    here.put(5, OwnerRecord(1, b"x", 2, 3))
    assert [type(frame).__name__ for frame in here.said] == ["Resync"]
    here.said.clear()
    here.pass_time(6)
    assert [type(frame).__name__ for frame in here.said] == ["Resync"]
    here.end()
    here.said.clear()
    here.pass_time(60)
    assert here.said == []
