//! Packets inside the tunnel: echoes, which the kernel at the other end sends back, and what else it sends.

use std::{collections::BTreeSet, net::Ipv6Addr, time::Instant};

use crate::support::LIMIT;

/// Bytes of an echo's payload.
const PAYLOAD: usize = 1024;
/// Echoes that make a megabyte.
pub(super) const MEGABYTE: u16 = 1024;
/// Echoes on their way at a time: as many as their relay keeps for a client, and more bytes than one message of a
/// websocket may have.
const WINDOW: usize = 32;

const IPV6: usize = 40;
const HEADER: usize = 8;
const UDP: u8 = 17;
const ICMP: u8 = 58;
const REQUEST: u8 = 128;
const REPLY: u8 = 129;
const NUMBER: u16 = 0x7a7e;

/// What came from inside.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// An echo with its sequence number.
    Echo(u16, Vec<u8>),
    /// A UDP datagram.
    Datagram(Vec<u8>),
}

/// Reads a packet; `None` for one that is about something else. What is wrong in it is a failure.
pub(super) fn read(packet: &[u8], from: Ipv6Addr, to: Ipv6Addr) -> Option<Received> {
    assert_eq!(packet[0] >> 4, 6, "no IPv6");
    let length = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
    let (protocol, body) = (packet[6], &packet[IPV6..IPV6 + length]);
    if packet[8..24] != from.octets() || packet[24..40] != to.octets() {
        return None;
    }
    let is_echo = protocol == ICMP && body[0] == REPLY && body[4..6] == NUMBER.to_be_bytes();
    if !is_echo && protocol != UDP {
        return None;
    }
    assert_eq!(checksum(from, to, protocol, body), 0, "a checksum is wrong");
    let payload = body[HEADER..].to_vec();
    Some(if is_echo {
        Received::Echo(u16::from_be_bytes([body[6], body[7]]), payload)
    } else {
        Received::Datagram(payload)
    })
}

/// Echoes that must all come back as they went.
pub(super) struct Echoes {
    from: Ipv6Addr,
    to: Ipv6Addr,
    missing: BTreeSet<u16>,
    /// No two runs send the same.
    seed: [u8; 32],
}

impl Echoes {
    pub(super) fn new(from: Ipv6Addr, to: Ipv6Addr, count: u16) -> Self {
        Self { from, to, missing: (0..count).collect(), seed: warren_proto::key::random() }
    }

    /// Sends each until it is back; `receive` gives nothing when it has waited for long enough.
    pub(super) fn run(&mut self, mut send: impl FnMut(&[u8]), mut receive: impl FnMut() -> Option<Vec<u8>>) {
        let until = Instant::now() + LIMIT;
        while !self.missing.is_empty() {
            assert!(Instant::now() < until, "{} echoes are missing", self.missing.len());
            let mut window: BTreeSet<u16> = self.missing.iter().copied().take(WINDOW).collect();
            window.iter().for_each(|number| send(&self.request(*number)));
            while !window.is_empty() {
                // What was lost is sent again.
                let Some(packet) = receive() else { break };
                if let Some(Received::Echo(number, payload)) = read(&packet, self.to, self.from)
                    && self.missing.remove(&number)
                {
                    assert!(payload == self.payload(number), "echo {number} came back changed");
                    window.remove(&number);
                }
            }
        }
    }

    fn payload(&self, number: u16) -> Vec<u8> {
        let number = number.to_be_bytes();
        (0..PAYLOAD).map(|at| self.seed[at % 32] ^ number[at % 2] ^ (at / 32) as u8).collect()
    }

    fn request(&self, number: u16) -> Vec<u8> {
        let mut body = vec![REQUEST, 0, 0, 0];
        body.extend(NUMBER.to_be_bytes());
        body.extend(number.to_be_bytes());
        body.extend(self.payload(number));
        let sum = checksum(self.from, self.to, ICMP, &body);
        body[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend((body.len() as u16).to_be_bytes());
        packet.extend([ICMP, 64]);
        packet.extend(self.from.octets());
        packet.extend(self.to.octets());
        packet.extend(body);
        packet
    }
}

/// The checksum of what has zeros in its place; 0 for what has the right one.
fn checksum(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, body: &[u8]) -> u16 {
    let mut pseudo = [from.octets(), to.octets()].concat();
    pseudo.extend((body.len() as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, protocol]);
    let words = |bytes: &[u8]| -> u32 {
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
    };
    let mut sum = words(&pseudo) + words(body);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
