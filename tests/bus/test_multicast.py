"""Messages to whom they may concern: bits, terms, and who may say and hear what."""

from __future__ import annotations

import errno
import random
import select
from typing import TYPE_CHECKING

import pytest

import afbus
from afbus import Terms
from afbus.proto.terms import matches

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import NodeProcess, Scene

pytestmark = pytest.mark.cluster

EVERYTHING = bytes(64)


def bits(*numbers: int, width: int = 512) -> bytes:
    """An address with these bits: bit b is byte b//8, bit b%8."""
    value = bytearray(width // 8)
    for number in numbers:
        value[number // 8] |= 1 << number % 8
    return bytes(value)


def test_r3_r14_r16_rule_of_the_mail(scene: Scene) -> None:
    """A receiver gets a message exactly if (sent & granted) == granted."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    draw = random.Random(16)
    masks = [bits(*draw.sample(range(512), draw.randint(0, 3))) for _ in range(20)]
    receivers = [
        scene.join(f"1.{number}", items=(scene.hears(mask),))
        for number, mask in enumerate(masks, 2)
    ]
    for _ in range(60):
        chosen = draw.sample(masks, draw.randint(0, 4))
        sent = bytearray(bits(*draw.sample(range(512), draw.randint(0, 9))))
        for mask in chosen:
            sent = bytearray(a | b for a, b in zip(sent, mask, strict=True))
        one.sendto(b"x", scene.multicast(bytes(sent)))
        value = int.from_bytes(sent, "little")
        for receiver, mask in zip(receivers, masks, strict=True):
            granted = int.from_bytes(mask, "little")
            assert scene.read_all(receiver) == [b"x"] * (value & granted == granted)


def test_r9_r14_multicast_address_as_bytes(scene: Scene) -> None:
    """The path's last byte is the mark, the bits stand in the components; both are received."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(bits(9)),))
    address = scene.multicast(bits(0, 9, 511))
    packed = address.pack()
    assert packed[4 + 106 : 4 + 108] == b"\0*"
    assert packed[112:176] == b"\x01\x02" + bytes(61) + b"\x80"
    one.sendto(b"x", address)
    body, found, _, source = scene.read(two)
    assert (body, source) == (b"x", scene.address("1.1"))
    # By the original of AF_BUS a receiver saw its own address as that of the sender.
    assert found[afbus.SCM_DST_ADDR] == packed
    one.sendto(b"y", f"{scene.path}*:{bits(9).hex()}")
    assert two.recv(9) == b"y"


def test_r15_r16_several_grants_are_alternatives(scene: Scene) -> None:
    """One match is enough; a message that fits several is received once."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(bits(1)), scene.hears(bits(2, 3))))
    third = scene.hears(Terms("topic"))
    scene.grant(two, third)
    for number, sent in enumerate([(1,), (2,), (2, 3), (1, 2, 3), ()]):
        one.sendto(b"%d" % number, scene.multicast(bits(*sent)))
    assert scene.read_all(two) == [b"0", b"2", b"3"]
    one.sendmsg([b"terms"], [scene.terms("topic.sub key=value")], 0, scene.multicast())
    assert scene.read_all(two) == [b"terms"]


def test_r22_others_are_not_woken(scene: Scene) -> None:
    """What a member has no match for costs it nothing: no record, no wake-up."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(bits(1)),))
    three = scene.join("1.3")
    before = [member.stats()["received"] for member in (two, three)]
    poller = select.poll()
    for member in (two, three):
        poller.register(member.fileno(), select.POLLIN)
    for _ in range(100):
        one.sendto(b"x", scene.multicast(bits(2)))
    assert poller.poll(0) == []
    assert [member.stats()["received"] for member in (two, three)] == before
    one.sendto(b"x", scene.multicast(bits(1)))
    assert poller.poll(20_000) == [(two.fileno(), select.POLLIN)]


def test_d21_multicast_without_receivers_is_accepted(scene: Scene) -> None:
    """Nobody has to hear a multicast."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    assert one.sendto(b"abc", scene.multicast(bits(1))) == 3
    assert one.sendmmsg([b"a", b"b"], scene.multicast(bits(1))) == 2


def test_d8_d7_other_widths_are_edom(
    node: NodeProcess, make_scene: Callable[..., Scene], scene: Scene
) -> None:
    """Addresses, matches and grants have the width of their bus, 512 by default."""
    for width in (512, 1024, 2048):
        here = make_scene(node, width=width)
        one = here.join("1.1", items=(here.may_send(bytes(width // 8)),))
        two = here.join("1.2", items=(here.hears(bits(width - 1, width=width)),))
        one.sendto(b"x", here.multicast(bits(width - 1, width=width)))
        assert two.recv(9) == b"x"
        for wrong in {8, 64, 128, 256} - {width // 8}:
            with pytest.raises(afbus.WidthMismatch) as caught:
                one.sendto(b"x", here.multicast(bytes(wrong)))
            assert caught.value.errno == errno.EDOM
            for item in (here.hears(bytes(wrong)), here.may_send(bytes(wrong))):
                with pytest.raises(afbus.WidthMismatch) as caught:
                    here.command(here.address("1.2"), item)
                assert caught.value.errno == errno.EDOM
        assert here.is_empty(two)


# terms


def test_d9_terms_select_as_the_model_says(scene: Scene) -> None:
    """Topics by prefix, pairs by presence, both exactly: against the naive rule."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    draw = random.Random(9)
    topics = ["", "a", "a.b", "a.b.c", "a.bc", "ab", "b", "b.a"]
    pairs = ["", "k=1", "k=2", "j=1", "k=1 j=1"]
    wanted = [Terms.parse(f"{topic} {pair}") for topic in topics for pair in pairs]
    receivers = [
        scene.join(f"1.{number}", items=(scene.hears(terms),))
        for number, terms in enumerate(wanted, 2)
    ]
    for number in range(60):
        text = f"{draw.choice(topics)} {draw.choice(pairs)}"
        one.sendmsg([b"%d" % number], [scene.terms(text)], 0, scene.multicast())
        message = Terms.parse(text)
        for receiver, terms in zip(receivers, wanted, strict=True):
            heard = scene.read_all(receiver)
            assert heard == [b"%d" % number] * matches(terms, message), (terms, message)


def test_d9_receiver_reads_the_terms(scene: Scene) -> None:
    """A message in terms carries them in clear, and its address has no bits."""
    one = scene.join("1.1", items=(scene.may_send(Terms("sensors")),))
    two = scene.join("1.2", items=(scene.hears(Terms("sensors.cpu")),))
    two.setsockopt(afbus.BUS_SOCKET, afbus.SO_BUS_DETAILS, 1)
    item = scene.terms("sensors.cpu.core0 host=a")
    one.sendmsg([b"42"], [item], 0, scene.multicast())
    body, found, _, _ = scene.read(two)
    assert body == b"42"
    assert found[afbus.SCM_TERMS] == item[2]
    assert found[afbus.SCM_DST_ADDR] == scene.multicast().pack()


def find_bits(scene: Scene, text: str) -> set[int]:
    """The bits of a message with these terms, found by listening for each alone."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2")
    terms = scene.terms(text)
    found = set()
    for number in range(512):
        scene.grant(two, scene.hears(bits(number)))
        one.sendmsg([b"x"], [terms], 0, scene.multicast())
        if not scene.is_empty(two):
            found.add(number)
            assert two.recv(9) == b"x"
        scene.revoke(two, scene.deaf_to(bits(number)))
    return found


def test_r4_d8_bits_of_terms_are_secret_of_each_bus(
    scene: Scene, make_scene: Callable[..., Scene], node: NodeProcess
) -> None:
    """A term sets 8 bits, hashed with a key of the bus: what they are elsewhere says nothing."""
    here, there = find_bits(scene, "topic"), find_bits(make_scene(node), "topic")
    assert len(here) in (7, 8)
    assert len(there) in (7, 8)
    assert here != there


# rights


def test_r21_d9_d7_sending_needs_a_grant(scene: Scene) -> None:
    """Without one a multicast is EPERM, whether or not anybody would hear it."""
    one = scene.join("1.1")
    two = scene.join("1.2", items=(scene.hears(EVERYTHING),))
    for sender in (one, two, scene.master):
        for address, items in (
            (scene.multicast(bits(1)), []),
            (scene.multicast(EVERYTHING), []),
            (scene.multicast(), [scene.terms("topic")]),
            (scene.multicast(), [scene.terms("")]),
        ):
            with pytest.raises(PermissionError) as caught:
                sender.sendmsg([b"x"], items, 0, address)
            assert isinstance(caught.value, afbus.Denied)
            assert caught.value.errno == errno.EPERM
    with pytest.raises(afbus.Denied):
        one.sendmmsg([b"x"], scene.multicast(bits(1)))
    assert scene.is_empty(two)


def test_r21_d9_grant_covers_what_has_at_least_its_terms(scene: Scene) -> None:
    """Who may send a topic may send below it and with more pairs, and nothing else."""
    one = scene.join("1.1", items=(scene.may_send(Terms("a.b", ("k=1",))),))
    for text, may in (
        ("a.b k=1", True),
        ("a.b.c k=1 j=2", True),
        ("a.b", False),
        ("a k=1", False),
        ("a.bc k=1", False),
        ("a.b k=2", False),
        ("k=1", False),
        ("", False),
    ):
        if may:
            one.sendmsg([b"x"], [scene.terms(text)], 0, scene.multicast())
        else:
            with pytest.raises(afbus.Denied):
                one.sendmsg([b"x"], [scene.terms(text)], 0, scene.multicast())


def test_r21_d9_grant_covers_what_has_at_least_its_bits(scene: Scene) -> None:
    """Raw grants are compared by the same rule as raw matches."""
    one = scene.join("1.1", items=(scene.may_send(bits(1, 2)), scene.may_send(bits(7))))
    for sent, may in (
        ((1, 2), True),
        ((1, 2, 3), True),
        ((7, 500), True),
        ((1,), False),
        ((), False),
        ((3, 500), False),
    ):
        if may:
            one.sendto(b"x", scene.multicast(bits(*sent)))
        else:
            with pytest.raises(afbus.Denied):
                one.sendto(b"x", scene.multicast(bits(*sent)))


def test_d9_case45_address_that_matches_everything_is_privileged(scene: Scene) -> None:
    """More than half of all bits need the right to send anything; all ones are one such case."""
    one = scene.join("1.1", items=(scene.may_send(bits(1)),))
    two = scene.join("1.2", items=(scene.hears(bits(100, 200)),))
    for crowded in (b"\xff" * 64, bits(*range(257))):
        with pytest.raises(afbus.Denied):
            one.sendto(b"spam", scene.multicast(crowded))
    one.sendto(b"half", scene.multicast(bits(*range(256))))
    assert scene.read_all(two) == [b"half"]
    scene.grant(one, scene.may_send(EVERYTHING))
    one.sendto(b"allowed", scene.multicast(b"\xff" * 64))
    assert scene.read_all(two) == [b"allowed"]


def test_r15_d9_hearing_needs_a_grant(scene: Scene) -> None:
    """Nobody hears anything by himself; the mask without bits is the master's to grant."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2")
    one.sendto(b"before", scene.multicast(b"\xff" * 64))
    assert scene.is_empty(two)
    with pytest.raises(afbus.Denied):
        two.sendmsg([b"x"], [scene.hears(EVERYTHING)], 0, scene.address("1.2"))
    scene.grant(two, scene.hears(EVERYTHING))
    one.sendto(b"bits", scene.multicast(bits(1)))
    one.sendto(b"none", scene.multicast(EVERYTHING))
    one.sendmsg([b"terms"], [scene.terms("topic")], 0, scene.multicast())
    assert scene.read_all(two) == [b"bits", b"none", b"terms"]


def test_d9_subscription_without_terms_hears_everything(scene: Scene) -> None:
    """In terms the same right is a match that requires nothing."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(Terms()),))
    one.sendto(b"bits", scene.multicast(bits(1)))
    one.sendmsg([b"terms"], [scene.terms("topic")], 0, scene.multicast())
    assert scene.read_all(two) == [b"bits", b"terms"]


def test_d10_d9_policy_comes_before_the_bloom_filter(scene: Scene) -> None:
    """A refused multicast reaches nobody, however well it matches: not even one who would not."""
    one = scene.join("1.1", items=(scene.may_send(bits(1)),))
    two = scene.join("1.2", items=(scene.hears(bits(2)),))
    seen = two.stats()
    with pytest.raises(afbus.Denied):
        one.sendto(b"x", scene.multicast(bits(2)))
    assert two.stats() == seen
    assert one.stats()["refused"] == 1


def test_d10_exact_terms_come_after_the_bloom_filter(scene: Scene) -> None:
    """Where all bits of a match are there but its term is not, a message in terms is not heard."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    two = scene.join("1.2", items=(scene.hears(Terms("wanted")),))
    # 60 terms set most of the 512 bits, so that some of these messages have all bits of "wanted".
    for number in range(2000):
        text = " ".join(f"k{pair}={number}" for pair in range(60))
        one.sendmsg([b"x"], [scene.terms(text)], 0, scene.multicast())
    assert scene.is_empty(two)
    # The same bits as raw bits are all that there is to go by.
    one.sendto(b"raw", scene.multicast(b"\xff" * 64))
    assert scene.read_all(two) == [b"raw"]


def test_r15_d9_malformed_terms(scene: Scene) -> None:
    """Terms that nobody could mean are EINVAL, at the sender."""
    one = scene.join("1.1", items=(scene.may_send(EVERYTHING),))
    for packed in (b"a..b", b"\0novalue", b"\0b=1\0a=1", b"a=b", b"\xff", b"x" * 20000):
        item = (afbus.BUS_SOCKET, afbus.SCM_TERMS, packed)
        with pytest.raises(afbus.InvalidArgument):
            one.sendmsg([b"x"], [item], 0, scene.multicast())
    with pytest.raises(afbus.BadDestination):
        one.sendto(b"x", scene.multicast())
    with pytest.raises(afbus.InvalidArgument):
        one.sendmsg([b"x"], [scene.terms("a")], 0, scene.multicast(bits(1)))
