"""The agent's decisions, on a fake clock, with a switch of a few lines."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from afbus.node.core import GRACE_S, HELLO_S
from afbus.node.effect import Deliver, Kind, Notify, Put, Send
from afbus.proto import codec, frames
from afbus.proto.address import BusAddress
from afbus.proto.control import (
    BUS_SOCKET,
    SCM_OWNED_ADDR,
    SO_BUS_ADDRESSES,
    SO_BUS_FILTER,
    SO_BUS_MASTER,
    SO_BUS_STATE,
    SO_BUS_STATS,
    Grant,
    GrantFlags,
    Match,
    MulticastMatch,
    MulticastSend,
    OwnedAddr,
    RevokeAddr,
    RevokeMatch,
    RevokeSend,
    SourceAddr,
    encode,
)
from afbus.proto.errors import (
    AddressInUse,
    BadDestination,
    BusError,
    CloseCode,
    Denied,
    InvalidArgument,
    NameTooLong,
    NoBus,
    NoSuchEndpoint,
    NotOwned,
    RemoteProtocolError,
    ShareExceeded,
    TooBig,
    WidthMismatch,
)
from afbus.proto.frames import Call, Hello, Op, Result
from afbus.proto.limits import ADDRESSES_PER_ENDPOINT, FRAME_BYTES, INLINE_BYTES
from afbus.proto.match import Overflow
from afbus.proto.notice import Event, Notice
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.node.conftest import Client, World

    from afbus.proto.control import Item

PATH = b"/tmp/test"
MASTER = b"org.example.bus"
CPU = Terms.of("sensors.cpu")


def owned(address: bytes, path: bytes = PATH) -> OwnedAddr:
    """Return the item that gives an address."""
    return OwnedAddr(BusAddress(path, address))


def match_of(what: Terms | bytes, path: bytes = PATH) -> MulticastMatch:
    """Return the item that grants a match."""
    return MulticastMatch(Match(path, what))


def events(taken: Iterable[object]) -> list[Event]:
    """Return the events of what was put into a ring."""
    return [one.event for one in taken if isinstance(one, Notice)]


# --- connections ---


def test_hello_is_welcomed_with_rings_of_whole_powers(world: World) -> None:
    """HELLO makes an endpoint; the agent rounds rings up, and says so."""
    client = world.connect(tx_bytes=5000, rx_bytes=4096)
    welcome = client.welcome
    assert (welcome.tx_bytes, welcome.rx_bytes) == (8192, 4096)
    assert welcome.provisional == b"@1"
    assert (welcome.epoch, welcome.node, welcome.resumed) == (1, "desk", False)
    assert ("connect", 1, 8192, 4096) in world.switch.calls


def test_first_frame_must_be_hello(world: World) -> None:
    """A call of somebody unknown ends the connection."""
    client = world.come()
    client.say(Call(1, Op.STATUS))
    assert client.closed is CloseCode.ORDER


@pytest.mark.parametrize("frame", [Hello(), Result(1)])
def test_only_calls_follow_hello(world: World, frame: Hello | Result) -> None:
    """A second HELLO, and what only an agent says, end the connection and kill the endpoint."""
    client = world.connect()
    client.say(frame)
    assert client.closed is CloseCode.ORDER
    assert ("remove_endpoint", client.number, True) in world.switch.calls


def test_unknown_version_is_refused(world: World) -> None:
    """A client from the future is told so."""
    client = world.come()
    client.say(Hello(version=99))
    assert client.closed is CloseCode.VERSION


def test_rings_have_a_limit(world: World) -> None:
    """A ring above the limit of this agent is refused and not made smaller in silence."""
    world.limit(ring_bytes_max=65536)
    client = world.connect(rx_bytes=65537)
    assert client.closed is CloseCode.LIMIT


def test_agent_without_descriptors_refuses_and_forgets(world: World) -> None:
    """When rings cannot be made, the client is told and nothing is left."""
    world.switch.connect_error = OSError(24, "Too many open files")
    client = world.connect()
    assert client.closed is CloseCode.LIMIT
    assert world.switch.bus_of == {}
    assert [kind for kind, _, _ in world.journal] == [Kind.AGENT]


def test_silent_connection_ends(world: World) -> None:
    """Without HELLO a connection ends at its time, others stay."""
    first = world.come()
    world.pass_time(1)
    second = world.come()
    world.pass_time(HELLO_S - 1)
    assert first.closed is CloseCode.ORDER
    assert not second.is_cut
    second.say(Hello())
    assert world.core.get_timer() is None


def test_d18_endpoints_of_one_user_are_limited(world: World) -> None:
    """One user cannot fill the door, neither with endpoints nor in silence; others come in."""
    world.limit(endpoints_per_user=3)
    world.connect(1001)
    world.connect(1001)
    world.come(1001)
    refused = world.come(1001)
    assert refused.closed is CloseCode.SHARE
    assert not world.connect(1002).is_cut
    world.clients[next(iter(world.clients))].end()
    assert not world.come(1001).is_cut


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", b"\xc1", bytes(FRAME_BYTES + 1), codec.encode([3, 1, 99, {}])],
)
def test_malformed_packet_ends_only_its_connection(world: World, data: bytes) -> None:
    """What is no frame ends that connection, with a reason."""
    master = world.bound()
    other = world.joined(master, b"1.1")
    client = world.joined(master, b"1.2")
    client.say_bytes(data)
    assert client.closed in (CloseCode.MALFORMED, CloseCode.LIMIT)
    assert events(master.take()) == [Event.KILLED]
    assert other.call(Op.STATUS)["endpoints"] == 2
    # What still arrives from it means nothing.
    world.core.receive_packet(client.connection, data, world.now)
    client.end()


# --- attach, bind ---


def test_r6_bind_creates_a_bus(world: World) -> None:
    """The one who binds is the master; the address is his."""
    master = world.connect()
    assert master.bind() == {"width": 512, "order": "fifo", "members": 0}
    packed = BusAddress(PATH, MASTER).pack()
    assert master.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_MASTER) == packed
    assert master.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_ADDRESSES) == [packed]
    assert ("set_master", 1, master.number) in world.switch.calls


def test_d8_d11_bind_takes_options(world: World) -> None:
    """Width and order are chosen at creation."""
    client = world.connect()
    assert client.bind(options={"width": 1024, "order": "total"})["width"] == 1024
    other = world.connect()
    found = other.call(Op.ATTACH, path=PATH)
    assert found == {"master": MASTER, "width": 1024, "order": "total"}


@pytest.mark.parametrize(
    "options", [{"width": 100}, {"width": True}, {"width": "512"}, {"order": "causal"}, {"x": 1}]
)
def test_wrong_options_of_a_bus_are_refused(world: World, options: dict[str, object]) -> None:
    """Unknown and wrong options are errors, and no bus comes of them."""
    with pytest.raises(InvalidArgument):
        world.connect().bind(options=options)
    assert world.switch.buses == {}


@pytest.mark.parametrize(
    ("address", "error"),
    [
        (BusAddress.kernel(PATH).pack(), NotOwned),
        (BusAddress(PATH, b"@1").pack(), NotOwned),
        (BusAddress.multicast(PATH, bytes(64)).pack(), InvalidArgument),
        (b"short", InvalidArgument),
    ],
)
def test_d6_bind_needs_an_address_that_can_be_owned(
    world: World, address: bytes, error: type[BusError]
) -> None:
    """Nobody is the kernel, a provisional address, or many."""
    with pytest.raises(error):
        world.connect().call(Op.BIND, address=address)


def test_d2_second_bind_is_refused(world: World) -> None:
    """A bus is its path: EADDRINUSE while it has a master."""
    master = world.bound()
    with pytest.raises(AddressInUse, match="endpoint 1 is its master"):
        world.connect().bind(b"other")
    with pytest.raises(InvalidArgument):
        master.bind(b"other", b"/tmp/else")
    with pytest.raises(InvalidArgument):
        master.bind(b"other")


def test_attach_refusals(world: World) -> None:
    """No such bus, another bus, no path at all; repeating it is harmless."""
    world.bound()
    client = world.connect()
    with pytest.raises(NoBus, match="/tmp/none"):
        client.call(Op.ATTACH, path=b"/tmp/none")
    for path, error in ((b"", InvalidArgument), (b"x" * 107, NameTooLong)):
        with pytest.raises(error):
            client.call(Op.ATTACH, path=path)
    found = client.call(Op.ATTACH, path=PATH)
    assert client.call(Op.ATTACH, path=PATH) == found
    with pytest.raises(NoSuchEndpoint, match="another socket"):
        client.call(Op.ATTACH, path=b"/tmp/none")


# --- grants ---


def test_r11_r12_d5_owned_address_joins_before_the_message(world: World) -> None:
    """The address is owned, then told, and only then the message is there."""
    master = world.bound()
    client = world.attached()
    world.switch.calls.clear()
    master.control(b"@2", owned(b"1.1"), owned(b"name"), body=b"welcome", serial=5, reply_to=6)
    assert world.switch.calls == [
        ("own", 2, b"1.1"),
        ("own", 2, b"name"),
        ("notify", 1, Event.JOINED),
        ("deliver", 1, 2, b"welcome"),
    ]
    assert client.take() == [(MASTER, b"@2", b"welcome", 5, 6, 0)]
    assert master.take()[0].subject == (b"1.1", b"name")


def test_d5_d16_journal_stands_before_what_tells_of_it(world: World) -> None:
    """Whoever reads of a grant, by message, notice or result, reads what is written down."""
    master = world.bound()
    client = world.attached()
    items = [list(encode(owned(b"1.1"))[1:]), list(encode(match_of(CPU))[1:])]
    args = {"dst": client.welcome.provisional, "src": None, "items": items, "body": b""}
    call = frames.encode(Call(9, Op.CONTROL, args))
    world.core.receive_packet(master.connection, call, world.now)
    kinds = [type(effect) for effect in world.core.take_effects()]
    assert kinds == [Put, Put, Notify, Deliver, Send]


def test_r11_d5_items_of_others_are_denied(world: World) -> None:
    """A member, an unjoined one and one on no bus cannot command: EPERM, and nothing happens."""
    master = world.bound()
    member = world.joined(master, b"1.1")
    for client in (member, world.attached(), world.connect()):
        with pytest.raises(Denied) as caught:
            client.control(b"1.1", owned(b"mine"))
        assert isinstance(caught.value, PermissionError)
    assert world.switch.buses[1] == {MASTER: 1, b"1.1": 2}
    assert member.take() == []


def test_d5_grant_for_another_bus_is_denied(world: World) -> None:
    """Each kind of item names its bus, and only that bus's master may use it."""
    master = world.bound()
    world.attached()
    other = b"/tmp/other"
    for item in (
        owned(b"1.1", other),
        RevokeAddr(BusAddress(other, b"1.1")),
        match_of(CPU, other),
        RevokeMatch(other, CPU),
        MulticastSend(other, CPU),
        RevokeSend(other, CPU),
    ):
        with pytest.raises(Denied, match="a grant for another bus"):
            master.control(b"@2", item)


