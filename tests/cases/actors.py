"""Processes of a test: forked from one that has imported everything, so that a thousand are cheap.

A *role* is a function of a test module. The test names it, a child of the fork server plays it:

    def shout(stage: Stage, text: str) -> None:        def test(fleet: Fleet) -> None:
        stage.join().sendto(text.encode(), MASTER)         fleet.start(shout, text="hello").kill()

Stage and test speak by lines of JSON. What a role raises is raised in the test.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from afbus.client.socket import Socket
from afbus.proto import control
from afbus.proto.address import BusAddress
from afbus.proto.control import Grant, GrantFlags, Match, MulticastMatch, MulticastSend, OwnedAddr
from afbus.proto.errors import BusError, NotConnected
from afbus.proto.limits import RX_RING_BYTES, TX_RING_BYTES
from afbus.proto.match import Overflow
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent.parent
PATH = "/tmp/cases"
MASTER = BusAddress(PATH, "org.example.bus")
MULTICAST = BusAddress.multicast(PATH)
#: How long anything may take that is waited for: far more than it does.
PATIENCE_S = 60.0
#: Room for all the items of one message.
ITEMS = 4096
_LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


class Channel:
    """Values as lines of JSON, both ways."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._received = b""

    def tell(self, value: Any) -> None:
        """Send a value."""
        self.socket.sendall(json.dumps(value).encode() + b"\n")

    def hear(self) -> Any:
        """Wait for a value; EOFError when there will be none."""
        while b"\n" not in self._received:
            more = self.socket.recv(1 << 16)
            if not more:
                raise EOFError("the other end of the channel is gone")
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def has_news(self, timeout_s: float = 0.0) -> bool:
        """Wait for a value, or for the end, at most so long; tell whether there is one."""
        if b"\n" in self._received:
            return True
        return bool(select.select([self.socket], [], [], timeout_s)[0])

    def close(self) -> None:
        """Close it."""
        self.socket.close()


class Stage(Channel):
    """What a role has: the channel to the test, and the place of the door."""

    def __init__(self, end: socket.socket, place: str) -> None:
        super().__init__(end)
        self.place = place

    def join(self, **wish: Any) -> Socket:
        """A new member of the bus; wishes as those of `join`."""
        return join(self.place, **wish)


def join(
    place: str | os.PathLike[str],
    *,
    name: str | None = None,
    listen: list[tuple[str, str]] | None = None,
    watch: bool = False,
    tx_bytes: int = TX_RING_BYTES,
    rx_bytes: int = RX_RING_BYTES,
) -> Socket:
    """Join the bus of the role `master`; nobody may be speaking of what it listens to.

    Args:
        place: The agent's door.
        name: The address; a unique one if none is given.
        listen: Topic and overflow of each subscription.
        watch: Whether it gets notices about others.
        tx_bytes: Size of a ring.
        rx_bytes: Size of a ring.
    """
    one = Socket(node=place, tx_bytes=tx_bytes, rx_bytes=rx_bytes)
    one.settimeout(PATIENCE_S)
    wish = {"name": name, "listen": listen or [], "watch": watch}
    one.sendto(json.dumps(wish).encode(), MASTER)
    # Who watches may be told of others first.
    while (answer := one.recvfrom(4096))[1].is_kernel:
        pass
    assert answer == (b"welcome", MASTER)
    return one


def master(stage: Stage, rx_bytes: int, order: str) -> None:
    """Be the bus's master, and grant every wish."""
    count = 1
    with Socket(node=stage.place, rx_bytes=rx_bytes) as bus:
        bus.bind(MASTER, order=order)
        stage.tell("ready")
        while True:
            try:
                body, source = bus.recvfrom(4096)
            except NotConnected:
                continue
            if source.is_kernel:
                continue
            # Who asked may have been killed meanwhile, or have written what is no wish.
            with contextlib.suppress(BusError, ValueError, KeyError, TypeError):
                items = read_wish(json.loads(body), f"1.{count}")
                count += 1
                bus.sendmsg([b"welcome"], map(control.encode, items), 0, source)


def read_wish(wish: dict[str, Any], unique: str) -> list[control.Item]:
    """What an endpoint is to have, that has sent this."""
    items: list[control.Item] = [OwnedAddr(BusAddress(PATH, wish["name"] or unique))]
    items.append(MulticastSend(PATH.encode(), Terms()))
    for topic, overflow in wish["listen"]:
        how = Overflow[overflow]
        deadline_ms = 60_000 if how is Overflow.BLOCK else 0
        match = Match(PATH.encode(), Terms.parse(topic), how, deadline_ms)
        items.append(MulticastMatch(match))
    if wish["watch"]:
        items.append(Grant(GrantFlags.NOTICES))
    return items


def about(topic: str) -> tuple[int, int, bytes]:
    """The item beside a multicast about this."""
    return control.encode(control.MessageTerms(Terms.parse(topic)))


