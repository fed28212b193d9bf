//! Where each packet goes and what happens to it on its way: the rules, without devices.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use warren_proto::key::random;

use super::packet::{self, End, Flow, TCP, UDP};
use crate::{
    agent::faults::{Cut, Loss},
    nat::{Kind, Nat},
};

/// Translators know when a TCP connection ends; for our scenes none of them is idle for long enough.
const TCP_IDLE: Duration = Duration::from_secs(24 * 60 * 60);

/// One of the sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SiteId(usize);

/// One of the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostId(pub(super) usize);

/// What lies between a site and the world, the same each way.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// How long a packet is under way.
    pub delay: Duration,
    /// What a firewall drops without a word of what the site sends, and of what it is sent.
    pub udp: Cut,
    /// Of a hundred packets so many are lost.
    pub loss_percent: u8,
    /// With one seed always the same ones are.
    pub seed: u64,
    /// The largest packet, if that is less than what devices take.
    pub mtu: Option<Mtu>,
}

/// The largest packet that passes, its IP header included. Nobody sends a larger one on in pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mtu {
    /// Who sends a larger one is told.
    Told(usize),
    /// Larger ones vanish; TCP is kept from sending any.
    BlackHole(usize),
}

impl Mtu {
    fn bytes(self) -> usize {
        match self {
            Self::Told(bytes) | Self::BlackHole(bytes) => bytes,
        }
    }
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// It got to another site.
    Passed,
    /// It stayed within its site.
    Stayed,
    /// Lost by chance.
    Lost,
    /// Dropped by a firewall.
    Blocked,
    /// Too large for the way.
    TooLarge,
    /// Not let in by a translator, or nothing that it can translate.
    Filtered,
    /// Nobody has that address, or the sender has another one than it says.
    Unreachable,
}

/// Where a packet is to be, and when.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Onward {
    pub(super) to: HostId,
    pub(super) after: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Router {
    sites: Vec<Site>,
    hosts: Vec<Host>,
    fates: BTreeMap<Fate, u64>,
}

#[derive(Debug)]
struct Site {
    translator: Option<Translator>,
    line: Line,
    loss: Loss,
}

/// The translator of a site, for datagrams and for connections.
#[derive(Debug)]
struct Translator {
    outer: Ipv4Addr,
    udp: Nat,
    tcp: Nat,
}

impl Translator {
    fn new(kind: Kind, outer: Ipv4Addr) -> Self {
        let tcp = Nat::new(Kind::PortRestricted, outer).forgetting_after(TCP_IDLE);
        Self { outer, udp: Nat::new(kind, outer), tcp }
    }

    fn of(&mut self, protocol: u8) -> Option<&mut Nat> {
        match protocol {
            UDP => Some(&mut self.udp),
            TCP => Some(&mut self.tcp),
            _ => None,
        }
    }
}

#[derive(Debug)]
struct Host {
    site: SiteId,
    addresses: Vec<IpAddr>,
}

impl Router {
    pub(super) fn add_site(&mut self, translator: Option<(Kind, Ipv4Addr)>) -> SiteId {
        let translator = translator.map(|(kind, outer)| Translator::new(kind, outer));
        self.sites.push(Site { translator, line: Line::default(), loss: Loss::new(0, 0) });
        SiteId(self.sites.len() - 1)
    }

    pub(super) fn add_host(&mut self, site: SiteId, addresses: &[IpAddr]) -> HostId {
        self.hosts.push(Host { site, addresses: addresses.to_vec() });
        HostId(self.hosts.len() - 1)
    }

    pub(super) fn move_host(&mut self, host: HostId, site: SiteId, addresses: &[IpAddr]) {
        if let Some(host) = self.hosts.get_mut(host.0) {
            *host = Host { site, addresses: addresses.to_vec() };
        }
    }

    pub(super) fn set_line(&mut self, site: SiteId, line: Line) {
        if let Some(site) = self.sites.get_mut(site.0) {
            site.loss = Loss::new(line.loss_percent, line.seed);
            site.line = line;
        }
    }

