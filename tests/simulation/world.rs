//! Peers, a relay, a control plane and a STUN server in one network, and the clock that drives them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::SmallRng};
use warren_core::path::{Direct, Effect, RelayStands, Route, Via};
use warren_lab::nat::Kind;
use warren_proto::disco::{PADDED, TxId};

use super::{
    engine::Make,
    network::{Arrival, Conditions, Families, HostId, Network},
    peer::{Data, Peer, PeerId, REGION, Reaction, Said},
};

/// Each way through the relay, and to the control plane and back.
const RELAY_DELAY: Duration = Duration::from_millis(20);
const CONTROL_DELAY: Duration = Duration::from_millis(60);
/// The control plane says that both know each other.
pub(crate) const READY_AFTER: Duration = Duration::from_millis(120);
/// A relay that does not answer is known to be down after so long.
const PROOF_LIMIT: Duration = Duration::from_secs(3);
/// How often peers look for their own addresses.
const STUN_PERIOD: Duration = Duration::from_secs(23);
const STUN_PORT: u16 = 3478;
/// Bytes of a STUN message.
const STUN_LENGTH: usize = 40;
/// Bytes of the largest data datagram.
const DATA_LENGTH: usize = 1312;
/// Answers to what was sent before a change have arrived by then.
const STEADY_AFTER: Duration = Duration::from_secs(2);
/// More events than this at one moment are a loop.
const MAX_AT_ONCE: usize = 10_000;

/// What goes through the network.
#[derive(Debug, Clone)]
pub(crate) enum Packet {
    Said(PeerId, Said),
    StunQuestion,
    StunAnswer(SocketAddr),
}

/// What happens at a moment, besides datagrams and the peers' own timers.
#[derive(Debug)]
enum Event {
    /// Something comes out of the relay.
    Relayed { from: PeerId, to: PeerId, said: Said },
    /// The relay has answered a peer, or has had the time to.
    Proof(PeerId, RelayStands),
    /// The control plane tells a peer of another's endpoints.
    Node { of: PeerId, to: PeerId, endpoints: Vec<SocketAddr> },
    /// The control plane says that both know each other.
    Ready(PeerId),
    /// Time for STUN.
    Stun(PeerId),
    /// The next packet of a stream, if that has not changed since.
    Traffic { from: PeerId, stream: u64 },
}

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Datagrams that no receive map knew.
    pub(crate) unknown_source: u64,
    /// What a relay link that was down did not carry.
    pub(crate) not_relayed: u64,
    /// The most messages besides data that each peer sent in one second.
    pub(crate) busiest_second: Vec<u64>,
    /// Whenever a peer of ours took another way: when, and which address; none is the relay.
    pub(crate) changes: Vec<(Instant, PeerId, Option<SocketAddr>)>,
}

/// A world.
pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) network: Network<Packet>,
    pub(crate) peers: Vec<Peer>,
    pub(crate) seen: Seen,
    /// When the conditions changed last.
    pub(crate) changed_at: Instant,
    /// When the translators of sites started anew last.
    stun: HostId,
    chance: SmallRng,
    events: BTreeMap<(Instant, u64), Event>,
    count: u64,
    /// The streams of packets: which one it is, and the pause between two packets.
    streams: Vec<(u64, Option<Duration>)>,
    second: (Instant, Vec<u64>),
}

