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

use crate::destinations::{Destinations, Route, Taken};
use crate::frame::{
    ADDRESS_BYTES, BODY_IN_MEMFD, GAP, LANE, LANE_BODY, LANE_CLOSE, LANE_OPEN, LANE_OPEN_BYTES,
    MESSAGE, RX_HEADER, RxHeader, TX_HEADER, TX_STATUS, TxHeader,
};
use crate::inlet::Inlet;
use crate::lane_in::{Opening, Writer};
use crate::lane_out::{ASLEEP, LaneOut, LaneRoom, Lending, Lent, POLLED};
use crate::lanes_in::LanesIn;
use crate::line;
use crate::memory::{HEADER_BYTES, Segment, futex_wait};
use crate::ring::{Memory, Producer, Violation, padded};
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
/// Records taken from one ring before the next has its turn: senders are heard in turns, as they come.
const TURN: u32 = 1;
/// Bytes of the ring of a lane: as many as its sender has for what it sends by the switch, within these.
const LANE_BYTES: (u64, u64) = (HEADER_BYTES as u64, 1 << 20);
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
#[must_use]
pub fn is_closed(line: &OwnedFd) -> bool {
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
    destinations: Destinations,
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
            destinations: Destinations::default(),
        }
    }

    // ---- lanes ---------------------------------------------------------------------------------------------------

    /// Sends messages on the lane to a destination, if there is one, as many as go without waiting. Returns how many are
    /// accepted, and what became of the next.
    pub fn send_on_lane(
        &mut self,
        route: Route<'_>,
        serial: u64,
        messages: &[&[&[u8]]],
    ) -> (usize, Taken) {
        let own = (self.ring.memory(), &*self.line);
        self.destinations.send(route, own, serial, messages)
    }

    /// Sends the first bytes of a block that was lent, if the lane to this destination has lent it.
    pub fn send_lent(
        &mut self,
        route: Route<'_>,
        serial: u64,
        (lent, len): (&mut Lent, u64),
    ) -> Taken {
        let own = (self.ring.memory(), &*self.line);
        (self.destinations).send_lent(route, own, serial, (lent, len))
    }

    /// Lends a block of the arena of a lane.
    pub fn lend(&mut self, route: Route<'_>, bytes: u64) -> Lending {
        self.destinations.lend(route, bytes)
    }

    /// Lends a block of the arena of a lane, if there is one now. Else nothing is different afterwards.
    pub fn lend_now(&mut self, route: Route<'_>, bytes: u64) -> Lending {
        match self.destinations.lane(route) {
            Some(lane) if !lane.is_closed() => lane.lend(bytes).unwrap_or(Lending::No),
            _ => Lending::No,
        }
    }

    /// A lane was refused as too much memory of this sender is in use.
    pub fn ask_for_smaller_lane(&mut self, route: Route<'_>) {
        self.destinations.shrink(route);
    }

    /// What a lane is written into.
    #[cfg(test)]
    pub(crate) fn lane_data(&mut self, route: Route<'_>) -> Option<Arc<Segment>> {
        self.destinations.lane(route).map(|lane| lane.data())
    }

    /// Looks for room on a lane for as long as that pays; what is to be waited for else.
    pub fn spin_on_lane(&mut self, route: Route<'_>, bytes: u64) -> Option<LaneRoom> {
        let lane = self.destinations.lane(route)?;
        if lane.spin(bytes) {
            return None;
        }
        Some(lane.room(bytes, self.line.clone()))
    }

    /// Messages that could have gone on a lane were accepted by the switch; the largest has so many bytes.
    pub fn went_by_switch(&mut self, route: Route<'_>, count: usize, bytes: u64) {
        self.destinations.went_by_switch(route, count, bytes);
    }

    /// Whether a lane to a destination is to be asked for now.
    pub fn must_ask_for_lane(&mut self, route: Route<'_>) -> bool {
        self.destinations.must_ask(route)
    }

    /// Asks the switch for a lane, of which this end makes the data. `None` when it cannot be asked now.
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn ask_for_lane(&mut self, route: Route<'_>) -> Result<Option<Question>, Violation> {
        let (kind, src, dst) = route;
        let bytes = self.ring.memory().size().clamp(LANE_BYTES.0, LANE_BYTES.1);
        let mut body = [0u8; LANE_BODY as usize];
        body[..8].copy_from_slice(&bytes.to_le_bytes());
        body[8] = kind;
        let question = Outgoing {
            header: TxHeader {
                kind: LANE,
                fds: 2,
                body_len: LANE_BODY,
                ..TxHeader::default()
            },
            src,
            dst,
            body: &[&body],
        };
        if !self.fits(record_bytes(&question)) {
            return Ok(None);
        }
        // For want of memory or descriptors there is no lane.
        let arena = self.destinations.arena(route) as usize;
        let made = Segment::create_shown(bytes as usize, arena);
        let (Ok((ours, theirs)), Ok((data, shown))) = (line::pair(), made) else {
            return Ok(None);
        };
        let fds = [theirs.as_raw_fd(), shown.as_raw_fd()];
        if line::send(self.line.as_fd(), &[line::FDS], &fds).is_err() {
            return Ok(None);
        }
        let (pos, end) = self.put(&question)?;
        // An agent that is gone is told of by the message that follows.
        Ok(self.publish().then_some(Question {
            pos,
            end,
            answer: ours,
            data,
        }))
    }

    /// The switch says that there are no lanes on this bus.
    pub fn ask_no_more_for_lanes(&mut self) {
        self.destinations.give_up();
    }

    /// Takes the lane that the switch has granted.
    pub fn take_lane(&mut self, route: Route<'_>, question: Question) {
        let (mut number, mut fds) = (0, Vec::new());
        while let Some(packet) = line::receive(question.answer.as_fd()) {
            if packet.lost {
                return;
            }
            number = packet.number;
            fds.extend(packet.fds);
        }
        // What cannot be mapped is not used, and the next message by the switch closes it.
        if let Ok(lane) = LaneOut::attach(number, question.data, fds) {
            self.destinations.open(route, lane);
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

/// A wish for a lane.
pub struct Question {
    /// Where its verdict will be.
    pub pos: u64,
    /// Where its record ends.
    pub end: u64,
    /// Whence the lane comes, if the verdict is good.
    answer: OwnedFd,
    /// What will lie in it.
    data: Arc<Segment>,
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

/// A record that was received, in the RX ring or in a lane.
#[derive(Debug, Clone, Copy)]
pub struct Incoming {
    /// The number of the lane; 0 for the RX ring.
    pub lane: u64,
    /// Where it begins.
    pub pos: u64,
    /// Where its body begins.
    pub body: u64,
    /// That place is in the arena of the lane.
    pub in_arena: bool,
    /// Its header, a private copy that was checked.
    pub header: RxHeader,
}

/// The reading half: the RX ring, and the lanes that end here.
pub struct Rx {
    main: Inlet<Arc<Segment>>,
    lanes: LanesIn,
    /// Whose turn it is: 0 the RX ring, n the n-th sender that has lanes.
    at: usize,
    /// How many records it has had in this turn.
    had: u32,
    spin: Spin,
    line: Arc<OwnedFd>,
    fds: VecDeque<(Vec<OwnedFd>, bool)>,
    hung_up: bool,
    /// A wake-up may have been taken from the line although the ring was not empty.
    eaten: bool,
}

impl Rx {
    /// Takes the reading half of a new ring.
    #[must_use]
    pub fn new(segment: Arc<Segment>, line: Arc<OwnedFd>) -> Self {
        Self {
            main: Inlet::new(segment),
            lanes: LanesIn::default(),
            at: 0,
            had: 0,
            spin: Spin::default(),
            line,
            fds: VecDeque::new(),
            hung_up: false,
            // Whatever came before the line was polled: nobody has looked whether it is readable.
            eaten: true,
        }
    }

    /// The memory in which a record lies that [`Self::peek`] returned last.
    #[must_use]
    pub fn memory(&self, record: &Incoming) -> &Arc<Segment> {
        let lane = if record.lane == 0 {
            None
        } else {
            self.lanes.data(record.lane)
        };
        lane.unwrap_or_else(|| self.main.ring.memory())
    }

    /// Who has written a record that came by a lane.
    #[must_use]
    pub fn writer(&self, record: &Incoming) -> Option<&Writer> {
        if record.lane == 0 {
            return None;
        }
        self.lanes.lane(record.lane).map(|lane| &lane.writer)
    }

    /// The next record, or `None` when there is none. Does not take it.
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn peek(&mut self) -> Result<Option<Incoming>, Violation> {
        loop {
            let known = (self.lanes.senders(), self.main.ring.position());
            for _ in 0..=self.lanes.senders() {
                let found = match self.at {
                    0 => self.peek_main()?,
                    n => self.peek_lanes(n - 1),
                };
                if found.is_some() {
                    return Ok(found);
                }
                self.pass_on();
            }
            // A lane that began or ended just now changes what can be read.
            if known == (self.lanes.senders(), self.main.ring.position()) {
                if self.lanes.is_undecided() && !self.hung_up && is_closed(&self.line) {
                    // It died while it closed a lane, and never says how far that counts.
                    self.drain();
                    self.eaten = true;
                    continue;
                }
                return Ok(None);
            }
        }
    }

    /// Gives the turn to the next.
    fn pass_on(&mut self) {
        self.had = 0;
        self.at = if self.at < self.lanes.senders() {
            self.at + 1
        } else {
            0
        };
    }

    fn peek_main(&mut self) -> Result<Option<Incoming>, Violation> {
        loop {
            let Some((pos, len)) = self.main.ring.peek(RX_HEADER as u32)? else {
                return Ok(None);
            };
            let mut raw = [0u8; RX_HEADER as usize];
            self.main.ring.memory().copy_out(pos, &mut raw);
            let header = RxHeader::decode(&raw, len)?;
            check(&header)?;
            let record = Incoming {
                lane: 0,
                pos,
                body: pos + header.body_at(),
                in_arena: false,
                header,
            };
            match header.kind {
                LANE_OPEN => self.open_lane(&record)?,
                LANE_CLOSE if !self.close_lane(&record) => return Ok(None),
                LANE_CLOSE => {}
                _ => return Ok(Some(record)),
            }
            self.main.take(len, false);
        }
    }

    fn peek_lanes(&mut self, sender: usize) -> Option<Incoming> {
        loop {
            match self.lanes.peek(sender) {
                Ok(found) => return found,
                Err(spoilt) => {
                    line::call(self.line.as_fd(), line::LANE_SPOILT, spoilt);
                }
            }
        }
    }

    fn u64_at(&self, pos: u64) -> u64 {
        let mut bytes = [0u8; 8];
        self.main.ring.memory().copy_out(pos, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn section(&self, pos: u64, len: u16) -> Box<[u8]> {
        let mut bytes = vec![0u8; len.into()];
        self.main.ring.memory().copy_out(pos, &mut bytes);
        bytes.into()
    }

    /// A lane begins. One that cannot be read, for want of descriptors or memory, is refused.
    fn open_lane(&mut self, record: &Incoming) -> Result<(), Violation> {
        let h = &record.header;
        let word = |n: u64| self.u64_at(record.body + 8 * n);
        let opening = Opening {
            number: word(0),
            origin: word(1),
            bytes: word(2),
            reader: word(3),
        };
        let (fds, _) = self.fds()?;
        let writer = Writer {
            header: RxHeader {
                fds: 0,
                ctl_len: 0,
                ..*h
            },
            src: self.section(record.pos + RX_HEADER, h.src_len),
            dst: self.section(record.pos + h.dst_at(), h.dst_len),
            ident: self.section(record.pos + h.ident_at(), h.ident_len),
        };
        if !(self.lanes).admit(&self.line, &opening, fds, writer, self.hung_up) {
            line::call(self.line.as_fd(), line::LANE_SPOILT, opening.number);
        }
        Ok(())
    }

    /// A lane ended. Returns whether all was read that was in it, and it is gone.
    fn close_lane(&mut self, record: &Incoming) -> bool {
        let (number, end) = (self.u64_at(record.body), self.u64_at(record.body + 8));
        let is_gone = self.lanes.close(number, end);
        if self.at > self.lanes.senders() {
            self.at = 0;
        }
        is_gone
    }

    /// Takes the record that [`Self::peek`] returned. Its room is given back by [`Self::settle`], for a loan after [`Self::give_back`].
    /// Returns where it ends, which with the lane names a loan.
    pub fn take(&mut self, record: &Incoming, on_loan: bool) -> u64 {
        let end = if record.lane == 0 {
            self.main.take(record.header.len, on_loan);
            self.main.ring.position()
        } else if let Some(lane) = self.lanes.lane_mut(record.lane) {
            lane.take(record.header.len, on_loan);
            lane.inlet.ring.position()
        } else {
            return 0;
        };
        self.had += 1;
        if self.had >= TURN {
            self.pass_on();
        }
        end
    }

    /// Takes the record that [`Self::peek`] returned, without giving the turn to another; [`Self::end_run`] follows.
    pub fn take_of_run(&mut self, record: &Incoming) {
        let turn = self.at;
        self.take(record, false);
        self.at = turn;
    }

    /// It is the turn of another.
    pub fn end_run(&mut self) {
        self.pass_on();
    }

    /// Whether two records came from one source, as far as that is seen at once; the room of the first was not given back.
    #[must_use]
    pub fn is_same_source(&self, one: &Incoming, other: &Incoming) -> bool {
        if one.lane > 0 || other.lane > 0 {
            return one.lane == other.lane;
        }
        let source = |record: &Incoming| {
            let h = &record.header;
            let mut src = [0u8; ADDRESS_BYTES];
            let memory = self.main.ring.memory();
            memory.copy_out(record.pos + RX_HEADER, &mut src[..h.src_len.into()]);
            (h.kind, h.src_len, src)
        };
        one.header.kind == MESSAGE && source(one) == source(other)
    }

    /// A loan has come back.
    pub fn give_back(&mut self, lane: u64, end: u64) {
        if lane == 0 {
            self.main.give_back(end);
        } else if let Some(lane) = self.lanes.lane_mut(lane) {
            lane.inlet.give_back(end);
        }
        self.settle();
    }

    /// Gives room back to those who write, as far as no loan is in the way.
    pub fn settle(&mut self) {
        if self.main.settle() && self.main.ring.must_wake() {
            // A closed line is noticed by whoever waits next; a full one has woken the switch already.
            let _ = line::send(self.line.as_fd(), &[line::KICK], &[]);
        }
        self.lanes.settle();
    }

    /// Takes all packets from the line and keeps the descriptors.
    fn drain(&mut self) {
        while let Some(packet) = line::receive(self.line.as_fd()) {
            if packet.kind == line::FDS {
                self.fds.push_back((packet.fds, packet.lost));
            }
        }
        if !self.hung_up && is_closed(&self.line) {
            self.hung_up = true;
            self.lanes.leave();
        }
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
        if self.peek()?.is_none() {
            self.drain();
            self.eaten = false;
            let is_main_idle = self.main.ring.sleep_begin()?;
            if self.lanes.sleep_begin(POLLED) && is_main_idle {
                return Ok(());
            }
            // Something came in between. If our flag is still up, nobody has seen it, and nobody will send a wake-up for it.
            let unseen = self.main.ring.sleep_end();
            self.lanes.sleep_end();
            if !unseen && self.lanes.is_empty() {
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
        if self.peek()?.is_none() {
            self.drain();
            self.eaten = true;
        }
        Ok(())
    }

    /// Looks for a record for as long as that pays. Returns whether there is one.
    pub fn spin(&mut self) -> bool {
        let Self {
            main, lanes, spin, ..
        } = self;
        let (head, next) = (main.ring.memory().head(), main.ring.position());
        let ready = || head.load(Ordering::Acquire) != next || lanes.glance();
        if lanes.is_empty() {
            spin.until(ready)
        } else {
            spin.until_peer(ready)
        }
    }

    /// Looks a moment for a record on a lane, if they came quickly of late.
    #[must_use]
    pub fn glance(&mut self) -> bool {
        let Self { lanes, spin, .. } = self;
        !lanes.is_empty() && spin.glance(|| lanes.glance())
    }

    /// Sleeps until there is a record, the time is over (`NotYet`), or a signal came (`NotYet`).
    ///
    /// # Errors
    /// [`Violation`] when the agent broke a rule.
    pub fn sleep(&mut self, deadline: Option<Instant>) -> Result<Waited, Violation> {
        let is_main_idle = self.main.ring.sleep_begin()?;
        if self.lanes.sleep_begin(ASLEEP) && is_main_idle && !self.hung_up {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let on_line = self.lanes.sleep(left).unwrap_or_else(|| {
                let _ = poll(self.line.as_fd(), libc::POLLIN, left);
                true
            });
            if on_line {
                self.drain();
                self.eaten = true;
            }
        }
        self.main.ring.sleep_end();
        self.lanes.sleep_end();
        Ok(if self.main.ring.refresh()? > 0 || self.lanes.glance() {
            Waited::Ready
        } else if self.hung_up {
            Waited::Gone
        } else {
            Waited::NotYet
        })
    }

    /// Whether a poll finds the line readable.
    #[cfg(test)]
    pub(crate) fn is_readable(&self) -> bool {
        poll(self.line.as_fd(), libc::POLLIN, Some(Duration::ZERO)) & libc::POLLIN != 0
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
    if !(MESSAGE..=LANE_CLOSE).contains(&h.kind) {
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
    if h.kind == LANE_OPEN && (h.body_len != LANE_OPEN_BYTES || h.fds == 0 || h.src_len == 0)
        || h.kind == LANE_CLOSE && h.body_len != 16
    {
        return Err(Violation("a lane that is told otherwise"));
    }
    if h.kind == GAP && (in_memfd || h.body_len != GAP_BYTES) {
        return Err(Violation("a gap that tells something else"));
    }
    Ok(())
}
