//! An agent without input or output: frames of the relay, datagrams and words of the coordinator go in, frames
//! for the relay and datagrams come out.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::{Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use bytes::{Bytes, BytesMut};
use uuid::Uuid;
use warren_actors::wireguard::{
    Engine, Engines, Opened, Sealed, Session, Ticked, open_room, padded, seal_room,
};
use warren_proto::{
    address::{Cidr, coder_address, node_id, tailscale_address},
    key::{BoxShared, DiscoPrivate, DiscoPublic, NodePrivate, NodePublic},
    stun::is_stun,
    tailnet::{self, coordinate_response::peer_update::Kind},
};

use super::{
    direct::{AgentPath, Datagram, Direct, DirectCore, Effect, Origin, Probe, Taken},
    small::{self, ICMPV6, TSMP},
    stack::{MTU, Stack},
};
use crate::{reference::Via, relay::wire};

/// Bytes that may wait for the relay while it is away; what is more is dropped.
const MAX_OUT: usize = 1 << 20;

/// What has happened to an agent since the lab was started; restarts count on.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) disco_pings: AtomicU64,
    pub(crate) tsmp_pings: AtomicU64,
    pub(crate) echo_requests: AtomicU64,
    pub(crate) echo_replies: AtomicU64,
    pub(crate) user_pongs: AtomicU64,
    pub(crate) handshakes: AtomicU64,
    pub(crate) http_requests: AtomicU64,
    pub(crate) received_bytes: AtomicU64,
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) relay_logins: AtomicU64,
    pub(crate) direct_datagrams: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// One life of an agent: its keys, its peers, its sessions.
pub(super) struct Core {
    id: Uuid,
    region: u16,
    node: NodePrivate,
    public: NodePublic,
    disco: DiscoPrivate,
    disco_public: DiscoPublic,
    /// The first is the one that answers TSMP.
    addresses: [Ipv6Addr; 2],
    engines: Engines,
    next_index: u32,
    peers: HashMap<NodePublic, Peer>,
    by_id: BTreeMap<Uuid, NodePublic>,
    by_address: BTreeMap<Ipv6Addr, NodePublic>,
    stack: Option<Stack>,
    title: String,
    out: BytesMut,
    buffer: Vec<u8>,
    is_mute: bool,
    is_shut: bool,
    /// Of an agent that talks directly, too.
    direct: Option<DirectCore>,
    counters: Arc<Counters>,
}

struct Peer {
    engine: Box<dyn Engine>,
    disco_public: DiscoPublic,
    disco: BoxShared,
    addresses: Vec<Ipv6Addr>,
    endpoints: Vec<SocketAddr>,
    last_ping: Option<[u8; 12]>,
}

impl Core {
    pub(super) fn new(
        id: Uuid,
        title: String,
        region: u16,
        direct: Option<DirectCore>,
        counters: Arc<Counters>,
    ) -> Self {
        let (node, disco) = (NodePrivate::generate(), DiscoPrivate::generate());
        Self {
            id,
            region,
            public: node.public(),
            engines: Engines::new(&node),
            node,
            disco_public: disco.public(),
            disco,
            addresses: [tailscale_address(&id), coder_address(&id)],
            next_index: 1,
            peers: HashMap::new(),
            by_id: BTreeMap::new(),
            by_address: BTreeMap::new(),
            stack: None,
            title,
            out: BytesMut::new(),
            buffer: Vec::new(),
            is_mute: false,
            is_shut: false,
            direct,
            counters,
        }
    }

    pub(super) fn private(&self) -> &NodePrivate {
        &self.node
    }

    pub(super) fn public(&self) -> NodePublic {
        self.public
    }

    pub(super) fn region(&self) -> u16 {
        self.region
    }

    /// Has its home in another region from now on.
    pub(super) fn move_to(&mut self, region: u16) {
        self.region = region;
    }

    /// Loses what comes out of the tunnel, or ends that.
    pub(super) fn shut(&mut self, is_shut: bool) {
        self.is_shut = is_shut;
    }

    /// Makes the agent deaf and dumb inside the tunnel: packets and probes are swallowed.
    pub(super) fn mute(&mut self, is_mute: bool) {
        self.is_mute = is_mute;
    }

