"""Bad networks, made to measure: a UDP proxy that loses, delays, reorders, doubles and spoils.

`Weather` says what one direction does to datagrams, `Sky` decides for each of them (a seed gives
the same weather again), and `Proxy` is a thread with sockets that lets them pass as decided.

    client  ---->  proxy.address  ----out---->  target
            <----                 <---back----

A client may come from several addresses; each gets a socket of its own towards the target. Clients
of one host may have a weather of their own.

Invariants:

1. The same seed and the same datagrams in the same order meet the same fate.
2. What is not lost arrives after its delay, at once if it has none, in the order of arrival times.
"""

from __future__ import annotations

import heapq
import random
import select
import socket
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from tests.deploy.kernel import LIBC, check

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_DATAGRAM_BYTES: Final = 65_536
#: Clients that one proxy serves; more would be a loop.
_CLIENTS: Final = 64
#: Datagrams on the way at a time, in both directions: what is above is lost, as in a full router.
_QUEUE: Final = 20_000
_CLONE_NEWNET: Final = 0x4000_0000


@dataclass(frozen=True, slots=True)
class Weather:
    """What happens to datagrams; each part is a share from 0 to 1.

    `reordered` ones arrive `late_s` later than others, so that those behind them overtake.
    `is_black` swallows everything.
    """

    lost: float = 0.0
    doubled: float = 0.0
    spoilt: float = 0.0
    reordered: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    late_s: float = 0.01
    is_black: bool = False


CLEAR: Final = Weather()
BLACK: Final = Weather(is_black=True)


class Sky:
    """Decides what becomes of each datagram."""

    def __init__(self, seed: int) -> None:
        """Begin in clear weather."""
        self._random = random.Random(seed)
        self.weather = CLEAR

    def decide(self, data: bytes) -> list[tuple[float, bytes]]:
        """Return what arrives of a datagram: delay in seconds, and bytes; nothing if it is lost."""
        weather, draw = self.weather, self._random.random
        # Each datagram takes as many draws, so that a change of weather changes no later one.
        lost, doubled, spoilt, reordered, jitter, place = (draw() for _ in range(6))
        if weather.is_black or lost < weather.lost:
            return []
        if spoilt < weather.spoilt and data:
            at = int(place * len(data))
            data = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        delay_s = weather.delay_s + jitter * weather.jitter_s
        if reordered < weather.reordered:
            delay_s += weather.late_s
        return [(delay_s, data)] * (2 if doubled < weather.doubled else 1)


