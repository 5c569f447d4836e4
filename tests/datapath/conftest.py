"""What the tests of the data path share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from tests.datapath.puppet import Puppet
from tests.datapath.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=["lanes", "switch"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A world that is gone after the test; with lanes, what can go that way does."""
    with contextlib.closing(World(has_lanes=request.param == "lanes")) as made:
        yield made


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    """A puppet that is gone after the test."""
    with contextlib.closing(Puppet()) as made:
        yield made
