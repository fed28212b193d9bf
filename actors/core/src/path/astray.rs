//! A peer that takes a path which we do not have. Our answer reached it, so that it trusts the path, and then its own
//! direction died: our pings stay unanswered, and so does everything, since its packets go astray until its trust ends
//! (tailnet-data 7.1). Nothing else tells of it, for whoever seeks a path suspects none.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::backoff::Backoff;

/// So many pings, so far apart, decide, after the one that goes out when the peer's comes, as always.
const PINGS: u8 = 4;
const PAUSE: Duration = Duration::from_millis(100);
/// A peer that was heard so shortly before the verdict does send by the relay, and not only what was under way there.
const HEARD_WITHIN: Duration = Duration::from_millis(150);
/// Peers that say nothing because they have nothing to say are let be.
const SHORTEST_REST: Duration = Duration::from_secs(5);
const LONGEST_REST: Duration = Duration::from_secs(10 * 60);

/// Whether what the peer sends may go astray.
#[derive(Debug)]
pub(super) struct Astray {
    doubt: Doubt,
    rests: Backoff,
}

#[derive(Debug, Clone, Copy)]
enum Doubt {
    None,
    /// It pinged us from there and was answered: our pings should be, too, or something be heard.
    Asking {
        from: SocketAddr,
        heard: Option<Instant>,
        left: u8,
        next: Instant,
    },
    /// It was told.
    Resting {
        until: Instant,
    },
}

/// What is to be done about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Ping it there.
    Ask(SocketAddr),
    /// Make it leave that path.
    Withdraw,
}

impl Default for Astray {
    fn default() -> Self {
        Self { doubt: Doubt::None, rests: Backoff::new(SHORTEST_REST, LONGEST_REST, 4.0, 0.0) }
    }
}

impl Astray {
    /// A ping of the peer is answered although no path is taken.
    pub(super) fn handle_ping(&mut self, now: Instant, from: SocketAddr) {
        let is_open = match self.doubt {
            Doubt::None => true,
            Doubt::Asking { .. } => false,
            Doubt::Resting { until } => until <= now,
        };
        if is_open {
            self.doubt = Doubt::Asking { from, heard: None, left: PINGS, next: now + PAUSE };
        }
    }

    /// Data came, by whatever way.
    pub(super) fn handle_heard(&mut self, now: Instant) {
        if let Doubt::Asking { heard, .. } = &mut self.doubt {
            *heard = Some(now);
        }
    }

    /// What was asked over another link, or before the peer was let be, says nothing.
    pub(super) fn forget(&mut self) {
        self.doubt = Doubt::None;
    }

    /// We have a path as well.
    pub(super) fn handle_found(&mut self) {
        self.doubt = Doubt::None;
        self.rests.reset();
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        if let Doubt::Asking { next, .. } = self.doubt { Some(next) } else { None }
    }

    /// Lets time pass.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Option<Next> {
        match &mut self.doubt {
            Doubt::Asking { from, left, next, .. } if *next <= now && *left > 0 => {
                *left -= 1;
                *next = now + PAUSE;
                Some(Next::Ask(*from))
            }
            Doubt::Asking { next, heard: Some(heard), .. }
                if *next <= now && now.saturating_duration_since(*heard) < HEARD_WITHIN =>
            {
                self.doubt = Doubt::None;
                None
            }
            Doubt::Asking { next, .. } if *next <= now => {
                self.doubt = Doubt::Resting { until: now + self.rests.next(0.0) };
                Some(Next::Withdraw)
            }
            Doubt::None | Doubt::Asking { .. } | Doubt::Resting { .. } => None,
        }
    }
}
