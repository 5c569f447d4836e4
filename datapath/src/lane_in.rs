//! The receiving end of a lane (docs/internals-lanes.md).
//!
//! Invariants:
//! 1. Who the sender is, was said by the agent when the lane began; nothing of it is read from the lane.
//! 2. Nothing behind the position at which the agent closed it is read, and nobody waits for what is not there.
//! 3. A lane that breaks a rule is read no more, and nothing else suffers.
//! 4. While the agent says that there is a newer lane of the same sender that this end does not know yet, nothing is read that may
//!    be newer than what is in that one.

use std::os::fd::{AsFd, OwnedFd};

use crate::client::MESSAGE_BYTES;
use crate::frame::{MESSAGE, RxHeader};
use crate::gate::Passage;
use crate::inlet::Inlet;
use crate::lane_out::{IN_ARENA, LANE_HEADER, PLACED_BYTES};
use crate::memory::Segment;
use crate::merge::Seen;
use crate::pace::Pace;
use crate::page::{Board, Cursor, Shown};
use crate::ring::{Memory, Violation, padded};
use crate::sync::{Ordering, fence};
use crate::wait;

/// Who writes into a lane, as the agent says.
pub struct Writer {
    /// Credentials, flags and lengths, as in the header of a message by the switch.
    pub header: RxHeader,
    /// Its address.
    pub src: Box<[u8]>,
    /// The address to which all of it goes.
    pub dst: Box<[u8]>,
    /// Principal and node, where they were asked for.
    pub ident: Box<[u8]>,
}

/// What LANE_OPEN says of a lane beside its writer.
#[derive(Debug, Clone, Copy)]
pub struct Opening {
    /// What the agent calls it.
    pub number: u64,
    /// What the agent calls its sender: the same for all its lanes to this end.
    pub origin: u64,
    /// Bytes of its ring.
    pub bytes: u64,
    /// Which of its readers this end is.
    pub reader: u64,
}

/// A record that can be read.
#[derive(Debug, Clone, Copy)]
pub struct Front {
    /// Where it begins.
    pub pos: u64,
    /// Where its body begins, which is all there.
    pub body: u64,
    /// That place is in the arena.
    pub in_arena: bool,
    /// What a message by the switch would have.
    pub header: RxHeader,
    end: u64,
}

/// One lane, as its reader has it.
pub struct LaneIn {
    /// What the agent calls it.
    pub number: u64,
    /// The ring.
    pub inlet: Inlet<Shown>,
    /// Who writes.
    pub writer: Writer,
    /// Rings when the writer has published while this end slept.
    pub bell: OwnedFd,
    board: Board,
    /// Which of its readers this end is.
    reader: usize,
    /// What lies before this position counts, whenever the lane is closed.
    safe: u64,
    /// Nothing before this position is newer than what is in a lane that this end does not know yet.
    clear: u64,
    end: Option<u64>,
    /// The agent's word of the end was read.
    is_told: bool,
    is_spoilt: bool,
    front: Option<Front>,
    pace: Pace,
    /// Where it was looked for a writer that waits the last time.
    woken: u64,
}

impl LaneIn {
    /// Takes the reading end of a lane that is new: data, board, cursor, bell.
    ///
    /// # Errors
    /// As [`Segment::attach_shown`], [`Board::attach`], [`Cursor::attach`].
    pub fn attach(opening: &Opening, fds: [OwnedFd; 4], writer: Writer) -> std::io::Result<Self> {
        let [data, board, cursor, bell] = fds;
        let size = usize::try_from(opening.bytes).unwrap_or(0);
        let ring = Shown {
            data: Segment::attach_shown(data.as_fd(), size, true)?,
            cursor: Cursor::attach(cursor.as_fd())?,
        };
        Ok(Self {
            number: opening.number,
            inlet: Inlet::new(ring),
            board: Board::attach(board.as_fd())?,
            reader: usize::try_from(opening.reader).unwrap_or(usize::MAX),
            writer,
            bell,
            safe: 0,
            clear: 0,
            end: None,
            is_told: false,
            is_spoilt: false,
            front: None,
            pace: Pace::default(),
            woken: 0,
        })
    }

    fn cursor(&self) -> &Cursor {
        &self.inlet.ring.memory().cursor
    }

    /// What is to be read next, if this end knows the lanes of the sender up to `newest`; `None` for that: it is older than any that
    /// this end does not know.
    ///
    /// # Errors
    /// [`Violation`], once, when the writer broke a rule.
    pub fn see(&mut self, newest: Option<u64>) -> Result<Seen, Violation> {
        if self.front.is_none() {
            if self.is_spoilt || self.is_over() {
                return Ok(Seen::Nothing);
            }
            match self.find() {
                Ok(Some(front)) => self.front = Some(front),
                Ok(None) if self.end.is_none() && self.is_closing() => {
                    return Ok(Seen::Undecided);
                }
                Ok(None) => return Ok(Seen::Nothing),
                Err(violation) => {
                    self.is_spoilt = true;
                    return Err(violation);
                }
            }
        }
        let Some(front) = &self.front else {
            return Ok(Seen::Nothing);
        };
        if let Some(newest) = newest
            && front.end > self.clear
        {
            // Whoever was given a newer lane before it wrote this has made the agent say so before.
            if self.board.newest(self.reader).load(Ordering::Acquire) > newest {
                return Ok(Seen::Undecided);
            }
            self.clear = self.inlet.ring.known();
        }
        Ok(Seen::Record(front.header.seq))
    }

