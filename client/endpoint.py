"""One endpoint: door, rings and line, and how it comes back when its agent was lost (D16).

    connected --the line is closed: one call raises NotConnected--> lost --next call--> connected

Invariants:

1. The number of the line never changes: the line of a new agent is put in its place.
2. What the old agent had delivered is read before anything else, whichever thread finds the agent
   gone: it is taken out of the old ring into `local`.
3. What the new agent did not give back is told by a notice in `local`, before any new message.
4. Nothing is sent, received or closed in a child that `fork` made; the parent notices nothing.
5. Whoever uses `rings` takes them before looking at `local`: then none of `local` is passed over.
   Rings that were replaced refuse every call, and the caller looks again.

Locks: `_renewing`, then the door's. The rings have their own.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from .._datapath import RAW, TERMS, UNICAST, Rings
from ..proto.address import BusAddress
from ..proto.control import BUS_SOCKET, SO_BUS_ADDRESSES, SO_BUS_MASTER
from ..proto.errors import (
    BadDestination,
    BusError,
    CloseCode,
    DeadlineExceeded,
    InvalidArgument,
    NoAgent,
    NoSuchEndpoint,
    NotConnected,
)
from ..proto.frames import Hello, Op, Welcome
from ..proto.limits import (
    CONTROL_ITEM_BYTES,
    CONTROL_ITEMS,
    MESSAGE_BYTES,
    RING_BYTES_MAX,
    RING_BYTES_MIN,
)
from ..proto.notice import Event, GapReason, Notice
from ..proto.operation import endpoint_claim
from .absent_rings import CLOSED, INHERITED, LOST
from .ancillary import close_descriptors
from .door import Door, find_door

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from .._datapath import Received
    from .proof import Proof

#: Pauses between attempts to connect again, in seconds: the first, and the longest.
_FIRST_PAUSE_S: Final = 0.001
_LONGEST_PAUSE_S: Final = 0.1
_log = logging.getLogger(__name__)

#: How long to wait for a thread that is still receiving when the agent is gone.
_LEFTOVERS_S: Final = 0.1
#: Destinations that are remembered; when there are more, all are forgotten.
_ROUTES: Final = 1024
#: Room for all the control items that a message can have.
_ALL_ITEMS: Final = CONTROL_ITEMS * (CONTROL_ITEM_BYTES + 32)
#: Packet of the line: answer with a wake-up (docs/internals.md).
_PING: Final = b"p"

_LIVE: weakref.WeakSet[Endpoint] = weakref.WeakSet()


def _check_size(what: str, size: int) -> None:
    if not RING_BYTES_MIN <= size <= RING_BYTES_MAX or size & (size - 1):
        limits = f"{RING_BYTES_MIN} to {RING_BYTES_MAX}"
        raise InvalidArgument(f"{what} {size} is not a power of two from {limits}")


class Endpoint:
    """One endpoint; `Socket` is what an application sees of it."""

    def __init__(self, node: str | os.PathLike[str] | None, tx_bytes: int, rx_bytes: int) -> None:
        """Connect; errors as `Socket`."""
        _check_size("tx_bytes", tx_bytes)
        _check_size("rx_bytes", rx_bytes)
        self._place = find_door(node)
        self._sizes = tx_bytes, rx_bytes
        self._renewing = threading.Lock()
        self._is_pollable = False
        # Why the agent is gone, until a caller was told.
        self._obituary: str | None = None
        #: Whether the agent went on without this endpoint when it was lost the last time.
        self.was_cut_off = False
        self._bound: dict[str, Any] | None = None
        self._proof: Proof | None = None
        self._options: dict[tuple[int, int], int | bytes | None] = {}
        self._owned: tuple[bytes, ...] = ()
        #: The bus, None until `attach` or `bind`.
        self.path: bytes | None = None
        #: Where messages go: the id of an address object to kind, destination, and that object,
        #: which must live for as long as its id is a key.
        self.routes: dict[int, tuple[int, bytes, object]] = {}
        #: Messages that are received before those in the ring.
        self.local: deque[Received] = deque()
        self.has_details = False
        self._door = Door(self._place)
        try:
            hello = Hello(tx_bytes=tx_bytes, rx_bytes=rx_bytes)
            self.welcome, (tx, rx, self.line) = self._door.hello(hello)
            try:
                self.rings = self._map(tx, rx)
            except BaseException:
                os.close(self.line)
                raise
        except BaseException:
            self._door.close()
            raise
        _LIVE.add(self)

    def _map(self, tx: int, rx: int) -> Rings:
        """Return the rings of two descriptors, which are closed, and of the line, which is not."""
        try:
            return Rings(tx, rx, self.line, self._name_source, self._name_destination)
        finally:
            os.close(tx)
            os.close(rx)

    def _name_source(self, source: bytes, is_kernel: bool) -> BusAddress:
        assert self.path is not None
        return BusAddress.kernel(self.path) if is_kernel else BusAddress(self.path, source)

    def _name_destination(self, dst: bytes, kind: int) -> bytes:
        assert self.path is not None
        if kind in (RAW, TERMS):
            return BusAddress.multicast(self.path, dst).pack()
        return BusAddress(self.path, dst).pack()

    # calls at the door

    def call(self, op: Op, timeout: float | None, **args: Any) -> Any:
        """Ask the agent for something; errors as `Door.call`.

        `timeout` says how long to try to connect again, if the agent was lost before.
        """
        while True:
            rings = self.rings
            self.check_usable()
            try:
                return self._door.call(op, args)
            except NotConnected:
                timeout = self.recover(rings, timeout)

    def check_usable(self) -> None:
        """Raise OSError (EBADF) if it was closed, NotConnected if a parent process has it."""
        if self.line < 0:
            self.rings.set_pollable()  # says why nothing can be done any more

    def attach(self, path: bytes, timeout: float | None) -> Any:
        """Be on a bus; the result is that of ATTACH."""
        if self.path not in (None, path):
            text = "a socket is on one bus: make another one for"
            raise NoSuchEndpoint(f"{text} {os.fsdecode(path)}; this is on {self._bus}")
        with self._on(path):
            return self.call(Op.ATTACH, timeout, path=path)

    def prove(self, proof: Proof, timeout: float | None) -> str:
        """Be the principal of a certificate; return its name."""
        principal = self._prove(lambda op, args: self.call(op, timeout, **args), proof)
        self._proof = proof
        return principal

    @staticmethod
    def _prove(call: Callable[[Op, dict[str, Any]], Any], proof: Proof) -> str:
        asked = call(Op.CHALLENGE, {})
        about = asked["nonce"], asked["cluster"], asked["node"], asked["endpoint"]
        signature = proof.sign(endpoint_claim(*about))
        proven = call(Op.PROVE, {"chain": list(proof.chain), "signature": signature})
        return str(proven["principal"])

    def bind(
        self, address: BusAddress, options: Mapping[str, str | int], timeout: float | None
    ) -> None:
        """Create a bus, and be its master."""
        bound = {"address": address.pack(), "options": dict(options)}
        with self._on(address.path):
            self.call(Op.BIND, timeout, **bound)
        self._bound = bound
        self._owned = (address.address,)

    @contextmanager
    def _on(self, path: bytes) -> Iterator[None]:
        """Be on a bus already while the agent is asked to: messages may come before its answer."""
        before, self.path = self.path, path
        try:
            yield
        except BaseException:
            self.path = before
            raise

    @property
    def _bus(self) -> str:
        return "no bus" if self.path is None else os.fsdecode(self.path)

    def set_option(
        self, level: int, name: int, value: int | bytes | None, timeout: float | None
    ) -> None:
        """Set an option of the agent's, and remember it for the next agent."""
        self.call(Op.OPTION_SET, timeout, level=level, name=name, value=value)
        self._options[level, name] = value

    def option(self, level: int, name: int) -> int | bytes | None:
        """Return the option that was set, None if none was."""
        return self._options.get((level, name))

    def set_details(self, on: bool) -> None:
        """Let each received message bear its number and its destination."""
        self.rings.set_details(on)
        self.has_details = on

    def ask_addresses(self, timeout: float | None) -> list[BusAddress]:
        """Return the owned addresses, oldest first."""
        packed = self.call(Op.OPTION_GET, timeout, level=BUS_SOCKET, name=SO_BUS_ADDRESSES)
        addresses = [BusAddress.unpack(one) for one in packed]
        self._owned = tuple(address.address for address in addresses)
        return addresses

    def has_joined(self, timeout: float | None) -> bool:
        """Tell whether the endpoint has an address, as far as can be found out."""
        if not self._owned:
            with suppress(BusError):
                return bool(self.ask_addresses(timeout))
        return True

    def has_master(self, timeout: float | None) -> bool:
        """Tell whether the bus has a master now, as far as can be found out."""
        with suppress(BusError):
            master = self.call(Op.OPTION_GET, timeout, level=BUS_SOCKET, name=SO_BUS_MASTER)
            return master is not None
        return True

    def resize(self, tx_bytes: int, rx_bytes: int) -> None:
        """Have rings of other sizes, as a new endpoint of the agent: only while it is on no bus.

        Raises:
            InvalidArgument: Such a ring cannot be, or the endpoint is on a bus. EINVAL.
            NoAgent, ShareExceeded: As when a socket is made.
        """
        _check_size("tx_bytes", tx_bytes)
        _check_size("rx_bytes", rx_bytes)
        with self._renewing:
            self.check_usable()
            if self.path is not None:
                raise InvalidArgument(f"rings keep their sizes once a socket is on {self._bus}")
            self._sizes = tx_bytes, rx_bytes
            if self.rings is not LOST:
                rings, self.rings = self.rings, LOST
                rings.close()
                with suppress(NotConnected):
                    self._door.call(Op.CLOSE, {})
            self._renew()

    # destinations

    def find_route(self, address: Any, timeout: float | None) -> tuple[int, bytes, object]:
        """Return kind and destination of an address, and remember them; attach if need be.

        The destination of a multicast that is stated in terms is empty.

        Raises:
            BadDestination: It is the kernel's address, or none. EDESTADDRREQ.
            NoBus, NoSuchEndpoint: As `attach`.
            InvalidArgument: It is no address. EINVAL.
        """
        where = to_address(address)
        if where.is_kernel:
            raise BadDestination(f"nobody can send to the kernel's address {where}")
        if where.path != self.path:
            self.attach(where.path, timeout)
        kind = UNICAST
        if where.is_multicast:
            kind = RAW if where.address else TERMS
        route = (kind, where.address, address)
        if len(self.routes) >= _ROUTES:
            self.routes.clear()
        self.routes[id(address)] = route
        return route

    # waiting by poll

    def make_pollable(self) -> int:
        """Return the line, readable from now on while there is something to read; -1 if closed."""
        if not self._is_pollable and self.rings is not CLOSED:
            self.rings.set_pollable()
            self._is_pollable = True
            self._ping()
        return self.line

    def _ping(self) -> None:
        """Make the line readable if something is in `local`, which the rings do not know."""
        if self._is_pollable and self.local:
            # A full line is readable soon anyway, a closed one is already.
            with suppress(OSError):
                os.write(self.line, _PING)

    # when the agent is gone

    def recover(self, seen: Rings, timeout: float | None) -> float | None:
        """Tell that the agent is gone, and the next time connect again.

        Args:
            seen: The rings that could not be used.
            timeout: How long to try, in seconds: None without end, 0 once.

        Returns:
            What is left of the timeout; the caller begins anew, with `rings`.

        Raises:
            NotConnected: The agent is gone; this is told once. ENOTCONN.
            NoAgent: There is none yet, and the caller does not wait. ECONNREFUSED.
            DeadlineExceeded: There was none for all of the timeout. ETIMEDOUT.
        """
        with self._renewing:
            if self.rings is not seen:
                return timeout
            if seen is not LOST:
                self._lose()
            if self._obituary is not None:
                text, self._obituary = self._obituary, None
                raise NotConnected(f"{text}; the next call connects again")
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = _FIRST_PAUSE_S
        while (failure := self._try_renew()) is not None:
            left = None if deadline is None else deadline - time.monotonic()
            if timeout == 0:
                raise failure
            if left is not None and left <= 0:
                raise DeadlineExceeded(f"{failure.message} (for {timeout:g} s)") from failure
            time.sleep(pause if left is None else min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        if deadline is None or timeout == 0:
            return timeout
        # A timeout that is used up must not become one that never waits.
        return max(deadline - time.monotonic(), _FIRST_PAUSE_S)

    def look_after(self, seen: Rings) -> None:
        """See why there was no verdict: if the agent is gone, the next call tells that."""
        with self._renewing:
            if self.rings is not seen:
                return
            poller = select.poll()
            poller.register(self.line, 0)
            if poller.poll(0):
                self._lose()

    def _lose(self) -> None:
        """Keep what the old agent had delivered, and use its rings no more."""
        rings = self.rings
        while True:
            found = rings.recv(64, MESSAGE_BYTES, _ALL_ITEMS, False, _LEFTOVERS_S)
            if isinstance(found, int):
                break
            self.local += found
        self.rings = LOST
        rings.close()
        self._obituary = self._door.read_farewell()
        closed = self._door.closed
        self.was_cut_off = closed is not None and closed.code is not CloseCode.GOING_DOWN

    def _try_renew(self) -> BusError | None:
        with self._renewing:
            if self.rings is not LOST:
                return None
            try:
                self._renew()
            except (NoAgent, NotConnected, DeadlineExceeded) as error:
                return error
            return None

    def _renew(self) -> None:
        """Connect again, and be what the endpoint was before."""
        door = Door(self._place)
        try:
            hello = Hello(
                resume=self.welcome.token, tx_bytes=self._sizes[0], rx_bytes=self._sizes[1]
            )
            welcome, descriptors = door.hello(hello)
            try:
                notices = self._restore(door, welcome)
                tx, rx, line = descriptors
                os.dup2(line, self.line, inheritable=False)
                descriptors[:] = [line]
                rings = self._map(tx, rx)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
        except BaseException:
            door.close()
            raise
        rings.set_details(self.has_details)
        if self._is_pollable:
            rings.set_pollable()
        self.local += notices
        self._door.close()
        self._door, self.welcome = door, welcome
        self.rings = rings
        self._ping()

    def _restore(self, door: Door, welcome: Welcome) -> list[Received]:
        """Let a new agent know what it does not, and return the notices of what is lost."""
        if self._proof is not None and not welcome.resumed:
            try:
                self._prove(door.call, self._proof)
            except NotConnected:
                raise
            except BusError as error:
                _log.warning("it is nobody but its user to the new agent: %s", error)
        for (level, name), value in self._options.items():
            door.call(Op.OPTION_SET, {"level": level, "name": name, "value": value})
        if self.path is None:
            return []
        kernel = BusAddress.kernel(self.path)
        notices = []
        if welcome.epoch != self.welcome.epoch:
            text = "the agent began anew: what it held for this endpoint is lost"
            detail = {"reason": int(GapReason.AGENT_RESTART)}
            notices.append(Notice(Event.GAP, (), text, detail))
        if not welcome.resumed:
            text = "the agent does not know this endpoint any more: its addresses, matches and "
            text += f"grants are gone{self._restore_bus(door, self.path)}"
            notices.append(Notice(Event.REVOKED, self._owned, text, {"everything": 1}))
            self._owned = () if self._bound is None else self._owned
        return [(notice.encode(), [], 0, kernel) for notice in notices]

    def _restore_bus(self, door: Door, path: bytes) -> str:
        """Be on the bus again, as its master if it was that; return what to say of it."""
        try:
            if self._bound is not None:
                door.call(Op.BIND, self._bound)
                return "; it is the master of its bus again"
            door.call(Op.ATTACH, {"path": path})
        except NotConnected:
            raise
        except BusError as error:
            # The next send says this again, to a caller who can do something about it.
            self.path = self._bound = None
            self.routes.clear()
            return f"; it is on no bus ({error.message})"
        return ""

    # the end

    def close(self) -> None:
        """Leave in good order; errors of the last call are raised when all is closed."""
        with self._renewing:
            if self.line < 0:
                return
            rings, self.rings = self.rings, CLOSED
        try:
            if rings is not LOST:
                self._door.call(Op.CLOSE, {})
        except NotConnected:
            pass  # what was sent has its verdict, and there is nobody left to take leave of
        finally:
            rings.close()  # ends calls that wait in other threads
            self._drop()

    def abort(self) -> None:
        """Close everything without a word, as a process that dies does."""
        if self.line >= 0:
            rings, self.rings = self.rings, CLOSED
            rings.close()
            self._drop()

    def abandon(self) -> None:
        """Forget what belongs to the parent process, in a child that `fork` made."""
        if self.line >= 0:
            # Another thread of the parent may have held it.
            self._renewing = threading.Lock()
            # Only a mark in a child, for whoever still has them: rings and line are the parent's.
            self.rings.close()
            self._drop()
            self.rings = INHERITED

    def _drop(self) -> None:
        line, self.line = self.line, -1
        os.close(line)
        self._door.close()
        while self.local:
            close_descriptors(self.local.popleft()[1])
        self.routes.clear()

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, here or by leaving it to the parent process."""
        return self.line < 0

    def __repr__(self) -> str:
        """Return what a person wants to know of it."""
        if self.rings is INHERITED:
            return "inherited"
        if self.is_closed:
            return "closed"
        provisional = self.welcome.provisional.decode(errors="replace")
        return f"fd={self.line} endpoint={provisional} bus={self._bus}"


def to_address(address: Any) -> BusAddress:
    """Return what stands for an address: itself, `(path, address)` or `PATH:ADDRESS`.

    Raises:
        BadDestination: It is None. EDESTADDRREQ.
        InvalidArgument: It is nothing of this. EINVAL.
    """
    match address:
        case BusAddress():
            return address
        case str():
            return BusAddress.parse(address)
        case (str() | bytes() as path, str() | bytes() as within):
            return BusAddress(path, within)
        case None:
            raise BadDestination("a message needs an address, or a socket that is connected to one")
        case _:
            text = "not a BusAddress, (path, address) or text PATH:ADDRESS"
            raise InvalidArgument(f"{address!r} is {text}")


def _abandon_all() -> None:
    for endpoint in list(_LIVE):
        endpoint.abandon()


os.register_at_fork(after_in_child=_abandon_all)
