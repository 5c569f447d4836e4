//! What of a lane that has ended lies before a reader that may not have read it (D18, D20).
//!
//! Invariants:
//! 1. Nothing in it is believed for longer than its sender and its reader harm themselves alone by it.

use std::sync::Arc;

use crate::lane_out::LANE_HEADER;
use crate::memory::Segment;
use crate::page::Cursor;
use crate::ring::{Memory, padded};
use crate::sync::Ordering;

/// What lies unread: first number, last number, count.
pub type Unread = (u64, u64, u64);

/// What was published for one reader.
pub struct Rest {
    /// The data.
    pub data: Arc<Segment>,
    /// How far the reader is.
    pub cursor: Cursor,
    /// Where it ends.
    pub end: u64,
}

impl Rest {
    /// Bytes that were not released.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let tail = self.cursor.tail().load(Ordering::Acquire);
        self.end.saturating_sub(tail).min(self.data.size())
    }

    /// What was not released.
    #[must_use]
    pub fn count(&self) -> Option<Unread> {
        let mut pos = self.cursor.tail().load(Ordering::Acquire);
        if self.end.checked_sub(pos)? > self.data.size() {
            return None;
        }
        let mut found: Option<Unread> = None;
        while pos < self.end {
            let mut raw = [0u8; 16];
            self.data.copy_out(pos, &mut raw);
            let len = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
            if u64::from(len) < LANE_HEADER {
                break;
            }
            pos = pos.saturating_add(padded(len.into()));
            if pos > self.end {
                break;
            }
            let seq = raw[8..].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
            let (first, _, count) = found.unwrap_or((seq, seq, 0));
            found = Some((first, seq, count + 1));
        }
        found
    }
}
