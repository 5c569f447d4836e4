"""Settings: each wrong one is an error that names file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from afbus.node.config import Config, default_door, load_config
from afbus.node.core import Limits
from afbus.proto.errors import ConfigError


def test_everything_can_be_set(tmp_path: Path) -> None:
    """Each key has its place."""
    file = tmp_path / "afbus.toml"
    file.write_text(
        """
        door = "/run/x/node.sock"
        mode = "0660"
        node = "desk"
        quota_bytes = 1000
        quota_messages = 10
        quota_fds = 0
        endpoints_per_user = 5
        matches_per_user = 6
        connections = 7
        ring_bytes_max = 8192
        grace_s = 1
        hello_s = 0.5
        cluster = "/var/lib/x"
        listen = ":4460"
        places = ["desk:1"]
        journal = "/run/x/journal"
        carrier = "aioquic"
        stale_ok_s = 0
        lanes = false
        """
    )
    assert load_config(file) == Config(
        Path("/run/x/node.sock"),
        0o660,
        "desk",
        {"quota_bytes": 1000, "quota_messages": 10, "quota_fds": 0},
        7,
        Limits(5, 6, 8192, 1.0, 0.5),
        Path("/var/lib/x"),
        ":4460",
        ("desk:1",),
        Path("/run/x/journal"),
        "aioquic",
        0.0,
        lanes=False,
    )


def test_nothing_needs_to_be_set(tmp_path: Path) -> None:
    """An empty file is as none."""
    file = tmp_path / "afbus.toml"
    file.write_text("")
    assert load_config(file) == Config()


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("dor = 1", "dor"),
        ("door = 1", "door"),
        ('door = "relative"', "door"),
        (f'door = "/{"x" * 107}"', "door"),
        ('journal = "relative"', "journal"),
        ('journal = "/"', "journal"),
        ('listen = "desk:1"', "listen"),
        ('places = [":4451"]', "places"),
        ("mode = 0o666", "mode"),
        ('mode = "rw"', "mode"),
        ('mode = "7777"', "mode"),
        ('node = ""', "node"),
        ('node = "a\\tb"', "node"),
        (f'node = "{"x" * 256}"', "node"),
        ('quota_bytes = "1"', "quota_bytes"),
        ("quota_messages = 0", "quota_messages"),
        ("quota_fds = true", "quota_fds"),
        ("endpoints_per_user = 0", "endpoints_per_user"),
        ("matches_per_user = -1", "matches_per_user"),
        ("connections = 1.5", "connections"),
        ("ring_bytes_max = 1", "ring_bytes_max"),
        ("grace_s = nan", "grace_s"),
        ("grace_s = inf", "grace_s"),
        ("hello_s = 0", "hello_s"),
        ('hello_s = "5"', "hello_s"),
        ("hello_s = true", "hello_s"),
        ("stale_ok_s = -1", "stale_ok_s"),
        ("stale_ok_s = 86401", "stale_ok_s"),
        ("stale_ok_s = nan", "stale_ok_s"),
        ("stale_ok_s = false", "stale_ok_s"),
        ("lanes = 1", "lanes"),
    ],
)
def test_wrong_settings_name_file_and_key(tmp_path: Path, line: str, key: str) -> None:
    """Unknown keys, wrong types and values beyond their range."""
    file = tmp_path / "afbus.toml"
    file.write_text(line)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert (caught.value.file, caught.value.key) == (str(file), key)
    assert str(caught.value).startswith(f"{file}: {key}: ")


@pytest.mark.parametrize("content", [b"no toml", b"\xff"])
def test_what_is_no_toml_names_the_file(tmp_path: Path, content: bytes) -> None:
    """And says where it went wrong."""
    file = tmp_path / "afbus.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="afbus"):
        load_config(file)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """The reason is the system's."""
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("environ", "uid", "door"),
    [
        ({}, 1000, "/run/afbus/node.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/1"}, 1000, "/run/user/1/afbus/node.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/1"}, 0, "/run/afbus/node.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/1", "AFBUS_NODE": "/x"}, 1000, "/x"),
    ],
)
def test_place_of_the_door(environ: dict[str, str], uid: int, door: str) -> None:
    """The variable, else the user's runtime directory, else the system's."""
    assert default_door(environ, uid) == Path(door)
