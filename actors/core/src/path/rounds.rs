//! When all candidates are pinged, and the peer is asked to do the same (tailnet-data 7.3, 7.7).

use std::time::{Duration, Instant};

use super::candidates::SPACING;
use crate::backoff::Backoff;

/// A peer that shows no direct path is asked for one so rarely.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How often a better path than one that works is looked for.
const UPGRADE: Duration = Duration::from_secs(60);
/// No path is worth looking for beside one so fast.
const GOOD_ENOUGH: Duration = Duration::from_millis(5);

/// The schedule of rounds.
#[derive(Debug)]
pub(super) struct Rounds {
    pauses: Backoff,
    last: Option<Instant>,
    /// When the next one may be.
    due: Option<Instant>,
    /// Whether something is new since the last one.
    has_news: bool,
}

/// What a round is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Round {
    /// The first since something was new; once in [`SPACING`] at most, however much is.
    OfNews,
    /// Another one.
    Usual,
}

impl Default for Rounds {
    fn default() -> Self {
        Self { pauses: Backoff::new(SPACING, LONGEST_PAUSE, 2.0, 0.0), last: None, due: None, has_news: true }
    }
}

impl Rounds {
    /// When the next round is due, if a path is wanted.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// A round begins.
    pub(super) fn begin(&mut self, now: Instant) -> Round {
        let is_rare = self.last.is_none_or(|at| now.saturating_duration_since(at) >= SPACING);
        (self.last, self.due) = (Some(now), Some(now + self.pauses.next(0.0)));
        let has_news = std::mem::take(&mut self.has_news);
        if has_news && is_rare { Round::OfNews } else { Round::Usual }
    }

    /// Something is new, or a path was lost: the next round is due at once, and others soon.
    pub(super) fn hasten(&mut self, now: Instant) {
        self.pauses.reset();
        self.has_news = true;
        self.due = Some(now);
    }

    /// A path was lost, and the peer is told of it by other means.
    pub(super) fn postpone(&mut self, now: Instant) {
        self.pauses.reset();
        self.due = Some(now + SPACING);
    }

    /// Whether a better path should be looked for than one that works.
    pub(super) fn should_upgrade(&self, now: Instant, latency: Duration) -> bool {
        latency > GOOD_ENOUGH && self.last.is_none_or(|at| now.saturating_duration_since(at) >= UPGRADE)
    }
}
