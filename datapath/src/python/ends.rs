//! The two halves that a client has of its endpoint, and the waits of a sender.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::client::{self, Outgoing, Rx, Tx, Waited};
use crate::line;

use super::stop::{AGAIN, CLOSED, GONE, LATE, Patience, Stop, UNKNOWN};

/// How long a send that does not want to wait for room waits for its verdict, which is the agent's work of microseconds.
const VERDICT_LIMIT: Duration = Duration::from_secs(5);

/// What the rings of a client share with its loans.
pub(super) struct Ends {
    pub(super) tx: Mutex<Option<Tx>>,
    pub(super) rx: Mutex<Option<Rx>>,
    /// Loans that came back and whose room was not given back yet.
    pub(super) returned: Mutex<Vec<u64>>,
    pub(super) line: RawFd,
    pub(super) details: AtomicBool,
    pub(super) pollable: AtomicBool,
    pub(super) closed: AtomicBool,
}

impl Ends {
    pub(super) fn line(&self) -> BorrowedFd<'_> {
        // SAFETY: the caller of `Rings` keeps the line open for as long as it lives.
        unsafe { BorrowedFd::borrow_raw(self.line) }
    }

    /// Gives back the room of loans that came back.
    pub(super) fn collect(&self, rx: &mut Rx) {
        let ends =
            std::mem::take(&mut *self.returned.lock().unwrap_or_else(PoisonError::into_inner));
        for end in ends {
            rx.give_back(end, self.line());
        }
        rx.settle(self.line());
    }

    /// A loan came back. Whoever has the reading half may be waiting with it, and for this very room.
    pub(super) fn give_back(&self, end: u64) {
        self.returned
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(end);
        match self.rx.try_lock() {
            Ok(mut rx) => {
                if let Some(rx) = rx.as_mut() {
                    self.collect(rx);
                }
            }
            // The answer wakes it, and it collects. A closed line has woken it already.
            Err(_) => drop(line::send(self.line(), &[line::PING], &[])),
        }
    }

    pub(super) fn check_open(&self) -> Result<(), Stop> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Stop::Errno(CLOSED));
        }
        Ok(())
    }

    fn is_hung_up(&self) -> bool {
        let gone = libc::POLLHUP | libc::POLLERR;
        client::poll(self.line(), 0, Some(Duration::ZERO)) & gone != 0
    }

    /// Waits until everything before `end` has its verdict.
    pub(super) fn await_verdict(
        &self,
        py: Python<'_>,
        tx: &mut Tx,
        end: u64,
        patience: Patience,
    ) -> Result<(), Stop> {
        let limit = if patience.waits {
            patience.until
        } else {
            Some(Instant::now() + VERDICT_LIMIT)
        };
        loop {
            match py.detach(|| tx.wait_settled(end, self.line(), Duration::from_millis(100)))? {
                Waited::Ready => return Ok(()),
                Waited::Gone => return Err(Stop::Errno(UNKNOWN)),
                Waited::NotYet => {}
            }
            py.check_signals()?;
            if limit.is_some_and(|at| at <= Instant::now()) {
                return Err(Stop::Errno(UNKNOWN));
            }
        }
    }

    /// Waits until the switch says that there is room where there was none.
    pub(super) fn await_room(
        &self,
        py: Python<'_>,
        tx: &Tx,
        seen: u32,
        patience: Patience,
    ) -> Result<(), Stop> {
        loop {
            match py.detach(|| tx.wait_room(seen, self.line(), patience.left())) {
                Waited::Ready => return Ok(()),
                Waited::Gone => return Err(Stop::Errno(GONE)),
                Waited::NotYet => {}
            }
            py.check_signals()?;
            if self.closed.load(Ordering::Acquire) {
                return Err(Stop::Errno(CLOSED));
            }
            if patience.is_over() {
                return Err(Stop::Errno(LATE));
            }
        }
    }

    /// Puts a message into the ring, waiting for older ones to leave it.
    pub(super) fn put(
        &self,
        py: Python<'_>,
        tx: &mut Tx,
        message: &Outgoing<'_>,
        patience: Patience,
    ) -> Result<(u64, u64), Stop> {
        loop {
            if let Some(place) = tx.put(message)? {
                return Ok(place);
            }
            // Only messages whose verdict nobody waited for can be in the way.
            let next = tx.released() + 1;
            match self.await_verdict(py, tx, next, patience) {
                // What is unknown is the fate of those; this message was not even shown to the switch.
                Err(Stop::Errno(UNKNOWN)) => {
                    return Err(Stop::Errno(if self.is_hung_up() {
                        GONE
                    } else if patience.waits {
                        LATE
                    } else {
                        AGAIN
                    }));
                }
                result => result?,
            }
        }
    }
}
