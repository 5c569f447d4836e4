"""Errors: one table, one-to-one and append-only, and what they are to `except`."""

from __future__ import annotations

import errno
import pickle

import pytest

from afbus.proto import errors
from afbus.proto.errors import TABLE, AfbusError, BusError, CloseCode
from afbus.proto.notice import Gap, GapReason

#: Codes as they were first published. A line may be added, none may ever change.
PUBLISHED = {
    1: "NoSuchEndpoint",
    2: "NotJoined",
    3: "NodeLost",
    4: "MasterLost",
    5: "Denied",
    6: "AddressInUse",
    7: "NotOwned",
    8: "BadDestination",
    9: "TooBig",
    10: "NameTooLong",
    11: "RingFull",
    12: "ShareExceeded",
    13: "WidthMismatch",
    14: "CannotCarry",
    15: "Stale",
    16: "NotConnected",
    17: "NoAgent",
    18: "NoBus",
    19: "OutcomeUnknown",
    20: "DeadlineExceeded",
    21: "InvalidArgument",
    22: "Cancelled",
    23: "MessagesLost",
    24: "ShutDown",
}


def test_codes_are_one_to_one_and_append_only() -> None:
    """The table holds every class once, under the code that it always had."""
    assert {code: cls.__name__ for cls, code, _ in TABLE} == PUBLISHED
    assert len({cls for cls, _, _ in TABLE}) == len(TABLE)
    assert {cls for cls, _, _ in TABLE} == set(BusError.__subclasses__())


@pytest.mark.parametrize(("cls", "code", "number"), TABLE)
def test_d7_each_class_has_its_errno(cls: type[BusError], code: int, number: int) -> None:
    """And is the builtin class that Python gives to that errno."""
    error = cls("why")
    assert error.errno == number == cls.ERRNO
    assert error.message == "why"
    assert isinstance(error, AfbusError)
    assert isinstance(error, type(OSError(number, "")))
    assert errors.to_wire(error) == code
    again = errors.from_wire(code, "why")
    assert type(again) is cls
    assert again.message == "why"
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    assert (type(copy), copy.errno, copy.message) == (cls, number, "why")


@pytest.mark.parametrize(
    ("number", "cls"),
    [
        (errno.EHOSTUNREACH, errors.NoSuchEndpoint),
        (-errno.EHOSTUNREACH, errors.NoSuchEndpoint),
        (errno.EHOSTDOWN, errors.NodeLost),
        (errno.EAGAIN, errors.RingFull),
        (-errno.EPERM, errors.Denied),
    ],
)
def test_d7_of_several_classes_the_most_general(number: int, cls: type[BusError]) -> None:
    """Where only an errno is known, as from a ring."""
    assert type(errors.error_for(number)) is cls


def test_unknown_numbers_give_the_plain_class() -> None:
    """A newer peer may know more than we do."""
    unknown = errors.error_for(errno.EXDEV, "why")
    assert type(unknown) is BusError
    assert unknown.errno == errno.EXDEV
    assert pickle.loads(pickle.dumps(unknown)).errno == errno.EXDEV  # noqa: S301 (our own bytes)
    newer = errors.from_wire(9999, "why")
    assert (type(newer), newer.errno) == (BusError, errno.EIO)
    assert errors.to_wire(newer) == 0


def test_builtin_classes_catch_them() -> None:
    """As with any socket."""
    assert isinstance(errors.RingFull(), BlockingIOError)
    assert isinstance(errors.DeadlineExceeded(), TimeoutError)
    assert isinstance(errors.InvalidArgument(), ValueError)
    assert str(errors.Denied()) == "[Errno 1] Operation not permitted"


def test_d12_lost_messages_name_their_gap() -> None:
    """Where there is one, also after a journey."""
    gap = Gap(b"1.7", 3, 9, 4, GapReason.FULL)
    error = errors.MessagesLost("4 of 1.7", gap=gap)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    assert (copy.errno, copy.message, copy.gap) == (errno.ENOBUFS, "4 of 1.7", gap)
    assert errors.MessagesLost().gap is None
    made = errors.error_for(-errno.ENOBUFS)
    assert isinstance(made, errors.MessagesLost)


def test_errors_that_are_no_refusals() -> None:
    """Protocol, link, identity and settings."""
    remote = errors.RemoteProtocolError("bad", CloseCode.LIMIT)
    assert (str(remote), remote.code) == ("bad", CloseCode.LIMIT)
    copy = pickle.loads(pickle.dumps(remote))  # noqa: S301 (our own bytes)
    assert (str(copy), copy.code) == ("bad", CloseCode.LIMIT)
    link = errors.LinkError("gone", after_s=1.5)
    assert (link.retryable, link.after_s) == (True, 1.5)
    assert errors.IdentityError("no").retryable is False
    config = errors.ConfigError("not a number", file="node.toml", key="ring")
    assert str(config) == "node.toml: ring: not a number"
    assert str(errors.ConfigError("empty")) == "empty"
