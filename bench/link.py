"""A link of nodes by itself: one destination, no agents."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, Final

from afbus.link.carrier import Member
from afbus.link.effect import Down, Message, Room
from afbus.link.frame import Channel
from afbus.link.quic import QuicCarrier
from afbus.node.membership import utc_now

from .meter import watch
from .ours import ClusterBus
from .wire import System, Wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from afbus.link.effect import Event
    from afbus.link.link import Link

    from .stage import Player, Stage
    from .wire import Traffic

PORT: Final = 47_112


class LinkWire(Wire):
    """One way only."""

    warm_s = 0.4

    def __init__(self, stage: Stage, traffic: Traffic) -> None:
        """Have a cluster, for its certificates."""
        super().__init__(stage, traffic)
        self._cluster = stage.keep(ClusterBus)

    def _member(self, role: str, accept: Callable[[Link], Any]) -> Member:
        own = self._cluster.membership(role)
        return Member(own.credentials, own.authority, os.urandom(16), accept, utc_now)

    def echo(self, player: Player) -> None:
        """Not measured."""
        raise NotImplementedError

    def ping(self, player: Player) -> float:
        """Not measured."""
        raise NotImplementedError

    def sink(self, player: Player, number: int) -> None:
        """Count messages, and give credit at once."""

        async def run() -> None:
            count = 0
            begun = asyncio.Event()

            def accept(link: Link) -> Callable[[Event], None]:
                def take(event: Event) -> None:
                    nonlocal count
                    if isinstance(event, Message):
                        link.release(event.channel, event.destination, event.cost)
                        count += 1
                        begun.set()

                return take

            carrier = QuicCarrier(self._member("sink", accept), self.stage.address("sink"), PORT)
            player.tell_ready()
            await begun.wait()
            await watch(player.await_cue(), lambda: count)
            carrier.close()

        asyncio.run(run())

    def source(self, player: Player) -> None:
        """Send whenever there is room; begins before the window does, to be connected by then."""

        async def run() -> None:
            ended = asyncio.Event()
            body = bytes(self.traffic.size)

            def accept(link: Link) -> Callable[[Event], None]:
                def take(event: Event | None = None) -> None:
                    if isinstance(event, Down):
                        ended.set()
                    elif event is None or isinstance(event, Room):
                        while link.send(Channel.DATA, 0, body):
                            pass

                asyncio.get_running_loop().call_soon(take)
                return take

            carrier = QuicCarrier(self._member("source", accept), self.stage.address("source"))
            place = (self.stage.address("sink"), PORT)
            await carrier.connect(place, self._cluster.membership("sink").identity)
            player.tell_ready()
            await ended.wait()

        asyncio.run(run())


LINK: Final = System("afbus", LinkWire)
