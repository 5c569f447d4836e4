//! The part of the switch that receives from other nodes: every record is checked, every message is delivered, held, or reported.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::send::{OVERFLOW_ID, is_unique};
use super::{Body, Letter, MAX_BACKLOG, MAX_BACKLOG_BYTES, MAX_REQUESTS, Put, Switch, sized_for};
use crate::bloom::Bits;
use crate::bus::{Bus, Overflow, Target};
use crate::endpoint::{AGENT, Charge, Gap, Reason, Ref, Room, record};
use crate::frame::{BODY_IN_MEMFD, BY_TERMS, MESSAGE, MULTICAST, NO_REPLY, NOTICE, RxHeader};
use crate::memory::{BODY_SEALS, file_size, seals};
use crate::ring::{Memory, padded};
use crate::trunk::{LaneEvent, Remote, block_of};
use crate::trunk_hold::{Holds, Item};
use crate::trunk_in::Credit;
use crate::trunk_wire::{Batch, Broken, MESSAGE_COST, Message, Record, To, cut, ident_is_of};

/// Bytes of other nodes' messages that wait for room in one ring.
const HELD_FOR_ENDPOINT: u64 = 16 << 20;
/// Bytes of one node's messages that wait for room in rings.
const HELD_OF_TRUNK: u64 = 64 << 20;
/// Requests of other nodes that one endpoint may leave open.
const MAX_UNANSWERED: usize = 65_536;
/// Bodies of one node that wait for their messages.
const BODIES: usize = 128;
/// Bytes of the other agents that wait for this one.
const SIGNAL_BYTES: usize = 16 << 20;

/// A sender as its message needs it.
struct From {
    seat: Ref,
    bus: u32,
    src: Box<[u8]>,
    ident: Arc<[u8]>,
}

impl Switch {
    /// Takes a batch of a node. What stands before a record that breaks a rule has taken effect.
    ///
    /// # Errors
    /// [`Broken`] names the rule; the link has to end.
    pub fn inject(&mut self, id: u64, bytes: &[u8], now: Instant) -> Result<(), Broken> {
        let Some(slot) = self.trunk_slots.get(&id).copied() else {
            return Err(Broken::Malformed("a batch of a node that is not known"));
        };
        let taken = self.take_records(slot, bytes, now);
        for who in std::mem::take(&mut self.gapped) {
            self.want_room(who);
            self.make_room(who);
        }
        self.room_away(id);
        self.tell_ready(id);
        self.publish();
        taken
    }

    fn take_records(&mut self, slot: usize, bytes: &[u8], now: Instant) -> Result<(), Broken> {
        let batch = Batch::decode(bytes)?;
        self.take_word(slot, &batch)?;
        let mut rest = batch.records;
        for number in batch.first..batch.first + u64::from(batch.count) {
            let (one, behind) = cut(rest)?;
            let is_new = self
                .at(slot)
                .map_or(Ok(false), |t| t.inn.is_new(number, one.len()))?;
            if is_new {
                let (record, _) = Record::decode(one)?;
                self.take_record(slot, &record, one.len(), now)?;
            }
            rest = behind;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(Broken::Malformed("bytes behind the last record"))
        }
    }

    /// What the peer has received, and what it allows.
    fn take_word(&mut self, slot: usize, batch: &Batch<'_>) -> Result<(), Broken> {
        let mut refunds = std::mem::take(&mut self.refunds);
        let mut result = Ok(());
        if let Some(trunk) = self.at(slot) {
            result = trunk.out.confirm(batch.received, &mut refunds);
            for (destination, limit) in batch.credits() {
                result = result.and_then(|()| trunk.out.allow(destination, limit, &mut refunds));
            }
        }
        self.refund(&mut refunds);
        self.refunds = refunds;
        result
    }

