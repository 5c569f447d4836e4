"""Commands of the master: who may give them, when they work, and what they leave when refused."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import Event, GrantFlags, Overflow, Terms

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import Item, NodeProcess, Scene

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)


def commands(scene: Scene) -> list[Item]:
    """One of each kind of command."""
    return [
        scene.owned("evil"),
        scene.disowned("1.2"),
        scene.hears(EVERYTHING),
        scene.deaf_to(Terms("heard")),
        scene.may_send(EVERYTHING),
        scene.may_not_send(Terms("said")),
        scene.flags(GrantFlags.MONITOR),
    ]


@pytest.mark.parametrize("number", range(7))
def test_r1_d5_d7_commands_of_others_are_eperm(scene: Scene, number: int) -> None:
    """Nobody but the master can give or take anything: not to others, not to himself."""
    one = scene.join("1.1")
    two = scene.join("1.2", items=(scene.hears(Terms("heard")), scene.may_send(Terms("said"))))
    unjoined = scene.socket()
    unjoined.attach(scene.path)
    item = commands(scene)[number]
    before = [scene.master.listing(what, scene.path) for what in ("endpoints", "matches")]
    for sender in (one, unjoined):
        for target in ("1.1", "1.2", "master"):
            with pytest.raises(PermissionError) as caught:
                sender.sendmsg([b"forged"], [item], 0, scene.address(target))
            assert isinstance(caught.value, afbus.Denied)
            assert caught.value.errno == errno.EPERM
    assert scene.is_empty(one)
    assert scene.is_empty(two)
    assert scene.is_empty(scene.master)
    after = [scene.master.listing(what, scene.path) for what in ("endpoints", "matches")]
    assert before == after


def test_d5_commands_of_another_bus_master_are_eperm(
    scene: Scene, make_scene: Callable[..., Scene], node: NodeProcess
) -> None:
    """A master rules his own bus only: grants for another are EPERM, and nothing of them works."""
    other = make_scene(node)
    mine, other_one = scene.join("1.1"), other.join("1.1")
    for item in commands(other)[:6]:
        # The foreign path in the item.
        with pytest.raises(afbus.Denied) as caught:
            scene.command(scene.address("1.1"), item)
        assert caught.value.errno == errno.EPERM
    for item in commands(other):
        # The foreign address as destination.
        with pytest.raises(afbus.NoSuchEndpoint):
            scene.command(other.address("1.1"), item)
    assert scene.is_empty(mine)
    assert scene.is_empty(other_one)
    assert other_one.addresses() == [other.address("1.1")]


def test_d5_all_or_none(scene: Scene) -> None:
    """If one item of a message is wrong, none works and nothing is delivered."""
    one = scene.join("1.1")
    scene.join("1.2", "taken")
    for wrong, number in (
        (scene.owned("taken"), errno.EADDRINUSE),
        (scene.disowned("not mine"), errno.EADDRNOTAVAIL),
        (scene.hears(bytes(128)), errno.EDOM),
        (scene.deaf_to(Terms("never")), errno.EINVAL),
        (scene.may_not_send(Terms("never")), errno.EINVAL),
        (scene.flags(1 << 40), errno.EINVAL),
    ):
        good = [scene.owned("new"), scene.hears(EVERYTHING), scene.may_send(EVERYTHING)]
        with pytest.raises(OSError, match=r".") as caught:
            scene.command(scene.address("1.1"), *good, wrong)
        assert caught.value.errno == number
        with pytest.raises(OSError, match=r"."):
            scene.command(scene.address("1.1"), wrong, *good)
    assert scene.is_empty(one)
    assert one.addresses() == [scene.address("1.1")]
    assert one.stats()["matches"] == 0
    with pytest.raises(afbus.Denied):
        one.sendto(b"x", scene.multicast(EVERYTHING))


def test_d5_items_of_one_message_build_on_each_other(scene: Scene) -> None:
    """They are judged in their order: a name that is taken away can be given in one breath."""
    one = scene.join("1.1", "name")
    notices = scene.revoke(one, scene.disowned("name"), scene.owned("name"), scene.owned("more"))
    assert [notice.subject for notice in notices] == [(b"name",)]
    assert [address.address for address in one.addresses()] == [b"1.1", b"name", b"more"]
    with pytest.raises(afbus.AddressInUse):
        scene.command(
            scene.address("1.1"), scene.owned("1.5"), scene.disowned("1.5"), scene.owned("1.5")
        )


def test_r12_r15_d5_grants_work_before_they_can_be_read(scene: Scene) -> None:
    """At once after reading the message, the endpoint sends and hears what it was granted."""
    one = scene.join("1.1")
    rounds = [Terms("topic", (f"n={number}",)) for number in range(100)]

    def use() -> None:
        for terms in rounds:
            one.recv(9)
            item = (afbus.BUS_SOCKET, afbus.SCM_TERMS, terms.pack())
            one.sendmsg([b"to myself"], [item], 0, scene.multicast())
            heard.append(one.recv(99))

    heard: list[bytes] = []
    thread = threading.Thread(target=use)
    thread.start()
    for terms in rounds:
        scene.command(scene.address("1.1"), scene.hears(terms), scene.may_send(terms))
    thread.join()
    # A command may come before the member's own multicast.
    assert set(heard) <= {b"to myself", b"granted"}
    assert len(heard) == len(rounds)


@pytest.mark.parametrize("what", [Terms("topic"), b"\x01" + bytes(63)], ids=["terms", "bits"])
def test_r15_d5_d15_revoked_match(scene: Scene, what: Terms | bytes) -> None:
    """What was sent before is still read, then the notice, and then nothing of it any more."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(what),))

    def publish(body: bytes) -> None:
        if isinstance(what, Terms):
            one.sendmsg([body], [scene.terms("topic.x")], 0, scene.multicast())
        else:
            one.sendto(body, scene.multicast(b"\x03" + bytes(63)))

    publish(b"before")
    scene.command(scene.address("1.2"), scene.deaf_to(what))
    publish(b"after")
    assert two.recv(99) == b"before"
    notice = scene.read_notice(two)
    assert (notice.event, notice.reason, set(notice.detail)) == (Event.REVOKED, "match", {"match"})
    body, found, _, _ = scene.read(two)
    assert (body, set(found)) == (b"granted", {afbus.SCM_REVOKE_MATCH})
    assert scene.is_empty(two)
    # It can be granted again.
    scene.grant(two, scene.hears(what))
    publish(b"again")
    assert scene.read_all(two) == [b"again"]


