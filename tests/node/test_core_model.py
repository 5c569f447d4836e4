"""The core under random calls, beside a model that knows only who has what."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from afbus.proto.address import BusAddress
from afbus.proto.control import (
    Grant,
    GrantFlags,
    Match,
    MulticastMatch,
    OwnedAddr,
    RevokeAddr,
    RevokeMatch,
)
from afbus.proto.errors import BusError
from afbus.proto.frames import Hello, Op
from afbus.proto.notice import Event, Notice
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.node.conftest import Client, World

    from afbus.proto.control import Item

PATH = b"/tmp/test"
MASTER = b"org.example.bus"
ADDRESSES = st.sampled_from([b"1.1", b"1.2", b"1.3", b"2.1", b"a", b"b", b"c"])
TOPICS = st.sampled_from(["x", "x.y", "z"]).map(Terms.of)


@dataclass
class _Draft:
    """What an endpoint would have after some items."""

    owned: list[bytes]
    matches: set[Terms]
    spent: set[bytes]
    is_watching: bool
    items: list[Item] = field(default_factory=list)
    lost: list[tuple[Event, tuple[bytes, ...]]] = field(default_factory=list)
    is_right: bool = True

    def change_address(self, step: str, value: bytes, others: set[bytes]) -> None:
        address = BusAddress(PATH, value)
        if step == "disown":
            self.items.append(RevokeAddr(address))
            self.is_right &= value in self.owned
            self.owned = [one for one in self.owned if one != value]
            self.lost.append((Event.REVOKED, (value,)))
            return
        self.items.append(OwnedAddr(address))
        if value not in self.owned:
            self.is_right &= value not in others and value not in self.spent
            self.owned.append(value)
            if address.is_unique:
                self.spent.add(value)

    def change_match(self, step: str, value: Terms) -> None:
        if step == "hear":
            self.items.append(MulticastMatch(Match(PATH, value)))
            self.matches.add(value)
            return
        self.items.append(RevokeMatch(PATH, value))
        self.is_right &= value in self.matches
        self.matches.discard(value)
        self.lost.append((Event.REVOKED, ()))


class _Buses(RuleBasedStateMachine):
    """One bus, whose master grants and revokes; clients come, go, are killed, and come back."""

    def __init__(self, make_world: Callable[[], World]) -> None:
        super().__init__()
        self.world = make_world()
        self.master_uid = 0
        self.clients: dict[int, Client] = {}
        self.master: Client | None = None
        self.on_bus: set[int] = set()
        self.owned: dict[int, list[bytes]] = defaultdict(list)
        self.matches: dict[int, set[Terms]] = defaultdict(set)
        self.watching: set[int] = set()
        self.spent: set[bytes] = set()
        #: What each endpoint must have been told, in its order.
        self.told: dict[int, list[tuple[Event, tuple[bytes, ...]]]] = defaultdict(list)

    # --- the model ---

    def tell_watchers(self, event: Event, subject: tuple[bytes, ...], but: int) -> None:
        for number in self.on_bus:
            is_master = self.master is not None and self.master.number == number
            if number != but and (is_master or number in self.watching):
                self.told[number].append((event, subject))

    def forget(self, client: Client, event: Event) -> None:
        number = client.number
        del self.clients[number]
        subject = tuple(self.owned.pop(number, []))
        self.matches.pop(number, None)
        self.watching.discard(number)
        self.told.pop(number, None)
        if number not in self.on_bus:
            return
        self.on_bus.discard(number)
        was_master = self.master is client
        if was_master:
            self.master = None
        if subject:
            self.tell_watchers(event, subject, number)
        if was_master:
            for other in self.on_bus:
                self.told[other].append((Event.MASTER_LOST, subject))
        if not self.on_bus:
            self.spent.clear()

    def any_client(self, pick: int) -> Client | None:
        numbers = sorted(self.clients)
        return self.clients[numbers[pick % len(numbers)]] if numbers else None

    # --- what happens ---

    @initialize()
    def begin(self) -> None:
        """A bus with a few endpoints: from there on there is something to do."""
        for _ in range(3):
            self.connect(1001)
        self.bind(0)
        self.attach(1)
        self.attach(2)

    @precondition(lambda self: len(self.clients) < 8)
    @rule(uid=st.sampled_from([1001, 1002]))
    def connect(self, uid: int) -> None:
        client = self.world.connect(uid)
        assert client.number not in self.clients
        self.clients[client.number] = client

    @rule(pick=st.integers(0, 9))
    def attach(self, pick: int) -> None:
        client = self.any_client(pick)
        if client is not None:
            assert client.ask(Op.ATTACH, path=PATH).is_ok == bool(self.on_bus)
            if self.on_bus:
                self.on_bus.add(client.number)

    @rule(pick=st.integers(0, 9))
    def bind(self, pick: int) -> None:
        client = self.any_client(pick)
        if client is None:
            return
        number = client.number
        owners = {address for owned in self.owned.values() for address in owned}
        is_same = not self.on_bus or client.credentials.uid == self.master_uid
        is_free = MASTER not in owners or MASTER in self.owned[number]
        may_bind = self.master is None and is_same and is_free
        try:
            client.bind()
        except BusError:
            assert not may_bind
            return
        assert may_bind
        for other in self.on_bus - {number}:
            self.told[other].append((Event.MASTER_BACK, (MASTER,)))
        self.master, self.master_uid = client, client.credentials.uid
        self.on_bus.add(number)
        if MASTER not in self.owned[number]:
            self.owned[number].append(MASTER)

    @precondition(lambda self: self.master is not None)
    @rule(
        is_master=st.integers(0, 9).map(bool),
        pick=st.integers(0, 9),
        steps=st.lists(
            st.one_of(
                st.tuples(st.sampled_from(["own", "own", "disown"]), ADDRESSES),
                st.tuples(st.sampled_from(["hear", "unhear"]), TOPICS),
                st.tuples(st.just("watch"), st.booleans()),
            ),
            min_size=1,
            max_size=3,
        ),
    )
    def control(self, is_master: bool, pick: int, steps: list[tuple[str, object]]) -> None:
        # Now and then somebody else than the master tries it.
        sender = self.master if is_master else self.any_client(pick)
        target = self.any_client(pick)
        assert self.master is not None
        assert sender is not None
        assert target is not None
        number = target.number
        after = self.draft(number, steps)
        is_right = sender is self.master and number in self.on_bus and after.is_right
        try:
            sender.control(target.welcome.provisional, *after.items)
        except BusError:
            assert not is_right
            return
        assert is_right
        before = self.owned[number]
        self.owned[number], self.matches[number] = after.owned, after.matches
        self.spent = after.spent
        (self.watching.add if after.is_watching else self.watching.discard)(number)
        if after.owned and not before:
            self.tell_watchers(Event.JOINED, tuple(after.owned), number)
        elif before and not after.owned:
            self.tell_watchers(Event.LEFT, tuple(before), number)
        self.told[number] += after.lost

    def draft(self, number: int, steps: list[tuple[str, object]]) -> _Draft:
        after = _Draft(
            list(self.owned[number]),
            set(self.matches[number]),
            set(self.spent),
            number in self.watching,
        )
        others = {one for key, all in self.owned.items() if key != number for one in all}
        for step, value in steps:
            if isinstance(value, bytes):
                after.change_address(step, value, others)
            elif isinstance(value, Terms):
                after.change_match(step, value)
            else:
                after.items.append(Grant(GrantFlags.NOTICES if value else GrantFlags(0)))
                if after.is_watching and not value:
                    after.lost.append((Event.REVOKED, ()))
                after.is_watching = bool(value)
        return after

    @precondition(lambda self: len(self.clients) > 3)
    @rule(pick=st.integers(0, 9), is_killed=st.booleans())
    def leave(self, pick: int, is_killed: bool) -> None:
        client = self.any_client(pick)
        if client is not None:
            if is_killed:
                client.end()
            else:
                client.call(Op.CLOSE)
            self.forget(client, Event.KILLED if is_killed else Event.LEFT)

    @rule()
    def restart(self) -> None:
        self.check_notices()
        clients, master = self.clients, self.master
        self.world.restart()
        self.clients = {}
        for number, client in clients.items():
            who = client.credentials
            again = self.world.come(who.uid, who.pid, who.start_ticks)
            again.say(Hello(resume=client.welcome.token))
            assert again.welcome.resumed
            assert again.number == number
            self.clients[number] = again
            if client is master:
                self.master = again
        # A new epoch: what nobody owns any more may be granted again (D3).
        owners = {address for owned in self.owned.values() for address in owned}
        self.spent = {address for address in owners if address[:1].isdigit()}

    # --- what must hold ---

    @invariant()
    def check_switch(self) -> None:
        """The switch knows exactly the owners and the matches of the model."""
        owners = {one: number for number, all in self.owned.items() for one in all}
        found = list(self.world.switch.buses.values())
        assert found == ([owners] if self.on_bus else [])
        matches = {(number, one.pack()) for number, all in self.matches.items() for one in all}
        known = [(one[0], one[2]) for one in self.world.switch.matches.values()]
        assert sorted(known) == sorted(matches)

    @invariant()
    def check_notices(self) -> None:
        """Everybody was told what concerns him, in order, and nothing else."""
        for number, client in self.clients.items():
            got = [(one.event, one.subject) for one in client.take() if isinstance(one, Notice)]
            assert got == self.told.pop(number, [])


def test_d3_d5_d15_d16_core_is_as_its_model(world: World) -> None:
    """Ownership, matches and notices, over masters that change and agents that begin anew."""
    machine = functools.partial(_Buses, type(world))
    run_state_machine_as_test(
        machine,  # type: ignore[arg-type]  # anything that makes a machine will do
        settings=settings(max_examples=150, stateful_step_count=50),
    )
