//! How long to wait before the next try. Serves actors, processes and connections alike.

use std::time::Duration;

/// Pauses that grow by a factor from a floor to a cap, each shortened at random by up to a share, so
/// that many who failed together do not come back together.
#[derive(Debug, Clone, PartialEq)]
pub struct Backoff {
    floor: Duration,
    cap: Duration,
    factor: f64,
    jitter: f64,
    /// The next pause before jitter; `None` for the floor.
    pause: Option<Duration>,
}

impl Backoff {
    /// Pauses from `floor` to `cap`, each `factor` times the one before (at least 1), and shortened by up
    /// to the share `jitter` (0 to 1) of itself.
    pub fn new(floor: Duration, cap: Duration, factor: f64, jitter: f64) -> Self {
        let factor = if factor.is_finite() { factor.max(1.0) } else { 1.0 };
        Self { floor: floor.min(cap), cap, factor, jitter: share(jitter), pause: None }
    }

    /// The next pause, never above the cap. `random` is from 0 to 1.
    pub fn next(&mut self, random: f64) -> Duration {
        let pause = self.pause.unwrap_or(self.floor);
        let grown = Duration::try_from_secs_f64(pause.as_secs_f64() * self.factor).unwrap_or(self.cap);
        self.pause = Some(grown.min(self.cap));
        pause.mul_f64(1.0 - self.jitter * share(random))
    }

    /// It worked: the next pause is the floor again.
    pub fn reset(&mut self) {
        self.pause = None;
    }
}

fn share(value: f64) -> f64 {
    if value.is_finite() { value.clamp(0.0, 1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn pauses_grow_by_the_factor_from_the_floor_to_the_cap() {
        let mut backoff = Backoff::new(250 * MS, 1500 * MS, 2.0, 0.0);
        let pauses: Vec<_> = (0..5).map(|_| backoff.next(0.7)).collect();
        assert_eq!(pauses, [250 * MS, 500 * MS, 1000 * MS, 1500 * MS, 1500 * MS]);
    }

    #[test]
    fn after_a_success_the_pause_is_the_floor_again() {
        let mut backoff = Backoff::new(10 * MS, 1000 * MS, 2.0, 0.0);
        backoff.next(0.0);
        backoff.next(0.0);
        backoff.reset();
        assert_eq!(backoff.next(0.0), 10 * MS);
    }

    #[test]
    fn jitter_only_shortens_a_pause_and_by_its_share_at_most() {
        for (random, expected) in [(0.0, 100), (0.5, 90), (1.0, 80), (7.0, 80), (f64::NAN, 100)] {
            let pause = Backoff::new(100 * MS, 1000 * MS, 2.0, 0.2).next(random);
            assert_eq!(pause.as_micros().div_ceil(1000), expected, "{random}");
        }
    }

    #[test]
    fn a_floor_above_the_cap_and_a_shrinking_factor_are_put_right() {
        let mut backoff = Backoff::new(Duration::from_secs(9), Duration::from_secs(1), 0.1, 0.0);
        assert_eq!(backoff.next(0.0), Duration::from_secs(1));
        assert_eq!(backoff.next(0.0), Duration::from_secs(1));
    }

    proptest! {
        #[test]
        fn no_pause_is_above_the_cap_and_without_jitter_none_is_shorter_than_the_one_before(
            floor in 0_u64..10_000, cap in 0_u64..10_000, factor in -1.0..1e9_f64, jitter in -1.0..2.0_f64,
            randoms in proptest::collection::vec(0.0..1.0_f64, 1..50),
        ) {
            let (floor, cap) = (Duration::from_millis(floor), Duration::from_millis(cap));
            let mut jittery = Backoff::new(floor, cap, factor, jitter);
            let mut steady = Backoff::new(floor, cap, factor, 0.0);
            let mut before = Duration::ZERO;
            for random in randoms {
                prop_assert!(jittery.next(random) <= cap);
                let pause = steady.next(random);
                prop_assert!(pause >= before && pause <= cap);
                before = pause;
            }
        }
    }
}
