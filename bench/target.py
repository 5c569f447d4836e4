"""What afbus is to reach, as ratios to systems that were measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .figure import OURS, Figure, best

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Target:
    """A ratio to the best of some systems."""

    row: str
    factor: float
    #: How the names of the systems begin; empty: all peers.
    against: str = ""

    def __str__(self) -> str:
        """What a person reads."""
        return f"{self.factor:g} x {self.against or 'the best peer'}"

    def judge(
        self, figures: Iterable[Figure], yardsticks: frozenset[str]
    ) -> tuple[float, str, bool] | None:
        """Return the ratio, to whom, and whether it is reached; None without both figures."""
        row = {figure.system: figure for figure in figures if figure.row == self.row}
        others = [
            figure
            for figure in row.values()
            if not is_ours(figure.system) and figure.system not in yardsticks
        ]
        if self.against:
            others = [one for one in row.values() if one.system.startswith(self.against)]
        ours, other = row.get(OURS), best(others)
        if ours is None or other is None or not other.value:
            return None
        ratio = ours.value / other.value
        reached = ratio <= self.factor if ours.better == "lower" else ratio >= self.factor
        return ratio, other.system, reached


def is_ours(system: str) -> bool:
    """Whether a system is afbus, in any of its ways."""
    return system == OURS or system.startswith(f"{OURS} ") or system.startswith(f"{OURS},")


TARGETS: Final = [
    Target("local_rtt_64", 0.4),
    Target("local_rtt_64_nospin", 1.15, "pipe"),
    Target("local_rtt_64_nospin_split", 1.15, "pipe"),
    Target("local_rate_64_batch", 3),
    Target("local_rate_64_call", 1.5),
    Target("local_rate_64k_copy", 1.8, "unix"),
    Target("local_rate_64k_loan", 1.2, "iceoryx2"),
    Target("local_rate_1m_loan", 1.2, "iceoryx2"),
    Target("local_fan8_64", 1.2, "pyzmq"),
    Target("local_fan8_64k", 1.5, "iceoryx2"),
    Target("cross_rate_64", 1.5, "zenoh quic"),
    Target("cross_bw_64k", 1.5, "zenoh quic"),
    Target("cross_bw_64k", 1, "pyzmq curve"),
    Target("cross_rtt_64", 1, "zenoh quic"),
    Target("local_cpu_64", 1),
    Target("cross_cpu_64", 1),
    Target("match_1m", 1.5, "afbus, 10,000"),
]
