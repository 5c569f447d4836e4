"""aioquic as we set it up, on a clock of its own: rates over paths that reorder and lose."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from aioquic.quic.events import StreamDataReceived
from aioquic.quic.recovery import K_PACKET_THRESHOLD, K_TIME_THRESHOLD, QuicPacketRecovery
from tests.link.authority import node
from tests.link.world import ISSUING

from afbus.link.certificate import Side
from afbus.link.handshake import ALPN, LinkConnection, Origin, configure
from afbus.link.transport import _Recovery

if TYPE_CHECKING:
    from afbus.link.certificate import Refused
    from afbus.link.identity import Identity

#: What the bottleneck lets through, in bytes a second, and how much it queues.
RATE = 4_000_000
QUEUE_S = 0.1
CHUNK = bytes(50_000)


class Trusting:
    """Judges everybody good: who they are does not matter here."""

    def judge(self, presented: tuple[bytes, ...]) -> Identity:
        """See the class."""
        return node("x") if presented else node("nobody")

    def report(self, refused: Refused) -> None:
        """See the class."""
        raise AssertionError(refused)


@dataclass
class Path:
    """What the way does: each datagram takes `delay_s`, and up to `jitter_s` more."""

    delay_s: float = 0.010
    jitter_s: float = 0.0
    loss: float = 0.0


class Simulation:
    """A client that sends all it can, a server that reads, and a bottleneck between them."""

    def __init__(self, path: Path, seed: int = 1) -> None:
        self.now = 0.0
        self.received = 0
        self._path = path
        self._random = Random(seed)
        self._queue: list[tuple[float, int, int, bytes]] = []
        self._order = count()
        self._busy_until = [0.0, 0.0]
        self.client = LinkConnection(self._configure(Side.CLIENT), Trusting())
        self.client.connect(("server", 1), 0.0)
        first_id = self.client.original_destination_connection_id
        self.server = LinkConnection(self._configure(Side.SERVER), Trusting(), Origin(first_id))
        self._ends: list[LinkConnection] = [self.client, self.server]
        self._stream: int | None = None
        self._send(0)

    def _configure(self, side: Side) -> Any:
        credentials = ISSUING.issue(node("x"))
        return configure(side, credentials, [ALPN], idle_s=30, datagram_bytes=1200)

    def run_until(self, end: float) -> None:
        """Let time pass."""
        while True:
            timers = [(e.get_timer() or end, n) for n, e in enumerate(self._ends) if n in self._up]
            timer = min(timers, default=(end, -1))
            when = min(self._queue[0][0] if self._queue else end, timer[0])
            if when >= end:
                break
            self.now = max(self.now, when)
            if self._queue and self._queue[0][0] <= when:
                _, _, side, data = heapq.heappop(self._queue)
                address = ("client", 2) if side == 1 else ("server", 1)
                self._ends[side].receive_datagram(data, address, self.now)
                self._send(side)
            else:
                # A timer is never exact, and aioquic's own arithmetic counts on that.
                self.now += 1e-6
                self._ends[timer[1]].handle_timer(self.now)
                self._send(timer[1])
        self.now = end

    @property
    def _up(self) -> list[int]:
        return [0] if self.server._network_paths == [] else [0, 1]

    def _send(self, side: int) -> None:
        end = self._ends[side]
        while (event := end.next_event()) is not None:
            if isinstance(event, StreamDataReceived):
                end.read_bytes += len(event.data)
                self.received += len(event.data)
        if side == 0 and self.client._handshake_complete:
            if self._stream is None:
                self._stream = self.client.get_next_available_stream_id(is_unidirectional=True)
                self.client.send_stream_data(self._stream, b"")
            while len(self.client._streams[self._stream].sender._buffer) < 2_000_000:
                self.client.send_stream_data(self._stream, CHUNK)
        for data, _ in end.datagrams_to_send(self.now):
            start = max(self.now, self._busy_until[side])
            if start > self.now + QUEUE_S or self._random.random() < self._path.loss:
                continue
            self._busy_until[side] = start + len(data) / RATE
            jitter_s = self._path.jitter_s * self._random.random()
            arrival = self._busy_until[side] + self._path.delay_s + jitter_s
            heapq.heappush(self._queue, (arrival, next(self._order), 1 - side, data))

    def rate(self, duration_s: float = 2.0) -> float:
        """How much of the bottleneck is used, from 0 to 1, after the first half second."""
        self.run_until(0.5)
        before = self.received
        self.run_until(0.5 + duration_s)
        return (self.received - before) / duration_s / RATE


@pytest.mark.parametrize("jitter_s", [0.0, 0.001, 0.005, 0.020])
def test_case11_reordering_costs_little(jitter_s: float) -> None:
    """Packets that overtake each other are soon waited for; aioquic itself keeps a tenth."""
    rate = Simulation(Path(jitter_s=jitter_s)).rate()
    print(f"jitter {jitter_s * 1000:.0f} ms: {rate:.2f} of the path")
    assert rate > 0.6


def test_case11_aioquic_itself_collapses(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, aioquic has learned it too, and ours can go."""
    monkeypatch.setattr(_Recovery, "take_over", lambda recovery: recovery)
    assert type(Simulation(Path()).client._loss) is QuicPacketRecovery
    assert Simulation(Path(jitter_s=0.005)).rate() < 0.3


def recovery_of(simulation: Simulation) -> _Recovery:
    """The client's."""
    recovery = simulation.client._loss
    assert isinstance(recovery, _Recovery)
    return recovery


def test_losses_without_reordering_teach_nothing() -> None:
    """They are found as early as ever."""
    simulation = Simulation(Path(loss=0.01))
    assert simulation.rate() > 0.05
    recovery = recovery_of(simulation)
    assert recovery.packet_threshold == K_PACKET_THRESHOLD
    assert recovery.time_threshold == K_TIME_THRESHOLD
    assert len(recovery._lost) > 10


def test_patience_has_an_end() -> None:
    """A path that shuffles without bounds is not waited for without bounds."""
    simulation = Simulation(Path(delay_s=0.001, jitter_s=0.5))
    simulation.run_until(4.0)
    recovery = recovery_of(simulation)
    assert K_TIME_THRESHOLD < recovery.time_threshold <= 2.5
    assert K_PACKET_THRESHOLD < recovery.packet_threshold <= 1 << 16
    assert len(recovery._lost) <= 512
