"""An application: makes the bus /demo, and tells all who want to hear what time it is."""

import asyncio
from datetime import UTC, datetime

import afbus


async def main() -> None:
    """Tell the time once a second."""
    # Who may come at all is decided by the policy of the cluster; here all of them may join.
    async with (
        afbus.create("/demo", "demo.master", authorize=lambda question: True),
        afbus.join("/demo", name="demo.clock") as clock,
    ):
        while True:
            now = datetime.now(UTC)
            await clock.publish("clock.second zone=utc", now.isoformat(timespec="seconds").encode())
            await asyncio.sleep(1 - now.microsecond / 1e6)


asyncio.run(main())
