//! What the agent tells the switch of other nodes: which there are, what they own and want, and how their lanes fare.

use super::Switch;
use crate::bloom::Bits;
use crate::bus::{Overflow, Subscription};
use crate::endpoint::{Charge, Credentials, Ref};
use crate::trunk::{Remote, Trunk};
use crate::trunk_wire::{Broken, RECORD_BYTES, Record};

/// The uid and gid of whoever is none of this node's (D17).
pub(super) const OVERFLOW_ID: u32 = 65_534;

impl Switch {
    /// The trunk that Python calls `id`.
    pub fn trunk_mut(&mut self, id: u64) -> Option<&mut Trunk> {
        let slot = *self.trunk_slots.get(&id)?;
        self.at(slot)
    }

    /// The same, to look at.
    #[must_use]
    pub fn trunk(&self, id: u64) -> Option<&Trunk> {
        self.trunks[*self.trunk_slots.get(&id)?].as_deref()
    }

    pub(super) fn at(&mut self, slot: usize) -> Option<&mut Trunk> {
        self.trunks.get_mut(slot)?.as_deref_mut()
    }

    /// Adds a node. `false` when its number is known already.
    pub fn add_trunk(&mut self, id: u64, node: &[u8]) -> bool {
        if self.trunk_slots.contains_key(&id) {
            return false;
        }
        let slot = self.trunks.iter().position(Option::is_none);
        let slot = slot.unwrap_or_else(|| {
            self.trunks.push(None);
            self.trunks.len() - 1
        });
        let me = self.seat_for(Remote::Trunk(slot), &[]);
        self.trunks[slot] = Some(Box::new(Trunk::new(id, me, node)));
        self.trunk_slots.insert(id, slot);
        true
    }

    /// A seat for what is none of this node's endpoints.
    pub(super) fn seat_for(&mut self, remote: Remote, ident: &[u8]) -> Ref {
        let credentials = Credentials {
            pid: 0,
            uid: OVERFLOW_ID,
            gid: OVERFLOW_ID,
        };
        let me = self.sit_down(0, Charge::AGENT.principal, credentials, ident.into());
        if let Some(e) = self.get_mut(me) {
            e.remote = Some(remote);
            e.is_remote = true;
        }
        me
    }

    /// Forgets a node, and what leads to it. `false` when it is unknown.
    pub fn remove_trunk(&mut self, id: u64) -> bool {
        let Some(slot) = self.trunk_slots.get(&id).copied() else {
            return false;
        };
        self.set_down(id, true);
        self.restart_trunk(id);
        self.hear_trunk(id, true);
        for bus in self.buses.values_mut() {
            bus.forget_trunk(slot);
        }
        self.blocks.retain(|_, trunk| *trunk != Some(slot));
        self.routes_version += 1;
        self.trunk_slots.remove(&id);
        if let Some(gone) = self.trunks[slot].take() {
            for bus in self.buses.values_mut() {
                bus.forget(gone.me);
            }
            self.stand_up(gone.me);
        }
        true
    }

    /// Begins to count anew what goes to a node. What was sent, and may have come or not, is told as unknown (D21).
    pub fn restart_trunk(&mut self, id: u64) -> bool {
        let Some(trunk) = self.trunk_mut(id) else {
            return false;
        };
        let me = trunk.me;
        trunk.waiting.clear();
        trunk.is_told = false;
        trunk.is_choke_told = false;
        let asked = self.get_mut(me).map(|t| std::mem::take(&mut t.unanswered));
        let mut asked: Vec<_> = asked.into_iter().flatten().collect();
        asked.sort_unstable_by_key(|(key, _)| *key);
        for ((who, serial), debt) in asked {
            let address = self
                .trunk(id)
                .and_then(|t| t.out.destination(debt.destination));
            let address: Box<[u8]> = address.map_or_else(Box::default, |d| d.address.clone());
            self.answer_lost(who, serial, &address);
        }
        let Some(slot) = self.trunk_slots.get(&id).copied() else {
            return false;
        };
        let parked = self.at(slot).map(|t| std::mem::take(&mut t.parked));
        for (ticket, parked) in parked.into_iter().flatten() {
            self.settle_parked(slot, ticket, &parked, Some(libc::EHOSTDOWN));
        }
        let Some(trunk) = self.trunk_mut(id) else {
            return false;
        };
        let mut remains = trunk.out.restart();
        self.refund(&mut remains.refunds);
        for charge in remains.unknown {
            self.tell_unknown(id, &charge);
        }
        for (charge, address) in remains.unsent {
            if let Some(endpoint) = self.get(charge.sender).map(|e| e.id) {
                let range = (charge.seq, charge.seq);
                self.tell_unread(endpoint, range, 1, libc::EHOSTDOWN as u32, &address);
            }
        }
        for seat in remains.seats {
            self.try_again(Some(seat));
            self.stand_up(seat);
        }
        self.publish();
        true
    }

