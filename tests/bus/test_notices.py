"""Notices come from the kernel's address, to whom they concern, and after what they tell of."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import BusAddress, Event, GrantFlags, Overflow, Terms

if TYPE_CHECKING:
    from tests.bus.conftest import Scene

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)

# Joins, says so much to the master and to `1.1`, and waits to be told how to end.
MEMBER = """
one.sendto(b"AUTH", master)
one.recv(9)
for number in range(int(args[0])):
    one.sendto(b"%d" % number, master if number % 2 else (path, "1.1"))
say("sent")
sys.stdin.readline()
one.close()
"""


def test_r3_r19_d15_notice_has_no_address(scene: Scene) -> None:
    """The source of a notice has no components: it is the bus's kernel address, and no other."""
    one = scene.socket()
    one.sendto(b"AUTH", scene.master_address)
    scene.master.sendmsg([b"OK"], [scene.owned("1.1")], 0, scene.next_request())
    _, items, flags, source = scene.master.recvmsg(999, 999)
    assert (items, flags) == ([], 0)
    assert source == BusAddress.kernel(scene.path)
    packed = source.pack()
    # No components, and nothing in the place where they would be.
    assert packed[2:4] == bytes(2)
    assert packed[112:] == bytes(256)


def test_d15_joined_says_who(scene: Scene) -> None:
    """The master is told the addresses of a new member, and whose process it is."""
    process = scene.start(MEMBER, 0)
    one = scene.socket()
    one.sendto(b"AUTH", scene.master_address)
    for address in (("1.1", "name"), ("1.2",)):
        source = scene.next_request()
        scene.master.sendmsg([b"OK"], [scene.owned(one) for one in address], 0, source)
    told = [scene.await_notice(Event.JOINED) for _ in range(2)]
    assert sorted(notice.subject for notice in told) == [(b"1.1", b"name"), (b"1.2",)]
    pids = {notice.detail["pid"] for notice in told}
    assert pids == {os.getpid(), process.pid}
    for notice in told:
        assert (notice.detail["uid"], notice.detail["gid"]) == (os.getuid(), os.getgid())
    # A further address is no second joining.
    scene.master.sendmsg([b"OK"], [scene.owned("more")], 0, scene.address("1.1"))
    assert scene.is_empty(scene.master)


@pytest.mark.parametrize("how", ["left", "killed"])
def test_r19_d15_case32_end_is_told_once_after_the_last_message(scene: Scene, how: str) -> None:
    """All that a member said is read first, by the master and by a watcher; then its end."""
    watcher = scene.join("1.1", items=(scene.flags(GrantFlags.NOTICES),))
    count = 3000
    process = scene.start(MEMBER, count)
    scene.let_in("1.2", "name")
    assert scene.read_notice(watcher).event is Event.JOINED
    assert process.stdout is not None
    assert process.stdout.readline() == "sent\n"
    if how == "left":
        process.communicate("\n")
    else:
        process.kill()
        process.wait()
    for reader, odd in ((scene.master, 1), (watcher, 0)):
        for number in range(odd, count, 2):
            assert reader.recvfrom(99) == (b"%d" % number, scene.address("1.2"))
        notice = scene.read_notice(reader)
        assert notice.event is (Event.LEFT if how == "left" else Event.KILLED)
        assert notice.subject == (b"1.2", b"name")
        assert notice.detail["pid"] == process.pid
        assert notice.reason
        assert scene.is_empty(reader)
    # By then its addresses are free.
    scene.grant(watcher, scene.owned("name"))


def test_d15_killed_in_the_middle_of_sending(scene: Scene) -> None:
    """What was published is delivered whole and in order, nothing follows the notice."""
    program = """
one.sendto(b"AUTH", master)
one.recv(9)
number = 0
while True:
    one.sendto(b"%d" % number, master)
    number += 1
"""
    for place in range(5):
        process = scene.start(program)
        scene.let_in(f"1.{place + 10}")
        heard = [int(scene.master.recv(99)) for _ in range(100)]
        process.kill()
        while True:
            body, source = scene.master.recvfrom(999)
            if source.is_kernel:
                break
            heard.append(int(body))
        assert heard == list(range(len(heard)))
        notice = afbus.Notice.decode(body)
        assert (notice.event, notice.subject) == (Event.KILLED, (b"1.%d" % (place + 10),))
        assert scene.is_empty(scene.master)


