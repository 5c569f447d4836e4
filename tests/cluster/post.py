"""The way from node to node by the cluster's master, in a town that has one: `Post`.

It is a link of its own in memory, beside the line by which the houses of a town speak to the
master; so it can be cut by itself, and the master's death does not touch it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from afbus.link.carrier import Member
from afbus.link.effect import Down, Message, Room, Silent
from afbus.link.frame import Channel
from afbus.link.identity import Identity, Role
from afbus.link.link import Link
from afbus.link.reason import Reason
from afbus.master.relay import Relay as MasterRelay
from afbus.node.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from tests.cluster.town import House
    from tests.link.authority import Signer

    from afbus.link.effect import Event
    from afbus.link.link import Sink
    from afbus.link.memory import MemoryNetwork
    from afbus.proto.errors import LinkError

#: Where it is in the network, and who.
PLACE: Final = "post"
MASTER: Final = Identity("test", Role.MASTER, "master")
#: Between two tries to reach it, and from a link to the time when it has read who calls.
PAUSE_S: Final = 0.5


class Post:
    """The end at the master."""

    def __init__(
        self, network: MemoryNetwork, root: Signer, utc: datetime, number_of: Callable[[str], int]
    ) -> None:
        """Be there; `number_of` returns the number of a node in the cluster."""
        self.relay = MasterRelay()
        self._number_of = number_of
        member = Member(root.issue(MASTER), root.authority(), b"m" * 16, self._accept, lambda: utc)
        network.add(PLACE, member)

    def _accept(self, link: Link) -> Sink:
        return take_in(self.relay, self._number_of(link.peer.name), link)


def take_in(relay: MasterRelay, number: int, link: Link) -> Sink:
    """Let a master's relay have the link of a node, and all that comes over it."""
    relay.add(number, link)

    def handle(event: Event) -> None:
        match event:
            case Message(_, destination, data, cost):
                relay.receive(number, destination, data, cost)
            case Room(_, destination):
                relay.handle_room(number, destination)
            case Down():
                relay.drop(number, link)
            case _:
                pass

    return handle


class PostBox:
    """The end at a house: for one life of its agent."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._carrier = house.carrier
        self._relay = Relay(house.peers.accept, self._identify)
        self._link: Link | None = None
        self._is_closed = False
        house.peers.go_round = self._relay.open
        self._call()

    def _identify(self, number: int) -> Identity | None:
        record = self._house.uplink.mirror.get_node(number)
        if record is None or number == self._house.uplink.number:
            return None
        return Identity("test", Role.NODE, record.name)

    def _call(self) -> None:
        """Have a link as soon as the node has a number, and again when it has ended."""
        if self._house.uplink.number and self._link is None:
            self._carrier.dial(PLACE, MASTER, self._settle)
        else:
            self._call_later(self._call)

    def _call_later(self, callback: Callable[[], None]) -> None:
        def call() -> None:
            if not self._is_closed:
                callback()

        self._carrier.call_at(self._carrier.now() + PAUSE_S, call)

    def close(self) -> None:
        """Call no more: this life is over."""
        self._is_closed = True

    def _settle(self, outcome: Link | LinkError) -> None:
        if not isinstance(outcome, Link):
            self._call_later(self._call)

    def accept(self, link: Link) -> Sink:
        """Take the link that was called for."""
        self._link = link
        self._relay.set_master(link)
        self._call_later(self._relay.admit)

        def handle(event: Event) -> None:
            match event:
                case Message(_, destination, data, cost):
                    self._relay.receive(destination, data, cost)
                case Room(Channel.DATA, destination):
                    self._relay.handle_room(destination)
                case Silent():
                    # As node/links.py does it.
                    link.close(Reason.SILENT, "the master is silent")
                case Down() if self._link is link:
                    self._link = None
                    self._relay.set_master(None)
                    self._call_later(self._call)
                case _:
                    pass

        return handle
