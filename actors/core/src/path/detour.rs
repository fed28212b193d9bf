//! A peer that sends by relay although a direct path works. It keeps to an address at which we are no more, and was
//! told so in vain: its relay was down when we moved. The reference would go on for good (tailnet-data 7.4).

use std::time::{Duration, Instant};

use crate::backoff::Backoff;

/// A peer whose path is new needs a moment to find that it works.
const PATIENCE: Duration = Duration::from_secs(3);
/// Peers that do as they like are let be in the end.
const SHORTEST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(10 * 60);

/// How long everything has come by relay alone.
#[derive(Debug)]
pub(super) struct Detour {
    since: Option<Instant>,
    /// When the peer may be told again.
    next: Option<Instant>,
    pauses: Backoff,
}

impl Default for Detour {
    fn default() -> Self {
        Self { since: None, next: None, pauses: Backoff::new(SHORTEST_PAUSE, LONGEST_PAUSE, 2.0, 0.0) }
    }
}

impl Detour {
    /// Data came by relay. Returns whether the peer should be made to leave what it keeps to.
    pub(super) fn handle_relayed(&mut self, now: Instant, is_trusted: bool) -> bool {
        if !is_trusted {
            self.since = None;
            return false;
        }
        let since = *self.since.get_or_insert(now);
        let is_due = now.saturating_duration_since(since) >= PATIENCE && self.next.is_none_or(|at| at <= now);
        if is_due {
            self.next = Some(now + self.pauses.next(0.0));
        }
        is_due
    }

    /// Data came directly.
    pub(super) fn handle_direct(&mut self) {
        self.since = None;
        self.pauses.reset();
    }
}
