"""What only the real carrier has: addresses, bad networks, processes, sockets, keys."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import socket
from functools import partial
from typing import TYPE_CHECKING

import pytest
from tests.link import peer
from tests.link.authority import NOW, node
from tests.link.test_refusals import MASTER, Desk, add_master, digest
from tests.link.world import AUTHORITY, ISSUING, End, NativeWorld, Place, QuicWorld, small

from afbus.link import handshake, quic, wire
from afbus.link.carrier import Enrolled
from afbus.link.effect import Down, Heard, Silent
from afbus.link.frame import Channel
from afbus.link.quic import QuicCarrier
from afbus.link.reason import Reason
from afbus.link.udp import UdpSocket
from afbus.proto.errors import AddressInUse, InvalidArgument, LinkError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any, TypeVar

    T = TypeVar("T")

DATA = Channel.DATA
QUICK = small(beat_s=0.1, silent_s=0.4, idle_s=6.0)
#: Of tests that know nothing of aioquic.
BOTH = pytest.mark.parametrize(
    "world", [QuicWorld, NativeWorld], indirect=True, ids=["aioquic", "native"]
)


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[QuicWorld]:
    """A world that is closed behind the test; of aioquic if nothing else is said."""
    made: QuicWorld = getattr(request, "param", QuicWorld)()
    yield made
    made.close()


def numbered(amount: int, size: int) -> list[bytes]:
    """Messages of one size, each with its number."""
    return [b"%08d" % n + bytes(size - 8) for n in range(amount)]


def has_at_least(end: End, amount: int) -> bool:
    """Whether so many messages have come."""
    return len(end.messages()) >= amount


def carrier_of(place: Place) -> QuicCarrier:
    """The carrier, as what it is."""
    assert isinstance(place.carrier, QuicCarrier)
    return place.carrier


# --- the network ---


@BOTH
@pytest.mark.parametrize(
    ("way", "amount"),
    [
        ({"loss": 0.01}, 2000),
        ({"loss": 0.05}, 1000),
        ({"loss": 0.30}, 60),
        ({"twice": 0.10}, 2000),
        ({"corrupt": 0.05}, 1000),
        ({"delay_s": 0.005, "jitter_s": 0.001}, 1000),
        ({"loss": 0.02, "twice": 0.02, "corrupt": 0.01, "delay_s": 0.002, "jitter_s": 0.002}, 400),
    ],
    ids="loss1 loss5 loss30 twice10 corrupt5 reorder all".split(),
)
def test_case11_everything_arrives_intact_and_in_order(
    world: QuicWorld, way: dict[str, float], amount: int
) -> None:
    """Whatever the network does to datagrams, in both directions (seeded)."""
    # So bad a network may be silent for longer than usual.
    settings = small(silent_s=8.0, idle_s=30.0)
    a, b = world.add("a", settings=settings), world.add("b", settings=settings)
    relay = world.relay(a, b)
    here, there = world.link(a, b)
    for name, value in way.items():
        setattr(relay.to_server, name, value)
        setattr(relay.to_client, name, value)
    messages = numbered(amount, 1000)
    world.send(here, DATA, 0, iter(messages))
    world.send(there, DATA, 0, iter(messages[: amount // 4]))
    world.wait(there.has_got(amount), 45)
    world.wait(here.has_got(amount // 4), 45)
    assert there.messages() == messages
    assert here.messages() == messages[: amount // 4]


@BOTH
def test_a_peer_that_comes_from_another_address_keeps_its_link(world: QuicWorld) -> None:
    """Three times, under load, in the middle of everything: nothing is lost, no link ends."""
    a, b = world.add("a", settings=small()), world.add("b", settings=small())
    relay = world.relay(a, b)
    here, there = world.link(a, b)
    messages = numbered(3000, 2000)
    world.send(here, DATA, 0, iter(messages))
    world.send(there, DATA, 0, iter(messages))
    for part in (500, 1200, 2000):
        world.wait(partial(has_at_least, there, part))
        relay.move()
    world.wait(there.has_got(3000))
    world.wait(here.has_got(3000))
    assert there.messages() == here.messages() == messages
    assert len(a.ends) == len(b.ends) == 1
    # An idle link too: its next ping says where it is.
    relay.move()
    world.let(1.0)
    there.link.send(DATA, 0, b"found")
    world.wait(here.has_got(3001))


@BOTH
def test_case13_a_black_hole_of_four_seconds_loses_nothing(world: QuicWorld) -> None:
    """With the usual idle time; it goes on within 5 s after the heal."""
    a, b = world.add("a"), world.add("b")
    world.relay(a, b)
    here, there = world.link(a, b)
    messages = numbered(300, 1000)
    world.send(here, DATA, 0, iter(messages[:150]))
    world.cut(a, b)
    world.cut(b, a)
    world.send(there, DATA, 0, iter(messages))
    world.let(4.0)
    world.heal(a, b)
    world.heal(b, a)
    start = world.now()
    world.send(here, DATA, 0, iter(messages[150:]))
    world.wait(there.has_got(300))
    world.wait(here.has_got(300))
    assert world.now() - start < 5
    assert here.messages() == there.messages() == messages
    assert here.has(Silent)
    assert not here.has(Down)


def test_a_farewell_that_was_lost_is_said_again(world: QuicWorld) -> None:
    """Who still sends to an ended link hears at once that it has, and why.

    Only of aioquic: the native carrier says it for three probe timeouts, 80 ms here, which may be
    over before the path is back on a machine with other work.
    """
    a, b = world.add("a"), world.add("b")
    world.relay(a, b)
    here, there = world.link(a, b)
    world.cut(b, a)
    there.link.close(Reason.REVOKED, "out")
    world.let(0.02)
    world.heal(b, a)
    start = world.now()
    world.wait(lambda: here.has(Down))
    assert world.now() - start < 1
    assert here.down == Down(Reason.REVOKED, "out", is_remote=True)


@BOTH
def test_case43_garbage_on_the_socket_changes_nothing(world: QuicWorld) -> None:
    """100,000 datagrams: random, mutated, replayed, with the ids of a live link (seeded)."""
    a, b, c = (world.add(name, settings=QUICK) for name in "abc")
    relay = world.relay(a, b)
    seen: list[bytes] = []
    pass_on = relay._send

    def note(port: socket.socket, data: bytes, address: Any) -> None:
        seen.append(data)
        pass_on(port, data, address)

    relay._send = note  # type: ignore[method-assign]  # listens to what passes
    here, there = world.link(a, b)
    world.send(here, DATA, 0, iter(numbered(50, 500)))
    world.wait(there.has_got(50))
    other, at_b = world.link(c, b)
    rng = random.Random(43)
    port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.closing(port):
        for n in range(100_000):
            data = bytearray(rng.choice(seen))
            kind = n % 4
            if kind == 0:
                data = bytearray(rng.randbytes(rng.choice((1, 20, 60, 1200))))
            elif kind == 1:
                for _ in range(rng.randint(1, 5)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            elif kind == 2:
                del data[rng.randrange(len(data)) :]
            with contextlib.suppress(BlockingIOError):
                port.sendto(data, b.carrier.address)
            if n % 50 == 49:
                world.let(0)
    world.let(0.1)
    world.send(other, DATA, 0, iter([b"still here"]))
    world.wait(at_b.has_got(1))
    world.send(here, DATA, 0, iter([b"and here"]))
    world.wait(there.has_got(51))
    assert not here.has(Down)
    assert len(b.ends) == 2
    if not isinstance(world, NativeWorld):
        world.wait(lambda: not carrier_of(b)._pending)


def test_a_version_that_nobody_speaks_is_answered(world: QuicWorld) -> None:
    """By the list of those that we do (RFC 9000, 6.1)."""
    b = world.add("b")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
        port.settimeout(5)
        head = bytes([0xC0]) + b"\x1a\x2a\x3a\x4a" + b"\x08" + b"12345678" + b"\x08" + b"abcdefgh"
        port.sendto(head.ljust(1200, b"\0"), b.carrier.address)
        world.let(0.02)
        answer = port.recv(2000)
    assert answer[1:5] == bytes(4)
    assert answer.endswith(b"\0\0\0\1")


# --- addresses ---


@pytest.mark.parametrize(
    ("host", "called"),
    [("::1", "::1"), ("::", "::1"), ("::", "127.0.0.1"), ("127.0.0.1", "localhost"),
     ("0.0.0.0", "127.0.0.1")],  # noqa: S104 (the test is about it)
)  # fmt: skip
def test_every_kind_of_address_is_reached(world: QuicWorld, host: str, called: str) -> None:
    """IPv6, both at once, names; the dialer has a socket of the same kind."""
    world.host = host
    b = world.add("b")
    world.host = "::" if host.startswith("::") and called != "::1" else host
    a = world.add("a")
    world._addresses["b"] = (called, b.carrier.address[1])
    here, there = world.link(a, b)
    here.link.send(DATA, 0, b"there")
    world.wait(there.has_got(1))


@pytest.mark.parametrize("host", ["nowhere.invalid", "::1", "a" * 300, "x..y"])
def test_an_address_that_cannot_be_reached_is_told(world: QuicWorld, host: str) -> None:
    """By `done`, and not by an exception; perhaps it can be later."""
    a, b = world.add("a"), world.add("b")
    world._addresses["b"] = (host, 1)
    error = world.call(a, b).error
    assert type(error) is LinkError
    assert error.retryable


def test_a_port_that_is_taken_is_told(world: QuicWorld) -> None:
    """With the address in the text."""
    b = world.add("b")

    async def bind(host: str, port: int) -> None:
        QuicCarrier(b.carrier.member, host, port)

    host, port = b.carrier.address
    with pytest.raises(AddressInUse, match=f"{host} port {port}"):
        world.loop.run_until_complete(bind(host, port))
    with pytest.raises(InvalidArgument):
        world.loop.run_until_complete(bind("localhost", 0))


# --- processes ---


@pytest.fixture
def process() -> Iterator[tuple[Any, int]]:
    """A peer in a process of its own, `p`."""
    made, port = peer.start(ISSUING.issue(node("p")), AUTHORITY)
    yield made, port
    made.kill()
    made.communicate()


def reach(world: QuicWorld, port: int) -> End:
    """A link to the peer in the other process."""
    a = world.add("a")
    outcome: list[object] = []
    a.carrier.dial(("127.0.0.1", port), node("p"), outcome.append)
    world.wait(lambda: bool(outcome))
    assert not isinstance(outcome[0], LinkError)
    return a.end


@BOTH
def test_case14_a_stopped_process_is_noticed_and_comes_back(
    world: QuicWorld, process: tuple[Any, int]
) -> None:
    """SIGSTOP is seen within 2 s; after SIGCONT everything arrives, in order."""
    end = reach(world, process[1])
    world.send(end, DATA, 0, iter(numbered(10, 100)))
    world.wait(end.has_got(10))
    os.kill(process[0].pid, signal.SIGSTOP)
    start = world.now()
    world.wait(lambda: end.has(Silent))
    assert world.now() - start <= 2.1
    world.send(end, DATA, 0, iter(numbered(10, 100)))
    os.kill(process[0].pid, signal.SIGCONT)
    world.wait(lambda: end.has(Heard) and len(end.messages()) == 20)
    assert end.messages() == numbered(10, 100) * 2


@BOTH
def test_case14_a_killed_process_is_noticed(world: QuicWorld, process: tuple[Any, int]) -> None:
    """kill -9 is seen within 2 s."""
    end = reach(world, process[1])
    world.let(0.5)
    process[0].kill()
    start = world.now()
    world.wait(lambda: end.has(Silent))
    assert world.now() - start <= 2.1


# --- life ---


@pytest.mark.parametrize(
    ("name", "value", "least"), [("KEY_DATAGRAMS", 20, 100), ("KEY_S", 0.01, 20)]
)
def test_case17_keys_change_while_traffic_flows(
    world: QuicWorld, monkeypatch: pytest.MonkeyPatch, name: str, value: float, least: int
) -> None:
    """By count and by time: more updates than a link sees in a day, and nothing is lost."""
    monkeypatch.setattr(wire, name, value)
    updates = 0
    request = handshake.LinkConnection.request_key_update

    def count(self: handshake.LinkConnection) -> None:
        nonlocal updates
        updates += 1
        request(self)

    monkeypatch.setattr(handshake.LinkConnection, "request_key_update", count)
    here, there = world.pair(small())
    messages = numbered(2000, 20_000)
    world.send(here, DATA, 0, iter(messages))
    world.wait(there.has_got(2000))
    assert there.messages() == messages
    assert updates > least


def test_case17_an_idle_link_changes_its_keys_too(
    world: QuicWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its beats go by old keys no longer than any other datagram."""
    here, there = world.pair(small())
    phases: set[int] = set()
    monkeypatch.setattr(wire, "KEY_S", 0.0)
    request = handshake.LinkConnection.request_key_update

    def note(self: handshake.LinkConnection) -> None:
        phases.add(id(self))
        request(self)

    monkeypatch.setattr(handshake.LinkConnection, "request_key_update", note)
    world.wait(lambda: len(phases) == 2)
    monkeypatch.setattr(wire, "KEY_S", 3600.0)
    world.send(here, DATA, 0, iter(numbered(10, 100)))
    world.wait(there.has_got(10))
    assert there.messages() == numbered(10, 100)


