"""Leaving: in good order, by half, and without a word; and what others wait for then (D20)."""

from __future__ import annotations

import array
import errno
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import Event, Overflow

if TYPE_CHECKING:
    from tests.bus.conftest import Scene

    from afbus import Socket

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)
HOUR_MS = 3_600_000

# Joins, reads one request, and ends as it is told.
SERVICE = """
one.sendto(b"AUTH", master)
one.recv(9)
request = one.recv(9)
say(request.decode())
sys.stdin.readline()
one.close()
"""


def test_d20_close_flushes(scene: Scene) -> None:
    """All that was accepted arrives, to one and to many, although its sender is gone."""
    two = scene.join("1.2", items=(scene.hears(EVERYTHING),))
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    read_end, write_end = os.pipe()
    for number in range(50):
        one.sendto(b"%d" % number, [scene.address("1.2"), scene.multicast(EVERYTHING)][number % 2])
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write_end]))
    one.sendmsg([bytes(100_000)], [rights], 0, scene.address("1.2"))
    os.close(write_end)
    one.close()
    assert [int(two.recv(9)) for _ in range(50)] == list(range(50))
    body, found, _, _ = scene.read(two)
    assert len(body) == 100_000
    (pipe,) = array.array("i", found[socket.SCM_RIGHTS])
    os.write(pipe, b"x")
    assert os.read(read_end, 9) == b"x"
    os.close(pipe)
    os.close(read_end)


def test_d20_close_leaves_at_once(scene: Scene) -> None:
    """When `close` returns, the addresses are free and the endpoint is on no list."""
    one, two = scene.join("1.1", "name"), scene.join("1.2")
    one.close()
    scene.grant(two, scene.owned("name"))
    rows = scene.master.listing("endpoints", scene.path)
    assert [row["addresses"] for row in rows] == [["master"], ["1.2", "name"]]


