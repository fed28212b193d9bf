//! Peers, a relay, a control plane and a STUN server in one network, and the clock that drives them.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::SmallRng};
use warren_actors::wireguard::TICK;
use warren_core::path::{Direct, RelayStands, Via};
use warren_lab::nat::Kind;
use warren_proto::{
    key::NodePrivate,
    tailnet::{CoordinateRequest, CoordinateResponse},
};

use super::{
    clock,
    control::{Control, Outcome},
    engine::Make,
    errors,
    loss::Loss,
    network::{Arrival, Conditions, Families, HostId, Network},
    peer::{Peer, PeerId, REGION, Said},
    relay::Relay,
};

mod messages;

/// Each way through the relay, to the control plane and back.
pub(crate) const RELAY_DELAY: Duration = Duration::from_millis(20);
const CONTROL_DELAY: Duration = Duration::from_millis(30);
/// After so long a peer tells the control plane where it is: STUN servers have answered, if nothing delays them.
const LOOKED_AFTER: Duration = Duration::from_millis(40);
/// A client knows that the agent knows it, and programs it: when its node has come to the agent, and READY back.
pub(crate) const READY_AFTER: Duration = LOOKED_AFTER.saturating_add(CONTROL_DELAY.saturating_mul(4));
/// How often peers look for their own addresses.
const STUN_PERIOD: Duration = Duration::from_secs(23);
const STUN_PORT: u16 = 3478;
/// Bytes of a STUN message.
const STUN_LENGTH: usize = 40;
const COMPLAINT_LENGTH: usize = 56;
/// More events than this at one moment are a loop.
const MAX_AT_ONCE: usize = 10_000;

/// What goes through the network.
#[derive(Debug, Clone)]
pub(crate) enum Packet {
    Said {
        from: PeerId,
        to: PeerId,
        said: Said,
    },
    StunQuestion,
    StunAnswer(SocketAddr),
    /// ICMP: nobody listens where something was sent to this peer.
    Complaint(PeerId),
}

/// What happens at a moment, besides datagrams and the peers' own timers.
#[derive(Debug)]
enum Event {
    /// Something comes out of the relay.
    Relayed { from: PeerId, to: PeerId, said: Said },
    /// The relay that a peer asked for a sign of life then has had the time to give one.
    Proof(PeerId, Instant),
    /// A peer's stream to the control plane begins.
    Connect(PeerId),
    /// The control plane is asked something.
    Request { from: PeerId, request: Box<CoordinateRequest> },
    /// The control plane tells a peer something.
    Response { to: PeerId, response: CoordinateResponse },
    /// Time for STUN.
    Stun(PeerId),
    /// Time to tell what STUN has shown.
    Publish(PeerId),
    /// Time passes for a peer's tunnels.
    Tick(PeerId),
    /// The next packet of a stream, if that has not changed since.
    Traffic { from: PeerId, stream: u64 },
}

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// The most messages besides data that each peer sent in one second.
    pub(crate) busiest_second: Vec<u64>,
    /// Whenever a peer of ours took another way: when, and which address; none is the relay.
    pub(crate) changes: Vec<(Instant, PeerId, Option<SocketAddr>)>,
    /// When each let direct paths to another be last, since they flapped.
    let_be_at: BTreeMap<(PeerId, PeerId), Instant>,
    /// Whether the last ping of each to an address of another could be answered.
    pinged: BTreeMap<(PeerId, PeerId, SocketAddr), bool>,
}

