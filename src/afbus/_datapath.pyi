"""The data path: rings, switch, match index, filters. Errors of system calls are OSError."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeAlias

from typing_extensions import Buffer

VERSION: str

# Kinds of destinations of a message, as in docs/internals.md.
UNICAST: int
RAW: int
TERMS: int
# Flag of a message: a reply is expected, and its absence is told.
EXPECT_REPLY: int
# Flag of a received message, beside those of recvmsg(2): a monitor's copy.
MSG_MONITOR: int

#: One received message: data, control items, flags (MSG_TRUNC, MSG_CTRUNC), address of the source.
Received: TypeAlias = tuple[bytes, list[tuple[int, int, bytes]], int, Any]

#: What happened on trunks, see `Switch.take_lane_events`.
LaneEvent: TypeAlias = (
    tuple[Literal["ready", "choked"], int]
    | tuple[Literal["signal", "source", "denied"], int, bytes]
    | tuple[Literal["unread"], int, int, int, int, int, bytes]
    | tuple[Literal["unknown"], int, int, int, int, int]
    | tuple[Literal["body"], int, int, int]
)

class Forged(ValueError):
    """A node claims an address, an identity or a right of somebody else (D6): end its link."""

class Switch:
    """The switch of one agent, on a thread of its own without the GIL, from creation to `close`.

    All calls may come from one thread at a time, take effect before they return, and cost a few
    microseconds. Endpoints and buses bear numbers that the caller chooses and never uses twice.
    Raises KeyError for an endpoint or a bus that is unknown, ValueError for what makes no sense.
    """

    def __init__(
        self,
        *,
        quota_bytes: int = ...,
        quota_messages: int = ...,
        quota_fds: int = ...,
    ) -> None: ...
    def fileno(self) -> int:
        """Return a descriptor that is readable while there are events of either kind."""

    def take_events(self) -> list[tuple[int, str, str]]:
        """Return endpoints that must be cut off: number, "violated" or "too-slow", the rule.

        RuntimeError, again at each call: the thread of the switch has panicked, and nothing moves
        any more.
        """

    def take_unread_on_lanes(self) -> list[tuple[int, int, int, int, int]]:
        """Return what nobody will read, as a lane could not be read by its receiver.

        Each is the sender, the receiver, first and last sequence number, and how many.
        """

    def take_lane_events(self) -> list[LaneEvent]:
        """Return what happened on trunks, in its order. RuntimeError as `take_events`.

        ("ready", trunk)              there is something to send: `take_batch` until it is empty
        ("signal", trunk, data)       the other agent's `signal`
        ("unread", endpoint, first, last, count, errno, address)
                                      nobody will read these messages of an endpoint of this node
        ("unknown", endpoint, first, last, count, trunk)
                                      nobody knows whether these unicasts arrived (D21)
        ("body", trunk, ticket, size) a message waits until its body is at that node: carry what
                                      `body_fd` gives, then call `body_taken` or `body_refused`
        ("source", trunk, address)    a message was refused whose source nobody owns that the table
                                      knows of (D6); told for the 1st, 2nd, 4th, 8th.. of a trunk
        ("denied", endpoint, address) an endpoint of this node has sent where it may not; told once
                                      of each address, and of 64 at most until `set_reach`
        ("choked", trunk)             the peer has not confirmed 16 MiB: nothing goes there any more
                                      until `trunk_restart`
        """

    def close(self) -> None:
        """Stop the thread, unmap all rings, close all lines. Harmless when repeated."""

    # buses
    def add_bus(self, bus: int, width: int, key: bytes, number: int | None = None) -> None:
        """Add a bus whose multicast addresses have `width` bits, hashed with a key of 16 bytes.

        `number` is its number in the cluster, if it is a bus of the cluster: then its messages may
        go to other nodes and come from there. ValueError when another bus has it.
        """

    def allow_lanes(self, bus: int) -> None:
        """Let endpoints of a bus have lanes from now on: its order is not more than each sender's.

        KeyError for a bus that is unknown.
        """

    def remove_bus(self, bus: int) -> None:
        """Forget a bus that has no endpoints any more."""

    def set_master(self, bus: int, endpoint: int | None) -> None:
        """Name the endpoint that messages to unknown names go to."""

    # endpoints
    def add_endpoint(
        self, endpoint: int, principal: int, pid: int, uid: int, gid: int, ident: bytes
    ) -> None:
        """Add an endpoint without rings; until `connect` it counts as full.

        `principal` is the account that quotas are counted on, `ident` what receivers with
        SO_PASSCRED are given. Its provisional address is `@` and its number in decimal.
        """

    def connect(self, endpoint: int, tx_bytes: int, rx_bytes: int) -> tuple[int, int, int]:
        """Make rings and a line; return three descriptors for the client: TX, RX, line.

        The caller passes them on and closes its copies. Sizes are powers of two from 4096.
        """

    def remove_endpoint(self, endpoint: int, flush: bool) -> list[tuple[int, int, int, int]]:
        """Forget an endpoint, its addresses, matches and grants.

        With `flush` all that it had published is sent first. Returns who is to be told of unicast
        messages that it has not read: number of the sender, first and last sequence number, count.
        Expected replies become NO_REPLY records.
        """

    def flush(self, endpoint: int) -> None:
        """Send all that the endpoint has published up to now."""

    def attach(self, endpoint: int, bus: int, provisional: bytes | None = None) -> None:
        """Put an endpoint on a bus, where it can talk to the master only.

        `provisional` is the address by which the master answers it: on a bus of the cluster
        `@BLOCK.NUMBER`, of a block of this node.
        """

    def own(self, endpoint: int, address: bytes) -> bool:
        """Give an address; False when another endpoint has it."""

    def disown(self, endpoint: int, address: bytes) -> bool:
        """Take an address away; False when the endpoint does not have it."""

    def subscribe(
        self,
        endpoint: int,
        match: int,
        terms: bytes | None,
        bits: bytes | None,
        overflow: int,
        deadline_ms: int,
    ) -> None:
        """Add a match with a number unique on its bus: packed terms, or raw bits.

        `overflow` is a number of `proto.match.Overflow`. ValueError when the bits have another
        width than the bus, or the terms are malformed.
        """

    def subscribe_all(self, endpoint: int, matches: Sequence[tuple[int, bytes, int, int]]) -> None:
        """Add matches: number, form (`proto/match.py`), overflow, deadline in ms; as `subscribe`.

        The switch moves messages between some of them and the next.
        """

    def unsubscribe(self, endpoint: int, match: int) -> bool:
        """Remove a match; False when there is none."""

    def allow_send(
        self, endpoint: int, grant: int, terms: bytes | None, bits: bytes | None
    ) -> None:
        """Allow multicasts that have at least these terms or bits. ValueError as `subscribe`."""

    def forbid_send(self, endpoint: int, grant: int) -> bool:
        """Take such a grant back; False when there is none."""

    def set_reach(self, endpoint: int, patterns: Sequence[str]) -> None:
        """Let an endpoint send unicasts to what these patterns cover, and to nobody else (EPERM).

        Patterns and addresses are compared as texts, as `master.policy` does. Answers to requests
        that are open, and the master of a bus, are not bound by it. Before the first call an
        endpoint may send to all.
        """

    def may_send_to(self, endpoint: int, address: bytes) -> bool:
        """Tell whether an endpoint may send to an address, whoever owns that."""

    def set_monitor(self, endpoint: int, on: bool) -> None:
        """Let an endpoint see copies of all messages of its bus, or no longer."""

    def set_filter(self, endpoint: int, program: bytes | None) -> None:
        """Attach or remove an eBPF program. ValueError says which instruction is wrong and why."""

    def identify(self, endpoint: int, ident: bytes) -> None:
        """Say anew who an endpoint is, before it is on a bus: nobody has heard of it yet."""

    def set_ident(self, endpoint: int, on: bool) -> None:
        """Whether the endpoint is given identities (SO_PASSCRED)."""

    def set_namespaces(self, endpoint: int, has_other_pids: bool, has_other_users: bool) -> None:
        """Say whether pids, and uids and gids, of this host mean others where an endpoint is.

        Then it reads pid 0, and the overflow uid and gid, in their place (D17).
        """

    def set_silent(self, endpoint: int) -> None:
        """Half-close: what the endpoint sends from now on is refused with EPIPE."""

    # messages of the agent
    def notify(self, endpoints: Sequence[int], body: bytes, trunk: int | None = None) -> None:
        """Put a notice into rings, behind all that is on its way there.

        With `trunk` also behind what waits for room there of that node's messages: for notices
        whose subject is an endpoint of that node (D15).
        """

    def deliver(
        self,
        source: int,
        target: int,
        src: bytes,
        dst: bytes,
        ctl: bytes,
        body: bytes,
        serial: int,
        reply_to: int,
        deadline_ms: int,
    ) -> None:
        """Deliver a message with control items (their packed form) from one endpoint to another.

        `deadline_ms` above 0: a reply is expected. It is queued when the ring is full.
        """

    # for people
    def stats(self, endpoint: int) -> dict[str, int]:
        """Return counters of an endpoint.

        sent, refused, received, missed, conflated; tx_bytes, tx_used, rx_bytes, rx_used, backlog,
        waiting (senders that wait for it), requests (replies that it waits for), matches,
        lanes_out, lanes_in (lanes on which it sends, and receives).
        """

    def lanes(self, endpoint: int) -> list[tuple[list[int], bool, int, int]]:
        """Return the lanes on which an endpoint sends, oldest first; none of one that is unknown.

        Who reads, whether it is for multicasts, bytes that are charged, messages so far.
        """

    # other nodes: KeyError for a trunk that is unknown
    def trunk_add(self, trunk: int, node: str) -> None:
        """Know a node: nothing was sent to it, nothing came from it.

        `node` is the name in the identities of its endpoints. Its records are kept from now on,
        whether there is a link or not. ValueError when the number is known already.
        """

    def trunk_remove(self, trunk: int) -> None:
        """Forget a node that left the cluster, with what leads to it; as `trunk_restart` before."""

    def trunk_restart(self, trunk: int) -> None:
        """Begin to count anew what goes to a node, which has to know (`trunk_hear` there).

        Unicasts that may have come or not are told as unknown (D21), expected replies become
        NO_REPLY, who waits tries again. Multicasts on their way become gaps without a count.
        Signals that were not confirmed are lost.
        """

    def trunk_hear(self, trunk: int, is_anew: bool) -> None:
        """Know that a node begins to count anew; what it had sent is delivered all the same.

        If the node itself `is_anew`, nobody there waits for what was to be told of that.
        """

    def trunk_rewind(self, trunk: int, received: int) -> None:
        """The link is a new one: send again what is behind the last record that the peer has.

        ValueError when it never was sent, or more was confirmed before.
        """

    def trunk_received(self, trunk: int) -> int:
        """Return the last record that came, 0 for none: `received` of the peer's rewind."""

    def trunk_set_down(self, trunk: int, is_down: bool) -> None:
        """Whether senders are told EHOSTDOWN instead of waiting; multicasts become gaps then."""

    def trunk_is_idle(self, trunk: int) -> bool:
        """Whether nothing is to be sent or confirmed, and nobody waits for credit."""

    def trunk_stats(self, trunk: int) -> dict[str, int]:
        """Return counters of a trunk.

        sent, confirmed, received (records); unconfirmed_bytes; held_bytes (of its messages, which
        wait here for room in rings); destinations; senders (endpoints here that it knows); waiting;
        parked (messages that wait until their bodies are there); forged (sources refused).
        """

    def take_batch(self, trunk: int, max_bytes: int) -> bytes:
        """Return the next records for a node, empty if there is nothing to say now.

        A batch may be longer if it is one record, which has up to 256 KiB.
        """

    def inject(self, trunk: int, batch: bytes) -> None:
        """Take a batch of a node. What it has before the record that breaks a rule, has happened.

        ValueError names the rule; `Forged` if it is about a source, an identity or control items.
        """

    def trunk_subscribe(
        self, trunk: int, bus: int, match: int, terms: bytes | None, bits: bytes | None
    ) -> None:
        """Add a match of a node, as `subscribe`: one copy of what fits goes there."""

    def trunk_unsubscribe(self, trunk: int, bus: int, match: int) -> bool:
        """Remove such a match; False when there is none."""

    def route(self, bus: int, address: bytes, trunk: int | None) -> None:
        """Know that the owner of a name is on a node, or with None on no other node any more."""

    def route_block(self, block: int, trunk: int | None) -> None:
        """Know that all unique addresses `block.N` are a node's, or with None this node's."""

    def unroute_block(self, block: int) -> bool:
        """Know that a block is nobody's any more; False when it was nobody's."""

    def set_master_away(self, bus: int, trunk: int | None, address: bytes) -> None:
        """Name the node where the master of a bus is, and its address; None: on no other node."""

    def signal(self, trunk: int, data: bytes) -> None:
        """Send bytes to the other agent, in order with the messages, up to 128 KiB. ValueError."""

    def give_back(
        self, trunk: int, endpoint: int, source: bytes, range: tuple[int, int], count: int
    ) -> bool:
        """Tell a sender of that node that an endpoint of this one will not read what it took (D20).

        `source` is what they bore, `range` their first and last number. Tells what lies together in
        one "unread" there. False: nobody there has sent from this source.
        """

    def trunk_carries_bodies(self, trunk: int) -> None:
        """Large bodies (memfds, D14) are carried to this node, as "body" events ask for.

        Before this call messages with such bodies are refused with EOPNOTSUPP.
        """

    def body_fd(self, trunk: int, ticket: int) -> int:
        """Return a descriptor of a body that is to be carried, for the caller to close.

        FileNotFoundError: the message does not wait any more. Its first `size` bytes are the body.
        """

    def body_taken(self, trunk: int, ticket: int) -> None:
        """The body is at the other node: the message follows. Harmless for one that is gone."""

    def body_refused(self, trunk: int, ticket: int, errno: int) -> None:
        """The body will not be there: the sender is told as of unread messages."""

    def body_put(self, trunk: int, ticket: int, fd: int) -> None:
        """Keep a body that a node has carried here whole, until its message comes.

        A memfd of exactly its size with all seals, of which a duplicate is kept; `trunk_hear`
        forgets it. ValueError: it is not sealed, the ticket is known, or there are 128 already.
        """

    def deliver_away(
        self,
        source: int,
        trunk: int,
        src: bytes,
        dst: bytes,
        ctl: bytes,
        body: bytes,
        serial: int,
        reply_to: int,
        deadline_ms: int,
    ) -> int:
        """Send a message with control items to an endpoint of a node, as `deliver`.

        It goes on the lane, behind what its source has sent there, and needs no credit. The node
        has applied the items before. Returns 0, or an errno: EHOSTUNREACH, EHOSTDOWN, EMSGSIZE,
        EDQUOT, EAGAIN while a large body of the source is on its way.
        """

