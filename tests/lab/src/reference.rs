//! How the reference (a Go peer) chooses its way to another peer: tailnet-data 5.2, 5.3, 7.1 to 7.10 and 12.1, the
//! weaknesses included. What our own paths have to get along with.
//!
//! Pure: `now` is an argument, what is to be done comes out of [`Reference::poll_effect`], ids come from a closure.
//! The peer's home region is always known, and there is one relay. What was received never matters, and no source
//! once known is forgotten: so it has no input for these and no such effect.

#[cfg(test)]
mod tests;

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use warren_proto::{address, disco::TxId};

const SESSION_ACTIVE: Duration = Duration::from_secs(45);
const HEARTBEAT: Duration = Duration::from_secs(3);
const TRUST: Duration = Duration::from_millis(6500);
const UPGRADE: Duration = Duration::from_mins(1);
const GOOD_ENOUGH: Duration = Duration::from_millis(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two pings of rounds to one candidate.
const SPACING: Duration = Duration::from_secs(5);
/// An own list that is older is collected anew before it is told.
const FRESH: Duration = Duration::from_secs(27);
/// With more candidates than this, expired ones are dropped.
const SOFT_LIMIT: usize = 100;

/// Where something came from or goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Via {
    /// Over UDP.
    Direct(SocketAddr),
    /// Through the relay.
    Relay,
}

/// By which ways a packet goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Route {
    /// Over UDP to this address.
    pub direct: Option<SocketAddr>,
    /// Through the relay, alone or as well.
    pub relay: bool,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// A padded ping over UDP.
    Ping {
        /// To this candidate.
        to: SocketAddr,
        /// What its pong will say.
        txid: TxId,
    },
    /// A padded ping through the relay.
    RelayPing {
        /// What its pong will say.
        txid: TxId,
    },
    /// Our addresses, through the relay.
    CallMeMaybe(Vec<SocketAddr>),
    /// Ours are too old to be told: they are to be collected again.
    RefreshEndpoints,
    /// Datagrams from this source are the peer's from now on.
    Verified(SocketAddr),
}

/// What a pong answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// What had been pinged.
    pub via: Via,
    /// How long it took.
    pub latency: Duration,
    /// Whether it ends the wait of a user.
    pub is_user: bool,
}

/// The address that is taken while it is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Best {
    /// Where the peer is.
    pub address: SocketAddr,
    /// As last measured.
    pub latency: Duration,
}

/// The reference's view of one peer.
#[derive(Debug, Default)]
pub struct Reference {
    is_ready: bool,
    is_blocked: bool,
    /// By the peer's present node message.
    listed: BTreeSet<SocketAddr>,
    own: Vec<SocketAddr>,
    own_at: Option<Instant>,
    candidates: BTreeMap<Via, Candidate>,
    best: Option<Best>,
    trust_until: Option<Instant>,
    last_send: Option<Instant>,
    last_full_probe: Option<Instant>,
    heartbeat_at: Option<Instant>,
    outstanding: BTreeMap<TxId, (Via, Instant)>,
    is_user_waiting: bool,
    /// Whether a call waits for our own addresses.
    is_call_due: bool,
    effects: VecDeque<Due>,
}

#[derive(Debug, Default)]
struct Candidate {
    is_listed: bool,
    is_called: bool,
    /// If a ping showed it first: when the last one came.
    learned: Option<Instant>,
    pinged: Option<Instant>,
    answered: Option<TxId>,
}

impl Candidate {
    fn is_kept(&self, now: Instant) -> bool {
        let is_alive = |at| now.saturating_duration_since(at) <= SESSION_ACTIVE;
        self.is_called || self.learned.map_or(self.is_listed, is_alive)
    }
}

/// An effect; a ping gets its id when it is taken.
#[derive(Debug)]
enum Due {
    Ping(Via, Instant),
    Ready(Effect),
}

impl Reference {
    /// Knows nothing of the peer; it is not even programmed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the addresses of the peer's present node message.
    pub fn handle_node(&mut self, now: Instant, endpoints: &[SocketAddr]) {
        self.listed = if self.is_blocked { BTreeSet::new() } else { endpoints.iter().copied().collect() };
        if self.is_ready {
            self.program(now);
        }
    }

    /// The peer is programmed from now on: READY, or 5 s after its node message; an agent does not wait.
    pub fn handle_ready(&mut self, now: Instant) {
        self.is_ready = true;
        self.program(now);
    }

    /// Direct connections are blocked on this side, or not any more (7.10).
    pub fn set_blocked(&mut self, is_blocked: bool) {
        self.is_blocked = is_blocked;
        if is_blocked {
            self.listed.clear();
            self.keep(|via, _| matches!(via, Via::Relay));
        }
    }

