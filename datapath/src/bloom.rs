//! Terms, their keyed hashes, and the bits of a multicast address (D8).
//!
//! A message names the terms that it has, a subscription those that it requires. Every agent of a
//! bus turns both into the same bits, so what stands here is as fixed as a wire format:
//!
//! 1. Hashes are SipHash-2-4 with the key of the bus. Only agents hold it, so nobody else can look
//!    for terms that collide.
//! 2. Bits: `h = siphash(key, term)`, `h1 = h as u32`, `h2 = (h >> 32) as u32 | 1`; bit `i` of the
//!    eight is `h1 + i * h2` (wrapping, 32 bits) modulo the width. The exact hash is another one,
//!    `siphash(key, term + "\0exact")`: who knows the bits of a term cannot tell its exact hash.
//! 3. Bit `b` is byte `b / 8`, bit `b % 8` of the address (D1), which is word `b / 64`, bit `b % 64`
//!    of little-endian words.
//! 4. Packed terms are UTF-8 strings separated by NUL: the topic, empty if there is none, and the
//!    `key=value` pairs, rising. A message expands to `t:` + each dotted prefix of its topic and `k:` +
//!    each pair, a subscription to `t:` + its whole topic and `k:` + each pair. The two prefixes keep a
//!    topic from ever being taken for a pair.
//! 5. What is accepted is what `proto/terms.py` accepts, so that terms have one packed form, and it is
//!    within [`MAX_TERMS`] and [`MAX_TERM`], whoever sent it: hashing is work that a stranger can ask
//!    for, so it has a bound.

use std::fmt;

/// Hash functions (bits) a term sets at most.
pub const HASHES: u32 = 8;

/// The widths that an address may have, in bits. The first is the default of a bus.
pub const WIDTHS: [usize; 3] = [512, 1024, 2048];

/// Pairs and components of the topic together that a message or a subscription may have.
pub const MAX_TERMS: usize = 64;

/// Bytes that a topic or a pair may have.
pub const MAX_TERM: usize = 255;

/// Bytes that packed terms may have: so many that the other limits are met first.
const MAX_PACKED: usize = MAX_TERMS * (MAX_TERM + 1);

/// Words of the widest address.
const MAX_WORDS: usize = 2048 / 64;

/// What is put behind a term for its exact hash. A term cannot hold a NUL, so no term ends in it.
const EXACT: &[u8] = b"\x00exact";

/// The secret key of a bus. It is never shown, not even by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; 16]);

impl Key {
    /// The key of these bytes.
    pub fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// SipHash-2-4 of `data`, as its authors define it.
pub fn siphash24(key: &Key, data: &[u8]) -> u64 {
    siphash24_joined(key, data, &[])
}

/// SipHash-2-4 of `data` followed by `tail`, which is [`EXACT`] or nothing.
fn siphash24_joined(key: &Key, data: &[u8], tail: &[u8]) -> u64 {
    let (state, rest) = Sip::begin(key, data);
    state.end(rest, tail, data.len())
}

/// The hashes of an expanded term: the one for its bits, and the exact one. What both have in common
/// is worked out once.
fn both_hashes(key: &Key, term: &[u8]) -> (u64, u64) {
    let (state, rest) = Sip::begin(key, term);
    (
        state.end(rest, &[], term.len()),
        state.end(rest, EXACT, term.len()),
    )
}

/// The four words of state of a SipHash.
#[derive(Clone, Copy)]
struct Sip {
    v0: u64,
    v1: u64,
    v2: u64,
    v3: u64,
}

impl Sip {
    fn new(key: &Key) -> Self {
        let (k0, k1) = key.0.split_at(8);
        let word = |half: &[u8]| half.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b));
        let (k0, k1) = (word(k0), word(k1));
        Self {
            v0: k0 ^ 0x736f_6d65_7073_6575,
            v1: k1 ^ 0x646f_7261_6e64_6f6d,
            v2: k0 ^ 0x6c79_6765_6e65_7261,
            v3: k1 ^ 0x7465_6462_7974_6573,
        }
    }

    /// The state behind all whole words of `data`, and what is left.
    fn begin<'a>(key: &Key, data: &'a [u8]) -> (Self, &'a [u8]) {
        let mut state = Self::new(key);
        let (blocks, rest) = data.as_chunks::<8>();
        for block in blocks {
            state.absorb(u64::from_le_bytes(*block));
        }
        (state, rest)
    }

    /// The hash when `rest` and `tail` follow, together two words at most, with the last one's length.
    fn end(mut self, rest: &[u8], tail: &[u8], data_len: usize) -> u64 {
        let mut bytes = [0; 16];
        bytes[..rest.len()].copy_from_slice(rest);
        let filled = rest.len() + tail.len();
        bytes[rest.len()..filled].copy_from_slice(tail);
        let words = bytes.as_chunks::<8>().0;
        let mut last = u64::from_le_bytes(words[0]);
        if filled >= 8 {
            self.absorb(last);
            last = u64::from_le_bytes(words[1]);
        }
        // The last word carries the length modulo 256 in its top byte.
        self.finish(last | ((data_len + tail.len()) as u64) << 56)
    }

    fn round(&mut self) {
        self.v0 = self.v0.wrapping_add(self.v1);
        self.v1 = self.v1.rotate_left(13) ^ self.v0;
        self.v0 = self.v0.rotate_left(32);
        self.v2 = self.v2.wrapping_add(self.v3);
        self.v3 = self.v3.rotate_left(16) ^ self.v2;
        self.v0 = self.v0.wrapping_add(self.v3);
        self.v3 = self.v3.rotate_left(21) ^ self.v0;
        self.v2 = self.v2.wrapping_add(self.v1);
        self.v1 = self.v1.rotate_left(17) ^ self.v2;
        self.v2 = self.v2.rotate_left(32);
    }

    fn absorb(&mut self, word: u64) {
        self.v3 ^= word;
        self.round();
        self.round();
        self.v0 ^= word;
    }

    fn finish(mut self, last: u64) -> u64 {
        self.absorb(last);
        self.v2 ^= 0xff;
        for _ in 0..4 {
            self.round();
        }
        self.v0 ^ self.v1 ^ self.v2 ^ self.v3
    }
}

