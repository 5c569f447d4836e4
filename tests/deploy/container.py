"""A container made by hand: a role of `tests.cases.actors` in namespaces of its own.

What an engine does, and nothing else: a user, mount, pid, network, ipc and uts namespace, a root
file system in memory, and one folder of the host in it, the one with the node's socket, read-only.
There is no file of the host, no network but a loopback that is down, and no /dev/shm. The role was
forked from a process that had imported everything, so that not even the interpreter is needed.

    contained   unshare -- "unshared" --> the test writes the maps of uids -- "mapped" -->
                fork -- pid outside --> new root, then the role, as pid 1
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.deploy.kernel import (
    LIBC,
    MS_BIND,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_RELATIME,
    MS_REMOUNT,
    check,
    mount,
    prctl,
    unshare,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cases.actors import Actor, Fleet, Stage

#: Where the folder of the socket is within a container.
DOOR: Final = "/run/afbus/node.sock"
#: The host's uid that a container's root is, where the test may choose that.
OUTER_ROOT: Final = 200_000
#: How many uids a container has, where the test may choose that: 0 to 999.
UIDS: Final = 1000

CLONE_NEWUSER: Final = 0x1000_0000
# CLONE_NEW... of user, mount, cgroup, uts, ipc, pid and network.
_NAMESPACES: Final = 0x7E02_0000
# Flags that a mount of the host must keep: nosuid, nodev, noexec, noatime, nodiratime, relatime.
_KEPT: Final = 2 | 4 | 8 | 1024 | 2048 | 4096
_ST_RELATIME: Final = 4096
_MNT_DETACH: Final = 2
_PR_SET_PDEATHSIG: Final = 1
_SYS_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}


def _become(uid: int) -> None:
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def find_obstacle() -> str:
    """Say why no container can be made here; empty if one can."""
    if os.uname().machine not in _SYS_PIVOT_ROOT:
        return f"the number of pivot_root on {os.uname().machine} is not known"
    pid = os.fork()
    if not pid:
        try:
            unshare(_NAMESPACES)
        except OSError as error:
            os._exit(error.errno or errno.EPERM)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return f"namespaces are not allowed here: {os.strerror(code)}" if code else ""


def _change_root(folder: str, place: str, is_writable: bool, has_proc: bool) -> None:
    """Make an empty root at a folder, with the folder of the door in it, and enter it."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("root", folder, "tmpfs")
    inside = folder + os.path.dirname(DOOR)
    os.makedirs(inside)
    mount(os.path.dirname(place), inside, None, MS_BIND)
    if not is_writable:
        given = os.statvfs(inside).f_flag
        kept = given & _KEPT & ~_ST_RELATIME | (MS_RELATIME if given & _ST_RELATIME else 0)
        mount("none", inside, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)
    if has_proc:
        os.mkdir(f"{folder}/proc")
        # Only who is in the pid namespace can mount its /proc: this is pid 1.
        mount("proc", f"{folder}/proc", "proc")
    os.chdir(folder)
    # The old root is put over the new one, and then taken away.
    check(LIBC.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def contained(
    stage: Stage,
    play: list[str],
    root: str,
    inner: int,
    is_writable: bool,
    has_proc: bool,
    door: str | None,
    args: dict[str, Any],
) -> None:
    """Be a container, and play a role in it as `inner`, a uid of the container."""
    role = getattr(importlib.import_module(play[0]), play[1])
    unshare(_NAMESPACES)
    stage.tell("unshared")
    assert stage.hear() == "mapped"
    if Path("/proc/self/setgroups").read_text() == "allow\n":
        os.setgroups([])
    _become(0)
    pid = os.fork()
    if pid:
        stage.tell(pid)
        # The test has the parent's pidfd: with it goes the container, and the other way round.
        os.waitpid(pid, 0)
        return
    try:
        _change_root(root, door or stage.place, is_writable, has_proc)
        _become(inner)
        # After that: a change of the user takes it back.
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        stage.place = DOOR
        role(stage, **args)
    except BaseException:
        with contextlib.suppress(OSError):
            stage.tell({"failed": traceback.format_exc()})
        os._exit(1)
    os._exit(0)


class Yard:
    """Where the containers of a test are made; each gets a folder that becomes its root."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self._fleet = fleet
        self._folder = folder
        self._count = 0

    def start(
        self,
        role: Callable[..., None],
        *,
        outer: int = OUTER_ROOT,
        uid: int = 0,
        is_writable: bool = False,
        has_proc: bool = False,
        door: Path | None = None,
        **args: Any,
    ) -> Container:
        """Let a role play in a container.

        Args:
            role: As `Fleet.start` takes it.
            outer: What its uid 0 is outside; without root's rights it is the test's own user.
            uid: Who the role is, inside.
            is_writable: Whether it may change the folder of the socket.
            has_proc: Whether it has a /proc, of its own pid namespace.
            door: The socket whose folder it gets; by default that of the fleet.
            args: Further arguments of the role.
        """
        self._count += 1
        root = self._folder / str(self._count)
        root.mkdir()
        actor = self._fleet.start(
            contained,
            play=[role.__module__, role.__name__],
            root=str(root),
            inner=uid,
            is_writable=is_writable,
            has_proc=has_proc,
            door=str(door) if door else None,
            args=args,
        )
        assert actor.hear() == "unshared"
        _write_maps(Path(f"/proc/{actor.pid}"), outer)
        actor.tell("mapped")
        return Container(actor, actor.hear(), outer if os.geteuid() == 0 else os.geteuid())


class Container:
    """A container, as the test sees it."""

    def __init__(self, actor: Actor, pid: int, outer: int) -> None:
        self.actor = actor
        #: The number of its first process, outside.
        self.pid = pid
        #: What its uid 0 is outside.
        self.outer = outer

    def hear(self) -> Any:
        """Wait for what the role tells."""
        return self.actor.hear()

    def tell(self, value: Any) -> None:
        """Tell the role something."""
        self.actor.tell(value)

    def finish(self) -> None:
        """Wait for the end of the role; AssertionError if it failed."""
        self.actor.finish()

    def kill(self) -> None:
        """Kill it as an engine does that has lost patience."""
        self.actor.kill()


def _write_maps(proc: Path, outer: int) -> None:
    """Say who the users of a new user namespace are outside."""
    if os.geteuid() == 0:
        for name in ("uid_map", "gid_map"):
            (proc / name).write_text(f"0 {outer} {UIDS}\n")
    else:
        (proc / "setgroups").write_text("deny")
        (proc / "uid_map").write_text(f"0 {os.geteuid()} 1\n")
        (proc / "gid_map").write_text(f"0 {os.getegid()} 1\n")
