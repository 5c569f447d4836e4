//! What comes in on a trunk: which records are new, who sends, which destinations are open, and what credit goes back.
//!
//! Invariants:
//! 1. Each record is taken once, in the order of the numbers (D21).
//! 2. Credit for a destination goes back in the order in which its messages came, when each is in the receiver's ring, or will
//!    be in no ring: what the peer has not got back, nobody has read.
//! 3. What the peer can make this side keep is bounded: senders, destinations, and what they hold by their credit.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;

use crate::endpoint::{NumberMap, Ref};
use crate::trunk_out::{DESTINATIONS, FIRST_WINDOW, WINDOW};
use crate::trunk_wire::{Broken, MESSAGE_COST, Plain, cut};

/// Senders that one node may have here.
const SENDERS: usize = 65_536;
/// Bytes of records that may go unconfirmed until a batch is worth it.
const CONFIRM_BYTES: u64 = 256 << 10;
/// Credits in one batch.
const CREDITS: usize = 1024;

/// An endpoint of the peer.
pub struct Sender {
    /// Number of its bus in the cluster.
    pub bus: u32,
    /// How its node calls it.
    pub endpoint: u64,
    /// Its identity.
    pub ident: Box<[u8]>,
    /// Its place in the switch, once it has sent to a bus that is known here.
    pub seat: Option<Ref>,
    /// Number of its last message.
    pub seq: u64,
    /// The source of its last message.
    pub src: Box<[u8]>,
    /// Version of the routes with which that source was checked.
    pub checked: u64,
}

/// An address here, as the peer has opened it.
struct Destination {
    bus: u32,
    address: Box<[u8]>,
    /// Cost of everything that has come.
    consumed: u64,
    /// Cost of what may come again.
    released: u64,
    /// Up to where the peer was told that `consumed` may grow.
    told: u64,
    /// Messages that wait for room, and those behind them: cost, and whether it is done with.
    entries: VecDeque<(u32, bool)>,
    /// How many entries were taken from the front.
    popped: u64,
    /// It is among those that have credit to give back.
    is_queued: bool,
}

/// What a message holds of its destination's credit until it is in a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credit {
    /// In which life of the peer's lane.
    pub life: u64,
    /// The destination.
    pub destination: u32,
    /// Its place in the order of the messages there.
    pub index: u64,
}

/// One direction of a trunk.
#[derive(Default)]
pub struct Inbound {
    /// The last record that came.
    received: u64,
    /// How often the peer began to count anew.
    life: u64,
    senders: NumberMap<u32, Sender>,
    /// Senders by the addresses that they have used.
    sources: NumberMap<u32, HashMap<Box<[u8]>, u32>>,
    /// The same of former lanes: how their node calls them.
    former: HashMap<(u32, Box<[u8]>), u64>,
    destinations: NumberMap<u32, Destination>,
    numbers: NumberMap<u32, HashMap<Box<[u8]>, u32>>,
    last_destination: u32,
    last_sender: u32,
    /// Destinations that have credit to give back.
    credits: Vec<u32>,
    /// Bytes of records that came since the peer was last told.
    owed: u64,
    is_urgent: bool,
    /// Bytes that wait for room in rings.
    pub held: u64,
    /// Bodies that are here whole, by their tickets, until their messages come.
    pub bodies: HashMap<u32, OwnedFd>,
}

impl Inbound {
    /// The last record that came.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Which life of the peer's lane this is.
    #[must_use]
    pub fn life(&self) -> u64 {
        self.life
    }

    /// The peer begins to count anew, or is another one that knows nothing if it `is_anew`. Returns the places of its senders, who
    /// have to be named again.
    pub fn hear(&mut self, is_anew: bool) -> Vec<Ref> {
        let old = std::mem::take(self);
        self.life = old.life + 1;
        self.held = old.held;
        if !is_anew {
            self.former = old.former;
            for (bus, sources) in old.sources {
                for (address, number) in sources {
                    if let Some(sender) = old.senders.get(&number)
                        && self.former.len() < SENDERS
                    {
                        self.former.insert((bus, address), sender.endpoint);
                    }
                }
            }
        }
        let mut seats: Vec<Ref> = old.senders.into_values().filter_map(|s| s.seat).collect();
        seats.sort_unstable();
        seats
    }

    /// Whether record `number` is new; it counts as taken then.
    ///
    /// # Errors
    /// [`Broken`] when records before it are missing.
    pub fn is_new(&mut self, number: u64, bytes: usize) -> Result<bool, Broken> {
        if number > self.received + 1 {
            return Err(Broken::Malformed("records are missing"));
        }
        self.owed += bytes as u64;
        self.is_urgent |= self.owed >= CONFIRM_BYTES;
        let is_new = number == self.received + 1;
        self.received += u64::from(is_new);
        Ok(is_new)
    }

    // ---- senders -------------------------------------------------------------------------------------------------

