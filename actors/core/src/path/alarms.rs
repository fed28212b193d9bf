//! What came of leaving paths: how sure one has to be the next time, and for how long direct paths are let be
//! (tailnet-data 7.12).

use std::time::{Duration, Instant};

use super::suspicion::Patience;
use crate::backoff::Backoff;

/// A path that answers so soon after it was left was not dead.
const FALSE_WITHIN: Duration = Duration::from_secs(1);
/// How long a false alarm makes careful. Networks that lose much keep doing so; half a second more is cheap.
const CAREFUL_FOR: Duration = Duration::from_secs(10 * 60);
/// Two alarms within this time are flapping.
const FLAPPING: Duration = Duration::from_secs(60);
const SHORTEST_BAR: Duration = Duration::from_secs(10);
const LONGEST_BAR: Duration = Duration::from_secs(60);

/// The paths to one peer that were left because they did not answer.
#[derive(Debug)]
pub(super) struct Alarms {
    last: Option<Instant>,
    /// When the latest bar ends or ended: a path that dies soon after it flaps still.
    barred_until: Option<Instant>,
    careful_until: Option<Instant>,
    bars: Backoff,
}

impl Default for Alarms {
    fn default() -> Self {
        let bars = Backoff::new(SHORTEST_BAR, LONGEST_BAR, 2.0, 0.0);
        Self { last: None, barred_until: None, careful_until: None, bars }
    }
}

impl Alarms {
    pub(super) fn patience(&self, now: Instant) -> Patience {
        if self.careful_until.is_some_and(|until| now < until) { Patience::CAREFUL } else { Patience::USUAL }
    }

    /// A path is left. Returns until when no other may be taken, if paths flap.
    pub(super) fn raise(&mut self, now: Instant) -> Option<Instant> {
        let is_recent =
            |at: Option<Instant>| at.is_some_and(|at| now.saturating_duration_since(at) < FLAPPING);
        let flaps_still = is_recent(self.barred_until);
        let flaps = flaps_still || is_recent(self.last);
        self.last = Some(now);
        if !flaps_still {
            self.bars.reset();
        }
        self.barred_until = flaps.then(|| now + self.bars.next(0.0));
        self.barred_until
    }

    /// A direct path answered.
    pub(super) fn handle_answer(&mut self, now: Instant) {
        if self.last.is_some_and(|at| now.saturating_duration_since(at) < FALSE_WITHIN) {
            self.careful_until = Some(now + CAREFUL_FOR);
        }
    }
}
