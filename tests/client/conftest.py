"""What the tests of the client share: a small agent of their own, and the real one."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from afbus._datapath import Switch
from afbus.proto import control, frames
from afbus.proto.address import BusAddress
from afbus.proto.errors import (
    AddressInUse,
    BusError,
    CloseCode,
    Denied,
    InvalidArgument,
    NoBus,
    NoSuchEndpoint,
)
from afbus.proto.frames import Call, Closed, Hello, Op, Result, Welcome
from afbus.proto.notice import Event, Notice
from afbus.proto.terms import Terms
from afbus.proto.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUS_NUMBER = 1

# The agent, as the command line runs it; it says when clients may come.
RUN_NODE = """
import asyncio, pathlib, sys
from afbus.node import agent, config
settings = config.Config(door=pathlib.Path(sys.argv[1]))
asyncio.run(agent.run(settings, lambda: print("ready", flush=True)))
"""


@dataclass
class Guest:
    """An endpoint, as the porter knows it."""

    number: int
    door: socket.socket
    token: bytes
    addresses: list[bytes] = field(default_factory=list)
    path: bytes | None = None
    options: dict[tuple[int, int], Any] = field(default_factory=dict)


class Porter:
    """An agent of one bus without any policy, which tests can stop, cut and start again.

    It gives addresses and grants on command of whoever is bound, and remembers nothing over `die`
    but what `keeps` says.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.epoch = 0
        self.keeps = False
        #: The operation that is carried out without an answer, as by an agent that dies then.
        self.cut_after: Op | None = None
        self.calls: list[Call] = []
        self._journal: dict[bytes, Guest] = {}
        self._number = 0
        self.is_running = False
        self.start()

    def start(self) -> None:
        """Open the door."""
        self.epoch += 1
        self.guests: dict[socket.socket, Guest] = {}
        self.bus: bytes | None = None
        self.master: Guest | None = None
        self.switch = Switch()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.place))
        self._listener.listen(128)
        self._wake, self._woken = socket.socketpair()
        self.is_running = True
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def die(self) -> None:
        """Be gone at once, as after kill -9."""
        if self.is_running:
            self.is_running = False
            self._wake.send(b"x")
            self._thread.join()
            self.switch.close()
            for guest in self.guests.values():
                if self.keeps:
                    self._journal[guest.token] = guest
                guest.door.close()
            for sock in (self._listener, self._wake, self._woken):
                sock.close()
            self.place.unlink()

    def cut(self, text: str, code: CloseCode = CloseCode.EVICTED) -> None:
        """End all connections, with a reason."""
        with self._lock:
            for guest in self.guests.values():
                guest.door.send(frames.encode(Closed(code, text)))
                self.switch.remove_endpoint(guest.number, flush=False)

    def notify(self, body: bytes) -> None:
        """Send a notice to everybody."""
        with self._lock:
            self.switch.notify([guest.number for guest in self.guests.values()], body)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            while self.is_running:
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        door, _ = self._listener.accept()
                        selector.register(door, selectors.EVENT_READ)
                    elif isinstance(key.fileobj, socket.socket) and key.fileobj is not self._woken:
                        with self._lock:
                            is_over = self._serve(key.fileobj)
                        if is_over:
                            selector.unregister(key.fileobj)
                            key.fileobj.close()

    def _serve(self, door: socket.socket) -> bool:
        """Answer one frame; return whether the connection is over."""
        try:
            data = door.recv(1 << 18)
        except ConnectionError:
            data = b""
        guest = self.guests.get(door)
        if not data:
            if self.guests.pop(door, None) is not None and guest is not None:
                with contextlib.suppress(KeyError):
                    self.switch.remove_endpoint(guest.number, flush=True)
            return True
        frame = frames.decode(data)
        if isinstance(frame, Hello):
            self._welcome(door, frame)
            return False
        assert isinstance(frame, Call)
        assert guest is not None
        self.calls.append(frame)
        try:
            result = Result(frame.serial, value=self._answer(guest, frame.op, dict(frame.args)))
        except BusError as error:
            result = Result.refused(frame.serial, error)
        if frame.op in (Op.CLOSE, self.cut_after):
            self.switch.remove_endpoint(guest.number, flush=True)
            del self.guests[door]
        if frame.op is not self.cut_after:
            door.send(frames.encode(result))
        return door not in self.guests

    def _welcome(self, door: socket.socket, hello: Hello) -> None:
        self._number += 1
        number = self._number
        credentials = door.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = struct.unpack("=iII", credentials)
        ident = control.Identity("somebody", "here", pid, uid, gid).encode()
        self.switch.add_endpoint(number, uid, pid, uid, gid, ident)
        descriptors = self.switch.connect(number, hello.tx_bytes, hello.rx_bytes)
        known = self._journal.pop(hello.resume or b"", None)
        guest = Guest(number, door, known.token if known else os.urandom(16))
        self.guests[door] = guest
        if known is not None and known.path is not None:
            if self.bus is None:
                self._add_bus(known.path)
            self._attach(guest, known.path)
            for address in known.addresses:
                self._own(guest, address)
        welcome = Welcome(
            version=VERSION,
            endpoint=number,
            provisional=b"@%d" % number,
            token=guest.token,
            epoch=self.epoch,
            tx_bytes=hello.tx_bytes,
            rx_bytes=hello.rx_bytes,
            resumed=known is not None,
            node="here",
        )
        socket.send_fds(door, [frames.encode(welcome)], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def _add_bus(self, path: bytes, width: int = 512) -> None:
        self.bus = path
        self.switch.add_bus(BUS_NUMBER, width, bytes(16))

    def _attach(self, guest: Guest, path: bytes) -> None:
        guest.path = path
        self.switch.attach(guest.number, BUS_NUMBER)

    def _own(self, guest: Guest, address: bytes) -> None:
        if not self.switch.own(guest.number, address):
            raise AddressInUse(f"{address!r} has an owner")
        guest.addresses.append(address)
        if self.master is not None and len(guest.addresses) == 1:
            joined = Notice(Event.JOINED, (address,))
            self.switch.notify([self.master.number], joined.encode())

    def _answer(self, guest: Guest, op: Op, args: dict[str, Any]) -> Any:  # noqa: PLR0911 (one line an operation)
        match op:
            case Op.ATTACH:
                if self.bus != args["path"]:
                    raise NoBus(f"no bus {args['path']!r}")
                self._attach(guest, args["path"])
                master = self.master and self.master.addresses[0]
                return {"master": master, "width": 512, "order": "total"}
            case Op.BIND:
                address = BusAddress.unpack(args["address"])
                if self.master is not None:
                    raise AddressInUse(f"{address} has a master")
                self._add_bus(address.path, args["options"]["width"])
                self._attach(guest, address.path)
                self._own(guest, address.address)
                self.switch.set_master(BUS_NUMBER, guest.number)
                self.master = guest
                return {"width": 512, "order": "total", "members": 0}
            case Op.CONTROL:
                return {"owned": self._control(guest, args)}
            case Op.OPTION_SET:
                self._set(guest, args)
                return None
            case Op.OPTION_GET:
                return self._get(guest, args["name"])
            case Op.SHUTDOWN:
                self.switch.set_silent(guest.number)
                return None
            case Op.LIST:
                after = args["after"] or 0
                return {"rows": [{"number": after}], "next": after + 1 if after < 2 else None}
            case Op.STATUS:
                return {"epoch": self.epoch}
            case _:
                return None

    def _master(self) -> bytes | None:
        if self.master is None or self.bus is None:
            return None
        return BusAddress(self.bus, self.master.addresses[0]).pack()

    def _control(self, guest: Guest, args: dict[str, Any]) -> list[bytes]:
        if guest is not self.master:
            raise Denied("only the master commands")
        target = next(
            (
                one
                for one in self.guests.values()
                if args["dst"] in (b"@%d" % one.number, *one.addresses)
            ),
            None,
        )
        if target is None:
            raise NoSuchEndpoint("nobody there")
        ctl = b""
        chosen = []
        for kind, data in args["items"]:
            item = control.decode(control.BUS_SOCKET, kind, data)
            if isinstance(item, control.OwnedAddr) and item.address.is_kernel:
                chosen.append(b"1.%d" % (1000 + self._number))
                item = control.OwnedAddr(BusAddress(item.address.path, chosen[-1]))
                _, kind, data = control.encode(item)
            self._command(target, item)
            ctl += struct.pack("<HHI", kind, 0, len(data)) + data + bytes(-len(data) % 8)
        self.switch.deliver(
            guest.number,
            target.number,
            args["src"] or guest.addresses[0],
            args["dst"],
            ctl,
            args["body"],
            args["serial"] or 0,
            args["reply_to"] or 0,
            args["deadline_ms"] or 0,
        )
        return chosen

    def _command(self, target: Guest, item: control.Item) -> None:
        self._number += 1
        match item:
            case control.OwnedAddr(address):
                self._own(target, address.address)
            case control.RevokeAddr(address):
                self.switch.disown(target.number, address.address)
                target.addresses.remove(address.address)
            case control.MulticastMatch(match):
                terms, bits = split(match.what)
                self.switch.subscribe(
                    target.number, self._number, terms, bits, match.overflow, match.deadline_ms
                )
            case control.MulticastSend(_, what):
                self.switch.allow_send(target.number, self._number, *split(what))
            case _:
                raise InvalidArgument("the porter does not know this command")

    def _set(self, guest: Guest, args: dict[str, Any]) -> None:
        value = args["value"]
        if (args["level"], args["name"]) == (socket.SOL_SOCKET, socket.SO_PASSCRED):
            self.switch.set_ident(guest.number, bool(value))
        else:
            try:
                self.switch.set_filter(guest.number, value)
            except ValueError as error:
                raise InvalidArgument(str(error)) from error
        guest.options[args["level"], args["name"]] = value

    def _get(self, guest: Guest, name: int) -> Any:
        match name:
            case control.SO_BUS_ADDRESSES:
                assert guest.path is not None or not guest.addresses
                return [BusAddress(guest.path or b"", one).pack() for one in guest.addresses]
            case control.SO_BUS_MASTER:
                return self._master()
            case control.SO_BUS_STATE:
                return {"agent": "here"}
            case _:
                return self.switch.stats(guest.number)


def split(what: Terms | bytes) -> tuple[bytes | None, bytes | None]:
    """Terms and bits of a match, one of them None."""
    return (what.pack(), None) if isinstance(what, Terms) else (None, what)


@pytest.fixture
def porter(tmp_path: Path) -> Iterator[Porter]:
    """An agent of the tests' own, whose door is not where others look."""
    made = Porter(tmp_path / "door")
    yield made
    made.die()


class NodeProcess:
    """A real agent in a process of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, and wait until clients may come."""
        command = [sys.executable, "-c", RUN_NODE, str(self.place)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal, by default one to leave in good order; return its exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        with self._process:
            return self._process.wait()

    def forget(self) -> None:
        """Remove what a new agent would know of the one that was killed."""
        for path in self.place.parent.iterdir():
            path.unlink()

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[NodeProcess]:
    """A real agent, which leaves nothing behind."""
    folder = tmp_path / "node"
    made = NodeProcess(folder / "node.sock")
    yield made
    if made.is_running:
        assert made.end() == 0
