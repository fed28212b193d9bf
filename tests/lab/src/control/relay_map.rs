//! The relay map of the lab as a deployment shows it, in both of its forms (tailnet-control 1.7 and 7).

use std::net::{IpAddr, SocketAddr};

use serde_json::{Map, Value, json};
use warren_proto::tailnet::{
    DerpMap,
    derp_map::{Region, region::Node},
};

/// The region that the deployment itself serves.
pub const EMBEDDED_REGION: i64 = 999;
/// Further regions count from here, as workspace proxies do.
pub const FIRST_FURTHER_REGION: i64 = 10_001;

/// Why a relay map cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Two regions have one ID.
    #[error("two relay regions have the ID {0}; give one of them another")]
    Conflict(i64),
    /// The map is empty.
    #[error("the relay map has no regions; enable the deployment's own relay or name a map that has some")]
    NoRegions,
    /// Nothing relays packets.
    #[error("no region of the relay map has a relay, only STUN servers; add a relay")]
    NoRelays,
    /// A STUN server that is not one.
    #[error("{0:?} is not a STUN server; name it as host:port")]
    StunServer(String),
    /// A source that cannot be read.
    #[error("cannot read the relay map at {place}: {why}")]
    Unreadable {
        /// Where it should be.
        place: String,
        /// Why it is not.
        why: String,
    },
}

/// Adds regions and STUN servers to a map. Without STUN servers to name (`None`), direct connections are
/// off, and the map tells of none.
pub(crate) fn build(
    mut map: DerpMap,
    regions: Vec<Region>,
    stun: Option<&[String]>,
) -> Result<DerpMap, MapError> {
    let servers = (EMBEDDED_REGION + 1..).zip(stun.unwrap_or_default());
    let stun_regions = servers.map(|(id, server)| stun_region(id, server)).collect::<Result<Vec<_>, _>>()?;
    for region in regions.into_iter().chain(stun_regions) {
        let id = region.region_id;
        if map.regions.insert(id, region).is_some() {
            return Err(MapError::Conflict(id));
        }
    }
    if stun.is_none() {
        map.regions.values_mut().for_each(forget_stun);
    }
    if map.regions.is_empty() {
        return Err(MapError::NoRegions);
    }
    if map.regions.values().flat_map(|region| &region.nodes).all(|node| node.stun_only) {
        return Err(MapError::NoRelays);
    }
    // A real receiver crashes without home parameters.
    map.home_params.get_or_insert_default();
    Ok(map)
}

/// The region of a deployment whose embedded relay is at `embedded`, and those of further relays.
pub(crate) fn own_regions(embedded: SocketAddr, further: &[SocketAddr]) -> Vec<Region> {
    let own = Region {
        region_id: EMBEDDED_REGION,
        embedded_relay: true,
        region_code: "coder".to_owned(),
        region_name: "Coder Embedded Relay".to_owned(),
        avoid: false,
        nodes: vec![node(EMBEDDED_REGION, "b", embedded)],
    };
    let others = (FIRST_FURTHER_REGION..).zip(further).map(|(id, address)| Region {
        region_id: id,
        embedded_relay: false,
        region_code: format!("coder_lab-{id}"),
        region_name: format!("Lab {id}"),
        avoid: false,
        nodes: vec![node(id, "a", *address)],
    });
    std::iter::once(own).chain(others).collect()
}

fn stun_region(id: i64, server: &str) -> Result<Region, MapError> {
    let refuse = || MapError::StunServer(server.to_owned());
    let (host, port) = server.rsplit_once(':').ok_or_else(refuse)?;
    let port: u16 = port.parse().map_err(|_| refuse())?;
    let node = Node {
        name: format!("{id}stun0"),
        region_id: id,
        host_name: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
        stun_only: true,
        stun_port: port.into(),
        ..Node::default()
    };
    Ok(Region {
        region_id: id,
        region_code: format!("coder_stun_{id}"),
        region_name: format!("Coder STUN {id}"),
        nodes: vec![node],
        ..Region::default()
    })
}

fn forget_stun(region: &mut Region) {
    region.nodes.retain(|node| !node.stun_only);
    region.nodes.iter_mut().for_each(|node| node.stun_port = -1);
}

