//! The part of the switch that sends to other nodes: where a message goes, and what it is on a lane.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::body::PARKED;
use super::{Body, Letter, OK, Put, Switch};
use crate::bus::Target;
use crate::endpoint::{Charge, Credentials, Reason, Ref, Room};
use crate::frame::{
    ADDRESS_BYTES, BODY_IN_MEMFD, BY_TERMS, MESSAGE, MULTICAST, RxHeader, TX_HEADER, TX_STATUS,
    TxHeader,
};
use crate::memory::Segment;
use crate::ring::{Memory, padded};
use crate::sync::Ordering;
use crate::trunk::{Remote, block_of};
use crate::trunk_out::{DESTINATIONS, FIRST_WINDOW};
use crate::trunk_wire::{MESSAGE_COST, Message, RECORD_BYTES, To};

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

    pub(super) fn message_of<'a>(
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
        if len > RECORD_BYTES || cost > FIRST_WINDOW {
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
        if let To::One(number) = to {
            self.way = Some((slot, number));
        }
        Put::Done
    }

    /// Takes the records of a sender that follow one that went to another node, as long as they are like it: to the same
    /// destination, without request numbers and descriptors, and with room for them. What is said of the one that was decided
    /// holds for those then, so only room and quota are looked at. Returns how many records and how many bytes were taken; the next
    /// one is decided like any other.
    pub(super) fn send_on(
        &mut self,
        me: Ref,
        segment: &Arc<Segment>,
        (slot, number): (usize, u32),
        dst_len: usize,
        most: (usize, u64),
    ) -> (usize, u64) {
        let mut taken = (0, 0);
        let bus = self.get(me).and_then(|e| self.buses.get(&e.bus?));
        if bus.is_none_or(|bus| !bus.monitors.is_empty()) {
            return taken;
        }
        let Self {
            seats,
            trunks,
            accounts,
            quota,
            scratch,
            ..
        } = self;
        let (src, dst) = scratch.split_at(scratch.len() - dst_len);
        let (Some(e), Some(trunk)) = (
            seats[me.slot as usize].1.as_deref_mut(),
            trunks[slot].as_deref_mut(),
        ) else {
            return taken;
        };
        let id = trunk.id;
        let (Some(account), Some(mut out)) =
            (accounts.get_mut(&e.principal), trunk.out.follow(me, number))
        else {
            return taken;
        };
        let mut other = [0u8; ADDRESS_BYTES];
        while taken.0 < most.0 && taken.1 < most.1 {
            let Some(io) = &mut e.io else { break };
            // What breaks a rule is found out where records are decided.
            let Ok(Some((pos, len))) = io.tx.peek(TX_HEADER as u32) else {
                break;
            };
            let mut raw = [0u8; TX_HEADER as usize];
            segment.copy_out(pos, &mut raw);
            let Some(h) = TxHeader::decode(&raw, len).ok().filter(TxHeader::is_plain) else {
                break;
            };
            if usize::from(h.dst_len) != dst_len {
                break;
            }
            segment.copy_out(pos + h.dst_at(), &mut other[..dst_len]);
            if other[..dst_len] != *dst {
                break;
            }
            let body_len = h.body_len as usize;
            let shown = RxHeader {
                src_len: src.len() as u16,
                dst_len: h.dst_len,
                body_len: h.body_len,
                ..RxHeader::default()
            };
            let need = padded(shown.sized().len.into());
            let seq = e.next_number();
            let message = out.message(seq, dst);
            let record_len = message.record_len(body_len);
            if record_len > RECORD_BYTES
                || record_len as u64 + MESSAGE_COST > FIRST_WINDOW
                || !out.has_room(record_len)
                || account.bytes + need > quota.bytes
                || account.messages >= quota.messages
            {
                break;
            }
            let charge = Charge {
                sender: me,
                seq,
                principal: e.principal,
                fds: 0,
                body: 0,
                told: true,
            };
            let cost = out.put(&message, body_len, &charge, |out| {
                segment.append_to(pos + h.body_at(), body_len, out);
            });
            account.bytes += cost;
            account.messages += 1;
            e.note_number(seq);
            e.stats.sent += 1;
            segment
                .word_at(pos + TX_STATUS)
                .store(OK as u32, Ordering::Relaxed);
            if let Some(io) = &mut e.io {
                io.tx.advance(len);
            }
            taken.0 += 1;
            taken.1 += u64::from(len);
        }
        if taken.0 > 0 {
            self.tell_ready(id);
        }
        taken
    }

    pub(super) fn put_record(
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
        let body = |out: &mut Vec<u8>| match letter.body {
            Body::Ring(segment, at) => segment.append_to(at, body_len, out),
            Body::Bytes(bytes) => out.extend_from_slice(bytes),
        };
        let cost = trunk
            .out
            .put_message(&message, body_len, &letter.charge, body);
        self.debit(&letter.charge, cost);
        self.tell_ready(id);
    }

    /// Makes an endpoint known to a lane.
    pub(super) fn introduce(&mut self, slot: usize, who: Ref) {
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
    // ---- control items -------------------------------------------------------------------------------------------

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
        let seq = e.next_number();
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
            e.note_number(seq);
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

/// Bytes of a body that go in the record itself.
fn inside_len(letter: &Letter<'_>) -> usize {
    if letter.header.flags & BODY_IN_MEMFD == 0 {
        letter.header.body_len as usize
    } else {
        0
    }
}
