"""A link that is kept up: where it calls next, how long it waits, and that it always comes back."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.link.authority import node
from tests.link.world import ISSUING, MemoryWorld, NativeWorld, Place, QuicWorld, World, small

from afbus.link.dialer import Call, Dialer, DialerCore, Waits, is_kept
from afbus.link.effect import Down
from afbus.link.frame import Channel
from afbus.link.reason import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from afbus.link.link import Link
    from afbus.proto.errors import LinkError

WAITS = Waits(first_s=1.0, longest_s=8.0, refused_s=60.0, steady_s=5.0)
#: As usual, but for the number of pings.
CALM = small(beat_s=1.0, silent_s=3.0)
QUICK = small(beat_s=0.1, silent_s=0.3, idle_s=0.6, hello_s=0.5, flush_s=0.3)


class Even:
    """Chance that always gives the same."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def random(self) -> float:
        """See the class."""
        return self.value


class Log:
    """A core whose calls all fail or not, as the test says, on a clock that jumps."""

    def __init__(self, *places: str, chance: Even | Random | None = None) -> None:
        self.now = 0.0
        self.core = DialerCore(places, chance or Even(), 0.0, WAITS)

    def next_call(self) -> tuple[float, str]:
        """When and where it calls next."""
        calls = self.core.take_effects()
        while not calls:
            timer = self.core.get_timer()
            assert timer is not None, "it calls never again"
            self.now = max(self.now, timer)
            self.core.handle_timer(self.now)
            calls = self.core.take_effects()
        (call,) = calls
        return self.now, call.place

    def fail(self, *, retryable: bool = True, after_s: float | None = None) -> None:
        """The call has failed."""
        self.core.receive_failure(self.now, retryable=retryable, after_s=after_s)

    def failing(self, amount: int) -> list[tuple[float, str]]:
        """So many calls, all of which fail."""
        calls = []
        for _ in range(amount):
            calls.append(self.next_call())
            self.fail()
        return calls


def test_places_are_called_in_turn_and_waits_grow_after_each_round() -> None:
    """At once, then 1, 2, 4, 8 and again 8 s, without chance."""
    log = Log("x", "y")
    times = [0.0, 1.0, 3.0, 7.0, 15.0, 23.0]
    assert log.failing(12) == [(time, place) for time in times for place in "xy"]


def test_chance_shortens_waits_by_up_to_a_half() -> None:
    """Never longer, never less than half."""
    calls = Log("x", chance=Even(0.0)).failing(6)
    assert [time for time, _ in calls] == [0, 0.5, 1.5, 3.5, 7.5, 11.5]


def test_a_round_begins_where_the_last_one_succeeded() -> None:
    """And waits are small again after a link that lived."""
    log = Log("x", "y", "z")
    log.failing(4)
    assert log.next_call() == (1.0, "y")
    log.core.receive_up(1.0, is_called=True)
    assert log.core.is_up
    assert log.core.get_timer() is None
    log.now = 100.0
    log.core.receive_down(100.0)
    assert log.failing(4) == [(101, "y"), (101, "z"), (101, "x"), (103, "y")]


def test_a_link_that_dies_at_once_is_no_success() -> None:
    """Who is accepted and thrown out in a circle waits longer and longer."""
    log = Log("x")
    times = []
    for _ in range(6):
        times.append(log.next_call()[0])
        log.core.receive_up(log.now, is_called=True)
        log.now += 1
        log.core.receive_down(log.now)
    assert [after - before - 1 for before, after in pairwise(times)] == [1, 2, 4, 8, 8]


def test_where_it_does_not_help_it_is_tried_rarely() -> None:
    """One place that refuses makes the round final; other places are tried all the same."""
    log = Log("x", "y")
    log.next_call()
    log.fail(retryable=False)
    assert log.next_call() == (0, "y")
    log.fail()
    assert log.next_call() == (60, "x")
    log.core.receive_up(60, is_called=True)
    log.core.receive_down(61, retryable=False)
    assert log.next_call() == (121, "x")


def test_who_says_when_is_not_asked_earlier() -> None:
    """`after_s` is the least wait."""
    log = Log("x", chance=Even(0.0))
    log.next_call()
    log.fail(after_s=20)
    assert log.next_call() == (20, "x")
    log.fail()
    assert log.next_call() == (21, "x")


def test_new_places_are_tried_at_once() -> None:
    """The same ones change nothing; no place, no call."""
    log = Log("x")
    log.failing(5)
    log.core.set_places(["x"], log.now)
    assert log.core.get_timer() != log.now
    log.core.set_places(["v", "w"], log.now)
    before = log.now
    assert log.next_call() == (before, "v")
    log.core.set_places([], log.now)
    log.fail()
    assert log.core.get_timer() is None
    assert log.core.take_effects() == []
    log.core.set_places(["u"], log.now)
    assert log.next_call() == (before, "u")


def test_hurry_ends_a_wait() -> None:
    """And nothing else."""
    log = Log("x")
    log.failing(5)
    now = log.now
    log.core.hurry(now)
    assert log.next_call() == (now, "x")
    log.core.hurry(now)
    assert log.core.take_effects() == []


