//! The agent's part in lanes: who gets one (docs/internals-lanes.md). `lane_close.rs` says when it ends.
//!
//! Invariants:
//! 1. While there is a lane from one endpoint to another nothing of the first goes to the second by the switch (D11).
//! 2. Who may not hear what goes through a lane never gets its descriptors (D8).
//! 3. All the memory of a lane is charged to its sender for as long as there is the lane (D18).
//! 4. A reader finds the word of a new lane in its ring before anything can be on that lane, and before the boards of its other lanes
//!    from this sender say that there is a newer one (`lane_in`).

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{OK, Room, Switch, may_send, padded, shown_to};
use crate::bloom::Bits;
use crate::bus::Overflow;
use crate::endpoint::{Charge, Ref, record};
use crate::frame::{
    BY_TERMS, LANE_BODY, LANE_OPEN, LANE_OPEN_BYTES, MULTICAST, RAW, RX_HEADER, RxHeader, TERMS,
    TX_HEADER, TxHeader, UNICAST,
};
use crate::lane_out::{LANE_HEADER, POLLED};
use crate::line;
use crate::memory::{HEADER_BYTES, Segment, file_size};
use crate::page::{Board, Cursor, MAX_READERS};
use crate::ring::Memory;
use crate::sync::Ordering;
use crate::waker;

/// Lanes from one endpoint, and to one.
const MAX_LANES: u32 = 64;
/// Lanes that one endpoint may ask for in a second.
const MAX_ASKED: u32 = 128;
/// The largest ring of a lane, in bytes.
const MAX_RING: u64 = 1 << 20;
/// What of it may be used: a quarter of the RX ring of a receiver, within these.
const CAPACITY: (u64, u64) = (HEADER_BYTES as u64, MAX_RING);
/// Lanes that have ended and that their reader has not read to the end, before it is given new ones from the same principal.
const MAX_UNREAD: usize = 4;
/// Files of a lane for each reader alone. They are on their way until the reader has taken note of the lane.
const FILES: u64 = 2;
/// For how many milliseconds the sender of unicasts waits for room on a lane: what is full is not what a receiver can take (D12).
const UNICAST_PATIENCE: u64 = 100;
/// How long nothing goes through a lane that is taken back.
pub(super) const IDLE: Duration = Duration::from_secs(10);
/// Readers of which one packet to the sender has what they were made: a cursor and a bell each, and one board.
const READERS_A_PACKET: usize = (line::MAX_FDS - 1) / 2;

/// One reader of a lane.
pub(super) struct Reader {
    pub(super) to: Ref,
    /// The match by which it hears; 0 for a unicast.
    pub(super) by: u64,
    pub(super) cursor: Cursor,
}

/// What the messages on a multicast lane are about.
pub(super) struct About {
    pub(super) bits: Bits,
    pub(super) hashes: Option<Box<[u64]>>,
}

/// One lane.
pub(super) struct Lane {
    pub(super) from: Ref,
    pub(super) bus: u32,
    /// What was asked for: kind, source and destination.
    route: (u8, Box<[u8]>, Box<[u8]>),
    /// What a multicast is about.
    pub(super) about: Option<About>,
    pub(super) readers: Vec<Reader>,
    pub(super) data: Arc<Segment>,
    pub(super) board: Board,
    pub(super) principal: u32,
    /// What it is charged with.
    pub(super) bytes: u64,
    pub(super) charged: u64,
    /// How far it was when it was looked at last.
    pub(super) seen: u64,
}

/// All lanes from one endpoint to another.
pub(super) struct Pair {
    /// What the receiver calls the sender.
    origin: u64,
    pub(super) lanes: Vec<u64>,
}

/// The lanes of one switch.
#[derive(Default)]
pub(super) struct Lanes {
    pub(super) open: HashMap<u64, Lane>,
    pub(super) pairs: HashMap<(Ref, Ref), Pair>,
    /// How many are for multicasts.
    pub(super) multicasts: usize,
    last: u64,
    pub(super) sweep_at: Option<Instant>,
}

impl Lanes {
    /// When [`Switch::sweep_lanes`] is to be called.
    pub(super) fn sweep_at(&self) -> Option<Instant> {
        self.sweep_at
    }

    /// The number of the only lane, its board and data, and the cursor of its first reader.
    #[cfg(test)]
    pub(super) fn only(&self) -> (u64, &Lane) {
        assert_eq!(self.open.len(), 1);
        let (number, lane) = self.open.iter().next().expect("a lane");
        (*number, lane)
    }
}

/// A lane that there may be.
struct Plan {
    /// Who reads it, by which match.
    readers: Vec<(Ref, u64)>,
    about: Option<About>,
    /// For how many milliseconds its sender waits for room.
    patience: u64,
    /// How many bytes may lie unread.
    capacity: u64,
}

