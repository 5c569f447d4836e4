"""The core without a carrier: order and credit against a slow model, and hostile bytes."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from afbus.link import frame
from afbus.link.core import LinkCore, State
from afbus.link.effect import (
    BodyEnded,
    BodyOpened,
    BodyReceived,
    Cut,
    Down,
    Effect,
    Heard,
    Message,
    Ping,
    Room,
    Silent,
    Up,
    Write,
)
from afbus.link.frame import BODY, Broken, Channel, FrameKind, FrameReader, Hello
from afbus.link.reason import Reason
from afbus.link.settings import MESSAGE_COST, Settings
from afbus.proto.errors import InvalidArgument, LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = Settings(
    window_bytes=4096,
    destinations=3,
    bodies=2,
    message_bytes=2048,
    in_flight_bytes=1 << 18,
    beat_s=0.4,
    silent_s=1.6,
)
BOOT = bytes(range(16))


class Pair:
    """Two cores and the streams between them, each with an order of its own."""

    def __init__(self, settings: Settings = SMALL) -> None:
        self.now = 0.0
        self.cores = [LinkCore(settings, bytes([n]) * 16, 0.0) for n in range(2)]
        self.streams: list[dict[int, deque[tuple[bytes, bool]]]] = [{}, {}]
        self.events: list[list[Effect]] = [[], []]
        self.take()

    def take(self) -> None:
        """Apply the effects of both."""
        for side, core in enumerate(self.cores):
            for effect in core.take_effects():
                if isinstance(effect, Write):
                    queue = self.streams[side].setdefault(effect.stream, deque())
                    queue.append((effect.data, effect.end))
                elif isinstance(effect, Ping):
                    core.receive_echo(effect.number, self.now)
                else:
                    self.events[side].append(effect)

    def carry(self, side: int, stream: int, cut: int | None = None) -> None:
        """Deliver the next piece of one stream, or the first bytes of it."""
        queue = self.streams[side][stream]
        data, end = queue.popleft()
        if cut is not None and 0 < cut < len(data):
            queue.appendleft((data[cut:], end))
            data, end = data[:cut], False
        if not queue:
            del self.streams[side][stream]
        self.cores[1 - side].receive_data(stream, data, end, self.now)
        self.take()

    def carry_all(self) -> None:
        """Deliver everything, and what follows from it."""
        while any(self.streams):
            for side in range(2):
                while self.streams[side]:
                    self.carry(side, next(iter(self.streams[side])))


def up() -> Pair:
    """Two cores that know each other, with no events but those to come."""
    pair = Pair()
    pair.carry_all()
    assert [core.state for core in pair.cores] == [State.UP, State.UP]
    pair.events = [[], []]
    return pair


class LinkMachine(RuleBasedStateMachine):
    """One direction of a link, streams in any order to each other, against plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = up()
        #: What was accepted and has not arrived, by channel and destination.
        self.sent: dict[tuple[int, int], deque[bytes]] = {}
        #: What has arrived and was not released.
        self.unread: list[Message | BodyReceived] = []
        #: Bodies that are being sent: what is left, and all of it.
        self.bodies: dict[int, tuple[bytes, bytes]] = {}
        self.whole: dict[int, bytes] = {}
        self.cut: set[int] = set()
        self.arriving: dict[int, bytes] = {}
        self.number = 0
        self.refused: set[tuple[int, int]] = set()

    @rule(
        channel=st.sampled_from(Channel), destination=st.integers(0, 5), size=st.integers(0, 2048)
    )
    def send(self, channel: Channel, destination: int, size: int) -> None:
        """A message; whether it is taken is what `room` has said before."""
        core = self.pair.cores[0]
        self.number += 1
        data = self.number.to_bytes(4, "big") + bytes(size)
        data = data[: max(4, size)]
        room = core.room(channel, destination)
        is_taken = core.send(channel, destination, data)
        assert is_taken == (len(data) <= room)
        if is_taken:
            self.sent.setdefault((channel, destination), deque()).append(data)
        else:
            self.refused.add((channel, destination))
        self._take()

    @rule(size=st.integers(0, 9000))
    def open_body(self, size: int) -> None:
        """A body begins, if there is a place."""
        body = self.pair.cores[0].open_body(self.number, size)
        if body is not None:
            data = random.Random(size).randbytes(size)
            self.bodies[body] = (data, data)
            if not size:
                self.whole[body] = self.bodies.pop(body)[1]
        self._take()

    @precondition(lambda self: self.bodies)
    @rule(data=st.data(), size=st.integers(1, 2048))
    def send_body(self, data: st.DataObject, size: int) -> None:
        """The next piece of a body."""
        body = data.draw(st.sampled_from(sorted(self.bodies)))
        left, all_of_it = self.bodies[body]
        core = self.pair.cores[0]
        room = core.body_room(body)
        piece = left[:size]
        assert core.send_body(body, piece) == (len(piece) <= room)
        if len(piece) <= room:
            self.bodies[body] = (left[len(piece) :], all_of_it)
            if len(piece) == len(left):
                self.whole[body] = self.bodies.pop(body)[1]
        self._take()

    @precondition(lambda self: self.bodies)
    @rule(data=st.data())
    def cut_body(self, data: st.DataObject) -> None:
        """A body is given up."""
        body = data.draw(st.sampled_from(sorted(self.bodies)))
        self.pair.cores[0].cut_body(body)
        del self.bodies[body]
        self.cut.add(body)
        self._take()

    @rule(channel=st.sampled_from(Channel), destination=st.integers(0, 5))
    def forget(self, channel: Channel, destination: int) -> None:
        """A destination is not needed for now."""
        self.pair.cores[0].forget(channel, destination)
        self._take()

    @rule(data=st.data(), cut=st.one_of(st.none(), st.integers(1, 3000)))
    def carry(self, data: st.DataObject, cut: int | None) -> None:
        """A piece of some stream arrives."""
        places = [(side, stream) for side in range(2) for stream in self.pair.streams[side]]
        if places:
            self.pair.carry(*data.draw(st.sampled_from(sorted(places))), cut)
        self._take()

    @precondition(lambda self: self.unread)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """The owner has read something, in any order."""
        event = self.unread.pop(data.draw(st.integers(0, len(self.unread) - 1)))
        self._release(event)
        self._take()

    def _release(self, event: Message | BodyReceived) -> None:
        core = self.pair.cores[1]
        if isinstance(event, Message):
            core.release(event.channel, event.destination, event.cost)
        else:
            core.release_body(event.body, len(event.data))

    def _take(self) -> None:
        self.pair.take()
        for event in self.pair.events[1]:
            match event:
                case Message(channel, destination, data):
                    assert self.sent[channel, destination].popleft() == data
                    self.unread.append(event)
                case BodyOpened(body):
                    assert body not in self.arriving
                    self.arriving[body] = b""
                case BodyReceived(body, data):
                    self.arriving[body] += data
                    self.unread.append(event)
                case BodyEnded(body, is_whole):
                    got = self.arriving.pop(body)
                    assert is_whole == (body in self.whole) != (body in self.cut)
                    if is_whole:
                        assert self.whole.pop(body) == got
                case _:
                    raise AssertionError(event)
        for event in self.pair.events[0]:
            if isinstance(event, Room):
                assert (event.channel, event.destination) in self.refused
                self.refused.discard((event.channel, event.destination))
        self.pair.events = [[], []]

    @invariant()
    def what_is_held_is_bounded(self) -> None:
        """The receiver holds what its windows allow for, and counts as the model does."""
        core = self.pair.cores[1]
        held = sum(e.cost if isinstance(e, Message) else len(e.data) for e in self.unread)
        assert core.unread_bytes == held <= SMALL.receive_bytes
        assert self.pair.cores[0].in_flight_bytes <= SMALL.in_flight_bytes

    def teardown(self) -> None:
        """Once all is carried and read, all has arrived, and whoever waited was told."""
        while True:
            self.pair.carry_all()
            self._take()
            if not self.unread:
                break
            self._release(self.unread.pop())
            self._take()
        # Who is told and does not come leaves its place to the next, with the next beat.
        for _ in range(20):
            self.pair.carry_all()
            self._take()
        assert not any(self.sent.values())
        assert not self.whole
        assert not self.refused
        assert [core.state for core in self.pair.cores] == [State.UP, State.UP]


