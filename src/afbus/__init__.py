"""AF_BUS in user space: a bus with multicast, policy and federation between hosts.

proto     the shared language, pure: addresses, control items, errors, tables, frames, limits
node      the agent: endpoints, routes, mirror of the master's tables, local door, peers
client    what an application imports: the socket of the bus, and asyncio on top of it
cli       the `afbus` command
_datapath the Rust crate of datapath/: rings, lanes, switch, match index, filters
"""

__version__ = "0.1.0"