    fn take_record(
        &mut self,
        slot: usize,
        record: &Record<'_>,
        len: usize,
        now: Instant,
    ) -> Result<(), Broken> {
        let Some(trunk) = self.at(slot) else {
            return Ok(());
        };
        match record {
            Record::Open {
                destination,
                bus,
                address,
            } => trunk.inn.open(*destination, *bus, address)?,
            Record::Forget { destination } => trunk.inn.forget(*destination)?,
            Record::Sender {
                sender,
                bus,
                endpoint,
                ident,
            } => {
                if !ident_is_of(ident, &trunk.node) {
                    return Err(Broken::Forged("an identity of another node".to_owned()));
                }
                trunk.inn.add_sender(*sender, *bus, *endpoint, ident)?;
            }
            Record::Gone { sender } => {
                if let Some(seat) = trunk.inn.remove_sender(*sender)? {
                    self.stand_up(seat);
                }
            }
            Record::Message(message) => match message.to {
                To::One(number) => self.take_unicast(slot, number, message, len, now)?,
                _ => self.take_multicast(slot, message)?,
            },
            Record::Missed {
                sender,
                to,
                first,
                last,
                count,
                reason,
                src,
                dst,
            } => {
                let gap = Gap {
                    src: Box::default(),
                    first: *first,
                    last: *last,
                    count: *count,
                    reason: Reason::from(*reason),
                };
                self.take_missed(slot, *sender, *to, src, dst, gap)?;
            }
            Record::Alive {
                is_alive,
                bus,
                address,
            } => {
                if is_unique(address)
                    && let Some(seat) = trunk.out.set_alive(*bus, address, *is_alive)
                {
                    self.try_again(Some(seat));
                }
            }
            Record::Unread {
                endpoint,
                first,
                last,
                count,
                errno,
                address,
            } => self.take_unread(slot, *endpoint, (*first, *last), *count, *errno, address),
            Record::NoReply {
                endpoint,
                serial,
                address,
            } => {
                let me = trunk.me;
                if let Some(who) = self.find(*endpoint)
                    && let Some(t) = self.get_mut(me)
                    && t.unanswered.remove(&(who, *serial)).is_some()
                {
                    self.no_reply_from(me, who, *serial, address);
                }
            }
            Record::Signal { data } => {
                let id = trunk.id;
                let waiting: usize = self
                    .lane_events
                    .iter()
                    .map(|event| match event {
                        LaneEvent::Signal(_, data) => data.len(),
                        _ => 0,
                    })
                    .sum();
                if waiting + data.len() > SIGNAL_BYTES {
                    return Err(Broken::Malformed("more signals than anybody can take"));
                }
                self.lane_events.push(LaneEvent::Signal(id, (*data).into()));
            }
        }
        Ok(())
    }

    fn no_reply_from(&mut self, trunk: Ref, who: Ref, serial: u64, address: &[u8]) {
        if let Some(e) = self.get_mut(who) {
            e.requests = e.requests.saturating_sub(1);
        }
        let header = RxHeader {
            kind: NO_REPLY,
            reply_to: serial,
            ..RxHeader::default()
        };
        let bytes = record(header, address, &[], &[], &[], &[]);
        self.push_behind(trunk, who, bytes, Charge::AGENT);
    }

    fn take_unread(
        &mut self,
        slot: usize,
        endpoint: u64,
        range: (u64, u64),
        count: u64,
        errno: u32,
        address: &[u8],
    ) {
        // Only who has sent something there is told that nobody read it.
        let who = self.find(endpoint);
        if !who.is_some_and(|who| self.at(slot).is_some_and(|t| t.out.knows(who))) {
            return;
        }
        self.tell_unread(endpoint, range, count, errno, address);
    }

    // ---- who sends -----------------------------------------------------------------------------------------------

    /// The sender of a message, with its source checked (D6), or the errno with which the message is refused.
    fn sender_of(
        &mut self,
        slot: usize,
        number: u32,
        seq: u64,
        src: &[u8],
    ) -> Result<Result<From, i32>, Broken> {
        let version = self.routes_version + 1;
        let Some(trunk) = self.at(slot) else {
            return Ok(Err(libc::EHOSTUNREACH));
        };
        let id = trunk.id;
        let sender = trunk.inn.sender(number)?;
        if seq <= sender.seq {
            return Err(Broken::Malformed("messages of a sender out of order"));
        }
        sender.seq = seq;
        if !src.is_empty() && *src != *sender.src {
            sender.src = src.into();
            sender.checked = 0;
        }
        if sender.src.is_empty() {
            return Err(Broken::Malformed("a message without a source"));
        }
        let (bus, src, checked) = (sender.bus, sender.src.clone(), sender.checked);
        // A bus that nobody here is on is not known here, and its messages are for nobody.
        let Some(bus) = self.clustered.get(&bus).copied() else {
            return Ok(Err(libc::EHOSTUNREACH));
        };
        if checked != version {
            let is_its = self.is_of(slot, bus, &src)?;
            let Some(trunk) = self.at(slot) else {
                return Ok(Err(libc::EHOSTUNREACH));
            };
            if !is_its {
                trunk.forged += 1;
                if trunk.forged.is_power_of_two() {
                    self.lane_events.push(LaneEvent::Source(id, src));
                }
                return Ok(Err(libc::EADDRNOTAVAIL));
            }
            trunk.inn.sender(number)?.checked = version;
            trunk.inn.note_source(number);
        }
        let seat = self.sender_seat(slot, number)?;
        let Some(e) = self.get_mut(seat) else {
            return Ok(Err(libc::EHOSTUNREACH));
        };
        e.bus = Some(bus);
        let ident = e.ident.clone();
        Ok(Ok(From {
            seat,
            bus,
            src,
            ident,
        }))
    }

