//! How many pings go where nobody has answered. A peer names what it likes, adds to it and takes away again: we shall
//! not be its tool for floods.

use std::time::{Duration, Instant};

use super::candidates::MAX_CANDIDATES;

/// One in so long, in the long run.
const EACH: Duration = Duration::from_millis(20);
/// At once: two rounds over as many candidates as there may be.
const MOST: u32 = 2 * MAX_CANDIDATES as u32;

/// The pings of one path to addresses that have not answered.
#[derive(Debug, Default)]
pub(super) struct BlindPings {
    /// When all of [`MOST`] may be sent again.
    rested_at: Option<Instant>,
}

impl BlindPings {
    /// Whether another may be sent now; then it counts.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let rested_at = self.rested_at.map_or(now, |at| at.max(now)) + EACH;
        let is_allowed = rested_at.saturating_duration_since(now) <= EACH * MOST;
        if is_allowed {
            self.rested_at = Some(rested_at);
        }
        is_allowed
    }
}
