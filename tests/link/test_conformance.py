"""One suite for both carriers: what an owner of a link may rely on, over QUIC and in memory."""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import replace
from functools import partial
from itertools import count, repeat
from typing import TYPE_CHECKING

import pytest
from tests.link.world import WORLDS, End, World, small

from afbus.link.effect import BodyEnded, BodyRoom, Down, Heard, Message, Room, Silent
from afbus.link.frame import Channel
from afbus.link.reason import Reason
from afbus.link.settings import ACK_BYTES, Settings
from afbus.proto.errors import IdentityError, InvalidArgument, LinkError, TooBig

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTROL, TABLES, DATA = Channel.CONTROL, Channel.TABLES, Channel.DATA
#: Times that let a test see a dead peer soon.
QUICK = small(beat_s=0.1, silent_s=0.4, idle_s=1.2, hello_s=1.0, flush_s=0.5)


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """One world, closed behind the test."""
    made: World = WORLDS[request.param]()
    yield made
    made.close()


def numbered(amount: int, seed: int, most: int = 3000) -> list[bytes]:
    """Messages of random sizes, each with its number."""
    rng = random.Random(seed)
    return [b"%08d" % n + bytes(rng.randrange(most)) for n in range(amount)]


def test_both_ends_know_each_other(world: World) -> None:
    """Identity by certificate, boot by HELLO, and each carrier lists its link."""
    a, b = world.add("a"), world.add("b")
    here, there = world.link(a, b)
    assert (here.link.peer, there.link.peer) == (b.identity, a.identity)
    assert here.link.boot == b.carrier.member.boot
    assert there.link.boot == a.carrier.member.boot
    assert a.carrier.links == (here.link,)
    assert b.carrier.links == (there.link,)
    assert here.link.is_up
    assert there.link.is_up


def test_a_link_can_send_from_its_first_moment(world: World) -> None:
    """Within accept, on both sides, with everything arriving in order."""

    def greet(end: End) -> None:
        for n in range(3):
            assert end.link.send(CONTROL, 0, b"hello %d" % n)

    a, b = world.add("a", on_accept=greet), world.add("b", on_accept=greet)
    here, there = world.link(a, b)
    for end in (here, there):
        world.wait(end.has_got(3))
        assert end.messages() == [b"hello 0", b"hello 1", b"hello 2"]


@pytest.mark.parametrize("loss", [0.0, 0.05], ids=["", "loss"])
def test_d11_order_holds_on_each_channel_in_both_directions(world: World, loss: float) -> None:
    """All messages of a channel arrive once, whole, and in order; also over a bad network."""
    a, b = world.add("a", settings=small()), world.add("b", settings=small())
    if loss:
        world.spoil(a, b, delay_s=0.002, loss=loss)
    here, there = world.link(a, b)
    sent = {}
    for n, (end, channel) in enumerate((e, c) for e in (here, there) for c in Channel):
        sent[end, channel] = numbered(300, n)
        world.send(end, channel, 7, iter(sent[end, channel]))
    others = {here: there, there: here}
    for (end, channel), messages in sent.items():
        other = others[end]
        world.wait(other.has_got(300, channel))
        assert other.messages(channel, 7) == messages


def test_a_stalled_destination_holds_up_nobody_else(world: World) -> None:
    """Its window fills and no more; the others of the link go on, the same channel included."""
    here, there = world.pair(small())
    there.stalled = {(DATA, 1)}
    world.send(here, DATA, 1, (bytes(8000) for _ in count()))
    assert here.link.room(DATA, 1) < 8000
    for other in ((DATA, 2), (TABLES, 1), (CONTROL, 1)):
        world.send(here, *other, iter(numbered(200, 1)))
    for channel, destination in ((DATA, 2), (TABLES, 1), (CONTROL, 1)):
        world.wait(there.has_got(200, channel, destination))
    stalled = there.messages(DATA, 1)
    assert 0 < len(stalled) <= 65_536 // 8128
    assert there.link.unread_bytes == len(stalled) * 8128


def test_memory_is_bounded_by_credits_on_both_sides(world: World) -> None:
    """Nobody reads anything: the sender is refused, and both ends hold what was agreed."""
    settings = small(destinations=4, bodies=3)
    here, there = world.pair(settings)
    there.is_stalled = True
    for destination in range(4):
        world.send(here, DATA, destination, repeat(bytes(8000), 30))
    for label in range(6):
        world.send_body(here, label, bytes(1 << 20))
    world.wait(lambda: here.link.in_flight_bytes < ACK_BYTES and there.link.unread_bytes > 400_000)
    world.let(0.05)
    assert there.link.unread_bytes <= settings.receive_bytes == 7 * 65_536
    assert here.link.in_flight_bytes <= settings.in_flight_bytes
    assert len(there.bodies) == 3
    there.resume()
    world.wait(lambda: len(there.whole_bodies()) == 6)


