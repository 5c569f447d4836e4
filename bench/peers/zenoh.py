"""eclipse-zenoh: between peers, over a UNIX socket, TCP, TLS, QUIC, or with shared memory."""

from __future__ import annotations

import contextlib
import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..certificate import certify
from ..meter import take_elsewhere
from ..wire import MIB, BlockingWire, End, System

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..stage import Player, Stage
    from ..wire import Traffic

PORT: Final = 47_130
_KEY: Final = "bench/there"
_BACK: Final = "bench/back"
_LIMIT_S: Final = 20
#: For messages on their way.
POOL_BYTES: Final = 64 * MIB


class ZenohWire(BlockingWire):
    """Sessions that find nobody but each other; the far ones listen."""

    warm_s = 0.3

    def __init__(self, stage: Stage, traffic: Traffic, link: str, shares: bool = False) -> None:
        """Choose places, and make certificates where the link has them."""
        import zenoh

        super().__init__(stage, traffic)
        self._zenoh = zenoh
        self._link, self._shares = link, shares
        self._tls: dict[str, str] = {}
        if link in ("tls", "quic"):
            made = certify(stage.folder, stage.address("sink"))
            self._tls = {
                "root_ca_certificate": made.authority,
                "listen_certificate": made.certificate,
                "listen_private_key": made.key,
            }

    def _place(self, role: str) -> str:
        number = int(role.removeprefix("sink")) if role.startswith("sink") else 0
        if self._link == "unixsock-stream":
            return f"{self._link}/{self.stage.folder}/{number}"
        return f"{self._link}/{self.stage.address('sink')}:{PORT + number}"

    @contextlib.contextmanager
    def session(self, role: str) -> Iterator[Any]:
        """Return a session that listens, or is connected to all that do."""
        settings: dict[str, Any] = {
            "mode": "peer",
            "scouting/multicast/enabled": False,
            "scouting/gossip/enabled": False,
            "transport/shared_memory/enabled": self._shares,
            "transport/link/tls": self._tls,
        }
        if role in ("ping", "source"):
            names = [f"sink{number}" for number in range(self.traffic.readers)]
            settings["connect/endpoints"] = [self._place(name) for name in names]
            settings["listen/endpoints"] = []
        else:
            settings["listen/endpoints"] = [self._place(role)]
        config = self._zenoh.Config()
        for key, value in settings.items():
            config.insert_json5(key, json.dumps(value))
        with self._zenoh.open(config) as session:
            yield session

    def publisher(self, session: Any, key: str) -> Any:
        """Return a publisher that waits for room, as the project's own figures are taken."""
        control = self._zenoh.CongestionControl.BLOCK
        return session.declare_publisher(key, congestion_control=control)

    def await_readers(self, session: Any, made: Any) -> None:
        """Wait until all readers are known to a publisher."""
        end = time.monotonic() + _LIMIT_S
        while not (
            len(session.info.peers_zid()) >= self.traffic.readers and made.matching_status.matching
        ):
            if time.monotonic() > end:
                raise TimeoutError("zenoh: the readers are not found")
            time.sleep(0.005)

    @contextlib.contextmanager
    def end(self, role: str, player: Player) -> Iterator[End]:
        """Return an end."""
        with self.session(role) as session:
            if role == "echo":
                heard = session.declare_subscriber(_KEY)
                made = self.publisher(session, _BACK)
            else:
                heard = session.declare_subscriber(_BACK) if role == "ping" else None
                made = self.publisher(session, _KEY)
                self.await_readers(session, made)
            pool = None
            if self._shares:
                # What a message needs is rounded up, and garbage is collected when room is short.
                pool = self._zenoh.shm.ShmProvider.default_backend(POOL_BYTES)
            yield ZenohEnd(self._zenoh, made, heard, pool, self.traffic.size)

    def sink(self, player: Player, number: int) -> None:
        """Count in a callback, as the project's own figures are taken."""
        count = 0

        def take(sample: Any) -> None:
            nonlocal count
            sample.payload.to_bytes()
            count += 1

        def borrow(sample: Any) -> None:
            nonlocal count
            assert sample.payload
            count += 1

        # There is no view of a received buffer: who does not want a copy can only look at its size.
        listener = borrow if self.traffic.mode == "loan" else take
        with self.session(f"sink{number}") as session:
            heard = session.declare_subscriber(_KEY, listener)
            cue = player.ready()
            take_elsewhere(cue, lambda: count)
            del heard


class ZenohEnd(End):
    """A publisher and a subscriber."""

    def __init__(self, zenoh: Any, made: Any, heard: Any, pool: Any, size: int) -> None:
        """Publish from a pool of shared memory if there is one."""
        self._made, self._heard, self._pool, self._size = made, heard, pool, size
        self.send, self.receive = made.put, self._receive
        if pool is not None:
            self._policy = zenoh.shm.BlockOn(zenoh.shm.GarbageCollect())
            self.send = self._put_in_place

    def _put_in_place(self, body: bytes) -> None:
        room = self._pool.alloc(self._size, policy=self._policy)
        room[:] = body
        self._made.put(room)

    def _receive(self) -> Any:
        return self._heard.recv().payload.to_bytes()


def _system(name: str, link: str, shares: bool = False) -> System:
    make = partial(ZenohWire, link=link, shares=shares)
    needs = ("zenoh", "cryptography") if link in ("tls", "quic") else ("zenoh",)
    return System(f"zenoh {name}", make, needs)


UNIX: Final = _system("unix", "unixsock-stream")
TCP: Final = _system("tcp", "tcp")
SHM: Final = _system("shm", "tcp", shares=True)
TLS: Final = _system("tls", "tls")
QUIC: Final = _system("quic", "quic")
