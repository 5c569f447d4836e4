//! What the switch keeps of one endpoint: its rings, what waits for room in them, and who holds how much of its memory.
//!
//! Invariants:
//! 1. While anything waits in `pending`, nothing newer is put into the ring: what the endpoint reads is in order (D11), and
//!    the record of a gap comes before any later message (D12).
//! 2. Each message in the RX ring, or held back for it, is charged to its sender until the endpoint releases it (D18); a charge
//!    is made once and given back once.
//! 3. Memory outside the rings is bounded, whoever sends what: what waits by number and bytes (the switch cuts off an endpoint
//!    that lets more wait), what is held back by the size of the ring, descriptors without a record by number.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use crate::bloom::Bits;
use crate::filter::Filter;
use crate::frame::{BODY_IN_MEMFD, GAP, RX_HEADER, RxHeader};
use crate::lane_rest::Rest;
use crate::line;
use crate::memory::Segment;
use crate::ring::{Consumer, Memory, Producer, Violation, padded};
use crate::switch::Reach;
use crate::sync::Ordering;
use crate::trunk::Remote;
use crate::trunk_hold::Holds;

/// Names an endpoint for as long as the switch runs: a place and how often it was given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ref {
    /// Index of the place.
    pub slot: u32,
    /// Tells apart those who had it in turn.
    pub turn: u32,
}

/// The switch numbers endpoints itself, so nobody can choose numbers that collide: one multiplication is hash enough.
#[derive(Debug, Default, Clone, Copy)]
pub struct RefHasher(u64);

impl Hasher for RefHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, part: u32) {
        self.0 = (self.0.rotate_left(32) ^ u64::from(part)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_u64(&mut self, part: u64) {
        self.write_u32(part as u32);
        self.write_u32((part >> 32) as u32);
    }
}

/// A table by endpoint.
pub type RefMap<V> = HashMap<Ref, V, BuildHasherDefault<RefHasher>>;

/// A table by numbers that nobody outside can choose, that grow one by one, or of which there are few.
pub type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<RefHasher>>;

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
    /// They were on the way to its node when the lane there began anew: some may have come.
    Restart = 3,
}

impl From<u32> for Reason {
    fn from(number: u32) -> Self {
        match number {
            2 => Self::Deadline,
            3 => Self::Restart,
            _ => Self::Full,
        }
    }
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
    /// How many of that range were for this endpoint; 0: nobody knows.
    pub count: u64,
    /// Why.
    pub reason: Reason,
}

impl Gap {
    /// Takes another gap of the same sender in.
    pub fn extend(&mut self, other: &Self) {
        self.first = self.first.min(other.first);
        self.last = self.last.max(other.last);
        self.count = if self.count == 0 || other.count == 0 {
            0
        } else {
            // Other nodes say how many: it need not be true.
            self.count.saturating_add(other.count)
        };
    }

    /// Bytes of its record in a ring.
    fn room(&self) -> u64 {
        RX_HEADER + padded(self.src.len() as u64) + padded(28)
    }

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

/// Builds a complete RX record in private memory. A body in a memfd is as long as the header says.
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
        body_len: if header.flags & BODY_IN_MEMFD == 0 {
            body.len() as u32
        } else {
            header.body_len
        },
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
    /// Descriptors that ride along, without that of the body.
    pub fds: u8,
    /// Bytes of the body when it lies in a memfd.
    pub body: u32,
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
        body: 0,
        told: false,
    };

    fn refund(&self, bytes: u64) -> Refund {
        Refund {
            principal: self.principal,
            bytes: bytes + u64::from(self.body),
            messages: 1,
            fds: self.fds.into(),
        }
    }
}

/// A lane that has ended and that its reader has not read to the end, as far as the agent knows.
pub struct Ended {
    /// Its number.
    pub number: u64,
    /// Who sent.
    pub from: Ref,
    /// What it holds of its sender's account.
    pub refund: Refund,
    /// What of it is told when nobody reads it.
    pub rest: Option<Rest>,
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
    /// Messages.
    pub messages: u64,
    /// Descriptors.
    pub fds: u64,
}