LinkMachine.TestCase.settings = hypothesis_settings(
    max_examples=120, stateful_step_count=60, deadline=None
)
TestLink = LinkMachine.TestCase


@pytest.mark.parametrize("seed", range(50))
def test_the_two_greet_each_other_however_their_streams_interleave(seed: int) -> None:
    """Byte by byte, in any order between streams and sides; up comes first, and once."""
    order = random.Random(seed)
    pair = Pair()
    is_sent = [False, False]
    while any(pair.streams):
        side = order.choice([n for n in range(2) if pair.streams[n]])
        pair.carry(side, order.choice(list(pair.streams[side])), order.randint(1, 40))
        for n, core in enumerate(pair.cores):
            if core.state is State.UP and not is_sent[n]:
                is_sent[n] = True
                assert all(core.send(channel, 0, b"first") for channel in Channel)
        pair.take()
    for events in pair.events:
        assert [type(event) for event in events] == [Up, Message, Message, Message]


def hello(**other: object) -> bytes:
    """A HELLO as its frame."""
    made = Hello(1, 1, BOOT, 4096, 3, 2, 2048)
    return frame.encode(FrameKind.HELLO, 0, replace(made, **other).encode())  # type: ignore[arg-type]  # one value a field


def ending(*pieces: tuple[int, bytes]) -> Down | None:
    """How a core ends that receives these pieces after nothing."""
    core = LinkCore(SMALL, BOOT, 0.0)
    for stream, data in pieces:
        core.receive_data(stream, data, False, 0.0)
    downs = [effect for effect in core.take_effects() if isinstance(effect, Down)]
    assert core.take_effects() == [] or not downs
    return downs[0] if downs else None


