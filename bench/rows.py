"""What is measured: the rows, and which systems run in turns for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from . import idle, match
from .cluster import ClusterStage
from .link import LINK
from .ours import AFBUS, AFBUS_AIOQUIC, AFBUS_SWITCHED
from .peers import bare_quic, dbus, iceoryx, inet, nats, pipe, zenoh, zeromq
from .stage import Stage, WideStage
from .wire import KIB, MIB, System, Traffic, one_way, round_trip

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    unit: str
    better: str
    #: What is measured.
    text: str


_MESSAGES: Final = ("messages/s", "higher")
_DELIVERIES: Final = ("deliveries/s", "higher")
_TIME: Final = ("us", "lower")
_CPU: Final = ("s/M", "lower")
_MB: Final = ("MB/s", "higher")

ROWS: Final = {
    row.name: row
    for row in (
        Row("local_rtt_64", *_TIME, "64 B and their echo, everybody waits as he likes"),
        Row("local_rtt_64_nospin", *_TIME, "the same, nobody spins, both ends on one CPU"),
        Row("local_rtt_64_nospin_split", *_TIME, "the same, the ends on two CPUs"),
        Row("local_rate_64_batch", *_MESSAGES, "64 B one way, many a call where that can be"),
        Row("local_rate_64_call", *_MESSAGES, "64 B one way, a call a message at both ends"),
        Row("local_cpu_64", *_CPU, "CPU seconds of all processes a million of these, in batches"),
        Row("local_rate_1k_batch", *_MESSAGES, "1 KiB one way, many a call"),
        Row("local_rate_64k_copy", *_MESSAGES, "64 KiB one way, copied in and out"),
        Row("local_rate_1m_copy", *_MESSAGES, "1 MiB one way, copied in and out"),
        Row("local_rate_64k_loan", *_MESSAGES, "64 KiB one way, written and read in place"),
        Row("local_rate_1m_loan", *_MESSAGES, "1 MiB one way, written and read in place"),
        Row("local_fan8_64", *_DELIVERIES, "64 B to eight readers, all get all"),
        Row("local_fan8_64k", *_DELIVERIES, "64 KiB to eight readers, all get all"),
        Row("local_fan64_64", *_DELIVERIES, "64 B to 64 readers, all get all"),
        Row("local_fan64_64k", *_DELIVERIES, "64 KiB to 64 readers, all get all"),
        Row(
            "match_1m",
            *_TIME,
            "work of the agent for one message, of which one in 1,000,000 masks wants to hear",
        ),
        Row("match_1m_grant", *_TIME, "one of these masks: asked for, granted, in force"),
        Row("match_1m_memory", "B", "lower", "memory of the agent for one of these masks"),
        Row("agent_idle", "MiB", "lower", "memory of an agent with a bus and an endpoint"),
        Row("endpoint_idle", "KiB", "lower", "memory of the agent for one more, without rings"),
        Row("cross_rtt_64", *_TIME, "64 B and their echo between two hosts"),
        Row("cross_rate_64", *_MESSAGES, "64 B one way between two hosts"),
        Row("cross_cpu_64", *_CPU, "CPU seconds of all processes a million of these"),
        Row("cross_bw_64k", *_MB, "64 KiB one way between two hosts"),
        Row("link_64k", *_MB, "64 KiB on a link of nodes by itself, without agents"),
    )
}


@dataclass(frozen=True)
class Entry:
    """One system in a heat: how it is measured, and for which rows."""

    system: System
    rows: tuple[str, ...]
    #: Returns a value for each row.
    measure: Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Heat:
    """Systems that are measured in turns, so that the machine's moods hit all alike."""

    stage: type[Stage]
    entries: tuple[Entry, ...]


def _rtt(row: str, system: System, **traffic: Any) -> Entry:
    def measure(stage: Stage) -> dict[str, float]:
        return {row: round_trip(system, stage, Traffic(**traffic))["rtt"]}

    return Entry(system, (row,), measure)


def _way(system: System, rows: dict[str, str], factor: float = 1.0, **traffic: Any) -> Entry:
    """One way; `rows` says which row gets "rate", times the factor, and which "cpu"."""

    def measure(stage: Stage) -> dict[str, float]:
        found = one_way(system, stage, Traffic(**traffic))
        found["rate"] *= factor
        return {row: found[what] for row, what in rows.items()}

    return Entry(system, tuple(rows), measure)


