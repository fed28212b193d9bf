//! The choice of our home region (tailnet-data 8.6): the relay where peers reach us. Fast measurements
//! win, but not by a hair, and a home that works is not left for one missed measurement.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use crate::relay_map::{Region, RegionId, RelayMap};

/// Measurements older than this say nothing any more.
const MEMORY: Duration = Duration::from_secs(5 * 60);
/// More reports than [`MEMORY`] ever holds at one a few seconds; a bound for callers that measure faster.
const MAX_REPORTS: usize = 128;
/// Another region must be this much faster, and by [`WORTHWHILE_FACTOR`], to become home.
const WORTHWHILE_GAIN: Duration = Duration::from_millis(10);
/// Another region's latency must be below this share of the present home's.
const WORTHWHILE_FACTOR: f64 = 2.0 / 3.0;
/// A healthy home is kept through this many reports without it.
const TOLERATED_MISSES: u8 = 2;

/// Our own latency to one region, as measured over HTTP.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RegionLatency {
    /// Over IPv4.
    pub v4: Option<Duration>,
    /// Over IPv6.
    pub v6: Option<Duration>,
}

impl RegionLatency {
    /// The smaller of the two.
    pub fn best(&self) -> Option<Duration> {
        self.v4.into_iter().chain(self.v6).min()
    }
}

/// One round of measurements; regions that did not answer are absent or have neither latency.
pub type Report = BTreeMap<RegionId, RegionLatency>;

/// Whether the relay link to the present home is alive (frames within the last 120 s).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HomeLink {
    /// It is.
    Healthy,
    /// It is not, or there is no home.
    Unhealthy,
}

/// Chooses and keeps the home region.
#[derive(Debug)]
pub struct Homes {
    home: Option<RegionId>,
    misses: u8,
    seed: u64,
    reports: VecDeque<(Instant, Latencies)>,
}

impl Homes {
    /// A chooser that starts from `home`, if one was chosen before. `seed` decides where nothing was
    /// measured, the same for the life of the process.
    pub fn new(home: Option<RegionId>, seed: u64) -> Self {
        Self { home, misses: 0, seed, reports: VecDeque::new() }
    }

    /// The present home.
    pub fn home(&self) -> Option<RegionId> {
        self.home
    }

    /// Takes a new map: leaves a home that is no relay region any more. Without a home, takes the only relay
    /// region there is without waiting for a measurement, or the fastest of the last one. Returns the home.
    pub fn handle_map(&mut self, map: &RelayMap) -> Option<RegionId> {
        self.leave_vanished(map);
        if self.home.is_none() {
            let home = match *candidates(map, |_| true) {
                [only] => Some(only),
                _ => self.fastest(map, &self.measured_last()),
            };
            self.move_to(home);
        }
        self.home
    }

    /// Takes a round of measurements and returns the home, chosen anew.
    pub fn handle_report(
        &mut self,
        now: Instant,
        map: &RelayMap,
        report: &Report,
        link: HomeLink,
    ) -> Option<RegionId> {
        let measured: Latencies = report.iter().filter_map(|(id, it)| Some((*id, it.best()?))).collect();
        self.remember(now, &measured);
        self.leave_vanished(map);
        if !self.should_wait(&measured, link) {
            self.move_to(self.fastest(map, &measured).or(self.home).or_else(|| self.anyone(map)));
        }
        self.home
    }

    fn remember(&mut self, now: Instant, measured: &Latencies) {
        self.reports.push_back((now, measured.clone()));
        let too_old = |at: Instant| now.saturating_duration_since(at) > MEMORY;
        while self.reports.len() > MAX_REPORTS || self.reports.front().is_some_and(|(at, _)| too_old(*at)) {
            self.reports.pop_front();
        }
    }

    fn measured_last(&self) -> Latencies {
        self.reports.back().map(|(_, report)| report.clone()).unwrap_or_default()
    }

    fn leave_vanished(&mut self, map: &RelayMap) {
        self.home = self.home.filter(|home| map.relay_regions().any(|region| region.id == *home));
    }

    /// Whether a home that works is kept although this report lacks it.
    fn should_wait(&mut self, measured: &Latencies, link: HomeLink) -> bool {
        let missed = self.home.is_some_and(|home| !measured.contains_key(&home));
        self.misses = if missed { self.misses.saturating_add(1) } else { 0 };
        missed && link == HomeLink::Healthy && self.misses <= TOLERATED_MISSES
    }

    fn fastest(&self, map: &RelayMap, measured: &Latencies) -> Option<RegionId> {
        let eligible = candidates(map, |id| measured.contains_key(&id));
        let lately = |id: &RegionId| scaled(self.best_lately(*id), map.score(*id));
        let winner = eligible.iter().copied().min_by_key(lately)?;
        let Some(old) = self.home.filter(|old| eligible.contains(old)) else { return Some(winner) };
        let current = scaled(*measured.get(&old)?, map.score(old));
        Some(if is_worthwhile(current, lately(&winner)) { winner } else { old })
    }

    fn best_lately(&self, id: RegionId) -> Duration {
        self.reports.iter().filter_map(|(_, report)| report.get(&id)).min().copied().unwrap_or(Duration::MAX)
    }

    fn anyone(&self, map: &RelayMap) -> Option<RegionId> {
        let candidates = candidates(map, |_| true);
        let count = u64::try_from(candidates.len()).ok().filter(|count| *count > 0)?;
        candidates.get(usize::try_from(self.seed % count).ok()?).copied()
    }

    fn move_to(&mut self, home: Option<RegionId>) {
        if self.home != home {
            self.misses = 0;
        }
        self.home = home;
    }
}

type Latencies = BTreeMap<RegionId, Duration>;

/// Regions that may become home: with a relay, accepted, and not to be avoided unless nothing else is left.
fn candidates(map: &RelayMap, accept: impl Fn(RegionId) -> bool) -> Vec<RegionId> {
    let relays: Vec<&Region> = map.relay_regions().filter(|region| accept(region.id)).collect();
    let all_avoided = relays.iter().all(|region| region.avoid);
    relays.into_iter().filter(|region| all_avoided || !region.avoid).map(|region| region.id).collect()
}

fn is_worthwhile(current: Duration, candidate: Duration) -> bool {
    let gain = current.saturating_sub(candidate);
    gain >= WORTHWHILE_GAIN && candidate.as_secs_f64() <= WORTHWHILE_FACTOR * current.as_secs_f64()
}

/// A score comes from the network: its product must not overflow a [`Duration`], which would panic.
fn scaled(latency: Duration, score: f64) -> Duration {
    Duration::try_from_secs_f64(latency.as_secs_f64() * score).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests;
