//! The control plane, and what a peer has to do with it: coordination and the own node, as in the program.
//!
//! ```text
//! client ── tunnel, node ──> control plane ── node ──> agent
//!        <── node, READY ──               <── node, READY ──
//! ```
//! A peer of ours is a client and wants tunnels to agents; a reference peer is an agent. Where all are ours each is
//! both.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv6Addr, SocketAddr},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use uuid::Uuid;
use warren_core::{
    coordination::{Coordination, NetworkMap},
    own_node::{OwnIdentity, OwnNode},
    roster::Update,
};
use warren_proto::{
    key::{DiscoPublic, NodePublic},
    tailnet::{
        CoordinateRequest, CoordinateResponse, Node,
        coordinate_request::ReadyForHandshake,
        coordinate_response::{PeerUpdate, peer_update::Kind},
    },
};

use super::{
    engine::Make,
    peer::{PeerId, REGION},
};

impl PeerId {
    fn uuid(self) -> Uuid {
        Uuid::from_u128(self.0 as u128 + 1)
    }

    pub(crate) fn of_uuid(id: &Uuid) -> Self {
        Self(id.as_u128() as usize - 1)
    }

    fn of_bytes(id: &Bytes) -> Self {
        Self::of_uuid(&Uuid::from_slice(id).unwrap())
    }

    fn to_bytes(self) -> Bytes {
        Bytes::copy_from_slice(self.uuid().as_bytes())
    }

    /// Its inner address.
    pub(crate) fn address(self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd60, 0x627a, 0xa42b, 0, 0, 0, 0, self.0 as u16 + 1)
    }
}

/// The control plane: the nodes that were told, and the tunnels that were asked for.
#[derive(Debug, Default)]
pub(crate) struct Control {
    nodes: BTreeMap<PeerId, Node>,
    tunnels: BTreeSet<(PeerId, PeerId)>,
}

impl Control {
    /// Takes a request; says who is told what.
    pub(crate) fn handle(
        &mut self,
        from: PeerId,
        request: CoordinateRequest,
    ) -> Vec<(PeerId, CoordinateResponse)> {
        let mut told = Vec::new();
        if let Some(node) = request.update_self.and_then(|update| update.node) {
            self.nodes.insert(from, node);
            let others = self.tunnels.iter().filter(|(one, other)| *one == from || *other == from);
            let others: BTreeSet<PeerId> = others.flat_map(|(one, other)| [*one, *other]).collect();
            told.extend(others.into_iter().filter(|to| *to != from).filter_map(|to| self.node(to, from)));
        }
        if let Some(tunnel) = request.add_tunnel {
            let to = PeerId::of_bytes(&tunnel.id);
            self.tunnels.insert((from, to));
            told.extend([self.node(from, to), self.node(to, from)].into_iter().flatten());
        }
        for ready in &request.ready_for_handshake {
            told.push((PeerId::of_bytes(&ready.id), update(from, Kind::ReadyForHandshake, None)));
        }
        told
    }

    fn node(&self, to: PeerId, about: PeerId) -> Option<(PeerId, CoordinateResponse)> {
        self.nodes.get(&about).map(|node| (to, update(about, Kind::Node, Some(node.clone()))))
    }
}

fn update(about: PeerId, kind: Kind, node: Option<Node>) -> CoordinateResponse {
    let update = PeerUpdate { id: about.to_bytes(), node, kind: kind.into(), reason: String::new() };
    CoordinateResponse { peer_updates: vec![update], error: String::new() }
}

/// A peer's side of it.
#[derive(Debug)]
pub(crate) struct Member {
    make: Make,
    /// Whether it tells those that it hears of that it knows them.
    is_agent: bool,
    wanted: BTreeSet<Uuid>,
    coordination: Coordination,
    own: OwnNode,
    endpoints: Vec<SocketAddr>,
    is_connected: bool,
    due: Option<Instant>,
}

/// What a peer has to do.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Whether other peers are to be programmed, or otherwise.
    pub(crate) map_changed: bool,
    /// What the control plane is to be sent.
    pub(crate) requests: Vec<CoordinateRequest>,
}

