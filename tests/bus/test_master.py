"""Masters and agents that go and come back: states to be read, not hang-ups (D16)."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import Event, Terms

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import NodeProcess, Scene

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)


def poll(one: afbus.Socket, events: int = select.POLLIN | select.POLLOUT) -> int:
    """What poll(2) says of a socket now."""
    poller = select.poll()
    poller.register(one.fileno(), events)
    return dict(poller.poll(0)).get(one.fileno(), 0)


# the master


def test_d16_traffic_goes_on_without_a_master(scene: Scene) -> None:
    """Addresses, matches and rights stay in force; nothing hangs up."""
    one = scene.join("1.1", "name", items=(scene.may_send(Terms("topic")),))
    two = scene.join("1.2", items=(scene.hears(Terms("topic")),))
    assert (one.state()["master"], one.master()) == ("here", scene.master_address)
    scene.master.close()
    assert (one.state()["master"], one.master()) == ("lost", None)
    assert one.getsockopt(afbus.BUS_SOCKET, afbus.SO_BUS_MASTER, 999) == b""
    for member in (one, two):
        assert scene.read_notice(member).event is Event.MASTER_LOST
        assert poll(member) == select.POLLOUT
    two.sendto(b"unicast", scene.address("name"))
    assert one.recv(9) == b"unicast"
    one.sendmsg([b"multicast"], [scene.terms("topic.x")], 0, scene.multicast())
    assert two.recv(9) == b"multicast"
    with pytest.raises(afbus.Denied):
        one.sendmsg([b"x"], [scene.terms("other")], 0, scene.multicast())


def test_d16_d7_nobody_takes_the_masters_place(scene: Scene) -> None:
    """What needs the master is EHOSTDOWN, and no member can command in his stead."""
    one = scene.join("1.1")
    scene.master.close()
    for name in ("master", "unknown"):
        with pytest.raises(afbus.MasterLost, match=name) as caught:
            one.sendto(b"x", scene.address(name))
        assert caught.value.errno == errno.EHOSTDOWN
    with pytest.raises(afbus.Denied):
        one.sendmsg([b"x"], [scene.owned("more")], 0, scene.address("1.1"))
    with scene.socket() as late:
        assert late.attach(scene.path) is None
        assert late.state()["master"] == "lost"


def test_d16_d7_joining_without_a_master_is_ehostdown(scene: Scene) -> None:
    """Who asks to join while there is no master is told that he is away, and may try again."""
    scene.join("1.1")
    late = scene.socket()
    late.attach(scene.path)
    scene.master.close()
    with pytest.raises(afbus.MasterLost) as caught:
        late.sendto(b"AUTH", scene.master_address)
    assert caught.value.errno == errno.EHOSTDOWN


def test_d16_d5_heir_rules_what_was_there(scene: Scene) -> None:
    """A new master of the same user finds all members, and can take what the old one gave."""
    one = scene.join("1.1", "name", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(EVERYTHING),))
    scene.master.close()
    with scene.socket() as heir:
        heir.bind(scene.address("heir"))
        assert heir.state()["is_master"]
        assert one.master() == scene.address("heir")
        rows = heir.listing("addresses", scene.path)
        assert sorted(row["address"] for row in rows) == ["1.1", "1.2", "heir", "name"]
        heir.sendmsg([b"granted"], [scene.deaf_to(EVERYTHING)], 0, scene.address("1.2"))
        heir.sendmsg([b"granted"], [scene.disowned("name")], 0, scene.address("1.1"))
        one.sendto(b"x", scene.multicast(EVERYTHING))
        events = [scene.read_notice(two).event for _ in range(3)]
        assert events == [Event.MASTER_LOST, Event.MASTER_BACK, Event.REVOKED]
        assert two.recv(9) == b"granted"
        assert scene.is_empty(two)
        # Unknown names are his now, and the old master's name is one of them.
        one.sendto(b"y", scene.address("master"))
        assert heir.recvfrom(9) == (b"y", scene.address("1.1"))
        # Who comes now joins by him.
        late = scene.socket()
        late.sendto(b"AUTH", scene.address("heir"))
        _, source = heir.recvfrom(9)
        heir.sendmsg([b"OK"], [scene.owned("1.3")], 0, source)
        assert late.recv(9) == b"OK"


def test_d16_member_becomes_the_master(scene: Scene) -> None:
    """A member may bind the bus that has lost its master, and keeps what it has."""
    one, two = scene.join("1.1"), scene.join("1.2")
    with pytest.raises(afbus.AddressInUse):
        one.bind(scene.address("heir"))
    scene.master.close()
    with pytest.raises(afbus.AddressInUse):
        one.bind(scene.address("1.2"))
    with pytest.raises(afbus.InvalidArgument):
        one.bind(scene.address("heir"), width=1024)
    one.bind(scene.address("heir"))
    assert [address.address for address in one.addresses()] == [b"1.1", b"heir"]
    assert scene.read_notice(one).event is Event.MASTER_LOST
    one.sendmsg([b"x"], [scene.owned("given")], 0, scene.address("1.2"))
    assert scene.address("given") in two.addresses()


def test_d16_killed_master_is_lost_for_all(scene: Scene) -> None:
    """The same when the master is a process that is killed: told, and a new one can come."""
    path = scene.path + "b"
    process = scene.start(
        """
