//! A whole peer, without its sockets: coordination, tunnels, paths, receive map and own endpoints, as the data plane
//! holds them together.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use warren_actors::wireguard::{Engines, Keepalive};
use warren_core::{
    coordination,
    path::{Direct, ReceiveMap, RelayStands, Route, Via},
    relay_map::RegionId,
};
use warren_proto::{
    disco::TxId,
    key::{NodePrivate, NodePublic},
    tailnet::CoordinateResponse,
};

use super::{
    control::{Member, Outcome},
    engine::{Engine, Make},
    loss::{Loss, Losses},
    network::HostId,
    relay::Link,
    tunnel::{Message, Passed, Tunnel},
};

/// The only region of these worlds.
pub(crate) const REGION: RegionId = RegionId(1);

/// Who is who.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PeerId(pub(crate) usize);

/// What peers send each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    Ping(TxId),
    Pong { txid: TxId, observed: SocketAddr },
    CallMeMaybe(Vec<SocketAddr>),
    WireGuard(Message),
}

/// A peer of the world. The model of the reference has the same WireGuard and the same coordination as ours: what is
/// its own is how it chooses ways, and that it wants no tunnels.
pub(crate) struct Peer {
    pub(crate) make: Make,
    pub(crate) host: HostId,
    /// Of its sockets.
    pub(crate) port: u16,
    pub(crate) member: Member,
    pub(crate) others: BTreeMap<PeerId, Other>,
    engines: Engines,
    pub(crate) sources: ReceiveMap,
    /// As last collected.
    pub(crate) endpoints: Vec<SocketAddr>,
    collected_at: Option<Instant>,
    /// When STUN servers were asked last.
    pub(crate) looked_at: Instant,
    pub(crate) relay: Link,
    pub(crate) policy: Direct,
    /// Whether it sends a packet for each that comes.
    pub(crate) is_answering: bool,
    /// When a handshake was given up last: what WireGuard calls an error.
    pub(crate) gave_up_at: Option<Instant>,
}

/// What a peer knows of another.
pub(crate) struct Other {
    key: NodePublic,
    pub(crate) path: Engine,
    pub(crate) tunnel: Tunnel,
    /// As the other was programmed last; nothing comes or goes before.
    settings: Option<coordination::Peer>,
    /// When each of the packets to it was sent.
    pub(crate) sent: Vec<Instant>,
    /// What was lost of them.
    pub(crate) losses: Losses,
    /// Which of its packets came, each counted once.
    pub(crate) received: BTreeSet<u64>,
    /// How many of them came over UDP, copies included.
    pub(crate) came_directly: u64,
}

/// A message to a peer, and the ways that it goes.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) to: PeerId,
    pub(crate) message: Message,
    pub(crate) route: Route,
}

/// What a message of WireGuard led to.
#[derive(Debug)]
pub(crate) struct Heard {
    /// Whether it brought a packet that had not come yet.
    pub(crate) is_news: bool,
    pub(crate) outgoing: Vec<Outgoing>,
}

impl Peer {
    /// One of the peers with these keys and makes.
    pub(crate) fn new(
        now: Instant,
        id: PeerId,
        keys: &[NodePrivate],
        makes: &[Make],
        host: HostId,
        port: u16,
    ) -> Self {
        let (make, engines) = (makes[id.0], Engines::new(&keys[id.0]));
        let other = |other: PeerId| {
            let key = keys[other.0].public();
            let engine = engines.engine(&key, other.0 as u32 + 1, now);
            (other, Other::new(make, key, Tunnel::new(engine, id.address(), other.address())))
        };
        Self {
            make,
            host,
            port,
            member: Member::new(id, keys[id.0].public(), makes),
            others: (0..keys.len()).map(PeerId).filter(|it| *it != id).map(other).collect(),
            engines,
            sources: ReceiveMap::default(),
            endpoints: Vec::new(),
            collected_at: None,
            looked_at: now,
            relay: Link::new(now),
            policy: Direct::Allowed,
            is_answering: false,
            gave_up_at: None,
        }
    }

    pub(crate) fn other(&mut self, id: PeerId) -> &mut Other {
        self.others.get_mut(&id).unwrap()
    }

    /// What the control plane tells others of our endpoints.
    pub(crate) fn published(&self) -> Vec<SocketAddr> {
        match self.policy {
            Direct::Allowed => self.endpoints.clone(),
            Direct::Blocked => Vec::new(),
        }
    }

