//! Inner addresses: the two service prefixes, the address that an ID gives, and CIDR text (tailnet-control 6).

use std::{
    fmt,
    net::{AddrParseError, IpAddr, Ipv4Addr, Ipv6Addr},
    num::ParseIntError,
    str::FromStr,
};

use thiserror::Error;
use uuid::Uuid;

/// The prefix of this machine's own address, of what the system routes, and of every DNS answer.
pub const CODER_PREFIX: Cidr =
    Cidr { address: IpAddr::V6(Ipv6Addr::new(0xfd60, 0x627a, 0xa42b, 0, 0, 0, 0, 0)), bits: 48 };
/// The prefix of an agent's second address, and of command line clients.
pub const TAILSCALE_PREFIX: Cidr =
    Cidr { address: IpAddr::V6(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0)), bits: 48 };
/// The resolver inside the tunnel.
pub const CODER_DNS: Ipv6Addr = Ipv6Addr::new(0xfd60, 0x627a, 0xa42b, 0, 0, 0, 0, 0x53);
/// The one address that agents of old had.
pub const LEGACY_AGENT: Ipv6Addr =
    Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0x49d6, 0xb259, 0xb7ac, 0xb1b2, 0x48f4);
/// Stands for a relay where a socket address is told to a peer; the port is the region.
pub const RELAY_MAGIC: Ipv4Addr = Ipv4Addr::new(127, 3, 3, 40);

/// The Coder-prefix address of an ID: of an agent, or of a random ID for ourselves.
#[must_use]
pub fn coder_address(id: &Uuid) -> Ipv6Addr {
    under([0xfd, 0x60, 0x62, 0x7a, 0xa4, 0x2b], id)
}

/// The Tailscale-prefix address of an ID.
#[must_use]
pub fn tailscale_address(id: &Uuid) -> Ipv6Addr {
    under([0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0], id)
}

/// Whether an address lies in the Coder prefix.
#[must_use]
pub fn is_coder(address: &Ipv6Addr) -> bool {
    let [a, b, c, ..] = address.segments();
    [a, b, c] == [0xfd60, 0x627a, 0xa42b]
}

/// An agent's label in its node message: the size of the signed number in the ID's last eight bytes. The smallest
/// number has no positive counterpart and stays negative.
#[must_use]
pub fn node_id(id: &Uuid) -> i64 {
    let (_, low) = id.as_u64_pair();
    i64::from_be_bytes(low.to_be_bytes()).wrapping_abs()
}

fn under([a, b, c, d, e, f]: [u8; 6], id: &Uuid) -> Ipv6Addr {
    let [_, _, _, _, _, _, rest @ ..] = id.as_bytes();
    let [g, h, i, j, k, l, m, n, o, p] = *rest;
    Ipv6Addr::from_octets([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
}

/// An address and the length of a prefix; the bits beyond it are kept as they came.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Cidr {
    address: IpAddr,
    bits: u8,
}

/// Why text is no address with a prefix length.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CidrError {
    /// There is no slash.
    #[error("there is no prefix length")]
    NoLength,
    /// What stands before the slash.
    #[error("the address cannot be read: {0}")]
    Address(#[from] AddrParseError),
    /// What stands behind the slash is no number.
    #[error("the prefix length cannot be read: {0}")]
    Length(#[from] ParseIntError),
    /// The number is written with a sign or leading zeros, or is larger than the address.
    #[error("the prefix length does not fit")]
    LengthRange,
}

impl Cidr {
    /// One whole IPv6 address.
    #[must_use]
    pub const fn host(address: Ipv6Addr) -> Self {
        Self { address: IpAddr::V6(address), bits: 128 }
    }

    /// The address as written.
    #[must_use]
    pub const fn address(&self) -> IpAddr {
        self.address
    }

    /// The length of the prefix.
    #[must_use]
    pub const fn bits(&self) -> u8 {
        self.bits
    }

    /// The address, if this is one whole IPv6 address.
    #[must_use]
    pub const fn as_host(&self) -> Option<Ipv6Addr> {
        match (self.address, self.bits) {
            (IpAddr::V6(address), 128) => Some(address),
            _ => None,
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let (address, length) = text.split_once('/').ok_or(CidrError::NoLength)?;
        let address: IpAddr = address.parse()?;
        let bits: u8 = length.parse()?;
        let plain = length.starts_with(|first: char| first.is_ascii_digit())
            && (length.len() == 1 || !length.starts_with('0'));
        let whole = if address.is_ipv4() { 32 } else { 128 };
        if !plain || bits > whole {
            return Err(CidrError::LengthRange);
        }
        Ok(Self { address, bits })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_constants_agree_with_each_other() {
        assert_eq!(CODER_PREFIX.to_string(), "fd60:627a:a42b::/48");
        assert_eq!(TAILSCALE_PREFIX.to_string(), "fd7a:115c:a1e0::/48");
        assert_eq!(IpAddr::V6(coder_address(&Uuid::nil())), CODER_PREFIX.address());
        assert_eq!(IpAddr::V6(tailscale_address(&Uuid::nil())), TAILSCALE_PREFIX.address());
        assert!(is_coder(&CODER_DNS));
        assert!(!is_coder(&LEGACY_AGENT));
    }

    #[test]
    fn a_prefix_needs_an_address_and_a_plain_length_that_fits() {
        for text in [
            "",
            "fd60::1",
            "fd60::1/",
            "/128",
            "fd60::1/129",
            "10.0.0.1/33",
            "fd60::1/+64",
            "fd60::1/064",
            "x/1",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
        for text in ["::/0", "10.0.0.0/8", "fd60:627a:a42b::1/128"] {
            assert_eq!(text.parse::<Cidr>().map(|cidr| cidr.to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn only_a_whole_ipv6_address_is_a_host() {
        assert_eq!("fd60::1/128".parse::<Cidr>().unwrap().as_host(), Some("fd60::1".parse().unwrap()));
        assert_eq!("fd60::1/64".parse::<Cidr>().unwrap().as_host(), None);
        assert_eq!("10.0.0.1/32".parse::<Cidr>().unwrap().as_host(), None);
    }

    proptest! {
        #[test]
        fn a_host_reads_back(octets: [u8; 16]) {
            let host = Cidr::host(Ipv6Addr::from_octets(octets));
            prop_assert_eq!(host.to_string().parse(), Ok(host));
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            let _ = text.parse::<Cidr>();
        }
    }
}
