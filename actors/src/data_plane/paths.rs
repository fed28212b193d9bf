//! What the paths of the peers want done, and which way messages go (tailnet-data 7). The rules are in
//! `warren_core::path`; here is what carries them out.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use futures::future::join_all;
use warren_core::path::{Answer, Effect, Path, RelayStands, Route, Via};
use warren_proto::{disco::TxId, key::random};

use super::{
    PathChange, PingUnsent, Plane, Pong,
    counters::{Amount, Drop, Probe, Tally, Way},
    disco,
    peers::Peer,
};
use crate::{
    relay::link::Link,
    udp::Unsent,
    wireguard::{Sealed, padded, seal_room},
};

/// Effects that are carried out after one input. A path keeps at most half of that.
const MAX_EFFECTS: usize = 1024;
/// For a relay's answer, when the direct path seems dead.
const PROOF_LIMIT: Duration = Duration::from_secs(1);

/// What became of the pings among the effects.
#[derive(Debug, Default)]
pub(super) struct Pinged {
    was_sent: bool,
    unsent: Option<PingUnsent>,
}

impl Pinged {
    fn note(&mut self, outcome: Result<(), PingUnsent>) {
        match outcome {
            Ok(()) => self.was_sent = true,
            Err(why) => self.unsent = Some(why),
        }
    }

    /// One way is enough.
    pub(super) fn outcome(self) -> Result<(), PingUnsent> {
        match self.unsent {
            Some(why) if !self.was_sent => Err(why),
            _ => Ok(()),
        }
    }
}

impl Plane {
    /// Tells a peer's path something, does what follows from it, and sets its timer.
    pub(super) fn feed<R>(&self, peer: &Peer, input: impl FnOnce(&mut Path) -> R) -> R {
        self.feed_and_note(peer, &mut Pinged::default(), input)
    }

    /// As [`Self::feed`], and notes what became of the pings.
    pub(super) fn feed_and_note<R>(
        &self,
        peer: &Peer,
        pinged: &mut Pinged,
        input: impl FnOnce(&mut Path) -> R,
    ) -> R {
        let mut ways = peer.ways();
        let outcome = input(&mut ways.path);
        for _ in 0..MAX_EFFECTS {
            let Some(effect) = ways.path.poll_effect(&mut random::<12>) else { break };
            drop(ways);
            self.carry_out(peer, effect, pinged);
            ways = peer.ways();
        }
        self.timers.set(peer.key, &mut ways);
        outcome
    }

    /// Where packets to a peer go now.
    pub(super) fn route(&self, peer: &Peer, now: Instant) -> Route {
        self.feed(peer, |path| path.route(now))
    }

    fn carry_out(&self, peer: &Peer, effect: Effect, pinged: &mut Pinged) {
        match effect {
            Effect::Ping { to, txid } => pinged.note(self.ping_directly(peer, to, txid)),
            Effect::RelayPing { txid } => {
                let ping = disco::ping(self, peer, txid);
                let sent = match self.edge(peer) {
                    Some(link) => link.send(&peer.key, &ping).map_err(|_| PingUnsent::QueueFull),
                    None => Err(PingUnsent::NoLink),
                };
                if sent.is_ok() {
                    self.counters.probes_sent.note(Probe::Ping, Way::Relay);
                }
                pinged.note(sent);
            }
            Effect::CallMeMaybe(endpoints) => {
                let call = disco::call_me_maybe(self, peer, endpoints);
                // One that finds no room is lost like any packet: the path says it again.
                if self.edge(peer).is_some_and(|link| link.send(&peer.key, &call).is_ok()) {
                    self.counters.probes_sent.note(Probe::CallMeMaybe, Way::Relay);
                }
            }
            Effect::RefreshEndpoints => self.events.endpoints_wanted(),
            Effect::ProveRelay => self.prove_relay(peer),
            Effect::Changed { from, to, why } => {
                tracing::debug!(peer = %peer.key, ?from, ?to, ?why, "the path to a peer changed");
                self.counters.note_change(why);
                self.events.path_changed(PathChange { peer: peer.key, from, to, why });
            }
            Effect::Verified(from) => self.peers.add_source(from, &peer.key),
            Effect::Forgotten(from) => self.peers.remove_source(&from, &peer.key),
        }
    }

    fn ping_directly(&self, peer: &Peer, to: SocketAddr, txid: TxId) -> Result<(), PingUnsent> {
        self.peers.note_asked(to, &peer.key);
        let sent = self.send_directly(to, &disco::ping(self, peer, txid));
        if sent.is_ok() {
            self.counters.probes_sent.note(Probe::Ping, Way::Direct);
        }
        if sent == Err(Unsent::Unreachable) {
            // What follows is fetched by who carries this out.
            peer.ways().path.handle_unreachable(Instant::now(), to);
        }
        sent.map_err(|why| match why {
            Unsent::Blocked => PingUnsent::QueueFull,
            Unsent::Unreachable | Unsent::TooBig | Unsent::Failed => PingUnsent::Unreachable,
        })
    }

