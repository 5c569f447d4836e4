"""The door, against agents that do what no good agent does."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from afbus.client import door as door_module
from afbus.client.door import Door, find_door
from afbus.client.endpoint import Endpoint
from afbus.client.refusal import refusal
from afbus.proto import errors, frames
from afbus.proto.address import BusAddress
from afbus.proto.errors import CloseCode
from afbus.proto.frames import Call, Closed, Frame, Hello, Op, Result, Welcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WELCOME = Welcome(
    version=1,
    endpoint=7,
    provisional=b"@7",
    token=bytes(16),
    epoch=1,
    tx_bytes=4096,
    rx_bytes=4096,
    resumed=False,
    node="here",
)


class FakeAgent:
    """One end of a door: each step of the script answers one frame of the client."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.heard: list[Frame] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(place))
        self._listener.listen()
        self._threads: list[threading.Thread] = []

    def play(self, *steps: Callable[[socket.socket], object]) -> None:
        """Let the next client in and answer it; close at the end of the script."""

        def run() -> None:
            connection, _ = self._listener.accept()
            with connection:
                for step in steps:
                    data = connection.recv(1 << 18)
                    if not data:
                        return
                    self.heard.append(frames.decode(data))
                    step(connection)

        thread = threading.Thread(target=run)
        thread.start()
        self._threads.append(thread)

    def end(self) -> None:
        """Wait until all scripts are over."""
        for thread in self._threads:
            thread.join()
        self._listener.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    """An agent that plays a script."""
    made = FakeAgent(tmp_path / "door")
    yield made
    made.end()


@pytest.fixture
def doors() -> Iterator[Callable[[FakeAgent], Door]]:
    """A maker of doors, which closes them at the end."""
    with contextlib.ExitStack() as stack:

        def knock(agent: FakeAgent) -> Door:
            made = Door(agent.place)
            stack.callback(made.close)
            return made

        yield knock


