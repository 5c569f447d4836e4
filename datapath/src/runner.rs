//! The thread of the switch: it serves endpoints in rounds while they are busy, and sleeps on their lines when they are not.
//!
//! Invariants:
//! 1. The switch is touched only under its lock. Who calls from outside is let in before the next round.
//! 2. Before the thread sleeps, every endpoint has been told to kick (`doze`), so no message waits unseen.
//! 3. When the runner is dropped the thread has ended and nothing of it is left.
//! 4. A panic ends the thread, is told, and is no reason to wait for anything: the switch can be asked, but nothing moves.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::endpoint::Ref;
use crate::switch::Switch;
use crate::wait::Spin;

/// Rounds between two looks at the lines of endpoints that sleep, while others are busy.
const LOOK_EVERY: u32 = 8;
/// Rounds between two tries to let silent endpoints sleep, while others are busy.
const DOZE_EVERY: u32 = 1024;
const BELL: u64 = u64::MAX;

struct Shared {
    core: Mutex<Switch>,
    callers: AtomicU32,
    stop: AtomicBool,
    /// The thread sleeps, or is about to, and knows of nothing that happens from now on.
    asleep: AtomicBool,
    epoll: OwnedFd,
    bell: OwnedFd,
    events: OwnedFd,
    /// What the panic said that has ended the thread.
    failure: OnceLock<String>,
}

/// A running switch.
pub struct Runner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor that whoever waits on it is woken by.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: plain call.
    owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })
}

