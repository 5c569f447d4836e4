//! The client's end of an endpoint: the writing half of its TX ring and the reading half of its RX ring.
//!
//! Invariants:
//! 1. A message is sent when the switch has given its verdict; until then its outcome is unknown, and is reported as that (D21).
//! 2. Nothing is read twice, and room is given back in the order of the records, whatever the order in which loans return.
//! 3. While the line is polled it is readable whenever a record waits: it is emptied only when the ring is, and the switch is
//!    asked for a wake-up where one may have been eaten.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::frame::{
    ADDRESS_BYTES, BODY_IN_MEMFD, GAP, MESSAGE, NO_REPLY, RX_HEADER, RxHeader, TX_HEADER,
    TX_STATUS, TxHeader,
};
use crate::line;
use crate::memory::{Segment, futex_wait};
use crate::ring::{Consumer, Memory, Producer, Violation, padded};
use crate::sync::Ordering;
use crate::wait::Spin;

/// Bodies up to here lie in the ring (D14).
pub const INLINE_BYTES: u64 = 64 << 10;
/// The largest message (D14).
pub const MESSAGE_BYTES: usize = 16 << 20;
/// Bytes of the body of a gap.
const GAP_BYTES: u32 = 28;
/// The longest sleep between two looks at whether the agent still lives.
const SLICE: Duration = Duration::from_millis(100);
/// Bytes of the padding that takes POLLOUT away: more than a quarter of any usual send buffer.
const PADDING: usize = 64 << 10;

/// Waits for events on the line. Returns what happened, 0 when the time was over or a signal came.
#[must_use]
pub fn poll(line: BorrowedFd<'_>, events: i16, timeout: Option<Duration>) -> i16 {
    let mut entry = libc::pollfd {
        fd: line.as_raw_fd(),
        events,
        revents: 0,
    };
    let millis = timeout.map_or(-1, |t| {
        i32::try_from(t.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
    });
    // SAFETY: one entry that lives for the call.
    let got = unsafe { libc::poll(&raw mut entry, 1, millis) };
    if got > 0 { entry.revents } else { 0 }
}

/// Whether the other end of the line is closed.
fn is_closed(line: &OwnedFd) -> bool {
    poll(line.as_fd(), 0, Some(Duration::ZERO)) & (libc::POLLHUP | libc::POLLERR) != 0
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// What was waited for is there.
    Ready,
    /// It is not yet: look whether signals or the time say to stop.
    NotYet,
    /// The agent is gone.
    Gone,
}

/// One message to be sent.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    /// Header without lengths.
    pub header: TxHeader,
    /// Source, empty for the default.
    pub src: &'a [u8],
    /// Destination.
    pub dst: &'a [u8],
    /// Body in parts; empty when it lies in a memfd.
    pub body: &'a [&'a [u8]],
}

/// Bytes of the record of a message.
#[must_use]
pub fn record_bytes(message: &Outgoing<'_>) -> u64 {
    let header = TxHeader {
        src_len: message.src.len() as u16,
        dst_len: message.dst.len() as u16,
        ..message.header
    };
    let inline: usize = message.body.iter().map(|part| part.len()).sum();
    header.body_at() + inline as u64
}

/// The writing half.
pub struct Tx {
    ring: Producer<Arc<Segment>>,
    spin: Spin,
    line: Arc<OwnedFd>,
    /// The line was found closed.
    hung_up: bool,
}

impl Tx {
    /// Takes the writing half of a new ring.
    #[must_use]
    pub fn new(segment: Arc<Segment>, line: Arc<OwnedFd>) -> Self {
        Self {
            ring: Producer::new(segment),
            line,
            spin: Spin::default(),
            hung_up: false,
        }
    }

    /// The largest body that goes inside the ring, so that even a small ring takes several.
    #[must_use]
    pub fn inline_limit(&self) -> u64 {
        INLINE_BYTES.min(self.ring.memory().size() / 2)
    }

    /// The largest record that the ring can ever take.
    #[must_use]
    pub fn record_limit(&self) -> u64 {
        self.ring.memory().size()
    }

    /// Changes when there is room again where there was none.
    #[must_use]
    pub fn room(&self) -> u32 {
        self.ring.memory().room().load(Ordering::Acquire)
    }