def test_case21_links_that_come_and_go_leave_nothing(world: QuicWorld) -> None:
    """Names, timers and memory are as after the first."""
    a, b = world.add("a"), world.add("b")

    def visit() -> None:
        here, there = world.link(a, b)
        here.link.send(DATA, 0, b"hello")
        here.link.close(Reason.CLOSED, "")
        world.wait(lambda: there.has(Down))
        assert there.messages() == [b"hello"]
        a.ends.clear()
        b.ends.clear()

    for _ in range(20):
        visit()
    gc.collect()
    fds = len(os.listdir("/proc/self/fd"))
    connections = sum(isinstance(o, handshake.LinkConnection) for o in gc.get_objects())
    for _ in range(200):
        visit()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert sum(isinstance(o, handshake.LinkConnection) for o in gc.get_objects()) <= connections
    for place in (a, b):
        assert carrier_of(place)._wires == {}
        assert carrier_of(place)._links == {}
        assert len(carrier_of(place)._farewells) <= quic._FAREWELLS
    assert asyncio.all_tasks(world.loop) == set()


def test_a_refused_carrier_can_be_closed_twice(world: QuicWorld) -> None:
    """And who dials by it afterwards is told."""
    a, b = world.add("a"), world.add("b")
    a.carrier.close()
    a.carrier.close()
    start = world.now()
    with pytest.raises(LinkError):
        world.link(a, b)
    assert world.now() - start < 1


