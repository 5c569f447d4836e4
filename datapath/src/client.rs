//! The client's end of an endpoint: the writing half of its TX ring and the reading half of its RX ring.
//!
//! Invariants:
//! 1. A message is sent when the switch has given its verdict; until then its outcome is unknown, and is reported as that (D21).
//! 2. Nothing is read twice, and room is given back in the order of the records, whatever the order in which loans return.
//! 3. While the line is polled it is readable whenever a record waits: it is emptied only when the ring is, and the switch is
//!    asked for a wake-up where one may have been eaten.
//! 4. Descriptors go ahead of a record only once nothing can keep the record from following.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
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
const INLINE_BYTES: u64 = 64 << 10;
/// The largest message (D14).
pub const MESSAGE_BYTES: usize = 16 << 20;
/// Bytes of the body of a gap.
const GAP_BYTES: u32 = 28;
/// Accepted, as the verdict on a record.
pub const ACCEPTED: i32 = 1;
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
fn is_closed(line: BorrowedFd<'_>) -> bool {
    poll(line, 0, Some(Duration::ZERO)) & (libc::POLLHUP | libc::POLLERR) != 0
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

impl Outgoing<'_> {
    /// Its header with the lengths of the addresses, which were checked to fit.
    fn whole_header(&self) -> TxHeader {
        TxHeader {
            src_len: self.src.len() as u16,
            dst_len: self.dst.len() as u16,
            ..self.header
        }
    }

    /// Bytes of its record.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let inline: usize = self.body.iter().map(|part| part.len()).sum();
        self.whole_header().body_at() + inline as u64
    }
}

/// The writing half.
pub struct Tx {
    ring: Producer<Arc<Segment>>,
    spin: Spin,
}

