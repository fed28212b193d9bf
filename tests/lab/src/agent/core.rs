//! An agent without input or output: frames of the relay and words of the coordinator go in, frames for the
//! relay come out.

use std::{
    collections::{BTreeMap, HashMap},
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
    direct::{self, Cut, Direct, Voice},
    small::{self, ICMPV6, TSMP},
    stack::{MTU, Stack},
};
use crate::{
    reference::{Reference, Via},
    relay::wire,
};

/// What has happened to an agent since the lab was started; restarts count on.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) disco_pings: AtomicU64,
    pub(crate) tsmp_pings: AtomicU64,
    pub(crate) echo_requests: AtomicU64,
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
    /// `None`: everything is relayed.
    direct: Option<Direct>,
    /// Whether the coordinator does not know our endpoints yet.
    has_news: bool,
    counters: Arc<Counters>,
}

struct Peer {
    engine: Box<dyn Engine>,
    disco_public: DiscoPublic,
    disco: BoxShared,
    addresses: Vec<Ipv6Addr>,
    last_ping: Option<[u8; 12]>,
    path: Reference,
}

impl Core {
    pub(super) fn new(id: Uuid, title: String, region: u16, counters: Arc<Counters>) -> Self {
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
            direct: None,
            has_news: false,
            counters,
        }
    }

    /// Speaks to peers directly too, from a socket at this address.
    pub(super) fn go_direct(&mut self, local: SocketAddr, stun_servers: Vec<SocketAddr>) {
        self.direct = Some(Direct::new(local, stun_servers));
        self.has_news = true;
    }

    pub(super) fn cut(&mut self, cut: Cut) {
        if let Some(direct) = &mut self.direct {
            direct.set_cut(cut);
        }
    }

    /// Whether endpoints are to be told, which they count as by then.
    pub(super) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.has_news)
    }

    /// The next datagram for the socket.
    pub(super) fn take_datagram(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        self.direct.as_mut()?.take()
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
        if node.preferred_derp == 0 {
            return None;
        }
        if self.by_id.get(&id).is_some_and(|old| *old != key) {
            self.forget(id);
        }
        match self.peers.get_mut(&key) {
            // A changed disco key takes the sessions with it.
            Some(peer) if peer.disco_public == disco_public => peer.addresses.clone_from(&addresses),
            _ => {
                let engine = self.engines.engine(&key, self.next_index, now);
                self.next_index = (self.next_index + 1) & 0x00ff_ffff;
                let disco = self.disco.shared(&disco_public);
                let path = Reference::new();
                let addresses = addresses.clone();
                let peer = Peer { engine, disco_public, disco, addresses, last_ping: None, path };
                self.peers.insert(key, peer);
            }
        }
        let own = self.endpoints();
        if let Some(peer) = self.peers.get_mut(&key).filter(|_| self.direct.is_some()) {
            let endpoints: Vec<SocketAddr> = node.endpoints.iter().filter_map(|it| it.parse().ok()).collect();
            peer.path.handle_own_endpoints(now, &own);
            peer.path.handle_node(now, &endpoints);
            peer.path.handle_ready(now);
            self.follow_path(key, now);
        }
        self.by_id.insert(id, key);
        self.by_address.retain(|_, owner| *owner != key);
        self.by_address.extend(addresses.into_iter().map(|address| (address, key)));
        Some(())
    }

    fn forget(&mut self, id: Uuid) {
        if let Some(key) = self.by_id.remove(&id) {
            self.peers.remove(&key);
            if let Some(direct) = &mut self.direct {
                direct.forget(&key);
            }
            self.by_address.retain(|_, owner| *owner != key);
        }
    }

    /// Takes a frame of the relay.
    pub(super) fn frame(&mut self, kind: u8, body: &[u8], now: Instant) {
        match kind {
            wire::RECV_PACKET => {
                if let Some((from, packet)) = body.split_first_chunk().filter(|_| !self.is_mute) {
                    self.packet(NodePublic(*from), Via::Relay, packet, now);
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

    /// Takes a datagram of the socket.
    pub(super) fn datagram(&mut self, from: SocketAddr, packet: &[u8], now: Instant) {
        let Some(direct) = self.direct.as_mut().filter(|direct| !direct.is_deaf()) else { return };
        if is_stun(packet) {
            if direct.answered(packet) {
                self.has_news = true;
                let own = direct.endpoints();
                self.peers.values_mut().for_each(|peer| peer.path.handle_own_endpoints(now, &own));
                self.follow_paths(now);
            }
            return;
        }
        let owner = match small::disco_sender(packet) {
            // Every peer has a disco key of its own here.
            Some(sender) => self.peers.iter().find(|(_, peer)| peer.disco_public == sender).map(|it| *it.0),
            None => direct.owner(&from),
        };
        if let Some(owner) = owner.filter(|_| !self.is_mute) {
            count(&self.counters.direct_datagrams, 1);
            self.packet(owner, Via::Direct(from), packet, now);
        }
    }

    fn endpoints(&self) -> Vec<SocketAddr> {
        self.direct.as_ref().map(Direct::endpoints).unwrap_or_default()
    }

    /// Takes a probe where direct paths are known.
    fn probe(&mut self, direct: &mut Direct, from: NodePublic, via: Via, packet: &[u8], now: Instant) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        let voice =
            Voice { own: &self.disco_public, node: &self.public, shared: &peer.disco, region: self.region };
        let out = &mut self.out;
        let relay = |packet: &[u8]| wire::put(out, wire::SEND_PACKET, &[&from.0, packet]);
        if direct::probed(&mut peer.path, direct, &voice, via, packet, now, relay) {
            count(&self.counters.disco_pings, 1);
        }
    }

    /// Does what a path wants done.
    fn follow_path(&mut self, key: NodePublic, now: Instant) {
        let (Some(direct), Some(peer)) = (&mut self.direct, self.peers.get_mut(&key)) else { return };
        let voice =
            Voice { own: &self.disco_public, node: &self.public, shared: &peer.disco, region: self.region };
        let out = &mut self.out;
        let relay = |packet: &[u8]| wire::put(out, wire::SEND_PACKET, &[&key.0, packet]);
        direct::carry_out(&mut peer.path, direct, key, &voice, now, relay);
    }

    fn follow_paths(&mut self, now: Instant) {
        for key in self.peers.keys().copied().collect::<Vec<_>>() {
            self.follow_path(key, now);
        }
    }

    /// Sends what WireGuard has made, by the way that the path names.
    fn transmit(&mut self, to: NodePublic, packet: &[u8], now: Instant) {
        let Some(direct) = &mut self.direct else {
            return wire::put(&mut self.out, wire::SEND_PACKET, &[&to.0, packet]);
        };
        let Some(peer) = self.peers.get_mut(&to) else { return };
        let route = peer.path.route(now);
        if let Some(address) = route.direct {
            direct.send(address, packet.to_vec());
        }
        if route.relay {
            wire::put(&mut self.out, wire::SEND_PACKET, &[&to.0, packet]);
        }
        self.follow_path(to, now);
    }

    fn packet(&mut self, from: NodePublic, via: Via, packet: &[u8], now: Instant) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        if let Some(sender) = small::disco_sender(packet) {
            if sender == peer.disco_public
                && let Some(mut direct) = self.direct.take()
            {
                self.probe(&mut direct, from, via, packet, now);
                self.direct = Some(direct);
                return self.follow_path(from, now);
            }
            if sender != peer.disco_public {
                return;
            }
            // The same transaction again is a duplicate.
            let ping = small::open_ping(packet, &peer.disco).filter(|txid| peer.last_ping != Some(*txid));
            if let Some(txid) = ping {
                peer.last_ping = Some(txid);
                let pong = small::pong(txid, self.region, &self.disco_public, &peer.disco);
                wire::put(&mut self.out, wire::SEND_PACKET, &[&from.0, &pong]);
                count(&self.counters.disco_pings, 1);
            }
            return;
        }
        self.buffer.resize(open_room(packet.len()).max(self.buffer.len()), 0);
        let session = match peer.engine.open(now, packet, &mut self.buffer) {
            Opened::Packet { len, session } => {
                let buffer = std::mem::take(&mut self.buffer);
                self.inner(from, buffer.get(..len).unwrap_or_default(), now);
                self.buffer = buffer;
                session
            }
            Opened::Answer { len, session } => {
                let answer = self.buffer.get(..len).unwrap_or_default().to_vec();
                self.transmit(from, &answer, now);
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

    /// Takes a packet out of the tunnel.
    fn inner(&mut self, from: NodePublic, packet: &[u8], now: Instant) {
        let Some((source, destination, next)) = small::ipv6(packet) else { return };
        let is_theirs = self.peers.get(&from).is_some_and(|peer| peer.addresses.contains(&source));
        if !is_theirs || !self.addresses.contains(&destination) {
            return;
        }
        count(&self.counters.received_bytes, packet.len());
        let answer = match next {
            TSMP => {
                let [own, _] = self.addresses;
                small::tsmp_pong(packet, own).inspect(|_| count(&self.counters.tsmp_pings, 1))
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
            self.transmit(to, room.get(..len).unwrap_or_default(), now);
        }
    }

    fn drain(&mut self, to: NodePublic, now: Instant) {
        let mut room = [0; seal_room(MTU)];
        while let Some(len) = self.peers.get_mut(&to).and_then(|peer| peer.engine.drain(now, &mut room)) {
            self.transmit(to, room.get(..len).unwrap_or_default(), now);
        }
    }

    /// Lets paths and TCP work after packets came in or their time has come.
    pub(super) fn poll(&mut self, now: Instant) {
        if let Some(direct) = self.direct.as_mut() {
            if direct.due(now) <= now {
                direct.ask(now);
            }
            for peer in self.peers.values_mut() {
                peer.path.handle_timeout(now);
            }
            self.follow_paths(now);
        }
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
        let stack = self.stack.as_mut().and_then(|stack| stack.due(now));
        let Some(direct) = &self.direct else { return stack };
        let paths = self.peers.values().filter_map(|peer| peer.path.poll_timeout());
        paths.chain(stack).chain([direct.due(now)]).min()
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
        for key in self.peers.keys().copied().collect::<Vec<_>>() {
            let ticked = self.peers.get_mut(&key).map(|peer| peer.engine.tick(now, &mut room));
            if let Some(Ticked::Send(len)) = ticked {
                self.transmit(key, room.get(..len).unwrap_or_default(), now);
            }
        }
        !self.out.is_empty() || self.direct.is_some()
    }

    /// Takes what is to be written to the relay.
    pub(super) fn take_output(&mut self, buffer: &mut BytesMut) {
        std::mem::swap(&mut self.out, buffer);
        self.out.clear();
    }
}
