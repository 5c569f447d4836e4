"""Real processes of a cluster die under traffic: the master, an agent, a member; a node is out.

Cases 14, 22, 32, 35, and 3 across nodes. Applications are members in the process of the test.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from tests.cases.actors import Fleet, Stage
from tests.cases.conftest import check_times
from tests.cluster.region import CARRIERS, MASTER, PATIENCE_S
from tests.cluster.traffic import PATH, PAUSE_S, square, talk
from tests.figures import IS_FULL, note

import afbus
import afbus.link.quic
import afbus.node.membership  # so that none of a hundred forked processes has to
from afbus import Event, Gap
from afbus.cli.node import join as join_command
from afbus.master.journal import read_audit
from afbus.node.place import MASTER_PORT
from afbus.proto.errors import Denied, LinkError
from afbus.proto.operation import ClusterOp

if TYPE_CHECKING:
    from tests.cluster.region import Region

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.parametrize("carrier", CARRIERS, indirect=True, scope="session"),
]

#: How long the master stays away; in the list of cases a minute.
AWAY_S: Final = 60.0 if IS_FULL else 5.0
#: Processes that want to be a node by one token, all at once.
JOINS: Final = 100 if IS_FULL else 30
#: Members that are killed one after the other.
KILLS: Final = 30 if IS_FULL else 5


async def test_case22_d16_traffic_goes_on_without_the_master(region: Region) -> None:
    """Killed and away for a minute: nothing is lost or repeated, on a node and between nodes."""
    async with (
        square(region.door("gamma")),
        talk(region, "alpha", "beta") as there,
        talk(region, "beta", "alpha") as back,
        talk(region, "alpha", "alpha") as local,
    ):
        talks = (there, back, local)
        for one in talks:
            await one.until(50)
        region.kill(MASTER)
        killed = time.monotonic()
        await asyncio.to_thread(region.until, lambda: region.status("alpha")["master"] == "lost")
        lost_s = time.monotonic() - killed
        await asyncio.sleep(killed + AWAY_S - time.monotonic())  # lasts: the outage
        away_s = region.status("beta")["away_ms"] / 1000
        assert 0 < away_s <= time.monotonic() - killed, "status says since when"
        await asyncio.to_thread(region.start, MASTER)
        synced_s = await asyncio.to_thread(region.until, region.is_whole)
        async with talk(region, "gamma", "beta") as late:
            await late.until(10)
            await late.finish()
            late.check_whole()
        for one in talks:
            await one.finish()
        await asyncio.to_thread(region.until, region.is_quiet)
        for one in talks:
            one.check_whole()
    total = sum(one.unicasts.tried + one.multicasts.tried for one in talks)
    longest_s = max(one.silence_s for one in talks)
    note(
        f"away for {AWAY_S:g} s: {total} messages, 0 lost, 0 repeated, longest silence "
        f"{1000 * longest_s:.0f} ms; lost is told after {lost_s:.1f} s; all nodes are back "
        f"{synced_s:.2f} s after it is, bar 3 s"
    )


async def test_case14_d21_an_agent_is_killed_under_traffic(region: Region) -> None:
    """Its clients come back; what others sent to it was heard once, or is told; others go on.

    What it had taken for other nodes and they have not confirmed is lost with it. Who had sent it
    is told, but not by numbers, so these are a figure here.
    """
    async with (
        square(region.door("gamma")),
        talk(region, "alpha", "gamma") as others,
        talk(region, "alpha", "beta") as there,
        talk(region, "beta", "alpha") as back,
    ):
        for one in (others, there, back):
            await one.until(50)
        region.kill("beta")
        killed = time.monotonic()
        await asyncio.to_thread(region.start, "beta")
        started_s = time.monotonic() - killed
        await there.until(50)
        await back.until(50)
        resumed_s = time.monotonic() - killed - started_s
        for one in (others, there, back):
            await one.finish()
        await asyncio.to_thread(region.until, region.is_quiet)
        others.check_whole()
        there.check_sane()
        back.check_sane()
    note(
        f"clients go on {resumed_s:.2f} s after its start; to it: {there.unicasts}; "
        f"from it: {back.unicasts}"
    )


async def test_case35_a_revoked_node_is_out_within_a_second(region: Region) -> None:
    """Its live links are cut everywhere, and nothing of it is heard after that."""
    async with (
        square(region.door("alpha")),
        talk(region, "alpha", "beta") as others,
        talk(region, "alpha", "gamma") as there,
        talk(region, "gamma", "beta") as back,
    ):
        for one in (others, there, back):
            await one.until(50)
        took_s = await asyncio.to_thread(region.revoke, "gamma")
        nodes = [row["node"] for row in region.status("beta")["peers"]]
        assert nodes == ["alpha"]
        # What lay in the listener's ring is read; then there is nothing any more.
        heard = -1
        async with asyncio.timeout(PATIENCE_S):
            while heard != (heard := len(back.unicasts.heard) + len(back.multicasts.heard)):
                await others.until(50)
        last_s = max(back.unicasts.heard_at[-1], back.multicasts.heard_at[-1]) - region.revoked_at
        await others.finish()
        others.check_whole()
        there.check_sane()
        back.check_sane()
        await asyncio.to_thread(region.join_again, "gamma")
    note(
        f"the command took {took_s:.2f} s, the last message of the node came {last_s:.2f} s after "
        f"its begin, bar 1 s"
    )


async def speak_for_ever(place: str, number: int) -> None:
    """Be a member that publishes its number again and again."""
    async with afbus.join(PATH, node=place) as member:
        while True:
            await member.publish("square.noise", b"%d" % number)
            await asyncio.sleep(PAUSE_S)  # lasts: the pace of the sender


def make_noise(stage: Stage, number: int) -> None:
    """Play that role."""
    asyncio.run(speak_for_ever(stage.place, number))


async def hear_noise(feed: afbus.Subscription, number: int) -> bytes:
    """Return the unique address of the member with a number; others are passed over."""
    async for item in feed:
        if not isinstance(item, Gap) and item.body == b"%d" % number:
            return item.source.address
    raise AssertionError("the feed has ended")


async def test_case32_d15_a_killed_member_is_told_to_other_nodes(region: Region) -> None:
    """Once to each who watches, with its address, within half a second."""
    times: list[float] = []
    with Fleet(region.door("gamma")) as fleet:
        async with (
            square(region.door("alpha")) as bus,
            afbus.join(PATH, node=region.door("beta")) as member,
            member.subscribe("square.noise") as feed,
            asyncio.timeout(PATIENCE_S),
        ):
            watched = (await member.notices().start(), bus.notices())
            for number in range(KILLS):
                actor = fleet.start(make_noise, number=number)
                address = await hear_noise(feed, number)
                actor.kill()
                began = time.monotonic()
                for notices in watched:
                    while (notice := await anext(notices)).event is not Event.KILLED:
                        assert notice.event is Event.JOINED
                    times.append(time.monotonic() - began)
                    assert address in notice.subject
    check_times("notice on two other nodes", times, 0.5)


def join_at_once(stage: Stage, number: int, token: str, master: str, folder: str) -> None:
    """Try to become a node when the test says so; tell what came of it."""
    stage.tell("ready")
    stage.hear()
    token_file = Path(folder, f"token{number}")
    token_file.write_text(token)
    options = ["--token-file", str(token_file), "--name", f"n{number}", "--state"]
    is_answered = False
    while not is_answered:
        try:
            join_command([*options, f"{folder}/n{number}", master], standalone_mode=False)
        except LinkError:
            # So many at once may be too much for 10 s; whoever has a token may ask again.
            continue
        except Denied:
            stage.tell("refused")
        else:
            stage.tell("joined")
        is_answered = True


def test_case38_of_processes_with_one_token_one_wins(region: Region, tmp_path: Path) -> None:
    """All at once, over QUIC; the others are refused, each noted in the audit."""
    token = region.token()
    prefix = tuple(region.network.command("gamma", []))
    master, folder = f"{region.network.address(MASTER)}:{MASTER_PORT}", str(tmp_path)
    with Fleet(region.door("gamma"), prefix) as fleet:
        actors = [
            fleet.start(join_at_once, number=number, token=token, master=master, folder=folder)
            for number in range(JOINS)
        ]
        for actor in actors:
            assert actor.hear() == "ready"
        began = time.monotonic()
        for actor in actors:
            actor.tell("go")
        said = [actor.hear() for actor in actors]
        took_s = time.monotonic() - began
    assert sorted(said) == ["joined"] + ["refused"] * (JOINS - 1)
    assert len(list(tmp_path.glob("n*/member.json"))) == 1
    audit = [one for _, one in read_audit(region.directory.journal) if one.action == "enrol"]
    assert [one.is_done for one in audit[-JOINS:]].count(True) == 1
    note(f"{JOINS} processes, 1 winner, all others refused in {took_s:.1f} s")
    region.ask(ClusterOp.REVOKE, subject=f"node/n{said.index('joined')}", reason="a drill")
