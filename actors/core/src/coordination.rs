//! Coordination: which peers there are, when each may be programmed, when a lost one is given up
//! (tailnet-control 4.3, 4.4).
//!
//! The owner of the Coordinate stream feeds every response, every change of the wanted destinations, and
//! the stream's beginning and end; it sends the requests it is given, in order, and publishes
//! [`Coordination::network_map`] whenever an outcome says that it changed. The table outlives streams.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    net::{Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use bytes::Bytes;
use uuid::Uuid;
use warren_proto::{
    key::{DiscoPublic, NodePublic},
    tailnet::{
        self, CoordinateRequest, CoordinateResponse,
        coordinate_request::Tunnel,
        coordinate_response::{PeerUpdate, peer_update::Kind},
    },
};

use crate::{
    relay_map::RegionId,
    roster::{MAX_ENTRIES, Update},
};

mod destinations;
mod node;

use destinations::Destinations;
pub use node::NodeError;

/// A peer that was lost is given up this long after its last handshake.
pub const LOST_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// Without READY (an agent of old, or a lost message) a destination is programmed this long after NODE.
pub const READY_TIMEOUT: Duration = Duration::from_secs(5);

/// Peers that are known at most, besides destinations: as many as there can be agents, far beyond what one
/// user has. Every one costs memory and a session.
pub const MAX_PEERS: usize = MAX_ENTRIES;

/// The peers to be programmed at the moment, by peer id (an agent's peer id is its agent id).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkMap {
    /// Every programmable peer.
    pub peers: BTreeMap<Uuid, Peer>,
}

/// One peer as WireGuard and the relay need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The peer's WireGuard key and its name at relays.
    pub node_key: NodePublic,
    /// The peer's disco key.
    pub disco_key: DiscoPublic,
    /// The region where the peer listens.
    pub home: RegionId,
    /// Inner addresses that are the peer's (its allowed IPs, all /128).
    pub addresses: Vec<Ipv6Addr>,
    /// Whether the tunnel to it is kept warm.
    pub keepalive: bool,
    /// Where it says that it can be reached over UDP.
    pub endpoints: Vec<SocketAddr>,
    /// How often it said that it knows us, of several times between two losses one. Who never did was given the time to:
    /// what was left unanswered is worth repeating whenever this grows.
    pub announcements: u32,
}

/// What to send on the Coordinate stream, in this order.
pub type Requests = Vec<CoordinateRequest>;

/// What an input led to.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    /// Whether [`Coordination::network_map`] differs from before.
    pub map_changed: bool,
    /// What to send; empty while there is no stream.
    pub requests: Requests,
    /// The control plane's error text, for the log; the stream ends only by its Close.
    pub error: Option<String>,
    /// Updates that could not be used, for the log.
    pub ignored: Vec<Ignored>,
}

/// An update that could not be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ignored {
    /// Whom it was about, if that could be read.
    pub peer: Option<Uuid>,
    /// Why it could not be used.
    pub reason: IgnoredReason,
}

/// Why an update could not be used. None of these ends the stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IgnoredReason {
    /// The peer's id is not 16 bytes.
    #[error("the peer's id has {0} bytes")]
    Id(usize),
    /// A NODE without a node.
    #[error("the update has no node")]
    NoNode,
    /// A node that cannot be used.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A kind this schema does not have.
    #[error("unknown kind {0}")]
    Kind(i32),
    /// There are too many peers already that nobody asked for.
    #[error("{MAX_PEERS} peers are known: no more are taken that nobody asked for")]
    TooMany,
}

/// The peer table and the wanted destinations.
#[derive(Debug, Default)]
pub struct Coordination {
    peers: BTreeMap<Uuid, Entry>,
    destinations: Destinations,
    map: NetworkMap,
    map_changed: bool,
}

/// What is known of one peer. Whether it is a destination is not kept here: that must outlive the entry.
#[derive(Debug, Default)]
struct Entry {
    node: Option<Peer>,
    ready: Ready,
    /// How often READY was heard with the present node key, once at most between two losses.
    announcements: u32,
    /// When READY was last heard, if it was since the peer was lost: it may be meant for a node that is yet to come.
    announced_at: Option<Instant>,
    /// When to look whether a lost peer is to be given up; `None` while it is not lost.
    lost_until: Option<Instant>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Ready {
    /// Not yet, and no node to wait for.
    #[default]
    No,
    /// Not yet; taken for granted at this time.
    At(Instant),
    /// The peer knows us, or was given the time to.
    Yes,
}

impl Coordination {
    /// The peers that are to be programmed now.
    pub fn network_map(&self) -> &NetworkMap {
        &self.map
    }

    /// Destinations that the control plane refused a tunnel to, for the log and for people.
    pub fn refused(&self) -> &BTreeSet<Uuid> {
        self.destinations.refused()
    }

    /// A new stream began: asks for every wanted destination, except those perhaps refused.
    pub fn connected(&mut self, now: Instant) -> Requests {
        self.destinations.connected(now).iter().map(add_tunnel).collect()
    }