@pytest.mark.parametrize(
    ("address", "error"),
    [
        (BusAddress(PATH, b"@2"), NotOwned),
        (BusAddress.multicast(PATH, bytes(64)), InvalidArgument),
        (BusAddress(PATH, MASTER), AddressInUse),
    ],
)
def test_d6_addresses_that_cannot_be_granted(
    world: World, address: BusAddress, error: type[BusError]
) -> None:
    """Provisional and multicast addresses have no owner, others one."""
    master = world.bound()
    world.attached()
    with pytest.raises(error):
        master.control(b"@2", OwnedAddr(address))


def test_d6_kernels_address_cannot_be_revoked(world: World) -> None:
    """Nobody owns it."""
    master = world.bound()
    world.attached()
    with pytest.raises(NotOwned):
        master.control(b"@2", RevokeAddr(BusAddress.kernel(PATH)))


# --- addresses that the agent chooses ---

CHOSEN = OwnedAddr(BusAddress.kernel(PATH))


def choose(master: Client, client: Client, *items: Item) -> list[bytes]:
    """Let the agent choose an address for an endpoint; return what the master is told."""
    found: dict[str, list[bytes]] = master.control(
        client.welcome.provisional, *(items or (CHOSEN,))
    )
    return found["owned"]


def test_r11_d3_agent_chooses_an_address(world: World) -> None:
    """The master is told the address, the endpoint owns it and reads it in the item."""
    master, client = world.bound(), world.attached()
    items = (owned(b"name"), CHOSEN, match_of(CPU), CHOSEN)
    assert choose(master, client, *items) == [b"1.1", b"1.2"]
    assert choose(master, client, owned(b"other")) == []
    packed = client.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_ADDRESSES)
    owned_now = [BusAddress.unpack(one).address for one in packed]
    assert owned_now == [b"name", b"1.1", b"1.2", b"other"]
    told = [owned(b"name"), owned(b"1.1"), match_of(CPU), owned(b"1.2")]
    assert world.switch.items[client.number] == [*told, owned(b"other")]
    assert choose(master, world.attached()) == [b"1.3"]


