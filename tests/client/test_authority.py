"""The decisions of a bus's master, without a bus."""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afbus.client.authority import Authority
from afbus.client.docket import REQUESTS_PER_ENDPOINT
from afbus.client.effect import Ask, Probe, Tell
from afbus.client.question import same_user
from afbus.proto.address import BusAddress
from afbus.proto.control import (
    Grant,
    GrantFlags,
    Identity,
    Match,
    MulticastMatch,
    MulticastSend,
    OwnedAddr,
    RevokeAddr,
    RevokeMatch,
    RevokeSend,
)
from afbus.proto.errors import (
    AddressInUse,
    BusError,
    DeadlineExceeded,
    InvalidArgument,
    MasterLost,
    NodeLost,
    NoSuchEndpoint,
    NotJoined,
    NotOwned,
    ShareExceeded,
)
from afbus.proto.limits import ADDRESSES_PER_ENDPOINT, CONTROL_ITEMS
from afbus.proto.match import Overflow
from afbus.proto.names import NameFlags, NameOutcome, ReleaseOutcome
from afbus.proto.notice import Event, Notice
from afbus.proto.request import (
    Answer,
    Join,
    Leave,
    MonitorRequest,
    NoticesRequest,
    Own,
    Publish,
    Release,
    Request,
    RequestKind,
    Subscribe,
    Unsubscribe,
)
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable

    from afbus.client.question import Policy, Question, Verdict
    from afbus.proto.control import Item

PATH = b"/demo"
MASTER = BusAddress(PATH, b"demo.master")
ME = Identity("uid:1000", "here", 10, 1000, 1000)
OTHER = Identity("uid:2000", "here", 20, 2000, 2000)
TERMS = Terms.parse("clock zone=utc")
BITS = bytes([1]) + bytes(63)


def at(address: bytes) -> BusAddress:
    """An address on the bus of these tests."""
    return BusAddress(PATH, address)


