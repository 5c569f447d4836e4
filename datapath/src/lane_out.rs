//! The sending end of lanes: which destinations have one, and what is written into it (docs/internals-lanes.md).
//!
//! Invariants:
//! 1. What was published counts only if the gate was open behind a full fence, or was closed behind it: else it is taken back,
//!    and goes by the switch.
//! 2. There is no system call while the reader is awake.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::gate::Passage;
use crate::line;
use crate::memory::{Board, Segment, futex_wait};
use crate::ring::{Memory, Producer, Violation, padded};
use crate::sync::{Ordering, fence};
use crate::wait::Spin;
use crate::waker;

/// Bytes of the header of a record in a lane.
pub const LANE_HEADER: u64 = 24;
/// Messages to one destination after which a lane to it is asked for.
const ASK_AFTER: u32 = 1;
/// The most messages between two such questions, when they are refused again and again.
const ASK_SELDOM: u32 = 1 << 14;
/// Messages that are published together at most: more are for the next call.
pub const MAX_BATCH: usize = 32;
/// Destinations that are kept count of.
const MAX_DESTINATIONS: usize = 1024;
/// Messages between two looks at whether the agent still lives: who reads may have died with it.
const LOOK_EVERY: u32 = 64;
/// How long to wait for a closer that is about to say how far it was.
const CLOSER_LIMIT: Duration = Duration::from_secs(1);

/// One lane, as its sender has it.
pub struct LaneOut {
    number: u64,
    ring: Producer<Arc<Segment>>,
    board: Arc<Board>,
    bell: OwnedFd,
    spin: Spin,
    count: u64,
    unlooked: u32,
}

/// What came of publishing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// All of it counts.
    All,
    /// The lane is closed; what ends at or before this position counts.
    Until(u64),
    /// The lane is closed, and nobody says how far it was.
    Unknown,
}

impl LaneOut {
    /// Takes the sending end of a lane that is new.
    ///
    /// # Errors
    /// As [`Segment::attach`], [`Board::attach`].
    pub fn attach(
        number: u64,
        ring: &OwnedFd,
        board: &OwnedFd,
        bell: OwnedFd,
    ) -> std::io::Result<Self> {
        Ok(Self {
            number,
            ring: Producer::new(Segment::attach(ring.as_fd())?),
            board: Arc::new(Board::attach(board.as_fd())?),
            bell,
            spin: Spin::default(),
            count: 0,
            unlooked: 0,
        })
    }

    /// Whether a body of so many bytes may go here: so that even a small lane takes several.
    #[must_use]
    pub fn takes(&self, body: u64) -> bool {
        LANE_HEADER + body <= self.ring.memory().size() / 2
    }

    /// Copies a message into the lane, invisible until [`Self::publish`]; returns where it ends, or `None` for want of room.
    ///
    /// # Errors
    /// [`Violation`] when the reader broke a rule.
    pub fn put(
        &mut self,
        seq: u64,
        serial: u64,
        parts: &[&[u8]],
        bytes: u64,
    ) -> Result<Option<u64>, Violation> {
        let len = LANE_HEADER + bytes;
        let Some(pos) = self.ring.reserve(len)? else {
            return Ok(None);
        };
        let memory = self.ring.memory();
        let mut header = [0u8; LANE_HEADER as usize];
        header[0..4].copy_from_slice(&(len as u32).to_le_bytes());
        header[8..16].copy_from_slice(&seq.to_le_bytes());
        header[16..24].copy_from_slice(&serial.to_le_bytes());
        memory.copy_in(pos, &header);
        let mut at = pos + LANE_HEADER;
        for part in parts {
            memory.copy_in(at, part);
            at += part.len() as u64;
        }
        self.count += 1;
        Ok(Some(pos + padded(len)))
    }

    /// Shows what was put to the reader, wakes it if it sleeps, and finds out whether it counts.
    pub fn publish(&mut self, line: &OwnedFd) -> Published {
        let memory = self.ring.memory();
        memory.count().store(self.count, Ordering::Relaxed);
        self.ring.publish();
        let memory = self.ring.memory();
        // Behind this fence both are looked at: whether the reader sleeps, and whether somebody has closed the lane.
        fence(Ordering::SeqCst);
        let sleeps = memory.reader_sleeps();
        if sleeps.load(Ordering::Relaxed) != 0 {
            match sleeps.swap(0, Ordering::AcqRel) {
                0 => {}
                1 => waker::ring(&self.bell),
                _ => {
                    // An agent that is gone is found out by the reader as well, which closes the lane then.
                    let _ = line::call(line.as_fd(), line::LANE_WAKE, self.number);
                }
            }
        }
        let (agent, reader) = (self.board.gate(), memory.gate());
        match (agent.look(), reader.look()) {
            (Passage::Open, Passage::Open) => Published::All,
            (Passage::Closed(end), _) | (Passage::Open, Passage::Closed(end)) => {
                Published::Until(end)
            }
            _ => self.await_end(),
        }
    }

