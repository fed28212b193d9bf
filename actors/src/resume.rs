//! Noticing that the machine has slept. One clock of the kernel goes on meanwhile and the other stands still: how far
//! they are apart is how long it has slept, whoever put it to sleep, and nobody else needs to be asked.
//!
//! ```text
//! the clock was set: the kernel tells at once ──┐
//! every 2 s, where it does not ─────────────────┴─> how long has it slept? ── more than before ──> whoever waits
//! ```
//!
//! The kernel tells of a resume as of a clock that was set (`TFD_TIMER_CANCEL_ON_SET`). What logind says of it over D-Bus
//! comes no earlier and is not there on every system; the service hears it as well, and a tunnel needs no bus.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use tokio::io::{Interest, unix::AsyncFd};
use warren_core::wakes::LEAST_SLEEP;

use crate::watched::watched;

/// How often it is looked, where the kernel does not tell.
const INTERVAL: Duration = Duration::from_secs(2);

/// Tells of sleeps that are over.
pub struct Watcher {
    sleep: Sleep,
    /// Readable whenever the clock was set; `None` where that cannot be had.
    clock: Option<AsyncFd<OwnedFd>>,
}

impl Watcher {
    /// Whatever was before is past.
    pub fn new() -> Self {
        let clock = clock_notices().and_then(|timer| watched(timer, Interest::READABLE));
        let clock =
            clock.inspect_err(|error| tracing::debug!(%error, "a set clock is not told by the kernel"));
        Self { sleep: Sleep { slept: slept() }, clock: clock.ok() }
    }

    /// Waits until the machine has slept and is awake again. May be dropped and called again without losing a sleep.
    pub async fn next(&mut self) {
        self.next_by(slept).await;
    }

    async fn next_by(&mut self, slept: impl Fn() -> Duration) {
        while !self.sleep.is_over(slept()) {
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = self.clock_set() => {}
            }
        }
    }

    /// Waits for a notice and takes it.
    async fn clock_set(&mut self) {
        let Some(clock) = &self.clock else { return std::future::pending().await };
        let take = |fd: &OwnedFd| match rustix::io::read(fd, &mut [0_u8; 8]) {
            // This is how the kernel tells it.
            Ok(_) | Err(rustix::io::Errno::CANCELED) => Ok(()),
            Err(error) => Err(io::Error::from(error)),
        };
        if let Err(error) = clock.async_io(Interest::READABLE, take).await {
            tracing::debug!(%error, "a set clock is not told by the kernel any more");
            self.clock = None;
        }
    }
}

impl Default for Watcher {
    fn default() -> Self {
        Self::new()
    }
}

/// Tells of every sleep that is over, for ever.
pub async fn watch<F: Future<Output = ()>>(tell: impl Fn() -> F) {
    let mut watcher = Watcher::new();
    loop {
        watcher.next().await;
        tell().await;
    }
}

/// How long the machine has slept since it was started.
pub fn slept() -> Duration {
    // In this order, so that being interrupted in between looks like no sleep rather than like one.
    let (with_sleep, awake) = (ClockId::Boottime, ClockId::Monotonic);
    let [with_sleep, awake] = [with_sleep, awake].map(|clock| {
        let now = clock_gettime(clock);
        Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
    });
    with_sleep.saturating_sub(awake)
}

/// How long the machine had slept when it was looked last.
#[derive(Debug)]
struct Sleep {
    slept: Duration,
}

impl Sleep {
    /// Whether the machine has slept since the last look.
    fn is_over(&mut self, slept: Duration) -> bool {
        let since = slept.saturating_sub(self.slept);
        self.slept = slept;
        since >= LEAST_SLEEP
    }
}

/// A timer that never rings, and is cancelled when the clock is set.
fn clock_notices() -> io::Result<OwnedFd> {
    let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
    let never = Timespec { tv_sec: i64::MAX, tv_nsec: 0 };
    let spec = Itimerspec { it_interval: Timespec::default(), it_value: never };
    timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET, &spec)?;
    Ok(timer)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn each_sleep_is_noticed_once_and_time_awake_is_none() {
        let mut sleep = Sleep { slept: Duration::from_secs(100) };
        for (slept, is_over) in
            [(100_000, false), (100_001, false), (107_000, true), (107_000, false), (108_500, true)]
        {
            assert_eq!(sleep.is_over(Duration::from_millis(slept)), is_over, "{slept}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_machine_that_stays_awake_never_resumes() {
        let mut watcher = Watcher::new();
        assert!(watcher.clock.is_some(), "the kernel takes the timer");
        assert!(tokio::time::timeout(100 * INTERVAL, watcher.next()).await.is_err());
    }

    #[tokio::test]
    async fn a_sleep_is_noticed_as_soon_as_the_kernel_tells_of_a_set_clock() {
        let (mut watcher, kernel) = told_by_us();
        let slept = AtomicU64::new(0);
        let look = || {
            // The machine sleeps after the first look, and the kernel tells.
            if slept.swap(60, Ordering::Relaxed) == 0 {
                rustix::io::write(&kernel, &1_u64.to_ne_bytes()).unwrap();
                return Duration::ZERO;
            }
            Duration::from_secs(60)
        };
        let noticed = tokio::time::timeout(INTERVAL / 2, watcher.next_by(look)).await;
        assert!(noticed.is_ok(), "before the next look is due");
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_set_is_no_sleep_and_is_not_looked_at_again_and_again() {
        let (mut watcher, kernel) = told_by_us();
        rustix::io::write(&kernel, &1_u64.to_ne_bytes()).unwrap();
        let looks = AtomicU64::new(0);
        let look = || {
            looks.fetch_add(1, Ordering::Relaxed);
            Duration::ZERO
        };
        assert!(tokio::time::timeout(10 * INTERVAL, watcher.next_by(look)).await.is_err());
        let looks = looks.into_inner();
        assert!((10..=12).contains(&looks), "{looks}");
    }

    #[tokio::test(start_paused = true)]
    async fn without_the_kernels_word_a_sleep_is_noticed_at_the_next_look() {
        let mut watcher = Watcher { sleep: Sleep { slept: Duration::ZERO }, clock: None };
        let begun = tokio::time::Instant::now();
        let look = || if begun.elapsed().is_zero() { Duration::ZERO } else { Duration::from_secs(60) };
        watcher.next_by(look).await;
        assert!(begun.elapsed() <= INTERVAL);
    }

    /// One whose kernel we are, and by what it is told.
    fn told_by_us() -> (Watcher, OwnedFd) {
        let theirs = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let ours = theirs.try_clone().unwrap();
        (
            Watcher {
                sleep: Sleep { slept: Duration::ZERO },
                clock: Some(watched(theirs, Interest::READABLE).unwrap()),
            },
            ours,
        )
    }
}