class World:
    """An agent that knows who owns what, and a policy: they carry out the effects."""

    def __init__(self, policy: Policy = lambda _: True, master: BusAddress = MASTER) -> None:
        self.authority = Authority(master)
        self.policy = policy
        self.owners: dict[bytes, int] = {}
        self.spent: set[bytes] = set()
        self.live: set[int] = set()
        self.matches: dict[int, dict[object, Match]] = {}
        self.sends: dict[int, set[object]] = {}
        self.grants: dict[int, GrantFlags] = {}
        self.answers: dict[int, Answer] = {}
        self.tells: list[Tell] = []
        self.questions: list[Question] = []
        self.held: deque[int] | None = None
        #: Whether the node of all endpoints is lost.
        self.is_lost = False
        #: What everything that gives a name fails by.
        self.failure: BusError | None = None
        #: What happens when the agent has let somebody in and the master does not know it yet.
        self.in_between: Callable[[], None] | None = None
        self.serial = 0
        self.last_unique = 0
        self.addresses_max = ADDRESSES_PER_ENDPOINT

    def enter(self, number: int) -> None:
        """A new endpoint is on the bus, without an address."""
        self.live.add(number)
        self.matches[number], self.sends[number] = {}, set()
        self.grants[number] = GrantFlags(0)

    def source(self, number: int) -> bytes:
        """The address by which an endpoint sends."""
        return next(
            (address for address, owner in self.owners.items() if owner == number), b"@%d" % number
        )

    def ask(self, number: int, request: Request, identity: Identity | None = ME) -> int:
        """Send a request and carry out what follows; return its serial."""
        self.serial += 1
        self.authority.receive_request(self.source(number), identity, request, self.serial)
        self.settle()
        return self.serial

    def answer(self, number: int, request: Request, identity: Identity | None = ME) -> Answer:
        """The answer to a request."""
        return self.answers[self.ask(number, request, identity)]

    def join(self, number: int, identity: Identity = ME) -> bytes:
        """Let an endpoint in; return its unique address."""
        self.enter(number)
        assert self.answer(number, Join(), identity).is_ok
        return self.source(number)

    def kill(self, number: int) -> None:
        """An endpoint dies, and the master gets its notice."""
        addresses = tuple(address for address, owner in self.owners.items() if owner == number)
        for address in addresses:
            del self.owners[address]
        self.live.discard(number)
        if addresses:
            self.authority.receive_notice(Notice(Event.KILLED, addresses))
        self.settle()

    def settle(self) -> None:
        """Carry out effects until there are no more; with `held` questions wait."""
        while effects := self.authority.take_effects():
            for effect in effects:
                if isinstance(effect, Tell):
                    self.tell(effect)
                    continue
                if isinstance(effect, Probe):
                    is_there = effect.name in self.owners
                    error = NotOwned("nobody can") if is_there else NoSuchEndpoint("nobody")
                    self.authority.receive_probed(effect, error)
                    continue
                self.questions.append(effect.question)
                if self.held is None:
                    self.authority.receive_verdict(effect.ticket, self.policy(effect.question))
                else:
                    self.held.append(effect.ticket)

    def decide(self, ticket: int, verdict: Verdict) -> None:
        """Give a verdict that was held."""
        assert self.held is not None
        self.held.remove(ticket)
        self.authority.receive_verdict(ticket, verdict)
        self.settle()

    def tell(self, tell: Tell) -> None:
        """Be the agent: all of it or nothing."""
        assert tell.items, "without a command it would have to wait for room"
        assert len(tell.items) <= CONTROL_ITEMS
        self.tells.append(tell)
        number = int(tell.to[1:]) if tell.to[:1] == b"@" else self.owners.get(tell.to)
        if number not in self.live or number is None:
            self.authority.receive_failure(tell, NoSuchEndpoint("gone"))
            return
        if self.is_lost:
            self.authority.receive_failure(tell, NodeLost("lost"))
            return
        gives = any(isinstance(item, OwnedAddr) for item in tell.items) and not tell.lets_in
        if self.failure is not None and gives:
            self.authority.receive_failure(tell, self.failure)
            return
        chosen = []
        items: list[Item] = []
        for item in tell.items:
            if isinstance(item, OwnedAddr) and item.address.is_kernel:
                self.last_unique += 1
                chosen.append(b"1.%d" % self.last_unique)
                items.append(OwnedAddr(at(chosen[-1])))
            else:
                items.append(item)
        owned = [item.address.address for item in items if isinstance(item, OwnedAddr)]
        # What it owns already changes nothing.
        owned = [address for address in owned if self.owners.get(address) != number]
        if any(address in self.owners or address in self.spent for address in owned):
            self.authority.receive_failure(tell, AddressInUse("spent"))
            return
        if list(self.owners.values()).count(number) + len(owned) > self.addresses_max:
            self.authority.receive_failure(tell, ShareExceeded("too many"))
            return
        for item in items:
            self.apply(number, item)
        if tell.answer is not None:
            assert tell.reply_to not in self.answers, "answered twice"
            self.answers[tell.reply_to] = tell.answer
        if chosen and self.in_between is not None:
            self.in_between()
        self.authority.receive_done(tell, chosen)

    def apply(self, number: int, item: Item) -> None:
        """One command; what an agent would refuse is a failure of the test."""
        match item:
            case OwnedAddr(address):
                self.owners[address.address] = number
                if address.is_unique:
                    self.spent.add(address.address)
            case RevokeAddr(address):
                assert self.owners.pop(address.address) == number, "revoked from another"
            case MulticastMatch(match):
                self.matches[number][match.what] = match
            case RevokeMatch(_, what):
                del self.matches[number][what]
            case MulticastSend(_, what):
                self.sends[number].add(what)
            case RevokeSend(_, what):
                self.sends[number].remove(what)
            case Grant(flags):
                self.grants[number] = flags
            case _:
                pytest.fail(f"not a command: {item}")


def test_r10_r11_join_gives_an_address_with_the_answer() -> None:
    """Who joins gets an address, which the agent chooses, by a control item of the answer."""
    world = World()
    assert world.join(7) == b"1.1"
    assert world.join(8) == b"1.2"
    assert world.tells[0] == Tell(b"@7", (OwnedAddr(BusAddress.kernel(PATH)),), Answer(), 1, 1)
    assert world.questions[0].kind is RequestKind.JOIN
    assert world.questions[0].address == at(b"@7")
    assert [view.address for view in world.authority.members()] == [at(b"1.1"), at(b"1.2")]


def test_r10_join_again_gives_the_same_address() -> None:
    """A second request to join asks nobody and changes nothing."""
    world = World()
    world.join(7)
    assert world.answer(7, Join()).detail == {"address": b"1.1"}
    assert len(world.questions) == 1
    assert list(world.owners) == [b"1.1"]


def test_r10_two_requests_to_join_at_once_give_one_address() -> None:
    """The second is judged when the first is done."""
    world = World()
    world.held = deque()
    world.enter(7)
    first, second = world.ask(7, Join()), world.ask(7, Join())
    assert len(world.held) == 1
    world.decide(world.held[0], True)
    assert world.answers[first].is_ok
    assert world.answers[second].detail == {"address": b"1.1"}
    assert list(world.owners) == [b"1.1"]


def test_r11_first_words_of_a_new_member_wait_until_it_is_known() -> None:
    """It may ask by its address before the master is told which one the agent chose."""
    world = World()
    world.enter(7)

    def ask() -> None:
        world.authority.receive_request(b"1.1", ME, Own(b"n"), 99)
        assert world.authority.take_effects() == []

    world.in_between = ask
    world.ask(7, Join())
    assert world.answers[99].is_ok
    assert world.owners == {b"1.1": 7, b"n": 7}