    pub(super) fn fates(&self) -> &BTreeMap<Fate, u64> {
        &self.fates
    }

    /// Notes what a device would not take.
    pub(super) fn count(&mut self, fate: Fate) {
        *self.fates.entry(fate).or_default() += 1;
    }

    /// Takes a packet that a host has sent. It is changed to what arrives, perhaps at the sender itself.
    pub(super) fn handle_packet(
        &mut self,
        now: Instant,
        from: HostId,
        packet: &mut Vec<u8>,
    ) -> Option<Onward> {
        let outcome = self.route(now, from, packet);
        match outcome {
            Ok((fate, onward)) => {
                self.count(fate);
                Some(onward)
            }
            Err(fate) => {
                self.count(fate);
                None
            }
        }
    }

    fn route(&mut self, now: Instant, from: HostId, packet: &mut Vec<u8>) -> Result<(Fate, Onward), Fate> {
        let flow = packet::read(packet).ok_or(Fate::Unreachable)?;
        let host = self.hosts.get(from.0).filter(|host| host.addresses.contains(&flow.source.ip()));
        let here = host.ok_or(Fate::Unreachable)?.site;
        if let Some(to) = self.host_at(here, flow.destination.ip()) {
            return Ok((Fate::Stayed, Onward { to, after: Duration::ZERO }));
        }
        let there = self.site_at(flow.destination.ip()).ok_or(Fate::Unreachable)?;
        let is_cut = |site: SiteId, is_cut: fn(Cut) -> bool| {
            flow.protocol == UDP && self.sites.get(site.0).is_some_and(|site| is_cut(site.line.udp))
        };
        if is_cut(here, |udp| udp.sent) || is_cut(there, |udp| udp.received) {
            return Err(Fate::Blocked);
        }
        for site in [here, there] {
            match self.cross(site, packet) {
                Err(Obstacle::Told(message)) => {
                    *packet = message;
                    return Ok((Fate::TooLarge, Onward { to: from, after: Duration::ZERO }));
                }
                Err(Obstacle::Silent(fate)) => return Err(fate),
                Ok(()) => {}
            }
        }
        let source = self.leave(now, here, &flow, packet)?;
        let to = self.enter(now, there, &Flow { source, ..flow }, packet)?;
        let lines = [here, there].into_iter().filter_map(|site| self.sites.get(site.0));
        Ok((Fate::Passed, Onward { to, after: lines.map(|site| site.line.delay).sum() }))
    }

    /// What a site's line does to a packet, in either direction.
    fn cross(&mut self, site: SiteId, packet: &mut [u8]) -> Result<(), Obstacle> {
        let Some(Site { line, loss, .. }) = self.sites.get_mut(site.0) else { return Ok(()) };
        if let Some(mtu) = line.mtu
            && packet.len() > mtu.bytes()
        {
            let told = match mtu {
                Mtu::Told(bytes) => packet::too_big(packet, bytes),
                Mtu::BlackHole(_) => None,
            };
            return Err(told.map_or(Obstacle::Silent(Fate::TooLarge), Obstacle::Told));
        }
        if let Some(Mtu::BlackHole(bytes)) = line.mtu {
            packet::clamp_segments(packet, bytes);
        }
        if loss.strikes() { Err(Obstacle::Silent(Fate::Lost)) } else { Ok(()) }
    }

    /// Has a packet leave a site. Returns the source that the world sees.
    fn leave(
        &mut self,
        now: Instant,
        site: SiteId,
        flow: &Flow,
        packet: &mut [u8],
    ) -> Result<SocketAddr, Fate> {
        let translator = self.sites.get_mut(site.0).and_then(|site| site.translator.as_mut());
        let Some(translator) = translator.filter(|_| flow.source.is_ipv4()) else { return Ok(flow.source) };
        let nat = translator.of(flow.protocol).filter(|_| !flow.is_fragment).ok_or(Fate::Filtered)?;
        let outer = nat.leave(now, flow.source, flow.destination, || u16::from_ne_bytes(random()));
        rewritten(packet, End::Source, outer)?;
        Ok(outer)
    }