def test_d3_chosen_address_is_not_one_that_was_granted(world: World) -> None:
    """What the master granted by a number of its own is passed over, in the same message too."""
    master, client = world.bound(), world.attached()
    master.control(client.welcome.provisional, owned(b"1.1"), owned(b"1.3"))
    master.control(client.welcome.provisional, RevokeAddr(BusAddress(PATH, b"1.1")))
    items = (owned(b"1.4"), CHOSEN, CHOSEN)
    assert choose(master, client, *items) == [b"1.2", b"1.5"]
    master.control(client.welcome.provisional, RevokeAddr(BusAddress(PATH, b"1.2")))
    with pytest.raises(AddressInUse):
        master.control(client.welcome.provisional, owned(b"1.2"))


def test_d3_chosen_address_never_comes_again(world: World) -> None:
    """Not when it is revoked, nor on a new bus of the same path, nor after a restart."""
    master, client = world.bound(), world.attached()
    seen = choose(master, client)
    master.control(client.welcome.provisional, RevokeAddr(BusAddress(PATH, seen[0])))
    seen += choose(master, client)
    client.call(Op.CLOSE)
    master.call(Op.CLOSE)
    master, client = world.bound(), world.attached()
    seen += choose(master, client)
    tokens = master.welcome.token, client.welcome.token
    for _ in range(2):
        world.restart()
        master = world.connect(1001, resume=tokens[0])
        client = world.connect(1002, resume=tokens[1])
        assert master.welcome.resumed
        seen += choose(master, client)
        seen += choose(master, client)
    assert seen == [b"1.1", b"1.2", b"2.1", b"3.1", b"3.2", b"4.1", b"4.2"]


def test_d5_chosen_address_is_refused_as_a_whole(world: World) -> None:
    """What stands beside it is judged as ever, and for another bus nothing is chosen."""
    master, client = world.bound(), world.attached()
    other = OwnedAddr(BusAddress.kernel(b"/tmp/other"))
    for items, error in (((CHOSEN, owned(MASTER)), AddressInUse), ((other,), Denied)):
        with pytest.raises(error):
            master.control(client.welcome.provisional, *items)
    assert not client.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_ADDRESSES)
    with pytest.raises(ShareExceeded):
        choose(master, client, *[CHOSEN] * (ADDRESSES_PER_ENDPOINT + 1))


def test_d5_items_are_all_or_none(world: World) -> None:
    """A wrong item at the end undoes nothing, because nothing was done."""
    master = world.bound()
    client = world.attached()
    calls, journal = len(world.switch.calls), dict(world.journal)
    with pytest.raises(AddressInUse):
        master.control(b"@2", owned(b"1.1"), match_of(CPU), owned(MASTER), body=b"never")
    assert len(world.switch.calls) == calls
    assert world.journal == journal
    assert client.take() == []
    # 1.1 was not spent by it.
    master.control(b"@2", owned(b"1.1"))


def test_items_are_judged_in_their_order(world: World) -> None:
    """Each item sees what those before it would make."""
    master = world.bound()
    world.attached()
    name = BusAddress(PATH, b"name")
    master.control(b"@2", OwnedAddr(name), RevokeAddr(name), OwnedAddr(name), match_of(CPU))
    with pytest.raises(NotOwned):
        master.control(b"@2", RevokeAddr(name), RevokeAddr(name))
    with pytest.raises(InvalidArgument):
        master.control(b"@2", RevokeMatch(PATH, CPU), RevokeMatch(PATH, CPU))
    number = BusAddress(PATH, b"1.9")
    with pytest.raises(AddressInUse):
        master.control(b"@2", OwnedAddr(number), RevokeAddr(number), OwnedAddr(number))


def test_d3_unique_addresses_are_granted_once(world: World) -> None:
    """A unique address does not come again in an epoch, whatever became of its owner."""
    master = world.bound()
    client = world.joined(master, b"1.1")
    master.control(b"1.1", RevokeAddr(BusAddress(PATH, b"1.1")))
    for address in (b"@2", b"@3"):
        if address == b"@3":
            client.end()
            world.attached()
        with pytest.raises(AddressInUse, match="granted before"):
            master.control(address, owned(b"1.1"))


