//! The small languages that an agent speaks by itself: path probes, TSMP pings and ICMPv6 echo requests inside
//! the tunnel (tailnet-data 5, 12.2). Written apart from warren's own on purpose.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use warren_proto::key::{BoxShared, DiscoPublic, NodePublic, random};

use super::direct::Probe;

/// Length of an IPv6 header.
pub(super) const IPV6: usize = 40;
pub(super) const TCP: u8 = 6;
pub(super) const ICMPV6: u8 = 58;
pub(super) const TSMP: u8 = 99;
const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;

const MAGIC: &[u8; 6] = b"TS\xf0\x9f\x92\xac";
/// Magic and sender.
const DISCO_HEADER: usize = 6 + 32;
/// Type, version and padded body of a ping or pong: the datagram then has 1310 bytes.
const PADDED: usize = 1232;
const DISCO_PING: u8 = 1;
const DISCO_PONG: u8 = 2;
const CALL_ME_MAYBE: u8 = 3;
/// Bytes of an address and a port.
const ENDPOINT: usize = 18;

/// The sender of a path probe, if the packet is one.
pub(super) fn disco_sender(packet: &[u8]) -> Option<DiscoPublic> {
    packet.strip_prefix(MAGIC)?.first_chunk().map(|key| DiscoPublic(*key))
}

/// What a probe says that was made between these keys.
pub(super) fn open_probe(packet: &[u8], shared: &BoxShared) -> Option<Probe> {
    let plain = shared.open_with_nonce(packet.get(DISCO_HEADER..)?)?;
    let (&[kind, version], body) = plain.split_first_chunk()?;
    match kind {
        DISCO_PING => {
            let (txid, rest) = body.split_first_chunk()?;
            let node = rest.first_chunk().map(|key| NodePublic(*key)).filter(|key| !key.is_zero());
            Some(Probe::Ping { txid: *txid, node })
        }
        DISCO_PONG => {
            let (txid, rest) = body.split_first_chunk()?;
            Some(Probe::Pong { txid: *txid, observed: read_endpoint(rest)? })
        }
        // What cannot be read is as good as an empty list.
        CALL_ME_MAYBE if version != 0 || !body.len().is_multiple_of(ENDPOINT) => {
            Some(Probe::CallMeMaybe(Vec::new()))
        }
        CALL_ME_MAYBE => Some(Probe::CallMeMaybe(body.chunks(ENDPOINT).filter_map(read_endpoint).collect())),
        _ => None,
    }
}

/// Seals a probe, pings and pongs padded.
pub(super) fn seal_probe(probe: &Probe, own: &DiscoPublic, shared: &BoxShared) -> Vec<u8> {
    let plain = match probe {
        Probe::Ping { txid, node } => {
            let node = node.map_or([0; 32], |key| key.0);
            pad([[DISCO_PING, 1].as_slice(), txid, &node].concat())
        }
        Probe::Pong { txid, observed } => {
            pad([[DISCO_PONG, 1].as_slice(), txid, &endpoint(observed)].concat())
        }
        Probe::CallMeMaybe(endpoints) => {
            let mut plain = vec![CALL_ME_MAYBE, 0];
            plain.extend(endpoints.iter().flat_map(endpoint));
            plain
        }
    };
    [MAGIC.as_slice(), &own.0, &shared.seal_with_nonce(&random(), &plain)].concat()
}

/// What stands for the relay of a region where a socket address is told.
pub(super) fn relay_endpoint(region: u16) -> SocketAddr {
    (Ipv4Addr::new(127, 3, 3, 40), region).into()
}

fn pad(mut plain: Vec<u8>) -> Vec<u8> {
    plain.resize(PADDED, 0);
    plain
}

fn endpoint(of: &SocketAddr) -> [u8; ENDPOINT] {
    let address = match of.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let mut bytes = [0; ENDPOINT];
    for (to, from) in bytes.iter_mut().zip(address.octets().into_iter().chain(of.port().to_be_bytes())) {
        *to = from;
    }
    bytes
}

fn read_endpoint(bytes: &[u8]) -> Option<SocketAddr> {
    let (address, rest) = bytes.split_first_chunk::<16>()?;
    let port = u16::from_be_bytes(*rest.first_chunk()?);
    Some(SocketAddr::new(IpAddr::from(*address).to_canonical(), port))
}

