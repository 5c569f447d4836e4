"""The processes of a measurement: an agent, a master, and players that start together.

Invariants:

1. Every process that was started is ended by its id when the stage closes, whatever happened.
2. Players are forked before they have sockets; what they measure comes back through a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import afbus
from afbus.proto import control
from afbus.proto.control import MulticastMatch, MulticastSend, OwnedAddr
from afbus.proto.match import Overflow
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

BUS = "/bench"
MASTER = afbus.BusAddress(BUS, "bench.master")
#: What all multicasts of the benches are about.
TOPIC = Terms.of("bench")
#: The longest that anything here may take.
LIMIT_S = 120


class Stage:
    """An agent of its own on a door of its own, and a master on it."""

    def __init__(self) -> None:
        self._end = contextlib.ExitStack()
        folder = Path(self._end.enter_context(tempfile.TemporaryDirectory(prefix="afbus-bench-")))
        self.door = folder / "node.sock"
        command = [sys.executable, "-m", "afbus.cli", "node", "--door", str(self.door)]
        agent = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603 (our own program)
        self._end.callback(_end_agent, agent)
        assert agent.stdout is not None
        agent.stdout.readline()
        self.agent = agent.pid
        self.play({"master": self._grant}, wait=("master",))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.close()

    def socket(self, **sizes: int) -> afbus.Socket:
        """Return a socket at this agent."""
        made = afbus.socket(node=self.door, **sizes)
        made.settimeout(LIMIT_S)
        return made

    def join(self, name: str, match: bool = False, **sizes: int) -> afbus.Socket:
        """Return a socket that owns a name, may publish, and hears multicasts with `match`."""
        made = self.socket(**sizes)
        made.sendmsg([json.dumps([name, match]).encode()], address=MASTER)
        made.recvmsg(100, 100_000)
        return made

    def _grant(self, player: Player) -> NoReturn:
        with self.socket() as master:
            master.bind(MASTER)
            player.ready()
            master.settimeout(None)
            while True:
                data, _, _, source = master.recvmsg(10_000, 10_000)
                if source.is_kernel:
                    continue
                name, hears = json.loads(data)
                path = BUS.encode()
                items: list[control.Item] = [OwnedAddr(afbus.BusAddress(BUS, name))]
                items += [MulticastSend(path, TOPIC)]
                if hears:
                    # Senders wait for slow readers, so that each message is delivered and counts.
                    match = control.Match(path, TOPIC, Overflow.BLOCK, LIMIT_S // 2 * 1000)
                    items += [MulticastMatch(match)]
                master.sendmsg([b"yes"], [control.encode(item) for item in items], 0, source)

    def play(
        self, roles: dict[str, Callable[[Player], Any]], wait: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Run roles as processes that go on together once all are ready; return what they return.

        Roles named in `wait` are waited for only until they are ready; they end with the stage.
        """
        players = {name: Player(role) for name, role in roles.items()}
        for name, player in players.items():
            if name in wait:
                self._end.callback(player.end)
        try:
            for player in players.values():
                player.await_ready()
            for player in players.values():
                player.go()
            return {name: player.result() for name, player in players.items() if name not in wait}
        finally:
            for name, player in players.items():
                if name not in wait:
                    player.end()


class Player:
    """One process of a row. Its role calls `ready` when it has what it needs, and then measures."""

    def __init__(self, role: Callable[[Player], Any]) -> None:
        theirs, self._ours = os.pipe()
        self._theirs, ours = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(theirs)
            os.close(ours)
            return
        # From here on the child: whatever happens, it ends here.
        status = 1
        try:
            signal.alarm(LIMIT_S)
            self._theirs, self._ours = theirs, ours
            os.write(self._ours, json.dumps(role(self)).encode() + b"\n")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def ready(self) -> None:
        """Say that this player is ready, and wait for the others. Only in the child."""
        os.write(self._ours, b"\n")
        os.read(self._theirs, 1)

    def await_ready(self) -> None:
        """Wait until the player is ready."""
        if not os.read(self._theirs, 1):
            raise RuntimeError("a player of the bench ended before it was ready")

    def go(self) -> None:
        """Let it go on."""
        os.write(self._ours, b"!")

    def result(self) -> Any:
        """Return what its role returned."""
        with os.fdopen(os.dup(self._theirs)) as lines:
            text = lines.readline()
        if not text:
            raise RuntimeError("a player of the bench ended without a result")
        return json.loads(text)

    def end(self) -> None:
        """End the process, if it still runs."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._theirs)
            os.close(self._ours)
            self.pid = 0


def _end_agent(agent: subprocess.Popen[bytes]) -> None:
    agent.terminate()
    agent.wait(10)
    assert agent.stdout is not None
    agent.stdout.close()
