//! What the switch keeps of one endpoint: its rings, what waits for room in them, and who holds how much of its memory.
//!
//! Invariants:
//! 1. While anything waits in `pending`, nothing newer is put into the ring: what the endpoint reads is in order (D11), and
//!    the record of a gap comes before any later message (D12).
//! 2. Each message in the RX ring is charged to its sender until the endpoint releases it (D18); a charge is made once and
//!    given back once.
//! 3. Memory outside the rings is bounded: one gap per sender, one held message per conflated stream, notices up to a limit.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use crate::bloom::Bits;
use crate::filter::Filter;
use crate::frame::{GAP, RX_HEADER, RxHeader};
use crate::line;
use crate::memory::Segment;
use crate::ring::{Consumer, Memory, Producer, Violation, padded};

/// Names an endpoint for as long as the switch runs: a place and how often it was given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ref {
    /// Index of the place.
    pub slot: u32,
    /// Tells apart those who had it in turn.
    pub turn: u32,
}

/// The agent itself, as a sender of notices.
pub const AGENT: Ref = Ref {
    slot: u32::MAX,
    turn: 0,
};

/// Why a receiver missed messages. The numbers are on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// Its ring was full.
    Full = 1,
    /// It was full past the deadline for which senders wait.
    Deadline = 2,
}

/// Messages that an endpoint missed from one sender.
#[derive(Debug, Clone)]
pub struct Gap {
    /// Address of the sender at the first miss.
    pub src: Box<[u8]>,
    /// First number missed.
    pub first: u64,
    /// Last number missed.
    pub last: u64,
    /// How many of that range were for this endpoint.
    pub count: u64,
    /// Why.
    pub reason: Reason,
}

impl Gap {
    fn record(&self) -> Vec<u8> {
        let mut body = [0u8; 28];
        body[0..8].copy_from_slice(&self.first.to_le_bytes());
        body[8..16].copy_from_slice(&self.last.to_le_bytes());
        body[16..24].copy_from_slice(&self.count.to_le_bytes());
        body[24..28].copy_from_slice(&(self.reason as u32).to_le_bytes());
        let header = RxHeader {
            kind: GAP,
            seq: self.last,
            ..RxHeader::default()
        };
        record(header, &self.src, &[], &[], &[], &body)
    }
}

/// Builds a complete RX record in private memory.
#[must_use]
pub fn record(
    header: RxHeader,
    src: &[u8],
    dst: &[u8],
    ident: &[u8],
    ctl: &[u8],
    body: &[u8],
) -> Vec<u8> {
    let header = RxHeader {
        src_len: src.len() as u16,
        dst_len: dst.len() as u16,
        ident_len: ident.len() as u16,
        ctl_len: ctl.len() as u32,
        body_len: body.len() as u32,
        ..header
    }
    .sized();
    let mut out = vec![0u8; header.len as usize];
    out[..RX_HEADER as usize].copy_from_slice(&header.encode());
    let mut at = RX_HEADER as usize;
    for section in [src, dst, ident, ctl, body] {
        out[at..at + section.len()].copy_from_slice(section);
        at += padded(section.len() as u64) as usize;
    }
    out
}

enum Waiting {
    Record { bytes: Vec<u8>, charge: Charge },
    Gap { of: Ref, gap: Gap },
}

/// What one record in an RX ring costs, and whom.
#[derive(Debug, Clone, Copy)]
pub struct Charge {
    /// Who pays.
    pub sender: Ref,
    /// The sender's number of the message.
    pub seq: u64,
    /// Principal of the sender.
    pub principal: u32,
    /// Descriptors that ride along.
    pub fds: u8,
    /// Whether its sender is told when it is never read.
    pub told: bool,
}

impl Charge {
    /// What the agent itself says costs nobody.
    pub const AGENT: Self = Self {
        sender: AGENT,
        seq: 0,
        principal: u32::MAX,
        fds: 0,
        told: false,
    };
}

struct Entry {
    end: u64,
    bytes: u32,
    charge: Charge,
}

/// What was given back when an endpoint released records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refund {
    /// Principal whose account it is.
    pub principal: u32,
    /// Bytes of the ring.
    pub bytes: u64,
    /// Descriptors.
    pub fds: u8,
}