/// The exact hash of an expanded term: what the check after the bloom compares.
pub fn term_hash(key: &Key, term: &[u8]) -> u64 {
    siphash24_joined(key, term, EXACT)
}

/// Sets the bits of an expanded term in an address of `bits.len() * 64` bits. Nothing happens if
/// `bits` is empty.
pub fn set_bits(key: &Key, term: &[u8], bits: &mut [u64]) {
    if !bits.is_empty() {
        mark(siphash24(key, term), bits);
    }
}

/// Sets the bits of a hash.
fn mark(hash: u64, bits: &mut [u64]) {
    let width = (bits.len() * 64) as u32;
    let (h1, h2) = (hash as u32, (hash >> 32) as u32 | 1);
    for i in 0..HASHES {
        let bit = h1.wrapping_add(i.wrapping_mul(h2)) % width;
        bits[bit as usize / 64] |= 1 << (bit % 64);
    }
}

/// An address has a width that is none of [`WIDTHS`]: EDOM to whoever sent it (D7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WidthError {
    /// The width in bits.
    pub width: usize,
}

impl fmt::Display for WidthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an address of {} bits is none of {WIDTHS:?}", self.width)
    }
}

impl std::error::Error for WidthError {}

/// The bit array of a multicast address. It lies in place, so making one per message costs no
/// allocation.
#[derive(Clone, Default)]
pub struct Bits {
    words: [u64; MAX_WORDS],
    len: u8,
}

impl Bits {
    /// No bit set, `width` bits wide.
    pub fn zero(width: usize) -> Result<Self, WidthError> {
        if !WIDTHS.contains(&width) {
            return Err(WidthError { width });
        }
        Ok(Self {
            words: [0; MAX_WORDS],
            len: (width / 64) as u8,
        })
    }

