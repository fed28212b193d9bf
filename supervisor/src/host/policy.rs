//! What our own tunnel may ask of the host: an address and routes inside the Coder prefix, and a sane MTU.
//! The process that parses the internet's packets may be taken over; the host must not be taken with it.

use std::net::Ipv6Addr;

use warren_actors::facts::InterfaceConfig;
use warren_proto::{
    address::{CODER_DNS, CODER_PREFIX, is_coder},
    vpn::{
        NetworkSettingsRequest,
        network_settings_request::{DnsSettings, IPv6Settings, i_pv6_settings::IPv6Route},
    },
};

/// The one length of our own address.
const ADDRESS_BITS: u32 = 128;
/// The MTU where none was asked for: the least that IPv6 allows, and what agents use.
const MTU: u32 = 1280;
/// The MTUs a tunnel over the internet can have.
const MTUS: std::ops::RangeInclusive<u32> = 1280..=1500;
/// Routes that may be asked for: one is what a tunnel needs.
const MAX_ROUTES: usize = 16;
/// The suffix of names that may be sent to the tunnel's resolver.
const SUFFIX: &str = "coder";

/// What was wrong with a request, in words for whoever reads the tunnel's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("network settings refused: IPv4 settings are not allowed")]
    Ipv4,
    #[error(
        "network settings refused: {count} addresses with {lengths} prefix lengths, where one of each is allowed"
    )]
    Addresses { count: usize, lengths: usize },
    #[error("network settings refused: {0:?} is no IPv6 address")]
    NoAddress(String),
    #[error("network settings refused: the address {0} is outside of {CODER_PREFIX}")]
    ForeignAddress(Ipv6Addr),
    #[error("network settings refused: the address {0} is the resolver's")]
    Resolver(Ipv6Addr),
    #[error(
        "network settings refused: the address has a prefix of {0} bits, where {ADDRESS_BITS} are allowed"
    )]
    AddressBits(u32),
    #[error("network settings refused: routes without an address")]
    RoutesOnly,
    #[error(
        "network settings refused: the route {destination}/{bits} is outside of {CODER_PREFIX}, or is no prefix"
    )]
    Route { destination: String, bits: u32 },
    #[error("network settings refused: {0} routes, where at most {MAX_ROUTES} are allowed")]
    Routes(usize),
    #[error("network settings refused: the route {0} has a router, or is to be excluded")]
    Routed(String),
    #[error("network settings refused: an MTU of {0} bytes, where {least} to {most} are allowed", least = MTUS.start(), most = MTUS.end())]
    Mtu(u32),
    #[error("network settings refused: the DNS server {0:?} is not {CODER_DNS}")]
    DnsServer(String),
    #[error("network settings refused: DNS names under {0:?}, where only {SUFFIX:?} is allowed")]
    DnsDomain(String),
    #[error(
        "network settings refused: this service does not set the host's DNS; reach agents by their addresses"
    )]
    DnsAbsent,
}

/// What the interface should look like after `request`: what it leaves out stays as it is. `None` if nothing
/// is to be set.
pub(super) fn judge(
    request: &NetworkSettingsRequest,
    present: Option<&InterfaceConfig>,
) -> Result<Option<InterfaceConfig>, Refusal> {
    if request.ipv4_settings.is_some() {
        return Err(Refusal::Ipv4);
    }
    request.dns_settings.as_ref().map_or(Ok(()), judge_dns)?;
    let mtu = match request.mtu {
        0 => present.map_or(MTU, |present| present.mtu),
        mtu if MTUS.contains(&mtu) => mtu,
        mtu => return Err(Refusal::Mtu(mtu)),
    };
    let (address, routes) = match (&request.ipv6_settings, present) {
        (Some(settings), _) => (address(settings)?, routes(settings)?),
        (None, Some(present)) => (present.address, present.routes.clone()),
        (None, None) => return Ok(None),
    };
    Ok(Some(InterfaceConfig { address, routes, mtu }))
}

fn address(settings: &IPv6Settings) -> Result<Ipv6Addr, Refusal> {
    let ([text], [bits]) = (&settings.addrs[..], &settings.prefix_lengths[..]) else {
        let (count, lengths) = (settings.addrs.len(), settings.prefix_lengths.len());
        let has_routes_only = count == 0 && lengths == 0 && !settings.included_routes.is_empty();
        return Err(if has_routes_only {
            Refusal::RoutesOnly
        } else {
            Refusal::Addresses { count, lengths }
        });
    };
    let address: Ipv6Addr = text.parse().map_err(|_| Refusal::NoAddress(shown(text)))?;
    match address {
        CODER_DNS => Err(Refusal::Resolver(address)),
        address if !is_coder(&address) => Err(Refusal::ForeignAddress(address)),
        address if *bits == ADDRESS_BITS => Ok(address),
        _ => Err(Refusal::AddressBits(*bits)),
    }
}

