//! How fuzz targets reach what reads inner packets.

use std::net::Ipv6Addr;

use super::inner::{self, Header};

/// What the data plane makes of an inner packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inner {
    /// Who sent it, and whom it is for.
    pub ends: Option<(Ipv6Addr, Ipv6Addr)>,
    /// The answer, if it is a TSMP ping.
    pub pong: Option<Vec<u8>>,
    /// The answer, if it is an echo request.
    pub echo: Option<Vec<u8>>,
}

/// Reads an inner packet.
pub fn inner(packet: &[u8]) -> Inner {
    Inner {
        ends: Header::of(packet).map(|header| (header.source, header.destination)),
        pong: inner::tsmp_pong(packet),
        echo: inner::echo_reply(packet),
    }
}
