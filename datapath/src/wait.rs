//! Adaptive waiting: how long it pays to look again and again before going to sleep.
//!
//! Invariants:
//! 1. The budget is learned from what came of earlier looks, and is zero on a machine with one processor.
//! 2. Every few looks others get the processor: with more waiters than processors, pure spinning would keep the one that is
//!    waited for from running. On two processors a round trip over three processes took 5 us this way, and 70 us without.
//! 3. A waiter that never gets anything by spinning stops doing it but for a rare probe, so idle endpoints cost nothing.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A wake-up of a sleeper on an idle processor of a virtual machine takes about this long; longer looks never pay.
const MAX_NS: u64 = 50_000;
const MIN_NS: u64 = 500;
/// One sleep in so many is preceded by a probe although spinning has not paid.
const PROBE_EVERY: u32 = 64;
/// Looks between two times that others get the processor, which costs a system call: a peer that runs answers within these.
const LOOKS: u32 = 64;
/// What was ready this soon is worth a glance that lets nobody else run.
const SOON_NS: u64 = 8_000;

fn processors() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Whether looking again and again can pay at all here: not with one processor, and not where `AFBUS_SPIN=0` says so.
fn may_spin() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| processors() > 1 && std::env::var_os("AFBUS_SPIN").is_none_or(|v| v != "0"))
}

/// What one waiter has learned.
#[derive(Debug, Clone)]
pub struct Spin {
    budget_ns: u64,
    enabled: bool,
    since_probe: u32,
}

impl Default for Spin {
    fn default() -> Self {
        Self {
            budget_ns: MAX_NS,
            enabled: may_spin(),
            since_probe: 0,
        }
    }
}

impl Spin {
    /// Never spins when `on` is false.
    pub fn enable(&mut self, on: bool) {
        self.enabled = on && may_spin();
    }

    /// Looks until `ready` or until it does not pay any more. Returns whether it was ready.
    pub fn until(&mut self, ready: impl FnMut() -> bool) -> bool {
        self.until_by(1, ready)
    }

    /// The same, for one thing that another process does without a third: others get the processor every few looks only.
    pub fn until_peer(&mut self, ready: impl FnMut() -> bool) -> bool {
        self.until_by(LOOKS, ready)
    }

    /// Looks for as long as it would cost to let other threads run meanwhile, if it was ready that soon of late.
    pub fn glance(&self, mut ready: impl FnMut() -> bool) -> bool {
        if !self.enabled || self.budget_ns > SOON_NS || self.budget_ns < MIN_NS {
            return false;
        }
        (0..LOOKS).any(|_| {
            std::hint::spin_loop();
            ready()
        })
    }

    fn until_by(&mut self, looks: u32, mut ready: impl FnMut() -> bool) -> bool {
        if ready() {
            return true;
        }
        if !self.enabled {
            return false;
        }
        let mut budget = self.budget_ns;
        if budget < MIN_NS {
            self.since_probe += 1;
            if self.since_probe < PROBE_EVERY {
                return false;
            }
            self.since_probe = 0;
            budget = MAX_NS / 4;
        }
        let begin = Instant::now();
        loop {
            for look in 1u32..=32.max(looks) {
                if look.is_multiple_of(looks) {
                    std::thread::yield_now();
                } else {
                    std::hint::spin_loop();
                }
                if ready() {
                    let took = begin.elapsed().as_nanos() as u64;
                    // Twice what was needed, slowly approached: enough for the next time, and not more.
                    self.budget_ns = ((self.budget_ns * 7 + took * 2 + MIN_NS * 2) / 8).min(MAX_NS);
                    return true;
                }
            }
            if begin.elapsed() >= Duration::from_nanos(budget) {
                self.budget_ns = self.budget_ns / 2 + self.budget_ns / 4;
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r22_spinning_that_never_pays_is_given_up() {
        let mut spin = Spin::default();
        for _ in 0..64 {
            assert!(!spin.until(|| false));
        }
        assert!(spin.budget_ns < MIN_NS || !spin.enabled);
        let mut looks = 0;
        spin.since_probe = 0;
        spin.until(|| {
            looks += 1;
            false
        });
        assert_eq!(looks, 1, "one look, no spinning");
    }
}
