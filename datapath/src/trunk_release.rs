//! Messages from other nodes that wait for room: how they are held, and how they get into rings.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use super::{Letter, MAX_BACKLOG, MAX_BACKLOG_BYTES, Switch};
use crate::endpoint::{Charge, Reason, Ref, Room, record};
use crate::frame::{NOTICE, RxHeader};
use crate::ring::{Memory, padded};
use crate::trunk::{Remote, Trunk};
use crate::trunk_hold::{Holds, Item};
use crate::trunk_in::Credit;

impl Switch {
    /// Whether something of this node waits for an endpoint.
    pub(super) fn holds_of(&self, to: Ref, trunk: Ref) -> bool {
        self.get(to)
            .and_then(|t| t.held_for.as_ref())
            .is_some_and(|held| held.has(trunk))
    }

    /// Holds a letter as a record of its own, with a descriptor of its own for its body.
    pub(super) fn hold_letter(
        &mut self,
        trunk: Ref,
        to: Ref,
        letter: &Letter<'_>,
        credit: Option<Credit>,
    ) -> Result<(), i32> {
        // SAFETY: the descriptor belongs to the message at hand and is open.
        let duplicate = |fd: &RawFd| unsafe { BorrowedFd::borrow_raw(*fd) }.try_clone_to_owned();
        let body = letter.fds.last().map(duplicate).transpose();
        let body = body.map_err(|error| error.raw_os_error().unwrap_or(libc::EMFILE))?;
        let bytes = self.whole_record(to, letter);
        self.hold(trunk, to, bytes, letter.charge, credit, body);
        Ok(())
    }

    pub(super) fn hold(
        &mut self,
        trunk: Ref,
        to: Ref,
        bytes: Vec<u8>,
        charge: Charge,
        credit: Option<Credit>,
        body: Option<OwnedFd>,
    ) {
        let len = bytes.len() as u64;
        if let Some(t) = self.trunk_at(trunk) {
            t.inn.held += len;
        }
        let Some(t) = self.get_mut(to) else { return };
        let held = t.held_for.get_or_insert_default();
        held.push(trunk, bytes, charge, credit, body);
        self.want_room(to);
    }

    fn trunk_at(&mut self, seat: Ref) -> Option<&mut Trunk> {
        match self.get(seat)?.remote? {
            Remote::Trunk(slot) => self.at(slot),
            _ => None,
        }
    }

    /// Hands an endpoint a finished record that must not be lost, behind what waits for it from a node.
    pub(super) fn push_behind(&mut self, trunk: Ref, to: Ref, bytes: Vec<u8>, charge: Charge) {
        let Some(t) = self.get_mut(to) else { return };
        let Some(held) = t.held_for.as_ref().filter(|held| held.has(trunk)) else {
            self.push(to, bytes, charge);
            return;
        };
        if held.len() >= MAX_BACKLOG || held.bytes() + bytes.len() as u64 > MAX_BACKLOG_BYTES {
            self.too_slow(to);
            return;
        }
        self.hold(trunk, to, bytes, charge, None, None);
    }

    /// Sends a notice to endpoints behind what waits for them from a node, so that it comes after the last message of its subject
    /// (D15).
    pub fn notify_behind(&mut self, ids: &[u64], body: &[u8], trunk: u64) {
        let Some(me) = self.trunk(trunk).map(|t| t.me) else {
            return self.notify(ids, body);
        };
        let header = RxHeader {
            kind: NOTICE,
            ..RxHeader::default()
        };
        for id in ids {
            if let Some(who) = self.find(*id) {
                let bytes = record(header, &[], &[], &[], &[], body);
                self.push_behind(me, who, bytes, Charge::AGENT);
            }
        }
        self.publish();
    }

    /// Puts what waits for an endpoint from other nodes into its ring, each node in its turn, as far as there is room.
    pub(super) fn release_from_away(&mut self, who: Ref) {
        let mut ready = Vec::new();
        loop {
            let mut moved = false;
            let mut at = 0;
            while let Some(held) = self.get(who).and_then(|e| e.held_for.as_ref())
                && at < held.queue_count()
            {
                let count = held.queue_count();
                if self.release_one(who, at, &mut ready) {
                    moved = true;
                    // If that was the last one of its node, another stands in its place.
                    let now = self.get(who).and_then(|e| e.held_for.as_ref());
                    at += usize::from(now.is_some_and(|held| held.queue_count() == count));
                } else {
                    at += 1;
                }
            }
            if !moved {
                break;
            }
        }
        if let Some(e) = self.get_mut(who)
            && e.held_for.as_ref().is_some_and(|held| held.is_empty())
        {
            e.held_for = None;
        }
        for id in ready {
            self.tell_ready(id);
        }
    }

