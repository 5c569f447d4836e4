//! Adaptive waiting: how long it pays to look again and again before going to sleep.
//!
//! Waiting is a wager. Who looks pays processor time; who sleeps pays what it takes to be woken, and so does its peer. [`Wager`]
//! keeps the account from what came of earlier waits, and is told all times; [`Spin`] looks, and has the clock.
//!
//! Invariants:
//! 1. No wait looks for longer than two wake-ups take, so looking is at most so much worse than sleeping.
//! 2. Looking goes on only while it has earned more than it has cost. It is tried again only after sleeps that were so short that
//!    looking might have caught them, and ever more seldom where it does not: idle endpoints cost nothing.
//! 3. Every few looks others get the processor, so the one that is waited for can run: at once where that was what helped of late.
//!    When it takes long until the processor comes back, others need it more, and the wait goes to sleep.

use std::ops::RangeInclusive;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// What it takes to wake a sleeper, in ns, until it is known: on an idle processor of a virtual machine.
const WAKE_NS: u32 = 50_000;
/// What it can be believed to take. Who was called before it slept is awake sooner, and who has to wait for a processor later.
const WAKES_NS: RangeInclusive<u32> = 2_000..=100_000;
/// So much of other work at least comes with a wake-up on either side.
const LEAST_NS: u32 = 5_000;
/// What is spent by letting others run when that did not help: a system call, or some of them.
const YIELD_NS: u64 = 5_000;
/// Back sooner than this, the processor was used by nobody else meanwhile.
const SWITCH_NS: u64 = 1_000;
/// Away for longer than this, the processor was used by somebody who is not waited for.
const CROWDED_NS: u64 = 50_000;
/// Looks between two times that others get the processor, which costs a system call.
const LOOKS: u32 = 64;
/// What came this soon of late is worth a glance that lets nobody else run.
const SOON_NS: u64 = 4_000;
/// The most near waits from one trial to the next.
const TRIAL_SELDOM: u32 = 64;
/// Waits that begin by letting others run, until one looks first whether the peer has got a processor of its own.
const YIELDS: u32 = 64;

/// How to wait this time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// How long to look, in ns; 0: let others run once.
    budget: u64,
    /// Others get the processor before the first look.
    yields_first: bool,
    is_trial: bool,
}

impl Plan {
    /// Whether to leave the processor to others, after one of them has had it for so long, and some have had so many turns.
    fn is_crowded(&self, away: u64, turns: u32) -> bool {
        // A peer on this processor needs one turn. Where a third wants it too, all of them take turns for nothing.
        away > CROWDED_NS || (self.yields_first && turns > 1)
    }
}

/// The account of one waiter. All times are in ns, on any clock that does not go back.
#[derive(Debug, Clone)]
struct Wager {
    /// Without looking: a wait may only let others run.
    is_still: bool,
    /// What a wake-up takes.
    wake: u64,
    /// What looking has earned: waiting saved, less time spent.
    credit: u64,
    /// How long it took of late until something came, while looking.
    usual: u64,
    /// When the last wait began, if looking did not end it.
    begun: Option<u64>,
    /// Sleeps that looking might have caught, since the last trial.
    near: u32,
    /// How many of them are worth a trial.
    trial_after: u32,
    /// Waits left that let others run first.
    yields_first: u32,
}

impl Wager {
    fn new(is_still: bool, wake: u32) -> Self {
        let wake = u64::from(wake);
        Self {
            is_still,
            wake,
            // Enough to fail twice.
            credit: 4 * wake,
            usual: wake,
            begun: None,
            near: 0,
            trial_after: 1,
            yields_first: 0,
        }
    }

    /// A wait begins. `None`: it had better sleep at once.
    fn begin(&mut self, now: u64) -> Option<Plan> {
        // Where both sides sleep, a wait lasts for two wake-ups and what is done in between.
        let before = self.begun.replace(now);
        if before.is_some_and(|at| now.saturating_sub(at) <= 3 * self.wake) {
            self.near = self.near.saturating_add(1);
        }
        let is_trial = self.credit == 0;
        if is_trial {
            if self.near < self.trial_after {
                return None;
            }
            self.near = 0;
            self.trial_after = (2 * self.trial_after).min(TRIAL_SELDOM);
        }
        let budget = match (self.is_still, is_trial) {
            (true, _) => 0,
            // A peer that sleeps is woken, and answers, in little more than a wake-up.
            (false, true) => self.wake + self.wake / 2,
            // That, or the same after a moment in which the peer could not run.
            (false, false) => 2 * self.wake,
        };
        let yields_first = self.is_still || self.yields_first > 0;
        self.yields_first = self.yields_first.saturating_sub(1);
        Some(Plan {
            budget,
            yields_first,
            is_trial,
        })
    }