    /// Notes a sender.
    ///
    /// # Errors
    /// [`Broken`] for a number that is not the next one.
    pub fn add_sender(
        &mut self,
        number: u32,
        bus: u32,
        endpoint: u64,
        ident: &[u8],
    ) -> Result<(), Broken> {
        if Some(number) != self.last_sender.checked_add(1) {
            return Err(Broken::Malformed("senders out of order"));
        }
        if self.senders.len() >= SENDERS {
            return Err(Broken::Malformed("too many senders"));
        }
        self.last_sender = number;
        let sender = Sender {
            bus,
            endpoint,
            ident: ident.into(),
            seat: None,
            seq: 0,
            src: Box::default(),
            checked: 0,
        };
        self.senders.insert(number, sender);
        Ok(())
    }

    /// A sender.
    ///
    /// # Errors
    /// [`Broken`] when there is none with this number.
    pub fn sender(&mut self, number: u32) -> Result<&mut Sender, Broken> {
        self.senders
            .get_mut(&number)
            .ok_or(Broken::Malformed("a sender that was not named"))
    }

    /// Notes that a sender uses its present source.
    pub fn note_source(&mut self, number: u32) {
        if let Some(s) = self.senders.get(&number) {
            let sources = self.sources.entry(s.bus).or_default();
            sources.insert(s.src.clone(), number);
        }
    }

    /// The place of the sender that has used this address last.
    #[must_use]
    pub fn seat_of(&self, bus: u32, address: &[u8]) -> Option<Ref> {
        let number = self.sources.get(&bus)?.get(address)?;
        self.senders.get(number)?.seat
    }

    /// What its node calls the sender that has used this address last.
    #[must_use]
    pub fn endpoint_of(&self, bus: u32, address: &[u8]) -> Option<u64> {
        let number = self.sources.get(&bus).and_then(|all| all.get(address));
        let sender = number.and_then(|number| self.senders.get(number));
        let former = || self.former.get(&(bus, address.into())).copied();
        sender.map(|s| s.endpoint).or_else(former)
    }

    /// A sender is gone. Returns its place.
    ///
    /// # Errors
    /// [`Broken`] when there is none with this number.
    pub fn remove_sender(&mut self, number: u32) -> Result<Option<Ref>, Broken> {
        let gone = self.senders.remove(&number);
        let gone = gone.ok_or(Broken::Malformed("a sender that was not named"))?;
        if let Some(sources) = self.sources.get_mut(&gone.bus) {
            sources.retain(|_, n| *n != number);
            if sources.is_empty() {
                self.sources.remove(&gone.bus);
            }
        }
        Ok(gone.seat)
    }

    // ---- destinations --------------------------------------------------------------------------------------------

    /// Opens a destination.
    ///
    /// # Errors
    /// [`Broken`] for a number that is not the next one, for an address that is open, or too many of them.
    pub fn open(&mut self, number: u32, bus: u32, address: &[u8]) -> Result<(), Broken> {
        if Some(number) != self.last_destination.checked_add(1) {
            return Err(Broken::Malformed("destinations out of order"));
        }
        if self.destinations.len() >= DESTINATIONS {
            return Err(Broken::Malformed("too many destinations"));
        }
        let numbers = self.numbers.entry(bus).or_default();
        if numbers.insert(address.into(), number).is_some() {
            return Err(Broken::Malformed("a destination that is open already"));
        }
        self.last_destination = number;
        let destination = Destination {
            bus,
            address: address.into(),
            consumed: 0,
            released: 0,
            told: WINDOW,
            entries: VecDeque::new(),
            popped: 0,
            is_queued: false,
        };
        self.destinations.insert(number, destination);
        Ok(())
    }

    /// Bus and address of a destination.
    ///
    /// # Errors
    /// [`Broken`] when it is not open.
    pub fn destination(&self, number: u32) -> Result<(u32, &[u8]), Broken> {
        self.destinations
            .get(&number)
            .map(|d| (d.bus, &*d.address))
            .ok_or(Broken::Malformed("a destination that is not open"))
    }

    /// The source that a sender has used last, and the address of a destination.
    #[must_use]
    pub fn ways(&self, sender: u32, destination: u32) -> Option<(&[u8], &[u8])> {
        let sender = self.senders.get(&sender)?;
        Some((&sender.src, &self.destinations.get(&destination)?.address))
    }

    /// Whether the peer has this address open.
    #[must_use]
    pub fn is_open(&self, bus: u32, address: &[u8]) -> bool {
        self.numbers
            .get(&bus)
            .is_some_and(|numbers| numbers.contains_key(address))
    }

    /// The peer needs a destination no more.
    ///
    /// # Errors
    /// [`Broken`] when it is not open, or something waits for room there.
    pub fn forget(&mut self, number: u32) -> Result<(), Broken> {
        let gone = self.destinations.remove(&number);
        let gone = gone.ok_or(Broken::Malformed("a destination that is not open"))?;
        if !gone.entries.is_empty() {
            return Err(Broken::Malformed(
                "a destination is forgotten that is in use",
            ));
        }
        if let Some(numbers) = self.numbers.get_mut(&gone.bus) {
            numbers.remove(&gone.address);
            if numbers.is_empty() {
                self.numbers.remove(&gone.bus);
            }
        }
        Ok(())
    }

