"""Who belongs to the cluster: enrolment, certificates that are issued, renewed and revoked.

Invariants:

1. Each certificate that was issued is known until it ends, so whoever is revoked is out with all.
2. A refusal changes nothing; the peer learns that it is refused, the audit learns why.
3. A name belongs to one key, until it is forgotten or its operator gives it to another.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, NoReturn

from ..link.identity import Identity, Role
from ..proto.errors import Denied, IdentityError, InvalidArgument, ShareExceeded
from ..proto.record import DeniedRecord, decode_record, denied_key
from . import row
from .issuer import ISSUING_LIFE_S, LEAF_LIFE_S, LEAF_LIFE_S_MAX, Issued, digest_key
from .token import (
    TOKEN_LIFE_S,
    TOKEN_LIFE_S_MAX,
    Redeemed,
    Refused,
    Token,
    Tokens,
    make_token,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .effect import Note
    from .entity import Node
    from .issuer import Issuer
    from .ledger import Ledger
    from .registry import Registry

#: Certificates of one bearer that are good at a time: renewals of a node that starts and starts.
CERTIFICATES: Final = 256
#: The shortest life of what an operator asks for: less, and clocks decide.
LIFE_S_MIN: Final = 60


class Office:
    """Tokens and certificates."""

    def __init__(
        self,
        ledger: Ledger,
        registry: Registry,
        issuer: Issuer,
        draw: Callable[[int], bytes],
        note: Note,
    ) -> None:
        """Begin without any.

        Args:
            ledger: Where all stands.
            registry: Which nodes there are.
            issuer: Makes certificates.
            draw: Returns so many secret random bytes.
            note: Takes what stands in the audit.
        """
        self._ledger, self._registry, self._issuer = ledger, registry, issuer
        self._draw, self._note = draw, note
        self._tokens = Tokens()
        self._issued: dict[int, row.IssuedRow] = {}
        self._serials: defaultdict[str, set[int]] = defaultdict(set)
        self._denied: dict[int, DeniedRecord] = {}

    def load(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Begin with the table of the ledger, and the private rows of tokens and certificates.

        Raises:
            RemoteProtocolError: They are not what an office wrote.
        """
        for key, value in rows:
            if key[:1] == b"T":
                self._tokens.add(Token.decode(key[1:], value))
            elif key[:1] == b"I":
                self._know(int.from_bytes(key[1:], "big"), row.decode_issued(value))
        for key in self._ledger.table:
            if key[:1] == b"d":
                record = decode_record(key, self._ledger.table[key])
                assert isinstance(record, DeniedRecord)
                self._denied[record.serial] = record

    def _know(self, serial: int, one: row.IssuedRow) -> None:
        self._issued[serial] = one
        self._serials[one.bearer].add(serial)

    @property
    def token_count(self) -> int:
        """Tokens that wait for their use or their end."""
        return len(self._tokens)

    @property
    def denied(self) -> frozenset[int]:
        """Serial numbers of what was revoked."""
        return frozenset(self._denied)

    # --- certificates ---

    def learn(self, identity: Identity, serial: int, until_utc: int) -> None:
        """Know a certificate with which somebody has come, if an older state issued it."""
        if serial not in self._issued:
            self._write_issued(serial, row.IssuedRow(identity.format(), until_utc))

    def _write_issued(self, serial: int, one: row.IssuedRow) -> None:
        self._know(serial, one)
        self._ledger.write(row.issued_key(serial), list(one))

    def _issue(self, csr: bytes, identity: Identity, life_s: int, now_utc: float) -> Issued:
        """Make a certificate; IdentityError if the request is wrong."""
        bearer = identity.format()
        if len(self._serials.get(bearer, ())) >= CERTIFICATES:
            text = f"{identity} has {CERTIFICATES} certificates that are good, which is the limit"
            raise ShareExceeded(text)
        serial = int.from_bytes(self._draw(16), "big") | 1
        issued = self._issuer.issue(csr, identity, serial, now_utc, life_s)
        self._write_issued(serial, row.IssuedRow(bearer, issued.not_after_utc))
        return issued

    def _answer(self, issued: Issued) -> dict[str, object]:
        return {
            "cluster": self._issuer.cluster,
            "chain": list(issued.chain),
            "root": self._issuer.root,
            "until": issued.not_after_utc,
        }

    def enrol(self, token: str, name: str, csr: bytes, actor: str, now_utc: float) -> object:
        """Let a new node in; return its certificate.

        Raises:
            Denied: The token is not good for that. EPERM.
        """
        try:
            identity = Identity(self._issuer.cluster, Role.NODE, name)
            key = digest_key(csr)
        except (InvalidArgument, IdentityError) as error:
            self._refuse(actor, name, str(error))
        verdict = self._tokens.judge(token, name, key, now_utc)
        if isinstance(verdict, Refused):
            self._refuse(actor, name, verdict.reason)
        node = self._registry.nodes.get(name)
        if node is not None and node.key not in (None, key) and verdict.token.name != name:
            reason = "has another key; a token for this very name replaces it, revoking frees it"
            self._refuse(actor, name, f"node {name} is there already, and {reason}")
        return self._let_in(verdict, identity, csr, key, actor, now_utc)

    def _refuse(self, actor: str, name: str, reason: str) -> NoReturn:
        self._note(actor, "enrol", f"node/{name[:100]}", False, reason)
        # Which of the reasons it was, is nothing for whoever may be guessing.
        raise Denied("the token is not good for this node (the master's audit says why)")

    def _let_in(  # noqa: PLR0913 (all that was judged)
        self,
        verdict: Redeemed,
        identity: Identity,
        csr: bytes,
        key: bytes,
        actor: str,
        now_utc: float,
    ) -> object:
        issued = self._issue(csr, identity, LEAF_LIFE_S, now_utc)
        used = self._tokens.use(verdict.token, identity.name, key)
        self._ledger.write(b"T" + used.id, used.encode())
        node = self._registry.nodes.get(identity.name)
        if node is None:
            node = self._registry.add_node(identity.name)
        node.is_ephemeral, node.key, node.until_utc = used.ephemeral, key, issued.not_after_utc
        self._registry.put_node(node)
        detail = f"token {used.id.hex()}, serial {issued.serial:x}"
        again = " again" if verdict.is_again else ""
        self._note(actor, "enrol", f"node/{identity.name}", True, detail + again)
        return self._answer(issued)

    def renew(self, node: Node, csr: bytes, now_utc: float) -> object:
        """Return the next certificate of a node.

        Raises:
            Denied: The request is wrong. EPERM.
            ShareExceeded: It has too many. EDQUOT.
        """
        identity = Identity(self._issuer.cluster, Role.NODE, node.name)
        try:
            issued = self._issue(csr, identity, LEAF_LIFE_S, now_utc)
        except IdentityError as error:
            raise Denied(str(error)) from error
        node.until_utc = max(node.until_utc, issued.not_after_utc)
        self._registry.put_node(node)
        actor = f"node/{node.name}"
        self._note(actor, "renew", actor, True, f"serial {issued.serial:x}")
        return self._answer(issued)

    def issue(self, principal: str, csr: bytes, life_s: int | None, now_utc: float) -> object:
        """Return a certificate for a principal, as its operator wants.

        Raises:
            InvalidArgument: The name, the request or the life makes no sense. EINVAL.
            ShareExceeded: It has too many. EDQUOT.
        """
        life_s = _checked_life(life_s, LEAF_LIFE_S, LEAF_LIFE_S_MAX)
        identity = Identity(self._issuer.cluster, Role.PRINCIPAL, principal)
        try:
            issued = self._issue(csr, identity, life_s, now_utc)
        except IdentityError as error:
            raise InvalidArgument(str(error)) from error
        subject = f"principal/{principal}"
        self._note("operator", "issue", subject, True, f"serial {issued.serial:x}")
        return self._answer(issued)

    def issue_own(self, name: str, csr: bytes, now_utc: float) -> Issued:
        """Return a certificate for the master itself, however often it was started today.

        Keys of its former lives were written nowhere, so beyond the limit the oldest is forgotten.

        Raises:
            IdentityError: The issuing certificate is over.
        """
        identity = Identity(self._issuer.cluster, Role.MASTER, name)
        own = self._serials.get(identity.format(), set())
        if len(own) >= CERTIFICATES:
            self._forget_issued(min(own, key=lambda serial: self._issued[serial].until_utc))
        return self._issue(csr, identity, LEAF_LIFE_S, now_utc)

    # --- what the operator wants ---

    def make_token(
        self, name: str | None, life_s: int | None, is_ephemeral: bool, now_utc: float
    ) -> object:
        """Return a new token.

        Raises:
            InvalidArgument: The name or the life makes no sense. EINVAL.
            ShareExceeded: There are too many. EDQUOT.
        """
        until_utc = now_utc + _checked_life(life_s, TOKEN_LIFE_S, TOKEN_LIFE_S_MAX)
        if name is not None:
            Identity(self._issuer.cluster, Role.NODE, name)
        text, stored = make_token(
            self._draw(32), self._issuer.root_digest, until_utc, name, is_ephemeral
        )
        self._tokens.add(stored)
        self._ledger.write(b"T" + stored.id, stored.encode())
        subject = f"node/{name}" if name else "any new node"
        self._note("operator", "token", subject, True, f"token {stored.id.hex()}")
        return {"token": text.format(), "until": stored.until_utc}

    def revoke(self, subject: str, reason: str, now_utc: float) -> frozenset[int]:
        """Deny all certificates of a bearer, or one by its number; return their numbers.

        Raises:
            InvalidArgument: The subject is none, or has no certificate that is good. EINVAL.
        """
        kind, _, name = subject.partition("/")
        if kind == "serial":
            serials = frozenset({_parse_serial(name)})
        elif kind in (role.value for role in Role):
            bearer = Identity(self._issuer.cluster, Role(kind), name).format()
            serials = frozenset(self._serials.get(bearer, ()))
            if not serials:
                raise InvalidArgument(f"{subject} has no certificate that is good")
        else:
            text = f"{subject[:100]!a} is none of node/NAME, principal/NAME, serial/HEX"
            raise InvalidArgument(text)
        if kind == Role.NODE.value:
            # Whoever has its key and its token must not come back by them.
            for number in self._tokens.take_used(name):
                self._ledger.write(b"T" + number, None)
        for serial in sorted(serials - self._denied.keys()):
            # Of a stranger nobody knows when it ends: not after the issuing certificate.
            unknown = row.IssuedRow("", int(now_utc + ISSUING_LIFE_S))
            bearer, until_utc = self._issued.get(serial, unknown)
            record = DeniedRecord(serial, bearer, until_utc, reason)
            self._denied[serial] = record
            self._ledger.put(record)
        shown = ", ".join(f"{serial:x}" for serial in sorted(serials))
        self._note("operator", "revoke", subject, True, f"{reason or 'no reason'}: serial {shown}")
        return serials

    def sweep(self, now_utc: float) -> bool:
        """Forget what is over; return whether somebody is denied no longer."""
        for number in self._tokens.take_expired(now_utc):
            self._ledger.write(b"T" + number, None)
        for serial in [one for one, made in self._issued.items() if made.until_utc < now_utc]:
            self._forget_issued(serial)
        over = [serial for serial, one in self._denied.items() if one.until_utc < now_utc]
        for serial in over:
            del self._denied[serial]
            self._ledger.drop(denied_key(serial))
        return bool(over)

    def _forget_issued(self, serial: int) -> None:
        bearer = self._issued.pop(serial).bearer
        self._serials[bearer].discard(serial)
        if not self._serials[bearer]:
            del self._serials[bearer]
        self._ledger.write(row.issued_key(serial), None)


def _checked_life(life_s: int | None, usual_s: int, longest_s: int) -> int:
    life_s = usual_s if life_s is None else life_s
    if not LIFE_S_MIN <= life_s <= longest_s:
        raise InvalidArgument(f"a life of {life_s} s is not {LIFE_S_MIN} to {longest_s}")
    return life_s


def _parse_serial(text: str) -> int:
    try:
        serial = int(text, 16)
    except ValueError as error:
        raise InvalidArgument(f"{text[:100]!a} is not hexadecimal") from error
    if not 0 < serial < 1 << 8 * 20:
        raise InvalidArgument(f"{text[:100]!a} is no serial number")
    return serial
