"""What is typed: paths, addresses, terms, bodies. Each function is a callback of click.

Invariants:

1. What makes no sense in itself is an error of usage that names the argument.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..proto.address import BusAddress
    from ..proto.terms import Terms

T = TypeVar("T")


def _judged(make: Callable[[], T]) -> T:
    """Make a value of what was typed."""
    from ..proto.errors import BusError

    try:
        return make()
    except BusError as error:
        raise click.BadParameter(error.message) from error


def bus_path(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Return the path of a bus, if it can be one."""
    from ..proto.address import BusAddress

    if value is not None:
        _judged(lambda: BusAddress.kernel(value))
    return value


def address_within(
    context: click.Context, _parameter: click.Parameter, value: str | None
) -> BusAddress | None:
    """Return an address on the bus of PATH: `1.2`, `demo.clock`, with escapes as afbus prints."""
    from ..proto.address import BusAddress
    from ..proto.text import escape

    if value is None:
        return None
    path = escape(os.fsencode(context.params["path"]), ":*")
    address = _judged(lambda: BusAddress.parse(f"{path}:{value}"))
    if address.is_kernel:
        raise click.BadParameter("an address is not empty")
    return address


def terms(
    _context: click.Context, _parameter: click.Parameter, value: str | tuple[str, ...]
) -> Terms:
    """Return terms: a topic and key=value, in one argument or in several."""
    from ..proto.terms import Terms

    return _judged(lambda: Terms.parse(value if isinstance(value, str) else " ".join(value)))


def body(_context: click.Context, _parameter: click.Parameter, value: str) -> bytes:
    """Return the bytes of a message: what was typed, or for `-` all of standard input."""
    return sys.stdin.buffer.read() if value == "-" else os.fsencode(value)


def bearer_name(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> str | None:
    """Return the name of a cluster, a node or a principal, as it can stand in a certificate."""
    from ..link.identity import check_name

    if value is not None:
        _judged(lambda: check_name("name", value))
    return value


def bearer(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Return node/NAME, principal/NAME, or serial/HEX: who can be revoked."""
    from ..link.identity import check_name

    kind, _, name = value.partition("/")
    if kind == "serial":
        if not name or name.strip("0123456789abcdefABCDEF"):
            raise click.BadParameter(f"{name!r} is not hexadecimal")
    elif kind in ("node", "principal") and name:
        _judged(lambda: check_name("name", name))
    else:
        raise click.BadParameter(f"{value!r} is none of node/NAME, principal/NAME, serial/HEX")
    return value


def seconds(
    _context: click.Context, _parameter: click.Parameter, value: float | None
) -> float | None:
    """Return a time to wait, from a millisecond to a day."""
    # Written so that NaN is refused too.
    if value is not None and not 0.001 <= value <= 86_400:
        raise click.BadParameter(f"{value} is not 0.001 to 86400 seconds")
    return value


path_argument = click.argument("path", callback=bus_path, is_eager=True)
to_argument = click.argument("to", callback=address_within)
body_argument = click.argument("body", default="-", callback=body)
name_option = click.option(
    "--name", callback=address_within, help="A name to own; it must be free.", metavar="NAME"
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
deadline_option = click.option(
    "--deadline",
    type=float,
    callback=seconds,
    default=5.0,
    show_default=True,
    help="Seconds to wait.",
)