ACK0 = frame.encode_number(FrameKind.ACK, 0)


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([(0, hello(oldest=2, newest=3))], Reason.VERSION),
        ([(0, hello(newest=7) + ACK0)], None),
        ([(0, hello(boot=b"short"))], Reason.MALFORMED),
        ([(0, hello(window_bytes=1 << 40))], Reason.MALFORMED),
        ([(0, hello(message_bytes=4096))], Reason.MALFORMED),
        ([(0, hello(bodies=101))], Reason.MALFORMED),
        ([(0, hello(destinations=0))], Reason.MALFORMED),
        ([(0, frame.encode(FrameKind.HELLO, 0, b"\xc1"))], Reason.MALFORMED),
        ([(0, frame.encode(FrameKind.HELLO, 0, bytes(257)))], Reason.LIMIT),
        ([(0, hello() + hello())], Reason.ORDER),
        ([(0, ACK0)], Reason.ORDER),
        ([(2, hello())], Reason.ORDER),
        ([(3, bytes(16))], Reason.ORDER),
        ([(0, hello() + frame.encode(FrameKind.MESSAGE, 0, b"x"))], Reason.ORDER),
        ([(0, hello() + frame.encode(FrameKind.FORGET, 0))], Reason.ORDER),
        ([(0, hello() + ACK0), (2, frame.encode(FrameKind.MESSAGE, 0, bytes(2049)))], Reason.LIMIT),
        ([(0, hello() + ACK0), (2, ACK0)], Reason.ORDER),
        ([(0, hello() + frame.encode_number(FrameKind.ACK, 1 << 40))], Reason.ORDER),
        ([(0, hello() + frame.encode(FrameKind.ACK, 0, b"1234567"))], Reason.MALFORMED),
        ([(0, hello() + ACK0 + frame.encode_credits([((2, 0), 9999)]))], Reason.CREDIT),
        ([(0, hello() + ACK0 + frame.encode_credits([((BODY, 3), 9)]))], Reason.CREDIT),
        ([(0, hello() + ACK0 + frame.encode_credits([((3, 0), 9)]))], Reason.MALFORMED),
        ([(0, hello() + ACK0 + frame.encode(FrameKind.CREDIT, 0, bytes(23)))], Reason.MALFORMED),
        ([(0, hello() + ACK0 + frame.encode_forgotten((2, 0)))], Reason.ORDER),
        ([(0, hello() + ACK0 + frame.encode(FrameKind.FORGOTTEN, 0, b"x"))], Reason.MALFORMED),
        (
            [(0, hello() + ACK0)]
            + [(2, frame.encode(FrameKind.MESSAGE, number, b"")) for number in range(4)],
            Reason.LIMIT,
        ),
        (
            [(0, hello() + ACK0)]
            + [(2, frame.encode(FrameKind.MESSAGE, 0, bytes(2000))) for _ in range(2)],
            Reason.CREDIT,
        ),
        ([(0, hello() + ACK0)] + [(n, frame.encode_body(0, 1)) for n in (3, 4, 5)], Reason.LIMIT),
        ([(0, hello() + ACK0), (3, frame.encode_body(0, 1) + b"12")], Reason.MALFORMED),
        ([(0, hello() + ACK0), (3, frame.encode_body(0, 5000) + bytes(4097))], Reason.CREDIT),
        (
            [
                (0, hello() + ACK0),
                (2, frame.encode(FrameKind.MESSAGE, 0, b"x")),
                (2, frame.encode(FrameKind.FORGET, 0) + frame.encode(FrameKind.MESSAGE, 0)),
            ],
            Reason.ORDER,
        ),
    ],
)
def test_each_broken_rule_ends_the_link_with_its_reason(
    pieces: list[tuple[int, bytes]], reason: Reason | None
) -> None:
    """What the peer may not send, it is told why."""
    got = ending(*pieces)
    assert (got and got.reason) == reason