fn routes(settings: &IPv6Settings) -> Result<Vec<(Ipv6Addr, u8)>, Refusal> {
    if let Some(excluded) = settings.excluded_routes.first() {
        return Err(Refusal::Routed(shown(&excluded.destination)));
    }
    let count = settings.included_routes.len();
    if count > MAX_ROUTES {
        return Err(Refusal::Routes(count));
    }
    settings.included_routes.iter().map(route).collect()
}

fn route(route: &IPv6Route) -> Result<(Ipv6Addr, u8), Refusal> {
    let refused = || Refusal::Route { destination: shown(&route.destination), bits: route.prefix_length };
    if !route.router.is_empty() {
        return Err(Refusal::Routed(shown(&route.destination)));
    }
    let destination: Ipv6Addr = route.destination.parse().map_err(|_| refused())?;
    let bits = u8::try_from(route.prefix_length).map_err(|_| refused())?;
    let is_inside = is_coder(&destination) && (CODER_PREFIX.bits()..=128).contains(&bits);
    if is_inside && is_prefix(destination, bits) { Ok((destination, bits)) } else { Err(refused()) }
}

/// Whether nothing is set beyond the prefix: the kernel takes no other route.
fn is_prefix(destination: Ipv6Addr, bits: u8) -> bool {
    let host_bits = u128::MAX.checked_shr(u32::from(bits)).unwrap_or(0);
    destination.to_bits() & host_bits == 0
}

/// A request that sets nothing is allowed; deployed tunnels begin with one.
fn judge_dns(settings: &DnsSettings) -> Result<(), Refusal> {
    let is_resolver = |server: &&String| server.parse() == Ok(CODER_DNS);
    if let Some(server) = settings.servers.iter().find(|server| !is_resolver(server)) {
        return Err(Refusal::DnsServer(shown(server)));
    }
    let mut domains = settings.match_domains.iter().chain(&settings.search_domains);
    if let Some(domain) = domains.find(|domain| domain.trim_end_matches('.') != SUFFIX) {
        return Err(Refusal::DnsDomain(shown(domain)));
    }
    let is_empty = settings.servers.is_empty()
        && settings.match_domains.is_empty()
        && settings.search_domains.is_empty();
    if is_empty { Ok(()) } else { Err(Refusal::DnsAbsent) }
}