/// A wish for a lane.
struct Wish<'a> {
    from: Ref,
    kind: u8,
    /// As asked for, and as readers see it.
    asked: &'a [u8],
    src: &'a [u8],
    dst: &'a [u8],
    /// Bytes of the ring.
    bytes: u64,
    data: &'a OwnedFd,
}

impl Switch {
    /// An endpoint wishes for a lane from a source to a destination; its descriptors are where the lane is sent to, and the data of the
    /// lane. The verdict.
    pub(super) fn ask_lane(
        &mut self,
        me: Ref,
        segment: &Arc<Segment>,
        pos: u64,
        h: &TxHeader,
        fds: &[OwnedFd],
        now: Instant,
    ) -> i32 {
        let [answer, data] = fds else {
            return -libc::EINVAL;
        };
        let mut asked = vec![0u8; h.src_len.into()];
        let mut dst = vec![0u8; h.dst_len.into()];
        let mut body = [0u8; LANE_BODY as usize];
        segment.copy_out(pos + TX_HEADER, &mut asked);
        segment.copy_out(pos + h.dst_at(), &mut dst);
        segment.copy_out(pos + h.body_at(), &mut body);
        let bytes = body[..8]
            .iter()
            .rev()
            .fold(0, |n, b| n << 8 | u64::from(*b));
        let bus = self.get(me).and_then(|e| e.bus);
        if bus
            .and_then(|bus| self.buses.get(&bus))
            .is_some_and(|bus| !bus.has_lanes)
        {
            // Never on this bus: nobody need ask again.
            return -libc::EOPNOTSUPP;
        }
        let mut src = asked.clone();
        let kind = body[8];
        if bytes > MAX_RING || !self.may_have_lanes(me, &mut src, now) {
            return -libc::EAGAIN;
        }
        let same = (self.lanes.open.iter())
            .filter(|(_, lane)| lane.from == me)
            .find(|(_, lane)| {
                lane.route.0 == kind && *lane.route.1 == *asked && *lane.route.2 == *dst
            });
        if let Some(number) = same.map(|(number, _)| *number) {
            // Its sender uses it no more: it is too small, or was lost track of.
            self.close_lane(number, None);
            return -libc::EAGAIN;
        }
        let Some(plan) = self.plan_lane(me, kind, &dst) else {
            return -libc::EAGAIN;
        };
        let wish = Wish {
            from: me,
            kind,
            asked: &asked,
            src: &src,
            dst: &dst,
            bytes,
            data,
        };
        match self.make_lane(&wish, plan, answer, now) {
            Ok(true) => OK,
            Err(error) if error.raw_os_error() == Some(libc::EDQUOT) => -libc::EDQUOT,
            // For want of memory or descriptors.
            Ok(false) | Err(_) => -libc::EAGAIN,
        }
    }

    /// Whether an endpoint may have a lane from this source at all. Fills in the source.
    fn may_have_lanes(&mut self, me: Ref, src: &mut Vec<u8>, now: Instant) -> bool {
        let Some(e) = self.get_mut(me) else {
            return false;
        };
        if e.lanes_asked.0 + Duration::from_secs(1) <= now {
            e.lanes_asked = (now, 0);
        }
        e.lanes_asked.1 += 1;
        let asks_too_much = e.lanes_asked.1 > MAX_ASKED || e.lanes_out >= MAX_LANES;
        if asks_too_much || e.silent || e.parked > 0 || e.cut || e.addresses.is_empty() {
            return false;
        }
        if src.is_empty() {
            src.extend_from_slice(e.default_source());
        } else if !e.addresses.iter().any(|a| **a == src[..]) {
            return false;
        }
        let bus = e.bus.and_then(|bus| self.buses.get(&bus));
        bus.is_some_and(|bus| bus.has_lanes && bus.monitors.is_empty())
    }

    /// To whom a lane leads, if there may be one.
    fn plan_lane(&mut self, me: Ref, kind: u8, dst: &[u8]) -> Option<Plan> {
        let bus = self.get(me)?.bus?;
        let mut plan = if kind == UNICAST {
            if !self.may_send_to(me, dst) {
                return None;
            }
            let to = *self.buses.get(&bus)?.owners.get(dst)?;
            Plan {
                readers: vec![(to, 0)],
                about: None,
                patience: UNICAST_PATIENCE,
                capacity: 0,
            }
        } else {
            self.plan_multicast(me, bus, kind, dst)?
        };
        let principal = self.get(me)?.principal;
        let is_free = |s: &mut Self, to: Ref| {
            if to == me || s.get(to).is_none_or(|t| t.is_remote || t.cut) || !s.reclaim(to) {
                return false;
            }
            // Who does not read what it has is full already, and gets no more room for it (D12).
            let Some((t, io)) = s.get(to).and_then(|t| Some((t, t.io.as_ref()?))) else {
                return false;
            };
            let is_behind = io.rx.used() > io.rx.memory().size() / 4;
            let is_behind = is_behind || t.unread_lanes(principal) >= MAX_UNREAD;
            let waits = t.backlog() > 0 || t.holds() || t.held_for.is_some();
            !is_behind && !waits && t.lanes_in < MAX_LANES
        };
        if !plan.readers.iter().all(|(to, _)| is_free(self, *to)) {
            return None;
        }
        let rings = plan
            .readers
            .iter()
            .filter_map(|(to, _)| self.get(*to)?.io.as_ref());
        let least = rings.map(|io| io.rx.memory().size()).min()?;
        plan.capacity = (least / 4).clamp(CAPACITY.0, CAPACITY.1);
        Some(plan)
    }