@pytest.mark.parametrize("what", [Terms("topic"), b"\x01" + bytes(63)], ids=["terms", "bits"])
def test_r21_d5_d15_revoked_right_to_send(scene: Scene, what: Terms | bytes) -> None:
    """As soon as the master's call returns the next multicast is EPERM."""
    one = scene.join("1.1", items=(scene.may_send(what),))
    two = scene.join("1.2", items=(scene.hears(what),))

    def publish() -> None:
        if isinstance(what, Terms):
            one.sendmsg([b"x"], [scene.terms("topic.x")], 0, scene.multicast())
        else:
            one.sendto(b"x", scene.multicast(b"\x03" + bytes(63)))

    publish()
    scene.command(scene.address("1.1"), scene.may_not_send(what))
    with pytest.raises(afbus.Denied):
        publish()
    notice = scene.read_notice(one)
    assert (notice.event, notice.reason, set(notice.detail)) == (Event.REVOKED, "send", {"send"})
    assert scene.read_all(two) == [b"x"]


def test_d5_d3_revoked_address(scene: Scene) -> None:
    """Who lost an address is not reached by it and cannot send from it; a name is free again."""
    one, two = scene.join("1.1"), scene.join("1.2", "name")
    (notice,) = scene.revoke(two, scene.disowned("name"))
    assert (notice.event, notice.subject, notice.reason) == (Event.REVOKED, (b"name",), "address")
    with pytest.raises(afbus.NotOwned):
        two.sendmsg([b"x"], [scene.source("name")], 0, scene.address("1.1"))
    scene.grant(one, scene.owned("name"))
    two.sendto(b"x", scene.address("name"))
    assert one.recv(9) == b"x"


def test_d5_d15_who_lost_every_address_is_unjoined(scene: Scene) -> None:
    """It can talk to the master only, by its provisional address, and can join again."""
    scene.master.setsockopt(afbus.BUS_SOCKET, afbus.SO_BUS_DETAILS, 1)
    one, two = scene.join("1.1"), scene.join("1.2")
    scene.revoke(one, scene.disowned("1.1"))
    assert scene.await_notice(Event.LEFT).subject == (b"1.1",)
    assert one.getsockname().is_provisional
    assert not one.state()["is_member"]
    with pytest.raises(OSError, match=r".") as caught:
        one.sendto(b"x", scene.address("1.2"))
    assert caught.value.errno == errno.EHOSTUNREACH
    with pytest.raises(afbus.NoSuchEndpoint):
        two.sendto(b"x", scene.address("1.1"))
    one.sendto(b"AUTH", scene.master_address)
    scene.let_in("1.3")
    one.sendto(b"x", scene.address("1.2"))
    assert two.recvfrom(9) == (b"x", scene.address("1.3"))


