"""What makes this host a node of a cluster, in a folder: who it is, and whom it trusts.

    member.json   cluster, name of the node, name of the master, where the master is
    key.pem       the private key, which never leaves this host (mode 0600)
    chain.pem     the node's certificate, then those between it and the root
    root.pem      the root of the cluster
    block         the leased block of addresses that was never used, if there is one
    joining.pem   while it is being made: the private key for which a certificate is asked

`join` makes the folder with a join token, by which the master is known before it is trusted;
`load` reads it again. A certificate that is renewed replaces `chain.pem` as a whole.

Invariants:

1. Each file is whole at any time: it is written beside its place, synced, and moved there.
2. A folder that was not made completely is none: `member.json` is written last.
3. The key is there before the master is asked, and is used again if its answer is lost: a token is
   good for one key (case 38). Until there is a good answer a former membership stays as it is.
4. Foreign exceptions leave this module as `ConfigError` or `IdentityError`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ..link.certificate import Authority, Refused, Side, judge
from ..link.credentials import Credentials
from ..link.identity import Identity, Role
from ..proto import cluster
from ..proto.cluster import ClusterCall
from ..proto.errors import ConfigError, IdentityError, InvalidArgument
from ..proto.frames import Result
from ..proto.operation import ClusterOp
from . import answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ..link.carrier import Enrolled
    from ..proto.token import JoinToken

MEMBER: Final = "member.json"
KEY: Final = "key.pem"
CHAIN: Final = "chain.pem"
ROOT: Final = "root.pem"
BLOCK: Final = "block"
JOINING: Final = "joining.pem"


@dataclass(frozen=True)
class Membership:
    """One node's place in its cluster."""

    identity: Identity
    master: Identity
    #: Where the master is, `host:port` each.
    places: tuple[str, ...]
    credentials: Credentials
    root: x509.Certificate
    folder: Path
    #: The spare block that was written down, see `uplink.Spare`.
    block: int | None = field(default=None)

    @property
    def authority(self) -> Authority:
        """Whom this node trusts before it has heard who is denied."""
        return Authority(self.identity.cluster, (self.root,))

    @property
    def certificate(self) -> x509.Certificate:
        """The node's own."""
        return self.credentials.certificates[0]

    @property
    def renew_at_utc(self) -> datetime:
        """When the next certificate is to be asked for: at half of the life of this one."""
        leaf = self.certificate
        start, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
        return start + (end - start) / 2

    def make_request(self) -> bytes:
        """Return a request for a certificate of the same key, DER."""
        return make_request(self.credentials.key)

    def renew(self, chain: tuple[bytes, ...], at_utc: datetime) -> Membership:
        """Write a new certificate down, and return the membership with it.

        Raises:
            IdentityError: It is not this node's, or not of this cluster.
            ConfigError: It cannot be written.
        """
        made = replace(self, credentials=Credentials(chain, self.credentials.key))
        _check(made, at_utc)
        _write(self.folder / CHAIN, _pem(made.credentials.certificates))
        return made

    def write_block(self, block: int | None) -> None:
        """Write the spare block down, None for none; ConfigError if that is impossible."""
        _write(self.folder / BLOCK, b"" if block is None else b"%d\n" % block)