@pytest.mark.parametrize("event", [Event.KILLED, Event.LEFT])
def test_d15_death_before_the_master_knows_the_member(event: Event) -> None:
    """Who is gone before its address is told is no member, and what it asked is refused."""
    world = World()
    world.enter(7)

    def go() -> None:
        world.authority.receive_request(b"1.1", ME, Own(b"n"), 99)
        world.live.discard(7)
        del world.owners[b"1.1"]
        world.authority.receive_notice(Notice(event, (b"1.1",)))

    world.in_between = go
    world.ask(7, Join())
    assert world.authority.members() == ()
    assert world.owners == {}
    world.in_between = None
    assert world.join(8) == b"1.2"
    assert [view.address for view in world.authority.members()] == [at(b"1.2")]


def test_d8_refused_join_is_told_and_can_be_tried_again() -> None:
    """What the agent says is what the asker reads; nobody has become a member."""
    world = World()
    world.addresses_max = 0
    world.enter(7)
    assert world.answer(7, Join()).errno == errno.EDQUOT
    assert world.authority.members() == ()
    world.addresses_max = ADDRESSES_PER_ENDPOINT
    assert world.answer(7, Join()).is_ok
    assert [view.address for view in world.authority.members()] == [at(world.source(7))]


@pytest.mark.parametrize(
    ("verdict", "text"),
    [(False, "the master refuses"), ("not today", "not today"), ("", "the master refuses")],
)
def test_r11_d9_refusal_comes_without_an_address(verdict: Verdict, text: str) -> None:
    """What is not granted is answered with EPERM and the reason, and nothing is given."""
    world = World(lambda _: verdict)
    world.enter(7)
    answer = world.answer(7, Join())
    assert (answer.errno, answer.message) == (errno.EPERM, text)
    assert world.owners == {}
    assert world.authority.members() == ()


@pytest.mark.parametrize("verdict", [None, 1, "yes", object()])
def test_r11_only_true_grants(verdict: Verdict) -> None:
    """A policy that returns something else has not granted anything."""
    world = World(lambda _: verdict)
    world.enter(7)
    assert world.answer(7, Join()).errno == errno.EPERM
    assert world.owners == {}


def test_r10_who_has_not_joined_can_only_join() -> None:
    """Every other request is EHOSTUNREACH, and is no question for the policy."""
    world = World()
    world.enter(7)
    for request in (Own(b"a"), Subscribe(TERMS), Publish(TERMS), MonitorRequest(), Leave()):
        assert world.answer(7, request).errno == errno.EHOSTUNREACH
    assert world.questions == []


def test_d17_request_without_identity_is_refused() -> None:
    """Nobody is let in whom the agent does not attest."""
    world = World()
    world.enter(7)
    assert world.answer(7, Join(), None).errno == errno.EPERM


def test_r11_source_that_is_unknown_must_join_again() -> None:
    """An address of which this master does not know is not let in by a name."""
    world = World()
    world.enter(7)
    world.owners[b"1.99"] = 7
    assert world.answer(7, Own(b"a")).errno == errno.EHOSTUNREACH


def test_d3_no_unique_address_is_given_twice() -> None:
    """Not after a death, not after leaving, not by a new master of the same bus."""
    world = World()
    world.join(1)
    world.kill(1)
    assert world.join(2) == b"1.2"
    assert world.answer(2, Leave()).is_ok
    assert world.answer(2, Join()).is_ok
    assert world.source(2) == b"1.3"
    world.authority = Authority(MASTER)
    assert [world.join(number) for number in (10, 11)] == [b"1.4", b"1.5"]


def test_d4_name_goes_from_hand_to_hand() -> None:
    """The old owner loses the name before the new one has it, and gets it back by the queue."""
    world = World()
    world.join(1)
    world.join(2)
    flags = NameFlags.ALLOW_REPLACEMENT
    assert world.answer(1, Own(b"n", flags)).detail["outcome"] == NameOutcome.PRIMARY_OWNER
    assert world.answer(2, Own(b"n")).detail["outcome"] == NameOutcome.IN_QUEUE
    world.tells.clear()
    answer = world.answer(2, Own(b"n", NameFlags.REPLACE))
    assert answer.detail["outcome"] == NameOutcome.PRIMARY_OWNER
    assert [(tell.to, tell.items) for tell in world.tells] == [
        (b"1.1", (RevokeAddr(at(b"n")),)),
        (b"1.2", (OwnedAddr(at(b"n")),)),
    ]
    assert world.answer(2, Release(b"n")).detail["outcome"] == ReleaseOutcome.RELEASED
    assert world.owners[b"n"] == 1


def test_d4_the_masters_name_cannot_be_taken() -> None:
    """It can only be waited for."""
    world = World()
    world.join(1)
    request = Own(MASTER.address, NameFlags.REPLACE | NameFlags.DO_NOT_QUEUE)
    assert world.answer(1, request).detail["outcome"] == NameOutcome.EXISTS


