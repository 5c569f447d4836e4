//! Sending: one message, with descriptors if it has some, or many in one call.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use pyo3::prelude::*;

use crate::client::{self, Outgoing, Tx};
use crate::frame::{ADDRESS_BYTES, BODY_IN_MEMFD, CHAIN, TERMS, TxHeader, UNICAST};
use crate::line;
use crate::ring::Violation;
use crate::switch;

use super::rings::Rings;
use super::stop::{AGAIN, BROKEN, CLOSED, GONE, LATE, Patience, Stop, UNKNOWN, acquire};
use super::view::{View, sealed_body};

/// The largest message (D14), checked before memory is taken for it.
const MESSAGE_BYTES: usize = 16 << 20;
/// Records put before the switch is shown them: enough to pay for the wake-up, few enough to let it begin.
const PUBLISH_EVERY: usize = 32;

impl Rings {
    #[allow(clippy::too_many_arguments, reason = "the parts of one message")]
    pub(super) fn send_one(
        &self,
        py: Python<'_>,
        mut header: TxHeader,
        dst: &[u8],
        src: &[u8],
        views: &[View],
        fds: &[RawFd],
        patience: Patience,
    ) -> Result<(), Stop> {
        let mut guard = acquire(py, &self.ends.tx, patience)?;
        self.ends.check_open()?;
        let tx = guard.as_mut().ok_or(Stop::Errno(CLOSED))?;
        let parts: Vec<&[u8]> = views.iter().map(View::bytes).collect();
        let body_len: usize = parts.iter().map(|part| part.len()).sum();
        check(header.kind, src, dst)?;
        if body_len > MESSAGE_BYTES || fds.len() > line::MAX_FDS - 1 {
            return Err(Stop::Errno(-libc::EMSGSIZE));
        }
        header.body_len = body_len as u32;
        let sealed;
        let mut all_fds = fds.to_vec();
        let mut body: &[&[u8]] = &parts;
        if body_len as u64 > tx.inline_limit() {
            sealed = py
                .detach(|| sealed_body(&parts))
                .map_err(|e| Stop::Raise(e.into()))?;
            all_fds.push(sealed.as_raw_fd());
            header.flags |= BODY_IN_MEMFD;
            body = &[];
        }
        header.fds = all_fds.len() as u8;
        let message = Outgoing {
            header,
            src,
            dst,
            body,
        };
        if client::record_bytes(&message) > tx.record_limit() {
            return Err(Stop::Errno(-libc::EMSGSIZE));
        }
        loop {
            let room = tx.room();
            let (pos, end) = self.ends.put(py, tx, &message, patience)?;
            // Descriptors go ahead of their record, but never without it.
            if !all_fds.is_empty()
                && let Err(stop) = self.send_fds(py, &all_fds, patience)
            {
                tx.abandon();
                return Err(stop);
            }
            if !tx.publish(self.ends.line()) {
                return Err(Stop::Errno(GONE));
            }
            self.ends.await_verdict(py, tx, end, patience)?;
            match checked(tx.verdict(pos)) {
                switch::OK => return Ok(()),
                AGAIN if patience.waits => self.ends.await_room(py, tx, room, patience)?,
                refusal => {
                    if refusal == AGAIN && self.ends.pollable.load(Ordering::Relaxed) {
                        tx.block_line(room, self.ends.line());
                    }
                    return Err(Stop::Errno(refusal));
                }
            }
        }
    }

