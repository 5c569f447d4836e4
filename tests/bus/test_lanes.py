"""Lanes, as people see them: which there are, and what goes through them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afbus import Event

if TYPE_CHECKING:
    from tests.bus.conftest import Scene


def lanes(scene: Scene) -> list[dict[str, Any]]:
    """What the list says."""
    return [dict(row) for row in scene.master.listing("lanes", scene.path)]


def test_lanes_are_listed(scene: Scene) -> None:
    """From whom to whom, what they cost, and how much has gone; a bus of total order has none."""
    one, other = scene.join("1.1"), scene.join("1.2")
    assert lanes(scene) == []
    for number in range(10):
        one.sendto(b"%d" % number, scene.address("1.2"))
    assert scene.read_all(other) == [b"%d" % number for number in range(10)]
    rows = lanes(scene)
    (bus,) = scene.master.listing("buses", scene.path)
    if bus["order"] == "total":
        assert rows == []
        return
    (row,) = rows
    assert (row["address"], row["to"], row["kind"]) == ("1.1", ["1.2"], "unicast")
    assert row["messages"] == 9, "the first one went by the switch"
    assert row["bytes"] >= 4096
    queues = {each["address"]: each for each in scene.master.listing("queues", scene.path)}
    assert [queues[name]["lanes_out"] for name in ("1.1", "1.2")] == [1, 0]
    assert [queues[name]["lanes_in"] for name in ("1.1", "1.2")] == [0, 1]
    assert (queues["1.1"]["sent"], queues["1.2"]["received"]) == (11, 11)
    other.close()
    scene.await_notice(Event.LEFT)
    assert lanes(scene) == []