def make_request(key: Any) -> bytes:
    """Return a certificate request in DER; it names nobody, as the master decides that."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


class Enrolment:
    """Becoming a member: the request for the master, and what is made of its answer."""

    def __init__(self, token: JoinToken, name: str, folder: Path) -> None:
        """Make a key in the folder, or take the one of an enrolment that was not finished.

        Raises:
            ConfigError: No node can have this name, or the folder cannot be used.
        """
        try:
            # No cluster is known yet; any will do to judge the name.
            Identity("cluster", Role.NODE, name)
        except InvalidArgument as error:
            raise ConfigError(error.message) from error
        self._token = token
        self._name = name
        self._folder = folder
        self._key = _prepare_key(folder)

    @property
    def request(self) -> bytes:
        """What the carrier brings to the master."""
        args = {
            "token": self._token.format(),
            "name": self._name,
            "csr": make_request(self._key),
        }
        return cluster.encode(ClusterCall(1, ClusterOp.ENROL, args))

    def settle(self, enrolled: Enrolled, places: tuple[str, ...], at_utc: datetime) -> Membership:
        """Return the membership that the master has given, after writing it down.

        Raises:
            BusError: The master refuses: the token is used or expired, or the name is another's.
            IdentityError: What it gives is not a certificate of this node.
            ConfigError: The folder cannot be written.
            RemoteProtocolError: It says what no master says.
        """
        frame = cluster.decode(enrolled.answer)
        if not isinstance(frame, Result):
            raise IdentityError(f"the master answers with {type(frame).__name__}")
        if not frame.is_ok:
            raise frame.to_error()
        given = answer.take_certified(frame.value)
        made = Membership(
            Identity(given.cluster, Role.NODE, self._name),
            enrolled.master,
            places,
            Credentials(given.chain, self._key),
            enrolled.root,
            self._folder,
        )
        _check(made, at_utc)
        _save(made, self._key)
        return made


def load(folder: Path) -> Membership:
    """Read a folder.

    Raises:
        ConfigError: There is none, or it is not what `join` has made; file and key are named.
    """
    path = folder / MEMBER
    try:
        about: dict[str, Any] = json.loads(path.read_text())
        name, master = Identity.parse(about["node"]), Identity.parse(about["master"])
        places = tuple(map(str, about["places"]))
    except FileNotFoundError as error:
        why = "this host is in no cluster yet: `afbus node join` makes it a node"
        raise ConfigError(why, file=str(path)) from error
    except (OSError, ValueError, KeyError, TypeError, InvalidArgument) as error:
        raise ConfigError(
            f"not what `afbus node join` writes: {error!r}", file=str(path)
        ) from error
    key = _read_key(folder / KEY)
    chain = _read(folder / CHAIN, x509.load_pem_x509_certificates)
    root = _read(folder / ROOT, x509.load_pem_x509_certificate)
    der = tuple(one.public_bytes(serialization.Encoding.DER) for one in chain)
    block = _read(folder / BLOCK, lambda data: int(data) if data.strip() else None, missing=b"")
    return Membership(name, master, places, Credentials(der, key), root, folder, block)


def _check(made: Membership, at_utc: datetime) -> None:
    """Check that the certificate is this node's, and one that its peers will take."""
    chain = made.credentials.chain
    for side in Side:
        verdict = judge(
            chain, authority=made.authority, side=side, at_utc=at_utc, claim=made.identity
        )
        if isinstance(verdict, Refused):
            raise IdentityError(f"the master issued what nobody would take: {verdict}")
    if made.certificate.public_key() != made.credentials.key.public_key():
        raise IdentityError("the master issued a certificate for another key")


def _pem(certificates: tuple[x509.Certificate, ...]) -> bytes:
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = _read(path, lambda data: serialization.load_pem_private_key(data, None))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("not a key on an elliptic curve", file=str(path))
    return key


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    form, no_encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    _write(path, key.private_bytes(serialization.Encoding.PEM, form, no_encryption))


def _prepare_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key of an enrolment that was not finished, or a new one that is written down."""
    path = folder / JOINING
    if path.exists():
        return _read_key(path)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot be made: {error.strerror}", file=str(folder)) from error
    key = ec.generate_private_key(ec.SECP256R1())
    _write_key(path, key)
    return key


def _save(made: Membership, key: ec.EllipticCurvePrivateKey) -> None:
    folder = made.folder
    about = {
        "node": made.identity.format(),
        "master": made.master.format(),
        "places": list(made.places),
    }
    # A former membership ends here, and the new one begins with the last file.
    _remove(folder / MEMBER)
    _write_key(folder / KEY, key)
    _write(folder / CHAIN, _pem(made.credentials.certificates))
    _write(folder / ROOT, _pem((made.root,)))
    _write(folder / BLOCK, b"")
    _write(folder / MEMBER, json.dumps(about, indent=1).encode() + b"\n")
    _remove(folder / JOINING)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot be deleted: {error.strerror}", file=str(path)) from error


def _write(path: Path, data: bytes) -> None:
    """Put a file into place as a whole, readable for nobody else."""
    beside = path.with_name(f"{path.name}.new")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", file=str(path)) from error


def _read(path: Path, parse: Callable[[bytes], Any], missing: bytes | None = None) -> Any:
    try:
        return parse(path.read_bytes())
    except FileNotFoundError as error:
        if missing is not None:
            return parse(missing)
        raise ConfigError("is missing", file=str(path)) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"not what `afbus node join` writes: {error}", file=str(path)) from error


def utc_now() -> datetime:
    """Return the wall clock, for certificates alone."""
    return datetime.now(UTC)
