//! What the reference's choice of paths needs around it in a node with several peers: whose a probe is, and whose
//! WireGuard comes from where (5.2, 7.6).

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use warren_proto::key::{DiscoPublic, NodePublic, random};

use crate::reference::{self, Reference, Route, Via};

/// Entries of the receive map. The reference has no such limit; only who knows a peer's keys makes entries.
const MAX_SOURCES: usize = 4096;

/// The transaction of a ping.
pub(in crate::agent) type TxId = [u8; 12];

/// Who a probe came from, as the transport tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::agent) enum Origin {
    /// A datagram.
    Udp(SocketAddr),
    /// A packet of the relay, which names the node that sent it.
    Relay(NodePublic),
}

impl Origin {
    pub(super) fn via(self) -> Via {
        match self {
            Self::Udp(source) => Via::Direct(source),
            Self::Relay(_) => Via::Relay,
        }
    }
}

/// What a probe says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::agent) enum Probe {
    Ping { txid: TxId, node: Option<NodePublic> },
    Pong { txid: TxId, observed: SocketAddr },
    CallMeMaybe(Vec<SocketAddr>),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::agent) enum Effect {
    Ping {
        peer: NodePublic,
        via: Via,
        txid: TxId,
    },
    /// Answers a ping; `peer` has the key of its probes.
    Pong {
        peer: NodePublic,
        to: Via,
        txid: TxId,
    },
    CallMeMaybe {
        peer: NodePublic,
        endpoints: Vec<SocketAddr>,
    },
    /// Asks STUN servers; [`Node::handle_own_endpoints`] takes the result.
    CollectEndpoints,
    /// A person's ping was answered.
    UserPong,
}

/// The best direct path to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Best {
    /// Where it leads.
    pub address: SocketAddr,
    /// Its last round trip.
    pub latency: Duration,
    /// Whether it is taken alone.
    pub is_trusted: bool,
}

/// Whether direct paths may be used (7.10).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// Like any peer.
    #[default]
    Allowed,
    /// Only over relays.
    Blocked,
}

/// The peers of one node, and the paths to them.
pub(in crate::agent) struct Node {
    peers: BTreeMap<NodePublic, Peer>,
    sources: BTreeMap<SocketAddr, NodePublic>,
    direct: Direct,
    own: Vec<SocketAddr>,
    own_since: Option<Instant>,
    effects: VecDeque<Effect>,
}

struct Peer {
    disco: DiscoPublic,
    path: Reference,
}

/// Whether what a peer's path has verified is the peer's.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    Sure,
    Doubtful,
}

impl Node {
    pub(super) fn new(direct: Direct) -> Self {
        Self {
            peers: BTreeMap::new(),
            sources: BTreeMap::new(),
            direct,
            own: Vec::new(),
            own_since: None,
            effects: VecDeque::new(),
        }
    }

    /// Takes a peer's present node message. One with another key for its probes is met anew.
    pub(super) fn handle_node(
        &mut self,
        now: Instant,
        key: NodePublic,
        disco: DiscoPublic,
        endpoints: &[SocketAddr],
    ) {
        if self.peers.get(&key).is_none_or(|peer| peer.disco != disco) {
            let mut path = Reference::new();
            path.set_blocked(self.direct == Direct::Blocked);
            if let Some(since) = self.own_since {
                path.handle_own_endpoints(since, &self.own);
            }
            path.handle_ready(now);
            self.peers.insert(key, Peer { disco, path });
        }
        self.with(key, |path| path.handle_node(now, endpoints));
    }

    pub(super) fn remove(&mut self, key: &NodePublic) {
        self.peers.remove(key);
        self.sources.retain(|_, owner| owner != key);
    }

    pub(super) fn handle_own_endpoints(&mut self, now: Instant, own: &[SocketAddr]) {
        (self.own, self.own_since) = (own.to_vec(), Some(now));
        self.with_all(|path| path.handle_own_endpoints(now, own));
    }

