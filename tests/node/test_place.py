"""Where members of a cluster are: what people write, what nodes tell, what is told of oneself."""

from __future__ import annotations

import ipaddress
import socket
from typing import Final

import pytest

from afbus.node.place import (
    find_place,
    format_place,
    own_places,
    parse_listen,
    parse_place,
)
from afbus.proto.errors import ConfigError, LinkError

#: All addresses of a host, of one family.
ALL_IPV4: Final = str(ipaddress.IPv4Address(0))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("desk", ("desk", 4451)),
        ("desk.example.org:1", ("desk.example.org", 1)),
        ("10.0.0.1:4451", ("10.0.0.1", 4451)),
        ("[fd00::1]", ("fd00::1", 4451)),
        ("[fd00::1]:65535", ("fd00::1", 65_535)),
    ],
)
def test_places_are_read(text: str, place: tuple[str, int]) -> None:
    """With the usual port where none is told."""
    assert parse_place(text) == place
    assert parse_place(format_place(*place)) == place


@pytest.mark.parametrize(
    "text", ["", ":4451", ":::4451", "fd00::1", "a b", "desk:0", "desk:65536", "[::1]:x", "d:0x1"]
)
def test_what_is_no_place_is_told(text: str) -> None:
    """By the operator it is a wrong setting; by another node it is a node that nobody reaches."""
    with pytest.raises(ConfigError):
        parse_place(text)
    with pytest.raises(LinkError, match="a place that is none"):
        find_place(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [(":4460", ("::", 4460)), ("10.0.0.1", ("10.0.0.1", 4451)), ("[::1%lo]:0", ("::1%lo", 0))],
)
def test_a_host_listens_at_its_addresses(text: str, place: tuple[str, int]) -> None:
    """All of them if none is told; at a free port if that is 0."""
    assert parse_listen(text) == place


@pytest.mark.parametrize("text", ["", "desk", "desk:4451", "::", "1.2.3:4", "10.0.0.1:65536"])
def test_nobody_listens_at_a_name(text: str) -> None:
    """Nor at what is no place."""
    with pytest.raises(ConfigError):
        parse_listen(text)


def test_who_listens_on_one_address_is_there() -> None:
    """It is told as it is, in a form that others can read."""
    assert own_places("10.0.0.1", 4451, []) == ("10.0.0.1:4451",)
    assert own_places("fd00::1", 4451, []) == ("[fd00::1]:4451",)


@pytest.mark.parametrize("host", ["::", ALL_IPV4])
@pytest.mark.parametrize("masters", [["127.0.0.1"], ["no.such.host.invalid", "127.0.0.1"]])
def test_who_listens_on_all_addresses_tells_one_of_them(host: str, masters: list[str]) -> None:
    """Never all addresses, which mean another host to each reader."""
    (place,) = own_places(host, 4451, [(master, 4450) for master in masters])
    own, port = parse_place(place)
    assert port == 4451
    assert not ipaddress.ip_address(own).is_unspecified
    with socket.socket(socket.AF_INET6 if ":" in own else socket.AF_INET) as mine:
        # Only an address of this host can be bound.
        mine.bind((own, 0))


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_who_has_no_way_to_a_master_tells_nothing() -> None:
    """A socket for IPv4 alone has none to a master on IPv6; others go by way of the master."""
    assert own_places(ALL_IPV4, 4451, [("::1", 4450)]) == ()
