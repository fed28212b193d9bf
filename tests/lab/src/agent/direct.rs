//! What makes an agent talk directly, without its sockets: the reference's choice of paths, the list of its own
//! endpoints, the datagrams that wait to be sent, and what can be asked about all that.

mod node;
mod own;

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use warren_proto::key::{DiscoPublic, NodePublic, random};

pub use self::node::{Best, Direct};
pub(super) use self::node::{Effect, Origin, Probe, TxId};
use self::{node::Node, own::Collector};
use crate::reference::{Route, Via};

/// Datagrams that wait for a socket; what is more is dropped, as a full socket does.
const MAX_WAITING: usize = 1024;

/// A datagram to be sent.
pub(super) struct Datagram {
    pub(super) to: SocketAddr,
    pub(super) bytes: Vec<u8>,
    /// If it is a ping.
    pub(super) ping: Option<TxId>,
}

/// Which way a packet went, or came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Straight.
    Udp,
    /// Through the relay.
    Relay,
    /// Both, as while no path is trusted.
    Both,
}

/// Datagrams of WireGuard by the way they went or came; what went both ways counts for both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packets {
    /// Straight.
    pub udp: u64,
    /// Through the relay.
    pub relay: u64,
}

/// Probes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probes {
    /// Pings over UDP.
    pub pings: u64,
    /// Pings through the relay.
    pub relayed_pings: u64,
    /// Pongs.
    pub pongs: u64,
    /// CallMeMaybe messages.
    pub calls: u64,
}

/// An agent's ways to one peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerPath {
    /// The best direct path, dead or alive.
    pub best: Option<Best>,
    /// What was sent.
    pub sent: Packets,
    /// What was received.
    pub received: Packets,
    /// Which way the last packet was sent.
    pub last_sent: Option<Taken>,
    /// Which way the last packet came.
    pub last_received: Option<Taken>,
    /// Probes sent to it.
    pub probes_sent: Probes,
    /// Probes received from it.
    pub probes_received: Probes,
}

/// An agent's paths in its present life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentPath {
    /// Where it says that it can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// WireGuard datagrams that were dropped because nobody is known to be where they came from.
    pub unknown: u64,
    /// Datagrams, either direction, that were dropped on purpose, those of earlier lives included.
    pub dropped: u64,
    /// The peers it has, by their node keys.
    pub peers: BTreeMap<NodePublic, PeerPath>,
}

impl AgentPath {
    /// The ways to its peer, if it has just one.
    #[must_use]
    pub fn only(&self) -> Option<&PeerPath> {
        let mut all = self.peers.values();
        all.next().filter(|_| all.next().is_none())
    }
}

pub(super) struct DirectCore {
    node: Node,
    own: Collector,
    /// Addresses of the sockets.
    locals: Vec<SocketAddr>,
    /// As told to peers.
    endpoints: Vec<SocketAddr>,
    out: VecDeque<Datagram>,
    wants_rebind: bool,
    unknown: u64,
    seen: BTreeMap<NodePublic, PeerPath>,
    last_packet: Option<Instant>,
}

impl DirectCore {
    /// Asks these STUN servers.
    pub(super) fn new(servers: Vec<SocketAddr>, direct: Direct) -> Self {
        Self {
            node: Node::new(direct),
            own: Collector::new(servers),
            locals: Vec::new(),
            endpoints: Vec::new(),
            out: VecDeque::new(),
            wants_rebind: false,
            unknown: 0,
            seen: BTreeMap::new(),
            last_packet: None,
        }
    }

    pub(super) fn path(&self, now: Instant) -> AgentPath {
        let with_best = |(key, seen): (&NodePublic, &PeerPath)| {
            (*key, PeerPath { best: self.node.best(now, key), ..*seen })
        };
        AgentPath {
            endpoints: self.endpoints.clone(),
            unknown: self.unknown,
            dropped: 0,
            peers: self.seen.iter().map(with_best).collect(),
        }
    }

    pub(super) fn endpoints(&self) -> &[SocketAddr] {
        &self.endpoints
    }

    pub(super) fn handle_node(
        &mut self,
        now: Instant,
        key: NodePublic,
        disco: DiscoPublic,
        endpoints: &[SocketAddr],
    ) {
        self.seen.entry(key).or_default();
        self.node.handle_node(now, key, disco, endpoints);
    }

    pub(super) fn remove(&mut self, key: &NodePublic) {
        self.seen.remove(key);
        self.node.remove(key);
    }

    /// Allows or blocks direct paths. The list of our own endpoints is empty at once, or made anew.
    pub(super) fn set_direct(&mut self, now: Instant, direct: Direct) {
        self.node.set_direct(direct);
        if self.node.is_blocked() {
            self.endpoints.clear();
            self.node.handle_own_endpoints(now, &[]);
        } else {
            self.own.want();
        }
    }

    /// Asks for other sockets.
    pub(super) fn want_rebind(&mut self) {
        self.wants_rebind = true;
    }

    pub(super) fn take_rebind(&mut self) -> bool {
        std::mem::take(&mut self.wants_rebind)
    }

    /// Takes the addresses of new sockets: a major change, unless they are the first (7.9).
    pub(super) fn handle_sockets(&mut self, locals: Vec<SocketAddr>) {
        self.locals = locals;
        self.own.forget();
        self.own.want();
        self.node.handle_link_change();
    }

