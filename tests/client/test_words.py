"""Addresses, terms and requests as they stand in a sentence."""

from __future__ import annotations

import pytest

from afbus.client.words import show_address, show_request, show_what
from afbus.proto.address import BusAddress
from afbus.proto.request import (
    Join,
    MonitorRequest,
    NoticesRequest,
    Own,
    Publish,
    Release,
    Request,
    Subscribe,
    Unsubscribe,
)
from afbus.proto.terms import Terms

BITS = bytes([1, *bytes(7)])


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (BusAddress("/demo", "demo.clock"), "/demo:demo.clock"),
        (BusAddress.multicast("/demo"), "/demo*"),
        (BusAddress.multicast("/demo", BITS), "/demo*"),
    ],
)
def test_address_in_a_sentence(address: BusAddress, text: str) -> None:
    """So that a colon can follow it."""
    assert show_address(address) == text


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (Join(b"claims"), "JOIN"),
        (Own(b"demo.clock"), "OWN demo.clock"),
        (Release(b"\xff"), "RELEASE 0xff"),
        (Subscribe(Terms.parse("a k=v")), "SUBSCRIBE a k=v"),
        (Unsubscribe(BITS), "UNSUBSCRIBE 0x0100000000000000"),
        (Publish(Terms()), "PUBLISH everything"),
        (NoticesRequest(), "NOTICES"),
        (MonitorRequest(False), "MONITOR no more"),
    ],
)
def test_request_in_a_sentence(request_: Request, text: str) -> None:
    """What it is, and what it is about."""
    assert show_request(request_) == text


def test_terms_are_named_as_in_notices() -> None:
    """As the agent names them, so that they can be compared."""
    assert show_what(Terms.parse("b.a k=v")) == "b.a k=v"
    assert show_what(BITS) == f"0x{BITS.hex()}"
