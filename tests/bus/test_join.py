"""Buses are bound, endpoints join: the mail's points 1 and 2."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import BusAddress

if TYPE_CHECKING:
    from tests.bus.conftest import Scene

pytestmark = pytest.mark.cluster

# `struct sockaddr_bus` as a C program would fill it.
SOCKADDR = struct.Struct("=HH108s256s")

UCRED = struct.Struct("=iII")


# point 1: a process creates a bus


def test_r1_r6_d2_who_binds_is_the_master(scene: Scene) -> None:
    """Binding creates the bus, owns the address and makes its owner the master."""
    master = scene.master
    assert master.getsockname() == scene.master_address
    assert master.master() == scene.master_address
    assert master.state()["is_master"]
    stranger = scene.socket()
    with pytest.raises(afbus.NoBus) as caught:
        stranger.attach(scene.path + "x")
    assert caught.value.errno == errno.ENOENT
    assert stranger.attach(scene.path) == scene.master_address
    assert not stranger.state()["is_master"]


def test_d2_d7_second_bind_is_refused(scene: Scene) -> None:
    """A bus is its path: it is bound once, whatever the address and whoever asks."""
    for within in ("master", "another"):
        with scene.socket() as second, pytest.raises(afbus.AddressInUse) as caught:
            second.bind(scene.address(within))
        assert caught.value.errno == errno.EADDRINUSE
        assert scene.path in str(caught.value)
    program = "try:\n one.bind(master)\nexcept OSError as e:\n say(e.errno)"
    assert scene.start(program).communicate()[0] == f"{errno.EADDRINUSE}\n"
    # Nor can the master bind twice, there or elsewhere.
    for path in (scene.path, scene.path + "x"):
        with pytest.raises(afbus.InvalidArgument):
            scene.master.bind((path, "master"))


def test_r6_d2_bus_ends_with_its_last_endpoint(scene: Scene) -> None:
    """When nobody is on it a bus is gone, and its path free for anybody."""
    scene.master.close()
    stranger = scene.socket()
    with pytest.raises(afbus.NoBus):
        stranger.attach(scene.path)
    stranger.bind(scene.address("new"), width=1024)
    assert stranger.master() == scene.address("new")


def test_d2_buses_do_not_mix(scene: Scene) -> None:
    """The same addresses on another path are others."""
    other = scene.socket()
    other.bind((scene.path + "b", "master"))
    here = scene.join("1.1", "name")
    there = scene.socket()
    there.sendto(b"AUTH", (scene.path + "b", "master"))
    assert other.recv(9) == b"AUTH"
    address = BusAddress(scene.path + "b", "1.1")
    item = (afbus.BUS_SOCKET, afbus.SCM_OWNED_ADDR, address.pack())
    other.sendmsg([b"welcome"], [item], 0, there.getsockname())
    assert there.recv(9) == b"welcome"
    there.sendto(b"to itself", address)
    assert there.recvfrom(99) == (b"to itself", address)
    assert scene.is_empty(here)
    with pytest.raises(afbus.NoSuchEndpoint) as caught:
        there.sendto(b"x", scene.address("1.1"))
    assert caught.value.errno == errno.EHOSTUNREACH


@pytest.mark.parametrize("kind", ["kernel", "multicast", "provisional"])
def test_r3_d6_only_a_normal_address_can_be_bound(scene: Scene, kind: str) -> None:
    """The kernel's address, a multicast one and a provisional one are nobody's."""
    path = scene.path + "c"
    address = {
        "kernel": BusAddress.kernel(path),
        "multicast": BusAddress.multicast(path, bytes(64)),
        "provisional": BusAddress(path, "@1"),
    }[kind]
    one = scene.socket()
    with pytest.raises(OSError, match=r"address|own") as caught:
        one.bind(address)
    assert caught.value.errno in (errno.EINVAL, errno.EADDRNOTAVAIL)
    assert one.path is None


def test_d8_d11_options_of_a_bus(scene: Scene) -> None:
    """Width and order are chosen at creation, and nothing else is taken for one."""
    for width, order in ((512, "fifo"), (1024, "total"), (2048, "total")):
        with scene.socket() as one:
            one.bind((scene.path + "d", "master"), width=width, order=order)
            rows = {row["path"]: row for row in one.listing("buses")}
            assert (rows[scene.path + "d"]["width"], rows[scene.path + "d"]["order"]) == (
                width,
                order,
            )
    with scene.socket() as one:
        for wrong in ({"width": 100}, {"order": "causal"}):
            with pytest.raises(afbus.InvalidArgument):
                one.bind((scene.path + "d", "master"), **wrong)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_d2_bus_is_its_users(scene: Scene) -> None:
    """While somebody is on it, only the user who created it can be its master again."""
    member = scene.join("1.1")
    scene.master.close()
    program = """
