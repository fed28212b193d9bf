//! A network of sites on a virtual clock: each has a router, perhaps with a translator, and hosts behind it.
//!
//! ```text
//! host 10.0.1.2 ─┐                                       ┌─ host 2001:db8:2::2
//!                ├─ site 1, 203.0.113.1 ── the world ── site 2
//! host 10.0.1.3 ─┘        conditions          conditions └─ host 10.0.2.2
//! ```
//! A datagram meets the conditions of its sender's site on its way out and those of its receiver's site on its
//! way in. Within a site nothing goes wrong. What becomes of each datagram is counted.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::SmallRng};

use warren_lab::nat::{Kind, Nat};
use warren_proto::disco::PADDED;

/// Bytes of IP and UDP headers, by family.
const HEADERS: [usize; 2] = [28, 48];

/// What happens to datagrams between a site and the world.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Conditions {
    /// Nothing gets out.
    pub(crate) is_cut_out: bool,
    /// Nothing gets in.
    pub(crate) is_cut_in: bool,
    /// There is no route for UDP, which hosts are told when they send.
    pub(crate) has_no_route: bool,
    /// Of a thousand datagrams so many are lost, each way.
    pub(crate) loss: u32,
    /// Of a thousand datagrams so many come twice.
    pub(crate) duplicates: u32,
    /// How long one is under way, each way.
    pub(crate) delay: Duration,
    /// By how much more at most; more than the pause between two reorders them.
    pub(crate) jitter: Duration,
    /// The largest packet, IP header included.
    pub(crate) mtu: usize,
}

impl Default for Conditions {
    fn default() -> Self {
        Self {
            is_cut_out: false,
            is_cut_in: false,
            has_no_route: false,
            loss: 0,
            duplicates: 0,
            delay: Duration::from_millis(5),
            jitter: Duration::ZERO,
            mtu: 1500,
        }
    }
}

/// Why a datagram did not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fate {
    /// By chance.
    Lost,
    /// The site was cut off.
    Cut,
    /// It was too large for the way.
    TooLarge,
    /// A translator did not let it in.
    Filtered,
    /// Nobody has that address, or not the sender the family.
    Unreachable,
}

/// One of the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HostId(pub(crate) usize);

/// A datagram that has arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Arrival<P> {
    /// At whom.
    pub(crate) at: HostId,
    /// At which of its addresses.
    pub(crate) to: SocketAddr,
    /// From where, as it looks there.
    pub(crate) from: SocketAddr,
    /// What it says.
    pub(crate) payload: P,
}

/// The network.
pub(crate) struct Network<P> {
    chance: SmallRng,
    sites: Vec<Site>,
    hosts: Vec<Host>,
    flights: BinaryHeap<Reverse<Flight>>,
    payloads: BTreeMap<u64, P>,
    count: u64,
    ended: Vec<(Fate, P)>,
}

struct Site {
    nat: Option<Nat>,
    outer: Ipv4Addr,
    conditions: Conditions,
}

struct Host {
    site: usize,
    addresses: Vec<IpAddr>,
}

/// Ordered by the moment of arrival, then by the order of sending.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Flight {
    due: Instant,
    number: u64,
    from: SocketAddr,
    to: SocketAddr,
    /// Whether it stays within its site.
    site: Option<usize>,
}