/// Source, destination and next header of a packet that is as long as it says or longer.
pub(super) fn ipv6(packet: &[u8]) -> Option<(Ipv6Addr, Ipv6Addr, u8)> {
    let header: &[u8; IPV6] = packet.first_chunk()?;
    let [0x60..=0x6f, _, _, _, l0, l1, next, _, rest @ ..] = header else { return None };
    let length = usize::from(u16::from_be_bytes([*l0, *l1]));
    let (source, destination) = rest.split_first_chunk::<16>()?;
    let destination: &[u8; 16] = destination.try_into().ok()?;
    let is_whole = packet.len() >= IPV6 + length;
    is_whole.then(|| (Ipv6Addr::from_octets(*source), Ipv6Addr::from_octets(*destination), *next))
}

/// The answer to a TSMP ping: from `own`, whichever of our addresses was asked.
pub(super) fn tsmp_pong(packet: &[u8], own: Ipv6Addr) -> Option<Vec<u8>> {
    let (source, ..) = ipv6(packet)?;
    let data: &[u8; 8] = packet.get(IPV6..)?.strip_prefix(b"p")?.first_chunk()?;
    let payload = [b"o".as_slice(), data, &[0, 0]].concat();
    let mut answer = header(TSMP, payload.len(), own, source);
    // The reference sets the whole flow label.
    if let [_, second, third, fourth, ..] = answer.as_mut_slice() {
        (*second, *third, *fourth) = (0x0f, 0xff, 0xff);
    }
    answer.extend(payload);
    Some(answer)
}

/// The answer to an echo request.
pub(super) fn echo_reply(packet: &[u8]) -> Option<Vec<u8>> {
    let (source, destination, _) = ipv6(packet)?;
    let length = usize::from(u16::from_be_bytes(*packet.get(4..)?.first_chunk()?));
    let message = packet.get(IPV6..IPV6 + length)?;
    let [ECHO_REQUEST, 0, _, _, data @ ..] = message else { return None };
    if sum(source, destination, ICMPV6, message) != 0 {
        return None;
    }
    let mut reply = [[ECHO_REPLY, 0, 0, 0].as_slice(), data].concat();
    let checksum = sum(destination, source, ICMPV6, &reply).to_be_bytes();
    for (to, from) in reply.iter_mut().skip(2).zip(checksum) {
        *to = from;
    }
    let mut answer = header(ICMPV6, reply.len(), destination, source);
    answer.extend(reply);
    Some(answer)
}

/// Whether an ICMPv6 packet is the answer to an echo request.
pub(super) fn is_echo_reply(packet: &[u8]) -> bool {
    packet.get(IPV6) == Some(&ECHO_REPLY)
}

/// An echo request.
pub(crate) fn echo_request(source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
    let message = |[high, low]: [u8; 2]| [ECHO_REQUEST, 0, high, low, 1, 2, 0, 1, b'x'];
    let message = message(sum(source, destination, ICMPV6, &message([0, 0])).to_be_bytes());
    let mut packet = header(ICMPV6, message.len(), source, destination);
    packet.extend(message);
    packet
}

fn header(next: u8, length: usize, source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
    const HOPS: u8 = 64;
    let length = u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
    [[0x60, 0, 0, 0].as_slice(), &length, &[next, HOPS], &source.octets(), &destination.octets()].concat()
}

