//! One run: what it still wants to ask, what it has asked, and what it has heard (tailnet-data 8.3 and 8.4).
//!
//! A run is over when the relays are measured and the questions are settled, or after [`RUN_LIMIT`]. Questions
//! are settled when more answers would add nothing, or when the last one has had a moment to be answered.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use warren_proto::stun::TxId;

use super::{
    Effect, Families, Family, Mappings, RUN_LIMIT, Report, RunId, Unsent,
    plan::{Kind, Probe, StunTarget},
};
use crate::{home::RegionLatency, network::is_inner, relay_map::RegionId};

/// How long the last question may take to be answered before it holds up what is known: a round trip around
/// the world. A later answer still counts until the run is over.
const PATIENCE: Duration = Duration::from_millis(300);

/// A region asked in one family: one answer is enough.
type Asked = (RegionId, Family);

#[derive(Debug)]
pub(super) struct Run {
    pub(super) id: RunId,
    started: Instant,
    kind: Kind,
    /// What is still to be asked, in its order.
    planned: VecDeque<Probe>,
    outstanding: BTreeMap<TxId, Asked>,
    unanswered: BTreeSet<Asked>,
    last_sent: Instant,
    v4: Sending,
    v6: Sending,
    /// Who was the first to answer by IPv4.
    first_server: Option<SocketAddr>,
    is_settled: bool,
    is_measured: bool,
    report: Report,
}

/// How sending went in one family.
#[derive(Debug, Default)]
struct Sending {
    tried: usize,
    failed: usize,
}

impl Sending {
    fn can_send(&self) -> Option<bool> {
        (self.tried > 0).then_some(self.failed < self.tried)
    }
}

impl Run {
    pub(super) fn new(id: RunId, now: Instant, kind: Kind, probes: Vec<Probe>, families: Families) -> Self {
        let unanswered = probes.iter().map(|probe| asked(&probe.to)).collect();
        Self {
            id,
            started: now,
            kind,
            planned: probes.into(),
            outstanding: BTreeMap::new(),
            unanswered,
            last_sent: now,
            v4: Sending::default(),
            v6: Sending::default(),
            first_server: None,
            is_settled: false,
            is_measured: false,
            report: Report { os_has_ipv6: families.v6, ..Report::default() },
        }
    }

    pub(super) fn handle_answer(
        &mut self,
        from: SocketAddr,
        txid: &TxId,
        mapped: SocketAddr,
        effects: &mut VecDeque<Effect>,
    ) -> bool {
        let Some(asked) = self.outstanding.remove(txid) else { return false };
        if !is_plausible(mapped, from, asked.1) {
            return true;
        }
        self.unanswered.remove(&asked);
        self.planned.retain(|probe| self::asked(&probe.to) != asked);
        let before = self.report.mappings;
        self.learn(from, mapped);
        if self.is_settled && self.report.mappings != before {
            effects.push_back(Effect::Mapped(self.report.mappings));
        }
        self.settle_if(Self::has_enough, effects);
        true
    }

    pub(super) fn handle_unsent(&mut self, txid: &TxId, why: Unsent, effects: &mut VecDeque<Effect>) {
        let Some(asked) = self.outstanding.remove(txid) else { return };
        let sending = self.sending(asked.1);
        match why {
            Unsent::NoAddress => sending.tried = sending.tried.saturating_sub(1),
            Unsent::Refused => sending.failed += 1,
        }
        let is_planned = self.planned.iter().any(|probe| self::asked(&probe.to) == asked);
        let is_outstanding = self.outstanding.values().any(|other| *other == asked);
        if !is_planned && !is_outstanding {
            self.unanswered.remove(&asked);
        }
        self.settle_if(Self::has_enough, effects);
    }

    pub(super) fn handle_latency(&mut self, region: RegionId, latency: RegionLatency) {
        if latency.best().is_none() {
            return;
        }
        let known = self.report.latencies.entry(region).or_default();
        known.v4 = known.v4.into_iter().chain(latency.v4).min();
        known.v6 = known.v6.into_iter().chain(latency.v6).min();
    }

    pub(super) fn handle_measured(&mut self) {
        self.is_measured = true;
    }

