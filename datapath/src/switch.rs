//! The switch: takes records from endpoints, decides, and puts them into the rings of those who get them. It never waits.
//!
//! Invariants:
//! 1. One record is decided and delivered to all before the next is looked at: every receiver on this host sees multicasts in
//!    the same order (D11), and each sender's messages arrive in the order in which it sent them.
//! 2. Every record gets a verdict: accepted, or an errno (D7). Nothing is dropped without a record that says so (D12).
//! 3. The source is stamped here from the switch's own tables (D6).
//! 4. Nothing in shared memory is trusted: headers and addresses are copied out, checked, and only the copies are used.
//! 5. Nobody is kept for longer than a turn by what another does: records, bytes and packets taken in a turn are bounded.
//! 6. Whoever was refused for lack of room is told when to try again: when there is room, when the receiver is gone, or when
//!    the time is over that the receiver may keep senders waiting.
//!
//! There is no policy here: who may own, send and hear is set from outside by calls, and applied.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bloom::Bits;
use crate::bus::{Bus, Overflow, Subscription, Target};
use crate::carrier::LaneBell;
use crate::endpoint::{
    Charge, Credentials, Debt, Endpoint, Io, NumberMap, Reason, Ref, RefHasher, Refund, Room,
    SendGrant, Stop, Waiter, record,
};
use crate::filter::Filter;
use crate::frame::{
    ADDRESS_BYTES, BODY_IN_MEMFD, BY_TERMS, CHAIN, EXPECT_REPLY, FDS_LOST, LANE, MESSAGE, MONITOR,
    MULTICAST, NO_REPLY, NOTICE, RAW, RX_HEADER, RxHeader, TERMS, TX_HEADER, TX_STATUS, TxHeader,
    UNICAST,
};
use crate::line;
use crate::memory::{BODY_SEALS, Segment, file_size, futex_wake, seals};
use crate::ring::{Memory, Violation, padded};
use crate::sync::Ordering;
use crate::trunk::{LaneEvent, Trunk};

#[path = "trunk_body.rs"]
mod body;
#[path = "trunk_calls.rs"]
mod calls;
#[path = "flow.rs"]
mod flow;
#[path = "lane_close.rs"]
mod lane_close;
#[path = "lane_switch.rs"]
mod lanes;
#[path = "trunk_receive.rs"]
mod receive;
#[path = "trunk_release.rs"]
mod release;
#[path = "trunk_send.rs"]
mod send;
#[path = "trunk_tell.rs"]
mod tell;

pub use flow::Reach;
pub use lane_close::{LaneRow, Side};

/// Accepted.
pub const OK: i32 = 1;
/// Records taken from one endpoint before the next has its turn.
const TURN: usize = 256;
/// Requests that one endpoint may have open.
const MAX_REQUESTS: u32 = 4096;
/// The largest body, in bytes (D14).
const MESSAGE_BYTES: u64 = 16 << 20;
/// Records and gaps that may wait for one endpoint; more are a reason to cut it off.
const MAX_BACKLOG: usize = 65_536;
/// Bytes of records that may wait for one endpoint.
const MAX_BACKLOG_BYTES: u64 = 64 << 20;
/// Bytes of records taken from one endpoint before the next has its turn.
const TURN_BYTES: u64 = 1 << 20;
/// How long a sender waits for a line that has no room for its descriptors.
const LINE_RETRY: Duration = Duration::from_millis(10);
/// The least time between two sweeps through all requests.
const REQUEST_SWEEP: Duration = Duration::from_millis(100);
/// Timers that are there before those of no use any more are looked for.
const MIN_TIMERS: usize = 1024;

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
            bytes: 1 << 30,
            messages: 1 << 22,
            fds: 256,
        }
    }
}

/// What a principal has used of its [`Quota`].
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// Bytes unread in rings of others.
    pub bytes: u64,
    /// Messages unread.
    pub messages: u64,
    /// Descriptors not received yet.
    pub fds: u64,
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
    /// How long a reply is waited for, if one is expected.
    deadline_ms: Option<u32>,
}

