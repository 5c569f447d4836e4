//! The part of the switch that sends to other nodes: who is where, what goes onto a lane, and who waits for it.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::{Body, Letter, Put, Switch};
use crate::bloom::Bits;
use crate::bus::{Overflow, Subscription, Target};
use crate::endpoint::{Charge, Credentials, Reason, Ref, Room};
use crate::frame::{ADDRESS_BYTES, BODY_IN_MEMFD, BY_TERMS, MESSAGE, MULTICAST, RxHeader};
use crate::ring::Memory;
use crate::trunk::{LaneEvent, Parked, Remote, Trunk, block_of};
use crate::trunk_out::{DESTINATIONS, WINDOW, refund};
use crate::trunk_wire::{Broken, MESSAGE_COST, Message, RECORD_BYTES, Record, To};

/// Large bodies on their way to one node.
const PARKED: usize = 64;
/// How long a confirmation may wait for a batch that goes anyway.
const CONFIRM_AFTER: Duration = Duration::from_millis(25);
/// The uid and gid of whoever is none of this node's (D17).
pub(super) const OVERFLOW_ID: u32 = 65_534;

// ---- calls from outside --------------------------------------------------------------------------------------------

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
        self.hear_trunk(id);
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

    fn tell_unknown(&mut self, trunk: u64, charge: &Charge) {
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

    /// Bytes for the other agent, behind everything that goes there. `false` when they are too many.
    pub fn signal(&mut self, id: u64, data: &[u8]) -> bool {
        if data.len() > RECORD_BYTES / 2 {
            return false;
        }
        if let Some(trunk) = self.trunk_mut(id) {
            trunk.out.put(&Record::Signal { data });
            self.tell_ready(id);
        }
        true
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

    fn seat_of(&mut self, slot: usize, number: Option<u32>, address: &[u8]) -> Option<Ref> {
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
        let is_its = owner.is_some() && bus.matches.get(&number).map(|m| m.owner) == owner;
        is_its && bus.unsubscribe(number)
    }

    /// Sends a message with control items to an endpoint of another node, behind everything that its sender has sent there. The
    /// items are in effect there. `Err` is the errno.
    #[allow(
        clippy::too_many_arguments,
        reason = "the parts of one message, each once"
    )]
    pub fn deliver_away(
        &mut self,
        from: u64,
        trunk: u64,
        src: &[u8],
        dst: &[u8],
        ctl: &[u8],
        body: &[u8],
        serial: u64,
        reply_to: u64,
        deadline_ms: Option<u32>,
        now: Instant,
    ) -> Result<(), i32> {
        let from = self.find(from).ok_or(libc::EHOSTUNREACH)?;
        let slot = self.trunk_slots.get(&trunk).copied();
        let slot = slot.ok_or(libc::EHOSTUNREACH)?;
        let bus = self.get(from).and_then(|e| e.bus);
        let number = bus.and_then(|b| self.buses.get(&b)?.number);
        let (Some(bus), Some(number)) = (bus, number) else {
            return Err(libc::EHOSTUNREACH);
        };
        if dst.is_empty() || dst.len() > ADDRESS_BYTES {
            return Err(libc::EDESTADDRREQ);
        }
        if ctl.len() + body.len() > RECORD_BYTES / 2 {
            return Err(libc::EMSGSIZE);
        }
        let to = self.open_away(slot, number, dst)?;
        let e = self.get_mut(from).ok_or(libc::EHOSTUNREACH)?;
        if e.parked > 0 {
            // It must not overtake what its sender has sent before.
            return Err(libc::EAGAIN);
        }
        let seq = e.seq + 1;
        let (ident, Credentials { pid, uid, gid }) = (e.ident.clone(), e.credentials);
        let letter = Letter {
            from,
            header: RxHeader {
                kind: MESSAGE,
                seq,
                serial,
                reply_to,
                pid,
                uid,
                gid,
                src_len: src.len() as u16,
                dst_len: dst.len() as u16,
                body_len: body.len() as u32,
                ..RxHeader::default()
            },
            src,
            dst,
            ident: &ident,
            body: Body::Bytes(body),
            fds: &[],
            charge: Charge {
                sender: from,
                seq,
                told: true,
                ..Charge::AGENT
            },
            deadline_ms,
        };
        let Some(Remote::Destination(slot, destination)) = self.get(to).and_then(|t| t.remote)
        else {
            return Err(libc::EHOSTUNREACH);
        };
        if self.at(slot).is_none_or(|t| t.is_down || t.out.is_choked()) {
            return Err(libc::EHOSTDOWN);
        }
        self.put_record(slot, To::One(destination), &letter, ctl, None);
        if let Some(e) = self.get_mut(from) {
            e.seq = seq;
            e.stats.sent += 1;
        }
        self.answered(from, to, reply_to);
        if let Some(ms) = deadline_ms {
            let until = now + Duration::from_millis(ms.into());
            self.expect(from, to, serial, until, now);
        }
        self.copy_to_monitors(bus, &letter, false);
        self.publish();
        Ok(())
    }
}

