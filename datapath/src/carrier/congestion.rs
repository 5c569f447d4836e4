//! Congestion control: quinn's, and what it hears of packets that have arrived.
//!
//! A link is tried by pings, and quinn does not say when one was confirmed. Its controller does hear when each packet that was
//! confirmed had been sent: a ping that went before one of those has arrived. And who hears nothing for long must be let send
//! a packet now and then, whatever waits for confirmation (case 13).

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory, CubicConfig};

/// The datagram for which the usual window at first is meant.
const MTU: u64 = 1472;

/// What is known of one connection's packets.
pub struct Arrivals {
    base: Instant,
    /// Nanoseconds from `base` to when the youngest packet was sent that is confirmed, plus 1; 0 if none is.
    sent: AtomicU64,
    /// Bytes that may be in flight above the window.
    spare: AtomicU64,
}

impl Arrivals {
    /// Nothing has arrived.
    #[must_use]
    pub fn new(base: Instant) -> Self {
        Self {
            base,
            sent: AtomicU64::new(0),
            spare: AtomicU64::new(0),
        }
    }

    /// Whether something has arrived that was sent then or later.
    #[must_use]
    pub fn reach(&self, when: Instant) -> bool {
        let when = when.saturating_duration_since(self.base).as_nanos() as u64;
        self.sent.load(Ordering::Relaxed) > when
    }

    /// Lets one more packet go.
    pub fn spare(&self, bytes: u64) {
        self.spare.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Makes controllers for one connection.
pub struct Factory(pub Arc<Arrivals>);

impl ControllerFactory for Factory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let mut config = CubicConfig::default();
        // Ten datagrams, also of the large ones (RFC 9002, 7.2, has fewer of those).
        config.initial_window(10 * u64::from(current_mtu).max(MTU));
        Box::new(Watched {
            inner: Arc::new(config).build(now, current_mtu),
            arrivals: self.0.clone(),
        })
    }
}

struct Watched {
    inner: Box<dyn Controller>,
    arrivals: Arc<Arrivals>,
}

impl Controller for Watched {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        let when = sent.saturating_duration_since(self.arrivals.base);
        self.arrivals
            .sent
            .fetch_max(when.as_nanos() as u64 + 1, Ordering::Relaxed);
        self.arrivals.spare.store(0, Ordering::Relaxed);
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.inner
            .on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.inner
            .on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window() + self.arrivals.spare.load(Ordering::Relaxed)
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            inner: self.inner.clone_box(),
            arrivals: self.arrivals.clone(),
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
