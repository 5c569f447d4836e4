"""What the storm's model writes down: who sent what, who read what, who was told what.

Slow and obvious. A letter is a message that was accepted; its body begins with its number, which
grows over all senders. A person is a member (or would be one) with what it should have.

    sent:  letters, in the order of their sequence numbers
    log:   what was read, in the order of the ring: letters, gaps, notices, answers that never come
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from afbus.proto import control
from afbus.proto.control import BUS_SOCKET, SCM_GAP, SCM_REPLY_TO, SCM_SEQ
from afbus.proto.notice import Event, Gap, Notice
from afbus.proto.terms import Terms, matches

if TYPE_CHECKING:
    from tests.cluster.client import Client
    from tests.cluster.town import House

#: What is told of letters that were not read.
_FATES = (Event.UNREAD, Event.OUTCOME_UNKNOWN)
#: After these, nothing comes of their subject.
_ENDS = (Event.LEFT, Event.KILLED)


@dataclass(eq=False)
class Letter:
    """A message that was accepted."""

    number: int
    sender: Person
    seq: int
    #: Where it went: an address, or what a multicast is about.
    to: bytes | Terms
    #: The node that it went to by the sender's table, and was not that of the sender.
    route: str
    body: bytes
    #: Who must read it, or of a multicast a gap.
    wanted_by: list[Person] = field(default_factory=list)
    read_by: list[Person] = field(default_factory=list)
    #: Why it may be lost without a word: hosts and agents that died took it along.
    excuse: str = ""
    #: Its number, if it is a request.
    serial: int = 0
    #: The number of the request that it answers, if it does.
    reply_to: int = 0

    @property
    def is_cast(self) -> bool:
        """Whether it is a multicast."""
        return isinstance(self.to, Terms)

    def __repr__(self) -> str:
        return f"letter {self.number} of {self.sender} to {self.to!r} via {self.route or 'here'}"


@dataclass(frozen=True)
class Read:
    """A letter was read."""

    letter: Letter


@dataclass(frozen=True)
class NoReply:
    """A reply will not come."""

    serial: int


Entry: TypeAlias = Read | Gap | Notice | NoReply


@dataclass(eq=False)
class Person:
    """A client, and what it should have."""

    number: int
    client: Client
    #: The host, which is another after it has died.
    house: House
    is_hall: bool = False
    is_gone: bool = False
    #: If not, its ring fills.
    is_reading: bool = True
    #: Where the hall answers it before it is a member, and its unique address then.
    provisional: bytes = b""
    address: bytes = b""
    names: set[bytes] = field(default_factory=set)
    #: What it hears, for sure.
    subs: set[Terms] = field(default_factory=set)
    #: What it ever asked to hear: nothing else may come.
    ever: set[Terms] = field(default_factory=set)
    #: The last order about each topic.
    orders: dict[Terms, int] = field(default_factory=dict)
    #: Whether a call about it has ended in doubt, so that only the agent knows what it has.
    is_doubtful: bool = False
    sent: list[Letter] = field(default_factory=list)
    log: list[Entry] = field(default_factory=list)
    #: Entries of the log that were judged already.
    judged: int = 0
    #: The last letter that was read of each sender.
    last: dict[Person, int] = field(default_factory=dict)
    #: Numbers of the requests to which neither an answer has come nor the word that none will.
    requests: set[int] = field(default_factory=set)
    #: Addresses of which a notice has said that they are gone.
    farewells: set[bytes] = field(default_factory=set)

    def __repr__(self) -> str:
        return f"{'hall' if self.is_hall else 'person'} {self.number} ({self.house.name})"

    @property
    def is_member(self) -> bool:
        """Whether it may send to everybody."""
        return bool(self.address) and not self.is_gone


class Witness:
    """All letters, and all persons."""

    def __init__(self) -> None:
        self.letters: list[Letter] = []
        self.persons: list[Person] = []
        # Letters that are not settled for good: read, told or excused.
        self.open: list[Letter] = []

    def write(
        self,
        sender: Person,
        to: bytes | Terms,
        route: str,
        body: bytes,
        wanted_by: list[Person],
        serial: int = 0,
        reply_to: int = 0,
    ) -> Letter:
        """Note a letter that was accepted."""
        number, seq = len(self.letters), len(sender.sent) + 1
        made = Letter(number, sender, seq, to, route, body, wanted_by)
        made.serial, made.reply_to = serial, reply_to
        if made.serial:
            sender.requests.add(made.serial)
        self.letters.append(made)
        self.open.append(made)
        sender.sent.append(made)
        return made

    def read(self, person: Person) -> list[Letter]:
        """Read all that somebody has in the ring, and return the letters."""
        letters = []
        while batch := person.client.take():
            for data, items, _, source in batch:
                entry = self._entry(data, items, source)
                if entry is None:
                    continue
                person.log.append(entry)
                if isinstance(entry, Read):
                    self._judge_read(person, entry.letter, data, items, source)
                    letters.append(entry.letter)
                elif isinstance(entry, NoReply):
                    assert entry.serial in person.requests, f"{person} reads {entry} too late"
                    person.requests.discard(entry.serial)
                elif isinstance(entry, Notice) and entry.event in _ENDS:
                    # Names go to others, unique addresses to nobody.
                    person.farewells.update(one for one in entry.subject if one[:1].isdigit())
        return letters

    def _entry(
        self, data: bytes, items: list[tuple[int, int, bytes]], source: bytes
    ) -> Entry | None:
        for level, kind, value in items:
            if level == BUS_SOCKET and kind == SCM_GAP:
                gap = control.decode(level, kind, value)
                assert isinstance(gap, Gap)
                return gap
        if source == b"" and data:
            return Notice.decode(data)
        if source == b"":
            replies = [value for level, kind, value in items if kind == SCM_REPLY_TO]
            return NoReply(int.from_bytes(replies[0], "little"))
        if data == b"yes":
            # What the master of the bus says to whom it grants something.
            return None
        return Read(self.letters[int(data.partition(b" ")[0])])

    def _judge_read(
        self,
        person: Person,
        letter: Letter,
        data: bytes,
        items: list[tuple[int, int, bytes]],
        source: bytes,
    ) -> None:
        """What is read is what was sent, once, in its order, and for whom."""
        assert data == letter.body, f"{letter} was changed on its way"
        assert source in (letter.sender.address, b"") or not letter.sender.address, letter
        assert person not in letter.read_by, f"{person} has read {letter} twice"
        assert source not in person.farewells, f"{person} has read {letter} of who had gone (D15)"
        assert letter.is_cast or not letter.read_by, f"{letter} was read by {letter.read_by} too"
        last = person.last.get(letter.sender, -1)
        assert last < letter.number, f"{person} read {letter} behind letter {last}"
        person.last[letter.sender] = letter.number
        letter.read_by.append(person)
        person.requests.discard(letter.reply_to)
        seqs = [value for level, kind, value in items if (level, kind) == (BUS_SOCKET, SCM_SEQ)]
        assert [int.from_bytes(one, "little") for one in seqs] in ([], [letter.seq]), letter
        if letter.is_cast:
            assert isinstance(letter.to, Terms)
            is_wanted = any(matches(one, letter.to) for one in person.ever)
            assert is_wanted, f"{person} never asked for {letter}"

    def release(self, person: Person, topic: Terms) -> None:
        """Somebody does not want this any more: what was not read need not be."""
        for letter in self.open:
            if isinstance(letter.to, Terms) and matches(topic, letter.to):
                letter.wanted_by = [one for one in letter.wanted_by if one is not person]

    def excuse(self, house: House, reason: str) -> None:
        """An agent has died: what it had, and what went there, may be lost without a word."""
        for letter in self.open:
            if letter.sender.house is house or letter.route == house.name:
                letter.excuse = reason
            letter.wanted_by = [one for one in letter.wanted_by if one.house is not house]

    # --- at a quiet point ---

    def judge(self) -> None:
        """All that was accepted was read, or its loss was told; and settle what is settled."""
        for letter in self.open:
            if letter.is_cast:
                self._judge_cast(letter)
            else:
                self._judge_unicast(letter)
        self.open.clear()
        for person in self.persons:
            for entry in person.log[person.judged :]:
                if isinstance(entry, Notice) and entry.event is Event.UNREAD and not person.is_hall:
                    self._judge_unread(person, entry)
            person.judged = len(person.log)

    def _judge_unread(self, person: Person, notice: Notice) -> None:
        """What nobody has read, says a notice, was read by nobody."""
        unread = [
            one
            for one in self.letters
            if one.sender is person and not one.is_cast and not one.read_by and _covers(notice, one)
        ]
        assert int(notice.detail["count"]) <= len(unread), f"{person} was told {notice}"

    def _judge_unicast(self, letter: Letter) -> None:
        if letter.read_by or letter.excuse or letter.sender.is_gone:
            return
        sender = letter.sender
        news = [one for one in sender.log[sender.judged :] if isinstance(one, Notice)]
        is_told = any(one.event in _FATES and _covers(one, letter) for one in news)
        assert is_told, f"{letter} was lost without a word"

    def _judge_cast(self, letter: Letter) -> None:
        if letter.excuse:
            return
        for person in letter.wanted_by:
            if person.is_gone or person in letter.read_by:
                continue
            assert _has_gap(person, letter), f"{person} missed {letter} without a word"


def _covers(notice: Notice, letter: Letter) -> bool:
    first, last = notice.detail["first"], notice.detail["last"]
    assert isinstance(first, int)
    assert isinstance(last, int)
    return first <= letter.seq <= last


def _has_gap(person: Person, letter: Letter) -> bool:
    """Tell whether what was read since the last quiet point has a gap where the letter would be."""
    last = -1
    news = person.log[person.judged :]
    for place, entry in enumerate(news):
        if isinstance(entry, Read) and entry.letter.sender is letter.sender:
            last = entry.letter.number
        elif isinstance(entry, Gap) and entry.source == letter.sender.address:
            if entry.is_counted and entry.first <= letter.seq <= entry.last:
                return True
            if not entry.is_counted and last < letter.number < _next_of(letter, news[place:]):
                return True
    return False


def _next_of(letter: Letter, entries: list[Entry]) -> int:
    """Return the first of these letters that is the sender's."""
    for entry in entries:
        if isinstance(entry, Read) and entry.letter.sender is letter.sender:
            return entry.letter.number
    return 1 << 62
