//! Our own endpoints: where peers may find us without a relay (tailnet-data 9).
//!
//! In this order, without duplicates: how STUN servers see us by IPv4, and by IPv6; how they saw us lately; and the
//! addresses of our interfaces, each with the port of the socket of its own family. The list is the same for the
//! control plane, for peers and for people. There is no port that a person could configure, and so none to be told.

use std::{
    collections::{BTreeSet, VecDeque},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use crate::{
    netcheck::{Families, Family, Mappings},
    network::{Interface, Rank},
};

/// How long a mapping that is not seen any more is told: a NAT may go back to it.
const MAPPING_MEMORY: Duration = Duration::from_secs(5 * 60 + 10);
/// A NAT that maps every destination to another port would fill the memory: the newest are kept.
const MAX_REMEMBERED: usize = 8;
/// Peers probe every endpoint, at 1.3 KB each, and keep a hundred at most.
pub const MAX_ENDPOINTS: usize = 32;
/// Interfaces of another overlay network, which would carry one tunnel inside of the other.
const OVERLAY_PREFIX: &str = "zt";

/// The local ports of our UDP sockets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ports {
    /// Of the IPv4 socket, if there is one.
    pub v4: Option<u16>,
    /// Of the IPv6 socket, if there is one.
    pub v6: Option<u16>,
}

impl Ports {
    fn of(self, family: Family) -> Option<u16> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

/// Keeps the list.
#[derive(Debug, Default)]
pub struct Endpoints {
    ports: Ports,
    interfaces: Vec<Interface>,
    mappings: Mappings,
    /// How we were seen lately, and when last; the newest at the end.
    remembered: VecDeque<(SocketAddr, Instant)>,
}

impl Endpoints {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes our sockets. How others saw one that had another port says nothing of its successor.
    pub fn set_ports(&mut self, ports: Ports) {
        for family in [Family::V4, Family::V6] {
            if self.ports.of(family) != ports.of(family) {
                self.forget(family);
            }
        }
        self.ports = ports;
    }

    /// Takes the interfaces of this machine, without our own device.
    pub fn set_interfaces(&mut self, interfaces: Vec<Interface>) {
        self.interfaces = interfaces;
    }

    /// Takes how STUN servers see us now.
    pub fn handle_mappings(&mut self, now: Instant, mappings: &Mappings) {
        self.mappings = *mappings;
        for seen in seen(mappings) {
            self.remembered.retain(|(other, _)| *other != seen);
            self.remembered.push_back((seen, now));
        }
        self.expire(now);
    }

    /// The list, best first; at most [`MAX_ENDPOINTS`].
    pub fn list(&self, now: Instant) -> Vec<SocketAddr> {
        let lately = self.remembered.iter().rev().filter(|(_, at)| is_remembered(*at, now));
        let all = seen(&self.mappings).chain(lately.map(|(seen, _)| *seen)).chain(self.local());
        in_order(all)
    }

    /// The families in which we have an address that leads anywhere.
    pub fn families(&self) -> Families {
        let usable: Vec<IpAddr> =
            self.addresses().filter(|address| Rank::of(*address) < Rank::Loopback).collect();
        let has = |family| usable.iter().any(|address| Family::of(*address) == family);
        Families { v4: has(Family::V4), v6: has(Family::V6) }
    }

    /// Forgets what was seen too long ago.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.expire(now);
    }
}

impl Endpoints {
    /// The addresses of our interfaces, the best kind there is; IPv4 first, in order.
    fn local(&self) -> impl Iterator<Item = SocketAddr> + use<> {
        let has_mapping = seen(&self.mappings).next().is_some();
        let addresses: BTreeSet<IpAddr> = self.addresses().collect();
        let best = addresses.iter().map(|address| Rank::of(*address)).min();
        let best = best.filter(|best| *best < Rank::Loopback || !has_mapping);
        let ports = self.ports;
        let told = addresses.into_iter().filter(move |address| Some(Rank::of(*address)) == best);
        told.filter_map(move |address| Some(SocketAddr::new(address, ports.of(Family::of(address))?)))
    }

    /// Every address that a peer might ever be told.
    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let is_foreign =
            |interface: &&Interface| interface.is_up && !interface.name.starts_with(OVERLAY_PREFIX);
        let addresses = self.interfaces.iter().filter(is_foreign).flat_map(|interface| &interface.addresses);
        addresses.copied().filter(|address| Rank::of(*address) != Rank::Never)
    }

    fn forget(&mut self, family: Family) {
        self.remembered.retain(|(seen, _)| Family::of(seen.ip()) != family);
        match family {
            Family::V4 => (self.mappings.v4, self.mappings.varies_by_destination) = (None, None),
            Family::V6 => self.mappings.v6 = None,
        }
    }

    fn expire(&mut self, now: Instant) {
        self.remembered.retain(|(_, at)| is_remembered(*at, now));
        while self.remembered.len() > MAX_REMEMBERED {
            self.remembered.pop_front();
        }
    }
}

fn seen(mappings: &Mappings) -> impl Iterator<Item = SocketAddr> + use<> {
    let v4 = mappings.v4.map(SocketAddr::V4);
    v4.into_iter().chain(mappings.v6.map(SocketAddr::V6))
}

fn is_remembered(at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(at) < MAPPING_MEMORY
}

fn in_order(all: impl Iterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let mut told = BTreeSet::new();
    all.filter(|endpoint| told.insert(*endpoint)).take(MAX_ENDPOINTS).collect()
}

#[cfg(test)]
mod tests;
