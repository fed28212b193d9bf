//! The relay map (DERP map): regions, their nodes, and the rewriting of embedded relays.
//!
//! A map comes from the control stream ([`RelayMap::from_proto`]) or with the connection information
//! ([`ConnectionInfo::from_json`]), is rewritten ([`RelayMap::rewrite_embedded`]), and only then used.
//! What cannot be used (an impossible number or port) is left out, never fatal.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use url::{Host, Url};
use warren_proto::tailnet;

mod json;

pub use json::{ConnectionInfo, JsonError};

/// A DERP region's number. 0 is no region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub u16);

impl RegionId {
    /// The region with this number, if a region can have it.
    pub fn new(number: i64) -> Option<Self> {
        u16::try_from(number).ok().filter(|number| *number != 0).map(Self)
    }
}

impl std::fmt::Display for RegionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Where relays are (tailnet-data 1). Each map replaces the one before.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RelayMap {
    /// The regions by number.
    pub regions: BTreeMap<RegionId, Region>,
    /// Multipliers on measured latency when choosing home; a missing one is 1.
    pub scores: BTreeMap<RegionId, f64>,
}

/// One DERP region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// The region's number.
    pub id: RegionId,
    /// A short code such as `coder`.
    pub code: String,
    /// The name that people read.
    pub name: String,
    /// Whether the deployment itself serves this region.
    pub embedded: bool,
    /// Whether this region should not be anyone's home.
    pub avoid: bool,
    /// The region's servers, preferred ones first.
    pub nodes: Vec<Node>,
}

/// One server of a region.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// A name unique in the map.
    pub name: String,
    /// Host name: DNS name, TLS name and HTTP host.
    pub host_name: String,
    /// Name to verify the certificate against, if another than `host_name`.
    pub cert_name: Option<String>,
    /// How to reach it over IPv4.
    pub ipv4: NodeAddress<Ipv4Addr>,
    /// How to reach it over IPv6.
    pub ipv6: NodeAddress<Ipv6Addr>,
    /// TCP port of the relay.
    pub derp_port: u16,
    /// STUN only: never a relay.
    pub stun_only: bool,
    /// UDP port of STUN; `None` where the node has none.
    pub stun_port: Option<u16>,
    /// Where to send STUN probes instead of the node's own addresses.
    pub stun_test_ip: Option<IpAddr>,
    /// Plain HTTP, no TLS.
    pub force_http: bool,
    /// Skip TLS verification; test deployments only.
    pub insecure_for_tests: bool,
}

/// How a node is reached over one address family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NodeAddress<A> {
    /// By resolving the host name.
    #[default]
    Resolve,
    /// At this address.
    Fixed(A),
    /// Not over this family.
    Disabled,
}

impl<A: FromStr> NodeAddress<A> {
    fn parse(text: &str) -> Self {
        match text.parse() {
            _ if text.is_empty() => Self::Resolve,
            Ok(address) => Self::Fixed(address),
            Err(_) => Self::Disabled,
        }
    }
}

/// What two maps differ in; a region that moved on or vanished must not be used as before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// Regions only in the newer map.
    pub added: Vec<RegionId>,
    /// Regions that both have, defined differently.
    pub changed: Vec<RegionId>,
    /// Regions only in the older map.
    pub removed: Vec<RegionId>,
}

impl Difference {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.changed.is_empty() && self.removed.is_empty()
    }
}

impl RelayMap {
    /// The map as the control plane streams it. Regions and nodes with impossible numbers are left out;
    /// absent home parameters are empty ones.
    pub fn from_proto(map: &tailnet::DerpMap) -> Self {
        let regions = map
            .regions
            .iter()
            .filter_map(|(number, region)| Some(Region::from_proto(RegionId::new(*number)?, region)))
            .map(|region| (region.id, region))
            .collect();
        let scores = map.home_params.iter().flat_map(|params| &params.region_score);
        let scores = scores.filter_map(|(number, score)| Some((RegionId::new(*number)?, *score))).collect();
        Self { regions, scores }
    }

