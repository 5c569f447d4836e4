"""The agent is killed under load, and comes back."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.cases.actors import MULTICAST, PATH, Stage, about, join
from tests.cases.bodies import pack_body, read_body
from tests.cases.conftest import check_lanes, check_times
from tests.figures import note

from afbus.client.ancillary import find_gap
from afbus.client.door import Door
from afbus.proto.address import BusAddress
from afbus.proto.errors import BusError, NotConnected, OutcomeUnknown
from afbus.proto.frames import Op
from afbus.proto.notice import Event, Notice

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cases.actors import Actor, Fleet
    from tests.cases.conftest import Node


KILLS = 10
SENDERS = 2
READERS = (b"r0", b"r1")
#: Each sender: so many messages in each slot of the clock.
SLOT_S = 0.002
SLOT_MESSAGES = 20
#: After so many messages a reader tells that it goes on.
MARK = 4000
#: A message goes to the first reader, to the second, or to all.
WAYS = len(READERS) + 1
#: Of the second sender so few go to all: multicasts end lanes.
SELDOM = 300
#: The last message of a sender is the only one of this size.
LAST_BYTES = 1


def find_way(sender: int, number: int) -> int:
    """Whither a message goes by its number."""
    if sender == 0:
        return number % WAYS
    return WAYS - 1 if number % SELDOM == SELDOM - 1 else number % len(READERS)


class Losses:
    """Tells the test when an endpoint lost its agent, and when it was back: monotonic seconds."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._lost_at: float | None = None
        self.count = 0

    def lose(self) -> None:
        """NotConnected was raised."""
        assert self._lost_at is None, "told twice"
        self._lost_at = time.monotonic()
        self.count += 1

    def succeed(self) -> None:
        """A call has succeeded."""
        if self._lost_at is not None:
            self._stage.tell(["back", self._lost_at, time.monotonic()])
            self._lost_at = None


def send_steadily(stage: Stage, sender: int) -> None:
    """Send by the clock until the test says enough; tell what became of each message."""
    one = stage.join()
    mine = one.addresses()
    losses = Losses(stage)
    unknown: list[int] = []
    refused: list[int] = []
    number = 0
    stage.tell("ready")
    stage.hear()
    slot = time.monotonic()
    is_enough = is_over = False
    while not is_over:
        for _ in range(SLOT_MESSAGES):
            way = find_way(sender, number)
            is_last = is_enough and way == WAYS - 1
            body = pack_body(sender, number, LAST_BYTES if is_last else 48)
            try:
                if way < len(READERS):
                    one.sendto(body, BusAddress(PATH, READERS[way]))
                else:
                    one.sendmsg([body], [about("news")], 0, MULTICAST)
            except NotConnected:
                losses.lose()
                continue  # it was not sent
            except OutcomeUnknown:
                unknown.append(number)
                is_last = False
            except BusError:
                refused.append(number)
                is_last = False
            else:
                losses.succeed()
            number += 1
            is_over = is_last
            if is_over:
                break
        if stage.has_news():
            is_enough = bool(stage.hear())
        slot += SLOT_S
        with contextlib.suppress(ValueError):  # late already
            select.select([], [], [], slot - time.monotonic())
    assert one.addresses() == mine
    stage.tell(["sent", number, unknown, refused, losses.count])
    stage.hear()
    one.close()


def read_steadily(stage: Stage, index: int) -> None:
    """Read until each sender has sent its last; tell what is missing."""
    one = stage.join(name=READERS[index].decode(), listen=[("news", "BLOCK")])
    mine = one.addresses()
    losses = Losses(stage)
    following = dict.fromkeys(range(SENDERS), 0)
    missing: list[list[int]] = [[] for _ in following]
    events: list[int] = []
    count = 0
    left = set(following)
    stage.tell("ready")
    while left:
        try:
            found = one.recvmmsg(64, 1 << 16, 4096)
        except NotConnected:
            losses.lose()
            # A call that does not wait for a message shows when the agent is back.
            assert one.addresses() == mine
            losses.succeed()
            continue
        for data, items, _, source in found:
            if source.is_kernel:
                events.append(Notice.decode(data).event)
                continue
            assert find_gap(items) is None
            sender, number = read_body(data)
            assert number >= following[sender], "repeated, or out of order"
            assert find_way(sender, number) in (index, WAYS - 1), "meant for another"
            missing[sender] += [
                one
                for one in range(following[sender], number)
                if find_way(sender, one) in (index, WAYS - 1)
            ]
            following[sender] = number + 1
            count += 1
            if count % MARK == 0:
                stage.tell(["mark"])
            if len(data) == 16 + LAST_BYTES:
                left.discard(sender)
    stage.tell(["got", missing, events, losses.count])
    stage.hear()
    one.close()


