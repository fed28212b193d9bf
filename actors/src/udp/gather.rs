//! Waiting a moment for more while single datagrams come fast: agents send them one by one, and each wake-up would
//! find two or three.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::watched::watched;

/// How long is waited. What comes meanwhile waits in the receive buffer.
const PAUSE: Duration = Duration::from_micros(100);
/// Over which single datagrams are counted.
const WINDOW: Duration = Duration::from_millis(1);
/// More in a window is fast.
const MANY: u64 = 8;

/// When to wait, and how: the runtime's own timers are too coarse.
#[derive(Debug)]
pub(crate) struct Gather {
    timer: AsyncFd<OwnedFd>,
    rate: Rate,
}

/// How fast single datagrams come.
#[derive(Debug)]
struct Rate {
    begun: Instant,
    singles: u64,
    is_fast: bool,
}

impl Gather {
    /// On the runtime that it is called on.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let timer = watched(timer, Interest::READABLE)?;
        Ok(Self { timer, rate: Rate { begun: Instant::now(), singles: 0, is_fast: false } })
    }

    /// So many single datagrams came at once, and nothing else; 0 for runs.
    pub(crate) fn note(&mut self, now: Instant, singles: usize) {
        self.rate.note(now, singles as u64);
    }

    /// Waits, if that is worth it.
    pub(crate) async fn wait(&mut self) -> io::Result<()> {
        if !self.rate.is_fast(Instant::now()) {
            return Ok(());
        }
        let pause = Timespec { tv_sec: 0, tv_nsec: i64::from(PAUSE.subsec_nanos()) };
        let never_again = Timespec { tv_sec: 0, tv_nsec: 0 };
        let once = Itimerspec { it_interval: never_again, it_value: pause };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        loop {
            let mut ready = self.timer.readable().await?;
            // The readiness may be that of the wait before.
            if let Ok(expired) = ready.try_io(|timer| Ok(rustix::io::read(timer, &mut [0; 8])?)) {
                return expired.map(drop);
            }
        }
    }
}

impl Rate {
    /// Whether more are to be expected at once.
    fn is_fast(&self, now: Instant) -> bool {
        self.is_fast && now.saturating_duration_since(self.begun) < 2 * WINDOW
    }

    fn note(&mut self, now: Instant, singles: u64) {
        let elapsed = now.saturating_duration_since(self.begun);
        if singles == 0 || elapsed >= 2 * WINDOW {
            // A run, or a pause: it begins anew.
            *self = Self { begun: now, singles, is_fast: false };
            return;
        }
        self.singles += singles;
        if elapsed >= WINDOW {
            *self = Self { begun: now, singles: 0, is_fast: self.singles > MANY };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_single_datagrams_a_millisecond_are_fast_and_few_or_runs_are_not() {
        let begun = Instant::now();
        let mut rate = Rate { begun, singles: 0, is_fast: false };
        let at = |micros| begun + Duration::from_micros(micros);
        (1..=9).for_each(|number| rate.note(at(100 * number), 1));
        assert!(!rate.is_fast, "before the first millisecond is over");
        rate.note(at(1000), 1);
        assert!(rate.is_fast);
        (1..=4).for_each(|number| rate.note(at(1000 + 250 * number), 2));
        assert!(!rate.is_fast, "eight are not many");
        (1..=10).for_each(|number| rate.note(at(2000 + 100 * number), 2));
        assert!(rate.is_fast);
        rate.note(at(3100), 0);
        assert!(!rate.is_fast, "runs are there in numbers already");
        (1..=10).for_each(|number| rate.note(at(3100 + 100 * number), 2));
        assert!(rate.is_fast);
        assert!(!rate.is_fast(at(9000)), "after a pause");
        rate.note(at(9000), 1);
        assert!(!rate.is_fast);
    }

    #[tokio::test]
    async fn the_wait_is_short_and_none_where_little_comes() {
        let mut gather = Gather::new().unwrap();
        gather.wait().await.unwrap();
        for _ in 0..3 {
            let begun = Instant::now();
            gather.rate = Rate { begun, singles: 0, is_fast: true };
            gather.wait().await.unwrap();
            assert!(begun.elapsed() >= PAUSE);
        }
    }
}
