//! The switch: takes records from endpoints, decides, and puts them into the rings of those who get them. It never waits.
//!
//! Invariants:
//! 1. One record is decided and delivered to all before the next is looked at: every receiver on this host sees multicasts in
//!    the same order (D11), and each sender's messages arrive in the order in which it sent them.
//! 2. Every record gets a verdict: accepted, or an errno (D7). Nothing is dropped without a record that says so (D12).
//! 3. The source is stamped here from the switch's own tables (D6).
//! 4. Nothing in shared memory is trusted: headers and addresses are copied out, checked, and only the copies are used.
//!
//! There is no policy here: who may own, send and hear is set from outside by calls, and applied.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bloom::Bits;
use crate::bus::{Bus, Overflow, Subscription, Target};
use crate::endpoint::{
    AGENT, Charge, Credentials, Endpoint, Held, Io, Reason, Ref, Refund, Room, SendGrant, record,
};
use crate::filter::Filter;
use crate::frame::{
    BODY_IN_MEMFD, BY_TERMS, CHAIN, EXPECT_REPLY, FDS_LOST, MESSAGE, MONITOR, MULTICAST, NO_REPLY,
    NO_WAIT, NOTICE, RAW, RX_HEADER, RxHeader, TERMS, TX_HEADER, TX_STATUS, TxHeader, UNICAST,
};
use crate::memory::{BODY_SEALS, Segment, file_size, futex_wake, seals};
use crate::ring::{Memory, Violation, padded};
use crate::sync::Ordering;

/// Accepted.
pub const OK: i32 = 1;
/// Records taken from one endpoint before the next has its turn.
const TURN: usize = 256;
/// Requests that one endpoint may have open.
const MAX_REQUESTS: u32 = 4096;
/// The largest body, in bytes (D14).
const MESSAGE_BYTES: u64 = 16 << 20;
/// Records that the agent may have waiting for one endpoint; more are a reason to cut it off.
const MAX_BACKLOG: usize = 65_536;

/// Limits per principal, over all its endpoints (D18).
#[derive(Debug, Clone, Copy)]
pub struct Quota {
    /// Bytes unread in rings of others.
    pub bytes: u64,
    /// Messages unread.
    pub messages: u64,
    /// Descriptors not received yet.
    pub fds: u64,
}

impl Default for Quota {
    fn default() -> Self {
        Self {
            bytes: 256 << 20,
            messages: 1 << 20,
            fds: 256,
        }
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Account {
    bytes: u64,
    messages: u64,
    fds: u64,
}

/// What Python must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The endpoint broke a rule of its rings or line.
    Violated(u64, &'static str),
    /// The endpoint was too slow and had asked to be cut off in that case.
    TooSlow(u64),
}

/// A message on its way, as decided.
struct Letter<'a> {
    from: Ref,
    header: RxHeader,
    src: &'a [u8],
    dst: &'a [u8],
    ident: &'a [u8],
    body: Body<'a>,
    fds: &'a [RawFd],
    charge: Charge,
}

/// Where a body lies.
#[derive(Clone, Copy)]
enum Body<'a> {
    /// In the sender's ring.
    Ring(&'a Arc<Segment>, u64),
    /// In private memory.
    Bytes(&'a [u8]),
}

/// The switch of one agent.
#[derive(Default)]
pub struct Switch {
    seats: Vec<(u32, Option<Box<Endpoint>>)>,
    vacant: Vec<u32>,
    by_id: HashMap<u64, Ref>,
    buses: HashMap<u32, Bus>,
    accounts: HashMap<u32, Account>,
    quota: Quota,
    active: Vec<Ref>,
    dirty: Vec<Ref>,
    events: Vec<Event>,
    refunds: Vec<Refund>,
    scratch: Vec<u8>,
    swept: Option<Instant>,
}

impl Switch {
    /// A switch with these limits.
    #[must_use]
    pub fn new(quota: Quota) -> Self {
        Self {
            quota,
            ..Self::default()
        }
    }

    // ---- seats -------------------------------------------------------------------------------------------------

    fn get(&self, who: Ref) -> Option<&Endpoint> {
        let (turn, seat) = self.seats.get(who.slot as usize)?;
        if *turn == who.turn {
            seat.as_deref()
        } else {
            None
        }
    }

    fn get_mut(&mut self, who: Ref) -> Option<&mut Endpoint> {
        let (turn, seat) = self.seats.get_mut(who.slot as usize)?;
        if *turn == who.turn {
            seat.as_deref_mut()
        } else {
            None
        }
    }

    /// The endpoint that Python calls `id`.
    #[must_use]
    pub fn find(&self, id: u64) -> Option<Ref> {
        self.by_id.get(&id).copied()
    }

    /// What the switch knows of an endpoint.
    #[must_use]
    pub fn endpoint(&self, id: u64) -> Option<&Endpoint> {
        self.get(self.find(id)?)
    }

    /// The same, to change it.
    pub fn endpoint_mut(&mut self, id: u64) -> Option<&mut Endpoint> {
        let who = self.find(id)?;
        self.get_mut(who)
    }

    /// Adds an endpoint without rings, which counts as full until it is connected.
    pub fn add_endpoint(
        &mut self,
        id: u64,
        principal: u32,
        credentials: Credentials,
        ident: Box<[u8]>,
    ) -> Ref {
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.seats.push((0, None));
            self.seats.len() as u32 - 1
        });
        let seat = &mut self.seats[slot as usize];
        seat.0 += 1;
        let me = Ref { slot, turn: seat.0 };
        seat.1 = Some(Box::new(Endpoint::new(
            me,
            id,
            principal,
            credentials,
            ident,
        )));
        self.by_id.insert(id, me);
        me
    }

    /// Gives an endpoint its rings and its line.
    pub fn connect(&mut self, who: Ref, io: Io) {
        if let Some(e) = self.get_mut(who) {
            e.io = Some(io);
            e.cut = false;
        }
        self.make_room(who);
        self.activate(who);
    }

