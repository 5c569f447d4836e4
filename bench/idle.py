"""Memory of the agent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from .ours import HostBus
from .wire import KIB, MIB

if TYPE_CHECKING:
    from .stage import Stage

COUNT: Final = 500


def agent_bytes(agent: int) -> tuple[int, int]:
    """Resident memory of the agent in bytes: all, and all but the rings."""
    fields = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{agent}/status").read_text().splitlines()
        if line.startswith(("VmRSS", "RssShmem"))
    )
    sizes = {name: int(value.split()[0]) * KIB for name, value in fields.items()}
    return sizes["VmRSS"], sizes["VmRSS"] - sizes["RssShmem"]


def memory(stage: Stage) -> dict[str, float]:
    """Measure an agent that has one bus and one endpoint, and then many that do nothing."""
    with stage.part() as part:
        bus = HostBus(part)
        everything, before = agent_bytes(bus.agents[0])
        sockets = [bus.join(f"idle{number}") for number in range(COUNT)]
        after = agent_bytes(bus.agents[0])[1]
        for one in sockets:
            one.close()
    return {"agent_idle": everything / MIB, "endpoint_idle": (after - before) / COUNT / KIB}