class Actor(Channel):
    """A process that plays a role, as the test sees it."""

    def __init__(self, pid: int, pidfd: int, end: socket.socket) -> None:
        super().__init__(end)
        self.pid = pid
        self.pidfd = pidfd
        end.settimeout(4 * PATIENCE_S)

    def hear(self) -> Any:
        """Wait for what the role tells; AssertionError if it failed."""
        value = super().hear()
        if isinstance(value, dict) and "failed" in value:
            raise AssertionError(value["failed"])
        return value

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        signal.pidfd_send_signal(self.pidfd, number)

    def wait(self) -> None:
        """Wait until it is gone: then all its descriptors are closed."""
        select.select([self.pidfd], [], [])

    def kill(self) -> None:
        """kill -9, and wait."""
        if self.pidfd >= 0:
            self.send_signal(signal.SIGKILL)
            self.wait()
            self._forget()

    def finish(self) -> None:
        """Wait for the end of its role; AssertionError if it failed."""
        with contextlib.suppress(EOFError):
            value = self.hear()
            raise AssertionError(f"the role told {value!r}, and nobody asked for it")
        self.wait()
        self._forget()

    def _forget(self) -> None:
        os.close(self.pidfd)
        self.pidfd = -1
        self.close()


class Fleet:
    """The fork server, and the actors that it has made."""

    def __init__(self, place: Path, prefix: tuple[str, ...] = ()) -> None:
        """Start the server, by a command that begins so."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [*prefix, sys.executable, "-m", __name__, str(theirs.fileno()), str(place)]
        self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
        theirs.close()
        self._actors: list[Actor] = []

    @property
    def pid(self) -> int:
        """The number of the server."""
        return self._process.pid

    def start(self, role: Callable[..., None], *, uid: int = 0, pid: int = 0, **args: Any) -> Actor:
        """Let a new process play a role.

        Args:
            role: A function of a module, whose first argument is the stage.
            uid: Who it is; 0 for the same as here.
            pid: The number that it is to have, 0 for any; it may come to have another.
            args: Further arguments of the role.
        """
        order = {"role": [role.__module__, role.__name__], "uid": uid, "pid": pid, "args": args}
        self._socket.send(json.dumps(order).encode())
        data, descriptors, _, _ = socket.recv_fds(self._socket, 64, 2)
        assert data, "the fork server is gone"
        pidfd, end = descriptors
        actor = Actor(int(data), pidfd, socket.socket(fileno=end))
        self._actors = [one for one in self._actors if one.pidfd >= 0]
        self._actors.append(actor)
        return actor

    def start_master(self, rx_bytes: int = RX_RING_BYTES, order: str = "fifo") -> Actor:
        """Let a process be the bus's master, and wait until it is."""
        made = self.start(master, rx_bytes=rx_bytes, order=order)
        assert made.hear() == "ready"
        return made

    def close(self) -> None:
        """Kill all, and end the server; roles that failed unheard are shown."""
        for actor in self._actors:
            while actor.pidfd >= 0 and actor.has_news():
                try:
                    actor.hear()
                except EOFError:
                    break
                except AssertionError as error:
                    print(error)
            actor.kill()
        self._socket.close()
        self._process.wait()

    def __enter__(self) -> Self:
        """Return the fleet."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Kill all."""
        self.close()


def _play(end: socket.socket, place: str, order: dict[str, Any]) -> int:
    """Be the child: play the role, and return the exit status."""
    stage = Stage(end, place)
    module, name = order["role"]
    try:
        if order["uid"]:
            os.setgroups([])
            os.setresgid(order["uid"], order["uid"], order["uid"])
            os.setresuid(order["uid"], order["uid"], order["uid"])
        getattr(sys.modules[module], name)(stage, **order["args"])
    except BaseException:
        # The test may have gone first.
        with contextlib.suppress(OSError):
            stage.tell({"failed": traceback.format_exc()})
        return 1
    return 0


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _serve(commands: socket.socket, place: str) -> None:
    """Fork a child for each order, until the test is gone."""
    # What is there now stays; children need not copy it to look whether it does.
    gc.freeze()
    while data := commands.recv(1 << 18):
        order = json.loads(data)
        importlib.import_module(order["role"][0])
        _reap()
        ours, theirs = socket.socketpair()
        if order["pid"]:
            _LAST_PID.write_text(str(order["pid"] - 1))
        pid = os.fork()
        if not pid:
            commands.close()
            ours.close()
            os._exit(_play(theirs, place, order))
        theirs.close()
        pidfd = os.pidfd_open(pid)
        rights = array.array("i", [pidfd, ours.fileno()]).tobytes()
        item = (socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)
        commands.sendmsg([b"%d" % pid], [item])
        os.close(pidfd)
        ours.close()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
