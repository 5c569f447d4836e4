"""What members ask a master of ours, and what it answers, for people and programs (`monitor`).

A master may speak a protocol of its own: then its messages are shown as they are.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..proto import request as requests
from ..proto.address import format_within
from ..proto.errors import RemoteProtocolError
from ..proto.match import Overflow
from ..proto.request import (
    Answer,
    Join,
    Leave,
    MonitorRequest,
    NoticesRequest,
    Own,
    Publish,
    Release,
    Request,
    Subscribe,
    Unsubscribe,
)
from ..proto.terms import Terms

if TYPE_CHECKING:
    from ..client.message import Message
    from ..proto.address import BusAddress
    from ..proto.match import What


def find_words(message: Message, master: BusAddress) -> Request | Answer | None:
    """Return what a member says to the master, or the master to a member; None if neither."""
    try:
        if message.reply_to and message.source == master and message.error is None:
            return Answer.decode(message.body)
        if message.destination == master and not message.reply_to:
            return requests.decode(message.body)
    except RemoteProtocolError:
        pass
    return None


def words_fields(words: Request | Answer) -> dict[str, object]:
    """Return the words as JSON has them: `request` or `answer`, and what it says."""
    if isinstance(words, Answer):
        answer = {"errno": words.errno, "message": words.message, "detail": dict(words.detail)}
        return {"answer": answer}
    kind, fields = _take_apart(words)
    return {"request": {"kind": kind, **fields}}


def show_words(words: Request | Answer) -> str:
    """Return the words for people."""
    if isinstance(words, Answer):
        if not words.is_ok:
            return f"no: {words.message} ({os.strerror(words.errno)})"
        detail = " ".join(f"{key}={_show(value)}" for key, value in words.detail.items())
        return f"yes {detail}".rstrip()
    kind, fields = _take_apart(words)
    return " ".join((kind, *(f"{key}={_show(value)}" for key, value in fields.items())))


def _take_apart(request: Request) -> tuple[str, dict[str, object]]:  # noqa: PLR0911 (one line a request)
    match request:
        case Join(claims):
            return "join", {"claims_bytes": len(claims)} if claims else {}
        case Own(name, flags):
            names = [str(flag.name).lower() for flag in type(flags) if flag in flags]
            return "own", {"name": format_within(name), "flags": names}
        case Release(name):
            return "release", {"name": format_within(name)}
        case Subscribe(what, overflow, deadline_ms):
            more = {"deadline_ms": deadline_ms} if overflow is Overflow.BLOCK else {}
            return "subscribe", {**_about(what), "overflow": overflow.name.lower(), **more}
        case Unsubscribe(what):
            return "unsubscribe", _about(what)
        case Publish(what):
            return "publish", _about(what)
        case NoticesRequest(on):
            return "notices", {"on": on}
        case MonitorRequest(on):
            return "monitor", {"on": on}
        case Leave():
            return "leave", {}


def _about(what: What) -> dict[str, object]:
    return {"terms": what.format()} if isinstance(what, Terms) else {"bits": what.hex()}


def _show(value: object) -> str:
    match value:
        case bytes():
            return format_within(value)
        case str():
            return f"'{value}'"
        case list():
            return ",".join(map(str, value)) or "none"
        case bool():
            return "yes" if value else "no"
        case _:
            return str(value)