    /// Whether senders are told EHOSTDOWN instead of waiting. `false` when the node is unknown.
    pub fn set_down(&mut self, id: u64, is_down: bool) -> bool {
        let Some(trunk) = self.trunk_mut(id) else {
            return false;
        };
        trunk.is_down = is_down;
        if is_down {
            for seat in std::mem::take(&mut trunk.waiting) {
                self.try_again(Some(seat));
            }
        } else {
            trunk.out.flush_gaps();
            self.tell_ready(id);
        }
        true
    }

    /// The link is a new one: sends again what is behind record `received` of the former.
    ///
    /// # Errors
    /// [`Broken`] when the node says what cannot be.
    pub fn rewind_trunk(&mut self, id: u64, received: u64) -> Result<(), Broken> {
        let mut refunds = Vec::new();
        let Some(trunk) = self.trunk_mut(id) else {
            return Ok(());
        };
        let rewound = trunk.out.rewind(received, &mut refunds);
        trunk.inn.tell_again();
        trunk.is_told = false;
        self.refund(&mut refunds);
        rewound?;
        self.room_away(id);
        self.tell_ready(id);
        Ok(())
    }

    /// Bytes for the other agent, behind everything that goes there: also behind what waits for its body, if its sender is gone, for
    /// they may tell of that (D15). `false` when they are too many.
    pub fn signal(&mut self, id: u64, data: &[u8]) -> bool {
        if data.len() > RECORD_BYTES / 2 {
            return false;
        }
        let behind = self.trunk(id).and_then(|trunk| {
            let mut parked = trunk.parked.iter().rev();
            let last = parked.find(|(_, p)| self.get(p.charge.sender).is_none());
            last.map(|(ticket, _)| *ticket)
        });
        if let Some(trunk) = self.trunk_mut(id) {
            let late = trunk.late.back().map(|(ticket, _)| *ticket);
            if let Some(ticket) = behind.max(late) {
                trunk.late.push_back((ticket, data.into()));
            } else {
                trunk.out.put(&Record::Signal { data });
                self.tell_ready(id);
            }
        }
        true
    }

    /// Puts what no message goes before any more.
    pub(super) fn signal_late(&mut self, slot: usize) {
        while let Some((ticket, _)) = self.at(slot).and_then(|t| t.late.front())
            && let ticket = *ticket
            && !self.trunks[slot].as_ref().is_some_and(|t| {
                let mut parked = t.parked.range(..=ticket);
                parked.any(|(_, p)| self.get(p.charge.sender).is_none())
            })
        {
            let Some(trunk) = self.at(slot) else { return };
            if let Some((_, data)) = trunk.late.pop_front() {
                trunk.out.put(&Record::Signal { data: &data });
            }
        }
    }

    /// Makes a bus one of the cluster, with its number there. `false` when the number is taken.
    pub fn set_bus_number(&mut self, bus: u32, number: u32) -> bool {
        let Some(known) = self.buses.get_mut(&bus) else {
            return false;
        };
        if known.number.is_some() || self.clustered.contains_key(&number) {
            return false;
        }
        known.number = Some(number);
        self.clustered.insert(number, bus);
        self.routes_version += 1;
        true
    }

