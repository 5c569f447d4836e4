//! Who hears a multicast: the grants of one bus, so arranged that a message meets few of them.
//!
//! 1. A message sent to `sent` is for who was granted `granted` if `(sent & granted) == granted`
//!    (R16), so an all-zero grant hears everything. Different widths never match: each width has a
//!    table of its own. Several grants are alternatives.
//! 2. If the message and the grant both have terms, those of the grant must also be among those of
//!    the message. If one of them is raw, the bits decide alone (D10).
//! 3. A mask, that is bits and terms together, is stored once, with a list of those who were granted
//!    it.
//! 4. A message visits only what it shares something with. Masks with terms are filed under *one* of
//!    their terms, the rarest when they came, and a message looks under its own terms only. For raw
//!    messages, and for raw masks, there is a trie of the bits (below); it has one branch per bit, and
//!    only those are taken that the message has set.
//! 5. Insertion and removal touch one mask and its neighbours; nothing is ever rebuilt, and nothing
//!    large is copied to make room ([`crate::atlas`], [`crate::shelf`]).
//! 6. What a query finds depends on the grants alone. The order in which it finds them depends on the
//!    order in which they came, but on no chance.
//!
//! The trie is a set-trie: a mask is the word of its bits in rising order. It is compressed at both
//! ends, as masks are long and sparse: a branch with one mask is a leaf, whatever is left of the mask,
//! and a node skips the bits that all masks below it share. So there are fewer nodes than masks, and a
//! node that is not the root holds two things at least. What a large table costs is memory that no
//! cache has: so a branch says in a word which bits are wanted where it leads to, and hardly any is
//! taken in vain.

use crate::atlas::Atlas;
use crate::bloom::{Bits, covers, ones};
use crate::shelf::{Rows, Shelf};
use std::fmt;
use std::hash::{BuildHasher, RandomState};

/// A grant to hear a multicast address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match<O> {
    /// Names this grant; no two grants of an index have the same.
    pub id: u64,
    /// Whose grant it is, and what else the caller wants to know when it is met: it lies where the
    /// query finds the grant, which saves a look at another table.
    pub owner: O,
    /// The bits that a message must have.
    pub bits: Bits,
    /// The exact hashes of the terms that a message must have, in any order; `None` if the grant is
    /// raw.
    pub terms: Option<Box<[u64]>>,
}

/// A grant that a message met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hit<O> {
    /// Whose grant it is.
    pub owner: O,
    /// Which grant it is.
    pub id: u64,
}

/// Why a grant was not taken. Nothing has changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InsertError {
    /// There is a grant with this id.
    Duplicate,
    /// The index has as many masks as it can number (2^31).
    Full,
}

impl fmt::Display for InsertError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Duplicate => "there is a match with this id",
            Self::Full => "the match index is full",
        })
    }
}

impl std::error::Error for InsertError {}

/// The grants of one bus.
#[derive(Debug)]
pub struct MatchIndex<O> {
    /// One table a width, made when the first grant of that width comes.
    tables: Vec<Table<O>>,
    /// Where each grant is: see [`Place`].
    places: Atlas,
}

impl<O: Copy> Default for MatchIndex<O> {
    fn default() -> Self {
        Self {
            tables: Vec::new(),
            places: Atlas::default(),
        }
    }
}

/// Where a grant is: which table, which mask, which of its owners.
#[derive(Debug, Clone, Copy)]
struct Place {
    table: u8,
    mask: u32,
    owner: u32,
}

impl Place {
    /// In one number: there are three tables at most, and mask and owner are below [`NODE`].
    fn pack(self) -> u64 {
        u64::from(self.table) << 62 | u64::from(self.mask) << 31 | u64::from(self.owner)
    }

    fn unpack(packed: u64) -> Self {
        Self {
            table: (packed >> 62) as u8,
            mask: (packed >> 31) as u32 & !NODE,
            owner: packed as u32 & !NODE,
        }
    }
}

impl<O: Copy> MatchIndex<O> {
    /// An index without grants.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many grants there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is no grant.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many different masks the grants have.
    pub fn masks(&self) -> usize {
        self.tables
            .iter()
            .map(|table| table.masks.len() - table.free.len())
            .sum()
    }

    /// Whose grant has this id.
    pub fn owner(&self, id: u64) -> Option<O> {
        let place = Place::unpack(self.places.get(id)?);
        let mask = &self.tables[usize::from(place.table)].masks[place.mask as usize];
        Some(mask.owners.all()[place.owner as usize].owner)
    }

    /// Adds a grant.
    pub fn insert(&mut self, grant: Match<O>) -> Result<(), InsertError> {
        if self.places.get(grant.id).is_some() {
            return Err(InsertError::Duplicate);
        }
        let stride = grant.bits.words().len();
        let table = match self.tables.iter().position(|table| table.stride == stride) {
            Some(table) => table,
            None => {
                self.tables.push(Table::new(stride));
                self.tables.len() - 1
            }
        };
        let hit = Hit {
            owner: grant.owner,
            id: grant.id,
        };
        let (mask, owner) = self.tables[table].insert(&grant.bits, grant.terms, hit)?;
        let place = Place {
            table: table as u8,
            mask,
            owner,
        };
        self.places.insert(grant.id, place.pack());
        Ok(())
    }

    /// Takes a grant away, and says whether there was one with this id.
    pub fn remove(&mut self, id: u64) -> bool {
        let Some(place) = self.places.remove(id).map(Place::unpack) else {
            return false;
        };
        let moved = self.tables[usize::from(place.table)].remove(place.mask, place.owner);
        // The last owner of the mask has taken the place of the one that went.
        if let Some(moved) = moved {
            self.places.insert(moved.id, place.pack());
        }
        true
    }

    /// Appends to `hits` all grants that a message meets. `terms` are the sorted exact hashes of its
    /// terms, `None` if it was sent to raw bits.
    pub fn query(&self, sent: &Bits, terms: Option<&[u64]>, hits: &mut Vec<Hit<O>>) {
        self.query_counted(sent, terms, hits);
    }

