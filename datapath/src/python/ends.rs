//! The two halves that a client has of its endpoint, and the waits of a sender.
//!
//! Invariants:
//! 1. Whoever needs a half that another has leaves a note and does not wait: a loan that comes back, a close, a wish to be polled.
//! 2. No note is forgotten: one looks for the half after the note is there, the other for notes after the half is free.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::client::{Room, Rx, Tx, Waited};
use crate::lane_out::{LaneRoom, RoomWait};
use crate::line;

use super::half::Half;
use super::receiving::Inbox;
use super::stop::{AGAIN, CLOSED, GONE, LATE, Patience, Stop, UNKNOWN};

/// How long a send that does not want to wait for room waits for its verdict, which is the agent's work of microseconds.
const VERDICT_LIMIT: Duration = Duration::from_secs(5);

/// What the rings of a client share with its loans.
pub(super) struct Ends {
    pub(super) tx: Half<Tx>,
    pub(super) rx: Half<Inbox>,
    /// Until it is closed. Our own copy: a wait may outlast that of the caller, whose number may name another file then.
    line: Mutex<Option<Arc<OwnedFd>>>,
    /// Loans that came back and whose room was not given back yet.
    returned: Mutex<Vec<(u64, u64)>>,
    /// There is something in `returned`, or the line is to be polled for the first time.
    has_note: AtomicBool,
    pub(super) details: AtomicBool,
    pub(super) pollable: AtomicBool,
    closed: AtomicBool,
    /// The process that made it.
    pid: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ends {
    pub(super) fn new(tx: Tx, rx: Rx, line: Arc<OwnedFd>) -> Self {
        Self {
            tx: Half::new(tx),
            rx: Half::new(Inbox::new(rx)),
            line: Mutex::new(Some(line)),
            returned: Mutex::new(Vec::new()),
            has_note: AtomicBool::new(false),
            details: AtomicBool::new(false),
            pollable: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            pid: std::process::id(),
        }
    }

    /// Whether this process made it. A child that `fork` made shares rings and line with its parent, and leaves them alone.
    fn is_ours(&self) -> bool {
        std::process::id() == self.pid
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Why a call ends that found the line closed.
    pub(super) fn gone(&self) -> Stop {
        Stop::Errno(if self.is_closed() { CLOSED } else { GONE })
    }

    /// Ends every wait, and lets go of everything once nobody uses it any more.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        if !self.is_ours() {
            return;
        }
        if let Some(line) = lock(&self.line).take() {
            // SAFETY: plain call on an open descriptor.
            unsafe { libc::shutdown(line.as_raw_fd(), libc::SHUT_RDWR) };
        }
        self.tidy();
    }

    /// The line is polled from now on: it must be readable if a record waits.
    pub(super) fn set_pollable(&self) {
        self.pollable.store(true, Ordering::SeqCst);
        self.leave_note();
    }

    /// A loan came back.
    pub(super) fn give_back(&self, end: (u64, u64)) {
        if !self.is_ours() {
            return;
        }
        lock(&self.returned).push(end);
        if !self.leave_note()
            && let Some(line) = lock(&self.line).as_ref()
        {
            // Whoever has the reading half may be waiting with it, and for this very room: the answer wakes it.
            let _ = line::send(line.as_fd(), &[line::PING], &[]);
        }
    }

    /// Returns whether it was seen to at once.
    fn leave_note(&self) -> bool {
        self.has_note.store(true, Ordering::SeqCst);
        self.tidy();
        !self.has_note.load(Ordering::SeqCst)
    }

    /// Does what others left to whoever had a half.
    pub(super) fn tidy(&self) {
        // Notes and halves are different words: see invariant 2.
        fence(Ordering::SeqCst);
        if self.is_closed() {
            // What is dropped here may be Python's, and run code of its own: after the locks.
            let tx = self.tx.try_have().and_then(|mut tx| tx.take());
            let rx = self.rx.try_have().and_then(|mut rx| rx.take());
            drop((tx, rx));
        }
        while self.has_note.load(Ordering::Relaxed) {
            let Some(mut rx) = self.rx.try_have() else {
                return;
            };
            if let Some(inbox) = rx.as_mut() {
                self.collect(&mut inbox.rx);
                self.arm(&mut inbox.rx);
            } else {
                self.has_note.store(false, Ordering::SeqCst);
            }
            drop(rx);
            fence(Ordering::SeqCst);
        }
    }