    /// The bits of an address as it is sent; its length says the width.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WidthError> {
        let mut bits = Self::zero(bytes.len() * 8)?;
        for (word, chunk) in bits.words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*chunk);
        }
        Ok(bits)
    }

    /// The address as it is sent.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words()
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    /// Width in bits.
    pub fn width(&self) -> usize {
        usize::from(self.len) * 64
    }

    /// The words, lowest bits first.
    pub fn words(&self) -> &[u64] {
        &self.words[..usize::from(self.len)]
    }

    /// The words, to be changed.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words[..usize::from(self.len)]
    }

    /// Sets a bit. A bit outside the width is a mistake of the caller and panics.
    pub fn set(&mut self, bit: usize) {
        self.words_mut()[bit / 64] |= 1 << (bit % 64);
    }

    /// Whether a bit is set; one outside the width is not.
    pub fn get(&self, bit: usize) -> bool {
        self.words()
            .get(bit / 64)
            .is_some_and(|word| word >> (bit % 64) & 1 == 1)
    }

    /// R16: whether a message sent to these bits is for who was granted `granted`. Different widths
    /// never match.
    pub fn contains(&self, granted: &Bits) -> bool {
        self.len == granted.len && covers(self.words(), granted.words())
    }

    /// How many bits are set. A sent address with too many is privileged (D9).
    pub fn popcount(&self) -> u32 {
        self.words().iter().map(|word| word.count_ones()).sum()
    }

    /// Whether no bit is set: as a grant, this hears everything.
    pub fn is_zero(&self) -> bool {
        self.words().iter().all(|&word| word == 0)
    }

    /// The positions of the set bits, rising.
    pub fn ones(&self) -> impl Iterator<Item = usize> + '_ {
        ones(self.words())
    }
}

impl PartialEq for Bits {
    fn eq(&self, other: &Self) -> bool {
        self.words() == other.words()
    }
}

impl Eq for Bits {}

impl std::hash::Hash for Bits {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.words().hash(state);
    }
}

impl fmt::Debug for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bits<{}>", self.width())?;
        f.debug_set().entries(self.ones()).finish()
    }
}

/// `(sent & granted) == granted` over words of the same width.
pub(crate) fn covers(sent: &[u64], granted: &[u64]) -> bool {
    sent.iter()
        .zip(granted)
        .all(|(sent, granted)| granted & !sent == 0)
}

/// The positions of the bits set in `words`, rising.
pub(crate) fn ones(words: &[u64]) -> impl Iterator<Item = usize> + '_ {
    words.iter().enumerate().flat_map(|(at, &word)| {
        let mut left = word;
        std::iter::from_fn(move || {
            let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
            left &= left - 1;
            Some(at * 64 + bit)
        })
    })
}

/// Why packed terms were refused: EINVAL to whoever sent them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TermError {
    /// They are not UTF-8.
    NotText,
    /// A component of the topic, between its dots, is empty, or has an `=`.
    Topic,
    /// A pair has no `=`, or nothing before it.
    Pair,
    /// The pairs do not rise, or one is there twice.
    Order,
    /// The topic or a pair has more than [`MAX_TERM`] bytes.
    TooLong,
    /// There are more than [`MAX_TERMS`] pairs and components.
    TooMany,
}

impl fmt::Display for TermError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotText => f.write_str("terms are not UTF-8"),
            Self::Topic => f.write_str("a component of the topic is empty or has an '='"),
            Self::Pair => f.write_str("a pair is not key=value"),
            Self::Order => f.write_str("the pairs are not in their order"),
            Self::TooLong => write!(f, "a topic or a pair has more than {MAX_TERM} bytes"),
            Self::TooMany => write!(f, "more than {MAX_TERMS} terms"),
        }
    }
}

impl std::error::Error for TermError {}

/// Expanded terms, one behind the other in one buffer, so that a message costs two allocations
/// whatever its terms are, and none where the buffer is used again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Terms {
    bytes: Vec<u8>,
    /// Where each term ends in `bytes`. At most `MAX_TERMS * (2 + MAX_TERM)`, which a u16 holds.
    ends: Vec<u16>,
}

