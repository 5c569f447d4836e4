//! What two switches say to each other: batches of records. Little endian, nothing aligned.
//!
//! A batch is a header, credits, and records that follow on each other:
//!
//! ```text
//! 0 u16 version   2 u16 credits   4 u32 records   8 u64 received   16 u64 first
//! credits: u32 destination, u64 limit    up to where the cost of all messages there may grow
//! records: u32 len with these four bytes, u8 kind, u8 flags, u16 short, and:
//!
//!  1 OPEN      u32 destination, u32 bus, address                        no address: the master of the bus
//!  2 FORGET    u32 destination
//!  3 SENDER    u32 sender, u32 bus, u64 endpoint, identity
//!  4 GONE      u32 sender
//!  5 UNICAST   u32 sender, u32 destination, u64 seq, u32 dst_len        short: src_len
//!  6 RAW       [flag 1: u64 serial, u64 reply_to, u32 deadline_ms]      flag 2: a reply is expected
//!  7 TERMS     [flag 4: u32 ctl_len]  [flag 8: u32 ticket, u32 size]    6 and 7: destination 0
//!              src, dst, ctl, body                                      flag 8: the body came before, by this ticket
//!  8 MISSED    u32 sender, u32 reason, u64 first, u64 last, u64 count, src, dst
//!                                                                       flags: 6, 7, or 0 for any; count 0: unknown
//!  9 ALIVE     u32 bus, address                                         flag 1: it has an owner
//! 10 UNREAD    u64 endpoint, u64 first, u64 last, u64 count, u32 errno, address
//! 11 NO_REPLY  u64 endpoint, u64 serial, address
//! 12 SIGNAL    bytes
//! ```
//!
//! `received` is the last record of the other direction that has come, `first` the number of the first record here; without
//! records it is that of the next. Buses bear their numbers in the cluster, endpoints those of the node that they are on; senders and
//! destinations are numbered by whoever sends, from 1. `src` is left out where it is that of the sender's message before, `dst` of
//! a unicast where it is the address that was opened. A unicast without control items costs its record and 128 of the credit.
//!
//! Invariants:
//! 1. Decoding never panics and never reads outside its bytes; whatever is not what a switch writes is [`Broken`].
//! 2. Encoding and decoding agree for every record (tested by property).
//! 3. A record needs no memory beyond its own bytes: whoever announces much has sent as much.

use crate::frame::ADDRESS_BYTES;

/// The version of this language.
pub const VERSION: u16 = 1;
/// Bytes of the header of a batch.
pub const BATCH_HEADER: usize = 24;
/// Bytes of one credit in a batch.
pub const CREDIT: usize = 12;
/// The longest identity.
pub const IDENT_BYTES: usize = 1024;
/// What a message costs beside its bytes: what a receiver keeps to remember it.
pub const MESSAGE_COST: u64 = 128;
/// The longest record: an inline body (D14), control items, addresses, and the header.
pub const RECORD_BYTES: usize = 1 << 18;

/// Bytes ahead of what a kind of record consists of.
const HEADER: usize = 8;
/// The same, and what all messages have.
const MESSAGE_HEADER: usize = HEADER + 20;
const OPEN: u8 = 1;
const FORGET: u8 = 2;
const SENDER: u8 = 3;
const GONE: u8 = 4;
const UNICAST: u8 = 5;
const RAW: u8 = 6;
const TERMS: u8 = 7;
const MISSED: u8 = 8;
const ALIVE: u8 = 9;
const UNREAD: u8 = 10;
const NO_REPLY: u8 = 11;
const SIGNAL: u8 = 12;

/// Flag of a message: request numbers stand behind its header.
const NUMBERED: u8 = 1;
/// Flag of a message: a reply is expected.
const EXPECT: u8 = 2;
/// Flag of a message: control items stand before its body.
const CONTROL: u8 = 4;
/// Flag of a message: its body has come on a way of its own.
const OUTSIDE: u8 = 8;

/// The peer broke a rule; its link ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broken {
    /// No switch writes this.
    Malformed(&'static str),
    /// It claims an address, a name or a right that belongs to somebody else (D6).
    Forged(String),
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Malformed(rule) => f.write_str(rule),
            Self::Forged(rule) => f.write_str(rule),
        }
    }
}

