//! One waker for many rings: an endpoint sleeps on its line and on the bells of all its lanes at once.
//!
//! Invariants:
//! 1. A bell is never read: each ring of it is an event of its own (EPOLLET), so waking costs one system call on either side.
//! 2. Only who rings a bell has it, and only who sleeps hears it: nobody can take the wake-up of another, and who hears a bell can not
//!    make a ring of it block.
//! 3. A sleep for a short time ends by an alarm that may be older than the sleep: it is set once for many short sleeps, for a time that is
//!    given to epoll_wait(2) costs a tenth of a round trip each time.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::{Duration, Instant};

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new bell: what is rung, and what it is heard by.
///
/// These are two, as whoever has what is rung could fill it up and make it wait for room, also for others.
///
/// # Errors
/// As eventfd(2), epoll_create1(2), epoll_ctl(2).
pub fn bell() -> io::Result<(OwnedFd, OwnedFd)> {
    // SAFETY: plain call.
    let rung = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: plain call.
    let heard = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
    control(
        &heard,
        libc::EPOLL_CTL_ADD,
        rung.as_raw_fd(),
        libc::EPOLLIN,
        0,
    )?;
    Ok((rung, heard))
}

fn control(epoll: &OwnedFd, what: i32, fd: RawFd, events: i32, token: u64) -> io::Result<()> {
    let mut event = libc::epoll_event {
        events: events as u32,
        u64: token,
    };
    // SAFETY: open descriptors, and an event that lives for the call.
    if unsafe { libc::epoll_ctl(epoll.as_raw_fd(), what, fd, &raw mut event) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
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
    alarm: OwnedFd,
    /// When the alarm goes off, if that was not heard yet.
    alarm_at: Option<Instant>,
}

const LINE: u64 = 1;
const ALARM: u64 = 2;
/// Shorter sleeps than this end by the alarm.
const SHORT: Duration = Duration::from_millis(20);

impl Ear {
    /// Hears a line.
    ///
    /// # Errors
    /// As epoll_create1(2), timerfd_create(2), epoll_ctl(2).
    pub fn new(line: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: plain call.
        let epoll = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: plain call.
        let alarm = owned(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) })?;
        let ear = Self {
            epoll,
            alarm,
            alarm_at: None,
        };
        ear.control(libc::EPOLL_CTL_ADD, line.as_raw_fd(), libc::EPOLLIN, LINE)?;
        let events = libc::EPOLLIN | libc::EPOLLET;
        ear.control(libc::EPOLL_CTL_ADD, ear.alarm.as_raw_fd(), events, ALARM)?;
        Ok(ear)
    }

    fn control(&self, what: i32, fd: RawFd, events: i32, token: u64) -> io::Result<()> {
        control(&self.epoll, what, fd, events, token)
    }

    /// Hears a bell too, by what [`bell`] has made for that.
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

    /// Sees to it that the alarm goes off before this time is over. Returns whether it does.
    fn set_alarm(&mut self, left: Duration) -> bool {
        let now = Instant::now();
        if self.alarm_at.is_some_and(|at| at > now && at <= now + left) {
            return true;
        }
        let time = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            // No time at all would be no alarm.
            it_value: libc::timespec {
                tv_sec: left.as_secs() as libc::time_t,
                tv_nsec: left.subsec_nanos().max(1).into(),
            },
        };
        // SAFETY: a time that lives for the call.
        let done = unsafe {
            libc::timerfd_settime(self.alarm.as_raw_fd(), 0, &raw const time, ptr::null_mut())
        };
        self.alarm_at = (done == 0).then_some(now + left);
        done == 0
    }

    /// Sleeps until something is heard, the time is over or a signal comes; a short sleep may end sooner. Returns whether the line has
    /// something.
    #[must_use]
    pub fn wait(&mut self, timeout: Option<Duration>) -> bool {
        let timeout = timeout.filter(|left| *left > SHORT || !self.set_alarm(*left));
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
        let has = |token| events[..count].iter().any(|event| event.u64 == token);
        if has(ALARM) {
            self.alarm_at = None;
        }
        // With many bells the line may not be among those; it is looked at the next time, for it stays readable.
        has(LINE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::line;
    use std::os::fd::AsFd;

    #[test]
    fn d11_each_ring_wakes_though_nobody_reads_it() {
        let (ours, _theirs) = line::pair().unwrap();
        let mut ear = Ear::new(ours.as_fd()).unwrap();
        let (one, heard) = bell().unwrap();
        ear.add(&heard).unwrap();
        for _ in 0..1000 {
            ring(&one);
            assert!(!ear.wait(None));
        }
    }

    #[test]
    fn case5_who_hears_a_bell_cannot_make_it_block() {
        let (rung, heard) = bell().unwrap();
        // SAFETY: plain calls on open descriptors, with bytes that live for the call.
        unsafe {
            let full = (u64::MAX - 1).to_ne_bytes();
            libc::fcntl(heard.as_raw_fd(), libc::F_SETFL, 0);
            libc::write(heard.as_raw_fd(), full.as_ptr().cast(), full.len());
            let flags = libc::fcntl(rung.as_raw_fd(), libc::F_GETFL);
            assert_ne!(flags & libc::O_NONBLOCK, 0);
            libc::write(rung.as_raw_fd(), full.as_ptr().cast(), full.len());
        }
        // Also when it is full.
        ring(&rung);
    }

    #[test]
    fn r22_one_alarm_ends_many_short_sleeps() {
        let (ours, theirs) = line::pair().unwrap();
        let mut ear = Ear::new(ours.as_fd()).unwrap();
        let hour = Duration::from_secs(3600);
        assert!(ear.set_alarm(hour));
        let at = ear.alarm_at;
        assert!(ear.set_alarm(2 * hour));
        assert_eq!(ear.alarm_at, at, "the one that is set comes in time");
        let (one, heard) = bell().unwrap();
        ear.add(&heard).unwrap();
        ring(&one);
        assert!(!ear.wait(None));
        assert_eq!(ear.alarm_at, at, "a bell has ended this sleep");
        assert!(!ear.wait(Some(SHORT)));
        assert_eq!(ear.alarm_at, None, "it went off");
        // What goes off while nobody sleeps is forgotten when the next one is set.
        assert!(ear.set_alarm(Duration::ZERO));
        assert!(ear.set_alarm(hour));
        line::send(theirs.as_fd(), &[line::WAKE], &[]).unwrap();
        assert!(ear.wait(None));
        assert!(ear.alarm_at.is_some());
    }
}