impl World {
    /// A world with sites of these kinds, and peers in them, each of which knows all others.
    pub(crate) fn new(seed: u64, sites: &[Option<Kind>], places: &[(Make, usize, Families)]) -> Self {
        let mut network = Network::new(seed);
        for nat in sites {
            network.add_site(*nat);
        }
        let place_of_stun = network.add_site(None);
        let stun = network.add_host(place_of_stun, Families::Both);
        let peer = |(index, (make, site, families)): (usize, &(Make, usize, Families))| {
            let host = network.add_host(*site, *families);
            Peer::new(*make, host, 41641 + index as u16)
        };
        let peers: Vec<Peer> = places.iter().enumerate().map(peer).collect();
        let now = Instant::now();
        let mut world = Self {
            now,
            network,
            seen: Seen { busiest_second: vec![0; peers.len()], ..Seen::default() },
            changed_at: now,
            stun,
            chance: SmallRng::seed_from_u64(!seed),
            events: BTreeMap::new(),
            count: 0,
            streams: vec![(0, None); peers.len()],
            second: (now, vec![0; peers.len()]),
            peers,
        };
        for id in world.ids() {
            for other in world.ids().filter(|other| *other != id) {
                world.peers[id.0].other(other);
            }
            world.at(Duration::ZERO, Event::Stun(id));
            world.at(READY_AFTER, Event::Ready(id));
        }
        world
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = PeerId> + use<> {
        (0..self.peers.len()).map(PeerId)
    }

    /// Lets so much time pass.
    pub(crate) fn run(&mut self, span: Duration) {
        let end = self.now + span;
        let mut at_once = 0;
        while let Some(due) = self.poll_timeout().filter(|due| *due <= end) {
            at_once = if due > self.now { 0 } else { at_once + 1 };
            assert!(at_once < MAX_AT_ONCE, "time stands still");
            self.now = self.now.max(due);
            self.step();
        }
        self.now = end;
    }

    /// A peer sends a packet to each other one every `pause` from now on; `None`: not any more.
    pub(crate) fn set_traffic(&mut self, from: PeerId, pause: Option<Duration>) {
        let stream = self.streams[from.0].0 + 1;
        self.streams[from.0] = (stream, pause);
        if pause.is_some() {
            self.at(Duration::ZERO, Event::Traffic { from, stream });
        }
    }

    /// A peer sends a packet for each that comes, and none of its own accord.
    pub(crate) fn set_answering(&mut self, id: PeerId) {
        self.set_traffic(id, None);
        self.peers[id.0].is_answering = true;
    }

    /// Whether a peer sends packets.
    pub(crate) fn is_talking(&self, id: PeerId) -> bool {
        self.streams[id.0].1.is_some()
    }

    /// Whether an address is one that a peer has now, as far as it knows.
    pub(crate) fn is_at(&self, id: PeerId, address: SocketAddr) -> bool {
        self.peers[id.0].endpoints.contains(&address)
    }

    /// A peer's sockets are bound to another port.
    pub(crate) fn rebind(&mut self, id: PeerId, port: u16) {
        let peer = &mut self.peers[id.0];
        peer.port = port;
        peer.change_link(self.now);
        self.carry_out(id);
        self.look_for_addresses(id);
    }

    /// A site's translator forgets what it knows.
    pub(crate) fn restart_nat(&mut self, site: usize) {
        self.network.restart_nat(site);
    }

    /// Whether a peer has its link to the relay.
    pub(crate) fn set_relay(&mut self, id: PeerId, is_up: bool) {
        self.peers[id.0].has_relay = is_up;
    }

    /// Whether a peer wants direct paths.
    pub(crate) fn set_policy(&mut self, id: PeerId, policy: Direct) {
        let peer = &mut self.peers[id.0];
        if peer.policy != policy {
            peer.set_policy(self.now, policy);
            self.publish(id);
        }
        self.carry_out(id);
    }

    /// Everything works again.
    pub(crate) fn heal(&mut self) {
        for id in self.ids() {
            let site = self.network.site_of(self.peers[id.0].host);
            *self.network.conditions(site) = Conditions::default();
            self.set_relay(id, true);
            self.set_policy(id, Direct::Allowed);
        }
    }

    /// Whether nothing is left to chance, and the relay there for everybody.
    pub(crate) fn is_certain(&mut self) -> bool {
        let sites: Vec<usize> = self.peers.iter().map(|peer| self.network.site_of(peer.host)).collect();
        let is_certain = sites.into_iter().all(|site| self.network.conditions(site).loss == 0);
        is_certain && self.peers.iter().all(|peer| peer.has_relay)
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let events = self.events.keys().next().map(|(due, _)| *due);
        let peers = self.peers.iter().filter_map(Peer::poll_timeout);
        peers.chain(events).chain(self.network.poll_timeout()).min()
    }

    fn step(&mut self) {
        while let Some(arrival) = self.network.poll_arrival(self.now) {
            self.arrive(arrival);
        }
        while let Some(entry) = self.events.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let event = entry.remove();
            self.happen(event);
        }
        for id in self.ids() {
            for (to, data, route) in self.peers[id.0].handle_timeout(self.now) {
                self.transmit(id, to, data, route);
            }
            self.carry_out(id);
        }
    }

