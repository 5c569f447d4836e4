"""What a row asks of a system, and what a system does for it.

A `Wire` is one way from end to end for one round. It is opened in the parent, where it makes what
both ends need (a broker, addresses, keys); then its roles run in processes of their own:

    echo     sends back what comes
    ping     returns the microseconds of a message and its echo
    source   sends until it is ended
    sink     takes until it is ended, and tells what came in the window, as `Taken`
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final

from .meter import Taken, take_each, time_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .stage import Player, Stage

KIB: Final = 1024
MIB: Final = 1024 * KIB
#: Messages that go at a time where a system has a call for many.
BATCH: Final = 256


@dataclass(frozen=True)
class Traffic:
    """What goes over a wire."""

    size: int = 64
    #: Receivers, each of which gets every message.
    readers: int = 1
    #: "call": a call a message. "batch": a call for many, where there is one. "loan": written in
    #: place, read in place.
    mode: str = "batch"
    #: Whether who waits may spin first.
    spins: bool = True
    #: The CPU of the far ends and that of the near ones; empty: as the scheduler likes.
    pins: tuple[int, ...] = ()

    @property
    def chunk(self) -> int:
        """Messages between two looks at the clock."""
        return max(1, min(BATCH, 4 * MIB // self.size // 4))


class Wire(ABC):
    """One way from end to end."""

    #: Time that the ends need until everything is connected and warm.
    warm_s: float = 0.1

    def __init__(self, stage: Stage, traffic: Traffic) -> None:
        """Open it; in the parent."""
        self.stage = stage
        self.traffic = traffic
        #: Processes between the ends, whose work counts.
        self.daemons: list[int] = []

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Give back what the parent holds, but for the daemons, which are the stage's."""

    @abstractmethod
    def echo(self, player: Player) -> None:
        """Send back what comes, until the process is ended."""

    @abstractmethod
    def ping(self, player: Player) -> float:
        """Return the median time of a message and its echo, in microseconds."""

    @abstractmethod
    def source(self, player: Player) -> None:
        """Send until the process is ended."""

    @abstractmethod
    def sink(self, player: Player, number: int) -> None:
        """Take what comes, until the process is ended; tell the arguments of `Taken`."""


class End:
    """One end whose calls block, for one message each."""

    #: Sends one message.
    send: Callable[[bytes], object]
    #: Receives one message, and returns its body.
    receive: Callable[[], Any]


class BlockingWire(Wire):
    """A wire whose ends block."""

    @abstractmethod
    def end(self, role: str, player: Player) -> contextlib.AbstractContextManager[End]:
        """Return the end of a role: echo, ping, source, or sink and its number. In a player."""

    def echo(self, player: Player) -> None:
        """Send back what comes."""
        with self.end("echo", player) as end:
            player.ready()
            send, receive = end.send, end.receive
            while True:
                send(receive())

    def ping(self, player: Player) -> float:
        """Time turns."""
        with self.end("ping", player) as end:
            body, send, receive = bytes(self.traffic.size), end.send, end.receive
            cue = player.ready()
            return time_turns(cue, lambda: (send(body), receive()))

    def source(self, player: Player) -> None:
        """Send one message after the other."""
        with self.end("source", player) as end:
            body, send = bytes(self.traffic.size), end.send
            player.ready()
            for _ in repeat(None):
                send(body)

    def sink(self, player: Player, number: int) -> None:
        """Receive one message after the other."""
        with self.end(f"sink{number}", player) as end:
            take_each(player.ready(), end.receive, self.traffic.chunk)


@dataclass(frozen=True)
class System:
    """What is measured: a name, and how its wires are made."""

    name: str
    make: Callable[[Stage, Traffic], Wire]
    #: What of Python and what commands it needs; the package's name where it is another one.
    modules: tuple[str, ...] = ()
    obstacle: Callable[[], str] = lambda: ""
    #: Not a peer: it does less (no encryption, no message boundaries), and shows the machine.
    is_yardstick: bool = False

    def missing(self) -> str:
        """Say what is not installed; empty if nothing is."""
        absent = [name for name in self.modules if find_spec(name) is None]
        return f"no module {', '.join(absent)}" if absent else self.obstacle()

    def but(self, **changes: Any) -> System:
        """Return the same with changes."""
        return replace(self, **changes)


#: Windows, in seconds.
RTT_S: Final = 0.3
RATE_S: Final = 0.4


@contextlib.contextmanager
def opened(system: System, stage: Stage, traffic: Traffic) -> Iterator[Wire]:
    """Open a wire of a system on a part of a stage."""
    with stage.part() as part:
        wire = system.make(part, traffic)
        try:
            yield wire
        finally:
            wire.close()


def round_trip(
    system: System, stage: Stage, traffic: Traffic, window_s: float = RTT_S
) -> dict[str, float]:
    """Measure `rtt`: the median of a message and its echo, in microseconds."""
    with opened(system, stage, traffic) as wire:
        pins = dict(zip(("echo", "ping"), traffic.pins, strict=False))
        found = wire.stage.play(
            {"echo": wire.echo},
            {"ping": wire.ping},
            ("ping",),
            warm_s=wire.warm_s,
            window_s=window_s,
            daemons=wire.daemons,
            pins=pins,
        )
    return {"rtt": float(found["ping"])}


def one_way(
    system: System, stage: Stage, traffic: Traffic, window_s: float = RATE_S
) -> dict[str, float]:
    """Measure `rate` (deliveries a second, of all readers) and `cpu` (seconds a million)."""
    with opened(system, stage, traffic) as wire:
        names = [f"sink{number}" for number in range(traffic.readers)]
        found = wire.stage.play(
            {name: partial(wire.sink, number=number) for number, name in enumerate(names)},
            {"source": wire.source},
            names,
            warm_s=wire.warm_s,
            window_s=window_s,
            daemons=wire.daemons,
        )
    all_taken = [Taken(int(count), *times) for count, *times in found.values()]
    total = sum(taken.count for taken in all_taken)
    return {
        "rate": sum(taken.rate for taken in all_taken),
        "cpu": 1e6 * all_taken[0].cpu_s / total,
    }