@pytest.mark.parametrize("name", [b"1.7", b"@7", b"9lives"])
def test_d3_unique_addresses_are_no_names(name: bytes) -> None:
    """Nobody can ask for an address that looks like a unique or a provisional one."""
    world = World()
    world.join(1)
    assert world.answer(1, Own(name)).errno == errno.EINVAL


def test_d18_names_of_one_endpoint_are_limited() -> None:
    """One name too many is EDQUOT, before anybody has lost it."""
    world = World()
    world.join(1)
    world.join(2)
    for number in range(ADDRESSES_PER_ENDPOINT - 1):
        assert world.answer(1, Own(b"n%d" % number)).is_ok
    assert world.answer(2, Own(b"m", NameFlags.ALLOW_REPLACEMENT)).is_ok
    assert world.answer(1, Own(b"m", NameFlags.REPLACE)).errno == errno.EDQUOT
    assert world.owners[b"m"] == 2


def test_r15_subscription_is_one_command() -> None:
    """Granted with the answer, each time: the cluster's policy may have taken it meanwhile."""
    world = World()
    world.join(1)
    assert world.answer(1, Subscribe(TERMS)).is_ok
    assert world.matches[1] == {TERMS: Match(PATH, TERMS)}
    world.tells.clear()
    assert world.answer(1, Subscribe(TERMS)).is_ok
    assert world.tells[0].items == (MulticastMatch(Match(PATH, TERMS)),)
    assert world.answer(1, Subscribe(TERMS, Overflow.CONFLATE)).is_ok
    assert world.matches[1][TERMS].overflow is Overflow.CONFLATE
    assert world.answer(1, Unsubscribe(TERMS)).is_ok
    assert world.matches[1] == {}
    assert world.answer(1, Unsubscribe(TERMS)).is_ok


def test_d8_refusal_of_the_agent_becomes_the_answer() -> None:
    """Bits of another width: the asker learns the errno, and no right is noted."""
    world = World()
    world.join(1)
    world.serial += 1
    world.authority.receive_request(b"1.1", ME, Subscribe(BITS), world.serial)
    [ask] = world.authority.take_effects()
    assert isinstance(ask, Ask)
    world.authority.receive_verdict(ask.ticket, True)
    [tell] = world.authority.take_effects()
    assert isinstance(tell, Tell)
    world.authority.receive_failure(tell, ShareExceeded("no more matches"))
    world.settle()
    assert world.answers[world.serial].errno == errno.EDQUOT
    assert world.answer(1, Subscribe(TERMS)).is_ok
    with pytest.raises(NoSuchEndpoint):
        world.authority.revoke_match(b"1.1", BITS)


def test_r21_d9_sending_needs_a_grant_of_its_own() -> None:
    """The right to send can be given again, and is revoked at once."""
    world = World()
    world.join(1)
    assert world.answer(1, Publish(TERMS)).is_ok
    assert world.answer(1, Publish(TERMS)).is_ok
    assert world.sends[1] == {TERMS}
    world.authority.revoke_send(b"1.1", TERMS)
    world.settle()
    assert world.sends[1] == set()
    with pytest.raises(NoSuchEndpoint):
        world.authority.revoke_send(b"1.1", TERMS)


def test_d15_d19_grants_are_set_and_cleared_one_by_one() -> None:
    """Giving one up needs no verdict."""
    world = World()
    world.join(1)
    assert world.answer(1, NoticesRequest()).is_ok
    assert world.answer(1, MonitorRequest()).is_ok
    assert world.grants[1] == GrantFlags.NOTICES | GrantFlags.MONITOR
    asked = len(world.questions)
    assert world.answer(1, NoticesRequest(False)).is_ok
    assert world.grants[1] == GrantFlags.MONITOR
    assert len(world.questions) == asked


@pytest.mark.parametrize(
    ("request_", "identity", "granted"),
    [
        (Join(), ME, True),
        (Own(b"n"), ME, True),
        (Subscribe(TERMS), ME, True),
        (Subscribe(BITS), ME, True),
        (Subscribe(Terms()), ME, False),
        (Subscribe(bytes(64)), ME, False),
        (Publish(TERMS), ME, True),
        (Publish(Terms()), ME, True),
        (NoticesRequest(), ME, True),
        (MonitorRequest(), ME, False),
        (Join(), OTHER, False),
        (Subscribe(TERMS), OTHER, False),
        (Join(), Identity("uid:1000", "elsewhere", 10, 1000, 1000), False),
    ],
)
def test_d9_d17_d19_policy_of_the_same_user(
    request_: Request, identity: Identity, granted: bool
) -> None:
    """Without an authorize callback the master's user may do all but read what is not for it."""
    world = World()
    world.join(1)
    world.policy = same_user(1000, "here")
    number = 1
    if isinstance(request_, Join):
        world.enter(2)
        number = 2
    answer = world.answer(number, request_, identity)
    assert answer.is_ok is granted
    assert granted or (answer.errno == errno.EPERM and answer.message)


