"""Proofs of who a process is: what the two files may be, and what the key signs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from tests.link.authority import Signer

import afbus
from afbus import Proof
from afbus.link.identity import Identity, Role
from afbus.proto.errors import ConfigError, InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

    from tests.client.conftest import NodeProcess

_PLAIN = serialization.NoEncryption()
_FORM = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Return the paths of a certificate and its key, as `afbus master issue` writes them."""
    issued = Signer.root().issue(Identity("test", Role.PRINCIPAL, "shop"))
    certificate, key = tmp_path / "shop.pem", tmp_path / "shop.key"
    pem = [one.public_bytes(serialization.Encoding.PEM) for one in issued.certificates]
    certificate.write_bytes(b"".join(pem))
    key.write_bytes(issued.key.private_bytes(*_FORM, _PLAIN))
    return certificate, key


def test_d17_the_key_of_a_proof_signs(files: tuple[Path, Path]) -> None:
    """What is signed can be verified by the certificate, and the key is in no text."""
    proof = Proof.load(*files)
    from cryptography import x509

    public = x509.load_der_x509_certificate(proof.chain[0]).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    public.verify(proof.sign(b"claim"), b"claim", ec.ECDSA(hashes.SHA256()))
    assert "key" not in repr(proof)


def test_what_is_no_proof_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Each error says which file, and what is wrong with it."""
    certificate, key = files
    other = tmp_path / "other.key"
    with pytest.raises(ConfigError, match=r"other\.key.*cannot be read"):
        Proof.load(certificate, other)
    other.write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(*_FORM, _PLAIN))
    with pytest.raises(ConfigError, match=r"other\.key.*not the key of"):
        Proof.load(certificate, other)
    other.write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(*_FORM, _PLAIN))
    with pytest.raises(ConfigError, match=r"other\.key.*elliptic curve"):
        Proof.load(certificate, other)
    with pytest.raises(ConfigError, match=r"shop\.key.*no certificates"):
        Proof.load(key, key)
    with pytest.raises(ConfigError, match=r"shop\.pem.*no private key"):
        Proof.load(certificate, certificate)


def test_in_no_cluster_there_is_nobody_to_prove_it_to(
    files: tuple[Path, Path], agent: NodeProcess
) -> None:
    """The agent of a single host says that it knows no certificates."""
    with afbus.socket(node=agent.place) as sock, pytest.raises(InvalidArgument, match="no cluster"):
        sock.prove(Proof.load(*files))
