"""A client that breaks every rule of its rings, its line and its door."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import socket
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from tests.cases.actors import MASTER, PATH, PATIENCE_S, Stage, join
from tests.cases.bodies import pack_body, read_body
from tests.cases.conftest import check_lanes
from tests.cases.lane_attacks import LANE_ATTACKS
from tests.cases.raw import (
    HEAD,
    MULTICAST_RAW,
    MULTICAST_TERMS,
    PAGE,
    READER_SLEEPS,
    ROOM,
    SIGNAL,
    TAIL,
    UNICAST,
    WRITER_WAITS,
    RawClient,
    tx_record,
)
from tests.figures import IS_FULL, note

from afbus.proto import frames
from afbus.proto.address import BusAddress
from afbus.proto.errors import CloseCode
from afbus.proto.frames import Call, Hello, Op, Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cases.actors import Fleet
    from tests.cases.conftest import Node

    from afbus.client.socket import Socket

#: On each path.
ROUNDS = 10_000 if IS_FULL else 5_000
#: After so many the test looks whether the others go on.
REPORT = 500
QUOTA_MESSAGES = 5000
#: So small that lanes of the pair leave most of the quota.
PAIR_BYTES = 1 << 14
WISH = b'{"name": null, "listen": [["news", "GAP"]], "watch": false}'
NAMES = (b"ask", b"answer", b"1.1", b"@1", b"nobody", b"", b"\0", MASTER.address)


def ask(stage: Stage) -> None:
    """Send questions, and check each answer; tell how many there were."""
    one = stage.join(name="ask", tx_bytes=PAIR_BYTES, rx_bytes=4 * PAIR_BYTES)
    partner = BusAddress(PATH, "answer")
    stage.tell("ready")
    count = 0
    while True:
        one.sendto(pack_body(1, count, count * 37 % 5000), partner)
        while True:
            body, source = one.recvfrom(1 << 18)
            if source == partner:
                break
        assert read_body(body) == (2, count)
        count += 1
        if stage.has_news():
            stage.hear()
            stage.tell(count)


def answer(stage: Stage) -> None:
    """Answer what the other asks, and nobody else."""
    one = stage.join(name="answer", tx_bytes=PAIR_BYTES, rx_bytes=4 * PAIR_BYTES)
    partner = BusAddress(PATH, "ask")
    stage.tell("ready")
    count = 0
    while True:
        body, source = one.recvfrom(1 << 18)
        if source == partner:
            assert read_body(body) == (1, count)
            one.sendto(pack_body(2, count, count * 53 % 5000), partner)
            count += 1


# What it does to its TX ring. The result of each attack is why it must be cut off for it, None if
# it may have done nothing that anybody can see.


def head_far(client: RawClient, rng: random.Random) -> CloseCode:
    """More published than the ring holds."""
    far = rng.choice((client.tx.size + 8, 1 << 31, 1 << 32, (1 << 64) - 8))
    client.tx.set_word(HEAD, (client.tx.word(HEAD) + far) & ((1 << 64) - 1) & ~7)
    client.kick()
    return CloseCode.RING


def head_odd(client: RawClient, rng: random.Random) -> CloseCode:
    """Records begin at multiples of eight."""
    client.tx.set_word(HEAD, client.tx.word(HEAD) + rng.randrange(1, 8))
    client.kick()
    return CloseCode.RING


def length_short(client: RawClient, rng: random.Random) -> CloseCode:
    """A record that is shorter than its header."""
    client.publish(rng.randrange(40).to_bytes(4, "little").ljust(rng.choice((8, 40)), b"\0"))
    return CloseCode.RING


def length_long(client: RawClient, rng: random.Random) -> CloseCode:
    """A record that is longer than what is published."""
    record = bytearray(tx_record(UNICAST, b"ask", rng.randbytes(rng.randrange(100))))
    size = len(record) + rng.choice((1, 8, 4096, 1 << 20, (1 << 32) - 1 - len(record)))
    record[:4] = size.to_bytes(4, "little")
    client.publish(bytes(record))
    return CloseCode.RING


def kind_unknown(client: RawClient, rng: random.Random) -> CloseCode:
    """A kind that there is not."""
    client.publish(tx_record(rng.choice((0, 4, 5, 255)), b"ask", b"body"))
    return CloseCode.RING


def sections_wrong(client: RawClient, rng: random.Random) -> CloseCode:
    """Lengths of the sections that do not make up the record's."""
    record = bytearray(tx_record(UNICAST, b"ask", b"body"))
    place, size = rng.choice(((32, 2), (34, 2), (36, 4)))
    record[place : place + size] = rng.randrange(100, 1 << 8 * size).to_bytes(size, "little")
    client.publish(bytes(record))
    return CloseCode.RING


def descriptors_missing(client: RawClient, rng: random.Random) -> CloseCode:
    """A record that announces descriptors that never came."""
    client.publish(tx_record(UNICAST, b"ask", b"body", fds=rng.randrange(1, 256)))
    return CloseCode.RING


