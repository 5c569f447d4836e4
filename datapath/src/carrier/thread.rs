//! The thread of the carrier: one socket, all connections, and what the owner wants.
//!
//! Invariants:
//! 1. Before the thread sleeps it has said so and looked once more: no command, batch or datagram waits unseen.
//! 2. A panic ends the thread, and is told.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use quinn_proto::{ConnectionHandle, Transmit};

use super::Shared;
use super::endpoint::Endpoint;
use super::event::{Command, Ending, Event};
use super::lane::Moved;
use super::socket::{PIECES, Udp};
use crate::wait::Spin;

/// Calls of the socket in one turn, and calls of one connection to it; then others get their turn.
const READS: usize = 2;
const SENDS: usize = 16;

/// What the thread has.
pub(super) struct Thread {
    shared: Arc<Shared>,
    udp: Udp,
    endpoint: Endpoint,
    events: Vec<Event>,
    out: Vec<u8>,
    /// What the kernel has no room for: nothing else goes before it.
    unsent: Option<(Transmit, Vec<u8>)>,
    is_over: bool,
    is_killed: bool,
}

impl Thread {
    pub(super) fn new(shared: Arc<Shared>, udp: Udp, endpoint: Endpoint) -> Self {
        Self {
            shared,
            udp,
            endpoint,
            events: Vec::new(),
            out: Vec::new(),
            unsent: None,
            is_over: false,
            is_killed: false,
        }
    }

    pub(super) fn run(&mut self) {
        let mut spin = Spin::default();
        while !self.is_over {
            if self.turn() {
                continue;
            }
            if spin.until(|| self.turn()) || self.is_over {
                continue;
            }
            self.shared.bell.doze();
            if !self.turn() && !self.is_over {
                self.sleep();
            }
            self.shared.bell.wake();
        }
        if !self.is_killed {
            self.serve(Instant::now());
        }
    }

    /// Does what there is to do; returns whether there was anything.
    fn turn(&mut self) -> bool {
        let now = Instant::now();
        let has_commands = self.obey(now);
        if self.is_over {
            return true;
        }
        let has_received = self.receive(now);
        self.endpoint.handle_timers(now);
        if self.shared.bell.take_look() {
            let ready = self.endpoint.links.values().filter(|l| l.is_ready());
            self.endpoint.touched.extend(ready.map(|l| l.handle.0));
        }
        let has_served = self.serve(now);
        has_commands || has_received || has_served
    }

    fn receive(&mut self, now: Instant) -> bool {
        let Self {
            udp,
            endpoint,
            events,
            ..
        } = self;
        let mut has_any = false;
        let mut answers = Vec::new();
        for _ in 0..READS {
            let count = udp.receive(|piece| {
                endpoint.receive(piece, now, events, |transmit, bytes| {
                    answers.push((clone(transmit), bytes.to_vec()));
                });
            });
            has_any |= count > 0;
            if count < PIECES {
                break;
            }
        }
        for (transmit, bytes) in answers {
            self.udp.send(&transmit, &bytes);
        }
        has_any
    }

    // ---- what the owner wants --------------------------------------------------------------------------------------

    fn obey(&mut self, now: Instant) -> bool {
        if !self.shared.has_commands.swap(false, Ordering::SeqCst) {
            return false;
        }
        let commands = std::mem::take(&mut *super::lock(&self.shared.commands));
        for command in commands {
            self.do_one(command, now);
        }
        true
    }

