//! All lanes that end at an endpoint, by who writes into them (docs/internals-lanes.md).
//!
//! Invariants:
//! 1. What one sender has written into several lanes is read in its order (`merge`).
//! 2. A lane that ended, for the agent or because it was spoilt, is forgotten as soon as nothing of it is to be read.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::client::Incoming;
use crate::lane_in::{LaneIn, Opening, Writer};
use crate::memory::Segment;
use crate::merge::{Seen, oldest};
use crate::wait;
use crate::waker::Ear;

/// The lanes of one sender.
struct Origin {
    number: u64,
    /// The newest lane that this end knows.
    newest: u64,
    lanes: Vec<LaneIn>,
}

impl Origin {
    /// The index of the lane that has the oldest record; and the first that was found spoilt just now.
    fn first(&mut self) -> (Option<usize>, Option<usize>) {
        let mut spoilt = None;
        // One that ended has nothing that is newer than what is in a lane that began later, nor has anything that is older than that.
        let is_ending =
            |lane: &mut LaneIn| lane.is_told() && matches!(lane.see(None), Ok(Seen::Record(_)));
        let newest = if self.lanes.iter_mut().any(is_ending) {
            None
        } else {
            Some(self.newest)
        };
        let first = oldest(self.lanes.len(), |index| {
            self.lanes[index].see(newest).unwrap_or_else(|_| {
                spoilt.get_or_insert(index);
                Seen::Nothing
            })
        });
        (first, spoilt)
    }
}

/// All lanes that end here.
#[derive(Default)]
pub struct LanesIn {
    origins: Vec<Origin>,
    /// What is slept on while there are lanes.
    ear: Option<Ear>,
    /// The place of the record that was shown last.
    shown: (usize, usize),
}

impl LanesIn {
    /// How many senders have lanes here.
    #[must_use]
    pub fn senders(&self) -> usize {
        self.origins.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.origins.is_empty()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &LaneIn> {
        self.origins.iter().flat_map(|origin| &origin.lanes)
    }

    /// The same, to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut LaneIn> {
        self.origins.iter_mut().flat_map(|origin| &mut origin.lanes)
    }

    fn place(&self, number: u64) -> Option<(usize, usize)> {
        let (origin, lane) = self.shown;
        let shown = self.origins.get(origin).and_then(|o| o.lanes.get(lane));
        if shown.is_some_and(|lane| lane.number == number) {
            return Some(self.shown);
        }
        self.origins.iter().enumerate().find_map(|(place, origin)| {
            let lane = origin.lanes.iter().position(|lane| lane.number == number)?;
            Some((place, lane))
        })
    }

    /// The lane with this number.
    #[must_use]
    pub fn lane(&self, number: u64) -> Option<&LaneIn> {
        let (origin, lane) = self.place(number)?;
        Some(&self.origins[origin].lanes[lane])
    }

    /// The same, to change it.
    pub fn lane_mut(&mut self, number: u64) -> Option<&mut LaneIn> {
        let (origin, lane) = self.place(number)?;
        Some(&mut self.origins[origin].lanes[lane])
    }

    /// The memory of a lane.
    #[must_use]
    pub fn data(&self, number: u64) -> Option<&Arc<Segment>> {
        self.lane(number).map(|lane| &lane.inlet.ring.memory().data)
    }

    /// The oldest record of the n-th sender; or the number of a lane of it that was found spoilt, and is gone.
    ///
    /// # Errors
    /// That number.
    pub fn peek(&mut self, sender: usize) -> Result<Option<Incoming>, u64> {
        let Some(origin) = self.origins.get_mut(sender) else {
            return Ok(None);
        };
        let (first, spoilt) = origin.first();
        if let Some(spoilt) = spoilt {
            let number = origin.lanes[spoilt].number;
            self.remove(number);
            return Err(number);
        }
        let Some(lane) = first else {
            return Ok(None);
        };
        self.shown = (sender, lane);
        let lane = &origin.lanes[lane];
        Ok(lane.front().map(|front| Incoming {
            lane: lane.number,
            pos: front.pos,
            body: front.body,
            in_arena: front.in_arena,
            header: front.header,
        }))
    }

