//! Sending: one message, with descriptors if it has some, or many in one call.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use pyo3::prelude::*;

use crate::client::{self, MESSAGE_BYTES, Outgoing, Tx};
use crate::destinations::{MAX_BATCH, Route, Taken};
use crate::frame::{ADDRESS_BYTES, BODY_IN_MEMFD, CHAIN, EXPECT_REPLY, TERMS, TxHeader, UNICAST};
use crate::lane_out::{Lending, Lent, PLACED_BYTES};
use crate::line;
use crate::ring::Violation;
use crate::switch;

use super::ends::Ends;
use super::rings::Rings;
use super::stop::{AGAIN, BROKEN, LATE, Patience, Stop, UNKNOWN};
use super::view::sealed_body;

/// Records put before the switch is shown them: enough to pay for the wake-up, few enough to let it begin.
const PUBLISH_EVERY: usize = 32;
/// The switch's word that there are no lanes on a bus.
const NO_LANES: i32 = -libc::EOPNOTSUPP;
/// Or that a lane would take too much of what its sender may have.
const TOO_LARGE: i32 = -libc::EDQUOT;

impl Rings {
    #[allow(clippy::too_many_arguments, reason = "the parts of one message")]
    pub(super) fn send_one(
        &self,
        py: Python<'_>,
        header: TxHeader,
        dst: &[u8],
        src: &[u8],
        parts: &[&[u8]],
        fds: &[RawFd],
        patience: Patience,
    ) -> Result<(), Stop> {
        if self.send_one_on_lane(py, header, dst, src, parts, fds, patience)? {
            return Ok(());
        }
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if length as u64 <= self.inline_limit(py, patience)? {
            return self.send_by_switch(py, header, dst, src, (parts, length), fds, patience);
        }
        let body = py
            .detach(|| sealed_body(parts))
            .map_err(|e| Stop::Raise(e.into()))?;
        self.send_sealed(py, header, dst, src, (&body, length), fds, patience)
    }

    /// Looks at a message before it is sent, and sends it on its lane if that can be. Returns whether it was.
    #[allow(clippy::too_many_arguments, reason = "the parts of one message")]
    pub(super) fn send_one_on_lane(
        &self,
        py: Python<'_>,
        header: TxHeader,
        dst: &[u8],
        src: &[u8],
        parts: &[&[u8]],
        fds: &[RawFd],
        patience: Patience,
    ) -> Result<bool, Stop> {
        check(header.kind, src, dst)?;
        let body_len: usize = parts.iter().map(|part| part.len()).sum();
        if body_len > MESSAGE_BYTES || fds.len() > line::MAX_FDS - 1 {
            return Err(Stop::Errno(-libc::EMSGSIZE));
        }
        if !may_go_on_a_lane(&header) || !fds.is_empty() {
            return Ok(false);
        }
        let route = (header.kind, src, dst);
        let sent = self.send_on_lane(py, route, header.serial, &[parts], patience)?;
        Ok(sent == 1)
    }

    fn inline_limit(&self, py: Python<'_>, patience: Patience) -> Result<u64, Stop> {
        let mut held = self.ends.tx.hold(py, &self.ends, patience)?;
        Ok(held.inside()?.inline_limit())
    }