one.bind((args[0], "master"))
say("bound")
while True:
    one.recv(99)
""",
        path,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "bound\n"
    one = scene.socket()
    assert one.attach(path) == afbus.BusAddress(path, "master")
    process.kill()
    assert scene.read_notice(one).event is Event.MASTER_LOST
    assert one.state()["master"] == "lost"
    with scene.socket() as heir:
        heir.bind((path, "master"))
        assert scene.read_notice(one).event is Event.MASTER_BACK


# the agent


@pytest.fixture
def mortal(make_node: Callable[..., NodeProcess], make_scene: Callable[..., Scene]) -> Scene:
    """A bus on an agent of its own, which may be killed."""
    return make_scene(make_node())


def test_d16_hang_up_only_when_the_agent_dies(mortal: Scene) -> None:
    """POLLHUP means that the agent is gone, and nothing less does."""
    one, two = mortal.join("1.1"), mortal.join("1.2")
    numbers = [one.fileno(), two.fileno()]
    two.close()
    mortal.master.close()
    assert mortal.read_notice(one).event is Event.MASTER_LOST
    one.shutdown(socket.SHUT_WR)
    assert not poll(one) & (select.POLLHUP | select.POLLERR)
    mortal.node.kill()
    assert poll(one) & select.POLLHUP
    with pytest.raises(afbus.NotConnected) as caught:
        one.recv(9)
    assert caught.value.errno == errno.ENOTCONN
    assert one.fileno() == numbers[0]
    mortal.node.start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
def test_d16_d21_endpoints_come_back_with_everything(mortal: Scene, number: int) -> None:
    """A new agent knows addresses, matches, rights, options and the master of those who return."""
    one = mortal.join("1.1", "name", items=(mortal.may_send(Terms("topic")),))
    two = mortal.join("1.2", items=(mortal.hears(Terms("topic")), mortal.flags(3)))
    two.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    # r0 = the first byte of the body; exit: what begins with a zero does not pass.
    two.setsockopt(
        afbus.BUS_SOCKET, afbus.SO_BUS_FILTER, b"\x71\x10" + bytes(6) + b"\x95" + bytes(7)
    )
    mortal.read_all(two)
    one.sendto(b"left over", mortal.address("1.2"))
    epoch = one.state()["epoch"]
    if number == signal.SIGKILL:
        mortal.node.kill()
    else:
        mortal.node.end()
    for member in (one, two, mortal.master):
        member.setblocking(False)
    # What the old agent had delivered is read first.
    bodies = [mortal.read(two)[0], mortal.read(two)[0]]
    assert bodies == [b"left over"] * 2, "the message, and the monitor's copy"
    for member in (one, two, mortal.master):
        with pytest.raises(afbus.NotConnected):
            member.recv(9)
        with pytest.raises(afbus.NoAgent) as caught:
            member.sendto(b"x", mortal.address("1.2"))
        assert caught.value.errno == errno.ECONNREFUSED
    mortal.node.start()
    for member in (mortal.master, one, two):
        member.settimeout(20)
        notice = mortal.read_notice(member)
        assert (notice.event, "began anew" in notice.reason) == (Event.GAP, True)
    assert one.state()["epoch"] > epoch
    assert [address.address for address in one.addresses()] == [b"1.1", b"name"]
    assert one.master() == mortal.master_address
    assert mortal.master.state()["is_master"]
    assert sorted(two.state()["grants"]) == ["MONITOR", "NOTICES"]
    one.sendmsg([b"said"], [mortal.terms("topic.x")], 0, mortal.multicast())
    body, found, _, source = mortal.read(two)
    assert (body, source) == (b"said", mortal.address("1.1"))
    assert socket.SCM_CREDENTIALS in found
    assert mortal.read(two)[2] == afbus.MSG_MONITOR
    one.sendmsg([b"\0filtered"], [mortal.terms("topic.x")], 0, mortal.multicast())
    assert mortal.read(two)[2] == afbus.MSG_MONITOR
    assert mortal.is_empty(two)
    mortal.grant(one, mortal.owned("more"))
    # D3: unique addresses are spent, also those that nobody has any more.
    with pytest.raises(afbus.AddressInUse):
        mortal.command(mortal.address("1.1"), mortal.owned("1.2"))


def test_d16_d15_who_died_with_the_agent_is_told(mortal: Scene) -> None:
    """A member whose process ended while there was no agent is told as killed by the next one."""
    process = mortal.start("one.sendto(b'AUTH', master)\none.recv(9)\nsay('in')\none.recv(9)")
    mortal.let_in("1.1")
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    mortal.node.kill()
    process.kill()
    process.wait()
    mortal.node.start()
    with pytest.raises(afbus.NotConnected):
        mortal.master.recv(9)
    told = [mortal.read_notice(mortal.master) for _ in range(2)]
    assert [notice.event for notice in told] == [Event.GAP, Event.KILLED]
    assert told[1].subject == (b"1.1",)
    with pytest.raises(afbus.AddressInUse):
        mortal.command(mortal.master_address, mortal.owned("1.1"))


def test_d16_d15_who_does_not_return_in_time_is_killed(
    make_node: Callable[..., NodeProcess], make_scene: Callable[..., Scene]
) -> None:
    """After the time of grace its addresses are free; what is sent to it meanwhile waits."""
    # Long enough for the master itself to return on a machine that is busy.
    scene = make_scene(make_node({"grace_s": 3.0}))
    process = scene.start("one.sendto(b'AUTH', master)\none.recv(9)\nsay('in')\nsys.stdin.read()")
    scene.let_in("1.1", "name")
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    scene.node.kill()
    scene.node.start()
    with pytest.raises(afbus.NotConnected):
        scene.master.recv(9)
    assert scene.read_notice(scene.master).event is Event.GAP
    notice = scene.await_notice(Event.KILLED)
    assert notice.subject == (b"1.1", b"name")
    scene.command(scene.master_address, scene.owned("name"))


def test_d16_another_process_cannot_resume(mortal: Scene) -> None:
    """What the old agent knew of an endpoint is given to the process that it was, and no other."""
    one = mortal.join("1.1")
    token = one._endpoint.welcome.token
    mortal.node.kill()
    mortal.node.start()
    program = f"""
