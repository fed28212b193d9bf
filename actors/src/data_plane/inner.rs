//! The inner packets that end in the data plane: whose they are, and the answers to TSMP pings and, where
//! there is no kernel to do it, to ICMPv6 echo requests (tailnet-data 12.2).

use std::net::Ipv6Addr;

use warren_proto::tsmp::{self, Data, Message};

const HEADER: usize = 40;
const ICMPV6: u8 = 58;
const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
const HOP_LIMIT: u8 = 64;

/// What of an IPv6 packet's header counts here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Who sent it.
    pub(super) source: Ipv6Addr,
    /// Whom it is for.
    pub(super) destination: Ipv6Addr,
    /// What it carries.
    pub(super) content: Content,
}

/// What an inner packet carries, as far as it concerns the data plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// A message of the tunnels among themselves, never for a kernel.
    Tsmp,
    /// ICMPv6.
    Icmpv6,
    /// Anything else.
    Other,
}

impl Header {
    /// The header of an IPv6 packet; `None` for anything else.
    pub(super) fn of(packet: &[u8]) -> Option<Self> {
        let (header, _) = packet.split_first_chunk::<HEADER>()?;
        let (fixed, addresses) = header.split_first_chunk::<8>()?;
        let [version, _, _, _, _, _, next_header, _] = *fixed;
        let (source, rest) = addresses.split_first_chunk::<16>()?;
        let destination = rest.first_chunk::<16>()?;
        let content = match next_header {
            tsmp::PROTOCOL => Content::Tsmp,
            ICMPV6 => Content::Icmpv6,
            _ => Content::Other,
        };
        let (source, destination) = (Ipv6Addr::from(*source), Ipv6Addr::from(*destination));
        (version >> 4 == 6).then_some(Self { source, destination, content })
    }
}

/// A TSMP ping.
pub(super) fn tsmp_ping(from: Ipv6Addr, to: Ipv6Addr, data: Data) -> Vec<u8> {
    packet_between(from, to, tsmp::PROTOCOL, &Message::Ping(data).encode())
}

/// The pong to a TSMP ping; `None` for other messages.
pub(super) fn tsmp_pong(packet: &[u8]) -> Option<Vec<u8>> {
    let header = Header::of(packet)?;
    let Message::Ping(data) = Message::decode(packet.get(HEADER..)?)? else { return None };
    let pong = Message::Pong { data, port: 0 }.encode();
    Some(packet_between(header.destination, header.source, tsmp::PROTOCOL, &pong))
}

/// Which ping of ours a TSMP pong answers; `None` for other messages.
pub(super) fn tsmp_answered(packet: &[u8]) -> Option<Data> {
    match Message::decode(packet.get(HEADER..)?)? {
        Message::Pong { data, .. } => Some(data),
        Message::Ping(_) | Message::Rejected(_) => None,
    }
}

/// The reply to an ICMPv6 echo request; `None` for other messages.
pub(super) fn echo_reply(packet: &[u8]) -> Option<Vec<u8>> {
    let header = Header::of(packet)?;
    let ([kind, code, _, _], rest) = packet.get(HEADER..)?.split_first_chunk::<4>()?;
    if (*kind, *code) != (ECHO_REQUEST, 0) || rest.len() < 4 {
        return None;
    }
    let (from, to) = (header.destination, header.source);
    let unsigned = [[ECHO_REPLY, 0, 0, 0].as_slice(), rest].concat();
    let [high, low] = checksum(from, to, &unsigned).to_be_bytes();
    Some(packet_between(from, to, ICMPV6, &[[ECHO_REPLY, 0, high, low].as_slice(), rest].concat()))
}

fn packet_between(from: Ipv6Addr, to: Ipv6Addr, next_header: u8, body: &[u8]) -> Vec<u8> {
    let [high, low] = u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes();
    let fixed = [0x60, 0, 0, 0, high, low, next_header, HOP_LIMIT];
    [fixed.as_slice(), &from.octets(), &to.octets(), body].concat()
}