_BUSES: Final = (nats.NATS, dbus.DAEMON, dbus.BROKER)
_LOCAL: Final = (
    pipe.PIPE,
    *pipe.UNIX,
    zeromq.IPC,
    zeromq.TCP,
    zenoh.UNIX,
    zenoh.TCP,
    zenoh.SHM,
    iceoryx.POLLED,
    iceoryx.EVENTS,
    *_BUSES,
)
_BATCH_64: Final = {"local_rate_64_batch": "rate", "local_cpu_64": "cpu"}
#: Whose calls carry one message each: measured once, for both rows.
_CALL_64: Final = {**_BATCH_64, "local_rate_64_call": "rate"}
#: afbus in both of its ways on one host, and everybody else.
_ALL: Final = (AFBUS, AFBUS_SWITCHED, *_LOCAL)
_LOANERS: Final = (AFBUS, iceoryx.POLLED, iceoryx.EVENTS, zenoh.SHM)
_WIDE: Final = (AFBUS, pipe.PIPE, zeromq.IPC, zenoh.UNIX, zenoh.SHM, iceoryx.EVENTS)
_CROSS: Final = (AFBUS, AFBUS_AIOQUIC, zenoh.QUIC, zenoh.TLS, zeromq.CURVE, nats.NATS_TLS)
_CROSS_PLAIN: Final = (inet.TLS, inet.TCP, inet.UDP, bare_quic.STOCK, bare_quic.OFFLOAD)

_MATCH: Final = ("match_1m", "match_1m_grant", "match_1m_memory")

HEATS: Final = [
    Heat(Stage, tuple(_rtt("local_rtt_64", one) for one in _ALL)),
    *(
        Heat(
            Stage,
            tuple(
                _rtt(f"local_rtt_64_nospin{name}", one, spins=False, pins=pins)
                for one in (AFBUS, pipe.PIPE, pipe.UNIX[0])
            ),
        )
        for name, pins in (("", (0, 0)), ("_split", (1, 0)))
    ),
    Heat(
        Stage,
        (
            _way(AFBUS, _BATCH_64),
            _way(AFBUS_SWITCHED, _BATCH_64),
            _way(AFBUS, {"local_rate_64_call": "rate"}, mode="call"),
            _way(pipe.CUT_PIPE, _BATCH_64),
            *(_way(one, _CALL_64) for one in _LOCAL),
        ),
    ),
    *(
        Heat(
            Stage,
            tuple(_way(one, {row: "rate"}, size=size) for one in (AFBUS, *others)),
        )
        for row, size, others in (
            ("local_rate_1k_batch", KIB, (pipe.PIPE, zeromq.IPC)),
            ("local_rate_64k_copy", 64 * KIB, (AFBUS_SWITCHED, *_LOCAL)),
            ("local_rate_1m_copy", MIB, (pipe.PIPE, pipe.UNIX[0], zeromq.IPC)),
        )
    ),
    *(
        Heat(
            Stage,
            tuple(_way(one, {row: "rate"}, size=size, mode="loan") for one in _LOANERS),
        )
        for row, size in (("local_rate_64k_loan", 64 * KIB), ("local_rate_1m_loan", MIB))
    ),
    *(
        Heat(
            stage,
            tuple(_way(one, {row: "rate"}, size=size, readers=readers) for one in systems),
        )
        for stage, row, size, readers, systems in (
            (Stage, "local_fan8_64", 64, 8, _ALL),
            (Stage, "local_fan8_64k", 64 * KIB, 8, _ALL),
            (WideStage, "local_fan64_64", 64, 64, _WIDE),
            (WideStage, "local_fan64_64k", 64 * KIB, 64, _WIDE),
        )
    ),
    Heat(
        Stage,
        tuple(
            Entry(AFBUS.but(name=name), _MATCH, partial(match.cost, crowd=crowd))
            for name, crowd in (
                (AFBUS.name, match.Million),
                ("afbus, 10,000 masks", match.TenThousand),
            )
        ),
    ),
    Heat(Stage, (Entry(AFBUS, ("agent_idle", "endpoint_idle"), idle.memory),)),
    Heat(ClusterStage, tuple(_rtt("cross_rtt_64", one) for one in (*_CROSS, *_CROSS_PLAIN))),
    Heat(
        ClusterStage,
        tuple(
            _way(one, {"cross_rate_64": "rate", "cross_cpu_64": "cpu"})
            for one in (*_CROSS, inet.CUT_TCP, *_CROSS_PLAIN)
        ),
    ),
    Heat(
        ClusterStage,
        tuple(
            _way(one, {"cross_bw_64k": "rate"}, 64 * KIB / 1e6, size=64 * KIB)
            for one in (*_CROSS, *_CROSS_PLAIN)
        ),
    ),
    Heat(
        ClusterStage,
        tuple(
            _way(one, {"link_64k": "rate"}, 64 * KIB / 1e6, size=64 * KIB)
            for one in (LINK, bare_quic.STOCK, bare_quic.OFFLOAD)
        ),
    ),
]

#: What is no peer, but shows what the machine can do.
YARDSTICKS: Final = frozenset(
    entry.system.name for heat in HEATS for entry in heat.entries if entry.system.is_yardstick
)
