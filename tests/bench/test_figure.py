"""What is made of figures: statistics, JSON, ratios, the table."""

from __future__ import annotations

import json

import pytest
from bench.figure import Figure, best, decode, encode
from bench.rows import HEATS, ROWS, YARDSTICKS
from bench.run import Run
from bench.table import lines, markdown, peers, rows_of
from bench.target import TARGETS, Target, is_ours

NAMES = (
    "local_rtt_64 local_rtt_64_nospin local_rate_64_batch local_rate_64_call local_rate_64k_copy "
    "local_rate_64k_loan local_rate_1m_loan local_fan8_64 local_fan8_64k cross_rate_64 "
    "cross_bw_64k cross_rtt_64 local_cpu_64 cross_cpu_64 match_1m"
)


def figure(system: str, *runs: float, row: str = "local_rtt_64") -> Figure:
    """A figure of a row."""
    return Figure.of(row, system, ROWS[row].unit, ROWS[row].better, runs)


RTT = [
    figure("afbus", 2.0, 1.0, 9.0),
    figure("pipe", 8.0, 7.0, 6.0),
    figure("iceoryx2", 5.0, 4.0, 4.0),
]
RATE = [
    figure("afbus", 30.0, row="local_rate_64_batch"),
    figure("pipe, cut by its users", 100.0, row="local_rate_64_batch"),
    figure("pipe", 10.0, row="local_rate_64_batch"),
]


def test_figure_is_the_median_and_its_spread_the_range() -> None:
    """The value is the median of the turns, the spread their range as a part of it."""
    assert RTT[0].value == 2.0
    assert RTT[0].spread == 4.0
    assert figure("pipe", 3.0, 1.0).value == 2.0
    assert figure("pipe", 0.0, 0.0).spread == 0.0


def test_best_is_the_lowest_or_the_highest() -> None:
    """What is better depends on the row."""
    assert best(RTT) is RTT[0]
    assert best(RATE) is RATE[1]
    assert best([]) is None


def test_json_has_the_shape_that_is_promised() -> None:
    """A list of objects with six keys, and nothing else."""
    found = json.loads(encode([*RTT, *RATE]))
    keys = {"row", "system", "value", "unit", "better", "runs"}
    assert [set(each) for each in found] == [keys] * 6
    assert found[0] == {
        "row": "local_rtt_64",
        "system": "afbus",
        "value": 2.0,
        "unit": "us",
        "better": "lower",
        "runs": [2.0, 1.0, 9.0],
    }
    assert json.loads(encode([])) == []


def test_json_is_read_again() -> None:
    """What was written is read as it was."""
    assert decode(encode([*RTT, *RATE])) == [*RTT, *RATE]


@pytest.mark.parametrize("text", ["", "{}x", '[{"row": 1}]', "[1]", '[{"runs": [1]}]'])
def test_what_is_no_list_of_figures_is_refused(text: str) -> None:
    """One kind of error, whatever is wrong."""
    with pytest.raises(ValueError):  # noqa: PT011 (JSON's own error is one)
        decode(text)


def test_all_rows_that_are_asked_for_are_there() -> None:
    """Each row has systems, and ours is among them; each has a name that is known."""
    measured = {
        (row, entry.system.name) for heat in HEATS for entry in heat.entries for row in entry.rows
    }
    assert {row for row, _ in measured} == set(ROWS)
    assert {*NAMES.split()} <= set(ROWS)
    assert all((row, "afbus") in measured for row in ROWS)


def test_targets_name_what_is_measured() -> None:
    """A target that is about nobody would always be missed."""
    for target in TARGETS:
        systems = {
            entry.system.name
            for heat in HEATS
            for entry in heat.entries
            if target.row in entry.rows
        }
        assert any(
            name.startswith(target.against) if target.against else not is_ours(name)
            for name in systems
        ), target


@pytest.mark.parametrize(
    ("target", "want"),
    [
        (Target("local_rtt_64", 0.4), (0.5, "iceoryx2", False)),
        (Target("local_rtt_64", 0.5), (0.5, "iceoryx2", True)),
        (Target("local_rtt_64", 1, "pipe"), (2 / 7, "pipe", True)),
        (Target("local_rtt_64", 1, "zenoh"), None),
        (Target("local_rate_64_batch", 3), (3.0, "pipe", True)),
        (Target("local_rate_64_batch", 3.5), (3.0, "pipe", False)),
        (Target("cross_rtt_64", 1), None),
    ],
)
def test_target_is_judged(target: Target, want: tuple[float, str, bool] | None) -> None:
    """Lower or higher, against all peers or some; yardsticks are no peers."""
    assert target.judge([*RTT, *RATE], YARDSTICKS) == want


def test_rows_are_sorted_from_best_to_worst() -> None:
    """Rows in their order, ours first in each."""
    found = rows_of([*reversed(RATE), *reversed(RTT)])
    assert [*found] == ["local_rtt_64", "local_rate_64_batch"]
    assert [one.system for one in found["local_rtt_64"]] == ["afbus", "iceoryx2", "pipe"]
    systems = [one.system for one in found["local_rate_64_batch"]]
    assert systems == ["afbus", "pipe, cut by its users", "pipe"]
    assert [one.system for one in peers(found["local_rate_64_batch"])] == ["pipe"]


def test_lines_say_median_spread_and_ratio() -> None:
    """One line a system, one a target."""
    text = lines(RTT)
    assert text[0].split() == ["local_rtt_64", "afbus", "2", "us", "+-200", "%"]
    assert text[1].endswith("afbus is 0.50 of it (best peer)")
    assert text[3].endswith("0.50 of iceoryx2; target 0.4 x the best peer: missed")


def test_markdown_is_made_of_the_figures_alone() -> None:
    """The table of all rows, a table a row, what was not measured, notes and plots."""
    text = markdown(
        decode(encode([*RTT, *RATE])),
        header="Here, now.",
        absent={"nats": "no command"},
        notes=["A note."],
        plots={"local_rtt_64": "plots/local_rtt_64.svg"},
    )
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("| [local_rtt_64]"))
    assert row.startswith(
        "| [local_rtt_64](#local_rtt_64) | 2 us | 400 % | iceoryx2 | 4 us | 0.50 |"
    )
    assert "Here, now." in lines
    assert "* A note." in lines
    assert "* nats: no command" in lines
    assert "![local_rtt_64](plots/local_rtt_64.svg)" in lines
    assert "| iceoryx2 | 4 | 25 % | 5, 4, 4 |" in lines
    assert "| (pipe, cut by its users) | 100 | 0 % | 100 |" in lines
    assert markdown([], header="", absent={}, notes=[], plots={}).startswith("# Figures")


def test_systems_are_named_with_what_they_lack() -> None:
    """All systems are named; a name is there for what is missing."""
    systems = Run(HEATS).systems()
    assert systems["afbus"] == ""
    assert {"pyzmq curve", "zenoh quic", "iceoryx2", "nats", "dbus-broker"} <= set(systems)
