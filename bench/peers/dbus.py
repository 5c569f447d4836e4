"""dbus-daemon and dbus-broker with dbus-fast."""

from __future__ import annotations

import array
import asyncio
import shutil
import socket
import subprocess
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..meter import Credit, await_turns, watch
from ..wire import MIB, System, Wire

if TYPE_CHECKING:
    from pathlib import Path

    from ..stage import Player, Stage
    from ..wire import Traffic

_INTERFACE: Final = "org.example.Bench"
_PATH: Final = "/bench"
#: dbus-fast takes a full socket for the end of the connection, so there is always room.
_SOCKET_BYTES: Final = 4 * MIB
_AHEAD: Final = 512
_AHEAD_BYTES: Final = MIB
_CHUNK: Final = 32

_CONFIG: Final = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
  <limit name="max_incoming_bytes">1000000000</limit>
  <limit name="max_outgoing_bytes">1000000000</limit>
  <limit name="max_message_size">134217728</limit>
</busconfig>
"""


class DbusWire(Wire):
    """Calls for round trips, signals for one way."""

    warm_s = 0.2

    def __init__(self, stage: Stage, traffic: Traffic, is_broker: bool) -> None:
        """Start the bus."""
        super().__init__(stage, traffic)
        self._path = stage.folder / "bus"
        self._control: socket.socket | None = None
        if is_broker:
            self.daemons = [self._start_broker(stage)]
        else:
            self.daemons = [_start_daemon(stage, self._path)]
        ahead = min(_AHEAD, _AHEAD_BYTES // (traffic.size * traffic.readers))
        self._credit = Credit(traffic.readers, max(2, ahead))

    def close(self) -> None:
        """Let go of the broker."""
        if self._control is not None:
            self._control.close()

    def _start_broker(self, stage: Stage) -> int:
        """Start the broker, and do the one thing that its launcher does for a bus.

        The launcher itself wants systemd. The arguments are those of the broker's own tests.
        """
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._path))
            listener.listen(64)
            listener.setblocking(False)
            ours, theirs = socket.socketpair()
            self._control = ours
            with theirs:
                fd = theirs.fileno()
                argv = ["dbus-broker", "--controller", str(fd), "--machine-id", "0" * 31 + "1"]
                limits = ("bytes", "fds", "matches", "objects")
                argv += [word for name in limits for word in (f"--max-{name}", "1000000000")]
                daemon = stage.serve(argv, pass_fds=(fd,))
            ours.settimeout(10)
            ours.sendall(b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")
            answer = b""
            while b"AGREE_UNIX_FD" not in answer:
                part = ours.recv(4096)
                if not part:
                    raise RuntimeError(f"dbus-broker does not agree: {answer!r}")
                answer += part
            fds = array.array("i", [listener.fileno()])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
            ours.sendmsg([_listen_call()], ancillary)
            # Messages begin with their byte order, and have their kind behind it.
            answer = ours.recv(4096)
            if answer[1] != 2:
                raise RuntimeError("dbus-broker does not take the listener")
        return daemon.pid

    async def _connect(self) -> Any:
        from dbus_fast.aio import MessageBus

        bus = await MessageBus(bus_address=f"unix:path={self._path}").connect()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            bus._sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
        return bus

    def _message(self, kind: str, body: bytes) -> Any:
        from dbus_fast import Message, MessageType

        return Message(
            message_type=MessageType[kind],
            destination="org.example.Echo" if kind == "METHOD_CALL" else None,
            path=_PATH,
            interface=_INTERFACE,
            member="Say",
            signature="ay",
            body=[body],
        )

    def echo(self, player: Player) -> None:
        """Answer calls."""
        from dbus_fast import Message

        async def run() -> None:
            bus = await self._connect()

            def answer(message: Any) -> Any:
                if message.member == "Say":
                    return Message.new_method_return(message, "ay", message.body)
                return None

            bus.add_message_handler(answer)
            await bus.request_name("org.example.Echo")
            player.ready()
            await asyncio.Event().wait()

        asyncio.run(run())

    def ping(self, player: Player) -> float:
        """Make calls."""

        async def run() -> float:
            bus = await self._connect()
            body = bytes(self.traffic.size)
            cue = player.ready()
            return await await_turns(cue, lambda: bus.call(self._message("METHOD_CALL", body)))

        return asyncio.run(run())

    def source(self, player: Player) -> None:
        """Send signals."""

        async def run() -> None:
            bus = await self._connect()
            body, sent = bytes(self.traffic.size), 0
            chunk = min(_CHUNK, max(1, _AHEAD_BYTES // self.traffic.size // 4))
            player.ready()
            while True:
                for _ in range(chunk):
                    written = bus.send(self._message("SIGNAL", body))
                await written
                sent += chunk
                await self._credit.room(sent)

        asyncio.run(run())

    def sink(self, player: Player, number: int) -> None:
        """Hear signals."""
        from dbus_fast import Message

        async def run() -> None:
            bus = await self._connect()
            count = 0

            def take(message: Any) -> bool:
                nonlocal count
                if message.member != "Say":
                    return False
                count += 1
                self._credit.took(number, count)
                return True

            bus.add_message_handler(take)
            rule = Message(
                destination="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                member="AddMatch",
                signature="s",
                body=[f"type='signal',interface='{_INTERFACE}'"],
            )
            await bus.call(rule)
            await watch(player.ready(), lambda: count)

        asyncio.run(run())


def _start_daemon(stage: Stage, path: Path) -> int:
    config = stage.folder / "bus.conf"
    config.write_text(_CONFIG.format(path=path))
    argv = ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address=1"]
    # It says that it may not have as many descriptors as it would like.
    return stage.serve_ready(argv, stderr=subprocess.DEVNULL)


def _listen_call() -> bytes:
    """Return the call that gives the broker its listener, and a policy that allows everything."""
    from dbus_fast import Message, Variant

    batch = "(bta(btbs)a(btssssuutt)a(btssssuutt))"
    everybody = 0xFFFF_FFFF
    rule = [True, 1, "", "", "", "", 0, 0, 0, 0xFFFF_FFFF_FFFF_FFFF]
    allowed = [True, 1, [[True, 1, True, ""]], [rule], [rule]]
    parts = [[[everybody, allowed]], [], [], False, "session"]
    policy = Variant(f"(a(u{batch})a(buu{batch})a(ss)bs)", parts)
    message = Message(
        destination="org.bus1.DBus.Broker",
        path="/org/bus1/DBus/Broker",
        interface="org.bus1.DBus.Broker",
        member="AddListener",
        signature="ohv",
        body=["/org/bus1/DBus/Listener/0", 0, policy],
        serial=1,
        unix_fds=[0],
    )
    return bytes(message._marshall(True))


def _system(name: str, is_broker: bool) -> System:
    def missing() -> str:
        return "" if shutil.which(name) else f"no command {name} (Debian package {package})"

    package = "dbus-broker" if is_broker else "dbus-daemon"
    return System(name, partial(DbusWire, is_broker=is_broker), ("dbus_fast",), missing)


DAEMON: Final = _system("dbus-daemon", is_broker=False)
BROKER: Final = _system("dbus-broker", is_broker=True)