def test_room_is_told_once_for_each_refusal(world: World) -> None:
    """Refused, then told when the same would be taken; nobody else is told."""
    here, there = world.pair(small())
    there.is_stalled = True
    while here.link.send(DATA, 1, bytes(8000)):
        pass
    assert not here.link.send(DATA, 1, bytes(9000))
    world.wait(lambda: there.link.unread_bytes == 8 * 8128)
    assert not here.has(Room)
    there.resume()
    world.wait(lambda: here.has(Room))
    world.let(0.05)
    assert here.events == [Room(DATA, 1)]
    assert here.link.room(DATA, 1) >= 9000
    assert here.link.send(DATA, 1, bytes(9000))


def test_the_lane_moves_large_batches(world: World) -> None:
    """20 MiB in batches of up to 100 KiB to one destination, with the default settings."""
    here, there = world.pair()
    rng = random.Random(5)
    pool = rng.randbytes(1 << 20)
    digest, sent = hashlib.sha256(), 0
    batches = []
    while sent < 20 << 20:
        start = rng.randrange(1 << 19)
        batch = pool[start : start + rng.randint(1, 100 * 1024)]
        digest.update(batch)
        sent += len(batch)
        batches.append(batch)
    world.send(here, DATA, 0, iter(batches))
    world.wait(there.has_got(len(batches)), 60)
    assert hashlib.sha256(b"".join(there.messages())).digest() == digest.digest()


def test_bodies_arrive_whole_beside_messages(world: World) -> None:
    """Each on its own stream, with its own credit, empty ones too."""
    here, there = world.pair(small(bodies=4))
    rng = random.Random(3)
    sent = {label: rng.randbytes(size) for label, size in enumerate((0, 1, 70_000, 500_000) * 3)}
    for label, data in sent.items():
        world.send_body(here, label, data)
    messages = numbered(200, 8)
    world.send(here, DATA, 0, iter(messages))
    world.wait(lambda: len(there.whole_bodies()) == 12 and len(there.messages()) == 200)
    assert there.whole_bodies() == sent
    assert there.messages() == messages


def test_a_cut_body_is_told(world: World) -> None:
    """Its receiver knows that it is not whole, and its place is free again."""
    here, there = world.pair(small(bodies=1))
    body = here.link.open_body(9, 100)
    assert body is not None
    assert here.link.send_body(body, b"x" * 40)
    assert here.link.open_body(10, 5) is None
    here.link.cut_body(body)
    world.wait(lambda: here.has(BodyRoom))
    assert there.events[-1] == BodyEnded(body, False)
    assert not there.whole_bodies()
    world.send_body(here, 10, b"whole")
    world.wait(lambda: there.whole_bodies() == {10: b"whole"})


def test_destinations_come_and_go(world: World) -> None:
    """There are more of them in time than at a time: idle ones make place by themselves."""
    here, there = world.pair(small(destinations=3))
    for destination in range(20):
        world.send(here, DATA, destination, iter([b"%d" % destination]))
    world.wait(there.has_got(20))
    assert sorted(int(data) for data in there.messages()) == list(range(20))
    here.link.forget(DATA, 19)
    world.send(here, DATA, 19, iter([b"again"]))
    world.wait(there.has_got(21))


def test_case18_too_large_is_refused_at_once_and_the_rest_flows(world: World) -> None:
    """EMSGSIZE at the call; nothing was sent, and nothing is held up."""
    here, there = world.pair(small())
    with pytest.raises(TooBig):
        here.link.send(DATA, 0, bytes(32_769))
    assert here.link.send(DATA, 0, bytes(32_768))
    world.wait(there.has_got(1))
    with pytest.raises(InvalidArgument):
        here.link.open_body(1, -1)


def test_d20_close_flushes(world: World) -> None:
    """Everything that was accepted before is delivered, then both are told the reason."""
    here, there = world.pair(small())
    messages = numbered(20, 4, 2000)
    for message in messages:
        assert here.link.send(DATA, 0, message)
    here.link.close(Reason.GOING_DOWN, "restart")
    assert not here.link.send(DATA, 0, b"late")
    world.wait(lambda: here.has(Down) and there.has(Down))
    assert there.messages() == messages
    assert here.down == Down(Reason.GOING_DOWN, "restart", is_remote=False)
    assert there.down == Down(Reason.GOING_DOWN, "restart", is_remote=True)
    assert not here.link.is_up
    assert here.link.is_down


def test_d20_close_delivers_what_comes_meanwhile(world: World) -> None:
    """Who closes reads on until its own has been read."""
    a, b = world.add("a"), world.add("b")
    world.spoil(a, b, delay_s=0.03, loss=0)
    here, there = world.link(a, b)
    there.link.send(DATA, 0, b"crossing")
    here.link.close(Reason.CLOSED, "")
    world.wait(lambda: there.has(Down))
    assert here.messages() == [b"crossing"]