    pub(super) fn set_direct(&mut self, direct: Direct) {
        self.direct = direct;
        self.with_all(|path| path.set_blocked(direct == Direct::Blocked));
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.direct == Direct::Blocked
    }

    pub(super) fn handle_link_change(&mut self) {
        self.with_all(Reference::handle_link_change);
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.with_all(|path| path.handle_timeout(now));
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.peers.values().filter_map(|peer| peer.path.poll_timeout()).min()
    }

    /// Takes a probe that opened with `sender`'s key.
    pub(super) fn handle_probe(&mut self, now: Instant, from: Origin, sender: DiscoPublic, probe: &Probe) {
        if matches!(from, Origin::Udp(_)) && self.is_blocked() {
            return;
        }
        match probe {
            Probe::Ping { txid, node } => self.handle_ping(now, from, sender, *txid, *node),
            Probe::Pong { txid, .. } => self.handle_pong(now, from, sender, *txid),
            Probe::CallMeMaybe(endpoints) => {
                let Origin::Relay(key) = from else { return };
                if self.has_disco(&key, sender) {
                    self.with(key, |path| path.handle_call_me_maybe(now, endpoints));
                }
            }
        }
    }

    fn handle_ping(
        &mut self,
        now: Instant,
        from: Origin,
        sender: DiscoPublic,
        txid: TxId,
        claimed: Option<NodePublic>,
    ) {
        let owner = self.owner(from, sender, claimed);
        let only = match from {
            Origin::Udp(_) => None,
            Origin::Relay(key) => Some(key),
        };
        let theirs: Vec<NodePublic> =
            self.with_disco(sender).filter(|key| only.is_none_or(|only| *key == only)).collect();
        for key in &theirs {
            let claim = if owner == Some(*key) { Claim::Sure } else { Claim::Doubtful };
            let is_owed = self.with_claim(*key, claim, |path| path.handle_ping(now, from.via(), txid));
            if is_owed != Some(true) {
                return;
            }
        }
        if let Some(peer) = theirs.first() {
            self.effects.push_back(Effect::Pong { peer: *peer, to: from.via(), txid });
        }
    }

    /// Whose ping it is, if that is beyond doubt.
    fn owner(&self, from: Origin, sender: DiscoPublic, claimed: Option<NodePublic>) -> Option<NodePublic> {
        if let Origin::Relay(key) = from
            && self.has_disco(&key, sender)
        {
            return Some(key);
        }
        if let Some(key) = claimed.filter(|key| self.has_disco(key, sender)) {
            return Some(key);
        }
        let mut all = self.with_disco(sender);
        all.next().filter(|_| all.next().is_none())
    }

    fn handle_pong(&mut self, now: Instant, from: Origin, sender: DiscoPublic, txid: TxId) {
        for key in self.with_disco(sender).collect::<Vec<_>>() {
            let answer = self.with(key, |path| path.handle_pong(now, from.via(), txid)).flatten();
            if let Some(answer) = answer {
                self.effects.extend(answer.is_user.then_some(Effect::UserPong));
                return;
            }
        }
    }

    fn has_disco(&self, key: &NodePublic, disco: DiscoPublic) -> bool {
        self.peers.get(key).is_some_and(|peer| peer.disco == disco)
    }

    fn with_disco(&self, disco: DiscoPublic) -> impl Iterator<Item = NodePublic> {
        self.peers.iter().filter(move |(_, peer)| peer.disco == disco).map(|(key, _)| *key)
    }

    /// Whose WireGuard comes from there; what comes from elsewhere is dropped.
    pub(super) fn source(&self, address: &SocketAddr) -> Option<NodePublic> {
        self.sources.get(address).copied()
    }

    /// Where a WireGuard packet to a peer goes. It is taken as sent.
    pub(super) fn route(&mut self, now: Instant, key: &NodePublic) -> Route {
        self.with(*key, |path| path.route(now)).unwrap_or_default()
    }

