//! What goes out on a trunk: records with numbers, kept until the peer confirms them, and credit for each destination.
//!
//! Invariants:
//! 1. Records bear the numbers 1, 2, 3..; each is sent in this order, and again after a rewind, until it is confirmed (D21).
//! 2. A message goes out only as far as its destination has credit and there is room here; one sender has no more than its
//!    share of either (D18).
//! 3. What a sender missed here goes out before every later message of that sender (D12).
//! 4. Memory is bounded: messages by `EGRESS_BYTES`, what must be said in any case by `RESERVE_BYTES` above that; whoever
//!    makes it more is choked.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::endpoint::{AGENT, Charge, NumberMap, Ref, RefMap, Refund, Room};
use crate::trunk_wire::{BATCH_HEADER, Batch, Broken, CREDIT, MESSAGE_COST, Message, Record, To};

/// The most that a destination may have unread, in cost.
pub const WINDOW: u64 = 2 << 20;
/// What a destination is given at first. It gets more as its receiver reads, so who reads nothing makes the other node keep
/// little.
pub const FIRST_WINDOW: u64 = WINDOW / 8;
/// Bytes of messages that may wait for the peer's word that they have come.
pub const EGRESS_BYTES: u64 = 8 << 20;
/// Bytes above that for what is not refused: reports, answers that will not come, control items.
pub const RESERVE_BYTES: u64 = 8 << 20;
/// Destinations open at a time.
pub const DESTINATIONS: usize = 4096;
/// Records are kept in pieces of this size, which are freed as a whole.
const CHUNK: usize = 64 << 10;
/// Pieces whose memory is kept for the next ones.
const SPARE: usize = 8;
/// Less than this is copied into a batch, so that the piece can take more records.
const SHARED: usize = 8 << 10;
/// Streams of which it is remembered separately that something is missing, for one sender and for all.
const GAPS_OF_SENDER: usize = 64;
const GAPS: usize = 4096;
/// Senders and addresses that are told apart when messages remain unread.
const REPORTS: usize = 4096;

/// The share of one sender: `(free + own) / (users + 1)`, as in a ring.
fn share(free: u64, own: u64, users: u64, need: u64) -> Room {
    if need > free {
        Room::Full
    } else if own > 0 && own + need > (free + own) / (users + 1) {
        Room::OverShare
    } else {
        Room::Yes
    }
}

#[derive(Default)]
struct Shares(RefMap<u64>);

impl Shares {
    fn add(&mut self, sender: Ref, bytes: u64) {
        if sender != AGENT {
            *self.0.entry(sender).or_insert(0) += bytes;
        }
    }

    fn take(&mut self, sender: Ref, bytes: u64) {
        if bytes > 0
            && let Some(own) = self.0.get_mut(&sender)
        {
            *own -= bytes;
            if *own == 0 {
                self.0.remove(&sender);
            }
        }
    }

    fn room(&self, free: u64, sender: Ref, need: u64) -> Room {
        let own = self.0.get(&sender).copied().unwrap_or(0);
        share(free, own, self.0.len() as u64 + u64::from(own == 0), need)
    }
}

/// Bytes of records: first they grow, then whoever carries them has a part in them, and they stay as they are.
enum Kept {
    Open(Vec<u8>),
    Shared(Bytes),
}

/// Records in a row.
struct Chunk {
    /// Number of the first.
    first: u64,
    /// Where each ends.
    ends: Vec<u32>,
    kept: Kept,
}

impl Chunk {
    fn bytes(&self) -> &[u8] {
        match &self.kept {
            Kept::Open(bytes) => bytes,
            Kept::Shared(bytes) => bytes,
        }
    }

    /// A part of the bytes for somebody else; nothing is appended any more.
    fn part(&mut self, range: Range<usize>) -> Bytes {
        if let Kept::Open(bytes) = &mut self.kept {
            self.kept = Kept::Shared(std::mem::take(bytes).into());
        }
        match &self.kept {
            Kept::Open(_) => Bytes::new(),
            Kept::Shared(bytes) => bytes.slice(range),
        }
    }

    /// Number of the record behind its last.
    fn next(&self) -> u64 {
        self.first + self.ends.len() as u64
    }

    fn end_before(&self, number: u64) -> usize {
        match number - self.first {
            0 => 0,
            at => self.ends[at as usize - 1] as usize,
        }
    }
}

/// Records that are not confirmed.
#[derive(Default)]
struct Chunks {
    all: VecDeque<Chunk>,
    /// Memory of confirmed ones, while others follow.
    spare: Vec<Vec<u8>>,
}

