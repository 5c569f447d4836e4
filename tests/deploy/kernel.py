"""System calls that Python has no name for: namespaces, mounts, processes."""

from __future__ import annotations

import ctypes
import os
from typing import Final

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16_384, 1 << 18
MS_RELATIME: Final = 1 << 21

LIBC: Final = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError if a function of the C library has failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Enter new namespaces, CLONE_NEW..."""
    check(LIBC.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int = 0, data: str = "") -> None:
    """Mount, in the caller's mount namespace."""
    texts = [None if one is None else one.encode() for one in (source, target, kind)]
    done = LIBC.mount(*texts, ctypes.c_ulong(flags), data.encode())
    check(done, f"mount {target}")


def prctl(option: int, value: int) -> None:
    """Set something of this process."""
    check(LIBC.prctl(option, value, 0, 0, 0), f"prctl {option}")