/// Whom a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum To {
    /// Who owns the address that was opened with this number.
    One(u32),
    /// Whoever wants these bits.
    Bits,
    /// Whoever wants these terms.
    Terms,
    /// Whoever hears multicasts at all. Only of what is missed: the sender did not keep what it was.
    Anything,
}

/// A message on a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// Number of its sender on this lane.
    pub sender: u32,
    /// For whom.
    pub to: To,
    /// Number of the message at its sender.
    pub seq: u64,
    /// Number of the request.
    pub serial: u64,
    /// Number answered.
    pub reply_to: u64,
    /// How long the request may stay open; `None`: no reply is expected.
    pub deadline_ms: Option<u32>,
    /// Source; empty: that of the message before from this sender.
    pub src: &'a [u8],
    /// Destination; empty for the address that was opened.
    pub dst: &'a [u8],
    /// Packed control items, only from the bus's master.
    pub ctl: &'a [u8],
    /// Ticket and size of a body that has come on a way of its own.
    pub outside: Option<(u32, u32)>,
    /// What it says otherwise.
    pub body: &'a [u8],
}

/// One record of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'a> {
    /// From now on this number stands for an address; an empty one for the master of the bus.
    Open {
        /// The number.
        destination: u32,
        /// Number of the bus in the cluster.
        bus: u32,
        /// The address.
        address: &'a [u8],
    },
    /// A destination is needed no more.
    Forget {
        /// Its number.
        destination: u32,
    },
    /// From now on this number stands for an endpoint of the sending node.
    Sender {
        /// The number.
        sender: u32,
        /// Number of the bus in the cluster.
        bus: u32,
        /// How the sending node calls it.
        endpoint: u64,
        /// Identity as its node attests it (D17).
        ident: &'a [u8],
    },
    /// A sender is gone; nothing more comes from it.
    Gone {
        /// Its number.
        sender: u32,
    },
    /// A message.
    Message(Message<'a>),
    /// Multicasts for which there was no room on the way (D12).
    Missed {
        /// Number of their sender.
        sender: u32,
        /// For whom they were, never [`To::One`].
        to: To,
        /// First number missed.
        first: u64,
        /// Last number missed.
        last: u64,
        /// How many; 0: nobody knows.
        count: u64,
        /// Why, as in a gap record.
        reason: u32,
        /// The source of the first.
        src: &'a [u8],
        /// Bits or terms.
        dst: &'a [u8],
    },
    /// Whether a unique address that was opened has an owner.
    Alive {
        /// Whether it has.
        is_alive: bool,
        /// Number of the bus in the cluster.
        bus: u32,
        /// The address.
        address: &'a [u8],
    },
    /// Messages that were accepted from an endpoint of the receiving node will be read by nobody.
    Unread {
        /// How the receiving node calls their sender.
        endpoint: u64,
        /// First number.
        first: u64,
        /// Last number.
        last: u64,
        /// How many of these.
        count: u64,
        /// Why.
        errno: u32,
        /// Where they were sent.
        address: &'a [u8],
    },
    /// An expected reply will not come.
    NoReply {
        /// How the receiving node calls who asked.
        endpoint: u64,
        /// Number of the request.
        serial: u64,
        /// Who was asked.
        address: &'a [u8],
    },
    /// Bytes of the agent itself, in order with everything else.
    Signal {
        /// The bytes.
        data: &'a [u8],
    },
}

/// Reads fields one after the other.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], Broken> {
        let (head, rest) = self
            .0
            .split_at_checked(len)
            .ok_or(Broken::Malformed("a record that is cut short"))?;
        self.0 = rest;
        Ok(head)
    }

    fn u16(&mut self) -> Result<u16, Broken> {
        let b = self.bytes(2)?;
        Ok(u16::from_le_bytes([b[0], b[1]]))
    }

    fn u32(&mut self) -> Result<u32, Broken> {
        let b = self.bytes(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self) -> Result<u64, Broken> {
        Ok(u64::from(self.u32()?) | u64::from(self.u32()?) << 32)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// All that is left, which is an address.
    fn address(&mut self) -> Result<&'a [u8], Broken> {
        let address = self.rest();
        if address.len() > ADDRESS_BYTES {
            return Err(Broken::Malformed("an address that is too long"));
        }
        Ok(address)
    }

    fn end(&self) -> Result<(), Broken> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Broken::Malformed("bytes behind the end of a record"))
        }
    }
}