    /// A message has come for a destination, at this cost.
    ///
    /// # Errors
    /// [`Broken`] when it had no credit for it.
    pub fn charge(&mut self, number: u32, cost: u64) -> Result<Credit, Broken> {
        let d = self
            .destinations
            .get_mut(&number)
            .ok_or(Broken::Malformed("a destination that is not open"))?;
        if d.consumed + cost > d.told {
            return Err(Broken::Malformed(
                "more than the destination has credit for",
            ));
        }
        d.consumed += cost;
        let index = d.popped + d.entries.len() as u64;
        d.entries.push_back((cost as u32, false));
        Ok(Credit {
            life: self.life,
            destination: number,
            index,
        })
    }

    /// A message is in its receiver's ring, or will be in none.
    pub fn release(&mut self, credit: Credit) {
        if credit.life != self.life {
            return;
        }
        let Some(d) = self.destinations.get_mut(&credit.destination) else {
            return;
        };
        if let Some(entry) = d.entries.get_mut((credit.index - d.popped) as usize) {
            entry.1 = true;
        }
        while let Some((cost, true)) = d.entries.front().copied() {
            d.entries.pop_front();
            d.popped += 1;
            d.released += u64::from(cost);
        }
        self.give_back(credit.destination);
    }

    /// Notes that a destination has credit to give back, if it has.
    fn give_back(&mut self, number: u32) {
        let Some(d) = self.destinations.get_mut(&number) else {
            return;
        };
        if d.released + WINDOW > d.told {
            // A quarter of the window is told at once, less with the next batch or after a while. At first the window is small.
            let is_grown = d.released >= WINDOW;
            let window = if is_grown { WINDOW } else { FIRST_WINDOW };
            self.is_urgent |= d.released + WINDOW - d.told >= window / 4;
            if !d.is_queued {
                d.is_queued = true;
                self.credits.push(number);
            }
        }
    }

    /// Takes messages that go on as one did that is in its receiver's ring: from the same sender, to the same destination.
    /// `put` takes number and body of each that breaks no rule, unless it says that there is no room. Returns how many records were
    /// taken, all of them without a break, and the bytes behind them.
    pub fn follow<'a>(
        &mut self,
        sender: u32,
        destination: u32,
        records: &'a [u8],
        most: u64,
        mut put: impl FnMut(u64, &[u8]) -> bool,
    ) -> (u64, &'a [u8]) {
        let mut rest = records;
        let (Some(s), Some(d)) = (
            self.senders.get_mut(&sender),
            self.destinations.get_mut(&destination),
        ) else {
            return (0, rest);
        };
        let mut taken = 0;
        // Behind what waits for room, each waits too.
        while taken < most && d.entries.is_empty() {
            let Ok((one, behind)) = cut(rest) else { break };
            let Some(plain) = Plain::of(one) else { break };
            let cost = one.len() as u64 + MESSAGE_COST;
            if (plain.sender, plain.destination) != (sender, destination)
                || plain.seq <= s.seq
                || d.consumed + cost > d.told
                || !put(plain.seq, plain.body)
            {
                break;
            }
            s.seq = plain.seq;
            d.consumed += cost;
            d.popped += 1;
            d.released += cost;
            self.received += 1;
            self.owed += one.len() as u64;
            taken += 1;
            rest = behind;
        }
        if taken > 0 {
            self.is_urgent |= self.owed >= CONFIRM_BYTES;
            self.give_back(destination);
        }
        (taken, rest)
    }

    // ---- what the peer is to be told -----------------------------------------------------------------------------

    /// Whether the peer is to be told something, soon if `is_urgent`.
    #[must_use]
    pub fn owes(&self) -> bool {
        self.owed > 0 || !self.credits.is_empty()
    }

    /// Whether that cannot wait for a batch that goes anyway.
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        self.is_urgent
    }

    /// The link is a new one: what was told on the old one may not have come.
    pub fn tell_again(&mut self) {
        self.credits.clear();
        for (number, d) in &mut self.destinations {
            d.is_queued = d.told > WINDOW || d.released > 0;
            if d.is_queued {
                self.credits.push(*number);
            }
        }
        self.owed = self.owed.max(1);
        self.is_urgent = true;
    }

    /// Takes credits for a batch, which says as well what has come.
    pub fn take(&mut self) -> Vec<(u32, u64)> {
        let keep = self.credits.len().saturating_sub(CREDITS);
        let mut taken = Vec::new();
        for number in self.credits.drain(keep..) {
            if let Some(d) = self.destinations.get_mut(&number) {
                d.is_queued = false;
                d.told = d.released + WINDOW;
                taken.push((number, d.told));
            }
        }
        self.owed = 0;
        self.is_urgent = !self.credits.is_empty();
        taken
    }
}
