"""Print the requirements (R), decisions (D) and reliability cases that no test names.

A test names them in its own name, as in `test_r16_d11_order_is_kept` or, in Rust,
`case5_d13_one_writer`; a scenario does so in the name of its file.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The cases keep the numbers they were given; those not listed do not exist.
CASES = [1, 2, 3, 4, 5, 7, 9, 10, 11, 13, 14, 17, 18, 21, 22, 23, 25, 26, 28, 29, 30, 32]
CASES += [33, 35, 37, 38, 39, 40, 42, 43, 45, 46]
SPEC = {"r": range(1, 23), "d": range(1, 22), "case": CASES}

PYTHON_TEST = re.compile(r"^\s*(?:async )?def (test_\w+)", re.MULTILINE)
# proptest and loom put further attributes, and a macro's own indent, around the function.
RUST_TEST = re.compile(r"#\[test\](?:\s*#\[[^\n]*\])*\s*fn (\w+)")
NUMBER = re.compile(r"(?<![a-z0-9])(r|d|case)(\d+)(?![a-z0-9])")


def find_numbers(names: list[str]) -> set[tuple[str, int]]:
    """The numbers in the names, as ("r", 16)."""
    return {(kind, int(digits)) for name in names for kind, digits in NUMBER.findall(name.lower())}


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
    """Print one line for each kind of number, and one for numbers that do not exist."""
    tested = find_numbers(find_names())
    for kind, numbers in SPEC.items():
        missing = [str(number) for number in numbers if (kind, number) not in tested]
        title = kind.upper() if len(kind) == 1 else kind
        print(f"{title} without a test: {' '.join(missing) or 'none'}")
    unknown = sorted((kind, number) for kind, number in tested if number not in SPEC[kind])
    if unknown:
        print("unknown:", " ".join(f"{kind}{number}" for kind, number in unknown))


if __name__ == "__main__":
    main()