    /// Has a packet enter a site. Returns whom it is for.
    fn enter(&mut self, now: Instant, site: SiteId, flow: &Flow, packet: &mut [u8]) -> Result<HostId, Fate> {
        let translator = self.sites.get_mut(site.0).and_then(|site| site.translator.as_mut());
        let inner = match translator.filter(|_| flow.source.is_ipv4()) {
            None => flow.destination,
            Some(translator) => {
                let nat = translator.of(flow.protocol).filter(|_| !flow.is_fragment).ok_or(Fate::Filtered)?;
                let inner = nat.enter(now, flow.source, flow.destination.port()).ok_or(Fate::Filtered)?;
                rewritten(packet, End::Destination, inner)?;
                inner
            }
        };
        self.host_at(site, inner.ip()).ok_or(Fate::Unreachable)
    }

    fn host_at(&self, site: SiteId, address: IpAddr) -> Option<HostId> {
        let is_it = |host: &Host| host.site == site && host.addresses.contains(&address);
        self.hosts.iter().position(is_it).map(HostId)
    }

    /// The site that an address of the world leads to: a translator's own, or of a host without one.
    fn site_at(&self, address: IpAddr) -> Option<SiteId> {
        let is_outer =
            |site: &Site| site.translator.as_ref().is_some_and(|translator| translator.outer == address);
        if let Some(site) = self.sites.iter().position(is_outer) {
            return Some(SiteId(site));
        }
        let host = self.hosts.iter().find(|host| host.addresses.contains(&address))?;
        let is_hidden = self.sites.get(host.site.0)?.translator.is_some() && address.is_ipv4();
        (!is_hidden).then_some(host.site)
    }
}

/// Why a packet does not pass a line.
enum Obstacle {
    Silent(Fate),
    /// Its sender gets this.
    Told(Vec<u8>),
}

fn rewritten(packet: &mut [u8], end: End, to: SocketAddr) -> Result<(), Fate> {
    let SocketAddr::V4(to) = to else { return Err(Fate::Filtered) };
    packet::rewrite(packet, end, to).ok_or(Fate::Filtered)
}

#[cfg(test)]
mod tests {
    use super::{super::packet::tests::datagram, *};

    #[test]
    fn neighbours_meet_without_the_translator_and_whatever_the_line_is_like() {
        let mut town = Town::new(Kind::Symmetric);
        let neighbour = town.router.add_host(town.home, &[ip("10.0.0.3")]);
        town.line(Line { udp: Cut::BOTH, loss_percent: 100, ..Line::default() });
        let sent = datagram("10.0.0.2:5000", "10.0.0.3:6000", 100);
        let mut packet = sent.clone();
        let onward = town.router.handle_packet(Instant::now(), town.host, &mut packet);
        assert_eq!((onward, packet), (Some(Onward { to: neighbour, after: Duration::ZERO }), sent));
        assert_eq!(town.fate(), [(Fate::Stayed, 1)]);
    }

    #[test]
    fn what_leaves_is_answered_at_the_address_that_the_world_sees() {
        let mut town = Town::new(Kind::PortRestricted);
        town.line(Line { delay: Duration::from_millis(7), ..Line::default() });
        let seen = town.sends("198.51.100.1:3478").unwrap();
        assert_eq!(seen.ip(), ip("203.0.113.1"));
        let (at, to) = town.hears("198.51.100.1:3478", seen).unwrap();
        assert_eq!(
            (at, to),
            (Onward { to: town.host, after: Duration::from_millis(7) }, address("10.0.0.2:5000"))
        );
        assert_eq!(town.hears("198.51.100.1:1", seen), None);
        assert_eq!(
            town.hears("198.51.100.1:3478", address("10.0.0.2:5000")),
            None,
            "nobody has that in the world"
        );
        assert_eq!(town.fate(), [(Fate::Passed, 2), (Fate::Filtered, 1), (Fate::Unreachable, 1)]);
    }

