"""The master as a process: state, journal, links, the operator's door, from start to end.

Invariants:

1. Whatever ends `run`, the lock, the sockets and the thread of the journal end with it.
2. What cannot be written ends the master: nobody is told what would not survive. Nodes go on with
   what they have, and another start begins with what was written.
3. A policy that is wrong is told and not followed; the one of before stays.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from ..link.carrier import Member
from ..link.quic import QuicCarrier
from ..proto.errors import ConfigError, IdentityError, LinkError, RemoteProtocolError
from .core import Core, Limits
from .directory import Directory
from .door import Door
from .journal import Journal, JournalError
from .policy import load_policy
from .server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from .effect import Audit

_log = logging.getLogger("afbus.master")

#: Where masters listen if nothing else is said.
PORT: Final = 4450
#: How long links may take for their farewell.
FAREWELL_S: Final = 3.0
#: When the operator is reminded that the issuing certificate ends.
REMIND_S: Final = 30 * 86_400


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one master."""

    state: Path
    #: A numeric address of this host; `::` is all, of both families.
    host: str = "::"
    port: int = PORT
    #: By default that of the state.
    policy: Path | None = None
    limits: Limits = field(default_factory=Limits)


async def run(config: Config, ready: Callable[[str, int], None] | None = None) -> None:
    """Be the master, until SIGTERM, SIGINT or a cancellation.

    Args:
        config: The settings.
        ready: Called with host and port once nodes may come.

    Raises:
        AddressInUse: Another master runs with this state, or another process listens at the
            address. EADDRINUSE.
        ConfigError: Something is wrong with the state, the policy, or the address.
        JournalError: The journal cannot be read, or not be written any more.
    """
    directory = Directory(config.state)
    directory.check()
    with ExitStack() as stack:
        stack.enter_context(directory.lock())
        service = Service(config, directory, stack)
        await service.serve(ready)


class Service:
    """One running master."""

    def __init__(self, config: Config, directory: Directory, stack: ExitStack) -> None:
        """Read everything; `stack` ends what is opened."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._failure: BaseException | None = None
        self._policy_file = config.policy or directory.policy
        self._directory = directory
        issuer = directory.load()
        policy = load_policy(self._policy_file)
        self._journal = Journal(directory.journal)
        stack.callback(self._journal.close)
        self._writer = ThreadPoolExecutor(1, "journal")
        stack.callback(self._writer.shutdown)
        try:
            core = Core(
                issuer,
                policy,
                secrets.token_bytes,
                _utc,
                self._journal.read(),
                self._loop.time(),
                config.limits,
            )
        except RemoteProtocolError as error:
            raise JournalError(f"journal {directory.journal}: {error}") from error
        self._server = Server(core, issuer, self._commit)
        self._carrier = self._make_carrier(config)
        stack.callback(self._carrier.close)
        stack.callback(self._server.detach)
        if issuer.issuing_until_utc < _utc() + REMIND_S:
            end = datetime.fromtimestamp(issuer.issuing_until_utc, UTC)
            _log.warning("the issuing certificate ends %s; `afbus master renew`", end)

    def _make_carrier(self, config: Config) -> QuicCarrier:
        server = self._server
        try:
            member = Member(
                credentials=server.make_credentials(_utc()),
                authority=server.get_authority(),
                boot=secrets.token_bytes(16),
                accept=server.accept,
                utc_now=lambda: datetime.now(UTC),
                admits=server.admits,
                refused=server.report_refused,
                enrol=server.enrol,
            )
            return QuicCarrier(member, config.host, config.port)
        except IdentityError as error:
            raise ConfigError(str(error), file=str(self._directory.issuing)) from error
        except LinkError as error:
            raise ConfigError(str(error), key="--listen") from error

    def _commit(
        self,
        rows: Sequence[tuple[bytes, bytes | None]],
        audits: Sequence[Audit],
        done: Callable[[], None],
    ) -> None:
        """Write a batch in the journal's thread, so that links go on meanwhile."""

        def settle(future: asyncio.Future[None]) -> None:
            if future.cancelled():
                return
            if (error := future.exception()) is not None:
                self._fail(error)
            else:
                done()

        written = self._loop.run_in_executor(self._writer, self._journal.commit, rows, audits)
        written.add_done_callback(settle)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._stopped.set()

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        failure = context.get("exception")
        if failure is not None:
            self._fail(failure)

    async def serve(self, ready: Callable[[str, int], None] | None) -> None:
        """Serve nodes and the operator until a signal comes."""
        before = self._loop.get_exception_handler()
        self._loop.set_exception_handler(self._on_exception)
        signals = {
            signal.SIGTERM: self._stopped.set,
            signal.SIGINT: self._stopped.set,
            signal.SIGHUP: self.reload_policy,
        }
        for number, callback in signals.items():
            self._loop.add_signal_handler(number, callback)
        door = Door(self._directory.door, self._ask)
        try:
            self._server.attach(self._carrier)
            await door.open()
            if ready is not None:
                ready(*self._carrier.address[:2])
            await self._stopped.wait()
            if self._failure is None:
                await self._say_farewell()
        finally:
            door.close()
            for number in signals:
                self._loop.remove_signal_handler(number)
            self._loop.set_exception_handler(before)
        if self._failure is not None:
            raise self._failure

    def _ask(self, data: bytes, answer: Callable[[bytes], None]) -> None:
        self._server.receive_visit("operator", data, answer)

    async def _say_farewell(self) -> None:
        """Let nodes know that the master goes; they may be slow, but not for long."""
        ended = asyncio.Event()
        self._server.stop(ended.set)
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await ended.wait()

    def reload_policy(self) -> None:
        """Read the policy again."""
        core = self._server.core
        try:
            policy = load_policy(self._policy_file)
        except ConfigError as error:
            _log.error("the policy is not followed: %s", error)
            core.refuse_policy(str(error))
        else:
            _log.warning("policy %s was read again", self._policy_file)
            core.set_policy(policy, self._loop.time())
        self._server.wake()


def _utc() -> float:
    return datetime.now(UTC).timestamp()