def test_after_stop_there_is_nothing() -> None:
    """Whatever still happens."""
    log = Log("x")
    log.next_call()
    log.core.stop()
    log.fail()
    log.core.receive_up(0, is_called=True)
    log.core.receive_down(0)
    log.core.set_places(["y"], 0)
    log.core.hurry(0)
    log.core.handle_timer(1000)
    assert log.core.get_timer() is None
    assert log.core.take_effects() == []
    assert not log.core.is_up


@given(
    st.integers(),
    st.lists(st.sampled_from("up-called up-adopted down fail final tick hurry places".split())),
)
def test_there_is_never_more_than_one_call_under_way(seed: int, steps: list[str]) -> None:
    """Whatever happens in whatever order; and none is begun while a link is up."""
    log = Log("x", "y", chance=Random(seed))
    core = log.core
    under_way = False
    for step in [*steps, "tick"]:
        if step == "up-called" and under_way:
            under_way = False
            core.receive_up(log.now, is_called=True)
        elif step == "up-adopted":
            core.receive_up(log.now, is_called=False)
        elif step == "down":
            core.receive_down(log.now)
        elif step in ("fail", "final") and under_way:
            under_way = False
            core.receive_failure(log.now, retryable=step == "fail")
        elif step == "hurry":
            core.hurry(log.now)
        elif step == "places":
            core.set_places([str(seed), str(log.now)], log.now)
        elif step == "tick":
            log.now = max(log.now, core.get_timer() or 0.0)
            core.handle_timer(log.now)
        for call in core.take_effects():
            assert isinstance(call, Call)
            assert not under_way
            assert not core.is_up
            under_way = True
        assert core.is_up or under_way or core.get_timer() is not None


# --- with carriers ---


