//! The relay map of the lab as a deployment shows it, in both of its forms (tailnet-control 1.7 and 7).

use std::net::{IpAddr, SocketAddr};

use serde_json::{Map, Value, json};
use warren_proto::tailnet::{
    DerpMap,
    derp_map::{HomeParams, Region, region::Node},
};

/// The region that the deployment itself serves.
pub const EMBEDDED_REGION: i64 = 999;
/// Further regions count from here, as workspace proxies do.
pub const FIRST_FURTHER_REGION: i64 = 10_001;

/// The map of a deployment whose embedded relay is at `embedded`, with further relays beside it.
pub(crate) fn build(embedded: SocketAddr, further: &[SocketAddr]) -> DerpMap {
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
    let regions = std::iter::once(own).chain(others).map(|region| (region.region_id, region)).collect();
    // A real receiver crashes without home parameters.
    DerpMap { home_params: Some(HomeParams::default()), regions }
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
    use super::*;

    #[test]
    fn the_json_form_is_a_deployments() {
        let map = build("127.0.0.1:45983".parse().unwrap(), &[]);
        let expected = json!({"Regions": {"999": {
            "EmbeddedRelay": true, "RegionID": 999, "RegionCode": "coder", "RegionName": "Coder Embedded Relay",
            "Nodes": [{"Name": "999b", "RegionID": 999, "HostName": "127.0.0.1", "IPv4": "127.0.0.1",
                       "STUNPort": -1, "DERPPort": 45983, "ForceHTTP": true}]}}});
        assert_eq!(json(&map), expected);
        assert!(map.home_params.is_some());
    }

    #[test]
    fn further_relays_are_regions_that_nobody_rewrites() {
        let map = build("127.0.0.1:1".parse().unwrap(), &["[::1]:2".parse().unwrap()]);
        let region = &map.regions[&FIRST_FURTHER_REGION];
        assert!(!region.embedded_relay);
        assert_eq!((region.nodes[0].ipv6.as_str(), region.nodes[0].derp_port), ("::1", 2));
    }
}
