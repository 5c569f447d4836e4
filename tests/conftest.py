"""What every test gets: a deadline, figures, and one behaviour of hypothesis wherever it runs."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import hypothesis
import pytest
from tests import figures

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

DEADLINE_S = 60.0
SLOW_DEADLINE_S = 300.0

# No deadline per example: on a busy machine it fails tests that are right.
hypothesis.settings.register_profile("afbus", deadline=None)
hypothesis.settings.load_profile("afbus")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what was measured."""
    figures.show(terminalreporter)


@pytest.fixture(autouse=True)
def deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that hangs, in the main thread, where it waits."""
    markers = [request.node.get_closest_marker(name) for name in ("slow", "cluster")]
    slow = [marker.kwargs.get("limit_s", SLOW_DEADLINE_S) for marker in markers if marker]
    limit_s = max(slow, default=DEADLINE_S)

    def expire(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail(f"still running after {limit_s:.0f} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)