impl Refund {
    /// Adds it to others, of which the last one may be of the same principal.
    pub fn join(self, refunds: &mut Vec<Self>) {
        match refunds.last_mut() {
            Some(last) if last.principal == self.principal => {
                last.bytes += self.bytes;
                last.messages += self.messages;
                last.fds += self.fds;
            }
            _ => refunds.push(self),
        }
    }
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
    /// What its client said of lanes: kinds of packets, and numbers.
    pub lane_calls: Vec<(u8, u64)>,
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

/// What is kept of a stream of which an endpoint wants only the newest message.
#[derive(Default)]
struct Held {
    /// Where the copy that it has not read yet ends.
    unread_end: u64,
    /// The newest one, if there is one newer than that.
    newest: Option<(Vec<u8>, Charge)>,
}

/// No endpoint sends so many messages: what it says beyond is not believed.
const MAX_NUMBER: u64 = 1 << 62;
/// Calls about lanes that may come in one turn: one for each reader of each lane, and more are of no use.
const MAX_LANE_CALLS: usize = 64 * 65;
/// Streams of which an endpoint may have something unread before further ones are treated as an ordinary subscription.
const MAX_STREAMS: usize = 4096;
/// Bytes that may be held back for an endpoint that is not connected.
const HELD_BYTES: u64 = 1 << 20;
/// Packets with descriptors that are taken from a line ahead of their records.
const MAX_AHEAD: usize = 8;
/// Bytes of unread bodies in memfds that one endpoint may have: four of the largest messages.
const MAX_OUTSIDE: u64 = 64 << 20;
/// Packets taken from a line before others have their turn.
const MAX_PACKETS: usize = 256;

/// Somebody who was refused for lack of room.
#[derive(Debug, Clone, Copy)]
pub struct Waiter {
    /// Who.
    pub from: Ref,
    /// For how many bytes.
    pub need: u64,
    /// Since when there has been no room for it.
    pub since: Instant,
    /// When it is told to try again even if there is none.
    pub retry: Option<Instant>,
}

/// Why packets were left on a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// There are none.
    Empty,
    /// Padding comes next, and its sender still waits.
    Padding,
    /// Descriptors have come for as many records as may be ahead.
    Descriptors,
    /// Others have their turn first.
    Turn,
}

