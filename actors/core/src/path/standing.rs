//! How a peer is reached.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::choice::Taken;

/// Between two pings to a path that was lost, at first: it is taken again within a second of its being back.
const PAUSE: Duration = Duration::from_millis(900);
/// The same when it was lost longer ago than [`LONG_AGO`].
const LONG_PAUSE: Duration = Duration::from_secs(5);
const LONG_AGO: Duration = Duration::from_secs(30);

/// Over which way everything goes.
#[derive(Debug, Default)]
pub(super) enum Standing {
    /// The relay: no direct path has shown itself.
    #[default]
    Seeking,
    /// A direct path; the relay as well while it is not trusted.
    Direct(Taken),
    /// The relay, since a direct path was lost.
    Lost(Lost),
    /// The relay: direct paths flap, and are let be for a while.
    Barred {
        /// The path that flaps.
        address: SocketAddr,
        /// When it is tried again.
        until: Instant,
    },
}

/// A path that may come back.
#[derive(Debug)]
pub(super) struct Lost {
    pub(super) address: SocketAddr,
    since: Instant,
    next: Instant,
}

impl Standing {
    /// The direct path that is taken.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.taken().map(Taken::address)
    }

    pub(super) fn taken(&self) -> Option<&Taken> {
        if let Self::Direct(taken) = self { Some(taken) } else { None }
    }

    pub(super) fn taken_mut(&mut self) -> Option<&mut Taken> {
        if let Self::Direct(taken) = self { Some(taken) } else { None }
    }

    pub(super) fn is_trusted(&self, now: Instant) -> bool {
        self.taken().is_some_and(|taken| taken.is_trusted(now))
    }

    pub(super) fn is_barred(&self) -> bool {
        matches!(self, Self::Barred { .. })
    }

    pub(super) fn is_condemned(&self) -> bool {
        self.taken().is_some_and(|taken| taken.suspicion.is_condemned())
    }
}

impl Lost {
    /// A path is lost, and pinged from `next` on.
    pub(super) fn new(now: Instant, address: SocketAddr) -> Self {
        Self { address, since: now, next: now + PAUSE }
    }

    /// The same, pinged at once.
    pub(super) fn at_once(now: Instant, address: SocketAddr) -> Self {
        Self { address, since: now, next: now }
    }

    /// When it is pinged next.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// It is pinged.
    pub(super) fn handle_ping(&mut self, now: Instant) {
        let pause = if now.saturating_duration_since(self.since) < LONG_AGO { PAUSE } else { LONG_PAUSE };
        self.next = now + pause;
    }
}
