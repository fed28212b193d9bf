//! Telling the peer where we are: call-me-maybe (tailnet-data 5.1, 7.3, 7.12).

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{address::probeable, former::Former};
use crate::backoff::Backoff;

/// Our addresses are asked for again when they are older: the next one is then due anyway.
const FRESH: Duration = Duration::from_secs(27);
/// How long fresh ones are waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two messages of our own accord: each makes the peer ping all it knows of us.
const SPACING: Duration = Duration::from_secs(1);
/// Of our own addresses now; with those before and those observed fewer than peers take. Peers ping each of all of
/// them, so that few should be of the past: the one that a peer keeps to is among the latest.
const MAX_OWN: usize = 60;
const MAX_PAST: usize = 6;
const MAX_OBSERVED: usize = 4;
/// A translator that shows us elsewhere at every turn is followed ever more rarely: each time costs the peer its path.
const SHORTEST_STAY: Duration = Duration::from_secs(1);
const LONGEST_STAY: Duration = Duration::from_secs(60);

/// Where we are, were, and seem to be; and who waits to be told.
#[derive(Debug)]
pub(super) struct Calling {
    own: Vec<SocketAddr>,
    collected: Option<Instant>,
    past: Former<MAX_PAST>,
    observed: Former<MAX_OBSERVED>,
    /// By which of its addresses the peer was reached last, and where it saw us then, as far as it was told of it.
    seen: Option<(SocketAddr, SocketAddr)>,
    /// Until when another address is not told.
    stays_until: Option<Instant>,
    stays: Backoff,
    wish: Wish,
    last: Option<Instant>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// Nothing is to be told.
    #[default]
    None,
    /// As soon as our addresses are fresh, and at the latest then.
    Fresh(Instant),
    /// Then; we told the peer just before.
    Later(Instant),
}

/// What comes of a wish.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Telling {
    /// Tell the peer this.
    Now(Vec<SocketAddr>),
    /// Have our addresses collected.
    Refresh,
}

/// What new addresses of ours change.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// There is one that was not there before.
    pub(super) has_gained: bool,
    /// There is one no more.
    pub(super) has_lost: bool,
}

impl Default for Calling {
    fn default() -> Self {
        Self {
            own: Vec::new(),
            collected: None,
            past: Former::default(),
            observed: Former::default(),
            seen: None,
            stays_until: None,
            stays: Backoff::new(SHORTEST_STAY, LONGEST_STAY, 2.0, 0.0),
            wish: Wish::None,
            last: None,
        }
    }
}

impl Calling {
    /// Takes our addresses as just collected.
    pub(super) fn set_own(&mut self, now: Instant, own: &[SocketAddr]) -> News {
        let own = probeable(own, MAX_OWN);
        let mut news = News { has_gained: own.iter().any(|it| !self.own.contains(it)), has_lost: false };
        for gone in self.own.iter().filter(|it| !own.contains(it)) {
            self.past.note(now, *gone);
            news.has_lost = true;
        }
        (self.own, self.collected) = (own, Some(now));
        news
    }

    /// Notes where the peer saw us.
    pub(super) fn note_observed(&mut self, now: Instant, address: SocketAddr) {
        for address in probeable(&[address], 1) {
            self.observed.note(now, address);
        }
    }

    /// Notes where the peer saw us over the path taken. Returns whether that is elsewhere than before: a translator
    /// between us started anew, and the peer sends to where we were.
    pub(super) fn note_seen(&mut self, now: Instant, over: SocketAddr, observed: SocketAddr) -> bool {
        let has_moved = self.seen.is_some_and(|(before, seen)| before == over && seen != observed);
        if has_moved && !self.may_move(now) {
            return false;
        }
        self.seen = Some((over, observed));
        has_moved
    }

    fn may_move(&mut self, now: Instant) -> bool {
        if self.stays_until.is_some_and(|at| now < at) {
            return false;
        }
        if self.stays_until.is_none_or(|at| now.saturating_duration_since(at) >= LONGEST_STAY) {
            self.stays.reset();
        }
        self.stays_until = Some(now + self.stays.next(0.0));
        true
    }

    /// Our link changed: nothing that is known of our addresses counts any more, and who sees us elsewhere then does
    /// not because of a translator.
    pub(super) fn expire(&mut self) {
        (self.collected, self.stays_until) = (None, None);
    }

    /// The peer should be told where we are.
    pub(super) fn wish(&mut self, now: Instant) -> Option<Telling> {
        let is_fresh = self.collected.is_some_and(|at| now.saturating_duration_since(at) <= FRESH);
        let next = self.last.map(|at| at + SPACING).filter(|next| *next > now);
        match (self.wish, next) {
            (Wish::Fresh(_), _) => None,
            (_, _) if !is_fresh => {
                self.wish = Wish::Fresh(now + PATIENCE);
                Some(Telling::Refresh)
            }
            (_, Some(next)) => {
                self.wish = Wish::Later(next);
                None
            }
            (_, None) => self.tell(now),
        }
    }

    /// Our addresses are fresh: who waited for that is told.
    pub(super) fn handle_fresh(&mut self, now: Instant) -> Option<Telling> {
        let Wish::Fresh(_) = self.wish else { return None };
        self.wish = Wish::None;
        self.wish(now)
    }

    /// Nothing is to be told any more.
    pub(super) fn cancel(&mut self) {
        self.wish = Wish::None;
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        match self.wish {
            Wish::None => None,
            Wish::Fresh(at) | Wish::Later(at) => Some(at),
        }
    }

    /// Lets time pass.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Option<Telling> {
        if self.poll_timeout().is_some_and(|due| due <= now) { self.tell(now) } else { None }
    }

    /// All addresses at which the peer may know us, to be told at once.
    pub(super) fn all(&mut self, now: Instant) -> Vec<SocketAddr> {
        let mut all = self.present(now);
        all.extend(self.observed.iter(now).chain(self.past.iter(now)));
        probeable(&all, usize::MAX)
    }

    /// The addresses at which we are now, to be told at once. What a peer was told and is not told again it forgets: so
    /// the one at which it sees us is among them.
    pub(super) fn present(&mut self, now: Instant) -> Vec<SocketAddr> {
        (self.wish, self.last) = (Wish::None, Some(now));
        let seen = self.observed.iter(now).take(1);
        probeable(&self.own.iter().copied().chain(seen).collect::<Vec<_>>(), usize::MAX)
    }

    /// An empty list would say "forget me", and is not told of our own accord.
    fn tell(&mut self, now: Instant) -> Option<Telling> {
        self.wish = Wish::None;
        (!self.own.is_empty()).then(|| Telling::Now(self.present(now)))
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.own.len() + self.past.len() + self.observed.len()
    }
}