/// The internet checksum with the pseudo header; zero over a message whose own checksum is right.
fn sum(source: Ipv6Addr, destination: Ipv6Addr, next: u8, message: &[u8]) -> u16 {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes();
    let (source, destination) = (source.octets(), destination.octets());
    let pseudo = [source.as_slice(), &destination, &length, &[0, 0, 0, next]].concat();
    let words = [pseudo.as_slice(), message].into_iter().flat_map(|part| {
        part.chunks(2).map(|pair| match pair {
            [high, low] => u64::from(u16::from_be_bytes([*high, *low])),
            [high] => u64::from(*high) << 8,
            _ => 0,
        })
    });
    let mut total: u64 = words.sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

#[cfg(test)]
mod tests {
    use warren_proto::key::DiscoPrivate;

    use super::*;

    #[test]
    fn a_ping_is_answered_with_a_pong_of_1310_bytes_that_opens() {
        let (ours, theirs) = (DiscoPrivate::generate(), DiscoPrivate::generate());
        let plain = [[DISCO_PING, 1].as_slice(), &[7; 12], &[9; 32]].concat();
        let sealed = theirs.shared(&ours.public()).seal_with_nonce(&random(), &plain);
        let ping = [MAGIC.as_slice(), &theirs.public().0, &sealed].concat();
        assert_eq!(disco_sender(&ping), Some(theirs.public()));
        let shared = ours.shared(&theirs.public());
        let node = Some(NodePublic([9; 32]));
        assert_eq!(open_probe(&ping, &shared), Some(Probe::Ping { txid: [7; 12], node }));
        let pong = Probe::Pong { txid: [7; 12], observed: relay_endpoint(999) };
        let answer = seal_probe(&pong, &ours.public(), &shared);
        assert_eq!(answer.len(), 1310);
        let opened = theirs.shared(&ours.public()).open_with_nonce(&answer[DISCO_HEADER..]).unwrap();
        assert_eq!(opened[..2], [DISCO_PONG, 1]);
        assert_eq!(opened[2..14], [7; 12]);
        assert_eq!(opened[26..32], [127, 3, 3, 40, 3, 231]);
    }

    #[test]
    fn warrens_own_probes_are_understood_and_ours_by_it() {
        use warren_proto::disco::{self, Message};
        let (ours, theirs) = (DiscoPrivate::generate(), DiscoPrivate::generate());
        let (there, here) = (ours.shared(&theirs.public()), theirs.shared(&ours.public()));
        let (node, v6) = (NodePublic([9; 32]), "[2001:db8::1]:2".parse().unwrap());
        let endpoints = vec!["192.0.2.1:7".parse().unwrap(), v6];
        let pairs = [
            (
                Probe::Ping { txid: [1; 12], node: Some(node) },
                Message::Ping { txid: [1; 12], node: Some(node) },
            ),
            (Probe::Ping { txid: [1; 12], node: None }, Message::Ping { txid: [1; 12], node: None }),
            (Probe::Pong { txid: [2; 12], observed: v6 }, Message::Pong { txid: [2; 12], source: v6 }),
            (Probe::CallMeMaybe(endpoints.clone()), Message::CallMeMaybe(endpoints)),
            (Probe::CallMeMaybe(vec![]), Message::CallMeMaybe(vec![])),
        ];
        for (probe, message) in pairs {
            let sealed = seal_probe(&probe, &ours.public(), &there);
            assert_eq!(disco::open(&sealed, &here), Ok(message.clone()));
            let sealed = disco::seal(&message, &theirs.public(), &here, &random());
            assert_eq!(open_probe(&sealed, &there), Some(probe));
        }
    }

    #[test]
    fn an_echo_request_is_answered_and_a_broken_one_is_not() {
        let (a, b) = ("fd60::1".parse().unwrap(), "fd60::2".parse().unwrap());
        let mut packet = echo_request(a, b);
        let reply = echo_reply(&packet).unwrap();
        assert_eq!(ipv6(&reply), Some((b, a, ICMPV6)));
        assert_eq!(reply[IPV6], 129);
        assert_eq!(sum(b, a, ICMPV6, &reply[IPV6..]), 0);
        packet[IPV6 + 8] = b'y';
        assert_eq!(echo_reply(&packet), None);
    }

    #[test]
    fn a_tsmp_ping_is_answered_from_the_first_own_address() {
        let (a, b, first) =
            ("fd60::1".parse().unwrap(), "fd60::2".parse().unwrap(), "fd7a::2".parse().unwrap());
        let mut ping = header(TSMP, 9, a, b);
        ping.extend(b"p12345678");
        let pong = tsmp_pong(&ping, first).unwrap();
        assert_eq!(ipv6(&pong), Some((first, a, TSMP)));
        assert_eq!(pong[IPV6..], *b"o12345678\0\0");
    }

    #[test]
    fn short_and_strange_packets_are_ignored() {
        for length in 0..60 {
            for first in [0, 0x45, 0x60] {
                let mut packet = vec![0; length];
                if let Some(byte) = packet.first_mut() {
                    *byte = first;
                }
                assert_eq!(echo_reply(&packet), None);
                assert_eq!(tsmp_pong(&packet, Ipv6Addr::LOCALHOST), None);
            }
        }
    }
}