@pytest.mark.parametrize("name", ["free", "1.77", "1.2", "taken"])
def test_d3_d5_address_that_cannot_be_revoked(scene: Scene, name: str) -> None:
    """Only what the endpoint itself owns can be taken from it: EADDRNOTAVAIL."""
    scene.join("1.1")
    scene.join("1.2", "taken")
    with pytest.raises(afbus.NotOwned) as caught:
        scene.command(scene.address("1.1"), scene.disowned(name))
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_d3_unique_address_is_never_given_twice(scene: Scene) -> None:
    """Not to others, not to the same, not after its owner left or lost it, whoever is master."""
    one, two = scene.join("1.1", "1.5"), scene.join("1.2")
    scene.revoke(one, scene.disowned("1.5"))
    two.close()
    assert scene.await_notice(Event.LEFT).subject == (b"1.2",)
    scene.master.close()
    with scene.socket() as again:
        again.bind(scene.master_address)
        for address in ("1.5", "1.2"):
            with pytest.raises(afbus.AddressInUse) as caught:
                again.sendmsg([b"x"], [scene.owned(address)], 0, scene.address("1.1"))
            assert caught.value.errno == errno.EADDRINUSE
        again.sendmsg([b"x"], [scene.owned("1.6")], 0, scene.address("1.1"))


def test_d3_names_are_exclusive_and_may_move(scene: Scene) -> None:
    """A name has one owner, and is free when that one loses it or leaves."""
    one, two = scene.join("1.1", "name"), scene.join("1.2")
    with pytest.raises(afbus.AddressInUse) as caught:
        scene.command(scene.address("1.2"), scene.owned("name"))
    assert caught.value.errno == errno.EADDRINUSE
    scene.revoke(one, scene.disowned("name"))
    scene.grant(two, scene.owned("name"))
    with pytest.raises(afbus.AddressInUse):
        scene.command(scene.address("1.1"), scene.owned("name"))
    two.close()
    assert scene.await_notice(Event.LEFT).subject == (b"1.2", b"name")
    scene.grant(one, scene.owned("name"))
    one.sendto(b"x", scene.address("name"))
    assert one.recv(9) == b"x"


def test_d6_r3_nobody_owns_what_is_the_agents(scene: Scene) -> None:
    """Provisional and multicast addresses cannot be given to anybody."""
    scene.join("1.1")
    for address, number in (
        (scene.address("@1"), errno.EADDRNOTAVAIL),
        (scene.address("@"), errno.EADDRNOTAVAIL),
        (scene.multicast(EVERYTHING), errno.EINVAL),
    ):
        item = (afbus.BUS_SOCKET, afbus.SCM_OWNED_ADDR, address.pack())
        with pytest.raises(OSError, match=r".") as caught:
            scene.command(scene.address("1.1"), item)
        assert caught.value.errno == number


def test_r11_d3_agent_chooses_the_address(scene: Scene) -> None:
    """An address without components becomes a unique one, which the new member reads and has."""
    made = []
    for _ in range(2):
        one = scene.socket()
        one.sendto(b"AUTH", scene.master_address)
        item = (afbus.BUS_SOCKET, afbus.SCM_OWNED_ADDR, scene.kernel.pack())
        scene.command(scene.next_request(), item)
        body, items, _, source = one.recvmsg(99, 8192)
        assert (body, source) == (b"granted", scene.master_address)
        ((_, _, data),) = (one for one in items if one[1] == afbus.SCM_OWNED_ADDR)
        address = afbus.BusAddress.unpack(data)
        assert address.is_unique
        assert one.addresses() == [address]
        one.sendto(b"to itself", address)
        assert one.recvfrom(99) == (b"to itself", address)
        made.append(address)
    assert made[0] != made[1]


def test_d5_masters_own_address_stays(scene: Scene) -> None:
    """A master gives up by closing; other addresses he can give to himself and take back."""
    with pytest.raises(afbus.InvalidArgument):
        scene.command(scene.master_address, scene.disowned("master"))
    scene.command(scene.master_address, scene.owned("also"), scene.hears(EVERYTHING))
    assert scene.master.recv(9) == b"granted"
    assert [one.address for one in scene.master.addresses()] == [b"master", b"also"]