    fn sender_seat(&mut self, slot: usize, number: u32) -> Result<Ref, Broken> {
        let Some(trunk) = self.at(slot) else {
            return Ok(AGENT);
        };
        let sender = trunk.inn.sender(number)?;
        if let Some(seat) = sender.seat {
            return Ok(seat);
        }
        let ident = sender.ident.clone();
        let seat = self.seat_for(Remote::Sender(slot, number), &ident);
        if let Some(trunk) = self.at(slot) {
            trunk.inn.sender(number)?.seat = Some(seat);
        }
        Ok(seat)
    }

    /// Whether an address belongs to a node. What belongs to nobody is refused and no more: the tables of two nodes are not
    /// changed at the same time. A unique address of somebody else is a forgery, for blocks never change hands.
    fn is_of(&self, slot: usize, bus: u32, src: &[u8]) -> Result<bool, Broken> {
        let forged = |whose| {
            let text = format!("the source {} of {whose}", src.escape_ascii());
            Err(Broken::Forged(text))
        };
        if is_unique(src) {
            return match block_of(src).and_then(|block| self.blocks.get(&block)) {
                Some(Some(owner)) if *owner == slot => Ok(true),
                Some(Some(_)) => forged("another node"),
                Some(None) => forged("this node"),
                None => Ok(false),
            };
        }
        // The master may say that it is the master before its name is in the table.
        let is_its = |b: &Bus| {
            let master = b.master_away.as_ref();
            b.routes.get(src) == Some(&slot)
                || master.is_some_and(|(at, address)| *at == slot && **address == *src)
        };
        Ok(self.buses.get(&bus).is_some_and(is_its))
    }

    fn letter<'a>(from: &'a From, m: &Message<'a>, dst: &'a [u8], fds: &'a [RawFd]) -> Letter<'a> {
        let size = m.outside.map_or(0, |(_, size)| size);
        let told = matches!(m.to, To::One(_));
        let flags = match m.to {
            To::One(_) => 0,
            To::Terms => MULTICAST | BY_TERMS,
            To::Bits | To::Anything => MULTICAST,
        };
        Letter {
            from: from.seat,
            header: RxHeader {
                kind: MESSAGE,
                flags: flags | if fds.is_empty() { 0 } else { BODY_IN_MEMFD },
                fds: fds.len() as u8,
                seq: m.seq,
                serial: m.serial,
                reply_to: m.reply_to,
                uid: OVERFLOW_ID,
                gid: OVERFLOW_ID,
                src_len: from.src.len() as u16,
                dst_len: dst.len() as u16,
                body_len: m.body.len() as u32 + size,
                ..RxHeader::default()
            },
            src: &from.src,
            dst,
            ident: &from.ident,
            body: Body::Bytes(m.body),
            fds,
            charge: Charge {
                sender: from.seat,
                seq: m.seq,
                body: size,
                told,
                ..Charge::AGENT
            },
            deadline_ms: m.deadline_ms,
        }
    }

