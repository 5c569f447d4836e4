"""The agent as a process: door, switch, core, journal and clock, from start to end.

One loop serves everything but messages, which the switch moves on its own thread. Each input goes
to the core, and then the core's effects are applied in their order; the journal is committed
before a client is told of what stands in it, so that no kill makes that untrue.

Invariants:

1. Whatever ends `run`, the switch's thread, the sockets and the lock end with it. The journal
   stays while there are endpoints that may resume.
2. An exception that nobody expected ends the agent; it is not swallowed by the loop. So does a
   switch that has failed; clients resume with the next agent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import secrets
import signal
import socket
import threading
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._datapath import VERSION, Switch
from ..proto.errors import AfbusError, ConfigError, RemoteProtocolError
from ..proto.frames import Closed, Result
from .config import Config, check_door, check_node, default_door
from .core import About, Core
from .door import Door, listening, lock
from .effect import Audit, Cut, Deliver, Drop, Notify, Put, Send, Signal
from .journal import Journal, JournalError, set_aside
from .process import is_alive

if TYPE_CHECKING:
    from collections.abc import Callable

    from .effect import ConnectionId
    from .endpoint import Credentials
    from .links import Links
    from .membership import Membership

_log = logging.getLogger("afbus.node")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _load_membership(folder: Path) -> Membership:
    """Read who this node is; ConfigError also if what a cluster needs is not installed."""
    try:
        from .membership import load
    except ImportError as error:
        text = f"a node of a cluster needs {error.name}: pip install 'afbus[cluster]'"
        raise ConfigError(text) from error
    return load(folder)


class SwitchError(AfbusError):
    """The thread of the switch has ended by a mistake of its own: nothing moves any more."""


async def run(config: Config, ready: Callable[[], None] | None = None) -> None:
    """Be the agent, until SIGTERM, SIGINT or a cancellation.

    Args:
        config: The settings.
        ready: Called once clients may come.

    Raises:
        AddressInUse: Another agent is at the door. EADDRINUSE.
        ConfigError: The door or the journal cannot be made where it should be.
        SwitchError: The switch has failed.
    """
    door = check_door(config.door or default_door(os.environ, os.geteuid()))
    mode = (0o666 if os.geteuid() == 0 else 0o600) if config.mode is None else config.mode
    _raise_descriptor_limit()
    async with AsyncExitStack() as stack:
        stack.enter_context(lock(door))
        if config.journal is not None:
            # Beside the door it is that of whoever has the door; elsewhere others may mean it too.
            stack.enter_context(lock(config.journal, "journal", "writes"))
        listener = stack.enter_context(listening(door, mode))
        agent = Agent(config, config.journal or door.with_name(door.name + ".journal"))
        stack.push_async_callback(agent.close)
        await agent.serve(listener, lambda: _announce(ready))


def _announce(ready: Callable[[], None] | None) -> None:
    notify_service("READY=1")
    if ready is not None:
        ready()


def notify_service(state: str) -> None:
    """Tell the service manager, if there is one that wants to know (sd_notify)."""
    place = os.environ.get("NOTIFY_SOCKET")
    if not place:
        return
    # An abstract address begins with NUL, which the variable shows as `@`.
    address = f"\0{place[1:]}" if place.startswith("@") else place
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError as error:
            _log.warning("NOTIFY_SOCKET %s: %s", place, error)


def _raise_descriptor_limit() -> None:
    """Take as many descriptors as one may: each endpoint needs two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _read_boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        # Without /proc no process can be recognized, and nothing is ever resumed.
        return ""