@pytest.fixture(params=[MemoryWorld, QuicWorld, NativeWorld], ids=["memory", "quic", "native"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """One world, closed behind the test."""
    made: World = request.param()
    yield made
    made.close()


def keep(world: World, source: Place, *targets: Place, errors: list[LinkError]) -> Dialer:
    """Keep a link from the one to a member at one or several places."""
    places = [world.address_of(source, target) for target in targets]
    claim = targets[-1].identity
    return Dialer(source.carrier, claim, places, Random(1), errors.append)


def has_link(dialer: Dialer) -> bool:
    """Whether its link is up."""
    return dialer.link is not None


def test_a_link_comes_back_whenever_it_ends(world: World) -> None:
    """Closed by either side, for reasons that may pass."""
    errors: list[LinkError] = []
    a, b = world.add("a"), world.add("b")
    dialer = keep(world, a, b, errors=errors)
    for n in range(4):
        world.wait(partial(has_link, dialer))
        assert len(a.ends) == n + 1
        world.wait(lambda: len(b.ends) == len(a.ends))
        (a, b)[n % 2].end.link.close(Reason.GOING_DOWN, "")
        world.wait(lambda: dialer.link is None)
    dialer.stop()
    before = len(a.ends)
    world.let(1.5)
    assert len(a.ends) == before
    assert errors == []


def test_the_next_place_is_tried_when_one_is_dead(world: World) -> None:
    """The member is found where it is, and the owner hears of the failures."""
    errors: list[LinkError] = []
    a, dead, b = world.add("a"), world.add("dead"), world.add("b")
    world.kill(dead)
    dialer = keep(world, a, dead, b, errors=errors)
    world.wait(partial(has_link, dialer))
    assert len(errors) == 1
    dialer.stop()


def test_case13_both_find_each_other_within_3_s_after_a_heal(world: World) -> None:
    """After a black hole that was longer than the idle time."""
    a, b = world.add("a", settings=QUICK), world.add("b", settings=QUICK)
    world.spoil(a, b, delay_s=0.001, loss=0)
    dialer = keep(world, a, b, errors=[])
    world.wait(partial(has_link, dialer))
    world.cut(a, b)
    world.cut(b, a)
    world.let(4 if isinstance(world, QuicWorld) else 300)
    assert dialer.link is None
    world.heal(a, b)
    world.heal(b, a)
    start = world.now()
    world.wait(partial(has_link, dialer))
    assert world.now() - start < 3
    dialer.stop()


def test_who_is_stopped_while_it_calls_gets_no_link(world: World) -> None:
    """The link that comes all the same is closed."""
    a, b = world.add("a"), world.add("b")
    dialer = keep(world, a, b, errors=[])
    world.wait(lambda: bool(a.ends) or bool(b.ends))
    dialer.stop()
    world.wait(lambda: all(e.has(Down) for p in (a, b) for e in p.ends if not has_link(dialer)))
    if dialer.link is None:
        assert a.carrier.links == ()


def test_crossing_dials_end_with_one_link_that_both_chose(world: World) -> None:
    """Both keep a link to the other, adopt what comes, and choose by the same rule."""
    a, b = world.add("a"), world.add("b")
    dialers = {p: keep(world, p, o, errors=[]) for p, o in ((a, b), (b, a))}
    links: dict[Place, Link] = {}

    def choose() -> bool:
        for place in (a, b):
            for end in place.ends:
                kept = links.get(place)
                if end.link is kept or end.link.is_down:
                    continue
                if kept is None or is_kept(place.identity, end.link, kept):
                    links[place] = end.link
                    dialers[place].adopt(end.link)
                    if kept is not None:
                        kept.close(Reason.REPLACED, "")
                else:
                    end.link.close(Reason.REPLACED, "")
        return all(len([e for e in p.ends if e.link.is_up]) == 1 for p in (a, b))

    world.wait(choose)
    world.let(1.0)
    assert choose()
    (one,), (other,) = ([e for e in p.ends if e.link.is_up] for p in (a, b))
    one.link.send(Channel.DATA, 0, b"the same")
    world.wait(other.has_got(1))
    assert one.link.is_dialed
    for dialer in dialers.values():
        dialer.stop()


def test_a_link_that_its_owner_refuses_counts_as_a_failure(world: World) -> None:
    """Closed within accept: it is called again, later and later."""
    a = world.add("a", on_accept=lambda end: end.link.close(Reason.NOT_ADMITTED, "not now"))
    b = world.add("b")
    dialer = keep(world, a, b, errors=[])
    world.wait(lambda: len(a.ends) >= 3)
    assert dialer.link is None
    dialer.stop()


def test_new_places_and_hurry_reach_the_core(world: World) -> None:
    """A dialer without a place waits for one."""
    errors: list[LinkError] = []
    a, b = world.add("a"), world.add("b")
    dialer = Dialer(a.carrier, b.identity, [], Random(1), errors.append)
    world.let(0.1)
    dialer.hurry()
    world.let(0.1)
    assert dialer.link is None
    dialer.set_places([world.address_of(a, b)])
    world.wait(partial(has_link, dialer))
    assert errors == []
    dialer.stop()


def test_what_was_adopted_stops_the_calls(world: World) -> None:
    """The member has called by itself; when that link ends it is called again."""
    a, b = world.add("a"), world.add("b")
    _, at_a = world.link(b, a)
    dialer = Dialer(a.carrier, b.identity, [], Random(1))
    dialer.adopt(at_a.link)
    dialer.set_places([world.address_of(a, b)])
    world.let(0.3)
    assert dialer.link is at_a.link
    assert len(a.ends) == 1
    at_a.link.close(Reason.CLOSED, "")
    world.wait(lambda: len(a.ends) == 2 and has_link(dialer))
    assert a.end.link.is_dialed
    dialer.stop()
    dialer.adopt(a.end.link)


def test_of_two_links_both_ends_keep_the_same() -> None:
    """Whatever the order in which they see them; who dialed again has lost the first."""
    world = MemoryWorld()
    a, b = world.add("a", settings=QUICK), world.add("b", settings=QUICK)
    at_a, at_b = (end.link for end in world.link(a, b))
    other_b, other_a = (end.link for end in world.link(b, a))
    for newer, older in ((at_a, other_a), (other_a, at_a)):
        assert is_kept(a.identity, newer, older) == (newer is at_a)
    for newer, older in ((at_b, other_b), (other_b, at_b)):
        assert is_kept(b.identity, newer, older) == (newer is at_b)
    again = world.link(b, a)[1].link
    assert is_kept(a.identity, again, other_a)
    world.kill(b)
    world.wait(lambda: at_a.is_silent)
    assert is_kept(a.identity, other_a, at_a)


def test_a_peer_in_a_new_life_replaces_its_old_link() -> None:
    """Killed and back: its new call counts, whoever has dialed before."""
    world = MemoryWorld()
    a, b = world.add("a", settings=QUICK), world.add("b", settings=QUICK)
    old = world.link(a, b)[0].link
    world.kill(b)
    again = world.add("b", settings=QUICK)
    new = world.link(again, a)[1].link
    assert old.is_up
    assert is_kept(a.identity, new, old)
    assert not is_kept(a.identity, old, new) or old.boot != new.boot


def test_case30_a_thousand_members_come_back_to_one() -> None:
    """All within 30 s, and their calls are spread: no second sees more than a few of each."""
    world = MemoryWorld()
    master = world.add("m", settings=CALM)
    credentials = ISSUING.issue(node("n"))
    places = [
        world.add(f"n{n}", settings=CALM, credentials=credentials, identity=node("n"))
        for n in range(1000)
    ]
    errors: list[LinkError] = []
    random = Random(7)
    dialers = [Dialer(p.carrier, node("m"), ["m"], random, errors.append) for p in places]
    world.let(1.0)
    assert len(master.carrier.links) == 1000
    world.kill(master)
    world.let(30.0)
    assert not any(dialer.link for dialer in dialers)
    errors.clear()
    world.let(10.0)
    # Each call takes 2 s to fail, and is followed by 1.25 to 2.5 s of silence.
    per_second = len(errors) / 10
    assert per_second < 1000 / (2 + 1.25)
    again = world.add("m", settings=CALM)
    start = world.now()
    while len(again.carrier.links) < 1000:
        assert world.now() - start < 30
        world.let(0.1)
    took_s = world.now() - start
    print(f"1000 members: {per_second:.0f} calls/s while it was away, all back in {took_s:.1f} s")
