//! A map from numbers to numbers that grows sheet by sheet.
//!
//! 1. No addition and no removal costs more than a sheet: a map that is one table is built anew when
//!    it is full, which with a million entries stops the switch for a tenth of a second. Here a sheet
//!    that is full is halved, and the list of sheets, four bytes for some hundred entries, is all that
//!    ever doubles.
//! 2. Keys are hashes that nobody can choose, or numbers given one after the other. Should they fall
//!    together nevertheless, a sheet grows and nothing fails.
//!
//! This is extendible hashing.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Entries of a sheet that is halved when one more comes: as many as 16,384 places hold.
const FULL: usize = 14_336;

/// Halvings of a sheet at most; then it grows.
const DEPTH: u32 = 20;

/// Spreads numbers that follow each other; of hashes it makes others.
fn mix(key: u64) -> u64 {
    let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 32
}

/// The hash of a key within its sheet. The highest bits are the same for all there, and with them a
/// table would tell its places apart.
#[derive(Debug, Default)]
struct Mixed(u64);

impl Hasher for Mixed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(self.0 ^ u64::from(byte));
        }
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = mix(key).rotate_left(DEPTH);
    }
}

/// All entries whose hashes begin with the same bits.
#[derive(Debug, Default)]
struct Sheet {
    entries: HashMap<u64, u64, BuildHasherDefault<Mixed>>,
    /// How many bits they share.
    depth: u32,
}

/// Numbers by numbers.
#[derive(Debug)]
pub(crate) struct Atlas {
    sheets: Vec<Sheet>,
    /// The sheet for each beginning of a hash.
    directory: Vec<u32>,
    /// How many bits of a hash choose the sheet.
    depth: u32,
    len: usize,
}

impl Default for Atlas {
    fn default() -> Self {
        Self {
            sheets: vec![Sheet::default()],
            directory: vec![0],
            depth: 0,
            len: 0,
        }
    }
}

impl Atlas {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[cfg(test)]
    pub(crate) fn values(&self) -> impl Iterator<Item = u64> {
        let entries = self.sheets.iter().flat_map(|sheet| sheet.entries.values());
        entries.copied()
    }

    fn place(&self, hash: u64) -> usize {
        (hash >> 1 >> (63 - self.depth)) as usize
    }

    fn sheet_mut(&mut self, key: u64) -> &mut Sheet {
        let at = self.directory[self.place(mix(key))];
        &mut self.sheets[at as usize]
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: u64) -> Option<u64> {
        let at = self.directory[self.place(mix(key))];
        self.sheets[at as usize].entries.get(&key).copied()
    }

    /// Sets the value of a key; returns the one before.
    pub(crate) fn insert(&mut self, key: u64, value: u64) -> Option<u64> {
        let sheet = self.sheet_mut(key);
        if sheet.entries.len() >= FULL {
            if let Some(known) = sheet.entries.get_mut(&key) {
                return Some(std::mem::replace(known, value));
            }
            while self.halve(key) {}
        }
        let before = self.sheet_mut(key).entries.insert(key, value);
        self.len += usize::from(before.is_none());
        before
    }

    /// Takes a key away; returns the value that it had.
    pub(crate) fn remove(&mut self, key: u64) -> Option<u64> {
        let entries = &mut self.sheet_mut(key).entries;
        let value = entries.remove(&key)?;
        if entries.len() < entries.capacity() / 8 {
            entries.shrink_to(2 * entries.len());
        }
        self.len -= 1;
        Some(value)
    }