def test_d15_death_passes_names_on() -> None:
    """All names of an endpoint that is gone go to those who wait for them."""
    world = World()
    for number in (1, 2, 3):
        world.join(number)
    for name in (b"a", b"b"):
        for number in (1, 2, 3):
            assert world.answer(number, Own(name)).is_ok
    world.kill(1)
    assert (world.owners[b"a"], world.owners[b"b"]) == (2, 2)
    world.kill(3)
    world.kill(2)
    assert world.owners == {}
    assert world.authority.members() == ()


def test_d15_death_notice_with_names_spares_their_new_owners() -> None:
    """The notice names all that the dead one owned; the names are others' by then."""
    world = World()
    for number in (1, 2):
        world.join(number)
        assert world.answer(number, Own(b"n")).is_ok
    world.kill(1)
    assert [view.address for view in world.authority.members()] == [at(b"1.2")]
    assert world.owners == {b"1.2": 2, b"n": 2}


def test_d6_answer_goes_to_the_asker_and_not_to_a_name_of_its() -> None:
    """A name by which somebody asked has another owner when the verdict comes."""
    world = World()
    world.join(1)
    world.join(2)
    assert world.answer(1, Own(b"n", NameFlags.ALLOW_REPLACEMENT)).is_ok
    world.held = deque()
    world.authority.receive_request(b"n", ME, Subscribe(TERMS), 99)
    world.settle()
    world.ask(2, Own(b"n", NameFlags.REPLACE))
    world.decide(world.held[1], True)
    world.decide(world.held[0], True)
    assert (world.tells[-1].to, world.tells[-1].reply_to) == (b"1.1", 99)
    assert world.matches == {1: {TERMS: Match(PATH, TERMS)}, 2: {}}


def test_d15_death_during_a_question_ends_it() -> None:
    """The verdict on a request whose asker is gone changes nothing, whenever it comes."""
    world = World()
    world.join(1)
    world.held = deque()
    world.ask(1, Own(b"n"))
    world.ask(1, Own(b"m"))
    [ticket] = world.held
    world.kill(1)
    world.tells.clear()
    world.decide(ticket, True)
    assert world.tells == []
    assert b"n" not in world.owners


def test_r12_death_while_it_is_told_undoes_the_join() -> None:
    """An endpoint that is gone when its address comes is no member."""
    world = World()
    world.held = deque()
    world.enter(1)
    world.ask(1, Join())
    world.live.discard(1)
    world.decide(world.held[0], True)
    assert world.authority.members() == ()
    world.held = None
    assert world.join(2) == b"1.1"


def test_d11_requests_of_one_endpoint_keep_their_order() -> None:
    """The second question is put when the first has its verdict; others do not wait."""
    world = World()
    world.join(1)
    world.join(2)
    world.held = deque()
    first, second = world.ask(1, Own(b"n")), world.ask(1, Release(b"n"))
    other = world.ask(2, Own(b"m"))
    assert len(world.held) == 2
    world.decide(world.held[1], True)
    assert world.answers[other].is_ok
    assert first not in world.answers
    world.decide(world.held[0], True)
    assert world.answers[first].detail == {"outcome": NameOutcome.PRIMARY_OWNER}
    assert world.answers[second].detail == {"outcome": ReleaseOutcome.RELEASED}


def test_d18_requests_that_wait_are_limited() -> None:
    """A member that asks without end is told EDQUOT; others are not."""
    world = World()
    world.join(1)
    world.join(2)
    world.held = deque()
    for _ in range(REQUESTS_PER_ENDPOINT):
        world.ask(1, Own(b"n"))
    assert world.answer(1, Own(b"n")).errno == errno.EDQUOT
    other = world.ask(2, Own(b"m"))
    assert other not in world.answers
    assert len(world.held) == 2


def test_d5_eviction_takes_everything() -> None:
    """Names, matches, rights and grants, the unique address last, in packets that fit."""
    world = World()
    world.join(1)
    world.join(2)
    for number in range(CONTROL_ITEMS):
        assert world.answer(1, Subscribe(Terms.of("t", n=number))).is_ok
    assert world.answer(1, Publish(TERMS)).is_ok
    assert world.answer(1, MonitorRequest()).is_ok
    assert world.answer(1, Own(b"n")).is_ok
    assert world.answer(2, Own(b"n")).is_ok
    world.held = deque()
    late = world.ask(1, Own(b"late"))
    world.authority.evict(b"n")
    world.settle()
    assert (world.matches[1], world.sends[1], world.grants[1]) == ({}, set(), GrantFlags(0))
    assert world.owners == {b"1.2": 2, b"n": 2}
    assert world.answers[late].errno == errno.EHOSTUNREACH
    world.held = None
    assert world.answer(1, Join()).is_ok
    assert world.source(1) == b"1.3"
    with pytest.raises(NoSuchEndpoint):
        world.authority.evict(b"1.1")