    /// Takes our own addresses, as just collected.
    pub fn handle_own_endpoints(&mut self, now: Instant, own: &[SocketAddr]) {
        (self.own, self.own_at) = (own.to_vec(), Some(now));
        if std::mem::take(&mut self.is_call_due) {
            self.call(now);
        }
    }

    /// Takes a ping; says whether a pong is owed.
    pub fn handle_ping(&mut self, now: Instant, from: Via, txid: TxId) -> bool {
        if !self.hears(from) {
            return false;
        }
        self.verify(from);
        if self.candidates.len() > SOFT_LIMIT {
            self.drop_expired(now);
        }
        let fresh = || Candidate { learned: Some(now), ..Candidate::default() };
        let candidate = self.candidates.entry(from).or_insert_with(fresh);
        if candidate.answered == Some(txid) {
            return false;
        }
        candidate.answered = Some(txid);
        candidate.learned = candidate.learned.and(Some(now));
        true
    }

    /// Takes a pong; says what it answered, if anything.
    pub fn handle_pong(&mut self, now: Instant, from: Via, txid: TxId) -> Option<Answer> {
        if !self.hears(from) {
            return None;
        }
        let (via, sent) = self.outstanding.remove(&txid)?;
        let latency = now.saturating_duration_since(sent);
        if latency > PING_TIMEOUT {
            return None;
        }
        if let Via::Direct(address) = via {
            self.candidates.get(&via)?;
            self.verify(from);
            self.trust(now, Best { address, latency });
        }
        Some(Answer { via, latency, is_user: std::mem::take(&mut self.is_user_waiting) })
    }

    /// Takes the addresses that the peer calls us to.
    pub fn handle_call_me_maybe(&mut self, now: Instant, endpoints: &[SocketAddr]) {
        if !self.is_ready || self.is_blocked {
            return;
        }
        let called = endpoints.iter().copied().filter(|it| may_be_called(it.ip())).map(Via::Direct);
        let called: BTreeSet<Via> = called.collect();
        self.keep(|via, candidate| !candidate.is_called || called.contains(via));
        for via in called {
            self.candidates.entry(via).or_default().is_called = true;
        }
        self.candidates.values_mut().for_each(|candidate| candidate.pinged = None);
        self.full_probe(now);
    }

    /// Both ways at once, unless the best address is trusted, and probes as a user's ping does (12.1).
    pub fn user_ping(&mut self, now: Instant) {
        (self.is_user_waiting, self.last_send) = (true, Some(now));
        self.heartbeat_at.get_or_insert(now + HEARTBEAT);
        // These do not count for the spacing of rounds, as recordings show.
        if let Some(best) = self.trusted(now) {
            self.effects.push_back(Due::Ping(Via::Direct(best.address), now));
        } else {
            let all = self.candidates.keys().map(|via| Due::Ping(*via, now));
            self.effects.extend([Due::Ping(Via::Relay, now)].into_iter().chain(all));
        }
    }

    /// The ways that a packet takes now; it counts as activity.
    pub fn route(&mut self, now: Instant) -> Route {
        if !self.is_ready {
            return Route::default();
        }
        self.last_send = Some(now);
        self.heartbeat_at.get_or_insert(now + HEARTBEAT);
        let is_trusted = self.trusted(now).is_some();
        if !is_trusted && self.full_probe(now) {
            self.call(now);
        }
        Route { direct: self.best.map(|best| best.address), relay: !is_trusted }
    }

    /// Our link changed: nothing is trusted until it is tried again.
    pub fn handle_link_change(&mut self) {
        self.trust_until = None;
    }

    /// A ping could not be sent: it is not waited for.
    pub fn handle_unsent(&mut self, txid: &TxId) {
        self.outstanding.remove(txid);
    }