    /// Takes an endpoint away, after everything that it had sent. Returns who is to be told of unread messages:
    /// Python's number of the sender, first, last and count of them.
    pub fn remove_endpoint(&mut self, id: u64, now: Instant) -> Vec<(u64, u64, u64, u64)> {
        let Some(me) = self.find(id) else {
            return Vec::new();
        };
        if self.get(me).is_some_and(|e| !e.cut) {
            while self.turn(me, now) == TURN {}
        }
        let mut refunds = std::mem::take(&mut self.refunds);
        let (mut unread, mut unanswered, mut waiters, mut bus) =
            (Vec::new(), Vec::new(), Vec::new(), None);
        let mut address: Box<[u8]> = Box::default();
        if let Some(e) = self.get_mut(me) {
            // A spoilt index changes nothing any more: the endpoint goes.
            let _ = e.reclaim(&mut refunds);
            refunds.extend(e.refunds());
            unread = e.unread();
            unanswered = e
                .unanswered
                .drain()
                .map(|((who, serial), _)| (who, serial))
                .collect();
            waiters = std::mem::take(&mut e.waiters);
            bus = e.bus;
            address = e.default_source().into();
        }
        self.refund(&mut refunds);
        self.refunds = refunds;
        if let Some(bus) = bus.and_then(|b| self.buses.get_mut(&b)) {
            bus.forget(me);
        }
        for (who, serial) in unanswered {
            self.answer_lost(who, serial, &address);
        }
        self.seats[me.slot as usize].1 = None;
        self.vacant.push(me.slot);
        self.by_id.remove(&id);
        self.active.retain(|a| *a != me);
        for (who, _) in waiters {
            self.room_for(who);
        }
        self.publish();
        unread
            .into_iter()
            .filter_map(|(who, a, b, n)| self.get(who).map(|e| (e.id, a, b, n)))
            .collect()
    }

    fn answer_lost(&mut self, who: Ref, serial: u64, address: &[u8]) {
        let Some(e) = self.get_mut(who) else { return };
        e.requests = e.requests.saturating_sub(1);
        let header = RxHeader {
            kind: NO_REPLY,
            reply_to: serial,
            ..RxHeader::default()
        };
        let bytes = record(header, address, &[], &[], &[], &[]);
        self.push(who, bytes, Charge::AGENT);
    }

    /// Hands an endpoint a finished record that must not be lost.
    fn push(&mut self, who: Ref, bytes: Vec<u8>, charge: Charge) {
        let Some(e) = self.get_mut(who) else { return };
        if e.backlog() >= MAX_BACKLOG {
            e.cut = true;
            let id = e.id;
            self.events.push(Event::TooSlow(id));
            return;
        }
        e.push(bytes, charge);
        self.make_room(who);
    }

    // ---- buses, addresses, rights: calls from outside -------------------------------------------------------------

    /// Adds a bus.
    pub fn add_bus(&mut self, bus: u32, width: usize, key: [u8; 16]) {
        self.buses.insert(bus, Bus::new(width, key));
    }

    /// Removes a bus; its endpoints have gone before.
    pub fn remove_bus(&mut self, bus: u32) {
        self.buses.remove(&bus);
    }

    /// A bus.
    pub fn bus_mut(&mut self, bus: u32) -> Option<&mut Bus> {
        self.buses.get_mut(&bus)
    }

    /// Puts an endpoint on a bus. It can talk to the master only, until it owns an address.
    pub fn attach(&mut self, id: u64, bus: u32) -> bool {
        let Some(me) = self.find(id) else {
            return false;
        };
        let Some(e) = self.get_mut(me) else {
            return false;
        };
        e.bus = Some(bus);
        let provisional = e.provisional.clone();
        match self.buses.get_mut(&bus) {
            Some(bus) => {
                bus.provisional.insert(provisional, me);
                true
            }
            None => false,
        }
    }

    /// Gives an address to an endpoint. `false` when somebody else has it.
    pub fn own(&mut self, id: u64, address: &[u8]) -> bool {
        let Some(me) = self.find(id) else {
            return false;
        };
        let Some(bus) = self
            .get(me)
            .and_then(|e| e.bus)
            .and_then(|b| self.buses.get_mut(&b))
        else {
            return false;
        };
        match bus.owners.get(address) {
            Some(owner) if *owner == me => return true,
            Some(_) => return false,
            None => bus.owners.insert(address.into(), me),
        };
        if let Some(e) = self.get_mut(me) {
            e.addresses.push(address.into());
        }
        true
    }

    /// Takes an address away. `false` when the endpoint did not own it.
    pub fn disown(&mut self, id: u64, address: &[u8]) -> bool {
        let Some(me) = self.find(id) else {
            return false;
        };
        let Some(e) = self.get_mut(me) else {
            return false;
        };
        let before = e.addresses.len();
        e.addresses.retain(|a| **a != *address);
        if e.addresses.len() == before {
            return false;
        }
        if let Some(bus) = e.bus.and_then(|b| self.buses.get_mut(&b)) {
            bus.owners.remove(address);
        }
        true
    }

    /// Sends a notice from the address-less source to endpoints.
    pub fn notify(&mut self, ids: &[u64], body: &[u8]) {
        for id in ids {
            let Some(who) = self.find(*id) else { continue };
            let bytes = record(
                RxHeader {
                    kind: NOTICE,
                    ..RxHeader::default()
                },
                &[],
                &[],
                &[],
                &[],
                body,
            );
            self.push(who, bytes, Charge::AGENT);
        }
        self.publish();
    }

