//! A whole peer, without its sockets: paths, receive map and own endpoints, as the data plane holds them together.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use warren_core::{
    path::{Direct, ReceiveMap, RelayStands, Route, Via},
    relay_map::RegionId,
};
use warren_proto::{disco::TxId, key::NodePublic};

use super::{
    engine::{Engine, Make},
    network::HostId,
};

/// The only region of these worlds.
pub(crate) const REGION: RegionId = RegionId(1);

/// Without anything to say, what was heard is acknowledged after so long (tailnet-data 10.2).
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Who is who.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PeerId(pub(crate) usize);

impl PeerId {
    fn key(self) -> NodePublic {
        NodePublic([self.0 as u8 + 1; 32])
    }
}

/// A data packet: WireGuard's, as far as anybody can see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Data {
    /// Counts the packets from one peer to another; a keepalive has none.
    pub(crate) number: Option<u64>,
}

/// What peers send each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    Ping(TxId),
    Pong { txid: TxId, observed: SocketAddr },
    CallMeMaybe(Vec<SocketAddr>),
    Data(Data),
}

/// A peer of the world.
pub(crate) struct Peer {
    pub(crate) make: Make,
    pub(crate) host: HostId,
    /// Of its sockets.
    pub(crate) port: u16,
    pub(crate) others: BTreeMap<PeerId, Other>,
    sources: ReceiveMap,
    /// As last collected.
    pub(crate) endpoints: Vec<SocketAddr>,
    /// Whether its link to the relay is up.
    pub(crate) has_relay: bool,
    pub(crate) policy: Direct,
    /// Whether it sends a packet for each that comes.
    pub(crate) is_answering: bool,
}

/// What a peer knows of another.
pub(crate) struct Other {
    pub(crate) path: Engine,
    /// When each of the packets to it was sent.
    pub(crate) sent: Vec<Instant>,
    /// Which of its packets came, each counted once.
    pub(crate) received: BTreeSet<u64>,
    /// How many of them came over UDP, copies included.
    pub(crate) came_directly: u64,
    last_sent: Option<Instant>,
    unanswered_since: Option<Instant>,
}

/// What became of something that arrived over UDP.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reaction {
    Taken,
    /// To be answered by the same way.
    Answer(Said),
    /// From a source that no ping has shown to be the peer's.
    UnknownSource,
}

impl Peer {
    pub(crate) fn new(make: Make, host: HostId, port: u16) -> Self {
        let (others, sources, endpoints) = (BTreeMap::new(), ReceiveMap::default(), Vec::new());
        let policy = Direct::Allowed;
        Self { make, host, port, others, sources, endpoints, has_relay: true, policy, is_answering: false }
    }

    pub(crate) fn other(&mut self, id: PeerId) -> &mut Other {
        self.others.entry(id).or_insert_with(|| Other::new(self.make))
    }

    /// Whether something is a packet that is to be answered by another.
    pub(crate) fn is_question(&self, from: PeerId, said: &Said) -> bool {
        let Said::Data(Data { number: Some(number) }) = said else { return false };
        self.is_answering && !self.others[&from].received.contains(number)
    }

    /// What the control plane tells others of our endpoints.
    pub(crate) fn published(&self) -> Vec<SocketAddr> {
        match self.policy {
            Direct::Allowed => self.endpoints.clone(),
            Direct::Blocked => Vec::new(),
        }
    }

    /// Takes what came from a peer.
    pub(crate) fn hear(&mut self, now: Instant, from: PeerId, via: Via, said: Said) -> Reaction {
        if let (Said::Data(_), Via::Direct(source)) = (&said, via)
            && self.sources.get(&source) != Some(&from.key())
        {
            return Reaction::UnknownSource;
        }
        let other = self.other(from);
        match said {
            Said::Ping(txid) => {
                let observed = match via {
                    Via::Direct(source) => source,
                    Via::Relay(_) => SocketAddr::from(([127, 3, 3, 40], REGION.0)),
                };
                if other.path.handle_ping(now, via, txid) {
                    return Reaction::Answer(Said::Pong { txid, observed });
                }
            }
            Said::Pong { txid, observed } => other.path.handle_pong(now, via, txid, observed),
            Said::CallMeMaybe(endpoints) => other.path.handle_call_me_maybe(now, &endpoints),
            Said::Data(data) => {
                other.path.handle_received(now, via);
                other.received.extend(data.number);
                other.came_directly += u64::from(matches!(via, Via::Direct(_)));
                if data.number.is_some() {
                    other.unanswered_since.get_or_insert(now);
                }
            }
        }
        Reaction::Taken
    }

    /// The next packet to a peer, and where it goes.
    pub(crate) fn send(&mut self, now: Instant, to: PeerId) -> (Data, Route) {
        let other = self.other(to);
        other.sent.push(now);
        let number = Some(other.sent.len() as u64);
        other.note_sent(now);
        (Data { number }, other.path.route(now))
    }

    /// When the next timer of a path, or a keepalive, is due.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let due = |other: &Other| other.path.poll_timeout().into_iter().chain(other.keepalive_due()).min();
        self.others.values().filter_map(due).min()
    }

    /// Lets time pass; returns the keepalives to send.
    pub(crate) fn handle_timeout(&mut self, now: Instant) -> Vec<(PeerId, Data, Route)> {
        let mut keepalives = Vec::new();
        for (id, other) in &mut self.others {
            other.path.handle_timeout(now);
            if other.keepalive_due().is_some_and(|due| due <= now) {
                other.note_sent(now);
                keepalives.push((*id, Data { number: None }, other.path.route(now)));
            }
        }
        keepalives
    }

    pub(crate) fn verify(&mut self, source: SocketAddr, peer: PeerId) {
        self.sources.insert(source, peer.key());
    }

    pub(crate) fn forget(&mut self, source: SocketAddr, peer: PeerId) {
        self.sources.remove(&source, &peer.key());
    }

    /// Our endpoints are these now.
    pub(crate) fn collect(&mut self, now: Instant, endpoints: Vec<SocketAddr>) {
        self.endpoints = endpoints;
        for other in self.others.values_mut() {
            other.path.handle_own_endpoints(now, &self.endpoints);
        }
    }

    /// Our link changed.
    pub(crate) fn change_link(&mut self, now: Instant) {
        self.others.values_mut().for_each(|other| other.path.handle_link_change(now));
    }

    /// Whether direct paths may be used.
    pub(crate) fn set_policy(&mut self, now: Instant, policy: Direct) {
        self.policy = policy;
        self.others.values_mut().for_each(|other| other.path.set_policy(now, policy));
    }

    /// The relay has answered, or not.
    pub(crate) fn prove_relay(&mut self, now: Instant, stands: RelayStands) {
        self.others.values_mut().for_each(|other| other.path.handle_relay(now, stands));
    }
}

impl Other {
    fn new(make: Make) -> Self {
        Self {
            path: Engine::new(make),
            sent: Vec::new(),
            received: BTreeSet::new(),
            came_directly: 0,
            last_sent: None,
            unanswered_since: None,
        }
    }

    fn note_sent(&mut self, now: Instant) {
        self.last_sent = Some(now);
        self.unanswered_since = None;
    }

    fn keepalive_due(&self) -> Option<Instant> {
        self.unanswered_since.map(|since| since + KEEPALIVE)
    }
}
