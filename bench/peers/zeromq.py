"""pyzmq: over ipc, over TCP, and over TCP with CURVE."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..wire import KIB, BlockingWire, End, System

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..stage import Player, Stage
    from ..wire import Traffic

PORT: Final = 47_120
#: From this size on pyzmq hands over buffers instead of copies (zmq.COPY_THRESHOLD).
UNCOPIED_BYTES: Final = 64 * KIB
#: Messages that a socket queues; the default, 1,000, costs small ones a third of their rate.
QUEUE: Final = 100_000


class ZmqWire(BlockingWire):
    """PAIR for round trips, PUSH and PULL for one way, XPUB that waits and SUB for many readers."""

    warm_s = 0.2

    def __init__(self, stage: Stage, traffic: Traffic, transport: str) -> None:
        """Choose a place and, for CURVE, keys; the near end binds."""
        import zmq

        super().__init__(stage, traffic)
        self._zmq = zmq
        if transport == "ipc":
            self._place = f"ipc://{stage.folder}/socket"
        else:
            self._place = f"tcp://{stage.address('source')}:{PORT}"
        self._keys = [zmq.curve_keypair() for _ in range(2)] if transport == "curve" else []

    @contextlib.contextmanager
    def end(self, role: str, player: Player) -> Iterator[End]:
        """Return an end."""
        zmq = self._zmq
        is_near = role in ("ping", "source")
        if role in ("ping", "echo"):
            kind = zmq.PAIR
        elif self.traffic.readers > 1:
            kind = zmq.XPUB if is_near else zmq.SUB
        else:
            kind = zmq.PUSH if is_near else zmq.PULL
        with zmq.Context() as context, context.socket(kind) as made:
            made.linger = 0
            made.sndhwm = made.rcvhwm = QUEUE if self.traffic.size < KIB else 1_000
            self._secure(made, is_near)
            if kind == zmq.XPUB:
                # It waits where PUB drops, and each subscription arrives as a message.
                made.xpub_nodrop = made.xpub_verbose = True
            if is_near:
                made.bind(self._place)
            else:
                made.connect(self._place)
            if kind == zmq.XPUB:
                for _ in range(self.traffic.readers):
                    made.recv()
            elif kind == zmq.SUB:
                made.subscribe(b"")
            yield ZmqEnd(made, self.traffic.size)

    def _secure(self, made: Any, is_near: bool) -> None:
        if not self._keys:
            return
        (server_key, _), _ = self._keys
        made.curve_publickey, made.curve_secretkey = self._keys[0 if is_near else 1]
        if is_near:
            made.curve_server = True
        else:
            made.curve_serverkey = server_key


class ZmqEnd(End):
    """A socket."""

    def __init__(self, made: Any, size: int) -> None:
        """Copy small messages, and hand over large ones."""
        self.send, self.receive = made.send, made.recv
        if size >= UNCOPIED_BYTES:
            self.send = partial(made.send, copy=False)
            self.receive = partial(made.recv, copy=False)


def _system(transport: str) -> System:
    return System(f"pyzmq {transport}", partial(ZmqWire, transport=transport), ("zmq",))


IPC: Final = _system("ipc")
TCP: Final = _system("tcp")
CURVE: Final = _system("curve")
