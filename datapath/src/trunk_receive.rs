//! The part of the switch that receives from other nodes: every record is checked, every message is delivered, held, or reported.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::calls::OVERFLOW_ID;
use super::tell::is_unique;
use super::{Body, Letter, MAX_BACKLOG, MAX_REQUESTS, Put, Switch, shown_to, sized_for};
use crate::bloom::Bits;
use crate::bus::{Bus, Overflow, Target};
use crate::endpoint::{AGENT, Charge, Gap, Reason, Ref, record};
use crate::frame::{BODY_IN_MEMFD, BY_TERMS, MESSAGE, MULTICAST, NO_REPLY, RX_HEADER, RxHeader};
use crate::ring::{Memory, padded};
use crate::trunk::{LaneEvent, Remote, block_of};
use crate::trunk_in::Credit;
use crate::trunk_out::WINDOW;
use crate::trunk_wire::{Batch, Broken, MESSAGE_COST, Message, Record, To, cut, ident_is_of};

/// Bytes of other nodes' messages that wait for room in one ring: windows of 32 nodes, or first windows of 256.
const HELD_FOR_ENDPOINT: u64 = 32 * WINDOW;
/// Bytes of one node's messages that wait for room in rings: windows of 64 receivers, or first windows of 512.
const HELD_OF_TRUNK: u64 = 64 * WINDOW;
/// Requests of other nodes that one endpoint may leave open.
const MAX_UNANSWERED: usize = 65_536;
/// Bytes of the other agents that wait for this one.
const SIGNAL_BYTES: usize = 16 << 20;

/// A sender as its message needs it.
pub(super) struct From {
    seat: Ref,
    bus: u32,
    src: Box<[u8]>,
    ident: Arc<[u8]>,
}

/// A message that has come for one endpoint and had nothing but a body: those like it go the same way.
#[derive(Clone, Copy)]
pub(super) struct Arrival {
    /// Numbers on the lane.
    sender: u32,
    destination: u32,
    from: Ref,
    to: Ref,
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
        let (mut number, end) = (batch.first, batch.first + u64::from(batch.count));
        while number < end {
            let (one, behind) = cut(rest)?;
            let is_new = self
                .at(slot)
                .map_or(Ok(false), |t| t.inn.is_new(number, one.len()))?;
            rest = behind;
            number += 1;
            if is_new {
                self.arrival = None;
                let (record, _) = Record::decode(one)?;
                self.take_record(slot, &record, one.len(), now)?;
                if let Some(arrival) = self.arrival
                    && number < end
                {
                    let (taken, behind) = self.take_on(slot, arrival, rest, end - number);
                    rest = behind;
                    number += taken;
                }
            }
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
        let (endpoint, ident) = (sender.endpoint, sender.ident.clone());
        let seat = self.seat_for(Remote::Sender(slot, endpoint), &ident);
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
                if m.is_plain() {
                    self.arrival = Some(Arrival {
                        sender: m.sender,
                        destination,
                        from: letter.from,
                        to,
                    });
                }
            }
            Err(errno) => self.refuse(slot, m, dst, errno, credit),
        }
        Ok(())
    }

    /// Takes messages that are like the one before, as far as there is room for them in the receiver's ring: what was found out
    /// about that one holds for them. Returns how many, and the records behind them.
    fn take_on<'a>(
        &mut self,
        slot: usize,
        arrival: Arrival,
        records: &'a [u8],
        most: u64,
    ) -> (u64, &'a [u8]) {
        let Arrival {
            sender,
            destination,
            from,
            to,
        } = arrival;
        let me = self.at(slot).map_or(AGENT, |t| t.me);
        let bus = self.get(to).and_then(|t| self.buses.get(&t.bus?));
        if self.holds_of(to, me) || bus.is_none_or(|bus| !bus.monitors.is_empty()) {
            return (0, records);
        }
        let (Some(ident), Some(trunk), Some(t)) = (
            self.get(from).map(|e| e.ident.clone()),
            self.trunks[slot].as_deref_mut(),
            self.seats[to.slot as usize].1.as_deref_mut(),
        ) else {
            return (0, records);
        };
        let Some((src, dst)) = trunk.inn.ways(sender, destination) else {
            return (0, records);
        };
        let header = RxHeader {
            kind: MESSAGE,
            uid: OVERFLOW_ID,
            gid: OVERFLOW_ID,
            src_len: src.len() as u16,
            dst_len: dst.len() as u16,
            ..RxHeader::default()
        };
        let mut header = shown_to(t, header, ident.len());
        // All that stands before the body; what differs is filled in for each.
        let head = &mut self.scratch;
        head.clear();
        head.resize(header.body_at() as usize, 0);
        for (at, part) in [
            (RX_HEADER, src),
            (header.dst_at(), dst),
            (header.ident_at(), &ident[..header.ident_len.into()]),
        ] {
            head[at as usize..at as usize + part.len()].copy_from_slice(part);
        }
        let charge = Charge {
            sender: from,
            told: true,
            ..Charge::AGENT
        };
        let Some(mut ring) = t.follow(from) else {
            return (0, records);
        };
        trunk
            .inn
            .follow(sender, destination, records, most, |seq, body| {
                header.seq = seq;
                header.body_len = body.len() as u32;
                header = header.sized();
                head[..RX_HEADER as usize].copy_from_slice(&header.encode());
                ring.put(header.len, Charge { seq, ..charge }, head, body)
            })
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
        let sender = self.at(slot).map(|t| t.inn.sender(m.sender));
        let Some(Ok(endpoint)) = sender.map(|s| s.map(|s| s.endpoint)) else {
            return;
        };
        let remote = Remote::Sender(slot, endpoint);
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
}
