"""Who may do what: a TOML file of rules, deny by default.

    [[rule]]
    name = "metrics"                                   # stands in answers and in the audit
    who = ["principal/collector-*", "uid/1000@node-a"] # certificates; users as nodes attest them
    bus = ["/metrics"]                                 # paths
    own = ["org.example.metrics.*"]                    # names
    send = ["org.example.**", "topic:sensors.**"]      # addresses, and topics of multicasts
    receive = ["topic:sensors.**"]
    bind = true                                        # be the bus's master, for the whole cluster
    monitor = false

A rule allows what it names, to whom it names, on the buses it names; what no rule allows is denied,
so the order of rules means nothing. `*` stands for any text within one component, `**` as a whole
component for any number of components, also none. Components are parted by `.` in names and
topics, by `/` in paths and in `who`. Addresses and paths are written as commands show them, with
percent escapes.

`topic:PATTERN` covers multicasts in terms by their topic; one without a topic needs `topic:**`.
A subscription to a topic hears all that lies below it, so to allow `topic:a` for receiving allows
that as well. `raw` allows raw bits, as in the mail, which nobody can look into; `everything` alone
allows to hear everything (D9).

Invariants:

1. A decision depends on policy and arguments alone, and names the rule that allowed it.
2. Every error names file, line and key.
3. A policy that loads has no rule without effect: who, bus, and something allowed.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, NoReturn

from ..proto.address import format_within
from ..proto.errors import ConfigError
from ..proto.terms import Terms
from ..proto.text import escape

if TYPE_CHECKING:
    from pathlib import Path

    from ..proto.match import What

#: A file of rules: some ten thousand of them.
POLICY_BYTES: Final = 4 << 20
#: Decisions that are remembered, as the same endpoints ask for the same again and again.
_REMEMBERED: Final = 65_536

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._/-]{0,99}")
_WHO: Final = re.compile(r"(principal/[^@/]+|uid/(\*|[0-9]+)@[^@/]+)")
_TOPIC: Final = "topic:"
_RAW: Final = "raw"
_EVERYTHING: Final = "everything"
_ANY: Final = "**"
#: Where tomllib says that it stumbled.
_PLACE: Final = re.compile(r"\(at line (\d+), column \d+\)")
_HEADER: Final = re.compile(r"\s*\[\[\s*[\"']?rule[\"']?\s*\]\]")


class Action(Enum):
    """What a rule may allow; the values are the keys of the file."""

    OWN = "own"
    SEND = "send"
    RECEIVE = "receive"
    BIND = "bind"
    MONITOR = "monitor"


_LISTS: Final = (Action.OWN, Action.SEND, Action.RECEIVE)
_FLAGS: Final = (Action.BIND, Action.MONITOR)
_KEYS: Final = {"name", "who", "bus", *(action.value for action in Action)}


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether something is allowed, and by which rule; or why it is not."""

    is_allowed: bool
    rule: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern of the file, ready to be compared."""

    text: str
    separator: str
    expression: re.Pattern[str]

    def fits(self, text: str) -> bool:
        """Tell whether the whole text is as the pattern says."""
        return self.expression.fullmatch(self.separator + text) is not None


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `allows` holds patterns for addresses and topics, none for BIND and MONITOR."""

    name: str
    who: tuple[Pattern, ...]
    bus: tuple[Pattern, ...]
    addresses: dict[Action, tuple[Pattern, ...]] = field(default_factory=dict)
    topics: dict[Action, tuple[Pattern, ...]] = field(default_factory=dict)
    #: `raw` and `everything`.
    words: dict[Action, frozenset[str]] = field(default_factory=dict)
    flags: frozenset[Action] = frozenset()

    def allows(self, action: Action, target: bytes | What | None, is_multicast: bool) -> bool:
        """Tell whether the rule allows this, to those whom it is about."""
        if action in _FLAGS:
            return action in self.flags
        assert target is not None, f"{action.value} needs a target"
        if not is_multicast:
            assert isinstance(target, bytes), "an address is bytes"
            text = format_within(target)
            return any(one.fits(text) for one in self.addresses.get(action, ()))
        words = self.words.get(action, frozenset())
        if not isinstance(target, Terms):
            is_all = action is Action.RECEIVE and not any(target)
            return _RAW in words and (not is_all or _EVERYTHING in words)
        if not target:
            # Nobody is asked for a topic that a message without one does not have.
            return _EVERYTHING in words
        topics = self.topics.get(action, ())
        if not target.topic:
            return any(one.text == _ANY for one in topics)
        return any(one.fits(target.topic) for one in topics)


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """What differs between two policies: names of rules, sorted."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Tell whether anything differs."""
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        """Return a line for people."""
        parts = (("added", self.added), ("removed", self.removed), ("changed", self.changed))
        return "; ".join(f"{what} {', '.join(names)}" for what, names in parts if names) or "same"