    /// The node as it is told to the coordinator.
    pub(super) fn node_message(&self) -> tailnet::Node {
        let addresses: Vec<String> = self.addresses.iter().map(|address| format!("{address}/128")).collect();
        tailnet::Node {
            id: node_id(&self.id),
            as_of: None,
            key: Bytes::copy_from_slice(&self.public.to_binary()),
            disco: self.disco_public.to_string(),
            preferred_derp: self.region.into(),
            derp_latency: BTreeMap::from([(format!("{}-v4", self.region), 0.001)]),
            derp_forced_websocket: BTreeMap::new(),
            allowed_ips: addresses.clone(),
            addresses,
            endpoints: self.endpoints().iter().map(ToString::to_string).collect(),
        }
    }

    /// Where it says that it can be reached.
    pub(super) fn endpoints(&self) -> &[SocketAddr] {
        self.direct.as_ref().map(DirectCore::endpoints).unwrap_or_default()
    }

    /// Takes what the coordinator says. Returns the peers that may begin their handshakes now.
    pub(super) fn coordinated(&mut self, response: &tailnet::CoordinateResponse, now: Instant) -> Vec<Uuid> {
        let mut ready = Vec::new();
        for update in &response.peer_updates {
            let Ok(id) = Uuid::from_slice(&update.id) else { continue };
            match update.kind() {
                Kind::Node => {
                    // A node that does not parse is not answered.
                    if update.node.as_ref().is_some_and(|node| self.program(id, node, now).is_some()) {
                        ready.push(id);
                    }
                }
                Kind::Disconnected => self.forget(id),
                // A lost peer keeps its session.
                Kind::Lost | Kind::ReadyForHandshake | Kind::Unspecified => {}
            }
        }
        ready
    }

    fn program(&mut self, id: Uuid, node: &tailnet::Node, now: Instant) -> Option<()> {
        let key = NodePublic::from_binary(&node.key).ok().filter(|key| !key.is_zero())?;
        let disco_public: DiscoPublic = node.disco.parse().ok().filter(|key: &DiscoPublic| !key.is_zero())?;
        let hosts: Option<Vec<Ipv6Addr>> =
            node.allowed_ips.iter().map(|text| text.parse::<Cidr>().ok()?.as_host()).collect();
        let addresses = hosts?;
        let endpoints: Vec<SocketAddr> = node.endpoints.iter().filter_map(|text| text.parse().ok()).collect();
        if node.preferred_derp == 0 {
            return None;
        }
        if self.by_id.get(&id).is_some_and(|old| *old != key) {
            self.forget(id);
        }
        match self.peers.get_mut(&key) {
            // A changed disco key takes the sessions with it.
            Some(peer) if peer.disco_public == disco_public => {
                peer.addresses.clone_from(&addresses);
                peer.endpoints.clone_from(&endpoints);
            }
            _ => {
                let engine = self.engines.engine(&key, self.next_index, now);
                self.next_index = (self.next_index + 1) & 0x00ff_ffff;
                let disco = self.disco.shared(&disco_public);
                let addresses = addresses.clone();
                let endpoints = endpoints.clone();
                let peer = Peer { engine, disco_public, disco, addresses, endpoints, last_ping: None };
                self.peers.insert(key, peer);
            }
        }
        self.by_id.insert(id, key);
        self.by_address.retain(|_, owner| *owner != key);
        self.by_address.extend(addresses.into_iter().map(|address| (address, key)));
        if let Some(direct) = &mut self.direct {
            direct.handle_node(now, key, disco_public, &endpoints);
        }
        Some(())
    }

    fn forget(&mut self, id: Uuid) {
        if let Some(key) = self.by_id.remove(&id) {
            self.peers.remove(&key);
            self.by_address.retain(|_, owner| *owner != key);
            if let Some(direct) = &mut self.direct {
                direct.remove(&key);
            }
        }
    }

    /// Takes a frame of the relay.
    pub(super) fn frame(&mut self, kind: u8, body: &[u8], now: Instant) {
        match kind {
            wire::RECV_PACKET => {
                if let Some((from, packet)) = body.split_first_chunk().filter(|_| !self.is_mute) {
                    self.packet(NodePublic(*from), packet, now);
                }
            }
            wire::PING => {
                if let Some(data) = body.first_chunk::<8>() {
                    wire::put(&mut self.out, wire::PONG, &[data]);
                }
            }
            _ => {}
        }
    }

