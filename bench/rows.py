"""What is measured, of afbus and of a pair of plain pipes: one function a row and system.

Rates count messages (or deliveries) from the first one that a receiver gets to the last.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import afbus
from afbus.proto.control import MessageTerms, encode

from .row import BATCH, KIB, MIB, Row, median_us, rate
from .stage import BUS, TOPIC, HostStage

if TYPE_CHECKING:
    from collections.abc import Callable

    from .stage import Player, Stage

# --- round trip ---


def afbus_rtt(stage: Stage, count: int = 20_000) -> float:
    """Microseconds of one 64 B request and its answer, the median."""

    def echo(player: Player) -> None:
        with stage.join("echo") as me:
            back = afbus.BusAddress(BUS, "ping")
            player.ready()
            for _ in range(count):
                me.sendto(me.recv(64), back)

    def ping(player: Player) -> float:
        with stage.join("ping") as me:
            there = afbus.BusAddress(BUS, "echo")
            player.ready()
            return median_us(count, lambda: (me.sendto(bytes(64), there), me.recv(64)))

    return float(stage.play({"echo": echo, "ping": ping})["ping"])


def pipe_rtt(stage: Stage, count: int = 20_000) -> float:
    """The same over two pipes."""
    there, back = os.pipe(), os.pipe()

    def echo(player: Player) -> None:
        player.ready()
        for _ in range(count):
            os.write(back[1], os.read(there[0], 64))

    def ping(player: Player) -> float:
        player.ready()
        return median_us(count, lambda: (os.write(there[1], bytes(64)), os.read(back[0], 64)))

    try:
        return float(stage.play({"echo": echo, "ping": ping})["ping"])
    finally:
        for end in (*there, *back):
            os.close(end)


# --- one way ---


def afbus_rate(size: int, batch: int, count: int) -> Callable[[Stage], float]:
    """Messages a second from one sender to one receiver."""

    def measure(stage: Stage) -> float:
        ring = 4 * MIB if size > 4 * KIB else MIB

        def source(player: Player) -> None:
            with stage.join("source", tx_bytes=ring) as me:
                there = afbus.BusAddress(BUS, "sink")
                bodies = [bytes(size)] * batch
                player.ready()
                if batch == 1:
                    for _ in range(count):
                        me.sendto(bodies[0], there)
                else:
                    for _ in range(count // batch):
                        assert me.sendmmsg(bodies, there) == batch

        def sink(player: Player) -> float:
            with stage.join("sink", rx_bytes=ring) as me:
                player.ready()
                return rate(count // batch * batch, lambda: len(me.recvmmsg(1024, size)))

        return float(stage.play({"sink": sink, "source": source})["sink"])

    return measure


def pipe_rate(size: int, batch: int, count: int) -> Callable[[Stage], float]:
    """The same over one pipe: a write a message (or a batch), and reads of 64 KiB or a message."""

    def measure(stage: Stage) -> float:
        out, into = os.pipe()

        def source(player: Player) -> None:
            player.ready()
            body, bodies = bytes(size), [bytes(size)] * batch
            for _ in range(count // batch):
                if batch == 1:
                    left = size - os.write(into, body)
                    while left:
                        left -= os.write(into, body[size - left :])
                else:
                    os.writev(into, bodies)

        def sink(player: Player) -> float:
            player.ready()
            part = max(64 * KIB, size)
            bytes_a_second = rate(count // batch * batch * size, lambda: len(os.read(out, part)))
            return bytes_a_second / size

        try:
            return float(stage.play({"sink": sink, "source": source})["sink"])
        finally:
            os.close(out)
            os.close(into)

    return measure


# --- to many ---


def afbus_fan(size: int, readers: int, count: int) -> Callable[[Stage], float]:
    """Deliveries a second of multicasts to several subscribers, all of which get every message."""

    def measure(stage: Stage) -> float:
        def source(player: Player) -> None:
            with stage.join("source", tx_bytes=MIB) as me:
                terms = [encode(MessageTerms(TOPIC))]
                there = afbus.BusAddress.multicast(BUS)
                bodies = [bytes(size)] * BATCH
                player.ready()
                for _ in range(count // BATCH):
                    assert me.sendmmsg(bodies, there, 0, terms) == BATCH
                me.sendmmsg([b"end"], there, 0, terms)

        def sink(player: Player, name: str) -> list[float]:
            with stage.join(name, match=True, rx_bytes=4 * MIB) as me:
                player.ready()
                got, begin, is_open = 0, 0.0, True
                while is_open:
                    batch = me.recvmmsg(1024, size)
                    begin = begin or time.perf_counter()
                    got += sum(len(data) == size for data, *_ in batch)
                    is_open = not any(data == b"end" for data, *_ in batch)
                return [got, begin, time.perf_counter()]

        roles: dict[str, Callable[[Player], Any]] = {
            f"sink{number}": partial(sink, name=f"sink{number}") for number in range(readers)
        }
        ends = [*stage.play({**roles, "source": source}).values()][:readers]
        return deliveries(ends)

    return measure


def pipe_fan(size: int, readers: int, count: int) -> Callable[[Stage], float]:
    """The same by writing batches to one pipe a subscriber."""

    def measure(stage: Stage) -> float:
        pipes = [os.pipe() for _ in range(readers)]

        def source(player: Player) -> None:
            player.ready()
            bodies = [bytes(size)] * BATCH
            for _ in range(count // BATCH):
                for _, into in pipes:
                    os.writev(into, bodies)

        def sink(player: Player, out: int) -> list[float]:
            player.ready()
            got, begin, total = 0, 0.0, count // BATCH * BATCH * size
            while got < total:
                got += len(os.read(out, 64 * KIB))
                begin = begin or time.perf_counter()
            return [got / size, begin, time.perf_counter()]

        roles: dict[str, Callable[[Player], Any]] = {
            f"sink{number}": partial(sink, out=out) for number, (out, _) in enumerate(pipes)
        }
        try:
            return deliveries([*stage.play({**roles, "source": source}).values()][:readers])
        finally:
            for out, into in pipes:
                os.close(out)
                os.close(into)

    return measure


def deliveries(ends: list[list[float]]) -> float:
    """Deliveries a second, from the first that anybody got to the last."""
    took = max(end for _, _, end in ends) - min(begin for _, begin, _ in ends)
    return sum(got for got, _, _ in ends) / took


# --- memory of the agent ---


def agent_bytes(stage: HostStage) -> tuple[int, int]:
    """Resident memory of the agent in bytes: all, and all but the rings."""
    fields = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{stage.agent}/status").read_text().splitlines()
        if line.startswith(("VmRSS", "RssShmem"))
    )
    sizes = {name: int(value.split()[0]) * KIB for name, value in fields.items()}
    return sizes["VmRSS"], sizes["VmRSS"] - sizes["RssShmem"]


def afbus_idle_agent(stage: HostStage) -> float:
    """MiB resident of an agent that has one bus and one endpoint."""
    return agent_bytes(stage)[0] / MIB


def afbus_idle_endpoint(stage: HostStage, count: int = 500) -> float:
    """KiB of the agent for an endpoint that has joined and does nothing, beyond its rings."""
    before = agent_bytes(stage)[1]
    sockets = [stage.join(f"idle{number}") for number in range(count)]
    after = agent_bytes(stage)[1]
    for one in sockets:
        one.close()
    return (after - before) / count / KIB


HOST_ROWS: Final = [
    Row("local_rtt_64", "us", "lower", {"afbus": afbus_rtt, "pipe": pipe_rtt}),
    *(
        Row(
            name,
            "messages/s",
            "higher",
            {"afbus": afbus_rate(size, batch, count), "pipe": pipe_rate(size, batch, count)},
        )
        for name, size, batch, count in (
            ("local_rate_64_call", 64, 1, 200_000),
            ("local_rate_64_batch", 64, BATCH, 2_000_000),
            ("local_rate_1k_batch", KIB, BATCH, 500_000),
            ("local_rate_64k_copy", 64 * KIB, 1, 20_000),
            ("local_rate_1m_copy", MIB, 1, 2_000),
        )
    ),
    Row(
        "local_fan8_64",
        "deliveries/s",
        "higher",
        {"afbus": afbus_fan(64, 8, 200_000), "pipe": pipe_fan(64, 8, 200_000)},
    ),
    Row("agent_idle", "MiB", "lower", {"afbus": afbus_idle_agent}),
    Row("endpoint_idle", "KiB", "lower", {"afbus": afbus_idle_endpoint}),
]