    /// As [`MatchIndex::query`], and says how many masks, places of the term index and nodes of the
    /// tries were looked at: what the query cost, free of the clock.
    pub fn query_counted(
        &self,
        sent: &Bits,
        terms: Option<&[u64]>,
        hits: &mut Vec<Hit<O>>,
    ) -> usize {
        let Some(table) = self
            .tables
            .iter()
            .find(|table| table.stride == sent.words().len())
        else {
            return 0;
        };
        table.query(sent.words(), terms, &mut |owners| {
            hits.extend_from_slice(owners)
        })
    }
}

/// No mask, no node.
const NONE: u32 = u32::MAX;

/// The bit that tells a node from a mask in a branch.
const NODE: u32 = 1 << 31;

/// A mask and who was granted it.
#[derive(Debug)]
struct Mask<O> {
    owners: Owners<O>,
    terms: Needs,
    /// The term that it is filed under; of no meaning for raw masks and those without terms.
    filed: u64,
    /// The next mask with the same fingerprint.
    same: u32,
    /// The next mask of the same trie with the same bits (but other terms).
    twin: u32,
}

/// The terms of a mask, sorted. Those of most masks lie in place: what lies elsewhere is memory that
/// a query must wait for once more.
#[derive(Debug, PartialEq, Eq)]
enum Needs {
    Raw,
    Few(u8, [u64; FEW]),
    Many(Box<[u64]>),
}

/// Terms that lie in place.
const FEW: usize = 3;

impl Needs {
    fn new(terms: Option<Box<[u64]>>) -> Self {
        let Some(terms) = terms else {
            return Self::Raw;
        };
        let mut terms = terms.into_vec();
        terms.sort_unstable();
        terms.dedup();
        if terms.len() > FEW {
            return Self::Many(terms.into_boxed_slice());
        }
        let mut few = [0; FEW];
        few[..terms.len()].copy_from_slice(&terms);
        Self::Few(terms.len() as u8, few)
    }

    fn all(&self) -> Option<&[u64]> {
        match self {
            Self::Raw => None,
            Self::Few(count, terms) => Some(&terms[..usize::from(*count)]),
            Self::Many(terms) => Some(terms),
        }
    }
}

/// Owners of a mask. Most masks of a large table have one, and then cost no allocation.
#[derive(Debug)]
enum Owners<O> {
    One(Hit<O>),
    Many(Vec<Hit<O>>),
}

impl<O> Owners<O> {
    fn all(&self) -> &[Hit<O>] {
        match self {
            Self::One(hit) => std::slice::from_ref(hit),
            Self::Many(hits) => hits,
        }
    }
}

/// A mask in the list of a term.
#[derive(Debug, Clone, Copy)]
struct Filed {
    /// One bit of 32 for each term of the mask. What a message cannot cover here it does not match,
    /// and so a long list is read in one sweep, without a look at the masks themselves.
    signature: u32,
    mask: u32,
}

/// What is filed under a term: nearly always one mask, which then lies where the term does.
#[derive(Debug, Clone, Copy)]
enum List {
    One(Filed),
    /// The number of a list.
    Many(u32),
}

impl List {
    /// In one number.
    fn pack(self) -> u64 {
        match self {
            Self::One(Filed { signature, mask }) => {
                u64::from(signature) << 32 | u64::from(mask) << 1
            }
            Self::Many(list) => u64::from(list) << 1 | 1,
        }
    }

    fn unpack(packed: u64) -> Self {
        let number = packed as u32 >> 1;
        if packed & 1 == 1 {
            return Self::Many(number);
        }
        Self::One(Filed {
            signature: (packed >> 32) as u32,
            mask: number,
        })
    }
}

fn signature(terms: &[u64]) -> u32 {
    terms.iter().fold(0, |bits, term| bits | 1 << (term >> 59))
}

/// Whether all of `required` are in `sent`; both are sorted.
fn subset(required: &[u64], sent: &[u64]) -> bool {
    let mut rest = sent;
    required.iter().all(|term| {
        let at = rest.partition_point(|other| other < term);
        rest = &rest[at..];
        rest.first() == Some(term)
    })
}

/// The grants of one width.
#[derive(Debug)]
struct Table<O> {
    /// Words of a mask.
    stride: usize,
    /// The bits of each mask.
    words: Rows,
    masks: Shelf<Mask<O>>,
    /// Masks that are not in use.
    free: Vec<u32>,
    /// The first mask with a fingerprint.
    seen: Atlas,
    /// Fingerprints are keyed by chance: raw bits are chosen by whoever asks for them.
    state: RandomState,
    /// Raw masks by their bits.
    raw: Trie,
    /// Masks with terms by their bits, for raw messages.
    stated: Trie,
    /// Masks with terms by one of them: see [`List`]. Term hashes are SipHashes with a key that no
    /// endpoint knows.
    filed: Atlas,
    /// Those of terms under which several are filed, and which of these are not in use.
    lists: Shelf<Vec<Filed>>,
    free_lists: Vec<u32>,
    /// Masks with an empty list of terms: each message meets them by its bits.
    open: Vec<u32>,
}

impl<O: Copy> Table<O> {
    fn new(stride: usize) -> Self {
        Self {
            stride,
            words: Rows::new(stride),
            masks: Shelf::default(),
            free: Vec::new(),
            seen: Atlas::default(),
            state: RandomState::new(),
            raw: Trie::new(stride),
            stated: Trie::new(stride),
            filed: Atlas::default(),
            lists: Shelf::default(),
            free_lists: Vec::new(),
            open: Vec::new(),
        }
    }

    fn bits(&self, mask: u32) -> &[u64] {
        self.words.get(mask)
    }

    fn fingerprint(&self, bits: &[u64], terms: Option<&[u64]>) -> u64 {
        self.state.hash_one((bits, terms))
    }

    /// The mask and the place among its owners.
    fn insert(
        &mut self,
        bits: &Bits,
        terms: Option<Box<[u64]>>,
        hit: Hit<O>,
    ) -> Result<(u32, u32), InsertError> {
        let terms = Needs::new(terms);
        let fingerprint = self.fingerprint(bits.words(), terms.all());
        let first = self.seen.get(fingerprint).map_or(NONE, |mask| mask as u32);
        let mut mask = first;
        while mask != NONE {
            let known = &self.masks[mask as usize];
            if known.terms == terms && self.bits(mask) == bits.words() {
                let owner = self.share(mask, hit)?;
                return Ok((mask, owner));
            }
            mask = known.same;
        }
        let filed = terms.all().map_or(0, |terms| self.rarest(terms));
        let mask = self.place(
            bits,
            Mask {
                owners: Owners::One(hit),
                terms,
                filed,
                same: first,
                twin: NONE,
            },
        )?;
        self.seen.insert(fingerprint, mask.into());
        self.file(mask);
        Ok((mask, 0))
    }

