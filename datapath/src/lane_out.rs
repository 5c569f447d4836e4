//! The sending end of a lane (docs/internals-lanes.md).
//!
//! Invariants:
//! 1. What was published counts only if the gate was open behind a full fence, or was closed behind it: else it is taken back,
//!    and goes by the switch.
//! 2. There is no system call while the readers are awake, and one full fence for all that is published together.
//! 3. A place in the ring, and a block of the arena, is used again when all readers have released the record.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::arena::{Arena, Block, Shelf};
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
/// Mark of a record whose body lies in the arena: where and how long, two u64, stands in its place.
pub const IN_ARENA: u32 = 1;
/// Bytes of such a record.
pub const PLACED_BYTES: u64 = LANE_HEADER + 16;
/// Bodies from here on lie in the arena, where there is one: in blocks that are still in the cache when they are used again.
pub const ARENA_FROM: u64 = 4 << 10;
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
    arena: Arena,
    /// Blocks whose records are in the ring, and where these end.
    flying: VecDeque<(u64, Block)>,
    shelf: Arc<Shelf>,
}

/// What came of putting a message into a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It is there, and ends at this position.
    At(u64),
    /// There will be room for it.
    Full,
    /// It cannot go here.
    No,
}

/// A block of the arena of a lane that is being written. It goes back when it is dropped, unless it was sent.
pub struct Lent {
    data: Arc<Segment>,
    shelf: Arc<Shelf>,
    block: Option<Block>,
}

impl Lent {
    /// Where it begins.
    #[must_use]
    pub fn start(&self) -> *mut u8 {
        let at = (self.block).and_then(|block| self.data.arena_at(block.at, block.len));
        at.unwrap_or(std::ptr::NonNull::dangling().as_ptr())
    }

    /// Its readers release it.
    pub fn let_go(&mut self) {
        self.block = None;
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.shelf.put(block);
        }
    }
}

