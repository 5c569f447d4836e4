"""The master of a bus of the cluster, as in `client/bus.py`, on the town's clock: an `Authority`.

Hall -- Client -- agent core ...        members: `Person`, who asks as `client/member.py` does
"""

from __future__ import annotations

from collections import deque
from socket import SO_PASSCRED, SOL_SOCKET
from typing import TYPE_CHECKING, Any

from tests.cluster.town import MASTER, PATH

from afbus.client.authority import Authority
from afbus.client.effect import Ask, Probe, Tell
from afbus.proto import control
from afbus.proto import request as requests
from afbus.proto.address import BusAddress
from afbus.proto.control import Identity, Item, OwnedAddr, ReplyTo, Serial
from afbus.proto.errors import BusError, RemoteProtocolError
from afbus.proto.frames import Op
from afbus.proto.names import NO_FLAGS, NameFlags, NameOutcome
from afbus.proto.notice import Event, Notice
from afbus.proto.request import Answer, Join, Own, Request

if TYPE_CHECKING:
    from tests.cluster.client import Client
    from tests.cluster.town import House, Town

    from afbus.client.effect import Effect


def items_of(packed: list[Any]) -> list[Item]:
    """Return the items of the bus beside a message."""
    return [control.decode(*one) for one in packed if one[0] == control.BUS_SOCKET]


class Hall:
    """The master, which allows everything; `look` lets it do what is to be done."""

    def __init__(self, house: House) -> None:
        self.client: Client = house.client()
        self.client.bind(MASTER, PATH)
        self.client.call(Op.OPTION_SET, level=SOL_SOCKET, name=SO_PASSCRED, value=1)
        self.authority = Authority(BusAddress(PATH, MASTER), spans_nodes=True)
        self.notices: list[Notice] = []
        self._effects: deque[Effect] = deque()
        # The call that is under way, with its effect.
        self._busy: tuple[int, Tell | Probe] | None = None

    def look(self) -> None:
        """Read what is there, and go on with the effects in their order."""
        for body, packed, _, source in self.client.take():
            known = items_of(packed)
            if source == b"":
                self.notices.append(Notice.decode(body))
                self.authority.receive_notice(self.notices[-1])
                continue
            (identity,) = [one for one in known if isinstance(one, Identity)]
            (serial,) = [one.value for one in known if isinstance(one, Serial)] or [0]
            try:
                request = requests.decode(body)
            except RemoteProtocolError:
                continue
            self.authority.receive_request(source, identity, request, serial)
        self._go_on()

    def _go_on(self) -> None:
        if self._busy is not None and self._busy[0] in self.client.results:
            serial, effect = self._busy
            self._busy = None
            self._settle(effect, self.client.results.pop(serial))
        while self._busy is None:
            self._effects += self.authority.take_effects()
            if not self._effects:
                break
            match self._effects.popleft():
                case Ask(ticket):
                    self.authority.receive_verdict(ticket, True)
                case Tell() as tell:
                    body = b"" if tell.answer is None else tell.answer.encode()
                    reply_to = tell.reply_to if tell.answer is not None else None
                    self._start(tell, tell.to, tell.items, body, reply_to)
                case Probe() as probe:
                    self._start(probe, probe.name, (probe.item,), b"", None)

    def _start(
        self,
        effect: Tell | Probe,
        to: bytes,
        items: tuple[Item, ...],
        body: bytes,
        reply_to: int | None,
    ) -> None:
        packed = [list(control.encode(item)[1:]) for item in items]
        args = {"dst": to, "items": packed, "body": body, "reply_to": reply_to}
        self._busy = (self.client.start(Op.CONTROL, **args), effect)

    def _settle(self, effect: Tell | Probe, result: Any) -> None:
        if isinstance(effect, Probe):
            assert not result.is_ok, "nobody can own that"
            self.authority.receive_probed(effect, result.to_error())
        elif result.is_ok:
            self.authority.receive_done(effect, result.value["owned"])
        else:
            self.authority.receive_failure(effect, result.to_error())

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do for now."""
        return self._busy is None and not self._effects

    @property
    def names(self) -> dict[bytes, bytes]:
        """Return who owns which name, as the master believes."""
        return {
            name.address: member.address.address
            for member in self.authority.members()
            for name in member.names
        }


class Person:
    """A member that asks the master."""

    def __init__(self, hall: Hall, house: House) -> None:
        self.hall, self.town = hall, house.town
        self.client = house.client()
        self.client.attach(PATH)
        self.notices: list[Notice] = []
        self.texts: list[bytes] = []
        self.owned: list[bytes] = []
        self._answers: dict[int, Answer] = {}
        self._serial = 0
        assert self.ask(Join()).is_ok
        self.address = self.owned[0]

    def look(self) -> None:
        """Read what is there."""
        for body, packed, _, source in self.client.take():
            known = items_of(packed)
            if source == b"":
                notice = Notice.decode(body)
                self.notices.append(notice)
                if notice.event is Event.REVOKED:
                    self.owned = [one for one in self.owned if one not in notice.subject]
                continue
            for item in known:
                match item:
                    case OwnedAddr(address):
                        self.owned.append(address.address)
                    case _:
                        pass
            (reply_to,) = [one.value for one in known if isinstance(one, ReplyTo)] or [0]
            if reply_to:
                self._answers[reply_to] = Answer.decode(body)
            elif body:
                self.texts.append(body)

    def resume(self) -> None:
        """Come back to another life of the agent, and learn what is left, as members do."""
        self.look()
        self.client.resume()
        level, name = control.BUS_SOCKET, control.SO_BUS_ADDRESSES
        packed = self.client.call(Op.OPTION_GET, level=level, name=name)
        self.owned = [BusAddress.unpack(one).address for one in packed]

    def start(self, request: Request) -> bool:
        """Ask, and do not wait; tell whether the message was accepted."""
        self._serial += 1
        return self.client.send(MASTER, requests.encode(request), serial=self._serial) == 0

    def ask(self, request: Request) -> Answer:
        """Return the answer to a request."""
        assert self.start(request)
        serial = self._serial
        until(self.town, [self.hall], [self], lambda: serial in self._answers)
        return self._answers.pop(serial)

    def own(self, name: bytes, flags: NameFlags = NO_FLAGS) -> NameOutcome | BusError:
        """Ask for a name."""
        answer = self.ask(Own(name, flags))
        return NameOutcome(answer.detail["outcome"]) if answer.is_ok else answer.to_error()


def until(town: Town, halls: list[Hall], people: list[Person], is_so: Any) -> None:
    """Let time pass until something is so, and all read and do what is to be done."""

    def look() -> bool:
        for hall in halls:
            hall.look()
        for person in people:
            person.look()
        return bool(is_so())

    town.until(look)
