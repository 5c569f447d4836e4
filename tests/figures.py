"""What tests measure, shown at the end of the run: figures fail nothing by themselves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import pytest

#: With AFBUS_TEST_FULL=1 each case has the length that it has in the list of cases.
IS_FULL: Final = os.environ.get("AFBUS_TEST_FULL", "") not in ("", "0")

_figures: list[str] = []


def note(text: str) -> None:
    """Show this at the end of the run."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].split(" ")[0]
    _figures.append(f"{test}: {text}")


def show(reporter: pytest.TerminalReporter) -> None:
    """Write what was noted."""
    if _figures:
        reporter.section("figures")
        for line in _figures:
            reporter.write_line(line)
