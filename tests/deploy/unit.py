"""Unit files as the tests read them, and the sandbox that one of them asks for, without systemd.

Only what could break the agent is done, and as systemd 252 does it: another user without
capabilities, a file system that is read-only but for the unit's own folders, hidden homes, and the
filters for system calls, address families and memory that may be written and executed.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import shlex
import socket
import subprocess
from functools import cache
from typing import TYPE_CHECKING, Final

from tests.deploy.kernel import LIBC, MS_BIND, MS_PRIVATE, MS_REC, check, mount, prctl, unshare

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_CLONE_NEWNS: Final = 0x0002_0000
_SYS_MOUNT_SETATTR: Final = 442
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_PROT_WRITE, _PROT_EXEC = 2, 4

_SCMP_ACT_ALLOW: Final = 0x7FFF_0000
_SCMP_CMP_EQ, _SCMP_CMP_MASKED_EQ = 4, 7


def _refused(number: int) -> int:
    """The action of libseccomp that makes a system call fail."""
    return 0x0005_0000 | number


class Unit:
    """A unit file: settings of all sections, in their order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings: list[tuple[str, str, str]] = []
        section = ""
        for line in path.read_text().replace("\\\n", " ").splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif line and line[0] not in "#;":
                key, _, value = line.partition("=")
                self._settings.append((section, key, value))

    def get_all(self, key: str) -> list[str]:
        """All values of a setting, in their order."""
        return [value for _, one, value in self._settings if one == key]

    def get(self, key: str) -> str:
        """The one value of a setting; empty if there is none."""
        (value,) = self.get_all(key) or [""]
        return value

    def is_on(self, key: str) -> bool:
        """Whether a setting is given, and is yes."""
        return self.get(key) in ("yes", "true", "on", "1", "strict")

    @property
    def command(self) -> list[str]:
        """The words of ExecStart."""
        return shlex.split(self.get("ExecStart"))


@cache
def _expand(group: str) -> frozenset[str]:
    """The names of the system calls of a group such as @system-service."""
    command = ["systemd-analyze", "syscall-filter", group]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = [line.strip() for line in out.splitlines()[1:]]
    names = {word for word in words if word and word[0] not in "#@"}
    return frozenset(names).union(*(_expand(word) for word in words if word.startswith("@")))


def find_calls(unit: Unit) -> frozenset[str]:
    """The system calls that a unit may use, by name."""
    allowed: frozenset[str] = frozenset()
    for value in unit.get_all("SystemCallFilter"):
        calls = frozenset[str]().union(*(_expand(one) for one in value.lstrip("~").split()))
        allowed = allowed - calls if value.startswith("~") else allowed | calls
    return allowed


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("place", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


class _Filter:
    """A filter of system calls, by libseccomp."""

    def __init__(self, default: int) -> None:
        self._library = load_seccomp()
        assert self._library is not None
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.seccomp_init(default))

    def add(self, action: int, name: str, *comparisons: tuple[int, int, int, int]) -> None:
        """Add a rule; a call that this machine does not have needs none."""
        assert self._library is not None
        number = self._library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            return
        given = (_Comparison * len(comparisons))(*(_Comparison(*one) for one in comparisons))
        failed = self._library.seccomp_rule_add_array(
            self._context, ctypes.c_uint32(action), number, len(comparisons), given
        )
        assert not failed, f"{name}: {os.strerror(-failed)}"

    def load(self) -> None:
        """Be filtered from now on."""
        assert self._library is not None
        failed = self._library.seccomp_load(self._context)
        assert not failed, os.strerror(-failed)


def load_seccomp() -> ctypes.CDLL | None:
    """The library, None if it is not here."""
    name = ctypes.util.find_library("seccomp")
    return ctypes.CDLL(name) if name else None


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("user_namespace", ctypes.c_uint64),
    )


def _set_read_only(path: str, is_read_only: bool) -> None:
    bit = _MOUNT_ATTR_RDONLY
    given = _MountAttributes(bit, 0, 0, 0) if is_read_only else _MountAttributes(0, bit, 0, 0)
    check(
        LIBC.syscall(
            _SYS_MOUNT_SETATTR,
            _AT_FDCWD,
            path.encode(),
            _AT_RECURSIVE,
            ctypes.byref(given),
            ctypes.sizeof(given),
        ),
        f"mount_setattr {path}",
    )


def _protect_files(unit: Unit, writable: Iterable[str]) -> None:
    unshare(_CLONE_NEWNS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    for path in writable:
        mount(path, path, None, MS_BIND)
    if unit.get("ProtectSystem") == "strict":
        _set_read_only("/", True)
        for path in writable:
            _set_read_only(path, False)
    if unit.is_on("ProtectHome"):
        for path in ("/home", "/root"):
            mount("hidden", path, "tmpfs", 0, "mode=000")


def _drop_rights(unit: Unit, uid: int) -> None:
    if unit.get_all("CapabilityBoundingSet") == [""]:
        # As long as there are capabilities: the last one is where the kernel says EINVAL.
        number = 0
        while LIBC.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) == 0:
            number += 1
    if unit.get("User"):
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if unit.is_on("NoNewPrivileges"):
        prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _filter_calls(unit: Unit, calls: Iterable[str]) -> None:
    rest = _Filter(_SCMP_ACT_ALLOW)
    families = unit.get("RestrictAddressFamilies").split()
    allowed = {getattr(socket, name).value for name in families}
    for family in set(range(64)) - allowed:
        comparison = (0, _SCMP_CMP_EQ, family, 0)
        rest.add(_refused(errno.EAFNOSUPPORT), "socket", comparison)
    if unit.is_on("MemoryDenyWriteExecute"):
        both = _PROT_WRITE | _PROT_EXEC
        rest.add(_refused(errno.EPERM), "mmap", (2, _SCMP_CMP_MASKED_EQ, both, both))
        for name in ("mprotect", "pkey_mprotect"):
            comparison = (2, _SCMP_CMP_MASKED_EQ, _PROT_EXEC, _PROT_EXEC)
            rest.add(_refused(errno.EPERM), name, comparison)
    rest.load()
    assert unit.get("SystemCallErrorNumber") == "EPERM"
    listed = _Filter(_refused(errno.EPERM))
    for name in calls:
        listed.add(_SCMP_ACT_ALLOW, name)
    listed.load()


def enter_sandbox(unit: Unit, calls: Iterable[str], uid: int, writable: Iterable[str]) -> None:
    """Be what a service of this unit is; only root can.

    Args:
        unit: The unit.
        calls: What `find_calls` has found.
        uid: Whose number stands for `User`.
        writable: The folders of the unit.
    """
    _protect_files(unit, writable)
    os.umask(int(unit.get("UMask"), 8))
    _drop_rights(unit, uid)
    _filter_calls(unit, calls)