    fn release_one(&mut self, who: Ref, at: usize, ready: &mut Vec<u64>) -> bool {
        let Some(e) = self.get(who) else { return false };
        let Some(size) = e.io.as_ref().map(|io| io.rx.memory().size()) else {
            return false;
        };
        let front = e.held_for.as_ref().and_then(|held| held.front(at));
        let too_long = match front {
            None => return false,
            Some((_, Item::Gap { .. })) => false,
            Some((
                _,
                Item::Record {
                    bytes,
                    charge,
                    body,
                    ..
                },
            )) => {
                let (len, sender) = (bytes.len() as u64, charge.sender);
                let (body_len, fd) = (charge.body, body.as_ref().map(AsRawFd::as_raw_fd));
                let fits = padded(len) <= size;
                // What is held back of conflated streams is older.
                if fits && e.holds() && !self.release_held(who, Some(sender)) {
                    return false;
                }
                if fits && self.room(who, sender, len) != Room::Yes {
                    return false;
                }
                if let Some(fd) = fd.filter(|_| fits)
                    && !self.send_body(who, fd, body_len)
                {
                    return false;
                }
                !fits
            }
        };
        let Some(e) = self.get_mut(who) else {
            return false;
        };
        let popped = e.held_for.as_mut().and_then(|held| held.pop(at));
        let (trunk, bytes, charge, credit) = match popped {
            None => return false,
            Some((_, Item::Gap { of, gap })) => {
                e.miss_all(of, gap);
                return true;
            }
            Some((
                trunk,
                Item::Record {
                    bytes,
                    charge,
                    credit,
                    ..
                },
            )) => (trunk, bytes, charge, credit),
        };
        if too_long {
            // Its ring is a smaller one than it had.
            e.miss(charge.sender, &[], charge.seq, Reason::Full);
            self.report_lost(&charge, libc::EMSGSIZE);
        } else if let Some(pos) = e.reserve(bytes.len() as u32, charge)
            && let Some(io) = &e.io
        {
            io.rx.memory().copy_in(pos, &bytes);
            e.stats.received += 1;
            self.dirty.push(who);
        }
        self.let_go(trunk, bytes.len() as u64, credit, ready);
        true
    }

    /// Sends the body of a held message ahead of it. `false` when it has to wait.
    pub(super) fn send_body(&mut self, who: Ref, fd: RawFd, size: u32) -> bool {
        let takes = |s: &Self| s.get(who).is_some_and(|e| e.takes_outside(size));
        if !takes(self) {
            self.reclaim(who);
        }
        let io = self.get(who).and_then(|e| e.io.as_ref());
        // A line that is closed says so in another way.
        takes(self) && io.is_some_and(|io| io.send_fds(&[fd]).is_ok())
    }

    fn report_lost(&mut self, charge: &Charge, errno: i32) {
        let remote = self.get(charge.sender).and_then(|s| s.remote);
        if let Some(remote) = remote.filter(|_| charge.told) {
            self.report_unread(remote, errno, &[], (charge.seq, charge.seq), 1);
        }
    }

    /// A record waits no more.
    fn let_go(&mut self, trunk: Ref, len: u64, credit: Option<Credit>, ready: &mut Vec<u64>) {
        if let Some(t) = self.trunk_at(trunk) {
            t.inn.held -= len;
            if let Some(credit) = credit {
                t.inn.release(credit);
            }
            if !ready.contains(&t.id) {
                ready.push(t.id);
            }
        }
    }

    /// What waited for an endpoint that is gone gives its credit back; that nobody read it is told elsewhere.
    pub(super) fn lose_held(&mut self, held: Option<Box<Holds>>) {
        let Some(mut held) = held else { return };
        let mut ready = Vec::new();
        while let Some((trunk, item)) = held.pop(0) {
            if let Item::Record { bytes, credit, .. } = item {
                self.let_go(trunk, bytes.len() as u64, credit, &mut ready);
            }
        }
        for id in ready {
            self.tell_ready(id);
        }
    }

    /// A node begins to count anew what comes from it. What its senders sent is delivered all the same, and what lies unread they can
    /// be told; but not if the node itself `is_anew`: then they are no more.
    pub fn hear_trunk(&mut self, id: u64, is_anew: bool) -> bool {
        let Some(trunk) = self.trunk_mut(id) else {
            return false;
        };
        let mut former = std::mem::take(&mut trunk.former);
        former.extend(trunk.inn.hear(is_anew));
        if is_anew {
            trunk.out.forget_reports();
        } else {
            let unread = self.senders_of_unread();
            let (kept, gone) = former.into_iter().partition(|seat| unread.contains(seat));
            former = gone;
            if let Some(trunk) = self.trunk_mut(id) {
                trunk.former = kept;
            }
        }
        for seat in former {
            self.stand_up(seat);
        }
        true
    }

    fn senders_of_unread(&self) -> HashSet<Ref> {
        let here = self.seats.iter().filter_map(|(_, seat)| seat.as_ref());
        here.flat_map(|e| e.unread()).map(|(who, ..)| who).collect()
    }
}