class Rings:
    """The client's end of an endpoint: TX ring, RX ring and line.

    The descriptors are not needed after creation: those of the rings are mapped, that of the line
    is copied. Sending and receiving may happen in two threads at a time. Waiting
    calls run without the GIL, end with -ETIMEDOUT at their timeout (seconds; None: never; 0: do
    not wait, -EAGAIN), and let signals through. All return a negative errno instead of raising:

    -EAGAIN       no message, or no room for one and no wish to wait
    -ENOTCONN     the agent is gone, and nothing is left to read
    -ECONNABORTED the agent died, or the time was over, before the verdict: the outcome is unknown
    -EBADMSG      the agent broke a rule of the rings
    and what the switch says of a message (docs/internals.md).

    RuntimeError, instead of a wait without end, for a call that a signal or `address` makes while
    its own thread is in the midst of one: of sending for a send, of receiving for a receive. A
    send that waits for room is not in the midst of one, and lets signals and other threads send.
    """

    def __init__(
        self,
        tx_fd: int,
        rx_fd: int,
        line: int,
        address: Callable[[bytes, bool], Any],
        destination: Callable[[bytes, int], bytes],
    ) -> None:
        """`address(source, is_kernel)` makes the address object of a source; results are kept.

        `destination(dst, kind)` gives the data of an SCM_DST_ADDR item; results are kept. For
        kind TERMS `dst` is empty.
        """

    def send(
        self,
        kind: int,
        dst: bytes,
        src: bytes,
        buffers: Sequence[Buffer],
        fds: Sequence[int],
        flags: int,
        serial: int,
        reply_to: int,
        deadline_ms: int,
        timeout: float | None,
    ) -> int:
        """Send one message; return 0 when it is accepted (D21). `src` empty: the default source.

        Bodies above 64 KiB are put into a sealed memfd. A deadline above 0 needs EXPECT_REPLY.
        """

    def lend_buffer(
        self,
        loan: SendLoan,
        kind: int,
        dst: bytes,
        src: bytes,
        fds: int,
        flags: int,
        reply_to: int,
        timeout: float | None,
        /,
    ) -> int:
        """Give a new loan its memory: on the lane to this destination, or of its own.

        On a lane only if the message that it will be may go there: its parts are as of `send`, of
        `fds` the count. Waits, as a send would, while the lane has no room.
        """

    def send_loan(
        self,
        loan: SendLoan,
        length: int,
        fds: Sequence[int],
        flags: int,
        reply_to: int,
        deadline_ms: int,
        timeout: float | None,
    ) -> int:
        """Send the first bytes of a loan, as `send`; when they are accepted it is over.

        After a refusal it is what it was before. BufferError: a view of it is out; ValueError: it
        is over already, or shorter than this.
        """

    def send_body(self, kind: int, dst: bytes, body: Buffer, timeout: float | None, /) -> int:
        """Send one message from the default source, with nothing beside it. As `send`."""

    def send_many(
        self,
        kind: int,
        dst: bytes | Sequence[bytes],
        src: bytes,
        bodies: Sequence[Buffer],
        flags: int,
        timeout: float | None,
    ) -> tuple[int, int]:
        """Send messages in order, to one destination or to one each.

        Returns how many were accepted, and the errno (negative) that stopped it or 0. After a
        refusal nothing more is sent.
        """

    def recv(
        self, count: int, bufsize: int, ancbufsize: int, peek: bool, timeout: float | None
    ) -> list[Received] | int:
        """Receive 1 to `count` messages, each cut to `bufsize` (then its flags have MSG_TRUNC).

        Items for which `ancbufsize` has no room are left out, descriptors closed (MSG_CTRUNC). The
        item of a gap is always there; without room for the largest (304 bytes) it comes alone.
        """

    def recv_run(
        self, count: int, bufsize: int, timeout: float | None, /
    ) -> tuple[list[bytes], Any] | int | None:
        """Receive the bodies of 1 to `count` messages of one source, and its address.

        None: something else is next, a gap or a message with descriptors; `recv` takes it. An int
        is a negative errno.
        """

    def recv_loan(self, timeout: float | None) -> Loan | int:
        """Receive one message without copying it out of the ring."""

    def set_details(self, on: bool) -> None:
        """Add SCM_SEQ and SCM_DST_ADDR to each message (SO_BUS_DETAILS)."""

    def set_pollable(self) -> None:
        """The line is polled from now on: it is kept readable while there is something to read."""

    def close(self) -> None:
        """Shut the line down, which ends calls that wait, and unmap the rings once no loan is out.

        Later calls return -EBADF.
        """

