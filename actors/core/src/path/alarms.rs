//! What came of leaving paths: how sure one has to be the next time, and for how long direct paths are let be
//! (tailnet-data 7.12).

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::suspicion::Patience;
use crate::backoff::Backoff;

/// A path that answers so soon after it was left was not dead.
const FALSE_WITHIN: Duration = Duration::from_secs(1);
/// How long a false alarm makes careful. Networks that lose much keep doing so; half a second more is cheap.
const CAREFUL_FOR: Duration = Duration::from_secs(10 * 60);
/// Two alarms within this time are flapping; false ones, each of which is over in a moment, are not before there are
/// more than [`MOST_FALSE`].
const FLAPPING: Duration = Duration::from_secs(60);
const MOST_FALSE: usize = 4;
const SHORTEST_BAR: Duration = Duration::from_secs(10);
const LONGEST_BAR: Duration = Duration::from_secs(60);

/// The paths to one peer that were left because they did not answer.
#[derive(Debug)]
pub(super) struct Alarms {
    /// The latest that has not proved false.
    last: Option<Instant>,
    /// When false ones were raised, the latest of them, in order.
    false_ones: VecDeque<Instant>,
    /// When the latest bar ends or ended: a path that dies soon after it flaps still.
    barred_until: Option<Instant>,
    bars: Backoff,
}

impl Default for Alarms {
    fn default() -> Self {
        let bars = Backoff::new(SHORTEST_BAR, LONGEST_BAR, 2.0, 0.0);
        Self { last: None, false_ones: VecDeque::new(), barred_until: None, bars }
    }
}

impl Alarms {
    pub(super) fn patience(&self, now: Instant) -> Patience {
        match self.false_within(now, CAREFUL_FOR) {
            0 => Patience::USUAL,
            1 => Patience::CAREFUL,
            _ => Patience::MOST_CAREFUL,
        }
    }

    /// A path is left. Returns until when no other may be taken, if paths flap.
    pub(super) fn raise(&mut self, now: Instant) -> Option<Instant> {
        let is_recent = |at: Option<Instant>| at.is_some_and(|at| is_within(now, at, FLAPPING));
        let flaps_still = is_recent(self.barred_until);
        let flaps = flaps_still || is_recent(self.last) || self.false_within(now, FLAPPING) >= MOST_FALSE;
        self.last = Some(now);
        if !flaps_still {
            self.bars.reset();
        }
        self.barred_until = flaps.then(|| now + self.bars.next(0.0));
        self.barred_until
    }

    /// A direct path answered.
    pub(super) fn handle_answer(&mut self, now: Instant) {
        if let Some(raised) = self.last.take_if(|at| is_within(now, *at, FALSE_WITHIN)) {
            self.false_ones.push_back(raised);
            if self.false_ones.len() > MOST_FALSE {
                self.false_ones.pop_front();
            }
        }
    }

    fn false_within(&self, now: Instant, age: Duration) -> usize {
        self.false_ones.iter().filter(|at| is_within(now, **at, age)).count()
    }
}

fn is_within(now: Instant, at: Instant, age: Duration) -> bool {
    now.saturating_duration_since(at) < age
}
