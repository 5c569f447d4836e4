"""Addresses of the bus: `struct sockaddr_bus` of the mail, and its text form.

    offset  0   u16   sbus_family      AF_BUS, native byte order
            2   u16   sbus_addr_ncomp  number of components that count
            4   char  sbus_path[108]   NUL-terminated; byte 107 is `*` in a multicast address (R9)
          112   u64   sbus_addr[32]    the components: plain bytes, never swapped (R8, D1)

There are three kinds (R3). A *normal* address is 1 to 256 bytes, mostly text. A *multicast*
address is an array of bits (bit b is byte b//8, bit b%8) in whole components, or has none where
terms stand beside it. The *kernel's* address has no components.

Text form: `PATH:ADDRESS`, `PATH:0xHEX` where the address cannot be shown, `PATH*:HEX` for
multicasts, `PATH:` for the kernel; `:`, `*`, `%` and what cannot be shown are percent escapes.

Invariants:

1. Too long is NameTooLong, never cut (D1).
2. Zeros at the end of a normal address mean nothing: `b"1.1"` is `b"1.1\\0\\0\\0\\0\\0"`.
3. `unpack(pack(a)) == a` and `parse(format(a)) == a`, for every address.
4. A structure has one reading: what lies behind the path's NUL or the last component is zero.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from .errors import BusError, InvalidArgument, NameTooLong, RemoteProtocolError
from .limits import ADDRESS_BYTES, BUS_ADDR_COMP_MAX, BUS_PATH_MAX, PATH_BYTES
from .text import escape, is_printable, to_bytes, unescape

#: The address family: above all that Linux uses or is likely to (AF_MAX is 46 in Linux 6).
AF_BUS: Final = 0xAFB

_SOCKADDR: Final = struct.Struct(f"=HH{BUS_PATH_MAX}s{ADDRESS_BYTES}s")
#: Size of `struct sockaddr_bus`.
SOCKADDR_BYTES: Final = _SOCKADDR.size

_MARK: Final = ord("*")
_HEX: Final = re.compile("(?:[0-9A-Fa-f]{2})*")


class AddressKind(IntEnum):
    """The three kinds of addresses (R3)."""

    NORMAL = 1
    MULTICAST = 2
    KERNEL = 3


def _checked_path(path: str | bytes) -> bytes:
    name = to_bytes(path)
    if not name:
        raise InvalidArgument("a bus needs a path")
    if b"\0" in name:
        raise InvalidArgument("NUL in the path of a bus")
    if len(name) > PATH_BYTES:
        raise NameTooLong(f"path of {len(name)} bytes, limit {PATH_BYTES}")
    return name


def _checked_address(address: str | bytes, kind: AddressKind) -> bytes:
    value = to_bytes(address)
    if kind is AddressKind.NORMAL:
        value = value.rstrip(b"\0")
        if not value:
            raise InvalidArgument("address without components: that is the kernel's")
    elif kind is AddressKind.KERNEL and value:
        raise InvalidArgument("the kernel's address has no components")
    elif len(value) % 8:
        raise InvalidArgument(f"{len(value) * 8} bits are not whole components of 64")
    if len(value) > ADDRESS_BYTES:
        raise NameTooLong(f"address of {len(value)} bytes, limit {ADDRESS_BYTES}")
    return value


@dataclass(frozen=True, slots=True, order=True, init=False, repr=False)
class BusAddress:
    """One address on one bus; an immutable value that can be a key.

    `path` is the bus, without NULs. `address` is what counts of the components: without zeros at
    the end if normal, all bits if multicast, nothing if the kernel's.
    """

    path: bytes
    address: bytes
    kind: AddressKind

    def __init__(
        self,
        path: str | bytes,
        address: str | bytes,
        kind: AddressKind = AddressKind.NORMAL,
    ) -> None:
        """Make an address; text becomes UTF-8.

        Raises:
            InvalidArgument: No path, NUL in it, or components that do not fit the kind. EINVAL.
            NameTooLong: The path has more than 106 bytes or the address more than 256.
        """
        object.__setattr__(self, "path", _checked_path(path))
        object.__setattr__(self, "address", _checked_address(address, kind))
        object.__setattr__(self, "kind", kind)

    @classmethod
    def multicast(cls, path: str | bytes, bits: bytes = b"") -> BusAddress:
        """Return a multicast address; `bits` is whole components, bit b is byte b//8, bit b%8."""
        return cls(path, bits, AddressKind.MULTICAST)

    @classmethod
    def kernel(cls, path: str | bytes) -> BusAddress:
        """Return the address from which notices of a bus come (R19)."""
        return cls(path, b"", AddressKind.KERNEL)

    @property
    def ncomp(self) -> int:
        """The number of components: text counts with its NUL, rounded up (R8)."""
        if self.kind is AddressKind.NORMAL:
            return min(len(self.address) // 8 + 1, BUS_ADDR_COMP_MAX)
        return len(self.address) // 8

    @property
    def is_multicast(self) -> bool:
        """Whether this is a multicast address."""
        return self.kind is AddressKind.MULTICAST

    @property
    def is_kernel(self) -> bool:
        """Whether this is the kernel's address."""
        return self.kind is AddressKind.KERNEL

    @property
    def is_unique(self) -> bool:
        """Whether this is a unique address: its first byte is an ASCII digit (D3)."""
        return self.kind is AddressKind.NORMAL and is_unique(self.address)

    @property
    def is_provisional(self) -> bool:
        """Whether the master answers an endpoint here that has not joined."""
        return self.kind is AddressKind.NORMAL and is_provisional(self.address)

    def pack(self) -> bytes:
        """Return the 368 bytes of `struct sockaddr_bus`."""
        path = self.path
        if self.kind is AddressKind.MULTICAST:
            path = path.ljust(BUS_PATH_MAX - 1, b"\0") + b"*"
        return _SOCKADDR.pack(AF_BUS, self.ncomp, path, self.address)

    @classmethod
    def unpack(cls, data: bytes) -> BusAddress:
        """Return the address of a `struct sockaddr_bus`.

        Raises:
            RemoteProtocolError: The bytes are not such a structure, in its only reading.
        """
        if len(data) != SOCKADDR_BYTES:
            raise RemoteProtocolError(f"address of {len(data)} bytes, not {SOCKADDR_BYTES}")
        family, ncomp, path, components = _SOCKADDR.unpack(data)
        if family != AF_BUS:
            raise RemoteProtocolError(f"address of family {family}")
        if ncomp > BUS_ADDR_COMP_MAX:
            raise RemoteProtocolError(f"address of {ncomp} components")
        name, _, rest = path[:-1].partition(b"\0")
        mark = path[-1]
        if mark not in (0, _MARK) or rest.strip(b"\0"):
            raise RemoteProtocolError("bytes behind the path of an address")
        if components[ncomp * 8 :].strip(b"\0"):
            raise RemoteProtocolError("bytes behind the components of an address")
        if mark == _MARK:
            kind = AddressKind.MULTICAST
        elif ncomp == 0:
            kind = AddressKind.KERNEL
        else:
            kind = AddressKind.NORMAL
        try:
            return cls(name, components[: ncomp * 8], kind)
        except BusError as error:
            raise RemoteProtocolError(error.message) from error

    @classmethod
    def parse(cls, text: str) -> BusAddress:
        """Return the address that `text` stands for, as `format` writes it.

        Raises:
            InvalidArgument: Not such a text. EINVAL.
            NameTooLong: The path or the address does not fit.
        """
        path, colon, address = text.partition(":")
        if not colon or ":" in address:
            raise InvalidArgument(f"{text!r} is not PATH:ADDRESS")
        is_multicast = path.endswith("*")
        path = path.removesuffix("*")
        if "*" in path or "*" in address:
            raise InvalidArgument(f"'*' within {text!r}")
        if is_multicast:
            return cls.multicast(unescape(path), _parse_hex(address))
        if not address:
            return cls.kernel(unescape(path))
        if address.startswith("0x"):
            return cls(unescape(path), _parse_hex(address[2:]))
        return cls(unescape(path), unescape(address))

    def format(self) -> str:
        """Return the text form."""
        path = escape(self.path, ":*")
        if self.kind is AddressKind.MULTICAST:
            return f"{path}*:{self.address.hex()}"
        return f"{path}:{format_within(self.address)}"

    def __str__(self) -> str:
        """Return the text form."""
        return self.format()

    def __repr__(self) -> str:
        """Return the text form, marked as an address."""
        return f"<BusAddress {self.format()}>"


def is_unique(address: bytes) -> bool:
    """Tell whether a normal address is a unique one: its first byte is an ASCII digit."""
    return address[:1].isdigit()


def is_provisional(address: bytes) -> bool:
    """Tell whether a normal address is a provisional one: its first byte is `@`."""
    return address[:1] == b"@"


def format_within(address: bytes) -> str:
    """Return a normal address within its bus as text: escaped, or `0xHEX` if not printable."""
    if not is_printable(address):
        return f"0x{address.hex()}"
    text = escape(address, ":*")
    # A name that looks like hexadecimal must not be read back as such.
    return f"%30{text[1:]}" if text.startswith("0x") else text


def _parse_hex(digits: str) -> bytes:
    if _HEX.fullmatch(digits) is None:
        raise InvalidArgument(f"{digits!r} is not hexadecimal bytes")
    return bytes.fromhex(digits)