    /// As [`Self::tidy`], of whoever has let go of a half under the GIL alone, as all do who leave notes: no fence is needed.
    pub(super) fn tidy_with_gil(&self, _: Python<'_>) {
        if self.is_closed() || self.has_note.load(Ordering::Relaxed) {
            self.tidy();
        }
    }

    /// Gives back the room of loans that came back.
    pub(super) fn collect(&self, rx: &mut Rx) {
        if self.has_note.swap(false, Ordering::SeqCst) {
            let ends = std::mem::take(&mut *lock(&self.returned));
            for (lane, end) in ends {
                rx.give_back(lane, end);
            }
        }
    }

    /// Lets a poll of the line notice what comes, if anybody polls it.
    pub(super) fn arm(&self, rx: &mut Rx) {
        if self.pollable.load(Ordering::SeqCst) && !self.is_closed() {
            // A rule that is found broken here is found again by the next call that reads.
            let _ = rx.arm();
        }
    }
}

/// The waits of a sender.
impl Ends {
    /// Waits until everything before `end` has its verdict; for ever, or until the time is over (`NotYet`).
    fn await_settled(
        &self,
        py: Python<'_>,
        tx: &mut Tx,
        end: u64,
        patience: Patience,
    ) -> Result<Waited, Stop> {
        let limit = if patience.waits {
            patience.until
        } else {
            Some(Instant::now() + VERDICT_LIMIT)
        };
        loop {
            match py.detach(|| tx.wait_settled(end, limit))? {
                Waited::NotYet => {}
                done => return Ok(done),
            }
            py.check_signals()?;
            if limit.is_some_and(|at| at <= Instant::now()) {
                return Ok(Waited::NotYet);
            }
        }
    }

    /// Waits until everything before `end` has its verdict.
    pub(super) fn await_verdict(
        &self,
        py: Python<'_>,
        tx: &mut Tx,
        end: u64,
        patience: Patience,
    ) -> Result<(), Stop> {
        match self.await_settled(py, tx, end, patience)? {
            Waited::Ready => Ok(()),
            Waited::Gone | Waited::NotYet => Err(Stop::Errno(UNKNOWN)),
        }
    }

    /// Waits until a record of so many bytes fits in: only messages whose verdict nobody waited for can be in the way.
    pub(super) fn await_fit(
        &self,
        py: Python<'_>,
        tx: &mut Tx,
        bytes: u64,
        patience: Patience,
    ) -> Result<(), Stop> {
        while !tx.fits(bytes) {
            let next = tx.released() + 1;
            match self.await_settled(py, tx, next, patience)? {
                Waited::Ready => {}
                Waited::Gone => return Err(self.gone()),
                Waited::NotYet => {
                    return Err(Stop::Errno(if patience.waits { LATE } else { AGAIN }));
                }
            }
        }
        Ok(())
    }

    /// Waits until there is room in a lane, or it is closed. `false`: long enough for its readers. Others may send meanwhile.
    pub(super) fn await_lane(
        &self,
        py: Python<'_>,
        room: &LaneRoom,
        patience: Patience,
    ) -> Result<bool, Stop> {
        loop {
            match py.detach(|| room.wait(patience.left())) {
                RoomWait::Ready => return Ok(true),
                RoomWait::Over => return Ok(false),
                RoomWait::NotYet => {}
                RoomWait::Gone => return Err(self.gone()),
            }
            py.check_signals()?;
            if patience.is_over() {
                return Err(Stop::Errno(LATE));
            }
        }
    }

    /// Waits until the switch says that there is room where there was none. Others may send meanwhile.
    pub(super) fn await_room(
        &self,
        py: Python<'_>,
        room: &Room,
        patience: Patience,
    ) -> Result<(), Stop> {
        loop {
            match py.detach(|| room.wait(patience.left())) {
                Waited::Ready => return Ok(()),
                Waited::Gone => return Err(self.gone()),
                Waited::NotYet => {}
            }
            py.check_signals()?;
            if patience.is_over() {
                return Err(Stop::Errno(LATE));
            }
        }
    }
}
