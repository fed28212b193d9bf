//! Addresses as peers name them: one form for each, which of them may be probed, and a memory of the latest few.

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
};

use warren_proto::address::{RELAY_MAGIC, is_coder};

/// The one form of an address: IPv4 as such, nothing beside address and port.
pub(super) fn canonical(address: &SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Whether a peer can be there. Peers name what they like, and what is named is sent to: no groups, nothing inside
/// of the tunnel, and no IPv6 link-local address, which could not be taken back (tailnet-data 7.12).
pub(super) fn may_be_probed(address: &SocketAddr) -> bool {
    let names_a_host = match address.ip() {
        IpAddr::V4(ip) => !ip.is_broadcast() && ip != RELAY_MAGIC,
        IpAddr::V6(ip) => !ip.is_unicast_link_local() && !is_coder(&ip),
    };
    names_a_host && address.port() != 0 && !address.ip().is_unspecified() && !address.ip().is_multicast()
}

/// Of what a peer or we ourselves name, in one form and each once, what may be probed.
pub(super) fn probeable(addresses: &[SocketAddr], limit: usize) -> Vec<SocketAddr> {
    let mut kept: Vec<SocketAddr> = Vec::new();
    for address in addresses.iter().map(canonical).filter(may_be_probed) {
        if kept.len() < limit && !kept.contains(&address) {
            kept.push(address);
        }
    }
    kept
}

/// The latest `N` different addresses, the newest last.
#[derive(Debug, Default)]
pub(super) struct Recent<const N: usize>(VecDeque<SocketAddr>);

impl<const N: usize> Recent<N> {
    /// Makes an address the newest. Returns what had to make room for it.
    pub(super) fn note(&mut self, address: SocketAddr) -> Option<SocketAddr> {
        if self.0.back() == Some(&address) {
            return None;
        }
        if let Some(at) = self.0.iter().position(|it| *it == address) {
            self.0.remove(at);
        }
        self.0.push_back(address);
        if self.0.len() > N { self.0.pop_front() } else { None }
    }

    /// Forgets all, and gives them.
    pub(super) fn take(&mut self) -> impl Iterator<Item = SocketAddr> + use<N> {
        std::mem::take(&mut self.0).into_iter()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
