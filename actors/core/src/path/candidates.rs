//! The addresses at which a peer may be, why each is believed, and when it was pinged (tailnet-data 7.2).
//!
//! A candidate is kept while any of its sources holds: the node message lists it, the latest call-me-maybe lists it,
//! or the peer pinged us from there lately.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use warren_proto::disco::TxId;

use super::{address::probeable, choice::Measured};

/// More than any machine has; what a peer can make us ping in one round.
pub(super) const MAX_CANDIDATES: usize = 100;
/// How long a ping from an address keeps it.
const PINGED_KEEPS: Duration = Duration::from_secs(45);
/// Between two pings to one address, where nothing hurries.
pub(super) const SPACING: Duration = Duration::from_secs(5);
/// A round leaves out whoever was pinged within this time. Less than from the repetition of the first round, a second
/// after it, to the second one.
const LEAST_SPACING: Duration = Duration::from_millis(3500);
/// Between two hurried pings to an address at which the peer is.
const HURRIED_SPACING: Duration = Duration::from_millis(100);
/// The same where the peer never was, as far as anybody knows: it names what it likes.
const BLIND_SPACING: Duration = Duration::from_secs(1);

/// One address, and what is known of it.
#[derive(Debug, Default)]
struct Candidate {
    is_listed: bool,
    is_called: bool,
    pinged_us: Option<PingedUs>,
    pinged: Option<Instant>,
    answered: Option<Answered>,
    is_hurried: bool,
}

/// The latest ping from there.
#[derive(Debug)]
struct PingedUs {
    at: Instant,
    txid: TxId,
}

/// The latest answer from there.
#[derive(Debug, Clone, Copy)]
struct Answered {
    at: Instant,
    latency: Duration,
}

/// What a ping from an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// From where nobody knew the peer to be.
    New,
    /// Another one.
    Known,
    /// The same again, by another way.
    Duplicate,
}

/// All candidates of one peer.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    known: BTreeMap<SocketAddr, Candidate>,
    /// Whether any is hurried; spares the search.
    may_hurry: bool,
}

impl Candidates {
    pub(super) fn contains(&self, address: &SocketAddr) -> bool {
        self.known.contains_key(address)
    }

    /// Whether the latest call-me-maybe lists an address.
    pub(super) fn is_called(&self, address: &SocketAddr) -> bool {
        self.known.get(address).is_some_and(|it| it.is_called)
    }

    /// Takes what the node message lists. Returns whether some of it is new.
    pub(super) fn set_listed(
        &mut self,
        now: Instant,
        listed: &[SocketAddr],
        keep: Option<SocketAddr>,
    ) -> bool {
        self.set_source(now, listed, keep, |it| &mut it.is_listed)
    }

    /// Takes what a call-me-maybe lists.
    pub(super) fn set_called(&mut self, now: Instant, called: &[SocketAddr], keep: Option<SocketAddr>) {
        self.set_source(now, called, keep, |it| &mut it.is_called);
    }

    fn set_source(
        &mut self,
        now: Instant,
        addresses: &[SocketAddr],
        keep: Option<SocketAddr>,
        source: impl Fn(&mut Candidate) -> &mut bool,
    ) -> bool {
        let addresses = probeable(addresses, MAX_CANDIDATES);
        for (address, candidate) in &mut self.known {
            *source(candidate) = addresses.contains(address);
        }
        self.forget_expired(now, keep);
        let mut has_new = false;
        for address in addresses.into_iter().filter(|it| !self.known.contains_key(it)).collect::<Vec<_>>() {
            if let Some(candidate) = self.insert(address, keep) {
                *source(candidate) = true;
                has_new = true;
            }
        }
        has_new
    }

    /// Notes a ping from the peer. `None` for one too many.
    pub(super) fn note_ping(
        &mut self,
        now: Instant,
        from: SocketAddr,
        txid: TxId,
        keep: Option<SocketAddr>,
    ) -> Option<Heard> {
        let is_known = self.contains(&from);
        let candidate = match self.known.get_mut(&from) {
            Some(candidate) => candidate,
            None => self.insert(from, keep)?,
        };
        if candidate.pinged_us.as_ref().is_some_and(|it| it.txid == txid) {
            return Some(Heard::Duplicate);
        }
        candidate.pinged_us = Some(PingedUs { at: now, txid });
        Some(if is_known { Heard::Known } else { Heard::New })
    }

    /// Notes a ping to a candidate. Returns whether it is one.
    pub(super) fn note_pinged(&mut self, now: Instant, address: &SocketAddr) -> bool {
        let Some(candidate) = self.known.get_mut(address) else { return false };
        candidate.pinged = Some(now);
        candidate.is_hurried = false;
        true
    }

    /// Notes an answer from a candidate. Returns whether it is one.
    pub(super) fn note_answer(&mut self, now: Instant, address: &SocketAddr, latency: Duration) -> bool {
        let Some(candidate) = self.known.get_mut(address) else { return false };
        candidate.answered = Some(Answered { at: now, latency });
        true
    }