def test_d20_half_closed_endpoint_still_reads(scene: Scene) -> None:
    """After SHUT_WR nothing is sent, by any way; what others send is read as before."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2")
    one.sendto(b"before", scene.address("1.2"))
    one.shutdown(socket.SHUT_WR)
    assert one.state()["is_silent"]
    for address in (scene.address("1.2"), scene.master_address, scene.multicast(EVERYTHING)):
        with pytest.raises(BrokenPipeError) as caught:
            one.sendto(b"after", address)
        assert isinstance(caught.value, afbus.ShutDown)
        assert caught.value.errno == errno.EPIPE
    assert scene.read_all(two) == [b"before"]
    two.sendto(b"answer", scene.address("1.1"))
    assert one.recv(9) == b"answer"
    one.shutdown(socket.SHUT_WR)


def test_d20_half_closed_master_commands_no_more(scene: Scene) -> None:
    """Who has closed its sending direction grants nothing either."""
    one = scene.join("1.1")
    scene.master.shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenPipeError):
        scene.master.sendto(b"x", scene.address("1.1"))
    with pytest.raises(BrokenPipeError):
        scene.command(scene.address("1.1"), scene.owned("name"))
    assert scene.is_empty(one)
    assert one.addresses() == [scene.address("1.1")]


def test_d20_after_shut_rd_the_end_is_read(scene: Scene) -> None:
    """What was there is read, then an empty message without source, as of datagram sockets."""
    one, two = scene.join("1.1"), scene.join("1.2")
    two.sendto(b"before", scene.address("1.1"))
    one.shutdown(socket.SHUT_RD)
    assert one.recv(9) == b"before"
    for _ in range(2):
        assert one.recvmsg(9, 99) == (b"", [], 0, None)
        assert bytes(one.recv_loan()) == b""
    one.sendto(b"still", scene.address("1.2"))
    assert two.recv(9) == b"still"
    with pytest.raises(afbus.InvalidArgument):
        one.shutdown(7)


def test_d20_close_ends_calls_that_wait(scene: Scene) -> None:
    """A thread that waits to read or to send ends when another one closes the socket."""
    scene.join("1.9", rx_bytes=4096)
    reader, writer = scene.join("1.1"), scene.join("1.2")
    writer.sendto(bytes(3000), scene.address("1.9"))
    errors: list[int | None] = []

    def wait(one: Socket, call: str) -> None:
        try:
            if call == "recv":
                one.recv(9)
            else:
                one.sendto(bytes(3000), scene.address("1.9"))
        except OSError as error:
            errors.append(error.errno)

    threads = [
        threading.Thread(target=wait, args=(reader, "recv")),
        threading.Thread(target=wait, args=(writer, "send")),
    ]
    for thread in threads:
        thread.start()
    while not any(row["waiting"] for row in scene.master.listing("queues", scene.path)):
        pass
    reader.close()
    writer.close()
    for thread in threads:
        thread.join()
    assert set(errors) <= {errno.EBADF, errno.ECONNABORTED, errno.ENOTCONN}
    assert len(errors) == 2


def test_d20_closing_twice_and_without_a_bus(scene: Scene) -> None:
    """Closing is harmless whenever it is done."""
    one = scene.socket()
    one.close()
    one.close()
    with scene.socket() as two:
        two.attach(scene.path)
    assert two.fileno() == -1
    assert scene.is_empty(scene.master)


# expected replies


def ask(scene: Scene, one: Socket, serial: int, to: str, deadline_ms: int = HOUR_MS) -> None:
    """Send a request whose reply is expected."""
    items = [
        scene.number(afbus.SCM_SERIAL, serial),
        scene.number(afbus.SCM_DEADLINE, deadline_ms),
    ]
    one.sendmsg([b"?"], items, 0, scene.address(to))


def answer(scene: Scene, one: Socket) -> None:
    """Read one request and answer it."""
    body, found, _, source = scene.read(one)
    assert body == b"?"
    one.sendmsg(
        [b"!"], [(afbus.BUS_SOCKET, afbus.SCM_REPLY_TO, found[afbus.SCM_SERIAL])], 0, source
    )


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_d7_d20_no_reply_when_the_target_is_gone(scene: Scene, how: str) -> None:
    """Each request that its receiver has not answered, read or not, is told at once and once."""
    one = scene.join("1.1")
    process = scene.start(SERVICE)
    scene.let_in("1.2")
    for serial in (5, 6, 1 << 63):
        ask(scene, one, serial, "1.2")
    assert process.stdout is not None
    assert process.stdout.readline() == "?\n"
    if how == "closed":
        process.communicate("\n")
    else:
        process.kill()
    told: set[int] = set()
    unread = 0
    while len(told) < 3 or not unread:
        body, found, _, source = scene.read(one)
        assert source == scene.kernel
        if body:
            notice = afbus.Notice.decode(body)
            assert notice.event is Event.UNREAD
            unread += int(notice.detail["count"])
        else:
            assert set(found) == {afbus.SCM_REPLY_TO}
            told.add(int.from_bytes(found[afbus.SCM_REPLY_TO], "little"))
    assert told == {5, 6, 1 << 63}
    assert unread == 2
    assert scene.is_empty(one)


def test_d7_d20_answered_requests_are_not_told(scene: Scene) -> None:
    """A reply settles its request, and no other."""
    one, two = scene.join("1.1"), scene.join("1.2")
    ask(scene, one, 1, "1.2")
    ask(scene, one, 2, "1.2")
    answer(scene, two)
    body, found, _, source = scene.read(one)
    assert (body, source) == (b"!", scene.address("1.2"))
    assert found == {afbus.SCM_REPLY_TO: (1).to_bytes(8, "little")}
    assert scene.read(two)[0] == b"?"
    two.close()
    body, found, _, source = scene.read(one)
    assert (body, source) == (b"", scene.kernel)
    assert found == {afbus.SCM_REPLY_TO: (2).to_bytes(8, "little")}
    assert scene.is_empty(one)


def test_d7_request_without_deadline_expects_nothing(scene: Scene) -> None:
    """A serial alone is only a number: nobody is told of an answer that does not come."""
    one, two = scene.join("1.1"), scene.join("1.2")
    one.sendmsg([b"?"], [scene.number(afbus.SCM_SERIAL, 9)], 0, scene.address("1.2"))
    _, found, _, _ = scene.read(two)
    assert found == {afbus.SCM_SERIAL: (9).to_bytes(8, "little")}
    two.close()
    assert scene.await_notice(Event.LEFT).subject == (b"1.2",)
    assert scene.is_empty(one)


def test_d7_d20_reply_of_somebody_else_settles_nothing(scene: Scene) -> None:
    """Only whoever was asked can answer; others may send what they want."""
    one, two, three = scene.join("1.1"), scene.join("1.2"), scene.join("1.3")
    ask(scene, one, 7, "1.2")
    three.sendmsg([b"forged"], [scene.number(afbus.SCM_REPLY_TO, 7)], 0, scene.address("1.1"))
    assert scene.read(one)[3] == scene.address("1.3")
    assert two.recv(9) == b"?"
    two.close()
    body, found, _, source = scene.read(one)
    assert (body, source, set(found)) == (b"", scene.kernel, {afbus.SCM_REPLY_TO})


def test_d7_d20_request_to_an_unknown_name(scene: Scene) -> None:
    """It is the master's to answer, and is told when the master goes."""
    one = scene.join("1.1")
    ask(scene, one, 3, "unknown")
    answer(scene, scene.master)
    assert scene.read(one)[0] == b"!"
    ask(scene, one, 4, "unknown")
    assert scene.master.recv(9) == b"?"
    scene.master.close()
    told = [scene.read(one) for _ in range(2)]
    events = [afbus.Notice.decode(body).event for body, *_ in told if body]
    assert events == [Event.MASTER_LOST]
    assert [found for body, found, *_ in told if not body] == [
        {afbus.SCM_REPLY_TO: (4).to_bytes(8, "little")}
    ]


