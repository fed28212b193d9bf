//! How a peer is reached.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::choice::Taken;

/// A path that was lost is pinged so often at once: where chance takes three of ten both ways, one ping in two is
/// answered, and of a thousand salvos hardly one is not.
const SALVO: u8 = 12;
const SALVO_PAUSE: Duration = Duration::from_millis(6);
/// Between two pings later: the path is taken again within a second of its being back, there and back included.
const PAUSE: Duration = Duration::from_millis(750);
/// The same where nothing was sent for [`QUIET`], and the path was lost longer ago than [`LONG_AGO`].
const LONG_PAUSE: Duration = Duration::from_secs(5);
const LONG_AGO: Duration = Duration::from_secs(30);
const QUIET: Duration = Duration::from_secs(3);

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
    /// Until when answers of ours may be under way by it.
    settles_at: Instant,
    /// Pings of the salvo that are to come.
    salvo: u8,
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
    /// A path does not answer. If that was chance, it soon does.
    pub(super) fn new(now: Instant, address: SocketAddr) -> Self {
        Self { address, since: now, settles_at: now, salvo: SALVO, next: now }
    }

    /// There is no way to it any more, which a ping at once would not change.
    pub(super) fn unreachable(now: Instant, address: SocketAddr, latency: Duration) -> Self {
        Self { address, since: now, settles_at: now + latency, salvo: 0, next: now + PAUSE }
    }

    /// It was given up over another link, or let be because it flapped: it is pinged now.
    pub(super) fn at_once(now: Instant, address: SocketAddr) -> Self {
        Self { address, since: now, settles_at: now, salvo: 0, next: now }
    }

    /// Until when answers of ours may be under way by it.
    pub(super) fn settles_at(&self) -> Instant {
        self.settles_at
    }

    /// When it is pinged next.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Something is sent to the peer: it is worth looking soon, however long ago the path was lost.
    pub(super) fn handle_sent(&mut self, now: Instant) {
        self.next = self.next.min(now + PAUSE);
    }

    /// It is pinged; the last packet was sent so long ago.
    pub(super) fn handle_ping(&mut self, now: Instant, quiet: Duration) {
        let is_soon = quiet < QUIET || now.saturating_duration_since(self.since) < LONG_AGO;
        self.salvo = self.salvo.saturating_sub(1);
        let pause = match self.salvo {
            1.. => SALVO_PAUSE,
            0 if is_soon => PAUSE,
            0 => LONG_PAUSE,
        };
        self.next = now + pause;
    }
}