    /// The owner of a name is on this node, or is not any more with `None`. `false` when bus or node are unknown.
    pub fn route(&mut self, bus: u32, address: &[u8], trunk: Option<u64>) -> bool {
        let slot = match trunk.map(|id| self.trunk_slots.get(&id)) {
            Some(None) => return false,
            slot => slot.flatten().copied(),
        };
        let Some(bus) = self.buses.get_mut(&bus) else {
            return false;
        };
        let before = match slot {
            Some(slot) => bus.routes.insert(address.into(), slot),
            None => bus.routes.remove(address),
        };
        self.routes_version += 1;
        let (number, master, away) = (bus.number, bus.master, bus.master_away.clone());
        if before != slot {
            // Who waits for room may have meant this address, which leads elsewhere now.
            self.try_again(master);
            let former = before.map(|slot| (slot, address));
            let away = away.as_ref().map(|(slot, _)| (*slot, &[][..]));
            for (slot, address) in former.into_iter().chain(away) {
                let seat = self.seat_of(slot, number, address);
                self.try_again(seat);
            }
        }
        true
    }

    /// All unique addresses of a block are that node's, or with `None` this node's. `false` when the node is unknown.
    pub fn route_block(&mut self, block: u64, trunk: Option<u64>) -> bool {
        let slot = match trunk.map(|id| self.trunk_slots.get(&id)) {
            Some(None) => return false,
            slot => slot.flatten().copied(),
        };
        self.routes_version += 1;
        self.blocks.insert(block, slot);
        true
    }

    /// A block is nobody's any more. `false` when it was nobody's.
    pub fn unroute_block(&mut self, block: u64) -> bool {
        self.routes_version += 1;
        self.blocks.remove(&block).is_some()
    }

    /// The master of a bus is on another node, with this address; or not any more. `false` when bus or node are unknown.
    pub fn set_master_away(&mut self, bus: u32, master: Option<(u64, &[u8])>) -> bool {
        let slot = match master.map(|(id, _)| self.trunk_slots.get(&id).copied()) {
            Some(None) => return false,
            slot => slot.flatten(),
        };
        let Some(bus) = self.buses.get_mut(&bus) else {
            return false;
        };
        let now = master.and_then(|(_, address)| Some((slot?, address.into())));
        let before = std::mem::replace(&mut bus.master_away, now);
        self.routes_version += 1;
        let (number, master) = (bus.number, bus.master);
        self.try_again(master);
        if let Some((slot, _)) = before {
            let seat = self.seat_of(slot, number, &[]);
            self.try_again(seat);
        }
        true
    }

    pub(super) fn seat_of(
        &mut self,
        slot: usize,
        number: Option<u32>,
        address: &[u8],
    ) -> Option<Ref> {
        let out = &self.at(slot)?.out;
        let destination = out.destination(out.number_of(number?, address)?)?;
        Some(destination.seat)
    }

    /// Adds a subscription of a node. `false` when node or bus are unknown, or the number is taken.
    pub fn subscribe_trunk(
        &mut self,
        id: u64,
        bus: u32,
        number: u64,
        bits: Bits,
        terms: Option<Box<[u64]>>,
    ) -> bool {
        let Some(owner) = self.trunk(id).map(|t| t.me) else {
            return false;
        };
        self.close_lanes_heard(bus, &bits, terms.as_deref());
        let wish = Subscription {
            owner,
            bits,
            terms,
            overflow: Overflow::Gap,
        };
        self.buses
            .get_mut(&bus)
            .is_some_and(|bus| bus.subscribe(number, wish))
    }

    /// Removes a subscription of a node. `false` when there is none with this number.
    pub fn unsubscribe_trunk(&mut self, id: u64, bus: u32, number: u64) -> bool {
        let owner = self.trunk(id).map(|t| t.me);
        let Some(bus) = self.buses.get_mut(&bus) else {
            return false;
        };
        let is_its = owner.is_some() && bus.subscriber(number) == owner;
        is_its && bus.unsubscribe(number)
    }
}