impl Chunks {
    /// Puts a record behind the others; returns its bytes.
    fn append(&mut self, number: u64, write: impl FnOnce(&mut Vec<u8>)) -> u32 {
        let has_place =
            |chunk: &Chunk| matches!(&chunk.kept, Kept::Open(bytes) if bytes.len() < CHUNK);
        if !self.all.back().is_some_and(has_place) {
            self.all.push_back(Chunk {
                first: number,
                ends: Vec::new(),
                kept: Kept::Open(self.spare.pop().unwrap_or_default()),
            });
        }
        let Some(Chunk {
            ends,
            kept: Kept::Open(bytes),
            ..
        }) = self.all.back_mut()
        else {
            return 0;
        };
        let before = bytes.len();
        write(bytes);
        ends.push(bytes.len() as u32);
        (bytes.len() - before) as u32
    }

    /// Forgets what is confirmed up to this record.
    fn forget(&mut self, confirmed: u64) {
        while let Some(chunk) = self.all.front()
            && chunk.next() <= confirmed + 1
        {
            let kept = self.all.pop_front().map(|chunk| chunk.kept);
            if self.spare.len() < SPARE
                && let Some(Kept::Shared(bytes)) = kept
                && bytes.len() >= CHUNK / 2
                && bytes.len() <= 2 * CHUNK
                && bytes.is_unique()
            {
                let mut bytes = Vec::from(bytes);
                bytes.clear();
                self.spare.push(bytes);
            }
        }
        if self.all.is_empty() {
            self.spare = Vec::new();
        }
    }
}

struct Entry {
    bytes: u32,
    sender: Ref,
    refund: Option<Refund>,
}

/// An address at the peer.
pub struct Destination {
    /// Its place in the switch, where senders wait for it.
    pub seat: Ref,
    /// Number of its bus in the cluster.
    pub bus: u32,
    /// The address; empty for the master of the bus.
    pub address: Box<[u8]>,
    /// Nobody is there.
    pub is_dead: bool,
    /// Cost of everything sent.
    consumed: u64,
    /// Cost of what waits for its body to be there.
    reserved: u64,
    /// Up to where that may grow.
    limit: u64,
    /// Cost of what has reached the receiver's ring, or will reach nobody.
    returned: u64,
    /// How much of that window is used.
    window: u64,
    /// Messages for which credit has not come back, and which may not have reached the receiver's ring: cost, number of the record.
    entries: VecDeque<(u32, u64, Charge)>,
    shares: Shares,
    used_at: u64,
}

impl Destination {
    /// Whether its receiver has room for a message of this sender.
    #[must_use]
    pub fn room(&self, sender: Ref, cost: u64) -> Room {
        self.shares.room(self.free(), sender, cost)
    }

    /// Whether so much credit is there that it is worth waking who waits.
    #[must_use]
    pub fn is_worth_waking(&self) -> bool {
        self.is_dead || self.free() >= self.window / 4
    }

    fn free(&self) -> u64 {
        self.limit.min(self.returned + self.window) - self.consumed - self.reserved
    }

    fn is_idle(&self) -> bool {
        self.entries.is_empty() && self.reserved == 0
    }
}

/// Multicasts of one kind that a sender missed.
struct Missing {
    to: To,
    src: Box<[u8]>,
    dst: Box<[u8]>,
    first: u64,
    last: u64,
    /// 0: nobody knows.
    count: u64,
    reason: u32,
}

impl Missing {
    fn record_len(&self) -> u64 {
        (40 + self.src.len() + self.dst.len()) as u64
    }
}

/// A sender as the peer is told of it.
struct Known {
    /// 0: it is not told yet.
    number: u32,
    bus: u32,
    endpoint: u64,
    ident: Arc<[u8]>,
    /// The source of its last message here.
    src: Box<[u8]>,
    /// It has gone; it is known until the peer has heard that, for what it sent may be missing there.
    is_gone: bool,
}

/// Messages that nobody will read: whose, why, and where they were sent.
type Report = (u64, u32, Box<[u8]>);