    /// Who hears a multicast, as `Switch::multicast` finds them, if all of them can have it from a lane.
    fn plan_multicast(&mut self, me: Ref, bus: u32, kind: u8, dst: &[u8]) -> Option<Plan> {
        let bus = self.buses.get_mut(&bus)?;
        let width = bus.width;
        let (about, targets) = match kind {
            RAW if dst.len() * 8 == width => {
                let bits = Bits::from_bytes(dst).ok()?;
                let targets = bus.targets(&bits, None);
                (About { bits, hashes: None }, targets)
            }
            TERMS => {
                let way = bus.way(dst).ok()?;
                let about = About {
                    bits: way.bits.clone(),
                    hashes: Some(way.hashes.as_slice().into()),
                };
                (about, way.targets.clone())
            }
            _ => return None,
        };
        let hashes = about.hashes.as_deref();
        if !may_send(
            &self.get(me)?.send_grants,
            &about.bits,
            hashes,
            width as u32,
        ) || targets.is_empty()
            || targets.len() > MAX_READERS
        {
            return None;
        }
        let needs_switch = |target: &crate::bus::Target| {
            target.overflow == Overflow::Conflate
                || self.get(target.to).is_none_or(|t| t.filter.is_some())
        };
        if targets.iter().any(needs_switch) {
            return None;
        }
        let patience = targets.iter().map(|target| match target.overflow {
            Overflow::Block(ms) => u64::from(ms),
            _ => 0,
        });
        Some(Plan {
            patience: patience.min().unwrap_or(0),
            capacity: 0,
            readers: targets.iter().map(|t| (t.to, t.by)).collect(),
            about: Some(about),
        })
    }

    fn make_lane(
        &mut self,
        wish: &Wish<'_>,
        plan: Plan,
        answer: &OwnedFd,
        now: Instant,
    ) -> std::io::Result<bool> {
        let Some((e, bus)) = self.get(wish.from).and_then(|e| Some((e, e.bus?))) else {
            return Ok(false);
        };
        let principal = e.principal;
        let data = Segment::attach_shown(wish.data.as_fd(), wish.bytes as usize, false)?;
        let bytes = file_size(wish.data.as_fd())?;
        // As many as may lie there unread, so that the quota of messages holds as well.
        let charged = plan.capacity.min(wish.bytes) / LANE_HEADER * plan.readers.len() as u64;
        // An arena has room only where half of all is free, so that not all of it goes to a few lanes.
        let has_arena = bytes > HEADER_BYTES as u64 + wish.bytes;
        let spare = if has_arena { self.quota.bytes / 2 } else { 0 };
        // Lanes leave a quarter of the descriptors to messages that have some.
        let fds = FILES * plan.readers.len() as u64 + self.quota.fds / 4;
        if self.over_quota(principal, bytes + spare, charged, fds) {
            return Err(std::io::Error::from_raw_os_error(libc::EDQUOT));
        }
        let (board, board_fd) = Board::create()?;
        board.patience().store(plan.patience, Ordering::Relaxed);
        board.capacity().store(plan.capacity, Ordering::Relaxed);
        let number = self.lanes.last + 1;
        self.lanes.last = number;
        self.lanes.multicasts += usize::from(plan.about.is_some());
        let lane = Lane {
            from: wish.from,
            bus,
            route: (wish.kind, wish.asked.into(), wish.dst.into()),
            about: plan.about,
            readers: Vec::new(),
            data,
            board,
            principal,
            bytes,
            charged,
            seen: 0,
        };
        self.lanes.open.insert(number, lane);
        self.lanes.sweep_at.get_or_insert(now + IDLE);
        if let Some(e) = self.get_mut(wish.from) {
            e.lanes_out += 1;
        }
        let account = self.accounts.entry(principal).or_default();
        account.bytes += bytes;
        account.messages += charged;
        let made = self.tell_readers(wish, number, &plan.readers, &board_fd);
        let is_told = made.is_ok_and(|pages| send_lane(answer, number, &board_fd, &pages).is_ok());
        if !is_told {
            self.close_lane(number, None);
        }
        Ok(is_told)
    }