impl Terms {
    /// How many terms there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none. A subscription without terms hears everything.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The terms, in the order of their packed form.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let term = &self.bytes[start..usize::from(end)];
            start = usize::from(end);
            term
        })
    }

    /// The exact hashes, sorted, each once: what [`crate::matching`] takes.
    pub fn hashes(&self, key: &Key) -> Box<[u64]> {
        let mut hashes = Vec::with_capacity(self.len());
        self.hashes_into(key, &mut hashes);
        hashes.into_boxed_slice()
    }

    /// As [`Terms::hashes`], into a buffer that is used again; what was in it is gone.
    pub fn hashes_into(&self, key: &Key, hashes: &mut Vec<u64>) {
        hashes.clear();
        hashes.extend(self.iter().map(|term| term_hash(key, term)));
        hashes.sort_unstable();
        hashes.dedup();
    }

    /// The bits of the address that these terms make.
    pub fn bits(&self, key: &Key, width: usize) -> Result<Bits, WidthError> {
        let mut bits = Bits::zero(width)?;
        for term in self.iter() {
            set_bits(key, term, bits.words_mut());
        }
        Ok(bits)
    }

    /// Bits and exact hashes at once: as [`Terms::bits`] and [`Terms::hashes_into`].
    pub fn look_up(
        &self,
        key: &Key,
        width: usize,
        hashes: &mut Vec<u64>,
    ) -> Result<Bits, WidthError> {
        let mut bits = Bits::zero(width)?;
        hashes.clear();
        for term in self.iter() {
            let (hash, exact) = both_hashes(key, term);
            mark(hash, bits.words_mut());
            hashes.push(exact);
        }
        hashes.sort_unstable();
        hashes.dedup();
        Ok(bits)
    }

    /// As [`expand_message`], into this buffer; what was in it is gone. It is empty after an error.
    pub fn read_message(&mut self, packed: &[u8]) -> Result<(), TermError> {
        self.read(packed, true)
    }

    /// As [`expand_required`], into this buffer; what was in it is gone. It is empty after an error.
    pub fn read_required(&mut self, packed: &[u8]) -> Result<(), TermError> {
        self.read(packed, false)
    }

    fn read(&mut self, packed: &[u8], prefixes: bool) -> Result<(), TermError> {
        self.clear();
        let result = self.expand(packed, prefixes);
        if result.is_err() {
            self.clear();
        }
        result
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    fn expand(&mut self, packed: &[u8], prefixes: bool) -> Result<(), TermError> {
        // Before anything is read, so that a packet of any size costs nothing.
        if packed.len() > MAX_PACKED {
            return Err(TermError::TooLong);
        }
        let packed = std::str::from_utf8(packed).map_err(|_| TermError::NotText)?;
        let mut strings = packed.split('\0');
        let topic = strings.next().unwrap_or_default();
        let mut count = 0;
        let mut counted = || {
            count += 1;
            if count > MAX_TERMS {
                Err(TermError::TooMany)
            } else {
                Ok(())
            }
        };
        if topic.len() > MAX_TERM {
            return Err(TermError::TooLong);
        }
        if !topic.is_empty() {
            let mut end = 0;
            for component in topic.split('.') {
                if component.is_empty() || component.contains('=') {
                    return Err(TermError::Topic);
                }
                // A subscription counts the components too, so that it could always be a message.
                counted()?;
                end += component.len();
                if prefixes {
                    self.push(b"t:", &topic.as_bytes()[..end]);
                }
                end += 1;
            }
            if !prefixes {
                self.push(b"t:", topic.as_bytes());
            }
        }
        let mut before = "";
        for pair in strings {
            if pair.len() > MAX_TERM {
                return Err(TermError::TooLong);
            }
            if pair.find('=').is_none_or(|at| at == 0) {
                return Err(TermError::Pair);
            }
            if pair <= before {
                return Err(TermError::Order);
            }
            counted()?;
            self.push(b"k:", pair.as_bytes());
            before = pair;
        }
        Ok(())
    }

    fn push(&mut self, kind: &[u8; 2], text: &[u8]) {
        self.bytes.extend_from_slice(kind);
        self.bytes.extend_from_slice(text);
        self.ends.push(self.bytes.len() as u16);
    }
}

/// The terms that a message has: each dotted prefix of its topic, and its other terms.
pub fn expand_message(packed: &[u8]) -> Result<Terms, TermError> {
    let mut terms = Terms::default();
    terms.read_message(packed)?;
    Ok(terms)
}

