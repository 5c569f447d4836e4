"""The processes of a round: daemons, and players that begin together and measure in one window.

Invariants:

1. Every process that was started is ended by its id when the stage closes, whatever happened.
2. Players are forked before they have sockets or threads; what they measure comes back through a
   pipe.
3. All players of a round have one window, which begins when all of them are ready and warm.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Self

#: The longest that anything here may take.
LIMIT_S: Final = 60


class OfStage(Protocol):
    """What is made of a stage alone."""

    def __init__(self, stage: Any) -> None: ...


Kept = TypeVar("Kept", bound=OfStage)


@dataclass(frozen=True)
class Cue:
    """What the players of a round are told when all of them are ready."""

    #: When the window begins and ends, as perf_counter() counts in all processes of a machine.
    begin: float
    end: float
    #: All processes whose work counts: players and daemons.
    pids: tuple[int, ...]
    #: Says what came of it. Who takes messages goes on with that until it is ended: else a sender
    #: would wait for it, and everybody else for the sender.
    tell: Callable[[Any], None] = lambda _: None


class Stage:
    """One host, on which daemons and players run. Enter it to have it."""

    def __init__(self) -> None:
        self._end = contextlib.ExitStack()
        self.folder = Path()
        self._root = self
        self._kept: dict[type, Any] = {}

    @classmethod
    def obstacle(cls) -> str:
        """Say why there is no such stage here; empty if there can be one."""
        return ""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as end:
            self._end = end
            folder = tempfile.TemporaryDirectory(prefix="afbus-bench-", ignore_cleanup_errors=True)
            self.folder = Path(end.enter_context(folder))
            self._build()
            self._end = end.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.close()

    def _build(self) -> None:
        """Make what the stage consists of beside its folder."""

    @contextlib.contextmanager
    def part(self) -> Iterator[Self]:
        """Return a stage on the same hosts with a folder and processes of its own."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        with contextlib.ExitStack() as end:
            made._end = end
            folder = tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True)
            made.folder = Path(end.enter_context(folder))
            yield made

    def keep(self, kind: type[Kept]) -> Kept:
        """Return the one of its kind that lasts as long as the hosts do, made when first needed."""
        if kind not in self._kept:
            self._kept[kind] = kind(self._root)
        made: Kept = self._kept[kind]
        return made

    def address(self, role: str) -> str:
        """Return the IPv4 address of the host of a role."""
        return "127.0.0.1"

    def enter_host(self, role: str) -> None:
        """Move the calling process to the host of a role; only in a player."""

    def command(self, role: str, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` on the host of a role."""
        return [*argv]

    def serve(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a daemon, which ends with the stage."""
        daemon = subprocess.Popen(command, **options)  # noqa: S603 (our own words)
        self._end.callback(_end_daemon, daemon)
        return daemon

    def serve_ready(self, command: Sequence[str], **options: Any) -> int:
        """Start a daemon that says a line when it is ready; return its process id."""
        daemon = self.serve(command, stdout=subprocess.PIPE, **options)
        assert daemon.stdout is not None
        self._end.callback(daemon.stdout.close)
        if not daemon.stdout.readline():
            raise RuntimeError(f"{' '.join(command)} ended before it was ready")
        return daemon.pid

    def cast(self, name: str, role: Callable[[Player], Any]) -> Player:
        """Start a player that lasts as long as the stage."""
        player = Player(role, partial(self.enter_host, name))
        self._end.callback(player.end)
        player.await_ready()
        return player

    def play(  # noqa: PLR0913 (one round has as many parts)
        self,
        far: Mapping[str, Callable[[Player], Any]],
        near: Mapping[str, Callable[[Player], Any]],
        until: Iterable[str],
        *,
        warm_s: float = 0.0,
        window_s: float = 0.0,
        daemons: Sequence[int] = (),
        pins: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Run roles as processes that go on together once all are ready.

        Each is on the host of its name. The near ones begin when the far ones are ready, so that
        they find somebody to connect to.

        Args:
            far: What to do, by name: those that wait for others.
            near: Likewise: those that begin.
            until: Whose results are returned; when these are there, all are ended.
            warm_s: Time from the moment when all are ready to the window.
            window_s: Length of the window.
            daemons: Processes whose work counts with that of the players.
            pins: The only CPU that a role may use.
        """
        players: dict[str, Player] = {}
        try:
            for roles in (far, near):
                for name, role in roles.items():
                    enter = partial(_enter, self, name, (pins or {}).get(name))
                    players[name] = Player(role, enter)
                for name in roles:
                    players[name].await_ready()
            begin = time.perf_counter() + warm_s
            pids = (*(player.pid for player in players.values()), *daemons)
            cue = Cue(begin, begin + window_s, pids)
            for player in players.values():
                player.go(cue)
            return {name: players[name].result() for name in until}
        finally:
            for player in players.values():
                player.end()


class WideStage(Stage):
    """One host with so many CPUs that dozens of processes do not only wait for each other."""

    CPUS: Final = 9

    @classmethod
    def obstacle(cls) -> str:
        """Say why there is no such stage here."""
        count = len(os.sched_getaffinity(0))
        return f"{count} CPUs are too few, {cls.CPUS} are wanted" if count < cls.CPUS else ""


class Player:
    """One process of a round. Its role calls `ready` when it has what it needs, and then plays."""

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
        try:
            signal.alarm(LIMIT_S)
            self._theirs, self._ours = theirs, ours
            enter()
            self.tell(role(self))
        except ConnectionError:
            # The other end was quicker to end; `result` finds out what matters.
            pass
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)

    def announce(self) -> None:
        """Say that this player is ready, and lasts as long as the stage. Only in the child."""
        signal.alarm(0)
        self.tell_ready()

    def ready(self) -> Cue:
        """Say that this player is ready, and wait for the others. Only in the child."""
        self.tell_ready()
        return self.await_cue()

    def tell_ready(self) -> None:
        """Say that this player is ready: those that connect to it may begin."""
        os.write(self._ours, b"\n")

    def await_cue(self) -> Cue:
        """Wait until all are ready."""
        begin, end, pids = json.loads(_read_line(self._theirs))
        return Cue(begin, end, tuple(pids), self.tell)

    def tell(self, result: Any) -> None:
        """Say what the role has found out. Only in the child."""
        os.write(self._ours, json.dumps(result).encode() + b"\n")

    def await_ready(self) -> None:
        """Wait until the player is ready."""
        if not os.read(self._theirs, 1):
            raise RuntimeError("a player of the bench ended before it was ready")

    def go(self, cue: Cue) -> None:
        """Let it go on."""
        line = json.dumps([cue.begin, cue.end, cue.pids]).encode()
        # Who is ended already is found out by `result`.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._ours, line + b"\n")

    def result(self) -> Any:
        """Return what its role returned."""
        text = _read_line(self._theirs)
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


def _enter(stage: Stage, name: str, pin: int | None) -> None:
    stage.enter_host(name)
    if pin is not None:
        os.sched_setaffinity(0, {pin})


def _read_line(fd: int) -> bytes:
    with os.fdopen(os.dup(fd), "rb") as lines:
        return lines.readline()


def _end_daemon(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
