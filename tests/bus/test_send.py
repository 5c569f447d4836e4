"""What becomes of a message to one: each verdict of D7, at the call that sent it."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import random
import select
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

import afbus
from afbus import BusAddress

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import NodeProcess, Scene

pytestmark = pytest.mark.cluster

KIB = 1024


def rights(*descriptors: int) -> tuple[int, int, bytes]:
    """The item that carries descriptors."""
    return (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())


# what arrives


def test_r5_d14_d21_body_arrives_as_it_was_sent(scene: Scene) -> None:
    """Bodies are opaque, of any size, in any parts; accepted means there to be read."""
    one, two = scene.join("1.1"), scene.join("1.2")
    draw = random.Random(5)
    for size in (0, 1, 7, 8, 9, 4095, 65536, 65537, 1 << 20):
        body = draw.randbytes(size)
        cut = draw.randint(0, size)
        parts: list[Any] = [body[:cut], bytearray(), memoryview(body)[cut:]]
        assert one.sendmsg(parts, [], 0, scene.address("1.2")) == size
        assert two.recv(1 << 24, socket.MSG_DONTWAIT) == body


def test_d14_d7_largest_message(scene: Scene) -> None:
    """16 MiB pass, one byte more is EMSGSIZE, and the next message passes again."""
    one, two = scene.join("1.1"), scene.join("1.2")
    largest = bytes(16 << 20)
    one.sendto(largest, scene.address("1.2"))
    assert two.recv(1 << 24) == largest
    attempts: list[Callable[[], int]] = [
        lambda: one.sendto(largest + b"x", scene.address("1.2")),
        lambda: one.sendmsg([largest, b"x"], [], 0, scene.address("1.2")),
        lambda: one.sendmmsg([largest + b"x"], scene.address("1.2")),
    ]
    for sends in attempts:
        with pytest.raises(afbus.TooBig) as caught:
            sends()
        assert caught.value.errno == errno.EMSGSIZE
    one.sendto(b"x", scene.address("1.2"))
    assert two.recv(9) == b"x"


def test_d14_d7_message_that_can_never_fit(scene: Scene) -> None:
    """What is larger than the receiver's ring is EMSGSIZE at once, and not waited for."""
    one, small = scene.join("1.1"), scene.join("1.2", rx_bytes=4096)
    with pytest.raises(afbus.TooBig):
        one.sendto(bytes(5000), scene.address("1.2"))
    # In a memfd only its descriptor takes room.
    one.sendto(bytes(100 * KIB), scene.address("1.2"))
    assert small.recv(1 << 20) == bytes(100 * KIB)


def test_r13_d6_source_is_stamped_by_the_agent(scene: Scene) -> None:
    """The receiver gets the default source, or the owned one that was chosen for the message."""
    one, two = scene.join("1.1", "com.example.service1"), scene.join("1.2")
    chosen = scene.source("com.example.service1")
    one.sendto(b"a", scene.address("1.2"))
    one.sendmsg([b"b"], [chosen], 0, scene.address("1.2"))
    assert one.sendmmsg([b"c", b"d"], scene.address("1.2"), 0, [chosen]) == 2
    service = scene.address("com.example.service1")
    assert [two.recvfrom(9) for _ in range(4)] == [
        (b"a", scene.address("1.1")),
        (b"b", service),
        (b"c", service),
        (b"d", service),
    ]
    # The receiver can answer to the address that it was given.
    two.sendto(b"answer", service)
    assert one.recv(9) == b"answer"


