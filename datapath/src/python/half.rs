//! One direction of the rings, which one thread has at a time.

use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use super::ends::Ends;
use super::stop::{AGAIN, CLOSED, LATE, Patience, Stop};

/// One direction of the rings; `None` once it is closed.
pub(super) struct Half<T> {
    inside: Mutex<Option<T>>,
    /// Names the thread that has it, 0 for none.
    owner: AtomicUsize,
}

/// A number that tells threads apart.
fn this_thread() -> usize {
    thread_local!(static PLACE: u8 = const { 0 });
    PLACE.with(|place| ptr::from_ref(place).addr())
}

impl<T> Half<T> {
    pub(super) fn new(inside: T) -> Self {
        Self {
            inside: Mutex::new(Some(inside)),
            owner: AtomicUsize::new(0),
        }
    }

    /// The half, unless somebody has it. Only for what neither waits nor calls Python.
    pub(super) fn try_have(&self) -> Option<MutexGuard<'_, Option<T>>> {
        match self.inside.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Takes the half for a call, waiting for other threads that have it, without holding up signals.
    ///
    /// A call that a signal or a callback makes while this very thread has the half would wait for itself: RuntimeError.
    pub(super) fn hold<'a>(
        &'a self,
        py: Python<'_>,
        ends: &'a Ends,
        patience: Patience,
    ) -> Result<Held<'a, T>, Stop> {
        loop {
            if let Some(guard) = self.try_have() {
                self.owner.store(this_thread(), Ordering::Relaxed);
                return Ok(Held {
                    ends,
                    half: self,
                    guard: Some(guard),
                });
            }
            if self.owner.load(Ordering::Relaxed) == this_thread() {
                return Err(Stop::Raise(PyRuntimeError::new_err(
                    "reentrant call: this thread is in the midst of such a call already",
                )));
            }
            if !patience.waits {
                return Err(Stop::Errno(AGAIN));
            }
            if patience.is_over() {
                return Err(Stop::Errno(LATE));
            }
            py.detach(|| std::thread::sleep(Duration::from_micros(200)));
            py.check_signals()?;
        }
    }
}

/// A half in use. What others could not do meanwhile is done when it is dropped.
pub(super) struct Held<'a, T> {
    ends: &'a Ends,
    half: &'a Half<T>,
    /// There until the drop.
    guard: Option<MutexGuard<'a, Option<T>>>,
}

impl<T> Held<'_, T> {
    pub(super) fn inside(&mut self) -> Result<&mut T, Stop> {
        let inside = self.guard.as_mut().and_then(|guard| guard.as_mut());
        if self.ends.is_closed() {
            return Err(Stop::Errno(CLOSED));
        }
        inside.ok_or(Stop::Errno(CLOSED))
    }
}

impl<T> Drop for Held<'_, T> {
    fn drop(&mut self) {
        self.half.owner.store(0, Ordering::Relaxed);
        self.guard = None;
        self.ends.tidy();
    }
}