fn node(region: i64, suffix: &str, at: SocketAddr) -> Node {
    let (mut ipv4, mut ipv6) = (String::new(), String::new());
    match at.ip() {
        IpAddr::V4(ip) => ipv4 = ip.to_string(),
        IpAddr::V6(ip) => ipv6 = ip.to_string(),
    }
    Node {
        name: format!("{region}{suffix}"),
        region_id: region,
        host_name: at.ip().to_string(),
        ipv4,
        ipv6,
        stun_port: -1,
        derp_port: at.port().into(),
        force_http: true,
        ..Node::default()
    }
}

/// Whether a map is worth telling after another: home parameters and the order of nodes do not count
/// (tailnet-control 7.1).
pub(crate) fn differs(old: &DerpMap, new: &DerpMap) -> bool {
    let comparable = |region: &Region| {
        let mut region = region.clone();
        region.nodes.iter_mut().for_each(|node| node.can_port_80 = false);
        region.nodes.sort_by(|one, other| one.name.cmp(&other.name));
        region
    };
    let is_other = |id: &i64, region: &Region| {
        old.regions.get(id).is_none_or(|before| comparable(before) != comparable(region))
    };
    old.regions.len() != new.regions.len() || new.regions.iter().any(|(id, region)| is_other(id, region))
}

/// The JSON form: capitalised keys, what is zero left out.
pub(crate) fn json(map: &DerpMap) -> Value {
    let regions: Map<String, Value> =
        map.regions.iter().map(|(id, region)| (id.to_string(), region_json(region))).collect();
    let scores = map.home_params.as_ref().map(|home| &home.region_score).filter(|scores| !scores.is_empty());
    let mut value = json!({ "Regions": regions });
    if let Some(scores) = scores {
        let scores: Map<String, Value> =
            scores.iter().map(|(id, score)| (id.to_string(), json!(score))).collect();
        value["HomeParams"] = json!({ "RegionScore": scores });
    }
    value
}

fn region_json(region: &Region) -> Value {
    let mut value = json!({
        "EmbeddedRelay": region.embedded_relay,
        "RegionID": region.region_id,
        "RegionCode": region.region_code,
        "RegionName": region.region_name,
    });
    if region.avoid {
        value["Avoid"] = json!(true);
    }
    value["Nodes"] = region.nodes.iter().map(node_json).collect();
    value
}