@pytest.mark.parametrize("what", ["another's", "free", "revoked", "kernel", "multicast", "bus"])
def test_d6_d7_forged_source_is_eaddrnotavail(scene: Scene, what: str) -> None:
    """A source that is not the sender's is refused by unicast and multicast, and nobody hears."""
    one = scene.join("1.1", "gone", items=(scene.may_send(bytes(64)),))
    two = scene.join("1.2", items=(scene.hears(bytes(64)),))
    scene.revoke(one, scene.disowned("gone"))
    source = {
        "another's": scene.address("1.2"),
        "free": scene.address("free"),
        "revoked": scene.address("gone"),
        "kernel": scene.kernel,
        "multicast": scene.multicast(bytes(64)),
        "bus": BusAddress(scene.path + "x", "1.1"),
    }[what]
    item = (afbus.BUS_SOCKET, afbus.SCM_SRC_ADDR, source.pack())
    attempts: list[Callable[[], int]] = [
        lambda: one.sendmsg([b"x"], [item], 0, scene.address("1.2")),
        lambda: one.sendmsg([b"x"], [item], 0, scene.multicast(bytes(64))),
        lambda: one.sendmmsg([b"x"], scene.address("1.2"), 0, [item]),
    ]
    for sends in attempts:
        with pytest.raises(afbus.NotOwned) as caught:
            sends()
        assert caught.value.errno == errno.EADDRNOTAVAIL
    assert scene.is_empty(two)


def test_d6_unjoined_endpoint_has_no_source_to_choose(scene: Scene) -> None:
    """Before it has joined, an endpoint is known by its provisional address and no other."""
    stranger = scene.socket()
    stranger.attach(scene.path)
    with pytest.raises(afbus.NotOwned):
        stranger.sendmsg([b"x"], [scene.source("1.1")], 0, scene.master_address)
    stranger.sendto(b"AUTH", scene.master_address)
    assert scene.next_request() == stranger.getsockname()


def test_d21_receiver_sees_each_message_once(scene: Scene) -> None:
    """Sequence numbers of a sender run from 1 without holes over all that it had accepted."""
    one, two = scene.join("1.1"), scene.join("1.2")
    two.setsockopt(afbus.BUS_SOCKET, afbus.SO_BUS_DETAILS, 1)
    sent_before = one.stats()["sent"]
    for number in range(50):
        if number % 5 == 4:
            with pytest.raises(afbus.NoSuchEndpoint):
                one.sendto(b"refused", scene.address("1.77"))
        one.sendto(b"%d" % number, scene.address("1.2"))
    got = [scene.read(two) for _ in range(50)]
    assert [body for body, *_ in got] == [b"%d" % number for number in range(50)]
    numbers = [int.from_bytes(found[afbus.SCM_SEQ], "little") for _, found, _, _ in got]
    assert numbers == list(range(sent_before + 1, sent_before + 51))
    assert {found[afbus.SCM_DST_ADDR] for _, found, _, _ in got} == {scene.address("1.2").pack()}


# where it goes


def test_d7_unknown_name_goes_to_the_master(scene: Scene) -> None:
    """A name that nobody owns leads to the master, who sees what it was; so does one given up."""
    scene.master.setsockopt(afbus.BUS_SOCKET, afbus.SO_BUS_DETAILS, 1)
    one, two = scene.join("1.1"), scene.join("1.2", "service")
    for name in ("never.owned", "service"):
        if name == "service":
            two.close()
            assert scene.await_notice(afbus.Event.LEFT).subject == (b"1.2", b"service")
        one.sendto(b"activate", scene.address(name))
        body, found, _, source = scene.read(scene.master)
        assert (body, source) == (b"activate", scene.address("1.1"))
        assert found[afbus.SCM_DST_ADDR] == scene.address(name).pack()
    # The master is not sent his own back.
    with pytest.raises(afbus.NoSuchEndpoint):
        scene.master.sendto(b"x", scene.address("never.owned"))


def test_d7_name_that_moved_leads_to_its_new_owner(scene: Scene) -> None:
    """A name may change its owner; what is sent afterwards goes there."""
    one, two, three = scene.join("1.1"), scene.join("1.2", "name"), scene.join("1.3")
    address = scene.address("name")
    one.sendto(b"first", address)
    scene.command(scene.address("1.2"), scene.disowned("name"))
    one.sendto(b"between", address)
    scene.grant(three, scene.owned("name"))
    one.sendto(b"second", address)
    assert two.recv(9) == b"first"
    assert three.recv(9) == b"second"
    assert scene.master.recv(9) == b"between"


