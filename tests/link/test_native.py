"""The carrier of the datapath, where it is not what the others are: its thread, its address."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest
from tests.link.authority import NOW, node
from tests.link.world import AUTHORITY, ISSUING, NativeWorld

from afbus._datapath import Carrier as NativePort
from afbus.link.carrier import Member
from afbus.link.native import NativeCarrier
from afbus.proto.errors import AddressInUse, InvalidArgument, LinkError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def world() -> Iterator[NativeWorld]:
    """One world, closed behind the test."""
    made = NativeWorld()
    yield made
    made.close()


def member() -> Member:
    """Somebody."""

    def accept(_: Any) -> Any:
        raise AssertionError("nobody calls")

    return Member(ISSUING.issue(node("x")), AUTHORITY, os.urandom(16), accept, lambda: NOW)


class Broken:
    """A port whose thread has panicked."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.real = NativePort(*_, **__)
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def take_events(self) -> list[Any]:
        """Say so."""
        self.asked += 1
        raise RuntimeError("the thread of the carrier panicked: a link that is not there")


def test_d16_a_panic_of_the_thread_is_told_once(world: NativeWorld) -> None:
    """The owner hears what it said, and it is not asked again."""
    told: list[LinkError] = []

    async def make() -> NativeCarrier:
        return NativeCarrier(member(), Broken, "127.0.0.1", 0, told.append)

    carrier = world.loop.run_until_complete(make())
    other = world.add("other")
    other.carrier.dial(carrier.address, node("x"), lambda _: None)
    world.wait(lambda: bool(told))
    world.let(0.05)
    assert [str(error) for error in told] == [
        "the thread of the carrier panicked: a link that is not there; "
        "the agent ends, and its clients can resume"
    ]
    port = carrier.port
    assert isinstance(port, Broken)
    assert port.asked == 1
    carrier.close()
    carrier.close()


def test_an_address_that_cannot_be_had(world: NativeWorld) -> None:
    """In use, of another host, or none: each is told apart."""
    place = world.add("a").carrier.address

    async def make(host: str, port: int) -> None:
        NativeCarrier(member(), NativePort, host, port).close()

    with pytest.raises(AddressInUse, match="already in use"):
        world.loop.run_until_complete(make("127.0.0.1", place[1]))
    with pytest.raises(LinkError, match="Cannot assign"):
        world.loop.run_until_complete(make("192.0.2.9", 0))


def test_places_that_are_none(world: NativeWorld) -> None:
    """Each dial ends by its callback, never within the call."""
    a = world.add("a")
    results: list[Any] = []
    for place in (("127.0.0.1", 0), ("::1", 9), ("no.such.host.invalid", 9)):
        a.carrier.dial(place, node("b"), results.append)
    assert not results
    world.wait(lambda: len(results) == 3)
    assert all(type(result) is LinkError and result.retryable for result in results)
    a.carrier.close()
    a.carrier.dial(("127.0.0.1", 9), node("b"), results.append)
    world.wait(lambda: len(results) == 4)


def test_case38_who_has_no_certificate_enrols_elsewhere(world: NativeWorld) -> None:
    """Nodes enrol by aioquic, before they are nodes."""
    with pytest.raises(InvalidArgument):
        world.add("a").carrier.enrol(("127.0.0.1", 9), b"", b"x", lambda _: None)


def test_it_ends_with_its_loop() -> None:
    """A carrier that nobody closes takes its thread with it."""

    async def make() -> NativeCarrier:
        return NativeCarrier(member(), NativePort, "127.0.0.1")

    carrier = asyncio.run(make())
    carrier.port.close(kill=True)
    with pytest.raises(RuntimeError, match="closed"):
        carrier.port.take_events()
