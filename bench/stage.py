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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

import afbus
from afbus.proto import control
from afbus.proto.control import MulticastMatch, MulticastSend, OwnedAddr
from afbus.proto.match import Overflow
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

BUS = "/bench"
#: The `afbus` command of the measured code.
CLI: Final = (sys.executable, "-m", "afbus.cli")
MASTER = afbus.BusAddress(BUS, "bench.master")
#: What all multicasts of the benches are about.
TOPIC = Terms.of("bench")
#: The longest that anything here may take.
LIMIT_S = 120


class Stage:
    """Agents on doors of their own, a bus, and its master. `enter` the stage to have them."""

    #: Whether one stage serves all runs of a row, because it takes seconds to make.
    is_lasting: ClassVar[bool] = False
    #: Of the bus.
    scope: ClassVar[str] = "host"

    def __init__(self) -> None:
        self._end = contextlib.ExitStack()
        self.folder = Path()

    @classmethod
    def obstacle(cls) -> str:
        """Say why there is no such stage here; empty if there can be one."""
        return ""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as end:
            self._end = end
            self.folder = Path(
                end.enter_context(tempfile.TemporaryDirectory(prefix="afbus-bench-"))
            )
            self._build()
            master = self._cast({"master": self._grant})["master"]
            end.callback(master.end)
            master.await_ready()
            master.go()
            self._end = end.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.close()

    def _build(self) -> None:
        """Start what the stage consists of, but for the master of the bus."""
        raise NotImplementedError

    def door(self, name: str) -> Path:
        """Return where the endpoint of this name finds its agent."""
        raise NotImplementedError

    def enter_host(self, name: str) -> None:
        """Move the calling process to the host of this endpoint; only in a player."""

    def serve(self, command: list[str]) -> int:
        """Start a daemon that says a line when it is ready; return its process id."""
        daemon = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603 (our own program)
        self._end.callback(_end_daemon, daemon)
        assert daemon.stdout is not None
        if not daemon.stdout.readline():
            raise RuntimeError(f"{' '.join(command)} ended before it was ready")
        return daemon.pid

    def socket(self, name: str, **sizes: int) -> afbus.Socket:
        """Return a socket at the agent of this endpoint."""
        made = afbus.socket(node=self.door(name), **sizes)
        made.settimeout(LIMIT_S)
        return made

    def join(self, name: str, match: bool = False, **sizes: int) -> afbus.Socket:
        """Return a socket that owns a name, may publish, and hears multicasts with `match`."""
        made = self.socket(name, **sizes)
        made.sendmsg([json.dumps([name, match]).encode()], address=MASTER)
        made.recvmsg(100, 100_000)
        return made

    def _grant(self, player: Player) -> NoReturn:
        # It lives as long as the stage.
        signal.alarm(0)
        with self.socket("master") as master:
            master.bind(MASTER, scope=self.scope)
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
        self, roles: Mapping[str, Callable[[Player], Any]], until: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Run roles as processes that go on together once all are ready; return what they return.

        Each is on the host of the endpoint of its name.

        Args:
            roles: What to do, by name.
            until: Whose results are waited for, by default all; then all are ended.
        """
        players = self._cast(roles)
        try:
            for player in players.values():
                player.await_ready()
            for player in players.values():
                player.go()
            return {name: players[name].result() for name in until or roles}
        finally:
            for player in players.values():
                player.end()

    def _cast(self, roles: Mapping[str, Callable[[Player], Any]]) -> dict[str, Player]:
        return {name: Player(role, partial(self.enter_host, name)) for name, role in roles.items()}


class HostStage(Stage):
    """One agent."""

    def _build(self) -> None:
        #: The agent's process.
        self.agent = self.serve([*CLI, "node", "--door", str(self.door(""))])

    def door(self, name: str) -> Path:
        """Return where all find the agent."""
        return self.folder / "node.sock"


class Player:
    """One process of a row. Its role calls `ready` when it has what it needs, and then measures."""

    def __init__(self, role: Callable[[Player], Any], enter: Callable[[], None]) -> None:
        """Fork; the child calls `enter` and plays the role."""
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
            enter()
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


def _end_daemon(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    daemon.wait(10)
    assert daemon.stdout is not None
    daemon.stdout.close()