@pytest.mark.parametrize(
    ("data", "end", "reason"),
    [(b"", True, Reason.MALFORMED), (bytes(15), True, Reason.MALFORMED)],
)
def test_a_body_without_a_head_is_broken(data: bytes, end: bool, reason: Reason) -> None:
    """Its label must be there."""
    core = LinkCore(SMALL, BOOT, 0.0)
    core.receive_data(0, hello() + ACK0, False, 0.0)
    core.receive_data(3, data, end, 0.0)
    assert Cut(reason, "body 3 ends in its head") in core.take_effects()


def test_a_body_that_goes_on_behind_its_end_is_broken() -> None:
    """As long as it is not read for good it is not forgotten."""
    core = LinkCore(SMALL, BOOT, 0.0)
    core.receive_data(0, hello() + ACK0, False, 0.0)
    core.receive_data(3, frame.encode_body(0, 5) + b"12345", True, 0.0)
    core.receive_data(3, b"6", False, 0.0)
    assert isinstance(core.take_effects()[-1], Down)


def test_case42_hostile_bytes_only_end_the_link() -> None:
    """100,000 mutated, cut and reordered pieces (seeded): no exception, and memory is bounded."""
    rng = random.Random(42)
    good = [
        (0, hello() + ACK0),
        (2, frame.encode(FrameKind.MESSAGE, 1, bytes(500))),
        (1, frame.encode(FrameKind.MESSAGE, 1, bytes(300))),
        (2, frame.encode(FrameKind.FORGET, 1)),
        (0, frame.encode_credits([((2, 1), 5000), ((BODY, 3), 6000)])),
        (0, frame.encode_forgotten((2, 1))),
        (0, frame.encode_number(FrameKind.ACK, 90)),
        (0, frame.encode_number(FrameKind.FLUSH, 4000)),
        (3, frame.encode_body(7, 100) + bytes(100)),
        (4, frame.encode_body(8, 100) + bytes(50)),
    ]
    pieces = 0
    reasons = set()
    while pieces < 100_000:
        core = LinkCore(SMALL, BOOT, 0.0)
        core.receive_data(0, hello() + ACK0, False, 0.0)
        core.take_effects()
        core.send(Channel.DATA, 1, bytes(100))
        while core.state is not State.DOWN and rng.random() < 0.98:
            pieces += 1
            stream, data = rng.choice(good[1:])
            if rng.random() < 0.5:
                mutated = bytearray(data)
                for _ in range(rng.randint(1, 3)):
                    mutated[rng.randrange(len(mutated))] = rng.choice((0, 1, 2, 255, 128))
                data = bytes(mutated)
            if rng.random() < 0.1:
                data = data[: rng.randrange(len(data))]
            if rng.random() < 0.1:
                stream = rng.randrange(6)
            core.receive_data(stream, data, rng.random() < 0.05, 0.0)
            for effect in core.take_effects():
                if isinstance(effect, Down):
                    reasons.add(effect.reason)
            assert core.unread_bytes <= SMALL.receive_bytes
    assert reasons >= {Reason.MALFORMED, Reason.LIMIT, Reason.ORDER, Reason.CREDIT}


