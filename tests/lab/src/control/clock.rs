//! The lab's own time.
//!
//! Every timer of the lab is tokio's, so that a test with a paused clock has them all in its hand: pings of
//! websockets and of yamux, keep-alives of relays, heartbeats, telemetry. This clock tells the date by them,
//! for what expires at one; it can be put forward where the runtime's clock cannot be paused.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::Instant;

/// Tells the date.
pub(crate) struct Clock {
    /// When it was made, and the date then.
    start: (Instant, Duration),
    ahead: Mutex<Duration>,
}

impl Default for Clock {
    fn default() -> Self {
        let date = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { start: (Instant::now(), date), ahead: Mutex::default() }
    }
}

impl Clock {
    /// The time since 1970.
    pub(crate) fn date(&self) -> Duration {
        let (start, date) = self.start;
        date + start.elapsed() + *self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the date forward.
    pub(crate) fn advance(&self, by: Duration) {
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) += by;
    }
}
