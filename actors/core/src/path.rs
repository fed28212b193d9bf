//! The ways to one peer, and which is taken: through its relay, or directly over UDP (tailnet-data 7).
//!
//! ```text
//!             an answer                            silence, pings, the relay alive
//!   Seeking ─────────────> Direct ──────────────────────────────────────────────────> Lost ── flaps ──> Barred
//!   rounds: ping all       3 s pings                     │                             │  pinged once      │
//!   candidates, have the   6.5 s of trust     cannot be reached                        │  a second         │
//!   peer do the same          ^  ^                       └────────────────────────────>│                   │
//!                             │  └──────────────────────── an answer ──────────────────┘ <── 10 to 60 s ───┘
//! ```
//!
//! One [`Path`] a node key; it lives as long as the peer. It says what to send and never waits for it: after every
//! input its effects are to be drained and its timer is to be set again. Which file decides what:
//!
//! | | |
//! |---|---|
//! | `candidates`, `blind_pings` | where the peer may be, and when each address is pinged |
//! | `rounds` | when all of them are |
//! | `choice` | which is better, and what is trusted |
//! | `suspicion`, `alarms` | when the path taken is dead, and what false alarms teach |
//! | `withdrawal` | how the peer is made to leave it too |
//! | `calling`, `former` | where the peer is told that we are, and were |
//! | `detour`, `astray` | when it seems not to have understood, or takes a way that we have not |
//! | `standing`, `moves` | how the peer is reached, and what a change brings with it |
//! | `steps` | what time brings |

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use warren_proto::disco::TxId;

use self::{
    address::{Recent, canonical, may_be_probed},
    alarms::Alarms,
    astray::Astray,
    blind_pings::BlindPings,
    calling::Calling,
    candidates::{Candidates, Heard},
    detour::Detour,
    outbox::{Number, Outbox, Pending},
    outstanding::{Outstanding, Sent, Target},
    rounds::Rounds,
    standing::{Lost, Standing},
    steps::Session,
    withdrawal::{Ending, Withdrawal},
};
pub use self::{
    choice::{Best, Measured, better},
    receive_map::{MAX_SOURCES, ReceiveMap},
    sender::{Arrival, identify},
};
use crate::relay_map::RegionId;

mod address;
mod alarms;
mod astray;
mod blind_pings;
mod calling;
mod candidates;
mod choice;
mod detour;
mod former;
mod moves;
mod outbox;
mod outstanding;
mod receive_map;
mod rounds;
mod sender;
mod standing;
mod steps;
mod suspicion;
mod withdrawal;

/// Addresses of one peer that the receive map holds at most.
pub const MAX_VERIFIED: usize = 64;
/// After a link change our addresses may take so long to settle.
const SETTLING: Duration = Duration::from_secs(10);

/// Where something came from or goes. IPv4-mapped IPv6 addresses are always given as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// Over UDP.
    Direct(SocketAddr),
    /// Through a relay.
    Relay(RegionId),
}

/// Whether direct paths may be used (tailnet-data 7.10).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Direct {
    /// They may.
    #[default]
    Allowed,
    /// Relay only.
    Blocked,
}

/// Why another path is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A direct path answered, and there was none.
    Found,
    /// Another direct path is better, or answers where the one before does not.
    Better,
    /// The direct path does not answer any more.
    Dead,
    /// The same, and that too often: direct paths are let be for a while.
    Flapping,
    /// The system says that there is no way to the peer's address.
    Unreachable,
    /// The peer is not at its address any more, as far as it tells.
    Withdrawn,
    /// Direct paths are not allowed any more.
    Forbidden,
}

impl Why {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Found,
        Self::Better,
        Self::Dead,
        Self::Flapping,
        Self::Unreachable,
        Self::Withdrawn,
        Self::Forbidden,
    ];

    /// The word for it in metrics, logs and events.
    pub fn label(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::Better => "better",
            Self::Dead => "dead",
            Self::Flapping => "flapping",
            Self::Unreachable => "unreachable",
            Self::Withdrawn => "withdrawn",
            Self::Forbidden => "forbidden",
        }
    }
}

/// How our relay link stands, asked for by [`Effect::ProveRelay`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelayStands {
    /// It just answered.
    Alive,
    /// It did not.
    Down,
}

