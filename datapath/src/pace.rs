//! How soon a reader that has read all of a lane looks for more, while much comes.
//!
//! Invariants:
//! 1. Each look at what the writer has published takes a line of memory away from it, and reading what it has just written takes another:
//!    where a reader is close behind its writer, a message costs either of them twice as much as when it comes with others. So while
//!    messages come quickly a reader that was there just now rests a moment before it looks again, and finds several.
//! 2. Who answers each message before the next one is sent never gets them that quickly: nobody rests then.

use std::time::{Duration, Instant};

use crate::wait::may_look;

/// Looks that are judged together.
const LOOKS: u32 = 16;
/// Messages come quickly if they come at this distance or less.
const QUICK: Duration = Duration::from_nanos(400);
/// The time between two looks while they do.
const REST: Duration = Duration::from_micros(5);

/// What the reader of one lane has seen of late.
#[derive(Default)]
pub struct Pace {
    /// When what is counted began.
    since: Option<Instant>,
    looks: u32,
    records: u32,
    /// When there was something the last time, while it comes quickly.
    quick: Option<Instant>,
}

impl Pace {
    /// To be called before a look for more.
    pub fn rest(&self) {
        if let Some(last) = self.quick {
            while last.elapsed() < REST {
                std::hint::spin_loop();
            }
        }
    }

    /// A look has found about so many records.
    pub fn found(&mut self, records: u64) {
        self.looks += 1;
        let records = u32::try_from(records).unwrap_or(u32::MAX);
        self.records = self.records.saturating_add(records);
        if self.looks >= LOOKS {
            let now = Instant::now();
            let took = self.since.map_or(Duration::MAX, |since| now - since);
            let is_quick = took < QUICK.saturating_mul(self.records) && may_look();
            *self = Self {
                since: Some(now),
                quick: is_quick.then_some(now),
                ..Self::default()
            };
        } else if let Some(last) = &mut self.quick {
            *last = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r22_nobody_rests_who_gets_messages_one_by_one() {
        let mut pace = Pace::default();
        for _ in 0..4 * LOOKS {
            std::thread::sleep(QUICK);
            pace.found(1);
        }
        assert!(pace.quick.is_none());
    }

    #[test]
    fn r22_a_reader_rests_while_much_comes_and_no_longer() {
        let mut pace = Pace::default();
        for _ in 0..2 * LOOKS {
            pace.found(u64::MAX);
        }
        assert_eq!(pace.quick.is_some(), may_look());
        let begin = Instant::now();
        pace.found(u64::MAX);
        pace.rest();
        assert!(begin.elapsed() >= REST || !may_look());
        for _ in 0..2 * LOOKS {
            pace.found(0);
        }
        assert!(pace.quick.is_none());
    }
}
