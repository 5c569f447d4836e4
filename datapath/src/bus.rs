//! One bus as the switch knows it: who owns which address, who wants which multicasts, and the ways already worked out.
//!
//! Invariants:
//! 1. An address has at most one owner (D3).
//! 2. A cached way is used only while the matches are those from which it was computed (`version`).

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::bloom::{self, Bits, Key};
use crate::endpoint::{Ref, RefMap};
use crate::matching::{Match, MatchIndex};

/// What happens when a subscriber's ring is full (D12).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Overflow {
    /// It reads a gap record.
    Gap,
    /// It gets only the newest of each stream.
    Conflate,
    /// It is cut off.
    Disconnect,
    /// Senders wait, at most so many milliseconds; then a gap.
    Block(u32),
}

/// A subscription that the master granted.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// Who receives.
    pub owner: Ref,
    /// The required bits.
    pub bits: Bits,
    /// The required terms, sorted hashes; `None` for raw bits.
    pub terms: Option<Box<[u64]>>,
    /// What happens when its ring is full.
    pub overflow: Overflow,
}

/// What is kept of a subscription where messages find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wisher {
    to: Ref,
    overflow: Overflow,
}

/// Where messages with certain terms go.
pub struct Way {
    /// Bits of the address.
    pub bits: Bits,
    /// Sorted hashes of the terms.
    pub hashes: Box<[u64]>,
    /// Receivers, each once, with the match that counts for overflow.
    pub targets: Vec<Target>,
    version: u64,
}

/// One receiver of a multicast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Who.
    pub to: Ref,
    /// By which match; when several fit, the one with the strongest wish.
    pub by: u64,
    /// What happens when its ring is full.
    pub overflow: Overflow,
}

/// Ways kept per bus at most; when there are more, all are worked out anew.
const MAX_WAYS: usize = 4096;

/// A bus.
pub struct Bus {
    /// Owners of addresses.
    pub owners: HashMap<Box<[u8]>, Ref>,
    /// Endpoints by provisional address.
    pub provisional: HashMap<Box<[u8]>, Ref>,
    /// The master, while it lives.
    pub master: Option<Ref>,
    /// Its number in the cluster, if it is a bus of the cluster.
    pub number: Option<u32>,
    /// Trunks to the nodes where owners of names are.
    pub routes: HashMap<Box<[u8]>, usize>,
    /// The trunk to the node where the master is, and the master's address, while it is elsewhere.
    pub master_away: Option<(usize, Box<[u8]>)>,
    /// Whether its order allows lanes, and its agent wants them (D11).
    pub has_lanes: bool,
    /// Those who see a copy of everything.
    pub monitors: Vec<Ref>,
    /// Width of its multicast addresses in bits.
    pub width: usize,
    key: Key,
    /// Subscriptions, by what they want to hear.
    index: MatchIndex<Wisher>,
    /// The numbers of each subscriber's, so that one who goes costs no look at those of others.
    numbers: RefMap<BTreeSet<u64>>,
    version: u64,
    ways: HashMap<Box<[u8]>, Arc<Way>>,
}

impl Bus {
    /// An empty bus. `width` is 512, 1024 or 2048.
    #[must_use]
    pub fn new(width: usize, key: [u8; 16]) -> Self {
        Self {
            owners: HashMap::new(),
            provisional: HashMap::new(),
            master: None,
            number: None,
            routes: HashMap::new(),
            master_away: None,
            has_lanes: false,
            monitors: Vec::new(),
            width,
            key: Key::new(key),
            index: MatchIndex::default(),
            numbers: RefMap::default(),
            version: 0,
            ways: HashMap::new(),
        }
    }

    /// Bits and exact hashes that a subscription or grant with these terms requires.
    ///
    /// # Errors
    /// A sentence that names what is wrong with the terms.
    pub fn required(&self, packed: &[u8]) -> Result<(Bits, Box<[u64]>), String> {
        let terms = bloom::expand_required(packed).map_err(|e| e.to_string())?;
        let bits = terms
            .bits(&self.key, self.width)
            .map_err(|e| e.to_string())?;
        Ok((bits, terms.hashes(&self.key)))
    }

    /// Adds a subscription. `false` when the number is taken or the width is not that of the bus.
    pub fn subscribe(&mut self, id: u64, wish: Subscription) -> bool {
        if wish.bits.width() != self.width {
            return false;
        }
        let added = self.index.insert(Match {
            id,
            owner: Wisher {
                to: wish.owner,
                overflow: wish.overflow,
            },
            bits: wish.bits,
            terms: wish.terms,
        });
        if added.is_err() {
            return false;
        }
        self.numbers.entry(wish.owner).or_default().insert(id);
        self.version += 1;
        true
    }

    /// Removes a subscription; returns whether there was one.
    pub fn unsubscribe(&mut self, id: u64) -> bool {
        let Some(owner) = self.subscriber(id) else {
            return false;
        };
        if let Some(numbers) = self.numbers.get_mut(&owner) {
            numbers.remove(&id);
            if numbers.is_empty() {
                self.numbers.remove(&owner);
            }
        }
        self.version += 1;
        self.index.remove(id)
    }

    /// Whose subscription has this number.
    #[must_use]
    pub fn subscriber(&self, id: u64) -> Option<Ref> {
        self.index.owner(id).map(|wisher| wisher.to)
    }

    /// How many subscriptions an endpoint has.
    #[must_use]
    pub fn subscriptions(&self, who: Ref) -> usize {
        self.numbers.get(&who).map_or(0, BTreeSet::len)
    }

