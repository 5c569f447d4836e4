"""A node with a real link: speaks to a master over any carrier, and keeps a mirror."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from afbus.link.carrier import Carrier, Member
from afbus.link.certificate import Authority
from afbus.link.credentials import Credentials
from afbus.link.effect import Down, Message, Room
from afbus.link.frame import Channel
from afbus.link.identity import Identity, Role
from afbus.link.quic import enrol
from afbus.link.settings import Settings
from afbus.master.issuer import make_key, make_request
from afbus.proto import cluster
from afbus.proto.cluster import (
    ClusterCall,
    ClusterHello,
    ClusterWelcome,
    Part,
    TableDelta,
    Withdrawn,
)
from afbus.proto.frames import Result
from afbus.proto.mirror import Mirror
from afbus.proto.operation import ClusterOp
from afbus.proto.token import JoinToken

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography import x509

    from afbus.link.effect import Event
    from afbus.link.link import Link
    from afbus.proto.cluster import ClusterFrame

#: How long a test waits for what must happen.
WAIT_S = 20.0


class Station:
    """One node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mirror = Mirror()
        self.link: Link | None = None
        self.results: dict[int, Result] = {}
        self.withdrawn: list[Withdrawn] = []
        self.welcome: ClusterWelcome | None = None
        self.down: Down | None = None
        self.serial = 0
        self.carrier: Carrier
        #: Whether what comes is read.
        self.reads = True
        self.credentials: Credentials | None = None
        self.root: x509.Certificate
        self._waiting: list[bytes] = []
        self._happened: asyncio.Event | None = None

    def make_member(self, boot: bytes, settings: Settings | None = None) -> Member:
        """Return who the node is, to its carrier; it has its certificate by then."""
        return Member(
            self.credentials,
            Authority("demo", (self.root,)),
            boot,
            self.accept,
            lambda: datetime.now(UTC),
            settings=settings or Settings(),
        )

    def accept(self, link: Link) -> Callable[[Event], None]:
        """Begin with a link: say HELLO."""
        self.link, self.down = link, None
        self._waiting.clear()
        self.say(ClusterHello(self.name, self.mirror.epoch, self.mirror.version))
        return lambda event: self.handle_event(link, event)

    def say(self, frame: ClusterFrame) -> None:
        """Send a frame, or keep it until there is room."""
        self.send(cluster.encode(frame))

    def send(self, data: bytes) -> None:
        """Send bytes, or keep them until there is room."""
        assert self.link is not None
        if self._waiting or not self.link.send(Channel.TABLES, 0, data):
            self._waiting.append(data)

    def call(self, op: ClusterOp, /, **args: Any) -> int:
        """Ask for something; return the number of the call."""
        self.serial += 1
        self.say(ClusterCall(self.serial, op, args))
        return self.serial

    def handle_event(self, link: Link, event: Event) -> None:
        """Follow what happens on the link of now; an older one may end later."""
        if link is not self.link:
            return
        match event:
            case Message(channel, destination, data, cost) if self.reads:
                self.receive(cluster.decode(data))
                if self.link is not None:
                    self.link.release(channel, destination, cost)
            case Room():
                while self._waiting and self.link is not None:
                    if not self.link.send(Channel.TABLES, 0, self._waiting[0]):
                        break
                    self._waiting.pop(0)
            case Down():
                self.link, self.down = None, event
        if self._happened is not None:
            self._happened.set()

    def receive(self, frame: ClusterFrame) -> None:
        """Follow a frame."""
        match frame:
            case ClusterWelcome():
                self.welcome = frame
                self.mirror.receive_welcome(frame.epoch, frame.is_same)
            case Part() | TableDelta():
                reply = self.mirror.receive_table(frame, 0.0)
                if reply is not None:
                    self.say(reply)
            case Result():
                self.results[frame.serial] = frame
            case Withdrawn():
                self.withdrawn.append(frame)
            case _:
                raise AssertionError(f"the master says {frame}")

    # --- with an event loop ---

    async def enrol(self, address: tuple[str, int], token: str) -> Result:
        """Ask for a certificate; have it, if it was granted."""
        key = make_key()
        args = {"token": token, "name": self.name, "csr": make_request(key)}
        data = cluster.encode(ClusterCall(1, ClusterOp.ENROL, args))
        root = JoinToken.parse(token).root
        enrolled = await enrol(address, root, data, lambda: datetime.now(UTC))
        assert enrolled.master == Identity("demo", Role.MASTER, "master")
        result = cluster.decode(enrolled.answer)
        assert isinstance(result, Result)
        if result.is_ok:
            self.credentials = Credentials(tuple(result.value["chain"]), key)
            self.root = enrolled.root
        return result

    async def until(self, holds: Callable[[], object]) -> None:
        """Wait until something holds; it is looked at whenever something happens here."""
        self._happened = asyncio.Event()
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await self._happened.wait()
                self._happened.clear()

    async def ask(self, op: ClusterOp, /, **args: Any) -> Result:
        """Ask for something; return the result."""
        serial = self.call(op, **args)
        await self.until(lambda: serial in self.results or self.down)
        assert serial in self.results, f"{op.name} has no result: {self.down}"
        return self.results.pop(serial)

    async def do(self, op: ClusterOp, /, **args: Any) -> Any:
        """Ask for something that is granted; return the value."""
        result = await self.ask(op, **args)
        assert result.is_ok, result
        return result.value

    async def join(self, *endpoints: int) -> None:
        """State nothing but endpoints, and be live."""
        await self.do(ClusterOp.RESTATE)
        for number in endpoints:
            await self.do(ClusterOp.ENTER, endpoint=number, uid=1000)
        await self.do(ClusterOp.RESTATED)
