//! Path probes, over relays and over UDP: pings are answered, what else they say goes to the path of their peer
//! (tailnet-data 5).

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use warren_core::path::{Arrival, Via, identify};
use warren_proto::{
    address::RELAY_MAGIC,
    disco::{self, DiscoError, Message},
    key::{NodePublic, random},
};

use super::{
    Plane, TxId,
    counters::{Probe, Way},
    peers::Peer,
};
use crate::relay::link::Link;

/// A sealed ping to a peer.
pub(super) fn ping(plane: &Plane, peer: &Peer, txid: TxId) -> Vec<u8> {
    seal(plane, peer, &Message::Ping { txid, node: Some(plane.node_public) })
}

/// A sealed list of where we are, to a peer.
pub(super) fn call_me_maybe(plane: &Plane, peer: &Peer, endpoints: Vec<SocketAddr>) -> Vec<u8> {
    seal(plane, peer, &Message::CallMeMaybe(endpoints))
}

/// Handles a probe that came from a peer through a link. Returns whether it was one of that peer's.
pub(super) fn handle_relayed(plane: &Plane, link: &Link, peer: &Peer, packet: &[u8], now: Instant) -> bool {
    if disco::sender(packet) != Some(peer.disco_key) {
        return false;
    }
    let via = Via::Relay(link.region());
    match open(plane, peer, packet, Way::Relay) {
        Ok(Message::Ping { txid, .. }) => {
            if plane.feed(peer, |path| path.handle_ping(now, via, txid)) {
                // A ping over a relay seems to come from there; the port is the region.
                let source = SocketAddr::new(IpAddr::V4(RELAY_MAGIC), link.region().0);
                let pong = seal(plane, peer, &Message::Pong { txid, source });
                // A relay that takes nothing loses pongs like any packet; the peer asks again.
                if link.send(&peer.key, &pong).is_ok() {
                    plane.counters.probes_sent.note(Probe::Pong, Way::Relay);
                }
            }
        }
        Ok(Message::Pong { txid, source }) => {
            if let Some(answer) = plane.feed(peer, |path| path.handle_pong(now, via, txid, source)) {
                plane.note_answer(peer, answer, now);
            }
        }
        Ok(Message::CallMeMaybe(endpoints)) => {
            plane.feed(peer, |path| path.handle_call_me_maybe(now, &endpoints));
        }
        // Of the future.
        Err(DiscoError::Unknown(_)) => {}
        Err(DiscoError::Sealed | DiscoError::Short) => return false,
    }
    true
}

/// Handles a probe that came over UDP. Returns whether it was a peer's.
pub(super) fn handle_direct(plane: &Plane, from: SocketAddr, packet: &[u8], now: Instant) -> bool {
    let peers = disco::sender(packet).map(|sender| plane.peers.by_disco(&sender)).unwrap_or_default();
    // The box is the same for all of them.
    let Some(first) = peers.first() else { return false };
    match open(plane, first, packet, Way::Direct) {
        Ok(Message::Ping { txid, node }) => answer(plane, &peers, from, txid, node, now),
        Ok(Message::Pong { txid, source }) => {
            for peer in &peers {
                let via = Via::Direct(from);
                if let Some(answer) = plane.feed(peer, |path| path.handle_pong(now, via, txid, source)) {
                    plane.note_answer(peer, answer, now);
                }
            }
            true
        }
        // Only a relay says from whom it is.
        Ok(Message::CallMeMaybe(_)) => false,
        Err(DiscoError::Unknown(_)) => true,
        Err(DiscoError::Sealed | DiscoError::Short) => false,
    }
}

fn answer(
    plane: &Plane,
    peers: &[Arc<Peer>],
    from: SocketAddr,
    txid: TxId,
    named: Option<NodePublic>,
    now: Instant,
) -> bool {
    let keys: Vec<NodePublic> = peers.iter().map(|peer| peer.key).collect();
    let sender = identify(&keys, Arrival::Direct, named);
    let Some(peer) = peers.iter().find(|peer| Some(peer.key) == sender) else { return false };
    if plane.feed(peer, |path| path.handle_ping(now, Via::Direct(from), txid)) {
        let pong = seal(plane, peer, &Message::Pong { txid, source: from });
        // What is lost is asked again.
        if plane.send_directly(from, &pong).is_ok() {
            plane.counters.probes_sent.note(Probe::Pong, Way::Direct);
        }
    }
    true
}

fn open(plane: &Plane, peer: &Peer, packet: &[u8], way: Way) -> Result<Message, DiscoError> {
    let message = disco::open(packet, peer.disco(&plane.disco))?;
    let probe = match &message {
        Message::Ping { .. } => Probe::Ping,
        Message::Pong { .. } => Probe::Pong,
        Message::CallMeMaybe(_) => Probe::CallMeMaybe,
    };
    plane.counters.probes_received.note(probe, way);
    Ok(message)
}

fn seal(plane: &Plane, peer: &Peer, message: &Message) -> Vec<u8> {
    disco::seal(message, &plane.disco_public, peer.disco(&plane.disco), &random())
}