/// See [`Outbound::follow`].
pub struct Following<'a> {
    sender: Ref,
    number: u32,
    to: u32,
    /// Of the destination: what this sender has there, what all have used and up to where that may grow, and how many senders.
    credit: &'a mut u64,
    consumed: &'a mut u64,
    until: u64,
    destination_users: u64,
    waiting: &'a mut VecDeque<(u32, u64, Charge)>,
    used_at: &'a mut u64,
    address: &'a [u8],
    /// Of the trunk, likewise.
    share: &'a mut u64,
    users: u64,
    used: &'a mut u64,
    last: &'a mut u64,
    clock: &'a mut u64,
    chunks: &'a mut Chunks,
    entries: &'a mut VecDeque<Entry>,
}

impl Following<'_> {
    /// What the message is on the lane. `dst` is where it was sent, which may be another address than the one that was opened.
    #[must_use]
    pub fn message<'b>(&self, seq: u64, dst: &'b [u8]) -> Message<'b> {
        Message {
            sender: self.number,
            to: To::One(self.to),
            seq,
            serial: 0,
            reply_to: 0,
            deadline_ms: None,
            src: &[],
            dst: if *self.address == *dst { &[] } else { dst },
            ctl: &[],
            outside: None,
            body: &[],
        }
    }

    /// Whether a record of so many bytes may go out now.
    #[must_use]
    pub fn has_room(&self, len: usize) -> bool {
        let len = len as u64;
        let cost = len + MESSAGE_COST;
        let free = self.until - *self.consumed;
        let left = EGRESS_BYTES.saturating_sub(*self.used);
        share(free, *self.credit, self.destination_users, cost) == Room::Yes
            && share(left, *self.share, self.users, len) == Room::Yes
    }

    /// Puts a message for which there is room; returns its cost.
    pub fn put(
        &mut self,
        message: &Message<'_>,
        body_len: usize,
        charge: &Charge,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> u64 {
        *self.last += 1;
        *self.clock += 1;
        *self.used_at = *self.clock;
        let bytes = self.chunks.append(*self.last, |out| {
            message.encode_ahead(out, body_len);
            body(out);
        });
        let cost = u64::from(bytes) + MESSAGE_COST;
        *self.consumed += cost;
        *self.credit += cost;
        self.waiting.push_back((cost as u32, *self.last, *charge));
        *self.used += u64::from(bytes);
        *self.share += u64::from(bytes);
        self.entries.push_back(Entry {
            bytes,
            sender: self.sender,
            refund: None,
        });
        cost
    }
}

/// One direction of a trunk.
#[derive(Default)]
pub struct Outbound {
    chunks: Chunks,
    /// The last record put here.
    last: u64,
    /// The last record taken since the last rewind.
    at: u64,
    /// The last record ever taken.
    taken: u64,
    /// The last record confirmed.
    confirmed: u64,
    /// One entry for each record that is not confirmed.
    entries: VecDeque<Entry>,
    used: u64,
    shares: Shares,
    destinations: NumberMap<u32, Destination>,
    numbers: NumberMap<u32, HashMap<Box<[u8]>, u32>>,
    last_destination: u32,
    senders: RefMap<Known>,
    last_sender: u32,
    /// Senders that have gone, and the records that say so.
    gone: VecDeque<(u64, Ref)>,
    gaps: RefMap<Vec<Missing>>,
    gap_count: usize,
    unread: HashMap<Report, (u64, u64, u64)>,
    /// Reports up to this record were for a peer that is no more.
    void_to: u64,
    clock: u64,
}

/// What is left of a direction that begins anew.
#[derive(Default)]
pub struct Remains {
    /// Messages of which nobody knows whether they came (D21).
    pub unknown: Vec<Charge>,
    /// Messages that were never taken, and where they were sent.
    pub unsent: Vec<(Charge, Box<[u8]>)>,
    /// What their senders get back.
    pub refunds: Vec<Refund>,
    /// Places of destinations that are no more.
    pub seats: Vec<Ref>,
}

impl Outbound {
    // ---- room ----------------------------------------------------------------------------------------------------

    /// Whether a record of so many bytes may go out now, behind what its sender missed before.
    #[must_use]
    pub fn room(&self, sender: Ref, bytes: u64) -> Room {
        let need = bytes + self.gap_bytes(sender);
        self.shares
            .room(EGRESS_BYTES.saturating_sub(self.used), sender, need)
    }

    /// Whether so much is free that it is worth waking who waits.
    #[must_use]
    pub fn is_worth_waking(&self) -> bool {
        self.used <= EGRESS_BYTES / 4 * 3
    }

    /// Whether more waits than may wait.
    #[must_use]
    pub fn is_choked(&self) -> bool {
        self.used > EGRESS_BYTES + RESERVE_BYTES
    }

