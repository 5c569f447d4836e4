"""The cost of a message where many want to hear of other things."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .stage import Stage


def cost(stage: Stage, masks: int) -> dict[str, float]:
    """Measure a message."""
    raise RuntimeError("has no measurement yet")