impl<P: Clone> Network<P> {
    /// An empty one, whose chance is that of `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            chance: SmallRng::seed_from_u64(seed),
            sites: Vec::new(),
            hosts: Vec::new(),
            flights: BinaryHeap::new(),
            payloads: BTreeMap::new(),
            count: 0,
            ended: Vec::new(),
        }
    }

    /// Adds a site; without a translator its hosts have addresses of the world.
    pub(crate) fn add_site(&mut self, nat: Option<Kind>) -> usize {
        let site = self.sites.len();
        let outer = Ipv4Addr::new(203, 0, 113, number(site + 1));
        let nat = nat.map(|kind| Nat::new(kind, outer));
        self.sites.push(Site { nat, outer, conditions: Conditions::default() });
        site
    }

    /// Adds a host to a site, with the families that it speaks.
    pub(crate) fn add_host(&mut self, site: usize, families: Families) -> HostId {
        let place = 2 + self.hosts.iter().filter(|host| host.site == site).count();
        let v4 = match self.sites[site].nat {
            Some(_) => Ipv4Addr::new(10, 0, number(site + 1), number(place)),
            None => Ipv4Addr::new(198, 51, number(100 + site), number(place)),
        };
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, site as u16 + 1, 0, 0, 0, 0, place as u16);
        let addresses = match families {
            Families::V4 => vec![v4.into()],
            Families::V6 => vec![v6.into()],
            Families::Both => vec![v4.into(), v6.into()],
        };
        self.hosts.push(Host { site, addresses });
        HostId(self.hosts.len() - 1)
    }

    /// The addresses of a host as it sees them itself.
    pub(crate) fn addresses(&self, host: HostId) -> &[IpAddr] {
        &self.hosts[host.0].addresses
    }

    /// The site of a host.
    pub(crate) fn site_of(&self, host: HostId) -> usize {
        self.hosts[host.0].site
    }

    /// What happens at the edge of a site.
    pub(crate) fn conditions(&mut self, site: usize) -> &mut Conditions {
        &mut self.sites[site].conditions
    }

    /// Who would get the largest probe that a host sent now, by chance or always: at which address of his, and from where
    /// as he would see it.
    pub(crate) fn reached(
        &self,
        now: Instant,
        host: HostId,
        port: u16,
        to: SocketAddr,
    ) -> Option<(HostId, SocketAddr, SocketAddr)> {
        let Host { site, addresses } = &self.hosts[host.0];
        let own = addresses.iter().find(|own| own.is_ipv4() == to.is_ipv4())?;
        let inner = SocketAddr::new(*own, port);
        if let Some(at) = self.host_in(Some(*site), to.ip()) {
            return Some((at, to, inner));
        }
        let (here, target) = (&self.sites[*site], self.site_at(to.ip())?);
        let there = &self.sites[target];
        let is_open = !here.conditions.is_cut_out && !there.conditions.is_cut_in;
        let has_routes = !here.conditions.has_no_route && !there.conditions.has_no_route;
        let length = PADDED + HEADERS[usize::from(to.is_ipv6())];
        if !is_open || !has_routes || length > here.conditions.mtu.min(there.conditions.mtu) {
            return None;
        }
        // Translators take no notice.
        let (from, to) = match to {
            SocketAddr::V6(_) => (inner, to),
            SocketAddr::V4(_) => {
                let from = here.nat.clone().map_or(inner, |mut nat| nat.leave(now, inner, to, || u16::MAX));
                (from, there.nat.clone().map_or(Some(to), |mut nat| nat.enter(now, from, to.port()))?)
            }
        };
        Some((self.host_in(Some(target), to.ip())?, to, from))
    }

    /// Has a site's translator forget what it knows.
    pub(crate) fn restart_nat(&mut self, site: usize) {
        if let Some(nat) = &mut self.sites[site].nat {
            nat.restart();
        }
    }

    /// Those that did not arrive since this was asked last.
    pub(crate) fn take_ended(&mut self) -> Vec<(Fate, P)> {
        std::mem::take(&mut self.ended)
    }

    /// A host sends `length` bytes from one of its ports. Returns whether it may: otherwise it knows of no way there.
    pub(crate) fn send(
        &mut self,
        now: Instant,
        host: HostId,
        port: u16,
        to: SocketAddr,
        length: usize,
        payload: P,
    ) -> bool {
        let Host { site, addresses } = &self.hosts[host.0];
        let site = *site;
        let own = addresses.iter().find(|own| own.is_ipv4() == to.is_ipv4()).copied();
        let is_near = self.host_in(Some(site), to.ip()).is_some();
        let own = own.filter(|_| is_near || !self.sites[site].conditions.has_no_route);
        let Some(own) = own else {
            self.end(Fate::Unreachable, payload);
            return false;
        };
        let inner = SocketAddr::new(own, port);
        if is_near {
            self.fly(now, inner, to, Some(site), payload);
        } else {
            self.leave(now, site, inner, to, length, payload);
        }
        true
    }

    fn leave(
        &mut self,
        now: Instant,
        site: usize,
        inner: SocketAddr,
        to: SocketAddr,
        length: usize,
        payload: P,
    ) {
        let chance = &mut self.chance;
        let from = match &mut self.sites[site].nat {
            Some(nat) if to.is_ipv4() => nat.leave(now, inner, to, || chance.random()),
            _ => inner,
        };
        let conditions = self.sites[site].conditions;
        if conditions.is_cut_out {
            return self.end(Fate::Cut, payload);
        }
        if length + HEADERS[usize::from(to.is_ipv6())] > conditions.mtu {
            return self.end(Fate::TooLarge, payload);
        }
        if self.happens(conditions.loss) {
            return self.end(Fate::Lost, payload);
        }
        let Some(target) = self.site_at(to.ip()) else { return self.end(Fate::Unreachable, payload) };
        let there = self.sites[target].conditions;
        if length + HEADERS[usize::from(to.is_ipv6())] > there.mtu {
            return self.end(Fate::TooLarge, payload);
        }
        let copies = if self.happens(conditions.duplicates) { 2 } else { 1 };
        for _ in 0..copies {
            let jitter = conditions.jitter + there.jitter;
            let jitter = jitter.mul_f64(self.chance.random());
            self.fly(now + conditions.delay + there.delay + jitter, from, to, None, payload.clone());
        }
    }

    /// When the next datagram arrives.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.flights.peek().map(|Reverse(flight)| flight.due)
    }

    /// The next datagram that has arrived by `now`; those that do not get in are left out.
    pub(crate) fn poll_arrival(&mut self, now: Instant) -> Option<Arrival<P>> {
        loop {
            self.flights.peek().filter(|Reverse(flight)| flight.due <= now)?;
            let Reverse(flight) = self.flights.pop()?;
            let payload = self.payloads.remove(&flight.number)?;
            match self.land(&flight) {
                Ok((at, to)) => return Some(Arrival { at, to, from: flight.from, payload }),
                Err(fate) => self.end(fate, payload),
            }
        }
    }

    fn land(&mut self, flight: &Flight) -> Result<(HostId, SocketAddr), Fate> {
        let to = flight.to;
        if flight.site.is_some() {
            return self.host_in(flight.site, to.ip()).map(|host| (host, to)).ok_or(Fate::Unreachable);
        }
        let site = self.site_at(to.ip()).ok_or(Fate::Unreachable)?;
        let conditions = self.sites[site].conditions;
        if conditions.is_cut_in || conditions.has_no_route {
            return Err(Fate::Cut);
        }
        if self.happens(conditions.loss) {
            return Err(Fate::Lost);
        }
        let to = match &mut self.sites[site].nat {
            Some(nat) if to.is_ipv4() => {
                nat.enter(flight.due, flight.from, to.port()).ok_or(Fate::Filtered)?
            }
            _ => to,
        };
        self.host_in(Some(site), to.ip()).map(|host| (host, to)).ok_or(Fate::Unreachable)
    }

    fn fly(&mut self, due: Instant, from: SocketAddr, to: SocketAddr, site: Option<usize>, payload: P) {
        self.count += 1;
        self.payloads.insert(self.count, payload);
        self.flights.push(Reverse(Flight { due, number: self.count, from, to, site }));
    }

    fn end(&mut self, fate: Fate, payload: P) {
        self.ended.push((fate, payload));
    }

    fn happens(&mut self, per_thousand: u32) -> bool {
        per_thousand > 0 && self.chance.random_range(0..1000) < per_thousand
    }

    /// The site that the world finds at an address.
    fn site_at(&self, address: IpAddr) -> Option<usize> {
        let is_here = |site: &Site| site.nat.is_some() && address == site.outer;
        self.sites.iter().position(is_here).or_else(|| {
            let host = self.hosts.iter().find(|host| host.addresses.contains(&address))?;
            let is_inner = self.sites[host.site].nat.is_some() && address.is_ipv4();
            (!is_inner).then_some(host.site)
        })
    }

    fn host_in(&self, site: Option<usize>, address: IpAddr) -> Option<HostId> {
        let is_meant = |host: &Host| Some(host.site) == site && host.addresses.contains(&address);
        self.hosts.iter().position(is_meant).map(HostId)
    }
}