fn begin(out: &mut Vec<u8>, kind: u8, flags: u8, short: u16) -> usize {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&short.to_le_bytes());
    at
}

fn end(out: &mut [u8], at: usize) {
    let len = (out.len() - at) as u32;
    out[at..at + 4].copy_from_slice(&len.to_le_bytes());
}

impl Message<'_> {
    /// Bytes of the record, with a body of so many bytes.
    #[must_use]
    pub fn record_len(&self, body_len: usize) -> usize {
        let mut len = MESSAGE_HEADER + self.src.len() + self.dst.len() + body_len;
        if self.is_numbered() {
            len += 20;
        }
        if !self.ctl.is_empty() {
            len += 4 + self.ctl.len();
        }
        if self.outside.is_some() {
            len += 8;
        }
        len
    }

    /// Whether it has nothing but a body, and went where its destination was opened for.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        !self.is_numbered() && self.ctl.is_empty() && self.dst.is_empty() && self.outside.is_none()
    }

    fn is_numbered(&self) -> bool {
        self.serial != 0 || self.reply_to != 0 || self.deadline_ms.is_some()
    }

    /// Appends the record but for its body, for which so many bytes are announced: whoever calls appends them. `self.body` is not looked at.
    pub fn encode_ahead(&self, out: &mut Vec<u8>, body_len: usize) {
        let (kind, destination) = match self.to {
            To::One(number) => (UNICAST, number),
            To::Bits => (RAW, 0),
            To::Terms | To::Anything => (TERMS, 0),
        };
        let mut flags = 0;
        if self.is_numbered() {
            flags |= NUMBERED;
        }
        if self.deadline_ms.is_some() {
            flags |= EXPECT;
        }
        if !self.ctl.is_empty() {
            flags |= CONTROL;
        }
        if self.outside.is_some() {
            flags |= OUTSIDE;
        }
        let len = self.record_len(body_len);
        out.reserve(len);
        let mut head = [0; MESSAGE_HEADER];
        head[0..4].copy_from_slice(&(len as u32).to_le_bytes());
        head[4..6].copy_from_slice(&[kind, flags]);
        head[6..8].copy_from_slice(&(self.src.len() as u16).to_le_bytes());
        head[8..12].copy_from_slice(&self.sender.to_le_bytes());
        head[12..16].copy_from_slice(&destination.to_le_bytes());
        head[16..24].copy_from_slice(&self.seq.to_le_bytes());
        head[24..28].copy_from_slice(&(self.dst.len() as u32).to_le_bytes());
        out.extend_from_slice(&head);
        if flags & NUMBERED != 0 {
            out.extend_from_slice(&self.serial.to_le_bytes());
            out.extend_from_slice(&self.reply_to.to_le_bytes());
            out.extend_from_slice(&self.deadline_ms.unwrap_or(0).to_le_bytes());
        }
        if flags & CONTROL != 0 {
            out.extend_from_slice(&(self.ctl.len() as u32).to_le_bytes());
        }
        if let Some((ticket, size)) = self.outside {
            out.extend_from_slice(&ticket.to_le_bytes());
            out.extend_from_slice(&size.to_le_bytes());
        }
        for part in [self.src, self.dst, self.ctl] {
            out.extend_from_slice(part);
        }
    }
}

/// A message that consists of nothing but its body, and comes from the source and goes to the address of the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plain<'a> {
    /// Number of its sender on this lane.
    pub sender: u32,
    /// Number of its destination.
    pub destination: u32,
    /// Number of the message at its sender.
    pub seq: u64,
    /// What it says.
    pub body: &'a [u8],
}

impl<'a> Plain<'a> {
    /// The message in a record, if it is such a one. Whatever is odd is left to [`Record::decode`].
    #[must_use]
    pub fn of(record: &'a [u8]) -> Option<Self> {
        let (head, body) = record.split_first_chunk::<MESSAGE_HEADER>()?;
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let seq = u64::from(word(16)) | u64::from(word(20)) << 32;
        // Kind, flags, length of the source; length of the destination.
        let is_plain = word(4) == u32::from(UNICAST) && word(24) == 0 && seq != 0;
        is_plain.then(|| Self {
            sender: word(8),
            destination: word(12),
            seq,
            body,
        })
    }
}

