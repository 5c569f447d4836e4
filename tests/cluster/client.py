"""A client of a house in town: calls at the door of its agent, and rings, without a process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from afbus._datapath import EXPECT_REPLY, TERMS, UNICAST, Rings
from afbus.node.endpoint import Credentials
from afbus.proto import control, frames
from afbus.proto.address import BusAddress
from afbus.proto.frames import Call, Closed, Hello, Op, Result, Welcome
from afbus.proto.notice import Notice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.cluster.town import House

    from afbus.proto.control import Item
    from afbus.proto.errors import BusError
    from afbus.proto.notice import Event
    from afbus.proto.terms import Terms


class Client:
    """An endpoint."""

    def __init__(self, house: House, uid: int, hello: Mapping[str, int]) -> None:
        self.house = house
        self._credentials = Credentials(os.getpid(), uid, uid, 1)
        self._hello = hello
        self.welcome: Welcome | None = None
        self.rings: Rings
        self.results: dict[int, Result] = {}
        self.closed: Closed | None = None
        #: Whether the agent has ended the connection.
        self.is_cut = False
        self.serial = 0
        #: The unique address that it was given, by whoever lets it join.
        self.address = b""
        self._connect(None)

    def _connect(self, token: bytes | None) -> None:
        self.connection = self.house.connect(self, self._credentials)
        self._say(Hello(resume=token, **self._hello))

    def _say(self, frame: frames.Frame) -> None:
        self.house.core.receive_packet(
            self.connection, frames.encode(frame), self.house.town.network.time
        )

    def hear(self, frame: frames.Frame, fds: Sequence[int]) -> None:
        """Take a frame of the agent."""
        match frame:
            case Welcome():
                self.welcome = frame
                # The rings take the first two, and the line for themselves.
                tx, rx, line = fds
                self.rings = Rings(tx, rx, line, lambda source, _: source, lambda dst, _: dst)
                for fd in fds[:2]:
                    os.close(fd)
            case Result():
                self.results[frame.serial] = frame
            case Closed():
                self.closed = frame
            case _:
                raise AssertionError(frame)

    def start(self, op: Op, **args: Any) -> int:
        """Call, and do not wait; return the serial."""
        self.serial += 1
        self._say(Call(self.serial, op, args))
        self.house.town.settle()
        return self.serial

    def call(self, op: Op, **args: Any) -> Any:
        """Call, and return the value; raise the refusal."""
        serial = self.start(op, **args)
        self.house.town.until(lambda: serial in self.results)
        result = self.results.pop(serial)
        if not result.is_ok:
            raise result.to_error()
        return result.value

    def refused(self, op: Op, **args: Any) -> BusError:
        """Call, and return the refusal."""
        serial = self.start(op, **args)
        self.house.town.until(lambda: serial in self.results)
        result = self.results.pop(serial)
        assert not result.is_ok, result
        return result.to_error()

    def end(self) -> None:
        """The process is gone."""
        self.house.core.receive_end(self.connection)
        self.house.town.settle()

    def resume(self) -> None:
        """Come back to another life of the agent; what the old rings had must have been read."""
        assert self.welcome is not None, "there is something to resume"
        token, self.welcome = self.welcome.token, None
        self._connect(token)
        self.house.town.until(lambda: self.welcome is not None)

    # --- the bus ---

    def bind(self, name: bytes, path: bytes) -> None:
        """Be the master of a bus of the cluster."""
        address = BusAddress(path, name).pack()
        self.call(Op.BIND, address=address, options={"scope": "cluster"})

    def attach(self, path: bytes) -> Any:
        """Come onto a bus."""
        return self.call(Op.ATTACH, path=path)

    def start_grant(self, dst: bytes, *items: Item, body: bytes = b"yes") -> int:
        """Send control items, as the master, and do not wait; return the serial."""
        packed = [list(control.encode(item)[1:]) for item in items]
        return self.start(Op.CONTROL, dst=dst, items=packed, body=body)

    def grant(self, dst: bytes, *items: Item, body: bytes = b"yes") -> Any:
        """Send control items, as the master; return what was chosen."""
        packed = [list(control.encode(item)[1:]) for item in items]
        return self.call(Op.CONTROL, dst=dst, items=packed, body=body)["owned"]

    def send(self, dst: bytes, body: bytes, **more: Any) -> int:
        """Send a unicast; return 0 or a negative errno."""
        return self._send(UNICAST, dst, body, **more)

    def publish(self, terms: Terms, body: bytes, **more: Any) -> int:
        """Send a multicast; return 0 or a negative errno."""
        return self._send(TERMS, terms.pack(), body, **more)

    def _send(self, kind: int, dst: bytes, body: bytes, serial: int = 0, reply_to: int = 0) -> int:
        flags = EXPECT_REPLY if serial else 0
        deadline_ms = 10_000 if serial else 0
        return self.rings.send(
            kind, dst, b"", [body], [], flags, serial, reply_to, deadline_ms, 0.0
        )

    def take(self) -> list[Any]:
        """Return the messages that are there: body, items, flags, source."""
        got = self.rings.recv(100, 1 << 25, 1 << 16, False, 0.0)
        return [] if isinstance(got, int) else got

    def wait(self, count: int = 1) -> list[Any]:
        """Return so many messages."""
        got: list[Any] = []

        def is_enough() -> bool:
            got.extend(self.take())
            return len(got) >= count

        self.house.town.until(is_enough)
        return got

    def letters(self, count: int = 1) -> list[tuple[bytes, bytes]]:
        """Return body and source of so many messages, notices left out."""
        got: list[tuple[bytes, bytes]] = []

        def is_enough() -> bool:
            got.extend((body, source) for body, _, _, source in self.take() if source)
            return len(got) >= count

        self.house.town.until(is_enough)
        return got

    def texts(self, count: int = 1) -> list[bytes]:
        """Return the bodies of so many messages, notices left out."""
        return [body for body, _ in self.letters(count)]

    def notice(self, event: Event | None = None) -> Notice:
        """Return the next notice, or the next of an event, whatever comes before it."""
        got: list[Notice] = []

        def is_there() -> bool:
            told = [Notice.decode(one[0]) for one in self.take() if one[3] == b"" and one[0]]
            got.extend(one for one in told if event in (None, one.event))
            return bool(got)

        self.house.town.until(is_there)
        return got[0]
