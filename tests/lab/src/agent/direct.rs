//! An agent's way around the relay: what it knows of addresses, without the socket itself. Which way packets go is
//! decided as the reference does ([`crate::reference`]).

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use warren_proto::{
    disco::{self, Message},
    key::{BoxShared, DiscoPublic, NodePublic, random},
    stun::{self, Response},
};

use crate::reference::{Effect, Reference, Via};

/// How often an agent asks how the world sees it.
const STUN_PERIOD: Duration = Duration::from_secs(23);
/// What stands for the relays where an address is told; the port is the region.
const RELAY: [u8; 4] = [127, 3, 3, 40];
/// Datagrams that wait for the socket.
const MAX_WAITING: usize = 4096;

/// Which datagrams of an agent are lost without a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// What it sends.
    pub sent: bool,
    /// What is sent to it.
    pub received: bool,
}

/// The UDP side of one agent.
pub(super) struct Direct {
    /// Where its socket is bound.
    local: SocketAddr,
    servers: Vec<SocketAddr>,
    mapped: Option<SocketAddr>,
    asked: Option<(stun::TxId, Instant)>,
    /// Whose WireGuard is taken from where.
    sources: HashMap<SocketAddr, NodePublic>,
    out: VecDeque<(SocketAddr, Vec<u8>)>,
    cut: Cut,
}

impl Direct {
    pub(super) fn new(local: SocketAddr, servers: Vec<SocketAddr>) -> Self {
        let (sources, out, cut) = (HashMap::new(), VecDeque::new(), Cut::default());
        Self { local, servers, mapped: None, asked: None, sources, out, cut }
    }

    pub(super) fn set_cut(&mut self, cut: Cut) {
        self.cut = cut;
    }

    /// Whether what arrives over UDP is lost.
    pub(super) fn is_deaf(&self) -> bool {
        self.cut.received
    }

    /// Where peers may find the agent.
    pub(super) fn endpoints(&self) -> Vec<SocketAddr> {
        let mapped = self.mapped.filter(|mapped| *mapped != self.local);
        mapped.into_iter().chain([self.local]).collect()
    }

    /// Whose a source is.
    pub(super) fn owner(&self, from: &SocketAddr) -> Option<NodePublic> {
        self.sources.get(from).copied()
    }

    pub(super) fn send(&mut self, to: SocketAddr, datagram: Vec<u8>) {
        if !self.cut.sent && self.out.len() < MAX_WAITING {
            self.out.push_back((to, datagram));
        }
    }

    /// The next datagram for the socket.
    pub(super) fn take(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        self.out.pop_front()
    }

    /// When [`Self::ask`] is due.
    pub(super) fn due(&self, now: Instant) -> Instant {
        self.asked.map_or(now, |(_, at)| at + STUN_PERIOD)
    }

    /// Asks how the world sees the agent.
    pub(super) fn ask(&mut self, now: Instant) {
        let txid = random();
        self.asked = Some((txid, now));
        for server in self.servers.clone() {
            self.send(server, stun::request(&txid));
        }
    }

    /// Takes an answer to that. Returns whether the endpoints are others now.
    pub(super) fn answered(&mut self, packet: &[u8]) -> bool {
        let Ok(Response { txid, address }) = Response::decode(packet) else { return false };
        let is_ours = self.asked.is_some_and(|(asked, _)| asked == txid);
        is_ours && self.mapped.replace(address) != Some(address)
    }

    pub(super) fn forget(&mut self, peer: &NodePublic) {
        self.sources.retain(|_, owner| owner != peer);
    }
}

/// What is needed to speak to one peer's prober.
pub(super) struct Voice<'a> {
    pub(super) own: &'a DiscoPublic,
    pub(super) node: &'a NodePublic,
    pub(super) shared: &'a BoxShared,
    /// Where we listen.
    pub(super) region: u16,
}

impl Voice<'_> {
    fn seal(&self, message: &Message) -> Vec<u8> {
        disco::seal(message, self.own, self.shared, &random())
    }
}

/// Carries out what a path wants; what goes through the relay is handed to `relay`.
pub(super) fn carry_out(
    path: &mut Reference,
    direct: &mut Direct,
    peer: NodePublic,
    voice: &Voice<'_>,
    now: Instant,
    mut relay: impl FnMut(&[u8]),
) {
    while let Some(effect) = path.poll_effect(&mut random) {
        match effect {
            Effect::Ping { to, txid } => {
                direct.send(to, voice.seal(&Message::Ping { txid, node: Some(*voice.node) }));
            }
            Effect::RelayPing { txid } => {
                relay(&voice.seal(&Message::Ping { txid, node: Some(*voice.node) }));
            }
            Effect::CallMeMaybe(endpoints) => relay(&voice.seal(&Message::CallMeMaybe(endpoints))),
            // The list is never old: the socket does not move by itself.
            Effect::RefreshEndpoints => path.handle_own_endpoints(now, &direct.endpoints()),
            Effect::Verified(from) => drop(direct.sources.insert(from, peer)),
        }
    }
}

/// Takes a probe that a peer has sealed. Returns whether it was a ping that is answered.
pub(super) fn probed(
    path: &mut Reference,
    direct: &mut Direct,
    voice: &Voice<'_>,
    via: Via,
    packet: &[u8],
    now: Instant,
    relay: impl FnOnce(&[u8]),
) -> bool {
    let Ok(message) = disco::open(packet, voice.shared) else { return false };
    match message {
        Message::Ping { txid, .. } => {
            if !path.handle_ping(now, via, txid) {
                return false;
            }
            let pong = |source| voice.seal(&Message::Pong { txid, source });
            match via {
                Via::Direct(from) => direct.send(from, pong(from)),
                Via::Relay => relay(&pong(SocketAddr::from((RELAY, voice.region)))),
            }
            return true;
        }
        Message::Pong { txid, .. } => drop(path.handle_pong(now, via, txid)),
        Message::CallMeMaybe(endpoints) => path.handle_call_me_maybe(now, &endpoints),
    }
    false
}