impl<'a> Record<'a> {
    /// Appends the record.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let at;
        match self {
            Self::Open {
                destination,
                bus,
                address,
            } => {
                at = begin(out, OPEN, 0, 0);
                out.extend_from_slice(&destination.to_le_bytes());
                out.extend_from_slice(&bus.to_le_bytes());
                out.extend_from_slice(address);
            }
            Self::Forget {
                destination: number,
            } => {
                at = begin(out, FORGET, 0, 0);
                out.extend_from_slice(&number.to_le_bytes());
            }
            Self::Sender {
                sender,
                bus,
                endpoint,
                ident,
            } => {
                at = begin(out, SENDER, 0, 0);
                out.extend_from_slice(&sender.to_le_bytes());
                out.extend_from_slice(&bus.to_le_bytes());
                out.extend_from_slice(&endpoint.to_le_bytes());
                out.extend_from_slice(ident);
            }
            Self::Gone { sender: number } => {
                at = begin(out, GONE, 0, 0);
                out.extend_from_slice(&number.to_le_bytes());
            }
            Self::Message(message) => {
                at = out.len();
                message.encode_ahead(out, message.body.len());
                out.extend_from_slice(message.body);
            }
            Self::Missed {
                sender,
                to,
                first,
                last,
                count,
                reason,
                src,
                dst,
            } => {
                let kind = match to {
                    To::Bits => RAW,
                    To::Terms => TERMS,
                    To::One(_) | To::Anything => 0,
                };
                at = begin(out, MISSED, kind, src.len() as u16);
                out.extend_from_slice(&sender.to_le_bytes());
                out.extend_from_slice(&reason.to_le_bytes());
                for number in [first, last, count] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
                out.extend_from_slice(src);
                out.extend_from_slice(dst);
            }
            Self::Alive {
                is_alive,
                bus,
                address,
            } => {
                at = begin(out, ALIVE, u8::from(*is_alive), 0);
                out.extend_from_slice(&bus.to_le_bytes());
                out.extend_from_slice(address);
            }
            Self::Unread {
                endpoint,
                first,
                last,
                count,
                errno,
                address,
            } => {
                at = begin(out, UNREAD, 0, 0);
                for number in [endpoint, first, last, count] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
                out.extend_from_slice(&errno.to_le_bytes());
                out.extend_from_slice(address);
            }
            Self::NoReply {
                endpoint,
                serial,
                address,
            } => {
                at = begin(out, NO_REPLY, 0, 0);
                out.extend_from_slice(&endpoint.to_le_bytes());
                out.extend_from_slice(&serial.to_le_bytes());
                out.extend_from_slice(address);
            }
            Self::Signal { data } => {
                at = begin(out, SIGNAL, 0, 0);
                out.extend_from_slice(data);
            }
        }
        end(out, at);
    }

    /// Takes the first record of some bytes; returns it and the bytes behind it.
    ///
    /// # Errors
    /// [`Broken`] when they do not begin with a record.
    pub fn decode(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), Broken> {
        let (record, rest) = cut(bytes)?;
        let (kind, flags) = (record[4], record[5]);
        let short = u16::from_le_bytes([record[6], record[7]]);
        let mut r = Reader(&record[HEADER..]);
        if flags != 0 && !(UNICAST..=MISSED).contains(&kind) && (kind, flags) != (ALIVE, 1) {
            return Err(Broken::Malformed("unknown flags of a record"));
        }
        let decoded = match kind {
            OPEN => Self::Open {
                destination: r.u32()?,
                bus: r.u32()?,
                address: r.address()?,
            },
            FORGET => Self::Forget {
                destination: r.u32()?,
            },
            SENDER => {
                let (sender, bus, endpoint) = (r.u32()?, r.u32()?, r.u64()?);
                let ident = r.rest();
                if ident.len() > IDENT_BYTES {
                    return Err(Broken::Malformed("an identity that is too long"));
                }
                Self::Sender {
                    sender,
                    bus,
                    endpoint,
                    ident,
                }
            }
            GONE => Self::Gone { sender: r.u32()? },
            UNICAST..=TERMS => Self::Message(message(kind, flags, short, &mut r)?),
            MISSED => missed(flags, short, &mut r)?,
            ALIVE => Self::Alive {
                is_alive: flags == 1,
                bus: r.u32()?,
                address: r.address()?,
            },
            UNREAD => {
                let (endpoint, first, last, count) = (r.u64()?, r.u64()?, r.u64()?, r.u64()?);
                if first > last || count == 0 || count - 1 > last - first {
                    return Err(Broken::Malformed("a range that has no such messages"));
                }
                Self::Unread {
                    endpoint,
                    first,
                    last,
                    count,
                    errno: r.u32()?,
                    address: r.address()?,
                }
            }
            NO_REPLY => Self::NoReply {
                endpoint: r.u64()?,
                serial: r.u64()?,
                address: r.address()?,
            },
            SIGNAL => Self::Signal { data: r.rest() },
            _ => return Err(Broken::Malformed("unknown kind of record")),
        };
        r.end()?;
        Ok((decoded, rest))
    }
}

