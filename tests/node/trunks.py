"""Two switches whose lanes are joined by hand, and clients on their rings."""

from __future__ import annotations

import contextlib
import os
import select
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from afbus._datapath import TERMS, UNICAST, Rings, Switch, sealed_memfd
from afbus.proto.control import BUS_SOCKET, SCM_GAP, SCM_SEQ, Identity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afbus._datapath import LaneEvent

KIB = 1024
KEY = bytes(range(16))
#: Number of the bus on either switch, and in the cluster.
BUS, NUMBER = 1, 77
#: Longer than anything here takes.
LIMIT_S = 20.0


def _name_source(source: bytes, is_kernel: bool) -> Any:
    return "kernel" if is_kernel else source


def _name_destination(dst: bytes, _kind: int) -> bytes:
    return dst


@dataclass(frozen=True)
class Got:
    """A message that was read, or a gap: `first`, `last`, `count`."""

    seq: int
    src: Any
    data: bytes
    gap: tuple[int, int, int] | None = None


class Client:
    """An endpoint, and the process that would hold its other end."""

    def __init__(self, node: Node, number: int, rx_bytes: int) -> None:
        self.node, self.number = node, number
        self.address = b"%d.%d" % (node.number, number)
        switch = node.switch
        identity = Identity("uid:1000", node.name, os.getpid(), os.getuid(), os.getgid())
        who = (number, 1000, os.getpid(), os.getuid(), os.getgid(), identity.encode())
        switch.add_endpoint(*who)
        tx, rx, self.line = switch.connect(number, 256 * KIB, rx_bytes)
        self.rings = Rings(tx, rx, self.line, _name_source, _name_destination)
        self.rings.set_details(True)
        os.close(tx)
        os.close(rx)
        switch.attach(number, BUS, b"@" + self.address)
        assert switch.own(number, self.address)
        switch.allow_send(number, number, b"", None)

    def send(self, dst: bytes, *body: bytes, timeout: float | None = LIMIT_S) -> int:
        """Send to one; return 0 or a negative errno."""
        return self.rings.send(UNICAST, dst, b"", body, (), 0, 0, 0, 0, timeout)

    def cast(self, topic: bytes, *body: bytes, timeout: float | None = LIMIT_S) -> int:
        """Send to whoever wants it."""
        return self.rings.send(TERMS, topic, b"", body, (), 0, 0, 0, 0, timeout)

    def read(self, count: int = 1024, timeout: float | None = 0) -> list[Got]:
        """Read what is there; without a timeout of 0, wait for the first message."""
        got = self.rings.recv(count, 1 << 20, 4096, False, timeout)
        return [_understand(*one) for one in got] if isinstance(got, list) else []

    def close(self) -> None:
        """End this side."""
        self.rings.close()
        os.close(self.line)


def _understand(data: bytes, items: Sequence[tuple[int, int, bytes]], _flags: int, src: Any) -> Got:
    values = {kind: value for level, kind, value in items if level == BUS_SOCKET}
    if SCM_GAP in values:
        first, last, count = struct.unpack("<QQQ", values[SCM_GAP][:24])
        return Got(last, src, data, (first, last, count))
    (seq,) = struct.unpack("<Q", values.get(SCM_SEQ, bytes(8)))
    return Got(seq, src, data)


@dataclass
class Node:
    """A switch; `number` is that of the node, of its block, and of its trunk at the others."""

    name: str
    number: int
    clients: list[Client] = field(default_factory=list)
    #: Lane events but those that are about batches, in their order.
    told: list[LaneEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.switch = Switch()
        self.switch.add_bus(BUS, 512, KEY, NUMBER)
        self.switch.route_block(self.number, None)

    def know(self, other: Node) -> None:
        """Know another node and its block."""
        self.switch.trunk_add(other.number, other.name)
        self.switch.trunk_carries_bodies(other.number)
        self.switch.route_block(other.number, other.number)

    def join(self, rx_bytes: int = 1024 * KIB) -> Client:
        """Return a new client, whose address is `NODE.N`, N counting from 1."""
        self.clients.append(Client(self, len(self.clients) + 1, rx_bytes))
        return self.clients[-1]

    def note(self) -> None:
        """Keep what the switch tells."""
        self.told += [event for event in self.switch.take_lane_events() if event[0] != "ready"]

    def close(self) -> None:
        """End everything."""
        for client in self.clients:
            client.close()
        self.switch.close()


class Pair:
    """Two nodes, alpha and beta."""

    def __init__(self) -> None:
        self.alpha, self.beta = Node("alpha", 1), Node("beta", 2)
        self.alpha.know(self.beta)
        self.beta.know(self.alpha)
        self._matches = 0

    def hear(self, client: Client, topic: bytes, overflow: int = 1) -> None:
        """Subscribe a client, and its node at the other one."""
        self._matches += 1
        client.node.switch.subscribe(client.number, self._matches, topic, None, overflow, 50)
        other = self.alpha if client.node is self.beta else self.beta
        trunk = client.node.number
        other.switch.trunk_subscribe(trunk, BUS, self._matches, topic, None)

    def name(self, client: Client, address: bytes) -> None:
        """Give a client a name that both nodes know."""
        assert client.node.switch.own(client.number, address)
        other = self.alpha if client.node is self.beta else self.beta
        other.switch.route(BUS, address, client.node.number)

    def carry_one(self, source: Node, most: int = 64 * KIB) -> bool:
        """Carry one batch; tell whether there was one."""
        target = self.beta if source is self.alpha else self.alpha
        batch = source.switch.take_batch(target.number, most)
        if batch:
            target.switch.inject(source.number, batch)
        return bool(batch)

    def carry(self) -> None:
        """Carry all that there is, both ways."""
        is_done = False
        while not is_done:
            # Before the batches are taken: what comes behind them is told again.
            self.alpha.note()
            self.beta.note()
            is_done = not self.carry_one(self.alpha) | self.carry_one(self.beta)

    def carry_bodies(self) -> None:
        """Carry the bodies that wait at alpha."""
        for event in [event for event in self.alpha.told if event[0] == "body"]:
            self.alpha.told.remove(event)
            _, trunk, ticket, size = event
            fd = self.alpha.switch.body_fd(trunk, ticket)
            body = sealed_memfd([os.pread(fd, size, 0)])
            self.beta.switch.body_put(self.alpha.number, ticket, body)
            self.alpha.switch.body_taken(trunk, ticket)
            os.close(fd)
            os.close(body)

    def cut(self) -> None:
        """Lose what is on its way, and go on with a new link."""
        for node, other in ((self.alpha, self.beta), (self.beta, self.alpha)):
            node.switch.trunk_rewind(other.number, other.switch.trunk_received(node.number))

    @contextlib.contextmanager
    def carried(self) -> Any:
        """Carry batches in a thread of its own meanwhile, woken by the switches' descriptors."""
        bell, ring = os.pipe()
        poll = select.poll()
        for fd in (bell, self.alpha.switch.fileno(), self.beta.switch.fileno()):
            poll.register(fd, select.POLLIN)

        def run() -> None:
            while bell not in dict(poll.poll()):
                self.carry()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            os.close(ring)
            thread.join()
            os.close(bell)

    def close(self) -> None:
        """End everything."""
        self.alpha.close()
        self.beta.close()