    /// Halves the sheet of a key if it is full, and says whether it was.
    fn halve(&mut self, key: u64) -> bool {
        let (all, number) = (self.depth, self.sheets.len() as u32);
        let sheet = self.sheet_mut(key);
        let depth = sheet.depth;
        if sheet.entries.len() < FULL || depth == DEPTH {
            return false;
        }
        let old = std::mem::take(&mut sheet.entries);
        let mut other = Sheet::default();
        for one in [&mut *sheet, &mut other] {
            one.depth = depth + 1;
            one.entries.reserve(FULL / 2 + 1);
        }
        for (key, value) in old {
            let is_upper = mix(key) >> (63 - depth) & 1 == 1;
            let half = if is_upper { &mut other } else { &mut *sheet };
            half.entries.insert(key, value);
        }
        self.sheets.push(other);
        if depth == all {
            self.directory = self.directory.iter().flat_map(|&one| [one; 2]).collect();
            self.depth += 1;
        }
        // Of the places of the old sheet the upper half is the new one's.
        let half = 1 << (self.depth - depth - 1);
        let first = self.place(mix(key)) & !(2 * half - 1);
        self.directory[first + half..first + 2 * half].fill(number);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(atlas: &Atlas) {
        let sizes = atlas.sheets.iter().map(|sheet| sheet.entries.len());
        assert_eq!(sizes.sum::<usize>(), atlas.len());
        assert_eq!(atlas.directory.len(), 1 << atlas.depth);
        for (number, sheet) in (0u32..).zip(&atlas.sheets) {
            let places = atlas.directory.iter().filter(|&&one| one == number);
            assert_eq!(places.count(), 1 << (atlas.depth - sheet.depth));
            for &key in sheet.entries.keys() {
                assert_eq!(atlas.directory[atlas.place(mix(key))], number);
            }
        }
    }

    #[test]
    fn many_are_found_and_no_sheet_is_large() {
        let mut atlas = Atlas::default();
        for key in 0..200_000u64 {
            assert_eq!(atlas.insert(key, key + 5), None);
        }
        check(&atlas);
        assert!(atlas.sheets.iter().all(|sheet| sheet.entries.len() <= FULL));
        assert!((0..200_000).all(|key| atlas.get(key) == Some(key + 5)));
        assert!((200_000..300_000).all(|key| atlas.get(key).is_none()));
        for key in (0..200_000).filter(|key| key % 100 != 0) {
            assert_eq!(atlas.remove(key), Some(key + 5));
        }
        check(&atlas);
        let room = atlas.sheets.iter().map(|sheet| sheet.entries.capacity());
        assert!(room.sum::<usize>() < 32_000, "2000 entries are left");
        assert!((0..2000).all(|key| atlas.get(100 * key) == Some(100 * key + 5)));
    }

    /// Keys that fall together, as nobody can make them do, are found.
    #[test]
    fn keys_that_fall_together_are_found() {
        // The inverse of what `mix` multiplies with, by Newton's steps.
        let odd = 0x9e37_79b9_7f4a_7c15u64;
        let inverse = (0..6).fold(odd, |inverse, _| {
            inverse.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(inverse)))
        });
        let many = FULL as u64 + 100;
        let keys: Vec<u64> = (0..many).map(|n| n.wrapping_mul(inverse)).collect();
        assert!(keys.iter().all(|&key| mix(key) < many));
        let mut atlas = Atlas::default();
        for (n, &key) in (0..).zip(&keys) {
            atlas.insert(key, n);
        }
        check(&atlas);
        assert_eq!(atlas.depth, DEPTH);
        for (n, &key) in (0..).zip(&keys) {
            assert_eq!(atlas.get(key), Some(n));
        }
        assert!(keys.iter().all(|&key| atlas.remove(key).is_some()));
        assert_eq!(atlas.len(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn it_is_a_map(steps in prop::collection::vec((0u64..60_000, 0u64..25_000, prop::option::weighted(0.7, any::<u64>())), 1..12)) {
            let mut atlas = Atlas::default();
            let mut map = HashMap::new();
            for (first, count, value) in steps {
                for key in first..first + count {
                    match value {
                        Some(value) => prop_assert_eq!(atlas.insert(key, value), map.insert(key, value)),
                        None => prop_assert_eq!(atlas.remove(key), map.remove(&key)),
                    }
                }
                prop_assert_eq!(atlas.len(), map.len());
                check(&atlas);
            }
            for key in 0..90_000 {
                prop_assert_eq!(atlas.get(key), map.get(&key).copied());
            }
        }
    }
}
