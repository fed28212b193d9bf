//! Whose an unencrypted source address is: what says which peer a WireGuard datagram belongs to (tailnet-data 7.6).
//!
//! Only addresses that a peer pinged from, or answered from, are in it. What comes from elsewhere is dropped, as our
//! peers do.

use std::{collections::HashMap, net::SocketAddr};

use warren_proto::key::NodePublic;

/// The addresses of all peers. Each [`super::Path`] verifies at most [`super::MAX_VERIFIED`]; together they fit for
/// a thousand peers.
pub const MAX_SOURCES: usize = 1 << 16;

/// From address to peer.
#[derive(Debug, Clone, Default)]
pub struct ReceiveMap(HashMap<SocketAddr, NodePublic>);

impl ReceiveMap {
    /// Whose an address is.
    pub fn get(&self, from: &SocketAddr) -> Option<&NodePublic> {
        self.0.get(from)
    }

    /// An address is this peer's, whoever had it before. Returns whether there was room.
    pub fn insert(&mut self, from: SocketAddr, peer: NodePublic) -> bool {
        let has_room = self.0.len() < MAX_SOURCES || self.0.contains_key(&from);
        if has_room {
            self.0.insert(from, peer);
        }
        has_room
    }

    /// An address is this peer's no more; if it is another's by now, it stays so.
    pub fn remove(&mut self, from: &SocketAddr, peer: &NodePublic) {
        if self.0.get(from) == Some(peer) {
            self.0.remove(from);
        }
    }

    /// A peer is gone.
    pub fn forget(&mut self, peer: &NodePublic) {
        self.0.retain(|_, it| it != peer);
    }

    /// How many addresses there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
