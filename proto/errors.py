"""The tree of errors, and the one table of class, wire code and errno.

An expected outcome is a value, a broken rule is one of these exceptions, a bug is an assertion.

Invariants:

1. `AfbusError` is never raised itself.
2. Every class below `BusError` has one errno and one wire code. Codes are one-to-one with classes
   and append-only; several classes may share an errno, and then the most general stands first.
3. A class is also the builtin class that Python gives to its errno, so `except PermissionError`,
   `except TimeoutError` and `except BlockingIOError` work as with any socket.
4. Decoders raise `RemoteProtocolError` and nothing else.
"""

from __future__ import annotations

import errno as _errno
import os
from enum import IntEnum
from typing import ClassVar, Final


class AfbusError(Exception):
    """The root of all errors of afbus; never raised itself."""


class BusError(AfbusError, OSError):
    """The application did something that the bus refuses; `errno` says what (D7).

    The class itself stands for a refusal that this version does not know.
    """

    #: The errno of the class.
    ERRNO: ClassVar[int] = _errno.EIO

    def __init__(self, message: str = "", *, errno: int | None = None) -> None:
        """Make the error.

        Args:
            message: What was refused and why; by default the text of the errno.
            errno: Only for `BusError` itself: the errno that no class stands for.
        """
        number = self.ERRNO if errno is None else errno
        OSError.__init__(self, number, message or os.strerror(number))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by message; the errno follows from the class or is state."""
        return type(self), (self.message,), {"errno": self.errno}

    @property
    def message(self) -> str:
        """The text without the errno in front."""
        return str(self.strerror)


class NoSuchEndpoint(BusError):
    """The unique address has no owner any more, or nobody would take the message (D7)."""

    ERRNO = _errno.EHOSTUNREACH


class NotJoined(BusError):
    """An endpoint without an address sent to somebody else than the master (R10, D7)."""

    ERRNO = _errno.EHOSTUNREACH


class NodeLost(BusError):
    """The node of the receiver cannot be reached (D7)."""

    ERRNO = _errno.EHOSTDOWN


class MasterLost(BusError):
    """The master is away, and the call needs it (D16)."""

    ERRNO = _errno.EHOSTDOWN


class Denied(BusError, PermissionError):
    """Policy or a missing grant forbids it (D5, D7, D9)."""

    ERRNO = _errno.EPERM


class AddressInUse(BusError):
    """The bus exists, or the address has an owner (D2, D3)."""

    ERRNO = _errno.EADDRINUSE


class NotOwned(BusError):
    """The source address is not the sender's, or nobody can own it (D6)."""

    ERRNO = _errno.EADDRNOTAVAIL


class BadDestination(BusError):
    """Nobody can send there: the kernel's address, or none at all (D6)."""

    ERRNO = _errno.EDESTADDRREQ


class TooBig(BusError):
    """The message is larger than the bus carries (D14)."""

    ERRNO = _errno.EMSGSIZE


class NameTooLong(BusError):
    """The path or the address does not fit; it is never cut (D1)."""

    ERRNO = _errno.ENAMETOOLONG


class RingFull(BusError, BlockingIOError):
    """The receiver has no room now, and the sender does not want to wait (D12)."""

    ERRNO = _errno.EAGAIN


class ShareExceeded(BusError):
    """The principal has used up its share (D18)."""

    ERRNO = _errno.EDQUOT


class WidthMismatch(BusError):
    """The filter has another width than the bus's (D7, D8)."""

    ERRNO = _errno.EDOM


class CannotCarry(BusError):
    """This cannot travel that way: descriptors to another host or to many (D7)."""

    ERRNO = _errno.EOPNOTSUPP


class Stale(BusError):
    """What the caller refers to has changed since: an epoch, a generation, a version."""

    ERRNO = _errno.EREMCHG


class NotConnected(BusError):
    """The own agent is gone (D16)."""

    ERRNO = _errno.ENOTCONN


class NoAgent(BusError, ConnectionRefusedError):
    """No agent answers at the door."""

    ERRNO = _errno.ECONNREFUSED


class NoBus(BusError, FileNotFoundError):
    """No bus has this path."""

    ERRNO = _errno.ENOENT


class OutcomeUnknown(BusError, ConnectionAbortedError):
    """The message may or may not have arrived; nobody is left who knows (D21)."""

    ERRNO = _errno.ECONNABORTED


class DeadlineExceeded(BusError, TimeoutError):
    """The deadline of the call has passed."""

    ERRNO = _errno.ETIMEDOUT


class InvalidArgument(BusError, ValueError):
    """The argument makes no sense in itself."""

    ERRNO = _errno.EINVAL


class Cancelled(BusError):
    """The call was given up by its own side, or the chain it stands in was refused."""

    ERRNO = _errno.ECANCELED