    /// May be past; not again after [`Self::handle_timeout`], except when the run is over.
    pub(super) fn poll_timeout(&self) -> Instant {
        if self.is_measured && self.is_settled {
            return self.started;
        }
        let limit = self.started + RUN_LIMIT;
        let next = match self.planned.front() {
            Some(probe) => self.started + probe.after,
            None if !self.is_settled => self.last_sent + PATIENCE,
            None => limit,
        };
        next.min(limit)
    }

    pub(super) fn handle_timeout(
        &mut self,
        now: Instant,
        random: &mut impl FnMut(&mut [u8]),
        effects: &mut VecDeque<Effect>,
    ) {
        while self.is_next_due(now)
            && let Some(probe) = self.planned.pop_front()
        {
            self.ask(now, probe.to, random, effects);
        }
        self.settle_if(
            |run| run.has_enough() || (run.planned.is_empty() && run.last_sent + PATIENCE <= now),
            effects,
        );
    }

    pub(super) fn is_over(&self, now: Instant) -> bool {
        (self.is_measured && self.is_settled) || self.started + RUN_LIMIT <= now
    }

    /// What it found out. Whoever waits for the mappings is told of them first.
    pub(super) fn finish(mut self, effects: &mut VecDeque<Effect>) -> (Kind, Report) {
        self.settle_if(|_| true, effects);
        let (can_send_v4, can_send_v6) = (self.v4.can_send(), self.v6.can_send());
        (self.kind, Report { can_send_v4, can_send_v6, ..self.report })
    }
}

impl Run {
    fn is_next_due(&self, now: Instant) -> bool {
        self.planned.front().is_some_and(|probe| self.started + probe.after <= now)
    }

    fn ask(
        &mut self,
        now: Instant,
        to: StunTarget,
        random: &mut impl FnMut(&mut [u8]),
        effects: &mut VecDeque<Effect>,
    ) {
        let mut txid = TxId::default();
        random(&mut txid);
        self.outstanding.insert(txid, asked(&to));
        self.sending(to.family).tried += 1;
        self.last_sent = now;
        effects.push_back(Effect::SendStun { to, txid });
    }

    /// The first answer says what we are; a second one, by another server, whether everybody sees the same.
    fn learn(&mut self, from: SocketAddr, mapped: SocketAddr) {
        let Mappings { v4, v6, varies_by_destination: varies } = &mut self.report.mappings;
        match (mapped, self.first_server) {
            (SocketAddr::V6(mapped), _) => *v6 = v6.or(Some(mapped)),
            (SocketAddr::V4(mapped), None) => {
                self.first_server = Some(from);
                *v4 = Some(mapped);
            }
            (SocketAddr::V4(mapped), Some(first)) => {
                if from != first && *v4 != Some(mapped) {
                    *varies = Some(true);
                } else if from.ip() != first.ip() {
                    *varies = varies.or(Some(false));
                }
            }
        }
    }

    /// Whether more answers would add nothing.
    fn has_enough(&self) -> bool {
        let mappings = &self.report.mappings;
        let is_enough = |(_, family): &Asked| match family {
            Family::V4 => mappings.varies_by_destination.is_some(),
            Family::V6 => mappings.v6.is_some(),
        };
        self.unanswered.iter().all(is_enough)
    }

    fn settle_if(&mut self, is_settled: impl Fn(&Self) -> bool, effects: &mut VecDeque<Effect>) {
        if !self.is_settled && is_settled(self) {
            self.is_settled = true;
            effects.push_back(Effect::Mapped(self.report.mappings));
        }
    }

    fn sending(&mut self, family: Family) -> &mut Sending {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }
}

fn asked(to: &StunTarget) -> Asked {
    (to.region, to.family)
}

/// A server may be wrong or lie: what it says must be something that a peer could send to. Only a server on
/// this machine sees us at a loopback address.
fn is_plausible(mapped: SocketAddr, from: SocketAddr, family: Family) -> bool {
    let ip = mapped.ip();
    let is_known = Family::of(ip) == family && Family::of(from.ip()) == family;
    let is_host = !ip.is_unspecified() && !ip.is_multicast() && !is_inner(ip);
    is_known && is_host && mapped.port() != 0 && (!ip.is_loopback() || from.ip().is_loopback())
}