/// Where a batch of packets goes. Both: twice, while a direct path is sought or doubted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Over UDP to this address.
    pub direct: Option<SocketAddr>,
    /// Through the peer's relay.
    pub relay: bool,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// A padded ping over UDP.
    Ping {
        /// Where to.
        to: SocketAddr,
        /// What the answer carries.
        txid: TxId,
    },
    /// A ping through the relay; only for users.
    RelayPing {
        /// What the answer carries.
        txid: TxId,
    },
    /// This list through the peer's home relay.
    CallMeMaybe(Vec<SocketAddr>),
    /// Our addresses are too old to be told: [`Path::handle_own_endpoints`] is waited for, for a second.
    RefreshEndpoints,
    /// Whether our link to the peer's relay answers is to be told by [`Path::handle_relay`].
    ProveRelay,
    /// The direct path changed; `None` is the relay.
    Changed {
        /// The one before.
        from: Option<SocketAddr>,
        /// The one now.
        to: Option<SocketAddr>,
        /// Why.
        why: Why,
    },
    /// The receive map gains an address for this peer.
    Verified(SocketAddr),
    /// The receive map loses an address of this peer.
    Forgotten(SocketAddr),
}

/// A ping was answered. Whichever ping it was: who waits for this peer's answer has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The way: the address that was pinged, or the relay.
    pub via: Via,
    /// The round trip.
    pub latency: Duration,
    /// Whether it was a user's ping.
    pub is_user: bool,
    /// The number that [`Path::user_ping`] was given; of any other ping its own.
    pub txid: TxId,
}

/// The ways to one peer, and which is taken.
#[derive(Debug, Default)]
pub struct Path {
    is_ready: bool,
    policy: Direct,
    /// What the present node message lists, for when direct paths are allowed again.
    listed: Vec<SocketAddr>,
    candidates: Candidates,
    standing: Standing,
    /// As long as something is sent now and then.
    session: Option<Session>,
    rounds: Rounds,
    alarms: Alarms,
    withdrawal: Withdrawal,
    detour: Detour,
    astray: Astray,
    blind_pings: BlindPings,
    calling: Calling,
    /// Until when a change of our addresses is one of the link, which the peer has to follow.
    settles_at: Option<Instant>,
    outstanding: Outstanding,
    verified: Recent<MAX_VERIFIED>,
    relay_ping: Option<(RegionId, TxId)>,
    outbox: Outbox,
}

/// Inputs from the control plane and about ourselves.
impl Path {
    /// Knows nothing, and probes nothing before [`Self::handle_ready`].
    pub fn new() -> Self {
        Self::default()
    }

    /// The endpoints of the peer's present node message, with the same keys as before.
    pub fn handle_node(&mut self, now: Instant, endpoints: &[SocketAddr]) {
        self.listed = address::probeable(endpoints, candidates::MAX_CANDIDATES);
        if self.policy == Direct::Allowed {
            let keep = self.answering(now);
            if self.candidates.set_listed(now, &self.listed, keep) {
                self.rounds.hasten(now);
            }
            self.follow_candidates(now);
        }
        self.handle_timeout(now);
    }

    /// The peer knows us, or should by now: probing may begin, at once. Again: it may know us better now.
    pub fn handle_ready(&mut self, now: Instant) {
        self.is_ready = true;
        if !self.standing.is_trusted(now) {
            self.candidates.hurry_all();
            self.rounds.hasten(now);
            self.begin_round(now, None);
        }
        self.handle_timeout(now);
    }

    /// Whether direct paths may be used.
    pub fn set_policy(&mut self, now: Instant, policy: Direct) {
        match (self.policy, policy) {
            (Direct::Allowed, Direct::Blocked) => self.block(now),
            (Direct::Blocked, Direct::Allowed) => self.unblock(now),
            (Direct::Allowed, Direct::Allowed) | (Direct::Blocked, Direct::Blocked) => {}
        }
        self.handle_timeout(now);
    }

    /// Our own endpoints, collected just now.
    pub fn handle_own_endpoints(&mut self, now: Instant, own: &[SocketAddr]) {
        let news = self.calling.set_own(now, own);
        let telling = self.calling.handle_fresh(now);
        let is_told = telling.is_some();
        self.tell(telling);
        if news.has_lost && self.settles_at.is_some_and(|at| now < at) && self.standing.taken().is_some() {
            self.settles_at = None;
            self.withdrawal.start(now);
        }
        if news.has_gained && !is_told && !self.standing.is_trusted(now) {
            self.rounds.hasten(now);
        }
        self.handle_timeout(now);
    }