/// The shared memory and the line of a connected endpoint.
pub struct Io {
    /// From the endpoint.
    pub tx: Consumer<Arc<Segment>>,
    /// To the endpoint.
    pub rx: Producer<Arc<Segment>>,
    /// Wake-ups and descriptors.
    pub line: OwnedFd,
    /// Descriptors that came ahead of their records.
    pub fds: VecDeque<(Vec<OwnedFd>, bool)>,
    /// Records were reserved in `rx` and are not published yet.
    pub dirty: bool,
}

/// Credentials as the kernel gave them for the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Credentials {
    /// Process.
    pub pid: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A right to send to multicast addresses that contain these bits, and these terms if there are any.
pub struct SendGrant {
    /// The number by which Python knows it.
    pub id: u64,
    /// Required bits; all zero: any address.
    pub bits: Bits,
    /// Required terms, sorted hashes; `None` for a raw grant.
    pub terms: Option<Box<[u64]>>,
}

/// A message held back for an endpoint that wants only the newest of its kind.
pub struct Held {
    /// Where the copy that it has not read yet ends.
    pub unread_end: u64,
    /// The newest one, if there is one newer than that.
    pub newest: Option<(Vec<u8>, Charge)>,
}

/// Names a conflated stream: match, sender, hash of the address.
pub type Stream = (u64, Ref, u64);

/// Counters that people see.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stats {
    /// Messages accepted from the endpoint.
    pub sent: u64,
    /// Messages refused at the endpoint.
    pub refused: u64,
    /// Messages put into its ring.
    pub received: u64,
    /// Messages that it missed.
    pub missed: u64,
    /// Messages replaced by newer ones, as it wished.
    pub conflated: u64,
}

/// One endpoint as the switch knows it.
pub struct Endpoint {
    /// Itself.
    pub me: Ref,
    /// The number by which Python knows it.
    pub id: u64,
    /// The bus it is on.
    pub bus: Option<u32>,
    /// `@N`.
    pub provisional: Box<[u8]>,
    /// What it owns, oldest first.
    pub addresses: Vec<Box<[u8]>>,
    /// Account for quotas.
    pub principal: u32,
    /// Kernel credentials.
    pub credentials: Credentials,
    /// Principal and node as bytes for receivers that ask for them.
    pub ident: Box<[u8]>,
    /// Whether it asks for identities (SO_PASSCRED).
    pub wants_ident: bool,
    /// Whether it may send no more (half-close).
    pub silent: bool,
    /// Its memory and line, absent between a restart of the agent and its return.
    pub io: Option<Io>,
    /// Number of the last message accepted from it.
    pub seq: u64,
    /// A record was refused, and those chained to it are refused too.
    pub chain_broken: bool,
    /// What it may send to.
    pub send_grants: Vec<SendGrant>,
    /// Its own filter.
    pub filter: Option<Filter>,
    /// Whom it keeps waiting for room, and for how many bytes.
    pub waiters: Vec<(Ref, u64)>,
    /// It was refused for lack of room and waits.
    pub waiting: bool,
    /// Since when it has been too full for a sender that waits.
    pub full_since: Option<Instant>,
    /// Requests that it has not answered: who asked, with what number, until when.
    pub unanswered: HashMap<(Ref, u64), Instant>,
    /// How many answers it waits for.
    pub requests: u32,
    /// Conflated streams.
    pub held: HashMap<Stream, Held>,
    /// Counters.
    pub stats: Stats,
    /// It is served in every round until it falls silent.
    pub active: bool,
    /// Rounds without work.
    pub idle_rounds: u32,
    /// It broke a rule and is being cut off.
    pub cut: bool,
    pending: VecDeque<Waiting>,
    gap_of: HashMap<Ref, u64>,
    popped: u64,
    entries: VecDeque<Entry>,
    shares: HashMap<Ref, u64>,
    users: HashSet<Ref>,
}

/// Whether there is room for a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// There is.
    Yes,
    /// The ring is full, or something older waits.
    Full,
    /// There is, but this sender has its share already.
    OverShare,
}

impl Endpoint {
    /// A new endpoint without rings.
    #[must_use]
    pub fn new(
        me: Ref,
        id: u64,
        principal: u32,
        credentials: Credentials,
        ident: Box<[u8]>,
    ) -> Self {
        Self {
            me,
            id,
            bus: None,
            provisional: format!("@{id}").into_bytes().into_boxed_slice(),
            addresses: Vec::new(),
            principal,
            credentials,
            ident,
            wants_ident: false,
            silent: false,
            io: None,
            seq: 0,
            chain_broken: false,
            send_grants: Vec::new(),
            filter: None,
            waiters: Vec::new(),
            waiting: false,
            full_since: None,
            unanswered: HashMap::new(),
            requests: 0,
            held: HashMap::new(),
            stats: Stats::default(),
            active: false,
            idle_rounds: 0,
            cut: false,
            pending: VecDeque::new(),
            gap_of: HashMap::new(),
            popped: 0,
            entries: VecDeque::new(),
            shares: HashMap::new(),
            users: HashSet::new(),
        }
    }

