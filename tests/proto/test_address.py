"""Addresses: the structure of the mail, its limits, and the text form."""

from __future__ import annotations

import pickle
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto.address import AF_BUS, SOCKADDR_BYTES, AddressKind, BusAddress
from afbus.proto.errors import InvalidArgument, NameTooLong, RemoteProtocolError
from afbus.proto.limits import ADDRESS_BYTES, BUS_ADDR_COMP_MAX, BUS_PATH_MAX, PATH_BYTES

if TYPE_CHECKING:
    from pathlib import Path

PATHS = st.binary(min_size=1, max_size=PATH_BYTES).filter(lambda path: 0 not in path)
SPECIAL = st.text("abc.:*%0x@ /é\u3000\n", min_size=1, max_size=30).map(str.encode)
NORMAL = (st.binary(min_size=1, max_size=ADDRESS_BYTES) | SPECIAL).filter(
    lambda address: address.strip(b"\0") != b""
)
BITS = st.integers(0, BUS_ADDR_COMP_MAX).flatmap(
    lambda count: st.binary(min_size=count * 8, max_size=count * 8)
)
ADDRESSES = st.one_of(
    st.builds(BusAddress, PATHS | SPECIAL, NORMAL),
    st.builds(BusAddress.multicast, PATHS, BITS),
    st.builds(BusAddress.kernel, PATHS),
)

MAIL = r"""
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/param.h>
#include <sys/socket.h>
#define AF_BUS %(family)d
#define BUS_PATH_MAX 108
#define BUS_ADDR_COMP_MAX 32
#define ROUND_UP(x, a) (((x) + (a) - 1) / (a) * (a))
struct sockaddr_bus {
    sa_family_t sbus_family;
    unsigned short sbus_addr_ncomp;
    char sbus_path[BUS_PATH_MAX];
    uint64_t sbus_addr[BUS_ADDR_COMP_MAX];
};
#define BUS_ADDR_MAX (BUS_ADDR_COMP_MAX * sizeof(uint64_t))
static void show(const void *data, size_t size) {
    const unsigned char *bytes = data;
    for (size_t i = 0; i < size; i++) printf("%%02x", bytes[i]);
    printf("\n");
}
static void text(const char *address) {
    struct sockaddr_bus addr = { .sbus_family = AF_BUS };
    strncpy(addr.sbus_path, "/tmp/test", BUS_PATH_MAX - 2);
    memcpy(addr.sbus_addr, address, MIN(strlen(address) + 1, BUS_ADDR_MAX));
    addr.sbus_addr_ncomp = MIN(ROUND_UP(strlen(address) + 1, 8) / 8, BUS_ADDR_COMP_MAX);
    show(&addr, sizeof addr);
}
int main(void) {
    printf("%%zu %%zu %%zu %%zu %%zu\n", sizeof(struct sockaddr_bus),
           offsetof(struct sockaddr_bus, sbus_family),
           offsetof(struct sockaddr_bus, sbus_addr_ncomp),
           offsetof(struct sockaddr_bus, sbus_path), offsetof(struct sockaddr_bus, sbus_addr));
    text("1.1"); text("12345678"); text("org.freedesktop.DBus");
    struct sockaddr_bus addr = { .sbus_family = AF_BUS, .sbus_addr_ncomp = 8 };
    strncpy(addr.sbus_path, "/tmp/test", BUS_PATH_MAX - 2);
    addr.sbus_path[BUS_PATH_MAX - 1] = '*';
    for (int i = 0; i < 64; i++) ((unsigned char *)addr.sbus_addr)[i] = i;
    show(&addr, sizeof addr);
    struct sockaddr_bus kernel = { .sbus_family = AF_BUS };
    strncpy(kernel.sbus_path, "/tmp/test", BUS_PATH_MAX - 2);
    show(&kernel, sizeof kernel);
}
"""


