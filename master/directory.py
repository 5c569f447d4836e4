"""The state of a master on disk: keys, certificates, policy, journal, lock, and its door.

    root.pem       the root certificate                  all nodes trust it
    root.key       its key                               belongs elsewhere: needed once a year
    issuing.pem    the issuing certificate, and its key  the master cannot do without
    issuing.key
    policy.toml    who may do what                       the operator's; read at start and on SIGHUP
    journal.db     all that the master knows
    master.lock    held by the master that runs
    master.sock    where its operator asks               the owner's alone

Invariants:

1. The folder is its owner's alone (0700), keys are too (0600); what others may read is not used.
2. Nothing that is there is ever overwritten, but for the issuing certificate by `renew`.
3. What is wrong is a `ConfigError` that names the file.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ..proto.errors import AddressInUse, ConfigError, IdentityError
from .issuer import Issuer, make_issuing, make_key, make_root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .issuer import PrivateKey

#: The longest path of an AF_UNIX address, without its NUL.
DOOR_BYTES: Final = 107

_PEM: Final = serialization.Encoding.PEM
_FIRST_POLICY: Final = """\
# Who may do what in this cluster; what no rule allows is denied. `afbus policy check` tells what is
# wrong with this file; after a change: kill -HUP the master, or start it again.
#
# To join a bus is to send to its master: `send` with the address that the master has. To which
# other members somebody may send stands in `send`, too; answers to requests need no rule.
#
# [[rule]]
# name = "the hall"                              # stands in answers and in the audit
# who = ["uid/0@hub"]                            # by user, as the node attests
# bus = ["/counters"]
# bind = true                                    # create the bus for the whole cluster
# own = ["hall"]                                 # and be its master at this address
#
# [[rule]]
# name = "members"
# who = ["principal/collector-*", "uid/1000@*"]  # by certificate, or by user
# bus = ["/counters"]
# own = ["org.example.**"]
# send = [
#   "hall",                                      # may join
#   "org.example.**",                            # may send to members with such names
#   "topic:counters.**",                         # may publish these
# ]
# receive = ["topic:counters.**"]
# monitor = false
"""


class Directory:
    """The folder of one master."""

    def __init__(self, path: Path) -> None:
        """Name it; nothing is looked at yet."""
        self.path = path
        self.root, self.root_key = path / "root.pem", path / "root.key"
        self.issuing, self.issuing_key = path / "issuing.pem", path / "issuing.key"
        self.policy, self.journal = path / "policy.toml", path / "journal.db"
        self.door = path / "master.sock"

    def make(
        self, cluster: str, now_utc: float, draw: Callable[[int], bytes], root_key: Path | None
    ) -> None:
        """Make a new cluster.

        Args:
            cluster: Its name.
            now_utc: The time.
            draw: Returns so many random bytes.
            root_key: Where the key of the root is put, by default with the rest.

        Raises:
            ConfigError: The folder is not empty, or cannot be written.
            InvalidArgument: The name may not be one. EINVAL.
        """
        secret, issuing_secret = make_key(), make_key()
        root = make_root(cluster, secret, _serial(draw), now_utc)
        issuing = make_issuing(root, secret, issuing_secret, _serial(draw), now_utc)
        with _border(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise ConfigError("is not empty; a cluster is made once", file=str(self.path))
            self.path.chmod(0o700)
        # The root last: with it the folder is that of a cluster.
        _write(root_key or self.root_key, _encode_key(secret))
        _write(self.issuing_key, _encode_key(issuing_secret))
        _write(self.issuing, issuing.public_bytes(_PEM))
        _write(self.policy, _FIRST_POLICY.encode())
        _write(self.root, root.public_bytes(_PEM))

    def load(self) -> Issuer:
        """Return the issuer.

        Raises:
            ConfigError: A file is missing, is none of ours, or may be read by others.
        """
        self.check()
        try:
            return Issuer(
                _read_certificate(self.root),
                _read_certificate(self.issuing),
                _read_key(self.issuing_key),
            )
        except IdentityError as error:
            raise ConfigError(str(error), file=str(self.path)) from error

    def check(self) -> None:
        """Check that this is the folder of a cluster, and nobody else's; ConfigError if not."""
        if not self.root.exists():
            text = "is no state of a master; `afbus master init` makes one"
            raise ConfigError(text, file=str(self.path))
        _check_private(self.path)
        if len(os.fsencode(self.door)) > DOOR_BYTES:
            text = f"has more than {DOOR_BYTES} bytes, the limit of AF_UNIX"
            raise ConfigError(text, file=str(self.door))

    def renew(self, root_key: Path | None, now_utc: float, draw: Callable[[int], bytes]) -> float:
        """Make a new issuing certificate with the key of the root; return until when it is good.

        The issuing key stays, so certificates that it signed stay good.

        Raises:
            ConfigError: A file is missing or wrong, or this is not the key of the root.
        """
        self.check()
        root, secret = _read_certificate(self.root), _read_key(root_key or self.root_key)
        try:
            made = make_issuing(root, secret, _read_key(self.issuing_key), _serial(draw), now_utc)
        except IdentityError as error:
            raise ConfigError(str(error), file=str(root_key or self.root_key)) from error
        spare = self.issuing.with_name(self.issuing.name + ".new")
        with _border(spare):
            spare.unlink(missing_ok=True)
        _write(spare, made.public_bytes(_PEM))
        with _border(self.issuing):
            spare.replace(self.issuing)
            _sync(self.path)
        return made.not_valid_after_utc.timestamp()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only master of this state.

        Raises:
            AddressInUse: Another one runs. EADDRINUSE.
        """
        path = self.path / "master.lock"
        with _border(path):
            file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise AddressInUse(f"a master runs with the state in {self.path}") from error
            yield
        finally:
            os.close(file)


def write_credentials(
    folder: Path, name: str, key: PrivateKey, chain: list[bytes], root: bytes
) -> None:
    """Write what a bearer of a certificate needs: its key, its chain, and whom it trusts, in PEM.

    Raises:
        ConfigError: A file is there already, or cannot be written.
    """
    check_no_credentials(folder, name)
    with _border(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(folder / f"{name}.key", _encode_key(key))
    certificates = [x509.load_der_x509_certificate(one).public_bytes(_PEM) for one in chain]
    _write(folder / f"{name}.pem", b"".join(certificates))
    trusted = folder / "root.pem"
    if not trusted.exists():
        _write(trusted, x509.load_der_x509_certificate(root).public_bytes(_PEM))


def check_no_credentials(folder: Path, name: str) -> None:
    """Check that nothing of a bearer is in a folder yet; ConfigError names what is."""
    for path in (folder / f"{name}.key", folder / f"{name}.pem"):
        if path.exists():
            raise ConfigError("is there already, and nothing is overwritten", file=str(path))


@contextmanager
def _border(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(str(error.strerror), file=str(path)) from error


def _serial(draw: Callable[[int], bytes]) -> int:
    return int.from_bytes(draw(16), "big") | 1


def _encode_key(key: PrivateKey) -> bytes:
    form, no_encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(_PEM, form, no_encryption)


def _write(path: Path, data: bytes) -> None:
    """Write a new file that is its owner's alone, and survives."""
    with _border(path):
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _sync(path.parent)


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _check_private(path: Path) -> None:
    with _border(path):
        found = path.stat()
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError("may be read by others; chmod go= it", file=str(path))
    if found.st_uid != os.geteuid():
        raise ConfigError(f"belongs to user {found.st_uid}, and not to this one", file=str(path))


def _read_certificate(path: Path) -> x509.Certificate:
    with _border(path):
        data = path.read_bytes()
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise ConfigError(f"is no certificate in PEM: {error}", file=str(path)) from error


def _read_key(path: Path) -> PrivateKey:
    _check_private(path)
    with _border(path):
        data = path.read_bytes()
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"is no key in PEM, or needs a password: {error}", file=str(path)) from (
            error
        )
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("is a key of another kind than ours", file=str(path))
    return key
