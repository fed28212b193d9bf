use prost::Message;
use warren_proto::tailnet::{
    DerpMap,
    derp_map::{HomeParams, Region as ProtoRegion, region::Node as ProtoNode},
};

use super::*;

#[test]
fn zero_stands_for_the_usual_ports_and_minus_one_for_no_stun() {
    /// A relay's port, and that of STUN if it has one.
    type Ports = (u16, Option<u16>);
    const ROWS: &[(i32, i32, Option<Ports>)] = &[
        (0, 0, Some((443, Some(3478)))),
        (8443, 19302, Some((8443, Some(19302)))),
        (0, -1, Some((443, None))),
        (0, 65_536, Some((443, None))),
        (65_535, -2, Some((65_535, None))),
        (-1, 0, None),
        (65_536, 0, None),
    ];
    for (derp_port, stun_port, expected) in ROWS {
        let node = ProtoNode { derp_port: *derp_port, stun_port: *stun_port, ..ProtoNode::default() };
        let read = Node::from_proto(&node).map(|node| (node.derp_port, node.stun_port));
        assert_eq!(read, *expected, "{derp_port} {stun_port}");
    }
}

#[test]
fn an_address_is_fixed_or_resolved_or_its_family_is_disabled() {
    let node = |ipv4: &str, ipv6: &str| {
        let node = ProtoNode { ipv4: ipv4.to_owned(), ipv6: ipv6.to_owned(), ..ProtoNode::default() };
        let node = Node::from_proto(&node).unwrap();
        (node.ipv4, node.ipv6)
    };
    assert_eq!(node("", ""), (NodeAddress::Resolve, NodeAddress::Resolve));
    assert_eq!(node("none", "none"), (NodeAddress::Disabled, NodeAddress::Disabled));
    let fixed = (NodeAddress::Fixed(Ipv4Addr::LOCALHOST), NodeAddress::Fixed(Ipv6Addr::LOCALHOST));
    assert_eq!(node("127.0.0.1", "::1"), fixed);
    assert_eq!(node("::1", "127.0.0.1"), (NodeAddress::Disabled, NodeAddress::Disabled), "the other family");
}

#[test]
fn what_cannot_be_used_is_left_out_and_the_rest_is_read() {
    let broken = ProtoNode { derp_port: -5, ..ProtoNode::default() };
    let fine = ProtoNode { name: "7a".to_owned(), ..ProtoNode::default() };
    let region = ProtoRegion { nodes: vec![broken, fine], ..ProtoRegion::default() };
    let numbers = [i64::MIN, -1, 0, 1, 65_535, 65_536, i64::MAX];
    let map = DerpMap { regions: numbers.map(|number| (number, region.clone())).into(), home_params: None };
    let map = RelayMap::from_proto(&map);
    assert_eq!(map.regions.keys().collect::<Vec<_>>(), [&RegionId(1), &RegionId(65_535)]);
    let nodes = &map.regions[&RegionId(1)].nodes;
    assert_eq!(nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>(), ["7a"]);
}

#[test]
fn scores_that_make_no_sense_count_as_one() {
    let scores = [(1, 0.5), (2, 0.0), (3, -1.0), (4, f64::NAN), (5, f64::INFINITY), (0, 9.0)];
    let home_params = Some(HomeParams { region_score: scores.into() });
    let map = RelayMap::from_proto(&DerpMap { regions: BTreeMap::new(), home_params });
    let read: Vec<f64> = (1..=6).map(|id| map.score(RegionId(id))).collect();
    assert_eq!(read, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]);
}

#[test]
fn only_regions_with_a_relay_are_relay_regions() {
    let mut map = map();
    map.regions.insert(RegionId(5), Region { nodes: Vec::new(), ..map.regions[&RegionId(7)].clone() });
    let ids: Vec<_> = map.relay_regions().map(|region| region.id.0).collect();
    assert_eq!(ids, [7, 999], "one has only STUN, another has no nodes");
}