    fn send_fds(&self, py: Python<'_>, fds: &[RawFd], patience: Patience) -> Result<(), Stop> {
        loop {
            let limit = if patience.waits {
                patience.left()
            } else {
                Duration::ZERO
            };
            let sent = py.detach(|| client::send_fds(self.ends.line(), fds, limit));
            let error = match sent {
                Ok(()) => return Ok(()),
                Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
            };
            match error {
                libc::EPIPE | libc::ECONNRESET => return Err(Stop::Errno(GONE)),
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
        bodies: &[View],
        patience: Patience,
    ) -> (usize, Result<(), Stop>) {
        let mut accepted = 0;
        while accepted < bodies.len() {
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

    /// Sends messages until one is refused for lack of room, waits for that room, and returns; or until all are sent.
    #[allow(clippy::too_many_arguments, reason = "the parts of one batch")]
    fn send_run(
        &self,
        py: Python<'_>,
        header: TxHeader,
        destinations: &[&[u8]],
        src: &[u8],
        bodies: &[View],
        accepted: &mut usize,
        patience: Patience,
    ) -> Result<(), Stop> {
        let mut guard = acquire(py, &self.ends.tx, patience)?;
        self.ends.check_open()?;
        let tx = guard.as_mut().ok_or(Stop::Errno(CLOSED))?;
        let room = tx.room();
        let line = self.ends.line();
        // Positions and ends of messages without a verdict.
        let mut open: std::collections::VecDeque<(u64, u64)> = std::collections::VecDeque::new();
        let (mut next, mut unpublished, mut refusal) = (*accepted, 0usize, switch::OK);
        let mut settle = |tx: &mut Tx,
                          open: &mut std::collections::VecDeque<(u64, u64)>,
                          refusal: &mut i32|
         -> Result<(), Violation> {
            while let Some((pos, end)) = open.front() {
                if !tx.settled(*end)? {
                    break;
                }
                let verdict = checked(tx.verdict(*pos));
                open.pop_front();
                if *refusal == switch::OK {
                    if verdict == switch::OK {
                        *accepted += 1;
                    } else {
                        *refusal = verdict;
                    }
                }
            }
            Ok(())
        };
        let mut alone = false;
        while next < bodies.len() && refusal == switch::OK {
            let view = &bodies[next];
            let dst = destinations[if destinations.len() == 1 { 0 } else { next }];
            let chain = if open.is_empty() { 0 } else { CHAIN };
            let part = [view.bytes()];
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
            if check(header.kind, src, dst).is_err()
                || part[0].len() as u64 > tx.inline_limit()
                || client::record_bytes(&message) > tx.record_limit()
            {
                alone = true;
                break;
            }
            // Verdicts are read before the place of their records can be taken by new ones.
            if !tx.fits(client::record_bytes(&message)) {
                if unpublished > 0 {
                    let shown = open.len() > unpublished;
                    unpublished = 0;
                    if !tx.publish(line) {
                        settle(tx, &mut open, &mut refusal)?;
                        return Err(Stop::Errno(if shown { UNKNOWN } else { GONE }));
                    }
                }
                settle(tx, &mut open, &mut refusal)?;
                if tx.fits(client::record_bytes(&message)) {
                    continue;
                }
                // A quarter of what is on its way, so that neither side waits for each single record.
                let end = open
                    .get(open.len() / 4)
                    .map_or(tx.released() + 1, |(_, end)| *end);
                let done = self.ends.await_verdict(py, tx, end, patience);
                settle(tx, &mut open, &mut refusal)?;
                done?;
                continue;
            }
            let Some(place) = tx.put(&message)? else {
                continue;
            };
            open.push_back(place);
            next += 1;
            unpublished += 1;
            if unpublished == PUBLISH_EVERY {
                let shown = open.len() > unpublished;
                unpublished = 0;
                if !tx.publish(line) {
                    settle(tx, &mut open, &mut refusal)?;
                    return Err(Stop::Errno(if shown { UNKNOWN } else { GONE }));
                }
            }
        }
        if unpublished > 0 {
            let shown = open.len() > unpublished;
            if !tx.publish(line) {
                settle(tx, &mut open, &mut refusal)?;
                return Err(Stop::Errno(if shown { UNKNOWN } else { GONE }));
            }
        }
        if let Some((_, end)) = open.back() {
            let end = *end;
            let done = self.ends.await_verdict(py, tx, end, patience);
            settle(tx, &mut open, &mut refusal)?;
            done?;
        }
        match refusal {
            switch::OK => {}
            AGAIN if patience.waits => return self.ends.await_room(py, tx, room, patience),
            errno => {
                if errno == AGAIN && self.ends.pollable.load(Ordering::Relaxed) {
                    tx.block_line(room, line);
                }
                return Err(Stop::Errno(errno));
            }
        }
        drop(guard);
        // What does not go in a batch, or is refused before it is put anywhere.
        if alone {
            let view = std::slice::from_ref(&bodies[*accepted]);
            let dst = destinations[if destinations.len() == 1 {
                0
            } else {
                *accepted
            }];
            self.send_one(py, header, dst, src, view, &[], patience)?;
            *accepted += 1;
        }
        Ok(())
    }
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