def test_d3_d7_dead_unique_address(scene: Scene) -> None:
    """A unique address whose owner is gone, or that nobody ever had, is EHOSTUNREACH."""
    one, two = scene.join("1.1"), scene.join("1.2")
    provisional = BusAddress(scene.path, f"@{two.state()['endpoint']}")
    one.sendto(b"x", scene.address("1.2"))
    two.close()
    for address in (scene.address("1.2"), scene.address("1.99"), provisional):
        for sends in (one.sendto, scene.master.sendto):
            with pytest.raises(afbus.NoSuchEndpoint) as caught:
                sends(b"x", address)
            assert caught.value.errno == errno.EHOSTUNREACH
            assert address.format() in str(caught.value)


def test_d7_members_cannot_use_provisional_addresses(scene: Scene) -> None:
    """Only the master can answer where somebody has not joined."""
    one, stranger = scene.join("1.1"), scene.socket()
    stranger.attach(scene.path)
    with pytest.raises(afbus.NoSuchEndpoint):
        one.sendto(b"x", stranger.getsockname())
    scene.master.sendto(b"x", stranger.getsockname())
    assert stranger.recv(9) == b"x"


def test_d7_other_bus(scene: Scene) -> None:
    """A socket is on one bus: others are EHOSTUNREACH if they are there, and if they are not."""
    one = scene.join("1.1")
    other = scene.socket()
    other.bind((scene.path + "b", "master"))
    for path in (scene.path + "b", scene.path + "nowhere"):
        with pytest.raises(afbus.NoSuchEndpoint) as caught:
            one.sendto(b"x", (path, "master"))
        assert caught.value.errno == errno.EHOSTUNREACH
    assert scene.is_empty(other)


def test_d7_no_such_bus(scene: Scene) -> None:
    """Who is on no bus yet is told that there is none: ENOENT."""
    with pytest.raises(FileNotFoundError) as caught:
        scene.socket().sendto(b"x", (scene.path + "nowhere", "master"))
    assert isinstance(caught.value, afbus.NoBus)
    assert caught.value.errno == errno.ENOENT


def test_d7_d16_master_is_gone(scene: Scene) -> None:
    """What only the master could take is EHOSTDOWN; the rest goes on."""
    one, two = scene.join("1.1"), scene.join("1.2")
    scene.master.close()
    for name in ("master", "unknown"):
        with pytest.raises(afbus.MasterLost, match=name) as caught:
            one.sendto(b"x", scene.address(name))
        assert caught.value.errno == errno.EHOSTDOWN
    one.sendto(b"x", scene.address("1.2"))
    assert scene.read_notice(two).event is afbus.Event.MASTER_LOST
    assert two.recv(9) == b"x"


@pytest.mark.parametrize("form", ["none", "kernel", "text"])
def test_r3_d6_d7_no_destination(scene: Scene, form: str) -> None:
    """Nobody can send to nobody, or to the kernel's address: EDESTADDRREQ."""
    one = scene.join("1.1")
    address = {"none": None, "kernel": scene.kernel, "text": f"{scene.path}:"}[form]
    with pytest.raises(afbus.BadDestination) as caught:
        one.sendmsg([b"x"], [], 0, address)
    assert caught.value.errno == errno.EDESTADDRREQ
    with pytest.raises(afbus.BadDestination):
        scene.master.sendmsg([b"x"], [scene.owned("1.5")], 0, address)


def test_d7_no_agent(scene: Scene, make_node: Callable[..., NodeProcess]) -> None:
    """Without an agent there is no socket: ECONNREFUSED, and a hint what to start."""
    nowhere = scene.node.place.with_name("nowhere")
    with pytest.raises(ConnectionRefusedError, match="afbus node") as caught:
        afbus.socket(node=nowhere)
    assert caught.value.errno == errno.ECONNREFUSED
    # The same for a door that a killed agent left behind.
    dead = make_node()
    dead.kill()
    assert dead.place.exists()
    with pytest.raises(afbus.NoAgent):
        afbus.socket(node=dead.place)
    dead.start()
    afbus.socket(node=dead.place).close()


