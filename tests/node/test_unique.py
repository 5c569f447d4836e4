"""Unique addresses that were granted, against a plain set."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from afbus.node import unique
from afbus.node.unique import SpentAddresses

ADDRESSES = st.one_of(
    st.integers(0, 40).map(lambda number: b"1.%d" % number),
    st.integers(0, 12).map(lambda number: b"%d" % number),
    st.from_regex(rb"\A[01][.0-9x]{0,5}\Z"),
)


@given(st.lists(ADDRESSES))
def test_d3_an_address_is_spent_once(addresses: list[bytes]) -> None:
    """Whatever the order, it answers as a set of addresses does."""
    spent, model = SpentAddresses(), set[bytes]()
    for address in addresses:
        assert (address in spent) == (address in model)
        assert spent.spend(address) == (address not in model)
        model.add(address)
    assert all(address in spent for address in model)


def test_d3_a_counter_costs_one_span() -> None:
    """A master that counts never comes to the limit, upwards or downwards."""
    spent = SpentAddresses()
    for number in (*range(1000), *range(3000, 1000, -1), 1000):
        assert spent.spend(b"1.%d" % number)
    assert spent._count == 1
    assert not spent.is_full


def test_d18_scattered_addresses_have_a_limit() -> None:
    """Memory is bounded, and the limit is told before it is passed."""
    spent = SpentAddresses()
    for number in range(unique.SPANS_MAX):
        assert not spent.is_full
        spent.spend(b"1.%d" % (2 * number))
    assert spent.is_full