// ---- where it goes -------------------------------------------------------------------------------------------------

impl Switch {
    /// Where a message goes on a bus of the cluster, if it goes to another node at all; `Err` is an errno.
    #[cold]
    pub(super) fn find_away(
        &mut self,
        bus_id: u32,
        dst: &[u8],
        joined: bool,
        is_master: bool,
    ) -> Option<Result<Ref, i32>> {
        let bus = self.buses.get(&bus_id)?;
        let number = bus.number?;
        let master = bus.master_away.as_ref();
        if let Some((slot, address)) = master
            && **address == *dst
        {
            let slot = *slot;
            return Some(self.open_away(slot, number, &[]));
        }
        let (slot, address) = if let Some(slot) = bus.routes.get(dst) {
            (*slot, dst)
        } else if dst[0].is_ascii_digit() || dst[0] == b'@' && is_master {
            ((*self.blocks.get(&block_of(dst)?)?)?, dst)
        } else if dst[0] == b'@' || is_master || bus.master.is_some() {
            return None;
        } else {
            // Nobody owns the name: it goes to the master.
            (master?.0, &[][..])
        };
        if !joined {
            return Some(Err(libc::EHOSTUNREACH));
        }
        Some(self.open_away(slot, number, address))
    }

    /// The seat of a destination, which is opened with its first use.
    fn open_away(&mut self, slot: usize, number: u32, address: &[u8]) -> Result<Ref, i32> {
        let trunk = self.at(slot).ok_or(libc::EHOSTUNREACH)?;
        if let Some(open) = trunk.out.number_of(number, address)
            && let Some(destination) = trunk.out.destination(open)
        {
            return Ok(destination.seat);
        }
        if trunk.is_down {
            return Err(libc::EHOSTDOWN);
        }
        if trunk.out.destination_count() >= DESTINATIONS {
            let gone = trunk.out.forget_idle(&trunk.waiting);
            let is_full = trunk.out.destination_count() >= DESTINATIONS;
            for seat in gone {
                self.stand_up(seat);
            }
            if is_full {
                return Err(libc::EDQUOT);
            }
        }
        let next = self.at(slot).map_or(0, |t| t.out.next_destination());
        let seat = self.seat_for(Remote::Destination(slot, next), &[]);
        if let Some(trunk) = self.at(slot) {
            trunk.out.open(number, address, seat);
        }
        Ok(seat)
    }

    /// Whether any of these is on a node to which no large bodies are carried.
    pub(super) fn cannot_carry(&self, targets: &[Target]) -> bool {
        targets.iter().any(|target| {
            let remote = self.get(target.to).and_then(|t| t.remote);
            let Some(Remote::Trunk(slot)) = remote else {
                return false;
            };
            self.trunks[slot]
                .as_ref()
                .is_some_and(|t| !t.carries_bodies)
        })
    }

    // ---- messages ------------------------------------------------------------------------------------------------

