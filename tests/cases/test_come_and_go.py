"""Processes that come and are killed, at every stage of their lives."""

from __future__ import annotations

import os
import random
import statistics
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from tests.cases.actors import MASTER, PATH, PATIENCE_S, Fleet, Stage, join
from tests.cases.conftest import ALONE
from tests.cases.raw import UNICAST, RawClient, tx_record
from tests.figures import IS_FULL, note

from afbus.proto import frames
from afbus.proto.address import BusAddress
from afbus.proto.frames import Call, Hello, Op

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cases.conftest import Node

    from afbus.client.socket import Socket

#: So many first, after which the agent has all the memory that it needs.
FIRST = 10_000 if IS_FULL else 4_000
CYCLES = 10_000
#: After so many connections of the second half the memory is measured.
PART = 1_000
#: Connections of one process, all of which end when it is killed.
TOGETHER = 1 if IS_FULL else 10
WISH = b'{"name": null, "listen": [["news", "GAP"], ["olds", "CONFLATE"]], "watch": false}'


def enter(place: str, rng: random.Random) -> list[RawClient]:
    """Come to the agent, as far as chance will have it."""
    client = RawClient(place)
    stage = rng.randrange(8)
    if stage == 0:
        return [client]  # says nothing
    if stage == 1:
        # Nobody takes the descriptors that come with the answer.
        client.door.send(frames.encode(Hello()))
        return [client]
    client.hello()
    if stage == 2:
        return [client]
    if stage == 3:
        # Is the master of a bus of its own, with a member and a message on its way.
        address = BusAddress(f"/tmp/own-{rng.random()}", "me")
        client.call(Op.BIND, address=address.pack(), options=None)
        other = RawClient(place)
        other.hello()
        other.call(Op.ATTACH, path=address.path)
        assert other.verdict(other.publish(tx_record(UNICAST, b"me", b"hello"))) == 1
        return [client, other]
    client.call(Op.ATTACH, path=PATH.encode())
    if stage == 4:
        # Half of a call, and descriptors that belong to no message.
        client.door.send(frames.encode(Call(9, Op.LIST, {"what": "queues"})))
        client.send_on_line(b"f", [client.line.fileno()] * rng.randrange(1, 17))
        return [client]
    # Asks to join, and does not read the answer, or reads it.
    position = client.publish(tx_record(UNICAST, MASTER.address, WISH))
    if stage > 5:
        assert client.verdict(position) == 1
        client.receive()
    if stage > 6:
        # Messages to itself that it will not read, one of them with descriptors.
        (packed,) = client.call(Op.OPTION_GET, level=0xAFB, name=2)
        me = BusAddress.unpack(packed).address
        client.send_on_line(b"f", [client.line.fileno()])
        client.publish(tx_record(UNICAST, me, b"to me", fds=1) + tx_record(UNICAST, me, b"again"))
    return [client]


def come(stage: Stage, seed: int, count: int) -> None:
    """Make connections, and wait for the end."""
    rng = random.Random(seed)
    clients = [enter(stage.place, rng) for _ in range(count)]
    stage.tell(len(clients))
    stage.hear()


def find_leftovers(folder: Path, pids: list[int]) -> set[str]:
    """Everything that has a name and that somebody may have left behind, where only they are."""
    found = {str(path) for path in folder.rglob("*")}
    if os.geteuid() == 0:
        for pid in pids:
            found |= {f"/dev/shm/{name}" for name in os.listdir(f"/proc/{pid}/root/dev/shm")}
    return found


def settle(witness: Socket, status: dict[str, Any]) -> None:
    """Wait until the agent has noticed all ends: it may have to accept who has gone already."""
    deadline = time.monotonic() + PATIENCE_S
    while (now := witness.status()) != status:
        assert time.monotonic() < deadline, f"{now}, not {status}"


@pytest.mark.cluster
@pytest.mark.slow
def test_case4_nothing_is_left_of_those_that_are_killed(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 connections whose processes are killed leave nothing behind.

    The agent has as many descriptors, threads and mappings as before, and its memory grows by no
    more than 2 % after others before. It is looked at each thousand connections: what each of them
    leaves shows every time, and what an allocator keeps once, in one of them alone. A process has
    ten of the connections, with AFBUS_TEST_FULL one.

    Agent and processes have a folder for what is temporary, and where the tests are root's a
    /dev/shm, to themselves: what others leave on the machine meanwhile is not theirs.
    """
    (node.folder / "tmp").mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(node.folder / "tmp"))
    node.prefix = ALONE if os.geteuid() == 0 else ()
    node.start()
    with Fleet(node.place, node.prefix) as fleet:
        check_cycles(node, fleet)


def check_cycles(node: Node, fleet: Fleet) -> None:
    """Let them come and be killed; compare."""
    # Whose ring is small: all of its pages are soon in use, and are the agent's memory too.
    fleet.start_master(rx_bytes=1 << 16)
    with join(node.place) as witness:
        pids = [node.pid, fleet.pid]
        left_before = find_leftovers(node.folder, pids)
        status = witness.status()
        before = node.descriptors, node.threads, node.rings
        memory: list[list[int]] = []
        for seed in range((FIRST + CYCLES) // TOGETHER):
            if seed * TOGETHER >= FIRST and seed * TOGETHER % PART == 0:
                memory.append(measure(node))
            actor = fleet.start(come, seed=seed, count=TOGETHER)
            assert actor.hear() == TOGETHER
            actor.kill()
            # So that never more than ten are there at a time, however slow the agent is.
            settle(witness, status)
        assert (node.descriptors, node.threads, node.rings) == before
        assert find_leftovers(node.folder, pids) == left_before
        note(f"{before[0]} descriptors, {before[2]} mappings, before and after")
        memory.append(measure(node))
        for what, sizes in zip(("own memory", "rings"), zip(*memory, strict=True), strict=True):
            steps = [now - was for was, now in pairwise(sizes)]
            grown = statistics.median(steps) * len(steps) / sizes[0]
            note(f"{what} {sizes[0]} KiB after {FIRST}, then {steps} KiB: {grown:+.1%}")
            assert grown <= 0.02


def measure(node: Node) -> list[int]:
    """The agent's own memory, and that of its rings, in KiB."""
    return [node.memory_kib("RssAnon"), node.memory_kib("RssShmem")]
