"""What the tests with real processes share: one cluster, which each of them gets in order."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from network import Network
from tests.cluster.region import MASTER, NODES, Region

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def _region() -> Iterator[Region]:
    # Short: the path of a socket has 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="afbus-region-"))
    try:
        with Network(("sky", MASTER, *NODES)) as network:
            made = Region(folder, network)
            try:
                yield made
            finally:
                made.close()
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def region(_region: Region) -> Iterator[Region]:
    """A master and three nodes, mended and without a fault in their logs."""
    _region.mend()
    yield _region
    # Shown if the test has failed.
    print(_region.describe())
    assert _region.faults() == []