    /// Sends a message with control items from one endpoint to another, behind everything that is already on its way there.
    ///
    /// The items are in effect already; the message may be read any time after this call. Returns `false` when an endpoint is unknown.
    #[allow(
        clippy::too_many_arguments,
        reason = "the parts of one message, each once"
    )]
    pub fn deliver(
        &mut self,
        from: u64,
        to: u64,
        src: &[u8],
        dst: &[u8],
        ctl: &[u8],
        body: &[u8],
        serial: u64,
        reply_to: u64,
        expires: Option<Instant>,
        now: Instant,
    ) -> bool {
        let (Some(from), Some(to)) = (self.find(from), self.find(to)) else {
            return false;
        };
        let wants = self.get(to).is_some_and(|e| e.wants_ident);
        let Some(e) = self.get_mut(from) else {
            return false;
        };
        e.seq += 1;
        e.stats.sent += 1;
        let Credentials { pid, uid, gid } = e.credentials;
        let header = RxHeader {
            kind: MESSAGE,
            seq: e.seq,
            serial,
            reply_to,
            pid,
            uid,
            gid,
            ..RxHeader::default()
        };
        let charge = Charge {
            seq: e.seq,
            told: true,
            ..Charge::AGENT
        };
        let ident = if wants {
            e.ident.clone()
        } else {
            Box::default()
        };
        self.answered(from, to, reply_to);
        let bytes = record(header, src, dst, &ident, ctl, body);
        self.push(to, bytes, charge);
        if let Some(t) = self.get_mut(to) {
            t.stats.received += 1;
        }
        if let Some(until) = expires {
            self.expect(from, to, serial, until, now);
        }
        self.publish();
        true
    }

    /// What happened since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Whether something happened that Python must know.
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }
}

// ---- messages ------------------------------------------------------------------------------------------------------

impl Switch {
    /// Serves all active endpoints once. Returns how many records were taken.
    pub fn round(&mut self, now: Instant) -> usize {
        let mut taken = 0;
        let mut at = 0;
        while at < self.active.len() {
            let who = self.active[at];
            let n = self.turn(who, now);
            taken += n;
            let Some(e) = self.get_mut(who) else {
                self.active.swap_remove(at);
                continue;
            };
            e.idle_rounds = if n > 0 {
                0
            } else {
                e.idle_rounds.saturating_add(1)
            };
            at += 1;
        }
        taken
    }

    /// Lets endpoints that have been silent for `rounds` rounds fall asleep: from then on they kick. Returns how many stay active.
    pub fn doze(&mut self, rounds: u32) -> usize {
        let mut at = 0;
        while at < self.active.len() {
            let who = self.active[at];
            let asleep = match self.get_mut(who) {
                None => true,
                Some(e) if e.cut => {
                    e.active = false;
                    true
                }
                Some(e) if e.idle_rounds >= rounds => {
                    match e.io.as_mut().map(|io| io.tx.sleep_begin()) {
                        None => {
                            e.active = false;
                            true
                        }
                        Some(Ok(true)) => {
                            e.active = false;
                            true
                        }
                        Some(Ok(false)) => {
                            if let Some(io) = &e.io {
                                io.tx.sleep_end();
                            }
                            e.idle_rounds = 0;
                            false
                        }
                        Some(Err(v)) => {
                            self.violated(who, v);
                            true
                        }
                    }
                }
                Some(_) => false,
            };
            if asleep {
                self.active.swap_remove(at);
            } else {
                at += 1;
            }
        }
        self.active.len()
    }

    /// Whether any endpoint is served in every round now.
    #[must_use]
    pub fn has_active(&self) -> bool {
        !self.active.is_empty()
    }

    /// Serves an endpoint in every round until it falls silent.
    pub fn activate(&mut self, who: Ref) {
        if let Some(e) = self.get_mut(who) {
            e.idle_rounds = 0;
            if !e.active && !e.cut && e.io.is_some() {
                e.active = true;
                self.active.push(who);
            }
        }
    }

    /// Something came on an endpoint's line: there are records, or it has released some.
    pub fn kicked(&mut self, who: Ref) {
        let Some(e) = self.get_mut(who) else { return };
        let waiting = e.waiting;
        if let Some(io) = &mut e.io
            && let Err(v) = io.drain(waiting, false)
        {
            self.violated(who, v);
            return;
        }
        self.make_room(who);
        self.activate(who);
        self.publish();
    }

    fn violated(&mut self, who: Ref, violation: Violation) {
        if let Some(e) = self.get_mut(who)
            && !e.cut
        {
            e.cut = true;
            let id = e.id;
            self.events.push(Event::Violated(id, violation.0));
        }
    }

    /// Takes up to a turn's worth of records from one endpoint. Returns how many.
    fn turn(&mut self, me: Ref, now: Instant) -> usize {
        let Some(segment) = self
            .get(me)
            .filter(|e| !e.cut)
            .and_then(|e| e.io.as_ref())
            .map(|io| io.tx.memory().clone())
        else {
            return 0;
        };
        let mut taken = 0;
        while taken < TURN {
            let Some(io) = self.get_mut(me).and_then(|e| e.io.as_mut()) else {
                return taken;
            };
            let (pos, len) = match io.tx.peek(TX_HEADER as u32) {
                Ok(Some(found)) => found,
                Ok(None) => break,
                Err(v) => {
                    self.violated(me, v);
                    break;
                }
            };
            let mut raw = [0u8; TX_HEADER as usize];
            segment.copy_out(pos, &mut raw);
            match TxHeader::decode(&raw, len).and_then(|h| self.decide(me, &segment, pos, &h, now))
            {
                Ok(verdict) => segment
                    .word_at(pos + TX_STATUS)
                    .store(verdict as u32, Ordering::Relaxed),
                Err(v) => {
                    self.violated(me, v);
                    break;
                }
            }
            if let Some(io) = self.get_mut(me).and_then(|e| e.io.as_mut()) {
                io.tx.advance(len);
            }
            taken += 1;
        }
        if taken > 0 {
            self.publish();
            if let Some(io) = self.get_mut(me).and_then(|e| e.io.as_mut()) {
                let pos = io.tx.position();
                io.tx.release(pos);
                if io.tx.must_wake() {
                    bump(&segment);
                }
            }
        }
        taken
    }

    /// Makes everything visible that was put into rings, and wakes sleepers: once a turn, not once a message.
    pub fn publish(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for who in dirty.drain(..) {
            if let Some(e) = self.get_mut(who) {
                e.publish();
            }
        }
        self.dirty = dirty;
    }

