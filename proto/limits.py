"""Every limit of the bus, each with the reason for its size.

Invariants:

1. A limit stands here and nowhere else; whoever checks one names it.
2. The unit is the end of the name; what ends in a plural counts things.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# --- addresses (R7, R9, D1) ---

#: Size of `sbus_path`, as long as the path of an AF_UNIX address.
BUS_PATH_MAX: Final = 108
#: The longest path: the last byte is the `*` mark and the one before it is NUL (R9).
PATH_BYTES: Final = BUS_PATH_MAX - 2
#: Number of u64 in `sbus_addr`: room for the widest bloom filter, and for names of 256 bytes.
BUS_ADDR_COMP_MAX: Final = 32
#: The longest address within a bus (`BUS_ADDR_MAX` in the mail).
ADDRESS_BYTES: Final = BUS_ADDR_COMP_MAX * 8
#: Addresses that one endpoint may own, so that a notice can name them all in one inline record.
ADDRESSES_PER_ENDPOINT: Final = 128

#: Patterns of all that one principal may send to on one bus, and their texts together: they stand
#: in one answer of the cluster's master, which must fit into a frame.
REACH_PATTERNS: Final = 1024
REACH_BYTES: Final = 64 * KIB

# --- messages (D14) ---

#: Bodies up to here travel inside the ring; a copy of this size still costs less than a memfd.
INLINE_BYTES: Final = 64 * KIB
#: The largest message; above `INLINE_BYTES` its body is a sealed memfd.
MESSAGE_BYTES: Final = 16 * MIB
#: Descriptors of one message: D-Bus came to 16 after a series of attacks with more.
FDS_PER_MESSAGE: Final = 16
#: How long a request may stay open at most; afterwards the switch forgets it: one day.
DEADLINE_MS_MAX: Final = 24 * 3600 * 1000
#: How long a blocking subscription may hold up a sender at most: a minute is a human's patience.
BLOCK_MS_MAX: Final = 60 * 1000

# --- multicast (R14, D8) ---

#: Widths of a bloom filter that a bus may choose, in bits.
BLOOM_BITS: Final = (512, 1024, 2048)
#: The width of a bus that chooses nothing: 8 x u64, as in the mail.
BLOOM_BITS_DEFAULT: Final = 512
#: Bits that each term sets (k): 8 keeps false positives low for up to 40 terms in 512 bits.
BLOOM_HASHES: Final = 8
#: Size of a bus's secret hash key.
BLOOM_KEY_BYTES: Final = 16
#: The longest topic and the longest `key=value`, in UTF-8.
TERM_BYTES: Final = 255
#: Terms of one message or subscription after a topic has become one term for each prefix: more
#: would fill half of a 512 bit filter, and packed they still fit into a u16 length.
TERMS_PER_MESSAGE: Final = 64
#: Size of 64 packed terms: each of `TERM_BYTES` and a NUL.
PACKED_TERMS_BYTES: Final = TERMS_PER_MESSAGE * (TERM_BYTES + 1)

# --- filters (D10) ---

#: Instructions of an attached filter: what classic eBPF allowed to unprivileged users.
FILTER_INSTRUCTIONS: Final = 4096
#: Size of one instruction.
FILTER_INSTRUCTION_BYTES: Final = 8

# --- rings ---

#: TX ring of an endpoint that asks for nothing: four of the largest inline messages.
TX_RING_BYTES: Final = 256 * KIB
#: RX ring of an endpoint that asks for nothing: many senders share it.
RX_RING_BYTES: Final = 1 * MIB
#: The smallest ring: one page.
RING_BYTES_MIN: Final = 4 * KIB
#: The largest ring; a burst larger than this belongs in memfds.
RING_BYTES_MAX: Final = 64 * MIB

# --- the door ---

#: One frame: a control message carries an inline body, and its items beside it.
FRAME_BYTES: Final = 128 * KIB
#: How deep lists and maps of a frame may nest.
FRAME_DEPTH: Final = 16
#: Elements of one list or map of a frame.
FRAME_ITEMS: Final = 4096
#: Control items of one message.
CONTROL_ITEMS: Final = 256
#: Data of one control item: an address structure, and all the terms that there may be.
CONTROL_ITEM_BYTES: Final = PACKED_TERMS_BYTES + 1 * KIB
#: Senders that one call tells of unread messages: they fit into a frame with their addresses.
UNREAD_SENDERS: Final = 256
#: The text of an error, of a notice, of a farewell.
REASON_BYTES: Final = 1024
#: Name of a node or of a principal.
IDENTITY_BYTES: Final = 255
#: Size of the token by which a client resumes after it lost its agent.
TOKEN_BYTES: Final = 16

# --- requests to a bus's master ---

#: Proofs that an endpoint may send with its wish to join: a certificate chain and a signature.
CLAIMS_BYTES: Final = 32 * KIB
#: One request or answer, encoded: it must fit into a ring.
REQUEST_BYTES: Final = INLINE_BYTES

# --- tables ---

#: Records of the cluster's table, of which each node holds all: some 50 B each on the wire, and
#: ten times that in memory.
TABLE_ENTRIES: Final = 1 << 20

#: For so long at most nodes believe what their cluster's master has said, in seconds: as long as
#: the certificate lives that it gave them.
STALE_S: Final = 86_400.0
