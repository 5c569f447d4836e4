"""Real processes without the cluster's master: who comes meanwhile, and what follows (D16)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tests.cluster.region import MASTER, PATIENCE_S
from tests.cluster.traffic import PATH, square

import afbus
from afbus import Event
from afbus.proto.errors import MasterLost
from afbus.proto.names import NameOutcome
from afbus.proto.operation import ClusterOp

if TYPE_CHECKING:
    from tests.cluster.region import Region

pytestmark = pytest.mark.cluster


async def hear(member: afbus.Member, event: Event) -> None:
    """Wait for a notice."""
    async for notice in member.notices(others=False):
        if notice.event is event:
            return


async def test_case22_d16_members_come_while_the_master_is_away(region: Region) -> None:
    """Who may join, as was said before, joins, hears and publishes; what needs the master waits."""
    async with (
        asyncio.timeout(PATIENCE_S),
        square(region.door("alpha")),
        afbus.join(PATH, node=region.door("beta")) as old,
        afbus.join(PATH, node=region.door("gamma")) as other,
        old.subscribe("news"),
    ):
        await old.allow("news")
        region.kill(MASTER)
        await hear(old, Event.CLUSTER_LOST)
        async with (
            afbus.join(PATH, node=region.door("beta")) as new,
            new.subscribe("news") as feed,
        ):
            await new.publish("news", b"from here")
            message = await anext(feed)
            assert isinstance(message, afbus.Message)
            assert (message.body, message.source) == (b"from here", new.address)
            inbox = new.messages()
            await other.send(new.address, b"welcome")
            assert (await anext(inbox)).body == b"welcome"
            for refused in (new.own("city.shop"), new.subscribe("weather").__aenter__()):
                with pytest.raises(MasterLost, match="the cluster's master is away"):
                    await refused
            region.start(MASTER)
            await hear(new, Event.CLUSTER_BACK)
            await asyncio.to_thread(region.until, region.is_whole)
            await new.own("city.shop")
            await other.send("city.shop", b"are you open")
            assert (await anext(inbox)).body == b"are you open"
            rows = region.ask(ClusterOp.NODES, after=None)["rows"]
            counts = {row["node"]: row["endpoints"] for row in rows}
            assert counts == {"alpha": 1, "beta": 2, "gamma": 1}


async def test_d4_names_of_a_revoked_node_pass_on(region: Region) -> None:
    """Who waits for a name gets it when its owner is out of the cluster with its node."""
    async with (
        asyncio.timeout(PATIENCE_S),
        square(region.door("alpha")) as bus,
        afbus.join(PATH, node=region.door("beta")) as heir,
        afbus.join(PATH, name="city.shop", node=region.door("gamma")) as owner,
    ):
        assert await heir.own("city.shop") is NameOutcome.IN_QUEUE
        assert {view.address for view in bus.members()} == {heir.address, owner.address}
        await asyncio.to_thread(region.revoke, "gamma")
        async for notice in bus.notices():
            if notice.event is Event.NODE_LOST:
                assert dict(notice.detail) == {"node": "gamma", "gone": 1}
                break
        assert await heir.own("city.shop") is NameOutcome.ALREADY_OWNER
        assert {view.address for view in bus.members()} == {heir.address}
    await asyncio.to_thread(region.join_again, "gamma")


def test_d3_a_spare_block_that_cannot_be_written_down_is_given_back(region: Region) -> None:
    """The log says why, and the master has the block again; the agent goes on with the other."""
    beta = region.folder / "beta"
    region.daemons["beta"].end()
    (beta / "block").unlink()
    # Where a file is written before it takes its place.
    (beta / "block.new").mkdir()
    try:
        region.start("beta")
        region.until(lambda: "cannot be written" in region.daemons["beta"].log)
        region.until(region.is_whole)
        with afbus.socket(node=region.door("beta")) as sock:
            sock.bind((b"/beta/own", b"own.hall"), scope="cluster")
        assert not (beta / "block").exists()
    finally:
        (beta / "block.new").rmdir()
        region.kill("beta")
