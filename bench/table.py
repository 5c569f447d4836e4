"""The figures as text: lines for the terminal, `RESULTS.md` for the repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .figure import OURS, Figure, best
from .rows import ROWS, YARDSTICKS
from .target import TARGETS, is_ours

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def rows_of(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """Return figures by row, in the order of the rows; ours first, then from best to worst."""
    found: dict[str, list[Figure]] = {name: [] for name in ROWS}
    for figure in figures:
        found.setdefault(figure.row, []).append(figure)
    for row in found.values():
        row.sort(key=lambda one: (not is_ours(one.system), one.system != OURS, _order(one)))
    return {name: row for name, row in found.items() if row}


def _order(figure: Figure) -> float:
    return figure.value if figure.better == "lower" else -figure.value


def peers(row: Iterable[Figure]) -> list[Figure]:
    """Return those of a row with whom we compare ourselves."""
    return [one for one in row if not is_ours(one.system) and one.system not in YARDSTICKS]


def number(value: float) -> str:
    """Return a number with three or more digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.3g}".rstrip(".")


def verdicts(row: Sequence[Figure]) -> list[str]:
    """Say for each target of a row whether it is reached."""
    found = []
    for target in TARGETS:
        if target.row == row[0].row and (judged := target.judge(row, YARDSTICKS)):
            ratio, other, reached = judged
            word = "reached" if reached else "missed"
            found.append(f"{ratio:.2f} of {other}; target {target}: {word}")
    return found


def lines(figures: Iterable[Figure]) -> list[str]:
    """Return a table for the terminal: median, spread, ratio of ours to each."""
    text = []
    for name, row in rows_of(figures).items():
        ours = next((one for one in row if one.system == OURS), None)
        first = best(peers(row))
        for one in row:
            ratio = ""
            if ours is not None and one is not ours and one.value:
                mark = " (best peer)" if one is first else ""
                mark = " (no peer)" if one.system in YARDSTICKS else mark
                ratio = f"afbus is {ours.value / one.value:.2f} of it{mark}"
            value = f"{number(one.value):>12} {one.unit:12} +-{50 * one.spread:3.0f} %"
            text.append(f"{name:26} {one.system:22} {value}  {ratio}".rstrip())
        text += [f"{name:26} {verdict}" for verdict in verdicts(row)]
    return text


def markdown(
    figures: Iterable[Figure],
    *,
    header: str,
    absent: Mapping[str, str],
    notes: Iterable[str],
    plots: Mapping[str, str],
) -> str:
    """Return the text of RESULTS.md.

    Args:
        figures: What was measured.
        header: Where and when, and with what.
        absent: Systems that were not measured, and why.
        notes: What a reader must know.
        plots: File name of a row's plot.
    """
    rows = rows_of(figures)
    text = [
        "# Figures\n",
        "Made by `make bench` from `results.json`. All systems of a row run in turns in one run,",
        "each several times; the figure is the median, the spread is (max - min) / median. Ratios",
        "within a row count, not the figures themselves.\n",
        header,
        "",
        "| row | afbus | spread | best peer | its figure | ratio | targets |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ours = next((one for one in row if one.system == OURS), None)
        first = best(peers(row))
        cells = [f"[{name}](#{name})"]
        cells += (
            [f"{number(ours.value)} {ours.unit}", _percent(ours)] if ours else ["not measured", ""]
        )
        if first is not None:
            cells += [first.system, f"{number(first.value)} {first.unit}"]
            cells.append(f"{ours.value / first.value:.2f}" if ours else "")
        else:
            cells += ["", "", ""]
        cells.append("; ".join(verdicts(row)))
        text.append(f"| {' | '.join(cells)} |")
    text += ["", *(f"* {note}" for note in notes)]
    if absent:
        text += ["", "Not measured:", ""]
        text += [f"* {system}: {why}" for system, why in sorted(absent.items())]
    for name, row in rows.items():
        what = ROWS[name].text if name in ROWS else ""
        better = "less" if row[0].better == "lower" else "more"
        text += [
            "",
            f"## {name}",
            "",
            f"{what[:1].upper()}{what[1:]}; {row[0].unit}, {better} is better.",
            "",
        ]
        if name in plots:
            text += [f"![{name}]({plots[name]})", ""]
        text += ["| system | median | spread | runs |", "|---|---|---|---|"]
        for one in row:
            system = f"({one.system})" if one.system in YARDSTICKS else one.system
            runs = ", ".join(number(value) for value in one.runs)
            text.append(f"| {system} | {number(one.value)} | {_percent(one)} | {runs} |")
    if any(one.system in YARDSTICKS for row in rows.values() for one in row):
        text += ["", "In brackets: no peers, but what the machine can do when less is asked for."]
    return "\n".join(text) + "\n"


def _percent(figure: Figure) -> str:
    return f"{100 * figure.spread:.0f} %"