def hear_of(actor: Actor, kind: str) -> Any:
    """Wait until an actor tells this; what else it tells before is passed over."""
    while (told := actor.hear())[0] != kind:
        assert told == ["mark"]
    return told


def check_accounts(sent: list[Any], got: list[Any]) -> int:
    """Every message was delivered, refused or is unknown; return how many are unknown."""
    for sender, (_, _, unknown, refused, _) in enumerate(sent):
        for _, missing, _, _ in got:
            # Of a multicast whose outcome is unknown one reader may have a copy, and another none.
            assert set(missing[sender]) <= {*unknown, *refused}, "accepted, and never delivered"
        for number in refused:
            way = find_way(sender, number)
            for _, missing, _, _ in got if way == WAYS - 1 else got[way : way + 1]:
                assert number in missing[sender], "refused, and delivered"
    return sum(len(unknown) for _, _, unknown, _, _ in sent)


@pytest.mark.cluster
@pytest.mark.slow
def test_case3_d16_d21_agent_is_killed_under_load(node: Node, fleet: Fleet, order: str) -> None:
    """Two senders and two readers, 20,000 messages a second; the agent is killed ten times.

    All are told within a second, are back two seconds after the next agent has begun at the
    latest, keep their addresses, and each message is delivered once, refused, or is unknown.
    """
    node.start()
    fleet.start_master(order=order)
    readers = [fleet.start(read_steadily, index=index) for index in range(len(READERS))]
    senders = [fleet.start(send_steadily, sender=number) for number in range(SENDERS)]
    actors = [*readers, *senders]
    for actor in actors:
        assert actor.hear() == "ready"
    began = time.monotonic()
    for sender in senders:
        sender.tell("go")
    told: list[float] = []
    back: list[float] = []
    down_s = 0.0
    for _ in range(KILLS):
        hear_of(readers[0], "mark")
        killed_at = time.monotonic()
        assert node.end(signal.SIGKILL) == -signal.SIGKILL
        node.start()
        started_at = time.monotonic()
        down_s += started_at - killed_at
        for actor in actors:
            _, lost_at, back_at = hear_of(actor, "back")
            told.append(lost_at - killed_at)
            back.append(back_at - started_at)
        while readers[0].has_news():
            assert readers[0].hear() == ["mark"]
    hear_of(readers[0], "mark")
    with join(node.place) as witness:
        check_lanes(witness, order)
    up_s = time.monotonic() - began - down_s
    for sender in senders:
        sender.tell("enough")
    sent = [hear_of(sender, "sent") for sender in senders]
    got = [hear_of(reader, "got") for reader in readers]
    for report in (*sent, *got):
        assert report[-1] == KILLS
    for _, _, events, _ in got:
        assert events == [Event.GAP] * KILLS
    unknown = check_accounts(sent, got)
    for actor in actors:
        actor.tell("bye")
        actor.finish()
    count = sum(number for _, number, *_ in sent)
    note(f"{KILLS} kills, {count} messages, {count / up_s:.0f} a second, {unknown} unknown")
    check_times("from the kill to NotConnected", told, 1.0)
    check_times("from the new agent to the first call that succeeds", back, 2.0)


def test_case3_d16_nothing_is_asked_of_an_agent_that_is_being_killed(tmp_path: Path) -> None:
    """When the line has ended the door is used no more, even if it is still open."""
    place = tmp_path / "door"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(place))
        listener.listen(1)
        door = Door(place)
        with listener.accept()[0] as dying:
            assert door.read_farewell().endswith("is gone")
            with pytest.raises(NotConnected):
                door.call(Op.STATUS, {})
            assert dying.recv(100) == b"", "nothing was asked"
        door.close()