# a full receiver


def test_d12_d7_full_receiver_is_eagain(scene: Scene) -> None:
    """Who does not wait is told EAGAIN, by a flag or a timeout of 0, and loses nothing."""
    one, two = scene.join("1.1"), scene.join("1.2", rx_bytes=4096)
    address = scene.address("1.2")
    one.sendto(bytes(3000), address)
    with pytest.raises(BlockingIOError) as caught:
        one.sendto(bytes(3000), socket.MSG_DONTWAIT, address)
    assert caught.value.errno == errno.EAGAIN
    one.setblocking(False)
    with pytest.raises(afbus.RingFull):
        one.sendmsg([bytes(3000)], [], 0, address)
    assert len(two.recv(9999)) == 3000
    assert scene.is_empty(two)
    one.sendto(bytes(3000), address)
    assert len(two.recv(9999)) == 3000


def test_d12_d7_blocking_sender_waits(scene: Scene) -> None:
    """Who waits goes on as soon as there is room, without losing or repeating anything."""
    one, two = scene.join("1.1"), scene.join("1.2", rx_bytes=4096)
    address = scene.address("1.2")
    count = 400
    process = scene.start(
        """
one.sendto(b"AUTH", master)
one.recv(99)
for number in range(int(args[0])):
    one.sendto(b"%300d" % number, (path, "1.2"))
one.close()
""",
        count,
    )
    scene.let_in("1.3")
    for number in range(count):
        assert int(two.recv(999)) == number
    assert process.wait() == 0
    one.sendto(b"room again", socket.MSG_DONTWAIT, address)


def test_d12_timeout_of_a_full_receiver(scene: Scene) -> None:
    """A timeout ends the wait in ETIMEDOUT, and nothing of the message arrives."""
    one, two = scene.join("1.1"), scene.join("1.2", rx_bytes=4096)
    one.sendto(bytes(3000), scene.address("1.2"))
    one.settimeout(0.02)
    with pytest.raises(TimeoutError) as caught:
        one.sendto(b"x" * 3000, scene.address("1.2"))
    assert caught.value.errno == errno.ETIMEDOUT
    assert two.recv(9999) == bytes(3000)
    assert scene.is_empty(two)


@pytest.mark.parametrize("how", ["close", "kill"])
def test_d12_d7_receiver_ends_while_the_sender_waits(scene: Scene, how: str) -> None:
    """Nobody waits for somebody who is gone: EHOSTUNREACH."""
    one = scene.join("1.1")
    process = scene.start(
        """
one.close()
two = afbus.socket(node=door, rx_bytes=4096)
two.sendto(b"AUTH", master)
two.recv(9)
sys.stdin.readline()
two.close()
"""
    )
    scene.let_in("1.2")
    assert process.stdin is not None
    scene.fill(one, scene.address("1.2"))
    caught: list[OSError] = []

    def wait() -> None:
        try:
            one.sendto(bytes(3000), scene.address("1.2"))
        except OSError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    # The receiver has somebody who waits for it.
    while not any(row["waiting"] for row in scene.master.listing("queues", scene.path)):
        pass
    if how == "close":
        process.stdin.write("\n")
        process.stdin.flush()
    else:
        process.kill()
    thread.join()
    assert [error.errno for error in caught] == [errno.EHOSTUNREACH]


