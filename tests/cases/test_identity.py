"""Other users, and processes that say they are somebody else."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.cases.actors import ITEMS, MASTER, PATH, Stage, join
from tests.cases.raw import UNICAST, RawClient, tx_record
from tests.figures import note

from afbus.client.socket import Socket
from afbus.proto import control, frames
from afbus.proto.address import BusAddress
from afbus.proto.control import BUS_SOCKET, SO_BUS_ADDRESSES, OwnedAddr
from afbus.proto.errors import AddressInUse, Denied, NotOwned, from_wire
from afbus.proto.frames import Call, Op, Result

if TYPE_CHECKING:
    from tests.cases.actors import Actor, Fleet
    from tests.cases.conftest import Node

NOBODY = 65534
SOMEBODY = 65533
TRIES = 1000
#: Processes that are killed, and whose numbers others get, with one restart of the agent.
TOGETHER = 100
_UCRED = struct.Struct("=iII")
_LIBC = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")
needs_pids = pytest.mark.skipif(
    not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK),
    reason="only root with ns_last_pid (CONFIG_CHECKPOINT_RESTORE) can choose the next pid",
)


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def hold_secrets(stage: Stage) -> None:
    """Be a member with messages in its rings; tell where they are mapped."""
    one = stage.join()
    one.sendto(b"secret", one.getsockname())
    maps = Path("/proc/self/maps").read_text().splitlines()
    stage.tell([line.split()[0] for line in maps if "memfd" in line])
    stage.hear()


def read_memory(pid: int, address: int) -> int:
    """Read a page of another process; the errno, 0 if it could be read."""
    page = ctypes.create_string_buffer(4096)
    local = _Span(ctypes.addressof(page), 4096)
    remote = _Span(address, 4096)
    got = _LIBC.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return 0 if got > 0 else ctypes.get_errno()


def copy_descriptor(pid: int, number: int) -> int:
    """Copy a descriptor of another process; the errno, 0 if it could be copied."""
    pidfd = os.pidfd_open(pid)
    got = _LIBC.syscall(_PIDFD_GETFD, pidfd, number, 0)
    found = 0 if got >= 0 else ctypes.get_errno()
    os.close(pidfd)
    return found


def snoop(stage: Stage, pids: list[int], ranges: list[str]) -> None:
    """Try to get at the rings of others in every way that the system has; tell what worked."""
    assert os.geteuid() == NOBODY
    found = []
    for pid in pids:
        for name in ("mem", "maps", "fd", "map_files", "environ"):
            place = f"/proc/{pid}/{name}"
            try:
                if os.path.isdir(place):
                    os.listdir(place)
                else:
                    Path(place).read_bytes()
                found.append(place)
            except PermissionError:
                pass
        for number in range(40):
            try:
                os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
                found.append(f"fd {number} of {pid}")
            except PermissionError:
                pass
            if copy_descriptor(pid, number) != errno.EPERM:
                found.append(f"copy of fd {number} of {pid}")
        for span in ranges:
            if read_memory(pid, int(span.partition("-")[0], 16)) != errno.EPERM:
                found.append(f"memory {span} of {pid}")
    stage.tell(found)


def be_nobody(stage: Stage) -> None:
    """Say who one is, and try to be more."""
    with stage.join() as one:
        root = _UCRED.pack(os.getpid(), 0, 0)
        item = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, root)
        with pytest.raises(Denied):
            one.sendmsg([b"I am root"], [item], 0, BusAddress(PATH, "judge"))
        source = control.encode(control.SourceAddr(BusAddress(PATH, "judge")))
        with pytest.raises(NotOwned):
            one.sendmsg([b"I am the judge"], [source], 0, BusAddress(PATH, "judge"))
        one.sendto(b"I am nobody", BusAddress(PATH, "judge"))
        assert one.listing("endpoints", PATH), "a member sees its bus"
    with Socket(node=stage.place) as stranger:
        with pytest.raises(Denied):
            stranger.listing("endpoints", PATH)
        assert {row["uid"] for row in stranger.listing("endpoints")} == {NOBODY}
    stage.tell("done")
    # Its master is killed now: another user is not the next one.
    assert stage.hear() == "killed"
    with Socket(node=stage.place) as heir, pytest.raises(AddressInUse):
        heir.bind(MASTER)
    stage.tell("done")


@needs_root
@pytest.mark.cluster
def test_case10_rings_of_other_users_are_out_of_reach(node: Node, fleet: Fleet) -> None:
    """Neither the agent's memory and descriptors nor another client's can be read."""
    node.start()
    fleet.start_master()
    holder = fleet.start(hold_secrets, uid=SOMEBODY)
    ranges = holder.hear()
    assert len(ranges) >= 4, "two rings, each with its second half"
    # The test itself may, so the ways of the snoop are ways.
    assert read_memory(holder.pid, int(ranges[0].partition("-")[0], 16)) == 0
    assert copy_descriptor(holder.pid, 0) == 0
    thief = fleet.start(snoop, uid=NOBODY, pids=[node.pid, holder.pid], ranges=ranges)
    assert thief.hear() == []
    thief.finish()
    names = [
        os.readlink(f"/proc/{holder.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{holder.pid}/fd")
    ]
    assert not [name for name in names if "memfd" in name], "rings have no descriptor left"


@needs_root
@pytest.mark.cluster
def test_case10_d6_d17_who_sends_is_what_the_kernel_says(node: Node, fleet: Fleet) -> None:
    """Another user may come, and is shown as that; it cannot be somebody else."""
    node.start()
    master = fleet.start_master()
    with join(node.place, name="judge") as judge:
        judge.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        nobody = fleet.start(be_nobody, uid=NOBODY)
        body, items, _, _ = judge.recvmsg(100, ITEMS)
        assert body == b"I am nobody"
        (credentials,) = (data for _, kind, data in items if kind == socket.SCM_CREDENTIALS)
        assert _UCRED.unpack(credentials) == (nobody.pid, NOBODY, NOBODY)
        assert nobody.hear() == "done"
        master.kill()
        judge.recv(4096)  # that the master is lost
        nobody.tell("killed")
        assert nobody.hear() == "done"
        nobody.finish()


def find_closed_door(stage: Stage) -> None:
    """Come to a door that is open to its own user only."""
    with pytest.raises(Denied, match="not open to this user"):
        Socket(node=stage.place)
    stage.tell("done")


@needs_root
@pytest.mark.cluster
def test_case10_door_of_one_user(node: Node, fleet: Fleet) -> None:
    """A door can be closed to all other users."""
    node.start(mode=0o600)
    stranger = fleet.start(find_closed_door, uid=NOBODY)
    assert stranger.hear() == "done"
    Socket(node=node.place).close()


@pytest.mark.cluster
def test_case10_d5_d6_forged_records(node: Node, fleet: Fleet) -> None:
    """What a client writes by hand is judged like what the library writes."""
    node.start()
    fleet.start_master()
    with join(node.place, name="other") as other, RawClient(str(node.place)) as client:
        client.hello(1 << 16)
        client.call(Op.ATTACH, path=PATH.encode())
        wish = b'{"name": "me", "listen": [], "watch": false}'
        assert client.verdict(client.publish(tx_record(UNICAST, MASTER.address, wish))) == 1
        client.receive()
        for record, verdict in (
            (tx_record(UNICAST, b"other", b"hello", src=b"me"), 1),
            (tx_record(UNICAST, b"other", b"x", src=b"other"), -errno.EADDRNOTAVAIL),
            (tx_record(UNICAST, b"other", b"x", src=MASTER.address), -errno.EADDRNOTAVAIL),
            (tx_record(UNICAST, b"other", b"x", src=b"\0"), -errno.EADDRNOTAVAIL),
            (tx_record(UNICAST, b"", b"x"), -errno.EDESTADDRREQ),
            (tx_record(UNICAST, b"@1", b"x"), -errno.EHOSTUNREACH),
        ):
            assert client.verdict(client.publish(record)) == verdict
        owned = OwnedAddr(BusAddress(PATH, "more"))
        args = {"dst": b"other", "items": [list(control.encode(owned)[1:])], "body": b"x"}
        client.door.send(frames.encode(Call(7, Op.CONTROL, args)))
        result = client.next_frame()
        assert isinstance(result, Result)
        assert type(from_wire(result.code)) is Denied
        assert other.recvfrom(100) == (b"hello", BusAddress(PATH, "me"))
        assert [address.address for address in other.addresses()] == [b"other"]


def be_resumed(stage: Stage) -> None:
    """Be an endpoint; tell the token; come back when told, in the same process."""
    client = RawClient(stage.place)
    token = client.hello().token
    client.call(Op.ATTACH, path=PATH.encode())
    wish = b'{"name": null, "listen": [], "watch": false}'
    client.publish(tx_record(UNICAST, MASTER.address, wish))
    client.receive()
    mine = client.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_ADDRESSES)
    stage.tell(token.hex())
    stage.hear()
    client.close()
    with RawClient(stage.place) as back:
        assert back.hello(resume=token).resumed
        assert back.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_ADDRESSES) == mine
    stage.tell("resumed")


def steal(stage: Stage, tokens: list[str], tries: int) -> None:
    """Come with the tokens of others; tell how often one was resumed."""
    resumed = 0
    for number in range(tries):
        with RawClient(stage.place) as client:
            token = bytes.fromhex(tokens[number % len(tokens)])
            welcome = client.hello(resume=token)
            resumed += welcome.resumed
            assert welcome.token != token
            addresses = client.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_ADDRESSES)
            assert addresses == []
    stage.tell(resumed)


def check_thief(fleet: Fleet, tokens: list[str], tries: int, uid: int = 0, pid: int = 0) -> Actor:
    """Let a thief try; it must have nothing."""
    thief = fleet.start(steal, tokens=tokens, tries=tries, uid=uid, pid=pid)
    assert thief.hear() == 0
    thief.finish()
    return thief


def restart(node: Node) -> None:
    """Kill the agent and start it again: all that it knew are away."""
    node.end(signal.SIGKILL)
    node.start()


@pytest.mark.cluster
@pytest.mark.slow
def test_case10_stolen_token_is_of_no_use(node: Node, fleet: Fleet) -> None:
    """1,000 tries with the tokens of others, before and while they are away: never resumed."""
    node.start(limits={"grace_s": 300.0})
    fleet.start_master()
    owners = [fleet.start(be_resumed) for _ in range(10)]
    tokens = [owner.hear() for owner in owners]
    check_thief(fleet, tokens, TRIES)
    restart(node)
    check_thief(fleet, tokens, TRIES)
    if os.geteuid() == 0:
        check_thief(fleet, tokens, TRIES, uid=NOBODY)
    for owner in owners:
        owner.tell("come back")
        assert owner.hear() == "resumed"
        owner.finish()
    note(f"{TRIES} tries with {len(tokens)} tokens, nothing got; then all owners came back")


@needs_pids
@pytest.mark.cluster
@pytest.mark.slow
def test_case10_pid_that_is_used_again_inherits_nothing(node: Node, fleet: Fleet) -> None:
    """1,000 processes die, and others get their numbers and tokens: none is taken for the first.

    Half of them die while the agent is down, half when it is up again and waits for them.
    """
    node.start(limits={"grace_s": 300.0})
    fleet.start_master()
    same = 0
    for _ in range(TRIES // TOGETHER):
        owners = [fleet.start(be_resumed) for _ in range(TOGETHER)]
        tokens = [owner.hear() for owner in owners]
        node.end(signal.SIGKILL)
        for owner in owners[::2]:
            owner.kill()
        node.start()
        for owner, token in zip(owners, tokens, strict=True):
            if owner.pidfd >= 0:
                owner.kill()
            same += check_thief(fleet, [token], 1, pid=owner.pid).pid == owner.pid
    assert same
    note(f"{TRIES} tries, {same} with the very number of the dead process, nothing got")
