"""The folder that makes a host a node: enrolled by the real master's core, and read again."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from tests.master.world import NOW_UTC, World, make_issuer

from afbus.link.carrier import Enrolled
from afbus.link.identity import Identity, Role
from afbus.node.membership import JOINING, KEY, MEMBER, Enrolment, Membership, load
from afbus.proto import cluster
from afbus.proto.cluster import ClusterCall
from afbus.proto.errors import ConfigError, Denied, IdentityError, RemoteProtocolError
from afbus.proto.frames import Closed, Result
from afbus.proto.operation import ClusterOp
from afbus.proto.token import JoinToken

if TYPE_CHECKING:
    from pathlib import Path

    from afbus.proto.cluster import ClusterFrame

PLACES = ("m.example.org:4450",)
AT = datetime.fromtimestamp(NOW_UTC, UTC)
MASTER = Identity("test", Role.MASTER, "master")


@pytest.fixture
def world() -> World:
    """The master of the cluster."""
    return World()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the node's state is to be."""
    return tmp_path / "deep" / "state"


def make_token(world: World, name: str | None = None) -> JoinToken:
    """Return a token of the operator."""
    return JoinToken.parse(world.order(ClusterOp.TOKEN, node=name)["token"])


def ask(world: World, enrolment: Enrolment) -> Result:
    """Let the master's core answer."""
    frame = cluster.decode(enrolment.request)
    assert isinstance(frame, ClusterCall)
    return world.visit("192.0.2.1", frame.op, **frame.args)


def enrolled(answer: ClusterFrame) -> Enrolled:
    """Return what the carrier brings back."""
    root = x509.load_der_x509_certificate(make_issuer().root)
    return Enrolled(cluster.encode(answer), MASTER, root)


def join(world: World, folder: Path, name: str = "a") -> Membership:
    """Become a node."""
    enrolment = Enrolment(make_token(world), name, folder)
    return enrolment.settle(enrolled(ask(world, enrolment)), PLACES, AT)


def test_case38_host_becomes_a_node(world: World, folder: Path) -> None:
    """Key, certificate, root, names and places are there, for nobody else, and are read again."""
    made = join(world, folder)
    again = load(folder)
    assert again.identity == Identity("test", Role.NODE, "a")
    assert (again.master, again.places, again.block) == (MASTER, PLACES, None)
    assert again.credentials.chain == made.credentials.chain
    assert again.root == made.root
    assert again.authority.cluster == "test"
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not (folder / JOINING).exists()


def test_case38_answer_that_was_lost_is_had_again(world: World, folder: Path) -> None:
    """The same token and the same key: whoever begins again is the same node."""
    token = make_token(world)
    ask(world, Enrolment(token, "a", folder))
    with pytest.raises(ConfigError, match="in no cluster yet"):
        load(folder)
    enrolment = Enrolment(token, "a", folder)
    made = enrolment.settle(enrolled(ask(world, enrolment)), PLACES, AT)
    assert load(folder).certificate == made.certificate
    # Another host that found the token is another key.
    thief = Enrolment(token, "a", folder.with_name("thief"))
    assert not ask(world, thief).is_ok


def test_case38_refusal_leaves_what_was(world: World, folder: Path) -> None:
    """A token that is not good is an error, and a host that is a node stays that."""
    before = join(world, folder)
    used = make_token(world, name="b")
    enrolment = Enrolment(used, "c", folder)
    with pytest.raises(Denied):
        enrolment.settle(enrolled(ask(world, enrolment)), PLACES, AT)
    assert load(folder).certificate == before.certificate


def test_node_may_join_again(world: World, folder: Path) -> None:
    """A new membership replaces the former one, with a key of its own and no block."""
    before = join(world, folder)
    before.write_block(7)
    after = join(world, folder, "b")
    assert after.certificate.public_key() != before.certificate.public_key()
    assert (load(folder).identity.name, load(folder).block) == ("b", None)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 300])
