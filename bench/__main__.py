"""Run the rows in turns, print the table, write `results.json`, `RESULTS.md` and the plots."""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .figure import encode
from .machine import Load, Machine
from .ours import NOTES
from .plot import draw
from .rows import HEATS, ROWS
from .run import Run
from .table import lines, markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .figure import Figure

FOLDER: Final = Path(__file__).parent
#: Turns of each system; the whole takes some seven minutes.
RUNS: Final = 3
#: From here on others take so much of the machine that even ratios are their doing.
BUSY_PERCENT: Final = 10


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--row", action="append", default=[], help="a row to measure (all)")
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        help="a system to measure, by its first words (all)",
    )
    parser.add_argument("--runs", type=int, default=RUNS, help=f"turns of each system ({RUNS})")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, no table")
    parser.add_argument("--list", action="store_true", help="name rows and systems, and stop")
    parser.add_argument(
        "--folder", type=Path, help="where the files go (with all rows and systems: bench/)"
    )
    wanted = parser.parse_args(argv)
    if wanted.list:
        for name, row in ROWS.items():
            print(f"{name:26} {row.text}")
        for system, why in Run(HEATS).systems().items():
            print(f"{system:26} {why}".rstrip())
        return
    if unknown := set(wanted.row) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    began, load = time.monotonic(), Load()
    machine = Machine.here()
    print(f"{machine.host}\n{machine.versions}", file=sys.stderr)
    run = Run(HEATS, rows=wanted.row, systems=wanted.system, runs=wanted.runs)
    # Whoever ends the run ends its processes too, and takes its networks down.
    signal.signal(signal.SIGTERM, lambda *_: run.stop())
    figures = run.measure(lambda text: print(text, file=sys.stderr, flush=True))
    foreign = load.foreign_percent()
    header = (
        f"{datetime.datetime.now(datetime.UTC):%d %B %Y}, {wanted.runs} turns each, "
        f"{(time.monotonic() - began) / 60:.1f} minutes in all. {machine.host}. Other processes "
        f"used {foreign:.0f} % of the machine meanwhile.\n\n{machine.versions}."
    )
    if foreign > BUSY_PERCENT:
        header += "\n\n**Taken beside other work: these figures show how a run looks, no more.**"
    if wanted.json:
        print(encode(figures), end="")
    else:
        print("\n".join(lines(figures)))
        print(f"other processes used {foreign:.0f} % of the machine")
        print("\n".join(f"not measured: {name}: {why}" for name, why in run.absent.items()))
    everything = not wanted.row and not wanted.system
    if folder := wanted.folder or (FOLDER if everything else None):
        _write(folder, figures, header, run.absent)


def _write(folder: Path, figures: list[Figure], header: str, absent: dict[str, str]) -> None:
    """Write the files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(encode(figures))
    plots = {}
    if find_spec("matplotlib") is not None:
        plots = draw(figures, folder / "plots")
    text = markdown(figures, header=header, absent=absent, notes=NOTES, plots=plots)
    (folder / "RESULTS.md").write_text(text)


if __name__ == "__main__":
    main()
