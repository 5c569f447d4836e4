//! The agent's part in lanes: who gets one, and when it ends (docs/internals-lanes.md).
//!
//! Invariants:
//! 1. While there is a lane between two endpoints nothing of its sender goes to its receiver by the switch (D11).
//! 2. A lane is closed before anything changes that it was granted for, so before anybody hears of the change.
//! 3. All the memory of a lane is charged to its sender for as long as there is the lane (D18).

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{OK, Room, Switch, padded, shown_to};
use crate::endpoint::{Charge, Ref, record};
use crate::frame::{LANE_CLOSE, LANE_OPEN, RX_HEADER, RxHeader, TX_HEADER, TxHeader};
use crate::lane_in::wake_writer;
use crate::lane_out::LANE_HEADER;
use crate::line;
use crate::memory::{Board, HEADER_BYTES, Segment};
use crate::ring::Memory;
use crate::sync::Ordering;
use crate::waker;

/// Lanes from one endpoint, and to one.
const MAX_LANES: u32 = 64;
/// Lanes that one endpoint may ask for in a second.
const MAX_ASKED: u32 = 128;
/// Bytes of a lane: a quarter of the RX ring of its receiver, within these.
const LANE_BYTES: (u64, u64) = (HEADER_BYTES as u64, 1 << 20);
/// How long nothing goes through a lane that is taken back.
const IDLE: Duration = Duration::from_secs(10);
/// How a new lane's reader sleeps: it does not know the lane yet, and the agent wakes it.
const NOT_YET_READ: u32 = 2;

/// One lane.
struct Lane {
    from: Ref,
    to: Ref,
    segment: Arc<Segment>,
    board: Board,
    principal: u32,
    bytes: u64,
    /// How far it was when it was looked at last.
    seen: u64,
}

impl Lane {
    fn messages(&self) -> u64 {
        let head = self.segment.head().load(Ordering::Relaxed);
        let count = self.segment.count().load(Ordering::Relaxed);
        count.min(head / LANE_HEADER)
    }

    /// First, last and count of what lies before `end` and was not released. Its sender and its reader may have made it up, for
    /// themselves alone.
    fn unread(&self, end: u64) -> Option<(u64, u64, u64)> {
        let (size, mut pos) = (
            self.segment.size(),
            self.segment.tail().load(Ordering::Acquire),
        );
        if end.checked_sub(pos)? > size {
            return None;
        }
        let mut found: Option<(u64, u64, u64)> = None;
        while pos < end {
            let mut raw = [0u8; 16];
            self.segment.copy_out(pos, &mut raw);
            let len = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
            if u64::from(len) < LANE_HEADER {
                break;
            }
            pos += padded(len.into());
            if pos > end {
                break;
            }
            let seq = raw[8..].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
            let (first, _, count) = found.unwrap_or((seq, seq, 0));
            found = Some((first, seq, count + 1));
        }
        found
    }
}

/// The lanes of one switch.
#[derive(Default)]
pub(super) struct Lanes {
    open: HashMap<u64, Lane>,
    pairs: HashMap<(Ref, Ref), u64>,
    last: u64,
    sweep_at: Option<Instant>,
}

impl Lanes {
    /// When [`Switch::sweep_lanes`] is to be called.
    pub(super) fn sweep_at(&self) -> Option<Instant> {
        self.sweep_at
    }

    /// The memory and the number of the only lane.
    #[cfg(test)]
    pub(super) fn only(&self) -> (Arc<Segment>, u64) {
        assert_eq!(self.open.len(), 1);
        let (number, lane) = self.open.iter().next().expect("a lane");
        (lane.segment.clone(), *number)
    }
}

/// Which lanes of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// On which it sends.
    Out,
    /// On which it receives.
    In,
    /// Both.
    Both,
}