two = become_nobody()
try:
    two.bind(master)
except OSError as error:
    say(error.errno, error)
"""
    answer = scene.start(program).communicate()[0]
    assert answer.startswith(f"{errno.EADDRINUSE} ")
    assert "another user's" in answer
    assert scene.read_notice(member).event is afbus.Event.MASTER_LOST
    with scene.socket() as again:
        again.bind(scene.master_address)
        assert scene.read_notice(member).event is afbus.Event.MASTER_BACK


# addresses as bytes


def test_r7_r8_r9_d1_structure_of_the_mail(scene: Scene) -> None:
    """What is received is the C structure: family, rounded count, path with its NULs, bytes."""
    path = scene.path.encode()
    member = scene.socket()
    member.sendto(b"AUTH", scene.master_address)
    source = scene.next_request()
    names = [(b"1.1", 1), (b"org.freedesktop.DBus", 3), (b"12345678", 2), (b"n" * 256, 32)]
    given = [
        (afbus.BUS_SOCKET, afbus.SCM_OWNED_ADDR, SOCKADDR.pack(afbus.AF_BUS, count, path, name))
        for name, count in names
    ]
    scene.master.sendmsg([b"OK"], given, 0, source)
    body, items, flags, _ = member.recvmsg(99, 8192)
    assert (body, items, flags) == (b"OK", given, 0)
    assert [address.address for address in member.addresses()] == [name for name, _ in names]
    assert member.getsockopt(afbus.BUS_SOCKET, afbus.SO_BUS_ADDRESSES, 4096) == b"".join(
        data for _, _, data in given
    )
    for name, _ in names:
        member.sendto(b"to " + name[:9], scene.address(name))
        assert member.recv(99) == b"to " + name[:9]


def test_r8_d1_zeros_at_the_end_mean_nothing(scene: Scene) -> None:
    """The sizes of the components a name is copied into do not make another address."""
    member = scene.join("name")
    member.sendto(b"x", (scene.path, b"name\0\0\0\0\0\0"))
    assert member.recv(9) == b"x"
    padded = SOCKADDR.pack(afbus.AF_BUS, 7, scene.path.encode(), b"name")
    scene.master.sendmsg(
        [b"again"], [(afbus.BUS_SOCKET, afbus.SCM_OWNED_ADDR, padded)], 0, scene.address("name")
    )
    assert member.recv(9) == b"again"
    assert member.addresses() == [scene.address("name")]


def test_r8_d1_addresses_are_bytes(scene: Scene) -> None:
    """Any bytes make a name; only zeros at its end are none."""
    names = [b"\xff\xfe", b"a\0b", b"*", b" ", "Grüße".encode(), bytes(range(1, 256))]
    one = scene.join(*names)
    assert [address.address for address in one.addresses()] == names
    for name in names:
        one.sendmsg([name], [scene.source(name)], 0, scene.address(name))
        assert one.recvfrom(999) == (name, scene.address(name))
        text = scene.address(name).format()
        one.sendto(b"by its text form", text)
        assert one.recv(99) == b"by its text form"


def test_r7_d1_d7_too_long_is_never_cut(scene: Scene) -> None:
    """A path of 106 bytes and an address of 256 are right, one more is ENAMETOOLONG."""
    one = scene.socket()
    one.bind(("/" + "p" * 105, "m" * 256))
    one.sendto(b"x", ("/" + "p" * 105, "m" * 256))
    assert one.recv(9) == b"x"
    other = scene.socket()
    for path, within in (("/" + "p" * 106, "m"), ("/p", "m" * 257)):
        for call in (other.bind, lambda address: scene.socket().sendto(b"x", address)):
            with pytest.raises(afbus.NameTooLong) as caught:
                call((path, within))
            assert caught.value.errno == errno.ENAMETOOLONG


# point 2: an endpoint joins, and is given addresses


def test_r10_r11_r12_join_of_another_process(scene: Scene) -> None:
    """AUTH with credentials from a process, a reply with its address, and it talks at once."""
    scene.master.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, struct.pack("=i", 1))
    neighbour = scene.join("1.7")
    process = scene.start(
        """
