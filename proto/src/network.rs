//! What a tunnel asks of a manager that owns the network (vpn-protocol 9.1), from addresses and names to the
//! message: split by family, with masks for IPv4, and nothing said of a family that has nothing.

use std::net::{IpAddr, Ipv4Addr};

use crate::vpn::{
    NetworkSettingsRequest,
    network_settings_request::{
        DnsSettings, IPv4Settings, IPv6Settings, i_pv4_settings::IPv4Route, i_pv6_settings::IPv6Route,
    },
};

/// The domain that managers are told whatever the suffix is.
const DOMAIN: &str = "coder";

/// An address or network and the length of its prefix.
pub type Prefix = (IpAddr, u8);

/// Addresses and routes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Router {
    /// Bytes of the largest packet; 0 leaves it as it is.
    pub mtu: u32,
    /// The device's own.
    pub addresses: Vec<Prefix>,
    /// What goes through the device.
    pub included: Vec<Prefix>,
    /// What does not, although a larger included route holds it.
    pub excluded: Vec<Prefix>,
}

/// Names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Who answers.
    pub servers: Vec<IpAddr>,
    /// What is tried behind a short name, with or without its last dot.
    pub search: Vec<String>,
    /// What only these servers are asked for, with or without its last dot.
    pub matched: Vec<String>,
}

impl From<&Router> for NetworkSettingsRequest {
    fn from(router: &Router) -> Self {
        Self { mtu: router.mtu, ipv4_settings: ipv4(router), ipv6_settings: ipv6(router), ..Self::default() }
    }
}

impl From<&Dns> for NetworkSettingsRequest {
    fn from(dns: &Dns) -> Self {
        let names = |names: &[String]| {
            names.iter().map(|name| name.strip_suffix('.').unwrap_or(name).to_owned()).collect()
        };
        let settings = DnsSettings {
            servers: dns.servers.iter().map(IpAddr::to_string).collect(),
            search_domains: names(&dns.search),
            domain_name: DOMAIN.to_owned(),
            match_domains: names(&dns.matched),
            match_domains_no_search: false,
        };
        Self { dns_settings: Some(settings), ..Self::default() }
    }
}

fn ipv4(router: &Router) -> Option<IPv4Settings> {
    let route = |(network, length)| IPv4Route {
        destination: Ipv4Addr::to_string(&network),
        mask: mask(length),
        router: String::new(),
    };
    let addresses = of_ipv4(&router.addresses);
    let settings = IPv4Settings {
        addrs: addresses.iter().map(|(address, _)| address.to_string()).collect(),
        subnet_masks: addresses.iter().map(|(_, length)| mask(*length)).collect(),
        router: String::new(),
        included_routes: of_ipv4(&router.included).into_iter().map(route).collect(),
        excluded_routes: of_ipv4(&router.excluded).into_iter().map(route).collect(),
    };
    (settings != IPv4Settings::default()).then_some(settings)
}

fn ipv6(router: &Router) -> Option<IPv6Settings> {
    let is_ipv6 = |prefix: &&Prefix| prefix.0.is_ipv6();
    let routes = |prefixes: &[Prefix]| {
        let route = |(network, length): &Prefix| IPv6Route {
            destination: network.to_string(),
            prefix_length: u32::from(*length),
            router: String::new(),
        };
        prefixes.iter().filter(is_ipv6).map(route).collect()
    };
    let addresses = router.addresses.iter().filter(is_ipv6);
    let settings = IPv6Settings {
        addrs: addresses.clone().map(|(address, _)| address.to_string()).collect(),
        prefix_lengths: addresses.map(|(_, length)| u32::from(*length)).collect(),
        included_routes: routes(&router.included),
        excluded_routes: routes(&router.excluded),
    };
    (settings != IPv6Settings::default()).then_some(settings)
}

fn of_ipv4(prefixes: &[Prefix]) -> Vec<(Ipv4Addr, u8)> {
    let of_family = |(network, length): &Prefix| match network {
        IpAddr::V4(network) => Some((*network, *length)),
        IpAddr::V6(_) => None,
    };
    prefixes.iter().filter_map(of_family).collect()
}

