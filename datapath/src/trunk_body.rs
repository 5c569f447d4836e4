//! Large bodies between nodes: they go first, by a way of their own, and their messages follow when they are there (D14).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::{Body, Letter, Switch};
use crate::endpoint::{Reason, Ref};
use crate::frame::MULTICAST;
use crate::memory::{BODY_SEALS, file_size, seals};
use crate::trunk::{LaneEvent, Parked, Remote};
use crate::trunk_out::refund;
use crate::trunk_wire::{Broken, MESSAGE_COST, Message, To};

/// Large bodies on their way to one node.
pub(super) const PARKED: usize = 64;
/// Bodies of one node that wait for their messages.
const BODIES: usize = 128;

impl Switch {
    /// Keeps a message whose body has to be at the other node before it. What its sender sends next waits, and nobody else.
    pub(super) fn park(&mut self, slot: usize, to: To, letter: &Letter<'_>) -> Result<(), i32> {
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

    pub(super) fn settle_parked(
        &mut self,
        slot: usize,
        ticket: u32,
        parked: &Parked,
        errno: Option<i32>,
    ) {
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
        self.signal_late(slot);
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

    /// The body of a message that came before it, by a way of its own.
    pub(super) fn body_of(
        &mut self,
        slot: usize,
        m: &Message<'_>,
    ) -> Result<Option<OwnedFd>, Broken> {
        let Some((ticket, size)) = m.outside else {
            return Ok(None);
        };
        let body = self.at(slot).and_then(|t| t.inn.bodies.remove(&ticket));
        let body = body.ok_or(Broken::Malformed("a message whose body is not there"))?;
        if file_size(body.as_fd()).ok() != Some(size.into()) {
            return Err(Broken::Malformed("a body of another size"));
        }
        Ok(Some(body))
    }

    /// Keeps a body that has come whole from a node, until its message comes. It has all seals. `false` when there are too many,
    /// or the ticket is taken, or it is not sealed.
    pub fn put_body(&mut self, id: u64, ticket: u32, body: OwnedFd) -> bool {
        let sealed = seals(body.as_fd()).is_some_and(|have| have & BODY_SEALS == BODY_SEALS);
        let Some(trunk) = self.trunk_mut(id).filter(|_| sealed) else {
            return false;
        };
        if trunk.inn.bodies.len() >= BODIES || trunk.inn.bodies.contains_key(&ticket) {
            return false;
        }
        trunk.inn.bodies.insert(ticket, body);
        true
    }
}
