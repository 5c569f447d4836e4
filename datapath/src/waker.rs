//! One waker for many rings: an endpoint sleeps on its line and on the bells of all its lanes at once.
//!
//! Invariants:
//! 1. A bell is never read: each ring of it is an event of its own (EPOLLET), so waking costs one system call on either side.
//! 2. Only who rings a bell and who sleeps on it have it: nobody can take the wake-up of another.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new bell.
///
/// # Errors
/// As eventfd(2).
pub fn bell() -> io::Result<OwnedFd> {
    // SAFETY: plain call.
    owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })
}

/// Rings a bell. One that cannot be rung was rung too often by somebody who wants no waking.
pub fn ring(bell: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes that live for the call.
    unsafe { libc::write(bell.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

/// What an endpoint with lanes sleeps on.
pub struct Ear {
    epoll: OwnedFd,
}

const LINE: u64 = 1;

impl Ear {
    /// Hears a line.
    ///
    /// # Errors
    /// As epoll_create1(2), epoll_ctl(2).
    pub fn new(line: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: plain call.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        let ear = Self { epoll };
        ear.control(libc::EPOLL_CTL_ADD, line.as_raw_fd(), libc::EPOLLIN, LINE)?;
        Ok(ear)
    }

    fn control(&self, what: i32, fd: RawFd, events: i32, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events: events as u32,
            u64: token,
        };
        // SAFETY: open descriptors, and an event that lives for the call.
        if unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), what, fd, &raw mut event) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Hears a bell too.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn add(&self, bell: &OwnedFd) -> io::Result<()> {
        let events = libc::EPOLLIN | libc::EPOLLET;
        self.control(libc::EPOLL_CTL_ADD, bell.as_raw_fd(), events, 0)
    }

    /// Hears a bell no more. It must be said before the bell is closed: its other end may live on.
    pub fn remove(&self, bell: &OwnedFd) {
        // What is not there need not be removed.
        let _ = self.control(libc::EPOLL_CTL_DEL, bell.as_raw_fd(), 0, 0);
    }

    /// Sleeps until something is heard, the time is over or a signal comes. Returns whether the line has something.
    #[must_use]
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        let millis = timeout.map_or(-1, |t| {
            i32::try_from(t.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
        });
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
        // SAFETY: an array of the stated length that lives for the call.
        let count = unsafe {
            libc::epoll_wait(
                self.epoll.as_raw_fd(),
                events.as_mut_ptr(),
                events.len() as i32,
                millis,
            )
        };
        let count = usize::try_from(count).unwrap_or(0);
        // With many bells the line may not be among those; it is looked at the next time, for it stays readable.
        events[..count].iter().any(|event| event.u64 == LINE)
    }
}
