//! Reading a peer's node message (tailnet-control 5.1, tailnet-data 11.1).

use std::net::{Ipv6Addr, SocketAddr};

use warren_proto::{
    address::Cidr,
    key::{DiscoPublic, NodePublic},
    tailnet,
};

use super::Peer;
use crate::relay_map::RegionId;

/// Addresses of one peer that are handled; agents have two or three.
const MAX_ADDRESSES: usize = 64;
/// Endpoints of one peer that are kept; the largest agents have some twenty.
const MAX_ENDPOINTS: usize = 100;
/// Of a malformed text this much is told.
const SHOWN: usize = 64;

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
    /// It has more addresses than any agent.
    #[error("the peer has {0} addresses: {MAX_ADDRESSES} are handled at most")]
    TooMany(usize),
}

pub(super) fn decode(node: &tailnet::Node) -> Result<Peer, NodeError> {
    let most = node.addresses.len().max(node.allowed_ips.len());
    if most > MAX_ADDRESSES {
        return Err(NodeError::TooMany(most));
    }
    for text in &node.addresses {
        cidr(text)?;
    }
    let allowed = node.allowed_ips.iter().map(|text| cidr(text)).collect::<Result<Vec<_>, _>>()?;
    Ok(Peer {
        node_key: node_key(&node.key)?,
        disco_key: disco_key(&node.disco)?,
        home: RegionId::new(node.preferred_derp.into()).ok_or(NodeError::Home(node.preferred_derp))?,
        addresses: single_addresses(&allowed),
        keepalive: false,
        endpoints: endpoints(&node.endpoints),
        announcements: 0,
    })
}

fn node_key(bytes: &[u8]) -> Result<NodePublic, NodeError> {
    NodePublic::from_binary(bytes).ok().filter(|key| !key.is_zero()).ok_or(NodeError::Key)
}

fn disco_key(text: &str) -> Result<DiscoPublic, NodeError> {
    text.parse().ok().filter(|key: &DiscoPublic| !key.is_zero()).ok_or(NodeError::Disco)
}

fn cidr(text: &str) -> Result<Cidr, NodeError> {
    text.parse().map_err(|_| NodeError::Address(text.chars().take(SHOWN).collect()))
}