    /// The wait for the room that was missing when [`Self::room`] was `seen`. It does not need this half.
    #[must_use]
    pub fn room_after(&self, seen: u32) -> Room {
        Room {
            segment: self.ring.memory().clone(),
            line: self.line.clone(),
            seen,
        }
    }

    /// Everything before this position has its verdict, as of the last look.
    #[must_use]
    pub fn released(&self) -> u64 {
        self.ring.released()
    }

    /// Whether a record of so many bytes fits in without another look at what the switch has done.
    #[must_use]
    pub fn fits(&self, bytes: u64) -> bool {
        padded(bytes) <= self.ring.free()
    }

    /// Copies a message that fits into the ring, invisible until [`Self::publish`]. Returns its position and end.
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn put(&mut self, message: &Outgoing<'_>) -> Result<(u64, u64), Violation> {
        let header = TxHeader {
            src_len: message.src.len() as u16,
            dst_len: message.dst.len() as u16,
            ..message.header
        };
        let len = record_bytes(message);
        let header = TxHeader {
            len: len as u32,
            ..header
        };
        let pos = self.ring.reserve(len)?;
        let pos = pos.expect("the caller made sure that it fits");
        let memory = self.ring.memory();
        memory.copy_in(pos, &header.encode());
        memory.copy_in(pos + TX_HEADER, message.src);
        memory.copy_in(pos + header.dst_at(), message.dst);
        let mut at = pos + header.body_at();
        for part in message.body {
            memory.copy_in(at, part);
            at += part.len() as u64;
        }
        Ok((pos, pos + padded(len)))
    }

    /// Shows all that was put to the switch. `false`: the agent is gone, and what was put is taken back.
    ///
    /// The line is asked only while the switch does not look at this ring, which costs a system call anyway; it always does so
    /// soon after the last record. An agent that dies while it looks leaves the outcome unknown.
    pub fn publish(&mut self) -> bool {
        let sleeps = self.ring.memory().reader_sleeps().load(Ordering::Relaxed) != 0;
        if self.hung_up || (sleeps && is_closed(&self.line)) {
            self.hung_up = true;
            self.ring.abandon();
            return false;
        }
        self.ring.publish();
        if self.ring.must_wake() {
            // A full line has woken the switch already; a closed one is noticed by whoever waits for the verdict.
            let _ = line::send(self.line.as_fd(), &[line::KICK], &[]);
        }
        true
    }

    /// Whether everything before `end` has its verdict.
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn settled(&mut self, end: u64) -> Result<bool, Violation> {
        Ok(self.ring.released() >= end || self.ring.refresh()? >= end)
    }

    /// The verdict on the record at a position: 1 or a negative errno. Only once it is settled, and before anything new is put.
    #[must_use]
    pub fn verdict(&self, pos: u64) -> i32 {
        let word = self.ring.memory().word_at(pos + TX_STATUS);
        word.load(Ordering::Relaxed) as i32
    }

    /// Waits a while until everything before `end` has its verdict.
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn wait_settled(
        &mut self,
        end: u64,
        deadline: Option<Instant>,
    ) -> Result<Waited, Violation> {
        let memory = self.ring.memory().clone();
        let tail = memory.tail();
        if self.spin.until(|| tail.load(Ordering::Acquire) >= end) {
            return Ok(if self.settled(end)? {
                Waited::Ready
            } else {
                Waited::NotYet
            });
        }
        let seen = memory.signal().load(Ordering::Acquire);
        if self.ring.wait_begin()? >= end {
            return Ok(Waited::Ready);
        }
        let left = deadline.map_or(SLICE, |at| at.saturating_duration_since(Instant::now()));
        futex_wait(memory.signal(), seen, left.min(SLICE));
        if self.settled(end)? {
            return Ok(Waited::Ready);
        }
        self.hung_up |= is_closed(&self.line);
        // The agent may have got that far before it died.
        Ok(match (self.hung_up, self.settled(end)?) {
            (_, true) => Waited::Ready,
            (true, false) => Waited::Gone,
            (false, false) => Waited::NotYet,
        })
    }

    /// Takes POLLOUT away until the switch says that there is room (unless it has, since `seen`).
    pub fn block_line(&self, seen: u32) {
        let line = self.line.as_fd();
        if self.room() == seen
            && poll(line, libc::POLLOUT, Some(Duration::ZERO)) & libc::POLLOUT != 0
        {
            // When even this does not fit, POLLOUT is away already.
            let _ = line::send(line, &[line::BLOCK; PADDING], &[]);
        }
    }