/// What may be shown of a text that is hostile.
fn shown(text: &str) -> String {
    const LONGEST: usize = 64;
    text.chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use warren_proto::vpn::network_settings_request::IPv4Settings;

    use super::*;

    const OURS: &str = "fd60:627a:a42b:1:2:3:4:5";

    fn settings(address: &str, bits: u32, routes: &[(&str, u32)]) -> IPv6Settings {
        let route = |(destination, length): &(&str, u32)| IPv6Route {
            destination: (*destination).to_owned(),
            prefix_length: *length,
            router: String::new(),
        };
        IPv6Settings {
            addrs: vec![address.to_owned()],
            prefix_lengths: vec![bits],
            included_routes: routes.iter().map(route).collect(),
            excluded_routes: Vec::new(),
        }
    }

    fn asking(ipv6: IPv6Settings) -> NetworkSettingsRequest {
        NetworkSettingsRequest { ipv6_settings: Some(ipv6), ..Default::default() }
    }

    fn usual() -> InterfaceConfig {
        InterfaceConfig {
            address: OURS.parse().unwrap(),
            routes: vec![("fd60:627a:a42b::".parse().unwrap(), 48)],
            mtu: 1280,
        }
    }

    #[test]
    fn what_a_tunnel_needs_is_allowed() {
        let request = asking(settings(OURS, 128, &[("fd60:627a:a42b::", 48)]));
        assert_eq!(judge(&request, None), Ok(Some(usual())));
    }

    #[test]
    fn what_a_request_leaves_out_stays_as_it_is() {
        let present = usual();
        let mtu_only = NetworkSettingsRequest { mtu: 1400, ..Default::default() };
        assert_eq!(judge(&mtu_only, Some(&present)), Ok(Some(InterfaceConfig { mtu: 1400, ..usual() })));
        assert_eq!(judge(&mtu_only, None), Ok(None));
        let other = asking(settings("fd60:627a:a42b::9", 128, &[]));
        let present = InterfaceConfig { mtu: 1400, ..usual() };
        assert_eq!(judge(&other, Some(&present)).unwrap().unwrap().mtu, 1400);
    }

    #[test]
    fn whatever_leaves_the_prefix_is_refused_and_named() {
        let route = |destination: &str, bits| asking(settings(OURS, 128, &[(destination, bits)]));
        for (request, words) in [
            (asking(settings("fd7a:115c:a1e0::1", 128, &[])), "fd7a:115c:a1e0::1 is outside"),
            (asking(settings("2001:db8::1", 128, &[])), "2001:db8::1 is outside"),
            (asking(settings("fd60:627a:a42b::53", 128, &[])), "the resolver's"),
            (asking(settings("10.0.0.1", 32, &[])), "\"10.0.0.1\" is no IPv6 address"),
            (asking(settings(OURS, 64, &[])), "64 bits"),
            (route("::", 0), "::/0 is outside"),
            (route("fd60:627a:a42b::", 47), "/47 is outside"),
            (route("fd60:627a:a42c::", 48), "fd60:627a:a42c::/48 is outside"),
            (route("fd60:627a:a42b::1", 48), "is no prefix"),
            (route("fd60:627a:a42b::", 300), "/300"),
            (route("everything", 48), "everything/48"),
        ] {
            let text = judge(&request, None).unwrap_err().to_string();
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn routers_exclusions_and_crowds_are_refused() {
        let mut routed = settings(OURS, 128, &[("fd60:627a:a42b::", 48)]);
        routed.included_routes[0].router = "fe80::1".to_owned();
        let mut excluding = settings(OURS, 128, &[]);
        excluding.excluded_routes = settings(OURS, 128, &[("fd60:627a:a42b::", 48)]).included_routes;
        let crowd = settings(OURS, 128, &[("fd60:627a:a42b::", 48); MAX_ROUTES + 1]);
        let mut two = settings(OURS, 128, &[]);
        two.addrs.push("fd60:627a:a42b::2".to_owned());
        let unpaired = IPv6Settings { prefix_lengths: Vec::new(), ..settings(OURS, 128, &[]) };
        let mut homeless = settings(OURS, 128, &[("fd60:627a:a42b::", 48)]);
        (homeless.addrs, homeless.prefix_lengths) = (Vec::new(), Vec::new());
        for request in [routed, excluding, crowd, two, unpaired, homeless] {
            assert!(judge(&asking(request.clone()), None).is_err(), "{request:?}");
        }
    }

    #[test]
    fn ipv4_is_refused() {
        let request =
            NetworkSettingsRequest { ipv4_settings: Some(IPv4Settings::default()), ..Default::default() };
        assert_eq!(judge(&request, None), Err(Refusal::Ipv4));
    }

    #[test]
    fn only_the_mtu_of_a_tunnel_is_allowed() {
        for (mtu, is_allowed) in [(1279, false), (1280, true), (1500, true), (1501, false), (u32::MAX, false)]
        {
            let request = NetworkSettingsRequest { mtu, ..asking(settings(OURS, 128, &[])) };
            assert_eq!(judge(&request, None).is_ok(), is_allowed, "{mtu}");
        }
    }

    #[test]
    fn dns_is_for_the_resolver_and_the_suffix_only_and_its_absence_is_said() {
        let dns = |servers: &[&str], domains: &[&str]| {
            let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
            let settings = DnsSettings {
                servers: owned(servers),
                match_domains: owned(domains),
                domain_name: "coder".into(),
                ..Default::default()
            };
            let request = NetworkSettingsRequest { dns_settings: Some(settings), ..Default::default() };
            judge(&request, None)
        };
        assert_eq!(dns(&[], &[]), Ok(None));
        assert_eq!(dns(&["8.8.8.8"], &[]), Err(Refusal::DnsServer("8.8.8.8".into())));
        assert_eq!(dns(&["fd60:627a:a42b::53"], &["com"]), Err(Refusal::DnsDomain("com".into())));
        assert_eq!(dns(&["fd60:627a:a42b::53"], &["coder"]), Err(Refusal::DnsAbsent));
    }
}