impl Member {
    /// One of the peers with these makes; not connected yet.
    pub(crate) fn new(id: PeerId, key: NodePublic, makes: &[Make]) -> Self {
        let make = makes[id.0];
        let is_agent = |id: PeerId| makes[id.0] == Make::Reference || !makes.contains(&Make::Reference);
        let others = (0..makes.len()).map(PeerId).filter(|other| *other != id && is_agent(*other));
        let wanted = if make == Make::Ours { others.map(PeerId::uuid).collect() } else { BTreeSet::new() };
        let identity = OwnIdentity {
            node_id: id.0 as i64 + 1,
            node_key: key,
            disco_key: DiscoPublic(key.0),
            address: id.address(),
        };
        let mut own = OwnNode::new(identity);
        own.set_home(Some(REGION));
        Self {
            make,
            is_agent: is_agent(id),
            wanted,
            coordination: Coordination::default(),
            own,
            endpoints: Vec::new(),
            is_connected: false,
            due: None,
        }
    }

    /// The peers to be programmed.
    pub(crate) fn map(&self) -> &NetworkMap {
        self.coordination.network_map()
    }

    /// The stream to the control plane begins.
    pub(crate) fn connect(&mut self, now: Instant) -> Outcome {
        self.is_connected = true;
        self.own.connected();
        let mut outcome = self.coordination.set_destinations(now, &self.wanted, Update::Snapshot);
        outcome.requests.extend(self.coordination.connected(now));
        self.finish(now, outcome.map_changed, outcome.requests)
    }

    /// Takes what the control plane says.
    pub(crate) fn hear(
        &mut self,
        now: Instant,
        response: &CoordinateResponse,
        last_handshake: impl Fn(&NodePublic) -> Option<Duration>,
    ) -> Outcome {
        let mut outcome = self.coordination.handle_response(now, response, last_handshake);
        assert_eq!((&outcome.error, &outcome.ignored), (&None, &Vec::new()));
        let nodes = response.peer_updates.iter().filter(|update| update.kind() == Kind::Node);
        let ready = nodes.filter(|_| self.is_agent).map(|update| ReadyForHandshake { id: update.id.clone() });
        let ready_for_handshake: Vec<ReadyForHandshake> = ready.collect();
        if !ready_for_handshake.is_empty() {
            outcome.requests.push(CoordinateRequest { ready_for_handshake, ..CoordinateRequest::default() });
        }
        self.finish(now, outcome.map_changed, outcome.requests)
    }

    /// Takes the endpoints that may be told. Ours gathers changes for a second, a reference peer tells each.
    pub(crate) fn set_endpoints(&mut self, now: Instant, endpoints: Vec<SocketAddr>) {
        if endpoints == self.endpoints {
            return;
        }
        self.endpoints.clone_from(&endpoints);
        self.own.set_endpoints(endpoints);
        if self.make == Make::Reference && self.is_connected {
            self.own.connected();
        }
        self.note_due(now);
    }

    /// When [`Self::handle_timeout`] is due.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.due
    }

    /// Lets time pass.
    pub(crate) fn handle_timeout(
        &mut self,
        now: Instant,
        last_handshake: impl Fn(&NodePublic) -> Option<Duration>,
    ) -> Outcome {
        if self.due.is_none_or(|due| now < due) {
            return Outcome::default();
        }
        let outcome = self.coordination.handle_timeout(now, last_handshake);
        self.finish(now, outcome.map_changed, outcome.requests)
    }

    fn finish(&mut self, now: Instant, map_changed: bool, requests: Vec<CoordinateRequest>) -> Outcome {
        let news = self.own.poll_update(now, SystemTime::UNIX_EPOCH);
        self.note_due(now);
        Outcome { map_changed, requests: requests.into_iter().chain(news).collect() }
    }

    fn note_due(&mut self, now: Instant) {
        self.due = self.coordination.poll_timeout().into_iter().chain(self.own.poll_timeout(now)).min();
    }
}