    fn packet(&mut self, from: NodePublic, packet: &[u8], now: Instant) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        let Some(sender) = small::disco_sender(packet) else {
            if let Some(direct) = &mut self.direct {
                direct.note_received(now, from, Taken::Relay);
            }
            return self.wireguard(from, packet, now);
        };
        let Some(probe) = Some(sender)
            .filter(|sender| *sender == peer.disco_public)
            .and_then(|_| small::open_probe(packet, &peer.disco))
        else {
            return;
        };
        if let Some(direct) = &mut self.direct {
            direct.handle_probe(now, Origin::Relay(from), (from, sender), &probe);
            return self.act();
        }
        // The same transaction again is a duplicate.
        if let Probe::Ping { txid, .. } = probe
            && peer.last_ping.replace(txid) != Some(txid)
        {
            let pong = Probe::Pong { txid, observed: small::relay_endpoint(self.region) };
            self.say(&from, Via::Relay, &pong);
            count(&self.counters.disco_pings, 1);
        }
    }

    /// Takes a datagram.
    pub(super) fn datagram(&mut self, from: SocketAddr, packet: &[u8], now: Instant) {
        let Some(direct) = self.direct.as_mut().filter(|_| !self.is_mute) else { return };
        if is_stun(packet) {
            direct.handle_stun(now, packet);
        } else if let Some(sender) = small::disco_sender(packet) {
            let Some((key, peer)) = self.peers.iter().find(|(_, peer)| peer.disco_public == sender) else {
                return;
            };
            if let Some(probe) = small::open_probe(packet, &peer.disco) {
                count(&self.counters.direct_datagrams, 1);
                direct.handle_probe(now, Origin::Udp(from), (*key, sender), &probe);
                self.act();
            }
        } else if let Some(owner) = direct.wireguard_from(now, &from) {
            count(&self.counters.direct_datagrams, 1);
            self.wireguard(owner, packet, now);
        }
    }

    /// Carries out what the choice of paths asks for.
    fn act(&mut self) {
        while let Some(effect) = self.direct.as_mut().and_then(DirectCore::next_effect) {
            match effect {
                Effect::Ping { peer, via, txid } => {
                    self.say(&peer, via, &Probe::Ping { txid, node: Some(self.public) });
                }
                Effect::Pong { peer, to, txid } => {
                    let observed = match to {
                        Via::Direct(source) => source,
                        Via::Relay => small::relay_endpoint(self.region),
                    };
                    self.say(&peer, to, &Probe::Pong { txid, observed });
                    count(&self.counters.disco_pings, 1);
                }
                Effect::CallMeMaybe { peer, endpoints } => {
                    self.say(&peer, Via::Relay, &Probe::CallMeMaybe(endpoints));
                }
                Effect::UserPong => count(&self.counters.user_pongs, 1),
                Effect::CollectEndpoints => {}
            }
        }
    }

    /// Sends a probe.
    fn say(&mut self, to: &NodePublic, via: Via, probe: &Probe) {
        let Some(peer) = self.peers.get(to) else { return };
        let bytes = small::seal_probe(probe, &self.disco_public, &peer.disco);
        if let Some(direct) = &mut self.direct {
            direct.note_probe(to, via, probe);
        }
        match (via, &mut self.direct) {
            (Via::Relay, _) => relay(&mut self.out, to, &bytes),
            (Via::Direct(to), Some(direct)) => {
                let ping = match probe {
                    Probe::Ping { txid, .. } => Some(*txid),
                    Probe::Pong { .. } | Probe::CallMeMaybe(_) => None,
                };
                direct.put(Datagram { to, bytes, ping });
            }
            (Via::Direct(_), None) => {}
        }
    }

    /// Takes a datagram of WireGuard, whichever way it came.
    fn wireguard(&mut self, from: NodePublic, packet: &[u8], now: Instant) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        self.buffer.resize(open_room(packet.len()).max(self.buffer.len()), 0);
        let session = match peer.engine.open(now, packet, &mut self.buffer) {
            Opened::Packet { len, session } => {
                let buffer = std::mem::take(&mut self.buffer);
                self.inner(from, buffer.get(..len).unwrap_or_default(), now);
                self.buffer = buffer;
                session
            }
            Opened::Answer { len, session } => {
                let buffer = std::mem::take(&mut self.buffer);
                self.deliver(&from, buffer.get(..len).unwrap_or_default(), now);
                self.buffer = buffer;
                session
            }
            Opened::Nothing { session } | Opened::Malformed { session } => session,
            Opened::Refused => return,
        };
        if session == Session::New {
            count(&self.counters.handshakes, 1);
            self.drain(from, now);
        }
    }

    /// Sends a datagram of WireGuard the ways that its peer's path names.
    fn deliver(&mut self, to: &NodePublic, datagram: &[u8], now: Instant) {
        if self.direct.as_mut().is_none_or(|direct| direct.send(now, *to, datagram)) {
            relay(&mut self.out, to, datagram);
        }
        self.act();
    }

    /// Takes a packet out of the tunnel.
    fn inner(&mut self, from: NodePublic, packet: &[u8], now: Instant) {
        let Some((source, destination, next)) = small::ipv6(packet) else { return };
        let is_theirs = self.peers.get(&from).is_some_and(|peer| peer.addresses.contains(&source));
        if self.is_shut || !is_theirs || !self.addresses.contains(&destination) {
            return;
        }
        count(&self.counters.received_bytes, packet.len());
        let answer = match next {
            TSMP => {
                let [own, _] = self.addresses;
                small::tsmp_pong(packet, own).inspect(|_| count(&self.counters.tsmp_pings, 1))
            }
            ICMPV6 if small::is_echo_reply(packet) => {
                count(&self.counters.echo_replies, 1);
                None
            }
            ICMPV6 => small::echo_reply(packet).inspect(|_| count(&self.counters.echo_requests, 1)),
            _ => {
                let stack = || Stack::new(&self.addresses, self.title.clone(), now);
                self.stack.get_or_insert_with(stack).receive(packet);
                None
            }
        };
        if let Some(answer) = answer {
            self.seal(from, &answer, now);
        }
    }

    fn seal(&mut self, to: NodePublic, packet: &[u8], now: Instant) {
        let Some(peer) = self.peers.get_mut(&to) else { return };
        count(&self.counters.sent_bytes, packet.len());
        let length = padded(packet.len()).max(packet.len());
        let mut plain = [0; MTU];
        let Some(plain) = plain.get_mut(..length) else { return };
        for (to, from) in plain.iter_mut().zip(packet) {
            *to = *from;
        }
        let mut room = [0; seal_room(MTU)];
        let Some(out) = room.get_mut(..seal_room(packet.len())) else { return };
        if let Sealed::Data(len) | Sealed::Handshake(len) = peer.engine.seal(now, plain, out) {
            self.deliver(&to, out.get(..len).unwrap_or_default(), now);
        }
    }

    fn drain(&mut self, to: NodePublic, now: Instant) {
        let mut room = [0; seal_room(MTU)];
        while let Some(len) = self.peers.get_mut(&to).and_then(|peer| peer.engine.drain(now, &mut room)) {
            self.deliver(&to, room.get(..len).unwrap_or_default(), now);
        }
    }

    /// Asks another node for an echo. Returns whether it is a peer.
    pub(super) fn send_echo(&mut self, to: Ipv6Addr, now: Instant) -> bool {
        let Some(key) = self.by_address.get(&to).copied() else { return false };
        let [_, own] = self.addresses;
        self.seal(key, &small::echo_request(own, to), now);
        true
    }

    /// Asks another node for a pong, as a person does.
    pub(super) fn user_ping(&mut self, to: Ipv6Addr, now: Instant) -> bool {
        let Some(key) = self.by_address.get(&to).copied() else { return false };
        if let Some(direct) = &mut self.direct {
            direct.user_ping(now, &key);
        }
        self.act();
        true
    }

    /// Lets TCP work after packets came in or its time has come.
    pub(super) fn poll(&mut self, now: Instant) {
        let Some(mut stack) = self.stack.take() else { return };
        stack.poll(now, |packet| {
            let destination = small::ipv6(packet).and_then(|(_, to, _)| self.by_address.get(&to).copied());
            if let Some(to) = destination {
                self.seal(to, packet, now);
            }
        });
        count(&self.counters.http_requests, usize::try_from(stack.take_requests()).unwrap_or(0));
        self.stack = Some(stack).filter(|stack| !stack.is_idle());
    }

    /// When [`Core::poll`] is due without a packet.
    pub(super) fn due(&mut self, now: Instant) -> Option<Instant> {
        self.stack.as_mut()?.due(now)
    }

    /// Lets WireGuard's time pass. Returns whether there is something to send.
    pub(super) fn tick(&mut self, now: Instant, is_whole_second: bool) -> bool {
        if self.peers.is_empty() {
            return false;
        }
        if is_whole_second {
            self.engines.reset_guard();
        }
        let mut room = [0; seal_room(MTU)];
        let mut due = Vec::new();
        for (key, peer) in &mut self.peers {
            if let Ticked::Send(len) = peer.engine.tick(now, &mut room) {
                due.push((*key, room.get(..len).unwrap_or_default().to_vec()));
            }
        }
        for (key, datagram) in due {
            self.deliver(&key, &datagram, now);
        }
        self.has_output() || self.needs_shell()
    }

    /// Whether something is to be written to the relay.
    pub(super) fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    /// Whether the task of the sockets has something to do.
    pub(super) fn needs_shell(&self) -> bool {
        self.direct.as_ref().is_some_and(DirectCore::needs_shell)
    }

    /// Lets time pass for direct paths. Returns whether peers are to be told other endpoints.
    pub(super) fn pass_time(&mut self, now: Instant) -> bool {
        let is_changed = self.direct.as_mut().is_some_and(|direct| direct.pass_time(now));
        self.act();
        is_changed
    }

    /// When the task of the sockets is due without a datagram.
    pub(super) fn direct_due(&mut self, now: Instant) -> Option<Instant> {
        let direct = self.direct.as_ref().and_then(|direct| direct.due(now));
        [self.due(now), direct].into_iter().flatten().min()
    }

    pub(super) fn take_datagrams(&mut self, into: &mut VecDeque<Datagram>) {
        if let Some(direct) = &mut self.direct {
            direct.take_output(into);
        }
    }

    pub(super) fn handle_unsent(&mut self, datagram: &Datagram) {
        if let Some(direct) = &mut self.direct {
            direct.handle_unsent(datagram);
        }
    }

    /// Takes the addresses of new sockets.
    pub(super) fn handle_sockets(&mut self, locals: Vec<SocketAddr>) {
        if let Some(direct) = &mut self.direct {
            direct.handle_sockets(locals);
        }
    }

    pub(super) fn want_rebind(&mut self) {
        if let Some(direct) = &mut self.direct {
            direct.want_rebind();
        }
    }

    pub(super) fn take_rebind(&mut self) -> bool {
        self.direct.as_mut().is_some_and(DirectCore::take_rebind)
    }

    /// Allows or blocks direct paths.
    pub(super) fn set_direct(&mut self, now: Instant, allowed: Direct) {
        let Some(direct) = &mut self.direct else { return };
        direct.set_direct(now, allowed);
        // What peers said while it was blocked was not kept.
        for (key, peer) in &self.peers {
            direct.handle_node(now, *key, peer.disco_public, &peer.endpoints);
        }
        self.act();
    }

    pub(super) fn path(&self, now: Instant) -> AgentPath {
        self.direct.as_ref().map(|direct| direct.path(now)).unwrap_or_default()
    }

    /// Takes what is to be written to the relay.
    pub(super) fn take_output(&mut self, buffer: &mut BytesMut) {
        std::mem::swap(&mut self.out, buffer);
        self.out.clear();
    }
}

/// Puts a packet for another node into what the relay gets.
fn relay(out: &mut BytesMut, to: &NodePublic, packet: &[u8]) {
    if out.len() < MAX_OUT {
        wire::put(out, wire::SEND_PACKET, &[&to.0, packet]);
    }
}