    /// The address that stands for it when it chooses none.
    #[must_use]
    pub fn default_source(&self) -> &[u8] {
        self.addresses.first().map_or(&self.provisional, |a| a)
    }

    /// Takes note of what the endpoint has released, and returns what that gives back.
    ///
    /// # Errors
    /// [`Violation`] when its index cannot be true.
    pub fn reclaim(&mut self, refunds: &mut Vec<Refund>) -> Result<(), Violation> {
        let Some(io) = &mut self.io else {
            return Ok(());
        };
        let tail = io.rx.refresh()?;
        while let Some(entry) = self.entries.front() {
            if entry.end > tail {
                break;
            }
            let Entry { bytes, charge, .. } = *entry;
            self.entries.pop_front();
            if let Some(own) = self.shares.get_mut(&charge.sender) {
                *own -= u64::from(bytes);
                if *own == 0 {
                    self.shares.remove(&charge.sender);
                    self.users.remove(&charge.sender);
                }
            }
            refunds.push(Refund {
                principal: charge.principal,
                bytes: bytes.into(),
                fds: charge.fds,
            });
        }
        if self.entries.is_empty() && self.entries.capacity() > 1024 {
            self.entries = VecDeque::new();
        }
        Ok(())
    }

    /// Whether a record of `len` bytes from `sender` may go in now, as of the last [`Self::reclaim`].
    ///
    /// One sender may hold `(free + own) / (users + 1)` of the ring, so that whoever comes late still finds room (D18).
    #[must_use]
    pub fn room(&self, sender: Ref, len: u64) -> Room {
        let Some(io) = &self.io else {
            return Room::Full;
        };
        let need = padded(len);
        let free = io.rx.free();
        if !self.pending.is_empty() || need > free {
            return Room::Full;
        }
        if sender == AGENT {
            return Room::Yes;
        }
        let own = self.shares.get(&sender).copied().unwrap_or(0);
        let users = self.users.len() as u64 + u64::from(!self.users.contains(&sender));
        if own + need > (free + own) / (users + 1) && own > 0 {
            Room::OverShare
        } else {
            Room::Yes
        }
    }

    /// Reserves room for a record and charges it. Call only after [`Self::room`] said yes; returns its position.
    pub fn reserve(&mut self, len: u32, charge: Charge) -> Option<u64> {
        let io = self.io.as_mut()?;
        let pos = io.rx.reserve(len.into()).ok()??;
        io.dirty = true;
        self.note(len, charge);
        Some(pos)
    }

    fn note(&mut self, len: u32, charge: Charge) {
        let Some(io) = &self.io else { return };
        let bytes = padded(len.into()) as u32;
        self.entries.push_back(Entry {
            end: io.rx.position(),
            bytes,
            charge,
        });
        *self.shares.entry(charge.sender).or_insert(0) += u64::from(bytes);
        if charge.sender != AGENT {
            self.users.insert(charge.sender);
        }
    }

    /// Notes that it missed message `seq` of `sender`. The gap goes into its ring before anything else.
    pub fn miss(&mut self, sender: Ref, src: &[u8], seq: u64, reason: Reason) {
        self.stats.missed += 1;
        if let Some(at) = self.gap_of.get(&sender) {
            let index = (at - self.popped) as usize;
            if let Some(Waiting::Gap { gap, .. }) = self.pending.get_mut(index) {
                gap.last = seq;
                gap.count += 1;
                return;
            }
        }
        self.gap_of
            .insert(sender, self.popped + self.pending.len() as u64);
        let gap = Gap {
            src: src.into(),
            first: seq,
            last: seq,
            count: 1,
            reason,
        };
        self.pending.push_back(Waiting::Gap { of: sender, gap });
    }

    /// Hands it a finished record as soon as there is room, whatever happens.
    pub fn push(&mut self, bytes: Vec<u8>, charge: Charge) {
        self.pending.push_back(Waiting::Record { bytes, charge });
    }

