"""Print the requirements (R) and decisions (D) that no test names.

A test names them in its own name, as in `test_r16_d11_order_is_kept` or, in Rust, `d13_one_writer`;
a scenario does so in the name of its file.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COUNTS = {"R": 22, "D": 21}

PYTHON_TEST = re.compile(r"^\s*(?:async )?def (test_\w+)", re.MULTILINE)
RUST_TEST = re.compile(r"^\s*#\[test\](?:\s*#\[[^\n]*\])*\s*fn (\w+)", re.MULTILINE)
NUMBER = re.compile(r"(?<![a-z0-9])([rd])(\d+)(?![a-z0-9])")


def find_numbers(names: list[str]) -> set[str]:
    """The numbers in the names, as "R16"."""
    return {
        letter.upper() + digits for name in names for letter, digits in NUMBER.findall(name.lower())
    }


def find_names() -> list[str]:
    """The names of all tests and scenarios of the repository."""
    names = [path.stem for path in (ROOT / "tests").rglob("*.txt")]
    for path in (ROOT / "tests").rglob("*.py"):
        names += PYTHON_TEST.findall(path.read_text())
    for folder in ("src", "tests"):
        for path in (ROOT / "datapath" / folder).rglob("*.rs"):
            names += RUST_TEST.findall(path.read_text())
    return names


def main() -> None:
    """Print one line for each letter."""
    tested = find_numbers(find_names())
    for letter, count in COUNTS.items():
        missing = [str(n) for n in range(1, count + 1) if f"{letter}{n}" not in tested]
        print(f"{letter} without a test: {' '.join(missing) or 'none'}")


if __name__ == "__main__":
    main()
