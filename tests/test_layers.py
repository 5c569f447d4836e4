"""Who may import whom: each folder at the top knows only the folders below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Folder to what it may import of ours. `node` and `master` are strangers; None allows everything.
MAY_IMPORT: dict[str, frozenset[str] | None] = {
    "proto": frozenset(),
    "link": frozenset({"proto"}),
    "node": frozenset({"proto", "link", "datapath"}),
    "master": frozenset({"proto", "link"}),
    "client": frozenset({"proto", "datapath"}),
    "cli": None,
}

# What reaches outside the process, waits, or gives another answer the next time.
IO_MODULES = frozenset(
    "asyncio concurrent ctypes fcntl glob http importlib io logging mmap multiprocessing os "
    "pathlib random sched secrets select selectors shutil signal socket socketserver sqlite3 ssl "
    "subprocess sys syslog tempfile threading time urllib".split()
)
# The exceptions: a module is then judged by what is used of it.
PURE_NAMES = frozenset({"os.strerror"})
IO_CALLS = frozenset({"open", "print", "input", "exec", "eval", "__import__"})


def find_imports(source: str, package: str) -> list[tuple[int, str]]:
    """Line and dotted name of all that a module of `package` imports, relative imports resolved.

    `from a import b` gives `a.b`: whether b is a module does not matter to the rules.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
    return found


def find_io(source: str) -> list[str]:
    """What a module imports or calls that does IO, with the line."""
    judged_by_use = {name.partition(".")[0] for name in PURE_NAMES}
    used = find_imports(source, "")
    used = [(line, name) for line, name in used if name not in judged_by_use]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in judged_by_use:
                used.append((node.lineno, f"{module}.{name}"))
            case ast.Call(func=ast.Name(id=name)) if name in IO_CALLS:
                used.append((node.lineno, f"{name}()"))
    return [
        f"{line}: {name} (does IO)"
        for line, name in used
        if (name.partition(".")[0] in IO_MODULES or name.endswith("()")) and name not in PURE_NAMES
    ]


def find_breaches(folder: str, source: str, package: str) -> list[str]:
    """What a module of `folder` imports or calls against the rules, with the line."""
    allowed = MAY_IMPORT[folder]
    breaches = []
    for line, name in find_imports(source, package):
        top, _, rest = name.partition(".")
        if top in MAY_IMPORT:
            breaches.append(f"{line}: {name} (the import name is afbus.{top})")
        if top == "afbus" and allowed is not None:
            ours = rest.partition(".")[0].removeprefix("_")
            if ours != folder and ours not in allowed:
                breaches.append(f"{line}: {name}")
    if folder == "proto":
        breaches += find_io(source)
    return breaches


FOLDERS = [name for name in MAY_IMPORT if (ROOT / name).is_dir()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_imports_only_what_it_may(folder: str) -> None:
    """No module of the folder imports against the layers."""
    breaches = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        where = path.relative_to(ROOT)
        package = ".".join(("afbus", *where.parent.parts))
        found = find_breaches(folder, path.read_text(), package)
        breaches += [f"{where}:{breach}" for breach in found]
    assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("proto", "import afbus.link"),
        ("proto", "from ..node import route"),
        ("proto", "from .. import node"),
        ("proto", "from afbus import _datapath"),
        ("proto", "import os.path"),
        ("proto", "def f():\n    import socket"),
        ("proto", "open('x')"),
        ("proto", "import os\nos.unlink('x')"),
        ("proto", "from os import unlink"),
        ("node", "from afbus.master import journal"),
        ("node", "from afbus import __version__"),
        ("node", "import proto"),
        ("master", "from afbus.node import route"),
        ("master", "from afbus import _datapath"),
        ("client", "from afbus.link import quic"),
    ],
)
def test_breach_is_found(folder: str, source: str) -> None:
    """Each rule bites."""
    assert len(find_breaches(folder, source, f"afbus.{folder}")) == 1


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("proto", "import os\nos.strerror(1)"),
        ("proto", "import struct\nfrom . import address\nfrom afbus.proto.address import Address"),
        ("node", "import asyncio\nfrom afbus import _datapath, proto\nfrom .route import Route"),
        ("client", "from afbus._datapath import Ring\nfrom ..proto import address"),
        ("cli", "import afbus\nfrom afbus.node import agent"),
    ],
)
def test_allowed_import_is_no_breach(folder: str, source: str) -> None:
    """What the layers allow passes."""
    assert find_breaches(folder, source, f"afbus.{folder}") == []