    /// Takes what the control plane says.
    pub(crate) fn hear_control(&mut self, now: Instant, response: &CoordinateResponse) -> Outcome {
        let Self { member, others, .. } = self;
        member.hear(now, response, |key| last_handshake(others, now, key))
    }

    /// Lets time pass for coordination.
    pub(crate) fn coordinate(&mut self, now: Instant) -> Outcome {
        let Self { member, others, .. } = self;
        member.handle_timeout(now, |key| last_handshake(others, now, key))
    }

    /// Makes the programmed peers equal to the map of coordination. Returns whose tunnel is to be warmed up.
    pub(crate) fn program(&mut self, now: Instant) -> Vec<PeerId> {
        let wanted = self.member.map().peers.clone();
        let programmed = self.others.values().filter(|other| other.settings.is_some()).count();
        assert!(wanted.len() >= programmed, "nobody leaves these worlds");
        let mut cold = Vec::new();
        for (id, wanted) in wanted {
            let id = PeerId::of_uuid(&id);
            if self.program_one(now, id, wanted) {
                cold.push(id);
            }
        }
        cold
    }

    /// Returns whether its tunnel is to be warmed up.
    fn program_one(&mut self, now: Instant, id: PeerId, wanted: coordination::Peer) -> bool {
        let (policy, own) = (self.policy, self.collected_at.map(|at| (at, self.endpoints.clone())));
        let other = self.other(id);
        assert_eq!((other.key, &*wanted.addresses), (wanted.node_key, &[id.address()][..]));
        let (announcements, is_warm) = (wanted.announcements, wanted.keepalive);
        let Some(was) = other.settings.replace(wanted.clone()) else {
            other.tunnel.set_keepalive(keepalive(is_warm));
            other.path.set_policy(now, policy);
            if let Some((collected_at, own)) = own {
                other.path.handle_own_endpoints(collected_at, &own);
            }
            other.path.handle_node(now, &wanted.endpoints);
            other.path.handle_ready(now);
            return is_warm;
        };
        if was == wanted {
            return false;
        }
        other.tunnel.set_keepalive(keepalive(is_warm));
        if was.endpoints != wanted.endpoints {
            other.path.handle_node(now, &wanted.endpoints);
        }
        let is_ready = was.announcements < announcements;
        if is_ready {
            other.path.handle_ready(now);
        }
        is_warm && (!was.keepalive || is_ready && !other.tunnel.has_session())
    }

    /// Takes a message of WireGuard.
    pub(crate) fn open(
        &mut self,
        now: Instant,
        from: PeerId,
        via: Via,
        message: &Message,
    ) -> Result<Heard, Loss> {
        if let Via::Direct(source) = via
            && self.sources.get(&source) != Some(&self.others[&from].key)
        {
            return Err(Loss::UnknownSource);
        }
        let other = self.other(from);
        if other.settings.is_none() {
            return Err(Loss::UnknownPeer);
        }
        let brought = other.tunnel.open(now, message)?;
        let send = |message| Outgoing { to: from, message, route: other.path.route(now) };
        let outgoing = brought.messages.into_iter().map(send).collect();
        other.path.handle_received(now, via);
        let is_news = brought.number.is_some_and(|number| other.received.insert(number));
        other.came_directly += u64::from(brought.number.is_some() && matches!(via, Via::Direct(_)));
        Ok(Heard { is_news, outgoing })
    }

    /// Takes what is said about paths; returns what is to be answered by the same way.
    pub(crate) fn probe(&mut self, now: Instant, from: PeerId, via: Via, said: Said) -> Option<Said> {
        let other = self.other(from);
        // Whose key is unknown cannot be understood.
        other.settings.as_ref()?;
        match said {
            Said::Ping(txid) => {
                let observed = match via {
                    Via::Direct(source) => source,
                    Via::Relay(_) => SocketAddr::from(([127, 3, 3, 40], REGION.0)),
                };
                return other.path.handle_ping(now, via, txid).then_some(Said::Pong { txid, observed });
            }
            Said::Pong { txid, observed } => other.path.handle_pong(now, via, txid, observed),
            Said::CallMeMaybe(endpoints) => other.path.handle_call_me_maybe(now, &endpoints),
            Said::WireGuard(_) => {}
        }
        None
    }

