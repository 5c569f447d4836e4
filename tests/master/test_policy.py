"""The policy: deny by default, rules that allow, errors that name file, line and key."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.master.policy import Action, Decision, Policy, load_policy, parse_policy
from afbus.proto.errors import ConfigError
from afbus.proto.terms import Terms

if TYPE_CHECKING:
    from pathlib import Path

    from afbus.proto.match import What

ALICE, UID = "principal/alice", "uid/1000@node-a"
FULL = """
# who runs the counters
[[rule]]
name = "metrics"
who = ["principal/collector-*", "uid/1000@node-a"]
bus = ["/metrics", "/tmp/*/bus"]
own = ["org.example.metrics.*"]
send = ["org.example.**", "topic:sensors.**"]
receive = ["topic:sensors.**"]
bind = true

[[rule]]
name = "watch"
who = ["principal/alice"]
bus = ["/**"]
receive = ["everything", "raw", "topic:**"]
monitor = true
"""


@pytest.fixture(scope="module")
def policy() -> Policy:
    """The policy above."""
    return parse_policy(FULL)


@pytest.mark.parametrize(
    ("action", "who", "path", "target", "rule"),
    [
        (Action.BIND, UID, b"/metrics", None, "metrics"),
        (Action.BIND, UID, b"/tmp/x/bus", None, "metrics"),
        (Action.BIND, UID, b"/tmp/x/y/bus", None, None),
        (Action.BIND, UID, b"/metrics/", None, None),
        (Action.BIND, "principal/collector-1", b"/metrics", None, "metrics"),
        (Action.BIND, "principal/collector-", b"/metrics", None, "metrics"),
        (Action.BIND, "principal/collector", b"/metrics", None, None),
        (Action.BIND, "principal/xcollector-1", b"/metrics", None, None),
        (Action.BIND, "uid/1000@node-b", b"/metrics", None, None),
        (Action.BIND, "uid/100@node-a", b"/metrics", None, None),
        (Action.BIND, ALICE, b"/metrics", None, None),
        (Action.MONITOR, ALICE, b"/metrics", None, "watch"),
        (Action.MONITOR, UID, b"/metrics", None, None),
        (Action.OWN, UID, b"/metrics", b"org.example.metrics.cpu", "metrics"),
        (Action.OWN, UID, b"/metrics", b"org.example.metrics.", "metrics"),
        (Action.OWN, UID, b"/metrics", b"org.example.metrics", None),
        (Action.OWN, UID, b"/metrics", b"org.example.metrics.cpu.0", None),
        (Action.OWN, UID, b"/metrics", b"orgXexample.metrics.cpu", None),
        (Action.SEND, UID, b"/metrics", b"org.example", "metrics"),
        (Action.SEND, UID, b"/metrics", b"org.example.a.b.c", "metrics"),
        (Action.SEND, UID, b"/metrics", b"org.examples", None),
        (Action.RECEIVE, UID, b"/metrics", b"org.example", None),
    ],
)
def test_decisions(
    policy: Policy, action: Action, who: str, path: bytes, target: bytes | None, rule: str | None
) -> None:
    """With the rule that allowed, or why not."""
    decision = policy.decide(action, who, path, target)
    assert decision.is_allowed is (rule is not None)
    assert decision.rule == (rule or "")
    if rule is None:
        assert who in decision.reason
        assert action.value in decision.reason


@pytest.mark.parametrize(
    ("action", "who", "what", "allowed"),
    [
        (Action.RECEIVE, UID, Terms("sensors"), True),
        (Action.RECEIVE, UID, Terms("sensors.cpu", ("host=a",)), True),
        (Action.RECEIVE, UID, Terms("sensor"), False),
        (Action.RECEIVE, UID, Terms("", ("host=a",)), False),
        (Action.RECEIVE, UID, Terms(), False),
        (Action.RECEIVE, UID, b"\1" * 64, False),
        (Action.SEND, UID, Terms("sensors.cpu"), True),
        (Action.SEND, UID, b"\1" * 64, False),
        (Action.RECEIVE, UID, Terms("sensorsx"), False),
        (Action.RECEIVE, ALICE, Terms(), True),
        (Action.RECEIVE, ALICE, Terms("", ("host=a",)), True),
        (Action.RECEIVE, ALICE, bytes(64), True),
        (Action.RECEIVE, ALICE, b"\1" * 64, True),
        (Action.SEND, ALICE, Terms("sensors.cpu"), False),
    ],
)
def test_d9_multicasts(policy: Policy, action: Action, who: str, what: What, allowed: bool) -> None:
    """Hearing and sending are two grants; raw bits and everything have words of their own."""
    decision = policy.decide(action, who, b"/metrics", what, is_multicast=True)
    assert decision.is_allowed is allowed


def test_d9_hearing_everything_by_raw_bits_needs_both_words() -> None:
    """An all-zero mask hears everything, and is raw."""
    for words, some, everything in ((["raw"], True, False), (["raw", "everything"], True, True)):
        policy = rule_of(receive=words)
        for bits, allowed in ((b"\1" * 64, some), (bytes(64), everything)):
            decision = policy.decide(Action.RECEIVE, ALICE, b"/b", bits, is_multicast=True)
            assert decision.is_allowed is allowed
    decision = rule_of(receive=["everything"]).decide(
        Action.RECEIVE, ALICE, b"/b", bytes(64), is_multicast=True
    )
    assert not decision.is_allowed


def test_a_raw_address_is_not_a_name() -> None:
    """The same bytes mean two things, and each has its own rule."""
    name = b"12345678"
    own, raw = rule_of(send=["12345678"]), rule_of(send=["raw"])
    assert own.decide(Action.SEND, ALICE, b"/b", name).is_allowed
    assert not own.decide(Action.SEND, ALICE, b"/b", name, is_multicast=True).is_allowed
    assert raw.decide(Action.SEND, ALICE, b"/b", name, is_multicast=True).is_allowed
    assert not raw.decide(Action.SEND, ALICE, b"/b", name).is_allowed


def rule_of(**keys: list[str] | bool) -> Policy:
    """Return a policy of one rule for alice on /b."""
    lines = [
        f"{key} = {str(value).lower() if value is True else value}" for key, value in keys.items()
    ]
    head = '[[rule]]\nname = "r"\nwho = ["principal/alice"]\nbus = ["/b"]\n'
    return parse_policy(head + "\n".join(lines).replace("'", '"'))


def test_deny_is_the_default() -> None:
    """An empty file allows nothing."""
    policy = parse_policy("")
    for action in Action:
        target = b"x" if action in (Action.OWN, Action.SEND, Action.RECEIVE) else None
        decision = policy.decide(action, ALICE, b"/b", target)
        assert not decision.is_allowed
        assert decision.reason.startswith("no rule is about it")


def test_a_refusal_says_how_many_rules_there_are() -> None:
    """None, one, or several about whom and where it is."""
    for count, verdict in (
        (0, "no rule is about it"),
        (1, "the rule about it does not allow it"),
        (2, "none of 2 rules about it allows it"),
    ):
        text = '[[rule]]\nname = "{}"\nwho = ["principal/alice"]\nbus = ["/b"]\nbind = true\n'
        policy = parse_policy("".join(text.format(number) for number in range(count)))
        reason = policy.decide(Action.OWN, ALICE, b"/b", b"shop").reason
        assert reason == f"{verdict}: {ALICE} may not own shop on /b"


def test_odd_bytes_are_compared_as_commands_show_them() -> None:
    """Paths and addresses that are not text, with the escapes of `afbus list`."""
    policy = parse_policy(
        '[[rule]]\nname = "r"\nwho = ["uid/*@*"]\nbus = ["/a%3Ab", "%00x", "/\xfc"]\n'
        'own = ["a%20b", "0xff00*", "n%3A1"]\n'
    )
    for path in (b"/a:b", b"\0x", "/\xfc".encode()):
        for name in (b"a b", b"\xff\x00\x01", b"n:1"):
            assert policy.decide(Action.OWN, UID, path, name).is_allowed
    assert not policy.decide(Action.OWN, UID, b"/ab", b"a b").is_allowed
    assert not policy.decide(Action.OWN, UID, b"/a:b", b"a%20b").is_allowed


PARTS = st.lists(st.sampled_from(["a", "b", "*", "**", "a*", "*b"]), min_size=1, max_size=4)
WORDS = st.lists(st.sampled_from(["a", "b", "ab", ""]), min_size=1, max_size=4)


def slow_fits(pattern: list[str], words: list[str]) -> bool:
    """Compare component by component, trying everything."""
    if not pattern:
        return not words
    head, *rest = pattern
    if head == "**":
        return any(slow_fits(rest, words[count:]) for count in range(len(words) + 1))
    if not words:
        return False
    expression = "".join(".*" if one == "*" else one for one in head)
    return re.fullmatch(expression, words[0]) is not None and slow_fits(rest, words[1:])


@given(PARTS, WORDS)
def test_patterns_are_as_a_slow_comparison(pattern: list[str], words: list[str]) -> None:
    """`*` within a component, `**` for any number of them."""
    name = ".".join(words)
    if not name:
        return
    policy = rule_of(own=[".".join(pattern)])
    fast = policy.decide(Action.OWN, ALICE, b"/b", name.encode()).is_allowed
    assert fast is slow_fits(pattern, words)


HEAD = '[[rule]]\nname = "r"\nwho = ["uid/*@*"]\nbus = ["/b"]\n'


@pytest.mark.parametrize(
    ("text", "line", "key", "why"),
    [
        ("a = [", 1, "", "line 1"),
        ("colour = 1", 1, "colour", "only"),
        ("rule = 1", 1, "rule", "list"),
        ("[rule]\nname = 1", 1, "rule", "list"),
        ("rule = [1]", 1, "rule", "is not a"),
        (HEAD + "own = ['a']\ncolour = 1", 6, "rule 1, colour", "not known"),
        (HEAD + "own = ['a']\n\n" + HEAD + "own = ['b']", 8, "rule 2, name", "rule 1"),
        ("[[rule]]\nown = ['a']", 1, "rule 1, name", "needed"),
        ("[[rule]]\nname = 1\nown = ['a']", 2, "rule 1, name", "needed"),
        ('[[rule]]\nname = "a\\n"\nown = ["a"]', 2, "rule 1, name", "letters"),
        ('\n[[rule]]\nname = "a"\nown = ["a"]', 2, "rule 1, who", "needed"),
        ('[[rule]]\nname = "a"\nwho = []', 3, "rule 1, who", "empty"),
        ('[[rule]]\nname = "a"\nwho = "x"', 3, "rule 1, who", "list"),
        ('[[rule]]\nname = "a"\nwho = ["root"]', 3, "rule 1, who", "neither"),
        ('[[rule]]\nname = "a"\nwho = ["uid/x@n"]', 3, "rule 1, who", "neither"),
        ('[[rule]]\nname = "a"\nwho = ["uid/1"]', 3, "rule 1, who", "neither"),
        ('[[rule]]\nname = "a"\nwho = ["uid/*@*"]', 1, "rule 1, bus", "needed"),
        ('[[rule]]\nname = "a"\nwho = ["uid/*@*"]\nbus = [""]', 4, "rule 1, bus", "empty"),
        (HEAD, 1, "", "allows nothing"),
        (HEAD + "bind = false", 1, "", "allows nothing"),
        (HEAD + "bind = 1", 5, "rule 1, bind", "neither"),
        (HEAD + "\n\nown = ['a**']", 7, "rule 1, own", "within a component"),
        (HEAD + "own = ['topic:a']", 5, "rule 1, own", "nobody owns"),
        (HEAD + "own = ['raw']", 5, "rule 1, own", "nobody owns"),
        (HEAD + "send = ['a:b']", 5, "rule 1, send", "%3A"),
        (HEAD + "send = ['topic:']", 5, "rule 1, send", "empty"),
        (HEAD + "send = [1]", 5, "rule 1, send", "texts"),
        (HEAD + "send = []", 5, "rule 1, send", "empty"),
    ],
)
def test_errors_name_file_line_and_key(text: str, line: int, key: str, why: str) -> None:
    """So that nobody has to search."""
    with pytest.raises(ConfigError) as caught:
        parse_policy(text, "policy.toml")
    error = caught.value
    assert error.file.startswith("policy.toml")
    assert f"line {line}" in str(error)
    assert error.key == key
    assert why in str(error)


def test_what_changed_between_two_policies(policy: Policy) -> None:
    """By the names of the rules; order and the order within mean nothing."""
    rules = FULL.split("\n\n")
    again = parse_policy("\n".join([rules[1], rules[0]]))
    assert again.digest == policy.digest
    assert not policy.compare(again)
    assert str(policy.compare(again)) == "same"
    newer = parse_policy(FULL.replace("bind = true", "bind = false").replace('"watch"', '"look"'))
    change = policy.compare(newer)
    assert (change.added, change.removed, change.changed) == (("look",), ("watch",), ("metrics",))
    assert str(change) == "added look; removed watch; changed metrics"
    assert newer.digest != policy.digest


def test_files(tmp_path: Path) -> None:
    """What cannot be read names the file."""
    file = tmp_path / "policy.toml"
    with pytest.raises(ConfigError, match=r"policy\.toml: cannot be read"):
        load_policy(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_policy(file)
    file.write_bytes(b"#" * ((4 << 20) + 1))
    with pytest.raises(ConfigError, match="limit"):
        load_policy(file)
    file.write_text(FULL)
    assert load_policy(file).decide(Action.MONITOR, ALICE, b"/b") == Decision(True, "watch")


def test_a_large_policy_decides_quickly() -> None:
    """10,000 rules: a decision that was asked before looks only at the rules about its asker."""
    text = "\n".join(
        f'[[rule]]\nname = "r{n}"\nwho = ["principal/p{n}"]\nbus = ["/b{n}"]\nown = ["n{n}"]'
        for n in range(10_000)
    )
    policy = parse_policy(text)
    for _ in range(1_000):
        assert policy.decide(Action.OWN, "principal/p77", b"/b77", b"n77").is_allowed


def test_a_topic_less_multicast_needs_all_topics() -> None:
    """`*` is one component, and there is none."""
    for word, allowed in (("topic:*", False), ("topic:**", True), ("topic:**.**", False)):
        decision = rule_of(send=[word]).decide(
            Action.SEND, ALICE, b"/b", Terms("", ("a=b",)), is_multicast=True
        )
        assert decision.is_allowed is allowed


def test_d7_a_reach_is_all_that_somebody_may_send_to(policy: Policy) -> None:
    """The addresses of all rules about it, each once and sorted; topics are no addresses."""
    more = parse_policy(
        FULL
        + """
[[rule]]
name = "more"
who = ["uid/1000@node-a", "principal/alice"]
bus = ["/metrics"]
send = ["hall", "org.example.**"]
"""
    )
    assert policy.get_reach(UID, b"/metrics") == ("org.example.**",)
    assert more.get_reach(UID, b"/metrics") == ("hall", "org.example.**")
    assert more.get_reach(ALICE, b"/metrics") == ("hall", "org.example.**")
    assert more.get_reach(ALICE, b"/other") == ()
    assert more.get_reach("uid/1@node-a", b"/metrics") == ()