class Agent:
    """One running agent: applies effects, tells the core what happens."""

    def __init__(self, config: Config, journal: Path) -> None:
        """Start the switch and read the journal; ConfigError if it cannot be made."""
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._failure: BaseException | None = None
        self._door: Door | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._journal: Journal | None = self._open_journal(journal)
        self._switch = Switch(**config.quotas)
        self._links: Links | None = None
        self._is_settling = False
        try:
            self._membership = None if config.cluster is None else _load_membership(config.cluster)
            self._core = self._make_core()
            self._restore(journal)
            if self._membership is not None:
                self._links = self._make_links(self._membership)
        except BaseException:
            self._switch.close()
            raise

    def _open_journal(self, path: Path) -> Journal | None:
        boot = _read_boot()
        for _ in range(2):
            try:
                return Journal(path, boot)
            except JournalError as error:
                self._set_aside(path, error)
        _log.error("no journal can be kept: clients cannot resume after a restart")
        return None

    def _set_aside(self, path: Path, why: object) -> None:
        _log.error("%s", why)
        try:
            _log.error("the journal is set aside as %s; the agent begins empty", set_aside(path))
        except JournalError as error:
            _log.error("%s", error)

    def _make_core(self) -> Core:
        name = self._config.node or socket.gethostname() or "localhost"
        if self._membership is not None:
            name = self._membership.identity.name
        about = About(
            node=check_node(name),
            version=VERSION,
            epoch=1 if self._journal is None else self._journal.epoch,
            pid=os.getpid(),
            uid=os.geteuid(),
            started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        config = self._config
        return Core(self._switch, about, secrets.token_bytes, config.limits, has_lanes=config.lanes)

    def _restore(self, path: Path) -> None:
        if self._journal is None:
            return
        try:
            self._core.restore(self._journal.read(), is_alive, self._loop.time())
        except (JournalError, RemoteProtocolError) as error:
            self._journal.close()
            self._set_aside(path, f"journal {path}: {error}")
            self._journal = self._open_journal(path)
            self._switch.close()
            self._switch = Switch(**self._config.quotas)
            self._core = self._make_core()

    def _make_links(self, membership: Membership) -> Links:
        from .links import Links

        config = self._config
        made = Links(
            self._loop,
            self._core,
            self._switch,
            membership,
            config.listen,
            config.places,
            self._settle,
            config.carrier,
            self._fail,
            config.stale_ok_s,
        )
        self._core.describe_cluster = made.describe
        return made

    async def close(self) -> None:
        """Tell clients, close everything. What may be resumed stays in the journal."""
        if self._timer is not None:
            self._timer.cancel()
        is_empty = self._core.is_empty
        self._core.stop()
        self._apply_all()
        if self._links is not None:
            await self._links.close()
        if self._door is not None:
            self._door.close()
        # The lines end only now, when clients could read why.
        self._switch.close()
        if self._journal is not None:
            if is_empty:
                self._journal.remove()
            else:
                self._journal.close()

    async def serve(self, listener: socket.socket, announce: Callable[[], None]) -> None:
        """Serve clients until a signal comes."""
        self._door = Door(listener, self, self._config.connections)
        before = self._loop.get_exception_handler()
        self._loop.set_exception_handler(self._on_exception)
        self._loop.add_reader(self._switch.fileno(), self._on_switch)
        is_main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if is_main else ()
        for number in signals:
            self._loop.add_signal_handler(number, self._stopped.set)
        try:
            self._settle()
            announce()
            await self._stopped.wait()
            if self._failure is not None:
                raise self._failure
        finally:
            for number in signals:
                self._loop.remove_signal_handler(number)
            self._loop.remove_reader(self._switch.fileno())
            self._loop.set_exception_handler(before)

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        failure = context.get("exception")
        loop.default_exception_handler(context)
        if failure is not None:
            self._fail(failure)

    def _fail(self, failure: BaseException) -> None:
        """End with the first failure."""
        if self._failure is None:
            self._failure = failure
            self._stopped.set()

    # --- what happens ---

    def receive_connection(self, connection: ConnectionId, credentials: Credentials) -> None:
        """Tell the core that somebody has come."""
        _log.debug("connection %d: %s", connection, credentials)
        self._core.receive_connection(connection, credentials, self._loop.time())
        self._settle()

    def receive_packet(self, connection: ConnectionId, data: bytes) -> None:
        """Tell the core what a client says."""
        self._core.receive_packet(connection, data, self._loop.time())
        self._settle()

    def receive_end(self, connection: ConnectionId) -> None:
        """Tell the core that a client is gone."""
        _log.debug("connection %d: ended", connection)
        self._core.receive_end(connection)
        self._settle()

    def _on_switch(self) -> None:
        try:
            events = self._switch.take_events()
        except RuntimeError as error:
            # It says so at each call, and would be asked for ever.
            self._loop.remove_reader(self._switch.fileno())
            self._fail(SwitchError(f"{error}; the agent ends, and its clients can resume"))
            return
        for endpoint, event, rule in events:
            _log.info("endpoint %d: %s: %s", endpoint, event, rule)
            self._core.receive_event(endpoint, event, rule)
        for sender, receiver, *numbers in self._switch.take_unread_on_lanes():
            _log.info("lane from %d to %d: it could not be read", sender, receiver)
            first, last, count = numbers
            self._core.receive_unread(sender, receiver, (first, last, count))
        if self._links is not None:
            self._links.receive_lanes()
        self._settle()

    def _on_timer(self) -> None:
        self._timer = None
        self._core.handle_timer(self._loop.time())
        self._settle()

    # --- what is to be done ---

    def _settle(self) -> None:
        """Apply the effects of one input, and wait for the time that the core wants next."""
        if self._is_settling:
            # Whoever settles already goes on until there is nothing more.
            return
        self._is_settling = True
        try:
            self._apply_all()
            while self._links is not None and self._links.settle():
                self._apply_all()
        finally:
            self._is_settling = False
        due = self._core.get_timer()
        if self._timer is not None and self._timer.when() != due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and due is not None:
            self._timer = self._loop.call_at(due, self._on_timer)

    def _apply_all(self) -> None:
        entries: list[Put | Drop] = []
        for effect in self._core.take_effects():
            if isinstance(effect, Put | Drop):
                entries.append(effect)
                continue
            self._write(entries)
            entries = []
            self._apply(effect)
        self._write(entries)
        self._commit()

    def _write(self, entries: list[Put | Drop]) -> None:
        if self._journal is not None and entries:
            try:
                self._journal.write(entries)
            except JournalError as error:
                self._give_up_journal(error)

    def _apply(self, effect: Send | Cut | Deliver | Notify | Signal | Audit) -> None:
        match effect:
            case Send(connection, frame, fds):
                self._commit()
                if isinstance(frame, Closed):
                    _log.info("connection %d: %s: %s", connection, frame.code.name, frame.text)
                elif isinstance(frame, Result) and not frame.is_ok:
                    _log.info("connection %d: refused: %s", connection, frame.value)
                assert self._door is not None, "nobody is there before the door"
                self._door.send(connection, frame, fds)
            case Cut(connection):
                assert self._door is not None, "nobody is there before the door"
                self._door.cut(connection)
            case Deliver():
                self._commit()
                self._switch.deliver(
                    effect.source,
                    effect.target,
                    effect.src,
                    effect.dst,
                    effect.ctl,
                    effect.body,
                    effect.serial,
                    effect.reply_to,
                    effect.deadline_ms,
                )
            case Notify(endpoints, body):
                self._commit()
                self._switch.notify(endpoints, body)
            case Signal(trunk, data):
                self._commit()
                self._switch.signal(trunk, data)
            case Audit(text):
                _log.warning("audit: %s", text)

    def _commit(self) -> None:
        if self._journal is not None:
            try:
                self._journal.commit()
            except JournalError as error:
                self._give_up_journal(error)

    def _give_up_journal(self, why: JournalError) -> None:
        """Go on without: a journal that is half true would resume what is not so."""
        _log.error("%s; from now on clients cannot resume after a restart", why)
        if self._journal is not None:
            self._journal.remove()
            self._journal = None