/// An answer that is owed.
#[derive(Debug, Clone, Copy)]
pub struct Debt {
    /// Until when somebody waits for it.
    pub until: Instant,
    /// At a trunk: the number of the destination that was asked.
    pub destination: u32,
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
    pub ident: Arc<[u8]>,
    /// Whether it asks for identities (SO_PASSCRED).
    pub wants_ident: bool,
    /// Whether process ids of this host mean others where it is.
    pub has_other_pids: bool,
    /// Whether user ids of this host mean others where it is.
    pub has_other_users: bool,
    /// Whether it may send no more (half-close).
    pub silent: bool,
    /// Large bodies of it that are on their way to other nodes: what it sends next waits for them.
    pub parked: u32,
    /// Its memory and line, absent between a restart of the agent and its return.
    pub io: Option<Io>,
    /// Number of the last message accepted from it.
    pub seq: u64,
    /// A record was refused, and those chained to it are refused too.
    pub chain_broken: bool,
    /// The multicasts that it may send.
    pub send_grants: Vec<SendGrant>,
    /// The addresses that it may send to; `None`: all.
    pub reach: Option<Box<Reach>>,
    /// Its own filter.
    pub filter: Option<Filter>,
    /// Whom it keeps waiting for room.
    pub waiters: Vec<Waiter>,
    /// It was refused for lack of room and waits.
    pub waiting: bool,
    /// Senders have waited for it as long as it may ask them to; they wait no more until there is room.
    pub overdue: bool,
    /// Requests that it has not answered: who asked, and with what number.
    pub unanswered: HashMap<(Ref, u64), Debt>,
    /// How many answers it waits for.
    pub requests: u32,
    /// Size of `unanswered` at which it is swept the next time.
    pub sweep_at: usize,
    /// Size of `waiters` at which it is swept the next time.
    pub prune_at: usize,
    /// Where taking packets from the line stopped.
    pub stopped: Stop,
    /// A kick was taken from the line and is still to be answered: records wait, or some were released.
    pub kicked: bool,
    /// Counters.
    pub stats: Stats,
    /// It is served in every round until it falls silent.
    pub active: bool,
    /// Rounds without work.
    pub idle_rounds: u32,
    /// It broke a rule and is being cut off.
    pub cut: bool,
    /// It is none of this node's; beside `cut`, where the switch looks anyway.
    pub is_remote: bool,
    /// What it stands for then.
    pub remote: Option<Remote>,
    /// Lanes on which it sends.
    pub lanes_out: u32,
    /// Lanes on which it receives.
    pub lanes_in: u32,
    /// Lanes to it that have ended, until it has released the word of their end.
    pub ended: Vec<Ended>,
    /// Since when its questions for lanes are counted, and how many there were.
    pub lanes_asked: (Instant, u32),
    /// What other nodes sent to it and does not fit into its ring.
    pub held_for: Option<Box<Holds>>,
    pending: VecDeque<Waiting>,
    /// Bytes of the ring that `pending` will take.
    pending_bytes: u64,
    gap_of: RefMap<u64>,
    popped: u64,
    held: HashMap<Stream, Held>,
    held_bytes: u64,
    entries: VecDeque<Entry>,
    /// Bytes of the ring by who sent them.
    shares: RefMap<u64>,
    /// Up to where releases were taken note of.
    reclaimed: u64,
    /// Bytes of unread bodies in memfds.
    outside: u64,
}

/// See [`Endpoint::follow`].
pub struct Following<'a> {
    rx: &'a mut Producer<Arc<Segment>>,
    entries: &'a mut VecDeque<Entry>,
    /// Bytes of the ring that the sender has.
    own: &'a mut u64,
    users: u64,
    received: &'a mut u64,
}

impl Following<'_> {
    /// Puts a record that consists of two parts and takes `len` bytes, if there is room for it as of the last
    /// [`Endpoint::reclaim`]. The first part ends where the second may begin.
    pub fn put(&mut self, len: u32, charge: Charge, head: &[u8], body: &[u8]) -> bool {
        let need = padded(len.into());
        let free = self.rx.free();
        // As Endpoint::room says; it has something there already.
        if need > free || *self.own + need > (free + *self.own) / (self.users + 1) {
            return false;
        }
        let Ok(Some(pos)) = self.rx.reserve(len.into()) else {
            return false;
        };
        let memory = self.rx.memory();
        memory.copy_in(pos, head);
        memory.copy_in(pos + head.len() as u64, body);
        self.entries.push_back(Entry {
            end: pos + need,
            bytes: need as u32,
            charge,
        });
        *self.own += need;
        *self.received += 1;
        true
    }
}

