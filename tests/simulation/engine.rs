//! What chooses the way to a peer: ours, or the model of the reference's, by the same inputs and effects.

use std::{net::SocketAddr, time::Instant};

use warren_core::path::{Direct, Effect, Path, RelayStands, Route, Via};
use warren_lab::reference::{self, Reference};
use warren_proto::disco::TxId;

/// Whose a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Make {
    Ours,
    Reference,
}

/// The choice of ways to one peer. What the reference takes no notice of does not reach its model.
#[derive(Debug)]
pub(crate) enum Engine {
    Ours(Box<Path>),
    Reference(Box<Reference>),
}

impl Engine {
    pub(crate) fn new(make: Make) -> Self {
        match make {
            Make::Ours => Self::Ours(Box::default()),
            Make::Reference => Self::Reference(Box::default()),
        }
    }

    pub(crate) fn handle_node(&mut self, now: Instant, endpoints: &[SocketAddr]) {
        match self {
            Self::Ours(path) => path.handle_node(now, endpoints),
            Self::Reference(path) => path.handle_node(now, endpoints),
        }
    }

    pub(crate) fn handle_ready(&mut self, now: Instant) {
        match self {
            Self::Ours(path) => path.handle_ready(now),
            Self::Reference(path) => path.handle_ready(now),
        }
    }

    pub(crate) fn set_policy(&mut self, now: Instant, policy: Direct) {
        match self {
            Self::Ours(path) => path.set_policy(now, policy),
            Self::Reference(path) => path.set_blocked(policy == Direct::Blocked),
        }
    }

    pub(crate) fn handle_own_endpoints(&mut self, now: Instant, own: &[SocketAddr]) {
        match self {
            Self::Ours(path) => path.handle_own_endpoints(now, own),
            Self::Reference(path) => path.handle_own_endpoints(now, own),
        }
    }

    pub(crate) fn handle_ping(&mut self, now: Instant, from: Via, txid: TxId) -> bool {
        match self {
            Self::Ours(path) => path.handle_ping(now, from, txid),
            Self::Reference(path) => path.handle_ping(now, to_reference(from), txid),
        }
    }

    pub(crate) fn handle_pong(&mut self, now: Instant, from: Via, txid: TxId, observed: SocketAddr) {
        match self {
            Self::Ours(path) => drop(path.handle_pong(now, from, txid, observed)),
            Self::Reference(path) => drop(path.handle_pong(now, to_reference(from), txid)),
        }
    }

    pub(crate) fn handle_call_me_maybe(&mut self, now: Instant, endpoints: &[SocketAddr]) {
        match self {
            Self::Ours(path) => path.handle_call_me_maybe(now, endpoints),
            Self::Reference(path) => path.handle_call_me_maybe(now, endpoints),
        }
    }

    pub(crate) fn handle_received(&mut self, now: Instant, from: Via) {
        match self {
            Self::Ours(path) => path.handle_received(now, from),
            Self::Reference(_) => {}
        }
    }

    pub(crate) fn handle_unreachable(&mut self, now: Instant, to: SocketAddr) {
        match self {
            Self::Ours(path) => path.handle_unreachable(now, to),
            Self::Reference(_) => {}
        }
    }

    pub(crate) fn handle_link_change(&mut self, now: Instant) {
        match self {
            Self::Ours(path) => path.handle_link_change(now),
            Self::Reference(path) => path.handle_link_change(),
        }
    }

    pub(crate) fn handle_relay(&mut self, now: Instant, stands: RelayStands) {
        match self {
            Self::Ours(path) => path.handle_relay(now, stands),
            Self::Reference(_) => {}
        }
    }

    pub(crate) fn route(&mut self, now: Instant) -> Route {
        match self {
            Self::Ours(path) => path.route(now),
            Self::Reference(path) => {
                let reference::Route { direct, relay } = path.route(now);
                Route { direct, relay }
            }
        }
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        match self {
            Self::Ours(path) => path.poll_timeout(),
            Self::Reference(path) => path.poll_timeout(),
        }
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        match self {
            Self::Ours(path) => path.handle_timeout(now),
            Self::Reference(path) => path.handle_timeout(now),
        }
    }

    pub(crate) fn poll_effect(&mut self, txid: &mut dyn FnMut() -> TxId) -> Option<Effect> {
        match self {
            Self::Ours(path) => path.poll_effect(txid),
            Self::Reference(path) => path.poll_effect(txid).map(of_reference),
        }
    }

    /// Where the reference sends, although it does not trust it.
    pub(crate) fn distrusted(&self, now: Instant) -> Option<SocketAddr> {
        match self {
            Self::Ours(_) => None,
            Self::Reference(path) if path.trusted(now).is_some() => None,
            Self::Reference(path) => path.best().map(|best| best.address),
        }
    }

    /// Whether packets go over UDP alone.
    pub(crate) fn is_direct(&self, now: Instant) -> bool {
        match self {
            Self::Ours(path) => path.best().is_some_and(|best| best.is_trusted(now)),
            Self::Reference(path) => path.trusted(now).is_some(),
        }
    }
}

fn to_reference(via: Via) -> reference::Via {
    match via {
        Via::Direct(address) => reference::Via::Direct(address),
        Via::Relay(_) => reference::Via::Relay,
    }
}

fn of_reference(effect: reference::Effect) -> Effect {
    match effect {
        reference::Effect::Ping { to, txid } => Effect::Ping { to, txid },
        reference::Effect::RelayPing { txid } => Effect::RelayPing { txid },
        reference::Effect::CallMeMaybe(endpoints) => Effect::CallMeMaybe(endpoints),
        reference::Effect::RefreshEndpoints => Effect::RefreshEndpoints,
        reference::Effect::Verified(address) => Effect::Verified(address),
    }
}