    /// Somebody is closing the lane right now, or died while it did.
    #[cold]
    fn await_end(&self) -> Published {
        let limit = Instant::now() + CLOSER_LIMIT;
        loop {
            let (agent, reader) = (self.board.gate(), self.ring.memory().gate());
            match (agent.look(), reader.look()) {
                (Passage::Closed(end), _) | (Passage::Open, Passage::Closed(end)) => {
                    return Published::Until(end);
                }
                _ if Instant::now() > limit => return Published::Unknown,
                _ => std::thread::yield_now(),
            }
        }
    }

    /// Whether it is worth a look whether the agent still lives.
    fn is_look_due(&mut self) -> bool {
        self.unlooked += 1;
        if self.unlooked < LOOK_EVERY {
            return false;
        }
        self.unlooked = 0;
        true
    }

    /// Whether it is known to be closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.board.gate().look() != Passage::Open
            || self.ring.memory().gate().look() != Passage::Open
    }

    /// Up to where the reader has to get before half of the lane is free, or a record that is longer fits in.
    fn wanted(&self, bytes: u64) -> u64 {
        let size = self.ring.memory().size();
        let free = padded(LANE_HEADER + bytes).max(size / 2);
        (self.ring.position() + free).saturating_sub(size)
    }

    /// Looks for room for as long as that pays. Returns whether there is some, or the lane is closed.
    pub fn spin(&mut self, bytes: u64) -> bool {
        let wanted = self.wanted(bytes);
        let Self {
            ring, board, spin, ..
        } = self;
        let memory = ring.memory();
        spin.until_peer(|| {
            memory.tail().load(Ordering::Acquire) >= wanted
                || board.gate().look() != Passage::Open
                || memory.gate().look() != Passage::Open
        })
    }

    /// The wait for room that [`Self::spin`] did not find. It does not need this end.
    #[must_use]
    pub fn room(&self, bytes: u64, line: Arc<OwnedFd>) -> LaneRoom {
        LaneRoom {
            segment: self.ring.memory().clone(),
            board: self.board.clone(),
            wanted: self.wanted(bytes),
            line,
        }
    }
}

/// The wait for room in a lane.
pub struct LaneRoom {
    segment: Arc<Segment>,
    board: Arc<Board>,
    wanted: u64,
    line: Arc<OwnedFd>,
}

impl LaneRoom {
    /// Sleeps until half of the lane is free, it is closed, or some time is over. `None`: the agent is gone; else whether to try again.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> Option<bool> {
        let memory = &self.segment;
        let signal = memory.signal().load(Ordering::Acquire);
        memory.wanted().store(self.wanted, Ordering::Relaxed);
        memory.writer_waits().store(1, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.is_there() {
            return Some(true);
        }
        futex_wait(
            memory.signal(),
            signal,
            limit.min(Duration::from_millis(100)),
        );
        if self.is_there() {
            return Some(true);
        }
        (!crate::client::is_closed(&self.line)).then_some(false)
    }

    fn is_there(&self) -> bool {
        self.segment.tail().load(Ordering::Acquire) >= self.wanted
            || self.board.gate().look() != Passage::Open
            || self.segment.gate().look() != Passage::Open
    }
}

/// What is known of one destination.
struct Destination {
    /// Messages that went by the switch since the last question.
    switched: u32,
    /// How many make it worth another one.
    ask_after: u32,
    lane: Option<Box<LaneOut>>,
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

fn write_key(key: &mut Vec<u8>, src: &[u8], dst: &[u8]) {
    key.clear();
    key.extend_from_slice(&(src.len() as u16).to_le_bytes());
    key.extend_from_slice(src);
    key.extend_from_slice(dst);
}

impl Destinations {
    fn find(&mut self, src: &[u8], dst: &[u8]) -> Option<&mut Destination> {
        write_key(&mut self.key, src, dst);
        self.known.get_mut(self.key.as_slice())
    }

    /// The lane to a destination.
    pub fn lane(&mut self, src: &[u8], dst: &[u8]) -> Option<&mut LaneOut> {
        self.find(src, dst)?.lane.as_deref_mut()
    }

