"""What stands in place of the rings of an endpoint while it has none."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NoReturn, cast

from ..proto.errors import NotConnected

if TYPE_CHECKING:
    from .._datapath import Rings


class _NoRings:
    """Stands where the rings were when nothing can be sent or received any more."""

    def __init__(self, kind: type[OSError], *args: object) -> None:
        self._error = kind, args

    def _refuse(self, *_: object) -> NoReturn:
        kind, args = self._error
        raise kind(*args)

    send = send_body = lend_buffer = send_loan = send_many = recv = recv_run = recv_loan = _refuse
    set_details = set_pollable = _refuse

    def close(self) -> None:
        """Do nothing."""


class _LostRings:
    """Stands where the rings were when the agent is gone: every call says that, and waits not."""

    def send(self, *_: object) -> int:
        """Send nothing."""
        return -errno.ENOTCONN

    send_body = lend_buffer = send_loan = recv = recv_run = recv_loan = send

    def send_many(self, *_: object) -> tuple[int, int]:
        """Send nothing."""
        return 0, -errno.ENOTCONN

    def set_details(self, _on: bool) -> None:
        """Do nothing: the next rings are told."""

    def set_pollable(self) -> None:
        """Do nothing: the line is closed, and readable as such."""

    def close(self) -> None:
        """Do nothing."""


#: The agent is gone, and may come back.
LOST: Final = cast("Rings", _LostRings())
CLOSED: Final = cast("Rings", _NoRings(OSError, errno.EBADF, "the socket is closed"))
#: This process is a child that `fork` made.
INHERITED: Final = cast(
    "Rings",
    _NoRings(NotConnected, "sockets of the bus are not inherited over fork: make one of your own"),
)
