//! The destinations of an endpoint: which have a lane, and when it is worth asking for one (docs/internals-lanes.md).
//!
//! Invariants:
//! 1. A lane that was found closed is not used again.
//! 2. What is kept of destinations is bounded, and nobody is asked again and again for what was refused.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::lane_out::{ARENA_FROM, LaneOut, Lending, Lent, Published, Put};
use crate::memory::{HEADER_BYTES, MAX_ARENA, Segment};
use crate::ring::Violation;
use crate::sync::Ordering;

/// Messages to one destination after which a lane to it is asked for.
const ASK_AFTER: u32 = 1;
/// The most messages between two such questions, when they are refused again and again.
const ASK_SELDOM: u32 = 1 << 14;
/// Messages that are published together at most: more are for the next call.
pub const MAX_BATCH: usize = 32;
/// Destinations that are kept count of.
const MAX_DESTINATIONS: usize = 1024;

/// Bodies of the largest size that an arena has room for: as many as let several readers take turns on few processors; those
/// written last are written over first, so that most of it is never touched while readers keep up.
const BLOCKS: u64 = 64;

/// Where messages go: kind of destination, source, destination.
pub type Route<'a> = (u8, &'a [u8], &'a [u8]);

/// What is known of one destination.
struct Destination {
    /// Messages that went by the switch since the last question.
    switched: u32,
    /// How many make it worth another one.
    ask_after: u32,
    /// The last question was answered by a refusal.
    was_refused: bool,
    /// The largest body for which an arena was missed.
    missed: u64,
    /// An arena of more bytes than this was refused.
    arena_limit: u64,
    lane: Option<Box<LaneOut>>,
}

impl Destination {
    /// How large the arena of its next lane should be.
    fn arena(&self) -> u64 {
        if self.missed < ARENA_FROM {
            return 0;
        }
        let page = HEADER_BYTES as u64;
        let wanted = (BLOCKS * self.missed.div_ceil(64) * 64).min(MAX_ARENA as u64);
        let most = self.arena_limit / page * page;
        (wanted.div_ceil(page) * page).min(most)
    }

    /// Its lane is closed.
    fn close(&mut self) {
        let carried = self.lane.take().map_or(0, |lane| lane.count());
        if carried > 16 * u64::from(self.ask_after) {
            // One that carried much was worth it, and is worth another question at once.
            (self.ask_after, self.switched) = (ASK_AFTER, ASK_AFTER);
        } else {
            (self.ask_after, self.switched) = ((2 * self.ask_after).min(ASK_SELDOM), 0);
        }
    }
}

/// What came of a message for which there may be a lane.
pub enum Taken {
    /// There is no lane that takes it.
    No,
    /// It is in the lane and counts.
    Yes,
    /// The lane has no room for it now.
    Full,
    /// Nobody knows whether it will be read.
    Unknown,
}

/// The lanes of one endpoint, by source and destination.
#[derive(Default)]
pub struct Destinations {
    known: HashMap<Box<[u8]>, Destination, BuildHasherDefault<KeyHasher>>,
    key: Vec<u8>,
    /// There are none on the bus.
    is_vain: bool,
}

