//! What nodes tell each other beside messages: open requests, what nobody reads, who is gone; and who waits, or is to be told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Switch;
use crate::carrier::LaneBell;
use crate::endpoint::{Charge, Ref, Room};
use crate::trunk::{LaneEvent, Remote};
use crate::trunk_out::FIRST_WINDOW;
use crate::trunk_wire::{MESSAGE_COST, Record};

/// How long a confirmation may wait for a batch that goes anyway.
const CONFIRM_AFTER: Duration = Duration::from_millis(25);

impl Switch {
    // ---- requests ------------------------------------------------------------------------------------------------

    /// Who owes the answer to a request that was put to `to`, and which destination that was.
    #[cold]
    pub(super) fn debtor(&mut self, to: Ref) -> (Ref, u32) {
        match self.get(to).and_then(|t| t.remote) {
            Some(Remote::Destination(slot, number)) => (self.at(slot).map_or(to, |t| t.me), number),
            _ => (to, 0),
        }
    }

    /// Who asked, of what is answered by a message from `from` to `to`.
    #[cold]
    pub(super) fn asker(&mut self, to: Ref, from: Ref, serial: u64) -> Ref {
        let Some(Remote::Destination(slot, number)) = self.get(to).and_then(|t| t.remote) else {
            return to;
        };
        let Some(trunk) = self.at(slot) else {
            return to;
        };
        let Some(destination) = trunk.out.destination(number) else {
            return to;
        };
        let asker = trunk.inn.seat_of(destination.bus, &destination.address);
        let owes = |who: &Ref| {
            let me = self.get(from);
            me.is_some_and(|e| e.unanswered.contains_key(&(*who, serial)))
        };
        asker.filter(owes).unwrap_or(to)
    }

    /// An endpoint of another node waits for an answer that will not come.
    #[cold]
    pub(super) fn answer_lost_away(&mut self, remote: Remote, serial: u64, address: &[u8]) {
        let Remote::Sender(slot, endpoint) = remote else {
            return;
        };
        let Some(trunk) = self.at(slot) else { return };
        let id = trunk.id;
        trunk.out.put(&Record::NoReply {
            endpoint,
            serial,
            address,
        });
        self.tell_ready(id);
    }

    /// Nobody will read messages of an endpoint of another node.
    pub(super) fn report_unread(
        &mut self,
        remote: Remote,
        errno: i32,
        address: &[u8],
        range: (u64, u64),
        count: u64,
    ) {
        let Remote::Sender(slot, endpoint) = remote else {
            return;
        };
        let Some(trunk) = self.at(slot) else { return };
        let id = trunk.id;
        trunk
            .out
            .report_unread(endpoint, errno as u32, address, range, count);
        self.tell_ready(id);
    }

    /// An endpoint of this node gives back messages that it took from its ring and nobody will read: whoever sent them on that
    /// node is told, by the source that they bore. `false` when nobody there has sent from it.
    #[cold]
    pub fn give_back(
        &mut self,
        id: u64,
        endpoint: u64,
        source: &[u8],
        range: (u64, u64),
        count: u64,
    ) -> bool {
        let Some(e) = self.find(endpoint).and_then(|me| self.get(me)) else {
            return false;
        };
        let address: Box<[u8]> = e.default_source().into();
        let bus = e.bus.and_then(|bus| self.buses.get(&bus)?.number);
        let Some(trunk) = self.trunk_mut(id) else {
            return false;
        };
        let Some(sender) = bus.and_then(|bus| trunk.inn.endpoint_of(bus, source)) else {
            return false;
        };
        trunk
            .out
            .report_unread(sender, libc::EHOSTUNREACH as u32, &address, range, count);
        self.tell_ready(id);
        true
    }

    // ---- who comes and goes --------------------------------------------------------------------------------------

    /// An endpoint of this node is gone: the nodes that it sent to are told, and those that have its addresses open.
    pub(super) fn tell_trunks_gone(&mut self, who: Ref) {
        if self.trunk_slots.is_empty() {
            return;
        }
        let Some(e) = self.get(who) else { return };
        let mut addresses = e.addresses.clone();
        addresses.push(e.provisional.clone());
        let number = e.bus.and_then(|b| self.buses.get(&b)?.number);
        let mut ready = Vec::new();
        for trunk in self.trunks.iter_mut().flatten() {
            // What it has sent goes first.
            let has_parked = trunk.parked.values().any(|p| p.charge.sender == who);
            if trunk.out.knows(who) && !has_parked {
                trunk.out.forget_sender(who);
                ready.push(trunk.id);
            }
        }
        for id in ready {
            self.tell_ready(id);
        }
        for address in addresses {
            self.tell_trunks(number, &address, false);
        }
    }

    /// A unique address has an owner, or none any more: nodes that have it open are told.
    pub(super) fn tell_trunks(&mut self, bus: Option<u32>, address: &[u8], is_alive: bool) {
        let Some(bus) = bus.filter(|_| is_unique(address)) else {
            return;
        };
        let mut ready = Vec::new();
        for trunk in self.trunks.iter_mut().flatten() {
            if trunk.inn.is_open(bus, address) {
                trunk.out.put(&Record::Alive {
                    is_alive,
                    bus,
                    address,
                });
                ready.push(trunk.id);
            }
        }
        for id in ready {
            self.tell_ready(id);
        }
    }

    // ---- waiting -------------------------------------------------------------------------------------------------

    /// Somebody waits for what a seat stands for.
    #[cold]
    pub(super) fn want_room_away(&mut self, remote: Remote, who: Ref) {
        if let Remote::Destination(slot, _) = remote
            && let Some(trunk) = self.at(slot)
            && !trunk.waiting.contains(&who)
        {
            trunk.waiting.push(who);
        }
    }

