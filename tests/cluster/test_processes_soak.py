"""Fifty endpoints on three nodes talk while agents and the master are killed at random (case 46).

A short version of what the list of cases wants for a day: AFBUS_TEST_FULL makes it 20 minutes.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import pytest
from tests.cluster.region import MASTER, NODES, memory_kib
from tests.cluster.traffic import Talk, square, talk
from tests.cluster.weather import BLACK
from tests.figures import IS_FULL, note

if TYPE_CHECKING:
    from tests.cluster.region import Region

#: How long it takes, and how long it is between two misfortunes, in seconds.
SOAK_S: Final = 1200.0 if IS_FULL else 8.0
EACH_S: Final = 10.0 if IS_FULL else 4.0
#: Pairs of endpoints; each tells a unicast and a multicast after each pause.
TALKS: Final = 25 if IS_FULL else 9
PAUSE_S: Final = 0.05
#: The node whose agent lives on: that of the bus's master, and the one whose memory is measured.
SPARED: Final = "gamma"

pytestmark = [pytest.mark.cluster, pytest.mark.slow(limit_s=SOAK_S + 300)]


class Soak:
    """What is talked, and what is done to it."""

    def __init__(self, region: Region, seed: int) -> None:
        self.region = region
        self.chance = random.Random(seed)
        self.talks: list[Talk] = []
        self.done: dict[str, int] = {}
        #: When, in seconds, and the memory of the spared agent, in KiB.
        self.memory: list[tuple[float, int]] = []

    async def begin(self, stack: AsyncExitStack) -> None:
        """Let all pairs talk, whatever their nodes."""
        await stack.enter_async_context(square(self.region.door(SPARED)))
        for number in range(TALKS):
            source, target = NODES[number % 3], NODES[number // 3 % 3]
            label = f"t{number}"
            one = talk(self.region, source, target, label=label, pause_s=PAUSE_S)
            self.talks.append(await stack.enter_async_context(one))

    async def disturb(self) -> None:
        """Let something happen, and be over."""
        what = self.chance.choice(("agent", "agent", "master", "path"))
        self.done[what] = self.done.get(what, 0) + 1
        pause_s = self.chance.uniform(0.0, EACH_S / 2)
        victim = MASTER if what == "master" else self.chance.choice(NODES[:2])
        if what == "path":
            self.region.spoil(victim, SPARED, BLACK)
            await asyncio.sleep(pause_s)  # lasts: the outage
            self.region.clear()
            return
        self.region.kill(victim)
        await asyncio.sleep(pause_s)  # lasts: the outage
        await asyncio.to_thread(self.region.start, victim)

    async def go_on(self) -> None:
        """Let things happen until it is enough."""
        began = time.monotonic()
        while time.monotonic() - began < SOAK_S:
            pid = self.region.daemons[SPARED].pid
            self.memory.append((time.monotonic() - began, memory_kib(pid)))
            async with asyncio.TaskGroup() as group:
                group.create_task(self.disturb())
                await asyncio.sleep(EACH_S)  # lasts: the round

    @property
    def slope_kib(self) -> float:
        """By how much the memory of the spared agent grows in an hour, in KiB: least squares."""
        half = self.memory[len(self.memory) // 2 :]
        at_s = sum(when for when, _ in half) / len(half)
        mean = sum(kib for _, kib in half) / len(half)
        above = sum((when - at_s) * (kib - mean) for when, kib in half)
        return 3600 * above / max(1e-9, sum((when - at_s) ** 2 for when, _ in half))


async def test_case46_soak(region: Region) -> None:
    """Nothing is heard twice or in another order, nothing is lost without a word.

    How much agents that were killed take along is a figure: it is told, but not by numbers. So is
    the memory of an agent that lives on, of use in the long version only.
    """
    soak = Soak(region, 46)
    async with AsyncExitStack() as stack:
        await soak.begin(stack)
        await soak.go_on()
        for one in soak.talks:
            await one.finish()
        await asyncio.to_thread(region.until, region.is_quiet)
        for one in soak.talks:
            one.check_sane()
    kinds = [kind for one in soak.talks for kind in (one.unicasts, one.multicasts)]
    unicasts = kinds[::2]
    note(
        f"{SOAK_S:g} s, {soak.done}: {sum(kind.tried for kind in kinds)} messages, none heard "
        f"twice; of {sum(one.tried for one in unicasts)} unicasts "
        f"{sum(len(one.refused) for one in unicasts)} were refused, "
        f"{sum(one.unread + one.unknown for one in unicasts)} told as unread or unknown, "
        f"{sum(one.untold for one in unicasts)} lost with the agents that had taken them; memory "
        f"of the agent that lived on {soak.memory[0][1]} to {soak.memory[-1][1]} KiB, in the "
        f"second half {soak.slope_kib:+.0f} KiB/h (bar 1024)"
    )