    fn arrive(&mut self, arrival: Arrival<Packet>) {
        let Arrival { at, to, from, payload } = arrival;
        if at == self.stun {
            let answer = Packet::StunAnswer(from);
            return self.network.send(self.now, at, STUN_PORT, from, STUN_LENGTH, answer);
        }
        let Some(id) = self.ids().find(|id| self.peers[id.0].host == at) else { return };
        if self.peers[id.0].port != to.port() {
            return;
        }
        match payload {
            Packet::Said(sender, said) => self.hear(id, sender, Via::Direct(from), said),
            Packet::StunAnswer(mapped) => self.note_mapping(id, mapped),
            Packet::StunQuestion => {}
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Relayed { from, to, said } if self.peers[to.0].has_relay => {
                self.hear(to, from, Via::Relay(REGION), said);
            }
            Event::Relayed { .. } => self.seen.not_relayed += 1,
            Event::Proof(id, stands) => self.peers[id.0].prove_relay(self.now, stands),
            Event::Node { of, to, endpoints } => {
                self.peers[to.0].other(of).path.handle_node(self.now, &endpoints);
            }
            Event::Ready(id) => {
                let others = self.peers[id.0].others.values_mut();
                others.for_each(|other| other.path.handle_ready(self.now));
            }
            Event::Stun(id) => {
                self.look_for_addresses(id);
                self.at(STUN_PERIOD, Event::Stun(id));
            }
            Event::Traffic { from, stream } => self.send_traffic(from, stream),
        }
    }

    fn send_traffic(&mut self, from: PeerId, stream: u64) {
        let (present, Some(pause)) = self.streams[from.0] else { return };
        if present != stream {
            return;
        }
        for to in self.ids().filter(|to| *to != from) {
            self.send_packet(from, to);
        }
        self.at(pause, Event::Traffic { from, stream });
    }

    fn send_packet(&mut self, from: PeerId, to: PeerId) {
        let (data, route) = self.peers[from.0].send(self.now, to);
        self.transmit(from, to, data, route);
        self.carry_out(from);
    }

    fn hear(&mut self, id: PeerId, sender: PeerId, via: Via, said: Said) {
        let is_question = self.peers[id.0].is_question(sender, &said);
        match self.peers[id.0].hear(self.now, sender, via, said) {
            Reaction::Taken if is_question => self.send_packet(id, sender),
            Reaction::Taken => {}
            Reaction::UnknownSource => self.seen.unknown_source += 1,
            Reaction::Answer(said) => match via {
                Via::Direct(to) => self.send(id, to, sender, said),
                Via::Relay(_) => self.relay(id, sender, said),
            },
        }
        self.carry_out(id);
    }

    fn transmit(&mut self, from: PeerId, to: PeerId, data: Data, route: Route) {
        if let Some(address) = route.direct {
            self.send(from, address, to, Said::Data(data));
        }
        if route.relay {
            self.relay(from, to, Said::Data(data));
        }
    }

    /// Carries out what the paths of a peer want done.
    fn carry_out(&mut self, id: PeerId) {
        for to in self.ids().filter(|to| *to != id) {
            loop {
                let chance = &mut self.chance;
                let mut txid = || -> TxId { chance.random() };
                let Some(effect) = self.peers[id.0].other(to).path.poll_effect(&mut txid) else { break };
                self.effect(id, to, effect);
            }
        }
    }