impl Switch {
    /// An endpoint wishes for a lane from a source to an address; its descriptor is where the lane is sent to. The verdict.
    pub(super) fn ask_lane(
        &mut self,
        me: Ref,
        segment: &Arc<Segment>,
        pos: u64,
        h: &TxHeader,
        fds: &[OwnedFd],
        now: Instant,
    ) -> i32 {
        let [answer] = fds else {
            return -libc::EINVAL;
        };
        let mut src = vec![0u8; h.src_len.into()];
        let mut dst = vec![0u8; h.dst_len.into()];
        segment.copy_out(pos + TX_HEADER, &mut src);
        segment.copy_out(pos + h.dst_at(), &mut dst);
        let bus = self.get(me).and_then(|e| e.bus);
        if bus
            .and_then(|bus| self.buses.get(&bus))
            .is_some_and(|bus| !bus.has_lanes)
        {
            // Never on this bus: nobody need ask again.
            return -libc::EOPNOTSUPP;
        }
        let Some(to) = self.may_have_lane(me, &mut src, &dst, now) else {
            return -libc::EAGAIN;
        };
        match self.make_lane(me, to, &src, &dst, answer, now) {
            Ok(true) => OK,
            // For want of memory or descriptors.
            Ok(false) | Err(_) => -libc::EAGAIN,
        }
    }

    /// To whom a lane may lead, if there may be one. Fills in the source.
    fn may_have_lane(
        &mut self,
        me: Ref,
        src: &mut Vec<u8>,
        dst: &[u8],
        now: Instant,
    ) -> Option<Ref> {
        if !self.may_send_to(me, dst) {
            return None;
        }
        let e = self.get_mut(me)?;
        if e.lanes_asked.0 + Duration::from_secs(1) <= now {
            e.lanes_asked = (now, 0);
        }
        e.lanes_asked.1 += 1;
        let asks_too_much = e.lanes_asked.1 > MAX_ASKED || e.lanes_out >= MAX_LANES;
        if asks_too_much || e.silent || e.parked > 0 || e.cut || e.addresses.is_empty() {
            return None;
        }
        if src.is_empty() {
            src.extend_from_slice(e.default_source());
        } else if !e.addresses.iter().any(|a| **a == src[..]) {
            return None;
        }
        let bus = e.bus?;
        let bus = self.buses.get(&bus)?;
        if !bus.has_lanes || !bus.monitors.is_empty() {
            return None;
        }
        let to = *bus.owners.get(dst)?;
        if !self.reclaim(to) {
            return None;
        }
        let t = self.get(to)?;
        // Who does not read what it has is full already, and gets no more room for it (D12).
        let io = t.io.as_ref()?;
        let is_behind = io.rx.used() > io.rx.memory().size() / 4;
        let waits = t.backlog() > 0 || t.holds() || t.held_for.is_some();
        if to == me || t.is_remote || t.cut || is_behind || waits || t.lanes_in >= MAX_LANES {
            return None;
        }
        if self.lanes.pairs.contains_key(&(me, to)) {
            // Its sender has lost track of it, or has another address of the same receiver in mind.
            self.close_lane_between(me, to);
            return None;
        }
        Some(to)
    }