/// The address families of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Families {
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Both.
    Both,
}

fn number(count: usize) -> u8 {
    u8::try_from(count).unwrap_or_else(|_| panic!("{count} are too many for this network"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: u16 = 41641;

    #[test]
    fn a_datagram_arrives_from_where_its_translator_shows_it_and_can_be_answered() {
        let mut network = Network::new(1);
        let home = network.add_site(Some(Kind::Symmetric));
        let (inside, world) = (network.add_host(home, Families::V4), network.add_site(None));
        let outside = network.add_host(world, Families::V4);
        let to = SocketAddr::new(network.addresses(outside)[0], PORT);
        let now = Instant::now();
        network.send(now, inside, PORT, to, 100, "question");
        assert_eq!(network.poll_arrival(now), None, "it is under way");
        let then = network.poll_timeout().unwrap();
        assert_eq!(then, now + Duration::from_millis(10), "out of one site and into the other");
        let arrival = network.poll_arrival(then).unwrap();
        assert_eq!((arrival.at, arrival.payload), (outside, "question"));
        assert_eq!(arrival.from.ip(), IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)));
        network.send(then, outside, PORT, arrival.from, 100, "answer");
        let answer = network.poll_arrival(then + Duration::from_secs(1)).unwrap();
        assert_eq!((answer.at, answer.to.port(), answer.from), (inside, PORT, to));
    }

    #[test]
    fn what_does_not_arrive_is_counted_by_its_reason() {
        let mut network = Network::new(1);
        let [home, world] = [Some(Kind::PortRestricted), None].map(|nat| network.add_site(nat));
        let inside = network.add_host(home, Families::V4);
        let outside = network.add_host(world, Families::Both);
        let address = |at: &str| -> SocketAddr { at.parse().unwrap() };
        let to = SocketAddr::new(network.addresses(outside)[0], PORT);
        let now = Instant::now();
        network.send(now, outside, PORT + 1, address("203.0.113.1:41641"), 100, ());
        network.send(now, inside, PORT, address("[2001:db8:2::2]:41641"), 100, ());
        network.send(now, inside, PORT, address("192.0.2.1:1"), 100, ());
        network.send(now, inside, PORT, to, 1473, ());
        network.conditions(world).is_cut_in = true;
        network.send(now, inside, PORT, to, 1472, ());
        assert_eq!(network.poll_arrival(now + Duration::from_secs(1)), None);
        network.conditions(home).loss = 1000;
        network.send(now, inside, PORT, to, 100, ());
        let fates = [Fate::Lost, Fate::Cut, Fate::TooLarge, Fate::Filtered].map(|fate| (fate, 1));
        let mut ended = BTreeMap::new();
        network.take_ended().into_iter().for_each(|(fate, _)| *ended.entry(fate).or_default() += 1);
        assert_eq!(ended, fates.into_iter().chain([(Fate::Unreachable, 2)]).collect::<BTreeMap<Fate, u64>>());
    }

    #[test]
    fn neighbours_meet_behind_their_router_whatever_happens_to_the_world() {
        let mut network = Network::new(1);
        let home = network.add_site(Some(Kind::Symmetric));
        let [one, other] = [(); 2].map(|()| network.add_host(home, Families::V4));
        *network.conditions(home) =
            Conditions { is_cut_out: true, has_no_route: true, loss: 1000, ..Conditions::default() };
        let (now, to) = (Instant::now(), SocketAddr::new(network.addresses(other)[0], PORT));
        assert!(network.send(now, one, PORT, to, 100, ()));
        let arrival = network.poll_arrival(now).unwrap();
        assert_eq!((arrival.at, arrival.from.ip()), (other, network.addresses(one)[0]));
        assert!(!network.send(now, one, PORT, SocketAddr::from(([203, 0, 113, 9], PORT)), 100, ()));
    }

    #[test]
    fn duplicates_come_twice_and_jitter_reorders() {
        let mut network = Network::new(7);
        let [one, other] = [(); 2].map(|()| {
            let site = network.add_site(None);
            network.add_host(site, Families::V4)
        });
        let conditions = network.conditions(network.site_of(one));
        (conditions.duplicates, conditions.jitter) = (1000, Duration::from_millis(50));
        let (now, to) = (Instant::now(), SocketAddr::new(network.addresses(other)[0], PORT));
        assert!((0..20).all(|number| network.send(now, one, PORT, to, 100, number)));
        let came = std::iter::from_fn(|| network.poll_arrival(now + Duration::from_secs(1)));
        let came: Vec<u8> = came.map(|arrival| arrival.payload).collect();
        assert_eq!(came.len(), 40);
        assert!(!came.is_sorted(), "{came:?}");
    }
}