impl Tx {
    /// Takes the writing half of a new ring.
    #[must_use]
    pub fn new(segment: Arc<Segment>) -> Self {
        Self {
            ring: Producer::new(segment),
            spin: Spin::default(),
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
    /// [`Violation`] when the agent broke a rule, or the message does not fit.
    pub fn put(&mut self, message: &Outgoing<'_>) -> Result<(u64, u64), Violation> {
        let len = message.bytes();
        let header = TxHeader {
            len: len as u32,
            ..message.whole_header()
        };
        let pos = self.ring.reserve(len)?;
        let pos = pos.ok_or(Violation("a message was put where it does not fit"))?;
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

    /// Shows all that was put to the switch. `false`: the agent is gone, it is not shown and no longer there.
    ///
    /// Asked only while the switch sleeps, which costs a system call anyway. An agent that died at work leaves the outcome
    /// unknown, even of what was put later.
    pub fn publish(&mut self, line: BorrowedFd<'_>) -> bool {
        let sleeps = self.ring.memory().reader_sleeps().load(Ordering::Relaxed) != 0;
        if sleeps && is_closed(line) {
            self.ring.abandon();
            return false;
        }
        self.ring.publish();
        if self.ring.must_wake() {
            // A full line has woken the switch already; a closed one is noticed by whoever waits for the verdict.
            let _ = line::send(line, &[line::KICK], &[]);
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

    /// The verdict on the record at a position: [`ACCEPTED`] or a negative errno. Only once it is settled, and before anything
    /// new is put.
    ///
    /// # Errors
    /// [`Violation`] when there is none.
    pub fn verdict(&self, pos: u64) -> Result<i32, Violation> {
        let word = self.ring.memory().word_at(pos + TX_STATUS);
        match word.load(Ordering::Relaxed) as i32 {
            verdict @ (ACCEPTED | -4095..=-1) => Ok(verdict),
            _ => Err(Violation("a record was released without a verdict")),
        }
    }

    /// Waits a while until everything before `end` has its verdict.
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn wait_settled(
        &mut self,
        end: u64,
        line: BorrowedFd<'_>,
        limit: Duration,
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
        futex_wait(memory.signal(), seen, limit.min(SLICE));
        if self.settled(end)? {
            return Ok(Waited::Ready);
        }
        let gone = is_closed(line);
        Ok(match (gone, self.settled(end)?) {
            (_, true) => Waited::Ready,
            (true, false) => Waited::Gone,
            (false, false) => Waited::NotYet,
        })
    }

    /// Where this is to be waited for with [`wait_room`], without having the ring.
    #[must_use]
    pub fn memory(&self) -> &Arc<Segment> {
        self.ring.memory()
    }

    /// Takes POLLOUT away until the switch says that there is room (unless it has, since `seen`).
    pub fn block_line(&self, seen: u32, line: BorrowedFd<'_>) {
        if self.room() == seen
            && poll(line, libc::POLLOUT, Some(Duration::ZERO)) & libc::POLLOUT != 0
        {
            // When even this does not fit, POLLOUT is away already.
            let _ = line::send(line, &[line::BLOCK; PADDING], &[]);
        }
    }
}

/// Waits a while until there is room where there was none when [`Tx::room`] was `seen`.
#[must_use]
pub fn wait_room(memory: &Segment, seen: u32, line: BorrowedFd<'_>, limit: Duration) -> Waited {
    let is_there = || memory.room().load(Ordering::Acquire) != seen;
    let signal = memory.signal().load(Ordering::Acquire);
    if is_there() {
        return Waited::Ready;
    }
    futex_wait(memory.signal(), signal, limit.min(SLICE));
    if is_there() {
        Waited::Ready
    } else if is_closed(line) {
        Waited::Gone
    } else {
        Waited::NotYet
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
    pub fn new(segment: Arc<Segment>) -> Self {
        Self {
            ring: Consumer::new(segment),
            spin: Spin::default(),
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
    pub fn give_back(&mut self, end: u64, line: BorrowedFd<'_>) {
        if let Some(entry) = self.out.iter_mut().find(|(at, _)| *at == end) {
            entry.1 = true;
        }
        self.settle(line);
    }

    /// Gives room back to the agent, as far as no loan is in the way.
    pub fn settle(&mut self, line: BorrowedFd<'_>) {
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
                let _ = line::send(line, &[line::KICK], &[]);
            }
        }
    }

    /// Takes all packets from the line and keeps the descriptors.
    fn drain(&mut self, line: BorrowedFd<'_>) {
        while let Some(packet) = line::receive(line) {
            if packet.kind == line::FDS {
                self.fds.push_back((packet.fds, packet.lost));
            }
        }
        if poll(line, 0, Some(Duration::ZERO)) & libc::POLLHUP != 0 {
            self.hung_up = true;
        }
    }

    /// The descriptors of the next record that has some, and whether some were lost.
    ///
    /// # Errors
    /// [`Violation`] when none came.
    pub fn fds(&mut self, line: BorrowedFd<'_>) -> Result<(Vec<OwnedFd>, bool), Violation> {
        if self.fds.is_empty() {
            self.drain(line);
            self.eaten = true;
        }
        self.fds.pop_front().ok_or(Violation(
            "a message announces descriptors that did not come",
        ))
    }

    /// Puts descriptors back whose record was not taken after all.
    pub fn fds_back(&mut self, fds: (Vec<OwnedFd>, bool)) {
        self.fds.push_front(fds);
    }

    /// Makes the line readable when a record waits, and lets the switch wake it for the next one: the end of each look at a polled endpoint.
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn arm(&mut self, line: BorrowedFd<'_>) -> Result<(), Violation> {
        if self.ring.refresh()? == 0 {
            self.drain(line);
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
        let _ = line::send(line, &[line::PING], &[]);
        Ok(())
    }

    /// Looks at the line although nobody waits, so that an agent that is gone is noticed.
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn look(&mut self, line: BorrowedFd<'_>) -> Result<(), Violation> {
        if self.ring.refresh()? == 0 {
            self.drain(line);
            self.eaten = true;
        }
        Ok(())
    }

    /// Waits until there is a record, the time is over (`NotYet`), or a signal came (`NotYet`).
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn wait(
        &mut self,
        line: BorrowedFd<'_>,
        deadline: Option<Instant>,
    ) -> Result<Waited, Violation> {
        let memory = self.ring.memory().clone();
        let (head, next) = (memory.head(), self.ring.position());
        if self.spin.until(|| head.load(Ordering::Acquire) != next) {
            return Ok(Waited::Ready);
        }
        if self.ring.sleep_begin()? && !self.hung_up {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let _ = poll(line, libc::POLLIN, left);
            self.drain(line);
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
    if usize::from(h.fds) > line::MAX_FDS || (in_memfd && h.fds == 0) {
        return Err(Violation("another number of descriptors than a message has"));
    }
    if h.body_len as usize > MESSAGE_BYTES {
        return Err(Violation("body larger than a message"));
    }
    if h.kind == GAP && (in_memfd || h.body_len != GAP_BYTES) {
        return Err(Violation("a gap that tells something else"));
    }
    Ok(())
}

/// Sends descriptors ahead of their record, waiting a while for room on the line.
///
/// # Errors
/// As sendmsg(2); EAGAIN when there was no room all the time.
pub fn send_fds(
    line: BorrowedFd<'_>,
    fds: &[std::os::fd::RawFd],
    limit: Duration,
) -> io::Result<()> {
    match line::send(line, &[line::FDS], fds) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock && !limit.is_zero() => {
            let _ = poll(line, libc::POLLOUT, Some(limit.min(SLICE)));
            line::send(line, &[line::FDS], fds)
        }
        result => result,
    }
}