    /// The stream ended: every peer is lost until the next stream says otherwise. They stay programmed
    /// for [`LOST_TIMEOUT`] after their last handshake; [`Self::handle_timeout`] gives them up.
    pub fn disconnected(&mut self, now: Instant, last_handshake: impl Fn(&NodePublic) -> Option<Duration>) {
        self.destinations.disconnected();
        for entry in self.peers.values_mut() {
            entry.announced_at = None;
            if entry.lost_until.is_none() {
                entry.lose(now, &last_handshake);
            }
        }
    }

    /// Wants tunnels to exactly these destinations. New ones are asked for before old ones are given
    /// back. Nothing is asked while there is no stream; [`Self::connected`] asks for all.
    pub fn set_destinations(&mut self, now: Instant, wanted: &BTreeSet<Uuid>, update: Update) -> Outcome {
        let change = self.destinations.set(now, wanted, update);
        for id in &change.removed {
            self.peers.remove(id);
            self.reprogram(id);
        }
        for id in &change.new {
            self.promote(now, id);
            self.reprogram(id);
        }
        let removed = change.given_back.iter().map(remove_tunnel);
        self.outcome(change.asked.iter().map(add_tunnel).chain(removed).collect())
    }

    /// Takes one response of the stream. `last_handshake` says how long ago the engine completed a
    /// handshake with a key.
    pub fn handle_response(
        &mut self,
        now: Instant,
        response: &CoordinateResponse,
        last_handshake: impl Fn(&NodePublic) -> Option<Duration>,
    ) -> Outcome {
        let updates = response.peer_updates.iter();
        let ignored = updates.filter_map(|it| self.handle_update(now, it, &last_handshake).err()).collect();
        let error = Some(response.error.clone()).filter(|error| !error.is_empty());
        if error.as_deref().is_some_and(is_refusal) {
            self.destinations.handle_refusal(now);
        }
        Outcome { error, ignored, ..self.outcome(Requests::new()) }
    }

    /// When [`Self::handle_timeout`] is due next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let peers = self.peers.values().flat_map(|entry| [entry.ready.timeout(), entry.lost_until]);
        peers.flatten().chain(self.destinations.poll_timeout()).min()
    }

    /// Lets time pass: destinations that never announced themselves become ready, lost peers without a
    /// recent handshake are given up.
    pub fn handle_timeout(
        &mut self,
        now: Instant,
        last_handshake: impl Fn(&NodePublic) -> Option<Duration>,
    ) -> Outcome {
        for id in self.due(now) {
            self.handle_peer_timeout(now, &id, &last_handshake);
            self.reprogram(&id);
        }
        let asked = self.destinations.handle_timeout(now);
        self.outcome(asked.iter().map(add_tunnel).collect())
    }
}

impl Coordination {
    fn outcome(&mut self, requests: Requests) -> Outcome {
        let map_changed = std::mem::take(&mut self.map_changed);
        Outcome { map_changed, requests, ..Outcome::default() }
    }

    /// Brings the map's entry of one peer up to date.
    fn reprogram(&mut self, id: &Uuid) {
        let programmed = self.peers.get(id).and_then(|entry| self.programmed(id, entry));
        if self.map.peers.get(id) == programmed.as_ref() {
            return;
        }
        self.map_changed = true;
        match programmed {
            Some(peer) => self.map.peers.insert(*id, peer),
            None => self.map.peers.remove(id),
        };
    }

    fn programmed(&self, id: &Uuid, entry: &Entry) -> Option<Peer> {
        let is_destination = self.destinations.contains(id);
        let may_be_programmed = !is_destination || entry.ready == Ready::Yes;
        // Kept warm also after the timeout: managers show an agent without a fresh handshake as dead.
        let peer = entry.node.as_ref().filter(|_| may_be_programmed)?;
        Some(Peer { keepalive: is_destination, announcements: entry.announcements, ..peer.clone() })
    }

    /// A peer that was known before it became a destination waits for READY from now on.
    fn promote(&mut self, now: Instant, id: &Uuid) {
        let Some(entry) = self.peers.get_mut(id) else { return };
        if entry.node.is_some() && entry.ready == Ready::No {
            entry.ready = Ready::At(now + READY_TIMEOUT);
        }
    }

    fn due(&self, now: Instant) -> Vec<Uuid> {
        let is_due = |entry: &Entry| {
            let timeouts = [entry.ready.timeout(), entry.lost_until];
            timeouts.into_iter().flatten().any(|timeout| timeout <= now)
        };
        self.peers.iter().filter(|(_, entry)| is_due(entry)).map(|(id, _)| *id).collect()
    }

    fn handle_peer_timeout(
        &mut self,
        now: Instant,
        id: &Uuid,
        last_handshake: &impl Fn(&NodePublic) -> Option<Duration>,
    ) {
        let Some(entry) = self.peers.get_mut(id) else { return };
        if entry.ready.timeout().is_some_and(|timeout| timeout <= now) {
            entry.ready = Ready::Yes;
        }
        if entry.lost_until.is_some_and(|until| until <= now) {
            entry.lose(now, last_handshake);
        }
        if entry.lost_until.is_some_and(|until| until <= now) {
            self.peers.remove(id);
        }
    }