    fn share(&mut self, mask: u32, hit: Hit<O>) -> Result<u32, InsertError> {
        let owners = &mut self.masks[mask as usize].owners;
        match owners {
            Owners::One(first) => *owners = Owners::Many(vec![*first, hit]),
            Owners::Many(hits) if hits.len() as u64 >= u64::from(NODE) => {
                return Err(InsertError::Full);
            }
            Owners::Many(hits) => hits.push(hit),
        }
        Ok(owners.all().len() as u32 - 1)
    }

    /// Stores a new mask, in a free place if there is one.
    fn place(&mut self, bits: &Bits, new: Mask<O>) -> Result<u32, InsertError> {
        if let Some(mask) = self.free.pop() {
            self.words.get_mut(mask).copy_from_slice(bits.words());
            self.masks[mask as usize] = new;
            return Ok(mask);
        }
        // The trie has at most as many nodes as masks, so its numbers do not run out before.
        if self.masks.len() as u64 >= u64::from(NODE - 1) {
            return Err(InsertError::Full);
        }
        self.words.push(bits.words());
        self.masks.push(new);
        Ok(self.masks.len() as u32 - 1)
    }

    /// The term with the shortest list. A list then is longer than one only as far as each mask in it
    /// found the lists of all its other terms as long: no popular topic gathers those masks that have
    /// a rarer term. Looks once at each term.
    fn rarest(&self, terms: &[u64]) -> u64 {
        let length = |term: &u64| match self.filed.get(*term).map(List::unpack) {
            None => 0,
            Some(List::One(_)) => 1,
            Some(List::Many(list)) => self.lists[list as usize].len(),
        };
        terms.iter().copied().min_by_key(length).unwrap_or(0)
    }

    /// Enters a new mask where queries look.
    fn file(&mut self, mask: u32) {
        let Some(terms) = self.masks[mask as usize].terms.all() else {
            self.raw.insert(&self.words, &mut self.masks, mask);
            return;
        };
        if terms.is_empty() {
            self.open.push(mask);
        } else {
            let filed = Filed {
                signature: signature(terms),
                mask,
            };
            let term = self.masks[mask as usize].filed;
            match self.filed.get(term).map(List::unpack) {
                None => {
                    self.filed.insert(term, List::One(filed).pack());
                }
                Some(List::One(first)) => {
                    let list = self.add_list(vec![first, filed]);
                    self.filed.insert(term, List::Many(list).pack());
                }
                Some(List::Many(list)) => self.lists[list as usize].push(filed),
            }
        }
        self.stated.insert(&self.words, &mut self.masks, mask);
    }

    fn add_list(&mut self, list: Vec<Filed>) -> u32 {
        if let Some(at) = self.free_lists.pop() {
            self.lists[at as usize] = list;
            return at;
        }
        // Each has two masks, so there are fewer than half as many.
        self.lists.push(list);
        self.lists.len() as u32 - 1
    }

    /// Takes one owner from a mask, and the mask away with the last. Says which owner has moved into
    /// the place that became free.
    fn remove(&mut self, mask: u32, owner: u32) -> Option<Hit<O>> {
        if let Owners::Many(hits) = &mut self.masks[mask as usize].owners {
            hits.swap_remove(owner as usize);
            if !hits.is_empty() {
                if hits.len() < hits.capacity() / 4 {
                    hits.shrink_to_fit();
                }
                return hits.get(owner as usize).copied();
            }
        }
        self.unfile(mask);
        self.forget(mask);
        let gone = &mut self.masks[mask as usize];
        gone.owners = Owners::Many(Vec::new());
        gone.terms = Needs::Raw;
        self.free.push(mask);
        None
    }

    /// Takes a mask from where queries look.
    fn unfile(&mut self, mask: u32) {
        let Some(terms) = self.masks[mask as usize].terms.all() else {
            self.raw.remove(&self.words, &mut self.masks, mask);
            return;
        };
        if terms.is_empty() {
            self.open.retain(|&other| other != mask);
        } else {
            self.strike(self.masks[mask as usize].filed, mask);
        }
        self.stated.remove(&self.words, &mut self.masks, mask);
    }

    /// Takes a mask from what is filed under a term.
    fn strike(&mut self, term: u64, mask: u32) {
        let Some(List::Many(at)) = self.filed.get(term).map(List::unpack) else {
            self.filed.remove(term);
            return;
        };
        let list = &mut self.lists[at as usize];
        if let Some(place) = list.iter().position(|filed| filed.mask == mask) {
            list.swap_remove(place);
        }
        match list[..] {
            [last] => {
                *list = Vec::new();
                self.free_lists.push(at);
                self.filed.insert(term, List::One(last).pack());
            }
            _ if list.len() < list.capacity() / 4 => list.shrink_to_fit(),
            _ => {}
        }
    }

    /// Takes a mask from the fingerprints.
    fn forget(&mut self, mask: u32) {
        let known = &self.masks[mask as usize];
        let next = known.same;
        let fingerprint = self.fingerprint(self.bits(mask), known.terms.all());
        let Some(first) = self.seen.get(fingerprint).map(|first| first as u32) else {
            return;
        };
        if first != mask {
            let mut before = first;
            while self.masks[before as usize].same != mask {
                before = self.masks[before as usize].same;
            }
            self.masks[before as usize].same = next;
        } else if next == NONE {
            self.seen.remove(fingerprint);
        } else {
            self.seen.insert(fingerprint, next.into());
        }
    }

