//! Reading a peer's node message (tailnet-control 5.1, tailnet-data 11.1).

use std::net::{IpAddr, Ipv6Addr};

use warren_proto::{
    key::{DiscoPublic, NodePublic},
    tailnet,
};

use super::Peer;
use crate::relay_map::RegionId;

/// Why a node message cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// The node key is not in its binary form, or is all zero.
    #[error("the node key is malformed")]
    Key,
    /// The disco key is not in its text form, or is all zero.
    #[error("the disco key is malformed")]
    Disco,
    /// The peer has no home region, so it cannot be reached.
    #[error("the home region {0} is none")]
    Home(i32),
    /// An address or allowed IP is not CIDR text.
    #[error("the address {0:?} is malformed")]
    Address(String),
}

pub(super) fn decode(node: &tailnet::Node) -> Result<Peer, NodeError> {
    for text in &node.addresses {
        cidr(text)?;
    }
    let allowed = node.allowed_ips.iter().map(|text| cidr(text)).collect::<Result<Vec<_>, _>>()?;
    Ok(Peer {
        node_key: node_key(&node.key)?,
        disco_key: disco_key(&node.disco)?,
        home: RegionId::new(node.preferred_derp.into()).ok_or(NodeError::Home(node.preferred_derp))?,
        addresses: single_addresses(allowed),
        keepalive: false,
    })
}

fn node_key(bytes: &[u8]) -> Result<NodePublic, NodeError> {
    let raw = bytes.strip_prefix(b"np").and_then(|raw| <[u8; 32]>::try_from(raw).ok());
    raw.filter(is_present).map(NodePublic).ok_or(NodeError::Key)
}

fn disco_key(text: &str) -> Result<DiscoPublic, NodeError> {
    let raw = text.parse::<DiscoPublic>().ok().map(|key| key.0);
    raw.filter(is_present).map(DiscoPublic).ok_or(NodeError::Disco)
}

/// An all-zero key stands for none.
fn is_present(raw: &[u8; 32]) -> bool {
    raw.iter().any(|byte| *byte != 0)
}

fn cidr(text: &str) -> Result<(IpAddr, u8), NodeError> {
    let parsed = text.split_once('/').and_then(|(address, bits)| {
        let (address, bits): (IpAddr, u8) = (address.parse().ok()?, bits.parse().ok()?);
        let all = if address.is_ipv4() { 32 } else { 128 };
        (bits <= all).then_some((address, bits))
    });
    parsed.ok_or_else(|| NodeError::Address(text.to_owned()))
}

/// Only single addresses are installed: a peer must not claim a network.
fn single_addresses(allowed: Vec<(IpAddr, u8)>) -> Vec<Ipv6Addr> {
    let mut addresses = Vec::with_capacity(allowed.len());
    for (address, bits) in allowed {
        match address {
            IpAddr::V6(address) if bits == 128 && !addresses.contains(&address) => addresses.push(address),
            IpAddr::V6(_) | IpAddr::V4(_) => {}
        }
    }
    addresses
}
