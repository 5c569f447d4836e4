"""Monitors see everything by grant, lose what they are too slow for, and change nothing (D19)."""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import MSG_MONITOR, Event, Gap, GrantFlags, Terms
from afbus.proto import control

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.bus.conftest import NodeProcess, Scene

    from afbus import Socket

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)


def watch(scene: Scene, within: str = "1.9", **options: int) -> Socket:
    """A member with the right to see everything, which has read what let it in."""
    monitor = scene.join(within, items=(scene.flags(GrantFlags.MONITOR),), **options)
    # The message that granted it is the first that it sees.
    body, _, flags, _ = scene.read(monitor)
    assert (body, flags) == (b"welcome", MSG_MONITOR)
    return monitor


def test_d19_copies_of_everything(scene: Scene) -> None:
    """To one, to a name, to many, to the master, with commands: each once, in order, marked."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", "name", items=(scene.hears(Terms("topic")),))
    monitor = watch(scene)
    one.sendto(b"unicast", scene.address("1.2"))
    one.sendto(b"name", scene.address("name"))
    one.sendmsg([b"terms"], [scene.terms("topic")], 0, scene.multicast())
    one.sendto(b"unheard", scene.multicast(b"\x01" + bytes(63)))
    two.sendto(b"unknown", scene.address("nobody"))
    scene.command(scene.address("1.1"), scene.owned("more"))
    seen = [scene.read(monitor) for _ in range(6)]
    assert {flags for *_, flags, _ in seen} == {MSG_MONITOR}
    expected = [
        (b"unicast", "1.1", scene.address("1.2")),
        (b"name", "1.1", scene.address("name")),
        (b"terms", "1.1", scene.multicast()),
        (b"unheard", "1.1", scene.multicast(b"\x01" + bytes(63))),
        (b"unknown", "1.2", scene.address("nobody")),
        (b"granted", "master", scene.address("1.1")),
    ]
    assert [
        (body, source.address.decode(), afbus.BusAddress.unpack(found[afbus.SCM_DST_ADDR]))
        for body, found, _, source in seen
    ] == expected
    assert seen[2][1][afbus.SCM_TERMS] == Terms("topic").pack()
    # The commands themselves are not shown: a reader would take them for its own.
    assert afbus.SCM_OWNED_ADDR not in seen[5][1]
    assert scene.is_empty(monitor)
    # The others got what they would have got without it.
    assert scene.read_all(two) == [b"unicast", b"name", b"terms"]


def test_d19_refused_messages_are_not_seen(scene: Scene) -> None:
    """What did not happen is not shown."""
    one, monitor = scene.join("1.1"), watch(scene)
    with pytest.raises(afbus.Denied):
        one.sendto(b"x", scene.multicast(EVERYTHING))
    with pytest.raises(afbus.NoSuchEndpoint):
        one.sendto(b"x", scene.address("1.77"))
    assert scene.is_empty(monitor)


def test_d19_d7_monitor_needs_a_grant(scene: Scene) -> None:
    """Nobody makes a monitor of itself; who lost the grant sees nothing any more."""
    one, two = scene.join("1.1"), scene.join("1.2")
    with pytest.raises(afbus.Denied):
        one.sendmsg([b"x"], [scene.flags(GrantFlags.MONITOR)], 0, scene.address("1.1"))
    two.sendto(b"secret", scene.master_address)
    assert scene.is_empty(one)
    assert scene.master.recv(9) == b"secret"
    monitor = watch(scene)
    (notice,) = scene.revoke(monitor, scene.flags(0))
    assert (notice.event, notice.detail) == (Event.REVOKED, {"grant": "MONITOR"})
    two.sendto(b"secret", scene.master_address)
    assert scene.is_empty(monitor)


def test_d19_monitor_is_a_member_besides(scene: Scene) -> None:
    """What is meant for it comes as to anybody, unmarked, and a copy beside it."""
    one, monitor = scene.join("1.1"), watch(scene)
    one.sendto(b"to you", scene.address("1.9"))
    assert sorted(scene.read(monitor)[::2] for _ in range(2)) == [
        (b"to you", 0),
        (b"to you", MSG_MONITOR),
    ]


def test_d19_slow_monitor_delays_nobody(scene: Scene) -> None:
    """While it reads nothing, every send is accepted at once, and all others get everything."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(EVERYTHING),))
    watch(scene, rx_bytes=4096)
    one.setblocking(False)
    for number in range(1000):
        one.sendto(
            b"%100d" % number, [scene.address("1.2"), scene.multicast(EVERYTHING)][number % 2]
        )
        assert int(two.recv(999)) == number
    assert scene.read_all(two) == []