    fn effect(&mut self, id: PeerId, to: PeerId, effect: Effect) {
        match effect {
            Effect::Ping { to: address, txid } => self.send(id, address, to, Said::Ping(txid)),
            Effect::RelayPing { txid } => self.relay(id, to, Said::Ping(txid)),
            Effect::CallMeMaybe(endpoints) => self.relay(id, to, Said::CallMeMaybe(endpoints)),
            Effect::RefreshEndpoints => self.look_for_addresses(id),
            Effect::ProveRelay => {
                let (pause, stands) = match self.peers[id.0].has_relay {
                    true => (2 * RELAY_DELAY, RelayStands::Alive),
                    false => (PROOF_LIMIT, RelayStands::Down),
                };
                self.at(pause, Event::Proof(id, stands));
            }
            Effect::Changed { to: Some(address), .. } => {
                self.seen.changes.push((self.now, id, Some(address)));
                let is_steady = self.now > self.changed_at + STEADY_AFTER;
                let is_open = self.network.is_open(self.peers[id.0].host, address);
                assert!(is_open || !is_steady, "{id:?} takes {address}, which is dead");
            }
            Effect::Changed { to: None, .. } => self.seen.changes.push((self.now, id, None)),
            Effect::Verified(address) => self.peers[id.0].verify(address, to),
            Effect::Forgotten(address) => self.peers[id.0].forget(address, to),
        }
    }

    fn send(&mut self, from: PeerId, address: SocketAddr, to: PeerId, said: Said) {
        let length = if matches!(said, Said::Data(_)) { DATA_LENGTH } else { PADDED };
        self.note_sent(from, &said);
        let Peer { host, port, .. } = self.peers[from.0];
        debug_assert_ne!(from, to);
        self.network.send(self.now, host, port, address, length, Packet::Said(from, said));
    }

    fn relay(&mut self, from: PeerId, to: PeerId, said: Said) {
        self.note_sent(from, &said);
        if self.peers[from.0].has_relay {
            self.at(RELAY_DELAY, Event::Relayed { from, to, said });
        } else {
            self.seen.not_relayed += 1;
        }
    }

    fn note_sent(&mut self, from: PeerId, said: &Said) {
        if matches!(said, Said::Data(_)) {
            return;
        }
        if self.now >= self.second.0 + Duration::from_secs(1) {
            self.second = (self.now, vec![0; self.peers.len()]);
        }
        self.second.1[from.0] += 1;
        let busiest = &mut self.seen.busiest_second[from.0];
        *busiest = self.second.1[from.0].max(*busiest);
    }

    fn look_for_addresses(&mut self, id: PeerId) {
        let (host, port) = (self.peers[id.0].host, self.peers[id.0].port);
        for server in self.network.addresses(self.stun).to_vec() {
            let to = SocketAddr::new(server, STUN_PORT);
            self.network.send(self.now, host, port, to, STUN_LENGTH, Packet::StunQuestion);
        }
        let own = self.network.addresses(host).iter().map(|ip| SocketAddr::new(*ip, port)).collect();
        self.collect(id, own);
    }

    fn note_mapping(&mut self, id: PeerId, mapped: SocketAddr) {
        let endpoints = &self.peers[id.0].endpoints;
        if !endpoints.contains(&mapped) {
            let endpoints = [mapped].into_iter().chain(endpoints.iter().copied()).collect();
            self.collect(id, endpoints);
        }
    }

    fn collect(&mut self, id: PeerId, endpoints: Vec<SocketAddr>) {
        self.peers[id.0].collect(self.now, endpoints);
        self.publish(id);
        self.carry_out(id);
    }

    fn publish(&mut self, id: PeerId) {
        let endpoints = self.peers[id.0].published();
        for to in self.ids().filter(|to| *to != id) {
            self.at(CONTROL_DELAY, Event::Node { of: id, to, endpoints: endpoints.clone() });
        }
    }

    fn at(&mut self, pause: Duration, event: Event) {
        self.count += 1;
        self.events.insert((self.now + pause, self.count), event);
    }
}
