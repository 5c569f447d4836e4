"""AF_BUS in user space: a bus with multicast, policy and federation between hosts.

proto     the shared language, pure: addresses, control items, errors, tables, frames, limits
node      the agent: endpoints, routes, mirror of the master's tables, local door, peers
client    what an application imports: the socket of the bus, and asyncio on top of it
cli       the `afbus` command
_datapath the Rust crate of datapath/: rings, lanes, switch, match index, filters

What an application needs is here by its own name: `afbus.socket()`, `afbus.BusAddress`,
`afbus.SCM_OWNED_ADDR`. A name is imported when it is first used, so that whoever wants the socket
does not pay for asyncio.

Numbers such as R15 and D12 in these texts name what the bus promises: docs/promises.md.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._datapath import MSG_MONITOR, Loan, SendLoan, sealed_memfd
    from .client.bus import Bus, create
    from .client.member import Member, join
    from .client.message import Message
    from .client.proof import Proof
    from .client.question import Question, Verdict
    from .client.record import MemberView
    from .client.socket import Socket
    from .client.socket import socket as socket
    from .client.stream import Stream
    from .client.subscription import Subscription
    from .proto.address import AF_BUS, AddressKind, BusAddress
    from .proto.control import (
        BUS_SOCKET,
        SCM_DEADLINE,
        SCM_DST_ADDR,
        SCM_GAP,
        SCM_GRANT,
        SCM_IDENTITY,
        SCM_MULTICAST_MATCH,
        SCM_MULTICAST_SEND,
        SCM_OWNED_ADDR,
        SCM_REPLY_TO,
        SCM_REVOKE_ADDR,
        SCM_REVOKE_MATCH,
        SCM_REVOKE_SEND,
        SCM_SEQ,
        SCM_SERIAL,
        SCM_SRC_ADDR,
        SCM_TERMS,
        SO_BUS_ADDRESSES,
        SO_BUS_DETAILS,
        SO_BUS_FILTER,
        SO_BUS_MASTER,
        SO_BUS_STATE,
        SO_BUS_STATS,
        GrantFlags,
        Identity,
        Match,
    )
    from .proto.errors import (
        AddressInUse,
        AfbusError,
        BadDestination,
        BusError,
        Cancelled,
        CannotCarry,
        DeadlineExceeded,
        Denied,
        InvalidArgument,
        MasterLost,
        MessagesLost,
        NameTooLong,
        NoAgent,
        NoBus,
        NodeLost,
        NoSuchEndpoint,
        NotConnected,
        NotJoined,
        NotOwned,
        OutcomeUnknown,
        RingFull,
        ShareExceeded,
        ShutDown,
        Stale,
        TooBig,
        WidthMismatch,
    )
    from .proto.match import Overflow
    from .proto.names import NameFlags, NameOutcome, ReleaseOutcome
    from .proto.notice import Event, Gap, GapReason, Notice
    from .proto.request import (
        Join,
        Leave,
        MonitorRequest,
        NoticesRequest,
        Own,
        Publish,
        Release,
        RequestKind,
        Subscribe,
        Unsubscribe,
    )
    from .proto.terms import Terms

__version__ = "0.1.0"

# Where each public name lives.
_HOMES = {
    "_datapath": "MSG_MONITOR Loan SendLoan sealed_memfd",
    "client.bus": "Bus create",
    "client.stream": "Stream",
    "client.subscription": "Subscription",
    "client.member": "Member join",
    "client.message": "Message",
    "client.proof": "Proof",
    "client.question": "Question Verdict",
    "client.record": "MemberView",
    "client.socket": "Socket socket",
    "proto.address": "AF_BUS AddressKind BusAddress",
    "proto.control": """
        BUS_SOCKET SCM_DEADLINE SCM_DST_ADDR SCM_GAP SCM_GRANT SCM_IDENTITY SCM_MULTICAST_MATCH
        SCM_MULTICAST_SEND SCM_OWNED_ADDR SCM_REPLY_TO SCM_REVOKE_ADDR SCM_REVOKE_MATCH
        SCM_REVOKE_SEND SCM_SEQ SCM_SERIAL SCM_SRC_ADDR SCM_TERMS SO_BUS_ADDRESSES SO_BUS_DETAILS
        SO_BUS_FILTER SO_BUS_MASTER SO_BUS_STATE SO_BUS_STATS GrantFlags Identity Match""",
    "proto.errors": """
        AddressInUse AfbusError BadDestination BusError Cancelled CannotCarry DeadlineExceeded
        Denied InvalidArgument MasterLost MessagesLost NameTooLong NoAgent NoBus NoSuchEndpoint
        NodeLost NotConnected NotJoined NotOwned OutcomeUnknown RingFull ShareExceeded ShutDown
        Stale TooBig WidthMismatch""",
    "proto.match": "Overflow",
    "proto.names": "NameFlags NameOutcome ReleaseOutcome",
    "proto.notice": "Event Gap GapReason Notice",
    "proto.request": """
        Join Leave MonitorRequest NoticesRequest Own Publish Release RequestKind Subscribe
        Unsubscribe""",
    "proto.terms": "Terms",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

# Not `socket`: `from afbus import *` must not hide Python's own.
__all__ = [
    "AF_BUS",
    "BUS_SOCKET",
    "MSG_MONITOR",
    "SCM_DEADLINE",
    "SCM_DST_ADDR",
    "SCM_GAP",
    "SCM_GRANT",
    "SCM_IDENTITY",
    "SCM_MULTICAST_MATCH",
    "SCM_MULTICAST_SEND",
    "SCM_OWNED_ADDR",
    "SCM_REPLY_TO",
    "SCM_REVOKE_ADDR",
    "SCM_REVOKE_MATCH",
    "SCM_REVOKE_SEND",
    "SCM_SEQ",
    "SCM_SERIAL",
    "SCM_SRC_ADDR",
    "SCM_TERMS",
    "SO_BUS_ADDRESSES",
    "SO_BUS_DETAILS",
    "SO_BUS_FILTER",
    "SO_BUS_MASTER",
    "SO_BUS_STATE",
    "SO_BUS_STATS",
    "AddressInUse",
    "AddressKind",
    "AfbusError",
    "BadDestination",
    "Bus",
    "BusAddress",
    "BusError",
    "Cancelled",
    "CannotCarry",
    "DeadlineExceeded",
    "Denied",
    "Event",
    "Gap",
    "GapReason",
    "GrantFlags",
    "Identity",
    "InvalidArgument",
    "Join",
    "Leave",
    "Loan",
    "MasterLost",
    "Match",
    "Member",
    "MemberView",
    "Message",
    "MessagesLost",
    "MonitorRequest",
    "NameFlags",
    "NameOutcome",
    "NameTooLong",
    "NoAgent",
    "NoBus",
    "NoSuchEndpoint",
    "NodeLost",
    "NotConnected",
    "NotJoined",
    "NotOwned",
    "Notice",
    "NoticesRequest",
    "OutcomeUnknown",
    "Overflow",
    "Own",
    "Proof",
    "Publish",
    "Question",
    "Release",
    "ReleaseOutcome",
    "RequestKind",
    "RingFull",
    "SendLoan",
    "ShareExceeded",
    "ShutDown",
    "Socket",
    "Stale",
    "Stream",
    "Subscribe",
    "Subscription",
    "Terms",
    "TooBig",
    "Unsubscribe",
    "Verdict",
    "WidthMismatch",
    "create",
    "join",
    "sealed_memfd",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what is used for the first time."""
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_import_module(f".{home}", __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """Return the public names, imported or not."""
        return [*__all__, "__version__", "socket"]
