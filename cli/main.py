"""The command `afbus`, its exit codes, and how errors are told.

Invariants:

1. Whatever goes wrong is one line on stderr and an exit code of `Exit`; never a traceback, but for
   a bug.
2. Standard output has nothing but results: `--json` there is one object a line.
"""

from __future__ import annotations

import os
import sys
from enum import IntEnum

import click

from .. import __version__
from .bus import bus, join
from .look import list_rows, monitor
from .master import master, revoke, token
from .node import node, status
from .output import NoReaderError, epilog
from .policy import policy
from .talk import listen, publish, request, send, serve


class Exit(IntEnum):
    """What the exit code says; `--help` tells the same."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    NO_AGENT = 3
    DEADLINE = 4
    INTERRUPTED = 130
    NO_READER = 141


@click.group(
    epilog=epilog(
        "Exit codes:",
        "0    done",
        "1    refused; standard error says why",
        "2    wrong usage, or a wrong file of settings",
        "3    no agent answers, or no master",
        "4    a deadline has passed",
        "130  ended by Ctrl-C (`afbus node`: 0, it is an ordinary end)",
        "141  nobody reads the output any more",
    )
    + epilog(
        "Examples:",
        "afbus node &                                  run an agent",
        "afbus bus create /demo &                      create a bus, be its master",
        "afbus listen /demo sensors &                  hear all about sensors",
        "afbus publish /demo 'sensors.cpu core=0' 42   tell who wants to know",
        "afbus list addresses /demo                    see who is there",
    ),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "--version", prog_name="afbus")
def afbus() -> None:
    """Work with AF_BUS in user space: agents, buses, messages.

    The agent is found by AFBUS_NODE, which names its door; without that at
    $XDG_RUNTIME_DIR/afbus/node.sock, else at /run/afbus/node.sock.

    With --json each line of output is one JSON object. What is bytes stands there as text under
    its own key if it is UTF-8, else in base64 under the key with _base64 behind it.
    """


for _command in (
    node,
    status,
    bus,
    join,
    send,
    publish,
    listen,
    request,
    serve,
    list_rows,
    monitor,
    master,
    token,
    revoke,
    policy,
):
    afbus.add_command(_command)


def main() -> None:
    """Run the command of this process's arguments, and exit."""
    try:
        afbus.main(prog_name="afbus", standalone_mode=False)
    except click.exceptions.Abort:
        code = Exit.INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = Exit(error.exit_code)
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except NoReaderError:
        # What is left in the buffer would be written, and fail again, at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.NO_READER
    except Exception as error:
        code = _tell(error)
    else:
        code = Exit.DONE
    sys.exit(code)


def _tell(error: Exception) -> Exit:
    """Print what an error says; raise it again if it is a bug of ours."""
    from ..proto.errors import AfbusError, BusError, ConfigError, DeadlineExceeded, NoAgent

    if not isinstance(error, AfbusError):
        raise error
    text = error.message if isinstance(error, BusError) else str(error)
    click.echo(f"afbus: {text}", err=True)
    match error:
        case NoAgent():
            return Exit.NO_AGENT
        case DeadlineExceeded():
            return Exit.DEADLINE
        case ConfigError():
            return Exit.USAGE
        case _:
            return Exit.REFUSED