/// What came of asking for a block.
pub enum Lending {
    /// Here it is.
    Given(Lent),
    /// There will be one.
    Full,
    /// There is none of this size.
    No,
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
            arena: Arena::new(data.arena_bytes()),
            flying: VecDeque::new(),
            shelf: Arc::default(),
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
        LANE_HEADER + body <= self.size / 2 || self.arena.takes(body)
    }

    /// The largest body for which there may be a block.
    #[must_use]
    pub fn arena_bytes(&self) -> u64 {
        self.data.arena_bytes()
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

    /// Copies a message into the lane, invisible until [`Self::publish`].
    ///
    /// # Errors
    /// [`Violation`] when a reader broke a rule.
    pub fn put(
        &mut self,
        seq: u64,
        serial: u64,
        parts: &[&[u8]],
        bytes: u64,
    ) -> Result<Put, Violation> {
        if self.goes_by_arena(bytes) {
            match self.allocate(bytes)? {
                Some(block) => {
                    let mut at = block.at;
                    for part in parts {
                        self.data.copy_into_arena(at, part);
                        at += part.len() as u64;
                    }
                    let put = self.put_block(seq, serial, block)?;
                    if put == Put::Full {
                        self.arena.free(block);
                    }
                    return Ok(put);
                }
                None if !self.flying.is_empty() => return Ok(Put::Full),
                // All of it is lent.
                None => {}
            }
        }
        if LANE_HEADER + bytes > self.size / 2 {
            return Ok(Put::No);
        }
        let len = LANE_HEADER + bytes;
        let Some(pos) = self.reserve(len)? else {
            return Ok(Put::Full);
        };
        self.put_header(pos, len, 0, seq, serial);
        let mut at = pos + LANE_HEADER;
        for part in parts {
            self.data.copy_in(at, part);
            at += part.len() as u64;
        }
        self.count += 1;
        Ok(Put::At(pos + padded(len)))
    }

    fn put_header(&self, pos: u64, len: u64, mark: u32, seq: u64, serial: u64) {
        let first = len & u64::from(u32::MAX) | u64::from(mark) << 32;
        self.data.put_words(pos, [first, seq, serial]);
    }

    /// Puts the record of a body that is in the arena.
    fn put_block(&mut self, seq: u64, serial: u64, block: Block) -> Result<Put, Violation> {
        let Some(pos) = self.reserve(PLACED_BYTES)? else {
            return Ok(Put::Full);
        };
        self.put_header(pos, PLACED_BYTES, IN_ARENA, seq, serial);
        self.data
            .put_words(pos + LANE_HEADER, [block.at, block.len]);
        self.count += 1;
        let end = pos + padded(PLACED_BYTES);
        self.flying.push_back((end, block));
        Ok(Put::At(end))
    }

    /// Puts the record of the first bytes of a block that was lent here.
    ///
    /// # Errors
    /// [`Violation`] when a reader broke a rule.
    pub fn put_lent(
        &mut self,
        seq: u64,
        serial: u64,
        lent: &Lent,
        len: u64,
    ) -> Result<Put, Violation> {
        let Some(block) = lent.block.filter(|_| Arc::ptr_eq(&lent.data, &self.data)) else {
            return Ok(Put::No);
        };
        let whole = self.put_block(seq, serial, Block { len, ..block })?;
        if let (Put::At(_), Some(last)) = (whole, self.flying.back_mut()) {
            last.1 = block;
        }
        Ok(whole)
    }

    fn goes_by_arena(&self, bytes: u64) -> bool {
        bytes >= ARENA_FROM && self.arena.takes(bytes)
    }

    /// A block of the arena, if there is one now.
    fn allocate(&mut self, bytes: u64) -> Result<Option<Block>, Violation> {
        // What was released just now is still in the cache: so all of it is looked for each time.
        let tails = self.readers.iter().map(|reader| reader.cursor.tail());
        let least = self.tails.refresh(tails, self.published)?;
        while let Some((end, block)) = self.flying.front()
            && *end <= least
        {
            self.arena.free(*block);
            self.flying.pop_front();
        }
        for block in self.shelf.take() {
            self.arena.free(block);
        }
        Ok(self.arena.allocate(bytes))
    }

    /// Lends a block of the arena to be written.
    ///
    /// # Errors
    /// [`Violation`] when a reader broke a rule.
    pub fn lend(&mut self, bytes: u64) -> Result<Lending, Violation> {
        if !self.arena.takes(bytes) {
            return Ok(Lending::No);
        }
        Ok(match self.allocate(bytes)? {
            Some(block) => Lending::Given(Lent {
                data: self.data.clone(),
                shelf: self.shelf.clone(),
                block: Some(block),
            }),
            None if self.flying.is_empty() => Lending::No,
            None => Lending::Full,
        })
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
        let begin = Instant::now();
        loop {
            match self.look() {
                (Passage::Closed(end), _) => return Published::Until(end),
                (Passage::Open, Passage::Closed(end)) => return self.judge(end, line),
                // Who leaves does so because the agent is gone, and says at once how far it was.
                (Passage::Open, Passage::Closing)
                    if begin.elapsed() > LINE_LIMIT && !client::is_closed(line) =>
                {
                    return self.judge(0, line);
                }
                _ if begin.elapsed() > CLOSER_LIMIT => return Published::Unknown(0),
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

    /// Whether the agent has closed it, or is about to: those who may hear what went through it may not hear what comes now.
    #[must_use]
    pub fn is_taken_back(&self) -> bool {
        self.board.gate().look() != Passage::Open
    }

    /// Whether it is known to be closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.look() != (Passage::Open, Passage::Open)
    }

    /// Up to where the readers have to get before half of the lane is free, or a record that is longer fits in.
    fn wanted(&self, bytes: u64) -> u64 {
        // Half of the blocks, so that neither side waits for each single one.
        if self.goes_by_arena(bytes)
            && let Some((end, _)) = self.flying.get(self.flying.len() / 2)
        {
            return *end;
        }
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