/// tailnet-control 7.4.
///
/// Conforms: control:D1
#[test]
fn embedded_relays_are_where_the_deployment_is_and_all_others_stay() {
    const ROWS: &[(&str, &str, u16, bool)] = &[
        ("https://coder.example.com", "coder.example.com", 443, false),
        ("https://coder.example.com:8443/sub/", "coder.example.com", 8443, false),
        ("http://coder.example.com", "coder.example.com", 80, true),
        ("http://127.0.0.1:3000", "127.0.0.1", 3000, true),
        ("http://[2001:db8::1]:3000", "2001:db8::1", 3000, true),
        ("https://[::1]", "::1", 443, false),
    ];
    for (url, host, port, force_http) in ROWS {
        let mut rewritten = map();
        rewritten.rewrite_embedded(&url.parse().unwrap());
        let mut expected = map();
        let node = &mut expected.regions.get_mut(&RegionId(999)).unwrap().nodes[0];
        (node.host_name, node.derp_port, node.force_http) = ((*host).to_owned(), *port, *force_http);
        assert_eq!(rewritten, expected, "{url}");
        let once = rewritten.clone();
        rewritten.rewrite_embedded(&url.parse().unwrap());
        assert_eq!(rewritten, once, "again: {url}");
    }
}

/// Conforms: control:P13
#[test]
fn a_difference_names_what_was_added_changed_and_removed() {
    let old = map();
    assert!(old.difference(&map()).is_empty());
    let mut newer = map();
    newer.regions.remove(&RegionId(7));
    newer.regions.insert(RegionId(8), old.regions[&RegionId(7)].clone());
    newer.regions.get_mut(&RegionId(999)).unwrap().avoid = true;
    let ids = |id| vec![RegionId(id)];
    let difference = Difference { added: ids(8), changed: ids(999), removed: ids(7) };
    assert_eq!(old.difference(&newer), difference);
    let back = Difference { added: ids(7), changed: ids(999), removed: ids(8) };
    assert_eq!(newer.difference(&old), back);
}

/// Conforms: control:P13
#[test]
fn the_order_of_nodes_and_the_scores_are_no_difference() {
    let old = map();
    let mut newer = map();
    newer.regions.get_mut(&RegionId(999)).unwrap().nodes.reverse();
    newer.scores.insert(RegionId(7), 0.5);
    assert!(old.difference(&newer).is_empty());
}

#[test]
fn every_other_field_of_a_region_or_node_is_a_difference() {
    const REGION: &[fn(&mut Region)] = &[
        |it| it.id = RegionId(1),
        |it| it.code.push('x'),
        |it| it.name.push('x'),
        |it| it.embedded = false,
        |it| it.avoid = true,
        |it| drop(it.nodes.pop()),
        |it| it.nodes.push(Node { name: "new".to_owned(), ..Node::default() }),
        |it| it.nodes.push(it.nodes[0].clone()),
    ];
    const NODE: &[fn(&mut Node)] = &[
        |it| it.name.push('x'),
        |it| it.host_name.push('x'),
        |it| it.cert_name = Some("x".to_owned()),
        |it| it.ipv4 = NodeAddress::Disabled,
        |it| it.ipv6 = NodeAddress::Fixed(Ipv6Addr::LOCALHOST),
        |it| it.derp_port = 1,
        |it| it.stun_only = true,
        |it| it.stun_port = Some(1),
        |it| it.stun_test_ip = Some(Ipv6Addr::LOCALHOST.into()),
        |it| it.force_http = true,
        |it| it.insecure_for_tests = true,
    ];
    let region = map().regions[&RegionId(999)].clone();
    for (number, change) in REGION.iter().enumerate() {
        let mut other = region.clone();
        change(&mut other);
        assert!(!region.is_same_as(&other) && !other.is_same_as(&region), "field {number} of the region");
    }
    for (number, change) in NODE.iter().enumerate() {
        let mut other = region.clone();
        change(&mut other.nodes[0]);
        assert!(!region.is_same_as(&other) && !other.is_same_as(&region), "field {number} of the node");
    }
}

/// tailnet-control 12.8 D3.
/// Conforms: control:D3
#[test]
fn a_region_is_called_by_its_name_or_unnamed_with_its_number() {
    let map = map();
    assert_eq!(map.region_name(Some(RegionId(999))), "Coder Embedded Relay");
    assert_eq!(map.region_name(Some(RegionId(3))), "Unnamed 3");
    assert_eq!(map.region_name(None), "Unnamed 0");
}