def tail_far(client: RawClient, rng: random.Random) -> CloseCode:
    """Released what was never there."""
    far = rng.choice((8, client.rx.size, 1 << 40, (1 << 63)))
    client.rx.set_word(TAIL, client.rx.word(HEAD) + far)
    client.kick()
    return CloseCode.RING


def spoil_indices(client: RawClient, rng: random.Random) -> None:
    """Write anything into any word that the two sides share."""
    for _ in range(rng.randrange(1, 20)):
        ring = rng.choice((client.tx, client.rx))
        if rng.randrange(2):
            value = rng.choice((0, 1, 8, 64, 4096, rng.getrandbits(16), rng.getrandbits(64)))
            ring.set_word(rng.choice((HEAD, TAIL)), value)
        else:
            place = rng.choice((READER_SLEEPS, WRITER_WAITS, SIGNAL, ROOM))
            ring.set_flag(place, rng.getrandbits(32))
        client.kick()


def spoil_memory(client: RawClient, rng: random.Random) -> None:
    """Write noise everywhere, while the agent reads it."""
    for _ in range(rng.randrange(1, 30)):
        ring = rng.choice((client.tx, client.rx))
        size = rng.randrange(1, 256)
        at = rng.randrange(0, PAGE + ring.size - size)
        ring.memory[at : at + size] = rng.randbytes(size)
        client.kick()


def spoil_published(client: RawClient, rng: random.Random) -> None:
    """Change records after they are published, again and again."""
    head = client.tx.word(HEAD)
    record = tx_record(rng.choice((UNICAST, MULTICAST_TERMS)), b"answer", rng.randbytes(600))
    client.publish(record)
    for _ in range(200):
        at = rng.randrange(0, 40)
        client.tx.write(head + at, rng.randbytes(rng.randrange(1, 8)))


def punch_holes(client: RawClient, rng: random.Random) -> None:
    """Take pages away from under both."""
    client.publish(tx_record(UNICAST, b"ask", rng.randbytes(100)))
    for ring in (client.tx, client.rx):
        ring.memory.madvise(mmap.MADV_REMOVE)
    client.kick()


def send_mutants(client: RawClient, rng: random.Random) -> None:
    """Records that are right but for some bits."""
    for _ in range(rng.randrange(1, 10)):
        record = bytearray(
            tx_record(
                rng.choice((UNICAST, MULTICAST_RAW, MULTICAST_TERMS)),
                rng.choice((*NAMES, b"news", bytes(64), rng.randbytes(64))),
                rng.randbytes(rng.randrange(200)),
                src=rng.choice(NAMES),
                flags=rng.getrandbits(8) & ~4,
                serial=rng.getrandbits(64),
                reply_to=rng.getrandbits(2),
                deadline_ms=rng.getrandbits(32),
            )
        )
        for _ in range(rng.randrange(4)):
            record[rng.randrange(4, len(record))] ^= 1 << rng.randrange(8)
        client.publish(bytes(record))


def send_any_packets(client: RawClient, rng: random.Random) -> None:
    """Packets of the line that mean nothing, with descriptors that belong to nothing."""
    for _ in range(rng.randrange(1, 20)):
        data = rng.choice((b"", b"k", b"p", b"w", b"f", b"b" * 5000, rng.randbytes(3)))
        count = rng.choice((0, 0, 1, 16, 17, 18, 28, 29, 253))
        client.send_on_line(data, [client.line.fileno()] * count)


# What it says at the door.


def say_noise(client: RawClient, rng: random.Random) -> CloseCode:
    """No frame at all."""
    client.door.send(b"\xc1" + rng.randbytes(rng.randrange(300)))
    return CloseCode.MALFORMED


def say_too_much(client: RawClient, rng: random.Random) -> CloseCode:
    """A packet that is larger than any frame."""
    client.door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    client.door.send(b"\x94" + rng.randbytes((1 << 17) + rng.randrange(1000)))
    return CloseCode.LIMIT


def say_what_the_agent_says(client: RawClient, rng: random.Random) -> CloseCode:
    """Frames that are not a client's to say, or not twice."""
    frame = rng.choice((Hello(), Result(1), Result(rng.getrandbits(60), 1, "no")))
    client.door.send(frames.encode(frame))
    return CloseCode.ORDER


def say_mutants(client: RawClient, rng: random.Random) -> None:
    """Calls that are right but for some bits."""
    for _ in range(rng.randrange(1, 5)):
        name = rng.choice(NAMES)
        frame = rng.choice(
            (
                Call(1, Op.LIST, {"what": "queues", "after": rng.choice((-1, 0, (1 << 64) - 1))}),
                Call(2, Op.CONTROL, {"dst": name, "items": [[1, name]], "body": b"x"}),
                Call(3, Op.BIND, {"address": MASTER.pack(), "options": {"width": 512}}),
                Call(4, Op.BIND, {"address": rng.randbytes(368), "options": None}),
                Call(5, Op.ATTACH, {"path": rng.randbytes(9)}),
                Call(6, Op.OPTION_SET, {"level": 0xAFB, "name": 1, "value": rng.randbytes(64)}),
                Call(7, Op.OPTION_GET, {"level": 0xAFB, "name": rng.randrange(8)}),
                Call(8, Op.SHUTDOWN, {"how": rng.randrange(-1, 5)}),
                Call(9, Op.STATUS, {}),
            )
        )
        data = bytearray(frames.encode(frame))
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            client.door.send(data)
        except OSError:
            return