    /// When the next heartbeat is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.heartbeat_at
    }

    /// Lets time pass.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.heartbeat_at.is_none_or(|due| now < due) {
            return;
        }
        let is_active = self.last_send.is_some_and(|at| now.saturating_duration_since(at) <= SESSION_ACTIVE);
        self.heartbeat_at = is_active.then_some(now + HEARTBEAT);
        if is_active {
            if let Some(best) = self.best {
                self.ping(now, Via::Direct(best.address));
            }
            if self.wants_full_probe(now) && self.full_probe(now) {
                self.call(now);
            }
        }
    }

    /// What is to be done next.
    pub fn poll_effect(&mut self, txid: &mut dyn FnMut() -> TxId) -> Option<Effect> {
        let (via, at) = match self.effects.pop_front()? {
            Due::Ready(effect) => return Some(effect),
            Due::Ping(via, at) => (via, at),
        };
        let txid = txid();
        self.outstanding.retain(|_, (_, sent)| at.saturating_duration_since(*sent) <= PING_TIMEOUT);
        self.outstanding.insert(txid, (via, at));
        Some(match via {
            Via::Direct(to) => Effect::Ping { to, txid },
            Via::Relay => Effect::RelayPing { txid },
        })
    }

    /// The best address, whether it is trusted or not.
    #[must_use]
    pub fn best(&self) -> Option<Best> {
        self.best
    }

    /// The best address while it is trusted.
    #[must_use]
    pub fn trusted(&self, now: Instant) -> Option<Best> {
        self.best.filter(|_| self.trust_until.is_some_and(|until| now <= until))
    }

    fn hears(&self, from: Via) -> bool {
        self.is_ready && !(self.is_blocked && matches!(from, Via::Direct(_)))
    }

    fn program(&mut self, now: Instant) {
        for (via, candidate) in &mut self.candidates {
            candidate.is_listed = matches!(via, Via::Direct(address) if self.listed.contains(address));
        }
        for address in &self.listed {
            self.candidates.entry(Via::Direct(*address)).or_default().is_listed = true;
        }
        self.drop_expired(now);
    }

    fn drop_expired(&mut self, now: Instant) {
        self.keep(|_, candidate| candidate.is_kept(now));
    }

    /// Deletes candidates; with the best one goes the best.
    fn keep(&mut self, mut is_kept: impl FnMut(&Via, &Candidate) -> bool) {
        self.candidates.retain(|via, candidate| is_kept(via, candidate));
        self.best = self.best.filter(|best| self.candidates.contains_key(&Via::Direct(best.address)));
    }

    fn verify(&mut self, from: Via) {
        if let Via::Direct(source) = from {
            self.effects.push_back(Due::Ready(Effect::Verified(source)));
        }
    }

    fn trust(&mut self, now: Instant, answered: Best) {
        if better(Some(answered), self.best) {
            self.best = Some(answered);
        }
        if let Some(best) = self.best.as_mut().filter(|best| best.address == answered.address) {
            best.latency = answered.latency;
            self.trust_until = Some(now + TRUST);
        }
    }

    fn wants_full_probe(&self, now: Instant) -> bool {
        let (Some(best), Some(last)) = (self.trusted(now), self.last_full_probe) else { return true };
        best.latency > GOOD_ENOUGH && now.saturating_duration_since(last) >= UPGRADE
    }

    /// Pings whatever was not pinged lately; says whether there was anything.
    fn full_probe(&mut self, now: Instant) -> bool {
        self.last_full_probe = Some(now);
        self.drop_expired(now);
        let is_due = |at: Option<Instant>| at.is_none_or(|at| now.saturating_duration_since(at) >= SPACING);
        let due = self.candidates.iter().filter(|(_, candidate)| is_due(candidate.pinged));
        let due: Vec<Via> = due.map(|(via, _)| *via).collect();
        due.iter().for_each(|via| self.ping(now, *via));
        !due.is_empty()
    }

    fn ping(&mut self, now: Instant, to: Via) {
        if let Some(candidate) = self.candidates.get_mut(&to) {
            candidate.pinged = Some(now);
        }
        self.effects.push_back(Due::Ping(to, now));
    }

    fn call(&mut self, now: Instant) {
        let is_fresh = self.own_at.is_some_and(|at| now.saturating_duration_since(at) <= FRESH);
        let effect = match (self.is_blocked, is_fresh) {
            (true, _) => Effect::CallMeMaybe(Vec::new()),
            (false, true) => Effect::CallMeMaybe(self.own.clone()),
            (false, false) if self.is_call_due => return,
            (false, false) => Effect::RefreshEndpoints,
        };
        self.is_call_due = effect == Effect::RefreshEndpoints;
        self.effects.push_back(Due::Ready(effect));
    }
}

/// Whether `a` replaces `b` as the best address (7.4).
#[must_use]
pub fn better(a: Option<Best>, b: Option<Best>) -> bool {
    let (Some(a), Some(b)) = (a, b) else { return a.is_some() };
    if a.address == b.address {
        return false;
    }
    let (faster, slower) = (a.latency.min(b.latency).as_nanos(), a.latency.max(b.latency).as_nanos());
    let lead = 100 - (faster * 100).checked_div(slower).unwrap_or(100);
    let (lead_of_a, lead_of_b) = match a.latency.cmp(&b.latency) {
        Ordering::Less => (lead, 0),
        Ordering::Equal => (0, 0),
        Ordering::Greater => (0, lead),
    };
    let [of_a, of_b] = [lead_of_a + liking(a.address.ip()), lead_of_b + liking(b.address.ip())];
    (of_a > 1 || of_b > 0) && of_a > of_b
}

fn liking(ip: IpAddr) -> u128 {
    let is_private = match ip {
        IpAddr::V4(ip) => ip.is_private(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    };
    let of_place = if ip.is_loopback() { 50 } else { 20 * u128::from(is_private) };
    of_place + 10 * u128::from(ip.is_ipv6())
}

fn may_be_called(ip: IpAddr) -> bool {
    !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local() || address::is_coder(&ip))
}