    fn make_lane(
        &mut self,
        from: Ref,
        to: Ref,
        src: &[u8],
        dst: &[u8],
        answer: &OwnedFd,
        now: Instant,
    ) -> std::io::Result<bool> {
        let (Some(e), Some(t)) = (self.get(from), self.get(to)) else {
            return Ok(false);
        };
        let (principal, credentials, ident) = (e.principal, e.credentials, e.ident.clone());
        let Some(io) = &t.io else { return Ok(false) };
        let size = (io.rx.memory().size() / 4).clamp(LANE_BYTES.0, LANE_BYTES.1);
        let number = self.lanes.last + 1;
        let header = shown_to(
            t,
            RxHeader {
                kind: LANE_OPEN,
                fds: 3,
                pid: credentials.pid,
                uid: credentials.uid,
                gid: credentials.gid,
                src_len: src.len() as u16,
                dst_len: dst.len() as u16,
                body_len: 8,
                ..RxHeader::default()
            },
            ident.len(),
        );
        let ident = if header.ident_len > 0 {
            &ident[..]
        } else {
            &[]
        };
        // As many as may lie there unread, so that the quota of messages holds as well.
        let messages = size / LANE_HEADER;
        if self.over_quota(principal, size, messages, 0)
            || self.room(to, from, RX_HEADER + u64::from(header.len)) != Room::Yes
        {
            return Ok(false);
        }
        let (ring, ring_fd) = Segment::create(size as usize)?;
        let (board, board_fd) = Board::create()?;
        let bell = waker::bell()?;
        ring.reader_sleeps().store(NOT_YET_READ, Ordering::Relaxed);
        let fds = [ring_fd.as_raw_fd(), board_fd.as_raw_fd(), bell.as_raw_fd()];
        let Some(t) = self.get_mut(to) else {
            return Ok(false);
        };
        let Some(io) = &t.io else { return Ok(false) };
        io.send_fds(&fds)?;
        let bytes = record(header, src, dst, ident, &[], &number.to_le_bytes());
        t.push_quietly(&bytes, Charge::AGENT);
        self.lanes.last = number;
        self.lanes.pairs.insert((from, to), number);
        self.lanes.open.insert(
            number,
            Lane {
                from,
                to,
                segment: ring,
                board,
                principal,
                bytes: size,
                seen: 0,
            },
        );
        self.lanes.sweep_at.get_or_insert(now + IDLE);
        if let Some(t) = self.get_mut(to) {
            t.lanes_in += 1;
        }
        if let Some(e) = self.get_mut(from) {
            e.lanes_out += 1;
        }
        let account = self.accounts.entry(principal).or_default();
        account.bytes += size;
        account.messages += messages;
        let mut packet = [line::FDS; 9];
        packet[1..].copy_from_slice(&number.to_le_bytes());
        if line::send(answer.as_fd(), &packet, &fds).is_err() {
            self.close_lane(number, true);
            return Ok(false);
        }
        Ok(true)
    }

    /// Closes a lane; what was published on it is read. Returns what of it lies unread, if nobody will read it.
    fn close_lane(&mut self, number: u64, is_read: bool) -> Option<(Ref, u64, u64, u64)> {
        let lane = self.lanes.open.remove(&number)?;
        self.lanes.pairs.remove(&(lane.from, lane.to));
        let end = lane.board.gate().close(lane.segment.head());
        wake_writer(&lane.segment);
        let messages = lane.messages();
        if let Some(e) = self.get_mut(lane.from) {
            e.lanes_out -= 1;
            e.stats.sent += messages;
        }
        if let Some(t) = self.get_mut(lane.to) {
            t.lanes_in -= 1;
            t.stats.received += messages;
        }
        if let Some(account) = self.accounts.get_mut(&lane.principal) {
            account.bytes = account.bytes.saturating_sub(lane.bytes);
            account.messages = account.messages.saturating_sub(lane.bytes / LANE_HEADER);
        }
        if is_read {
            let mut body = [0u8; 16];
            body[..8].copy_from_slice(&number.to_le_bytes());
            body[8..].copy_from_slice(&end.to_le_bytes());
            let header = RxHeader {
                kind: LANE_CLOSE,
                ..RxHeader::default()
            };
            let bytes = record(header, &[], &[], &[], &[], &body);
            self.push(lane.to, bytes, Charge::AGENT);
            return None;
        }
        let (first, last, count) = lane.unread(end)?;
        Some((lane.from, first, last, count))
    }

    /// Closes the lane from one endpoint to another, as something is about to go there by the switch.
    #[inline]
    pub(super) fn close_lane_between(&mut self, from: Ref, to: Ref) {
        if self.get(to).is_some_and(|t| t.lanes_in > 0)
            && let Some(number) = self.lanes.pairs.get(&(from, to)).copied()
        {
            self.close_lane(number, true);
        }
    }

    /// Closes lanes of an endpoint, before something about it changes.
    pub fn close_lanes(&mut self, id: u64, side: Side) {
        if let Some(me) = self.find(id) {
            self.close_lanes_of(me, side);
            self.publish();
        }
    }