    fn message_of<'a>(
        to: To,
        address: &[u8],
        letter: &Letter<'a>,
        ctl: &'a [u8],
        ticket: Option<u32>,
    ) -> Message<'a> {
        Message {
            sender: 0,
            to,
            seq: letter.header.seq,
            serial: letter.header.serial,
            reply_to: letter.header.reply_to,
            deadline_ms: letter.deadline_ms.filter(|_| matches!(to, To::One(_))),
            src: letter.src,
            dst: if matches!(to, To::One(_)) && letter.dst == address {
                &[]
            } else {
                letter.dst
            },
            ctl,
            outside: ticket.map(|ticket| (ticket, letter.header.body_len)),
            body: &[],
        }
    }

    fn kind_of(letter: &Letter<'_>) -> To {
        if letter.header.flags & BY_TERMS != 0 {
            To::Terms
        } else {
            To::Bits
        }
    }

    /// Whether a letter could go onto a lane now.
    #[cold]
    pub(super) fn fit_away(&mut self, remote: Remote, letter: &Letter<'_>) -> Put {
        let is_outside = letter.header.flags & BODY_IN_MEMFD != 0;
        let (slot, number) = match remote {
            Remote::Trunk(slot) => (slot, None),
            Remote::Destination(slot, number) => (slot, Some(number)),
            Remote::Sender(..) => return Put::No(libc::EHOSTUNREACH),
        };
        let Some(trunk) = self.at(slot) else {
            return Put::No(libc::EHOSTUNREACH);
        };
        let destination = number.and_then(|n| trunk.out.destination(n));
        if trunk.is_down {
            return Put::No(libc::EHOSTDOWN);
        }
        if number.is_some() && destination.is_none_or(|d| d.is_dead) {
            return Put::No(libc::EHOSTUNREACH);
        }
        if letter.fds.len() > usize::from(is_outside) || is_outside && !trunk.carries_bodies {
            return Put::No(libc::EOPNOTSUPP);
        }
        let to = number.map_or_else(|| Self::kind_of(letter), To::One);
        let address = destination.map_or(&[][..], |d| &d.address);
        let body_len = inside_len(letter);
        let message = Self::message_of(to, address, letter, &[], is_outside.then_some(0));
        let len = message.record_len(body_len);
        let cost = len as u64 + MESSAGE_COST;
        if len > RECORD_BYTES || cost > WINDOW {
            return Put::No(libc::EMSGSIZE);
        }
        let credit = destination.map_or(Room::Yes, |d| d.room(letter.from, cost));
        let is_stuck = trunk.out.is_choked() || is_outside && trunk.parked.len() >= PARKED;
        let is_free = !is_stuck
            && credit == Room::Yes
            && trunk.out.room(letter.from, len as u64) == Room::Yes;
        if is_free { Put::Done } else { Put::Full }
    }

    /// Puts a letter onto a lane that has room for it.
    #[cold]
    pub(super) fn put_away(&mut self, remote: Remote, letter: &Letter<'_>) -> Put {
        let (slot, to) = match remote {
            Remote::Trunk(slot) => (slot, Self::kind_of(letter)),
            Remote::Destination(slot, number) => (slot, To::One(number)),
            Remote::Sender(..) => return Put::No(libc::EHOSTUNREACH),
        };
        if letter.header.flags & BODY_IN_MEMFD != 0 {
            return match self.park(slot, to, letter) {
                Ok(()) => Put::Done,
                Err(errno) => Put::No(errno),
            };
        }
        self.put_record(slot, to, letter, &[], None);
        Put::Done
    }

    fn put_record(
        &mut self,
        slot: usize,
        to: To,
        letter: &Letter<'_>,
        ctl: &[u8],
        ticket: Option<u32>,
    ) {
        self.introduce(slot, letter.from);
        let body_len = inside_len(letter);
        let Some(trunk) = self.at(slot) else { return };
        let id = trunk.id;
        let destination = match to {
            To::One(number) => trunk.out.destination(number),
            _ => None,
        };
        let address: Box<[u8]> = destination.map_or_else(Box::default, |d| d.address.clone());
        let message = Self::message_of(to, &address, letter, ctl, ticket);
        let (cost, body) = trunk.out.put_message(&message, body_len, &letter.charge);
        match letter.body {
            Body::Ring(segment, at) => segment.copy_out(at, body),
            Body::Bytes(bytes) => body.copy_from_slice(bytes),
        }
        self.debit(&letter.charge, cost);
        self.tell_ready(id);
    }

    /// Makes an endpoint known to a lane.
    fn introduce(&mut self, slot: usize, who: Ref) {
        if self.at(slot).is_none_or(|t| t.out.knows(who)) {
            return;
        }
        let Some(e) = self.get(who) else { return };
        let (id, ident) = (e.id, e.ident.clone());
        let number = e.bus.and_then(|b| self.buses.get(&b)?.number);
        if let (Some(number), Some(trunk)) = (number, self.at(slot)) {
            trunk.out.know(who, number, id, &ident);
        }
    }

    /// Notes that a multicast did not go to another node.
    #[cold]
    pub(super) fn missed_away(&mut self, remote: Remote, letter: &Letter<'_>, reason: Reason) {
        let Remote::Trunk(slot) = remote else { return };
        debug_assert!(
            letter.header.flags & MULTICAST != 0,
            "only multicasts are missed"
        );
        self.introduce(slot, letter.from);
        let seq = letter.header.seq;
        if let Some(trunk) = self.at(slot) {
            let to = Self::kind_of(letter);
            trunk.out.miss(
                letter.from,
                to,
                letter.src,
                letter.dst,
                (seq, seq),
                1,
                reason as u32,
            );
        }
    }

    // ---- large bodies --------------------------------------------------------------------------------------------

    /// Keeps a message whose body has to be at the other node before it. What its sender sends next waits, and nobody else.
    fn park(&mut self, slot: usize, to: To, letter: &Letter<'_>) -> Result<(), i32> {
        self.introduce(slot, letter.from);
        let fd = *letter.fds.last().ok_or(libc::EINVAL)?;
        // SAFETY: the descriptor belongs to the record at hand and is open.
        let body = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
        let body = body.map_err(|error| error.raw_os_error().unwrap_or(libc::EMFILE))?;
        let message = Self::message_of(to, &[], letter, &[], Some(0));
        let cost = message.record_len(0) as u64 + MESSAGE_COST;
        let trunk = self.at(slot).ok_or(libc::EHOSTUNREACH)?;
        if let To::One(number) = to {
            trunk.out.reserve(number, cost);
        }
        trunk.last_ticket += 1;
        let (id, ticket) = (trunk.id, trunk.last_ticket);
        let parked = Parked {
            to,
            header: letter.header,
            src: letter.src.into(),
            dst: letter.dst.into(),
            charge: letter.charge,
            cost,
            deadline_ms: letter.deadline_ms,
            body,
        };
        trunk.parked.insert(ticket, parked);
        if let Some(e) = self.get_mut(letter.from) {
            e.parked += 1;
        }
        self.debit(&letter.charge, cost);
        self.lane_events.push(LaneEvent::Body {
            trunk: id,
            ticket,
            size: letter.header.body_len,
        });
        Ok(())
    }

    /// The verdict on whatever an endpoint sends while a large body of it is on its way.
    #[cold]
    pub(super) fn wait_for_bodies(&mut self, who: Ref) -> i32 {
        if let Some(e) = self.get_mut(who) {
            e.waiting = true;
        }
        -libc::EAGAIN
    }

    /// The body of a parked message: a descriptor of its own.
    ///
    /// # Errors
    /// As dup(2); ENOENT when nothing waits for it any more.
    pub fn parked_body(&self, id: u64, ticket: u32) -> std::io::Result<OwnedFd> {
        let parked = self.trunk(id).and_then(|t| t.parked.get(&ticket));
        let gone = || std::io::Error::from_raw_os_error(libc::ENOENT);
        parked.ok_or_else(gone)?.body.try_clone()
    }

    /// The body of a parked message is at the other node, so the message follows; or with an errno, it will not be there.
    pub fn unpark(&mut self, id: u64, ticket: u32, errno: Option<i32>) {
        let Some(slot) = self.trunk_slots.get(&id).copied() else {
            return;
        };
        let Some(parked) = self.at(slot).and_then(|t| t.parked.remove(&ticket)) else {
            return;
        };
        self.settle_parked(slot, ticket, &parked, errno);
        self.publish();
    }

    fn settle_parked(&mut self, slot: usize, ticket: u32, parked: &Parked, errno: Option<i32>) {
        let from = parked.charge.sender;
        if let (To::One(number), Some(trunk)) = (parked.to, self.at(slot)) {
            trunk.out.unreserve(number, parked.cost);
        }
        self.refund(&mut refund(&parked.charge, parked.cost).into_iter().collect());
        let letter = Letter {
            from,
            header: parked.header,
            src: &parked.src,
            dst: &parked.dst,
            ident: &[],
            body: Body::Bytes(&[]),
            fds: &[parked.body.as_raw_fd()],
            charge: parked.charge,
            deadline_ms: parked.deadline_ms,
        };
        match errno {
            None => self.put_record(slot, parked.to, &letter, &[], Some(ticket)),
            Some(errno) => self.lose_parked(slot, &letter, errno),
        }
        if let Some(e) = self.get_mut(from) {
            e.parked -= 1;
            if e.parked == 0 && e.waiting {
                self.room_for(from);
            }
        } else if let Some(trunk) = self.at(slot)
            && !trunk.parked.values().any(|p| p.charge.sender == from)
        {
            // It was gone already, and this was the last that it had sent.
            trunk.out.forget_sender(from);
        }
    }

    /// A message whose body did not get there: its sender is told, or, of a multicast, those who missed it.
    fn lose_parked(&mut self, slot: usize, letter: &Letter<'_>, errno: i32) {
        let me = self.at(slot).map(|t| t.me);
        if letter.header.flags & MULTICAST != 0 {
            self.missed_away(Remote::Trunk(slot), letter, Reason::Full);
            return;
        }
        if let Some(endpoint) = self.get(letter.from).map(|e| e.id) {
            let seq = letter.header.seq;
            self.tell_unread(endpoint, (seq, seq), 1, errno as u32, letter.dst);
        }
        let serial = letter.header.serial;
        let asked = me.and_then(|me| self.get_mut(me)?.unanswered.remove(&(letter.from, serial)));
        if asked.is_some() {
            self.answer_lost(letter.from, serial, letter.dst);
        }
    }

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
        let Remote::Sender(slot, number) = remote else {
            return;
        };
        let Some(trunk) = self.at(slot) else { return };
        let Ok(endpoint) = trunk.inn.sender(number).map(|s| s.endpoint) else {
            return;
        };
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
        let Remote::Sender(slot, number) = remote else {
            return;
        };
        let Some(trunk) = self.at(slot) else { return };
        let Ok(endpoint) = trunk.inn.sender(number).map(|s| s.endpoint) else {
            return;
        };
        let id = trunk.id;
        trunk
            .out
            .report_unread(endpoint, errno, address, range, count);
        self.tell_ready(id);
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
            let need = (w.need + MESSAGE_COST).min(WINDOW / 4);
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

    /// Tells Python that there is something to be sent, once.
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
                self.lane_events.push(LaneEvent::Ready(id));
            }
        } else if trunk.inn.owes() {
            self.owes_trunks = true;
        }
    }

    /// Whether something is to be confirmed before long.
    #[must_use]
    pub fn owes_trunks(&self) -> bool {
        self.owes_trunks
    }

    /// Lets what is to be confirmed wait for a while, and then tells Python.
    #[cold]
    pub(super) fn tell_trunks_later(&mut self, now: Instant) {
        let due = *self.trunks_due.get_or_insert(now + CONFIRM_AFTER);
        if now < due {
            return;
        }
        self.owes_trunks = false;
        self.trunks_due = None;
        for trunk in self.trunks.iter_mut().flatten() {
            if trunk.inn.owes() && !std::mem::replace(&mut trunk.is_told, true) {
                self.lane_events.push(LaneEvent::Ready(trunk.id));
            }
        }
    }
}

/// Bytes of a body that go in the record itself.
fn inside_len(letter: &Letter<'_>) -> usize {
    if letter.header.flags & BODY_IN_MEMFD == 0 {
        letter.header.body_len as usize
    } else {
        0
    }
}

/// Whether an address stands for one endpoint for ever.
pub(super) fn is_unique(address: &[u8]) -> bool {
    address
        .first()
        .is_some_and(|b| b.is_ascii_digit() || *b == b'@')
}
