//! Which bytes of the arena of a lane are free (docs/internals-lanes.md). Only its sender keeps count, in private memory.
//!
//! Invariants:
//! 1. Blocks that are out never overlap, and lie inside the arena.
//! 2. What was freed last is given out first, if its size is right: it is still in the cache.
//! 3. Every byte that is free can be had again: neighbours become one as soon as no block of the right size is at hand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use crate::sync::{AtomicU32, Ordering};

/// Where blocks begin: a cache line, so that two of them share none.
const ALIGN: u64 = 64;
/// How many of the blocks that were freed last are looked through for one of the right size.
const LOOK_BACK: usize = 8;

/// Some bytes of the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Where they begin.
    pub at: u64,
    /// How many were asked for.
    pub len: u64,
}

impl Block {
    /// Bytes that it takes.
    fn taken(self) -> u64 {
        rounded(self.len)
    }
}

fn rounded(len: u64) -> u64 {
    len.max(1).div_ceil(ALIGN) * ALIGN
}

/// Blocks that came back without being sent, maybe in another thread than the one that has the arena.
#[derive(Default)]
pub struct Shelf {
    blocks: Mutex<Vec<Block>>,
    count: AtomicU32,
}

impl Shelf {
    /// Puts one there.
    pub fn put(&self, block: Block) {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.push(block);
        self.count.store(blocks.len() as u32, Ordering::Release);
    }

    /// Takes all of them.
    #[must_use]
    pub fn take(&self) -> Vec<Block> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        self.count.store(0, Ordering::Release);
        std::mem::take(&mut blocks)
    }
}

/// The free bytes of an arena.
pub struct Arena {
    size: u64,
    /// Freed and not joined to their neighbours: start and length, the newest last.
    warm: Vec<(u64, u64)>,
    /// Free stretches, no two of which touch: start to length, and the same by length.
    starts: BTreeMap<u64, u64>,
    lengths: BTreeSet<(u64, u64)>,
}

impl Arena {
    /// An arena of so many bytes, all of them free.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let size = size / ALIGN * ALIGN;
        let mut made = Self {
            size,
            warm: Vec::new(),
            starts: BTreeMap::new(),
            lengths: BTreeSet::new(),
        };
        if size > 0 {
            made.add(0, size);
        }
        made
    }

    /// Whether a block of so many bytes can be had when all is free.
    #[must_use]
    pub fn takes(&self, len: u64) -> bool {
        len <= self.size && rounded(len) <= self.size
    }

    /// A block of so many bytes, `None` when there is no room for it now. Cost grows with the logarithm of the stretches that are free.
    pub fn allocate(&mut self, len: u64) -> Option<Block> {
        if !self.takes(len) {
            return None;
        }
        let need = rounded(len);
        let oldest = self.warm.len().saturating_sub(LOOK_BACK);
        if let Some(n) = self.warm[oldest..].iter().rposition(|one| one.1 == need) {
            let (at, _) = self.warm.remove(oldest + n);
            return Some(Block { at, len });
        }
        while let Some((at, len)) = self.warm.pop() {
            self.join(at, len);
        }
        // The shortest that is long enough, and of those the first.
        let (have, at) = *self.lengths.range((need, 0)..).next()?;
        self.remove(at, have);
        if have > need {
            self.add(at + need, have - need);
        }
        Some(Block { at, len })
    }

    /// Takes back a block that [`Self::allocate`] gave.
    pub fn free(&mut self, block: Block) {
        debug_assert!(block.at + block.taken() <= self.size);
        self.warm.push((block.at, block.taken()));
    }

    /// Adds a stretch, as one with those that touch it.
    fn join(&mut self, mut at: u64, mut len: u64) {
        if let Some((&before, &its)) = self.starts.range(..at).next_back()
            && before + its == at
        {
            self.remove(before, its);
            (at, len) = (before, its + len);
        }
        if let Some(&its) = self.starts.get(&(at + len)) {
            self.remove(at + len, its);
            len += its;
        }
        self.add(at, len);
    }

    fn add(&mut self, at: u64, len: u64) {
        self.starts.insert(at, len);
        self.lengths.insert((len, at));
    }

    fn remove(&mut self, at: u64, len: u64) {
        self.starts.remove(&at);
        self.lengths.remove(&(len, at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The slow one: a flag for each line of the arena.
    struct Lines(Vec<bool>);

    impl Lines {
        fn of(&mut self, block: Block) -> &mut [bool] {
            assert!(block.at.is_multiple_of(ALIGN));
            let first = (block.at / ALIGN) as usize;
            &mut self.0[first..first + (block.taken() / ALIGN) as usize]
        }

        /// The most lines in a row that are free.
        fn longest(&self) -> usize {
            self.0
                .split(|taken| *taken)
                .map(<[bool]>::len)
                .max()
                .unwrap_or(0)
        }
    }

    fn next(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state >> 16
    }

    #[test]
    fn d13_blocks_are_as_in_the_slow_model() {
        for seed in 1..60 {
            let mut state = seed * 0x9e37_79b9;
            let lines = 1 + next(&mut state) % 300;
            let mut arena = Arena::new(lines * ALIGN + next(&mut state) % ALIGN);
            let mut model = Lines(vec![false; lines as usize]);
            let mut out: Vec<Block> = Vec::new();
            let largest = 1 + next(&mut state) % (lines * ALIGN);
            for _ in 0..400 {
                if next(&mut state).is_multiple_of(2) || out.is_empty() {
                    let len = next(&mut state) % (largest + 70);
                    let longest = model.longest() as u64 * ALIGN;
                    match arena.allocate(len) {
                        Some(block) => {
                            assert_eq!(block.len, len);
                            let taken = model.of(block);
                            assert!(taken.iter().all(|line| !*line), "out already");
                            taken.fill(true);
                            out.push(block);
                        }
                        None => assert!(rounded(len) > longest, "{len} of {longest} free"),
                    }
                } else {
                    let n = next(&mut state) as usize % out.len();
                    let block = out.swap_remove(n);
                    model.of(block).fill(false);
                    arena.free(block);
                }
            }
            for block in out {
                arena.free(block);
            }
            assert_eq!(
                arena.allocate(lines * ALIGN),
                Some(Block {
                    at: 0,
                    len: lines * ALIGN
                }),
                "all of it is there again"
            );
        }
    }

    #[test]
    fn d13_what_was_freed_last_is_given_first() {
        let mut arena = Arena::new(1 << 20);
        let blocks: Vec<Block> = (0..10).map(|_| arena.allocate(1000).unwrap()).collect();
        for block in &blocks {
            arena.free(*block);
        }
        for block in blocks.iter().rev() {
            assert_eq!(
                arena.allocate(1000 + block.at % 3),
                Some(Block {
                    len: 1000 + block.at % 3,
                    ..*block
                })
            );
        }
    }

    #[test]
    fn d13_what_never_fits_is_told() {
        let mut arena = Arena::new(4096);
        assert!(arena.takes(4096) && arena.takes(0));
        for len in [4097, u64::MAX] {
            assert!(!arena.takes(len));
            assert_eq!(arena.allocate(len), None);
        }
        assert_eq!(Arena::new(0).allocate(0), None);
        assert_eq!(Arena::new(63).allocate(1), None);
    }
}