def test_r7_d1_bytes_and_offsets_are_those_of_the_mail_compiled(tmp_path: Path) -> None:
    """The mail's own C code and `pack` make the same bytes."""
    source = tmp_path / "mail.c"
    source.write_text(MAIL % {"family": AF_BUS})
    program = tmp_path / "mail"
    subprocess.run(["cc", "-std=gnu11", "-o", program, source], check=True, timeout=60)
    printed = subprocess.run([program], check=True, capture_output=True, text=True, timeout=10)
    offsets, *dumps = printed.stdout.splitlines()
    assert offsets == f"{SOCKADDR_BYTES} 0 2 4 112"
    addresses = [
        BusAddress("/tmp/test", "1.1"),
        BusAddress("/tmp/test", "12345678"),
        BusAddress("/tmp/test", "org.freedesktop.DBus"),
        BusAddress.multicast("/tmp/test", bytes(range(64))),
        BusAddress.kernel("/tmp/test"),
    ]
    assert [address.pack().hex() for address in addresses] == dumps
    assert [BusAddress.unpack(bytes.fromhex(dump)) for dump in dumps] == addresses


@pytest.mark.parametrize(
    ("text", "ncomp"),
    [("1.1", 1), ("1234567", 1), ("12345678", 2), ("org.freedesktop.DBus", 3), ("x" * 256, 32)],
)
def test_r8_the_count_includes_the_nul_and_is_rounded_up(text: str, ncomp: int) -> None:
    """Text is NUL-terminated, but for one that fills all components."""
    assert BusAddress("/b", text).ncomp == ncomp


def test_r3_three_kinds() -> None:
    """A star at the end of the path, no components, or neither."""
    assert BusAddress("/b", "a").kind is AddressKind.NORMAL
    assert BusAddress.multicast("/b", bytes(8)).is_multicast
    assert BusAddress.kernel("/b").is_kernel
    assert BusAddress.kernel("/b").ncomp == 0
    assert BusAddress.multicast("/b", bytes(64)).ncomp == 8
    assert BusAddress.unpack(BusAddress.multicast("/b").pack()).is_multicast


def test_r9_the_star_is_the_last_byte_and_nul_stands_before_it() -> None:
    """Even with the longest path."""
    packed = BusAddress.multicast("p" * PATH_BYTES, bytes(8)).pack()
    path = packed[4 : 4 + BUS_PATH_MAX]
    assert path[-1:] == b"*"
    assert path[-2:-1] == b"\0"
    assert path[:-2] == b"p" * PATH_BYTES


def test_r9_a_path_that_ends_in_a_star_is_no_multicast() -> None:
    """Only byte 107 is the mark."""
    address = BusAddress("/b*", "a")
    assert BusAddress.unpack(address.pack()) == address
    assert address.format() == "/b%2A:a"


def test_d1_zeros_at_the_end_mean_nothing() -> None:
    """Components are zero padded."""
    short, long = BusAddress("/b", "1.1"), BusAddress("/b", b"1.1\0\0\0\0\0")
    assert short == long
    assert hash(short) == hash(long)
    more = bytearray(short.pack())
    more[2:4] = (3).to_bytes(2, "little")
    assert BusAddress.unpack(bytes(more)) == short


def test_d1_too_long_is_an_error_and_never_cut() -> None:
    """Path, address and bits alike."""
    with pytest.raises(NameTooLong):
        BusAddress("p" * 107, "a")
    with pytest.raises(NameTooLong):
        BusAddress("/b", "a" * 257)
    with pytest.raises(NameTooLong):
        BusAddress.multicast("/b", bytes(264))
    BusAddress("p" * 106, "a" * 256)
    BusAddress.multicast("/b", bytes(256))


@pytest.mark.parametrize("path", ["", "a\0b", b"\0", "\ud800"])
def test_d1_paths_that_are_none(path: str | bytes) -> None:
    """Empty, with NUL, or no text at all."""
    with pytest.raises(InvalidArgument):
        BusAddress(path, "a")


