"""Lanes, seen from outside: who has something of them, and what closes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from afbus import Terms

if TYPE_CHECKING:
    import subprocess

    from tests.bus.conftest import Scene

TOPIC = Terms.of("news")

# Joins. Whenever it is asked it reads what is there, says how much, and how it has mapped lanes.
LISTENER = """
one.sendto(b"AUTH", master)
one.recv(100)
say("joined")
while sys.stdin.readline():
    count = 0
    while True:
        try:
            one.recv(100, socket.MSG_DONTWAIT)
        except OSError:
            break
        count += 1
    with open("/proc/self/maps") as maps:
        lanes = [line.split()[1] for line in maps if "/memfd:afbus-lane" in line]
    say(count, *sorted(set(lanes)))
"""


def lanes_of(scene: Scene) -> int:
    """How many lanes there are on the bus."""
    rows = scene.master.listing("queues", scene.path)
    return sum(row["lanes_out"] for row in rows)


def start_listener(scene: Scene, name: str, hears: bool) -> subprocess.Popen[str]:
    """A process that is a member of the bus."""
    process = scene.start(LISTENER)
    scene.let_in(name, items=(scene.hears(TOPIC),) if hears else ())
    assert process.stdout is not None
    assert process.stdout.readline() == "joined\n"
    return process


def ask(process: subprocess.Popen[str]) -> list[str]:
    """What a listener says of itself."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("now\n")
    process.stdin.flush()
    return process.stdout.readline().split()


@pytest.mark.parametrize("scene", ["fifo"], indirect=True)
def test_d8_who_may_not_hear_a_lane_has_nothing_of_it(scene: Scene) -> None:
    """Two who hear it have mapped it to read it alone; a third, also a member, has not."""
    speaker = scene.join("1.1", items=(scene.may_send(TOPIC),))
    hearing = [start_listener(scene, name, hears=True) for name in ("1.2", "1.3")]
    deaf = start_listener(scene, "1.4", hears=False)
    for _ in range(10):
        speaker.sendmsg([b"x"], [scene.terms("news")], 0, scene.multicast())
    assert lanes_of(scene) == 1
    assert [ask(process) for process in hearing] == [["10", "r--s"]] * 2
    assert ask(deaf) == ["0"]
    # When one of them must not hear it any more, it is closed before anything else is said there.
    scene.command(scene.address("1.3"), scene.deaf_to(TOPIC))
    assert lanes_of(scene) == 0
    for _ in range(10):
        speaker.sendmsg([b"x"], [scene.terms("news")], 0, scene.multicast())
    assert lanes_of(scene) == 1
    assert ask(hearing[0]) == ["10", "r--s"]
    # What the master has said to it, and no lane.
    assert ask(hearing[1])[1:] == []
    assert ask(deaf) == ["0"]


@pytest.mark.parametrize("scene", ["fifo"], indirect=True)
def test_d11_two_topics_and_a_unicast_stay_in_order_on_lanes_of_their_own(scene: Scene) -> None:
    """They do not close each other, and one reader hears all of them as they were sent."""
    other = Terms.of("sports")
    speaker = scene.join("1.1", items=(scene.may_send(TOPIC), scene.may_send(other)))
    listener = scene.join("1.2", items=(scene.hears(TOPIC), scene.hears(other)))
    third = scene.join("1.3", items=(scene.hears(other),))
    heard: list[bytes] = []
    for number in range(300):
        body = number.to_bytes(2, "big")
        if number % 3 == 2:
            speaker.sendto(body, scene.address("1.2"))
        else:
            text = ("news", "sports")[number % 3]
            speaker.sendmsg([body], [scene.terms(text)], 0, scene.multicast())
        if number % 50 == 49:
            heard += scene.read_all(listener)
    assert lanes_of(scene) == 3
    heard += scene.read_all(listener)
    assert heard == [number.to_bytes(2, "big") for number in range(300)]
    assert scene.read_all(third) == heard[1::3]


@pytest.mark.parametrize("scene", ["fifo"], indirect=True)
def test_d8_a_match_of_another_leaves_a_lane_as_it_is(scene: Scene) -> None:
    """Only one that covers what goes through it closes it; whoever has it hears what comes next."""
    speaker = scene.join("1.1", items=(scene.may_send(TOPIC),))
    listener = scene.join("1.2", items=(scene.hears(TOPIC),))
    other = scene.join("1.3")

    def speak(body: bytes) -> None:
        speaker.sendmsg([body], [scene.terms("news")], 0, scene.multicast())

    speak(b"1")
    speak(b"2")
    assert lanes_of(scene) == 1
    scene.grant(other, scene.hears(Terms.of("news.local")), scene.hears(Terms.of("sports")))
    assert lanes_of(scene) == 1
    scene.grant(other, scene.hears(TOPIC))
    assert lanes_of(scene) == 0
    speak(b"3")
    assert scene.read_all(listener) == [b"1", b"2", b"3"]
    assert scene.read_all(other) == [b"3"]