    /// Takes a STUN message.
    pub(super) fn handle_stun(&mut self, now: Instant, packet: &[u8]) {
        self.own.handle_answer(now, packet);
    }

    /// Lets time pass. Returns whether our endpoints are others than before.
    pub(super) fn pass_time(&mut self, now: Instant) -> bool {
        self.node.handle_timeout(now);
        let has_socket_for =
            |server: &SocketAddr| self.locals.iter().any(|own| own.is_ipv4() == server.is_ipv4());
        for (to, bytes) in self.own.questions(now, has_socket_for) {
            self.put(Datagram { to, bytes, ping: None });
        }
        let is_active = !self.seen.is_empty()
            && self.last_packet.is_some_and(|last| now.duration_since(last) <= own::ACTIVE);
        let Some(collected) = self.own.collected(now, is_active, &self.locals) else { return false };
        let endpoints = if self.node.is_blocked() { Vec::new() } else { collected };
        self.node.handle_own_endpoints(now, &endpoints);
        std::mem::replace(&mut self.endpoints, endpoints) != self.endpoints
    }

    /// When time has to pass.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        [self.node.poll_timeout(), self.own.due(now)].into_iter().flatten().min()
    }

    /// Who sends WireGuard from there, if anybody is known to.
    pub(super) fn wireguard_from(&mut self, now: Instant, source: &SocketAddr) -> Option<NodePublic> {
        let owner = self.node.source(source);
        match owner {
            Some(owner) => self.note_received(now, owner, Taken::Udp),
            None => self.unknown += 1,
        }
        owner
    }

    /// Notes a WireGuard packet.
    pub(super) fn note_received(&mut self, now: Instant, from: NodePublic, way: Taken) {
        self.last_packet = Some(now);
        if let Some(seen) = self.seen.get_mut(&from) {
            seen.received.add(way);
            seen.last_received = Some(way);
        }
    }

    /// Puts a WireGuard packet on the direct path, if it is to take that. Returns whether it is relayed too.
    pub(super) fn send(&mut self, now: Instant, to: NodePublic, packet: &[u8]) -> bool {
        self.last_packet = Some(now);
        let Route { direct, relay } = self.node.route(now, &to);
        let way = match (direct, relay) {
            (Some(_), false) => Taken::Udp,
            (Some(_), true) => Taken::Both,
            (None, _) => Taken::Relay,
        };
        if let Some(seen) = self.seen.get_mut(&to) {
            seen.sent.add(way);
            seen.last_sent = Some(way);
        }
        if let Some(to) = direct {
            self.put(Datagram { to, bytes: packet.to_vec(), ping: None });
        }
        relay
    }

    /// Takes a probe of a peer.
    pub(super) fn handle_probe(
        &mut self,
        now: Instant,
        from: Origin,
        (key, disco): (NodePublic, DiscoPublic),
        probe: &Probe,
    ) {
        if let Some(seen) = self.seen.get_mut(&key) {
            seen.probes_received.add(from.via(), probe);
        }
        self.node.handle_probe(now, from, disco, probe);
    }

    /// The next probe that is to be sent.
    pub(super) fn next_effect(&mut self) -> Option<Effect> {
        loop {
            match self.node.poll_effect()? {
                Effect::CollectEndpoints => self.own.want(),
                effect => return Some(effect),
            }
        }
    }

    /// Notes a probe that is sent.
    pub(super) fn note_probe(&mut self, to: &NodePublic, via: Via, probe: &Probe) {
        if let Some(seen) = self.seen.get_mut(to) {
            seen.probes_sent.add(via, probe);
        }
    }

    /// Asks a peer for a sign of life, whichever way.
    pub(super) fn user_ping(&mut self, now: Instant, key: &NodePublic) {
        self.node.user_ping(now, key);
    }

    pub(super) fn put(&mut self, datagram: Datagram) {
        if self.out.len() < MAX_WAITING {
            self.out.push_back(datagram);
        }
    }

    pub(super) fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    /// Whether the shell has something to do besides waiting.
    pub(super) fn needs_shell(&self) -> bool {
        self.has_output() || self.wants_rebind || self.own.is_wanted()
    }

    pub(super) fn take_output(&mut self, into: &mut VecDeque<Datagram>) {
        std::mem::swap(&mut self.out, into);
    }

    /// A datagram could not be sent.
    pub(super) fn handle_unsent(&mut self, datagram: &Datagram) {
        if let Some(txid) = &datagram.ping {
            self.node.handle_unsent(txid);
        }
    }
}

impl Packets {
    fn add(&mut self, way: Taken) {
        self.udp += u64::from(way != Taken::Relay);
        self.relay += u64::from(way != Taken::Udp);
    }
}

impl Probes {
    fn add(&mut self, via: Via, probe: &Probe) {
        let count = match (probe, via) {
            (Probe::Ping { .. }, Via::Direct(_)) => &mut self.pings,
            (Probe::Ping { .. }, Via::Relay) => &mut self.relayed_pings,
            (Probe::Pong { .. }, _) => &mut self.pongs,
            (Probe::CallMeMaybe(_), _) => &mut self.calls,
        };
        *count += 1;
    }
}

/// From `least` to three tenths of it more, at random.
fn jittered(least: Duration) -> Duration {
    least + least.mul_f64(f64::from(u32::from_ne_bytes(random())) / f64::from(u32::MAX) * 0.3)
}
