"""What is printed: lines and aligned tables for people, one JSON object a line for programs.

A JSON object of something that arrives has a `kind`:

    message  source, destination, terms, body, sequence, serial, reply_to, pid, uid, gid,
             principal, node, fds (how many came with it), fds_lost, copy; of `monitor` also
             request or answer, where a member talks with its master
    gap      source, first, last, count (null where nobody knows), reason
    notice   event, subject, reason, detail
    lost     text: something is missing that nobody can number

Addresses are in their text form, times in that of ISO 8601, in UTC. Bytes are text under their own
key if they are UTF-8, else base64 under the key with `_base64` behind it. What is not there is
null.

Invariants:

1. What strangers sent never reaches a terminal as control characters.
2. Every line is flushed at once: a pipe shows it when it happens.
"""

from __future__ import annotations

import base64
import json
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..client.message import Message
    from ..proto.address import BusAddress
    from ..proto.errors import MessagesLost
    from ..proto.notice import Gap, Notice


def epilog(title: str, *lines: str) -> str:
    """Return the end of a help text: lines that stay as they are."""
    return "\n\n".join((title, "\b\n" + "\n".join(f"  {line}" for line in lines))) + "\n\n"


class NoReaderError(Exception):
    """Nobody reads standard output any more."""


def put(line: str | bytes) -> None:
    """Print a line at once; bytes are printed as they are.

    Raises:
        NoReaderError: Nobody reads it. Not BrokenPipeError, which click would take for its own.
    """
    try:
        click.echo(line)
    except BrokenPipeError as error:
        raise NoReaderError from error


def show_text(text: str) -> str:
    """Return a text with what cannot be shown, and the backslash, as escapes of Python."""
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode()
        for char in text
    )


def show_bytes(data: bytes) -> str:
    """Return bytes for people: UTF-8 as text, the rest as escapes."""
    parts = data.decode("utf-8", "surrogateescape")
    return "".join(
        f"\\x{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else show_text(char)
        for char in parts
    )


def plain(value: object) -> Any:
    """Return a value as JSON has it; a map's bytes change their key if they are not UTF-8."""
    match value:
        case dict():
            made = {}
            for key, each in value.items():
                if isinstance(each, bytes):
                    made.update(_bytes_under(str(key), each))
                else:
                    made[str(key)] = plain(each)
            return made
        case list() | tuple():
            return [plain(each) for each in value]
        case bytes():
            return show_bytes(value)
        case datetime():
            return value.isoformat()
        case _:
            return value


def _bytes_under(key: str, data: bytes) -> dict[str, str]:
    try:
        return {key: data.decode()}
    except UnicodeDecodeError:
        return {f"{key}_base64": base64.b64encode(data).decode()}


def utc_time(utc: float) -> datetime:
    """Return a time that `print_json` and `print_map` know for one: seconds of UTC since 1970."""
    return datetime.fromtimestamp(int(utc), UTC)


