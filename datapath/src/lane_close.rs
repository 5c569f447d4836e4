//! The agent's part in lanes: when they end, and what is told of what lies in them (docs/internals-lanes.md).
//!
//! Invariants:
//! 1. A lane is closed before anything changes that it was granted for, so before anybody hears of the change.
//! 2. What was published before is read; what a reader that goes leaves unread is counted by its own cursor (D20).

use std::time::Instant;

use super::Switch;
use super::lanes::{IDLE, Lane};
use crate::bloom::Bits;
use crate::endpoint::{Charge, Ended, Endpoint, Gap, Reason, Ref, Refund, record};
use crate::frame::{LANE_CLOSE, RxHeader};
use crate::lane_out::LANE_HEADER;
use crate::lane_rest::{Rest, Unread};
use crate::line;
use crate::memory::HEADER_BYTES;
use crate::ring::Memory;
use crate::sync::Ordering;

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

/// A lane for people: who reads, whether it is for multicasts, bytes that its user is charged with, messages so far.
pub type LaneRow = (Vec<u64>, bool, u64, u64);

impl Lane {
    fn messages(&self) -> u64 {
        let head = self.data.head().load(Ordering::Relaxed);
        let count = self.data.count().load(Ordering::Relaxed);
        count.min(head / LANE_HEADER)
    }

    fn is_read_by(&self, who: Ref) -> bool {
        self.readers.iter().any(|reader| reader.to == who)
    }

    fn is_on(&self, me: Ref, side: Side) -> bool {
        self.from == me && side != Side::In || side != Side::Out && self.is_read_by(me)
    }

    /// Whether somebody who wants to hear this would hear what goes through it.
    fn is_heard(&self, bits: &Bits, terms: Option<&[u64]>) -> bool {
        self.about
            .as_ref()
            .is_some_and(|about| match (terms, &about.hashes) {
                (Some(required), Some(have)) => {
                    required.iter().all(|term| have.binary_search(term).is_ok())
                }
                _ => about.bits.contains(bits),
            })
    }
}

impl Switch {
    /// Closes a lane; what was published on it is read, but for one who reads no more: what lies unread of that one is returned.
    pub(super) fn close_lane(&mut self, number: u64, gone: Option<Ref>) -> Option<Unread> {
        let lane = self.lanes.open.remove(&number)?;
        let end = lane.board.gate().close(lane.data.head());
        let messages = lane.messages();
        self.lanes.multicasts -= usize::from(lane.about.is_some());
        if let Some(e) = self.get_mut(lane.from) {
            e.lanes_out -= 1;
            e.stats.sent += messages;
        }
        if let Some(account) = self.accounts.get_mut(&lane.principal) {
            account.bytes = account.bytes.saturating_sub(lane.bytes);
            account.messages = account.messages.saturating_sub(lane.charged);
        }
        let mut body = [0u8; 16];
        body[..8].copy_from_slice(&number.to_le_bytes());
        body[8..].copy_from_slice(&end.to_le_bytes());
        let header = RxHeader {
            kind: LANE_CLOSE,
            ..RxHeader::default()
        };
        let bytes = record(header, &[], &[], &[], &[], &body);
        let charge = Charge {
            seq: number,
            ..Charge::AGENT
        };
        let share = lane.bytes / lane.readers.len().max(1) as u64;
        let has_arena = lane.bytes > HEADER_BYTES as u64 + lane.data.size();
        let mut unread = None;
        for reader in lane.readers {
            reader.cursor.wake_writer();
            if let Some(pair) = self.lanes.pairs.get_mut(&(lane.from, reader.to)) {
                pair.lanes.retain(|one| *one != number);
                if pair.lanes.is_empty() {
                    self.lanes.pairs.remove(&(lane.from, reader.to));
                }
            }
            if let Some(t) = self.get_mut(reader.to) {
                t.lanes_in -= 1;
                t.stats.received += messages;
            }
            let rest = Rest {
                data: lane.data.clone(),
                cursor: reader.cursor,
                end,
            };
            if gone == Some(reader.to) {
                unread = rest.count();
                continue;
            }
            // What lies there unread goes on costing its sender, until the reader comes to this word of its end.
            let left = rest.bytes();
            let refund = Refund {
                principal: lane.principal,
                // Whatever is unread may have a body in the arena.
                bytes: if left > 0 && has_arena {
                    share
                } else {
                    left.min(share)
                },
                messages: left / LANE_HEADER,
                fds: 0,
            };
            let account = self.accounts.entry(lane.principal).or_default();
            account.bytes += refund.bytes;
            account.messages += refund.messages;
            if let Some(t) = self.get_mut(reader.to) {
                t.ended.push(Ended {
                    number,
                    from: lane.from,
                    refund,
                    rest: lane.about.is_none().then_some(rest),
                });
            }
            self.push(reader.to, bytes.clone(), charge);
            // Its end is to be noticed soon, also where nobody sends anything more.
            self.want_room(reader.to);
        }
        unread
    }

