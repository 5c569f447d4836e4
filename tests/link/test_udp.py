"""The socket alone: datagrams in few system calls, and errors of one that are not the next's."""

from __future__ import annotations

import errno
import select
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from afbus.link.udp import UdpSocket, family_of, is_numeric, path_bytes
from afbus.proto.errors import AddressInUse, InvalidArgument, LinkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def bind() -> Iterator[Callable[..., UdpSocket]]:
    """Binds sockets, and closes them behind the test."""
    made = []

    def bind(host: str = "127.0.0.1") -> UdpSocket:
        made.append(UdpSocket(host, 0))
        return made[-1]

    yield bind
    for one in made:
        one.close()


def receive(sock: UdpSocket, amount: int) -> list[bytes]:
    """So many datagrams, within a deadline."""
    got: list[bytes] = []
    while len(got) < amount:
        assert select.select([sock], [], [], 5)[0]
        got += [data for data, _ in sock.receive()]
    return got


@pytest.mark.parametrize("has_gso", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [[1200], [1200] * 5, [1200] * 200, [1200] * 3 + [7] + [1200] * 3, [9, 1200, 9], [16_000] * 9],
    ids=["one", "five", "many", "short", "long", "large"],
)  # fmt: skip
def test_datagrams_arrive_one_by_one(
    bind: Callable[..., UdpSocket], sizes: list[int], has_gso: bool
) -> None:
    """With segmentation and without, each with its bounds, and in order."""
    here, there = bind(), bind()
    here.has_gso &= has_gso
    sent = [bytes([n % 256]) * size for n, size in enumerate(sizes)]
    here.send([(data, there.address) for data in sent])
    assert receive(there, len(sent)) == sent
    assert here.unsent == 0


def test_each_receiver_gets_its_own(bind: Callable[..., UdpSocket]) -> None:
    """Neighbours for different addresses do not leave in one call."""
    here, one, other = bind(), bind(), bind()
    here.send([(b"%d" % n, (one if n % 3 else other).address) for n in range(9)])
    assert receive(one, 6) == [b"1", b"2", b"4", b"5", b"7", b"8"]
    assert receive(other, 3) == [b"0", b"3", b"6"]


def test_a_turn_is_bounded(bind: Callable[..., UdpSocket]) -> None:
    """Others of the loop get their turn between two of this socket."""
    here, there = bind(), bind()
    here.has_gso = False
    here.send([(b"x", there.address)] * 100)
    assert select.select([there], [], [], 5)[0]
    assert len(there.receive()) == 64
    assert len(there.receive()) == 36
    assert there.receive() == []


def test_what_cannot_be_sent_is_lost_and_counted(bind: Callable[..., UdpSocket]) -> None:
    """Too large, no way, nobody there: as on any network, and the next one goes."""
    here, there = bind(), bind()
    here.send([(bytes(65_600), there.address), (b"next", there.address)])
    assert receive(there, 1) == [b"next"]
    assert here.unsent == 1
    here.send([(b"x", ("240.0.0.1", 9))])
    assert here.unsent == 2
    gone = there.address
    there.close()
    for _ in range(3):
        here.send([(b"x", gone)])
    # The answer of the kernel, that nobody is there, is no error of whoever comes next.
    assert here.receive() == []


class Failing:
    """A socket whose calls fail as the test says."""

    def __init__(self, sock: socket.socket, error: int, calls: tuple[str, ...]) -> None:
        self._sock = sock
        self._error = error
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        if name in self._calls:
            return self._fail
        return getattr(self._sock, name)

    def _fail(self, *_: object) -> Any:
        if self._calls == ("recvmsg",):
            self._calls = ()
        raise OSError(self._error, "as the test says")


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.ENOBUFS, errno.EHOSTUNREACH])
def test_a_full_buffer_is_a_loss(bind: Callable[..., UdpSocket], error: int) -> None:
    """Of all that were in the call; aioquic sends them again."""
    here, there = bind(), bind()
    real = here._sock
    here._sock = Failing(real, error, ("sendmsg", "sendto"))  # type: ignore[assignment]  # stands for the kernel
    here.send([(b"x" * 9, there.address)] * 5 + [(b"y" * 20, there.address)])
    assert here.unsent == 6
    here._sock = real