def test_close_ends_in_time_when_the_peer_is_gone(world: World) -> None:
    """The flush has an end."""
    a, b = world.add("a", settings=QUICK), world.add("b", settings=QUICK)
    here, _ = world.link(a, b)
    world.kill(b)
    start = world.now()
    here.link.send(DATA, 0, b"into nothing")
    here.link.close(Reason.CLOSED, "bye")
    world.wait(lambda: here.has(Down))
    assert 0.45 < world.now() - start < 5
    assert here.down == Down(Reason.CLOSED, "bye", is_remote=False)


def test_after_the_end_calls_do_nothing(world: World) -> None:
    """No exception, no effect: owners may be late."""
    here, there = world.pair()
    there.is_stalled = True
    here.link.send(DATA, 0, b"x")
    body = here.link.open_body(1, 10)
    assert body is not None
    world.wait(there.has_got(1))
    here.link.close(Reason.REPLACED, "")
    world.wait(lambda: there.has(Down))
    assert here.link.room(DATA, 0) == -1
    assert not here.link.send(DATA, 0, b"x")
    assert here.link.open_body(2, 10) is None
    assert not here.link.send_body(body, b"x")
    assert here.link.body_room(body) == 0
    here.link.cut_body(body)
    here.link.forget(DATA, 0)
    here.link.close(Reason.CLOSED, "again")
    there.link.release(DATA, 0, 129)
    world.let(0.02)
    assert here.events == [Down(Reason.REPLACED, "", is_remote=False)]
    assert there.down == Down(Reason.REPLACED, "", is_remote=True)


def test_each_end_can_dial_again(world: World) -> None:
    """After an end the same members make a new link, in both directions."""
    a, b = world.add("a"), world.add("b")
    for source, target in ((a, b), (b, a), (a, b)):
        here, there = world.link(source, target)
        world.send(here, DATA, 0, iter([b"once more"]))
        world.wait(there.has_got(1))
        here.link.close(Reason.CLOSED, "")
        world.wait(partial(there.has, Down))
        world.wait(partial(here.has, Down))
    assert a.carrier.links == b.carrier.links == ()


def test_case13_a_black_hole_shorter_than_idle_loses_nothing(world: World) -> None:
    """Silent, then heard, and everything arrives in order."""
    settings = replace(QUICK, idle_s=8.0)
    a, b = world.add("a", settings=settings), world.add("b", settings=settings)
    world.spoil(a, b, delay_s=0.001, loss=0)
    here, there = world.link(a, b)
    world.cut(a, b)
    world.cut(b, a)
    messages = numbered(20, 1, 1000)
    for message in messages:
        here.link.send(DATA, 0, message)
    world.wait(lambda: here.has(Silent) and there.has(Silent))
    assert here.link.is_silent
    world.heal(a, b)
    world.heal(b, a)
    world.wait(lambda: here.has(Heard) and there.has(Heard) and len(there.messages()) == 20)
    assert there.messages() == messages
    assert not here.link.is_silent


def test_case13_a_long_black_hole_ends_the_link_at_both_ends(world: World) -> None:
    """Within the idle time; after the heal they find each other again."""
    a, b = world.add("a", settings=QUICK), world.add("b", settings=QUICK)
    world.spoil(a, b, delay_s=0.001, loss=0)
    here, there = world.link(a, b)
    start = world.now()
    world.cut(a, b)
    world.cut(b, a)
    world.wait(lambda: here.has(Down) and there.has(Down))
    assert world.now() - start < QUICK.idle_s + 2
    assert here.down.reason is there.down.reason is Reason.SILENT
    world.heal(a, b)
    world.heal(b, a)
    assert world.link(a, b)[0].link.is_up


def test_d16_a_cut_in_one_direction_is_noticed_at_both_ends(world: World) -> None:
    """Who hears but is not heard has no confirmation either."""
    a, b = world.add("a", settings=QUICK), world.add("b", settings=QUICK)
    world.spoil(a, b, delay_s=0.001, loss=0)
    here, there = world.link(a, b)
    world.cut(a, b)
    world.wait(lambda: here.has(Silent) and there.has(Silent))
    world.wait(lambda: here.has(Down) and there.has(Down))


def test_case14_a_killed_peer_is_noticed(world: World) -> None:
    """Within the time of silence and a beat, not the idle time."""
    a, b = world.add("a"), world.add("b")
    here, _ = world.link(a, b)
    world.let(0.5)
    start = world.now()
    world.kill(b)
    world.wait(lambda: here.has(Silent))
    assert world.now() - start <= 2.0