class Policy:
    """All rules; an immutable value."""

    def __init__(self, rules: tuple[Rule, ...] = ()) -> None:
        self.rules = rules
        self._of_name = {rule.name: rule for rule in rules}
        # Rules about somebody on some bus are few, and stay the same for as long as the policy.
        self._about = lru_cache(_REMEMBERED)(self._find_about)

    @property
    def digest(self) -> bytes:
        """16 bytes that are equal for equal rules."""
        rules = "\n".join(sorted(map(_describe, self.rules)))
        return blake2b(rules.encode(), digest_size=16).digest()

    def decide(
        self,
        action: Action,
        principal: str,
        path: bytes,
        target: bytes | What | None = None,
        *,
        is_multicast: bool = False,
    ) -> Decision:
        """Tell whether a principal may do something on a bus.

        Args:
            action: What it wants to do.
            principal: `principal/NAME`, or `uid/NUMBER@NODE` as that node attests.
            path: The path of the bus.
            target: With OWN, SEND and RECEIVE an address within the bus, or with `is_multicast`
                what the multicast or the subscription is about.
            is_multicast: How to read the target: raw bits and addresses are both bytes.
        """
        about = self._about(principal, path)
        for rule in about:
            if rule.allows(action, target, is_multicast):
                return Decision(True, rule.name)
        what = action.value
        if target is not None:
            what += f" {_show(target, is_multicast)}"
        match len(about):
            case 0:
                verdict = "no rule is about it"
            case 1:
                verdict = "the rule about it does not allow it"
            case count:
                verdict = f"none of {count} rules about it allows it"
        reason = f"{verdict}: {principal} may not {what} on {escape(path)}"
        return Decision(False, reason=reason)

    def get_reach(self, principal: str, path: bytes) -> tuple[str, ...]:
        """Return all addresses that a principal may send to on a bus, as patterns, sorted."""
        about = self._about(principal, path)
        texts = {one.text for rule in about for one in rule.addresses.get(Action.SEND, ())}
        return tuple(sorted(texts))

    def compare(self, newer: Policy) -> PolicyChange:
        """Return what `newer` changes."""
        old, new = self._of_name, newer._of_name
        both = old.keys() & new.keys()
        changed = (name for name in both if _describe(old[name]) != _describe(new[name]))
        return PolicyChange(
            tuple(sorted(new.keys() - old.keys())),
            tuple(sorted(old.keys() - new.keys())),
            tuple(sorted(changed)),
        )

    def _find_about(self, principal: str, path: bytes) -> tuple[Rule, ...]:
        text = escape(path, ":*")
        return tuple(
            rule
            for rule in self.rules
            if any(one.fits(principal) for one in rule.who)
            and any(one.fits(text) for one in rule.bus)
        )


def _show(target: bytes | What, is_multicast: bool) -> str:
    if isinstance(target, Terms):
        return f"multicasts about {target.format() or 'everything'}"
    return f"raw bits {target.hex()[:32]}" if is_multicast else format_within(target)


def _describe(rule: Rule) -> str:
    """Return a text that is equal for equal rules, whatever the order within."""
    parts = [rule.name]
    for what in (rule.who, rule.bus):
        parts.append(" ".join(sorted(one.text for one in what)))
    for action in Action:
        texts = [one.text for one in rule.addresses.get(action, ())]
        texts += [_TOPIC + one.text for one in rule.topics.get(action, ())]
        texts += rule.words.get(action, ())
        parts.append(f"{action.value}:{action in rule.flags}:{' '.join(sorted(texts))}")
    return "|".join(parts)


def _compile(text: str, separator: str) -> Pattern:
    """Return the pattern of a text.

    Raises:
        ValueError: It is empty, or `**` is not a whole component.
    """
    if not text:
        raise ValueError("is empty")
    stop, made = re.escape(separator), ""
    # Compared with a separator before each component, also the first.
    anything = f"(?:{stop}[^{stop}]*)*"
    for part in text.split(separator):
        if part == _ANY:
            # Two in a row mean what one means, and would be tried in all divisions.
            made = made.removesuffix(anything) + anything
        elif _ANY in part:
            raise ValueError(f"has '**' within a component: {text!r}")
        else:
            made += stop
            made += "".join(f"[^{stop}]*" if one == "*" else re.escape(one) for one in part)
    return Pattern(text, separator, re.compile(made))


# --- reading ---