/// Where a body lies.
#[derive(Clone, Copy)]
enum Body<'a> {
    /// In the sender's ring.
    Ring(&'a Arc<Segment>, u64),
    /// In private memory.
    Bytes(&'a [u8]),
}

/// What nobody will read of a lane: sender, receiver, first, last, count.
pub type UnreadOnLane = (u64, u64, u64, u64, u64);

/// The switch of one agent.
#[derive(Default)]
pub struct Switch {
    seats: Vec<(u32, Option<Box<Endpoint>>)>,
    vacant: Vec<u32>,
    by_id: NumberMap<u64, Ref>,
    buses: NumberMap<u32, Bus>,
    accounts: HashMap<u32, Account, BuildHasherDefault<RefHasher>>,
    quota: Quota,
    active: Vec<Ref>,
    dirty: Vec<Ref>,
    events: Vec<Event>,
    refunds: Vec<Refund>,
    scratch: Vec<u8>,
    /// A private copy of a body, for filters.
    body: Vec<u8>,
    /// Whom the multicast is for that is being decided.
    targets: Vec<Target>,
    /// Who is to be told to try again, when, and for whom it waits.
    timers: BinaryHeap<Reverse<(Instant, Ref, Ref)>>,
    prune_timers_at: usize,
    swept: bool,
    requests_swept: Option<Instant>,
    trunks: Vec<Option<Box<Trunk>>>,
    trunk_slots: NumberMap<u64, usize>,
    /// Where on which trunk the message went that was decided last, if it did.
    way: Option<(usize, u32)>,
    /// The message of another node that was delivered last, if others like it may follow.
    arrival: Option<receive::Arrival>,
    /// Trunks to the nodes that hold blocks of unique addresses; `None` for this node.
    blocks: HashMap<u64, Option<usize>>,
    /// Buses by their numbers in the cluster.
    clustered: NumberMap<u32, u32>,
    /// Grows with each change of routes and blocks.
    routes_version: u64,
    lane_events: Vec<LaneEvent>,
    /// Carriers of trunks that are to be told that there is something to be sent.
    bells: Vec<Arc<LaneBell>>,
    /// Who missed something in the batch at hand.
    gapped: Vec<Ref>,
    /// Python was told that there are events.
    told: bool,
    /// Trunks have something to confirm, which can wait a little; and when it is told at the latest.
    owes_trunks: bool,
    trunks_due: Option<Instant>,
    lanes: lanes::Lanes,
    /// Of lanes that could not be read.
    unread_on_lanes: Vec<UnreadOnLane>,
    /// Words of a panic in the next round.
    #[cfg(test)]
    pub fail: Option<&'static str>,
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
        let me = self.sit_down(id, principal, credentials, ident);
        self.by_id.insert(id, me);
        me
    }

    fn sit_down(
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
        me
    }

    fn stand_up(&mut self, who: Ref) {
        if self.get(who).is_some() {
            self.seats[who.slot as usize].1 = None;
            self.vacant.push(who.slot);
        }
    }

    /// Gives an endpoint its rings and its line.
    pub fn connect(&mut self, who: Ref, io: Io) {
        self.close_lanes_of(who, Side::Both);
        let Some(e) = self.get_mut(who) else { return };
        e.io = Some(io);
        e.cut = false;
        e.stopped = Stop::Empty;
        let mut refunds = e.fit_to_ring();
        self.refund(&mut refunds);
        self.make_room(who);
        self.activate(who);
        self.publish();
    }

    /// Takes an endpoint away, after everything that it had sent. Returns who is to be told of unread messages:
    /// Python's number of the sender, first, last and count of them.
    pub fn remove_endpoint(&mut self, id: u64, now: Instant) -> Vec<(u64, u64, u64, u64)> {
        let Some(me) = self.find(id) else {
            return Vec::new();
        };
        self.take_published(me, now);
        self.close_lanes_of(me, Side::Out);
        let unread_on_lanes = self.take_unread_of_lanes(me);
        let mut refunds = std::mem::take(&mut self.refunds);
        let (mut unread, mut unanswered, mut waiters, mut bus) =
            (Vec::new(), Vec::new(), Vec::new(), None);
        let mut address: Box<[u8]> = Box::default();
        let mut held = None;
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
            held = e.held_for.take();
        }
        for (from, first, last, count) in unread_on_lanes {
            match unread.iter_mut().find(|one| one.0 == from) {
                // What lies in the ring may be older, or what followed a lane.
                Some(one) => {
                    (one.1, one.2, one.3) = (one.1.min(first), one.2.max(last), one.3 + count);
                }
                None => unread.push((from, first, last, count)),
            }
        }
        self.lose_held(held);
        self.tell_trunks_gone(me);
        self.refund(&mut refunds);
        self.refunds = refunds;
        if let Some(bus) = bus.and_then(|b| self.buses.get_mut(&b)) {
            bus.forget(me);
        }
        for (who, serial) in unanswered {
            self.answer_lost(who, serial, &address);
        }
        self.stand_up(me);
        self.by_id.remove(&id);
        self.active.retain(|a| *a != me);
        for waiter in waiters {
            self.room_for(waiter.from);
        }
        self.publish();
        let mut told = Vec::new();
        for (who, first, last, count) in unread {
            match self.get(who).map(|e| (e.id, e.remote)) {
                Some((id, None)) => told.push((id, first, last, count)),
                Some((_, Some(remote))) => {
                    self.report_unread(remote, libc::EHOSTUNREACH, &address, (first, last), count);
                }
                None => {}
            }
        }
        told
    }

    fn answer_lost(&mut self, who: Ref, serial: u64, address: &[u8]) {
        let Some(e) = self.get_mut(who) else { return };
        e.requests = e.requests.saturating_sub(1);
        if let Some(remote) = e.remote {
            self.answer_lost_away(remote, serial, address);
            return;
        }
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
        self.close_lane_between(charge.sender, who);
        let Some(e) = self.get_mut(who) else { return };
        if e.backlog() >= MAX_BACKLOG || e.backlog_bytes() + bytes.len() as u64 > MAX_BACKLOG_BYTES
        {
            self.too_slow(who);
            return;
        }
        if e.io
            .as_ref()
            .is_some_and(|io| padded(bytes.len() as u64) > io.rx.memory().size())
        {
            e.miss(charge.sender, &[], charge.seq, Reason::Full);
            self.make_room(who);
            return;
        }
        e.line_up_held(charge.sender);
        e.push(bytes, charge);
        self.make_room(who);
    }

    /// Cuts off an endpoint that reads too little.
    fn too_slow(&mut self, who: Ref) {
        if let Some(e) = self.get_mut(who)
            && !e.cut
        {
            e.cut = true;
            let id = e.id;
            self.events.push(Event::TooSlow(id));
        }
    }

    // ---- buses, addresses, rights: calls from outside -------------------------------------------------------------

    /// Adds a bus.
    pub fn add_bus(&mut self, bus: u32, width: usize, key: [u8; 16]) {
        self.buses.insert(bus, Bus::new(width, key));
    }

    /// Removes a bus; its endpoints have gone before.
    pub fn remove_bus(&mut self, bus: u32) {
        if let Some(number) = self.buses.remove(&bus).and_then(|b| b.number) {
            self.clustered.remove(&number);
            self.routes_version += 1;
        }
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
        if !self.buses.contains_key(&bus) {
            return false;
        }
        let Some(e) = self.get_mut(me) else {
            return false;
        };
        e.bus = Some(bus);
        let provisional = e.provisional.clone();
        if let Some(bus) = self.buses.get_mut(&bus) {
            bus.provisional.insert(provisional, me);
        }
        true
    }

    /// Gives an endpoint the provisional address by which the master answers it, instead of `@` and its number. `false` when it is
    /// unknown.
    pub fn set_provisional(&mut self, id: u64, address: &[u8]) -> bool {
        let Some(me) = self.find(id) else {
            return false;
        };
        let Some(e) = self.get_mut(me) else {
            return false;
        };
        let former = std::mem::replace(&mut e.provisional, address.into());
        if let Some(bus) = e.bus.and_then(|b| self.buses.get_mut(&b)) {
            bus.provisional.remove(&former);
            bus.provisional.insert(address.into(), me);
            let number = bus.number;
            self.tell_trunks(number, address, true);
        }
        true
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
        let (master, number) = (bus.master, bus.number);
        if let Some(e) = self.get_mut(me) {
            e.addresses.push(address.into());
        }
        self.tell_trunks(number, address, true);
        // As long as nobody owned it, what was sent to this name went to the master.
        self.try_again(master);
        true
    }

    /// Takes an address away. `false` when the endpoint did not own it.
    pub fn disown(&mut self, id: u64, address: &[u8]) -> bool {
        let Some(me) = self.find(id) else {
            return false;
        };
        self.close_lanes_of(me, Side::Both);
        let Some(e) = self.get_mut(me) else {
            return false;
        };
        let before = e.addresses.len();
        e.addresses.retain(|a| **a != *address);
        if e.addresses.len() == before {
            return false;
        }
        let bus = e.bus;
        if let Some(bus) = bus.and_then(|b| self.buses.get_mut(&b)) {
            bus.owners.remove(address);
            let number = bus.number;
            self.tell_trunks(number, address, false);
        }
        // Who waits for room may have meant this address, which leads elsewhere now.
        self.try_again(Some(me));
        true
    }

    /// Names the endpoint that messages to unknown names go to. `false` when the bus is unknown.
    pub fn set_master(&mut self, bus: u32, master: Option<Ref>) -> bool {
        let Some(bus) = self.buses.get_mut(&bus) else {
            return false;
        };
        let former = std::mem::replace(&mut bus.master, master);
        if let Some(former) = former {
            // It may have been allowed more than others (D7).
            self.close_lanes_of(former, Side::Out);
        }
        self.try_again(former);
        true
    }

    /// Removes a subscription. `false` when the endpoint has none with this number.
    pub fn unsubscribe(&mut self, id: u64, number: u64) -> bool {
        let me = self.find(id);
        let Some(on) = self.endpoint(id).and_then(|e| e.bus) else {
            return false;
        };
        if self
            .buses
            .get(&on)
            .is_none_or(|bus| bus.subscriber(number) != me)
        {
            return false;
        }
        self.close_lanes_by(on, number);
        if let Some(bus) = self.buses.get_mut(&on) {
            bus.unsubscribe(number);
        }
        // What they wait for may concern it no more.
        self.try_again(me);
        true
    }

    /// Takes a right to send multicasts back. `false` when the endpoint does not have it.
    pub fn forbid_send(&mut self, id: u64, grant: u64) -> bool {
        if let Some(me) = self.find(id) {
            self.close_multicasts_of(me, Side::Out);
        }
        let Some(e) = self.endpoint_mut(id) else {
            return false;
        };
        let before = e.send_grants.len();
        e.send_grants.retain(|g| g.id != grant);
        let taken = e.send_grants.len() < before;
        if taken && e.waiting {
            // It may wait for room for what it may send no more.
            let me = e.me;
            self.room_for(me);
        }
        taken
    }

    /// Tells those who wait for an endpoint to try again: what they wait for has changed.
    fn try_again(&mut self, who: Option<Ref>) {
        let Some(e) = who.and_then(|who| self.get_mut(who)) else {
            return;
        };
        for waiter in std::mem::take(&mut e.waiters) {
            self.room_for(waiter.from);
        }
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
    /// The items are in effect already; the message may be read any time after this call. Monitors see it without its items. Returns `false` when an endpoint is unknown,
    /// or its ring too small for the message.
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
        let size = self
            .get(to)
            .and_then(|e| e.io.as_ref())
            .map(|io| io.rx.memory().size());
        let Some(e) = self.get_mut(from) else {
            return false;
        };
        let ident_len = if wants { e.ident.len() } else { 0 };
        let sections = [src.len(), dst.len(), ident_len, ctl.len(), body.len()];
        let len: u64 = sections.iter().map(|len| padded(*len as u64)).sum();
        if size.is_some_and(|size| RX_HEADER + len > size) {
            return false;
        }
        e.take_number();
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
            sender: from,
            seq: e.seq,
            told: true,
            ..Charge::AGENT
        };
        let ident = if wants {
            e.ident.clone()
        } else {
            Arc::default()
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
        if let Some((bus, ident)) = self.get(from).and_then(|e| Some((e.bus?, e.ident.clone()))) {
            let letter = Letter {
                from,
                header: RxHeader {
                    src_len: src.len() as u16,
                    dst_len: dst.len() as u16,
                    body_len: body.len() as u32,
                    ..header
                },
                src,
                dst,
                ident: &ident,
                body: Body::Bytes(body),
                fds: &[],
                charge,
                deadline_ms: None,
            };
            self.copy_to_monitors(bus, &letter, false);
        }
        self.publish();
        true
    }

    /// What happened to endpoints since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.told = false;
        std::mem::take(&mut self.events)
    }

    /// What happened on trunks since the last call.
    pub fn take_lane_events(&mut self) -> Vec<LaneEvent> {
        self.told = false;
        std::mem::take(&mut self.lane_events)
    }

    /// What nobody will read of lanes since the last call: sender, receiver, first, last, count.
    pub fn take_unread_on_lanes(&mut self) -> Vec<UnreadOnLane> {
        std::mem::take(&mut self.unread_on_lanes)
    }

    /// Whether something happened that Python must know.
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.events.is_empty() || !self.lane_events.is_empty() || !self.unread_on_lanes.is_empty()
    }

    /// Whether Python must be told that something happened; this counts as telling it.
    pub fn must_tell(&mut self) -> bool {
        self.has_events() && !std::mem::replace(&mut self.told, true)
    }
}

