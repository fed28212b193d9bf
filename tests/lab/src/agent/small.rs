//! The small languages that an agent answers by itself: path probes over the relay, TSMP pings and ICMPv6
//! echo requests inside the tunnel (tailnet-data 5, 12.2). Written apart from warren's own on purpose.

use std::net::Ipv6Addr;

use warren_proto::key::{BoxShared, DiscoPublic, random};

/// Length of an IPv6 header.
pub(super) const IPV6: usize = 40;
pub(super) const TCP: u8 = 6;
pub(super) const ICMPV6: u8 = 58;
pub(super) const TSMP: u8 = 99;

const MAGIC: &[u8; 6] = b"TS\xf0\x9f\x92\xac";
/// Magic and sender.
const DISCO_HEADER: usize = 6 + 32;
/// Type, version and padded body of a ping or pong: the datagram then has 1310 bytes.
const PADDED: usize = 1232;
const DISCO_PING: u8 = 1;
const DISCO_PONG: u8 = 2;

/// The sender of a path probe, if the packet is one.
pub(super) fn disco_sender(packet: &[u8]) -> Option<DiscoPublic> {
    packet.strip_prefix(MAGIC)?.first_chunk().map(|key| DiscoPublic(*key))
}

/// The transaction of a ping that was made between these keys.
pub(super) fn open_ping(packet: &[u8], shared: &BoxShared) -> Option<[u8; 12]> {
    let plain = shared.open_with_nonce(packet.get(DISCO_HEADER..)?)?;
    let body = plain.strip_prefix(&[DISCO_PING])?.get(1..)?;
    body.first_chunk().copied()
}

/// The answer to a ping that came over the relay of a region.
pub(super) fn pong(txid: [u8; 12], region: u16, own: &DiscoPublic, shared: &BoxShared) -> Vec<u8> {
    // What stands for a relay where a socket address is told.
    const RELAY: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 3, 3, 40];
    let mut plain = [[DISCO_PONG, 1].as_slice(), &txid, &RELAY, &region.to_be_bytes()].concat();
    plain.resize(PADDED, 0);
    [MAGIC.as_slice(), &own.0, &shared.seal_with_nonce(&random(), &plain)].concat()
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
    const REQUEST: u8 = 128;
    const REPLY: u8 = 129;
    let (source, destination, _) = ipv6(packet)?;
    let length = usize::from(u16::from_be_bytes(*packet.get(4..)?.first_chunk()?));
    let message = packet.get(IPV6..IPV6 + length)?;
    let [REQUEST, 0, _, _, data @ ..] = message else { return None };
    if sum(source, destination, ICMPV6, message) != 0 {
        return None;
    }
    let mut reply = [[REPLY, 0, 0, 0].as_slice(), data].concat();
    let checksum = sum(destination, source, ICMPV6, &reply).to_be_bytes();
    for (to, from) in reply.iter_mut().skip(2).zip(checksum) {
        *to = from;
    }
    let mut answer = header(ICMPV6, reply.len(), destination, source);
    answer.extend(reply);
    Some(answer)
}

/// An echo request, for tests.
#[cfg(test)]
pub(crate) fn echo_request(source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![128, 0, 0, 0, 1, 2, 0, 1, b'x'];
    let checksum = sum(source, destination, ICMPV6, &message).to_be_bytes();
    message[2..4].copy_from_slice(&checksum);
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
        let txid = open_ping(&ping, &shared).unwrap();
        let answer = pong(txid, 999, &ours.public(), &shared);
        assert_eq!(answer.len(), 1310);
        let opened = theirs.shared(&ours.public()).open_with_nonce(&answer[DISCO_HEADER..]).unwrap();
        assert_eq!(opened[..2], [DISCO_PONG, 1]);
        assert_eq!(opened[2..14], [7; 12]);
        assert_eq!(opened[26..32], [127, 3, 3, 40, 3, 231]);
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
