//! Whose ping it is (tailnet-data 5.2): a disco key may be several peers'.

use warren_proto::key::NodePublic;

/// The way a ping came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Over UDP.
    Direct,
    /// Through a relay, which says from whom.
    Relayed(NodePublic),
}

/// The one peer that a ping is from, of those that have the disco key it was sealed with: the one that the relay
/// names, or else the one that it names itself, or else the only one. `None` where that is ambiguous.
pub fn identify(peers: &[NodePublic], arrival: Arrival, named: Option<NodePublic>) -> Option<NodePublic> {
    let has_key = |peer: &NodePublic| peers.contains(peer);
    match arrival {
        Arrival::Relayed(peer) => Some(peer).filter(has_key),
        Arrival::Direct => named.filter(has_key).or(match peers {
            [only] => Some(*only),
            _ => None,
        }),
    }
}