def test_d4_d5_name_is_revoked_by_the_master() -> None:
    """The next in the queue gets it; the master's own name stays."""
    world = World()
    world.join(1)
    world.join(2)
    assert world.answer(1, Own(b"n")).is_ok
    assert world.answer(2, Own(b"n")).is_ok
    world.authority.revoke_name(b"n")
    world.settle()
    assert world.owners[b"n"] == 2
    with pytest.raises(NoSuchEndpoint):
        world.authority.revoke_name(b"x")
    with pytest.raises(InvalidArgument):
        world.authority.revoke_name(MASTER.address)


def test_d16_new_master_adopts_the_members() -> None:
    """Members and names go on; those that are gone are forgotten; numbers are not used again."""
    world = World()
    world.join(1)
    assert world.answer(1, Own(b"n")).is_ok
    world.authority = Authority(MASTER)
    world.authority.adopt({1: (b"1.1", b"n"), 9: (b"nobody",)})
    world.settle()
    assert [(view.address, view.names) for view in world.authority.members()] == [
        (at(b"1.1"), (at(b"n"),))
    ]
    assert world.answer(1, Own(b"m")).is_ok
    assert world.join(2) == b"1.2"
    assert world.answer(2, Own(b"n")).detail["outcome"] == NameOutcome.IN_QUEUE
    del world.owners[b"1.1"], world.owners[b"n"], world.owners[b"m"]
    world.authority.adopt({2: (b"1.2",)})
    world.settle()
    assert world.owners == {b"1.2": 2, b"n": 2}


@pytest.mark.parametrize("kind", [MasterLost, NodeLost, DeadlineExceeded])
def test_d16_d4_a_name_that_cannot_be_given_now_is_owed(kind: type[BusError]) -> None:
    """Who waited for it gets it when that is possible again; who asks just now is refused."""
    world = World()
    for number in (1, 2, 3):
        world.join(number)
    assert world.answer(1, Own(b"n")).is_ok
    assert world.answer(2, Own(b"n")).detail["outcome"] == NameOutcome.IN_QUEUE
    assert world.answer(3, Own(b"n")).detail["outcome"] == NameOutcome.IN_QUEUE
    world.failure = kind("not now")
    world.kill(1)
    asked = world.ask(3, Own(b"m"))
    if kind is not NodeLost:
        # A node that was lost may have done it, so that is tried again until it is known.
        assert type(world.answers[asked].to_error()) is kind
    for _ in range(3):
        assert world.authority.is_owing
        world.authority.tell_again()
        world.settle()
    assert b"n" not in world.owners
    world.failure = None
    world.authority.tell_again()
    world.settle()
    assert world.owners[b"n"] == 2
    assert not world.authority.is_owing
    assert world.answers[asked].is_ok is (kind is NodeLost)
    assert world.answer(3, Own(b"m")).is_ok, "what was refused can be asked for again"


def test_d16_what_is_taken_on_a_lost_node_is_gone_in_the_end() -> None:
    """By whomever: the member that gives it up, or the master that takes it."""
    world = World()
    world.join(1)
    for name in (b"n", b"m"):
        assert world.answer(1, Own(name)).is_ok
    world.is_lost = True
    asked = world.ask(1, Release(b"n"))
    world.authority.revoke_name(b"m")
    world.settle()
    assert world.authority.is_owing
    assert set(world.owners) == {b"1.1", b"n", b"m"}
    assert asked not in world.answers
    world.is_lost = False
    world.authority.tell_again()
    world.settle()
    assert set(world.owners) == {b"1.1"}
    assert world.answers[asked].is_ok
    assert not world.authority.is_owing


def test_d16_d4_what_is_owed_to_who_is_gone_goes_on() -> None:
    """It is the next one's, and comes once."""
    world = World()
    for number in (1, 2, 3):
        world.join(number)
        world.ask(number, Own(b"n"))
    world.failure = MasterLost("not now")
    world.kill(1)
    world.kill(2)
    world.failure = None
    world.authority.tell_again()
    world.settle()
    assert world.owners[b"n"] == 3
    assert not world.authority.is_owing