    /// Our link changed, or we woke from sleep: what worked may not any more, and what did not may.
    pub fn handle_link_change(&mut self, now: Instant) {
        self.alarms = Alarms::default();
        // A path that was about to be left may work now; a peer that is told to leave one has to leave it all the same.
        if self.standing.is_condemned() {
            self.withdrawal = Withdrawal::Idle;
        } else if self.policy == Direct::Allowed {
            self.withdrawal.handle_link_change(now);
        }
        self.outstanding.forget_direct();
        self.candidates.forget_pings();
        self.astray.forget();
        self.calling.expire();
        self.settles_at = Some(now + SETTLING);
        self.distrust(now);
        self.rounds.hasten(now);
        self.handle_timeout(now);
    }

    /// Whether our link to the peer's relay is alive.
    pub fn handle_relay(&mut self, now: Instant, relay: RelayStands) {
        match relay {
            RelayStands::Alive if self.withdrawal.is_proving() => {
                let ending = if self.standing.is_condemned() { self.leave_dead(now) } else { Ending::Return };
                let settles_at =
                    if let Standing::Lost(lost) = &self.standing { lost.settles_at() } else { now };
                self.withdrawal.handle_proof(now, ending, settles_at);
            }
            // It is asked again.
            RelayStands::Alive | RelayStands::Down => {}
        }
        self.handle_timeout(now);
    }
}

/// Inputs from the peer and from the sockets.
impl Path {
    /// A ping came. Returns whether an answer is owed, by the same way.
    pub fn handle_ping(&mut self, now: Instant, from: Via, txid: TxId) -> bool {
        match from {
            Via::Relay(region) => {
                self.withdrawal.handle_heard();
                self.relay_ping.replace((region, txid)) != Some((region, txid))
            }
            Via::Direct(from) => {
                let is_owed = self.handle_direct_ping(now, canonical(&from), txid);
                self.handle_timeout(now);
                is_owed
            }
        }
    }

    fn handle_direct_ping(&mut self, now: Instant, from: SocketAddr, txid: TxId) -> bool {
        // An answer would make the peer take a path that we do not want.
        if self.policy == Direct::Blocked || self.standing.is_barred() || !may_be_probed(&from) {
            return false;
        }
        let keep = self.answering(now);
        let heard = self.candidates.note_ping(now, from, txid, keep);
        if heard == Some(Heard::Duplicate) {
            return false;
        }
        self.verify(from);
        self.withdrawal.handle_heard();
        // Where there is a path, answers and data have to show that it works: a ping answers nothing of ours.
        if self.standing.taken().is_none() {
            self.astray.handle_ping(now, from);
        }
        if heard == Some(Heard::New) || !self.standing.is_trusted(now) {
            self.candidates.hurry(&from);
        }
        true
    }

    /// An answer came. `observed` is where the peer saw us.
    pub fn handle_pong(
        &mut self,
        now: Instant,
        from: Via,
        txid: TxId,
        observed: SocketAddr,
    ) -> Option<Answer> {
        let (sent, latency) = self.outstanding.take(now, &txid)?;
        let via = match (sent.to, from) {
            (Target::Relay, Via::Relay(_)) => {
                self.withdrawal.handle_heard();
                from
            }
            (Target::Direct(address), Via::Direct(from)) => {
                if !self.candidates.note_answer(now, &address, latency) {
                    return None;
                }
                self.calling.note_observed(now, observed);
                let from = canonical(&from);
                self.verify(from);
                self.consider(now, Measured { address, latency });
                if let Some(taken) = self.standing.taken_mut().filter(|taken| taken.address() == address) {
                    taken.note_source(from);
                    if self.calling.note_seen(now, address, observed) {
                        self.withdrawal.start(now);
                    }
                }
                self.handle_timeout(now);
                Via::Direct(address)
            }
            (Target::Relay, Via::Direct(_)) | (Target::Direct(_), Via::Relay(_)) => return None,
        };
        Some(Answer { via, latency, is_user: sent.user.is_some(), txid: sent.user.unwrap_or(txid) })
    }