    fn decide(
        &mut self,
        me: Ref,
        segment: &Arc<Segment>,
        pos: u64,
        h: &TxHeader,
        now: Instant,
    ) -> Result<i32, Violation> {
        let Some(e) = self.get_mut(me) else {
            return Ok(-libc::EHOSTUNREACH);
        };
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut lost = false;
        if h.fds > 0 {
            if let Some(io) = &mut e.io {
                (fds, lost) = io.take_fds()?;
            }
            if !lost && fds.len() != usize::from(h.fds) {
                return Err(Violation("a message announces more descriptors than came"));
            }
        }
        let verdict = if h.flags & CHAIN != 0 && e.chain_broken {
            -libc::ECANCELED
        } else if lost {
            -libc::EMFILE
        } else {
            self.judge(me, segment, pos, h, &fds, now)
        };
        if let Some(e) = self.get_mut(me) {
            e.chain_broken = verdict != OK;
            if verdict == OK {
                e.stats.sent += 1
            } else {
                e.stats.refused += 1
            }
        }
        Ok(verdict)
    }

    /// The verdict on one record: `OK` or a negative errno. Whatever it delivers is charged and counted.
    fn judge(
        &mut self,
        me: Ref,
        segment: &Arc<Segment>,
        pos: u64,
        h: &TxHeader,
        fds: &[OwnedFd],
        now: Instant,
    ) -> i32 {
        let mut scratch = std::mem::take(&mut self.scratch);
        let verdict = self.judge_with(me, segment, pos, h, fds, now, &mut scratch);
        self.scratch = scratch;
        verdict
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "one record and what belongs to it"
    )]
    fn judge_with(
        &mut self,
        me: Ref,
        segment: &Arc<Segment>,
        pos: u64,
        h: &TxHeader,
        fds: &[OwnedFd],
        now: Instant,
        scratch: &mut Vec<u8>,
    ) -> i32 {
        let Some(e) = self.get(me) else {
            return -libc::EHOSTUNREACH;
        };
        if e.silent {
            return -libc::EPIPE;
        }
        let Some(bus_id) = e.bus else {
            return -libc::EHOSTUNREACH;
        };
        if u64::from(h.body_len) > MESSAGE_BYTES {
            return -libc::EMSGSIZE;
        }
        if h.flags & EXPECT_REPLY != 0 && e.requests >= MAX_REQUESTS {
            return -libc::EDQUOT;
        }
        // Source and destination are copied out before anything is asked about them.
        let (src_len, dst_len) = (usize::from(h.src_len), usize::from(h.dst_len));
        scratch.resize(src_len + dst_len, 0);
        segment.copy_out(pos + TX_HEADER, &mut scratch[..src_len]);
        segment.copy_out(pos + h.dst_at(), &mut scratch[src_len..]);
        if src_len == 0 {
            scratch.splice(..0, e.default_source().iter().copied());
        } else if !e.addresses.iter().any(|a| **a == scratch[..src_len]) {
            return -libc::EADDRNOTAVAIL;
        }
        let (src, dst) = scratch.split_at(scratch.len() - dst_len);
        let joined = !e.addresses.is_empty();
        let ident = e.ident.clone();
        let Credentials { pid, uid, gid } = e.credentials;
        let body_fd = h.flags & BODY_IN_MEMFD != 0;
        if let Some(errno) = check_fds(fds, body_fd, h.body_len.into()) {
            return -errno;
        }
        let raw_fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let seq = e.seq + 1;
        let body = if body_fd {
            Body::Bytes(&[])
        } else {
            Body::Ring(segment, pos + h.body_at())
        };
        let flags = (h.flags & BODY_IN_MEMFD)
            | match h.kind {
                UNICAST => 0,
                TERMS => MULTICAST | BY_TERMS,
                _ => MULTICAST,
            };
        let header = RxHeader {
            kind: MESSAGE,
            flags,
            fds: fds.len() as u8,
            seq,
            serial: h.serial,
            reply_to: h.reply_to,
            pid,
            uid,
            gid,
            src_len: src.len() as u16,
            dst_len: dst.len() as u16,
            body_len: h.body_len,
            ..RxHeader::default()
        };
        let charge = Charge {
            sender: me,
            seq,
            principal: e.principal,
            fds: fds.len() as u8,
            told: h.kind == UNICAST,
        };
        let letter = Letter {
            from: me,
            header,
            src,
            dst,
            ident: &ident,
            body,
            fds: &raw_fds,
            charge,
        };
        let no_wait = h.flags & NO_WAIT != 0;
        let verdict = if h.kind == UNICAST {
            self.unicast(bus_id, joined, h, &letter, no_wait, now)
        } else if !joined {
            -libc::EHOSTUNREACH
        } else if fds.len() > usize::from(body_fd) {
            -libc::EOPNOTSUPP
        } else {
            self.multicast(bus_id, h, &letter, now)
        };
        if verdict == OK {
            if let Some(e) = self.get_mut(me) {
                e.seq = seq;
            }
            self.copy_to_monitors(bus_id, &letter, body_fd);
        }
        verdict
    }

    fn unicast(
        &mut self,
        bus_id: u32,
        joined: bool,
        h: &TxHeader,
        letter: &Letter<'_>,
        no_wait: bool,
        now: Instant,
    ) -> i32 {
        let Some(bus) = self.buses.get(&bus_id) else {
            return -libc::EHOSTUNREACH;
        };
        let dst = letter.dst;
        let is_master = bus.master == Some(letter.from);
        if dst.is_empty() {
            return -libc::EDESTADDRREQ;
        }
        let to = match bus.owners.get(dst) {
            Some(owner) => *owner,
            None if dst[0] == b'@' && is_master => match bus.provisional.get(dst) {
                Some(owner) => *owner,
                None => return -libc::EHOSTUNREACH,
            },
            // Unknown names go to the master (D7); unique addresses that are gone do not come back (D3).
            None if dst[0].is_ascii_digit() || dst[0] == b'@' || is_master || !joined => {
                return -libc::EHOSTUNREACH;
            }
            None => match bus.master {
                Some(master) => master,
                None => return -libc::EHOSTDOWN,
            },
        };
        if !joined && bus.master != Some(to) {
            return -libc::EHOSTUNREACH;
        }
        match self.put(to, letter) {
            Put::Done => {}
            Put::No(errno) => return -errno,
            Put::Full(over_share) => {
                self.wait_for(letter.from, to, letter.header.sized().len.into());
                return if over_share && no_wait {
                    -libc::EDQUOT
                } else {
                    -libc::EAGAIN
                };
            }
        }
        self.answered(letter.from, to, h.reply_to);
        if h.flags & EXPECT_REPLY != 0 {
            let until = now + Duration::from_millis(h.deadline_ms.into());
            self.expect(letter.from, to, h.serial, until, now);
        }
        OK
    }

    fn expect(&mut self, from: Ref, to: Ref, serial: u64, until: Instant, now: Instant) {
        let mut expired = Vec::new();
        if let Some(t) = self.get_mut(to) {
            // Requests whose askers gave up are swept when there are many, so that the table stays in proportion.
            if t.unanswered.len() >= 64 && t.unanswered.len().is_power_of_two() {
                t.unanswered.retain(|(who, _), until| {
                    let keep = *until > now;
                    if !keep {
                        expired.push(*who);
                    }
                    keep
                });
            }
            t.unanswered.insert((from, serial), until);
        }
        for who in expired {
            if let Some(e) = self.get_mut(who) {
                e.requests = e.requests.saturating_sub(1);
            }
        }
        if let Some(e) = self.get_mut(from) {
            e.requests += 1;
        }
    }

    /// A message from `from` to `to` that answers request number `reply_to`.
    fn answered(&mut self, from: Ref, to: Ref, reply_to: u64) {
        if reply_to == 0 {
            return;
        }
        let known = self
            .get_mut(from)
            .is_some_and(|e| e.unanswered.remove(&(to, reply_to)).is_some());
        if known && let Some(t) = self.get_mut(to) {
            t.requests = t.requests.saturating_sub(1);
        }
    }

    fn multicast(&mut self, bus_id: u32, h: &TxHeader, letter: &Letter<'_>, now: Instant) -> i32 {
        let Some(bus) = self.buses.get_mut(&bus_id) else {
            return -libc::EHOSTUNREACH;
        };
        let way;
        let raw_bits;
        let raw_targets;
        let (bits, hashes, targets): (&Bits, Option<&[u64]>, &[Target]) = if h.kind == RAW {
            if letter.dst.len() * 8 != bus.width {
                return -libc::EDOM;
            }
            match Bits::from_bytes(letter.dst) {
                Ok(bits) => raw_bits = bits,
                Err(_) => return -libc::EDOM,
            }
            raw_targets = bus.targets(&raw_bits, None);
            (&raw_bits, None, &raw_targets)
        } else {
            match bus.way(letter.dst) {
                Ok(found) => way = found,
                Err(_) => return -libc::EINVAL,
            }
            (&way.bits, Some(&way.hashes), &way.targets)
        };
        let width = bus.width as u32;
        let Some(sender) = self.get(letter.from) else {
            return -libc::EHOSTUNREACH;
        };
        if !may_send(&sender.send_grants, bits, hashes, width) {
            return -libc::EPERM;
        }
        let need = u64::from(letter.header.sized().len);
        if self.over_quota(
            letter.charge.principal,
            need * targets.len() as u64,
            targets.len() as u64,
            0,
            now,
        ) {
            return -libc::EDQUOT;
        }
        // Senders wait for subscribers that asked for it, and then nobody gets the message: all or none (D12).
        for target in targets {
            if let Overflow::Block(ms) = target.overflow
                && self.passes_filter(target.to, letter)
                && self.room(target.to, letter.from, need) != Room::Yes
            {
                let Some(t) = self.get_mut(target.to) else {
                    continue;
                };
                let since = *t.full_since.get_or_insert(now);
                if now - since < Duration::from_millis(ms.into()) {
                    self.wait_for(letter.from, target.to, need);
                    return -libc::EAGAIN;
                }
            }
        }
        for target in targets {
            if self.passes_filter(target.to, letter) {
                self.put_multicast(*target, letter);
            }
        }
        OK
    }

    fn passes_filter(&mut self, to: Ref, letter: &Letter<'_>) -> bool {
        let mut copy = Vec::new();
        let Some(t) = self.get(to) else { return false };
        let Some(filter) = &t.filter else { return true };
        match letter.body {
            // The filter sees a private copy: the sender could change the ring under it.
            Body::Ring(segment, pos) => {
                copy.resize(letter.header.body_len as usize, 0);
                segment.copy_out(pos, &mut copy);
            }
            Body::Bytes(bytes) => copy.extend_from_slice(bytes),
        }
        filter.passes(&mut copy)
    }

    fn put_multicast(&mut self, target: Target, letter: &Letter<'_>) {
        if target.overflow == Overflow::Conflate {
            self.put_conflated(target, letter);
            return;
        }
        let reason = match self.put(target.to, letter) {
            Put::Done => return,
            Put::Full(_) | Put::No(_) => match target.overflow {
                Overflow::Block(_) => Reason::Deadline,
                _ => Reason::Full,
            },
        };
        let Some(t) = self.get_mut(target.to) else {
            return;
        };
        if target.overflow == Overflow::Disconnect && t.io.is_some() {
            if !t.cut {
                t.cut = true;
                let id = t.id;
                self.events.push(Event::TooSlow(id));
            }
            return;
        }
        t.miss(letter.from, letter.src, letter.header.seq, reason);
        self.want_room(target.to);
    }

    /// At most one unread message of a stream lies in the ring; the newest one waits outside and replaces its predecessor.
    fn put_conflated(&mut self, target: Target, letter: &Letter<'_>) {
        let stream = (target.by, letter.from, hash(letter.dst));
        let refunds = &mut self.refunds;
        let Some((_, Some(t))) = self.seats.get_mut(target.to.slot as usize) else {
            return;
        };
        if t.me != target.to || letter.header.flags & BODY_IN_MEMFD != 0 {
            // A body in a memfd is not held back: it goes the ordinary way.
            self.put_multicast(
                Target {
                    overflow: Overflow::Gap,
                    ..target
                },
                letter,
            );
            return;
        }
        let _ = t.reclaim(refunds);
        let released = t.io.as_ref().map_or(0, |io| io.rx.released());
        let unread = t.held.get(&stream).is_some_and(|h| h.unread_end > released);
        let mut refunds = std::mem::take(&mut self.refunds);
        self.refund(&mut refunds);
        self.refunds = refunds;
        if !unread && let Put::Done = self.put(target.to, letter) {
            if let Some(t) = self.get_mut(target.to) {
                let end = t.io.as_ref().map_or(0, |io| io.rx.position());
                t.held.insert(
                    stream,
                    Held {
                        unread_end: end,
                        newest: None,
                    },
                );
            }
            return;
        }
        let bytes = self.whole_record(target.to, letter);
        let Some(t) = self.get_mut(target.to) else {
            return;
        };
        let held = t.held.entry(stream).or_insert(Held {
            unread_end: 0,
            newest: None,
        });
        if held
            .newest
            .replace((
                bytes,
                Charge {
                    fds: 0,
                    ..letter.charge
                },
            ))
            .is_some()
        {
            t.stats.conflated += 1;
        }
        self.want_room(target.to);
    }

    /// The record of a letter in private memory.
    fn whole_record(&self, to: Ref, letter: &Letter<'_>) -> Vec<u8> {
        let ident = if self.get(to).is_some_and(|t| t.wants_ident) {
            letter.ident
        } else {
            &[]
        };
        let mut body = vec![0u8; letter.header.body_len as usize];
        match letter.body {
            Body::Ring(segment, pos) => segment.copy_out(pos, &mut body),
            Body::Bytes(bytes) => body.copy_from_slice(bytes),
        }
        record(letter.header, letter.src, letter.dst, ident, &[], &body)
    }

    fn room(&mut self, to: Ref, from: Ref, len: u64) -> Room {
        let Some(t) = self.get_mut(to) else {
            return Room::Full;
        };
        let first = t.room(from, len);
        if first == Room::Yes {
            t.full_since = None;
            return first;
        }
        let mut refunds = std::mem::take(&mut self.refunds);
        let result = match self.get_mut(to) {
            Some(t) => match t.reclaim(&mut refunds) {
                Ok(()) => {
                    if t.backlog() > 0 {
                        t.flush();
                        self.dirty.push(to);
                    }
                    self.get_mut(to).map_or(Room::Full, |t| t.room(from, len))
                }
                Err(v) => {
                    self.violated(to, v);
                    Room::Full
                }
            },
            None => Room::Full,
        };
        self.refund(&mut refunds);
        self.refunds = refunds;
        if result == Room::Yes
            && let Some(t) = self.get_mut(to)
        {
            t.full_since = None;
        }
        result
    }

    /// Puts a letter into one ring, if there is room for it.
    fn put(&mut self, to: Ref, letter: &Letter<'_>) -> Put {
        let Some(t) = self.get(to) else {
            return Put::No(libc::EHOSTUNREACH);
        };
        let ident = if t.wants_ident { letter.ident } else { &[] };
        let header = RxHeader {
            ident_len: ident.len() as u16,
            ..letter.header
        }
        .sized();
        let len = u64::from(header.len);
        if let Some(io) = &t.io
            && padded(len) > io.rx.memory().size()
        {
            return Put::No(libc::EMSGSIZE);
        }
        if t.cut {
            return Put::No(libc::EHOSTUNREACH);
        }
        // What is held back from this sender is older than this letter and goes first (D11).
        if !t.held.is_empty() && !self.release_held(to, Some(letter.from)) {
            return Put::Full(false);
        }
        match self.room(to, letter.from, len) {
            Room::Yes => {}
            Room::Full => return Put::Full(false),
            Room::OverShare => return Put::Full(true),
        }
        if letter.charge.fds > 0 && letter.charge.told {
            let account = self
                .accounts
                .get(&letter.charge.principal)
                .copied()
                .unwrap_or_default();
            if account.fds + u64::from(letter.charge.fds) > self.quota.fds {
                return Put::No(libc::EDQUOT);
            }
        }
        let Some(t) = self.get_mut(to) else {
            return Put::No(libc::EHOSTUNREACH);
        };
        let Some(io) = &t.io else {
            return Put::Full(false);
        };
        if !letter.fds.is_empty()
            && let Err(error) = io.send_fds(letter.fds)
        {
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::ENOBUFS) => Put::Full(false),
                Some(libc::ETOOMANYREFS) => Put::No(libc::EDQUOT),
                _ => Put::No(libc::EHOSTUNREACH),
            };
        }
        let was_dirty = io.dirty;
        let Some(pos) = t.reserve(header.len, letter.charge) else {
            return Put::Full(false);
        };
        if let Some(io) = &t.io {
            let memory = io.rx.memory();
            memory.copy_in(pos, &header.encode());
            memory.copy_in(pos + RX_HEADER, letter.src);
            memory.copy_in(pos + header.dst_at(), letter.dst);
            memory.copy_in(pos + header.ident_at(), ident);
            match letter.body {
                Body::Ring(from, at) => Segment::copy_between(
                    from,
                    at,
                    memory,
                    pos + header.body_at(),
                    header.body_len as usize,
                ),
                Body::Bytes(bytes) => memory.copy_in(pos + header.body_at(), bytes),
            }
        }
        t.stats.received += 1;
        if !was_dirty {
            self.dirty.push(to);
        }
        if letter.charge.principal != u32::MAX {
            let account = self.accounts.entry(letter.charge.principal).or_default();
            account.bytes += padded(len);
            account.messages += 1;
            account.fds += u64::from(letter.charge.fds);
        }
        Put::Done
    }

    fn copy_to_monitors(&mut self, bus_id: u32, letter: &Letter<'_>, body_fd: bool) {
        let Some(monitors) = self
            .buses
            .get(&bus_id)
            .map(|b| &b.monitors)
            .filter(|m| !m.is_empty())
            .cloned()
        else {
            return;
        };
        let fds = if body_fd {
            &letter.fds[letter.fds.len() - 1..]
        } else {
            &[]
        };
        let header = RxHeader {
            flags: letter.header.flags
                | MONITOR
                | if fds.len() < letter.fds.len() {
                    FDS_LOST
                } else {
                    0
                },
            fds: fds.len() as u8,
            ..letter.header
        };
        let charge = Charge {
            principal: u32::MAX,
            fds: 0,
            told: false,
            ..letter.charge
        };
        let copy = Letter {
            header,
            fds,
            charge,
            ..*letter
        };
        for monitor in monitors {
            if !matches!(self.put(monitor, &copy), Put::Done) {
                if let Some(m) = self.get_mut(monitor) {
                    m.miss(letter.from, letter.src, letter.header.seq, Reason::Full);
                }
                self.want_room(monitor);
            }
        }
    }

    // ---- room ----------------------------------------------------------------------------------------------------

    fn refund(&mut self, refunds: &mut Vec<Refund>) {
        for refund in refunds.drain(..) {
            if let Some(account) = self.accounts.get_mut(&refund.principal) {
                account.bytes = account.bytes.saturating_sub(refund.bytes);
                account.messages = account.messages.saturating_sub(1);
                account.fds = account.fds.saturating_sub(refund.fds.into());
            }
        }
    }

    fn over_quota(
        &mut self,
        principal: u32,
        bytes: u64,
        messages: u64,
        fds: u64,
        now: Instant,
    ) -> bool {
        let over = |account: &Account, quota: &Quota| {
            account.bytes + bytes > quota.bytes
                || account.messages + messages > quota.messages
                || account.fds + fds > quota.fds
        };
        if !over(
            &self.accounts.get(&principal).copied().unwrap_or_default(),
            &self.quota,
        ) {
            return false;
        }
        // Accounts are refunded lazily; before saying no, look at all rings, but not more often than each millisecond.
        if self
            .swept
            .is_none_or(|at| now - at > Duration::from_millis(1))
        {
            self.swept = Some(now);
            let mut refunds = std::mem::take(&mut self.refunds);
            for (_, seat) in &mut self.seats {
                if let Some(e) = seat {
                    let _ = e.reclaim(&mut refunds);
                }
            }
            self.refund(&mut refunds);
            self.refunds = refunds;
        }
        over(
            &self.accounts.get(&principal).copied().unwrap_or_default(),
            &self.quota,
        )
    }

    /// Notes that `from` was refused for lack of room at `to`, and will be told when there is some.
    fn wait_for(&mut self, from: Ref, to: Ref, need: u64) {
        if let Some(e) = self.get_mut(from) {
            e.waiting = true;
        }
        if let Some(t) = self.get_mut(to) {
            match t.waiters.iter_mut().find(|(who, _)| *who == from) {
                Some(waiter) => waiter.1 = need,
                None => t.waiters.push((from, need)),
            }
        }
        self.want_room(to);
    }

    /// Asks an endpoint to kick when it has released something.
    fn want_room(&mut self, who: Ref) {
        let Some(io) = self.get_mut(who).and_then(|e| e.io.as_mut()) else {
            return;
        };
        let before = io.rx.released();
        match io.rx.wait_begin() {
            Ok(tail) if tail == before => {}
            Ok(_) => self.make_room(who),
            Err(v) => self.violated(who, v),
        }
    }

    /// An endpoint may have released something: put in what waits, and tell those who wait for room.
    fn make_room(&mut self, who: Ref) {
        loop {
            let mut refunds = std::mem::take(&mut self.refunds);
            let reclaimed = self
                .get_mut(who)
                .map_or(Ok(()), |e| e.reclaim(&mut refunds));
            self.refund(&mut refunds);
            self.refunds = refunds;
            if let Err(v) = reclaimed {
                self.violated(who, v);
                return;
            }
            let Some(e) = self.get_mut(who) else { return };
            if e.io.is_none() || e.cut {
                return;
            }
            if e.backlog() > 0 {
                e.flush();
                self.dirty.push(who);
            }
            self.release_held(who, None);
            let Some(e) = self.get_mut(who) else { return };
            let Some(io) = &e.io else { return };
            let (free, size) = (io.rx.free(), io.rx.memory().size());
            let ready: Vec<Ref> = if free >= size / 4 {
                e.waiters
                    .iter()
                    .filter(|(from, need)| e.room(*from, *need) == Room::Yes)
                    .map(|w| w.0)
                    .collect()
            } else {
                Vec::new()
            };
            e.waiters.retain(|(from, _)| !ready.contains(from));
            let more = !e.waiters.is_empty()
                || e.backlog() > 0
                || e.held.values().any(|h| h.newest.is_some());
            for from in ready {
                self.room_for(from);
            }
            if !more {
                return;
            }
            let Some(io) = self.get_mut(who).and_then(|e| e.io.as_mut()) else {
                return;
            };
            let before = io.rx.released();
            match io.rx.wait_begin() {
                Ok(tail) if tail == before => return,
                Ok(_) => {}
                Err(v) => {
                    self.violated(who, v);
                    return;
                }
            }
        }
    }

    /// Tells an endpoint that it may try again.
    fn room_for(&mut self, who: Ref) {
        let Some(e) = self.get_mut(who) else { return };
        e.waiting = false;
        if let Some(io) = &mut e.io {
            let segment = io.tx.memory().clone();
            segment.room().fetch_add(1, Ordering::Release);
            bump(&segment);
            // Reading the padding brings POLLOUT back.
            if let Err(v) = io.drain(false, true) {
                self.violated(who, v);
            }
        }
    }

    /// Puts held messages into the ring: all whose predecessor was read, or, for one sender, all it has. `false` when the ring is too full.
    fn release_held(&mut self, who: Ref, only: Option<Ref>) -> bool {
        let Some(e) = self.get_mut(who) else {
            return true;
        };
        let Some(released) = e.io.as_ref().map(|io| io.rx.released()) else {
            return e.held.is_empty();
        };
        e.held
            .retain(|_, h| h.newest.is_some() || h.unread_end > released);
        let mut due: Vec<(u64, (u64, Ref, u64))> = e
            .held
            .iter()
            .filter(|((_, from, _), h)| only.map_or(h.unread_end <= released, |o| o == *from))
            .filter_map(|(stream, h)| h.newest.as_ref().map(|(_, charge)| (charge.seq, *stream)))
            .collect();
        due.sort_unstable_by_key(|(seq, stream)| (stream.1, *seq));
        let (mut all, mut some) = (true, false);
        for (_, stream) in due {
            let Some((bytes, charge)) = e.held.get_mut(&stream).and_then(|h| h.newest.take())
            else {
                continue;
            };
            let fits = e.room(AGENT, bytes.len() as u64) == Room::Yes;
            let pos = if fits {
                e.reserve(bytes.len() as u32, charge)
            } else {
                None
            };
            let mut end = 0;
            if let (Some(pos), Some(io)) = (pos, &e.io) {
                io.rx.memory().copy_in(pos, &bytes);
                end = io.rx.position();
            }
            let Some(held) = e.held.get_mut(&stream) else {
                continue;
            };
            if end == 0 {
                held.newest = Some((bytes, charge));
                all = false;
                break;
            }
            held.unread_end = end;
            e.stats.received += 1;
            some = true;
        }
        if some {
            self.dirty.push(who);
        }
        all
    }

    /// The lines of connected endpoints are watched by whoever runs the switch.
    #[must_use]
    pub fn line_of(&self, who: Ref) -> Option<BorrowedFd<'_>> {
        self.get(who)
            .and_then(|e| e.io.as_ref())
            .map(|io| io.line.as_fd())
    }
}

