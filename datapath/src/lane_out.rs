//! The sending end of a lane (docs/internals-lanes.md).
//!
//! Invariants:
//! 1. What was published counts only if the gate was open behind a full fence, or was closed behind it: else it is taken back,
//!    and goes by the switch.
//! 2. There is no system call while the readers are awake, and one full fence for all that is published together.
//! 3. A place in the ring is used again when all readers have released it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::client;
use crate::gate::Passage;
use crate::line;
use crate::memory::{Segment, futex_wait};
use crate::page::{Board, Cursor, MAX_READERS};
use crate::ring::{Memory, Violation, padded};
use crate::sync::{Ordering, fence};
use crate::tails::Tails;
use crate::wait::{self, Spin};
use crate::waker;

/// Bytes of the header of a record in a lane.
pub const LANE_HEADER: u64 = 24;
/// How a reader sleeps: in a call, on its bell.
pub const ASLEEP: u32 = 1;
/// Or in a poll of its line, perhaps, where only the agent can wake it.
pub const POLLED: u32 = 2;
/// Messages between two looks at whether the agent still lives: who reads may have died with it.
const LOOK_EVERY: u32 = 64;
/// How long to wait for a closer that is about to say how far it was.
const CLOSER_LIMIT: Duration = Duration::from_secs(1);
/// How long the line may stay open when a reader has left because the agent is gone, which closes all lines.
const LINE_LIMIT: Duration = Duration::from_millis(100);

/// One reader, as the sender has it.
struct Reader {
    cursor: Cursor,
    bell: OwnedFd,
}

/// One lane, as its sender has it.
pub struct LaneOut {
    number: u64,
    data: Arc<Segment>,
    board: Arc<Board>,
    readers: Arc<[Reader]>,
    tails: Tails,
    /// Bytes of the ring that may be used, and where the next record will begin.
    size: u64,
    head: u64,
    published: u64,
    /// How long to wait for room; `None`: for as long as whoever sends wants.
    patience: Option<Duration>,
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
    /// All of it counts, but the lane is not to be used any more.
    Last,
    /// The lane is closed. What ends at or before this position counts; nobody says who reads the rest.
    Unknown(u64),
}

impl LaneOut {
    /// Takes the sending end of a lane that is new: its data, and what the agent has made for it.
    ///
    /// # Errors
    /// `InvalidData` when something is missing, else as [`Board::attach`], [`Cursor::attach`].
    pub fn attach(number: u64, data: Arc<Segment>, fds: Vec<OwnedFd>) -> std::io::Result<Self> {
        let bad = || std::io::Error::from(std::io::ErrorKind::InvalidData);
        let mut fds = fds.into_iter();
        let board = Board::attach(fds.next().ok_or_else(bad)?.as_fd())?;
        let mut readers = Vec::new();
        while let Some(cursor) = fds.next() {
            readers.push(Reader {
                cursor: Cursor::attach(cursor.as_fd())?,
                bell: fds.next().ok_or_else(bad)?,
            });
        }
        if readers.is_empty() || readers.len() > MAX_READERS {
            return Err(bad());
        }
        let patience = board.patience().load(Ordering::Relaxed);
        Ok(Self {
            number,
            tails: Tails::new(readers.len()),
            size: data.size().min(board.capacity().load(Ordering::Relaxed)),
            data,
            board: Arc::new(board),
            readers: readers.into(),
            head: 0,
            published: 0,
            patience: (patience < u64::MAX).then(|| Duration::from_millis(patience)),
            spin: Spin::default(),
            count: 0,
            unlooked: 0,
        })
    }

    /// What it is written into.
    #[cfg(test)]
    pub(crate) fn data(&self) -> Arc<Segment> {
        self.data.clone()
    }

    /// Messages that went through it.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether a body of so many bytes may go here: so that even a small lane takes several.
    #[must_use]
    pub fn takes(&self, body: u64) -> bool {
        LANE_HEADER + body <= self.size / 2
    }