def test_d7_d20_request_beside_commands(scene: Scene) -> None:
    """The master's grants may expect an answer as well."""
    one = scene.join("1.1")
    items = [
        scene.owned("name"),
        scene.number(afbus.SCM_SERIAL, 11),
        scene.number(afbus.SCM_DEADLINE, HOUR_MS),
    ]
    scene.master.sendmsg([b"?"], items, 0, scene.address("1.1"))
    body, found, _, _ = scene.read(one)
    assert (body, found[afbus.SCM_SERIAL]) == (b"?", (11).to_bytes(8, "little"))
    one.close()
    told = [scene.read(scene.master) for _ in range(2)]
    assert [found for body, found, *_ in told if not body] == [
        {afbus.SCM_REPLY_TO: (11).to_bytes(8, "little")}
    ]


def test_d20_asker_is_gone_before_the_answer(scene: Scene) -> None:
    """The answer is refused as any message to nobody, and the service goes on."""
    one, two = scene.join("1.1"), scene.join("1.2")
    ask(scene, one, 1, "1.2")
    one.close()
    with pytest.raises(afbus.NoSuchEndpoint):
        answer(scene, two)
    three = scene.join("1.3")
    ask(scene, three, 1, "1.2")
    answer(scene, two)
    assert scene.read(three)[0] == b"!"


def test_d7_replies_keep_their_place(scene: Scene) -> None:
    """The news that no reply comes is read behind all that the target had said."""
    one, two = scene.join("1.1"), scene.join("1.2")
    ask(scene, one, 1, "1.2")
    for number in range(20):
        two.sendto(b"%d" % number, scene.address("1.1"))
    assert two.recv(9) == b"?"
    two.close()
    assert [int(one.recv(9)) for _ in range(20)] == list(range(20))
    assert scene.read(one)[3] == scene.kernel


def test_d12_d20_news_of_a_lost_reply_survive_a_full_ring(scene: Scene) -> None:
    """They are queued where there is no room, and read when there is."""
    one = scene.join("1.1", items=(scene.hears(EVERYTHING, Overflow.GAP),), rx_bytes=4096)
    two = scene.join("1.2", items=(scene.may_send(EVERYTHING),))
    for serial in range(1, 51):
        ask(scene, one, serial, "1.2")
    for _ in range(50):
        assert two.recv(9) == b"?"
        two.sendto(bytes(400), scene.multicast(EVERYTHING))
    two.close()
    told: list[int] = []
    while len(told) < 50:
        _, found, _, source = scene.read(one)
        if source.is_kernel:
            told.append(int.from_bytes(found[afbus.SCM_REPLY_TO], "little"))
    assert sorted(told) == list(range(1, 51))