    /// Calls `found` with the owners of each mask that a message meets; says what it looked at.
    fn query(
        &self,
        sent: &[u64],
        terms: Option<&[u64]>,
        found: &mut impl FnMut(&[Hit<O>]),
    ) -> usize {
        let view = View {
            words: &self.words,
            masks: &self.masks,
            sent,
            folded: fold(sent),
        };
        let mut visits = self.raw.query(&view, found);
        let Some(terms) = terms else {
            return visits + self.stated.query(&view, found);
        };
        let signature = signature(terms);
        visits += terms.len();
        for &term in terms {
            let one;
            let list = match self.filed.get(term).map(List::unpack) {
                None => continue,
                Some(List::One(filed)) => {
                    one = [filed];
                    &one[..]
                }
                Some(List::Many(list)) => &self.lists[list as usize],
            };
            visits += list.len();
            for filed in list {
                if filed.signature & !signature != 0 {
                    continue;
                }
                let mask = &self.masks[filed.mask as usize];
                let required = mask.terms.all().unwrap_or_default();
                if subset(required, terms) && covers(sent, self.bits(filed.mask)) {
                    found(mask.owners.all());
                }
            }
        }
        visits += self.open.len();
        for &mask in &self.open {
            if covers(sent, self.bits(mask)) {
                found(self.masks[mask as usize].owners.all());
            }
        }
        visits
    }
}

/// What a query of a trie needs of its table.
struct View<'a, O> {
    words: &'a Rows,
    masks: &'a Shelf<Mask<O>>,
    sent: &'a [u64],
    /// What was sent, folded as [`Branch::wanted`] is.
    folded: u64,
}

/// A set-trie over the bits of masks.
#[derive(Debug)]
struct Trie {
    stride: usize,
    nodes: Shelf<Node>,
    free: Vec<u32>,
}

/// A node stands for all masks that begin with the same bits.
#[derive(Debug)]
struct Node {
    /// The bits that all masks below share, after the one of the branch that leads here.
    skip: Box<[u16]>,
    /// The first of the masks that end here.
    here: u32,
    /// Where the others are, by their next bit, rising.
    branches: Vec<Branch>,
    /// The keys as bits, in a node with many of them: a message then finds its branches by words.
    index: Option<Box<[u64]>>,
}

/// A way down from a node.
#[derive(Debug, Clone, Copy)]
struct Branch {
    /// Bits that all masks there have after the key, folded: bit `b` of an address is bit `b % 64`.
    /// What a message has not got here it cannot find there. Masks that go leave it as it is.
    wanted: u64,
    /// A mask (a leaf: its further bits are its own), or [`NODE`] and a node.
    to: u32,
    /// The next bit of the masks that are there.
    key: u16,
}

/// From this number of keys on a node has an index.
const INDEXED: usize = 12;

/// The root is a node that skips nothing and may be empty.
const ROOT: u32 = 0;

impl Node {
    fn new(skip: &[u16]) -> Self {
        Self {
            skip: skip.into(),
            here: NONE,
            branches: Vec::new(),
            index: None,
        }
    }

    fn find(&self, key: u16) -> Option<usize> {
        self.branches
            .binary_search_by_key(&key, |branch| branch.key)
            .ok()
    }

    fn attach(&mut self, new: Branch, stride: usize) {
        let at = self.branches.partition_point(|branch| branch.key < new.key);
        self.branches.insert(at, new);
        let mark = |index: &mut [u64], key: u16| index[usize::from(key) / 64] |= 1 << (key % 64);
        if let Some(index) = &mut self.index {
            mark(index, new.key);
        } else if self.branches.len() == INDEXED {
            let mut index = vec![0; stride].into_boxed_slice();
            for branch in &self.branches {
                mark(&mut index, branch.key);
            }
            self.index = Some(index);
        }
    }

    fn detach(&mut self, at: usize) {
        let key = self.branches.remove(at).key;
        if self.branches.len() < INDEXED / 2 {
            self.index = None;
        } else if let Some(index) = &mut self.index {
            index[usize::from(key) / 64] &= !(1 << (key % 64));
        }
        if self.branches.len() < self.branches.capacity() / 4 {
            self.branches.shrink_to_fit();
        }
    }
}

impl Trie {
    fn new(stride: usize) -> Self {
        let mut nodes = Shelf::default();
        nodes.push(Node::new(&[]));
        Self {
            stride,
            nodes,
            free: Vec::new(),
        }
    }

    fn path(words: &Rows, mask: u32) -> Vec<u16> {
        ones(words.get(mask)).map(|bit| bit as u16).collect()
    }

    fn add(&mut self, node: Node) -> u32 {
        match self.free.pop() {
            Some(at) => {
                self.nodes[at as usize] = node;
                at
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() as u32 - 1
            }
        }
    }

    /// Puts a mask whose bits after those of the node and its skip are `rest` into the node, which
    /// has no branch for it.
    fn settle(&mut self, node: u32, rest: &[u16], mask: u32) {
        let stride = self.stride;
        let node = &mut self.nodes[node as usize];
        match rest {
            [] => node.here = mask,
            [key, after @ ..] => node.attach(
                Branch {
                    wanted: folded(after),
                    to: mask,
                    key: *key,
                },
                stride,
            ),
        }
    }

    fn insert<O>(&mut self, words: &Rows, masks: &mut Shelf<Mask<O>>, mask: u32) {
        let path = Self::path(words, mask);
        masks[mask as usize].twin = NONE;
        let mut at = ROOT;
        let mut depth = 0;
        loop {
            let shared = shared(&self.nodes[at as usize].skip, &path[depth..]);
            if shared < self.nodes[at as usize].skip.len() {
                self.split(at, shared);
            }
            depth += shared;
            let Some(key) = path.get(depth) else {
                let here = &mut self.nodes[at as usize].here;
                masks[mask as usize].twin = *here;
                *here = mask;
                return;
            };
            let node = &mut self.nodes[at as usize];
            let Some(branch) = node.find(*key) else {
                self.settle(at, &path[depth..], mask);
                return;
            };
            depth += 1;
            node.branches[branch].wanted &= folded(&path[depth..]);
            let below = node.branches[branch].to;
            if below & NODE != 0 {
                at = below & !NODE;
                continue;
            }
            let other = Self::path(words, below);
            if other == path {
                masks[mask as usize].twin = below;
                self.nodes[at as usize].branches[branch].to = mask;
                return;
            }
            let (mine, other) = (&path[depth..], &other[depth..]);
            let skip = self::shared(mine, other);
            let fork = self.add(Node::new(&mine[..skip]));
            self.settle(fork, &mine[skip..], mask);
            self.settle(fork, &other[skip..], below);
            self.nodes[at as usize].branches[branch].to = fork | NODE;
            return;
        }
    }