    /// The peer says where it is, and is about to ping us.
    pub fn handle_call_me_maybe(&mut self, now: Instant, endpoints: &[SocketAddr]) {
        if self.policy == Direct::Blocked {
            return;
        }
        let taken = self.standing.address();
        let was_called = taken.is_some_and(|it| self.candidates.is_called(&it));
        let is_withdrawn =
            was_called && taken.is_some_and(|it| !endpoints.iter().any(|e| canonical(e) == it));
        let keep = self.answering(now).filter(|_| !is_withdrawn);
        self.candidates.set_called(now, endpoints, keep);
        self.follow_candidates(now);
        if let Some(taken) = self.standing.taken_mut().filter(|_| is_withdrawn) {
            taken.suspicion.accuse(now);
        }
        self.candidates.hurry_all();
        self.handle_timeout(now);
    }

    /// WireGuard's datagrams came from the peer, and were authentic. Once a batch.
    pub fn handle_received(&mut self, now: Instant, from: Via) {
        self.astray.handle_heard(now);
        match from {
            Via::Relay(_) => {
                self.withdrawal.handle_heard();
                if self.detour.handle_relayed(now, self.standing.is_trusted(now)) {
                    self.withdrawal.start(now);
                    self.handle_timeout(now);
                }
            }
            Via::Direct(from) => {
                self.detour.handle_direct();
                self.withdrawal.handle_heard();
                let patience = self.patience(now);
                let from = canonical(&from);
                if let Some(taken) = self.standing.taken_mut().filter(|taken| taken.is_from(from)) {
                    taken.suspicion.handle_data(now, patience);
                }
            }
        }
    }

    /// The system says that an address cannot be reached, or the datagram could not be sent.
    pub fn handle_unreachable(&mut self, now: Instant, to: SocketAddr) {
        let to = canonical(&to);
        self.outstanding.forget(&to);
        self.candidates.note_unreachable(&to);
        if self.standing.address() == Some(to) {
            self.leave_unreachable(now, to);
        }
        self.handle_timeout(now);
    }
}

/// What is sent.
impl Path {
    /// Where a batch of packets goes now. Once a batch; marks that the peer is talked to. The timer may be due
    /// earlier afterwards.
    pub fn route(&mut self, now: Instant) -> Route {
        let is_first = self.session.is_none();
        Session::note_sent(&mut self.session, now);
        if let Standing::Lost(lost) = &mut self.standing {
            lost.handle_sent(now);
        }
        if is_first {
            // What was not asked while nothing was sent comes before the packet: a peer that does not know where we are
            // by now hears a ping first.
            self.handle_timeout(now);
        }
        let patience = self.patience(now);
        let Some(taken) = self.standing.taken_mut() else { return Route { direct: None, relay: true } };
        taken.suspicion.handle_sent(now, patience);
        Route { direct: Some(taken.address()), relay: !taken.is_trusted(now) }
    }

    /// Pings over the path there is; where none is trusted over the relay, and over UDP as far as that was not tried
    /// just now. Does not count as talking to the peer, or it would keep probes going for ever.
    pub fn user_ping(&mut self, now: Instant, txid: TxId) {
        if !self.is_ready {
            return;
        }
        match self.standing.address() {
            Some(best) if self.standing.is_trusted(now) => self.ping(now, &best, Number::Given(txid)),
            best => {
                self.outstanding.note(Sent { txid, to: Target::Relay, at: now, user: Some(txid) });
                self.push(Effect::RelayPing { txid });
                if let Some(best) = best {
                    self.ping(now, &best, Number::Any(Some(txid)));
                }
                if self.rounds.due().is_some_and(|due| due <= now) {
                    self.begin_round(now, Some(txid));
                }
            }
        }
        self.handle_timeout(now);
    }

    /// What is to be done next, until `None`. `txid` gives a fresh random number for each ping.
    pub fn poll_effect(&mut self, txid: &mut dyn FnMut() -> TxId) -> Option<Effect> {
        let (to, at, number) = match self.outbox.pop()? {
            Pending::Effect(effect) => return Some(effect),
            Pending::Ping { to, at, number } => (to, at, number),
        };
        let (txid, user) = match number {
            Number::Given(txid) => (txid, Some(txid)),
            Number::Any(user) => (txid(), user),
        };
        self.outstanding.note(Sent { txid, to: Target::Direct(to), at, user });
        Some(Effect::Ping { to, txid })
    }

    /// The direct path that is taken.
    pub fn best(&self) -> Option<Best> {
        self.standing.taken().map(choice::Taken::best)
    }
}

#[cfg(test)]
mod tests;