    /// A node has confirmed records or given credit: puts gaps that wait, and tells those who wait for room.
    pub(super) fn room_away(&mut self, id: u64) {
        let Some(trunk) = self.trunk_mut(id) else {
            return;
        };
        trunk.out.flush_gaps();
        if !trunk.out.is_worth_waking() {
            return;
        }
        for seat in std::mem::take(&mut trunk.waiting) {
            self.room_at(id, seat);
        }
    }

    /// Tells those who wait for a destination and have room there now.
    fn room_at(&mut self, id: u64, seat: Ref) {
        let Some(t) = self.get_mut(seat) else { return };
        let Some(Remote::Destination(_, number)) = t.remote else {
            return;
        };
        let waiters = std::mem::take(&mut t.waiters);
        let Some(trunk) = self.trunk(id) else { return };
        let Some(d) = trunk.out.destination(number) else {
            return;
        };
        let (ready, wait): (Vec<_>, Vec<_>) = waiters.into_iter().partition(|w| {
            // What the record takes on the lane is a little less than what it would take in a ring.
            let need = (w.need + MESSAGE_COST).min(FIRST_WINDOW / 4);
            d.is_dead
                || d.is_worth_waking()
                    && d.room(w.from, need) == Room::Yes
                    && trunk.out.room(w.from, need) == Room::Yes
        });
        if let Some(t) = self.get_mut(seat) {
            t.waiters = wait;
            if !t.waiters.is_empty()
                && let Some(trunk) = self.trunk_mut(id)
            {
                trunk.waiting.push(seat);
            }
        }
        for waiter in ready {
            self.room_for(waiter.from);
        }
    }
    // ---- what Python is told -------------------------------------------------------------------------------------

    /// Tells Python that nobody will read messages of an endpoint.
    pub(super) fn tell_unread(
        &mut self,
        endpoint: u64,
        range: (u64, u64),
        count: u64,
        errno: u32,
        address: &[u8],
    ) {
        if let Some(LaneEvent::Unread {
            endpoint: known,
            last,
            count: told,
            errno: why,
            address: whither,
            ..
        }) = self.lane_events.last_mut()
            && (*known, *why, &**whither) == (endpoint, errno, address)
            && range.0 > *last
        {
            *last = range.1;
            *told = told.saturating_add(count);
            return;
        }
        self.lane_events.push(LaneEvent::Unread {
            endpoint,
            first: range.0,
            last: range.1,
            count,
            errno,
            address: address.into(),
        });
    }

    pub(super) fn tell_unknown(&mut self, trunk: u64, charge: &Charge) {
        let Some(endpoint) = self.get(charge.sender).map(|e| e.id) else {
            return;
        };
        if let Some(LaneEvent::Unknown {
            endpoint: known,
            last,
            count,
            trunk: there,
            ..
        }) = self.lane_events.last_mut()
            && (*known, *there) == (endpoint, trunk)
        {
            *last = charge.seq;
            *count += 1;
            return;
        }
        self.lane_events.push(LaneEvent::Unknown {
            endpoint,
            first: charge.seq,
            last: charge.seq,
            count: 1,
            trunk,
        });
    }
    /// Rings this bell when there is something to be sent to a node, or tells Python again.
    pub fn set_lane_bell(&mut self, id: u64, bell: Option<Arc<LaneBell>>) {
        if let Some(trunk) = self.trunk_mut(id) {
            trunk.bell = bell;
            trunk.is_told = false;
            self.tell_ready(id);
        }
    }

    /// Tells whoever takes batches that there is something to be sent, once.
    pub(super) fn tell_ready(&mut self, id: u64) {
        let Some(trunk) = self.trunk_mut(id) else {
            return;
        };
        if trunk.out.is_choked() && !std::mem::replace(&mut trunk.is_choke_told, true) {
            self.lane_events.push(LaneEvent::Choked(id));
            return;
        }
        if trunk.has_more() {
            if !std::mem::replace(&mut trunk.is_told, true) {
                match trunk.bell.clone() {
                    Some(bell) => self.bells.push(bell),
                    None => self.lane_events.push(LaneEvent::Ready(id)),
                }
            }
        } else if trunk.inn.owes() {
            self.owes_trunks = true;
        }
    }

    /// What is to be rung once the switch is free: whoever is woken has a use for it.
    pub fn take_bells(&mut self) -> Vec<Arc<LaneBell>> {
        std::mem::take(&mut self.bells)
    }

    /// Whether something is to be confirmed before long.
    #[must_use]
    pub fn owes_trunks(&self) -> bool {
        self.owes_trunks
    }

    /// Lets what is to be confirmed wait for a while, and then tells Python.
    #[cold]
    pub fn tell_trunks_later(&mut self, now: Instant) {
        let due = *self.trunks_due.get_or_insert(now + CONFIRM_AFTER);
        if now < due {
            return;
        }
        self.owes_trunks = false;
        self.trunks_due = None;
        for trunk in self.trunks.iter_mut().flatten() {
            if trunk.inn.owes() && !std::mem::replace(&mut trunk.is_told, true) {
                match &trunk.bell {
                    Some(bell) => self.bells.push(bell.clone()),
                    None => self.lane_events.push(LaneEvent::Ready(trunk.id)),
                }
            }
        }
    }
}

/// Whether an address stands for one endpoint for ever.
pub(super) fn is_unique(address: &[u8]) -> bool {
    address
        .first()
        .is_some_and(|b| b.is_ascii_digit() || *b == b'@')
}