    /// Sends a message whose body is the beginning of a memfd with all seals, which was looked at by [`Self::send_one_on_lane`].
    #[allow(clippy::too_many_arguments, reason = "the parts of one message")]
    pub(super) fn send_sealed(
        &self,
        py: Python<'_>,
        mut header: TxHeader,
        dst: &[u8],
        src: &[u8],
        (body, length): (&OwnedFd, usize),
        fds: &[RawFd],
        patience: Patience,
    ) -> Result<(), Stop> {
        let all_fds = [fds, &[body.as_raw_fd()]].concat();
        header.flags |= BODY_IN_MEMFD;
        self.send_by_switch(py, header, dst, src, (&[], length), &all_fds, patience)
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one message")]
    fn send_by_switch(
        &self,
        py: Python<'_>,
        mut header: TxHeader,
        dst: &[u8],
        src: &[u8],
        (body, length): (&[&[u8]], usize),
        all_fds: &[RawFd],
        patience: Patience,
    ) -> Result<(), Stop> {
        let mut held = self.ends.tx.hold(py, &self.ends, patience)?;
        let mut tx = held.inside()?;
        header.body_len = length as u32;
        header.fds = all_fds.len() as u8;
        let message = Outgoing {
            header,
            src,
            dst,
            body,
        };
        let bytes = client::record_bytes(&message);
        if bytes > tx.record_limit() {
            return Err(Stop::Errno(-libc::EMSGSIZE));
        }
        loop {
            self.ends.await_fit(py, tx, bytes, patience)?;
            // Descriptors go ahead of their record, but never without it.
            if !all_fds.is_empty() {
                self.send_fds(py, tx, all_fds, patience)?;
            }
            let room = tx.room();
            let (pos, end) = tx.put(&message)?;
            if !tx.publish() {
                return Err(self.ends.gone());
            }
            self.ends.await_verdict(py, tx, end, patience)?;
            match checked(tx.verdict(pos)) {
                switch::OK => {
                    let own_fds = usize::from(header.flags & BODY_IN_MEMFD != 0);
                    if may_go_on_a_lane(&header) && all_fds.len() == own_fds {
                        tx.went_by_switch((header.kind, src, dst), 1, length as u64);
                    }
                    return Ok(());
                }
                AGAIN if patience.waits => {
                    let room = tx.room_after(room);
                    drop(held);
                    self.ends.await_room(py, &room, patience)?;
                    held = self.ends.tx.hold(py, &self.ends, patience)?;
                    tx = held.inside()?;
                }
                refusal => {
                    if refusal == AGAIN && self.ends.pollable.load(Ordering::Relaxed) {
                        tx.block_line(room);
                    }
                    return Err(Stop::Errno(refusal));
                }
            }
        }
    }

    /// Sends what it can of several messages to one destination on its lane, which is asked for if that is due. Returns how many
    /// were accepted; the others are for the switch.
    fn send_on_lane(
        &self,
        py: Python<'_>,
        route: Route<'_>,
        serial: u64,
        messages: &[&[&[u8]]],
        patience: Patience,
    ) -> Result<usize, Stop> {
        let mut done = 0;
        loop {
            let mut held = match self.ends.tx.hold(py, &self.ends, patience) {
                Err(Stop::Errno(_)) if done > 0 => return Ok(done),
                held => held?,
            };
            let Ok(tx) = held.inside() else {
                // Closed meanwhile: the switch's side says so.
                return Ok(done);
            };
            let (accepted, next) = tx.send_on_lane(route, serial, &messages[done..]);
            done += accepted;
            match next {
                Taken::Yes => return Ok(done),
                Taken::No if done == 0 && tx.must_ask_for_lane(route) => {
                    if !self.ask_for_lane(py, tx, route, patience)? {
                        return Ok(done);
                    }
                }
                // A send that does not wait leaves it to the switch, which knows how to be full.
                Taken::Full if patience.waits => {
                    let bytes = messages[done].iter().map(|part| part.len() as u64).sum();
                    let Some(room) = py.detach(|| tx.spin_on_lane(route, bytes)) else {
                        continue;
                    };
                    drop(held);
                    match self.ends.await_lane(py, &room, patience) {
                        Err(Stop::Errno(_)) if done > 0 => return Ok(done),
                        Ok(true) => {}
                        // Readers keep a sender waiting no longer: the switch decides.
                        Ok(false) => return Ok(done),
                        Err(stop) => return Err(stop),
                    }
                }
                Taken::No | Taken::Full => return Ok(done),
                Taken::Unknown if done == 0 => return Err(Stop::Errno(UNKNOWN)),
                Taken::Unknown => return Ok(done),
            }
        }
    }

    /// Asks the switch for a lane. Returns whether it was made.
    fn ask_for_lane(
        &self,
        py: Python<'_>,
        tx: &mut Tx,
        route: Route<'_>,
        patience: Patience,
    ) -> Result<bool, Stop> {
        let Some(question) = tx.ask_for_lane(route)? else {
            return Ok(false);
        };
        // A verdict that comes too late is as good as a refusal: the next message by the switch takes such a lane back.
        match self.ends.await_verdict(py, tx, question.end, patience) {
            Ok(()) => {}
            Err(Stop::Errno(_)) => return Ok(false),
            Err(stop) => return Err(stop),
        }
        let verdict = checked(tx.verdict(question.pos));
        match verdict {
            NO_LANES => tx.ask_no_more_for_lanes(),
            TOO_LARGE => tx.ask_for_smaller_lane(route),
            _ => {}
        }
        if verdict != switch::OK {
            return Ok(false);
        }
        tx.take_lane(route, question);
        Ok(true)
    }

    /// Lends a block of the arena of a lane, which is asked for if that is due; waits for it as a message would wait. `None`: there
    /// is none.
    pub(super) fn lend_on_lane(
        &self,
        py: Python<'_>,
        route: Route<'_>,
        bytes: u64,
        patience: Patience,
    ) -> Result<Option<Lent>, Stop> {
        loop {
            let mut held = self.ends.tx.hold(py, &self.ends, patience)?;
            let tx = held.inside()?;
            match tx.lend(route, bytes) {
                Lending::Given(lent) => return Ok(Some(lent)),
                Lending::Full if patience.waits => {
                    let Some(room) = py.detach(|| tx.spin_on_lane(route, bytes)) else {
                        continue;
                    };
                    drop(held);
                    match self.ends.await_lane(py, &room, patience) {
                        Ok(true) => {}
                        Ok(false) | Err(Stop::Errno(LATE)) => return Ok(None),
                        Err(stop) => return Err(stop),
                    }
                }
                Lending::No if tx.must_ask_for_lane(route) => {
                    if !self.ask_for_lane(py, tx, route, patience)? {
                        return Ok(None);
                    }
                }
                Lending::No | Lending::Full => return Ok(None),
            }
        }
    }

    /// Sends the first bytes of a block that was lent, if its lane is still there. Returns whether they were accepted.
    pub(super) fn send_lent(
        &self,
        py: Python<'_>,
        route: Route<'_>,
        serial: u64,
        (lent, length): (&mut Lent, usize),
        patience: Patience,
    ) -> Result<bool, Stop> {
        loop {
            let mut held = self.ends.tx.hold(py, &self.ends, patience)?;
            let tx = held.inside()?;
            match tx.send_lent(route, serial, (lent, length as u64)) {
                Taken::Yes => return Ok(true),
                Taken::Full if patience.waits => {
                    let Some(room) = py.detach(|| tx.spin_on_lane(route, PLACED_BYTES)) else {
                        continue;
                    };
                    drop(held);
                    if !self.ends.await_lane(py, &room, patience)? {
                        return Ok(false);
                    }
                }
                Taken::No | Taken::Full => return Ok(false),
                Taken::Unknown => return Err(Stop::Errno(UNKNOWN)),
            }
        }
    }

    fn send_fds(
        &self,
        py: Python<'_>,
        tx: &Tx,
        fds: &[RawFd],
        patience: Patience,
    ) -> Result<(), Stop> {
        loop {
            let limit = if patience.waits {
                patience.left()
            } else {
                Duration::ZERO
            };
            let sent = py.detach(|| tx.send_fds(fds, limit));
            let error = match sent {
                Ok(()) => return Ok(()),
                Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
            };
            match error {
                libc::EPIPE | libc::ECONNRESET => return Err(self.ends.gone()),
                libc::EAGAIN | libc::EINTR if patience.waits => {}
                libc::ETOOMANYREFS => return Err(Stop::Errno(-libc::EDQUOT)),
                errno => return Err(Stop::Errno(-errno)),
            }
            py.check_signals()?;
            if patience.is_over() {
                return Err(Stop::Errno(LATE));
            }
        }
    }

    /// Sends many messages; returns how many were accepted, and what stopped the rest.
    pub(super) fn send_all(
        &self,
        py: Python<'_>,
        header: TxHeader,
        destinations: &[&[u8]],
        src: &[u8],
        bodies: &[&[u8]],
        patience: Patience,
    ) -> (usize, Result<(), Stop>) {
        let mut accepted = 0;
        while accepted < bodies.len() {
            if destinations.len() == 1 && may_go_on_a_lane(&header) {
                let route = (header.kind, src, destinations[0]);
                let sent = self.send_some_on_lane(py, route, &bodies[accepted..], patience);
                match sent {
                    Ok(0) => {}
                    Ok(count) => {
                        accepted += count;
                        continue;
                    }
                    Err(stop) => return (accepted, Err(stop)),
                }
            }
            let result = self.send_run(
                py,
                header,
                destinations,
                src,
                bodies,
                &mut accepted,
                patience,
            );
            if let Err(stop) = result {
                return (accepted, Err(stop));
            }
        }
        (accepted, Ok(()))
    }

    /// Sends the first of several messages on the lane of their destination, as many as are worth one look at it.
    fn send_some_on_lane(
        &self,
        py: Python<'_>,
        route: Route<'_>,
        bodies: &[&[u8]],
        patience: Patience,
    ) -> Result<usize, Stop> {
        let count = bodies.len().min(MAX_BATCH);
        let parts: [[&[u8]; 1]; MAX_BATCH] =
            std::array::from_fn(|n| [bodies.get(n).copied().unwrap_or_default()]);
        let messages: [&[&[u8]]; MAX_BATCH] = std::array::from_fn(|n| &parts[n][..]);
        self.send_on_lane(py, route, 0, &messages[..count], patience)
    }

    /// Sends messages until one is refused for lack of room, waits for that room, and returns; or until all are sent.
    #[allow(clippy::too_many_arguments, reason = "the parts of one batch")]
    fn send_run(
        &self,
        py: Python<'_>,
        header: TxHeader,
        destinations: &[&[u8]],
        src: &[u8],
        bodies: &[&[u8]],
        accepted: &mut usize,
        patience: Patience,
    ) -> Result<(), Stop> {
        let mut held = self.ends.tx.hold(py, &self.ends, patience)?;
        let tx = held.inside()?;
        let room = tx.room();
        let mut batch = Batch {
            open: VecDeque::new(),
            unpublished: 0,
            accepted: *accepted,
            refusal: switch::OK,
        };
        let put = self.put_all(
            py,
            tx,
            header,
            destinations,
            src,
            bodies,
            &mut batch,
            patience,
        );
        if batch.accepted > *accepted && destinations.len() == 1 && may_go_on_a_lane(&header) {
            let route = (header.kind, src, destinations[0]);
            let sent = &bodies[*accepted..batch.accepted];
            let largest = sent.iter().map(|body| body.len()).max();
            tx.went_by_switch(route, sent.len(), largest.unwrap_or(0) as u64);
        }
        *accepted = batch.accepted;
        let alone = put?;
        match batch.refusal {
            switch::OK => {}
            AGAIN if patience.waits => {
                let room = tx.room_after(room);
                drop(held);
                return self.ends.await_room(py, &room, patience);
            }
            refusal => {
                if refusal == AGAIN && self.ends.pollable.load(Ordering::Relaxed) {
                    tx.block_line(room);
                }
                return Err(Stop::Errno(refusal));
            }
        }
        drop(held);
        if alone {
            let at = *accepted;
            let dst = destinations[if destinations.len() == 1 { 0 } else { at }];
            self.send_one(py, header, dst, src, &[bodies[at]], &[], patience)?;
            *accepted += 1;
        }
        Ok(())
    }

    /// Puts messages into the ring and waits for their verdicts, until one is refused or cannot go in a batch; returns whether
    /// the next is such a one.
    #[allow(clippy::too_many_arguments, reason = "the parts of one batch")]
    fn put_all(
        &self,
        py: Python<'_>,
        tx: &mut Tx,
        header: TxHeader,
        destinations: &[&[u8]],
        src: &[u8],
        bodies: &[&[u8]],
        batch: &mut Batch,
        patience: Patience,
    ) -> Result<bool, Stop> {
        let mut next = batch.accepted;
        let mut alone = false;
        while next < bodies.len() && batch.refusal == switch::OK {
            let part = [bodies[next]];
            let dst = destinations[if destinations.len() == 1 { 0 } else { next }];
            let chain = if batch.open.is_empty() { 0 } else { CHAIN };
            let message = Outgoing {
                header: TxHeader {
                    flags: header.flags | chain,
                    body_len: part[0].len() as u32,
                    ..header
                },
                src,
                dst,
                body: &part,
            };
            let bytes = client::record_bytes(&message);
            alone = check(header.kind, src, dst).is_err()
                || part[0].len() as u64 > tx.inline_limit()
                || bytes > tx.record_limit();
            if alone {
                break;
            }
            // Verdicts are read before the place of their records can be taken by new ones.
            if !tx.fits(bytes) {
                batch.publish(tx, &self.ends)?;
                batch.settle(tx)?;
                if tx.fits(bytes) {
                    continue;
                }
                // A quarter of what is on its way, so that neither side waits for each single record.
                let Some((_, end)) = batch.open.get(batch.open.len() / 4).copied() else {
                    self.ends.await_fit(py, tx, bytes, patience)?;
                    continue;
                };
                let waited = self.ends.await_verdict(py, tx, end, patience);
                batch.settle(tx)?;
                waited?;
                continue;
            }
            batch.open.push_back(tx.put(&message)?);
            batch.unpublished += 1;
            next += 1;
            if batch.unpublished == PUBLISH_EVERY {
                batch.publish(tx, &self.ends)?;
            }
        }
        batch.publish(tx, &self.ends)?;
        if let Some((_, end)) = batch.open.back().copied() {
            let waited = self.ends.await_verdict(py, tx, end, patience);
            batch.settle(tx)?;
            waited?;
        }
        Ok(alone)
    }
}

/// Messages of a batch that are in the ring, and what became of the others.
struct Batch {
    /// Positions and ends of those without a verdict.
    open: VecDeque<(u64, u64)>,
    /// How many of the newest the switch was not shown yet.
    unpublished: usize,
    accepted: usize,
    /// The first verdict that was none, else [`switch::OK`].
    refusal: i32,
}

impl Batch {
    /// Reads the verdicts that are there.
    fn settle(&mut self, tx: &mut Tx) -> Result<(), Violation> {
        while let Some((pos, end)) = self.open.front()
            && tx.settled(*end)?
        {
            let verdict = checked(tx.verdict(*pos));
            self.open.pop_front();
            if self.refusal == switch::OK {
                match verdict {
                    switch::OK => self.accepted += 1,
                    errno => self.refusal = errno,
                }
            }
        }
        Ok(())
    }

