"""Places where members of a cluster are: `HOST:PORT` as text, host and port as a carrier takes it.

An IPv6 address stands in brackets: `[fd00::1]:4451`.
"""

from __future__ import annotations

import re
from typing import Final

from ..proto.errors import ConfigError
from ..proto.record import PLACE_BYTES

#: Where a node hears its peers, and where a master is, if nothing else is said.
NODE_PORT: Final = 4451
MASTER_PORT: Final = 4450

_PLACE: Final = re.compile(r"(?:\[([0-9A-Fa-f:.%a-z]+)\]|([^:\[\]\s]+)|)(?::([0-9]{1,5}))?")


def parse_place(text: str, port: int = NODE_PORT) -> tuple[str, int]:
    """Return host and port of a place; `port` if it names none.

    Raises:
        ConfigError: The text is no place.
    """
    found = _PLACE.fullmatch(text)
    if found is None or not text or len(text.encode()) > PLACE_BYTES:
        raise ConfigError(f"{text!a} is not HOST:PORT; an IPv6 address stands in brackets")
    host = found[1] or found[2] or "::"
    number = port if found[3] is None else int(found[3])
    if number > 65_535:
        raise ConfigError(f"{text!a}: there is no port {number}")
    return host, number


def format_place(host: str, port: int) -> str:
    """Return the text of a place."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
