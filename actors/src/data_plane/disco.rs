//! Path probes over relays: pings are answered, pongs handed on (tailnet-data 5).

use std::{
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use warren_proto::{
    address::RELAY_MAGIC,
    disco::{self, DiscoError, Message},
    key::random,
};

use super::{Plane, Pong, TxId, peers::Peer};
use crate::relay::link::Link;

/// A sealed ping to a peer.
pub(super) fn ping(plane: &Plane, peer: &Peer, txid: TxId) -> Vec<u8> {
    seal(plane, peer, &Message::Ping { txid, node: Some(plane.node_public) })
}

/// Handles a probe that came from a peer through a link. Returns whether it was one of that peer's.
pub(super) fn handle(plane: &Plane, link: &Link, peer: &Peer, packet: &[u8], now: Instant) -> bool {
    if disco::sender(packet) != Some(peer.disco_key) {
        return false;
    }
    match disco::open(packet, peer.disco(&plane.disco)) {
        Ok(Message::Ping { txid, .. }) => answer(plane, link, peer, txid),
        Ok(Message::Pong { txid, .. }) => {
            let region = Some(link.region());
            plane.events.pong(Pong { peer: peer.key, txid, region, received_at: now });
        }
        // About direct paths, or of the future.
        Ok(Message::CallMeMaybe(_)) | Err(DiscoError::Unknown(_)) => {}
        Err(DiscoError::Sealed | DiscoError::Short) => return false,
    }
    true
}

fn answer(plane: &Plane, link: &Link, peer: &Peer, txid: TxId) {
    if peer.is_new_ping(link.region(), txid) {
        // A ping over a relay seems to come from there; the port is the region.
        let source = SocketAddr::new(IpAddr::V4(RELAY_MAGIC), link.region().0);
        let pong = seal(plane, peer, &Message::Pong { txid, source });
        // A relay that takes nothing loses pongs like any packet; the peer asks again.
        let _ = link.send(&peer.key, &pong);
    }
}

fn seal(plane: &Plane, peer: &Peer, message: &Message) -> Vec<u8> {
    disco::seal(message, &plane.disco_public, peer.disco(&plane.disco), &random())
}
