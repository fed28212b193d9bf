//! What a router does to IP packets: reads where they go, writes other addresses into them, and makes the messages
//! about those that are too big.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// The header of an IPv6 fragment.
const FRAGMENT: u8 = 44;

const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
/// Of a packet that is too big so much is quoted.
const QUOTED: usize = 128;
const TTL: u8 = 64;
const SYN: u8 = 0x02;

/// Who tells that a packet is too big.
const ROUTER_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);
const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0xfe);

/// What the headers of a packet say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) protocol: u8,
    /// Without a port unless it is whole, and UDP or TCP.
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) is_fragment: bool,
}

/// One of a packet's two addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Destination,
}

/// Reads a packet's headers; nothing of what is no IP packet.
pub(super) fn read(packet: &[u8]) -> Option<Flow> {
    match packet.first()? >> 4 {
        4 => read_v4(packet),
        6 => read_v6(packet),
        _ => None,
    }
}

fn read_v4(packet: &[u8]) -> Option<Flow> {
    let address = |at| Some(IpAddr::from(*array::<4>(packet, at)?));
    let protocol = *packet.get(9)?;
    // More are to come, or this is not the first.
    let is_fragment = word(packet, 6)? & 0x3fff != 0;
    let [source, destination] = ports(packet, header_length(packet)?, protocol, is_fragment)?;
    Some(Flow {
        protocol,
        source: SocketAddr::new(address(12)?, source),
        destination: SocketAddr::new(address(16)?, destination),
        is_fragment,
    })
}

fn read_v6(packet: &[u8]) -> Option<Flow> {
    let address = |at| Some(IpAddr::from(*array::<16>(packet, at)?));
    let protocol = *packet.get(6)?;
    let is_fragment = protocol == FRAGMENT;
    let [source, destination] = ports(packet, V6_HEADER, protocol, is_fragment)?;
    Some(Flow {
        protocol,
        source: SocketAddr::new(address(8)?, source),
        destination: SocketAddr::new(address(24)?, destination),
        is_fragment,
    })
}

fn ports(packet: &[u8], at: usize, protocol: u8, is_fragment: bool) -> Option<[u16; 2]> {
    if is_fragment || !matches!(protocol, UDP | TCP) {
        return Some([0; 2]);
    }
    Some([word(packet, at)?, word(packet, at + 2)?])
}

/// Writes another address and port into a whole packet of UDP or TCP over IPv4, and what follows from that into its
/// checksums (RFC 1624).
pub(super) fn rewrite(packet: &mut [u8], end: End, to: SocketAddrV4) -> Option<()> {
    let (address_at, port_offset) = match end {
        End::Source => (12, 0),
        End::Destination => (16, 2),
    };
    let header = header_length(packet)?;
    let protocol = *packet.get(9)?;
    let checksum_at = header + if protocol == UDP { 6 } else { 16 };
    let old_address = *array::<4>(packet, address_at)?;
    let old_port = word(packet, header + port_offset)?.to_be_bytes();
    let (new_address, new_port) = (to.ip().octets(), to.port().to_be_bytes());
    packet.get_mut(address_at..address_at + 4)?.copy_from_slice(&new_address);
    packet.get_mut(header + port_offset..header + port_offset + 2)?.copy_from_slice(&new_port);
    adjust(packet, 10, &old_address, &new_address)?;
    // Zero says that there is none.
    if protocol == UDP && word(packet, checksum_at)? == 0 {
        return Some(());
    }
    adjust(packet, checksum_at, &old_address, &new_address)?;
    adjust(packet, checksum_at, &old_port, &new_port)?;
    if protocol == UDP && word(packet, checksum_at)? == 0 {
        packet.get_mut(checksum_at..checksum_at + 2)?.copy_from_slice(&[0xff; 2]);
    }
    Some(())
}

/// Has both ends of a TCP connection send no segments that are larger than the path, as routers before a smaller
/// path do.
pub(super) fn clamp_segments(packet: &mut [u8], mtu: usize) -> Option<()> {
    let is_v4 = packet.first()? >> 4 == 4;
    let (header, protocol) = if is_v4 { (header_length(packet)?, 9) } else { (V6_HEADER, 6) };
    if *packet.get(protocol)? != TCP || packet.get(header + 13)? & SYN == 0 {
        return None;
    }
    let ip = if is_v4 { V4_HEADER } else { V6_HEADER };
    let most = u16::try_from(mtu.checked_sub(ip + TCP_HEADER)?).ok()?;
    let end = header + usize::from(packet.get(header + 12)? >> 4) * 4;
    let mut at = header + TCP_HEADER;
    while at < end {
        at += match *packet.get(at)? {
            0 => return None,
            1 => 1,
            2 => {
                let old = word(packet, at + 2)?;
                if old > most {
                    packet.get_mut(at + 2..at + 4)?.copy_from_slice(&most.to_be_bytes());
                    // Options begin at even places; one of one byte before this one makes it an odd one.
                    let (old, new) = (old.to_be_bytes(), most.to_be_bytes());
                    let is_even = (at - header).is_multiple_of(2);
                    let swap = |[high, low]: [u8; 2]| if is_even { [high, low] } else { [low, high] };
                    adjust(packet, header + 16, &swap(old), &swap(new))?;
                }
                return Some(());
            }
            _ => usize::from(*packet.get(at + 1)?).max(2),
        };
    }
    None
}

