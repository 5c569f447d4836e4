"""The mail, step by step, in its order and with its names.

The mail is "Revisit AF_BUS: is it a better way to implement KDBUS?", LKML, 31 July 2015. Four
processes do what it describes, with nothing but `afbus.socket()` and raw control items; each step
is followed by what was observed, and the program ends in an error if that is not what the mail
says. An agent plays the kernel's part: that of AFBUS_NODE, else one of its own.

    python examples/mail.py
"""

from __future__ import annotations

import array
import errno
import fcntl
import itertools
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from typing import TYPE_CHECKING, Final

from agent import running_agent

import afbus
from afbus import (
    AF_BUS,
    BUS_SOCKET,
    SCM_MULTICAST_MATCH,
    SCM_MULTICAST_SEND,
    SCM_OWNED_ADDR,
    SCM_SRC_ADDR,
    SO_BUS_FILTER,
    BusAddress,
    Event,
    Notice,
)

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_S: Final = 5.0
ALL_S: Final = 20.0
UCRED: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid
ALL_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
ROOM: Final = 4096  # for msg_iov and msg_control

bus_path = "/tmp/test"  # noqa: S108 (the mail's: the name of a bus, not a file)
bus_addr = "org.example.bus"
addr = BusAddress(bus_path, bus_addr)
service1 = BusAddress(bus_path, "com.example.service1")


