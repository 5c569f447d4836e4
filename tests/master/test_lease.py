"""Leases: no block twice, whatever becomes of its holder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.master.lease import SKIP_MAX, Leases

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "give_back", "drop", "restart"]),
        st.integers(1, 3),
        st.integers(0, 9),
    ),
    max_size=40,
)


@given(STEPS)
def test_d3_case28_no_block_is_leased_twice(steps: list[tuple[str, int, int]]) -> None:
    """Against a list of all that ever were; also over restarts."""
    leases = Leases()
    held: dict[int, int] = {}
    ever: list[int] = []
    for step, node, choice in steps:
        if step == "take":
            block = leases.take(node)
            assert block not in ever
            ever.append(block)
            held[block] = node
        elif step == "give_back" and held:
            block = sorted(held)[choice % len(held)]
            leases.give_back(block)
            del held[block]
        elif step == "drop":
            gone = tuple(sorted(block for block, one in held.items() if one == node))
            assert leases.drop_holder(node) == gone
            held = {block: one for block, one in held.items() if one != node}
        elif step == "restart":
            leases = Leases(leases.last)
            for block, one in held.items():
                leases.restore(block, one)
        assert len(leases) == len(held)
        for block in ever:
            assert leases.get_holder(block) == held.get(block)
        for one in (1, 2, 3):
            mine = tuple(sorted(block for block in held if held[block] == one))
            assert leases.get_blocks(one) == mine


def test_what_cannot_be_restored() -> None:
    """A journal that says so is broken, and that is a bug."""
    leases = Leases(3)
    leases.restore(3, 1)
    for block in (0, 3, 4):
        with pytest.raises(AssertionError):
            leases.restore(block, 2)


def test_d3_blocks_of_a_master_that_was_ahead_are_skipped() -> None:
    """A master that was put back from a copy leases nothing that it is shown."""
    leases = Leases(5)
    assert leases.skip(9)
    assert not leases.skip(7)
    assert leases.get_holder(9) is None
    assert leases.take(1) == 10
    assert not leases.skip(10 + SKIP_MAX + 1)
    assert leases.take(1) == 11