    /// Sends descriptors ahead of their record, waiting a while for room on the line.
    ///
    /// # Errors
    /// As sendmsg(2); EAGAIN when there was no room all the time.
    pub fn send_fds(&self, fds: &[RawFd], limit: Duration) -> io::Result<()> {
        let line = self.line.as_fd();
        match line::send(line, &[line::FDS], fds) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !limit.is_zero() => {
                let _ = poll(line, libc::POLLOUT, Some(limit.min(SLICE)));
                line::send(line, &[line::FDS], fds)
            }
            result => result,
        }
    }
}

/// The wait for room where there was none.
pub struct Room {
    segment: Arc<Segment>,
    line: Arc<OwnedFd>,
    seen: u32,
}

impl Room {
    /// Waits a while until the switch says that there is room.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> Waited {
        let is_there = || self.segment.room().load(Ordering::Acquire) != self.seen;
        let signal = self.segment.signal().load(Ordering::Acquire);
        if is_there() {
            return Waited::Ready;
        }
        futex_wait(self.segment.signal(), signal, limit.min(SLICE));
        if is_there() {
            Waited::Ready
        } else if is_closed(&self.line) {
            Waited::Gone
        } else {
            Waited::NotYet
        }
    }
}

/// A record in the RX ring.
#[derive(Debug, Clone, Copy)]
pub struct Incoming {
    /// Where it begins.
    pub pos: u64,
    /// Its header, a private copy that was checked.
    pub header: RxHeader,
}

/// The reading half.
pub struct Rx {
    ring: Consumer<Arc<Segment>>,
    spin: Spin,
    line: Arc<OwnedFd>,
    fds: VecDeque<(Vec<OwnedFd>, bool)>,
    /// Ends of records that were taken but not given back, and whether they may be.
    out: VecDeque<(u64, bool)>,
    hung_up: bool,
    /// A wake-up may have been taken from the line although the ring was not empty.
    eaten: bool,
}

impl Rx {
    /// Takes the reading half of a new ring.
    #[must_use]
    pub fn new(segment: Arc<Segment>, line: Arc<OwnedFd>) -> Self {
        Self {
            ring: Consumer::new(segment),
            spin: Spin::default(),
            line,
            fds: VecDeque::new(),
            out: VecDeque::new(),
            hung_up: false,
            // Whatever came before the line was polled: nobody has looked whether it is readable.
            eaten: true,
        }
    }

    /// The memory under the ring.
    #[must_use]
    pub fn memory(&self) -> &Arc<Segment> {
        self.ring.memory()
    }

    /// The next record, or `None` when there is none. Does not take it.
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn peek(&mut self) -> Result<Option<Incoming>, Violation> {
        let Some((pos, len)) = self.ring.peek(RX_HEADER as u32)? else {
            return Ok(None);
        };
        let mut raw = [0u8; RX_HEADER as usize];
        self.ring.memory().copy_out(pos, &mut raw);
        let header = RxHeader::decode(&raw, len)?;
        check(&header)?;
        Ok(Some(Incoming { pos, header }))
    }

    /// Takes the record that [`Self::peek`] returned. Its room is given back by [`Self::settle`], for a loan after [`Self::give_back`].
    pub fn take(&mut self, record: &Incoming, on_loan: bool) {
        self.ring.advance(record.header.len);
        if on_loan || !self.out.is_empty() {
            self.out.push_back((self.ring.position(), !on_loan));
        }
    }

