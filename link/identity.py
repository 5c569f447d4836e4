"""Who a member of a cluster is: the one name that certificates, links and policy agree upon.

    afbus://CLUSTER/node/NAME        an agent
    afbus://CLUSTER/master/NAME      an authority
    afbus://CLUSTER/principal/NAME   an application or a person

Invariants:

1. `Identity.parse(i.format()) == i`, and no other text is read as `i`.
2. A part has 1 to 255 characters of `A-Z a-z 0-9 . _ -`, and is neither `.` nor `..`: nothing
   that a URI, a file name or a log could read in two ways.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ..proto.errors import InvalidArgument
from ..proto.limits import IDENTITY_BYTES

_SCHEME: Final = "afbus://"
_PART: Final = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]+")


class Role(Enum):
    """What a bearer of a certificate is in its cluster."""

    NODE = "node"
    MASTER = "master"
    PRINCIPAL = "principal"


def check_name(what: str, part: str) -> None:
    """Check the name of a cluster or of a bearer; `what` it is stands in the error.

    Raises:
        InvalidArgument: It is empty, too long, or has other characters. EINVAL.
    """
    if len(part) > IDENTITY_BYTES or _PART.fullmatch(part) is None:
        raise InvalidArgument(
            f"{what} {part!a}: only letters, digits, '.', '_' and '-', at most {IDENTITY_BYTES}"
        )


@dataclass(frozen=True, slots=True)
class Identity:
    """The name of one bearer; an immutable value that can be a key.

    Raises:
        InvalidArgument: A part is empty, too long, or has other characters. EINVAL.
    """

    cluster: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        """Check both parts."""
        check_name("cluster", self.cluster)
        check_name("name", self.name)

    @classmethod
    def parse(cls, text: str) -> Identity:
        """Return the identity of a URI, as `format` writes it.

        Raises:
            InvalidArgument: Not such a text. EINVAL.
        """
        parts = text.removeprefix(_SCHEME).split("/")
        if not text.startswith(_SCHEME) or len(parts) != 3:
            raise InvalidArgument(f"{text!a} is not {_SCHEME}CLUSTER/ROLE/NAME")
        cluster, role, name = parts
        if role not in (known.value for known in Role):
            raise InvalidArgument(f"{text!a} has the role {role!a}: node, master or principal")
        return cls(cluster, Role(role), name)

    def format(self) -> str:
        """Return the URI."""
        return f"{_SCHEME}{self.cluster}/{self.role.value}/{self.name}"

    def __str__(self) -> str:
        """Return the URI."""
        return self.format()