enum Put {
    Done,
    /// No room; `true` when only this sender has none.
    Full(bool),
    No(i32),
}

fn bump(segment: &Segment) {
    segment.signal().fetch_add(1, Ordering::Release);
    futex_wake(segment.signal());
}

fn hash(bytes: &[u8]) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(bytes)
}

/// Whether one of the grants covers an address: its bits, and its terms where both have some (D9).
fn may_send(grants: &[SendGrant], bits: &Bits, hashes: Option<&[u64]>, width: u32) -> bool {
    // An address with very many bits would match nearly everybody: only who may send anything may send that.
    let crowded = bits.popcount() > width / 2;
    grants.iter().any(|grant| {
        let exact = match (&grant.terms, hashes) {
            (Some(required), Some(have)) => {
                required.iter().all(|term| have.binary_search(term).is_ok())
            }
            _ => bits.contains(&grant.bits),
        };
        exact && (!crowded || grant.bits.is_zero())
    })
}

/// The errno for descriptors that may not travel: a memfd without all seals (D14), or a body that is not what it should be.
fn check_fds(fds: &[OwnedFd], body_fd: bool, body_len: u64) -> Option<i32> {
    for (i, fd) in fds.iter().enumerate() {
        let sealed = seals(fd.as_fd());
        let is_body = body_fd && i + 1 == fds.len();
        let memfd = match sealed {
            None => false,
            // Any file on tmpfs reports exactly this seal; only the name tells whether it is a memfd.
            Some(libc::F_SEAL_SEAL) => is_memfd(fd.as_raw_fd()),
            Some(_) => true,
        };
        if (memfd || is_body) && sealed.is_none_or(|have| have & BODY_SEALS != BODY_SEALS) {
            return Some(libc::EOPNOTSUPP);
        }
        if is_body && file_size(fd.as_fd()).unwrap_or(0) < body_len {
            return Some(libc::EOPNOTSUPP);
        }
    }
    None
}