class Turn:
    """Lets one process go on when another one has come so far; made before both are."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def give(self) -> None:
        """Let who waits go on."""
        os.write(self._write, b".")

    def take(self) -> None:
        """Wait until it is given."""
        ready, _, _ = select.select([self._read], [], [], TIMEOUT_S)
        assert ready, "the other process did not come so far"
        os.read(self._read, 1)


def step(title: str) -> None:
    """Print a heading of the mail."""
    print(f"\n== {title}", flush=True)


def say(who: str, text: str) -> None:
    """Print what a process does or has observed."""
    print(f"{who:>9} | {text}", flush=True)


def refused(call: Callable[[], object], name: str) -> str:
    """Make a call that has to be refused with the errno of this name; return what it says."""
    try:
        call()
    except OSError as error:
        if error.errno != getattr(errno, name):
            raise
        return f"{name}: {error.strerror}"
    raise AssertionError(f"not refused with {name}")


def multicast(*bits: int) -> BusAddress:
    """Return a multicast address: 8 * 64 bits, bus_path ends in '*'."""
    array512 = bytearray(8 * 8)
    for bit in bits:
        array512[bit // 8] |= 1 << bit % 8
    return BusAddress.multicast(bus_path, bytes(array512))


# The mail leaves the bits to the application. A bloom filter may say yes where it should say no:
# the bits of "fan, cellar" happen to cover those of "temperature, kitchen".
sensors = multicast(7)
temperature_kitchen = multicast(7, 64, 130, 201, 333)
humidity_kitchen = multicast(7, 80, 99, 201, 333)
fan_cellar = multicast(7, 64, 130, 201, 333, 440, 500)

REPORTS: Final = (
    (temperature_kitchen, b"temperature kitchen 21.5"),
    (humidity_kitchen, b"humidity kitchen 48"),
    (fan_cellar, b"fan cellar on"),
)

# eBPF: `return body[0] == 't'`, 8 bytes an instruction: code, registers, offset, constant.
FILTER: Final = b"".join(
    struct.pack("<BBhi", *instruction)
    for instruction in (
        (0xB7, 0x00, 0, 0),  # mov   r0, 0
        (0x71, 0x12, 0, 0),  # ldxb  r2, [r1]
        (0x55, 0x02, 1, ord("t")),  # jne   r2, 't', +1
        (0xB7, 0x00, 0, 1),  # mov   r0, 1
        (0x95, 0x00, 0, 0),  # exit
    )
)


def item(ancdata: list[tuple[int, int, bytes]], level: int, kind: int) -> bytes | None:
    """Return the data of a control item, None if there is none."""
    found = [data for *key, data in ancdata if key == [level, kind]]
    return found[0] if found else None


# --- the bus master ---


def bus_master(bus_is_there: Turn, death_is_told: Turn) -> None:
    """Create the bus, let endpoints in, grant what they ask for, and hear of a death."""
    bus_fd = create_bus()
    bus_is_there.give()
    uniques = itertools.count(1)
    while True:
        data, ancdata, _, msg_name = bus_fd.recvmsg(ROOM, ROOM)
        if msg_name.is_kernel:
            notice = Notice.decode(data)
            observe(notice, msg_name)
            if notice.event is Event.KILLED:
                death_is_told.give()
            elif notice.event is Event.LEFT and b"1.1" in notice.subject:
                return
        elif data.startswith(b"AUTH "):
            if may_join(data, ancdata, msg_name):
                let_in(bus_fd, BusAddress(bus_path, f"1.{next(uniques)}"), msg_name)
            else:
                say("master", "not auth_ok: the reply goes without a control message")
                bus_fd.sendmsg([b"no"], [], socket.MSG_NOSIGNAL, msg_name)
        else:
            grant(bus_fd, data, msg_name)


def create_bus() -> afbus.Socket:
    """Create the bus."""
    step("How to map point 1: a process creates a bus, the process is then called 'bus master'")
    packed = addr.pack()
    assert struct.unpack_from("=HH", packed) == (AF_BUS, 2)
    say("master", f"struct sockaddr_bus: {len(packed)} bytes, sbus_path {bus_path!r},")
    say("master", f"  sbus_addr {bus_addr!r} in {addr.ncomp} components of 8 bytes")
    bus_fd = afbus.socket()
    bus_fd.settimeout(TIMEOUT_S)
    bus_fd.bind(addr)
    assert bus_fd.getsockname() == addr
    say("master", f"bind(bus_fd, &addr): this process (pid {os.getpid()}) is the master of {addr}")
    with afbus.socket() as second:
        other = BusAddress(bus_path, "com.example.other")
        why = refused(lambda: second.bind(other), "EADDRINUSE")
    say("master", f"a second bind of this path is {why}")
    optval = 1
    bus_fd.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, optval)
    return bus_fd


def may_join(data: bytes, ancdata: list[tuple[int, int, bytes]], msg_name: BusAddress) -> bool:
    """Do AUTH: judge what the kernel says of the sender, and what it says itself."""
    ucred = item(ancdata, socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
    assert ucred is not None
    pid, uid, gid = UCRED.unpack(ucred)
    say("master", f"AUTH from {msg_name}, SCM_CREDENTIALS: pid {pid}, uid {uid}, gid {gid}")
    return data == b"AUTH let me in" and uid == os.getuid()


def let_in(bus_fd: afbus.Socket, ret_addr: BusAddress, msg_name: BusAddress) -> None:
    """Return the bus address; the kernel applies it."""
    say("master", f"auth_ok: the reply carries SCM_OWNED_ADDR {ret_addr}")
    msg_control = [(BUS_SOCKET, SCM_OWNED_ADDR, ret_addr.pack())]
    bus_fd.sendmsg([b"welcome"], msg_control, socket.MSG_NOSIGNAL, msg_name)


def grant(bus_fd: afbus.Socket, data: bytes, msg_name: BusAddress) -> None:
    """Grant a member what it asks for: another address, or the right to hear or to send."""
    kind, _, what = data.partition(b" ")
    if kind == b"OWN":
        cmsg_type, cmsg_data = SCM_OWNED_ADDR, BusAddress(bus_path, what).pack()
        say("master", f"{msg_name} may own {what.decode()}: SCM_OWNED_ADDR")
    elif kind == b"RECEIVE":
        cmsg_type, cmsg_data = SCM_MULTICAST_MATCH, what
        say("master", f"{msg_name} may receive: SCM_MULTICAST_MATCH, the requested sockaddr_bus")
    else:
        assert kind == b"SEND"
        cmsg_type, cmsg_data = SCM_MULTICAST_SEND, what
        say("master", f"{msg_name} may send: SCM_MULTICAST_SEND, the requested sockaddr_bus")
    msg_control = [(BUS_SOCKET, cmsg_type, cmsg_data)]
    bus_fd.sendmsg([b"granted"], msg_control, socket.MSG_NOSIGNAL, msg_name)


def observe(notice: Notice, msg_name: BusAddress) -> None:
    """Print what the kernel tells the master."""
    names = ", ".join(name.decode() for name in notice.subject)
    if notice.event is not Event.KILLED:
        say("kernel", f"to the master: {notice.event.name} {names}")
        return
    assert (msg_name.ncomp, msg_name.address) == (0, b"")
    assert notice.subject == (b"1.3",)
    say("master", "a message from { .sbus_addr_ncomp = 0, .sbus_addr = NULL }, the kernel:")
    say("master", f"  {names} was {notice.event.name}: {notice.reason}")


# --- what both endpoints do ---


def join(who: str, words: bytes) -> afbus.Socket:
    """Send the AUTH message, and take the address that the reply brings."""
    fd = afbus.socket()
    fd.settimeout(TIMEOUT_S)
    auth_iovec = [b"AUTH ", words]
    ucred = UCRED.pack(os.getpid(), os.getuid(), os.getgid())
    msg_control = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ucred)]
    fd.sendmsg(auth_iovec, msg_control, socket.MSG_NOSIGNAL, addr)
    data, ancdata, _, msg_name = fd.recvmsg(ROOM, ROOM)
    assert msg_name == addr
    owned = item(ancdata, BUS_SOCKET, SCM_OWNED_ADDR)
    if owned is None:
        say(who, f"the reply is {data!r}, without an address")
        return fd
    assert fd.getsockname() == BusAddress.unpack(owned)
    say(who, f"the reply has SCM_OWNED_ADDR; the kernel has applied it: I am {fd.getsockname()}")
    return fd


def ask(fd: afbus.Socket, request: bytes) -> None:
    """Ask the master for something; the reply can be read when it is granted."""
    fd.sendmsg([request], [], socket.MSG_NOSIGNAL, addr)
    data, ancdata, _, msg_name = fd.recvmsg(ROOM, ROOM)
    assert (data, len(ancdata), msg_name) == (b"granted", 1, addr)


# --- an endpoint with two addresses ---


def service(
    bus_is_there: Turn,
    go_client: Turn,
    client_listens: Turn,
    go_mortal: Turn,
    death_is_told: Turn,
) -> None:
    """Join, own a second address, and send: to one, to many, without copies, by memfd."""
    bus_is_there.take()
    my_sock_fd = connect()
    go_client.give()
    client_listens.take()
    dst_addr = BusAddress(bus_path, "1.2")
    send_p2p(my_sock_fd, dst_addr)
    client_listens.take()
    may_send_multicasts(my_sock_fd)
    go_client.give()
    for title in ("the bloom filter alone", "the same with an eBPF filter behind it"):
        client_listens.take()
        say("service", f"{title}: I send {len(REPORTS)} multicasts")
        for maddr, body in REPORTS:
            my_sock_fd.sendmsg([body], [], socket.MSG_NOSIGNAL, maddr)
        my_sock_fd.sendto(b"that was all", dst_addr)
    client_listens.take()
    step("How to avoid unnecessary copy: a sockopt similar to PACKET_RX_RING")
    my_sock_fd.sendto(bytes(range(256)) * 128, dst_addr)
    client_listens.take()
    go_mortal.give()
    death_is_told.take()
    why = refused(lambda: my_sock_fd.sendto(b"?", BusAddress(bus_path, "1.3")), "EHOSTUNREACH")
    say("service", f"to the dead endpoint: {why}")
    pass_memfd(my_sock_fd, dst_addr)
    my_sock_fd.close()


def connect() -> afbus.Socket:
    """Join, after it was seen that nothing goes without."""
    step("How to map point 2: connects to a bus, be assigned bus address(es)")
    with afbus.socket() as unjoined:
        nobody = BusAddress(bus_path, "1.7")
        why = refused(lambda: unjoined.sendto(b"?", nobody), "EHOSTUNREACH")
    say("service", f"not joined, to somebody else than the master: {why}")
    with join("service", b"open sesame") as stranger:
        why = refused(lambda: stranger.sendto(b"?", service1), "EHOSTUNREACH")
        say("service", f"and so nothing has changed: {why}")
    return join("service", b"let me in")


def send_p2p(my_sock_fd: afbus.Socket, dst_addr: BusAddress) -> None:
    """Send as the first address, as the second one, and as somebody else."""
    step("How to map point 3: P2P communication; an endpoint with multi-addresses")
    ask(my_sock_fd, b"OWN " + service1.address)
    assert my_sock_fd.addresses() == [BusAddress(bus_path, "1.1"), service1]
    say("service", f"I own {' and '.join(str(each) for each in my_sock_fd.addresses())}")
    my_sock_fd.sendmsg([b"who ", b"am I?"], [], socket.MSG_NOSIGNAL, dst_addr)
    src_addr = service1
    msg_control = [(BUS_SOCKET, SCM_SRC_ADDR, src_addr.pack())]
    my_sock_fd.sendmsg([b"and ", b"now?"], msg_control, socket.MSG_NOSIGNAL, dst_addr)
    bank = [(BUS_SOCKET, SCM_SRC_ADDR, BusAddress(bus_path, "com.example.bank").pack())]
    why = refused(
        lambda: my_sock_fd.sendmsg([b"?"], bank, socket.MSG_NOSIGNAL, dst_addr),
        "EADDRNOTAVAIL",
    )
    say("service", f"SCM_SRC_ADDR of somebody else: {why}")


def may_send_multicasts(my_sock_fd: afbus.Socket) -> None:
    """Get the right to send multicasts, which nobody has by himself."""
    step("How to map point 3: multicast; is_matched = (maddr1 & maddr2) == maddr2")
    maddr1, body = REPORTS[0]
    why = refused(lambda: my_sock_fd.sendto(body, maddr1), "EPERM")
    say("service", f"a multicast without a grant: {why}")
    ask(my_sock_fd, b"SEND " + sensors.pack())


def pass_memfd(my_sock_fd: afbus.Socket, dst_addr: BusAddress) -> None:
    """Pass a memfd; the other side reads in the same memory, and passes one back."""
    step("Other thoughts 2: pass a memfd, and then communicate under mmap/shared memory")
    content = b"the same pages, never copied" * 40_000
    memfd = os.memfd_create("mail", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(memfd, content)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memfd]))]
    why = refused(
        lambda: my_sock_fd.sendmsg([b"?"], rights, socket.MSG_NOSIGNAL, dst_addr),
        "EOPNOTSUPP",
    )
    say("service", f"a memfd that I could still change or cut: {why}")
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, ALL_SEALS)
    my_sock_fd.sendmsg([b"look inside"], rights, socket.MSG_NOSIGNAL, dst_addr)
    os.close(memfd)
    say("service", f"SCM_RIGHTS with a sealed memfd of {len(content)} bytes")
    data, ancdata, _, msg_name = my_sock_fd.recvmsg(ROOM, ROOM)
    with received_memory(ancdata) as shared:
        assert (data, msg_name, shared[:]) == (b"and mine", dst_addr, content[::-1])
        say("service", f"{msg_name} passed one back, with all of it reversed")


def received_memory(ancdata: list[tuple[int, int, bytes]]) -> mmap.mmap:
    """Map the memfd that came with a message; it can only be read."""
    rights = item(ancdata, socket.SOL_SOCKET, socket.SCM_RIGHTS)
    assert rights is not None
    (memfd,) = array.array("i", rights)
    assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) == ALL_SEALS
    try:
        return mmap.mmap(memfd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(memfd)


# --- an endpoint that receives ---


def client(go_client: Turn, client_listens: Turn) -> None:
    """Join, and receive all of that."""
    go_client.take()
    fd = join("client", b"let me in")
    client_listens.give()
    for expected in ((b"who am I?", BusAddress(bus_path, "1.1")), (b"and now?", service1)):
        data, _, _, msg_name = fd.recvmsg(ROOM, ROOM)
        assert (data, msg_name) == expected
        say("client", f"{data!r} with msg_name {msg_name}")
    client_listens.give()

    go_client.take()
    maddr2 = temperature_kitchen
    ask(fd, b"RECEIVE " + maddr2.pack())
    client_listens.give()
    heard = receive_round(fd)
    assert heard == [REPORTS[0][1], REPORTS[2][1]]
    say("client", "  humidity did not match; the fan is a false positive, its bits cover mine")
    fd.setsockopt(BUS_SOCKET, SO_BUS_FILTER, FILTER)
    say("client", f"SO_BUS_FILTER: a program of {len(FILTER) // 8} instructions, body[0] == 't'")
    client_listens.give()
    heard = receive_round(fd)
    assert heard == [REPORTS[0][1]]
    say("client", "  the false positive is gone")
    fd.setsockopt(BUS_SOCKET, SO_BUS_FILTER, None)
    client_listens.give()

    with fd.recv_loan() as loan:
        view = memoryview(loan)
        assert (view.nbytes, view.readonly, view[:4].tobytes()) == (32768, True, b"\0\1\2\3")
        say(
            "client",
            f"{view.nbytes} bytes from {loan.address}, read where the switch has put them:",
        )
        say("client", "  a read-only memoryview into the shared ring, given back afterwards")
        view.release()
    client_listens.give()

    data, ancdata, _, msg_name = fd.recvmsg(ROOM, ROOM)
    with received_memory(ancdata) as shared:
        say("client", f"{data!r} from {msg_name}: I map it and read {shared[:14]!r}...")
        answer = shared[::-1]
    memfd = os.memfd_create("mail", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(memfd, answer)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, ALL_SEALS)
    back = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memfd]))]
    fd.sendmsg([b"and mine"], back, socket.MSG_NOSIGNAL, BusAddress(bus_path, "1.1"))
    os.close(memfd)
    fd.close()


def receive_round(fd: afbus.Socket) -> list[bytes]:
    """Receive multicasts until the message that says that there are no more: order holds (D11)."""
    heard: list[bytes] = []
    while True:
        data, _, _, msg_name = fd.recvmsg(ROOM, ROOM)
        if data == b"that was all":
            return heard
        heard.append(data)
        say("client", f"heard {data!r} from {msg_name}")


# --- an endpoint that dies ---


def mortal(go_mortal: Turn) -> None:
    """Join and be killed."""
    go_mortal.take()
    step("Other thoughts 1: notifications from the kernel, such as 'a bus endpoint died'")
    join("mortal", b"let me in")
    say("mortal", f"kill -9 {os.getpid()}, which is me")
    os.kill(os.getpid(), signal.SIGKILL)


# --- the whole ---


def spawn(work: Callable[..., None], *turns: Turn) -> int:
    """Run one part in a process of its own, before which no socket was made; return its pid."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        signal.alarm(int(ALL_S))  # whatever happens, nothing stays behind
        work(*turns)
        status = 0
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def main() -> int:
    """Run the four processes; return 0 if everything was as the mail says."""
    began = time.monotonic()
    with running_agent() as agent:
        print(f"the kernel's part is played by {agent}", flush=True)
        bus_is_there, go_client, client_listens, go_mortal, death_is_told = (
            Turn() for _ in range(5)
        )
        pids = (
            spawn(bus_master, bus_is_there, death_is_told),
            spawn(service, bus_is_there, go_client, client_listens, go_mortal, death_is_told),
            spawn(client, go_client, client_listens),
            spawn(mortal, go_mortal),
        )
        # Each ends by itself: all that they wait for has a timeout, and each has an alarm.
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    is_good = codes == [0, 0, 0, -signal.SIGKILL]
    print(f"\n{'all as in the mail' if is_good else 'NOT as in the mail'}", end=" ")
    print(f"({time.monotonic() - began:.1f} s)")
    return 0 if is_good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
