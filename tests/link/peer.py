"""A member in a process of its own, for tests that stop it or kill it: it sends back what it gets.

Reads its credentials from stdin as one line of JSON, and writes its port to stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization as keys

from afbus.link.carrier import Member
from afbus.link.certificate import Authority, to_der
from afbus.link.credentials import Credentials
from afbus.link.effect import Message
from afbus.link.quic import QuicCarrier

if TYPE_CHECKING:
    from collections.abc import Callable

    from afbus.link.effect import Event
    from afbus.link.link import Link


def start(credentials: Credentials, authority: Authority) -> tuple[subprocess.Popen[str], int]:
    """Start one; returns the process, which is the caller's to end, and its port."""
    key = credentials.key.private_bytes(
        keys.Encoding.PEM, keys.PrivateFormat.PKCS8, keys.NoEncryption()
    )
    wanted = {
        "chain": [der.hex() for der in credentials.chain],
        "key": key.decode(),
        "root": to_der(authority.anchors)[0].hex(),
        "cluster": authority.cluster,
    }
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(wanted) + "\n")
    process.stdin.flush()
    return process, int(process.stdout.readline())


def _accept(link: Link) -> Callable[[Event], None]:
    def take(event: Event) -> None:
        if isinstance(event, Message):
            link.send(event.channel, event.destination, event.data)
            link.release(event.channel, event.destination, event.cost)

    return take


async def _run(wanted: dict[str, Any]) -> None:
    key: Any = keys.load_pem_private_key(wanted["key"].encode(), None)
    root = x509.load_der_x509_certificate(bytes.fromhex(wanted["root"]))
    credentials = Credentials(tuple(bytes.fromhex(der) for der in wanted["chain"]), key)
    now = x509.load_der_x509_certificate(credentials.chain[0]).not_valid_before_utc
    member = Member(
        credentials=credentials,
        authority=Authority(wanted["cluster"], (root,)),
        boot=os.urandom(16),
        accept=_accept,
        utc_now=lambda: now,
    )
    carrier = QuicCarrier(member, "127.0.0.1")
    print(carrier.address[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_run(json.loads(sys.stdin.readline())))