# --- coroutines ---


def run(world: QuicWorld, work: Coroutine[Any, Any, T]) -> T:
    """Run to its end, within a deadline."""
    return world.loop.run_until_complete(asyncio.wait_for(work, 10))


def test_connect_is_dial_to_be_waited_for(world: QuicWorld) -> None:
    """A link, an error, or nothing if nobody waits any more."""
    a, b = world.add("a"), world.add("b")
    link = run(world, carrier_of(a).connect(b.carrier.address, b.identity))
    assert link.is_up
    with pytest.raises(LinkError):
        run(world, carrier_of(a).connect(b.carrier.address, a.identity))

    async def give_up() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(carrier_of(a).connect(b.carrier.address, b.identity), 0)

    run(world, give_up())
    world.let(0.2)
    assert a.carrier.links == (link,)
    assert link.is_up


def test_case38_enrol_needs_no_carrier(world: QuicWorld) -> None:
    """One call for who has nothing yet; its socket is gone behind it."""
    desk = Desk()
    m = add_master(world, desk)
    fds = len(os.listdir("/proc/self/fd"))
    enrolled = run(world, quic.enrol(m.carrier.address, digest(), b"request", lambda: NOW))
    assert isinstance(enrolled, Enrolled)
    assert enrolled.master == MASTER
    with pytest.raises(LinkError):
        run(world, quic.enrol(m.carrier.address, bytes(32), b"request", lambda: NOW))
    assert desk.asked == [b"request"]
    assert len(os.listdir("/proc/self/fd")) == fds


def test_segmentation_is_only_faster(world: QuicWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has it not, everything arrives all the same."""
    option: Callable[..., bool] = lambda *_: False  # noqa: E731 (stands for a kernel)
    monkeypatch.setattr(UdpSocket, "_try_option", option)
    here, there = world.pair(small())
    assert not carrier_of(world.places["a"])._socket.has_gso
    messages = numbered(500, 20_000)
    world.send(here, DATA, 0, iter(messages))
    world.wait(there.has_got(500))
    assert there.messages() == messages