def test_a_reader_raises_broken_and_nothing_else() -> None:
    """And holds less than one frame."""
    rng = random.Random(1)
    for _ in range(3000):
        reader = FrameReader(1000)
        try:
            for _ in range(5):
                list(reader.feed(rng.randbytes(rng.randrange(60))))
        except Broken:
            pass
        assert len(reader._held) < 1000 + frame.HEADER_BYTES


# --- time ---


def times(core: LinkCore) -> Callable[[float], list[Effect]]:
    """Lets time pass up to a moment, step by step, and returns what happened but for pings."""

    def until(moment: float) -> list[Effect]:
        happened: list[Effect] = []
        while (timer := core.get_timer()) is not None and timer <= moment:
            core.handle_timer(timer)
            happened += [e for e in core.take_effects() if not isinstance(e, Ping)]
        return happened

    return until


def test_case14_silence_is_told_and_then_ends_the_link() -> None:
    """Silent after 1.6 s, gone after 10 s, counted from the last ping that was confirmed."""
    core = up().cores[0]
    until = times(core)
    assert until(1.59) == []
    assert until(1.61) == [Silent()]
    assert core.is_silent
    assert until(9.99) == []
    text = "no sign of the peer for 10.0 s"
    assert until(10.1) == [Cut(Reason.SILENT, text), Down(Reason.SILENT, text, is_remote=False)]
    assert core.get_timer() is None


def test_an_echo_counts_from_when_its_ping_was_sent() -> None:
    """A late answer says that the peer lived then, not now."""
    core = up().cores[0]
    until = times(core)
    until(1.7)
    core.take_effects()
    core.receive_echo(2, 1.7)
    # The second ping, at 0.4 s, is not old enough to be silent at 1.7 s.
    assert core.take_effects() == [Heard()]
    assert until(1.99) == []
    assert until(2.01) == [Silent()]


def test_a_ping_is_urgent_once_nothing_comes_back() -> None:
    """So that it does not wait behind what was sent."""
    core = up().cores[0]
    pings: list[Ping] = []
    for _ in range(12):
        timer = core.get_timer()
        assert timer is not None
        core.handle_timer(timer)
        pings += [e for e in core.take_effects() if isinstance(e, Ping)]
    assert [ping.is_urgent for ping in pings[:3]] == [False] * 3
    assert pings[-1].is_urgent


def test_a_process_that_was_stopped_itself_does_not_blame_its_peer() -> None:
    """After 30 s of SIGSTOP the answers may still be waiting to be read."""
    core = up().cores[0]
    core.take_effects()
    core.handle_timer(30.0)
    effects = core.take_effects()
    assert [e for e in effects if isinstance(e, Silent | Down)] == []
    assert core.state is State.UP


