"""The state of a master on disk: made once, its owner's alone, errors that name the file."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest
from tests.master.world import NOW_UTC

from afbus.master.directory import Directory
from afbus.master.issuer import ISSUING_LIFE_S
from afbus.master.policy import Action, load_policy, parse_policy
from afbus.proto.errors import AddressInUse, ConfigError, InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path


def make(path: Path, root_key: Path | None = None) -> Directory:
    """Make a cluster."""
    directory = Directory(path)
    directory.make("demo", NOW_UTC, os.urandom, root_key)
    return directory


def test_a_cluster_is_made_with_what_it_needs(tmp_path: Path) -> None:
    """Nobody else may read it, whatever the umask is; its policy allows nothing yet."""
    previous = os.umask(0)
    try:
        directory = make(tmp_path / "a" / "state")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in directory.path.iterdir()}
    names = ["root.pem", "root.key", "issuing.pem", "issuing.key", "policy.toml"]
    assert modes == dict.fromkeys(names, 0o600)
    issuer = directory.load()
    assert issuer.cluster == "demo"
    assert load_policy(directory.policy).rules == ()


def test_the_example_in_a_new_policy_lets_members_talk(tmp_path: Path) -> None:
    """Without its comment signs it has a hall to join, and members who may send to each other."""
    text = make(tmp_path / "state").policy.read_text()
    lines = text[text.index("# [[rule]]") :].splitlines()
    policy = parse_policy("\n".join(line.removeprefix("#") for line in lines))
    hall, member, path = "uid/0@hub", "uid/1000@desk", b"/counters"
    assert policy.decide(Action.BIND, hall, path).is_allowed
    assert not policy.decide(Action.BIND, member, path).is_allowed
    assert policy.get_reach(member, path) == ("hall", "org.example.**")
    assert policy.get_reach(hall, path) == ()


def test_a_cluster_is_made_once(tmp_path: Path) -> None:
    """Not over another one, and not among other files."""
    directory = make(tmp_path / "state")
    before = {file: file.read_bytes() for file in directory.path.iterdir()}
    with pytest.raises(ConfigError, match="not empty"):
        make(tmp_path / "state")
    assert {file: file.read_bytes() for file in directory.path.iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        make(tmp_path / "other")
    (tmp_path / "empty").mkdir(mode=0o755)
    assert stat.S_IMODE(make(tmp_path / "empty").path.stat().st_mode) == 0o700
    with pytest.raises(InvalidArgument):
        Directory(tmp_path / "name").make("a/b", NOW_UTC, os.urandom, None)
    assert not (tmp_path / "name").exists()


def test_the_root_key_may_be_elsewhere(tmp_path: Path) -> None:
    """The master does without it; a key that is there already is not overwritten."""
    drawer = tmp_path / "drawer.key"
    directory = make(tmp_path / "state", drawer)
    assert stat.S_IMODE(drawer.stat().st_mode) == 0o600
    assert not directory.root_key.exists()
    directory.load()
    with pytest.raises(ConfigError, match="drawer"):
        make(tmp_path / "other", drawer)


def test_the_issuing_certificate_is_renewed_with_the_root_key(tmp_path: Path) -> None:
    """Later than before, with the same issuing key; with another key, never."""
    drawer = tmp_path / "drawer.key"
    directory = make(tmp_path / "state", drawer)
    before = directory.load()
    key = directory.issuing_key.read_bytes()
    until = directory.renew(drawer, NOW_UTC + 1000, os.urandom)
    after = directory.load()
    assert until == after.issuing_until_utc == before.issuing_until_utc + 1000
    assert until < NOW_UTC + 1000 + ISSUING_LIFE_S
    assert after.root == before.root
    assert directory.issuing_key.read_bytes() == key
    other = make(tmp_path / "other")
    with pytest.raises(ConfigError, match="not the key of the root"):
        directory.renew(other.root_key, NOW_UTC, os.urandom)
    with pytest.raises(ConfigError, match=r"root\.key"):
        directory.renew(None, NOW_UTC, os.urandom)
    assert directory.load().issuing_until_utc == until


def test_what_others_may_read_is_not_used(tmp_path: Path) -> None:
    """The folder, and the key."""
    directory = make(tmp_path / "state")
    directory.issuing_key.chmod(0o640)
    with pytest.raises(ConfigError, match=r"issuing\.key: may be read"):
        directory.load()
    directory.issuing_key.chmod(0o600)
    directory.path.chmod(0o755)
    with pytest.raises(ConfigError, match="state: may be read"):
        directory.load()
    directory.path.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(directory.issuing_key, 12345, 12345)
        with pytest.raises(ConfigError, match="belongs to user 12345"):
            directory.load()


def test_files_that_are_wrong(tmp_path: Path) -> None:
    """Missing, garbage, of two clusters: the error names the file."""
    directory = make(tmp_path / "state")
    other = make(tmp_path / "other")
    with pytest.raises(ConfigError, match="none: is no state"):
        Directory(tmp_path / "none").load()
    for file in (directory.issuing, directory.issuing_key):
        data = file.read_bytes()
        for wrong in (b"", b"garbage"):
            file.write_bytes(wrong)
            with pytest.raises(ConfigError, match=file.name):
                directory.load()
        file.write_bytes((other.path / file.name).read_bytes())
        with pytest.raises(ConfigError, match="state"):
            directory.load()
        file.write_bytes(data)
    directory.load()
    directory.issuing.unlink()
    with pytest.raises(ConfigError, match=r"issuing\.pem: No such file"):
        directory.load()


def test_a_path_that_no_socket_can_have(tmp_path: Path) -> None:
    """It is told at the start, and not when the operator asks."""
    directory = make(tmp_path / ("d" * 100))
    with pytest.raises(ConfigError, match="AF_UNIX"):
        directory.load()


def test_there_is_one_master(tmp_path: Path) -> None:
    """As long as it runs."""
    directory = make(tmp_path / "state")
    with directory.lock(), pytest.raises(AddressInUse), directory.lock():
        pass
    with directory.lock():
        pass
