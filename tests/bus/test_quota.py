"""What one user may take of the agent and of a receiver, over all its sockets (D18)."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import Terms

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import NodeProcess, Scene

    from afbus import Socket

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)
HOUR_MS = 3_600_000


@pytest.fixture(scope="module")
def small(make_node: Callable[..., NodeProcess]) -> NodeProcess:
    """An agent with quotas that tests can use up."""
    return make_node(
        {"matches_per_user": 10, "endpoints_per_user": 12},
        quota_bytes=200_000,
        quota_messages=100,
        quota_fds=5,
    )


@pytest.fixture
def poor(small: NodeProcess, make_scene: Callable[..., Scene]) -> Scene:
    """A bus on that agent."""
    return make_scene(small)


def test_d18_d7_messages_unread(poor: Scene) -> None:
    """All sockets of a user together may have so many messages unread: then EDQUOT, at once."""
    one, two = poor.join("1.1"), poor.join("1.2")
    readers = [poor.join("1.3"), poor.join("1.4")]
    addresses = [poor.address("1.3"), poor.address("1.4")]
    for number in range(100):
        (one, two)[number % 2].sendto(b"x", addresses[number // 50])
    for sender in (one, two, poor.master):
        for address in addresses:
            with pytest.raises(afbus.ShareExceeded) as caught:
                sender.sendto(b"x", address)
            assert caught.value.errno == errno.EDQUOT
    # What is read, or given up with its receiver, can be used again.
    assert readers[0].recv(9) == b"x"
    one.sendto(b"y", addresses[1])
    with pytest.raises(afbus.ShareExceeded):
        one.sendto(b"y", addresses[1])
    readers[1].close()
    for _ in range(51):
        one.sendto(b"z", addresses[0])
    with pytest.raises(afbus.ShareExceeded):
        one.sendto(b"z", addresses[0])


def test_d18_d7_bytes_unread(poor: Scene) -> None:
    """The same for bytes, whether they lie in a ring or in a memfd."""
    one = poor.join("1.1")
    reader = poor.join("1.2")
    sent = 0
    with contextlib.suppress(afbus.ShareExceeded):
        while True:
            one.sendto(bytes(30_000), socket.MSG_DONTWAIT, poor.address("1.2"))
            sent += 1
    assert sent == 6
    assert len(poor.read_all(reader)) == 6
    one.sendto(bytes(150_000), poor.address("1.2"))
    poor.join("1.3")
    sent = 0
    with contextlib.suppress(afbus.ShareExceeded):
        while sent < 9:
            one.sendto(bytes(150_000), socket.MSG_DONTWAIT, poor.address("1.3"))
            sent += 1
    assert sent < 2, "bodies in memfds count by their size"
    poor.read_all(reader)


def test_d18_d7_multicasts_count_for_each_receiver(poor: Scene) -> None:
    """A multicast costs what lies unread: once for each ring."""
    one = poor.join("1.1", items=(poor.may_send(EVERYTHING),))
    readers = [poor.join(f"1.{n}", items=(poor.hears(EVERYTHING),)) for n in (2, 3, 4, 5)]
    for _ in range(25):
        one.sendto(b"x", poor.multicast(EVERYTHING))
    with pytest.raises(afbus.ShareExceeded) as caught:
        one.sendto(b"x", poor.multicast(EVERYTHING))
    assert caught.value.errno == errno.EDQUOT
    for reader in readers:
        assert len(poor.read_all(reader)) == 25
    one.sendto(b"x", poor.multicast(EVERYTHING))


def test_d18_d7_descriptors_in_flight(poor: Scene) -> None:
    """Descriptors that were not received yet are counted, and given back when they are."""
    one, two = poor.join("1.1"), poor.join("1.2")
    with open(os.devnull, "rb") as file:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()] * 2))
        for _ in range(2):
            one.sendmsg([b"x"], [rights], 0, poor.address("1.2"))
        with pytest.raises(afbus.ShareExceeded) as caught:
            one.sendmsg([b"x"], [rights], 0, poor.address("1.2"))
        assert caught.value.errno == errno.EDQUOT
        one.sendto(b"without", poor.address("1.2"))
        _, found, _, _ = poor.read(two)
        for descriptor in array.array("i", found[socket.SCM_RIGHTS]):
            os.close(descriptor)
        one.sendmsg([b"x"], [rights], 0, poor.address("1.2"))


def test_d18_d7_matches_and_grants(poor: Scene) -> None:
    """Matches and rights to send are counted together, for the user of the member."""
    one, two = poor.join("1.1"), poor.join("1.2")
    poor.grant(one, *(poor.hears(Terms(f"t{n}")) for n in range(6)))
    poor.grant(two, *(poor.may_send(Terms(f"t{n}")) for n in range(4)))
    for to, item in (("1.1", poor.hears(Terms("more"))), ("1.2", poor.may_send(Terms("more")))):
        with pytest.raises(afbus.ShareExceeded) as caught:
            poor.command(poor.address(to), item)
        assert caught.value.errno == errno.EDQUOT
    poor.grant(one, poor.hears(Terms("t1")))
    poor.revoke(two, poor.may_not_send(Terms("t1")))
    poor.grant(one, poor.hears(Terms("more")))
    with pytest.raises(afbus.ShareExceeded):
        poor.command(poor.address("1.2"), poor.may_send(Terms("t1")))
    one.close()
    poor.grant(two, *(poor.hears(Terms(f"t{n}")) for n in range(7)))


def test_d18_d7_endpoints(poor: Scene) -> None:
    """A user has so many sockets; one that is closed makes room for another."""
    with contextlib.ExitStack() as stack:
        for _ in range(11):
            stack.enter_context(afbus.socket(node=poor.node.place))
        # Many times over: the agent may be gone before it is greeted, or afterwards.
        for _ in range(50):
            with pytest.raises(afbus.ShareExceeded, match="12") as caught:
                afbus.socket(node=poor.node.place)
            assert caught.value.errno == errno.EDQUOT
        stack.close()
        stack.enter_context(afbus.socket(node=poor.node.place))


def test_d18_addresses_of_an_endpoint(scene: Scene) -> None:
    """An endpoint owns at most 128 addresses."""
    one = scene.join("1.1")
    scene.grant(one, *(scene.owned(f"n{number}") for number in range(127)))
    with pytest.raises(afbus.ShareExceeded) as caught:
        scene.command(scene.address("1.1"), scene.owned("one too many"))
    assert caught.value.errno == errno.EDQUOT
    assert len(one.addresses()) == 128


def ask(scene: Scene, one: Socket, serial: int, deadline_ms: int) -> None:
    """Send a request to `1.2`."""
    items = [
        scene.number(afbus.SCM_SERIAL, serial),
        scene.number(afbus.SCM_DEADLINE, deadline_ms),
    ]
    one.sendmsg([b""], items, 0, scene.address("1.2"))


def test_d18_d7_open_requests(scene: Scene) -> None:
    """An endpoint waits for at most 4096 replies; each that comes makes room for one request."""
    one, two = scene.join("1.1"), scene.join("1.2", rx_bytes=1 << 22)
    for serial in range(1, 4097):
        ask(scene, one, serial, HOUR_MS)
    with pytest.raises(afbus.ShareExceeded) as caught:
        ask(scene, one, 4097, HOUR_MS)
    assert caught.value.errno == errno.EDQUOT
    # Others ask, and messages that expect nothing pass.
    one.sendto(b"x", scene.address("1.2"))
    ask(scene, scene.master, 1, HOUR_MS)
    _, found, _, _ = scene.read(two)
    reply = (afbus.BUS_SOCKET, afbus.SCM_REPLY_TO, found[afbus.SCM_SERIAL])
    two.sendmsg([b""], [reply], 0, scene.address("1.1"))
    ask(scene, one, 4097, HOUR_MS)
    with pytest.raises(afbus.ShareExceeded):
        ask(scene, one, 4098, HOUR_MS)


def test_d18_one_sender_leaves_room_for_others(scene: Scene) -> None:
    """However much one sends, whoever comes after it finds room at the same receiver."""
    full = scene.join("1.9", rx_bytes=1 << 16)
    counts = []
    for number in range(1, 6):
        sender = scene.join(f"1.{number}")
        counts.append(scene.fill(sender, scene.address("1.9"), 400))
    assert min(counts) > 0
    assert counts == sorted(counts, reverse=True)
    assert len(scene.read_all(full)) == sum(counts)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_d18_quota_of_one_user_is_no_others(poor: Scene) -> None:
    """Who has used up everything takes nothing from another user."""
    one, two = poor.join("1.1"), poor.join("1.2")
    poor.join("1.3")
    process = poor.start(
        """
two = become_nobody()
two.sendto(b"AUTH", master)
two.recv(9)
say("ready")
sys.stdin.readline()
for _ in range(50):
    two.sendto(b"of another", (path, "1.2"))
say("done")
"""
    )
    poor.let_in("1.4")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(100):
        one.sendto(b"x", poor.address("1.3"))
    with pytest.raises(afbus.ShareExceeded):
        one.sendto(b"x", poor.address("1.2"))
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"
    assert poor.read_all(two) == [b"of another"] * 50
