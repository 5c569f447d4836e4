//! One bus as the switch knows it: who owns which address, who wants which multicasts, and the ways already worked out.
//!
//! Invariants:
//! 1. An address has at most one owner (D3).
//! 2. A cached way is used only while the matches are those from which it was computed (`version`).

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use crate::bloom::{self, Bits, Key, Terms};
use crate::endpoint::{Ref, RefMap};
use crate::matching::{Hit, Match, MatchIndex};

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
#[derive(Clone, Default)]
pub struct Way {
    /// Bits of the address.
    pub bits: Bits,
    /// Sorted hashes of the terms.
    pub hashes: Vec<u64>,
    /// Receivers, each once, with the match that counts for overflow.
    pub targets: Vec<Target>,
    /// Of which version of the matches it is.
    version: u64,
    /// The terms.
    packed: Vec<u8>,
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

/// Terms that are remembered for having been sent once.
const ONCE: usize = 4096;

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
    /// Ways by a hash of the terms. Only those are kept that are wanted again: where each message is
    /// about something new, to keep and to forget them would cost more than all else.
    ways: HashMap<u64, Arc<Way>>,
    /// Half of the hash of terms that were sent, by the other half.
    once: Box<[u32]>,
    /// The way of the last message whose terms were new; its memory is used again.
    spare: Arc<Way>,
    /// Of terms, whose senders choose them.
    state: RandomState,
    terms: Terms,
    found: Vec<Hit<Wisher>>,
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
            once: vec![0; ONCE].into_boxed_slice(),
            spare: Arc::default(),
            state: RandomState::new(),
            terms: Terms::default(),
            found: Vec::new(),
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
        let hash = self.state.hash_one(packed);
        let (place, half) = (hash as usize % ONCE, (hash >> 32) as u32);
        let known = self.ways.get(&hash);
        if let Some(way) = known
            && way.version == self.version
            && way.packed == packed
        {
            return Ok(way.clone());
        }
        let is_wanted = known.is_some() || self.once[place] == half;
        self.terms.read_message(packed).map_err(|e| e.to_string())?;
        if is_wanted || Arc::get_mut(&mut self.spare).is_none() {
            self.spare = Arc::default();
        }
        // Nobody else has it, so nothing is copied.
        let way = Arc::make_mut(&mut self.spare);
        way.bits = self
            .terms
            .look_up(&self.key, self.width, &mut way.hashes)
            .map_err(|e| e.to_string())?;
        way.version = self.version;
        way.packed.clear();
        way.packed.extend_from_slice(packed);
        self.found.clear();
        self.index
            .query(&way.bits, Some(&way.hashes), &mut self.found);
        choose(&self.found, &mut way.targets);
        if is_wanted {
            if self.ways.len() >= MAX_WAYS {
                self.ways.clear();
            }
            self.ways.insert(hash, self.spare.clone());
        } else {
            self.once[place] = half;
        }
        Ok(self.spare.clone())
    }

    /// Everyone who receives a message with these bits (and terms), each once.
    #[must_use]
    pub fn targets(&self, bits: &Bits, terms: Option<&[u64]>) -> Vec<Target> {
        let (mut found, mut targets) = (Vec::new(), Vec::new());
        self.index.query(bits, terms, &mut found);
        choose(&found, &mut targets);
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

/// Makes `targets` those who were found, each once, by the match with the strongest wish.
fn choose(found: &[Hit<Wisher>], targets: &mut Vec<Target>) {
    targets.clear();
    targets.extend(found.iter().map(|hit| Target {
        to: hit.owner.to,
        by: hit.id,
        overflow: hit.owner.overflow,
    }));
    targets.sort_unstable_by_key(|t| (t.to, std::cmp::Reverse(t.overflow), t.by));
    targets.dedup_by_key(|t| t.to);
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

    /// A way is that of the matches as they are, whether its terms are new, known or spoilt.
    #[test]
    fn d8_a_way_follows_the_matches() {
        let mut bus = Bus::new(512, [3; 16]);
        subscribe(&mut bus, 1, 7, b"a");
        let first = bus.way(b"a.b").unwrap();
        for _ in 0..3 {
            assert_eq!(receivers(&mut bus, b"a.b"), [(7, 1)]);
            assert!(receivers(&mut bus, b"b").is_empty());
            assert!(bus.way(b"a\0").is_err() && bus.way(b"\xff").is_err());
        }
        subscribe(&mut bus, 2, 8, b"a.b");
        assert_eq!(receivers(&mut bus, b"a.b"), [(7, 1), (8, 2)]);
        assert!(bus.unsubscribe(1));
        assert_eq!(receivers(&mut bus, b"a.b"), [(8, 2)]);
        assert_eq!(receivers(&mut bus, b"a.c"), []);
        // Who still has an old way sees it as it was.
        assert_eq!((first.targets.len(), first.targets[0].by), (1, 1));
        let (bits, hashes) = (first.bits.clone(), first.hashes.clone());
        let terms = bloom::expand_message(b"a.b").unwrap();
        assert_eq!(bits, terms.bits(&bus.key, 512).unwrap());
        assert_eq!(hashes[..], terms.hashes(&bus.key)[..]);
        for n in 0..2 * MAX_WAYS {
            for _ in 0..3 {
                let packed = format!("a.b.{n}");
                assert_eq!(receivers(&mut bus, packed.as_bytes()), [(8, 2)]);
            }
        }
        assert!(bus.ways.len() <= MAX_WAYS);
    }

    /// Nanoseconds that this thread has worked.
    fn worked() -> f64 {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: it writes what it is given.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
        time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
    }

    /// `cargo test --release -- --ignored --nocapture figures_of_ways`
    ///
    /// As `bench/match.py` does it: a crowd, one who hears, messages of which each is about something new.
    #[test]
    #[ignore = "prints figures, checks nothing"]
    fn figures_of_ways() {
        for masks in [10_000, 1_000_000u64] {
            let mut bus = Bus::new(512, [3; 16]);
            let about = |kind: &str, n: u64| {
                format!("plant.hall{}.sensors\0{kind}={n}\0unit=celsius", n % 100)
            };
            let mut longest = 0.0f64;
            let (mut all, mut late) = (0.0, 0.0);
            for n in 0..masks {
                let (bits, terms) = bus.required(about("device", n).as_bytes()).unwrap();
                let wish = Subscription {
                    owner: endpoint(1),
                    bits,
                    terms: Some(terms),
                    overflow: Overflow::Gap,
                };
                let start = worked();
                assert!(bus.subscribe(n + 1, wish));
                let took = worked() - start;
                longest = longest.max(took / 1000.0);
                all += took;
                if n >= masks * 9 / 10 {
                    late += took;
                }
            }
            for n in 0..1000 {
                subscribe(&mut bus, masks + n + 1, 2, about("probe", n).as_bytes());
            }
            let packed: Vec<String> = (0..20_480u64)
                .map(|n| about("probe", n % 1000).replace("\0unit", &format!("\0serial={n}\0unit")))
                .collect();
            let least = |work: &mut dyn FnMut(&str)| {
                let times = (0..12).map(|_| {
                    let start = worked();
                    packed.iter().for_each(|one| work(one));
                    (worked() - start) / packed.len() as f64
                });
                times.fold(f64::INFINITY, f64::min)
            };
            let way = least(&mut |one| {
                assert_eq!(bus.way(one.as_bytes()).unwrap().targets.len(), 1);
            });
            let (mut terms, mut hashes) = (Terms::default(), Vec::new());
            let hashing = least(&mut |one| {
                terms.read_message(one.as_bytes()).unwrap();
                std::hint::black_box(terms.look_up(&bus.key, 512, &mut hashes).unwrap());
            });
            let sent: Vec<_> = packed
                .iter()
                .map(|one| {
                    let terms = bloom::expand_message(one.as_bytes()).unwrap();
                    (terms.bits(&bus.key, 512).unwrap(), terms.hashes(&bus.key))
                })
                .collect();
            let mut next = sent.iter().cycle();
            let mut hits = Vec::new();
            let query = least(&mut |_| {
                let (bits, terms) = next.next().unwrap();
                hits.clear();
                bus.index.query(bits, Some(terms), &mut hits);
                assert_eq!(hits.len(), 1);
            });
            println!(
                "{masks:8} masks: a way {way:5.0} ns, of it hashing {hashing:5.0}, the query {query:4.0}; an add {:4.0} ns, the last {:4.0}, the longest {longest:.0} us",
                all / masks as f64,
                late / masks as f64 * 10.0
            );
        }
    }
}
