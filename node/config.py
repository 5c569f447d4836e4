"""Settings of the agent: a TOML file that nobody needs, and the place of the door.

    door = "/run/afbus/node.sock"   # the socket; its folder also holds journal and lock
    mode = "0666"                   # who may come to the door
    node = "desk"                   # the name of this node, by default that of the host
    quota_bytes = 1073741824         # unread in rings of others, for each user
    quota_messages = 4194304
    quota_fds = 256
    endpoints_per_user = 4096
    matches_per_user = 131072
    connections = 16384             # of all users together
    ring_bytes_max = 67108864
    lanes = true                    # endpoints send to each other without the agent where they may
    cluster = "/var/lib/afbus-node" # the folder that `afbus node join` has made
    listen = "[::]:4451"            # where nodes of the cluster reach this one
    places = ["desk.example:4451"]  # what they are told of that; by default `listen`
    journal = "/run/afbus/journal"  # by what endpoints come back; by default beside the door
    carrier = "native"              # what moves links to other nodes, or "aioquic"
    grace_s = 5.0                   # how long endpoints may be away after the agent began anew
    hello_s = 5.0                   # how long a connection may be silent
    stale_ok_s = 86400              # how long old answers of an absent master hold; 0: not at all

Invariants:

1. Every error names file and key.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from ..proto.errors import ConfigError
from ..proto.limits import IDENTITY_BYTES, RING_BYTES_MAX, RING_BYTES_MIN, STALE_S
from ..proto.record import PLACES
from .core import Limits
from .place import NODE_PORT, parse_listen, parse_place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Connections of all users together: each may be an endpoint of two descriptors.
CONNECTIONS: Final = 16_384

#: The longest path of an AF_UNIX address, without its NUL.
DOOR_BYTES: Final = 107

#: The variable that names the door.
DOOR_VARIABLE: Final = "AFBUS_NODE"

_SYSTEM_DOOR: Final = Path("/run/afbus/node.sock")
_U32_MAX: Final = (1 << 32) - 1
_I64_MAX: Final = (1 << 63) - 1

# Lowest and highest value of each whole number.
_RANGES: Final = {
    "quota_bytes": (1, _I64_MAX),
    "quota_messages": (1, _I64_MAX),
    "quota_fds": (0, _U32_MAX),
    "endpoints_per_user": (1, 1 << 20),
    "matches_per_user": (0, 1 << 24),
    "connections": (1, 1 << 20),
    "ring_bytes_max": (RING_BYTES_MIN, RING_BYTES_MAX),
}
_SECONDS: Final = ("grace_s", "hello_s")
_OF_CLUSTER: Final = ("cluster", "listen", "places", "carrier", "stale_ok_s")
#: What can move links to other nodes: the datapath, without Python, or aioquic. Both speak the
#: same, so the nodes of a cluster need not agree. The master is always called by aioquic.
NATIVE: Final = "native"
CARRIERS: Final = (NATIVE, "aioquic")
#: Where peers are heard if nothing else is said: all addresses of this host.
LISTEN: Final = f"[::]:{NODE_PORT}"
#: An hour: nobody waits longer for a client that is away.
_SECONDS_MAX: Final = 3600.0
_MODE: Final = re.compile("0?[0-7]{3}")


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one agent; what is None has a default that depends on user and host."""

    door: Path | None = None
    #: Permission bits of the door: by default all may come to root's, nobody else to a user's.
    mode: int | None = None
    node: str | None = None
    #: Quotas of the switch for each user; what is missing is as in `_datapath`.
    quotas: Mapping[str, int] = field(default_factory=dict)
    connections: int = CONNECTIONS
    limits: Limits = field(default_factory=Limits)
    #: The folder of the membership, None for a host that is in no cluster.
    cluster: Path | None = None
    listen: str = LISTEN
    places: tuple[str, ...] = ()
    #: What endpoints come back by after a restart; None: beside the door, with its name.
    journal: Path | None = None
    #: One of `CARRIERS`.
    carrier: str = NATIVE
    #: How long without the cluster's master its old answers are believed; 0 for not at all.
    stale_ok_s: float = STALE_S
    #: Whether endpoints may send to each other without the agent (docs/internals-lanes.md).
    lanes: bool = True


def default_door(environ: Mapping[str, str], uid: int) -> Path:
    """Return where the agent of a user makes its door, if no setting says otherwise."""
    if environ.get(DOOR_VARIABLE):
        return Path(environ[DOOR_VARIABLE])
    runtime = environ.get("XDG_RUNTIME_DIR")
    if uid == 0 or not runtime:
        return _SYSTEM_DOOR
    return Path(runtime) / "afbus" / _SYSTEM_DOOR.name