def test_d3_names_are_exclusive_and_move(world: World) -> None:
    """A name has one owner, and another one once it is free."""
    master = world.bound()
    one, two = world.joined(master, b"1.1"), world.joined(master, b"1.2")
    master.control(b"1.1", owned(b"name"))
    with pytest.raises(AddressInUse, match="endpoint 2"):
        master.control(b"1.2", owned(b"name"))
    one.end()
    master.control(b"1.2", owned(b"name"))
    assert two.take()


def test_d18_addresses_of_an_endpoint_are_limited(world: World) -> None:
    """The 129th address is refused."""
    master = world.bound()
    world.attached()
    for number in range(ADDRESSES_PER_ENDPOINT):
        master.control(b"@2", owned(b"1.%d" % number))
    with pytest.raises(ShareExceeded):
        master.control(b"@2", owned(b"name"))


def test_d18_matches_of_a_user_are_limited(world: World) -> None:
    """Matches and grants to send count together, over all endpoints of a user."""
    world.limit(matches_per_user=2)
    master = world.bound()
    first, _ = world.joined(master, b"1.1"), world.joined(master, b"1.2")
    master.control(b"1.1", match_of(CPU))
    master.control(b"1.1", match_of(CPU), MulticastSend(PATH, CPU))
    with pytest.raises(ShareExceeded):
        master.control(b"1.2", match_of(CPU))
    master.control(b"1.1", RevokeSend(PATH, CPU), match_of(Terms.of("b")))
    first.end()
    master.control(b"1.2", match_of(CPU), MulticastSend(PATH, CPU))


def test_r15_d12_match_is_replaced(world: World) -> None:
    """A second grant of one match changes its overflow; the same one changes nothing."""
    master = world.bound()
    world.joined(master, b"1.1")
    master.control(b"1.1", match_of(CPU))
    before = dict(world.switch.matches)
    master.control(b"1.1", match_of(CPU))
    assert world.switch.matches == before
    blocking = Match(PATH, CPU, Overflow.BLOCK, 500)
    master.control(b"1.1", MulticastMatch(blocking))
    assert list(world.switch.matches.values()) == [(2, "receive", CPU.pack(), None, 4, 500)]


def test_r15_d5_many_matches_beside_one_message(world: World) -> None:
    """Those in a row are granted together, and each as if those before it were in effect."""
    master = world.bound()
    world.joined(master, b"1.1")
    many = [Terms.of("many", n=number) for number in range(100)]
    bits = bytes([1, *bytes(63)])
    slow = MulticastMatch(Match(PATH, many[3], Overflow.BLOCK, 700))
    master.control(b"1.1", match_of(CPU), match_of(many[0]))
    master.control(
        b"1.1",
        *map(match_of, many),
        match_of(many[3]),
        RevokeMatch(PATH, many[1]),
        RevokeMatch(PATH, many[2]),
        match_of(many[2]),
        match_of(bits),
        slow,
    )
    heard = [one[2:] for one in world.switch.matches.values()]
    expected: set[tuple[object, ...]] = {(what.pack(), None, 1, 0) for what in (CPU, *many)}
    expected -= {(many[at].pack(), None, 1, 0) for at in (1, 3)}
    expected |= {(many[3].pack(), None, 4, 700), (None, bits, 1, 0)}
    assert len(heard) == len(expected)
    assert set(heard) == expected
    with pytest.raises(InvalidArgument):
        master.control(b"1.1", match_of(Terms.of("new")), RevokeMatch(PATH, many[1]))
    assert len(world.switch.matches) == len(expected)


def test_r14_d8_other_width_is_refused(world: World) -> None:
    """Bits must have the width of the bus: EDOM. Zeros are the master's decision (D9)."""
    master = world.bound()
    world.attached()
    for item in (match_of(bytes(128)), MulticastSend(PATH, bytes(128))):
        with pytest.raises(WidthMismatch):
            master.control(b"@2", item)
    master.control(b"@2", match_of(bytes(64)), MulticastSend(PATH, b"\xff" * 64))


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({"dst": b"1.9"}, NoSuchEndpoint),
        ({"dst": b"@9"}, NoSuchEndpoint),
        ({"dst": b"@02"}, NoSuchEndpoint),
        ({"dst": b"@" + b"9" * 200}, NoSuchEndpoint),
        ({"dst": "@²".encode()}, NoSuchEndpoint),
        ({"dst": b""}, BadDestination),
        ({"src": b"forged"}, NotOwned),
        ({"serial": -1}, InvalidArgument),
        ({"reply_to": -1}, InvalidArgument),
        ({"deadline_ms": 5}, InvalidArgument),
        ({"deadline_ms": 1 << 40, "serial": 1}, InvalidArgument),
        ({"body": bytes(INLINE_BYTES + 1)}, TooBig),
        ({"items": [[SCM_OWNED_ADDR, b"short"]]}, InvalidArgument),
        ({"items": [[99, b""]]}, InvalidArgument),
        ({"items": [[16, BusAddress(PATH, b"1.1").pack()]]}, InvalidArgument),
    ],
)
def test_d6_d7_control_refusals(
    world: World, args: dict[str, object], error: type[BusError]
) -> None:
    """Each wrong argument has its error, and nothing is delivered."""
    master = world.bound()
    client = world.attached()
    call = {"dst": b"@2", "src": None, "items": [], "body": b"", **args}
    with pytest.raises(error):
        master.call(Op.CONTROL, **call)
    assert client.take() == []