    /// It came, so long after the wait began; by letting others run, or while looking.
    fn found(&mut self, plan: Plan, took: u64, by_yield: bool) {
        self.begun = None;
        self.usual = (7 * self.usual + took) / 8;
        if plan.is_trial {
            // A peer that had to be woken for it is awake now, and will be quicker.
            self.credit = self.wake;
        }
        self.credit += self.wake;
        self.credit = self.credit.saturating_sub(took.min(4 * self.wake));
        self.cap();
        match (by_yield, plan.yields_first) {
            (true, false) => self.yields_first = YIELDS,
            (false, _) => self.yields_first = 0,
            (true, true) => {}
        }
    }

    /// It came at a glance.
    fn caught(&mut self) {
        self.credit += self.wake;
        self.cap();
    }

    fn cap(&mut self) {
        let most = 16 * self.wake;
        if self.credit >= most {
            self.credit = most;
            self.trial_after = 1;
        }
    }

    /// It did not come in the time that was spent, and the wait goes to sleep.
    fn gave_up(&mut self, spent: u64) {
        self.credit = self.credit.saturating_sub(spent.min(4 * self.wake));
        self.yields_first /= 2;
    }

    /// Whether things came so quickly of late that it is worth no system call to wait for them.
    fn is_quick(&self) -> bool {
        !self.is_still && self.credit > 0 && self.yields_first == 0 && self.usual <= SOON_NS
    }
}

/// Whether looking can pay at all here: not with one processor, and not where `AFBUS_SPIN=0` says so.
pub(crate) fn may_look() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| {
        // Those of the machine: who may use one of them only, may wait for somebody on another.
        // SAFETY: plain call.
        let processors = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
        processors > 1 && std::env::var_os("AFBUS_SPIN").is_none_or(|v| v != "0")
    })
}

/// Nanoseconds on a clock that all processes of a host have.
#[must_use]
pub fn clock() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a timespec that lives for the call, which cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What a wake-up takes on this machine, as of late.
static WAKE: AtomicU32 = AtomicU32::new(WAKE_NS);

/// What a wake-up takes, after one that took so long.
fn learned(wake: u32, took: u32) -> u32 {
    if WAKES_NS.contains(&took) {
        (wake - wake / 8 + took / 8).max(LEAST_NS)
    } else {
        wake
    }
}

/// This process woke up so many ns after another had called it, by what that one says: it can lie, within what is believed.
pub fn woke_after(ns: u32) {
    // Of two threads that learn at once one may be forgotten.
    WAKE.store(learned(WAKE.load(Ordering::Relaxed), ns), Ordering::Relaxed);
}

/// One waiter.
#[derive(Debug, Clone)]
pub struct Spin {
    wager: Wager,
}

impl Default for Spin {
    fn default() -> Self {
        Self {
            wager: Wager::new(!may_look(), WAKE.load(Ordering::Relaxed)),
        }
    }
}

impl Spin {
    /// Looks until `ready` or until it does not pay any more. Returns whether it was ready.
    pub fn until(&mut self, ready: impl FnMut() -> bool) -> bool {
        self.until_by(1, ready)
    }

    /// The same, for one thing that another process does without a third: others get the processor every few looks only.
    pub fn until_peer(&mut self, ready: impl FnMut() -> bool) -> bool {
        self.until_by(LOOKS, ready)
    }

    /// Looks for as long as it would cost to let other threads run meanwhile, if it was ready that soon of late.
    pub fn glance(&mut self, mut ready: impl FnMut() -> bool) -> bool {
        if !self.wager.is_quick() {
            return false;
        }
        let found = (0..LOOKS).any(|_| {
            std::hint::spin_loop();
            ready()
        });
        if found {
            self.wager.caught();
        }
        found
    }

