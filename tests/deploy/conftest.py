"""What the tests of deployment share: an agent and actors, as the cases have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.cases.conftest import fleet, node
from tests.deploy.container import Yard, find_obstacle

if TYPE_CHECKING:
    from tests.cases.actors import Fleet
    from tests.cases.conftest import Node

__all__ = ["fleet", "node"]


@pytest.fixture(scope="session")
def obstacle() -> str:
    """Why no container can be made here; empty if one can."""
    return find_obstacle()


@pytest.fixture
def yard(node: Node, fleet: Fleet, obstacle: str) -> Yard:
    """Where containers are made, with an agent outside."""
    if obstacle:
        pytest.skip(obstacle)
    folder = node.folder.parent / "containers"
    folder.mkdir()
    return Yard(fleet, folder)