ucred = struct.pack("=iII", os.getpid(), os.getuid(), os.getgid())
auth = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ucred)]
one.sendmsg([b"AUTH"], auth, socket.MSG_NOSIGNAL, master)
say(os.getpid())
data, items, flags, source = one.recvmsg(4096, 4096, socket.MSG_NOSIGNAL)
one.sendto(b"from " + b" ".join(a.address for a in one.addresses()), (path, "1.7"))
say(data.decode(), [i[1] for i in items], source.address.decode())
"""
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    body, found, _, source = scene.read(scene.master)
    assert body == b"AUTH"
    assert UCRED.unpack(found[socket.SCM_CREDENTIALS]) == (pid, os.getuid(), os.getgid())
    assert source.is_provisional
    items = [scene.owned("1.1"), scene.owned("com.example.service1")]
    scene.master.sendmsg([b"OK"], items, socket.MSG_NOSIGNAL, source)
    heard = neighbour.recvfrom(99)
    assert heard == (b"from 1.1 com.example.service1", scene.address("1.1"))
    assert process.communicate()[0] == "OK [1, 1] master\n"


def test_r10_d7_unjoined_reaches_the_master_alone(scene: Scene) -> None:
    """Before it has an address an endpoint can send to nobody but the master."""
    scene.join("1.1", "name")
    stranger = scene.socket()
    assert stranger.attach(scene.path) == scene.master_address
    bits = [scene.hears(bytes(64))]
    scene.join("1.2", items=tuple(bits))
    for address in ("1.1", "name", "nobody", "1.99", "@1"):
        with pytest.raises(afbus.NotJoined) as caught:
            stranger.sendto(b"x", scene.address(address))
        assert caught.value.errno == errno.EHOSTUNREACH
    for multicast, items in (
        (scene.multicast(bytes(64)), []),
        (scene.multicast(), [scene.terms("topic")]),
    ):
        with pytest.raises(afbus.NotJoined):
            stranger.sendmsg([b"x"], items, 0, multicast)
    assert stranger.sendto(b"AUTH", scene.master_address) == 4
    assert scene.next_request() == stranger.getsockname()


def test_r11_refusal_comes_without_an_address(scene: Scene) -> None:
    """Who is refused reads a reply, is as unjoined as before, and may ask again."""
    stranger = scene.socket()
    stranger.sendto(b"AUTH", scene.master_address)
    scene.master.sendto(b"no", scene.next_request())
    assert stranger.recvmsg(99, 999) == (b"no", [], 0, scene.master_address)
    assert stranger.addresses() == []
    with pytest.raises(afbus.NotJoined):
        stranger.sendto(b"x", scene.address("1.1"))
    stranger.sendto(b"AUTH", scene.master_address)
    scene.let_in("1.1")
    assert stranger.recv(9) == b"welcome"
    assert stranger.getsockname() == scene.address("1.1")


def test_r11_r13_several_addresses_in_one_reply(scene: Scene) -> None:
    """Each item gives one address; the first is the default source, whatever comes later."""
    member = scene.join("service", "1.1", "other")
    scene.grant(member, scene.owned("later"))
    assert [one.address for one in member.addresses()] == [b"service", b"1.1", b"other", b"later"]
    member.sendto(b"x", scene.master_address)
    assert scene.master.recvfrom(9)[1] == scene.address("service")
    scene.revoke(member, scene.disowned("service"))
    member.sendto(b"x", scene.master_address)
    assert scene.master.recvfrom(9)[1] == scene.address("1.1")


def test_r12_d5_address_is_in_force_before_the_reply_can_be_read(scene: Scene) -> None:
    """Many times over: at once after reading, the endpoint sends with its new address."""
    member, neighbour = scene.join("1.1"), scene.join("1.2")
    names = [f"name{number}" for number in range(120)]

    def answer() -> None:
        for _ in names:
            _, ((_, _, packed),), _, _ = member.recvmsg(99, 999)
            source = (afbus.BUS_SOCKET, afbus.SCM_SRC_ADDR, packed)
            member.sendmsg([b"at once"], [source], 0, scene.address("1.2"))

    thread = threading.Thread(target=answer)
    thread.start()
    for name in names:
        scene.command(scene.address("1.1"), scene.owned(name))
        assert neighbour.recvfrom(99) == (b"at once", scene.address(name))
    thread.join()


def test_r12_d5_unjoined_endpoint_talks_at_once(scene: Scene) -> None:
    """The same for the first address, in processes that send without looking back."""
    neighbour = scene.join("1.9999")
    process = scene.start(
        """
one.close()
for number in range(200):
    with afbus.socket(node=door) as two:
        two.settimeout(60)
        two.sendto(b"AUTH", master)
        two.recv(99)
        two.sendto(b"at once", (path, "1.9999"))
"""
    )
    for number in range(200):
        scene.let_in(f"1.{number}")
        assert neighbour.recvfrom(99) == (b"at once", scene.address(f"1.{number}"))
    assert process.wait() == 0
