"""What the tests of the master share: a certificate authority on a clock that stands still."""

from __future__ import annotations

import random
from functools import cache

import pytest

from afbus.link.identity import Identity, Role
from afbus.master.issuer import Issuer, make_issuing, make_key, make_root

#: 2026-11-24, noon.
NOW_UTC = 1_795_521_600


@cache
def make_issuer(cluster: str = "test", now_utc: float = NOW_UTC) -> Issuer:
    """Return an issuer; making keys takes time, and issuers never change."""
    root_key, key = make_key(), make_key()
    root = make_root(cluster, root_key, 1, now_utc)
    return Issuer(root, make_issuing(root, root_key, key, 2, now_utc), key)


@pytest.fixture
def issuer() -> Issuer:
    """The issuer of the cluster `test`."""
    return make_issuer()


@pytest.fixture
def rng() -> random.Random:
    """Numbers that are the same in each run."""
    return random.Random(3)


def node(name: str) -> Identity:
    """The identity of a node."""
    return Identity("test", Role.NODE, name)