def load_config(path: Path) -> Config:
    """Read a file of settings.

    Raises:
        ConfigError: It cannot be read, is not TOML, or a key is unknown or has a wrong value.
    """
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    except ValueError as error:
        # Wrong TOML, or not UTF-8.
        raise ConfigError(str(error), file=str(path)) from error
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], file: str) -> Config:
    """Return the settings of a decoded file; errors as `load_config`."""
    made: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    quotas: dict[str, int] = {}
    for key, value in values.items():
        if key == "door":
            made[key] = check_door(Path(_text(file, key, value)), file)
        elif key == "journal":
            made[key] = _journal(file, value)
        elif key == "mode":
            made[key] = _mode(file, key, value)
        elif key == "node":
            made[key] = check_node(_text(file, key, value), file)
        elif key in _OF_CLUSTER:
            made[key] = _of_cluster(file, key, value)
        elif key in _SECONDS:
            limits[key] = _seconds(file, key, value)
        elif key == "lanes":
            made[key] = _truth(file, key, value)
        elif key not in _RANGES:
            known = ", ".join(
                ("door", "journal", "lanes", "mode", "node", *_OF_CLUSTER, *_RANGES, *_SECONDS)
            )
            _fail(file, key, f"unknown key; there are {known}")
        elif key.startswith("quota_"):
            quotas[key] = _whole(file, key, value)
        elif key == "connections":
            made[key] = _whole(file, key, value)
        else:
            limits[key] = _whole(file, key, value)
    return Config(**made, quotas=quotas, limits=Limits(**limits))


def check_door(path: Path, file: str = "") -> Path:
    """Return a path that a socket can have; ConfigError for another."""
    if not path.is_absolute():
        _fail(file, "door", f"{path} does not begin at the root")
    if len(os.fsencode(path)) > DOOR_BYTES:
        _fail(file, "door", f"{path} has more than {DOOR_BYTES} bytes, the limit of AF_UNIX")
    return path


def check_node(name: str, file: str = "") -> str:
    """Return a name that a node can have; ConfigError for another."""
    if not name.isprintable() or not name or len(name.encode()) > IDENTITY_BYTES:
        _fail(file, "node", f"{name!a} is not 1 to {IDENTITY_BYTES} printable bytes")
    return name


def _fail(file: str, key: str, why: str) -> NoReturn:
    raise ConfigError(why, file=file, key=key)


def _text(file: str, key: str, value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        _fail(file, key, f"{value!a} is not a text")
    return value


def _of_cluster(file: str, key: str, value: object) -> Path | str | float | tuple[str, ...]:
    if key == "cluster":
        return Path(_text(file, key, value))
    if key == "stale_ok_s":
        return _stale(file, key, value)
    if key == "carrier":
        name = _text(file, key, value)
        return name if name in CARRIERS else _fail(file, key, f"{name!a} is not native or aioquic")
    if key == "listen":
        return _place(file, key, value, parse_listen)
    if not isinstance(value, list) or len(value) > PLACES:
        _fail(file, key, f"{value!a} is not a list of up to {PLACES} places")
    return tuple(_place(file, key, one, parse_place) for one in value)


def _place(file: str, key: str, value: object, parse: Callable[[str], object]) -> str:
    text = _text(file, key, value)
    try:
        parse(text)
    except ConfigError as error:
        _fail(file, key, str(error))
    return text


def _journal(file: str, value: object) -> Path:
    path = Path(_text(file, "journal", value))
    if not path.is_absolute() or path.is_dir():
        _fail(file, "journal", f"{path} is not the path of a file that begins at the root")
    return path


def _mode(file: str, key: str, value: object) -> int:
    if not isinstance(value, str) or _MODE.fullmatch(value) is None:
        _fail(file, key, f'{value!a} is not an octal text such as "0666"')
    return int(value, 8)


def _truth(file: str, key: str, value: object) -> bool:
    if not isinstance(value, bool):
        _fail(file, key, f"{value!a} is neither true nor false")
    return value


def _whole(file: str, key: str, value: object) -> int:
    low, high = _RANGES[key]
    if type(value) is not int or not low <= value <= high:
        _fail(file, key, f"{value!a} is not a whole number from {low} to {high}")
    return value


def _stale(file: str, key: str, value: object) -> float:
    if type(value) not in (int, float) or not 0 <= value <= STALE_S:  # type: ignore[operator]  # a number
        _fail(file, key, f"{value!a} is not a number of seconds up to {STALE_S:g}, or 0")
    return float(value)  # type: ignore[arg-type]  # a number, as was checked


def _seconds(file: str, key: str, value: object) -> float:
    # Written so that NaN is refused too.
    if type(value) not in (int, float) or not 0 < value <= _SECONDS_MAX:  # type: ignore[operator]  # a number
        _fail(file, key, f"{value!a} is not a number of seconds up to {_SECONDS_MAX:g}")
    return float(value)  # type: ignore[arg-type]  # a number, as was checked