def test_d12_d7_name_gets_an_owner_while_the_sender_waits(scene: Scene) -> None:
    """A sender that waits for the full master in place of nobody goes on to the new owner."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.settimeout(30)
    scene.fill(one, scene.address("name"), 50_000)
    outcome: list[object] = []

    def wait() -> None:
        try:
            outcome.append(one.sendto(b"x" * 50_000, scene.address("name")))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not any(row["waiting"] for row in scene.master.listing("queues", scene.path)):
        pass
    scene.command(two.getsockname(), scene.owned("name"))
    thread.join()
    assert outcome == [50_000]
    # The grant comes first of all, so the sender may be quicker than the message that brought it.
    assert {two.recv(1 << 20) for _ in range(2)} == {b"granted", b"x" * 50_000}


def test_d12_one_full_receiver_delays_nobody(scene: Scene) -> None:
    """Messages to others pass while one is full, and those of others to it keep their share."""
    one, two, third = scene.join("1.1"), scene.join("1.2"), scene.join("1.3")
    scene.join("1.9", rx_bytes=4096)
    scene.fill(one, scene.address("1.9"))
    one.sendto(b"passes", socket.MSG_DONTWAIT, scene.address("1.2"))
    assert two.recv(9) == b"passes"
    # D18: one sender cannot take all of the room.
    third.sendto(b"fits", socket.MSG_DONTWAIT, scene.address("1.9"))


# descriptors


def test_r20_d14_descriptors_travel(scene: Scene) -> None:
    """Files, pipes and sealed memfds arrive as descriptors of the same things, in their order."""
    one, two = scene.join("1.1"), scene.join("1.2")
    sealed = afbus.sealed_memfd([b"shared ", b"memory"])
    read_end, write_end = os.pipe()
    one.sendmsg([b"three"], [rights(sealed, write_end), rights(sealed)], 0, scene.address("1.2"))
    os.close(sealed)
    os.close(write_end)
    body, found, flags, _ = scene.read(two)
    assert (body, flags) == (b"three", 0)
    memory, pipe, again = array.array("i", found[socket.SCM_RIGHTS])
    assert not os.get_inheritable(memory)
    assert os.pread(memory, 99, 0) == os.pread(again, 99, 0) == b"shared memory"
    with pytest.raises(PermissionError):
        os.pwrite(memory, b"x", 0)
    os.write(pipe, b"through the pipe")
    assert os.read(read_end, 99) == b"through the pipe"
    for descriptor in (memory, pipe, again, read_end):
        os.close(descriptor)


def test_r20_d14_peers_go_on_over_shared_memory(scene: Scene) -> None:
    """A memfd that one process wrote and sealed is read by another that it was passed to."""
    two = scene.join("1.2")
    process = scene.start(
        """