class Port:
    """What of a socket is native: the calls that carry a body and nothing beside it.

    A subclass is the socket. It has `_send_otherwise(data, flags, number)`,
    `_recv_otherwise(bufsize, flags, number)`, `_recv_loan_otherwise(flags, number)`,
    `_loan_otherwise` and `_send_loan`, to which everything goes that is not plain; `number`
    is why the rings refused (an errno, positive), or 0 when they have to be asked again.
    """

    def send(self, data: Buffer, flags: int = 0, /) -> int:
        """Send one message to the address that `connect` named; return its size in bytes.

        As `sendmsg` with one buffer. The quickest way to send one message.

        Args:
            data: The body, at most 16 MiB.
            flags: MSG_DONTWAIT; MSG_NOSIGNAL changes nothing.

        Raises:
            BadDestination: `connect` named no address. EDESTADDRREQ.
            BusError: As `sendmsg`.
        """

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receive the body of one message. The quickest way to receive one.

        Args:
            bufsize: In bytes. What is longer is cut to this, without a word.
            flags: As of `recvmsg`.

        Raises:
            MessagesLost: A gap is next. ENOBUFS.
            BusError: As `recvmsg`.
        """

    def loan(
        self,
        nbytes: int,
        address: Any = None,
        ancdata: Any = None,
        flags: int = 0,
    ) -> SendLoan:
        """Return a buffer for the body of one message, to be written in place and sent.

        `with sock.loan(65536, address) as loan:` write into `memoryview(loan)`, release that view,
        and call `loan.send()`.

        Any number of loans may be out, and be sent in any order. One that is neither sent nor
        released keeps its memory. Where messages to this address go without the agent it is shared
        with the receivers: they could see what is written before it is sent, and a loan waits, as a
        message does, while all of this memory holds what they have not read.

        Args:
            nbytes: Size of the buffer in bytes, at most 16 MiB.
            address: As of `sendmsg`; by default that of `connect`.
            ancdata: As of `sendmsg`, but no commands of a master. Descriptors must be open until it
                is sent.
            flags: MSG_DONTWAIT, also for when it is sent; MSG_NOSIGNAL changes nothing.

        Raises:
            TooBig: More than a message can have. EMSGSIZE.
            BusError: As `sendmsg`, for what is wrong with address, items or flags. Whether somebody
                has the address, and the sender may send there, is told when it is sent.
        """

    def recv_loan(self, flags: int = 0) -> Loan:
        """Receive one message without copying it (R18).

        The loan is the room of the message in the ring: `memoryview(loan)` is the body, read-only;
        `loan.address`, `loan.ancdata` and `loan.flags` are as in `recvmsg`. A gap is a loan of no
        bytes, with SCM_GAP in its `ancdata`. Give it back soon, by `with` or `loan.release()`: what
        comes behind it waits for its room. Descriptors in `ancdata` are the caller's, to close.

        Args:
            flags: MSG_DONTWAIT.

        Raises:
            BusError: As `recvmsg`.
        """

    def _use(self, rings: Rings | None, /) -> None:
        """Send and receive by these rings directly, or not (None), until they are closed."""

    def _aim(self, kind: int, dst: bytes | None, /) -> None:
        """Name the destination of what is sent; None: there is none."""

    def _wait_for(self, timeout: float | None, /) -> None:
        """Set how long calls wait, in seconds."""

class Carrier:
    """Links to other nodes: a UDP socket, QUIC and TLS on a thread of their own, until `close`.

    Connections bear numbers. What goes over the wire is described in `link/frame.py`; what is to
    be sent and when a link ends, the core of links says. Calls take effect in their order, raise
    RuntimeError once the carrier is closed, and are harmless for a connection that has ended.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        chain: list[bytes],
        key: bytes,
        idle_s: float,
        report_cost: int,
        judge: Callable[[int, Any, bool, bool, list[bytes]], int | None],
    ) -> None:
        """Bind, and accept from now on.

        `chain` is in DER, the own certificate first; `key` is PKCS #8. `judge` is called by the
        thread, within each handshake: number, address, whether this side has dialed, whether the
        peer holds the key, and its chain. It returns None, or the alert that refuses the peer.
        After every `report_cost` that a lane has received there is a "moved".
        OSError: the address cannot be bound. ValueError: the address or the key is none.
        """

    @property
    def address(self) -> Any:
        """The bound address, as the socket module has it."""

    def fileno(self) -> int:
        """Return a descriptor that is readable while there are events."""

    def take_events(self) -> list[Any]:
        """Return what has happened, in its order; totals as `detach`.

        ("called", connection, address)   somebody calls; nothing is known of it
        ("heard", connection)             who was called has answered
        ("opened", connection)            the handshake is complete, and the peer was judged
        ("data", connection, stream, bytes, end, totals)
                                          bytes of a stream of the peer; behind those of the stream
                                          of messages nothing more comes there before `proceed`
        ("echo", connection, number)      a ping was confirmed
        ("moved", connection, totals)     what was moved by an attached switch
        ("broken", connection, rule)      the switch has refused a batch of the peer
        ("given-up", connection, stream)  the peer has reset a stream or stopped reading it
        ("ended", connection, by, code, text, totals)
                                          by "link", "peer" (its QUIC) or "here"

        RuntimeError, again at each call: the thread of the carrier has panicked.
        """

    def next_number(self) -> int:
        """Return a number for a connection that is to be dialed."""

    def dial(self, connection: int, host: str, port: int, scope: int = 0) -> None:
        """Call whoever is at a numeric address."""

    def write(self, connection: int, stream: int, data: bytes, end: bool) -> None:
        """Append bytes to one of the own streams, which are numbered from 0."""

    def ping(self, connection: int, number: int, is_urgent: bool) -> None:
        """Try a connection; `is_urgent` goes whatever waits to be confirmed."""

    def proceed(self, connection: int) -> None:
        """Say that what came on the stream of messages is dealt with."""

    def report_all(self, connection: int) -> None:
        """Ask for "moved" with everything that comes, however little."""

    def cut(self, connection: int, code: int, text: bytes) -> None:
        """End a connection, and tell the peer why; no event follows."""

    def set_credentials(self, chain: list[bytes], key: bytes) -> None:
        """Present these from the next connection on. ValueError: the key is none."""

    def attach(self, connection: int, switch: Switch, trunk: int, limit: int) -> bool:
        """Move batches between a trunk of a switch and destination 0 of the stream of messages.

        No more is sent than `limit`, in cost since the connection began. Returns whether the
        connection is there.
        """

    def detach(self, connection: int) -> tuple[int, int, int, int]:
        """Move no more, from before this returns.

        Returns what was moved since the connection began: cost and bytes of what was sent, cost
        and bytes of what came.
        """

    def allow(self, connection: int, limit: int) -> None:
        """Raise the limit."""

    def close(self, *, kill: bool = False) -> None:
        """End the thread behind what was said before; with `kill` at once. Harmless again."""

