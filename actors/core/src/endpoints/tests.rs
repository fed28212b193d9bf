use std::net::{Ipv6Addr, SocketAddrV4};

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::network::is_inner;

const PORTS: Ports = Ports { v4: Some(4000), v6: Some(6000) };

#[test]
fn the_list_is_in_order_ipv4_before_ipv6_each_with_its_own_sockets_port() {
    let mut it = own(&[("eth0", &["2001:db8::5", "192.168.0.7", "10.0.0.7"]), ("wlan0", &["172.16.0.1"])]);
    let now = Instant::now();
    it.handle_mappings(now, &mappings(Some("198.51.100.9:1111"), Some("[2001:db8::99]:2222")));
    let expected = [
        "198.51.100.9:1111",
        "[2001:db8::99]:2222",
        "10.0.0.7:4000",
        "172.16.0.1:4000",
        "192.168.0.7:4000",
        "[2001:db8::5]:6000",
    ];
    assert_eq!(told(&it, now), expected);
}

#[test]
fn an_address_that_is_its_own_mapping_is_told_once() {
    let mut it = own(&[("eth0", &["198.51.100.9"])]);
    let now = Instant::now();
    it.handle_mappings(now, &mappings(Some("198.51.100.9:4000"), None));
    assert_eq!(told(&it, now), ["198.51.100.9:4000"]);
}

#[test]
fn a_family_without_a_socket_has_no_interface_addresses() {
    let mut it = own(&[("eth0", &["192.168.0.7", "2001:db8::5"])]);
    it.set_ports(Ports { v4: None, ..PORTS });
    assert_eq!(told(&it, Instant::now()), ["[2001:db8::5]:6000"]);
    it.set_ports(Ports { v6: None, ..PORTS });
    assert_eq!(told(&it, Instant::now()), ["192.168.0.7:4000"]);
}

/// tailnet-data 9: what is told of these addresses where nothing is known by STUN.
#[test]
fn addresses_that_lead_nowhere_are_told_only_where_there_is_nothing_better() {
    let rows: &[(&[&str], &[&str])] = &[
        (&["fe80::1", "192.168.0.7"], &["192.168.0.7"]),
        (&["fe80::1"], &[]),
        (&["169.254.1.1", "192.168.0.7"], &["192.168.0.7"]),
        (&["169.254.1.1", "2001:db8::5"], &["2001:db8::5"]),
        (&["fd00::5", "192.168.0.7"], &["192.168.0.7"]),
        (&["fd00::5", "2001:db8::5"], &["2001:db8::5"]),
        (&["fd00::5", "169.254.1.1"], &["169.254.1.1", "fd00::5"]),
        (&["127.0.0.1", "::1", "192.168.0.7"], &["192.168.0.7"]),
        (&["127.0.0.1", "::1", "fd00::5"], &["fd00::5"]),
        (&["127.0.0.1", "::1"], &["127.0.0.1", "::1"]),
        (&["127.0.0.1", "fe80::1"], &["127.0.0.1"]),
        (&["fd60:627a:a42b::1", "192.168.0.7"], &["192.168.0.7"]),
        (&["fd7a:115c:a1e0::1"], &[]),
        (&["fd7a:115c:a1e1::1"], &["fd7a:115c:a1e1::1"]),
        (&["0.0.0.0", "224.0.0.1", "255.255.255.255", "::", "ff02::1"], &[]),
    ];
    for (addresses, expected) in rows {
        let it = own(&[("eth0", addresses)]);
        let told: Vec<String> = it.list(Instant::now()).iter().map(|it| it.ip().to_string()).collect();
        assert_eq!(told, *expected, "of {addresses:?}");
    }
}

#[test]
fn a_mapping_is_better_than_loopback_and_hides_no_other_address() {
    let now = Instant::now();
    for (address, expected) in [
        ("127.0.0.1", &["198.51.100.9:1111"][..]),
        ("169.254.1.1", &["198.51.100.9:1111", "169.254.1.1:4000"]),
    ] {
        let mut it = own(&[("eth0", &[address])]);
        it.handle_mappings(now, &mappings(Some("198.51.100.9:1111"), None));
        assert_eq!(told(&it, now), expected);
    }
}

#[test]
fn interfaces_that_are_off_those_of_another_overlay_and_inner_addresses_are_not_told() {
    let interface = |index, name: &str, is_up, address: &str| Interface {
        index,
        name: name.to_owned(),
        is_up,
        addresses: [address.parse().unwrap()].into(),
    };
    let mut it = own(&[]);
    it.set_interfaces(vec![
        interface(1, "eth0", false, "192.0.2.1"),
        interface(2, "ztabcdef", true, "192.0.2.2"),
        interface(3, "anything", true, "fd60:627a:a42b::7"),
        interface(4, "eth1", true, "192.0.2.4"),
    ]);
    assert_eq!(told(&it, Instant::now()), ["192.0.2.4:4000"]);
}

#[test]
fn a_mapping_that_is_not_seen_any_more_is_told_for_five_minutes_and_ten_seconds() {
    let (mut it, start) = (own(&[]), Instant::now());
    let (first, second) = ("198.51.100.9:1111", "198.51.100.9:2222");
    it.handle_mappings(start, &mappings(Some(first), None));
    let later = start + Duration::from_secs(25);
    it.handle_mappings(later, &mappings(Some(second), None));
    assert_eq!(told(&it, later), [second, first]);
    let end = start + Duration::from_secs(310);
    assert_eq!(told(&it, end - Duration::from_millis(1)), [second, first]);
    assert_eq!(told(&it, end), [second]);
    it.handle_timeout(end);
    it.handle_mappings(end, &Mappings::default());
    assert_eq!(told(&it, end), [second], "nobody answered, but it was so lately");
    it.handle_timeout(later + Duration::from_secs(310));
    assert_eq!(told(&it, later + Duration::from_secs(310)), Vec::<String>::new());
}