import array
one.sendto(b"AUTH", master)
one.recv(9)
fd = afbus.sealed_memfd([b"of " + b"%d" % os.getpid()])
item = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
one.sendmsg([b"look"], [item], 0, (path, "1.2"))
one.close()
"""
    )
    scene.let_in("1.3")
    assert process.wait() == 0
    body, found, _, _ = scene.read(two)
    assert body == b"look"
    (memory,) = array.array("i", found[socket.SCM_RIGHTS])
    assert os.pread(memory, 99, 0) == b"of %d" % process.pid
    os.close(memory)


def test_d14_d7_unsealed_memfd_is_eopnotsupp(scene: Scene) -> None:
    """A memfd that its sender could still change is refused, alone or among others."""
    one, two = scene.join("1.1"), scene.join("1.2")
    plain = os.memfd_create("plain")
    half = os.memfd_create("half", os.MFD_ALLOW_SEALING)
    sealed = afbus.sealed_memfd([b"x"])
    for descriptors in ((plain,), (half,), (sealed, half)):
        with pytest.raises(afbus.CannotCarry) as caught:
            one.sendmsg([b"x"], [rights(*descriptors)], 0, scene.address("1.2"))
        assert caught.value.errno == errno.EOPNOTSUPP
    assert scene.is_empty(two)
    one.sendmsg([b"good"], [rights(sealed)], 0, scene.address("1.2"))
    _, found, _, _ = scene.read(two)
    for descriptor in (plain, half, sealed, *array.array("i", found[socket.SCM_RIGHTS])):
        os.close(descriptor)


def test_d7_descriptors_in_multicasts_are_eopnotsupp(scene: Scene) -> None:
    """Descriptors go to one endpoint at a time."""
    one = scene.join("1.1", items=(scene.may_send(bytes(64)),))
    two = scene.join("1.2", items=(scene.hears(bytes(64)),))
    with open(os.devnull, "rb") as file:
        item = rights(file.fileno())
        for address, items in (
            (scene.multicast(bytes(64)), [item]),
            (scene.multicast(), [item, scene.terms("topic")]),
        ):
            with pytest.raises(afbus.CannotCarry) as caught:
                one.sendmsg([b"x"], items, 0, address)
            assert caught.value.errno == errno.EOPNOTSUPP
        with pytest.raises(afbus.CannotCarry):
            scene.master.sendmsg([b"x"], [item, scene.owned("1.3")], 0, scene.address("1.1"))
    assert scene.is_empty(two)
    # A large body travels in a memfd of its own, which is no descriptor of the sender's.
    one.sendto(bytes(100 * KIB), scene.multicast(bytes(64)))
    assert two.recv(1 << 20) == bytes(100 * KIB)


def test_d7_case9_too_many_descriptors(scene: Scene) -> None:
    """16 descriptors pass, 17 are EMSGSIZE, a closed one is EBADF; none stays open anywhere."""
    one, two = scene.join("1.1"), scene.join("1.2")
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull, "rb") as file:
        number = file.fileno()
        with pytest.raises(afbus.TooBig) as caught:
            one.sendmsg([b"x"], [rights(*[number] * 17)], 0, scene.address("1.2"))
        assert caught.value.errno == errno.EMSGSIZE
        one.sendmsg([b"x"], [rights(*[number] * 16)], 0, scene.address("1.2"))
        _, found, _, _ = scene.read(two)
        got = array.array("i", found[socket.SCM_RIGHTS])
        assert len(got) == 16
        for descriptor in got:
            os.close(descriptor)
    with pytest.raises(OSError, match="not open") as closed:
        one.sendmsg([b"x"], [rights(number)], 0, scene.address("1.2"))
    assert closed.value.errno == errno.EBADF
    assert scene.is_empty(two)
    assert len(os.listdir("/proc/self/fd")) == before


# batches


def test_d7_batch_stops_at_the_first_refusal(scene: Scene) -> None:
    """What follows a refused message of a batch is cancelled: not sent, and not counted."""
    one, two = scene.join("1.1"), scene.join("1.2")
    good, bad = scene.address("1.2"), scene.address("1.99")
    assert one.sendmmsg([b"a", b"b", b"c", b"d"], [good, good, bad, good]) == 2
    assert scene.read_all(two) == [b"a", b"b"]
    with pytest.raises(afbus.NoSuchEndpoint):
        one.sendmmsg([b"c", b"d"], [bad, good])
    assert scene.is_empty(two)
    # A refusal is of its own batch.
    assert one.sendmmsg([b"e", b"f"], good) == 2
    assert scene.read_all(two) == [b"e", b"f"]
    assert one.sendmmsg([], good) == 0


def test_d12_batch_stops_where_the_room_ends(scene: Scene) -> None:
    """A batch that does not wait says how many fitted; the rest can follow later, in order."""
    one, two = scene.join("1.1"), scene.join("1.2", rx_bytes=4096)
    bodies = [b"%400d" % number for number in range(40)]
    got: list[bytes] = []
    sent = 0
    while sent < len(bodies):
        with contextlib.suppress(afbus.RingFull, afbus.ShareExceeded):
            sent += one.sendmmsg(bodies[sent:], scene.address("1.2"), socket.MSG_DONTWAIT)
        got += scene.read_all(two)
    assert got == bodies
    one.settimeout(20)
    thread = threading.Thread(target=one.sendmmsg, args=(bodies, scene.address("1.2")))
    thread.start()
    assert [two.recv(999) for _ in bodies] == bodies
    thread.join()


# after the end


def test_d7_d20_epipe_and_never_sigpipe(scene: Scene) -> None:
    """After shutdown, and without an agent, sends fail; the signal that would kill never comes."""
    program = """
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
one.sendto(b"AUTH", master)
one.recv(9)
one.shutdown(socket.SHUT_WR)
for attempt in (lambda: one.sendto(b"x", master), lambda: one.sendmmsg([b"x"], master)):
    try:
        attempt()
    except BrokenPipeError as error:
        say(error.errno)
