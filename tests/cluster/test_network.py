"""Hosts on one machine: they reach each other, and can be taken off the network."""

from __future__ import annotations

import subprocess
import sys

import pytest
from network import Network, can_isolate

# Says hello to an address by UDP, from its own, and prints the answer; "silence" after 2 s.
_ASK = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mine:
    mine.bind((sys.argv[1], 0))
    mine.settimeout(2)
    mine.sendto(b"hello", (sys.argv[2], int(sys.argv[3])))
    try:
        print(mine.recv(100).decode())
    except OSError:
        print("silence")
"""
_ANSWER = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mine:
    mine.bind((sys.argv[1], 0))
    print(mine.getsockname()[1], flush=True)
    while True:
        data, source = mine.recvfrom(100)
        mine.sendto(data + b" from " + source[0].encode(), source)
"""


def _ask(network: Network, port: str) -> str:
    argv = [sys.executable, "-c", _ASK, network.address("alpha"), network.address("beta"), port]
    done = subprocess.run(
        network.command("alpha", argv), capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("namespaces", [False, True], ids=["loopback", "namespaces"])
def test_hosts_reach_each_other(namespaces: bool) -> None:
    """Each host has an address of its own, and others see it; a cut host is not heard."""
    if namespaces and not can_isolate():
        pytest.skip("network namespaces need root and iproute2")
    with Network(["alpha", "beta"], namespaces=namespaces) as network:
        argv = [sys.executable, "-c", _ANSWER, network.address("beta")]
        with subprocess.Popen(
            network.command("beta", argv), stdout=subprocess.PIPE, text=True
        ) as server:
            try:
                assert server.stdout is not None
                port = server.stdout.readline().strip()
                assert _ask(network, port) == f"hello from {network.address('alpha')}"
                if namespaces:
                    network.cut("beta")
                    assert _ask(network, port) == "silence"
                    network.heal("beta")
                    assert _ask(network, port).startswith("hello")
            finally:
                server.kill()