    /// The next packet to a peer: what is to be sent now, if anything is.
    pub(crate) fn send(&mut self, now: Instant, to: PeerId) -> Option<Outgoing> {
        let other = self.other(to);
        other.sent.push(now);
        let number = other.sent.len() as u64;
        if other.settings.is_none() {
            other.losses.note(number, Loss::NoRoute);
            return None;
        }
        let route = other.path.route(now);
        match other.tunnel.seal(now, number) {
            Ok(message) => message.map(|message| Outgoing { to, message, route }),
            Err(loss) => {
                other.losses.note(number, loss);
                None
            }
        }
    }

    /// Starts a handshake with a peer, or sends a keepalive.
    pub(crate) fn warm(&mut self, now: Instant, to: PeerId) -> Option<Outgoing> {
        let other = self.other(to);
        let message = other.tunnel.warm(now)?;
        Some(Outgoing { to, message, route: other.path.route(now) })
    }

    /// Lets time pass for the tunnels.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<Outgoing> {
        self.engines.reset_guard();
        let mut outgoing = Vec::new();
        for (to, other) in &mut self.others {
            match other.tunnel.tick(now) {
                Passed::Nothing => {}
                Passed::Send(message) => {
                    outgoing.push(Outgoing { to: *to, message, route: other.path.route(now) });
                }
                Passed::GaveUp(lost) => {
                    self.gave_up_at = Some(now);
                    lost.into_iter().for_each(|number| other.losses.note(number, Loss::NoSession));
                }
            }
        }
        outgoing
    }

    /// Whose tunnel is to be warmed up when the link to the relay is there again: what was lost with it was perhaps a
    /// handshake.
    pub(crate) fn cold(&self) -> Vec<PeerId> {
        let is_cold = |other: &Other| other.tunnel.is_warm() && !other.tunnel.has_session();
        self.others.iter().filter(|(_, other)| is_cold(other)).map(|(id, _)| *id).collect()
    }

    /// When the next timer of a path, of coordination or of the link to the relay is due.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let paths = self.others.values().filter_map(|other| other.path.poll_timeout());
        paths.chain(self.member.poll_timeout()).chain([self.relay.poll_timeout()]).min()
    }

    /// Lets time pass for the paths.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.others.values_mut().for_each(|other| other.path.handle_timeout(now));
    }

    pub(crate) fn verify(&mut self, source: SocketAddr, peer: PeerId) {
        self.sources.insert(source, self.others[&peer].key);
    }

    pub(crate) fn forget(&mut self, source: SocketAddr, peer: PeerId) {
        self.sources.remove(&source, &self.others[&peer].key);
    }

    /// Our endpoints are these now.
    pub(crate) fn collect(&mut self, now: Instant, endpoints: Vec<SocketAddr>) {
        (self.endpoints, self.collected_at) = (endpoints, Some(now));
        let own = self.endpoints.clone();
        self.programmed().for_each(|other| other.path.handle_own_endpoints(now, &own));
    }

    /// Our link changed.
    pub(crate) fn change_link(&mut self, now: Instant) {
        self.programmed().for_each(|other| other.path.handle_link_change(now));
    }

    /// Whether direct paths may be used.
    pub(crate) fn set_policy(&mut self, now: Instant, policy: Direct) {
        self.policy = policy;
        self.programmed().for_each(|other| other.path.set_policy(now, policy));
    }

    /// The relay has answered, or not.
    pub(crate) fn prove_relay(&mut self, now: Instant, stands: RelayStands) {
        self.programmed().for_each(|other| other.path.handle_relay(now, stands));
    }

    fn programmed(&mut self) -> impl Iterator<Item = &mut Other> {
        self.others.values_mut().filter(|other| other.settings.is_some())
    }
}

impl Other {
    fn new(make: Make, key: NodePublic, tunnel: Tunnel) -> Self {
        Self {
            key,
            path: Engine::new(make),
            tunnel,
            settings: None,
            sent: Vec::new(),
            losses: Losses::default(),
            received: BTreeSet::new(),
            came_directly: 0,
        }
    }

    /// Whether the other is programmed, as one whose tunnel is kept warm.
    pub(crate) fn is_warm(&self) -> bool {
        self.settings.is_some() && self.tunnel.is_warm()
    }
}

fn last_handshake(others: &BTreeMap<PeerId, Other>, now: Instant, key: &NodePublic) -> Option<Duration> {
    others.values().find(|other| other.key == *key)?.tunnel.last_handshake(now)
}

fn keepalive(is_warm: bool) -> Keepalive {
    if is_warm { Keepalive::On } else { Keepalive::Off }
}