/// Takes bytes from what a sender has.
fn give_back(shares: &mut RefMap<u64>, (sender, bytes): (Ref, u64)) {
    if bytes > 0
        && let Some(own) = shares.get_mut(&sender)
    {
        *own -= bytes;
        if *own == 0 {
            shares.remove(&sender);
        }
    }
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
            ident: ident.into(),
            wants_ident: false,
            has_other_pids: false,
            has_other_users: false,
            silent: false,
            parked: 0,
            io: None,
            seq: 0,
            chain_broken: false,
            send_grants: Vec::new(),
            reach: None,
            filter: None,
            waiters: Vec::new(),
            waiting: false,
            overdue: false,
            unanswered: HashMap::new(),
            requests: 0,
            sweep_at: 64,
            prune_at: 64,
            stopped: Stop::Empty,
            kicked: false,
            stats: Stats::default(),
            active: false,
            idle_rounds: 0,
            cut: false,
            is_remote: false,
            remote: None,
            lanes_out: 0,
            lanes_in: 0,
            ended: Vec::new(),
            lanes_asked: (Instant::now(), 0),
            held_for: None,
            pending: VecDeque::new(),
            pending_bytes: 0,
            gap_of: RefMap::default(),
            popped: 0,
            held: HashMap::new(),
            held_bytes: 0,
            entries: VecDeque::new(),
            shares: RefMap::default(),
            reclaimed: 0,
            outside: 0,
        }
    }

    /// The address that stands for it when it chooses none.
    #[must_use]
    pub fn default_source(&self) -> &[u8] {
        self.addresses.first().map_or(&self.provisional, |a| a)
    }

    /// The number of the next message that is accepted from it. Those on its lanes count in a word that it shares with the switch.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        let Some(io) = &self.io else {
            return self.seq + 1;
        };
        let said = io.tx.memory().seq().load(Ordering::Relaxed);
        // Whoever makes up numbers makes them up for its own messages; none is used twice.
        self.seq.max(said.min(MAX_NUMBER)) + 1
    }

    /// A message with this number was accepted.
    pub fn note_number(&mut self, seq: u64) {
        self.seq = seq;
        if let Some(io) = &self.io {
            io.tx.memory().seq().fetch_max(seq, Ordering::Relaxed);
        }
    }

    /// A message was accepted: it has the next number.
    pub fn take_number(&mut self) {
        self.note_number(self.next_number());
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
        // Most come one behind the other from the same sender.
        let mut of = (AGENT, 0);
        while let Some(entry) = self.entries.front() {
            if entry.end > tail {
                break;
            }
            let Entry { bytes, charge, .. } = *entry;
            self.entries.pop_front();
            self.outside -= u64::from(charge.body);
            if charge.sender == AGENT && charge.seq > 0 {
                // The word of the end of a lane.
                let gone = self.ended.iter().position(|one| one.number == charge.seq);
                refunds.extend(gone.map(|place| self.ended.swap_remove(place).refund));
            }
            if of.0 != charge.sender {
                give_back(&mut self.shares, of);
                of = (charge.sender, 0);
            }
            of.1 += u64::from(bytes);
            charge.refund(bytes.into()).join(refunds);
        }
        give_back(&mut self.shares, of);
        self.reclaimed = tail;
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
        // What waits goes first. It is not put in for the sake of a message that does not fit behind it: as long as nothing
        // follows, gaps only grow in length, and a sender that has used up its share takes no more of the ring by way of gaps.
        if need + self.pending_bytes > free {
            return Room::Full;
        }
        if sender == AGENT {
            return Room::Yes;
        }
        let own = self.shares.get(&sender).copied().unwrap_or(0);
        // The agent has no share to defend.
        let users = (self.shares.len() - usize::from(self.shares.contains_key(&AGENT))) as u64
            + u64::from(own == 0);
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

    /// Records of a sender behind one that was put just now and is not published yet. `None` when something else has to be put, or
    /// looked at, for each of them.
    pub fn follow(&mut self, sender: Ref) -> Option<Following<'_>> {
        let is_plain = !self.cut && !self.is_remote && self.backlog() == 0 && !self.holds();
        let io = self.io.as_mut().filter(|io| is_plain && io.dirty)?;
        let users = self.shares.len() - usize::from(self.shares.contains_key(&AGENT));
        Some(Following {
            rx: &mut io.rx,
            entries: &mut self.entries,
            own: self.shares.get_mut(&sender)?,
            users: users as u64,
            received: &mut self.stats.received,
        })
    }

    fn note(&mut self, len: u32, charge: Charge) {
        let Some(io) = &self.io else { return };
        let bytes = padded(len.into()) as u32;
        self.entries.push_back(Entry {
            end: io.rx.position(),
            bytes,
            charge,
        });
        self.outside += u64::from(charge.body);
        *self.shares.entry(charge.sender).or_insert(0) += u64::from(bytes);
    }

    /// Whether one more body of so many bytes may lie in a memfd. One always may, so that even the largest gets through.
    #[must_use]
    pub fn takes_outside(&self, body: u32) -> bool {
        self.outside == 0 || self.outside + u64::from(body) <= MAX_OUTSIDE
    }

    /// Up to where the endpoint has released its ring, as of the last [`Self::reclaim`].
    #[must_use]
    pub fn reclaimed(&self) -> u64 {
        self.reclaimed
    }

    /// Notes that it missed message `seq` of `sender`. The gap goes into its ring before anything else.
    pub fn miss(&mut self, sender: Ref, src: &[u8], seq: u64, reason: Reason) {
        self.stats.missed += 1;
        if let Some(gap) = self.open_gap(sender) {
            gap.last = seq;
            gap.count += u64::from(gap.count > 0);
            return;
        }
        self.begin_gap(
            sender,
            Gap {
                src: src.into(),
                first: seq,
                last: seq,
                count: 1,
                reason,
            },
        );
    }

    /// Notes that it missed several messages of `sender`.
    pub fn miss_all(&mut self, sender: Ref, gap: Gap) {
        self.stats.missed = self.stats.missed.saturating_add(gap.count.max(1));
        match self.open_gap(sender) {
            Some(known) => known.extend(&gap),
            None => self.begin_gap(sender, gap),
        }
    }

    /// The gap of a sender that waits and that nothing of that sender follows.
    fn open_gap(&mut self, sender: Ref) -> Option<&mut Gap> {
        let index = (self.gap_of.get(&sender)? - self.popped) as usize;
        match self.pending.get_mut(index) {
            Some(Waiting::Gap { gap, .. }) => Some(gap),
            _ => None,
        }
    }

    fn begin_gap(&mut self, sender: Ref, gap: Gap) {
        self.gap_of
            .insert(sender, self.popped + self.pending.len() as u64);
        self.pending_bytes += gap.room();
        self.pending.push_back(Waiting::Gap { of: sender, gap });
    }

    /// Whether a message missed from this sender would take memory: there is no gap yet that it extends.
    #[must_use]
    pub fn opens_gap(&self, sender: Ref) -> bool {
        !self.gap_of.contains_key(&sender)
    }

    /// Hands it a finished record as soon as there is room, whatever happens.
    pub fn push(&mut self, bytes: Vec<u8>, charge: Charge) {
        // What its sender says from now on comes after this record, and so does the gap if some of it is missed.
        self.gap_of.remove(&charge.sender);
        self.pending_bytes += padded(bytes.len() as u64);
        self.pending.push_back(Waiting::Record { bytes, charge });
    }

    /// How many records and gaps wait for room.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.pending.len()
    }

    /// Bytes of the records and gaps that wait for room.
    #[must_use]
    pub fn backlog_bytes(&self) -> u64 {
        self.pending_bytes
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
            // A later gap of the same sender may wait behind a record.
            if let Some(Waiting::Gap { of, .. }) = self.pending.pop_front()
                && self.gap_of.get(&of) == Some(&self.popped)
            {
                self.gap_of.remove(&of);
            }
            self.pending_bytes -= padded(len.into());
            self.popped += 1;
            self.note(len, charge);
        }
        if self.pending.capacity() > 256 {
            self.pending = VecDeque::new();
        }
        true
    }

    /// Forgets a ring that it had, and turns what waits and can never fit into the new one into gaps. Returns what that gives back.
    pub fn fit_to_ring(&mut self) -> Vec<Refund> {
        let mut refunds: Vec<Refund> = self
            .entries
            .drain(..)
            .map(|e| e.charge.refund(e.bytes.into()))
            .collect();
        // Who comes anew has left the lanes of its former rings.
        refunds.extend(self.ended.drain(..).map(|one| one.refund));
        self.shares.clear();
        self.reclaimed = 0;
        let Some(size) = self.io.as_ref().map(|io| io.rx.memory().size()) else {
            return refunds;
        };
        let too_long = |bytes: &[u8]| padded(bytes.len() as u64) > size;
        for waiting in &mut self.pending {
            if let Waiting::Record { bytes, charge } = waiting
                && too_long(bytes)
            {
                refunds.push(charge.refund(padded(bytes.len() as u64)));
                let gap = Gap {
                    src: Box::default(),
                    first: charge.seq,
                    last: charge.seq,
                    count: 1,
                    reason: Reason::Full,
                };
                self.pending_bytes = self.pending_bytes - padded(bytes.len() as u64) + gap.room();
                *waiting = Waiting::Gap {
                    of: charge.sender,
                    gap,
                };
            }
        }
        let mut missed = Vec::new();
        for held in self.held.values_mut() {
            held.unread_end = 0;
            if let Some((bytes, charge)) = held.newest.take_if(|(bytes, _)| too_long(bytes)) {
                self.held_bytes -= padded(bytes.len() as u64);
                refunds.push(charge.refund(padded(bytes.len() as u64)));
                missed.push(charge);
            }
        }
        missed.sort_unstable_by_key(|c| (c.sender, c.seq));
        for charge in missed {
            self.miss(charge.sender, &[], charge.seq, Reason::Full);
        }
        refunds
    }

    // ---- conflated streams ---------------------------------------------------------------------------------------

    /// Whether anything of conflated streams is unread or held back.
    #[must_use]
    pub fn conflates(&self) -> bool {
        !self.held.is_empty()
    }

    /// Whether anything is held back.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.held_bytes > 0
    }

    /// Whether its copy of the last message of a stream is still unread.
    #[must_use]
    pub fn stream_unread(&self, stream: &Stream) -> bool {
        self.held
            .get(stream)
            .is_some_and(|h| h.unread_end > self.reclaimed)
    }

    /// The last message of a stream was put into the ring just now.
    pub fn stream_put(&mut self, stream: Stream) {
        if let Some(io) = &self.io {
            self.held.entry(stream).or_default().unread_end = io.rx.position();
        }
    }

    /// Whether a message of a stream can be held back: neither the number of streams nor their bytes grow without bound.
    #[must_use]
    pub fn may_hold(&self, stream: &Stream, len: u64) -> bool {
        let limit = self
            .io
            .as_ref()
            .map_or(HELD_BYTES, |io| io.rx.memory().size());
        let (known, old) = match self.held.get(stream) {
            None => (false, 0),
            Some(held) => (
                true,
                held.newest
                    .as_ref()
                    .map_or(0, |(bytes, _)| padded(bytes.len() as u64)),
            ),
        };
        (known || self.held.len() < MAX_STREAMS) && self.held_bytes - old + padded(len) <= limit
    }

    /// Holds back the newest message of a stream.
    pub fn hold(&mut self, stream: Stream, bytes: Vec<u8>, charge: Charge) {
        self.held_bytes += padded(bytes.len() as u64);
        self.held.entry(stream).or_default().newest = Some((bytes, charge));
    }

    /// Forgets the message of a stream that is held back, as a newer one has come. Returns what that gives back.
    pub fn replace(&mut self, stream: &Stream) -> Option<Refund> {
        let (bytes, charge) = self.held.get_mut(stream)?.newest.take()?;
        let bytes = padded(bytes.len() as u64);
        self.held_bytes -= bytes;
        self.stats.conflated += 1;
        Some(charge.refund(bytes))
    }

    /// Puts messages that are held back into the ring: all that are due, or, for one sender, all it has. `false` when the ring
    /// is too full for them.
    ///
    /// One is due when its predecessor was read and nothing older of its sender is held back (D11).
    pub fn release_held(&mut self, only: Option<Ref>) -> bool {
        let done = self.reclaimed;
        self.held
            .retain(|_, h| h.newest.is_some() || h.unread_end > done);
        if self.held_bytes == 0 {
            return true;
        }
        let mut some: Vec<(Ref, u64, Stream)> = self
            .held
            .iter()
            .filter(|((_, from, _), _)| only.is_none_or(|o| o == *from))
            .filter_map(|(stream, h)| h.newest.as_ref().map(|(_, c)| (stream.1, c.seq, *stream)))
            .collect();
        some.sort_unstable_by_key(|(from, seq, _)| (*from, *seq));
        let mut blocked = None;
        for (from, _, stream) in some {
            if blocked == Some(from) {
                continue;
            }
            let Some(held) = self.held.get_mut(&stream) else {
                continue;
            };
            if only.is_none() && held.unread_end > done {
                blocked = Some(from);
                continue;
            }
            let Some((bytes, charge)) = held.newest.take() else {
                continue;
            };
            let pos = if self.room(AGENT, bytes.len() as u64) == Room::Yes && self.flush() {
                self.reserve(bytes.len() as u32, charge)
            } else {
                None
            };
            let end = match (pos, &self.io) {
                (Some(pos), Some(io)) => {
                    io.rx.memory().copy_in(pos, &bytes);
                    Some(io.rx.position())
                }
                _ => None,
            };
            let Some(held) = self.held.get_mut(&stream) else {
                continue;
            };
            let Some(end) = end else {
                held.newest = Some((bytes, charge));
                return false;
            };
            held.unread_end = end;
            self.held_bytes -= padded(bytes.len() as u64);
            self.stats.received += 1;
        }
        true
    }

    /// Lets what is held back from a sender wait in line, so that a record which must not be lost can follow it.
    pub fn line_up_held(&mut self, from: Ref) {
        let mut lined: Vec<(Vec<u8>, Charge)> = self
            .held
            .iter_mut()
            .filter(|((_, sender, _), _)| *sender == from)
            .filter_map(|(_, held)| held.newest.take())
            .collect();
        lined.sort_unstable_by_key(|(_, charge)| charge.seq);
        for (bytes, charge) in lined {
            self.held_bytes -= padded(bytes.len() as u64);
            self.stats.received += 1;
            self.push(bytes, charge);
        }
    }

    /// Puts a record into the ring, for which there is room and before which nothing waits, without waking the endpoint.
    pub fn push_quietly(&mut self, bytes: &[u8], charge: Charge) {
        let was_dirty = self.io.as_ref().is_some_and(|io| io.dirty);
        let Some(pos) = self.reserve(bytes.len() as u32, charge) else {
            return;
        };
        if let Some(io) = &mut self.io {
            io.rx.memory().copy_in(pos, bytes);
            io.rx.publish();
            // Whoever finds it set relies on somebody who will publish.
            io.dirty = was_dirty;
        }
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
        let waiting = self.pending.iter().filter_map(|waiting| match waiting {
            Waiting::Record { charge, .. } => Some(charge),
            Waiting::Gap { .. } => None,
        });
        let mut told: RefMap<(u64, u64, u64)> = RefMap::default();
        let held = self.held_for.iter().flat_map(|held| held.told());
        let inside = self.entries.iter().map(|e| &e.charge);
        for charge in inside.chain(waiting).chain(held) {
            if charge.told {
                let one = told
                    .entry(charge.sender)
                    .or_insert((charge.seq, charge.seq, 0));
                one.1 = charge.seq;
                one.2 += 1;
            }
        }
        let mut told: Vec<_> = told
            .into_iter()
            .map(|(who, (a, b, n))| (who, a, b, n))
            .collect();
        told.sort_unstable();
        told
    }

    /// How many lanes of a principal have ended and are not read to the end.
    #[must_use]
    pub fn unread_lanes(&self, principal: u32) -> usize {
        let is_its = |one: &&Ended| one.refund.principal == principal;
        self.ended.iter().filter(is_its).count()
    }

    /// What it holds of others' accounts, when it goes for good.
    #[must_use]
    pub fn refunds(&self) -> Vec<Refund> {
        let inside = self.entries.iter().map(|e| e.charge.refund(e.bytes.into()));
        let waiting = self.pending.iter().filter_map(|waiting| match waiting {
            Waiting::Record { bytes, charge } => Some(charge.refund(padded(bytes.len() as u64))),
            Waiting::Gap { .. } => None,
        });
        let held = self.held.values().filter_map(|held| held.newest.as_ref());
        let held = held.map(|(bytes, charge)| charge.refund(padded(bytes.len() as u64)));
        let ended = self.ended.iter().map(|one| one.refund);
        inside.chain(waiting).chain(held).chain(ended).collect()
    }

    // ---- the line ------------------------------------------------------------------------------------------------

    /// Takes packets from the line: until there are none, others have their turn, or, while it waits for room and `past_padding`
    /// is not set, padding comes.
    ///
    /// # Errors
    /// [`Violation`] for packets that no client sends.
    pub fn drain_line(&mut self, past_padding: bool) -> Result<(), Violation> {
        let Some(io) = &mut self.io else {
            return Ok(());
        };
        let line = io.line.as_fd();
        for _ in 0..MAX_PACKETS {
            if io.fds.len() >= MAX_AHEAD {
                self.stopped = Stop::Descriptors;
                return Ok(());
            }
            if self.waiting && !past_padding && line::peek(line) == Some(line::BLOCK) {
                self.stopped = Stop::Padding;
                return Ok(());
            }
            let Some(packet) = line::receive(line) else {
                self.stopped = Stop::Empty;
                return Ok(());
            };
            match packet.kind {
                line::KICK => self.kicked = true,
                line::BLOCK => {}
                line::PING => io.wake(),
                line::FDS if packet.fds.len() > line::MAX_FDS => {
                    return Err(Violation("more descriptors than a message may have"));
                }
                line::FDS => io.fds.push_back((packet.fds, packet.lost)),
                line::LANE_WAKE | line::LANE_SPOILT => {
                    let call = (packet.kind, packet.number);
                    if !io.lane_calls.contains(&call) {
                        if io.lane_calls.len() >= MAX_LANE_CALLS {
                            return Err(Violation("more calls about lanes than there are lanes"));
                        }
                        io.lane_calls.push(call);
                    }
                }
                _ => return Err(Violation("unknown packet on the line")),
            }
        }
        self.stopped = Stop::Turn;
        Ok(())
    }

    /// The descriptors of the next record that has some, and whether some of them were lost on the way.
    ///
    /// # Errors
    /// [`Violation`] when none came ahead of it.
    pub fn take_fds(&mut self) -> Result<(Vec<OwnedFd>, bool), Violation> {
        // They came before the record, so they are there, maybe behind more packets than are taken in one turn.
        for _ in 0..16 {
            if self.io.as_ref().is_some_and(|io| !io.fds.is_empty()) {
                break;
            }
            self.drain_line(true)?;
            if self.stopped != Stop::Turn {
                break;
            }
        }
        let fds = self.io.as_mut().and_then(|io| io.fds.pop_front());
        if self.stopped == Stop::Descriptors {
            self.drain_line(false)?;
        }
        fds.ok_or(Violation(
            "a message announces descriptors that did not come",
        ))
    }
}

impl Io {
    /// Wakes the endpoint. A line that is full is readable already, and one that is closed has nobody to wake.
    pub fn wake(&self) {
        let _ = line::send(self.line.as_fd(), &[line::WAKE], &[]);
    }

    /// Sends descriptors ahead of a record.
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