def give_descriptors(client: RawClient, rng: random.Random) -> None:
    """Descriptors at the door, which takes none."""
    data = frames.encode(Call(1, Op.STATUS, {}))
    socket.send_fds(client.door, [data], [client.line.fileno()] * rng.randrange(1, 200))


ATTACKS: tuple[Callable[[RawClient, random.Random], CloseCode | None], ...] = (
    head_far,
    head_odd,
    length_short,
    length_long,
    kind_unknown,
    sections_wrong,
    descriptors_missing,
    tail_far,
    spoil_indices,
    spoil_memory,
    spoil_published,
    punch_holes,
    send_mutants,
    send_any_packets,
    say_noise,
    say_too_much,
    say_what_the_agent_says,
    say_mutants,
    give_descriptors,
    *LANE_ATTACKS,
)


def check_seals(client: RawClient) -> None:
    """Neither the size nor the seals of a ring can be changed."""
    for ring in (client.tx, client.rx):
        for size in (0, PAGE, PAGE + ring.size - 1, 1 << 24):
            with pytest.raises(PermissionError):
                os.ftruncate(ring.descriptor, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(ring.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def attack(stage: Stage, seed: str) -> None:
    """Come, make one attack, see what comes of it, and come again."""
    cut: Counter[str] = Counter()
    for number in range(ROUNDS):
        rng = random.Random(f"{seed} {number}")
        one = ATTACKS[number % len(ATTACKS)]
        with RawClient(stage.place) as client:
            client.hello(rng.choice((PAGE, 1 << 16)))
            if rng.randrange(8) or one in LANE_ATTACKS:
                client.call(Op.ATTACH, path=PATH.encode())
                client.publish(tx_record(UNICAST, MASTER.address, WISH))
                client.receive()
            if number % 100 == 0:
                check_seals(client)
            code = one(client, rng)
            if code is not None:
                try:
                    assert client.read_farewell().code is code
                    assert client.is_cut(10.0)
                except (AssertionError, OSError) as error:
                    raise AssertionError(f"round {number}: {one.__name__}") from error
                cut[one.__name__] += 1
            elif client.is_cut(0):
                cut[one.__name__] += 1
        if (number + 1) % REPORT == 0:
            stage.tell(number + 1)
    stage.tell(cut)


@pytest.mark.cluster
@pytest.mark.slow
def test_case5_d13_hostile_client_is_cut_off(node: Node, fleet: Fleet, order: str) -> None:
    """10,000 attacks on both paths; a pair goes on asking and answering, nothing is left behind.

    Whoever breaks a rule is told which kind of rule, and cut off. Sizes and seals of rings cannot
    be changed.
    """
    node.start(quotas={"quota_messages": QUOTA_MESSAGES})
    fleet.start_master(order=order)
    # What is sent to a name that nobody has yet goes to the master, who makes nothing of it.
    assert fleet.start(answer).hear() == "ready"
    asker = fleet.start(ask)
    assert asker.hear() == "ready"
    with join(node.place) as witness, join(node.place, name="sink") as sink:
        check_lanes(witness, order)
        status = witness.status()
        before = node.descriptors, node.threads, node.rings
        pid = node.pid
        hostile = fleet.start(attack, seed=order)
        count = 0
        while isinstance(told := hostile.hear(), int):
            asker.tell("how many?")
            more = asker.hear()
            assert more > count, "the pair stands still"
            count = more
        hostile.finish()
        assert (node.is_running, node.pid) == (True, pid)
        assert witness.status() == status
        # Lanes of the pair may be ended, and begin anew.
        deadline = time.monotonic() + PATIENCE_S
        while (now := (node.descriptors, node.threads, node.rings)) != before:
            assert time.monotonic() < deadline, f"{now}, not {before}"
        # What the lanes of the pair may hold is taken.
        check_quota_is_whole(witness, sink, QUOTA_MESSAGES - (2 if order == "total" else 2000))
    note(f"{ROUNDS} attacks, the pair asked and answered {count} times meanwhile")
    note(f"cut off: {', '.join(f'{name} {number}' for name, number in told.items())}")


def check_quota_is_whole(witness: Socket, sink: Socket, count: int) -> None:
    """Nothing of what is gone is counted any more; the pair has two messages on their way."""
    for number in range(count):
        witness.sendto(b"%d" % number, BusAddress(PATH, "sink"))
    assert sink.stats()["received"] >= count


@pytest.mark.cluster
@pytest.mark.parametrize("after", [-1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_case5_row_that_no_list_has(node: Node, after: int) -> None:
    """A number that is too large is refused; it does not end the agent."""
    node.start()
    with RawClient(str(node.place)) as client:
        client.hello()
        client.door.send(frames.encode(Call(1, Op.LIST, {"what": "buses", "after": after})))
        result = client.next_frame()
        assert isinstance(result, Result)
        assert result.errno == errno.EINVAL
