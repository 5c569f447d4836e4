//! Why a call ends before its work is done, and when it gives up.

use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::ring::Violation;

pub(super) const AGAIN: i32 = -libc::EAGAIN;
pub(super) const GONE: i32 = -libc::ENOTCONN;
pub(super) const CLOSED: i32 = -libc::EBADF;
pub(super) const BROKEN: i32 = -libc::EBADMSG;
pub(super) const UNKNOWN: i32 = -libc::ECONNABORTED;
pub(super) const LATE: i32 = -libc::ETIMEDOUT;

impl From<Violation> for Stop {
    fn from(_: Violation) -> Self {
        Self::Errno(BROKEN)
    }
}

impl From<PyErr> for Stop {
    fn from(error: PyErr) -> Self {
        Self::Raise(error)
    }
}

/// Why a call ends before its work is done.
pub(super) enum Stop {
    Errno(i32),
    Raise(PyErr),
}
/// What Python is told of a call that returns nothing else.
pub(super) fn errno_of(result: Result<(), Stop>) -> PyResult<i32> {
    match result {
        Ok(()) => Ok(0),
        Err(Stop::Errno(errno)) => Ok(errno),
        Err(Stop::Raise(error)) => Err(error),
    }
}
/// When to give up; whether to wait at all.
#[derive(Clone, Copy)]
pub(super) struct Patience {
    pub(super) waits: bool,
    pub(super) until: Option<Instant>,
}

impl Patience {
    pub(super) fn new(timeout: Option<f64>) -> Self {
        match timeout {
            None => Self {
                waits: true,
                until: None,
            },
            Some(t) if t <= 0.0 => Self {
                waits: false,
                until: None,
            },
            Some(t) => Self {
                waits: true,
                // A time so long that it cannot be told is for ever.
                until: Duration::try_from_secs_f64(t)
                    .ok()
                    .and_then(|d| Instant::now().checked_add(d)),
            },
        }
    }

    pub(super) fn left(&self) -> Duration {
        self.until.map_or(Duration::from_secs(3600), |at| {
            at.saturating_duration_since(Instant::now())
        })
    }

    pub(super) fn is_over(&self) -> bool {
        self.until.is_some_and(|at| at <= Instant::now())
    }
}