    pub(super) fn close_lanes_of(&mut self, me: Ref, side: Side) {
        let has_some = |e: &crate::endpoint::Endpoint| {
            e.lanes_out > 0 && side != Side::In || e.lanes_in > 0 && side != Side::Out
        };
        if self.get(me).is_some_and(has_some) {
            self.close_lanes_where(|lane| {
                lane.from == me && side != Side::In || lane.to == me && side != Side::Out
            });
        }
    }

    fn close_lanes_where(&mut self, choose: impl Fn(&Lane) -> bool) {
        let mut chosen: Vec<u64> = (self.lanes.open.iter())
            .filter(|(_, lane)| choose(lane))
            .map(|(number, _)| *number)
            .collect();
        chosen.sort_unstable();
        for number in chosen {
            self.close_lane(number, true);
        }
    }

    /// Closes all lanes of a bus.
    pub fn close_lanes_on(&mut self, bus: u32) {
        let on_it: Vec<Ref> = (self.lanes.open.values())
            .filter(|lane| self.get(lane.from).is_some_and(|e| e.bus == Some(bus)))
            .map(|lane| lane.from)
            .collect();
        self.close_lanes_where(|lane| on_it.contains(&lane.from));
        self.publish();
    }

    /// Closes the lanes to an endpoint that goes; returns what it leaves unread: sender, first, last, count.
    pub(super) fn take_unread_of_lanes(&mut self, me: Ref) -> Vec<(Ref, u64, u64, u64)> {
        if self.get(me).is_none_or(|e| e.lanes_in == 0) {
            return Vec::new();
        }
        let mut numbers: Vec<u64> = (self.lanes.open.iter())
            .filter(|(_, lane)| lane.to == me)
            .map(|(number, _)| *number)
            .collect();
        numbers.sort_unstable();
        (numbers.into_iter())
            .filter_map(|number| self.close_lane(number, false))
            .collect()
    }

    /// What an endpoint says of lanes by its line.
    pub(super) fn serve_lane_calls(&mut self, me: Ref) {
        let calls = match self.get_mut(me).and_then(|e| e.io.as_mut()) {
            Some(io) if !io.lane_calls.is_empty() => std::mem::take(&mut io.lane_calls),
            _ => return,
        };
        for (kind, number) in calls {
            let Some(lane) = self.lanes.open.get(&number) else {
                continue;
            };
            if kind == line::LANE_WAKE && lane.from == me {
                if let Some(io) = self.get(lane.to).and_then(|t| t.io.as_ref()) {
                    io.wake();
                }
            } else if kind == line::LANE_SPOILT && lane.to == me {
                // Whoever of the two is to blame: only what went between them is concerned, and its sender is told of it.
                let found = self.close_lane(number, false);
                if let Some((from, first, last, count)) = found
                    && let Some(from) = self.get(from).map(|e| e.id)
                    && let Some(to) = self.get(me).map(|e| e.id)
                {
                    self.unread_on_lanes.push((from, to, first, last, count));
                }
            }
        }
    }

    /// Takes back lanes through which nothing went.
    pub(super) fn sweep_lanes(&mut self, now: Instant) {
        if self.lanes.sweep_at.is_none_or(|at| at > now) {
            return;
        }
        let mut idle = Vec::new();
        for (number, lane) in &mut self.lanes.open {
            let head = lane.segment.head().load(Ordering::Relaxed);
            if head == lane.seen {
                idle.push(*number);
            }
            lane.seen = head;
        }
        for number in idle {
            self.close_lane(number, true);
        }
        self.lanes.sweep_at = (!self.lanes.open.is_empty()).then_some(now + IDLE);
        self.publish();
    }

    /// Lanes and messages of an endpoint, for people: lanes from it and to it, messages on them sent and received.
    pub(super) fn lane_counters(&self, me: Ref) -> (u64, u64, u64, u64) {
        let mut found = (0, 0, 0, 0);
        for lane in self.lanes.open.values() {
            if lane.from == me {
                found.0 += 1;
                found.2 += lane.messages();
            }
            if lane.to == me {
                found.1 += 1;
                found.3 += lane.messages();
            }
        }
        found
    }
}