def test_message_must_fit_into_the_ring(world: World) -> None:
    """What could never be put into the receiver's ring is refused at once."""
    master = world.bound()
    client = world.connect(rx_bytes=4096)
    client.call(Op.ATTACH, path=PATH)
    with pytest.raises(TooBig):
        master.control(b"@2", body=bytes(4096))
    master.control(b"@2", body=bytes(3000))


def test_source_may_be_chosen(world: World) -> None:
    """The master sends from any of its addresses (R13)."""
    master = world.bound()
    client = world.attached()
    master.control(MASTER, owned(b"second"))
    master.control(b"@2", src=b"second", serial=1, deadline_ms=50)
    assert client.take() == [(b"second", b"@2", b"", 1, 0, 50)]


def test_master_keeps_its_address(world: World) -> None:
    """It cannot revoke the address at which everybody finds it."""
    master = world.bound()
    with pytest.raises(InvalidArgument):
        master.control(MASTER, RevokeAddr(BusAddress(PATH, MASTER)))


# --- notices ---


def test_d15_revoked_is_told_after_what_was_sent(world: World) -> None:
    """What the endpoint published is flushed, then it loses, then it is told, then the message."""
    master = world.bound()
    client = world.joined(master, b"1.1")
    master.control(b"1.1", owned(b"name"), match_of(CPU), MulticastSend(PATH, bytes(64)))
    client.take()
    world.switch.calls.clear()
    master.control(
        b"1.1",
        RevokeAddr(BusAddress(PATH, b"name")),
        RevokeMatch(PATH, CPU),
        RevokeSend(PATH, bytes(64)),
        body=b"bye",
    )
    assert world.switch.calls == [
        ("flush", 2),
        ("disown", 2, b"name"),
        *[("notify", 2, Event.REVOKED)] * 3,
        ("deliver", 1, 2, b"bye"),
    ]
    name, match, send, _ = client.take()
    assert (name.subject, name.reason) == ((b"name",), "address")
    assert match.detail == {"match": "sensors.cpu"}
    assert send.detail == {"send": "0x" + bytes(64).hex()}


def test_d15_watchers_are_told(world: World) -> None:
    """JOINED, LEFT and KILLED go to the master and to those with the grant, not to others."""
    master = world.bound()
    watcher, other = world.joined(master, b"1.1"), world.joined(master, b"1.2")
    master.control(b"1.1", Grant(GrantFlags.NOTICES))
    watcher.take()
    client = world.joined(master, b"1.3")
    client.call(Op.CLOSE)
    assert client.is_cut
    other.end()
    joined, left, killed = watcher.take()
    assert (joined.event, joined.subject) == (Event.JOINED, (b"1.3",))
    assert (left.event, left.subject) == (Event.LEFT, (b"1.3",))
    assert left.detail == {"endpoint": 4, "pid": 7, "uid": 1002, "gid": 1002}
    assert (killed.event, killed.subject) == (Event.KILLED, (b"1.2",))
    assert events(master.take()) == [Event.LEFT, Event.KILLED]
    master.control(b"1.1", Grant(GrantFlags(0)))
    assert watcher.take()[0].detail == {"grant": "NOTICES"}
    world.joined(master, b"1.4")
    assert watcher.take() == []


def test_d15_notices_come_after_the_last_message(world: World) -> None:
    """The endpoint is removed with a flush before anybody is told."""
    master = world.bound()
    client = world.joined(master, b"1.1")
    world.switch.calls.clear()
    client.end()
    assert world.switch.calls == [("remove_endpoint", 2, True), ("notify", 1, Event.KILLED)]


def test_endpoint_that_never_joined_leaves_in_silence(world: World) -> None:
    """Only members are told of."""
    master = world.bound()
    world.attached().end()
    assert master.take() == []


def test_losing_the_last_address_is_leaving(world: World) -> None:
    """Who owns nothing any more has left, and may join again."""
    master = world.bound()
    client = world.joined(master, b"1.1")
    master.control(b"1.1", RevokeAddr(BusAddress(PATH, b"1.1")))
    assert events(master.take()) == [Event.LEFT]
    master.control(b"@2", owned(b"1.2"))
    assert events(master.take()) == [Event.JOINED]
    assert events(client.take()) == [Event.REVOKED]


def test_d20_unread_is_told_to_senders(world: World) -> None:
    """Who sent what nobody will read is told which; a sender that is gone too is not."""
    master = world.bound()
    sender, receiver = world.joined(master, b"1.1"), world.joined(master, b"1.2")
    world.switch.unread = [(sender.number, 4, 9, 3), (77, 1, 1, 1)]
    receiver.call(Op.CLOSE)
    (notice,) = sender.take()
    assert (notice.event, notice.subject) == (Event.UNREAD, (b"1.2",))
    assert notice.detail == {"first": 4, "last": 9, "count": 3}


def test_d20_what_a_client_took_and_nobody_read_is_told(world: World) -> None:
    """By name, by unique or provisional address; who is gone is passed over."""
    master, unjoined = world.bound(), world.attached()
    sender = world.joined(master, b"1.1")
    receiver = world.joined(master, b"1.2")
    world.switch.received[receiver.number] = 9
    rows = [[b"1.1", 4, 9, 3], [unjoined.welcome.provisional, 1, 2, 2], [b"gone", 1, 4, 4]]
    master.take()
    receiver.call(Op.UNREAD, messages=rows, reason="asleep")
    (notice,), (other,) = sender.take(), unjoined.take()
    assert (notice.event, notice.subject) == (Event.UNREAD, (b"1.2",))
    assert (notice.reason, notice.detail) == ("asleep", {"first": 4, "last": 9, "count": 3})
    assert other.detail == {"first": 1, "last": 2, "count": 2}
    assert master.take() == []