    /// Takes a lane that is new. `false` when it cannot be read, for want of descriptors or memory.
    #[must_use]
    pub fn admit(
        &mut self,
        line: &OwnedFd,
        opening: &Opening,
        fds: Vec<OwnedFd>,
        writer: Writer,
        is_hung_up: bool,
    ) -> bool {
        let made = <[OwnedFd; 4]>::try_from(fds)
            .ok()
            .and_then(|fds| LaneIn::attach(opening, fds, writer).ok());
        if self.ear.is_none() {
            self.ear = Ear::new(line.as_fd()).ok();
        }
        let made = made.filter(|lane| {
            let ear = self.ear.as_ref();
            ear.is_some_and(|ear| ear.add(&lane.bell).is_ok())
        });
        let known = self.origins.iter().position(|o| o.number == opening.origin);
        if let Some(known) = known {
            // Also if it cannot be read: whatever is on it is lost, and that is told.
            self.origins[known].newest = opening.number;
        }
        let Some(mut lane) = made else {
            return false;
        };
        lane.sleep_end();
        if is_hung_up {
            lane.leave();
        }
        let known = known.unwrap_or_else(|| {
            self.origins.push(Origin {
                number: opening.origin,
                newest: opening.number,
                lanes: Vec::new(),
            });
            self.origins.len() - 1
        });
        self.origins[known].lanes.push(lane);
        true
    }

    /// The agent has closed a lane at this position. Returns whether all of it was read, and it is gone.
    pub fn close(&mut self, number: u64, end: u64) -> bool {
        let Some(lane) = self.lane_mut(number) else {
            return true;
        };
        lane.close_at(end);
        // The agent has closed it already: a rule that is broken need not be told any more.
        if matches!(lane.see(None), Ok(Seen::Record(_))) {
            return false;
        }
        lane.settle();
        self.remove(number);
        true
    }

    fn remove(&mut self, number: u64) {
        let Some((origin, lane)) = self.place(number) else {
            return;
        };
        let gone = self.origins[origin].lanes.swap_remove(lane);
        if let Some(ear) = &self.ear {
            ear.remove(&gone.bell);
        }
        if self.origins[origin].lanes.is_empty() {
            self.origins.swap_remove(origin);
        }
    }

    /// Closes all from this side, as the agent is gone.
    pub fn leave(&mut self) {
        self.iter_mut().for_each(LaneIn::leave);
    }

    /// Gives room back to all writers.
    pub fn settle(&mut self) {
        self.iter_mut().for_each(LaneIn::settle);
    }

    /// Whether something waits on any of them, as far as a glance can tell.
    #[must_use]
    pub fn glance(&self) -> bool {
        self.iter().any(LaneIn::glance)
    }

    /// Whether the agent is about to close any of them.
    #[must_use]
    pub fn is_undecided(&self) -> bool {
        self.iter().any(LaneIn::is_undecided)
    }

    /// Lets all writers wake this end in a certain way. Returns whether nothing waits.
    #[must_use]
    pub fn sleep_begin(&self, how: u32) -> bool {
        let mut idle = true;
        for lane in self.iter() {
            idle &= lane.sleep_begin(how);
        }
        idle
    }

    /// This end is awake again.
    pub fn sleep_end(&self) {
        self.iter().for_each(LaneIn::sleep_end);
    }

    /// Sleeps on the line and all bells; returns whether the line has something. `None` where there is no lane.
    #[must_use]
    pub fn sleep(&mut self, timeout: Option<Duration>) -> Option<bool> {
        if self.is_empty() {
            return None;
        }
        let on_line = self.ear.as_mut()?.wait(timeout);
        if let Some(ago) = self.iter().find_map(LaneIn::rung) {
            wait::woke_after(ago);
        }
        Some(on_line)
    }
}