    /// Points every relay that the deployment itself serves to the URL that this client uses
    /// (tailnet-control 7.4). Other regions and STUN-only nodes stay as they are.
    pub fn rewrite_embedded(&mut self, url: &Url) {
        let embedded = self.regions.values_mut().filter(|region| region.embedded);
        for node in embedded.flat_map(|region| &mut region.nodes).filter(|node| !node.stun_only) {
            node.host_name = host_without_brackets(url);
            node.derp_port = url.port_or_known_default().unwrap_or(HTTPS_PORT);
            node.force_http = url.scheme() == "http";
        }
    }

    /// What changed in `newer`. The order of nodes and the scores do not count.
    pub fn difference(&self, newer: &Self) -> Difference {
        let mut difference = Difference::default();
        for (id, region) in &newer.regions {
            match self.regions.get(id) {
                None => difference.added.push(*id),
                Some(old) if !old.is_same_as(region) => difference.changed.push(*id),
                Some(_) => {}
            }
        }
        difference.removed =
            self.regions.keys().filter(|id| !newer.regions.contains_key(id)).copied().collect();
        difference
    }

    /// The name that people read of a region; `Unnamed <id>` if the map has none, `Unnamed 0` for none.
    pub fn region_name(&self, id: Option<RegionId>) -> String {
        match id.and_then(|id| self.regions.get(&id)) {
            Some(region) => region.name.clone(),
            None => format!("Unnamed {}", id.map_or(0, |id| id.0)),
        }
    }

    /// The regions that have a relay, and so may be dialled or become a home.
    pub fn relay_regions(&self) -> impl Iterator<Item = &Region> {
        self.regions.values().filter(|region| region.relays().next().is_some())
    }

    /// What measured latencies of a region are multiplied with.
    pub fn score(&self, id: RegionId) -> f64 {
        self.scores.get(&id).copied().filter(|score| score.is_finite() && *score > 0.0).unwrap_or(1.0)
    }
}

impl Region {
    /// The nodes that are relays, preferred ones first.
    pub fn relays(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| !node.stun_only)
    }

    /// Whether both define the same region; the order of nodes does not count.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let alike = (self.id, self.embedded, self.avoid) == (other.id, other.embedded, other.avoid)
            && (&self.code, &self.name) == (&other.code, &other.name)
            && self.nodes.len() == other.nodes.len();
        alike && by_name(&self.nodes) == by_name(&other.nodes)
    }

    fn from_proto(id: RegionId, region: &tailnet::derp_map::Region) -> Self {
        Self {
            id,
            code: region.region_code.clone(),
            name: region.region_name.clone(),
            embedded: region.embedded_relay,
            avoid: region.avoid,
            nodes: region.nodes.iter().filter_map(Node::from_proto).collect(),
        }
    }
}

impl Node {
    fn from_proto(node: &tailnet::derp_map::region::Node) -> Option<Self> {
        Some(Self {
            name: node.name.clone(),
            host_name: node.host_name.clone(),
            cert_name: Some(node.cert_name.clone()).filter(|name| !name.is_empty()),
            ipv4: NodeAddress::parse(&node.ipv4),
            ipv6: NodeAddress::parse(&node.ipv6),
            derp_port: port(node.derp_port.into(), HTTPS_PORT)?,
            stun_only: node.stun_only,
            stun_port: port(node.stun_port.into(), STUN_PORT),
            stun_test_ip: node.stun_test_ip.parse().ok(),
            force_http: node.force_http,
            insecure_for_tests: node.insecure_for_tests,
        })
    }
}

const HTTPS_PORT: u16 = 443;
const STUN_PORT: u16 = 3478;

/// 0 stands for the usual port; a STUN port of −1, and whatever else is no port, for none.
fn port(number: i64, usual: u16) -> Option<u16> {
    u16::try_from(number).ok().map(|port| if port == 0 { usual } else { port })
}

fn host_without_brackets(url: &Url) -> String {
    match url.host() {
        Some(Host::Domain(name)) => name.to_owned(),
        Some(Host::Ipv4(address)) => address.to_string(),
        Some(Host::Ipv6(address)) => address.to_string(),
        None => String::new(),
    }
}

fn by_name(nodes: &[Node]) -> BTreeMap<&str, &Node> {
    nodes.iter().map(|node| (node.name.as_str(), node)).collect()
}

#[cfg(test)]
mod tests;
