//! The network as this machine has it: interfaces with their addresses, and the ways out. What of a change
//! matters to paths (tailnet-data 7.9).

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use warren_proto::address::{CODER_PREFIX, Cidr, TAILSCALE_PREFIX};

/// A network interface of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is switched on.
    pub is_up: bool,
    /// Its addresses that are ready to be used.
    pub addresses: BTreeSet<IpAddr>,
}

/// A way to everywhere: a default route, or one of the halves of it that other tunnels set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Uplink {
    /// What it leads to: everything of a family, or half of it.
    pub destination: IpAddr,
    /// The router, if there is one.
    pub gateway: Option<IpAddr>,
    /// The index of the interface, if it has one.
    pub interface: Option<u32>,
    /// The routing table that it is in.
    pub table: u32,
    /// Smaller ones are preferred.
    pub metric: u32,
}

/// What there is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// The interfaces by index.
    pub interfaces: Vec<Interface>,
    /// The ways out.
    pub uplinks: BTreeSet<Uplink>,
}

/// How much a difference matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// There are addresses more, or fewer where nothing left by them: peers are to be told, and paths stay.
    Minor,
    /// Packets leave by other ways than before: no path can be relied upon.
    Major,
}

impl Network {
    /// The same without one of the interfaces.
    #[must_use]
    pub fn without(&self, name: &str) -> Self {
        let mut others = self.clone();
        others.interfaces.retain(|interface| interface.name != name);
        others
    }

    /// What `newer` means for somebody who knows this; `None` if nothing. What happens inside of tunnels of
    /// ours, to link-local addresses and to names does not count, so that a container which comes and goes
    /// disturbs nobody.
    pub fn change_to(&self, newer: &Self) -> Option<Change> {
        let (old, new) = (self.addresses(), newer.addresses());
        if self.uplinks != newer.uplinks || old.difference(&new).any(|(index, _)| self.is_way_out(*index)) {
            return Some(Change::Major);
        }
        (old != new).then_some(Change::Minor)
    }

    /// The addresses that others may know, each with its interface.
    fn addresses(&self) -> BTreeSet<(u32, IpAddr)> {
        let up = self.interfaces.iter().filter(|interface| interface.is_up);
        let all = up.flat_map(|it| it.addresses.iter().map(|address| (it.index, *address)));
        all.filter(|(_, address)| Rank::of(*address) < Rank::Loopback).collect()
    }

    /// A machine without any way out has its peers next to it, behind any interface.
    fn is_way_out(&self, index: u32) -> bool {
        self.uplinks.is_empty() || self.uplinks.iter().any(|uplink| uplink.interface == Some(index))
    }
}

/// Whether an address is of the tunnel's inside: a path to it would lead through itself.
pub fn is_inner(address: IpAddr) -> bool {
    let lies_in = |prefix: &Cidr| match (address, prefix.address()) {
        (IpAddr::V6(address), IpAddr::V6(base)) => {
            (address.to_bits() ^ base.to_bits()).leading_zeros() >= u32::from(prefix.bits())
        }
        _ => false,
    };
    [CODER_PREFIX, TAILSCALE_PREFIX].iter().any(lies_in)
}

/// How much an address says about where we are. Only those of the best rank that there is are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// One that others may route to.
    Usual,
    /// One that a machine or a site gave itself.
    SelfAssigned,
    /// One of this machine alone.
    Loopback,
    /// None that could be told.
    Never,
}