def test_d20_a_client_cannot_give_back_more_than_it_was_sent(world: World) -> None:
    """Nor anything before it is on a bus; a refusal tells nobody."""
    master = world.bound()
    sender = world.joined(master, b"1.1")
    receiver = world.joined(master, b"1.2")
    world.switch.received[receiver.number] = 3
    receiver.call(Op.UNREAD, messages=[[b"1.1", 1, 2, 2]], reason="")
    for rows in ([[b"1.1", 1, 2, 2]], [[b"1.1", 3, 3, 1], [b"1.1", 3, 3, 1]]):
        with pytest.raises(InvalidArgument):
            receiver.call(Op.UNREAD, messages=rows, reason="")
    assert len(sender.take()) == 1
    receiver.call(Op.UNREAD, messages=[[b"1.1", 3, 3, 1]], reason="")
    assert len(sender.take()) == 1
    with pytest.raises(NoBus):
        world.connect().call(Op.UNREAD, messages=[], reason="")


@pytest.mark.parametrize(
    ("event", "code", "flush"),
    [("violated", CloseCode.RING, False), ("too-slow", CloseCode.EVICTED, True)],
)
def test_d12_endpoint_is_cut_off(world: World, event: str, code: CloseCode, flush: bool) -> None:
    """The switch's verdict ends the endpoint, with its rule as the reason."""
    master = world.bound()
    client = world.joined(master, b"1.1")
    world.core.receive_event(client.number, event, "the rule")
    world.settle()
    assert client.closed is code
    assert ("remove_endpoint", 2, flush) in world.switch.calls
    (notice,) = master.take()
    assert (notice.event, notice.reason) == (Event.KILLED, "cut off: the rule")
    assert events(client.take()) == ([] if event == "violated" else [Event.EVICTED])
    world.core.receive_event(client.number, event, "late")
    assert world.core.take_effects() == []


def test_large_notice_is_abridged_for_a_small_ring(world: World) -> None:
    """A ring too small for all addresses gets those that fit, and how many are left out."""
    master = world.connect(rx_bytes=4096)
    master.bind()
    client = world.joined(master, b"1.1")
    for number in range(100):
        master.control(b"1.1", owned(b"%03d" % number + b"x" * 200))
    client.end()
    (notice,) = master.take()
    assert notice.event is Event.KILLED
    assert len(notice.subject) + notice.detail["omitted"] == 101
    assert notice.subject


# --- masters come and go ---


def test_d16_bus_goes_on_without_its_master(world: World) -> None:
    """Everybody on the bus is told; the same user takes over, another one does not."""
    master = world.bound(1001)
    member, waiting = world.joined(master, b"1.1"), world.attached()
    master.end()
    assert events(member.take()) == events(waiting.take()) == [Event.MASTER_LOST]
    state = member.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_STATE)
    assert (state["master"], state["is_member"]) == ("lost", True)
    assert member.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_MASTER) is None
    assert world.connect().call(Op.ATTACH, path=PATH)["master"] is None
    with pytest.raises(AddressInUse, match="another user's, 1001"):
        world.connect(1003).bind()
    with pytest.raises(InvalidArgument, match="512 bits"):
        world.connect(1001).bind(options={"width": 1024})
    with pytest.raises(AddressInUse):
        world.connect(1001).bind(b"1.1")
    again = world.connect(1001)
    assert again.bind(b"elsewhere") == {"width": 512, "order": "fifo", "members": 1}
    for client in (member, waiting):
        (notice,) = client.take()
        assert (notice.event, notice.subject) == (Event.MASTER_BACK, (b"elsewhere",))
    assert again.take() == []
    again.control(b"1.1", owned(b"name"))


def test_bus_vanishes_with_its_last_endpoint(world: World) -> None:
    """Then the path is free for everybody."""
    master = world.bound(1001)
    member = world.joined(master, b"1.1")
    master.call(Op.CLOSE)
    assert world.switch.buses
    member.end()
    assert world.switch.buses == {}
    assert {kind for kind, _, _ in world.journal} == {Kind.AGENT}
    world.connect(1003).bind()


# --- options, shutdown, lists ---


def test_options(world: World) -> None:
    """Options are set in the switch; unknown ones and wrong values are refused."""
    client = world.connect()
    passcred = {"level": socket.SOL_SOCKET, "name": socket.SO_PASSCRED}
    program = {"level": BUS_SOCKET, "name": SO_BUS_FILTER}
    client.call(Op.OPTION_SET, **passcred, value=1)
    assert client.call(Op.OPTION_GET, **passcred) == 1
    client.call(Op.OPTION_SET, **program, value=b"right")
    client.call(Op.OPTION_SET, **program, value=None)
    assert world.switch.calls[-3:] == [
        ("set_ident", 1, True),
        ("set_filter", 1, b"right"),
        ("set_filter", 1, None),
    ]
    with pytest.raises(InvalidArgument, match="no such opcode"):
        client.call(Op.OPTION_SET, **program, value=b"wrong")
    for wrong in (
        {**passcred, "value": 2},
        {**passcred, "value": b""},
        {**program, "value": 1},
        {**program, "value": bytes(8 * 4096 + 1)},
        {"level": BUS_SOCKET, "name": 99, "value": None},
    ):
        with pytest.raises(InvalidArgument):
            client.call(Op.OPTION_SET, **wrong)
    with pytest.raises(InvalidArgument):
        client.call(Op.OPTION_GET, **program)
    assert client.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_ADDRESSES) == []
    assert client.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_STATS)["sent"] == 1


def test_d20_shutdown_flushes_and_silences(world: World) -> None:
    """SHUT_WR sends what was published, and then no more; SHUT_RD is the client's own affair."""
    client = world.connect()
    client.call(Op.SHUTDOWN, how=socket.SHUT_RD)
    assert ("set_silent", 1) not in world.switch.calls
    client.call(Op.SHUTDOWN, how=socket.SHUT_WR)
    assert world.switch.calls[-2:] == [("flush", 1), ("set_silent", 1)]
    with pytest.raises(InvalidArgument):
        client.call(Op.SHUTDOWN, how=9)