class MessagesLost(BusError):
    """A gap is next in order, and `recv` and `recvfrom` have no room to return it (D12).

    Raised once for each gap record, in the place where the messages are missing; the next call
    goes on behind it. `recvmsg` raises nothing: there the gap is a control item.
    """

    ERRNO = _errno.ENOBUFS

    def __init__(
        self, message: str = "", *, errno: int | None = None, gap: object | None = None
    ) -> None:
        """Make the error.

        Args:
            message: As for every refusal.
            errno: As for every refusal.
            gap: The `notice.Gap` that was next, if it is known.
        """
        super().__init__(message, errno=errno)
        self.gap = gap

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the gap too."""
        return type(self), (self.message,), {"errno": self.errno, "gap": self.gap}


class ShutDown(BusError, BrokenPipeError):
    """The sender has closed its sending direction itself (D20)."""

    ERRNO = _errno.EPIPE


#: Class, wire code, errno. Append only; never reuse a code.
TABLE: Final[tuple[tuple[type[BusError], int, int], ...]] = (
    (NoSuchEndpoint, 1, _errno.EHOSTUNREACH),
    (NotJoined, 2, _errno.EHOSTUNREACH),
    (NodeLost, 3, _errno.EHOSTDOWN),
    (MasterLost, 4, _errno.EHOSTDOWN),
    (Denied, 5, _errno.EPERM),
    (AddressInUse, 6, _errno.EADDRINUSE),
    (NotOwned, 7, _errno.EADDRNOTAVAIL),
    (BadDestination, 8, _errno.EDESTADDRREQ),
    (TooBig, 9, _errno.EMSGSIZE),
    (NameTooLong, 10, _errno.ENAMETOOLONG),
    (RingFull, 11, _errno.EAGAIN),
    (ShareExceeded, 12, _errno.EDQUOT),
    (WidthMismatch, 13, _errno.EDOM),
    (CannotCarry, 14, _errno.EOPNOTSUPP),
    (Stale, 15, _errno.EREMCHG),
    (NotConnected, 16, _errno.ENOTCONN),
    (NoAgent, 17, _errno.ECONNREFUSED),
    (NoBus, 18, _errno.ENOENT),
    (OutcomeUnknown, 19, _errno.ECONNABORTED),
    (DeadlineExceeded, 20, _errno.ETIMEDOUT),
    (InvalidArgument, 21, _errno.EINVAL),
    (Cancelled, 22, _errno.ECANCELED),
    (MessagesLost, 23, _errno.ENOBUFS),
    (ShutDown, 24, _errno.EPIPE),
)

_CLASS_OF_CODE: Final = {code: cls for cls, code, _ in TABLE}
_CODE_OF_CLASS: Final = {cls: code for cls, code, _ in TABLE}
_CLASS_OF_ERRNO: Final = {number: cls for cls, _, number in reversed(TABLE)}


def error_for(errno: int, message: str = "") -> BusError:
    """Return the error of an errno, of either sign: of several classes the most general."""
    number = abs(errno)
    cls = _CLASS_OF_ERRNO.get(number)
    return BusError(message, errno=number) if cls is None else cls(message)


def from_wire(code: int, message: str = "") -> BusError:
    """Return the error of a wire code; a code from a newer peer gives a plain `BusError`."""
    return _CLASS_OF_CODE.get(code, BusError)(message)


def to_wire(error: BusError) -> int:
    """Return the wire code of an error, 0 for a plain `BusError`."""
    return _CODE_OF_CLASS.get(type(error), 0)


class CloseCode(IntEnum):
    """Why one side ends a connection; the number travels in `Closed`."""

    MALFORMED = 1
    LIMIT = 2
    VERSION = 3
    ORDER = 4
    RING = 5
    EVICTED = 6
    GOING_DOWN = 7
    TAKEN_OVER = 8
    SHARE = 9
    DENIED = 10


class ProtocolError(AfbusError):
    """The language of this package was broken."""


class LocalProtocolError(ProtocolError):
    """Our own caller broke the order of calls: fix the code."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something illegal: close that connection, and only that one."""

    def __init__(self, message: str, code: CloseCode = CloseCode.MALFORMED) -> None:
        """Make the error; `code` is what the farewell to the peer carries."""
        super().__init__(message, code)
        self.message = message
        self.code = code

    def __str__(self) -> str:
        """Return the message alone."""
        return self.message


class LinkError(AfbusError):
    """The carrier failed."""

    def __init__(
        self, message: str, *, retryable: bool = True, after_s: float | None = None
    ) -> None:
        """Make the error.

        Args:
            message: What failed.
            retryable: Whether the same attempt may succeed later.
            after_s: When to try again at the earliest, if that is known.
        """
        super().__init__(message)
        self.retryable = retryable
        self.after_s = after_s


class IdentityError(LinkError):
    """A certificate or a name does not fit; trying again does not help."""

    def __init__(self, message: str) -> None:
        """Make the error; it is never retryable."""
        super().__init__(message, retryable=False)


class ConfigError(AfbusError):
    """A file of settings is wrong; only at start."""

    def __init__(self, message: str, *, file: str = "", key: str = "") -> None:
        """Make the error; `file` and `key` are named in its text."""
        place = ": ".join(part for part in (file, key) if part)
        super().__init__(f"{place}: {message}" if place else message)
        self.file = file
        self.key = key