    fn handle_update(
        &mut self,
        now: Instant,
        update: &PeerUpdate,
        last_handshake: &impl Fn(&NodePublic) -> Option<Duration>,
    ) -> Result<(), Ignored> {
        let unreadable = |_| Ignored { peer: None, reason: IgnoredReason::Id(update.id.len()) };
        let id = Uuid::from_slice(&update.id).map_err(unreadable)?;
        self.destinations.hear_of(&id);
        let mut handled = Ok(());
        match Kind::try_from(update.kind) {
            Ok(Kind::Node) => handled = self.handle_node(now, id, update.node.as_ref()),
            Ok(Kind::ReadyForHandshake) => handled = self.handle_ready(now, id),
            Ok(Kind::Disconnected) => drop(self.peers.remove(&id)),
            Ok(Kind::Lost) => self.handle_lost(now, &id, last_handshake),
            Ok(Kind::Unspecified) | Err(_) => handled = Err(IgnoredReason::Kind(update.kind)),
        }
        self.reprogram(&id);
        handled.map_err(|reason| Ignored { peer: Some(id), reason })
    }

    fn handle_node(
        &mut self,
        now: Instant,
        id: Uuid,
        node: Option<&tailnet::Node>,
    ) -> Result<(), IgnoredReason> {
        let peer = node::decode(node.ok_or(IgnoredReason::NoNode)?)?;
        let is_destination = self.destinations.contains(&id);
        let entry = self.entry(id)?;
        if entry.has_other_key(&peer) && !entry.was_announced(now) {
            entry.ready = Ready::No;
            (entry.announcements, entry.announced_at) = (0, None);
        }
        entry.node = Some(peer);
        entry.lost_until = None;
        if is_destination && entry.ready != Ready::Yes {
            entry.ready = Ready::At(now + READY_TIMEOUT);
        }
        Ok(())
    }

    fn handle_ready(&mut self, now: Instant, id: Uuid) -> Result<(), IgnoredReason> {
        let entry = self.entry(id)?;
        entry.ready = Ready::Yes;
        if entry.announced_at.replace(now).is_none() {
            entry.announcements = entry.announcements.saturating_add(1);
        }
        Ok(())
    }

    /// The entry of a peer, if there is room for it: destinations are bounded by who wants them.
    fn entry(&mut self, id: Uuid) -> Result<&mut Entry, IgnoredReason> {
        let is_bounded = self.peers.len() < MAX_PEERS || self.destinations.contains(&id);
        match self.peers.entry(id) {
            btree_map::Entry::Occupied(known) => Ok(known.into_mut()),
            btree_map::Entry::Vacant(room) if is_bounded => Ok(room.insert(Entry::default())),
            btree_map::Entry::Vacant(_) => Err(IgnoredReason::TooMany),
        }
    }

    fn handle_lost(
        &mut self,
        now: Instant,
        id: &Uuid,
        last_handshake: &impl Fn(&NodePublic) -> Option<Duration>,
    ) {
        let Some(entry) = self.peers.get_mut(id) else { return };
        entry.announced_at = None;
        entry.lose(now, last_handshake);
    }
}

impl Entry {
    /// Starts or renews the wait until a lost peer is given up; one without a handshake is due at once.
    fn lose(&mut self, now: Instant, last_handshake: &impl Fn(&NodePublic) -> Option<Duration>) {
        let since =
            self.node.as_ref().and_then(|peer| last_handshake(&peer.node_key)).unwrap_or(LOST_TIMEOUT);
        self.lost_until = Some(now + LOST_TIMEOUT.saturating_sub(since));
    }

    fn has_other_key(&self, peer: &Peer) -> bool {
        self.node.as_ref().is_some_and(|known| known.node_key != peer.node_key)
    }

    /// Whether READY was meant for a node that comes now. An agent that comes back sends READY before its
    /// own node: since it was lost, or moments ago where that went unnoticed.
    fn was_announced(&self, now: Instant) -> bool {
        let recent = |at| now.saturating_duration_since(at) <= READY_TIMEOUT;
        self.announced_at.is_some_and(|at| self.lost_until.is_some() || recent(at))
    }
}

impl Ready {
    fn timeout(self) -> Option<Instant> {
        match self {
            Self::At(timeout) => Some(timeout),
            Self::No | Self::Yes => None,
        }
    }
}

/// The only refusal that is about a destination; the text does not say which.
fn is_refusal(error: &str) -> bool {
    error.contains("workspace agent not found")
}

fn add_tunnel(id: &Uuid) -> CoordinateRequest {
    CoordinateRequest { add_tunnel: Some(tunnel(id)), ..CoordinateRequest::default() }
}

fn remove_tunnel(id: &Uuid) -> CoordinateRequest {
    CoordinateRequest { remove_tunnel: Some(tunnel(id)), ..CoordinateRequest::default() }
}

fn tunnel(id: &Uuid) -> Tunnel {
    Tunnel { id: Bytes::copy_from_slice(id.as_bytes()) }
}

#[cfg(test)]
mod tests;