    /// Whether everything is sent and confirmed, but for gaps if those can wait.
    #[must_use]
    pub fn is_idle(&self, but_gaps: bool) -> bool {
        let is_told = self.gaps.is_empty() || but_gaps;
        self.confirmed == self.last && self.unread.is_empty() && is_told
    }

    /// Whether there are records to be taken.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.at < self.last || !self.unread.is_empty()
    }

    /// The last record that was put here.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    /// The last record that the peer has confirmed.
    #[must_use]
    pub fn confirmed(&self) -> u64 {
        self.confirmed
    }

    /// Bytes of records that are not confirmed.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.used
    }

    /// How many destinations are open.
    #[must_use]
    pub fn destination_count(&self) -> usize {
        self.destinations.len()
    }

    /// How many senders are known.
    #[must_use]
    pub fn sender_count(&self) -> usize {
        self.senders.len()
    }

    // ---- destinations and senders --------------------------------------------------------------------------------

    /// A destination.
    #[must_use]
    pub fn destination(&self, number: u32) -> Option<&Destination> {
        self.destinations.get(&number)
    }

    /// The number of an address, if it is open.
    #[must_use]
    pub fn number_of(&self, bus: u32, address: &[u8]) -> Option<u32> {
        self.numbers.get(&bus)?.get(address).copied()
    }

    /// The number that the next destination gets.
    #[must_use]
    pub fn next_destination(&self) -> u32 {
        self.last_destination + 1
    }

    /// Opens a destination, which has not been open, at a place of the switch.
    pub fn open(&mut self, bus: u32, address: &[u8], seat: Ref) -> u32 {
        self.last_destination += 1;
        let number = self.last_destination;
        self.clock += 1;
        let destination = Destination {
            seat,
            bus,
            address: address.into(),
            is_dead: false,
            consumed: 0,
            reserved: 0,
            limit: WINDOW,
            returned: 0,
            window: FIRST_WINDOW,
            entries: VecDeque::new(),
            shares: Shares::default(),
            used_at: self.clock,
        };
        self.destinations.insert(number, destination);
        let numbers = self.numbers.entry(bus).or_default();
        numbers.insert(address.into(), number);
        self.put(&Record::Open {
            destination: number,
            bus,
            address,
        });
        number
    }

    /// Forgets the half of all idle destinations that was used the longest ago, but for those in `but`. Returns their places.
    pub fn forget_idle(&mut self, but: &[Ref]) -> Vec<Ref> {
        let mut idle: Vec<(u64, u32)> = self
            .destinations
            .iter()
            .filter(|(_, d)| d.is_idle() && !but.contains(&d.seat))
            .map(|(number, d)| (d.used_at, *number))
            .collect();
        idle.sort_unstable();
        idle.truncate(idle.len().div_ceil(2));
        idle.into_iter()
            .filter_map(|(_, number)| self.forget(number))
            .collect()
    }

    fn forget(&mut self, number: u32) -> Option<Ref> {
        let gone = self.destinations.remove(&number)?;
        if let Some(numbers) = self.numbers.get_mut(&gone.bus) {
            numbers.remove(&gone.address);
            if numbers.is_empty() {
                self.numbers.remove(&gone.bus);
            }
        }
        self.put(&Record::Forget {
            destination: number,
        });
        Some(gone.seat)
    }

    /// An address has an owner, or none. Returns the place where senders wait for it.
    pub fn set_alive(&mut self, bus: u32, address: &[u8], is_alive: bool) -> Option<Ref> {
        let number = self.number_of(bus, address)?;
        let destination = self.destinations.get_mut(&number)?;
        destination.is_dead = !is_alive;
        Some(destination.seat)
    }

    /// Keeps credit for a message whose body goes first.
    pub fn reserve(&mut self, number: u32, cost: u64) {
        if let Some(d) = self.destinations.get_mut(&number) {
            d.reserved += cost;
        }
    }

    /// The message goes now, or will not go.
    pub fn unreserve(&mut self, number: u32, cost: u64) {
        if let Some(d) = self.destinations.get_mut(&number) {
            d.reserved -= cost;
        }
    }

    /// Whether anything of this sender has gone out here.
    #[must_use]
    pub fn knows(&self, who: Ref) -> bool {
        self.senders.contains_key(&who)
    }

    /// Makes a sender known, before its first message or gap.
    pub fn know(&mut self, who: Ref, bus: u32, endpoint: u64, ident: &Arc<[u8]>) {
        self.senders.entry(who).or_insert_with(|| Known {
            number: 0,
            bus,
            endpoint,
            ident: ident.clone(),
            src: Box::default(),
            is_gone: false,
        });
    }

    /// The number of a sender that is known; the peer is told of it first.
    fn number_of_sender(&mut self, who: Ref) -> u32 {
        let Some(known) = self.senders.get_mut(&who) else {
            return 0;
        };
        if known.number != 0 {
            return known.number;
        }
        self.last_sender += 1;
        let sender = self.last_sender;
        known.number = sender;
        let (bus, endpoint, ident) = (known.bus, known.endpoint, known.ident.clone());
        self.put(&Record::Sender {
            sender,
            bus,
            endpoint,
            ident: &ident,
        });
        sender
    }

    /// A sender is gone, and has said everything.
    pub fn forget_sender(&mut self, who: Ref) {
        self.put_gaps(who);
        self.put_gone(who);
    }

    fn put_gone(&mut self, who: Ref) {
        let Some(known) = self.senders.get_mut(&who) else {
            return;
        };
        known.is_gone = true;
        let sender = known.number;
        if sender == 0 {
            self.senders.remove(&who);
            return;
        }
        self.put(&Record::Gone { sender });
        self.gone.push_back((self.last, who));
    }

    // ---- records -------------------------------------------------------------------------------------------------

    /// Puts a record that is not refused, whatever room there is.
    pub fn put(&mut self, record: &Record<'_>) {
        if !self.is_choked() {
            self.append(AGENT, None, |out| record.encode(out));
        }
    }

    /// Puts a message of a sender that is known, behind what it missed; `body` appends so many bytes. Returns its cost. Room was asked
    /// for before, but for control items. The number of the sender is filled in here, and the source left out where it is that of
    /// before.
    pub fn put_message(
        &mut self,
        message: &Message<'_>,
        body_len: usize,
        charge: &Charge,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> u64 {
        self.put_gaps(charge.sender);
        let mut message = Message {
            sender: self.number_of_sender(charge.sender),
            ..*message
        };
        if let Some(known) = self.senders.get_mut(&charge.sender) {
            if *known.src == *message.src {
                message.src = &[];
            } else {
                known.src = message.src.into();
            }
        }
        let cost = message.record_len(body_len) as u64 + MESSAGE_COST;
        let mut refunded = None;
        if let To::One(number) = message.to {
            self.clock += 1;
            // Control items take no credit: they are few, and nobody may stop them.
            if let Some(d) = self.destinations.get_mut(&number)
                && message.ctl.is_empty()
            {
                d.used_at = self.clock;
                d.consumed += cost;
                d.shares.add(charge.sender, cost);
                // Its sender is told to the peer already, so it is the next record.
                let number = self.last + 1;
                d.entries.push_back((cost as u32, number, *charge));
            }
        } else {
            refunded = refund(charge, cost);
        }
        self.append(charge.sender, refunded, |out| {
            message.encode_ahead(out, body_len);
            body(out);
        });
        cost
    }

    fn append(&mut self, sender: Ref, refund: Option<Refund>, write: impl FnOnce(&mut Vec<u8>)) {
        self.last += 1;
        let bytes = self.chunks.append(self.last, write);
        self.used += u64::from(bytes);
        self.shares.add(sender, bytes.into());
        self.entries.push_back(Entry {
            bytes,
            sender,
            refund,
        });
    }

    /// Messages like the last one of a sender: to the same destination, from the same source, and without anything beside their
    /// bodies. What they have in common is looked up once. `None`: there was none, or something has to be put before.
    pub fn follow(&mut self, sender: Ref, number: u32) -> Option<Following<'_>> {
        if self.gaps.contains_key(&sender) {
            return None;
        }
        let users = self.shares.0.len() as u64;
        let destination = self.destinations.get_mut(&number).filter(|d| !d.is_dead)?;
        let destination_users = destination.shares.0.len() as u64;
        Some(Following {
            sender,
            number: self.senders.get(&sender).filter(|s| s.number != 0)?.number,
            to: number,
            credit: destination.shares.0.get_mut(&sender)?,
            consumed: &mut destination.consumed,
            until: destination
                .limit
                .min(destination.returned + destination.window)
                - destination.reserved,
            destination_users,
            waiting: &mut destination.entries,
            used_at: &mut destination.used_at,
            address: &destination.address,
            share: self.shares.0.get_mut(&sender)?,
            users,
            used: &mut self.used,
            last: &mut self.last,
            clock: &mut self.clock,
            chunks: &mut self.chunks,
            entries: &mut self.entries,
        })
    }

    // ---- what is missing -----------------------------------------------------------------------------------------

    /// Notes that a multicast could not go out: one, or with a count of 0 nobody knows how many up to it.
    #[allow(clippy::too_many_arguments, reason = "the parts of one gap, each once")]
    pub fn miss(
        &mut self,
        sender: Ref,
        to: To,
        src: &[u8],
        dst: &[u8],
        range: (u64, u64),
        count: u64,
        reason: u32,
    ) {
        let (first, last) = range;
        let full = self.gap_count >= GAPS;
        let gaps = self.gaps.entry(sender).or_default();
        let known = gaps.iter().position(|g| g.to == to && *g.dst == *dst);
        let coarse = known.is_none() && (full || gaps.len() >= GAPS_OF_SENDER);
        let (to, dst, count) = if coarse {
            (To::Anything, &[][..], 0)
        } else {
            (to, dst, count)
        };
        if let Some(gap) = gaps.iter_mut().find(|g| g.to == to && *g.dst == *dst) {
            gap.first = gap.first.min(first);
            gap.last = gap.last.max(last);
            gap.count = if gap.count == 0 || count == 0 {
                0
            } else {
                gap.count.saturating_add(count)
            };
            return;
        }
        self.gap_count += 1;
        gaps.push(Missing {
            to,
            src: src.into(),
            dst: dst.into(),
            first,
            last,
            count,
            reason,
        });
    }

    fn gap_bytes(&self, sender: Ref) -> u64 {
        if self.gaps.is_empty() {
            return 0;
        }
        let gaps = self.gaps.get(&sender).map_or(&[][..], |gaps| &gaps[..]);
        gaps.iter().map(Missing::record_len).sum()
    }

    fn put_gaps(&mut self, who: Ref) {
        if self.gaps.is_empty() {
            return;
        }
        let Some(gaps) = self.gaps.remove(&who) else {
            return;
        };
        self.gap_count -= gaps.len();
        let sender = self.number_of_sender(who);
        for gap in &gaps {
            let record = Record::Missed {
                sender,
                to: gap.to,
                first: gap.first,
                last: gap.last,
                count: gap.count,
                reason: gap.reason,
                src: &gap.src,
                dst: &gap.dst,
            };
            self.put(&record);
        }
        if self.senders.get(&who).is_some_and(|known| known.is_gone) {
            self.put_gone(who);
        }
    }

    /// Puts gaps for which there is room now, so that they are told although their senders are silent.
    pub fn flush_gaps(&mut self) {
        if self.gaps.is_empty() {
            return;
        }
        let mut waiting: Vec<Ref> = self.gaps.keys().copied().collect();
        waiting.sort_unstable();
        for who in waiting {
            if self.used + self.gap_bytes(who) <= EGRESS_BYTES {
                self.put_gaps(who);
            }
        }
    }

    /// Notes that messages of an endpoint of the peer will be read by nobody.
    pub fn report_unread(
        &mut self,
        endpoint: u64,
        errno: u32,
        address: &[u8],
        range: (u64, u64),
        count: u64,
    ) {
        let known = self.unread.len() < REPORTS
            || self.unread.contains_key(&(endpoint, errno, address.into()));
        let address = if known { address } else { &[] };
        let told = self
            .unread
            .entry((endpoint, errno, address.into()))
            .or_insert((range.0, range.1, 0));
        told.0 = told.0.min(range.0);
        told.1 = told.1.max(range.1);
        told.2 += count;
    }

    /// The peer has begun anew: nobody is there who waits for what was to be told.
    pub fn forget_reports(&mut self) {
        self.unread.clear();
        self.void_to = self.last;
    }

    // ---- the peer's word -----------------------------------------------------------------------------------------

    /// The peer has everything up to this record.
    ///
    /// # Errors
    /// [`Broken`] when that was never sent.
    pub fn confirm(&mut self, received: u64, refunds: &mut Vec<Refund>) -> Result<(), Broken> {
        if received > self.taken {
            return Err(Broken::Malformed(
                "a record is confirmed that was never sent",
            ));
        }
        // Most come one behind the other from the same sender.
        let mut of = (AGENT, 0);
        while self.confirmed < received {
            let Some(entry) = self.entries.pop_front() else {
                break;
            };
            self.confirmed += 1;
            if of.0 != entry.sender {
                self.shares.take(of.0, of.1);
                of = (entry.sender, 0);
            }
            of.1 += u64::from(entry.bytes);
            self.used -= u64::from(entry.bytes);
            if let Some(refund) = entry.refund {
                refund.join(refunds);
            }
        }
        self.shares.take(of.0, of.1);
        while let Some((number, who)) = self.gone.front().copied()
            && number <= self.confirmed
        {
            self.gone.pop_front();
            self.senders.remove(&who);
        }
        // What was confirmed on a former link is not sent again.
        self.at = self.at.max(self.confirmed);
        self.chunks.forget(self.confirmed);
        Ok(())
    }

    /// The receiver behind a destination allows costs up to `limit`.
    ///
    /// # Errors
    /// [`Broken`] when that is more than was used and a window.
    pub fn allow(
        &mut self,
        number: u32,
        limit: u64,
        refunds: &mut Vec<Refund>,
    ) -> Result<(), Broken> {
        if number > self.last_destination {
            return Err(Broken::Malformed("credit for what was never opened"));
        }
        // It may have been forgotten meanwhile.
        let Some(d) = self.destinations.get_mut(&number) else {
            return Ok(());
        };
        if limit > d.consumed + WINDOW {
            return Err(Broken::Malformed("credit for what was never sent"));
        }
        d.limit = d.limit.max(limit);
        // What has come back is what has reached the receiver's ring.
        let returned = d.limit - WINDOW;
        let mut of = (AGENT, 0);
        while d.returned < returned
            && let Some((cost, _, charge)) = d.entries.pop_front()
        {
            d.returned += u64::from(cost);
            d.window = WINDOW.min(d.window + u64::from(cost));
            if of.0 != charge.sender {
                d.shares.take(of.0, of.1);
                of = (charge.sender, 0);
            }
            of.1 += u64::from(cost);
            if let Some(refund) = refund(&charge, cost.into()) {
                refund.join(refunds);
            }
        }
        d.shares.take(of.0, of.1);
        if d.returned != returned {
            return Err(Broken::Malformed("credit for half a message"));
        }
        Ok(())
    }

    /// Sends again what is behind this record.
    ///
    /// # Errors
    /// [`Broken`] when it was never sent, or when something behind it was confirmed before.
    pub fn rewind(&mut self, received: u64, refunds: &mut Vec<Refund>) -> Result<(), Broken> {
        if received < self.confirmed {
            return Err(Broken::Malformed("what was confirmed is forgotten"));
        }
        self.confirm(received, refunds)?;
        self.at = self.confirmed;
        Ok(())
    }

    /// The next batch, behind `room` bytes and in parts of which the first has that room: at most so many bytes, but for one record
    /// if there is any.
    pub fn take(
        &mut self,
        room: usize,
        received: u64,
        credits: &[(u32, u64)],
        max_bytes: usize,
    ) -> Vec<Bytes> {
        let mut unread: Vec<_> = self.unread.drain().collect();
        unread.sort_unstable();
        for ((endpoint, errno, address), (first, last, count)) in unread {
            self.put(&Record::Unread {
                endpoint,
                first,
                last,
                count,
                errno,
                address: &address,
            });
        }
        let first = self.at + 1;
        let mut left = max_bytes.saturating_sub(BATCH_HEADER + credits.len() * CREDIT);
        let mut parts: Vec<(usize, Range<usize>)> = Vec::new();
        let mut at = self.chunks.all.partition_point(|c| c.next() <= first);
        while let Some(chunk) = self.chunks.all.get(at) {
            let begin = chunk.end_before(self.at + 1);
            let next = (self.at + 1 - chunk.first) as usize;
            let fit = chunk.ends[next..].partition_point(|end| *end as usize - begin <= left);
            // One record is taken even if it is longer than what was asked for.
            let fit = fit.max(usize::from(self.at + 1 == first && parts.is_empty()));
            if fit == 0 {
                break;
            }
            let end = chunk.ends[next + fit - 1] as usize;
            parts.push((at, begin..end));
            self.at += fit as u64;
            left = left.saturating_sub(end - begin);
            if self.at + 1 < chunk.next() {
                break;
            }
            at += 1;
        }
        self.taken = self.taken.max(self.at);
        let count = (self.at + 1 - first) as u32;
        let head = Batch::encode(received, first, count, credits);
        let mut out = Vec::with_capacity(room + head.len());
        out.resize(room, 0);
        out.extend_from_slice(&head);
        let mut shared = Vec::with_capacity(parts.len() + 1);
        for (at, range) in parts {
            let chunk = &mut self.chunks.all[at];
            if range.len() < SHARED {
                out.extend_from_slice(&chunk.bytes()[range]);
            } else {
                shared.push(Bytes::from(std::mem::take(&mut out)));
                shared.push(chunk.part(range));
            }
        }
        shared.push(out.into());
        shared.retain(|part| !part.is_empty());
        shared
    }

    /// Begins to count anew, as if nothing had been sent. What was missed is missing still, and so may be what was on its way.
    pub fn restart(&mut self) -> Remains {
        let mut old = std::mem::take(self);
        let mut remains = Remains {
            refunds: old.entries.iter().filter_map(|e| e.refund).collect(),
            ..Remains::default()
        };
        for d in old.destinations.values_mut() {
            remains.seats.push(d.seat);
            for (cost, number, charge) in d.entries.drain(..) {
                if number <= old.taken {
                    remains.unknown.push(charge);
                } else {
                    remains.unsent.push((charge, d.address.clone()));
                }
                remains.refunds.extend(refund(&charge, cost.into()));
            }
        }
        remains.seats.sort_unstable();
        self.gaps = std::mem::take(&mut old.gaps);
        self.gap_count = old.gap_count;
        self.unread = std::mem::take(&mut old.unread);
        self.senders = std::mem::take(&mut old.senders);
        let mut sources: HashMap<u32, (Ref, Box<[u8]>)> = HashMap::new();
        for (who, known) in &mut self.senders {
            sources.insert(known.number, (*who, std::mem::take(&mut known.src)));
            known.number = 0;
        }
        for (number, record) in old.unconfirmed() {
            let (sender, to, src, dst, range, count, reason) = match record {
                Record::Message(m) if !matches!(m.to, To::One(_)) => {
                    let range = (m.seq, m.seq);
                    (m.sender, m.to, m.src, m.dst, range, 1, LANE_RESTART)
                }
                Record::Unread { .. } | Record::NoReply { .. } if number <= old.void_to => continue,
                Record::Unread {
                    endpoint,
                    first,
                    last,
                    count,
                    errno,
                    address,
                } => {
                    self.report_unread(endpoint, errno, address, (first, last), count);
                    continue;
                }
                Record::NoReply { .. } => {
                    self.put(&record);
                    continue;
                }
                Record::Message(m) if !m.ctl.is_empty() => {
                    // It took no credit.
                    remains
                        .unknown
                        .extend(sources.get(&m.sender).map(|(sender, _)| Charge {
                            sender: *sender,
                            seq: m.seq,
                            ..Charge::AGENT
                        }));
                    continue;
                }
                Record::Missed {
                    sender,
                    to,
                    first,
                    last,
                    count,
                    reason,
                    src,
                    dst,
                } => (sender, to, src, dst, (first, last), count, reason),
                _ => continue,
            };
            if let Some((who, latest)) = sources.get(&sender) {
                let src = if src.is_empty() { latest } else { src };
                let count = if number <= old.taken { 0 } else { count };
                self.miss(*who, to, src, dst, range, count, reason);
            }
        }
        // Whoever is there is named again with its next message, and may be told of those before.
        let gaps = &self.gaps;
        self.senders
            .retain(|who, known| !known.is_gone || gaps.contains_key(who));
        remains.unknown.sort_unstable_by_key(|c| (c.sender, c.seq));
        remains
            .unsent
            .sort_unstable_by_key(|(c, _)| (c.sender, c.seq));
        remains
    }

    /// Records that are not confirmed, with their numbers and in their order.
    fn unconfirmed(&self) -> impl Iterator<Item = (u64, Record<'_>)> {
        self.chunks.all.iter().flat_map(|chunk| {
            let first = chunk.first.max(self.confirmed + 1);
            (first..chunk.next()).filter_map(|number| {
                let bytes = &chunk.bytes()[chunk.end_before(number)..chunk.end_before(number + 1)];
                Record::decode(bytes)
                    .ok()
                    .map(|(record, _)| (number, record))
            })
        })
    }
}

/// Why multicasts are missing when a lane began anew: as an agent that does (proto/notice.py).
const LANE_RESTART: u32 = 3;

/// What the sender of a message gets back, if it has an account.
#[must_use]
pub fn refund(charge: &Charge, bytes: u64) -> Option<Refund> {
    (charge.principal != Charge::AGENT.principal).then_some(Refund {
        principal: charge.principal,
        bytes: bytes + u64::from(charge.body),
        messages: 1,
        fds: 0,
    })
}
