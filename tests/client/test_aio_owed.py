"""What a member had and cannot have again at once: it is asked for until it can (D16)."""

from __future__ import annotations

import asyncio
import select
import signal
from typing import TYPE_CHECKING

import pytest
from tests.client.host import MASTER, PATH, fails, until

import afbus
from afbus.proto import control
from afbus.proto import request as requests
from afbus.proto.address import BusAddress
from afbus.proto.control import Match, MulticastMatch, MulticastSend, OwnedAddr, ReplyTo, Serial
from afbus.proto.errors import BusError, Denied, MasterLost, NodeLost, NotConnected
from afbus.proto.names import NameOutcome
from afbus.proto.notice import Event, Notice
from afbus.proto.request import Answer, Join, Own, Publish, Request, Subscribe

if TYPE_CHECKING:
    from tests.client.conftest import NodeProcess, Porter

#: How long anything may take here, in seconds.
LIMIT_S = 60.0


class Master:
    """A master by hand, that refuses what the test wants it to."""

    def __init__(self, agent: NodeProcess | Porter) -> None:
        self._socket = afbus.Socket(node=agent.place)
        self._socket.bind(BusAddress(PATH, MASTER))
        self._socket.setblocking(False)
        #: What requests are refused by.
        self.refusals: dict[type[Request], BusError] = {}
        self.asked: list[Request] = []

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            try:
                data, ancdata, _, source = self._socket.recvmsg(4096, 4096)
            except (BlockingIOError, NotConnected, afbus.NoAgent):
                await asyncio.sleep(0)
                continue
            known = [control.decode(*one) for one in ancdata if one[0] == control.BUS_SOCKET]
            (serial,) = [one.value for one in known if isinstance(one, Serial)] or [0]
            if serial:
                self._answer(requests.decode(data), serial, source)

    def _answer(self, request: Request, serial: int, source: BusAddress) -> None:
        self.asked.append(request)
        refusal = self.refusals.get(type(request))
        answer, items = Answer(), [control.encode(ReplyTo(serial))]
        path = BusAddress.kernel(PATH).path
        if refusal is not None:
            answer = Answer.refused(refusal)
        elif isinstance(request, Join):
            items.append(control.encode(OwnedAddr(BusAddress.kernel(PATH))))
        elif isinstance(request, Own):
            answer = Answer(detail={"outcome": int(NameOutcome.PRIMARY_OWNER)})
            items.append(control.encode(OwnedAddr(BusAddress(PATH, request.name))))
        elif isinstance(request, Publish):
            items.append(control.encode(MulticastSend(path, request.what)))
        elif isinstance(request, Subscribe):
            items.append(control.encode(MulticastMatch(Match(path, request.what))))
        self._socket.sendmsg([answer.encode()], items, 0, source)

    @property
    def has_mail(self) -> bool:
        """Whether somebody has asked something."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def close(self) -> None:
        """Leave."""
        self._socket.close()


async def hear_of_loss(member: afbus.Member) -> None:
    """Wait until a member has found its agent gone, so that it sends nothing to that one."""
    await until(lambda: not member._outbox.ready.is_set())


@pytest.mark.parametrize("kind", [MasterLost, NodeLost])
async def test_d16_what_cannot_be_had_now_is_asked_for_later(
    agent: NodeProcess, kind: type[BusError]
) -> None:
    """Who has joined again talks at once, and gets its name and its feed when that is possible."""
    master = Master(agent)
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        serving = group.create_task(master.run())
        async with (
            afbus.join(PATH, name="n", node=agent.place) as member,
            member.subscribe("t") as feed,
        ):
            await member.allow("t")
            before = member.address
            agent.end(signal.SIGKILL)
            agent.forget()
            await hear_of_loss(member)
            master.refusals = {Own: kind("not now"), Subscribe: kind("not now")}
            agent.start()
            await member.publish("t", b"nobody hears this", deadline=None)
            assert member.address != before or member.addresses == (member.address,)
            assert BusAddress(PATH, "n") not in member.addresses
            count = len(master.asked)
            await until(lambda: len(master.asked) > count)
            master.refusals = {Subscribe: Denied("no more")}
            await until(lambda: BusAddress(PATH, "n") in member.addresses)
            assert isinstance(await anext(feed), afbus.Gap)
            with pytest.raises(Denied):
                await anext(feed)
            assert not member._owed
        serving.cancel()
        master.close()


async def test_d16_what_is_not_wanted_any_more_is_not_asked_for(agent: NodeProcess) -> None:
    """A name that is given up while it is owed stays given up."""
    master = Master(agent)
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        serving = group.create_task(master.run())
        async with afbus.join(PATH, name="n", node=agent.place) as member:
            agent.end(signal.SIGKILL)
            agent.forget()
            await hear_of_loss(member)
            master.refusals = {Own: MasterLost("not now"), requests.Release: MasterLost("nor this")}
            agent.start()
            with pytest.raises(MasterLost):
                await member.release("n")
            master.refusals = {}
            await until(lambda: not member._is_regaining)
            assert BusAddress(PATH, "n") not in member.addresses
        serving.cancel()
        master.close()


async def test_d16_a_master_that_dies_over_a_question_is_lost(agent: NodeProcess) -> None:
    """That it is gone is one thing, that nobody has an address another."""
    master = Master(agent)
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        serving = group.create_task(master.run())
        async with afbus.join(PATH, node=agent.place) as member:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            asking = group.create_task(fails(member.own("n"), MasterLost))
            await until(lambda: master.has_mail)
            master.close()
            assert "gone" in await asking


async def test_d15_a_revoked_name_is_no_address_any_more(porter: Porter) -> None:
    """Also when it was the cluster's master that took it, and no command of the bus's."""
    master = Master(porter)
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        serving = group.create_task(master.run())
        async with afbus.join(PATH, name="n", node=porter.place) as member:
            assert BusAddress(PATH, "n") in member.addresses
            porter.notify(Notice(Event.REVOKED, (b"n",), "the policy has changed").encode())
            notice = await anext(member.notices(others=False))
            assert notice.event is Event.REVOKED
            assert member.addresses == (member.address,)
        serving.cancel()
    master.close()