def test_d5_granting_twice_changes_nothing(scene: Scene) -> None:
    """What is granted already is right, and is not counted twice."""
    one = scene.join("1.1")
    for _ in range(3):
        scene.grant(
            one,
            scene.owned("1.1"),
            scene.hears(Terms("a")),
            scene.may_send(Terms("a")),
            scene.flags(GrantFlags.NOTICES),
        )
    assert one.stats()["matches"] == 1
    scene.revoke(one, scene.deaf_to(Terms("a")), scene.may_not_send(Terms("a")))
    with pytest.raises(afbus.InvalidArgument):
        scene.command(scene.address("1.1"), scene.deaf_to(Terms("a")))


def test_d5_d12_second_grant_of_a_match_replaces_its_overflow(scene: Scene) -> None:
    """The last word on what happens at a full receiver counts."""
    scene.join("1.1", items=(scene.hears(Terms("a"), Overflow.BLOCK, 1000),))
    scene.command(scene.address("1.1"), scene.hears(Terms("a"), Overflow.CONFLATE))
    rows = scene.master.listing("matches", scene.path)
    assert [(row["terms"], row["overflow"]) for row in rows] == [("a", "conflate")]


def test_d15_d19_flags_are_set_as_a_whole(scene: Scene) -> None:
    """SCM_GRANT says all that an endpoint may; what it no longer may is told."""
    one = scene.join("1.1", items=(scene.flags(3),))
    assert sorted(one.state()["grants"]) == ["MONITOR", "NOTICES"]
    scene.command(scene.address("1.1"), scene.flags(GrantFlags.MONITOR))
    # A monitor sees what it is sent itself, too.
    events = []
    while not scene.is_empty(one):
        body, source = one.recvfrom(999)
        if source.is_kernel:
            events.append(afbus.Notice.decode(body))
    assert [(notice.event, notice.detail) for notice in events] == [
        (Event.REVOKED, {"grant": "NOTICES"})
    ]
    assert one.state()["grants"] == ["MONITOR"]


def test_d5_commands_to_who_is_not_there(scene: Scene) -> None:
    """A command to nobody is EHOSTUNREACH, even where a message would go to the master."""
    one = scene.join("1.1")
    one.close()
    for address in ("1.1", "1.99", "free", "@999999"):
        with pytest.raises(afbus.NoSuchEndpoint) as caught:
            scene.command(scene.address(address), scene.owned("x"))
        assert caught.value.errno == errno.EHOSTUNREACH
    with pytest.raises(afbus.BadDestination):
        scene.command(scene.kernel, scene.owned("x"))


def test_d5_d6_source_of_a_command(scene: Scene) -> None:
    """A command comes from an address of the master's, which he may choose."""
    scene.command(scene.master_address, scene.owned("also"))
    assert scene.master.recv(9) == b"granted"
    one = scene.join("1.1")
    scene.master.sendmsg([b"x"], [scene.owned("n"), scene.source("also")], 0, scene.address("1.1"))
    assert one.recvfrom(9) == (b"x", scene.address("also"))
    with pytest.raises(afbus.NotOwned):
        scene.master.sendmsg(
            [b"x"], [scene.owned("m"), scene.source("1.1")], 0, scene.address("1.1")
        )
    assert scene.address("m") not in one.addresses()


def test_d5_d11_commands_keep_their_place_among_messages(scene: Scene) -> None:
    """Messages and commands of the master arrive in the order in which he sent them."""
    one = scene.join("1.1")
    for number in range(100):
        if number % 3:
            scene.master.sendto(b"%d" % number, scene.address("1.1"))
        else:
            scene.master.sendmsg(
                [b"%d" % number], [scene.owned(f"n{number}")], 0, scene.address("1.1")
            )
    assert [int(body) for body in scene.read_all(one)] == list(range(100))


def test_d5_commands_wait_for_a_full_receiver(scene: Scene) -> None:
    """A command is never refused for want of room: it is queued, and comes in its order."""
    one = scene.join("1.1", rx_bytes=4096)
    sent = scene.fill(scene.master, scene.address("1.1"))
    for number in range(20):
        scene.master.sendmsg(
            [b"%500d" % (sent + number)], [scene.owned(f"n{number}")], 0, scene.address("1.1")
        )
    assert [int(one.recv(999)) for _ in range(sent + 20)] == list(range(sent + 20))
    assert len(one.addresses()) == 21
