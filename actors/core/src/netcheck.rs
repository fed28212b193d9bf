//! Netcheck: how the world sees us, and how far the relays are (tailnet-data 8).
//!
//! ```text
//! map, families, usage, triggers ──> is a run due? ──> plan ──> questions by STUN ──> Mapped
//!                                                       └──> latencies by HTTPS ───> Finished
//! ```
//!
//! One run at a time, at most 2 s long. What comes up while one is under way makes one more, except a change
//! of the network: that abandons the run, whose questions left by a network that is gone. Inputs only take
//! note; [`Netcheck::handle_timeout`] begins, asks and ends. However often it is triggered, a minute has a
//! bounded number of runs, and a run a bounded number of questions. The home region is chosen from the reports
//! by [`crate::home`].

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6},
    sync::Arc,
    time::{Duration, Instant},
};

use warren_proto::stun::TxId;

use crate::{
    home::{self, RegionLatency},
    relay_map::{RegionId, RelayMap},
};

mod plan;
mod run;

use plan::{Kind, Past};
pub use plan::{MAX_PROBES, StunHost, StunTarget};
use run::Run;

/// How long a run may take; what has not answered by then is not in its report.
pub const RUN_LIMIT: Duration = Duration::from_secs(2);
/// Between the end of a run and the next one, while the tunnel is in use. Below the 30 s for which the most
/// forgetful NATs keep a mapping; the spread keeps many machines behind one NAT out of step.
const LEAST_PERIOD: Duration = Duration::from_secs(20);
const PERIOD_SPREAD: Duration = Duration::from_secs(6);
/// A tunnel without a packet for this long is not in use: no peer probes then, and mappings may go.
const IN_USE: Duration = Duration::from_secs(45);
/// How often everybody is asked rather than the nearest.
const FULL_PERIOD: Duration = Duration::from_secs(5 * 60);
/// Runs that may begin within [`PACE_WINDOW`], whatever the reasons: a network that comes and goes every
/// second is still looked at each time.
const MOST_RUNS: usize = 12;
const PACE_WINDOW: Duration = Duration::from_secs(12);

/// An IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The one of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// The families in which this machine has an address that leads anywhere.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Families {
    /// It has such an IPv4 address.
    pub v4: bool,
    /// It has such an IPv6 address.
    pub v6: bool,
}

impl Families {
    fn has(self, family: Family) -> bool {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// Why a run is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// What we know may be out of date: a relay connection was lost, or a peer is to be told fresh endpoints.
    Refresh,
    /// Addresses, routes or sockets are others than before, or the machine has slept.
    NetworkChanged,
}

/// Whether anybody needs to reach us.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// How many peers there are.
    pub peers: usize,
    /// When the tunnel's device read or wrote a packet last.
    pub last_packet: Option<Instant>,
}

impl Usage {
    fn is_in_use(&self, now: Instant) -> bool {
        let is_recent = |at: Instant| now.saturating_duration_since(at) <= IN_USE;
        self.peers > 0 && self.last_packet.is_some_and(is_recent)
    }
}

/// Tells runs apart: what belongs to an older one is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct RunId(u64);

/// What the owner has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Send a question, from the socket that carries WireGuard. What cannot be sent is told by
    /// [`Netcheck::handle_unsent`].
    SendStun {
        /// Whom to ask.
        to: StunTarget,
        /// What the answer must carry.
        txid: TxId,
    },
    /// Measure every relay region by HTTPS, within what is left of [`RUN_LIMIT`], and tell each by
    /// [`Netcheck::handle_latency`] and the end by [`Netcheck::handle_measured`]. One that is under way for an
    /// older run is of no use any more.
    MeasureLatencies {
        /// Which run this is for.
        run: RunId,
    },
    /// This is how the world sees us now. Comes before the report, since relays may be slow; again if a late
    /// answer adds to it.
    Mapped(Mappings),
    /// A run is over.
    Finished(Report),
}

/// The addresses that our sockets have to the world.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mappings {
    /// Of the IPv4 socket.
    pub v4: Option<SocketAddrV4>,
    /// Of the IPv6 socket.
    pub v6: Option<SocketAddrV6>,
    /// Whether the IPv4 socket's depends on who is asked, so that a peer will see another one than a server
    /// does; `None` where too few servers answered to tell.
    pub varies_by_destination: Option<bool>,
}

