//! Waking the thread of the carrier: for a command, or because a switch has records for a lane.
//!
//! Invariant: whoever has left work and rings afterwards is seen. The thread says that it sleeps before it looks for work a
//! last time, and a ringer looks whether it sleeps after it has left the work.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::runner::{eventfd, ring, silence};

/// A descriptor to sleep on, written only while somebody sleeps.
pub struct Bell {
    fd: OwnedFd,
    asleep: AtomicBool,
    must_look: AtomicBool,
}

impl Bell {
    /// Makes one.
    ///
    /// # Errors
    /// As eventfd(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            fd: eventfd()?,
            asleep: AtomicBool::new(false),
            must_look: AtomicBool::new(false),
        })
    }

    /// What to wait on until it is readable.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Wakes whoever sleeps; call it behind leaving the work.
    pub fn ring(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            ring(&self.fd);
        }
    }

    /// The same, and some link has more to do although nothing has come for it.
    pub fn ring_for_links(&self) {
        self.must_look.store(true, Ordering::SeqCst);
        self.ring();
    }

    /// Whether links are to be looked at; true once for all rings.
    pub fn take_look(&self) -> bool {
        self.must_look.load(Ordering::Relaxed) && self.must_look.swap(false, Ordering::SeqCst)
    }

    /// Says that the thread is about to sleep; look for work once more, then wait.
    pub fn doze(&self) {
        self.asleep.store(true, Ordering::SeqCst);
    }

    /// The thread is awake.
    pub fn wake(&self) {
        if !self.asleep.swap(false, Ordering::SeqCst) {
            silence(&self.fd);
        }
    }
}

/// What a switch rings when a trunk has records.
pub struct LaneBell {
    is_ready: AtomicBool,
    bell: Arc<Bell>,
}

impl LaneBell {
    /// One of a lane; it is ready at first, since there may be something.
    #[must_use]
    pub fn new(bell: Arc<Bell>) -> Self {
        Self {
            is_ready: AtomicBool::new(true),
            bell,
        }
    }

    /// There are records to be taken.
    pub fn ring(&self) {
        self.is_ready.store(true, Ordering::SeqCst);
        self.bell.ring_for_links();
    }

    /// Whether there may be records.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.is_ready.load(Ordering::SeqCst)
    }

    /// Whoever takes records says so first: what comes from now on rings again.
    pub fn take(&self) {
        self.is_ready.store(false, Ordering::SeqCst);
    }
}
