"""What may befall a town, each action at once: people come, ask and go, and the weather changes.

`test_storm.py` draws the actions. An action that cannot be is none, so that what is drawn never
depends on how quick the switches were. `calm` heals all, waits for rest, and compares.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

from tests.cluster.post import PLACE
from tests.cluster.quiet import check_all, rest
from tests.cluster.society import NAMES, NODES, TOPICS, Society
from tests.cluster.town import MASTER, PATH

from afbus.master.core import LEASE_S
from afbus.proto.address import BusAddress
from afbus.proto.control import Match, MulticastMatch, OwnedAddr, RevokeAddr, RevokeMatch
from afbus.proto.frames import Op

if TYPE_CHECKING:
    from tests.cluster.town import House

    from afbus.proto.frames import Result
    from afbus.proto.terms import Terms

PAIRS: Final = (("alpha", "beta"), ("alpha", "gamma"), ("beta", "gamma"))
PERSONS: Final = 9
#: Bytes of letters; the last is more than goes inline, so its bytes go beside the lane.
SIZES: Final = (0, 0, 0, 100, 3000, 20_000, 100_000)
#: Calls that the hall has under way, at most.
CALLS: Final = 20
#: The longest that a node or the master stays away; from `LEASE_S` on others may have what it had.
AWAY_S: Final = 150.0


class Storm:
    """A town, its people, and the weather."""

    def __init__(self, *, has_post: bool) -> None:
        self.society = Society(has_post=has_post)
        self.town = self.society.town
        #: When each node, or the master (""), went away, on the town's clock.
        self._away: dict[str, float] = {}
        #: All outages, those since the last calm, and how many calms ended some.
        self._outages = 0
        self._fresh = 0
        self._rounds = 0

    def begin(self, node: str) -> None:
        """A bus with three members that hear each other."""
        self.bind(node)
        rest(self.society)
        for name in NODES:
            self.come(name)
        rest(self.society)
        for person in self.society.members:
            self.hear(person.number, TOPICS[person.number % 2])
        rest(self.society)

    def close(self) -> None:
        """End the town."""
        self.town.close()

    # --- who comes and goes ---

    def _find_home(self, node: str) -> House | None:
        """Return the house of a node, if it stands and the town has room for one more."""
        is_full = len(self.society.persons) >= PERSONS
        return None if is_full else self.town.houses.get(node)

    def bind(self, node: str) -> None:
        """Somebody becomes the hall, if there is none."""
        society, house = self.society, self._find_home(node)
        if house is None or society.hall is not None:
            return
        person = society.add(house)
        address = BusAddress(PATH, MASTER).pack()
        serial = person.client.start(Op.BIND, address=address, options={"scope": "cluster"})
        society.hall, person.is_hall = person, True

        def done(result: Result) -> None:
            if result.is_ok:
                person.address = MASTER
            else:
                society.remove(person)

        society.start(person.client, serial, done)
        society.step()

    def come(self, node: str, *, is_small: bool = False) -> None:
        """Somebody wants to be a member, with a large ring or a small one."""
        society, house = self.society, self._find_home(node)
        if house is None or society.hall is None or not house.federation.is_taken(PATH):
            return
        person = society.add(house, **({"rx_bytes": 8192} if is_small else {}))
        serial = person.client.start(Op.ATTACH, path=PATH)

        def done(result: Result) -> None:
            if result.is_ok:
                society.ask_to_join(person)
            else:
                # Its node has no block of addresses yet.
                society.remove(person)

        society.start(person.client, serial, done)
        society.step()

    def leave(self, pick: int, *, is_killed: bool) -> None:
        """Somebody goes."""
        if persons := self.society.persons:
            self.society.remove(persons[pick % len(persons)], is_killed=is_killed)
            self.society.step()

    def sleep(self, pick: int) -> None:
        """Somebody stops reading, or begins again."""
        if (person := self.society.member(pick)) is not None:
            person.is_reading = not person.is_reading
            self.society.step()

    # --- what is granted ---

    @property
    def _is_granting(self) -> bool:
        """Whether there is a hall that is not too busy."""
        hall, calls = self.society.hall, self.society.calls
        return hall is not None and sum(one[0] is hall.client for one in calls) < CALLS

    def name(self, pick: int, name: bytes, *, is_given: bool) -> None:
        """The hall gives a member a name, or takes it."""
        person = self.society.member(pick)
        if person is None or not self._is_granting:
            return
        names, address = person.names, BusAddress(PATH, name)
        if is_given:
            self.society.grant(person, OwnedAddr(address), lambda: names.add(name))
        else:
            self.society.grant(person, RevokeAddr(address), lambda: names.discard(name))
        self.society.step()

    def hear(self, pick: int, topic: Terms) -> None:
        """The hall lets a member hear something."""
        society, person = self.society, self.society.member(pick)
        if person is None or not self._is_granting:
            return
        person.ever.add(topic)
        serial = person.orders[topic] = society.next_serial()

        def done() -> None:
            # From here on it must get everything, if nothing else was asked meanwhile.
            if person.orders[topic] == serial:
                person.subs.add(topic)
            else:
                person.is_doubtful = True

        society.grant(person, MulticastMatch(Match(PATH, topic)), done)
        society.step()

    def unhear(self, pick: int, topic: Terms) -> None:
        """The hall takes that back."""
        society, person = self.society, self.society.member(pick)
        if person is None or not self._is_granting:
            return
        person.subs.discard(topic)
        person.orders[topic] = society.next_serial()
        # What is under way reaches it or not, and so does what comes before this has failed.
        society.witness.release(person, topic)
        society.grant(person, RevokeMatch(PATH, topic), lambda: None)
        person.is_doubtful = True
        society.step()

    # --- letters ---

    def tell(self, pick: int, dst: bytes | int, count: int, size: int) -> None:
        """A member writes to a name, or to another member."""
        society, person = self.society, self.society.member(pick)
        other = None if isinstance(dst, bytes) else society.member(dst)
        to = dst if isinstance(dst, bytes) else b"" if other is None else other.address
        if person is not None:
            for _ in range(count):
                society.tell(person, to, bytes(size))
            society.step()

    def ask(self, pick: int, dst: int) -> None:
        """A member asks another one."""
        society = self.society
        person, other = society.member(pick), society.member(dst)
        if person is not None and other is not None and person is not other:
            society.tell(person, other.address, b"?", serial=society.next_serial())
            society.step()

    def shout(self, pick: int, topic: Terms, count: int, size: int) -> None:
        """A member sends multicasts."""
        if (person := self.society.member(pick)) is not None:
            for _ in range(count):
                self.society.shout(person, topic, bytes(size))
            self.society.step()

    def bustle(self, seed: int) -> None:
        """Many write, ask and shout, fall asleep and wake up, in any order."""
        random = Random(seed)
        for _ in range(12):
            pick, count, size = random.randrange(100), random.randrange(1, 6), random.choice(SIZES)
            match random.randrange(6):
                case 0 | 1:
                    to = random.choice((*NAMES, MASTER, random.randrange(100), pick + 1))
                    self.tell(pick, to, count, size)
                case 2 | 3:
                    self.shout(pick, random.choice(TOPICS), count, size)
                case 4:
                    self.ask(pick, random.randrange(100))
                case _:
                    self.sleep(pick)

    # --- weather ---

    def squall(self, seed: int) -> None:
        """An outage, short or long, while people are busy; it is healed, or stays."""
        random = Random(seed)
        pair, node = random.choice(PAIRS), random.choice(NODES)
        self.bustle(random.randrange(1 << 32))
        match random.randrange(8):
            case 0 | 1:
                self.cut(pair)
            case 2 | 3:
                self.half_cut(pair, is_back=random.random() < 0.5)
            case 4:
                self.cut_line(node)
            case 5:
                self.kill_master()
            case 6:
                self.kill_node(node)
            case _:
                self.restart_agent(node)
        self.bustle(random.randrange(1 << 32))
        self.wait(random.choice((0.05, 0.5, 3.0, 15.0, 15.0, 130.0)))
        self.bustle(random.randrange(1 << 32))
        if random.random() < 0.5:
            self.heal(pair)
            self._bring_back(node)
            self.start_master()
            self.wait(random.choice((0.05, 0.5, 3.0)))

    def cut(self, pair: tuple[str, str]) -> None:
        """Nothing passes between two nodes."""
        self._fresh += 1
        self.town.cut(*pair)

    def half_cut(self, pair: tuple[str, str], *, is_back: bool) -> None:
        """Nothing passes in one direction."""
        self._fresh += 1
        self.town.network.cut(*(reversed(pair) if is_back else pair))

    def heal(self, pair: tuple[str, str]) -> None:
        """Everything passes again between two nodes."""
        self.town.heal(*pair)
        self.society.step()

    def cut_post(self, node: str) -> None:
        """Nothing comes from a node to the post; what goes there says nothing then, either."""
        self._fresh += 1
        self.town.network.cut(node, PLACE)

    def heal_post(self, node: str) -> None:
        """The post hears it again."""
        self.town.network.heal(node, PLACE)
        self.society.step()

    def haze(self, pair: tuple[str, str], delay_s: float, loss: float) -> None:
        """What passes between two nodes takes its time, or comes at the second try."""
        for way in (pair, pair[::-1]):
            path = self.town.network.path(*way)
            path.delay_s = path.jitter_s = delay_s
            path.loss = loss

    def cut_line(self, node: str) -> None:
        """A node has no way to the master."""
        house = self.town.houses.get(node)
        if house is not None and not house.is_cut_off:
            self._fresh += 1
            house.is_cut_off = True
            house.lose_line()
            self._away[node] = self.town.network.time
        self.society.step()

    def heal_line(self, node: str) -> None:
        """It has one again."""
        if (house := self.town.houses.get(node)) is not None:
            house.is_cut_off = False
            self._away.pop(node, None)
        self.society.step()

    def kill_node(self, node: str) -> None:
        """A host is gone, with all who were there."""
        if (house := self.town.houses.get(node)) is None:
            return
        self._fresh += 1
        for person in self.society.persons:
            if person.house is house:
                self.society.forget(person)
        self.society.witness.excuse(house, f"host {node} has died")
        house.kill()
        self._away[node] = self.town.network.time
        self.society.step()

    def start_node(self, node: str) -> None:
        """It is back, and knows nothing."""
        if node not in self.town.houses:
            self.town.start(node)
            self._away.pop(node, None)
        self.society.step()

    def restart_agent(self, node: str) -> None:
        """An agent is killed, and begins anew; clients read what they have, and come back."""
        society, house = self.society, self.town.houses.get(node)
        if house is None:
            return
        self._fresh += 1
        people = [one for one in society.persons if one.house is house]
        for person in people:
            for letter in society.witness.read(person):
                society.receive(person, letter)
            person.sent.clear()
            person.requests.clear()
        society.witness.excuse(house, f"the agent of {node} has died")
        society.drop_calls({one.client for one in people})
        society.doubt(society.persons)
        house.restart()
        for person in people:
            person.client.resume()
            person.client.rings.set_details(True)
        if society.hall in people and not society.hall.address:
            society.remove(society.hall)
        society.step()

    def kill_master(self) -> None:
        """The master of the cluster is gone; its disk stays."""
        if self.town.master is not None:
            self._fresh += 1
            self.town.kill_master()
            self._away[""] = self.town.network.time
            self.society.step()

    def start_master(self) -> None:
        """It is back."""
        if self.town.master is None:
            self.town.start_master()
            self._away.pop("", None)
        self.society.step()

    def wait(self, duration_s: float) -> None:
        """Time passes; nobody stays away for ever."""
        self.town.run_for(duration_s)
        self.society.step()
        now, persons = self.town.network.time, self.society.persons
        for who, since in list(self._away.items()):
            if now - since > LEASE_S:
                # Its names may be others' by now.
                self.society.doubt([one for one in persons if one.house.name == who])
            if now - since > AWAY_S:
                self._bring_back(who)

    def _bring_back(self, who: str) -> None:
        """End what keeps a node, or the master, away."""
        if who == "":
            self.start_master()
        else:
            self.start_node(who)
            self.heal_line(who)

    # --- quiet points ---

    def calm(self) -> None:
        """Heal everything, wait until nothing moves any more, and compare."""
        for pair in PAIRS:
            self.haze(pair, 0.0, 0.0)
            self.town.heal(*pair)
        for node in NODES:
            self.heal_post(node)
        for who in ("", *NODES):
            self._bring_back(who)
        for person in self.society.persons:
            person.is_reading = True
        check_all(self.society)
        self._rounds += self._fresh > 0
        self._outages += self._fresh
        self._fresh = 0

    @property
    def sums(self) -> dict[str, int]:
        """What all this came to, for people."""
        letters = self.society.witness.letters
        lost = [one for one in letters if not one.is_cast and not one.read_by]
        return {
            "towns": 1,
            "rounds of cut and heal": self._rounds,
            "outages": self._outages,
            "letters accepted": len(letters),
            "readings": sum(len(one.read_by) for one in letters),
            "told as unread or unknown": sum(not one.excuse for one in lost),
            "lost with an agent or a host": sum(one.excuse != "" for one in lost),
        }