    /// Makes what each reader has of a lane and tells it of the lane; returns the cursors and the bells.
    fn tell_readers(
        &mut self,
        wish: &Wish<'_>,
        number: u64,
        readers: &[(Ref, u64)],
        board: &OwnedFd,
    ) -> std::io::Result<Vec<OwnedFd>> {
        let full = || std::io::Error::from(std::io::ErrorKind::WouldBlock);
        let mut pages = Vec::new();
        for (index, (to, by)) in readers.iter().copied().enumerate() {
            let (cursor, cursor_fd) = Cursor::create()?;
            // It does not know the lane yet, and the agent wakes it.
            cursor.reader_sleeps().store(POLLED, Ordering::Relaxed);
            let (bell, heard) = waker::bell()?;
            let fds = [wish.data, board, &cursor_fd, &heard].map(AsRawFd::as_raw_fd);
            let pair = self.lanes.pairs.get(&(wish.from, to));
            let origin = pair.map_or(number, |pair| pair.origin);
            if !self.open_lane_at(wish, to, [number, origin, wish.bytes, index as u64], &fds)? {
                return Err(full());
            }
            let pair = (self.lanes.pairs.entry((wish.from, to))).or_insert_with(|| Pair {
                origin,
                lanes: Vec::new(),
            });
            pair.lanes.push(number);
            if let Some(lane) = self.lanes.open.get_mut(&number) {
                lane.readers.push(Reader { to, by, cursor });
            }
            for other in &pair.lanes {
                let Some(lane) = self.lanes.open.get(other) else {
                    continue;
                };
                if let Some(place) = lane.readers.iter().position(|reader| reader.to == to) {
                    lane.board.newest(place).store(number, Ordering::Release);
                }
            }
            if let Some(t) = self.get_mut(to) {
                t.lanes_in += 1;
            }
            pages.extend([cursor_fd, bell]);
        }
        Ok(pages)
    }

    /// Puts the word of a lane into the ring of a reader. Returns whether there was room.
    fn open_lane_at(
        &mut self,
        wish: &Wish<'_>,
        to: Ref,
        words: [u64; 4],
        fds: &[RawFd],
    ) -> std::io::Result<bool> {
        let (Some(e), Some(t)) = (self.get(wish.from), self.get(to)) else {
            return Ok(false);
        };
        let (credentials, ident) = (e.credentials, e.ident.clone());
        let header = RxHeader {
            kind: LANE_OPEN,
            flags: match wish.kind {
                UNICAST => 0,
                TERMS => MULTICAST | BY_TERMS,
                _ => MULTICAST,
            },
            fds: fds.len() as u8,
            pid: credentials.pid,
            uid: credentials.uid,
            gid: credentials.gid,
            src_len: wish.src.len() as u16,
            dst_len: wish.dst.len() as u16,
            body_len: LANE_OPEN_BYTES,
            ..RxHeader::default()
        };
        let header = shown_to(t, header, ident.len());
        let ident = if header.ident_len > 0 {
            &ident[..]
        } else {
            &[]
        };
        if self.room(to, wish.from, RX_HEADER + u64::from(header.len)) != Room::Yes {
            return Ok(false);
        }
        let Some(io) = self.get(to).and_then(|t| t.io.as_ref()) else {
            return Ok(false);
        };
        io.send_fds(fds)?;
        let body = words.map(u64::to_le_bytes).concat();
        let bytes = record(header, wish.src, wish.dst, ident, &[], &body);
        let principal = self.get(wish.from).map_or(u32::MAX, |e| e.principal);
        let charge = Charge {
            principal,
            fds: FILES as u8,
            ..Charge::AGENT
        };
        self.debit(&charge, padded(bytes.len() as u64));
        if let Some(t) = self.get_mut(to) {
            t.push_quietly(&bytes, charge);
        }
        Ok(true)
    }
}

/// Sends a lane to its sender: the board, then a cursor and a bell for each reader, in as many packets as that takes.
fn send_lane(
    answer: &OwnedFd,
    number: u64,
    board: &OwnedFd,
    pages: &[OwnedFd],
) -> std::io::Result<()> {
    let mut packet = [line::FDS; 9];
    packet[1..].copy_from_slice(&number.to_le_bytes());
    let mut fds = vec![board.as_raw_fd()];
    for some in pages.chunks(2 * READERS_A_PACKET) {
        fds.extend(some.iter().map(AsRawFd::as_raw_fd));
        line::send(answer.as_fd(), &packet, &fds)?;
        fds.clear();
    }
    Ok(())
}