#[test]
fn a_mapping_that_comes_back_is_remembered_from_then_on() {
    let (mut it, start) = (own(&[]), Instant::now());
    let at = |seconds| start + Duration::from_secs(seconds);
    it.handle_mappings(at(0), &mappings(Some("198.51.100.9:1111"), None));
    it.handle_mappings(at(100), &mappings(Some("198.51.100.9:1111"), None));
    it.handle_mappings(at(200), &Mappings::default());
    assert_eq!(told(&it, at(409)), ["198.51.100.9:1111"]);
    assert_eq!(told(&it, at(410)), Vec::<String>::new());
}

#[test]
fn a_socket_with_another_port_has_no_mapping_yet() {
    let (mut it, now) = (own(&[]), Instant::now());
    it.handle_mappings(now, &mappings(Some("198.51.100.9:1111"), Some("[2001:db8::99]:2222")));
    it.set_ports(PORTS);
    assert_eq!(told(&it, now).len(), 2, "the same sockets");
    it.set_ports(Ports { v4: Some(4001), ..PORTS });
    assert_eq!(told(&it, now), ["[2001:db8::99]:2222"]);
}

#[test]
fn the_families_are_those_of_addresses_that_lead_anywhere() {
    let rows: &[(&[&str], bool, bool)] = &[
        (&[], false, false),
        (&["127.0.0.1", "::1", "fe80::1", "fd60:627a:a42b::1"], false, false),
        (&["192.168.0.7"], true, false),
        (&["2001:db8::5"], false, true),
        (&["169.254.1.1", "fd00::5"], true, true),
    ];
    for (addresses, v4, v6) in rows {
        assert_eq!(own(&[("eth0", addresses)]).families(), Families { v4: *v4, v6: *v6 }, "{addresses:?}");
    }
}

proptest! {
    #[test]
    fn whatever_the_machine_has_the_list_is_bounded_true_and_without_duplicates(
        interfaces in vec(any_interface(), 0..20),
        rounds in vec((any_mappings(), 0_u64..200), 0..30),
    ) {
        let (mut it, mut now) = (own(&[]), Instant::now());
        it.set_interfaces(interfaces);
        for (mappings, pause) in rounds {
            now += Duration::from_secs(pause);
            it.handle_mappings(now, &mappings);
            let list = it.list(now);
            prop_assert!(list.len() <= MAX_ENDPOINTS);
            prop_assert!(it.remembered.len() <= MAX_REMEMBERED);
            prop_assert_eq!(list.iter().collect::<BTreeSet<_>>().len(), list.len());
            let is_known = |endpoint: &SocketAddr| it.remembered.iter().any(|(seen, _)| seen == endpoint);
            for endpoint in list.iter().filter(|endpoint| !is_known(endpoint)) {
                prop_assert!(!is_inner(endpoint.ip()));
                prop_assert_eq!(Some(endpoint.port()), PORTS.of(Family::of(endpoint.ip())));
            }
        }
    }
}

fn any_interface() -> impl Strategy<Value = Interface> {
    let inner = any::<u64>()
        .prop_map(|low| IpAddr::V6(Ipv6Addr::from_bits((0xfd60_627a_a42b_u128 << 80) | u128::from(low))));
    let address =
        prop_oneof![any::<IpAddr>(), inner, (0_u8..8).prop_map(|last| IpAddr::from([10, 0, 0, last]))];
    let addresses = proptest::collection::btree_set(address, 0..8);
    (1_u32..12, "[a-z]{2}[0-9]", any::<bool>(), addresses)
        .prop_map(|(index, name, is_up, addresses)| Interface { index, name, is_up, addresses })
}

fn any_mappings() -> impl Strategy<Value = Mappings> {
    let v4 = (0_u8..3, 1_u16..20).prop_map(|(last, port)| SocketAddrV4::new([192, 0, 2, last].into(), port));
    (proptest::option::of(v4), proptest::option::of(any::<bool>()))
        .prop_map(|(v4, varies_by_destination)| Mappings { v4, v6: None, varies_by_destination })
}

/// Endpoints of a machine that has these interfaces, all on.
fn own(interfaces: &[(&str, &[&str])]) -> Endpoints {
    let interface = |(index, (name, addresses)): (u32, &(&str, &[&str]))| Interface {
        index,
        name: (*name).to_owned(),
        is_up: true,
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
    };
    let mut it = Endpoints::new();
    it.set_ports(PORTS);
    it.set_interfaces((1..).zip(interfaces).map(interface).collect());
    it
}

fn told(endpoints: &Endpoints, now: Instant) -> Vec<String> {
    endpoints.list(now).iter().map(ToString::to_string).collect()
}

fn mappings(v4: Option<&str>, v6: Option<&str>) -> Mappings {
    Mappings {
        v4: v4.map(|text| text.parse().unwrap()),
        v6: v6.map(|text| text.parse().unwrap()),
        varies_by_destination: None,
    }
}
