"""Each system plays a tiny round of each kind. No figure is judged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from bench import match
from bench.cluster import ClusterStage
from bench.link import LINK
from bench.plot import draw
from bench.rows import HEATS, Entry, Heat
from bench.run import Run
from bench.stage import Stage
from bench.wire import KIB, System, Traffic, one_way, round_trip

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench.stage import Player
    from bench.wire import Wire

WINDOW_S = 0.05

SYSTEMS = {
    (heat.stage, entry.system.name): entry.system
    for heat in HEATS
    for entry in heat.entries
    if entry.system is not LINK and entry.system.name != "afbus, 10,000 masks"
}
LOANERS = ("afbus", "iceoryx2", "zenoh shm")
LOCAL = [name for stage, name in SYSTEMS if stage is Stage]
CROSS = [name for stage, name in SYSTEMS if stage is ClusterStage]


@pytest.fixture(scope="module")
def here() -> Iterator[Stage]:
    """One host."""
    with Stage() as stage:
        yield stage


@pytest.fixture(scope="module")
def hosts() -> Iterator[ClusterStage]:
    """Two hosts."""
    if why := ClusterStage.obstacle():
        pytest.skip(why)
    with ClusterStage() as stage:
        yield stage


def need(system: System) -> None:
    """Skip what is not installed, by name."""
    if why := system.missing():
        pytest.skip(f"{system.name}: {why}")


def is_figure(found: dict[str, float]) -> bool:
    """Whether something was measured."""
    return bool(found) and all(value > 0 and math.isfinite(value) for value in found.values())


@pytest.mark.cluster
@pytest.mark.parametrize("name", LOCAL)
def test_local_round(here: Stage, name: str) -> None:
    """Round trip, one way, to two readers, in place."""
    system = SYSTEMS[Stage, name]
    need(system)
    if not system.is_yardstick:
        assert is_figure(round_trip(system, here, Traffic(), WINDOW_S))
        two = Traffic(size=64 * KIB, readers=2)
        assert is_figure(one_way(system, here, two, WINDOW_S))
    assert is_figure(one_way(system, here, Traffic(), WINDOW_S))
    if name in LOANERS:
        loan = Traffic(size=64 * KIB, mode="loan")
        assert is_figure(one_way(system, here, loan, WINDOW_S))


@pytest.mark.cluster
@pytest.mark.parametrize("name", CROSS)
def test_cross_round(hosts: ClusterStage, name: str) -> None:
    """Round trip and one way between hosts."""
    system = SYSTEMS[ClusterStage, name]
    need(system)
    if "cut by" not in name:
        assert is_figure(round_trip(system, hosts, Traffic(), WINDOW_S))
    assert is_figure(one_way(system, hosts, Traffic(), WINDOW_S))


@pytest.mark.cluster
def test_link_round(hosts: ClusterStage) -> None:
    """A link by itself, one way."""
    need(LINK)
    assert is_figure(one_way(LINK, hosts, Traffic(size=64 * KIB), WINDOW_S))


class Few(match.Crowd):
    """So many that they come in more than one request."""

    masks = 2_500


@pytest.mark.cluster
def test_match_round(here: Stage) -> None:
    """A message among masks of others."""
    found = match.cost(here, Few)
    assert found.keys() == {"match_1m", "match_1m_grant", "match_1m_memory"}
    assert is_figure(found)


def test_turns_alternate_and_failures_are_named(here: Stage) -> None:
    """Systems take turns; one that fails is named and left out, what is missing is named too."""
    order: list[str] = []

    def entry(name: str, *, fails: bool = False, lacks: str = "") -> Entry:
        def measure(stage: Stage) -> dict[str, float]:
            order.append(name)
            if fails:
                raise RuntimeError("no luck")
            return {"local_rtt_64": 1.0, "local_cpu_64": 2.0}

        system = System(name, _no_wire, obstacle=lambda: lacks)
        return Entry(system, ("local_rtt_64", "local_cpu_64"), measure)

    heat = Heat(Stage, (entry("afbus"), entry("bad", fails=True), entry("new", lacks="no wheel")))
    run = Run([heat], rows=["local_rtt_64"], runs=2)
    told: list[str] = []
    figures = run.measure(told.append)
    assert order == ["afbus", "bad", "afbus"]
    assert [(one.row, one.system, one.runs) for one in figures] == [
        ("local_rtt_64", "afbus", (1.0, 1.0))
    ]
    assert run.absent["new"] == "no wheel"
    assert run.absent["bad, local_rtt_64"] == "failed: no luck"
    assert told[0] == "local_rtt_64, local_cpu_64: afbus, bad"


def _no_wire(stage: Stage, traffic: Traffic) -> Wire:
    raise NotImplementedError


def test_rows_and_systems_are_chosen(here: Stage) -> None:
    """Rows by name, systems by how they begin."""
    run = Run(HEATS, rows=["local_rtt_64"], systems=["pipe"], runs=1)
    (one,) = run.measure(lambda _: None)
    assert (one.row, one.system, len(one.runs)) == ("local_rtt_64", "pipe", 1)


def test_player_that_ends_early_is_told(here: Stage) -> None:
    """A round does not wait for who is gone."""

    def leave(player: Player) -> None:
        """End at once."""

    def stay(player: Player) -> None:
        player.ready()

    with pytest.raises(RuntimeError, match="ended"):
        here.play({}, {"a": _fail, "b": stay}, ("a",))


def _fail(player: Player) -> None:
    player.ready()
    raise ConnectionError


def test_plots_are_drawn(tmp_path: Path) -> None:
    """One file a row that has more than one system; the same figures give the same bytes."""
    pytest.importorskip("matplotlib")
    from tests.bench.test_figure import RATE, RTT

    files = draw([*RTT, *RATE], tmp_path / "plots")
    assert files == {
        "local_rtt_64": "plots/local_rtt_64.svg",
        "local_rate_64_batch": "plots/local_rate_64_batch.svg",
    }
    before = [(tmp_path / name).read_bytes() for name in files.values()]
    draw([*RTT, *RATE], tmp_path / "plots")
    assert before == [(tmp_path / name).read_bytes() for name in files.values()]
    assert all(len(text) < 100_000 for text in before)
