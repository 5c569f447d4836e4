//! A ring that is read, and what of it is out on loan.
//!
//! Invariants:
//! 1. Room is given back in the order of the records, whatever the order in which loans return.

use std::collections::VecDeque;

use crate::ring::{Consumer, Memory};

/// A ring that is read, and what of it was taken but not given back.
pub struct Inlet<M> {
    /// The reading half.
    pub ring: Consumer<M>,
    /// Ends of records that were taken but not given back, and whether they may be.
    out: VecDeque<(u64, bool)>,
}

impl<M: Memory> Inlet<M> {
    /// Takes the reading half of a new ring.
    #[must_use]
    pub fn new(memory: M) -> Self {
        Self {
            ring: Consumer::new(memory),
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
