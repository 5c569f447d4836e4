"""The door: the connection to the agent that carries control, one frame a packet.

Calls are made one at a time and block until the agent has answered; that is a matter of
microseconds, so non-blocking sockets make them too. An agent that does not answer for `ANSWER_S` is
reported, never waited for without end. On a bus of the cluster some calls are other nodes' and the
cluster's master's to answer, too; for these it is `FAR_S`.

Invariants:

1. What is wrong at the door is told with its path and with what to do.
2. A descriptor that arrives has an owner at once, and is closed if the agent broke a rule.
3. A call whose answer never came is NotConnected if it may simply be made again, and OutcomeUnknown
   if it carried a message.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ..proto import frames
from ..proto.errors import (
    BusError,
    CloseCode,
    DeadlineExceeded,
    Denied,
    NameTooLong,
    NoAgent,
    NotConnected,
    OutcomeUnknown,
    RemoteProtocolError,
    ShareExceeded,
)
from ..proto.frames import Call, Closed, Frame, Hello, Op, Result, Welcome
from ..proto.limits import FRAME_BYTES
from ..proto.version import is_spoken

#: How long an agent may take to answer.
ANSWER_S: Final = 10.0
#: And if it must ask others: it gives up 15 s after it has asked the cluster's master, and 12 s
#: after another node has fallen silent, which may have asked the master in its turn.
FAR_S: Final = 45.0
_FAR: Final = frozenset((Op.BIND, Op.CONTROL, Op.CHALLENGE, Op.PROVE))
#: The door's place below a runtime directory, and the system's.
_WITHIN: Final = Path("afbus/node.sock")
_SYSTEM: Final = Path("/run") / _WITHIN

_TIMEVAL: Final = struct.Struct("@ll")
_DESCRIPTORS: Final = 3
_HOW_TO_START: Final = "`afbus node` starts an agent, AFBUS_NODE names the door of another one"


def find_door(node: str | os.PathLike[str] | None = None) -> Path:
    """Return the place of the agent's door.

    It is `node` if given, else AFBUS_NODE, else the user's if there is one, else the system's.
    """
    if node is not None:
        return Path(node)
    if named := os.environ.get("AFBUS_NODE"):
        return Path(named)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        users = Path(runtime) / _WITHIN
        if users.exists():
            return users
    return _SYSTEM


class Door:
    """One connection to an agent; threads may share it."""

    def __init__(self, place: Path) -> None:
        """Connect, and say nothing yet.

        Raises:
            NoAgent: Nobody answers there. ECONNREFUSED.
            Denied: The door is there, but not for this user. EPERM.
            NameTooLong: No socket can have such a path. ENAMETOOLONG.
        """
        self.place = place
        #: The last that the agent said, once it was read.
        self.closed: Closed | None = None
        self._lock = threading.Lock()
        self._serial = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # Not `settimeout`: that would refuse to wait for an agent whose backlog is full.
            self._set_limit(socket.SO_SNDTIMEO, ANSWER_S)
            self._set_limit(socket.SO_RCVTIMEO, ANSWER_S)
            self._connect()
        except BaseException:
            self._socket.close()
            raise

    def _set_limit(self, name: int, seconds: float) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, name, _TIMEVAL.pack(int(seconds), 0))

    def _connect(self) -> None:
        try:
            self._socket.connect(os.fspath(self.place))
        except PermissionError as error:
            raise Denied(f"the door {self.place} is not open to this user") from error
        except BlockingIOError as error:
            text = f"the agent at {self.place} lets nobody in for {ANSWER_S:g} s"
            raise NoAgent(text) from error
        except OSError as error:
            if error.errno is None:  # Python's own: the path does not fit into a sockaddr_un
                raise NameTooLong(f"the path of the door {self.place} is too long") from error
            text = f"no agent at {self.place} ({error.strerror}); {_HOW_TO_START}"
            raise NoAgent(text) from error

    def hello(self, hello: Hello) -> tuple[Welcome, list[int]]:
        """Begin as an endpoint.

        Returns:
            What the agent said, and three descriptors, the caller's: TX ring, RX ring, line.

        Raises:
            NoAgent: The agent refused, or went away. ECONNREFUSED.
            ShareExceeded: The principal has too many endpoints. EDQUOT.
            RemoteProtocolError: What answered is no agent, or one of another version.
        """
        descriptors: list[int] = []
        try:
            # An agent that lets nobody in says why and is gone, maybe before it is greeted.
            with suppress(BrokenPipeError, ConnectionResetError):
                self._socket.send(frames.encode(hello))
            frame = self._receive(descriptors)
            match frame:
                case Welcome(version=version) if not is_spoken(version):
                    text = f"the agent at {self.place} speaks version {version}, not ours"
                    raise RemoteProtocolError(text, CloseCode.VERSION)
                case Welcome() if len(descriptors) == _DESCRIPTORS:
                    return frame, descriptors
                case Closed(CloseCode.SHARE, text):
                    raise ShareExceeded(text)
                case Closed(_, text):
                    raise NoAgent(f"the agent at {self.place} refused: {text}")
                case None:
                    raise NoAgent(f"the agent at {self.place} went away; {_HOW_TO_START}")
                case _:
                    text = f"not a welcome with {_DESCRIPTORS} descriptors from {self.place}"
                    raise RemoteProtocolError(text)
        except BaseException as error:
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(error, BlockingIOError):
                text = f"the agent at {self.place} does not answer for {ANSWER_S:g} s"
                raise NoAgent(text) from error
            if isinstance(error, OSError) and not isinstance(error, BusError):
                text = f"the agent at {self.place} went away; {_HOW_TO_START}"
                raise NoAgent(text) from error
            raise

    def _receive(self, descriptors: list[int] | None = None) -> Frame | None:
        """Return the next frame, None at the end; what came with it is appended."""
        room = socket.CMSG_SPACE(4 * _DESCRIPTORS) if descriptors is not None else 0
        data, items, flags, _ = self._socket.recvmsg(FRAME_BYTES + 1, room, socket.MSG_CMSG_CLOEXEC)
        if descriptors is not None:
            for level, kind, payload in items:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors += array.array("i", payload)
        if not data:
            return None
        if flags & socket.MSG_TRUNC:
            raise RemoteProtocolError(f"frame of more than {FRAME_BYTES} bytes", CloseCode.LIMIT)
        return frames.decode(data)

    def call(self, op: Op, args: dict[str, Any]) -> Any:
        """Ask the agent for something; return its result.

        Raises:
            BusError: The agent refused; the class is the one that it named.
            NotConnected: It is gone. ENOTCONN.
            OutcomeUnknown: It went away after it had been given a message. ECONNABORTED.
            DeadlineExceeded: It did not answer in time. ETIMEDOUT.
            TooBig: The arguments do not fit into a frame. EMSGSIZE.
        """
        with self._lock:
            self._serial += 1
            packet = frames.encode(Call(self._serial, op, args))
            try:
                self._socket.send(packet)
            except BlockingIOError as error:
                raise DeadlineExceeded(self._silence(op)) from error
            except OSError as error:
                raise NotConnected(self.read_farewell()) from error
            is_far = op in _FAR
            try:
                if is_far:
                    self._set_limit(socket.SO_RCVTIMEO, FAR_S)
                result = self._receive_result()
            except BlockingIOError as error:
                if op is Op.CONTROL:
                    raise OutcomeUnknown(self._silence(op)) from error
                raise DeadlineExceeded(self._silence(op)) from error
            except NotConnected as error:
                if op is Op.CONTROL:
                    raise OutcomeUnknown(f"{error.message} before it answered") from error
                raise
            finally:
                # Another thread may have closed it.
                with suppress(OSError):
                    self._set_limit(socket.SO_RCVTIMEO, ANSWER_S)
        if not result.is_ok:
            raise result.to_error()
        return result.value

    def _receive_result(self) -> Result:
        """Return the result of the newest call; those of calls that were given up come first."""
        while True:
            try:
                frame = self._receive()
            except ConnectionError:
                frame = None
            match frame:
                case Result(serial=serial) if serial == self._serial:
                    return frame
                case Result(serial=serial) if serial < self._serial:
                    continue
                case None | Closed():
                    self.closed = frame
                    raise NotConnected(self._farewell())
                case _:
                    raise RemoteProtocolError(f"not the result of call {self._serial}")

    def _silence(self, op: Op) -> str:
        limit = FAR_S if op in _FAR else ANSWER_S
        return f"the agent at {self.place} did not answer {op.name} within {limit:g} s"

    def _farewell(self) -> str:
        if self.closed is None:
            return f"the agent at {self.place} is gone"
        return f"the agent at {self.place} ended the connection: {self.closed.text}"

    def read_farewell(self) -> str:
        """End the connection; return why the agent is gone, as far as it said so.

        Does not wait. An agent that is being killed may have closed the line and not yet this
        connection: without its end a later call would be sent there.
        """
        try:
            self._socket.setblocking(False)
            while self.closed is None and (frame := self._receive()) is not None:
                self.closed = frame if isinstance(frame, Closed) else None
        except (OSError, RemoteProtocolError):
            pass  # a farewell is a courtesy; that the agent is gone is known already
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        return self._farewell()

    def close(self) -> None:
        """Close the connection; harmless when repeated."""
        self._socket.close()