    fn prove_relay(&self, peer: &Peer) {
        let Some(plane) = self.me.upgrade() else { return };
        let key = peer.key;
        self.runtime.spawn(async move {
            let Some(peer) = plane.peers.by_key(&key) else { return };
            let stands = plane.relay_stands(&peer).await;
            plane.feed(&peer, |path| path.handle_relay(Instant::now(), stands));
        });
    }

    /// Whether packets to a peer, and its own, get through relays now: each that they take is asked.
    pub(super) async fn relay_stands(&self, peer: &Peer) -> RelayStands {
        let Some(link) = self.edge(peer) else { return RelayStands::Down };
        let back = self.way_back(peer, &link);
        let answers = [Some(link), back].into_iter().flatten();
        let answers = answers.map(async |link| link.answers_within(PROOF_LIMIT).await);
        let is_alive = join_all(answers).await.into_iter().all(|is_alive| is_alive);
        if is_alive { RelayStands::Alive } else { RelayStands::Down }
    }

    /// Sends one datagram over UDP now, or not at all.
    pub(super) fn send_directly(&self, to: SocketAddr, datagram: &[u8]) -> Result<(), Unsent> {
        // While sockets are bound anew nothing is known to be unreachable.
        self.udp.load().as_ref().ok_or(Unsent::Blocked)?.send(to, datagram)
    }

    /// The system says that nothing arrives there.
    pub(super) fn note_unreachable(&self, to: SocketAddr) {
        if let Some(peer) = self.peers.by_destination(&to) {
            self.feed(&peer, |path| path.handle_unreachable(Instant::now(), to));
        }
    }

    /// Counts what a socket did not take, and tells the path what cannot be reached.
    pub(super) fn lose(&self, tally: &mut Tally, to: SocketAddr, why: Unsent, datagrams: u64) {
        let reason = match why {
            Unsent::Blocked => Drop::QueueFull,
            Unsent::Unreachable => Drop::Unreachable,
            Unsent::TooBig => Drop::TooBig,
            Unsent::Failed => Drop::Socket,
        };
        tally.drop_many(reason, datagrams);
        if why == Unsent::Unreachable {
            self.note_unreachable(to);
        }
    }

    /// Sends a message of WireGuard. Returns which way it goes, if it goes any.
    pub(super) fn send(&self, peer: &Peer, message: &[u8]) -> Option<Way> {
        let route = self.route(peer, Instant::now());
        let direct = route.direct.map(|to| {
            let sent = self.send_directly(to, message);
            if sent == Err(Unsent::Unreachable) {
                self.note_unreachable(to);
            }
            sent.is_ok()
        });
        let relayed =
            route.relay && self.edge_for_data(peer).is_some_and(|link| link.send(&peer.key, message).is_ok());
        match direct {
            Some(true) => Some(Way::Direct),
            _ => relayed.then_some(Way::Relay),
        }
    }

    /// Seals an inner packet of our own and sends it. Without a session it is lost, and one is begun.
    pub(super) fn send_inner(&self, peer: &Peer, mut packet: Vec<u8>) {
        let (len, mut tally) = (packet.len(), Tally::default());
        packet.resize(padded(len), 0);
        let mut sealed = vec![0; seal_room(len)];
        let outcome = {
            let mut engine = peer.engine();
            engine.has_session().then(|| engine.seal(Instant::now(), &packet, &mut sealed))
        };
        let send = |len: usize| self.send(peer, sealed.get(..len)?);
        match outcome {
            None => self.warm(peer),
            Some(Sealed::Data(sealed)) => match send(sealed) {
                Some(way) => {
                    tally.sent.by(way).add(len);
                    let mut sent = Amount::default();
                    sent.add(len);
                    peer.count(Amount::default(), sent);
                }
                None => tally.drop(Drop::NoLink),
            },
            Some(Sealed::Handshake(sealed)) => {
                if send(sealed).is_none() {
                    peer.set_cold();
                }
            }
            Some(Sealed::Waiting) => {}
            Some(Sealed::Refused) => tally.drop(Drop::Unsealed),
        }
        self.counters.add(&tally);
    }

    /// A pong that was asked for.
    pub(super) fn note_answer(&self, peer: &Peer, answer: Answer, now: Instant) {
        let region = match answer.via {
            Via::Direct(_) => None,
            Via::Relay(region) => Some(region),
        };
        let Answer { txid, latency, is_user, .. } = answer;
        self.events.pong(Pong { peer: peer.key, txid, region, latency, is_user, received_at: now });
    }
}

/// Where something came from, and so where its answer may go.
#[derive(Clone, Copy)]
pub(super) enum Origin<'a> {
    /// A relay's link.
    Relay(&'a Link),
    /// An address.
    Direct(SocketAddr),
}

impl Origin<'_> {
    /// The way as a path knows it.
    pub(super) fn via(self) -> Via {
        match self {
            Self::Relay(link) => Via::Relay(link.region()),
            Self::Direct(from) => Via::Direct(from),
        }
    }

    /// The way as it is counted.
    pub(super) fn way(self) -> Way {
        match self {
            Self::Relay(_) => Way::Relay,
            Self::Direct(_) => Way::Direct,
        }
    }
}