    /// How many records and gaps wait for room.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.pending.len()
    }

    /// Puts what waits into the ring, as far as there is room. Returns whether nothing is left waiting.
    pub fn flush(&mut self) -> bool {
        while let Some(front) = self.pending.front() {
            let Some(io) = &mut self.io else { return false };
            let gap_record;
            let (bytes, charge) = match front {
                Waiting::Record { bytes, charge } => (bytes, *charge),
                Waiting::Gap { gap, .. } => {
                    gap_record = gap.record();
                    (&gap_record, Charge::AGENT)
                }
            };
            let Ok(Some(pos)) = io.rx.reserve(bytes.len() as u64) else {
                return false;
            };
            io.rx.memory().copy_in(pos, bytes);
            io.dirty = true;
            let len = bytes.len() as u32;
            if let Some(Waiting::Gap { of, .. }) = self.pending.pop_front() {
                self.gap_of.remove(&of);
            }
            self.popped += 1;
            self.note(len, charge);
        }
        if self.pending.capacity() > 256 {
            self.pending = VecDeque::new();
        }
        true
    }

    /// Makes reserved records visible and wakes the endpoint if it sleeps.
    pub fn publish(&mut self) {
        let Some(io) = &mut self.io else { return };
        if io.dirty {
            io.dirty = false;
            io.rx.publish();
            if io.rx.must_wake() {
                io.wake();
            }
        }
    }

    /// Messages that it has not read, per sender that is told: sender, first, last, count.
    #[must_use]
    pub fn unread(&self) -> Vec<(Ref, u64, u64, u64)> {
        let mut told: Vec<(Ref, u64, u64, u64)> = Vec::new();
        for Entry { charge, .. } in &self.entries {
            if !charge.told {
                continue;
            }
            match told.iter_mut().find(|t| t.0 == charge.sender) {
                Some(t) => {
                    t.2 = charge.seq;
                    t.3 += 1;
                }
                None => told.push((charge.sender, charge.seq, charge.seq, 1)),
            }
        }
        told
    }

    /// What it holds of others' accounts, when it goes for good.
    #[must_use]
    pub fn refunds(&self) -> Vec<Refund> {
        let refund = |e: &Entry| Refund {
            principal: e.charge.principal,
            bytes: e.bytes.into(),
            fds: e.charge.fds,
        };
        self.entries.iter().map(refund).collect()
    }
}

impl Io {
    /// Wakes the endpoint. A line that is full is readable already, and one that is closed has nobody to wake.
    pub fn wake(&self) {
        let _ = line::send(self.line.as_fd(), &[line::WAKE], &[]);
    }

    /// Takes all packets from the line. Stops before padding while `blocked`, unless `force`. Returns whether there were too many descriptors.
    pub fn drain(&mut self, blocked: bool, force: bool) -> Result<bool, Violation> {
        let mut kicked = false;
        loop {
            if blocked && !force && line::peek(self.line.as_fd()) == Some(line::BLOCK) {
                return Ok(kicked);
            }
            let Some(packet) = line::receive(self.line.as_fd()) else {
                return Ok(kicked);
            };
            match packet.kind {
                line::KICK => kicked = true,
                line::PING => self.wake(),
                line::BLOCK => {}
                line::FDS => {
                    if self.fds.len() >= 1024 {
                        return Err(Violation("descriptors without messages"));
                    }
                    self.fds.push_back((packet.fds, packet.lost));
                }
                _ => return Err(Violation("unknown packet on the line")),
            }
        }
    }

    /// The descriptors of the next record that has some.
    ///
    /// # Errors
    /// [`Violation`] when none came ahead of it.
    pub fn take_fds(&mut self) -> Result<(Vec<OwnedFd>, bool), Violation> {
        if self.fds.is_empty() {
            self.drain(true, true)?;
        }
        self.fds.pop_front().ok_or(Violation(
            "a message announces descriptors that did not come",
        ))
    }

    /// Sends descriptors ahead of a record. `false`: its line is full.
    ///
    /// # Errors
    /// The errno of sendmsg(2).
    pub fn send_fds(&self, fds: &[RawFd]) -> std::io::Result<()> {
        line::send(self.line.as_fd(), &[line::FDS], fds)
    }

    /// The raw descriptor of the line, for epoll.
    #[must_use]
    pub fn raw_line(&self) -> RawFd {
        self.line.as_raw_fd()
    }
}