def test_echoes_of_pings_that_were_never_sent_change_nothing() -> None:
    """The carrier is trusted, but not blindly."""
    core = up().cores[0]
    core.receive_echo(10**9, 0.0)
    assert times(core)(1.61) == [Silent()]


def test_who_says_no_hello_is_ended() -> None:
    """Within `hello_s`."""
    core = LinkCore(SMALL, BOOT, 0.0)
    core.take_effects()
    assert times(core)(4.9) == []
    assert isinstance(times(core)(5.0)[-1], Down)


def test_hello_alone_is_not_enough_to_be_up() -> None:
    """The peer must show that it has ours; then it is up at once."""
    core = LinkCore(SMALL, BOOT, 0.0)
    core.receive_data(0, hello(), False, 0.0)
    assert not [e for e in core.take_effects() if isinstance(e, Up)]
    assert core.state is State.OPENING
    assert not core.send(Channel.DATA, 0, b"early")
    core.receive_data(2, frame.encode(FrameKind.MESSAGE, 4, b"first"), False, 0.0)
    kinds = [type(e) for e in core.take_effects() if not isinstance(e, Write)]
    assert kinds == [Up, Ping, Message]


def test_a_peer_that_only_asks_and_never_reads_is_ended() -> None:
    """Answers go beyond the bound of what may be in flight; so there is one for them too."""
    settings = replace(SMALL, in_flight_bytes=140_000)
    core = LinkCore(settings, BOOT, 0.0)
    core.receive_data(0, hello() + ACK0, False, 0.0)
    core.take_effects()
    ask = frame.encode_number(FrameKind.FLUSH, 0)
    for _ in range(50_000):
        core.receive_data(0, ask, False, 0.0)
        downs = [e for e in core.take_effects() if isinstance(e, Down)]
        if downs:
            assert downs[0].reason is Reason.LIMIT
            return
    raise AssertionError("never ended")


def test_what_a_body_may_not_do() -> None:
    """Wrong calls of the owner are its own errors."""
    core = up().cores[0]
    body = core.open_body(1, 10)
    assert body is not None
    with pytest.raises(InvalidArgument):
        core.send_body(body, bytes(11))
    core.send_body(body, bytes(10))
    for call in (lambda: core.send_body(body, b""), lambda: core.cut_body(body)):
        with pytest.raises(LocalProtocolError):
            call()


def test_case35_who_is_revoked_is_not_waited_for() -> None:
    """Also if the link was about to end in good order; any other reason leaves it its time."""
    pair = up()
    here, states = pair.cores[0], []
    for reason in (Reason.GOING_DOWN, Reason.LIMIT, Reason.REVOKED):
        here.close(reason, "stolen", 0.0)
        states.append(here.state)
    assert states == [State.CLOSING, State.CLOSING, State.DOWN]
    pair.take()
    assert pair.events[0] == [Cut(Reason.REVOKED, "stolen"), Down(Reason.REVOKED, "stolen", False)]


def test_credit_comes_back_in_few_frames() -> None:
    """A message of the smallest cost needs no answer of its own."""
    pair = up()
    here, there = pair.cores
    answers = 0
    for _ in range(1000):
        assert here.send(Channel.DATA, 0, b"")
        pair.take()
        pair.carry_all()
        there.release(Channel.DATA, 0, MESSAGE_COST)
        pair.take()
        answers += sum(map(len, pair.streams[1].values()))
        pair.carry_all()
    assert answers <= 1000 * MESSAGE_COST // (SMALL.window_bytes // 4) + 2


def test_reasons_keep_their_numbers() -> None:
    """They are on the wire."""
    assert [reason.value for reason in Reason] == list(range(14))
    assert Reason.NOT_ADMITTED.rule == "not-admitted"
    assert not Reason.REVOKED.is_retryable
    assert Reason.SILENT.is_retryable


def test_down_says_who_has_ended() -> None:
    """One line for the log, with what is odd in the text escaped."""
    assert str(Down(Reason.CLOSED, "a\nb", is_remote=True)) == r"closed: 'a\nb' (by the peer)"
