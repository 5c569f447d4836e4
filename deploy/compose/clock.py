"""An application: makes the bus /demo, and tells all who want to hear what time it is.

The bus is the cluster's, whose policy says who may do what; `clock.py host` makes one of this host.
"""

import asyncio
import sys
from datetime import UTC, datetime

import afbus


async def main(scope: str) -> None:
    """Tell the time once a second."""
    async with (
        afbus.create("/demo", "demo.master", scope=scope),
        afbus.join("/demo", name="demo.clock") as clock,
    ):
        while True:
            now = datetime.now(UTC)
            await clock.publish("clock.second zone=utc", now.isoformat(timespec="seconds").encode())
            await asyncio.sleep(1 - now.microsecond / 1e6)


asyncio.run(main(*sys.argv[1:] or ["cluster"]))
