//! How far the slowest of several readers of one ring is.
//!
//! Invariants:
//! 1. A reader is past a place when its tail says so, read with acquire order; the writer uses a place again only when all are.
//! 2. A tail only grows, and is never past what was published: a reader that says otherwise breaks a rule.

use crate::ring::{ALIGN, Violation};
use crate::sync::{AtomicU64, Ordering};

/// The tails as of the last look.
pub struct Tails {
    seen: Box<[u64]>,
    least: u64,
}

impl Tails {
    /// Those of so many readers of an empty ring.
    #[must_use]
    pub fn new(readers: usize) -> Self {
        Self {
            seen: vec![0; readers].into(),
            least: 0,
        }
    }

    /// Everything before this position was released by all, as of the last look.
    #[must_use]
    pub fn least(&self) -> u64 {
        self.least
    }

    /// Looks again; returns how far the slowest is.
    ///
    /// # Errors
    /// [`Violation`] when one runs backwards or past what was published.
    pub fn refresh<'a>(
        &mut self,
        tails: impl Iterator<Item = &'a AtomicU64>,
        published: u64,
    ) -> Result<u64, Violation> {
        let mut least = u64::MAX;
        for (tail, seen) in tails.zip(&mut self.seen) {
            let now = tail.load(Ordering::Acquire);
            if now < *seen {
                return Err(Violation("tail ran backwards"));
            }
            if now > published {
                return Err(Violation("tail past head"));
            }
            if !now.is_multiple_of(ALIGN) {
                return Err(Violation("tail not aligned"));
            }
            *seen = now;
            least = least.min(now);
        }
        self.least = least;
        Ok(least)
    }
}

#[cfg(all(test, loom))]
mod model {
    //! Every interleaving of a writer and two readers.
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;

    struct Ring {
        head: AtomicU64,
        tails: [AtomicU64; 2],
        place: UnsafeCell<u64>,
    }
    // SAFETY: loom reports any access that is not ordered.
    unsafe impl Sync for Ring {}
    // SAFETY: it owns its data.
    unsafe impl Send for Ring {}

    #[test]
    fn d13_a_place_is_used_again_when_all_have_read_it() {
        loom::model(|| {
            let ring = Arc::new(Ring {
                head: AtomicU64::new(8),
                tails: [AtomicU64::new(0), AtomicU64::new(0)],
                place: UnsafeCell::new(1),
            });
            let readers = [0, 1].map(|n| {
                let ring = ring.clone();
                loom::thread::spawn(move || {
                    assert_eq!(ring.head.load(Ordering::Acquire), 8);
                    // SAFETY: loom checks that nobody writes it.
                    ring.place.with(|place| assert_eq!(unsafe { *place }, 1));
                    ring.tails[n].store(8, Ordering::Release);
                })
            });
            let mut tails = Tails::new(2);
            if tails.refresh(ring.tails.iter(), 8) == Ok(8) {
                // SAFETY: loom checks that nobody else has it.
                ring.place.with_mut(|place| unsafe { *place = 2 });
            }
            for reader in readers {
                reader.join().unwrap();
            }
        });
    }
}