    /// Whether a sender waits for room here at all.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        self.patience.is_none_or(|limit| !limit.is_zero())
    }

    fn reserve(&mut self, len: u64) -> Result<Option<u64>, Violation> {
        let end = self.head + padded(len);
        if end - self.tails.least() > self.size {
            let tails = self.readers.iter().map(|reader| reader.cursor.tail());
            if end - self.tails.refresh(tails, self.published)? > self.size {
                return Ok(None);
            }
        }
        Ok(Some(std::mem::replace(&mut self.head, end)))
    }

    /// Copies a message into the lane, invisible until [`Self::publish`]; returns where it ends, or `None` for want of room.
    ///
    /// # Errors
    /// [`Violation`] when a reader broke a rule.
    pub fn put(
        &mut self,
        seq: u64,
        serial: u64,
        parts: &[&[u8]],
        bytes: u64,
    ) -> Result<Option<u64>, Violation> {
        let len = LANE_HEADER + bytes;
        let Some(pos) = self.reserve(len)? else {
            return Ok(None);
        };
        let mut header = [0u8; LANE_HEADER as usize];
        header[0..4].copy_from_slice(&(len as u32).to_le_bytes());
        header[8..16].copy_from_slice(&seq.to_le_bytes());
        header[16..24].copy_from_slice(&serial.to_le_bytes());
        self.data.copy_in(pos, &header);
        let mut at = pos + LANE_HEADER;
        for part in parts {
            self.data.copy_in(at, part);
            at += part.len() as u64;
        }
        self.count += 1;
        Ok(Some(pos + padded(len)))
    }

    /// Shows what was put to the readers, wakes those that sleep, and finds out whether it counts.
    pub fn publish(&mut self, line: &OwnedFd) -> Published {
        self.published = self.head;
        self.data.count().store(self.count, Ordering::Relaxed);
        self.data.head().store(self.head, Ordering::Release);
        // Behind this fence all is looked at: whether readers sleep, and whether somebody has closed the lane.
        fence(Ordering::SeqCst);
        for (index, reader) in self.readers.iter().enumerate() {
            let sleeps = reader.cursor.reader_sleeps();
            if sleeps.load(Ordering::Relaxed) == 0 {
                continue;
            }
            match sleeps.swap(0, Ordering::AcqRel) {
                0 => {}
                ASLEEP => {
                    let rung = reader.cursor.rung();
                    rung.store(wait::clock() as u32, Ordering::Relaxed);
                    waker::ring(&reader.bell);
                }
                _ => {
                    // An agent that is gone is found out by the reader as well, which closes the lane then.
                    let reader = line::reader_of(self.number, index);
                    let _ = line::call(line.as_fd(), line::LANE_WAKE, reader);
                }
            }
        }
        match self.look() {
            (Passage::Open, Passage::Open) => Published::All,
            _ => self.find_end(line),
        }
    }

    /// The gate of the agent, and those of the readers together: the first that closes.
    fn look(&self) -> (Passage, Passage) {
        let mut readers = Passage::Open;
        for reader in &*self.readers {
            readers = match (reader.cursor.gate().look(), readers) {
                (Passage::Open, found) => found,
                (_, Passage::Closing) | (Passage::Closing, _) => Passage::Closing,
                (Passage::Closed(end), Passage::Closed(least)) => Passage::Closed(end.min(least)),
                (found, Passage::Open) => found,
            };
        }
        (self.board.gate().look(), readers)
    }

    /// Somebody has closed the lane, is closing it right now, or died while it did.
    #[cold]
    fn find_end(&self, line: &OwnedFd) -> Published {
        let limit = Instant::now() + CLOSER_LIMIT;
        loop {
            match self.look() {
                (Passage::Closed(end), _) => return Published::Until(end),
                (Passage::Open, Passage::Closed(end)) => return self.judge(end, line),
                _ if Instant::now() > limit => return Published::Unknown(0),
                _ => std::thread::yield_now(),
            }
        }
    }

    /// A reader has left at this position, which it does when the agent is gone.
    fn judge(&self, end: u64, line: &OwnedFd) -> Published {
        if self.readers.len() == 1 {
            return Published::Until(end);
        }
        let gone = client::poll(line.as_fd(), 0, Some(LINE_LIMIT));
        match self.look() {
            // The agent has closed it meanwhile.
            (Passage::Closed(end), _) => Published::Until(end),
            // Others may still read what this one does not.
            _ if gone & (libc::POLLHUP | libc::POLLERR) != 0 => Published::Unknown(end),
            // It has made that up, to its own loss. Nobody else must suffer.
            _ => Published::Last,
        }
    }

    /// Whether it is worth a look whether the agent still lives.
    pub fn is_look_due(&mut self) -> bool {
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
        self.look() != (Passage::Open, Passage::Open)
    }

    /// Up to where the readers have to get before half of the lane is free, or a record that is longer fits in.
    fn wanted(&self, bytes: u64) -> u64 {
        let free = padded(LANE_HEADER + bytes).max(self.size / 2);
        (self.head + free).saturating_sub(self.size)
    }

    /// Looks for room for as long as that pays. Returns whether there is some, or the lane is closed.
    pub fn spin(&mut self, bytes: u64) -> bool {
        let wanted = self.wanted(bytes);
        let Self {
            readers,
            board,
            spin,
            ..
        } = self;
        spin.until_peer(|| is_there(readers, board, wanted))
    }

    /// The wait for room that [`Self::spin`] did not find. It does not need this end.
    #[must_use]
    pub fn room(&self, bytes: u64, line: Arc<OwnedFd>) -> LaneRoom {
        LaneRoom {
            readers: self.readers.clone(),
            board: self.board.clone(),
            wanted: self.wanted(bytes),
            until: self.patience.map(|limit| Instant::now() + limit),
            line,
        }
    }
}