// ---- messages ------------------------------------------------------------------------------------------------------

impl Switch {
    /// Serves all active endpoints once. Returns how many records were taken.
    pub fn round(&mut self, now: Instant) -> usize {
        #[cfg(test)]
        if let Some(words) = self.fail {
            panic!("{words}");
        }
        let mut taken = 0;
        let mut at = 0;
        while at < self.active.len() {
            let who = self.active[at];
            let n = self.turn(who, now);
            taken += n;
            if self
                .get_mut(who)
                .is_some_and(|e| std::mem::take(&mut e.kicked))
            {
                self.make_room(who);
                self.publish();
            }
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
                // There may be more on its line, for which no event comes.
                Some(e) if e.stopped == Stop::Turn => false,
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
                if let Some(io) = &e.io {
                    io.tx.sleep_end();
                }
                self.active.push(who);
            }
        }
    }

    /// Something came on an endpoint's line: there are records, or it has released some.
    pub fn kicked(&mut self, who: Ref) {
        let Some(e) = self.get_mut(who) else { return };
        let behind_padding = e.stopped == Stop::Padding;
        if let Err(v) = e.drain_line(false) {
            self.violated(who, v);
            return;
        }
        self.serve_lane_calls(who);
        let Some(e) = self.get_mut(who) else { return };
        if behind_padding
            && e.stopped == Stop::Padding
            && let Some(io) = &e.io
        {
            // Whatever came lies behind the padding, and may be the wish to be woken.
            io.wake();
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
        self.swept = false;
        if let Some(e) = self.get_mut(me)
            && e.stopped == Stop::Turn
            && let Err(v) = e.drain_line(false)
        {
            self.violated(me, v);
            return 0;
        }
        self.serve_lane_calls(me);
        let (mut taken, mut bytes) = (0, 0);
        while taken < TURN && bytes < TURN_BYTES {
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
            self.way = None;
            let decided = TxHeader::decode(&raw, len)
                .and_then(|h| Ok((h, self.decide(me, &segment, pos, &h, now)?)));
            let header = match decided {
                Ok((header, verdict)) => {
                    segment
                        .word_at(pos + TX_STATUS)
                        .store(verdict as u32, Ordering::Relaxed);
                    header
                }
                Err(v) => {
                    self.violated(me, v);
                    break;
                }
            };
            if let Some(io) = self.get_mut(me).and_then(|e| e.io.as_mut()) {
                io.tx.advance(len);
            }
            taken += 1;
            bytes += u64::from(len);
            if let Some(way) = self.way
                && header.is_plain()
            {
                let left = (TURN - taken, TURN_BYTES.saturating_sub(bytes));
                let more = self.send_on(me, &segment, way, header.dst_len.into(), left);
                taken += more.0;
                bytes += more.1;
            }
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

    /// Takes all records that an endpoint has published up to now, and not those that it goes on to publish meanwhile.
    fn take_published(&mut self, me: Ref, now: Instant) {
        let Some(io) = self.get_mut(me).and_then(|e| e.io.as_mut()) else {
            return;
        };
        let end = match io.tx.refresh() {
            Ok(waiting) => io.tx.position() + waiting,
            Err(v) => return self.violated(me, v),
        };
        let before_end = |s: &Self| {
            let io = s.get(me).and_then(|e| e.io.as_ref());
            io.is_some_and(|io| io.tx.position() < end)
        };
        while before_end(self) && self.turn(me, now) > 0 {}
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
        if usize::from(h.fds) > line::MAX_FDS {
            return Err(Violation("more descriptors than a message may have"));
        }
        if h.fds > 0 {
            (fds, lost) = e.take_fds()?;
            if !lost && fds.len() != usize::from(h.fds) {
                return Err(Violation("a message announces more descriptors than came"));
            }
        }
        if h.kind == LANE {
            return Ok(if lost {
                -libc::EMFILE
            } else {
                self.ask_lane(me, segment, pos, h, &fds, now)
            });
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
        if e.parked > 0 {
            return self.wait_for_bodies(me);
        }
        let Some(bus_id) = e.bus else {
            return -libc::EHOSTUNREACH;
        };
        if u64::from(h.body_len) > MESSAGE_BYTES {
            return -libc::EMSGSIZE;
        }
        let expects = h.kind == UNICAST && h.flags & EXPECT_REPLY != 0 && h.serial != 0;
        if expects && e.requests >= MAX_REQUESTS {
            self.forget_requests(now);
        }
        let Some(e) = self.get(me) else {
            return -libc::EHOSTUNREACH;
        };
        if expects && e.requests >= MAX_REQUESTS {
            return -libc::EDQUOT;
        }
        if h.kind == UNICAST && usize::from(h.dst_len) > ADDRESS_BYTES {
            return -libc::ENAMETOOLONG;
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
        // Who has not joined reaches nobody but the master, who is the one to judge it.
        let limited = joined && e.reach.is_some();
        let ident = e.ident.clone();
        let Credentials { pid, uid, gid } = e.credentials;
        let body_fd = h.flags & BODY_IN_MEMFD != 0;
        if let Some(errno) = check_fds(fds, body_fd, h.body_len.into()) {
            return -errno;
        }
        let raw_fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let seq = e.next_number();
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
            fds: fds.len() as u8 - u8::from(body_fd),
            body: if body_fd { h.body_len } else { 0 },
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
            deadline_ms: (h.flags & EXPECT_REPLY != 0 && h.serial != 0).then_some(h.deadline_ms),
        };
        let verdict = if h.kind == UNICAST {
            self.unicast(bus_id, joined, limited, h, &letter, now)
        } else if !joined {
            -libc::EHOSTUNREACH
        } else if fds.len() > usize::from(body_fd) {
            -libc::EOPNOTSUPP
        } else {
            self.multicast(bus_id, h, &letter, now)
        };
        if verdict == OK {
            if let Some(e) = self.get_mut(me) {
                e.note_number(seq);
            }
            self.copy_to_monitors(bus_id, &letter, body_fd);
        }
        verdict
    }

    fn unicast(
        &mut self,
        bus_id: u32,
        joined: bool,
        limited: bool,
        h: &TxHeader,
        letter: &Letter<'_>,
        now: Instant,
    ) -> i32 {
        let dst = letter.dst;
        if dst.is_empty() {
            return -libc::EDESTADDRREQ;
        }
        let is_allowed = !limited || self.may_send_to(letter.from, dst);
        if !is_allowed && h.reply_to == 0 {
            return self.deny(letter.from, dst);
        }
        let Some(bus) = self.buses.get(&bus_id) else {
            return -libc::EHOSTUNREACH;
        };
        let is_master = bus.master == Some(letter.from);
        let to = match bus.owners.get(dst) {
            Some(owner) if joined || bus.master == Some(*owner) => *owner,
            Some(_) => return -libc::EHOSTUNREACH,
            None => match self.find_elsewhere(bus_id, dst, joined, is_master) {
                Ok(to) => to,
                Err(errno) => return -errno,
            },
        };
        if !is_allowed && !self.owes(letter.from, to, h.reply_to) {
            return self.deny(letter.from, dst);
        }
        let need = padded(letter.header.sized().len.into());
        let fds = letter.charge.fds.into();
        let bytes = need + u64::from(letter.charge.body);
        if self.exceeds_quota(letter.charge.principal, bytes, 1, fds) {
            return -libc::EDQUOT;
        }
        match self.put(to, letter) {
            Put::Done => {}
            Put::No(errno) => return -errno,
            Put::LineFull => {
                self.wait_for(letter.from, to, need, Some(now + LINE_RETRY), now);
                return -libc::EAGAIN;
            }
            Put::Full => {
                self.wait_for(letter.from, to, need, None, now);
                return -libc::EAGAIN;
            }
        }
        self.answered(letter.from, to, h.reply_to);
        if h.flags & EXPECT_REPLY != 0 {
            let until = now + Duration::from_millis(h.deadline_ms.into());
            self.expect(letter.from, to, h.serial, until, now);
        }
        OK
    }

    /// Where a message goes to whose destination nobody here owns, or the errno.
    #[cold]
    fn find_elsewhere(
        &mut self,
        bus_id: u32,
        dst: &[u8],
        joined: bool,
        is_master: bool,
    ) -> Result<Ref, i32> {
        if let Some(found) = self.find_away(bus_id, dst, joined, is_master) {
            return found;
        }
        let Some(bus) = self.buses.get(&bus_id) else {
            return Err(libc::EHOSTUNREACH);
        };
        match bus.provisional.get(dst) {
            Some(owner) if is_master => return Ok(*owner),
            _ => {}
        }
        // Unknown names go to the master (D7); unique addresses that are gone do not come back (D3).
        if is_master || dst[0] == b'@' || dst[0].is_ascii_digit() {
            return Err(libc::EHOSTUNREACH);
        }
        match bus.master {
            Some(master) if joined => Ok(master),
            Some(_) => Err(libc::EHOSTUNREACH),
            // It may have been the master whom somebody asks to let it in (D16).
            None => Err(libc::EHOSTDOWN),
        }
    }

    /// Notes that `to` owes `from` an answer.
    fn expect(&mut self, from: Ref, to: Ref, serial: u64, until: Instant, now: Instant) {
        // Nothing could answer it.
        if serial == 0 {
            return;
        }
        // Swept whenever it has doubled, so that requests nobody waits for any more cost no more than those that are open.
        let (to, destination) = self.debtor(to);
        if self
            .get(to)
            .is_some_and(|t| t.unanswered.len() >= t.sweep_at)
        {
            self.forget_requests_at(to, now);
        }
        let Some(t) = self.get_mut(to) else { return };
        let debt = Debt { until, destination };
        if t.unanswered.insert((from, serial), debt).is_none()
            && let Some(e) = self.get_mut(from)
        {
            e.requests += 1;
        }
    }

    /// Forgets requests at one endpoint whose time is over or whose askers are gone.
    fn forget_requests_at(&mut self, to: Ref, now: Instant) {
        let Some(t) = self.get_mut(to) else { return };
        let mut open = std::mem::take(&mut t.unanswered);
        open.retain(|(who, _), debt| match self.get_mut(*who) {
            Some(asker) if debt.until <= now => {
                asker.requests = asker.requests.saturating_sub(1);
                false
            }
            asker => asker.is_some(),
        });
        if let Some(t) = self.get_mut(to) {
            t.sweep_at = (2 * open.len()).max(64);
            t.unanswered = open;
        }
    }

    /// Forgets requests everywhere whose time is over, now and then.
    fn forget_requests(&mut self, now: Instant) {
        if self
            .requests_swept
            .is_some_and(|at| now.saturating_duration_since(at) < REQUEST_SWEEP)
        {
            return;
        }
        self.requests_swept = Some(now);
        let all: Vec<Ref> = self
            .seats
            .iter()
            .filter_map(|(_, e)| e.as_ref())
            .filter(|e| !e.unanswered.is_empty())
            .map(|e| e.me)
            .collect();
        for to in all {
            self.forget_requests_at(to, now);
        }
    }

    /// A message from `from` to `to` that answers request number `reply_to`.
    fn answered(&mut self, from: Ref, to: Ref, reply_to: u64) {
        if reply_to == 0 {
            return;
        }
        let to = self.asker(to, from, reply_to);
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
        let need = padded(letter.header.sized().len.into());
        let count = targets.len() as u64;
        let fds = u64::from(letter.charge.fds);
        let mut chosen = std::mem::take(&mut self.targets);
        chosen.clear();
        chosen.extend_from_slice(targets);
        let verdict = if self.exceeds_quota(
            letter.charge.principal,
            (need + u64::from(letter.charge.body)) * count,
            count,
            fds * count,
        ) {
            -libc::EDQUOT
        } else {
            self.choose(&mut chosen, letter);
            if !letter.fds.is_empty() && self.cannot_carry(&chosen) {
                -libc::EOPNOTSUPP
            } else {
                self.put_all(&chosen, letter, need, now)
            }
        };
        self.targets = chosen;
        verdict
    }

    /// Leaves those targets whose filters let the message pass.
    #[inline]
    fn choose(&mut self, targets: &mut Vec<Target>, letter: &Letter<'_>) {
        let mut body = std::mem::take(&mut self.body);
        let (mut copied, mut readable) = (false, true);
        targets.retain(|target| {
            let Some(t) = self.get(target.to) else {
                return false;
            };
            let Some(filter) = &t.filter else {
                return true;
            };
            if !copied {
                // Filters see a private copy: the sender could change the ring under them. They do not change it.
                copied = true;
                match letter.body {
                    Body::Ring(segment, pos) => {
                        body.resize(letter.header.body_len as usize, 0);
                        segment.copy_out(pos, &mut body);
                    }
                    Body::Bytes(_) if letter.header.flags & BODY_IN_MEMFD != 0 => {
                        body.resize(letter.header.body_len as usize, 0);
                        // Its seals and size were checked; what could not be read passes no filter.
                        readable = letter
                            .fds
                            .last()
                            .is_some_and(|fd| read_at_start(*fd, &mut body));
                    }
                    Body::Bytes(bytes) => {
                        body.clear();
                        body.extend_from_slice(bytes);
                    }
                }
            }
            readable && filter.passes(&mut body)
        });
        // A large body now and then is no reason to keep its memory.
        if body.capacity() > 1 << 20 {
            body = Vec::new();
        }
        self.body = body;
    }

    fn put_all(&mut self, targets: &[Target], letter: &Letter<'_>, need: u64, now: Instant) -> i32 {
        // Senders wait for subscribers that asked for it, for all of them at the same time, and then nobody gets the message:
        // all or none (D12).
        let mut wait = false;
        for target in targets {
            if let Overflow::Block(ms) = target.overflow {
                let limit = Duration::from_millis(ms.into());
                wait |= self.must_wait(letter, target.to, limit, need, now);
            }
        }
        if wait {
            return -libc::EAGAIN;
        }
        for target in targets {
            self.put_multicast(*target, letter);
        }
        OK
    }

    /// Whether the sender has to wait for a subscriber that keeps senders waiting, at most so long. It is told when to try again.
    fn must_wait(
        &mut self,
        letter: &Letter<'_>,
        to: Ref,
        limit: Duration,
        need: u64,
        now: Instant,
    ) -> bool {
        let fit = self.fit(to, letter);
        let Some(t) = self.get_mut(to) else {
            return false;
        };
        let waiter = t.waiters.iter_mut().find(|w| w.from == letter.from);
        if !matches!(fit, Put::Full | Put::LineFull) {
            // There was room after all, so a later wait begins anew.
            if let Some(waiter) = waiter {
                waiter.since = now;
            }
            return false;
        }
        let until = waiter.map_or(now, |w| w.since) + limit;
        if t.overdue || until <= now {
            return false;
        }
        self.wait_for(letter.from, to, need, Some(until), now);
        true
    }

    fn put_multicast(&mut self, target: Target, letter: &Letter<'_>) {
        if target.overflow == Overflow::Conflate {
            self.put_conflated(target, letter);
            return;
        }
        let (Put::No(_) | Put::Full | Put::LineFull) = self.put(target.to, letter) else {
            return;
        };
        match target.overflow {
            Overflow::Disconnect if self.get(target.to).is_some_and(|t| t.io.is_some()) => {
                self.too_slow(target.to);
            }
            Overflow::Block(_) => {
                if let Some(t) = self.get_mut(target.to) {
                    t.overdue = true;
                }
                self.missed(target.to, letter, Reason::Deadline);
            }
            _ => self.missed(target.to, letter, Reason::Full),
        }
    }

    /// Notes that an endpoint missed a message.
    fn missed(&mut self, to: Ref, letter: &Letter<'_>, reason: Reason) {
        let Some(t) = self.get_mut(to) else { return };
        if t.cut {
            return;
        }
        if let Some(remote) = t.remote {
            self.missed_away(remote, letter, reason);
            return;
        }
        if t.backlog() >= MAX_BACKLOG && t.opens_gap(letter.from) {
            self.too_slow(to);
            return;
        }
        t.miss(letter.from, letter.src, letter.header.seq, reason);
        self.want_room(to);
        // Nothing will be read there that could make room: the gap is told at once.
        if self
            .get(to)
            .and_then(|t| t.io.as_ref())
            .is_some_and(|io| io.rx.used() == 0)
        {
            self.make_room(to);
        }
    }

    /// While a message of a stream is unread in the ring, the newest one waits outside and replaces its predecessor.
    fn put_conflated(&mut self, target: Target, letter: &Letter<'_>) {
        self.close_lane_between(letter.from, target.to);
        let plain = Target {
            overflow: Overflow::Gap,
            ..target
        };
        // A body in a memfd is not held back: it goes the ordinary way.
        if letter.header.flags & BODY_IN_MEMFD != 0 {
            return self.put_multicast(plain, letter);
        }
        let stream = (target.by, letter.from, hash(letter.dst));
        self.reclaim(target.to);
        let Some(t) = self.get_mut(target.to) else {
            return;
        };
        // Its predecessor must not be put into the ring for the sake of order only to be followed by it.
        let replaced = t.replace(&stream);
        let unread = t.stream_unread(&stream);
        self.refund(&mut replaced.into_iter().collect());
        if !unread {
            match self.put(target.to, letter) {
                Put::Done => {
                    if let Some(t) = self.get_mut(target.to) {
                        t.stream_put(stream);
                    }
                    return;
                }
                Put::No(_) => return self.missed(target.to, letter, Reason::Full),
                Put::Full | Put::LineFull => {}
            }
        }
        let Some(t) = self.get(target.to) else {
            return;
        };
        let len = u64::from(sized_for(t, letter).len);
        if !t.may_hold(&stream, len)
            || t.io
                .as_ref()
                .is_some_and(|io| padded(len) > io.rx.memory().size())
        {
            return self.missed(target.to, letter, Reason::Full);
        }
        let bytes = self.whole_record(target.to, letter);
        if let Some(t) = self.get_mut(target.to) {
            t.hold(stream, bytes, letter.charge);
        }
        self.debit(&letter.charge, padded(len));
        self.want_room(target.to);
    }

    /// The record of a letter in private memory.
    fn whole_record(&self, to: Ref, letter: &Letter<'_>) -> Vec<u8> {
        let ident = if self.get(to).is_some_and(|t| t.wants_ident) {
            letter.ident
        } else {
            &[]
        };
        let mut body = Vec::new();
        match letter.body {
            Body::Ring(segment, pos) => {
                body.resize(letter.header.body_len as usize, 0);
                segment.copy_out(pos, &mut body);
            }
            Body::Bytes(bytes) => body.extend_from_slice(bytes),
        }
        record(letter.header, letter.src, letter.dst, ident, &[], &body)
    }

    /// Takes note of what an endpoint has released.
    fn reclaim(&mut self, who: Ref) -> bool {
        let mut refunds = std::mem::take(&mut self.refunds);
        let reclaimed = self
            .get_mut(who)
            .map_or(Ok(()), |e| e.reclaim(&mut refunds));
        self.refund(&mut refunds);
        self.refunds = refunds;
        if let Err(v) = reclaimed {
            self.violated(who, v);
        }
        reclaimed.is_ok()
    }

    // Whatever is put goes through here: as a call of its own it costs a twentieth of the whole.
    #[inline(always)]
    fn room(&mut self, to: Ref, from: Ref, len: u64) -> Room {
        let Some(t) = self.get(to) else {
            return Room::Full;
        };
        let mut result = t.room(from, len);
        if result != Room::Yes && self.reclaim(to) {
            result = self.get(to).map_or(Room::Full, |t| t.room(from, len));
        }
        if result == Room::Yes
            && let Some(t) = self.get_mut(to)
        {
            t.overdue = false;
            if t.backlog() > 0 {
                t.flush();
                self.dirty.push(to);
            }
        }
        result
    }

    /// Whether a letter could be put into a ring now; what must come before it is put there.
    fn fit(&mut self, to: Ref, letter: &Letter<'_>) -> Put {
        self.close_lane_between(letter.from, to);
        let Some(t) = self.get(to) else {
            return Put::No(libc::EHOSTUNREACH);
        };
        if t.cut || t.is_remote {
            return match t.remote {
                Some(remote) if !t.cut => self.fit_away(remote, letter),
                _ => Put::No(libc::EHOSTUNREACH),
            };
        }
        let len = u64::from(sized_for(t, letter).len);
        if let Some(io) = &t.io
            && padded(len) > io.rx.memory().size()
        {
            return Put::No(libc::EMSGSIZE);
        }
        // What is held back from this sender is older than this letter and goes first (D11).
        if t.holds() && !self.release_held(to, Some(letter.from)) {
            return Put::Full;
        }
        if self.room(to, letter.from, len) != Room::Yes {
            return Put::Full;
        }
        let body = letter.charge.body;
        let takes = |s: &Self| s.get(to).is_some_and(|t| t.takes_outside(body));
        if body > 0 && !takes(self) {
            self.reclaim(to);
            if !takes(self) {
                return Put::Full;
            }
        }
        Put::Done
    }

    /// Puts a letter into one ring, if there is room for it.
    fn put(&mut self, to: Ref, letter: &Letter<'_>) -> Put {
        match self.fit(to, letter) {
            Put::Done => {}
            refused => return refused,
        }
        let Some(t) = self.get_mut(to) else {
            return Put::No(libc::EHOSTUNREACH);
        };
        if t.is_remote {
            return match t.remote {
                Some(remote) => self.put_away(remote, letter),
                None => Put::No(libc::EHOSTUNREACH),
            };
        }
        let header = sized_for(t, letter);
        let ident = if t.wants_ident { letter.ident } else { &[] };
        let len = u64::from(header.len);
        let Some(io) = &t.io else {
            return Put::Full;
        };
        if !letter.fds.is_empty()
            && let Err(error) = io.send_fds(letter.fds)
        {
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::ENOBUFS) => Put::LineFull,
                Some(libc::ETOOMANYREFS) => Put::No(libc::EDQUOT),
                _ => Put::No(libc::EHOSTUNREACH),
            };
        }
        let was_dirty = io.dirty;
        let Some(pos) = t.reserve(header.len, letter.charge) else {
            return Put::Full;
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
        self.debit(&letter.charge, padded(len));
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
                self.missed(monitor, &copy, Reason::Full);
            }
        }
    }

    // ---- room ----------------------------------------------------------------------------------------------------

    /// What a principal has used of its quota, as far as the switch has taken note of releases.
    #[must_use]
    pub fn account(&self, principal: u32) -> Account {
        self.accounts.get(&principal).copied().unwrap_or_default()
    }

    fn debit(&mut self, charge: &Charge, bytes: u64) {
        if charge.principal != Charge::AGENT.principal {
            let account = self.accounts.entry(charge.principal).or_default();
            account.bytes += bytes + u64::from(charge.body);
            account.messages += 1;
            account.fds += u64::from(charge.fds);
        }
    }

    fn refund(&mut self, refunds: &mut Vec<Refund>) {
        for refund in refunds.drain(..) {
            if let Some(account) = self.accounts.get_mut(&refund.principal) {
                account.bytes = account.bytes.saturating_sub(refund.bytes);
                account.messages = account.messages.saturating_sub(refund.messages);
                account.fds = account.fds.saturating_sub(refund.fds);
            }
        }
    }

    fn over_quota(&mut self, principal: u32, bytes: u64, messages: u64, fds: u64) -> bool {
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
        // Accounts are refunded lazily; before saying no, look at all rings, once in a turn of the sender.
        if !std::mem::replace(&mut self.swept, true) {
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

    /// Notes that `from` was refused for lack of room at `to`, and will be told when there is some, or when it is time to `retry`.
    fn wait_for(&mut self, from: Ref, to: Ref, need: u64, retry: Option<Instant>, now: Instant) {
        if let Some(e) = self.get_mut(from) {
            e.waiting = true;
        }
        if self.get(to).is_some_and(|t| t.waiters.len() >= t.prune_at) {
            // Some may be gone, or have been told long ago and not come again.
            let mut waiters = self
                .get_mut(to)
                .map_or_else(Vec::new, |t| std::mem::take(&mut t.waiters));
            waiters.retain(|w| self.get(w.from).is_some_and(|e| e.waiting));
            if let Some(t) = self.get_mut(to) {
                t.prune_at = (2 * waiters.len()).max(64);
                t.waiters = waiters;
            }
        }
        if let Some(t) = self.get_mut(to) {
            let at = t.waiters.iter().position(|w| w.from == from);
            let at = at.unwrap_or_else(|| {
                t.waiters.push(Waiter {
                    from,
                    need,
                    since: now,
                    retry: None,
                });
                t.waiters.len() - 1
            });
            let waiter = &mut t.waiters[at];
            waiter.need = need;
            if let Some(at) = retry
                && waiter.retry.is_none_or(|have| at < have)
            {
                waiter.retry = Some(at);
                self.set_timer(at, from, to);
            }
        }
        self.want_room(to);
    }

    fn set_timer(&mut self, at: Instant, from: Ref, to: Ref) {
        if self.timers.len() >= self.prune_timers_at.max(MIN_TIMERS) {
            let mut timers = std::mem::take(&mut self.timers);
            timers.retain(|Reverse((at, from, to))| self.timer_stands(*at, *from, *to));
            self.prune_timers_at = 2 * timers.len();
            self.timers = timers;
        }
        self.timers.push(Reverse((at, from, to)));
    }

    fn timer_stands(&self, at: Instant, from: Ref, to: Ref) -> bool {
        let waiters = self.get(to).map_or(&[][..], |t| &t.waiters[..]);
        waiters
            .iter()
            .any(|w| w.from == from && w.retry == Some(at))
    }

    /// When [`Self::handle_timer`] is to be called, if nothing else happens.
    #[must_use]
    pub fn next_timer(&self) -> Option<Instant> {
        let waiter = self.timers.peek().map(|Reverse((at, _, _))| *at);
        let others = [self.trunks_due, self.lanes.sweep_at()];
        waiter.into_iter().chain(others.into_iter().flatten()).min()
    }

    /// Tells those to try again whose receivers have kept them waiting for as long as they may.
    pub fn handle_timer(&mut self, now: Instant) {
        if self.owes_trunks {
            self.tell_trunks_later(now);
        }
        self.sweep_lanes(now);
        while let Some(Reverse((at, from, to))) = self.timers.peek().copied()
            && at <= now
        {
            self.timers.pop();
            if !self.timer_stands(at, from, to) {
                continue;
            }
            if let Some(t) = self.get_mut(to)
                && let Some(waiter) = t.waiters.iter_mut().find(|w| w.from == from)
            {
                // It stays on the list: since when it has been waiting still counts.
                waiter.retry = None;
            }
            self.room_for(from);
        }
    }

    /// Asks an endpoint to kick when it has released something.
    fn want_room(&mut self, who: Ref) {
        let Some(e) = self.get_mut(who) else { return };
        let known = e.reclaimed();
        if let Some(remote) = e.remote {
            self.want_room_away(remote, who);
            return;
        }
        let Some(io) = &mut e.io else { return };
        match io.rx.wait_begin() {
            Ok(tail) if tail == known => {}
            Ok(_) => self.make_room(who),
            Err(v) => self.violated(who, v),
        }
    }

    /// An endpoint may have released something: put in what waits, and tell those who wait for room.
    fn make_room(&mut self, who: Ref) {
        loop {
            if !self.reclaim(who) {
                return;
            }
            let Some(e) = self.get_mut(who) else { return };
            if e.cut {
                // It gets nothing new, but what the agent has to say to it, if there is room.
                e.flush();
                self.dirty.push(who);
                return;
            }
            if e.io.is_none() {
                return;
            }
            if e.backlog() > 0 {
                e.flush();
                self.dirty.push(who);
            }
            self.release_held(who, None);
            if self.get(who).is_some_and(|e| e.held_for.is_some()) {
                self.release_from_away(who);
            }
            let Some(e) = self.get_mut(who) else { return };
            let Some(io) = &e.io else { return };
            let (free, size) = (io.rx.free(), io.rx.memory().size());
            let ready: Vec<Ref> = if free >= size / 4 {
                e.waiters
                    .iter()
                    // What can never fit is worth another try as well: it is refused for good then.
                    .filter(|w| e.room(w.from, w.need.min(size)) == Room::Yes)
                    .map(|w| w.from)
                    .collect()
            } else {
                Vec::new()
            };
            if !ready.is_empty() {
                e.waiters.retain(|w| !ready.contains(&w.from));
            }
            let more = !e.waiters.is_empty()
                || e.backlog() > 0
                || e.holds()
                || e.held_for.is_some()
                || !e.ended.is_empty();
            for from in ready {
                self.room_for(from);
            }
            if !more {
                return;
            }
            let Some(e) = self.get_mut(who) else { return };
            let known = e.reclaimed();
            let Some(io) = &mut e.io else { return };
            match io.rx.wait_begin() {
                Ok(tail) if tail == known => return,
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
        let Some(io) = &e.io else { return };
        let segment = io.tx.memory().clone();
        // Reading the padding brings POLLOUT back. If it is still on its way, its coming is an event, and it is read then.
        let read = if e.stopped == Stop::Padding {
            e.drain_line(true)
        } else {
            Ok(())
        };
        segment.room().fetch_add(1, Ordering::Release);
        bump(&segment);
        if let Err(v) = read {
            self.violated(who, v);
        }
        // A kick may have come with the padding, for which no event comes any more.
        self.activate(who);
    }

    /// Puts messages that were held back into the ring, see [`Endpoint::release_held`].
    fn release_held(&mut self, who: Ref, only: Option<Ref>) -> bool {
        let Some(e) = self.get_mut(who) else {
            return true;
        };
        let all = e.release_held(only);
        if e.io.as_ref().is_some_and(|io| io.dirty) {
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

/// What came, or would come, of putting a letter into a ring.
enum Put {
    Done,
    /// No room, for anybody or for this sender.
    Full,
    /// No room for descriptors on the line.
    LineFull,
    No(i32),
}

/// The header of a letter as this endpoint gets it.
fn sized_for(to: &Endpoint, letter: &Letter<'_>) -> RxHeader {
    shown_to(to, letter.header, letter.ident.len())
}

/// A header with the credentials and the identity that this endpoint gets.
fn shown_to(to: &Endpoint, header: RxHeader, ident_len: usize) -> RxHeader {
    let mut header = RxHeader {
        ident_len: if to.wants_ident { ident_len as u16 } else { 0 },
        ..header
    };
    if to.has_other_pids {
        header.pid = 0;
    }
    if to.has_other_users {
        (header.uid, header.gid) = (calls::OVERFLOW_ID, calls::OVERFLOW_ID);
    }
    header.sized()
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

/// Fills a buffer from the beginning of a file. `false` when the file is shorter, or cannot be read.
fn read_at_start(fd: RawFd, out: &mut [u8]) -> bool {
    let mut done = 0;
    while done < out.len() {
        let rest = &mut out[done..];
        // SAFETY: the buffer is as long as stated and lives for the call; the descriptor is open.
        let got = unsafe {
            libc::pread(
                fd,
                rest.as_mut_ptr().cast(),
                rest.len(),
                done as libc::off_t,
            )
        };
        match usize::try_from(got) {
            Ok(got) if got > 0 => done += got,
            _ => return false,
        }
    }
    true
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
        let Some(on) = self.get(owner).and_then(|e| e.bus) else {
            return false;
        };
        self.close_lanes_heard(on, &bits, terms.as_deref());
        let Some(bus) = self.buses.get_mut(&on) else {
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
        self.take_published(me, now);
        true
    }

    /// Counters of an endpoint for people, by name.
    #[must_use]
    pub fn counters(&self, id: u64) -> Option<Vec<(&'static str, u64)>> {
        let e = self.endpoint(id)?;
        let bus = e.bus.and_then(|b| self.buses.get(&b));
        let matches = bus.map_or(0, |b| b.subscriptions(e.me));
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
        let (lanes_out, lanes_in, sent_on_lanes, received_on_lanes) = self.lane_counters(e.me);
        Some(vec![
            ("sent", e.stats.sent + sent_on_lanes),
            ("refused", e.stats.refused),
            ("received", e.stats.received + received_on_lanes),
            ("missed", e.stats.missed),
            ("conflated", e.stats.conflated),
            ("tx_bytes", tx_bytes),
            ("tx_used", tx_used),
            ("rx_bytes", rx_bytes),
            ("rx_used", rx_used),
            (
                "backlog",
                (e.backlog() + e.held_for.as_ref().map_or(0, |held| held.len())) as u64,
            ),
            ("waiting", e.waiters.len() as u64),
            ("requests", e.requests.into()),
            ("matches", matches as u64),
            ("lanes_out", lanes_out),
            ("lanes_in", lanes_in),
        ])
    }

    /// Sets or removes an endpoint's filter.
    pub fn set_filter(&mut self, id: u64, filter: Option<Filter>) -> bool {
        if let Some(me) = self.find(id) {
            self.close_multicasts_of(me, Side::In);
        }
        let Some(e) = self.endpoint_mut(id) else {
            return false;
        };
        e.filter = filter;
        // What they wait for may not pass it.
        let me = e.me;
        self.try_again(Some(me));
        true
    }
}

#[cfg(test)]
#[path = "flow_tests.rs"]
mod flow_tests;
#[cfg(test)]
#[path = "lane_multicast_tests.rs"]
mod lane_multicast_tests;
#[cfg(test)]
#[path = "lane_tests.rs"]
mod lane_tests;
#[cfg(test)]
#[path = "switch_tests.rs"]
mod tests;
#[cfg(test)]
#[path = "trunk_tests.rs"]
mod trunk_tests;
