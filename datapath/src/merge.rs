//! Which of several rings of one writer has its oldest record: the writer numbers its records, and publishes them in this order.
//!
//! Invariants:
//! 1. What is older than a record that was seen was published before it. So one look at each other ring, after the record was seen,
//!    finds whatever is older: nobody waits.
//! 2. A ring of which it is not known now whether it has something stops all: what it has may be the oldest.

/// What one ring has to be read next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// A record with this number.
    Record(u64),
    /// Nothing.
    Nothing,
    /// Something, perhaps: that is to be known soon.
    Undecided,
}

/// The index of the ring with the oldest record; `see` looks at one of them with acquire order, and finds the same until it is taken.
pub fn oldest(rings: usize, mut see: impl FnMut(usize) -> Seen) -> Option<usize> {
    let mut found = None;
    for ring in 0..rings {
        match see(ring) {
            Seen::Record(seq) => {
                found = Some((seq, ring));
                break;
            }
            Seen::Nothing => {}
            Seen::Undecided => return None,
        }
    }
    let (mut least, first) = found?;
    let mut best = first;
    for ring in (0..rings).filter(|ring| *ring != first) {
        match see(ring) {
            Seen::Record(seq) if seq < least => (least, best) = (seq, ring),
            Seen::Record(_) | Seen::Nothing => {}
            Seen::Undecided => return None,
        }
    }
    Some(best)
}

#[cfg(all(test, loom))]
mod model {
    //! Every interleaving, under the memory model and not under x86's.
    use super::*;
    use crate::sync::{AtomicU64, Ordering};
    use loom::sync::Arc;

    /// The numbers of the records of two rings; what was published of each is its head.
    const RECORDS: [&[u64]; 2] = [&[2, 4], &[1, 3]];

    fn read(heads: &[&AtomicU64], next: &mut [usize; 2]) -> Option<u64> {
        let found = oldest(heads.len(), |ring| {
            if (heads[ring].load(Ordering::Acquire) as usize) > next[ring] {
                Seen::Record(RECORDS[ring][next[ring]])
            } else {
                Seen::Nothing
            }
        })?;
        next[found] += 1;
        Some(RECORDS[found][next[found] - 1])
    }

    #[test]
    fn d11_two_rings_are_read_in_the_order_of_their_writer() {
        loom::model(|| {
            let heads = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
            let other = heads.clone();
            let writer = loom::thread::spawn(move || {
                for (ring, head) in [(1, 1), (0, 1), (1, 2), (0, 2)] {
                    other[ring].store(head, Ordering::Release);
                }
            });
            let (mut next, mut last) = ([0; 2], 0);
            for _ in 0..2 {
                if let Some(seq) = read(&[&heads[0], &heads[1]], &mut next) {
                    assert_eq!(seq, last + 1);
                    last = seq;
                }
            }
            writer.join().unwrap();
        });
    }

    /// The agent opens a second ring while the first is being read: it tells the reader, then says so on the board of the first, then
    /// gives the ring to the writer.
    #[test]
    fn d11_a_ring_that_is_new_is_known_before_what_is_newer_is_read() {
        loom::model(|| {
            // Head of the first, head of the second; told, board, given.
            let words = Arc::new(std::array::from_fn::<_, 5, _>(|_| AtomicU64::new(0)));
            let (agent, writer) = (words.clone(), words.clone());
            let agent = loom::thread::spawn(move || {
                agent[2].store(1, Ordering::Release);
                agent[3].store(1, Ordering::Release);
                agent[4].store(1, Ordering::Release);
            });
            let writer = loom::thread::spawn(move || {
                if writer[4].load(Ordering::Acquire) == 1 {
                    writer[1].store(1, Ordering::Release);
                    writer[0].store(1, Ordering::Release);
                }
            });
            let (mut next, mut known) = ([0; 2], false);
            if words[0].load(Ordering::Acquire) > 0 {
                if words[3].load(Ordering::Acquire) == 1 {
                    assert_eq!(
                        words[2].load(Ordering::Acquire),
                        1,
                        "said, and nobody can find it"
                    );
                    known = true;
                }
                let heads = if known {
                    &[&words[0], &words[1]][..]
                } else {
                    &[&words[0]]
                };
                assert_eq!(read(heads, &mut next), Some(1));
            }
            agent.join().unwrap();
            writer.join().unwrap();
        });
    }
}
