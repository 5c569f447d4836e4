//! The receiving end of a lane (docs/internals-lanes.md).
//!
//! Invariants:
//! 1. Who the sender is, was said by the agent when the lane began; nothing of it is read from the lane.
//! 2. Nothing behind the position at which the agent closed it is read, and nobody waits for what is not there.
//! 3. A lane that breaks a rule is read no more, and nothing else suffers.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::frame::{MESSAGE, RxHeader};
use crate::gate::Passage;
use crate::lane_out::LANE_HEADER;
use crate::memory::{Board, Segment, futex_wake};
use crate::ring::{Consumer, Memory, Violation, padded};
use crate::sync::{Ordering, fence};

/// A ring that is read, and what of it was taken but not given back.
pub struct Inlet {
    /// The reading half.
    pub ring: Consumer<Arc<Segment>>,
    /// Ends of records that were taken but not given back, and whether they may be.
    out: VecDeque<(u64, bool)>,
}

impl Inlet {
    /// Takes the reading half of a new ring.
    #[must_use]
    pub fn new(segment: Arc<Segment>) -> Self {
        Self {
            ring: Consumer::new(segment),
            out: VecDeque::new(),
        }
    }

    /// Takes the next record, of `len` bytes. Its room is given back by [`Self::settle`], for a loan after [`Self::give_back`].
    pub fn take(&mut self, len: u32, on_loan: bool) {
        self.ring.advance(len);
        if on_loan || !self.out.is_empty() {
            self.out.push_back((self.ring.position(), !on_loan));
        }
    }

    /// A loan has come back.
    pub fn give_back(&mut self, end: u64) {
        if let Some(entry) = self.out.iter_mut().find(|(at, _)| *at == end) {
            entry.1 = true;
        }
    }

    /// Gives room back to the writer, as far as no loan is in the way. Returns whether there was any.
    pub fn settle(&mut self) -> bool {
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
        if to == self.ring.released() {
            return false;
        }
        self.ring.release(to);
        true
    }
}

/// Who writes into a lane, as the agent says.
pub struct Writer {
    /// Credentials and lengths, as in the header of a message by the switch.
    pub header: RxHeader,
    /// Its address.
    pub src: Box<[u8]>,
    /// The address to which all of it goes.
    pub dst: Box<[u8]>,
    /// Principal and node, where they were asked for.
    pub ident: Box<[u8]>,
}

/// One lane, as its reader has it.
pub struct LaneIn {
    /// What the agent calls it.
    pub number: u64,
    /// The ring.
    pub inlet: Inlet,
    /// Who writes.
    pub writer: Writer,
    /// Rings when the writer has published while this end slept.
    pub bell: OwnedFd,
    board: Board,
    /// What lies before this position counts, whenever the lane is closed.
    safe: u64,
    end: Option<u64>,
    is_spoilt: bool,
}

impl LaneIn {
    /// Takes the reading end of a lane that is new.
    ///
    /// # Errors
    /// As [`Segment::attach`], [`Board::attach`].
    pub fn attach(
        number: u64,
        ring: &OwnedFd,
        board: &OwnedFd,
        bell: OwnedFd,
        writer: Writer,
    ) -> std::io::Result<Self> {
        Ok(Self {
            number,
            inlet: Inlet::new(Segment::attach(ring.as_fd())?),
            board: Board::attach(board.as_fd())?,
            writer,
            bell,
            safe: 0,
            end: None,
            is_spoilt: false,
        })
    }

    /// Where the next record lies, and its header; `None` when there is none.
    ///
    /// # Errors
    /// [`Violation`], once, when the writer broke a rule.
    pub fn peek(&mut self) -> Result<Option<(u64, RxHeader)>, Violation> {
        if self.is_spoilt || self.is_over() {
            return Ok(None);
        }
        let found = self.look();
        self.is_spoilt = found.is_err();
        found
    }

    fn look(&mut self) -> Result<Option<(u64, RxHeader)>, Violation> {
        let ring = &mut self.inlet.ring;
        let Some((pos, len)) = ring.peek(LANE_HEADER as u32)? else {
            return Ok(None);
        };
        let end = pos + padded(u64::from(len));
        if end > self.safe && self.end.is_none() {
            // What was published after the agent closed the lane comes by the switch. Behind this fence it is known to be closed then.
            fence(Ordering::SeqCst);
            match self.board.gate().look() {
                Passage::Open => self.safe = ring.known(),
                Passage::Closed(end) => self.end = Some(end),
                Passage::Closing => return Ok(None),
            }
        }
        if self.end.is_some_and(|last| end > last) {
            return Ok(None);
        }
        let mut raw = [0u8; LANE_HEADER as usize];
        ring.memory().copy_out(pos, &mut raw);
        let word = |at: usize| {
            raw[at..at + 8]
                .iter()
                .rev()
                .fold(0u64, |n, b| n << 8 | u64::from(*b))
        };
        if word(0) != u64::from(len) {
            return Err(Violation("record changed its length"));
        }
        let header = RxHeader {
            kind: MESSAGE,
            len,
            seq: word(8),
            serial: word(16),
            body_len: len - LANE_HEADER as u32,
            ..self.writer.header
        };
        Ok(Some((pos, header)))
    }

    fn is_over(&self) -> bool {
        self.end
            .is_some_and(|end| self.inlet.ring.position() >= end)
    }

    /// Whether something waits to be read, as far as a glance can tell.
    #[must_use]
    pub fn glance(&self) -> bool {
        let ring = &self.inlet.ring;
        !self.is_spoilt
            && !self.is_over()
            && ring.memory().head().load(Ordering::Acquire) != ring.position()
    }

    /// The agent has closed it at this position.
    pub fn close_at(&mut self, end: u64) {
        self.end = Some(end);
    }

    /// Closes it from this side, as the agent is gone.
    pub fn leave(&mut self) {
        let memory = self.inlet.ring.memory();
        self.end = Some(match self.board.gate().look() {
            Passage::Closed(end) => end,
            _ => memory.gate().close(memory.head()),
        });
        wake_writer(memory);
    }

    /// Lets the writer wake this end from now on; 1 by the bell, 2 by the agent. Returns whether nothing waits.
    pub fn sleep_begin(&self, how: u32) -> bool {
        let memory = self.inlet.ring.memory();
        memory.reader_sleeps().store(how, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !self.glance()
    }

    /// This end is awake again.
    pub fn sleep_end(&self) {
        let sleeps = self.inlet.ring.memory().reader_sleeps();
        if sleeps.load(Ordering::Relaxed) != 0 {
            sleeps.store(0, Ordering::Relaxed);
        }
    }

    /// Gives room back to the writer, and wakes it if it has waited for that much.
    pub fn settle(&mut self) {
        if !self.inlet.settle() {
            return;
        }
        let memory = self.inlet.ring.memory();
        fence(Ordering::SeqCst);
        if memory.writer_waits().load(Ordering::Acquire) != 0
            && self.inlet.ring.released() >= memory.wanted().load(Ordering::Relaxed)
            && memory.writer_waits().swap(0, Ordering::AcqRel) != 0
        {
            wake_writer(memory);
        }
    }

    /// The lane is over: its memory is given back, whether the writer still has it or not.
    pub fn discard(&self) {
        // A loan may still be out that shows it.
        if self.inlet.out.is_empty() {
            self.inlet.ring.memory().discard();
        }
    }
}

/// Wakes the writer of a lane, if it sleeps.
pub fn wake_writer(segment: &Segment) {
    segment.signal().fetch_add(1, Ordering::Release);
    futex_wake(segment.signal());
}