"""
    process = scene.start(program)
    scene.let_in("1.1")
    assert process.communicate()[0] == f"{errno.EPIPE}\n" * 2
    assert process.returncode == 0


def test_d7_d16_no_sigpipe_when_the_agent_dies(
    make_node: Callable[..., NodeProcess], make_scene: Callable[..., Scene]
) -> None:
    """A process that sends while its agent is killed is told ENOTCONN, and lives."""
    node = make_node()
    scene = make_scene(node)
    process = scene.start(
        """
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
one.sendto(b"AUTH", master)
one.recv(9)
say("ready")
try:
    while True:
        one.sendto(b"x", (path, "1.1"))
        one.recv(9)
except OSError as error:
    say(error.errno)
one.setblocking(False)
try:
    one.sendto(b"x", (path, "1.1"))
except OSError as error:
    say(error.errno)
"""
    )
    scene.let_in("1.1")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    node.kill()
    first, second = map(int, process.communicate()[0].split())
    assert first in (errno.ENOTCONN, errno.ECONNABORTED)
    assert second in (errno.ECONNREFUSED, errno.ENOTCONN)
    assert process.returncode == 0
    node.start()


def test_d7_closed_socket(scene: Scene) -> None:
    """A closed socket does nothing any more: EBADF."""
    one = scene.join("1.1")
    one.close()
    one.close()
    for call in (
        lambda: one.sendto(b"x", scene.master_address),
        lambda: one.recv(9),
        lambda: one.bind(scene.master_address),
        one.addresses,
        one.recv_loan,
    ):
        with pytest.raises(OSError, match="closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF
    assert one.fileno() == -1


# malformed


@pytest.mark.parametrize(
    "item",
    [
        (afbus.BUS_SOCKET, 99, b""),
        (afbus.BUS_SOCKET, afbus.SCM_SRC_ADDR, b"short"),
        (afbus.BUS_SOCKET, afbus.SCM_TERMS, b"\xff"),
        (afbus.BUS_SOCKET, afbus.SCM_SERIAL, bytes(8)),
        (afbus.BUS_SOCKET, afbus.SCM_SERIAL, bytes(7)),
        (afbus.BUS_SOCKET, afbus.SCM_DEADLINE, bytes([1, 0, 0, 0])),
        (afbus.BUS_SOCKET, afbus.SCM_GAP, bytes(28)),
        (afbus.BUS_SOCKET, afbus.SCM_DST_ADDR, bytes(368)),
        (afbus.BUS_SOCKET, afbus.SCM_IDENTITY, b""),
        (socket.SOL_SOCKET, socket.SCM_RIGHTS, b"odd"),
        (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, b"short"),
        (socket.IPPROTO_IP, 1, b""),
    ],
    ids=lambda item: f"{item[0]}-{item[1]}-{len(item[2])}",
)
def test_d7_malformed_items_are_einval(scene: Scene, item: tuple[int, int, bytes]) -> None:
    """An item that is unknown, malformed, or only ever received is refused, and named."""
    one = scene.join("1.1")
    with pytest.raises(ValueError, match=r".") as caught:
        one.sendmsg([b"x"], [item], 0, scene.master_address)
    assert isinstance(caught.value, afbus.InvalidArgument)
    assert caught.value.errno == errno.EINVAL
    assert scene.is_empty(scene.master)


def test_d7_unknown_flags_are_einval(scene: Scene) -> None:
    """A flag that means nothing is refused, not passed over."""
    one = scene.join("1.1")
    for call in (
        lambda: one.sendto(b"x", socket.MSG_OOB, scene.master_address),
        lambda: one.sendmsg([b"x"], [], socket.MSG_PEEK, scene.master_address),
        lambda: one.recv(9, socket.MSG_OOB),
        lambda: one.recv_loan(socket.MSG_PEEK),
    ):
        with pytest.raises(afbus.InvalidArgument) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    assert scene.is_empty(scene.master)


# order


def test_d11_unicast_and_multicast_keep_one_order(scene: Scene) -> None:
    """What one sends reaches one in the order sent, whether to it, to a name, or to many."""
    one = scene.join("1.1", "name", items=(scene.may_send(bytes(64)),))
    two = scene.join("1.2", "other", items=(scene.hears(bytes(64)),))
    draw = random.Random(11)
    addresses = [scene.address("1.2"), scene.address("other"), scene.multicast(bytes(64))]
    for number in range(600):
        source = scene.source(draw.choice(["1.1", "name"]))
        size = draw.choice([4, 4, 4, 3000, 70000])
        one.sendmsg([b"%*d" % (size, number)], [source], 0, draw.choice(addresses))
        if number % 20 == 19:
            assert [int(body) for body in scene.read_all(two)] == list(
                range(number - 19, number + 1)
            )


def test_d11_all_receivers_see_multicasts_in_one_order(scene: Scene) -> None:
    """Several processes send at the same time: three receivers see the same sequence."""
    hears = scene.hears(bytes(64))
    receivers = [scene.join(f"1.{n}", items=(hears,), rx_bytes=1 << 22) for n in (1, 2, 3)]
    program = """
