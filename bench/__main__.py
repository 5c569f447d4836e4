"""Run the rows in turns, print the table, write `bench/results.json`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

import afbus

from .cross import CROSS_ROWS
from .rows import HOST_ROWS

if TYPE_CHECKING:
    from .row import Row

ROWS: Final = [*HOST_ROWS, *CROSS_ROWS]


def measure(row: Row, runs: int) -> dict[str, list[float]]:
    """Take each system of a row in turns, so that the machine's moods hit all alike."""
    values: dict[str, list[float]] = {system: [] for system in row.systems}
    with ExitStack() as end:
        stage = None
        for run in range(runs):
            for system, function in row.systems.items():
                print(f"\r{row.name}: {system} {run + 1}/{runs}\033[K", end="", file=sys.stderr)
                if stage is None or not stage.is_lasting:
                    end.close()
                    stage = end.enter_context(row.stage())
                values[system].append(function(stage))
    print("\r\033[K", end="", file=sys.stderr)
    return values


def show(row: Row, values: dict[str, list[float]]) -> None:
    """Print a line a system: median, spread, ratio of ours to it."""
    ours = statistics.median(values["afbus"])
    for system, taken in values.items():
        middle = statistics.median(taken)
        low, high = min(taken), max(taken)
        ratio = "" if system == "afbus" else f"afbus is {ours / middle:.2f} of it"
        figures = f"{middle:14,.1f} {row.unit:13} ({low:,.1f} to {high:,.1f})"
        print(f"{row.name:22} {system:11} {figures:58} {ratio}", flush=True)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", help="rows to measure (default: all)")
    parser.add_argument("--runs", type=int, default=5, help="turns of each system (default: 5)")
    place = Path(__file__).parent / "results.json"
    parser.add_argument("--output", type=Path, default=place, help="where the JSON goes")
    wanted = parser.parse_args()
    unknown = set(wanted.rows) - {row.name for row in ROWS}
    if unknown:
        names = ", ".join(row.name for row in ROWS)
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {names}")
    machine = f"{os.cpu_count()} CPUs, Linux {platform.release()}, {platform.machine()}"
    print(f"afbus {afbus.__version__}, Python {platform.python_version()}, {machine}")
    results = []
    for row in ROWS:
        if wanted.rows and row.name not in wanted.rows:
            continue
        if obstacle := row.stage.obstacle():
            print(f"{row.name:22} skipped: {obstacle}", flush=True)
            continue
        values = measure(row, wanted.runs)
        show(row, values)
        results += [
            {
                "row": row.name,
                "system": system,
                "value": statistics.median(taken),
                "unit": row.unit,
                "better": row.better,
                "runs": taken,
            }
            for system, taken in values.items()
        ]
    wanted.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
