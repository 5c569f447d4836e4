//! How a ring is closed while its writer may be writing: either the writer sees that it is closed, or what it published counts.
//!
//! Invariants:
//! 1. The closer announces, looks at `head` behind a full fence, and writes down how far it was. The writer publishes and looks
//!    at the announcement behind a full fence. One of the two sees the other, whatever the processor.
//! 2. A reader that has seen `head`, and behind a full fence finds the gate open, may read up to there: the closer will have seen
//!    that much too.
//! 3. A gate is closed once, and for good.

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

const OPEN: u32 = 0;
const CLOSING: u32 = 1;
const CLOSED: u32 = 2;

/// The two words of a gate, which only the closer writes.
#[derive(Clone, Copy)]
pub struct Gate<'a> {
    /// Open, closing, closed.
    pub state: &'a AtomicU32,
    /// Where the ring ends, once it is closed.
    pub end: &'a AtomicU64,
}

/// What a writer finds after it has published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    /// What was published counts.
    Open,
    /// The closer is about to write down how far it counts.
    Closing,
    /// What ends at or before this position counts, and nothing else.
    Closed(u64),
}

impl Gate<'_> {
    /// Closes a ring; returns where it ends: everything before was published, nothing behind counts.
    #[must_use]
    pub fn close(&self, head: &AtomicU64) -> u64 {
        self.state.store(CLOSING, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let end = head.load(Ordering::Acquire);
        self.end.store(end, Ordering::Relaxed);
        self.state.store(CLOSED, Ordering::Release);
        end
    }

    /// Whether it is open. A writer may rely on it only for what it published before a full fence that precedes this look.
    #[must_use]
    pub fn look(&self) -> Passage {
        match self.state.load(Ordering::Acquire) {
            OPEN => Passage::Open,
            CLOSED => Passage::Closed(self.end.load(Ordering::Relaxed)),
            _ => Passage::Closing,
        }
    }
}

#[cfg(all(test, loom))]
mod model {
    //! Every interleaving of a writer and a closer, under the memory model and not under x86's.
    use super::*;
    use loom::sync::Arc;

    #[test]
    fn d11_what_passed_the_gate_is_read_and_nothing_else() {
        loom::model(|| {
            let words = Arc::new((AtomicU32::new(OPEN), AtomicU64::new(0), AtomicU64::new(0)));
            let other = words.clone();
            let closer = loom::thread::spawn(move || {
                let (state, end, head) = &*other;
                Gate { state, end }.close(head)
            });
            let (state, end, head) = &*words;
            let mut passed = 0;
            for position in [8, 16] {
                head.store(position, Ordering::Release);
                fence(Ordering::SeqCst);
                match (Gate { state, end }).look() {
                    Passage::Open => passed = position,
                    Passage::Closing => break,
                    Passage::Closed(last) => {
                        if position <= last {
                            passed = position;
                        }
                        break;
                    }
                }
            }
            let last = closer.join().unwrap();
            assert!(passed <= last, "accepted, and nobody reads it");
            assert_eq!(Gate { state, end }.look(), Passage::Closed(last));
        });
    }

    #[test]
    fn d11_what_is_read_is_not_sent_again() {
        loom::model(|| {
            let words = Arc::new((AtomicU32::new(OPEN), AtomicU64::new(0), AtomicU64::new(0)));
            let (other, third) = (words.clone(), words.clone());
            let closer = loom::thread::spawn(move || {
                let (state, end, head) = &*other;
                Gate { state, end }.close(head)
            });
            let writer = loom::thread::spawn(move || third.2.store(8, Ordering::Release));
            let (state, end, head) = &*words;
            let seen = head.load(Ordering::Acquire);
            fence(Ordering::SeqCst);
            let read = match (Gate { state, end }).look() {
                Passage::Open => seen,
                Passage::Closing => 0,
                Passage::Closed(last) => seen.min(last),
            };
            writer.join().unwrap();
            assert!(read <= closer.join().unwrap(), "read, and sent again");
        });
    }
}
