"""A plot for each row, as SVG: bars of the medians, with the range of the turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .figure import OURS
from .rows import ROWS, YARDSTICKS
from .table import rows_of
from .target import is_ours

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from .figure import Figure

_COLORS: Final = {"ours": "#1b6ca8", "peer": "#9aa5b1", "yardstick": "#dfe3e8"}


def draw(figures: Iterable[Figure], folder: Path) -> dict[str, str]:
    """Draw the rows that have more than one system; return the file of each row, by name."""
    import matplotlib as mpl

    # No screen; text as text, and the same bytes for the same figures.
    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "afbus"})
    from matplotlib import pyplot

    folder.mkdir(exist_ok=True)
    files = {}
    for name, row in rows_of(figures).items():
        if len(row) < 2:
            continue
        shown = sorted(row, key=lambda one: one.value, reverse=row[0].better == "lower")
        canvas, axes = pyplot.subplots(figsize=(7, 0.8 + 0.28 * len(shown)))
        for at, one in enumerate(shown):
            kind = "yardstick" if one.system in YARDSTICKS else "peer"
            kind = "ours" if is_ours(one.system) else kind
            axes.barh(at, one.value, color=_COLORS[kind], height=0.7)
            axes.plot([min(one.runs), max(one.runs)], [at, at], color="#333333", linewidth=1)
        axes.set_yticks(range(len(shown)), [one.system for one in shown])
        for label in axes.get_yticklabels():
            if label.get_text() == OURS:
                label.set_fontweight("bold")
        low, high = min(one.value for one in shown), max(one.value for one in shown)
        if low > 0 and high / low > 20:
            axes.set_xscale("log")
        better = "less is better" if row[0].better == "lower" else "more is better"
        axes.set_xlabel(f"{row[0].unit} ({better})")
        axes.set_title(f"{name}: {ROWS[name].text}" if name in ROWS else name, fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        canvas.tight_layout()
        files[name] = f"{folder.name}/{name}.svg"
        canvas.savefig(folder / f"{name}.svg", metadata={"Date": None})
        pyplot.close(canvas)
    return files
