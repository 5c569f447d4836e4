"""What the tests with real processes share: one cluster, which each of them gets in order."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from network import Network
from tests.cluster.region import MASTER, NODES, Region

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

_HERE = Path(__file__).parent
#: The cluster that lives from its first test to the last one of this folder, and what ends it.
_regions: list[Region] = []
_kept = ExitStack()


@contextmanager
def _have_region() -> Iterator[Region]:
    # Short: the path of a socket has 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="afbus-region-"))
    try:
        with Network(("sky", MASTER, *NODES)) as network:
            made = Region(folder, network)
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


@pytest.fixture
def region() -> Iterator[Region]:
    """A master and three nodes, mended and without a fault in their logs."""
    made = _regions[0] if _regions else _kept.enter_context(_have_region())
    made.mend()
    yield made
    # Shown if the test has failed.
    print(made.describe())
    assert made.faults() == []
