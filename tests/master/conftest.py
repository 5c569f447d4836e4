"""What the tests of the master share."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from tests.master.world import World, make_issuer

if TYPE_CHECKING:
    from afbus.master.issuer import Issuer


@pytest.fixture
def issuer() -> Issuer:
    """The issuer of the cluster `test`."""
    return make_issuer()


@pytest.fixture
def rng() -> random.Random:
    """Numbers that are the same in each run."""
    return random.Random(3)


@pytest.fixture
def world() -> World:
    """A cluster whose policy allows everything."""
    return World()