/// A dotted quad with so many leading ones.
fn mask(length: u8) -> String {
    let zeros = 32_u32.saturating_sub(u32::from(length));
    Ipv4Addr::from(u32::MAX.checked_shl(zeros).unwrap_or(0)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        let (network, length) = text.split_once('/').unwrap();
        (network.parse().unwrap(), length.parse().unwrap())
    }

    fn ipv4_route(destination: &str, mask: &str) -> IPv4Route {
        IPv4Route { destination: destination.into(), mask: mask.into(), router: String::new() }
    }

    fn ipv6_route(destination: &str, prefix_length: u32) -> IPv6Route {
        IPv6Route { destination: destination.into(), prefix_length, router: String::new() }
    }

    /// Conforms: vpn:N1
    #[test]
    fn addresses_and_routes_are_split_by_family_and_routers_stay_empty() {
        let router = Router {
            mtu: 1500,
            addresses: ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"].map(prefix).into(),
            included: ["192.168.0.0/24", "fd00::/64"].map(prefix).into(),
            excluded: ["10.0.0.0/8", "2001:db8::/32"].map(prefix).into(),
        };
        let expected = NetworkSettingsRequest {
            mtu: 1500,
            ipv4_settings: Some(IPv4Settings {
                addrs: vec!["100.64.0.1".into()],
                subnet_masks: vec!["255.255.255.255".into()],
                router: String::new(),
                included_routes: vec![ipv4_route("192.168.0.0", "255.255.255.0")],
                excluded_routes: vec![ipv4_route("10.0.0.0", "255.0.0.0")],
            }),
            ipv6_settings: Some(IPv6Settings {
                addrs: vec!["fd7a:115c:a1e0::1".into()],
                prefix_lengths: vec![128],
                included_routes: vec![ipv6_route("fd00::", 64)],
                excluded_routes: vec![ipv6_route("2001:db8::", 32)],
            }),
            ..NetworkSettingsRequest::default()
        };
        assert_eq!(NetworkSettingsRequest::from(&router), expected);
        assert_eq!(mask(0), "0.0.0.0");
    }

    /// Conforms: vpn:N2
    #[test]
    fn a_family_without_anything_is_not_mentioned() {
        assert_eq!(NetworkSettingsRequest::from(&Router::default()), NetworkSettingsRequest::default());
        let one = Router { excluded: vec![prefix("10.0.0.0/8")], ..Router::default() };
        let request = NetworkSettingsRequest::from(&one);
        assert!(request.ipv4_settings.is_some() && request.ipv6_settings.is_none());
    }

    /// Conforms: vpn:N3
    #[test]
    fn names_lose_their_last_dot_and_the_domain_is_always_the_same() {
        let dns = Dns {
            servers: vec!["fd60:627a:a42b::53".parse().unwrap(), "1.1.1.1".parse().unwrap()],
            search: vec!["example.com.".into(), "test.local".into()],
            matched: vec!["internal.domain.".into()],
        };
        let expected = DnsSettings {
            servers: vec!["fd60:627a:a42b::53".into(), "1.1.1.1".into()],
            search_domains: vec!["example.com".into(), "test.local".into()],
            domain_name: "coder".into(),
            match_domains: vec!["internal.domain".into()],
            match_domains_no_search: false,
        };
        let request = NetworkSettingsRequest { dns_settings: Some(expected), ..Default::default() };
        assert_eq!(NetworkSettingsRequest::from(&dns), request);
    }

    /// Conforms: vpn:N4
    #[test]
    fn without_names_there_is_still_the_domain() {
        let dns_settings = Some(DnsSettings { domain_name: "coder".into(), ..Default::default() });
        let expected = NetworkSettingsRequest { dns_settings, ..Default::default() };
        assert_eq!(NetworkSettingsRequest::from(&Dns::default()), expected);
    }
}