class Proxy:
    """A proxy in front of one UDP address; runs in a thread until `close`."""

    def __init__(
        self,
        target: tuple[str, int],
        seed: int = 0,
        address: tuple[str, int] = ("127.0.0.1", 0),
        namespace: Path | None = None,
    ) -> None:
        """Listen on `address`, and pass datagrams on to `target`; both are of this namespace."""
        self._target = target
        self._lock = threading.Condition()
        self.out, self.back = Sky(seed), Sky(seed + 1)
        self._seed = seed
        #: Out and back, for clients of one host.
        self._own: dict[str, tuple[Sky, Sky]] = {}
        #: Datagrams that were decided on, that were sent on, and that were swallowed.
        self.taken = self.passed = self.swallowed = 0
        self._front: socket.socket
        self._wake, self._waker = socket.socketpair()
        self._clients: dict[tuple[str, int], socket.socket] = {}
        self._owners: dict[socket.socket, tuple[str, int]] = {}
        self._queue: list[tuple[float, int, socket.socket, tuple[str, int], bytes]] = []
        self._count = 0
        self._is_closed = False
        # A thread can be in another network namespace than its process: all is opened in there.
        is_open: Future[None] = Future()
        work = (address, namespace, is_open)
        self._thread = threading.Thread(target=self._serve, args=work, name="udp proxy")
        self._thread.daemon = True
        self._thread.start()
        is_open.result(10)

    @property
    def address(self) -> tuple[str, int]:
        """Where clients send to."""
        host, port = self._front.getsockname()[:2]
        return host, port

    def set(self, out: Weather, back: Weather | None = None) -> None:
        """Change the weather towards the target, and back (the same by default)."""
        with self._lock:
            self.out.weather = out
            self.back.weather = out if back is None else back
            self._own.clear()

    def steer(
        self, client: str, *, out: Weather | None = None, back: Weather | None = None
    ) -> None:
        """Change the weather for clients of one host alone; what is not given stays as it is."""
        with self._lock:
            if client not in self._own:
                seed = self._seed + 2 * (len(self._own) + 1)
                self._own[client] = Sky(seed), Sky(seed + 1)
                for own, common in zip(self._own[client], (self.out, self.back), strict=True):
                    own.weather = common.weather
            for own, given in zip(self._own[client], (out, back), strict=True):
                own.weather = own.weather if given is None else given

    def await_taken(self, count: int, limit_s: float = 10.0) -> None:
        """Wait until so many datagrams were decided on."""
        with self._lock:
            assert self._lock.wait_for(lambda: self.taken >= count, limit_s), "nothing has come"

    def move(self) -> None:
        """Take new addresses towards the target, as a router does that forgot its clients."""
        with self._lock:
            for old in self._clients.values():
                del self._owners[old]
                old.close()
            self._clients.clear()
        self._waker.send(b".")

    def close(self) -> None:
        """End the thread and close all sockets."""
        with self._lock:
            self._is_closed = True
        self._waker.send(b".")
        self._thread.join(10)
        assert not self._thread.is_alive(), "the proxy does not end"
        for one in (self._front, self._wake, self._waker, *self._clients.values()):
            one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(
        self, address: tuple[str, int], namespace: Path | None, is_open: Future[None]
    ) -> None:
        try:
            if namespace is not None:
                with namespace.open() as entrance:
                    check(LIBC.setns(entrance.fileno(), _CLONE_NEWNET), f"setns {namespace}")
            self._front = _bound(address)
        except OSError as error:
            is_open.set_exception(error)
        else:
            is_open.set_result(None)
            self._run()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._is_closed:
                    return
                watched = [self._front, self._wake, *self._clients.values()]
                due = self._queue[0][0] - time.monotonic() if self._queue else None
            timeout = None if due is None else max(0.0, due)
            try:
                readable, _, _ = select.select(watched, [], [], timeout)
            except (OSError, ValueError):
                # A socket was closed by `move` just now.
                continue
            with self._lock:
                for one in readable:
                    if one is self._wake:
                        one.recv(4096)
                    else:
                        self._take(one)
                self._send_due()

    def _take(self, one: socket.socket) -> None:
        """Decide about all that a socket has."""
        while one.fileno() >= 0:
            try:
                data, source = one.recvfrom(_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except ConnectionError:
                # Nobody listens at the other end just now.
                continue
            if one is self._front:
                client, way, to = source, self._client(source), self._target
            else:
                client = to = self._owners[one]
                way = self._front
            sky = self._own.get(client[0], (self.out, self.back))[one is not self._front]
            fates = sky.decide(data) if way is not None and len(self._queue) < _QUEUE else []
            self.swallowed += not fates
            self.taken += 1
            self._lock.notify_all()
            for delay_s, arrived in fates:
                assert way is not None
                self._count += 1
                entry = (time.monotonic() + delay_s, self._count, way, to, arrived)
                heapq.heappush(self._queue, entry)

    def _client(self, source: tuple[str, int]) -> socket.socket | None:
        made = self._clients.get(source)
        if made is None and len(self._clients) < _CLIENTS:
            made = _bound((self._front.getsockname()[0], 0))
            self._clients[source] = made
            self._owners[made] = source
        return made

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._queue and self._queue[0][0] <= now:
            _, _, way, to, data = heapq.heappop(self._queue)
            if way.fileno() < 0:
                continue
            try:
                way.sendto(data, to)
                self.passed += 1
            except OSError:
                # A full buffer, or nobody there: lost, as UDP is.
                self.swallowed += 1


def _bound(address: tuple[str, int]) -> socket.socket:
    made = socket.socket(
        socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM
    )
    made.setblocking(False)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        made.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
    made.bind(address)
    return made