    /// The record that [`Self::see`] has found.
    #[must_use]
    pub fn front(&self) -> Option<&Front> {
        self.front.as_ref()
    }

    fn find(&mut self) -> Result<Option<Front>, Violation> {
        let ring = &mut self.inlet.ring;
        let known = ring.known();
        if known == ring.position() {
            self.pace.rest();
        }
        let Some((pos, len)) = ring.peek(LANE_HEADER as u32)? else {
            return Ok(None);
        };
        if known == pos {
            (self.pace).found((ring.known() - pos) / padded(u64::from(len)));
        }
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
            // Nor does anything that follows: an honest writer has nothing that goes beyond the end.
            self.end = Some(pos);
            return Ok(None);
        }
        // Also where a body lies is looked at once, and in our own copy.
        let [first, seq, serial, at, bytes] = ring.memory().data.words(pos);
        let marked = u64::from(len) | u64::from(IN_ARENA) << 32;
        let in_arena = first == marked && u64::from(len) == PLACED_BYTES;
        if first != u64::from(len) && !in_arena {
            return Err(Violation("record changed its length"));
        }
        let (body, body_len) = if in_arena {
            if bytes > MESSAGE_BYTES as u64 || ring.memory().data.arena_at(at, bytes).is_none() {
                return Err(Violation("a body outside the arena"));
            }
            (at, bytes as u32)
        } else {
            (pos + LANE_HEADER, len - LANE_HEADER as u32)
        };
        let header = RxHeader {
            kind: MESSAGE,
            len,
            seq,
            serial,
            body_len,
            ..self.writer.header
        };
        Ok(Some(Front {
            pos,
            body,
            in_arena,
            header,
            end,
        }))
    }

    /// Whether something waits of which the agent is about to say whether it counts.
    fn is_closing(&self) -> bool {
        self.inlet.ring.known() != self.inlet.ring.position()
    }

    /// Whether the agent was about to close it when it was looked at, and has not said yet how far it counts.
    #[must_use]
    pub fn is_undecided(&self) -> bool {
        self.end.is_none() && self.board.gate().look() == Passage::Closing
    }

    fn is_over(&self) -> bool {
        self.end
            .is_some_and(|end| self.inlet.ring.position() >= end)
    }

    /// Takes the record at the front.
    pub fn take(&mut self, len: u32, on_loan: bool) {
        self.front = None;
        self.inlet.take(len, on_loan);
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
        self.is_told = true;
    }

    /// Whether the agent's word of the end was read.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.is_told
    }

    /// Whether its writer broke a rule.
    #[must_use]
    pub fn is_spoilt(&self) -> bool {
        self.is_spoilt
    }

    /// Closes it from this side, as the agent is gone.
    pub fn leave(&mut self) {
        self.end = self.end.or_else(|| {
            Some(match self.board.gate().look() {
                Passage::Closed(end) => end,
                _ => self.cursor().gate().close(self.inlet.ring.memory().head()),
            })
        });
        self.cursor().wake_writer();
    }

    /// Lets the writer wake this end from now on, in one of the ways that `lane_out` names. Returns whether nothing waits.
    #[must_use]
    pub fn sleep_begin(&self, how: u32) -> bool {
        self.cursor().reader_sleeps().store(how, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !self.glance()
    }

    /// How long ago the writer rang, in ns, if it has since this end went to sleep. A lie of its.
    #[must_use]
    pub fn rung(&self) -> Option<u32> {
        let cursor = self.cursor();
        let is_awake = cursor.reader_sleeps().load(Ordering::Relaxed) == 0;
        let ago = (wait::clock() as u32).wrapping_sub(cursor.rung().load(Ordering::Relaxed));
        is_awake.then_some(ago)
    }

    /// This end is awake again.
    pub fn sleep_end(&self) {
        let sleeps = self.cursor().reader_sleeps();
        if sleeps.load(Ordering::Relaxed) != 0 {
            sleeps.store(0, Ordering::Relaxed);
        }
    }

    /// Gives room back to the writer, and wakes it if it has waited for that much.
    pub fn settle(&mut self) {
        if !self.inlet.settle() {
            return;
        }
        // Who waits wants half of the ring, and looks itself now and then: there is no need for a fence after each record.
        let ring = &self.inlet.ring;
        let released = ring.released();
        if ring.position() != ring.known() && released - self.woken < ring.memory().size() / 8 {
            return;
        }
        self.woken = released;
        let cursor = self.cursor();
        fence(Ordering::SeqCst);
        if cursor.writer_waits().load(Ordering::Acquire) != 0
            && self.inlet.ring.released() >= cursor.wanted().load(Ordering::Relaxed)
            && cursor.writer_waits().swap(0, Ordering::AcqRel) != 0
        {
            cursor.wake_writer();
        }
    }
}
