"""A policy that is changed while a cluster runs: a master and two agents, each a process."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from cluster import Town, town
from network import Network

import afbus
from afbus import Denied, Event

if TYPE_CHECKING:
    from afbus import Member

NODES = ("alpha", "beta")
JOINING = """
[[rule]]
name = "joining"
who = ["uid/*@*"]
bus = ["/demo"]
bind = true
own = ["**"]
receive = ["topic:**"]
send = ["hall"]
"""
TALKING = """
[[rule]]
name = "talking"
who = ["uid/*@*"]
bus = ["/demo"]
send = ["shop.*", "topic:news"]
"""


async def begin(here: Town) -> Any:
    """Make the cluster; return its master's process."""
    await here.do("master", "master", "init", "--state", str(here.folder / "master"), "demo")
    (here.folder / "policy.toml").write_text(JOINING + TALKING)
    master = await here.run_master()
    for host in NODES:
        await here.join(host)
    return master.process


async def audit(here: Town) -> list[dict[str, Any]]:
    """Return what the master has written down."""
    options = ("--state", str(here.folder / "master"), "--json")
    said = await here.do("master", "master", "audit", *options)
    return [json.loads(line) for line in said.splitlines()]


async def revoked(member: Member) -> tuple[str, object]:
    """Wait until a member is told that it has lost something; return what."""
    async for notice in member.notices(others=False):
        if notice.event is Event.REVOKED:
            ((what, value),) = notice.detail.items()
            return what, value
    raise AssertionError("the bus was left")


async def may_send(sender: Member, receiver: str) -> bool:
    """Send a message, and tell whether it went."""
    try:
        await sender.send(receiver, b"good day")
    except Denied:
        return False
    return True


@pytest.mark.cluster
async def test_d15_a_new_policy_is_in_force_on_every_node() -> None:
    """What members may do between nodes is taken by SIGHUP, told and written down, and given."""
    with Network(("master", *NODES)) as network:
        async with asyncio.timeout(120), town(network) as here, AsyncExitStack() as stack:
            master = await begin(here)
            doors = [here.folder / host / "node.sock" for host in NODES]
            hall = afbus.create("/demo", "hall", scope="cluster", node=doors[0])
            await stack.enter_async_context(hall)
            one, other = [
                await stack.enter_async_context(afbus.join("/demo", name=f"shop.{n}", node=door))
                for n, door in enumerate(doors)
            ]
            for sender, receiver in ((one, "shop.1"), (other, "shop.0")):
                await sender.send(receiver, b"good day")
                await sender.publish("news", b"open")
            assert (await anext(one.messages())).body == b"good day"
            assert (await anext(other.messages())).body == b"good day"

            (here.folder / "policy.toml").write_text(JOINING)
            master.send_signal(signal.SIGHUP)
            for member in (one, other):
                # Rights and addresses are asked for at a time, and answered in any order.
                lost = {await revoked(member) for _ in range(2)}
                assert lost == {("send", "news"), ("reach", "shop.*")}
            for sender, receiver in ((one, "shop.1"), (other, "shop.0")):
                with pytest.raises(Denied, match=r"policy of the cluster .* /demo:shop"):
                    await sender.send(receiver, b"good night")
                with pytest.raises(Denied):
                    await sender.publish("news", b"closed")
            rows = [row for row in await audit(here) if row["action"] == "send"]
            assert {row["actor"].partition("@")[2] for row in rows} == set(NODES)

            (here.folder / "policy.toml").write_text(JOINING + TALKING)
            master.send_signal(signal.SIGHUP)
            for sender, receiver in ((one, "shop.1"), (other, "shop.0")):
                # Nobody is told that more is allowed; each look takes the time of a command.
                while not await may_send(sender, receiver):
                    await audit(here)
                await sender.publish("news", b"open")