def test_d15_others_read_notices_by_grant_only(scene: Scene) -> None:
    """Who has no grant is told nothing about others; who lost it, nothing from then on."""
    plain = scene.join("1.1")
    watcher = scene.join("1.2", items=(scene.flags(GrantFlags.NOTICES),))
    scene.join("1.3").close()
    joined, left = scene.read_notice(watcher), scene.read_notice(watcher)
    assert (joined.event, joined.subject) == (Event.JOINED, (b"1.3",))
    assert (left.event, left.subject) == (Event.LEFT, (b"1.3",))
    assert scene.is_empty(plain)
    (taken,) = scene.revoke(watcher, scene.flags(0))
    assert (taken.event, taken.detail) == (Event.REVOKED, {"grant": "NOTICES"})
    scene.join("1.4").close()
    assert scene.await_notice(Event.LEFT).subject == (b"1.3",)
    assert scene.await_notice(Event.LEFT).subject == (b"1.4",)
    assert scene.is_empty(watcher)


def test_d15_nobody_is_told_of_those_who_never_joined(scene: Scene) -> None:
    """An endpoint without an address comes and goes without a notice."""
    one = scene.socket()
    one.attach(scene.path)
    one.close()
    assert scene.is_empty(scene.master)


def test_d12_d15_who_was_cut_off_is_told_to_others_and_to_itself(scene: Scene) -> None:
    """A subscriber that wished it is cut off when it is slow: killed for others, gone for it."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    slow = scene.join("1.2", items=(scene.hears(EVERYTHING, Overflow.DISCONNECT),), rx_bytes=4096)
    for number in range(20):
        one.sendto(b"%400d" % number, scene.multicast(EVERYTHING))
    notice = scene.await_notice(Event.KILLED)
    assert notice.subject == (b"1.2",)
    why = notice.reason.removeprefix("cut off: ")
    assert why != notice.reason
    with pytest.raises(afbus.NoSuchEndpoint):
        one.sendto(b"x", scene.address("1.2"))
    heard: list[bytes] = []
    with pytest.raises(afbus.NotConnected, match=re.escape(why)):
        read_to_the_end(slow, heard)
    assert heard
    assert [int(body) for body in heard] == list(range(len(heard)))
    # It comes back by itself, as one that has not joined.
    notice = scene.read_notice(slow)
    assert (notice.event, "grants are gone" in notice.reason) == (Event.REVOKED, True)
    assert slow.addresses() == []
    slow.sendto(b"AUTH", scene.master_address)
    scene.let_in("1.3")
    assert slow.recv(9) == b"welcome"


def read_to_the_end(one: afbus.Socket, heard: list[bytes]) -> None:
    """Read until the agent has cut the socket off; what is not from the kernel is kept."""
    while True:
        body, source = one.recvfrom(999)
        heard += [] if source.is_kernel else [body]


def test_d15_d12_evicted(scene: Scene) -> None:
    """Whoever is cut off reads why, behind all that it was sent, where its ring has room for it."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    slow = scene.join("1.2", items=(scene.hears(EVERYTHING, Overflow.DISCONNECT),), rx_bytes=4096)
    for number in range(20):
        one.sendto(b"%400d" % number, scene.multicast(EVERYTHING))
    scene.await_notice(Event.KILLED)
    heard = []
    with contextlib.suppress(afbus.NotConnected):
        while True:
            heard.append(slow.recvfrom(999))
    notices = [afbus.Notice.decode(body) for body, source in heard if source.is_kernel]
    assert [(notice.event, notice.subject) for notice in notices] == [(Event.EVICTED, (b"1.2",))]
    assert heard[-1][1].is_kernel


def test_d15_d16_master_lost_and_back(scene: Scene) -> None:
    """All endpoints of the bus are told that its master is gone, and that there is one again."""
    one, unjoined = scene.join("1.1"), scene.socket()
    unjoined.attach(scene.path)
    scene.master.sendto(b"last word", scene.address("1.1"))
    scene.master.close()
    assert one.recv(99) == b"last word"
    for reader in (one, unjoined):
        notice = scene.read_notice(reader)
        assert (notice.event, notice.subject) == (Event.MASTER_LOST, (b"master",))
    with scene.socket() as again:
        again.bind(scene.address("heir"))
        for reader in (one, unjoined):
            notice = scene.read_notice(reader)
            assert (notice.event, notice.subject) == (Event.MASTER_BACK, (b"heir",))
        assert scene.is_empty(again)


