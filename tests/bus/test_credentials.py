"""Who sent a message: what receivers are told, and that nobody can say otherwise (D17)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import Event, Identity

if TYPE_CHECKING:
    from tests.bus.conftest import Scene

pytestmark = pytest.mark.cluster

UCRED = struct.Struct("=iII")
EVERYTHING = bytes(64)

# Joins, and sends one message to `1.1` and one to everybody.
SENDER = """
one.sendto(b"AUTH", master)
one.recv(9)
one.sendto(b"unicast", (path, "1.1"))
one.sendto(b"multicast", afbus.BusAddress.multicast(path, bytes(64)))
one.sendmmsg([b"batch"], (path, "1.1"))
sys.stdin.readline()
"""


def test_r10_r11_d17_credentials_are_those_of_the_process(scene: Scene) -> None:
    """With SO_PASSCRED each message says pid, uid and gid of the process that sent it."""
    one = scene.join("1.1", items=(scene.hears(EVERYTHING),))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    process = scene.start(SENDER)
    scene.let_in("1.2", items=(scene.may_send(EVERYTHING),))
    for expected in (b"unicast", b"multicast", b"batch"):
        body, found, _, _ = scene.read(one)
        assert body == expected
        assert UCRED.unpack(found[socket.SCM_CREDENTIALS]) == (
            process.pid,
            os.getuid(),
            os.getgid(),
        )
        identity = Identity.decode(found[afbus.SCM_IDENTITY])
        assert (identity.pid, identity.uid, identity.gid) == (process.pid, os.getuid(), os.getgid())
        assert identity.principal == f"uid:{os.getuid()}"
        assert identity.node == one.status()["node"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_d17_credentials_of_another_user(scene: Scene) -> None:
    """They come from the kernel, at the time when the socket was made."""
    scene.master.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    process = scene.start(
        """
two = become_nobody()
two.sendto(b"AUTH", master)
two.recv(9)
two.sendto(b"hello", master)
"""
    )
    source = scene.next_request()
    scene.master.sendmsg([b"OK"], [scene.owned("1.1")], 0, source)
    notice = scene.await_notice(Event.JOINED)
    assert (notice.detail["pid"], notice.detail["uid"], notice.detail["gid"]) == (
        process.pid,
        65534,
        65534,
    )
    body, found, _, _ = scene.read(scene.master)
    assert body == b"hello"
    assert UCRED.unpack(found[socket.SCM_CREDENTIALS]) == (process.pid, 65534, 65534)
    assert Identity.decode(found[afbus.SCM_IDENTITY]).principal == "uid:65534"
    assert process.wait() == 0


def test_r11_d17_only_who_asks_is_told(scene: Scene) -> None:
    """SO_PASSCRED is an option of the receiver, which can be switched on and off."""
    one, two = scene.join("1.1"), scene.join("1.2")
    kinds = []
    for on in (0, 1, 0):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, on)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == on
        two.sendto(b"x", scene.address("1.1"))
        kinds.append(set(scene.read(one)[1]))
    both = {socket.SCM_CREDENTIALS, afbus.SCM_IDENTITY}
    assert kinds == [set(), both, set()]


def test_d17_messages_with_commands_have_an_identity_too(scene: Scene) -> None:
    """A member learns who its master is from what he grants."""
    one = scene.join("1.1")
    one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    scene.command(scene.address("1.1"), scene.owned("name"))
    _, found, _, _ = scene.read(one)
    assert UCRED.unpack(found[socket.SCM_CREDENTIALS])[0] == os.getpid()
    assert afbus.SCM_OWNED_ADDR in found


def test_d17_notices_have_no_identity(scene: Scene) -> None:
    """Nobody sends them, so nobody stands behind them."""
    scene.master.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    one = scene.join("1.1")
    one.close()
    _, items, _, source = scene.master.recvmsg(999, 999)
    assert source.is_kernel
    assert items == []


@pytest.mark.parametrize("field", range(3))
def test_r10_d17_d7_false_credentials_are_eperm(scene: Scene, field: int) -> None:
    """Who states credentials must state its own, as with sendmsg(2)."""
    one = scene.join("1.1")
    mine = [os.getpid(), os.getuid(), os.getgid()]
    one.sendmsg(
        [b"true"],
        [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, UCRED.pack(*mine))],
        socket.MSG_NOSIGNAL,
        scene.master_address,
    )
    assert scene.master.recv(9) == b"true"
    mine[field] += 1
    with pytest.raises(PermissionError) as caught:
        one.sendmsg(
            [b"false"],
            [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, UCRED.pack(*mine))],
            0,
            scene.master_address,
        )
    assert caught.value.errno == errno.EPERM
    assert scene.is_empty(scene.master)


def test_d17_nobody_can_state_an_identity(scene: Scene) -> None:
    """An identity is what the agent attests: as an item of a message it is EINVAL."""
    one = scene.join("1.1")
    forged = Identity("uid:0", "elsewhere", 1, 0, 0).encode()
    with pytest.raises(afbus.InvalidArgument):
        one.sendmsg(
            [b"x"], [(afbus.BUS_SOCKET, afbus.SCM_IDENTITY, forged)], 0, scene.master_address
        )


def test_d17_case10_socket_does_not_survive_a_fork(scene: Scene) -> None:
    """A child cannot speak as its parent, and the parent notices nothing of it."""
    process = scene.start(
        """
one.connect(master)
one.send(b"AUTH")
one.recv(9)
child = os.fork()
if child == 0:
    for attempt in (
        lambda: one.sendto(b"as parent", master),
        lambda: one.send(b"as parent"),
        lambda: one.recv(9),
        one.addresses,
    ):
        try:
            attempt()
        except OSError as error:
            say(error.errno)
    one.close()
    os._exit(0)
os.waitpid(child, 0)
one.sendto(b"parent", master)
one.close()
"""
    )
    scene.let_in("1.1")
    answers = process.communicate()[0].split()
    assert set(map(int, answers)) <= {errno.ENOTCONN, errno.EBADF}
    assert len(answers) == 4
    assert scene.master.recvfrom(9) == (b"parent", scene.address("1.1"))
    assert scene.await_notice(Event.LEFT).subject == (b"1.1",)