@pytest.mark.parametrize(
    ("stream", "garbage", "reason"),
    [
        (0, b"\xff" * 16, Reason.MALFORMED),
        (2, bytes([2, 1, 0, 0]) + bytes(12), Reason.MALFORMED),
        (2, bytes([2, 0, 0, 0, 255, 255, 255, 255]) + bytes(8), Reason.LIMIT),
        (1, bytes([6, 0, 0, 0, 8, 0, 0, 0]) + bytes(16), Reason.ORDER),
        (0, bytes([6, 0, 0, 0, 8, 0, 0, 0]) + bytes(8) + b"\xff" * 8, Reason.ORDER),
        (0, bytes([1, 0, 0, 0, 1, 0, 0, 0]) + bytes(8) + b"\xc0", Reason.ORDER),
    ],
)
def test_garbage_ends_that_link_alone_with_a_reason(
    world: World, stream: int, garbage: bytes, reason: Reason, caplog: pytest.LogCaptureFixture
) -> None:
    """Both ends hear the reason and log the rule; another link of the same member goes on."""
    caplog.set_level(logging.INFO, "afbus.link")
    a, b, c = (world.add(name) for name in "abc")
    here, there = world.link(a, b)
    other, at_b = world.link(c, b)
    here.link._wire.write(stream, garbage, False)
    world.wait(lambda: here.has(Down) and there.has(Down))
    assert (there.down.reason, there.down.is_remote) == (reason, False)
    assert (here.down.reason, here.down.is_remote) == (reason, True)
    line = f"link to {here.link.bearer.identity} has ended: {reason.rule}: "
    assert any(record.message.startswith(line) for record in caplog.records)
    world.send(other, DATA, 0, iter([b"not me"]))
    world.wait(lambda: at_b.messages() == [b"not me"])


def test_who_sends_more_than_its_credit_is_cut(world: World) -> None:
    """A peer that does not count is no peer (a stolen window is memory)."""
    here, there = world.pair(small())
    there.is_stalled = True
    frame = bytes([2, 0, 0, 0]) + (30_000).to_bytes(4, "little") + bytes(8) + bytes(30_000)
    for _ in range(3):
        here.link._wire.write(DATA, frame, False)
    world.wait(lambda: there.has(Down))
    assert there.down.reason is Reason.CREDIT
    assert there.link.unread_bytes <= 65_536


def test_nobody_there_is_told_in_time(world: World) -> None:
    """A dial ends, with an error that says to try again."""
    a, b = world.add("a"), world.add("b")
    world.kill(b)
    start = world.now()
    outcome = world.call(a, b)
    assert type(outcome.error) is LinkError
    assert outcome.error.retryable
    assert world.now() - start <= 4
    assert not a.ends


def test_a_member_that_goes_takes_its_links_with_it(world: World) -> None:
    """close of the carrier ends all links, and their peers are told."""
    a, b, c = (world.add(name) for name in "abc")
    here, _ = world.link(a, c)
    also, _ = world.link(b, c)
    c.carrier.close()
    world.wait(lambda: here.has(Down) and also.has(Down))
    assert all(end.has(Down) for end in c.ends)
    assert c.carrier.links == ()
    assert here.down.reason is Reason.CARRIER
    assert here.down.is_remote


def test_crossing_dials_give_two_links(world: World) -> None:
    """Both ends dial at once: two links, each whole; the owners choose."""
    a, b = world.add("a"), world.add("b")
    one, other = world.dial(a, b), world.dial(b, a)
    world.wait(lambda: len(a.ends) == len(b.ends) == 2)
    assert len(one.results) == len(other.results) == 1
    for place in (a, b):
        assert {end.link.is_dialed for end in place.ends} == {True, False}


def test_a_message_is_the_owner_s_to_keep(world: World) -> None:
    """What was handed over does not change, whatever comes after."""
    here, there = world.pair()
    buffer = bytearray(b"first")
    here.link.send(DATA, 0, memoryview(buffer))
    buffer[:] = b"other"
    world.wait(there.has_got(1))
    assert there.messages() == [b"first"]
    assert isinstance(there.events[0], Message)


@pytest.mark.parametrize(
    "sizes",
    [
        {"window_bytes": 1000},
        {"message_bytes": 0},
        {"in_flight_bytes": 1000},
        {"destinations": 0},
        {"bodies": 101},
        {"beat_s": 3.0},
        {"idle_s": 1.0},
    ],
)
def test_settings_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    """At once, and not by a link that hangs."""
    with pytest.raises(InvalidArgument):
        replace(Settings(), **sizes)


def test_wrong_claim_is_final(world: World) -> None:
    """Somebody else answers: no link, and trying again does not help."""
    a, b = world.add("a"), world.add("b")
    world.add("c")
    outcome = world.call(a, b, world.places["c"].identity)
    assert isinstance(outcome.error, IdentityError)
    assert not outcome.error.retryable
    assert a.reasons() == ["certificate-of-other-name"]