/// Only single addresses are installed: a peer must not claim a network.
fn single_addresses(allowed: &[Cidr]) -> Vec<Ipv6Addr> {
    let mut addresses = Vec::with_capacity(allowed.len());
    for address in allowed.iter().filter_map(Cidr::as_host) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// What cannot be read is no reason to be without the rest.
fn endpoints(texts: &[String]) -> Vec<SocketAddr> {
    let read = texts.iter().filter_map(|text| text.parse::<SocketAddr>().ok());
    read.map(|it| SocketAddr::new(it.ip().to_canonical(), it.port())).take(MAX_ENDPOINTS).collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_node_is_read_with_its_single_ipv6_addresses_each_once() {
        let peer = decode(&node()).unwrap();
        assert_eq!(peer.node_key, NodePublic([1; 32]));
        assert_eq!(peer.disco_key, DiscoPublic([2; 32]));
        assert_eq!(peer.home, RegionId(999));
        assert_eq!(peer.addresses, ["fd7a:115c:a1e0::1", "fd60:627a:a42b::1"].map(address));
    }

    #[test]
    fn more_addresses_than_any_agent_has_are_refused_by_number_and_a_long_text_is_told_in_part() {
        let allowed_ips: Vec<_> = (0..65).map(|number| format!("fd60::{number}/128")).collect();
        let crowd = tailnet::Node { allowed_ips: allowed_ips.clone(), ..node() };
        assert_eq!(decode(&crowd), Err(NodeError::TooMany(65)));
        let most = allowed_ips.into_iter().skip(1).collect();
        assert_eq!(decode(&tailnet::Node { allowed_ips: most, ..node() }).unwrap().addresses.len(), 64);
        let long = tailnet::Node { addresses: vec!["x".repeat(1000)], ..node() };
        assert_eq!(decode(&long), Err(NodeError::Address("x".repeat(64))));
    }

    #[test]
    fn endpoints_are_kept_as_far_as_they_can_be_read_and_not_without_end() {
        let texts =
            ["192.0.2.1:41641", "nonsense", "[2001:db8::1]:1", "[::ffff:192.0.2.2]:2", "192.0.2.3", ""];
        let peer = decode(&tailnet::Node { endpoints: texts.map(String::from).into(), ..node() }).unwrap();
        let expected = ["192.0.2.1:41641", "[2001:db8::1]:1", "192.0.2.2:2"];
        assert_eq!(peer.endpoints, expected.map(|text| text.parse::<SocketAddr>().unwrap()));
        let endpoints = (1..=1000).map(|port| format!("192.0.2.1:{port}")).collect();
        let crowd = decode(&tailnet::Node { endpoints, ..node() }).unwrap();
        assert_eq!(crowd.endpoints.len(), MAX_ENDPOINTS);
    }

    #[test]
    fn networks_and_ipv4_are_not_installed() {
        let allowed_ips = ["fd60::/48", "::/0", "10.0.0.1/32", "fd60:627a:a42b::1/127"].map(String::from);
        let peer = decode(&tailnet::Node { allowed_ips: allowed_ips.into(), ..node() }).unwrap();
        assert!(peer.addresses.is_empty(), "{peer:?}");
    }

    #[test]
    fn a_node_that_cannot_be_used_says_why_in_words() {
        let with = |change: fn(&mut tailnet::Node)| {
            let mut node = node();
            change(&mut node);
            decode(&node).unwrap_err().to_string()
        };
        let malformed_key = "the node key is malformed";
        assert_eq!(with(|node| node.key = Bytes::new()), malformed_key);
        assert_eq!(with(|node| node.key = node.key.slice(2..)), malformed_key, "without its prefix");
        assert_eq!(with(|node| node.key = node.key.slice(..33)), malformed_key);
        assert_eq!(with(|node| node.key = vec![0; 34].into()), malformed_key);
        assert_eq!(
            with(|node| node.key = Bytes::copy_from_slice(&NodePublic([0; 32]).to_binary())),
            malformed_key
        );
        let malformed_disco = "the disco key is malformed";
        assert_eq!(with(|node| node.disco.clear()), malformed_disco);
        assert_eq!(with(|node| node.disco.push('0')), malformed_disco);
        assert_eq!(with(|node| node.disco = DiscoPublic([0; 32]).to_string()), malformed_disco);
        assert_eq!(with(|node| node.preferred_derp = 0), "the home region 0 is none");
        assert_eq!(with(|node| node.preferred_derp = -1), "the home region -1 is none");
        assert_eq!(with(|node| node.preferred_derp = 65_536), "the home region 65536 is none");
        for text in
            ["", "fd60::1", "fd60::1/", "fd60::1/129", "10.0.0.1/33", "fd60::1/+8", "host/128", "/128"]
        {
            let allowed = tailnet::Node { allowed_ips: vec![text.to_owned()], ..node() };
            assert_eq!(decode(&allowed), Err(NodeError::Address(text.to_owned())));
            let addresses = tailnet::Node { addresses: vec![text.to_owned()], ..node() };
            assert_eq!(decode(&addresses), Err(NodeError::Address(text.to_owned())));
        }
        assert_eq!(NodeError::Address("x".to_owned()).to_string(), r#"the address "x" is malformed"#);
    }

    fn node() -> tailnet::Node {
        let addresses = ["fd7a:115c:a1e0::1/128", "fd60:627a:a42b::1/128", "fd7a:115c:a1e0::1/128"];
        tailnet::Node {
            key: Bytes::copy_from_slice(&NodePublic([1; 32]).to_binary()),
            disco: DiscoPublic([2; 32]).to_string(),
            preferred_derp: 999,
            addresses: addresses.map(String::from).into(),
            allowed_ips: addresses.map(String::from).into(),
            ..tailnet::Node::default()
        }
    }

    fn address(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }
}
