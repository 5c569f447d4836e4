"""Places where members of a cluster are: `HOST:PORT` as text, host and port as a carrier takes it.

An IPv6 address stands in brackets: `[fd00::1]:4451`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import TYPE_CHECKING, Final

from ..proto.errors import ConfigError, LinkError
from ..proto.record import PLACE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Where a node hears its peers, and where a master is, if nothing else is said.
NODE_PORT: Final = 4451
MASTER_PORT: Final = 4450

#: An address that is nobody's (RFC 5737), and so on no network of this host.
_ELSEWHERE: Final = ("192.0.2.1", NODE_PORT)

_PLACE: Final = re.compile(r"(?:\[([0-9A-Fa-f:.%a-z]+)\]|([^:\[\]\s]+)|)(?::([0-9]{1,5}))?")


def parse_place(text: str, port: int = NODE_PORT) -> tuple[str, int]:
    """Return host and port of a place where somebody is; `port` if it names none.

    Raises:
        ConfigError: The text is no place.
    """
    host, number = _split(text, port)
    if not host or not number:
        raise ConfigError(f"{text!a} names no {'port' if host else 'host'}, so nobody can reach it")
    return host, number


def parse_listen(text: str, port: int = NODE_PORT) -> tuple[str, int]:
    """Return where to listen: without a host on all addresses of this one, at port 0 a free one.

    Raises:
        ConfigError: The text is no place, or its host is a name.
    """
    host, number = _split(text, port)
    try:
        ipaddress.ip_address(host.partition("%")[0] or "::")
    except ValueError as error:
        raise ConfigError(f"{text!a}: to listen takes a numeric address of this host") from error
    return host or "::", number


def _split(text: str, port: int) -> tuple[str, int]:
    found = _PLACE.fullmatch(text)
    if found is None or not text or len(text.encode()) > PLACE_BYTES:
        raise ConfigError(f"{text!a} is not HOST:PORT; an IPv6 address stands in brackets")
    number = port if found[3] is None else int(found[3])
    if number > 65_535:
        raise ConfigError(f"{text!a}: there is no port {number}")
    return found[1] or found[2] or "", number


def format_place(host: str, port: int) -> str:
    """Return the text of a place."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def find_place(text: str) -> tuple[str, int]:
    """Return host and port of a place that another node has told.

    Raises:
        LinkError: It is none; what others say ends nothing but the try to reach them.
    """
    try:
        return parse_place(text)
    except ConfigError as error:
        raise LinkError(f"it tells a place that is none: {error}") from error


def own_places(host: str, port: int, masters: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """Return where others reach a node that listens on a numeric host.

    That is this host; or if it is all addresses, the one from which the first of the masters is
    reached, which may ask the resolver, and sends nothing. A master on this very host may be
    reached from an address that is nobody else's; then it is the one towards other networks, if
    there is any. None if there is no way to any master.
    """
    if not ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        return (format_place(host, port),)
    family = socket.AF_UNSPEC if ":" in host else socket.AF_INET
    for master in masters:
        own = _own_address(master, family)
        if own and ipaddress.ip_address(own.partition("%")[0]).is_loopback:
            own = _own_address(_ELSEWHERE, family) or own
        if own:
            return (format_place(own, port),)
    return ()


def _own_address(target: tuple[str, int], family: int) -> str:
    """Return the address from which a target is reached, "" if it is not."""
    try:
        found = socket.getaddrinfo(*target, family=family, type=socket.SOCK_DGRAM)
        with socket.socket(found[0][0], socket.SOCK_DGRAM) as probe:
            probe.connect(found[0][4])
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError):
        return ""