def test_d20_close_answers_last(world: World) -> None:
    """CLOSE is answered, and then the connection ends."""
    client = world.connect()
    assert client.ask(Op.CLOSE).is_ok
    assert client.is_cut


def test_d19_monitors_are_audited(world: World) -> None:
    """Who gets to see everything stands in the log."""
    master = world.bound()
    world.joined(master, b"1.1")
    master.control(b"1.1", Grant(GrantFlags.MONITOR))
    assert ("set_monitor", 2, True) in world.switch.calls
    master.control(b"1.1", Grant(GrantFlags(0)))
    assert ("set_monitor", 2, False) in world.switch.calls
    assert len(world.audits) == 2
    assert "endpoint 2 (pid 7, uid 1002) sees all messages of /tmp/test" in world.audits[0]


def test_lists(world: World) -> None:
    """Each list has rows with texts."""
    master = world.bound()
    client = world.joined(master, b"1.1")
    master.control(b"1.1", owned(b"name"), match_of(CPU), MulticastSend(PATH, bytes(64)))
    rows = {
        what: client.call(Op.LIST, what=what, path=PATH)["rows"]
        for what in ("buses", "endpoints", "addresses", "matches", "queues", "lanes")
    }
    assert rows["buses"][0]["path"] == "/tmp/test"
    assert (rows["buses"][0]["members"], rows["buses"][0]["matches"]) == (2, 1)
    assert [row["state"] for row in rows["endpoints"]] == ["master", "member"]
    assert rows["endpoints"][1]["addresses"] == ["1.1", "name"]
    assert [row["kind"] for row in rows["addresses"]] == ["name", "unique", "name"]
    assert [(row["may"], row["terms"], row["bits"]) for row in rows["matches"]] == [
        ("receive", "sensors.cpu", None),
        ("send", None, bytes(64).hex()),
    ]
    assert rows["queues"][1]["sent"] == 2
    assert [(row["address"], row["to"], row["kind"]) for row in rows["lanes"]] == [
        ("1.1", ["org.example.bus"], "unicast")
    ]
    with pytest.raises(InvalidArgument):
        client.call(Op.LIST, what="secrets")
    with pytest.raises(InvalidArgument):
        client.call(Op.LIST, what="buses", after=-1)
    with pytest.raises(NoBus):
        client.call(Op.LIST, what="endpoints", path=b"/tmp/none")


def test_lists_show_details_only_to_some(world: World) -> None:
    """Members, the master's user, the agent's own and root see details; others see the bus."""
    master = world.bound(1001)
    member = world.joined(master, b"1.1", 1002)
    for client in (master, member, world.connect(0), world.connect(1000), world.connect(1001)):
        assert client.call(Op.LIST, what="endpoints", path=PATH)["rows"]
    for stranger in (world.connect(1003), world.attached(1003)):
        assert stranger.call(Op.LIST, what="buses")["rows"]
        with pytest.raises(Denied):
            stranger.call(Op.LIST, what="addresses", path=PATH)
        assert stranger.call(Op.LIST, what="addresses")["rows"] == []


def test_long_lists_come_in_pages(world: World) -> None:
    """Nothing is left out of a list that needs several frames."""
    master = world.bound()
    world.attached()
    for number in range(3000):
        master.control(b"@2", match_of(Terms.of(f"topic.of.number.x{number}")))
    found: list[str] = []
    after: int | None = 0
    while after is not None:
        page = master.call(Op.LIST, what="matches", path=PATH, after=after)
        found += [row["terms"] for row in page["rows"]]
        after = page["next"]
    assert found == [f"topic.of.number.x{number}" for number in range(3000)]


@pytest.mark.parametrize("what", ["buses", "endpoints", "addresses", "matches", "queues", "lanes"])
def test_lists_go_on_anywhere(world: World, what: str) -> None:
    """From any row on the rows are those of the whole list, whoever they belong to."""
    master = world.bound()
    for number in range(4):
        client = world.attached()
        items: list[Item] = [owned(b"%d.%d" % (number, each)) for each in range(number)]
        items += [match_of(Terms.of("t", number=str(each))) for each in range(3 - number)]
        items += [MulticastSend(PATH, Terms.of("t", number=str(each))) for each in range(number)]
        master.control(client.welcome.provisional, *items)
    rows = master.call(Op.LIST, what=what, path=PATH)["rows"]
    assert len(rows) == {"buses": 1, "addresses": 7, "matches": 12, "lanes": 10}.get(what, 5)
    for after in range(len(rows) + 2):
        page = master.call(Op.LIST, what=what, path=PATH, after=after)
        assert page == {"rows": rows[after:], "next": None}


def test_status(world: World) -> None:
    """STATUS tells of the agent itself."""
    status = world.bound().call(Op.STATUS)
    assert (status["version"], status["node"], status["pid"]) == ("1.2.3", "desk", 42)
    assert (status["buses"], status["endpoints"], status["epoch"]) == (1, 1, 1)


# --- the agent begins anew ---


def resumed(world: World, client: Client, **credentials: Any) -> Client:
    """Return a client that comes back with the token of another."""
    who = replace(client.credentials, **credentials)
    again = world.come(who.uid, who.pid, who.start_ticks)
    again.say(Hello(resume=client.welcome.token))
    return again