    /// Shows the switch what it was not shown yet.
    fn publish(&mut self, tx: &mut Tx, ends: &Ends) -> Result<(), Stop> {
        let unpublished = std::mem::take(&mut self.unpublished);
        if unpublished == 0 || tx.publish() {
            return Ok(());
        }
        self.open.truncate(self.open.len() - unpublished);
        self.settle(tx)?;
        Err(if self.open.is_empty() {
            ends.gone()
        } else {
            Stop::Errno(UNKNOWN)
        })
    }
}

/// Whether the switch need not know of a message with this header: one that asks for no reply and is none.
pub(super) fn may_go_on_a_lane(header: &TxHeader) -> bool {
    header.flags & EXPECT_REPLY == 0 && header.reply_to == 0
}

/// The errno for what no record can say: the agent would cut off whoever writes such a one.
fn check(kind: u8, src: &[u8], dst: &[u8]) -> Result<(), Stop> {
    if !(UNICAST..=TERMS).contains(&kind) {
        return Err(Stop::Errno(-libc::EINVAL));
    }
    if src.len() > ADDRESS_BYTES || dst.len() > usize::from(u16::MAX) {
        return Err(Stop::Errno(-libc::ENAMETOOLONG));
    }
    Ok(())
}
/// A verdict as the switch gives them: accepted or a negative errno. Nothing else is a success.
fn checked(verdict: i32) -> i32 {
    if verdict == switch::OK || (-4095..0).contains(&verdict) {
        verdict
    } else {
        BROKEN
    }
}