    /// Shortens a node's skip to `keep` bits; what it was goes one branch below.
    ///
    /// Of what the masks of that branch have in common no more is known then than what they skip.
    fn split(&mut self, at: u32, keep: usize) {
        let stride = self.stride;
        let old = &mut self.nodes[at as usize];
        let key = old.skip[keep];
        let mut lower = std::mem::replace(old, Node::new(&old.skip[..keep]));
        lower.skip = lower.skip[keep + 1..].into();
        let branch = Branch {
            wanted: folded(&lower.skip),
            to: self.add(lower) | NODE,
            key,
        };
        self.nodes[at as usize].attach(branch, stride);
    }

    fn remove<O>(&mut self, words: &Rows, masks: &mut Shelf<Mask<O>>, mask: u32) {
        let path = Self::path(words, mask);
        // The node above `at`, and the branch from it to there.
        let mut above = None;
        let mut at = ROOT;
        let mut depth = 0;
        loop {
            let node = &mut self.nodes[at as usize];
            depth += node.skip.len();
            let Some(key) = path.get(depth) else {
                unlink(masks, &mut node.here, mask);
                break;
            };
            let Some(branch) = node.find(*key) else {
                return;
            };
            let to = &mut node.branches[branch].to;
            if *to & NODE != 0 {
                above = Some((at, branch));
                at = *to & !NODE;
                depth += 1;
                continue;
            }
            unlink(masks, to, mask);
            if *to == NONE {
                node.detach(branch);
            }
            break;
        }
        if let Some((above, branch)) = above {
            self.shrink(words, above, branch, at);
        }
    }

    /// Does away with a node that holds one thing only.
    fn shrink(&mut self, words: &Rows, above: u32, branch: usize, at: u32) {
        let node = &self.nodes[at as usize];
        let only = match (&node.branches[..], node.here) {
            ([], here) => here,
            ([only], NONE) => only.to,
            _ => return,
        };
        if only & NODE != 0 && only != NONE {
            let lower = &self.nodes[(only & !NODE) as usize];
            let skip = [&node.skip, &[node.branches[0].key][..], &lower.skip].concat();
            self.nodes[(only & !NODE) as usize].skip = skip.into();
        }
        self.nodes[at as usize] = Node::new(&[]);
        self.free.push(at);
        let way = &mut self.nodes[above as usize].branches[branch];
        way.to = only;
        if only & NODE == 0 {
            way.wanted = fold(words.get(only));
        }
    }

    fn query<O>(&self, view: &View<'_, O>, found: &mut impl FnMut(&[Hit<O>])) -> usize {
        let mut visits = 0;
        self.visit(ROOT, view, found, &mut visits);
        visits
    }

    /// The depth of this recursion is that of the trie: one frame for each bit of the message at most,
    /// which are 2048.
    fn visit<O>(
        &self,
        at: u32,
        view: &View<'_, O>,
        found: &mut impl FnMut(&[Hit<O>]),
        visits: &mut usize,
    ) {
        let sent = view.sent;
        let node = &self.nodes[at as usize];
        *visits += 1;
        let has = |key: u16| sent[usize::from(key) / 64] >> (key % 64) & 1 == 1;
        if !node.skip.iter().all(|&key| has(key)) {
            return;
        }
        if node.here != NONE {
            self.leaf(node.here, view, found, visits);
        }
        if let Some(index) = &node.index {
            let mut before = 0;
            for (&keys, &sent) in index.iter().zip(sent) {
                let mut both = keys & sent;
                while both != 0 {
                    let below = keys & ((both & both.wrapping_neg()) - 1);
                    let branch = node.branches[before + below.count_ones() as usize];
                    self.descend(branch, view, found, visits);
                    both &= both - 1;
                }
                before += keys.count_ones() as usize;
            }
        } else {
            for branch in &node.branches {
                if has(branch.key) {
                    self.descend(*branch, view, found, visits);
                }
            }
        }
    }

    fn descend<O>(
        &self,
        branch: Branch,
        view: &View<'_, O>,
        found: &mut impl FnMut(&[Hit<O>]),
        visits: &mut usize,
    ) {
        if branch.wanted & !view.folded != 0 {
            return;
        }
        if branch.to & NODE != 0 {
            self.visit(branch.to & !NODE, view, found, visits);
        } else {
            self.leaf(branch.to, view, found, visits);
        }
    }

    /// All masks with the bits of this one.
    fn leaf<O>(
        &self,
        first: u32,
        view: &View<'_, O>,
        found: &mut impl FnMut(&[Hit<O>]),
        visits: &mut usize,
    ) {
        *visits += 1;
        if !covers(view.sent, view.words.get(first)) {
            return;
        }
        let mut mask = first;
        while mask != NONE {
            let one = &view.masks[mask as usize];
            found(one.owners.all());
            mask = one.twin;
        }
    }
}

/// The bits of an address, in one word.
fn fold(words: &[u64]) -> u64 {
    words.iter().fold(0, |all, word| all | word)
}

/// The same of a path.
fn folded(path: &[u16]) -> u64 {
    path.iter().fold(0, |all, key| all | 1 << (key % 64))
}