/// Splits the first record from some bytes, without a look at what it says.
///
/// # Errors
/// [`Broken`] when there is none.
pub fn cut(bytes: &[u8]) -> Result<(&[u8], &[u8]), Broken> {
    let len = Reader(bytes).u32()? as usize;
    if !(HEADER..=RECORD_BYTES).contains(&len) {
        return Err(Broken::Malformed("a record of no possible length"));
    }
    bytes
        .split_at_checked(len)
        .ok_or(Broken::Malformed("a record that is cut short"))
}

fn message<'a>(
    kind: u8,
    flags: u8,
    src_len: u16,
    r: &mut Reader<'a>,
) -> Result<Message<'a>, Broken> {
    let (sender, destination, seq, dst_len) = (r.u32()?, r.u32()?, r.u64()?, r.u32()?);
    let (mut serial, mut reply_to, mut deadline) = (0, 0, 0);
    let known = NUMBERED | EXPECT | CONTROL | OUTSIDE;
    if flags & !known != 0 || flags & (NUMBERED | EXPECT) == EXPECT {
        return Err(Broken::Malformed("flags that do not fit together"));
    }
    if flags & NUMBERED != 0 {
        (serial, reply_to, deadline) = (r.u64()?, r.u64()?, r.u32()?);
    }
    let ctl_len = if flags & CONTROL != 0 { r.u32()? } else { 0 };
    let outside = if flags & OUTSIDE != 0 {
        Some((r.u32()?, r.u32()?))
    } else {
        None
    };
    let to = match kind {
        UNICAST => To::One(destination),
        RAW => To::Bits,
        _ => To::Terms,
    };
    let is_one = matches!(to, To::One(_));
    if usize::from(src_len) > ADDRESS_BYTES || is_one && dst_len as usize > ADDRESS_BYTES {
        return Err(Broken::Malformed("an address that is too long"));
    }
    if !is_one && (destination != 0 || flags & (EXPECT | CONTROL) != 0 || dst_len > 0xffff) {
        return Err(Broken::Malformed("a multicast that is none"));
    }
    if seq == 0 || flags & CONTROL != 0 && ctl_len == 0 {
        return Err(Broken::Malformed("a message without what it announces"));
    }
    let message = Message {
        sender,
        to,
        seq,
        serial,
        reply_to,
        deadline_ms: (flags & EXPECT != 0).then_some(deadline),
        src: r.bytes(src_len.into())?,
        dst: r.bytes(dst_len as usize)?,
        ctl: r.bytes(ctl_len as usize)?,
        outside,
        body: r.rest(),
    };
    if outside.is_some() && !(message.body.is_empty() && message.ctl.is_empty()) {
        return Err(Broken::Malformed("a message with two bodies"));
    }
    Ok(message)
}