    /// Closes all lanes from one endpoint to another, as something is about to go there by the switch.
    #[inline]
    pub(super) fn close_lane_between(&mut self, from: Ref, to: Ref) {
        if self.get(to).is_some_and(|t| t.lanes_in > 0)
            && let Some(pair) = self.lanes.pairs.get(&(from, to))
        {
            for number in pair.lanes.clone() {
                self.close_lane(number, None);
            }
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
        let has_some = |e: &Endpoint| {
            e.lanes_out > 0 && side != Side::In || e.lanes_in > 0 && side != Side::Out
        };
        if self.get(me).is_some_and(has_some) {
            self.close_lanes_where(|lane| lane.is_on(me, side));
        }
    }

    fn close_lanes_where(&mut self, choose: impl Fn(&Lane) -> bool) {
        for number in self.lanes_where(choose) {
            self.close_lane(number, None);
        }
    }

    fn lanes_where(&self, choose: impl Fn(&Lane) -> bool) -> Vec<u64> {
        let mut chosen: Vec<u64> = (self.lanes.open.iter())
            .filter(|(_, lane)| choose(lane))
            .map(|(number, _)| *number)
            .collect();
        chosen.sort_unstable();
        chosen
    }

    /// Closes all lanes of a bus.
    pub fn close_lanes_on(&mut self, bus: u32) {
        self.close_lanes_where(|lane| lane.bus == bus);
        self.publish();
    }

    fn close_multicasts_where(&mut self, choose: impl Fn(&Lane) -> bool) {
        if self.lanes.multicasts > 0 {
            self.close_lanes_where(|lane| lane.about.is_some() && choose(lane));
            self.publish();
        }
    }

    /// Closes what somebody will hear who subscribes now.
    pub(super) fn close_lanes_heard(&mut self, bus: u32, bits: &Bits, terms: Option<&[u64]>) {
        self.close_multicasts_where(|lane| lane.bus == bus && lane.is_heard(bits, terms));
    }

    /// Closes what somebody hears by a match that goes.
    pub(super) fn close_lanes_by(&mut self, bus: u32, number: u64) {
        self.close_multicasts_where(|lane| {
            lane.bus == bus && lane.readers.iter().any(|reader| reader.by == number)
        });
    }

    /// Closes multicast lanes of an endpoint.
    pub(super) fn close_multicasts_of(&mut self, me: Ref, side: Side) {
        self.close_multicasts_where(|lane| lane.is_on(me, side));
    }

    /// Closes the lanes to an endpoint that goes; returns what it leaves unread of unicasts (D20): sender, first, last, count.
    pub(super) fn take_unread_of_lanes(&mut self, me: Ref) -> Vec<(Ref, u64, u64, u64)> {
        let mut all: Vec<(Ref, u64, u64, u64)> = Vec::new();
        let mut tell = |from: Ref, unread: Option<Unread>| {
            let Some((first, last, count)) = unread else {
                return;
            };
            match all.iter_mut().find(|one| one.0 == from) {
                Some(one) => {
                    (one.1, one.2, one.3) = (one.1.min(first), one.2.max(last), one.3 + count);
                }
                None => all.push((from, first, last, count)),
            }
        };
        // It may have released the word of the end of some.
        self.reclaim(me);
        for one in self.get(me).map_or(&[][..], |e| &e.ended) {
            tell(one.from, one.rest.as_ref().and_then(Rest::count));
        }
        if self.get(me).is_some_and(|e| e.lanes_in > 0) {
            for number in self.lanes_where(|lane| lane.is_read_by(me)) {
                let Some(lane) = self.lanes.open.get(&number) else {
                    continue;
                };
                let (from, is_told) = (lane.from, lane.about.is_none());
                let unread = self.close_lane(number, Some(me));
                tell(from, unread.filter(|_| is_told));
            }
        }
        all
    }

    /// Whether a message by the switch is too much for its principal, also when that one's lanes are closed, which hold more of its
    /// quota than what lies in them unread.
    pub(super) fn exceeds_quota(
        &mut self,
        principal: u32,
        bytes: u64,
        messages: u64,
        fds: u64,
    ) -> bool {
        if !self.over_quota(principal, bytes, messages, fds) {
            return false;
        }
        let lanes = self.lanes_where(|lane| lane.principal == principal);
        if lanes.is_empty() {
            return true;
        }
        for number in lanes {
            self.close_lane(number, None);
        }
        self.over_quota(principal, bytes, messages, fds)
    }

    /// What an endpoint says of lanes by its line.
    pub(super) fn serve_lane_calls(&mut self, me: Ref) {
        let calls = match self.get_mut(me).and_then(|e| e.io.as_mut()) {
            Some(io) if !io.lane_calls.is_empty() => std::mem::take(&mut io.lane_calls),
            _ => return,
        };
        for (kind, number) in calls {
            let (number, reader) = match kind {
                line::LANE_WAKE => line::lane_and_reader(number),
                _ => (number, 0),
            };
            let Some(lane) = self.lanes.open.get(&number) else {
                continue;
            };
            if kind == line::LANE_WAKE && lane.from == me {
                let to = lane.readers.get(reader).and_then(|one| self.get(one.to));
                if let Some(io) = to.and_then(|t| t.io.as_ref()) {
                    io.wake();
                }
            } else if kind == line::LANE_SPOILT && lane.is_read_by(me) {
                self.give_up_lane(number, me);
            }
        }
    }

    /// A reader cannot read a lane. Whoever of the two is to blame: only what went between them is concerned. The sender of unicasts
    /// is told of it (D20), the reader of multicasts misses them (D12).
    fn give_up_lane(&mut self, number: u64, me: Ref) {
        let Some(lane) = self.lanes.open.get(&number) else {
            return;
        };
        let (from, is_unicast) = (lane.from, lane.about.is_none());
        let src = self
            .get(from)
            .map_or_else(Box::default, |e| Box::from(e.default_source()));
        let Some((first, last, count)) = self.close_lane(number, Some(me)) else {
            return;
        };
        if !is_unicast {
            self.close_lane_between(from, me);
            if let Some(t) = self.get_mut(me) {
                let gap = Gap {
                    src,
                    first,
                    last,
                    count,
                    reason: Reason::Full,
                };
                t.miss_all(from, gap);
            }
            self.make_room(me);
        } else if let Some(from) = self.get(from).map(|e| e.id)
            && let Some(to) = self.get(me).map(|e| e.id)
        {
            self.unread_on_lanes.push((from, to, first, last, count));
        }
    }

    /// Takes back lanes through which nothing went.
    pub(super) fn sweep_lanes(&mut self, now: Instant) {
        if self.lanes.sweep_at.is_none_or(|at| at > now) {
            return;
        }
        let mut idle = Vec::new();
        for (number, lane) in &mut self.lanes.open {
            let head = lane.data.head().load(Ordering::Relaxed);
            if head == lane.seen {
                idle.push(*number);
            }
            lane.seen = head;
        }
        idle.sort_unstable();
        for number in idle {
            self.close_lane(number, None);
        }
        self.lanes.sweep_at = (!self.lanes.open.is_empty()).then_some(now + IDLE);
        self.publish();
    }

    /// The lanes on which an endpoint sends, oldest first, for people.
    #[must_use]
    pub fn lanes_of(&self, id: u64) -> Vec<LaneRow> {
        let me = self.find(id);
        let mut found: Vec<_> = (self.lanes.open.iter())
            .filter(|(_, lane)| Some(lane.from) == me)
            .collect();
        found.sort_unstable_by_key(|(number, _)| **number);
        (found.into_iter())
            .map(|(_, lane)| {
                let readers = (lane.readers.iter())
                    .filter_map(|reader| self.get(reader.to).map(|e| e.id))
                    .collect();
                (readers, lane.about.is_some(), lane.bytes, lane.messages())
            })
            .collect()
    }

    /// Lanes and messages of an endpoint, for people: lanes from it and to it, messages on them sent and received.
    pub(super) fn lane_counters(&self, me: Ref) -> (u64, u64, u64, u64) {
        let mut found = (0, 0, 0, 0);
        for lane in self.lanes.open.values() {
            if lane.from == me {
                found.0 += 1;
                found.2 += lane.messages();
            }
            if lane.is_read_by(me) {
                found.1 += 1;
                found.3 += lane.messages();
            }
        }
        found
    }
}