def test_d1_components_fit_the_kind() -> None:
    """No components are the kernel's, and only whole ones make bits."""
    with pytest.raises(InvalidArgument):
        BusAddress("/b", "")
    with pytest.raises(InvalidArgument):
        BusAddress("/b", b"\0\0")
    with pytest.raises(InvalidArgument):
        BusAddress("/b", "a", AddressKind.KERNEL)
    with pytest.raises(InvalidArgument):
        BusAddress.multicast("/b", b"abc")


def test_d3_unique_and_provisional_by_their_first_byte() -> None:
    """A digit, or `@`."""
    assert BusAddress("/b", "1.42").is_unique
    assert not BusAddress("/b", "a1").is_unique
    assert not BusAddress("/b", "\u0661").is_unique
    assert not BusAddress.multicast("/b", b"1" * 8).is_unique
    assert BusAddress("/b", "@7").is_provisional
    assert not BusAddress("/b", "1.42").is_provisional


@given(ADDRESSES)
def test_d1_pack_and_unpack(address: BusAddress) -> None:
    """The structure has one reading."""
    packed = address.pack()
    assert len(packed) == SOCKADDR_BYTES
    assert BusAddress.unpack(packed) == address
    assert BusAddress.unpack(packed).pack() == packed


@given(ADDRESSES)
def test_parse_and_format(address: BusAddress) -> None:
    """The text form stands for the address, and can be shown on one line."""
    text = address.format()
    assert BusAddress.parse(text) == address
    assert text.isprintable()
    assert " " not in text
    assert pickle.loads(pickle.dumps(address)) == address  # noqa: S301 (our own bytes)


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (BusAddress("/tmp/test", "org.example.bus"), "/tmp/test:org.example.bus"),
        (BusAddress("/tmp/a:b", ":1.5"), "/tmp/a%3Ab:%3A1.5"),
        (BusAddress("/b", b"\x01\xff"), "/b:0x01ff"),
        (BusAddress("/b", "0xyz"), "/b:%30xyz"),
        (BusAddress("/b", "caf\u00e9"), "/b:caf\u00e9"),
        (BusAddress.multicast("/b", b"\x01" + bytes(7)), "/b*:0100000000000000"),
        (BusAddress.kernel("/b"), "/b:"),
    ],
)
def test_text_forms(address: BusAddress, text: str) -> None:
    """The forms that people see."""
    assert str(address) == text
    assert repr(address) == f"<BusAddress {text}>"
    assert BusAddress.parse(text) == address


@pytest.mark.parametrize(
    "text", ["", "/b", "/b:a:b", "/b*c:00", "/b:a*", "/b*:0", "/b*:zz", "/b:0x", "/b:0x1", "/b:%4"]
)
def test_texts_that_are_no_addresses(text: str) -> None:
    """They are refused with EINVAL."""
    with pytest.raises(InvalidArgument):
        BusAddress.parse(text)


@given(
    st.binary(max_size=400)
    | st.tuples(ADDRESSES, st.integers(0, SOCKADDR_BYTES - 1), st.integers(0, 255)).map(
        lambda t: t[0].pack()[: t[1]] + bytes([t[2]]) + t[0].pack()[t[1] + 1 :]
    )
)
def test_unpack_raises_one_type(data: bytes) -> None:
    """Whatever the bytes are; and what it accepts, `pack` makes again but for padding."""
    try:
        address = BusAddress.unpack(data)
    except RemoteProtocolError:
        return
    assert BusAddress.unpack(address.pack()) == address


def test_r7_structures_with_two_readings_are_refused() -> None:
    """Wrong family, too many components, or bytes where nobody looks."""
    good = BusAddress("/b", "abc").pack()
    for place, byte in ((0, 1), (2, 33), (20, 65), (110, 65), (111, 65), (150, 1)):
        bad = bytearray(good)
        bad[place] = byte
        with pytest.raises(RemoteProtocolError):
            BusAddress.unpack(bytes(bad))
    with pytest.raises(RemoteProtocolError):
        BusAddress.unpack(good[:-1])
    with pytest.raises(RemoteProtocolError):
        BusAddress.unpack(good[:2] + b"\1\0" + good[4:112] + bytes(256))
