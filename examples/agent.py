"""An agent of one's own, for as long as an example runs: nothing needs to be installed or started.

Where AFBUS_NODE names the door of an agent, that one is used and left alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: How long an agent may take to end before it is killed.
END_S = 5.0

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def _end_with(parent: int) -> None:
    """Let the kernel end this process when its parent is gone, by kill -9 too; after fork."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before it could be said
        os._exit(1)


@contextmanager
def running_agent() -> Iterator[str]:
    """Set AFBUS_NODE to the door of an agent while the block runs; yield who that is, for people.

    The block's child processes inherit the door. At the end the agent is ended by its pid, and its
    folder is removed.

    Raises:
        SystemExit: The agent did not start; it has said why.
    """
    if door := os.environ.get("AFBUS_NODE"):
        yield f"the agent at {door}"
        return
    with tempfile.TemporaryDirectory(prefix="afbus-example-") as folder:
        door = str(Path(folder) / "node.sock")
        command = [sys.executable, "-m", "afbus.cli", "node", "--door", door]
        # A group of its own: Ctrl-C is for the example, which ends the agent when all else is over.
        with subprocess.Popen(  # noqa: S603 (our own command)
            command,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
            preexec_fn=partial(_end_with, os.getpid()),  # there is one thread here
        ) as agent:
            try:
                assert agent.stdout is not None
                if not agent.stdout.readline():  # its one line says that the door is open
                    raise SystemExit(f"the agent did not start: {' '.join(command)}")
                os.environ["AFBUS_NODE"] = door
                yield f"an agent of its own, pid {agent.pid}, at {door}"
            finally:
                os.environ.pop("AFBUS_NODE", None)
                agent.terminate()
                try:
                    agent.wait(END_S)
                except subprocess.TimeoutExpired:
                    agent.kill()