    /// Whether a candidate has answered since our link changed last.
    pub(super) fn has_answered(&self, address: &SocketAddr) -> bool {
        self.known.get(address).is_some_and(|it| it.answered.is_some())
    }

    /// Forgets that a candidate answered: it cannot be reached.
    pub(super) fn note_unreachable(&mut self, address: &SocketAddr) {
        if let Some(candidate) = self.known.get_mut(address) {
            candidate.answered = None;
        }
    }

    /// Those that answered lately, and when.
    pub(super) fn answered_within(
        &self,
        now: Instant,
        age: Duration,
    ) -> impl Iterator<Item = (Instant, Measured)> {
        self.known.iter().filter_map(move |(address, candidate)| {
            let is_recent = |it: &Answered| now.saturating_duration_since(it.at) <= age;
            let Answered { at, latency } = candidate.answered.filter(is_recent)?;
            Some((at, Measured { address: *address, latency }))
        })
    }

    /// Whether the peer pinged us lately, from wherever.
    pub(super) fn pinged_us_within(&self, now: Instant, age: Duration) -> bool {
        let at = self.known.values().filter_map(|it| it.pinged_us.as_ref()).map(|it| it.at).max();
        at.is_some_and(|at| now.saturating_duration_since(at) <= age)
    }

    /// Those that a round pings.
    pub(super) fn spaced(&self, now: Instant) -> Vec<SocketAddr> {
        let is_due =
            |it: &Candidate| it.pinged.is_none_or(|at| now.saturating_duration_since(at) >= LEAST_SPACING);
        self.known.iter().filter(|(_, it)| is_due(it)).map(|(address, _)| *address).collect()
    }

    /// Has a candidate pinged as soon as may be.
    pub(super) fn hurry(&mut self, address: &SocketAddr) {
        if let Some(candidate) = self.known.get_mut(address) {
            candidate.is_hurried = true;
            self.may_hurry = true;
        }
    }

    /// Has all candidates pinged as soon as may be.
    pub(super) fn hurry_all(&mut self) {
        self.known.values_mut().for_each(|it| it.is_hurried = true);
        self.may_hurry = !self.known.is_empty();
    }

    /// Nobody is hurried any more.
    pub(super) fn calm(&mut self) {
        self.known.values_mut().for_each(|it| it.is_hurried = false);
        self.may_hurry = false;
    }

    /// `found` was; of the others only those are hurried yet from which the peer pings us: they may be better.
    pub(super) fn calm_except_callers(&mut self, found: &SocketAddr) {
        for (address, candidate) in &mut self.known {
            candidate.is_hurried &= candidate.pinged_us.is_some() && address != found;
        }
    }

    /// The hurried that may be pinged now.
    pub(super) fn hurried(&self, now: Instant) -> Vec<SocketAddr> {
        self.hurries()
            .filter(|(_, due)| due.is_none_or(|due| due <= now))
            .map(|(address, _)| address)
            .collect()
    }

    /// When the next hurried one may be pinged.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        if self.may_hurry { self.hurries().filter_map(|(_, due)| due).min() } else { None }
    }

    fn hurries(&self) -> impl Iterator<Item = (SocketAddr, Option<Instant>)> {
        let hurried = self.known.iter().filter(|(_, it)| it.is_hurried);
        hurried.map(|(address, it)| (*address, it.pinged.map(|at| at + it.hurried_spacing())))
    }

    /// What was pinged over another network says nothing of this one.
    pub(super) fn forget_pings(&mut self) {
        for candidate in self.known.values_mut() {
            (candidate.pinged, candidate.answered) = (None, None);
        }
    }

    /// Drops those of which no source holds any more; `keep` answers, and stays.
    pub(super) fn forget_expired(&mut self, now: Instant, keep: Option<SocketAddr>) {
        self.known.retain(|address, it| it.is_believed(now) || keep == Some(*address));
    }

    /// Drops all.
    pub(super) fn clear(&mut self) {
        self.known.clear();
    }

    /// Where there is no room, whoever pinged us longest ago from an address that nobody lists has to go.
    fn insert(&mut self, address: SocketAddr, keep: Option<SocketAddr>) -> Option<&mut Candidate> {
        if self.known.len() >= MAX_CANDIDATES {
            let unlisted =
                self.known.iter().filter(|(it, candidate)| !candidate.is_named() && keep != Some(**it));
            let oldest = unlisted.min_by_key(|(_, it)| it.pinged_us.as_ref().map(|it| it.at));
            let oldest = oldest.map(|(address, _)| *address)?;
            self.known.remove(&oldest);
        }
        Some(self.known.entry(address).or_default())
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }
}

impl Candidate {
    fn is_named(&self) -> bool {
        self.is_listed || self.is_called
    }

    fn is_believed(&self, now: Instant) -> bool {
        let pinged_us = self.pinged_us.as_ref();
        self.is_named() || pinged_us.is_some_and(|it| now.saturating_duration_since(it.at) <= PINGED_KEEPS)
    }

    fn hurried_spacing(&self) -> Duration {
        if self.pinged_us.is_some() || self.answered.is_some() { HURRIED_SPACING } else { BLIND_SPACING }
    }
}
