"""AF_BUS in user space: a bus with multicast, policy and federation between hosts.

proto     the shared language, pure: addresses, control items, errors, tables, frames, limits
node      the agent: endpoints, routes, mirror of the master's tables, local door, peers
client    what an application imports: the socket of the bus, and asyncio on top of it
cli       the `afbus` command
_datapath the Rust crate of datapath/: rings, lanes, switch, match index, filters
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client.authority import Question as Question
    from .client.bus import Bus as Bus
    from .client.bus import create as create
    from .client.mailbox import Stream as Stream
    from .client.member import Member as Member
    from .client.member import Subscription as Subscription
    from .client.member import join as join
    from .client.message import Message as Message

__version__ = "0.1.0"

# Where the names that need asyncio come from: a program of sockets alone does not pay for it.
_ON_DEMAND = {
    "Bus": "client.bus",
    "Member": "client.member",
    "Message": "client.message",
    "Question": "client.authority",
    "Stream": "client.mailbox",
    "Subscription": "client.member",
    "create": "client.bus",
    "join": "client.member",
}


def __getattr__(name: str) -> object:
    """Import what needs asyncio when it is first asked for."""
    from importlib import import_module

    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'afbus' has no attribute {name!r}")
    value: object = getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
    globals()[name] = value
    return value
