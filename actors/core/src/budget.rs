//! How often something may be restarted before giving up is the better answer. Serves actors and
//! processes alike.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// A number of restarts allowed in any window of time. One more than that spends the budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    max: usize,
    window: Duration,
    /// When the restarts in the present window happened, oldest first; never more than `max`.
    recent: VecDeque<Instant>,
}

/// What the budget says about one more restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It may happen.
    Allowed {
        /// How many more the present window allows.
        left: usize,
    },
    /// Too many in too short a time.
    Spent,
}

impl Budget {
    /// At most `max` restarts within any `window`.
    pub fn new(max: usize, window: Duration) -> Self {
        Self { max, window, recent: VecDeque::new() }
    }

    /// How many restarts a window allows.
    pub fn max(&self) -> usize {
        self.max
    }

    /// The window.
    pub fn window(&self) -> Duration {
        self.window
    }

    /// Counts one restart at `now` and says whether it may happen. A refused one is not counted.
    pub fn record(&mut self, now: Instant) -> Verdict {
        let window = self.window;
        while self.recent.front().is_some_and(|first| now.saturating_duration_since(*first) > window) {
            self.recent.pop_front();
        }
        if self.recent.len() >= self.max {
            return Verdict::Spent;
        }
        self.recent.push_back(now);
        Verdict::Allowed { left: self.max - self.recent.len() }
    }

    /// Forgets every restart: a person has acted.
    pub fn reset(&mut self) {
        self.recent.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Restarts at these seconds, and whether each was allowed.
    fn verdicts(max: usize, window: u64, at: &[u64]) -> Vec<bool> {
        let begin = Instant::now();
        let mut budget = Budget::new(max, Duration::from_secs(window));
        let mut allowed =
            |second: &u64| budget.record(begin + Duration::from_secs(*second)) != Verdict::Spent;
        at.iter().map(&mut allowed).collect()
    }

    #[test]
    fn one_restart_more_than_allowed_within_the_window_spends_the_budget() {
        assert_eq!(verdicts(3, 120, &[0, 1, 2, 3]), [true, true, true, false]);
        assert_eq!(verdicts(0, 120, &[0]), [false]);
        assert_eq!(verdicts(1, 10, &[0, 10, 11]), [true, false, true]);
    }

    #[test]
    fn restarts_that_left_the_window_no_longer_count() {
        assert_eq!(verdicts(2, 60, &[0, 30, 61, 62, 91]), [true, true, true, false, true]);
    }

    #[test]
    fn the_verdict_says_how_many_are_left() {
        let now = Instant::now();
        let mut budget = Budget::new(2, Duration::from_secs(1));
        assert_eq!(budget.record(now), Verdict::Allowed { left: 1 });
        assert_eq!(budget.record(now), Verdict::Allowed { left: 0 });
        assert_eq!(budget.record(now), Verdict::Spent);
        budget.reset();
        assert_eq!(budget.record(now), Verdict::Allowed { left: 1 });
    }

    #[test]
    fn a_clock_that_seems_to_step_back_forgives_nothing() {
        assert_eq!(verdicts(1, 10, &[100, 50]), [true, false]);
    }

    proptest! {
        #[test]
        fn no_window_ever_holds_more_than_the_budget(
            max in 0_usize..6,
            window in 1_u64..100,
            steps in proptest::collection::vec(0_u64..40, 0..60),
        ) {
            let at: Vec<u64> = steps.iter().scan(0, |time, step| { *time += step; Some(*time) }).collect();
            let verdicts = verdicts(max, window, &at);
            let allowed: Vec<u64> =
                at.iter().zip(&verdicts).filter(|(_, allowed)| **allowed).map(|(second, _)| *second).collect();
            for first in &allowed {
                let in_window = allowed.iter().filter(|second| (*first..=first + window).contains(second));
                prop_assert!(in_window.count() <= max);
            }
        }

        #[test]
        fn what_is_rarer_than_the_budget_is_never_refused(max in 1_usize..6, count in 0_usize..50) {
            let at: Vec<u64> = (0..count as u64).map(|index| index * 11).collect();
            prop_assert!(verdicts(max, 10, &at).iter().all(|allowed| *allowed));
        }
    }
}
