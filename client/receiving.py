"""The receiving half of a socket: messages, batches, loans.

Invariants:

1. A gap (D12) is never skipped: who takes no control items gets it as `MessagesLost`.
2. What an agent that is gone had delivered is received before anything else.
"""

from __future__ import annotations

import errno
import socket as _socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from ..proto.errors import DeadlineExceeded, InvalidArgument, RingFull, error_for
from ..proto.limits import MESSAGE_BYTES
from .ancillary import GAP_SPACE, without_descriptors
from .direct import Direct
from .reception import KeptLoan, fitted, nothing
from .sending import GONE, SEND_FLAGS

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .._datapath import Loan, Received, Rings
    from ..proto.address import BusAddress

_RECEIVE_FLAGS: Final = SEND_FLAGS | _socket.MSG_PEEK | _socket.MSG_TRUNC | _socket.MSG_CMSG_CLOEXEC


class Receiving(Direct):
    """What of a `Socket` receives."""

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0) -> Received:
        """Receive one message: `(data, ancdata, msg_flags, address)`.

        Args:
            bufsize: In bytes. What is longer is cut to this, and `msg_flags` has MSG_TRUNC.
            ancbufsize: Room for control items, as CMSG_SPACE counts it; those that do not fit are
                left out, descriptors closed, and `msg_flags` has MSG_CTRUNC.
            flags: MSG_DONTWAIT; MSG_PEEK (the message is received again); MSG_TRUNC (nothing is
                cut, `msg_flags` still tells); MSG_CMSG_CLOEXEC changes nothing, it is always so.

        Returns:
            `ancdata` has, each only where there is one: SCM_RIGHTS; SCM_CREDENTIALS and
            SCM_IDENTITY (with SO_PASSCRED); SCM_TERMS or SCM_DST_ADDR of a multicast; SCM_SERIAL,
            SCM_REPLY_TO, SCM_GAP; the master's commands; SCM_SEQ and SCM_DST_ADDR of all (with
            SO_BUS_DETAILS). `msg_flags` may also have MSG_MONITOR: a monitor's copy (D19).
            `address` is the source.

        Raises:
            RingFull: Nothing is there, and the socket does not wait. EAGAIN.
            DeadlineExceeded: Nothing came for as long as the timeout. ETIMEDOUT.
            MessagesLost: A gap is next, and there is no room for its item. ENOBUFS.
            NotConnected: The agent is gone; the next call connects again. ENOTCONN.
        """
        return self._receive(1, bufsize, ancbufsize, flags)[0]

    def recvmmsg(
        self, count: int, bufsize: int, ancbufsize: int = 0, flags: int = 0
    ) -> list[Received]:
        """Receive 1 to `count` messages: as many as are there. Each as `recvmsg` returns it."""
        if count < 1:
            raise InvalidArgument(f"{count} messages cannot be received")
        return self._receive(count, bufsize, ancbufsize, flags)

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, BusAddress]:
        """Receive one message without its control items: `(data, address)`. As `recvmsg`."""
        message = self._receive(1, bufsize, 0, flags)[0]
        return message[0], message[3]

    def _recv_otherwise(self, bufsize: int, flags: int, number: int) -> bytes:
        """Do what `recv` leaves to us: what is not plain, and errors.

        Args:
            bufsize: As of `recv`.
            flags: As of `recv`.
            number: Why nothing was received in time, EAGAIN or ETIMEDOUT; 0: look again.
        """
        if number:
            self._receive_failed(number, self._endpoint.rings, self._timeout)
        try:
            return self._receive(1, bufsize, 0, flags)[0][0]
        finally:
            self._use_rings()

    def recv_many(self, count: int, bufsize: int, flags: int = 0) -> tuple[list[bytes], BusAddress]:
        """Receive the bodies of 1 to `count` messages of one source: `(bodies, address)`.

        As many calls of `recvfrom`, for as long as messages of the same source are there; it waits
        for the first of them only. It ends before whatever needs a call of its own: a message of
        another source, one with descriptors, a gap, an error; and it may end earlier, so fewer than
        `count` do not say that nothing more is there. The quickest way to receive many.

        Args:
            count: How many at most.
            bufsize: In bytes. What is longer is cut to this, without a word, as in `recv`.
            flags: As of `recvmsg`; with others than MSG_DONTWAIT it receives one message.

        Raises:
            BusError: As `recvmsg`, if the first message does.
        """
        if count < 1:
            raise InvalidArgument(f"{count} messages cannot be received")
        end = self._endpoint
        rings = end.rings
        if not flags & ~SEND_FLAGS and not end.local and not self._is_deaf and bufsize >= 0:
            timeout = self._receive_timeout(flags)
            found = rings.recv_run(count, bufsize, timeout)
            if type(found) is tuple:
                return found
            if found is not None:
                assert isinstance(found, int)
                timeout = self._receive_failed(-found, rings, timeout)
            message = self._receive_by(timeout, 1, bufsize, bufsize, 0)[0]
        else:
            message = self._receive(1, bufsize, 0, flags)[0]
        return [message[0]], message[3]

    def recvfrom_into(
        self, buffer: Buffer, nbytes: int = 0, flags: int = 0
    ) -> tuple[int, BusAddress]:
        """Receive one message into a buffer: `(size, address)`.

        `nbytes` 0 is all of the buffer. With MSG_TRUNC the size is that of the whole message, as
        in recv(2).
        """
        view = memoryview(buffer).cast("B")
        nbytes = nbytes or len(view)
        if not 0 < nbytes <= len(view):
            raise InvalidArgument(f"{nbytes} bytes do not fit into a buffer of {len(view)}")
        data, address = self.recvfrom(nbytes, flags)
        size = min(len(data), nbytes)
        view[:size] = data[:size]
        return len(data), address

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive the body of one message into a buffer; return its size. As `recvfrom_into`."""
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    def _recv_loan_otherwise(self, flags: int, number: int) -> Loan | KeptLoan:
        """Do what `recv_loan` leaves to us; as `_recv_otherwise`."""
        if flags & ~_socket.MSG_DONTWAIT:
            raise InvalidArgument(f"flags {flags:#x}: only MSG_DONTWAIT means something for a loan")
        if number:
            self._receive_failed(number, self._endpoint.rings, self._timeout)
        try:
            return self._recv_loan(flags)
        finally:
            self._use_rings()

    def _recv_loan(self, flags: int) -> Loan | KeptLoan:
        timeout = self._receive_timeout(flags)
        end = self._endpoint
        while True:
            rings = end.rings
            if end.local:
                with suppress(IndexError):  # another thread was faster
                    return KeptLoan(end.local.popleft())
            found = rings.recv_loan(timeout)
            if not isinstance(found, int):
                return found
            if found == -errno.EAGAIN and self._is_deaf:
                return KeptLoan(nothing())
            timeout = self._receive_failed(-found, rings, timeout)

    def _receive_timeout(self, flags: int) -> float | None:
        return 0.0 if flags & _socket.MSG_DONTWAIT or self._is_deaf else self._timeout

    def _receive(self, count: int, bufsize: int, ancbufsize: int, flags: int) -> list[Received]:
        """Receive 1 to `count` messages; a gap is only returned where its item has room."""
        timeout, size, is_peek = self._timeout, bufsize, False
        if flags or self._is_deaf:
            if flags & ~_RECEIVE_FLAGS:
                text = f"flags {flags & ~_RECEIVE_FLAGS:#x} mean nothing when receiving"
                raise InvalidArgument(text)
            timeout = self._receive_timeout(flags)
            is_peek = bool(flags & _socket.MSG_PEEK)
            size = MESSAGE_BYTES if flags & _socket.MSG_TRUNC else bufsize
        if bufsize < 0 or ancbufsize < 0:
            raise InvalidArgument("a buffer cannot have a negative size")
        return self._receive_by(timeout, count, bufsize, size, ancbufsize, is_peek)

    def _receive_by(  # noqa: PLR0913 (what recvmsg(2) takes, and when it ends)
        self,
        timeout: float | None,
        count: int,
        bufsize: int,
        size: int,
        ancbufsize: int,
        is_peek: bool = False,
    ) -> list[Received]:
        end = self._endpoint
        while True:
            rings = end.rings
            if end.local and (kept := self._take_local(is_peek)):
                return [fitted(kept, bufsize, size, ancbufsize)]
            found = rings.recv(count, size, ancbufsize, is_peek, timeout)
            if type(found) is list:
                break
            assert isinstance(found, int)
            if found == -errno.EAGAIN and self._is_deaf:
                return [nothing()]
            timeout = self._receive_failed(-found, rings, timeout)
        if size != bufsize:
            return [fitted(message, bufsize, size, ancbufsize) for message in found]
        # A gap for which there is no room comes alone, with its item.
        if ancbufsize < GAP_SPACE and found[0][1]:
            return [fitted(found[0], bufsize, size, ancbufsize), *found[1:]]
        return found

    def _take_local(self, is_peek: bool) -> Received | None:
        """Return the first message that is not in the ring; its descriptors go with it."""
        try:
            if not is_peek:
                return self._endpoint.local.popleft()
            data, items, flags, address = self._endpoint.local[0]
        except IndexError:  # another thread was faster
            return None
        return data, without_descriptors(items), flags, address

    def _receive_failed(self, number: int, rings: Rings, timeout: float | None) -> float | None:
        """Raise why nothing was received; return what is left of the timeout to try it again."""
        if number in GONE:
            return self._endpoint.recover(rings, timeout)
        if number == errno.EAGAIN:
            raise RingFull("nothing is there to be received")
        if number == errno.ETIMEDOUT:
            raise DeadlineExceeded(f"nothing was received within {timeout:g} s")
        raise error_for(number)