    /// The way of a message with these packed terms, worked out at most once per version of the matches.
    ///
    /// # Errors
    /// A sentence that names what is wrong with the terms.
    pub fn way(&mut self, packed: &[u8]) -> Result<Arc<Way>, String> {
        if let Some(way) = self.ways.get(packed)
            && way.version == self.version
        {
            return Ok(way.clone());
        }
        let terms = bloom::expand_message(packed).map_err(|e| e.to_string())?;
        let bits = terms
            .bits(&self.key, self.width)
            .map_err(|e| e.to_string())?;
        let hashes = terms.hashes(&self.key);
        let targets = self.targets(&bits, Some(&hashes));
        if self.ways.len() >= MAX_WAYS {
            self.ways.clear();
        }
        let way = Arc::new(Way {
            bits,
            hashes,
            targets,
            version: self.version,
        });
        self.ways.insert(packed.into(), way.clone());
        Ok(way)
    }

    /// Everyone who receives a message with these bits (and terms), each once.
    #[must_use]
    pub fn targets(&self, bits: &Bits, terms: Option<&[u64]>) -> Vec<Target> {
        let mut found = Vec::new();
        self.index.query(bits, terms, &mut found);
        let mut targets: Vec<Target> = found
            .iter()
            .map(|hit| Target {
                to: hit.owner.to,
                by: hit.id,
                overflow: hit.owner.overflow,
            })
            .collect();
        targets.sort_unstable_by_key(|t| (t.to, std::cmp::Reverse(t.overflow), t.by));
        targets.dedup_by_key(|t| t.to);
        targets
    }

    /// Everyone who hears multicasts at all, each once.
    #[must_use]
    pub fn everybody(&self) -> Vec<Target> {
        let mut targets: Vec<Target> = self
            .numbers
            .iter()
            .filter_map(|(to, numbers)| {
                let by = *numbers.first()?;
                let overflow = self.index.owner(by)?.overflow;
                Some(Target {
                    to: *to,
                    by,
                    overflow,
                })
            })
            .collect();
        targets.sort_unstable_by_key(|t| t.to);
        targets
    }

    /// Forgets everything that leads to a trunk.
    pub fn forget_trunk(&mut self, slot: usize) {
        self.routes.retain(|_, trunk| *trunk != slot);
        self.master_away.take_if(|(trunk, _)| *trunk == slot);
    }

    /// Forgets an endpoint completely.
    pub fn forget(&mut self, who: Ref) {
        self.owners.retain(|_, owner| *owner != who);
        self.provisional.retain(|_, owner| *owner != who);
        self.monitors.retain(|monitor| *monitor != who);
        for id in self.numbers.remove(&who).unwrap_or_default() {
            self.index.remove(id);
            self.version += 1;
        }
        if self.master == Some(who) {
            self.master = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(slot: u32) -> Ref {
        Ref { slot, turn: 1 }
    }

    fn subscribe(bus: &mut Bus, id: u64, slot: u32, packed: &[u8]) {
        let (bits, terms) = bus.required(packed).unwrap();
        let wish = Subscription {
            owner: endpoint(slot),
            bits,
            terms: Some(terms),
            overflow: Overflow::Block(id as u32),
        };
        assert!(bus.subscribe(id, wish));
    }

    fn receivers(bus: &mut Bus, packed: &[u8]) -> Vec<(u32, u64)> {
        let way = bus.way(packed).unwrap();
        way.targets.iter().map(|t| (t.to.slot, t.by)).collect()
    }

    /// Who goes takes its own subscriptions along, and each way is worked out anew.
    #[test]
    fn d8_who_goes_hears_no_more_and_the_others_do() {
        let mut bus = Bus::new(512, [3; 16]);
        subscribe(&mut bus, 1, 7, b"a.b");
        subscribe(&mut bus, 2, 7, b"a.c");
        subscribe(&mut bus, 3, 8, b"a.b");
        assert_eq!(receivers(&mut bus, b"a.b"), [(7, 1), (8, 3)]);
        assert_eq!(bus.subscriber(2), Some(endpoint(7)));
        assert_eq!(bus.subscriptions(endpoint(7)), 2);
        bus.forget(endpoint(7));
        assert_eq!(receivers(&mut bus, b"a.b"), [(8, 3)]);
        assert_eq!(
            (bus.subscriber(2), bus.subscriptions(endpoint(7))),
            (None, 0)
        );
        assert!(!bus.unsubscribe(1) && bus.unsubscribe(3) && !bus.unsubscribe(3));
        assert!(receivers(&mut bus, b"a.b").is_empty());
        assert!(bus.everybody().is_empty() && bus.numbers.is_empty());
    }

    /// Everybody is there once, by the first of his subscriptions.
    #[test]
    fn d9_everybody_is_there_once() {
        let mut bus = Bus::new(512, [3; 16]);
        for (id, slot) in [(5, 2), (4, 1), (3, 2), (9, 1)] {
            subscribe(&mut bus, id, slot, b"a");
        }
        let all = bus.everybody();
        let found: Vec<_> = all.iter().map(|t| (t.to.slot, t.by, t.overflow)).collect();
        assert_eq!(
            found,
            [(1, 4, Overflow::Block(4)), (2, 3, Overflow::Block(3))]
        );
        // Of several that fit, the one with the strongest wish counts.
        assert_eq!(receivers(&mut bus, b"a"), [(1, 9), (2, 5)]);
    }
}
