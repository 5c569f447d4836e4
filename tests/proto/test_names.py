"""Names: the rules of D-Bus, and a slow obvious model of them (D4)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afbus.proto.names import (
    NameChange,
    NameFlags,
    NameOutcome,
    Names,
    ReleaseOutcome,
)

ALLOW, REPLACE, NO_QUEUE = NameFlags
N = b"org.example"


def test_d4_the_first_owns_and_the_others_wait_in_order() -> None:
    """And each release hands the name on."""
    names: Names[str] = Names()
    assert names.request(N, "a") == (NameOutcome.PRIMARY_OWNER, [(N, None, "a")])
    assert names.request(N, "b") == (NameOutcome.IN_QUEUE, [])
    assert names.request(N, "c") == (NameOutcome.IN_QUEUE, [])
    assert names.request(N, "b") == (NameOutcome.IN_QUEUE, [])
    assert names.request(N, "a") == (NameOutcome.ALREADY_OWNER, [])
    assert names.get_queue(N) == ("a", "b", "c")
    assert names.release(N, "a") == (ReleaseOutcome.RELEASED, [(N, "a", "b")])
    assert names.release(N, "c") == (ReleaseOutcome.RELEASED, [])
    assert names.release(N, "c") == (ReleaseOutcome.NOT_OWNER, [])
    assert names.release(N, "b") == (ReleaseOutcome.RELEASED, [(N, "b", None)])
    assert names.release(N, "b") == (ReleaseOutcome.NON_EXISTENT, [])
    assert N not in names
    assert len(names) == 0


def test_d4_replacement_needs_both_and_the_old_owner_is_next() -> None:
    """Unless the old owner does not queue."""
    names: Names[str] = Names()
    names.request(N, "a", ALLOW)
    names.request(N, "b")
    assert names.request(N, "c", REPLACE) == (NameOutcome.PRIMARY_OWNER, [(N, "a", "c")])
    assert names.get_queue(N) == ("c", "a", "b")
    assert names.request(N, "a", REPLACE) == (NameOutcome.IN_QUEUE, [])
    names.request(N, "c", ALLOW | NO_QUEUE)
    assert names.request(N, "b", REPLACE) == (NameOutcome.PRIMARY_OWNER, [(N, "c", "b")])
    assert names.get_queue(N) == ("b", "a")
    assert names.get_names("c") == ()


def test_d4_replace_is_not_remembered() -> None:
    """An owner that allows it later is not replaced by who asked before."""
    names: Names[str] = Names()
    names.request(N, "a")
    assert names.request(N, "b", REPLACE)[0] is NameOutcome.IN_QUEUE
    assert names.request(N, "a", ALLOW) == (NameOutcome.ALREADY_OWNER, [])
    assert names.get_owner(N) == "a"


def test_d4_who_does_not_queue_gives_up_its_place() -> None:
    """Also one that waited before."""
    names: Names[str] = Names()
    names.request(N, "a")
    names.request(N, "b")
    assert names.request(N, "b", NO_QUEUE) == (NameOutcome.EXISTS, [])
    assert names.get_queue(N) == ("a",)
    assert names.get_names("b") == ()


def test_d4_who_is_gone_loses_everything() -> None:
    """In the order of the names."""
    names: Names[str] = Names()
    for name in (b"z", b"m", b"a"):
        names.request(name, "x")
    names.request(b"m", "y")
    names.request(b"q", "y")
    names.request(b"q", "x")
    assert names.get_names("x") == (b"a", b"m", b"q", b"z")
    assert names.drop_owner("x") == [
        NameChange(b"a", "x", None),
        NameChange(b"m", "x", "y"),
        NameChange(b"z", "x", None),
    ]
    assert names.drop_owner("x") == []
    assert [names.get_owner(name) for name in (b"m", b"q")] == ["y", "y"]
    assert names.get_owner(b"z") is None
    assert names.get_queue(b"z") == ()


def test_d4_unknown_flags_are_no_flags() -> None:
    """They are refused, not carried along."""
    with pytest.raises(ValueError, match="invalid value"):
        NameFlags(8)


class SlowNames:
    """The rules as one list of rows (name, who, allows, queues), searched anew each time."""

    def __init__(self) -> None:
        self.rows: list[tuple[bytes, str, bool, bool]] = []

    def queue(self, name: bytes) -> list[tuple[bytes, str, bool, bool]]:
        """Return the rows of a name."""
        return [row for row in self.rows if row[0] == name]

    def owner(self, name: bytes) -> str | None:
        """Return the first."""
        rows = self.queue(name)
        return rows[0][1] if rows else None

    def request(self, name: bytes, who: str, flags: NameFlags) -> NameOutcome:
        """Do what the specification of D-Bus says, case by case."""
        row = (name, who, bool(flags & ALLOW), not flags & NO_QUEUE)
        rows = self.queue(name)
        others = [old for old in rows if old[1] != who]
        if not rows:
            outcome, rows = NameOutcome.PRIMARY_OWNER, [row]
        elif rows[0][1] == who:
            outcome, rows = NameOutcome.ALREADY_OWNER, [row, *others]
        elif flags & REPLACE and rows[0][2]:
            kept = others if others[0][3] else others[1:]
            outcome, rows = NameOutcome.PRIMARY_OWNER, [row, *kept]
        elif flags & NO_QUEUE:
            outcome, rows = NameOutcome.EXISTS, others
        elif len(others) < len(rows):
            outcome, rows = NameOutcome.IN_QUEUE, [row if r[1] == who else r for r in rows]
        else:
            outcome, rows = NameOutcome.IN_QUEUE, [*rows, row]
        self.rows = [old for old in self.rows if old[0] != name] + rows
        return outcome

    def remove(self, name: bytes | None, who: str) -> None:
        """Take rows away."""
        self.rows = [row for row in self.rows if row[1] != who or name not in (None, row[0])]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["request", "request", "request", "release", "drop"]),
        st.sampled_from([b"m", b"n"]),
        st.sampled_from("abcd"),
        st.integers(0, 7).map(NameFlags),
    ),
    max_size=30,
)


@given(STEPS)
def test_d4_fast_names_are_the_slow_model(steps: list[tuple[str, bytes, str, NameFlags]]) -> None:
    """Outcomes, queues, and the changes that lead from one owner to the next."""
    fast: Names[str] = Names()
    slow = SlowNames()
    for step, name, who, flags in steps:
        before = {one: slow.owner(one) for one in (b"m", b"n")}
        if step == "request":
            outcome, changes = fast.request(name, who, flags)
            assert outcome is slow.request(name, who, flags)
        elif step == "release":
            _, changes = fast.release(name, who)
            slow.remove(name, who)
        else:
            changes = fast.drop_owner(who)
            slow.remove(None, who)
        after = {one: slow.owner(one) for one in (b"m", b"n")}
        assert changes == [
            (one, before[one], after[one]) for one in (b"m", b"n") if before[one] != after[one]
        ]
        again: Names[str] = Names()
        for one in (b"m", b"n"):
            assert list(fast.get_queue(one)) == [row[1] for row in slow.queue(one)]
            for asker, kept in fast.get_entries(one):
                again.request(one, asker, kept)
            assert again.get_entries(one) == fast.get_entries(one)
        for one_who in "abcd":
            wanted = tuple(sorted(row[0] for row in slow.rows if row[1] == one_who))
            assert fast.get_names(one_who) == wanted