one.sendto(b"AUTH", master)
one.recv(9)
everybody = afbus.BusAddress.multicast(path, bytes(64))
sys.stdin.readline()
for number in range(2000):
    one.sendto(args[0].encode() + b"%d" % number, everybody)
"""
    senders = [scene.start(program, name) for name in "abc"]
    for number in (4, 5, 6):
        scene.let_in(f"1.{number}", items=(scene.may_send(bytes(64)),))
    for sender in senders:
        assert sender.stdin is not None
        sender.stdin.write("\n")
        sender.stdin.flush()
    assert [sender.wait() for sender in senders] == [0, 0, 0]
    heard = [scene.read_all(one) for one in receivers]
    assert heard[0] == heard[1] == heard[2]
    for name in b"abc":
        mine = [int(body[1:]) for body in heard[0] if body[0] == name]
        assert mine == list(range(2000))


def test_d11_fifo_of_each_sender_to_a_slow_reader(scene: Scene) -> None:
    """Three processes that block on one small ring: each one's messages stay in order."""
    slow = scene.join("1.9", rx_bytes=8192)
    program = """
one.sendto(b"AUTH", master)
one.recv(9)
for number in range(500):
    one.sendto(args[0].encode() + b"%100d" % number, (path, "1.9"))
"""
    senders = [scene.start(program, name) for name in "abc"]
    for number in (1, 2, 3):
        scene.let_in(f"1.{number}")
    heard = [slow.recv(999) for _ in range(1500)]
    for name in b"abc":
        assert [int(body[1:]) for body in heard if body[0] == name] == list(range(500))
    assert [sender.wait() for sender in senders] == [0, 0, 0]


def test_d16_writable_when_there_is_room(scene: Scene) -> None:
    """POLLOUT goes with EAGAIN and comes back with room, or when the receiver is gone."""
    one, two = scene.join("1.1"), scene.join("1.2", rx_bytes=4096)
    one.setblocking(False)
    poller = select.poll()
    poller.register(one.fileno(), select.POLLOUT)
    assert poller.poll(0)
    one.sendto(bytes(3000), scene.address("1.2"))
    with pytest.raises(BlockingIOError):
        one.sendto(bytes(3000), scene.address("1.2"))
    assert poller.poll(0) == []
    two.recv(1)
    assert poller.poll()
    one.sendto(bytes(3000), scene.address("1.2"))
    with pytest.raises(BlockingIOError):
        one.sendto(bytes(3000), scene.address("1.2"))
    assert poller.poll(0) == []
    two.close()
    assert poller.poll()
    with pytest.raises(afbus.NoSuchEndpoint):
        one.sendto(bytes(3000), scene.address("1.2"))