/// Whether all readers are past a position, or the lane is closed.
fn is_there(readers: &[Reader], board: &Board, wanted: u64) -> bool {
    board.gate().look() != Passage::Open
        || readers.iter().all(|reader| {
            reader.cursor.tail().load(Ordering::Acquire) >= wanted
                || reader.cursor.gate().look() != Passage::Open
        })
}

/// The wait for room in a lane.
pub struct LaneRoom {
    readers: Arc<[Reader]>,
    board: Arc<Board>,
    wanted: u64,
    /// When the switch is to decide instead.
    until: Option<Instant>,
    line: Arc<OwnedFd>,
}

/// How a wait for room in a lane ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoomWait {
    /// There may be room now.
    Ready,
    /// Not yet: look whether signals or the time say to stop.
    NotYet,
    /// Its readers keep a sender waiting no longer: the switch decides.
    Over,
    /// The agent is gone.
    Gone,
}

impl LaneRoom {
    /// Sleeps until half of the lane is free, it is closed, or some time is over.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> RoomWait {
        let left = self
            .until
            .map(|at| at.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return RoomWait::Over;
        }
        let limit = limit
            .min(left.unwrap_or(limit))
            .min(Duration::from_millis(100));
        // One after the other: the slowest is waited for last.
        let slow = |reader: &&Reader| {
            reader.cursor.tail().load(Ordering::Acquire) < self.wanted
                && reader.cursor.gate().look() == Passage::Open
        };
        if let Some(Reader { cursor, .. }) = self.readers.iter().find(slow) {
            let signal = cursor.writer_signal().load(Ordering::Acquire);
            cursor.wanted().store(self.wanted, Ordering::Relaxed);
            cursor.writer_waits().store(1, Ordering::Release);
            fence(Ordering::SeqCst);
            let is_past = cursor.tail().load(Ordering::Acquire) >= self.wanted
                || cursor.gate().look() != Passage::Open
                || self.board.gate().look() != Passage::Open;
            if !is_past {
                futex_wait(cursor.writer_signal(), signal, limit);
            }
        }
        if is_there(&self.readers, &self.board, self.wanted) {
            return RoomWait::Ready;
        }
        if client::is_closed(&self.line) {
            RoomWait::Gone
        } else {
            RoomWait::NotYet
        }
    }
}
