"""Three nodes and a master as real processes over QUIC, while the network is bad (cases 11, 13).

Each way runs through a seeded proxy that loses, doubles, spoils and reorders datagrams, or lets
none pass. What counts: everything is heard once, in order, or it is told what became of it.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

import pytest
from tests.cluster.region import CARRIERS
from tests.cluster.traffic import PATH, square, talk
from tests.cluster.weather import BLACK, Weather
from tests.figures import IS_FULL, note

import afbus
from afbus.proto.errors import NoSuchEndpoint

if TYPE_CHECKING:
    from tests.cluster.region import Region

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.parametrize("carrier", CARRIERS, indirect=True, scope="session"),
]

#: The weathers of case 11, and how many messages of each kind pass in each direction.
WEATHERS: Final = {
    "loss1": (Weather(lost=0.01), 400),
    "loss5": (Weather(lost=0.05), 250),
    "loss30": (Weather(lost=0.3), 25),
    "doubled10": (Weather(doubled=0.1), 400),
    "spoilt5": (Weather(spoilt=0.05), 250),
    "reordered": (Weather(reordered=0.2, jitter_s=0.002), 400),
    "all": (Weather(0.02, 0.02, 0.01, 0.1, 0.002, 0.002), 200),
}
BODY_BYTES: Final = 1000
#: How many times as many with AFBUS_TEST_FULL=1.
MORE: Final = 10 if IS_FULL else 1
#: How long a path, and a node, is cut off; in the list of cases 30 s.
PATH_S: Final = 30.0 if IS_FULL else 6.0
NODE_S: Final = 30.0 if IS_FULL else 13.0


async def is_quiet(region: Region) -> None:
    """Wait until all that was sent is confirmed: nothing can come again."""
    await asyncio.to_thread(region.until, region.is_quiet)


@pytest.mark.parametrize("name", WEATHERS)
async def test_case11_d11_everything_is_heard_once_in_any_weather(
    region: Region, name: str
) -> None:
    """Unicasts and multicasts in both directions at once; how fast is a figure."""
    weather, count = WEATHERS[name]
    count *= MORE
    async with square(region.door("gamma")):
        region.spoil("alpha", "beta", weather)
        began, before = time.monotonic(), region.swallowed
        async with (
            talk(region, "alpha", "beta", count=count, pause_s=0, body_bytes=BODY_BYTES) as there,
            talk(region, "beta", "alpha", count=count, pause_s=0, body_bytes=BODY_BYTES) as back,
        ):
            await there.account()
            await back.account()
            took_s = time.monotonic() - began
            await is_quiet(region)
            there.check_whole()
            back.check_whole()
        lost = region.swallowed - before
    rate = 4 * count * BODY_BYTES / took_s / 1e6
    note(f"{4 * count} messages, 0 lost, 0 repeated; {rate:.2f} MB/s; {lost} datagrams lost")


async def test_case13_d16_a_path_that_is_cut_for_long(region: Region) -> None:
    """Between two nodes it is cut, between two others in one direction: the master relays.

    Nothing is lost or repeated, neither on the way to the relay nor on the way back from it.
    """
    async with (
        square(region.door("gamma")),
        talk(region, "alpha", "beta") as there,
        talk(region, "beta", "alpha") as back,
        talk(region, "beta", "gamma") as deaf,
        talk(region, "gamma", "beta") as heard,
    ):
        talks = (there, back, deaf, heard)
        for one in talks:
            await one.until(20)
        region.spoil("alpha", "beta", BLACK)
        region.steer("beta", "gamma", BLACK)
        began = time.monotonic()
        await asyncio.to_thread(region.until, lambda: region.link("alpha", "beta") != "open")
        noticed_s = time.monotonic() - began
        await asyncio.to_thread(region.until, lambda: region.link("gamma", "beta") != "open")
        await asyncio.to_thread(region.until, lambda: region.link("beta", "gamma") != "open")
        noticed_half_s = time.monotonic() - began
        await asyncio.sleep(began + PATH_S - time.monotonic())  # lasts: the outage
        states = [region.link("alpha", "beta"), region.link("beta", "gamma")]
        region.clear()
        healed = time.monotonic()
        for one in talks:
            await one.until(1)
        resumed_s = time.monotonic() - healed
        await asyncio.to_thread(region.until, lambda: region.link("alpha", "beta") == "open")
        await asyncio.to_thread(region.until, lambda: region.link("beta", "gamma") == "open")
        direct_s = time.monotonic() - healed
        for one in talks:
            await one.finish()
        await is_quiet(region)
        for one in talks:
            one.check_whole()
    total = sum(one.unicasts.tried + one.multicasts.tried for one in talks)
    longest_s = max(one.silence_s for one in talks)
    note(
        f"cut for {PATH_S:g} s: {total} messages, 0 lost, 0 repeated; noticed after "
        f"{noticed_s:.1f} s, one way after {noticed_half_s:.1f} s (bar 12 s); then {states}; "
        f"longest silence {longest_s:.1f} s; goes on {resumed_s:.2f} s after the heal, "
        f"direct in {direct_s:.1f} s"
    )


async def test_case13_black_hole_of_four_seconds(region: Region) -> None:
    """Between two nodes, under traffic: nothing is lost, and it goes on within 5 s."""
    async with (
        square(region.door("gamma")),
        talk(region, "alpha", "beta") as there,
        talk(region, "beta", "alpha") as back,
    ):
        await there.until(50)
        await back.until(50)
        region.spoil("alpha", "beta", BLACK)
        await asyncio.sleep(4.0)  # lasts: the outage
        region.clear()
        healed = time.monotonic()
        await there.until(1)
        await back.until(1)
        resumed_s = time.monotonic() - healed
        await there.finish()
        await back.finish()
        await is_quiet(region)
        there.check_whole()
        back.check_whole()
    note(f"{there}, 0 lost, 0 repeated; goes on {resumed_s:.2f} s after the heal, bar 5 s")


async def test_case23_d16_a_node_that_is_cut_off_from_everybody(region: Region) -> None:
    """It comes back: tables are equal, what ended meanwhile is nobody's, and nothing comes twice.

    What had been accepted for it, and by it, is heard once or told: refused, unread, unknown.
    """
    async with (
        square(region.door("alpha")),
        talk(region, "alpha", "beta") as others,
        talk(region, "alpha", "gamma") as there,
        talk(region, "gamma", "alpha") as back,
        afbus.join(PATH, node=region.door("gamma")) as asker,
    ):
        talks = (others, there, back)
        async with (
            afbus.join(PATH, name="square.gone", node=region.door("alpha")) as gone,
            afbus.join(PATH, node=region.door("gamma")) as leaver,
        ):
            await asker.send("square.gone", b"are you there")
            for one in talks:
                await one.until(20)
            region.isolate("gamma")
            began = time.monotonic()
            left = (gone.address, leaver.address)
        await asyncio.sleep(began + NODE_S - time.monotonic())  # lasts: the outage
        lost = region.link("alpha", "gamma")
        region.clear()
        whole_s = await asyncio.to_thread(region.until, region.is_whole)
        for one in talks:
            await one.until(20)
        for name in ("square.gone", *left):
            with pytest.raises(NoSuchEndpoint):
                await asker.request(name, b"are you there")
        for one in talks:
            await one.finish()
        await is_quiet(region)
        others.check_whole()
        there.check_sane()
        back.check_sane()
    note(
        f"cut off for {NODE_S:g} s, then {lost}; tables are equal {whole_s:.2f} s after the heal, "
        f"bar 2 s; to it: {there.unicasts}; from it: {back.unicasts}"
    )
