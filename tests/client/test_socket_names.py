"""The public names of the package."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import pytest

import afbus


def find_imports() -> dict[str, str]:
    """Name to home, as a type checker sees it."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(inspect.getsource(afbus))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {alias.name: str(node.module) for alias in node.names}
    return found


def test_names_agree() -> None:
    """What a type checker sees, what is imported at first use, and `__all__` are the same."""
    assert find_imports() == afbus._HOME_OF
    # A star import must not hide Python's own module.
    assert sorted([*afbus.__all__, "socket"]) == sorted(afbus._HOME_OF)
    assert set(dir(afbus)) >= set(afbus._HOME_OF)


@pytest.mark.parametrize("name", afbus.__all__)
def test_name_is_there(name: str) -> None:
    """Each name can be imported."""
    assert getattr(afbus, name) is not None


def test_other_names_are_not() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        afbus.Nothing  # type: ignore[attr-defined]  # noqa: B018 (what is tested)


@pytest.mark.cluster
def test_socket_needs_no_asyncio() -> None:
    """Who wants the socket does not pay for an event loop."""
    code = "import afbus, sys; afbus.socket; sys.exit('asyncio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
