"""Addresses, terms and requests as they stand in a sentence: of an error, a notice, a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..proto.address import format_within
from ..proto.request import (
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
from ..proto.text import escape

if TYPE_CHECKING:
    from ..proto.address import BusAddress
    from ..proto.match import What


def show_address(where: BusAddress) -> str:
    """Return an address; of a multicast only the bus, because bits say nothing."""
    return f"{escape(where.path)}*" if where.is_multicast else str(where)


def show_what(what: What) -> str:
    """Return terms or bits, as the agent's notices name them."""
    return what.format() if isinstance(what, Terms) else f"0x{what.hex()}"


def show_request(request: Request) -> str:
    """Return what somebody asks a master for: `OWN demo.clock`."""
    match request:
        case Own(name) | Release(name):
            return f"{type(request).__name__.upper()} {format_within(name)}"
        case Subscribe(what) | Unsubscribe(what) | Publish(what):
            return f"{type(request).__name__.upper()} {show_what(what) or 'everything'}"
        case NoticesRequest(on) | MonitorRequest(on):
            kind = "NOTICES" if isinstance(request, NoticesRequest) else "MONITOR"
            return kind if on else f"{kind} no more"
        case _:
            return type(request).__name__.upper()