def test_d19_d12_what_a_monitor_misses_is_a_gap(scene: Scene) -> None:
    """Copies are lost by count, in their place, as multicasts are."""
    one, two = scene.join("1.1"), scene.join("1.2")
    monitor = watch(scene, rx_bytes=4096)
    first = one.stats()["sent"] + 1
    for number in range(50):
        one.sendto(b"%300d" % number, scene.address("1.2"))
        assert int(two.recv(999)) == number
    heard: list[int] = []
    missed = 0
    while len(heard) + missed < 50:
        body, items, flags, _ = monitor.recvmsg(999, 999)
        gaps = [item for item in (control.decode(*item) for item in items) if isinstance(item, Gap)]
        if gaps:
            assert gaps[0].first == first + len(heard) + missed
            missed += gaps[0].count
        else:
            assert flags & MSG_MONITOR
            assert int(body) == len(heard) + missed
            heard.append(int(body))
    assert missed > 0
    assert scene.is_empty(monitor)


def test_d19_d20_monitor_leaves_nothing_unread(scene: Scene) -> None:
    """Copies that a monitor did not read are nobody's loss: no sender is told."""
    one, two, monitor = scene.join("1.1"), scene.join("1.2"), watch(scene)
    one.sendto(b"x", scene.address("1.2"))
    assert two.recv(9) == b"x"
    monitor.close()
    assert scene.await_notice(Event.LEFT).subject == (b"1.9",)
    assert scene.is_empty(one)


def test_d19_d14_monitor_gets_no_descriptors(scene: Scene) -> None:
    """Files are for their receiver: the copy says that there were some. Bodies are shown whole."""
    one, two, monitor = scene.join("1.1"), scene.join("1.2"), watch(scene)
    with open(os.devnull, "rb") as file:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))
        one.sendmsg([b"file"], [rights], 0, scene.address("1.2"))
    one.sendto(bytes(100_000), scene.address("1.2"))
    _, found, flags, _ = scene.read(two)
    assert flags == 0
    os.close(array.array("i", found[socket.SCM_RIGHTS])[0])
    body, found, flags, _ = scene.read(monitor)
    assert (body, flags) == (b"file", MSG_MONITOR | socket.MSG_CTRUNC)
    assert socket.SCM_RIGHTS not in found
    assert scene.read(monitor)[0::2] == (bytes(100_000), MSG_MONITOR)


def test_d19_d17_copies_name_their_sender(scene: Scene) -> None:
    """With SO_PASSCRED a monitor reads whose message it was, not its own."""
    monitor = watch(scene)
    monitor.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    process = scene.start("one.sendto(b'AUTH', master)\none.recv(9)\none.sendto(b'x', master)")
    scene.let_in("1.1")
    while (seen := scene.read(monitor))[0] != b"x":
        pass
    identity = afbus.Identity.decode(seen[1][afbus.SCM_IDENTITY])
    assert (identity.pid, identity.uid) == (process.pid, os.getuid())
    assert process.wait() == 0


def test_d19_two_monitors_do_not_see_each_other(scene: Scene) -> None:
    """Copies are not copied: each monitor gets one of each message."""
    one, two = scene.join("1.1"), scene.join("1.2")
    monitors = [watch(scene, "1.8")]
    monitors.append(scene.join("1.9", items=(scene.flags(GrantFlags.MONITOR),)))
    for monitor in monitors:
        scene.read_all(monitor)
    one.sendto(b"x", scene.address("1.2"))
    assert [scene.read_all(monitor) for monitor in monitors] == [[b"x"], [b"x"]]
    assert scene.read_all(two) == [b"x"]


def test_d19_monitors_are_audited(
    make_node: Callable[..., NodeProcess],
    make_scene: Callable[..., Scene],
    tmp_path: Path,
) -> None:
    """The agent's log says who was given everything to see, and who no longer sees it."""
    log = tmp_path / "log"
    scene = make_scene(make_node(log=log))
    monitor = watch(scene)
    scene.revoke(monitor, scene.flags(0))
    first, second = log.read_text().splitlines()
    who = f"pid {os.getpid()}, uid {os.getuid()}"
    for line, verb in ((first, " sees all"), (second, "no longer sees all")):
        assert "audit" in line
        assert who in line
        assert verb in line
        assert scene.path in line