/// The terms that a subscription requires: its whole topic, if it has one, and its other terms.
pub fn expand_required(packed: &[u8]) -> Result<Terms, TermError> {
    let mut terms = Terms::default();
    terms.read_required(packed)?;
    Ok(terms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> Key {
        Key::new(std::array::from_fn(|i| i as u8))
    }

    fn texts(terms: &Terms) -> Vec<String> {
        terms
            .iter()
            .map(|term| String::from_utf8(term.to_vec()).unwrap())
            .collect()
    }

    /// The first and last vectors of the reference implementation, and the one of the paper.
    #[test]
    fn siphash_gives_the_vectors_of_its_authors() {
        let data: Vec<u8> = (0..64).collect();
        for (len, want) in [
            (0, 0x726f_db47_dd0e_0e31),
            (1, 0x74f8_39c5_93dc_67fd),
            (7, 0xab02_00f5_8b01_d137),
            (8, 0x93f5_f579_9a93_2462),
            (15, 0xa129_ca61_49be_45e5),
            (63, 0x958a_324c_eb06_4572u64),
        ] {
            assert_eq!(siphash24(&key(), &data[..len]), want, "{len} bytes");
        }
    }

    #[test]
    fn a_key_is_not_shown() {
        assert_eq!(format!("{:?}", key()), "Key(..)");
    }

    #[test]
    fn a_message_has_each_prefix_of_its_topic() {
        let terms = expand_message(b"org.example.News\0a=b\0lang=de").unwrap();
        let want = [
            "t:org",
            "t:org.example",
            "t:org.example.News",
            "k:a=b",
            "k:lang=de",
        ];
        assert_eq!(texts(&terms), want);
        let terms = expand_required(b"org.example\0lang=de").unwrap();
        assert_eq!(texts(&terms), ["t:org.example", "k:lang=de"]);
    }

    #[test]
    fn a_topic_may_be_missing() {
        assert!(expand_message(b"").unwrap().is_empty());
        assert!(expand_required(b"").unwrap().is_empty());
        assert_eq!(texts(&expand_message(b"\0a=b").unwrap()), ["k:a=b"]);
        assert_eq!(texts(&expand_required(b"\0a=b").unwrap()), ["k:a=b"]);
    }

    #[test]
    fn bad_terms_are_refused() {
        let long_topic = "a".repeat(MAX_TERM + 1);
        let long_pair = format!("\0a={}", "a".repeat(MAX_TERM - 1));
        let many: String = (0..=MAX_TERMS).map(|n| format!("\0k{n:03}=")).collect();
        let deep = ["a"; MAX_TERMS + 1].join(".");
        let both = format!("{}\0a=b", ["a"; MAX_TERMS].join("."));
        let huge = "\0".repeat(1 << 20);
        for (packed, error) in [
            (&b"a..b"[..], TermError::Topic),
            (b".a", TermError::Topic),
            (b"a.", TermError::Topic),
            (b".", TermError::Topic),
            (b"a=b", TermError::Topic),
            (b"a\0", TermError::Pair),
            (b"\0", TermError::Pair),
            (b"a\0\0b=c", TermError::Pair),
            (b"a\0b", TermError::Pair),
            (b"a\0=b", TermError::Pair),
            (b"a\0b=c\0a=b", TermError::Order),
            (b"a\0b=c\0b=c", TermError::Order),
            (b"\xff", TermError::NotText),
            (long_topic.as_bytes(), TermError::TooLong),
            (long_pair.as_bytes(), TermError::TooLong),
            (huge.as_bytes(), TermError::TooLong),
            (many.as_bytes(), TermError::TooMany),
            (deep.as_bytes(), TermError::TooMany),
            (both.as_bytes(), TermError::TooMany),
        ] {
            let mut terms = expand_message(b"left.over").unwrap();
            assert_eq!(terms.read_message(packed), Err(error), "{packed:?}");
            assert!(terms.is_empty());
            assert_eq!(expand_required(packed), Err(error), "{packed:?}");
        }
    }

    #[test]
    fn the_limits_themselves_are_allowed() {
        let topic = "a".repeat(MAX_TERM);
        assert_eq!(expand_message(topic.as_bytes()).unwrap().len(), 1);
        let deep = ["a"; MAX_TERMS].join(".");
        assert_eq!(expand_message(deep.as_bytes()).unwrap().len(), MAX_TERMS);
        assert_eq!(expand_required(deep.as_bytes()).unwrap().len(), 1);
        let pairs: String = (10..74)
            .map(|n| format!("\0{n}={}", "a".repeat(MAX_TERM - 3)))
            .collect();
        assert_eq!(pairs.len(), MAX_PACKED);
        let terms = expand_message(pairs.as_bytes()).unwrap();
        assert_eq!(
            terms.iter().map(<[u8]>::len).sum::<usize>(),
            (MAX_TERM + 2) * MAX_TERMS
        );
        assert_eq!(terms.hashes(&key()).len(), MAX_TERMS);
    }

    /// Fixed values: agents of other versions must come to the same bits.
    #[test]
    fn bits_and_hashes_are_what_other_agents_compute() {
        let mut words = [0; 8];
        set_bits(&key(), b"t:org", &mut words);
        let hash = siphash24(&key(), b"t:org");
        let (h1, h2) = (hash & 0xffff_ffff, hash >> 32 | 1);
        let mut want = Bits::zero(512).unwrap();
        for i in 0..8 {
            want.set((((h1 + i * h2) & 0xffff_ffff) % 512) as usize);
        }
        assert_eq!(words, want.words());
        assert_eq!(want.ones().collect::<Vec<_>>(), GOLDEN_BITS);
        assert_eq!(
            term_hash(&key(), b"t:org"),
            siphash24(&key(), b"t:org\0exact")
        );
        assert_eq!(term_hash(&key(), b"t:org"), GOLDEN_HASH);
    }

    const GOLDEN_BITS: [usize; 8] = [14, 111, 208, 235, 305, 332, 402, 429];
    const GOLDEN_HASH: u64 = 0xb9a8_26ff_4c0e_2020;

    #[test]
    fn only_three_widths_exist() {
        for width in [0, 64, 256, 513, 4096, usize::MAX & !63] {
            assert_eq!(Bits::zero(width), Err(WidthError { width }));
        }
        assert!(Bits::from_bytes(&[0; 63]).is_err());
        assert_eq!(Bits::from_bytes(&[0; 128]).unwrap().width(), 1024);
        assert_ne!(Bits::zero(512), Bits::zero(1024));
        assert!(
            !Bits::zero(512)
                .unwrap()
                .contains(&Bits::zero(1024).unwrap())
        );
    }

    #[test]
    fn bit_b_is_byte_b_8_bit_b_8() {
        let mut bytes = [0u8; 64];
        bytes[13] = 1 << 5;
        let bits = Bits::from_bytes(&bytes).unwrap();
        assert_eq!(bits.ones().collect::<Vec<_>>(), [13 * 8 + 5]);
        assert!(bits.get(109) && !bits.get(108) && !bits.get(5000));
        assert_eq!(bits.to_bytes(), bytes);
    }

    proptest! {
        /// Whoever requires terms that a message has gets its bits and its hashes.
        #[test]
        fn what_is_required_is_found(
            topic in prop::collection::vec("[a-c]{1,2}", 0..5),
            pairs in prop::collection::btree_set("[a-z]{1,3}=[a-z]{0,3}", 0..8),
            take in 0..6usize,
            chosen in any::<u8>(),
            width in prop::sample::select(WIDTHS.to_vec()),
        ) {
            let pack = |topic: &[String], pairs: &[&String]| {
                let mut packed = topic.join(".");
                for pair in pairs {
                    packed.push('\0');
                    packed.push_str(pair);
                }
                packed.into_bytes()
            };
            let all: Vec<&String> = pairs.iter().collect();
            let some: Vec<&String> =
                pairs.iter().enumerate().filter(|(i, _)| chosen >> i & 1 == 1).map(|p| p.1).collect();
            let sent = expand_message(&pack(&topic, &all)).unwrap();
            let required = expand_required(&pack(&topic[..take.min(topic.len())], &some)).unwrap();
            let (sent_bits, required_bits) =
                (sent.bits(&key(), width).unwrap(), required.bits(&key(), width).unwrap());
            prop_assert!(sent_bits.contains(&required_bits));
            prop_assert!(required_bits.popcount() <= 8 * required.len() as u32);
            let hashes = sent.hashes(&key());
            let mut found = vec![7];
            prop_assert_eq!(sent.look_up(&key(), width, &mut found).unwrap(), sent_bits.clone());
            prop_assert_eq!(&found[..], &hashes[..]);
            prop_assert!(hashes.is_sorted());
            prop_assert!(required.hashes(&key()).iter().all(|h| hashes.binary_search(h).is_ok()));
        }

        /// Nothing that a stranger sends does harm, and limits hold.
        #[test]
        fn any_bytes_are_expanded_or_refused(packed in prop::collection::vec(any::<u8>(), 0..400)) {
            for terms in [expand_message(&packed), expand_required(&packed)].into_iter().flatten() {
                prop_assert!(terms.len() <= MAX_TERMS);
                prop_assert!(terms.iter().all(|term| term.len() > 2 && term.len() <= MAX_TERM + 2));
            }
        }

        #[test]
        fn bytes_survive(bytes in prop::collection::vec(any::<u8>(), 128)) {
            let bits = Bits::from_bytes(&bytes).unwrap();
            prop_assert_eq!(bits.popcount() as usize, bits.ones().count());
            prop_assert!(bits.ones().all(|bit| bits.get(bit)));
            prop_assert_eq!(bits.to_bytes(), bytes);
        }
    }
}