/// Wakes whoever waits.
pub(crate) fn ring(bell: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes that live for the call. A full counter rings as well, so the result does not matter.
    unsafe { libc::write(bell.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

/// Whoever waits from now on is woken by the next ring.
pub(crate) fn silence(bell: &OwnedFd) {
    let mut count = [0u8; 8];
    // SAFETY: eight bytes that live for the call. An empty counter is silent already.
    unsafe { libc::read(bell.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
}

/// What a panic said.
pub(crate) fn text_of(panic: &(dyn Any + Send)) -> String {
    let literal = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    literal
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without words".to_owned())
}

fn lock(core: &Mutex<Switch>) -> MutexGuard<'_, Switch> {
    // A panic under the lock is a bug that its thread has reported; the others go on with what is there.
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn watch(&self, fd: RawFd, token: u64, events: i32) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events: events as u32,
            u64: token,
        };
        // SAFETY: open descriptors, and an event that lives for the call.
        let done = unsafe {
            libc::epoll_ctl(
                self.epoll.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                fd,
                &raw mut event,
            )
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Serves endpoints whose lines have something, waiting for that at most `millis` (-1: for ever). Returns how many had.
    fn look(&self, millis: i32) -> usize {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
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
        if count == 0 {
            return 0;
        }
        self.let_in();
        let mut core = lock(&self.core);
        for event in &events[..count] {
            let token = event.u64;
            if token == BELL {
                silence(&self.bell);
            } else {
                core.kicked(Ref {
                    slot: (token >> 32) as u32,
                    turn: token as u32,
                });
            }
        }
        self.leave(core);
        count
    }

    /// Serves busy endpoints once. Returns how many records they had.
    fn round(&self) -> usize {
        self.let_in();
        let mut core = lock(&self.core);
        let now = Instant::now();
        core.handle_timer(now);
        let taken = core.round(now);
        self.leave(core);
        taken
    }

    /// A mutex is not fair: without this the next round would begin before a caller gets its turn.
    fn let_in(&self) {
        while self.callers.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
    }

    /// Tells what is to be told, and lets others have the switch.
    fn leave(&self, mut core: MutexGuard<'_, Switch>) {
        if core.must_tell() {
            ring(&self.events);
        }
        let bells = core.take_bells();
        drop(core);
        for bell in bells {
            bell.ring();
        }
    }

    fn run(&self) {
        let mut spin = Spin::default();
        let mut rounds = 0u32;
        while !self.stop.load(Ordering::Acquire) {
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(LOOK_EVERY) {
                self.look(0);
            }
            if rounds.is_multiple_of(DOZE_EVERY) {
                lock(&self.core).doze(DOZE_EVERY);
            }
            if self.round() > 0 {
                continue;
            }
            let mut looks = 0u32;
            let busy = spin.until(|| {
                looks += 1;
                self.round() > 0 || (looks.is_multiple_of(LOOK_EVERY) && self.look(0) > 0)
            });
            if busy {
                continue;
            }
            let millis = {
                self.let_in();
                let mut core = lock(&self.core);
                if core.doze(0) > 0 {
                    continue;
                }
                let millis = core.next_timer().map_or(-1, |at| {
                    let left = at.saturating_duration_since(Instant::now());
                    i32::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
                });
                self.asleep.store(true, Ordering::SeqCst);
                self.leave(core);
                millis
            };
            self.look(millis);
            self.asleep.store(false, Ordering::SeqCst);
        }
    }
}

impl Runner {
    /// Starts the thread.
    ///
    /// # Errors
    /// As epoll_create1(2), eventfd(2), pthread_create(3).
    pub fn start(core: Switch) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            core: Mutex::new(core),
            callers: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            // SAFETY: plain call.
            epoll: owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?,
            bell: eventfd()?,
            events: eventfd()?,
            failure: OnceLock::new(),
        });
        shared.watch(shared.bell.as_raw_fd(), BELL, libc::EPOLLIN)?;
        let worker = shared.clone();
        let thread = std::thread::Builder::new()
            .name("afbus-switch".to_owned())
            .spawn(move || {
                // Nothing is used afterwards that the panic may have left half done: the agent ends.
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| worker.run())) {
                    let _ = worker.failure.set(text_of(panic.as_ref()));
                    ring(&worker.events);
                }
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Does something with the switch between two rounds.
    pub fn with<R>(&self, action: impl FnOnce(&mut Switch) -> R) -> R {
        self.shared.callers.fetch_add(1, Ordering::AcqRel);
        let mut core = lock(&self.shared.core);
        self.shared.callers.fetch_sub(1, Ordering::AcqRel);
        let before = core.next_timer();
        let result = action(&mut core);
        if core.owes_trunks() {
            core.tell_trunks_later(Instant::now());
        }
        let wanted = core.has_active() || core.next_timer() != before;
        // It says so while it has the lock, and looks at both before.
        let asleep = self.shared.asleep.load(Ordering::SeqCst);
        self.shared.leave(core);
        if wanted && asleep {
            ring(&self.shared.bell);
        }
        result
    }

    /// Watches the line of an endpoint that was just connected.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn watch_line(&self, who: Ref, core: &Switch) -> io::Result<()> {
        let Some(line) = core.line_of(who) else {
            return Ok(());
        };
        let token = u64::from(who.slot) << 32 | u64::from(who.turn);
        self.shared.watch(
            line.as_raw_fd(),
            token,
            libc::EPOLLIN | libc::EPOLLET | libc::EPOLLRDHUP,
        )
    }

    /// A descriptor that is readable while there are events for Python.
    #[must_use]
    pub fn events_fd(&self) -> RawFd {
        self.shared.events.as_fd().as_raw_fd()
    }

    /// What the panic said that has ended the thread of the switch, if one has. [`Self::events_fd`] is readable then.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.shared.failure.get().map(String::as_str)
    }

    /// Makes [`Self::events_fd`] silent until the next event.
    pub fn silence(&self) {
        silence(&self.shared.events);
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        ring(&self.shared.bell);
        if let Some(thread) = self.thread.take() {
            // It has caught its panic, if that is how it ended.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::switch::Quota;

    impl Runner {
        /// Waits until a panic is told.
        pub fn wait_for_failure(&self) {
            ring(&self.shared.bell);
            let mut entry = libc::pollfd {
                fd: self.events_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one entry that lives for the call.
            let told = unsafe { libc::poll(&raw mut entry, 1, 10_000) };
            assert_eq!(told, 1, "a panic is told in time");
        }
    }

    #[test]
    fn d16_a_panic_of_the_thread_is_told_and_nobody_hangs() {
        let runner = Runner::start(Switch::new(Quota::default())).unwrap();
        assert_eq!(runner.failure(), None);
        runner.with(|core| core.fail = Some("a seat that is not there"));
        runner.wait_for_failure();
        assert_eq!(runner.failure(), Some("a seat that is not there"));
        // The switch can still be asked, and dropping the runner ends.
        runner.with(|core| core.add_bus(1, 512, [0; 16]));
    }
}