    /// Where the record ends that was taken last; it names a loan.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.ring.position()
    }

    /// A loan has come back.
    pub fn give_back(&mut self, end: u64) {
        if let Some(entry) = self.out.iter_mut().find(|(at, _)| *at == end) {
            entry.1 = true;
        }
        self.settle();
    }

    /// Gives room back to the agent, as far as no loan is in the way.
    pub fn settle(&mut self) {
        let mut to = if self.out.is_empty() {
            self.ring.position()
        } else {
            self.ring.released()
        };
        while let Some((end, true)) = self.out.front() {
            to = *end;
            self.out.pop_front();
            if self.out.is_empty() {
                to = self.ring.position();
            }
        }
        if to != self.ring.released() {
            self.ring.release(to);
            if self.ring.must_wake() {
                // A closed line is noticed by whoever waits next; a full one has woken the switch already.
                let _ = line::send(self.line.as_fd(), &[line::KICK], &[]);
            }
        }
    }

    /// Takes all packets from the line and keeps the descriptors.
    fn drain(&mut self) {
        while let Some(packet) = line::receive(self.line.as_fd()) {
            if packet.kind == line::FDS {
                self.fds.push_back((packet.fds, packet.lost));
            }
        }
        self.hung_up |= is_closed(&self.line);
    }

    /// The descriptors of the next record that has some, and whether some were lost.
    ///
    /// # Errors
    /// [`Violation`] when none came.
    pub fn fds(&mut self) -> Result<(Vec<OwnedFd>, bool), Violation> {
        if self.fds.is_empty() {
            self.drain();
            self.eaten = true;
        }
        self.fds.pop_front().ok_or(Violation(
            "a message announces descriptors that did not come",
        ))
    }

    /// Puts descriptors back that were only looked at.
    pub fn fds_back(&mut self, fds: (Vec<OwnedFd>, bool)) {
        self.fds.push_front(fds);
    }

    /// Makes the line readable when a record waits, and lets the switch wake it for the next one: the end of each look at a polled endpoint.
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn arm(&mut self) -> Result<(), Violation> {
        if self.ring.refresh()? == 0 {
            self.drain();
            self.eaten = false;
            if self.ring.sleep_begin()? {
                return Ok(());
            }
            // Something came in between. If our flag is still up, nobody has seen it, and nobody will send a wake-up for it.
            if !self.ring.sleep_end() {
                return Ok(());
            }
        } else if !self.eaten {
            return Ok(());
        }
        self.eaten = false;
        // A line without room is readable at the other end, and one that is closed is readable at ours.
        let _ = line::send(self.line.as_fd(), &[line::PING], &[]);
        Ok(())
    }

    /// Looks at the line although nobody waits, so that an agent that is gone is noticed.
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn look(&mut self) -> Result<(), Violation> {
        if self.ring.refresh()? == 0 {
            self.drain();
            self.eaten = true;
        }
        Ok(())
    }

    /// Looks for a record for as long as that pays. Returns whether there is one.
    pub fn spin(&mut self) -> bool {
        let memory = self.ring.memory().clone();
        let (head, next) = (memory.head(), self.ring.position());
        self.spin.until(|| head.load(Ordering::Acquire) != next)
    }

    /// Sleeps until there is a record, the time is over (`NotYet`), or a signal came (`NotYet`).
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn sleep(&mut self, deadline: Option<Instant>) -> Result<Waited, Violation> {
        if self.ring.sleep_begin()? && !self.hung_up {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let _ = poll(self.line.as_fd(), libc::POLLIN, left);
            self.drain();
            self.eaten = true;
        }
        self.ring.sleep_end();
        Ok(if self.ring.refresh()? > 0 {
            Waited::Ready
        } else if self.hung_up {
            Waited::Gone
        } else {
            Waited::NotYet
        })
    }

    /// Whether the agent is gone, as far as the line was looked at.
    #[must_use]
    pub fn is_hung_up(&self) -> bool {
        self.hung_up
    }
}

/// What a record says of itself and no honest agent would; its lengths were checked before.
fn check(h: &RxHeader) -> Result<(), Violation> {
    let in_memfd = h.flags & BODY_IN_MEMFD != 0;
    if !(MESSAGE..=NO_REPLY).contains(&h.kind) {
        return Err(Violation("unknown kind of record"));
    }
    if usize::from(h.src_len) > ADDRESS_BYTES {
        return Err(Violation("source longer than an address"));
    }
    if h.kind == MESSAGE && h.src_len == 0 {
        return Err(Violation("a message from nobody"));
    }
    if usize::from(h.fds) > line::MAX_FDS || (in_memfd && h.fds == 0) {
        return Err(Violation(
            "another number of descriptors than a message has",
        ));
    }
    if h.body_len as usize > MESSAGE_BYTES {
        return Err(Violation("body larger than a message"));
    }
    if h.kind == GAP && (in_memfd || h.body_len != GAP_BYTES) {
        return Err(Violation("a gap that tells something else"));
    }
    Ok(())
}
