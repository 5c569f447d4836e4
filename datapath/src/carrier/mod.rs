//! Links between nodes over QUIC, from the lane of the switch to the socket: a thread of its own, without Python.
//!
//! ```text
//! switch -- batches -- lane --.                                  .-- socket, one for all links of a node
//!                             link: streams, in quinn-proto -----'
//! Python -- everything else --'  (link/native.py, the same core as over aioquic)
//! ```
//!
//! What goes over the wire is the same as over aioquic. Nothing is decided here: who a peer is, Python judges within the
//! handshake; what a link may send and when it ends, its core in Python says.

mod bell;
mod congestion;
mod connection;
mod endpoint;
mod event;
mod frame;
mod incoming;
mod lane;
mod socket;
mod thread;
mod tls;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

pub use bell::LaneBell;
pub use endpoint::Settings;
pub use event::{Command, Ending, Event};
pub use lane::Moved;
pub use tls::{Caller, Judge, Proof, Trust};

use crate::runner::{Runner, eventfd, ring, silence, text_of};
use bell::Bell;
use endpoint::{Endpoint, Lanes};
use lane::Lane;
use socket::Udp;
use thread::Thread;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic under one of these locks is a bug that its thread has reported.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Free memory of a thread that is kept, and what is given back in any case.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: libc::c_int = 8 << 20;
#[cfg(target_env = "gnu")]
const LARGE_BYTES: libc::c_int = 1 << 20;

/// What the thread and its owner share.
struct Shared {
    bell: Arc<Bell>,
    commands: Mutex<Vec<Command>>,
    has_commands: AtomicBool,
    events: Mutex<Vec<Event>>,
    told: OwnedFd,
    lanes: Arc<Lanes>,
    failure: OnceLock<String>,
}

impl Shared {
    /// Tells the owner, in this order.
    fn tell(&self, news: &mut Vec<Event>) {
        let mut events = lock(&self.events);
        let was_empty = events.is_empty();
        events.append(news);
        drop(events);
        if was_empty {
            ring(&self.told);
        }
    }
}

/// Lets the allocator keep some memory that is free: batches are as large as what it would give back to the kernel at once, and
/// then a third of the time goes into pages that come and go.
fn keep_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: plain calls, which change limits alone.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES);
    }
}

/// A running carrier.
pub struct Carrier {
    shared: Arc<Shared>,
    numbers: Arc<AtomicU64>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl Carrier {
    /// Binds, and starts the thread; it accepts from now on.
    ///
    /// # Errors
    /// As bind(2), eventfd(2), pthread_create(3).
    pub fn start(address: SocketAddr, trust: Trust, settings: Settings) -> io::Result<Self> {
        keep_memory();
        let udp = Udp::bind(address)?;
        let address = udp.address()?;
        let shared = Arc::new(Shared {
            bell: Arc::new(Bell::new()?),
            commands: Mutex::default(),
            has_commands: AtomicBool::new(false),
            events: Mutex::default(),
            told: eventfd()?,
            lanes: Arc::default(),
            failure: OnceLock::new(),
        });
        let numbers = Arc::new(AtomicU64::new(1));
        let lanes = shared.lanes.clone();
        let endpoint = Endpoint::new(trust, settings, udp.may_fragment(), numbers.clone(), lanes);
        let worker = shared.clone();
        let thread = std::thread::Builder::new()
            .name("afbus-carrier".to_owned())
            .spawn(move || {
                let mut thread = Thread::new(worker.clone(), udp, endpoint);
                // Nothing is used afterwards that the panic may have left half done: the agent ends.
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| thread.run())) {
                    let _ = worker.failure.set(text_of(panic.as_ref()));
                    ring(&worker.told);
                }
            })?;
        Ok(Self {
            shared,
            numbers,
            address,
            thread: Some(thread),
        })
    }

    /// The bound address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A descriptor that is readable while there are events.
    #[must_use]
    pub fn events_fd(&self) -> RawFd {
        self.shared.told.as_raw_fd()
    }

    /// What the panic said that has ended the thread, if one has.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.shared.failure.get().map(String::as_str)
    }

    /// A number for a connection that is to be dialed.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Says what is to be done; in this order.
    pub fn say(&self, command: Command) {
        lock(&self.shared.commands).push(command);
        self.shared.has_commands.store(true, Ordering::SeqCst);
        self.shared.bell.ring();
    }

    /// What has happened since the last call.
    #[must_use]
    pub fn take_events(&self) -> Vec<Event> {
        silence(&self.shared.told);
        let events = std::mem::take(&mut *lock(&self.shared.events));
        let mut has_room = false;
        for event in &events {
            if let Event::Data { bytes, lane, .. } = event {
                lane.waiting.fetch_sub(bytes.len(), Ordering::SeqCst);
                has_room = true;
            }
        }
        if has_room {
            self.shared.bell.ring_for_links();
        }
        events
    }

    fn lane(&self, connection: u64) -> Option<Arc<Lane>> {
        lock(&self.shared.lanes).get(&connection).cloned()
    }

    /// Moves batches between a link and a trunk of a switch, as far as the peer's credit goes. Returns whether it does.
    pub fn attach(&self, connection: u64, runner: Arc<Runner>, trunk: u64, limit: u64) -> bool {
        let Some(lane) = self.lane(connection) else {
            return false;
        };
        lane.attach(runner, trunk, limit, self.shared.bell.clone());
        true
    }

    /// Moves nothing any more; returns what was moved in all.
    #[must_use]
    pub fn detach(&self, connection: u64) -> Moved {
        self.lane(connection).map_or_else(Moved::default, |lane| {
            lane.detach();
            lane.moved()
        })
    }

    /// The peer has given more credit.
    pub fn allow(&self, connection: u64, limit: u64) {
        if let Some(lane) = self.lane(connection) {
            lane.allow(limit);
        }
    }

    /// Ends the thread; `kill`: without a word to any peer.
    pub fn stop(&mut self, kill: bool) {
        if let Some(thread) = self.thread.take() {
            self.say(if kill { Command::Kill } else { Command::Stop });
            // It has caught its panic, if that is how it ended.
            let _ = thread.join();
        }
        lock(&self.shared.lanes).clear();
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.stop(true);
    }
}
