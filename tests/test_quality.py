"""House rules that no linter knows."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

import afbus
from afbus import _datapath

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("proto", "link", "node", "master", "client", "cli")
CODE = [
    path
    for folder in (*PACKAGES, "src/afbus", "tests", "bench", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any((ROOT / "src/afbus" / name) in path.parents for name in PACKAGES)
]
PRODUCT = [path for path in CODE if path.relative_to(ROOT).parts[0] in (*PACKAGES, "src")]
TESTS = [path for path in CODE if path.relative_to(ROOT).parts[0] == "tests"]

FORBIDDEN_WORDS = ("manager", "handler", "helper", "util", "utils", "base", "common", "misc")
# A ruff or mypy escape, and then why it is there.
ESCAPE = re.compile(r"#\s*(?:noqa|type:\s*ignore)")
# Why a test lets time pass.
LASTS = re.compile(r"# lasts: \S")
EXPLAINED = re.compile(
    r"# (?:noqa: [A-Z0-9, ]+?|type: ignore\[[\w, -]+\])(?:  # \S| \(\S)"
    # the code itself says why
    r"|# type: ignore\[import-untyped\]"
)


def name_words(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]*[a-z0-9]+|[A-Z]+", name)}


def relative(path: Path) -> str:
    """The path from the root of the repository, for messages."""
    return str(path.relative_to(ROOT))


def test_each_folder_has_its_link() -> None:
    """src/afbus links to each package folder at the top, relatively, and to nothing else."""
    links = {
        path.name: os.readlink(path) for path in (ROOT / "src/afbus").iterdir() if path.is_symlink()
    }
    assert links == {name: f"../../{name}" for name in PACKAGES if (ROOT / name).is_dir()}


def test_versions_agree() -> None:
    """The package, the crate, the built library and the changelog name one version."""
    crate = tomllib.loads((ROOT / "datapath/Cargo.toml").read_text())["package"]["version"]
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert {crate, _datapath.VERSION, heading[1]} == {afbus.__version__}


@pytest.mark.parametrize("path", PRODUCT, ids=relative)
def test_names_say_what_a_thing_is(path: Path) -> None:
    """No module and no class is called a manager, a helper or the like."""
    names = [path.stem] + [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert [name for name in names if name_words(name) & set(FORBIDDEN_WORDS)] == []


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_each_escape_is_explained(path: Path) -> None:
    """`noqa` and `type: ignore` name their code, and a second comment or brackets say why."""
    with path.open("rb") as file:
        comments = [
            token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT
        ]
    escapes = [token for token in comments if ESCAPE.match(token.string)]
    assert [token.start[0] for token in escapes if not EXPLAINED.match(token.string)] == []


@pytest.mark.parametrize("path", TESTS, ids=relative)
def test_no_test_sleeps(path: Path) -> None:
    """Tests wait for events or move a clock of their own.

    An outage lasts, a sender has a pace: such a sleep says so on its line, behind `# lasts:`.
    """
    lines = path.read_text().splitlines()
    sleeps = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func) in ("time.sleep", "asyncio.sleep")
        # asyncio.sleep(0) only lets others run
        and not (node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0)
        and not LASTS.search(lines[node.lineno - 1])
    ]
    assert sleeps == []


def test_native_calls_bear_their_docstrings() -> None:
    """What `help` shows of the native calls that applications use is what the stub file says."""
    stubs = ast.parse((ROOT / "src/afbus/_datapath.pyi").read_text())
    documented = [
        (getattr(_datapath, stub.name), call)
        for stub in stubs.body
        if isinstance(stub, ast.ClassDef) and stub.name in ("Port", "Loan", "SendLoan")
        for call in stub.body
        if isinstance(call, ast.FunctionDef) and not call.name.startswith("_")
    ]
    assert len(documented) >= 7
    for kind, call in documented:
        assert inspect.getdoc(getattr(kind, call.name)) == ast.get_docstring(call), call.name


def test_spec_numbers_are_listed() -> None:
    """The numbers without a test can be listed, and no test names a number that does not exist."""
    script = ROOT / "tests/spec_numbers.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert [line.split(" ", 1)[0] for line in done.stdout.splitlines()] == ["R", "D", "case"]