/// What a run found out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// How the world sees us.
    pub mappings: Mappings,
    /// How far each relay region is; those that did not answer are absent.
    pub latencies: home::Report,
    /// Whether a question could be sent by IPv4; `None` where there was none to send.
    pub can_send_v4: Option<bool>,
    /// Whether a question could be sent by IPv6; `None` where there was none to send.
    pub can_send_v6: Option<bool>,
    /// Whether this machine has an IPv6 address that leads anywhere.
    pub os_has_ipv6: bool,
}

impl Report {
    /// Whether UDP gets out and back.
    pub fn has_udp(&self) -> bool {
        self.mappings.v4.is_some() || self.mappings.v6.is_some()
    }

    /// Whether anybody answered by IPv4.
    pub fn has_ipv4(&self) -> bool {
        self.mappings.v4.is_some() || self.latencies.values().any(|latency| latency.v4.is_some())
    }

    /// Whether anybody answered by IPv6.
    pub fn has_ipv6(&self) -> bool {
        self.mappings.v6.is_some() || self.latencies.values().any(|latency| latency.v6.is_some())
    }
}

/// Why a question was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsent {
    /// The server has no address in this family.
    NoAddress,
    /// The socket refused it.
    Refused,
}

/// Decides when to look, whom to ask, and what the answers mean.
#[derive(Debug)]
pub struct Netcheck {
    map: Arc<RelayMap>,
    families: Families,
    usage: Usage,
    home: Option<RegionId>,
    /// When a run is wanted, or one more after the present one.
    due: Option<Instant>,
    pace: Pace,
    run: Option<Run>,
    /// Counts runs.
    generation: u64,
    /// Runs in a row that nobody answered by UDP.
    unanswered: usize,
    last: Option<Report>,
    last_full: Option<Instant>,
    effects: VecDeque<Effect>,
}

impl Default for Netcheck {
    fn default() -> Self {
        Self::new()
    }
}

impl Netcheck {
    /// One that knows of no relays and no network yet, and so does nothing.
    pub fn new() -> Self {
        Self {
            map: Arc::default(),
            families: Families::default(),
            usage: Usage::default(),
            home: None,
            due: None,
            pace: Pace::default(),
            run: None,
            generation: 0,
            unanswered: 0,
            last: None,
            last_full: None,
            effects: VecDeque::new(),
        }
    }

    /// Takes the relay map; another one than before makes a run due.
    pub fn set_map(&mut self, now: Instant, map: Arc<RelayMap>) {
        if self.map != map {
            self.map = map;
            self.handle_trigger(now, Trigger::Refresh);
        }
    }

    /// Takes the families that there are; others than before are a change of the network.
    pub fn set_families(&mut self, now: Instant, families: Families) {
        if self.families != families {
            self.families = families;
            self.handle_trigger(now, Trigger::NetworkChanged);
        }
    }

    /// Takes who needs to reach us; the first peer makes a run due. Is looked at when a run ends: call it
    /// before [`Self::handle_timeout`].
    pub fn set_usage(&mut self, now: Instant, usage: Usage) {
        if self.usage.peers == 0 && usage.peers > 0 {
            self.handle_trigger(now, Trigger::Refresh);
        }
        self.usage = usage;
    }

    /// Takes the home region, whose server is asked more insistently.
    pub fn set_home(&mut self, home: Option<RegionId>) {
        self.home = home;
    }

    /// Wants a run: now, or after the present one if that one serves as well as any. Nothing comes of it
    /// while there are no relays or no network; their return is a trigger of its own.
    pub fn handle_trigger(&mut self, now: Instant, trigger: Trigger) {
        self.due = Some(self.due.map_or(now, |due| due.min(now)));
        match trigger {
            Trigger::Refresh => {}
            Trigger::NetworkChanged => self.abandon(now),
        }
    }

    /// Takes an answer that came from `from`. Returns whether it was asked for.
    pub fn handle_stun_answer(&mut self, from: SocketAddr, txid: &TxId, mapped: SocketAddr) -> bool {
        let Some(run) = &mut self.run else { return false };
        run.handle_answer(from, txid, mapped, &mut self.effects)
    }

    /// A question could not be sent.
    pub fn handle_unsent(&mut self, txid: &TxId, why: Unsent) {
        if let Some(run) = &mut self.run {
            run.handle_unsent(txid, why, &mut self.effects);
        }
    }

    /// Takes the latency of one region.
    pub fn handle_latency(&mut self, id: RunId, region: RegionId, latency: RegionLatency) {
        let is_relay = self.map.relay_regions().any(|relay| relay.id == region);
        if let Some(run) = self.run.as_mut().filter(|run| is_relay && run.id == id) {
            run.handle_latency(region, latency);
        }
    }