def test_d16_d4_a_name_that_the_cluster_has_freed_passes_on() -> None:
    """If that is news: what was told of a former owner takes nothing from the present one."""
    world = World()
    for number in (1, 2, 3):
        world.join(number)
        world.ask(number, Own(b"n"))
    freed = Notice(Event.FREED, (b"n", b"unknown", MASTER.address))
    world.authority.receive_notice(freed)
    world.settle()
    assert world.owners[b"n"] == 1, "it is owned, says the agent"
    del world.owners[b"n"]
    world.authority.receive_notice(freed)
    world.settle()
    assert world.owners[b"n"] == 2
    # It dies while it is asked about: what comes of that is not about its heir.
    del world.owners[b"n"]
    world.authority.receive_notice(freed)
    (probe,) = world.authority.take_effects()
    assert isinstance(probe, Probe)
    world.kill(2)
    assert world.owners[b"n"] == 3
    world.authority.receive_probed(probe, NoSuchEndpoint("nobody"))
    world.settle()
    assert world.owners[b"n"] == 3


def test_d16_members_of_a_node_that_is_gone_are_forgotten() -> None:
    """But not those of one that is lost, and may come back."""
    there = Identity("uid/1000@there", "there", 10, 1000, 1000)
    world = World()
    world.join(1)
    world.join(2, there)
    assert world.answer(2, Own(b"n"), there).is_ok
    assert world.answer(1, Own(b"n")).detail["outcome"] == NameOutcome.IN_QUEUE
    world.authority.receive_notice(Notice(Event.NODE_LOST, (), "", {"node": "there"}))
    assert len(world.authority.members()) == 2
    world.owners = {key: number for key, number in world.owners.items() if number != 2}
    gone: dict[str, int | str] = {"node": "there", "gone": 1}
    world.authority.receive_notice(Notice(Event.NODE_LOST, (), "", gone))
    world.settle()
    assert [view.address for view in world.authority.members()] == [at(b"1.1")]
    assert world.owners[b"n"] == 1


def test_d16_members_of_other_nodes_are_not_forgotten() -> None:
    """What the own agent lists is not all: only of its own endpoints does it say who is gone."""
    there = Identity("uid/1000@there", "there", 10, 1000, 1000)
    world = World()
    world.authority = Authority(MASTER, spans_nodes=True)
    world.join(1)
    world.join(2, there)
    assert world.answer(2, Own(b"n"), there).is_ok
    world.authority.adopt({}, "here")
    world.settle()
    assert [view.names for view in world.authority.members()] == [(at(b"n"),)]
    assert world.answer(2, Own(b"m"), there).is_ok


def test_d16_a_new_master_learns_of_members_on_other_nodes_when_they_ask() -> None:
    """A unique address is a master's grant, so whoever sends by it is a member."""
    there = Identity("uid/1000@there", "there", 10, 1000, 1000)
    world = World()
    world.join(1, there)
    world.authority = Authority(MASTER, spans_nodes=True)
    world.authority.adopt({}, "here")
    assert world.authority.members() == ()
    assert world.answer(1, Own(b"n"), there).is_ok
    assert world.owners[b"n"] == 1
    world.owners[b"m"] = 1
    for name in (b"m", b"1.1"):
        outcome = world.answer(1, Release(name), there).detail["outcome"]
        assert outcome == ReleaseOutcome.NON_EXISTENT
    assert list(world.owners) == [b"1.1", b"n"], "what it has from the former master it gives up"
    assert world.answer(1, Join(), there).detail == {"address": b"1.1"}
    world.enter(2)
    assert isinstance(world.answer(2, Own(b"m"), there).to_error(), NotJoined)


def test_r1_request_without_a_serial_gets_no_answer() -> None:
    """It is carried out all the same."""
    world = World()
    world.join(1)
    world.authority.receive_request(b"1.1", ME, Own(b"n"), 0)
    world.settle()
    assert world.owners[b"n"] == 1
    assert list(world.answers) == [1]


NAMES = [b"a", b"b", b"c"]
FLAGS = [NameFlags(number) for number in range(8)]
WHATS = [TERMS, BITS, Terms.parse("x")]
STEPS = st.one_of(
    st.tuples(st.just("own"), st.sampled_from(NAMES), st.sampled_from(FLAGS)),
    st.tuples(st.just("release"), st.sampled_from(NAMES)),
    st.tuples(st.just("subscribe"), st.sampled_from(WHATS)),
    st.tuples(st.just("unsubscribe"), st.sampled_from(WHATS)),
    st.tuples(st.just("publish"), st.sampled_from(WHATS)),
    st.tuples(st.just("join")),
    st.tuples(st.just("leave")),
    st.tuples(st.just("kill")),
    st.tuples(st.just("evict")),
    st.tuples(st.just("vanish")),
    st.tuples(st.just("verdict"), st.booleans()),
)