fn node_json(node: &Node) -> Value {
    let mut value = json!({ "Name": node.name, "RegionID": node.region_id, "HostName": node.host_name });
    let optional = [
        ("CertName", json!(node.cert_name)),
        ("IPv4", json!(node.ipv4)),
        ("IPv6", json!(node.ipv6)),
        ("STUNPort", json!(node.stun_port)),
        ("STUNOnly", json!(node.stun_only)),
        ("DERPPort", json!(node.derp_port)),
        ("InsecureForTests", json!(node.insecure_for_tests)),
        ("ForceHTTP", json!(node.force_http)),
        ("STUNTestIP", json!(node.stun_test_ip)),
        ("CanPort80", json!(node.can_port_80)),
    ];
    for (key, field) in optional {
        if field != json!("") && field != json!(0) && field != json!(false) {
            value[key] = field;
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use warren_proto::tailnet::derp_map::HomeParams;

    use super::*;

    #[test]
    fn the_json_form_is_a_deployments() {
        let own = own_regions("127.0.0.1:45983".parse().unwrap(), &[]);
        let map = build(DerpMap::default(), own, Some(&[])).unwrap();
        let expected = json!({"Regions": {"999": {
            "EmbeddedRelay": true, "RegionID": 999, "RegionCode": "coder", "RegionName": "Coder Embedded Relay",
            "Nodes": [{"Name": "999b", "RegionID": 999, "HostName": "127.0.0.1", "IPv4": "127.0.0.1",
                       "STUNPort": -1, "DERPPort": 45983, "ForceHTTP": true}]}}});
        assert_eq!(json(&map), expected);
        assert!(map.home_params.is_some());
    }

    #[test]
    fn further_relays_are_regions_that_nobody_rewrites() {
        let regions = own_regions("127.0.0.1:1".parse().unwrap(), &["[::1]:2".parse().unwrap()]);
        let region = regions.iter().find(|region| region.region_id == FIRST_FURTHER_REGION).unwrap();
        assert!(!region.embedded_relay);
        assert_eq!((region.nodes[0].ipv6.as_str(), region.nodes[0].derp_port), ("::1", 2));
    }

    #[test]
    fn only_what_regions_and_nodes_are_makes_a_map_another_one() {
        let second = "[::1]:2".parse().unwrap();
        let old = DerpMap {
            regions: own_regions(second, &[second])
                .into_iter()
                .map(|region| (region.region_id, region))
                .collect(),
            ..DerpMap::default()
        };
        let is_told = |change: fn(&mut DerpMap)| {
            let mut new = old.clone();
            change(&mut new);
            assert_eq!(differs(&old, &new), differs(&new, &old));
            differs(&old, &new)
        };
        assert!(is_told(|map| drop(map.regions.pop_last())));
        assert!(is_told(|map| map.regions.values_mut().for_each(|region| region.avoid = true)));
        assert!(is_told(|map| map.regions.values_mut().for_each(|region| region.nodes.clear())));
        assert!(is_told(|map| map.regions.values_mut().for_each(|region| region.nodes[0].derp_port = 7)));
        assert!(!is_told(|map| map
            .regions
            .values_mut()
            .for_each(|region| region.nodes[0].can_port_80 = true)));
        assert!(!is_told(|map| map.home_params = Some(HomeParams { region_score: [(999, 0.5)].into() })));
        assert!(!is_told(|_| {}));
    }

    /// Conforms: control:D2
    #[test]
    fn each_stun_server_is_a_region_of_its_own() {
        let servers = ["stun.example.com:3478".to_owned(), "[2001:db8::1]:19302".to_owned()];
        let map = build(DerpMap::default(), own(), Some(&servers)).unwrap();
        assert_eq!(map.regions.keys().copied().collect::<Vec<_>>(), [999, 1000, 1001]);
        let node = Node {
            name: "1000stun0".to_owned(),
            region_id: 1000,
            host_name: "stun.example.com".to_owned(),
            stun_only: true,
            stun_port: 3478,
            ..Node::default()
        };
        let region = &map.regions[&1000];
        assert_eq!(
            (&region.region_code[..], &region.region_name[..]),
            ("coder_stun_1000", "Coder STUN 1000")
        );
        assert_eq!(region.nodes, [node]);
        let second = &map.regions[&1001].nodes[0];
        assert_eq!((&second.host_name[..], second.stun_port), ("2001:db8::1", 19302));
        for wrong in ["stun.example.com", "stun.example.com:stun"] {
            let refused = build(DerpMap::default(), own(), Some(&[wrong.to_owned()]));
            assert!(matches!(refused, Err(MapError::StunServer(name)) if name == wrong));
        }
    }

    /// Conforms: control:D2
    #[test]
    fn two_regions_with_one_id_are_refused() {
        for taken in [EMBEDDED_REGION, 1000] {
            let servers = ["stun.example.com:3478".to_owned()];
            let refused = build(map_of(taken, &[Node::default()]), own(), Some(&servers));
            assert!(matches!(refused, Err(MapError::Conflict(id)) if id == taken), "{refused:?}");
        }
    }

    /// Conforms: control:D2
    #[test]
    fn without_stun_only_relays_are_left_and_none_of_them_has_a_stun_port() {
        let relay = Node { name: "5a".to_owned(), stun_port: 3478, ..Node::default() };
        let map = build(map_of(5, &[relay, stun_only()]), own(), None).unwrap();
        assert_eq!(map.regions.keys().copied().collect::<Vec<_>>(), [5, EMBEDDED_REGION]);
        assert_eq!(map.regions[&5].nodes.len(), 1);
        assert!(map.regions.values().flat_map(|region| &region.nodes).all(|node| node.stun_port == -1));
    }

    /// Conforms: control:D2
    #[test]
    fn a_map_without_regions_or_without_relays_is_refused() {
        assert!(matches!(build(DerpMap::default(), vec![], Some(&[])), Err(MapError::NoRegions)));
        let stun = map_of(5, &[stun_only()]);
        assert!(matches!(build(stun.clone(), vec![], Some(&[])), Err(MapError::NoRelays)));
        assert!(matches!(build(stun, vec![], None), Err(MapError::NoRelays)));
        assert!(matches!(build(map_of(5, &[]), vec![], Some(&[])), Err(MapError::NoRelays)));
    }

    fn own() -> Vec<Region> {
        own_regions("127.0.0.1:1".parse().unwrap(), &[])
    }

    fn map_of(id: i64, nodes: &[Node]) -> DerpMap {
        let region = Region { region_id: id, nodes: nodes.to_vec(), ..Region::default() };
        DerpMap { home_params: None, regions: [(id, region)].into() }
    }

    fn stun_only() -> Node {
        Node { name: "s".to_owned(), stun_only: true, ..Node::default() }
    }
}
