//! Which of two addresses is better, and the one that is taken: how long an answer lets it be trusted
//! (tailnet-data 7.1, 7.4).

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use super::suspicion::{Patience, Suspicion};

/// How long an answer lets an address carry everything alone: two lost heartbeats.
pub(super) const TRUST: Duration = Duration::from_millis(6500);
/// An address without trust for this long, a ping's lifetime, is dead: it does not compete any more.
const DEAD_AFTER: Duration = Duration::from_secs(5);

const LOOPBACK_POINTS: u128 = 50;
const PRIVATE_POINTS: u128 = 20;
const IPV6_POINTS: u128 = 10;

/// An address that answered, and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// The address that was pinged.
    pub address: SocketAddr,
    /// The latest round trip.
    pub latency: Duration,
}

/// The direct path that is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Best {
    /// The peer's address.
    pub address: SocketAddr,
    /// The latest round trip.
    pub latency: Duration,
    /// Until when the latest answer lets it carry everything alone.
    pub trusted_until: Instant,
}

impl Best {
    /// Whether the path is trusted.
    pub fn is_trusted(&self, now: Instant) -> bool {
        now < self.trusted_until
    }
}

/// Whether `a` should replace `b`. All peers judge alike, so that both ends take the same path.
pub fn better(a: Option<Measured>, b: Option<Measured>) -> bool {
    let Some(a) = a else { return false };
    let Some(b) = b else { return true };
    if a.address == b.address {
        return false;
    }
    let (ours, theirs) = (points(&a, &b), points(&b, &a));
    // One percent is noise.
    if ours <= 1 && theirs == 0 { false } else { ours > theirs }
}

/// By how many percent `it` is faster than `other`, and what its kind of address is worth.
fn points(it: &Measured, other: &Measured) -> u128 {
    let (faster, slower) = (it.latency.as_nanos(), other.latency.as_nanos());
    let speed = if faster < slower { 100 - faster * 100 / slower } else { 0 };
    let ip = it.address.ip();
    let nearness = if ip.is_loopback() {
        LOOPBACK_POINTS
    } else if is_private(&ip) {
        PRIVATE_POINTS
    } else {
        0
    };
    speed + nearness + if ip.is_ipv6() { IPV6_POINTS } else { 0 }
}

fn is_private(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

/// The direct path that is taken, and what is thought of it.
#[derive(Debug)]
pub(super) struct Taken {
    best: Best,
    /// Where its answers come from: a host with several addresses may choose another one for them, and for data.
    source: SocketAddr,
    pub(super) suspicion: Suspicion,
}

impl Taken {
    /// A path that answered at `at`.
    pub(super) fn new(at: Instant, measured: Measured) -> Self {
        let Measured { address, latency } = measured;
        let best = Best { address, latency, trusted_until: at + TRUST };
        Self { best, source: address, suspicion: Suspicion::default() }
    }

    /// Its latest answer came from there.
    pub(super) fn note_source(&mut self, source: SocketAddr) {
        self.source = source;
    }

    /// Whether what comes from there comes by this path.
    pub(super) fn is_from(&self, source: SocketAddr) -> bool {
        source == self.source || source == self.best.address
    }

    pub(super) fn best(&self) -> Best {
        self.best
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.best.address
    }

    pub(super) fn latency(&self) -> Duration {
        self.best.latency
    }

    /// Whether it may carry everything alone.
    pub(super) fn is_trusted(&self, now: Instant) -> bool {
        self.best.is_trusted(now) && self.suspicion.is_calm()
    }

    /// When its last answer is so old.
    pub(super) fn ages_at(&self, age: Duration) -> Instant {
        let until = self.best.trusted_until + age;
        until.checked_sub(TRUST).unwrap_or(until)
    }

    /// What a newcomer competes with: nothing, if this one is dead.
    pub(super) fn rival(&self, now: Instant) -> Option<Measured> {
        let is_dead = self.suspicion.is_condemned() || now > self.best.trusted_until + DEAD_AFTER;
        let Best { address, latency, .. } = self.best;
        (!is_dead).then_some(Measured { address, latency })
    }

    /// Its ping was answered.
    pub(super) fn handle_answer(&mut self, now: Instant, latency: Duration, patience: Patience) {
        self.best.latency = latency;
        self.best.trusted_until = now + TRUST;
        self.suspicion.handle_answer(now, patience.on(latency));
    }

    /// What it was is worth nothing: it has to answer again.
    pub(super) fn distrust(&mut self, now: Instant) {
        self.best.trusted_until = now;
        self.suspicion = Suspicion::default();
    }
}