class SendLoan:
    """A buffer for the body of one message; `memoryview(loan)` is where to write it.

    It holds zeros, or what another body has left there, at first. `len(loan)` is the size asked
    for. It is good until it is sent or released: an agent that dies, a socket that closes and every
    refusal leave what was written in it. At the end of a `with` it is released.
    """

    #: What the socket knows of the message.
    plan: Any
    def __new__(
        cls,
        nbytes: int,
        socket: Any,
        kind: int,
        dst: bytes,
        src: bytes,
        serial: int,
        plan: Any,
        /,
    ) -> Self:
        """Make one that has no memory before `Rings.lend_buffer`. For `Socket.loan`."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def release(self) -> None:
        """Give the memory back. BufferError while a view is out; harmless when repeated."""

    def send(self, length: int | None = None) -> int:
        """Send what was written, without copying it, and give the buffer away; return its size.

        After an error the loan is as it was: it can be sent again. Nothing was sent then, but for
        OutcomeUnknown: nobody knows.

        Args:
            length: How many bytes from the start; by default all.

        Raises:
            BufferError: A view of the loan is still in use.
            ValueError: The loan was sent or released before.
            InvalidArgument: More bytes than there are. EINVAL.
            BusError: As `Socket.sendmsg`.
        """

class Loan:
    """A message that lies in the ring, or in a mapped memfd, until `release`.

    The buffer protocol gives a read-only view of the body. The agent that wrote it could still
    change it; nobody else can. Loans hold up the room behind them: release them soon.
    """

    address: Any
    ancdata: list[tuple[int, int, bytes]]
    flags: int
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __len__(self) -> int: ...
    def release(self) -> None:
        """Give the room back. BufferError while a view is exported. Harmless when repeated."""

    def __enter__(self) -> Loan: ...
    def __exit__(self, *exc: object) -> None: ...

def sealed_memfd(buffers: Sequence[Buffer]) -> int:
    """Return a descriptor of a memfd with this content and all seals (D14)."""

def term_bits(key: bytes, width: int, terms: bytes) -> bytes:
    """Return the bits that a subscription with these packed terms requires. ValueError."""