def test_d15_d16_killed_master_is_lost_after_his_last_message(scene: Scene) -> None:
    """Also when the master is a process that is killed."""
    path = scene.path + "b"
    process = scene.start(
        """
one.bind((args[0], "master"))
say("bound")
body, source = one.recvfrom(99)
one.sendmsg([b"OK"], [(afbus.BUS_SOCKET, afbus.SCM_OWNED_ADDR,
    afbus.BusAddress(args[0], "1.1").pack())], 0, source)
for number in range(500):
    one.sendto(b"%d" % number, (args[0], "1.1"))
os.kill(os.getpid(), signal.SIGKILL)
""",
        path,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "bound\n"
    one = scene.socket()
    one.sendto(b"AUTH", (path, "master"))
    assert one.recv(9) == b"OK"
    for number in range(500):
        assert int(one.recv(9)) == number
    notice = scene.read_notice(one)
    assert (notice.event, notice.subject) == (Event.MASTER_LOST, (b"master",))
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("how", ["left", "killed"])
def test_d15_d20_unread_messages_are_told(scene: Scene, how: str) -> None:
    """Who sent what nobody will read any more is told how much, and which."""
    one, two = scene.join("1.1"), scene.join("1.2")
    process = scene.start(
        """
one.sendto(b"AUTH", master)
one.recv(9)
sys.stdin.readline()
one.recv(9)
say("read one")
sys.stdin.readline()
one.close()
"""
    )
    scene.let_in("1.3")
    first = one.stats()["sent"] + 1
    for number in range(10):
        one.sendto(b"%d" % number, scene.address("1.3"))
    for number in range(4):
        two.sendto(b"%d" % number, scene.address("1.3"))
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "read one\n"
    if how == "left":
        process.communicate("\n")
    else:
        process.kill()
    notice = scene.read_notice(one)
    assert (notice.event, notice.subject) == (Event.UNREAD, (b"1.3",))
    assert notice.detail == {"first": first + 1, "last": first + 9, "count": 9}
    assert scene.read_notice(two).detail["count"] == 4
    # The master had sent a welcome, which was read.
    assert scene.await_notice(Event.LEFT if how == "left" else Event.KILLED).subject == (b"1.3",)
    assert scene.is_empty(scene.master)


def test_d20_multicasts_and_read_messages_are_not_told(scene: Scene) -> None:
    """A multicast is nobody's in particular, so nobody is told that it was not read."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(EVERYTHING),))
    one.sendto(b"read", scene.address("1.2"))
    assert two.recv(9) == b"read"
    one.sendto(b"unread", scene.multicast(EVERYTHING))
    two.close()
    assert scene.await_notice(Event.LEFT).subject == (b"1.2",)
    assert scene.is_empty(one)


def test_d15_notices_are_not_lost_in_a_full_ring(scene: Scene) -> None:
    """A reader without room gets them when it has some, in their order."""
    watcher = scene.join(
        "1.1",
        items=(scene.flags(GrantFlags.NOTICES), scene.hears(EVERYTHING)),
        rx_bytes=4096,
    )
    one = scene.join("1.2", items=(scene.may_send(EVERYTHING),))
    assert scene.read_notice(watcher).event is Event.JOINED
    for _ in range(40):
        one.sendto(bytes(400), scene.multicast(EVERYTHING))
    for number in range(50):
        scene.join(f"1.{number + 10}").close()
    events: list[tuple[Event | bytes, ...]] = []
    while len(events) < 100:
        body, _, _, source = watcher.recvmsg(999, 999)
        if source.is_kernel:
            notice = afbus.Notice.decode(body)
            events.append((notice.event, *notice.subject))
    assert events == [
        (event, b"1.%d" % (number + 10))
        for number in range(50)
        for event in (Event.JOINED, Event.LEFT)
    ]


def test_d15_nobody_can_make_a_notice(scene: Scene) -> None:
    """A message that looks like a notice still has its sender's address."""
    one, two = scene.join("1.1"), scene.join("1.2")
    forged = afbus.Notice(Event.KILLED, (b"1.9",)).encode()
    one.sendto(forged, scene.address("1.2"))
    scene.master.sendto(forged, scene.address("1.2"))
    assert two.recvfrom(99) == (forged, scene.address("1.1"))
    assert two.recvfrom(99) == (forged, scene.master_address)
    kernel = (afbus.BUS_SOCKET, afbus.SCM_SRC_ADDR, scene.kernel.pack())
    for sender in (one, scene.master):
        with pytest.raises(afbus.NotOwned):
            sender.sendmsg([forged], [kernel], 0, scene.address("1.2"))


def test_d15_revoked_names_what_was_taken(scene: Scene) -> None:
    """Each thing that is taken is told by itself, with what it was."""
    one = scene.join(
        "1.1",
        "name",
        items=(
            scene.hears(Terms("a", ("k=1",))),
            scene.may_send(b"\x01" + bytes(63)),
            scene.flags(GrantFlags.MONITOR),
        ),
    )
    notices = scene.revoke(
        one,
        scene.flags(0),
        scene.disowned("name"),
        scene.deaf_to(Terms("a", ("k=1",))),
        scene.may_not_send(b"\x01" + bytes(63)),
    )
    assert {notice.event for notice in notices} == {Event.REVOKED}
    assert [(notice.reason, notice.subject, dict(notice.detail)) for notice in notices] == [
        ("grant", (), {"grant": "MONITOR"}),
        ("address", (b"name",), {}),
        ("match", (), {"match": "a k=1"}),
        ("send", (), {"send": "0x01" + "00" * 63}),
    ]