/// A world.
pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) began: Instant,
    pub(crate) network: Network<Packet>,
    pub(crate) peers: Vec<Peer>,
    pub(crate) seen: Seen,
    /// When the conditions changed last.
    pub(crate) changed_at: Instant,
    /// When a peer logged in to the relay last.
    pub(crate) logged_in_at: Instant,
    /// Whether hosts say that nobody listens at a port.
    pub(crate) complains: bool,
    /// By how much the peers' timers are late.
    pub(crate) late: Duration,
    stun: HostId,
    control: Control,
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
        let now = Instant::now();
        clock::set(Duration::ZERO);
        errors::begin();
        let mut chance = SmallRng::seed_from_u64(!seed);
        let makes: Vec<Make> = places.iter().map(|(make, ..)| *make).collect();
        let keys: Vec<NodePrivate> =
            places.iter().map(|_| NodePrivate::from_bytes(chance.random())).collect();
        let peer = |(index, (_, site, families)): (usize, &(Make, usize, Families))| {
            let host = network.add_host(*site, *families);
            // One port for neighbours: who comes first has it at their translator, too.
            Peer::new(now, PeerId(index), &keys, &makes, host, 41641 + *site as u16)
        };
        let peers: Vec<Peer> = places.iter().enumerate().map(peer).collect();
        let mut world = Self {
            now,
            began: now,
            network,
            seen: Seen { busiest_second: vec![0; peers.len()], ..Seen::default() },
            changed_at: now,
            logged_in_at: now,
            complains: false,
            late: Duration::ZERO,
            stun,
            control: Control::default(),
            chance,
            events: BTreeMap::new(),
            count: 0,
            streams: vec![(0, None); peers.len()],
            second: (now, vec![0; peers.len()]),
            peers,
        };
        for id in world.ids() {
            let phase = TICK.mul_f64(world.chance.random());
            world.at(Duration::ZERO, Event::Stun(id));
            world.at(LOOKED_AFTER, Event::Connect(id));
            world.at(phase, Event::Tick(id));
        }
        world
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = PeerId> + use<> {
        (0..self.peers.len()).map(PeerId)
    }

    /// Each with each other one that it knows: among reference peers each is a client of ours or an agent.
    pub(crate) fn pairs(&self) -> Vec<(PeerId, PeerId)> {
        let make = |id: PeerId| self.peers[id.0].make;
        let all_are_both = self.ids().all(|id| make(id) == Make::Ours);
        let knows = |(from, to): &(PeerId, PeerId)| from != to && (all_are_both || make(*from) != make(*to));
        self.ids().flat_map(|from| self.ids().map(move |to| (from, to))).filter(knows).collect()
    }

    /// Lets so much time pass.
    pub(crate) fn run(&mut self, span: Duration) {
        let end = self.now + span;
        let mut at_once = 0;
        while let Some(due) = self.poll_timeout().filter(|due| *due <= end) {
            at_once = if due > self.now { 0 } else { at_once + 1 };
            assert!(at_once < MAX_AT_ONCE, "time stands still");
            self.pass_to(self.now.max(due));
            self.step();
        }
        self.pass_to(end);
    }

    fn pass_to(&mut self, now: Instant) {
        self.now = now;
        clock::set(now - self.began);
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
        peer.relay.probe(self.now);
        peer.change_link(self.now);
        self.carry_out(id);
        self.look_for_addresses(id);
    }

    /// A site's translator forgets what it knows.
    pub(crate) fn restart_nat(&mut self, site: usize) {
        self.network.restart_nat(site);
    }

    /// What becomes of a peer's connections to the relay.
    pub(crate) fn set_relay(&mut self, id: PeerId, relay: Relay) {
        let random = self.chance.random();
        self.peers[id.0].relay.set_relay(self.now, relay, random);
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

    /// How many packets were sent until then.
    pub(crate) fn sent_until(&self, from: PeerId, to: PeerId, then: Instant) -> u64 {
        self.peers[from.0].others[&to].sent.partition_point(|at| *at <= then) as u64
    }

    /// The numbers of packets that were sent in a span of time and have not come, and of which nobody knows why.
    pub(crate) fn unexplained(&self, from: PeerId, to: PeerId, after: Instant, until: Instant) -> Vec<u64> {
        let other = &self.peers[from.0].others[&to];
        let came = &self.peers[to.0].others[&from].received;
        let is_known =
            |it: &u64| came.contains(it) || other.losses.explain(*it) || other.tunnel.waiting().contains(it);
        let numbers = self.sent_until(from, to, after) + 1..=self.sent_until(from, to, until);
        numbers.filter(|it| !is_known(it)).collect()
    }

    /// Everything works again.
    pub(crate) fn heal(&mut self) {
        for id in self.ids() {
            let site = self.network.site_of(self.peers[id.0].host);
            *self.network.conditions(site) = Conditions::default();
            self.set_relay(id, Relay::Answers);
            self.set_policy(id, Direct::Allowed);
        }
    }

    /// Whether nothing is left to chance, and the relay there for everybody.
    pub(crate) fn is_certain(&mut self) -> bool {
        self.loses_nothing_by_chance() && self.peers.iter().all(|peer| peer.relay.carries())
    }

    pub(crate) fn loses_nothing_by_chance(&mut self) -> bool {
        let sites: Vec<usize> = self.peers.iter().map(|peer| self.network.site_of(peer.host)).collect();
        sites.into_iter().all(|site| self.network.conditions(site).loss == 0)
    }

    fn poll_timeout(&self) -> Option<Instant> {
        let events = self.events.keys().next().map(|(due, _)| *due);
        let peers = self.peers.iter().filter_map(Peer::poll_timeout).map(|due| due + self.late);
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
            self.serve_relay(id);
            self.peers[id.0].handle_timeout(self.now);
            self.carry_out(id);
            self.coordinate(id, |now, peer| peer.coordinate(now));
        }
        for (fate, packet) in self.network.take_ended() {
            if let Packet::Said { from, to, said } = packet {
                self.lose(from, to, &said, Loss::Network(fate));
            }
        }
    }

    fn arrive(&mut self, arrival: Arrival<Packet>) {
        let Arrival { at, to, from, payload } = arrival;
        if at == self.stun {
            let answer = Packet::StunAnswer(from);
            self.network.send(self.now, at, STUN_PORT, from, STUN_LENGTH, answer);
            return;
        }
        let Some(id) = self.ids().find(|id| self.peers[id.0].host == at) else { return };
        let is_open = self.peers[id.0].port == to.port();
        match payload {
            Packet::Said { from: sender, to: meant, said } if is_open && meant == id => {
                self.hear(id, sender, Via::Direct(from), said);
            }
            // Sealed for a neighbour, whose address it has become.
            Packet::Said { from: sender, to: meant, said } if is_open => {
                self.lose(sender, meant, &said, Loss::UnknownPeer);
            }
            Packet::Said { from: sender, to: meant, said } => {
                self.lose(sender, meant, &said, Loss::Closed);
                if self.complains {
                    let complaint = Packet::Complaint(meant);
                    self.network.send(self.now, at, to.port(), from, COMPLAINT_LENGTH, complaint);
                }
            }
            Packet::Complaint(of) if is_open => {
                self.peers[id.0].other(of).path.handle_unreachable(self.now, from);
            }
            Packet::StunAnswer(mapped) if is_open => self.note_mapping(id, mapped),
            Packet::StunAnswer(_) | Packet::StunQuestion | Packet::Complaint(_) => {}
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Relayed { from, to, said } if self.peers[to.0].relay.receive(self.now) => {
                self.hear(to, from, Via::Relay(REGION), said);
                self.prove_relay(to);
            }
            Event::Relayed { from, to, said } => self.lose(from, to, &said, Loss::Relay),
            Event::Proof(id, since) => {
                let peer = &mut self.peers[id.0];
                if peer.relay.take_unproved(since) {
                    peer.prove_relay(self.now, RelayStands::Down);
                }
            }
            Event::Connect(id) => self.coordinate(id, |now, peer| peer.member.connect(now)),
            Event::Request { from, request } => {
                for (to, response) in self.control.handle(from, *request) {
                    self.at(CONTROL_DELAY, Event::Response { to, response });
                }
            }
            Event::Response { to, response } => {
                self.coordinate(to, |now, peer| peer.hear_control(now, &response));
            }
            Event::Publish(id) => self.publish(id),
            Event::Tick(id) => {
                let outgoing = self.peers[id.0].tick(self.now);
                self.transmit(id, outgoing);
                self.carry_out(id);
                self.at(TICK, Event::Tick(id));
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
        let outgoing = self.peers[from.0].send(self.now, to);
        self.transmit(from, outgoing);
        self.carry_out(from);
    }

    /// Has a peer do what follows from what it is told by its coordination.
    fn coordinate(&mut self, id: PeerId, input: impl FnOnce(Instant, &mut Peer) -> Outcome) {
        let Outcome { map_changed, requests } = input(self.now, &mut self.peers[id.0]);
        for request in requests {
            self.at(CONTROL_DELAY, Event::Request { from: id, request: Box::new(request) });
        }
        if !map_changed {
            return;
        }
        let were_warm = self.count_warm(id);
        let cold = self.peers[id.0].program(self.now);
        assert!(were_warm == self.count_warm(id) || self.now == self.began + READY_AFTER);
        self.carry_out(id);
        self.warm_up(id, cold);
    }

    fn count_warm(&self, id: PeerId) -> usize {
        self.peers[id.0].others.values().filter(|other| other.is_warm()).count()
    }

    /// Lets time pass for a link to the relay.
    fn serve_relay(&mut self, id: PeerId) {
        let random = self.chance.random();
        if self.peers[id.0].relay.handle_timeout(self.now, random) {
            self.logged_in_at = self.now;
            let cold = self.peers[id.0].cold();
            self.warm_up(id, cold);
        }
        self.prove_relay(id);
    }

    /// Tells a peer's paths that the relay is alive, if they have asked and it has shown it.
    fn prove_relay(&mut self, id: PeerId) {
        let peer = &mut self.peers[id.0];
        if peer.relay.take_proved() {
            peer.prove_relay(self.now, RelayStands::Alive);
            self.carry_out(id);
        }
    }

    fn warm_up(&mut self, id: PeerId, cold: Vec<PeerId>) {
        for to in cold {
            let outgoing = self.peers[id.0].warm(self.now, to);
            self.transmit(id, outgoing);
        }
        self.carry_out(id);
    }

    fn look_for_addresses(&mut self, id: PeerId) {
        let (host, port) = (self.peers[id.0].host, self.peers[id.0].port);
        for server in self.network.addresses(self.stun).to_vec() {
            let to = SocketAddr::new(server, STUN_PORT);
            self.network.send(self.now, host, port, to, STUN_LENGTH, Packet::StunQuestion);
        }
        let own = self.network.addresses(host).iter().map(|ip| SocketAddr::new(*ip, port)).collect();
        self.collect(id, own);
        self.peers[id.0].looked_at = self.now;
        self.at(LOOKED_AFTER, Event::Publish(id));
    }

    fn note_mapping(&mut self, id: PeerId, mapped: SocketAddr) {
        let endpoints = &self.peers[id.0].endpoints;
        if !endpoints.contains(&mapped) {
            let endpoints = [mapped].into_iter().chain(endpoints.iter().copied()).collect();
            self.collect(id, endpoints);
            if self.now > self.peers[id.0].looked_at + LOOKED_AFTER {
                self.publish(id);
            }
        }
    }

    fn collect(&mut self, id: PeerId, endpoints: Vec<SocketAddr>) {
        self.peers[id.0].collect(self.now, endpoints);
        self.carry_out(id);
    }

    fn publish(&mut self, id: PeerId) {
        let (now, peer) = (self.now, &mut self.peers[id.0]);
        peer.member.set_endpoints(now, peer.published());
    }

    fn at(&mut self, pause: Duration, event: Event) {
        self.count += 1;
        self.events.insert((self.now + pause, self.count), event);
    }
}