def test_a_path_without_segmentation_gets_them_singly(bind: Callable[..., UdpSocket]) -> None:
    """A device that cannot do it says so at the call."""
    here, there = bind(), bind()
    real = here._sock
    here._sock = Failing(real, errno.EIO, ("sendmsg",))  # type: ignore[assignment]  # stands for the kernel
    here.send([(b"%d" % n, there.address) for n in range(5)])
    assert receive(there, 5) == [b"0", b"1", b"2", b"3", b"4"]
    here._sock = real


@pytest.mark.parametrize("call", ["sendmsg", "sendto", "recvmsg"])
def test_errors_that_nobody_expects_are_not_hidden(
    bind: Callable[..., UdpSocket], call: str
) -> None:
    """A closed descriptor is a bug, and not a loss."""
    here = bind()
    real = here._sock
    here._sock = Failing(real, errno.EBADF, (call,))  # type: ignore[assignment]  # stands for the kernel
    datagrams = [(b"x", real.getsockname())] * (2 if call == "sendmsg" else 1)
    fail = here.receive if call == "recvmsg" else partial(here.send, datagrams)
    with pytest.raises(OSError, match="as the test says"):
        fail()
    here._sock = real


def test_the_answer_of_an_earlier_datagram_is_passed_over(bind: Callable[..., UdpSocket]) -> None:
    """What lies behind it is read."""
    here, there = bind(), bind()
    there.send([(b"behind", here.address)])
    assert select.select([here], [], [], 5)[0]
    real = here._sock
    here._sock = Failing(real, errno.ECONNREFUSED, ("recvmsg",))  # type: ignore[assignment]  # stands for the kernel
    assert [data for data, _ in here.receive()] == [b"behind"]
    here._sock = real


def test_addresses_of_both_families(bind: Callable[..., UdpSocket]) -> None:
    """IPv4 is seen from IPv6 as the kernel shows it; the other way there is none."""
    assert family_of("::1%lo") is socket.AF_INET6
    assert is_numeric("10.0.0.1")
    assert not is_numeric("host.example")
    with pytest.raises(InvalidArgument):
        family_of("host.example")
    assert bind("::").to_peer("127.0.0.1", 5) == ("::ffff:127.0.0.1", 5, 0, 0)
    assert bind("::").to_peer("::1", 5) == ("::1", 5, 0, 0)
    assert bind().to_peer("127.0.0.1", 5) == ("127.0.0.1", 5)
    for host, port in (("::1", 5), ("127.0.0.1", 0), ("127.0.0.1", 65_536)):
        with pytest.raises(LinkError):
            bind().to_peer(host, port)
    assert bind().find("localhost", 7) == ("127.0.0.1", 7)
    with pytest.raises(LinkError):
        bind().find("nowhere.invalid", 7)


def test_a_port_has_one_process(bind: Callable[..., UdpSocket]) -> None:
    """What another one has may be free later; an address of another host never is."""
    port = bind().address[1]
    with pytest.raises(AddressInUse, match=f"127.0.0.1 port {port}"):
        UdpSocket("127.0.0.1", port)
    with pytest.raises(LinkError, match=r"192\.0\.2\.1"):
        UdpSocket("192.0.2.1", 0)


def test_no_family_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without IPv6 is an error of the link, and not of Python."""

    def fail(*_: object) -> Any:
        raise OSError(errno.EAFNOSUPPORT, "no such family")

    monkeypatch.setattr(socket, "socket", fail)
    with pytest.raises(LinkError, match="no such family"):
        UdpSocket("::", 0)
    assert path_bytes(("10.0.0.1", 1)) == 1200


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_takes_large_datagrams(host: str) -> None:
    """As large as is worth its buffers."""
    assert path_bytes((host, 9)) == 16_000
