//! Addresses that were ours: the peer may still send there (tailnet-data 7.12, step 2).

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// How long after another took its place. Whoever sends there still has heard nothing of us for that long.
const KEPT: Duration = Duration::from_secs(120);

/// The latest `N` different addresses, the newest last. That one is kept until another is noted: as long as nothing
/// is sent, the peer keeps to it.
#[derive(Debug, Default)]
pub(super) struct Former<const N: usize>(VecDeque<(SocketAddr, Instant)>);

impl<const N: usize> Former<N> {
    /// Makes an address the newest.
    pub(super) fn note(&mut self, now: Instant, address: SocketAddr) {
        match self.0.back_mut() {
            Some((newest, _)) if *newest == address => return,
            // Its time begins when another is the newest.
            Some((_, since)) => *since = now,
            None => {}
        }
        self.0.retain(|(it, since)| *it != address && is_kept(now, *since));
        if self.0.len() >= N {
            self.0.pop_front();
        }
        self.0.push_back((address, now));
    }

    /// The newest first.
    pub(super) fn iter(&self, now: Instant) -> impl Iterator<Item = SocketAddr> {
        let former = self.0.iter().rev().skip(1).filter(move |(_, since)| is_kept(now, *since));
        self.0.back().into_iter().chain(former).map(|(address, _)| *address)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

fn is_kept(now: Instant, since: Instant) -> bool {
    now.saturating_duration_since(since) <= KEPT
}