class Naive:
    """What D4 says, by lists that are searched from the start."""

    def __init__(self) -> None:
        self.queues: dict[bytes, list[tuple[int, NameFlags]]] = {name: [] for name in NAMES}

    def own(self, name: bytes, who: int, flags: NameFlags) -> NameOutcome:
        """The outcome, by the table of proto/names.py."""
        queue = self.queues[name]
        kept = flags & ~NameFlags.REPLACE
        if not queue or queue[0][0] == who:
            self.queues[name] = [(who, kept), *queue[1:]]
            return NameOutcome.ALREADY_OWNER if queue else NameOutcome.PRIMARY_OWNER
        others = [entry for entry in queue if entry[0] != who]
        if flags & NameFlags.REPLACE and queue[0][1] & NameFlags.ALLOW_REPLACEMENT:
            stays = not queue[0][1] & NameFlags.DO_NOT_QUEUE
            self.queues[name] = [(who, kept), *others[0 if stays else 1 :]]
            return NameOutcome.PRIMARY_OWNER
        if flags & NameFlags.DO_NOT_QUEUE:
            self.queues[name] = others
            return NameOutcome.EXISTS
        if len(others) == len(queue):
            queue.append((who, kept))
        else:
            queue[[entry[0] for entry in queue].index(who)] = (who, kept)
        return NameOutcome.IN_QUEUE

    def drop(self, who: int) -> None:
        """Forget an endpoint."""
        for name, queue in self.queues.items():
            self.queues[name] = [entry for entry in queue if entry[0] != who]

    def owners(self) -> dict[bytes, int]:
        """Each name that has an owner."""
        return {name: queue[0][0] for name, queue in self.queues.items() if queue}


@settings(max_examples=1000)
@given(st.lists(st.tuples(st.integers(1, 4), STEPS), max_size=60))
def test_d4_d5_commands_fit_the_agent_and_the_naive_model(
    steps: list[tuple[int, tuple[object, ...]]],
) -> None:
    """Whatever is asked and whoever dies: the agent can do each command, and D4 comes out."""
    world, naive = World(), Naive()
    for number in range(1, 5):
        world.join(number)
    for number, (word, *rest) in steps:
        is_member = any(owner == number for owner in world.owners.values())
        match word, rest:
            case "join", _ if number not in world.live or not is_member:
                if number in world.live:
                    assert world.answer(number, Join()).is_ok
                else:
                    world.join(number)
            case "kill", _ if number in world.live:
                world.kill(number)
                naive.drop(number)
            case "own", [bytes() as name, NameFlags() as flags] if is_member:
                outcome = naive.own(name, number, flags)
                answer = world.answer(number, Own(name, flags))
                assert answer.detail == {"outcome": outcome}
            case "release", [bytes() as name] if is_member:
                assert world.answer(number, Release(name)).is_ok
                naive.queues[name] = [e for e in naive.queues[name] if e[0] != number]
            case (("subscribe" | "unsubscribe" | "publish"), [Terms() | bytes() as what]) if (
                is_member
            ):
                kinds = {"subscribe": Subscribe, "unsubscribe": Unsubscribe, "publish": Publish}
                assert world.answer(number, kinds[str(word)](what)).is_ok
                if word != "publish":
                    assert (what in world.matches[number]) is (word == "subscribe")
            case "leave", _ if is_member:
                assert world.answer(number, Leave()).is_ok
                naive.drop(number)
            case "evict", _ if is_member:
                world.authority.evict(world.source(number))
                world.settle()
                naive.drop(number)
        names = {name: who for name, who in world.owners.items() if name in NAMES}
        assert names == naive.owners()
        joined = set(world.owners.values())
        assert len(world.authority.members()) == len(joined)


@settings(max_examples=1000)
@given(st.lists(st.tuples(st.integers(1, 3), STEPS), max_size=60))
def test_r1_each_request_is_answered_once(
    steps: list[tuple[int, tuple[object, ...]]],
) -> None:
    """With verdicts that come late and out of turn, and endpoints that vanish unnoticed."""
    world = World()
    for number in range(1, 4):
        world.join(number)
    world.held = deque()
    asked: dict[int, int] = {}
    for number, (word, *rest) in steps:
        requests: dict[str, Request] = {"join": Join(), "leave": Leave()}
        match word, rest:
            case "own", [bytes() as name, NameFlags() as flags]:
                requests["own"] = Own(name, flags)
            case "release", [bytes() as name]:
                requests["release"] = Release(name)
            case "subscribe", [Terms() | bytes() as what]:
                requests["subscribe"] = Subscribe(what)
            case "unsubscribe", [Terms() | bytes() as what]:
                requests["unsubscribe"] = Unsubscribe(what)
            case "publish", [Terms() | bytes() as what]:
                requests["publish"] = Publish(what)
        if word == "verdict" and world.held:
            world.decide(world.held[number % len(world.held)], bool(rest[0]))
        elif word == "kill" and number in world.live:
            world.kill(number)
        elif word == "vanish":
            # Its notice is still on the way.
            world.live.discard(number)
        elif word in requests and number in world.live:
            asked[world.ask(number, requests[str(word)])] = number
    while world.held:
        world.decide(world.held[0], True)
    missing = [who for serial, who in asked.items() if serial not in world.answers]
    assert [who for who in missing if who in world.live] == []