fn checksum(from: Ipv6Addr, to: Ipv6Addr, body: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u64 {
        let word = |pair: &[u8]| match *pair {
            [high, low] => u64::from(u16::from_be_bytes([high, low])),
            [high] => u64::from(high) << 8,
            _ => 0,
        };
        bytes.chunks(2).map(word).sum()
    };
    let mut sum = words(&from.octets()) + words(&to.octets()) + words(body);
    sum += body.len() as u64 + u64::from(ICMPV6);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // INVARIANT: the loop leaves 16 bits.
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: Ipv6Addr = Ipv6Addr::new(0xfd60, 0x627a, 0xa42b, 1, 2, 3, 4, 5);
    const B: Ipv6Addr = Ipv6Addr::new(0xfd60, 0x627a, 0xa42b, 6, 7, 8, 9, 10);

    #[test]
    fn a_tsmp_ping_is_answered_with_its_own_data() {
        let ping = packet_between(A, B, tsmp::PROTOCOL, b"p12345678 and more");
        let pong = tsmp_pong(&ping).unwrap();
        let header = Header { source: B, destination: A, content: Content::Tsmp };
        assert_eq!(Header::of(&pong), Some(header));
        assert_eq!(pong[40..], *b"o12345678\0\0");
        assert_eq!(tsmp_pong(&pong), None);
        assert_eq!((tsmp_answered(&pong), tsmp_answered(&ping)), (Some(*b"12345678"), None));
        assert_eq!(tsmp_ping(A, B, *b"12345678"), packet_between(A, B, tsmp::PROTOCOL, b"p12345678"));
        assert_eq!(tsmp_pong(&packet_between(A, B, tsmp::PROTOCOL, b"p1234567")), None);
    }

    #[test]
    fn an_echo_request_is_answered_with_a_valid_checksum() {
        let mut body = vec![ECHO_REQUEST, 0, 0, 0, 0, 7, 0, 1, 0xab, 0xcd, 0xef];
        let [high, low] = checksum(A, B, &body).to_be_bytes();
        body[2..4].copy_from_slice(&[high, low]);
        let reply = echo_reply(&packet_between(A, B, ICMPV6, &body)).unwrap();
        assert_eq!(reply[40], ECHO_REPLY);
        assert_eq!(reply[44..], body[4..]);
        assert_eq!(checksum(B, A, &reply[40..]), 0, "a message with its checksum sums up to nothing");
        assert_eq!(echo_reply(&reply), None);
    }

    /// A whole inner packet of the golden vectors.
    fn recorded(name: &str) -> Vec<u8> {
        let file = include_str!("../../../proto/tests/vectors/data/tsmp-icmp.json");
        let file: serde_json::Value = serde_json::from_str(file).unwrap();
        let vectors = file["vectors"].as_array().unwrap();
        let hex = vectors.iter().find(|vector| vector["name"] == name).unwrap()["bytes"].as_str().unwrap();
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn recorded_questions_are_answered_as_recorded() {
        // The recorded answers have a flow label of their own.
        let without_label = |name| [[0x60, 0, 0, 0].as_slice(), &recorded(name)[4..]].concat();
        let pong = without_label("tsmp-pong");
        assert_eq!(tsmp_pong(&recorded("tsmp-ping")), Some(pong.clone()));
        assert_eq!(tsmp_pong(&recorded("tsmp-ping-long")), Some(pong));
        assert_eq!(echo_reply(&recorded("icmp6-echo-request")), Some(without_label("icmp6-echo-reply")));
        for name in ["tsmp-ping-8", "tsmp-pong", "tsmp-pong-9", "tsmp-rejected", "icmp6-echo-reply"] {
            assert_eq!((tsmp_pong(&recorded(name)), echo_reply(&recorded(name))), (None, None), "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_packet_is_read_or_refused(bytes: Vec<u8>, next_header in prop::sample::select(vec![tsmp::PROTOCOL, ICMPV6, 17])) {
            let _ = (Header::of(&bytes), tsmp_pong(&bytes), echo_reply(&bytes));
            let packet = packet_between(A, B, next_header, &bytes);
            prop_assert!(Header::of(&packet).is_some());
            let _ = (tsmp_pong(&packet), echo_reply(&packet));
        }
    }
}