    fn until_by(&mut self, looks: u32, mut ready: impl FnMut() -> bool) -> bool {
        if ready() {
            return true;
        }
        self.wager.wake = WAKE.load(Ordering::Relaxed).into();
        let begin = clock();
        let Some(plan) = self.wager.begin(begin) else {
            return false;
        };
        let mut now = begin;
        let mut turns = 0;
        let mut must_yield = plan.yields_first;
        loop {
            if must_yield {
                std::thread::yield_now();
                let before = std::mem::replace(&mut now, clock());
                if ready() {
                    let by_yield = now - before >= SWITCH_NS;
                    self.wager.found(plan, now - begin, by_yield);
                    return true;
                }
                let away = now - before;
                turns += u32::from(looks > 1 && away >= SWITCH_NS);
                if plan.is_crowded(away, turns) || now - begin >= plan.budget {
                    self.wager.gave_up((now - begin).max(YIELD_NS));
                    return false;
                }
            }
            must_yield = true;
            for _ in 1..looks {
                std::hint::spin_loop();
                if ready() {
                    let took = clock() - begin;
                    self.wager.found(plan, took, false);
                    return true;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WAKE: u64 = WAKE_NS as u64;
    /// What a peer does between a message and its answer.
    const THINK: u64 = 500;

    /// A waiter, and since when it waits how.
    struct Side {
        wager: Wager,
        since: u64,
        plan: Option<Plan>,
    }

    impl Side {
        fn wait(&mut self, now: u64) {
            self.since = now;
            self.plan = self.wager.begin(now);
        }

        /// Something comes; returns when this side runs.
        fn hear(&mut self, now: u64, wake: u64) -> u64 {
            let Some(plan) = self.plan else {
                return now + wake;
            };
            let took = now - self.since;
            if took <= plan.budget {
                self.wager.found(plan, took, false);
                return now;
            }
            self.wager.gave_up(plan.budget);
            now + wake
        }
    }

    /// What a waiter spends on looking, of all the time, when something comes every `period`.
    fn share(period: u64, count: u64) -> f64 {
        let mut side = Side {
            wager: Wager::new(false, WAKE_NS),
            since: 0,
            plan: None,
        };
        let (mut looked, mut free) = (0, 0);
        for n in 1..=count {
            let now = n * period;
            side.wait(free);
            looked += side.plan.map_or(0, |plan| plan.budget.min(now - free));
            free = side.hear(now, WAKE) + THINK;
        }
        looked as f64 / (count * period) as f64
    }

    #[test]
    fn r22_what_comes_seldom_is_slept_for() {
        for period in [200_000, 1_000_000, 10_000_000, 1_000_000_000] {
            let all = share(period, 10_000) * period as f64 * 10_000.0;
            assert!(all <= 4.0 * WAKE as f64, "{period} ns: {all} ns in all");
        }
    }

    #[test]
    fn r22_what_comes_often_but_not_soon_costs_a_rare_trial() {
        for period in [110_000, 125_000, 145_000] {
            let share = share(period, 100_000);
            assert!(share < 0.03, "{period} ns: {share}");
        }
    }

    #[test]
    fn r22_what_comes_soon_is_looked_for() {
        for period in [2_000, 10_000, 30_000] {
            assert!(share(period, 10_000) > 0.7, "{period} ns");
        }
    }

    proptest! {
        #[test]
        fn r22_two_sides_that_sleep_for_each_other_learn_to_look(
            credits in prop::array::uniform2(0..=16 * WAKE),
            near in prop::array::uniform2(0..TRIAL_SELDOM),
            trials in prop::array::uniform2(0u32..=6),
            wake in WAKE / 10..=WAKE * 9 / 10,
        ) {
            let mut sides = [0, 1].map(|n| {
                let mut wager = Wager::new(false, WAKE_NS);
                wager.credit = credits[n];
                wager.near = near[n];
                wager.trial_after = 1 << trials[n];
                Side { wager, since: 0, plan: None }
            });
            let mut now = 0;
            sides[1].wait(now);
            let mut slow = 0;
            for n in 0..1000 {
                let [me, peer] = &mut sides;
                let (me, peer) = if n % 2 == 0 { (me, peer) } else { (peer, me) };
                me.wait(now);
                let then = peer.hear(now, wake) + THINK;
                slow += u32::from(then - now > 2 * THINK);
                now = then;
            }
            prop_assert!(slow <= 2 * TRIAL_SELDOM + 8, "{} messages were slept for", slow);
            prop_assert!(sides.iter().all(|side| side.wager.credit == 16 * WAKE));
        }
    }

    #[test]
    fn r22_who_was_helped_by_a_yield_begins_with_one_and_tries_the_other_way_at_times() {
        let mut wager = Wager::new(false, WAKE_NS);
        let plan = wager.begin(0).unwrap();
        assert!(!plan.yields_first);
        wager.found(plan, 5_000, true);
        let firsts = (0..YIELDS + 1).map(|n| {
            let plan = wager.begin(u64::from(n) * 10_000).unwrap();
            wager.found(plan, 2_000, plan.yields_first);
            plan.yields_first
        });
        let firsts: Vec<bool> = firsts.collect();
        assert_eq!(
            firsts.iter().filter(|first| **first).count(),
            YIELDS as usize
        );
        assert!(!firsts[YIELDS as usize]);
        assert!(!wager.begin(1 << 30).unwrap().yields_first);
    }

    #[test]
    fn r22_who_may_not_look_yields_once_while_that_helps() {
        let mut wager = Wager::new(true, WAKE_NS);
        let plan = wager.begin(0).unwrap();
        assert_eq!((plan.budget, plan.yields_first), (0, true));
        let mut now = 0;
        let mut yields = 0;
        for _ in 0..10_000 {
            now += 10_000_000;
            if wager.begin(now).is_some() {
                yields += 1;
                wager.gave_up(YIELD_NS);
            }
        }
        assert!(yields <= 4 * WAKE / YIELD_NS);
    }

    #[test]
    fn r22_what_a_wake_up_takes_is_learned_and_cannot_be_lied_about_for_long() {
        let after =
            |wake, times: &[u32]| times.iter().fold(wake, |wake, took| learned(wake, *took));
        assert!((44_000..=46_000).contains(&after(WAKE_NS, &[45_000; 40])));
        assert_eq!(after(WAKE_NS, &[3_000; 40]), LEAST_NS);
        assert!(after(LEAST_NS, &[100_000; 1000]) <= 100_000);
        for lie in [0, 1_999, 100_001, u32::MAX] {
            assert_eq!(after(WAKE_NS, &[lie; 1000]), WAKE_NS);
        }
    }

    #[test]
    fn r22_a_crowded_processor_is_left_to_others() {
        let mut wager = Wager::new(false, WAKE_NS);
        wager.credit = 16 * WAKE;
        let mut now = 0;
        let mut looks = 0;
        for _ in 0..10_000 {
            if wager.begin(now).is_some() {
                looks += 1;
                now += 3_000_000;
                wager.gave_up(3_000_000);
            }
            now += 10_000_000;
        }
        assert_eq!(looks, 4);
    }

    #[test]
    fn r22_who_shares_a_processor_with_many_leaves_it_and_looks_first_later() {
        let mut wager = Wager::new(false, WAKE_NS);
        let plan = wager.begin(0).unwrap();
        assert!(plan.is_crowded(3_000_000, 1) && !plan.is_crowded(3_000, 5));
        wager.found(plan, 5_000, true);
        let mut gave_up = 0;
        for n in 1..64 {
            let plan = wager.begin(n * 10_000_000).unwrap();
            if !plan.yields_first {
                break;
            }
            assert!(plan.is_crowded(3_000, 2) && !plan.is_crowded(3_000, 1));
            wager.gave_up(YIELD_NS);
            gave_up += 1;
        }
        assert!((2..8).contains(&gave_up));
    }

    #[test]
    fn r22_a_spin_finds_what_is_there_and_gives_up_what_never_comes() {
        let mut spin = Spin::default();
        assert!(spin.until(|| true));
        for _ in 0..64 {
            assert!(!spin.until_peer(|| false));
            spin.wager.begun = None;
        }
        let mut looks = 0;
        assert!(!spin.until(|| {
            looks += 1;
            false
        }));
        assert_eq!(looks, 1, "one look, no spinning");
        assert!(!spin.glance(|| true));
    }
}
