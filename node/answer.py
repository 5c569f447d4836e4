"""What the values of the master's results say.

Invariants:

1. Each function raises `RemoteProtocolError` for a value of another shape, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..proto.codec import Fields
from ..proto.errors import RemoteProtocolError
from ..proto.limits import IDENTITY_BYTES, REACH_BYTES, REACH_PATTERNS
from ..proto.names import NameOutcome
from ..proto.operation import CERTIFICATE_BYTES, NONCE_BYTES, take_chain

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Certified:
    """A certificate that was issued: `chain` is DER, leaf first, without `root`."""

    cluster: str
    chain: tuple[bytes, ...]
    root: bytes
    until_utc: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an endpoint may do: by which rule, or why not.

    `reach` stands where it was asked of an address: all that it may send to on that bus, as
    patterns of the policy.
    """

    is_allowed: bool
    rule: str
    reason: str
    reach: tuple[str, ...] = ()


def _take(what: str, value: object, keys: Sequence[str]) -> Fields:
    """Return the values of these keys as fields; a newer master may say more."""
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise RemoteProtocolError(f"{what} without {', '.join(keys)}")
    made: dict[str, Any] = value
    return Fields(what, [made[key] for key in keys])


def take_block(value: object) -> int:
    """Return the number of a block (LEASE)."""
    return _take("lease", value, ["block"]).take_int(1)


def take_certified(value: object) -> Certified:
    """Return a new certificate (ENROL, RENEW)."""
    fields = _take("certificate", value, ["cluster", "chain", "root", "until"])
    return Certified(
        fields.take_str(IDENTITY_BYTES),
        take_chain(fields),
        fields.take_bytes(1, CERTIFICATE_BYTES),
        fields.take_int(),
    )


def take_nonce(value: object) -> bytes:
    """Return what is to be signed (CHALLENGE)."""
    return _take("challenge", value, ["nonce"]).take_bytes(1, NONCE_BYTES)


def take_principal(value: object) -> str:
    """Return who an endpoint is to the master (ENTER)."""
    return _take("entry", value, ["principal"]).take_str()


def take_outcome(value: object) -> NameOutcome:
    """Return what became of a request for a name (OWN)."""
    return _take("name", value, ["outcome"]).take_enum(NameOutcome)


def take_verdict(value: object) -> Verdict:
    """Return what an endpoint may do (ASK)."""
    fields = _take("verdict", value, ["is_allowed", "rule", "reason", "reach"])
    is_allowed, rule, reason = fields.take_bool(), fields.take_str(), fields.take_str()
    reach = fields.take_list(REACH_PATTERNS)
    each = Fields("reach", reach)
    return Verdict(is_allowed, rule, reason, tuple(each.take_str(REACH_BYTES) for _ in reach))