/// Conforms: control:N11
#[test]
fn every_field_of_a_streamed_map_is_read_as_it_was_written() {
    let node = ProtoNode {
        name: "7a".to_owned(),
        region_id: 7,
        host_name: "relay.example.com".to_owned(),
        cert_name: "cert.example.com".to_owned(),
        ipv4: "192.0.2.1".to_owned(),
        ipv6: "2001:db8::1".to_owned(),
        stun_port: 19_302,
        stun_only: true,
        derp_port: 8443,
        insecure_for_tests: true,
        force_http: true,
        stun_test_ip: "192.0.2.9".to_owned(),
        can_port_80: true,
    };
    let region = ProtoRegion {
        region_id: 7,
        embedded_relay: true,
        region_code: "seven".to_owned(),
        region_name: "Seven".to_owned(),
        avoid: true,
        nodes: vec![node],
    };
    let home_params = Some(HomeParams { region_score: [(7, 0.25)].into() });
    let written = DerpMap { regions: [(7, region)].into(), home_params };
    let read = DerpMap::decode(written.encode_to_vec().as_slice()).unwrap();
    assert_eq!(read, written);
    let node = Node {
        name: "7a".to_owned(),
        host_name: "relay.example.com".to_owned(),
        cert_name: Some("cert.example.com".to_owned()),
        ipv4: NodeAddress::Fixed(Ipv4Addr::new(192, 0, 2, 1)),
        ipv6: NodeAddress::Fixed("2001:db8::1".parse().unwrap()),
        derp_port: 8443,
        stun_only: true,
        stun_port: Some(19_302),
        stun_test_ip: Some("192.0.2.9".parse().unwrap()),
        force_http: true,
        insecure_for_tests: true,
    };
    let (code, name, nodes) = ("seven".to_owned(), "Seven".to_owned(), vec![node]);
    let region = Region { id: RegionId(7), code, name, embedded: true, avoid: true, nodes };
    let expected = RelayMap { regions: [(RegionId(7), region)].into(), scores: [(RegionId(7), 0.25)].into() };
    assert_eq!(RelayMap::from_proto(&read), expected);
}

mod json {
    use super::*;

    #[test]
    fn the_connection_information_is_read_with_its_map() {
        let info = ConnectionInfo::from_json(CONNECTION.as_bytes()).unwrap();
        assert!(info.force_websockets && info.disable_direct);
        assert_eq!(info.hostname_suffix, "corp.example.com");
        assert_eq!(info.relay_map.scores, [(RegionId(999), 0.25)].into());
        let read: Vec<_> = info.relay_map.regions.keys().map(|id| id.0).collect();
        assert_eq!(read, [7, 999]);
        let other = &info.relay_map.regions[&RegionId(7)];
        assert!(other.avoid && !other.embedded);
        let relay = &info.relay_map.regions[&RegionId(999)];
        assert_eq!(
            (relay.code.as_str(), relay.name.as_str(), relay.embedded),
            ("coder", "Coder Embedded Relay", true)
        );
        let expected = Node {
            name: "999b".to_owned(),
            host_name: "coder.example.com".to_owned(),
            cert_name: Some("cert.example.com".to_owned()),
            ipv4: NodeAddress::Fixed(Ipv4Addr::LOCALHOST),
            ipv6: NodeAddress::Disabled,
            derp_port: 3000,
            stun_only: false,
            stun_port: None,
            stun_test_ip: Some(Ipv4Addr::LOCALHOST.into()),
            force_http: true,
            insecure_for_tests: true,
        };
        assert_eq!(relay.nodes, [expected]);
    }

