"""The cost of a message where many want to hear of other things.

Each message is about something that none was about before, so that no way is known already, and is
for one subscription. Those of the crowd are about the same topic, and other devices.
"""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

import afbus
from afbus._datapath import TERMS
from afbus.proto.control import Item, Match, MulticastMatch, MulticastSend, OwnedAddr
from afbus.proto.terms import Terms

from .idle import agent_bytes
from .meter import take_counted
from .ours import BUS, PATH, HostBus, waiting
from .wire import BATCH, MIB

if TYPE_CHECKING:
    from .stage import Player, Stage

#: Members of the crowd; each has as many masks as the others.
MEMBERS: Final = 10
#: Masks of the one who hears the messages.
HEARD: Final = 1000
#: How long a crowd may gather; a million take 35 s of work, and longer where others work as well.
GRANT_S: Final = 300
#: Things that messages are about: more than the switch remembers ways.
DIFFERENT: Final = 20_480
#: Masks that are asked for at a time.
AT_ONCE: Final = 200
WARM_S: Final = 0.1
WINDOW_S: Final = 0.4
SIZE: Final = 64
#: The name of the one who hears the messages.
HEARER: Final = "hearer"


class Crowd(HostBus):
    """An agent, and a bus with many masks on it, that lasts as long as the hosts."""

    masks: ClassVar[int]
    # One user has all of them.
    settings = "matches_per_user = 16777216"

    def __init__(self, stage: Stage) -> None:
        """Start them, and grant the masks."""
        super().__init__(stage)
        before, began = agent_bytes(self.agents[0])[1], time.perf_counter()
        try:
            stage.cast("source", self._gather)
        except RuntimeError as error:
            text = f"{self.masks:,} masks were not granted within {GRANT_S} s"
            raise RuntimeError(text) from error
        #: Microseconds and bytes of the agent for a mask.
        self.grant_us = 1e6 * (time.perf_counter() - began) / self.masks
        self.bytes = (agent_bytes(self.agents[0])[1] - before) / self.masks

    def _gather(self, player: Player) -> NoReturn:
        """Be the crowd."""
        signal.alarm(GRANT_S)
        share = self.masks // MEMBERS
        members = [self.socket("source") for _ in range(MEMBERS)]
        for number, member in enumerate(members):
            self.grant(member, f"crowd{number}", number * share, share)
        player.announce()
        while True:
            time.sleep(3600)

    def grant(self, member: afbus.Socket, role: str, first: int, masks: int) -> None:
        """Have masks granted, with the name of the role."""
        for at in range(first, first + masks, AT_ONCE):
            self.ask(member, [role, at == first, at, min(AT_ONCE, first + masks - at)])

    def granted(self, wanted: list[Any]) -> list[Item]:
        """Return the masks that are asked for, and at first a name."""
        role, is_first, first, masks = wanted
        items: list[Item] = []
        if is_first:
            items += [OwnedAddr(afbus.BusAddress(BUS, role)), MulticastSend(PATH, Terms())]
        for number in range(first, first + masks):
            terms = about(role, number)
            match = waiting(terms) if role == HEARER else Match(PATH, terms)
            items.append(MulticastMatch(match))
        return items


class TenThousand(Crowd):
    """As many as the figure is compared with."""

    masks = 10_000


class Million(Crowd):
    """As many as the figure is about."""

    masks = 1_000_000


def about(role: str, number: int, *more: str) -> Terms:
    """Return what a mask, or a message, is about."""
    kind = "probe" if role == HEARER else "device"
    pairs = (f"{kind}={number}", "unit=celsius", *more)
    return Terms(f"plant.hall{number % 100}.sensors", pairs)


def cost(stage: Stage, crowd: type[Crowd]) -> dict[str, float]:
    """Measure microseconds that the agent works for a message, and what a mask has cost.

    The time of its CPU, not that of the clock: what others do on the machine is not of interest.
    """
    bus = stage.keep(crowd)

    def source(player: Player) -> None:
        with bus.socket("source", tx_bytes=MIB) as me:
            bus.ask(me, ["source", True, 0, 0])
            rings = me._endpoint.rings
            bodies = [bytes(SIZE)] * BATCH
            several = [
                [about(HEARER, at % HEARD, f"serial={at}").pack() for at in range(at, at + BATCH)]
                for at in range(0, DIFFERENT, BATCH)
            ]
            player.ready()
            for terms in cycle(several):
                # What no call of the socket does: many messages, each about something else.
                sent, errno = rings.send_many(TERMS, terms, b"", bodies, 0, None)
                assert (sent, errno) == (BATCH, 0)

    def sink(player: Player) -> None:
        with bus.socket("sink0", rx_bytes=MIB) as me:
            bus.grant(me, HEARER, 0, HEARD)
            cue = replace(player.ready(), pids=tuple(bus.agents))
            take_counted(cue, lambda: len(me.recvmmsg(1024, SIZE)))

    found = stage.play(
        {"sink0": sink}, {"source": source}, ("sink0",), warm_s=WARM_S, window_s=WINDOW_S
    )
    number, _, cpu_s = found["sink0"]
    taken = {"match_1m": 1e6 * cpu_s / number}
    return {**taken, "match_1m_grant": bus.grant_us, "match_1m_memory": bus.bytes}
