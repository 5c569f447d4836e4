"""What the tests with real processes share: one cluster, which each of them gets in order."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from network import Network
from tests.cluster.region import CARRIERS, MASTER, NODES, Region

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

_HERE = Path(__file__).parent
#: The cluster that lives from its first test to the last one of this folder, and what ends it.
_regions: list[Region] = []
_kept = ExitStack()


@contextmanager
def _have_region(carrier: str) -> Iterator[Region]:
    # Short: the path of a socket has 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="afbus-region-"))
    try:
        with Network(("sky", MASTER, *NODES)) as network:
            made = Region(folder, network, carrier)
            _regions.append(made)
            try:
                yield made
            finally:
                _regions.clear()
                made.close()
    finally:
        shutil.rmtree(folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Generator[None]:
    """End the cluster behind the last test of this folder: others want the machine for themselves.

    Invariant: behind the fixtures of that test.
    """
    yield
    if nextitem is None or _HERE not in nextitem.path.parents:
        _kept.close()


def pytest_sessionfinish() -> None:
    """End it, when the run is broken off too."""
    _kept.close()


@pytest.fixture(scope="session")
def carrier(request: pytest.FixtureRequest) -> str:
    """What moves messages between nodes: tests that say nothing of it have the default."""
    made: str = getattr(request, "param", CARRIERS[0])
    return made


@pytest.fixture
def region(carrier: str) -> Iterator[Region]:
    """A master and three nodes, mended and without a fault in their logs."""
    if _regions and _regions[0].carrier != carrier:
        _kept.close()
    made = _regions[0] if _regions else _kept.enter_context(_have_region(carrier))
    made.mend()
    yield made
    # Shown if the test has failed.
    print(made.describe())
    assert made.faults() == []