def test_names_that_no_node_has(world: World, folder: Path, name: str) -> None:
    """They are refused before anybody is asked, and nothing is written."""
    with pytest.raises(ConfigError):
        Enrolment(make_token(world), name, folder)
    assert not folder.exists()


def test_what_nobody_would_take_is_not_kept(world: World, folder: Path) -> None:
    """Certificates for another key, another name or another time are no membership."""
    token = make_token(world)
    ours = Enrolment(token, "a", folder)
    other = Enrolment(make_token(world), "b", folder.with_name("other"))
    wrong = enrolled(ask(world, other))
    with pytest.raises(IdentityError, match="nobody would take"):
        ours.settle(wrong, PLACES, AT)
    same_name = Enrolment(token, "b", folder)
    with pytest.raises(IdentityError, match="another key"):
        same_name.settle(wrong, PLACES, AT)
    good = enrolled(ask(world, ours))
    with pytest.raises(IdentityError, match="expired"):
        ours.settle(good, PLACES, AT + timedelta(days=9))
    with pytest.raises(IdentityError):
        ours.settle(enrolled(Closed(1, "no")), PLACES, AT)  # type: ignore[arg-type]  # any code
    with pytest.raises(RemoteProtocolError):
        ours.settle(enrolled(Result(1, value={"chain": []})), PLACES, AT)
    assert not (folder / MEMBER).exists()


def test_case39_certificate_is_replaced(world: World, folder: Path) -> None:
    """The next certificate, for the same key, is used from now on, and after a restart."""
    made = join(world, folder)
    leaf = made.certificate
    middle = leaf.not_valid_before_utc + (leaf.not_valid_after_utc - leaf.not_valid_before_utc) / 2
    assert made.renew_at_utc == middle
    issuer = make_issuer()
    later = AT + timedelta(hours=13)
    issued = issuer.issue(made.make_request(), made.identity, 77, later.timestamp())
    renewed = made.renew(issued.chain, later)
    assert load(folder).certificate == renewed.certificate
    assert renewed.certificate.serial_number == 77
    assert renewed.renew_at_utc > made.renew_at_utc
    other = issuer.issue(made.make_request(), Identity("test", Role.NODE, "b"), 78, NOW_UTC)
    with pytest.raises(IdentityError):
        made.renew(other.chain, AT)
    assert load(folder).certificate.serial_number == 77


def test_d3_spare_block_is_written_down(world: World, folder: Path) -> None:
    """The block that the next life may begin with survives this one."""
    made = join(world, folder)
    made.write_block(42)
    assert load(folder).block == 42
    made.write_block(None)
    assert load(folder).block is None
    (folder / "block").unlink()
    assert load(folder).block is None


@pytest.mark.parametrize("name", ["member.json", "key.pem", "chain.pem", "root.pem", "block"])
def test_files_that_are_wrong_are_named(world: World, folder: Path, name: str) -> None:
    """What cannot be read, and what is none of ours, is one error that names the file."""
    join(world, folder)
    (folder / name).write_bytes(b"\xff garbage")
    with pytest.raises(ConfigError, match=name):
        load(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ConfigError, match=name):
        load(folder)
    (folder / name).rmdir()
    if name != "block":
        with pytest.raises(ConfigError, match=name):
            load(folder)


def test_key_of_another_kind(world: World, folder: Path) -> None:
    """A key that no carrier signs with is refused when it is read."""
    join(world, folder)
    key = ed25519.Ed25519PrivateKey.generate()
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / KEY).write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
    with pytest.raises(ConfigError, match="elliptic"):
        load(folder)


def test_member_without_its_keys(world: World, folder: Path) -> None:
    """A map that lacks something is named too."""
    join(world, folder)
    (folder / MEMBER).write_text(json.dumps({"node": "afbus://test/node/a"}))
    with pytest.raises(ConfigError, match=MEMBER):
        load(folder)


def test_folder_that_cannot_be_made(world: World, tmp_path: Path) -> None:
    """The error names the place."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        Enrolment(make_token(world), "a", tmp_path / "file" / "state")
