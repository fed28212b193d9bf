//! Noticing that the machine has slept. One clock of the kernel goes on meanwhile and the other stands still: how far
//! they are apart is how long it has slept, whoever put it to sleep, and nobody else needs to be asked.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::time::MissedTickBehavior;

/// How often it is looked: a tunnel is told about this long after the machine wakes up.
const INTERVAL: Duration = Duration::from_secs(2);
/// A shorter sleep breaks no connection, and the two clocks are not read at the same moment.
const LEAST: Duration = Duration::from_secs(1);

/// How long the machine had slept when it was looked last.
#[derive(Debug)]
struct Sleep {
    slept: Duration,
}

impl Sleep {
    /// Whatever was before is past.
    fn new(slept: Duration) -> Self {
        Self { slept }
    }

    /// Whether the machine has slept since the last look.
    fn is_over(&mut self, slept: Duration) -> bool {
        let since = slept.saturating_sub(self.slept);
        self.slept = slept;
        since >= LEAST
    }
}

/// Waits until the machine has slept and is awake again. A sleep between two calls is not noticed.
pub async fn resumed() {
    let mut sleep = Sleep::new(slept());
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if sleep.is_over(slept()) {
            return;
        }
    }
}

/// How long the machine has slept since it was started.
fn slept() -> Duration {
    // In this order, so that being interrupted in between looks like no sleep rather than like one.
    let (with_sleep, awake) = (ClockId::Boottime, ClockId::Monotonic);
    let [with_sleep, awake] = [with_sleep, awake].map(|clock| {
        let now = clock_gettime(clock);
        Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
    });
    with_sleep.saturating_sub(awake)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sleep_is_noticed_once_and_time_awake_is_none() {
        let mut sleep = Sleep::new(Duration::from_secs(100));
        for (slept, is_over) in
            [(100_000, false), (100_001, false), (107_000, true), (107_000, false), (108_500, true)]
        {
            assert_eq!(sleep.is_over(Duration::from_millis(slept)), is_over, "{slept}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_machine_that_stays_awake_never_resumes() {
        assert!(tokio::time::timeout(100 * INTERVAL, resumed()).await.is_err());
    }
}