fn missed<'a>(kind: u8, src_len: u16, r: &mut Reader<'a>) -> Result<Record<'a>, Broken> {
    let (sender, reason) = (r.u32()?, r.u32()?);
    let (first, last, count) = (r.u64()?, r.u64()?, r.u64()?);
    let to = match kind {
        0 => To::Anything,
        RAW => To::Bits,
        TERMS => To::Terms,
        _ => return Err(Broken::Malformed("unknown flags of a record")),
    };
    if first == 0 || first > last || count > 0 && count - 1 > last - first {
        return Err(Broken::Malformed("a range that has no such messages"));
    }
    if usize::from(src_len) > ADDRESS_BYTES {
        return Err(Broken::Malformed("an address that is too long"));
    }
    let (src, dst) = (r.bytes(src_len.into())?, r.rest());
    if (to == To::Anything) != dst.is_empty() || dst.len() > 0xffff {
        return Err(Broken::Malformed("a multicast that is none"));
    }
    Ok(Record::Missed {
        sender,
        to,
        first,
        last,
        count,
        reason,
        src,
        dst,
    })
}

/// A batch: what its header says, and the bytes of its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch<'a> {
    /// The last record of the other direction that has come.
    pub received: u64,
    /// Number of the first record here.
    pub first: u64,
    /// How many there are.
    pub count: u32,
    credits: &'a [u8],
    /// The records.
    pub records: &'a [u8],
}

impl<'a> Batch<'a> {
    /// Reads the header of a batch; its records are not looked at.
    ///
    /// # Errors
    /// [`Broken`] when it has none.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Broken> {
        let mut r = Reader(bytes);
        if r.u16()? != VERSION {
            return Err(Broken::Malformed("a version that is not spoken"));
        }
        let (credits, count) = (r.u16()?, r.u32()?);
        let (received, first) = (r.u64()?, r.u64()?);
        if first == 0 || first.checked_add(count.into()).is_none() {
            return Err(Broken::Malformed("records that cannot have these numbers"));
        }
        Ok(Self {
            received,
            first,
            count,
            credits: r.bytes(usize::from(credits) * CREDIT)?,
            records: r.rest(),
        })
    }

    /// Destinations, and up to where their costs may grow.
    pub fn credits(&self) -> impl Iterator<Item = (u32, u64)> + use<'a> {
        self.credits.chunks_exact(CREDIT).map(|b| {
            let mut r = Reader(b);
            (r.u32().unwrap_or(0), r.u64().unwrap_or(0))
        })
    }

    /// Appends the header and the credits of a batch.
    pub fn encode(received: u64, first: u64, count: u32, credits: &[(u32, u64)]) -> Vec<u8> {
        let mut out = Vec::with_capacity(BATCH_HEADER + credits.len() * CREDIT);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(credits.len() as u16).to_le_bytes());
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(&received.to_le_bytes());
        out.extend_from_slice(&first.to_le_bytes());
        for (destination, limit) in credits {
            out.extend_from_slice(&destination.to_le_bytes());
            out.extend_from_slice(&limit.to_le_bytes());
        }
        out
    }
}

/// Whether an identity is one of this node: msgpack `[principal, node, pid, uid, gid]` (D17).
#[must_use]
pub fn ident_is_of(ident: &[u8], node: &[u8]) -> bool {
    let mut r = Reader(ident);
    let read = |r: &mut Reader<'_>| -> Result<bool, Broken> {
        let is_list = r.bytes(1)? == [0x95];
        text(r)?;
        let is_node = text(r)? == node;
        for _ in 0..3 {
            uint32(r)?;
        }
        r.end()?;
        Ok(is_list && is_node)
    };
    read(&mut r).unwrap_or(false)
}

fn text<'a>(r: &mut Reader<'a>) -> Result<&'a [u8], Broken> {
    let len = match r.bytes(1)?[0] {
        short @ 0xa0..=0xbf => usize::from(short & 0x1f),
        0xd9 => usize::from(r.bytes(1)?[0]),
        0xda => {
            let b = r.bytes(2)?;
            usize::from(u16::from_be_bytes([b[0], b[1]]))
        }
        _ => return Err(Broken::Malformed("no text")),
    };
    let bytes = r.bytes(len)?;
    std::str::from_utf8(bytes).map_err(|_| Broken::Malformed("no text"))?;
    Ok(bytes)
}

/// A number that needs no more than 32 bits, in any of its forms.
fn uint32(r: &mut Reader<'_>) -> Result<(), Broken> {
    let len = match r.bytes(1)?[0] {
        0..=0x7f => 0,
        0xcc => 1,
        0xcd => 2,
        0xce => 4,
        _ => return Err(Broken::Malformed("no number")),
    };
    r.bytes(len).map(|_| ())
}