    fn do_one(&mut self, command: Command, now: Instant) {
        let connection = match &command {
            Command::Dial(number, peer) => {
                let (number, peer) = (*number, *peer);
                match self.udp.seen(peer) {
                    Some(peer) => self.endpoint.dial(number, peer, now, &mut self.events),
                    None => self.events.push(Event::Ended {
                        connection: number,
                        ending: Ending::Here,
                        code: 0,
                        text: "it cannot be reached from an IPv4 address".to_owned(),
                        moved: Moved::default(),
                    }),
                }
                return;
            }
            Command::Renew(chain, key) => {
                // Whoever says it has tried the key before.
                let _ = self.endpoint.renew(chain.clone(), key.clone());
                return;
            }
            Command::Stop => {
                self.is_over = true;
                return;
            }
            Command::Kill => {
                self.is_over = true;
                self.is_killed = true;
                return;
            }
            Command::Write { connection, .. } | Command::Cut { connection, .. } => *connection,
            Command::Ping(connection, ..)
            | Command::Proceed(connection)
            | Command::ReportAll(connection) => *connection,
        };
        let Some(place) = self.endpoint.places.get(&connection).copied() else {
            return;
        };
        let Some(link) = self.endpoint.links.get_mut(&place) else {
            return;
        };
        match command {
            Command::Write {
                stream, data, end, ..
            } => link.write(stream, data, end),
            Command::Ping(_, number, is_urgent) => link.ping(number, is_urgent, now),
            Command::Proceed(_) => link.incoming.proceed(),
            Command::ReportAll(_) => link.incoming.report_all(&mut self.events),
            Command::Cut { code, text, .. } => link.cut(code, text, now),
            Command::Dial(..) | Command::Renew(..) | Command::Stop | Command::Kill => {}
        }
        self.endpoint.touched.insert(place.0);
    }

    // ---- connections -----------------------------------------------------------------------------------------------

    /// Serves all connections with something to do; returns whether there were any.
    fn serve(&mut self, now: Instant) -> bool {
        if !self.send_rest() {
            self.tell();
            return false;
        }
        let touched = std::mem::take(&mut self.endpoint.touched);
        let has_any = !touched.is_empty();
        for place in touched {
            let handle = ConnectionHandle(place);
            let Some(link) = self.endpoint.links.get_mut(&handle) else {
                continue;
            };
            let has_more = link.serve(&mut self.events);
            let is_done = self.transmit(handle, now);
            if has_more || !is_done {
                self.endpoint.touched.insert(place);
            }
            self.endpoint.settle(handle);
            self.endpoint.arm(handle);
        }
        self.tell();
        has_any
    }

    /// Sends what a connection has; returns whether that is all.
    fn transmit(&mut self, handle: ConnectionHandle, now: Instant) -> bool {
        let Some(link) = self.endpoint.links.get_mut(&handle) else {
            return true;
        };
        for _ in 0..SENDS {
            if self.unsent.is_some() {
                return false;
            }
            let segments = self.udp.segments(link.quic.current_mtu());
            self.out.clear();
            let Some(transmit) = link.quic.poll_transmit(now, segments, &mut self.out) else {
                return true;
            };
            if !self.udp.send(&transmit, &self.out[..transmit.size]) {
                self.unsent = Some((transmit, self.out.clone()));
            }
        }
        false
    }

    fn send_rest(&mut self) -> bool {
        if let Some((transmit, bytes)) = self.unsent.take()
            && !self.udp.send(&transmit, &bytes[..transmit.size])
        {
            self.unsent = Some((transmit, bytes));
            return false;
        }
        true
    }

    /// Tells the owner.
    fn tell(&mut self) {
        if !self.events.is_empty() {
            self.shared.tell(&mut self.events);
        }
    }

    // ---- time ------------------------------------------------------------------------------------------------------

    fn sleep(&self) {
        let now = Instant::now();
        let left = self
            .endpoint
            .next_timer()
            .map(|when| when.saturating_duration_since(now));
        if left == Some(Duration::ZERO) {
            return;
        }
        let wait = left.map(|left| libc::timespec {
            tv_sec: left.as_secs() as libc::time_t,
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut events = libc::POLLIN;
        if self.unsent.is_some() {
            events |= libc::POLLOUT;
        }
        let mut entries = [
            (self.udp.fd(), events),
            (self.shared.bell.fd(), libc::POLLIN),
        ]
        .map(|(fd, events)| libc::pollfd {
            fd,
            events,
            revents: 0,
        });
        let wait = wait.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: two entries and a time that live for the call; without a time it waits for ever. Signals stay as they are.
        unsafe { libc::ppoll(entries.as_mut_ptr(), 2, wait, std::ptr::null()) };
    }
}

fn clone(transmit: &Transmit) -> Transmit {
    Transmit {
        destination: transmit.destination,
        ecn: transmit.ecn,
        size: transmit.size,
        segment_size: transmit.segment_size,
        src_ip: transmit.src_ip,
    }
}
