"""The people of a town, and what each should have: a slow model of the bus.

One of them may be the hall, the master of the bus: it lets in whoever asks, and grants what it is
told to. Whoever is asked answers. A call is answered whenever that may be, so the model takes what
it is sure of, and learns from the agent what came of calls that ended in doubt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.cluster.inspection import endpoint_of
from tests.cluster.town import MASTER, PATH, House, Town
from tests.cluster.witness import Person, Witness

from afbus.proto.address import BusAddress
from afbus.proto.control import Grant, GrantFlags, MulticastSend, OwnedAddr
from afbus.proto.errors import AddressInUse, Denied, InvalidArgument, NotOwned, ShareExceeded
from afbus.proto.frames import Op
from afbus.proto.match import what_of
from afbus.proto.record import NodeState
from afbus.proto.terms import Terms, matches

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cluster.client import Client
    from tests.cluster.witness import Letter

    from afbus.proto.control import Item
    from afbus.proto.frames import Result

NODES: Final = ("alpha", "beta", "gamma")
NAMES: Final = (b"shop", b"bank", b"inn")
TOPICS: Final = (Terms.of("x"), Terms.of("x.y"), Terms.of("z"))
#: Refusals after which nothing has changed, for sure.
PLAIN: Final = (AddressInUse, Denied, NotOwned, InvalidArgument, ShareExceeded)


class Society:
    """The people of a town."""

    def __init__(self, *, has_post: bool) -> None:
        self.town = Town(NODES, has_post=has_post)
        self.witness = Witness()
        self.hall: Person | None = None
        #: Calls without an answer: client, serial, and what is made of the answer.
        self.calls: list[tuple[Client, int, Callable[[Result], None]]] = []
        self._serial = 0

    # --- what is known ---

    @property
    def persons(self) -> list[Person]:
        """Who is there."""
        return [one for one in self.witness.persons if not one.is_gone]

    @property
    def members(self) -> list[Person]:
        """Who is a member, and not the hall."""
        return [one for one in self.persons if one.is_member and not one.is_hall]

    def member(self, pick: int) -> Person | None:
        """Return some member, None if there is none."""
        members = self.members
        return members[pick % len(members)] if members else None

    def find_route(self, house: House, dst: bytes) -> str:
        """Return the other node that an address leads to from a house, "" if it is this one."""
        mirror = house.uplink.mirror
        if (bus := mirror.get_bus(PATH)) is None:
            # Its agent has begun anew, and has no table yet.
            return ""
        number = mirror.find_node(bus.number, dst) or bus.node
        node = mirror.get_node(number)
        return "" if node is None or node.name == house.name else node.name

    def find_hearers(self, sender: Person, what: Terms) -> list[Person]:
        """Return who must get a multicast: has subscribed, and the sender's node knows of it."""
        mirror = sender.house.uplink.mirror
        bus = mirror.get_bus(PATH)
        records = [] if bus is None else mirror.get_matches(bus.number)
        wants = {(one.node, one.what) for one in records}
        found = []
        for person in self.persons:
            is_near = person.house is sender.house
            for wanted in person.subs:
                is_known = is_near or (NODES.index(person.house.name) + 1, wanted) in wants
                is_sure = self._is_live(sender.house) and self._is_live(person.house)
                assert is_known or not is_sure, f"{sender} does not know what {person} wants"
                if matches(wanted, what) and is_known and person not in found:
                    found.append(person)
        return found

    def _is_live(self, house: House) -> bool:
        """Tell whether the master counts on a node: what it grants is known there."""
        master = self.town.master
        if master is None or not house.uplink.is_here:
            return False
        node = master._registry.nodes[house.name]
        return node.state is NodeState.LIVE and node.unstated is None

    # --- what people do by themselves ---

    def step(self) -> None:
        """Let happen what happens at once, and let people read."""
        while self.town.settle() | self.pump():
            pass

    def pump(self) -> bool:
        """Let everybody who reads read; tell whether anybody has got anything."""
        is_busy = self._collect()
        for person in self.persons:
            if person.is_reading:
                for letter in self.witness.read(person):
                    is_busy = True
                    self.receive(person, letter)
        for person in self.persons:
            if person.client.is_cut:
                closed = person.client.closed
                assert closed is not None, "an agent says why"
                raise AssertionError(f"{person} was put out: {closed.code.name}: {closed.text}")
        return is_busy

    def receive(self, person: Person, letter: Letter) -> None:
        """Somebody has read a letter: the hall lets people in, others answer requests."""
        if person.is_hall and letter.body.endswith(b" let me in"):
            self._admit(person, letter.sender)
        elif letter.serial:
            self._answer(person, letter)

    def _admit(self, hall: Person, newcomer: Person) -> None:
        """Grant what everybody gets."""
        items: list[Item] = [
            OwnedAddr(BusAddress.kernel(PATH)),
            MulticastSend(PATH, Terms.of("x")),
            MulticastSend(PATH, Terms.of("z")),
            Grant(GrantFlags.NOTICES),
        ]
        serial = hall.client.start_grant(newcomer.provisional, *items)

        def done(result: Result) -> None:
            if result.is_ok:
                (newcomer.address,) = result.value["owned"]
            else:
                newcomer.is_doubtful = True

        self.start(hall.client, serial, done)

    def _answer(self, person: Person, letter: Letter) -> None:
        if not person.is_hall and not person.is_gone and letter.sender.address:
            self.tell(person, letter.sender.address, b"reply", reply_to=letter.serial)

    # --- letters: each is sent if there is room, and then it counts ---

    def tell(self, person: Person, dst: bytes, text: bytes, **more: int) -> Letter | None:
        """Send a unicast, or a request with a `serial`; return it if it was accepted."""
        body = b"%d " % len(self.witness.letters) + text
        route = self.find_route(person.house, dst)
        if person.client.send(dst, body, **more) != 0:
            return None
        return self.witness.write(person, dst, route, body, [], **more)

    def shout(self, person: Person, topic: Terms, text: bytes) -> Letter | None:
        """Send a multicast; return it if it was accepted."""
        body = b"%d " % len(self.witness.letters) + text
        wanted_by = self.find_hearers(person, topic)
        if person.client.publish(topic, body) != 0:
            return None
        return self.witness.write(person, topic, "", body, wanted_by)

    def next_serial(self) -> int:
        """Return a number that was not used before."""
        self._serial += 1
        return self._serial

    # --- calls ---

    def start(self, client: Client, serial: int, done: Callable[[Result], None]) -> None:
        """Note a call that was made."""
        self.calls.append((client, serial, done))

    def _collect(self) -> bool:
        """Take all answers that have come; tell whether there were any."""
        done = [one for one in self.calls if one[1] in one[0].results]
        self.calls = [one for one in self.calls if one[1] not in one[0].results]
        for client, serial, receive in done:
            receive(client.results.pop(serial))
        return bool(done)

    def grant(self, person: Person, item: Item, done: Callable[[], None]) -> None:
        """Let the hall, which is there, send an item to a member."""
        assert self.hall is not None
        serial = self.hall.client.start_grant(person.address, item)

        def receive(result: Result) -> None:
            if result.is_ok:
                done()
            elif not isinstance(result.to_error(), PLAIN):
                person.is_doubtful = True

        self.start(self.hall.client, serial, receive)

    # --- who comes and goes ---

    def add(self, house: House, **hello: int) -> Person:
        """Let somebody say HELLO."""
        made = Person(len(self.witness.persons), house.client(**hello), house)
        made.client.rings.set_details(True)
        self.witness.persons.append(made)
        return made

    def ask_to_join(self, person: Person) -> None:
        """Somebody is on the bus, and asks the hall to be let in."""
        person.provisional = endpoint_of(person).provisional
        if self.tell(person, MASTER, b"let me in") is None:
            self.remove(person)

    def remove(self, person: Person, *, is_killed: bool = True) -> None:
        """Somebody goes, whether it has read all or not."""
        if person.is_gone:
            return
        self.forget(person)
        if is_killed:
            person.client.end()
        else:
            person.client.start(Op.CLOSE)

    def forget(self, person: Person) -> None:
        """Somebody is gone."""
        person.is_gone = True
        self.drop_calls({person.client})
        person.client.rings.close()
        if person is self.hall:
            self.hall = None
            self.doubt(self.persons)

    def drop_calls(self, clients: set[Client]) -> None:
        """Wait for no answers that these clients would get."""
        self.calls = [one for one in self.calls if one[0] not in clients]

    def doubt(self, persons: list[Person]) -> None:
        """What was asked for these may be under way, and nobody will say what came of it."""
        for person in persons:
            person.is_doubtful = True

    def settle_doubts(self) -> None:
        """Learn from the agents what came of calls whose outcome nobody knows."""
        for person in self.persons:
            if not person.is_doubtful:
                continue
            endpoint = endpoint_of(person)
            person.is_doubtful = False
            unique = [one for one in endpoint.addresses if one[:1].isdigit()]
            if unique and not person.address:
                (person.address,) = unique
            person.names = {one for one in endpoint.addresses if one in NAMES}
            heard = map(what_of, endpoint.matches)
            person.subs = {one for one in heard if isinstance(one, Terms)}