    #[test]
    fn both_forms_of_one_map_say_the_same() {
        let node = ProtoNode {
            name: "999b".to_owned(),
            region_id: 999,
            host_name: "coder.example.com".to_owned(),
            stun_port: -1,
            derp_port: 3000,
            force_http: true,
            ..ProtoNode::default()
        };
        let region = ProtoRegion {
            region_id: 999,
            embedded_relay: true,
            region_code: "coder".to_owned(),
            region_name: "Coder Embedded Relay".to_owned(),
            nodes: vec![node],
            ..ProtoRegion::default()
        };
        let home_params = Some(HomeParams { region_score: [(999, 0.25)].into() });
        let streamed = DerpMap { regions: [(999, region)].into(), home_params };
        let text = r#"{"HomeParams":{"RegionScore":{"999":0.25}},"Regions":{"999":{"EmbeddedRelay":true,"RegionID":999,
            "RegionCode":"coder","RegionName":"Coder Embedded Relay","Nodes":[{"Name":"999b","RegionID":999,
            "HostName":"coder.example.com","STUNPort":-1,"DERPPort":3000,"ForceHTTP":true}]}}}"#;
        assert_eq!(RelayMap::from_json(text.as_bytes()).unwrap(), RelayMap::from_proto(&streamed));
    }

    #[test]
    fn keys_are_read_without_regard_to_case_and_an_exact_one_wins() {
        let text = r#"{"REGIONS":{"1":{"REGIONNAME":"wrong","RegionName":"right","regionname":"wrong",
            "nodes":[{"derpport":5}]}}}"#;
        let map = RelayMap::from_json(text.as_bytes()).unwrap();
        assert_eq!(map.region_name(Some(RegionId(1))), "right");
        assert_eq!(map.regions[&RegionId(1)].nodes[0].derp_port, 5);
    }

    #[test]
    fn a_missing_suffix_is_the_usual_one_and_dots_around_it_do_not_count() {
        let rows = [
            ("{}", "coder"),
            (r#"{"hostname_suffix":""}"#, "coder"),
            (r#"{"hostname_suffix":null}"#, "coder"),
            (r#"{"hostname_suffix":"...","derp_map":null}"#, "coder"),
            (r#"{"hostname_suffix":".dev.example."}"#, "dev.example"),
        ];
        for (text, suffix) in rows {
            let info = ConnectionInfo::from_json(text.as_bytes()).unwrap();
            assert_eq!(info.hostname_suffix, suffix, "{text}");
            assert_eq!(info.relay_map, RelayMap::default(), "{text}");
            assert!(!info.force_websockets && !info.disable_direct, "{text}");
        }
    }

    #[test]
    fn values_of_the_wrong_shape_leave_defaults() {
        let text = r#"{"Unknown":[1],"HomeParams":7,"Regions":{"x":{},"0":{},"-1":{},"70000":{},"3":null,"4":[],
            "5":{"Nodes":{"a":1},"RegionName":7},"6":{"Nodes":[null,7,{"DERPPort":"x","IPv4":7,"STUNOnly":1}]}}}"#;
        let map = RelayMap::from_json(text.as_bytes()).unwrap();
        let read: Vec<_> = map.regions.values().map(|region| (region.id.0, region.nodes.len())).collect();
        assert_eq!(read, [(5, 0), (6, 1)]);
        let usual = Node { derp_port: 443, stun_port: Some(3478), ..Node::default() };
        assert_eq!(map.regions[&RegionId(6)].nodes, [usual]);
    }

    #[test]
    fn what_is_no_json_or_no_object_is_an_error_in_words() {
        let error = |text: &str| ConnectionInfo::from_json(text.as_bytes()).unwrap_err().to_string();
        assert!(error("<html>").starts_with("not JSON: "), "{}", error("<html>"));
        assert!(error("").starts_with("not JSON: "));
        assert_eq!(error("[]"), "connection information is not an object");
        assert_eq!(error(r#"{"derp_map":7}"#), "derp_map is not an object");
        assert_eq!(RelayMap::from_json(b"null").unwrap_err().to_string(), "derp_map is not an object");
    }

    const CONNECTION: &str = r#"{
        "derp_map": {
            "HomeParams": {"RegionScore": {"999": 0.25, "x": 1}},
            "Regions": {
                "999": {
                    "EmbeddedRelay": true, "RegionID": 999, "RegionCode": "coder",
                    "RegionName": "Coder Embedded Relay", "Avoid": false,
                    "Nodes": [{
                        "Name": "999b", "RegionID": 999, "HostName": "coder.example.com",
                        "CertName": "cert.example.com", "IPv4": "127.0.0.1", "IPv6": "none", "STUNPort": -1,
                        "DERPPort": 3000, "STUNOnly": false, "InsecureForTests": true, "ForceHTTP": true,
                        "STUNTestIP": "127.0.0.1", "CanPort80": true
                    }]
                },
                "7": {"RegionName": "Other", "Avoid": true, "Nodes": null}
            }
        },
        "derp_force_websockets": true,
        "disable_direct_connections": true,
        "hostname_suffix": "corp.example.com",
        "something_new": 1
    }"#;
}

/// The deployment's own relay with a STUN-only node beside it, a STUN-only region, and somebody else's relay.
fn map() -> RelayMap {
    let node = |name: &str, stun_only| Node {
        name: name.to_owned(),
        host_name: "elsewhere.example.com".to_owned(),
        ipv4: NodeAddress::Fixed(Ipv4Addr::LOCALHOST),
        derp_port: 45_983,
        stun_only,
        insecure_for_tests: false,
        ..Node::default()
    };
    let region = |id: u16, name: &str, embedded, nodes: Vec<Node>| {
        let (code, name) = (format!("code_{id}"), name.to_owned());
        (RegionId(id), Region { id: RegionId(id), code, name, embedded, avoid: false, nodes })
    };
    let regions = [
        region(999, "Coder Embedded Relay", true, vec![node("999b", false), node("999stun0", true)]),
        region(1000, "Coder STUN 1000", false, vec![node("1000stun0", true)]),
        region(7, "Extra", false, vec![node("7a", false)]),
    ];
    RelayMap { regions: regions.into(), scores: BTreeMap::new() }
}