    pub(super) fn user_ping(&mut self, now: Instant, key: &NodePublic) {
        self.with(*key, |path| path.user_ping(now));
    }

    pub(super) fn handle_unsent(&mut self, txid: &TxId) {
        self.with_all(|path| path.handle_unsent(txid));
    }

    pub(super) fn best(&self, now: Instant, key: &NodePublic) -> Option<Best> {
        let path = &self.peers.get(key)?.path;
        let reference::Best { address, latency } = path.best()?;
        Some(Best { address, latency, is_trusted: path.trusted(now).is_some() })
    }

    pub(super) fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    fn with_all(&mut self, mut change: impl FnMut(&mut Reference)) {
        for key in self.peers.keys().copied().collect::<Vec<_>>() {
            self.with(key, &mut change);
        }
    }

    fn with<T>(&mut self, key: NodePublic, change: impl FnOnce(&mut Reference) -> T) -> Option<T> {
        self.with_claim(key, Claim::Sure, change)
    }

    /// Changes a path and takes what it wants done.
    fn with_claim<T>(
        &mut self,
        key: NodePublic,
        claim: Claim,
        change: impl FnOnce(&mut Reference) -> T,
    ) -> Option<T> {
        let path = &mut self.peers.get_mut(&key)?.path;
        let result = change(path);
        while let Some(effect) = path.poll_effect(&mut random) {
            self.effects.push_back(match effect {
                reference::Effect::Ping { to, txid } => {
                    Effect::Ping { peer: key, via: Via::Direct(to), txid }
                }
                reference::Effect::RelayPing { txid } => Effect::Ping { peer: key, via: Via::Relay, txid },
                reference::Effect::CallMeMaybe(endpoints) => Effect::CallMeMaybe { peer: key, endpoints },
                reference::Effect::RefreshEndpoints => Effect::CollectEndpoints,
                reference::Effect::Verified(source) => {
                    let has_room = self.sources.len() < MAX_SOURCES || self.sources.contains_key(&source);
                    if claim == Claim::Sure && has_room {
                        self.sources.insert(source, key);
                    }
                    continue;
                }
            });
        }
        Some(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THEM: NodePublic = NodePublic([2; 32]);
    const OTHER: NodePublic = NodePublic([9; 32]);
    const DISCO: DiscoPublic = DiscoPublic([3; 32]);
    const RELAYED: Origin = Origin::Relay(THEM);

    fn x() -> SocketAddr {
        "10.0.0.1:7".parse().unwrap()
    }

    fn node() -> (Node, Instant) {
        let (mut node, now) = (Node::new(Direct::Allowed), Instant::now());
        node.handle_own_endpoints(now, &["192.0.2.1:1".parse().unwrap()]);
        node.handle_node(now, THEM, DISCO, &[]);
        (node, now)
    }

    fn ping(number: u8, node: Option<NodePublic>) -> Probe {
        Probe::Ping { txid: [number; 12], node }
    }

    fn effects(node: &mut Node) -> Vec<Effect> {
        std::iter::from_fn(|| node.poll_effect()).collect()
    }

    #[test]
    fn wireguard_is_taken_from_a_source_once_a_ping_or_a_pong_came_from_it() {
        let (mut node, now) = node();
        assert_eq!(node.source(&x()), None);
        node.handle_probe(now, Origin::Udp(x()), DISCO, &ping(1, Some(THEM)));
        assert_eq!(node.source(&x()), Some(THEM));
        node.remove(&THEM);
        assert_eq!(node.source(&x()), None);
        node.handle_node(now, THEM, DISCO, &[x()]);
        let _ = node.route(now, &THEM);
        let Some(Effect::Ping { txid, .. }) =
            effects(&mut node).into_iter().find(|effect| matches!(effect, Effect::Ping { .. }))
        else {
            panic!("a first packet comes with a ping")
        };
        node.handle_probe(now, Origin::Udp(x()), DISCO, &Probe::Pong { txid, observed: x() });
        assert_eq!((node.source(&x()), node.best(now, &THEM).unwrap().is_trusted), (Some(THEM), true));
    }

    #[test]
    fn a_ping_of_a_key_that_two_peers_share_tells_whose_it_is_by_its_node_key() {
        let (mut node, now) = node();
        node.handle_node(now, OTHER, DISCO, &[]);
        node.handle_probe(now, Origin::Udp(x()), DISCO, &ping(1, None));
        assert_eq!((effects(&mut node).len(), node.source(&x())), (1, None), "answered all the same");
        node.handle_probe(now, Origin::Udp(x()), DISCO, &ping(2, Some(OTHER)));
        assert_eq!(node.source(&x()), Some(OTHER));
        let _ = effects(&mut node);
        // Over the relay it is the sender's alone.
        node.handle_probe(now, RELAYED, DISCO, &ping(3, Some(OTHER)));
        assert_eq!(effects(&mut node), [Effect::Pong { peer: THEM, to: Via::Relay, txid: [3; 12] }]);
        let _ = node.route(now, &OTHER);
        let is_relayed = |effect: &Effect| matches!(effect, Effect::Ping { via: Via::Relay, .. });
        assert!(!effects(&mut node).iter().any(is_relayed), "the relay is no candidate of the other");
    }

    #[test]
    fn a_ping_is_answered_once_for_its_transaction_and_one_of_an_unknown_key_never() {
        let (mut node, now) = node();
        for expected in [1, 0] {
            node.handle_probe(now, Origin::Udp(x()), DISCO, &ping(1, Some(THEM)));
            assert_eq!(effects(&mut node).len(), expected);
        }
        node.handle_probe(now, Origin::Udp(x()), DiscoPublic([8; 32]), &ping(2, Some(THEM)));
        assert!(effects(&mut node).is_empty());
    }

    #[test]
    fn calls_count_only_over_the_relay_and_with_the_senders_own_key() {
        let (mut node, now) = node();
        node.handle_node(now, OTHER, DiscoPublic([4; 32]), &[]);
        let call = Probe::CallMeMaybe(vec![x()]);
        node.handle_probe(now, Origin::Udp(x()), DISCO, &call);
        node.handle_probe(now, Origin::Relay(OTHER), DISCO, &call);
        assert!(effects(&mut node).is_empty());
        node.handle_probe(now, RELAYED, DISCO, &call);
        assert!(matches!(*effects(&mut node), [Effect::Ping { peer: THEM, .. }]));
    }

    #[test]
    fn where_direct_paths_are_blocked_only_pings_of_the_relay_are_answered() {
        let (mut node, now) = node();
        node.set_direct(Direct::Blocked);
        node.handle_node(now, OTHER, DISCO, &[x()]);
        node.handle_probe(now, Origin::Udp(x()), DISCO, &ping(1, Some(THEM)));
        node.handle_probe(now, RELAYED, DISCO, &Probe::CallMeMaybe(vec![x()]));
        let _ = node.route(now, &OTHER);
        assert!(effects(&mut node).is_empty());
        node.handle_probe(now, RELAYED, DISCO, &ping(2, Some(THEM)));
        assert_eq!(effects(&mut node).len(), 1);
        assert_eq!(node.route(now, &THEM), Route { direct: None, relay: true });
    }

    #[test]
    fn a_ping_that_could_not_be_sent_is_not_waited_for() {
        let (mut node, now) = node();
        node.handle_node(now, THEM, DISCO, &[x()]);
        node.user_ping(now, &THEM);
        for effect in effects(&mut node) {
            if let Effect::Ping { txid, .. } = effect {
                node.handle_unsent(&txid);
                node.handle_probe(now, Origin::Udp(x()), DISCO, &Probe::Pong { txid, observed: x() });
            }
        }
        assert_eq!((node.best(now, &THEM), effects(&mut node)), (None, vec![]));
    }
}