class _Reader:
    """Checks a decoded file; knows where in the text a key stands."""

    def __init__(self, text: str, file: str) -> None:
        self._lines = text.splitlines()
        self._file = file

    def fail(self, message: str, number: int | None = None, key: str = "") -> NoReturn:
        """Raise ConfigError with the line of a key of a rule (counted from 0)."""
        place = self._file
        line = self._find_line(number, key)
        if line is not None:
            place += f", line {line}"
        where = f"rule {number + 1}, {key}" if number is not None and key else key
        raise ConfigError(message, file=place, key=where)

    def _find_line(self, number: int | None, key: str) -> int | None:
        """Return the line of a key from 1: of the rule's head if the key is missing there."""
        wanted = re.compile(rf"\s*\[?[\"']?{re.escape(key)}[\"']?\s*[=.\]]") if key else None
        head, rules = None, -1
        for place, line in enumerate(self._lines, 1):
            if _HEADER.match(line):
                rules += 1
                if rules == number:
                    head = place
            elif wanted and wanted.match(line) and (number is None or rules == number):
                return place
        return head

    def read_rule(self, number: int, values: Any) -> Rule:
        if not isinstance(values, dict):
            self.fail("is not a [[rule]]", None, "rule")
        for key in values:
            if key not in _KEYS:
                known = ", ".join(sorted(_KEYS))
                self.fail(f"is not known; there are {known}", number, key)
        name = values.get("name")
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            self.fail("is needed: letters, digits, blanks and ._/-, up to 100", number, "name")
        made = Rule(
            name,
            self._read_who(number, values),
            tuple(self._compile(number, "bus", one, "/") for one in self._texts(number, values)),
        )
        flags = {action for action in _FLAGS if self._flag(number, values, action)}
        for action in _LISTS:
            self._read_list(made, action, number, values)
        made = Rule(
            made.name, made.who, made.bus, made.addresses, made.topics, made.words, frozenset(flags)
        )
        if not (made.flags or made.addresses or made.topics or made.words):
            self.fail("the rule allows nothing; state own, send, receive, bind or monitor", number)
        return made

    def _read_who(self, number: int, values: dict[str, Any]) -> tuple[Pattern, ...]:
        made = []
        for text in self._texts(number, values, "who"):
            if _WHO.fullmatch(text) is None:
                self.fail(f"{text!r} is neither principal/NAME nor uid/NUMBER@NODE", number, "who")
            made.append(self._compile(number, "who", text, "/"))
        return tuple(made)

    def _read_list(self, rule: Rule, action: Action, number: int, values: dict[str, Any]) -> None:
        """Sort the entries of one list by what they are."""
        key = action.value
        if key not in values:
            return
        addresses, topics, words = [], [], set()
        for text in self._texts(number, values, key):
            is_multicast = text in (_RAW, _EVERYTHING) or text.startswith(_TOPIC)
            if is_multicast and action is Action.OWN:
                self.fail(f"{text!r} is for multicasts; nobody owns one", number, key)
            if text in (_RAW, _EVERYTHING):
                words.add(text)
            elif text.startswith(_TOPIC):
                topics.append(self._compile(number, key, text.removeprefix(_TOPIC), "."))
            elif ":" in text:
                self.fail(f"{text!r} is no address; write ':' as %3A", number, key)
            else:
                addresses.append(self._compile(number, key, text, "."))
        if addresses:
            rule.addresses[action] = tuple(addresses)
        if topics:
            rule.topics[action] = tuple(topics)
        if words:
            rule.words[action] = frozenset(words)

    def _texts(self, number: int, values: dict[str, Any], key: str = "bus") -> list[str]:
        texts = values.get(key)
        if texts is None:
            self.fail("is needed", number, key)
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            self.fail("is not a list of texts", number, key)
        if not texts:
            self.fail("is empty; leave it out, or the rule", number, key)
        return texts

    def _flag(self, number: int, values: dict[str, Any], action: Action) -> bool:
        value = values.get(action.value, False)
        if not isinstance(value, bool):
            self.fail("is neither true nor false", number, action.value)
        return value

    def _compile(self, number: int, key: str, text: str, separator: str) -> Pattern:
        try:
            return _compile(text, separator)
        except ValueError as error:
            self.fail(f"pattern {error}", number, key)


def parse_policy(text: str, file: str = "policy") -> Policy:
    """Return the policy of a text.

    Raises:
        ConfigError: It is not TOML, or says something that means nothing.
    """
    reader = _Reader(text, file)
    try:
        values = tomllib.loads(text)
    except ValueError as error:
        found = _PLACE.search(str(error))
        line = found[1] if found else str(text.count("\n") + 1)
        raise ConfigError(str(error), file=f"{file}, line {line}") from error
    for key in values:
        if key != "rule":
            reader.fail("is not known; there is only [[rule]]", None, key)
    rules = values.get("rule", [])
    if not isinstance(rules, list):
        reader.fail("is not a list; write [[rule]]", None, "rule")
    made = tuple(reader.read_rule(number, one) for number, one in enumerate(rules))
    seen: dict[str, int] = {}
    for number, rule in enumerate(made):
        if rule.name in seen:
            reader.fail(f"{rule.name!r} is rule {seen[rule.name] + 1} already", number, "name")
        seen[rule.name] = number
    return Policy(made)


def load_policy(path: Path) -> Policy:
    """Return the policy of a file.

    Raises:
        ConfigError: It cannot be read, is too large, or is wrong.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    if len(data) > POLICY_BYTES:
        raise ConfigError(f"{len(data)} bytes, limit {POLICY_BYTES}", file=str(path))
    try:
        return parse_policy(data.decode(), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8", file=str(path)) from error