impl Rank {
    pub(crate) fn of(address: IpAddr) -> Self {
        if address.is_unspecified() || address.is_multicast() || is_inner(address) {
            return Self::Never;
        }
        match address {
            _ if address.is_loopback() => Self::Loopback,
            IpAddr::V4(Ipv4Addr::BROADCAST) => Self::Never,
            IpAddr::V4(v4) if v4.is_link_local() => Self::SelfAssigned,
            // Means nothing without the interface, which a peer cannot know.
            IpAddr::V6(v6) if v6.is_unicast_link_local() => Self::Never,
            IpAddr::V6(v6) if v6.is_unique_local() => Self::SelfAssigned,
            IpAddr::V4(_) | IpAddr::V6(_) => Self::Usual,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETH0: u32 = 2;
    const DOCKER0: u32 = 3;

    #[test]
    fn the_same_network_is_no_change_and_neither_is_what_nobody_outside_sees() {
        let before = network();
        assert_eq!(before.change_to(&before), None);
        for (what, change) in [
            (
                "a container",
                Box::new(|it: &mut Network| it.interfaces.push(interface(9, &["fe80::9"]))) as Edit,
            ),
            ("our own device", Box::new(|it| it.interfaces.push(interface(9, &["fd60:627a:a42b::7"])))),
            ("a loopback address", Box::new(|it| it.interfaces.push(interface(9, &["127.0.0.2"])))),
            ("a name", Box::new(|it| it.interfaces[0].name = "wan0".to_owned())),
        ] {
            assert_eq!(before.change_to(&edited(change)), None, "{what}");
        }
    }

    #[test]
    fn other_ways_out_and_addresses_lost_on_them_are_major_and_the_rest_is_minor() {
        let rows: [(&str, Edit, Change); 9] = [
            ("no way out", Box::new(|it| it.uplinks.clear()), Change::Major),
            ("another router", Box::new(|it| it.uplinks = [uplink(ETH0, "192.0.2.2")].into()), Change::Major),
            (
                "a second way out",
                Box::new(|it| {
                    it.uplinks.insert(uplink(DOCKER0, "172.17.0.9"));
                }),
                Change::Major,
            ),
            (
                "another address of the way out",
                Box::new(|it| it.interfaces[0] = interface(ETH0, &["192.0.2.8"])),
                Change::Major,
            ),
            ("the way out is off", Box::new(|it| it.interfaces[0].is_up = false), Change::Major),
            ("another interface", Box::new(|it| it.interfaces[0].index = 8), Change::Major),
            (
                "one more address",
                Box::new(|it| it.interfaces[0] = interface(ETH0, &["192.0.2.7", "2001:db8::7"])),
                Change::Minor,
            ),
            ("a bridge", Box::new(|it| it.interfaces.push(interface(9, &["172.18.0.1"]))), Change::Minor),
            ("a bridge that is gone", Box::new(|it| it.interfaces.truncate(1)), Change::Minor),
        ];
        for (what, edit, change) in rows {
            assert_eq!(network().change_to(&edited(edit)), Some(change), "{what}");
        }
    }

    #[test]
    fn without_a_way_out_every_lost_address_is_major() {
        let mut before = network();
        before.uplinks.clear();
        let mut after = before.clone();
        after.interfaces.truncate(1);
        assert_eq!(before.change_to(&after), Some(Change::Major));
    }

    #[test]
    fn only_the_two_prefixes_are_the_tunnels_inside() {
        for (text, expected) in [
            ("fd60:627a:a42b::53", true),
            ("fd60:627a:a42b:ffff::1", true),
            ("fd60:627a:a42c::1", false),
            ("fd7a:115c:a1e0:49d6::1", true),
            ("fd7a:115c:a1df::1", false),
            ("100.64.0.1", false),
        ] {
            assert_eq!(is_inner(text.parse().unwrap()), expected, "{text}");
        }
    }

    type Edit = Box<dyn Fn(&mut Network)>;

    fn edited(edit: Edit) -> Network {
        let mut network = network();
        edit(&mut network);
        network
    }

    fn network() -> Network {
        Network {
            interfaces: vec![interface(ETH0, &["192.0.2.7"]), interface(DOCKER0, &["172.17.0.1"])],
            uplinks: [uplink(ETH0, "192.0.2.1")].into(),
        }
    }

    fn interface(index: u32, addresses: &[&str]) -> Interface {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        Interface { index, name: format!("if{index}"), is_up: true, addresses }
    }

    fn uplink(interface: u32, gateway: &str) -> Uplink {
        Uplink {
            destination: Ipv4Addr::UNSPECIFIED.into(),
            gateway: gateway.parse().ok(),
            interface: Some(interface),
            table: 254,
            metric: 100,
        }
    }
}