from afbus.client.door import Door
from afbus.proto.frames import Hello
import pathlib
hello = Hello(resume={token!r}, tx_bytes=4096, rx_bytes=4096)
welcome, descriptors = Door(pathlib.Path(door)).hello(hello)
say(welcome.resumed)
"""
    assert mortal.start(program).communicate()[0] == "False\n"
    with pytest.raises(afbus.NotConnected):
        one.recv(9)
    assert mortal.read_notice(one).event is Event.GAP
    assert one.addresses() == [mortal.address("1.1")]


def test_d21_outcome_that_nobody_knows(mortal: Scene) -> None:
    """An agent that does not answer in time leaves the outcome unknown, and it is told so."""
    one, two = mortal.join("1.1"), mortal.join("1.2")
    os.kill(mortal.node.pid, signal.SIGSTOP)
    # Until all of its threads stand still.
    os.waitid(os.P_PID, mortal.node.pid, os.WSTOPPED)
    try:
        one.settimeout(0.05)
        with pytest.raises(afbus.OutcomeUnknown) as caught:
            one.sendto(b"perhaps", mortal.address("1.2"))
        assert caught.value.errno == errno.ECONNABORTED
    finally:
        os.kill(mortal.node.pid, signal.SIGCONT)
    # It was published, so it arrives: once.
    assert two.recv(9) == b"perhaps"
    one.settimeout(20)
    one.sendto(b"surely", mortal.address("1.2"))
    assert two.recv(9) == b"surely"


def test_d16_waiting_calls_outlast_the_agent(mortal: Scene) -> None:
    """A blocking receiver is told once, and its next call waits for the next agent."""
    process = mortal.start(
        """
one.sendto(b"AUTH", master)
one.recv(9)
say("in")
try:
    one.recv(9)
except afbus.NotConnected:
    say("told")
for _ in range(2):
    body, source = one.recvfrom(999)
    say("notice" if source.address == b"" else body.decode())
"""
    )
    mortal.let_in("1.1")
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    mortal.node.kill()
    assert process.stdout.readline() == "told\n"
    mortal.node.start()
    assert process.stdout.readline() == "notice\n"
    with pytest.raises(afbus.NotConnected):
        mortal.master.recv(9)
    mortal.master.sendto(b"hello", mortal.address("1.1"))
    assert process.communicate()[0] == "hello\n"