/// What the sender of a packet is told that does not fit; nothing for what must not be answered.
pub(super) fn too_big(packet: &[u8], mtu: usize) -> Option<Vec<u8>> {
    let quoted = packet.get(..packet.len().min(QUOTED))?;
    match read(packet)?.source.ip() {
        IpAddr::V4(to) => {
            let mut message = vec![3, 4, 0, 0, 0, 0];
            message.extend(u16::try_from(mtu).ok()?.to_be_bytes());
            message.extend(quoted);
            let checksum = checksum([message.as_slice()]);
            message.get_mut(2..4)?.copy_from_slice(&checksum.to_be_bytes());
            let length = u16::try_from(V4_HEADER + message.len()).ok()?;
            let mut answer = vec![0x45, 0];
            answer.extend(length.to_be_bytes());
            answer.extend([0, 0, 0, 0, TTL, ICMP, 0, 0]);
            answer.extend(ROUTER_V4.octets());
            answer.extend(to.octets());
            let checksum = self::checksum([answer.as_slice()]);
            answer.get_mut(10..12)?.copy_from_slice(&checksum.to_be_bytes());
            answer.extend(message);
            Some(answer)
        }
        IpAddr::V6(to) => {
            let mut message = vec![2, 0, 0, 0];
            message.extend(u32::try_from(mtu).ok()?.to_be_bytes());
            message.extend(quoted);
            let length = u16::try_from(message.len()).ok()?;
            let pseudo =
                [&ROUTER_V6.octets()[..], &to.octets(), &u32::from(length).to_be_bytes(), &[0, 0, 0, ICMPV6]]
                    .concat();
            let checksum = checksum([pseudo.as_slice(), message.as_slice()]);
            message.get_mut(2..4)?.copy_from_slice(&checksum.to_be_bytes());
            let mut answer = vec![0x60, 0, 0, 0];
            answer.extend(length.to_be_bytes());
            answer.extend([ICMPV6, TTL]);
            answer.extend(ROUTER_V6.octets());
            answer.extend(to.octets());
            answer.extend(message);
            Some(answer)
        }
    }
}

fn header_length(packet: &[u8]) -> Option<usize> {
    Some(usize::from(packet.first()? & 0x0f) * 4)
}

fn array<const N: usize>(packet: &[u8], at: usize) -> Option<&[u8; N]> {
    packet.get(at..)?.first_chunk()
}

fn word(packet: &[u8], at: usize) -> Option<u16> {
    array(packet, at).map(|bytes| u16::from_be_bytes(*bytes))
}

/// Changes the checksum at a place for what is changed elsewhere.
fn adjust(packet: &mut [u8], at: usize, old: &[u8], new: &[u8]) -> Option<()> {
    let mut sum = u32::from(!word(packet, at)?);
    sum += words(old).map(|word| u32::from(!word)).sum::<u32>() + words(new).map(u32::from).sum::<u32>();
    packet.get_mut(at..at + 2)?.copy_from_slice(&(!fold(sum)).to_be_bytes());
    Some(())
}