/// Whoever chooses addresses so that they collide slows down nobody but itself: a simple hash is enough.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }

    fn write(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(8) {
            let word = part.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
            self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
}

fn write_key(key: &mut Vec<u8>, (kind, src, dst): Route<'_>) {
    key.clear();
    key.push(kind);
    key.extend_from_slice(&(src.len() as u16).to_le_bytes());
    key.extend_from_slice(src);
    key.extend_from_slice(dst);
}

impl Destinations {
    fn find(&mut self, route: Route<'_>) -> Option<&mut Destination> {
        write_key(&mut self.key, route);
        self.known.get_mut(self.key.as_slice())
    }

    /// The lane to a destination.
    pub fn lane(&mut self, route: Route<'_>) -> Option<&mut LaneOut> {
        self.find(route)?.lane.as_deref_mut()
    }

    /// Sends messages on their lane, as many as go without waiting; returns how many count, and what became of the next.
    ///
    /// `seq` is the word from which the endpoint's messages take their numbers.
    pub fn send(
        &mut self,
        route: Route<'_>,
        own: (&Arc<Segment>, &OwnedFd),
        serial: u64,
        messages: &[&[&[u8]]],
    ) -> (usize, Taken) {
        let messages = &messages[..messages.len().min(MAX_BATCH)];
        let mut missed = 0;
        let sent = self.send_each(route, own, messages.len(), |lane, seq, n| {
            let bytes = messages[n].iter().map(|part| part.len() as u64).sum();
            if !lane.takes(bytes) {
                missed = bytes;
                return Ok(Put::No);
            }
            lane.put(seq, serial, messages[n], bytes)
        });
        if missed > 0
            && let Some(one) = self.find(route)
        {
            one.missed = one.missed.max(missed);
        }
        sent
    }

    /// Sends the first bytes of a block that was lent, if it was lent by the lane to this destination.
    pub fn send_lent(
        &mut self,
        route: Route<'_>,
        own: (&Arc<Segment>, &OwnedFd),
        serial: u64,
        (lent, len): (&mut Lent, u64),
    ) -> Taken {
        let put = |lane: &mut LaneOut, seq, _| lane.put_lent(seq, serial, lent, len);
        let (count, rest) = self.send_each(route, own, 1, put);
        if count == 1 {
            lent.let_go();
            return Taken::Yes;
        }
        rest
    }

    /// Lends a block of the arena of a lane.
    pub fn lend(&mut self, route: Route<'_>, bytes: u64) -> Lending {
        let Some(one) = self.find(route) else {
            return Lending::No;
        };
        let Some(lane) = &mut one.lane else {
            one.missed = one.missed.max(bytes);
            return Lending::No;
        };
        let lending = match lane.lend(bytes) {
            Ok(lending) if !lane.is_closed() => lending,
            _ => {
                one.close();
                return Lending::No;
            }
        };
        match lending {
            Lending::Full if !lane.is_waited_for() => Lending::No,
            Lending::No => {
                let too_small = lane.arena_bytes() < bytes;
                self.miss(route, if too_small { bytes } else { 0 });
                Lending::No
            }
            lending => lending,
        }
    }

    /// A body could not lie in an arena. Where a larger one may be had, the lane is not used any more: the next has that.
    pub fn miss(&mut self, route: Route<'_>, bytes: u64) {
        let Some(one) = self.find(route).filter(|_| bytes >= ARENA_FROM) else {
            return;
        };
        one.missed = one.missed.max(bytes);
        let have = one.lane.as_ref().map_or(0, |lane| lane.arena_bytes());
        if bytes > have && one.arena() > have {
            one.close();
        }
    }

    /// How large the arena of a lane should be that is asked for now.
    pub fn arena(&mut self, route: Route<'_>) -> u64 {
        self.find(route).map_or(0, |one| one.arena())
    }

    /// A lane was refused as too much memory of this sender is in use: the next question is for less.
    pub fn shrink(&mut self, route: Route<'_>) {
        if let Some(one) = self.find(route)
            && one.arena() > 0
        {
            one.arena_limit = one.arena() / 2;
        }
    }

    fn send_each(
        &mut self,
        route: Route<'_>,
        (tx, line): (&Arc<Segment>, &OwnedFd),
        messages: usize,
        mut each: impl FnMut(&mut LaneOut, u64, usize) -> Result<Put, Violation>,
    ) -> (usize, Taken) {
        if self.is_vain {
            return (0, Taken::No);
        }
        let Some(lane) = self.lane(route) else {
            return (0, Taken::No);
        };
        if lane.is_look_due() && crate::client::is_closed(line) {
            // The switch's side of the sender says so in its own words.
            self.forget(route);
            return (0, Taken::No);
        }
        // What is only put there can be seen by all who had the lane, also if it never counts (D8).
        if lane.is_taken_back() {
            self.close(route);
            return (0, Taken::No);
        }
        let first = tx.seq().fetch_add(messages as u64, Ordering::Relaxed) + 1;
        let mut ends = [0u64; MAX_BATCH];
        let mut put = 0;
        let mut rest = None;
        for n in 0..messages {
            match each(lane, first + n as u64, n) {
                Ok(Put::At(end)) => {
                    ends[put] = end;
                    put += 1;
                }
                // Where nobody waits, the switch knows how to be full.
                Ok(Put::Full) if lane.is_waited_for() => {
                    rest = Some(Taken::Full);
                    break;
                }
                // What lies in the lane is with a reader that breaks rules.
                Ok(Put::Full | Put::No) | Err(_) => {
                    rest = Some(Taken::No);
                    break;
                }
            }
        }
        let (count, rest) = if put == 0 {
            // Nobody makes room in one that is closed.
            let is_closed = lane.is_closed();
            if is_closed {
                self.close(route);
            }
            (0, if is_closed { Some(Taken::No) } else { rest })
        } else {
            match lane.publish(line) {
                Published::All => (put, rest),
                Published::Last => {
                    self.close(route);
                    (put, Some(Taken::No))
                }
                Published::Until(end) => {
                    let counted = ends[..put].iter().take_while(|at| **at <= end).count();
                    self.close(route);
                    (counted, Some(Taken::No))
                }
                Published::Unknown(end) => {
                    let counted = ends[..put].iter().take_while(|at| **at <= end).count();
                    self.close(route);
                    let is_all = counted == put;
                    (
                        counted,
                        Some(if is_all { Taken::No } else { Taken::Unknown }),
                    )
                }
            }
        };
        let unused = (messages - count) as u64;
        if unused > 0 {
            // The numbers of those that did not go; one that another thread has got meanwhile stays a hole.
            let now = first - 1 + messages as u64;
            let _ =
                tx.seq()
                    .compare_exchange(now, now - unused, Ordering::Relaxed, Ordering::Relaxed);
        }
        (count, rest.unwrap_or(Taken::Yes))
    }

    /// The lane is closed: the next question comes later than the last.
    fn close(&mut self, route: Route<'_>) {
        if let Some(one) = self.find(route) {
            one.close();
        }
    }

    fn forget(&mut self, route: Route<'_>) {
        write_key(&mut self.key, route);
        self.known.remove(self.key.as_slice());
    }

    /// There are no lanes on the bus: nothing more is asked for.
    pub fn give_up(&mut self) {
        self.is_vain = true;
        self.known.clear();
    }

    /// Messages went by the switch that could have gone on a lane, the largest with so many bytes.
    pub fn went_by_switch(&mut self, route: Route<'_>, count: usize, bytes: u64) {
        if self.is_vain {
            return;
        }
        if let Some(one) = self.find(route) {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            one.switched = one.switched.saturating_add(count);
            one.missed = one.missed.max(bytes);
            // The switch has closed it.
            if one.lane.is_some() {
                self.close(route);
            }
            return;
        }
        if self.known.len() >= MAX_DESTINATIONS {
            self.known
                .retain(|_, one| one.lane.as_ref().is_some_and(|lane| !lane.is_closed()));
        }
        let one = Destination {
            switched: u32::try_from(count).unwrap_or(u32::MAX),
            ask_after: ASK_AFTER,
            was_refused: false,
            missed: bytes,
            arena_limit: u64::MAX,
            lane: None,
        };
        self.known.insert(self.key.as_slice().into(), one);
    }

    /// Whether it is time to ask for a lane; this counts as asking.
    pub fn must_ask(&mut self, route: Route<'_>) -> bool {
        if self.is_vain {
            return false;
        }
        let Some(one) = self.find(route) else {
            return false;
        };
        if one.lane.is_some() || one.switched < one.ask_after {
            return false;
        }
        one.switched = 0;
        one.ask_after = (2 * one.ask_after).min(ASK_SELDOM);
        one.was_refused = true;
        // Those that the agent has taken back are not kept for longer than this.
        for one in self.known.values_mut() {
            if one.lane.as_ref().is_some_and(|lane| lane.is_closed()) {
                one.close();
            }
        }
        true
    }

    /// A lane was made.
    pub fn open(&mut self, route: Route<'_>, lane: LaneOut) {
        if let Some(one) = self.find(route) {
            one.lane = Some(Box::new(lane));
            one.was_refused = false;
        }
        // What goes by the switch closes all lanes to the same receiver. So those that had one ask for theirs before they send again,
        // or they would close this one, and each other's for ever.
        for one in self.known.values_mut() {
            if one.lane.is_none() && !one.was_refused {
                one.switched = one.switched.max(one.ask_after);
            }
        }
    }
}