    /// Every region answered, or will not.
    pub fn handle_measured(&mut self, id: RunId) {
        if let Some(run) = self.run.as_mut().filter(|run| run.id == id) {
            run.handle_measured();
        }
    }

    /// When [`Self::handle_timeout`] is due next; may be past.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match &self.run {
            Some(run) => Some(run.poll_timeout()),
            None => self.due.map(|due| self.pace.ready().map_or(due, |ready| ready.max(due))),
        }
    }

    /// Lets time pass. `random` fills what it is given with random bytes.
    pub fn handle_timeout(&mut self, now: Instant, mut random: impl FnMut(&mut [u8])) {
        self.progress(now, &mut random);
        let is_due = self.run.is_none() && self.poll_timeout().is_some_and(|due| due <= now);
        if is_due {
            self.due = None;
            self.begin(now);
            self.progress(now, &mut random);
        }
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// The run that began last.
    pub fn latest_run(&self) -> RunId {
        RunId(self.generation)
    }

    /// Whether a run is under way.
    pub fn is_running(&self) -> bool {
        self.run.is_some()
    }

    /// What the last run that came to its end found out.
    pub fn last(&self) -> Option<&Report> {
        self.last.as_ref()
    }
}

impl Netcheck {
    fn begin(&mut self, now: Instant) {
        if self.map.regions.is_empty() || self.families.is_empty() {
            return;
        }
        self.pace.record(now);
        self.generation += 1;
        let id = RunId(self.generation);
        let past = Past {
            report: self.last.as_ref(),
            home: self.home,
            unanswered: self.unanswered,
            turn: self.generation,
        };
        let kind = self.kind(now);
        let probes = plan::probes(kind, &self.map, self.families, &past);
        let has_relays = self.map.relay_regions().next().is_some();
        if has_relays {
            self.effects.push_back(Effect::MeasureLatencies { run: id });
        }
        let mut run = Run::new(id, now, kind, probes, self.families);
        if !has_relays {
            run.handle_measured();
        }
        self.run = Some(run);
    }

    fn kind(&self, now: Instant) -> Kind {
        let has_latencies = self.last.as_ref().is_some_and(|report| !report.latencies.is_empty());
        let is_recent = |at: Instant| now.saturating_duration_since(at) < FULL_PERIOD;
        if has_latencies && self.last_full.is_some_and(is_recent) { Kind::Incremental } else { Kind::Full }
    }

    fn progress(&mut self, now: Instant, random: &mut impl FnMut(&mut [u8])) {
        let Some(run) = &mut self.run else { return };
        run.handle_timeout(now, random, &mut self.effects);
        if let Some(run) = self.run.take_if(|run| run.is_over(now)) {
            self.end(now, run, random);
        }
    }

    fn end(&mut self, now: Instant, run: Run, random: &mut impl FnMut(&mut [u8])) {
        let (kind, report) = run.finish(&mut self.effects);
        self.unanswered = if report.has_udp() { 0 } else { self.unanswered.saturating_add(1) };
        if kind == Kind::Full {
            self.last_full = Some(now);
        }
        self.last = Some(report.clone());
        self.effects.push_back(Effect::Finished(report));
        if self.due.is_none() && self.usage.is_in_use(now) {
            self.due = Some(now + period(random));
        }
    }

    /// What the run has found is of a network that is gone, and so is what it still wants. It goes on where
    /// its successor would have to wait: a network that never stops changing is better known badly than not.
    fn abandon(&mut self, now: Instant) {
        let may_begin = self.pace.ready().is_none_or(|ready| ready <= now);
        if may_begin && self.run.take().is_some() {
            self.effects.retain(|effect| matches!(effect, Effect::Finished(_)));
        }
    }
}

fn period(random: &mut impl FnMut(&mut [u8])) -> Duration {
    let mut bytes = [0; 4];
    random(&mut bytes);
    let share = f64::from(u32::from_be_bytes(bytes)) / f64::from(u32::MAX);
    LEAST_PERIOD + PERIOD_SPREAD.mul_f64(share)
}

/// When the last few runs began.
#[derive(Debug, Default)]
struct Pace {
    begun: VecDeque<Instant>,
}

impl Pace {
    /// When the next may begin, if not at any time.
    fn ready(&self) -> Option<Instant> {
        let oldest = self.begun.front().filter(|_| self.begun.len() >= MOST_RUNS)?;
        Some(*oldest + PACE_WINDOW)
    }

    fn record(&mut self, now: Instant) {
        if self.begun.len() >= MOST_RUNS {
            self.begun.pop_front();
        }
        self.begun.push_back(now);
    }
}

#[cfg(test)]
mod tests;