/// The checksum of parts, each but the last of even length.
fn checksum<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u16 {
    !fold(parts.into_iter().flat_map(words).map(u32::from).sum())
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.chunks(2).map(|pair| match pair {
        [high, low] => u16::from_be_bytes([*high, *low]),
        [high, ..] => u16::from_be_bytes([*high, 0]),
        [] => 0,
    })
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A datagram over IPv4 with checksums, and so many bytes in it.
    pub(in crate::internet) fn datagram(from: &str, to: &str, length: usize) -> Vec<u8> {
        let [from, to]: [SocketAddrV4; 2] = [from, to].map(|address| address.parse().unwrap());
        let udp = u16::try_from(8 + length).unwrap();
        let mut body =
            [from.port().to_be_bytes(), to.port().to_be_bytes(), udp.to_be_bytes(), [0; 2]].concat();
        body.extend((0..length).map(|place| place as u8));
        packet(UDP, from, to, body, 6)
    }

    /// The first segment of a connection over IPv4.
    fn syn(options: &[u8]) -> Vec<u8> {
        let [from, to]: [SocketAddrV4; 2] =
            ["10.0.0.2:5000", "198.51.100.1:80"].map(|it| it.parse().unwrap());
        let mut body = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
        body.extend([0; 8]);
        body.extend([u8::try_from(5 + options.len() / 4).unwrap() << 4, SYN, 0, 0, 0, 0, 0, 0]);
        body.extend(options);
        packet(TCP, from, to, body, 16)
    }

    fn packet(protocol: u8, from: SocketAddrV4, to: SocketAddrV4, mut body: Vec<u8>, at: usize) -> Vec<u8> {
        let length = u16::try_from(V4_HEADER + body.len()).unwrap();
        let mut packet = vec![0x45, 0];
        packet.extend(length.to_be_bytes());
        packet.extend([0, 0, 0x40, 0, TTL, protocol, 0, 0]);
        packet.extend(from.ip().octets());
        packet.extend(to.ip().octets());
        let header = checksum([packet.as_slice()]);
        packet[10..12].copy_from_slice(&header.to_be_bytes());
        let sum = checksum([pseudo(&packet, body.len()).as_slice(), body.as_slice()]);
        body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        packet.extend(body);
        packet
    }

    fn pseudo(packet: &[u8], length: usize) -> Vec<u8> {
        let length = u16::try_from(length).unwrap().to_be_bytes();
        [&packet[12..20], &[0, packet[9]], &length].concat()
    }

    #[track_caller]
    fn has_good_checksums(packet: &[u8]) {
        assert_eq!(checksum([&packet[..V4_HEADER]]), 0, "the header's");
        let body = &packet[V4_HEADER..];
        assert_eq!(checksum([pseudo(packet, body.len()).as_slice(), body]), 0, "the body's");
    }

    #[test]
    fn where_a_packet_goes_is_read_and_nothing_of_what_is_none() {
        let packet = datagram("10.0.0.2:5000", "198.51.100.1:3478", 9);
        let flow = read(&packet).unwrap();
        assert_eq!((flow.protocol, flow.is_fragment), (UDP, false));
        assert_eq!(flow.source, "10.0.0.2:5000".parse().unwrap());
        assert_eq!(flow.destination, "198.51.100.1:3478".parse().unwrap());
        for length in 0..V4_HEADER + 4 {
            assert_eq!(read(&packet[..length]), None, "{length}");
        }
        let mut piece = packet.clone();
        piece[6] = 0x20;
        let flow = read(&piece).unwrap();
        assert!(flow.is_fragment && flow.source.port() == 0);
    }

    #[test]
    fn other_addresses_leave_the_checksums_right() {
        for length in [0, 1, 1200] {
            for mut packet in [datagram("10.0.0.2:5000", "198.51.100.1:3478", length), syn(&[])] {
                rewrite(&mut packet, End::Source, "203.0.113.1:61000".parse().unwrap()).unwrap();
                rewrite(&mut packet, End::Destination, "192.168.2.9:255".parse().unwrap()).unwrap();
                let flow = read(&packet).unwrap();
                assert_eq!(flow.source, "203.0.113.1:61000".parse().unwrap());
                assert_eq!(flow.destination, "192.168.2.9:255".parse().unwrap());
                has_good_checksums(&packet);
            }
        }
    }

    #[test]
    fn segments_are_held_below_the_path_wherever_the_option_stands() {
        for options in [[2, 4, 5, 180, 1, 1, 1, 1], [1, 2, 4, 5, 180, 1, 1, 1], [3, 3, 7, 1, 2, 4, 5, 180]] {
            let mut packet = syn(&options);
            has_good_checksums(&packet);
            clamp_segments(&mut packet, 1300).unwrap();
            let most = 1260_u16.to_be_bytes();
            assert!(packet.windows(4).any(|option| option == [2, 4, most[0], most[1]]), "{packet:?}");
            has_good_checksums(&packet);
            let before = packet.clone();
            clamp_segments(&mut packet, 1500);
            assert_eq!(packet, before);
        }
    }

    #[test]
    fn who_sends_what_is_too_big_is_told_how_big_it_may_be() {
        let packet = datagram("10.0.0.2:5000", "198.51.100.1:3478", 1400);
        let answer = too_big(&packet, 1300).unwrap();
        let flow = read(&answer).unwrap();
        assert_eq!((flow.protocol, flow.destination.ip()), (ICMP, "10.0.0.2".parse::<IpAddr>().unwrap()));
        assert_eq!(checksum([&answer[..V4_HEADER]]), 0);
        assert_eq!(checksum([&answer[V4_HEADER..]]), 0);
        assert_eq!(answer[V4_HEADER..V4_HEADER + 8][..2], [3, 4]);
        assert_eq!(word(&answer, V4_HEADER + 6), Some(1300));
        assert_eq!(answer[V4_HEADER + 8..], packet[..QUOTED]);
    }
}