def test_d16_d21_endpoints_resume_after_a_restart(world: World) -> None:
    """Addresses, matches, grants, options and the mastership come back; unique ones stay spent."""
    master = world.bound()
    client = world.joined(master, b"1.1")
    master.control(b"1.1", owned(b"name"), owned(b"a"), match_of(CPU), MulticastSend(PATH, CPU))
    master.control(b"1.1", match_of(bytes(64)), Grant(GrantFlags.NOTICES | GrantFlags.MONITOR))
    client.call(Op.OPTION_SET, level=socket.SOL_SOCKET, name=socket.SO_PASSCRED, value=1)
    client.call(Op.OPTION_SET, level=BUS_SOCKET, name=SO_BUS_FILTER, value=b"program")
    client.call(Op.SHUTDOWN, how=socket.SHUT_WR)
    matches = sorted(map(repr, world.switch.matches.values()))
    world.restart()
    assert sorted(map(repr, world.switch.matches.values())) == matches
    for call in (
        ("own", 2, b"1.1"),
        ("set_master", 1, 1),
        ("set_ident", 2, True),
        ("set_filter", 2, b"program"),
        ("set_silent", 2),
        ("set_monitor", 2, True),
    ):
        assert call in world.switch.calls
    again = resumed(world, client)
    assert (again.welcome.resumed, again.welcome.epoch) == (True, 2)
    assert again.number == client.number
    packed = again.call(Op.OPTION_GET, level=BUS_SOCKET, name=SO_BUS_ADDRESSES)
    assert [BusAddress.unpack(one).address for one in packed] == [b"1.1", b"name", b"a"]
    assert resumed(world, master).call(Op.STATUS)["matches"] == 3
    assert world.core.get_timer() is None
    master_again = next(one for one in world.clients.values() if one.number == 1)
    other = world.attached()
    assert other.number == 3
    with pytest.raises(AddressInUse):
        master_again.control(b"@3", owned(b"1.1"))
    master_again.control(b"@3", owned(b"1.2"))


def test_d16_who_does_not_return_is_killed(world: World) -> None:
    """After the grace the others are told; before it the bus has its master still."""
    master = world.bound()
    member = world.joined(master, b"1.1")
    world.restart()
    again = resumed(world, member)
    world.pass_time(GRACE_S / 2)
    with pytest.raises(AddressInUse):
        world.connect(1001).bind()
    assert again.take() == []
    world.pass_time(GRACE_S / 2)
    assert events(again.take()) == [Event.MASTER_LOST]
    late = resumed(world, master)
    assert not late.welcome.resumed


def test_ended_processes_are_killed_at_once(world: World) -> None:
    """Who died while the agent was down is told of as soon as it is back."""
    master = world.bound()
    gone = world.joined(master, b"1.1", 1002)
    world.restart(lambda who: who.uid != 1002)
    again = resumed(world, master)
    (notice,) = again.take()
    assert (notice.event, notice.subject) == (Event.KILLED, (b"1.1",))
    assert not resumed(world, gone).welcome.resumed


@pytest.mark.parametrize("changed", [{"uid": 2000}, {"pid": 8}, {"start_ticks": 100}])
def test_case10_token_alone_resumes_nothing(world: World, changed: dict[str, int]) -> None:
    """Another user, another process and a pid that is used again inherit nothing."""
    master = world.bound()
    world.restart()
    thief = resumed(world, master, **changed)
    assert not thief.welcome.resumed
    assert thief.welcome.token != master.welcome.token
    assert resumed(world, master).welcome.resumed


def test_case10_unknown_start_time_resumes_nothing(world: World) -> None:
    """A process that cannot be recognized begins anew."""
    client = world.come(start_ticks=0)
    client.say(Hello())
    world.restart()
    assert not resumed(world, client).welcome.resumed


def test_token_of_a_connected_endpoint_resumes_nothing(world: World) -> None:
    """Two connections never share an endpoint."""
    client = world.connect()
    assert not resumed(world, client).welcome.resumed
    world.restart()
    assert resumed(world, client).welcome.resumed
    assert not resumed(world, client).welcome.resumed


def test_d16_going_down_is_told_and_keeps_what_is(world: World) -> None:
    """Clients are told, and the journal still knows them."""
    master = world.bound()
    silent = world.come()
    world.core.stop()
    world.settle()
    assert master.closed is silent.closed is CloseCode.GOING_DOWN
    world.restart()
    assert resumed(world, master).welcome.resumed


@pytest.mark.parametrize(
    "entry",
    [
        Put(Kind.ENDPOINT, 1, b"", b"garbage"),
        Put(Kind.ENDPOINT, 1, b"", codec.encode([])),
        Put(Kind.ENDPOINT, 1, b"", codec.encode([bytes(16), 1, 1, 1, 1, 9, 0, False, False, None])),
        Put(Kind.ENDPOINT, 9, b"", codec.encode([bytes(16), 1, 1, 1, 1, 0, 0, False, False, None])),
        Put(Kind.ENDPOINT, 1, b"", codec.encode([bytes(16), 1, 1, 1, 1, 0, 64, False, False, b""])),
        Put(Kind.ADDRESS, 5, b"1.1", codec.encode([1])),
        Put(Kind.MATCH, 5, b"1", codec.encode([b"", None, 1, 0])),
        Put(Kind.BUS, 1, b"", codec.encode([PATH, 512, 0, bytes(16), 1, MASTER, 0])),
        Put(Kind.BUS, 1, b"", codec.encode([PATH, 512, 7, bytes(16), 1, MASTER, 0])),
    ],
)
def test_entries_that_make_no_sense_are_one_error(world: World, entry: Put) -> None:
    """A journal that an agent did not write is refused as a whole."""
    with pytest.raises(RemoteProtocolError):
        world.start([Put(Kind.AGENT, 0, b"", codec.encode([5, 1])), entry])


def test_unknown_items_do_not_pass_as_commands(world: World) -> None:
    """Descriptions of messages are no commands."""
    master = world.bound()
    with pytest.raises(InvalidArgument, match="no command"):
        master.control(MASTER, SourceAddr(BusAddress(PATH, MASTER)))
