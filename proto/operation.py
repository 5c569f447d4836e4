"""What a node may ask of the master, and an operator: operations and their arguments.

Invariants:

1. A number that was ever on the wire keeps its meaning.
2. Arguments that pass `check_arguments` are of the types and within the sizes that stand here;
   what they mean, the master judges.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from . import codec
from .codec import U32_MAX, Fields
from .limits import ADDRESS_BYTES, IDENTITY_BYTES, KIB, PATH_BYTES, REASON_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

#: A certificate request or one certificate, DER.
CERTIFICATE_BYTES: Final = 16 * KIB
#: Certificates of one chain: leaf, issuing, root.
CHAIN: Final = 4
#: A join token as text.
TOKEN_TEXT_BYTES: Final = 256
#: A signature over a challenge, and the challenge itself.
SIGNATURE_BYTES: Final = 512
NONCE_BYTES: Final = 32


class ClusterOp(IntEnum):
    """What a node may ask of the master; from 32 on, what its operator may."""

    #: With a one-time token, from a link without identity: a certificate.
    ENROL = 1
    #: A new certificate for the same name.
    RENEW = 2
    #: All that the node has follows, and only that is to be kept.
    RESTATE = 3
    RESTATED = 4
    #: A block of unique addresses; and one that is no longer needed.
    LEASE = 5
    RETURN = 6
    #: What an endpoint signs to prove its certificate.
    CHALLENGE = 7
    #: An endpoint exists: its uid as attested by the node, or its certificate with a signature.
    ENTER = 8
    #: It is gone, with all that it had.
    EXIT = 9
    BIND = 10
    UNBIND = 11
    OWN = 12
    RELEASE = 13
    SUBSCRIBE = 14
    UNSUBSCRIBE = 15
    #: May an endpoint do this? The answer holds until the number of the policy changes. If the
    #: question is of an address, it says to which others the endpoint may send, too.
    ASK = 16
    #: A new join token.
    TOKEN = 32
    #: Deny certificates: of a node, of a principal, or one by its serial number.
    REVOKE = 33
    STATUS = 34
    #: List nodes: `{"rows": [...], "next": name or None}`, from behind the name `after` on.
    NODES = 35
    #: A certificate for a principal.
    ISSUE = 36


_NIL: Final = type(None)
_WHAT: Final[Mapping[str, tuple[type, ...]]] = {"terms": (bytes, _NIL), "bits": (bytes, _NIL)}

#: Arguments of each call with the types that each may have; who may be None may be absent.
CLUSTER_ARGUMENTS: Final[Mapping[ClusterOp, Mapping[str, tuple[type, ...]]]] = {
    ClusterOp.ENROL: {"token": (str,), "name": (str,), "csr": (bytes,)},
    ClusterOp.RENEW: {"csr": (bytes,)},
    ClusterOp.RESTATE: {},
    ClusterOp.RESTATED: {},
    # A block that the node has already, to state it again.
    ClusterOp.LEASE: {"block": (int, _NIL)},
    ClusterOp.RETURN: {"block": (int,)},
    ClusterOp.CHALLENGE: {"endpoint": (int,)},
    ClusterOp.ENTER: {
        "endpoint": (int,),
        "uid": (int,),
        # DER, leaf first; the signature is over `endpoint_claim`.
        "chain": (list, _NIL),
        "signature": (bytes, _NIL),
        # The principal that this very endpoint has proven before, to state it again.
        "principal": (str, _NIL),
    },
    ClusterOp.EXIT: {"endpoint": (int,)},
    ClusterOp.BIND: {
        "endpoint": (int,),
        "path": (bytes,),
        "address": (bytes,),
        "width": (int, _NIL),
        "order": (str, _NIL),
    },
    ClusterOp.UNBIND: {"endpoint": (int,), "path": (bytes,)},
    ClusterOp.OWN: {
        "endpoint": (int,),
        "path": (bytes,),
        "name": (bytes,),
        "flags": (int, _NIL),
    },
    ClusterOp.RELEASE: {"endpoint": (int,), "path": (bytes,), "name": (bytes,)},
    ClusterOp.SUBSCRIBE: {"endpoint": (int,), "path": (bytes,), **_WHAT},
    ClusterOp.UNSUBSCRIBE: {"endpoint": (int,), "path": (bytes,), **_WHAT},
    # `action` as in the policy; the target is an address, or what a multicast is about, or none.
    ClusterOp.ASK: {
        "endpoint": (int,),
        "action": (str,),
        "path": (bytes,),
        "address": (bytes, _NIL),
        **_WHAT,
    },
    # The only node that may use it; how long it is good; whether the node is forgotten soon.
    ClusterOp.TOKEN: {"node": (str, _NIL), "life_s": (int, _NIL), "is_ephemeral": (bool, _NIL)},
    # `node/NAME`, `principal/NAME` or `serial/HEX`.
    ClusterOp.REVOKE: {"subject": (str,), "reason": (str, _NIL)},
    ClusterOp.STATUS: {},
    ClusterOp.NODES: {"after": (str, _NIL)},
    ClusterOp.ISSUE: {"principal": (str,), "csr": (bytes,), "life_s": (int, _NIL)},
}


def endpoint_claim(nonce: bytes, cluster: str, node: str, endpoint: int) -> bytes:
    """Return what an endpoint signs to prove its certificate to the master, through its node.

    The node's name is in it, so that no other node can use the signature.
    """
    return codec.encode(["afbus endpoint", nonce, cluster, node, endpoint])


def check_arguments(fields: Fields, op: ClusterOp, args: Mapping[str, Any]) -> None:
    """Check the arguments of a call; `fields` is where they stand.

    Raises:
        RemoteProtocolError: One is missing, unknown, or of another type or size.
    """
    known = CLUSTER_ARGUMENTS[op]
    for name in args.keys() - known.keys():
        fields.fail(f"{op.name} has no argument {name[:40]!a}")
    for name, types in known.items():
        if type(args.get(name)) not in types:
            fields.fail(f"{op.name} without a fitting argument {name}")
    _check_sizes(fields, op, args)


def _check_sizes(fields: Fields, op: ClusterOp, args: Mapping[str, Any]) -> None:
    """Check what all calls have in common: lengths, numbers that are not negative, chains."""
    limits = {
        "token": TOKEN_TEXT_BYTES,
        "name": IDENTITY_BYTES if op is ClusterOp.ENROL else ADDRESS_BYTES,
        "node": IDENTITY_BYTES,
        "after": IDENTITY_BYTES,
        "principal": REASON_BYTES,
        "subject": REASON_BYTES,
        "csr": CERTIFICATE_BYTES,
        "signature": SIGNATURE_BYTES,
        "path": PATH_BYTES,
        "address": ADDRESS_BYTES,
    }
    for name, limit in limits.items():
        value = args.get(name)
        size = len(value.encode()) if isinstance(value, str) else len(value or b"")
        if value is not None and not 0 < size <= limit:
            fields.fail(f"{op.name}: {name} of {size} bytes, limit {limit}")
    for name in ("endpoint", "uid", "block", "width", "flags", "life_s"):
        if (args.get(name) or 0) < 0:
            fields.fail(f"{op.name}: negative {name}")
    if (args.get("uid") or 0) > U32_MAX:
        fields.fail(f"{op.name}: uid above 32 bits")
    if args.get("chain") is not None:
        take_chain(Fields("chain", [args["chain"]]))


def take_chain(fields: Fields) -> tuple[bytes, ...]:
    """Take certificates in DER, at least one."""
    chain = fields.take_list(CHAIN)
    if not chain:
        fields.fail("chain without a certificate")
    each = Fields("chain", chain)
    return tuple(each.take_bytes(1, CERTIFICATE_BYTES) for _ in chain)
