//! A list that grows without being moved.
//!
//! A vector that is full is copied as a whole: with a million masks that would stop the switch for
//! a tenth of a second. A shelf has boards of equal length, and adds one when the last is full.

use std::ops::{Index, IndexMut};

/// Things of a board. Only the first board grows as a vector does, so a short shelf is small.
const BOARD: usize = 1024;

/// Things in the order in which they came, each under its number.
#[derive(Debug)]
pub(crate) struct Shelf<T> {
    boards: Vec<Vec<T>>,
}

impl<T> Default for Shelf<T> {
    fn default() -> Self {
        Self {
            boards: vec![Vec::new()],
        }
    }
}

impl<T> Shelf<T> {
    pub(crate) fn len(&self) -> usize {
        let last = self.boards.len() - 1;
        last * BOARD + self.boards[last].len()
    }

    pub(crate) fn push(&mut self, thing: T) {
        if self.boards[self.boards.len() - 1].len() == BOARD {
            self.boards.push(Vec::with_capacity(BOARD));
        }
        let last = self.boards.len() - 1;
        self.boards[last].push(thing);
    }

    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.boards.iter().flatten()
    }
}

impl<T> Index<usize> for Shelf<T> {
    type Output = T;

    fn index(&self, at: usize) -> &T {
        &self.boards[at / BOARD][at % BOARD]
    }
}

impl<T> IndexMut<usize> for Shelf<T> {
    fn index_mut(&mut self, at: usize) -> &mut T {
        &mut self.boards[at / BOARD][at % BOARD]
    }
}

/// The same for rows of equal length.
#[derive(Debug)]
pub(crate) struct Rows {
    stride: usize,
    boards: Vec<Vec<u64>>,
}

impl Rows {
    pub(crate) fn new(stride: usize) -> Self {
        Self {
            stride,
            boards: vec![Vec::new()],
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        let words: usize = self.boards.iter().map(Vec::len).sum();
        words / self.stride
    }

    pub(crate) fn push(&mut self, row: &[u64]) {
        let full = BOARD * self.stride;
        if self.boards[self.boards.len() - 1].len() == full {
            self.boards.push(Vec::with_capacity(full));
        }
        let last = self.boards.len() - 1;
        self.boards[last].extend_from_slice(row);
    }

    pub(crate) fn get(&self, at: u32) -> &[u64] {
        let at = at as usize;
        &self.boards[at / BOARD][at % BOARD * self.stride..][..self.stride]
    }

    pub(crate) fn get_mut(&mut self, at: u32) -> &mut [u64] {
        let at = at as usize;
        &mut self.boards[at / BOARD][at % BOARD * self.stride..][..self.stride]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_stay_under_their_numbers() {
        let mut shelf = Shelf::default();
        let mut rows = Rows::new(3);
        for at in 0..5000u64 {
            assert_eq!(shelf.len() as u64, at);
            shelf.push(at);
            rows.push(&[at, at + 1, at + 2]);
        }
        shelf[4096] = 7;
        rows.get_mut(1023)[2] = 9;
        assert_eq!((shelf[0], shelf[1023], shelf[4096]), (0, 1023, 7));
        assert_eq!(rows.get(1023), [1023, 1024, 9]);
        assert_eq!(rows.get(4999), [4999, 5000, 5001]);
        assert_eq!(shelf.iter().count(), 5000);
    }
}
