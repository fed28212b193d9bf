//! Which wakes are news. That the machine has slept, or is on another network, is told by several who noticed, within
//! seconds of each other: one of them is enough to bind sockets anew and to ask everybody whether he is still there.

use std::time::{Duration, Instant};

/// A machine that slept for a shorter time has lost no connection, and the clocks that tell are not read at the same
/// moment.
pub const LEAST_SLEEP: Duration = Duration::from_secs(1);
/// Who asks so soon after the last wake, without a sleep in between, tells of what that one was about.
const DEBOUNCE: Duration = Duration::from_secs(5);
/// logind says it only once everything that it has others do after a sleep is done.
const LOGIND_LAG: Duration = Duration::from_secs(60);

/// Why what worked may not work any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The manager says that the machine woke up, or that the network may be another.
    Manager,
    /// logind says that the machine has slept, or meant to.
    Logind,
    /// We see that the machine has slept.
    Resumed,
    /// The network became another one. Whoever tells it knows how it was before.
    Network,
}

/// What was done about wakes.
#[derive(Debug, Default)]
pub struct Wakes {
    last: Option<Last>,
}

/// The last wake that was news.
#[derive(Debug)]
struct Last {
    at: Instant,
    slept: Duration,
}

impl Wakes {
    /// Whether something is to be done about a wake. `slept` is how long the machine has slept since it was started: if
    /// that is more than at the last wake, nothing was done since the last sleep.
    pub fn is_news(&mut self, now: Instant, slept: Duration, cause: Cause) -> bool {
        let is_known = self.last.as_ref().is_some_and(|last| {
            let has_slept = slept.saturating_sub(last.slept) >= LEAST_SLEEP;
            let since = now.saturating_duration_since(last.at);
            match cause {
                Cause::Network => false,
                Cause::Resumed => !has_slept,
                Cause::Manager => !has_slept && since < DEBOUNCE,
                Cause::Logind => !has_slept && since < LOGIND_LAG,
            }
        });
        if !is_known {
            self.last = Some(Last { at: now, slept });
        }
        !is_known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (when in ms by a clock that stands still in sleep, slept in ms, what is told, whether it is news)
    type Row = (u64, u64, Cause, bool);

    #[test]
    fn one_sleep_is_news_once_whoever_tells_of_it_first() {
        const REQUEST_FIRST: &[Row] = &[
            (0, 60_000, Cause::Manager, true),
            (1900, 60_000, Cause::Resumed, false),
            (2000, 60_000, Cause::Manager, false),
        ];
        const OURS_FIRST: &[Row] =
            &[(0, 60_000, Cause::Resumed, true), (1900, 60_000, Cause::Manager, false)];
        const NETWORK_FIRST: &[Row] = &[
            (0, 60_000, Cause::Network, true),
            (100, 60_000, Cause::Resumed, false),
            (200, 60_000, Cause::Manager, false),
        ];
        [REQUEST_FIRST, OURS_FIRST, NETWORK_FIRST].into_iter().for_each(check);
    }

    #[test]
    fn a_sleep_right_after_a_wake_is_news_by_whomever() {
        check(&[
            (0, 0, Cause::Manager, true),
            (500, 3_600_000, Cause::Resumed, true),
            (900, 7_200_000, Cause::Manager, true),
            (950, 7_200_000, Cause::Resumed, false),
        ]);
    }

    /// Conforms: vpn:T5
    #[test]
    fn a_request_is_news_once_in_five_seconds() {
        check(&[
            (0, 0, Cause::Manager, true),
            (4999, 0, Cause::Manager, false),
            (5000, 0, Cause::Manager, true),
            (5001, 0, Cause::Manager, false),
        ]);
    }

    #[test]
    fn another_network_is_always_news_and_a_request_is_again_after_a_while() {
        check(&[
            (0, 0, Cause::Resumed, true),
            (100, 0, Cause::Network, true),
            (200, 0, Cause::Network, true),
            (5100, 0, Cause::Manager, false),
            (5200, 0, Cause::Manager, true),
        ]);
    }

    #[test]
    fn logind_is_late_with_a_sleep_and_knows_of_some_that_no_clock_shows() {
        check(&[
            (0, 60_000, Cause::Resumed, true),
            (30_000, 60_000, Cause::Logind, false),
            (60_000, 60_000, Cause::Logind, true),
            (61_000, 60_000, Cause::Logind, false),
            (62_000, 120_000, Cause::Logind, true),
            (62_100, 120_000, Cause::Resumed, false),
        ]);
    }

    fn check(rows: &[Row]) {
        let (mut wakes, start) = (Wakes::default(), Instant::now());
        for row @ (at, slept, cause, is_news) in rows {
            let (now, slept) = (start + Duration::from_millis(*at), Duration::from_millis(*slept));
            assert_eq!(wakes.is_news(now, slept, *cause), *is_news, "{row:?}");
        }
    }
}