/// How many bits two paths share at their beginning.
fn shared(a: &[u16], b: &[u16]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Takes a mask from a list of twins.
fn unlink<O>(masks: &mut Shelf<Mask<O>>, first: &mut u32, mask: u32) {
    let next = masks[mask as usize].twin;
    let mut at = *first;
    if at == mask {
        *first = next;
        return;
    }
    while at != NONE {
        let twin = &mut masks[at as usize].twin;
        if *twin == mask {
            *twin = next;
            return;
        }
        at = *twin;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bloom::{Key, WIDTHS, expand_message, expand_required};
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::time::Instant;

    /// A generator of our own: the same tables in each run.
    struct Dice(u64);

    impl Dice {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ z >> 31
        }

        fn below(&mut self, n: u64) -> u64 {
            self.next() % n
        }

        /// `n` throws for the bits of an address of 512.
        fn bits(&mut self, n: u64) -> Bits {
            let mut bits = Bits::zero(512).unwrap();
            for _ in 0..n {
                bits.set(self.below(512) as usize);
            }
            bits
        }
    }

    fn key() -> Key {
        Key::new([7; 16])
    }

    fn raw(id: u64, owner: u32, bits: Bits) -> Match<u32> {
        Match {
            id,
            owner,
            bits,
            terms: None,
        }
    }

    fn stated(id: u64, owner: u32, packed: &str) -> Match<u32> {
        let terms = expand_required(packed.as_bytes()).unwrap();
        let bits = terms.bits(&key(), 512).unwrap();
        Match {
            id,
            owner,
            bits,
            terms: Some(terms.hashes(&key())),
        }
    }

    fn message(packed: &str) -> (Bits, Box<[u64]>) {
        let terms = expand_message(packed.as_bytes()).unwrap();
        (terms.bits(&key(), 512).unwrap(), terms.hashes(&key()))
    }

    fn ids(index: &MatchIndex<u32>, sent: &Bits, terms: Option<&[u64]>) -> Vec<u64> {
        let mut hits = Vec::new();
        index.query(sent, terms, &mut hits);
        let mut ids: Vec<u64> = hits.iter().map(|hit| hit.id).collect();
        ids.sort_unstable();
        ids
    }

    /// The rule itself, without any index.
    fn meets(grant: &Match<u32>, sent: &Bits, terms: Option<&[u64]>) -> bool {
        let exact = match (&grant.terms, terms) {
            (Some(required), Some(terms)) => required.iter().all(|term| terms.contains(term)),
            _ => true,
        };
        sent.contains(&grant.bits) && exact
    }

    /// The folded bits that all masks of a branch have.
    fn shared_below(table: &Table<u32>, trie: &Trie, to: u32) -> u64 {
        if to & NODE == 0 {
            return fold(table.bits(to));
        }
        let node = &trie.nodes[(to & !NODE) as usize];
        let here = (node.here != NONE).then_some(node.here);
        let below = node.branches.iter().map(|branch| branch.to);
        here.into_iter()
            .chain(below)
            .fold(!0, |all, to| all & shared_below(table, trie, to))
    }

    /// What holds of each trie and table after any change.
    fn check(index: &MatchIndex<u32>) {
        for table in &index.tables {
            let mut filed = 0;
            for trie in [&table.raw, &table.stated] {
                let mut masks = 0;
                for (at, node) in trie.nodes.iter().enumerate() {
                    let keys = node.branches.iter().map(|branch| usize::from(branch.key));
                    assert!(keys.clone().is_sorted_by(|a, b| a < b));
                    assert!(keys.len() < INDEXED || node.index.is_some());
                    if let Some(index) = &node.index {
                        assert!(ones(index).eq(keys.clone()));
                    }
                    let things = keys.len() + usize::from(node.here != NONE);
                    assert!(things >= 2 || at == 0 || trie.free.contains(&(at as u32)));
                    for branch in &node.branches {
                        let all = shared_below(table, trie, branch.to);
                        assert_eq!(branch.wanted & !all, 0, "more is wanted than all have");
                    }
                    let leaves = node.branches.iter().map(|branch| branch.to);
                    let leaves = leaves.filter(|to| to & NODE == 0);
                    for first in leaves.chain((node.here != NONE).then_some(node.here)) {
                        let mut mask = first;
                        while mask != NONE {
                            masks += 1;
                            mask = table.masks[mask as usize].twin;
                        }
                    }
                }
                assert!(trie.nodes.len() - trie.free.len() <= masks.max(1));
                filed += masks;
            }
            assert_eq!(filed, table.masks.len() - table.free.len());
            let filed = table.filed.values().map(List::unpack);
            let lists: usize = filed
                .map(|list| match list {
                    List::One(_) => 1,
                    List::Many(list) => table.lists[list as usize].len(),
                })
                .sum();
            let spare = table.lists.iter().filter(|list| list.is_empty()).count();
            assert_eq!(spare, table.free_lists.len());
            let terms = table
                .masks
                .iter()
                .filter(|mask| mask.terms.all().is_some())
                .count();
            assert_eq!(lists + table.open.len(), terms);
            assert_eq!(table.words.len(), table.masks.len());
        }
    }

    #[test]
    fn a_subscription_hears_what_has_all_its_terms() {
        let mut index = MatchIndex::new();
        for (id, packed) in [
            "org.example\0lang=de",
            "org.example",
            "org.exam",
            "\0lang=en",
            "",
            "org",
        ]
        .iter()
        .enumerate()
        {
            index.insert(stated(id as u64, id as u32, packed)).unwrap();
        }
        let (sent, terms) = message("org.example.News\0lang=de");
        assert_eq!(ids(&index, &sent, Some(&terms)), [0, 1, 4, 5]);
        assert_eq!(ids(&index, &sent, None), [0, 1, 4, 5]);
        let (sent, terms) = message("");
        assert_eq!(ids(&index, &sent, Some(&terms)), [4]);
    }

    #[test]
    fn the_exact_check_comes_after_the_bits() {
        let mut index = MatchIndex::new();
        index.insert(stated(1, 1, "\0a=b")).unwrap();
        let (mut sent, terms) = message("\0c=d");
        sent.words_mut().fill(!0);
        assert!(
            ids(&index, &sent, Some(&terms)).is_empty(),
            "a false positive of the bloom"
        );
        assert_eq!(
            ids(&index, &sent, None),
            [1],
            "a raw message has nothing but bits"
        );
        let (_, terms) = message("\0a=b");
        let none = Bits::zero(512).unwrap();
        assert!(
            ids(&index, &none, Some(&terms)).is_empty(),
            "terms do not stand in for bits"
        );
    }

    #[test]
    fn an_empty_grant_hears_all_of_its_width() {
        let mut index = MatchIndex::new();
        for (id, width) in WIDTHS.into_iter().enumerate() {
            index
                .insert(raw(id as u64, 0, Bits::zero(width).unwrap()))
                .unwrap();
        }
        for (id, width) in WIDTHS.into_iter().enumerate() {
            let mut sent = Bits::zero(width).unwrap();
            assert_eq!(ids(&index, &sent, None), [id as u64]);
            sent.set(width - 1);
            assert_eq!(ids(&index, &sent, Some(&[5])), [id as u64]);
        }
    }

    #[test]
    fn equal_masks_are_stored_once() {
        let mut index = MatchIndex::new();
        for id in 0..1000 {
            index
                .insert(stated(id, id as u32 % 10, "a.b\0c=d"))
                .unwrap();
        }
        assert_eq!((index.len(), index.masks()), (1000, 1));
        let (sent, terms) = message("a.b.c\0c=d");
        let mut hits = Vec::new();
        assert!(index.query_counted(&sent, Some(&terms), &mut hits) < 10);
        assert_eq!(hits.len(), 1000);
        assert_eq!((index.owner(7), index.owner(1000)), (Some(7), None));
        for id in 0..1000 {
            assert!(index.remove(id));
            assert_eq!(
                ids(&index, &sent, Some(&terms)),
                Vec::from_iter(id + 1..1000)
            );
        }
        assert_eq!((index.len(), index.masks()), (0, 0));
        check(&index);
    }

    #[test]
    fn an_id_names_one_grant() {
        let mut index = MatchIndex::new();
        let mut bits = Bits::zero(512).unwrap();
        bits.set(3);
        index.insert(raw(1, 1, bits.clone())).unwrap();
        let other = raw(1, 2, Bits::zero(1024).unwrap());
        assert_eq!(index.insert(other), Err(InsertError::Duplicate));
        assert_eq!(index.len(), 1);
        assert_eq!(ids(&index, &bits, None), [1]);
        assert_eq!(index.owner(1), Some(1));
        assert!(index.remove(1) && index.owner(1).is_none() && !index.remove(1));
        assert!(index.is_empty());
    }

    /// Masks that are each other's beginning are the deepest trie there is.
    #[test]
    fn nested_masks_are_found_and_removed() {
        let mut index = MatchIndex::new();
        let mut bits = Bits::zero(2048).unwrap();
        for bit in 0..2048 {
            index.insert(raw(bit as u64, 0, bits.clone())).unwrap();
            bits.set(bit);
        }
        check(&index);
        assert_eq!(ids(&index, &bits, None).len(), 2048);
        for id in (0..2048).step_by(2) {
            index.remove(id);
        }
        check(&index);
        assert_eq!(
            ids(&index, &bits, None),
            Vec::from_iter((1..2048).step_by(2))
        );
        for id in 0..2048 {
            index.remove(id);
        }
        check(&index);
    }

    /// Two masks of all bits but the last share one node, not two thousand.
    #[test]
    fn long_masks_cost_few_nodes() {
        let mut index = MatchIndex::new();
        for id in 0..64 {
            let mut bits = Bits::zero(2048).unwrap();
            bits.words_mut().fill(!0);
            bits.words_mut()[31] &= !(1 << id);
            index.insert(raw(id, 0, bits)).unwrap();
        }
        check(&index);
        assert!(index.tables[0].raw.nodes.len() <= 64);
    }

    /// `n` subscriptions to one popular topic and a device of their own each.
    fn devices(n: u64) -> MatchIndex<u32> {
        let mut index = MatchIndex::new();
        for id in 0..n {
            let packed = format!("plant.sensors\0device={id}\0unit=celsius");
            index.insert(stated(id, id as u32, &packed)).unwrap();
        }
        index
    }

    /// What a message costs grows with what it finds, not with the table.
    #[test]
    fn visits_do_not_grow_with_the_table() {
        let (sent, terms) = message("plant.sensors.hall\0device=77\0floor=3\0unit=celsius");
        let visits = |index: &MatchIndex<u32>| {
            let mut hits = Vec::new();
            let visits = index.query_counted(&sent, Some(&terms), &mut hits);
            assert_eq!(hits, [Hit { owner: 77, id: 77 }]);
            visits
        };
        let (small, large) = (visits(&devices(1000)), visits(&devices(50_000)));
        assert!(
            large <= small + 8,
            "{small} visits of 1000 masks, {large} of 50000"
        );
        assert!(large < 20, "{large} visits");

        let mut index = devices(1000);
        for id in 1000..1100 {
            let packed = format!("plant.sensors\0device=77\0note={id}");
            index.insert(stated(id, id as u32, &packed)).unwrap();
        }
        let notes: String = (1000..1050).map(|id| format!("\0note={id}")).collect();
        let (sent, terms) = message(&format!("plant.sensors\0device=77{notes}\0unit=celsius"));
        let mut hits = Vec::new();
        let visits = index.query_counted(&sent, Some(&terms), &mut hits);
        assert_eq!(hits.len(), 51);
        assert!(visits < 51 * 3, "{visits} visits for 51 hits");
    }

    #[test]
    fn raw_masks_are_visited_by_their_bits() {
        let mut dice = Dice(1);
        let mut index = MatchIndex::new();
        for id in 0..20_000 {
            let n = 8 + dice.below(17);
            index.insert(raw(id, 0, dice.bits(n))).unwrap();
        }
        check(&index);
        for _ in 0..20 {
            let sent = dice.bits(40);
            let visits = index.query_counted(&sent, None, &mut Vec::new());
            assert!(visits < 20_000 / 20, "{visits} visits of 20000 masks");
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(Match<u32>),
        Remove(u64),
        Query(Bits, Option<Vec<u64>>),
    }

    /// Bits out of a few, so that masks share beginnings and contain each other, or out of all.
    fn some_bits() -> impl Strategy<Value = Bits> {
        let few = prop::collection::vec(0..14usize, 0..7);
        let many = prop::collection::vec(0..2048usize, 0..60);
        (
            prop::sample::select(vec![512, 512, 512, 1024, 2048]),
            prop_oneof![4 => few, 1 => many],
        )
            .prop_map(|(width, set)| {
                let mut bits = Bits::zero(width).unwrap();
                for bit in set {
                    bits.set(bit * 61 % width);
                }
                bits
            })
    }

    fn some_terms(n: usize) -> impl Strategy<Value = Option<Vec<u64>>> {
        let term = (0..9u64).prop_map(|term| term.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        prop::option::of(prop::collection::vec(term, 0..n))
    }

    fn step() -> impl Strategy<Value = Step> {
        let insert =
            (0..60u64, 0..4u32, some_bits(), some_terms(4)).prop_map(|(id, owner, bits, terms)| {
                Step::Insert(Match {
                    id,
                    owner,
                    bits,
                    terms: terms.map(Into::into),
                })
            });
        let query = (some_bits(), 0..3u8, some_terms(8)).prop_map(|(mut bits, wide, terms)| {
            // A message has more bits than a mask, or hardly any query would find anything.
            if wide > 0 {
                let width = bits.width();
                (0..14)
                    .filter(|bit| wide > 1 || bit % 3 > 0)
                    .for_each(|bit| bits.set(bit * 61 % width));
            }
            let terms = terms.map(|mut terms| {
                terms.sort_unstable();
                terms.dedup();
                terms
            });
            Step::Query(bits, terms)
        });
        prop_oneof![5 => insert, 2 => (0..60u64).prop_map(Step::Remove), 3 => query]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn the_index_finds_what_a_scan_finds(steps in prop::collection::vec(step(), 1..200)) {
            let mut index = MatchIndex::new();
            let mut grants: HashMap<u64, Match<u32>> = HashMap::new();
            for step in steps {
                match step {
                    Step::Insert(grant) => {
                        let known = grants.contains_key(&grant.id);
                        prop_assert_eq!(index.insert(grant.clone()).is_err(), known);
                        grants.entry(grant.id).or_insert(grant);
                    }
                    Step::Remove(id) => {
                        prop_assert_eq!(index.remove(id), grants.remove(&id).is_some());
                    }
                    Step::Query(sent, terms) => {
                        let terms = terms.as_deref();
                        let met = grants.values().filter(|grant| meets(grant, &sent, terms));
                        let mut want: Vec<u64> = met.map(|grant| grant.id).collect();
                        want.sort_unstable();
                        prop_assert_eq!(ids(&index, &sent, terms), want);
                    }
                }
                prop_assert_eq!(index.len(), grants.len());
                for id in 0..60 {
                    prop_assert_eq!(index.owner(id), grants.get(&id).map(|grant| grant.owner));
                }
            }
            check(&index);
            let masks: std::collections::HashSet<_> = grants.values().map(|grant| {
                let mut terms = grant.terms.clone().map(Vec::from);
                terms.iter_mut().for_each(|terms| { terms.sort_unstable(); terms.dedup() });
                (grant.bits.clone(), terms)
            }).collect();
            prop_assert_eq!(index.masks(), masks.len());
            for id in 0..60 {
                index.remove(id);
            }
            check(&index);
            prop_assert_eq!(index.masks(), 0);
            for table in &index.tables {
                prop_assert!(table.filed.len() + table.seen.len() == 0 && table.open.is_empty());
                prop_assert!([&table.raw, &table.stated].iter().all(|trie| trie.nodes.len() == trie.free.len() + 1));
            }
        }
    }

    /// Resident memory of this process in bytes.
    fn resident() -> f64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        statm
            .split(' ')
            .nth(1)
            .and_then(|pages| pages.parse::<f64>().ok())
            .unwrap_or(0.0)
            * 4096.0
    }

    /// Median and worst of `n` queries in microseconds, with mean hits and visits.
    fn measure(index: &MatchIndex<u32>, sent: &[(Bits, Option<Box<[u64]>>)]) -> String {
        let mut hits = Vec::new();
        let (mut times, mut found, mut visits) = (Vec::new(), 0, 0);
        for (bits, terms) in sent {
            hits.clear();
            let start = Instant::now();
            visits += index.query_counted(bits, terms.as_deref(), &mut hits);
            times.push(start.elapsed().as_nanos() as f64 / 1000.0);
            found += hits.len();
        }
        times.sort_by(f64::total_cmp);
        let n = times.len();
        format!(
            "p50 {:8.2} us  p99 {:8.2} us  hits {:7.1}  visits {:8.1}",
            times[n / 2],
            times[n * 99 / 100],
            found as f64 / n as f64,
            visits as f64 / n as f64
        )
    }

    /// `cargo test --release -- --ignored --nocapture figures_of_the_index`
    #[test]
    #[ignore = "prints figures, checks nothing"]
    fn figures_of_the_index() {
        for n in [10_000, 100_000, 1_000_000u64] {
            let mut dice = Dice(2);
            let before = resident();
            let start = Instant::now();
            let mut index = MatchIndex::new();
            let packed = |dice: &mut Dice, id: u64| {
                format!(
                    "plant.hall{}.sensors\0device={id}\0unit={}",
                    dice.below(100),
                    dice.below(10)
                )
            };
            let mut made = Vec::new();
            for id in 0..n {
                let packed = packed(&mut dice, id);
                index.insert(stated(id, id as u32, &packed)).unwrap();
                made.push(packed);
            }
            println!(
                "{n:8} term masks: {:.2} us and {:.0} bytes each (hashing included)",
                start.elapsed().as_micros() as f64 / n as f64,
                (resident() - before) / n as f64
            );
            let sent: Vec<_> = (0..10_000)
                .map(|_| message(&format!("{}\0x=3\0y=7\0z=x", made[dice.below(n) as usize])))
                .collect();
            let stated: Vec<_> = sent
                .iter()
                .map(|(b, t)| (b.clone(), Some(t.clone())))
                .collect();
            println!("           terms message  {}", measure(&index, &stated));
            let raws: Vec<_> = sent
                .iter()
                .take(1000)
                .map(|(b, _)| (b.clone(), None))
                .collect();
            println!("           raw message    {}", measure(&index, &raws));
            let start = Instant::now();
            for id in 0..n {
                index.remove(id);
            }
            println!(
                "           removal        {:.2} us",
                start.elapsed().as_micros() as f64 / n as f64
            );
        }
        for n in [10_000, 100_000, 1_000_000u64] {
            let mut dice = Dice(3);
            let before = resident();
            let start = Instant::now();
            let mut index = MatchIndex::new();
            for id in 0..n {
                let bits = 8 + dice.below(17);
                index.insert(raw(id, 0, dice.bits(bits))).unwrap();
            }
            println!(
                "{n:8} raw masks:  {:.2} us and {:.0} bytes each",
                start.elapsed().as_micros() as f64 / n as f64,
                (resident() - before) / n as f64
            );
            for bits in [40, 80, 160] {
                let sent: Vec<_> = (0..1000).map(|_| (dice.bits(bits), None)).collect();
                println!("           {bits:3} bits       {}", measure(&index, &sent));
            }
        }
    }
}