fn is_memfd(fd: RawFd) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{fd}"))
        .is_ok_and(|name| name.as_os_str().as_encoded_bytes().starts_with(b"/memfd:"))
}

impl Switch {
    /// Adds a subscription under a number that the caller chose. `false` when the endpoint or its bus is unknown.
    pub fn subscribe(
        &mut self,
        id: u64,
        number: u64,
        bits: Bits,
        terms: Option<Box<[u64]>>,
        overflow: Overflow,
    ) -> bool {
        let Some(owner) = self.find(id) else {
            return false;
        };
        let Some(bus) = self
            .get(owner)
            .and_then(|e| e.bus)
            .and_then(|b| self.buses.get_mut(&b))
        else {
            return false;
        };
        bus.subscribe(
            number,
            Subscription {
                owner,
                bits,
                terms,
                overflow,
            },
        )
    }

    /// Takes everything that an endpoint has published up to now.
    pub fn flush(&mut self, id: u64, now: Instant) -> bool {
        let Some(me) = self.find(id) else {
            return false;
        };
        while self.turn(me, now) == TURN {}
        true
    }

    /// Counters of an endpoint for people, by name.
    #[must_use]
    pub fn counters(&self, id: u64) -> Option<Vec<(&'static str, u64)>> {
        let e = self.endpoint(id)?;
        let bus = e.bus.and_then(|b| self.buses.get(&b));
        let matches = bus.map_or(0, |b| {
            b.matches.values().filter(|m| m.owner == e.me).count()
        });
        let (tx_bytes, rx_bytes, rx_used) = e.io.as_ref().map_or((0, 0, 0), |io| {
            let rx = io.rx.memory();
            // The reader's own word on what it has released; only shown, never relied on.
            let tail = rx.tail().load(Ordering::Relaxed);
            (
                io.tx.memory().size(),
                rx.size(),
                io.rx.position().saturating_sub(tail).min(rx.size()),
            )
        });
        let tx_used = e.io.as_ref().map_or(0, |io| {
            let head = io.tx.memory().head().load(Ordering::Relaxed);
            head.saturating_sub(io.tx.position()).min(tx_bytes)
        });
        Some(vec![
            ("sent", e.stats.sent),
            ("refused", e.stats.refused),
            ("received", e.stats.received),
            ("missed", e.stats.missed),
            ("conflated", e.stats.conflated),
            ("tx_bytes", tx_bytes),
            ("tx_used", tx_used),
            ("rx_bytes", rx_bytes),
            ("rx_used", rx_used),
            ("backlog", e.backlog() as u64),
            ("waiting", e.waiters.len() as u64),
            ("requests", e.requests.into()),
            ("matches", matches as u64),
        ])
    }

    /// Sets or removes an endpoint's filter.
    pub fn set_filter(&mut self, id: u64, filter: Option<Filter>) -> bool {
        self.endpoint_mut(id).map(|e| e.filter = filter).is_some()
    }
}
