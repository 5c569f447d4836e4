//! One link's lane: what the thread of the carrier moves between a switch and the link without asking anybody.
//!
//! The link's core (link/core.py) counts all that is sent and received, and so it gets the totals of what was moved here with
//! everything else that it gets. It says how far the lane may go, by the credit of the peer.
//!
//! Invariants:
//! 1. After [`Lane::detach`] no batch is taken from the switch and none is given to it, until the next [`Lane::attach`].
//! 2. No more is sent than the peer has given credit for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::{Bytes, BytesMut};

use super::bell::{Bell, LaneBell};
use super::frame::{HEADER, header};
use crate::runner::Runner;
use crate::trunk_wire::{Broken, RECORD_BYTES};

/// What a message costs beside its bytes (link/settings.py).
const MESSAGE_COST: u64 = 128;
/// A batch may be longer than what was asked for, by one record.
const BATCH_MAX: u64 = RECORD_BYTES as u64 + 32 * 1024;

/// Totals of what a lane has moved, in bytes on the stream and in cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Cost of what was sent.
    pub sent_cost: u64,
    /// Bytes of that.
    pub sent_bytes: u64,
    /// Cost of what came, and was read for good.
    pub received_cost: u64,
    /// Bytes of that.
    pub received_bytes: u64,
}

struct Attached {
    runner: Arc<Runner>,
    trunk: u64,
    bell: Arc<LaneBell>,
    /// Up to where the peer has given credit.
    limit: u64,
}

#[derive(Default)]
struct State {
    attached: Option<Attached>,
    moved: Moved,
}

/// What the thread of the carrier and the owner of a link share.
#[derive(Default)]
pub struct Lane {
    state: Mutex<State>,
    /// Bytes that wait for the owner of the link to take them.
    pub waiting: AtomicUsize,
}

impl Lane {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Totals until now.
    #[must_use]
    pub fn moved(&self) -> Moved {
        self.lock().moved
    }

    /// Moves batches of a trunk from now on, as far as `limit`. Whoever attached before is detached.
    pub fn attach(&self, runner: Arc<Runner>, trunk: u64, limit: u64, bell: Arc<Bell>) {
        self.detach();
        let mut state = self.lock();
        let bell = Arc::new(LaneBell::new(bell));
        runner.with(|core| core.set_lane_bell(trunk, Some(bell.clone())));
        state.attached = Some(Attached {
            runner,
            trunk,
            bell: bell.clone(),
            limit,
        });
        drop(state);
        bell.ring();
    }

    /// Moves nothing any more.
    pub fn detach(&self) {
        let mut state = self.lock();
        if let Some(old) = state.attached.take() {
            old.runner.with(|core| core.set_lane_bell(old.trunk, None));
        }
    }

    /// The peer has given more credit.
    pub fn allow(&self, limit: u64) {
        let mut state = self.lock();
        if let Some(attached) = &mut state.attached {
            attached.limit = attached.limit.max(limit);
            attached.bell.ring();
        }
    }

    /// Whether there may be something to send.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let state = self.lock();
        state.attached.as_ref().is_some_and(|a| a.bell.is_ready())
    }

    /// The next batch of at most about `most` bytes, in its frame and in parts; empty if there is none, or no credit for one.
    #[must_use]
    pub fn take(&self, most: usize) -> Vec<Bytes> {
        let mut state = self.lock();
        let State { attached, moved } = &mut *state;
        let Some(attached) = attached else {
            return Vec::new();
        };
        if moved.sent_cost + MESSAGE_COST + BATCH_MAX > attached.limit {
            // The next credit rings.
            attached.bell.take();
            return Vec::new();
        }
        attached.bell.take();
        let trunk = attached.trunk;
        let (mut parts, has_more) = attached.runner.with(|core| {
            core.trunk_mut(trunk).map_or((Vec::new(), false), |t| {
                (t.take_batch_behind(HEADER, most), t.has_more())
            })
        });
        let Some(first) = parts.first_mut() else {
            return parts;
        };
        if has_more {
            attached.bell.ring();
        }
        // Nobody else has the part with the header.
        let mut head = BytesMut::from(std::mem::take(first));
        let len = head.len() + parts.iter().map(Bytes::len).sum::<usize>() - HEADER;
        head[..HEADER].copy_from_slice(&header(len));
        parts[0] = head.freeze();
        moved.sent_bytes += (HEADER + len) as u64;
        moved.sent_cost += len as u64 + MESSAGE_COST;
        parts
    }

    /// Gives a batch of the peer to the switch. `None`: no switch is attached, so somebody else must take it.
    ///
    /// # Errors
    /// [`Broken`] as the switch says.
    pub fn give(&self, batch: &[u8]) -> Option<Result<(), Broken>> {
        let mut state = self.lock();
        let State { attached, moved } = &mut *state;
        let attached = attached.as_ref()?;
        moved.received_bytes += (HEADER + batch.len()) as u64;
        moved.received_cost += batch.len() as u64 + MESSAGE_COST;
        let now = Instant::now();
        let trunk = attached.trunk;
        Some(attached.runner.with(|core| core.inject(trunk, batch, now)))
    }

    /// Counts what waits for the owner of the link.
    pub fn wait(&self, bytes: usize) {
        self.waiting.fetch_add(bytes, Ordering::SeqCst);
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.detach();
    }
}