    /// Sends messages on their lane, as many as go without waiting; returns how many count, and what became of the next.
    ///
    /// `seq` is the word from which the endpoint's messages take their numbers.
    pub fn send(
        &mut self,
        (src, dst): (&[u8], &[u8]),
        (tx, line): (&Arc<Segment>, &OwnedFd),
        serial: u64,
        messages: &[&[&[u8]]],
    ) -> (usize, Taken) {
        if self.is_vain {
            return (0, Taken::No);
        }
        let messages = &messages[..messages.len().min(MAX_BATCH)];
        let Some(lane) = self.lane(src, dst) else {
            return (0, Taken::No);
        };
        if lane.is_look_due() && crate::client::is_closed(line) {
            // The switch's side of the sender says so in its own words.
            self.forget(src, dst);
            return (0, Taken::No);
        }
        let first = tx.seq().fetch_add(messages.len() as u64, Ordering::Relaxed) + 1;
        let mut ends = [0u64; MAX_BATCH];
        let mut put = 0;
        let mut rest = None;
        for (n, parts) in messages.iter().enumerate() {
            let bytes = parts.iter().map(|part| part.len() as u64).sum();
            if !lane.takes(bytes) {
                rest = Some(Taken::No);
                break;
            }
            match lane.put(first + n as u64, serial, parts, bytes) {
                Ok(Some(end)) => {
                    ends[put] = end;
                    put += 1;
                }
                Ok(None) => {
                    rest = Some(Taken::Full);
                    break;
                }
                Err(_) => {
                    // What lies in the lane is with a reader that breaks rules.
                    rest = Some(Taken::No);
                    break;
                }
            }
        }
        let (count, rest) = if put == 0 {
            // Nobody makes room in one that is closed.
            let is_closed = lane.is_closed();
            if is_closed {
                self.close(src, dst);
            }
            (0, if is_closed { Some(Taken::No) } else { rest })
        } else {
            match lane.publish(line) {
                Published::All => (put, rest),
                Published::Until(end) => {
                    let counted = ends[..put].iter().take_while(|at| **at <= end).count();
                    self.close(src, dst);
                    (counted, Some(Taken::No))
                }
                Published::Unknown => {
                    self.close(src, dst);
                    (0, Some(Taken::Unknown))
                }
            }
        };
        let unused = (messages.len() - count) as u64;
        if unused > 0 {
            // The numbers of those that did not go; one that another thread has got meanwhile stays a hole.
            let now = first - 1 + messages.len() as u64;
            let _ =
                tx.seq()
                    .compare_exchange(now, now - unused, Ordering::Relaxed, Ordering::Relaxed);
        }
        (count, rest.unwrap_or(Taken::Yes))
    }

    /// The lane is closed: the next question comes later than the last.
    fn close(&mut self, src: &[u8], dst: &[u8]) {
        if let Some(one) = self.find(src, dst) {
            // One that carried much was worth it.
            let carried = one.lane.take().map_or(0, |lane| lane.count);
            one.ask_after = if carried > 16 * u64::from(one.ask_after) {
                ASK_AFTER
            } else {
                (2 * one.ask_after).min(ASK_SELDOM)
            };
            one.switched = 0;
        }
    }

    fn forget(&mut self, src: &[u8], dst: &[u8]) {
        write_key(&mut self.key, src, dst);
        self.known.remove(self.key.as_slice());
    }

    /// There are no lanes on the bus: nothing more is asked for.
    pub fn give_up(&mut self) {
        self.is_vain = true;
        self.known.clear();
    }

    /// Messages went by the switch that could have gone on a lane.
    pub fn went_by_switch(&mut self, src: &[u8], dst: &[u8], count: usize) {
        if self.is_vain {
            return;
        }
        if let Some(one) = self.find(src, dst) {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            one.switched = one.switched.saturating_add(count);
            // The switch has closed it.
            if one.lane.is_some() {
                self.close(src, dst);
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
            lane: None,
        };
        self.known.insert(self.key.as_slice().into(), one);
    }

    /// Whether it is time to ask for a lane; this counts as asking.
    pub fn must_ask(&mut self, src: &[u8], dst: &[u8]) -> bool {
        if self.is_vain {
            return false;
        }
        let Some(one) = self.find(src, dst) else {
            return false;
        };
        if one.lane.is_some() || one.switched < one.ask_after {
            return false;
        }
        one.switched = 0;
        one.ask_after = (2 * one.ask_after).min(ASK_SELDOM);
        // Those that the agent has taken back are not kept for longer than this.
        for one in self.known.values_mut() {
            one.lane.take_if(|lane| lane.is_closed());
        }
        true
    }

    /// A lane was made.
    pub fn open(&mut self, src: &[u8], dst: &[u8], lane: LaneOut) {
        if let Some(one) = self.find(src, dst) {
            one.lane = Some(Box::new(lane));
        }
    }
}