    #[test]
    fn nobody_sends_from_an_address_that_it_has_no_more() {
        let mut town = Town::new(Kind::FullCone);
        town.router.move_host(town.host, town.home, &[ip("10.0.0.9")]);
        assert_eq!(town.sends("198.51.100.1:3478"), None);
        assert_eq!(town.fate(), [(Fate::Unreachable, 1)]);
    }

    #[test]
    fn a_firewall_drops_datagrams_either_way_and_a_bad_line_its_part_of_all() {
        let mut town = Town::new(Kind::FullCone);
        let seen = town.sends("198.51.100.1:3478").unwrap();
        let [sent, received] = [(true, false), (false, true)].map(|(sent, received)| Cut { sent, received });
        for udp in [Cut::BOTH, sent, received] {
            town.line(Line { udp, ..Line::default() });
            assert_eq!(town.sends("198.51.100.1:3478").is_none(), udp.sent, "{udp:?}");
            assert_eq!(town.hears("198.51.100.1:3478", seen).is_none(), udp.received, "{udp:?}");
        }
        assert_eq!(town.fate(), [(Fate::Passed, 3), (Fate::Blocked, 4)]);
        town.line(Line { loss_percent: 20, seed: 3, ..Line::default() });
        let passed = (0..1000).filter(|_| town.sends("198.51.100.1:3478").is_some()).count();
        assert!((750..850).contains(&passed), "{passed}");
    }

    #[test]
    fn what_is_too_large_vanishes_or_is_told_with_its_own_addresses() {
        let mut town = Town::new(Kind::FullCone);
        for (mtu, is_told) in [(Mtu::BlackHole(1300), false), (Mtu::Told(1300), true)] {
            town.line(Line { mtu: Some(mtu), ..Line::default() });
            let mut packet = datagram("10.0.0.2:5000", "198.51.100.1:3478", 1310);
            let onward = town.router.handle_packet(Instant::now(), town.host, &mut packet);
            assert_eq!(onward.map(|onward| onward.to), is_told.then_some(town.host));
            assert_eq!(packet::read(&packet).unwrap().destination.ip() == ip("10.0.0.2"), is_told);
            let mut packet = datagram("10.0.0.2:5000", "198.51.100.1:3478", 1272);
            assert!(town.router.handle_packet(Instant::now(), town.host, &mut packet).is_some());
        }
        assert_eq!(town.fate(), [(Fate::Passed, 2), (Fate::TooLarge, 2)]);
    }

    /// A host behind a translator, and one in the world.
    struct Town {
        router: Router,
        home: SiteId,
        host: HostId,
        server: HostId,
    }

    impl Town {
        fn new(kind: Kind) -> Self {
            let mut router = Router::default();
            let world = router.add_site(None);
            let home = router.add_site(Some((kind, Ipv4Addr::new(203, 0, 113, 1))));
            let server = router.add_host(world, &[ip("198.51.100.1")]);
            let host = router.add_host(home, &[ip("10.0.0.2")]);
            Self { router, home, host, server }
        }

        fn line(&mut self, line: Line) {
            self.router.set_line(self.home, line);
        }

        /// The source that the server sees.
        fn sends(&mut self, to: &str) -> Option<SocketAddr> {
            let mut packet = datagram("10.0.0.2:5000", to, 100);
            let onward = self.router.handle_packet(Instant::now(), self.host, &mut packet)?;
            assert_eq!(onward.to, self.server);
            Some(packet::read(&packet).unwrap().source)
        }

        /// Where a datagram of the server arrives.
        fn hears(&mut self, from: &str, to: SocketAddr) -> Option<(Onward, SocketAddr)> {
            let mut packet = datagram(from, &to.to_string(), 100);
            let onward = self.router.handle_packet(Instant::now(), self.server, &mut packet)?;
            Some((onward, packet::read(&packet).unwrap().destination))
        }

        fn fate(&self) -> Vec<(Fate, u64)> {
            self.router.fates().clone().into_iter().collect()
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }
}