def show_time(time: datetime) -> str:
    """Return a time for people."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def print_json(value: Mapping[str, object]) -> None:
    """Print one object on one line."""
    put(json.dumps(plain(dict(value)), ensure_ascii=False))


def print_rows(rows: Sequence[Mapping[str, object]], as_json: bool) -> None:
    """Print rows that have the same keys: one JSON object each, or a table with a headline."""
    if as_json:
        for row in rows:
            print_json(row)
        return
    if not rows:
        click.echo("none", err=True)
        return
    table = [[key.replace("_", " ") for key in rows[0]]]
    table += [[_cell(value) for value in row.values()] for row in rows]
    is_number = [all(type(row[key]) in (int, type(None)) for row in rows) for key in rows[0]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        columns = zip(cells, widths, is_number, strict=True)
        aligned = (cell.rjust(w) if number else cell.ljust(w) for cell, w, number in columns)
        put("  ".join(aligned).rstrip())


def print_map(values: Mapping[str, object], as_json: bool) -> None:
    """Print a map: one JSON object, or a line for each key."""
    if as_json:
        print_json(values)
        return
    width = max(map(len, values))
    for key, value in values.items():
        put(f"{key.replace('_', ' '):<{width}}  {_cell(value)}")


def _cell(value: object) -> str:  # noqa: PLR0911 (one case a kind)
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ",".join(map(_cell, value)) or "-"
        case dict():
            return " ".join(f"{key}={_cell(each)}" for key, each in value.items()) or "-"
        case datetime():
            return show_time(value)
        case bytes():
            return show_bytes(value)
        case _:
            return show_text(str(value)) or "-"


def message_fields(message: Message) -> dict[str, object]:
    """Return a message as JSON has it."""
    who = message.identity
    return {
        "kind": "message",
        "source": message.source.format(),
        "destination": None if message.destination is None else message.destination.format(),
        "terms": None if message.terms is None else message.terms.format(),
        "body": message.body,
        "sequence": message.sequence,
        "serial": message.serial or None,
        "reply_to": message.reply_to or None,
        "pid": None if who is None else who.pid,
        "uid": None if who is None else who.uid,
        "gid": None if who is None else who.gid,
        "principal": None if who is None else who.principal,
        "node": None if who is None else who.node,
        "fds": len(message.fds),
        "fds_lost": message.fds_lost,
        "copy": message.is_copy,
    }


def print_message(message: Message, as_json: bool, master: BusAddress | None = None) -> None:
    """Print a message; its descriptors stay the caller's.

    Args:
        message: What to print.
        as_json: As one JSON object.
        master: Whose talk with members is shown in words.
    """
    from .protocol import find_words, show_words, words_fields

    words = None if master is None else find_words(message, master)
    if as_json:
        print_json({**message_fields(message), **(words_fields(words) if words else {})})
        return
    from ..proto.address import format_within

    about = ""
    if message.terms is not None:
        about = f" [{message.terms}]"
    elif message.is_multicast and message.destination is not None:
        about = f" [bits {message.destination.address.hex()}]"
    elif message.destination is not None:
        about = f" to {format_within(message.destination.address)}"
    more = f" (with {len(message.fds)} descriptors)" if message.fds else ""
    more += " (descriptors were lost)" if message.fds_lost else ""
    more += " (expects a reply)" if message.expects_reply else ""
    if message.error is not None:
        more += f" (refusal: {os.strerror(message.serial)})"
    source = format_within(message.source.address)
    body = show_bytes(message.body) if words is None else show_text(show_words(words))
    put(f"{source}{about}{more}: {body}")


def print_gap(gap: Gap, as_json: bool) -> None:
    """Print what is missing."""
    from ..proto.address import format_within

    if as_json:
        print_json(
            {
                "kind": "gap",
                "source": format_within(gap.source) if gap.source else None,
                "first": gap.first if gap.last else None,
                "last": gap.last or None,
                "count": gap.count if gap.is_counted else None,
                "reason": gap.reason.name.lower(),
            }
        )
        return
    put(f"gap: {gap}")


def print_notice(notice: Notice, as_json: bool) -> None:
    """Print what the kernel's address tells."""
    from ..proto.address import format_within

    subject = [format_within(address) for address in notice.subject]
    event = notice.event.name.lower()
    if as_json:
        print_json(
            {
                "kind": "notice",
                "event": event,
                "subject": subject,
                "reason": notice.reason,
                "detail": dict(notice.detail),
            }
        )
        return
    parts = ["notice:", event.replace("_", " "), " ".join(subject)]
    parts += [f"({show_text(notice.reason)})"] if notice.reason else []
    parts += [f"{show_text(key)}={show_text(str(value))}" for key, value in notice.detail.items()]
    put(" ".join(part for part in parts if part))


def print_lost(error: MessagesLost, as_json: bool) -> None:
    """Print that something is missing that nobody can number."""
    if as_json:
        print_json({"kind": "lost", "text": error.message})
    else:
        put(f"lost: {error.message}")