def say(*said: Frame, fds: int = 0) -> Callable[[socket.socket], object]:
    """Say something; descriptors go with the first frame."""

    def step(connection: socket.socket) -> None:
        pipes = [os.pipe() for _ in range((fds + 1) // 2)]
        ends = [end for pair in pipes for end in pair]
        socket.send_fds(connection, [frames.encode(said[0])], ends[:fds])
        for end in ends:
            os.close(end)
        for frame in said[1:]:
            connection.send(frames.encode(frame))

    return step


def say_bytes(data: bytes) -> Callable[[socket.socket], object]:
    """Say what is no frame."""
    return lambda connection: connection.send(data)


def say_nothing(_: socket.socket) -> None:
    """Answer nothing."""


def count_descriptors() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


# where it is


def test_place_of_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument, AFBUS_NODE, the user's, the system's: in this order."""
    monkeypatch.delenv("AFBUS_NODE", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert find_door() == Path("/run/afbus/node.sock")
    users = tmp_path / "afbus/node.sock"
    users.parent.mkdir()
    users.touch()
    assert find_door() == users
    monkeypatch.setenv("AFBUS_NODE", "/some/door")
    assert find_door() == Path("/some/door")
    assert find_door("/other/door") == Path("/other/door")
    monkeypatch.delenv("AFBUS_NODE")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert find_door() == Path("/run/afbus/node.sock")


def test_no_agent_says_how_to_start_one(tmp_path: Path) -> None:
    """The text names the door that was tried."""
    place = tmp_path / "door"
    with pytest.raises(ConnectionRefusedError, match="`afbus node` starts an agent") as caught:
        Door(place)
    assert str(place) in str(caught.value)
    assert caught.value.errno == errno.ECONNREFUSED
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dead.bind(str(place))
    dead.close()
    with pytest.raises(errors.NoAgent, match="Connection refused"):
        Door(place)


def test_path_that_no_socket_can_have(tmp_path: Path) -> None:
    """It is told as that, not as a missing agent."""
    with pytest.raises(errors.NameTooLong):
        Door(tmp_path / ("x" * 200))


def test_door_that_is_not_open_to_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EACCES is Denied."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(errors.Denied):
        Door(tmp_path / "door")


# hello

BAD_WELCOMES: dict[str, tuple[Callable[[socket.socket], object], type[Exception]]] = {
    "goes away": (lambda connection: connection.close(), errors.NoAgent),
    "refuses": (say(Closed(CloseCode.GOING_DOWN, "not now")), errors.NoAgent),
    "share": (say(Closed(CloseCode.SHARE, "64 endpoints")), errors.ShareExceeded),
    "no descriptors": (say(WELCOME), errors.RemoteProtocolError),
    "two descriptors": (say(WELCOME, fds=2), errors.RemoteProtocolError),
    "four descriptors": (say(WELCOME, fds=4), errors.RemoteProtocolError),
    "other version": (
        say(Welcome(99, 7, b"@7", bytes(16), 1, 4096, 4096, False, "here"), fds=3),
        errors.RemoteProtocolError,
    ),
    "another frame": (say(Result(1), fds=3), errors.RemoteProtocolError),
    "garbage": (say_bytes(b"\xc1"), errors.RemoteProtocolError),
    "too long": (say_bytes(bytes((128 << 10) + 1)), errors.RemoteProtocolError),
}


@pytest.mark.parametrize(("step", "error"), BAD_WELCOMES.values(), ids=BAD_WELCOMES)
def test_bad_welcome_leaves_nothing_behind(
    agent: FakeAgent, step: Callable[[socket.socket], object], error: type[Exception]
) -> None:
    """Each is told as what it is, and all descriptors are closed."""
    agent.play(step)
    before = count_descriptors()
    with pytest.raises(error):
        Endpoint(agent.place, 4096, 4096)
    agent.end()
    assert count_descriptors() < before, "the listener is closed too"
    assert agent.heard == [Hello(tx_bytes=4096, rx_bytes=4096)]


def test_welcome_that_is_no_ring(agent: FakeAgent) -> None:
    """Descriptors of something else are refused, and closed."""
    agent.play(say(WELCOME, fds=3))
    before = count_descriptors()
    with pytest.raises(OSError):  # noqa: PT011 (the data path's own words)
        Endpoint(agent.place, 4096, 4096)
    agent.end()
    assert count_descriptors() < before


# calls


def call(door: Door, op: Op = Op.STATUS, **args: Any) -> Any:
    """Make a call."""
    return door.call(op, args)


def test_call_returns_or_raises_what_the_agent_says(
    agent: FakeAgent, doors: Callable[[FakeAgent], Door]
) -> None:
    """Values come back, refusals as errors of the class that the agent named."""
    refused = Result.refused(2, errors.NotJoined("first join"))
    agent.play(say(Result(1, value={"a": 1})), say(refused))
    door = doors(agent)
    assert call(door) == {"a": 1}
    with pytest.raises(errors.NotJoined, match="first join"):
        call(door, Op.ATTACH, path=b"/tmp/test")
    assert agent.heard == [Call(1, Op.STATUS), Call(2, Op.ATTACH, {"path": b"/tmp/test"})]


def test_answer_that_comes_too_late_is_passed_over(
    agent: FakeAgent, doors: Callable[[FakeAgent], Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that stalls is reported; its late answer is not taken for the next one."""
    monkeypatch.setattr(door_module, "_TIMEVAL", ShortTimeval())
    agent.play(say_nothing, say(Result(1, value="late"), Result(2, value="in time")))
    door = doors(agent)
    with pytest.raises(errors.DeadlineExceeded, match="did not answer STATUS"):
        call(door)
    door._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bytes(16))
    assert call(door) == "in time"


class ShortTimeval:
    """A timeout of a millisecond."""

    def pack(self, *_: object) -> bytes:
        """Return it as `struct timeval`."""
        return (0).to_bytes(8, "little") + (1000).to_bytes(8, "little")


def test_d21_command_that_is_not_answered(
    agent: FakeAgent, doors: Callable[[FakeAgent], Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what came of it."""
    monkeypatch.setattr(door_module, "_TIMEVAL", ShortTimeval())
    agent.play(say_nothing, say_nothing)
    door = doors(agent)
    with pytest.raises(errors.OutcomeUnknown):
        call(door, Op.CONTROL, dst=b"1.1", items=[], body=b"")
    door.close()


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([lambda connection: connection.close()], "is gone"),
        ([say(Closed(CloseCode.EVICTED, "you were too slow"))], "you were too slow"),
    ],
)
def test_d16_end_of_the_connection_is_told(
    agent: FakeAgent, doors: Callable[[FakeAgent], Door], steps: list[Any], text: str
) -> None:
    """With the reason that the agent gave, at this call and at the next."""
    agent.play(*steps)
    door = doors(agent)
    with pytest.raises(errors.NotConnected, match=text):
        call(door)
    agent.end()
    with pytest.raises(errors.NotConnected, match=text):
        call(door)


def test_farewell_that_nobody_asked_for(
    agent: FakeAgent, doors: Callable[[FakeAgent], Door]
) -> None:
    """It is read when the next call finds the agent gone."""
    agent.play(say(Result(1), Closed(CloseCode.GOING_DOWN, "good night")))
    door = doors(agent)
    call(door)
    agent.end()
    with pytest.raises(errors.NotConnected, match="good night"):
        call(door)


@pytest.mark.parametrize(
    "step", [say_bytes(b"\xc1"), say(Result(9)), say(WELCOME)], ids=["garbage", "serial", "frame"]
)
def test_agent_that_breaks_the_rules(
    agent: FakeAgent, doors: Callable[[FakeAgent], Door], step: Callable[[socket.socket], object]
) -> None:
    """It is told as that."""
    agent.play(step)
    with pytest.raises(errors.RemoteProtocolError):
        call(doors(agent))


def test_call_that_does_not_fit_is_not_made(
    agent: FakeAgent, doors: Callable[[FakeAgent], Door]
) -> None:
    """The connection goes on as if nothing had been."""
    agent.play(say(Result(2)))
    door = doors(agent)
    with pytest.raises(errors.TooBig):
        call(door, Op.CONTROL, dst=b"1.1", items=[], body=bytes(1 << 18))
    call(door)


# the words


@pytest.mark.parametrize("number", range(1, 134))
def test_d7_each_errno_has_words(number: int) -> None:
    """Whatever the switch says, the error has that errno and names the destination."""
    where = BusAddress("/tmp/test", "1.1")
    error = refusal(number, where, size=5, source=b"1.2", descriptors=(3,))
    assert error.errno == number
    silent = {errno.EPIPE, errno.EADDRNOTAVAIL, errno.EDOM}
    assert number in silent or "/tmp/test:1.1" in str(error)


def test_d16_calls_that_others_must_answer_may_take_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that asks other nodes, or the cluster's master, is not taken for a dead one."""
    monkeypatch.setattr(door_module, "ANSWER_S", 1.0)
    monkeypatch.setattr(door_module, "FAR_S", 2.0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "door"))
        listener.listen()
        made = Door(tmp_path / "door")
        with pytest.raises(errors.OutcomeUnknown, match="CONTROL within 2 s"):
            made.call(Op.CONTROL, {})
        with pytest.raises(errors.DeadlineExceeded, match="STATUS within 1 s"):
            made.call(Op.STATUS, {})
        made.close()