    /// The body of a message that came before it, by a way of its own.
    fn body_of(&mut self, slot: usize, m: &Message<'_>) -> Result<Option<OwnedFd>, Broken> {
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

    // ---- to one --------------------------------------------------------------------------------------------------

    fn take_unicast(
        &mut self,
        slot: usize,
        destination: u32,
        m: &Message<'_>,
        len: usize,
        now: Instant,
    ) -> Result<(), Broken> {
        let Some(trunk) = self.at(slot) else {
            return Ok(());
        };
        let (number, address) = trunk.inn.destination(destination)?;
        let address: Box<[u8]> = address.into();
        let is_control = !m.ctl.is_empty();
        let credit = if is_control {
            None
        } else {
            let cost = len as u64 + MESSAGE_COST;
            Some(trunk.inn.charge(destination, cost)?)
        };
        let bus = self.clustered.get(&number).and_then(|b| self.buses.get(b));
        let is_masters = bus.and_then(|b| b.master_away.as_ref()).map(|(at, _)| *at) == Some(slot);
        if is_control && !is_masters {
            return Err(Broken::Forged(
                "control items from a node that has not the master".to_owned(),
            ));
        }
        let dst = if m.dst.is_empty() { &address } else { m.dst };
        if dst.is_empty() {
            return Err(Broken::Malformed("a message without a destination"));
        }
        if self.at(slot).is_some_and(|t| {
            let sender = t.inn.sender(m.sender);
            sender.is_ok_and(|s| s.bus != number)
        }) {
            return Err(Broken::Malformed("a destination on another bus"));
        }
        let body = self.body_of(slot, m)?;
        let fds: Vec<RawFd> = body.iter().map(AsRawFd::as_raw_fd).collect();
        let from = self.sender_of(slot, m.sender, m.seq, m.src)?;
        let outcome = match &from {
            Err(errno) => Err(*errno),
            Ok(from) => self
                .find_here(from, dst, &address, is_masters)
                .and_then(|to| {
                    let letter = Self::letter(from, m, dst, &fds);
                    self.put_here(slot, to, &letter, credit, m.ctl)
                        .map(|()| (to, letter))
                }),
        };
        match outcome {
            Ok((to, letter)) => {
                let me = self.at(slot).map_or(AGENT, |t| t.me);
                self.answered(me, to, m.reply_to);
                // Its own node counts them as well; what is more, nobody answers for.
                let is_counted = self
                    .get(letter.from)
                    .is_some_and(|e| e.requests < MAX_REQUESTS)
                    && self
                        .get(to)
                        .is_some_and(|t| t.unanswered.len() < MAX_UNANSWERED);
                if let Some(ms) = m.deadline_ms.filter(|_| is_counted) {
                    let until = now + Duration::from_millis(ms.into());
                    self.expect(letter.from, to, m.serial, until, now);
                }
                if let Some(bus) = self.get(letter.from).and_then(|e| e.bus) {
                    self.copy_to_monitors(bus, &letter, body.is_some());
                }
            }
            Err(errno) => self.refuse(slot, m, dst, errno, credit),
        }
        Ok(())
    }

    /// Nobody gets a message: its credit goes back, and its sender is told.
    fn refuse(
        &mut self,
        slot: usize,
        m: &Message<'_>,
        dst: &[u8],
        errno: i32,
        credit: Option<Credit>,
    ) {
        let remote = Remote::Sender(slot, m.sender);
        if let (Some(trunk), Some(credit)) = (self.at(slot), credit)
            && errno == libc::EHOSTUNREACH
            && is_unique(dst)
            && let Ok((bus, dst)) = trunk.inn.destination(credit.destination)
        {
            let address: Box<[u8]> = dst.into();
            trunk.out.put(&Record::Alive {
                is_alive: false,
                bus,
                address: &address,
            });
        }
        self.report_unread(remote, errno, dst, (m.seq, m.seq), 1);
        if m.deadline_ms.is_some() {
            self.answer_lost_away(remote, m.serial, dst);
        }
        if let (Some(trunk), Some(credit)) = (self.at(slot), credit) {
            trunk.inn.release(credit);
        }
    }

    /// Who gets a message from elsewhere, or the errno.
    fn find_here(
        &self,
        from: &From,
        dst: &[u8],
        address: &[u8],
        is_masters: bool,
    ) -> Result<Ref, i32> {
        let bus = self.buses.get(&from.bus).ok_or(libc::EHOSTUNREACH)?;
        let to = match bus.owners.get(dst) {
            Some(owner) => *owner,
            None if dst[0] == b'@' => match bus.provisional.get(dst) {
                Some(owner) if is_masters => *owner,
                _ => return Err(libc::EHOSTUNREACH),
            },
            None if is_unique(dst) => return Err(libc::EHOSTUNREACH),
            // Nobody owns the name any more, or nobody ever did: the master gets it (D7).
            None => bus.master.ok_or(if address.is_empty() {
                libc::EHOSTDOWN
            } else {
                libc::EHOSTUNREACH
            })?,
        };
        // Who has not joined can talk to the master only.
        if from.src.first() == Some(&b'@') && bus.master != Some(to) {
            return Err(libc::EHOSTUNREACH);
        }
        Ok(to)
    }

    /// Puts a message into a ring, or holds it until there is room.
    fn put_here(
        &mut self,
        slot: usize,
        to: Ref,
        letter: &Letter<'_>,
        credit: Option<Credit>,
        ctl: &[u8],
    ) -> Result<(), i32> {
        let me = self.at(slot).map_or(AGENT, |t| t.me);
        if !ctl.is_empty() {
            return self.put_control(me, to, letter, ctl);
        }
        let waits = self.holds_of(to, me);
        if !waits {
            match self.put(to, letter) {
                Put::Done => {
                    if let (Some(trunk), Some(credit)) = (self.at(slot), credit) {
                        trunk.inn.release(credit);
                    }
                    return Ok(());
                }
                Put::No(errno) => return Err(errno),
                Put::Full | Put::LineFull => {}
            }
        }
        let t = self.get(to).filter(|t| !t.cut).ok_or(libc::EHOSTUNREACH)?;
        let len = u64::from(sized_for(t, letter).len);
        if t.io
            .as_ref()
            .is_some_and(|io| padded(len) > io.rx.memory().size())
        {
            return Err(libc::EMSGSIZE);
        }
        let held = t.held_for.as_ref().map_or(0, |held| held.bytes());
        let of_trunk = self.at(slot).map_or(0, |t| t.inn.held);
        if held + len > HELD_FOR_ENDPOINT || of_trunk + len > HELD_OF_TRUNK {
            return Err(libc::EDQUOT);
        }
        self.hold_letter(me, to, letter, credit)
    }

    /// A message with control items is never refused for lack of room.
    fn put_control(
        &mut self,
        trunk: Ref,
        to: Ref,
        letter: &Letter<'_>,
        ctl: &[u8],
    ) -> Result<(), i32> {
        let t = self.get(to).filter(|t| !t.cut).ok_or(libc::EHOSTUNREACH)?;
        let ident = if t.wants_ident { letter.ident } else { &[] };
        let Body::Bytes(body) = letter.body else {
            return Err(libc::EINVAL);
        };
        let bytes = record(letter.header, letter.src, letter.dst, ident, ctl, body);
        let size = t.io.as_ref().map(|io| io.rx.memory().size());
        if size.is_some_and(|size| padded(bytes.len() as u64) > size) {
            return Err(libc::EMSGSIZE);
        }
        self.push_behind(trunk, to, bytes, letter.charge);
        if let Some(t) = self.get_mut(to) {
            t.stats.received += 1;
        }
        Ok(())
    }

    // ---- to many -------------------------------------------------------------------------------------------------

    /// Who on this node wants a multicast.
    fn targets_here(&mut self, bus: u32, to: To, dst: &[u8]) -> Result<Vec<Target>, Broken> {
        let Some(bus) = self.buses.get_mut(&bus) else {
            return Ok(Vec::new());
        };
        let mut targets = match to {
            To::Terms => {
                let way = bus.way(dst);
                way.map_err(|_| Broken::Malformed("terms that are none"))?
                    .targets
                    .clone()
            }
            To::Bits => {
                let bits = Bits::from_bytes(dst).ok();
                let bits = bits
                    .filter(|_| dst.len() * 8 == bus.width)
                    .ok_or(Broken::Malformed("bits of another width"))?;
                bus.targets(&bits, None)
            }
            To::One(_) | To::Anything => bus.everybody(),
        };
        // What came from one node goes to no other: each sends to all.
        targets.retain(|target| self.get(target.to).is_some_and(|t| t.remote.is_none()));
        Ok(targets)
    }

    fn take_multicast(&mut self, slot: usize, m: &Message<'_>) -> Result<(), Broken> {
        let body = self.body_of(slot, m)?;
        let fds: Vec<RawFd> = body.iter().map(AsRawFd::as_raw_fd).collect();
        let Ok(from) = self.sender_of(slot, m.sender, m.seq, m.src)? else {
            return Ok(());
        };
        if from.src.first() == Some(&b'@') {
            return Err(Broken::Malformed("a multicast of who has not joined"));
        }
        let mut targets = self.targets_here(from.bus, m.to, m.dst)?;
        let letter = Self::letter(&from, m, m.dst, &fds);
        self.choose(&mut targets, &letter);
        let me = self.at(slot).map_or(AGENT, |t| t.me);
        for target in targets {
            self.put_multicast_here(me, target, &letter);
        }
        self.copy_to_monitors(from.bus, &letter, body.is_some());
        Ok(())
    }

    fn put_multicast_here(&mut self, trunk: Ref, target: Target, letter: &Letter<'_>) {
        let keeps_senders_waiting = matches!(target.overflow, Overflow::Block(_));
        if !self.holds_of(target.to, trunk) {
            if !keeps_senders_waiting {
                return self.put_multicast(target, letter);
            }
            if matches!(self.put(target.to, letter), Put::Done) {
                return;
            }
        }
        // Its sender is on another node and waits for nobody here, so the message waits itself, as far as that goes. Behind what
        // waits already, there is no other way.
        let Some(t) = self.get(target.to).filter(|t| !t.cut) else {
            return;
        };
        let len = u64::from(sized_for(t, letter).len);
        let fits =
            t.io.as_ref()
                .is_none_or(|io| padded(len) <= io.rx.memory().size());
        let takes = t
            .held_for
            .as_ref()
            .is_none_or(|held| held.takes_cast(trunk, len));
        let reason = if keeps_senders_waiting {
            Reason::Deadline
        } else {
            Reason::Full
        };
        if fits && takes && self.hold_letter(trunk, target.to, letter, None).is_ok() {
            return;
        }
        if self.holds_of(target.to, trunk) {
            let gap = Gap {
                src: letter.src.into(),
                first: letter.header.seq,
                last: letter.header.seq,
                count: 1,
                reason,
            };
            self.miss_here(trunk, target.to, letter.from, gap);
        } else {
            self.missed(target.to, letter, reason);
        }
    }

    fn take_missed(
        &mut self,
        slot: usize,
        sender: u32,
        to: To,
        src: &[u8],
        dst: &[u8],
        gap: Gap,
    ) -> Result<(), Broken> {
        // The numbers of several streams of a sender overlap, so the first one counts.
        let before = match self.at(slot) {
            Some(trunk) => trunk.inn.sender(sender)?.seq,
            None => return Ok(()),
        };
        let from = self.sender_of(slot, sender, gap.last.max(before.saturating_add(1)), src)?;
        if let Some(trunk) = self.at(slot) {
            trunk.inn.sender(sender)?.seq = before.max(gap.last);
        }
        let Ok(from) = from else { return Ok(()) };
        let me = self.at(slot).map_or(AGENT, |t| t.me);
        for target in self.targets_here(from.bus, to, dst)? {
            let gap = Gap {
                src: from.src.clone(),
                ..gap.clone()
            };
            self.miss_here(me, target.to, from.seat, gap);
        }
        Ok(())
    }

    /// Notes that somebody here missed messages of a node, behind what waits from there.
    fn miss_here(&mut self, trunk: Ref, to: Ref, of: Ref, gap: Gap) {
        let Some(t) = self.get_mut(to).filter(|t| !t.cut) else {
            return;
        };
        if let Some(held) = t.held_for.as_mut().filter(|held| held.has(trunk)) {
            held.miss(trunk, of, gap);
            return;
        }
        if t.backlog() >= MAX_BACKLOG && t.opens_gap(of) {
            self.too_slow(to);
            return;
        }
        t.miss_all(of, gap);
        // Gaps of several streams of one sender are told as one, at the end of the batch or before the next message.
        if !self.gapped.contains(&to) {
            self.gapped.push(to);
        }
    }

    // ---- what waits ----------------------------------------------------------------------------------------------

    /// Whether something of this node waits for an endpoint.
    fn holds_of(&self, to: Ref, trunk: Ref) -> bool {
        self.get(to)
            .and_then(|t| t.held_for.as_ref())
            .is_some_and(|held| held.has(trunk))
    }

    /// Holds a letter as a record of its own, with a descriptor of its own for its body.
    fn hold_letter(
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

    fn hold(
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

    fn trunk_at(&mut self, seat: Ref) -> Option<&mut crate::trunk::Trunk> {
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
    fn send_body(&mut self, who: Ref, fd: RawFd, size: u32) -> bool {
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

    /// A node begins to count anew what comes from it: its senders are no more. What they sent is delivered all the same.
    pub fn hear_trunk(&mut self, id: u64) -> bool {
        let Some(trunk) = self.trunk_mut(id) else {
            return false;
        };
        for seat in trunk.inn.hear() {
            self.stand_up(seat);
        }
        true
    }
}
